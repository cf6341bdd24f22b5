"""Schedulers for JAX: a plan whose rows are arrays, and a state that `step` takes and gives back.

`FlaxDDIMScheduler` and its kin have the names and methods of diffusers 0.34; every plan of `sdedit.schedulers` has one.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from sdedit.schedulers import rows as row_functions
from sdedit.schedulers.names import CLASS_NAMES, named, resolve_plan
from sdedit.schedulers.plan import Plan
from sdedit.schedulers.rows import Row

Array = jax.Array

# Tables of rows have a multiple of so many, so that another number of steps seldom needs another compilation.
_BLOCK = 64


class Table(NamedTuple):
    """The rows of a run as arrays, filled up to a length that depends on the whole schedule, not on where it starts.

    Attributes:
        rows: Each coefficient (N,), float32.
        overlap: (N,), how much of a row's noise is that of the row before: see `Plan.overlaps`.
        count: Rows that are there.
        signal, noise: Weights of the image and of the noise in the sample at the start.
    """

    rows: Row
    overlap: Any
    count: Any
    signal: Any
    noise: Any

    @property
    def depth(self) -> int:
        """How many predictions the solver looks at."""
        return len(self.rows.b)


def make_table(plan: Plan, first: int, **options: Any) -> Table:
    """The rows of a run that starts at `plan.times[first]`; past the last one there are none, and no noise.

    Args:
        **options: Those of the class's solver.
    """
    kind = plan.config.get("variance_type")
    if str(kind).startswith("learned"):
        raise ValueError(f"variance_type={kind!r} needs a UNet that says its variance; Stable Diffusion's does not")
    total = len(plan.times)
    solved = plan.rows(min(first, total - 1), **options)
    count = total - first
    columns = row_functions.table(solved)
    length = -(-total // _BLOCK) * _BLOCK

    def padded(column: Any) -> Any:
        return np.pad(np.asarray(column, dtype=np.float32)[:count], (0, length - count))

    rows = jax.tree.map(padded, columns)
    overlap = padded(plan.overlaps(min(first, total - 1)))
    signal, noise = (v[0] for v in plan.levels_seen([first])) if count else (1.0, 0.0)
    return Table(rows, overlap, np.int32(count), np.float32(signal), np.float32(noise))


def row_at(table: Table, i: Any) -> Row:
    """The i-th row, which may be traced."""
    return jax.tree.map(lambda column: column[i], table.rows)  # type: ignore[no-any-return]


def draw(table: Table, i: Any, key: Array, shape: tuple[int, ...]) -> Array:
    """Noise for the i-th row, of `shape`; zeros where it draws none."""

    def normal(number: Any) -> Array:
        return jax.random.normal(jax.random.fold_in(key, number), shape)

    def drawn() -> Array:
        shared = table.overlap[i]
        return shared * normal(i) + jnp.sqrt(1 - shared**2) * normal(i + 1)

    return jax.lax.cond(table.rows.draw[i] > 0, drawn, lambda: jnp.zeros(shape))  # type: ignore[no-any-return]


def laid_out(plan: Plan, steps: int) -> Plan:
    """A copy of a plan, which stays as it is, with its times chosen."""
    made = type(plan).from_config(plan.config)
    made.lay_out(steps)
    return made


@struct.dataclass
class FlaxSchedulerState:
    """Where a run is.

    Attributes:
        timesteps: (N,) times of the whole schedule, falling.
        levels: (2, N), weights of the image and of the noise in the sample at each of them.
        init_noise_sigma: Standard deviation of the noise that a run from nothing starts with.
        num_inference_steps: What `set_timesteps` was asked for.
        first: Where in `timesteps` the run starts.
        table: Its rows.
        index: Rows taken.
        memory: What the solver remembers.
    """

    timesteps: Any
    levels: Any
    init_noise_sigma: Any
    num_inference_steps: int | None = struct.field(pytree_node=False, default=None)
    first: int = struct.field(pytree_node=False, default=0)
    table: Any = None
    index: Any = np.int32(0)
    memory: Any = None


def _state(plan: Plan, **run: Any) -> FlaxSchedulerState:
    levels = jnp.asarray(np.stack(plan.levels(range(len(plan.times)))), dtype=jnp.float32)
    return FlaxSchedulerState(jnp.asarray(plan.times), levels, jnp.float32(plan.init_noise_sigma), **run)


class FlaxSchedulerOutput(NamedTuple):
    """What `step` returns: the sample at the next, less noisy time, and the state to give to the next step."""

    prev_sample: Array
    state: FlaxSchedulerState

    def to_tuple(self) -> tuple[Array, FlaxSchedulerState]:
        """A plain tuple."""
        return self.prev_sample, self.state


class FlaxScheduler(Plan):
    """The part of a plan that works on arrays of JAX. It has no state of its own: methods take it and give it back.

    A run is `state = set_timesteps(create_state(), n, shape)`, then for each of `state.timesteps`:
    `scale_model_input`, the UNet, and `step`; all of this may be under `jax.jit`. To start late, say so:
    `set_timesteps(…, first=i)`.
    """

    has_state = True

    def create_state(self, common: None = None) -> FlaxSchedulerState:
        """The state before `set_timesteps`."""
        return _state(self)

    def set_timesteps(
        self, state: FlaxSchedulerState, num_inference_steps: int, shape: tuple[int, ...] = (), first: int = 0
    ) -> FlaxSchedulerState:
        """Choose the times of a run.

        Args:
            state: Not changed.
            num_inference_steps: How many steps.
            shape: Of the sample, (B, C, H, W); solvers with a memory need it.
            first: Where in `timesteps` the run starts.
        """
        plan = laid_out(self, num_inference_steps)
        if not 0 <= first < len(plan.times):
            raise ValueError(f"first: got {first}; expected 0 to {len(plan.times) - 1}")
        table = make_table(plan, first)
        return _state(
            plan,
            num_inference_steps=num_inference_steps,
            first=first,
            table=jax.tree.map(jnp.asarray, table),
            memory=row_functions.blank_memory(jnp.zeros(shape), table.depth),
        )

    def scale_model_input(self, state: FlaxSchedulerState, sample: Array, timestep: Any = None) -> Array:
        """What the UNet is to see of the sample: x itself, also where the sample is x/α; (B, C, H, W) both."""
        return sample * row_at(self._table(state), state.index).scale if self.in_sigma_space else sample

    def step(
        self,
        state: FlaxSchedulerState,
        model_output: Array,
        timestep: Any,
        sample: Array,
        key: Array | None = None,
        return_dict: bool = True,
    ) -> FlaxSchedulerOutput | tuple[Array, FlaxSchedulerState]:
        """One step: from `sample` at `timestep` to the next time.

        Args:
            state: What the step before gave.
            model_output: (B, C, H, W), the UNet's prediction for `scale_model_input(sample)` at `timestep`.
            timestep: The next of `state.timesteps`.
            sample: (B, C, H, W), the noisy latents; over α in the classes of k-diffusion's solvers.
            key: For the noise of solvers that draw some; one for the whole run.
            return_dict: `False` for a plain tuple.

        Raises:
            ValueError: `set_timesteps` was not called, or (where values are known) `timestep` is not the next one.
        """
        table = self._table(state)
        self._expect_next(state, timestep)
        noise = draw(table, state.index, jax.random.key(0) if key is None else key, sample.shape)
        memory = state.memory
        if memory.anchor.shape != sample.shape:  # no shape was given to set_timesteps
            memory = row_functions.blank_memory(jnp.zeros(sample.shape), table.depth)
        x, _, _, memory = row_functions.step(
            row_at(table, state.index),
            sample.astype(jnp.float32),
            model_output.astype(jnp.float32),
            memory,
            noise,
            threshold=self.threshold,
            xp=jnp,
        )
        state = state.replace(index=state.index + 1, memory=memory)  # type: ignore[attr-defined]
        out = FlaxSchedulerOutput(x.astype(sample.dtype), state)
        return out if return_dict else out.to_tuple()

    def _table(self, state: FlaxSchedulerState) -> Table:
        if state.table is None:
            raise ValueError("state: call set_timesteps(state, num_inference_steps, shape) first")
        return state.table  # type: ignore[no-any-return]

    def _expect_next(self, state: FlaxSchedulerState, timestep: Any) -> None:
        if isinstance(timestep, jax.core.Tracer) or isinstance(state.index, jax.core.Tracer):
            return
        expected = float(state.timesteps[state.first + int(state.index)])
        if float(jnp.asarray(timestep).reshape(-1)[0]) != expected:
            raise ValueError(
                f"timestep={timestep}; expected {expected:g}, the next of this run: to start late, "
                "set_timesteps(…, first=i), and take the timesteps in order"
            )

    def add_noise(self, state: FlaxSchedulerState, original_samples: Array, noise: Array, timesteps: Any) -> Array:
        """α x0 + σ ε, or x0 + (σ/α) ε in schedulers that hold x/α, at the noise level of `timesteps`.

        Those are (B,) or (1,), out of `state.timesteps`; before `set_timesteps` that is all training steps.
        """
        wanted = jnp.asarray(timesteps).astype(jnp.float32).reshape(-1)
        place = jnp.abs(state.timesteps[:, None].astype(jnp.float32) - wanted).argmin(axis=0)
        shape = (2, -1, *(1 for _ in original_samples.shape[1:]))
        signal, level = state.levels[:, place].reshape(shape)
        return signal * original_samples + level * noise

    def get_velocity(self, state: FlaxSchedulerState, sample: Array, noise: Array, timesteps: Any) -> Array:
        """v = α ε - σ x0 (arXiv 2202.00512) at training steps `timesteps`, (B,) or (1,); (B, C, H, W) all others."""
        bar = jnp.asarray(self._schedule.alphas_cumprod, dtype=jnp.float32)
        kept = bar[jnp.asarray(timesteps).reshape(-1)].reshape(-1, *(1 for _ in sample.shape[1:]))
        return jnp.sqrt(kept) * noise - jnp.sqrt(1 - kept) * sample

    @property
    def compatibles(self) -> list[type[FlaxScheduler]]:
        """The classes that this scheduler's config can make."""
        return [flax_class(name) for name in CLASS_NAMES]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **overrides: Any
    ) -> tuple[Self, FlaxSchedulerState]:
        """A scheduler and its state, from a folder or hub id: see `Plan.from_pretrained`."""
        made = super().from_pretrained(pretrained_model_name_or_path, subfolder, **overrides)
        return made, made.create_state()


@functools.cache
def flax_class(class_name: str) -> type[FlaxScheduler]:
    """The JAX class of a scheduler that PyTorch calls `class_name`, such as "DDIMScheduler"."""
    plan = resolve_plan(class_name)
    body = {"__doc__": plan.__doc__, "__module__": __name__, "__qualname__": f"Flax{class_name}"}
    return type(f"Flax{class_name}", (FlaxScheduler, plan), body)


def make_scheduler(name: str, config: Mapping[str, Any] | None = None, **overrides: Any) -> FlaxScheduler:
    """Make the scheduler of a short name, such as "dpm++-2m-karras": see `sdedit.schedulers.make_scheduler`."""
    found = named(name)
    return flax_class(found.class_name).from_config(config or {}, **{**found.options, **overrides})


def __getattr__(name: str) -> Any:
    if name.startswith("Flax") and name.removeprefix("Flax") in CLASS_NAMES:
        return flax_class(name.removeprefix("Flax"))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *(f"Flax{name}" for name in CLASS_NAMES)]
