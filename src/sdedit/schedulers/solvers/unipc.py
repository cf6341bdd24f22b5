"""UniPC (Zhao et al. 2023, arXiv 2302.04867): a predictor, and a corrector for the step before, in λ = log(α/σ)."""

from __future__ import annotations

import math

import numpy as np

from sdedit.schedulers.options import FLOW, LEVELS, NOISE, OR_FLOW, SHIFT, THRESHOLD, take
from sdedit.schedulers.rows import Row
from sdedit.schedulers.schedule import Array, Grid, Problem
from sdedit.schedulers.solvers import usable
from sdedit.schedulers.solvers.log_snr import LogSNR, alpha_sigma, row_of

# What this class takes for each value of an option whose name others share, so that the config of one makes another.
_UNIPC_FORMS = {"bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}


def unipc(problem: Problem, i: int) -> Row:
    """UniPC, algorithms 5 to 8, orders 1 to 3; m is x0, or ε.

    Predictor and corrector of a step share the factor of x, so the corrected sample is the sample plus the difference
    of their weights, on predictions alone. No earlier sample is needed, and a sample that was changed between steps
    (by a mask, a callback) keeps its change.
    """
    c, of_x0 = problem.config, problem.config["predict_x0"]
    (alpha, sigma), (alpha_after, sigma_after) = (
        alpha_sigma(problem, problem.s[i]),
        alpha_sigma(problem, problem.s[i + 1]),
    )
    a = sigma_after / sigma if of_x0 else alpha_after / alpha
    predicted = _unipc_weights(problem, i, _unipc_order(problem, i), correct=False)
    b = predicted
    if i > problem.first and i - 1 not in c["disable_corrector"] and problem.s[i] != problem.s[i - 1]:
        order = _unipc_order(problem, i - 1)
        change = _unipc_weights(problem, i - 1, order, correct=True)
        change[1:] -= _unipc_weights(problem, i - 1, order, correct=False)
        b = np.zeros(max(len(change), len(predicted)))
        b[: len(change)] += a * change
        b[: len(predicted)] += predicted
    return row_of(problem, i, of_x0=of_x0)._replace(a=a, b=tuple(b))


def _unipc_order(problem: Problem, i: int) -> int:
    """As `_order`, but falling to 1 at the end of runs of any length; a step of no length has order 1 too."""
    left = len(problem.times) - i if problem.config["lower_order_final"] else 3
    return 1 if problem.s[i + 1] in (0, problem.s[i]) else min(usable(problem, i, problem.config["solver_order"]), left)


def _unipc_weights(problem: Problem, i: int, order: int, *, correct: bool) -> Array:
    """Weights of the predictions, newest first, in the step from level i to level i + 1.

    With D_j = (m_j - m_0)/r_j, where r_j is the place of m_j in the step (0 its start, 1 its end), the weights of D_j
    solve Σ_j w_j r_j^(n-1) = n! z φ_(n+1)(z), n = 1, 2, …; a single w is B(h)/2 instead. z is -h for x0, h for ε.

    Args:
        correct: Use the prediction at the end of the step too; its weight comes first.
    """
    s, after, of_x0 = problem.s[i], problem.s[i + 1], problem.config["predict_x0"]
    alpha, sigma = alpha_sigma(problem, after)
    whole = alpha * (1 - after / s if of_x0 else after - s)
    if order == 1 and not correct:
        return np.array([whole])
    h = math.log(s / after)
    z, k = (-h, -alpha) if of_x0 else (h, -sigma)
    places = np.array([1.0] * correct + [math.log(s / problem.s[i - j]) / h for j in range(1, order)])
    right, rest = [], math.expm1(z)
    for n in range(1, len(places) + 1):
        rest = rest / z - 1 / math.factorial(n)
        right.append(math.factorial(n) * rest)
    found = np.linalg.solve(np.vander(places, increasing=True).T, np.array(right))
    if len(places) == 1:
        found = np.array([(z if problem.config["solver_type"] == "bh1" else math.expm1(z)) / 2])
    found = k * found / places
    return np.insert(found, int(correct), whole - found.sum())


class UniPCMultistep(LogSNR):
    """UniPC: predictor and corrector of the same order, 1 to 3 (arXiv 2302.04867)."""

    options = take(
        NOISE,
        "solver_order prediction_type",
        THRESHOLD,
        "predict_x0 solver_type lower_order_final disable_corrector",
        "solver_p",
        LEVELS,
        FLOW,
        "timestep_spacing steps_offset final_sigmas_type rescale_betas_zero_snr",
        SHIFT,
        "sigma_min sigma_max shift_terminal",
        solver_type="bh2",
        prediction_type=OR_FLOW,
    )
    solver = staticmethod(unipc)
    spacings_together = (("karras", "flow"),)

    def _start(self) -> None:
        super()._start()
        self._take("solver_type", _UNIPC_FORMS)
        self.threshold = self.threshold if self.config.predict_x0 else None

    def _last(self, sigmas: Array) -> float:
        own = self._spacing and self.config.final_sigmas_type == "sigma_min"
        return float(sigmas[-1]) if own else super()._last(sigmas)

    def _visit_flow(self, steps: int) -> Grid:
        if not self.config.use_karras_sigmas:
            return super()._visit_flow(steps)
        _, s = self._respaced(self._schedule.sigmas[-1], self._schedule.sigmas[0], steps)
        last = float(s[-1]) if self.config.final_sigmas_type == "sigma_min" else 0.0
        return Grid(s / (1 + s) * len(self), np.append(s, last))

    def _even_flow(self, steps: int) -> Array:
        return np.linspace(1, 1 / len(self), steps + 1)[:-1]
