"""The autoencoder of Stable Diffusion (Kingma & Welling, arXiv 1312.6114; Rombach et al., arXiv 2112.10752)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdedit.models.attention import SpatialAttention
from sdedit.models.fast.full_speed import at_full_speed
from sdedit.models.layers import Downsample2D, ResnetBlock2D, Upsample2D
from sdedit.models.model import Model
from sdedit.models.options.vae import VaeOptions
from sdedit.noise import randn
from sdedit.output import Output

_EPS = 1e-6


class DiagonalGaussianDistribution:
    """The encoder's answer: a normal distribution for each latent value.

    `parameters` is (B, 2·C, H, W): the means, then the logarithms of the variances (clamped to [-30, 20]).
    """

    def __init__(self, parameters: Tensor) -> None:
        self.mean, logvar = parameters.chunk(2, dim=1)
        self.logvar = logvar.clamp(-30.0, 20.0)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Draw latents (B, C, H, W)."""
        shape = tuple(self.mean.shape)
        return self.mean + self.std * randn(shape, generator, device=self.mean.device, dtype=self.mean.dtype)

    def mode(self) -> Tensor:
        """The most likely latents (B, C, H, W)."""
        return self.mean

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal, in nats, (B,)."""
        return 0.5 * (self.mean**2 + self.var - 1.0 - self.logvar).sum(dim=(1, 2, 3))


@dataclass
class AutoencoderKLOutput(Output):
    """What `encode` returns: `latent_dist`, the distribution of the latents."""

    latent_dist: DiagonalGaussianDistribution


@dataclass
class DecoderOutput(Output):
    """What `decode` returns: `sample`, pixels (B, 3, H, W), about [-1, 1]."""

    sample: Tensor


class _VaeBlock(nn.Module):
    """Residual blocks of one resolution and the way to the next."""

    def __init__(self, in_channels: int, out_channels: int, layers: int, resample: str, **resnet: Any) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock2D(in_channels if i == 0 else out_channels, out_channels, **resnet) for i in range(layers)
        )
        self.downsamplers = nn.ModuleList([Downsample2D(out_channels, padding=0)]) if resample == "down" else None
        self.upsamplers = nn.ModuleList([Upsample2D(out_channels)]) if resample == "up" else None

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in self.downsamplers or self.upsamplers or ():
            x = resample(x)
        return x


class _VaeMidBlock(nn.Module):
    """Residual block, self-attention over all pixels, residual block."""

    def __init__(self, channels: int, attention: bool, **resnet: Any) -> None:
        super().__init__()
        made = [SpatialAttention(channels, groups=resnet["groups"], eps=_EPS)] if attention else []
        self.attentions = nn.ModuleList(made)
        self.resnets = nn.ModuleList(ResnetBlock2D(channels, channels, **resnet) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Encoder(nn.Module):
    """Pixels (B, in_channels, H, W) to the parameters of the latents' distribution (B, 2·latent_channels, H/f, W/f)."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        channels: Sequence[int],
        layers: int,
        attention: bool,
        **resnet: Any,
    ) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        last = len(channels) - 1
        self.down_blocks = nn.ModuleList(
            _VaeBlock(channels[max(i - 1, 0)], c, layers, "down" if i < last else "", **resnet)
            for i, c in enumerate(channels)
        )
        self.mid_block = _VaeMidBlock(channels[-1], attention, **resnet)
        self.conv_norm_out = nn.GroupNorm(resnet["groups"], channels[-1], eps=_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], 2 * latent_channels, 3, padding=1)

    @at_full_speed
    def forward(self, x: Tensor) -> Tensor:
        """Pixels to the distribution's parameters."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (B, latent_channels, H/f, W/f) to pixels (B, out_channels, H, W)."""

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        channels: Sequence[int],
        layers: int,
        attention: bool,
        **resnet: Any,
    ) -> None:
        super().__init__()
        channels = list(reversed(channels))
        self.conv_in = nn.Conv2d(latent_channels, channels[0], 3, padding=1)
        self.mid_block = _VaeMidBlock(channels[0], attention, **resnet)
        last = len(channels) - 1
        self.up_blocks = nn.ModuleList(
            _VaeBlock(channels[max(i - 1, 0)], c, layers + 1, "up" if i < last else "", **resnet)
            for i, c in enumerate(channels)
        )
        self.conv_norm_out = nn.GroupNorm(resnet["groups"], channels[-1], eps=_EPS)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    @at_full_speed
    def forward(self, z: Tensor) -> Tensor:
        """Latents to pixels."""
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


class AutoencoderKL(VaeOptions, Model):
    """Pixels to latents and back; the arguments are the keys of a published `vae/config.json`."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__()
        for key, types, known in (
            ("down_block_types", down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", up_block_types, "UpDecoderBlock2D"),
        ):
            if set(types) != {known} or len(types) != len(block_out_channels):
                raise ValueError(f"vae config: {key}={list(types)}; expected {len(block_out_channels)} times {known!r}")
        if shift_factor is not None or latents_mean is not None or latents_std is not None:
            raise ValueError(
                "vae config: shift_factor, latents_mean and latents_std are not Stable Diffusion's; expected null"
            )
        blocks = (block_out_channels, layers_per_block, mid_block_add_attention)
        resnet: dict[str, Any] = {"groups": norm_num_groups, "eps": _EPS, "act_fn": act_fn}
        self.encoder = Encoder(in_channels, latent_channels, *blocks, **resnet)
        self.decoder = Decoder(latent_channels, out_channels, *blocks, **resnet)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Encode pixels (B, 3, H, W) in [-1, 1], H and W multiples of f = 2^(blocks - 1)."""
        moments = self._code(self.encoder, x, 1)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: Any = None) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, latent_channels, h, w), already divided by `scaling_factor`, to pixels (B, 3, h·f, w·f).

        `generator` is not used: the decoder draws nothing.
        """
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        sample = self._code(self.decoder, z, 2 ** (len(self.config.block_out_channels) - 1))
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, sample_posterior: bool = False, return_dict: bool = True) -> Any:
        """Encode and decode: the mode of the latents, or a sample if `sample_posterior`."""
        posterior = self.encode(sample, return_dict=False)[0]
        return self.decode(posterior.sample() if sample_posterior else posterior.mode(), return_dict=return_dict)
