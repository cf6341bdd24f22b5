"""Configs: read-only, complete, and the same after any way of carrying them."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from conftest import SCHEDULE, UNET
from sdedit import (
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from sdedit.config import Config, Configurable


class Cake(Configurable):
    def __init__(self, eggs: int = 3, layers: tuple[int, ...] = (1, 2), flour: float = 0.5, name: str | None = None):
        self.made_of = (eggs, layers, flour, name)


class Bread(Configurable):
    def __init__(self, eggs: int = 0, flour: float = 1.0):
        self.made_of = (eggs, flour)


class BirthdayCake(Cake):
    def __init__(self, candles: int = 30, eggs: int = 5):
        super().__init__(eggs=eggs)


def test_a_config_is_read_only() -> None:
    config = Cake(eggs=4).config
    assert config.eggs == config["eggs"] == 4 and config.flour == 0.5
    for change in (
        lambda: config.update(eggs=1),
        lambda: config.pop("eggs"),
        lambda: config.__setitem__("eggs", 1),
        lambda: setattr(config, "eggs", 1),
        lambda: config.setdefault("x", 1),
        config.clear,
        lambda: config.__delitem__("eggs"),
        lambda: config.__ior__({"eggs": 1}),
    ):
        with pytest.raises(TypeError, match="read-only"):
            change()
    with pytest.raises(AttributeError, match=r"no key 'sugar'; it has _class_name, eggs"):
        config.sugar  # noqa: B018
    assert not hasattr(config, "__deepcopy__") and getattr(config, "sugar", None) is None


@pytest.mark.parametrize(
    "carry", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c)), lambda c: Config(**c)]
)
def test_a_config_can_be_carried(carry: Any) -> None:
    config = Cake(layers=(5, 6)).config
    carried = carry(config)
    assert carried == config and type(carried) is Config
    assert Cake.from_config(carried).made_of == (3, (5, 6), 0.5, None)


def test_files(tmp_path: Path) -> None:
    Cake(layers=(4,), flour=np.float32(0.25)).save_config(tmp_path / "a" / "b")
    held = json.loads((tmp_path / "a/b/config.json").read_text())
    assert held["_class_name"] == "Cake" and held["layers"] == [4] and "_use_default_values" not in held
    for source in (tmp_path / "a/b", str(tmp_path / "a/b/config.json"), held):
        made = Cake.from_config(source)
        assert made.made_of == (3, (4,), 0.25, None) and made.config.layers == (4,)
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        Cake.from_config(tmp_path)


def test_what_a_class_does_not_know_is_kept_and_its_own_defaults_are_not_carried_on() -> None:
    bread = Bread.from_config(Cake(flour=0.7, name="x").config)
    assert bread.made_of == (0, 0.7)  # the eggs of a cake were a cake's default
    assert bread.config.name == "x"
    assert Cake.from_config(bread.config).made_of == (3, (1, 2), 0.7, "x")
    assert Bread.from_config(Cake(eggs=3).config).made_of == (3, 1.0)  # said, not left at the default


def test_overrides() -> None:
    assert Cake.from_config({"eggs": 1}, eggs=2).made_of[0] == 2
    with pytest.raises(TypeError, match=r"Cake has no option sugar; it has eggs, flour, layers, name"):
        Cake.from_config({}, sugar=1)
    cake = Cake()
    cake.register_to_config(eggs=9)
    assert cake.config.eggs == 9 and "eggs" not in cake.config["_use_default_values"]


def test_a_subclass_records_its_own_arguments() -> None:
    cake = BirthdayCake(candles=4)
    assert (cake.config.candles, cake.config.eggs) == (4, 5) and cake.config["_class_name"] == "BirthdayCake"


@pytest.mark.parametrize("cls", [UNet2DConditionModel, AutoencoderTiny, DDIMScheduler])
def test_objects_survive_copying_and_pickling(cls: Any) -> None:
    made = cls(**UNET) if cls is UNet2DConditionModel else cls()
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again.config == made.config and type(again) is cls


def test_schedulers_take_each_others_configs_and_those_of_diffusers() -> None:
    """The ecosystem's way of changing the scheduler: `Other.from_config(pipe.scheduler.config)`, and back."""
    ddim = DDIMScheduler(**SCHEDULE)
    there = EulerDiscreteScheduler.from_config(ddim.config)
    assert there.config.beta_end == 0.012 and there.config.set_alpha_to_one is False
    assert there.config.timestep_spacing == "linspace"  # Euler's own default
    back = DDIMScheduler.from_config(there.config)
    assert {k: v for k, v in back.config.items() if k in SCHEDULE} == SCHEDULE
    assert back.config.timestep_spacing == ddim.config.timestep_spacing
    # A default of one class is not taken for a wish by a third one, with a class in between that does not know it.
    ddpm = EulerDiscreteScheduler.from_config(DDPMScheduler().config)
    assert DPMSolverMultistepScheduler.from_config(ddpm.config).config.variance_type is None
    for name in ("DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"):
        theirs = getattr(diffusers, name)(beta_schedule="scaled_linear")
        assert EulerDiscreteScheduler.from_config(theirs.config).config.beta_schedule == "scaled_linear"
        assert getattr(diffusers, name).from_config(there.config).config.beta_end == 0.012


def test_configs_of_one_scheduler_written_in_full_make_another(tmp_path: Path) -> None:
    """A file lists every option, at its default too: what the other class has no such value for must not stop it."""
    for first in (DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDIMScheduler):
        first(beta_schedule="scaled_linear").save_config(tmp_path)
        for second in (DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, DDIMScheduler):
            made = second.from_config(first.from_config(tmp_path).config)
            made.set_timesteps(4)
            x = torch.ones(1, 4, 2, 2)
            assert torch.isfinite(made.step(x, made.timesteps[0], x).prev_sample).all()
