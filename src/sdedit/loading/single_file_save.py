"""Networks to one file, in the layout of the latent diffusion code, for other programs and for `from_single_file`."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from sdedit.files import write_atomically
from sdedit.loading import ldm
from sdedit.loading.folders import unwrapped
from sdedit.models.blank import blank
from sdedit.models.offload import refuse


def save_single_file(source: Any, path: str | os.PathLike[str], *, torch_dtype: torch.dtype | None = None) -> None:
    """Write a pipeline, a mapping of components, or one network as a single file that other programs read, too.

    Args:
        source: A pipeline; or a mapping with some of "unet", "vae", "text_encoder"; or a UNet or VAE.
        path: Its name; the suffix must be `.safetensors`.
        torch_dtype: Dtype of the numbers; as they are if `None`.

    Raises:
        ValueError: A component has adapters or added tokens, or none of it goes into a single file.
    """
    path = Path(path)
    if path.suffix != ".safetensors" or not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: expected a name that ends in .safetensors, in a folder that exists")
    components = _components(source)
    tokenizer = components.get("tokenizer")
    if tokenizer is not None and len(tokenizer) != tokenizer.vocab_size:
        raise ValueError("the tokenizer has added tokens, which no single file holds: unload_textual_inversion() first")
    tensors: dict[str, torch.Tensor] = {}
    for prefix, parts_of, model in _layouts(components):
        refuse("save_single_file", model)
        state = model.state_dict()
        _refuse_adapters(model)
        parts = parts_of(state)
        written = ldm.write(parts, {name: state[name] for name in parts})
        tensors |= {f"{prefix}{name}": tensor for name, tensor in written.items()}
    if not tensors:
        raise ValueError("nothing to write: expected a pipeline, a UNet or a VAE")
    cast = {
        name: t.detach().to("cpu", torch_dtype if t.is_floating_point() else None).contiguous()
        for name, t in tensors.items()
    }
    with write_atomically(path) as temporary:
        save_file(cast, temporary, metadata={"format": "pt", **_model_spec(components)})


def _components(source: Any) -> dict[str, Any]:
    source = unwrapped(source)
    if isinstance(source, nn.Module):
        names = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}
        if type(source).__name__ not in names:
            raise ValueError(f"{type(source).__name__} has no single-file layout; expected a pipeline, a UNet or a VAE")
        return {names[type(source).__name__]: source}
    components = {name: unwrapped(part) for name, part in dict(getattr(source, "components", source)).items()}
    if type(components.get("vae")).__name__ == "AutoencoderTiny":
        raise ValueError("AutoencoderTiny has no single-file layout: put an AutoencoderKL in the pipeline first")
    return components


def _refuse_adapters(model: nn.Module) -> None:
    """Raise `ValueError` if `model` has parameters that its config does not ask for."""
    make: Any = getattr(type(model), "from_config", type(model))
    with blank():
        plain = make(model.config).state_dict()
    if added := sorted(set(model.state_dict()) - set(plain)):
        raise ValueError(
            f"{type(model).__name__} has adapters ({added[0]}, …), which no single file holds: unload them first"
        )


def _layouts(components: Mapping[str, Any]) -> list[tuple[str, Callable[[Collection[str]], dict[str, ldm.Part]], Any]]:
    """Prefix, layout and network of all that goes into the file; a VAE alone has no prefix."""
    found: list[tuple[str, Callable[[Collection[str]], dict[str, ldm.Part]], Any]] = []
    unet, vae, text = (components.get(name) for name in ("unet", "vae", "text_encoder"))
    if unet is not None:
        found.append((ldm.UNET_PREFIXES[0], ldm.unet_parts, unet))
    if vae is not None:
        found.append((ldm.VAE_PREFIXES[0] if unet is not None else "", ldm.vae_parts, vae))
    if text is not None and text.config.hidden_act == "gelu":
        found.append((ldm.OPEN_CLIP_PREFIXES[0], ldm.open_clip_parts, text))
    elif text is not None:
        found.append((ldm.CLIP_PREFIXES[0], ldm.clip_parts, text))
    return found


def _model_spec(components: Mapping[str, Any]) -> dict[str, str]:
    """What the file says of itself, by the keys of https://github.com/Stability-AI/ModelSpec."""
    if components.get("unet") is None or components.get("scheduler") is None:
        return {}
    is_sd2 = components["unet"].config.use_linear_projection
    kind = components["scheduler"].config.prediction_type
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v2" if is_sd2 else "stable-diffusion-v1",
        "modelspec.implementation": "https://github.com/CompVis/stable-diffusion",
        "modelspec.prediction_type": {"v_prediction": "v"}.get(kind, kind),
    }
