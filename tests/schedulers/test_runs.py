"""Strength and steps: how many run, from what noise level, for all pictures or for each its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from conftest import picture
from sdedit.schedulers.names import SCHEDULERS, make_scheduler
from sdedit.schedulers.schedule import squeezed_betas

NAMES = [name for name in SCHEDULERS if not name.endswith("-karras") or name == "dpm++-2m-karras"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_each_picture_give_what_each_gives_alone(pipe: Any, name: str) -> None:
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    texts, strengths, steps, scales = ["apple", "cat", "a dog"], [0.3, 0.9, 0.6], [10, 5, 7], [1.0, 7.5, 3.0]
    together = pipe(
        texts,
        picture(),
        strength=strengths,
        num_inference_steps=steps,
        guidance_scale=scales,
        generator=[generator(i) for i in range(3)],
        output_type="np",
    )
    # PNDM takes one step more than it is asked for, as in diffusers.
    assert together.steps == ([4, 5, 5] if name == "pndm" else [3, 4, 4])
    for i, (text, strength, count, scale) in enumerate(zip(texts, strengths, steps, scales, strict=True)):
        alone = pipe(
            text,
            picture(),
            strength=strength,
            num_inference_steps=count,
            guidance_scale=scale,
            generator=[generator(i)],
            output_type="np",
        )
        assert np.abs(together.images[i] - alone.images[0]).max() < 1e-4
        assert (alone.steps, alone.start_sigmas) == ([together.steps[i]], [together.start_sigmas[i]])


def test_a_batch_shrinks_as_runs_end(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda x, *a, **k: (seen.append(len(x)), forward(x, *a, **k))[1])
    pipe("apple", picture(), strength=[0.2, 1.0, 0.6], num_inference_steps=5, guidance_scale=1)
    assert seen == [3, 2, 2, 1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_exact_steps_run_all_steps_and_make_strength_continuous(pipe: Any, name: str) -> None:
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    common = {"num_inference_steps": 5, "output_type": "np"}

    def draw(strength: float, exact: bool = True) -> Any:
        return pipe("apple", picture(), strength=strength, exact_steps=exact, generator=generator(), **common)

    first, second, full = draw(0.834), draw(0.843), draw(1.0)
    assert first.steps == full.steps  # 5, or PNDM's 6
    assert 0 < first.start_sigmas[0] < second.start_sigmas[0] < full.start_sigmas[0]
    assert 0 < np.abs(first.images - second.images).max() < 0.2
    assert np.array_equal(full.images, draw(1.0, exact=False).images)
    # In the ordinary way these two strengths are one.
    assert np.array_equal(draw(0.834, exact=False).images, draw(0.843, exact=False).images)


def test_the_squeezed_schedule_is_the_models_at_a_part_of_the_time() -> None:
    t = np.arange(1000)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bar = np.cumprod(1 - betas)
    squeezed = np.cumprod(1 - squeezed_betas(bar, 0.5).astype(np.float64))
    assert np.allclose(squeezed[t[::2]], bar[:500], rtol=1e-4)  # ᾱ'(2k) = ᾱ(k)


def test_the_unet_is_told_the_models_own_time(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = []
    forward = pipe.unet.forward
    monkeypatch.setattr(
        pipe.unet,
        "forward",
        lambda x, t, *a, **k: (times.append(float(torch.as_tensor(t).reshape(-1)[0])), forward(x, t, *a, **k))[1],
    )
    pipe("apple", picture(), strength=0.5, num_inference_steps=4, exact_steps=True)
    pipe.scheduler.set_timesteps(4)
    assert times == pytest.approx([t / 2 for t in pipe.scheduler.timesteps.tolist()])


def test_start_sigma_is_the_noise_level_of_the_latents(pipe: Any) -> None:
    """σ/α, found again from latents that were noised from zero."""
    latents = torch.zeros(1, 4, 32, 32)
    seen: list[torch.Tensor] = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.cancel()
        return {}

    for name in ("ddim", "euler"):
        pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
        original = pipe.scheduler.scale_model_input
        pipe.scheduler.scale_model_input = lambda x, t, original=original: (seen.append(x), original(x, t))[1]
        out = pipe(
            "apple", latents, strength=0.5, num_inference_steps=10, callback_on_step_end=stop, generator=generator()
        )
        sigma = out.start_sigmas[0]
        expected = sigma / (1 + sigma**2) ** 0.5 if name == "ddim" else sigma
        assert float(seen[-1].std()) == pytest.approx(expected, rel=0.03)


def test_extra_noise_is_added_to_the_clean_latents(pipe: Any) -> None:
    latents, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8, generator=generator(3))
    common = {"strength": 0.5, "num_inference_steps": 4, "output_type": "latent"}
    more = pipe("apple", latents, extra_noise=0.2, generator=generator(3), **common).images
    by_hand = pipe("apple", latents + 0.2 * noise, generator=generator(3), **common).images
    assert torch.allclose(more, by_hand, atol=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own settings"])
@pytest.mark.parametrize("name", NAMES)
def test_repeats_are_runs_one_after_the_other(pipe: Any, name: str, own: bool) -> None:
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    common = {"strength": [0.5, 0.9] if own else 0.6, "num_inference_steps": 5, "output_type": "latent"}
    common |= {"num_images_per_prompt": 2, "extra_noise": 0.1}
    together = pipe("apple", picture(), repeats=3, generator=(g := [generator(0), generator(1)]), **common).images
    by_hand, h = picture(), [generator(0), generator(1)]
    for _ in range(3):
        by_hand = pipe("apple", by_hand, generator=h, **common).images
    assert torch.equal(together, by_hand)
    assert [one.get_state().tolist() for one in g] == [one.get_state().tolist() for one in h]


def test_cancelling_ends_the_repeats(pipe: Any) -> None:
    seen = []
    pipe("apple", picture(), repeats=3, num_inference_steps=2, strength=1, callback_on_step_end=stop_after(seen, 3))
    assert seen == [0, 1, 0]


def stop_after(seen: list[int], calls: int) -> Any:
    """A callback that notes the steps and cancels after some."""

    def step_end(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        seen.append(step)
        if len(seen) == calls:
            pipe.cancel()
        return {}

    return step_end


def test_a_picture_that_runs_no_step_is_the_round_trip(pipe: Any) -> None:
    out = pipe(
        "apple",
        picture(),
        strength=[0.0, 0.5],
        num_inference_steps=4,
        generator=[generator(), generator()],
        output_type="np",
    )
    alone = pipe("apple", picture(), strength=0.0, generator=generator(), output_type="np")
    assert out.steps == [0, 2] and out.start_sigmas[0] == 0
    assert np.abs(out.images[0] - alone.images[0]).max() < 1e-5


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
@pytest.mark.parametrize("settings", [{"strength": [0.5, 0.9]}, {"guidance_scale": [1.0, 5.0]}], ids=str)
def test_other_librarys_schedulers_serve_settings_of_each_picture(
    pipe: Any, name: str, settings: dict[str, Any]
) -> None:
    import diffusers

    pipe.scheduler = getattr(diffusers, name).from_config(dict(pipe.scheduler.config))
    common = {"num_inference_steps": 6, "output_type": "pt"}
    together = pipe("apple", picture(), generator=[generator(i) for i in range(2)], **settings, **common)
    for i in range(2):
        one = {key: value[i] for key, value in settings.items()}
        alone = pipe("apple", picture(), generator=generator(i), **one, **common)
        torch.testing.assert_close(together.images[i : i + 1], alone.images, atol=1e-4, rtol=0)
    assert len(together.steps) == (1 if "guidance_scale" in settings else 2)
    assert pipe("apple", picture(), strength=0.5, num_inference_steps=4, exact_steps=True).steps[0] >= 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strength": [0.5, 1.5]}, r"strength\[1\]=1.5"),
        ({"strength": []}, "strength: the list is empty"),
        ({"strength": [0.1, 0.2], "guidance_scale": [1, 2, 3]}, "strength: 2 values for 3 pictures"),
        ({"num_inference_steps": [5, 0]}, r"num_inference_steps\[1\]=0"),
        ({"extra_noise": -1}, "extra_noise=-1"),
        ({"exact_steps": True, "timesteps": [500, 100]}, "exact_steps: timesteps or sigmas"),
    ],
)
def test_bad_settings_are_named(pipe: Any, arguments: dict[str, Any], message: str) -> None:
    from sdedit import DDPMScheduler

    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=message):
        pipe("apple", picture(), **arguments)


def test_weighted_prompts_in_the_pipeline(pipe: Any) -> None:
    """Opt-in; long prompts and their negatives go together; a weight changes the picture, a weight of 1 does not."""
    common = {"num_inference_steps": 2, "output_type": "np"}

    def draw(text: str, weighting: bool = True, **more: Any) -> Any:
        return pipe(text, picture(), prompt_weighting=weighting, generator=generator(), **common, **more).images

    assert np.array_equal(draw("an apple", weighting=False), draw("an (apple:1.0)"))
    assert np.abs(draw("an apple") - draw("an (apple:1.5)")).max() > 1e-4
    long = "apple " * 100 + "cat"
    assert np.abs(draw(long) - draw("apple " * 100)).max() > 1e-6  # what the ordinary way would cut off
    draw("apple", negative_prompt=long)
    assert pipe.encode_prompt(long, negative_prompt="cat", prompt_weighting=True)[1].shape[1] == 154
