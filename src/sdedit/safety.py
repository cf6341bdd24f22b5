"""The safety checker's place in the pipeline: what it flags is made black, and the originals are kept."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn

from sdedit.inputs.images import write_images
from sdedit.models.offload import execution_device


def check_safety(pixels: Tensor, checker: Any, feature_extractor: Any) -> tuple[Tensor, list[bool] | None]:
    """Show the pictures to the safety checker.

    Args:
        pixels: (B, 3, H, W) in [0, 1]; not changed.
        checker: The model's `StableDiffusionSafetyChecker`, or `None`.
        feature_extractor: Makes CLIP's input of pictures.

    Returns:
        Pixels with what was flagged made black, and a flag for each picture; `None` without a checker.
    """
    if checker is None:
        return pixels, None
    seen = feature_extractor(write_images(pixels, "pil", [None] * len(pixels)), return_tensors="pt")
    clip_input = seen.pixel_values
    if isinstance(checker, nn.Module):  # not a function in its place
        clip_input = clip_input.to(execution_device(checker), next(checker.parameters()).dtype)
    # A copy: the ecosystem's checkers blacken in place.
    checked, flags = checker(clip_input=clip_input, images=pixels.clone())
    if any(flags):
        warnings.warn(
            f"the safety checker flagged {sum(flags)} of {len(flags)} pictures and made them black; "
            "the originals are in .original_images, and safety_checker=None turns it off",
            stacklevel=6,
        )
    return checked, [bool(flag) for flag in flags]
