"""One picture at several strengths, in one batch: where between faithful and real does one want to be?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdedit.apps.measures import l2_distance
from sdedit.apps.sheets import contact_sheet
from sdedit.files import write_atomically

STRENGTHS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass
class Sweep:
    """Pictures of one image at rising strengths.

    Attributes:
        images: One a strength.
        strengths: In [0, 1].
        steps: Steps that ran for each.
        distances: L2 from the guide, as SDEdit measures faithfulness (see `l2_distance`): small is faithful.
    """

    images: list[Image.Image]
    strengths: list[float]
    steps: list[int]
    distances: list[float]

    def merged(self, other: Sweep) -> Sweep:
        """The pictures of both, at rising strengths."""
        return self._of(sorted([*self._rows(), *other._rows()], key=lambda row: row[1]))

    def between(self, low: float, high: float) -> Sweep:
        """The pictures of strengths from `low` to `high`."""
        return self._of([row for row in self._rows() if low <= row[1] <= high])

    def _rows(self) -> list[tuple[Image.Image, float, int, float]]:
        return list(zip(self.images, self.strengths, self.steps, self.distances, strict=True))

    @classmethod
    def _of(cls, rows: Sequence[tuple[Image.Image, float, int, float]]) -> Sweep:
        return cls(*(list(column) for column in zip(*rows, strict=True)))

    def sheet(self, columns: int | None = None) -> Image.Image:
        """All pictures on one page, each with its strength and distance."""
        pairs = zip(self.strengths, self.distances, strict=True)
        return contact_sheet(self.images, [f"strength {s:g}\nL2 {d:.1f}" for s, d in pairs], columns)

    def save(self, path: str | os.PathLike[str], seconds: float = 0.6) -> None:
        """Write the sheet, or an animation of `seconds` a picture where the name ends in .gif or .webp."""
        path = Path(path)
        frames = [image.convert("RGB") for image in self.images]
        with write_atomically(path) as temporary:
            if path.suffix.lower() in (".gif", ".webp"):
                duration = round(1000 * seconds)
                frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=duration, loop=0)
            else:
                self.sheet().save(temporary)


def sweep(
    pipe: Any,
    image: Image.Image,
    prompt: str,
    strengths: Sequence[float] | None = None,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Sweep:
    """Draw `image` at each of `strengths`, all from the same noise, in one batch.

    Args:
        pipe: The pipeline.
        image: A PIL image.
        strengths: In [0, 1]; `STRENGTHS` if not given.
        generator: Its state is where the noise of each picture begins; it is not moved on.
        **settings: Further arguments of the pipeline, such as `num_inference_steps` and `guidance_scale`.
    """
    if not isinstance(image, Image.Image) or not isinstance(prompt, str):
        raise ValueError("sweep: expected one PIL image and one prompt")
    strengths = STRENGTHS if strengths is None else strengths
    if not strengths:
        raise ValueError("strengths: none; expected at least one number from 0 to 1")
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    generators = [torch.Generator(generator.device).set_state(generator.get_state()) for _ in strengths]
    out = pipe(prompt, image, strength=list(strengths), generator=generators, **{**settings, "output_type": "pil"})
    steps = out.steps * (len(strengths) // len(out.steps))
    return Sweep(out.images, list(strengths), steps, [l2_distance(one, image) for one in out.images])
