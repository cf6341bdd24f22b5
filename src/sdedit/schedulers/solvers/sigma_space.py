"""Solvers that hold x/α = x0 + s ε: Euler, Heun, LMS and DPM-Solver-2, in the form of k-diffusion.

In the level s the probability-flow equation is dx/ds = (x - x0)/s = ε (Karras et al. 2022, arXiv 2206.00364), so m is
(x - x0)/s, and a first-order row is x' = x + (s' - s) m.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sdedit.schedulers.rows import Row
from sdedit.schedulers.schedule import Array, Run
from sdedit.schedulers.solvers import levels, x0_of


def _row(run: Run, i: int, s: float, **update: Any) -> Row:
    """Row at level s with m = (x - x0)/s; the UNet sees x, which is α times the sample."""
    alpha, sigma = levels(s)
    p, q = x0_of(run.config["prediction_type"], alpha, sigma)
    return Row(run.times[i], p * alpha, q, **{"scale": alpha, "m_x": 1 / s, "m_x0": -1 / s, **update})


def ancestral_levels(s: float, after: float) -> tuple[float, float]:
    """(down, up) with down² + up² = s'²: go down to `down` = s'²/s without noise, then add noise of scale `up`."""
    return after**2 / s, after * math.sqrt(max(s**2 - after**2, 0.0)) / s


def euler(
    run: Run, i: int, *, churn: float = 0.0, low: float = 0.0, high: float = math.inf, noise_scale: float = 1.0
) -> Row:
    """Euler's method, with the churn of Karras et al. (algorithm 2, without its second-order correction).

    Where s is in [low, high], noise first raises s to ŝ = (1 + γ) s, γ = min(churn / N, √2 - 1). x0 is then taken at
    ŝ from ε, but at s from v: as published.
    """
    s, after = run.s[i : i + 2]
    gamma = min(churn / (len(run.s) - 1), math.sqrt(2) - 1) if low <= s <= high else 0.0
    raised = s * (1 + gamma)
    noise = {"churn": noise_scale * math.sqrt(raised**2 - s**2), "draw": 1.0} if gamma > 0 else {}
    row = _row(run, i, s, a=1.0, b=(after - raised,), m_x=1 / raised, m_x0=-1 / raised, **noise)
    return row._replace(x0_out=-raised) if run.config["prediction_type"] == "epsilon" else row


def euler_ancestral(run: Run, i: int) -> Row:
    """Euler's method down to the lower of the ancestral levels, then fresh noise (k-diffusion's `euler_ancestral`)."""
    down, up = ancestral_levels(*run.s[i : i + 2])
    return _row(run, i, run.s[i], a=1.0, b=(down - run.s[i],), c=up, draw=1.0)


def lms(run: Run, i: int, *, order: int = 4) -> Row:
    """Linear multistep (k-diffusion's `lms`): integrate the polynomial in s through the last slopes.

    The order follows the row's place in the whole grid. In a run that starts late, the first rows leave out slopes
    that were never computed, and the weights of the others do not sum to s' - s. So it is in diffusers 0.42.1, whose
    numbers these are; tests/schedulers/test_gaussian.py measures what it costs.
    """
    weights = lagrange_integrals(run.s[max(i + 1 - order, 0) : i + 1][::-1], *run.s[i : i + 2])
    return _row(run, i, run.s[i], a=1.0, b=tuple(weights[: i - run.first + 1]))


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


def heun(run: Run, i: int) -> Row:
    """Heun's method (Karras et al., algorithm 1): Euler's step, then again with the mean of the slopes at its ends."""
    s = run.s
    if (i - run.first) % 2 == 0:
        return _row(run, i, s[i], a=1.0, b=(s[i + 1] - s[i],), keep=1.0)
    return _row(run, i, s[i], p=1.0, b=((s[i] - s[i - 1]) / 2,) * 2)


def midpoint(run: Run, i: int, *, ancestral: bool = False) -> Row:
    """The midpoint method in log s (DPM-Solver-2, Lu et al. 2022, arXiv 2206.00927, in the form of k-diffusion).

    Euler's step goes to √(s s') (`run.mids`), and the slope there serves the whole step. With `ancestral` the step and
    its midpoint go to the lower of the ancestral levels, and noise follows.
    """
    s, mids = run.s, run.mids
    if (i - run.first) % 2 == 0:
        return _row(run, i, s[i], a=1.0, b=(mids[i + 1] - s[i],), keep=1.0)
    down, up = ancestral_levels(s[i - 1], s[i]) if ancestral else (s[i], 0.0)
    return _row(run, i, mids[i], p=1.0, b=(down - s[i - 1],), c=up, draw=float(ancestral))


def midpoint_ancestral(run: Run, i: int) -> Row:
    """`midpoint` with `ancestral` (k-diffusion's `dpm_2_ancestral`)."""
    return midpoint(run, i, ancestral=True)


def midpoints(s: Array, *, ancestral: bool) -> Array:
    """√(s s') for each step between levels s (n + 1,), with s' the lower ancestral level if `ancestral`; (n,)."""
    ends = [ancestral_levels(*pair)[0] for pair in pairwise(s)] if ancestral else s[1:]
    return np.asarray(np.sqrt(s[:-1] * np.array(ends)))


def dpm_sde(run: Run, i: int, *, noise_scale: float = 1.0) -> Row:
    """DPM-Solver++ SDE of second order (arXiv 2211.01095; k-diffusion's `dpmpp_sde` with r = 1/2); m is x0.

    An ancestral step to √(s s'), then one over the whole interval with x0 from there:
    x' = (down/s) x + (1 - down/s) x0 + up z. A step to s' = 0 needs no midpoint.
    """
    second = (i - run.first) % 2 == 1
    s, after = run.s[i - second : i - second + 2]
    mid = run.mids[i - second + 1]
    row = _row(run, i, mid if second else s, m_x=0.0, m_x0=1.0, keep=float(not second))
    if after == 0:
        return row
    down, up = ancestral_levels(s, after if second else mid)
    factor = {"p" if second else "a": down / s}
    return row._replace(b=(1 - down / s,), c=up * noise_scale, draw=1.0, **factor)
