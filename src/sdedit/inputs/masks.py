"""Editing a part of an image: where it may change, how far, and how what stays is put back.

SDEdit's masked editing (arXiv 2108.01073, algorithm 3): after every step, what is to stay is replaced by the source
noised to the level just reached, and after the last step by the source itself. With a strength for each pixel
(differential diffusion, arXiv 2306.00950) a latent stays until its own strength's turn comes; a mask is the case of two
strengths.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sdedit.inputs import colour
from sdedit.inputs.images import pad_to_multiple
from sdedit.inputs.pixels import Array, Images, pil_to_array, to_unit

if TYPE_CHECKING:
    from sdedit.schedulers.runs import Run


@dataclass(frozen=True)
class Region:
    """What of a batch of pictures may change. Without a mask and a map everything may, and all methods do nothing.

    Attributes:
        alpha: (B, 1, H, W), how much of the new picture is seen: at 0, the input's own pixels stay.
        strengths: (B, h, w) float64, the greatest strength for each latent.
        factor: Pixels for a latent, along a side.
    """

    alpha: Tensor | None = None
    strengths: Array | None = None
    factor: int = 8

    def settings(self, images: int) -> dict[str, list[Any]]:
        """What `checks.batch_plan` is to count: masks that go with pictures, not with images."""
        return {} if self.alpha is None or len(self.alpha) == images else {"mask_image, strength_map": [*self.alpha]}

    def of_pictures(self, of_image: Sequence[int], images: int) -> Region:
        """That of each picture of the batch: one for all, one for each image, or one for each picture."""
        if self.alpha is None or self.strengths is None:
            return self
        count = len(self.alpha)
        chosen = [0] * len(of_image) if count == 1 else list(of_image) if count == images else list(range(count))
        return dataclasses.replace(self, alpha=self.alpha[chosen], strengths=self.strengths[chosen])

    def limited(self, strengths: list[float]) -> list[float]:
        """The strengths of the pictures, lowered where no latent of a picture goes as far."""
        if self.strengths is None:
            return strengths
        tops = self.strengths.max(axis=(1, 2)).tolist()
        asked = strengths * (len(tops) // len(strengths))
        limits = [min(pair) for pair in zip(asked, tops, strict=True)]
        if limits == asked:
            return strengths
        return limits[:1] if len(set(limits)) == 1 else limits

    def keep(self, run: Run, clean: Tensor, noise: Tensor) -> Keep:
        """What stays of clean latents (B, C, h, w) in a run that is about to begin; see `Keep`."""
        if self.strengths is None:
            return Keep()
        return Keep(torch.from_numpy(run.call_of(self.strengths))[:, None].to(clean.device), clean, noise)

    def composed(self, pixels: Tensor, images: Images, of_image: Sequence[int]) -> Tensor:
        """Decoded pixels (B, 3, H, W) in [0, 1] where the picture may change, the input's own ones elsewhere.

        What the VAE does to colours is measured on what stays, and undone near it, so that no seam is seen. Pictures
        with a colour profile come out in its space, so that what stays is the same there.
        """
        if self.alpha is None or self.strengths is None or images.latent:
            return pixels
        device, (height, width) = pixels.device, pixels.shape[-2:]
        pixels, alpha = pixels.float(), self.alpha.to(device)
        source = images.pixels[of_image].to(device) / 2 + 0.5
        stays = torch.from_numpy(self.strengths == 0)[:, None].to(device, torch.float32)
        stays = F.interpolate(stays, scale_factor=self.factor)[..., :height, :width]
        corrected = (pixels + spread(source - pixels, stays, self.factor)).clamp(0, 1)
        colours = images.colours[of_image].to(device)
        for i, image in enumerate(of_image):
            if images.profiles[image] is not None:
                corrected[i] = _in_profile(corrected[i], images.profiles[image])
                clear = 1 if images.alphas[image] is None else images.alphas[image].to(device)
                source[i] = colours[i] * clear + (1 - clear)
        blended = torch.lerp(source, corrected, alpha)
        return torch.where(alpha == 0, colours, blended)

    def profiles(self, images: Images, of_image: Sequence[int]) -> list[bytes | None] | None:
        """The colour profiles that composed pictures are meant by: those of the images, if something of them stays."""
        return None if self.alpha is None or images.latent else [images.profiles[i] for i in of_image]


@dataclass(frozen=True)
class Keep:
    """What stays while the rest is denoised; nothing, if there is neither mask nor map.

    Attributes:
        calls: (B, 1, h, w), UNet calls to go until a latent is free; perhaps more than there are.
        clean: (B, C, h, w), the source's latents.
        noise: (B, C, h, w), which the source is noised with, at every level the same.
    """

    calls: Tensor | None = None
    clean: Tensor | None = None
    noise: Tensor | None = None

    def take(self, pictures: list[int]) -> Keep:
        """That of some of the pictures, in this order."""
        return Keep(*(None if t is None else t[pictures] for t in (self.calls, self.clean, self.noise)))

    def join(self, other: Keep, latents: Tensor, others: Tensor) -> Keep:
        """That of two batches as one, whose latents these are: without a mask everything is free."""
        if self.calls is None and other.calls is None:
            return self
        both = self._for(latents), other._for(others)
        return Keep(*(torch.cat(pair) for pair in zip(*both, strict=True)))

    def _for(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.calls is None or self.clean is None or self.noise is None:
            return torch.zeros_like(latents[:, :1], dtype=torch.int64), latents, latents
        return self.calls, self.clean, self.noise

    def to(self, dtype: torch.dtype) -> Keep:
        """In another dtype."""
        return Keep(self.calls, *(None if t is None else t.to(dtype) for t in (self.clean, self.noise)))

    def restored(self, run: Run, latents: Tensor) -> tuple[Tensor, Keep]:
        """After a call, latents (B, C, h, w) with the source at their level where it stays; and what stays from now."""
        if self.calls is None or self.clean is None or self.noise is None:
            return latents, self
        source = run.noised(self.clean, self.noise)
        return torch.where(self.calls > 0, source, latents), dataclasses.replace(self, calls=self.calls - 1)


def read_region(mask_image: Any, strength_map: Any, feather: int, images: Images, factor: int) -> Region:
    """Read what users pass as `mask_image` and `strength_map`, either or both of them, for images that were read.

    Args:
        mask_image: 1 (white) where the picture may change, 0 (black) where it stays; between them, that much of the
            change is seen. See `read_mask`.
        strength_map: The greatest strength at each pixel, likewise.
        feather: Pixels over which the change fades in, from the edge inwards.
        factor: Pixels for a latent, along a side.

    Raises:
        TypeError, ValueError: One of them is not as described.
    """
    given = {"mask_image": mask_image, "strength_map": strength_map}
    height, width = (side * (factor if images.latent else 1) for side in images.pixels.shape[-2:])
    read = {name: read_mask(name, value, (width, height)) for name, value in given.items() if value is not None}
    if not read:
        return Region()
    if feather > max(width, height):
        raise ValueError(f"mask_feather={feather}; expected at most {max(width, height)}, the image's longer side")
    counts = {len(mask) for mask in read.values()}
    if len(counts - {1}) > 1:
        raise ValueError(f"mask_image and strength_map: {counts} of them; expected as many of both, or one of either")
    one = torch.ones(1, 1, 1)
    mask, strengths = torch.broadcast_tensors(read.get("mask_image", one), read.get("strength_map", one))
    strengths = torch.where(mask > 0, strengths, 0.0)
    alpha = feathered(torch.where(strengths > 0, mask, 0.0)[:, None], feather)
    # A latent goes as far as the pixel of it that goes furthest.
    furthest = F.max_pool2d(pad_to_multiple(strengths[:, None], factor), factor)[:, 0]
    # Rounded, so that 0.7 in float32 is as many steps as 0.7.
    return Region(alpha, np.round(furthest.double().numpy(), 6), factor)


def read_mask(name: str, value: Any, size: tuple[int, int]) -> Tensor:
    """Masks as (B, H, W) in [0, 1], of `size` (width, height).

    Args:
        name: Of the argument, for messages.
        value: One of these, or a list. PIL: any mode, without transparency. NumPy: (H, W), (H, W, C), (B, H, W) or
            (B, H, W, C). Tensor: (H, W), (C, H, W), (B, H, W) or (B, C, H, W). C is 1, or 3 of which the mean is taken.
            bool, whole numbers (0 to 255, or 0 and 1), or floats in [0, 1]. Of another size, it is resized.

    Raises:
        TypeError, ValueError: It is none of these, or of another aspect ratio.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not values:
        raise ValueError(f"{name}: the list is empty; expected at least one mask")
    return torch.cat([_fitted(name, _greys(name, one), size) for one in values])


def resized_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W) in [0, 1] at another size (width, height), smoothly; to 8 bits, so that 0 and 1 stay what they are."""
    if mask.shape[:0:-1] == size:
        return mask
    eight_bit = (mask * 255).round().to(torch.uint8).numpy()
    done = [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)) for one in eight_bit]
    return torch.from_numpy(np.stack(done)).float() / 255


def _fitted(name: str, mask: Tensor, size: tuple[int, int]) -> Tensor:
    """The mask at the image's size; resized with a warning, unless the aspect ratio is another."""
    (height, width), (wide, high) = mask.shape[1:], size
    if (width, height) == size:
        return mask
    if min(abs(width * high / wide - height), abs(height * wide / high - width)) > 1:
        raise ValueError(
            f"{name}: {width}×{height} for an image of {wide}×{high} pixels; expected the same size, or at least the "
            "same aspect ratio: cut it as the image was cut"
        )
    warnings.warn(f"{name}: {width}×{height} was resized to the image's {wide}×{high}", stacklevel=2)
    return resized_mask(mask, size)


def _greys(name: str, value: Any) -> Tensor:
    """A mask of any kind as (B, H, W) in [0, 1]."""
    if isinstance(value, Image.Image):
        eight_bit, array = True, pil_to_array(value)[None]
    elif isinstance(value, (Tensor, np.ndarray)):
        array = _channels_last(name, value)
        eight_bit = bool(np.issubdtype(array.dtype, np.integer))
        array = to_unit(array, name)
    else:
        raise TypeError(
            f"{name}: {type(value).__name__}; expected a PIL image, a NumPy array, a tensor, or a list of them"
        )
    if array.shape[-1] == 4 and array[..., 3].min() < 1:
        raise ValueError(f"{name} has transparent pixels, which do not say what may change; expected white on black")
    grey = array[..., :3].mean(axis=-1, dtype=np.float32)
    if grey.min() < 0:
        raise ValueError(f"{name}: values from {grey.min():g}; expected 0 (stays) to 1 (changes)")
    if eight_bit and 0 < grey.max() <= 1 / 255:  # written as 0 and 1
        grey = grey * 255
    return torch.from_numpy(grey).clamp(0, 1)


def _channels_last(name: str, value: Tensor | Array) -> Array:
    """An array or a tensor as (B, H, W, C)."""
    shape = tuple(value.shape)
    if isinstance(value, Tensor):
        value = (value.float() if value.is_floating_point() else value).detach().cpu().numpy()
        if len(shape) == 4 or (len(shape) == 3 and shape[0] in (1, 3)):
            value = np.moveaxis(value, -3, -1)
    array = value[..., None] if len(shape) == 2 or (len(shape) == 3 and value.shape[-1] not in (1, 3, 4)) else value
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] not in (1, 3, 4) or not array.size:
        raise ValueError(f"{name}: shape {list(shape)}; expected one grey value a pixel, such as (H, W) or (B, H, W)")
    return array


def _in_profile(pixels: Tensor, profile: bytes | None) -> Tensor:
    """(3, H, W) in [0, 1], sRGB, in the numbers of a colour profile; to 8 bits."""
    if profile is None:
        return pixels
    shown = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().to(torch.uint8).cpu().numpy())
    own = np.array(colour.from_srgb(shown, profile))
    return torch.from_numpy(own).to(pixels).permute(2, 0, 1) / 255


def feathered(mask: Tensor, width: int) -> Tensor:
    """(B, 1, H, W) in [0, 1], rising from its edges inwards over `width` pixels; what is 0 stays 0.

    It is the mean of the mask shrunk by 0, 1, … `width` - 1 pixels. The borders of the image are no edges.
    """
    total = shrunk = mask
    for _ in range(width - 1):
        shrunk = -F.max_pool2d(-shrunk, 3, stride=1, padding=1)
        total = total + shrunk
    return total / max(width, 1)


def spread(difference: Tensor, known: Tensor, radius: int) -> Tensor:
    """Local means of a difference (B, 3, H, W) where it is known (B, 1, H, W), carried on to where it is not.

    Three means over squares, which are nearly a Gaussian, of the difference and of what is known; further than three
    times `radius` from all that is known it fades to 0.
    """
    both = torch.cat([difference * known, known], dim=1)
    for _ in range(3):
        both = F.avg_pool2d(both, 2 * radius + 1, stride=1, padding=radius, count_include_pad=False)
    return both[:, :3] / both[:, 3:].clamp(min=0.05)
