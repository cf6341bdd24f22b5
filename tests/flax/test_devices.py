"""Several devices, simulated in a process of its own: the number of devices is fixed when JAX starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sdedit.flax.base import mesh_for


def test_eight_devices_draw_what_one_draws(folder: Path) -> None:
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("on_devices.py")
    run = subprocess.run(
        [sys.executable, str(script), str(folder)], env=os.environ | flags, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize(("batch", "devices"), [(1, 1), (6, 6), (8, 8), (12, 6), (7, 7), (11, 1)])
def test_as_many_devices_as_divide_the_batch(monkeypatch: pytest.MonkeyPatch, batch: int, devices: int) -> None:
    import jax

    monkeypatch.setattr(jax, "devices", lambda: [object()] * 8)
    monkeypatch.setattr("sdedit.flax.base.Mesh", lambda array, names: array)
    assert len(mesh_for(batch)) == devices
