"""What users of diffusers call on a pipeline, and its own call does not need.

`Pipeline` inherits these, so that scripts, subclasses and their `super()` find them. How methods that a subclass
overrides get called is in `sdedit.compat.overriding`.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from sdedit.compat.overriding import adapt_class, adapt_object
from sdedit.config import FORMAT_VERSION, Config, later
from sdedit.inputs import checks
from sdedit.inputs.pixels import Images
from sdedit.inputs.prompts import guidance_scale_embedding
from sdedit.models import adapters
from sdedit.noise import Generator, randn

# Of loading, for diffusers' ways to do it; this one's is always as `low_cpu_mem_usage=True`, in safetensors first.
_NO_MATTER = (
    *("low_cpu_mem_usage", "offload_folder", "offload_state_dict", "max_memory", "resume_download", "mirror"),
    *("proxies", "use_onnx", "from_flax", "load_connected_pipeline", "disable_mmap"),
)


def _of_call(name: str) -> Any:
    """An attribute of the pipeline that is one of its call's."""
    return property(
        lambda self: getattr(self._calls.seen, name), lambda self, value: setattr(self._calls.own, name, value)
    )


class Idioms:
    """Names of diffusers on a pipeline."""

    unet: Any
    vae: Any
    text_encoder: Any
    scheduler: Any
    safety_checker: Any
    feature_extractor: Any
    device: Any
    vae_scale_factor: int
    requires_safety_checker: bool
    components: Any
    _calls: Any
    _name_or_path: str | None = None
    _encode: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        adapt_class(cls, Idioms)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        adapt_object(self, name, value)

    # Attributes

    @property
    def _execution_device(self) -> torch.device:
        return self.device  # type: ignore[no-any-return]

    @property
    def image_processor(self) -> Any:
        """A `VaeImageProcessor` of this VAE, for scripts that prepare pictures by hand; the call uses none."""
        made = vars(self).get("_image_processor")
        if made is None:
            made = later("sdedit.compat.image_processor:VaeImageProcessor")(vae_scale_factor=self.vae_scale_factor)
            self._image_processor = made
        return made

    @image_processor.setter
    def image_processor(self, processor: Any) -> None:
        self._image_processor = processor

    @property
    def config(self) -> Config:
        """What model_index.json holds: each part's library and class, by its name."""
        parts = {name: _library_and_class(part) for name, part in self.components.items()}
        head: dict[str, Any] = {"_class_name": type(self).__name__, "_diffusers_version": FORMAT_VERSION}
        head["_name_or_path"] = self.name_or_path
        return Config({**head, **parts, "requires_safety_checker": self.requires_safety_checker})

    @property
    def name_or_path(self) -> str | None:
        """What `from_pretrained` was given."""
        return self._name_or_path

    # Of the call that runs in this thread, or of the last one. A loop of one's own sets the names with an underscore.
    clip_skip = property(lambda self: self._clip_skip, doc="How many layers of the text encoder are left out.")
    cross_attention_kwargs = property(lambda self: self._cross_attention_kwargs, doc="What adapters are told.")
    _clip_skip = _of_call("clip_skip")
    _cross_attention_kwargs = _of_call("cross_attention_kwargs")
    _num_timesteps = _of_call("num_timesteps")
    _interrupt = _of_call("interrupt")

    @property
    def _guidance_scale(self) -> float | list[float]:
        return self._calls.seen.guidance.scale  # type: ignore[no-any-return]

    @_guidance_scale.setter
    def _guidance_scale(self, scale: float | Sequence[float]) -> None:
        call, distilled = self._calls.own, self.unet.config.time_cond_proj_dim
        call.guidance = dataclasses.replace(call.guidance.to_scale(scale), distilled=distilled)

    def register_modules(self, **modules: Any) -> None:
        """Make parts attributes of the pipeline, those of a subclass's own too, which `components` then has."""
        extra = vars(self).setdefault("_registered", [])
        for name, module in modules.items():
            setattr(self, name, module)
            if name not in extra:
                extra.append(name)

    def register_to_config(self, **values: Any) -> None:
        """Set `requires_safety_checker`; parts are in `config` by themselves."""
        if "requires_safety_checker" in values:
            self.requires_safety_checker = values["requires_safety_checker"]

    @property
    def fused_loras(self) -> set[str]:
        """LoRAs that are part of the weights."""
        return {name for model in self._adapted() for name in adapters.fused(model)}

    @property
    def num_fused_loras(self) -> int:
        """How many they are."""
        return len(self.fused_loras)

    def set_lora_device(self, adapter_names: str | Sequence[str], device: torch.device | str | int) -> None:
        """Move LoRAs, such as those at rest to the CPU; one that works has to be where the network is.

        Raises:
            ValueError: One of the names is not loaded.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        known = {name for model in self._adapted() for name in adapters.names(model)}
        if wrong := sorted(set(names) - known):
            raise ValueError(
                f"adapter_names: {', '.join(wrong)}; expected some of {', '.join(sorted(known)) or 'none'}"
            )
        for layer in (layer for model in self._adapted() for layer in adapters.layers(model).values()):
            for held in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                for name in set(names) & set(held):
                    held[name].to(device)

    def _adapted(self) -> list[nn.Module]:
        return [model for model in (self.unet, self.text_encoder) if model is not None]

    # The steps of a call, as a loop of one's own calls them

    def check_inputs(
        self,
        prompt: Any,
        strength: Any,
        callback_steps: Any = None,
        negative_prompt: Any = None,
        prompt_embeds: Any = None,
        negative_prompt_embeds: Any = None,
        ip_adapter_image: Any = None,
        ip_adapter_image_embeds: Any = None,
        callback_on_step_end_tensor_inputs: Any = None,
    ) -> None:
        """Check arguments of a call.

        Raises:
            ValueError: One of them is wrong; the message names it.
        """
        checks.each("strength", strength, checks.number, 0, 1)
        if callback_steps is not None:
            checks.whole_number("callback_steps", callback_steps, 1)
        checks.either("prompt", prompt, "prompt_embeds", prompt_embeds)
        if prompt is not None:
            checks.prompts("prompt", prompt)
        if negative_prompt is not None and negative_prompt_embeds is not None:
            checks.either("negative_prompt", negative_prompt, "negative_prompt_embeds", negative_prompt_embeds)
        if ip_adapter_image is not None and ip_adapter_image_embeds is not None:
            checks.either("ip_adapter_image", ip_adapter_image, "ip_adapter_image_embeds", ip_adapter_image_embeds)
        known = getattr(self, "_callback_tensor_inputs", ())
        checks.callback(None, callback_on_step_end_tensor_inputs, known)

    def get_timesteps(
        self, num_inference_steps: int, strength: float, device: torch.device | str | None = None
    ) -> tuple[Tensor, int]:
        """Of the scheduler's timesteps those that run at a strength, and the number of steps."""
        taken = min(int(num_inference_steps * strength), num_inference_steps)
        first = (num_inference_steps - taken) * self.scheduler.order
        timesteps: Tensor = self.scheduler.timesteps[first:]
        if len(timesteps) and hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(first)
        return timesteps, taken

    def prepare_latents(
        self,
        image: Tensor,
        timestep: Tensor,
        batch_size: int,
        num_images_per_prompt: int,
        dtype: torch.dtype,
        device: torch.device | str | None,
        generator: Generator = None,
    ) -> Tensor:
        """Latents (B, C, h, w) of images, noised to a timestep; B is `batch_size` · `num_images_per_prompt`.

        Args:
            image: (N, 3, H, W) in [-1, 1], or latents (N, C, h, w); N divides B, and each serves as many in a row.
            timestep: (B,) or (1,).

        Raises:
            ValueError: N does not divide B.
        """
        count = batch_size * num_images_per_prompt
        if not isinstance(image, Tensor) or count % len(image):
            got = f"{len(image)} of them" if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"image: {got} for a batch of {count}; expected a tensor (N, …) with N that divides it")
        checks.generators(generator, count)
        is_latent = image.shape[1] == self.vae.config.latent_channels
        of_image = [i * len(image) // count for i in range(count)]
        encode = later("sdedit.pipeline:StableDiffusionImg2ImgPipeline")._encode
        latents: Tensor = encode(self, Images(image, latent=is_latent), of_image, generator).to(device, dtype)
        noise = randn(latents.shape, generator, device=latents.device, dtype=dtype)
        noisy: Tensor = self.scheduler.add_noise(latents, noise, timestep)
        return noisy

    def prepare_extra_step_kwargs(self, generator: Generator, eta: float) -> dict[str, Any]:
        """Of `generator` and `eta` what the scheduler's `step` takes."""
        taken = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in (("eta", eta), ("generator", generator)) if name in taken}

    def run_safety_checker(
        self, image: Any, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Any, list[bool] | None]:
        """Show decoded pictures (B, 3, H, W) in [-1, 1] to the safety checker: what it flags is black; and flags."""
        if self.safety_checker is None:
            return image, None
        check = later("sdedit.safety:check_safety")
        checked, flags = check((image / 2 + 0.5).clamp(0, 1), self.safety_checker, self.feature_extractor)
        return checked * 2 - 1, flags

    def decode_latents(self, latents: Tensor) -> np.ndarray[Any, Any]:
        """Latents to pictures (B, H, W, 3) in [0, 1]."""
        decode = later("sdedit.pipeline:StableDiffusionImg2ImgPipeline")._decode
        pixels: Tensor = decode(self, latents)
        return pixels.permute(0, 2, 3, 1).float().cpu().numpy()

    def get_guidance_scale_embedding(
        self, w: Tensor, embedding_dim: int = 512, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """What a model distilled with guidance is told: w (B,), the scales less 1; (B, `embedding_dim`)."""
        return guidance_scale_embedding((w + 1).tolist(), embedding_dim).to(w.device, dtype)

    @staticmethod
    def numpy_to_pil(images: np.ndarray[Any, Any]) -> list[Image.Image]:
        """Pictures (B, H, W, C) or (H, W, C) in [0, 1] as PIL images."""
        found: list[Image.Image] = later("sdedit.compat.utils:numpy_to_pil")(images)
        return found

    # Loading

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> Self:
        """A pipeline that shares the components of another one, sdedit's or diffusers'."""
        made: Self = later("sdedit.compat.pipelines:from_pipe")(cls, pipeline, **components)
        return made

    @classmethod
    def _made_of(cls, parts: Mapping[str, Any]) -> Self:
        """A pipeline of loaded parts; a subclass whose constructor does not take some of them gets the others."""
        parameters = inspect.signature(cls).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            return cls(**parts)
        known = {p.name for p in parameters}
        return cls(**{name: part for name, part in parts.items() if name in known})


def loading_arguments(cls: type, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Arguments of `from_pretrained`: those of this library, a subclass's own parts, and the device of `device_map`.

    Raises:
        ValueError: `device_map` is none that a pipeline can have.
    """
    known = dict(given)
    dtype = known.pop("dtype", None)
    if known.get("torch_dtype") is None:
        known["torch_dtype"] = None if dtype == "auto" else dtype
    for name in _NO_MATTER:
        known.pop(name, None)
    if "use_auth_token" in known:
        known.setdefault("token", known.pop("use_auth_token"))
    device = device_of(known.pop("device_map", None))
    own = set(inspect.signature(cls).parameters) - {"self"}
    components = later("sdedit.loading.folders:COMPONENTS")
    extra = {name: known.pop(name) for name in own - {*components, "requires_safety_checker"} if name in known}
    return known, extra, device


def device_of(device_map: Any) -> torch.device | None:
    """The one device that a `device_map` means: a name, `{"": device}`, or the accelerator for "auto", "balanced"."""
    if device_map is None:
        return None
    if isinstance(device_map, Mapping):
        places = set(device_map.values())
        if len(places) != 1:
            raise ValueError(f"device_map={device_map!r:.80}; expected one device for the whole pipeline")
        (device_map,) = places
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'device_map={device_map!r:.80}; expected a device such as "cuda", or "auto"') from error


def old_callback(callback: Callable[..., Any], every: int | None) -> Callable[..., dict[str, Any]]:
    """A `callback(step, timestep, latents)` of every so many steps, as a callback of this day."""
    every = checks.whole_number("callback_steps", 1 if every is None else every, 1)
    if not callable(callback):
        raise ValueError(f"callback={callback!r:.80}; expected a function (step, timestep, latents)")

    def on_step_end(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step % every == 0:
            callback(step // getattr(pipe.scheduler, "order", 1), timestep, tensors["latents"])
        return {}

    return on_step_end


def other_arguments(others: Mapping[str, Any], on_step_end: Any, inputs: Any) -> tuple[Any, Any]:
    """The callback and its tensors, with what the call's other arguments say: an older callback, or nothing known."""
    unknown = sorted(set(others) - {"callback", "callback_steps"})
    if unknown:
        warnings.warn(f"{', '.join(unknown)}: no argument of the pipeline; ignored", stacklevel=5)
    if others.get("callback") is None:
        return on_step_end, inputs
    older = old_callback(others["callback"], others.get("callback_steps"))
    if on_step_end is None:
        return older, ["latents"]
    names = list(dict.fromkeys([*(getattr(on_step_end, "tensor_inputs", inputs) or []), "latents"]))

    def both(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
        older(pipe, step, timestep, tensors)
        return on_step_end(pipe, step, timestep, tensors)

    return both, names


def placement(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `to` as `torch.nn.Module.to` takes them."""
    renamed = {"torch_dtype": "dtype", "torch_device": "device"}
    kept = {renamed.get(name, name): value for name, value in kwargs.items() if name != "silence_dtype_warnings"}
    return tuple(args), {name: value for name, value in kept.items() if value is not None}


def _library_and_class(part: Any) -> list[str | None]:
    if part is None:
        return [None, None]
    library = type(part).__module__.split(".")[0]
    return ["diffusers" if library == "sdedit" else library, type(part).__name__]


def retrieve_timesteps(
    scheduler: Any,
    num_inference_steps: int | None = None,
    device: torch.device | str | None = None,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    **options: Any,
) -> tuple[Tensor, int]:
    """Set a scheduler by a number of steps, or by times or levels of one's own; its timesteps and their number."""
    grid = checks.schedule(scheduler, timesteps, sigmas)
    scheduler.set_timesteps(**(grid or {"num_inference_steps": num_inference_steps}), device=device, **options)
    return scheduler.timesteps, len(scheduler.timesteps) if grid else int(num_inference_steps or 0)


def retrieve_latents(encoded: Any, generator: torch.Generator | None = None, sample_mode: str = "sample") -> Tensor:
    """Latents of what a VAE's `encode` gives: drawn, or with `sample_mode="argmax"` the most likely ones."""
    if not hasattr(encoded, "latent_dist"):
        return encoded.latents  # type: ignore[no-any-return]
    found = encoded.latent_dist
    latents: Tensor = found.mode() if sample_mode == "argmax" else found.sample(generator)
    return latents
