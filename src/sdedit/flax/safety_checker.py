"""The safety checker of SD 1.x folders in Flax: see `sdedit.models.safety_checker`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import jax.numpy as jnp
from flax import linen as nn

from sdedit.config import Config
from sdedit.flax import convert
from sdedit.flax.clip import CLIPVision, Size
from sdedit.flax.layers import Array, DType
from sdedit.flax.model import FlaxModel

# What every threshold loses once a picture is near one of the special concepts.
_SPECIAL_CARE = 0.01

# CLIP's vision config where a published file leaves a key out, as transformers completes it.
_DEFAULTS = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip


class FlaxStableDiffusionSafetyChecker(FlaxModel):
    """Says which pictures are near a concept that its weights hold (names are not published).

    Attributes:
        vision_config: Pairs of a key of CLIP's vision config and its value.
    """

    vision_config: tuple[tuple[str, Any], ...] = ()
    projection_dim: int = 768
    dtype: DType = jnp.float32

    weights_name = "flax_model.msgpack"
    layout = convert.CLIP_VISION

    @property
    def config(self) -> Config:
        """The fields, as `config.json` has them."""
        return Config({**super().config, "vision_config": dict(self.vision_config)})

    @classmethod
    def from_config(cls, config: Any, **overrides: Any) -> Self:
        """See `FlaxModel.from_config`."""
        if isinstance(config, Mapping) and isinstance(config.get("vision_config"), Mapping):
            vision = {name: config["vision_config"].get(name, value) for name, value in _DEFAULTS.items()}
            config = {**config, "vision_config": tuple(vision.items())}
        return super().from_config(config, **overrides)

    @nn.compact
    def __call__(self, clip_input: Array) -> Array:
        """Pixels for CLIP (B, 3, 224, 224) → a flag for each picture (B,): is it above a concept's threshold?"""
        vision = {**_DEFAULTS, **dict(self.vision_config)}
        size = Size._make({**vision, "dtype": self.dtype}[name] for name in Size._fields)
        seen = CLIPVision(size, vision["image_size"], vision["patch_size"], name="vision_model")(clip_input)
        embeds = nn.Dense(self.projection_dim, use_bias=False, dtype=self.dtype, name="visual_projection")(seen)
        special = self._above("special_care_embeds", 3, embeds)
        concepts = self._above("concept_embeds", 17, embeds)
        lowered = jnp.zeros_like(concepts[:, :1])  # by how much a special concept has lowered all later thresholds
        for i in range(special.shape[1]):
            lowered = jnp.where(jnp.round(special[:, i : i + 1] + lowered, 3) > 0, _SPECIAL_CARE, lowered)
        return (jnp.round(concepts + lowered, 3) > 0).any(axis=1)

    def _above(self, name: str, count: int, embeds: Array) -> Array:
        """Cosine similarity less the threshold, (B, concepts), in float32."""
        concepts = self.param(name, nn.initializers.ones, (count, self.projection_dim))
        thresholds = self.param(f"{name}_weights", nn.initializers.ones, (count,))
        a, b = (x.astype(jnp.float32) for x in (embeds, concepts))
        a, b = (x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12) for x in (a, b))
        return a @ b.T - thresholds.astype(jnp.float32)

    def example(self) -> tuple[Any, ...]:
        """See `FlaxModel.example`."""
        side = dict(self.vision_config).get("image_size", _DEFAULTS["image_size"])
        return (jnp.zeros((1, 3, side, side)),)
