"""Networks at full speed: the passes that a call of a network installs, and those of a run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sdedit.models.fast.blocked_attention import BlockedAttention, BlockedSpatialAttention
from sdedit.models.fast.packing import PACKING, PackedConv2d
from sdedit.models.fast.passes import Pass
from sdedit.models.fast.quick_layers import (
    FeedForwardInParts,
    FreeGroupNorm,
    InPlaceResnetBlock2D,
    InPlaceSiLU,
    QuarteredUpsample2D,
)
from sdedit.models.fast.run_cache import RunCache, cache_of, cached_run

F = TypeVar("F", bound=Callable[..., Any])


def _lay_out(network: nn.Module) -> None:
    """Put channels innermost in convolutions' weights, as they are computed: PyTorch would do it in every call.

    Those that multiply by packed weights need no other layout.
    """
    if torch.is_grad_enabled():
        return
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d) and type(layer) is not PackedConv2d]
    with torch.inference_mode(False):  # in which the weights could never be trained again
        for layer in layers:
            weight = layer.weight
            if weight.device.type in _CHANNELS_LAST and not weight.is_contiguous(memory_format=torch.channels_last):
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)


_CHANNELS_LAST = ("cpu", "cuda")  # devices whose convolutions and attention want channels innermost

QUICK = Pass(
    FreeGroupNorm,
    InPlaceSiLU,
    InPlaceResnetBlock2D,
    FeedForwardInParts,
    QuarteredUpsample2D,
    BlockedAttention,
    BlockedSpatialAttention,
    prepare=_lay_out,
)


@contextmanager
def one_run(unet: Any) -> Iterator[RunCache]:
    """The steps of one run, in this thread: what they share is made once, and weights are packed.

    Yields:
        What they share; clear it when weights, images or what is in the text change.
    """
    with PACKING.installed(unet), QUICK.installed(unet), cached_run(unet) as cache:
        yield cache


def at_full_speed(forward: F) -> F:
    """A network's `forward` with quick layers, and its first argument, a map (B, C, H, W), with channels innermost."""
    first = list(inspect.signature(forward).parameters)[1]

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        if args:
            args = (_channels_last(args[0]), *args[1:])
        elif first in kwargs:
            kwargs[first] = _channels_last(kwargs[first])
        if cache_of(self) is not None:  # the run has them installed
            return forward(self, *args, **kwargs)
        with QUICK.installed(self):
            return forward(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def _channels_last(x: Any) -> Any:
    suits = isinstance(x, Tensor) and x.device.type in _CHANNELS_LAST and x.ndim == 4
    return x.contiguous(memory_format=torch.channels_last) if suits else x
