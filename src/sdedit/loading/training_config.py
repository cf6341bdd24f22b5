"""The YAML file with which the latent diffusion code trains, as far as it says what a checkpoint's shapes do not."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LIMIT = 1 << 20
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass
class Training:
    """What is known of how a model was trained; `None` and empty where nothing is.

    Attributes:
        image_size: Side of its pictures in pixels.
        params: `model.params` of the YAML file.
    """

    prediction_type: str | None = None
    image_size: int | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    def unet(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of a UNet's config: its heads."""
        inner = _inner(self.params, "unet_config", "params")
        if (heads := _number(inner, "num_heads")) and heads > 0:
            return {"attention_head_dim": heads}
        if (width := _number(inner, "num_head_channels")) and width > 0:
            return {"attention_head_dim": [max(c // width, 1) for c in config["block_out_channels"]]}
        return {}

    def vae(self) -> dict[str, Any]:
        """Keys of a VAE's config: the factor of its latents, and the size of its pictures."""
        scale = self.params.get("scale_factor")
        factor = {"scaling_factor": float(scale)} if isinstance(scale, (int, float)) else {}
        return factor | ({"sample_size": self.image_size} if self.image_size else {})

    def schedule(self) -> dict[str, Any]:
        """Keys of a scheduler's config: the noise levels of the training."""
        keys = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}
        values = {ours: self.params.get(theirs) for theirs, ours in keys.items()}
        return {ours: value for ours, value in values.items() if isinstance(value, (int, float))}


def find_training(
    checkpoint: Path,
    original_config: str | os.PathLike[str] | Mapping[str, Any] | None,
    prediction_type: str | None,
    image_size: int | None,
) -> Training:
    """What arguments say, else the YAML file, given or beside the checkpoint under its name.

    Raises:
        FileNotFoundError, ValueError: The YAML file is missing or damaged, or an argument is not as expected.
    """
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r}; expected one of {', '.join(PREDICTION_TYPES)}")
    if image_size is not None and (not isinstance(image_size, int) or not 64 <= image_size <= 8192):
        raise ValueError(f"image_size={image_size!r}; expected pixels, such as 512 or 768")
    if original_config is None:
        beside = [p for p in (checkpoint.with_suffix(".yaml"), checkpoint.with_suffix(".yml")) if p.is_file()]
        original_config = beside[0] if beside else {}
    whole = original_config if isinstance(original_config, Mapping) else _read_yaml(Path(original_config))
    params = _inner(whole, "model", "params")
    if prediction_type is None and whole:
        prediction_type = "v_prediction" if params.get("parameterization", "eps") == "v" else "epsilon"
    return Training(prediction_type, image_size, params)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise FileNotFoundError(f"original_config: {path} does not exist")
    if path.stat().st_size > _LIMIT:
        raise ValueError(f"original_config: {path} has {path.stat().st_size:,} bytes; at most {_LIMIT:,} are read")
    try:
        text = path.read_text(encoding="utf-8")
        if "<<" in text:
            raise ValueError("it merges mappings, which could grow to any size")
        whole = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"original_config: {path} is not a YAML file ({' '.join(str(error).split())})") from error
    if not isinstance(whole, dict) or not _inner(whole, "model", "params"):
        raise ValueError(f"original_config: {path} has no 'model: params:'; expected a file such as v1-inference.yaml")
    return whole


def _inner(value: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _number(values: Mapping[str, Any], key: str) -> int | None:
    value = values.get(key)
    return value if type(value) is int else None
