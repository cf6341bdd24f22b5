"""What comes before any framework: a config, a noise schedule, a time grid, and the rows made from it. NumPy only.

The public classes for PyTorch (`sdedit.schedulers.classes`) and those for JAX (`sdedit.flax.schedulers`) are plans that
step.
"""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from sdedit.config import Configurable, later
from sdedit.schedulers import rows as row_functions
from sdedit.schedulers import schedule as s
from sdedit.schedulers.options import Option, signature
from sdedit.schedulers.rows import Row

_SIGMA_FLAGS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
    "flow": "use_flow_sigmas",
}


class Plan(Configurable):
    """Base of the plans: a subclass gives its `options`, its grid (`_visit`) and its `solver`.

    Attributes:
        options: What its constructor takes, in the order of positional arguments.
        num_inference_steps: What `lay_out` was asked for, or `None`.
        order: Evaluations of the UNet for each step.
        threshold: (ratio, bound) of dynamic thresholding, if it is on.
    """

    config_name = "scheduler_config.json"
    options: ClassVar[Mapping[str, Option]] = {}
    order: ClassVar[int] = 1
    solver: ClassVar[Callable[..., Row]]
    layouts: ClassVar[tuple[str, ...]] = ()  # what `lay_out` takes beside the number
    spacings_together: ClassVar[tuple[tuple[str, ...], ...]] = ()  # which spacings of levels may be asked for together
    in_sigma_space: ClassVar[bool] = False  # the sample is x/α
    memoryless: ClassVar[bool] = False  # a row depends on its own time alone, so `step` takes any training step
    complete: ClassVar[bool] = False  # `step` works without `set_timesteps`, over all training steps
    keep_signal: ClassVar[bool] = True  # the solver divides by α, so zero SNR is kept just above zero
    bounded: ClassVar[bool] = True  # x0 can be clipped or thresholded
    times_dtype: ClassVar[type[np.number[Any]]] = np.int64
    x0_field: ClassVar[str | None] = "pred_original_sample"  # which field of the output x0 goes to
    m_field: ClassVar[str | None] = None  # and m

    num_inference_steps: int | None
    threshold: tuple[float, float] | None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        if "options" in cls.__dict__:
            _give_constructor(cls)
        super().__init_subclass__(**kwargs)

    def __init__(self, *args: Any, **options: Any) -> None:
        self._start()

    def _start(self) -> None:
        """Check the recorded config and build the noise schedule."""
        c = self.config
        self._own = frozenset(self.options) & set(c)
        for name in self._own:
            self.options[name].check(name, c[name])
        self._spacing = self._sigma_spacing()
        count = c.num_train_timesteps
        if c.trained_betas is None:
            betas = s.make_betas(c.beta_schedule, c.beta_start, c.beta_end, count)
        else:
            betas = s.given_betas(c.trained_betas)
            if len(betas) != count:
                warnings.warn(f"trained_betas: {len(betas)} values; num_train_timesteps says {count}", stacklevel=4)
        zero_snr = c.get("rescale_betas_zero_snr", False) and "rescale_betas_zero_snr" in self._own
        self._schedule = s.Schedule(
            s.zero_terminal_snr(betas) if zero_snr else betas,
            clean_end=c.set_alpha_to_one if "set_alpha_to_one" in self._own else True,
            keep_signal=zero_snr and self.keep_signal,
        )
        own = {k: c[k] for k in self._own} if self.bounded else {}
        self.threshold = (c.dynamic_thresholding_ratio, c.sample_max_value) if own.get("thresholding") else None
        self._clip = c.clip_sample_range if own.get("clip_sample") and not self.threshold else math.inf
        self._set_grid(s.Grid(np.arange(len(betas))[::-1], np.append(self._schedule.sigmas[::-1], 0.0)), None)

    def _sigma_spacing(self) -> str | None:
        """Which of "karras", "exponential", "beta", "lu" and "flow" the config asks for, if any."""
        asked = [kind for kind, flag in _SIGMA_FLAGS.items() if flag in self._own and self.config[flag]]
        if len(asked) > 1 and tuple(asked) not in self.spacings_together:
            raise ValueError(f"{', '.join(_SIGMA_FLAGS[k] for k in asked)}: at most one of these can be True")
        return asked[0] if asked else None

    # Time grids

    def lay_out(self, num_inference_steps: int | None = None, **layout: Any) -> None:
        """Choose the times of a run: how many, or, as `layouts` allows, `timesteps` or `sigmas` of one's own."""
        given = {k: v for k, v in layout.items() if v is not None}
        if refused := sorted(set(given) - set(self.layouts)):
            known = ", ".join(("num_inference_steps", "device", *self.layouts))
            raise ValueError(f"{', '.join(refused)}: {type(self).__name__}.set_timesteps takes {known}")
        own = [given[k] for k in ("timesteps", "sigmas") if k in given]
        if len(own) + (num_inference_steps is not None) != 1:
            raise ValueError("set_timesteps: expected one of num_inference_steps, and timesteps or sigmas where taken")
        if own and self._spacing:
            raise ValueError(f"timesteps, sigmas: cannot be set, {_SIGMA_FLAGS[self._spacing]} chooses them")
        steps = num_inference_steps if num_inference_steps is not None else len(own[0]) - ("sigmas" in given)
        if steps < 1:
            raise ValueError(f"num_inference_steps: got {steps}; expected 1 or more")
        self._set_grid(self._visit(int(steps), **given), int(steps))

    def _visit(self, steps: int, **layout: Any) -> s.Grid:
        """The grid of a run of `steps`."""
        raise NotImplementedError

    def _set_grid(self, grid: s.Grid, steps: int | None) -> None:
        """Make `grid` the next run's; levels are rounded to float32."""
        sigmas = grid.sigmas.astype(np.float32).astype(np.float64)
        self._grid = grid._replace(times=grid.times.astype(self.times_dtype), sigmas=sigmas)
        self.num_inference_steps = steps
        self._solved: dict[Any, list[Row]] = {}

    def _spaced(self, steps: int, train_steps: int | None = None, **layout: int) -> s.Array:
        """Times by `config.timestep_spacing`, (steps,)."""
        c = self.config
        return s.space_times(
            c.timestep_spacing, steps, train_steps or c.num_train_timesteps, offset=c.steps_offset, **layout
        )

    def _respaced(self, high: float, low: float, steps: int) -> tuple[s.Array, s.Array]:
        """(times, sigmas) by the config's spacing of levels, from `high` to `low` or between the config's own ends."""
        assert self._spacing is not None
        low, high = self.config.get("sigma_min") or low, self.config.get("sigma_max") or high
        sigmas = s.space_sigmas(self._spacing, high, low, steps)
        return self._schedule.time_of(sigmas), sigmas

    def rows(self, first: int = 0, **options: Any) -> list[Row]:
        """Rows of a run that starts at `timesteps[first]`, in floats; `rows.table` makes arrays of them.

        Args:
            first: Where the run starts.
            **options: Those of the class's solver.
        """
        key = (first, *sorted(options.items()))
        if key not in self._solved:
            grid, steps = self._grid, self.num_inference_steps or len(self._grid.times)
            mids = [] if grid.mids is None else grid.mids.tolist()
            sigmas = grid.sigmas.tolist()
            problem = s.Problem(self._schedule, self.config, steps, first, grid.times.tolist(), sigmas, mids)
            solved = [type(self).solver(problem, i, **options) for i in range(first, len(grid.times))]
            self._solved[key] = self._finished(solved)
        return self._solved[key]

    def row_of(self, time: int, **options: Any) -> Row:
        """The row of any training step, also of one that the grid has not; only if the plan is `memoryless`."""
        raise NotImplementedError

    def _finished(self, solved: Sequence[Row]) -> list[Row]:
        thresholds, keeps_m = self.threshold is not None, self.m_field is not None
        return row_functions.finish(solved, clip=self._clip, threshold=thresholds, keep_m=keeps_m)

    @property
    def times(self) -> s.Array:
        """(N,) times that the UNet is told in the whole run, falling."""
        return self._grid.times

    def overlaps(self, first: int) -> s.Array:
        """How much of each row's noise is that of the row before, for a run that starts at `times[first]`: none.

        The rest of it is fresh: z_i = overlap·z_(i-1) + √(1 - overlap²)·z, with z_(i-1) fresh itself.
        """
        return np.zeros(len(self.times) - first)

    @property
    def sigmas_shown(self) -> s.Array:
        """(N + 1,) levels as the public `sigmas` has them: σ/α."""
        return self._grid.sigmas

    def place_of(self, timestep: float, times: s.Array | None = None) -> int:
        """Place of a time in the grid's, or in `times`; of its second appearance if there are several."""
        times = self._grid.times if times is None else times
        found = np.flatnonzero(times == times.dtype.type(timestep))
        if not len(found):
            raise ValueError(f"timestep: {timestep} is not among this scheduler's timesteps {times.tolist()}")
        return int(found[min(1, len(found) - 1)])

    def levels(self, places: Sequence[int]) -> tuple[s.Array, s.Array]:
        """Weights of the image and of the noise in the sample at places of the grid, (n,) each."""
        sigmas = self._grid.sigmas[list(places)]
        alpha = np.ones_like(sigmas) if self.in_sigma_space else (1 + sigmas**2) ** -0.5
        return alpha, sigmas * alpha

    def levels_seen(self, places: Sequence[int]) -> tuple[s.Array, s.Array]:
        """The same in the sample that the UNet sees at those places, perhaps at the midpoint of a step, (n,) each."""
        if self._grid.mids is None:
            return self.levels(places)
        at = np.array(places)
        sigmas = np.where(at % 2, self._grid.mids[at], self._grid.sigmas[at])
        return np.ones_like(sigmas), sigmas

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the noise that a run from nothing starts with."""
        most = float(self._grid.sigmas.max()) if self.in_sigma_space else 1.0
        ends = not self.in_sigma_space or self.config.timestep_spacing in ("linspace", "trailing")
        return most if ends else math.sqrt(most**2 + 1)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **overrides: Any
    ) -> Self:
        """Make one from a folder or hub id, of whichever class; `overrides` are options, or arguments for the hub."""
        hub_arguments = later("sdedit.loading.hub:HUB_ARGUMENTS")
        hub = {name: overrides.pop(name) for name in hub_arguments & set(overrides)}
        here = Path(pretrained_model_name_or_path)
        here = here if here.exists() else later("sdedit.loading.hub:find_folder")(here.as_posix(), components=(), **hub)
        return cls.from_config(here / (subfolder or ""), **overrides)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `folder/scheduler_config.json`."""
        self.save_config(folder)


def _give_constructor(cls: type[Plan]) -> None:
    """Let the constructor's signature be that of the class's options."""

    @functools.wraps(Plan.__init__)
    def init(self: Plan, *args: Any, **options: Any) -> None:
        self._start()

    init.__qualname__ = f"{cls.__qualname__}.__init__"
    init.__signature__ = signature(cls.options)  # type: ignore[attr-defined]
    cls.__init__ = init  # type: ignore[method-assign]
