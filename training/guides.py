"""Guides made from a picture: what somebody might have drawn before the picture was made of it.

    python training/guides.py sheet.png

draws a sheet of some to look at.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from data import SIZE, load, things

Colour = tuple[int, int, int]
PALETTES = (Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE)
INK: Colour = (35, 32, 38)


def place(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The RGBA picture somewhere else on the sheet: smaller, shifted, a little turned, now and then mirrored."""
    image = Image.fromarray(picture)
    if rng.random() < 0.25:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = rng.uniform(0.7, 1.0)
    if rng.random() < 0.4:
        image = image.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    size = round(SIZE * scale)
    image = image.resize((size, size), Image.Resampling.LANCZOS)
    spare = SIZE - size
    left, top = (round(spare / 2 + rng.uniform(-0.5, 0.5) * (spare + 6)) for _ in range(2))
    sheet = Image.new("RGBA", (SIZE, SIZE))
    sheet.paste(image, (left, top))
    return sheet


def background(rng: np.random.Generator) -> Colour:
    """White, or once in eight a light flat colour."""
    if rng.random() < 7 / 8:
        return (255, 255, 255)
    red, green, blue = rng.integers(120, 256, 3)
    return int(red), int(green), int(blue)


def on(sheet: Image.Image, colour: Colour) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", sheet.size, (*colour, 255)), sheet).convert("RGB")


def strokes(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Simulated brush strokes: a median filter, then few colours."""
    smooth = image.filter(ImageFilter.MedianFilter(int(rng.choice([5, 7, 9, 11]))))
    palette = PALETTES[rng.integers(2)]
    return smooth.quantize(int(rng.integers(4, 8)), palette, dither=Image.Dither.NONE).convert("RGB")


def wobble(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Bend the picture as an unsure hand would: the corners of a grid of cells are pushed about."""
    cells = int(rng.integers(3, 7))
    edges = np.linspace(0, SIZE, cells + 1).round().astype(int)
    push = rng.normal(0, rng.uniform(1.0, 4.0), (cells + 1, cells + 1, 2))
    x, y = (np.array(np.meshgrid(edges, edges, indexing="ij")) + push.transpose(2, 0, 1)).tolist()
    mesh = []
    for i in range(cells):
        for j in range(cells):
            box = (int(edges[i]), int(edges[j]), int(edges[i + 1]), int(edges[j + 1]))
            corners = ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j))
            mesh.append((box, tuple(side[a][b] for a, b in corners for side in (x, y))))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def doodle(sheet: Image.Image, colour: Colour, rng: np.random.Generator) -> Image.Image:
    """The RGBA sheet drawn badly: bent, in few flat bright colours, perhaps outlined, perhaps nothing but its shape."""
    sheet = wobble(sheet, rng)
    shape = sheet.getchannel("A").filter(ImageFilter.GaussianBlur(rng.uniform(1, 3))).point(lambda a: 255 * (a > 110))
    flat = on(sheet, (255, 255, 255)).filter(ImageFilter.MedianFilter(int(rng.choice([3, 5, 7]))))
    colours = 2 if rng.random() < 0.15 else int(rng.integers(3, 8))
    indexed = flat.quantize(colours, PALETTES[rng.integers(2)], dither=Image.Dither.NONE)
    palette = np.array(indexed.getpalette(), dtype=np.float32)
    indexed.putpalette(np.clip(palette + rng.normal(0, 14, palette.shape), 0, 255).astype(np.uint8).tobytes())
    fill = ImageEnhance.Color(indexed.convert("RGB")).enhance(rng.uniform(0.9, 1.5))
    drawn = Image.composite(fill, Image.new("RGB", sheet.size, colour), shape)
    if rng.random() < 0.5:
        width = int(rng.choice([3, 3, 5]))
        line = ImageChops.difference(shape.filter(ImageFilter.MaxFilter(width)), shape.filter(ImageFilter.MinFilter(3)))
        if rng.random() < 0.5:  # inner lines too, where one flat colour meets another
            inner = indexed.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda v: 255 * (v > 40))
            line = ImageChops.lighter(line, ImageChops.darker(inner.filter(ImageFilter.MaxFilter(3)), shape))
        drawn.paste(INK, mask=line.filter(ImageFilter.GaussianBlur(0.6)))
    return drawn


def main() -> None:
    pictures, items = load()
    rng = np.random.default_rng(1)
    rows = [i for i, item in enumerate(items) if item.name in things()]
    out = Image.new("RGB", (12 * SIZE, 6 * SIZE))
    for n in range(24):
        sheet, colour = place(pictures[rng.choice(rows)], rng), background(rng)
        true = on(sheet, colour)
        for m, image in enumerate((true, strokes(true, rng), doodle(sheet, colour, rng))):
            out.paste(image, (((n % 4) * 3 + m) * SIZE, n // 4 * SIZE))
    out.save(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
