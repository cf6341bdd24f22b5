"""Words as prompts: strings to the prompt embeds that the UNet attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sdedit.inputs import checks, prompts, weighting
from sdedit.models.adapters import scaled
from sdedit.noise import retry_in_float32


@dataclass(frozen=True)
class Reader:
    """What reads prompts.

    Attributes:
        tokenizer, text_encoder: The pipeline's; `None` if it has none.
        adapter_scale: Strength of the text encoder's adapters; `None` leaves it.
        weighted: Read weights and prompts of any length, see `weighting`.
    """

    tokenizer: Any
    text_encoder: Any
    adapter_scale: float | None = None
    weighted: bool = False

    def length(self, texts: Sequence[str]) -> int | None:
        """Tokens that the longest of these prompts needs; `None` if all are read to the same length."""
        return weighting.length(self.tokenizer, texts) if self.weighted and self.tokenizer is not None else None

    def read(self, texts: Sequence[str], clip_skip: int | None = None, length: int | None = None) -> Tensor:
        """Prompt embeds (B, M, D) of texts; M is `length`, if it is given."""
        if self.text_encoder is None or self.tokenizer is None:
            raise ValueError("prompt: this pipeline has no text encoder; pass prompt_embeds and negative ones")
        encode = weighting.encode if self.weighted else prompts.encode_texts
        with scaled(self.text_encoder, self.adapter_scale):
            return retry_in_float32(
                "text encoder",
                self.text_encoder,
                lambda encoder, _: encode(self.tokenizer, encoder, texts, clip_skip, length),
            )


def negative_embeds(reader: Reader, texts: list[str], embeds: Tensor | None, like: Tensor) -> Tensor:
    """Negative prompt embeds for each of the prompt embeds `like`, (B, M, D).

    Args:
        texts: One for all, or one for each; not read if there are embeds.
        embeds: Made before, for one or for each.

    Raises:
        ValueError: They do not go with the prompts.
    """
    count, length, width = like.shape
    if embeds is None:
        if len(texts) not in (1, count):
            raise ValueError(f"negative_prompt: {len(texts)} of them for {count} prompts; expected one, or as many")
        embeds = reader.read(texts, None, length)
    embeds = checks.embeds("negative_prompt_embeds", embeds, width)
    if len(embeds) == 1:
        embeds = embeds.expand(count, -1, -1)
    if embeds.shape[:2] != (count, length):
        raise ValueError(
            f"negative_prompt_embeds: {list(embeds.shape)}; expected the shape of prompt_embeds, {list(like.shape)}"
        )
    return embeds
