"""What code written for diffusers calls on a scheduler beside its interface; nothing else here calls it.

Each class is a base of one in `sdedit.schedulers.classes`. A reader who wants to know how a picture comes about can
leave this file out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sdedit.config import later
from sdedit.schedulers.base import Scheduler, SchedulerOutput
from sdedit.schedulers.names import CLASS_NAMES
from sdedit.schedulers.schedule import check
from sdedit.schedulers.solvers import levels
from sdedit.schedulers.solvers.training_steps import posterior_variance, transfer


class DropInScheduler(Scheduler):
    """Base of the sixteen public schedulers."""

    has_compatibles: ClassVar[bool] = True
    _deprecated_kwargs: ClassVar[tuple[str, ...]] = ()
    _compatibles: ClassVar[tuple[str, ...]] = tuple(CLASS_NAMES)

    @property
    def compatibles(self) -> list[type[Scheduler]]:
        """The classes that this scheduler's config can make."""
        return [later(f"sdedit.schedulers.classes:{name}") for name in CLASS_NAMES]

    @property
    def init_noise_sigma(self) -> Any:
        """Standard deviation of the noise that a run from nothing starts with; a tensor where the sample is x/α."""
        found = super().init_noise_sigma
        return torch.tensor(found) if self.in_sigma_space else found

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **hub: Any
    ) -> dict[str, Any]:
        """The config in a folder or at a hub id, for `from_config`."""
        made = cls.from_pretrained(pretrained_model_name_or_path, subfolder, **hub)
        return {k: v for k, v in made.config.items() if k != "_use_default_values"}

    def __getattr__(self, name: str) -> Any:
        config: Mapping[str, Any] = self.__dict__.get("config", {})
        if name.startswith("_") or name not in config:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        warnings.warn(f"{name} is an option: scheduler.config.{name}", FutureWarning, stacklevel=2)
        return config[name]


class TrainingStepDropIn(DropInScheduler):
    """Of the schedulers whose times are training steps."""

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """The less noisy time that a step from `timestep` leads to; -1 is the clean end."""
        if self.num_inference_steps is None:
            return timestep - 1
        return torch.tensor(self.time_after(int(timestep)))  # type: ignore[attr-defined]


class DDIMDropIn(TrainingStepDropIn):
    """Of DDIM."""

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """Variance of the noise of a step with η = 1, a scalar."""
        bar, after = (self._schedule.bar(int(t)) for t in (timestep, prev_timestep))
        return torch.tensor(posterior_variance(bar, after), dtype=torch.float32)


class DDPMDropIn(TrainingStepDropIn):
    """Of DDPM."""

    def _get_variance(
        self, t: int, predicted_variance: Tensor | None = None, variance_type: str | None = None
    ) -> Tensor | None:
        """What `variance_type`, or the config's, makes of the variance of a step from `t`: itself, its root or log."""
        bar, after = (self._schedule.bar(int(time)) for time in (t, self.previous_timestep(t)))
        small, large = max(posterior_variance(bar, after), 1e-20), 1 - bar / after
        kind = self.options["variance_type"].allowed and (variance_type or self.config.variance_type)
        if kind == "learned":
            return predicted_variance
        if kind == "learned_range":
            assert predicted_variance is not None
            share = (predicted_variance + 1) / 2
            return share * math.log(large) + (1 - share) * math.log(small)
        known = {"fixed_small": small, "fixed_small_log": small**0.5, "fixed_large": large}
        value = math.log(large) if kind == "fixed_large_log" else known[check("variance_type", kind, known)]
        return torch.tensor(value, dtype=torch.float32)


class PNDMDropIn(TrainingStepDropIn):
    """Of PNDM: its two kinds of step, called one by one, on a state of their own.

    Attributes:
        ets: The last outputs, oldest first.
        counter: How many such steps were taken.
    """

    ets: list[Tensor]

    def _rewind(self) -> None:
        super()._rewind()
        self.ets, self.counter = [], 0
        self._anchor: Tensor | None = None
        self._mean: Any = 0

    @property
    def prk_timesteps(self) -> Tensor:
        """Times of the Runge-Kutta steps, (12,); (0,) with `skip_prk_steps`."""
        return self.timesteps[: 0 if self.config.skip_prk_steps else 12]

    @property
    def plms_timesteps(self) -> Tensor:
        """Times of the multistep steps, which come after those."""
        return self.timesteps[len(self.prk_timesteps) :]

    @property
    def _stride(self) -> int:
        if self.num_inference_steps is None:
            raise ValueError("step: call set_timesteps(num_inference_steps) first")
        return len(self) // self.num_inference_steps

    def step_prk(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Any, ...]:
        """A quarter of a Runge-Kutta step: four of them go one step on (arXiv 2202.09778, equation 13)."""
        stage, stride = self.counter % 4, self._stride
        end = int(timestep) - (0 if stage % 2 else stride // 2)
        start = int(self.prk_timesteps[self.counter - stage])
        if stage == 0:
            self.ets, self._anchor = [*self.ets, model_output], sample
        mean = self._mean + model_output / (3 if stage in (1, 2) else 6)
        self._mean = 0 if stage == 3 else mean
        first = sample if self._anchor is None else self._anchor
        return self._moved(start, end, mean if stage == 3 else model_output, first, return_dict)

    def step_plms(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Any, ...]:
        """A multistep step, on as many outputs as there are, at most four (arXiv 2202.09778, equation 12)."""
        start, end = int(timestep), int(timestep) - self._stride
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError("step_plms: with skip_prk_steps=False, the twelve steps of step_prk come first")
        if self.counter == 1:  # evaluated at the end of the first step, which it then repeats
            start, end = start + self._stride, start
            if len(self.ets) == 1 and self._anchor is not None:
                return self._moved(start, end, (model_output + self.ets[-1]) / 2, self._anchor, return_dict)
        else:
            self.ets = [*self.ets[-3:], model_output]
            self._anchor = sample
        last = self.ets[-4:]
        weighed = [w * m for w, m in zip(_MULTISTEP[len(last)], reversed(last), strict=True)]
        return self._moved(start, end, sum(weighed), sample, return_dict)

    def _moved(self, start: int, end: int, output: Any, sample: Tensor, return_dict: bool) -> Any:
        p, q = transfer(self._schedule, self.config.prediction_type, start, end)
        moved = p * sample + q * output
        self.counter += 1
        return SchedulerOutput(moved) if return_dict else (moved,)


# Adams-Bashforth weights by the number of outputs, newest first.
_MULTISTEP = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


class LogSNRDropIn(DropInScheduler):
    """Of the schedulers that integrate in λ = log(α/σ)."""

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """See `Scheduler.index_for_timestep`; a time that is not there counts as the last one."""
        try:
            return super().index_for_timestep(timestep, schedule_timesteps)
        except ValueError as error:
            warnings.warn(f"{error}; taken as the last of them", stacklevel=2)
            return len(self.timesteps) - 1

    @property
    def alpha_t(self) -> Tensor:
        """(T,) α of each training step."""
        return self.alphas_cumprod.sqrt()

    @property
    def sigma_t(self) -> Tensor:
        """(T,) σ of each training step."""
        return (1 - self.alphas_cumprod).sqrt()

    @property
    def lambda_t(self) -> Tensor:
        """(T,) λ of each training step."""
        return self.alpha_t.log() - self.sigma_t.log()

    def _sigma_to_alpha_sigma_t(self, sigma: float | Tensor) -> tuple[Any, Any]:
        """(α, σ) of a level as `sigmas` has it."""
        if self.config.use_flow_sigmas:
            return 1 - sigma, sigma
        return levels(sigma)  # type: ignore[arg-type]
