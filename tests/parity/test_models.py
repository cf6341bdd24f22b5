"""Our networks with diffusers' weights give diffusers' results, for every shape that their configs can describe."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker as TheirChecker
from transformers import CLIPConfig

from conftest import SHARED, UNET, VAE, needs_shared
from sdedit import AutoencoderKL, AutoencoderTiny, StableDiffusionSafetyChecker, UNet2DConditionModel
from sdedit.models.attention import attention
from sdedit.safety import check_safety

UNETS: dict[str, dict[str, Any]] = {
    "sd1": {},
    "linear, heads a block": dict(use_linear_projection=True, attention_head_dim=[4, 8]),
    "upcast": dict(upcast_attention=True, use_linear_projection=True),
    "lcm": dict(time_cond_proj_dim=24),
    "no middle": dict(mid_block_type=None),
    "only cross": dict(only_cross_attention=True),
    "only cross in one block": dict(only_cross_attention=[True, False]),
    "layers a block": dict(layers_per_block=[1, 3]),
    "transformers a block": dict(
        transformer_layers_per_block=[2, 1],
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
    ),
    "centred": dict(center_input_sample=True),
    "odd settings": dict(
        freq_shift=1,
        flip_sin_to_cos=False,
        norm_eps=1e-3,
        act_fn="gelu",
        mid_block_scale_factor=1.5,
        downsample_padding=1,
    ),
    "attention everywhere, three levels": dict(
        block_out_channels=(16, 32, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=[2, 4, 8],
    ),
}


def same_weights(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    """Random weights, biases and norms included, in both; names and shapes must be the same."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.eval(), ours.eval()


def unets(config: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**{**UNET, **config})
    ours = UNet2DConditionModel.from_config(theirs.config)
    same_weights(theirs, ours)
    return theirs, ours


@torch.no_grad()
@pytest.mark.parametrize("name", UNETS)
def test_unet(name: str) -> None:
    theirs, ours = unets(UNETS[name])
    generator = torch.Generator().manual_seed(2)
    for height, width, timestep in ((8, 8, 500), (7, 11, torch.tensor([3, 999])), (6, 4, 12.5)):
        sample = torch.randn(2, 4, height, width, generator=generator)
        text = torch.randn(2, 5, 32, generator=generator)
        dim = theirs.config.time_cond_proj_dim
        condition = None if dim is None else torch.randn(2, dim, generator=generator)
        want = theirs(sample, timestep, text, timestep_cond=condition).sample
        got = ours(sample, timestep, text, timestep_cond=condition)
        torch.testing.assert_close(got.sample, want, atol=2e-5, rtol=1e-5)
        assert torch.equal(ours(sample, timestep, text, timestep_cond=condition, return_dict=False)[0], got.sample)


@torch.no_grad()
def test_unet_takes_the_residuals_of_a_controlnet() -> None:
    theirs, ours = unets({})
    controlnet = diffusers.ControlNetModel.from_unet(theirs)
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block):
        torch.nn.init.normal_(block.weight)
    sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    down, mid = controlnet(sample, 10, text, torch.rand(1, 3, 64, 64), return_dict=False)
    extra = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
    want = theirs(sample, 10, text, **extra).sample
    assert (want - theirs(sample, 10, text).sample).abs().max() > 0.1
    torch.testing.assert_close(ours(sample, 10, text, **extra).sample, want, atol=2e-5, rtol=1e-5)


SD21 = dict(
    sample_size=96,
    attention_head_dim=[5, 10, 20, 20],
    cross_attention_dim=1024,
    use_linear_projection=True,
    upcast_attention=True,
    dual_cross_attention=False,
    num_class_embeds=None,
)


@pytest.mark.parametrize("model", ["sd1", "sd2", "vae"])
def test_names_and_shapes_of_the_published_models(model: str) -> None:
    if model != "sd2" and not SHARED.is_dir():
        pytest.skip("../shared is not here")
    path = SHARED / "data/sd15" / {"vae": "vae", "sd1": "unet"}.get(model, "") / "config.json"
    config = SD21 if model == "sd2" else json.loads(path.read_text())
    kind = "AutoencoderKL" if model == "vae" else "UNet2DConditionModel"
    with torch.device("meta"):
        theirs = getattr(diffusers, kind).from_config(config)
        ours = {"AutoencoderKL": AutoencoderKL, "UNet2DConditionModel": UNet2DConditionModel}[kind].from_config(config)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    heads = [{k: m.heads for k, m in model.named_modules() if hasattr(m, "heads")} for model in (ours, theirs)]
    assert heads[0] == heads[1]


@needs_shared
def test_a_config_from_2022_has_no_scaling_factor() -> None:
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(SHARED / "data/sd15/vae")
    assert vae.config.scaling_factor == 0.18215


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {},
        dict(layers_per_block=2, latent_channels=8, act_fn="relu"),
        dict(use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False),
    ],
)
def test_vae(config: dict[str, Any]) -> None:
    theirs = diffusers.AutoencoderKL(**{**VAE, **config})
    ours = AutoencoderKL.from_config(theirs.config)
    same_weights(theirs, ours)
    pixels = torch.rand(2, 3, 64, 32) * 2 - 1
    want, got = theirs.encode(pixels).latent_dist, ours.encode(pixels).latent_dist
    for part in ("mean", "logvar", "std", "var"):
        torch.testing.assert_close(getattr(got, part), getattr(want, part), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got.kl(), want.kl(), atol=1e-2, rtol=1e-4)
    seeded = [torch.Generator().manual_seed(3) for _ in range(2)]
    latents = want.sample(seeded[0])
    torch.testing.assert_close(got.sample(seeded[1]), latents, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.decode(latents).sample, theirs.decode(latents).sample, atol=5e-5, rtol=1e-4)
    torch.testing.assert_close(ours(pixels).sample, theirs(pixels).sample, atol=5e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        {},
        dict(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 2, 1),
            num_decoder_blocks=(1, 1, 2),
            latent_channels=3,
            act_fn="silu",
        ),
    ],
)
def test_tiny_vae(config: dict[str, Any]) -> None:
    theirs = diffusers.AutoencoderTiny(**config)
    ours = AutoencoderTiny.from_config(theirs.config)
    same_weights(theirs, ours)
    pixels = torch.rand(2, 3, 32, 24) * 2 - 1
    latents = theirs.encode(pixels).latents
    torch.testing.assert_close(ours.encode(pixels).latents, latents, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.decode(latents).sample, theirs.decode(latents).sample, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(ours.scale_latents(latents), theirs.scale_latents(latents))
    torch.testing.assert_close(ours.unscale_latents(latents), theirs.unscale_latents(latents))
    torch.testing.assert_close(ours(pixels).sample, theirs(pixels).sample, atol=0.05, rtol=0.05)  # 8-bit in between


VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)


def clip_config() -> CLIPConfig:
    return CLIPConfig(vision_config=VISION, text_config=dict(hidden_size=32, num_hidden_layers=1), projection_dim=16)


@torch.no_grad()
def test_safety_checkers_flag_the_same_pictures() -> None:
    torch.manual_seed(0)
    theirs, ours = TheirChecker(clip_config()).eval(), StableDiffusionSafetyChecker(clip_config()).eval()
    seen = 3 * torch.randn(64, 3, 32, 32)
    for name in ("concept_embeds", "special_care_embeds"):
        getattr(theirs, name).copy_(torch.randn(getattr(theirs, name).shape))
    embeds = torch.nn.functional.normalize(theirs.visual_projection(theirs.vision_model(seen)[1]))
    for name, quantile in (("concept_embeds", 0.97), ("special_care_embeds", 0.5)):
        scores = embeds @ torch.nn.functional.normalize(getattr(theirs, name)).T
        getattr(theirs, f"{name}_weights").copy_(scores.quantile(quantile, dim=0))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    pictures = torch.rand(64, 3, 4, 4) + 0.1
    want, flags = theirs(clip_input=seen, images=[np.asarray(p) for p in pictures])
    got, ours_flags = ours(clip_input=seen, images=pictures)
    assert ours_flags == flags
    assert 5 < sum(flags) < 59  # neither all nor none, or the test shows nothing
    np.testing.assert_array_equal(got.numpy(), np.stack(want))
    # The special concepts matter: without them fewer are flagged.
    ours.special_care_embeds_weights.fill_(2)
    assert sum(ours.flag(seen)) < sum(flags)


def test_originals_are_kept_from_a_checker_that_blackens_in_place() -> None:
    """As diffusers' own does."""
    theirs = TheirChecker(clip_config()).eval()
    torch.nn.init.constant_(theirs.concept_embeds_weights, -2)
    pixels = torch.rand(2, 3, 8, 8) + 0.1
    before = pixels.clone()
    seen = SimpleNamespace(pixel_values=torch.randn(2, 3, 32, 32))
    with pytest.warns(UserWarning, match="flagged 2 of 2"):
        checked, flags = check_safety(pixels, theirs, lambda pictures, return_tensors: seen)
    assert flags == [True, True] and not checked.any() and torch.equal(pixels, before)


def test_upcast_attention_computes_in_float32() -> None:
    q, k, v = (4 * torch.randn(3, 2, 16, 32, generator=torch.Generator().manual_seed(0))).bfloat16()
    exact = attention(q.float(), k.float(), v.float(), 4)
    upcast = attention(q, k, v, 4, upcast=True)
    assert upcast.dtype == torch.bfloat16 and torch.equal(upcast, exact.bfloat16())
    assert not torch.equal(attention(q, k, v, 4), upcast)


def test_configs_of_other_models_are_refused() -> None:
    for key, value in (
        ("addition_embed_type", "text_time"),
        ("class_embed_type", "timestep"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("down_block_types", ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"]),
        ("attention_head_dim", [4, 4, 4]),
        ("cross_attention_dim", [32, 32]),
        ("act_fn", "tanh"),
    ):
        with pytest.raises(ValueError, match=key):
            UNet2DConditionModel.from_config({**UNET, key: value})
    for key, value in (("up_block_types", ["AttnUpDecoderBlock2D"] * 4), ("shift_factor", 0.1)):
        with pytest.raises(ValueError, match=key):
            AutoencoderKL.from_config({**VAE, key: value})
