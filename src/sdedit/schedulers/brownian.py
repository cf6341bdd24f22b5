"""One Brownian path for all the noise of a run, so that more steps refine one image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BrownianPath:
    """A Brownian path over the levels s of a run, or one for each sample, from torchsde's tree, on the CPU.

    Args:
        shape: Of the noise, (B, C, H, W).
        sigmas: The levels.
        seed: One, or one for each sample.
    """

    def __init__(self, shape: Sequence[int], sigmas: Tensor, seed: int | Sequence[int]) -> None:
        try:
            import torchsde  # type: ignore[import-untyped]
        except ImportError:
            raise ImportError("DPMSolverSDEScheduler needs torchsde for its noise: pip install 'sdedit[sde]'") from None
        self._one = isinstance(seed, int)
        seeds = [seed] if isinstance(seed, int) else list(seed)
        if not self._one and len(seeds) != shape[0]:
            raise ValueError(f"noise_sampler_seed: got {seeds}; expected one, or one for each of {shape[0]} samples")
        # torchsde rounds the ends of the path to its tolerance, and warns of what is asked for beyond them.
        self._ends = round(float(sigmas[sigmas > 0].min()), 6), round(float(sigmas.max()), 6)
        size = tuple(shape) if self._one else tuple(shape[1:])
        self._paths = [
            torchsde.BrownianInterval(
                t0=self._ends[0],
                t1=self._ends[1],
                size=size,
                dtype=torch.float32,
                device="cpu",
                entropy=one,
                tol=1e-6,
                cache_size=200,
                pool_size=24,
                halfway_tree=True,
            )
            for one in seeds
        ]

    def __call__(self, start: Tensor, end: Tensor) -> Tensor:
        """Standard normal noise (B, C, H, W) of a step down from s = `start` to `end`, scalars on the CPU."""
        low, high = max(float(end), self._ends[0]), min(float(start), self._ends[1])
        drawn = [-path(low, high) / (start - end).sqrt() for path in self._paths]
        return drawn[0] if self._one else torch.stack(drawn)
