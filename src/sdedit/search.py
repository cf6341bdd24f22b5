"""The strength that is just faithful enough: SDEdit's binary search (arXiv 2108.01073, section 3), several at a time.

Faithfulness falls as strength rises, so the largest strength that keeps to a bound is found by halving; a batch of n
candidates cuts what is left into n + 1 parts for the UNet calls of one picture. All candidates begin from the same noise
and take all steps (`exact_steps`), so strength is continuous and nothing else changes between them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from sdedit import checks
from sdedit.measures import FAITHFULNESS
from sdedit.sweep import Sweep

# Which of the pictures shown, counted from 0; told which was chosen last, if it was shown before.
Choose = Callable[[Sweep, int | None], int]


@dataclass
class Found:
    """What a search found.

    Attributes:
        image: The picture.
        strength: What it was drawn with, with `exact_steps`.
        faithfulness: By the measure of the search, 1 is the guide itself.
        unet_calls: Of the whole search; each was for a batch of candidates.
        drawn: All candidates, at rising strengths.
    """

    image: Image.Image
    strength: float
    faithfulness: float
    unet_calls: int
    drawn: Sweep


def search(
    pipe: Any,
    image: Image.Image,
    prompt: str,
    faithful: float = 0.9,
    *,
    measure: str = "l2",
    choose: Choose | None = None,
    candidates: int = 4,
    tolerance: float = 0.01,
    generator: torch.Generator | None = None,
    **settings: Any,
) -> Found:
    """Find the largest strength whose picture is still faithful, or the one that somebody chooses.

    The first round draws strengths 0, 1/n, …, 1; each later one divides what lies between the last faithful candidate
    and the first that is not, until that is no wider than `tolerance`: three rounds with the defaults.

    Args:
        pipe: The pipeline.
        image: A PIL image, the guide.
        faithful: The bound. By "l2": 1 - L2/443.4, where L2 is SDEdit's measure (see `l2_distance`); 0.9 allows a root
            mean square difference of a tenth of the range from black to white. By "ssim": structural similarity.
        measure: "l2" or "ssim".
        choose: Asked instead of the measure: called as `choose(sweep, last)` with the candidates of each round and
            the number of the one chosen before (`None` in the first round), it returns the number of the best, counted
            from 0. The next round is drawn around it; the same one again ends the search.
        candidates: New pictures of each round, in one batch, at least 1.
        tolerance: Of strength; in (0, 1].
        generator: Its state is where the noise of each picture begins; it is not moved on.
        **settings: Further arguments of the pipeline, such as `num_inference_steps` and `guidance_scale`.

    Raises:
        ValueError: An argument is not as described.

    Warns:
        Even strength 0, the guide through the VAE and back, falls short of the bound; that picture is then the result.
    """
    faithful = checks.number("faithful", faithful, 0, 1)
    tolerance = checks.number("tolerance", tolerance, 1e-6, 1)
    candidates = checks.whole_number("candidates", candidates, 1)
    if measure not in FAITHFULNESS:
        raise ValueError(f"measure={measure!r}; expected one of {', '.join(FAITHFULNESS)}")
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    scores: dict[float, float] = {}
    drawn, calls, best = Sweep([], [], [], []), 0, 0.0
    low, high = 0.0, 1.0
    levels = [i / candidates for i in range(candidates + 1)]
    while True:
        swept = pipe.sweep(image, prompt, levels, generator, exact_steps=True, **settings)
        calls += pipe.num_timesteps
        scores |= {s: FAITHFULNESS[measure](one, image) for s, one in zip(levels, swept.images, strict=True)}
        drawn = drawn.merged(swept)
        shown = drawn.between(low, high)
        if choose is None:
            best, low, high = _last_faithful(shown.strengths, [scores[s] >= faithful for s in shown.strengths])
        else:
            best, low, high = _chosen(shown, best if calls > pipe.num_timesteps else None, choose)
        if high - low <= tolerance:
            break
        levels = [low + (high - low) * (i + 1) / (candidates + 1) for i in range(candidates)]
    if choose is None and scores[best] < faithful:
        warnings.warn(
            f"faithful={faithful:g}: even strength 0, the image through the VAE and back, reaches only "
            f"{scores[best]:.3f} by {measure}",
            stacklevel=2,
        )
    return Found(drawn.images[drawn.strengths.index(best)], best, scores[best], calls, drawn)


def _last_faithful(strengths: Sequence[float], kept: Sequence[bool]) -> tuple[float, float, float]:
    """The strength before the first that is not faithful (or the first of all), and the bracket from the one to the other."""
    first = next((i for i, ok in enumerate(kept) if not ok), len(kept))
    last = max(first - 1, 0)
    return strengths[last], strengths[last], strengths[min(first, len(strengths) - 1)] if first else strengths[0]


def _chosen(shown: Sweep, last: float | None, choose: Choose) -> tuple[float, float, float]:
    """The strength that was chosen, and the bracket between its neighbours; an empty one if it is the same again."""
    before = None if last is None else shown.strengths.index(last)
    i = checks.whole_number("choose: its answer", choose(shown, before), 0)
    if i >= len(shown.strengths):
        raise ValueError(f"choose: its answer {i}; expected 0 to {len(shown.strengths) - 1}")
    best = shown.strengths[i]
    if i == before:
        return best, best, best
    return best, shown.strengths[max(i - 1, 0)], shown.strengths[min(i + 1, len(shown.strengths) - 1)]
