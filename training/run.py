"""The whole recipe, from nothing to the folder in the package; stop it at any time and start it again.

    python training/run.py

A step whose result is there is not done again; the trainings go on from their checkpoints to their number of steps.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

from model import growing, set_start, start_folder
from paths import HERE, work_folder


def run(script: str, *options: str) -> None:
    print(f"== {script} {' '.join(options)}", flush=True)
    subprocess.run([sys.executable, str(HERE / script), *options], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, help="a model folder to begin with, such as src/sdedit/default_model")
    parser.add_argument("--vae-steps", type=int, default=12000, help="0: keep the start's")
    parser.add_argument("--unet-steps", type=int, default=40000)
    parser.add_argument("--decoder-only", action="store_true", help="of the VAE: the start's UNet stays right")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = ("--device", args.device)
    if args.start and not start_folder():
        set_start(args.start)
    if not (work_folder() / "items.json").exists():
        run("data.py")
    if growing():
        run("grow.py", *device)
    elif args.vae_steps:
        run("train_vae.py", "--steps", str(args.vae_steps), *["--decoder-only"] * args.decoder_only, *device)
    if not (work_folder() / "latents.json").exists():
        run("latents.py", *device)
    run("train_unet.py", "--steps", str(args.unet_steps), *device)
    run("train_tiny.py", *device)
    run("export.py")
    run("evaluate.py", *device)


if __name__ == "__main__":
    main()
