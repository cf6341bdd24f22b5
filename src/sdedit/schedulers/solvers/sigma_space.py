"""Solvers that hold x/α = x0 + s ε: Euler, Heun, LMS and DPM-Solver-2, in the form of k-diffusion.

In the level s the probability-flow equation is dx/ds = (x - x0)/s = ε (Karras et al. 2022, arXiv 2206.00364), so m is
(x - x0)/s, and a first-order row is x' = x + (s' - s) m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from sdedit.schedulers.options import EPSILON_OR_V, LATENT_DIFFUSION, LEVELS, NOISE, take
from sdedit.schedulers.plan import Plan
from sdedit.schedulers.rows import Row
from sdedit.schedulers.schedule import Array, Grid, Problem, descending
from sdedit.schedulers.solvers import levels, usable, x0_of


def _row(problem: Problem, i: int, s: float, **update: Any) -> Row:
    """Row at level s with m = (x - x0)/s; the UNet sees x, which is α times the sample."""
    alpha, sigma = levels(s)
    p, q = x0_of(problem.config["prediction_type"], alpha, sigma)
    return Row(problem.times[i], p * alpha, q, **{"scale": alpha, "m_x": 1 / s, "m_x0": -1 / s, **update})


def ancestral_levels(s: float, after: float) -> tuple[float, float]:
    """(down, up) with down² + up² = s'²: go down to `down` = s'²/s without noise, then add noise of scale `up`."""
    return after**2 / s, after * math.sqrt(max(s**2 - after**2, 0.0)) / s


def euler(
    problem: Problem, i: int, *, churn: float = 0.0, low: float = 0.0, high: float = math.inf, noise_scale: float = 1.0
) -> Row:
    """Euler's method, with the churn of Karras et al. (algorithm 2, without its second-order correction).

    Where s is in [low, high], noise first raises s to ŝ = (1 + γ) s, γ = min(churn / N, √2 - 1). x0 is then taken at
    ŝ from ε, but at s from v: as published.
    """
    s, after = problem.s[i : i + 2]
    gamma = min(churn / (len(problem.s) - 1), math.sqrt(2) - 1) if low <= s <= high else 0.0
    raised = s * (1 + gamma)
    noise = {"churn": noise_scale * math.sqrt(raised**2 - s**2), "draw": 1.0} if gamma > 0 else {}
    row = _row(problem, i, s, a=1.0, b=(after - raised,), m_x=1 / raised, m_x0=-1 / raised, **noise)
    return row._replace(x0_out=-raised) if problem.config["prediction_type"] == "epsilon" else row


def euler_ancestral(problem: Problem, i: int) -> Row:
    """Euler's method down to the lower of the ancestral levels, then fresh noise (k-diffusion's `euler_ancestral`)."""
    down, up = ancestral_levels(*problem.s[i : i + 2])
    return _row(problem, i, problem.s[i], a=1.0, b=(down - problem.s[i],), c=up, draw=1.0)


def lms(problem: Problem, i: int, *, order: int = 4) -> Row:
    """Linear multistep (k-diffusion's `lms`): integrate the polynomial in s through the last slopes.

    The order follows the row's place in the whole grid. In a run that starts late, the first rows leave out slopes
    that were never computed, and the weights of the others do not sum to s' - s. So it is in diffusers 0.42.1, whose
    numbers these are; tests/schedulers/test_gaussian.py measures what it costs.
    """
    count = usable(problem._replace(first=0), i, order)
    weights = lagrange_integrals(problem.s[i + 1 - count : i + 1][::-1], *problem.s[i : i + 2])
    return _row(problem, i, problem.s[i], a=1.0, b=tuple(weights[: i - problem.first + 1]))


def lagrange_integrals(nodes: Sequence[float], start: float, end: float, *, log: bool = False) -> list[float]:
    """∫ L_j(s) ds from `start` to `end`, for the Lagrange polynomials L_j of `nodes`, (len(nodes),).

    Args:
        log: Let the polynomials be in u = log s. Then ∫ L(log s) ds = s (L - L' + L'' - …)(log s).
    """
    at, weights = [math.log(s) for s in nodes] if log else list(nodes), []
    for j, here in enumerate(at):
        basis = [1.0]  # coefficients of L_j, from the constant up
        for u in (u for k, u in enumerate(at) if k != j):
            basis = [(low - u * high) / (here - u) for low, high in zip([0.0, *basis], [*basis, 0.0], strict=True)]
        if log:
            low, high = (s * _alternating(basis, math.log(s)) for s in (start, end))
        else:
            low, high = (sum(c * s ** (k + 1) / (k + 1) for k, c in enumerate(basis)) for s in (start, end))
        weights.append(high - low)
    return weights


def _alternating(coefficients: list[float], u: float) -> float:
    """L - L' + L'' - … at u, of the polynomial L with these coefficients."""
    if not coefficients:
        return 0.0
    derivative = [k * c for k, c in enumerate(coefficients)][1:]
    return sum(c * u**k for k, c in enumerate(coefficients)) - _alternating(derivative, u)


def interleave(values: Array) -> Array:
    """(v0, v1, v1, v2, v2, …, vn, vn): each level but the first twice."""
    return np.append(values[:1], values[1:].repeat(2))


def heun(problem: Problem, i: int) -> Row:
    """Heun's method (Karras et al., algorithm 1): Euler's step, then again with the mean of the slopes at its ends."""
    s = problem.s
    if (i - problem.first) % 2 == 0:
        return _row(problem, i, s[i], a=1.0, b=(s[i + 1] - s[i],), keep=1.0)
    return _row(problem, i, s[i], p=1.0, b=((s[i] - s[i - 1]) / 2,) * 2)


def midpoint(problem: Problem, i: int, *, ancestral: bool = False) -> Row:
    """The midpoint method in log s (DPM-Solver-2, Lu et al. 2022, arXiv 2206.00927, in the form of k-diffusion).

    Euler's step goes to √(s s') (`problem.mids`), and the slope there serves the whole step. With `ancestral` the
    step and its midpoint go to the lower of the ancestral levels, and noise follows.
    """
    s, mids = problem.s, problem.mids
    if (i - problem.first) % 2 == 0:
        return _row(problem, i, s[i], a=1.0, b=(mids[i + 1] - s[i],), keep=1.0)
    down, up = ancestral_levels(s[i - 1], s[i]) if ancestral else (s[i], 0.0)
    return _row(problem, i, mids[i], p=1.0, b=(down - s[i - 1],), c=up, draw=float(ancestral))


def midpoint_ancestral(problem: Problem, i: int) -> Row:
    """`midpoint` with `ancestral` (k-diffusion's `dpm_2_ancestral`)."""
    return midpoint(problem, i, ancestral=True)


def midpoints(s: Array, *, ancestral: bool) -> Array:
    """√(s s') for each step between levels s (n + 1,), with s' the lower ancestral level if `ancestral`; (n,)."""
    ends = [ancestral_levels(*pair)[0] for pair in pairwise(s)] if ancestral else s[1:]
    return np.asarray(np.sqrt(s[:-1] * np.array(ends)))


def dpm_sde(problem: Problem, i: int, *, noise_scale: float = 1.0) -> Row:
    """DPM-Solver++ SDE of second order (arXiv 2211.01095; k-diffusion's `dpmpp_sde` with r = 1/2); m is x0.

    An ancestral step to √(s s'), then one over the whole interval with x0 from there:
    x' = (down/s) x + (1 - down/s) x0 + up z. A step to s' = 0 needs no midpoint.
    """
    second = (i - problem.first) % 2 == 1
    s, after = problem.s[i - second : i - second + 2]
    mid = problem.mids[i - second + 1]
    row = _row(problem, i, mid if second else s, m_x=0.0, m_x0=1.0, keep=float(not second))
    if after == 0:
        return row
    down, up = ancestral_levels(s, after if second else mid)
    factor = {"p" if second else "a": down / s}
    return row._replace(b=(1 - down / s,), c=up * noise_scale, draw=1.0, **factor)


# The plans: options, grid, and which of the above


class SigmaSpace(Plan):
    """Base of the plans that hold x/α."""

    in_sigma_space = True
    times_dtype: ClassVar[type[np.number[Any]]] = np.float32

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times, sigmas = self._levels_at(steps, **layout)
        return Grid(times, np.append(sigmas, 0.0))

    def _levels_at(
        self, steps: int, timesteps: Sequence[float] | None = None, num_train_timesteps: int | None = None
    ) -> tuple[Array, Array]:
        """Times, given or spaced, and their levels; or levels that the config spaces between the ends of those."""
        if timesteps is None:
            times = self._spaced(steps, num_train_timesteps)
        else:
            times = descending("timesteps", timesteps, len(self))
        times = times.astype(self.times_dtype)
        sigmas = self._schedule.sigma_at(times)
        return self._respaced(sigmas[0], sigmas[-1], steps) if self._spacing else (times, sigmas)


class EulerDiscrete(SigmaSpace):
    """Euler's method on noise levels (Karras et al. 2022, arXiv 2206.00364), with optional churn."""

    options = take(
        NOISE,
        "prediction_type interpolation_type",
        LEVELS,
        "sigma_min sigma_max timestep_spacing timestep_type steps_offset rescale_betas_zero_snr final_sigmas_type",
    )
    complete = True
    layouts = ("timesteps", "sigmas")
    solver = staticmethod(euler)

    def _visit(
        self, steps: int, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None, **_: Any
    ) -> Grid:
        if sigmas is not None:
            levels = descending("sigmas", sigmas, 2**16, level_end=True).astype(np.float32)
            return Grid(self._schedule.time_of(levels[:-1]), levels)
        times, levels = self._levels_at(steps, timesteps)
        if self.config.interpolation_type == "log_linear":  # over the whole schedule, whatever the times
            low, high = self._schedule.log_sigmas[[0, -1]]
            # Without a spacing, there is one level more than times, as published: no step reaches the last one.
            levels = np.exp(np.linspace(high, low, steps + 1))
            if self._spacing:
                times, levels = self._respaced(levels[0], levels[-1], steps)
        last = 0.0 if self.config.final_sigmas_type == "zero" else self._schedule.sigmas[0]
        return Grid(times, np.append(levels, last))

    def _set_grid(self, grid: Grid, steps: int | None) -> None:
        if self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction":
            # The UNet is told (log s)/4, as those of EDM are.
            grid = grid._replace(times=np.log(grid.sigmas[: len(grid.times)].astype(np.float32)) / 4)
        super()._set_grid(grid, steps)


class EulerAncestralDiscrete(SigmaSpace):
    """Euler's method to a lower noise level, then fresh noise up to the next one."""

    options = take(
        NOISE, "prediction_type timestep_spacing steps_offset rescale_betas_zero_snr", prediction_type=EPSILON_OR_V
    )
    complete = True
    solver = staticmethod(euler_ancestral)


class LMSDiscrete(SigmaSpace):
    """Linear multistep: Adams-Bashforth on uneven noise levels (k-diffusion's `lms`)."""

    options = take(NOISE, LEVELS, "prediction_type timestep_spacing steps_offset")
    solver = staticmethod(lms)

    def _start(self) -> None:
        super()._start()
        self.lay_out(len(self))


class TwoStage(SigmaSpace):
    """Base of the plans of order 2: a run of n steps has 2n - 1 evaluations, as the last step has but one."""

    order = 2
    layouts: ClassVar[tuple[str, ...]] = ("num_train_timesteps",)

    def _start(self) -> None:
        super()._start()
        self.lay_out(len(self))


class HeunDiscrete(TwoStage):
    """Heun's method on noise levels (Karras et al. 2022, arXiv 2206.00364, algorithm 1 without churn)."""

    options = take(
        NOISE,
        "prediction_type",
        LEVELS,
        "clip_sample clip_sample_range timestep_spacing steps_offset",
        **LATENT_DIFFUSION,
    )
    layouts = ("timesteps", "num_train_timesteps")
    solver = staticmethod(heun)

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times, sigmas = self._levels_at(steps, **layout)
        return Grid(interleave(times), np.append(interleave(sigmas), 0.0))


class KDPM2Discrete(TwoStage):
    """DPM-Solver-2 (arXiv 2206.00927) as in k-diffusion: the midpoint method in log s."""

    options = take(
        NOISE,
        LEVELS,
        "prediction_type timestep_spacing steps_offset",
        **LATENT_DIFFUSION,
        prediction_type=EPSILON_OR_V,
    )
    ancestral = False
    solver: ClassVar[Callable[..., Row]] = staticmethod(midpoint)

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times, sigmas = self._levels_at(steps, **layout)
        times = times.round() if self._spacing == "karras" else times
        ends = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
        mids = midpoints(ends, ancestral=self.ancestral)
        both = np.stack([self._schedule.time_of(mids[:-1]), times[1:]], axis=1).ravel()
        # Row 2k evaluates at level k, and row 2k + 1 at the midpoint after it.
        return Grid(np.append(times[:1], both), interleave(ends), np.append(0.0, mids.repeat(2)))


class KDPM2AncestralDiscrete(KDPM2Discrete):
    """DPM-Solver-2 to a lower noise level, then fresh noise up to the next one."""

    ancestral = True
    solver = staticmethod(midpoint_ancestral)


class DPMSolverSDE(TwoStage):
    """DPM-Solver++ SDE of second order (arXiv 2211.01095, as in k-diffusion), on one Brownian path; needs torchsde.

    The path depends on a seed alone, so more steps refine one image: `noise_sampler_seed` (one, or one for each
    sample), or else one that `step` draws from its generator for each sample.
    """

    options = take(
        NOISE,
        "prediction_type",
        LEVELS,
        "noise_sampler_seed timestep_spacing steps_offset",
        **LATENT_DIFFUSION,
        prediction_type=EPSILON_OR_V,
    )
    times_dtype = np.float64
    solver = staticmethod(dpm_sde)

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times, sigmas = self._levels_at(steps, **layout)
        between = self._schedule.time_of(np.sqrt(sigmas[:-1] * sigmas[1:]))
        both = np.append(times[:1], np.stack([between, times[1:]], axis=1).ravel())
        ends = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
        mids = midpoints(ends, ancestral=False)
        return Grid(both, np.append(interleave(sigmas), 0.0), np.append(0.0, mids.repeat(2)))

    def overlaps(self, first: int) -> Array:
        """Second rows go over the whole step on the path that the first went to its middle; see `Plan.overlaps`."""
        found, second, sigmas = super().overlaps(first), np.arange(first + 1, len(self.times), 2), self._grid.sigmas
        assert self._grid.mids is not None
        s, after = sigmas[second - 1], sigmas[second]
        found[1::2] = np.sqrt((s - self._grid.mids[second]) / (s - after))
        return found
