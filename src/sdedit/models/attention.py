"""Attention: one function that computes it, one layer that projects for it, and the transformer that the UNet uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from sdedit.models.layers import repeat_batch

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
        core: What computes it instead of PyTorch's own, see `options.attention`.

    Returns:
        (B, N, heads·d) in the dtype of `value`.
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    if upcast:
        q, k, v = q.float(), k.float(), v.float()
    out = (core or F.scaled_dot_product_attention)(q, k, v)
    return out.transpose(1, 2).flatten(2).to(value.dtype)


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
        out = self.attend(query, key, value)
        for key, value, weight in images:
            out = out + weight * self.attend(query, key, value)
        return self.to_out[1](self.to_out[0](out))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`attention` of this layer's heads: (B, N, heads·d), (B, M, heads·d) twice → (B, N, heads·d)."""
        return attention(query, key, value, self.heads, upcast=self.upcast, core=self.core)


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

    def __init__(self, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Dropout(dropout), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) → (B, N, dim)."""
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
            x = repeat_batch(x, len(text[0][0]))
        normed = self.norm1(x)
        if first is None and self.merge > 1:
            first = self.attn1.attended(Context(merged(normed, width, self.merge)))
        x = x + self.attn1(normed, first)
        x = repeat_batch(x, len(text[0][0]))
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
        return repeat_batch(x, len(h)) + (h if self.use_linear_projection else self.proj_out(h))
