from __future__ import annotations

import copy

import torch
from torch import nn

from norms import QuickGroupNorm, quick_norms


def test_the_quick_gradient_is_pytorchs() -> None:
    torch.manual_seed(0)
    plain = nn.GroupNorm(4, 16)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    quick = quick_norms(nn.Sequential(copy.deepcopy(plain)))[0]
    assert type(quick) is QuickGroupNorm
    x = (3 + 2 * torch.randn(3, 16, 6, 10)).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(3, 16, 6, 10)
    found = []
    for norm in (plain, quick):
        own = x.clone().requires_grad_(True)
        y = norm(own)
        y.backward(gradient)
        found.append((y, own.grad, norm.weight.grad, norm.bias.grad))
    for expected, got in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
