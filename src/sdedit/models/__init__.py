"""Networks: UNet, autoencoders, safety checker."""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "AutoencoderKL": "vae",
    "AutoencoderTiny": "tiny_vae",
    "StableDiffusionSafetyChecker": "safety_checker",
    "UNet2DConditionModel": "unet",
}


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"sdedit.models.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
