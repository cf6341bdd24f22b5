"""Ways for a network to compute its attention in less memory, or in fewer products, with the same result."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdedit.models.adapters import layers
from sdedit.models.attention import Attention, BasicTransformerBlock
from sdedit.models.offload import refuse

# Bytes of the scores that `by_queries` lets a plain softmax make at once.
_SCORES = 64 << 20


def sliced(query: Tensor, key: Tensor, value: Tensor, *, size: int) -> Tensor:
    """Attention of `size` heads at a time: (B, heads, N, d), (B, heads, M, d) twice → (B, heads, N, d)."""
    out = torch.empty_like(query)
    for q, k, v, o in zip(query, key, value, out, strict=True):
        for i in range(0, len(q), size):
            o[i : i + size] = F.scaled_dot_product_attention(
                q[None, i : i + size], k[None, i : i + size], v[None, i : i + size]
            )[0]
    return out


def by_queries(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of so many queries at a time that their scores stay small, in the same shapes; every row is exact."""
    B, heads, _N, _d = query.shape
    size = max(_SCORES // (4 * B * heads * key.shape[2]), 1)
    return torch.cat([F.scaled_dot_product_attention(q, key, value) for q in query.split(size, 2)], 2)


def by_xformers(query: Tensor, key: Tensor, value: Tensor, *, op: Any) -> Tensor:
    """Attention by xFormers, in the same shapes; `op` chooses among its kernels."""
    import xformers.ops

    q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # (B, N, heads, d)
    return xformers.ops.memory_efficient_attention(q, k, v, op=op).transpose(1, 2)  # type: ignore[no-any-return]


# PyTorch's kernels by diffusers' names.
_KERNELS = {
    "_native_flash": "FLASH_ATTENTION",
    "_native_efficient": "EFFICIENT_ATTENTION",
    "_native_cudnn": "CUDNN_ATTENTION",
    "_native_math": "MATH",
}


def by_kernel(query: Tensor, key: Tensor, value: Tensor, *, name: str) -> Tensor:
    """Attention by one kernel of PyTorch, a name of `SDPBackend`, in the same shapes."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, name)):
        return F.scaled_dot_product_attention(query, key, value)


class FusedProjections(nn.Linear):
    """Queries, keys and values by one product; saved and loaded under the three names that it replaces."""

    joining: Any  # the hook of `_join`

    def __init__(self, parts: list[nn.Linear]) -> None:
        first = parts[0]
        with torch.device("meta"):
            super().__init__(first.in_features, sum(p.out_features for p in parts), bias=first.bias is not None)
        self.weight = nn.Parameter(torch.cat([p.weight.detach() for p in parts]), first.weight.requires_grad)
        if first.bias is not None:
            self.bias = nn.Parameter(torch.cat([p.bias.detach() for p in parts]), first.bias.requires_grad)
        self.train(first.training)

    def parts(self) -> list[nn.Linear]:
        """The three layers again."""
        made = []
        for i in range(3):
            with torch.device("meta"):
                part = nn.Linear(self.in_features, self.out_features // 3, bias=self.bias is not None)
            for name, whole in self.named_parameters():
                setattr(part, name, nn.Parameter(whole.detach().chunk(3)[i].clone(), whole.requires_grad))
            made.append(part.train(self.training))
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name, whole in self.named_parameters():
            for old, part in zip(_names(prefix, name), (whole if keep_vars else whole.detach()).chunk(3), strict=True):
                destination[old] = part


def _join(layer: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_others: Any) -> None:
    """Before an attention layer with `FusedProjections` is loaded: the three tensors as the one that it has."""
    for name in ("weight", "bias"):
        parts = _names(f"{prefix}to_qkv.", name)
        if all(part in state_dict for part in parts):
            state_dict[f"{prefix}to_qkv.{name}"] = torch.cat([state_dict.pop(part) for part in parts])


def _names(prefix: str, name: str) -> list[str]:
    layer = prefix.removesuffix("to_qkv.")
    return [f"{layer}{part}.{name}" for part in ("to_q", "to_k", "to_v")]


class AttentionOptions(nn.Module):
    """The part of a network that chooses how its attention is computed; the last choice holds."""

    def _choose(self, core: Callable[..., Tensor] | None) -> None:
        for layer in self.modules():
            if isinstance(layer, Attention):
                layer.core = core

    def set_attention_slice(self, slice_size: str | int | None = "auto") -> None:
        """Compute attention a few heads at a time.

        Args:
            slice_size: Heads at a time; `"auto"` for half of each layer's, `"max"` for one, `None` for all at once.

        Raises:
            ValueError: It is none of these, or more than the heads of a layer.
        """
        found = [layer for layer in self.modules() if isinstance(layer, Attention)]
        fewest = min((layer.heads for layer in found), default=1)
        whole = isinstance(slice_size, int) and not isinstance(slice_size, bool) and 1 <= slice_size <= fewest
        if slice_size not in ("auto", "max", None) and not whole:
            raise ValueError(f"slice_size={slice_size!r}; expected 'auto', 'max', None, or 1 to {fewest} heads")
        for layer in found:
            named = {"auto": max(layer.heads // 2, 1), "max": 1}
            size = named[slice_size] if isinstance(slice_size, str) else slice_size
            layer.core = None if size is None else functools.partial(sliced, size=size)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Compute attention by xFormers; `attention_op` is one of `xformers.ops`, or `None` to let it choose.

        Raises:
            ModuleNotFoundError: xFormers is not installed.
            ValueError: There is no CUDA device.
        """
        try:
            import xformers.ops  # noqa: F401
        except ImportError as error:
            raise ModuleNotFoundError(
                f"xFormers is not installed ({error}): pip install xformers, of the release for your PyTorch; without "
                "it, PyTorch's own attention is as sparing",
                name="xformers",
            ) from error
        if not torch.cuda.is_available():
            raise ValueError("xFormers needs a CUDA device, and torch.cuda.is_available() is False")
        self._choose(functools.partial(by_xformers, op=attention_op))

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Compute attention by PyTorch again."""
        self._choose(None)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """`enable_xformers_memory_efficient_attention`, or its opposite if not `valid`."""
        if valid:
            self.enable_xformers_memory_efficient_attention(attention_op)
        else:
            self.disable_xformers_memory_efficient_attention()

    def set_attention_backend(self, backend: str) -> None:
        """Choose who computes attention, by diffusers' names.

        Args:
            backend: `"native"` for PyTorch as it sees fit (the default); `"_native_flash"`, `"_native_efficient"`,
                `"_native_cudnn"` or `"_native_math"` for one of its kernels; `"xformers"`.

        Raises:
            ValueError: It is another, or xFormers, and there is no CUDA device.
            ModuleNotFoundError: It is xFormers, which is not installed.
        """
        if backend == "xformers":
            self.enable_xformers_memory_efficient_attention()
        elif backend in ("native", *_KERNELS):
            self._choose(None if backend == "native" else functools.partial(by_kernel, name=_KERNELS[backend]))
        else:
            raise ValueError(f"backend={backend!r}; expected one of native, {', '.join(_KERNELS)}, xformers")

    def reset_attention_backend(self) -> None:
        """Let PyTorch compute attention as it sees fit."""
        self._choose(None)

    def fuse_qkv_projections(self) -> None:
        """Make queries, keys and values of each self-attention by one product instead of three.

        The weights are the same, and are saved under the same names. Attention to the text stays as it is.

        Raises:
            ValueError: Adapters are loaded, which belong to the single projections, or tokens are merged.
        """
        refuse("fuse_qkv_projections", self)
        if layers(self):
            raise ValueError(
                "fuse_qkv_projections: adapters are loaded into the projections; unload them first (fuse_lora() and "
                "unload_lora_weights() keeps what they do)"
            )
        if any(isinstance(layer, BasicTransformerBlock) and layer.merge > 1 for layer in self.modules()):
            raise ValueError("fuse_qkv_projections: tokens are merged; call disable_token_merging() first")
        for layer in self.modules():
            if isinstance(layer, Attention) and layer.to_qkv is None and not layer.has_context:
                layer.to_qkv = FusedProjections([layer.to_q, layer.to_k, layer.to_v])
                layer.to_qkv.joining = layer.register_load_state_dict_pre_hook(_join)
                del layer.to_q, layer.to_k, layer.to_v

    def unfuse_qkv_projections(self) -> None:
        """Make them by three products again."""
        refuse("unfuse_qkv_projections", self)
        for layer in self.modules():
            if isinstance(layer, Attention) and isinstance(layer.to_qkv, FusedProjections):
                layer.to_qkv.joining.remove()
                layer.to_q, layer.to_k, layer.to_v = layer.to_qkv.parts()
                layer.to_qkv = None


def has_fused_projections(model: nn.Module) -> bool:
    """Are the projections of the network's self-attentions fused?"""
    return any(isinstance(layer, FusedProjections) for layer in model.modules())
