"""The layers that UNet and VAE share: attention, residual blocks, resampling, time. Features are (B, H, W, C)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Array = jax.Array
DType = Any

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation that a config calls `act_fn` or `hidden_act`."""
    if name not in ACTIVATIONS:
        raise ValueError(f"act_fn={name!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def attention(
    query: Array, key: Array, value: Array, heads: int, *, upcast: bool = False, causal: bool = False
) -> Array:
    """softmax(Q·Kᵀ/√d)·V for every head: the one place that computes attention.

    Args:
        query: (B, N, heads·d).
        key, value: (B, M, heads·d).
        upcast: Compute in float32 whatever the dtype (SD 2.x at 768 overflows float16 otherwise).
        causal: Token i sees only tokens up to i.

    Returns:
        (B, N, heads·d) in the dtype of `value`.
    """
    q, k, v = (x.reshape(*x.shape[:2], heads, -1) for x in (query, key, value))
    if upcast:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    return out.reshape(query.shape).astype(value.dtype)


class Attention(nn.Module):
    """Projections around `attention`: of x with itself, or of x with a context such as the text.

    Attributes:
        channels: Of x, and of queries, keys and values.
        names: Of the four projections: query, key, value, output.
    """

    channels: int
    heads: int
    bias: bool = False
    upcast: bool = False
    names: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out_0")
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """x (B, N, C), context (B, M, context_dim) or x itself → (B, N, C)."""
        if self.channels % self.heads:
            raise ValueError(f"attention_head_dim: {self.channels} channels do not divide into {self.heads} heads")
        seen = x if context is None else context

        def project(i: int, x: Array, bias: bool) -> Array:
            return nn.Dense(self.channels, use_bias=bias, dtype=self.dtype, name=self.names[i])(x)

        q, k, v = project(0, x, self.bias), project(1, seen, self.bias), project(2, seen, self.bias)
        return project(3, attention(q, k, v, self.heads, upcast=self.upcast), True)


def group_norm(groups: int, eps: float, dtype: DType, name: str) -> nn.GroupNorm:
    """PyTorch's group norm, whose variance is not taken as a difference of two large numbers."""
    return nn.GroupNorm(groups, epsilon=eps, dtype=dtype, use_fast_variance=False, name=name)


def conv(channels: int, dtype: DType, name: str, *, size: int = 3, stride: int = 1, padding: Any = 1) -> nn.Conv:
    """A convolution of `size`×`size` with PyTorch's padding."""
    return nn.Conv(channels, (size, size), (stride, stride), padding=padding if size > 1 else 0, dtype=dtype, name=name)


class ResnetBlock2D(nn.Module):
    """norm, activation, conv, plus time; norm, activation, conv, plus the input."""

    channels: int
    groups: int
    eps: float
    act_fn: str = "silu"
    output_scale_factor: float = 1.0
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        """(B, H, W, C) and the embedded time (B, T) → (B, H, W, channels)."""
        act = activation(self.act_fn)
        h = conv(self.channels, self.dtype, "conv1")(act(group_norm(self.groups, self.eps, self.dtype, "norm1")(x)))
        if temb is not None:
            h = h + nn.Dense(self.channels, dtype=self.dtype, name="time_emb_proj")(act(temb))[:, None, None]
        h = conv(self.channels, self.dtype, "conv2")(act(group_norm(self.groups, self.eps, self.dtype, "norm2")(h)))
        if x.shape[-1] != self.channels:
            x = conv(self.channels, self.dtype, "conv_shortcut", size=1)(x)
        return (x + h) / self.output_scale_factor


class Downsample2D(nn.Module):
    """Halve height and width by a strided convolution. `padding=0` pads right and bottom only, as the VAE does."""

    channels: int
    padding: int = 1
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) → (B, H/2, W/2, C), rounded up with padding on the left, down without."""
        padding = self.padding or ((0, 1), (0, 1))
        return conv(self.channels, self.dtype, "conv", stride=2, padding=padding)(x)


class Upsample2D(nn.Module):
    """Enlarge by nearest neighbours, then convolve."""

    channels: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array, size: tuple[int, ...] | None = None) -> Array:
        """(B, H, W, C) → (B, 2·H, 2·W, C), or what `size` leaves of that where a side was odd before it was halved."""
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        x = x.repeat(2, axis=1).repeat(2, axis=2)[:, :height, :width]
        return conv(self.channels, self.dtype, "conv")(x)


def timestep_embedding(
    timesteps: Array, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0, max_period: int = 10000
) -> Array:
    """Sinusoids of the timestep (B,), in float32, (B, dim): see `sdedit.models.layers.timestep_embedding`."""
    half = dim // 2
    exponent = -math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = timesteps[:, None].astype(jnp.float32) * jnp.exp(exponent)[None]
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    embedding = jnp.concatenate([cos, sin] if flip_sin_to_cos else [sin, cos], axis=-1)
    return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


class TimestepEmbedding(nn.Module):
    """Two linear layers on the sinusoids of time; `cond_proj` adds a second condition (LCM's guidance scale)."""

    channels: int
    act_fn: str = "silu"
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, sample: Array, condition: Array | None = None) -> Array:
        """(B, C), perhaps with a condition (B, D) → (B, channels)."""
        if condition is not None:
            sample = sample + nn.Dense(sample.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj")(condition)
        hidden = activation(self.act_fn)(nn.Dense(self.channels, dtype=self.dtype, name="linear_1")(sample))
        return nn.Dense(self.channels, dtype=self.dtype, name="linear_2")(hidden)


class GEGLU(nn.Module):
    """A linear layer whose one half gates the other through GELU (Shazeer 2020, arXiv 2002.05202)."""

    channels: int
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(…, C) → (…, channels)."""
        x, gate = jnp.split(nn.Dense(2 * self.channels, dtype=self.dtype, name="proj")(x), 2, axis=-1)
        return x * nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
    """GEGLU to four times the width, and back."""

    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(…, C) → (…, C)."""
        hidden = GEGLU(4 * x.shape[-1], dtype=self.dtype, name="net_0")(x)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="net_2")(hidden)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward, each on a normed input and added to it."""

    heads: int
    only_cross_attention: bool = False
    upcast_attention: bool = False
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """x (B, N, C), context (B, M, context_dim) → (B, N, C)."""

        def norm(i: int, x: Array) -> Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, use_fast_variance=False, name=f"norm{i}")(x)

        def attend(i: int, x: Array, context: Array | None) -> Array:
            layer = Attention(x.shape[-1], self.heads, upcast=self.upcast_attention, dtype=self.dtype, name=f"attn{i}")
            return layer(norm(i, x), context)

        x = x + attend(1, x, context if self.only_cross_attention else None)
        x = x + attend(2, x, context)
        return x + FeedForward(dtype=self.dtype, name="ff")(norm(3, x))


class Transformer2DModel(nn.Module):
    """Transformer blocks over the pixels of a feature map, between projections that are 1×1 convolutions or linear."""

    heads: int
    depth: int = 1
    groups: int = 32
    use_linear_projection: bool = False
    only_cross_attention: bool = False
    upcast_attention: bool = False
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array, context: Array) -> Array:
        """x (B, H, W, C), context (B, M, context_dim) → (B, H, W, C)."""
        B, H, W, C = x.shape

        def project(name: str, x: Array) -> Array:  # the same map of channels, kept in files in two shapes
            if self.use_linear_projection:
                return nn.Dense(C, dtype=self.dtype, name=name)(x)
            return conv(C, self.dtype, name, size=1)(x)

        tokens = project("proj_in", group_norm(self.groups, 1e-6, self.dtype, "norm")(x)).reshape(B, H * W, C)
        for i in range(self.depth):
            tokens = BasicTransformerBlock(
                self.heads,
                self.only_cross_attention,
                self.upcast_attention,
                dtype=self.dtype,
                name=f"transformer_blocks_{i}",
            )(tokens, context)
        return x + project("proj_out", tokens.reshape(B, H, W, C))
