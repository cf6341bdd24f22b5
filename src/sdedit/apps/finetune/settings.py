"""What a training run is asked for, checked at the door, and as JSON for its checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from sdedit.inputs import checks

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PRECISIONS = ("bfloat16", "float32")


@dataclass(frozen=True)
class Settings:
    """How to train a LoRA.

    Attributes:
        steps: Updates of the weights.
        batch_size: Pictures in one pass through the network.
        accumulation: Passes for one update: gradients of `batch_size * accumulation` pictures count.
        learning_rate: At its peak; it rises for `warmup` steps and falls to zero along a cosine.
        warmup: Steps.
        rank: Inner size of the LoRA's products.
        alpha: The LoRA is scaled by alpha / rank; the rank if not given.
        targets: Ends of the names of the UNet's layers that learn, linear or convolutions.
        text_encoder: The text encoder's attention learns too.
        min_snr_gamma: See `Objective`; `None` for plain squared error.
        prompt_dropout: Share of pictures that are shown without their caption, for guidance.
        caption: "{}" stands for the picture's own caption; without it, the caption of all pictures.
        size: Side of the square that pictures are cut to, in pixels; the model's own if not given.
        flip: Show pictures mirrored half of the time.
        guided: Share of samples at middling and high noise that start as a user's image might: from a blurred and
            recoloured copy of the picture, while the picture is what is to be predicted. So colours of an image that
            the style does not have give way at a lower strength.
        precision: What autocast computes in: "bfloat16" or "float32" (that is, no autocast).
        seed: Same seed and settings, same LoRA.
    """

    steps: int = 1000
    batch_size: int = 4
    accumulation: int = 1
    learning_rate: float = 1e-4
    warmup: int = 50
    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ATTENTION
    text_encoder: bool = False
    min_snr_gamma: float | None = 5.0
    prompt_dropout: float = 0.1
    caption: str = "{}"
    size: int | None = None
    flip: bool = False
    guided: float = 0.0
    precision: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "rank"):
            checks.whole_number(name, getattr(self, name), 1)
        for name in ("warmup", "seed"):
            checks.whole_number(name, getattr(self, name), 0)
        for name in ("prompt_dropout", "guided"):
            checks.number(name, getattr(self, name), 0, 1)
        for name in ("learning_rate", "alpha", "min_snr_gamma"):
            if getattr(self, name) is not None and checks.number(name, getattr(self, name)) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected a number above 0")
        if self.size is not None:
            checks.whole_number("size", self.size, 8)
        object.__setattr__(self, "targets", tuple(self.targets))
        if not self.targets or not all(isinstance(name, str) and name for name in self.targets):
            raise ValueError(f"targets={self.targets!r}; expected names of layers, such as {', '.join(ATTENTION)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}; expected {' or '.join(PRECISIONS)}")

    @property
    def scale_alpha(self) -> float:
        """Alpha as a number."""
        return float(self.rank if self.alpha is None else self.alpha)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of the update number `step`, from 0: linear warm-up, then a cosine down to zero."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / (self.warmup + 1)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def to_json(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return {**asdict(self), "targets": list(self.targets)}
