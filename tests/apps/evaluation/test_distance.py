"""The kernel distance against its closed form for Gaussians, and the bootstrap against what it promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdedit.apps.evaluation.distance import (
    counts,
    distance_interval,
    kernel_distance,
    mean_interval,
    pair_terms,
    polynomial_kernel,
)


def gaussian_kernel_mean(m: np.ndarray, n: np.ndarray, s: float, t: float) -> float:
    """E (x·y/d + 1)³ for independent x ~ N(m, s²I), y ~ N(n, t²I) in d dimensions.

    With u = x·y/d: E u = m·n/d. Given y, x·y ~ N(m·y, s²|y|²), so E u² = E[(m·y)² + s²|y|²]/d² and
    E u³ = E[(m·y)³ + 3 (m·y) s²|y|²]/d³, with m·y ~ N(a, b), a = m·n, b = t²|m|², E|y|² = |n|² + d t² and
    E (m·y)|y|² = a (|n|² + d t²) + 2 t² a.
    """
    d, a, b = len(m), m @ n, t**2 * (m @ m)
    size = n @ n + d * t**2
    first = a / d
    second = (a**2 + b + s**2 * size) / d**2
    third = (a**3 + 3 * a * b + 3 * s**2 * (a * size + 2 * t**2 * a)) / d**3
    return first * 3 + second * 3 + third + 1


def gaussian_distance(m: np.ndarray, n: np.ndarray, s: float, t: float) -> float:
    return gaussian_kernel_mean(m, m, s, s) + gaussian_kernel_mean(n, n, t, t) - 2 * gaussian_kernel_mean(m, n, s, t)


CASES = [(0.0, 1.0, 1.0), (0.5, 1.0, 1.0), (0.0, 1.0, 1.5), (1.0, 0.7, 1.2)]


@pytest.mark.parametrize(("shift", "s", "t"), CASES)
@pytest.mark.parametrize("paired", [False, True])
def test_it_is_unbiased_for_gaussians(shift: float, s: float, t: float, paired: bool) -> None:
    """The mean over many small samples, also when y is made from x: a copy of its noise."""
    rng, d, size, repeats = np.random.default_rng(0), 4, 12, 3000
    m, n = np.full(d, 0.3), np.full(d, 0.3 + shift)
    values = []
    for _ in range(repeats):
        z = rng.normal(size=(size, d))
        values.append(kernel_distance(pair_terms(m + s * z, n + t * (z if paired else rng.normal(size=(size, d))))))
    error = np.std(values) / repeats**0.5
    truth, rounding = gaussian_distance(m, n, s, t), 1e-12  # of sums of numbers about 1; equal sets may be exactly at 0
    assert abs(np.mean(values) - truth) <= 4 * error + rounding
    assert truth == pytest.approx(0, abs=rounding) or truth > 20 * error


def test_the_closed_form_is_right() -> None:
    rng, m, n = np.random.default_rng(1), np.array([0.5, -0.2, 0.1]), np.array([0.1, 0.4, -0.6])
    x, y = m + 0.8 * rng.normal(size=(2000, 3)), n + 1.3 * rng.normal(size=(2000, 3))
    kernel = polynomial_kernel(x, y)
    assert kernel.mean() == pytest.approx(gaussian_kernel_mean(m, n, 0.8, 1.3), abs=4 * kernel.std() / 2000**0.5)


def test_a_set_is_at_no_distance_from_itself_and_order_does_not_matter() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 30, 5))
    assert kernel_distance(pair_terms(x, x)) == 0
    assert kernel_distance(pair_terms(x, y)) == pytest.approx(kernel_distance(pair_terms(y, x)))
    order = rng.permutation(30)
    assert kernel_distance(pair_terms(x[order], y[order])) == pytest.approx(kernel_distance(pair_terms(x, y)))


def test_it_is_kid_up_to_the_pairs() -> None:
    """Over unpaired sets the two-sample estimator of the paper differs by the terms k(x_i, y_i) alone."""
    x, y = np.random.default_rng(3).normal(size=(2, 20, 6))
    n, xx, yy, xy = 20, polynomial_kernel(x, x), polynomial_kernel(y, y), polynomial_kernel(x, y)
    within = (xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1))
    assert kernel_distance(pair_terms(x, y)) == pytest.approx(within - 2 * (xy.sum() - np.trace(xy)) / (n * (n - 1)))


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_a_bootstrap_sample_is_the_estimate_on_what_was_drawn(n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    terms, weights = pair_terms(*rng.normal(size=(2, n, 3))), counts(n, 50, seed)
    assert (weights.sum(1) == n).all()
    weights = weights[(weights > 0).sum(1) > 1]  # a sample of one picture n times has no pairs
    drawn = [np.repeat(np.arange(n), row.astype(int)) for row in weights]
    direct = []
    for chosen in drawn:
        other = chosen[:, None] != chosen
        direct.append(terms[np.ix_(chosen, chosen)][other].mean())
    low, high = distance_interval(terms, weights, level=1.0)
    assert (low, high) == pytest.approx((min(direct), max(direct)))


def test_intervals_cover_what_they_should() -> None:
    """95% intervals of 300 experiments hold the true value in about 95%: 4 deviations, and 3% for 60 pictures each."""
    rng, d = np.random.default_rng(4), 3
    m, n = np.zeros(d), np.full(d, 0.8)
    truth, weights, held, means = gaussian_distance(m, n, 1.0, 1.0), counts(60, 400), 0, 0
    for _ in range(300):
        x, y = m + rng.normal(size=(60, d)), n + rng.normal(size=(60, d))
        low, high = distance_interval(pair_terms(x, y), weights)
        held += low <= truth <= high
        low, high = mean_interval(y[:, 0], weights)
        means += low <= 0.8 <= high
    deviation = (0.95 * 0.05 / 300) ** 0.5
    for share in (held / 300, means / 300):
        assert 0.95 - 0.03 - 4 * deviation < share < 0.95 + 4 * deviation


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="expected as many of both"):
        pair_terms(np.zeros((3, 2)), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="at least two"):
        pair_terms(np.zeros((1, 2)), np.zeros((1, 2)))
