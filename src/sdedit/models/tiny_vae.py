"""The tiny autoencoder (TAESD layout): plain convolutions, for previews and for decoding in a fraction of the time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdedit.models.fast.full_speed import at_full_speed
from sdedit.models.layers import activation
from sdedit.models.model import Model
from sdedit.models.options.vae import VaeOptions
from sdedit.models.vae import DecoderOutput
from sdedit.output import Output


@dataclass
class AutoencoderTinyOutput(Output):
    """What `encode` returns: `latents` (B, latent_channels, H/f, W/f); they are not a distribution."""

    latents: Tensor


class _TinyBlock(nn.Module):
    """Three convolutions and a residual."""

    def __init__(self, channels: int, act_fn: str) -> None:
        super().__init__()

        def conv() -> nn.Conv2d:
            return nn.Conv2d(channels, channels, 3, padding=1)

        self.conv = nn.Sequential(conv(), activation(act_fn), conv(), activation(act_fn), conv())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


class _TinyEncoder(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, blocks: Sequence[int], channels: Sequence[int], act_fn: str
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for i, (count, width) in enumerate(zip(blocks, channels, strict=True)):
            if i == 0:
                layers.append(nn.Conv2d(in_channels, width, 3, padding=1))
            else:
                layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
            layers += [_TinyBlock(width, act_fn) for _ in range(count)]
        layers.append(nn.Conv2d(channels[-1], out_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    @at_full_speed
    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x + 1) / 2)


class _TinyDecoder(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        blocks: Sequence[int],
        channels: Sequence[int],
        act_fn: str,
        upsample: tuple[int, str],
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, channels[0], 3, padding=1), activation(act_fn)]
        for i, (count, width) in enumerate(zip(blocks, channels, strict=True)):
            last = i == len(blocks) - 1
            layers += [_TinyBlock(width, act_fn) for _ in range(count)]
            if not last:
                layers.append(nn.Upsample(scale_factor=upsample[0], mode=upsample[1]))
            layers.append(nn.Conv2d(width, out_channels if last else width, 3, padding=1, bias=last))
        self.layers = nn.Sequential(*layers)

    @at_full_speed
    def forward(self, z: Tensor) -> Tensor:
        # Latents beyond ±3 are squashed: the published decoders were trained so.
        return self.layers(torch.tanh(z / 3) * 3) * 2 - 1


class AutoencoderTiny(VaeOptions, Model):
    """Pixels to latents and back; the arguments are the keys of a published `config.json` of this kind."""

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu",
        upsample_fn: str = "nearest",
        latent_channels: int = 4,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: int = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        for name, channels, blocks in (
            ("encoder", encoder_block_out_channels, num_encoder_blocks),
            ("decoder", decoder_block_out_channels, num_decoder_blocks),
        ):
            if len(channels) != len(blocks):
                raise ValueError(
                    f"vae config: {name}_block_out_channels has {len(channels)} values, "
                    f"num_{name}_blocks {len(blocks)}; expected as many"
                )
        self.encoder = _TinyEncoder(
            in_channels, latent_channels, num_encoder_blocks, encoder_block_out_channels, act_fn
        )
        self.decoder = _TinyDecoder(
            latent_channels,
            out_channels,
            num_decoder_blocks,
            decoder_block_out_channels,
            act_fn,
            (upsampling_scaling_factor, upsample_fn),
        )
        # Where the folder layout asks the number of blocks for the factor between pixels and latents.
        self.register_to_config(block_out_channels=tuple(decoder_block_out_channels))

    def scale_latents(self, x: Tensor) -> Tensor:
        """Latents → [0, 1], to keep them in an image file."""
        return (x / (2 * self.config.latent_magnitude) + self.config.latent_shift).clamp(0, 1)

    def unscale_latents(self, x: Tensor) -> Tensor:
        """[0, 1] → latents."""
        return (x - self.config.latent_shift) * (2 * self.config.latent_magnitude)

    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderTinyOutput | tuple[Tensor]:
        """Encode pixels (B, 3, H, W) in [-1, 1]."""
        latents = self._code(self.encoder, x, 1)
        return AutoencoderTinyOutput(latents) if return_dict else (latents,)

    def decode(self, x: Tensor, generator: Any = None, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Decode latents (B, latent_channels, h, w) to pixels; `generator` is not used."""
        sample = self._code(self.decoder, x, 2 ** (len(self.config.block_out_channels) - 1))
        return DecoderOutput(sample) if return_dict else (sample,)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        """Encode and decode, through the 8 bits that `scale_latents` keeps."""
        latents = self.encode(sample, return_dict=False)[0]
        kept = (self.scale_latents(latents) * 255).round().to(torch.uint8)
        return self.decode(self.unscale_latents(kept / 255.0).to(sample.dtype), return_dict=return_dict)
