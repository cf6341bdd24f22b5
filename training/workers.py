"""One model trained by several single-threaded workers that share its weights, for a CPU that others use too.

PyTorch's own threads meet after every operation, so one busy core holds up all of them. Here each worker takes its part
of the batch through the whole forward and backward pass alone, and they meet once a step.
"""

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn


class Workers:
    """Copies of a model with the same storage for the weights and their own gradients."""

    def __init__(self, model: nn.Module, count: int) -> None:
        torch.set_num_threads(1)
        self.models = [model] + [copy.deepcopy(model) for _ in range(count - 1)]
        for other in self.models[1:]:
            for own, shared in zip(other.parameters(), model.parameters(), strict=True):
                own.data = shared.data
        self.pool = ThreadPoolExecutor(count)

    def backward(self, loss: Callable[..., Tensor], *batch: Tensor) -> float:
        """Mean of `loss(model, *part of the batch)` over the workers; its gradient is left in the first model."""

        def one(model: nn.Module, *part: Tensor) -> float:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(model, *part)
            (value / len(self.models)).backward()
            return value.item()

        parts = zip(*(tensor.chunk(len(self.models)) for tensor in batch), strict=True)
        values = list(self.pool.map(lambda pair: one(pair[0], *pair[1]), zip(self.models, parts, strict=True)))
        for other in self.models[1:]:
            for own, first in zip(other.parameters(), self.models[0].parameters(), strict=True):
                if own.grad is not None:
                    first.grad = own.grad if first.grad is None else first.grad.add_(own.grad)
                    own.grad = None
        return sum(values) / len(values)
