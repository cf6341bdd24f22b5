"""Time and memory of loading a 3 MB LoRA into the UNet of Stable Diffusion 1.5, here and in diffusers, alternating.

The networks have the published shapes; their weights are random (bfloat16, shared by both pipelines' UNets, so that
both fit into 4 GB), for loading an adapter does not depend on them. Run from the root of the repository:

    python benchmarks/lora.py ../shared/data/adapters/lora_diffusers_sd15.safetensors

It prints a table, and writes benchmarks/results/lora.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "lora.json"


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def pipelines():
    """Ours and diffusers' with the same UNet weights, and only what loading into the UNet needs."""
    import diffusers

    import sdedit
    from sdedit.adapters.lora import LoraLoader

    torch.manual_seed(0)
    shape = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
    with torch.device("meta"):
        unet = sdedit.UNet2DConditionModel(**shape)
        theirs = diffusers.UNet2DConditionModel(**shape)
    unet = unet.to_empty(device="cpu").to(torch.bfloat16).eval()
    noise = 0.02 * torch.randn(2**20, dtype=torch.bfloat16)
    for parameter in unet.parameters():
        count = parameter.numel()
        parameter.data = noise.repeat(-(-count // len(noise)))[:count].reshape(parameter.shape)
    theirs.load_state_dict(unet.state_dict(), assign=True)

    ours = LoraLoader()
    ours.unet, ours.text_encoder, ours.tokenizer = unet, None, None
    other = diffusers.StableDiffusionImg2ImgPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=theirs.eval(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return {"sdedit": ours, "diffusers": other}


def once(pipe, file: Path) -> tuple[float, float]:
    """Seconds of this process to load and to unload: what else the machine does does not count."""
    start = time.process_time()
    pipe.load_lora_weights(file)
    middle = time.process_time()
    pipe.unload_lora_weights()
    return middle - start, time.process_time() - middle


def fused(pipe, file: Path) -> dict[str, float]:
    """Seconds and bytes of fusing and taking it back, and whether every bit is as before."""
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(file)
    gc.collect()
    held, start = resident(), time.process_time()
    pipe.fuse_lora()
    seconds, grown = time.process_time() - start, resident() - held
    start = time.process_time()
    pipe.unfuse_lora()
    back = time.process_time() - start
    pipe.unload_lora_weights()
    after = pipe.unet.state_dict()
    changed = sum(not torch.equal(before[name], after[name]) for name in before)
    return {"fuse_s": seconds, "unfuse_s": back, "fuse_grows_mb": grown / 1e6, "weights_changed_after": changed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipes = pipelines()
    for pipe in pipes.values():  # imports and caches
        once(pipe, arguments.file)
    times = {name: [] for name in pipes}
    for _ in range(arguments.rounds):
        for name, pipe in pipes.items():
            times[name].append(once(pipe, arguments.file))
    results = {}
    for name, pipe in pipes.items():
        gc.collect()
        held = resident()
        for _ in range(50):
            once(pipe, arguments.file)
        gc.collect()
        results[name] = {
            "load_s": statistics.median(load for load, _ in times[name]),
            "unload_s": statistics.median(unload for _, unload in times[name]),
            "grown_over_50_mb": (resident() - held) / 1e6,
            **fused(pipe, arguments.file),
        }
    print(f"{'':24}" + "".join(f"{name:>12}" for name in results))
    for key in results["sdedit"]:
        print(f"{key:24}" + "".join(f"{result[key]:12.4g}" for result in results.values()))
    packages = {name: version(name) for name in ("torch", "diffusers", "peft", "transformers", "safetensors")}
    machine = {"processor": platform.processor() or platform.machine(), "threads": 1, "load": os.getloadavg()[0]}
    RESULTS.parent.mkdir(exist_ok=True)
    record = {"file": arguments.file.name, "bytes": arguments.file.stat().st_size, "rounds": arguments.rounds}
    RESULTS.write_text(
        json.dumps({**record, "machine": machine, "packages": packages, "results": results}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
