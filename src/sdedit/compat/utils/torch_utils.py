"""Noise as users of diffusers draw it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdedit.noise import Generator, randn

__all__ = ["is_compiled_module", "randn_tensor"]


def randn_tensor(
    shape: Sequence[int],
    generator: Generator = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
) -> Tensor:
    """Standard normal noise of `shape` (B, …): see `sdedit.noise.randn`; a list of one generator is that generator."""
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    return randn(shape, generator, device=device, dtype=dtype or torch.get_default_dtype())


def is_compiled_module(module: Any) -> bool:
    """Was it made by `torch.compile`?"""
    return hasattr(module, "_orig_mod")
