"""Write the trained model as a folder that any reader of Stable Diffusion's layout can load, float16.

    python training/export.py [FOLDER]

The folder is src/sdedit/default_model unless another is named.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

import train_unet
import train_vae
from data import HOLD_OUT_EVERY, load, things
from latents import finished_vae
from paths import EXPORT, HERE, read_json, work_folder, write_json
from words import LENGTH, tokenizer

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
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.42.1",
    "num_train_timesteps": train_unet.STEPS,
    "beta_start": train_unet.BETAS[0],
    "beta_end": train_unet.BETAS[1],
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "timestep_spacing": "leading",
}


def write_model(folder: Path, kind: str, config: dict, model: nn.Module) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json({"_class_name": kind, "_diffusers_version": "0.42.1", **config}, folder / "config.json")
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


def rounded(model: nn.Module) -> nn.Module:
    """The model with its weights rounded to float16, as they will be read back."""
    return model.half().float()


def card(model: train_unet.Painter, vae: nn.Module, state: dict) -> str:
    pictures, items = load()
    held_out = [i for i, item in enumerate(items) if item.held_out]
    vae_state = torch.load(work_folder() / "vae.pt", weights_only=True)
    sizes = {
        name: sum(p.numel() for p in part.parameters()) / 1e6
        for name, part in (("vae", vae), ("unet", model.unet), ("text", model.text))
    }
    psnr = train_vae.psnr(vae, pictures, held_out)
    print(f"PSNR {psnr:.2f} dB over {len(held_out)} held-out pictures")
    return (HERE / "card.md").read_text("utf-8").format(
        **sizes,
        total=sum(sizes.values()),
        psnr=psnr,
        held_out=len(held_out),
        every=HOLD_OUT_EVERY,
        things=len(things()),
        pictures=len(read_json(work_folder() / "latents.json")),
        length=LENGTH,
        batch=state["batch"],
        unet_steps=state["step"],
        unet_minutes=state["seconds"] / 60,
        vae_steps=vae_state["step"],
        vae_minutes=vae_state["seconds"] / 60,
    )


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else EXPORT
    words = tokenizer()
    model = train_unet.Painter(words).eval()
    state = torch.load(work_folder() / "unet.pt", weights_only=True)
    model.load_state_dict(state["ema"])
    model, vae = rounded(model), rounded(finished_vae())
    folder.mkdir(parents=True, exist_ok=True)
    write_json(LAYOUT, folder / "model_index.json")
    write_model(folder / "vae", "AutoencoderKL", {**train_vae.CONFIG, "scaling_factor": train_unet.LATENT_SCALE}, vae)
    write_model(folder / "unet", "UNet2DConditionModel", train_unet.CONFIG, model.unet)
    (folder / "README.md").write_text(card(model, vae, state), encoding="utf-8")
    write_text_encoder(folder / "text_encoder", model.text)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(SCHEDULER, folder / "scheduler" / "scheduler_config.json")
    source = work_folder() / "tokenizer"
    (folder / "tokenizer").mkdir(exist_ok=True)
    for path in source.iterdir():
        (folder / "tokenizer" / path.name).write_bytes(path.read_bytes())
    for path in folder.rglob("*.safetensors"):
        path.chmod(0o644)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB after {state['step']} steps")


if __name__ == "__main__":
    main()
