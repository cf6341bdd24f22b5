"""A batch's run through its solver: the same for all pictures, or each with its own strength, steps and guidance.

The pipeline's loop asks a run three things for each step: how many pictures still have steps to go (they come first in
the batch), what the UNet is to see, and what the latents become.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from sdedit.noise import Generator
from sdedit.schedulers import rows as row_functions
from sdedit.schedulers.base import Scheduler, mix
from sdedit.schedulers.rows import Memory, Row
from sdedit.schedulers.schedule import Array, squeezed_betas


class Run(Protocol):
    """What the loop needs of a run.

    Attributes:
        order: UNet calls for a step of the solver.
        order_of_pictures: The batch's order in the loop: those with most steps first.
        generator: What its noise is drawn from.
    """

    order: int
    order_of_pictures: list[int]
    generator: Generator

    def __len__(self) -> int: ...

    def restart(self) -> None:
        """Forget the steps taken, to take them again."""

    def active(self, i: int) -> int:
        """How many pictures, from the first on, take the i-th step."""

    def model_input(self, i: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What the UNet sees of the active latents (B, C, H, W), and the timestep, one or (B,)."""

    def step(self, i: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """The active latents after the step."""

    def noised(self, i: int, latents: Tensor, noise: Tensor) -> Tensor:
        """Clean latents of the first pictures, at the level that the i-th UNet call sees; clean after the last."""


class Start:
    """A scheduler, set to where `strength` begins.

    Args:
        scheduler: It is changed.
        strength: Of the chosen steps, the last `int(steps * strength)` are left; with `exact`, all of them, on a noise
            schedule that ends at `strength` of the model's.
        chosen: What `set_timesteps` gets.

    Attributes:
        timesteps: Those that are left.
        time_scale: What the UNet's time is, for each of the scheduler's.
        first: How many UNet calls of the whole schedule were passed over.
    """

    def __init__(self, scheduler: Any, strength: float, exact: bool, **chosen: Any) -> None:
        self.strength, self.chosen, self.time_scale = strength, chosen, 1.0
        if exact and 0 < strength < 1:
            betas = squeezed_betas(scheduler.alphas_cumprod.double().cpu().numpy(), strength)
            config = {**scheduler.config, "rescale_betas_zero_snr": False}  # these betas are final
            scheduler = type(scheduler).from_config(config, trained_betas=betas)
            self.strength, self.time_scale = 1.0, strength
        self.scheduler = scheduler
        self.set()

    def set(self) -> None:
        """Set the scheduler, with nothing remembered of an earlier run."""
        scheduler = self.scheduler
        scheduler.set_timesteps(**self.chosen)
        self.count = len(scheduler.timesteps)
        self.first = int(self._call_of(self.strength))
        self.timesteps: Tensor = scheduler.timesteps[self.first :]
        if len(self.timesteps) and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.first)

    def call_of(self, strengths: Array) -> Array:
        """The UNet call of this run that a run of another strength would begin with, 0 for greater ones; any shape."""
        share = np.round(strengths / self.time_scale, 9)  # 0.6 of 0.8 is three quarters
        return self._call_of(np.minimum(share, self.strength)) - self.first

    def _call_of(self, strength: float | Array) -> Array:
        """The same for the whole schedule; behind the last for a strength of no steps."""
        steps = self.chosen.get("num_inference_steps") or self.count
        taken = np.floor(steps * np.asarray(strength)).astype(int)
        return np.where(taken > 0, (steps - taken) * getattr(self.scheduler, "order", 1), self.count)

    @property
    def steps(self) -> int:
        """Steps of the solver that are left."""
        return -(-len(self.timesteps) // getattr(self.scheduler, "order", 1))

    @property
    def sigma(self) -> float:
        """Noise level σ/α of the first step; 0 without steps."""
        if not len(self.timesteps):
            return 0.0
        if isinstance(self.scheduler, Scheduler):
            return float(self.scheduler.sigmas[self.first])
        kept = float(self.scheduler.alphas_cumprod[int(self.timesteps[0])])
        return float(((1 - kept) / kept) ** 0.5)

    def noised(self, latents: Tensor, noise: Tensor, i: int = 0) -> Tensor:
        """Clean latents (B, C, H, W) at the level that the i-th UNet call sees; as they are after the last."""
        if i >= len(self.timesteps):
            return latents
        if isinstance(self.scheduler, Scheduler):
            (signal,), (level,) = self.scheduler.levels_seen([self.first + i])
            return mix(float(signal), latents, float(level), noise)
        noised: Tensor = self.scheduler.add_noise(latents, noise, self.timesteps[i : i + 1].repeat(len(latents)))
        return noised


class SharedRun:
    """All pictures take the same steps, by the public methods of any scheduler."""

    def __init__(self, start: Start, batch: int, eta: float, generator: Generator) -> None:
        self.start, self.batch, self.generator = start, batch, generator
        self.order_of_pictures = list(range(batch))
        self.scheduler, self.timesteps, self.time_scale = start.scheduler, start.timesteps, start.time_scale
        self.order = getattr(start.scheduler, "order", 1)
        taken = inspect.signature(start.scheduler.step).parameters
        self.arguments = {k: v for k, v in {"eta": eta, "generator": generator}.items() if k in taken}

    def __len__(self) -> int:
        return len(self.timesteps)

    def restart(self) -> None:
        """See `Run`."""
        self.start.set()

    def active(self, i: int) -> int:
        """The whole batch."""
        return self.batch

    def model_input(self, i: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """See `Run`."""
        t = self.timesteps[i]
        return self.scheduler.scale_model_input(latents, t), t * self.time_scale if self.time_scale != 1 else t

    def step(self, i: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """See `Run`."""
        arguments = {**self.arguments, "return_dict": False}
        stepped: Tensor = self.scheduler.step(prediction, self.timesteps[i], latents, **arguments)[0]
        return stepped

    def noised(self, i: int, latents: Tensor, noise: Tensor) -> Tensor:
        """See `Run`."""
        return self.start.noised(latents, noise, i)


class PerImageRun:
    """Each picture takes its own rows, gathered for each step; those with most steps come first in the batch."""

    def __init__(self, starts: Sequence[Start], eta: float, generator: Generator) -> None:
        self.order_of_pictures = sorted(range(len(starts)), key=lambda i: -len(starts[i].timesteps))
        self.starts = [starts[i] for i in self.order_of_pictures]
        self.generator = generator
        if isinstance(generator, (list, tuple)):
            self.generator = [generator[i] for i in self.order_of_pictures]
        scheduler: Scheduler = starts[0].scheduler
        self.threshold, self.order = scheduler.threshold, scheduler.order
        options = {"eta": eta} if "eta" in inspect.signature(scheduler.step).parameters else {}
        self.rows: list[list[Row]] = [
            start.scheduler.rows(start.first, **options) if len(start.timesteps) else [] for start in self.starts
        ]
        self.memory: Memory | None = None

    def __len__(self) -> int:
        return len(self.rows[0])

    def restart(self) -> None:
        """See `Run`."""
        self.memory = None
        for start in self.starts:
            start.set()

    def active(self, i: int) -> int:
        """Pictures that have an i-th row."""
        return sum(i < len(rows) for rows in self.rows)

    def _row(self, i: int, count: int, device: torch.device) -> Row:
        rows = [self.rows[k][i] for k in range(count)]
        return row_functions.per_sample(rows, lambda v: torch.from_numpy(v).to(device, torch.float32))

    def model_input(self, i: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """See `Run`."""
        row = self._row(i, len(latents), latents.device)
        time_scale = torch.tensor([start.time_scale for start in self.starts[: len(latents)]])
        return (latents * row.scale).to(latents.dtype), row.t.flatten() * time_scale.to(latents.device)

    def step(self, i: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """See `Run`."""
        count, x = len(latents), latents.float()
        row = self._row(i, count, x.device)
        memory = self.memory or row_functions.blank_memory(x, len(row.b))
        memory = Memory(memory.anchor[:count], tuple(m[:count] for m in memory.history))
        noise = self._noise(i, x)
        x, _, _, self.memory = row_functions.step(
            row, x, prediction.float(), memory, noise, threshold=self.threshold, xp=torch
        )
        return x.to(latents.dtype)

    def noised(self, i: int, latents: Tensor, noise: Tensor) -> Tensor:
        """See `Run`."""
        return noised(self.starts[: len(latents)], latents, noise, i)

    def _noise(self, i: int, x: Tensor) -> Tensor:
        """Each picture's noise, from its own generator; zeros where its row draws none."""
        many = self.generator if isinstance(self.generator, list) else [self.generator] * len(self.starts)
        drawn = [
            start.scheduler.draw_noise(x[k : k + 1], many[k], start.first + i)
            if self.rows[k][i].draw
            else torch.zeros_like(x[k : k + 1])
            for k, start in enumerate(self.starts[: len(x)])
        ]
        return torch.cat(drawn)


def starts(
    scheduler: Any,
    batch: int,
    settings: Mapping[str, Sequence[Any]],
    grid: Mapping[str, Any],
    *,
    exact: bool,
    device: torch.device,
) -> list[Start]:
    """Where the pictures' runs begin: one start for all of them, or one for each.

    Args:
        settings: `strength` and `num_inference_steps`, each with one value or `batch` of them.
        grid: `timesteps` or `sigmas` of one's own, or `None` for both.
        exact: See `Start`.
    """
    strengths, steps = settings["strength"], settings["num_inference_steps"]
    own = {name: value for name, value in grid.items() if value is not None}
    alike = len(strengths) == len(steps) == len(settings["guidance_scale"]) == 1
    if not isinstance(scheduler, Scheduler) and not alike:
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} is not one of sdedit's; settings of each picture's own need one of "
            "those: sdedit.schedulers.make_scheduler(name, pipe.scheduler.config)"
        )
    if exact and own:
        raise ValueError("exact_steps: timesteps or sigmas of one's own choose the steps; expected num_inference_steps")
    made = []
    for i in range(1 if alike else batch):
        chosen = own or {"num_inference_steps": steps[i % len(steps)]}
        of_its_own = scheduler if alike else copy.copy(scheduler)
        made.append(Start(of_its_own, strengths[i % len(strengths)], exact, **chosen, device=device))
        if strengths[i % len(strengths)] > 0 and not len(made[-1].timesteps):
            warnings.warn(
                f"strength={strengths[i % len(strengths)]:g} of {steps[i % len(steps)]} steps leaves none to run: the "
                "picture is the image through the VAE; more steps, more strength or exact_steps=True change it",
                stacklevel=3,
            )
    return made


def noised(starts: Sequence[Start], latents: Tensor, noise: Tensor, i: int = 0) -> Tensor:
    """Clean latents (B, C, H, W), each at the level that the i-th UNet call of its run sees."""
    if len(starts) == 1:
        return starts[0].noised(latents, noise, i)
    return torch.cat([s.noised(latents[k : k + 1], noise[k : k + 1], i) for k, s in enumerate(starts)])


def make(starts: Sequence[Start], batch: int, eta: float, generator: Generator) -> Run:
    """The run of a batch: shared if there is one start for all of it."""
    if len(starts) == 1:
        return SharedRun(starts[0], batch, eta, generator)
    return PerImageRun(starts, eta, generator)


def first(batch: Tensor | None, count: int, whole: int | None = None) -> Any:
    """The first pictures of a batch (B, …), of each of its halves if it holds two of `whole` pictures."""
    if batch is None or count == (whole or len(batch)):
        return batch
    return batch[:count] if whole is None else batch.unflatten(0, (-1, whole))[:, :count].flatten(0, 1)
