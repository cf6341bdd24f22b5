"""Configs under the names that users of diffusers know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sdedit.config import Config as FrozenDict
from sdedit.config import Configurable as ConfigMixin

F = TypeVar("F", bound=Callable[..., Any])

__all__ = ["ConfigMixin", "FrozenDict", "register_to_config"]


def register_to_config(init: F) -> F:
    """Nothing: a `ConfigMixin` records the arguments of `__init__` by itself."""
    return init
