"""The networks' layers with fewer products, and with sums and activations in memory that they have already.

Bits stay the same but for `QuarteredUpsample2D`, which adds weights up where the plain layer adds products.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdedit.models.attention import FeedForward
from sdedit.models.fast.packing import PackedConv2d
from sdedit.models.layers import ResnetBlock2D, Upsample2D, repeat_batch

_PART = 1024  # tokens at once
_LARGE = 2**22  # bytes of an input whose gates and values take 32 MiB: malloc gets that from the system every time


class FreeGroupNorm(nn.GroupNorm):
    """Says of what it makes that nobody else has it, if no gradient and no hook needs it as it is."""

    def forward(self, x: Tensor) -> Tensor:
        """The same as of the plain layer, to the bit."""
        h = super().forward(x)
        if not torch.compiler.is_compiling() and _is_free(self, h):
            h.is_free = True  # type: ignore[attr-defined]
        return h


class InPlaceSiLU(nn.SiLU):
    """Writes over what nobody else has: new pages cost a CPU more than the sums."""

    def forward(self, x: Tensor) -> Tensor:
        """The same as of the plain layer, to the bit."""
        eager = type(x) is Tensor and not torch.compiler.is_compiling()
        if not (eager and hasattr(x, "is_free")) or self._forward_pre_hooks or self._forward_hooks:
            return super().forward(x)
        del x.is_free
        return F.silu(x, inplace=True)


class InPlaceResnetBlock2D(ResnetBlock2D):
    """Adds in the memory of what its convolutions made."""

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """The same as of the plain block, to the bit."""
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(self.nonlinearity(temb))
            h = _add(self.conv1, h, repeat_batch(shift, len(h))[:, :, None, None])
        h = self.conv2(self.dropout(self.nonlinearity(self.norm2(h))))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = _add(self.conv2, h, x)
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor


def _add(layer: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    """x + h, in the memory of h, which that layer made."""
    return h.add_(x) if _is_free(layer, h) and h.dtype == x.dtype else x + h


def _is_free(layer: nn.Module, h: Tensor) -> bool:
    """Is what the layer made a plain tensor that no gradient and no hook needs as it is?"""
    return type(h) is Tensor and not torch.is_grad_enabled() and not layer._forward_hooks


class FeedForwardInParts(FeedForward):
    """Some tokens at a time: the wide layer's values lie in the cache, and in memory that is used again."""

    def forward(self, x: Tensor) -> Tensor:
        """The same as of the plain layer, to the bit."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or x.nbytes < _LARGE or torch.compiler.is_compiling():
            return super().forward(x)
        plain = super().forward
        return torch.cat([plain(part) for part in x.flatten(0, -2).split(_PART)]).view_as(x)


class QuarteredUpsample2D(Upsample2D):
    """Convolves the small map with four small kernels instead of the enlarged one with a large one."""

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """The same as of the plain layer, within rounding."""
        B, C, H, W = x.shape
        twice = size is None or tuple(size) == (2 * H, 2 * W)
        # Adding weights up costs as much as so many pixels.
        if twice and B * H * W > C and _is_bare(self.conv):
            return convolve_doubled(F.pad(x, (1, 1, 1, 1)), _kernels(self.conv.weight), self.conv.bias)
        return super().forward(x, size)


def _is_bare(layer: nn.Module) -> bool:
    """Is it a convolution and nothing else: no adapter around it, no hook that waits for its call?"""
    plain = type(layer) in (nn.Conv2d, PackedConv2d) and "forward" not in vars(layer)
    return plain and not (layer._forward_pre_hooks or layer._forward_hooks)


def _kernels(weight: Tensor) -> list[Tensor]:
    """2×2 kernels that see in a picture what a 3×3 one (C', C, 3, 3) sees in it at twice its size: 4/9 of the products.

    Of a 3×3 window in the enlarged picture, neighbours are copies of one pixel, so their weights can be added up. Even
    rows see w0 of the row above and w1 + w2 of their own, odd rows w0 + w1 of their own and w2 of the row below;
    so do columns. One for even rows and columns, even and odd, odd and even, odd and odd.
    """
    above, own, below = weight.float().unbind(2)
    kernels = []
    for rows in ((above, own + below), (above + own, below)):
        left, middle, right = torch.stack(rows, 2).unbind(3)
        kernels += [torch.stack(columns, 3) for columns in ((left, middle + right), (left + middle, right))]
    return [kernel.to(weight.dtype) for kernel in kernels]


def convolve_doubled(padded: Tensor, kernels: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """Convolve at twice the size what has a pixel of zeros around it (B, C, H + 2, W + 2) → (B, C', 2·H, 2·W)."""
    if torch.overrides.has_torch_function((padded,)):
        return torch.overrides.handle_torch_function(convolve_doubled, (padded,), padded, kernels, bias)
    B, _C, H, W = padded.shape
    out = padded.new_empty(B, len(kernels[0]), 2 * H - 4, 2 * W - 4).contiguous(memory_format=torch.channels_last)
    for (i, j), kernel in zip(itertools.product((0, 1), repeat=2), kernels, strict=True):
        out[:, :, i::2, j::2] = F.conv2d(padded[:, :, i : H - 1 + i, j : W - 1 + j], kernel, bias)
    return out
