"""Paths that users import stay valid, and give the very same things."""

from __future__ import annotations

import importlib

import pytest

import sdedit
from sdedit.compat.paths import MOVED


@pytest.mark.parametrize("path", MOVED)
def test_a_moved_module_is_the_one_that_it_stands_for(path):
    assert importlib.import_module(path) is importlib.import_module(MOVED[path])


def test_what_is_in_a_moved_package_is_loaded_once():
    moved = importlib.import_module("sdedit.finetune.settings")
    assert moved.Settings is importlib.import_module("sdedit.apps.finetune.settings").Settings
    assert moved.Settings.__module__ == "sdedit.apps.finetune.settings"  # where pickle and pydoc look for it


def test_what_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError, match=r"sdedit\.framings"):
        importlib.import_module("sdedit.framings")


@pytest.mark.parametrize("name", dir(sdedit))
def test_every_public_name_is_there(name):
    assert getattr(sdedit, name) is not None
