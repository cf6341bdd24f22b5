"""Every class against diffusers, step by step: every option, from full and from partial strength."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch

from sdedit import schedulers

diffusers.utils.logging.set_verbosity_error()
Options = dict[str, Any]
Case = tuple[Options, Options, int, int]

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PREDICTIONS = [{"prediction_type": p} for p in ("epsilon", "sample", "v_prediction")]
NOISE_OR_V = [PREDICTIONS[0], PREDICTIONS[2]]
SPACINGS: list[Options] = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
]
LEVELS: list[Options] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]
SPACED = [*SPACINGS, *LEVELS[1:]]  # where each takes long
ENDS = [{"final_sigmas_type": e} for e in ("zero", "sigma_min")]
ORDERS = [{"solver_order": k} for k in (1, 2, 3)]
BOUNDS: list[Options] = [
    {},
    {"clip_sample": True, "clip_sample_range": 0.6},
    {"thresholding": True, "sample_max_value": 1.3},
]


def product(*axes: list[Options]) -> list[Options]:
    return [functools.reduce(lambda a, b: a | b, chosen) for chosen in itertools.product(*axes)]


def schedules(**more: Any) -> list[Options]:
    """Noise schedules other than Stable Diffusion's."""
    betas = torch.linspace(0.02, 0.2, 40).square().tolist()
    found: list[Options] = [
        {"beta_schedule": "linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": betas, "num_train_timesteps": 40},
    ]
    return [s | more for s in found]


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
DPM = product(
    [{"algorithm_type": a, **e} for a in ("dpmsolver++", "sde-dpmsolver++") for e in ENDS]
    + [{"algorithm_type": a, "final_sigmas_type": "sigma_min"} for a in ("dpmsolver", "sde-dpmsolver")],
    ORDERS,
    [{"solver_type": "midpoint"}, {"solver_type": "heun"}],
)
DPM = [o for o in DPM if o["algorithm_type"] != "sde-dpmsolver" or o["solver_order"] < 3]  # there is no such formula
SINGLE = [o for o in DPM if o["algorithm_type"] != "sde-dpmsolver"]

# For each class: config options, then options of `step` that each config is tried with.
CASES: dict[str, tuple[list[Options], list[Options]]] = {
    "DDIMScheduler": (
        product(PREDICTIONS, SPACINGS, BOUNDS, [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}])
        + schedules()
        + [ZERO_SNR, ZERO_SNR | {"prediction_type": "sample"}],
        [{}, {"eta": 0.7}, {"eta": 1.0, "use_clipped_model_output": True}],
    ),
    "DDPMScheduler": (
        product(PREDICTIONS, SPACINGS, BOUNDS)
        + product(SPACINGS, [{"variance_type": v} for v in ("fixed_small_log", "fixed_large", "fixed_large_log")])
        + schedules()
        + [{"beta_schedule": "sigmoid"}, {"beta_schedule": "laplace"}, ZERO_SNR],
        [{}],
    ),
    "PNDMScheduler": (
        product(
            NOISE_OR_V,
            SPACINGS,
            [{"skip_prk_steps": True}, {}],
            [{"set_alpha_to_one": True}, {"set_alpha_to_one": False}],
        )
        + schedules(),
        [{}],
    ),
    "LCMScheduler": (product(PREDICTIONS, BOUNDS, [{}, {"timestep_scaling": 3.0}]) + schedules()[:2], [{}]),
    "TCDScheduler": (product(PREDICTIONS, BOUNDS[:2]) + schedules()[:2], [{"eta": e} for e in (0.0, 0.3, 0.5, 1.0)]),
    "EulerDiscreteScheduler": (
        product(PREDICTIONS, SPACINGS, LEVELS, ENDS)
        + product([{"interpolation_type": "log_linear"}], ENDS)
        + [{"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}]
        + [{"sigma_min": 0.1, "sigma_max": 9.0, **level} for level in LEVELS]
        + schedules()
        + [ZERO_SNR],
        [{}, {"s_churn": 3.0, "s_noise": 1.1}, {"s_churn": 100.0, "s_tmin": 0.5, "s_tmax": 5.0}],
    ),
    "EulerAncestralDiscreteScheduler": (product(NOISE_OR_V, SPACINGS) + schedules() + [ZERO_SNR], [{}]),
    "LMSDiscreteScheduler": (
        product(PREDICTIONS, SPACINGS, LEVELS) + schedules(),
        [{"order": k} for k in (1, 2, 3, 4)],
    ),
    "HeunDiscreteScheduler": (
        product(PREDICTIONS, SPACED, BOUNDS[:2]) + schedules() + [{"beta_schedule": "exp"}],
        [{}],
    ),
    "KDPM2DiscreteScheduler": (product(NOISE_OR_V, SPACED) + schedules(), [{}]),
    "KDPM2AncestralDiscreteScheduler": (product(NOISE_OR_V, SPACED) + schedules(), [{}]),
    "DPMSolverSDEScheduler": (
        [*product([{"noise_sampler_seed": 5}], NOISE_OR_V, SPACED), {"noise_sampler_seed": [1, 2]}],
        [{}, {"s_noise": 0.8}],
    ),
    "DPMSolverMultistepScheduler": (
        product(DPM, [*LEVELS, {"use_lu_lambdas": True}])
        + product(PREDICTIONS, SPACINGS, DPM[::5])
        + product(DPM[::3], [{"lower_order_final": False}, {"euler_at_final": True}, {"thresholding": True}])
        + [{"lambda_min_clipped": -3.0}, {"lambda_min_clipped": -5.1, "timestep_spacing": "leading"}]
        + schedules()
        + schedules(use_karras_sigmas=True)
        + [ZERO_SNR],
        [{}],
    ),
    "DPMSolverSinglestepScheduler": (
        product(SINGLE, LEVELS)
        + product(PREDICTIONS, SINGLE[::5], [{}, {"lower_order_final": True}])
        + [{"thresholding": True}, {"lambda_min_clipped": -3.0}]
        + schedules(),
        [{}],
    ),
    "DEISMultistepScheduler": (
        product(PREDICTIONS, SPACINGS, ORDERS, LEVELS)
        + product(ORDERS, [{"lower_order_final": False}, {"thresholding": True}])
        + schedules(),
        [{}],
    ),
    "UniPCMultistepScheduler": (
        product(ORDERS, [{"solver_type": "bh1"}, {"solver_type": "bh2"}], ENDS, LEVELS, [{}, {"predict_x0": False}])
        + product(PREDICTIONS, SPACINGS, ORDERS, ENDS)
        + product(
            ORDERS, ENDS, [{"lower_order_final": False}, {"thresholding": True}, {"disable_corrector": [0, 2, 3]}]
        )
        + [{"sigma_min": 0.1, "sigma_max": 9.0, "use_karras_sigmas": True}]
        + schedules()
        + [ZERO_SNR],
        [{}],
    ),
}
RUNS = [(1, 0), (2, 0), (2, 1), (5, 0), (5, 2), (8, 3), (21, 0), (21, 7)]
ALWAYS: dict[str, Options] = {"DDIMScheduler": {"clip_sample": False}, "DDPMScheduler": {"clip_sample": False}}


def all_runs(name: str) -> Iterator[tuple[Any, Any, list[Case]]]:
    """Each config, as a scheduler of theirs and one of ours, and its runs."""
    configs, stepped = CASES[name]
    for k, config in enumerate(configs):
        options = SD | ALWAYS.get(name, {}) | config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated there, not here
            theirs = getattr(diffusers, name)(**options)
        runs = [(config, stepped[(k + n + m) % len(stepped)], n, m) for n, m in RUNS]
        yield theirs, getattr(schedulers, name)(**options), runs


CANCELS = "KDPM2 ancestral: s'^2 - up^2 cancels in float32, to a wrong midpoint or to a negative number"


def undefined(name: str, config: Options, steps: int) -> str | None:
    """Why diffusers has no number for the whole run, if it has none. sdedit has, or says what is wrong."""
    levels = {k for k in config if k.startswith("use_") and config[k]}
    if name == "PNDMScheduler" and steps < 4 and not config.get("skip_prk_steps"):
        return "PNDM: Runge-Kutta needs 4 steps (an error about shapes; ours says it)"
    if config.get("variance_type") == "fixed_large_log":
        return "DDPM: fixed_large_log takes the square root of a negative logarithm"
    if name == "DPMSolverMultistepScheduler" and config.get("final_sigmas_type") == "sigma_min":
        short = steps < 15 and config.get("lower_order_final", True)
        high = config["solver_order"] == 3 or (config["solver_order"] == 2 and config["solver_type"] == "heun")
        if levels and high and not short:
            return "DPM-Solver: a last step of no length divides by h = 0"
    if name == "UniPCMultistepScheduler" and config.get("final_sigmas_type", "zero") == "zero":
        if config.get("solver_type") == "bh1" or not config.get("predict_x0", True):
            return "UniPC: bh1 and predict_x0=False multiply infinity by zero in the step to zero noise"
        if not config.get("lower_order_final", True) and config["solver_order"] > 1:
            return "UniPC: without lower_order_final the step to zero noise has an infinite h in its higher orders"
    if name == "KDPM2AncestralDiscreteScheduler" and (steps == 2 or config.get("beta_schedule") == "squaredcos_cap_v2"):
        return CANCELS
    return None


def reference(theirs: Any, case: Case, run: Callable[..., Any], levels: torch.Tensor) -> Any:
    """The run in diffusers, as far as it gives numbers, or the error."""
    _, options, steps, start = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            times, tensors = run(theirs, steps, start, levels=levels, **options)
        except Exception as error:
            return error
    finite = itertools.takewhile(lambda x: bool(x.isfinite().all()), tensors)
    return times, list(finite), len(tensors)


def exact_levels(name: str, ours: Any) -> torch.Tensor | None:
    """Levels to give diffusers' scheduler, where a bit of them or of float32 would drown what is compared.

    The Brownian path of DPM++ SDE is rough: levels that differ in the last bit give other noise. And DEIS evaluates
    the difference of two almost equal integrals, which in float32 keeps three digits.
    """
    if name == "DPMSolverSDEScheduler":
        return ours.sigmas.clone()
    return ours.sigmas.double() if name == "DEISMultistepScheduler" else None


def distance(theirs: list[torch.Tensor], ours: list[torch.Tensor]) -> float:
    """Largest difference, relative to 1 or to the largest value of the run, whose float32 rounding all values share."""
    size = max(float(x.abs().max()) for x in theirs)
    return max(float((p - q).abs().max()) for p, q in zip(theirs, ours, strict=False)) / max(1.0, size)


@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name: str, run: Callable[..., Any]) -> None:
    worst: list[tuple[float, Any]] = []
    skipped: Counter[str] = Counter()
    count = 0
    for theirs, ours, runs in all_runs(name):
        for case in runs:
            config, options, steps, start = case
            count += 1
            reason = undefined(name, config, steps)
            ours.set_timesteps(steps) if reason is None else None
            expected = reference(theirs, case, run, exact_levels(name, ours))
            if isinstance(expected, Exception):
                assert reason, (case, expected)
                skipped[reason] += 1
                continue
            times, tensors, length = expected
            if len(tensors) < length:
                assert reason, (case, f"{len(tensors)} of {length} tensors are numbers")
                skipped[reason] += 1
            our_times, our_tensors = run(ours, steps, start, **options)
            assert len(our_times) == len(times) and len(our_tensors) == length, case
            assert all(x.isfinite().all() for x in our_tensors), case
            if reason == CANCELS:
                continue
            far = max(abs(a - b) for a, b in zip(times, our_times, strict=True))
            assert far < 1e-3, (case, times, our_times)
            worst.append((distance(tensors, our_tensors), case))
    figure, case = max(worst, key=lambda w: w[0])
    print(f"\n{name}: {count} runs, largest difference {figure:.1e}, in {case}; not whole there: {dict(skipped)}")
    assert figure < 5e-5, case


def test_few_runs_are_undefined_in_diffusers() -> None:
    cases = [(name, config, steps) for name in CASES for config in CASES[name][0] for steps, _ in RUNS]
    reasons = Counter(undefined(*case) for case in cases)
    of = {reason: count for reason, count in reasons.items() if reason}
    print(f"\n{sum(of.values())} of {len(cases)} runs: {of}")
    assert len(of) == 6
    assert sum(of.values()) < 0.07 * len(cases)


CUSTOM: list[tuple[str, Options, Options]] = [
    ("DDPMScheduler", {}, {"timesteps": [900, 700, 300, 50, 0]}),
    ("EulerDiscreteScheduler", {}, {"timesteps": [999.0, 850.5, 736.0, 343.0, 24.0]}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}, {"sigmas": [14.615, 3.861, 1.886, 0.652, 0.0]}),
    ("HeunDiscreteScheduler", {}, {"timesteps": [999.0, 850.5, 736.0, 343.0, 24.0]}),
    ("DPMSolverMultistepScheduler", {}, {"timesteps": [999, 850, 736, 645, 545, 233, 24]}),
    ("DPMSolverSinglestepScheduler", {}, {"timesteps": [999, 850, 736, 645, 545, 233, 24]}),
    ("LCMScheduler", {}, {"timesteps": [999, 759, 499, 259]}),
    ("LCMScheduler", {"original_inference_steps": 20}, {"steps": 4, "strength": 0.6}),
    ("LCMScheduler", {}, {"timesteps": [999, 759, 499, 259], "strength": 0.5}),
    ("TCDScheduler", {}, {"timesteps": [999, 759, 499, 259]}),
    ("TCDScheduler", {}, {"steps": 4, "strength": 0.6}),
]


@pytest.mark.parametrize(("name", "config", "layout"), CUSTOM)
def test_times_of_ones_own(name: str, config: Options, layout: Options, run: Callable[..., Any]) -> None:
    options = SD | ALWAYS.get(name, {}) | config
    layout = {"steps": None} | layout
    times, tensors = run(getattr(diffusers, name)(**options), **layout)
    our_times, our_tensors = run(getattr(schedulers, name)(**options), **layout)
    assert our_times == pytest.approx(times, abs=1e-3)
    assert distance(tensors, our_tensors) < 2e-6


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
@pytest.mark.parametrize("start", [0, 3])
def test_learned_variance(kind: str, start: int, run: Callable[..., Any]) -> None:
    options = SD | ALWAYS["DDPMScheduler"] | {"variance_type": kind}
    # A "learned" variance is the output itself, whose root is not a number where it is negative, there and here.
    squared = {"output": torch.square} if kind == "learned" else {}
    both = [run(m.DDPMScheduler(**options), 8, start, channels=8, **squared) for m in (diffusers, schedulers)]
    assert distance(both[0][1], both[1][1]) < 2e-6


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [("DDIMScheduler", {}, {"eta": 0.5}), ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, {})],
)
def test_noise_of_ones_own(name: str, config: Options, options: Options) -> None:
    noise, x, output = torch.randn((3, *(2, 4, 4, 4)), generator=torch.Generator().manual_seed(1))
    after = []
    for module in (diffusers, schedulers):
        scheduler = getattr(module, name)(**SD | config)
        scheduler.set_timesteps(5)
        after.append(scheduler.step(output, scheduler.timesteps[0], x, variance_noise=noise, **options).prev_sample)
    assert distance(after[:1], after[1:]) < 1e-6


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_for_the_unet(name: str, dtype: torch.dtype, run: Callable[..., Any]) -> None:
    """The latents come back in their dtype, and the run stays as near to that in float32 as their rounding allows."""
    options = SD | ALWAYS.get(name, {}) | ({"noise_sampler_seed": 1} if "SDE" in name else {})
    scheduler = getattr(schedulers, name)(**options)
    _, whole = run(scheduler, 8, 3)
    _, half = run(scheduler, 8, 3, dtype=dtype)
    assert all(x.dtype == dtype for x in half)
    assert distance(whole, [x.float() for x in half]) < (0.02 if dtype == torch.float16 else 0.1)


# Before set_timesteps, their `sigmas` rise while `timesteps` fall, so that `add_noise` adds the noise of another time.
RISING = {n for n in CASES if "DPMSolverM" in n or "DPMSolverSi" in n or "DEIS" in n or "UniPC" in n}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_public_values(name: str, spacing: Options) -> None:
    """What user code reads off a scheduler, and noise at some of its times, before and after `set_timesteps`."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    options = SD | (
        {} if name in ("LCMScheduler", "TCDScheduler") else {k: v for k, v in spacing.items() if k in parameters}
    )
    theirs, ours = (getattr(module, name)(**options) for module in (diffusers, schedulers))
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert torch.equal(ours.betas, theirs.betas)
    assert (ours.order, len(ours)) == (theirs.order, len(theirs))
    x, noise = torch.randn((2, 3, 4, 4, 4), generator=torch.Generator().manual_seed(2))
    for steps in (None, 12):
        for scheduler in (theirs, ours):
            scheduler.set_timesteps(steps) if steps else None
        assert float(ours.init_noise_sigma) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-6)
        if theirs.timesteps is None:  # PNDM before set_timesteps
            continue
        assert torch.allclose(ours.timesteps.double(), theirs.timesteps.double(), atol=0.02)
        if steps is None and name in RISING:
            continue
        if hasattr(theirs, "sigmas"):
            count = len(ours.sigmas)  # theirs of KDPM2 have one zero more
            assert torch.allclose(ours.sigmas, theirs.sigmas[:count].float(), rtol=1e-6)
        chosen = [2, len(ours.timesteps) - 3, 7]
        noised = [s.add_noise(x, noise, s.timesteps[chosen]) for s in (theirs, ours)]
        assert distance(noised[:1], noised[1:]) < 1e-6
        if name in ("DDIMScheduler", "DDPMScheduler", "LCMScheduler", "TCDScheduler"):
            velocities = [s.get_velocity(x, noise, s.timesteps[chosen]) for s in (theirs, ours)]
            assert distance(velocities[:1], velocities[1:]) < 1e-6
