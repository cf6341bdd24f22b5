"""The JAX schedulers by their own methods: the same numbers as PyTorch's, step by step, also under `jit`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import sdedit
from conftest import SCHEDULE
from sdedit.flax.schedulers import draw, flax_class, make_scheduler, make_table
from sdedit.schedulers.names import CLASS_NAMES

SHAPE = (2, 4, 4, 4)


def model(x: Any, t: Any, xp: Any) -> Any:
    return xp.tanh(0.7 * x + 0.001 * t) * 0.8 + 0.1 * x


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_steps_are_those_of_pytorch(name: str) -> None:
    theirs = getattr(sdedit, name).from_config(SCHEDULE)
    ours = getattr(sdedit, f"Flax{name}").from_config(SCHEDULE)
    order, key = theirs.order, jax.random.key(3)
    theirs.set_timesteps(8)
    first = 3 * order
    theirs.set_begin_index(first)
    state = ours.set_timesteps(ours.create_state(), 8, SHAPE, first=first)
    x0, noise = (np.asarray(jax.random.normal(jax.random.key(i), SHAPE)) for i in (1, 2))
    x = theirs.add_noise(torch.tensor(x0), torch.tensor(noise), theirs.timesteps[first : first + 1].repeat(2))
    y = ours.add_noise(state, x0, noise, state.timesteps[first : first + 1])
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)
    step = jax.jit(ours.step)
    for i, t in enumerate(theirs.timesteps[first:]):
        drawn = torch.from_numpy(np.array(draw(state.table, i, key, SHAPE)))
        theirs.draw_noise = lambda *_, drawn=drawn, **__: drawn
        x = theirs.step(model(theirs.scale_model_input(x, t), float(t), torch), t, x, return_dict=False)[0]
        seen = ours.scale_model_input(state, y)
        y, state = step(state, model(seen, state.timesteps[first + i], jnp), state.timesteps[first + i], y, key)
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-4)
    assert int(state.index) == len(theirs.timesteps) - first


def test_the_brownian_path_of_dpm_sde() -> None:
    """Second rows go over the whole step: their noise shares with the first row's what the path did till the middle."""
    plan = flax_class("DPMSolverSDEScheduler").from_config(SCHEDULE)
    plan.lay_out(6)
    table = make_table(plan, 2)
    key, many = jax.random.key(0), (20000,)
    first, second = draw(table, 2, key, many), draw(table, 3, key, many)
    s, after = plan._grid.sigmas[4:6]
    expected = np.sqrt((s - np.sqrt(s * after)) / (s - after))
    assert float(jnp.std(second)) == pytest.approx(1, abs=0.02)
    assert float(jnp.corrcoef(first, second)[0, 1]) == pytest.approx(expected, abs=0.02)
    assert float(jnp.corrcoef(second, draw(table, 4, key, many))[0, 1]) == pytest.approx(0, abs=0.03)


def test_a_run_says_where_it_starts() -> None:
    scheduler = sdedit.FlaxPNDMScheduler.from_config(SCHEDULE, skip_prk_steps=True)
    state = scheduler.create_state()
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(state, jnp.zeros(SHAPE), 1, jnp.zeros(SHAPE))
    with pytest.raises(ValueError, match="first: got 11; expected 0 to 10"):
        scheduler.set_timesteps(state, 10, first=11)
    state = scheduler.set_timesteps(state, 10)
    late = state.timesteps[4]
    with pytest.raises(ValueError, match="the next of this run: to start late"):
        scheduler.step(state, jnp.zeros(SHAPE), late, jnp.zeros(SHAPE))
    state = scheduler.set_timesteps(state, 10, first=4)
    out = scheduler.step(state, jnp.zeros(SHAPE), late, jnp.ones(SHAPE))  # the shape may be left out
    assert out.prev_sample.shape == SHAPE and out.to_tuple()[1] is out.state
    with pytest.raises(ValueError, match="variance_type='learned' needs a UNet"):
        sdedit.FlaxDDPMScheduler(variance_type="learned").set_timesteps(state, 3)


def test_names_and_files(tmp_path: Path) -> None:
    scheduler = make_scheduler("dpm++-2m-karras", SCHEDULE)
    assert type(scheduler).__name__ == "FlaxDPMSolverMultistepScheduler" and scheduler.config.use_karras_sigmas
    scheduler.save_pretrained(tmp_path)
    again, state = sdedit.FlaxEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert again.config.beta_schedule == "scaled_linear" and len(state.timesteps) == 1000
    assert sdedit.FlaxLMSDiscreteScheduler is sdedit.FlaxLMSDiscreteScheduler
    assert {"FlaxDDIMScheduler", "FlaxUniPCMultistepScheduler"} <= set(dir(sdedit))
    with pytest.raises(ValueError, match="scheduler dpm; expected one of"):
        make_scheduler("dpm")
    with pytest.raises(AttributeError):
        _ = sdedit.FlaxNoSuchScheduler


@pytest.mark.parametrize("name", ["DDIMScheduler", "LMSDiscreteScheduler"])
def test_noise_before_the_times_are_chosen(name: str) -> None:
    """As diffusers' pipeline does it: with the state that `create_state` gave, at any training step."""
    ours, theirs = getattr(sdedit, f"Flax{name}")(**SCHEDULE_OF[name]), getattr(sdedit, name)(**SCHEDULE_OF[name])
    x, z = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 0.5)
    times = torch.tensor([3, 801])
    made = ours.add_noise(ours.create_state(), x.numpy(), z.numpy(), times.numpy())
    np.testing.assert_allclose(made, theirs.add_noise(x, z, times), rtol=1e-5)


SCHEDULE_OF = {
    "DDIMScheduler": SCHEDULE,
    "LMSDiscreteScheduler": {k: SCHEDULE[k] for k in ("beta_start", "beta_end", "beta_schedule")},
}


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler"])
def test_velocity_is_that_of_pytorch(name: str) -> None:
    flax, ours = (one.from_config(SCHEDULE) for one in (flax_class(name), getattr(sdedit, name)))
    x, noise = np.random.default_rng(0).standard_normal((2, 3, 4, 8, 8)).astype(np.float32)
    for times in ([3, 500, 999], [7]):
        expected = ours.get_velocity(torch.from_numpy(x), torch.from_numpy(noise), torch.tensor(times))
        found = jax.jit(flax.get_velocity)(flax.create_state(), x, noise, np.array(times))
        np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)


def test_compatibles_are_flax_classes_that_take_the_config() -> None:
    scheduler = flax_class("PNDMScheduler").from_config(SCHEDULE)
    assert [one.__name__ for one in scheduler.compatibles] == [f"Flax{name}" for name in CLASS_NAMES]
    assert all(
        one.from_config(scheduler.config).config.beta_end == scheduler.config.beta_end for one in scheduler.compatibles
    )
