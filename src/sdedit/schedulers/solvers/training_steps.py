"""Solvers on the training steps themselves: DDIM, DDPM, PNDM, and those of the distilled LCM and TCD models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdedit.schedulers.options import EPSILON_OR_V, LATENT_DIFFUSION, NOISE, THRESHOLD, take
from sdedit.schedulers.plan import Plan
from sdedit.schedulers.rows import Row
from sdedit.schedulers.schedule import Array, Grid, Problem, Schedule, descending
from sdedit.schedulers.solvers import preserving, x0_of


def ddim(problem: Problem, i: int, *, eta: float = 0.0, clipped_noise: bool = False) -> Row:
    """DDIM (Song, Meng, Ermon 2020, arXiv 2010.02502, equation 12).

    x' = √ᾱ' x0 + √(1 - ᾱ' - std²) ε + std z,  std² = η² (1 - ᾱ')/(1 - ᾱ) (1 - ᾱ/ᾱ')

    Args:
        eta: 0 is deterministic, 1 has the variance of DDPM.
        clipped_noise: Take ε from the clipped x0 and the sample, instead of from the UNet.
    """
    # T // steps back, also where the grid is spaced otherwise ("linspace", "trailing"): as published.
    bar, after = (
        problem.schedule.bar(problem.times[i]),
        problem.schedule.bar(problem.times[i] - problem.config["num_train_timesteps"] // problem.steps),
    )
    alpha, sigma = math.sqrt(bar), math.sqrt(1 - bar)
    std = eta * math.sqrt(posterior_variance(bar, after))
    toward = math.sqrt(max(1 - after - std**2, 0.0))
    if clipped_noise:  # ε = (x - α x0)/σ
        m = {"m_x": toward / sigma, "m_x0": math.sqrt(after) - toward * alpha / sigma}
    else:  # the same, with x0 = p x + q o
        p, q = x0_of(problem.config["prediction_type"], alpha, sigma)
        m = {"m_x": toward * (1 - alpha * p) / sigma, "m_out": -toward * alpha * q / sigma, "m_x0": math.sqrt(after)}
    return preserving(problem, i, alpha, sigma, c=std, draw=float(eta > 0), **m)


def posterior_variance(bar: float, after: float) -> float:
    """Variance of q(x' | x, x0), from ᾱ to the ᾱ' of a less noisy time (arXiv 2006.11239, equation 7)."""
    return (1 - after) / (1 - bar) * (1 - bar / after)


def ddpm(problem: Problem, i: int) -> Row:
    """Ancestral sampling of DDPM over any subset of its steps (Ho et al. 2020, arXiv 2006.11239, equations 6 and 7).

    The variance is β ("fixed_large…") or that of q(x_{t-1} | x_t, x0) ("fixed_small…"); where it is learned, the noise
    has the weight 1 and comes scaled.
    """
    t, kind = problem.times[i], str(problem.config["variance_type"])
    bar, after = problem.schedule.bar(t), problem.schedule.bar([*problem.times, -1][i + 1])
    alpha = bar / after
    variance = 1 - alpha if kind.startswith("fixed_large") else posterior_variance(bar, after)
    std = 1.0 if kind.startswith("learned") else math.sqrt(max(variance, 1e-20))
    a, b = math.sqrt(alpha) * (1 - after) / (1 - bar), math.sqrt(after) * (1 - alpha) / (1 - bar)
    noise = {"c": std, "draw": 1.0} if t > 0 else {}
    return preserving(problem, i, math.sqrt(bar), math.sqrt(1 - bar), m_x0=1.0, a=a, b=(b,), **noise)


def lcm(problem: Problem, i: int) -> Row:
    """Multistep sampling of a latent consistency model (Luo et al. 2023, arXiv 2310.04378, algorithm 3).

    The consistency function is m = c_skip x + c_out x0, with c_skip = s²/(τ² + s²) and c_out = τ/√(τ² + s²) at
    τ = `timestep_scaling` t and s = 1/2; √ᾱ' m + √(1 - ᾱ') z is the next sample.
    """
    bar, after = (problem.schedule.bar(t) for t in [*problem.times, problem.times[-1]][i : i + 2])
    scaled = problem.times[i] * problem.config["timestep_scaling"]
    skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
    last = i == problem.steps - 1
    noisy: dict[str, Any] = {} if last else {"b": (math.sqrt(after),), "c": math.sqrt(1 - after), "draw": 1.0}
    return preserving(problem, i, math.sqrt(bar), math.sqrt(1 - bar), m_x=skip, m_x0=out, **noisy)


def tcd(problem: Problem, i: int, *, eta: float = 0.3) -> Row:
    """Strategic stochastic sampling of trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159).

    The UNet takes x to time (1 - η) t' (that is m = √b x0 + √(1-b) ε), and noise takes that back up to t'.

    Args:
        eta: γ of the paper, in [0, 1]: 0 is deterministic.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}; expected a number in [0, 1]")
    t_after = [*problem.times, 0][i + 1]
    bar, after = problem.schedule.bar(problem.times[i]), problem.schedule.bar(t_after)
    between = problem.schedule.bar(int(np.floor(np.float32(1 - eta) * np.float32(t_after))))
    alpha, sigma, toward = math.sqrt(bar), math.sqrt(1 - bar), math.sqrt(1 - between)
    m: dict[str, Any] = {"m_x": toward / sigma, "m_x0": math.sqrt(between) - toward * alpha / sigma}
    if eta > 0 and i != problem.steps - 1:
        m |= {"b": (math.sqrt(after / between),), "c": math.sqrt(1 - after / between), "draw": 1.0}
    return preserving(problem, i, alpha, sigma, **m)


def pndm(problem: Problem, i: int) -> Row:
    """PNDM (Liu et al. 2022, arXiv 2202.09778, equations 9 to 13); m is the UNet's output itself.

    Each row is the transfer of equation 11 from time `start` to time `end`, from x or from the anchor, for a weighted
    mean of the last outputs: √(ᾱ'/ᾱ) x - (ᾱ' - ᾱ)/(ᾱ √(1-ᾱ') + √(ᾱ (1-ᾱ) ᾱ')) ε.

    Rows count from the start of the run. A run that starts late therefore repeats its first step, as one that starts
    early does, but its times have moved on, and each later sample is a step noisier than the UNet is told. So it is
    in diffusers 0.42.1, whose numbers these are; tests/schedulers/test_gaussian.py measures what it costs.
    """
    times, count, stride = problem.times, i - problem.first, problem.config["num_train_timesteps"] // problem.steps
    start, end, anchored, runge_kutta = times[i], times[i] - stride, False, not problem.config["skip_prk_steps"]
    weights: tuple[float, ...]
    if runge_kutta and count < 12:  # three steps of four evaluations
        stage = count % 4
        start, anchored = times[count - stage], stage > 0
        end = times[i] - (0 if count % 2 else stride // 2)
        weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6) if stage == 3 else (1.0,)
    elif runge_kutta:
        weights = _after_runge_kutta(count)
    else:
        weights = _STARTING[count] if count < len(_STARTING) else _FOURTH_ORDER
        if count == 1:  # evaluated at the end of the first step, which it then repeats as Heun's method
            start, end, anchored = times[i] + stride, times[i], True
    sample, noise = transfer(problem.schedule, problem.config["prediction_type"], start, end)
    now = problem.schedule.bar(times[i])
    update = {"p" if anchored else "a": sample, "b": tuple(noise * w for w in weights)}
    keep = float(count % 4 == 0 if runge_kutta else count == 0)
    return preserving(problem, i, math.sqrt(now), math.sqrt(1 - now), m_out=1.0, keep=keep, **update)


def transfer(schedule: Schedule, prediction: str, start: int, end: int) -> tuple[float, float]:
    """(p, q) such that p·x + q·output takes x from time `start` to `end` (arXiv 2202.09778, equation 11)."""
    bar, after = schedule.bar(start), schedule.bar(end)
    sample = math.sqrt(after / bar)
    noise = (bar - after) / (bar * math.sqrt(1 - after) + math.sqrt(bar * (1 - bar) * after))
    if prediction == "v_prediction":  # ε = α v + σ x, of the mean of v
        return sample + noise * math.sqrt(1 - bar), noise * math.sqrt(bar)
    return sample, noise


# Adams-Bashforth weights, newest first; those of the first rows skip the output of row 1, which serves that row alone.
_FOURTH_ORDER = (55 / 24, -59 / 24, 37 / 24, -9 / 24)
_STARTING = (
    (1.0,),
    (1 / 2, 1 / 2),
    (3 / 2, 0.0, -1 / 2),
    (23 / 12, -16 / 12, 0.0, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, 0.0, -9 / 24),
)


def _after_runge_kutta(count: int) -> tuple[float, ...]:
    """The fourth-order weights, on the first output of each Runge-Kutta step and on those that came after."""
    weights = [0.0] * (count + 1)
    for made, w in zip([0, 4, 8, *range(12, count + 1)][:-5:-1], _FOURTH_ORDER, strict=True):
        weights[count - made] = w
    return tuple(weights[:13])


# The plans: options, grid, and which of the above


class TrainingStep(Plan):
    """Base of the plans whose times are training steps."""

    keep_signal = False

    def _visit(self, steps: int, **layout: Any) -> Grid:
        if steps > len(self):
            raise ValueError(f"num_inference_steps: got {steps}; the model was trained on {len(self)} timesteps")
        own = layout.get("timesteps")
        return self._at(self._spaced(steps).round() if own is None else descending("timesteps", own, len(self)))

    def _at(self, times: Array) -> Grid:
        return Grid(times, np.append(self._schedule.sigma_at(times), 0.0))

    def time_after(self, time: int) -> int:
        """The time of the grid that a step from any training step leads to; -1 is the clean end."""
        below = self._grid.times[self._grid.times < time]
        return int(below[0]) if len(below) else -1

    def row_of(self, time: int, **options: Any) -> Row:
        """See `Plan.row_of`."""
        if not 0 <= time < len(self._schedule.betas):
            raise ValueError(f"timestep: got {time}; the model was trained on 0 to {len(self._schedule.betas) - 1}")
        key = (time, *sorted(options.items()))
        if key not in self._lone:
            steps = self.num_inference_steps or len(self._grid.times)
            problem = Problem(self._schedule, self.config, steps, 0, [time, self.time_after(time)], [], [])
            self._lone[key] = self._finished([type(self).solver(problem, 0, **options)])[0]
        return self._lone[key]

    def _set_grid(self, grid: Grid, steps: int | None) -> None:
        super()._set_grid(grid, steps)
        self._lone: dict[Any, Row] = {}

    def levels(self, places: Sequence[int]) -> tuple[Array, Array]:
        """See `Plan.levels`; here σ/α may be infinite."""
        bar = np.array([self._schedule.bar(self._grid.times[i]) for i in places])
        return np.sqrt(bar), np.sqrt(1 - bar)


class DDIM(TrainingStep):
    """DDIM: deterministic, or with as much of DDPM's noise as `eta` says (arXiv 2010.02502)."""

    options = take(
        NOISE,
        "clip_sample set_alpha_to_one steps_offset prediction_type thresholding dynamic_thresholding_ratio",
        "clip_sample_range sample_max_value timestep_spacing rescale_betas_zero_snr",
        clip_sample=True,
        timestep_spacing="leading",
    )
    memoryless = True
    solver = staticmethod(ddim)


class DDPM(TrainingStep):
    """DDPM's ancestral sampling, over all training steps or some (arXiv 2006.11239)."""

    options = take(
        NOISE,
        "variance_type clip_sample prediction_type thresholding dynamic_thresholding_ratio clip_sample_range",
        "sample_max_value timestep_spacing steps_offset rescale_betas_zero_snr",
        variance_type="fixed_small",
        clip_sample=True,
        timestep_spacing="leading",
    )
    memoryless = True
    complete = True
    layouts = ("timesteps",)
    solver = staticmethod(ddpm)


class PNDM(TrainingStep):
    """PNDM: multistep, started by Runge-Kutta or, without it (PLMS), by itself (arXiv 2202.09778).

    It evaluates once more than there are steps, or nine times more with Runge-Kutta.
    """

    options = take(
        NOISE,
        "skip_prk_steps set_alpha_to_one prediction_type timestep_spacing steps_offset",
        set_alpha_to_one=False,
        prediction_type=EPSILON_OR_V,
        timestep_spacing="leading",
    )
    x0_field = None
    solver = staticmethod(pndm)

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times = super()._visit(steps).times
        if self.config.skip_prk_steps:
            return self._at(np.concatenate([times[:2], times[1:2], times[2:]]))
        if steps < 4:
            raise ValueError(f"num_inference_steps: got {steps}; with skip_prk_steps=False PNDM needs 4 or more")
        halves = times[1:4] + len(self) // steps // 2  # the middle of each Runge-Kutta step
        return self._at(np.append(np.stack([times[:3], halves, halves, times[1:4]], axis=1).ravel(), times[3:]))


class Distilled(TrainingStep):
    """Base of the plans for distilled models, which run on a few of the times that they were distilled on.

    `set_timesteps` takes `original_inference_steps`, of the distillation, and `strength`: use only so much of the
    times, from the clean end.
    """

    options = take(
        NOISE,
        "original_inference_steps clip_sample clip_sample_range set_alpha_to_one steps_offset prediction_type",
        THRESHOLD,
        "timestep_spacing timestep_scaling rescale_betas_zero_snr",
        **LATENT_DIFFUSION,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
    )
    layouts = ("timesteps", "original_inference_steps", "strength")
    x0_field = None

    def _visit(
        self,
        steps: int,
        timesteps: Sequence[int] | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
        **layout: Any,
    ) -> Grid:
        if timesteps is not None:
            return self._at(descending("timesteps", timesteps, len(self))[max(steps - int(steps * strength), 0) :])
        trained = self._trained_times(original_inference_steps, strength)
        if steps > len(trained):
            original = original_inference_steps or self.config.original_inference_steps
            raise ValueError(
                f"num_inference_steps: got {steps}; original_inference_steps {original} at strength {strength} has "
                f"{len(trained)} times"
            )
        return self._at(trained[::-1][np.floor(np.linspace(0, len(trained), steps, endpoint=False)).astype(int)])

    def _trained_times(self, original: int | None, strength: float) -> Array:
        """Times of the distillation, rising."""
        steps = original or self.config.original_inference_steps
        if steps > len(self):
            raise ValueError(f"original_inference_steps: got {steps}; the model was trained on {len(self)} timesteps")
        return np.arange(1, int(steps * strength) + 1) * (len(self) // steps) - 1


class LCM(Distilled):
    """Multistep sampling of latent consistency models (arXiv 2310.04378), for 1 to 8 steps."""

    m_field = "denoised"
    solver = staticmethod(lcm)


class TCD(Distilled):
    """Sampling of trajectory consistency models (arXiv 2402.19159); clipping and thresholding do not apply."""

    m_field = "pred_noised_sample"
    bounded = False
    solver = staticmethod(tcd)

    def _trained_times(self, original: int | None, strength: float) -> Array:
        # All training steps where `original_inference_steps` is given to set_timesteps: as published.
        return super()._trained_times(None, strength) if original is None else np.arange(int(len(self) * strength))
