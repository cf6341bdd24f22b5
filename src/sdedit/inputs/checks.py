"""The door: what users pass to the pipeline is checked here, before any work; every error names the argument."""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high], not a bool."""
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high:
        span = f"from {low:g} to {high:g}" if high < math.inf else "that is finite"
        raise ValueError(f"{name}={value!r:.80}; expected a number {span}")
    return float(value)


def whole_number(name: str, value: Any, low: int) -> int:
    """A whole number of at least `low`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}={value!r:.80}; expected a whole number of at least {low}")
    return int(value)


def prompts(name: str, value: Any) -> list[str]:
    """One prompt or several, as a list."""
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not values or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name}={value!r:.80}; expected a string or a list of strings")
    return list(values)


def either(first: str, a: Any, second: str, b: Any) -> None:
    """Exactly one of two arguments."""
    if (a is None) == (b is None):
        state = "both were given" if a is not None else "neither was given"
        raise ValueError(f"{first} and {second}: {state}; expected one of the two")


def embeds(name: str, value: Any, width: int) -> Tensor:
    """Prompt embeds (B, M, width)."""
    import torch
    from torch import Tensor

    if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[-1] != width or not value.numel():
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: {got}; expected a tensor of shape (B, M, {width}), as encode_prompt gives")
    if not value.is_floating_point() or not torch.isfinite(value).all():
        raise ValueError(f"{name}: {value.dtype} with NaN or infinity, or no floats; expected finite floats")
    return value


def generators(value: Any, batch: int) -> None:
    """`None`, one generator, or one for each image of the batch."""
    import torch

    many = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    for one in many:
        if not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator: {type(one).__name__}; expected torch.Generator, e.g. torch.Generator().manual_seed(0)"
            )
    if isinstance(value, (list, tuple)) and len(value) != batch:
        raise ValueError(f"generator: {len(value)} generators for {batch} images; expected one, or one for each image")


def adapter_arguments(cross_attention_kwargs: Any) -> None:
    """What adapters would use."""
    if cross_attention_kwargs is not None:
        if not isinstance(cross_attention_kwargs, Mapping):
            raise ValueError(
                f"cross_attention_kwargs={cross_attention_kwargs!r}; expected a dict such as {{'scale': 0.8}}"
            )
        if wrong := sorted(set(cross_attention_kwargs) - {"scale"}):
            names = ", ".join(map(repr, wrong))
            warnings.warn(f"cross_attention_kwargs has {names}, which nothing reads; expected 'scale'", stacklevel=4)
        if "scale" in cross_attention_kwargs:
            number("cross_attention_kwargs['scale']", cross_attention_kwargs["scale"])


def callback(on_step_end: Any, tensor_inputs: Any, known: Sequence[str]) -> list[str]:
    """The tensors that the callback wants; a callback object may name its own."""
    if on_step_end is not None and not callable(on_step_end):
        raise ValueError(
            f"callback_on_step_end={on_step_end!r}; expected a function (pipe, step, timestep, tensors) -> dict"
        )
    names = getattr(on_step_end, "tensor_inputs", tensor_inputs)
    if names is None:
        return []
    if not isinstance(names, (list, tuple)) or not all(name in known for name in names):
        raise ValueError(f"callback_on_step_end_tensor_inputs={names!r:.80}; expected a list out of {list(known)}")
    return list(names)


def callback_result(value: Any) -> Mapping[str, Any]:
    """What a callback returned: tensors by name, or nothing."""
    if value is not None and not isinstance(value, Mapping):
        raise ValueError(f"callback_on_step_end returned {type(value).__name__}; expected a dict of tensors, or None")
    return value or {}


def output_type(value: Any) -> None:
    """One of the four."""
    if value not in OUTPUT_TYPES:
        raise ValueError(f"output_type={value!r}; expected one of {', '.join(OUTPUT_TYPES)}")


def components(parts: Mapping[str, Any]) -> None:
    """What a pipeline cannot do without has the methods that it calls."""
    needed = {"vae": ("encode", "decode", "config"), "unet": ("forward", "config"), "scheduler": ("step", "add_noise")}
    for name, methods in needed.items():
        if not all(hasattr(parts[name], method) for method in methods):
            raise ValueError(
                f"{name}: {type(parts[name]).__name__}; expected a model's {name}, as from_pretrained gives"
            )
    if parts["safety_checker"] is not None and parts["feature_extractor"] is None:
        raise ValueError("feature_extractor: None, but the safety checker needs one; pass it, or safety_checker=None")
    takes, gives = parts["unet"].config.in_channels, parts["vae"].config.latent_channels
    reads = getattr(getattr(parts["text_encoder"], "config", None), "hidden_size", None)
    if reads is not None and reads != parts["unet"].config.cross_attention_dim:
        raise ValueError(
            f"text_encoder: gives {reads} channels; the UNet reads {parts['unet'].config.cross_attention_dim} "
            "(Stable Diffusion 1.x has 768, 2.x 1024): take both from one model"
        )
    if takes != gives:
        kind = {9: " (an inpainting model)", 8: " (an instruct-pix2pix model)", 5: " (a depth model)"}.get(takes, "")
        raise ValueError(f"unet: takes {takes} channels{kind}; expected {gives}, the channels of the VAE's latents")


def schedule(scheduler: Any, timesteps: Any, sigmas: Any) -> dict[str, Any]:
    """A grid of one's own by its name, of a kind that the scheduler takes; or nothing."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("timesteps and sigmas: both were given; expected at most one of the two")
    given = {name: value for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None}
    for name, value in given.items():
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(
                f"{name}: {type(scheduler).__name__} takes no {name} of one's own; use num_inference_steps"
            )
        values = value.tolist() if hasattr(value, "tolist") else value
        ok = isinstance(values, (list, tuple)) and all(isinstance(v, numbers.Real) and float(v) >= 0 for v in values)
        if not ok or not values or any(not a > b for a, b in itertools.pairwise(values)):
            raise ValueError(
                f"{name}={values!r:.80}; expected a list of numbers that fall from the noisiest to the cleanest"
            )
    return given


def each(name: str, value: Any, check: Callable[..., Any], *bounds: float) -> list[Any]:
    """One value for all pictures, or a list with one for each, all checked."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError(f"{name}: the list is empty; expected one value for each picture")
        return [check(f"{name}[{i}]", one, *bounds) for i, one in enumerate(value)]
    return [check(name, value, *bounds)]


def batch_plan(
    images: int, prompts: int, per_prompt: int, settings: Mapping[str, Sequence[Any]]
) -> tuple[list[int], list[int]]:
    """Which image and which prompt each picture of the batch gets.

    One image goes with all prompts, one prompt with all images, as many images as prompts pair up; each pair is drawn
    `per_prompt` times, next to each other. As many images as pictures are taken as they are. A setting may have a value
    for each picture; a single picture is drawn once for each of them.
    """
    pictures = prompts * per_prompt
    of_prompt = [p for p in range(prompts) for _ in range(per_prompt)]
    if images == 1:
        plan = [0] * pictures, of_prompt
    elif images == prompts:
        plan = of_prompt, of_prompt
    elif images == pictures:
        plan = list(range(images)), of_prompt
    elif prompts == 1:
        plan = [i for i in range(images) for _ in range(per_prompt)], [0] * (images * per_prompt)
    else:
        raise ValueError(
            f"image and prompt: {images} images and {prompts} prompts; expected as many of both, or one of either"
        )
    longest = max(map(len, settings.values()))
    if len(plan[0]) == 1:
        plan = plan[0] * longest, plan[1] * longest
    for name, values in settings.items():
        if len(values) not in (1, len(plan[0])):
            raise ValueError(f"{name}: {len(values)} values for {len(plan[0])} pictures; expected one, or one for each")
    return plan
