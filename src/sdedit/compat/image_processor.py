"""`VaeImageProcessor`: pictures to the VAE's tensors and back, for scripts that do it by hand.

A pipeline does not use it: it reads pictures of any size as they are (`sdedit.inputs`). This one scales them down to
multiples of the VAE's factor, as such scripts expect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from sdedit.compat.utils import PIL_INTERPOLATION, numpy_to_pil
from sdedit.config import Configurable
from sdedit.inputs.images import ImageInput as PipelineImageInput

__all__ = ["PipelineImageInput", "VaeImageProcessor"]

Box = tuple[int, int, int, int]


class VaeImageProcessor(Configurable):
    """Pictures to tensors (B, C, H, W) and back.

    Args:
        do_resize: Scale to `height` and `width`, or down to multiples of `vae_scale_factor`.
        vae_scale_factor: Pixels for one latent, along a side.
        vae_latent_channels: A tensor of so many channels is taken for latents, and left alone.
        resample: "lanczos", "bicubic", "bilinear" or "nearest", of PIL images; others take the nearest pixel.
        reducing_gap: PIL's, see `PIL.Image.Image.resize`.
        do_normalize: [0, 1] becomes [-1, 1].
        do_binarize: Below 0.5 becomes 0, the rest 1.
        do_convert_rgb, do_convert_grayscale: Of PIL images, the mode.
    """

    def __init__(
        self,
        do_resize: bool = True,
        vae_scale_factor: int = 8,
        vae_latent_channels: int = 4,
        resample: str = "lanczos",
        reducing_gap: int | None = None,
        do_normalize: bool = True,
        do_binarize: bool = False,
        do_convert_rgb: bool = False,
        do_convert_grayscale: bool = False,
    ) -> None:
        if do_convert_rgb and do_convert_grayscale:
            raise ValueError("do_convert_rgb and do_convert_grayscale are both True; expected one of them at most")
        if resample not in PIL_INTERPOLATION:
            raise ValueError(f"resample={resample!r}; expected one of {', '.join(PIL_INTERPOLATION)}")

    def preprocess(
        self,
        image: PipelineImageInput,
        height: int | None = None,
        width: int | None = None,
        resize_mode: str = "default",
        crops_coords: Box | None = None,
    ) -> Tensor:
        """Pictures to a tensor (B, C, H, W), in [-1, 1] if `do_normalize`.

        Args:
            image: PIL images, arrays (H, W, C) or (B, H, W, C) in [0, 1], tensors (C, H, W) or (B, C, H, W); or a list.
            resize_mode: Of PIL images: "default" scales to the size, "crop" fills it and cuts what stands over, "fill"
                keeps all of the picture and repeats its edge.
            crops_coords: Cut out of each PIL image first: left, top, right, bottom.

        Raises:
            ValueError: It is none of these.
        """
        images: list[Any] = list(image) if isinstance(image, (list, tuple)) else [image]
        if images and all(isinstance(one, Image.Image) for one in images):
            cut = [one.crop(crops_coords) if crops_coords else one for one in images]
            if self.config.do_resize:
                size = self.get_default_height_width(cut[0], height, width)
                cut = [self.resize(one, *size, resize_mode=resize_mode) for one in cut]
            mode = "RGB" if self.config.do_convert_rgb else "L" if self.config.do_convert_grayscale else None
            pixels = self.numpy_to_pt(self.pil_to_numpy([one.convert(mode) if mode else one for one in cut]))
        elif images and all(isinstance(one, (np.ndarray, Tensor)) for one in images):
            pixels = self._batch(images)
            if pixels.shape[1] == self.config.vae_latent_channels and isinstance(images[0], Tensor):
                return pixels
            if self.config.do_resize:
                pixels = self.resize(pixels, *self.get_default_height_width(pixels, height, width))
        else:
            kinds = ", ".join(sorted({type(one).__name__ for one in images})) or "nothing"
            raise ValueError(f"image: {kinds}; expected PIL images, NumPy arrays or tensors, all of one kind")
        if self.config.do_normalize and pixels.min() >= 0:  # below 0 it is normalized already
            pixels = self.normalize(pixels)
        return (pixels >= 0.5).to(pixels.dtype) if self.config.do_binarize else pixels

    def _batch(self, images: list[Any]) -> Tensor:
        """Arrays or tensors, of one picture or a batch each, as (B, C, H, W)."""
        if isinstance(images[0], np.ndarray):
            joined = np.concatenate([one if one.ndim == 4 else one[None] for one in images])
            if joined.ndim == 3:  # a batch of grey pictures
                joined = joined[..., None]
            return self.numpy_to_pt(joined)
        grey = self.config.do_convert_grayscale
        parts = [one if one.ndim == 4 else one.unsqueeze(1) if grey and one.ndim == 3 else one[None] for one in images]
        return torch.cat(parts)

    def postprocess(
        self, image: Tensor, output_type: str = "pil", do_denormalize: Sequence[bool] | None = None
    ) -> list[Image.Image] | np.ndarray[Any, Any] | Tensor:
        """A tensor (B, C, H, W) to "pil", "np" (B, H, W, C), "pt" or, as it is, "latent".

        Args:
            do_denormalize: For each picture, whether it is in [-1, 1]; as `do_normalize` says if not given.
        """
        if not isinstance(image, Tensor):
            raise ValueError(f"image: {type(image).__name__}; expected a tensor")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type={output_type!r}; expected pil, np, pt or latent")
        if output_type == "latent":
            return image
        flags = [self.config.do_normalize] * len(image) if do_denormalize is None else do_denormalize
        pixels = torch.stack([self.denormalize(one) if flag else one for one, flag in zip(image, flags, strict=True)])
        if output_type == "pt":
            return pixels
        array = self.pt_to_numpy(pixels)
        return array if output_type == "np" else self.numpy_to_pil(array)

    def get_default_height_width(
        self, image: Any, height: int | None = None, width: int | None = None
    ) -> tuple[int, int]:
        """Height and width as given, or the picture's own, down to multiples of `vae_scale_factor`."""
        if isinstance(image, Image.Image):
            own = (image.height, image.width)
        else:
            own = tuple(image.shape[2:4] if isinstance(image, Tensor) else image.shape[1:3])
        factor = self.config.vae_scale_factor
        high, wide = own[0] if height is None else height, own[1] if width is None else width
        return high - high % factor, wide - wide % factor

    def resize(self, image: Any, height: int, width: int, resize_mode: str = "default") -> Any:
        """A picture, or a batch as array or tensor, at another size: see `preprocess`."""
        if isinstance(image, Image.Image):
            modes = {"default": self._scaled, "fill": self._filled, "crop": self._cut}
            if resize_mode not in modes:
                raise ValueError(f"resize_mode={resize_mode!r}; expected one of {', '.join(modes)}")
            return modes[resize_mode](image, width, height)
        if resize_mode != "default":
            raise ValueError(f"resize_mode={resize_mode!r} is for PIL images; it is {type(image).__name__}")
        if isinstance(image, Tensor):
            return F.interpolate(image, (height, width))
        return self.pt_to_numpy(F.interpolate(self.numpy_to_pt(image), (height, width)))

    def _scaled(self, image: Image.Image, width: int, height: int) -> Image.Image:
        resample = PIL_INTERPOLATION[self.config.resample]
        return image.resize((width, height), resample, reducing_gap=self.config.reducing_gap)

    def _fitted(self, image: Image.Image, width: int, height: int, whole: bool) -> tuple[Image.Image, int, int]:
        """The picture at its own proportions, within the size if `whole`, else around it; and where it then lies."""
        by_width = (width / height < image.width / image.height) == whole
        wide = width if by_width else image.width * height // image.height
        high = image.height * width // image.width if by_width else height
        scaled = image.resize((wide, high), Image.Resampling.LANCZOS)
        return scaled, width // 2 - wide // 2, height // 2 - high // 2

    def _cut(self, image: Image.Image, width: int, height: int) -> Image.Image:
        scaled, left, top = self._fitted(image, width, height, whole=False)
        sheet = Image.new("RGB", (width, height))
        sheet.paste(scaled, (left, top))
        return sheet

    def _filled(self, image: Image.Image, width: int, height: int) -> Image.Image:
        scaled, left, top = self._fitted(image, width, height, whole=True)
        array = np.asarray(scaled.convert("RGB"))
        around = ((top, height - scaled.height - top), (left, width - scaled.width - left), (0, 0))
        return Image.fromarray(np.pad(array, around, mode="edge"))

    @staticmethod
    def get_crop_region(mask_image: Image.Image, width: int, height: int, pad: int = 0) -> Box:
        """The box around what is not black in a mask, and `pad` pixels more, widened to the size's proportions."""
        mask = np.asarray(mask_image.convert("L"))
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        high, wide = mask.shape
        if not len(rows):  # nothing is marked: all of it
            return 0, 0, wide, high
        left, right = max(columns[0] - pad, 0), min(columns[-1] + 1 + pad, wide)
        top, bottom = max(rows[0] - pad, 0), min(rows[-1] + 1 + pad, high)
        if (right - left) / (bottom - top) > width / height:
            top, bottom = _widened(top, bottom, int((right - left) / (width / height)), high)
        else:
            left, right = _widened(left, right, int((bottom - top) * (width / height)), wide)
        return int(left), int(top), int(right), int(bottom)

    def apply_overlay(
        self, mask: Image.Image, init_image: Image.Image, image: Image.Image, crop_coords: Box | None = None
    ) -> Image.Image:
        """The first picture, with the second where the mask is not black; brought to the box first, if one is given."""
        size = init_image.size
        if crop_coords is not None:
            left, top, right, bottom = crop_coords
            sheet = Image.new("RGBA", size)
            sheet.paste(self._cut(image, right - left, bottom - top), (left, top))
            image = sheet.convert("RGB")
        elif image.size != size:
            image = image.resize(size, Image.Resampling.LANCZOS)
        out = image.convert("RGBA")
        outside = Image.eval(mask.convert("L"), lambda value: 255 - value)
        kept = Image.new("RGBa", size)
        kept.paste(init_image.convert("RGBA").convert("RGBa"), mask=outside)
        out.alpha_composite(kept.convert("RGBA"))
        return out.convert("RGB")

    @staticmethod
    def blur(image: Image.Image, blur_factor: int = 4) -> Image.Image:
        """The picture through a Gaussian of that radius in pixels."""
        return image.filter(ImageFilter.GaussianBlur(blur_factor))

    @staticmethod
    def pil_to_numpy(images: Image.Image | Sequence[Image.Image]) -> np.ndarray[Any, Any]:
        """PIL images, all of one size, as (B, H, W, C) in [0, 1], float32; grey ones as (B, H, W)."""
        many = [images] if isinstance(images, Image.Image) else images
        return np.stack([np.asarray(one, dtype=np.float32) / 255 for one in many])

    @staticmethod
    def numpy_to_pt(images: np.ndarray[Any, Any]) -> Tensor:
        """(B, H, W, C), or (B, H, W), as (B, C, H, W)."""
        array = images[..., None] if images.ndim == 3 else images
        return torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2)))

    @staticmethod
    def pt_to_numpy(images: Tensor) -> np.ndarray[Any, Any]:
        """(B, C, H, W) as (B, H, W, C), float32."""
        return images.cpu().permute(0, 2, 3, 1).float().numpy()

    @staticmethod
    def numpy_to_pil(images: np.ndarray[Any, Any]) -> list[Image.Image]:
        """See `sdedit.utils.numpy_to_pil`."""
        return numpy_to_pil(images)

    @staticmethod
    def normalize(images: Any) -> Any:
        """[0, 1] to [-1, 1]."""
        return 2.0 * images - 1.0

    @staticmethod
    def denormalize(images: Any) -> Any:
        """[-1, 1] to [0, 1], and what is beyond is cut."""
        return (images * 0.5 + 0.5).clamp(0, 1)


def _widened(start: int, end: int, size: int, limit: int) -> tuple[int, int]:
    """An interval grown to `size` about its middle, moved to lie within 0 and `limit` where it can."""
    more = max(size - (end - start), 0)
    start, end = start - more // 2, end + more - more // 2
    if end > limit:
        start, end = start - (end - limit), limit
    if start < 0:
        start, end = 0, end - start
    return start, min(end, limit)
