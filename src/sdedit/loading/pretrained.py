"""A pipeline's components for PyTorch, each made from its folder, and written to one."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sdedit.config import FORMAT_VERSION
from sdedit.files import read_json
from sdedit.loading.checkpoint import fill
from sdedit.loading.folders import (
    COMPONENTS,
    DEFAULT_MODEL,
    explained,
    find_folder,
    has_variant,
    listed_components,
    load_processor,
    transformers_class,
    weights_in,
)
from sdedit.loading.layout import clip_name, forget_shards, vae_name
from sdedit.models.blank import blank

if TYPE_CHECKING:
    from sdedit.models.model import Model

M = TypeVar("M", bound="Model")

_MODELS = {
    "UNet2DConditionModel": "sdedit.models.unet",
    "AutoencoderKL": "sdedit.models.vae",
    "AutoencoderTiny": "sdedit.models.tiny_vae",
    "StableDiffusionSafetyChecker": "sdedit.models.safety_checker",
}


def load_model(
    cls: type[M],
    path_or_id: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> M:
    """Load one of our networks; see `Model.from_pretrained`."""
    _check_choices(torch_dtype, use_safetensors)
    root = find_folder(
        path_or_id,
        components=[subfolder or ""],
        variant=variant,
        use_safetensors=use_safetensors,
        **hub,
    )
    folder = root / subfolder if subfolder else root
    config = read_json(folder / cls.config_name)
    files = weights_in(folder, variant, use_safetensors)
    with blank(), explained(folder / cls.config_name, cls):
        model = cls.from_config(config)
    fill(model, files, dtype=torch_dtype or torch.float32, rename=vae_name)
    return model.eval()


def model_class(class_name: str) -> Any:
    """The class of one of our networks, by the name that configs have for it."""
    if class_name not in _MODELS:
        raise ValueError(f"{class_name} is not known; expected one of {', '.join(_MODELS)}")
    return getattr(importlib.import_module(_MODELS[class_name]), class_name)


def _check_choices(torch_dtype: Any, use_safetensors: Any) -> None:
    if torch_dtype is not None and not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
        raise ValueError(f"torch_dtype={torch_dtype!r}; expected torch.float32, torch.float16 or torch.bfloat16")
    if use_safetensors not in (None, True, False):
        raise ValueError(f"use_safetensors={use_safetensors!r}; expected True, False or None")


def load_transformers_model(
    cls: Any, folder: Path, torch_dtype: torch.dtype | None, variant: str | None, use_safetensors: bool | None
) -> Any:
    """Load one of transformers' CLIP models as strictly as our own: names and shapes are compared first."""
    read_json(folder / "config.json")
    files = weights_in(folder, variant, use_safetensors)
    with blank(), explained(folder / "config.json", cls):
        model = cls(cls.config_class.from_pretrained(folder))
    fill(model, files, dtype=torch_dtype or torch.float32, rename=clip_name)
    return model.eval()


def load_component(
    name: str,
    class_name: str,
    folder: Path,
    *,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> Any:
    """Make the component `name`, of the class that model_index.json says, from its folder.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The class is not known, or a file is damaged or does not fit.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; model_index.json lists it: download it, or pass {name}=…")
    if name == "scheduler":
        from sdedit import schedulers

        if class_name not in schedulers.__all__:
            known = ", ".join(n for n in schedulers.__all__ if n.endswith("Scheduler"))
            raise ValueError(f"scheduler: {class_name} is not known; expected one of {known}")
        cls = getattr(schedulers, class_name)
        config = read_json(folder / cls.config_name)
        with explained(folder / cls.config_name, cls):
            return cls.from_config(config)
    if class_name in _MODELS:
        cls = model_class(class_name)
        if name in ("unet", "vae"):
            return load_model(cls, folder, torch_dtype=torch_dtype, variant=variant, use_safetensors=use_safetensors)
    else:
        cls = transformers_class(name, class_name)
    if name in ("tokenizer", "feature_extractor"):
        return load_processor(cls, folder)
    return load_transformers_model(cls, folder, torch_dtype, variant, use_safetensors)


def load_components(
    path_or_id: str | os.PathLike[str] | None,
    *,
    torch_dtype: torch.dtype | None,
    variant: str | None,
    use_safetensors: bool | None,
    **given: Any,
) -> dict[str, Any]:
    """The constructor's arguments for a pipeline; see `StableDiffusionImg2ImgPipeline.from_pretrained`.

    Args:
        given: Components that are not to be loaded, and arguments for the hub.
    """
    parts = {name: given.pop(name) for name in (*COMPONENTS, "requires_safety_checker") if name in given}
    _check_choices(torch_dtype, use_safetensors)
    hub = dict(variant=variant, use_safetensors=use_safetensors, **given)
    folder = find_folder(
        DEFAULT_MODEL if path_or_id is None else path_or_id, components=set(COMPONENTS) - set(parts), **hub
    )
    index = read_json(folder / "model_index.json")
    listed = listed_components(index, folder)
    wanted = [name for name in listed if name not in parts]
    if variant and not any(has_variant(folder / name, variant, use_safetensors) for name in wanted):
        raise FileNotFoundError(f"{folder} has no weights of variant {variant!r}: leave variant out, or download it")
    for name in wanted:
        here = variant if variant and has_variant(folder / name, variant, use_safetensors) else None
        parts[name] = load_component(
            name,
            listed[name],
            folder / name,
            torch_dtype=torch_dtype,
            variant=here,
            use_safetensors=use_safetensors,
        )
    if missing := [name for name in ("vae", "unet", "scheduler") if parts.get(name) is None]:
        raise ValueError(f"{folder / 'model_index.json'} lists no {' and no '.join(missing)}: pass {missing[0]}=…")
    for name in ("text_encoder", "tokenizer"):
        parts.setdefault(name, None)
    words, known = len(parts["tokenizer"] or ()), getattr(parts["text_encoder"], "config", None)
    if known is not None and words > known.vocab_size:
        raise ValueError(f"{folder / 'tokenizer'} has {words} tokens; the text encoder knows {known.vocab_size}")
    parts.setdefault("requires_safety_checker", index.get("requires_safety_checker", True))
    return parts


def save_components(
    components: dict[str, Any], requires_safety_checker: bool, folder: str | os.PathLike[str], variant: str | None
) -> None:
    """Write a model folder: complete in a temporary place first, then moved file by file, model_index.json last."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_directory: {folder} is a file; expected a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionImg2ImgPipeline",
        "_diffusers_version": FORMAT_VERSION,
        "requires_safety_checker": requires_safety_checker,
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        for name, part in components.items():
            if part is None:
                index[name] = [None, None]
                continue
            library = "transformers" if type(part).__module__.startswith("transformers") else "diffusers"
            class_name = type(part).__name__
            if class_name == "StableDiffusionSafetyChecker":
                library = "stable_diffusion"
            if class_name == "CLIPImageProcessorPil":
                class_name = "CLIPImageProcessor"  # the name that every release knows
            index[name] = [library, class_name]
            weights = {"variant": variant} if variant and isinstance(part, torch.nn.Module) else {}
            part.save_pretrained(Path(temporary) / name, **weights)
        (Path(temporary) / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        files = sorted(p for p in Path(temporary).rglob("*") if p.is_file())
        for file in sorted(files, key=lambda p: p.name == "model_index.json"):
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
            if target.suffix == ".safetensors":
                forget_shards(target, variant)
