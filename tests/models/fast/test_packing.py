"""Weights that are packed for a run: the same products, and never of weights that have changed since."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import UNET
from sdedit import UNet2DConditionModel
from sdedit.models.fast import packing
from sdedit.models.fast.full_speed import QUICK, one_run
from sdedit.models.layers import ResnetBlock2D, Upsample2D

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU does not multiply in bfloat16"
)


def run(network: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad(), packing.PACKING.installed(network), packing.use_layouts({}):
        return network(*inputs)  # type: ignore[no-any-return]


def copies(network: nn.Module) -> list[Tensor]:
    return [copy for p in network.parameters() if p in packing._known for copy in packing._known[p].copies()]


@given(
    channels=st.sampled_from([(8, 8), (3, 16), (16, 5)]),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    groups=st.booleans(),
    bias=st.booleans(),
    size=st.tuples(st.integers(1, 2), st.integers(3, 9), st.integers(3, 9)),
)
@settings(max_examples=30, deadline=None)
def test_convolutions_are_the_same(
    channels: Any, kernel: int, stride: int, groups: bool, bias: bool, size: Any
) -> None:
    inside, outside = channels
    count = inside if groups and outside % inside == 0 else 1
    layer = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, groups=count, bias=bias).bfloat16()
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(size[0], inside, *size[1:]).bfloat16().contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        plain = layer(x)
    torch.testing.assert_close(run(layer, x), plain)
    assert run(layer, x).stride() == plain.stride()


@given(inside=st.integers(1, 40), outside=st.integers(1, 40), rows=st.lists(st.integers(1, 9), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_products_are_the_same(inside: int, outside: int, rows: list[int]) -> None:
    layer, x = nn.Linear(inside, outside).bfloat16(), torch.randn(*rows, inside).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(run(layer, x), layer(x))


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(UNET).eval().to(torch.bfloat16).requires_grad_(False)


GIVEN = (torch.randn(1, 4, 8, 8).bfloat16(), torch.tensor(500), torch.randn(2, 7, 32).bfloat16())


@torch.no_grad()
def test_weights_are_packed_once(unet: UNet2DConditionModel) -> None:
    kinds = [type(layer) for layer in unet.modules()]
    plain = unet(*GIVEN).sample
    with one_run(unet):
        assert torch.equal(unet(*GIVEN).sample, plain)
    assert [type(layer) for layer in unet.modules()] == kinds
    packed = copies(unet)
    assert len(packed) > 60
    for _ in range(2):
        with one_run(unet):
            assert torch.equal(unet(*GIVEN).sample, plain)
    again = copies(unet)
    assert all(a is b for a, b in zip(packed, again, strict=True))
    with pytest.raises(RuntimeError, match="within"), one_run(unet):
        raise RuntimeError("within")
    assert [type(layer) for layer in unet.modules()] == kinds


@torch.no_grad()
def test_packed_weights_go_with_the_plain_ones() -> None:
    layer = nn.Linear(16, 16).bfloat16()
    run(layer, torch.eye(16).bfloat16())
    packed = weakref.ref(copies(layer)[0])
    del layer
    gc.collect()
    assert packed() is None


@torch.no_grad()
def test_weights_that_change_within_a_run_are_packed_anew(unet: UNet2DConditionModel) -> None:
    layer = unet.get_submodule("mid_block.resnets.0.conv1")
    with one_run(unet) as kept:
        before = unet(*GIVEN).sample
        layer.weight.add_(0.1)  # type: ignore[operator, union-attr]
        in_place = unet(*GIVEN).sample
        layer.weight.data += 0.1  # type: ignore[union-attr, operator]
        kept.clear()  # what the pipeline does after each callback
        by_data = unet(*GIVEN).sample
        layer.weight = nn.Parameter(layer.weight + 0.1, requires_grad=False)  # type: ignore[operator]
        another = unet(*GIVEN).sample
    assert torch.equal(another, unet(*GIVEN).sample)
    assert all(not torch.equal(a, b) for a, b in ((before, in_place), (in_place, by_data), (by_data, another)))


def added_to_some(weight: Tensor) -> None:
    weight.data[1, 1] += 0.5


def swapped_rows(weight: Tensor) -> None:
    weight.data[[0, 1]] = weight.data[[1, 0]].clone()


def swapped_values(weight: Tensor) -> None:
    last = weight.shape[1] - 1
    weight.data[0, [0, last]] = weight.data[0, [last, 0]].clone()


def swapped_groups(weight: Tensor) -> None:
    """Of four values, which are one integer: sums without places would not tell."""
    weight.data.copy_(weight.data.roll(weight.shape[1] // 2, 1))


def replaced(weight: Tensor) -> None:
    weight.data = weight.data + 0.1


@pytest.mark.parametrize("change", [added_to_some, swapped_rows, swapped_values, swapped_groups, replaced])
@pytest.mark.parametrize("layer", [nn.Linear(6, 5), nn.Linear(16, 8), nn.Conv2d(8, 6, 3), nn.Conv2d(3, 6, 1)])
@torch.no_grad()
def test_weights_that_change_between_runs_are_packed_anew(layer: nn.Module, change: Callable[[Tensor], None]) -> None:
    """PyTorch does not count what is done through `.data`."""
    layer = copy.deepcopy(layer).bfloat16().to(memory_format=torch.channels_last)
    x = torch.randn(2, layer.weight.shape[1], 4, 4).bfloat16()
    x = x if isinstance(layer, nn.Conv2d) else x[:, :, 0, 0]
    run(layer, x)
    change(layer.weight)
    torch.testing.assert_close(run(layer, x), layer(x))


def test_what_does_not_suit_stays_as_it_is() -> None:
    hooked = nn.Linear(4, 4).bfloat16()
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    others = [
        nn.Linear(4, 4),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular").bfloat16(),
        nn.Conv2d(4, 4, 3, padding="same").bfloat16(),
        nn.Linear(4, 4, device="meta").bfloat16(),
        hooked,
    ]
    network = nn.ModuleList([*others, nn.Linear(4, 4).bfloat16()])
    with packing.PACKING.installed(network):
        kinds = [type(layer) for layer in network]
    assert kinds == [*map(type, others), packing.PackedLinear]


def test_a_network_that_learns_within_a_run_gets_gradients() -> None:
    layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(6, 4)).bfloat16()
    x = torch.randn(1, 4, 6, 6).bfloat16()
    with packing.PACKING.installed(layers), packing.use_layouts({}):
        layers(x).sum().backward()
    assert all(p.grad is not None for p in layers.parameters())


@torch.no_grad()
def test_a_packed_convolution_of_an_enlarged_map_is_still_four_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Upsample2D(16).bfloat16(), torch.randn(2, 16, 7, 9).bfloat16()
    monkeypatch.setattr(torch.nn.functional, "interpolate", None)  # never made large
    with QUICK.installed(layer):
        plain = layer(x)
        assert torch.equal(run(layer, x), plain)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_share_what_is_compiled() -> None:
    from torch._dynamo.utils import counters

    blocks = [ResnetBlock2D(16, 16, groups=4, eps=1e-6, act_fn="silu").eval().bfloat16() for _ in range(3)]
    x = torch.randn(1, 16, 8, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    plain = [block(x) for block in blocks]
    for block in blocks:
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    counters.clear()
    made = [run(block, x) for block in blocks]
    assert counters["stats"]["unique_graphs"] == 1
    for a, b in zip(made, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_the_layouts_that_were_last_used_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_layout", lambda packed: bytes(packed.flatten().tolist()))
    monkeypatch.setattr(packing, "LAYOUTS", 2)
    layouts, asked = packing.Layouts(nn.Linear(4, 4).bfloat16().weight), []

    def ask(shape: int) -> Tensor:
        """Shapes 1 and 11 have the same layout."""
        return layouts.copy_for(shape, lambda: (asked.append(shape), torch.tensor(shape % 10))[1])

    one = ask(1)
    assert ask(11) is one and ask(1) is one and asked == [1, 11]
    two = ask(2)
    assert ask(1) is one and ask(2) is two and asked == [1, 11, 2]
    ask(1), ask(3)  # 2 goes
    assert [int(copy) for copy in layouts.copies()] == [1, 3] and ask(11) is one
    assert ask(2) is not two and asked == [1, 11, 2, 3, 2]


@torch.no_grad()
def test_copies_take_no_more_memory_than_is_said() -> None:
    layer = nn.Conv2d(128, 128, 3, padding=1).bfloat16()
    sizes = [(1, 8), (2, 8), (1, 12), (8, 16), (1, 24), (2, 32), (4, 48)]
    for batch, side in [*sizes, *sizes]:
        x = torch.randn(batch, 128, side, side).bfloat16().contiguous(memory_format=torch.channels_last)
        assert torch.equal(run(layer, x), layer(x))
        assert (
            1 <= sum(torch.ops.mkldnn._nbytes(copy) for copy in copies(layer)) / layer.weight.nbytes <= packing.LAYOUTS
        )


@torch.no_grad()
def test_calls_that_change_their_number_of_pictures_pack_nothing_again(
    unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed: list[Any] = []
    plain = packing.Layouts.copy_for
    monkeypatch.setattr(
        packing.Layouts,
        "copy_for",
        lambda self, shape, pack: plain(self, shape, lambda: (packed.append(shape), pack())[1]),
    )
    counts = []
    for _ in range(3):
        with one_run(unet):
            for batch in (1, 2, 4):
                unet(torch.randn(batch, 4, 8, 8).bfloat16(), 5, torch.randn(batch, 7, 32).bfloat16())
            counts.append(len(packed))
    assert 0 < counts[0] == counts[2]


def test_threads_pack_a_weight_once() -> None:
    layer, x = nn.Linear(64, 64).bfloat16(), torch.randn(3, 64).bfloat16()
    with torch.no_grad():
        plain = layer(x)
    with ThreadPoolExecutor(4) as threads:
        made = list(threads.map(lambda _: run(layer, x), range(16)))
    assert all(torch.equal(one, plain) for one in made) and len(copies(layer)) == 1


@torch.no_grad()
def test_a_thread_without_a_run_multiplies_by_plain_weights() -> None:
    layer, x = nn.Linear(8, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    plain = layer(x)
    with packing.PACKING.installed(layer):
        assert torch.equal(layer(x), plain) and not copies(layer)
