"""Adapter files: found by path, folder or hub id, read with their settings, and written as diffusers reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.adapters import arrays
from sdedit.adapters.arrays import Array
from sdedit.files import is_temporary, read_json, write_atomically
from sdedit.loading.families import recognise
from sdedit.loading.headers import read_header
from sdedit.loading.hub import check_hub_arguments, find_repository, is_hub_id

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT_NAME = "pytorch_lora_weights.safetensors"
_USUAL = (DEFAULT_NAME, "adapter_model.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")

Source = str | os.PathLike[str] | Mapping[str, Array]


@dataclass(frozen=True)
class AdapterFile:
    """A file's tensors, mapped into memory, and what is written about them."""

    source: str
    state: Mapping[str, Array]
    metadata: Mapping[str, str] = field(default_factory=dict)
    peft_config: Mapping[str, Any] | None = None


def read_adapter(
    source: Source,
    read: Callable[[Path], Mapping[str, Array]],
    weight_name: str | None = None,
    subfolder: str | None = None,
    **hub: Any,
) -> AdapterFile:
    """Read an adapter.

    Args:
        read: Reads a file's tensors: `sdedit.loading.weights.read_weights`, or another framework's.
        source: A file, a folder with one, a hub id, or tensors by name.
        weight_name: Which file of the folder; the usual names, or the only one there, if not given.
        subfolder: Where in the folder.
        **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, holds anything but tensors, or there are several and no name was given.
    """
    check_hub_arguments("load_lora_weights", hub)
    if isinstance(source, Mapping):
        if not source or not all(isinstance(k, str) and arrays.is_array(t) for k, t in source.items()):
            raise ValueError("the state dict of an adapter: expected tensors by name, and at least one")
        return AdapterFile("the state dict", source)
    path = Path(source)
    if not path.exists():
        path = _download(str(source), weight_name, subfolder, hub)
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        if weight_name is None and (parts := _parts(folder)):
            return _together(str(folder), {name: read_adapter(part, read) for name, part in parts.items()})
        path = folder / _choose([p.name for p in folder.iterdir()] if folder.is_dir() else [], weight_name, str(folder))
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    header = read_header(path)
    found = recognise(header.nested())
    if found.kind not in ("LoRA", "unknown"):
        raise ValueError(f"{path} is {found}, not a LoRA or one of its kin; `sdedit inspect` says what loads it")
    state = {name: arrays.no_narrower_than_half(tensor) for name, tensor in read(path).items()}
    metadata = header.metadata if header.kind == "safetensors" else {}
    config = path.parent / "adapter_config.json"
    ours = config.is_file() and path.stem in ("adapter_model", Path(DEFAULT_NAME).stem)
    return AdapterFile(str(path), state, metadata, read_json(config) if ours else None)


def _parts(folder: Path) -> dict[str, Path]:
    """The folders of a folder that PEFT wrote a component's adapter to each, if there is no adapter beside them."""
    if any((folder / name).is_file() for name in _USUAL):
        return {}
    parts = {name: folder / name for name in ("unet", "text_encoder")}
    return {name: part for name, part in parts.items() if (part / "adapter_config.json").is_file()}


def _together(source: str, files: Mapping[str, AdapterFile]) -> AdapterFile:
    """Adapters of several components as one; their settings get the component's name before them."""
    state = {f"{name}.{key}": tensor for name, file in files.items() for key, tensor in file.state.items()}
    config = {f"{name}.{key}": v for name, file in files.items() for key, v in (file.peft_config or {}).items()}
    return AdapterFile(source, state, {}, config)


def _choose(names: list[str], weight_name: str | None, folder: str) -> str:
    if weight_name is not None:
        return weight_name
    for usual in _USUAL:
        if usual in names:
            return usual
    found = sorted(n for n in names if n.endswith((".safetensors", ".bin", ".pt")) and not is_temporary(n))
    if len(found) == 1:
        return found[0]
    there = ", ".join(found) or "none"
    error = ValueError if found else FileNotFoundError
    raise error(f"{folder} has several adapter files or none: {there}; name one with weight_name=…")


def _download(repo: str, weight_name: str | None, subfolder: str | None, hub: dict[str, Any]) -> Path:
    """The folder of a hub id, with the adapter and its config in it."""
    if not is_hub_id(repo):
        raise FileNotFoundError(f"{repo} is no file or folder here, nor a hub id such as 'owner/name'")
    at = f"{subfolder}/" if subfolder else ""

    def choose(names: list[str]) -> list[str]:
        inside = [name.removeprefix(at) for name in names if name.startswith(at) and "/" not in name[len(at) :]]
        return [at + _choose(inside, weight_name, repo), f"{at}adapter_config.json"]

    return find_repository(repo, choose, **hub)


def write_adapter(
    path: Path,
    parts: Mapping[str, Mapping[str, Tensor] | nn.Module | None],
    configs: Mapping[str, Mapping[str, Any] | None],
) -> None:
    """Write adapters of components, whose names become prefixes, and PEFT's settings as metadata.

    Raises:
        ValueError: There is nothing to write.
    """
    from safetensors.torch import save_file
    from torch import nn

    state: dict[str, Tensor] = {}
    for component, part in parts.items():
        held = part.state_dict() if isinstance(part, nn.Module) else part or {}
        for name, tensor in held.items():
            # With the level that CLIP's names have had until transformers 5.6: readers of both take it away or use it.
            level = "text_model." if component == "text_encoder" and name.startswith("encoder.") else ""
            state[f"{component}.{level}{name}"] = tensor.detach().cpu().contiguous()
    if not state:
        raise ValueError(
            "nothing to save: pass unet_lora_layers or text_encoder_lora_layers, such as "
            "peft.get_peft_model_state_dict(pipe.unet, adapter_name=…)"
        )
    metadata = {"format": "pt"}
    settings = {f"{c}.{key}": value for c, config in configs.items() for key, value in (config or {}).items()}
    if settings:
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        metadata["lora_adapter_metadata"] = json.dumps(plain, indent=2, sort_keys=True, default=str)
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        save_file(state, temporary, metadata=metadata)
