"""Fine-tuning: teach a Stable Diffusion model a style or a thing from a folder of pictures, as a small LoRA file.

`train.py` is the story: read the folder (`dataset.py`), put a LoRA into the networks (`layers.py`), and take steps
(`objective.py` has what is learned, `workers.py` how a step uses the cores), with checkpoints (`checkpoint.py`) and
pictures of how it goes (`pictures.py`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdedit.apps.finetune.pictures import Samples
    from sdedit.apps.finetune.settings import Settings
    from sdedit.apps.finetune.train import TrainResult, train_lora

__all__ = ["Samples", "Settings", "TrainResult", "train_lora"]


def __getattr__(name: str) -> Any:
    """Imported on first use: the command line reads the settings without PyTorch."""
    if name not in __all__:
        raise AttributeError(f"module 'sdedit.apps.finetune' has no attribute {name!r}")
    room = {"Samples": "pictures", "Settings": "settings"}.get(name, "train")
    return getattr(importlib.import_module(f"sdedit.apps.finetune.{room}"), name)
