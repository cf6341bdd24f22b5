"""What the steps of one run share: keys and values of the text, packed weights that are known to be current, features.

It belongs to the run, and a run to the thread (`contextvars`) that began it, so networks may be shared by runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdedit.models.fast.packing import Layouts, use_layouts

if TYPE_CHECKING:
    from sdedit.models.attention import Context
    from sdedit.models.fast.deep_reuse import DeepReuse

_caches: ContextVar[tuple[RunCache, ...]] = ContextVar("run caches", default=())  # of the runs under way, inner last


class RunCache:
    """Of one run of a UNet.

    Attributes:
        features: Of the deep layers, see `DeepReuse`, by which they were kept; `clear` leaves them.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet
        self.features: dict[DeepReuse, Any] = {}
        self._context: Context | None = None
        self._layouts: dict[int, Layouts] = {}

    def context(self, text: Tensor, make: Callable[[], Context]) -> Context:
        """What the layers attend to, made anew for a text that is not the very tensor of the call before."""
        if self._context is None or self._context.text is not text:
            self._context = make()
        return self._context

    def clear(self) -> None:
        """Weights, images, or what is in the text may have changed: make of them anew what is made of them."""
        self._context = None
        self._layouts.clear()


@contextmanager
def cached_run(unet: Any) -> Iterator[RunCache]:
    """Inside, in this thread, the calls of this UNet are one run."""
    cache = RunCache(unet)
    outer = _caches.set((*_caches.get(), cache))
    try:
        with use_layouts(cache._layouts):
            yield cache
    finally:
        _caches.reset(outer)


def cache_of(unet: Any) -> RunCache | None:
    """The cache of the run of this UNet that is under way in this thread; `None` if there is none."""
    if torch.compiler.is_compiling():
        return None
    return next((cache for cache in reversed(_caches.get()) if cache.unet is unet), None)
