"""The whole pipeline gives diffusers' pictures, to 1e-3 in float32 (about 1e-5 is reached)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback

import sdedit
from conftest import make_folder, picture

pytestmark = [
    # diffusers' own warnings about what its users pass.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

TOLERANCE = 1e-3
KINDS: dict[str, dict[str, Any]] = {
    "epsilon": {},
    "v_prediction": dict(prediction_type="v_prediction"),
    "sd2": dict(unet=dict(use_linear_projection=True, attention_head_dim=[4, 8], upcast_attention=True)),
    "lcm": dict(unet=dict(time_cond_proj_dim=16)),
    "tiny_vae": dict(tiny_vae=True),
}
SCHEDULERS = {
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "PNDMScheduler": dict(skip_prk_steps=True),
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": dict(timestep_spacing="trailing"),
    "DPMSolverMultistepScheduler": dict(algorithm_type="sde-dpmsolver++", use_karras_sigmas=True),
}
IMAGES = dict(a=picture(64, 48, 1), b=picture(64, 48, 2))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    root = tmp_path_factory.mktemp("kinds")

    @functools.cache
    def get(kind: str) -> Path:
        return make_folder(root / kind, **KINDS[kind])

    return get


@pytest.fixture(scope="module")
def pairs(folders: Any) -> Any:
    """A pipeline of each library from the folder of a kind, with a scheduler of the given class and config."""

    @functools.cache
    def load(kind: str) -> tuple[Any, Any]:
        theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folders(kind), safety_checker=None)
        ours = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(folders(kind))
        for pipe in (theirs, ours):
            pipe.set_progress_bar_config(disable=True)
        return theirs, ours

    def get(kind: str = "epsilon", scheduler: str = "DDIMScheduler") -> tuple[Any, Any]:
        for pipe, library in zip(load(kind), (diffusers, sdedit), strict=True):
            base = library.DDIMScheduler.from_pretrained(folders(kind), subfolder="scheduler")
            pipe.scheduler = getattr(library, scheduler).from_config(base.config, **SCHEDULERS[scheduler])
        return load(kind)

    return get


def seeded(count: int | None = None) -> Any:
    return (
        torch.Generator().manual_seed(7) if count is None else [torch.Generator().manual_seed(i) for i in range(count)]
    )


def error(a: Any, b: Any) -> float:
    """Greatest difference, where latents of a random network are far from 1 in relation to them."""
    a, b = (np.asarray([np.asarray(i) for i in x], dtype=np.float64) for x in (a, b))
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))


def compare(theirs: Any, ours: Any, generators: int | None = None, **arguments: Any) -> float:
    arguments = {"prompt": "an apple", "image": IMAGES["a"], "num_inference_steps": 4, "output_type": "np", **arguments}
    want = theirs(generator=seeded(generators), **arguments).images
    got = ours(generator=seeded(generators), **arguments).images
    assert type(got) is type(want)
    difference = error(got, want)
    print(f"parity {difference:.1e}")
    assert difference < (1.01 / 255 if arguments["output_type"] == "pil" else TOLERANCE)
    return difference


GRID = [
    (kind, scheduler, strength, steps, guidance)
    for i, (kind, scheduler) in enumerate(itertools.product(KINDS, SCHEDULERS))
    # Every pair of any two columns meets at least once.
    for strength, steps, guidance in [
        [(0.3, 7, 7.5), (0.5, 4, 1.0), (0.75, 7, 1.0), (1.0, 1, 7.5), (0.5, 7, 7.5), (1.0, 4, 7.5)][(i + i // 6) % 6],
        [(0.75, 4, 7.5), (1.0, 7, 7.5), (0.3, 4, 7.5), (0.3, 7, 1.0), (1.0, 1, 1.0), (0.75, 7, 7.5)][(i + i // 6) % 6],
    ]
]


@pytest.mark.parametrize(("kind", "scheduler", "strength", "steps", "guidance"), GRID)
def test_grid(pairs: Any, kind: str, scheduler: str, strength: float, steps: int, guidance: float) -> None:
    theirs, ours = pairs(kind, scheduler)
    arguments = dict(strength=strength, num_inference_steps=steps, guidance_scale=guidance)
    compare(theirs, ours, **arguments, output_type="latent" if steps == 4 else "np")


LATENTS = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(5))
ARRAYS = {name: np.asarray(image, dtype=np.float32) / 255 for name, image in IMAGES.items()}
TENSORS = {name: torch.from_numpy(array).permute(2, 0, 1) for name, array in ARRAYS.items()}
INPUTS: dict[str, Any] = {
    "pil": IMAGES["a"],
    "pil list": list(IMAGES.values()),
    "array": ARRAYS["a"][None],
    "arrays": list(ARRAYS.values()),
    "batch array": np.stack(list(ARRAYS.values())),
    "tensor": TENSORS["a"],
    "tensors": list(TENSORS.values()),
    "batch tensor": torch.stack(list(TENSORS.values())),
    "signed tensor": TENSORS["a"] * 2 - 1,
    "latents": LATENTS,
}


@pytest.mark.parametrize(("name", "output_type"), zip(INPUTS, itertools.cycle(["pil", "np", "pt", "latent"])))
def test_inputs_and_outputs(pairs: Any, name: str, output_type: str) -> None:
    image = INPUTS[name]
    many = 2 if isinstance(image, list) or "batch" in name else 1
    compare(*pairs(), image=image, prompt=["an apple", "a cat"][:many], output_type=output_type)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("generators", [None, 4])
def test_batches(pairs: Any, scheduler: str, generators: int | None) -> None:
    """One image, for diffusers repeats several images in another order than their prompts."""
    arguments = dict(
        prompt=["an apple", "a cat"], negative_prompt=["", "a pear"], num_images_per_prompt=2, guidance_scale=3.0
    )
    compare(*pairs("epsilon", scheduler), generators, **arguments)


def test_one_prompt_for_a_number_of_pictures(pairs: Any) -> None:
    compare(*pairs(), 3, num_images_per_prompt=3)
    compare(*pairs(), 2, prompt=["an apple", "a cat"], image=IMAGES["a"])


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_eta(pairs: Any, eta: float) -> None:
    compare(*pairs(), 2, num_images_per_prompt=2, eta=eta, num_inference_steps=7)


def test_prompts_and_embeds(pairs: Any) -> None:
    theirs, ours = pairs()
    compare(theirs, ours, negative_prompt="a cat", guidance_scale=4.0)
    want = theirs.encode_prompt(["an apple", "cat"], "cpu", 2, True, ["x", "y"])
    got = ours.encode_prompt(["an apple", "cat"], "cpu", 2, True, ["x", "y"])
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    embeds = torch.randn(2, 9, 32)
    compare(theirs, ours, prompt=None, prompt_embeds=embeds, negative_prompt_embeds=embeds.flip(1))
    compare(theirs, ours, prompt=None, prompt_embeds=embeds[:1], negative_prompt="a cat")
    compare(theirs, ours, negative_prompt_embeds=torch.randn(1, 77, 32))


def test_grids_of_ones_own(pairs: Any) -> None:
    compare(*pairs("epsilon", "DDPMScheduler"), timesteps=[900, 700, 300, 100, 10], strength=0.6)
    compare(*pairs("epsilon", "EulerDiscreteScheduler"), sigmas=[12.0, 5.0, 1.5, 0.2], strength=0.75)
    compare(*pairs("epsilon", "EulerDiscreteScheduler"), timesteps=[900, 400, 30], strength=1.0)


def test_callbacks(pairs: Any) -> None:
    theirs, ours = pairs()
    seen: list[list[Any]] = []

    def record(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen[-1].append((step, int(timestep), {k: None if v is None else v.clone() for k, v in tensors.items()}))
        return {"latents": tensors["latents"] * 0.9, "prompt_embeds": tensors["prompt_embeds"] * 1.1}

    arguments = dict(strength=0.75, negative_prompt="x", num_inference_steps=4)
    arguments |= dict(prompt="an apple", image=IMAGES["a"], callback_on_step_end=record, output_type="latent")
    arguments |= dict(callback_on_step_end_tensor_inputs=["latents", "prompt_embeds", "negative_prompt_embeds"])
    results = []
    for pipe in (theirs, ours):
        seen.append([])
        results.append(pipe(generator=seeded(), **arguments).images)
    assert error(results[1], results[0]) < 1e-4
    assert len(seen[0]) == 3
    for (i, t, a), (j, u, b) in zip(*seen, strict=True):
        assert (i, t, set(a)) == (j, u, set(b))
        assert all(error(b[name], a[name]) < 1e-4 for name in a)


def test_guidance_can_be_cut_off_by_a_callback(pairs: Any) -> None:
    def cut(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            pipe._guidance_scale = 0.0
            return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}
        return {}

    theirs, ours = pairs()
    common = dict(strength=1.0, num_inference_steps=6)
    compare(theirs, ours, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"], **common)
    compare(theirs, ours, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.4), **common)
    both = diffusers.callbacks.MultiPipelineCallbacks([SDCFGCutoffCallback(None, 2)])
    compare(theirs, ours, callback_on_step_end=both, **common)


def test_a_callback_can_stop_the_run(pairs: Any) -> None:
    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step == 1
        return {}

    compare(*pairs(), callback_on_step_end=stop, num_inference_steps=6, strength=1.0)


@pytest.mark.parametrize("clip_skip", [1, 2])
def test_clip_skip(pairs: Any, clip_skip: int) -> None:
    """diffusers' own does not run with transformers 5.6 and later; its formula: a hidden state and the final norm."""
    _, ours = pairs()
    ids = ours.tokenizer("an apple", padding="max_length", max_length=77, return_tensors="pt").input_ids
    hidden = ours.text_encoder(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 4
    want = ours.text_encoder.final_layer_norm(hidden[-(clip_skip + 1)])
    got, negative = ours.encode_prompt("an apple", clip_skip=clip_skip)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(negative, ours.encode_prompt("", do_classifier_free_guidance=False)[0])
    assert not torch.allclose(got, hidden[-1])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_components_are_exchanged(pairs: Any, scheduler: str) -> None:
    """Theirs in our pipeline, and ours in theirs."""
    theirs, ours = pairs("epsilon", scheduler)
    swapped = sdedit.StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    parts = {**theirs.components, "unet": ours.unet, "vae": ours.vae, "scheduler": ours.scheduler}
    back = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    for pipe in (swapped, back):
        pipe.set_progress_bar_config(disable=True)
    compare(theirs, swapped, strength=0.6, num_inference_steps=6)
    compare(back, ours, strength=0.6, num_inference_steps=6)


def test_the_default_model_draws_the_same_picture() -> None:
    folder = Path(sdedit.__file__).parent / "default_model"
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    ours = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
    compare(theirs, ours, prompt="red apple, 3d", image=picture(256, 256, 3), guidance_scale=3.0, strength=0.65)


def test_the_default_models_tiny_autoencoder_is_the_same_there() -> None:
    folder = Path(sdedit.__file__).parent / "default_model"
    theirs, ours = (
        library.AutoencoderTiny.from_pretrained(folder, subfolder="tiny_vae").eval() for library in (diffusers, sdedit)
    )
    z, pixels = torch.randn(1, 8, 4, 4), torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours.decode(z).sample, theirs.decode(z).sample, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.encode(pixels).latents, theirs.encode(pixels).latents, rtol=1e-4, atol=1e-5)
