"""A batch's run through its solvers: all pictures alike, or each its own way.

A run is made of parts: pictures that take the same steps, by a scheduler that was set up for them alone. Parts may
differ in all else, solver, strength, number of steps and how far they are, and yet share each UNet call. Between two
calls runs join, and pictures leave. Each picture becomes what it would have become alone.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdedit.noise import Generator
from sdedit.schedulers.base import Scheduler, mix
from sdedit.schedulers.schedule import Array, squeezed_betas


@dataclass(frozen=True)
class Steps:
    """Which steps a call asks for.

    Attributes:
        strengths, counts: Strength and number of steps: one for all pictures, or one for each.
        grid: `timesteps` or `sigmas` of one's own, instead of a number; or nothing.
        exact: Run all of the steps, on a noise schedule that ends at `strength` of the model's.
        eta: See `DDIMScheduler.step`.
    """

    strengths: list[float]
    counts: list[int]
    grid: Mapping[str, Any]
    exact: bool = False
    eta: float = 0.0


class Part:
    """Pictures that take the same steps.

    Args:
        scheduler: Of this library or any other; the part takes a copy.
        pictures: How many.
        generator: What their noise is drawn from: one, or one for each.
        strength: Of the chosen steps, the last `int(steps * strength)` run; with `exact`, all of them, on a noise
            schedule that ends at `strength` of the model's.
        chosen: What `set_timesteps` gets.

    Attributes:
        timesteps: Those that run, one a UNet call.
        made: UNet calls that were made.
        order: UNet calls for a step of the solver.
        options, draws: What the scheduler's `step` gets besides, and whether a generator.
    """

    def __init__(
        self,
        scheduler: Any,
        pictures: int,
        generator: Generator,
        strength: float,
        *,
        exact: bool = False,
        eta: float = 0.0,
        **chosen: Any,
    ) -> None:
        self.pictures, self.strength, self.chosen, self._time_scale = pictures, strength, chosen, 1.0
        if exact and 0 < strength < 1:
            betas = squeezed_betas(scheduler.alphas_cumprod.double().cpu().numpy(), strength)
            config = {**scheduler.config, "rescale_betas_zero_snr": False}  # these betas are final
            self.scheduler = type(scheduler).from_config(config, trained_betas=betas)
            self.strength, self._time_scale = 1.0, strength
        else:
            self.scheduler = of_its_own(scheduler)
        self.order: int = getattr(self.scheduler, "order", 1)
        taken = inspect.signature(self.scheduler.step).parameters
        self.options = {"eta": eta} if "eta" in taken else {}
        self.draws = "generator" in taken
        self.restart(generator)

    def restart(self, generator: Generator) -> None:
        """Go back to the first step, with nothing remembered of an earlier run."""
        scheduler = self.scheduler
        scheduler.set_timesteps(**self.chosen)
        self._count = len(scheduler.timesteps)
        self._first = int(self._call_of(self.strength))
        self.timesteps: Tensor = scheduler.timesteps[self._first :]
        if len(self.timesteps) and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self._first)
        self.generator, self.made = generator, 0

    @property
    def calls(self) -> int:
        """UNet calls to go."""
        return len(self.timesteps) - self.made

    @property
    def steps(self) -> int:
        """Steps of the solver, those that were taken included."""
        return -(-len(self.timesteps) // self.order)

    @property
    def steps_taken(self) -> int:
        """Steps of the solver that are over."""
        return self.made // self.order if self.calls else self.steps

    @property
    def sigma(self) -> float:
        """Noise level σ/α of the first step; 0 without steps."""
        if not len(self.timesteps):
            return 0.0
        if isinstance(self.scheduler, Scheduler):
            return float(self.scheduler.sigmas[self._first])
        kept = float(self.scheduler.alphas_cumprod[int(self.timesteps[0])])
        return float(((1 - kept) / kept) ** 0.5)

    def call_of(self, strengths: Array) -> Array:
        """The UNet call of this run that a run of another strength would begin with, 0 for greater ones; any shape."""
        share = np.round(strengths / self._time_scale, 9)  # 0.6 of 0.8 is three quarters
        return self._call_of(np.minimum(share, self.strength)) - self._first

    def _call_of(self, strength: float | Array) -> Array:
        """The same for the whole schedule; behind the last for a strength of no steps."""
        steps = self.chosen.get("num_inference_steps") or self._count
        taken = np.floor(steps * np.asarray(strength)).astype(int)
        return np.where(taken > 0, (steps - taken) * self.order, self._count)

    def noised(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, C, H, W) at the level that the next UNet call sees; as they are after the last."""
        if not self.calls:
            return latents
        if isinstance(self.scheduler, Scheduler):
            (signal,), (level,) = self.scheduler.levels_seen([self._first + self.made])
            return mix(float(signal), latents, float(level), noise)
        next_one = self.timesteps[self.made : self.made + 1]
        noised: Tensor = self.scheduler.add_noise(latents, noise, next_one.repeat(len(latents)))
        return noised

    def model_input(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What the UNet is to see of the latents (B, C, H, W), and the timestep, a scalar."""
        t = self.timesteps[self.made]
        seen = self.scheduler.scale_model_input(latents, t)
        return seen, t * self._time_scale if self._time_scale != 1 else t

    def step(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """The latents (B, C, H, W) after the UNet's prediction (B, C, H, W)."""
        options = {**self.options, "generator": self.generator} if self.draws else self.options
        t = self.timesteps[self.made]
        stepped: Tensor = self.scheduler.step(prediction, t, latents, **options, return_dict=False)[0]
        self.made += 1
        return stepped


class Run:
    """A batch's way through its solvers, see the module. Its pictures come in the order of its parts."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)

    @classmethod
    def begin(
        cls, scheduler: Any, pictures: int, steps: Steps, generator: Generator, device: torch.device | str | None = None
    ) -> Run:
        """Where a batch begins: one part for all, or one for each picture if their steps differ.

        Raises:
            ValueError: The scheduler cannot do what is asked.

        Warns:
            Strength leaves a picture no step.
        """
        if steps.exact and steps.grid:
            raise ValueError(
                "exact_steps: timesteps or sigmas of one's own choose the steps; expected num_inference_steps"
            )
        alike = len(steps.strengths) == len(steps.counts) == 1
        sizes = [pictures] if alike else [1] * pictures
        parts = []
        for i, (size, share) in enumerate(zip(sizes, _shares(generator, sizes), strict=True)):
            strength, count = steps.strengths[i % len(steps.strengths)], steps.counts[i % len(steps.counts)]
            chosen = {**(steps.grid or {"num_inference_steps": count}), "device": device}
            options: dict[str, Any] = {"exact": steps.exact, "eta": steps.eta, **chosen}
            parts.append(Part(scheduler, size, share, strength, **options))
            if strength > 0 and not parts[-1].calls:
                warnings.warn(
                    f"strength={strength:g} of {count} steps leaves none to run: the picture is the image through the "
                    "VAE; more steps, more strength or exact_steps=True change it",
                    stacklevel=5,
                )
        return cls(parts)

    def restart(self, generator: Generator) -> None:
        """Go back to the first step; `generator` is that of the whole batch."""
        for part, share in zip(self.parts, _shares(generator, self._sizes), strict=True):
            part.restart(share)

    def join(self, other: Run) -> Run:
        """The pictures of both runs, as far as each has come."""
        return Run([*self.parts, *other.parts])

    def take(self, pictures: Sequence[int]) -> Run:
        """The run of some of the pictures; the others leave.

        Raises:
            ValueError: A part would be torn: its pictures share their solver's memory.
        """
        ends = np.cumsum(self._sizes).tolist()
        kept = [(part, end) for part, end in zip(self.parts, ends, strict=True) if end - 1 in pictures]
        if [i for part, end in kept for i in range(end - part.pictures, end)] != list(pictures):
            raise ValueError(f"pictures={list(pictures)}; expected all of a part or none, in order, of {self._sizes}")
        return Run([part for part, _ in kept])

    @property
    def _sizes(self) -> list[int]:
        return [part.pictures for part in self.parts]

    @property
    def calls(self) -> int:
        """UNet calls until the last picture is done."""
        return max((part.calls for part in self.parts), default=0)

    @property
    def under_way(self) -> list[int]:
        """The pictures that have steps to go."""
        going = [bool(part.calls) for part in self.parts for _ in range(part.pictures)]
        return [i for i, goes in enumerate(going) if goes]

    @property
    def steps(self) -> list[int]:
        """Steps of the solver, for each part."""
        return [part.steps for part in self.parts]

    @property
    def steps_taken(self) -> list[int]:
        """Those of them that are over."""
        return [part.steps_taken for part in self.parts]

    @property
    def sigmas(self) -> list[float]:
        """Noise level σ/α of the first step, for each part; 0 without steps."""
        return [part.sigma for part in self.parts]

    @property
    def scheduler(self) -> Any:
        """That of the part with most steps."""
        return max(self.parts, key=lambda part: len(part.timesteps)).scheduler

    def calls_within(self, share: float) -> list[int]:
        """How many UNet calls lie in the first `share` of the run, for each picture."""
        counts = [(part.pictures, len(part.timesteps)) for part in self.parts]
        return [sum(i / calls < share for i in range(calls)) for pictures, calls in counts for _ in range(pictures)]

    def call_of(self, strengths: Array) -> Array:
        """See `Part.call_of`; (B, …) → (B, …)."""
        split = np.split(strengths, np.cumsum(self._sizes)[:-1])
        return np.concatenate([part.call_of(own) for part, own in zip(self.parts, split, strict=True)])

    def noised(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, C, H, W), each at the level that its next UNet call sees; as they are after the last."""
        return self._each(Part.noised, latents, noise)

    def step(self, prediction: Tensor, latents: Tensor) -> Tensor:
        """The latents (B, C, H, W) after the UNet's prediction (B, C, H, W)."""
        return self._each(Part.step, prediction, latents)

    def model_input(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What the UNet is to see of the latents (B, C, H, W), and the timestep: a scalar, or (B,) of several parts."""
        if len(self.parts) == 1:
            return self.parts[0].model_input(latents)
        seen = [part.model_input(own) for part, own in zip(self.parts, latents.split(self._sizes), strict=True)]
        times = [t.float().expand(part.pictures) for part, (_, t) in zip(self.parts, seen, strict=True)]
        return torch.cat([sample for sample, _ in seen]), torch.cat(times)

    def _each(self, method: Callable[..., Tensor], *batches: Tensor) -> Tensor:
        """A method of each part, with its pictures."""
        if len(self.parts) == 1:
            return method(self.parts[0], *batches)
        split = zip(*(batch.split(self._sizes) for batch in batches), strict=True)
        return torch.cat([method(part, *own) for part, own in zip(self.parts, split, strict=True)])


def of_its_own(scheduler: Any) -> Any:
    """A scheduler that can be set and stepped while others use the one that it was made of.

    One whose methods somebody replaced on the object is taken as it is, for what replaced them may hold the object.
    """
    if any(callable(getattr(type(scheduler), name, None)) for name in vars(scheduler)):
        return scheduler
    made = copy.copy(scheduler)
    # Other libraries' keep what they remember in lists.
    vars(made).update({name: list(value) for name, value in vars(made).items() if isinstance(value, list)})
    return made


def show(scheduler: Any, run: Run) -> None:
    """Let the scheduler that users hold be as if it had made the run: they read `timesteps` and `sigmas` of it."""
    made = run.scheduler
    if made is not scheduler and getattr(made, "config", None) is getattr(scheduler, "config", scheduler):
        vars(scheduler).update(vars(made))


def _shares(generator: Generator, sizes: Sequence[int]) -> list[Any]:
    """The generators of each part; the same for all if there is but one."""
    if not isinstance(generator, (list, tuple)):
        return [generator] * len(sizes)
    ends = np.cumsum(sizes).tolist()
    return [
        generator[end - 1] if size == 1 else generator[end - size : end] for end, size in zip(ends, sizes, strict=True)
    ]
