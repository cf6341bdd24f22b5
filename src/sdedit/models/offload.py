"""Networks that wait in the CPU's memory and come to the device when they are called: whole, or a layer at a time."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn


def execution_device(model: nn.Module) -> torch.device:
    """Where a network computes, which is not always where its weights are."""
    device = getattr(model, "_computes_on", None)
    return next(model.parameters()).device if device is None else device


def choose_device(caller: str, gpu_id: int | None, device: torch.device | str | None) -> torch.device:
    """The device that the arguments of `caller` mean: the accelerator at hand if they say nothing.

    Raises:
        RuntimeError: There is no accelerator.
        ValueError: Both arguments have a number.
    """
    if device is None:
        if not torch.accelerator.is_available():
            raise RuntimeError(
                f"{caller} requires an accelerator (CUDA, MPS, XPU), and PyTorch sees none here: "
                "leave it out, or name one with device="
            )
        device = torch.accelerator.current_accelerator()
    chosen = torch.device(device or "cpu")
    if gpu_id is not None and chosen.index is not None:
        raise ValueError(f"gpu_id={gpu_id} and device={str(chosen)!r}: both have a number; expected one")
    return chosen if chosen.type == "cpu" else torch.device(chosen.type, gpu_id or chosen.index or 0)


class Offload:
    """Networks of which one computes at a time, whatever threads call them: the others wait for their turn."""

    def __init__(self, models: Iterable[nn.Module], device: torch.device) -> None:
        self.models, self.device, self._turn = list(models), device, threading.RLock()
        self._hooks: list[Any] = []

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # the copy of a network takes its turns with the others

    def _call_in_turns(self) -> None:
        for model in self.models:
            model._computes_on = self.device  # type: ignore[assignment]
            begin = functools.partial(self._begin, model)
            # An autoencoder's parts are called by themselves.
            for module in (model, *model.children()):
                self._hooks.append(module.register_forward_pre_hook(begin, with_kwargs=True))
                self._hooks.append(module.register_forward_hook(self._end, always_call=True))

    def _begin(self, model: nn.Module, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self._turn.acquire()
        self._bring(model)
        return tuple(map(self._there, args)), {name: self._there(value) for name, value in kwargs.items()}

    def _end(self, *_: Any) -> None:
        self._turn.release()

    def _there(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def _bring(self, model: nn.Module) -> None:
        """Make the network ready to compute."""

    def rest(self) -> None:
        """Send home what is on the device; a network that computes ends first."""

    def end(self) -> None:
        """Leave the networks on the CPU, and take no more turns."""
        with self._turn:
            for hook in self._hooks:
                hook.remove()
            for model in self.models:
                del model._computes_on


class Turns(Offload):
    """Of several networks one at a time is on the device: the one that was called last.

    Args:
        models: They are moved to the CPU.
        device: Where they compute.
    """

    def __init__(self, models: Iterable[nn.Module], device: torch.device) -> None:
        super().__init__(models, device)
        self._call_in_turns()
        self.rest()

    def _bring(self, model: nn.Module) -> None:
        if next(model.parameters()).device != self.device:
            self._send_home(but=model)
            model.to(self.device)

    def rest(self) -> None:
        """Send all home."""
        with self._turn:
            self._send_home()

    def _send_home(self, but: nn.Module | None = None) -> None:
        for model in self.models:
            if model is not but and next(model.parameters()).device != torch.device("cpu"):
                model.to("cpu")
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def end(self) -> None:
        """See `Offload`."""
        self.rest()
        super().end()


class Layers(Offload):
    """Of several networks only the layer that computes is on the device; the weights wait in the CPU's memory.

    Raises:
        ImportError: The package accelerate is missing.
    """

    def __init__(self, models: Iterable[nn.Module], device: torch.device) -> None:
        try:
            import accelerate
        except ImportError as error:
            raise ImportError(
                f"enable_sequential_cpu_offload needs accelerate: pip install 'sdedit[offload]' ({error})"
            ) from error
        super().__init__(models, device)
        for model in self.models:
            model.to("cpu")
            # Not the state dict: fused projections have other names there.
            weights = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
            accelerate.cpu_offload(model, device, offload_buffers=bool(model._parameters), state_dict=weights)
        self._call_in_turns()

    def end(self) -> None:
        """Put the weights back into the networks, on the CPU."""
        from accelerate.hooks import remove_hook_from_module

        super().end()
        for model in self.models:
            remove_hook_from_module(model, recurse=True)
            for layer in model.modules():  # accelerate leaves a layer's own method as its attribute
                if getattr(vars(layer).get("forward"), "__func__", None) is type(layer).forward:
                    del layer.forward


def refuse(caller: str, *models: nn.Module | None) -> None:
    """Refuse to change or save networks whose weights are elsewhere.

    Raises:
        ValueError: One of them is offloaded a layer at a time.
    """
    if any(next(model.parameters()).is_meta for model in models if model is not None):
        raise ValueError(
            f"{caller}: the weights are offloaded a layer at a time; call remove_all_hooks() first, and "
            "enable_sequential_cpu_offload() again after it"
        )
