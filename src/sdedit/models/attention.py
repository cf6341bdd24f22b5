"""Attention: one function that computes it, one layer that projects for it, and the transformer that the UNet uses."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdedit.models.layers import spread

# Keys and values (B, M, heads·d), and the weight of what is found with them.
Attended = tuple[Tensor, Tensor, float]

# softmax(Q·Kᵀ/√d)·V of (B, heads, N, d), (B, heads, M, d) and (B, heads, M, d).
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def attention(
    query: Tensor, key: Tensor, value: Tensor, heads: int, *, upcast: bool = False, core: Core | None = None
) -> Tensor:
    """softmax(Q·Kᵀ/√d)·V for every head: the one place of the package that computes attention.

    Args:
        query: (B, N, heads·d).
        key, value: (B, M, heads·d).
        upcast: Compute in float32 whatever the dtype (SD 2.x at 768 overflows float16 otherwise).
        core: What computes it instead of PyTorch's own, see `attention_options`.

    Returns:
        (B, N, heads·d) in the dtype of `value`.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    out = (core or plain)(q, k, v)
    return out.transpose(1, 2).flatten(2).to(value.dtype)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by PyTorch, or in blocks where that is faster, in the shapes of `Core`."""
    many = min(query.shape[2], key.shape[2]) >= 256
    if many and query.dtype == torch.bfloat16 and query.device.type == "cpu" and not torch.is_grad_enabled():
        return _bfloat16_on_cpu(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


@functools.cache
def _blocks_are_faster() -> bool:
    """With CPUs that multiply bfloat16 in vectors but not in tiles: there PyTorch's kernel takes 1.5 times as long."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_tile")


@torch.library.custom_op("sdedit::bfloat16_attention", mutates_args=())
def _bfloat16_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One operation to torch.compile, which would write the loop out."""
    core = in_blocks if _blocks_are_faster() else F.scaled_dot_product_attention
    return core(query, key, value).transpose(1, 2).contiguous().transpose(1, 2)


@_bfloat16_on_cpu.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    B, heads, N, d = query.shape
    return query.new_empty(B, N, heads, d).transpose(1, 2)


_SCORES = 2**21  # of a block: 512 queries and 4,096 keys, 4 MiB
_OCTAVE = 128  # steps of bfloat16's bits from a power of two to the next
_ONE = 127 * _OCTAVE  # bfloat16's bits of 1
_FAR = 100 * _OCTAVE  # scores within ±100 octaves: neither they nor their sums leave bfloat16's range


def in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in bfloat16 a block of queries at a time, whose scores stay in the cache, in the shapes of `Core`.

    Scores come as steps of bfloat16's bits, so that a sum of integers makes exponentials of them (Schraudolph 1999,
    doi 10.1162/089976699300016467): exact at powers of two, a chord between them. A column of ones in the values sums
    them. Scores are rounded to bfloat16; so the mean is taken off the keys, which changes no softmax and makes scores
    smaller, and the scale goes into the keys, before they are rounded.
    """
    B, heads, N, d = query.shape
    keys = (key.float() - key.float().mean(2, keepdim=True)) * (d**-0.5 * _OCTAVE / math.log(2))
    farthest = query.float().norm(dim=-1).amax(-1) * keys.norm(dim=-1).amax(-1)  # that a score can be from 0
    far = (farthest > _FAR).tolist()
    keys = keys.to(key.dtype).transpose(2, 3)
    values = F.pad(F.pad(value, (0, 1), value=1.0), (0, -(d + 1) % 16))  # vectors of 16
    out = query.new_empty(B, N, heads, d).transpose(1, 2)
    size = min(max(_SCORES // key.shape[2], 16), N)
    room = query.new_empty(size, key.shape[2])
    for b, head in itertools.product(range(B), range(heads)):
        k, v = keys[b, head], values[b, head]
        for q, block in zip(query[b, head].split(size), out[b, head].split(size), strict=True):
            scores = torch.mm(q, k, out=room[: len(q)])
            if far[b][head]:
                scores.sub_(scores.amax(-1, keepdim=True)).clamp_(min=-_FAR)
            bits = scores.view(torch.int16)
            bits.copy_(scores).add_(_ONE)
            found = torch.mm(scores, v)
            torch.div(found[:, :d], found[:, d : d + 1], out=block)
    return out


@dataclass(eq=False)
class Context:
    """What a UNet's layers attend to. Their keys and values of it are made once, and serve as long as it does.

    Attributes:
        text: (B, M, context_dim).
        images: Image tokens of each IP-Adapter, (B, M, context_dim).
    """

    text: Tensor
    images: Sequence[Tensor] = ()
    made: dict[Attention, list[Attended]] = field(default_factory=dict)

    def of(self, layer: Attention) -> list[Attended]:
        """What a layer attends to: the text, then the images."""
        if layer not in self.made:
            self.made[layer] = layer.attended(self)
        return self.made[layer]


class ImageKeysValues(nn.Module):
    """An IP-Adapter's part in one layer: keys and values of image tokens, and how much they weigh."""

    def __init__(self, context_dim: int, inner_dim: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v_ip = nn.Linear(context_dim, inner_dim, bias=False)
        self.scale = 1.0


class Attention(nn.Module):
    """Projections around `attention`: of x with itself, or of x with a context such as the text."""

    def __init__(
        self,
        query_dim: int,
        heads: int,
        *,
        context_dim: int | None = None,
        inner_dim: int | None = None,
        bias: bool = False,
        dropout: float = 0.0,
        upcast_attention: bool = False,
    ) -> None:
        super().__init__()
        inner = inner_dim or query_dim
        if inner % heads:
            raise ValueError(f"attention_head_dim: {inner} channels do not divide into {heads} heads")
        self.heads, self.upcast, self.has_context = heads, upcast_attention, context_dim is not None
        self.core: Core | None = None
        self.to_q = nn.Linear(query_dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim or query_dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim or query_dim, inner, bias=bias)
        self.to_qkv: nn.Linear | None = None  # all three as one, if they are fused
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim), nn.Dropout(dropout)])
        self.ip_adapters = nn.ModuleList()

    def attended(self, context: Context) -> list[Attended]:
        """Keys and values of the text, then of the images of each IP-Adapter that weighs anything."""
        found = [(self.to_k(context.text), self.to_v(context.text), 1.0)]
        adapters = cast("Iterable[ImageKeysValues]", self.ip_adapters)
        for adapter, tokens in zip(adapters, context.images, strict=False):  # attention to itself has none
            if adapter.scale:
                found.append((adapter.to_k_ip(tokens), adapter.to_v_ip(tokens), adapter.scale))
        return found

    def forward(self, x: Tensor, attended: Sequence[Attended] | None = None) -> Tensor:
        """x (B, N, query_dim), attending to what `attended` gives, or to itself → (B, N, query_dim)."""
        if self.to_qkv is not None:
            query, key, value = self.to_qkv(x).chunk(3, -1)
            attended = [(key, value, 1.0)]
        else:
            query = self.to_q(x)
            attended = attended or [(self.to_k(x), self.to_v(x), 1.0)]
        (key, value, _), *images = attended
        out = attention(query, key, value, self.heads, upcast=self.upcast, core=self.core)
        for key, value, weight in images:
            out = out + weight * attention(query, key, value, self.heads, upcast=self.upcast, core=self.core)
        return self.to_out[1](self.to_out[0](out))


class SpatialAttention(Attention):
    """Self-attention over the pixels of a feature map, with its norm and residual: the middle of the VAE."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor, attended: Sequence[Attended] | None = None) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)
        return x + super().forward(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other through GELU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, dim_out * 2)

    def forward(self, x: Tensor) -> Tensor:
        """(…, dim) → (…, dim_out)."""
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    PART = 1024  # tokens at once
    LARGE = 2**22  # bytes of an input whose gates and values take 32 MiB: malloc gets that from the system every time

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) → (B, N, dim)."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or x.nbytes < self.LARGE or torch.compiler.is_compiling():
            return self._whole(x)
        # The wide layer's values then lie in the cache, and in memory that is used again.
        return torch.cat([self._whole(part) for part in x.flatten(0, -2).split(self.PART)]).view_as(x)

    def _whole(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward, each on a normed input and added to it."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        context_dim: int,
        dropout: float = 0.0,
        only_cross_attention: bool = False,
        upcast_attention: bool = False,
    ) -> None:
        super().__init__()
        self.only_cross_attention = only_cross_attention
        first = context_dim if only_cross_attention else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, heads, context_dim=first, dropout=dropout, upcast_attention=upcast_attention)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, heads, context_dim=context_dim, dropout=dropout, upcast_attention=upcast_attention)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim, dropout)
        self.merge = 1  # self-attention sees means of so many by so many pixels

    def attended(self, context: Context) -> tuple[list[Attended] | None, list[Attended]]:
        """What the two attentions attend to; `None` is the input itself."""
        return context.of(self.attn1) if self.only_cross_attention else None, context.of(self.attn2)

    def forward(self, x: Tensor, first: Sequence[Attended] | None, text: Sequence[Attended], width: int) -> Tensor:
        """x (B, N, dim), rows of `width`, and what `attended` gave of B or k·B texts → (B or k·B, N, dim)."""
        if first is not None:
            x = spread(x, len(text[0][0]))
        normed = self.norm1(x)
        if first is None and self.merge > 1:
            first = self.attn1.attended(Context(merged(normed, width, self.merge)))
        x = x + self.attn1(normed, first)
        x = spread(x, len(text[0][0]))
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


def merged(tokens: Tensor, width: int, factor: int) -> Tensor:
    """Means of `factor` × `factor` pixels of a map whose pixels are tokens (B, H·width, C), fewer at odd edges.

    Neighbours are much alike, so attention finds nearly the same in their means (Smith et al. 2024, arXiv 2402.13573).
    """
    x = tokens.unflatten(1, (-1, width)).permute(0, 3, 1, 2)
    return F.avg_pool2d(x, factor, ceil_mode=True).flatten(2).transpose(1, 2)


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map, between projections that are 1×1 convolutions or linear."""

    def __init__(
        self,
        channels: int,
        heads: int,
        *,
        depth: int,
        context_dim: int,
        groups: int = 32,
        dropout: float = 0.0,
        use_linear_projection: bool = False,
        only_cross_attention: bool = False,
        upcast_attention: bool = False,
    ) -> None:
        super().__init__()
        self.use_linear_projection = use_linear_projection
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in: nn.Module
        self.proj_out: nn.Module
        if use_linear_projection:
            self.proj_in, self.proj_out = nn.Linear(channels, channels), nn.Linear(channels, channels)
        else:
            self.proj_in, self.proj_out = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(
                channels,
                heads,
                context_dim=context_dim,
                dropout=dropout,
                only_cross_attention=only_cross_attention,
                upcast_attention=upcast_attention,
            )
            for _ in range(depth)
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, C, H, W), a context of B or k·B texts → (B or k·B, C, H, W)."""
        _B, _C, H, W = x.shape
        h = self.norm(x)
        if not self.use_linear_projection:
            h = self.proj_in(h)
        tokens = h.flatten(2).transpose(1, 2)
        if self.use_linear_projection:
            tokens = self.proj_in(tokens)
        for block in cast("Iterable[BasicTransformerBlock]", self.transformer_blocks):
            tokens = block(tokens, *block.attended(context), W)
        if self.use_linear_projection:
            tokens = self.proj_out(tokens)
        h = tokens.transpose(1, 2).unflatten(2, (H, W))
        return spread(x, len(h)) + (h if self.use_linear_projection else self.proj_out(h))
