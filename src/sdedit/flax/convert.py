"""Files to parameters: PyTorch's names and shapes to Flax's, msgpack as it is; all is compared before it is used."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401 (teaches NumPy, and so safetensors, what bfloat16 is)
import numpy as np
from flax import serialization, traverse_util
from safetensors import SafetensorError, safe_open

from sdedit.files import refuse_lfs_pointer, write_atomically
from sdedit.loading.folders import OLD_VAE_ATTENTION, vae_name, weights_in
from sdedit.loading.headers import differences, read_header

Shapes = Mapping[str, tuple[int, ...]]

# What PyTorch keeps in lists: `down_blocks.0` there is `down_blocks_0` in Flax.
_LISTS = (
    "down_blocks", "up_blocks", "resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers", "net",
    "to_out",
)  # fmt: skip


class Layout(NamedTuple):
    """How a network's parameters are called in PyTorch.

    Attributes:
        levels: Are numbers levels of their own in Flax too, as in transformers, instead of parts of a name?
        rename: From a name in a file to today's name, or `None` to leave it out.
    """

    levels: bool
    rename: Callable[[str], str | None]


def _clip_rename(half: str) -> Callable[[str], str | None]:
    """Names without the level that transformers took away in 5.6; no `position_ids`, which were once saved."""

    # What a whole CLIP has beside its text half.
    beside = ("vision_model.", "text_projection.", "visual_projection.", "logit_scale")

    def rename(name: str) -> str | None:
        if name.endswith("position_ids") or name.startswith(beside):
            return None
        first = name.split(".")[0]
        return f"{half}.{name}" if first in ("embeddings", "encoder", "final_layer_norm") else name

    return rename


def _vision_rename(name: str) -> str | None:
    if name.endswith("position_ids"):
        return None
    return re.sub(r"^vision_model\.(?!vision_model\.)", "vision_model.vision_model.", name)


def _vae_rename(name: str) -> str:
    """Flax has always called the projections of the VAE's attention as PyTorch did in 2022."""
    name = vae_name(name, {}) or name
    for old, new in OLD_VAE_ATTENTION.items():
        name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
    return name


UNET = Layout(False, lambda name: name)
VAE = Layout(False, _vae_rename)
CLIP_TEXT = Layout(True, _clip_rename("text_model"))
CLIP_VISION = Layout(True, _vision_rename)


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by their path, with `/` between its parts."""
    return traverse_util.flatten_dict(tree, sep="/")  # type: ignore[no-any-return]


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts of `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")  # type: ignore[no-any-return]


def flax_name(name: str, layout: Layout, expected: Shapes) -> str | None:
    """The path of a parameter that PyTorch calls `name`, or `None` if it has none."""
    renamed = layout.rename(name)
    if renamed is None:
        return None
    path = renamed if layout.levels else re.sub(rf"\b({'|'.join(_LISTS)})\.(\d+)(?=\.)", r"\1_\2", renamed)
    parent, _, leaf = path.replace(".", "/").rpartition("/")
    leaves = ("kernel", "scale", "embedding") if leaf == "weight" else (leaf,)
    paths = [f"{parent}/{leaf}".lstrip("/") for leaf in leaves]
    return next((path for path in paths if path in expected), paths[0])


def torch_name(path: str) -> str:
    """What PyTorch calls a layer of the UNet or the text encoder at a path."""
    return re.sub(rf"\b({'|'.join(_LISTS)})_(\d+)\b", r"\1.\2", path.replace("/", "."))


def flax_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a parameter of PyTorch has in Flax."""
    order = _order(path, len(shape))
    return tuple(shape[i] for i in order)


def _order(path: str, axes: int) -> tuple[int, ...]:
    """Convolutions (out, in, h, w) → (h, w, in, out), matrices (out, in) → (in, out); all else as it is."""
    if not path.endswith("/kernel"):
        return tuple(range(axes))
    return {4: (2, 3, 1, 0), 2: (1, 0)}.get(axes, tuple(range(axes)))


def load(
    folder: Path,
    weights_name: str,
    layout: Layout,
    expected: Shapes,
    dtype: Any,
    from_pt: bool | None,
    which: tuple[str | None, bool | None],
) -> dict[str, Any]:
    """The parameters in a folder, in `dtype`: see `FlaxModel.from_pretrained`.

    Args:
        weights_name: Of the msgpack file.
        expected: Shapes of the network's parameters, by path.
        which: Variant of PyTorch's weights, and whether they are safetensors.
    """
    file = folder / weights_name
    if from_pt is False or (from_pt is None and file.is_file()):
        leaves = _read_msgpack(file)
        _compare(expected, {name: np.shape(leaf) for name, leaf in leaves.items()}, [file])
        return unflatten({name: _cast(leaf, dtype) for name, leaf in leaves.items()})
    files = weights_in(folder, *which)
    found: dict[str, tuple[int, ...]] = {}
    names: dict[Path, dict[str, str]] = {}
    for path in files:
        for name, info in read_header(path).tensors.items():
            if (ours := flax_name(name, layout, expected)) is not None:
                found[ours] = flax_shape(ours, info.shape)
                names.setdefault(path, {})[name] = ours
    _compare(expected, found, files)
    made = {}
    for path, wanted in names.items():
        for name, array in read_arrays(path, wanted).items():
            ours = wanted[name]
            made[ours] = _cast(array.transpose(_order(ours, array.ndim)), dtype)
    return unflatten(made)


def _cast(array: Any, dtype: Any) -> jax.Array:
    return jnp.asarray(array, dtype if jnp.issubdtype(array.dtype, jnp.floating) else None)


def _compare(expected: Shapes, found: Shapes, files: list[Path]) -> None:
    if lines := differences(expected, found):
        where = ", ".join(map(str, files))
        raise ValueError(f"{where} does not fit the network that its config describes:\n{lines}")


def read_arrays(path: Path, names: Mapping[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of those names in a safetensors file, or in a pickle, for which torch is needed.

    Raises:
        ValueError: The file is damaged.
        ImportError: It is a pickle, and torch is not there.
    """
    if read_header(path).kind == "safetensors":
        try:
            with safe_open(path, framework="np") as file:
                return {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}): download it again") from error
    try:
        from sdedit.loading.weights import read_weights
    except ImportError as error:
        raise needs_torch(path) from error
    tensors = read_weights(path, list(names))
    return {name: _from_torch(tensor) for name, tensor in tensors.items()}


def needs_torch(path: Path) -> ImportError:
    """The error for a file that cannot be read without torch."""
    return ImportError(
        f"{path} is a pickle, which only torch reads, and torch is not installed: use a .safetensors file, or "
        "pip install torch"
    )


def _from_torch(tensor: Any) -> np.ndarray[Any, Any]:
    """NumPy has no bfloat16 of its own: its bits are taken for that of ml_dtypes."""
    if str(tensor.dtype) != "torch.bfloat16":
        return tensor.numpy()  # type: ignore[no-any-return]
    import torch

    return tensor.view(torch.int16).numpy().view(jnp.bfloat16)  # type: ignore[no-any-return]


def _read_msgpack(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    refuse_lfs_pointer(path)
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        leaves = flatten(tree)
        if not all(isinstance(leaf, np.ndarray) for leaf in leaves.values()):
            raise ValueError("it holds something other than arrays by name")
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is damaged, or no msgpack file of Flax ({error}): download it again") from error
    return leaves


def save(params: Mapping[str, Any], path: Path) -> None:
    """Write parameters as msgpack."""
    data = serialization.msgpack_serialize(jax.tree.map(np.asarray, dict(params)))
    with write_atomically(path) as temporary:
        temporary.write_bytes(data)
