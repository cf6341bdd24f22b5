"""Networks that wait in the CPU's memory and come to the device when they are called: whole, or a layer at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

F = TypeVar("F", bound=Callable[..., Any])


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


class Turns:
    """Of several networks one at a time is on the device: the one that was called last.

    Args:
        models: They are moved to the CPU.
        device: Where they compute.
    """

    def __init__(self, models: Iterable[nn.Module], device: torch.device) -> None:
        self.models, self.device = list(models), device
        self._hooks = []
        for model in self.models:
            model._computes_on = device  # type: ignore[assignment]
            take = functools.partial(self._take, model)
            # An autoencoder's parts are called by themselves.
            for module in (model, *model.children()):
                self._hooks.append(module.register_forward_pre_hook(take, with_kwargs=True))
        self.rest()

    def _take(self, model: nn.Module, _: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if next(model.parameters()).device != self.device:
            self.rest(but=model)
            model.to(self.device)
        return tuple(map(self._there, args)), {name: self._there(value) for name, value in kwargs.items()}

    def _there(self, value: Any) -> Any:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def rest(self, but: nn.Module | None = None) -> None:
        """Send all home, `but` one."""
        for model in self.models:
            if model is not but and next(model.parameters()).device != torch.device("cpu"):
                model.to("cpu")
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()

    def end(self) -> None:
        """Leave the networks on the CPU, and take no more turns."""
        self.rest()
        for hook in self._hooks:
            hook.remove()
        for model in self.models:
            del model._computes_on


class Layers:
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
        self.models = list(models)
        for model in self.models:
            model.to("cpu")
            # Not the state dict: fused projections have other names there.
            weights = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
            accelerate.cpu_offload(model, device, offload_buffers=bool(model._parameters), state_dict=weights)
            model._computes_on = device  # type: ignore[assignment]

    def rest(self) -> None:
        """Nothing stays on the device after a layer."""

    def end(self) -> None:
        """Put the weights back into the networks, on the CPU."""
        from accelerate.hooks import remove_hook_from_module

        for model in self.models:
            remove_hook_from_module(model, recurse=True)
            del model._computes_on


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


def inference(call: F) -> F:
    """A pipeline's call: without gradients, and after it networks that came to the device go home."""

    @functools.wraps(call)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with torch.no_grad():
                return call(self, *args, **kwargs)
        finally:
            self.maybe_free_model_hooks()

    return wrapped  # type: ignore[return-value]
