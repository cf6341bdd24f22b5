"""Attention: one function that computes it, one layer that projects for it, and the transformer that the UNet uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

# What is attended to: the text, or the text and, for each IP-Adapter, image tokens (B, M, context_dim).
Context = Tensor | tuple[Tensor, list[Tensor]]

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
    out = (core or F.scaled_dot_product_attention)(q, k, v)
    return out.transpose(1, 2).flatten(2).to(value.dtype)


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

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        """x (B, N, query_dim), context (B, M, context_dim) or x itself → (B, N, query_dim)."""
        text, images = context if isinstance(context, tuple) else (context, [])
        text = x if text is None else text
        if self.to_qkv is not None:
            query, key, value = self.to_qkv(x).chunk(3, -1)
        else:
            query, key, value = self.to_q(x), self.to_k(text), self.to_v(text)
        out = attention(query, key, value, self.heads, upcast=self.upcast, core=self.core)
        adapters = cast("Iterable[ImageKeysValues]", self.ip_adapters)
        for adapter, tokens in zip(adapters, images, strict=False):  # attention to itself has none
            if adapter.scale:
                key, value = adapter.to_k_ip(tokens), adapter.to_v_ip(tokens)
                out = out + adapter.scale * attention(query, key, value, self.heads, upcast=self.upcast, core=self.core)
        return self.to_out[1](self.to_out[0](out))


class SpatialAttention(Attention):
    """Self-attention over the pixels of a feature map, with its norm and residual: the middle of the VAE."""

    def __init__(self, channels: int, *, groups: int, eps: float) -> None:
        super().__init__(channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=eps)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
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
        """(…, dim) → (…, dim)."""
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

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, N, dim), context (B, M, context_dim) → (B, N, dim)."""
        x = x + self.attn1(self.norm1(x), context if self.only_cross_attention else None)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


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
        """x (B, C, H, W), context (B, M, context_dim) → (B, C, H, W)."""
        _B, _C, H, W = x.shape
        h = self.norm(x)
        if not self.use_linear_projection:
            h = self.proj_in(h)
        tokens = h.flatten(2).transpose(1, 2)
        if self.use_linear_projection:
            tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        if self.use_linear_projection:
            tokens = self.proj_out(tokens)
        h = tokens.transpose(1, 2).unflatten(2, (H, W))
        return x + (h if self.use_linear_projection else self.proj_out(h))
