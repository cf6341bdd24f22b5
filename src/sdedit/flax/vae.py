"""The autoencoder of Stable Diffusion in Flax: `sdedit.models.vae`, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from sdedit.flax import convert
from sdedit.flax.layers import Array, Attention, Downsample2D, DType, ResnetBlock2D, Upsample2D, conv, group_norm
from sdedit.flax.model import FlaxModel
from sdedit.loading.folders import OLD_VAE_ATTENTION

_EPS = 1e-6


@struct.dataclass
class FlaxDiagonalGaussianDistribution:
    """The encoder's answer, a normal distribution for each latent value: `mean` and `logvar`, (B, H/f, W/f, C) each."""

    mean: Array
    logvar: Array

    @property
    def std(self) -> Array:
        """Standard deviations."""
        return jnp.exp(0.5 * self.logvar)

    def sample(self, key: jax.Array) -> Array:
        """Draw latents (B, H/f, W/f, C); in float32 at least."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape)

    def mode(self) -> Array:
        """The most likely latents."""
        return self.mean


@struct.dataclass
class FlaxAutoencoderKLOutput:
    """What `encode` returns: `latent_dist`, the distribution of the latents."""

    latent_dist: FlaxDiagonalGaussianDistribution


@struct.dataclass
class FlaxDecoderOutput:
    """What `decode` returns: `sample`, pixels (B, 3, H, W), about [-1, 1]."""

    sample: Array


class _VaeBlock(nn.Module):
    """Residual blocks of one resolution and the way to the next: "down", "up" or nowhere."""

    layers: int
    resample: str
    resnet: Mapping[str, Any]
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for i in range(self.layers):
            x = ResnetBlock2D(**self.resnet, dtype=self.dtype, name=f"resnets_{i}")(x)
        if self.resample == "down":
            x = Downsample2D(x.shape[-1], padding=0, dtype=self.dtype, name="downsamplers_0")(x)
        elif self.resample == "up":
            x = Upsample2D(x.shape[-1], dtype=self.dtype, name="upsamplers_0")(x)
        return x


class _SpatialAttention(Attention):
    """Self-attention over the pixels of a feature map, with its norm and residual."""

    groups: int = 32
    bias: bool = True
    names: tuple[str, ...] = tuple(OLD_VAE_ATTENTION)

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None) -> Array:
        """(B, H, W, C) → (B, H, W, C)."""
        B, H, W, C = x.shape
        tokens = group_norm(self.groups, _EPS, self.dtype, "group_norm")(x).reshape(B, H * W, C)
        return x + Attention.__call__(self, tokens).reshape(x.shape)


class _VaeMidBlock(nn.Module):
    """Residual block, self-attention over all pixels, residual block."""

    attention: bool
    resnet: Mapping[str, Any]
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = ResnetBlock2D(**self.resnet, dtype=self.dtype, name="resnets_0")(x)
        if self.attention:
            x = _SpatialAttention(
                x.shape[-1], heads=1, groups=self.resnet["groups"], dtype=self.dtype, name="attentions_0"
            )(x)
        return ResnetBlock2D(**self.resnet, dtype=self.dtype, name="resnets_1")(x)


class _Half(nn.Module):
    """The encoder, or the decoder: what both have is in the same order but for the middle, which comes last or first.

    Attributes:
        channels: Of the blocks, in the order in which they run.
        out_channels: Of the result.
        way: "down" for the encoder, "up" for the decoder.
    """

    channels: Sequence[int]
    layers: int
    out_channels: int
    way: str
    attention: bool
    resnet: Mapping[str, Any]
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """(B, H, W, C) → (B, H', W', out_channels)."""
        middle = self.channels[-1] if self.way == "down" else self.channels[0]
        mid_block = _VaeMidBlock(self.attention, {"channels": middle, **self.resnet}, self.dtype, name="mid_block")
        x = conv(self.channels[0], self.dtype, "conv_in")(x)
        if self.way == "up":
            x = mid_block(x)
        for i, channels in enumerate(self.channels):
            resample = self.way if i < len(self.channels) - 1 else ""
            resnet = {"channels": channels, **self.resnet}
            x = _VaeBlock(self.layers, resample, resnet, self.dtype, name=f"{self.way}_blocks_{i}")(x)
        if self.way == "down":
            x = mid_block(x)
        x = nn.silu(group_norm(self.resnet["groups"], _EPS, self.dtype, "conv_norm_out")(x))
        return conv(self.out_channels, self.dtype, "conv_out")(x)


class FlaxAutoencoderKL(FlaxModel):
    """Pixels to latents and back; the fields are the keys of a published `vae/config.json`, and `dtype`."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: DType = jnp.float32

    layout = convert.VAE

    @classmethod
    def _check(cls, config: Mapping[str, Any]) -> None:
        if config.get("_class_name", "AutoencoderKL").removeprefix("Flax") != "AutoencoderKL":
            raise ValueError(f"vae config: {config['_class_name']}; expected AutoencoderKL (Flax has no other)")
        for key in ("shift_factor", "latents_mean", "latents_std"):
            if config.get(key) is not None:
                raise ValueError(f"vae config: {key} is not Stable Diffusion's; expected null")

    def setup(self) -> None:
        """The two halves, and the 1×1 convolutions between them."""
        resnet = {"groups": self.norm_num_groups, "eps": _EPS, "act_fn": self.act_fn}
        channels, latents = self.block_out_channels, self.latent_channels
        shared = {"attention": self.mid_block_add_attention, "resnet": resnet, "dtype": self.dtype}
        self.encoder = _Half(channels, self.layers_per_block, 2 * latents, "down", **shared)
        self.decoder = _Half(channels[::-1], self.layers_per_block + 1, self.out_channels, "up", **shared)
        if self.use_quant_conv:
            self.quant_conv = nn.Conv(2 * latents, (1, 1), dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = nn.Conv(latents, (1, 1), dtype=self.dtype)

    def example(self) -> tuple[Any, ...]:
        """See `FlaxModel.example`."""
        side = 2 ** (len(self.block_out_channels) - 1)
        return (jnp.zeros((1, self.in_channels, side, side)),)

    def encode(self, sample: Array, return_dict: bool = True) -> Any:
        """Encode pixels (B, 3, H, W) in [-1, 1], H and W multiples of f = 2^(blocks - 1)."""
        moments = self.encoder(sample.transpose(0, 2, 3, 1))
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        posterior = FlaxDiagonalGaussianDistribution(mean, jnp.clip(logvar, -30.0, 20.0))
        return FlaxAutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(self, latents: Array, return_dict: bool = True) -> Any:
        """Decode latents (B, latent_channels, h, w), or with channels last as `encode` gives them, to pixels.

        They are divided by `scaling_factor` already. The pixels are (B, 3, h·f, w·f).
        """
        if latents.shape[1] == self.latent_channels:
            latents = latents.transpose(0, 2, 3, 1)
        if self.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        sample = self.decoder(latents).transpose(0, 3, 1, 2)
        return FlaxDecoderOutput(sample) if return_dict else (sample,)

    def __call__(self, sample: Array, sample_posterior: bool = False, return_dict: bool = True) -> Any:
        """Encode and decode: the mode of the latents, or if `sample_posterior` a sample by the rng "gaussian"."""
        posterior = self.encode(sample, return_dict=False)[0]
        latents = posterior.sample(self.make_rng("gaussian")) if sample_posterior else posterior.mode()
        return self.decode(latents.transpose(0, 3, 1, 2), return_dict=return_dict)
