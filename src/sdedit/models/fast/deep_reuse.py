"""Deep features that serve several steps: DeepCache (Ma et al. 2023, arXiv 2312.00858), with extrapolation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sdedit.models.fast.run_cache import cache_of

if TYPE_CHECKING:
    from sdedit.models.unet import UNet2DConditionModel


@dataclass(frozen=True)
class DeepReuse:
    """Between two whole UNet calls of a run, compute only the layers next to input and output.

    What comes up from the deep layers changes slowly from step to step. It is continued along the line through the last
    two whole calls, which is what makes long pauses between them possible.

    Attributes:
        every: One call in so many is whole, and the first two always are.
        layers: How many of the last layers are computed in every call.
        extrapolate: How far to follow the line: 0 repeats the last features, 1 continues it.
    """

    every: int
    layers: int = 1
    extrapolate: float = 1.0

    def u(self, unet: UNet2DConditionModel, x: Tensor, temb: Tensor, context: Any, residuals: Any) -> Tensor:
        """`unet.u`, with features of the run for what is deep; outside a run all is computed."""
        cache = cache_of(unet)
        if cache is None:
            return unet.u(x, temb, context, residuals)
        features: DeepFeatures = cache.features.setdefault(self, DeepFeatures(self))
        deep = features.recall(len(context.text))
        if deep is not None:
            return unet.up(deep, unet.down(x, temb, context, self.layers), temb, context)
        x, skips = unet.middle(unet.down(x, temb, context), temb, context, residuals)
        x = unet.up(x, skips, temb, context, leave=self.layers)
        features.keep(x)
        return unet.up(x, skips, temb, context)


# The levels of `enable_turbo`, by UNet calls from one whole call to the next (DeepCache's N): where 25 steps of the
# default model come within 52, 44 and 37 dB of the exact picture (benchmarks/turbo.py; docs/performance.md).
LEVELS = {1: DeepReuse(every=3), 2: DeepReuse(every=5), 3: DeepReuse(every=8)}


class DeepFeatures:
    """What came up from the deep layers in the last two whole calls of a run."""

    def __init__(self, reuse: DeepReuse) -> None:
        self._reuse = reuse
        self._begin(0)

    def _begin(self, batch: int) -> None:
        self._batch, self._call = batch, -1
        self._kept: list[tuple[int, Tensor]] = []  # with the number of their call

    def recall(self, batch: int) -> Tensor | None:
        """The deep features for this call with so many texts; `None` if the call is to be whole."""
        if batch != self._batch:  # pictures are done, or guidance has ended
            self._begin(batch)
        self._call += 1
        if self._call % self._reuse.every == 0 or len(self._kept) < 2:
            return None
        (before, old), (last, new) = self._kept
        return new + (self._reuse.extrapolate * (self._call - last) / (last - before)) * (new - old)

    def keep(self, features: Tensor) -> None:
        """Features of a whole call, from below the last `layers`."""
        self._kept = [*self._kept, (self._call, features)][-2:]
