"""Less memory, or other ways to compute the same: the part of a pipeline that turns them on and off."""

from __future__ import annotations

from typing import Any

import torch

from sdedit.offload import Layers, Turns, choose_device


class Memory:
    """Methods that change how a pipeline computes; but for FreeU, what it computes stays the same."""

    unet: Any
    vae: Any
    components: Any  # the pipeline's property
    _offload: Turns | Layers | None = None

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the networks in the CPU's memory; the one that computes comes to the device, whole, and goes again.

        Args:
            gpu_id: Number of the device; 0 if not given.
            device: Such as `"cuda"`; the accelerator that PyTorch finds if not given.

        Raises:
            RuntimeError: There is no accelerator.
        """
        self._start_offload(Turns, choose_device("enable_model_cpu_offload", gpu_id, device))

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the weights in the CPU's memory; each layer's come to the device while it computes. Slow and small.

        Load adapters before this.

        Args:
            gpu_id, device: As for `enable_model_cpu_offload`.

        Raises:
            RuntimeError: There is no accelerator.
            ImportError: The package accelerate is missing.
        """
        self._start_offload(Layers, choose_device("enable_sequential_cpu_offload", gpu_id, device))

    def remove_all_hooks(self) -> None:
        """End offloading: all networks are on the CPU then."""
        if self._offload is not None:
            self._offload.end()
            self._offload = None

    def maybe_free_model_hooks(self) -> None:
        """Send networks home that a call has brought to the device."""
        if self._offload is not None:
            self._offload.rest()

    def _start_offload(self, kind: type[Turns] | type[Layers], device: torch.device) -> None:
        self.remove_all_hooks()
        self._offload = kind([part for part in self.components.values() if isinstance(part, torch.nn.Module)], device)

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

    def enable_vae_slicing(self) -> None:
        """Encode and decode the pictures of a batch one after the other."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode and decode them all at once again."""
        self.vae.disable_slicing()

    def enable_vae_tiling(self, max_bytes: int | None = None) -> None:
        """Encode and decode large pictures in strips, without seams: see `VaeOptions.enable_tiling`."""
        self.vae.enable_tiling(max_bytes=max_bytes)

    def disable_vae_tiling(self) -> None:
        """Encode and decode them whole again."""
        self.vae.disable_tiling()

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
