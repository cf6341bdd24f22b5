"""Ways for an autoencoder to do with less memory, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdedit.models.attention import SpatialAttention
from sdedit.models.fast import tiling
from sdedit.models.options.attention import by_queries

# Pictures up to this size, in pixels, are not worth it.
_SMALL = 512 * 512


class VaeOptions(nn.Module):
    """The part of an autoencoder that codes a batch a picture at a time, and large pictures in tiles."""

    config: Any
    use_slicing = False
    use_tiling = False

    def enable_slicing(self) -> None:
        """Code the pictures of a batch one after the other."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Code all pictures of a batch at once again."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True) -> None:
        """Code pictures of more than 512×512 in tiles that share their norms' statistics: the same, without seams.

        Args:
            use_tiling: `False` turns it off.
        """
        self.use_tiling = use_tiling
        for layer in self.modules():
            if isinstance(layer, SpatialAttention) and layer.core in (None, by_queries):
                layer.core = by_queries if use_tiling else None

    def disable_tiling(self) -> None:
        """Code pictures of any size whole again."""
        self.enable_tiling(False)

    def _code(self, network: Callable[[Any], Any], x: Tensor, factor: int) -> Tensor:
        """`network(x)`, as the options say; a picture has `factor` times the height and width of x."""
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._code(network, one, factor) for one in x.split(1)])
        pixels = x.shape[2] * x.shape[3] * factor**2
        if not self.use_tiling or pixels <= _SMALL:
            return network(x)  # type: ignore[no-any-return]
        widest = len(x) * self.config.block_out_channels[0] * pixels * x.element_size()
        return tiling.run(network, x, tiling.Budget(2 * widest, reserve=widest))
