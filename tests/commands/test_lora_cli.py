"""`sdedit run --lora FILE[:WEIGHT]` and `sdedit again`, in this process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

from conftest import picture
from sdedit.commands.cli import app
from sdedit.commands.metadata import from_text, read_settings, to_text
from sdedit.commands.settings import PictureSettings, with_weight

FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"


def sdedit(*arguments):
    ran = CliRunner().invoke(app, list(map(str, arguments)))
    assert ran.exit_code == 0, ran.output + str(ran.exception)
    return ran


def pixels(path):
    with Image.open(path) as opened:
        return np.asarray(opened).astype(int)


def test_run_and_again(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(64, 48).save("in.png")
    for seed, name in enumerate(("q", "v")):
        torch.manual_seed(seed)
        down, up = torch.randn(4, 64), torch.randn(64, 4)
        save_file({f"{FLAT}{name}.lora_down.weight": down, f"{FLAT}{name}.lora_up.weight": up}, f"{name}.safetensors")
    call = ("run", "in.png", "apple", "--model", folder, "--steps", 3, "--seed", 7, "-o")
    sdedit(*call, "plain.png")
    ran = sdedit(*call, "out.png", "--lora", "q.safetensors:0.5", "--lora", tmp_path / "v.safetensors")
    assert "kohya layout" in ran.output and "1 LoRA; rank 4, alpha 4" in ran.output
    assert read_settings("out.png").lora == [("q.safetensors", 0.5), ("v.safetensors", 1.0)]
    with Image.open("out.png") as opened:
        assert 'LoRA: "<lora:q.safetensors:0.5> <lora:v.safetensors:1>"' in opened.info["parameters"]
    sdedit(*call, "other.png", "--lora", "q.safetensors:0.1", "--lora", "v.safetensors")
    assert np.abs(pixels("out.png") - pixels("plain.png")).max() > 0
    assert np.abs(pixels("out.png") - pixels("other.png")).max() > 0

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sdedit("again", "--trust", tmp_path / "out.png", "-o", "twice.png")
    assert np.array_equal(pixels("twice.png"), pixels(tmp_path / "out.png"))


def test_without_peft_the_error_says_what_to_install(folder, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    picture(64, 48).save(tmp_path / "in.png")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    arguments = ["run", tmp_path / "in.png", "a", "--model", folder, "-o", tmp_path / "o.png"]
    arguments += ["--lora", tmp_path / "x.safetensors"]
    ran = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(ran.exception, ImportError) and "pip install -U 'sdedit[lora]'" in str(ran.exception)
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize(
    "text, want",
    [
        ("a.safetensors", ("a.safetensors", 1.0)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("owner/name:-1", ("owner/name", -1.0)),
        ("C:\\loras\\a.safetensors", ("C:\\loras\\a.safetensors", 1.0)),
        ("C:\\loras\\a.safetensors:2", ("C:\\loras\\a.safetensors", 2.0)),
    ],
)
def test_weights(text, want):
    assert with_weight(text) == want


def test_settings_survive_their_text():
    settings = PictureSettings(
        prompt="a cat",
        steps=9,
        version="sdedit 1",
        lora=[("C:\\a, b.safetensors", 0.25), ('../"x" <y>.pt', -1.0), ("owner/name", 1.0)],
    )
    assert from_text(to_text(settings)) == settings
