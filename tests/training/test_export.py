"""From a start through a few steps to a folder that loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import model
from captions import things
from data import Item
from export import export
from guides import KINDS
from loop import Plan, Training, read_state
from paths import EXPORT, read_json, work_folder, write_json
from sdedit import StableDiffusionImg2ImgPipeline
from train_unet import Loss, Samples

WEIGHTS = sorted(path.relative_to(EXPORT) for path in EXPORT.rglob("*.safetensors"))


@pytest.fixture(autouse=True)
def started(work: Path) -> object:
    """A work folder in which training begins with the model of the package."""
    threads = torch.get_num_threads()
    model.set_start(EXPORT)
    write_json([0, 1], work_folder() / "latents.json")
    yield
    model._start.cache_clear()
    torch.set_num_threads(threads)


def test_without_a_step_the_export_is_the_start(tmp_path: Path) -> None:
    export(tmp_path / "model")
    assert len(WEIGHTS) == 4
    for name in WEIGHTS:
        before, after = load_file(EXPORT / name), load_file(tmp_path / "model" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    for name in (
        "unet/config.json",
        "vae/config.json",
        "tiny_vae/config.json",
        "scheduler/scheduler_config.json",
        "model_index.json",
    ):
        assert read_json(tmp_path / "model" / name) == read_json(EXPORT / name)
    before, after = (read_json(folder / "training.json") for folder in (EXPORT, tmp_path / "model"))
    assert after["unet_steps"] == before["unet_steps"]
    assert after["things"] == len(things())


def test_steps_change_the_networks_and_the_export_loads(tmp_path: Path) -> None:
    items = [Item("red apple", "3d", "1f34e", "food-drink", [], ["red"], False)]
    latents = np.random.default_rng(0).normal(size=(2, len(KINDS), 8, 16, 16)).astype(np.float16)
    samples = Samples(latents, [0, 0], items, model.tokenizer(), 2)
    plan = Plan(steps=2, rate=1e-3, warm_up=1, fall=1)
    training = Training(model.new_denoiser(), Loss(), samples, plan, work_folder() / "unet.pt")
    assert all(np.isfinite(value) for value in training.run())
    moved = read_state(work_folder() / "unet.pt")["average"]
    assert {name.split(".")[0] for name in moved} == {"unet", "text_encoder"}
    export(tmp_path / "model")
    for part in ("unet", "text_encoder"):
        (name,) = (name for name in WEIGHTS if name.parts[0] == part)
        before, after = load_file(EXPORT / name), load_file(tmp_path / "model" / name)
        assert any(not torch.equal(before[key], after[key]) for key in before)
    export(tmp_path / "between", start_share=0.25)
    (name,) = (name for name in WEIGHTS if name.parts[0] == "unet")
    before, after, between = (load_file(root / name) for root in (EXPORT, tmp_path / "model", tmp_path / "between"))
    for key, weight in between.items():
        expected = 0.75 * after[key].float() + 0.25 * before[key].float()
        torch.testing.assert_close(weight.float(), expected, rtol=2e-3, atol=1e-5)
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "model")
    trained = dict(pipe.unet.named_parameters())["conv_in.weight"]
    assert torch.allclose(trained, moved["unet.conv_in.weight"], atol=1e-3)
    assert (
        read_json(tmp_path / "model" / "training.json")["unet_steps"]
        == read_json(EXPORT / "training.json")["unet_steps"] + 2
    )
