"""The loop that trains: any network, any loss, and one file from which it goes on as if it had never stopped."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norms import quick_norms
from optimizers import optimizers
from sdedit.apps.finetune.workers import Workers
from sdedit.files import write_atomically

SAVE_SECONDS = 180.0


@dataclass(frozen=True)
class Plan:
    """How long, and how fast: the learning rate rises, stays, and falls straight to zero at the end.

    So a run may be made longer or shorter while it is under way: until the fall nothing depends on `steps`.

    Attributes:
        rate: Learning rate of the level part.
        warm_up, fall: Steps of the rise and of the fall.
        averaging: How much of the averaged weights each step keeps; less at the beginning.
        betas, weight_decay: AdamW's.
        clip: Greatest norm of the gradient.
        muon: Is Muon the optimizer of the matrices, see `MatrixMuon`?
        workers: Threads that share a batch on the CPU, see `Workers`.
    """

    steps: int
    rate: float
    warm_up: int = 200
    fall: int = 1000
    averaging: float = 0.9985
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    clip: float = 1.0
    muon: bool = False
    workers: int = 2

    def rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, …, `steps` - 1."""
        return self.rate * min(1.0, (step + 1) / max(self.warm_up, 1), (self.steps - step) / max(self.fall, 1))


class Training:
    """A network, what it shall minimise, and how far it has come.

    Args:
        model: On its device. Parameters that ask for no gradient stay as they are, and are not in the file.
        loss: `loss(model, *batch)` → a scalar.
        batches: The batch of a step, a tuple of tensors with the samples along axis 0, from the number of the step
            alone: that is what makes a resumed run the same as one that was never stopped. Called one ahead.
        file: Where the state is kept; read now if it is there.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        batches: Callable[[int], tuple[Tensor, ...]],
        plan: Plan,
        file: Path,
    ) -> None:
        self.model, self.loss, self.batches, self.plan, self.file = model, loss, batches, plan, file
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.device = next(iter(self.parameters.values())).device
        if self.device.type == "cpu":
            quick_norms(model)
        self.workers = plan.workers if self.device.type == "cpu" else 1
        self.optimizers = optimizers(model, plan)
        self.step, self.seconds = 0, 0.0
        if file.exists():
            self._resume()

    def run(self, stopped: Callable[[], bool] = lambda: False) -> Iterator[float]:
        """Train to the end of the plan, or until `stopped()`, and save; each step yields its loss."""
        started = saved = time.monotonic()
        before = self.seconds
        with ThreadPoolExecutor(1) as ahead, Workers(self.model, self.workers) as workers:
            coming = ahead.submit(self.batches, self.step)
            while self.step < self.plan.steps and not stopped():
                batch, coming = coming.result(), ahead.submit(self.batches, self.step + 1)
                value = self._take(workers, batch)
                self.seconds = before + time.monotonic() - started
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
                yield value
        self.save()

    def _take(self, workers: Workers, batch: tuple[Tensor, ...]) -> float:
        """One step of the optimizers."""
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.plan.rate_at(self.step)
        self.model.zero_grad(set_to_none=True)
        value = workers.backward(self.loss, *(tensor.to(self.device, non_blocking=True) for tensor in batch))
        nn.utils.clip_grad_norm_(self.parameters.values(), self.plan.clip)
        workers.together([optimizer.step for optimizer in self.optimizers])
        self.step += 1
        keep = min(self.plan.averaging, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - keep)
        return value

    def averaged(self, model: nn.Module) -> nn.Module:
        """Put the averaged weights into another network of the same kind, for use."""
        model.load_state_dict(self.average, strict=False)
        return model

    def save(self) -> None:
        """Write the state; whenever the process is killed, a whole file is there."""
        weights = {name: p.detach() for name, p in self.parameters.items()}
        moments = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"weights": weights, "average": self.average, "optimizers": moments}
        with write_atomically(self.file) as part:
            torch.save({**state, "step": self.step, "seconds": self.seconds}, part)

    def _resume(self) -> None:
        state = read_state(self.file, self.device)
        if set(state["weights"]) != set(self.parameters):
            raise ValueError(f"{self.file} is of another network; move it away to begin anew")
        self.model.load_state_dict(state["weights"], strict=False)
        self.average = state["average"]
        for optimizer, moments in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(moments)
        self.step, self.seconds = state["step"], state["seconds"]


def read_state(file: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """What `Training.save` wrote: "weights", "average", "optimizers", "step" and "seconds"."""
    return torch.load(file, map_location=device, weights_only=True)
