"""The whole recipe, from nothing to the folder in the package; stop it at any time and start it again.

    python training/run.py --vae-minutes 35 --unet-minutes 240

A step whose result is there is not done again; the trainings go on from their checkpoints until their budget is spent.
"""

import argparse
import subprocess
import sys

from paths import HERE, work_folder


def run(script: str, *options: str) -> None:
    print(f"== {script} {' '.join(options)}", flush=True)
    subprocess.run([sys.executable, str(HERE / script), *options], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae-minutes", type=float, default=35)
    parser.add_argument("--unet-minutes", type=float, default=240)
    args = parser.parse_args()
    folder = work_folder()
    if not (folder / "items.json").exists():
        run("data.py")
    if not (folder / "vae" / "diffusion_pytorch_model.safetensors").exists():
        run("train_vae.py", "--minutes", str(args.vae_minutes))
    if not (folder / "latents.json").exists():
        run("latents.py")
    run("train_unet.py", "--minutes", str(args.unet_minutes))
    run("export.py")


if __name__ == "__main__":
    main()
