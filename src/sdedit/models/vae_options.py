"""Ways for an autoencoder to do with less memory, with the same result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdedit.models.attention import SpatialAttention
from sdedit.models.attention_options import by_queries
from sdedit.models.fast import strips

# Pictures up to this size, in pixels, are not worth it.
_SMALL = 512 * 512
# What coding a picture whole takes, in units of the widest feature map that has to be kept (benchmarks/memory.py).
_WHOLE = 6


class VaeOptions(nn.Module):
    """The part of an autoencoder that codes a batch a picture at a time, and large pictures in strips."""

    config: Any
    use_slicing = False
    use_tiling = False
    max_bytes: int | None = None

    def enable_slicing(self) -> None:
        """Code the pictures of a batch one after the other."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Code all pictures of a batch at once again."""
        self.use_slicing = False

    def enable_tiling(self, use_tiling: bool = True, max_bytes: int | None = None) -> None:
        """Code large pictures in strips that share their norms' statistics: the same picture, without seams.

        Args:
            use_tiling: `False` turns it off.
            max_bytes: For feature maps. Where they need more, some are computed again instead of kept. If not given,
                twice the largest that has to be kept, and pictures up to 512×512 are coded whole.

        Raises:
            ValueError: `max_bytes` is no positive number.
        """
        if max_bytes is not None and (isinstance(max_bytes, bool) or not max_bytes > 0):
            raise ValueError(f"max_bytes={max_bytes!r}; expected a number of bytes such as 2 * 2**30, or None")
        self.use_tiling, self.max_bytes = use_tiling, max_bytes
        for layer in self.modules():
            if isinstance(layer, SpatialAttention) and layer.core in (None, by_queries):
                layer.core = by_queries if use_tiling else None

    def disable_tiling(self) -> None:
        """Code pictures of any size whole again."""
        self.enable_tiling(False)

    def _apart(self, network: Callable[[Any], Any], x: Tensor, factor: int) -> Tensor:
        """`network(x)`, as the options say; a picture has `factor` times the height and width of x."""
        if self.use_slicing and len(x) > 1:
            return torch.cat([self._apart(network, one, factor) for one in x.split(1)])
        if not self.use_tiling:
            return network(x)  # type: ignore[no-any-return]
        pixels = x.shape[2] * x.shape[3] * factor**2
        widest = len(x) * self.config.block_out_channels[0] * pixels * x.element_size()
        if pixels <= _SMALL if self.max_bytes is None else _WHOLE * widest <= self.max_bytes:
            return network(x)  # type: ignore[no-any-return]
        return strips.run(network, x, strips.Budget(self.max_bytes or 2 * widest, reserve=widest))
