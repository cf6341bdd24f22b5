"""Draw the example doodles as a hand would: thick wobbling strokes, flat fills, on white.

    python examples/draw_doodles.py

writes apple.png, face.png, cat.png, … beside this file. They were never in the training data.
"""

import math
import random
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]
HERE = Path(__file__).parent
INK = (35, 32, 38)


class Hand:
    """A pen on a sheet of 100 by 100 units, put on paper larger, shifted and never quite straight."""

    def __init__(self, seed: int, size: tuple[int, int], scale: float = 1.0, offset: Point = (0, 0)) -> None:
        self.random = random.Random(seed)
        self.unit = min(size) / 100 * scale
        self.origin = (size[0] / 2 - 50 * self.unit + offset[0], size[1] / 2 - 50 * self.unit + offset[1])
        self.image = Image.new("RGB", (size[0] * 2, size[1] * 2), "white")  # drawn at twice the size, then smoothed
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

    def shape(self, points: list[Point], fill: Colour, ink: bool = True, width: float = 2.2) -> None:
        """A filled shape, outlined by a second, slightly different pass of the hand."""
        closed = [*points, points[0]]
        self.pen.polygon(self.wobbled(closed, 0.8), fill=fill)
        if ink:
            self.line(closed, INK, width)

    def blob(self, x: float, y: float, rx: float, ry: float, fill: Colour, ink: bool = True) -> None:
        """A filled ellipse."""
        self.shape(arc(x, y, rx, ry, 0, 360), fill, ink)

    def save(self, name: str) -> None:
        """Write the sheet, smoothed, beside this file."""
        size = (self.image.width // 2, self.image.height // 2)
        self.image.resize(size, Image.Resampling.LANCZOS).save(HERE / f"{name}.png")


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[Point]:
    """Points of an ellipse from one angle to another, in degrees, clockwise from the right."""
    angles = [math.radians(start + (end - start) * i / 16) for i in range(17)]
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def apple(hand: Hand) -> None:
    """Draw an apple."""
    hand.shape(
        [
            (50, 32),
            (36, 27),
            (21, 36),
            (18, 54),
            (27, 76),
            (41, 86),
            (50, 83),
            (60, 86),
            (74, 75),
            (82, 54),
            (78, 36),
            (63, 27),
        ],
        (222, 38, 44),
        ink=False,
    )
    hand.line([(50, 34), (52, 24), (57, 15)], (110, 66, 36), 3)
    hand.shape([(57, 21), (68, 11), (80, 13), (70, 22)], (86, 170, 60), ink=False)


def face(hand: Hand) -> None:
    """Draw a face."""
    hand.blob(50, 50, 36, 35, (255, 209, 60))
    hand.line([(37, 39), (37, 44)], width=4)
    hand.line([(62, 39), (62, 44)], width=4)
    hand.line(arc(50, 53, 20, 17, 20, 160), width=3)


def cat(hand: Hand) -> None:
    """Draw a cat."""
    fur = (245, 165, 60)
    hand.shape([(18, 46), (20, 14), (40, 27)], fur)
    hand.shape([(82, 46), (80, 14), (60, 27)], fur)
    hand.blob(50, 56, 36, 30, fur)
    hand.blob(36, 50, 3.5, 5, INK)
    hand.blob(64, 50, 3.5, 5, INK)
    hand.shape([(46, 60), (54, 60), (50, 65)], (235, 120, 140))
    hand.line([(40, 70), (46, 73), (50, 66), (54, 73), (60, 70)], width=1.8)
    for side in (-1, 1):
        hand.line([(50 + side * 18, 63), (50 + side * 42, 58)], width=1.2)
        hand.line([(50 + side * 18, 67), (50 + side * 42, 70)], width=1.2)


def house(hand: Hand) -> None:
    """Draw a house."""
    hand.shape([(22, 46), (78, 46), (78, 86), (22, 86)], (240, 214, 160))
    hand.shape([(12, 48), (50, 15), (88, 48)], (196, 62, 48))
    hand.shape([(43, 62), (57, 62), (57, 86), (43, 86)], (120, 74, 44))
    hand.shape([(27, 54), (38, 54), (38, 65), (27, 65)], (130, 190, 235))
    hand.shape([(62, 54), (73, 54), (73, 65), (62, 65)], (130, 190, 235))


def car(hand: Hand) -> None:
    """Draw a car."""
    hand.shape([(8, 68), (9, 52), (26, 48), (36, 33), (66, 33), (76, 48), (92, 53), (92, 68)], (214, 44, 46))
    hand.shape([(32, 47), (39, 37), (49, 37), (49, 47)], (170, 215, 240))
    hand.shape([(54, 47), (54, 37), (64, 37), (70, 47)], (170, 215, 240))
    for x in (27, 73):
        hand.blob(x, 69, 10, 10, (60, 60, 64))
        hand.blob(x, 69, 3.5, 3.5, (200, 200, 205), ink=False)


def tree(hand: Hand) -> None:
    """Draw a tree."""
    hand.shape([(44, 58), (57, 58), (60, 90), (41, 90)], (122, 78, 45), ink=False)
    hand.shape(
        [(50, 8), (67, 13), (80, 27), (83, 45), (72, 60), (52, 65), (32, 61), (18, 47), (20, 28), (32, 14)],
        (70, 150, 62),
        ink=False,
    )


def flower(hand: Hand) -> None:
    """Draw a flower."""
    hand.line([(50, 52), (51, 72), (49, 92)], (66, 146, 60), 2.6)
    hand.shape([(50, 78), (64, 66), (74, 68), (64, 79)], (86, 170, 70), ink=False)
    for i in range(6):
        angle = math.tau * i / 6
        hand.blob(50 + 17 * math.cos(angle), 36 + 17 * math.sin(angle), 11, 11, (240, 110, 165), ink=False)
    hand.blob(50, 36, 10, 10, (252, 205, 60), ink=False)


def sun(hand: Hand) -> None:
    """Draw the sun."""
    for i in range(10):
        angle = math.tau * i / 10
        near, far = (30, 43)
        ray = [(50 + r * math.cos(angle), 50 + r * math.sin(angle)) for r in (near, far)]
        hand.line(ray, (250, 176, 40), 3)
    hand.blob(50, 50, 23, 23, (255, 205, 50), ink=False)


def fish(hand: Hand) -> None:
    """Draw a fish."""
    hand.shape([(70, 50), (92, 32), (89, 50), (92, 69)], (60, 130, 210))
    hand.shape(arc(43, 50, 33, 22, 0, 360), (80, 160, 230))
    hand.blob(25, 45, 3, 3, INK)
    hand.line(arc(30, 50, 12, 16, -50, 50), width=1.8)


def boat(hand: Hand) -> None:
    """Draw a boat."""
    hand.line([(50, 66), (50, 12)], (110, 70, 42), 2.4)
    hand.shape([(53, 14), (82, 60), (53, 61)], (250, 245, 235))
    hand.shape([(46, 22), (46, 61), (24, 60)], (245, 130, 60))
    hand.shape([(12, 67), (88, 66), (76, 85), (25, 86)], (196, 60, 46))


def star(hand: Hand) -> None:
    """Draw a star."""
    points = [
        (50 + r * math.sin(math.pi * i / 5), 52 - r * math.cos(math.pi * i / 5))
        for i in range(10)
        for r in [40 if i % 2 == 0 else 17]
    ]
    hand.shape(points, (255, 208, 56), ink=False)


def heart(hand: Hand) -> None:
    """Draw a heart."""
    hand.shape(
        [
            (50, 30),
            (60, 18),
            (76, 17),
            (87, 30),
            (84, 49),
            (68, 70),
            (50, 87),
            (31, 70),
            (16, 50),
            (13, 31),
            (24, 17),
            (40, 18),
        ],
        (226, 44, 72),
    )


DOODLES: dict[Callable[[Hand], None], tuple[tuple[int, int], float, Point]] = {  # size, scale, offset in pixels
    apple: ((256, 256), 0.9, (0, 4)),
    face: ((256, 256), 1.0, (6, -3)),
    cat: ((256, 256), 0.95, (-4, 2)),
    house: ((256, 256), 0.95, (0, 0)),
    car: ((320, 256), 1.05, (10, 0)),
    tree: ((256, 256), 0.95, (0, 0)),
    flower: ((256, 256), 0.95, (-8, 0)),
    sun: ((200, 200), 0.95, (4, -4)),
    fish: ((256, 256), 0.95, (0, 5)),
    boat: ((256, 256), 0.95, (5, 0)),
    star: ((256, 256), 0.85, (-10, 6)),
    heart: ((256, 256), 0.9, (0, 0)),
}


def main() -> None:
    """Draw them all."""
    for draw, (size, scale, offset) in DOODLES.items():
        hand = Hand(zlib.crc32(draw.__name__.encode()), size, scale, offset)
        draw(hand)
        hand.save(draw.__name__)


if __name__ == "__main__":
    main()
