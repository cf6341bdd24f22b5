"""Weights laid out once as oneDNN multiplies them; PyTorch lays them out anew in every call.

On a CPU that is a tenth of the time of a layer with many weights and few pixels, or more. The packed copies live as
long as the weights, and take as much memory again. Before a run uses one, it is made sure that it is of the weights as
they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


@dataclass
class Packed:
    """Weights as oneDNN wants them, and by what to know the plain ones that they were made of.

    Attributes:
        place: Address and PyTorch's count of changes. It counts those that are made openly, not those through `.data`.
        sums: Of each row's bits, which change by those, too.
        checked: What `_changes` was when the plain ones were last known to be the same.
    """

    packed: Tensor
    place: tuple[int, int]
    sums: Tensor
    checked: int


_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the plain weights
_changes = 0  # how often `forget` was called: a number, because runs may be in several threads


class PackedConv2d(nn.Conv2d):
    """A convolution while a run goes on."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        if not isinstance(x, Tensor) or torch.is_grad_enabled():
            return super().forward(x)
        return convolve(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class PackedLinear(nn.Linear):
    """A linear layer while a run goes on."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C')."""
        return super().forward(x) if torch.is_grad_enabled() else multiply(x, self.weight, self.bias)


_PACKED: dict[type, type] = {nn.Conv2d: PackedConv2d, nn.Linear: PackedLinear}


@contextmanager
def packing(network: Any) -> Iterator[None]:
    """Inside, convolutions and linear layers of the network multiply by packed weights, if that is of use."""
    changed = [layer for layer in network.modules() if _suits(layer)] if isinstance(network, nn.Module) else []
    forget()
    plain = [type(layer) for layer in changed]
    for layer in changed:
        layer.__class__ = _PACKED[type(layer)]
    try:
        yield
    finally:
        for layer, kind in zip(changed, plain, strict=True):
            layer.__class__ = kind


def forget() -> None:
    """Make sure of the weights when they are next used: they may have changed."""
    global _changes
    _changes += 1


def _suits(layer: nn.Module) -> bool:
    """Is it a plain layer with weights in bfloat16 on a CPU that multiplies them?"""
    if type(layer) not in _PACKED or "forward" in vars(layer) or getattr(layer, "padding_mode", "zeros") != "zeros":
        return False
    weight = layer.weight
    plain = type(weight) is nn.Parameter and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    return plain and isinstance(getattr(layer, "padding", ()), tuple) and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _of(weight: Tensor, pack: Callable[[], Tensor]) -> Tensor:
    """The packed form of these weights, made when it is first asked for."""
    place = weight.data_ptr(), 0 if weight.is_inference() else weight._version
    known, now = _known.get(weight), _changes
    if known is None or known.place != place or not (known.checked == now or torch.equal(known.sums, _sums(weight))):
        known = _known[weight] = Packed(pack(), place, _sums(weight), now)
    known.checked = now
    return known.packed  # type: ignore[no-any-return]


def _sums(weight: Tensor) -> Tensor:
    """Of the bits of each of the C' rows, weighed by their places, as integers that wrap around."""
    rows = weight.detach()
    if rows.ndim == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        rows = rows.permute(0, 2, 3, 1)
    rows = rows.flatten(1)
    bits = rows.view(torch.int64 if rows.shape[1] % 4 == 0 else torch.int16)
    return (bits * torch.arange(1, 2 * bits.shape[1], 2)).sum(1)


# Operators of their own, so that torch.compile calls them as they are and blocks that are alike share what it made.
@torch.library.custom_op("sdedit::convolve", mutates_args=())
def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`F.conv2d`, by packed weights."""
    shape = padding, stride, dilation, groups
    packed = _of(weight, lambda: torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, x.shape))
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *shape, "none", [], "")  # type: ignore[no-any-return]


@torch.library.custom_op("sdedit::multiply", mutates_args=())
def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by packed weights."""
    packed = _of(weight, lambda: torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // x.shape[-1]))
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


convolve.register_fake(F.conv2d)
multiply.register_fake(F.linear)
