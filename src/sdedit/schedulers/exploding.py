"""Schedulers that hold x/α, of k-diffusion's solvers: Euler, LMS, Heun, DPM-Solver-2, DPM++ SDE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sdedit.noise import Generator
from sdedit.schedulers.base import Betas, Scheduler, SchedulerOutput
from sdedit.schedulers.rows import Row
from sdedit.schedulers.schedule import Array, Grid, descending
from sdedit.schedulers.solvers import exploding as solvers


class ExplodingScheduler(Scheduler):
    """Base of the schedulers that hold x/α."""

    exploding = True
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


class EulerDiscreteScheduler(ExplodingScheduler):
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

    def _set_grid(self, grid: Grid, steps: int | None, device: Any) -> None:
        if self.config.timestep_type == "continuous" and self.config.prediction_type == "v_prediction":
            # The UNet is told (log s)/4, as those of EDM are.
            grid = grid._replace(times=np.log(grid.sigmas[: len(grid.times)].astype(np.float32)) / 4)
        super()._set_grid(grid, steps, device)

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, s_churn: float = 0.0,
        s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0, generator: Generator = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Any, ...]:
        """`Scheduler.step`, with options.

        Args:
            s_churn: How far noise raises the level before each step whose level is in [`s_tmin`, `s_tmax`].
            s_noise: Scale of that noise.
            generator: For that noise.
        """
        options: dict[str, Any] = {}
        if s_churn:
            options = {"churn": s_churn, "low": float(s_tmin), "high": float(s_tmax), "noise_scale": float(s_noise)}
        return self._advance(model_output, timestep, sample, return_dict, generator, **options)


class EulerAncestralDiscreteScheduler(ExplodingScheduler):
    """Euler's method to a lower noise level, then fresh noise up to the next one."""

    predictions = ("epsilon", "v_prediction")
    solver = staticmethod(solvers.euler_ancestral)
    step = Scheduler.noisy_step  # type: ignore[assignment]

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace", steps_offset: int = 0, rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._start()


class LMSDiscreteScheduler(ExplodingScheduler):
    """Linear multistep: Adams-Bashforth on uneven noise levels (k-diffusion's `lms`)."""

    solver = staticmethod(solvers.lms)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False, prediction_type: str = "epsilon",
        timestep_spacing: str = "linspace", steps_offset: int = 0,
    ) -> None:
        self._start()
        self.set_timesteps(num_train_timesteps)

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Any, ...]:
        """`Scheduler.step`, with the `order` of the multistep formula, from 1."""
        if order < 1:
            raise ValueError(f"order: got {order}; expected 1 or more")
        return self._advance(model_output, timestep, sample, return_dict, order=int(order))


class TwoStageScheduler(ExplodingScheduler):
    """Base of the schedulers of order 2: a run of n steps has 2n - 1 evaluations, as the last step has but one."""

    order = 2
    layouts: ClassVar[tuple[str, ...]] = ("num_train_timesteps",)
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "v_prediction")


class HeunDiscreteScheduler(TwoStageScheduler):
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
        self.set_timesteps(num_train_timesteps)

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times, sigmas = self._levels_at(steps, **layout)
        return Grid(solvers.interleave(times), np.append(solvers.interleave(sigmas), 0.0))


class KDPM2DiscreteScheduler(TwoStageScheduler):
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
        self.set_timesteps(num_train_timesteps)

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times, sigmas = self._levels_at(steps, **layout)
        times = times.round() if self._spacing == "karras" else times
        ends = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
        mids = solvers.midpoints(ends, ancestral=self.ancestral)
        both = np.stack([self._schedule.time_of(mids[:-1]), times[1:]], axis=1).ravel()
        # Row 2k evaluates at level k, and row 2k + 1 at the midpoint after it.
        return Grid(np.append(times[:1], both), solvers.interleave(ends), np.append(0.0, mids.repeat(2)))


class KDPM2AncestralDiscreteScheduler(KDPM2DiscreteScheduler):
    """DPM-Solver-2 to a lower noise level, then fresh noise up to the next one."""

    ancestral = True
    solver = staticmethod(solvers.midpoint_ancestral)
    step = Scheduler.noisy_step  # type: ignore[assignment]


class DPMSolverSDEScheduler(TwoStageScheduler):
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
        self.set_timesteps(num_train_timesteps)

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times, sigmas = self._levels_at(steps, **layout)
        mids = self._schedule.time_of(np.sqrt(sigmas[:-1] * sigmas[1:]))
        both = np.append(times[:1], np.stack([mids, times[1:]], axis=1).ravel())
        return Grid(both, np.append(solvers.interleave(sigmas), 0.0))

    def _set_grid(self, grid: Grid, steps: int | None, device: Any) -> None:
        super()._set_grid(grid, steps, device)
        self._path: BrownianPath | None = None

    def draw_noise(self, sample: Tensor, generator: Generator, index: int, said: Tensor | None = None) -> Tensor:
        """Increment of the path over the row of `timesteps[index]`, (B, C, H, W), with variance 1."""
        if self._path is None:
            self._path = BrownianPath(sample.shape, self.sigmas, self._seed(len(sample), generator))
        second = (index - (self._first if self._begin is None else self._begin)) % 2
        # The path is rough: levels that differ in the last bit give other noise. So it is asked for at levels that
        # went through float32 logarithms and back, as it always was.
        log = self.sigmas[index - second : index - second + 2].log().neg()
        end = log[1] if second else log[0] + (log[1] - log[0]) * 0.5
        return self._path(log[0].neg().exp(), end.neg().exp()).to(sample.device)

    def _seed(self, count: int, generator: Generator) -> int | Sequence[int]:
        if self.config.noise_sampler_seed is not None:
            return self.config.noise_sampler_seed  # type: ignore[no-any-return]
        each = generator if isinstance(generator, Sequence) else [generator] * count
        return [int(torch.randint(2**63 - 1, (), generator=g, device=g.device if g else "cpu")) for g in each]

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True,
        s_noise: float = 1.0, generator: Generator = None,
    ) -> SchedulerOutput | tuple[Any, ...]:
        """`Scheduler.noisy_step`, with `s_noise`, the scale of the noise."""
        return self._advance(model_output, timestep, sample, return_dict, generator, noise_scale=float(s_noise))


class BrownianPath:
    """A Brownian path over the levels s of a run, or one for each sample, from torchsde's tree, on the CPU.

    Args:
        shape: Of the noise, (B, C, H, W).
        sigmas: The levels.
        seed: One, or one for each sample.
    """

    def __init__(self, shape: Sequence[int], sigmas: Tensor, seed: int | Sequence[int]) -> None:
        try:
            import torchsde  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError("DPMSolverSDEScheduler needs torchsde for its noise: pip install torchsde") from None
        self._one = isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if not self._one and len(seeds) != shape[0]:
            raise ValueError(f"noise_sampler_seed: got {seeds}; expected one, or one for each of {shape[0]} samples")
        # torchsde rounds the ends of the path to its tolerance, and warns of what is asked for beyond them.
        self._ends = round(float(sigmas[sigmas > 0].min()), 6), round(float(sigmas.max()), 6)
        size = tuple(shape) if self._one else tuple(shape[1:])
        self._paths = [
            torchsde.BrownianInterval(
                t0=self._ends[0], t1=self._ends[1], size=size, dtype=torch.float32, device="cpu",
                entropy=one, tol=1e-6, pool_size=24, halfway_tree=True,
            )
            for one in seeds
        ]

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        """Standard normal noise (B, C, H, W) of a step down from s = `start` to `end`, scalars on the CPU."""
        low, high = max(float(end), self._ends[0]), min(float(start), self._ends[1])
        drawn = [-path(low, high) / (start - end).sqrt() for path in self._paths]
        return drawn[0] if self._one else torch.stack(drawn)
