"""What the nearly exact modes cost in the picture and save in time.

    python benchmarks/turbo.py              on the default model: a drawing, three seeds, 25 and 50 steps
    python benchmarks/turbo.py --sd15       on a network of SD 1.5's size, random weights, bfloat16, 256×256: 25 steps

Strength 0.65; CPU time on one thread; PSNR and relative L2 against the exact pictures. Prints a table and writes
benchmarks/results/turbo.json or turbo-sd15.json.
"""

from __future__ import annotations

import argparse
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

from pipeline import RESULTS, Pair
from sdedit import StableDiffusionImg2ImgPipeline

ROOT = Path(__file__).parents[1]


def draw(pipe: Any, steps: int, seeds: int, **given: Any) -> tuple[np.ndarray[Any, Any], float]:
    """A picture of each seed, (seeds, H, W, 3), and the CPU seconds they took."""
    began = time.process_time()
    settings = {"strength": 0.65, "num_inference_steps": steps, "output_type": "np", **given}
    made = [pipe(generator=torch.Generator().manual_seed(seed), **settings).images for seed in range(seeds)]
    return np.concatenate(made), time.process_time() - began


def default_model() -> tuple[Any, dict[str, Any]]:
    """The pipeline, and what it is given."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
    image = Image.open(ROOT / "examples" / "apple.png").convert("RGB").resize((256, 256))
    return pipe, {"prompt": "red apple, 3d", "image": image, "guidance_scale": 3}


def of_sd15s_size() -> tuple[Any, dict[str, Any]]:
    """The same of networks of SD 1.5's size."""
    pair = Pair("cpu", torch.bfloat16, 1, small=False)
    embeds = dict(zip(("negative_prompt_embeds", "prompt_embeds"), pair.texts.chunk(2), strict=True))
    return pair.ours, {"image": pair.image[:, :, :256, :256], "guidance_scale": 7.5, **embeds}


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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sd15", action="store_true")
    sd15 = parser.parse_args().sd15
    torch.set_num_threads(1)
    pipe, given = of_sd15s_size() if sd15 else default_model()
    seeds = 1 if sd15 else 3
    pipe.set_progress_bar_config(disable=True)
    draw(pipe, 4, seeds, **given)
    results: dict[str, Any] = {}
    for steps in (25,) if sd15 else (25, 50):
        exact, whole = draw(pipe, steps, seeds, **given)
        for name, change, undo in modes(pipe):
            change()
            near, taken = draw(pipe, steps, seeds, **given)
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
    (RESULTS / f"turbo{'-sd15' if sd15 else ''}.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
