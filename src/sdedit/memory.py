"""Less memory, or other ways to compute the same: the part of a pipeline that turns them on and off."""

from __future__ import annotations

from typing import Any


class Memory:
    """Methods that change how a pipeline computes; but for FreeU, what it computes stays the same."""

    unet: Any
    vae: Any

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute the UNet's attention a few heads at a time, see `set_attention_slice`."""
        self.unet.set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute the attention of all heads at once again."""
        self.unet.set_attention_slice(None)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Compute attention by xFormers: for CUDA devices, and PyTorch's own is as good where both run.

        Raises:
            ModuleNotFoundError: xFormers is not installed.
            ValueError: There is no CUDA device.
        """
        for model in (self.unet, self.vae):
            model.enable_xformers_memory_efficient_attention(attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Compute attention by PyTorch again."""
        for model in (self.unet, self.vae):
            model.disable_xformers_memory_efficient_attention()

    def enable_freeu(self, s1: float, s2: float, b1: float, b2: float) -> None:
        """Reweigh the UNet's skips and features (arXiv 2309.11497), see `UNet2DConditionModel.enable_freeu`."""
        self.unet.enable_freeu(s1, s2, b1, b2)

    def disable_freeu(self) -> None:
        """Undo `enable_freeu`."""
        self.unet.disable_freeu()

    def fuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Make queries, keys and values by one product, see `AttentionOptions.fuse_qkv_projections`."""
        for model, chosen in ((self.unet, unet), (self.vae, vae)):
            if chosen:
                model.fuse_qkv_projections()

    def unfuse_qkv_projections(self, unet: bool = True, vae: bool = True) -> None:
        """Make them by three products again."""
        for model, chosen in ((self.unet, unet), (self.vae, vae)):
            if chosen:
                model.unfuse_qkv_projections()
