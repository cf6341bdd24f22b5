"""Headers: what a file says of itself is what torch and safetensors read from it, and what is no weights is named."""

from __future__ import annotations

import collections
import io
import sys
import tarfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from sdedit.loading.headers import read_header
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
