"""Where the recipe keeps what it makes."""

import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
EXPORT = REPOSITORY / "src" / "sdedit" / "default_model"


def work_folder() -> Path:
    """The folder for packages, pictures, checkpoints and logs: $SDEDIT_TRAINING, else ~/sdedit-training."""
    folder = Path(os.environ.get("SDEDIT_TRAINING", Path.home() / "sdedit-training"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
