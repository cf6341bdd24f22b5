"""What it takes to draw a picture: the options of the commands that draw, and what a PNG keeps for `sdedit again`."""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

FILES = ("image", "mask", "strength_map")


class Suits(NamedTuple):
    """What a model is used with where nothing else is asked for."""

    strength: float
    steps: int
    guidance: float
    exact_steps: bool = False


USUAL, SUITED = Suits(0.8, 30, 7.5), Suits(0.65, 5, 3.0, exact_steps=True)  # large models; the small one of the package
SUITED_ON_JAX = SUITED._replace(steps=20, exact_steps=False)  # which has no exact steps


def _each(i: int) -> str:
    return f"{USUAL[i]:g}; default model: {SUITED[i]:g}"


class LoraWeight(NamedTuple):
    """A LoRA's file, folder or hub id, and its weight."""

    name: str
    weight: float = 1.0


def with_weight(text: str) -> LoraWeight:
    """`FILE:0.8` as the file and its weight, which is 1 if there is none."""
    name, _, weight = text.rpartition(":")
    try:
        number = float(weight) if name and not Path(text).exists() else None
    except ValueError:
        number = None
    if number is None:
        return LoraWeight(text)
    if not math.isfinite(number):
        raise ValueError(f"--lora {text}; expected a finite weight, such as {name}:0.8")
    return LoraWeight(name, number)


@dataclass
class PictureSettings:
    """What it takes to draw a picture, and to draw it again; what is annotated is an option of the command line.

    In a file, paths (of `image`, `mask`, `strength_map`, `model`, `embeddings`, `lora`) are relative to its folder.

    Attributes:
        image_hash, mask_hash, strength_map_hash: First 16 hex digits of the SHA-256 of these files.
        size: (width, height) in pixels of the picture, to which the input image is brought; `feather` is in them, too.
        framed: The drawing was brought to the middle of a sheet that it fills, before the size.
        sampler, schedule_type: The web UI's names of the scheduler; `scheduler` is ours.
        version: The program that wrote them.
        unused: What else another program wrote, and is not used here.
    """

    image: Annotated[
        str | None, typer.Argument(help="The picture to start from: any format, any size; - reads the standard input.")
    ] = None
    prompt: Annotated[str, typer.Argument(help="What it shall become.")] = ""
    model: Annotated[
        str, typer.Option(help="A model folder, single file or hub id; 'default' is the one in the package.")
    ] = "default"
    strength: Annotated[
        float | None,
        typer.Option(min=0, max=1, help=f"How far to go from the image: 0 keeps it, 1 forgets it. {_each(0)}."),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help=f"Steps of the schedule; strength says how many run. {_each(1)}, exact."),
    ] = None
    guidance: Annotated[float | None, typer.Option(help=f"Weight of the prompt; 1 turns guidance off. {_each(2)}.")] = (
        None
    )
    negative: Annotated[str, typer.Option(help="What to go away from.")] = ""
    scheduler: Annotated[
        str | None, typer.Option(help="Such as ddim, euler-a, dpm++-2m-karras; the model's own if not given.")
    ] = None
    lora: Annotated[
        list[LoraWeight],
        typer.Option(
            metavar="FILE[:WEIGHT]", parser=with_weight, help="A LoRA file, folder or hub id; may be given again."
        ),
    ] = field(default_factory=list)
    seed: Annotated[
        int | None,
        typer.Option(min=0, max=2**64 - 1, help="Same seed, same picture; drawn and printed if not given."),
    ] = None
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16; float32 on a CPU, else float16 if not given.")
    ] = None
    backend: Annotated[str, typer.Option(help="torch or jax; a seed gives each a picture of its own.")] = "torch"
    exact_steps: Annotated[
        bool, typer.Option(help="Run all of --steps, whatever the strength, which is then continuous.")
    ] = False
    extra_noise: Annotated[
        float, typer.Option(min=0, max=1, help="More noise than strength asks for, against blur: 0 to 1.")
    ] = 0.0
    repeats: Annotated[
        int, typer.Option(min=1, max=1000, help="Noise and denoise so often: more realistic, slower.")
    ] = 1
    mask: Annotated[str | None, typer.Option(help="Where IMAGE may change: white changes, black stays to the bit.")] = (
        None
    )
    feather: Annotated[
        int,
        typer.Option(min=0, max=10_000, help="Pixels over which the change fades in from the mask's edges, inwards."),
    ] = 4
    strength_map: Annotated[
        str | None,
        typer.Option(help="The strength of each pixel, black 0 to white 1; --strength is then the most, 1."),
    ] = None
    weighting: Annotated[bool, typer.Option(help="Read (word:1.2), [word] and BREAK in prompts, of any length.")] = (
        False
    )
    embeddings: Annotated[
        list[str],
        typer.Option("--embedding", help="A textual inversion, for its word in prompts; may be given several times."),
    ] = field(default_factory=list)
    clip_skip: Annotated[
        int, typer.Option(min=0, max=100, help="Leave out that many of the text encoder's last layers.")
    ] = 0
    image_hash: str | None = None
    mask_hash: str | None = None
    strength_map_hash: str | None = None
    sampler: str | None = None
    schedule_type: str | None = None
    size: tuple[int, int] | None = None
    framed: bool = False
    version: str | None = None
    unused: list[str] = field(default_factory=list, compare=False)

    def __post_init__(self) -> None:
        self.dtype = None if self.dtype == "auto" else self.dtype

    def suit(self) -> None:
        """Fill in what was left open and depends on the model: what suits it."""
        suits = USUAL if self.model != "default" else SUITED_ON_JAX if self.backend == "jax" else SUITED
        if self.strength is None:
            self.strength = 1.0 if self.strength_map else suits.strength
        if self.steps is None:
            self.steps, self.exact_steps = suits.steps, self.exact_steps or suits.exact_steps
        self.guidance = suits.guidance if self.guidance is None else self.guidance
        self.seed = int.from_bytes(os.urandom(4), "big") if self.seed is None else self.seed

    def relative_to(self, folder: Path) -> PictureSettings:
        """As a file in `folder` keeps them: paths relative to it."""

        def there(name: str) -> str:
            return relative(name, folder) if name != "-" and Path(name).exists() else name

        files: dict[str, Any] = {name: there(path) for name in FILES if (path := getattr(self, name))}
        files["model"] = self.model if self.model == "default" else there(self.model)
        files["embeddings"] = [there(name) for name in self.embeddings]
        files["lora"] = [LoraWeight(there(name), weight) for name, weight in self.lora]
        return replace(self, **files)

    def hash_files(self) -> None:
        """Say which files image, mask and strength map are.

        Raises:
            FileNotFoundError: One of them is not there.
        """
        for name in FILES:
            path = getattr(self, name)
            setattr(self, f"{name}_hash", None if path is None else hash_file(path))


def relative(path: str, folder: Path) -> str:
    """A path as seen from a folder; as it is in full if it is on another drive."""
    try:
        return os.path.relpath(path, folder)
    except ValueError:
        return os.path.abspath(path)  # noqa: PTH100 (a path as the user named it, links and all)


def beside(picture: Path, name: str) -> Path:
    """A path as a picture's settings hold it: relative to the picture's folder."""
    return Path(os.path.normpath(picture.absolute().parent / name))


def hash_file(path: str | os.PathLike[str]) -> str:
    """First 16 hex digits of the file's SHA-256; `-` is what came through the standard input."""
    if str(path) == "-":
        from sdedit.inputs.opening import standard_input

        return hashlib.sha256(standard_input()).hexdigest()[:16]
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
