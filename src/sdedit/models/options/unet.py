"""Other ways for a UNet to compute nearly the same, or something else: off unless asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from sdedit.models.attention import BasicTransformerBlock
from sdedit.models.fast.freeu import FreeU
from sdedit.models.options.attention import FusedProjections

if TYPE_CHECKING:
    from sdedit.models.fast.deep_reuse import DeepReuse


class UNetOptions(nn.Module):
    """The part of a UNet that sets them.

    Attributes:
        reuse: How deep features serve several steps of a run; `None`: each step computes its own.
    """

    down_blocks: Any
    up_blocks: Any
    reuse: DeepReuse | None = None

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Reweigh what the way up takes in, see `FreeU`; the numbers depend on the model and were found by trying.

        Args:
            s1, s2: Weight of the skips' lowest frequencies in the first and second block, such as 0.9 and 0.2.
            b1, b2: Weight of half of the features from below there, such as 1.5 and 1.6.
        """
        for block, join in zip(self.up_blocks, (FreeU(s1, b1), FreeU(s2, b2)), strict=False):
            block.join = join

    def disable_freeu(self) -> None:
        """Undo `enable_freeu`."""
        for block in self.up_blocks:
            vars(block).pop("join", None)

    def merge_tokens(self, factor: int) -> None:
        """Set how much self-attention merges at the finest level that has attention; 1: nothing.

        Raises:
            ValueError: Queries, keys and values are fused.
        """
        if factor > 1 and any(isinstance(layer, FusedProjections) for layer in self.modules()):
            raise ValueError("token merging: queries, keys and values are fused; call unfuse_qkv_projections() first")
        finest = next((i for i, block in enumerate(self.down_blocks) if block.has_attention), None)
        for level in [] if finest is None else [self.down_blocks[finest], self.up_blocks[-1 - finest]]:
            for layer in level.modules():
                if isinstance(layer, BasicTransformerBlock):
                    layer.merge = factor
