"""Helpers that scripts around diffusers use: pictures in and out, what is installed, names of files."""

from __future__ import annotations

import importlib.util
import os
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sdedit.compat.utils import logging
from sdedit.compat.utils.logging import get_logger
from sdedit.files import write_atomically
from sdedit.inputs.pixels import open_image
from sdedit.output import Output as BaseOutput

__all__ = [
    "CONFIG_NAME",
    "PIL_INTERPOLATION",
    "SAFETENSORS_WEIGHTS_NAME",
    "WEIGHTS_NAME",
    "BaseOutput",
    "export_to_gif",
    "get_logger",
    "load_image",
    "logging",
    "make_image_grid",
    "numpy_to_pil",
    "pt_to_pil",
]

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "diffusion_pytorch_model.bin"
SAFETENSORS_WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PIL_INTERPOLATION = {
    "linear": Image.Resampling.BILINEAR,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "nearest": Image.Resampling.NEAREST,
}
_MOST_BYTES = 256 << 20  # of a picture from the web
_SECONDS = 60


def load_image(
    image: str | os.PathLike[str] | Image.Image, convert_method: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """A picture from a path, an http(s) address or PIL, upright; in RGB, or as `convert_method` makes it.

    Raises:
        ValueError: It is none of these, or no picture that can be read, or larger than 256 MiB.
        FileNotFoundError: There is no such file.
    """
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        with urllib.request.urlopen(image, timeout=_SECONDS) as answer:
            content = answer.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"image: {image} is larger than {_MOST_BYTES >> 20} MiB")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture"
            path.write_bytes(content)
            opened = open_image(path)
    elif isinstance(image, (str, os.PathLike)):
        opened = open_image(image)
    elif isinstance(image, Image.Image):
        opened = image
    else:
        raise ValueError(f"image: {type(image).__name__}; expected a path, an http(s) address or a PIL image")
    upright = ImageOps.exif_transpose(opened)
    return upright.convert("RGB") if convert_method is None else convert_method(upright)


def make_image_grid(images: Sequence[Image.Image], rows: int, cols: int, resize: int | None = None) -> Image.Image:
    """Pictures in rows and columns on one sheet, without gaps; `resize` makes each a square of that side first."""
    if len(images) != rows * cols or not images:
        raise ValueError(f"images: {len(images)}; expected rows * cols = {rows * cols}, at least one")
    shown = [one if resize is None else one.resize((resize, resize)) for one in images]
    width, height = shown[0].size
    sheet = Image.new("RGB", (cols * width, rows * height))
    for i, one in enumerate(shown):
        sheet.paste(one, (i % cols * width, i // cols * height))
    return sheet


def numpy_to_pil(images: np.ndarray[Any, Any]) -> list[Image.Image]:
    """Arrays (B, H, W, C) or (H, W, C) in [0, 1], C of 1, 3 or 4, as PIL images."""
    batch = np.asarray(images)[None] if np.ndim(images) == 3 else np.asarray(images)
    eight_bit = (batch * 255).round().astype(np.uint8)
    return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in eight_bit]


def pt_to_pil(images: Any) -> list[Image.Image]:
    """Tensors (B, C, H, W) in [-1, 1] as PIL images."""
    return numpy_to_pil((images / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy())


def export_to_gif(image: Sequence[Image.Image], output_gif_path: str | None = None, fps: int = 10) -> str:
    """Write pictures as an animation; the path that it was written to."""
    path = output_gif_path or str(Path(tempfile.mkdtemp()) / "animation.gif")
    with write_atomically(path) as temporary:
        image[0].save(
            temporary, save_all=True, append_images=list(image[1:]), optimize=False, duration=1000 // fps, loop=0
        )
    return path


def __getattr__(name: str) -> Any:
    """`is_xformers_available()`, `is_torch_version(">=", "2.0")` and their kin, of the package that each names."""
    if name.startswith("is_") and name.endswith("_available"):
        package = name.removeprefix("is_").removesuffix("_available")
        return lambda: importlib.util.find_spec(package) is not None
    if name.startswith("is_") and name.endswith("_version"):
        package = name.removeprefix("is_").removesuffix("_version")
        return lambda operation, wanted: _compare(package, operation, wanted)
    raise AttributeError(f"module 'sdedit.utils' has no attribute {name!r}")


def _compare(package: str, operation: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(f"{operation}{wanted}", prereleases=True).contains(version(package).split("+")[0])
