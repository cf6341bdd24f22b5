"""How a pipeline computes: less memory, less time, or other ways to the same; off unless asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdedit.inputs import checks
from sdedit.models.attention import BasicTransformerBlock, SpatialAttention
from sdedit.models.fast.deep_reuse import LEVELS
from sdedit.models.layers import ResnetBlock2D
from sdedit.models.offload import Layers, Turns, choose_device

# A network is these, again and again: what is alike is compiled once.
BLOCKS = (ResnetBlock2D, BasicTransformerBlock, SpatialAttention)

_SHAPES = 200  # of one kind of block: 20 or so a network and size of picture


class Options:
    """Methods that change how a pipeline computes; what it computes stays.

    But for reuse of deep features (`enable_turbo`) and token merging, which change it a little, and FreeU.
    """

    unet: Any
    vae: Any
    components: Any  # the pipeline's property
    _offload: Turns | Layers | None = None
    _guided = 1.0  # share of the steps that are guided

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

    def enable_vae_tiling(self) -> None:
        """Encode and decode large pictures in tiles, without seams: see `VaeOptions.enable_tiling`."""
        self.vae.enable_tiling()

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

    def enable_turbo(self, level: int = 2, guidance: float = 1.0) -> None:
        """Let the deep features of the UNet serve several steps, see `DeepReuse`. All else stays as it is.

        Args:
            level: 1 computes them in every third UNet call, 2 in every fifth, 3 in every eighth. The more steps a call
                has, the more time it saves and the less it changes the picture.
            guidance: The part of the steps, from the first, that is guided; the rest follow the prompt alone, in half
                the time. Guidance counts where there is much noise (Kynkäänniemi et al. 2024, arXiv 2404.07724).

        Raises:
            ValueError: There is no such level, `guidance` is not from 0 to 1, or the UNet is not one of sdedit's.
        """
        level = checks.whole_number("level", level, 1)
        if level not in LEVELS:
            raise ValueError(f"level={level}; expected one of {', '.join(map(str, LEVELS))}")
        guided = checks.number("guidance", guidance, 0, 1)
        self._own_unet("enable_turbo").reuse = LEVELS[level]
        self._guided = guided

    def enable_token_merging(self, factor: int = 2) -> None:
        """Let self-attention at the UNet's finest level see means of `factor` × `factor` pixels (arXiv 2402.13573).

        Each pixel still asks for itself; there are `factor`² times fewer to ask. At 512×512 that level takes most of
        the time of attention, at larger sizes most of a step.

        Raises:
            ValueError: `factor` is below 1, the UNet is not one of sdedit's, or its projections are fused.
        """
        factor = checks.whole_number("factor", factor, 1)
        self._own_unet("enable_token_merging").merge_tokens(factor)

    def disable_token_merging(self) -> None:
        """Let every pixel see all pixels again."""
        self._own_unet("disable_token_merging").merge_tokens(1)

    def disable_turbo(self) -> None:
        """Compute every UNet call whole again."""
        self.unet.reuse, self._guided = None, 1.0

    def _own_unet(self, asked: str) -> Any:
        """The UNet, if it is one that can do what is asked."""
        if not hasattr(self.unet, "merge_tokens"):
            raise ValueError(f"{asked}: unet is {type(self.unet).__name__}; expected sdedit's UNet2DConditionModel")
        return self.unet

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
