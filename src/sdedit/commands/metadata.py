"""The settings of a picture, kept in its PNG as the text that AUTOMATIC1111's web UI writes, for other tools to read.

The text is the prompt, a line `Negative prompt: …`, and a line `Steps: 20, Sampler: Euler a, CFG scale: 7, …`; a
value with a comma, colon, quote or line break is written as a JSON string. What that format has no key for (the input
image and its hash, the scheduler by our name, the dtype) are further keys of the same line.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.files import write_atomically

if TYPE_CHECKING:
    from PIL import Image

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
# Those that are written only if they differ from these.
_USUAL = {"extra_noise": 0, "repeats": 1, "feather": 4, "backend": "torch"}


@dataclass
class Settings:
    """What it takes to draw a picture again.

    Attributes:
        image: The input image's path; in a file, relative to the folder of that file.
        image_hash: First 16 hex digits of the SHA-256 of the input image's file.
        mask, strength_map: Likewise, and their hashes; `feather` is in pixels of the picture.
        size: (width, height) in pixels of the picture, to which the input image is brought.
        framed: The drawing was brought to the middle of a sheet that it fills, before the size.
        sampler, schedule_type: The web UI's names of the scheduler; `scheduler` is ours.
        embeddings: Files of textual inversions; in a file, relative like `image`, one a line.
        model: `"default"`, a folder, a single file, or a hub id.
        backend: `"torch"` or `"jax"`, whose noise differs.
        lora: File, folder or hub id of each adapter, in a file relative like `image`, and its weight.
    """

    prompt: str
    image: str | None = None
    image_hash: str | None = None
    mask: str | None = None
    mask_hash: str | None = None
    strength_map: str | None = None
    strength_map_hash: str | None = None
    feather: int = 4
    negative: str = ""
    steps: int = 30
    sampler: str | None = None
    schedule_type: str | None = None
    scheduler: str | None = None
    guidance: float = 7.5
    seed: int = 0
    size: tuple[int, int] | None = None
    framed: bool = False
    model: str = "default"
    embeddings: tuple[str, ...] = ()
    strength: float = 0.8
    lora: list[tuple[str, float]] = field(default_factory=list)
    dtype: str | None = None
    extra_noise: float = 0.0
    exact_steps: bool = False
    repeats: int = 1
    weighting: bool = False
    backend: str = "torch"
    version: str | None = None

    def to_text(self) -> str:
        """The text for the PNG chunk `parameters`."""
        pairs = []
        for name, key in _KEYS.items():
            value = getattr(self, name)
            usual = name in _USUAL and value == _USUAL[name]
            if value is not None and value is not False and value not in ((), []) and not usual:
                written = f"{value[0]}x{value[1]}" if name == "size" else _number(value)
                written = "\n".join(value) if name == "embeddings" else written
                if name == "lora":  # as the web UI writes them in a prompt
                    written = " ".join(f"<lora:{path}:{_number(weight)}>" for path, weight in value)
                pairs.append(f"{key}: {_quote(written)}")
        lines = [self.prompt] + ([f"Negative prompt: {self.negative}"] if self.negative else [])
        return "\n".join([*lines, ", ".join(pairs)])

    @classmethod
    def from_text(cls, text: str) -> Settings:
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
        return cls(**values)


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
        kind = {f.name: str(f.type) for f in fields(Settings)}[name]
        if name == "embeddings":
            return tuple(value.split("\n"))
        if kind == "bool":
            return value == "True"
        return int(value) if kind == "int" else float(value) if kind == "float" else value
    except ValueError:
        raise ValueError(
            f"the setting '{key}: {value}' cannot be read; expected {'WxH' if name == 'size' else 'a number'}"
        ) from None


def hash_file(path: str | os.PathLike[str]) -> str:
    """First 16 hex digits of the file's SHA-256."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def save_picture(picture: Image.Image, path: str | os.PathLike[str], settings: Settings | None = None) -> None:
    """Write a picture in the format that the name's suffix says; a PNG with its settings.

    Raises:
        ValueError: Pillow knows no format of that suffix.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path = Path(path)
    options: dict[str, Any] = {}
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind not in Image.SAVE:
        raise ValueError(
            f"{path}: pictures of the kind {path.suffix or '(no suffix)'!r} cannot be written; "
            "expected .png, .jpg or .webp"
        )
    if kind == "PNG" and settings is not None:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("parameters", settings.to_text())
    if kind == "JPEG" and picture.mode == "RGBA":
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: make it, or write elsewhere")
    with write_atomically(path) as temporary:
        picture.save(temporary, **options)


def read_settings(path: str | os.PathLike[str]) -> Settings:
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
        return Settings.from_text(text)
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
