"""What an adapter adds to one layer, in whatever array library it was read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Factors:
    """ΔW = up · down · alpha / rank.

    Attributes:
        down: (rank, in) or (rank, in, k, k).
        up: (out, rank) or (out, rank, 1, 1).
        magnitude: (out,), DoRA's lengths of the rows of W + ΔW; `None` without DoRA.
        bias: (out,), what is added to the bias.
    """

    down: Any
    up: Any
    alpha: float
    magnitude: Any = None
    bias: Any = None

    @property
    def rank(self) -> int:
        """The inner size of the product."""
        return len(self.down)

    def delta(self) -> Any:
        """ΔW, without DoRA."""
        product = self.up.reshape(len(self.up), -1) @ self.down.reshape(len(self.down), -1)
        return (product * (self.alpha / self.rank)).reshape(len(self.up), *self.down.shape[1:])
