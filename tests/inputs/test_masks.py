"""Masked editing: what stays is exact, what changes is what it would be alone, and every level is the one reached."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from conftest import picture
from sdedit import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from sdedit.inputs.images import read_images
from sdedit.inputs.masks import feathered, read_mask, read_region, resized_mask
from sdedit.schedulers.names import SCHEDULERS, make_scheduler

PLAIN = [name for name in SCHEDULERS if not name.endswith("-karras")]
LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
LEFT = torch.zeros(64, 64)  # the left half may change
LEFT[:, :32] = 1


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disc(size: tuple[int, int]) -> Image.Image:
    """White on black, off the middle, with edges that lie on no latent's."""
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).ellipse((size[0] // 5, size[1] // 3, size[0] * 3 // 4, size[1] - 3), fill=255)
    return mask


class Gaussian:
    """The exact UNet for latents that are independent Gaussians: each one's prediction depends on it alone.

    Attributes:
        seen: Time and input of each call.
    """

    def __init__(self, bars: torch.Tensor) -> None:
        bar = bars.double().numpy()
        self.sigmas = np.sqrt((1 - bar) / bar)
        self.seen: list[tuple[float, torch.Tensor]] = []

    def level(self, t: float) -> tuple[float, float]:
        """(α, σ) at a time, which may lie between two training steps."""
        s = float(np.interp(t, np.arange(len(self.sigmas)), self.sigmas))
        return (1 + s * s) ** -0.5, s * (1 + s * s) ** -0.5

    def __call__(self, x: torch.Tensor, t: Any, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        times = torch.as_tensor(t).reshape(-1).tolist() * (len(x) if torch.as_tensor(t).ndim == 0 else 1)
        self.seen.append((times[0], x.clone()))
        rows = []
        for row, time in zip(x, times, strict=True):
            alpha, sigma = self.level(time)
            clean = 0.3 + alpha * 0.5 * (row - alpha * 0.3) / (alpha**2 * 0.5 + sigma**2)
            rows.append((row - alpha * clean) / sigma)
        return (torch.stack(rows),)


@pytest.fixture
def unet(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Gaussian:
    stand_in = Gaussian(pipe.scheduler.alphas_cumprod)
    monkeypatch.setattr(pipe.unet, "forward", stand_in)
    return stand_in


def draw(pipe: Any, image: Any = LATENTS, **arguments: Any) -> torch.Tensor:
    common = {"num_inference_steps": 7, "strength": 0.7, "guidance_scale": 1, "output_type": "latent"}
    return pipe("a", image, **{"generator": seeded(), **common, **arguments}).images


# The rule of the paper, on a UNet that is known in closed form.


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_stays_is_the_source_at_the_level_just_reached(pipe: Any, unet: Gaussian, name: str, exact: bool) -> None:
    """At every call of every solver, midpoints too, by the noise level of the time that the UNet is told."""
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    drawn = draw(pipe, mask_image=LEFT, exact_steps=exact)
    calls, noise = list(unet.seen), torch.randn(LATENTS.shape, generator=seeded())
    assert len(calls) >= 4
    for t, seen in calls:
        alpha, sigma = unet.level(t)
        # Spacings that round the time that they tell the UNet are off by as much.
        assert torch.allclose(seen[..., 4:], (alpha * LATENTS + sigma * noise)[..., 4:], atol=5e-3)
    assert torch.equal(drawn[..., 4:], LATENTS[..., 4:])
    # And where each latent is on its own, the mask leaves those that are free alone.
    assert torch.equal(drawn[..., :4], draw(pipe, exact_steps=exact)[..., :4])


@pytest.mark.parametrize("name", PLAIN)
def test_pictures_with_masks_and_settings_of_their_own(pipe: Any, unet: Gaussian, name: str) -> None:
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    own = {"strength": [0.4, 0.9, 0.9], "num_inference_steps": [9, 5, 7]}
    masks = [LEFT, 1 - LEFT, LEFT * 0]
    together = draw(pipe, mask_image=masks, generator=[seeded(i) for i in range(3)], **own)
    for i, mask in enumerate(masks):
        one = {key: value[i] for key, value in own.items()}
        alone = draw(pipe, mask_image=mask, generator=[seeded(i)], **one)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=0)
    assert torch.equal(together[0, ..., 4:], LATENTS[0, ..., 4:])
    assert torch.equal(together[1, ..., :4], LATENTS[0, ..., :4])
    assert torch.equal(together[2], LATENTS[0])


@pytest.mark.parametrize("name", ["ddim", "euler", "euler-karras", "heun", "dpm2"])
def test_each_region_of_a_map_is_drawn_at_its_own_strength(pipe: Any, unet: Gaussian, name: str) -> None:
    """Exactly, for solvers that remember nothing from step to step."""
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    levels = torch.tensor([0.9, 0.6, 0.3, 0.0]).repeat_interleave(16).expand(64, -1)
    drawn = draw(pipe, strength_map=levels, strength=0.75, num_inference_steps=10)
    for i, strength in enumerate([0.75, 0.6, 0.3]):  # 0.75: strength is the most that any of them gets
        alone = draw(pipe, strength=strength, num_inference_steps=10)
        part = slice(2 * i, 2 * i + 2)
        torch.testing.assert_close(drawn[..., part], alone[..., part], atol=2e-6, rtol=0)
    assert torch.equal(drawn[..., 6:], LATENTS[..., 6:])


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_a_flat_map_is_a_strength(pipe: Any, unet: Gaussian, name: str, exact: bool) -> None:
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    eight_bit = Image.new("L", (64, 64), 153)  # 0.6
    flat = draw(pipe, strength_map=eight_bit, strength=1.0, exact_steps=exact, num_inference_steps=5)
    assert torch.equal(flat, draw(pipe, strength=0.6, exact_steps=exact, num_inference_steps=5))


def test_exact_steps_spread_a_maps_strengths_over_all_steps(pipe: Any, unet: Gaussian) -> None:
    """With all steps below strength 0.8, latents of strength 0.6 are free from the time 0.6 on."""
    levels = torch.tensor([0.8, 0.6]).repeat_interleave(32).expand(64, -1)
    draw(pipe, strength_map=levels, strength=1.0, exact_steps=True, num_inference_steps=20)
    noise, kept = torch.randn(LATENTS.shape, generator=seeded()), []
    for t, seen in unet.seen:
        alpha, sigma = unet.level(t)
        if torch.allclose(seen[..., 4:], (alpha * LATENTS + sigma * noise)[..., 4:], atol=5e-3):
            kept.append(t)
    assert len(unet.seen) == 20 and max(kept) < 800 and min(kept) == pytest.approx(600, abs=800 / 20)


@pytest.mark.parametrize("name", ["ddim", "dpm++-2m", "euler-a", "heun"])
def test_repeats_keep_the_source(pipe: Any, unet: Gaussian, name: str) -> None:
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    twice = draw(pipe, mask_image=LEFT, repeats=2)
    assert torch.equal(twice[..., 4:], LATENTS[..., 4:])
    assert torch.equal(twice[..., :4], draw(pipe, repeats=2)[..., :4])


# What comes out.


@settings(deadline=None, max_examples=30)
@given(
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.sampled_from(["RGB", "RGBA", "L", "P"]),
    st.sampled_from(["pil", "np", "pt"]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 6),
)
def test_pixels_outside_the_mask_are_those_of_the_input(
    loaded: Any, size: tuple[int, int], mode: str, kind: str, seed: int, feather: int
) -> None:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 4), dtype=np.uint8))
    image = image if mode == "RGBA" else image.convert(mode)
    mask = np.kron(rng.random((3, 3)), np.ones((14, 14)))[: size[1], : size[0]]
    mask *= mask > rng.random()  # black in places, and several greys
    given: Any = image
    if kind != "pil":
        given = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
        given = torch.from_numpy(given).permute(2, 0, 1) if kind == "pt" else given
    out = loaded(
        "x",
        given,
        mask_image=mask,
        mask_feather=min(feather, *size),
        strength=0.9,
        num_inference_steps=2,
        output_type=kind,
    ).images
    if kind == "pil":
        want, got = (np.asarray(one.convert("RGBA")) for one in (image, out[0]))
    else:
        want, got = (np.asarray(one if kind == "np" else one.movedim(-3, -1)) for one in (given, out[0]))
    assert got.dtype == want.dtype
    assert np.array_equal(got[mask == 0], want[mask == 0])


@pytest.mark.parametrize("name", ["ddim", "pndm", "dpm++-2m", "euler-a", "heun", "unipc"])
def test_a_white_mask_changes_nothing_and_a_black_one_everything_back(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pipe.scheduler = make_scheduler(name, pipe.scheduler.config)
    image = picture(51, 43, mode="RGBA")
    common: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np"}
    plain = pipe("a", image, generator=seeded(), **common).images
    white = pipe("a", image, generator=seeded(), mask_image=Image.new("L", image.size, 255), **common).images
    assert np.array_equal(plain, white)
    monkeypatch.setattr(pipe.unet, "forward", None)  # no call of it
    for black in ({"mask_image": Image.new("1", image.size)}, {"strength_map": np.zeros((43, 51))}):
        out = pipe("a", image, **black, num_inference_steps=4)
        assert out.images[0].tobytes() == image.tobytes() and out.steps == [0]


def test_each_image_has_its_mask(pipe: Any) -> None:
    images, masks = [picture(seed=i) for i in range(2)], [disc((64, 48)), Image.new("L", (64, 48), 255)]
    common: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}

    def draw(prompt: Any, image: Any, mask: Any, seeds: Any, **more: Any) -> torch.Tensor:
        return pipe(prompt, image, mask_image=mask, generator=[seeded(i) for i in seeds], **common, **more).images

    alone = [draw("a", images[i // 2], masks[i // 2], [i]) for i in range(4)]
    both = draw(["a", "a"], images, masks, range(4), num_images_per_prompt=2)
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-4, rtol=0)
    # One image and several masks, several pictures; one mask serves them all.
    torch.testing.assert_close(draw("a", images[0], masks, [0, 1])[:1], alone[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(draw(["a"] * 2, images, masks[0], [0, 1])[:1], alone[0], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="mask_image, strength_map: 3 values for 2 pictures"):
        draw(["a", "a"], images, [masks[0]] * 3, [0, 1])


def test_callbacks_see_the_source_where_it_stays_and_can_stop_the_run(pipe: Any, unet: Gaussian) -> None:
    seen = []

    def stop(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        if step == 1:
            pipe.cancel()
        return {}

    draw(pipe, mask_image=LEFT, callback_on_step_end=stop)
    assert len(seen) == 2 == len(unet.seen)
    assert torch.equal(seen[0][..., 4:], unet.seen[1][1][..., 4:])  # what the next call sees
    image = picture(64, 64)
    pixels = draw(pipe, image, mask_image=LEFT, callback_on_step_end=stop, output_type="pt")
    assert torch.equal(pixels[..., 32:], read_images(image, 4).colours[..., 32:])


def test_half_precision_that_overflows_is_made_good_with_the_mask(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    original = UNet2DConditionModel.forward

    def ruined(self: Any, x: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        (out,) = original(self, x, *arguments, **more)
        return (out * float("nan") if x.dtype == torch.bfloat16 else out,)

    monkeypatch.setattr(UNet2DConditionModel, "forward", ruined)
    with pytest.warns(UserWarning, match="UNet: NaN or infinity in bfloat16"):
        out = pipe("a", picture(), mask_image=disc((64, 48)), num_inference_steps=3, output_type="pt").images
    stays = read_mask("mask_image", disc((64, 48)), (64, 48))[0] == 0
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
    assert torch.equal(out[0][:, stays], read_images(picture(), 4).colours[0][:, stays])


# Seams.


def test_what_the_vae_does_to_colours_is_undone_near_what_stays() -> None:
    """Off by a slope of colours everywhere, a picture is right again to a hundredth at its seam."""
    images = read_images(picture(96, 96), 4)
    mask = torch.zeros(96, 96)
    mask[24:72, 32:80] = 1
    region = read_region(mask, None, 0, images, 8).of_pictures([0], 1)
    source = images.pixels / 2 + 0.5
    images.pixels, images.colours = source * 1.2 - 0.6, source * 0.6 + 0.2  # room for the slope
    source = images.colours
    off = torch.stack([torch.linspace(0.02, 0.1, 96).expand(96, -1) * sign for sign in (1, -1, 0.5)])
    error = (region.composed(source + off, images, [0]) - source)[0].abs()
    inside = slice(32, 80)
    assert error[:, 24:28, inside].max() < 0.01 and error[:, 24:72, 32:36].max() < 0.01
    assert error.max() <= off.abs().max() + 1e-6


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 8), st.integers(0, 2**32 - 1))
def test_feathers_stay_within_the_mask(height: int, width: int, feather: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy((rng.random((1, 1, height, width)) > 0.3) * rng.random((1, 1, height, width))).float()
    soft = feathered(mask, feather)
    assert (soft[mask == 0] == 0).all() and (soft <= mask + 1e-6).all() and (soft >= 0).all()
    assert torch.equal(feathered(mask, 1), mask) and torch.equal(feathered(mask, 0), mask)
    assert torch.equal(feathered(mask * 0 + 1, feather), mask * 0 + 1)  # the image's border is no edge
    wider = feathered((mask > 0).float(), feather)
    assert (wider + 1e-6 >= soft).all()


def test_a_feather_is_a_ramp() -> None:
    mask = torch.zeros(1, 1, 5, 12)
    mask[..., 3:] = 1
    assert feathered(mask, 4)[0, 0, 2].tolist() == [0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1]


# Masks as people have them.

HALF = np.zeros((48, 64), dtype=bool)
HALF[:, 10:30] = True
KINDS: dict[str, Any] = {
    "L": Image.fromarray(HALF.astype(np.uint8) * 255),
    "1": Image.fromarray(HALF),
    "RGB": Image.fromarray(HALF.astype(np.uint8) * 255).convert("RGB"),
    "opaque RGBA": Image.fromarray(HALF.astype(np.uint8) * 255).convert("RGBA"),
    "written as 0 and 1": Image.fromarray(HALF.astype(np.uint8)),
    "bool": HALF,
    "uint8": HALF.astype(np.uint8) * 255,
    "uint8 of 0 and 1": HALF.astype(np.uint8),
    "uint16": HALF.astype(np.uint16) * 65535,
    "int64 of 0 and 1": HALF.astype(np.int64),
    "float64": HALF.astype(float),
    "H W 1": HALF[..., None],
    "H W 3": np.repeat(HALF[..., None], 3, -1).astype(np.float32),
    "B H W": HALF[None],
    "B H W 1": HALF[None, ..., None],
    "tensor": torch.from_numpy(HALF),
    "tensor 1 H W": torch.from_numpy(HALF)[None].half(),
    "tensor B 1 H W": torch.from_numpy(HALF)[None, None].bfloat16(),
    "tensor 3 H W": torch.from_numpy(HALF).expand(3, -1, -1).float(),
    "list": [HALF],
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_masks(kind: str) -> None:
    assert torch.equal(read_mask("mask_image", KINDS[kind], (64, 48)), torch.from_numpy(HALF)[None].float())


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ("mask.png", "mask_image: str; expected a PIL image"),
        ([], "mask_image: the list is empty"),
        (np.zeros((64, 48)), "mask_image: 48×64 for an image of 64×48 pixels; expected the same size, or at least the"),
        (np.zeros((48, 48)), "mask_image: 48×48 for an image of 64×48"),
        (np.zeros((0, 0)), r"mask_image: shape \[0, 0\]"),
        (np.zeros((1, 2, 3, 4, 5)), "mask_image: shape"),
        (torch.zeros(1, 5, 48, 64), "mask_image: shape"),
        (np.full((48, 64), 2.0), "mask_image: values from 2 to 2"),
        (np.full((48, 64), -1.0), r"mask_image: values from -1; expected 0 \(stays\) to 1 \(changes\)"),
        (np.full((48, 64), np.nan), "mask_image: it holds NaN"),
        (np.full((48, 64), 300), "mask_image: whole numbers from 300"),
        (np.full((48, 64), "x"), "mask_image: an array of"),
        (Image.new("RGBA", (64, 48)), "mask_image has transparent pixels"),
    ],
)
def test_bad_masks_are_named(mask: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        read_mask("mask_image", mask, (64, 48))


def test_a_mask_of_another_size_is_resized_with_a_warning(pipe: Any) -> None:
    with pytest.warns(UserWarning, match="mask_image: 128×96 was resized to the image's 64×48"):
        large = read_mask("mask_image", disc((128, 96)), (64, 48))
    assert large.shape == (1, 48, 64) and (large - read_mask("m", disc((64, 48)), (64, 48))).abs().mean() < 0.02
    with pytest.warns(UserWarning, match="resized"):  # as many pixels as there are latents
        latent = read_mask("mask_image", np.ones((6, 7)), (51, 43))
    assert (latent == 1).all()
    assert (resized_mask(torch.ones(1, 300, 200), (17, 31)) == 1).all()


def test_masks_of_both_kinds(pipe: Any) -> None:
    """A map is taken where the mask allows it; feathers may not be wider than the image."""
    images = read_images(picture(64, 64), 4)
    region = read_region(LEFT, np.full((64, 64), 0.4), 0, images, 8)
    assert np.array_equal(region.strengths, np.repeat([[0.4, 0.0]], 4, 1).repeat(8, 0)[None])
    assert torch.equal(region.alpha, LEFT[None, None])
    assert region.limited([0.9]) == [0.4] and region.limited([0.3]) == [0.3]
    with pytest.raises(ValueError, match="mask_feather=65; expected at most 64"):
        read_region(LEFT, None, 65, images, 8)
    with pytest.raises(ValueError, match="mask_image and strength_map: "):
        read_region([LEFT, LEFT], [LEFT, LEFT, LEFT], 0, images, 8)
