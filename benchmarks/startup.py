"""From nothing to a picture: `sdedit run` as a process against a five-line diffusers script, and `import sdedit` alone.

Both draw the same picture with the package's default model: same steps, strength, guidance and size. Processes
alternate, and medians are reported. Run from the root of the repository:

    python benchmarks/startup.py

It prints a table, and writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results" / "startup.json"

DIFFUSERS = """
import torch
from PIL import Image
from diffusers import StableDiffusionImg2ImgPipeline
pipe = StableDiffusionImg2ImgPipeline.from_pretrained({model!r}, safety_checker=None)
picture = pipe("red apple, 3d", image=Image.open({image!r}), strength=0.65, num_inference_steps=20, guidance_scale=3.0)
picture.images[0].save({out!r})
"""
LIBRARY = DIFFUSERS.replace("from diffusers", "from sdedit")
COMMAND = "from sdedit.commands.cli import main; main()"


def processes(folder: Path) -> dict[str, list[str]]:
    """The command lines that are compared."""
    from PIL import Image

    image = folder / "in.png"
    Image.open(ROOT / "examples" / "apple.png").convert("RGB").resize((256, 256)).save(image)
    names = {"model": str(ROOT / "src" / "sdedit" / "default_model"), "image": str(image)}
    run = ["run", str(image), "red apple, 3d", "-o", str(folder / "c.png"), "--size", "original", "--seed", "0"]
    return {
        "diffusers, script": [sys.executable, "-c", DIFFUSERS.format(**names, out=str(folder / "a.png"))],
        "sdedit, the same script": [sys.executable, "-c", LIBRARY.format(**names, out=str(folder / "b.png"))],
        "sdedit run": [sys.executable, "-c", COMMAND, *run],
        "import sdedit": [sys.executable, "-c", "import sdedit"],
        "nothing": [sys.executable, "-c", "pass"],
    }


def once(command: list[str]) -> tuple[float, float]:
    """Seconds until the process is done, and seconds of its CPU."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peak(command: list[str]) -> float:
    """The most memory of a process, in MB."""
    code = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000)"
    return float(subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        commands = processes(Path(folder))
        peaks = {name: peak(command) for name, command in commands.items()}  # files come into the cache, too
        times = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                times[name].append(once(command))
    results = {
        name: {
            "wall_s": statistics.median(wall for wall, _ in taken),
            "cpu_s": statistics.median(cpu for _, cpu in taken),
            "peak_mb": peaks[name],
        }
        for name, taken in times.items()
    }
    for name, result in results.items():
        print(f"{name:24} {result['wall_s']:6.2f} s  {result['cpu_s']:6.2f} s of CPU  {result['peak_mb']:5.0f} MB")
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    record = {"rounds": rounds, "machine": machine, "packages": packages, "results": results}
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
