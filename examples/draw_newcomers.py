"""Draw twelve more doodles, as people do who have not read what the default model likes: crayon, pencil, neon, pixels.

    python examples/draw_newcomers.py

writes castle.png, pencil_cat.png, … beside this file. None of them was ever in the training data.
"""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hand import Colour, Hand, arc, paper, plain
from PIL import Image, ImageChops, ImageDraw, ImageFilter

HERE = Path(__file__).parent
PENCIL = (96, 96, 100)
HEART = (
    "................",
    "...###....###...",
    "..#rrr#..#rrr#..",
    ".#rwwrr##rrrrr#.",
    ".#rwrrrrrrrrrr#.",
    ".#rrrrrrrrrrrr#.",
    ".#rrrrrrrrrrrr#.",
    "..#rrrrrrrrrr#..",
    "...#rrrrrrrr#...",
    "....#rrrrrr#....",
    ".....#rrrr#.....",
    "......#rr#......",
    ".......##.......",
    "................",
    "................",
    "................",
)


def grainy(image: Image.Image, share: float, seed: int) -> Image.Image:
    """Crayon or pencil: the paper's grain stays white for this share of what is drawn."""
    rng = np.random.default_rng(seed)
    grain = Image.fromarray(rng.integers(0, 256, image.size[::-1], dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    bare = np.asarray(grain) > np.quantile(np.asarray(grain), 1 - share)
    return Image.composite(Image.new("RGB", image.size, "white"), image, Image.fromarray(bare))


def castle(hand: Hand) -> Image.Image:
    """A castle in crayon."""
    stone, roof = (150, 130, 175), (210, 60, 90)
    hand.shape([(24, 50), (76, 50), (76, 88), (24, 88)], stone, ink=False)
    for x in (14, 70):
        hand.shape([(x, 40), (x + 16, 40), (x + 16, 88), (x, 88)], stone, ink=False)
        hand.shape([(x - 3, 40), (x + 8, 14), (x + 19, 40)], roof, ink=False)
    hand.shape([(42, 88), (42, 68), (50, 60), (58, 68), (58, 88)], (90, 55, 40), ink=False)
    for x in (19, 75):
        hand.blob(x + 3, 54, 3, 5, (250, 220, 90), ink=False)
    hand.line([(30, 50), (30, 44), (38, 44), (38, 50), (46, 50), (46, 44), (54, 44), (54, 50)], stone, 2)
    return grainy(hand.drawing(), 0.25, 1)


def pencil_cat(hand: Hand) -> Image.Image:
    """A cat's face in pencil, without colour."""
    hand.line([(20, 62), (16, 20), (36, 34), (64, 34), (84, 20), (80, 62), (62, 84), (38, 84), (20, 62)], PENCIL, 0.9)
    for x in (36, 64):
        hand.blob(x, 53, 5, 4, None, ink=False)
        hand.line(arc(x, 53, 5, 4, 0, 360), PENCIL, 0.8)
        hand.line([(x, 51), (x, 55)], PENCIL, 1.4)
    hand.line([(47, 64), (53, 64), (50, 68), (47, 64)], PENCIL, 0.9)
    hand.line([(42, 74), (50, 69), (58, 74)], PENCIL, 0.8)
    for side in (-1, 1):
        for y in (62, 68):
            hand.line([(50 + side * 16, y + 2), (50 + side * 44, y)], PENCIL, 0.6)
    return grainy(hand.drawing(), 0.3, 2)


def neon_rocket(hand: Hand) -> Image.Image:
    """A rocket in shining lines on black."""
    hand.line([(50, 8), (62, 28), (62, 70), (38, 70), (38, 28), (50, 8)], (60, 240, 255), 1.4)
    hand.line(arc(50, 38, 7, 7, 0, 360), (255, 80, 220), 1.4)
    for side in (-1, 1):
        hand.line([(50 + side * 12, 52), (50 + side * 24, 78), (50 + side * 12, 70)], (255, 80, 220), 1.4)
    hand.line([(43, 74), (50, 94), (57, 74)], (255, 190, 60), 1.4)
    drawn = hand.drawing()
    return ImageChops.add(drawn, drawn.filter(ImageFilter.GaussianBlur(7)).point(lambda v: min(255, 2 * v)))


def banana(hand: Hand) -> Image.Image:
    """A banana."""
    outer, inner = arc(46, 22, 42, 58, 15, 135), arc(44, 16, 36, 40, 135, 12)
    hand.shape([*outer, *inner], (250, 215, 60))
    hand.line([(86, 36), (90, 26)], (110, 80, 40), 3)
    hand.line(arc(46, 20, 38, 48, 30, 115), (200, 160, 40), 1)
    return hand.drawing()


def pixel_heart(hand: Hand) -> Image.Image:
    """A heart of 16x16 pixels."""
    colours: dict[str, Colour] = {".": (255, 255, 255), "#": (60, 10, 25), "r": (225, 40, 65), "w": (255, 200, 205)}
    return Image.fromarray(np.array([[colours[mark] for mark in row] for row in HEART], np.uint8))


def dog(hand: Hand) -> Image.Image:
    """A dog's face."""
    hand.blob(50, 52, 30, 34, (205, 150, 95))
    hand.shape([(24, 26), (10, 40), (12, 66), (26, 60)], (120, 75, 45))
    hand.shape([(76, 26), (90, 40), (88, 66), (74, 60)], (120, 75, 45))
    hand.blob(50, 68, 17, 14, (245, 225, 200), ink=False)
    for x in (39, 61):
        hand.blob(x, 45, 3.5, 4.5, (30, 25, 25), ink=False)
    hand.blob(50, 61, 6, 4.5, (30, 25, 25), ink=False)
    hand.shape([(45, 74), (55, 74), (54, 86), (47, 86)], (235, 110, 125), width=1.4)
    return hand.drawing()


def windmill(hand: Hand) -> Image.Image:
    """A windmill."""
    hand.shape([(38, 42), (62, 42), (68, 92), (32, 92)], (232, 222, 205))
    hand.shape([(35, 42), (50, 26), (65, 42)], (176, 70, 55))
    hand.shape([(45, 76), (55, 76), (55, 92), (45, 92)], (120, 80, 55))
    for x, y in ((14, 16), (84, 12), (88, 66), (12, 64)):
        hand.line([(50, 40), (x, y)], (110, 75, 50), 1.6)
        ends = (x + 6 * np.sign(y - 40), y + 6 * np.sign(50 - x))
        hand.shape([(x, y), ends, (50 + (ends[0] - 50) * 0.3, 40 + (ends[1] - 40) * 0.3)], (250, 245, 235), width=1.2)
    return hand.drawing()


def tomato(hand: Hand) -> Image.Image:
    """A tomato, shaded like a ball."""
    hand.blob(50, 56, 38, 33, (255, 255, 255), ink=False)
    flat = hand.drawing()
    y, x = np.mgrid[: flat.height, : flat.width] / flat.height * 100
    inside = ((x - 50) / 38) ** 2 + ((y - 56) / 33) ** 2
    light = np.clip(1.15 - np.hypot(x - 38, y - 42) / 62, 0.25, 1)[..., None]
    shine = np.exp(-((x - 36) ** 2 + (y - 40) ** 2) / 40)[..., None]
    ball = Image.fromarray(np.clip(light * (235, 50, 40) + 150 * shine, 0, 255).astype(np.uint8))
    hand.image = Image.composite(ball, flat, Image.fromarray(inside < 1)).resize(hand.image.size)
    hand.pen = ImageDraw.Draw(hand.image)
    for points in ([(50, 26), (34, 22), (42, 32)], [(50, 26), (66, 21), (59, 32)], [(50, 26), (49, 12), (54, 12)]):
        hand.shape([*points], (70, 140, 55), ink=False)
    return hand.drawing()


def guitar(hand: Hand) -> Image.Image:
    """A guitar on nothing: the sheet is clear."""
    wood = (196, 120, 60)
    hand.shape([(46, 10), (54, 10), (54, 50), (46, 50)], (110, 70, 45))
    hand.shape([(43, 4), (57, 4), (55, 13), (45, 13)], (70, 45, 35))
    hand.blob(50, 52, 15, 13, wood)
    hand.blob(50, 74, 22, 19, wood)
    hand.blob(50, 58, 12, 14, wood, ink=False)
    hand.blob(50, 62, 6, 6, (60, 40, 30), ink=False)
    hand.shape([(42, 80), (58, 80), (58, 83), (42, 83)], (70, 45, 35))
    for x in (48, 50, 52):
        hand.line([(x, 12), (x, 80)], (240, 235, 220), 0.4, 0.2)
    drawn = hand.drawing().convert("RGBA")
    drawn.putalpha(drawn.convert("L").point(lambda v: 255 * (v < 250)).filter(ImageFilter.GaussianBlur(0.7)))
    return drawn


def landscape(hand: Hand) -> Image.Image:
    """A house on a hill under the sky, drawn from edge to edge."""
    hand.shape([(-10, -10), (110, -10), (110, 70), (-10, 70)], (150, 205, 245), ink=False)
    hand.blob(84, 16, 9, 9, (255, 220, 80), ink=False)
    hand.blob(24, 18, 13, 5, (250, 252, 255), ink=False)
    hand.shape([(-10, 66), (20, 56), (60, 62), (110, 54), (110, 110), (-10, 110)], (110, 180, 85), ink=False)
    hand.shape([(34, 44), (66, 44), (66, 76), (34, 76)], (240, 220, 180))
    hand.shape([(28, 46), (50, 24), (72, 46)], (190, 65, 50))
    hand.shape([(46, 60), (54, 60), (54, 76), (46, 76)], (110, 70, 45))
    hand.shape([(38, 51), (45, 51), (45, 58), (38, 58)], (130, 190, 235), width=1.2)
    hand.shape([(80, 66), (84, 66), (84, 82), (80, 82)], (120, 80, 50), ink=False)
    hand.blob(82, 56, 9, 13, (60, 140, 65), ink=False)
    return hand.drawing()


def lined_butterfly(hand: Hand) -> Image.Image:
    """A butterfly in blue ballpoint on a page with lines."""
    pen = (40, 60, 170)
    for y in range(4, 100, 9):
        hand.line([(-5, y), (105, y)], (175, 200, 230), 0.35, 0)
    hand.line([(14, -5), (14, 105)], (240, 150, 150), 0.35, 0)
    for side in (-1, 1):
        hand.line(arc(50 + side * 19, 38, 17, 17, 0, 360), pen, 1.1)
        hand.line(arc(50 + side * 14, 66, 12, 13, 0, 360), pen, 1.1)
        hand.line(arc(50 + side * 19, 38, 7, 7, 0, 360), pen, 0.9)
        hand.line([(50, 28), (50 + side * 8, 14)], pen, 0.9)
    hand.line([(50, 28), (50, 80)], pen, 2)
    return hand.drawing()


def paper_penguin(hand: Hand) -> Image.Image:
    """A penguin in felt pen, photographed on its paper under a lamp."""
    hand.blob(50, 52, 28, 40, (40, 42, 52), ink=False)
    hand.blob(50, 60, 18, 28, (245, 245, 245), ink=False)
    for x in (42, 58):
        hand.blob(x, 30, 4, 5, (250, 250, 250), ink=False)
        hand.blob(x, 31, 2, 2.5, (20, 20, 20), ink=False)
        hand.blob(x, 93, 8, 3.5, (245, 160, 40), ink=False)
    hand.shape([(44, 38), (56, 38), (50, 47)], (245, 160, 40), ink=False)
    return hand.drawing(0.85)


DOODLES: dict[Callable[[Hand], Image.Image], tuple[Image.Image, float]] = {
    castle: (plain(300, 300), 0.9),
    pencil_cat: (plain(360, 320, "#fbfbf8"), 0.8),
    neon_rocket: (plain(320, 320, "black"), 0.9),
    banana: (plain(256, 256), 0.9),
    pixel_heart: (plain(16, 16), 1.0),
    dog: (plain(256, 256), 1.0),
    windmill: (plain(256, 256), 0.95),
    tomato: (plain(256, 256), 1.0),
    guitar: (plain(280, 280), 0.95),
    landscape: (plain(256, 256), 1.0),
    lined_butterfly: (plain(320, 320), 0.95),
    paper_penguin: (paper(400, 400, 7), 0.75),
}


def main() -> None:
    """Draw them all."""
    for draw, (sheet, scale) in DOODLES.items():
        hand = Hand(zlib.crc32(draw.__name__.encode()), sheet, scale)
        draw(hand).save(HERE / f"{draw.__name__}.png")


if __name__ == "__main__":
    main()
