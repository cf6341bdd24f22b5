"""What a training run is asked for, checked at the door, and as JSON for its checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from typer import Option

from sdedit.inputs import checks

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PRECISIONS = ("bfloat16", "float32")


@dataclass(frozen=True)
class Settings:
    """How to train a LoRA: what is annotated here are the options of `sdedit train lora`, too.

    Gradients of `batch_size * accumulation` pictures count for one update. The learning rate rises for `warmup` updates
    and falls to zero along a cosine. For `min_snr_gamma` see `Objective`; `None` or 0 is plain squared error. With
    `guided`, a share of the samples at middling and high noise starts as a user's image might: from a blurred and
    recoloured copy of the picture, while the picture is what is to be predicted; so colours of an image that the style
    does not have give way at a lower strength. `precision` is what autocast computes in; float32 is without it.

    Raises:
        ValueError: A value is out of its range; the message names it.
    """

    steps: Annotated[int, Option(min=1, help="Updates of the weights.")] = 1000
    batch_size: Annotated[int, Option("--batch", min=1, help="Pictures in one pass through the network.")] = 4
    accumulation: Annotated[int, Option("--accumulate", min=1, help="Passes for one update.")] = 1
    learning_rate: Annotated[float, Option("--rate", help="Learning rate at its peak, above 0.")] = 1e-4
    warmup: Annotated[int, Option(min=0, help="Updates until the learning rate is at its peak.")] = 50
    rank: Annotated[int, Option(min=1, help="Size of the LoRA: 4 to 16 for a style.")] = 8
    alpha: Annotated[float | None, Option(help="The LoRA is scaled by alpha / rank; the rank if not given.")] = None
    targets: Annotated[
        tuple[str, ...],
        Option(help="Ends of the names of the UNet's layers that learn, linear or convolutions, with commas."),
    ] = ATTENTION
    text_encoder: Annotated[bool, Option(help="The text encoder's attention learns too.")] = False
    min_snr_gamma: Annotated[
        float | None, Option("--min-snr", min=0, help="Gamma of min-SNR weighting; 0 turns it off.")
    ] = 5.0
    prompt_dropout: Annotated[
        float, Option("--dropout", min=0, max=1, help="Share of pictures shown without their caption, for guidance.")
    ] = 0.1
    caption: Annotated[str, Option(help="'{}' stands for a picture's own: '{}, blueprint'.")] = "{}"
    size: Annotated[int | None, Option(min=8, help="Side of the pictures in pixels; the model's own.")] = None
    flip: Annotated[bool, Option(help="Show pictures mirrored half of the time.")] = False
    guided: Annotated[
        float,
        Option(min=0, max=1, help="Share of samples that start from recoloured, blurred pictures, as a user's image."),
    ] = 0.0
    precision: Annotated[str, Option(help="bfloat16 or float32.")] = "bfloat16"
    seed: Annotated[int, Option(min=0, help="Same seed and settings, same LoRA.")] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "min_snr_gamma", self.min_snr_gamma or None)
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
