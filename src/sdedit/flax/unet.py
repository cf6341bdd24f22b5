"""The denoising network of Stable Diffusion 1.x and 2.x in Flax: `sdedit.models.unet`, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from sdedit.flax.layers import (
    Array,
    Downsample2D,
    DType,
    ResnetBlock2D,
    TimestepEmbedding,
    Transformer2DModel,
    Upsample2D,
    activation,
    conv,
    group_norm,
    timestep_embedding,
)
from sdedit.flax.model import FlaxModel
from sdedit.models.kinds import known_block, per_block, refuse_other_kinds


@struct.dataclass
class FlaxUNet2DConditionOutput:
    """What the UNet returns: `sample`, the prediction (B, out_channels, H, W)."""

    sample: Array


class _Block(nn.Module):
    """Residual blocks, each with attention to the text after it (or none), and a resampling layer at the end.

    Attributes:
        resnet, transformer: Settings of the layers; no attention if the latter is `None`.
        down, up: On the way down features are kept for the way up, which takes them in again, the last first.
        resample: Is there a layer that changes the size at the end?
    """

    layers: int
    resnet: Mapping[str, Any]
    transformer: Mapping[str, Any] | None
    down: bool = False
    up: bool = False
    resample: bool = False
    padding: int = 1
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array, temb: Array, context: Array, skips: list[Array]) -> Array:
        """x (B, H, W, C) → the same at the next size; `skips` grows on the way down, and shrinks on the way up."""
        for i in range(self.layers):
            if self.up:
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = ResnetBlock2D(**self.resnet, dtype=self.dtype, name=f"resnets_{i}")(x, temb)
            if self.transformer is not None:
                x = Transformer2DModel(**self.transformer, dtype=self.dtype, name=f"attentions_{i}")(x, context)
            if self.down:
                skips.append(x)
        if not self.resample:
            return x
        if self.down:
            x = Downsample2D(x.shape[-1], self.padding, dtype=self.dtype, name="downsamplers_0")(x)
            skips.append(x)
            return x
        # The size of the next skip, not twice ours: odd sizes were rounded up on the way down.
        return Upsample2D(x.shape[-1], dtype=self.dtype, name="upsamplers_0")(x, skips[-1].shape[1:3])


class _MidBlock(nn.Module):
    """Residual block, attention, residual block."""

    resnet: Mapping[str, Any]
    transformer: Mapping[str, Any]
    dtype: DType = jnp.float32

    @nn.compact
    def __call__(self, x: Array, temb: Array, context: Array) -> Array:
        """(B, H, W, C) → (B, H, W, C)."""
        x = ResnetBlock2D(**self.resnet, dtype=self.dtype, name="resnets_0")(x, temb)
        x = Transformer2DModel(**self.transformer, dtype=self.dtype, name="attentions_0")(x, context)
        return ResnetBlock2D(**self.resnet, dtype=self.dtype, name="resnets_1")(x, temb)


class FlaxUNet2DConditionModel(FlaxModel):
    """Predicts noise, velocity or the clean latents from noisy latents, the timestep and the text.

    The fields are the keys of a published `unet/config.json`, and `dtype`, which it computes in. `attention_head_dim`
    is, for historical reasons, the *number* of heads, one for all blocks or one a block.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "DownBlock2D",
    )
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = (
        "UpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "CrossAttnUpBlock2D",
    )
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: int | tuple[int, ...] | None = None
    use_linear_projection: bool = False
    upcast_attention: bool = False
    time_cond_proj_dim: int | None = None
    dtype: DType = jnp.float32

    @classmethod
    def _check(cls, config: Mapping[str, Any]) -> None:
        refuse_other_kinds(config)
        for way in ("Down", "Up"):
            for block_type in config.get(f"{way.lower()}_block_types", ()):
                known_block(f"{way.lower()}_block_types", block_type, (f"CrossAttn{way}Block2D", f"{way}Block2D"))
        known_block("mid_block_type", config.get("mid_block_type") or "None", ("UNetMidBlock2DCrossAttn", "None"))

    def example(self) -> tuple[Any, ...]:
        """See `FlaxModel.example`."""
        side = 2 ** (len(self.block_out_channels) - 1)
        condition = None if self.time_cond_proj_dim is None else jnp.zeros((1, self.time_cond_proj_dim))
        sample, text = jnp.zeros((1, self.in_channels, side, side)), jnp.zeros((1, 1, self.cross_attention_dim))
        return sample, jnp.zeros((1,)), text, condition

    def _transformer(self, level: int, block_type: str) -> dict[str, Any] | None:
        """Settings of the attention layers of a block, `None` if it has none."""
        depth = len(self.block_out_channels)
        heads = self.num_attention_heads or self.attention_head_dim
        if "CrossAttn" not in block_type:
            return None
        return {
            "heads": per_block("attention_head_dim", heads, depth)[level],
            "depth": per_block("transformer_layers_per_block", self.transformer_layers_per_block, depth)[level],
            "groups": self.norm_num_groups,
            "use_linear_projection": self.use_linear_projection,
            "only_cross_attention": block_type != "MidCrossAttn"
            and per_block("only_cross_attention", self.only_cross_attention, depth)[level],
            "upcast_attention": self.upcast_attention,
        }

    @nn.compact
    def __call__(
        self,
        sample: Array,
        timesteps: Array | float,
        encoder_hidden_states: Array,
        timestep_cond: Array | None = None,
        down_block_additional_residuals: Sequence[Array] | None = None,
        mid_block_additional_residual: Array | None = None,
        return_dict: bool = True,
        train: bool = False,
    ) -> FlaxUNet2DConditionOutput | tuple[Array]:
        """Predict from noisy latents.

        Args:
            sample: (B, in_channels, H, W), any H and W.
            timesteps: One number for the batch or (B,), in training timesteps.
            encoder_hidden_states: The text, (B, M, cross_attention_dim).
            timestep_cond: (B, time_cond_proj_dim), for models with that key.
            down_block_additional_residuals: One a skip connection (B, H, W, C), added to it (ControlNet).
            mid_block_additional_residual: Added to the features in the middle (ControlNet).
            return_dict: `False` for a plain tuple.
            train: Changes nothing: there is no dropout.
        """
        depth, channels, context = len(self.block_out_channels), self.block_out_channels, encoder_hidden_states
        layers = per_block("layers_per_block", self.layers_per_block, depth)
        resnet = {"groups": self.norm_num_groups, "eps": self.norm_eps, "act_fn": self.act_fn}
        x = 2 * sample - 1.0 if self.center_input_sample else sample
        times = jnp.broadcast_to(jnp.asarray(timesteps).reshape(-1), sample.shape[:1])
        sinusoids = timestep_embedding(
            times, channels[0], flip_sin_to_cos=self.flip_sin_to_cos, freq_shift=self.freq_shift
        )
        time_embedding = TimestepEmbedding(4 * channels[0], self.act_fn, dtype=self.dtype, name="time_embedding")
        temb = time_embedding(sinusoids.astype(self.dtype), timestep_cond)

        x = conv(channels[0], self.dtype, "conv_in")(x.transpose(0, 2, 3, 1))
        skips = [x]
        for i, block_type in enumerate(self.down_block_types):
            x = _Block(
                layers[i],
                {"channels": channels[i], **resnet},
                self._transformer(i, block_type),
                down=True,
                resample=i < depth - 1,
                padding=self.downsample_padding,
                dtype=self.dtype,
                name=f"down_blocks_{i}",
            )(x, temb, context, skips)
        if down_block_additional_residuals is not None:
            skips = [a + b for a, b in zip(skips, down_block_additional_residuals, strict=True)]

        if self.mid_block_type is not None:
            mid = {"channels": channels[-1], "output_scale_factor": self.mid_block_scale_factor, **resnet}
            transformer = self._transformer(depth - 1, "MidCrossAttn") or {}
            x = _MidBlock(mid, transformer, dtype=self.dtype, name="mid_block")(x, temb, context)
        if mid_block_additional_residual is not None:
            x = x + mid_block_additional_residual

        for i, block_type in enumerate(self.up_block_types):
            level = depth - 1 - i
            x = _Block(
                layers[level] + 1,
                {"channels": channels[level], **resnet},
                self._transformer(level, block_type),
                up=True,
                resample=level > 0,
                dtype=self.dtype,
                name=f"up_blocks_{i}",
            )(x, temb, context, skips)

        x = activation(self.act_fn)(group_norm(self.norm_num_groups, self.norm_eps, self.dtype, "conv_norm_out")(x))
        x = conv(self.out_channels, self.dtype, "conv_out")(x).transpose(0, 3, 1, 2)
        return FlaxUNet2DConditionOutput(x) if return_dict else (x,)
