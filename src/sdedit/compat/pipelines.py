"""The pipeline by its general names: whatever a model is, what it becomes here is image-to-image."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from sdedit.config import later

if TYPE_CHECKING:
    from sdedit.base import Pipeline
    from sdedit.pipeline import StableDiffusionImg2ImgPipeline

P = TypeVar("P", bound="Pipeline")
_PIPELINE = "sdedit.pipeline:StableDiffusionImg2ImgPipeline"


class AutoPipelineForImage2Image:
    """`from_pretrained` and `from_pipe` of the one pipeline that does this task here."""

    def __init__(self) -> None:
        raise OSError("AutoPipelineForImage2Image: make one by from_pretrained(model) or from_pipe(pipe)")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_or_path: str | os.PathLike[str] | None = None, **options: Any
    ) -> StableDiffusionImg2ImgPipeline:
        """See `StableDiffusionImg2ImgPipeline.from_pretrained`."""
        return later(_PIPELINE).from_pretrained(  # type: ignore[no-any-return]
            pretrained_model_or_path, **options
        )

    @classmethod
    def from_pipe(cls, pipeline: Any, **components: Any) -> StableDiffusionImg2ImgPipeline:
        """A pipeline over the networks of another one, sdedit's or diffusers'; see `from_pipe` below."""
        return from_pipe(later(_PIPELINE), pipeline, **components)


def from_pipe(cls: type[P], pipeline: Any, **components: Any) -> P:
    """A pipeline of class `cls` that shares the components of another one, which stays as it was.

    Args:
        pipeline: Anything with `components`, a dictionary by name.
        **components: Those to be used instead, by name; `torch_dtype` casts all networks, shared ones too.

    Raises:
        ValueError: The other pipeline lacks a component that is needed, and none is given.
    """
    dtype = components.pop("torch_dtype", None)
    given = {**getattr(pipeline, "components", {}), **components}
    needed = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"from_pipe: {type(pipeline).__name__} has no {', '.join(missing)}; give them by name")
    optional = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")
    made = cls(**{name: given[name] for name in (*needed, *optional) if name in given})
    return made if dtype is None else made.to(dtype)
