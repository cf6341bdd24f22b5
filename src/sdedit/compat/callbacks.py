"""Callbacks that are objects: what happens, and from which step on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from sdedit.config import Configurable
from sdedit.inputs import checks

__all__ = ["IPAdapterScaleCutoffCallback", "MultiPipelineCallbacks", "PipelineCallback", "SDCFGCutoffCallback"]


class PipelineCallback(Configurable):
    """For `callback_on_step_end`: a subclass has `tensor_inputs` and `callback_fn`.

    Args:
        cutoff_step_ratio: Share of the steps, 0 to 1, after which it happens; `None` where an index is given.
        cutoff_step_index: The step after which it happens, from 0.

    Raises:
        ValueError: Both or neither is given, or the ratio is not from 0 to 1.
    """

    tensor_inputs: ClassVar[Sequence[str]] = ()

    def __init__(self, cutoff_step_ratio: float | None = 1.0, cutoff_step_index: int | None = None) -> None:
        if (cutoff_step_ratio is None) == (cutoff_step_index is None):
            raise ValueError("expected cutoff_step_ratio, or cutoff_step_index with cutoff_step_ratio=None")
        if cutoff_step_ratio is not None:
            checks.number("cutoff_step_ratio", cutoff_step_ratio, 0, 1)

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What happens; it returns the tensors that it was shown, or others in their place."""
        raise NotImplementedError(f"{type(self).__name__} needs a callback_fn")

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """As a pipeline calls it."""
        return self.callback_fn(pipeline, step_index, timestep, callback_kwargs)

    def _is_due(self, pipeline: Any, step_index: int) -> bool:
        index = self.config.cutoff_step_index
        return step_index == (int(pipeline.num_timesteps * self.config.cutoff_step_ratio) if index is None else index)


class MultiPipelineCallbacks:
    """Several callbacks, one after the other."""

    def __init__(self, callbacks: Sequence[PipelineCallback]) -> None:
        self.callbacks = callbacks

    @property
    def tensor_inputs(self) -> list[str]:
        """What any of them wants to see."""
        return list(dict.fromkeys(name for one in self.callbacks for name in one.tensor_inputs))

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """As a pipeline calls it: each sees what the one before it returned."""
        for one in self.callbacks:
            callback_kwargs = one(pipeline, step_index, timestep, callback_kwargs)
        return callback_kwargs


class SDCFGCutoffCallback(PipelineCallback):
    """Guidance ends: the steps that are left follow the prompt alone, each in half the time."""

    tensor_inputs = ("prompt_embeds",)

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Keep the half of the prompt embeds that is the prompt's, and turn guidance off."""
        if self._is_due(pipeline, step_index) and pipeline.do_classifier_free_guidance:
            callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"].chunk(2)[1]
            pipeline._guidance_scale = 0.0
        return callback_kwargs


class IPAdapterScaleCutoffCallback(PipelineCallback):
    """The IP-Adapter's influence ends; set its scale again before the next call."""

    def callback_fn(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Set the IP-Adapter's scale to 0."""
        if self._is_due(pipeline, step_index):
            pipeline.set_ip_adapter_scale(0.0)
        return callback_kwargs
