"""Import paths that stand for others: where modules lay before, and where users of diffusers look for things.

`MOVED` are whole modules: `import sdedit.framing` gives `sdedit.apps.framing` itself. `NAMES` are modules that exist in
this table alone: `from sdedit.loaders import IPAdapterMixin` gives the class from where it lives. So no file lies at
such a path, and a class says, to pickle and to pydoc, where it really is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Path that users import: the module, or package with all that is in it, that it stands for.
MOVED = {
    "sdedit.callbacks": "sdedit.compat.callbacks",
    "sdedit.configuration_utils": "sdedit.compat.configuration_utils",
    "sdedit.evaluation": "sdedit.apps.evaluation",
    "sdedit.finetune": "sdedit.apps.finetune",
    "sdedit.framing": "sdedit.apps.framing",
    "sdedit.image_processor": "sdedit.compat.image_processor",
    "sdedit.loading.inspect": "sdedit.apps.inspect",
    "sdedit.strokes": "sdedit.apps.strokes",
    "sdedit.utils": "sdedit.compat.utils",
}

_PIPELINE = {"StableDiffusionImg2ImgPipeline": "sdedit.pipeline"}
_RETRIEVE = dict.fromkeys(("retrieve_latents", "retrieve_timesteps"), "sdedit.compat.idioms")
_OUTPUT = {"StableDiffusionPipelineOutput": "sdedit.output"}
_CHECKER = {"StableDiffusionSafetyChecker": "sdedit.models.safety_checker"}
_FLAX_PIPELINE = {"FlaxStableDiffusionImg2ImgPipeline": "sdedit.flax.pipeline"}
_FLAX_OUTPUT = {"FlaxStableDiffusionPipelineOutput": "sdedit.flax.pipeline"}
_FLAX_CHECKER = {"FlaxStableDiffusionSafetyChecker": "sdedit.flax.safety_checker"}
_AUTO = {"AutoPipelineForImage2Image": "sdedit.compat.pipelines"}
_ANY = {"DiffusionPipeline": "sdedit.base:Pipeline"}
_VAE = {"AutoencoderKL": "sdedit.models.vae"}
_VAE_PARTS = {
    "DecoderOutput": "sdedit.models.vae",
    "DiagonalGaussianDistribution": "sdedit.models.vae",
}
_TINY_VAE = {"AutoencoderTiny": "sdedit.models.tiny_vae"}
_UNET = {"UNet2DConditionModel": "sdedit.models.unet"}
_UNET_OUTPUT = {"UNet2DConditionOutput": "sdedit.models.unet"}
_LOADERS = {
    "FromSingleFileMixin": "sdedit.base:Pipeline",
    "IPAdapterMixin": "sdedit.adapters.ip_adapter:IPAdapterLoader",
    "LoraLoaderMixin": "sdedit.adapters.lora:LoraLoader",
    "StableDiffusionLoraLoaderMixin": "sdedit.adapters.lora:LoraLoader",
    "TextualInversionLoaderMixin": "sdedit.adapters.textual_inversion:TextualInversionLoader",
}
_SD = "sdedit.pipelines.stable_diffusion"

# Path: its names, each with the module that has it (and its name there, after a colon, if that is another).
NAMES: dict[str, Mapping[str, str]] = {
    "sdedit.loaders": _LOADERS,
    "sdedit.models.autoencoders": _VAE | _TINY_VAE,
    "sdedit.models.autoencoders.autoencoder_kl": _VAE,
    "sdedit.models.autoencoders.autoencoder_tiny": _TINY_VAE,
    "sdedit.models.autoencoders.vae": _VAE_PARTS,
    "sdedit.models.modeling_utils": {"ModelMixin": "sdedit.models.model:Model"},
    "sdedit.models.unets": _UNET,
    "sdedit.models.unets.unet_2d_condition": _UNET | _UNET_OUTPUT,
    "sdedit.pipelines": _PIPELINE | _FLAX_PIPELINE | _AUTO | _ANY,
    "sdedit.pipelines.auto_pipeline": _AUTO,
    "sdedit.pipelines.pipeline_utils": _ANY,
    _SD: _PIPELINE | _OUTPUT | _CHECKER | _FLAX_PIPELINE | _FLAX_OUTPUT | _FLAX_CHECKER,
    f"{_SD}.pipeline_flax_stable_diffusion_img2img": _FLAX_PIPELINE,
    f"{_SD}.pipeline_output": _OUTPUT | _FLAX_OUTPUT,
    f"{_SD}.pipeline_stable_diffusion_img2img": _PIPELINE | _RETRIEVE,
    f"{_SD}.safety_checker": _CHECKER,
    f"{_SD}.safety_checker_flax": _FLAX_CHECKER,
}

# The sixteen schedulers by the file that diffusers has each in; with an output class of its own, or a common one.
_OUTPUTS_OF_THEIR_OWN = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmsolver_sde": "DPMSolverSDEScheduler",
    "euler_ancestral_discrete": "EulerAncestralDiscreteScheduler",
    "euler_discrete": "EulerDiscreteScheduler",
    "heun_discrete": "HeunDiscreteScheduler",
    "k_dpm_2_ancestral_discrete": "KDPM2AncestralDiscreteScheduler",
    "k_dpm_2_discrete": "KDPM2DiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms_discrete": "LMSDiscreteScheduler",
    "tcd": "TCDScheduler",
}
_COMMON_OUTPUT = {
    "deis_multistep": "DEISMultistepScheduler",
    "dpmsolver_multistep": "DPMSolverMultistepScheduler",
    "dpmsolver_singlestep": "DPMSolverSinglestepScheduler",
    "pndm": "PNDMScheduler",
    "unipc_multistep": "UniPCMultistepScheduler",
}
_STEPPED = "sdedit.schedulers.base:SchedulerOutput"
for _file, _name in (_OUTPUTS_OF_THEIR_OWN | _COMMON_OUTPUT).items():
    _output = "SchedulerOutput" if _file in _COMMON_OUTPUT else f"{_name}Output"
    NAMES[f"sdedit.schedulers.scheduling_{_file}"] = {_name: "sdedit.schedulers.classes", _output: _STEPPED}
NAMES["sdedit.schedulers.scheduling_utils"] = {
    "KarrasDiffusionSchedulers": "sdedit.compat.schedulers",
    "SchedulerMixin": "sdedit.schedulers.base:Scheduler",
    "SchedulerOutput": _STEPPED,
}

# Pipelines that come later, by the ends of their names.
ABSENT = ("Pipeline", "ControlNetModel", "MultiControlNetModel", "T2IAdapter", "MotionAdapter")


def is_module(path: str) -> bool:
    """Is it one of the paths of this table?"""
    return path in MOVED or path in NAMES


def explain_absent(name: str) -> str:
    """Why `sdedit` has no such pipeline, and which it has."""
    return (
        f"sdedit has no {name}: its pipelines are StableDiffusionImg2ImgPipeline (masks too: mask_image=…) and "
        "FlaxStableDiffusionImg2ImgPipeline, for Stable Diffusion 1.x and 2.x"
    )


class NamesModule(ModuleType):
    """A module of `NAMES`: each of its names is imported when it is asked for."""

    def __getattr__(self, name: str) -> Any:
        homes = NAMES[self.__name__]
        if name not in homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}; it has {', '.join(homes)}")
        module, _, own = homes[name].partition(":")
        return getattr(importlib.import_module(module), own or name)

    def __dir__(self) -> list[str]:
        return sorted(NAMES[self.__name__])


class OtherPaths(MetaPathFinder, Loader):
    """Finds the paths of `MOVED` and `NAMES`; a module is loaded once, whatever path it is imported by."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a path that stands for another one, else `None`."""
        if fullname in NAMES:
            return ModuleSpec(fullname, self, is_package=True)
        parent, _, name = fullname.rpartition(".")
        if parent == "sdedit" and name.endswith(ABSENT):
            raise ImportError(
                explain_absent(name)
            )  # `from sdedit import name` asks for a module when it is no attribute
        return ModuleSpec(fullname, self) if _home(fullname) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """A module of `NAMES`; others are replaced by the one that is meant."""
        if spec.name not in NAMES:
            return None
        made = NamesModule(spec.name, f"Names that live elsewhere: {', '.join(NAMES[spec.name])}.")
        made.__all__ = list(NAMES[spec.name])  # type: ignore[attr-defined]
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Put the module that is meant in the place of the empty one that the import system made."""
        if home := _home(module.__name__):
            sys.modules[module.__name__] = importlib.import_module(home)


def _home(fullname: str) -> str | None:
    for path, home in MOVED.items():
        if fullname == path or fullname.startswith(path + "."):
            return home + fullname[len(path) :]
    return None


def install() -> None:
    """Let the import system know the paths, before it looks for files."""
    if not any(isinstance(finder, OtherPaths) for finder in sys.meta_path):
        sys.meta_path.insert(0, OtherPaths())
