"""ΔW of every kind against the formulas of the papers, written out a second time."""

from __future__ import annotations

import pytest
import torch

from sdedit.adapters import kinds as lora_kinds

LINEAR, CONV = torch.Size([12, 8]), torch.Size([12, 8, 3, 3])
SHAPES = pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "conv"])


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # the formulas, without rounding


def delta(roles, shape, alpha=None):
    assert lora_kinds.check(roles, shape) is None
    made = lora_kinds.factors(roles, shape, alpha)
    assert made.up.shape == (shape[0], made.rank, *(1 for _ in shape[2:]))
    assert made.rank <= max(min(shape[0], shape[1:].numel()), lora_kinds.stored_rank(roles) or 0)
    return made.delta()


@SHAPES
@pytest.mark.parametrize("alpha", [None, 1.0, 6.0])
def test_lora(shape, alpha):
    down, up = rand(3, *shape[1:]), rand(12, 3, *(1 for _ in shape[2:]))
    want = torch.einsum("or,r...->o...", up.flatten(1), down) * ((alpha or 3) / 3)
    torch.testing.assert_close(delta({"down": down, "up": up}, shape, alpha), want)


def test_lora_of_a_1x1_convolution_kept_as_a_linear_layer():
    down, up = rand(3, 8), rand(12, 3)
    got = delta({"down": down, "up": up}, torch.Size([12, 8, 1, 1]))
    torch.testing.assert_close(got, (up @ down)[..., None, None])


def test_tucker():
    down, mid, up = rand(3, 8, 1, 1), rand(4, 3, 3, 3), rand(12, 4, 1, 1)
    want = torch.einsum("op,pqhw,qi->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    torch.testing.assert_close(delta({"down": down, "mid": mid, "up": up}, CONV), want)


@SHAPES
@pytest.mark.parametrize("rank", [2, 5])  # 5² is more than the layer's own rank
def test_loha(shape, rank):
    a1, a2, b1, b2 = rand(12, rank), rand(12, rank), rand(rank, shape[1:].numel()), rand(rank, shape[1:].numel())
    want = ((a1 @ b1) * (a2 @ b2)).reshape(shape) * (3.0 / rank)
    roles = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    torch.testing.assert_close(delta(roles, shape, 3.0), want)


def test_loha_with_tucker_core():
    a, b, t = [rand(3, 12) for _ in "12"], [rand(3, 8) for _ in "12"], [rand(3, 3, 3, 3) for _ in "12"]
    one, two = (torch.einsum("pqhw,po,qi->oihw", t[i], a[i], b[i]) for i in (0, 1))
    roles = {f"hada_{n}{i + 1}{s}": v[i] for n, s, v in (("w", "_a", a), ("w", "_b", b), ("t", "", t)) for i in (0, 1)}
    torch.testing.assert_close(delta(roles, CONV, 1.5), one * two * 0.5)


def kron(w1, w2):
    """Blocks w1[i, j] · w2, by loops."""
    rows = [torch.cat([w1[i, j] * w2 for j in range(w1.shape[1])], dim=1) for i in range(w1.shape[0])]
    return torch.cat(rows, dim=0)


@SHAPES
@pytest.mark.parametrize("first", ["full", "product"])
@pytest.mark.parametrize("second", ["full", "product"])
def test_lokr(shape, first, second):
    kernel = shape[2:]
    w1, roles = rand(3, 2), {}
    a1, b1 = rand(3, 1), rand(1, 2)
    if first == "product":
        w1 = a1 @ b1
        roles |= {"lokr_w1_a": a1, "lokr_w1_b": b1}
    else:
        roles["lokr_w1"] = w1
    w2, a2, b2 = rand(4, 4, *kernel), rand(4, 1), rand(1, kernel.numel() * 4)
    if second == "product":
        w2 = (a2 @ b2).reshape(4, 4, *kernel)
        roles |= {"lokr_w2_a": a2, "lokr_w2_b": b2}
    else:
        roles["lokr_w2"] = w2
    scale = 1.0 if (first, second) == ("full", "full") else 0.5  # without a product there is no rank to divide by
    torch.testing.assert_close(delta(roles, shape, 0.5), kron(w1, w2) * scale)


def test_lokr_with_tucker_core():
    w1, a, b, t = rand(3, 2), rand(2, 4), rand(2, 4), rand(2, 2, 3, 3)
    roles = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": t}
    want = kron(w1, torch.einsum("pqhw,po,qi->oihw", t, a, b)) * (1.0 / 2)
    torch.testing.assert_close(delta(roles, CONV, 1.0), want)


@SHAPES
def test_full(shape):
    diff, bias = rand(*shape), rand(12)
    torch.testing.assert_close(delta({"diff": diff}, shape), diff)
    only_bias = lora_kinds.factors({"diff_b": bias}, shape)
    assert torch.equal(only_bias.delta(), torch.zeros(shape, dtype=torch.float64)) and only_bias.bias is bias


@SHAPES
def test_dora_along_the_input(shape):
    """m · (W + ΔW) / ‖W + ΔW‖ with a length for each input channel is an ordinary ΔW."""
    down, up, weight = rand(3, *shape[1:]), rand(12, 3, *(1 for _ in shape[2:])), rand(*shape)
    magnitude = rand(1, 8, *(1 for _ in shape[2:])).abs()
    made = lora_kinds.factors({"down": down, "up": up, "dora": magnitude}, shape, 1.5, weight)
    moved = weight + torch.einsum("or,r...->o...", up.flatten(1), down) * 0.5
    want = torch.stack([magnitude[0, i] * moved[:, i] / moved[:, i].norm() for i in range(8)], dim=1)
    assert made.magnitude is None
    torch.testing.assert_close(weight + made.delta(), want)


@pytest.mark.parametrize(
    "roles, says",
    [
        ({"down": (3, 9), "up": (12, 3)}, "down is [3, 9]"),
        ({"down": (3, 8), "up": (12, 4)}, "up is [12, 4]"),
        ({"down": (3, 8), "up": (13, 3)}, "up is [13, 3]"),
        ({"hada_w1_a": (12, 2), "hada_w1_b": (2, 8), "hada_w2_a": (12, 2), "hada_w2_b": (2, 9)}, "hada_w2_b is [2, 9]"),
        ({"lokr_w1": (3, 2), "lokr_w2": (4, 5)}, "lokr_w2 is [4, 5]"),
        ({"diff": (12, 7)}, "diff is [12, 7]"),
        ({"down": (3, 8), "up": (12, 3), "dora": (5,)}, "DoRA scale is [5]"),
        ({"down": (3, 8), "up": (12, 3), "diff_b": (8,)}, "diff_b is [8]"),
        ({"down": (200, 8), "up": (12, 200)}, "too large"),
    ],
)
def test_misfits_are_named(roles, says):
    why = lora_kinds.check({name: torch.zeros(shape) for name, shape in roles.items()}, LINEAR)
    assert why is not None and says in why


def test_a_bomb_is_refused_unread():
    bomb = torch.zeros(1).expand(2_000_000, 2_000_000)
    assert "too large" in str(lora_kinds.check({"diff": bomb}, LINEAR))
    assert "too large" in str(lora_kinds.check({"lokr_w1": bomb, "lokr_w2": bomb}, LINEAR))
    assert "not floats" in str(lora_kinds.check({"diff": torch.zeros(12, 8, dtype=torch.int64)}, LINEAR))
