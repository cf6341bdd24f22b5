"""What a Flax pipeline is besides its call: its components, loading and saving them, its params on the devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image

from sdedit.files import read_json, write_folder
from sdedit.flax import schedulers
from sdedit.flax.adapters import FlaxAdapters
from sdedit.flax.clip import FlaxCLIPTextModel
from sdedit.flax.model import FlaxModel, Params
from sdedit.flax.safety_checker import FlaxStableDiffusionSafetyChecker
from sdedit.flax.stages import DEVICES
from sdedit.flax.unet import FlaxUNet2DConditionModel
from sdedit.flax.vae import FlaxAutoencoderKL
from sdedit.loading.folders import (
    DEFAULT_MODEL,
    explained,
    has_variant,
    index_text,
    listed_components,
    load_processor,
    transformers_class,
)
from sdedit.loading.hub import find_folder
from sdedit.schedulers.names import CLASS_NAMES
from sdedit.schedulers.plan import Plan

_MODELS: dict[str, type[FlaxModel]] = {
    "vae": FlaxAutoencoderKL,
    "text_encoder": FlaxCLIPTextModel,
    "unet": FlaxUNet2DConditionModel,
    "safety_checker": FlaxStableDiffusionSafetyChecker,
}
# Those without which there is no pipeline come first.
COMPONENTS = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")


class FlaxPipeline(FlaxAdapters):
    """The components of Stable Diffusion 1.x or 2.x for JAX. Networks have no parameters: these are in `params`.

    `params` is a dict with the parameters of `vae`, `text_encoder`, `unet` and, if there is one, `safety_checker`, and
    the state of the `scheduler`.
    """

    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any
    scheduler: Any
    safety_checker: Any
    feature_extractor: Any

    def __init__(self, dtype: Any, **components: Any) -> None:
        self.dtype = jnp.dtype(dtype)
        for name in COMPONENTS:
            setattr(self, name, components[name])

    @property
    def components(self) -> dict[str, Any]:
        """The parts by name."""
        return {name: getattr(self, name) for name in COMPONENTS}

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of an image for one of its latents, along a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | None = None,
        *,
        dtype: Any = jnp.float32,
        from_pt: bool | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        **components_and_hub: Any,
    ) -> tuple[Self, Params]:
        """Load a pipeline and its params from a folder or a hub id; with no argument, the small model of the package.

        Args:
            pretrained_model_name_or_path: A folder with model_index.json, or an id such as
                `"stable-diffusion-v1-5/stable-diffusion-v1-5"`.
            dtype: What the networks compute in, and the dtype of their parameters: `jnp.float32` or `jnp.bfloat16`.
            from_pt: `True` reads PyTorch's weights, `False` Flax's msgpack files; these where they are when not given.
            variant: Of PyTorch's weights, such as `"fp16"`; components that have no such file use their ordinary one.
            use_safetensors: `True` never reads pickles, `False` reads only them; they need torch.
            **components_and_hub: `scheduler=…`, any of `sdedit.flax.schedulers` or `sdedit.schedulers`;
                `safety_checker=None`; and `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`.

        Raises:
            FileNotFoundError: The model, or a file of it, is missing.
            ValueError: A file is damaged or does not fit, or the folder holds another kind of model.
        """
        own = {name: components_and_hub.pop(name) for name in COMPONENTS if name in components_and_hub}
        if wrong := sorted(set(own) - {"scheduler", "safety_checker", "tokenizer", "feature_extractor"}):
            raise ValueError(f"{', '.join(wrong)}: networks come with their params; load them with this pipeline")
        folder = find_folder(
            DEFAULT_MODEL if pretrained_model_name_or_path is None else pretrained_model_name_or_path,
            components=set(_MODELS) - set(own),
            variant=variant,
            use_safetensors=use_safetensors,
            **components_and_hub,
        )
        listed = listed_components(read_json(folder / "model_index.json"), folder)
        parts: dict[str, Any] = dict.fromkeys(COMPONENTS) | own
        params: Params = {}
        for name, class_name in listed.items():
            if name in own or name not in COMPONENTS:
                continue
            if name in _MODELS:
                here = variant if variant and has_variant(folder / name, variant, use_safetensors) else None
                chosen = {"dtype": dtype, "from_pt": from_pt, "variant": here, "use_safetensors": use_safetensors}
                parts[name], params[name] = _MODELS[name].from_pretrained(folder / name, **chosen)
            elif name == "scheduler":
                parts[name] = _scheduler(folder / name, class_name)
            else:
                parts[name] = load_processor(transformers_class(name, class_name), folder / name)
        if missing := [name for name in COMPONENTS[:5] if parts[name] is None]:
            raise ValueError(f"{folder / 'model_index.json'} lists no {' and no '.join(missing)}")
        if isinstance(parts["scheduler"], schedulers.FlaxScheduler):
            params["scheduler"] = parts["scheduler"].create_state()
        return cls(**parts, dtype=dtype), params

    def save_pretrained(self, save_directory: str | os.PathLike[str], params: Params) -> None:
        """Write all components, and their params as msgpack, to a folder that `from_pretrained` reads back."""
        with write_folder(save_directory) as folder:
            for name, part in self.components.items():
                if part is not None:
                    part.save_pretrained(folder / name, *([params[name]] if name in _MODELS else []))
            (folder / "model_index.json").write_text(index_text(type(self).__name__, self.components))

    def place(self, params: Params) -> Params:
        """Params on all devices, so that later calls need not copy them there."""
        return jax.device_put(params, NamedSharding(mesh_for(jax.device_count()), PartitionSpec()))  # type: ignore[no-any-return]

    @staticmethod
    def numpy_to_pil(images: Any) -> list[Image.Image]:
        """Images (…, H, W, 3) in [0, 1] as a list of PIL images."""
        array = np.asarray(images)
        eight_bit = (array.reshape(-1, *array.shape[-3:]) * 255).round().astype(np.uint8)
        return [Image.fromarray(one) for one in eight_bit]

    def __repr__(self) -> str:
        parts = ", ".join(f"{k}={type(v).__name__}" for k, v in self.components.items() if v is not None)
        return f"{type(self).__name__}({parts})"


def _scheduler(folder: Path, class_name: str) -> Plan:
    name = class_name.removeprefix("Flax")
    if name not in CLASS_NAMES:
        raise ValueError(f"scheduler: {class_name} is not known; expected one of {', '.join(CLASS_NAMES)}")
    cls = schedulers.flax_class(name)
    config = read_json(folder / cls.config_name)
    with explained(folder / cls.config_name, cls):
        return cls.from_config(config)


def mesh_for(batch: int) -> Mesh:
    """A mesh of as many devices as divide a batch evenly."""
    devices = jax.devices()
    count = max(n for n in range(1, len(devices) + 1) if batch % n == 0)
    return Mesh(np.array(devices[:count]), (DEVICES,))
