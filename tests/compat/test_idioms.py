"""What scripts and subclasses written for diffusers do with a pipeline, on theirs and on ours."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import BatchFeature

import sdedit
from conftest import picture


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(pipe: Any, seed: int = 0, **more: Any) -> Any:
    arguments = {"prompt": "an apple", "image": picture(), "num_inference_steps": 5, "output_type": "np", **more}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(generator=seeded(seed), **arguments).images


@pytest.fixture(params=["theirs", "ours"])
def library(request: pytest.FixtureRequest) -> Any:
    return diffusers if request.param == "theirs" else sdedit


@pytest.fixture
def either(library: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = library.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_attributes(either: Any, folder: Path) -> None:
    """The same script, on either library."""
    pipe = either
    assert pipe._execution_device == torch.device("cpu") and str(pipe.name_or_path) == str(folder)
    assert pipe.config.requires_safety_checker is False
    assert tuple(pipe.config["unet"]) == ("diffusers", "UNet2DConditionModel")
    assert tuple(pipe.config["safety_checker"]) == (None, None)
    assert pipe.image_processor.preprocess(picture(64, 48)).shape == (1, 3, 48, 64)
    (image,) = pipe.numpy_to_pil(np.zeros((1, 8, 8, 3), np.float32))
    assert image.size == (8, 8)
    with pipe.progress_bar(total=3) as bar:
        bar.update()
    assert list(pipe.progress_bar([1, 2])) == [1, 2]
    assert pipe.to(torch_dtype=torch.float32) is pipe
    assert pipe.get_guidance_scale_embedding(torch.tensor([6.5]), 8).shape == (1, 8)
    assert type(pipe).from_pipe(pipe).unet is pipe.unet
    pipe.register_modules(extra=torch.nn.Linear(2, 2))
    assert isinstance(pipe.extra, torch.nn.Linear)


def test_arguments_in_a_callback(either: Any) -> None:
    seen: list[Any] = []

    def look(pipe: Any, i: int, t: Any, tensors: Any) -> dict[str, Any]:
        seen.append((pipe.clip_skip, pipe.cross_attention_kwargs, pipe.guidance_scale, pipe.num_timesteps))
        return {}

    draw(either, callback_on_step_end=look, cross_attention_kwargs={"scale": 0.5}, guidance_scale=3.0, strength=0.6)
    assert seen == [(None, {"scale": 0.5}, 3.0, 3)] * 3


def test_the_older_callback(folder: Path) -> None:
    seen: dict[Any, list[Any]] = {}
    for library in (diffusers, sdedit):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe = library.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        took = seen[library] = []
        draw(
            pipe, strength=1.0, callback=lambda i, t, x, took=took: took.append((i, int(t), x.shape)), callback_steps=2
        )
    assert seen[diffusers] == seen[sdedit] and [i for i, *_ in seen[sdedit]] == [0, 2, 4]


def test_older_and_newer_callbacks_together(pipe: Any) -> None:
    seen: list[Any] = []
    newer = lambda pipe, i, t, tensors: seen.append(sorted(tensors)) or {}  # noqa: E731
    draw(
        pipe,
        callback=lambda i, t, x: seen.append(i),
        callback_on_step_end=newer,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
        strength=0.2,
    )
    assert seen == [0, ["latents", "prompt_embeds"]]
    with pytest.raises(ValueError, match="callback_steps=0"):
        pipe("x", picture(), callback=print, callback_steps=0)
    with pytest.warns(UserWarning, match="gligen_phrases: no argument of the pipeline; ignored"):
        pipe("x", picture(), strength=1.0, num_inference_steps=1, gligen_phrases=["a"])
    with pytest.warns(UserWarning, match="cross_attention_kwargs has 'skale', which nothing reads"):
        pipe("x", picture(), strength=1.0, num_inference_steps=1, cross_attention_kwargs={"skale": 1})


def test_loading_arguments(folder: Path) -> None:
    load = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained
    pipe = load(folder, dtype=torch.bfloat16, low_cpu_mem_usage=True, device_map="cpu", token=None, max_memory=None)
    assert pipe.dtype == torch.bfloat16 and pipe.device == torch.device("cpu")
    for device_map in ("auto", "balanced", {"": "cpu"}):
        assert load(folder, device_map=device_map).device.type == "cpu"
    for device_map in ({"unet": "cpu", "vae": "meta"}, "nowhere", 1.5):
        with pytest.raises(ValueError, match="device_map="):
            load(folder, device_map=device_map)
    with pytest.raises(TypeError, match="no argument torch_dtipe"):
        load(folder, torch_dtipe=torch.float16)


def test_saving_arguments(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, max_shard_size="2GB")
    assert (tmp_path / "model_index.json").is_file()


def test_a_function_as_safety_checker(either: Any) -> None:
    """As scripts turn it off, or make their own."""
    want = draw(either)
    seen = BatchFeature({"pixel_values": torch.zeros(1, 3, 2, 2)})
    either.feature_extractor = lambda images, return_tensors: seen
    either.safety_checker = lambda images, clip_input: (images, [False] * len(images))
    np.testing.assert_allclose(draw(either), want, atol=1e-6)
    either.run_safety_checker = lambda image, device, dtype: (image * 0 - 1, None)
    assert not draw(either).any()


def test_loras_by_their_other_names(folder: Path) -> None:
    pytest.importorskip("peft")
    pipe = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"unet.{name}.lora_{side}.weight": torch.full(shape, 0.1) for side, shape in SIDES}
    pipe.load_lora_weights(tensors, adapter_name="a")
    assert pipe.fused_loras == set() and pipe.num_fused_loras == 0
    pipe.set_lora_device("a", "meta")
    assert pipe.unet.get_submodule(name).lora_A["a"].weight.is_meta
    with pytest.raises(ValueError, match="adapter_names: b; expected some of a"):
        pipe.set_lora_device(["a", "b"], "cpu")
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tensors, adapter_name="a")
    pipe.fuse_lora()
    assert pipe.fused_loras == {"a"} and pipe.num_fused_loras == 1


SIDES = (("A", (2, 32)), ("B", (32, 2)))


def test_what_the_page_for_users_of_diffusers_shows() -> None:
    page = (Path(sdedit.__file__).parents[2] / "docs" / "diffusers.md").read_text("utf-8")
    names: dict[str, Any] = {"image": picture()}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(block, names)
    assert names["picture"].size == (64, 48) and len(names["pictures"]) == 4


# Overriding


def variations(base: Any) -> dict[str, Any]:
    """Subclasses as published community pipelines write them, over either library's pipeline."""

    class Latents(base):  # type: ignore[misc]
        def prepare_latents(self, image: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
            assert image.shape[1:] == (3, 48, 64) and timestep.shape == (1,) and image.min() >= -1
            return super().prepare_latents(image, timestep, *args, **kwargs) * 0.9

    class Rewritten(base):  # type: ignore[misc]
        def prepare_latents(
            self,
            image: Any,
            timestep: Any,
            batch_size: Any,
            number: Any,
            dtype: Any,
            device: Any,
            generator: Any = None,
        ) -> Any:
            encoded = self.vae.encode(image.to(device, dtype)).latent_dist.mode() * self.vae.config.scaling_factor
            noise = torch.randn(encoded.shape, generator=generator)
            return self.scheduler.add_noise(encoded, noise, timestep)

    class Timesteps(base):  # type: ignore[misc]
        def get_timesteps(self, num_inference_steps: int, strength: float, device: Any) -> Any:
            return super().get_timesteps(num_inference_steps, strength / 2, device)

    class Options(base):  # type: ignore[misc]
        def prepare_extra_step_kwargs(self, generator: Any, eta: float) -> Any:
            return {**super().prepare_extra_step_kwargs(generator, eta), "eta": 0.5}

    class Both(Timesteps, Options):
        pass

    class Inputs(base):  # type: ignore[misc]
        def check_inputs(self, prompt: Any, strength: float, *args: Any, **kwargs: Any) -> None:
            super().check_inputs(prompt, strength, *args, **kwargs)
            if strength > 0.9:
                raise ValueError("too strong")

    class Checker(base):  # type: ignore[misc]
        def run_safety_checker(self, image: Any, device: Any, dtype: Any) -> Any:
            assert image.min() < 0
            return image.flip(-1), None

    class Prompts(base):  # type: ignore[misc]
        def encode_prompt(
            self,
            prompt: Any,
            device: Any = None,
            num_images_per_prompt: int = 1,
            do_classifier_free_guidance: bool = True,
            negative_prompt: Any = None,
            prompt_embeds: Any = None,
            negative_prompt_embeds: Any = None,
            lora_scale: Any = None,
            clip_skip: Any = None,
        ) -> Any:
            found = super().encode_prompt(
                prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt
            )
            return found[0] * 1.2, found[1]

    class Loop(base):  # type: ignore[misc]
        """A call of its own, of the published pieces."""

        @torch.no_grad()
        def __call__(
            self, prompt: Any, image: Any, strength: float = 0.8, num_inference_steps: int = 5, **k: Any
        ) -> Any:
            device, generator = self._execution_device, k["generator"]
            self.check_inputs(prompt, strength, 1)
            self._guidance_scale, self._clip_skip, self._interrupt = 5.0, None, False
            embeds = self.encode_prompt(prompt, device, 1, self.do_classifier_free_guidance, None)
            embeds = torch.cat([embeds[1], embeds[0]])
            image = self.image_processor.preprocess(image)
            self.scheduler.set_timesteps(num_inference_steps, device=device)
            timesteps, count = self.get_timesteps(num_inference_steps, strength, device)
            self._num_timesteps = len(timesteps)
            latents = self.prepare_latents(image, timesteps[:1], 1, 1, embeds.dtype, device, generator)
            options = self.prepare_extra_step_kwargs(generator, 0.0)
            with self.progress_bar(total=count) as bar:
                for t in timesteps:
                    seen = self.scheduler.scale_model_input(torch.cat([latents] * 2), t)
                    noise = self.unet(seen, t, encoder_hidden_states=embeds, return_dict=False)[0]
                    without, with_prompt = noise.chunk(2)
                    noise = without + self.guidance_scale * (with_prompt - without)
                    latents = self.scheduler.step(noise, t, latents, **options, return_dict=False)[0]
                    bar.update()
            image = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            image, _ = self.run_safety_checker(image, device, embeds.dtype)
            image = self.image_processor.postprocess(image, output_type="np")
            self.maybe_free_model_hooks()
            return type("Output", (), {"images": image})

    kinds = (Latents, Rewritten, Timesteps, Options, Both, Inputs, Checker, Prompts, Loop)
    return {kind.__name__: kind for kind in kinds}


@pytest.mark.parametrize("name", list(variations(object)))
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_what_a_subclass_overrides_is_called(name: str, scheduler: str, folder: Path) -> None:
    if name in ("Options", "Both") and scheduler != "DDIMScheduler":
        pytest.skip("no eta")
    drawn, plain = [], []
    for library in (diffusers, sdedit):
        base = library.StableDiffusionImg2ImgPipeline
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = base.from_pretrained(folder)
        loaded.scheduler = getattr(library, scheduler).from_config(loaded.scheduler.config)
        loaded.set_progress_bar_config(disable=True)
        pipe = variations(base)[name](**loaded.components, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        drawn.append(draw(pipe, strength=0.8))
        plain.append(draw(loaded, strength=0.8))
        if name == "Inputs":
            with pytest.raises(ValueError, match="too strong"):
                draw(pipe, strength=0.95)
    np.testing.assert_allclose(drawn[1], drawn[0], atol=2e-4)
    assert name == "Inputs" or np.abs(drawn[1] - plain[1]).max() > 1e-3


def test_a_pipeline_of_ones_own_parts(folder: Path) -> None:
    """`DiffusionPipeline` with `register_modules`, as community pipelines begin."""

    class Own(sdedit.DiffusionPipeline):
        def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any, extra: Any = None):
            super().__init__()
            self.register_modules(
                vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, extra=extra
            )
            self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
            self.image_processor = sdedit.image_processor.VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    extra = torch.nn.Linear(2, 2)
    pipe = Own.from_pretrained(folder, extra=extra)
    assert pipe.extra is extra and pipe.components["extra"] is extra and pipe.vae_scale_factor == 8
    pipe.to(torch.bfloat16)
    assert extra.weight.dtype == torch.bfloat16 and "extra" in pipe.config


def test_masks_need_the_pipelines_own_latents(pipe: Any) -> None:
    own = variations(sdedit.StableDiffusionImg2ImgPipeline)["Rewritten"](**pipe.components)
    with pytest.raises(ValueError, match="need the pipeline's own prepare_latents"):
        own("a", picture(), mask_image=picture())
    own.set_progress_bar_config(disable=True)
    assert draw(own, strength=0.0).shape == (1, 48, 64, 3)  # no step: the round trip
