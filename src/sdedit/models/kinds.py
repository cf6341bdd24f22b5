"""Which UNets are Stable Diffusion 1.x or 2.x: what their configs must not ask for, whatever the framework."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Keys of published config.json files that mean another kind of model unless they have this value.
_FIXED: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (None,),
    "attention_type": ("default",),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "num_class_embeds": (None,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


def refuse_other_kinds(config: Mapping[str, Any]) -> None:
    """Raise `ValueError` for the config of a UNet that is not Stable Diffusion 1.x or 2.x."""
    for key, values in _FIXED.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"unet config: {key}={config[key]!r} is of a model that is not Stable Diffusion 1.x or 2.x; "
                f"expected {values[0]!r}"
            )


def per_block(name: str, value: Any, depth: int) -> list[Any]:
    """One value a block: a single value is repeated, a list must have one for each block."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(f"unet config: {name}={list(value)!r} has {len(value)} values; expected {depth}, one a block")
    return list(value)


def known_block(key: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a block type that is not among those of Stable Diffusion."""
    if value not in known:
        raise ValueError(f"unet config: {key} has {value!r}; expected {' or '.join(known)}")
