"""Schedulers: the solvers that take a noisy latent to a clean one, with the names and numbers of diffusers.

Every solver is a list of rows (`sdedit.schedulers.rows`), made in NumPy and applied by one function.
"""

from __future__ import annotations

from typing import Any

from sdedit.config import later
from sdedit.schedulers.names import CLASS_NAMES, SCHEDULERS, make_scheduler

__all__ = ["SCHEDULERS", "SchedulerOutput", "make_scheduler", *CLASS_NAMES]


def __getattr__(name: str) -> Any:
    if name in CLASS_NAMES:
        return later(f"sdedit.schedulers.classes:{name}")
    if name in ("Scheduler", "SchedulerOutput"):
        return later(f"sdedit.schedulers.base:{name}")
    if name == "KarrasDiffusionSchedulers":
        return later(f"sdedit.compat.schedulers:{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
