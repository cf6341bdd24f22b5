"""The way of one image, each stage as it looks: `python docs/make_way.py` writes docs/way.png."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch

from sdedit import StableDiffusionImg2ImgPipeline, framed, open_image

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parent.parent
STRENGTH, STEPS = 0.65, 20
STAGES = [
    ("1. read", "inputs/", "pixels (B, 3, H, W) in [-1, 1]\nprompt embeds (B, M, C)"),
    ("2. encode", "models/vae.py", "latents (B, C, H/f, W/f)"),
    ("3. noise", "noise.py, schedulers/", f"noisy latents,\nto the level of strength {STRENGTH}"),
    ("4. denoise", "models/unet.py, schedulers/rows.py", "latents, a UNet call\nand a row of numbers a step"),
    ("5. decode", "models/vae.py, safety.py", "a picture of the input's size"),
]


def shown(latents: torch.Tensor) -> Any:
    """Three of the latent channels (C, h, w) as colours (h, w, 3)."""
    three = latents[:3].float()
    return ((three / three.abs().amax() / 2 + 0.5).clamp(0, 1)).permute(1, 2, 0).numpy()


def main() -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    doodle = framed(open_image(ROOT / "examples" / "apple.png")).resize((side, side))
    seen = []

    def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"][0])
        return {}

    common = {"prompt": "red apple, 3d", "image": doodle, "guidance_scale": 3, "num_inference_steps": STEPS}
    clean = pipe(**common, strength=0, output_type="latent").images[0]
    generator = torch.Generator().manual_seed(0)
    picture = pipe(**common, strength=STRENGTH, generator=generator, callback_on_step_end=keep).images[0]
    noise = torch.randn((1, *clean.shape), generator=generator.manual_seed(0))
    kept = pipe.scheduler.alphas_cumprod[int(STRENGTH * len(pipe.scheduler.alphas_cumprod)) - 1]
    noisy = kept**0.5 * clean + (1 - kept) ** 0.5 * noise[0]
    stages = [doodle, shown(clean), shown(noisy), shown(seen[len(seen) // 2]), picture]

    figure, axes = plt.subplots(1, len(stages), figsize=(13, 4))
    for i, (axis, stage, (name, room, out)) in enumerate(zip(axes, stages, STAGES, strict=True)):
        axis.imshow(stage, interpolation="nearest")
        axis.set_title(f"{name}\n", fontweight="bold", fontsize=13)
        axis.text(0.5, 1.04, room, transform=axis.transAxes, ha="center", color="#4a6fa5", fontsize=9)
        axis.set_xlabel(out, fontsize=9.5)
        axis.set_xticks([])
        axis.set_yticks([])
        if i:
            axis.annotate("", (-0.03, 0.5), (-0.17, 0.5), "axes fraction", arrowprops={"arrowstyle": "->"})
    figure.suptitle("pipeline.py, from top to bottom", fontsize=13)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "way.png", dpi=90)


if __name__ == "__main__":
    main()
