"""Which files of a folder hold the weights of a network, and what parameters were called in older ones."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sdedit.files import read_json
from sdedit.loading.keymaps import OLD_VAE_ATTENTION

Expected = Mapping[str, Any]  # what a network has, by name
Shape = tuple[int, ...]


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


def differences(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> str:
    """Lines with every name that is missing (-), unknown (+) or of another shape (!), the first 20; or nothing."""
    lines = [f"- {name} {list(expected[name])} is missing" for name in expected if name not in found]
    lines += [f"+ {name} {list(found[name])} is not expected" for name in found if name not in expected]
    lines += [
        f"! {name} is {list(found[name])} in the file; {list(expected[name])} expected"
        for name in expected
        if name in found and expected[name] != found[name]
    ]
    return "\n".join(lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else []))
