"""A quick way to train on the folder of small pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdedit.apps.finetune import Samples, train_lora

QUICK = {"steps": 4, "batch_size": 2, "rank": 4, "learning_rate": 1e-2, "warmup": 1}


@pytest.fixture
def train(pipe: Any, pictures: Path, tmp_path: Path) -> Any:
    """`train_lora` on these pictures, in few steps and without samples, unless told otherwise."""

    def call(output: str = "lora.safetensors", *, pipe: Any = pipe, folder: Path = pictures, **more: Any) -> Any:
        quiet = {"samples": Samples([]), "progress_bar": False}
        return train_lora(pipe, folder, tmp_path / output, **quiet | QUICK | more)

    return call
