"""The kernel distance between two sets of features, means, and how sure both are.

The kernel distance is the squared maximum mean discrepancy with the kernel k(x, y) = (x·y/d + 1)³, as KID takes it of
the features of an Inception network (Bińkowski et al. 2018, arXiv 1801.01401). On other features it is another measure,
whose values cannot be compared with published KIDs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def polynomial_kernel(x: Array, y: Array) -> Array:
    """k(x_i, y_j) = (x_i·y_j/d + 1)³ of features (N, d) and (M, d): (N, M)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def pair_terms(x: Array, y: Array) -> Array:
    """h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) of pairs (x_i, y_i), (N, N), with zeros for i = j.

    Their mean over i ≠ j is unbiased for the squared distance (Gretton et al. 2012, lemma 6), also where y_i was made
    from x_i: nothing is ever compared with its own pair.
    """
    if x.shape != y.shape or len(x) < 2:
        raise ValueError(f"features of shapes {x.shape} and {y.shape}; expected as many of both, at least two")
    across = polynomial_kernel(x, y)
    terms = polynomial_kernel(x, x) + polynomial_kernel(y, y) - across - across.T
    np.fill_diagonal(terms, 0)
    return terms


def kernel_distance(terms: Array) -> float:
    """The squared distance, of `pair_terms`; an unbiased estimate may be a little below 0."""
    return float(terms.sum() / (len(terms) * (len(terms) - 1)))


def counts(n: int, draws: int, seed: int = 0) -> Array:
    """How often each of n pictures is in each of `draws` bootstrap samples of size n, (draws, n)."""
    return np.random.default_rng(seed).multinomial(n, [1 / n] * n, draws).astype(np.float64)


def distance_interval(terms: Array, weights: Array, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the kernel distance (percentiles), for pairs drawn `weights` times: see `counts`.

    A pair that was drawn twice is not compared with itself either, so the samples are no more biased than the estimate.
    """
    values = ((weights @ terms) * weights).sum(1) / (weights.sum(1) ** 2 - (weights**2).sum(1))
    return _percentiles(values, level)


def mean_interval(values: Array, weights: Array, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval (percentiles) of the mean of `values` (N,)."""
    return _percentiles(weights @ values / weights.sum(1), level)


def _percentiles(values: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
