"""What all schedulers share: a config, a time grid, the rows made from it, and a counter."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from sdedit.config import Configurable
from sdedit.noise import Generator, randn
from sdedit.output import Output
from sdedit.schedulers import rows as row_functions
from sdedit.schedulers import schedule as s
from sdedit.schedulers.names import CLASS_NAMES, resolve
from sdedit.schedulers.rows import Memory, Row

Device = torch.device | str | None
Betas = Sequence[float] | np.ndarray[Any, Any] | None

# Values that options of several classes may have. Those of flow matching, which Stable Diffusion has none of, are
# accepted where they turn it off.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "beta_schedule": s.BETA_SCHEDULES,
    "timestep_spacing": s.SPACINGS,
    "final_sigmas_type": ("zero", "sigma_min"),
    "use_flow_sigmas": (False,),
    "flow_shift": (1.0,),
    "use_dynamic_shifting": (False,),
    "time_shift_type": ("exponential",),
    "shift_terminal": (None,),
}
_SIGMA_FLAGS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}


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


class Scheduler(Configurable):
    """Base of the schedulers: a subclass gives its options (`__init__`), its grid (`_visit`) and its `solver`.

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

    config_name = "scheduler_config.json"
    order: ClassVar[int] = 1
    solver: ClassVar[Callable[..., Row]]
    predictions: ClassVar[tuple[str, ...]] = ("epsilon", "sample", "v_prediction")
    layouts: ClassVar[tuple[str, ...]] = ()  # what `set_timesteps` takes beside the number and the device
    exploding: ClassVar[bool] = False  # the sample is x/α
    memoryless: ClassVar[bool] = False  # no row needs those before it, so `step` takes any of the timesteps
    complete: ClassVar[bool] = False  # `step` works without `set_timesteps`, over all training steps
    keep_signal: ClassVar[bool] = True  # the solver divides by α, so zero SNR is kept just above zero
    bounded: ClassVar[bool] = True  # x0 can be clipped or thresholded
    times_dtype: ClassVar[type[np.number[Any]]] = np.int64
    x0_field: ClassVar[str | None] = "pred_original_sample"  # which field of the output x0 goes to
    m_field: ClassVar[str | None] = None  # and m

    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None
    threshold: tuple[float, float] | None  # (ratio, bound) of dynamic thresholding, if it is on

    def _start(self, **allowed: tuple[Any, ...]) -> None:
        """Check the recorded config and build the noise schedule; what every `__init__` does."""
        c, self._own = self.config, frozenset(inspect.signature(type(self).__init__).parameters) - {"self"}
        for name, values in (_ALLOWED | {"prediction_type": self.predictions} | allowed).items():
            if name in self._own:
                s.check(name, c[name], values)
        self._spacing = self._sigma_spacing()
        count = c.num_train_timesteps
        betas = np.asarray(c.trained_betas, dtype=np.float32) if c.trained_betas is not None else None
        if betas is None:
            betas = s.make_betas(c.beta_schedule, c.beta_start, c.beta_end, count)
        elif betas.shape != (count,):
            raise ValueError(f"trained_betas: got shape {betas.shape}; num_train_timesteps asks for ({count},)")
        zero_snr = c.get("rescale_betas_zero_snr", False) and "rescale_betas_zero_snr" in self._own
        self._schedule = s.Schedule(
            s.zero_terminal_snr(betas) if zero_snr else betas,
            clean_end=c.set_alpha_to_one if "set_alpha_to_one" in self._own else True,
            keep_signal=zero_snr and self.keep_signal,
        )
        bar = self._schedule.alphas_cumprod
        self.betas = torch.from_numpy(self._schedule.betas)
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.from_numpy(bar.astype(np.float32))
        self._levels = torch.from_numpy(np.stack([np.sqrt(bar), np.sqrt(1 - bar)]))  # (2, T): α, σ
        own = {k: c[k] for k in self._own} if self.bounded else {}
        self.threshold = (c.dynamic_thresholding_ratio, c.sample_max_value) if own.get("thresholding") else None
        self._clip = c.clip_sample_range if own.get("clip_sample") and not self.threshold else math.inf
        self._set_grid(s.Grid(np.arange(count)[::-1], np.append(self._schedule.sigmas[::-1], 0.0)), None, None)

    def _sigma_spacing(self) -> str | None:
        """Which of "karras", "exponential", "beta" and "lu" the config asks for, if any."""
        asked = [kind for kind, flag in _SIGMA_FLAGS.items() if flag in self._own and self.config[flag]]
        if len(asked) > 1:
            raise ValueError(f"{', '.join(_SIGMA_FLAGS[k] for k in asked)}: at most one of these can be True")
        return asked[0] if asked else None

    # Time grids

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
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
        layout |= {"timesteps": timesteps, "sigmas": sigmas}
        given = {k: v for k, v in layout.items() if v is not None}
        if refused := sorted(set(given) - set(self.layouts)):
            known = ", ".join(("num_inference_steps", "device", *self.layouts))
            raise ValueError(f"{', '.join(refused)}: {type(self).__name__}.set_timesteps takes {known}")
        own = [v for v in (timesteps, sigmas) if v is not None]
        if len(own) + (num_inference_steps is not None) != 1:
            raise ValueError("set_timesteps: expected one of num_inference_steps, and timesteps or sigmas where taken")
        if own and self._spacing:
            raise ValueError(f"timesteps, sigmas: cannot be set, {_SIGMA_FLAGS[self._spacing]} chooses them")
        steps = num_inference_steps if num_inference_steps is not None else len(own[0]) - (sigmas is not None)
        if steps < 1:
            raise ValueError(f"num_inference_steps: got {steps}; expected 1 or more")
        self._set_grid(self._visit(int(steps), **given), int(steps), device)

    def _visit(self, steps: int, **layout: Any) -> s.Grid:
        """The grid of a run of `steps`."""
        raise NotImplementedError

    def _set_grid(self, grid: s.Grid, steps: int | None, device: Device) -> None:
        """Make `grid` the next run's."""
        sigmas = grid.sigmas.astype(np.float32)
        self._grid = grid._replace(times=grid.times.astype(self.times_dtype), sigmas=sigmas.astype(np.float64))
        self.num_inference_steps = steps
        self.timesteps = torch.from_numpy(self._grid.times).to(device)
        self.sigmas = torch.from_numpy(sigmas)
        self._solved: dict[Any, list[Row]] = {}
        self._begin: int | None = None
        self._rewind()

    def _spaced(self, steps: int, train_steps: int | None = None, **layout: int) -> s.Array:
        """Times by `config.timestep_spacing`, (steps,)."""
        c = self.config
        return s.space_times(
            c.timestep_spacing, steps, train_steps or c.num_train_timesteps, offset=c.steps_offset, **layout
        )

    def _respaced(self, high: float, low: float, steps: int) -> tuple[s.Array, s.Array]:
        """(times, sigmas) by the config's spacing of levels, from `high` to `low` or between the config's own ends."""
        assert self._spacing is not None
        low, high = self.config.get("sigma_min") or low, self.config.get("sigma_max") or high
        sigmas = s.space_sigmas(self._spacing, high, low, steps)
        return self._schedule.time_of(sigmas), sigmas

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
        times = self._grid.times if schedule_timesteps is None else schedule_timesteps.cpu().numpy()
        found = np.flatnonzero(times == times.dtype.type(float(timestep)))
        if not len(found):
            raise ValueError(f"timestep: {float(timestep)} is not among this scheduler's timesteps {times.tolist()}")
        return int(found[min(1, len(found) - 1)])

    def _enter(self, timestep: float | Tensor | None) -> int:
        """Place of the row for this step; looked up only where nothing else says it."""
        if self._index is None or (self.memoryless and self._begin is None):
            if self._begin is None and timestep is None:
                raise ValueError("timestep: needed where set_begin_index was not called; got None")
            self._index = self.index_for_timestep(timestep) if self._begin is None else self._begin  # type: ignore[arg-type]
            self._first = 0 if self.memoryless else self._index
        if self._index >= len(self._grid.times):
            raise ValueError("step: the run has ended; call set_timesteps, or set_begin_index to run it again")
        return self._index

    def rows(self, first: int = 0, **options: Any) -> list[Row]:
        """Rows of a run that starts at `timesteps[first]`, in floats; `rows.table` makes arrays of them.

        Args:
            first: Where the run starts.
            **options: Those of the class's solver.
        """
        key = (first, *sorted(options.items()))
        if key not in self._solved:
            grid, steps = self._grid, self.num_inference_steps or len(self._grid.times)
            mids = [] if grid.mids is None else grid.mids.tolist()
            run = s.Run(self._schedule, self.config, steps, first, grid.times.tolist(), grid.sigmas.tolist(), mids)
            solved = [type(self).solver(run, i, **options) for i in range(first, len(run.times))]
            self._solved[key] = row_functions.finish(
                solved, clip=self._clip, threshold=self.threshold is not None, keep_m=self.m_field is not None
            )
        return self._solved[key]

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
        index = self._enter(timestep)
        row = self.rows(self._first, **options)[index - self._first]
        # Half precision is for the UNet; sums over many steps are kept in float32.
        dtype = torch.promote_types(sample.dtype, torch.float32)
        output, said = self._parted(model_output, sample)
        if row.draw and noise is None:
            noise = self.draw_noise(sample, generator, index, said)
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
        self._index = index + 1
        fields = {self.x0_field: x0, self.m_field: m}
        out = SchedulerOutput(x.to(sample.dtype), **{k: v.to(sample.dtype) for k, v in fields.items() if k})
        return out if return_dict else out.to_tuple()

    def _parted(self, output: Tensor, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction, and what the UNet says of its variance in as many further channels, if it was made to."""
        kind = self.config.variance_type if "variance_type" in self._own else None
        if str(kind).startswith("learned") and output.shape[1] == 2 * sample.shape[1]:
            prediction, said = output.chunk(2, dim=1)
            return prediction, said
        return output, None

    def draw_noise(self, sample: Tensor, generator: Generator, index: int, said: Tensor | None = None) -> Tensor:
        """Noise for the row of `timesteps[index]`, (B, C, H, W); `said` is what the UNet says of its variance."""
        return randn(sample.shape, generator, device=sample.device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the UNet is to see of the sample: x itself, also where the sample is x/α; (B, C, H, W) both."""
        if not self.exploding:
            return sample
        index = self._enter(timestep)
        return sample * self.rows(self._first)[index - self._first].scale

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that a run from nothing starts with."""
        most = float(self._grid.sigmas.max()) if self.exploding else 1.0
        ends = not self.exploding or self.config.timestep_spacing in ("linspace", "trailing")
        return most if ends else math.sqrt(most**2 + 1)

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
        levels = self._grid.sigmas[places]  # type: ignore[index]
        alpha = np.ones_like(levels) if self.exploding else (1 + levels**2) ** -0.5
        if len(levels) == 1:  # plain numbers need no copy to the device
            return mix(float(alpha[0]), original_samples, float(levels[0] * alpha[0]), noise)
        shape = (-1, *(1 for _ in original_samples.shape[1:]))
        p, q = (torch.from_numpy(v).to(original_samples.device).reshape(shape) for v in (alpha, levels * alpha))
        return mix(p, original_samples, q, noise)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # Configs

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes that this scheduler's config can make."""
        return [resolve(name) for name in CLASS_NAMES]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **overrides: Any
    ) -> Self:
        """Make one from a folder or hub id, of whichever class; `overrides` are options, or arguments for the hub."""
        from sdedit.loading.pretrained import find_folder
        from sdedit.loading.sources import HUB_ARGUMENTS

        hub = {name: overrides.pop(name) for name in HUB_ARGUMENTS & set(overrides)}
        here = Path(pretrained_model_name_or_path)
        here = here if here.exists() else find_folder(here.as_posix(), components=(), **hub)
        return cls.from_config(here / (subfolder or ""), **overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder/scheduler_config.json`."""
        self.save_config(folder)


def mix(p: float | Tensor, x: Tensor, q: float | Tensor, y: Tensor) -> Tensor:
    """p·x + q·y, computed in float32 or better, in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    p, q = (v.to(wide) if isinstance(v, Tensor) else v for v in (p, q))
    return (p * x.to(wide) + q * y.to(x.device, wide)).to(x.dtype)
