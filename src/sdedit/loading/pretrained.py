"""A pipeline's components for PyTorch, each made from its folder, and written to one."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sdedit.files import read_json, shown, write_folder
from sdedit.loading.folders import (
    COMPONENTS,
    DEFAULT_MODEL,
    clip_name,
    explained,
    forget_shards,
    has_variant,
    index_text,
    listed_components,
    load_processor,
    transformers_class,
    vae_name,
    weights_in,
)
from sdedit.loading.hub import find_folder
from sdedit.loading.tokenizer import SPECIAL_TOKENS, CLIPTokens, content
from sdedit.loading.weights import fill
from sdedit.models.blank import blank
from sdedit.models.kinds import check_values

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
    read: bool = True,
    **hub: Any,
) -> M:
    """Load one of our networks; see `Model.from_pretrained`. `read=False` only checks, by headers, that it would."""
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
    fill(model, files, dtype=torch_dtype or torch.float32, rename=vae_name, read=read)
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
    cls: Any,
    folder: Path,
    torch_dtype: torch.dtype | None,
    variant: str | None,
    use_safetensors: bool | None,
    read: bool = True,
) -> Any:
    """Load one of transformers' CLIP models as strictly as our own: names and shapes are compared first."""
    config = read_json(folder / "config.json")
    files = weights_in(folder, variant, use_safetensors)
    with blank(), explained(folder / "config.json", cls):
        check_values(config)
        model = cls(cls.config_class.from_pretrained(folder))
    fill(model, files, dtype=torch_dtype or torch.float32, rename=clip_name, read=read)
    return model.eval()


def load_component(
    name: str,
    class_name: str,
    folder: Path,
    *,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    read: bool = True,
) -> Any:
    """Make the component `name`, of the class that model_index.json says, from its folder.

    Args:
        read: `False` leaves networks without values, and only checks that they have all.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The class is not known, or a file is damaged or does not fit.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; model_index.json lists it: download it, or pass {name}=…")
    if name == "scheduler":
        return _load_scheduler(class_name, folder)
    if class_name in _MODELS:
        cls = model_class(class_name)
        if name in ("unet", "vae"):
            chosen: dict[str, Any] = {
                "torch_dtype": torch_dtype,
                "variant": variant,
                "use_safetensors": use_safetensors,
            }
            return load_model(cls, folder, **chosen, read=read)
    else:
        cls = transformers_class(name, class_name)
    if name in ("tokenizer", "feature_extractor"):
        return load_processor(cls, folder)
    return load_transformers_model(cls, folder, torch_dtype, variant, use_safetensors, read)


def _load_scheduler(class_name: str, folder: Path) -> Any:
    from sdedit import schedulers

    if class_name not in schedulers.__all__:
        known = ", ".join(n for n in schedulers.__all__ if n.endswith("Scheduler"))
        raise ValueError(f"scheduler: {shown(class_name)} is not known; expected one of {known}")
    cls = getattr(schedulers, class_name)
    config = read_json(folder / cls.config_name)
    with explained(folder / cls.config_name, cls):
        return cls.from_config(config)


def _check_components(parts: dict[str, Any], folder: Path) -> None:
    """Raise `ValueError` if a component is missing that there must be; those that need not are `None` where absent."""
    if missing := [name for name in ("vae", "unet", "scheduler") if parts.get(name) is None]:
        raise ValueError(f"{folder / 'model_index.json'} lists no {' and no '.join(missing)}: pass {missing[0]}=…")
    for name in ("text_encoder", "tokenizer"):
        parts.setdefault(name, None)
    words, known = len(parts["tokenizer"] or ()), getattr(parts["text_encoder"], "config", None)
    if known is not None and words > known.vocab_size:
        raise ValueError(f"{folder / 'tokenizer'} has {words} tokens; the text encoder knows {known.vocab_size}")


def load_components(
    path_or_id: str | os.PathLike[str] | None,
    *,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    read: bool = True,
    **given: Any,
) -> dict[str, Any]:
    """The constructor's arguments for a pipeline; see `StableDiffusionImg2ImgPipeline.from_pretrained`.

    Args:
        read: `False` leaves networks without values, and only checks that a load would find all it needs.
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
            read=read,
        )
    _check_components(parts, folder)
    parts.setdefault("requires_safety_checker", index.get("requires_safety_checker", True))
    return parts


def quick_parts(folder: Path, torch_dtype: torch.dtype) -> dict[str, Any]:
    """Tokenizer and text encoder of a model folder, as arguments for `from_pretrained`; none if it is not plain.

    Raises:
        ValueError: A file is damaged, or its names and shapes are not those of the network.
    """
    index, words, network = folder / "model_index.json", folder / "tokenizer", folder / "text_encoder"
    if not _is_plain(index, words, network):
        return {}
    from sdedit.models.clip_text import CLIPTextEncoder

    with blank():
        model = CLIPTextEncoder.from_config(network)
    fill(model, weights_in(network, None, None), dtype=torch_dtype, rename=clip_name)
    return {"tokenizer": CLIPTokens(words), "text_encoder": model.eval()}


def _is_plain(index: Path, words: Path, network: Path) -> bool:
    """Are these CLIP's own classes, with its own tokens and activations, and all files there?"""
    files = [
        index,
        words / "vocab.json",
        words / "merges.txt",
        words / "tokenizer_config.json",
        network / "config.json",
    ]
    if not all(file.is_file() for file in files) or (words / "added_tokens.json").exists():
        return False
    listed, settings, config = (read_json(file) for file in (files[0], files[3], files[4]))
    special = {content(settings.get(key)) for key in SPECIAL_TOKENS}
    length = settings.get("model_max_length")
    return (
        listed.get("tokenizer") == ["transformers", "CLIPTokenizer"]
        and listed.get("text_encoder") == ["transformers", "CLIPTextModel"]
        and config.get("hidden_act") in ("quick_gelu", "gelu")
        and isinstance(length, int)
        and length <= config.get("max_position_embeddings", 77)
        and None not in special
        and all(content(token) in special for token in settings.get("added_tokens_decoder", {}).values())
    )


def save_components(
    components: dict[str, Any], requires_safety_checker: bool, folder: str | os.PathLike[str], variant: str | None
) -> None:
    """Write a model folder, over the one that is there, see `write_folder`."""
    with write_folder(folder, lambda path: forget_shards(path, variant)) as complete:
        for name, part in components.items():
            if part is not None:
                weights = {"variant": variant} if variant and isinstance(part, torch.nn.Module) else {}
                part.save_pretrained(complete / name, **weights)
        more = {"requires_safety_checker": requires_safety_checker}
        (complete / "model_index.json").write_text(index_text("StableDiffusionImg2ImgPipeline", components, **more))
