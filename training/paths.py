"""Where the recipe keeps what it makes, and how it saves without leaving half a file behind."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
EXPORT = REPOSITORY / "src" / "sdedit" / "default_model"


def work_folder() -> Path:
    """The folder for packages, pictures, checkpoints and logs: $SDEDIT_TRAINING, else ~/sdedit-training."""
    folder = Path(os.environ.get("SDEDIT_TRAINING", Path.home() / "sdedit-training"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def save_atomically(state: Any, path: Path) -> None:
    """torch.save to a file beside it, then rename: a kill at any moment leaves the old checkpoint whole."""
    part = path.with_suffix(path.suffix + ".part")
    torch.save(state, part)
    part.replace(path)


def stop_asked() -> Callable[[], bool]:
    """From now on, Ctrl-C or a plain `kill` only makes this answer True: the caller ends its step, saves and stops."""
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())
    return asked.is_set


def write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
