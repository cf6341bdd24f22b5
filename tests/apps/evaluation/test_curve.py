"""The curve: what is drawn, what is kept, what is measured, on the small random model."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from conftest import picture
from sdedit import DDIMScheduler, StableDiffusionImg2ImgPipeline
from sdedit.apps.evaluation.curve import Inputs, Row, evaluate, measure, read_inputs, write_csv
from sdedit.apps.evaluation.exact import ExactDenoiser
from sdedit.apps.evaluation.plot import plot_curve
from sdedit.apps.measures import l2_distance
from sdedit.apps.strokes import simulate_strokes

SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        picture(80, 64, seed=i).save(folder / f"red_apple-{i}.png")
    return folder


@pytest.fixture
def inputs(pictures: Path) -> Inputs:
    return read_inputs(pictures, 64)


def test_inputs(pictures: Path, inputs: Inputs, tmp_path: Path) -> None:
    """Squares from the middle; strokes with the paper's kernel in proportion (23 at 256, 5 at 64); names as prompts."""
    assert inputs.prompts == ["red apple"] * 3
    assert inputs.names == [f"000{i}-red_apple-{i}" for i in range(3)]
    assert np.array_equal(np.asarray(inputs.pictures[1]), np.asarray(picture(80, 64, seed=1).crop((8, 0, 72, 64))))
    assert list(map(Image.Image.tobytes, inputs.guides)) == [
        simulate_strokes(one, 6, 5).tobytes() for one in inputs.pictures
    ]
    (tmp_path / "guides").mkdir()
    for i in range(3):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "guides" / f"red_apple-{i}.png")
    own = read_inputs(pictures, 64, guides=tmp_path / "guides")
    assert [guide.getpixel((0, 0)) for guide in own.guides] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    (tmp_path / "guides" / "red_apple-2.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"red_apple-2\.png does not exist"):
        read_inputs(pictures, 64, guides=tmp_path / "guides")


def test_each_point_is_what_the_call_draws(pipe: Any, inputs: Inputs, tmp_path: Path) -> None:
    rows = evaluate(pipe, inputs, (0.5, 1.0), folder=tmp_path / "drawn", batch=2, seed=5, **SETTINGS)
    assert [(row.what, row.strength) for row in rows] == [
        ("guides", 0),
        ("pictures through the VAE", 0),
        ("drawn", 0),
        ("drawn", 0.5),
        ("drawn", 1),
    ]
    distances = []
    for i, guide in enumerate(inputs.guides):
        alone = pipe(
            "red apple",
            guide,
            strength=0.5,
            generator=torch.Generator().manual_seed(5 + i),
            exact_steps=True,
            **SETTINGS,
        ).images[0]
        with Image.open(tmp_path / "drawn" / "strength 0.500" / f"{inputs.names[i]}.png") as kept:
            assert np.abs(np.asarray(kept).astype(int) - np.asarray(alone)).max() <= 1
            distances.append(l2_distance(kept, guide))
    assert rows[3].l2 == pytest.approx(np.mean(distances))
    assert rows[0].l2 == rows[0].l2_low == rows[0].l2_high == 0
    for row in rows:
        assert row.pictures == 3 and row.l2_low <= row.l2 <= row.l2_high


def test_strengths_that_are_almost_alike_are_drawn_apart(pipe: Any, inputs: Inputs, tmp_path: Path) -> None:
    rows = evaluate(pipe, inputs, (0.5, 0.5004), folder=tmp_path / "drawn", **SETTINGS)
    assert [row.strength for row in rows if row.what == "drawn"] == [0, 0.5, 0.5004]
    assert {path.name for path in (tmp_path / "drawn").iterdir() if path.name.startswith("strength")} == {
        "strength 0.000",
        "strength 0.500",
        "strength 0.5004",
    }
    near, far = (len(list((tmp_path / "drawn" / f"strength {s}").glob("*.png"))) for s in ("0.500", "0.5004"))
    assert near == far == len(inputs.names)


def test_it_goes_on_where_it_stopped(pipe: Any, inputs: Inputs, tmp_path: Path) -> None:
    def stop_after_two(batches: Any) -> Any:
        yield from list(batches)[:2]
        raise KeyboardInterrupt

    whole = evaluate(pipe, inputs, (0.5,), folder=tmp_path / "whole", batch=2, **SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        evaluate(pipe, inputs, (0.5,), folder=tmp_path / "part", batch=2, progress=stop_after_two, **SETTINGS)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "part").rglob("*.png")}
    assert len(kept) == 4
    assert evaluate(pipe, inputs, (0.5,), folder=tmp_path / "part", batch=2, **SETTINGS) == whole
    assert all(path.stat().st_mtime_ns == at for path, at in kept.items())


def test_pictures_of_other_settings_are_not_mixed_in(pipe: Any, inputs: Inputs, tmp_path: Path) -> None:
    evaluate(pipe, inputs, (0.5,), folder=tmp_path / "drawn", **SETTINGS)
    with pytest.raises(ValueError, match=r"drawn otherwise \(num_inference_steps\): delete it"):
        evaluate(pipe, inputs, (0.5,), folder=tmp_path / "drawn", **{**SETTINGS, "num_inference_steps": 3})
    other = Inputs(inputs.names, inputs.prompts, inputs.pictures, inputs.pictures)
    with pytest.raises(ValueError, match=r"\(inputs\)"):
        evaluate(pipe, other, (0.5,), folder=tmp_path / "drawn", **SETTINGS)
    with pytest.raises(ValueError, match=r"strengths=1\.5"):
        evaluate(pipe, inputs, (1.5,), folder=tmp_path / "drawn", **SETTINGS)


def known_sets() -> tuple[Inputs, dict[tuple[str, float], list[Image.Image]]]:
    """Pictures, and what comes between them and their blurred strokes: a curve whose ends are known."""
    rng = np.random.default_rng(0)
    noisy = [np.asarray(picture(64, 64, seed=i)) / 255 + 0.1 * rng.normal(size=(64, 64, 3)) for i in range(12)]
    real = [Image.fromarray((one.clip(0, 1) * 255).astype(np.uint8)) for one in noisy]
    guides = [simulate_strokes(one, 6, 5) for one in real]
    between = {
        ("drawn", s): [Image.blend(guide, one, s) for guide, one in zip(guides, real, strict=True)]
        for s in (0.0, 0.25, 0.5, 0.75, 1.0)
    }
    return Inputs([str(i) for i in range(12)], [""] * 12, real, guides), between


def test_what_comes_nearer_to_the_pictures_is_more_real_and_less_faithful() -> None:
    inputs, sets = known_sets()
    rows = measure(inputs, sets)
    distances, l2 = [row.wavelet_kernel_distance for row in rows], [row.l2 for row in rows]
    assert distances == sorted(distances, reverse=True) and distances[-1] == pytest.approx(0)
    assert l2 == sorted(l2) and l2[0] == 0
    whole = [l2_distance(one, guide) for one, guide in zip(inputs.pictures, inputs.guides, strict=True)]
    assert l2[-1] == pytest.approx(np.mean(whole))
    for fraction, row in zip((0, 0.25, 0.5, 0.75, 1), rows, strict=True):  # L2 scales with the difference
        assert row.l2 == pytest.approx(fraction * l2[-1], rel=0.03, abs=0.3)  # but for rounding to 8 bits
        assert row.wavelet_kernel_distance_low <= row.wavelet_kernel_distance <= row.wavelet_kernel_distance_high


def test_blur_is_far_from_real() -> None:
    inputs, _ = known_sets()
    sets = {("drawn", s): [one.filter(ImageFilter.GaussianBlur(s)) for one in inputs.pictures] for s in (0.3, 1.0, 3.0)}
    distances = [row.wavelet_kernel_distance for row in measure(inputs, sets)]
    assert distances == sorted(distances) and distances[0] > 0


def test_table_and_plot(tmp_path: Path) -> None:
    rows = [Row("guides", 0, 4, 0, 0, 0, 2, 1, 3), Row("pictures through the VAE", 0, 4, 9, 8, 10, 0.1, 0, 0.2)]
    rows += [Row("drawn", s, 4, 30 * s, 29 * s, 31 * s, 1.5 - s, 1.4 - s, 1.6 - s) for s in (0, 0.5, 1)]
    write_csv(rows, tmp_path / "curve.csv")
    with (tmp_path / "curve.csv").open(encoding="utf-8") as file:
        read = list(csv.DictReader(file))
    assert [float(row["wavelet_kernel_distance"]) for row in read] == [2, 0.1, 1.5, 1, 0.5]
    assert [row["what"] for row in read][:3] == ["guides", "pictures through the VAE", "drawn"]
    plot_curve({"one": rows, "other": rows}, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as plot:
        assert plot.size == (1200, 400) and len(plot.convert("RGB").getcolors(1 << 20) or []) > 10


def test_too_few_pictures(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="expected at least two"):
        read_inputs(tmp_path, 64)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_inputs(tmp_path / "nowhere", 64)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_with_an_exact_denoiser_pictures_become_more_real_and_less_faithful(prediction: str, tmp_path: Path) -> None:
    """The paper's curve, where the model is not the limit: with the default model's VAE and schedule."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    real = [textured(i) for i in range(8)]
    for _ in range(2):  # so that they are what the VAE can draw
        real = pipe([""] * 8, real, strength=0).images
    guides = [simulate_strokes(one, 6, 23) for one in real]
    inputs = Inputs([str(i) for i in range(8)], [""] * 8, real, guides)
    pipe.unet = ExactDenoiser(pipe, real)
    settings = {"num_inference_steps": 6, "guidance_scale": 1.0}
    rows = evaluate(pipe, inputs, (0.3, 0.6), folder=tmp_path, **settings)[2:]
    assert [row.strength for row in rows] == [0, 0.3, 0.6]
    assert rows[0].l2 < rows[1].l2 <= rows[2].l2
    distances = [row.wavelet_kernel_distance for row in rows]
    assert distances == sorted(distances, reverse=True) and distances[0] > 2 * distances[1]
    with Image.open(tmp_path / "strength 0.600" / "3.png") as drawn:  # it is one of the set's, through the VAE
        through = pipe("", real[3], strength=0).images[0]
        assert l2_distance(drawn, through) < 0.2 * l2_distance(guides[3], through)


def textured(seed: int) -> Image.Image:
    """A disc on a ground, both with stripes of a few pixels, which strokes lose."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:256, :256] / 2
    inside = (x - rng.integers(44, 84)) ** 2 + (y - rng.integers(44, 84)) ** 2 < rng.integers(25, 45) ** 2
    stripes = 0.5 + 0.5 * np.sign(np.sin((x * rng.normal() + y * rng.normal()) * 0.7))
    ground, disc = rng.random((2, 3))
    pixels = np.where(inside[..., None], disc, ground) * (0.5 + 0.5 * stripes[..., None])
    return Image.fromarray((pixels * 255).astype(np.uint8))
