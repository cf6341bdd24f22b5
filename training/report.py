"""A line a minute while a training runs, and now and then a look at what it can do."""

import time
from collections.abc import Callable

from loop import Training


class Report:
    """Prints speed and mean loss; calls `measure` every `often` seconds, and prints what it says.

    Args:
        samples: In a batch.
        loss: How to print the losses of the last minute; their mean if not given.
    """

    def __init__(
        self,
        training: Training,
        samples: int,
        often: float,
        measure: Callable[[], str],
        loss: Callable[[], str] | None = None,
    ) -> None:
        self.training, self.samples, self.often, self.measure, self.loss = training, samples, often, measure, loss
        self.values: list[float] = []
        self.logged = self.measured = time.monotonic()
        count = sum(p.numel() for p in training.parameters.values())
        print(f"{count / 1e6:.2f}M parameters learn, from step {training.step} to {training.plan.steps}", flush=True)

    def __call__(self, value: float) -> None:
        """After each step, with its loss."""
        self.values.append(value)
        now = time.monotonic()
        if now - self.logged > 60:
            speed = len(self.values) * self.samples / (now - self.logged)
            mean = self.loss() if self.loss else f"{sum(self.values) / len(self.values):.4f}"
            print(
                f"step {self.training.step}  {self.training.seconds / 60:.1f} min  {speed:.0f} a second  loss {mean}",
                flush=True,
            )
            self.values, self.logged = [], now
        if now - self.measured > self.often:
            print(f"  {self.measure()}", flush=True)
            self.measured = time.monotonic()

    def end(self) -> None:
        """When the loop has ended."""
        print(
            f"stopped at {self.training.step} steps, {self.training.seconds / 60:.1f} min; {self.measure()}", flush=True
        )
