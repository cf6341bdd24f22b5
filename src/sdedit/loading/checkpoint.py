"""Reading weights safely: which file, what it holds, and whether that is what the network expects."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdedit.files import read_json, refuse_lfs_pointer, write_atomically
from sdedit.loading.keymaps import OLD_VAE_ATTENTION

Expected = Mapping[str, Tensor]


def choose_weights(
    names: Collection[str], stems: Collection[str], variant: str | None = None, use_safetensors: bool | None = None
) -> str | None:
    """Choose among the file names of a folder the one that holds the weights, or the index of its shards.

    Args:
        names: File names, without folders.
        stems: Names without suffix, such as `diffusion_pytorch_model`, in order of preference.
        variant: Such as `"fp16"`.
        use_safetensors: `True`: only safetensors; `False`: only pickles; `None`: safetensors first.

    Returns:
        The name, or `None` if there is none.
    """
    suffixes = {True: ["safetensors"], False: ["bin"], None: ["safetensors", "bin"]}[use_safetensors]
    for suffix in suffixes:
        for stem in stems:
            for name in _layouts(stem, suffix, variant):
                if name in names:
                    return name
    return None


def _layouts(stem: str, suffix: str, variant: str | None) -> tuple[str, str, str]:
    """Names of weights in one file, and of the two forms of an index of shards."""
    mark = f".{variant}" if variant else ""
    return f"{stem}{mark}.{suffix}", f"{stem}.{suffix}.index{mark}.json", f"{stem}.{suffix}{mark}.index.json"


def forget_shards(path: Path, variant: str | None = None) -> None:
    """Remove the index of shards that `path`, weights in one file, has replaced: some readers look for it first."""
    for index in _layouts(path.name.split(".")[0], path.suffix[1:], variant)[1:]:
        path.with_name(index).unlink(missing_ok=True)


def weight_files(path: Path) -> list[Path]:
    """`path`, or the shards that it lists if it is an index.

    Raises:
        ValueError: A shard's name leads out of the folder.
        FileNotFoundError: A shard is missing.
    """
    if path.suffix != ".json":
        return [path]
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path} has no 'weight_map' from names to shards: download it again")
    files = []
    for name in sorted(set(shards.values())):
        if PurePosixPath(name).is_absolute() or len(PurePosixPath(name).parts) != 1 or "\\" in name:
            raise ValueError(f"{path} names the shard {name!r}; expected a file name in the same folder")
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path.parent / name} is missing; {path.name} lists it: download it again")
        files.append(path.parent / name)
    return files


def read_weights(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file, or of a pickle read with `weights_only=True`, into memory.

    Raises:
        ValueError: The file is a git-lfs pointer, damaged, or holds anything but named tensors.
    """
    refuse_lfs_pointer(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}): download it again") from error
    try:
        # Mapped where it is a zip: torch then refuses compressed ones, which could unpack to any size.
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        plain = str(error) and "weights_only" not in str(error)
        reason = str(error).split("\n")[0][:200] if plain else type(error).__name__
        if code:
            reason = f"it names {code[1]}, which is code, and code is not run"
        raise ValueError(
            f"{path} is damaged, or a pickle that is not only tensors ({reason}): use the .safetensors file instead"
        ) from error
    if not isinstance(held, dict) or not all(isinstance(k, str) and _is_plain(t) for k, t in held.items()):
        raise ValueError(f"{path} holds something other than named tensors; expected the weights of one network")
    return held


def _is_plain(value: object) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


def fill(
    model: nn.Module,
    files: Sequence[Path],
    *,
    dtype: torch.dtype | None,
    rename: Callable[[str, Expected], str | None] = lambda name, expected: name,
) -> None:
    """Put the tensors of `files` into a network that was built on the meta device.

    Names and shapes are compared first: either all of them fit, or the network is left as it was.

    Args:
        model: Its state dict says what is expected.
        files: Weights, in one or several files.
        dtype: Dtype of the floating-point parameters; as stored if `None`.
        rename: From a name in a file and what is expected to a name in the network, or `None` to leave it out.

    Raises:
        ValueError: A name is missing or unknown, or a shape differs; all of them are listed.
    """
    expected = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_weights(file).items():
            if (ours := rename(name, expected)) is not None:
                tensors[ours] = tensor
    compare({k: t.shape for k, t in expected.items()}, {k: t.shape for k, t in tensors.items()}, model, files)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{files[0]}: {name} holds {tensor.dtype}; expected {expected[name].dtype} or the like")
        if dtype is not None and tensor.is_floating_point():
            tensors[name] = tensor.to(dtype)
    model.load_state_dict(tensors, strict=True, assign=True)
    for name, buffer in model.named_buffers():
        # Buffers that no checkpoint holds; CLIP has one of them.
        if buffer.is_meta and name.endswith("position_ids"):
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.register_buffer("position_ids", torch.arange(buffer.shape[-1])[None], persistent=False)


def compare(
    expected: Mapping[str, torch.Size], found: Mapping[str, torch.Size], model: nn.Module, files: Collection[Path]
) -> None:
    """Raise `ValueError` with every name that is missing (-), unknown (+) or of another shape."""
    lines = [f"- {name} {list(expected[name])} is missing" for name in expected if name not in found]
    lines += [f"+ {name} {list(found[name])} is not expected" for name in found if name not in expected]
    lines += [
        f"! {name} is {list(found[name])} in the file; {list(expected[name])} expected"
        for name in expected
        if name in found and expected[name] != found[name]
    ]
    if lines:
        shown = "\n".join(lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else []))
        where = ", ".join(str(file) for file in files)
        raise ValueError(f"{where} does not fit {type(model).__name__} as its config.json describes it:\n{shown}")


def save_weights(
    state: Mapping[str, Tensor], folder: str | os.PathLike[str], stem: str, variant: str | None = None
) -> Path:
    """Write tensors to `folder/stem[.variant].safetensors` and give back its path."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"{stem}{f'.{variant}' if variant else ''}.safetensors"
    with write_atomically(path) as temporary:
        save_file({name: t.detach().contiguous() for name, t in state.items()}, temporary, metadata={"format": "pt"})
    forget_shards(path, variant)
    return path


def clip_name(name: str, expected: Expected) -> str | None:
    """Rename for transformers' CLIP classes, whose releases differ in one prefix and one buffer.

    `text_model.` and `vision_model.` came before every name until transformers 5.6; `position_ids` was once saved.
    """
    if name.endswith("position_ids"):
        return name if name in expected else None
    if name in expected:
        return name
    for prefix in ("text_model.", "vision_model."):
        for candidate in (prefix + name, name.replace(prefix, "", 1)):
            if candidate in expected:
                return candidate
    return name


def vae_name(name: str, expected: Expected) -> str | None:
    """Rename for `AutoencoderKL`: folders from 2022 call the projections of its attention otherwise."""
    for old, new in OLD_VAE_ATTENTION.items():
        if f".attentions.0.{old}." in name:
            return name.replace(f".{old}.", f".{new}.")
    return name
