"""Compiled networks: the part of a pipeline that hands its repeated blocks to torch.compile."""

from __future__ import annotations

from typing import Any

from torch import nn

from sdedit.models.attention import BasicTransformerBlock, SpatialAttention
from sdedit.models.layers import ResnetBlock2D

# A network is these, again and again: what is alike is compiled once.
BLOCKS = (ResnetBlock2D, BasicTransformerBlock, SpatialAttention)

_SHAPES = 200  # of one kind of block: 20 or so a network and size of picture


class Compiling:
    """Methods that compile a pipeline's networks."""

    unet: Any
    vae: Any

    def compile(self, **options: Any) -> None:
        """Compile the repeated blocks of UNet and VAE, each kind and shape when it is first used.

        Strength, prompt and number of steps change no shape and compile nothing again, nor does a size seen before.
        PyTorch keeps what it compiled on disk (TORCHINDUCTOR_CACHE_DIR), so the next process starts sooner. Adapters
        that come later are compiled with the next call.

        Args:
            options: For `torch.compile`, such as `mode="reduce-overhead"`; `dynamic=False` unless given.
        """
        for network in (self.unet, self.vae):
            for block in blocks(network):
                block.compile(**{"dynamic": False, "fullgraph": True, "recompile_limit": _SHAPES, **options})


def blocks(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network."""
    return [module for module in network.modules() if isinstance(module, BLOCKS)]
