"""Pictures of other tools: their words mean here what they mean there, and what is not used is named."""

from __future__ import annotations

import contextlib
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from typer.testing import CliRunner

from conftest import SHARED, needs_shared, picture
from sdedit.commands.cli import app
from sdedit.commands.foreign import scheduler_from_label, scheduler_of
from sdedit.commands.metadata import from_text, read_settings
from sdedit.commands.saving import save_picture
from sdedit.commands.settings import PictureSettings

again_module = importlib.import_module("sdedit.commands.again")
settings_module = importlib.import_module("sdedit.commands.settings")
CASES = SHARED / "data" / "cases"
LINE = "Steps: 6, Sampler: DPM++ 2M, Schedule type: Automatic, CFG scale: 3, Seed: 1, Size: 64x48"


def text(prompt: str = "a cat", **pairs: object) -> str:
    more = "".join(f", {key.replace('_', ' ')}: {value}" for key, value in pairs.items())
    return f"{prompt}\n{LINE}{more}"


def png(path: Path, parameters: str) -> Path:
    info = PngInfo()
    info.add_text("parameters", parameters)
    picture(64, 48).save(path, pnginfo=info)
    return path


@needs_shared
def test_a_picture_of_the_web_ui() -> None:
    settings = read_settings(CASES / "a1111w.png")
    assert (settings.prompt, settings.negative) == ("(masterpiece:1.4), red apple, [dull]", "(blurry:1.3)")
    assert settings.weighting and settings.lora == [("add_detail", 0.5)] and settings.clip_skip == 1
    assert scheduler_of(settings) == "dpm++-2m-karras-linspace"
    assert (settings.strength, settings.guidance, settings.size) == (0.6, 3.0, (128, 128))


@needs_shared
def test_a_picture_of_comfy() -> None:
    settings = read_settings(CASES / "comfy-sched.png")
    assert scheduler_of(settings) == "dpm++-2m-karras-linspace" and settings.scheduler is None


@pytest.mark.parametrize(
    ("sampler", "kind", "name"),
    [
        ("DPM++ 2M", "Automatic", "dpm++-2m-karras"),
        ("DPM++ 2M", "Uniform", "dpm++-2m"),
        ("DPM++ 2M Karras", None, "dpm++-2m-karras"),
        ("DPM++ 2M", "Exponential", "dpm++-2m-exponential"),
        ("DPM++ 2M", "Beta", "dpm++-2m-beta"),
        ("Euler", "SGM Uniform", "euler-trailing"),
        ("euler", "sgm_uniform", "euler-trailing"),
        ("Euler a", "Simple", "euler-a-trailing"),
        ("euler_ancestral", "normal", "euler-a"),
        ("Euler", "DDIM", "euler-leading"),
        ("DPM++ 2M SDE", "Automatic", "dpm++-2m-sde-exponential"),
        ("DPM++ SDE", "Automatic", "dpm++-sde-karras"),
        ("DPM2 a", "Automatic", "dpm2-a-karras"),
        ("Euler a", "Automatic", "euler-a"),
        ("DDIM", "Automatic", "ddim"),
        ("dpmpp_2m_sde_gpu", "karras", "dpm++-2m-sde-karras"),
        ("uni_pc", "normal", "unipc"),
    ],
)
def test_samplers_and_schedules(sampler: str, kind: str | None, name: str) -> None:
    from sdedit.schedulers.names import make_scheduler

    assert scheduler_from_label(sampler, kind) == name
    made = make_scheduler(name, {"timestep_spacing": "leading"}).config
    kinds = {k for k in ("karras", "exponential", "beta") if made.get(f"use_{k}_sigmas")}
    assert kinds == {k for k in ("karras", "exponential", "beta") if name.endswith(k)}
    assert made.timestep_spacing == ("trailing" if name.endswith("trailing") else "leading")
    assert make_scheduler(f"{name}-linspace").config.timestep_spacing == "linspace"


@pytest.mark.parametrize(
    ("sampler", "kind"),
    [("DPM++ 2S a", "Automatic"), ("Euler a", "Karras"), ("Euler", "Align Your Steps"), ("Restart", None), ("", None)],
)
def test_what_we_have_not_is_an_error(sampler: str, kind: str | None) -> None:
    with pytest.raises(ValueError, match=r"is not known; choose with --scheduler one of ddim"):
        scheduler_from_label(sampler, kind)


def test_missing_keys_mean_what_they_mean_there() -> None:
    settings = from_text("a\nSteps: 6, Sampler: DPM++ 2M, Seed: 1")
    assert scheduler_of(settings).startswith("dpm++-2m-karras") and settings.clip_skip == 0


def test_our_own_keys_count_in_our_own_files_only() -> None:
    own = {"Init image": "/etc/passwd", "Mask": "m.png", "Embeddings": "x.pt", "LoRA": "<lora:y:1>", "Repeats": 9}
    own |= {"Scheduler": "ddim", "Backend": "jax", "Framed": "True", "Exact steps": "True", "Precision": "float16"}
    line = ", ".join(f'{key}: "{value}"' for key, value in own.items())
    for version in ("v1.9.4", "f2.0", "ComfyUI", "not sdedit"):
        settings = from_text(f"a\n{LINE}, {line}, Version: {version}")
        usual = PictureSettings()
        for name in ("image", "mask", "embeddings", "lora", "repeats", "scheduler", "backend", "framed", "dtype"):
            assert getattr(settings, name) == getattr(usual, name), name
        assert any("init image" in one for one in settings.unused)
    assert from_text(f"a\n{LINE}, {line}, Version: sdedit 0.1.0").image == "/etc/passwd"


@pytest.mark.parametrize(
    ("prompt", "left", "loras", "unused"),
    [
        ("a <lora:x:0.5>, b", "a, b", [("x", 0.5)], []),
        ("<lora:sub/x y> a<lyco:z:-1>", "a", [("sub/x y", 1.0), ("z", -1.0)], []),
        ("a <lora:x:0.5:0.8>", "a", [("x", 0.5)], ["<lora:x:0.5:0.8>: its further weights"]),
        ("a <hypernet:h:1> <lora:x:many>", "a", [], ["<hypernet:h:1>", "<lora:x:many>"]),
        ("a <b> < lora:x:1>", "a <b> < lora:x:1>", [], []),
    ],
)
def test_tags(prompt: str, left: str, loras: list[Any], unused: list[str]) -> None:
    settings = from_text(text(prompt))
    assert (settings.prompt, settings.lora, settings.unused) == (left, loras, unused)


def test_what_is_not_used_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again_module, "make_pictures", lambda *_: None)
    parameters = text(ENSD=31337, Hires_upscale=2, Version="v1.9.4", Model_hash="6ce0161689")
    made = png(tmp_path / "a.png", parameters)
    ran = CliRunner().invoke(app, ["again", str(made), "--image", str(made), "--model", "default"])
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    lines = [line for line in ran.stderr.splitlines() if line.startswith("not used: ")]
    assert lines == ["not used: ensd: 31337, hires upscale: 2"]


@pytest.fixture
def again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`sdedit again` of a text, up to the drawing; gives the settings that would be drawn, or the error."""
    seen: list[PictureSettings] = []
    monkeypatch.setattr(again_module, "make_pictures", lambda settings, *_: seen.append(settings))

    def run(parameters: str, *options: str, typed: str = "") -> PictureSettings | str:
        made = png(tmp_path / "a.png", parameters)
        ran = CliRunner().invoke(app, ["again", str(made), "--image", str(made), *options], input=typed)
        return seen.pop() if ran.exit_code == 0 else f"{ran.exception} {ran.stderr}"

    return run


def test_loras_are_found_beside_the_picture(again: Any, tmp_path: Path) -> None:
    missing = again(text("a <lora:x:0.5>"), "--model", "default")
    assert "the LoRA 'x', which is not beside it" in missing and "--lora FILE:0.5" in missing
    assert again(text("a <lora:x:0.5>"), "--model", "default", "--lora", "").lora == []
    (tmp_path / "loras").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "loras" / "x.safetensors")
    assert again(text("a <lora:x:0.5>"), "--model", "default").lora == [
        (str(tmp_path / "loras" / "x.safetensors"), 0.5)
    ]
    for name in ("../../x", "/etc/x", "..\\x"):
        assert f"the LoRA {name!r}" in again(text(f"a <lora:{name}:1>"), "--model", "default")


def test_the_model_is_found_beside_the_picture_or_named(again: Any, tmp_path: Path) -> None:
    assert "the model 'v1-5', which is not beside it; give its file with --model" in again(text(Model="v1-5"))
    save_file({"x": torch.zeros(1)}, tmp_path / "v1-5.safetensors")
    assert again(text(Model="v1-5")).model == str(tmp_path / "v1-5.safetensors")
    assert again(text()).model == "default"


def test_another_drive_keeps_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where no relative path leads from one drive to another."""

    def other_drive(*_: object) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(settings_module.os.path, "relpath", other_drive)
    assert settings_module.relative("/there/in.png", Path("/here")) == "/there/in.png"


def test_names_of_any_bytes_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PictureSettings] = []
    monkeypatch.setattr(again_module, "make_pictures", lambda settings, *_: seen.append(settings))
    for i, name in enumerate((' in, "a": b.png', "in\udcff.png", "[1].png", "-.png", "a\nb.png")):
        picture(64, 48).save(tmp_path / "plain.png")
        (tmp_path / "plain.png").rename(tmp_path / name)
        settings = PictureSettings(image=str(tmp_path / name), steps=2, strength=1.0, guidance=1, seed=1)
        settings.hash_files()
        save_picture(picture(64, 48), tmp_path / f"{i}.png", settings)
        ran = CliRunner().invoke(app, ["again", str(tmp_path / f"{i}.png")])
        assert ran.exit_code == 0, repr(ran.exception)
        assert seen.pop().image == str(tmp_path / name)


def ours(**pairs: object) -> str:
    return text(**pairs, Version='"sdedit 0.1.0"')


def test_what_is_outside_the_pictures_folder_is_asked_for(again: Any, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-m.png"
    picture(64, 48).save(outside)
    picture(64, 48).save(tmp_path / "inside" / "m.png")
    inside = again(ours(Mask="inside/m.png"))
    assert inside.mask == str(tmp_path / "inside" / "m.png")  # not asked
    for name, shown in ((f"../{outside.name}", str(outside)), (str(outside), str(outside))):
        refused = again(ours(Mask=f'"{name}"'))
        assert shown in refused and "--trust" in refused
        assert again(ours(Mask=f'"{name}"'), typed="n\n").startswith(
            f"{tmp_path / 'a.png'} wants what is not beside it"
        )
        assert again(ours(Mask=f'"{name}"'), typed="y\n").mask == str(outside)
        assert again(ours(Mask=f'"{name}"'), "--trust").mask == str(outside)
    assert again(ours(Mask='"/nowhere.png"'), "--mask", "").mask is None  # what the user gives is not asked for
    link = tmp_path / "link.png"
    link.symlink_to(outside)
    assert "--trust" in again(ours(Mask="link.png"))


@pytest.mark.parametrize("key", ["Model", "Embeddings", "LoRA"])
def test_hub_ids_are_asked_for(again: Any, key: str) -> None:
    value = '"<lora:owner/name:1>"' if key == "LoRA" else "owner/name"
    assert "owner/name; expected a yes, or --trust" in again(ours(**{key: value}))
    assert not isinstance(again(ours(**{key: value}), typed="y\n"), str)


def test_it_says_what_it_opens_and_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(again_module, "make_pictures", lambda *_: None)
    made = png(tmp_path / "a.png", ours(Model="owner/name", Init_image="a.png"))
    ran = CliRunner().invoke(app, ["again", str(made), "--trust"])
    assert f"opens {made}\ndownloads owner/name, unless it is in the hub's cache\n" in ran.stderr


def test_every_option_of_run_changes_the_picture(again: Any) -> None:
    from sdedit.commands.options import annotated, flag

    values = {"str": "x", "int": "3", "float": "0.5"}
    names = {
        "scheduler": "ddim",
        "dtype": "float32",
        "backend": "jax",
        "model": "m",
        "lora": "l:0.5",
        "embeddings": "a/b",
    }
    for option in annotated(PictureSettings):
        kind = str(option.annotation.__origin__).removeprefix("<class '").removesuffix("'>").partition(" ")[0]
        name = option.name
        typed = [f"--{name.replace('_', '-')}" if kind == "bool" or name in ("image", "prompt") else flag(option)]
        if kind != "bool":
            typed.append(names.get(name) or ("3" if name == "seed" else values.get(kind, "x")))
        if name in ("image", "mask", "strength_map"):
            continue  # files: see above
        changed = again(text(), *typed)
        assert isinstance(changed, PictureSettings), changed
        assert getattr(changed, name) != getattr(PictureSettings(), name), name


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"Size": "25000x25000"}, "25000x25000; expected at most"),
        ({"Size": "999999999999x9"}, "expected at most"),
        ({"Repeats": 10**9}, "--repeats 1000000000; expected 1 to 1000"),
        ({"Steps": 10**9}, "--steps 1000000000; expected 1 to 10000"),
        ({"Mask_feather": 10**9}, "--feather 1000000000"),
        ({"Denoising_strength": "nan"}, "--strength nan"),
        ({"CFG_scale": "1e999"}, "--guidance inf"),
        ({"Seed": 2**64}, "--seed"),
        ({"Seed": "-1"}, "--seed -1; expected"),
        ({"Clip_skip": 10**9}, "--clip-skip"),
    ],
)
def test_large_numbers_are_refused_at_the_door(again: Any, pairs: dict[str, object], message: str) -> None:
    line = {"Steps": 6, "Seed": 1, "Size": "64x48"} | {key.replace("_", " "): value for key, value in pairs.items()}
    parameters = "a\n" + ", ".join(f"{key}: {value}" for key, value in line.items())
    assert message in again(f"{parameters}, Version: sdedit 0.1.0")


@needs_shared
def test_the_small_bombs(tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["again", str(CASES / "again_size.png"), "-o", str(tmp_path / "o.png")])
    assert "25000x25000; expected at most 100 megapixels" in str(ran.exception)
    with pytest.raises(ValueError, match="Steps"):
        read_settings(CASES / "again_redos.png")


def test_the_time_is_linear_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: how far the expression for keys and the JSON reader look, in all."""
    looked = 0
    raw_decode = json.JSONDecoder.raw_decode

    def counting(self: json.JSONDecoder, line: str, start: int = 0) -> Any:
        nonlocal looked
        looked += 1
        return raw_decode(self, line, start)

    monkeypatch.setattr(json.JSONDecoder, "raw_decode", counting)
    for unit in ("a", "a:", "a: [", 'a: "', "a,", 'a: {"', "a b ", "a: [[", ": ", "Steps: ", "<lora:", " "):
        looked = 0
        with contextlib.suppress(ValueError):
            from_text(f"cat\nSteps: 1, a: {unit * 200_000}"[:1_000_000])
        assert looked <= 200, unit  # 100 tries, in the two passes over a line
    with pytest.raises(ValueError, match="expected at most"):
        from_text("a" * ((1 << 20) + 1))


@pytest.mark.parametrize(
    "parameters",
    [
        "a\nsteps: 20.0, SAMPLER: Euler a, cfg SCALE: 7.0, seed: 3.0, size: 64X48",
        "a\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 64x48\nTemplate: a {b|c}\nNegative Template: d",
        "a\nSteps: 5, Sampler: Heun, Seed: 9\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 3, Size: 64x48",
        'a\nSteps: 20, Hashes: {"model": "12", "lora:x": "34, Seed: 9"}, Sampler: Euler a, CFG scale: 7, '
        'Civitai resources: [{"type":"checkpoint","weight":1, "Seed": 8}], Seed: 3, Size: 64x48',
    ],
)
def test_lines_as_people_have_them(parameters: str) -> None:
    settings = from_text(parameters)
    assert (settings.steps, settings.sampler, settings.guidance, settings.seed) == (20, "Euler a", 7.0, 3)
    assert settings.size == (64, 48) and settings.prompt.startswith("a")


def test_text_after_the_pixels_is_found(tmp_path: Path) -> None:
    data = png(tmp_path / "a.png", text()).read_bytes()
    start = data.index(b"tEXt") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    late = data[:start] + data[end:-12] + data[start:end] + data[-12:]
    assert late.index(b"tEXt") > late.index(b"IDAT")
    (tmp_path / "late.png").write_bytes(late)
    assert read_settings(tmp_path / "late.png").prompt == "a cat"
