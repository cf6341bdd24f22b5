"""Gaussian noise that depends on the generator alone, and half precision that overflows, noticed and made good."""

from __future__ import annotations

import copy
import numbers
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
    drawn = [_one_drawn((1, *shape[1:]), g).to(device, dtype) for g in generators]
    return drawn[0] if count == 1 else torch.cat(drawn)


def _one_drawn(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    # In float32, whatever PyTorch's default is: in float64 a seed gives other numbers.
    device = "cpu" if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32)


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU that begins at a seed, from 0 to 2⁶⁴ - 1, also one of NumPy's integers.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed!r:.80}; expected a whole number from 0 to {2**64 - 1}")
    return torch.Generator().manual_seed(int(seed))


def retry_in_float32(
    stage: str, network: Any, run: Callable[[Any, Generator], Tensor], generator: Generator = None
) -> Tensor:
    """Run a stage; if half precision gave NaN or infinity, once more in float32, from the same noise.

    Its result alone is looked at, once, so that nothing waits for the device inside the stage. Others may use the
    network and the generators meanwhile: the second run has a copy of each.

    Args:
        stage: Its name, for messages.
        network: What it uses; not changed.
        run: The stage, given the network, in whose dtype it computes, and what it draws from.
        generator: What the stage draws from.

    Raises:
        RuntimeError: float32 gives NaN or infinity too.
    """
    dtype: torch.dtype = network.dtype
    if dtype != torch.float32:
        again = _copied(generator)
        result = run(network, generator)
        if torch.isfinite(result).all():
            return result
        name = str(dtype).removeprefix("torch.")
        warnings.warn(f"{stage}: NaN or infinity in {name}; this stage runs again in float32", stacklevel=4)
        network, generator = copy.deepcopy(network).float(), again
    result = run(network, generator)
    if not torch.isfinite(result).all():
        raise RuntimeError(f"{stage}: NaN or infinity in float32: the weights or the prompt embeds are damaged")
    return result


def _copied(generator: Generator) -> Generator:
    """Generators that draw what these are about to draw; a copy of PyTorch's own if there is none."""
    if not isinstance(generator, Sequence):
        return _one_copied(torch.default_generator if generator is None else generator)
    copies = {id(one): _one_copied(one) for one in generator}  # one that serves several pictures still does
    return [copies[id(one)] for one in generator]


def _one_copied(generator: torch.Generator) -> torch.Generator:
    copied = torch.Generator(generator.device)
    copied.set_state(generator.get_state())
    return copied
