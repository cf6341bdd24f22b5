"""A cheap stand-in for the UNet, and the loop of a pipeline around it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)
SHAPE = (2, 4, 4, 4)  # 64 numbers a sample: PyTorch draws multiples of 16 alike, one by one and in one go


def smooth_model(x: Tensor, t: Tensor) -> Tensor:
    """Not linear, and different at each time, so that a wrong sample, weight or time shows."""
    return torch.tanh(0.7 * x + torch.sin(0.01 * t.double()).to(x)) * 0.8 + 0.1 * x


def run_through(
    scheduler: Any,
    steps: int | None,
    start: int = 0,
    *,
    channels: int = 4,
    levels: Tensor | None = None,
    output: Callable[[Tensor], Tensor] = lambda x: x,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[list[float], list[Tensor]]:
    """Image-to-image from step `start` on: the times, and every tensor that `add_noise` and `step` give."""
    layout = {name: options.pop(name) for name in ("timesteps", "sigmas", "strength") if name in options}
    scheduler.set_timesteps(**layout) if steps is None else scheduler.set_timesteps(steps, **layout)
    if levels is not None:
        scheduler.sigmas = levels
    source = torch.Generator().manual_seed(7)
    x0, noise = torch.randn((2, *SHAPE), generator=source).to(dtype)
    first = start * scheduler.order
    times = scheduler.timesteps[first:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    x = scheduler.add_noise(0.8 * x0, noise, times[:1].repeat(2))
    tensors = [x]
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(3)
    for t in times:
        predicted = output(smooth_model(scheduler.scale_model_input(x, t), t))
        predicted = torch.cat([predicted] * (channels // 4), dim=1)
        x, *others = scheduler.step(predicted, t, x, **options, return_dict=False)
        tensors += [x, *others]
    return times.tolist(), tensors


@pytest.fixture
def run() -> Iterator[Callable[..., Any]]:
    yield run_through
