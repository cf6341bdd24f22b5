"""Commands bound how long waiting threads spin, before PyTorch is loaded, unless the user chose."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sdedit.commands.cli import SPIN, bound_spinning

NAMES = (*SPIN, "OMP_WAIT_POLICY")
# What a command finds when it runs, and whether PyTorch, whose libraries read the variables, was there already.
CODE = f"""
import os, sys
from sdedit.commands import cli
cli.app = lambda: print({{name: os.environ.get(name) for name in {NAMES}}}, "torch" in sys.modules)
cli.main()
"""


def found(**chosen: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | chosen
    return subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_the_bound_is_there_before_torch() -> None:
    assert found() == f"{ ({**SPIN, 'OMP_WAIT_POLICY': None}) } False"


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_of_the_user_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in NAMES:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "mine")
    bound_spinning()
    assert {other: os.environ.get(other) for other in NAMES} == dict.fromkeys(NAMES) | {name: "mine"}
