"""Results: dataclasses that can also be indexed and unpacked as tuples, as users of the ecosystem expect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


class Output:
    """Base of result dataclasses: `out.name`, `out["name"]`, `out[0]`, unpacking, and `keys`, `values`, `items`.

    Fields that are `None`, and those marked as `beside`, are left out of the tuple and of the keys.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not `None`, in order."""
        return tuple(self.values())

    def keys(self) -> list[str]:
        """Names of the fields that are not `None`, in order."""
        names = [f.name for f in fields(self) if not f.metadata.get("beside")]  # type: ignore[arg-type]
        return [name for name in names if getattr(self, name) is not None]

    def values(self) -> list[Any]:
        """Those fields."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Names and fields."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """A field, or `default` where it is `None` or there is no such field."""
        return getattr(self, name) if name in self.keys() else default

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self, name, value)

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
