"""The pipeline's own promises: sizes, batches, seeds, precision, cancelling, and errors at the door."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sdedit
from conftest import make_folder, picture
from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.inputs.images import read_images

STOCHASTIC = ["EulerAncestralDiscreteScheduler", "DDPMScheduler"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(pipe: Any, *, seed: int | None = 0, **arguments: Any) -> Any:
    arguments = {"prompt": "an apple", "image": picture(), "num_inference_steps": 4, "output_type": "pt", **arguments}
    if seed is not None:
        arguments.setdefault("generator", seeded(seed))
    return pipe(**arguments).images


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[int]:
    """The batch size of each call of a network, as they come."""
    calls: list[int] = []
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[0]))
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "forward", forward)
    return calls


def test_strength_0_is_the_round_trip_through_the_vae(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch, pipe.unet)
    got = run(pipe, strength=0.0)
    with torch.no_grad():
        latents = pipe.vae.encode(read_images(picture(), 4).pixels).latent_dist.sample(seeded())
        want = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    assert calls == [] and pipe.num_timesteps == 0
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match=r"strength=0\.2 of 4 steps leaves none to run"):
        assert torch.equal(run(pipe, strength=0.2), got)
    assert calls == []


@pytest.mark.parametrize(
    ("strength", "steps", "calls"), [(1, 4, 4), (0.5, 4, 2), (0.8, 7, 5), (1.0, 1, 1), (0.75, 2, 1)]
)
def test_strength_says_how_many_steps_run(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, strength: float, steps: int, calls: int
) -> None:
    counted = count_calls(monkeypatch, pipe.unet)
    run(pipe, strength=strength, num_inference_steps=steps)
    assert counted == [1] * calls and pipe.num_timesteps == calls
    counted.clear()
    run(pipe, strength=strength, num_inference_steps=steps, guidance_scale=1.0)
    assert counted == [1] * calls


@settings(deadline=None, max_examples=25)
@given(st.integers(8, 70), st.integers(8, 70), st.sampled_from(["RGB", "RGBA", "L"]))
def test_the_output_has_the_size_of_the_input(loaded: Any, width: int, height: int, mode: str) -> None:
    image = picture(width, height, mode=mode)
    (out,) = loaded("x", image=image, num_inference_steps=1, strength=1.0).images
    assert (out.size, out.mode) == (image.size, "RGBA" if mode == "RGBA" else "RGB")
    if mode == "RGBA":
        assert out.getchannel("A").tobytes() == image.getchannel("A").tobytes()


def test_padding_leaves_the_inside_alone(pipe: Any) -> None:
    """Of an odd size, the picture is that of the image padded by hand."""
    image = picture(51, 43)
    padded = np.pad(np.asarray(image), ((0, 5), (0, 5), (0, 0)), mode="edge")
    assert torch.equal(run(pipe, image=image), run(pipe, image=padded)[..., :43, :51])


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", *STOCHASTIC])
def test_a_picture_is_the_same_alone_and_in_a_batch(pipe: Any, scheduler: str) -> None:
    pipe.scheduler = getattr(sdedit, scheduler).from_config(pipe.scheduler.config)
    images = [picture(seed=i) for i in range(3)]
    words = ["an apple", "a cat", "x"]
    for size in ({}, {"image": [i.resize((20, 9)) for i in images]}):  # also where noise is not a multiple of 16
        arguments = {"prompt": words, "image": images, "eta": 0.5, **size}
        together = run(pipe, generator=[seeded(i) for i in range(3)], **arguments)
        for i in range(3):
            alone = run(pipe, seed=i, **{**arguments, "prompt": words[i], "image": arguments["image"][i]})
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.05
    # One prompt, several pictures of it.
    several = run(pipe, generator=[seeded(i) for i in range(3)], num_images_per_prompt=3)
    for i in range(3):
        torch.testing.assert_close(several[i : i + 1], run(pipe, seed=i), atol=1e-4, rtol=0)


def test_one_generator_draws_sample_by_sample(pipe: Any) -> None:
    """The first picture of a batch is the one of that seed alone; the others differ."""
    pair = run(pipe, num_images_per_prompt=2)
    torch.testing.assert_close(pair[:1], run(pipe), atol=1e-4, rtol=0)
    assert (pair[0] - pair[1]).abs().max() > 0.05
    assert torch.equal(run(pipe), run(pipe)) and not torch.equal(run(pipe), run(pipe, seed=1))
    torch.manual_seed(3)
    first = run(pipe, seed=None)
    assert not torch.equal(first, run(pipe, seed=None))
    torch.manual_seed(3)
    assert torch.equal(first, run(pipe, seed=None))


def test_images_and_prompts_are_paired(pipe: Any) -> None:
    a, b = picture(seed=1), picture(seed=2)
    arguments: dict[str, Any] = {"strength": 0.5, "output_type": "latent"}

    def alone(prompt: str, image: Any, seed: int) -> Any:
        return run(pipe, prompt=prompt, image=image, seed=seed, **arguments)[0]

    for prompts, images, number, pairs in (
        (["p", "q"], [a, b], 1, [("p", a), ("q", b)]),
        (["p", "q"], a, 1, [("p", a), ("q", a)]),
        ("p", [a, b], 1, [("p", a), ("p", b)]),
        ("p", [a, b], 2, [("p", a), ("p", b)]),  # as many images as pictures
        (["p", "q"], [a, b], 2, [("p", a), ("p", a), ("q", b), ("q", b)]),
        (["p"], [a, b, a], 2, [("p", a), ("p", a), ("p", b), ("p", b), ("p", a), ("p", a)]),
        (["p", "q"], [a, b, b, a], 2, [("p", a), ("p", b), ("q", b), ("q", a)]),
    ):
        generators = [seeded(i) for i in range(len(pairs))]
        got = run(pipe, prompt=prompts, image=images, num_images_per_prompt=number, generator=generators, **arguments)
        assert len(got) == len(pairs)
        for i, (prompt, image) in enumerate(pairs):
            torch.testing.assert_close(got[i], alone(prompt, image, i), atol=1e-4, rtol=1e-4)


def test_latents_go_in_and_come_out(pipe: Any) -> None:
    latents = run(pipe, output_type="latent")
    assert latents.shape == (1, 4, 6, 8)
    decoded = run(pipe, image=latents, strength=0.0)
    torch.testing.assert_close(decoded, run(pipe), atol=1e-5, rtol=0)


def test_kinds_of_output(pipe: Any) -> None:
    pixels = run(pipe)
    assert pixels.shape == (1, 3, 48, 64) and pixels.min() >= 0 and pixels.max() <= 1
    array = run(pipe, output_type="np")
    np.testing.assert_array_equal(array, pixels.permute(0, 2, 3, 1))
    (image,) = run(pipe, output_type="pil")
    np.testing.assert_array_equal(np.asarray(image), np.round(array[0] * 255))
    out = pipe("an apple", picture(), num_inference_steps=2, generator=seeded())
    assert out.images is out["images"] is out[0] and out.nsfw_content_detected is None and len(out) == 1
    as_tuple = pipe("an apple", picture(), num_inference_steps=2, return_dict=False, generator=seeded())
    assert as_tuple[0][0].tobytes() == out.images[0].tobytes() and as_tuple[1] is None


def fail_in_half(monkeypatch: pytest.MonkeyPatch, module: Any, method: str, change: Any) -> list[torch.dtype]:
    """Let a method of a network's class go wrong in half precision; gives the dtypes that it ran in."""
    dtypes: list[torch.dtype] = []
    original = getattr(type(module), method)

    def patched(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        dtypes.append(self.dtype)
        out = original(self, x, *args, **kwargs)
        return change(out) if self.dtype != torch.float32 else out

    monkeypatch.setattr(type(module), method, patched)
    return dtypes


def ruin(value: Any) -> Any:
    """An output with one value that is not a number, or infinite."""
    if isinstance(value, tuple):
        return tuple(ruin(v) for v in value)
    if hasattr(value, "latent_dist"):
        value.latent_dist.mean[..., 0, 0] = float("inf")
    elif hasattr(value, "last_hidden_state"):
        value.last_hidden_state[..., 0] = float("nan")
    else:
        value[..., 0, 0] = float("nan")
    return value


@pytest.fixture
def bf16(folder: Path) -> Any:
    made = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize(
    ("stage", "part", "method"),
    [
        ("text encoder", "text_encoder", "forward"),
        ("VAE encoder", "vae", "encode"),
        ("UNet", "unet", "forward"),
        ("VAE decoder", "vae", "decode"),
    ],
)
def test_a_stage_that_overflows_runs_again_in_float32(
    bf16: Any, monkeypatch: pytest.MonkeyPatch, stage: str, part: str, method: str
) -> None:
    module = getattr(bf16, part)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    bf16.scheduler = sdedit.EulerAncestralDiscreteScheduler.from_config(bf16.scheduler.config)
    plain, other = run(bf16).float(), run(bf16, seed=9).float()
    dtypes = fail_in_half(monkeypatch, module, method, ruin)
    with pytest.warns(UserWarning, match=rf"^{stage}: NaN or infinity in bfloat16; this stage runs again in float32"):
        got = run(bf16)
    assert {torch.bfloat16, torch.float32} == set(dtypes) and module.dtype == torch.bfloat16
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in module.state_dict().items())
    assert torch.isfinite(got).all()
    # The same noise and the same way: what is left is bfloat16's rounding.
    assert (got.float() - plain).abs().mean() < 0.03 < (plain - other).abs().mean()


@pytest.mark.parametrize("library", [sdedit, diffusers])
@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DPMSolverMultistepScheduler", *STOCHASTIC])
@pytest.mark.filterwarnings("ignore:UNet")
def test_the_second_run_is_the_float32_run(
    bf16: Any, monkeypatch: pytest.MonkeyPatch, library: Any, scheduler: str
) -> None:
    """Solvers with a memory, and callbacks that change the guidance, begin afresh; diffusers' schedulers too."""
    bf16.scheduler = getattr(library, scheduler).from_config(dict(bf16.scheduler.config))

    def cut(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step != 1:
            return {}
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    arguments: dict[str, Any] = {"callback_on_step_end": cut, "output_type": "latent", "num_inference_steps": 6}
    arguments |= {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "image": torch.randn(1, 4, 6, 8).bfloat16()}
    bf16.text_encoder.float()
    dtypes = fail_in_half(monkeypatch, bf16.unet, "forward", ruin)
    got = run(bf16, **arguments)
    half = len(dtypes) // 2
    assert half >= 4 and dtypes == [torch.bfloat16] * half + [torch.float32] * half
    bf16.unet.float()
    want = run(bf16, **arguments)
    # Noise and prompt embeds went through bfloat16 before the UNet's stage began; diffusers draws other noise in it.
    if library is sdedit or scheduler not in STOCHASTIC:
        assert (got - want).abs().max() < 0.1 * want.abs().max()
    assert torch.isfinite(got).all()


def test_what_is_not_finite_in_float32_either_is_an_error(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda *a, **k: ruin(original(*a, **k)))
    with pytest.raises(RuntimeError, match=r"^VAE decoder: NaN or infinity in float32"):
        run(pipe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(folder: Path, dtype: torch.dtype) -> None:
    made = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    exact = run(made, strength=0.5)
    assert made.to(dtype) is made and made.dtype == dtype == made.vae.dtype == made.text_encoder.dtype
    got = run(made, strength=0.5)
    assert got.dtype == dtype and (got.float() - exact).abs().mean() < 0.03
    assert run(made, output_type="np").dtype == np.float32
    assert made.to("cpu", torch.float32).dtype == torch.float32 and made.device == torch.device("cpu")


def test_cancel(pipe: Any) -> None:
    steps: list[int] = []

    def callback(running: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> None:
        steps.append(step)
        if step == 1:
            running.cancel()

    out = run(pipe, strength=1.0, num_inference_steps=8, callback_on_step_end=callback)
    assert steps == [0, 1] and pipe.interrupt and out.shape == (1, 3, 48, 64)
    steps.clear()
    run(pipe, num_inference_steps=4, strength=0.25, callback_on_step_end=callback)
    assert steps == [0] and not pipe.interrupt  # the next call is not


def test_callbacks_get_what_they_ask_for(pipe: Any) -> None:
    seen: list[dict[str, Any]] = []

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append({k: None if v is None else tuple(v.shape) for k, v in tensors.items()})
        return tensors

    for names in ([], None, ["latents"], ["prompt_embeds", "negative_prompt_embeds"]):
        seen.clear()
        run(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
        assert [list(s) for s in seen] == [names or []] * 3
    assert seen[0] == {"prompt_embeds": (2, 77, 32), "negative_prompt_embeds": (1, 77, 32)}
    with pytest.raises(ValueError, match="callback_on_step_end returned Tensor; expected a dict"):
        run(pipe, callback_on_step_end=lambda p, i, t, k: k["latents"])


def test_progress_bar(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(desc="drawing", ascii=True)
    run(pipe, num_inference_steps=4, strength=0.75)
    assert re.search(r"drawing: 100%.* 3/3", capsys.readouterr().err)


def test_long_prompts_are_cut_with_a_warning_that_shows_what_is_lost(pipe: Any) -> None:
    with pytest.warns(UserWarning, match=r"77|75.*cut off: .*cat"):
        long = pipe.encode_prompt("apple " * 75 + "cat")
    assert long[0].shape == (1, 77, 32)
    assert torch.equal(long[0], pipe.encode_prompt("apple " * 75)[0])


def test_prompt_embeds_take_the_place_of_prompts(pipe: Any) -> None:
    embeds, negative = pipe.encode_prompt(["an apple", "a cat"], num_images_per_prompt=2, negative_prompt="a dog")
    assert embeds.shape == negative.shape == (4, 77, 32) and torch.equal(embeds[0], embeds[1])
    assert pipe.encode_prompt("x", do_classifier_free_guidance=False)[1] is None
    one = run(pipe, prompt="a cat", negative_prompt="a dog")
    assert torch.equal(run(pipe, prompt=None, prompt_embeds=embeds[2:3], negative_prompt_embeds=negative[:1]), one)
    torch.testing.assert_close(
        run(pipe, prompt=["x"] * 2, negative_prompt="y"), run(pipe, prompt=["x"] * 2, negative_prompt=["y", "y"])
    )


def test_an_lcm_is_told_the_guidance_and_called_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = StableDiffusionImg2ImgPipeline.from_pretrained(make_folder(tmp_path, unet={"time_cond_proj_dim": 8}))
    made.set_progress_bar_config(disable=True)
    calls = count_calls(monkeypatch, made.unet)
    low, high = run(made, guidance_scale=2.0), run(made, guidance_scale=9.0)
    assert set(calls) == {1} and not torch.equal(low, high)


def test_components_are_shared(pipe: Any) -> None:
    other = StableDiffusionImg2ImgPipeline(**pipe.components)
    assert all(getattr(other, name) is part for name, part in pipe.components.items())
    assert list(pipe.components) == list(inspect.signature(StableDiffusionImg2ImgPipeline).parameters)[:8]
    assert "UNet2DConditionModel" in repr(pipe) and "safety_checker" not in repr(pipe)
    for name, value, words in (
        ("scheduler", "ddim", "scheduler: str"),
        ("unet", None, "unet: NoneType"),
        ("vae", pipe.unet, "vae: UNet2DConditionModel"),
        ("safety_checker", object(), "feature_extractor: None"),
    ):
        with pytest.raises(ValueError, match=words):
            StableDiffusionImg2ImgPipeline(**{**pipe.components, name: value})


def test_arguments_are_those_of_diffusers() -> None:
    """Names, order and defaults."""
    for method in ("__init__", "__call__", "encode_prompt"):
        theirs = inspect.signature(getattr(diffusers.StableDiffusionImg2ImgPipeline, method)).parameters
        ours = inspect.signature(getattr(StableDiffusionImg2ImgPipeline, method)).parameters
        names = [name for name in theirs if name != "kwargs"]
        assert list(ours)[: len(names)] == names  # ours may have more at the end
        for name, parameter in theirs.items():
            if parameter.default is not inspect.Parameter.empty and name != "kwargs":
                assert ours[name].default == parameter.default, name


def test_numbers_of_numpy_are_numbers(pipe: Any) -> None:
    got = run(
        pipe,
        strength=np.float32(0.5),
        num_inference_steps=np.int64(4),
        guidance_scale=np.float32(7.5),
        num_images_per_prompt=np.int32(1),
        eta=np.float64(0),
    )
    assert torch.equal(got, run(pipe, strength=0.5))


def embeds(*shape: int, value: float = 0.0) -> torch.Tensor:
    return torch.full(shape, value)


E = embeds(1, 77, 32)
NAN = float("nan")
BAD: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt and prompt_embeds: neither was given"),
    ({"prompt_embeds": E}, "prompt and prompt_embeds: both were given"),
    ({"prompt": 5}, "prompt=5; expected a string or a list of strings"),
    ({"prompt": []}, r"prompt=\[\]; expected"),
    ({"prompt": ["a", None]}, r"prompt=\['a', None\]; expected"),
    ({"image": None}, "image: None; expected"),
    ({"image": "apple.png"}, "image: str; expected a PIL image"),
    ({"image": []}, "image: the list is empty"),
    ({"image": [picture(16, 8), picture(8, 16)]}, "image: the list has several sizes"),
    ({"image": Image.new("RGB", (4, 40))}, "image: 4×40 pixels; expected at least 8"),
    ({"prompt": ["a", "b"], "image": [picture()] * 3}, "image and prompt: 3 images and 2 prompts"),
    *(({"strength": v}, rf"strength={v!r}; expected a number from 0 to 1") for v in (-0.1, 1.1, NAN, "1", None, True)),
    *(({"num_inference_steps": v}, "num_inference_steps=") for v in (0, -3, 2.5, "4", None, True)),
    *(({"strength": v}, r"strength.*") for v in ([], [0.5, 2], [0.5, "x"])),
    *(({"extra_noise": v}, "extra_noise=.*expected a number from 0 to 1") for v in (-1, 2, NAN, None)),
    *(({"repeats": v}, "repeats=.*expected a whole number of at least 1") for v in (0, -1, 1.5, "2", None, True)),
    ({"mask_image": "mask.png"}, "mask_image: str; expected a PIL image"),
    ({"mask_image": picture(48, 64)}, "mask_image: 48×64 for an image of 64×48 pixels"),
    ({"mask_image": [picture()] * 3, "prompt": ["a", "b"]}, "mask_image, strength_map: 3 values for 2 pictures"),
    ({"strength_map": np.full((48, 64), 1.5)}, "strength_map: values from 1.5 to 1.5"),
    *(
        ({"mask_feather": v}, "mask_feather=.*expected a whole number of at least 0")
        for v in (-1, 0.5, "2", None, True)
    ),
    ({"prompt": ["a", "b", "c"], "guidance_scale": [1.0, 2.0]}, "guidance_scale: 2 values for 3 pictures"),
    ({"num_inference_steps": 5000}, "num_inference_steps.*5000"),
    *(
        ({"guidance_scale": v}, "guidance_scale=.*expected a number")
        for v in (NAN, float("inf"), -float("inf"), "7", None)
    ),
    *(({"num_images_per_prompt": v}, "num_images_per_prompt=") for v in (0, -1, 1.5, None)),
    *(({"eta": v}, "eta=.*expected a number from 0 to 1") for v in (-1, 1.5, NAN, None)),
    ({"timesteps": [3, 2], "sigmas": [3.0, 2.0]}, "timesteps and sigmas: both were given"),
    *(({"timesteps": v}, "timesteps") for v in ([10, 500], [], "ab", 5, [5.0, "x"], [5, 5], [700, -1], [5000, 10])),
    ({"sigmas": [3.0, 1.0]}, "sigmas: DDPMScheduler"),
    ({"negative_prompt": 3}, "negative_prompt=3; expected"),
    ({"negative_prompt": 3, "guidance_scale": 1.0}, "negative_prompt=3; expected"),
    ({"negative_prompt": ["a", "b"]}, "negative_prompt: 2 of them for 1 prompts"),
    (
        {"negative_prompt": "a", "negative_prompt_embeds": E},
        "negative_prompt and negative_prompt_embeds: both were given",
    ),
    ({"prompt": None, "prompt_embeds": embeds(77, 32)}, r"prompt_embeds: \[77, 32\]; expected .*\(B, M, 32\)"),
    ({"prompt": None, "prompt_embeds": embeds(1, 77, 768)}, r"prompt_embeds: \[1, 77, 768\]; expected .*\(B, M, 32\)"),
    ({"prompt": None, "prompt_embeds": embeds(0, 77, 32)}, "prompt_embeds"),
    ({"prompt": None, "prompt_embeds": "x"}, "prompt_embeds: str"),
    ({"prompt": None, "prompt_embeds": embeds(1, 77, 32, value=NAN)}, "prompt_embeds.*NaN"),
    ({"prompt": None, "prompt_embeds": E.int()}, r"prompt_embeds: torch\.int32"),
    ({"negative_prompt_embeds": embeds(1, 5, 32)}, r"negative_prompt_embeds: \[1, 5, 32\]; .*\[1, 77, 32\]"),
    ({"negative_prompt_embeds": embeds(1, 77, 3)}, "negative_prompt_embeds"),
    ({"generator": 42}, "generator: int; expected torch.Generator"),
    ({"generator": [seeded(), 1]}, "generator: int"),
    ({"generator": [seeded()] * 3}, "generator: 3 generators for 1 images"),
    ({"generator": []}, "generator: 0 generators for 1 images"),
    ({"output_type": "jpeg"}, "output_type='jpeg'; expected one of pil, np, pt, latent"),
    ({"output_type": ["pil"]}, "output_type="),
    ({"ip_adapter_image": picture()}, "ip_adapter_image was given, but no IP-Adapter is loaded"),
    ({"ip_adapter_image_embeds": [E]}, "ip_adapter_image_embeds was given"),
    ({"cross_attention_kwargs": 0.5}, r"cross_attention_kwargs=0\.5; expected a dict"),
    ({"cross_attention_kwargs": {"scale": "x"}}, r"cross_attention_kwargs\['scale'\]='x'"),
    *(({"clip_skip": v}, "clip_skip=") for v in (-1, 1.5, "1", 3, 100)),
    ({"callback_on_step_end": 5}, "callback_on_step_end=5; expected a function"),
    ({"callback_on_step_end_tensor_inputs": ["noise"]}, r"callback_on_step_end_tensor_inputs=\['noise'\]; expected"),
    ({"callback_on_step_end_tensor_inputs": "latents"}, "callback_on_step_end_tensor_inputs='latents'; expected"),
    ({"callback_on_step_end_tensor_inputs": 5}, "callback_on_step_end_tensor_inputs=5; expected"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[f"{'-'.join(a)}-{i}" for i, (a, _) in enumerate(BAD)])
def test_what_is_wrong_is_said_at_the_door(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], words: str
) -> None:
    pipe.scheduler = sdedit.DDPMScheduler.from_config(pipe.scheduler.config)  # takes timesteps, no sigmas
    calls = count_calls(monkeypatch, pipe.unet)
    with pytest.raises((ValueError, TypeError), match=words) as caught:
        run(pipe, **arguments)
    assert calls == [] and len(str(caught.value)) < 500
    run(pipe, num_inference_steps=1, strength=1.0)  # and nothing is left behind


def test_the_table_has_every_argument() -> None:
    parameters = inspect.signature(StableDiffusionImg2ImgPipeline.__call__).parameters.values()
    checked = {p.name for p in parameters if p.name not in ("self", "others") and not isinstance(p.default, bool)}
    assert checked == {name for arguments, _ in BAD for name in arguments}


def test_large_images_are_refused_unless_allowed(pipe: Any) -> None:
    pipe.max_pixels = 1000
    with pytest.raises(ValueError, match="64×48"):
        run(pipe)
    pipe.max_pixels = None
    run(pipe)


def test_saved_pipelines_draw_the_same(pipe: Any, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    want = run(pipe)
    ours = StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path)
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path)
    for made in (ours, theirs):
        made.set_progress_bar_config(disable=True)
    assert torch.equal(run(ours), want)
    torch.testing.assert_close(run(theirs), want, atol=1e-4, rtol=0)


def test_with_no_argument_the_default_model() -> None:
    made = StableDiffusionImg2ImgPipeline.from_pretrained()
    made.set_progress_bar_config(disable=True)
    (image,) = made("apple", image=picture(50, 40), num_inference_steps=2, generator=seeded()).images
    assert image.size == (50, 40)
