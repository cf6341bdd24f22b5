"""Solvers, each with its plan.

A solver is a function from a problem and the place of a row in its grid to the row, in floats: no state, no framework.
"""

from __future__ import annotations

from typing import Any

from sdedit.schedulers.rows import Row
from sdedit.schedulers.schedule import Problem


def x0_of(prediction: str, alpha: float, sigma: float) -> tuple[float, float]:
    """(p, q) such that x0 = p·x + q·output, for x = α x0 + σ ε with α² + σ² = 1.

    Args:
        prediction: "epsilon" is ε, "sample" is x0, "v_prediction" is v = α ε - σ x0 (arXiv 2202.00512);
            "flow_prediction" is ε - x0, where α + σ = 1 instead.
    """
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "flow_prediction":
        return 1.0, -sigma
    if prediction == "v_prediction":
        return alpha, -sigma
    if alpha == 0:
        raise ValueError(
            "prediction_type: at zero SNR (rescale_betas_zero_snr) noise predicted from noise says nothing of the "
            "image; the model must have prediction_type 'v_prediction' or 'sample', or timestep_spacing 'leading'"
        )
    return 1 / alpha, -sigma / alpha


def preserving(problem: Problem, i: int, alpha: float, sigma: float, **update: Any) -> Row:
    """Row of a solver whose sample is x = α x0 + σ ε, which the UNet sees as it is."""
    return Row(problem.times[i], *x0_of(problem.config["prediction_type"], alpha, sigma), **update)


def usable(problem: Problem, i: int, most: int) -> int:
    """How many levels, from that of row i back, differ each from the next; at most `most`, and none before the run.

    Levels coincide where a grid is as fine as the training steps and its times are rounded, and where it is longer than
    the schedule. No polynomial goes through two values at one level.
    """
    count, most = 1, min(most, i - problem.first + 1)
    while count < most and problem.s[i - count] != problem.s[i - count + 1]:
        count += 1
    return count


def levels(s: float, *, flow: bool = False) -> tuple[float, float]:
    """(α, σ) with σ/α = s and α² + σ² = 1; of flow matching, α + σ = 1."""
    alpha = 1 / (1 + s) if flow else (1 + s * s) ** -0.5
    return alpha, s * alpha
