"""Passes: faster layers put in the place of a network's own, and taken away again."""

from __future__ import annotations

import copyreg
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn


@dataclass
class _Installation:
    """How many want it, and the layers that were changed for them."""

    users: int = 0
    layers: list[nn.Module] = field(default_factory=list)


class Pass:
    """Layers that compute the same as a network's own, in less time.

    A layer that is installed stays the object that it is, with its weights, hooks and name, and is of the fast class
    for as long as anybody, in whichever thread, wants that.

    Args:
        fast: Classes of layers, each derived from the one in whose place it comes.
        suits: Can a layer be of the fast class? Those with a `forward` of their own, as offloading gives them, cannot.
        prepare: Called with a network that nobody else is using by this pass.
    """

    def __init__(
        self,
        *fast: type[nn.Module],
        suits: Callable[[nn.Module], bool] = lambda layer: True,
        prepare: Callable[[nn.Module], None] = lambda network: None,
    ) -> None:
        self._fast = {cls.__base__: cls for cls in fast}
        for cls in fast:
            cls.__reduce_ex__ = _reduce_as_plain  # type: ignore[method-assign, assignment]
        self._suits, self._prepare = suits, prepare
        self._lock = threading.Lock()
        self._installations: WeakKeyDictionary[nn.Module, _Installation] = WeakKeyDictionary()

    @contextmanager
    def installed(self, network: Any) -> Iterator[None]:
        """Inside, the network has the fast layers. What is no `nn.Module` stays as it is."""
        if not isinstance(network, nn.Module):
            yield
            return
        with self._lock:
            installation = self._installations.setdefault(network, _Installation())
            if not installation.users:
                self._prepare(network)
            installation.users += 1
            for layer in network.modules():
                fast = self._fast.get(type(layer))
                if fast is not None and "forward" not in vars(layer) and self._suits(layer):
                    installation.layers.append(layer)
                    object.__setattr__(layer, "__class__", fast)
        try:
            yield
        finally:
            with self._lock:
                installation.users -= 1
                while installation.layers and not installation.users:
                    layer = installation.layers.pop()
                    if type(layer) in self._fast.values():  # else somebody has made another of it meanwhile
                        object.__setattr__(layer, "__class__", type(layer).__base__)


def _reduce_as_plain(layer: nn.Module, protocol: Any) -> Any:
    """Copies and pickles are of the plain class: nobody would take the fast one away from them."""
    return copyreg._reconstructor, (type(layer).__base__, object, None), *object.__reduce_ex__(layer, 2)[2:]  # type: ignore[attr-defined]
