"""Networks without values: shapes alone, made in no time, in one thread and in no other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _NoInitialisation(TorchFunctionMode):
    """Inside this, `torch.nn.init` leaves tensors as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def blank() -> Iterator[None]:
    """Networks that are made inside this have shapes but no values, for a loader to give them some.

    Modes of PyTorch belong to the thread that enters them; patching `nn.Module`, as PEFT and accelerate do for the same
    end, changes all threads, and when two of them overlap, for good. Random values for the meta device cost seconds:
    they make PyTorch import its compiler.
    """
    with torch.device("meta"), _NoInitialisation():
        yield
