"""What a file is and whether it would load: `describe` lets the loaders themselves try, without reading the weights."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sdedit.files import read_json, shown
from sdedit.loading.families import EMBEDDING_CLASSES, FAMILY_OF_WIDTH, SD1, SD2, XL, recognise
from sdedit.loading.folders import DEFAULT_MODEL, weights_in
from sdedit.loading.headers import TensorInfo, read_header
from sdedit.loading.tokenizer import MERGES, SIZE, vocabulary

_ADAPTERS = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin", "adapter_model.safetensors")

# Where adapters go: the networks of each family, as far as their configs differ from the classes' defaults.
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
_VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_VIT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_SD2_UNET = {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True}
_OURS = "the model of this package"
_NETWORKS: dict[str, tuple[Mapping[str, Any] | Path, Mapping[str, Any] | Path]] = {
    SD1: ({"cross_attention_dim": 768}, _CLIP | _VIT_L | {"hidden_act": "quick_gelu"}),
    SD2: (_SD2_UNET, _CLIP | _VIT_H | {"hidden_act": "gelu"}),
    _OURS: (DEFAULT_MODEL / "unet", DEFAULT_MODEL / "text_encoder"),
}


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
        lines: dict[str, Any] = {f.name.replace("_", " "): getattr(self, f.name) for f in fields(self)}
        lines["size"] = f"{self.size / 1e6:,.1f} MB" if self.size >= 1e5 else f"{self.size / 1e3:,.1f} kB"
        lines["parameters"] = f"{self.parameters:,}" if self.parameters else ""
        lines["tokens"] = ", ".join(self.tokens)
        lines["loads"] = f"yes, with {self.reason}" if self.loads else f"no: {self.reason}"
        return "\n".join(f"{key}: {value}" for key, value in lines.items() if key != "reason" and value)


def describe(path: str | os.PathLike[str]) -> FileReport:
    """Say what a file of weights or a model folder is. Whether it loads is the answer of the loader that it is for.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: It is damaged, or not a file of weights at all.
    """
    path = Path(path)
    if path.is_dir():
        return _describe_folder(path)
    header = read_header(path, EMBEDDING_CLASSES)
    tensors = header.nested()
    found = recognise(tensors)
    container = "safetensors" if header.kind == "safetensors" else "pickle"
    report = FileReport(path, found.kind, found.family, size=path.stat().st_size, format=container, **_numbers(tensors))
    report.reason = found.refusal or ""
    try:
        if found.kind == "LoRA":
            _try_lora(report)
        elif found.kind == "IP-Adapter":
            _try_ip_adapter(report, tensors)
        elif found.kind == "textual inversion":
            _try_embedding(report, tensors)
        elif found.refusal is None:
            _try_networks(report)
    except (ValueError, FileNotFoundError) as error:
        report.reason = str(error).replace("\n", "; ")
    return report


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


def _try_networks(report: FileReport) -> None:
    """A checkpoint, UNet or VAE."""
    from sdedit.loading.pretrained import model_class
    from sdedit.loading.single_file import load_network, load_single_file

    report.format += ", single file"
    if report.kind in ("UNet", "VAE"):
        name = {"UNet": "UNet2DConditionModel", "VAE": "AutoencoderKL"}[report.kind]
        load_network(model_class(name), report.path, read=False)
        report.loads, report.reason = True, f"{name}.from_single_file"
        return
    from sdedit.pipeline import StableDiffusionImg2ImgPipeline

    parts = load_single_file(report.path, read=False)
    report.prediction_type = parts.pop("load_report").prediction_type
    StableDiffusionImg2ImgPipeline(**parts)
    report.loads, report.reason = True, "StableDiffusionImg2ImgPipeline.from_single_file"


def _pipeline_for(family: str) -> Any:
    """What can be asked to load an adapter: a pipeline's networks of a family, without values."""
    from sdedit.adapters.lora import LoraLoader
    from sdedit.models.blank import blank
    from sdedit.models.clip_text import CLIPTextEncoder
    from sdedit.models.unet import UNet2DConditionModel

    class Blank(LoraLoader):
        tokenizer = None

        def _lora_models(self) -> dict[str, Any]:
            return {"unet": self.unet, "text_encoder": self.text_encoder}  # though they have no values

    unet, text_encoder = _NETWORKS[family]
    pipeline = Blank()
    with blank():
        pipeline.unet = UNet2DConditionModel.from_config(unet)
        pipeline.text_encoder = CLIPTextEncoder.from_config(text_encoder)
    return pipeline


def _other_family(its: str | None) -> str | None:
    """Where to try an adapter that does not fit SD 1.x: in the family that it seems to be for, or in our own model."""
    return None if its in (SD1, XL) else SD2 if its == SD2 else _OURS


def _try_lora(report: FileReport) -> None:
    found, family = _pipeline_for(SD1).is_lora_supported(report.path), SD1
    if not found and (other := _other_family(found.family)):
        second = _pipeline_for(other).is_lora_supported(report.path)
        found, family = (second, other) if second or other == SD2 else (found, family)
    kinds = " ".join(kind for kind in found.kinds if kind != "LoRA")
    report.format += f", {found.layout}{f' {kinds}' if kinds else ''}"
    report.rank = " to ".join(str(rank) for rank in sorted({*found.rank[:1], *found.rank[-1:]}))
    report.tokens, report.family = list(found.tokens), family if found else found.family or ""
    report.loads, report.reason = bool(found), (found.problem or "load_lora_weights").replace("\n", "; ")


def _try_ip_adapter(report: FileReport, tensors: Mapping[str, TensorInfo]) -> None:
    from sdedit.adapters.ip_adapter import read_ip_adapter

    widths = {info.shape[1] for name, info in tensors.items() if "to_k_ip" in name and len(info.shape) == 2}
    report.family = FAMILY_OF_WIDTH.get(max(widths, default=0), "")
    family = SD1 if report.family == SD1 else _other_family(report.family) or SD1
    found = read_ip_adapter(report.path, _pipeline_for(family).unet)
    report.format += f", {found.image_proj.kind}"
    report.family, report.loads, report.reason = family, True, "load_ip_adapter"


class _Words:
    """CLIP's vocabulary, as far as a textual inversion is compared with it."""

    def get_vocab(self) -> dict[str, int]:
        """Tokens and their numbers."""
        return vocabulary(gzip.decompress(MERGES.read_bytes()).decode())

    def __len__(self) -> int:
        return SIZE


def _try_embedding(report: FileReport, tensors: Mapping[str, TensorInfo]) -> None:
    from sdedit.adapters.embedding_files import check_embeddings, read_embeddings
    from sdedit.adapters.nested import read_nested

    theirs = ("string_to_param", "emb_params")
    layout = next((kind for kind in theirs if any(name.startswith(kind) for name in tensors)), "")
    report.format += {"string_to_param": ", AUTOMATIC1111", "emb_params": ", kohya", "": ", diffusers"}[layout]
    found = read_embeddings(report.path, None, read_nested)
    counts = {str(one.token): len(one.vectors) for one in found}
    report.tokens = [name if count == 1 else f"{name} ({count} vectors)" for name, count in counts.items()]
    width = next((width for width, family in FAMILY_OF_WIDTH.items() if family == report.family), 768)
    check_embeddings(found, _Words(), (SIZE, width), 75)
    report.loads, report.reason = True, "load_textual_inversion"


def _describe_folder(folder: Path) -> FileReport:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if (folder / "model_index.json").is_file():
        return _describe_model(FileReport(folder, "model folder", size=size))
    for name in _ADAPTERS:
        if (folder / name).is_file():
            return describe(folder / name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no model_index.json, config.json or LoRA: it is no model folder")
    name = str(read_json(folder / "config.json").get("_class_name", "of transformers"))
    report = FileReport(folder, f"folder of one network, {shown(name)}", size=size)
    if name not in ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny"):
        report.reason = "only folders of a UNet or a VAE load by themselves"
        return report
    from sdedit.loading.pretrained import load_model, model_class

    try:
        model = load_model(model_class(name), folder, read=False)
    except (ValueError, FileNotFoundError) as error:
        report.reason = str(error).replace("\n", "; ")
        return report
    if name == "UNet2DConditionModel":
        report.family = SD2 if model.config.use_linear_projection else SD1
    _count(report, [folder])
    report.loads, report.reason = True, f"{name}.from_pretrained"
    return report


def _describe_model(report: FileReport) -> FileReport:
    from sdedit.loading.pretrained import load_components
    from sdedit.pipeline import StableDiffusionImg2ImgPipeline

    folder = report.path
    try:
        pipe = StableDiffusionImg2ImgPipeline(**load_components(folder, read=False))
    except (ValueError, FileNotFoundError, ImportError) as error:
        report.reason = str(error).replace("\n", "; ")
        return report
    report.family = SD2 if pipe.unet.config.use_linear_projection else SD1
    report.prediction_type = pipe.scheduler.config.prediction_type
    _count(report, [folder / name for name in ("unet", "vae")])
    report.loads, report.reason = True, "StableDiffusionImg2ImgPipeline.from_pretrained"
    return report


def _count(report: FileReport, folders: Iterable[Path]) -> None:
    files = [file for folder in folders for file in weights_in(folder, None, None)]
    tensors = {f"{file}:{name}": info for file in files for name, info in read_header(file).tensors.items()}
    for key, value in _numbers(tensors).items():
        setattr(report, key, value)
