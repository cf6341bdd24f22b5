"""Noise schedules and time grids in NumPy: how noisy an image is at each training step, and which steps to visit.

A schedule is ᾱ(t) for t = 0 … T-1; a noisy latent is α x0 + σ ε with α = √ᾱ(t), σ = √(1 - ᾱ(t)). Levels of noise are
also counted as s = σ/α (`sigmas`, as k-diffusion does). The tables are rounded to float32, as those that the
published models were trained with; all else is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
SPACINGS = ("linspace", "leading", "trailing")


def check(name: str, value: Any, allowed: Collection[Any]) -> Any:
    """Give back `value`, or raise a `ValueError` that names the argument, the value and those that exist."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; expected one of {', '.join(map(repr, allowed))}")
    return value


class Schedule:
    """ᾱ(t) of a variance-preserving diffusion over T training steps.

    Attributes:
        betas: (T,) share of the variance that step t replaces by noise, float32.
        alphas_cumprod: (T,) ᾱ(t) = Π (1 - β), falling from almost 1 to almost 0.
        sigmas: (T,) s(t) = √((1 - ᾱ)/ᾱ), rising.
    """

    def __init__(self, betas: Array, *, clean_end: bool = True, keep_signal: bool = False) -> None:
        self.betas = betas
        bar = _bars(betas)
        if keep_signal:
            bar[-1] = 2**-24  # solvers divide by α: of zero SNR at the end, leave what float32 resolves
        with np.errstate(
            divide="ignore", invalid="ignore"
        ):  # s is infinite at zero SNR, which only solvers without s use
            sigmas = np.sqrt((1 - bar) / bar)
            self.log_sigmas = np.log(sigmas)
        self.alphas_cumprod, self.sigmas = bar.astype(np.float64), sigmas.astype(np.float64)
        self._end = 1.0 if clean_end else float(bar[0])

    def bar(self, t: int) -> float:
        """ᾱ(t), and that of the clean end for t < 0."""
        if t >= len(self.betas):
            raise ValueError(
                f"timestep {t}: the model was trained on 0 to {len(self.betas) - 1}; use fewer steps or steps_offset=0"
            )
        return float(self.alphas_cumprod[t]) if t >= 0 else self._end

    def sigma_at(self, times: Array) -> Array:
        """s at times that may lie between two training steps, by linear interpolation."""
        return np.interp(times, np.arange(len(self.sigmas)), self.sigmas)

    def time_of(self, sigmas: Array) -> Array:
        """The times of levels s, by linear interpolation in log s; clamped to the training range."""
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), self.log_sigmas, np.arange(len(self.sigmas)))


class Grid(NamedTuple):
    """The times that a run visits, and the levels that its solver moves between.

    Attributes:
        times: (N,) time that the UNet is told at each evaluation.
        sigmas: (N + 1,) level s of each evaluation, and where the last one leads to.
        mids: (N + 1,) of solvers that evaluate between two levels: where.
    """

    times: Array
    sigmas: Array
    mids: Array | None = None


class Problem(NamedTuple):
    """What a solver is given: the schedule, the scheduler's config, and the grid from `first` on; see `Grid`."""

    schedule: Schedule
    config: Mapping[str, Any]
    steps: int
    first: int
    times: list[Any]
    s: list[float]
    mids: list[float]


def _bars(betas: Array) -> Array:
    """ᾱ, (T,) float32. Summed in float64, as PyTorch does; in float32 the end would be off by 1e-6."""
    return np.cumprod((np.float32(1) - betas).astype(np.float64)).astype(np.float32)


def make_betas(kind: str, start: float, end: float, count: int) -> Array:
    """β(t) for t = 0 … `count` - 1, float32 (count,)."""
    if kind == "linear":  # DDPM, arXiv 2006.11239
        return _ramp(start, end, count)
    if kind == "scaled_linear":  # latent diffusion, arXiv 2112.10752: linear in √β
        return np.asarray(_ramp(start**0.5, end**0.5, count) ** 2)
    if kind == "sigmoid":  # GeoDiff, arXiv 2203.02923
        return np.asarray(start + (end - start) / (1 + np.exp(-_ramp(-6, 6, count))), dtype=np.float32)
    bar = _BARS_OF_TIME[check("beta_schedule", kind, BETA_SCHEDULES)]
    levels = np.array([bar(i / count) for i in range(count + 1)])
    return np.minimum(1 - levels[1:] / levels[:-1], 0.999).astype(np.float32)


def given_betas(betas: Any) -> Array:
    """β of one's own, (T,), as float32; a `ValueError` where they are not finite numbers."""
    try:
        given = np.asarray(betas, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"trained_betas: expected finite numbers; {error}") from None
    if given.ndim != 1 or not len(given):
        raise ValueError(f"trained_betas: got shape {given.shape}; expected (num_train_timesteps,)")
    if not np.isfinite(given).all():
        first = int(np.argmin(np.isfinite(given)))
        raise ValueError(f"trained_betas: got {given[first]} at place {first}; expected finite numbers")
    return given


def _ramp(start: float, end: float, count: int) -> Array:
    """`count` even steps from `start` to `end`, float32, to the last bit as PyTorch makes them: from both ends inwards.

    The last bit matters to the noise of `DPMSolverSDEScheduler` alone, a path of which σ is the time.
    """
    low, high = np.float32(start), np.float32(end)
    stride, i = np.float64((high - low) / np.float32(max(count - 1, 1))), np.arange(count)
    return np.where(i < count // 2, low + stride * i, high - stride * (count - 1 - i)).astype(np.float32)


def _laplace(u: float) -> float:
    """√(SNR/(1 + SNR)), where log SNR has a Laplace distribution (arXiv 2407.03297)."""
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6))
    return math.sqrt(snr / (1 + snr))


# ᾱ as a function of u = t/T in [0, 1].
_BARS_OF_TIME: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2,  # arXiv 2102.09672
    "exp": lambda u: math.exp(-12 * u),
    "laplace": _laplace,
}
BETA_SCHEDULES = ("linear", "scaled_linear", "sigmoid", *_BARS_OF_TIME)


def zero_terminal_snr(betas: Array) -> Array:
    """Shift and stretch √ᾱ so that it ends at 0 and its start stays (arXiv 2305.08891, algorithm 1); (T,) → (T,)."""
    root = np.sqrt(_bars(betas))
    bar = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
    return np.concatenate([1 - bar[:1], 1 - bar[1:] / bar[:-1]])


def squeezed_betas(alphas_cumprod: Array, factor: float) -> Array:
    """β of the schedule ᾱ'(t) = ᾱ(factor·t), which takes T steps to the noise level that ᾱ has at factor·T.

    Between two training steps, log SNR is interpolated. (T,) float64 → (T,) float32; 0 < factor < 1.
    """
    bar = np.maximum(alphas_cumprod, 2**-24)
    times = np.arange(len(bar))
    snr = np.exp(np.interp(times * factor, times, np.log(bar / (1 - bar))))
    squeezed = snr / (1 + snr)
    return np.asarray(1 - squeezed / np.append(1.0, squeezed[:-1]), dtype=np.float32)


def space_times(spacing: str, steps: int, train_steps: int, *, offset: int = 0, last: int = 0, spare: int = 0) -> Array:
    """`steps` times over [0, T-1], falling, (steps,) float64 (arXiv 2305.08891, table 2).

    Args:
        spacing: "linspace" takes both ends; "leading" takes multiples of T // steps from 0 up, and so never the
            noisiest time; "trailing" takes multiples of T / steps from T down.
        offset: Added to the times of "leading".
        last: Use only the times below it, if it is not 0.
        spare: Lay out so many more times and leave them off at the clean end ("trailing" has none).
    """
    end, laid = last or train_steps, steps + spare
    if spacing == "linspace":
        return np.linspace(0, end - 1, laid)[::-1][:steps]
    if spacing == "trailing":
        # The cut matters for 61 steps and 61 other counts, where a rounding error gives `arange` a time of -1 too many.
        return np.arange(end, 0, -train_steps / steps).round()[:steps] - 1
    if end < laid:
        raise ValueError(f"num_inference_steps: {steps} do not fit in the {end} that the model was trained on")
    return (np.arange(laid) * (end // laid))[::-1][:steps].astype(np.float64) + offset


def space_sigmas(spacing: str, high: float, low: float, steps: int) -> Array:
    """`steps` levels of noise from `high` down to `low`, both included, (steps,).

    "karras" is even in s^(1/7) (arXiv 2206.00364, equation 5), "exponential" and "lu" (arXiv 2206.00927) in log s;
    "beta" follows a Beta(0.6, 0.6) distribution, denser at both ends (arXiv 2407.12173).
    """
    ramp = np.linspace(0, 1, steps)
    if spacing == "karras":
        return np.asarray((high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7)
    if spacing == "beta":
        return low + (high - low) * symmetric_beta_quantile(1 - ramp)
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def symmetric_beta_quantile(p: Array, a: float = 0.6) -> Array:
    """Quantile function of the Beta(a, a) distribution, (n,) in [0, 1] → (n,).

    On [0, 1/2] the factor (1 - x)^(a-1) of the density is its binomial series, so the integral is Σ c_k x^(k+a),
    which Newton's method inverts; the other half is its mirror image.
    """
    k = np.arange(60)
    c = np.cumprod(np.concatenate([[1.0], (k[:-1] + 1 - a) / (k[:-1] + 1)])) / (k + a)
    target = np.minimum(p, 1 - p) * 2 * (c * 0.5 ** (k + a)).sum()
    x = (target * a) ** (1 / a)
    for _ in range(20):
        excess = (c * x[:, None] ** (k + a)).sum(-1) - target
        x = np.clip(x - excess * (x * (1 - x)) ** (1 - a), 0, 0.5)
    return np.where(p <= 0.5, x, 1 - x)


def descending(name: str, given: Sequence[float], below: int, *, level_end: bool = False) -> Array:
    """Times or levels of one's own as an array; they must fall, in [0, below).

    Args:
        level_end: The last step may lead nowhere.
    """
    found = np.asarray(given)
    steps = np.diff(found)[: -1 if level_end else None]
    if found.ndim != 1 or not len(found) or (steps >= 0).any() or not 0 <= found[-1] <= found[0] < below:
        raise ValueError(f"{name}: expected falling numbers in [0, {below}); got {found.tolist()}")
    return found
