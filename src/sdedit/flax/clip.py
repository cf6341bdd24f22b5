"""CLIP in Flax: the text encoder of Stable Diffusion 1.x and 2.x, and the picture's half for the safety checker.

transformers has no Flax models any more. Names and shapes of the parameters are those that its Flax models had.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from sdedit.flax import convert
from sdedit.flax.layers import Array, DType, activation, attention
from sdedit.flax.model import FlaxModel


class Size(NamedTuple):
    """What the layers of a CLIP transformer need to know of its config."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float
    dtype: DType


def norm(size: Size, name: str) -> nn.LayerNorm:
    """A layer norm of the transformer."""
    return nn.LayerNorm(epsilon=size.layer_norm_eps, dtype=size.dtype, use_fast_variance=False, name=name)


class _Attention(nn.Module):
    size: Size
    causal: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width, dtype = self.size.hidden_size, self.size.dtype
        q, k, v = (nn.Dense(width, dtype=dtype, name=f"{part}_proj")(x) for part in "qkv")
        out = attention(q, k, v, self.size.num_attention_heads, causal=self.causal)
        return nn.Dense(width, dtype=dtype, name="out_proj")(out)


class _Mlp(nn.Module):
    size: Size

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = nn.Dense(self.size.intermediate_size, dtype=self.size.dtype, name="fc1")(x)
        return nn.Dense(self.size.hidden_size, dtype=self.size.dtype, name="fc2")(
            activation(self.size.hidden_act)(hidden)
        )


class _Layer(nn.Module):
    """Self-attention and a feed-forward layer, each on a normed input and added to it."""

    size: Size
    causal: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x + _Attention(self.size, self.causal, name="self_attn")(norm(self.size, "layer_norm1")(x))
        return x + _Mlp(self.size, name="mlp")(norm(self.size, "layer_norm2")(x))


class _Layers(nn.Module):
    size: Size
    causal: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.size.num_hidden_layers):
            x = _Layer(self.size, self.causal, name=str(i))(x)
        return x


class _Encoder(nn.Module):
    size: Size
    causal: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _Layers(self.size, self.causal, name="layers")(x)


class _TextEmbeddings(nn.Module):
    size: Size
    words: int
    places: int

    @nn.compact
    def __call__(self, input_ids: Array) -> Array:
        width, dtype = self.size.hidden_size, self.size.dtype
        tokens = nn.Embed(self.words, width, dtype=dtype, name="token_embedding")(input_ids)
        places = nn.Embed(self.places, width, dtype=dtype, name="position_embedding")
        return tokens + places(jnp.arange(input_ids.shape[-1]))


class _TextTransformer(nn.Module):
    size: Size
    words: int
    places: int

    @nn.compact
    def __call__(self, input_ids: Array) -> Array:
        x = _TextEmbeddings(self.size, self.words, self.places, name="embeddings")(input_ids)
        return norm(self.size, "final_layer_norm")(_Encoder(self.size, causal=True, name="encoder")(x))


class FlaxCLIPTextModel(FlaxModel):
    """The prompt's tokens to prompt embeds; the fields are the keys of a published `text_encoder/config.json`."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    dtype: DType = jnp.float32

    weights_name = "flax_model.msgpack"
    layout = convert.CLIP_TEXT

    @nn.compact
    def __call__(self, input_ids: Array) -> tuple[Array]:
        """Token ids (B, M) → the last hidden states, normed, (B, M, hidden_size), in a tuple."""
        size = Size._make(getattr(self, name) for name in Size._fields)
        encode = _TextTransformer(size, self.vocab_size, self.max_position_embeddings, name="text_model")
        return (encode(input_ids),)

    def example(self) -> tuple[Any, ...]:
        """See `FlaxModel.example`."""
        return (jnp.zeros((1, 1), dtype=jnp.int32),)


class _VisionEmbeddings(nn.Module):
    size: Size
    image_size: int
    patch_size: int

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        width, dtype, patch = self.size.hidden_size, self.size.dtype, (self.patch_size,) * 2
        first = self.param("class_embedding", nn.initializers.normal(0.02), (width,))
        patches = nn.Conv(width, patch, patch, padding=0, use_bias=False, dtype=dtype, name="patch_embedding")(
            pixels.transpose(0, 2, 3, 1)
        ).reshape(len(pixels), -1, width)
        tokens = jnp.concatenate([jnp.broadcast_to(first.astype(dtype), (len(pixels), 1, width)), patches], axis=1)
        count = (self.image_size // self.patch_size) ** 2 + 1
        places = nn.Embed(count, width, dtype=dtype, name="position_embedding")
        return tokens + places(jnp.arange(count))


class _VisionTransformer(nn.Module):
    size: Size
    image_size: int
    patch_size: int

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        x = _VisionEmbeddings(self.size, self.image_size, self.patch_size, name="embeddings")(pixels)
        x = _Encoder(self.size, name="encoder")(norm(self.size, "pre_layrnorm")(x))
        return norm(self.size, "post_layernorm")(x[:, 0])


class CLIPVision(nn.Module):
    """Pixels for CLIP (B, 3, S, S) → the pooled view of them (B, hidden_size)."""

    size: Size
    image_size: int
    patch_size: int

    @nn.compact
    def __call__(self, pixels: Array) -> Array:
        """See the class."""
        return _VisionTransformer(self.size, self.image_size, self.patch_size, name="vision_model")(pixels)
