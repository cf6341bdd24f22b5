"""Write the trained model as a folder that any reader of Stable Diffusion's layout can load, float16.

    python training/export.py [FOLDER] [--start-share 0.5]

The folder is src/sdedit/default_model unless another is named. With a share, UNet and text encoder lie so far from the
trained weights towards those that training began with: a model that trains on often does best between the two (Wortsman
et al. 2022, arXiv 2109.01903). `evaluate.py` measures it and writes its card.
"""

import argparse
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from captions import things
from grow import PARTS, file
from latents import finished_vae
from loop import read_state
from model import SCHEDULER, TINY, UNET, VAE, averaged, new_denoiser, new_tiny, start_folder, tokenizer
from paths import EXPORT, read_json, work_folder, write_json
from sdedit.apps.finetune.objective import Denoiser

LAYOUT = {
    "_class_name": "StableDiffusionImg2ImgPipeline",
    "_diffusers_version": "0.42.1",
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
}


def write_config(folder: Path, name: str, kind: str, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"_class_name": kind, "_diffusers_version": "0.42.1", **config}, folder / name)


def write_model(folder: Path, kind: str, config: dict[str, Any], model: nn.Module) -> None:
    write_config(folder, "config.json", kind, config)
    weights = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def write_text_encoder(folder: Path, model: CLIPTextModel) -> None:
    """In the published form: keys under "text_model.", and float32 as what to compute in, like the other parts."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_diff_dict(), "architectures": ["CLIPTextModel"], "dtype": "float32"}
    write_json(config, folder / "config.json")
    weights = {"text_model." + key.removeprefix("text_model."): value for key, value in model.state_dict().items()}
    weights = {key: value.half().contiguous() for key, value in weights.items() if not key.endswith("position_ids")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def towards_start(denoiser: Denoiser, share: float) -> Denoiser:
    """The same with its weights so far towards those of the start."""
    if share:
        if start_folder() is None:
            raise ValueError("--start-share: this training began with no model; start it with run.py --start FOLDER")
        before = new_denoiser().state_dict()
        for name, weight in denoiser.state_dict().items():
            if weight.is_floating_point():
                weight.lerp_(before[name], share)
    return denoiser


def history(denoiser: Denoiser, vae: nn.Module, tiny: nn.Module, start_share: float) -> dict[str, Any]:
    """What the card says of sizes and of the training; what an earlier training did is added to it."""
    parts = {"vae": vae, "tiny": tiny, "unet": denoiser.unet, "text": denoiser.text_encoder}
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in parts.items()}
    start = start_folder()
    before = read_json(start / "training.json") if start else {}
    steps: dict[str, Any] = {}
    for part, names in {
        "vae": (*(file(part).stem for part in PARTS), "vae"),
        "tiny": ("tiny",),
        "unet": ("unet",),
    }.items():
        paths = [work_folder() / f"{name}.pt" for name in names]
        states = [read_state(path) for path in paths if path.exists()]
        steps[f"{part}_steps"] = before.get(f"{part}_steps", 0) + sum(state["step"] for state in states)
        minutes = sum(state["seconds"] for state in states) / 60
        steps[f"{part}_minutes"] = round(before.get(f"{part}_minutes", 0) + minutes)
    rows = work_folder() / "latents.json"
    pictures = len(set(read_json(rows))) if rows.exists() else before["pictures"]
    return {**sizes, **steps, "things": len(things()), "pictures": pictures, "start_share": start_share}


def export(folder: Path, start_share: float = 0.0) -> None:
    """Write all parts."""
    denoiser = towards_start(averaged(new_denoiser(), work_folder() / "unet.pt"), start_share)
    vae, tiny = finished_vae(), averaged(new_tiny(), work_folder() / "tiny.pt")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(LAYOUT, folder / "model_index.json")
    write_model(folder / "vae", "AutoencoderKL", VAE, vae)
    write_model(folder / "tiny_vae", "AutoencoderTiny", TINY, tiny)
    write_model(folder / "unet", "UNet2DConditionModel", UNET, denoiser.unet)
    write_text_encoder(folder / "text_encoder", denoiser.text_encoder)
    write_config(folder / "scheduler", "scheduler_config.json", "DDIMScheduler", SCHEDULER)
    words = tokenizer()
    source = Path(words.name_or_path)
    (folder / "tokenizer").mkdir(exist_ok=True)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        (folder / "tokenizer" / name).write_bytes((source / name).read_bytes())
    write_json(history(denoiser, vae, tiny, start_share), folder / "training.json")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=EXPORT)
    parser.add_argument("--start-share", type=float, default=0.0)
    args = parser.parse_args()
    export(args.folder, args.start_share)


if __name__ == "__main__":
    main()
