"""The networks: their configs, their weights at the beginning, and the pipeline made of them.

A training begins with new networks, or, where the work folder has `start/` (a model folder, put there by
`run.py --start FOLDER`), with the weights and the tokenizer of that one.
"""

import copy
import shutil
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d
from transformers import CLIPTextModel, CLIPTokenizer

from data import SIZE
from loop import read_state
from paths import work_folder
from sdedit import DDIMScheduler, StableDiffusionImg2ImgPipeline
from sdedit.apps.finetune.objective import Denoiser
from sdedit.models.tiny_vae import AutoencoderTiny
from sdedit.models.unet import UNet2DConditionModel
from sdedit.models.vae import AutoencoderKL, DiagonalGaussianDistribution
from words import learned_tokenizer, text_config

VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 5,
    "up_block_types": ["UpDecoderBlock2D"] * 5,
    "block_out_channels": [32, 32, 64, 96, 128],
    "layers_per_block": 1,
    "latent_channels": 8,
    "norm_num_groups": 8,
    "act_fn": "silu",
    "sample_size": SIZE,
    # Latents of deviation 1 become deviation 2. 16x16 values drown in noise sooner than 64x64 do; at twice the size a
    # strength keeps about as much of a doodle as users of Stable Diffusion expect.
    "scaling_factor": 2.0,
}
FACTOR = 16  # pixels a latent, along either side
TINY = {
    "encoder_block_out_channels": [24] * 5,
    "decoder_block_out_channels": [24] * 5,
    "num_encoder_blocks": [0, 1, 2, 3, 4],
    "num_decoder_blocks": [5, 5, 3, 1, 0],
    "latent_channels": 8,
    "scaling_factor": VAE["scaling_factor"],
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
    start = start_vae()
    vae = AutoencoderKL(**VAE) if start is None else grown(start)
    return vae.float().requires_grad_(True).to(memory_format=torch.channels_last)


def start_vae() -> AutoencoderKL | None:
    """The start's autoencoder, if there is a start."""
    start = _start()
    return None if start is None else start.vae


def smaller(vae: AutoencoderKL) -> bool:
    """Is it one of pictures half as wide?"""
    return len(vae.config.block_out_channels) < len(VAE["block_out_channels"])


def growing() -> bool:
    """Does training begin with such a one?"""
    start = start_vae()
    return start is not None and smaller(start)


def grown(small: AutoencoderKL) -> AutoencoderKL:
    """A copy; of one with a level less than ours, with a new finest level at either end, to be trained by `grow.py`."""
    if not smaller(small):
        return copy.deepcopy(small)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(**VAE)
    weights = small.state_dict()
    for name in [name for name in weights if name.startswith("encoder.down_blocks.")]:
        level = int(name.split(".")[2])
        weights[name.replace(f".{level}.", f".{level + 1}.", 1) + "*"] = weights.pop(name)
    weights = {name.removesuffix("*"): weight for name, weight in weights.items() if "encoder.conv_in" not in name}
    vae.load_state_dict(weights, strict=False)
    with torch.no_grad():  # what is new in the decoder lets pass what comes, at first
        wider = vae.decoder.up_blocks[-2].upsamplers[0].conv
        nn.init.dirac_(wider.weight)
        for layer in (wider, *(resnet.conv2 for resnet in vae.decoder.up_blocks[-1].resnets)):
            layer.bias.zero_()
        for resnet in vae.decoder.up_blocks[-1].resnets:
            resnet.conv2.weight.zero_()
    return vae


def new_tiny() -> AutoencoderTiny:
    """The tiny autoencoder as training begins with it: the start's, if it has one."""
    folder = start_folder()
    if folder is not None and (folder / "tiny_vae").exists():
        tiny = AutoencoderTiny.from_pretrained(folder, subfolder="tiny_vae")
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tiny = AutoencoderTiny(**TINY)
    return tiny.float().requires_grad_(True).to(memory_format=torch.channels_last)


def encoded(vae: AutoencoderKL | AutoencoderTiny, pictures: Tensor) -> DiagonalGaussianDistribution:
    """The latents' distribution of pictures (B, 3, H, W); an autoencoder with a level less sees them half as wide."""
    if isinstance(vae, AutoencoderTiny):
        latents = vae.encode(pictures).latents
        return DiagonalGaussianDistribution(torch.cat([latents, torch.full_like(latents, -30.0)], 1))
    return vae.encode(avg_pool2d(pictures, 2) if smaller(vae) else pictures).latent_dist


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
