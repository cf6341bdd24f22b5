"""One step of denoising: what is known of a batch between two UNet calls, and how it goes on from one to the next.

All of it is values: a step gives a new state and changes none. So a call can be run again from any state, calls in
several threads share nothing, and batches under way are put together and taken apart between steps.
"""

from __future__ import annotations

import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sdedit.inputs.image_prompts import ImageEmbeds
from sdedit.inputs.masks import Keep
from sdedit.inputs.prompts import guidance_scale_embedding
from sdedit.schedulers.runs import Run

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (arXiv 2207.12598), for each picture of a batch.

    Attributes:
        scales: Weight of the prompt against the negative prompt; 1 and less is none.
        calls: UNet calls to go that are guided; those after them follow the prompt alone.
        distilled: Of a model that was distilled with guidance (LCM, arXiv 2310.04378), the width of the embedding that
            tells it the scale: it is called with the prompt alone. `None` for all others.
    """

    scales: tuple[float, ...] = (0.0,)
    calls: tuple[float, ...] = (math.inf,)
    distilled: int | None = None

    @property
    def on(self) -> bool:
        """Is the UNet called with and without the prompt?"""
        return self.distilled is None and max(self.scales) > 1

    @property
    def scale(self) -> float | list[float]:
        """The scale, or those of the pictures where they differ."""
        return self.scales[0] if len(set(self.scales)) == 1 else list(self.scales)

    def to_scale(self, scale: float | Sequence[float]) -> Guidance:
        """With another scale, or one for each picture."""
        scales = tuple(scale) if isinstance(scale, Sequence) else (scale,) * len(self.scales)
        return replace(self, scales=scales)

    def of_pictures(self, pictures: int, calls: Sequence[int]) -> Guidance:
        """Of so many pictures, of whose UNet calls so many are guided."""
        return replace(self, scales=self.scales * (pictures // len(self.scales)), calls=tuple(calls))

    def next_call(self) -> Guidance:
        """That of the UNet call to come, which is then no longer to go: without guidance where it has ended."""
        if not self.on:
            return self
        scales = tuple(scale if calls > 0 else 1.0 for scale, calls in zip(self.scales, self.calls, strict=True))
        return replace(self, scales=scales, calls=tuple(calls - 1 for calls in self.calls))

    def combined(self, prediction: Tensor) -> Tensor:
        """The predictions (2·B, C, H, W) without and with the prompt as one (B, C, H, W)."""
        without, with_prompt = prediction.chunk(2)
        weights = [max(scale, 1.0) for scale in self.scales]  # 1: the prompt alone
        if len(set(weights)) == 1:
            return without + weights[0] * (with_prompt - without)
        each = torch.tensor(weights).to(without.device).view(-1, 1, 1, 1)
        return without + (each * (with_prompt - without)).to(without.dtype)

    def embedding(self) -> Tensor | None:
        """What a distilled model is told, (B, `distilled`)."""
        return None if self.distilled is None else guidance_scale_embedding(self.scales, self.distilled)


@dataclass(frozen=True)
class State:
    """A batch of B pictures between two UNet calls.

    Attributes:
        latents: (B, C, h, w).
        prompt_embeds: (B, M, D), or with guidance (2·B, M, D) as the UNet takes them: the negative half first.
        negative_prompt_embeds: (B, M, D) of a batch that began with guidance.
        image_embeds: Those of IP-Adapters.
        keep: What stays of the source.
        guidance: See `Guidance`.
        condition: (B, `guidance.distilled`), for models that are told the guidance scale.
    """

    latents: Tensor
    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    image_embeds: ImageEmbeds
    keep: Keep
    guidance: Guidance
    condition: Tensor | None = None

    @classmethod
    def begin(
        cls,
        latents: Tensor,
        prompts: tuple[Tensor, Tensor | None],
        image_embeds: ImageEmbeds,
        keep: Keep,
        guidance: Guidance,
    ) -> State:
        """A batch before its first call; `prompts` are its prompt embeds and negative ones."""
        embeds, negative = prompts
        both = embeds if negative is None else torch.cat([negative, embeds])
        condition = guidance.embedding()
        condition = None if condition is None else condition.to(latents)
        return cls(latents, both, negative, image_embeds, keep, guidance, condition)

    def __len__(self) -> int:
        return len(self.latents)

    def to(self, dtype: torch.dtype) -> State:
        """With all tensors in another dtype."""
        names = ("latents", "prompt_embeds", "negative_prompt_embeds", "image_embeds", "keep", "condition")
        parts = {name: getattr(self, name) for name in names}
        return replace(self, **{name: part.to(dtype) for name, part in parts.items() if part is not None})

    def take(self, pictures: Sequence[int]) -> State:
        """The state of some of the pictures, in this order."""
        order, negative, told = list(pictures), self.negative_prompt_embeds, self.condition
        guidance = self.guidance
        return State(
            self.latents[order],
            self._halves()[:, order].flatten(0, 1),
            None if negative is None else negative[order],
            self.image_embeds.take(order),
            self.keep.take(order),
            replace(
                guidance,
                scales=tuple(guidance.scales[i] for i in order),
                calls=tuple(guidance.calls[i] for i in order),
            ),
            None if told is None else told[order],
        )

    def join(self, other: State) -> State:
        """Both batches as one. Where only one of them is guided, the other's prompt is its own negative one.

        Raises:
            ValueError: Their UNet calls cannot be shared.
        """
        a, b = self, other
        if a.prompt_embeds.shape[1:] != b.prompt_embeds.shape[1:] or a.latents.shape[1:] != b.latents.shape[1:]:
            raise ValueError(
                f"latents and prompt embeds: {list(a.latents.shape)}, {list(a.prompt_embeds.shape)} and "
                f"{list(b.latents.shape)}, {list(b.prompt_embeds.shape)}; expected the same but for the number"
            )
        if a.guidance.distilled != b.guidance.distilled:
            raise ValueError("guidance: one model is told its scale and the other not; expected one model")
        halves = max(len(a._halves()), len(b._halves()))
        guided = halves == 2
        embeds = torch.cat([one._halves().expand(halves, -1, -1, -1) for one in (a, b)], dim=1)
        told = [one.condition for one in (a, b) if one.condition is not None]
        return State(
            torch.cat([a.latents, b.latents]),
            embeds.flatten(0, 1),
            embeds[0] if guided else None,
            a.image_embeds.join(b.image_embeds, guided),
            a.keep.join(b.keep, a.latents, b.latents),
            replace(
                a.guidance,
                scales=a.guidance.scales + b.guidance.scales,
                calls=a.guidance.calls + b.guidance.calls,
            ),
            torch.cat(told) if told else None,
        )

    def _halves(self) -> Tensor:
        """Prompt embeds as (1 or 2, B, M, D)."""
        return self.prompt_embeds.unflatten(0, (-1, len(self)))

    def next_call(self) -> State:
        """The state in the UNet call to come: without negative prompts where guidance has ended."""
        state = replace(self, guidance=self.guidance.next_call())
        if not state.guidance.on and len(self.prompt_embeds) == 2 * len(self):
            state = replace(state, prompt_embeds=self.prompt_embeds.chunk(2)[1])
        return state


def step(unet: Any, run: Run, state: State, arguments: Mapping[str, Any]) -> tuple[State, Tensor]:
    """One UNet call for the whole batch, and what its solvers make of the prediction.

    Args:
        run: Of the same pictures; it moves on.
        arguments: Further ones of the UNet.

    Returns:
        The state after it, and the timestep of the call, a scalar or (B,).
    """
    state = state.next_call()
    sample, t = run.model_input(state.latents)
    guided = state.guidance.on
    inputs = (sample, t)
    if guided and not getattr(unet, "repeats_sample", False):
        inputs = torch.cat([sample] * 2), torch.cat([t] * 2) if t.ndim else t
    extra = {"timestep_cond": state.condition, **state.image_embeds.arguments(guided), **arguments}
    prediction = unet(*inputs, state.prompt_embeds, **extra, return_dict=False)[0]
    if guided:
        prediction = state.guidance.combined(prediction)
    latents = run.step(prediction, state.latents)
    latents, keep = state.keep.restored(run, latents)
    return replace(state, latents=latents, keep=keep), t


class Call:
    """A running call, as callbacks and other threads see and change it.

    Attributes:
        guidance: That of the next step.
        interrupt: Stop after the current step.
        num_timesteps: UNet calls, for each repeat.
        scheduler: The one that is set up for it, once it is.
        clip_skip, cross_attention_kwargs: Its arguments.
    """

    def __init__(self) -> None:
        self.guidance = Guidance()
        self.interrupt = False
        self.num_timesteps = 0
        self.scheduler: Any = None
        self.clip_skip: int | None = None
        self.cross_attention_kwargs: Mapping[str, Any] | None = None


class _Thread(threading.local):
    """What a thread does: its calls of any pipelines, one inside the other, and the last one of each pipeline."""

    def __init__(self) -> None:
        self.running: list[tuple[Any, Call]] = []
        self.last: weakref.WeakKeyDictionary[Any, Call] = weakref.WeakKeyDictionary()


_thread = _Thread()


class Calls:
    """The calls of one pipeline, from any thread."""

    def __init__(self) -> None:
        self._running: list[Call] = []
        self._last = Call()

    @property
    def here(self) -> Call | None:
        """The one that runs in this thread."""
        return next((call for owner, call in reversed(_thread.running) if owner is self), None)

    @property
    def seen(self) -> Call:
        """What attributes of the pipeline show: the one that runs in this thread, or its last, or any thread's last."""
        return self.here or _thread.last.get(self, self._last)

    @property
    def own(self) -> Call:
        """What is written to: the call of this thread, or where a loop that is not ours keeps what it sets."""
        call = self.here or _thread.last.get(self)
        if call is None:
            call = self._last = _thread.last[self] = Call()
        return call

    @contextmanager
    def begin(self) -> Iterator[Call]:
        """A new call, in this thread, while the context lasts."""
        call = Call()
        _thread.running.append((self, call))
        self._running.append(call)
        try:
            yield call
        finally:
            call.scheduler = None
            self._running.remove(call)
            _thread.running.pop()
            self._last = _thread.last[self] = call

    def interrupt(self) -> None:
        """Stop the one in this thread, or else all that run."""
        here = self.here
        for call in [here] if here else list(self._running):
            call.interrupt = True


def inference(method: F) -> F:
    """A pipeline's call: one of `Calls`, without gradients; after it networks that came to the device go home."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._calls.begin(), torch.no_grad():
            try:
                return method(self, *args, **kwargs)
            finally:
                self.maybe_free_model_hooks()

    return wrapped  # type: ignore[return-value]
