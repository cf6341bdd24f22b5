"""The prompt-weighting tool compel works with the pipeline as it does with diffusers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from compel import Compel

from conftest import picture


@torch.no_grad()
def test_compel_gives_the_same_picture_in_both(pipe: Any, folder: Path) -> None:
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    pictures = []
    for one in (pipe, theirs):
        compel = Compel(tokenizer=one.tokenizer, text_encoder=one.text_encoder)
        out = one(
            prompt_embeds=compel("a (cat)1.4 and apple++"),
            negative_prompt_embeds=compel("blurry--"),
            image=picture(),
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
        pictures.append(out.images)
    assert np.abs(pictures[0] - pictures[1]).max() < 1e-3
