"""Batches that are put together and taken apart between UNet calls, as a server does it: each picture as if alone."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdedit import DDIMScheduler, denoising
from sdedit.denoising import Guidance, State
from sdedit.inputs.image_prompts import ImageEmbeds
from sdedit.inputs.masks import Keep
from sdedit.noise import randn, seeded
from sdedit.schedulers.names import make_scheduler
from sdedit.schedulers.runs import Run, Steps

NAMES = ("ddim", "pndm", "euler-a", "heun", "dpm++-2m", "unipc", "lcm")


class Unet:
    """A function of each picture alone: latents, time, words, pictures as prompts."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, sample: Tensor, t: Tensor, embeds: Tensor, **arguments: Any) -> tuple[Tensor]:
        self.batches.append(len(sample))
        words = embeds.mean((1, 2)) + arguments["added_cond_kwargs"]["image_embeds"][0].mean((1, 2))
        time = (t.float() / 1000).expand(len(sample))
        assert len(words) == len(sample)
        return ((0.3 * sample + words[:, None, None, None]).sin() * (0.5 + time[:, None, None, None]),)


class Request(NamedTuple):
    """What one user of a server asks for, and after how many UNet calls of the others it comes."""

    scheduler: str
    strength: float
    steps: int
    scale: float
    guided_share: float
    pictures: int
    masked: bool
    comes: int


REQUESTS = st.lists(
    st.builds(
        Request,
        st.sampled_from(NAMES),
        st.floats(0.3, 1),
        st.integers(4, 8),
        st.sampled_from([1.0, 2.5, 7.3]),
        st.sampled_from([0.5, 1.0]),
        st.integers(1, 2),
        st.booleans(),
        st.integers(0, 9),
    ),
    min_size=2,
    max_size=5,
)


def begin(request: Request, seed: int) -> tuple[Run, State]:
    generator = seeded(seed)
    count = request.pictures
    scheduler = make_scheduler(request.scheduler, DDIMScheduler(beta_schedule="scaled_linear").config)
    run = Run.begin(scheduler, count, Steps([request.strength], [request.steps], {}), generator)
    clean, noise = randn((count, 4, 4, 4), generator), randn((count, 4, 4, 4), generator)
    guidance = Guidance((request.scale,)).of_pictures(count, run.calls_within(request.guided_share))
    texts = randn((count, 3, 5), generator), randn((count, 3, 5), generator) if guidance.on else None
    pictures = ImageEmbeds((randn((count, 2 if guidance.on else 1, 1, 3), generator),))
    half = torch.arange(4).expand(count, 1, 4, 4) * run.calls // 3
    keep = Keep(half, clean, noise) if request.masked else Keep()
    return run, State.begin(run.noised(clean, noise), texts, pictures, keep, guidance)


def alone(request: Request, seed: int) -> Tensor:
    run, state = begin(request, seed)
    while run.calls:
        state, _ = denoising.step(Unet(), run, state, {})
    return state.latents


@settings(deadline=None, max_examples=40)
@given(REQUESTS)
def test_pictures_that_share_unet_calls_are_those_drawn_alone(requests: list[Request]) -> None:
    """Solvers, strengths, steps, guidance, prompts and masks differ; each comes when it comes and leaves when done."""
    waiting = sorted(enumerate(requests), key=lambda pair: pair[1].comes)
    run, state, owners, unet, tick = None, None, [], Unet(), 0
    finished: dict[int, Tensor] = {}
    while waiting or owners:
        while waiting and waiting[0][1].comes <= tick:
            seed, request = waiting.pop(0)
            more, its = begin(request, seed)
            run, state = (more, its) if not owners else (run.join(more), state.join(its))
            owners += [seed] * request.pictures
        tick += 1
        if not owners:
            continue
        calls = len(unet.batches)
        state, _ = denoising.step(unet, run, state, {})
        assert len(unet.batches) == calls + 1  # one for all
        going = run.under_way
        for seed in {owners[i] for i in range(len(owners)) if i not in going}:
            finished[seed] = state.latents[[i for i, owner in enumerate(owners) if owner == seed]]
        run, state, owners = run.take(going), state.take(going), [owners[i] for i in going]
    for seed, request in enumerate(requests):
        torch.testing.assert_close(finished[seed], alone(request, seed), atol=1e-5, rtol=1e-5)


def test_what_cannot_share_a_call_is_refused() -> None:
    request = Request("ddim", 1.0, 4, 5.0, 1.0, 2, False, 0)
    (run, state), (other, others) = begin(request, 0), begin(request, 1)
    longer = dataclasses.replace(others, prompt_embeds=torch.zeros(4, 6, 5))
    with pytest.raises(ValueError, match="expected the same but for the number"):
        state.join(longer)
    with pytest.raises(ValueError, match="one model is told its scale"):
        state.join(dataclasses.replace(others, guidance=Guidance((5.0,) * 2, (1,) * 2, distilled=8)))
    both = run.join(other)
    assert both.take([2, 3]).parts == other.parts and both.under_way == [0, 1, 2, 3]
    with pytest.raises(
        ValueError, match=r"pictures=\[1, 2, 3\]; expected all of a part or none, in order, of \[2, 2\]"
    ):
        both.take([1, 2, 3])


def test_guidance_in_half_precision_is_the_same_for_one_scale_and_for_several() -> None:
    prediction = torch.randn(4, 4, 8, 8).bfloat16()
    one, several = (Guidance(scales).combined(prediction) for scales in ((7.3, 7.3), (7.3, 1.0)))
    assert torch.equal(one[0], several[0]) and one.dtype == several.dtype == torch.bfloat16
