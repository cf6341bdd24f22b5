"""Configs: from any class to any other, to a folder and back, and what is refused."""

from __future__ import annotations

import inspect
import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from sdedit import schedulers
from sdedit.schedulers import schedule
from sdedit.schedulers.names import CLASS_NAMES, make_scheduler

diffusers.utils.logging.set_verbosity_error()
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"}
PRIVATE = {"_class_name", "_diffusers_version", "_use_default_values"}
Options = dict[str, Any]


def public(config: Any, only: Any = None) -> Options:
    """A config, or some of its keys, as plain values that compare: tuples are lists, as in JSON."""
    keys = [k for k in (config if only is None else only) if k not in PRIVATE]
    return {k: list(config[k]) if isinstance(config[k], tuple) else config[k] for k in keys}


@pytest.mark.parametrize("first", CLASS_NAMES)
def test_from_any_class_to_any_other_as_diffusers_does(first: str) -> None:
    """The same values after the change of class, after the way back, and straight from an object of theirs."""
    own = {"use_karras_sigmas": True} if "use_karras_sigmas" in getattr(schedulers, first)().config else {}
    theirs, ours = (getattr(module, first)(**SD, **own) for module in (diffusers, schedulers))
    for second in CLASS_NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            their_second = getattr(diffusers, second).from_config(theirs.config)
            their_return = getattr(diffusers, first).from_config(their_second.config)
        our_second = getattr(schedulers, second).from_config(ours.config)
        our_return = getattr(schedulers, first).from_config(our_second.config)
        straight = getattr(schedulers, second).from_config(theirs.config)
        assert public(our_second.config, their_second.config) == public(their_second.config), second
        assert public(our_return.config, their_return.config) == public(their_return.config), second
        assert public(straight.config, their_second.config) == public(their_second.config), second


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_to_a_folder_and_back(name: str, tmp_path: Path) -> None:
    scheduler = getattr(schedulers, name)(**SD)
    scheduler.save_pretrained(tmp_path / "scheduler")
    again = getattr(schedulers, name).from_pretrained(tmp_path, subfolder="scheduler")
    assert public(again.config) == public(scheduler.config)
    assert again.config["_class_name"] == name
    theirs = getattr(diffusers, name).from_pretrained(tmp_path, subfolder="scheduler")
    assert public(theirs.config) == public(scheduler.config)
    changed = getattr(schedulers, name).from_pretrained(tmp_path / "scheduler", num_train_timesteps=500)
    assert len(changed) == 500


def test_the_config_of_stable_diffusion() -> None:
    config = Path(__file__).parents[3] / "shared/data/sd15/scheduler"
    if not config.is_dir():
        pytest.skip("../shared is not here")
    scheduler = schedulers.PNDMScheduler.from_pretrained(config)
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[:3].tolist() == [981, 961, 961]
    assert make_scheduler("ddim", scheduler.config).config.clip_sample is False


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_compatibles(name: str) -> None:
    assert {c.__name__ for c in getattr(schedulers, name)().compatibles} == set(CLASS_NAMES)


WRONG: list[tuple[str, Options, str]] = [
    ("DDIMScheduler", {"beta_schedule": "cubic"}, r"beta_schedule: got 'cubic'; expected one of 'linear', "),
    ("DDIMScheduler", {"timestep_spacing": "even"}, "timestep_spacing: got 'even'; expected one of 'linspace'"),
    ("DDPMScheduler", {"prediction_type": "noise"}, "prediction_type: got 'noise'; expected one of 'epsilon'"),
    ("DDPMScheduler", {"variance_type": "free"}, "variance_type: got 'free'"),
    (
        "PNDMScheduler",
        {"prediction_type": "sample"},
        "prediction_type: got 'sample'; expected one of 'epsilon', 'v_pred",
    ),
    ("EulerDiscreteScheduler", {"interpolation_type": "cubic"}, "interpolation_type: got 'cubic'"),
    (
        "EulerDiscreteScheduler",
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
        "use_karras_sigmas, use_beta_sigmas",
    ),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpm"}, "algorithm_type: got 'dpm'"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "final_sigmas_type: 'zero' needs"),
    ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order: got 4; expected one of 1, 2, 3"),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"},
        "solver_order: got 3; expected one of 1, 2",
    ),
    ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver"}, "algorithm_type: got 'sde-dpmsolver'"),
    ("DEISMultistepScheduler", {"solver_type": "rk4"}, "solver_type: got 'rk4'"),
    (
        "UniPCMultistepScheduler",
        {"use_dynamic_shifting": True},
        "use_dynamic_shifting: got True; expected one of False",
    ),
    ("DDIMScheduler", {"prediction_type": "flow_prediction"}, "prediction_type: got 'flow_prediction'"),
    ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "'flow_prediction' needs use_flow_sigmas=True"),
    (
        "DEISMultistepScheduler",
        {"use_flow_sigmas": True, "use_karras_sigmas": True},
        "use_karras_sigmas, use_flow_sigmas: at most one",
    ),
    ("UniPCMultistepScheduler", {"solver_p": object()}, "solver_p: got"),
    ("LMSDiscreteScheduler", {"trained_betas": [[0.1, 0.2]]}, r"trained_betas: got shape \(1, 2\)"),
    ("DDIMScheduler", {"trained_betas": [0.1, math.nan], "num_train_timesteps": 2}, "betas: got nan at place 1"),
    ("DDIMScheduler", {"trained_betas": ["a"], "num_train_timesteps": 1}, "trained_betas: expected finite numbers"),
    ("DDIMScheduler", {"num_train_timesteps": 0}, "num_train_timesteps: got 0; expected a whole number from 1 to 1000"),
    ("EulerDiscreteScheduler", {"num_train_timesteps": "1000"}, "num_train_timesteps: got '1000'; expected a whole"),
    ("EulerDiscreteScheduler", {"num_train_timesteps": 10.5}, "num_train_timesteps: got 10.5; expected a whole"),
    ("DEISMultistepScheduler", {"beta_start": math.nan}, "beta_start: got nan; expected a finite number from 0"),
    ("DEISMultistepScheduler", {"beta_end": math.inf}, "beta_end: got inf; expected a finite number from 0"),
    ("PNDMScheduler", {"beta_start": None}, "beta_start: got None; expected a finite number"),
    ("PNDMScheduler", {"beta_end": "0.02"}, "beta_end: got '0.02'; expected a finite number"),
    ("DDIMScheduler", {"steps_offset": None}, "steps_offset: got None; expected a whole number"),
    ("DDIMScheduler", {"clip_sample": "no"}, "clip_sample: got 'no'; expected one of False, True"),
    ("DDIMScheduler", {"thresholding": True, "dynamic_thresholding_ratio": 2}, "dynamic_thresholding_ratio: got 2"),
    ("LCMScheduler", {"original_inference_steps": 0}, "original_inference_steps: got 0; expected a whole"),
]


@pytest.mark.parametrize(("name", "options", "message"), WRONG)
def test_wrong_options(name: str, options: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(schedulers, name)(**options)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_a_schedule_too_long_to_make_is_refused_before_it_is_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "make_betas", lambda *args: pytest.fail("the table was made"))
    with pytest.raises(ValueError, match="num_train_timesteps: got 1000000000; expected a whole number"):
        getattr(schedulers, name)(num_train_timesteps=10**9)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_the_constructor_is_that_of_diffusers(name: str) -> None:
    """Positional use works, and tools that read signatures see the same names in the same order, and the defaults."""
    theirs, ours = (list(inspect.signature(getattr(m, name)).parameters.values()) for m in (diffusers, schedulers))
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in theirs]
    differ = {p.name for p, q in zip(ours, theirs, strict=True) if p.default != q.default}
    assert differ <= {"disable_corrector"}  # an empty tuple here: a default that nobody can change
    assert getattr(schedulers, name)(500, 0.001).config.beta_start == 0.001


WRONG_TIMES: list[tuple[str, Options, Options, str]] = [
    ("DDIMScheduler", {}, {"num_inference_steps": 0}, "num_inference_steps: got 0"),
    ("DDIMScheduler", {}, {"num_inference_steps": 1001}, "1001; the model was trained on 1000"),
    ("DDIMScheduler", {}, {}, "set_timesteps: expected one of num_inference_steps"),
    (
        "DDIMScheduler",
        {},
        {"timesteps": [3, 2]},
        "timesteps: DDIMScheduler.set_timesteps takes num_inference_steps, device",
    ),
    ("DDPMScheduler", {}, {"timesteps": [3, 7]}, "timesteps: expected falling numbers"),
    ("DDPMScheduler", {}, {"timesteps": [1000, 7]}, r"timesteps: expected falling numbers in \[0, 1000\)"),
    ("DDPMScheduler", {}, {"timesteps": [3], "num_inference_steps": 1}, "set_timesteps: expected one of"),
    ("EulerDiscreteScheduler", {}, {"sigmas": [1.0, 2.0, 0.0]}, "sigmas: expected falling numbers"),
    ("DPMSolverMultistepScheduler", {}, {"timesteps": []}, r"num_inference_steps: got 0"),
    ("DPMSolverSinglestepScheduler", {}, {"timesteps": [5, 5]}, "timesteps: expected falling numbers"),
    ("PNDMScheduler", {}, {"num_inference_steps": 3}, "with skip_prk_steps=False PNDM needs 4"),
    (
        "EulerDiscreteScheduler",
        {"use_karras_sigmas": True},
        {"timesteps": [9.0, 1.0]},
        "use_karras_sigmas chooses them",
    ),
    (
        "UniPCMultistepScheduler",
        {},
        {"num_inference_steps": 4, "mu": 1.0},
        "mu: UniPCMultistepScheduler.set_timesteps takes",
    ),
    (
        "LCMScheduler",
        {},
        {"num_inference_steps": 51},
        "got 51; original_inference_steps 50 at strength 1.0 has 50 times",
    ),
    (
        "EulerDiscreteScheduler",
        {"timestep_spacing": "leading"},
        {"num_inference_steps": 2000},
        "do not fit in the 1000",
    ),
]


@pytest.mark.parametrize(("name", "options", "layout", "message"), WRONG_TIMES)
def test_wrong_times(name: str, options: Options, layout: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(schedulers, name)(**options).set_timesteps(**layout)


def test_wrong_steps() -> None:
    x = torch.zeros((1, 4, 4, 4))
    scheduler = schedulers.DDIMScheduler()
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 999, x)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"timestep: got 3.5; expected a whole number"):
        scheduler.step(x, 3.5, x)
    with pytest.raises(ValueError, match=r"timestep: got -1; the model was trained on 0 to 999"):
        scheduler.step(x, -1, x)
    with pytest.raises(ValueError, match="generator, variance_noise: got both"):
        scheduler.step(x, 750, x, eta=1.0, generator=torch.Generator(), variance_noise=x)
    with pytest.raises(ValueError, match="begin_index: got 4; expected 0 to 3"):
        scheduler.set_begin_index(4)
    pndm = schedulers.PNDMScheduler(skip_prk_steps=True)
    pndm.set_timesteps(4)
    with pytest.raises(
        ValueError, match=r"timestep: 3.0 is not among this scheduler's timesteps \[750, 500, 500, 250, 0\]"
    ):
        pndm.step(x, 3, x)
    euler = schedulers.EulerDiscreteScheduler()
    euler.set_timesteps(1)
    euler.step(x, euler.timesteps[0], x)
    with pytest.raises(ValueError, match="the run has ended"):
        euler.step(x, euler.timesteps[0], x)
    tcd = schedulers.TCDScheduler()
    tcd.set_timesteps(2)
    with pytest.raises(ValueError, match="eta: got 2"):
        tcd.step(x, tcd.timesteps[0], x, eta=2)
    learned = schedulers.DDPMScheduler(variance_type="learned")
    learned.set_timesteps(2)
    with pytest.raises(ValueError, match="variance_type 'learned' needs 8 channels"):
        learned.step(x, 500, x)
    beyond = schedulers.DDIMScheduler(steps_offset=1)
    beyond.set_timesteps(1000)
    with pytest.raises(ValueError, match="timestep: got 1000; the model was trained on 0 to 999"):
        beyond.step(x, 1000, x)


def test_zero_snr_needs_a_prediction_that_says_something() -> None:
    x = torch.zeros((1, 4, 4, 4))
    scheduler = schedulers.DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="prediction_type: at zero SNR"):
        scheduler.step(x, 999, x)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"scheduler eulr; expected one of ddim, "):
        make_scheduler("eulr")
    with pytest.raises(AttributeError, match="no attribute 'EulrScheduler'"):
        _ = schedulers.EulrScheduler
    with pytest.raises(TypeError, match="has no option use_karras_sigmas"):
        schedulers.DDIMScheduler.from_config({}, use_karras_sigmas=True)


def test_torchsde_is_asked_for_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", None)
    scheduler = schedulers.DPMSolverSDEScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros((1, 4, 4, 4))
    with pytest.raises(ImportError, match=r"pip install 'sdedit\[sde\]'"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_trailing_has_as_many_times_as_asked_for() -> None:
    """diffusers gives 62 for 61, the last of them -1, which is the noisiest of all (0.42.1)."""
    for steps, name in itertools.product(
        (61, 103, 999), ("DDIMScheduler", "EulerDiscreteScheduler", "DEISMultistepScheduler")
    ):
        scheduler = getattr(schedulers, name)(timestep_spacing="trailing")
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps
        assert scheduler.timesteps.min() >= 0


def test_numpy_betas_survive_a_folder(tmp_path: Path) -> None:
    betas = np.linspace(1e-4, 0.02, 10)
    scheduler = schedulers.HeunDiscreteScheduler(trained_betas=betas, num_train_timesteps=10)
    scheduler.save_pretrained(tmp_path)
    assert torch.equal(schedulers.HeunDiscreteScheduler.from_pretrained(tmp_path).betas, scheduler.betas)


def test_names_and_plans_do_without_torch() -> None:
    code = (
        "import sys, sdedit.schedulers\n"
        "from sdedit.schedulers.names import CLASS_NAMES, SCHEDULERS, resolve_plan\n"
        "assert SCHEDULERS['euler-a'].label == 'Euler a'\n"
        "for name in CLASS_NAMES:\n"
        "    plan = resolve_plan(name).from_config({'beta_schedule': 'scaled_linear'})\n"
        "    plan.lay_out(8)\n"
        "    assert len(plan.rows()) >= 8\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
