"""Pictures as prompts, for IP-Adapters: images to the features that the UNet's image projections take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdedit.inputs import checks
from sdedit.inputs.images import read_images, write_images
from sdedit.models.offload import execution_device
from sdedit.noise import retry_in_float32


def encode_images(encoder: Any, feature_extractor: Any, image: Any, hidden_states: bool) -> Tensor:
    """What the image encoder sees in images, and what stands for no image.

    Args:
        image: An image or a list, as the pipeline takes them; or a tensor (N, 3, H, W) that is prepared for CLIP.
        hidden_states: Those before the last layer, (2, N, M, C), instead of the embeds (2, N, C).
    """
    if encoder is None:
        raise ValueError("ip_adapter_image: the pipeline has no image encoder; pass ip_adapter_image_embeds")
    if isinstance(image, Tensor):
        pixels = image
    else:
        images = image if isinstance(image, (list, tuple)) else [image]
        rgb = [write_images(read_images(i, 0).pixels / 2 + 0.5, "pil", [None])[0] for i in images]
        pixels = feature_extractor(rgb, return_tensors="pt").pixel_values

    def run(encoder: Any, _: Any) -> Tensor:
        seen = pixels.to(execution_device(encoder), encoder.dtype)
        if not hidden_states:
            embeds: Tensor = encoder(seen).image_embeds
            return torch.stack([embeds, torch.zeros_like(embeds)])
        both = [encoder(x, output_hidden_states=True).hidden_states[-2] for x in (seen, torch.zeros_like(seen))]
        return torch.stack(both)

    return retry_in_float32("image encoder", encoder, run)


def for_adapters(
    image: Any, embeds: Any, layers: Sequence[Any], guided: bool, encode: Callable[..., Any]
) -> list[Tensor]:
    """The image embeds of each adapter (B, …), the negative ones first if `guided`.

    Args:
        image: One for each adapter, or for each a list; one image for one adapter.
        embeds: Instead of images, made before.
        layers: The adapters' projections.
        encode: `encode(image, hidden_states)` gives the embeds of images and those of no image.

    Raises:
        ValueError: There are too few, too many, or they do not fit.
    """
    checks.either("ip_adapter_image", image, "ip_adapter_image_embeds", embeds)
    name, given = ("ip_adapter_image_embeds", embeds) if image is None else ("ip_adapter_image", image)
    given = given if isinstance(given, (list, tuple)) else [given]
    if len(given) != len(layers):
        raise ValueError(
            f"{name}: {len(given)} for {len(layers)} IP-Adapters; expected one for each (several images for one "
            "adapter are a list in the list)"
        )
    if image is None:
        return [_checked(one, layer, 2 if guided else 1) for one, layer in zip(given, layers, strict=True)]
    both = [encode(one, layer.takes_hidden_states) for one, layer in zip(given, layers, strict=True)]
    return [torch.stack([negative, positive] if guided else [positive]) for positive, negative in both]


@dataclass(frozen=True)
class ImageEmbeds:
    """Image embeds of a batch: for each adapter (B, halves, images, …), the negative half first; perhaps for none."""

    embeds: tuple[Tensor, ...] = ()

    @classmethod
    def of_pictures(cls, prepared: Sequence[Tensor], of_prompt: list[int], guided: bool) -> ImageEmbeds:
        """A row for each picture, from one row for all, or one for each prompt or picture, of `for_adapters`.

        Args:
            of_prompt: The prompt of each picture.
        """
        found = []
        for tensor in prepared:
            rows = torch.stack(tensor.chunk(2 if guided else 1), dim=1)
            if len(rows) not in (1, max(of_prompt) + 1, len(of_prompt)):
                raise ValueError(
                    f"ip_adapter_image_embeds: {len(rows)} rows for {len(of_prompt)} pictures; expected one, or "
                    "one for each prompt or picture"
                )
            of_one = [0] * len(of_prompt) if len(rows) == 1 else of_prompt
            found.append(rows if len(rows) == len(of_prompt) else rows[of_one])
        return cls(tuple(found))

    def to(self, dtype: torch.dtype) -> ImageEmbeds:
        """In another dtype."""
        return ImageEmbeds(tuple(embeds.to(dtype) for embeds in self.embeds))

    def take(self, pictures: list[int]) -> ImageEmbeds:
        """Those of some of the pictures, in this order."""
        return ImageEmbeds(tuple(embeds[pictures] for embeds in self.embeds))

    def join(self, other: ImageEmbeds, guided: bool) -> ImageEmbeds:
        """Those of two batches as one; if only one of them is guided, the other's serve in both halves."""
        halves = 2 if guided else 1
        pairs = zip(self.embeds, other.embeds, strict=True)
        return ImageEmbeds(tuple(torch.cat([_spread(one, halves) for one in pair]) for pair in pairs))

    def arguments(self, guided: bool) -> dict[str, Any]:
        """What the UNet gets; without guidance the last half, even if there was some."""
        if not self.embeds:
            return {}
        wanted = [embeds[:, -2 if guided else -1 :].transpose(0, 1).flatten(0, 1) for embeds in self.embeds]
        return {"added_cond_kwargs": {"image_embeds": wanted}}


def _spread(embeds: Tensor, halves: int) -> Tensor:
    """(B, 1 or 2, …) with so many halves: of two the last one, of one the same twice."""
    return embeds[:, -halves:].expand(-1, halves, *embeds.shape[2:])


def _checked(embeds: Any, layer: Any, halves: int) -> Tensor:
    """Embeds as one adapter takes them."""
    ndim = 4 if layer.takes_hidden_states else 3
    shape = f"(B, images, {'M, ' if ndim == 4 else ''}{layer.features})"
    if not isinstance(embeds, Tensor) or embeds.ndim != ndim or embeds.shape[-1] != layer.features:
        got = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(f"ip_adapter_image_embeds: {got}; expected {shape}")
    if not embeds.numel() or len(embeds) % halves or not torch.isfinite(embeds).all():
        raise ValueError(
            f"ip_adapter_image_embeds: {list(embeds.shape)}; expected finite numbers, {shape}"
            + (", with guidance an even B: the negative ones first" if halves == 2 else "")
        )
    return embeds
