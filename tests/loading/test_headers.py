"""Headers: what a file says of itself is what torch and safetensors read from it, and what is no weights is named."""

from __future__ import annotations

import collections
import gzip
import io
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from sdedit.loading.headers import differences, read_header
from sdedit.loading.weights import read_weights

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]
DTYPES += [torch.int16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]
SHAPES = st.lists(st.integers(0, 4), max_size=4)
TENSORS = st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=5)


@pytest.mark.parametrize("name", ["w.safetensors", "w.ckpt", "old.pt"])
@settings(max_examples=50, deadline=None)
@given(tensors=TENSORS)
def test_headers_agree_with_what_is_read(tmp_path_factory: Any, name: str, tensors: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("h") / name
    tensors.pop("state_dict", None), tensors.pop("__metadata__", None)
    if name == "old.pt":  # torch itself cannot read 8 bits in its old format
        tensors = {k: (shape, dtype) for k, (shape, dtype) in tensors.items() if "float8" not in str(dtype)}
    made = {key: torch.zeros(shape).to(dtype) for key, (shape, dtype) in tensors.items()}
    if name.endswith("safetensors"):
        save_file(made, path)
    else:
        torch.save(made, path, _use_new_zipfile_serialization=name == "w.ckpt")
    header = read_header(path)
    assert {k: (i.shape, getattr(torch, str(i.dtype))) for k, i in header.tensors.items()} == {
        k: (tuple(t.shape), t.dtype) for k, t in made.items()
    }
    read = read_weights(path)
    assert read.keys() == made.keys() and all(read[k].dtype == t.dtype for k, t in made.items())


def test_views_parameters_and_what_lies_beside(tmp_path: Path) -> None:
    whole = torch.arange(24.0)
    held = {
        "state_dict": collections.OrderedDict(
            a=torch.nn.Parameter(whole[:6].view(2, 3)), b=whole[6:12].view(3, 2).t(), c=whole[12:].clone(), step=3
        ),
        "global_step": 470000,
        "optimizer_states": [{"state": {0: {"betas": (0.9, 0.999)}}}],
        "hyper": {"lr": 1e-4, "name": "x", "none": None, "flag": True},
    }
    torch.save(held, tmp_path / "m.ckpt")
    header = read_header(tmp_path / "m.ckpt")
    assert {k: i.shape for k, i in header.tensors.items()} == {"a": (2, 3), "b": (2, 3), "c": (12,)}
    assert header.metadata == {"global_step": "470000"}
    read = read_weights(tmp_path / "m.ckpt", ["b"])
    assert read.keys() == {"b"} and torch.equal(read["b"], whole[6:12].view(3, 2).t())


@pytest.mark.parametrize("legacy", [False, True])
def test_a_state_dict_as_modules_give_it(tmp_path: Path, legacy: bool) -> None:
    """It is an OrderedDict with an attribute, `_metadata`, which is no tensor."""
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    torch.save(state, tmp_path / "m.bin", _use_new_zipfile_serialization=not legacy)
    read = read_weights(tmp_path / "m.bin")
    assert list(read) == list(state) and all(torch.equal(read[key], state[key]) for key in state)


def test_a_file_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "renamed.ckpt")
    assert read_header(tmp_path / "renamed.ckpt").kind == "safetensors"
    torch.save({"w": torch.ones(2)}, tmp_path / "renamed.safetensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        read_header(tmp_path / "renamed.safetensors")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_header(tmp_path / "none")


def lightning(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
    torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {"x": module.ModelCheckpoint()}}, path)


def tar(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("sys_info"), io.BytesIO())


def script(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))


def module(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lightning, "an object of Lightning, the training program, pytorch_lightning.callbacks.ModelCheckpoint"),
        (tar, "is a tar file, as torch wrote before 2018"),
        (script, "TorchScript"),
        (module, r"a custom class, torch\.nn\.modules\.linear\.Linear, which is code, and code is not run"),
    ],
)
def test_what_else_torch_writes_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, message: str
) -> None:
    write(tmp_path / "m.ckpt", monkeypatch)
    with pytest.raises(ValueError, match=message):
        read_header(tmp_path / "m.ckpt")


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model/unet/config.json", "{}" * 100)


def image(kind: str) -> Callable[[Path], None]:
    return lambda path: Image.new("RGB", (4, 4)).save(path, kind)


def numpy_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.ones(3))


FOREIGN: dict[str, tuple[bytes | Callable[[Path], None], str]] = {
    "page": (b"<!DOCTYPE html>\n<html><title>Sign in</title>", "an HTML page"),
    "page with a mark": (b"\xef\xbb\xbf  <HTML lang=en>", "an HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an HTML page"),
    "json": (b'{"error": "Invalid username or password."}', "a JSON file"),
    "list": (b"\n  [1, 2, 3]", "a JSON file"),
    "gguf": (b"GGUF\x03\x00\x00\x00" + bytes(100), "a GGUF file"),
    "gzip": (gzip.compress(b"x" * 1000), "a gzip archive"),
    "pdf": (b"%PDF-1.7\n", "a PDF document"),
    "zip": (zipped, "a zip archive, but not one that torch wrote"),
    "png": (image("PNG"), "a PNG picture"),
    "jpeg": (image("JPEG"), "a JPEG picture"),
    "webp": (image("WEBP"), "a WebP picture"),
    "numpy": (numpy_array, "a NumPy array"),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".bin"])
@pytest.mark.parametrize("name", FOREIGN)
def test_what_comes_by_the_name_of_a_model_is_called_what_it_is(tmp_path: Path, name: str, suffix: str) -> None:
    content, what = FOREIGN[name]
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content) if isinstance(content, bytes) else content(path)
    expected = "is not a safetensors file" if (name, suffix) == ("zip", ".safetensors") else what
    with pytest.raises(ValueError, match=expected):
        read_header(path)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(0, 600), suffix=st.sampled_from([".ckpt", ".bin", ".pt", ".sft", ""]))
def test_safetensors_are_known_whatever_their_name_and_length(tmp_path_factory: Any, length: int, suffix: str) -> None:
    """The first byte of the file is that of the header's length, and so may be the first of any other format."""
    path = tmp_path_factory.mktemp("h") / f"m{suffix}"
    save_file({"w": torch.ones(2)}, path, metadata={"said": "x" * length})
    header = read_header(path)
    assert header.kind == "safetensors" and header.metadata == {"said": "x" * length}
    assert torch.equal(read_weights(path)["w"], torch.ones(2))


def test_names_are_cut_and_quoted(tmp_path: Path) -> None:
    save_file({"a" * 5000: torch.ones(1)}, tmp_path / "long.safetensors")
    torch.save({"a" * 5000: torch.ones(1)}, tmp_path / "long.ckpt")
    for suffix in ("safetensors", "ckpt"):
        with pytest.raises(ValueError, match="a name of 5,000 letters") as caught:
            read_header(tmp_path / f"long.{suffix}")
        assert len(str(caught.value)) < 300 + len(str(tmp_path))
    save_file({"\x1b[31mred": torch.ones(1)}, tmp_path / "red.safetensors")
    found = {name: info.shape for name, info in read_header(tmp_path / "red.safetensors").tensors.items()}
    assert differences({}, found) == "+ \\x1b[31mred [1] is not expected"
