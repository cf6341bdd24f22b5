"""SDEdit's curve (arXiv 2108.01073, figure 3): as strength rises, pictures become more real and less faithful."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdedit.apps.evaluation.distance import counts, distance_interval, kernel_distance, mean_interval, pair_terms
from sdedit.apps.evaluation.features import wavelet_features
from sdedit.apps.folders import fitted, read_folder
from sdedit.apps.measures import l2_distance
from sdedit.apps.strokes import simulate_strokes
from sdedit.apps.sweep import STRENGTHS
from sdedit.files import read_json, write_atomically
from sdedit.inputs import checks
from sdedit.inputs.images import read_images, write_images
from sdedit.inputs.pixels import open_image
from sdedit.noise import seeded

RESAMPLES = 2000


@dataclass(frozen=True)
class Inputs:
    """What a curve is drawn of, lists of N.

    Attributes:
        names: Of the pictures, for the files that are made of them.
        prompts: What each picture shows.
        pictures: Real ones, squares of one size.
        guides: What somebody might have painted of each, of the same size.
    """

    names: list[str]
    prompts: list[str]
    pictures: list[Image.Image]
    guides: list[Image.Image]


@dataclass(frozen=True)
class Row:
    """One point of the curve, with 95% bootstrap intervals over the pictures.

    Attributes:
        what: "drawn", "guides" (the guides as they are) or "pictures through the VAE" (the best that the VAE allows).
        strength: What they were drawn with; 0 is the guide through the VAE and back.
        pictures: How many.
        l2: Mean L2 distance from the guide, see `l2_distance`: small is faithful.
        wavelet_kernel_distance: Kernel distance of `wavelet_features` from those of the real pictures: small is real.
    """

    what: str
    strength: float
    pictures: int
    l2: float
    l2_low: float
    l2_high: float
    wavelet_kernel_distance: float
    wavelet_kernel_distance_low: float
    wavelet_kernel_distance_high: float


def read_inputs(
    folder: str | Path, side: int, *, guides: str | Path | None = None, colors: int = 6, kernel: int | None = None
) -> Inputs:
    """Read real pictures and their captions, and their guides, or simulate strokes as guides.

    Args:
        folder: See `read_folder`: captions are a `metadata.jsonl`, text files, or the file names.
        side: Pictures are scaled and the middle square cut out, side×side.
        guides: A folder with a guide of the same file name for each picture.
        colors, kernel: See `simulate_strokes`; if no kernel is given, 23 at 256×256 and in proportion at other sizes.

    Raises:
        ValueError, FileNotFoundError: A picture, caption or guide is missing or cannot be read.
    """
    examples = read_folder(Path(folder))
    if len(examples) < 2:
        raise ValueError(f"{folder}: one picture; expected at least two, better a hundred")
    pictures = [_square(open_image(example.path), side) for example in examples]
    if guides is None:
        kernel = kernel or 2 * (23 * side // 512) + 1
        painted = [simulate_strokes(picture, colors, kernel) for picture in pictures]
    else:
        painted = [_square(open_image(Path(guides) / example.path.name), side) for example in examples]
    names = [f"{i:04d}-{example.path.stem}" for i, example in enumerate(examples)]
    return Inputs(names, [example.caption for example in examples], pictures, painted)


def _square(image: Image.Image, side: int) -> Image.Image:
    pixels = fitted(read_images(image, latent_channels=0).pixels, side)
    (square,) = write_images(pixels / 2 + 0.5, "pil", [None])
    return square


def evaluate(
    pipe: Any,
    inputs: Inputs,
    strengths: Sequence[float] = STRENGTHS,
    *,
    folder: str | Path,
    batch: int = 8,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    **settings: Any,
) -> list[Row]:
    """Draw every guide at every strength and measure; a call that was stopped goes on where it was.

    All steps run at every strength (`exact_steps`), and each guide has a noise of its own, the same at all strengths.

    Args:
        pipe: The pipeline.
        strengths: In (0, 1]; strength 0 is always among the rows.
        folder: Where drawn pictures are kept, one a PNG; those that are there are not drawn again.
        batch: Pictures that are drawn at once.
        seed: Guide i begins from the noise of `seed + i`.
        progress: Wraps the batches that are left to draw, as tqdm does.
        **settings: Further arguments of the pipeline, such as `num_inference_steps` and `guidance_scale`.

    Raises:
        ValueError: An argument is not as described, or the folder holds pictures of other settings.
    """
    levels = sorted({0.0, *(checks.number("strengths", s, 0, 1) for s in strengths)})
    batch = checks.whole_number("batch", batch, 1)
    folder = Path(folder)
    _claim(folder, {"seed": seed, **settings, **_identity(pipe, inputs)})
    # Each as (file, image to start from, number of the picture, strength).
    jobs = [
        (folder / _level_name(s) / f"{name}.png", guide, i, s)
        for s in levels
        for i, (name, guide) in enumerate(zip(inputs.names, inputs.guides, strict=True))
    ]
    vae = [
        (folder / "pictures through the VAE" / f"{name}.png", picture, i, 0.0)
        for i, (name, picture) in enumerate(zip(inputs.names, inputs.pictures, strict=True))
    ]
    missing = [job for job in [*vae, *jobs] if not job[0].is_file()]
    for some in progress([missing[k : k + batch] for k in range(0, len(missing), batch)]):
        _draw(pipe, inputs.prompts, some, seed, settings)
    return measure(
        inputs,
        {
            ("guides", 0.0): inputs.guides,
            ("pictures through the VAE", 0.0): [open_image(path) for path, *_ in vae],
            **{("drawn", s): [open_image(path) for path, _, _, at in jobs if at == s] for s in levels},
        },
    )


def _level_name(strength: float) -> str:
    """A folder's name, another one for every other strength."""
    short = f"{strength:.3f}"
    return f"strength {short if float(short) == strength else repr(strength)}"


def _draw(pipe: Any, prompts: Sequence[str], jobs: Sequence[Any], seed: int, settings: dict[str, Any]) -> None:
    """Draw a batch of jobs and write their files."""
    drawn = pipe(
        [prompts[i] for _, _, i, _ in jobs],
        [image for _, image, _, _ in jobs],
        strength=[s for *_, s in jobs],
        generator=[seeded(seed + i) for _, _, i, _ in jobs],
        exact_steps=True,
        **settings,
    )
    for picture, (path, *_) in zip(drawn.images, jobs, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            picture.save(temporary)


def measure(inputs: Inputs, sets: dict[tuple[str, float], Sequence[Image.Image]]) -> list[Row]:
    """Measure sets of pictures, each by what it is and its strength; picture i of each set was made from guide i."""
    real = _features(inputs.pictures)
    # One nat of any modulus weighs as much as one of any other; about 1 is the mean square of a real picture's.
    centre = real.mean(0)
    scale = max(float((real - centre).std()), 1e-6)
    weights = counts(len(real), RESAMPLES)
    weights = weights[(weights > 0).sum(1) > 1]
    rows = []
    for (what, strength), pictures in sets.items():
        pairs = zip(pictures, inputs.guides, strict=True)
        distances = np.array([l2_distance(picture, guide) for picture, guide in pairs])
        terms = pair_terms((real - centre) / scale, (_features(pictures) - centre) / scale)
        l2 = (float(distances.mean()), *mean_interval(distances, weights))
        rows.append(Row(what, strength, len(real), *l2, kernel_distance(terms), *distance_interval(terms, weights)))
    return rows


def _features(pictures: Sequence[Image.Image]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Wavelet features (N, d), a picture at a time."""
    pixels = ((read_images(one, latent_channels=0).pixels + 1) / 2 for one in pictures)
    return torch.cat([wavelet_features(one) for one in pixels]).double().numpy()


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write rows with a header of their names."""
    with write_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()})


def _identity(pipe: Any, inputs: Inputs) -> dict[str, str]:
    """What else the drawn pictures depend on: weights (a sample of each parameter), scheduler, guides, prompts."""
    weights = hashlib.sha256()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        for parameter in part.parameters() if part is not None else ():
            weights.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    images = hashlib.sha256("\0".join([*inputs.names, *inputs.prompts]).encode())
    for image in (*inputs.pictures, *inputs.guides):
        images.update(image.tobytes())
    scheduler = f"{type(pipe.scheduler).__name__} {json.dumps(dict(pipe.scheduler.config), default=str)}"
    return {"weights": weights.hexdigest(), "inputs": images.hexdigest(), "scheduler": scheduler}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    """Write down what a folder's pictures are drawn with; refuse one whose pictures were drawn with something else."""
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings, default=str))
    if path.is_file():
        kept = read_json(path)
        other = sorted(k for k in {*kept, *settings} if kept.get(k) != settings.get(k))
        if other:
            raise ValueError(
                f"{folder} holds pictures that were drawn otherwise ({', '.join(other)}): delete it, or choose another"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=2), encoding="utf-8")
