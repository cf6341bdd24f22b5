"""Gaussian noise that depends on the generator alone, and half precision that overflows, noticed and made good."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Generator = torch.Generator | Sequence[torch.Generator] | None


def randn(
    shape: Sequence[int],
    generator: Generator = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw standard normal noise of `shape` (B, …), a sample at a time, in float32.

    It is drawn on the generator's own device, the CPU if there is no generator, and then moved and cast, so a seed
    gives the same noise on every device and in every dtype.

    Args:
        shape: The first axis counts samples.
        generator: One for all samples, one after the other, or a list with one for each sample.
    """
    count = shape[0]
    generators = [generator] * count if generator is None or isinstance(generator, torch.Generator) else list(generator)
    if len(generators) != count:
        raise ValueError(f"generator: {len(generators)} generators for {count} images; expected one, or one an image")
    drawn = [
        torch.randn((1, *shape[1:]), generator=g, device="cpu" if g is None else g.device).to(device, dtype)
        for g in generators
    ]
    return drawn[0] if count == 1 else torch.cat(drawn)


def retry_in_float32(
    stage: str, module: Any, run: Callable[[torch.dtype], Tensor], generator: Generator = None
) -> Tensor:
    """Run a stage; if half precision gave NaN or infinity, once more in float32, from the same noise.

    Its result alone is looked at, once, so that nothing waits for the device inside the stage.

    Args:
        stage: Its name, for messages.
        module: The network that it uses; float32 during the second run and as before after it.
        run: The stage, given the dtype to compute in.
        generator: What the stage draws from.

    Raises:
        RuntimeError: float32 gives NaN or infinity too.
    """
    dtype: torch.dtype = module.dtype
    if dtype != torch.float32:
        one = torch.default_generator if generator is None else generator
        before = [(g, g.get_state()) for g in (one if isinstance(one, Sequence) else [one])]
        result = run(dtype)
        if torch.isfinite(result).all():
            return result
        name = str(dtype).removeprefix("torch.")
        warnings.warn(f"{stage}: NaN or infinity in {name}; this stage runs again in float32", stacklevel=4)
        for g, state in before:
            g.set_state(state)
        module.float()
    try:
        result = run(torch.float32)
    finally:
        if dtype != torch.float32:
            module.to(dtype)
    if not torch.isfinite(result).all():
        raise RuntimeError(f"{stage}: NaN or infinity in float32: the weights or the prompt embeds are damaged")
    return result
