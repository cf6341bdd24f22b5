"""The search on strength: on a pipeline whose faithfulness is known in closed form, and on real networks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import picture
from sdedit.apps.measures import FAITHFULNESS, l2_faithfulness, ssim
from sdedit.apps.search import search
from sdedit.apps.sweep import Sweep

BLACK = Image.new("RGB", (16, 16))


class Known:
    """A pipeline that makes of black, at each strength, a flat grey of a known level; strength 0 is grey too."""

    interrupt = False

    def __init__(self, level: Any) -> None:
        self.level, self.batches, self.num_timesteps = level, [], 0

    def sweep(
        self, image: Image.Image, prompt: str, strengths: list[float], generator: torch.Generator, **given: Any
    ) -> Sweep:
        assert given.pop("exact_steps") is True
        self.batches.append(list(strengths))
        self.num_timesteps = given["num_inference_steps"]
        pictures = [Image.new("RGB", (16, 16), (round(255 * self.level(s)),) * 3) for s in strengths]
        return Sweep(pictures, list(strengths), [10] * len(strengths), [0.0] * len(strengths))


@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 0.98), st.floats(0.2, 3), st.integers(1, 9), st.sampled_from([0.3, 0.1, 0.01]))
def test_the_bound_is_found(bound: float, power: float, candidates: int, tolerance: float) -> None:
    """A grey of level s^p on black has L2 faithfulness 1 - s^p, up to half a grey level."""
    pipe = Known(lambda s: s**power)
    found = search(
        pipe, BLACK, "", bound, candidates=candidates, tolerance=tolerance, generator=None, num_inference_steps=10
    )
    lowest, highest = ((max(1 - bound + slack, 0)) ** (1 / power) for slack in (-1 / 255, 1 / 255))
    assert lowest - tolerance - 1e-9 <= found.strength <= highest + 1e-9
    assert found.faithfulness == l2_faithfulness(found.image, BLACK) >= bound - 1e-9
    # Every round divides the bracket by n + 1, but the first, which has its ends in its batch.
    rounds = 1 + max(math.ceil(math.log(1 / candidates / tolerance, candidates + 1) - 1e-9), 0)
    assert len(pipe.batches) <= rounds and found.unet_calls == 10 * len(pipe.batches)
    assert [len(batch) for batch in pipe.batches] == [candidates + 1] + [candidates] * (len(pipe.batches) - 1)
    assert found.drawn.strengths == sorted({s for batch in pipe.batches for s in batch})


def test_the_ends() -> None:
    everything = search(Known(lambda s: 0.05 * s), BLACK, "", 0.9, num_inference_steps=1)
    assert everything.strength == 1 and everything.faithfulness == pytest.approx(0.95, abs=2e-3)
    with pytest.warns(UserWarning, match="even strength 0, the image through the VAE and back, reaches only 0.8"):
        nothing = search(Known(lambda s: 0.2 + s / 2), BLACK, "", 0.9, num_inference_steps=1)
    assert nothing.strength == 0


def test_what_is_not_monotone_is_taken_up_to_its_first_failure() -> None:
    found = search(Known(lambda s: 0.5 if 0.3 < s < 0.6 else 0.0), BLACK, "", 0.9, num_inference_steps=1)
    assert 0.29 <= found.strength <= 0.3


def test_a_chooser_leads_and_ends_it() -> None:
    """Somebody who likes a grey of 0.37 best, and stops at what was the best before."""
    seen = []

    def choose(shown: Sweep, last: int | None) -> int:
        seen.append((shown.strengths, None if last is None else shown.strengths[last]))
        return int(np.argmin([abs(s - 0.37) for s in shown.strengths]))

    found = search(Known(lambda s: s), BLACK, "", choose=choose, candidates=3, num_inference_steps=1)
    assert abs(found.strength - 0.37) <= 0.01
    assert seen[0] == ([0, 1 / 3, 2 / 3, 1], None)
    for shown, last in seen[1:]:
        assert last in shown and len(shown) == len(set(shown)) == 6  # the one before, its neighbours, three new ones

    rounds = []

    def enough(shown: Sweep, last: int | None) -> int | None:
        rounds.append(last)
        return 2 if last is None else None

    stopped = search(Known(lambda s: s), BLACK, "", choose=enough, candidates=3, num_inference_steps=1)
    assert stopped.strength == 2 / 3 and rounds in ([None, 2], [None, 3])  # after 1/3 and one or two new ones


@pytest.mark.parametrize(("measure", "repeats"), [("l2", 1), ("ssim", 2)])
def test_on_real_networks_the_result_is_what_the_call_draws(pipe: Any, measure: str, repeats: int) -> None:
    guide, common = picture(), {"num_inference_steps": 3, "guidance_scale": 2.0, "repeats": repeats}
    floor, ceiling = (
        FAITHFULNESS[measure](
            pipe("a", guide, strength=s, generator=torch.Generator().manual_seed(3), **common).images[0], guide
        )
        for s in (0, 1)
    )
    generator = torch.Generator().manual_seed(3)
    bound = min((floor + ceiling) / 2, floor - 0.01)  # random networks may be no less faithful at strength 1
    found = pipe.search(guide, "a", bound, measure=measure, tolerance=0.05, generator=generator, **common)
    again = pipe("a", guide, strength=found.strength, exact_steps=True, generator=generator, **common).images[0]
    assert np.abs(np.asarray(again).astype(int) - np.asarray(found.image)).max() <= 1
    rounds = (len(found.drawn.strengths) - 1) // 4
    assert found.unet_calls == 3 * repeats * rounds
    assert found.faithfulness == FAITHFULNESS[measure](found.image, guide)


@pytest.mark.parametrize("cancelled_round", [1, 2])
def test_cancel_ends_the_search_with_the_rounds_before(pipe: Any, cancelled_round: int) -> None:
    rounds: list[int] = []

    def cancel(pipe: Any, step: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        rounds.extend([step] * (step == 0))
        if len(rounds) == cancelled_round:
            pipe.cancel()
        return {}

    settings = {"candidates": 2, "num_inference_steps": 3, "callback_on_step_end": cancel}
    found = search(pipe, picture(64, 64), "apple", choose=lambda _shown, _last: 1, **settings)
    assert len(rounds) == cancelled_round
    assert found.drawn.strengths == [0, 0.5, 1]
    taken = [1, 1] if cancelled_round == 1 else [3, 3]
    assert found.drawn.steps[1:] == taken and found.strength in found.drawn.strengths


def test_a_cancelled_sweep_says_how_far_it_came(pipe: Any) -> None:
    def cancel(pipe: Any, step: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe.cancel()
        return {}

    swept = pipe.sweep(picture(64, 64), "apple", [0.2, 1.0], num_inference_steps=5, callback_on_step_end=cancel)
    assert swept.steps == [1, 2] and len(swept.images) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"faithful": 2}, "faithful=2; expected a number from 0 to 1"),
        ({"measure": "lpips"}, "expected one of l2, ssim"),
        ({"candidates": 0}, "candidates=0"),
        ({"tolerance": 0}, "tolerance=0"),
        ({"choose": lambda shown, last: 9}, "its answer 9; expected 0 to 4"),
        ({"choose": lambda shown, last: "a"}, "its answer='a'"),
        ({"choose": lambda shown, last: None}, "its answer=None"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        search(Known(lambda s: s), BLACK, "", num_inference_steps=1, **arguments)


def test_faithfulness_of_flat_pictures() -> None:
    """1 - |a - b| by L2; by SSIM, what its formula leaves without variance, (2ab + C)/(a² + b² + C) with C = 0.01²."""
    a, b = 51 / 255, 153 / 255
    one, other = (Image.new("RGB", (32, 32), (round(255 * v),) * 3) for v in (a, b))
    assert l2_faithfulness(one, other) == pytest.approx(1 - (b - a))
    assert ssim(one, other) == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4))
    assert l2_faithfulness(one, one) == ssim(one, one) == 1
