"""What the nearly exact modes cost in the picture and save in time, on the default model.

    python benchmarks/turbo.py      prints a table and writes benchmarks/results/turbo.json

A drawing at strength 0.65, with three seeds; CPU time on one thread; PSNR and relative L2 against the exact pictures.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdedit import StableDiffusionImg2ImgPipeline

ROOT = Path(__file__).parents[1]


def draw(pipe: Any, image: Image.Image, steps: int) -> tuple[np.ndarray[Any, Any], float]:
    """Three pictures (3, H, W, 3), and the CPU seconds they took."""
    began = time.process_time()
    made = [
        pipe(
            "red apple, 3d",
            image=image,
            strength=0.65,
            num_inference_steps=steps,
            guidance_scale=3,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
        ).images
        for seed in range(3)
    ]
    return np.concatenate(made), time.process_time() - began


def modes(pipe: Any) -> Iterator[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Each way to be faster: its name, what turns it on, and what turns it off."""
    for level, guidance in itertools.product((1, 2, 3), (1.0, 0.7, 0.4)):
        guided = f", {guidance} of the steps guided" if guidance < 1 else ""
        yield f"level {level}{guided}", partial(pipe.enable_turbo, level, guidance), pipe.disable_turbo
    yield "tokens merged by 2", pipe.enable_token_merging, pipe.disable_token_merging
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        return
    plain, eight = pipe.unet, copy.deepcopy(pipe.unet)
    quantize_(eight, Int8WeightOnlyConfig())
    yield "int8 weights (torchao)", partial(setattr, pipe, "unet", eight), partial(setattr, pipe, "unet", plain)


def main() -> None:
    torch.set_num_threads(1)
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    image = Image.open(ROOT / "examples" / "apple.png").convert("RGB").resize((128, 128))
    draw(pipe, image, 4)
    results: dict[str, Any] = {}
    for steps in (25, 50):
        exact, whole = draw(pipe, image, steps)
        for name, change, undo in modes(pipe):
            change()
            near, taken = draw(pipe, image, steps)
            undo()
            difference = near - exact
            psnr = -10 * np.log10((difference**2).mean(axis=(1, 2, 3)))
            found = {
                "times as fast": whole / taken,
                "lowest psnr": float(psnr.min()),
                "l2": float(np.linalg.norm(difference) / np.linalg.norm(exact)),
            }
            results[f"{steps} steps, {name}"] = found
            print(f"{steps} steps, {name}", {k: round(v, 4) for k, v in found.items()}, flush=True)
    (ROOT / "benchmarks" / "results" / "turbo.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
