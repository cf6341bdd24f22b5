"""Rows and the one stepping function: linearity, a row for each sample, and no look at the device."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdedit import schedulers
from sdedit.schedulers import rows as row_functions
from sdedit.schedulers.names import CLASS_NAMES, SCHEDULERS, make_scheduler
from sdedit.schedulers.rows import Memory, Row
from sdedit.schedulers.schedule import Schedule, make_betas, space_sigmas, space_times, symmetric_beta_quantile
from sdedit.schedulers.solvers.sigma_space import lagrange_integrals

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
Options = dict[str, Any]


def make(name: str, **options: Any) -> Any:
    own = {"clip_sample": False} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    return getattr(schedulers, name)(**SD | own | options)


def start(name: str, steps: int = 9, part: float = 0.7, **options: Any) -> tuple[Any, int, list[Row]]:
    """A scheduler, the place where a late run starts, and its rows."""
    scheduler = make(name, **options)
    scheduler.set_timesteps(steps)
    first = int(len(scheduler.timesteps) * (1 - part)) // scheduler.order * scheduler.order
    return scheduler, first, scheduler.rows(first)


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.7 * x + torch.sin(0.01 * t)) * 0.8 + 0.1 * x


def run(rows: list[Row], x: Tensor, noise: Tensor, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A run by rows of floats; noise is (rows, B, C, H, W)."""
    memory = Memory()
    for row, z in zip(rows, noise, strict=False):
        output = predict(x * row.scale, torch.tensor(row.t))
        x, _, _, memory = row_functions.step(row, x, output, memory, z, xp=torch)
    return x


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_superposition(name: str) -> None:
    """The end of a run is linear in its start, in the UNet's outputs and in the noise together."""
    rows = start(name)[2]
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn((2, 2, 4, 4, 4), generator=source, dtype=torch.float64)
    outputs, noise = torch.randn((2, 2, len(rows), 2, 4, 4, 4), generator=source, dtype=torch.float64)

    def end(x: Tensor, outputs: Tensor, noise: Tensor) -> Tensor:
        given = iter(outputs)
        return run(rows, x, noise, lambda *_: next(given))

    both = end(2 * x - 3 * y, 2 * outputs[0] - 3 * outputs[1], 2 * noise[0] - 3 * noise[1])
    apart = 2 * end(x, outputs[0], noise[0]) - 3 * end(y, outputs[1], noise[1])
    assert torch.allclose(both, apart, rtol=1e-10, atol=1e-10)


BOUNDS: list[Options] = [{}, {"clip_sample": True}, {"thresholding": True, "sample_max_value": 1.3}]
BOUNDED = [(name, bounds) for name in CLASS_NAMES for bounds in BOUNDS if bounds.keys() <= make(name).config.keys()]


@pytest.mark.parametrize(("name", "bounds"), BOUNDED)
def test_a_row_for_each_sample(name: str, bounds: Options) -> None:
    """A batch whose samples start at different places gives what each gives alone."""
    scheduler = make(name, **bounds)
    runs = []
    for steps, part in ((9, 1.0), (14, 0.5), (9, 0.4)):
        scheduler.set_timesteps(steps)
        first = int(len(scheduler.timesteps) * (1 - part)) // scheduler.order * scheduler.order
        runs.append(scheduler.rows(first))
    count = min(len(rows) for rows in runs)
    source = torch.Generator().manual_seed(0)
    x = torch.randn((3, 4, 4, 4), generator=source)
    noise = torch.randn((count, 3, 4, 4, 4), generator=source)

    def predict(seen: Tensor, t: Tensor) -> Tensor:
        return model(seen, t.reshape(-1, 1, 1, 1))

    alone, memories = [x[i : i + 1] for i in range(3)], [Memory()] * 3
    together = x
    depth = max(len(rows[0].b) for rows in runs)
    memory = row_functions.blank_memory(x, depth)
    for k in range(count):
        chosen = [rows[k] for rows in runs]
        for i, row in enumerate(chosen):
            output = predict(alone[i] * row.scale, torch.tensor([row.t], dtype=torch.float32))
            alone[i], _, _, memories[i] = row_functions.step(
                row, alone[i], output, memories[i], noise[k, i : i + 1], threshold=scheduler.threshold, xp=torch
            )
        batch = per_sample(chosen, lambda v: torch.tensor(v, dtype=torch.float32))
        output = predict(together * batch.scale, batch.t.flatten())
        together, _, _, memory = row_functions.step(
            batch, together, output, memory, noise[k], threshold=scheduler.threshold, xp=torch
        )
        assert torch.allclose(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def per_sample(rows: Any, as_array: Any) -> Row:
    """A row for each of B samples as one row of arrays (B, 1, 1, 1), as JAX has them."""
    *columns, b = row_functions.table(rows)
    as_arrays = [as_array(v.reshape(-1, 1, 1, 1)) for v in (*columns, *b)]
    return Row._make([*as_arrays[: len(columns)], tuple(as_arrays[len(columns) :])])


def test_solvers_can_share_a_batch() -> None:
    """DDIM, UniPC, Heun and PNDM in one batch, each in the scale of its own samples."""
    runs = [
        start(name)[2]
        for name in ("DDIMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler")
    ]
    count = min(len(rows) for rows in runs)
    x = torch.randn((4, 4, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    none = torch.zeros((count, 1, 1, 1, 1), dtype=torch.float64)
    alone = torch.cat([run(rows[:count], x[i : i + 1], none, model) for i, rows in enumerate(runs)])
    depth = max(len(rows[0].b) for rows in runs)
    memory, together = row_functions.blank_memory(x, depth), x
    for k in range(count):
        batch = per_sample([rows[k] for rows in runs], torch.from_numpy)
        together, _, _, memory = row_functions.step(
            batch, together, model(together * batch.scale, batch.t), memory, none[k], xp=torch
        )
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)  # the model rounds the time to float32


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_no_look_at_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device a tensor has no values, so a step that reads one fails."""
    scheduler = make(name)
    scheduler.set_timesteps(6, device="meta")
    assert scheduler.timesteps.device.type == "meta"
    first = 2 * scheduler.order
    scheduler.set_begin_index(first)
    x0, noise = torch.empty((2, 2, 4, 4, 4), device="meta", dtype=torch.float16)
    x = scheduler.add_noise(x0, noise, scheduler.timesteps[first : first + 1])
    options: Options = {"eta": 0.5} if "eta" in inspect.signature(scheduler.step).parameters else {}
    for t in scheduler.timesteps[first:]:
        output = scheduler.scale_model_input(x, t)
        x = scheduler.step(output, t, x, **options).prev_sample
    assert (x.shape, x.dtype, x.device) == (x0.shape, x0.dtype, x0.device)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_begin_index_or_first_timestep(name: str) -> None:
    """Without a begin index, the first timestep says where the run starts; run again, it gives the same."""
    ends = []
    for how in ("index", "timestep", "again"):
        if how != "again":
            scheduler = make(name, **({"noise_sampler_seed": 1} if "SDE" in name else {}))
            scheduler.set_timesteps(8)
        first = 4 * scheduler.order
        if how != "timestep":
            scheduler.set_begin_index(first)
        x = torch.ones((1, 4, 4, 4))
        options: Options = {}
        if "generator" in inspect.signature(scheduler.step).parameters:
            options["generator"] = torch.Generator().manual_seed(0)
        for t in scheduler.timesteps[first:]:
            x = scheduler.step(model(scheduler.scale_model_input(x, t), t), t, x, **options)[0]
        ends.append(x)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_memoryless_solvers_take_times_in_any_order() -> None:
    scheduler = make("DDIMScheduler")
    scheduler.set_timesteps(10)
    x = torch.ones((1, 4, 4, 4))
    there, *_ = (scheduler.step(0.5 * x, t, x, return_dict=False)[0] for t in scheduler.timesteps[[3, 1, 8]])
    assert torch.equal(scheduler.step(0.5 * x, scheduler.timesteps[3].item(), x)[0], there)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler", "TCDScheduler"])
def test_a_generator_for_each_sample(name: str) -> None:
    """A sample's noise depends on its own generator, not on the batch it is in."""
    ends = []
    for seeds in ((1, 2), (2,)):
        scheduler = make(name)
        scheduler.set_timesteps(5)
        x = torch.ones((len(seeds), 4, 4, 4))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * scheduler.scale_model_input(x, t), t, x, generator=generators)[0]
        ends.append(x[-1])
    assert torch.allclose(*ends, atol=1e-6)


def test_one_seed_for_each_brownian_path() -> None:
    ends = []
    for seeds in ([4, 9], [9]):
        scheduler = make("DPMSolverSDEScheduler", noise_sampler_seed=seeds)
        scheduler.set_timesteps(4)
        x = torch.ones((len(seeds), 4, 4, 4))
        for t in scheduler.timesteps:
            x = scheduler.step(0.3 * scheduler.scale_model_input(x, t), t, x)[0]
        ends.append(x[-1])
    assert torch.allclose(*ends, atol=1e-6)


def test_numpy_and_torch_step_alike() -> None:
    rows = start("UniPCMultistepScheduler")[2]
    x = torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    memory, y = Memory(), x.numpy()
    for row in rows:
        y, _, _, memory = row_functions.step(row, y, np.tanh(y), memory, xp=np)
    none = torch.zeros((len(rows), 1, 1, 1, 1), dtype=torch.float64)
    assert np.allclose(run(rows, x, none, lambda seen, t: torch.tanh(seen)).numpy(), y, rtol=1e-12)


def test_table_holds_every_row() -> None:
    rows = start("PNDMScheduler", skip_prk_steps=True)[2]
    table = row_functions.table(rows)
    assert all(column.shape == (len(rows),) and column.dtype == np.float64 for column in (*table[:-1], *table.b))
    again = [
        Row._make([*(float(v[i]) for v in table[:-1]), tuple(float(b[i]) for b in table.b)]) for i in range(len(rows))
    ]
    assert again == rows


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 300),
    spacing=st.sampled_from(["linspace", "leading", "trailing"]),
    spare=st.integers(0, 1),
    train=st.sampled_from([400, 1000]),
)
def test_times_fall_within_the_training_range(steps: int, spacing: str, spare: int, train: int) -> None:
    times = space_times(spacing, steps, train, spare=0 if spacing == "trailing" else spare)
    assert times.shape == (steps,)
    assert (np.diff(times) < 0).all()
    assert 0 <= times[-1] <= times[0] <= train - 1


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 100), spacing=st.sampled_from(["karras", "exponential", "beta", "lu"]))
def test_levels_fall_between_their_ends(steps: int, spacing: str) -> None:
    sigmas = space_sigmas(spacing, 14.6, 0.03, steps)
    assert sigmas.shape == (steps,)
    assert sigmas[0] == pytest.approx(14.6)
    assert steps == 1 or (sigmas[-1] == pytest.approx(0.03) and (np.diff(sigmas) < 0).all())


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(["linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2", "exp"]), t=st.floats(0, 999))
def test_time_of_a_level(kind: str, t: float) -> None:
    schedule = Schedule(make_betas(kind, 0.00085, 0.012, 1000))
    found = schedule.time_of(schedule.sigma_at(np.array([t])))[0]
    assert found == pytest.approx(t, abs=0.5)  # one interpolates s, the other log s
    assert schedule.time_of(schedule.sigma_at(np.array([round(t)])))[0] == pytest.approx(round(t), abs=1e-3)


def test_beta_quantile() -> None:
    from scipy.stats import beta

    p = np.linspace(0, 1, 201)
    for a in (0.6, 0.9):
        assert np.allclose(symmetric_beta_quantile(p, a), beta.ppf(p, a, a), atol=1e-10)


@settings(max_examples=50, deadline=None)
@given(
    nodes=st.lists(st.floats(0.1, 15), min_size=1, max_size=4, unique=True).filter(
        lambda s: all(abs(a - b) > 0.3 for i, a in enumerate(s) for b in s[:i])
    ),
    log=st.booleans(),
    # Levels nearer than these differ by rounding alone, and so does the integral between them.
    ends=st.tuples(st.floats(0.1, 15), st.floats(0.1, 15)).filter(lambda s: s[0] == s[1] or abs(s[0] - s[1]) > 0.01),
)
def test_integrals_of_polynomials(nodes: list[float], log: bool, ends: tuple[float, float]) -> None:
    """The weights integrate any polynomial of their degree, by comparison with Gauss and Legendre's rule."""
    place = math.log if log else float
    weights = lagrange_integrals(nodes, *ends, log=log)
    points, rule = np.polynomial.legendre.leggauss(60)
    s = (ends[1] - ends[0]) / 2 * points + (ends[0] + ends[1]) / 2
    for degree in range(len(nodes)):
        exact = float(((np.log(s) if log else s) ** degree * rule).sum() * (ends[1] - ends[0]) / 2)
        found = sum(w * place(node) ** degree for w, node in zip(weights, nodes, strict=True))
        assert found == pytest.approx(exact, rel=1e-6, abs=1e-6 * sum(map(abs, weights)))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_short_names(name: str) -> None:
    scheduler = make_scheduler(name, SD)
    assert type(scheduler).__name__ == SCHEDULERS[name].class_name
    assert all(scheduler.config[k] == v for k, v in (SD | dict(SCHEDULERS[name].options)).items())
    scheduler.set_timesteps(5)
    assert len(scheduler.rows()) == len(scheduler.timesteps)
