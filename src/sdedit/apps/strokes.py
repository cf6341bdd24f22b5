"""Simulated human strokes: what somebody with a broad brush and few colours might have painted of a photo."""

from __future__ import annotations

from PIL import Image, ImageFilter

from sdedit.inputs import checks
from sdedit.inputs.images import read_images, write_images


def simulate_strokes(image: Image.Image, colors: int = 6, kernel: int = 23) -> Image.Image:
    """Make a stroke painting of a picture, as SDEdit does to measure itself (arXiv 2108.01073, appendix C.2).

    A median filter takes away what is finer than a brush, an adaptive palette (median cut, no dithering) leaves few
    colours. The paper's pictures are 256×256; `kernel` is in pixels, so for another size scale it: 23·side/256.

    Args:
        image: A PIL image of any mode, upright or with an EXIF orientation.
        colors: At most so many are left, 1 to 256.
        kernel: Side of the median filter's square in pixels, odd; 1 leaves the outlines as they are. The time it takes
            grows with its square.

    Returns:
        A picture of the same size, RGB. What is clear counts as white; an alpha channel is given back as it was (RGBA).

    Raises:
        ValueError, TypeError: An argument is not as described.
    """
    colors, kernel = checks.whole_number("colors", colors, 1), checks.whole_number("kernel", kernel, 1)
    if colors > 256:
        raise ValueError(f"colors={colors}; expected at most 256")
    if kernel % 2 == 0:
        raise ValueError(f"kernel={kernel}; expected an odd number, such as {kernel + 1}, so that it has a middle")
    if not isinstance(image, Image.Image):
        raise TypeError(f"image: {type(image).__name__}; expected a PIL image")
    read = read_images(image, latent_channels=0)
    (opaque,) = write_images(read.pixels / 2 + 0.5, "pil", [None])
    smooth = opaque.filter(ImageFilter.MedianFilter(kernel))
    strokes = smooth.quantize(colors, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    alpha = read.alphas[0]
    if alpha is not None:
        strokes.putalpha(Image.fromarray((alpha.numpy() * 255).round().astype("uint8")))
    return strokes
