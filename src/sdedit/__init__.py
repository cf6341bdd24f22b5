"""Image-to-image with Stable Diffusion, as SDEdit describes it (Meng et al. 2021, arXiv 2108.01073).

Names are imported on first use: `import sdedit` itself loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

from sdedit.compat.paths import ABSENT, explain_absent, install, is_module

__version__ = "0.1.0"

_NAMES = {
    "AutoPipelineForImage2Image": "sdedit.compat.pipelines",
    "AutoencoderKL": "sdedit.models.vae",
    "AutoencoderTiny": "sdedit.models.tiny_vae",
    "ConfigMixin": "sdedit.compat.configuration_utils",
    "DiffusionPipeline": "sdedit.base:Pipeline",
    "FlaxAutoencoderKL": "sdedit.flax.vae",
    "FlaxCLIPTextModel": "sdedit.flax.clip",
    "FlaxStableDiffusionImg2ImgPipeline": "sdedit.flax.pipeline",
    "FlaxStableDiffusionPipelineOutput": "sdedit.flax.pipeline",
    "FlaxStableDiffusionSafetyChecker": "sdedit.flax.safety_checker",
    "FlaxUNet2DConditionModel": "sdedit.flax.unet",
    "ModelMixin": "sdedit.models.model:Model",
    "SchedulerMixin": "sdedit.schedulers.base:Scheduler",
    "StableDiffusionImg2ImgPipeline": "sdedit.pipeline",
    "StableDiffusionPipelineOutput": "sdedit.output",
    "StableDiffusionSafetyChecker": "sdedit.models.safety_checker",
    "UNet2DConditionModel": "sdedit.models.unet",
    "framed": "sdedit.apps.framing",
    "make_scheduler": "sdedit.schedulers.names",
    "open_image": "sdedit.inputs.pixels",
    "save_single_file": "sdedit.loading.single_file_save",
    "search": "sdedit.apps.search",
    "sweep": "sdedit.apps.sweep",
    "train_lora": "sdedit.apps.finetune",
}

# `sdedit.models.…` after `import sdedit` alone, as it is elsewhere in the field.
_ROOMS = ("models", "schedulers")

install()


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        module, _, own = _NAMES[name].partition(":")
        return getattr(importlib.import_module(module), own or name)
    if name in _schedulers():
        side = "sdedit.flax.schedulers" if name.startswith("Flax") else "sdedit.schedulers"
        return getattr(importlib.import_module(side), name)
    if name in _ROOMS or is_module(f"sdedit.{name}"):
        return importlib.import_module(f"sdedit.{name}")
    if name.endswith(ABSENT):
        raise AttributeError(explain_absent(name))
    raise AttributeError(f"module 'sdedit' has no attribute {name!r}")


def _schedulers() -> list[str]:
    names = importlib.import_module("sdedit.schedulers").__all__
    return [*names, *(f"Flax{name}" for name in names if name.endswith("Scheduler"))]


def __dir__() -> list[str]:
    return [*_NAMES, *_schedulers(), "__version__"]
