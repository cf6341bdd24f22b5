"""A whole call with the default model, sdedit beside diffusers, in turn, in one process, on the CPU.

    python benchmarks/default_call.py [--rounds 7]

25 steps at strength 0.7 with guidance, a picture of 128×128, in float32 and bfloat16, by the same scheduler. Both load
the same folder and get the same prompt embeds. Prints medians of wall and CPU seconds and how near the pictures are,
and writes benchmarks/results/default_call.json. The first call of each is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import diffusers
import torch

import sdedit

RESULTS = Path(__file__).parent / "results" / "default_call.json"
FOLDER = Path(sdedit.__file__).parent / "default_model"
SETTINGS = {"strength": 0.7, "num_inference_steps": 25, "guidance_scale": 7.5, "output_type": "pt"}


def compare(dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    ours = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(torch_dtype=dtype)
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(
        FOLDER, torch_dtype=dtype, safety_checker=None, requires_safety_checker=False
    )
    image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embeds, negative = ours.encode_prompt("red apple, 3d", do_classifier_free_guidance=True)
    given = {"image": image, "prompt_embeds": embeds, "negative_prompt_embeds": negative, **SETTINGS}
    pictures: dict[str, Any] = {}
    times: dict[str, list[tuple[float, float]]] = {"diffusers": [], "sdedit": []}
    for i in range(rounds + 1):
        for name, pipe in (("diffusers", theirs), ("sdedit", ours)):
            pipe.set_progress_bar_config(disable=True)
            wall, cpu = time.perf_counter(), time.process_time()
            pictures[name] = pipe(generator=torch.Generator().manual_seed(0), **given)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if i:
                times[name].append((wall, cpu))
    found = {}
    for name, both in times.items():
        wall, cpu = zip(*both, strict=True)
        found[name] = {"wall": statistics.median(wall), "cpu": statistics.median(cpu), "least_cpu": min(cpu)}
    a, b = (pictures[name].images.float() for name in ("diffusers", "sdedit"))
    ratio = statistics.median(o[1] / t[1] for t, o in zip(times["diffusers"], times["sdedit"], strict=True))
    return found | {"cpu, sdedit / diffusers": ratio, "psnr": float(-10 * (a - b).square().mean().log10())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[name] = compare(dtype, rounds)
        print(name, found[name], flush=True)
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
