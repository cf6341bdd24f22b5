"""Configs of networks read off the shapes of their tensors in a single file, so that none has to be downloaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]

# No Stable Diffusion model comes near these; a header that claims more is not built.
_MAX_LEVELS, _MAX_LAYERS, _MAX_TEXT_LAYERS = 8, 8, 64
_HEAD = 64  # channels of an attention head, where the number of heads is not fixed


def unet_config(shapes: Shapes) -> dict[str, Any]:
    """The `unet/config.json` of a UNet in the ldm layout.

    The shapes do not tell the number of heads: SD 1.x, known by its 1×1 convolutions around attention, has 8 in every
    block; SD 2.x, which has linear layers there, has heads of 64 channels.
    """
    channels, layers, attends = _unet_levels(shapes)
    context = next((key for key in shapes if key.endswith("attn2.to_k.weight")), "attn2.to_k.weight")
    depth = max((int(m[1]) for key in shapes if (m := re.search(r"transformer_blocks\.(\d{1,4})\.", key))), default=0)
    if depth > _MAX_LAYERS:
        raise ValueError(f"a UNet with {depth} transformer blocks in a row is not Stable Diffusion's")
    linear = len(shapes.get("middle_block.1.proj_in.weight", ())) == 2
    kinds = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in attends]
    return {
        "in_channels": _shape(shapes, "input_blocks.0.0.weight", 4)[1],
        "out_channels": _shape(shapes, "out.2.weight", 4)[0],
        "block_out_channels": channels,
        "down_block_types": kinds,
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)],
        "layers_per_block": layers if len(set(layers)) > 1 else layers[0],
        "transformer_layers_per_block": depth + 1,
        "cross_attention_dim": _shape(shapes, context, 2)[1],
        "attention_head_dim": [max(c // _HEAD, 1) for c in channels] if linear else 8,
        "use_linear_projection": linear,
        "norm_num_groups": _groups(channels),
        "time_cond_proj_dim": _shape(shapes, "time_embed.cond_proj.weight", 2)[1]
        if "time_embed.cond_proj.weight" in shapes
        else None,
        "sample_size": 64,
    }


def _unet_levels(shapes: Shapes) -> tuple[list[int], list[int], list[bool]]:
    """Channels and residual blocks of each level, and whether it attends to the text."""
    channels: list[int] = []
    layers, attends = [0], []
    n = 1
    while (key := f"input_blocks.{n}.0.out_layers.3.weight") in shapes or f"input_blocks.{n}.0.op.weight" in shapes:
        if key not in shapes:
            layers.append(0)
        else:
            if layers[-1] == 0:
                channels.append(_shape(shapes, key, 4)[0])
                attends.append(f"input_blocks.{n}.1.proj_in.weight" in shapes)
            layers[-1] += 1
        n += 1
    if not channels or len(channels) != len(layers) or len(layers) > _MAX_LEVELS or max(layers) > _MAX_LAYERS:
        raise ValueError(f"a UNet with blocks of {layers} layers is not Stable Diffusion's")
    return channels, layers, attends


def vae_config(shapes: Shapes) -> dict[str, Any]:
    """The `vae/config.json` of an autoencoder in the ldm layout."""
    channels: list[int] = []
    while (key := f"encoder.down.{len(channels)}.block.0.conv1.weight") in shapes:
        channels.append(_shape(shapes, key, 4)[0])
    layers = next(i for i in range(_MAX_LAYERS + 2) if f"encoder.down.0.block.{i}.conv1.weight" not in shapes)
    if not channels or len(channels) > _MAX_LEVELS or layers > _MAX_LAYERS:
        raise ValueError(f"a VAE with {len(channels)} levels of {layers} layers is not Stable Diffusion's")
    return {
        "in_channels": _shape(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(shapes, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(shapes, "decoder.conv_in.weight", 4)[1],
        "block_out_channels": channels,
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "layers_per_block": layers,
        "norm_num_groups": _groups(channels),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
        "sample_size": 512,
        "scaling_factor": 0.18215,
    }


def clip_config(shapes: Shapes) -> dict[str, Any]:
    """The `text_encoder/config.json` of CLIP's text encoder (SD 1.x), whose heads have 64 channels."""
    return _text_config(
        shapes,
        {
            "words": "embeddings.token_embedding.weight",
            "places": "embeddings.position_embedding.weight",
            "inner": "encoder.layers.0.mlp.fc1.weight",
            "layer": r"encoder\.layers\.(\d{1,4})\.",
        },
    ) | {"hidden_act": "quick_gelu", "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def open_clip_config(shapes: Shapes) -> dict[str, Any]:
    """The `text_encoder/config.json` of OpenCLIP's text encoder (SD 2.x)."""
    return _text_config(
        shapes,
        {
            "words": "token_embedding.weight",
            "places": "positional_embedding",
            "inner": "transformer.resblocks.0.mlp.c_fc.weight",
            "layer": r"transformer\.resblocks\.(\d{1,4})\.",
        },
    ) | {"hidden_act": "gelu", "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "projection_dim": 512}


def _text_config(shapes: Shapes, keys: dict[str, str]) -> dict[str, Any]:
    words, places = _shape(shapes, keys["words"], 2), _shape(shapes, keys["places"], 2)
    layers = 1 + max((int(found[1]) for key in shapes if (found := re.match(keys["layer"], key))), default=-1)
    if layers > _MAX_TEXT_LAYERS:
        raise ValueError(f"a text encoder of {layers} layers is not Stable Diffusion's")
    return {
        "vocab_size": words[0],
        "hidden_size": words[1],
        "intermediate_size": _shape(shapes, keys["inner"], 2)[0],
        "max_position_embeddings": places[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(words[1] // _HEAD, 1),
        "projection_dim": 768,
        "layer_norm_eps": 1e-5,
    }


def _shape(shapes: Shapes, name: str, axes: int) -> tuple[int, ...]:
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"{name} is missing")
    if len(shape) != axes or 0 in shape:
        raise ValueError(f"{name} has the shape {list(shape)}; expected {axes} axes")
    return shape


def _groups(channels: list[int]) -> int:
    """Groups of the normalisation: 32, or what divides the channels of a smaller model."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if all(c % groups == 0 for c in channels))
