"""Weights are read safely: damaged, hostile and unfitting files are refused by name, and nothing in them is run."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sdedit.loading import weights as checkpoint
from sdedit.loading.folders import choose_weights, clip_name, vae_name, weight_files
from sdedit.loading.weights import fill, read_weights, save_network
from sdedit.models.blank import blank

WEIGHTS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}


def linear() -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(3, 2)


def test_layouts_of_shards_and_variants() -> None:
    plain, half = "m.safetensors", "m.fp16.safetensors"
    assert choose_weights([plain, half, "m.bin"], ["m"]) == plain
    assert choose_weights([plain, half], ["m"], "fp16") == half
    assert choose_weights([plain], ["m"], "fp16") is None
    assert choose_weights([plain, "m.bin"], ["m"], use_safetensors=False) == "m.bin"
    assert choose_weights(["m.bin"], ["m"], use_safetensors=True) is None
    assert choose_weights(["m.bin"], ["m"]) == "m.bin"
    for index in ("m.safetensors.index.fp16.json", "m.safetensors.fp16.index.json"):
        assert choose_weights([index, "m.safetensors.index.json"], ["m"], "fp16") == index
    assert choose_weights(["other.safetensors"], ["m"]) is None


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "legacy.bin"])
def test_round_trip(tmp_path: Path, name: str) -> None:
    if name == "w.safetensors":
        save_file(WEIGHTS, tmp_path / "w.safetensors")
    else:
        torch.save(WEIGHTS, tmp_path / name, _use_new_zipfile_serialization=name == "w.bin")
    model = linear()
    fill(model, [tmp_path / name], dtype=torch.float32)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in WEIGHTS.items())
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_weights_split_over_files(tmp_path: Path) -> None:
    for name, tensor in WEIGHTS.items():
        save_file({name: tensor.half()}, tmp_path / f"{name}.safetensors")
    (tmp_path / "w.safetensors.index.json").write_text(
        '{"weight_map": {"weight": "weight.safetensors", "bias": "bias.safetensors"}}'
    )
    files = weight_files(tmp_path / "w.safetensors.index.json")
    model = linear()
    fill(model, files, dtype=torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16
    assert torch.equal(model.bias.float(), WEIGHTS["bias"])
    (tmp_path / "bias.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"bias\.safetensors is missing"):
        weight_files(tmp_path / "w.safetensors.index.json")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x.safetensors", "..", ""]
)
def test_shards_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    save_file(WEIGHTS, tmp_path / "secret.safetensors")
    index = tmp_path / "unet" / "w.safetensors.index.json"
    index.parent.mkdir()
    index.write_text('{"weight_map": {"weight": %s}}' % ('"' + name.replace("\\", "\\\\") + '"'))
    with pytest.raises((ValueError, FileNotFoundError), match=r"expected a file name|is missing"):
        weight_files(index)


def test_an_index_without_a_map(tmp_path: Path) -> None:
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'):
        (tmp_path / "i.json").write_text(text)
        with pytest.raises(ValueError, match="weight_map"):
            weight_files(tmp_path / "i.json")


class Code:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def _compressed(path: Path) -> None:
    torch.save({"weight": torch.zeros(1 << 20)}, path)
    with zipfile.ZipFile(path) as ordinary:
        parts = {name: ordinary.read(name) for name in ordinary.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, data in parts.items():
            bomb.writestr(name, data)


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGED: dict[str, Any] = {
    "empty.bin": lambda p: p.write_bytes(b""),
    "noise.bin": lambda p: p.write_bytes(bytes(range(256)) * 9),
    "truncated.bin": lambda p: (torch.save(WEIGHTS, p), _half(p)),
    "compressed.bin": _compressed,
    "code.bin": lambda p: torch.save({"weight": Code(p.parent / "ran")}, p),
    "plain_pickle.bin": lambda p: p.write_bytes(pickle.dumps({"weight": Code(p.parent / "ran")}, protocol=2)),
    "module.bin": lambda p: torch.save(nn.Linear(3, 2), p),
    "nested.bin": lambda p: torch.save({"weights": WEIGHTS}, p),
    "list.bin": lambda p: torch.save([torch.ones(2)], p),
    "numbers.bin": lambda p: torch.save({1: torch.ones(2)}, p),
    "sparse.bin": lambda p: torch.save({"weight": torch.eye(3).to_sparse()}, p),
    "pointer.bin": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    "pointer.safetensors": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "empty.safetensors": lambda p: p.write_bytes(b""),
    "noise.safetensors": lambda p: p.write_bytes(bytes(range(256)) * 9),
    "truncated.safetensors": lambda p: (save_file(WEIGHTS, p), _half(p)),
    "huge_header.safetensors": lambda p: p.write_bytes((1 << 62).to_bytes(8, "little") + b"{}"),
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_and_hostile_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    DAMAGED[name](tmp_path / name)
    with pytest.raises(ValueError, match=name) as caught:
        read_weights(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    assert ("git-lfs" in str(caught.value)) == name.startswith("pointer")
    assert ("is code" in str(caught.value)) == (name.startswith(("code", "plain", "module")))
    assert "weights_only" not in str(caught.value)  # torch's advice to run the code after all
    assert len(str(caught.value)) < 500


def test_what_does_not_fit_is_listed_with_both_shapes_and_leaves_the_network_alone(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 4), "extra": torch.zeros(5)}, tmp_path / "w.safetensors")
    model = nn.Linear(3, 2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        fill(model, [tmp_path / "w.safetensors"], dtype=None)
    text = str(caught.value)
    assert "w.safetensors" in text and "Linear" in text
    assert "! weight is [2, 4] in the file; [2, 3] expected" in text
    assert "- bias [2] is missing" in text and "+ extra [5] is not expected" in text
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_a_tensor_of_stride_0_is_refused_before_it_is_cast(tmp_path: Path) -> None:
    torch.save(
        {"weight": torch.zeros(1).half().expand(2_000_000, 2_000_000), "bias": torch.ones(2)}, tmp_path / "w.bin"
    )
    with pytest.raises(ValueError, match=r"shape \[2000000, 2000000\], of which only 1 value"):
        fill(linear(), [tmp_path / "w.bin"], dtype=torch.float32)


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    save_file({k: v.to(torch.int8) for k, v in WEIGHTS.items()}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"weight holds int8|bias holds int8"):
        fill(linear(), [tmp_path / "w.safetensors"], dtype=torch.float32)


def test_names_of_older_files() -> None:
    new = {"embeddings.x": torch.ones(1)}
    old = {"text_model.embeddings.x": torch.ones(1)}
    for name in (*new, *old):
        assert clip_name(name, new) == "embeddings.x"
        assert clip_name(name, old) == "text_model.embeddings.x"
    assert clip_name("text_model.embeddings.position_ids", new) is None
    nested = {"vision_model.embeddings.x": torch.ones(1)}  # the safety checker, before and after
    assert clip_name("vision_model.vision_model.embeddings.x", nested) == "vision_model.embeddings.x"
    assert clip_name("vision_model.embeddings.x", {"vision_model." + k: v for k, v in nested.items()}) is not None
    renamed = vae_name("encoder.mid_block.attentions.0.proj_attn.weight", {})
    assert renamed == "encoder.mid_block.attentions.0.to_out.0.weight"


def test_saved_weights_may_be_read_by_whoever_may_read_other_files(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_network({"a": torch.zeros(2)}, "{}", tmp_path, "weights")
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_tensors_that_are_cast_are_read_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"{i}.weight": torch.randn(8, 8) for i in range(7)} | {"7.weight": torch.randn(8, 8).bfloat16()}
    save_file(state, tmp_path / "w.safetensors")
    seen: list[int] = []
    plain = checkpoint.read_weights

    def spy(path: Path, names: Any, header: Any) -> Any:
        seen.append(len(names))
        return plain(path, names, header)

    monkeypatch.setattr(checkpoint, "read_weights", spy)
    monkeypatch.setattr(checkpoint, "_PORTION", 3 * 8 * 8 * 4)
    with blank():
        model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(8)))
    checkpoint.fill(model, [tmp_path / "w.safetensors"], dtype=torch.bfloat16)
    assert seen == [1, 3, 3, 1]
    assert all(torch.equal(t, state[name].bfloat16()) for name, t in model.state_dict().items())


def test_blank_networks_have_no_values_and_those_outside_do() -> None:
    with blank():
        model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Embedding(3, 3), torch.nn.GroupNorm(1, 3))
    assert all(p.is_meta for p in model.parameters())
    assert torch.nn.Linear(3, 3).weight.std() > 0
