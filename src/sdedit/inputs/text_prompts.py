"""Words as prompts: strings to the prompt embeds that the UNet attends to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sdedit.inputs import checks, prompts, weighting
from sdedit.models.adapters import scaled
from sdedit.noise import retry_in_float32


class TextPrompts:
    """The part of a pipeline that makes prompt embeds; `ImagePrompts` makes those of images."""

    unet: Any
    text_encoder: Any
    tokenizer: Any
    device: Any  # the pipeline's property

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | str | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        prompt_weighting: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Encode prompts, or pass on embeds that were made before.

        Args:
            prompt, negative_prompt: Strings, or lists of them; a single negative prompt serves all prompts.
            num_images_per_prompt: Each is repeated that often.
            do_classifier_free_guidance: Without it there are no negative embeds.
            lora_scale: Strength of the text encoder's adapters.
            clip_skip: Leave out that many of the last layers (of the prompt; the negative one is read in full).
            prompt_weighting: Read weights and prompts of any length, see `sdedit.inputs.weighting`.

        Returns:
            Prompt embeds and negative prompt embeds, (B·num_images_per_prompt, M, C) each.
        """
        checks.either("prompt", prompt, "prompt_embeds", prompt_embeds)
        if negative_prompt is not None and negative_prompt_embeds is not None:
            checks.either("negative_prompt", negative_prompt, "negative_prompt_embeds", negative_prompt_embeds)
        if clip_skip is not None:
            checks.whole_number("clip_skip", clip_skip, 0)
        texts = [] if prompt is None else checks.prompts("prompt", prompt)
        negative = checks.prompts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        width, dtype, device = self.unet.config.cross_attention_dim, self.unet.dtype, device or self.device

        def encode(texts: list[str], clip_skip: int | None, length: int | None) -> Tensor:
            if self.text_encoder is None or self.tokenizer is None:
                raise ValueError("prompt: this pipeline has no text encoder; pass prompt_embeds and negative ones")
            encoding = weighting.encode if prompt_weighting else prompts.encode_texts
            parts = (self.tokenizer, self.text_encoder, texts, clip_skip, length)
            with scaled(self.text_encoder, lora_scale):
                return retry_in_float32("text encoder", self.text_encoder, lambda dtype: encoding(*parts))

        if prompt_embeds is None:
            # Prompt and negative prompt must have the same length; weighted ones may have any.
            longest = weighting.length(self.tokenizer, [*texts, *negative]) if prompt_weighting else None
            prompt_embeds = encode(texts, clip_skip, longest)
        prompt_embeds = checks.embeds("prompt_embeds", prompt_embeds, width).to(device, dtype)
        prompt_embeds = prompt_embeds.repeat_interleave(num_images_per_prompt, 0)
        if not do_classifier_free_guidance:
            return prompt_embeds, None

        count, length = len(prompt_embeds) // num_images_per_prompt, prompt_embeds.shape[1]
        if negative_prompt_embeds is None:
            if len(negative) not in (1, count):
                raise ValueError(
                    f"negative_prompt: {len(negative)} of them for {count} prompts; expected one, or as many"
                )
            negative_prompt_embeds = encode(negative, None, length)
        negative_prompt_embeds = checks.embeds("negative_prompt_embeds", negative_prompt_embeds, width)
        if len(negative_prompt_embeds) == 1:
            negative_prompt_embeds = negative_prompt_embeds.expand(count, -1, -1)
        if negative_prompt_embeds.shape[:2] != (count, length):
            raise ValueError(
                f"negative_prompt_embeds: {list(negative_prompt_embeds.shape)}; "
                f"expected the shape of prompt_embeds, {[count, length, width]}"
            )
        return prompt_embeds, negative_prompt_embeds.to(device, dtype).repeat_interleave(num_images_per_prompt, 0)
