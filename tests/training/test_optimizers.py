from __future__ import annotations

import pytest
import torch
from torch import nn

from loop import Plan
from optimizers import MatrixMuon, optimizers

PLAN = Plan(steps=10, rate=1e-2, muon=True)


def stepped(layer: nn.Module) -> torch.Tensor:
    """By how much Muon's first step changes the layer's weights, as a matrix."""
    before = layer.weight.detach().clone()
    MatrixMuon([layer.weight], rate=1e-2, weight_decay=0.0).step()
    return (before - layer.weight.detach()).flatten(1)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_the_orthogonal_matrix_next_to_the_gradient(layout: object, given: object) -> None:
    layer = nn.Conv2d(24, 32, 3).to(memory_format=layout)
    gradient = torch.randn(32, 24, 3, 3, generator=torch.Generator().manual_seed(0))
    layer.weight.grad = gradient.to(memory_format=given)
    step = stepped(layer) / (1e-2 * 0.2 * (24 * 9) ** 0.5)
    left, _, right = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    inner = left.T @ step @ right.T  # the identity, but for Newton-Schulz's roughness of 0.7 to 1.2
    assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all()
    assert (inner - inner.diagonal().diag()).abs().max() < 0.05


def test_every_parameter_has_one_optimizer() -> None:
    model = nn.ModuleDict(
        {
            "matrix": nn.Linear(32, 64),
            "convolution": nn.Conv2d(16, 32, 3),
            "narrow": nn.Linear(64, 8),
            "words": nn.Embedding(50, 32),
            "norm": nn.LayerNorm(32),
            "frozen": nn.Linear(32, 32).requires_grad_(False),
        }
    )
    adam, *muons = optimizers(model, PLAN)
    weights = [p for muon in muons for p in muon.weights]
    assert len(muons) == 2
    assert {id(p) for p in weights} == {id(model["matrix"].weight), id(model["convolution"].weight)}
    learned = [p for p in model.parameters() if p.requires_grad]
    rest = adam.param_groups[0]["params"]
    assert {id(p) for p in [*weights, *rest]} == {id(p) for p in learned}
    assert len(weights) + len(rest) == len(learned)


def test_without_muon_there_is_adamw_alone() -> None:
    assert len(optimizers(nn.Linear(32, 32), Plan(steps=10, rate=1e-2))) == 1
