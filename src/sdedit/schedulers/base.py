"""A plan that steps in PyTorch: what all sixteen public schedulers share beside their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdedit.noise import Generator, randn
from sdedit.output import Output
from sdedit.schedulers import rows as row_functions
from sdedit.schedulers import schedule as s
from sdedit.schedulers.plan import Plan
from sdedit.schedulers.rows import Memory, Row

Device = torch.device | str | None


@dataclass
class SchedulerOutput(Output):
    """What `step` returns; fields that a solver does not give are `None` and left out of the tuple.

    Attributes:
        prev_sample: (B, C, H, W), the sample at the next, less noisy time.
        pred_original_sample: (B, C, H, W), the clean image predicted in this step.
        denoised: The same for LCM, after its boundary condition.
        pred_noised_sample: For TCD, the sample before noise is added.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None
    denoised: Tensor | None = None
    pred_noised_sample: Tensor | None = None


class Scheduler(Plan):
    """Base of the schedulers: the part of a plan that works on tensors.

    A run is `set_timesteps`, then for each of `timesteps`: `scale_model_input`, the UNet, and `step`. To start late
    (image-to-image), call `set_begin_index(i)` and take `timesteps[i:]`, with i a multiple of `order`. After
    `set_begin_index`, no method reads a value from the device.

    Attributes:
        timesteps: (N,) times that the UNet is told, falling.
        sigmas: Levels σ/α between which the solver moves, float32 on the CPU.
        num_inference_steps: What `set_timesteps` was asked for, or `None`.
        betas: (T,), alphas_cumprod: (T,), the noise schedule; T is `config.num_train_timesteps`.
        order: Evaluations of the UNet for each step.
    """

    timesteps: Tensor
    sigmas: Tensor

    def _start(self) -> None:
        super()._start()
        bar = self._schedule.alphas_cumprod
        self.betas = torch.from_numpy(self._schedule.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.from_numpy(bar.astype(np.float32))

    # Time grids

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        **layout: Any,
    ) -> None:
        """Choose the times of a run.

        Args:
            num_inference_steps: How many steps.
            device: Where `timesteps` goes.
            timesteps: Falling times of one's own, instead of a number.
            sigmas: Falling levels σ/α of one's own that end with 0, instead of a number.
            **layout: Further options; `layouts` of the class names those that it takes, and says whether it takes
                `timesteps` and `sigmas`.
        """
        own = {k: _as_array(v) for k, v in {"timesteps": timesteps, "sigmas": sigmas}.items()}
        self.lay_out(num_inference_steps, **own, **layout)
        self.timesteps = self.timesteps.to(device)

    def _set_grid(self, grid: s.Grid, steps: int | None) -> None:
        super()._set_grid(grid, steps)
        self.timesteps = torch.from_numpy(self._grid.times)
        self.sigmas = torch.from_numpy(self.sigmas_shown.astype(np.float32))
        self._begin: int | None = None
        self._rewind()

    # The run

    @property
    def begin_index(self) -> int | None:
        """Where the run starts in `timesteps`, or `None` if `set_begin_index` was not called."""
        return self._begin

    @property
    def step_index(self) -> int | None:
        """Place of the next step in `timesteps`, or `None` before the first one."""
        return self._index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run at `timesteps[begin_index]`, with nothing remembered."""
        if not 0 <= begin_index < len(self._grid.times):
            raise ValueError(f"begin_index: got {begin_index}; expected 0 to {len(self._grid.times) - 1}")
        self._begin = begin_index
        self._rewind()

    def _rewind(self) -> None:
        self._index: int | None = None
        self._first = 0
        self._memory = Memory()

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Place of a time in `timesteps`; of its second appearance if there are several. Reads the device."""
        times = None if schedule_timesteps is None else schedule_timesteps.cpu().numpy()
        return self.place_of(float(timestep), times)

    def _enter(self, timestep: float | Tensor | None) -> int:
        """Place of the row for this step; looked up only where nothing else says it."""
        if self._index is None:
            if self._begin is None and timestep is None:
                raise ValueError("timestep: needed where set_begin_index was not called; got None")
            self._index = self.index_for_timestep(timestep) if self._begin is None else self._begin  # type: ignore[arg-type]
            self._first = 0 if self.memoryless else self._index
        if self._index >= len(self._grid.times):
            raise ValueError("step: the run has ended; call set_timesteps, or set_begin_index to run it again")
        return self._index

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Any, ...]:
        """One step: from `sample` at `timestep` to the next time.

        Args:
            model_output: (B, C, H, W), the UNet's prediction for `scale_model_input(sample)` at `timestep`.
            timestep: One of `timesteps`, in order.
            sample: (B, C, H, W), the noisy latents; over α in the classes of k-diffusion's solvers.
            return_dict: Return a `SchedulerOutput`, or a tuple of its fields.
        """
        return self._advance(model_output, timestep, sample, return_dict)

    def noisy_step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generator = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Any, ...]:
        """`step` of the schedulers that add noise, drawn with `generator`: one, or one for each sample."""
        return self._advance(model_output, timestep, sample, return_dict, generator)

    def _advance(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool,
        generator: Generator = None,
        noise: Tensor | None = None,
        **options: Any,
    ) -> SchedulerOutput | tuple[Any, ...]:
        """`step` of every scheduler: the row, its noise, the update, the counter."""
        if self.num_inference_steps is None and not self.complete:
            raise ValueError("step: call set_timesteps(num_inference_steps) first")
        if noise is not None and generator is not None:
            raise ValueError("generator, variance_noise: got both; expected one of them")
        index, row = self._row_for(timestep, **options)
        # Half precision is for the UNet; sums over many steps are kept in float32.
        dtype = torch.promote_types(sample.dtype, torch.float32)
        output, said = self.parted(model_output, sample)
        if row.draw and noise is None:
            noise = self.draw_noise(sample, generator, index)
            noise = noise if said is None else self.scaled_noise(noise, said, row)
        x, x0, m, self._memory = row_functions.step(
            row,
            sample.to(dtype),
            output.to(dtype),
            self._memory,
            None if noise is None else noise.to(sample.device, dtype),
            threshold=self.threshold,
            want_x0=self.x0_field is not None,
            xp=torch,
        )
        self._index = index + 1 if index >= 0 else None
        fields = {self.x0_field: x0, self.m_field: m}
        out = SchedulerOutput(x.to(sample.dtype), **{k: v.to(sample.dtype) for k, v in fields.items() if k})
        return out if return_dict else out.to_tuple()

    def _row_for(self, timestep: float | Tensor, **options: Any) -> tuple[int, Row]:
        """The place in `timesteps` and the row of this step; -1 where the row is that of a time, wherever it stands."""
        if self.memoryless and self._begin is None:
            time = float(timestep)
            if not time.is_integer():
                raise ValueError(f"timestep: got {time}; expected a whole number")
            return -1, self.row_of(int(time), **options)
        index = self._enter(timestep)
        return index, self.rows(self._first, **options)[index - self._first]

    def parted(self, output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction, and what the UNet says of its variance in as many further channels, if it was made to."""
        kind = self.config.variance_type if "variance_type" in self._own else None
        if str(kind).startswith("learned") and output.shape[1] == 2 * sample.shape[1]:
            prediction, said = output.chunk(2, dim=1)
            return prediction, said
        return output, None

    def draw_noise(self, sample: Tensor, generator: Generator, index: int) -> Tensor:
        """Noise for the row of `timesteps[index]`, (B, C, H, W)."""
        return randn(sample.shape, generator, device=sample.device)

    def scaled_noise(self, noise: Tensor, said: Tensor, row: Row) -> Tensor:
        """Noise (B, C, H, W) as what the UNet says of its variance, in as many channels, makes it for `row`."""
        return noise

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the UNet is to see of the sample: x itself, also where the sample is x/α; (B, C, H, W) both."""
        if not self.in_sigma_space:
            return sample
        index = self._enter(timestep)
        return sample * self.rows(self._first)[index - self._first].scale

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """α x0 + σ ε, or x0 + (σ/α) ε in schedulers that hold x/α, at the noise level of `timesteps`.

        After `set_begin_index`, the level is that of the next step, whatever `timesteps` says (as in diffusers).

        Args:
            original_samples: (B, C, H, W), x0.
            noise: (B, C, H, W), ε.
            timesteps: (B,) of this scheduler's `timesteps`, or (1,) for all samples.
        """
        at = self._index if self._index is not None else self._begin
        places = [self.index_for_timestep(t) for t in timesteps] if self._begin is None else [at]
        signal, level = self.levels(places)  # type: ignore[arg-type]
        if len(level) == 1:  # plain numbers need no copy to the device
            return mix(float(signal[0]), original_samples, float(level[0]), noise)
        shape = (-1, *(1 for _ in original_samples.shape[1:]))
        p, q = (torch.from_numpy(v).to(original_samples.device).reshape(shape) for v in (signal, level))
        return mix(p, original_samples, q, noise)


def _as_array(values: Any) -> Any:
    """A tensor of any device and dtype in NumPy, and all else as it is."""
    return values.detach().cpu().double().numpy() if isinstance(values, Tensor) else values


def mix(p: float | Tensor, x: Tensor, q: float | Tensor, y: Tensor) -> Tensor:
    """p·x + q·y, computed in float32 or better, in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    p, q = (v.to(wide) if isinstance(v, Tensor) else v for v in (p, q))
    return (p * x.to(wide) + q * y.to(x.device, wide)).to(x.dtype)
