"""A hand that draws: thick wobbling strokes and flat fills, on a sheet of any size and kind."""

import math
import random
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Point = tuple[float, float]
Colour = tuple[int, int, int]
INK = (35, 32, 38)


class Hand:
    """A pen on a sheet of 100 by 100 units, put on paper larger, shifted and never quite straight."""

    def __init__(self, seed: int, ground: Image.Image, scale: float = 1.0, offset: Point = (0, 0)) -> None:
        self.random = random.Random(seed)
        self.unit = min(ground.size) / 100 * scale
        self.origin = tuple(side / 2 - 50 * self.unit + shift for side, shift in zip(ground.size, offset, strict=True))
        self.ground = ground
        # Drawn at twice the size, then smoothed.
        self.image = ground.resize((ground.width * 2, ground.height * 2), Image.Resampling.BICUBIC)
        self.pen = ImageDraw.Draw(self.image)

    def wobbled(self, points: list[Point], amount: float) -> list[Point]:
        """The path in small steps, pushed about by two slow sines and a little shake; in pixels of the large sheet."""
        dense = [
            (x0 + (x1 - x0) * i / 12, y0 + (y1 - y0) * i / 12)
            for (x0, y0), (x1, y1) in pairwise(points)
            for i in range(12)
        ] + points[-1:]
        phases = [self.random.uniform(0, math.tau) for _ in range(4)]
        path = []
        for i, (x, y) in enumerate(dense):
            turn = math.tau * i / len(dense)
            x += amount * (math.sin(2 * turn + phases[0]) + 0.5 * math.sin(5 * turn + phases[1]))
            y += amount * (math.sin(2 * turn + phases[2]) + 0.5 * math.sin(5 * turn + phases[3]))
            x, y = x + self.random.gauss(0, amount / 8), y + self.random.gauss(0, amount / 8)
            path.append((2 * (self.origin[0] + x * self.unit), 2 * (self.origin[1] + y * self.unit)))
        return path

    def line(self, points: list[Point], colour: Colour = INK, width: float = 3.5, wobble: float = 0.7) -> None:
        """One stroke with a round pen."""
        path, radius = self.wobbled(points, wobble), width * self.unit
        self.pen.line(path, fill=colour, width=round(2 * radius), joint="curve")
        for x, y in path:
            self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def shape(self, points: list[Point], fill: Colour | None, ink: bool = True, width: float = 2.2) -> None:
        """A filled shape, outlined by a second pass of the hand; or, without a fill, its outline."""
        closed = [*points, points[0]]
        if fill is not None:
            self.pen.polygon(self.wobbled(closed, 0.8), fill=fill)
        if ink:
            self.line(closed, INK, width)

    def blob(
        self, x: float, y: float, rx: float, ry: float, fill: Colour | None, ink: bool = True, width: float = 2.2
    ) -> None:
        """A filled ellipse, or its outline."""
        self.shape(arc(x, y, rx, ry, 0, 360), fill, ink, width)

    def drawing(self, pressure: float = 1.0) -> Image.Image:
        """The sheet, smoothed; with less pressure than 1, faint."""
        drawn = self.image.resize(self.ground.size, Image.Resampling.LANCZOS)
        return Image.blend(self.ground, drawn, pressure)


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[Point]:
    """Points of an ellipse from one angle to another, in degrees, clockwise from the right."""
    angles = [math.radians(start + (end - start) * i / 16) for i in range(17)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def plain(width: int, height: int, colour: str = "white") -> Image.Image:
    """A sheet of one colour."""
    return Image.new("RGB", (width, height), colour)


def paper(width: int, height: int, seed: int) -> Image.Image:
    """White paper photographed under a lamp: dimmer and bluer towards one corner, a soft shadow, a little grain."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    light = 244 - 60 * (0.7 * x + 0.5 * y) - 25 * np.exp(-(((x - 0.15) / 0.2) ** 2))
    colour = light[..., None] * (1.0, 0.985, 0.95) + rng.normal(0, 3, (height, width, 1))
    return Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))


def table(width: int, height: int, seed: int) -> Image.Image:
    """A wooden table from above: waves of brown along it."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    bent = y + 0.03 * np.sin(5 * x + 1) + 0.015 * np.sin(13 * x + 4)
    rings = 0.5 + 0.25 * np.sin(60 * bent) + 0.15 * np.sin(171 * bent + 2) + 0.1 * rng.normal(size=(height, 1))
    boards = 0.85 + 0.15 * (np.floor(bent * 4) % 2)
    colour = (rings * 45 + 110)[..., None] * boards[..., None] * (1.15, 0.85, 0.58)
    image = Image.fromarray(np.clip(colour, 0, 255).astype(np.uint8))
    return image.filter(ImageFilter.GaussianBlur(1))
