"""Draw twenty things as linocuts, one dark ink on white: a style that the default model does not know.

    python examples/draw_linocuts.py FOLDER

writes anchor.png, bell.png, … (128×128) into the folder: what `docs/finetuning.md` teaches the default model from.
"""

import math
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw

SIZE, SCALE = 128, 8  # drawn larger, then smoothed
INK = (24, 66, 96)
WIDTH = 3.6  # of lines, and of what is cut out of the ink

# Lines on a sheet of 100 by 100: a list of numbers goes from point to point, (x, y, rx, ry) is an ellipse, and
# (x, y, rx, ry, from, to) a part of one, in degrees clockwise from the right; both may be in a list, too.
Stroke = list[Any] | tuple[float, ...]
# fmt: off
THINGS: dict[str, list[Stroke]] = {
    "anchor": [
        (50, 20, 7, 7), [50, 27, 50, 86], [34, 40, 66, 40], (50, 56, 32, 30, 0, 180), [18, 56, 13, 66],
        [82, 56, 87, 66],
    ],
    "bell": [
        [(50, 44, 24, 28, 180, 360), 74, 66, 84, 76, 16, 76, 26, 66, 26, 44], (50, 82, 8, 6, 0, 180), (50, 12, 4, 4),
    ],
    "book": [
        [50, 28, 14, 20, 14, 76, 50, 84, 86, 76, 86, 20, 50, 28], [50, 30, 50, 82], [22, 34, 42, 38],
        [22, 48, 42, 52], [58, 38, 78, 34], [58, 52, 78, 48],
    ],
    "bottle": [
        [42, 12, 58, 12, 58, 32, 68, 46, 68, 88, 32, 88, 32, 46, 42, 32, 42, 12],
        [32, 56, 68, 56, 68, 74, 32, 74, 32, 56], [42, 20, 58, 20],
    ],
    "candle": [[38, 44, 62, 44, 62, 88, 38, 88, 38, 44], [50, 44, 50, 34], (50, 24, 7, 11), [28, 88, 72, 88]],
    "crown": [
        [16, 76, 10, 30, 32, 52, 50, 20, 68, 52, 90, 30, 84, 76, 16, 76], [18, 66, 82, 66], (50, 16, 4, 4),
        (10, 26, 4, 4), (90, 26, 4, 4),
    ],
    "cup": [
        [22, 30, 70, 30, 64, 78, 28, 78, 22, 30], (70, 50, 16, 13, 270, 450), [16, 86, 76, 86], (36, 18, 4, 7),
        (54, 18, 4, 7),
    ],
    "ice cream": [
        [(50, 34, 22, 20, 160, 380), 29, 41], [27, 44, 73, 44, 50, 92, 27, 44], [37, 44, 58, 74], [63, 44, 42, 74],
    ],
    "key": [(30, 36, 18, 18), (30, 36, 7, 7), [43, 49, 84, 86], [68, 72, 76, 64], [78, 81, 86, 73]],
    "leaf": [
        [(72, 50, 56, 56, 142, 218), (-15, 50, 56, 56, -38, 38), 28, 84], [28, 28, 28, 98], [29, 50, 36, 42],
        [27, 62, 20, 54],
    ],
    "lemon": [
        (50, 52, 32, 24), [17, 52, 9, 46, 11, 59, 17, 52], [83, 52, 91, 46, 91, 58, 83, 52],
        (44, 46, 14, 9, 180, 270),
    ],
    "light bulb": [
        [(50, 38, 26, 26, 125, 415), 62, 72, 38, 72, 35, 59], [38, 80, 62, 80], [42, 88, 58, 88],
        [42, 60, 46, 42, 54, 42, 58, 60],
    ],
    "moon": [[(46, 50, 38, 38, 52, 308), (70, 50, 30, 30, 268.7, 91.3)]],
    "mushroom": [
        [(50, 46, 36, 32, 180, 360), 14, 46], [40, 49, 38, 86, 62, 86, 60, 49, 40, 49], (36, 32, 6, 6),
        (60, 28, 7, 7),
    ],
    "pear": [
        [(50, 64, 26, 24, -50, 230), (50, 25, 10, 9, 180, 360), 67, 46], [50, 16, 54, 6], (44, 62, 10, 12, 150, 230),
    ],
    "rocket": [
        [50, 8, 64, 34, 64, 70, 36, 70, 36, 34, 50, 8], (50, 40, 7, 7), [34, 56, 20, 80, 34, 70, 34, 56],
        [66, 56, 80, 80, 66, 70, 66, 56], [42, 73, 50, 92, 58, 73, 42, 73],
    ],
    "snowman": [
        (50, 66, 24, 24), (50, 28, 15, 15), (45, 25, 1, 1), (55, 25, 1, 1), [50, 29, 57, 32], [27, 58, 10, 44],
        [73, 58, 90, 44], (50, 60, 1, 1), (50, 72, 1, 1),
    ],
    "trophy": [
        [30, 14, 70, 14, 66, 48, 50, 60, 34, 48, 30, 14], (28, 28, 12, 12, 80, 290), (72, 28, 12, 12, -110, 100),
        [50, 60, 50, 76], [34, 76, 66, 76, 66, 86, 34, 86, 34, 76],
    ],
    "umbrella": [
        [(50, 50, 40, 38, 180, 360), (77, 50, 13, 7, 360, 180), (50, 50, 14, 7, 360, 180), (23, 50, 13, 7, 360, 180)],
        [50, 46, 50, 82], (43, 82, 7, 8, 0, 180), [50, 14, 36, 40], [50, 14, 64, 40],
    ],
    "watch": [
        (50, 50, 26, 26), [50, 34, 50, 50, 62, 56], [38, 22, 40, 8, 60, 8, 62, 22, 38, 22],
        [38, 78, 40, 92, 60, 92, 62, 78, 38, 78],
    ],
}
# fmt: on


def points(stroke: Stroke) -> list[tuple[float, float]]:
    """The path of a stroke, in units of the sheet."""
    if isinstance(stroke, tuple):
        x, y, rx, ry, start, end = stroke if len(stroke) == 6 else (*stroke, 0, 360)
        angles = [math.radians(start + (end - start) * i / 48) for i in range(49)]
        return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]
    path: list[tuple[float, float]] = []
    rest = iter(stroke)
    for part in rest:
        path += points(part) if isinstance(part, tuple) else [(part, next(rest))]
    return path


def line(mask: Image.Image, path: list[tuple[float, float]], width: float) -> None:
    """One stroke with a round pen."""
    pen, radius = ImageDraw.Draw(mask), width / 2
    pen.line(path, fill=255, width=round(width), joint="curve")
    for x, y in (path[0], path[-1]):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)


def draw(strokes: list[Stroke]) -> Image.Image:
    """The print of a thing: closed shapes in ink, its other lines cut out of them, or printed where there is no ink."""
    side, unit = SIZE * SCALE, SIZE * SCALE / 100
    shapes, lines = Image.new("L", (side, side)), Image.new("L", (side, side))
    for stroke in strokes:
        path = [(x * unit, y * unit) for x, y in points(stroke)]
        shape = Image.new("L", (side, side))
        ImageDraw.Draw(shape).polygon(path, fill=255)
        covered = ImageChops.multiply(shape, shapes)
        closed = math.dist(path[0], path[-1]) < unit
        if closed and covered.histogram()[255] < 0.5 * shape.histogram()[255]:  # not a detail inside another shape
            shapes = ImageChops.lighter(shapes, shape)
        else:
            line(lines, path, WIDTH * unit)
    sheet = Image.new("RGB", (side, side), "white")
    sheet.paste(INK, mask=ImageChops.difference(shapes, lines))
    return sheet.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, strokes in THINGS.items():
        draw(strokes).save(folder / f"{name.replace(' ', '_')}.png")
    print(f"{len(THINGS)} pictures in {folder}")


if __name__ == "__main__":
    main()
