"""Features by which a drawn picture is compared with all real ones: which is it nearest to?"""

import pickle
import zlib
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from data import Item, load, on_ground
from paths import work_folder
from sdedit.files import write_atomically

Array = NDArray[np.float32]
SIDE = 128  # pictures are compared at this width
CELLS = 8  # gradients are counted in 8x8 cells
ANGLES = 8  # and in as many directions
MOVES = 2  # how often each picture is moved for the fit
AXES = 128  # of a metric, at most
SHRINK = 0.2  # how much of a covariance is replaced by its mean variance


def blocks(pixels: Array, count: int) -> Array:
    """Means over count x count blocks of (N, H, H, C): (N, count, count, C)."""
    n, side, _, channels = pixels.shape
    step = side // count
    return pixels.reshape(n, count, step, count, step, channels).mean((2, 4))


def gradients(pixels: Array) -> tuple[Array, NDArray[np.int64]]:
    """Strength and direction (in 0 … ANGLES - 1) of the change of brightness at each pixel, (N, 128, 128) each."""
    grey = pixels.mean(-1)
    down, right = np.gradient(grey, axis=(1, 2))
    direction = (np.arctan2(down, right) % np.pi / np.pi * ANGLES).astype(int) % ANGLES
    return np.hypot(down, right), direction


def layout(pixels: Array) -> Array:
    """(N, 128, 128, 3) in [0, 1] → (N, 1280): colours of 16x16 blocks, and directions of edges in 8x8 cells."""
    colours = blocks(pixels, 16).reshape(len(pixels), -1)
    strength, direction = gradients(pixels)
    side = np.arange(SIDE) * CELLS // SIDE
    cell = side[:, None] * CELLS + side
    votes = counts(cell * ANGLES + direction, CELLS * CELLS * ANGLES, strength).reshape(len(pixels), -1, ANGLES)
    votes = np.sqrt(votes / (votes.sum(-1, keepdims=True) + 5))
    return np.concatenate([colours, votes.reshape(len(pixels), -1)], 1).astype(np.float32)


def texture(pixels: Array) -> Array:
    """(N, 128, 128, 3) in [0, 1] → (N, 114): how colours, edges and fine structure are distributed, not where."""
    strength, _ = gradients(pixels)
    light, dark = pixels.max(-1), pixels.min(-1)
    drawn = dark < 0.97  # not the white sheet
    fine = np.abs(pixels - blur(pixels)).mean(-1)
    levels = [np.sqrt(strength / 0.3), np.sqrt(fine / 0.15), light - dark, light, dark]
    columns = [shares((np.minimum(level, 0.999) * 16).astype(int), 16, drawn) for level in levels]
    flat = np.stack([(strength[:, ::2, ::2] < limit).mean((1, 2)) for limit in (0.002, 0.005, 0.01, 0.02)], 1)
    extent = np.stack([drawn.mean((1, 2)), drawn.any(1).mean(1), drawn.any(2).mean(1)], 1)
    boxes = (pixels * 2.999).astype(int) @ np.array([9, 3, 1])
    return np.concatenate([*columns, flat, extent, shares(boxes, 27, np.ones_like(drawn))], 1).astype(np.float32)


def counts(bins: NDArray[np.int64], total: int, weights: Array | NDArray[np.bool_]) -> Array:
    """(N, total): sum of the weights (N, 128, 128) of the pixels in each bin."""
    offset = np.arange(len(bins))[:, None, None] * total
    found = np.bincount((bins + offset).ravel(), weights.ravel(), len(bins) * total)
    return found.reshape(len(bins), total)


def shares(bins: NDArray[np.int64], total: int, mask: NDArray[np.bool_]) -> Array:
    """(N, total): share of the masked pixels in each bin, as a square root."""
    return np.sqrt(counts(bins, total, mask) / np.maximum(mask.sum((1, 2)), 1)[:, None])


def blur(pixels: Array) -> Array:
    """A 3x3 mean."""
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    return sum(padded[:, i : i + SIDE, j : j + SIDE] for i in range(3) for j in range(3)) / np.float32(9)


class Metric:
    """Features turned so that what differs within a class counts little (Fisher's discriminants, shrunk).

    Args:
        rows: (N, F) features of pictures.
        labels: (N,) the class of each, 0, 1, …
    """

    def __init__(self, rows: Array, labels: NDArray[np.int64]) -> None:
        self.mean, scale = rows.mean(0), rows.std(0) + 1e-3
        rows = (rows - self.mean) / scale
        counts = np.bincount(labels)
        sums = np.zeros((len(counts), rows.shape[1]), np.float32)
        np.add.at(sums, labels, rows)
        means = sums / counts[:, None]
        within = np.cov((rows - means[labels]).T)
        within = (1 - SHRINK) * within + SHRINK * np.eye(len(within)) * np.trace(within) / len(within)
        values, vectors = np.linalg.eigh(within)
        whiten = vectors / np.sqrt(values)
        power, axes = np.linalg.eigh(np.cov((means @ whiten).T))
        kept = axes[:, np.argsort(-power)[: min(AXES, len(means) - 1)]]
        self.turn = ((whiten @ kept) / scale[:, None]).astype(np.float32)

    def __call__(self, rows: Array) -> Array:
        """(N, F) → (N, D), where plain distances mean something."""
        return (rows - self.mean) @ self.turn


class Judge:
    """Finds the real picture that a drawn one is nearest to.

    A class of its metric is one picture, moved and blurred in several ways: so a place on the sheet counts little, and
    thing and style both count. The metric is learned from two thirds of the names; the rest show what it is worth.

    Args:
        pictures: (N, H, H, 4), uint8, all of them; `items` says what they show.

    Attributes:
        real: Of 400 pictures of the other names, moved, at most: the shares that are found again.
    """

    def __init__(self, pictures: np.ndarray, items: list[Item]) -> None:
        self.items = items
        fit, rest = fit_rows(items)
        moves = (moved(pictures[row], np.random.default_rng([row, n])) for row in fit for n in range(MOVES))
        self.metric = Metric(features(moves), np.repeat(np.arange(len(fit)), MOVES))
        self.gallery = self.metric(features(map(on_ground, pictures)))
        rng = np.random.default_rng(5)
        rows = rng.choice(rest, min(400, len(rest)), replace=False)
        found = self.nearest(moved(pictures[row], rng) for row in rows)
        self.real = share_right(found, [(items[row].name, items[row].style) for row in rows])

    def nearest(self, drawn: Iterable[Array]) -> list[Item]:
        """Pictures (H, H, 3) in [0, 1] → what the nearest real picture of each shows."""
        places = self.metric(features(drawn))
        far = (self.gallery**2).sum(1) - 2 * places @ self.gallery.T  # squared distances, but for a constant
        return [self.items[row] for row in far.argmin(1)]


def fit_rows(items: list[Item]) -> tuple[list[int], list[int]]:
    """Rows of two thirds of the names, by a hash, and of the others."""
    fit = [row for row, item in enumerate(items) if zlib.crc32(item.name.encode()) % 3]
    return fit, sorted(set(range(len(items))) - set(fit))


def judge() -> Judge:
    """The judge of all pictures, kept in the work folder since it takes minutes to make."""
    file = work_folder() / "judge.pickle"
    if not file.exists():
        made = Judge(*load())
        with write_atomically(file) as part:
            part.write_bytes(pickle.dumps(made))
    return pickle.loads(file.read_bytes())


def features(pictures: Iterable[Array]) -> Array:
    """Pictures (H, H, 3) in [0, 1], H a multiple of 128 → (N, F); few pictures are held at once."""
    pictures, parts = iter(pictures), []
    while batch := list(islice(pictures, 64)):
        pixels = blocks(np.stack(batch), SIDE)
        parts.append(np.concatenate([layout(pixels), texture(pixels)], 1))
    return np.concatenate(parts)


def moved(picture: np.ndarray, rng: np.random.Generator) -> Array:
    """An RGBA picture on white, a little moved, scaled, turned and blurred: (128, 128, 3) in [0, 1]."""
    turn, scale = np.radians(rng.uniform(-4, 4)), rng.uniform(0.95, 1.1)
    a, b = np.cos(turn) * scale, np.sin(turn) * scale
    middle = SIDE / 2
    x, y = middle + rng.uniform(-4, 4, 2)
    grid = (a, b, middle - a * x - b * y, -b, a, middle + b * x - a * y)
    small = blocks(on_ground(picture)[None], SIDE)[0]
    image = Image.fromarray((small * 255).astype(np.uint8))
    image = image.transform(image.size, Image.Transform.AFFINE, grid, Image.Resampling.BILINEAR, fillcolor="white")
    return np.asarray(image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8))), np.float32) / 255


def share_right(found: Sequence[Item], asked: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Share of the found that have the name asked for, and share that have the style."""
    pairs = list(zip(found, asked, strict=True))
    return {
        "thing": float(np.mean([item.name == name for item, (name, _) in pairs])),
        "style": float(np.mean([item.style == style for item, (_, style) in pairs])),
        "draws": len(pairs),
    }
