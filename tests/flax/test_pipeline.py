"""Whole pictures: against the PyTorch pipeline given the same noise, and what must hold of the call itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from conftest import picture
from sdedit import schedulers
from sdedit.flax.schedulers import flax_class
from sdedit.schedulers.names import CLASS_NAMES

STEPS, STRENGTH = 6, 0.7


def with_scheduler(pipe: Any, name: str, **options: Any) -> Any:
    other = copy.copy(pipe)
    other.scheduler = flax_class(name).from_config(pipe.scheduler.config, **options)
    return other


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_pictures_are_those_of_pytorch(
    flax: Any, pipe: Any, image: Image.Image, same_noise: Callable[..., None], name: str
) -> None:
    jax_pipe, params = flax
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe.scheduler = getattr(schedulers, name).from_config(pipe.scheduler.config, **options)
    key = jax.random.key(3)
    same_noise(pipe, key)
    settings = {"strength": STRENGTH, "num_inference_steps": STEPS, "guidance_scale": 4.0}
    expected = pipe("a cat", image, negative_prompt="apple", output_type="np", **settings).images
    ids, pixels = jax_pipe.prepare_inputs("a cat", image)
    ours = with_scheduler(jax_pipe, name, **options)(
        ids, pixels, params, key, neg_prompt_ids=jax_pipe.prepare_text_inputs("apple"), **settings
    ).images
    assert ours.shape == expected.shape == (1, image.height, image.width, 3)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


@pytest.fixture
def call(flax: Any, image: Image.Image) -> Callable[..., Any]:
    pipe, params = flax
    ids, pixels = pipe.prepare_inputs("a cat", image)

    def run(
        params: Any = params, key: Any = 0, pipe: Any = pipe, ids: Any = ids, pixels: Any = pixels, **other: Any
    ) -> Any:
        settings = {"strength": STRENGTH, "num_inference_steps": STEPS, "guidance_scale": 4.0, **other}
        return pipe(ids, pixels, params, key, **settings)

    return run


def test_nothing_but_a_shape_compiles_again(flax: Any, call: Callable[..., Any]) -> None:
    pipe, _ = flax
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: compilations.append(event) if event.endswith("backend_compile_duration") else None
    )
    euler = with_scheduler(pipe, "EulerDiscreteScheduler")
    call(pipe=euler)
    call(strength=0.2)
    compilations.clear()
    ancestral = with_scheduler(pipe, "EulerAncestralDiscreteScheduler")
    plain = call()
    pictures = [
        call(strength=0.9),
        call(strength=0.0),
        call(num_inference_steps=20),
        call(key=1),
        call(key=jax.random.key(2)),
        call(guidance_scale=9.0),
        call(guidance_scale=np.array([1.5])),
        call(ids=pipe.prepare_text_inputs("an apple")),
        call(neg_prompt_ids=pipe.prepare_text_inputs("an apple")),
        call(pipe=ancestral),  # of the same history: one prediction
        call(pipe=with_scheduler(pipe, "LCMScheduler")),
    ]
    assert compilations == []
    for i, other in enumerate(pictures):
        assert np.abs(other.images - plain.images).max() > 1e-3, i
    call(pixels=np.zeros((1, 3, 8, 8), np.float32))
    assert len(compilations) >= 3  # encode, denoise, decode: the listener does count


def test_guidance_for_each_image(flax: Any, call: Callable[..., Any], image: Image.Image) -> None:
    pipe, _ = flax
    ids, pixels = pipe.prepare_inputs(["a cat", "an apple"], [image, picture(16, 12, seed=1)])
    noise = jax.random.normal(jax.random.key(5), (2, 4, 6, 8))
    both = call(ids=ids, pixels=pixels, noise=noise, guidance_scale=[2.0, 8.0]).images
    for i, scale in enumerate([2.0, 8.0]):
        alike = call(ids=ids, pixels=pixels, noise=noise, guidance_scale=scale).images
        np.testing.assert_array_equal(alike[i], both[i])
        assert np.abs(alike[1 - i] - both[1 - i]).max() > 1e-3


def test_the_seed_draws_sample_and_noise_as_diffusers_does(flax: Any, call: Callable[..., Any]) -> None:
    noise = jax.random.normal(jax.random.PRNGKey(7), (1, 4, 6, 8))
    np.testing.assert_allclose(call(key=jax.random.PRNGKey(7)).images, call(key=7, noise=noise).images, atol=1e-5)
    with pytest.raises(ValueError, match=r"noise: shape \[1, 4, 6, 9\]; expected \[1, 4, 6, 8\]"):
        call(noise=np.zeros((1, 4, 6, 9)))


def test_seeds_of_every_library_are_seeds(call: Callable[..., Any]) -> None:
    expected = call(key=7).images
    for seed in (np.int64(7), np.uint8(7), np.array(7)[()]):
        np.testing.assert_array_equal(call(key=seed).images, expected)
    drawn = {seed: call(key=seed).images.tobytes() for seed in (0, 7, 2**32, 2**32 + 7, 2**64 - 1)}
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize("seed", [-1, 2**64, 0.5, None, "7", True])
def test_what_is_no_seed_is_refused(call: Callable[..., Any], seed: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"prng_seed=.*; expected"):
        call(key=seed)


def test_bfloat16(folder: Path, call: Callable[..., Any], image: Image.Image) -> None:
    from sdedit import FlaxStableDiffusionImg2ImgPipeline

    half, params = FlaxStableDiffusionImg2ImgPipeline.from_pretrained(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params["unet"])} == {jnp.dtype("bfloat16")}
    images = call(pipe=half, params=params).images
    assert images.dtype == np.float32
    assert 0 < np.abs(images - call().images).max() < 0.1


def test_strength_zero_is_the_round_trip(flax: Any, call: Callable[..., Any], image: Image.Image) -> None:
    pipe, params = flax
    vae, p = pipe.vae, {"params": params["vae"]}
    _, pixels = pipe.prepare_inputs("", image)
    latents = vae.apply(p, pixels, method=vae.encode).latent_dist.sample(jax.random.key(0))
    expected = vae.apply(p, latents.transpose(0, 3, 1, 2), method=vae.decode).sample
    np.testing.assert_allclose(
        call(strength=0.0).images, (expected / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1), atol=1e-4
    )


def test_a_folder_of_flax_models(flax: Any, call: Callable[..., Any], tmp_path: Path) -> None:
    from sdedit import FlaxStableDiffusionImg2ImgPipeline

    pipe, params = flax
    with_scheduler(pipe, "PNDMScheduler", skip_prk_steps=True).save_pretrained(tmp_path, params)
    assert (tmp_path / "text_encoder/flax_model.msgpack").is_file()
    again, read = FlaxStableDiffusionImg2ImgPipeline.from_pretrained(tmp_path)
    assert type(again.scheduler).__name__ == "FlaxPNDMScheduler" and "FlaxUNet2DConditionModel" in repr(again)
    expected = call(pipe=with_scheduler(pipe, "PNDMScheduler", skip_prk_steps=True)).images
    np.testing.assert_array_equal(call(pipe=again, params=read).images, expected)


def test_any_size_and_pil(flax: Any, call: Callable[..., Any]) -> None:
    pipe, _ = flax
    pixels = pipe.prepare_inputs("", picture(37, 41, mode="RGBA"))[1]
    images = call(pixels=pixels, num_inference_steps=2).images
    assert images.shape == (1, 41, 37, 3) and 0 <= images.min() <= images.max() <= 1
    assert pipe.numpy_to_pil(images)[0].size == (37, 41)
    tuple_of_two = call(pixels=pixels, num_inference_steps=2, return_dict=False)
    np.testing.assert_array_equal(tuple_of_two[0], images)
    assert tuple_of_two[1] is None


def test_schedulers_of_pytorch_serve_too(flax: Any, call: Callable[..., Any]) -> None:
    pipe, _ = flax
    other = copy.copy(pipe)
    other.scheduler = schedulers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    expected = call(pipe=with_scheduler(pipe, "EulerDiscreteScheduler")).images
    np.testing.assert_array_equal(call(pipe=other).images, expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strength": 1.2}, "strength=1.2; expected a number from 0 to 1"),
        ({"num_inference_steps": 0}, "num_inference_steps=0; expected a whole number of at least 1"),
        ({"height": 32}, "height=32; expected 12, that of the images"),
        ({"ids": np.zeros(77, int)}, r"prompt_ids: shape \[77\]; expected \(B, M\)"),
        ({"pixels": np.zeros((1, 48, 64, 3))}, r"image: shape \[1, 48, 64, 3\]; expected \(B, 3, H, W\)"),
        ({"ids": np.zeros((3, 77), int), "pixels": np.zeros((2, 3, 48, 64))}, r"image: shape \[2, 3, 48, 64\] for a b"),
        ({"jit": True}, r"prompt_ids: shape \[1, 77\]; expected \(devices, B, M\)"),
    ],
)
def test_errors_name_the_argument(call: Callable[..., Any], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**wrong)
