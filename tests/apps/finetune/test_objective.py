"""What is learned: diffusers' noise, targets and weights, and properties that tie the three predictions together."""

from __future__ import annotations

import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import SCHEDULE
from sdedit import DDIMScheduler
from sdedit.apps.finetune.objective import PREDICTIONS, Objective, fresh_rng, shuffled, spread_times
from sdedit.apps.finetune.settings import Settings
from sdedit.apps.finetune.workers import Workers

TIMES = torch.tensor([0, 1, 250, 731, 999])
CLEAN, NOISE = torch.randn(2, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def both(prediction, gamma=None):
    arguments = {**SCHEDULE, "prediction_type": prediction}
    theirs = diffusers.DDPMScheduler(**{k: v for k, v in arguments.items() if k != "set_alpha_to_one"})
    return Objective.of(DDIMScheduler(**arguments), gamma), theirs


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_targets_and_weights_are_those_of_diffusers(prediction):
    ours, theirs = both(prediction, 5.0)
    torch.testing.assert_close(ours.noisy(CLEAN, NOISE, TIMES), theirs.add_noise(CLEAN, NOISE, TIMES))
    target = NOISE if prediction == "epsilon" else theirs.get_velocity(CLEAN, NOISE, TIMES)
    torch.testing.assert_close(ours.target(CLEAN, NOISE, TIMES), target)
    snr = compute_snr(theirs, TIMES)
    capped = snr.clamp(max=5.0)
    torch.testing.assert_close(ours.weights(TIMES), capped / (snr if prediction == "epsilon" else snr + 1))
    assert both(prediction)[0].weights(TIMES).tolist() == [1.0] * 5


def test_an_error_of_x0_weighs_the_same_whatever_is_predicted():
    """With min-SNR weights the loss is min(SNR, γ) times the squared error of x0."""
    wrong = CLEAN + 0.1 * torch.randn(CLEAN.shape, generator=torch.Generator().manual_seed(1))
    for prediction in PREDICTIONS:
        objective = both(prediction, 5.0)[0]
        alpha, sigma = objective.levels(TIMES)
        noisy = objective.noisy(CLEAN, NOISE, TIMES)
        as_noise = (noisy - alpha * wrong) / sigma  # the ε, and with it the v, that goes with the wrong x0
        loss = objective.loss(objective.target(wrong, as_noise, TIMES), objective.target(CLEAN, NOISE, TIMES), TIMES)
        snr = (alpha / sigma).square().flatten()
        expected = snr.clamp(max=5.0) * (wrong - CLEAN).square().mean((1, 2, 3))
        torch.testing.assert_close(loss, expected, rtol=2e-3, atol=1e-6)


def test_other_predictions_are_refused():
    class Odd:
        config = {"prediction_type": "flow"}  # noqa: RUF012

    with pytest.raises(ValueError, match="prediction_type='flow'; expected one of epsilon"):
        Objective.of(Odd())


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 1000), st.integers(0, 2**32))
def test_times_are_spread_over_the_range(count, total, seed):
    times = np.sort(spread_times(np.random.default_rng(seed), count, total))
    parts = np.arange(count + 1) / count * total
    assert (times >= np.floor(parts[:-1])).all() and (times < np.ceil(parts[1:])).all()


def test_each_time_alone_is_uniform():
    drawn = [spread_times(np.random.default_rng(seed), 3, 6)[0] for seed in range(6000)]
    counts = np.bincount(drawn, minlength=6)
    assert ((counts - 1000) ** 2 / 1000).sum() < 25  # χ² with 5 degrees of freedom: above once in 7,000 times


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 30), st.integers(1, 30), st.integers(0, 5))
def test_packs_hold_every_picture_once_however_they_are_cut(total, first, count, seed):
    whole = shuffled(0, 70, total, seed)
    assert shuffled(first, count, total, seed) == whole[first : first + count]
    for start in range(0, 70 - total + 1, total):
        assert sorted(whole[start : start + total]) == list(range(total))


def test_generators_depend_on_the_numbers_alone():
    for make in (lambda g: g[0].random(4).tolist(), lambda g: torch.randn(4, generator=g[1]).tolist()):
        assert make(fresh_rng(1, 2)) == make(fresh_rng(1, 2))
        assert len({tuple(make(fresh_rng(*key))) for key in ((1, 2), (2, 1), (1, 3), (1,))}) == 4


@pytest.mark.parametrize("warmup", [0, 10])
def test_learning_rate(warmup):
    s = Settings(steps=100, warmup=warmup, learning_rate=2.0)
    rates = [s.learning_rate_at(n) for n in range(100)]
    assert rates[warmup] == max(rates) == 2.0
    assert all(a < b for a, b in itertools.pairwise(rates[: warmup + 1]))
    assert all(a > b for a, b in itertools.pairwise(rates[warmup:]))
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    theirs = diffusers.optimization.get_cosine_schedule_with_warmup(optimizer, 0, 100 - warmup)
    torch.testing.assert_close(rates[warmup:], [2.0 * theirs.lr_lambdas[0](n) for n in range(100 - warmup)])


def test_workers_give_the_gradient_of_the_whole_batch():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    model[0].requires_grad_(False)
    x, y = torch.randn(5, 4), torch.randn(5, 1)

    def loss(model, x, y):
        return (model(x) - y).square().mean()

    expected = torch.autograd.grad(2.5 * loss(model, x, y), list(model[2].parameters()))
    threads = torch.get_num_threads()
    for count in (1, 2, 3, 8):
        with Workers(model, count, None) as workers:
            assert all(other[0].weight is model[0].weight for other in workers.models)
            value = workers.backward(loss, x, y, weight=2.5)
        assert value == pytest.approx(loss(model, x, y).item())
        for parameter, gradient in zip(model[2].parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
            parameter.grad = None
        assert model[0].weight.grad is None and torch.get_num_threads() == threads
