"""What code written for diffusers does with a scheduler beside a plain run, done to diffusers and to ours alike."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdedit import schedulers
from sdedit.schedulers.names import CLASS_NAMES

diffusers.utils.logging.set_verbosity_error()
pytestmark = pytest.mark.filterwarnings("ignore")
SIGMA_SPACE = [name for name, module in CLASS_NAMES.items() if module == "sigma_space"]
LOG_SNR = [name for name, module in CLASS_NAMES.items() if module == "log_snr"]
Options = dict[str, Any]


def both(name: str, **options: Any) -> list[Any]:
    """The scheduler of diffusers and ours."""
    return [getattr(module, name)(**options) for module in (diffusers, schedulers)]


def random(seed: int = 0) -> torch.Tensor:
    return torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(seed))


def close(theirs: torch.Tensor, ours: torch.Tensor, tolerance: float = 2e-5) -> None:
    scale = max(float(theirs.abs().max()), 1.0)
    assert ours.shape == theirs.shape and float((theirs - ours).abs().max()) < tolerance * scale


def loop(scheduler: Any, *, seed: int = 1, sample: torch.Tensor | None = None) -> torch.Tensor:
    """A run from noise, with a made-up network."""
    generator = torch.Generator().manual_seed(seed)
    x = random() * scheduler.init_noise_sigma if sample is None else sample
    takes = "generator" in type(scheduler).step.__code__.co_varnames
    for t in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, t)
        prediction = torch.tanh(seen) * 0.5
        x = scheduler.step(prediction, t, x, **({"generator": generator} if takes else {})).prev_sample
    return x


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_one_step(name: str) -> None:
    options: Options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    theirs, ours = both(name, **options)
    if name == "DPMSolverSDEScheduler":
        theirs, ours = both(name, noise_sampler_seed=0)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(1)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    close(loop(theirs), loop(ours))


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_as_many_steps_as_the_model_was_trained_on(name: str) -> None:
    """Rounded times may coincide then: diffusers divides by zero (0.42.1); here a step of no length changes nothing."""
    if name in ("DPMSolverSDEScheduler", "LCMScheduler", "TCDScheduler"):
        return
    scheduler = getattr(schedulers, name)(num_train_timesteps=25)
    scheduler.set_timesteps(25)
    assert bool(torch.isfinite(loop(scheduler)).all())


@pytest.mark.parametrize("name", CLASS_NAMES)
@pytest.mark.parametrize("count", [2, 700, 1500])
def test_betas_of_any_number(name: str, count: int, tmp_path: Path) -> None:
    betas = np.linspace(0.0001, 0.02, count)
    theirs, ours = both(name, trained_betas=betas)
    assert torch.allclose(theirs.alphas_cumprod, ours.alphas_cumprod, rtol=1e-5)
    ours.save_pretrained(tmp_path)
    again = type(ours).from_pretrained(tmp_path)
    assert torch.equal(again.betas, ours.betas)
    if name == "LMSDiscreteScheduler" and count < 1000:  # levels coincide, and diffusers divides by zero
        ours.set_timesteps(5)
        assert bool(torch.isfinite(loop(ours)).all())
    elif name in SIGMA_SPACE and name != "DPMSolverSDEScheduler":
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(5)
        close(loop(theirs), loop(ours))
    if name == "DDIMScheduler" and count == 1500:
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(5)
        close(loop(theirs), loop(ours))


def test_betas_that_do_not_match_are_told_of() -> None:
    with pytest.warns(UserWarning, match="trained_betas: 2 values; num_train_timesteps says 1000"):
        schedulers.DDIMScheduler(trained_betas=[0.1, 0.2])


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("t", [999, 500, 1])
def test_a_step_without_set_timesteps(name: str, t: int) -> None:
    theirs, ours = both(name)
    x, prediction = random(), random(1)
    steps = [
        s.step(prediction, s.timesteps[999 - t], x, generator=torch.Generator().manual_seed(0)).prev_sample
        for s in (theirs, ours)
    ]
    close(*steps, 1e-3 if t == 1 else 2e-5)  # DDPM's variance is a difference of float32 numbers near 1 there


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_steps_from_times_off_its_grid(eta: float) -> None:
    theirs, ours = both("DDIMScheduler")
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(50)
    for t in (1, 10, 49, 983):
        made = [s.step(random(1), t, random(), eta, variance_noise=random(2)).prev_sample for s in (theirs, ours)]
        close(*made)


@pytest.mark.parametrize("name", LOG_SNR)
def test_a_time_off_the_grid_counts_as_the_last_one(name: str) -> None:
    theirs, ours = both(name)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        assert scheduler.index_for_timestep(7) == 9
    with pytest.warns(UserWarning, match="7.0 is not among this scheduler's timesteps .*; taken as the last of them"):
        ours.index_for_timestep(7)
    close(*(s.step(random(1), 7, random()).prev_sample for s in (theirs, ours)))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("skip", [False, True])
def test_the_two_kinds_of_step_of_pndm(prediction: str, skip: bool) -> None:
    runs = []
    for scheduler in both("PNDMScheduler", prediction_type=prediction, skip_prk_steps=skip, beta_start=0.001):
        scheduler.set_timesteps(10)
        x = random()
        for t in scheduler.prk_timesteps:
            x = scheduler.step_prk(0.3 * torch.tanh(x), t, x).prev_sample
        for t in scheduler.plms_timesteps:
            x = scheduler.step_plms(0.3 * torch.tanh(x), t, x).prev_sample
        runs.append(
            (x, [int(t) for t in scheduler.prk_timesteps], scheduler.plms_timesteps.tolist(), scheduler.counter)
        )
    assert runs[0][1:] == runs[1][1:]
    close(runs[0][0], runs[1][0])


def test_pndm_goes_on_from_outputs_put_into_it() -> None:
    runs = []
    for scheduler in both("PNDMScheduler"):
        scheduler.set_timesteps(50)
        scheduler.ets = [random(i) for i in range(4)]
        first = scheduler.step_prk(random(5), 7, random(6)).prev_sample
        runs.append((first, scheduler.step_plms(random(5), 7, first, return_dict=False)[0]))
    close(runs[0][0], runs[1][0])
    close(runs[0][1], runs[1][1])
    with pytest.raises(ValueError, match="the twelve steps of step_prk come first"):
        fresh = schedulers.PNDMScheduler()
        fresh.set_timesteps(10)
        fresh.step_plms(random(), 900, random())


def test_variances_by_their_private_name() -> None:
    theirs, ours = both("DDIMScheduler")
    for t, before in ((0, 0), (420, 400), (980, 960), (487, 486), (19, -1)):
        assert float(ours._get_variance(t, before)) == pytest.approx(float(theirs._get_variance(t, before)), abs=1e-5)
    theirs, ours = both("DDPMScheduler")
    said = random() * 0.5
    for steps in (None, 20):
        for scheduler in (theirs, ours):
            if steps:
                scheduler.set_timesteps(steps)
        for t in (0, 450, 950):
            for kind in (
                "fixed_small",
                "fixed_small_log",
                "fixed_large",
                "fixed_large_log",
                "learned",
                "learned_range",
            ):
                found = [s._get_variance(t, predicted_variance=said, variance_type=kind) for s in (theirs, ours)]
                if t == 0 and kind == "learned_range" and steps is None:
                    continue  # the logarithm of a variance that float32 rounds: -46 or -9, as it falls
                assert torch.allclose(*found, rtol=1e-3, atol=1e-5), (steps, t, kind)


@pytest.mark.parametrize("name", ["DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_previous_timestep(name: str) -> None:
    theirs, ours = both(name)
    assert ours.previous_timestep(7) == theirs.previous_timestep(7) == 6
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(timesteps=[100, 87, 50, 1, 0])
    for t in ours.timesteps:
        assert torch.equal(ours.previous_timestep(t), theirs.previous_timestep(t))


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bfloat16])
def test_times_as_a_tensor(name: str, dtype: torch.dtype) -> None:
    scheduler = getattr(schedulers, name)()
    scheduler.set_timesteps(timesteps=torch.tensor([992, 640, 128, 4]).to(dtype))
    assert scheduler.timesteps.tolist() == [992, 640, 128, 4]


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_levels_as_a_tensor(final: str) -> None:
    theirs, ours = both("EulerDiscreteScheduler", final_sigmas_type=final)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
        scheduler.set_timesteps(sigmas=scheduler.sigmas)
    assert torch.allclose(theirs.timesteps, ours.timesteps, rtol=1e-4, atol=1e-3)
    close(loop(theirs), loop(ours))


@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("timestep_spacing", ["linspace", "leading", "trailing"])
def test_log_linear_levels_span_the_whole_schedule(spacing: str, timestep_spacing: str) -> None:
    options = {"interpolation_type": "log_linear", spacing: True, "timestep_spacing": timestep_spacing}
    theirs, ours = both("EulerDiscreteScheduler", **options)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(8)
    assert torch.allclose(theirs.sigmas, ours.sigmas, rtol=2e-4)
    assert torch.allclose(theirs.timesteps, ours.timesteps, atol=0.05)
    close(loop(theirs), loop(ours), 1e-3)


FLOWS: list[Options] = [{}, {"flow_shift": 3.0}]


@pytest.mark.parametrize("name", LOG_SNR)
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("prediction", ["flow_prediction", "epsilon", "sample"])
def test_flow_matching(name: str, flow: Options, prediction: str) -> None:
    theirs, ours = both(name, use_flow_sigmas=True, prediction_type=prediction, **flow)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
    assert torch.allclose(theirs.sigmas, ours.sigmas, rtol=1e-5)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    close(loop(theirs), loop(ours), 2e-2 if prediction == "epsilon" else 1e-4)
    noised = [s.add_noise(random(), random(1), s.timesteps[2:3]) for s in (theirs, ours)]
    close(*noised)


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_karras_levels_of_flow_matching(final: str) -> None:
    options = {"use_flow_sigmas": True, "use_karras_sigmas": True, "final_sigmas_type": final}
    theirs, ours = both("UniPCMultistepScheduler", prediction_type="flow_prediction", **options)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
    assert torch.allclose(theirs.sigmas, ours.sigmas, rtol=1e-4)
    assert ours.timesteps.tolist() == theirs.timesteps.tolist()
    close(loop(theirs), loop(ours), 1e-3)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_an_output_is_a_dictionary_too(name: str) -> None:
    outputs = []
    for scheduler in both(name):
        scheduler.set_timesteps(5)
        outputs.append(scheduler.step(random(1), scheduler.timesteps[0], random()))
    theirs, ours = outputs
    assert list(ours.keys()) == list(theirs.keys())
    assert [k for k, _ in ours.items()] == list(theirs) and len(ours) == len(theirs)
    assert ours[0] is ours["prev_sample"] is ours.prev_sample is next(iter(ours.values()))
    assert dict(ours).keys() == dict(theirs).keys() == {**ours}.keys()
    assert "prev_sample" in ours and "nothing" not in ours
    assert ours.get("nothing", 3) == 3 and ours.get("prev_sample") is ours[0]
    ours["prev_sample"] = random(3)
    assert torch.equal(ours.prev_sample, random(3)) and torch.equal(ours[0], random(3))


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_options_are_found_as_attributes(name: str) -> None:
    scheduler = getattr(schedulers, name)()
    scheduler.own = 5
    scheduler.register_to_config(extra=7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scheduler.own == 5 and hasattr(scheduler, "save_pretrained")
    with pytest.warns(FutureWarning, match="beta_start is an option: scheduler.config.beta_start"):
        assert scheduler.beta_start == scheduler.config.beta_start
    with pytest.warns(FutureWarning):
        assert scheduler.extra == 7
    with pytest.raises(AttributeError, match=f"'{name}' object has no attribute 'does_not_exist'"):
        _ = scheduler.does_not_exist
    for again in (copy.deepcopy(scheduler), copy.copy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert again.config == scheduler.config and again.own == 5


# The kinds of numbers that user code computes with, and what their classes have before and after `set_timesteps`.
NUMBERS = (
    *("init_noise_sigma", "order", "num_inference_steps", "timesteps", "begin_index", "has_compatibles", "config_name"),
    *("betas", "alphas", "alphas_cumprod", "final_alpha_cumprod", "alpha_t", "sigma_t", "lambda_t"),
)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_numbers_are_of_the_same_kind(name: str) -> None:
    theirs, ours = both(name)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(8)
    for number in NUMBERS:
        if not hasattr(theirs, number):
            continue
        a, b = getattr(theirs, number), getattr(ours, number)
        assert isinstance(b, torch.Tensor) == isinstance(a, torch.Tensor), number
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-4, atol=1e-4), number
        else:
            assert a == b, number


def test_the_schedulers_of_a_pipeline_are_enumerated() -> None:
    theirs, ours = diffusers.schedulers.KarrasDiffusionSchedulers, schedulers.KarrasDiffusionSchedulers
    assert {one.name: one.value for one in ours}.items() <= {one.name: one.value for one in theirs}.items()
    assert {one.name for one in theirs} & set(CLASS_NAMES) == {one.name for one in ours}


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_a_config_is_the_same_from_a_folder(name: str, tmp_path: Path) -> None:
    """As theirs: what was not given is known as long as the object lives, and is given once it is loaded."""
    for scheduler in both(name, beta_end=0.013):
        assert "beta_end" not in scheduler.config["_use_default_values"]
        scheduler.save_pretrained(tmp_path / type(scheduler).__module__)
        again = type(scheduler).from_pretrained(tmp_path / type(scheduler).__module__)
        known = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
        assert dict(again.config) == known
    folder = tmp_path / "sdedit.schedulers.classes"
    loaded = getattr(schedulers, name).load_config(folder)
    assert loaded["beta_end"] == 0.013
    assert getattr(schedulers, name).from_config(loaded).config == again.config
