"""The sixteen public schedulers for PyTorch: each a plan, which has its options, grid and solver, on tensors.

What is here is what `step` takes beside the prediction, and how noise is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdedit.noise import Generator
from sdedit.schedulers.base import Scheduler, SchedulerOutput, mix
from sdedit.schedulers.brownian import BrownianPath
from sdedit.schedulers.dropin import (
    DDIMDropIn,
    DDPMDropIn,
    DropInScheduler,
    LogSNRDropIn,
    PNDMDropIn,
    TrainingStepDropIn,
)
from sdedit.schedulers.rows import Row
from sdedit.schedulers.schedule import Grid
from sdedit.schedulers.solvers import log_snr, sigma_space, training_steps, unipc


class TrainingStepScheduler(TrainingStepDropIn):
    """Base of the schedulers whose times are training steps: any of them can be noised to, not those of a run alone."""

    def _start(self) -> None:
        super()._start()
        bar = self._schedule.alphas_cumprod
        self._levels = torch.from_numpy(np.stack([np.sqrt(bar), np.sqrt(1 - bar)]))  # (2, T): α, σ

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """ᾱ of the clean end, which the last step leads to, a scalar."""
        return torch.tensor(self._schedule.bar(-1), dtype=torch.float32)

    def _training_levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """α and σ at training steps (B,), each (B, 1, 1, 1), without reading the device."""
        self._levels = self._levels.to(like.device)
        alpha, sigma = self._levels[:, timesteps.to(like.device).long()].reshape(2, -1, *(1 for _ in like.shape[1:]))
        return alpha, sigma

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α x0 + σ ε at training steps `timesteps`, (B,) or (1,) in [0, T-1]; (B, C, H, W)."""
        alpha, sigma = self._training_levels(timesteps, original_samples)
        return mix(alpha, original_samples, sigma, noise)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = α ε - σ x0 (arXiv 2202.00512) at training steps `timesteps`, (B,) or (1,); (B, C, H, W)."""
        alpha, sigma = self._training_levels(timesteps, sample)
        return mix(alpha, noise, -sigma, sample)


class DDIMScheduler(DDIMDropIn, TrainingStepScheduler, training_steps.DDIM):
    """DDIM (arXiv 2010.02502)."""

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Any, ...]:
        """`Scheduler.step`, with options.

        Args:
            eta: Noise, from 0 (none) to 1 (as much as DDPM).
            use_clipped_model_output: Take the noise from the clipped x0 instead of from the UNet.
            generator: For the noise; or `variance_noise`, (B, C, H, W), the noise itself.
        """
        noise = (generator, variance_noise) if eta > 0 else ()
        options: dict[str, Any] = {"eta": float(eta), "clipped_noise": bool(use_clipped_model_output)}
        return self._advance(model_output, timestep, sample, return_dict, *noise, **options)


class DDPMScheduler(DDPMDropIn, TrainingStepScheduler, training_steps.DDPM):
    """DDPM's ancestral sampling (arXiv 2006.11239)."""

    step = Scheduler.noisy_step  # type: ignore[assignment]

    def parted(self, output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Scheduler.parted`."""
        prediction, said = super().parted(output, sample)
        if said is None and str(self.config.variance_type).startswith("learned"):
            raise ValueError(
                f"model_output: variance_type {self.config.variance_type!r} needs {2 * sample.shape[1]} channels"
            )
        return prediction, said

    def scaled_noise(self, noise: Tensor, said: Tensor, row: Row) -> Tensor:
        """See `Scheduler.scaled_noise`."""
        if self.config.variance_type == "learned":
            return noise * said**0.5
        # The UNet says where log σ² lies between those of fixed_small and fixed_large (arXiv 2102.09672, equation 15).
        bar, after = (self._schedule.bar(t) for t in (int(row.t), self.time_after(int(row.t))))
        high = math.log(1 - bar / after)
        low = math.log(max(training_steps.posterior_variance(bar, after), 1e-20))
        return noise * torch.exp((low + (said + 1) / 2 * (high - low)) / 2)


class PNDMScheduler(PNDMDropIn, TrainingStepScheduler, training_steps.PNDM):
    """PNDM, or PLMS (arXiv 2202.09778)."""


class LCMScheduler(TrainingStepScheduler, training_steps.LCM):
    """Sampling of latent consistency models (arXiv 2310.04378)."""

    step = Scheduler.noisy_step  # type: ignore[assignment]


class TCDScheduler(TrainingStepScheduler, training_steps.TCD):
    """Sampling of trajectory consistency models (arXiv 2402.19159)."""

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Any, ...]:
        """`Scheduler.step`, with `eta`, the paper's γ in [0, 1] (0 adds no noise), and `generator`, for the noise."""
        return self._advance(model_output, timestep, sample, return_dict, generator, eta=float(eta))


class EulerDiscreteScheduler(DropInScheduler, sigma_space.EulerDiscrete):
    """Euler's method, with optional churn (arXiv 2206.00364)."""

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Generator = None,
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


class EulerAncestralDiscreteScheduler(DropInScheduler, sigma_space.EulerAncestralDiscrete):
    """Euler's method with fresh noise in each step."""

    step = Scheduler.noisy_step  # type: ignore[assignment]


class LMSDiscreteScheduler(DropInScheduler, sigma_space.LMSDiscrete):
    """Linear multistep (k-diffusion's `lms`)."""

    def step(  # type: ignore[override]
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, order: int = 4, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Any, ...]:
        """`Scheduler.step`, with the `order` of the multistep formula, from 1."""
        if order < 1:
            raise ValueError(f"order: got {order}; expected 1 or more")
        return self._advance(model_output, timestep, sample, return_dict, order=int(order))


class HeunDiscreteScheduler(DropInScheduler, sigma_space.HeunDiscrete):
    """Heun's method (arXiv 2206.00364)."""


class KDPM2DiscreteScheduler(DropInScheduler, sigma_space.KDPM2Discrete):
    """DPM-Solver-2 as in k-diffusion (arXiv 2206.00927)."""


class KDPM2AncestralDiscreteScheduler(DropInScheduler, sigma_space.KDPM2AncestralDiscrete):
    """DPM-Solver-2 with fresh noise in each step."""

    step = Scheduler.noisy_step  # type: ignore[assignment]


class DPMSolverSDEScheduler(DropInScheduler, sigma_space.DPMSolverSDE):
    """DPM-Solver++ SDE on one Brownian path (arXiv 2211.01095); needs torchsde."""

    def _set_grid(self, grid: Grid, steps: int | None) -> None:
        super()._set_grid(grid, steps)
        self._path: BrownianPath | None = None

    def draw_noise(self, sample: Tensor, generator: Generator, index: int) -> Tensor:
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
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
        generator: Generator = None,
    ) -> SchedulerOutput | tuple[Any, ...]:
        """`Scheduler.noisy_step`, with `s_noise`, the scale of the noise."""
        return self._advance(model_output, timestep, sample, return_dict, generator, noise_scale=float(s_noise))


class DPMSolverMultistepScheduler(LogSNRDropIn, log_snr.DPMSolverMultistep):
    """DPM-Solver++, DPM-Solver or their SDE forms, multistep (arXiv 2211.01095)."""

    def step(  # type: ignore[override]
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Any, ...]:
        """`Scheduler.step`, with `generator` for the SDE forms' noise, or `variance_noise` (B, C, H, W) itself."""
        return self._advance(model_output, timestep, sample, return_dict, generator, variance_noise)


class DPMSolverSinglestepScheduler(LogSNRDropIn, log_snr.DPMSolverSinglestep):
    """DPM-Solver++, DPM-Solver or the SDE form, single-step (arXiv 2211.01095)."""

    step = Scheduler.noisy_step  # type: ignore[assignment]


class DEISMultistepScheduler(LogSNRDropIn, log_snr.DEISMultistep):
    """DEIS (arXiv 2204.13902)."""


class UniPCMultistepScheduler(LogSNRDropIn, unipc.UniPCMultistep):
    """UniPC (arXiv 2302.04867)."""
