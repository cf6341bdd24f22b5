"""What a training run shows of itself: the curve of its loss, and pictures that the model draws as it learns."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sdedit.apps.finetune.settings import Settings
from sdedit.apps.folders import Example
from sdedit.apps.sheets import contact_sheet
from sdedit.files import write_atomically
from sdedit.noise import seeded


@dataclass(frozen=True)
class Samples:
    """Which pictures to draw as it goes.

    Attributes:
        prompts: None draws the captions of the first four pictures that differ; an empty list draws nothing.
        images: One for all prompts, or one for each; without any, pictures come from the words alone.
        strength: How far from the images; without any it is 1.
        guidance, steps, seed: As for a call of the pipeline.
    """

    prompts: Sequence[str] | None = None
    images: Sequence[Image.Image] = ()
    strength: float = 0.7
    guidance: float = 7.5
    steps: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompts and len(self.images) not in (0, 1, len(self.prompts)):
            raise ValueError(
                f"samples: {len(self.images)} images for {len(self.prompts)} prompts; expected none, one, or as many"
            )

    def draw(self, pipe: Any, examples: Sequence[Example], size: int, path: Path) -> None:
        """Draw them on one sheet, each always from the same noise."""
        prompts = self.prompts
        if prompts is None:
            prompts = list(dict.fromkeys(example.caption for example in examples))[:4]
        if not prompts:
            return
        grey = Image.new("RGB", (size, size), (128, 128, 128))
        images = [image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS) for image in self.images]
        images = images * len(prompts) if len(images) == 1 else images
        bar, pipe._progress_bar_config = pipe._progress_bar_config, {"disable": True}
        try:
            drawn = [
                pipe(
                    prompt,
                    image,
                    strength=self.strength if self.images else 1.0,
                    num_inference_steps=self.steps,
                    guidance_scale=self.guidance,
                    generator=seeded(self.seed),
                ).images[0]
                for prompt, image in zip(prompts, images or [grey] * len(prompts), strict=True)
            ]
        finally:
            pipe._progress_bar_config = bar
        labels = [f"{prompt[:24]}…" if len(prompt) > 25 else prompt for prompt in prompts]
        with write_atomically(path) as temporary:
            contact_sheet(drawn, labels, columns=min(len(drawn), 4)).save(temporary)


def plot_losses(losses: Sequence[float], settings: Settings, path: Path) -> None:
    """The loss of every update, its running mean, and the learning rate below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    updates = np.arange(1, len(losses) + 1)
    top.plot(updates, losses, color="0.8", linewidth=0.8, label="each update")
    top.plot(updates, running_mean(losses), color="tab:blue", label="running mean")
    top.set_ylabel("loss")
    top.legend(frameon=False)
    below.plot(updates, [settings.learning_rate_at(n) for n in range(len(losses))], color="tab:orange")
    below.set_ylabel("learning rate")
    below.set_xlabel("update")
    for axes in (top, below):
        axes.spines[["top", "right"]].set_visible(False)
    with write_atomically(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a font without some letter changes nothing of the curve
        figure.savefig(temporary, dpi=110)


def running_mean(values: Sequence[float], memory: int = 20) -> list[float]:
    """Mean of about the last `memory` values at each place, older ones counting ever less; of all at the beginning."""
    means: list[float] = []
    for n, value in enumerate(values):
        part = max(1 / (n + 1), 1 / memory)
        means.append(value if not means else means[-1] + part * (value - means[-1]))
    return means
