"""Exponential integrators in λ = log(α/σ): DPM-Solver, DPM-Solver++, their SDE forms, and DEIS; `unipc` has UniPC.

In λ the probability-flow equation has an exact linear part (Lu et al. 2022, arXiv 2206.00927 and 2211.01095), so a
step of h = λ' - λ is a factor times x plus an integral of the prediction m, which is expanded in δ/h: D0 + D1 δ/h + ….
With φ1 = (e^z - 1)/z and φ2 = (e^z - 1 - z)/z²,

    x' = a x + k [z φ1 D0 + (φ1 - 1) D1 + (φ2 - 1/2) D2] + c z

| algorithm       | m  | a         | k    | z   | c                |
|-----------------|----|-----------|------|-----|------------------|
| dpmsolver       | ε  | α'/α      | -σ'  | h   | 0                |
| dpmsolver++     | x0 | σ'/σ      | -α'  | -h  | 0                |
| sde-dpmsolver   | ε  | α'/α      | -2σ' | h   | σ' √(e^2h - 1)   |
| sde-dpmsolver++ | x0 | e^-h σ'/σ | -α'  | -2h | σ' √(1 - e^-2h)  |

The midpoint form of second order takes (z φ1)/2 in place of φ1 - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdedit.schedulers.options import FLOW, LEVELS, NOISE, OR_FLOW, SHIFT, THRESHOLD, take
from sdedit.schedulers.plan import Plan
from sdedit.schedulers.rows import Row
from sdedit.schedulers.schedule import Array, Grid, Problem, check, descending
from sdedit.schedulers.solvers import levels, preserving, usable
from sdedit.schedulers.solvers.sigma_space import lagrange_integrals


def row_of(problem: Problem, i: int, *, of_x0: bool) -> Row:
    """Row with m = x0 if `of_x0`, else m = ε; no update yet."""
    alpha, sigma = alpha_sigma(problem, problem.s[i])
    return preserving(
        problem, i, alpha, sigma, **({"m_x0": 1.0} if of_x0 else {"m_x": 1 / sigma, "m_x0": -alpha / sigma})
    )


def alpha_sigma(problem: Problem, s: float) -> tuple[float, float]:
    """(α, σ) at the level s = σ/α."""
    return levels(s, flow=problem.config["use_flow_sigmas"])


def _order(problem: Problem, i: int, *, euler_at_final: bool = False) -> int:
    """Order of row i: what the history allows; 1 where the step leads to s = 0; 2, then 1 at the end of a short run."""
    left, c = len(problem.times) - i, problem.config
    allowed = left if c["lower_order_final"] and len(problem.times) < 15 and left <= 2 else c["solver_order"]
    if problem.s[i + 1] in (0, problem.s[i]) or (euler_at_final and left == 1):
        return 1
    return min(usable(problem, i, problem.config["solver_order"]), allowed)


def phi2(z: float) -> float:
    """(e^z - 1 - z)/z², by its series where the difference would cancel."""
    if abs(z) < 1e-2:
        return 1 / 2 + z / 6 + z**2 / 24 + z**3 / 120 + z**4 / 720
    return (math.expm1(z) - z) / z**2


def _dpm(problem: Problem, i: int, s: float, expansion: Array, *, anchored: bool = False, **update: float) -> Row:
    """The row of a DPM-Solver step from level s, where the sample is, or the anchor.

    Args:
        expansion: (order, predictions), D0, D1 … as combinations of predictions.
    """
    algorithm, after = problem.config["algorithm_type"], problem.s[i + 1]
    (alpha, sigma), (alpha_after, sigma_after) = alpha_sigma(problem, s), alpha_sigma(problem, after)
    shrink = after / s  # e^-h; 0 for the step to s = 0, where h is infinite
    stochastic, of_x0 = algorithm.startswith("sde"), algorithm.endswith("++")
    if of_x0:
        power = shrink**2 if stochastic else shrink  # e^z
        a, k = sigma_after / sigma * (shrink if stochastic else 1), -alpha_after
    else:
        a, k, power = alpha_after / alpha, -sigma_after * (2 if stochastic else 1), 1 / shrink
    weights = k * (power - 1) * expansion[0]
    if len(expansion) == 2 and problem.config["solver_type"] == "midpoint":
        weights = weights + k * (power - 1) / 2 * expansion[1]
    elif len(expansion) >= 2:
        z = math.log(power)
        weights = weights + k * ((math.expm1(z) / z if z else 1) - 1) * expansion[1]
        if len(expansion) == 3:
            # As published. But the integral of D2 (δ/h)² is twice this, so that multistep "order 3" converges at order
            # 2; and in the SDE form the sign of 1/2 keeps the term from vanishing with h, and the variance diverges.
            # Both are measured, and the term that mends them named, in tests/schedulers/test_gaussian.py.
            weights = weights + k * (phi2(z) + (1 / 2 if stochastic else -1 / 2)) * expansion[2]
    if stochastic:
        c = sigma_after * math.sqrt(max(1 - shrink**2, 0.0)) / (1 if of_x0 else shrink)
        update |= {"c": c, "draw": 1.0}
    return row_of(problem, i, of_x0=of_x0)._replace(b=tuple(weights), **{"p" if anchored else "a": a}, **update)


def dpm_multistep(problem: Problem, i: int) -> Row:
    """DPM-Solver with the predictions of earlier steps as its history, orders 1 to 3."""
    order = _order(problem, i, euler_at_final=problem.config["euler_at_final"])
    m = np.eye(order)
    if order == 1:
        return _dpm(problem, i, problem.s[i], m)
    h = [math.log(problem.s[j] / problem.s[j + 1]) for j in range(i, i - order, -1)]  # of this step, the one before, …
    near = (m[0] - m[1]) * h[0] / h[1]
    if order == 2:
        return _dpm(problem, i, problem.s[i], np.stack([m[0], near]))
    bend = near - (m[1] - m[2]) * h[0] / h[2]
    return _dpm(
        problem, i, problem.s[i], np.stack([m[0], near + h[1] / (h[1] + h[2]) * bend, h[0] / (h[1] + h[2]) * bend])
    )


def singlestep_orders(steps: int, order: int, *, lower_order_final: bool, to_zero: bool) -> list[int]:
    """Order of each row: blocks of 1, 2, … `order`, in which each row starts from the block's first sample.

    Args:
        lower_order_final: Let the last row start a block of its own where it would end one.
        to_zero: The last row leads to s = 0 and so is of first order.
    """
    orders = [i % order + 1 for i in range(steps)]
    if to_zero or (lower_order_final and orders[-1] == order):
        orders[-1] = 1
    return orders


def dpm_singlestep(problem: Problem, i: int) -> Row:
    """DPM-Solver whose steps of order 2 and 3 span two or three levels of the grid, each evaluated once."""
    c = problem.config
    to_zero = c["final_sigmas_type"] == "zero"
    orders = singlestep_orders(
        problem.steps, c["solver_order"], lower_order_final=c["lower_order_final"], to_zero=to_zero
    )
    order = min(orders[i], i - problem.first + 1)
    start = problem.s[i - order + 1]  # the anchor's level, then those of the rows since
    m = np.eye(order)[::-1]  # m[0] is the oldest prediction
    if order == 1:
        return _dpm(problem, i, start, m, keep=1.0)
    if len({*problem.s[i - order + 1 : i + 1]}) < order:  # two levels that it looks back at coincide
        return _dpm(problem, i, start, m[-1:], anchored=True)
    h = math.log(start / problem.s[i + 1])
    r = [math.log(start / problem.s[j]) / h for j in range(i - order + 1, i + 1)]
    far = (m[-1] - m[0]) / r[-1]
    expansion = [m[0], far]
    if order == 3 and c["solver_type"] == "midpoint":
        expansion.append(0 * far)
    elif order == 3:
        near = (m[1] - m[0]) / r[1]
        expansion = [m[0], (r[2] * near - r[1] * far) / (r[2] - r[1]), 2 * (far - near) / (r[2] - r[1])]
    return _dpm(problem, i, start, np.stack(expansion), anchored=True)


def deis(problem: Problem, i: int) -> Row:
    """DEIS with polynomials in log ρ, ρ = σ/α (Zhang and Chen 2022, arXiv 2204.13902, section 3.3); m is ε.

    x'/α' = x/α + Σ_j b_j m_j, where b_j is the integral over ρ of the Lagrange polynomial of m_j.
    """
    nodes = problem.s[i - _order(problem, i) + 1 : i + 1][::-1]
    weights = lagrange_integrals(nodes, problem.s[i], problem.s[i + 1], log=True)
    alpha, after = alpha_sigma(problem, problem.s[i])[0], alpha_sigma(problem, problem.s[i + 1])[0]
    return row_of(problem, i, of_x0=False)._replace(a=after / alpha, b=tuple(after * w for w in weights))


# The plans: options, grid, and which of the above


# Options whose names these classes share and whose values they do not: what a class takes for each value, so that the
# config of one makes another.
_DPM_FORMS = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
_DEIS_FORMS = dict.fromkeys(_DPM_FORMS, "logrho")
_DEIS_ALGORITHMS = dict.fromkeys(("deis", "dpmsolver", "dpmsolver++"), "deis")


class LogSNR(Plan):
    """Base of the plans that integrate in λ and hold α x0 + σ ε."""

    x0_field = None

    def _start(self) -> None:
        super()._start()
        if self.config.prediction_type == "flow_prediction" and not self._flows:
            raise ValueError("prediction_type: 'flow_prediction' needs use_flow_sigmas=True")

    def _take(self, name: str, meant: dict[str, str]) -> str:
        """Check an option and replace a value that is another class's."""
        value = meant[check(name, self.config[name], meant)]
        if value != self.config[name]:
            self.register_to_config(**{name: value})
        return value

    def _take_dpm(self, *algorithms: str) -> None:
        """Check the options that the DPM-Solver classes share."""
        algorithm = self._take("algorithm_type", {"deis": "dpmsolver++", **{name: name for name in algorithms}})
        self._take("solver_type", _DPM_FORMS)
        check("solver_order", self.config.solver_order, (1, 2) if algorithm == "sde-dpmsolver" else (1, 2, 3))
        if self.config.final_sigmas_type == "zero" and not algorithm.endswith("++"):
            raise ValueError(
                f"final_sigmas_type: 'zero' needs an algorithm_type that predicts x0 ('dpmsolver++', "
                f"'sde-dpmsolver++'); with {algorithm!r} it must be 'sigma_min'"
            )

    def _visit(self, steps: int, timesteps: Sequence[int] | None = None, **layout: Any) -> Grid:
        if self._flows:
            return self._visit_flow(steps)
        times = self._laid(steps) if timesteps is None else descending("timesteps", timesteps, len(self))
        sigmas, table = self._schedule.sigma_at(times), self._schedule.sigmas
        if self._spacing:
            times, sigmas = self._respaced(table[-1], table[0], steps)
            times = times.round() if self._rounds() else times  # the rest is cut off in the conversion to integers
        return Grid(times, np.append(sigmas, self._last(sigmas)))

    @property
    def _flows(self) -> bool:
        return bool(self.config.use_flow_sigmas)

    def _visit_flow(self, steps: int) -> Grid:
        """The grid of flow matching: σ runs over [0, 1], and the time is T σ."""
        shift, count = self.config.flow_shift, len(self)
        sigmas = self._even_flow(steps)
        sigmas = (shift * sigmas / (1 + (shift - 1) * sigmas)).clip(max=1 - 1e-6)  # s = σ/(1 - σ) stays finite
        ends = np.append(sigmas, self._last(sigmas)).astype(np.float32).astype(np.float64)
        return Grid(sigmas * count, ends / (1 - ends))

    def _even_flow(self, steps: int) -> Array:
        """σ before the shift, (steps,)."""
        return np.asarray(1 - np.linspace(1, 1 / len(self), steps + 1)[:0:-1])

    def levels(self, places: Sequence[int]) -> tuple[Array, Array]:
        """See `Plan.levels`; of flow matching, the weights sum to 1."""
        if not self._flows:
            return super().levels(places)
        s = self._grid.sigmas[list(places)]
        return 1 / (1 + s), s / (1 + s)

    @property
    def sigmas_shown(self) -> Array:
        """See `Plan.sigmas_shown`; of flow matching, σ itself."""
        return self._grid.sigmas / (1 + self._grid.sigmas) if self._flows else super().sigmas_shown

    def _laid(self, steps: int) -> Array:
        """Times that leave the last of `steps` + 1 for the end."""
        spare = 0 if self.config.timestep_spacing == "trailing" else 1
        return self._spaced(steps, last=self._below_clipped(), spare=spare).round()

    def _last(self, sigmas: Array) -> float:
        """Level that the last step leads to."""
        return 0.0 if self.config.final_sigmas_type == "zero" else float(self._schedule.sigmas[0])

    def _rounds(self) -> bool:
        return self._spacing == "karras"

    def _below_clipped(self) -> int:
        """Number of training steps whose λ is at least `config.lambda_min_clipped`."""
        least = self.config.lambda_min_clipped if "lambda_min_clipped" in self._own else -math.inf
        return len(self) - int(np.searchsorted(-self._schedule.log_sigmas[::-1], least))


class DPMSolverMultistep(LogSNR):
    """DPM-Solver++, DPM-Solver or their SDE forms, with earlier predictions as history (arXiv 2211.01095)."""

    options = take(
        NOISE,
        "solver_order prediction_type",
        THRESHOLD,
        "algorithm_type solver_type lower_order_final euler_at_final",
        LEVELS,
        "use_lu_lambdas",
        FLOW,
        "final_sigmas_type lambda_min_clipped variance_type timestep_spacing",
        "steps_offset rescale_betas_zero_snr",
        SHIFT,
        prediction_type=OR_FLOW,
    )
    layouts = ("timesteps",)
    solver = staticmethod(dpm_multistep)

    def _start(self) -> None:
        super()._start()
        self._take_dpm("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")

    def _rounds(self) -> bool:
        return self._spacing in ("karras", "lu") and self.config.beta_schedule != "squaredcos_cap_v2"


class DPMSolverSinglestep(LogSNR):
    """DPM-Solver++, DPM-Solver or the SDE form, in steps that span several levels (arXiv 2211.01095)."""

    options = take(
        NOISE,
        "solver_order prediction_type",
        THRESHOLD,
        "algorithm_type solver_type lower_order_final",
        LEVELS,
        FLOW,
        "final_sigmas_type lambda_min_clipped variance_type",
        SHIFT,
        lower_order_final=False,
        prediction_type=OR_FLOW,
    )
    layouts = ("timesteps",)
    solver = staticmethod(dpm_singlestep)

    def _start(self) -> None:
        super()._start()
        self._take_dpm("dpmsolver", "dpmsolver++", "sde-dpmsolver++")

    def _visit(self, steps: int, timesteps: Sequence[int] | None = None, **layout: Any) -> Grid:
        c = self.config
        if steps % c.solver_order or c.final_sigmas_type == "zero":  # neither ends with a step of full order
            self.register_to_config(lower_order_final=True)
        return super()._visit(steps, timesteps, **layout)

    def _laid(self, steps: int) -> Array:
        return np.asarray(np.linspace(0, self._below_clipped() - 1, steps + 1).round()[:0:-1])


class DEISMultistep(LogSNR):
    """DEIS: exponential integrator with a polynomial in log(σ/α) through the last predictions (arXiv 2204.13902)."""

    options = take(
        NOISE,
        "solver_order prediction_type",
        THRESHOLD,
        "algorithm_type solver_type lower_order_final",
        LEVELS,
        FLOW,
        "timestep_spacing steps_offset",
        SHIFT,
        algorithm_type="deis",
        solver_type="logrho",
        prediction_type=OR_FLOW,
    )
    solver = staticmethod(deis)

    def _start(self) -> None:
        super()._start()
        self._take("algorithm_type", _DEIS_ALGORITHMS)
        self._take("solver_type", _DEIS_FORMS)

    def _last(self, sigmas: Array) -> float:
        return float(sigmas[-1] if self._spacing else self._schedule.sigmas[0])
