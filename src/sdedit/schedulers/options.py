"""The options of the schedulers: what each is called, its default, and the values that it may have.

The names and defaults are those of a published `scheduler_config.json`. A class says which it has, in the order of its
positional arguments, and what it has otherwise (`take`).
"""

from __future__ import annotations

import inspect
import math
import numbers
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from sdedit.schedulers.schedule import BETA_SCHEDULES, SPACINGS, check

_MOST = sys.float_info.max


class Option(NamedTuple):
    """An option of a scheduler's constructor.

    Attributes:
        kind: `bool`, `int`, `float` or `str`; `Any` where the plan checks the value itself.
        default: Where it is `None`, `None` may be given too.
        allowed: The values that there are.
        low, high: Bounds of a number, which are allowed themselves.
    """

    kind: Any
    default: Any
    allowed: Collection[Any] | None = None
    low: float = -_MOST
    high: float = _MOST

    def check(self, name: str, value: Any) -> None:
        """Raise a `ValueError` that names the option, the value and what it may be."""
        if self.allowed is not None:
            check(name, value, self.allowed)
        elif self.kind is Any or (value is None and self.default is None):
            pass
        elif self.kind is bool:
            check(name, value, (False, True))
        elif self.kind in (int, float):
            self._check_number(name, value)

    def _check_number(self, name: str, value: Any) -> None:
        kind: type = numbers.Integral if self.kind is int else numbers.Real
        if isinstance(value, kind) and not isinstance(value, bool) and self.low <= value <= self.high:  # type: ignore[operator]
            return
        what = "a whole number" if self.kind is int else "a finite number" if self.low > -math.inf else "a number"
        bounds = f" from {self.low:g}" * (self.low > -_MOST) + f" to {self.high:g}" * (self.high < _MOST)
        raise ValueError(f"{name}: got {value!r}; expected {what}{bounds}")


# A hundred times the steps that any published model was trained with; a table of them is made at once.
_MOST_STEPS = 100_000
_FORMS_OF_VARIANCE = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")

OPTIONS = {
    # The noise schedule: T training steps, and β at both ends of it, or each β.
    "num_train_timesteps": Option(int, 1000, low=1, high=_MOST_STEPS),
    "beta_start": Option(float, 0.0001, low=0),
    "beta_end": Option(float, 0.02, low=0),
    "beta_schedule": Option(str, "linear", BETA_SCHEDULES),
    "trained_betas": Option(Any, None),
    "rescale_betas_zero_snr": Option(bool, False),
    "set_alpha_to_one": Option(bool, True),
    # What the UNet predicts, and what is done to the x0 that follows from it.
    "prediction_type": Option(str, "epsilon", ("epsilon", "sample", "v_prediction")),
    "clip_sample": Option(bool, False),
    "clip_sample_range": Option(float, 1.0),
    "thresholding": Option(bool, False),
    "dynamic_thresholding_ratio": Option(float, 0.995, low=0, high=1),
    "sample_max_value": Option(float, 1.0),
    # The times of a run.
    "timestep_spacing": Option(str, "linspace", SPACINGS),
    "steps_offset": Option(int, 0),
    "timestep_type": Option(str, "discrete", ("discrete", "continuous")),
    "original_inference_steps": Option(int, 50, low=1),
    "timestep_scaling": Option(float, 10.0),
    # Its levels σ/α.
    "interpolation_type": Option(str, "linear", ("linear", "log_linear")),
    "use_karras_sigmas": Option(bool, False),
    "use_exponential_sigmas": Option(bool, False),
    "use_beta_sigmas": Option(bool, False),
    "use_lu_lambdas": Option(bool, False),
    "sigma_min": Option(float, None, low=0),
    "sigma_max": Option(float, None, low=0),
    "final_sigmas_type": Option(str, "zero", ("zero", "sigma_min")),
    "lambda_min_clipped": Option(float, -math.inf, low=-math.inf),
    # The solver.
    "variance_type": Option(str, None, (*_FORMS_OF_VARIANCE, None)),  # None is how DPM-Solver says "not learned"
    "skip_prk_steps": Option(bool, False),
    "solver_order": Option(int, 2, (1, 2, 3)),
    "algorithm_type": Option(str, "dpmsolver++"),
    "solver_type": Option(str, "midpoint"),
    "lower_order_final": Option(bool, True),
    "euler_at_final": Option(bool, False),
    "predict_x0": Option(bool, True),
    "disable_corrector": Option(Sequence[int], ()),
    "solver_p": Option(Any, None, (None,)),
    "noise_sampler_seed": Option(int | Sequence[int] | None, None),
    # Of flow matching, with x = (1 - σ) x0 + σ ε; no Stable Diffusion of this kind shifts levels by the picture's size,
    # so the last three are accepted where they turn that off.
    "use_flow_sigmas": Option(bool, False),
    "flow_shift": Option(float, 1.0, low=0),
    "use_dynamic_shifting": Option(bool, False, (False,)),
    "time_shift_type": Option(str, "exponential", ("exponential",)),
    "shift_terminal": Option(float, None, (None,)),
}

# Groups that several classes have side by side.
NOISE = "num_train_timesteps beta_start beta_end beta_schedule trained_betas"
THRESHOLD = "thresholding dynamic_thresholding_ratio sample_max_value"
LEVELS = "use_karras_sigmas use_exponential_sigmas use_beta_sigmas"
FLOW = "use_flow_sigmas flow_shift"
SHIFT = "use_dynamic_shifting time_shift_type"

LATENT_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012}  # the ends of β that Stable Diffusion was trained with
EPSILON_OR_V = OPTIONS["prediction_type"]._replace(allowed=("epsilon", "v_prediction"))
OR_FLOW = OPTIONS["prediction_type"]._replace(allowed=("epsilon", "sample", "v_prediction", "flow_prediction"))


def take(*names: str, **otherwise: Any) -> dict[str, Option]:
    """The options of a class, in the order of its positional arguments.

    Args:
        *names: Names of `OPTIONS`, any number in a string.
        **otherwise: What the class has in place of an option's default, or of the whole `Option`.
    """
    taken = {name: OPTIONS[name] for name in " ".join(names).split()}
    for name, value in otherwise.items():
        taken[name] = value if isinstance(value, Option) else taken[name]._replace(default=value)
    return taken


def signature(options: Mapping[str, Option]) -> inspect.Signature:
    """The signature of a constructor that takes `options`."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = [inspect.Parameter(n, kind, default=o.default, annotation=o.kind) for n, o in options.items()]
    return inspect.Signature([inspect.Parameter("self", kind), *given], return_annotation=None)
