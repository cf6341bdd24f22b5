"""What a file is and whether it would load: `describe` reads headers and configs, and makes nothing of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sdedit.files import read_json
from sdedit.loading.families import SD1, SD2, recognise
from sdedit.loading.headers import Header, TensorInfo, read_header
from sdedit.loading.pickles import StoredTensor

# Objects that embeddings of AUTOMATIC1111's web UI may hold; here they are only walked through.
EMBEDDING_CLASSES = frozenset({"torch.nn.modules.container.ParameterDict", "torch.nn.parameter.Parameter"})

_WIDTHS = {768: SD1, 1024: SD2, 1280: "Stable Diffusion XL", 2048: "Stable Diffusion XL"}
_LORA_FORMATS = (
    (r"^(unet|text_encoder):\d+:", "cloneofsimo"),
    (r"\.hada_w", "LyCORIS LoHa"),
    (r"\.lokr_w", "LyCORIS LoKr"),
    (r"\.lora_[AB]\.", "PEFT"),
    (r"\.processor\.to_\w+_lora\.", "diffusers, old"),
    (r"\.lora(_linear_layer)?\.(down|up)\.", "diffusers"),
    (r"[._]lora_(down|up)\.", "kohya"),
)
# The factor whose rows are the rank, and whose columns what the layer takes in.
_DOWN = re.compile(
    r"(lora_down|lora\.down|_lora\.down|lora_linear_layer\.down|lora_A(\.\w+)?)\.weight$|:down$|hada_w1_b$"
)


@dataclass
class FileReport:
    """What a file, or a folder, is.

    Attributes:
        kind: "checkpoint", "VAE", "UNet", "LoRA", "textual inversion", "IP-Adapter", "model folder", …
        family: Such as "Stable Diffusion 1.x"; empty if it cannot be told.
        prediction_type: Of a checkpoint or folder.
        format: Which program's layout it has.
        precision: Dtypes of its numbers, the commonest first.
        size: Bytes.
        parameters: Numbers in its tensors.
        rank: Of a LoRA, as text: "4", or "4 to 64".
        tokens: Of an embedding, or of a LoRA that brings some: with the number of vectors if there are several.
        loads: Would it load?
        reason: Why not; or by what it is loaded.
    """

    path: Path
    kind: str
    family: str = ""
    prediction_type: str = ""
    format: str = ""
    precision: str = ""
    size: int = 0
    parameters: int = 0
    rank: str = ""
    tokens: list[str] = field(default_factory=list)
    loads: bool = False
    reason: str = ""

    def __str__(self) -> str:
        """One line for each thing that is known."""
        shown: dict[str, Any] = {f.name.replace("_", " "): getattr(self, f.name) for f in fields(self)}
        shown["size"] = f"{self.size / 1e6:,.1f} MB" if self.size >= 1e5 else f"{self.size / 1e3:,.1f} kB"
        shown["parameters"] = f"{self.parameters:,}" if self.parameters else ""
        shown["tokens"] = ", ".join(self.tokens)
        shown["loads"] = f"yes, with {self.reason}" if self.loads else f"no: {self.reason}"
        return "\n".join(f"{key}: {value}" for key, value in shown.items() if key != "reason" and value)


def describe(path: str | os.PathLike[str]) -> FileReport:
    """Say what a file of weights or a model folder is.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: It is damaged, or not a file of weights at all.
    """
    path = Path(path)
    if path.is_dir():
        return _describe_folder(path)
    header = read_header(path, EMBEDDING_CLASSES)
    tensors = header.tensors or _flat(header.tree)
    report = FileReport(path, "unknown", size=path.stat().st_size, format=_container(header), **_numbers(tensors))
    if _describe_embedding(report, header, tensors):
        return report
    found = recognise(tensors)
    report.kind, report.family, report.reason = found.kind, found.family, found.refusal or ""
    if found.kind == "LoRA":
        _describe_lora(report, header, tensors)
    elif found.kind == "IP-Adapter":
        _describe_ip_adapter(report, tensors)
    elif found.refusal is None:
        _describe_networks(report)
    return report


def _container(header: Header) -> str:
    return "safetensors" if header.kind == "safetensors" else "pickle"


def _flat(tree: Any) -> dict[str, TensorInfo]:
    """Tensors of nested dicts, their names joined by dots."""
    found: dict[str, TensorInfo] = {}
    todo: list[tuple[str, Any, int]] = [("", tree, 0)]
    while todo and len(found) < 100_000:
        name, value, depth = todo.pop()
        if isinstance(value, StoredTensor):
            found[name] = TensorInfo(value.shape, value.dtype)
        elif isinstance(value, dict) and depth < 3:
            todo += [(f"{name}.{key}" if name else str(key), inner, depth + 1) for key, inner in value.items()]
    return found


def _numbers(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    sizes: dict[str, int] = {}
    for info in tensors.values():
        dtype = str(info.dtype).removeprefix("torch.")
        sizes[dtype] = sizes.get(dtype, 0) + info.nbytes
    # What makes up less than a thousandth is counters and the like.
    common = [d for d in sorted(sizes, key=lambda d: -sizes[d]) if 1000 * sizes[d] >= sum(sizes.values())]
    return {
        "precision": ", ".join(common),
        "parameters": sum(info.nbytes // info.dtype.itemsize for info in tensors.values()),
    }


def _describe_networks(report: FileReport) -> None:
    """A checkpoint, UNet or VAE: each of its networks is built without weights, and compared."""
    from sdedit.loading.single_file import SingleFile, check_vocabulary
    from sdedit.loading.training_config import find_training

    classes = {"UNet": ("UNet2DConditionModel", ["unet"]), "VAE": ("AutoencoderKL", ["vae"])}
    owner, names = classes.get(report.kind, ("StableDiffusionImg2ImgPipeline", ["unet", "vae", "text_encoder"]))
    try:
        file = SingleFile(report.path, training=find_training(report.path, None, None, None))
        if "unet" in names:
            report.prediction_type = file.prediction_type
        networks = {name: file.network(name) for name in names}
        if "text_encoder" in networks:
            check_vocabulary(file, networks["text_encoder"])
        report.loads, report.reason = True, f"{owner}.from_single_file"
    except ValueError as error:
        report.reason = str(error).replace("\n", "; ")
    report.format += ", single file"


def _describe_lora(report: FileReport, header: Header, tensors: Mapping[str, TensorInfo]) -> None:
    text = "\n".join(tensors)
    name = next((name for pattern, name in _LORA_FORMATS if re.search(pattern, text, re.MULTILINE)), "unknown")
    report.format += f", {name}"
    down = {key: info.shape for key, info in tensors.items() if _DOWN.search(key) and len(info.shape) >= 2}
    if down:
        ranks = sorted({shape[0] for shape in down.values()})
        report.rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    report.tokens = [key for key, info in tensors.items() if re.fullmatch(r"<[^>]+>", key) and info.shape]
    cross = {shape[1] for key, shape in down.items() if re.search(r"attn2.to_[kv]", key)}
    family = _family(cross or {shape[1] for shape in down.values()})
    report.family = "Stable Diffusion XL" if re.search(r"^lora_te2_|^text_encoder_2\.", text, re.MULTILINE) else family
    _settle(report, "load_lora_weights")


def _describe_ip_adapter(report: FileReport, tensors: Mapping[str, TensorInfo]) -> None:
    keys = {info.shape[1] for name, info in tensors.items() if "to_k_ip" in name and len(info.shape) == 2}
    report.family = _family(keys)
    if any("lora" in name for name in tensors):
        report.format += ", FaceID"
        report.reason = "FaceID adapters need a face recogniser; base and Plus are supported"
        return
    report.format += ", Plus" if "image_proj.latents" in tensors else ", base"
    _settle(report, "load_ip_adapter")


def _describe_embedding(report: FileReport, header: Header, tensors: Mapping[str, TensorInfo]) -> bool:
    """Is it a textual inversion? Those are a few vectors under a name, in three layouts."""
    if header.tensors and not all(info.shape and len(info.shape) <= 2 for info in header.tensors.values()):
        return False
    tree = header.tree if isinstance(header.tree, dict) else {}
    if isinstance(tree.get("string_to_param"), dict):
        vectors = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.startswith("string_to_param.")}
        names, layout = {str(tree.get("name") or report.path.stem): next(iter(vectors.values()), None)}, "AUTOMATIC1111"
    elif set(tensors) == {"emb_params"}:
        names, layout = {report.path.stem: tensors["emb_params"]}, "kohya"
    elif set(tensors) == {"clip_g", "clip_l"}:
        names, layout = {report.path.stem: tensors["clip_g"]}, "two encoders"
    elif 0 < len(tensors) <= 64 and not any("." in name or ":" in name for name in tensors):
        names, layout = dict(tensors), "diffusers"
    else:
        return False
    shapes = {name: info.shape for name, info in names.items() if info is not None and info.shape}
    if not shapes or not {shape[-1] for shape in shapes.values()} <= set(_WIDTHS):
        return False
    report.kind, report.format = "textual inversion", f"{report.format}, {layout}"
    report.tokens = [name if len(s) == 1 or s[0] == 1 else f"{name} ({s[0]} vectors)" for name, s in shapes.items()]
    report.family = _WIDTHS[max(shape[-1] for shape in shapes.values())]
    _settle(report, "load_textual_inversion")
    return True


def _family(widths: Iterable[int]) -> str:
    """The family whose text has one of these widths; XL's are asked for first, since it has others besides."""
    return next((_WIDTHS[width] for width in (2048, 1024, 768) if width in set(widths)), "")


def _settle(report: FileReport, method: str) -> None:
    if report.family not in (SD1, SD2, ""):
        report.reason = f"it is for {report.family}"
    elif not re.search("float", report.precision):
        report.reason = f"its numbers are {report.precision or 'missing'}; expected floating point"
    else:
        report.loads, report.reason = True, method


def _describe_folder(folder: Path) -> FileReport:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if (folder / "model_index.json").is_file():
        return _describe_model(FileReport(folder, "model folder", size=size))
    for name in ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.safetensors"):
        if (folder / name).is_file():
            return describe(folder / name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no model_index.json, config.json or LoRA: it is no model folder")
    name = str(read_json(folder / "config.json").get("_class_name", "of transformers"))
    report = FileReport(folder, f"folder of one network, {name}", size=size)
    known = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}
    if name in known:
        _check_networks(report, {known[name]: folder})
        report.reason = report.reason or f"{name}.from_pretrained"
    else:
        report.reason = "only folders of a UNet or a VAE load by themselves"
    report.loads = report.reason.endswith("from_pretrained")
    return report


def _describe_model(report: FileReport) -> FileReport:
    from sdedit.loading.folders import COMPONENTS

    folder = report.path
    index = read_json(folder / "model_index.json")
    listed = [name for name, entry in index.items() if isinstance(entry, list) and entry[-1:] != [None]]
    if unknown := sorted(set(listed) - set(COMPONENTS)):
        report.reason = f"it is a {index.get('_class_name')}, with {', '.join(unknown)}"
        return report
    if missing := [name for name in listed if not (folder / name).is_dir()]:
        report.reason = f"it lacks the folder {', '.join(missing)}"
        return report
    if not {"unet", "vae", "scheduler"} <= set(listed):
        report.reason = "model_index.json lists no unet, vae or scheduler"
        return report
    settings = read_json(folder / "scheduler" / "scheduler_config.json")
    report.prediction_type = str(settings.get("prediction_type", "epsilon"))
    _check_networks(report, {name: folder / name for name in ("unet", "vae")})
    report.loads = not report.reason
    report.reason = report.reason or "StableDiffusionImg2ImgPipeline.from_pretrained"
    return report


def _check_networks(report: FileReport, folders: Mapping[str, Path]) -> None:
    """Compare the headers of weights with what their config.json describes; a difference becomes the reason."""
    tensors: dict[str, TensorInfo] = {}
    for name, folder in folders.items():
        config = read_json(folder / "config.json")
        if name == "unet":
            report.family = SD2 if config.get("use_linear_projection") else SD1
            if config.get("in_channels", 4) != 4:
                report.reason = f"its UNet takes {config['in_channels']} channels, not the 4 of image-to-image"
                return
        try:
            found = _compare_headers(name, config, folder)
        except (ValueError, FileNotFoundError) as error:
            report.reason = str(error).replace("\n", "; ")
            return
        tensors |= {f"{name}.{key}": info for key, info in found.items()}
    for key, value in _numbers(tensors).items():
        setattr(report, key, value)


def _compare_headers(name: str, config: Mapping[str, Any], folder: Path) -> dict[str, TensorInfo]:

    from sdedit.loading.folders import explained, vae_name, weights_in
    from sdedit.loading.pretrained import model_class
    from sdedit.loading.weights import blank, fits

    cls = model_class(str(config.get("_class_name", {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}[name])))
    with blank(), explained(folder / "config.json", cls):
        model = cls.from_config(config)
    return fits(model, weights_in(folder, None, None), vae_name)[0]
