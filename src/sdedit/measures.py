"""How far a picture is from its guide."""

from __future__ import annotations

import numpy as np
from PIL import Image


def l2_distance(picture: Image.Image, guide: Image.Image) -> float:
    """The (unsquared) L2 distance over all pixels and channels in [0, 1] at 256×256: how SDEdit measures faithfulness.

    0 for the same picture, 443.4 (√(256·256·3)) for black against white. What is clear counts as white.
    """
    a, b = (_at_256(image) for image in (picture, guide))
    return float(np.linalg.norm(a - b))


def _at_256(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    clear = image.convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), clear).convert("RGB")
    return np.asarray(opaque.resize((256, 256), Image.Resampling.BICUBIC)).astype(np.float64) / 255
