"""The networks: their configs, their weights at the beginning, and the pipeline made of them.

A training begins with new networks, or, where the work folder has `start/` (a model folder, put there by
`run.py --start FOLDER`), with the weights and the tokenizer of that one.
"""

import copy
import shutil
from functools import cache
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from data import SIZE
from loop import read_state
from paths import work_folder
from sdedit import DDIMScheduler, StableDiffusionImg2ImgPipeline
from sdedit.apps.finetune.objective import Denoiser
from sdedit.models.unet import UNet2DConditionModel
from sdedit.models.vae import AutoencoderKL
from words import learned_tokenizer, text_config

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 64, 96, 128],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "sample_size": SIZE,
    # Latents of deviation 1 become deviation 2. 16x16 values drown in noise sooner than 64x64 do; at twice the size a
    # strength keeps about as much of a doodle as users of Stable Diffusion expect.
    "scaling_factor": 2.0,
}
UNET = {
    "sample_size": 16,
    "in_channels": 8,
    "out_channels": 8,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [128, 192, 192],
    "layers_per_block": 1,
    "cross_attention_dim": 192,
    "attention_head_dim": 4,  # the number of heads, under its published name
    "norm_num_groups": 32,
}
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
    "timestep_spacing": "leading",
}


def start_folder() -> Path | None:
    """The model to begin with, if there is one."""
    folder = work_folder() / "start"
    return folder if folder.exists() else None


def set_start(folder: Path) -> None:
    """Copy a model folder, to begin with it from now on; a copy, since `export.py` may write over the model itself."""
    part = work_folder() / "start.part"
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(folder, part)
    part.rename(work_folder() / "start")


@cache
def _start() -> StableDiffusionImg2ImgPipeline | None:
    folder = start_folder()
    return None if folder is None else StableDiffusionImg2ImgPipeline.from_pretrained(folder)


def tokenizer() -> CLIPTokenizer:
    """The start's, else the one learned from the captions (learned now if it is missing)."""
    start = _start()
    return learned_tokenizer() if start is None else start.tokenizer


def new_vae() -> AutoencoderKL:
    """The autoencoder as training begins with it."""
    start = _start()
    vae = AutoencoderKL(**VAE) if start is None else copy.deepcopy(start.vae)
    return vae.float().requires_grad_(True).to(memory_format=torch.channels_last)


def new_denoiser() -> Denoiser:
    """UNet and text encoder as training begins with them."""
    start = _start()
    if start is None:
        denoiser = Denoiser(UNet2DConditionModel(**UNET), CLIPTextModel(text_config(tokenizer())))
    else:
        denoiser = copy.deepcopy(Denoiser(start.unet, start.text_encoder))
    denoiser.unet.to(memory_format=torch.channels_last)
    return denoiser.float().requires_grad_(True)


def averaged(model: torch.nn.Module, file: Path) -> torch.nn.Module:
    """The model with the averaged weights of a training's file, if there is one; ready for use."""
    if file.exists():
        model.load_state_dict(read_state(file)["average"], strict=False)
    return model.eval().requires_grad_(False)


def pipeline(vae: AutoencoderKL, denoiser: Denoiser) -> StableDiffusionImg2ImgPipeline:
    """The parts as one pipeline, in float32."""
    pipe = StableDiffusionImg2ImgPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=tokenizer(),
        unet=denoiser.unet,
        scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
