"""Small files that ask for much: each is refused in under a second and 200 MB, measured in a process of its own."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdedit.loading.pickles import read_pickle

# One process for all of them: a good file first, so that imports are not measured, then each bomb in three ways. Linux
# keeps the most memory that a process ever used in VmHWM, and forgets it when asked to. (getrusage would begin with
# what the parent used.)
MEASURE = """
import json, re, sys, time
from pathlib import Path
import torch
from torch import nn
from sdedit import AutoencoderKL
from sdedit.loading.weights import fill
from sdedit.apps.inspect import describe

def refused(load):
    try:
        report = load()
        return report.reason if getattr(report, "loads", True) is False else None
    except ValueError as error:
        return str(error)

def most_memory():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

model = nn.Linear(3, 2)
good, *bombs = (Path(argument) for argument in sys.argv[1:])
assert refused(lambda: fill(model, [good], dtype=torch.float32)) is None
refused(lambda: describe(good)), refused(lambda: AutoencoderKL.from_single_file(good))
for bomb in bombs:
    Path("/proc/self/clear_refs").write_text("5")
    before = most_memory()
    started = time.process_time()
    answers = [
        refused(lambda: fill(model, [bomb], dtype=torch.float32)),
        refused(lambda: AutoencoderKL.from_single_file(bomb)),
        refused(lambda: describe(bomb)),
    ]
    seconds = (time.process_time() - started) / len(answers)
    print(json.dumps([bomb.name, answers, seconds, most_memory() - before]))
"""


def safetensors(header: bytes, data: bytes = b"") -> Callable[[Path], object]:
    return lambda path: path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def entry(shape: list[int], begin: int, end: int) -> str:
    return json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]})


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED, data: bytes = b"") -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr("a/data.pkl", pickled)
            archive.writestr("a/byteorder", b"little")
            archive.writestr("a/version", b"3\n")
            archive.writestr("a/data/0", data)

    return write


def shared_storage(path: Path) -> None:
    """A thousand tensors on the same million numbers: 4 MB that would be cast to 4 GB."""
    numbers = torch.zeros(1 << 20)
    torch.save({f"w{i}": numbers.view(1024, 1024) for i in range(1000)}, path)


def compressed(path: Path) -> None:
    """64 MB of zeros in 63 KB."""
    torch.save({"weight": torch.zeros(16 << 20)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    assert path.stat().st_size < 70_000


def lying_member(path: Path) -> None:
    """A zip whose directory claims that a storage has 4 GB."""
    torch.save({"weight": torch.zeros(4)}, path)
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/0")).encode()
    place = raw.rindex(name) - 46
    claim = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(raw[: place + 20] + claim + raw[place + 28 :])


REDUCE = b"cbuiltins\nbytearray\n"
# A key made of tuples of tuples, each holding the last twice: its hash is computed in 2^60 steps.
NEVER_ENDING_TUPLE = b"\x80\x02})q\x00" + b"h\x00h\x00\x86q\x00" * 60
NEVER_ENDING_HASH = NEVER_ENDING_TUPLE + b"K\x01s."
BOMBS: dict[str, Callable[[Path], object]] = {
    "compressed.ckpt": compressed,
    "stride_0.ckpt": lambda p: torch.save({"weight": torch.zeros(1).half().expand(2_000_000, 2_000_000)}, p),
    "stride_0_legacy.pt": lambda p: torch.save(
        {"weight": torch.zeros(1).expand(2_000_000, 2_000_000)}, p, _use_new_zipfile_serialization=False
    ),
    "shared_storage.ckpt": shared_storage,
    "lying_member.ckpt": lying_member,
    "hash.ckpt": zipped(NEVER_ENDING_HASH),
    "hash_in_pairs.ckpt": zipped(NEVER_ENDING_TUPLE + b"ccollections\nOrderedDict\n](h\x00K\x01\x86e\x85R."),
    "hash_in_a_set.ckpt": zipped(NEVER_ENDING_TUPLE + b"cbuiltins\nset\n](h\x00e\x85R."),
    "bytearray.ckpt": zipped(b"\x80\x02" + REDUCE + b"\x8a\x06\x00\x00\x00\x00\x00\x10\x85R."),
    "long_pickle.ckpt": zipped(b"\x80\x02" + b"]" * (3 << 20) + b"."),
    "longer_pickle.ckpt": zipped(b"\x80\x02" + b"]" * (70 << 20) + b"."),
    "deep_pickle.ckpt": zipped(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."),
    "plain_pickle.pt": lambda p: p.write_bytes(pickle.dumps({"weight": bytearray(8)}, protocol=2)),
    "long_header.safetensors": safetensors(b"{" + b" " * (90 << 20) + b"}"),
    "many_tensors.safetensors": safetensors(
        ("{" + ",".join(f'"{i}":{entry([0], 0, 0)}' for i in range(300_000)) + "}").encode()
    ),
    "many_tensors_short.safetensors": safetensors(
        ("{" + ",".join(f'"{i:x}":{entry([], 0, 0)}'.replace(" ", "") for i in range(40_000)) + "}").encode()
    ),
    "twice.safetensors": safetensors(f'{{"w":{entry([1], 0, 4)},"w":{entry([1], 0, 4)}}}'.encode(), bytes(4)),
    "overlap.safetensors": safetensors(f'{{"v":{entry([1], 0, 4)},"w":{entry([1], 0, 4)}}}'.encode(), bytes(4)),
    "gap.safetensors": safetensors(f'{{"w":{entry([1], 4, 8)}}}'.encode(), bytes(8)),
    "beyond.safetensors": safetensors(f'{{"w":{entry([1 << 40], 0, 4 << 40)}}}'.encode(), bytes(8)),
    "wrong_size.safetensors": safetensors(f'{{"w":{entry([2], 0, 4)}}}'.encode(), bytes(4)),
    "negative.safetensors": safetensors(f'{{"w":{entry([-1, -1], 0, 4)}}}'.encode(), bytes(4)),
    "axes.safetensors": safetensors(f'{{"w":{entry([1] * 1_000_000, 0, 4)}}}'.encode(), bytes(4)),
    "digits.safetensors": safetensors(
        b'{"w":{"dtype":"F32","shape":[' + b"9" * (1 << 20) + b'],"data_offsets":[0,4]}}'
    ),
    "deep.safetensors": safetensors(b'{"a":' * (1 << 19)),
    "nested.safetensors": safetensors(b'{"a":[' + b"[]," * (1 << 20) + b"[]]}"),
}


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it")


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("bombs")
    for name, write in BOMBS.items():
        write(folder / name)
    save_file({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, folder / "good.safetensors")
    paths = [str(folder / name) for name in ("good.safetensors", *BOMBS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURE, *paths]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr
    return {row[0]: row[1:] for row in map(json.loads, ran.stdout.splitlines())}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_soon_and_cheaply(figures: dict[str, list[Any]], name: str) -> None:
    answers, seconds, megabytes = figures[name]
    assert all(answers), answers
    assert all(len(answer) < 600 for answer in answers), answers
    assert seconds < 1 and megabytes < 200, (seconds, megabytes)


def test_the_measure_measures(tmp_path: Path) -> None:
    """What torch does with one of them by itself: the same measure shows it."""
    code = MEASURE.split("model = ")[0] + (
        "Path('/proc/self/clear_refs').write_text('5'); before = most_memory()\n"
        "torch.load(sys.argv[1], weights_only=True); print(most_memory() - before)"
    )
    torch.save(torch.zeros(64 << 20), tmp_path / "large.pt")
    ran = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "large.pt"], capture_output=True, text=True, check=True
    )
    assert float(ran.stdout) > 250


def test_a_length_that_no_memory_holds_is_damage() -> None:
    huge = b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b"abc."
    with pytest.raises(ValueError, match="is damaged"):
        read_pickle(io.BufferedReader(io.BytesIO(huge)))  # type: ignore[arg-type]
