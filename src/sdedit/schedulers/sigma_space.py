"""Plans that hold x/α, of k-diffusion's solvers: Euler, LMS, Heun, DPM-Solver-2, DPM++ SDE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from sdedit.schedulers.plan import Betas, Plan
from sdedit.schedulers.rows import Row
from sdedit.schedulers.schedule import Array, Grid, descending
from sdedit.schedulers.solvers import sigma_space as solvers


class Exploding(Plan):
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


# fmt: off


class EulerDiscrete(Exploding):
    """Euler's method on noise levels (Karras et al. 2022, arXiv 2206.00364), with optional churn."""

    layouts = ("timesteps", "sigmas")
    solver = staticmethod(solvers.euler)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, prediction_type: str = "epsilon",
        interpolation_type: str = "linear", use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False, sigma_min: float | None = None, sigma_max: float | None = None,
        timestep_spacing: str = "linspace", timestep_type: str = "discrete", steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False, final_sigmas_type: str = "zero",
    ) -> None:
        self._start(interpolation_type=("linear", "log_linear"), timestep_type=("discrete", "continuous"))

    def _visit(
        self, steps: int, timesteps: Sequence[float] | None = None, sigmas: Sequence[float] | None = None, **_: Any
    ) -> Grid:
        if sigmas is not None:
            levels = descending("sigmas", sigmas, 2**16).astype(np.float32)
            return Grid(self._schedule.time_of(levels[:-1]), levels)
        times, levels = self._levels_at(steps, timesteps)
        if self.config.interpolation_type == "log_linear" and not self._spacing:
            # One level more than times, as published: no step reaches the last one.
            low, high = self._schedule.log_sigmas[[0, -1]]
            levels = np.exp(np.linspace(high, low, steps + 1))
        last = 0.0 if self.config.final_sigmas_type == "zero" else self._schedule.sigmas[0]
        return Grid(times, np.append(levels, last))

    def _set_grid(self, grid: Grid, steps: int | None) -> None:
        if self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction":
            # The UNet is told (log s)/4, as those of EDM are.
            grid = grid._replace(times=np.log(grid.sigmas[: len(grid.times)].astype(np.float32)) / 4)
        super()._set_grid(grid, steps)


class EulerAncestralDiscrete(Exploding):
    """Euler's method to a lower noise level, then fresh noise up to the next one."""

    predictions = ("epsilon", "v_prediction")
    solver = staticmethod(solvers.euler_ancestral)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace", steps_offset: int = 0, rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._start()


class LMSDiscrete(Exploding):
    """Linear multistep: Adams-Bashforth on uneven noise levels (k-diffusion's `lms`)."""

    solver = staticmethod(solvers.lms)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False, prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace", steps_offset: int = 0,
    ) -> None:
        self._start()
        self.lay_out(num_train_timesteps)


class TwoStage(Exploding):
    """Base of the plans of order 2: a run of n steps has 2n - 1 evaluations, as the last step has but one."""

    order = 2
    layouts: ClassVar[tuple[str, ...]] = ("num_train_timesteps",)
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")


class HeunDiscrete(TwoStage):
    """Heun's method on noise levels (Karras et al. 2022, arXiv 2206.00364, algorithm 1 without churn)."""

    layouts = ("timesteps", "num_train_timesteps")
    predictions = ("epsilon", "sample", "v_prediction")
    solver = staticmethod(solvers.heun)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
        beta_schedule: str = "linear", trained_betas: Betas = None, prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False,
        clip_sample: bool = False, clip_sample_range: float = 1.0, timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._start()
        self.lay_out(num_train_timesteps)

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times, sigmas = self._levels_at(steps, **layout)
        return Grid(solvers.interleave(times), np.append(solvers.interleave(sigmas), 0.0))


class KDPM2Discrete(TwoStage):
    """DPM-Solver-2 (arXiv 2206.00927) as in k-diffusion: the midpoint method in log s."""

    ancestral = False
    solver: ClassVar[Callable[..., Row]] = staticmethod(solvers.midpoint)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
        beta_schedule: str = "linear", trained_betas: Betas = None, use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False, prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace", steps_offset: int = 0,
    ) -> None:
        self._start()
        self.lay_out(num_train_timesteps)

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times, sigmas = self._levels_at(steps, **layout)
        times = times.round() if self._spacing == "karras" else times
        ends = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
        mids = solvers.midpoints(ends, ancestral=self.ancestral)
        both = np.stack([self._schedule.time_of(mids[:-1]), times[1:]], axis=1).ravel()
        # Row 2k evaluates at level k, and row 2k + 1 at the midpoint after it.
        return Grid(np.append(times[:1], both), solvers.interleave(ends), np.append(0.0, mids.repeat(2)))


class KDPM2AncestralDiscrete(KDPM2Discrete):
    """DPM-Solver-2 to a lower noise level, then fresh noise up to the next one."""

    ancestral = True
    solver = staticmethod(solvers.midpoint_ancestral)


class DPMSolverSDE(TwoStage):
    """DPM-Solver++ SDE of second order (arXiv 2211.01095, as in k-diffusion), on one Brownian path; needs torchsde.

    The path depends on a seed alone, so more steps refine one image: `noise_sampler_seed` (one, or one for each
    sample), or else one that `step` draws from its generator for each sample.
    """

    times_dtype = np.float64
    solver = staticmethod(solvers.dpm_sde)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
        beta_schedule: str = "linear", trained_betas: Betas = None, prediction_type: str = "epsilon",
        use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False,
        noise_sampler_seed: int | Sequence[int] | None = None, timestep_spacing: str = "linspace",
        steps_offset: int = 0,
    ) -> None:
        self._start()
        self.lay_out(num_train_timesteps)

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times, sigmas = self._levels_at(steps, **layout)
        between = self._schedule.time_of(np.sqrt(sigmas[:-1] * sigmas[1:]))
        both = np.append(times[:1], np.stack([between, times[1:]], axis=1).ravel())
        ends = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
        mids = solvers.midpoints(ends, ancestral=False)
        return Grid(both, np.append(solvers.interleave(sigmas), 0.0), np.append(0.0, mids.repeat(2)))

    def overlaps(self, first: int) -> Array:
        """Second rows go over the whole step on the path that the first went to its middle; see `Plan.overlaps`."""
        found, second, sigmas = super().overlaps(first), np.arange(first + 1, len(self.times), 2), self._grid.sigmas
        assert self._grid.mids is not None
        s, after = sigmas[second - 1], sigmas[second]
        found[1::2] = np.sqrt((s - self._grid.mids[second]) / (s - after))
        return found
