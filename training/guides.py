"""Guides made from a picture: what somebody might have drawn before the picture was made of it.

    python training/guides.py sheet.png

draws a sheet of some to look at.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from captions import training_rows
from data import SIZE, load

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)
INK: Colour = (35, 32, 38)
PALETTES = (Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE)
SIDE = 128  # guides are drawn at this width and enlarged; pens and filters are measured in its pixels
KINDS = ("picture", "strokes", "doodle", "doodle", "blank")  # of each placement, in the order of `guided`


def place(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The RGBA picture somewhere else on the sheet: smaller, shifted, a little turned, now and then mirrored.

    One in six is small, and lies anywhere.
    """
    image = Image.fromarray(picture)
    if rng.random() < 0.25:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    small = rng.random() < 1 / 6
    scale = rng.uniform(0.45, 0.7) if small else rng.uniform(0.7, 1.0)
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
    """White, or once in four a flat colour, mostly a light one."""
    if rng.random() < 3 / 4:
        return WHITE
    red, green, blue = rng.integers(120 if rng.random() < 0.7 else 30, 256, 3)
    return int(red), int(green), int(blue)


def ground(colour: Colour, rng: np.random.Generator) -> Image.Image:
    """What a guide to a picture on this colour is drawn on: the colour, paper under a lamp, a photograph."""
    plain = Image.new("RGB", (SIDE, SIDE), colour)
    if rng.random() < (0.8 if colour == WHITE else 0.6):
        return plain
    waves = sum(share * noise(cells, rng) for cells, share in ((2, 0.6), (5, 0.3), (17, 0.15)))
    if colour == WHITE:  # dimmer and warmer or colder towards a side, with a little grain
        light = 255 - rng.uniform(5, 50) * (1 + waves[..., :1]) * (1 + 0.2 * rng.normal(size=3))
        shaded = light + rng.normal(0, rng.uniform(0, 6), (SIDE, SIDE, 1))
    else:
        grey = waves.mean(-1, keepdims=True)
        shaded = np.array(colour) + rng.uniform(25, 80) * (0.7 * (grey - grey.mean()) + 0.3 * (waves - waves.mean()))
    return Image.fromarray(np.clip(shaded, 0, 255).astype(np.uint8))


def noise(cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth waves of three channels, (SIDE, SIDE, 3), about -1 to 1."""
    coarse = rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1


def on(sheet: Image.Image, colour: Colour) -> Image.Image:
    """The RGBA sheet on a flat colour."""
    return Image.alpha_composite(Image.new("RGBA", sheet.size, (*colour, 255)), sheet).convert("RGB")


def strokes(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Simulated brush strokes: a median filter, then few colours."""
    smooth = image.filter(ImageFilter.MedianFilter(int(rng.choice([5, 7, 9, 11]))))
    palette = PALETTES[rng.integers(2)]
    return smooth.quantize(int(rng.integers(4, 8)), palette, dither=Image.Dither.NONE).convert("RGB")


def wobble(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Bend the picture as an unsure hand would: the corners of a grid of cells are pushed about."""
    cells = int(rng.integers(3, 7))
    edges = np.linspace(0, SIDE, cells + 1).round().astype(int)
    push = rng.normal(0, rng.uniform(1.0, 4.0), (cells + 1, cells + 1, 2))
    x, y = (np.array(np.meshgrid(edges, edges, indexing="ij")) + push.transpose(2, 0, 1)).tolist()
    mesh = []
    for i in range(cells):
        for j in range(cells):
            box = (int(edges[i]), int(edges[j]), int(edges[i + 1]), int(edges[j + 1]))
            corners = ((i, j), (i, j + 1), (i + 1, j + 1), (i + 1, j))
            mesh.append((box, tuple(side[a][b] for a, b in corners for side in (x, y))))
    return image.transform(image.size, Image.Transform.MESH, mesh, Image.Resampling.BILINEAR)


def silhouette(sheet: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Where the thing is, with rounded corners: 0 or 255."""
    return sheet.getchannel("A").filter(ImageFilter.GaussianBlur(rng.uniform(1, 3))).point(lambda a: 255 * (a > 110))


def few_colours(sheet: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """The thing in a few flat bright colours, and the lines where they meet, 0 or 255."""
    flat = on(sheet, WHITE).filter(ImageFilter.MedianFilter(int(rng.choice([3, 5, 7]))))
    colours = 2 if rng.random() < 0.15 else int(rng.integers(3, 8))
    indexed = flat.quantize(colours, PALETTES[rng.integers(2)], dither=Image.Dither.NONE)
    palette = np.array(indexed.getpalette(), dtype=np.float32)
    indexed.putpalette(np.clip(palette + rng.normal(0, 14, palette.shape), 0, 255).astype(np.uint8).tobytes())
    fill = ImageEnhance.Color(indexed.convert("RGB")).enhance(rng.uniform(0.9, 1.5))
    return fill, indexed.convert("L").filter(ImageFilter.FIND_EDGES).point(lambda v: 255 * (v > 40))


def outline(shape: Image.Image, inner: Image.Image, width: int, every_line: bool) -> Image.Image:
    """Lines around the thing, and perhaps inside it, with a pen of this width; soft at its edges."""
    line = ImageChops.difference(shape.filter(ImageFilter.MaxFilter(width)), shape.filter(ImageFilter.MinFilter(3)))
    if every_line:
        inner = inner.filter(ImageFilter.MaxFilter(max(3, width - 2)))
        line = ImageChops.lighter(line, ImageChops.darker(inner, shape))
    return line.filter(ImageFilter.GaussianBlur(0.6))


def doodle(sheet: Image.Image, below: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The RGBA sheet drawn badly on a ground: bent, in few colours with or without lines, or in thick lines alone.

    One in six is faint.
    """
    sheet = wobble(sheet, rng)
    shape = silhouette(sheet, rng)
    fill, inner = few_colours(sheet, rng)
    lines_only = rng.random() < 0.2
    drawn = below.copy()
    if not lines_only:
        drawn.paste(fill, mask=shape)
    elif rng.random() < 0.3:
        drawn.paste(WHITE, mask=shape)
    if lines_only or rng.random() < 0.45:
        widths = (3, 5, 5, 7) if lines_only else (3, 3, 5, 7)
        line = outline(shape, inner, int(rng.choice(widths)), lines_only or rng.random() < 0.5)
        pen = fill.filter(ImageFilter.MinFilter(5)) if lines_only and rng.random() < 0.4 else INK
        drawn.paste(pen, mask=line)
    return Image.blend(below, drawn, rng.uniform(0.3, 0.7)) if rng.random() < 1 / 6 else drawn


def guided(sheet: Image.Image, colour: Colour, rng: np.random.Generator) -> list[Image.Image]:
    """The placed picture on its colour, and a guide of each kind to it, in the order of KINDS.

    The last is the empty sheet: what words alone start from at strength 1.
    """
    small = sheet.resize((SIDE, SIDE), Image.Resampling.BOX)
    drawn = [strokes(on(small, colour), rng), *(doodle(small, ground(colour, rng), rng) for _ in range(2))]
    guides = [image.resize(sheet.size, Image.Resampling.BICUBIC) for image in drawn]
    return [on(sheet, colour), *guides, Image.new("RGB", sheet.size, colour)]


def main() -> None:
    pictures, items = load()
    rng = np.random.default_rng(1)
    rows = training_rows(items)
    out = Image.new("RGB", (3 * len(KINDS) * SIZE, 8 * SIZE))
    for n in range(24):
        images = guided(place(pictures[rng.choice(rows)], rng), background(rng), rng)
        for m, image in enumerate(images):
            out.paste(image, (((n % 3) * len(KINDS) + m) * SIZE, n // 3 * SIZE))
    out.save(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
