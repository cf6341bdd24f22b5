"""UNet calls whose number or size of pictures changes: as fast as if each had come first?

    python benchmarks/changing_shapes.py                  the default model and SD 1.5's size, in bfloat16 on the CPU
    python benchmarks/changing_shapes.py --models default

oneDNN wants weights in a layout that depends on the input. For each shape: calls of a process that has seen no other
(`first`), and of one that has seen all the others (`after`), in turn: milliseconds, and how many tensors each call laid
out anew (oneDNN's own log), which other work on the machine does not change. Prints a table and writes
benchmarks/results/changing_shapes.json, with the memory of the packed weights as a part of that of the plain ones.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sdedit
from sdedit.models.fast.full_speed import one_run

RESULTS = Path(__file__).parent / "results" / "changing_shapes.json"
# Texts and pictures of a call, and the side of these in latents: guided calls have two texts for a picture.
SHAPES = {
    "default": [(1, 1, 16), (2, 1, 16), (2, 2, 16), (4, 2, 16), (4, 4, 16), (8, 8, 16), (2, 1, 24), (2, 1, 32)],
    "sd15": [(1, 1, 32), (2, 1, 32), (4, 2, 32), (8, 4, 32), (2, 1, 40)],
}
CALLS = {"default": 25, "sd15": 3}


def network(model: str) -> Any:
    if model == "default":
        return sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(torch_dtype=torch.bfloat16).unet
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = sdedit.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    unet = unet.to(torch.bfloat16).to_empty(device="cpu").eval().requires_grad_(False)
    for name, parameter in unet.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(float(name.endswith("weight")))
    return unet


def laid_out(call: Callable[[], Any]) -> int:
    """How many tensors a call lays out anew."""
    own = os.dup(1)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                call()
        finally:
            os.dup2(own, 1)
            os.close(own)
        log.seek(0)
        return sum(b",exec," in line and b",reorder," in line for line in log)


@torch.no_grad()
def child(model: str) -> None:
    """Answers each line, a shape, with the milliseconds of a call of it, or what else is asked."""
    unet = network(model)
    given: dict[str, Any] = {}
    with one_run(unet):
        for line in sys.stdin:
            asked, shape = line.strip().split(" ", 1)
            if shape not in given:
                texts, pictures, side = json.loads(shape)
                x = torch.randn(pictures, unet.config.in_channels, side, side).bfloat16()
                given[shape] = x, 500, torch.randn(texts, 77, unet.config.cross_attention_dim).bfloat16()
            call = functools.partial(unet, *given[shape])
            began = time.perf_counter()
            found = laid_out(call) if asked == "log" else call() and None
            taken = 1000 * (time.perf_counter() - began)
            print(json.dumps([taken, found, packed_share(unet)]), flush=True)


class Child:
    """A process with the network."""

    def __init__(self, model: str) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = subprocess.Popen([sys.executable, __file__, "--child", model], **pipes)

    def ask(self, what: str, shape: Any) -> list[Any]:
        """Milliseconds, how many tensors were laid out if `what` is `log`, and the memory of packed weights."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{what} {json.dumps(shape)}\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def end(self) -> None:
        """It is done."""
        self.process.communicate()


def packed_share(unet: Any) -> float | None:
    """Bytes of the packed copies for one of the plain weights."""
    from sdedit.models.fast import packing

    weights = [p for p in unet.parameters() if p in packing._known]
    copies = sum(torch.ops.mkldnn._nbytes(copy) for p in weights for copy in packing._known[p].copies())
    return copies / sum(p.nbytes for p in weights) if weights else None


def compare(model: str) -> dict[str, Any]:
    """Each shape's calls in a process of its own and in one that has seen all, in turn."""
    shapes, rows = SHAPES[model], {}
    after = Child(model)
    for shape in shapes:
        after.ask("call", shape)
    for shape in shapes:
        first = Child(model)
        both = {"first": first, "after": after}
        for one in both.values():
            one.ask("call", shape)
        times = {name: [] for name in both}
        for _ in range(CALLS[model]):
            for name, one in both.items():
                times[name].append(one.ask("call", shape)[0])
        rows[str(shape)] = {
            name: {
                "median_ms": statistics.median(times[name]),
                "least_ms": min(times[name]),
                "laid_out": one.ask("log", shape)[1],
            }
            for name, one in both.items()
        }
        first.end()
        print(f"{model:8} texts, pictures, side {shape}:", rows[str(shape)], flush=True)
    packed = after.ask("call", shapes[-1])[2]
    after.end()
    return {"shapes": rows, "packed copies, parts of the weights": packed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["threads"], found["torch"] = torch.get_num_threads(), torch.__version__
    for model in arguments.models:
        found[model] = compare(model)
        RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
