"""The most memory that each option of `sdedit.options` needs, each in its own process, at Stable Diffusion 1.5's size.

Weights are random, in bfloat16 and channels_last. What is measured is how far the process's memory grows above that of
the loaded networks, and the CPU time, while the VAE decodes or the UNet predicts; and the error against the plain way.
Run from the root of the repository:

    python benchmarks/memory.py

It prints a table, and writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "memory.json"

# Name, what runs, side in pixels, what is turned on.
CASES = (
    ("decode", 512, "plain"),
    ("decode", 1024, "plain"),
    ("decode", 1024, "tiling"),
    ("encode", 1024, "plain"),
    ("encode", 1024, "tiling"),
    ("unet", 512, "plain"),
    ("unet", 512, "attention slicing"),
    ("unet", 512, "fused projections"),
    ("unet", 512, "freeu"),
    ("unet", 512, "sequential offload"),
    ("decode 4", 256, "plain"),
    ("decode 4", 256, "slicing"),
)


def memory(name: str) -> int:
    return int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def network(what: str):
    """The UNet or the VAE, with the same random weights in every process."""
    import sdedit

    torch.manual_seed(0)
    if what == "unet":
        with torch.device("meta"):
            model = sdedit.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    else:
        types = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        with torch.device("meta"):
            model = sdedit.AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **types)
    model = model.to_empty(device="cpu").to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        values = torch.randn(parameter.shape, dtype=torch.bfloat16) / fan_in**0.5
        parameter.data = values if parameter.ndim > 1 else torch.full_like(values, float(name.endswith("weight")))
    return model.eval().to(memory_format=torch.channels_last)


def turn_on(model, option: str) -> None:
    if option == "attention slicing":
        model.set_attention_slice("auto")
    elif option == "fused projections":
        model.fuse_qkv_projections()
    elif option == "freeu":
        model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    elif option == "slicing":
        model.enable_slicing()
    elif option == "tiling":
        model.enable_tiling()
    elif option == "sequential offload":
        from sdedit.models.offload import Layers

        Layers([model], torch.device("cpu"))


def child(what: str, side: int, option: str, out: str) -> None:
    """Run one case, print what it took, and keep the result for comparison."""
    model = network(what)
    turn_on(model, option)
    latents = torch.randn(4 if what.endswith("4") else 1, 4, side // 8, side // 8, dtype=torch.bfloat16)
    text = torch.randn(1, 77, 768, dtype=torch.bfloat16)

    pixels = torch.rand(1, 3, side, side, dtype=torch.bfloat16)

    def run(x):
        if what == "encode":
            return model.encode(pixels[..., : 8 * x.shape[2], : 8 * x.shape[3]]).latent_dist.mean
        return model(x, 500, text).sample if what == "unet" else model.decode(x).sample

    with torch.no_grad():
        run(latents[:1, :, :16, :16])  # libraries set themselves up
        Path("/proc/self/clear_refs").write_text("5")  # the highest peak begins here
        before, start = memory("VmRSS"), time.process_time()
        result = run(latents)
    figures = {"grows_mb": (memory("VmHWM") - before) / 1e6, "cpu_seconds": time.process_time() - start}
    torch.save(result, out)
    print(json.dumps({**figures, "networks_mb": sum(p.numel() * 2 for p in model.parameters()) / 1e6}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=4)
    parser.add_argument("--only", help='measure one network again, such as "encode"; the other results stay')
    arguments = parser.parse_args()
    if arguments.child:
        what, side, option, out = arguments.child
        child(what, int(side), option, out)
        return
    cases = [case for case in CASES if arguments.only in (None, case[0])]
    kept = json.loads(RESULTS.read_text())["results"] if arguments.only else []
    results, plain = [found for found in kept if found["what"] != arguments.only], {}
    with tempfile.TemporaryDirectory() as folder:
        for what, side, option in cases:
            out = Path(folder) / "out.pt"
            command = [sys.executable, __file__, "--child", what, str(side), option, str(out)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures, result = json.loads(printed.splitlines()[-1]), torch.load(out).float()
            expected = plain.setdefault((what, side), result)
            error = (result - expected).square().mean()
            signal = torch.tensor(4.0) if what.startswith("decode") else expected.square().mean()  # pixels span 2
            figures["psnr_db"] = None if option == "plain" else float(10 * torch.log10(signal / error.clamp(min=1e-12)))
            results.append({"what": what, "side": side, "option": option, **figures})
            print(
                f"{what:9} {side:5} {option:20} {figures['grows_mb']:7.0f} MB {figures['cpu_seconds']:7.1f} s",
                figures["psnr_db"],
            )
    packages = {name: version(name) for name in ("torch", "accelerate")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    RESULTS.write_text(json.dumps({"machine": machine, "packages": packages, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
