"""Half precision that overflows is noticed and made good, instead of giving a black picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sdedit.noise import Generator


def finite(stage: str, module: Any, run: Callable[[torch.dtype], Tensor], generator: Generator = None) -> Tensor:
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
