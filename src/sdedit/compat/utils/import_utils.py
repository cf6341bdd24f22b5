"""What is installed: the same functions as in `sdedit.utils`."""

from __future__ import annotations

from typing import Any

from sdedit.compat import utils


def __getattr__(name: str) -> Any:
    if name.startswith("is_"):
        return getattr(utils, name)
    raise AttributeError(f"module 'sdedit.utils.import_utils' has no attribute {name!r}")
