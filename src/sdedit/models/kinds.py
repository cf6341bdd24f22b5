"""What the configs of networks may say, whatever the framework: values that a network can be made of, and those that
are Stable Diffusion's at all.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sdedit.files import shown


class _Value(NamedTuple):
    """What one key of a config may hold: values of a kind, from `low` to `high` where it is a number.

    Attributes:
        forms: "one", "many" (a list of up to 8, one a block), or "either".
        optional: May it be null?
    """

    kind: type
    low: float = -math.inf
    high: float = math.inf
    forms: str = "one"
    optional: bool = False


_CHANNELS = _Value(int, 1, 16_384)
_BLOCK_CHANNELS = _Value(int, 1, 16_384, "many")
_WORDS = _Value(str, forms="many")
_FLAG = _Value(bool)
_EPS = _Value(float, 0, 1)
_PROBABILITY = _Value(float, 0, 1)

# Bounds are a few times what any published model has; within them a network without values is made in no time.
_VALUES: dict[str, _Value] = {
    # UNet and VAE
    "sample_size": _Value(int, 1, 16_384, "either", optional=True),
    "in_channels": _CHANNELS,
    "out_channels": _CHANNELS,
    "latent_channels": _CHANNELS,
    "block_out_channels": _BLOCK_CHANNELS,
    "down_block_types": _WORDS,
    "up_block_types": _WORDS,
    "layers_per_block": _Value(int, 1, 8, "either"),
    "act_fn": _Value(str),
    "norm_num_groups": _Value(int, 1, 1024),
    "norm_eps": _EPS,
    "downsample_padding": _Value(int, 0, 8),
    # UNet
    "center_input_sample": _FLAG,
    "flip_sin_to_cos": _FLAG,
    "freq_shift": _Value(float, -1000, 1000),
    "mid_block_type": _Value(str, optional=True),
    "mid_block_scale_factor": _Value(float, 1e-6, 1e6),
    "only_cross_attention": _Value(bool, forms="either"),
    "dropout": _PROBABILITY,
    "cross_attention_dim": _CHANNELS,
    "transformer_layers_per_block": _Value(int, 1, 12, "either"),
    "attention_head_dim": _Value(int, 1, 1024, "either"),
    "num_attention_heads": _Value(int, 1, 1024, "either", optional=True),
    "use_linear_projection": _FLAG,
    "upcast_attention": _FLAG,
    "time_cond_proj_dim": _Value(int, 1, 16_384, optional=True),
    # VAE, and the tiny one
    "scaling_factor": _Value(float, 1e-6, 1e6),
    "force_upcast": _FLAG,
    "use_quant_conv": _FLAG,
    "use_post_quant_conv": _FLAG,
    "mid_block_add_attention": _FLAG,
    "encoder_block_out_channels": _BLOCK_CHANNELS,
    "decoder_block_out_channels": _BLOCK_CHANNELS,
    "num_encoder_blocks": _Value(int, 0, 16, "many"),
    "num_decoder_blocks": _Value(int, 0, 16, "many"),
    "upsampling_scaling_factor": _Value(int, 1, 8),
    "latent_magnitude": _Value(float, 1e-6, 1e6),
    "latent_shift": _Value(float, -1e6, 1e6),
    # CLIP
    "vocab_size": _Value(int, 1, 1_000_000),
    "hidden_size": _CHANNELS,
    "intermediate_size": _Value(int, 1, 65_536),
    "num_hidden_layers": _Value(int, 1, 64),
    "max_position_embeddings": _Value(int, 1, 16_384),
    "hidden_act": _Value(str),
    "layer_norm_eps": _EPS,
    "attention_dropout": _PROBABILITY,
    "projection_dim": _Value(int, 0, 16_384, optional=True),
    "image_size": _Value(int, 1, 16_384),
    "patch_size": _Value(int, 1, 1024),
    "num_channels": _CHANNELS,
    "initializer_factor": _Value(float, 0, 1e6),
    "initializer_range": _Value(float, 0, 1e6),
    "logit_scale_init_value": _Value(float, -1e6, 1e6),
}
_MOST_BLOCKS = 8
# Transformer layers of all blocks together; SDXL's UNet, the deepest that there is, has about 70.
_MOST_TRANSFORMERS = 256


def check_values(config: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names the key, for a value of which no network can be made, or only an endless one.

    Keys that are not known here are not looked at; CLIP's configs hold one for each half.
    """
    for key, value in config.items():
        if key in ("text_config", "vision_config") and isinstance(value, Mapping):
            check_values(value)
        elif key in _VALUES and not _is_allowed(_VALUES[key], value):
            raise ValueError(f"{key}={shown(repr(value))}; expected {_described(_VALUES[key])}")
    layers, transformers = (_most(config.get(key, 1)) for key in ("layers_per_block", "transformer_layers_per_block"))
    depth = len(config.get("down_block_types", ()))
    if layers * transformers * depth > _MOST_TRANSFORMERS:
        raise ValueError(
            f"transformer_layers_per_block={transformers}, in {depth} blocks of layers_per_block={layers}; "
            f"expected at most {_MOST_TRANSFORMERS} transformer layers in all"
        )


def _is_allowed(rule: _Value, value: Any) -> bool:
    if value is None:
        return rule.optional
    if isinstance(value, (list, tuple)):
        return (
            rule.forms != "one"
            and 0 < len(value) <= _MOST_BLOCKS
            and all(_is_allowed(rule._replace(forms="one", optional=False), one) for one in value)
        )
    if rule.forms == "many" or rule.kind in (bool, str):
        return rule.forms != "many" and isinstance(value, rule.kind)
    number: type = numbers.Integral if rule.kind is int else numbers.Real
    return isinstance(value, number) and not isinstance(value, bool) and rule.low <= value <= rule.high  # type: ignore[operator]


def _described(rule: _Value) -> str:
    one = {bool: "true or false", str: "a word", int: "a whole number", float: "a number"}[rule.kind]
    one += f" from {rule.low:g} to {rule.high:g}" if rule.kind in (int, float) else ""
    what = {"one": one, "many": f"a list of {one}, for up to {_MOST_BLOCKS} blocks", "either": f"{one}, or a list"}
    return what[rule.forms] + (", or null" if rule.optional else "")


def _most(value: Any) -> int:
    return max(value) if isinstance(value, (list, tuple)) else value  # type: ignore[no-any-return]


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
                f"unet config: {key}={shown(repr(config[key]))} is of a model that is not Stable Diffusion 1.x or 2.x; "
                f"expected {values[0]!r}"
            )


def per_block(name: str, value: Any, depth: int) -> list[Any]:
    """One value a block: a single value is repeated, a list must have one for each block."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * depth
    if len(value) != depth:
        raise ValueError(
            f"unet config: {name}={shown(list(value))} has {len(value)} values; expected {depth}, one a block"
        )
    return list(value)


def known_block(key: str, value: str, known: tuple[str, ...]) -> None:
    """Refuse a block type that is not among those of Stable Diffusion."""
    if value not in known:
        raise ValueError(f"unet config: {key} has {shown(repr(value))}; expected {' or '.join(known)}")
