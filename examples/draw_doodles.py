"""Draw the example doodles as a hand would: on white and on other grounds, filled and in lines, large and small.

    python examples/draw_doodles.py

writes apple.png, face.png, cat.png, … beside this file. None of them was ever in the training data.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hand import INK, Hand, Point, arc, paper, plain, table
from PIL import Image

HERE = Path(__file__).parent


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


def umbrella(hand: Hand) -> None:
    """Draw an umbrella in thick lines, nothing filled."""
    hand.line([*arc(50, 52, 40, 38, 180, 360), (74, 46), (62, 53), (50, 46), (37, 53), (25, 46), (10, 52)], width=3.2)
    hand.line([(50, 14), (50, 46)], width=2.4)
    hand.line([(50, 50), (50, 82), *arc(43, 82, 7, 8, 0, 170)], width=3)


def mushroom(hand: Hand) -> None:
    """Draw a toadstool."""
    hand.shape([(40, 52), (60, 52), (64, 86), (36, 87)], (245, 235, 215))
    hand.shape([*arc(50, 54, 40, 38, 180, 360), (70, 58), (30, 58)], (214, 40, 44))
    for x, y, r in ((36, 40, 6), (56, 30, 7), (70, 46, 5)):
        hand.blob(x, y, r, r, (255, 250, 245), ink=False)


def balloon(hand: Hand) -> None:
    """Draw a balloon."""
    hand.line([(50, 70), (47, 80), (53, 88), (49, 97)], (90, 90, 95), 1.2)
    hand.shape([*arc(50, 38, 27, 32, 110, 430), (54, 74), (46, 74)], (225, 40, 50), ink=False)
    hand.line(arc(44, 32, 12, 14, 190, 250), (255, 190, 190), 2)


def coffee(hand: Hand) -> None:
    """Draw a cup of coffee."""
    hand.line(arc(72, 58, 15, 13, -80, 90), (120, 120, 125), 3)
    hand.shape([(20, 42), (72, 42), (68, 80), (26, 80)], (235, 235, 238))
    hand.blob(46, 42, 26, 6, (110, 70, 45))
    for x in (36, 48, 60):
        hand.line([(x, 32), (x - 3, 25), (x + 3, 18), (x, 10)], (150, 150, 155), 1.6)


def rocket(hand: Hand) -> None:
    """Draw a rocket."""
    hand.shape([(38, 62), (24, 84), (40, 78)], (210, 45, 45))
    hand.shape([(62, 62), (76, 84), (60, 78)], (210, 45, 45))
    hand.shape([(44, 80), (56, 80), (50, 97)], (250, 160, 40), ink=False)
    hand.shape([(50, 6), (62, 24), (65, 50), (60, 80), (40, 80), (35, 50), (38, 24)], (225, 228, 235))
    hand.shape([(50, 6), (60, 22), (40, 22)], (210, 45, 45))
    hand.blob(50, 42, 8, 8, (90, 170, 230))


def strawberry(hand: Hand) -> None:
    """Draw a strawberry."""
    hand.shape(
        [(50, 92), (24, 62), (18, 40), (32, 26), (50, 30), (68, 26), (82, 40), (76, 62)], (222, 36, 54), ink=False
    )
    hand.shape([(50, 32), (28, 30), (38, 18), (50, 8), (62, 18), (72, 30)], (72, 150, 58), ink=False)
    for x, y in ((36, 44), (52, 46), (66, 44), (44, 60), (60, 60), (52, 75)):
        hand.blob(x, y, 1.6, 2.4, (250, 220, 120), ink=False)


def snowman(hand: Hand) -> None:
    """Draw a snowman."""
    snow = (246, 248, 252)
    hand.blob(50, 70, 26, 24, snow, ink=False)
    hand.blob(50, 34, 19, 18, snow, ink=False)
    hand.shape([(36, 20), (64, 20), (60, 3), (40, 3)], (50, 50, 58), ink=False)
    for x, y in ((43, 31), (57, 31), (50, 62), (50, 76)):
        hand.blob(x, y, 2.4, 2.4, INK, ink=False)
    hand.shape([(50, 36), (50, 41), (66, 41)], (245, 130, 40), ink=False)


def icecream(hand: Hand) -> None:
    """Draw an ice cream."""
    hand.shape([(32, 50), (68, 50), (50, 96)], (226, 166, 92))
    hand.line([(40, 52), (56, 80)], (170, 110, 50), 1.2)
    hand.line([(60, 52), (44, 80)], (170, 110, 50), 1.2)
    hand.blob(50, 34, 24, 22, (250, 190, 205))


@dataclass(frozen=True)
class Sheet:
    """What a doodle is drawn on, how large, where (in pixels from the middle), and how hard the pen is pressed."""

    ground: Image.Image
    scale: float = 0.95
    offset: Point = (0, 0)
    pressure: float = 1.0


DOODLES: dict[Callable[[Hand], None], Sheet] = {
    apple: Sheet(plain(256, 256), 0.9, (0, 4)),
    face: Sheet(plain(256, 256), 1.0, (6, -3)),
    cat: Sheet(plain(256, 256), 0.95, (-4, 2)),
    house: Sheet(plain(256, 256)),
    car: Sheet(plain(320, 256), 1.05, (10, 0)),
    tree: Sheet(plain(256, 256)),
    flower: Sheet(plain(256, 256), 0.95, (-8, 0)),
    sun: Sheet(plain(200, 200), 0.95, (4, -4)),
    fish: Sheet(plain(256, 256), 0.95, (0, 5)),
    boat: Sheet(plain(256, 256), 0.95, (5, 0)),
    star: Sheet(plain(256, 256), 0.85, (-10, 6)),
    heart: Sheet(plain(256, 256), 0.9),
    umbrella: Sheet(plain(256, 256)),
    mushroom: Sheet(plain(640, 400), 0.45, (170, 70)),  # small, far from the middle
    balloon: Sheet(plain(300, 300, "#bfe3f2")),
    coffee: Sheet(plain(256, 256), pressure=0.35),
    rocket: Sheet(paper(400, 400, 1), 0.85, (-20, 10)),
    strawberry: Sheet(plain(48, 48)),
    snowman: Sheet(plain(256, 320, "#27365e"), 0.95, (0, 20)),
    icecream: Sheet(table(320, 320, 2), 0.9),
}


def main() -> None:
    """Draw them all."""
    for draw, sheet in DOODLES.items():
        hand = Hand(zlib.crc32(draw.__name__.encode()), sheet.ground, sheet.scale, sheet.offset)
        draw(hand)
        hand.drawing(sheet.pressure).save(HERE / f"{draw.__name__}.png")


if __name__ == "__main__":
    main()
