"""What diffusers' networks offer beside their call: counting, adapters by config, less memory for training and weights.

A network computes the same with all of it; `layers.py` and the networks themselves know nothing of it.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdedit.config import later
from sdedit.files import read_json
from sdedit.models import adapters
from sdedit.models.attention import BasicTransformerBlock, SpatialAttention
from sdedit.models.layers import ResnetBlock2D
from sdedit.models.offload import refuse

_BLOCKS = (ResnetBlock2D, BasicTransformerBlock, SpatialAttention)
_KEPT = ("norm", "^proj_in$", "^proj_out$")  # layers that are not stored in another dtype


class CastLinear(nn.Linear):
    """A linear layer whose weights are stored in another dtype than it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C') in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class CastConv2d(nn.Conv2d):
    """A convolution, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W') in the dtype of x."""
        return self._conv_forward(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


_CAST: dict[type, Any] = {nn.Linear: CastLinear, nn.Conv2d: CastConv2d}


class ModelOptions(nn.Module):
    """The part of a network that has it."""

    compute_dtype: torch.dtype | None = None  # if the weights are stored in another

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of the parameters, those of the adapters included.

        Args:
            only_trainable: Only those that get gradients.
            exclude_embeddings: Without the weights of `torch.nn.Embedding`.
        """
        tables = {id(p) for m in self.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return sum(
            p.numel()
            for p in self.parameters()
            if (p.requires_grad or not only_trainable) and not (exclude_embeddings and id(p) in tables)
        )

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Are blocks computed again for their gradients?"""
        return any("forward" in vars(block) for block in self.modules() if isinstance(block, _BLOCKS))

    def enable_gradient_checkpointing(self) -> None:
        """Train with less memory: what is inside a block is computed again for its gradients, and not kept."""
        for block in self.modules():
            if isinstance(block, _BLOCKS) and "forward" not in vars(block):
                block.forward = functools.partial(_checkpointed, block)  # type: ignore[method-assign]

    def disable_gradient_checkpointing(self) -> None:
        """Keep it again."""
        for block in self.modules():
            if isinstance(block, _BLOCKS) and getattr(vars(block).get("forward"), "func", None) is _checkpointed:
                del block.forward

    def add_adapter(self, adapter_config: Any, adapter_name: str = "default") -> None:
        """Put a new adapter into the network, ready to be trained, as PEFT's `config` says; it alone is active.

        Args:
            adapter_config: Such as `peft.LoraConfig(r=4, target_modules=["to_q", "to_v"])`.
            adapter_name: Its name, which no other adapter has.

        Raises:
            ImportError: The package peft is missing.
            ValueError: The name is taken, or the weights are offloaded a layer at a time.
        """
        peft = adapters.require_peft()
        refuse("add_adapter", self)
        if adapter_name in adapters.names(self):
            raise ValueError(f"adapter_name={adapter_name!r}: there is one of this name; expected another")
        before: Any = vars(self).pop("peft_config", {})  # PEFT warns where there is one
        try:
            peft.inject_adapter_in_model(adapter_config, self, adapter_name=adapter_name)
            before = {**before, adapter_name: adapter_config}
        finally:
            if before:
                self.peft_config = before
        for layer in adapters.layers(self).values():
            layer.set_adapter([adapter_name] if adapter_name in layer.lora_A else [])

    def enable_layerwise_casting(
        self,
        storage_dtype: torch.dtype = torch.float8_e4m3fn,
        compute_dtype: torch.dtype | None = None,
        skip_modules_pattern: str | Sequence[str] | None = None,
        skip_modules_classes: tuple[type, ...] | None = None,
        non_blocking: bool = False,
    ) -> None:
        """Store the weights of linear layers and convolutions in another dtype; each is cast for its own product.

        Args:
            storage_dtype: Such as `torch.float8_e4m3fn`: half of float16's memory, with rounding.
            compute_dtype: That of the products; the network's own if not given.
            skip_modules_pattern: Regular expressions; layers in whose names one is found stay as they are, as norms do.
            skip_modules_classes: So do layers of these classes.
            non_blocking: Taken for diffusers' sake: nothing waits here.

        Raises:
            ValueError: The weights are offloaded a layer at a time, or stored in another dtype already.
        """
        refuse("enable_layerwise_casting", self)
        if self.compute_dtype is not None:
            raise ValueError("enable_layerwise_casting: it is on already; expected one call")
        own = next(p.dtype for p in self.parameters() if p.is_floating_point())
        given = [skip_modules_pattern] if isinstance(skip_modules_pattern, str) else skip_modules_pattern
        patterns = [*_KEPT, *(given or ())]
        self.to(own if compute_dtype is None else compute_dtype)
        self.compute_dtype = own if compute_dtype is None else compute_dtype
        for name, layer in self.named_modules():
            skipped = any(re.search(pattern, name) for pattern in patterns)
            if type(layer) in _CAST and not skipped and not isinstance(layer, skip_modules_classes or ()):
                layer.to(storage_dtype)
                layer.__class__ = _CAST[type(layer)]

    @classmethod
    def load_config(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *, subfolder: str | None = None, **hub: Any
    ) -> dict[str, Any]:
        """What a network's `config.json` holds, for `from_config`.

        Args:
            pretrained_model_name_or_path: The file, or a folder or hub id that has it.
            subfolder: Folder inside it, such as `"unet"`.
            **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`, as in huggingface_hub.

        Raises:
            FileNotFoundError: There is none.
        """
        find_file = later("sdedit.loading.hub:find_file")
        return read_json(find_file(pretrained_model_name_or_path, ["config.json"], subfolder=subfolder, **hub))


def _checkpointed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(block).forward
    if not (block.training and torch.is_grad_enabled()):
        return forward(block, *args, **kwargs)
    return checkpoint(forward, block, *args, use_reentrant=False, **kwargs)
