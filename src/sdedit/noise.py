"""Gaussian noise that depends on the generator alone: not on the device, the dtype or the size of the batch."""

from __future__ import annotations

from collections.abc import Sequence

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
