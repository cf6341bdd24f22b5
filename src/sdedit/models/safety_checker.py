"""The safety checker that SD 1.x folders carry: CLIP's view of the picture against 17 concepts with thresholds."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionModel, PreTrainedModel

# What every threshold loses once a picture is near one of the special concepts.
_SPECIAL_CARE = 0.01


class StableDiffusionSafetyChecker(PreTrainedModel):
    """Says which pictures are near a concept that its weights hold (names are not published)."""

    config_class = CLIPConfig
    main_input_name = "clip_input"

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.vision_model = CLIPVisionModel(config.vision_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(17, config.projection_dim), requires_grad=False)
        self.special_care_embeds = nn.Parameter(torch.ones(3, config.projection_dim), requires_grad=False)
        self.concept_embeds_weights = nn.Parameter(torch.ones(17), requires_grad=False)
        self.special_care_embeds_weights = nn.Parameter(torch.ones(3), requires_grad=False)
        self.post_init()

    @torch.no_grad()
    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, list[bool]]:
        """Blacken what is near a concept.

        Args:
            clip_input: Pixels for CLIP, (B, 3, 224, 224).
            images: The B pictures, a tensor or a list of arrays or tensors; not changed.

        Returns:
            The pictures, black where one was flagged, and the B flags.
        """
        flags = self.flag(clip_input)
        if isinstance(images, Tensor):
            keep = torch.tensor([not f for f in flags], device=images.device, dtype=images.dtype)
            return images * keep.view(-1, *[1] * (images.ndim - 1)), flags
        return [image * 0 if flagged else image for image, flagged in zip(images, flags, strict=True)], flags

    def flag(self, clip_input: Tensor) -> list[bool]:
        """One flag a picture: is a concept's cosine similarity above its threshold?"""
        embeds = self.visual_projection(self.vision_model(clip_input)[1])
        special = _above(embeds, self.special_care_embeds, self.special_care_embeds_weights)
        concepts = _above(embeds, self.concept_embeds, self.concept_embeds_weights)
        lowered = torch.zeros_like(concepts[:, :1])  # by how much a special concept has lowered all later thresholds
        for i in range(special.shape[1]):
            lowered = torch.where(_rounded(special[:, i : i + 1] + lowered) > 0, _SPECIAL_CARE, lowered)
        flagged: list[bool] = (_rounded(concepts + lowered) > 0).any(dim=1).tolist()
        return flagged


def _rounded(scores: Tensor) -> Tensor:
    """To three decimals, as the thresholds were made for."""
    return torch.round(scores, decimals=3)


def _above(embeds: Tensor, concepts: Tensor, thresholds: Tensor) -> Tensor:
    """Cosine similarity less the threshold, (B, concepts), in float32."""
    similarity = F.normalize(embeds.float()) @ F.normalize(concepts.float()).T
    return similarity - thresholds.float()
