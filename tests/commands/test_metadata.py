"""The settings in a PNG: what goes in comes out, also as the web UI writes it."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

from conftest import picture
from sdedit import EulerDiscreteScheduler
from sdedit.commands.foreign import scheduler_from_label
from sdedit.commands.metadata import from_text, read_settings, sampler_label, to_text
from sdedit.commands.saving import save_picture
from sdedit.commands.settings import SUITED, USUAL, LoraWeight, PictureSettings
from sdedit.inputs.pixels import open_image

LINE = "Steps: 6, Sampler: Euler, CFG scale: 3, Seed: 1"
TEXT = st.text(max_size=60) | st.text('aA:,"<>[]{}\\ \n\t\0é苹\udcff', max_size=30)
PROMPT = TEXT | st.sampled_from(
    ["Negative prompt: a", "a\nNegative prompt: b\nNegative prompt:", LINE, f"a\n{LINE}\n "]
)
NAME = TEXT.filter(bool)


@st.composite
def any_settings(draw: st.DrawFn) -> PictureSettings:
    """Settings of a picture that was drawn, whatever it was asked for."""
    numbers = {
        "steps": st.integers(1, 10_000),
        "guidance": st.floats(-1e6, 1e6),
        "seed": st.integers(0, 2**64 - 1),
        "strength": st.floats(0, 1),
        "extra_noise": st.floats(0, 1),
        "repeats": st.integers(1, 1000),
        "feather": st.integers(0, 10_000),
        "clip_skip": st.integers(0, 12),
        "size": st.none() | st.tuples(st.integers(8, 4096), st.integers(8, 4096)),
    }
    texts = (
        "image",
        "image_hash",
        "mask",
        "mask_hash",
        "strength_map",
        "scheduler",
        "sampler",
        "schedule_type",
        "dtype",
    )
    flags = ("framed", "exact_steps", "weighting")
    return PictureSettings(
        prompt=draw(PROMPT),
        negative=draw(PROMPT),
        model=draw(NAME),
        embeddings=draw(st.lists(NAME, max_size=3)),
        lora=draw(st.lists(st.builds(LoraWeight, NAME, st.floats(-9, 9)), max_size=3)),
        version="sdedit 0.1.0",
        **{name: draw(values) for name, values in numbers.items()},
        **{name: draw(st.none() | NAME) for name in texts},
        **{name: draw(st.booleans()) for name in flags},
    )


@given(any_settings())
@settings(max_examples=300, deadline=None)
def test_settings_survive_their_text(given: PictureSettings) -> None:
    assume(given.dtype != "auto")
    assert from_text(to_text(given)) == given


@given(any_settings())
@settings(max_examples=50, deadline=None)
def test_settings_survive_a_png(given: PictureSettings) -> None:
    assume(given.dtype != "auto")
    file = io.BytesIO()
    info = PngInfo()
    info.add_text("parameters", to_text(given))
    Image.new("L", (8, 8)).save(file, "PNG", pnginfo=info)
    with Image.open(file) as read:
        assert from_text(read.info["parameters"]) == given


@given(st.text(max_size=200) | st.text(':,"[]{}\\ \nStepskaSize0x<>', max_size=300))
def test_any_text_is_settings_or_an_error(text: str) -> None:
    for one in (text, f"{text}\n{LINE}", f"a\n{LINE}, {text}"):
        with contextlib.suppress(ValueError):
            from_text(one)


def test_reads_what_the_web_ui_writes() -> None:
    text = (
        'a cat, "sitting": yes\nsecond line\nNegative prompt: blurry, ugly\nvery ugly\n'
        "Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 1234, Size: 512x768, "
        'Model hash: abc, Model: v1-5-pruned, Denoising strength: 0.75, Lora hashes: "a: b, c: d", Version: v1.9.4'
    )
    settings = from_text(text)
    assert settings.prompt == 'a cat, "sitting": yes\nsecond line'
    assert settings.negative == "blurry, ugly\nvery ugly"
    assert (settings.steps, settings.guidance, settings.seed) == (20, 7.0, 1234)
    assert (settings.size, settings.strength, settings.model) == ((512, 768), 0.75, "v1-5-pruned")
    assert scheduler_from_label(settings.sampler or "", settings.schedule_type) == "euler-a"


@pytest.mark.parametrize("text", ["", "just words", "a\nSteps: many, Seed: 1", "a\nSteps: 5, Size: big"])
def test_text_that_is_no_settings_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"Steps|Size"):
        from_text(text)


def test_other_tools_find_the_text_in_the_png(tmp_path: Path) -> None:
    settings = PictureSettings(prompt="café, 苹果", seed=5, steps=9, version="sdedit 1")
    save_picture(picture(), tmp_path / "a.png", settings)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info["parameters"] == to_text(settings)
    assert read_settings(tmp_path / "a.png") == settings


def test_a_picture_without_settings_is_an_error(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="carries no settings"):
        read_settings(tmp_path / "a.png")


def test_a_name_means_the_same_whatever_the_model_had() -> None:
    from sdedit.schedulers.names import SCHEDULERS, make_scheduler

    made = {name: make_scheduler(name) for name in SCHEDULERS}
    for before in made.values():
        for name in SCHEDULERS:
            assert scheduler_from_label(*sampler_label(make_scheduler(name, before.config))) == name


def test_labels_go_both_ways() -> None:
    from sdedit.schedulers.names import SCHEDULERS, make_scheduler

    for name in SCHEDULERS:
        assert scheduler_from_label(*sampler_label(make_scheduler(name))) == name
    assert sampler_label(EulerDiscreteScheduler(use_karras_sigmas=True)) == ("Euler", "Karras")
    with pytest.raises(ValueError, match="is not known"):
        scheduler_from_label("Restart", None)


def test_settings_are_read_without_a_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may say that it has billions of pixels; `sdedit again` and `sdedit inspect` need none of them."""
    save_picture(picture(), tmp_path / "a.png", PictureSettings(prompt="cat", seed=3, steps=9))
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[16:24] = struct.pack(">II", 60_000, 60_000)  # the header's width and height, and then its checksum
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="3,600 megapixels"):
        open_image(tmp_path / "a.png")
    assert read_settings(tmp_path / "a.png").seed == 3


def test_the_default_model_takes_a_few_exact_steps_unless_steps_are_given() -> None:
    few, asked, large, jax = (
        PictureSettings(prompt="cat", **given) for given in ({}, {"steps": 20}, {"model": "folder"}, {"backend": "jax"})
    )
    for asking in (few, asked, large, jax):
        asking.suit()
    assert (few.steps, few.exact_steps) == (SUITED.steps, True) and few.steps < 10
    assert (asked.steps, asked.exact_steps) == (20, False)  # as a picture of before says it was drawn
    assert (large.steps, large.exact_steps) == (USUAL.steps, False)
    assert not jax.exact_steps
