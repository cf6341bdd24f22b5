"""Layers that a pass puts in the place of a network's own: the same results, and nothing of anybody else's changed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sdedit.models.attention import FeedForward
from sdedit.models.fast import quick_layers
from sdedit.models.fast.blocked_attention import in_blocks
from sdedit.models.fast.full_speed import QUICK
from sdedit.models.layers import ResnetBlock2D, Upsample2D


@pytest.mark.parametrize(("queries", "keys", "d"), [(300, 5000, 40), (256, 256, 64), (70, 1100, 33)])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 3.0, 60.0])  # the last would leave bfloat16's range
def test_attention_in_blocks_is_attention(queries: int, keys: int, d: int, sharpness: float) -> None:
    q, k, v = (torch.randn(2, 3, n, d).bfloat16() for n in (queries, keys, keys))
    q, v = sharpness * q, v + 1
    whole = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert (in_blocks(q, k, v) - whole).norm() < (0.06 if sharpness > 10 else 0.01) * whole.norm()
    moved = in_blocks(q, k + 4, v)  # an offset of the keys changes no softmax, but rounds them
    assert (moved - whole).norm() < (0.1 if sharpness > 10 else 0.015) * whole.norm()


@pytest.mark.parametrize("size", [None, (14, 18), (13, 18)])
def test_convolving_what_is_twice_as_large_without_making_it(size: tuple[int, int] | None) -> None:
    layer, x = Upsample2D(16), torch.randn(2, 16, 7, 9)
    plain = layer(x, size)
    assert torch.equal(plain, layer.conv(F.interpolate(x, size=size or (14, 18), mode="nearest")))
    with QUICK.installed(layer):
        torch.testing.assert_close(layer(x, size), plain, rtol=1e-4, atol=1e-5)


def test_a_hook_on_the_convolution_is_called() -> None:
    layer, seen = Upsample2D(16), []
    layer.conv.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with QUICK.installed(layer):
        layer(torch.randn(2, 16, 7, 9))
    assert seen == [(2, 16, 14, 18)]


@pytest.mark.parametrize("act_fn", ["silu", "gelu"])
def test_a_block_writes_over_its_own_maps_only(act_fn: str) -> None:
    block, x = ResnetBlock2D(8, 8, temb_channels=4, groups=4, act_fn=act_fn).eval(), torch.randn(2, 8, 6, 6)
    block.to(memory_format=torch.channels_last)  # as the pass lays it out, without a gradient
    temb, before = torch.randn(2, 4), x.clone()
    with QUICK.installed(block):
        learning = block(x, temb)  # with a gradient, all is kept
    learning.sum().backward()
    with torch.no_grad(), QUICK.installed(block):
        kept = temb.clone()
        torch.testing.assert_close(block(x, temb), learning.detach(), rtol=0, atol=0)
        assert torch.equal(x, before)
        assert torch.equal(temb, kept)


@torch.no_grad()
def test_what_a_hook_saw_stays_as_it_was() -> None:
    block, x, seen = ResnetBlock2D(8, 8, groups=4).eval(), torch.randn(2, 8, 6, 6), {}
    for name in ("norm1", "conv1", "norm2", "conv2"):
        layer = block.get_submodule(name)
        layer.register_forward_hook(lambda _, given, out, name=name: seen.update({name: (given[0], out)}))
    with QUICK.installed(block):
        result = block(x)
    for name, (given, out) in seen.items():
        layer = block.get_submodule(name)
        assert torch.equal(layer.forward(given), out)
    torch.testing.assert_close(result, x + seen["conv2"][1], rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(2, 24, 8), (1, 33, 8)])
def test_feed_forward_in_parts_is_the_whole(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = FeedForward(8), torch.randn(shape)
    whole, sizes = layer(x), []
    layer.net[0].register_forward_pre_hook(lambda _, given: sizes.append(given[0].shape[:-1].numel()))
    monkeypatch.setattr(quick_layers, "_PART", 20)
    monkeypatch.setattr(quick_layers, "_LARGE", x.nbytes)
    with torch.no_grad(), QUICK.installed(layer):
        torch.testing.assert_close(layer(x), whole)
    assert sizes == ([20, 20, 8] if len(x) == 2 else [20, 13])
