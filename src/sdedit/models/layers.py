"""The layers that UNet and VAE share: residual blocks, resampling, and the embedding of time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdedit.models.fast.packing import PackedConv2d

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
}


def activation(name: str) -> nn.Module:
    """The activation that a config calls `act_fn`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"act_fn={name!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()


def spread(x: Tensor, batch: int) -> Tensor:
    """A batch (B, …) as often as makes `batch` of it: what is the same with and without the prompt is computed once."""
    return x if len(x) == batch else torch.cat([x] * (batch // len(x)))


def activated(act: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """act(norm(x)), in the memory of norm(x) where it can be: new pages cost a CPU more than the sums."""
    h = norm(x)
    return F.silu(h, inplace=True) if isinstance(act, nn.SiLU) and _free(norm, h) else act(h)


def added(layer: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    """x + h, likewise in the memory of h, which that layer made."""
    return h.add_(x) if _free(layer, h) and h.dtype == x.dtype else x + h


def _free(layer: nn.Module, h: Tensor) -> bool:
    """Is what the layer made a plain tensor, and not strips, that no gradient and no hook needs as it is?"""
    return type(h) is Tensor and not torch.is_grad_enabled() and not layer._forward_hooks


def channels_last(network: nn.Module, x: Tensor) -> Tensor:
    """The input of a network (B, C, H, W) with channels innermost, as convolutions and attention want it.

    The network's convolutions are laid out in the same way when they first see it, one at a time: PyTorch would do it
    in every call. Those that multiply by packed weights need no other layout.
    """
    if not isinstance(x, Tensor) or x.device.type not in ("cpu", "cuda"):  # strips are laid out as they are made
        return x
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
        weights = [layer.weight for layer in layers if not isinstance(layer, PackedConv2d)]
        if weights and not weights[0].is_contiguous(memory_format=torch.channels_last):
            with torch.inference_mode(False):  # in which the weights could never be trained again
                for weight in weights:
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last)


def timestep_embedding(
    timesteps: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0, max_period: int = 10000
) -> Tensor:
    """Sinusoids of the timestep, in float32.

    Args:
        timesteps: (B,), need not be whole numbers.
        dim: Width of the embedding; half of it sines and half cosines, the cosines first if `flip_sin_to_cos`.
        freq_shift: The lowest frequency is `max_period ** -(1 - 1 / (dim / 2 - freq_shift))`.

    Returns:
        (B, dim).
    """
    half = dim // 2
    exponent = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(exponent / (half - freq_shift))[None, :]
    sin, cos = angles.sin(), angles.cos()
    embedding = torch.cat([cos, sin] if flip_sin_to_cos else [sin, cos], dim=-1)
    return F.pad(embedding, (0, 1)) if dim % 2 else embedding


class TimestepEmbedding(nn.Module):
    """Two linear layers on the sinusoids of time; `cond_proj` adds a second condition (LCM's guidance scale)."""

    def __init__(self, in_channels: int, dim: int, act_fn: str = "silu", cond_proj_dim: int | None = None) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, dim)
        self.cond_proj = None if cond_proj_dim is None else nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.act = activation(act_fn)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, sample: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, in_channels), perhaps with a condition (B, cond_proj_dim) → (B, dim)."""
        if condition is not None and self.cond_proj is not None:
            sample = sample + self.cond_proj(condition)
        return self.linear_2(self.act(self.linear_1(sample)))


class ResnetBlock2D(nn.Module):
    """norm, activation, conv, plus time; norm, activation, conv, plus the input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        temb_channels: int | None = None,
        groups: int = 32,
        eps: float = 1e-5,
        act_fn: str = "silu",
        dropout: float = 0.0,
        output_scale_factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.output_scale_factor = output_scale_factor
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = None if temb_channels is None else nn.Linear(temb_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nonlinearity = activation(act_fn)
        self.conv_shortcut = None if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) and the embedded time (B, temb_channels) → (B, out_channels, H, W)."""
        h = self.conv1(activated(self.nonlinearity, self.norm1, x))
        if self.time_emb_proj is not None and temb is not None:
            shift = self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
            h = added(self.conv1, h, shift if len(shift) == 1 else spread(shift, len(h)))
        h = self.conv2(self.dropout(activated(self.nonlinearity, self.norm2, h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        h = added(self.conv2, h, x)
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor


class Downsample2D(nn.Module):
    """Halve height and width by a strided convolution. `padding=0` pads right and bottom only, as the VAE does."""

    def __init__(self, channels: int, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, ceil(H/2), ceil(W/2)), rounded down without padding on the left."""
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample2D(nn.Module):
    """Enlarge by nearest neighbours, then convolve."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) → (B, C, *size), twice the size if none is given."""
        B, C, H, W = x.shape
        size = size or (2 * H, 2 * W)
        # Adding weights up costs as much as so many pixels.
        if size == (2 * H, 2 * W) and B * H * W > C and _bare(self.conv):
            return convolve_doubled(F.pad(x, (1, 1, 1, 1)), _kernels(self.conv.weight), self.conv.bias)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def _bare(layer: nn.Module) -> bool:
    """Is it a convolution and nothing else: no adapter around it, no hook that waits for its call?"""
    own = getattr(layer.forward, "__func__", None) in (nn.Conv2d.forward, PackedConv2d.forward)
    plain = type(layer) in (nn.Conv2d, PackedConv2d)
    return plain and own and not (layer._forward_pre_hooks or layer._forward_hooks)


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
