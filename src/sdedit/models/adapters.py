"""Adapters inside a network: PEFT's LoRA layers put around its layers, weighed, fused into the weights, taken away.

All state lives in the network itself, so pipelines that share a network share its adapters. The layers below are never
touched except by `fuse`, which keeps what they were; taking an adapter away leaves the very same tensors.
"""

from __future__ import annotations

import functools
import re
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from sdedit.models.blank import blank
from sdedit.models.factors import Factors

F = TypeVar("F", bound=Callable[..., Any])

_OF_IP_ADAPTER = re.compile(r"^encoder_hid_proj\b|\.ip_adapters\.")
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # locks cannot be copied with a network


def require_peft() -> Any:
    """The package `peft`.

    Raises:
        ImportError: It is missing, or too old for the other packages; the message says what to install.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(f"LoRA needs the package peft: pip install -U 'sdedit[lora]' ({error})") from error
    return peft


def layers(model: nn.Module) -> dict[str, Any]:
    """PEFT's layers in a network, by name."""
    if not hasattr(model, "peft_config"):  # nothing was ever attached, and peft need not be there
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Layers with a weight, by name, as they are without adapters; an IP-Adapter's own are none of the network's."""
    wrapped = layers(model)
    inside = tuple(f"{name}." for name in wrapped)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if _OF_IP_ADAPTER.search(name):
            continue
        if name in wrapped:
            found[name] = wrapped[name].get_base_layer()
        elif isinstance(getattr(module, "weight", None), nn.Parameter) and not (inside and name.startswith(inside)):
            found[name] = module
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The weight of each layer that `adaptable` names."""
    return {name: cast("Tensor", layer.weight) for name, layer in adaptable(model).items()}


def changing(model: nn.Module) -> threading.RLock:
    """To be held while adapters are put into a network: pipelines in several threads may share it."""
    return _locks.setdefault(model, threading.RLock())


def names(model: nn.Module) -> list[str]:
    """Adapters that a network has, in the order in which they came."""
    return list(getattr(model, "peft_config", {}))


def attach(model: nn.Module, adapter: str, parts: Mapping[str, Factors]) -> None:
    """Put an adapter into a network and make it the only active one.

    Args:
        parts: The factors of ΔW for each module; they are copied, in the dtype and to the place of its weight.
    """
    peft = require_peft()
    trained = [p for p in model.parameters() if p.requires_grad]  # PEFT freezes all that is not its own
    before: Any = getattr(model, "peft_config", {})
    configs = dict(before)
    try:
        for dora in (False, True):
            group = {name: part for name, part in parts.items() if (part.magnitude is not None) == dora}
            if not group:
                continue
            model.__dict__.pop("peft_config", None)  # PEFT warns where there is one
            config = peft.LoraConfig(
                target_modules="|".join(map(re.escape, group)),
                r=Counter(part.rank for part in group.values()).most_common(1)[0][0],
                use_dora=dora,
                init_lora_weights=False,
            )
            with blank():  # its own low_cpu_mem_usage=True patches torch.nn.Module for all threads
                peft.inject_adapter_in_model(config, model, adapter_name=adapter)
            configs[adapter] = config
        for name, part in parts.items():
            _fill(model.get_submodule(name), adapter, part)
        _describe(configs[adapter], parts)
    finally:
        model.peft_config = configs  # type: ignore[assignment]
        for parameter in trained:
            parameter.requires_grad_(True)


def _fill(layer: Any, adapter: str, part: Factors) -> None:
    base = layer.get_base_layer().weight

    def parameter(tensor: Tensor) -> nn.Parameter:
        # A copy: the file stays closed, and nobody else's tensor is trained.
        return nn.Parameter(tensor.detach().to(base.device, base.dtype, copy=True).contiguous())

    down, up = layer.lora_A[adapter], layer.lora_B[adapter]
    down.weight, up.weight = parameter(part.down), parameter(part.up)
    layer.r[adapter], layer.lora_alpha[adapter] = part.rank, part.alpha
    _heed_calls(layer)
    layer.scaling[adapter] = strength = part.alpha / part.rank
    if isinstance(down, nn.Linear):
        down.out_features = up.in_features = part.rank
    else:
        down.out_channels = up.in_channels = part.rank
    if part.magnitude is not None:
        held = layer.lora_magnitude_vector[adapter]
        held.weight = parameter(
            part.magnitude.reshape(1, -1, *(1 for _ in base.shape[2:])) if base.ndim > 2 else part.magnitude
        )
    if part.bias is not None and strength:
        up.bias = parameter(part.bias / strength)
        layer.lora_bias[adapter] = True


def _describe(config: Any, parts: Mapping[str, Factors]) -> None:
    """Make PEFT's config say what was filled in, for tools that save it."""
    config.target_modules = set(parts)
    config.r, config.lora_alpha = Counter((p.rank, p.alpha) for p in parts.values()).most_common(1)[0][0]
    config.rank_pattern = {name: p.rank for name, p in parts.items() if p.rank != config.r}
    config.alpha_pattern = {name: p.alpha for name, p in parts.items() if p.alpha != config.lora_alpha}


@contextmanager
def all_or_nothing(adapter: str, *models: nn.Module) -> Iterator[None]:
    """Attach inside this: if anything fails, no network keeps a trace of the adapter."""
    before = [(layer, list(layer.active_adapters)) for model in models for layer in layers(model).values()]
    try:
        yield
    except BaseException:
        for model in models:
            detach(model, adapter)
        for layer, on in before:
            layer.set_adapter(on)
        raise


def detach(model: nn.Module, adapter: str) -> None:
    """Take an adapter out of a network, and PEFT's layers where they hold no other."""
    for name, layer in layers(model).items():
        layer.set_adapter([other for other in layer.active_adapters if other != adapter])
        if adapter in layer.lora_A:
            layer.delete_adapter(adapter)
        if not layer.lora_A:
            _replace(model, name, layer.get_base_layer())
    configs: Any = getattr(model, "peft_config", {})
    configs.pop(adapter, None)
    if not configs and hasattr(model, "peft_config"):
        del model.peft_config


def detach_all(model: nn.Module) -> None:
    """Take all adapters out; what is fused stays fused."""
    for name, layer in layers(model).items():
        _replace(model, name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(owner, (nn.ModuleList, nn.Sequential)):
        owner[int(child)] = module
    else:
        setattr(owner, child, module)


@contextmanager
def set_aside(*models: nn.Module | None) -> Iterator[None]:
    """Networks without PEFT's layers for a while, so that their weights have their own names, as for saving."""
    wrapped = [(model, layers(model)) for model in models if model is not None]
    try:
        for model, found in wrapped:
            for name, layer in found.items():
                _replace(model, name, layer.get_base_layer())
        yield
    finally:
        for model, found in wrapped:
            for name, layer in found.items():
                _replace(model, name, layer)


def activate(model: nn.Module, weights: Mapping[str, Callable[[str], float]]) -> None:
    """Make these adapters the active ones, each with a weight for each module."""
    for name, layer in layers(model).items():
        layer.set_adapter([a for a in weights if a not in _fused(layer)])
        for adapter, weight in weights.items():
            if adapter in layer.scaling:
                layer.set_scale(adapter, weight(name))


def active(model: nn.Module) -> list[str]:
    """Adapters that change what the network computes, fused ones included."""
    on = {a for layer in layers(model).values() for a in (*layer.active_adapters, *_fused(layer))}
    return [name for name in names(model) if name in on]


def enable(model: nn.Module, on: bool) -> None:
    """Let all adapters that are not fused work, or rest."""
    for layer in layers(model).values():
        layer.enable_adapters(on)


def fuse(model: nn.Module, adapters: Sequence[str], scale: float, check: bool) -> None:
    """Add adapters to the weights they change; `unfuse` gives back exactly what they were.

    Args:
        check: Refuse, with a `ValueError`, weights that become NaN or infinite.
    """
    try:
        for layer in layers(model).values():
            chosen = [a for a in adapters if a in layer.lora_A and a not in _fused(layer)]
            if not chosen:
                continue
            base = layer.get_base_layer()
            before = getattr(layer, "before_fusing", None)
            if before is None:
                bias = None if base.bias is None else base.bias.detach().clone()
                layer.before_fusing = (base.weight.detach().clone(), bias)
            own, biases = dict(layer.scaling), dict(layer.lora_bias)
            layer.scaling.update({a: own[a] * scale for a in chosen})
            layer.lora_bias.update(dict.fromkeys(chosen, False))  # convolutions' are not merged by every release
            try:
                layer.merge(safe_merge=check, adapter_names=chosen)
                for a in chosen:
                    if biases.get(a):
                        base.bias.data += layer.lora_B[a].bias.detach() * layer.scaling[a]
            finally:
                layer.scaling.update(own)
                layer.lora_bias.update(biases)
                # To PEFT the layer is as before, over another weight: its own unmerge would subtract, and not exactly.
                layer.merged_adapters.clear()
                layer.fused_adapters = [*_fused(layer), *chosen]
                layer.set_adapter([a for a in layer.active_adapters if a not in layer.fused_adapters])
    except BaseException:
        unfuse(model)
        raise


def unfuse(model: nn.Module) -> None:
    """Give all weights back as they were before the first `fuse`, to the last bit, and let the adapters work again."""
    for layer in layers(model).values():
        if (before := getattr(layer, "before_fusing", None)) is None:
            continue
        base = layer.get_base_layer()
        weight, bias = before
        base.weight.data.copy_(weight)
        if bias is not None:
            base.bias.data.copy_(bias)
        on = {*layer.active_adapters, *_fused(layer)}
        del layer.before_fusing, layer.fused_adapters
        layer.set_adapter([a for a in layer.lora_A if a in on])


def _fused(layer: Any) -> list[str]:
    return getattr(layer, "fused_adapters", [])


def fused(model: nn.Module) -> set[str]:
    """Adapters that are part of the weights."""
    return {a for layer in layers(model).values() for a in _fused(layer)}


class _Call(threading.local):
    """How strong adapters are in the call that this thread is in.

    Not a context variable: `torch.compile` follows a thread's own attributes, and compiles anew when they change.
    """

    def __init__(self) -> None:
        self.scale = 1.0


_call = _Call()


class _Scaling(dict[str, float]):
    """The strength of each adapter in one layer, which PEFT reads in every call: as set, times the call's scale."""

    def __getitem__(self, adapter: str) -> float:
        return super().__getitem__(adapter) * _call.scale


def _heed_calls(layer: Any) -> None:
    if not isinstance(layer.scaling, _Scaling):
        layer.scaling = _Scaling(layer.scaling)


@contextmanager
def scaled(model: nn.Module | None, scale: float | None) -> Iterator[None]:
    """In this thread, a network's adapters work `scale` times as much for a while; `None` changes nothing."""
    for layer in layers(model).values() if model is not None and scale is not None else ():
        _heed_calls(layer)  # others may have put it there
    before = _call.scale
    _call.scale = before if scale is None else before * scale
    try:
        yield
    finally:
        _call.scale = before


def scaled_call(forward: F) -> F:
    """A network's `forward` that heeds `cross_attention_kwargs={"scale": s}`."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with scaled(self, (kwargs.get("cross_attention_kwargs") or {}).get("scale")):
            return forward(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def warn_of_unfused(*models: nn.Module | None) -> None:
    """Warn that adapters which are not fused will not be in what is saved."""
    held = [model for model in models if model is not None]
    left = {a for model in held for a in names(model)} - {a for model in held for a in fused(model)}
    if left:
        names_left = ", ".join(sorted(left))
        warnings.warn(f"adapters that are not fused are not saved: {names_left}; fuse_lora() first", stacklevel=3)
