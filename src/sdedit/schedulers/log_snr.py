"""Plans that integrate in λ = log(α/σ): DPM-Solver and DPM-Solver++, DEIS, UniPC."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sdedit.schedulers.plan import Betas, Plan
from sdedit.schedulers.schedule import Array, Grid, check, descending
from sdedit.schedulers.solvers import log_snr as solvers

# Options whose names these classes share and whose values they do not: what a class takes for each value, so that the
# config of one makes another.
_DPM_FORMS = {"midpoint": "midpoint", "heun": "heun", "logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"}
_UNIPC_FORMS = {"bh1": "bh1", "bh2": "bh2", "midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}
_DEIS_FORMS = dict.fromkeys(_DPM_FORMS, "logrho")
_DEIS_ALGORITHMS = dict.fromkeys(("deis", "dpmsolver", "dpmsolver++"), "deis")
_FIXED = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")  # DDPM's, which mean nothing here
_VARIANCES = (None, "learned", "learned_range", *_FIXED)
_ORDERS = (1, 2, 3)


class LogSNR(Plan):
    """Base of the plans that integrate in λ and hold α x0 + σ ε."""

    x0_field = None

    def _take(self, name: str, meant: dict[str, str]) -> str:
        """Check an option and replace a value that is another class's."""
        value = meant[check(name, self.config[name], meant)]
        if value != self.config[name]:
            self.register_to_config(**{name: value})
        return value

    def _take_dpm(self, *algorithms: str) -> None:
        """Check the options that the DPM-Solver classes share."""
        algorithm = self._take("algorithm_type", {"deis": "dpmsolver++", **{name: name for name in algorithms}})
        self._take("solver_type", _DPM_FORMS)
        check("solver_order", self.config.solver_order, _ORDERS[:2] if algorithm == "sde-dpmsolver" else _ORDERS)
        if self.config.final_sigmas_type == "zero" and not algorithm.endswith("++"):
            raise ValueError(
                f"final_sigmas_type: 'zero' needs an algorithm_type that predicts x0 ('dpmsolver++', "
                f"'sde-dpmsolver++'); with {algorithm!r} it must be 'sigma_min'"
            )

    def _visit(self, steps: int, timesteps: Sequence[int] | None = None, **layout: Any) -> Grid:
        times = self._laid(steps) if timesteps is None else descending("timesteps", timesteps, len(self))
        sigmas, table = self._schedule.sigma_at(times), self._schedule.sigmas
        if self._spacing:
            times, sigmas = self._respaced(table[-1], table[0], steps)
            times = times.round() if self._rounds() else times  # the rest is cut off in the conversion to integers
        return Grid(times, np.append(sigmas, self._last(sigmas)))

    def _laid(self, steps: int) -> Array:
        """Times that leave the last of `steps` + 1 for the end."""
        spare = 0 if self.config.timestep_spacing == "trailing" else 1
        return self._spaced(steps, last=self._below_clipped(), spare=spare).round()

    def _last(self, sigmas: Array) -> float:
        """Level that the last step leads to."""
        return 0.0 if self.config.final_sigmas_type == "zero" else float(self._schedule.sigmas[0])

    def _rounds(self) -> bool:
        return self._spacing == "karras"

    def _below_clipped(self) -> int:
        """Number of training steps whose λ is at least `config.lambda_min_clipped`."""
        least = self.config.lambda_min_clipped if "lambda_min_clipped" in self._own else -math.inf
        return len(self) - int(np.searchsorted(-self._schedule.log_sigmas[::-1], least))


# fmt: off


class DPMSolverMultistep(LogSNR):
    """DPM-Solver++, DPM-Solver or their SDE forms, with earlier predictions as history (arXiv 2211.01095)."""

    layouts = ("timesteps",)
    solver = staticmethod(solvers.dpm_multistep)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, solver_order: int = 2,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, algorithm_type: str = "dpmsolver++", solver_type: str = "midpoint",
        lower_order_final: bool = True, euler_at_final: bool = False, use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False, use_lu_lambdas: bool = False,
        use_flow_sigmas: bool = False, flow_shift: float = 1.0, final_sigmas_type: str = "zero",
        lambda_min_clipped: float = -math.inf, variance_type: str | None = None, timestep_spacing: str = "linspace",
        steps_offset: int = 0, rescale_betas_zero_snr: bool = False, use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self._start(variance_type=_VARIANCES)
        self._take_dpm("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")

    def _rounds(self) -> bool:
        return self._spacing in ("karras", "lu") and self.config.beta_schedule != "squaredcos_cap_v2"


class DPMSolverSinglestep(LogSNR):
    """DPM-Solver++, DPM-Solver or the SDE form, in steps that span several levels (arXiv 2211.01095)."""

    layouts = ("timesteps",)
    solver = staticmethod(solvers.dpm_singlestep)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, solver_order: int = 2,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, algorithm_type: str = "dpmsolver++", solver_type: str = "midpoint",
        lower_order_final: bool = False, use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False, use_flow_sigmas: bool = False, flow_shift: float = 1.0,
        final_sigmas_type: str = "zero", lambda_min_clipped: float = -math.inf, variance_type: str | None = None,
        use_dynamic_shifting: bool = False, time_shift_type: str = "exponential",
    ) -> None:
        self._start(variance_type=_VARIANCES)
        self._take_dpm("dpmsolver", "dpmsolver++", "sde-dpmsolver++")

    def _visit(self, steps: int, timesteps: Sequence[int] | None = None, **layout: Any) -> Grid:
        c = self.config
        if steps % c.solver_order or c.final_sigmas_type == "zero":  # neither ends with a step of full order
            self.register_to_config(lower_order_final=True)
        return super()._visit(steps, timesteps, **layout)

    def _laid(self, steps: int) -> Array:
        return np.asarray(np.linspace(0, self._below_clipped() - 1, steps + 1).round()[:0:-1])


class DEISMultistep(LogSNR):
    """DEIS: exponential integrator with a polynomial in log(σ/α) through the last predictions (arXiv 2204.13902)."""

    solver = staticmethod(solvers.deis)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, solver_order: int = 2,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, algorithm_type: str = "deis", solver_type: str = "logrho",
        lower_order_final: bool = True, use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False, use_flow_sigmas: bool = False, flow_shift: float = 1.0,
        timestep_spacing: str = "linspace", steps_offset: int = 0, use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
    ) -> None:
        self._start(solver_order=_ORDERS)
        self._take("algorithm_type", _DEIS_ALGORITHMS)
        self._take("solver_type", _DEIS_FORMS)

    def _last(self, sigmas: Array) -> float:
        return float(sigmas[-1] if self._spacing else self._schedule.sigmas[0])


class UniPCMultistep(LogSNR):
    """UniPC: predictor and corrector of the same order, 1 to 3 (arXiv 2302.04867)."""

    solver = staticmethod(solvers.unipc)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, solver_order: int = 2,
        prediction_type: str = "epsilon", thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0, predict_x0: bool = True, solver_type: str = "bh2",
        lower_order_final: bool = True, disable_corrector: Sequence[int] = (), solver_p: None = None,
        use_karras_sigmas: bool = False, use_exponential_sigmas: bool = False, use_beta_sigmas: bool = False,
        use_flow_sigmas: bool = False, flow_shift: float = 1.0, timestep_spacing: str = "linspace",
        steps_offset: int = 0, final_sigmas_type: str = "zero", rescale_betas_zero_snr: bool = False,
        use_dynamic_shifting: bool = False, time_shift_type: str = "exponential", sigma_min: float | None = None,
        sigma_max: float | None = None, shift_terminal: float | None = None,
    ) -> None:
        self._start(solver_order=_ORDERS, solver_p=(None,))
        self._take("solver_type", _UNIPC_FORMS)
        self.threshold = self.threshold if predict_x0 else None

    def _last(self, sigmas: Array) -> float:
        return super()._last(sigmas) if self.config.final_sigmas_type == "zero" or not self._spacing else sigmas[-1]
