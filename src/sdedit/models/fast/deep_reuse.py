"""Deep features that serve several steps: DeepCache (Ma et al. 2023, arXiv 2312.00858), with extrapolation."""

from __future__ import annotations

from torch import Tensor


class DeepReuse:
    """Between two whole UNet calls, compute only the layers next to input and output.

    What comes up from the deep layers changes slowly from step to step. It is continued along the line through the last
    two whole calls, which is what makes long pauses between them possible.

    Args:
        every: One call in so many is whole; the first two always are.
        layers: How many of the last layers are computed in every call.
        extrapolate: How far to follow the line: 0 repeats the last features, 1 continues it.
    """

    def __init__(self, every: int, layers: int = 1, extrapolate: float = 1.0) -> None:
        self.every, self.layers, self.extrapolate = every, layers, extrapolate
        self.forget()

    def forget(self) -> None:
        """Begin anew: the next calls belong to another run."""
        self._call = -1
        self._kept: list[tuple[int, Tensor]] = []  # the last two, with the number of their call
        self._batch = 0

    def recall(self, batch: int) -> Tensor | None:
        """The deep features for this call with so many texts; `None` if the call is to be whole."""
        if batch != self._batch:  # pictures are done, guidance has ended, or a new batch begins
            self.forget()
            self._batch = batch
        self._call += 1
        if self._call % self.every == 0 or len(self._kept) < 2:
            return None
        (before, old), (last, new) = self._kept
        return new + (self.extrapolate * (self._call - last) / (last - before)) * (new - old)

    def keep(self, features: Tensor) -> None:
        """Features of a whole call, from below the last `layers`; those that were recalled are not kept."""
        if self._call % self.every == 0 or len(self._kept) < 2:
            self._kept = [*self._kept, (self._call, features)][-2:]
