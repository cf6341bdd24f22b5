"""The denoising network of Stable Diffusion 1.x and 2.x: residual blocks and attention to the text, in a U."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdedit.models.adapters import scaled_call
from sdedit.models.attention import Context, Transformer2DModel
from sdedit.models.fast.full_speed import at_full_speed
from sdedit.models.fast.run_cache import cache_of
from sdedit.models.kinds import known_block, per_block, refuse_other_kinds
from sdedit.models.layers import (
    Downsample2D,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    activation,
    repeat_batch,
    timestep_embedding,
)
from sdedit.models.model import Model
from sdedit.models.options.unet import UNetOptions
from sdedit.output import Output

# What a ControlNet adds to the skips and to the middle.
Residuals = tuple[Sequence[Tensor] | None, Tensor | None]


@dataclass
class UNet2DConditionOutput(Output):
    """What the UNet returns: `sample`, the prediction (B, out_channels, H, W)."""

    sample: Tensor


class _Block(nn.Module):
    """Residual blocks, each with attention to the text after it (or none), and a resampling layer at the end."""

    def __init__(
        self,
        channels: Sequence[tuple[int, int]],
        *,
        resnet: dict[str, Any],
        transformer: dict[str, Any] | None,
        downsamplers: nn.ModuleList | None = None,
        upsamplers: nn.ModuleList | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock2D(c_in, c_out, **resnet) for c_in, c_out in channels)
        if transformer is not None:
            self.attentions = nn.ModuleList(Transformer2DModel(c_out, **transformer) for _, c_out in channels)
        self.has_attention = transformer is not None
        self.downsamplers, self.upsamplers = downsamplers, upsamplers

    def join(self, x: Tensor, skip: Tensor) -> Tensor:
        """Features from below and a skip of the same size, as one map."""
        return torch.cat([x, skip], dim=1)

    def layer(self, i: int, x: Tensor, temb: Tensor, context: Context) -> Tensor:
        """The i-th residual block and its attention."""
        x = self.resnets[i](x, temb)
        return self.attentions[i](x, context) if self.has_attention else x


class _MidBlock(nn.Module):
    """Residual block, then attention and residual block as often as there are attentions."""

    def __init__(self, channels: int, *, resnet: dict[str, Any], transformer: dict[str, Any] | None) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([] if transformer is None else [Transformer2DModel(channels, **transformer)])
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, **resnet) for _ in range(2))

    def forward(self, x: Tensor, temb: Tensor, context: Context) -> Tensor:
        x = self.resnets[0](x, temb)
        for attention in self.attentions:
            x = attention(x, context)
        return self.resnets[1](x, temb)


class UNet2DConditionModel(UNetOptions, Model):
    """Predicts noise, velocity or the clean latents from noisy latents, the timestep and the text.

    The arguments are the keys of a published `unet/config.json`. `attention_head_dim` is, for historical reasons, the
    *number* of heads, one for all blocks or one a block. Keys that belong to other kinds of model (SDXL's
    `addition_embed_type`, class conditioning, …) are accepted with the value that turns them off and refused otherwise.
    """

    repeats_sample = True  # for more texts than pictures, see `forward`

    def __init__(
        self,
        sample_size: int | Sequence[int] | None = None,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = (
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = (
            "UpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
            "CrossAttnUpBlock2D",
        ),
        only_cross_attention: bool | Sequence[bool] = False,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        dropout: float = 0.0,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1280,
        transformer_layers_per_block: int | Sequence[int] = 1,
        attention_head_dim: int | Sequence[int] = 8,
        num_attention_heads: int | Sequence[int] | None = None,
        use_linear_projection: bool = False,
        upcast_attention: bool = False,
        time_cond_proj_dim: int | None = None,
    ) -> None:
        super().__init__()
        depth = len(down_block_types)
        heads = per_block("attention_head_dim", num_attention_heads or attention_head_dim, depth)
        layers = per_block("layers_per_block", layers_per_block, depth)
        transformers = per_block("transformer_layers_per_block", transformer_layers_per_block, depth)
        only_cross = per_block("only_cross_attention", only_cross_attention, depth)
        channels = per_block("block_out_channels", block_out_channels, depth)
        per_block("up_block_types", up_block_types, depth)
        if not isinstance(cross_attention_dim, int):
            raise ValueError(f"unet config: cross_attention_dim={cross_attention_dim!r}; expected one number")
        temb_channels = 4 * channels[0]
        resnet = {
            "temb_channels": temb_channels,
            "groups": norm_num_groups,
            "eps": norm_eps,
            "act_fn": act_fn,
            "dropout": dropout,
        }

        def transformer(i: int, block_type: str) -> dict[str, Any] | None:
            if block_type not in ("CrossAttn", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"):
                return None
            return {
                "heads": heads[i],
                "depth": transformers[i],
                "context_dim": cross_attention_dim,
                "groups": norm_num_groups,
                "dropout": dropout,
                "use_linear_projection": use_linear_projection,
                "only_cross_attention": only_cross[i] if block_type != "CrossAttn" else False,
                "upcast_attention": upcast_attention,
            }

        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(channels[0], temb_channels, act_fn, time_cond_proj_dim)

        self.down_blocks = nn.ModuleList()
        skips = [channels[0]]  # channels of the features that the way up takes in again
        for i, block_type in enumerate(down_block_types):
            known_block("down_block_types", block_type, ("CrossAttnDownBlock2D", "DownBlock2D"))
            inner = [(skips[-1] if j == 0 else channels[i], channels[i]) for j in range(layers[i])]
            last = i == depth - 1
            down = None if last else nn.ModuleList([Downsample2D(channels[i], downsample_padding)])
            self.down_blocks.append(
                _Block(inner, resnet=resnet, transformer=transformer(i, block_type), downsamplers=down)
            )
            skips += [channels[i]] * (layers[i] + (not last))

        self.mid_block: _MidBlock | None = None
        if mid_block_type is not None:
            known_block("mid_block_type", mid_block_type, ("UNetMidBlock2DCrossAttn",))
            self.mid_block = _MidBlock(
                channels[-1],
                resnet={**resnet, "output_scale_factor": mid_block_scale_factor},
                transformer=transformer(depth - 1, "CrossAttn"),
            )

        self.up_blocks = nn.ModuleList()
        previous = channels[-1]
        for i, block_type in enumerate(up_block_types):
            known_block("up_block_types", block_type, ("CrossAttnUpBlock2D", "UpBlock2D"))
            level = depth - 1 - i
            inner = []
            for _ in range(layers[level] + 1):
                inner.append((previous + skips.pop(), channels[level]))
                previous = channels[level]
            up = nn.ModuleList([Upsample2D(channels[level])]) if level else None
            self.up_blocks.append(
                _Block(inner, resnet=resnet, transformer=transformer(level, block_type), upsamplers=up)
            )

        self.conv_norm_out = nn.GroupNorm(norm_num_groups, channels[0], eps=norm_eps)
        self.conv_act = activation(act_fn)
        self.conv_out = nn.Conv2d(channels[0], out_channels, 3, padding=1)
        self.encoder_hid_proj: nn.Module | None = None  # an IP-Adapter's, if one is loaded

    @classmethod
    def from_config(cls, config: Any, **overrides: Any) -> UNet2DConditionModel:
        """Make a UNet with random weights from a config; see `Configurable.from_config`.

        Raises:
            ValueError: The config describes a kind of UNet that is not Stable Diffusion 1.x or 2.x.
        """
        made = super().from_config(config, **overrides)
        refuse_other_kinds(made.config)
        return made

    @at_full_speed
    @scaled_call
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        class_labels: None = None,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
        **others: None,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """Predict from noisy latents.

        Args:
            sample: (B, in_channels, H, W), any H and W. With k·B texts, each of its pictures is predicted k times, in
                the order of `torch.cat([sample] * k)`, and what is the same each time is computed once.
            timestep: One number for the batch or (B,), in training timesteps.
            encoder_hidden_states: The text, (B, M, cross_attention_dim).
            class_labels: Must be `None`: these models have no classes.
            timestep_cond: (B, time_cond_proj_dim), for models with that key.
            cross_attention_kwargs: Only `{"scale": s}`, the strength of adapters.
            added_cond_kwargs: `{"image_embeds": [...]}` where IP-Adapters are loaded, for each of them (B, images, …).
            down_block_additional_residuals: One a skip connection, added to it (ControlNet).
            mid_block_additional_residual: Added to the features in the middle (ControlNet).
            return_dict: `False` for a plain tuple.
            others: What other models take, such as `attention_mask`; must be `None`.
        """
        for name, value in {"class_labels": class_labels, **others}.items():
            if value is not None:
                raise ValueError(f"{name}: Stable Diffusion's UNet does not take any; expected None")
        if self.config.center_input_sample:
            sample = 2 * sample - 1.0
        temb = self._embedded_time(timestep, sample, timestep_cond)
        context = self._context(encoder_hidden_states, added_cond_kwargs or {})

        x = self.conv_in(sample)
        u = self.u if self.reuse is None else functools.partial(self.reuse.u, self)
        x = u(x, temb, context, (down_block_additional_residuals, mid_block_additional_residual))
        x = self.conv_out(self.conv_act(self.conv_norm_out(x)))
        x = repeat_batch(x, len(encoder_hidden_states))
        return UNet2DConditionOutput(x) if return_dict else (x,)

    def u(self, x: Tensor, temb: Tensor, context: Context, residuals: Residuals) -> Tensor:
        """Down, through the middle, and up: (B, C, H, W) → (B or k·B, C, H, W)."""
        x, skips = self.middle(self.down(x, temb, context), temb, context, residuals)
        return self.up(x, skips, temb, context)

    def _embedded_time(self, timestep: Tensor | float, sample: Tensor, condition: Tensor | None) -> Tensor:
        """(1, C) or (B, C)."""
        sinusoids = timestep_embedding(
            torch.as_tensor(timestep, device=sample.device).reshape(-1),
            self.config.block_out_channels[0],
            flip_sin_to_cos=self.config.flip_sin_to_cos,
            freq_shift=self.config.freq_shift,
        )
        embedded: Tensor = self.time_embedding(sinusoids.to(sample.dtype), condition)
        return embedded

    def down(self, x: Tensor, temb: Tensor, context: Context, count: int | None = None) -> list[Tensor]:
        """The way down: what it leaves for the way up, the deepest last; only the first `count` of them if given."""
        skips = [x]
        for block in cast("Iterable[_Block]", self.down_blocks):
            for i in range(len(block.resnets)):
                if len(skips) == count:
                    return skips
                skips.append(block.layer(i, skips[-1], temb, context))
            if block.downsamplers is not None and len(skips) != count:
                skips.append(block.downsamplers[0](skips[-1]))
        return skips

    def middle(
        self, skips: list[Tensor], temb: Tensor, context: Context, residuals: Residuals
    ) -> tuple[Tensor, list[Tensor]]:
        """The deepest features, and the skips; to both is added what a ControlNet gives."""
        x = skips[-1] if self.mid_block is None else self.mid_block(skips[-1], temb, context)
        of_skips, of_middle = residuals
        if of_skips is not None:
            skips = [repeat_batch(a, len(b)) + b for a, b in zip(skips, of_skips, strict=True)]
        return x if of_middle is None else x + of_middle, skips

    def up(self, x: Tensor, skips: list[Tensor], temb: Tensor, context: Context, leave: int = 0) -> Tensor:
        """The way up, whose last layers take the skips in, off the end of the list, until `leave` of them are left."""
        blocks = cast("Iterable[_Block]", self.up_blocks)
        layers = [(block, i) for block in blocks for i in range(len(block.resnets))]
        for block, i in layers[len(layers) - len(skips) : len(layers) - leave]:
            x = block.layer(i, block.join(x, repeat_batch(skips.pop(), len(x))), temb, context)
            if i + 1 == len(block.resnets) and block.upsamplers is not None:
                # The size of the next skip, not twice ours: odd sizes were rounded up on the way down.
                height, width = skips[-1].shape[2:]
                x = block.upsamplers[0](x, (height, width))
        return x

    def _context(self, text: Tensor, added: dict[str, Any]) -> Context:
        """What the layers attend to: the text, and the image tokens of IP-Adapters where there are any."""
        if (self.encoder_hid_proj is None) != ("image_embeds" not in added) or set(added) - {"image_embeds"}:
            expected = "None" if self.encoder_hid_proj is None else "{'image_embeds': [...]}, for the IP-Adapter"
            raise ValueError(f"added_cond_kwargs with {sorted(added) or 'nothing'}; expected {expected}")

        def make() -> Context:
            return Context(text, [] if self.encoder_hid_proj is None else self.encoder_hid_proj(added["image_embeds"]))

        run = cache_of(self)
        return make() if run is None else run.context(text, make)
