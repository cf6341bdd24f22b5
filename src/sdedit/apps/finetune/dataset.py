"""A folder of pictures with captions, and what the network learns from: latents, cached once."""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdedit.apps.finetune.objective import fresh_rng
from sdedit.inputs.images import read_images
from sdedit.inputs.pixels import open_image
from sdedit.noise import Generator, retry_in_float32

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
METADATA = ("metadata.jsonl", "metadata.csv")


@dataclass(frozen=True)
class Example:
    """A picture's file and its caption."""

    path: Path
    caption: str


def read_folder(folder: Path, pattern: str = "{}") -> list[Example]:
    """Find the pictures of a folder, and their captions, and see that all of them can be read.

    Captions come from `metadata.jsonl` or `metadata.csv` (`file_name` and `text`) if there is one; else from text files
    beside the pictures (`cat.txt` for `cat.png`) if there are any; else from the file names, without counters:
    `red_apple-2.png` is "red apple".

    Args:
        folder: The pictures lie in it, not in folders inside it (those in a metadata file may).
        pattern: The caption, with "{}" for the picture's own; without "{}" none are looked for.

    Raises:
        FileNotFoundError, NotADirectoryError: There is no such folder, or a file that the metadata names is missing.
        ValueError: There are no pictures, some have no caption or cannot be read; all of them are named.
    """
    if not folder.is_dir():
        raise (NotADirectoryError if folder.exists() else FileNotFoundError)(
            f"{folder}: expected a folder with pictures to learn from"
        )
    pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if "{}" not in pattern:
        captions = dict.fromkeys(pictures, "")
    elif metadata := [folder / name for name in METADATA if (folder / name).is_file()]:
        captions = read_metadata(metadata[0])
    elif any(path.with_suffix(".txt").is_file() for path in pictures):
        captions = {p: _text(p.with_suffix(".txt")) for p in pictures if p.with_suffix(".txt").is_file()}
    else:
        captions = {path: caption_from_name(path.stem) for path in pictures}
    if not pictures and not captions:
        raise ValueError(f"{folder} has no pictures; expected files that end in {', '.join(SUFFIXES)}")
    without = [path for path in pictures if not captions.get(path)] if "{}" in pattern else []
    if without:
        raise ValueError(
            f"captions are missing for {_listed(path.name for path in without)}: name the files by what they show, "
            f"write cat.txt beside cat.png for all of them, or a metadata.jsonl with file_name and text; or give one "
            "caption for all"
        )
    _refuse_unreadable(captions)
    return [Example(path, pattern.replace("{}", caption)) for path, caption in sorted(captions.items())]


def caption_from_name(stem: str) -> str:
    """Words of a file name without its suffix: `red_apple-2` and `red apple (2)` are both "red apple"."""
    words = re.sub(r"[\s_\-.]+", " ", stem).strip()
    return re.sub(r"(^|\s+)(\(\d+\)|\d+)$", "", words).strip()


def read_metadata(path: Path) -> dict[Path, str]:
    """Captions by picture, from the rows of a `metadata.jsonl` or `metadata.csv` as Hugging Face's data sets have it.

    Raises:
        FileNotFoundError: A picture that it names is missing.
        ValueError: A row is damaged, or has no `file_name` or no `text`.
    """
    captions = {}
    for number, row in _rows(path):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file_name", "text")):
            keys = sorted(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}, line {number}: expected file_name and text, both words; it has {keys}")
        picture = path.parent / row["file_name"]
        if not picture.is_file():
            raise FileNotFoundError(f"{path}, line {number}: {picture} does not exist")
        captions[picture] = row["text"].strip()
    return captions


def _rows(path: Path) -> Iterable[tuple[int, Any]]:
    lines = _text(path).splitlines()
    if path.suffix == ".csv":
        reader = csv.DictReader(lines)
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error})") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error})") from None


def _refuse_unreadable(pictures: Iterable[Path]) -> None:
    broken = []
    for path in pictures:
        try:
            open_image(path)
        except ValueError as error:
            broken.append(str(error).removeprefix("image: "))
    if broken:
        raise ValueError(f"{len(broken)} pictures cannot be used: {'; '.join(broken[:10])}")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def fitted(pixels: Tensor, size: int) -> Tensor:
    """Pixels (1, 3, H, W) scaled until the shorter side is `size`, and the middle cut out: (1, 3, size, size)."""
    height, width = pixels.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    if shape != (height, width):
        pixels = F.interpolate(pixels, shape, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return pixels[..., top : top + size, left : left + size]


@dataclass(frozen=True)
class Latents:
    """What the VAE says of each picture: a normal distribution of latents, times `scaling_factor`.

    Attributes:
        mean, std: (N, V, G, C, h, w) on the CPU; V is 2 if pictures are shown mirrored too, else 1. The first of the
            G is the picture, the others are guides to it.
    """

    mean: Tensor
    std: Tensor

    def draw(self, rows: Tensor, versions: Tensor, kinds: Tensor, generator: torch.Generator) -> Tensor:
        """A sample for each of B pictures, mirrored or not, or of a guide to it, (B, C, h, w)."""
        mean, std = self.mean[rows, versions, kinds], self.std[rows, versions, kinds]
        return mean + std * torch.randn(mean.shape, generator=generator)


@torch.no_grad()
def encode_pictures(
    vae: Any,
    examples: Sequence[Example],
    size: int,
    *,
    flip: bool = False,
    guides: int = 0,
    seed: int = 0,
    done: Callable[[], Any] = lambda: None,
) -> Latents:
    """Latents of all pictures, and of so many guides to each; `done` is called after each picture."""
    both = []
    for n, example in enumerate(examples):
        pixels = fitted(read_images(open_image(example.path), vae.config.latent_channels).pixels, size)
        generator = fresh_rng(seed, 2, n)[1]
        batch = torch.cat([pixels, *(guide(pixels, generator) for _ in range(guides))])
        batch = torch.stack([batch, batch.flip(-1)] if flip else [batch])
        found = retry_in_float32("VAE encoder", vae, functools.partial(_distribution, batch.flatten(0, 1)))
        both.append(found.float().cpu().unflatten(1, batch.shape[:2]) * vae.config.scaling_factor)
        done()
    mean, std = torch.stack(both, 1)
    return Latents(mean, std)


def guide(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A picture (1, 3, H, W) in rough colours: what is not white becomes another colour, blurred; white stays white."""
    kept = torch.rand((1, 3, 1, 1), generator=generator) * 1.6
    other = 1 - (1 - pixels) * kept.clamp(max=2 / (1 - pixels).amax((2, 3), keepdim=True).clamp(min=1e-3))
    height, width = pixels.shape[-2:]
    coarse = int(torch.randint(1, 5, (1,), generator=generator))
    small = F.interpolate(other, (height // coarse, width // coarse), mode="area")
    return F.interpolate(small, (height, width), mode="bilinear", align_corners=False).clamp(-1, 1)


def _distribution(pixels: Tensor, vae: Any, _: Generator) -> Tensor:
    """Mean and deviation of the latents, (2, B, C, h, w); those of a tiny VAE have no deviation."""
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    if hasattr(encoded, "latents"):
        return torch.stack([encoded.latents, torch.zeros_like(encoded.latents)])
    return torch.stack([encoded.latent_dist.mean, encoded.latent_dist.std])
