"""Reading weights safely: which file, what it holds, and whether that is what the network expects."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdedit.files import shown, write_folder
from sdedit.loading.folders import Expected, forget_shards
from sdedit.loading.headers import Header, TensorInfo, differences, read_header
from sdedit.loading.pickles import StoredTensor

# Bytes that are read at once of tensors that are to be cast.
_PORTION = 64 << 20


def read_weights(path: Path, names: Collection[str] | None = None, header: Header | None = None) -> dict[str, Tensor]:
    """Map the tensors of a safetensors file, or of a pickle read with `weights_only=True`, into memory.

    Args:
        names: Those that are wanted; all if `None`.
        header: The file's header, if it was read before.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is a git-lfs pointer, damaged, or holds anything but named tensors.
    """
    header = header or read_header(path)
    if header.kind == "safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in (header.tensors if names is None else names)}
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged or not a safetensors file ({error}): download it again") from error
    if not isinstance(header.tree, dict) or not all(_is_plain(k, v) for k, v in header.tree.items()):
        raise ValueError(f"{path} holds something other than named tensors; expected the weights of one network")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=header.kind == "zip")
        held = held.get("state_dict", held)
        tensors = {name: held[name].detach() for name in (header.tensors if names is None else names)}
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} is damaged ({type(error).__name__}): use the .safetensors file instead") from error
    if any(t.shape != header.tensors[name].shape for name, t in tensors.items()):
        raise ValueError(f"{path} is damaged (its tensors are not as it describes them)")
    return tensors


def _is_plain(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, (StoredTensor, int, float, str, type(None)))


def fill(
    model: nn.Module,
    files: Sequence[Path],
    *,
    dtype: torch.dtype | None,
    rename: Callable[[str, Expected], str | None] = lambda name, expected: name,
    read: bool = True,
) -> None:
    """Put the tensors of `files` into a network that was built in `models.blank.blank`.

    Names, shapes and dtypes are compared first, by the files' headers: either all of them fit, or no tensor is read
    and the network is left as it was.

    Args:
        model: Its state dict says what is expected.
        files: Weights, in one or several files.
        dtype: Dtype of the floating-point parameters; as stored if `None`.
        rename: From a name in a file and what is expected to a name in the network, or `None` to leave it out.
        read: `False` only compares.

    Raises:
        ValueError: A name is missing or unknown, or a shape differs; all of them are listed.
    """
    _, wanted, headers = fits(model, files, rename)
    if not read:
        return
    tensors: dict[str, Tensor] = {}
    for file, names in wanted.items():
        for portion in _portions(names, headers[file], dtype):
            held = read_weights(file, portion, headers[file])
            tensors |= {names[name]: _cast(tensor, dtype) for name, tensor in held.items()}
    put(model, tensors, dtype)


def _portions(names: Collection[str], header: Header, dtype: torch.dtype | None) -> list[list[str]]:
    """Names of tensors that are read together: all that stay mapped as they are, and a few at a time of those to cast.

    What was read of a file stays in memory until the file is closed.
    """
    portions: list[list[str]] = [[]]
    size = 0
    for name in (name for name in header.tensors if name in names):
        info = header.tensors[name]
        as_stored = dtype is None or str(dtype).removeprefix("torch.") == info.dtype.name
        if header.kind != "safetensors" or as_stored or not info.dtype.is_floating_point:
            portions[0].append(name)
            continue
        if size == 0 or size + info.nbytes > _PORTION:
            portions.append([])
            size = 0
        portions[-1].append(name)
        size += info.nbytes
    return [portion for portion in portions if portion]


def fits(
    model: nn.Module, files: Sequence[Path], rename: Callable[[str, Expected], str | None]
) -> tuple[dict[str, TensorInfo], dict[Path, dict[str, str]], dict[Path, Header]]:
    """Compare the headers of `files` with a network, as `fill` does before it reads.

    Returns:
        What was found, by the network's names; for each file, its names to those of the network; and its header.
    """
    expected = model.state_dict()
    found: dict[str, TensorInfo] = {}
    wanted: dict[Path, dict[str, str]] = {}
    headers = {file: read_header(file) for file in files}
    left_out: list[str] = []
    for file, header in headers.items():
        for name, info in header.tensors.items():
            # torch.compile puts this before the names of what it wraps.
            if (ours := rename(name.replace("_orig_mod.", ""), expected)) is not None:
                found[ours] = info
                wanted.setdefault(file, {})[name] = ours
            elif not name.endswith("position_ids"):
                left_out.append(name)
    compare(model, found, files)
    if left_out:
        first = ", ".join(map(shown, left_out[:3]))
        where = files[0].parent
        warnings.warn(f"{where}: {len(left_out)} tensors of a whole CLIP are left out ({first}, …)", stacklevel=6)
    return found, wanted, headers


def put(model: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Make tensors that `compare` found fitting the parameters of `model`, in `dtype`, or as stored if `None`.

    `load_state_dict(assign=True)` does the same in three times the time: it looks at everything once more.
    """
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        module, _, own = name.rpartition(".")
        owner, tensor = modules[module], _cast(tensor, dtype)
        if (before := owner._parameters.get(own)) is not None:
            owner._parameters[own] = nn.Parameter(tensor, before.requires_grad)
        else:
            owner._buffers[own] = tensor
    for name, buffer in model.named_buffers():
        # Buffers that no checkpoint holds; CLIP has one of them.
        if buffer.is_meta and name.endswith("position_ids"):
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.register_buffer("position_ids", torch.arange(buffer.shape[-1])[None], persistent=False)


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if tensor.data_ptr() % tensor.element_size():  # mapped from a file whose header has an odd length
        tensor = tensor.clone()
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def compare(model: nn.Module, found: Mapping[str, TensorInfo], files: Collection[Path]) -> None:
    """Raise `ValueError` with every name that is missing (-), unknown (+) or of another shape or kind (!)."""
    expected = model.state_dict()
    kinds = [
        f"! {name} holds {info.dtype}; floats expected"
        for name, info in found.items()
        if name in expected and expected[name].is_floating_point() != info.dtype.is_floating_point
    ]
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if shown := differences(shapes, {name: info.shape for name, info in found.items()}, kinds):
        where = ", ".join(str(file) for file in files)
        raise ValueError(f"{where} does not fit {type(model).__name__} as its config describes it:\n{shown}")


def save_network(
    state: Mapping[str, Tensor], config: str, folder: str | os.PathLike[str], stem: str, variant: str | None = None
) -> None:
    """Write tensors to `folder/stem[.variant].safetensors` and the text of `config.json`, see `write_folder`."""
    with write_folder(folder, lambda path: forget_shards(path, variant)) as complete:
        held = {name: t.detach().contiguous() for name, t in state.items()}
        path = complete / f"{stem}{f'.{variant}' if variant else ''}.safetensors"
        save_file(held, path, metadata={"format": "pt"})
        (complete / "config.json").write_text(config)
        path.chmod((complete / "config.json").stat().st_mode)  # safetensors would leave it to its owner alone
