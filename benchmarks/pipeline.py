"""sdedit beside diffusers at the size of SD 1.5, with random weights, 512×512, in turn: a UNet step, the VAE, calls.

    python benchmarks/pipeline.py                            on the CPU, in bfloat16, batch 1
    python benchmarks/pipeline.py --device cuda --dtype float16 --batch 1 8

Both sides hold the same weights, get the same latents and texts, and take turns; times are medians over the rounds, on
a GPU by device events. Results are saved after each part as benchmarks/results/pipeline-DEVICE.json; `--plot` draws
docs/performance.png from that of the CPU and measures nothing.

Parts: `unet` (one step with guidance), `vae`, `call` (10 steps at strength 0.8), `turbo` (that call at each level),
`compiled` (the step, both sides compiled: sdedit by `pipe.compile()`, diffusers by torch.compile, on the CPU frozen, on
a GPU with CUDA graphs), `xformers` and `openvino` (the step, where they are installed). `--small` tries the script out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import sdedit
from sdedit.models.fast.full_speed import one_run
from sdedit.schedulers import make_scheduler

PARTS = ("unet", "vae", "call", "turbo", "compiled", "xformers", "openvino")
RESULTS = Path(__file__).parent / "results"
UNET = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
SMALL = {"block_out_channels": (32, 64, 64, 64)}
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "skip_prk_steps": True,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


class Pair:
    """The two pipelines with the same weights, and what they are given."""

    def __init__(self, device: str, dtype: torch.dtype, batch: int, small: bool) -> None:
        torch.manual_seed(0)
        self.device, self.dtype, self.batch, self.side = device, dtype, batch, 64 if small else 512
        unet, vae = UNET | (SMALL if small else {}), VAE | (SMALL if small else {})
        torch.set_default_dtype(dtype)
        theirs = {"unet": diffusers.UNet2DConditionModel(**unet), "vae": diffusers.AutoencoderKL(**vae)}
        torch.set_default_dtype(torch.float32)
        with torch.device("meta"):
            ours = {"unet": sdedit.UNet2DConditionModel.from_config(unet), "vae": sdedit.AutoencoderKL.from_config(vae)}
        for name, network in theirs.items():
            network.to(device).eval().requires_grad_(False)
            ours[name].eval().load_state_dict(network.state_dict(), assign=True)
        none: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
        self.theirs = diffusers.StableDiffusionImg2ImgPipeline(
            **theirs, **none, scheduler=diffusers.PNDMScheduler(**SCHEDULE), requires_safety_checker=False
        )
        self.ours = sdedit.StableDiffusionImg2ImgPipeline(
            **ours, **none, scheduler=make_scheduler("pndm", self.theirs.scheduler.config)
        )
        for pipe in (self.theirs, self.ours):
            pipe.set_progress_bar_config(disable=True)
        self.latents = torch.randn(batch, 4, self.side // 8, self.side // 8).to(device, dtype)
        self.texts = torch.randn(2 * batch, 77, 768).to(device, dtype)
        self.time = torch.tensor(500, device=device)
        self.image = torch.rand(batch, 3, self.side, self.side)

    def their_step(self, unet: Any = None) -> Tensor:
        """A guided step's prediction, (2·batch, 4, h, w)."""
        return (self.theirs.unet if unet is None else unet)(torch.cat([self.latents] * 2), self.time, self.texts).sample

    def our_step(self) -> Tensor:
        """The same by sdedit, which is told that both halves are the same; a step of a run, see `in_turn`."""
        return self.ours.unet(self.latents, self.time, self.texts).sample

    def call(self, pipe: Any) -> Tensor:
        """A whole call's pictures."""
        settings = {"strength": 0.8, "num_inference_steps": 10, "guidance_scale": 7.5, "output_type": "pt"}
        embeds = dict(zip(("negative_prompt_embeds", "prompt_embeds"), self.texts.chunk(2), strict=True))
        return pipe(image=self.image, generator=torch.Generator().manual_seed(0), **embeds, **settings).images


@torch.no_grad()
def seconds(device: str, run: Callable[[], Any]) -> float:
    """How long it takes, by device events on a GPU."""
    if device == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def in_turn(pair: Pair, rounds: int, warm: int = 1, **runs: Callable[[], Any]) -> dict[str, Any]:
    """Medians of each, and their ratios to the first. UNet steps belong to one run, as in a call of the pipeline."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    with one_run(pair.ours.unet):
        for i in range(warm + rounds):
            for name, run in runs.items():
                taken = seconds(pair.device, run)
                if i >= warm:
                    times[name].append(taken)
    found: dict[str, Any] = {name: statistics.median(t) for name, t in times.items()}
    first = next(iter(runs))
    return found | {"ratio": {n: found[n] / found[first] for n in runs if n != first}, "all": times}


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels, of pictures in [0, 1]."""
    return float(-10 * ((a.float() - b.float()) ** 2).mean().log10())


def error(a: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference, as a part of the exact answer's."""
    return float((a.float() - exact.float()).norm() / exact.float().norm())


@torch.no_grad()
def unet(pair: Pair, rounds: int) -> dict[str, Any]:
    found = in_turn(pair, rounds, diffusers=pair.their_step, sdedit=pair.our_step)
    theirs, ours = pair.their_step(), pair.our_step()
    # Float32 on the same, rounded, weights and inputs says what is rounding.
    networks, given = (pair.theirs.unet, pair.ours.unet), (pair.latents, pair.texts)
    pair.latents, pair.texts = (x.float() for x in given)
    exact = networks[0].float()(torch.cat([pair.latents] * 2), pair.time, pair.texts).sample
    networks[0].to(pair.dtype)
    pair.latents, pair.texts = given
    return found | {"error of diffusers": error(theirs, exact), "error of sdedit": error(ours, exact)}


def vae(pair: Pair, rounds: int) -> dict[str, Any]:
    pixels = pair.image.to(pair.device, pair.dtype)
    parts = {"diffusers": pair.theirs.vae, "sdedit": pair.ours.vae}
    encode = in_turn(pair, rounds, **{n: lambda v=v: v.encode(pixels) for n, v in parts.items()})
    decode = in_turn(pair, rounds, **{n: lambda v=v: v.decode(pair.latents) for n, v in parts.items()})
    return {"encode": encode, "decode": decode}


def call(pair: Pair, rounds: int) -> dict[str, Any]:
    pictures: dict[str, Tensor] = {}
    pipes = {"diffusers": pair.theirs, "sdedit": pair.ours}
    runs = {n: lambda n=n, p=p: pictures.update({n: pair.call(p)}) for n, p in pipes.items()}
    found = in_turn(pair, rounds, warm=0 if pair.device == "cpu" else 1, **runs)
    return found | {"psnr": psnr(pictures["diffusers"], pictures["sdedit"])}


def turbo(pair: Pair, rounds: int) -> dict[str, Any]:
    pictures: dict[str, Tensor] = {}

    def run(level: int) -> None:
        if level:
            pair.ours.enable_turbo(level)
        pictures[f"level {level}"] = pair.call(pair.ours)
        pair.ours.disable_turbo()

    found = in_turn(pair, rounds, warm=0, **{f"level {i}": lambda i=i: run(i) for i in range(4)})
    exact = pictures["level 0"]
    return (
        found
        | {name: {"psnr": psnr(p, exact), "l2": error(p, exact)} for name, p in pictures.items()}
        | {"seconds": {name: found[name] for name in pictures}}
    )


def compiled(pair: Pair, rounds: int) -> dict[str, Any]:
    import torch._inductor.config as inductor

    mode = "default" if pair.device == "cpu" else "reduce-overhead"  # CUDA graphs
    theirs = torch.compile(pair.theirs.unet, mode=mode)
    pair.ours.compile()
    runs = {"diffusers": lambda: pair.their_step(theirs), "sdedit": pair.our_step}
    first = {}
    for name, run in runs.items():
        inductor.freezing = pair.device == "cpu" and name == "diffusers"  # sdedit packs its weights itself
        first[name] = seconds(pair.device, run)
    return in_turn(pair, rounds, **runs) | {"first call": first}


def xformers(pair: Pair, rounds: int) -> dict[str, Any]:
    try:
        for pipe in (pair.theirs, pair.ours):
            pipe.enable_xformers_memory_efficient_attention()
    except (ImportError, ValueError) as reason:
        return {"not run": str(reason)}
    return in_turn(pair, rounds, diffusers=pair.their_step, sdedit=pair.our_step)


def openvino(pair: Pair, rounds: int) -> dict[str, Any]:
    """The step by OpenVINO in bfloat16, made from diffusers' UNet, beside sdedit as `pipe.compile()` leaves it."""
    try:
        from openvino import Core, convert_model
    except ImportError as reason:
        return {"not run": str(reason)}

    class Step(torch.nn.Module):
        def __init__(self, unet: Any) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, latents: Tensor, time: Tensor, texts: Tensor) -> Tensor:
            return self.unet(latents, time, texts, return_dict=False)[0]

    given = (torch.cat([pair.latents] * 2).float(), pair.time, pair.texts.float())
    began = time.perf_counter()
    with torch.no_grad():
        graph = convert_model(Step(pair.theirs.unet.float()), example_input=given)
    pair.theirs.unet.to(pair.dtype)
    graph.reshape({i: list(value.shape) for i, value in enumerate(given)})
    model = Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"})
    made = time.perf_counter() - began
    inputs = [value.numpy() for value in given]
    pair.ours.compile()
    found = in_turn(pair, rounds, openvino=lambda: model(inputs), sdedit=pair.our_step)
    difference = error(torch.from_numpy(model(inputs)[0]), pair.our_step())
    return found | {"difference": difference, "seconds to convert": made}


def plot() -> None:
    """Bars of seconds, ours beside theirs."""
    import matplotlib.pyplot as plt

    found = json.loads((RESULTS / "pipeline-cpu.json").read_text())["batch 1"]
    shown = {
        "UNet step": found.get("unet"),
        "UNet step,\ncompiled": found.get("compiled"),
        "VAE encode": found.get("vae", {}).get("encode"),
        "VAE decode": found.get("vae", {}).get("decode"),
        "whole call": found.get("call"),
    }
    shown = {name: times for name, times in shown.items() if times}
    figure, axes = plt.subplots(1, len(shown), figsize=(2.2 * len(shown), 2.8), layout="constrained")
    for axis, (name, times) in zip(axes, shown.items(), strict=True):
        axis.bar(["diffusers", "sdedit"], [times["diffusers"], times["sdedit"]], color=["0.7", "tab:blue"])
        axis.set_title(name, fontsize=9)
        axis.set_ylabel("seconds")
    figure.savefig(Path(__file__).parents[1] / "docs" / "performance.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--plot", action="store_true")
    chosen = parser.parse_args()
    if chosen.plot:
        return plot()
    path = RESULTS / f"pipeline-{chosen.device}{'-small' if chosen.small else ''}.json"
    saved: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    name = torch.cuda.get_device_name() if chosen.device == "cuda" else torch.cpu.get_capabilities().get("cpu_name")
    saved |= {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    for batch in chosen.batch:
        pair = Pair(chosen.device, getattr(torch, chosen.dtype), batch, chosen.small)
        of_batch = saved.setdefault(f"batch {batch}", {})
        for part in chosen.parts:
            of_batch[part] = globals()[part](pair, chosen.rounds) | {"dtype": chosen.dtype}
            path.write_text(json.dumps(saved, indent=2) + "\n")
            print(part, json.dumps({k: v for k, v in of_batch[part].items() if k != "all"}), flush=True)
    return None


if __name__ == "__main__":
    main()
