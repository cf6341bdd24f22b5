"""Time and memory of loading a folder of Stable Diffusion 1.5's size, here and in diffusers, in processes by turns.

The weights are random; the folder is written to a temporary place, read once so that its pages are in the cache, and
deleted afterwards. What is imported before does not count: time and memory are those of `from_pretrained`. Run from
the root of the repository:

    python benchmarks/loading.py

It prints a table and where our own time goes, and writes benchmarks/results/loading.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "loading.json"
DEFAULT_MODEL = Path(__file__).parent.parent / "src" / "sdedit" / "default_model"

CHILD = """
import functools, json, re, sys, time, torch
from pathlib import Path
from {library} import StableDiffusionImg2ImgPipeline
from transformers import CLIPTextModel, CLIPTokenizer
if {library!r} == "diffusers":
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
else:
    from sdedit import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

def memory(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

parts = {{}}

def timed(owner, name, part):
    function = getattr(owner, name)
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        began = time.perf_counter()
        result = function(*args, **kwargs)
        parts[part] = parts.get(part, 0.0) + time.perf_counter() - began
        return result
    setattr(owner, name, wrapper)

if {library!r} == "sdedit":
    from sdedit.loading import pretrained, weights
    for network in (UNet2DConditionModel, AutoencoderKL, CLIPTextModel):
        timed(network, "__init__", "part: make the modules")
    timed(weights, "fits", "part: compare names and shapes")
    timed(weights, "read_weights", "part: map the tensors")
    timed(weights, "_cast", "part: cast")
    timed(pretrained, "load_processor", "part: tokenizer")
Path("/proc/self/clear_refs").write_text("5")  # the highest peak begins here
before, start = memory("VmRSS"), time.perf_counter()
arguments = {{"safety_checker": None}} if {library!r} == "diffusers" else {{}}
pipe = StableDiffusionImg2ImgPipeline.from_pretrained(sys.argv[1], torch_dtype=getattr(torch, sys.argv[2]), **arguments)
seconds = time.perf_counter() - start
after_load = memory("VmHWM") - before
weights = [p for m in (pipe.unet, pipe.vae, pipe.text_encoder) for p in m.parameters()]
size = sum(p.numel() * p.element_size() for p in weights)
with torch.no_grad():
    used = sum(float(p.view(-1)[:: 2048 // p.element_size()].float().sum()) for p in weights)  # every page is read
until_read, peak_until_read = time.perf_counter() - start, memory("VmHWM") - before
began = time.perf_counter()
torch.empty(size, dtype=torch.uint8).zero_()
print(json.dumps({{
    "seconds": seconds,
    "seconds_until_read": until_read,
    "peak_over_weights": after_load / size,
    "peak_until_read_over_weights": peak_until_read / size,
    "seconds_for_new_memory_of_that_size": time.perf_counter() - began,
    **parts,
}}))
"""


def write_folder(folder: Path, dtype: torch.dtype) -> None:
    """A model folder with the published shapes and random weights."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    import sdedit

    def random(model: torch.nn.Module) -> torch.nn.Module:
        noise = 0.02 * torch.randn(2**20, dtype=dtype)
        for parameter in model.to_empty(device="cpu").to(dtype).parameters():
            count = parameter.numel()
            parameter.data = noise.repeat(-(-count // len(noise)))[:count].reshape(parameter.shape)
        return model

    levels = 4
    with torch.device("meta"):
        unet = sdedit.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae = sdedit.AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
        )
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    text = random(text)
    text.embeddings.position_ids = torch.arange(77)[None]
    pipe = sdedit.StableDiffusionImg2ImgPipeline(
        vae=random(vae),
        text_encoder=text,
        tokenizer=CLIPTokenizer.from_pretrained(DEFAULT_MODEL / "tokenizer"),
        unet=random(unet),
        scheduler=sdedit.DDIMScheduler(beta_schedule="scaled_linear"),
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    results = {}
    for stored, wanted in (("bfloat16", "bfloat16"), ("float32", "bfloat16")):
        with tempfile.TemporaryDirectory() as folder:
            write_folder(Path(folder), getattr(torch, stored))
            for file in Path(folder).rglob("*.safetensors"):
                file.read_bytes()
            taken = {"sdedit": [], "diffusers": []}
            for i in range(rounds + 1):
                for library, runs in taken.items():
                    command = [sys.executable, "-c", CHILD.format(library=library), folder, wanted]
                    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    if i:  # the first round fills caches
                        runs.append(json.loads(out.splitlines()[-1]))
        for library, runs in taken.items():
            medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            results[f"{library}, {stored} → {wanted}"] = medians
            print(f"{library:10} {stored} → {wanted}", *(f"{key} {value:.3f}" for key, value in medians.items()))
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "safetensors")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    record = {"rounds": rounds, "machine": machine, "packages": packages, "results": results}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
