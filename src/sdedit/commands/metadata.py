"""The settings of a picture, kept in its PNG as the text that AUTOMATIC1111's web UI writes, for other tools to read.

The text is the prompt, a line `Negative prompt: …`, and a line `Steps: 20, Sampler: Euler a, CFG scale: 7, …`; a
value with a comma, colon, quote or line break is written as a JSON string. What that format has no key for (the input
image and its hash, the scheduler by our name, the dtype) are further keys of the same line, which count only in texts
whose `Version` is ours. What would not come back from that form (a prompt that looks like the next line, say) is
written once more, exactly.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from sdedit.commands.foreign import AUTOMATIC, settings_of
from sdedit.commands.settings import LoraWeight, PictureSettings

MAX_TEXT = 1 << 20  # characters of a text: no tool writes a tenth of it
_MAX_JSON = 100  # values that begin like JSON and are tried as such; each try may read the whole line
_NEGATIVE = "Negative prompt:"
_KEY = re.compile(r"\s*([^\W\d_][\w /\-.]{0,63}):\s*")
_LORA = re.compile(r"<lora:(.+?):([^:<>]*)>")

# The keys of the last line, in the order in which they are written.
KEYS = {
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
    "clip_skip": "Clip skip",
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
_EXACT = {"prompt": "Exact prompt", "negative": "Exact negative prompt"}
_KINDS = {name: (get_args(kind) or (kind,))[0] for name, kind in get_type_hints(PictureSettings).items()}
# Those that are written only if they differ from these.
_USUAL = {"extra_noise": 0, "repeats": 1, "feather": 4, "backend": "torch", "clip_skip": 0}


def to_text(settings: PictureSettings) -> str:
    """The text for the PNG chunk `parameters`; `from_text` reads the same settings from it."""
    from sdedit import __version__

    written = {"version": settings.version or f"sdedit {__version__}"}
    for name in KEYS:
        value = getattr(settings, name)
        usual = value is None or value is False or value == [] or (name in _USUAL and value == _USUAL[name])
        if name != "version" and not usual:
            written[name] = _written(name, value)
    lines = [_shown(settings.prompt)] + ([f"{_NEGATIVE} {_shown(settings.negative)}"] if settings.negative else [])
    pairs = [f"{key}: {_quote(written[name])}" for name, key in KEYS.items() if name in written]
    text = "\n".join([*lines, ", ".join(pairs)])
    read = split(text)
    if read is None or read[:2] != (settings.prompt, settings.negative):
        pairs[-1:-1] = [f"{key}: {json.dumps(getattr(settings, name))}" for name, key in _EXACT.items()]
        text = "\n".join([*lines, ", ".join(pairs)])
    return text


def from_text(text: str) -> PictureSettings:
    """Read such a text, ours or another tool's.

    Raises:
        ValueError: It is not such a text, or a value is not of the kind that its key asks for.
    """
    if len(text) > MAX_TEXT:
        raise ValueError(f"the text 'parameters' has {len(text):,} characters; expected at most {MAX_TEXT:,}")
    found = split(text)
    if found is None:
        raise ValueError("the text 'parameters' has no line 'Steps: …': its settings cannot be read")
    prompt, negative, pairs = found
    if not pairs.get("version", "").startswith("sdedit"):
        return settings_of(prompt, negative, pairs, read_value)
    values: dict[str, Any] = {"prompt": prompt, "negative": negative}
    for name, key in {**KEYS, **_EXACT}.items():
        if key.lower() in pairs:
            values[name] = read_value(name, pairs[key.lower()])
    return PictureSettings(**values)


def split(text: str) -> tuple[str, str, dict[str, str]] | None:
    """Prompt, negative prompt, and the pairs of the line of settings by lower-case keys.

    That is the last line that has `Steps` and two more pairs, or, if there is none, `Steps` alone; else `None`.
    """
    lines = text.split("\n")
    for least in (3, 1):
        for i in range(len(lines) - 1, -1, -1):
            if ":" in lines[i] and "steps" in lines[i].lower():
                pairs = {key.lower(): value for key, value in _pairs(lines[i])}
                if "steps" in pairs and len(pairs) >= least:
                    return *_prompts(lines[:i]), pairs
    return None


def _prompts(lines: list[str]) -> tuple[str, str]:
    at = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    return "\n".join(lines[:at]).strip(), "\n".join(lines[at:]).removeprefix(_NEGATIVE).strip()


def _pairs(line: str) -> Iterator[tuple[str, str]]:
    """`Key: value` by `Key: value`; a value is JSON (a string, list or object), or all up to the next comma."""
    at, tries, decoder = 0, 0, json.JSONDecoder(strict=False)
    while at < len(line):
        comma = line.find(",", at)
        end = len(line) if comma < 0 else comma
        if (key := _KEY.match(line, at)) and key.end() <= len(line):
            value = None
            if line[key.end() : key.end() + 1] in ('"', "[", "{") and tries < _MAX_JSON:
                tries += 1
                value, end = _json(decoder, line, key.end(), end)
            yield key[1], line[key.end() : end].strip() if value is None else value
        at = end + 1


def _json(decoder: json.JSONDecoder, line: str, start: int, end: int) -> tuple[str | None, int]:
    """The JSON value that begins at `start` and ends before a comma, and where; else `None` and `end`."""
    try:
        value, after = decoder.raw_decode(line, start)
    except (ValueError, RecursionError):
        return None, end
    after += len(line[after : after + 64]) - len(line[after : after + 64].lstrip())
    if after < len(line) and line[after] != ",":
        return None, end
    return value if isinstance(value, str) else line[start:after].strip(), after


def _written(name: str, value: Any) -> str:
    """A value as text; lists as people know them, or as JSON where that would not come back."""
    if name == "size":
        return f"{value[0]}x{value[1]}"
    if name not in ("lora", "embeddings"):
        return _number(value)
    text = "\n".join(value) if name == "embeddings" else " ".join(f"<lora:{n}:{_number(w)}>" for n, w in value)
    with contextlib.suppress(ValueError):
        if read_value(name, text) == value:
            return text
    return json.dumps(value)


def read_value(name: str, value: str) -> Any:
    """The value of a setting, from its text.

    Raises:
        ValueError: It is not of the setting's kind.
    """
    try:
        if name == "size":
            width, height = value.lower().split("x")
            return int(width), int(height)
        if name in ("lora", "embeddings"):
            return _read_list(name, value)
        kind = _KINDS[name]
        if kind is bool:
            return value == "True"
        if kind is int:
            return _whole(value)
        return float(value) if kind is float else value
    except (ValueError, TypeError, OverflowError):
        what = "WIDTHxHEIGHT" if name == "size" else "a number"
        raise ValueError(f"the setting '{KEYS[name]}: {value[:80]}' cannot be read; expected {what}") from None


def _read_list(name: str, value: str) -> list[Any]:
    try:
        listed = json.loads(value) if value.startswith("[") else None
    except (ValueError, RecursionError):
        listed = None
    if name == "embeddings":
        many = isinstance(listed, list) and all(isinstance(one, str) for one in listed)
        return list(listed) if many else value.split("\n")  # type: ignore[arg-type]
    pairs = listed if isinstance(listed, list) else _LORA.findall(value)
    return [LoraWeight(str(path), float(weight)) for path, weight in pairs]


def _whole(value: str) -> int:
    """`20` and `20.0`."""
    try:
        return int(value)
    except ValueError:
        number = float(value)
        if not number.is_integer():
            raise
        return int(number)


def _number(value: Any) -> str:
    """20.0 as 20, everything else as it is."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _shown(text: str) -> str:
    """A prompt for other tools; what no file can hold is left out."""
    return text.replace("\0", "").encode("utf-8", "replace").decode()


def _quote(value: str) -> str:
    """As it is, or as a JSON string where it would not be read back; in ASCII where it is no text (a name of bytes)."""
    plain = value.isprintable() and value == value.strip() and not any(c in value for c in ',:"')
    if plain and value and value[0] not in "[{":
        return value
    return json.dumps(value, ensure_ascii=not value.replace("\n", "").isprintable())


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
    """The web UI's names of a scheduler object: sampler, and schedule type if it is not that tool's default for it."""
    from sdedit.schedulers.names import SCHEDULERS

    own = type(scheduler).__name__.removeprefix("Flax")
    flags = {f"use_{kind.lower()}_sigmas": kind for kind in ("Karras", "Exponential", "Beta")}
    sampler, best, kind = own, -1, None
    for known in SCHEDULERS.values():
        options = {k: v for k, v in known.options.items() if k not in flags}
        fits = all(scheduler.config.get(k) == v for k, v in options.items())
        if known.class_name == own and fits and len(options) > best and not known.label.endswith(" Karras"):
            sampler, best = known.label, len(options)
            spacings = [name for flag, name in flags.items() if flag in known.options and scheduler.config.get(flag)]
            kind = spacings[0] if spacings else None
    return sampler, kind or ("Uniform" if sampler.lower() in AUTOMATIC else None)
