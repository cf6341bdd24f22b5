"""A batch's run through its solver: the same for all pictures, or each with its own strength, steps and guidance.

The pipeline's loop asks a run three things for each step: how many pictures still have steps to go (they come first in
the batch), what the UNet is to see, and what the latents become.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sdedit.noise import Generator
from sdedit.schedulers import rows as row_functions
from sdedit.schedulers.rows import Memory, Row


class Run(Protocol):
    """What the loop needs of a run; `order` is the number of UNet calls for a step of the progress bar."""

    order: int

    def __len__(self) -> int: ...

    def active(self, i: int) -> int:
        """How many pictures, from the first on, take the i-th step."""

    def model_input(self, i: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What the UNet sees of the active latents (B, C, H, W), and the timestep, one or (B,)."""

    def step(self, i: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """The active latents after the step."""


@dataclass
class Start:
    """Where a picture's run begins: its scheduler, set there, and the timesteps from there on."""

    scheduler: Any
    timesteps: Tensor
    first: int

    @property
    def sigma(self) -> float:
        """Noise level σ/α of the first step; 0 without steps."""
        if not len(self.timesteps):
            return 0.0
        if hasattr(self.scheduler, "rows"):  # one of ours
            return float(self.scheduler.sigmas[self.first])
        kept = float(self.scheduler.alphas_cumprod[int(self.timesteps[0])])
        return float(((1 - kept) / kept) ** 0.5)

    def noised(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Clean latents (B, C, H, W) at the level of the first step; as they are without steps."""
        if not len(self.timesteps):
            return latents
        noised: Tensor = self.scheduler.add_noise(latents, noise, self.timesteps[:1].repeat(len(latents)))
        return noised


class SharedRun:
    """All pictures take the same steps, by the public methods of any scheduler."""

    def __init__(self, start: Start, batch: int, step_arguments: dict[str, Any]) -> None:
        self.scheduler, self.timesteps, self.batch = start.scheduler, start.timesteps, batch
        self.order = getattr(start.scheduler, "order", 1)
        self.arguments = step_arguments

    def __len__(self) -> int:
        return len(self.timesteps)

    def active(self, i: int) -> int:
        """The whole batch."""
        return self.batch

    def model_input(self, i: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """See `Run`."""
        t = self.timesteps[i]
        return self.scheduler.scale_model_input(latents, t), t

    def step(self, i: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """See `Run`."""
        stepped: Tensor = self.scheduler.step(
            prediction, self.timesteps[i], latents, **self.arguments, return_dict=False
        )[0]
        return stepped


class PerImageRun:
    """Each picture takes its own rows, gathered for each step; those with most steps come first in the batch."""

    def __init__(self, starts: Sequence[Start], generator: Generator, eta: float | None) -> None:
        options = {} if eta is None else {"eta": eta}
        self.starts = starts
        self.order = starts[0].scheduler.order
        self.rows: list[list[Row]] = [s.scheduler.rows(s.first, **options) if len(s.timesteps) else [] for s in starts]
        self.generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * len(starts)
        self.memory: Memory | None = None

    def __len__(self) -> int:
        return len(self.rows[0])

    def active(self, i: int) -> int:
        """Pictures that have an i-th row."""
        return sum(i < len(rows) for rows in self.rows)

    def _row(self, i: int, like: Tensor) -> Row:
        rows = [self.rows[k][i] for k in range(self.active(i))]
        return row_functions.per_sample(rows, lambda v: torch.from_numpy(v).to(like.device, torch.float32))

    def model_input(self, i: int, latents: Tensor) -> tuple[Tensor, Tensor]:
        """See `Run`."""
        row = self._row(i, latents)
        return (latents * row.scale).to(latents.dtype), row.t.flatten()

    def step(self, i: int, prediction: Tensor, latents: Tensor) -> Tensor:
        """See `Run`."""
        row, count = self._row(i, latents), len(latents)
        x = latents.float()
        memory = self.memory or row_functions.blank_memory(x, len(row.b))
        memory = Memory(memory.anchor[:count], tuple(m[:count] for m in memory.history))
        scheduler = self.starts[0].scheduler
        x, _, _, self.memory = row_functions.step(
            row, x, prediction.float(), memory, self._noise(i, x), threshold=scheduler.threshold, xp=torch
        )
        return x.to(latents.dtype)

    def _noise(self, i: int, x: Tensor) -> Tensor:
        """Each picture's noise, from its own generator; zeros where its row draws none."""
        drawn = [
            self.starts[k].scheduler.draw_noise(x[k : k + 1], self.generators[k], self.starts[k].first + i)
            if self.rows[k][i].draw
            else torch.zeros_like(x[k : k + 1])
            for k in range(len(x))
        ]
        return torch.cat(drawn)


def start_of(scheduler: Any, steps: int, strength: float, device: torch.device) -> Start:
    """A run of its own for one picture: a copy of the scheduler, set to where `strength` begins."""
    scheduler = copy.copy(scheduler)
    scheduler.set_timesteps(steps, device=device)
    return begin(scheduler, steps, strength)


def begin(scheduler: Any, steps: int, strength: float) -> Start:
    """Set a scheduler whose timesteps are chosen to where `strength` begins: the last `int(steps * strength)` steps."""
    first = (steps - int(steps * strength)) * getattr(scheduler, "order", 1)
    timesteps = scheduler.timesteps[first:]
    if len(timesteps) and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return Start(scheduler, timesteps, first)
