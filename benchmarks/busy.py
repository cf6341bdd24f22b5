"""Four steps of the default model in bfloat16, alone and beside busy processes, by how long OpenMP's threads spin.

PyTorch's threads wait for each other by spinning. If another program has the core of one, the others spin in vain; with
a bound they go to sleep. Each value is tried in processes of its own, by turns. Run from the root of the repository:

    python benchmarks/busy.py

It prints a table, and writes benchmarks/results/busy.json. "Alone" is as alone as the machine is: the load is recorded.
On a machine with other work, `nice -n -20 python benchmarks/busy.py` puts it and its busy processes before that work.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "busy.json"
VALUES = ("none", "PASSIVE", "300", "3000", "30000", "300000")
BUSY = "while True: pass"
CALLS = """
import sys, time, torch
from PIL import Image
from sdedit import StableDiffusionImg2ImgPipeline
pipe = StableDiffusionImg2ImgPipeline.from_pretrained(torch_dtype=torch.bfloat16)
pipe.set_progress_bar_config(disable=True)
side = pipe.unet.config.sample_size * pipe.vae_scale_factor
image = Image.new("RGB", (side, side), "teal")
took, end = [], time.perf_counter() + float(sys.argv[1])
while len(took) < 3 or (time.perf_counter() < end and len(took) < 40):
    start = time.perf_counter()
    pipe("a cat", image, strength=1.0, num_inference_steps=4, guidance_scale=3.0)
    took.append(time.perf_counter() - start)
print(*took[1:])
"""


def environment(value: str) -> dict[str, str]:
    """The variables of a process in which threads spin so long."""
    own = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    usual = {name: kept for name, kept in os.environ.items() if name not in own}
    if value == "none":
        return usual
    return {**usual, **({"OMP_WAIT_POLICY": value} if value == "PASSIVE" else {"GOMP_SPINCOUNT": value})}


def calls(value: str, busy: int, seconds: float) -> list[float]:
    """Milliseconds of each call of a process, after its first, beside busy processes."""
    beside = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(busy)]
    try:
        command = [sys.executable, "-c", CALLS, str(seconds)]
        ran = subprocess.run(command, env=environment(value), check=True, stdout=subprocess.PIPE, text=True)
    finally:
        for process in beside:
            process.kill()
            process.wait()
    return [1000 * float(word) for word in ran.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4, help="of each process, at least three calls")
    parser.add_argument("--values", nargs="+", default=VALUES)
    parser.add_argument("--busy", type=int, default=2, help="processes beside it")
    options = parser.parse_args()
    taken = {value: {"alone": [], "beside": []} for value in options.values}
    loads = []
    for _ in range(options.rounds):
        for value, times in taken.items():
            loads.append(os.getloadavg()[0])
            times["alone"] += calls(value, 0, options.seconds)
            times["beside"] += calls(value, options.busy, options.seconds)
    results = {
        value: {f"{name}_ms": statistics.median(one) for name, one in times.items()}
        | {f"{name}_least_ms": min(one) for name, one in times.items()}
        for value, times in taken.items()
    }
    for value, result in results.items():
        print(f"{value:8} alone {result['alone_ms']:7.0f} ms  beside {options.busy}: {result['beside_ms']:7.0f} ms")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    record = {
        **{"rounds": options.rounds, "seconds": options.seconds, "busy": options.busy, "machine": machine},
        **{"load_before_each": [round(load, 1) for load in loads], "torch": version("torch"), "results": results},
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
