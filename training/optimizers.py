"""The optimizers of a training: AdamW, or Muon for the matrices and AdamW for the rest."""

from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_SIDE = 16  # of a matrix that Muon takes; the last layer before the latents has 8 rows


class MatrixMuon(torch.optim.Muon):
    """Muon for linear layers and convolutions, whose weights (C', C, k, k) it takes as matrices (C', C·k·k).

    A step goes along the orthogonal matrix next to the averaged gradient, so rare directions count as much as common
    ones (https://kellerjordan.github.io/posts/muon). Its size is matched to AdamW's (Liu et al. 2025, arXiv
    2502.16982), so that AdamW's learning rates serve.
    """

    def __init__(self, weights: list[nn.Parameter], rate: float, weight_decay: float) -> None:
        self.weights = weights
        self.matrices = [_rows(weight.detach(), weight).view(len(weight), -1) for weight in weights]  # the same memory
        super().__init__(self.matrices, rate, weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> None:
        """Of the gradients that the weights have now."""
        for weight, matrix in zip(self.weights, self.matrices, strict=True):
            matrix.grad = None if weight.grad is None else _rows(weight.grad, weight).flatten(1)
        super().step(closure)


def _rows(values: Tensor, weight: Tensor) -> Tensor:
    """Values of a weight's shape, their axes in the order in which they lie in memory."""
    last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return values.permute(0, 2, 3, 1) if last else values


def optimizers(model: nn.Module, plan: Any) -> list[torch.optim.Optimizer]:
    """Those of a plan, for all parameters that ask for a gradient; Muon's share is dealt out to the workers.

    As many on a GPU, which has one: so a training may go on there with the file that a CPU wrote.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in weights if plan.muon and id(p) not in embeddings and _is_matrix(p)]
    matrices.sort(key=Tensor.numel, reverse=True)
    parts = [matrices[n :: plan.workers] for n in range(plan.workers)]
    taken = {id(p) for p in matrices}
    rest = [p for p in weights if id(p) not in taken]
    adam = torch.optim.AdamW(rest, plan.rate, plan.betas, weight_decay=plan.weight_decay, fused=True)
    return [adam] + [MatrixMuon(part, plan.rate, plan.weight_decay) for part in parts if part]


def _is_matrix(weight: Tensor) -> bool:
    return weight.ndim in (2, 4) and min(len(weight), weight[0].numel()) >= SMALLEST_SIDE
