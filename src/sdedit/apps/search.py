"""The strength that is just faithful enough: SDEdit's binary search (arXiv 2108.01073, section 3), several at a time.

Faithfulness falls as strength rises, so the largest strength that keeps to a bound is found by halving; a batch of n
candidates cuts what is left into n + 1 parts for the UNet calls of one picture. All candidates begin from the same
noise and take all steps (`exact_steps`), so strength is continuous and nothing else changes between them.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from sdedit.apps.measures import FAITHFULNESS
from sdedit.apps.sweep import Sweep
from sdedit.inputs import checks

# Says which of the pictures is best, counted from 0, told which it chose before; None if that one will do.
Choose = Callable[[Sweep, int | None], int | None]


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
            from 0, between whose neighbours the next round is drawn; or `None`, to end with the one chosen before.
        candidates: New pictures of each round, in one batch, at least 1.
        tolerance: Of strength; in (0, 1].
        generator: Its state is where the noise of each picture begins; it is not moved on.
        **settings: Further arguments of the pipeline, such as `num_inference_steps` and `guidance_scale`.

    `pipe.cancel()` ends the search: the result is the best of the rounds before.

    Raises:
        ValueError: An argument is not as described.

    Warns:
        Even strength 0, the guide through the VAE and back, falls short of the bound; that picture is then the result.
    """
    faithful = checks.number("faithful", faithful, 0, 1)
    tolerance = checks.number("tolerance", tolerance, 1e-6, 0.99)
    candidates = checks.whole_number("candidates", candidates, 1)
    if measure not in FAITHFULNESS:
        raise ValueError(f"measure={measure!r}; expected one of {', '.join(FAITHFULNESS)}")
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    calls = []

    def draw(strengths: list[float]) -> Sweep:
        swept: Sweep = pipe.sweep(image, prompt, strengths, generator, exact_steps=True, **settings)
        calls.append(pipe.num_timesteps * settings.get("repeats", 1))
        return swept

    def score(picture: Image.Image) -> float:
        return FAITHFULNESS[measure](picture, image)

    def last_faithful(shown: Sweep, _last: float | None) -> tuple[float, list[float]]:
        return _before_first_failure(shown.strengths, [score(one) >= faithful for one in shown.images])

    def chosen(shown: Sweep, last: float | None) -> tuple[float, list[float]]:
        return _chosen(shown, last, choose)  # type: ignore[arg-type]

    best, drawn = _narrow(
        draw, chosen if choose else last_faithful, candidates, tolerance, ended=lambda: bool(pipe.interrupt)
    )
    picture = drawn.images[drawn.strengths.index(best)]
    found = Found(picture, best, score(picture), sum(calls), drawn)
    if choose is None and found.faithfulness < faithful:
        warnings.warn(
            f"faithful={faithful:g}: even strength 0, the image through the VAE and back, reaches only "
            f"{found.faithfulness:.3f} by {measure}",
            stacklevel=2,
        )
    return found


def _narrow(
    draw: Callable[[list[float]], Sweep],
    judge: Callable[[Sweep, float | None], tuple[float, list[float]]],
    candidates: int,
    tolerance: float,
    ended: Callable[[], bool],
) -> tuple[float, Sweep]:
    """Draw ever closer candidates until the bracket is no wider than `tolerance`, or somebody cancels.

    Pictures of a round that was cancelled are half drawn, so they count only where there are no others.

    Args:
        judge: Gets the candidates within the bracket and the best strength so far; returns the best and the edges
            between which, and only there, to draw more.

    Returns:
        The best strength, and all that was drawn.
    """
    best: float | None = None
    edges, drawn = [0.0, 1.0], Sweep([], [], [], [])
    levels = [i / candidates for i in range(candidates + 1)]
    while True:
        more = draw(levels)
        if ended() and best is not None:
            return best, drawn
        drawn = drawn.merged(more)
        best, edges = judge(drawn.between(edges[0], edges[-1]), best)
        if ended() or edges[-1] - edges[0] <= tolerance + 1e-9:  # rounding must not cost a round
            return best, drawn
        levels = _spread(edges, candidates)


def _spread(edges: Sequence[float], count: int) -> list[float]:
    """`count` numbers between rising edges, such that the widest gap is as narrow as can be."""
    gaps = list(itertools.pairwise(edges))
    parts = [1] * len(gaps)
    for _ in range(count):
        widest = max(range(len(gaps)), key=lambda i: (gaps[i][1] - gaps[i][0]) / parts[i])
        parts[widest] += 1
    return [a + (b - a) * k / n for (a, b), n in zip(gaps, parts, strict=True) for k in range(1, n)]


def _before_first_failure(strengths: Sequence[float], kept: Sequence[bool]) -> tuple[float, list[float]]:
    """The last strength before the first that is not faithful, and these two as edges."""
    if all(kept) or not kept[0]:
        end = strengths[-1] if kept[0] else strengths[0]
        return end, [end]
    first = kept.index(False)
    return strengths[first - 1], [strengths[first - 1], strengths[first]]


def _chosen(shown: Sweep, last: float | None, choose: Choose) -> tuple[float, list[float]]:
    """The strength that was chosen, between its neighbours as edges; alone, if the search is to end."""
    answer = choose(shown, None if last is None else shown.strengths.index(last))
    if answer is None and last is not None:
        return last, [last]
    i = checks.whole_number("choose: its answer", answer, 0)
    if i >= len(shown.strengths):
        raise ValueError(f"choose: its answer {i}; expected 0 to {len(shown.strengths) - 1}")
    return shown.strengths[i], shown.strengths[max(i - 1, 0) : i + 2]
