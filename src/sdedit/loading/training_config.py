"""The YAML file with which the latent diffusion code trains, as far as it says what a checkpoint's shapes do not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdedit.files import shown

# Bytes of a YAML file; the published ones have 2,000. PyYAML takes ten seconds for a megabyte.
_LIMIT = 64 << 10
# What is used of `model.params`: the kind of value, and its bounds.
_VALUES: dict[tuple[str, ...], tuple[type, float, float]] = {
    ("scale_factor",): (float, 1e-6, 1e6),
    ("linear_start",): (float, 0, 1),
    ("linear_end",): (float, 0, 1),
    ("timesteps",): (int, 1, 100_000),
    ("unet_config", "params", "num_heads"): (int, -1, 1024),  # -1: by the channels of a head
    ("unet_config", "params", "num_head_channels"): (int, -1, 1024),
}
_PARAMETERIZATIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
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
        if (heads := int(inner.get("num_heads") or 0)) > 0:
            return {"attention_head_dim": heads}
        if (width := int(inner.get("num_head_channels") or 0)) > 0:
            return {"attention_head_dim": [max(c // width, 1) for c in config["block_out_channels"]]}
        return {}

    def vae(self) -> dict[str, Any]:
        """Keys of a VAE's config: the factor of its latents, and the size of its pictures."""
        scale = self.params.get("scale_factor")
        factor = {} if scale is None else {"scaling_factor": float(scale)}
        return factor | ({"sample_size": self.image_size} if self.image_size else {})

    def schedule(self) -> dict[str, Any]:
        """Keys of a scheduler's config: the noise levels of the training."""
        keys = {"linear_start": "beta_start", "linear_end": "beta_end", "timesteps": "num_train_timesteps"}
        values = {ours: self.params[theirs] for theirs, ours in keys.items() if self.params.get(theirs) is not None}
        return {ours: int(value) if ours == "num_train_timesteps" else value for ours, value in values.items()}


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
    if original_config is not None:
        params = _params_of(original_config)
    else:
        beside = [p for p in (checkpoint.with_suffix(".yaml"), checkpoint.with_suffix(".yml")) if p.is_file()]
        try:
            params = _params_of(beside[0]) if beside else {}
        except ValueError as error:  # nobody named it, and it may be about anything
            warnings.warn(f"not used: {error}", stacklevel=5)
            params = {}
    if prediction_type is None and params:
        prediction_type = _PARAMETERIZATIONS[params.get("parameterization", "eps")]
    return Training(prediction_type, image_size, params)


def _params_of(original_config: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """`model.params` of a configuration, with values that can be used."""
    given = isinstance(original_config, Mapping)
    where = "original_config" if given else f"original_config: {original_config}"
    whole = original_config if isinstance(original_config, Mapping) else _read_yaml(Path(original_config))
    params = _inner(whole, "model", "params")
    if not params and not given:
        raise ValueError(f"{where} has no 'model: params:'; expected a file such as v1-inference.yaml")
    for keys, (kind, low, high) in _VALUES.items():
        value = _inner(params, *keys[:-1]).get(keys[-1])
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and (kind is float or value % 1 == 0)
        if value is not None and not (number and low <= value <= high):
            what = "a number" if kind is float else "a whole number"
            raise ValueError(
                f"{where}: {'.'.join(keys)}={shown(repr(value))}; expected {what} from {low:g} to {high:g}"
            )
    said = params.get("parameterization", "eps")
    if not isinstance(said, str) or said not in _PARAMETERIZATIONS:
        raise ValueError(f"{where}: parameterization={shown(repr(said))}; expected {', '.join(_PARAMETERIZATIONS)}")
    return params


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
        whole = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except Exception as error:  # the constructors of YAML's own tags raise errors of many classes
        reason = shown(" ".join(str(error).split()), 200)
        raise ValueError(
            f"original_config: {path} is not a YAML file that can be read ({type(error).__name__}: {reason})"
        ) from error
    return whole if isinstance(whole, dict) else {}


def _inner(value: Any, *keys: str) -> Mapping[str, Any]:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
