"""The log of the package `sdedit`: Python's own, with the short names that scripts use to quieten it."""

from __future__ import annotations

import logging
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, WARNING

__all__ = ["CRITICAL", "DEBUG", "ERROR", "FATAL", "INFO", "WARNING", "get_logger", "get_verbosity", "set_verbosity"]

_bars = True


def get_logger(name: str | None = None) -> logging.Logger:
    """The logger of a module; the package's own without a name."""
    return logging.getLogger(name or "sdedit")


def get_verbosity() -> int:
    """The level of the package's logger."""
    return get_logger().getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    """Set the level of the package's logger."""
    get_logger().setLevel(verbosity)


def set_verbosity_debug() -> None:
    """Log everything."""
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    """Log from INFO on."""
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    """Log from WARNING on."""
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    """Log from ERROR on."""
    set_verbosity(ERROR)


def is_progress_bar_enabled() -> bool:
    """Was `disable_progress_bar` not called, or undone?"""
    return _bars


def enable_progress_bar() -> None:
    """Undo `disable_progress_bar`."""
    global _bars
    _bars = True


def disable_progress_bar() -> None:
    """No bars while loading: sdedit shows none. The bar of a call is `pipe.set_progress_bar_config(disable=True)`."""
    global _bars
    _bars = False
