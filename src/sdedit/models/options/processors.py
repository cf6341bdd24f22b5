"""Attention computed by a processor of the user's own, called as diffusers calls its processors.

A layer that has one is of a class of this module, which shows it what diffusers' `Attention` has; the networks know
nothing of it. A processor is called as `processor(attn, hidden_states, encoder_hidden_states=None,
attention_mask=None, **cross_attention_kwargs)`, the latter only as far as it names them, and returns hidden states.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sdedit.models.attention import Attended, Attention, Context, SpatialAttention

Processor = Callable[..., Tensor]


class AttnProcessor:
    """Attention as a layer without a processor computes it, for processors that change what goes in or comes out."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (B, N, C), or (B, C, H, W) in a VAE; encoder_hidden_states (B, M, C'); mask unused."""
        if attention_mask is not None or temb is not None:
            raise ValueError("attention_mask, temb: Stable Diffusion's layers have none; expected None")
        plain: type[Attention] = type(attn).__mro__[2]
        context = None if encoder_hidden_states is None else plain.attended(attn, Context(encoder_hidden_states))
        return plain.forward(attn, hidden_states, context)


class _Call(threading.local):
    """`cross_attention_kwargs` of the UNet call that this thread is in."""

    def __init__(self) -> None:
        self.arguments: list[Mapping[str, Any]] = []


_call = _Call()


class _Processed(nn.Module):
    """What a layer with a processor shows it."""

    processor: Processor
    heads: int
    upcast: bool
    has_context: bool
    to_q: nn.Linear
    spatial_norm = norm_cross = norm_q = norm_k = None
    residual_connection, rescale_output_factor, only_cross_attention, upcast_softmax = False, 1.0, False, False

    @property
    def is_cross_attention(self) -> bool:
        """Does it attend to the text?"""
        return bool(self.has_context)

    @property
    def upcast_attention(self) -> bool:
        """Are scores computed in float32?"""
        return self.upcast

    @property
    def inner_dim(self) -> int:
        """Channels of all heads."""
        return self.to_q.out_features

    @property
    def scale(self) -> float:
        """Of the scores, 1/√d."""
        return float((self.inner_dim // self.heads) ** -0.5)

    def process(self, hidden_states: Tensor, text: Tensor | None) -> Tensor:
        """What the processor makes of them."""
        given = _call.arguments[-1] if _call.arguments else {}
        known = inspect.signature(self.processor).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
        arguments = {name: value for name, value in given.items() if takes_all or name in known}
        return self.processor(self, hidden_states, encoder_hidden_states=text, attention_mask=None, **arguments)

    def head_to_batch_dim(self, tensor: Tensor, out_dim: int = 3) -> Tensor:
        """(B, N, heads·d) → (B·heads, N, d), or (B, heads, N, d) if `out_dim` is 4."""
        heads = tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return heads if out_dim == 4 else heads.flatten(0, 1)

    def batch_to_head_dim(self, tensor: Tensor) -> Tensor:
        """(B·heads, N, d) → (B, N, heads·d)."""
        return tensor.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)

    def get_attention_scores(self, query: Tensor, key: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """softmax(Q·Kᵀ/√d + mask) of (B·heads, N, d) and (B·heads, M, d) → (B·heads, N, M)."""
        dtype = query.dtype
        if self.upcast:
            query, key = query.float(), key.float()
        scores = self.scale * (query @ key.transpose(-1, -2))
        return (scores if attention_mask is None else scores + attention_mask).softmax(-1).to(dtype)

    def prepare_attention_mask(self, attention_mask: Tensor | None, *_sizes: Any, **_others: Any) -> Tensor | None:
        """A mask (B, N, M) as `get_attention_scores` takes it: once for each head."""
        return None if attention_mask is None else attention_mask.repeat_interleave(self.heads, 0)


class ProcessedAttention(_Processed, Attention):
    """A UNet's attention by a processor; IP-Adapters' images are not among what it gets."""

    group_norm = None

    def attended(self, context: Context) -> list[Attended]:
        """The text as it is: the processor projects it."""
        return [(context.text, context.text, 1.0)]

    def forward(self, x: Tensor, attended: Sequence[Attended] | None = None) -> Tensor:
        """(B, N, C) and what `attended` gives → (B, N, C)."""
        return self.process(x, attended[0][0] if attended else None)


class ProcessedSpatialAttention(_Processed, SpatialAttention):
    """A VAE's attention by a processor, which also norms the map (B, C, H, W) and adds it to what it finds."""

    residual_connection = True

    def forward(self, x: Tensor, attended: Sequence[Attended] | None = None) -> Tensor:
        """(B, C, H, W) → (B, C, H, W)."""
        return self.process(x, None)


# The more general class first.
_PROCESSED: dict[type[nn.Module], Any] = {Attention: ProcessedAttention, SpatialAttention: ProcessedSpatialAttention}


class TakesProcessors(nn.Module):
    """The part of a network that gives its attention layers processors."""

    @property
    def attn_processors(self) -> dict[str, Processor]:
        """The processor of each attention layer, by names as `mid_block.….attn2.processor`; the middle comes last."""
        layers = [(name, layer) for name, layer in self.named_modules() if isinstance(layer, Attention)]
        found = dict(sorted(layers, key=lambda item: item[0].startswith("mid_block")))
        default = AttnProcessor()
        return {f"{name}.processor": getattr(layer, "processor", default) for name, layer in found.items()}

    def set_attn_processor(self, processor: Processor | Mapping[str, Processor]) -> None:
        """Let attention be computed by a processor of one's own, see `sdedit.models.options.processors`.

        Args:
            processor: One for all layers, or one for each, by the names of `attn_processors`.

        Raises:
            ValueError: There are other names than those, or projections are fused.
            TypeError: A processor cannot be called.
        """
        names = list(self.attn_processors)
        chosen = dict(processor) if isinstance(processor, Mapping) else dict.fromkeys(names, processor)
        if missing := set(names) ^ set(chosen):
            raise ValueError(
                f"processor: a dict of {len(chosen)} for {len(names)} attention layers; "
                f"expected those of attn_processors, and {sorted(missing)[0]!r} is in one of them only"
            )
        if wrong := [value for value in chosen.values() if not callable(value)]:
            raise TypeError(f"processor: {wrong[0]!r}; expected what can be called as diffusers calls processors")
        layers = {name: self.get_submodule(name.removesuffix(".processor")) for name in names}
        if any(getattr(layer, "to_qkv", None) is not None for layer in layers.values()):
            raise ValueError("set_attn_processor: the projections are fused; call unfuse_qkv_projections() first")
        self.set_default_attn_processor()
        for name, layer in layers.items():
            layer.__class__ = next(own for plain, own in reversed(_PROCESSED.items()) if isinstance(layer, plain))
            layer.processor = chosen[name]  # type: ignore[assignment]
        self._hooks = [  # type: ignore[assignment]
            self.register_forward_pre_hook(_begin_call, with_kwargs=True),
            self.register_forward_hook(_end_call, always_call=True),
        ]

    def set_default_attn_processor(self) -> None:
        """Let layers compute attention by themselves again."""
        for hook in vars(self).pop("_hooks", ()):
            hook.remove()
        plain = {own: plain for plain, own in _PROCESSED.items()}
        for layer in self.modules():
            if type(layer) in plain:
                layer.__class__ = plain[type(layer)]
                del layer.processor


def _begin_call(_network: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
    given = kwargs.get("cross_attention_kwargs") or {}
    _call.arguments.append({name: value for name, value in given.items() if name != "scale"})


def _end_call(*_others: Any) -> None:
    _call.arguments.pop()
