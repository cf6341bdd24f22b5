"""The settings of a picture, kept in its PNG as the text that AUTOMATIC1111's web UI writes, for other tools to read.

The text is the prompt, a line `Negative prompt: …`, and a line `Steps: 20, Sampler: Euler a, CFG scale: 7, …`; a
value with a comma, colon, quote or line break is written as a JSON string. What that format has no key for (the input
image and its hash, the scheduler by our name, the dtype) are further keys of the same line.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any, get_args, get_type_hints

from sdedit.commands.settings import PictureSettings

_PAIR = re.compile(r'\s*([A-Za-z][\w /\-]*):\s*("(?:\\.|[^"\\])*"|[^,]*)(?:,|$)')

# The keys of the last line, in the order in which they are written.
_KEYS = {
    "steps": "Steps",
    "sampler": "Sampler",
    "schedule_type": "Schedule type",
    "guidance": "CFG scale",
    "seed": "Seed",
    "size": "Size",
    "framed": "Framed",
    "model": "Model",
    "embeddings": "Embeddings",
    "strength": "Denoising strength",
    "lora": "LoRA",
    "extra_noise": "Extra noise",
    "exact_steps": "Exact steps",
    "repeats": "Repeats",
    "weighting": "Prompt weighting",
    "image": "Init image",
    "image_hash": "Init image hash",
    "mask": "Mask",
    "mask_hash": "Mask hash",
    "strength_map": "Strength map",
    "strength_map_hash": "Strength map hash",
    "feather": "Mask feather",
    "scheduler": "Scheduler",
    "dtype": "Precision",
    "backend": "Backend",
    "version": "Version",
}
_KINDS = {name: (get_args(kind) or (kind,))[0] for name, kind in get_type_hints(PictureSettings).items()}
# Those that are written only if they differ from these.
_USUAL = {"extra_noise": 0, "repeats": 1, "feather": 4, "backend": "torch"}


def to_text(settings: PictureSettings) -> str:
    """The text for the PNG chunk `parameters`."""
    pairs = []
    for name, key in _KEYS.items():
        value = getattr(settings, name)
        usual = name in _USUAL and value == _USUAL[name]
        if value is not None and value is not False and value != [] and not usual:
            written = f"{value[0]}x{value[1]}" if name == "size" else _number(value)
            written = "\n".join(value) if name == "embeddings" else written
            if name == "lora":  # as the web UI writes them in a prompt
                written = " ".join(f"<lora:{path}:{_number(weight)}>" for path, weight in value)
            pairs.append(f"{key}: {_quote(written)}")
    lines = [settings.prompt] + ([f"Negative prompt: {settings.negative}"] if settings.negative else [])
    return "\n".join([*lines, ", ".join(pairs)])


def from_text(text: str) -> PictureSettings:
    """Read such a text, ours or another tool's; keys that we have no use for are left out.

    Raises:
        ValueError: It is not such a text, or a value is not of the kind that its key asks for.
    """
    *lines, last = text.strip().split("\n")
    found = {key: _unquote(value.strip()) for key, value in _PAIR.findall(last)}
    if "Steps" not in found:
        raise ValueError("the text 'parameters' has no line 'Steps: …': its settings cannot be read")
    split = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    negative = "\n".join(lines[split:]).removeprefix("Negative prompt:").strip()
    values: dict[str, Any] = {"prompt": "\n".join(lines[:split]).strip(), "negative": negative}
    for name, key in _KEYS.items():
        if key in found:
            values[name] = _read_value(name, key, found[key])
    return PictureSettings(**values)


def _number(value: Any) -> str:
    """20.0 as 20, everything else as it is."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _quote(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(c in value for c in ',:"\n') else value


def _unquote(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value


def _read_value(name: str, key: str, value: str) -> Any:
    try:
        if name == "size":
            width, height = value.split("x")
            return int(width), int(height)
        if name == "lora":
            return [(path, float(weight)) for path, weight in re.findall(r"<lora:(.+?):([^:<>]*)>", value)]
        kind = _KINDS[name]
        if name == "embeddings":
            return value.split("\n")
        if kind is bool:
            return value == "True"
        return kind(value) if kind in (int, float) else value
    except (ValueError, OverflowError):
        raise ValueError(
            f"the setting '{key}: {value}' cannot be read; expected {'WxH' if name == 'size' else 'a number'}"
        ) from None


def read_settings(path: str | os.PathLike[str]) -> PictureSettings:
    """The settings that a picture carries.

    Raises:
        FileNotFoundError, ValueError: There is no such file, it is no image, or it carries none.
    """
    from sdedit.inputs.pixels import image_info

    text = image_info(path).get("parameters")
    if not isinstance(text, str):
        raise ValueError(
            f"{path} carries no settings (the PNG text 'parameters'): it was not written by sdedit, or edited since"
        )
    try:
        return from_text(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def sampler_label(scheduler: Any) -> tuple[str, str | None]:
    """The web UI's names of a scheduler object: the sampler, and the schedule type if it is not the ordinary one."""
    from sdedit.schedulers.names import SCHEDULERS

    own = type(scheduler).__name__.removeprefix("Flax")
    name, best = own, -1
    for known in SCHEDULERS.values():
        fits = all(scheduler.config.get(k) == v for k, v in known.options.items())
        if known.class_name == own and fits and len(known.options) > best:
            name, best = known.label, len(known.options)
    sampler, karras, _ = name.partition(" Karras")
    return sampler, karras.strip() or None


def scheduler_from_label(sampler: str, schedule_type: str | None) -> str:
    """Our name of the scheduler that the web UI calls so.

    Raises:
        ValueError: We have none of that name.
    """
    from sdedit.schedulers.names import SCHEDULERS

    ordinary = (None, "Automatic", "Uniform", "Simple", "Normal")
    label = sampler if schedule_type in ordinary else f"{sampler} {schedule_type}"
    names = {known.label.lower(): name for name, known in SCHEDULERS.items()}
    if label.lower() not in names:
        raise ValueError(f"the sampler {label!r} is not known; choose with --scheduler one of {', '.join(SCHEDULERS)}")
    return names[label.lower()]
