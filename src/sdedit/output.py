"""Results: dataclasses that can also be indexed and unpacked as tuples, as users of the ecosystem expect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


class Output:
    """Base of result dataclasses: `out.name`, `out["name"]`, `out[0]` and unpacking.

    Fields that are `None`, and those marked as `beside`, are left out of the tuple.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not `None`, in order."""
        values = (getattr(self, f.name) for f in fields(self) if not f.metadata.get("beside"))  # type: ignore[arg-type]
        return tuple(v for v in values if v is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.to_tuple())


@dataclass
class StableDiffusionPipelineOutput(Output):
    """What the pipeline returns.

    Attributes:
        images: `output_type` "pil": a list of B images; "np": (B, H, W, C) float32 in [0, 1]; "pt": the same as a
            tensor (B, C, H, W); "latent": (B, latent channels, H/f, W/f).
        nsfw_content_detected: One bool an image, or `None` where no safety checker ran.
        original_images: The images before the safety checker made some of them black, if it did.
        steps: Steps of the solver that ran (in each repeat, or in the one that was cancelled), one number for all
            images or one for each.
        start_sigmas: Noise level σ/α at which they began, likewise; 0 where no step ran.
    """

    images: list[Image.Image] | np.ndarray[Any, Any] | Any
    nsfw_content_detected: list[bool] | None = None
    original_images: Any = field(default=None, metadata={"beside": True})
    steps: list[int] = field(default_factory=list, metadata={"beside": True})
    start_sigmas: list[float] = field(default_factory=list, metadata={"beside": True})
