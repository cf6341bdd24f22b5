from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from loop import Plan, Training, read_state

PLAN = Plan(steps=12, rate=1e-2, warm_up=3, fall=4)


def network(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2))


def batches(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
    return x, 2 * x[:, :2]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


@pytest.fixture(autouse=True)
def threads() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("stops", [(5,), (1, 9)])
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path, stops: tuple[int, ...], muon: bool) -> None:
    plan = replace(PLAN, muon=muon)
    whole = Training(network(16), loss, batches, plan, tmp_path / "whole.pt")
    losses = list(whole.run())
    done = 0
    for stop in stops:
        part = Training(network(16), loss, batches, plan, tmp_path / "parts.pt")
        assert list(part.run(lambda part=part, stop=stop: part.step >= stop)) == losses[done:stop]
        done = stop
    rest = Training(network(16), loss, batches, plan, tmp_path / "parts.pt")
    assert rest.step == stops[-1]
    assert list(rest.run()) == losses[stops[-1] :]
    for kind in ("weights", "average"):
        a, b = (read_state(tmp_path / name)[kind] for name in ("whole.pt", "parts.pt"))
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("muon", [False, True])
def test_it_learns_and_the_average_lags(tmp_path: Path, muon: bool) -> None:
    model = network(16)
    before = [p.detach().clone() for p in model.parameters()]
    plan = Plan(steps=150, rate=1e-2, warm_up=1, fall=50, muon=muon)
    training = Training(model, loss, batches, plan, tmp_path / "x.pt")
    losses = list(training.run())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    average = training.average.values()
    far = [(a - b).abs().sum() for a, b in zip(average, before, strict=True)]
    assert all(distance > 0 for distance in far)


def test_what_is_frozen_stays_and_is_not_in_the_file(tmp_path: Path) -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    list(islice(Training(model, loss, batches, PLAN, tmp_path / "x.pt").run(), 20))
    assert torch.equal(model[0].weight, before)
    assert set(read_state(tmp_path / "x.pt")["weights"]) == {
        f"{n}.{kind}" for n in (2, 4) for kind in ("weight", "bias")
    }
    with pytest.raises(ValueError, match="another network"):
        Training(network(), loss, batches, PLAN, tmp_path / "x.pt")


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    plan = Plan(steps=100, rate=1.0, warm_up=10, fall=20)
    rates = [plan.rate_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([(n + 1) / 10 for n in range(10)])
    assert rates[10:81] == [1.0] * 71
    assert rates[80:] == pytest.approx([1 - n / 20 for n in range(21)])
    longer = Plan(steps=200, rate=1.0, warm_up=10, fall=20)
    assert [longer.rate_at(step) for step in range(81)] == rates[:81]
