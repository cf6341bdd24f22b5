"""One network trained by several workers that share its weights, for a CPU that others use too.

PyTorch's own threads meet after every operation, so one busy core holds up all of them. Here each worker takes its part
of the batch through the whole forward and backward pass alone, and they meet once a step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch
from torch import Tensor, nn


class Workers:
    """Copies of a network with the same storage for the weights and their own gradients; used as a context.

    Args:
        model: The network. Weights that do not learn are not copied at all.
        count: How many; 1 is the network alone, with all of PyTorch's threads, on any device.
        dtype: What autocast computes in; `None` for none.
    """

    def __init__(self, model: nn.Module, count: int, dtype: torch.dtype | None = torch.bfloat16) -> None:
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        self.models = [model] + [copy.deepcopy(model, dict(frozen)) for _ in range(count - 1)]
        for other in self.models[1:]:
            for own, shared in zip(other.parameters(), model.parameters(), strict=True):
                own.data = shared.data
        self.dtype = dtype
        self.device = next(model.parameters()).device.type
        self.pool = ThreadPoolExecutor(count) if count > 1 else None
        self.threads = torch.get_num_threads()
        if self.pool is not None:
            torch.set_num_threads(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.pool is not None:
            self.pool.shutdown()
            torch.set_num_threads(self.threads)

    def backward(self, loss: Callable[..., Tensor], *batch: Tensor, weight: float = 1.0) -> float:
        """Mean of `loss(model, *part of the batch)`, a scalar; `weight` times its gradient is added to the model's.

        Every worker gets its share of the batch, so a batch smaller than their number leaves some idle.
        """
        size = len(batch[0])

        def one(model: nn.Module, *part: Tensor) -> float:
            with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
                value = loss(model, *part)
            share = len(part[0]) / size
            (value * (share * weight)).backward()
            return value.item() * share

        parts = list(zip(*(tensor.tensor_split(min(len(self.models), size)) for tensor in batch), strict=True))
        if self.pool is None:
            return one(self.models[0], *parts[0])
        values = list(self.pool.map(lambda pair: one(pair[0], *pair[1]), zip(self.models, parts, strict=False)))
        for other in self.models[1:]:
            for own, first in zip(other.parameters(), self.models[0].parameters(), strict=True):
                if own.requires_grad and own.grad is not None:
                    first.grad = own.grad if first.grad is None else first.grad.add_(own.grad)
                    own.grad = None
        return sum(values)

    def together(self, tasks: Sequence[Callable[[], Any]]) -> None:
        """Run them, as many at once as there are workers."""
        for _ in self.pool.map(lambda task: task(), tasks) if self.pool else (task() for task in tasks):
            pass
