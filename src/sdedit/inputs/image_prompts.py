"""Pictures as prompts, for IP-Adapters: images to the features that the UNet's image projections take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdedit.inputs import checks
from sdedit.inputs.images import read_images, write_images
from sdedit.models.ip_adapter import projections
from sdedit.models.offload import execution_device
from sdedit.noise import retry_in_float32


class ImagePrompts:
    """The part of a pipeline that makes image embeds, as `encode_prompt` makes those of prompts."""

    unet: Any
    image_encoder: Any
    feature_extractor: Any
    do_classifier_free_guidance: Any  # the pipeline's property

    @torch.no_grad()
    def encode_image(
        self,
        image: Any,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        output_hidden_states: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Show images to the image encoder.

        Args:
            image: An image or a list, as the pipeline takes them; or a tensor (N, 3, H, W) that is prepared for CLIP.
            device: Where the result shall be.
            num_images_per_prompt: Each is repeated that often.
            output_hidden_states: Give the hidden states before the last layer (N, M, C), as Plus adapters need them,
                instead of the embeds (N, C).

        Returns:
            Those of the images, and those that stand for no image.
        """
        encoder = self.image_encoder
        if encoder is None:
            raise ValueError("ip_adapter_image: the pipeline has no image encoder; pass ip_adapter_image_embeds")
        if isinstance(image, Tensor):
            pixels = image
        else:
            images = image if isinstance(image, (list, tuple)) else [image]
            rgb = [write_images(read_images(i, 0).pixels / 2 + 0.5, "pil", [None])[0] for i in images]
            pixels = self.feature_extractor(rgb, return_tensors="pt").pixel_values

        def run(dtype: torch.dtype) -> Tensor:
            seen = pixels.to(execution_device(encoder), dtype)
            if not output_hidden_states:
                embeds: Tensor = encoder(seen).image_embeds
                return torch.stack([embeds, torch.zeros_like(embeds)])
            both = [encoder(x, output_hidden_states=True).hidden_states[-2] for x in (seen, torch.zeros_like(seen))]
            return torch.stack(both)

        found = retry_in_float32("image encoder", encoder, run).to(device or execution_device(encoder))
        positive, negative = found.repeat_interleave(num_images_per_prompt, dim=1)
        return positive, negative

    def prepare_ip_adapter_image_embeds(
        self,
        ip_adapter_image: Any,
        ip_adapter_image_embeds: list[Tensor] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
    ) -> list[Tensor]:
        """Encode images for the UNet, or check and repeat embeds that were made before by this function.

        Args:
            ip_adapter_image: One for each adapter, or for each a list; one image for one adapter.
            ip_adapter_image_embeds: Instead of images, for each adapter (B, images, C) or, for Plus, (B, images, M, C);
                with guidance the negative ones come first, in twice as many rows.
            device: Where the result shall be.
            num_images_per_prompt: The rows are repeated that often.
            do_classifier_free_guidance: Put negative embeds before the others.

        Returns:
            A tensor for each adapter, as the UNet takes them in `added_cond_kwargs={"image_embeds": …}`.
        """
        checks.either("ip_adapter_image", ip_adapter_image, "ip_adapter_image_embeds", ip_adapter_image_embeds)
        layers = projections(self.unet)
        name = "ip_adapter_image_embeds" if ip_adapter_image is None else "ip_adapter_image"
        given = ip_adapter_image_embeds if ip_adapter_image is None else ip_adapter_image
        given = given if isinstance(given, (list, tuple)) else [given]
        if len(given) != len(layers):
            raise ValueError(
                f"{name}: {len(given)} for {len(layers)} IP-Adapters; expected one for each (several images for one "
                "adapter are a list in the list)"
            )
        halves = 2 if do_classifier_free_guidance else 1
        prepared = []
        for one, layer in zip(given, layers, strict=True):
            if ip_adapter_image is None:
                both = _checked(one, layer, halves).chunk(halves)
            else:
                positive, negative = self.encode_image(one, device, 1, layer.takes_hidden_states)
                both = (negative[None], positive[None])[-halves:]
            repeated = [half.repeat(num_images_per_prompt, *[1] * (half.ndim - 1)) for half in both]
            prepared.append(torch.cat(repeated).to(device or execution_device(self.unet)))
        return prepared

    def _image_embeds(self, image: Any, embeds: Any, of_prompt: list[int]) -> ImageEmbeds:
        """The image embeds of a call, a row for each picture of the batch."""
        if not projections(self.unet):
            if image is not None or embeds is not None:
                name = "ip_adapter_image" if image is not None else "ip_adapter_image_embeds"
                raise ValueError(f"{name} was given, but no IP-Adapter is loaded; expected None")
            return ImageEmbeds([])
        guided, found = self.do_classifier_free_guidance, []
        for tensor in self.prepare_ip_adapter_image_embeds(image, embeds, do_classifier_free_guidance=guided):
            rows = torch.stack(tensor.chunk(2 if guided else 1), dim=1)
            if len(rows) not in (1, max(of_prompt) + 1, len(of_prompt)):
                raise ValueError(
                    f"ip_adapter_image_embeds: {len(rows)} rows for {len(of_prompt)} pictures; expected one, or "
                    "one for each prompt or picture"
                )
            of_one = [0] * len(of_prompt) if len(rows) == 1 else of_prompt
            found.append(rows if len(rows) == len(of_prompt) else rows[of_one])
        return ImageEmbeds(found)


class ImageEmbeds:
    """Image embeds of a batch: for each adapter (B, halves, images, …), the negative half first; perhaps for none."""

    def __init__(self, embeds: list[Tensor]) -> None:
        self.embeds = embeds

    def to(self, dtype: torch.dtype) -> ImageEmbeds:
        """In another dtype."""
        return ImageEmbeds([embeds.to(dtype) for embeds in self.embeds])

    def reordered(self, order: list[int]) -> ImageEmbeds:
        """With the pictures in another order."""
        return ImageEmbeds([embeds[order] for embeds in self.embeds])

    def arguments(self, count: int, guided: bool) -> dict[str, Any]:
        """What the UNet gets for the first `count` pictures; without guidance the last half, even if there was some."""
        if not self.embeds:
            return {}
        wanted = [embeds[:count, -2 if guided else -1 :].transpose(0, 1).flatten(0, 1) for embeds in self.embeds]
        return {"added_cond_kwargs": {"image_embeds": wanted}}


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
