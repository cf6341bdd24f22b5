"""Subclasses that override diffusers' methods: the call's own stages then go through what they wrote.

`StableDiffusionImg2ImgPipeline.__call__` is made of stages. Where a subclass has a method of diffusers for one of them,
the stage is replaced in that subclass by one that calls the method, with diffusers' arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdedit.config import later
from sdedit.noise import Generator
from sdedit.schedulers.runs import Run, Steps, of_its_own


def adapt_class(cls: type, defaults: type) -> None:
    """Let the stages of a new pipeline class go through those methods that it does not take from `defaults`."""
    overridden = [name for name in _STAGES if _home(cls, name) is not defaults]
    for name in overridden:
        for stage, replacement in _STAGES[name].items():
            setattr(cls, stage, replacement)
    checked = {"check_inputs", "prepare_latents"} & set(overridden)
    if checked and "__call__" not in vars(cls) and not hasattr(cls.__call__, "checks_first"):
        cls.__call__ = _checking(cls.__call__, checked)  # type: ignore[method-assign, operator]


def adapt_object(pipe: Any, name: str, value: Any) -> None:
    """The same for a `run_safety_checker` that is put on a pipeline itself, as scripts do."""
    if name == "run_safety_checker" and callable(value):
        for stage, replacement in _STAGES[name].items():
            object.__setattr__(pipe, stage, functools.partial(replacement, pipe))


# What `check_inputs` gets; after the second one comes `callback_steps`.
_CHECKED = (
    *("prompt", "strength", "negative_prompt", "prompt_embeds", "negative_prompt_embeds"),
    *("ip_adapter_image", "ip_adapter_image_embeds", "callback_on_step_end_tensor_inputs"),
)


def _home(cls: type, name: str) -> type | None:
    return next((base for base in cls.__mro__ if name in vars(base)), None)


def _original() -> Any:
    return later("sdedit.pipeline:StableDiffusionImg2ImgPipeline")


def _begin(self: Any, steps: Steps, pictures: int, generator: Generator) -> Run:
    """The run of those timesteps that `get_timesteps` gives."""
    call, strengths, grid = self._calls.seen, [], steps.grid
    for i in range(max(len(steps.strengths), len(steps.counts))):
        strength, count = steps.strengths[i % len(steps.strengths)], steps.counts[i % len(steps.counts)]
        scheduler = call.scheduler = of_its_own(self._scheduler)
        scheduler.set_timesteps(**(grid or {"num_inference_steps": count}), device=self.device)
        every = scheduler.timesteps
        times, _ = self.get_timesteps(count, strength, self.device)
        first = len(every) - len(times)
        if torch.equal(torch.as_tensor(times), every[first:]):
            order = getattr(scheduler, "order", 1)
            taken = (count if not grid else len(every)) - first // order
            strengths.append(min(1.0, (taken + 0.5) / count) if len(times) else 0.0)
        elif len(steps.strengths) == len(steps.counts) == 1:
            strengths, grid = [1.0], {"timesteps": torch.as_tensor(times).tolist()}
        else:
            raise ValueError("get_timesteps: gives other times than the scheduler's; expected one strength for all")
    call.scheduler = None
    own = dataclasses.replace(steps, strengths=strengths, grid=grid)
    run: Run = _original()._begin(self, own, pictures, generator)
    return run


def _begin_with_options(self: Any, steps: Steps, pictures: int, generator: Generator) -> Run:
    """The run, whose scheduler steps with what `prepare_extra_step_kwargs` gives."""
    timed = _home(type(self), "get_timesteps") is not later("sdedit.compat.idioms:Idioms")
    run: Run = (_begin if timed else _original()._begin)(self, steps, pictures, generator)
    for part in run.parts:
        self._calls.seen.scheduler = part.scheduler
        options = self.prepare_extra_step_kwargs(part.generator, steps.eta)
        part.draws = "generator" in options
        part.options = {name: value for name, value in options.items() if name != "generator"}
    return run


def _encode(self: Any, images: Any, of_image: list[int], generator: Generator) -> Tensor:
    """Only the latents' place: `prepare_latents` encodes, too."""
    call = self._calls.seen
    if not call.num_timesteps:
        clean: Tensor = _original()._encode(self, images, of_image, generator)
        return clean
    pixels = images.pixels if images.latent else _padded(images.pixels, self.vae_scale_factor)
    factor = 1 if images.latent else self.vae_scale_factor
    call.image = pixels[of_image]
    shape = len(of_image), self.vae.config.latent_channels, pixels.shape[-2] // factor, pixels.shape[-1] // factor
    return torch.empty(shape, device=self.device, dtype=self.unet.dtype)


def _noised(
    self: Any, run: Run, latents: Tensor, generator: Generator, extra_noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """What `prepare_latents` gives for the first repeat; later ones begin with what came out before."""
    image = vars(self._calls.seen).pop("image", None)
    if image is None:
        found: tuple[Tensor, Tensor] = _original()._noised(self, run, latents, generator, extra_noise)
        return found
    times = torch.cat([part.timesteps[:1].repeat(part.pictures) for part in run.parts])
    dtype = self.unet.dtype
    noisy = self.prepare_latents(image, times, len(image), 1, dtype, self.device, generator)
    return noisy.to(self.device, dtype), torch.empty_like(noisy)


def _check(self: Any, pixels: Tensor) -> tuple[Tensor, list[bool] | None]:
    """Pictures (B, 3, H, W) in [0, 1] as `run_safety_checker` leaves them, and its flags."""
    signed = pixels * 2 - 1
    image, flags = self.run_safety_checker(signed, self.device, self.unet.dtype)
    if image is signed:  # to the bit
        return pixels, flags
    # What is flagged is black, -1 here and 0 there; such scripts' own checkers leave 0.
    shown = torch.tensor([not flag for flag in flags or [False] * len(image)], device=image.device)[:, None, None, None]
    return torch.where(shown, image / 2 + 0.5, image).clamp(0, 1), flags


def _checking(call: Callable[..., Any], checked: set[str]) -> Callable[..., Any]:
    signature = inspect.signature(call)

    @functools.wraps(call)
    def checks_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if "prepare_latents" in checked and (given["mask_image"] is not None or given["strength_map"] is not None):
            raise ValueError(
                "mask_image, strength_map: need the pipeline's own prepare_latents; this class has another"
            )
        if "check_inputs" in checked:
            first, second, *rest = (given[name] for name in _CHECKED)
            self.check_inputs(first, second, kwargs.get("callback_steps"), *rest)
        return call(self, *args, **kwargs)

    checks_first.checks_first = True  # type: ignore[attr-defined]
    return checks_first


def _padded(pixels: Tensor, multiple: int) -> Tensor:
    padded: Tensor = later("sdedit.inputs.images:pad_to_multiple")(pixels, multiple)
    return padded


# Method of diffusers: the stages that go through it.
_STAGES: dict[str, dict[str, Callable[..., Any]]] = {
    "check_inputs": {},
    "get_timesteps": {"_begin": _begin},
    "prepare_extra_step_kwargs": {"_begin": _begin_with_options},
    "prepare_latents": {"_encode": _encode, "_noised": _noised},
    "run_safety_checker": {"_check": _check},
}
