"""Settings that other tools write into pictures: AUTOMATIC1111's web UI and its kin, and ComfyUI's image savers.

They mean by the same words what their own code makes of them: weights and LoRA tags in prompts, a default schedule for
each sampler, 1 for no clip skip. What has no counterpart here is listed, so that nothing vanishes in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sdedit.commands.settings import LoraWeight, PictureSettings

# The schedule that "Automatic" means for a sampler; for the others it is "Uniform".
AUTOMATIC = {
    "dpm++ 2m": "Karras",
    "dpm++ sde": "Karras",
    "dpm++ 2s a": "Karras",
    "dpm2": "Karras",
    "dpm2 a": "Karras",
    "dpm++ 2m sde": "Exponential",
    "dpm++ 2m sde heun": "Exponential",
    "dpm++ 3m sde": "Exponential",
}
# Schedule types of the web UI and of ComfyUI: what is added to our name of the sampler.
_TYPES = {
    "": "",
    "uniform": "",
    "normal": "",
    "karras": "-karras",
    "exponential": "-exponential",
    "polyexponential": "-exponential",  # the same where rho is 1, as it is unless somebody chose
    "beta": "-beta",
    "sgm uniform": "-trailing",
    "simple": "-trailing",
    "ddim": "-leading",
    "ddim uniform": "-leading",
}
# ComfyUI's names that are not ours but for brackets and lines.
_COMFY = {
    "euler_ancestral": "Euler a",
    "dpm_2": "DPM2",
    "dpm_2_ancestral": "DPM2 a",
    "dpmpp_2m": "DPM++ 2M",
    "dpmpp_2m_sde": "DPM++ 2M SDE",
    "dpmpp_sde": "DPM++ SDE",
    "dpmpp_2s_ancestral": "DPM++ 2S a",
    "dpmpp_3m_sde": "DPM++ 3M SDE",
    "uni_pc": "UniPC",
}
# Samplers that do not go by k-diffusion's grid, which runs from end to end.
_OWN_GRID = ("ddim", "plms", "unipc", "lcm")
_TAG = re.compile(r"\s?<(lora|lyco|hypernet):([^:<>]{1,256})((?::[^:<>]{0,64}){0,4})>")
# Keys that say nothing about the picture, or the same as one that is used.
_SILENT = ("version", "model hash", "lora hashes", "hashes", "ti hashes", "app", "parser")
_READ = {
    "steps": "steps",
    "guidance": "cfg scale",
    "seed": "seed",
    "size": "size",
    "model": "model",
    "strength": "denoising strength",
    "extra_noise": "extra noise",
}


def settings_of(prompt: str, negative: str, pairs: dict[str, str], read: Callable[[str, str], Any]) -> PictureSettings:
    """The settings that another tool's text means.

    Args:
        pairs: By lower-case keys.
        read: The value of a setting, by its name, from its text.

    Raises:
        ValueError: A value is not of the kind that its key asks for.
    """
    left = {key: value for key, value in pairs.items() if key not in _SILENT}
    values: dict[str, Any] = {"weighting": True, "negative": negative, "version": pairs.get("version")}
    for name, key in _READ.items():
        if (text := left.pop(key, None)) is not None:
            values[name] = read(name, text)
    values["clip_skip"] = max(read("clip_skip", left.pop("clip skip", "1")) - 1, 0)
    values["sampler"] = left.pop("sampler", None)
    values["schedule_type"] = left.pop("schedule type", None) or left.pop("scheduler", None)
    values["prompt"], values["lora"], unused = _without_tags(prompt)
    unused += [f"{key}: {value[:60]}" for key, value in left.items()]
    return PictureSettings(**values, unused=unused)


def _without_tags(prompt: str) -> tuple[str, list[LoraWeight], list[str]]:
    """A prompt without its tags, the LoRAs that they name, and tags that are not used."""
    loras, unused = [], []
    for tag in _TAG.finditer(prompt):
        weights = tag[3].split(":")[1:]
        try:
            weight = float(weights[0].removeprefix("te=")) if weights else 1.0
        except ValueError:
            weight = None
        if tag[1] == "hypernet" or weight is None:
            unused.append(tag[0].strip())
        else:
            loras.append(LoraWeight(tag[2], weight))
            unused += [f"{tag[0].strip()}: its further weights"] if len(weights) > 1 else []
    return _TAG.sub("", prompt).strip(), loras, unused


def scheduler_of(settings: PictureSettings) -> str:
    """Our name of the scheduler that another tool's sampler and schedule type mean, on that tool's grid.

    Raises:
        ValueError: We have none of that name.
    """
    sampler = settings.sampler or ""
    kind = settings.schedule_type or "Automatic"
    name = scheduler_from_label(sampler, kind)
    on_ends = not name.endswith(("-trailing", "-leading")) and label_of(sampler).lower() not in _OWN_GRID
    return f"{name}-linspace" if on_ends else name


def label_of(sampler: str) -> str:
    """The web UI's name of a sampler that it or ComfyUI calls so."""
    return _COMFY.get(sampler.lower().removesuffix("_gpu"), sampler)


def scheduler_from_label(sampler: str, schedule_type: str | None) -> str:
    """Our name of the scheduler that the web UI calls so.

    Args:
        schedule_type: `None` is an even one, "Automatic" that tool's default for the sampler.

    Raises:
        ValueError: We have none of that name.
    """
    from sdedit.schedulers.names import SCHEDULERS, named

    label, kind = label_of(sampler), (schedule_type or "").lower().replace("_", " ")
    for ending in ("karras", "exponential", "polyexponential"):  # older versions joined the two names
        if label.lower().endswith(f" {ending}"):
            label, kind = label[: -len(ending) - 1], ending
    if kind == "automatic":
        kind = AUTOMATIC.get(label.lower(), "").lower()
    names = {known.label.lower(): name for name, known in SCHEDULERS.items()}
    name = names.get(label.lower(), "") + _TYPES.get(kind, f"-{kind}")
    try:
        named(name)
    except ValueError:
        shown = f"{sampler} {schedule_type or ''}".strip()
        raise ValueError(
            f"the sampler {shown!r} is not known; choose with --scheduler one of {', '.join(SCHEDULERS)}"
        ) from None
    return name
