"""Plans whose times are training steps: DDIM, DDPM, PNDM, and those of the distilled LCM and TCD models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdedit.schedulers.plan import Betas, Plan
from sdedit.schedulers.schedule import Array, Grid, descending
from sdedit.schedulers.solvers import training_steps as solvers

# None is how DPM-Solver's configs say that it is not learned: "fixed_small".
_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range", None)


class TrainingStep(Plan):
    """Base of the plans whose times are training steps."""

    keep_signal = False

    def _visit(self, steps: int, **layout: Any) -> Grid:
        if steps > len(self):
            raise ValueError(f"num_inference_steps: got {steps}; the model was trained on {len(self)} timesteps")
        own = layout.get("timesteps")
        return self._at(self._spaced(steps).round() if own is None else descending("timesteps", own, len(self)))

    def _at(self, times: Array) -> Grid:
        return Grid(times, np.append(self._schedule.sigma_at(times), 0.0))

    def levels(self, places: Sequence[int]) -> tuple[Array, Array]:
        """See `Plan.levels`; here σ/α may be infinite."""
        bar = np.array([self._schedule.bar(self._grid.times[i]) for i in places])
        return np.sqrt(bar), np.sqrt(1 - bar)


# fmt: off


class DDIM(TrainingStep):
    """DDIM: deterministic, or with as much of DDPM's noise as `eta` says (arXiv 2010.02502)."""

    memoryless = True
    solver = staticmethod(solvers.ddim)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, clip_sample: bool = True,
        set_alpha_to_one: bool = True, steps_offset: int = 0, prediction_type: str = "epsilon",
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0, timestep_spacing: str = "leading", rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._start()


class DDPM(TrainingStep):
    """DDPM's ancestral sampling, over all training steps or some (arXiv 2006.11239)."""

    memoryless = True
    complete = True
    layouts = ("timesteps",)
    solver = staticmethod(solvers.ddpm)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, variance_type: str = "fixed_small",
        clip_sample: bool = True, prediction_type: str = "epsilon", thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995, clip_sample_range: float = 1.0, sample_max_value: float = 1.0,
        timestep_spacing: str = "leading", steps_offset: int = 0, rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._start(variance_type=_VARIANCES)


class PNDM(TrainingStep):
    """PNDM: multistep, started by Runge-Kutta or, without it (PLMS), by itself (arXiv 2202.09778).

    It evaluates once more than there are steps, or nine times more with Runge-Kutta.
    """

    predictions = ("epsilon", "v_prediction")
    x0_field = None
    solver = staticmethod(solvers.pndm)

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: str = "linear", trained_betas: Betas = None, skip_prk_steps: bool = False,
        set_alpha_to_one: bool = False, prediction_type: str = "epsilon", timestep_spacing: str = "leading",
        steps_offset: int = 0,
    ) -> None:
        self._start()

    def _visit(self, steps: int, **layout: Any) -> Grid:
        times = super()._visit(steps).times
        if self.config.skip_prk_steps:
            return self._at(np.concatenate([times[:2], times[1:2], times[2:]]))
        if steps < 4:
            raise ValueError(f"num_inference_steps: got {steps}; with skip_prk_steps=False PNDM needs 4 or more")
        halves = times[1:4] + len(self) // steps // 2  # the middle of each Runge-Kutta step
        return self._at(np.append(np.stack([times[:3], halves, halves, times[1:4]], axis=1).ravel(), times[3:]))


class Distilled(TrainingStep):
    """Base of the plans for distilled models, which run on a few of the times that they were distilled on.

    `set_timesteps` takes `original_inference_steps`, of the distillation, and `strength`: use only so much of the
    times, from the clean end.
    """

    layouts = ("timesteps", "original_inference_steps", "strength")
    x0_field = None

    def __init__(
        self, num_train_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear", trained_betas: Betas = None, original_inference_steps: int = 50,
        clip_sample: bool = False, clip_sample_range: float = 1.0, set_alpha_to_one: bool = True,
        steps_offset: int = 0, prediction_type: str = "epsilon", thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995, sample_max_value: float = 1.0, timestep_spacing: str = "leading",
        timestep_scaling: float = 10.0, rescale_betas_zero_snr: bool = False,
    ) -> None:
        self._start()

    def _visit(
        self, steps: int, timesteps: Sequence[int] | None = None, original_inference_steps: int | None = None,
        strength: float = 1.0, **layout: Any,
    ) -> Grid:
        if timesteps is not None:
            return self._at(descending("timesteps", timesteps, len(self))[max(steps - int(steps * strength), 0):])
        trained = self._trained_times(original_inference_steps, strength)
        if steps > len(trained):
            original = original_inference_steps or self.config.original_inference_steps
            raise ValueError(
                f"num_inference_steps: got {steps}; original_inference_steps {original} at strength {strength} has "
                f"{len(trained)} times"
            )
        return self._at(trained[::-1][np.floor(np.linspace(0, len(trained), steps, endpoint=False)).astype(int)])

    def _trained_times(self, original: int | None, strength: float) -> Array:
        """Times of the distillation, rising."""
        steps = original or self.config.original_inference_steps
        if steps > len(self):
            raise ValueError(f"original_inference_steps: got {steps}; the model was trained on {len(self)} timesteps")
        return np.arange(1, int(steps * strength) + 1) * (len(self) // steps) - 1


class LCM(Distilled):
    """Multistep sampling of latent consistency models (arXiv 2310.04378), for 1 to 8 steps."""

    m_field = "denoised"
    solver = staticmethod(solvers.lcm)


class TCD(Distilled):
    """Sampling of trajectory consistency models (arXiv 2402.19159); clipping and thresholding do not apply."""

    m_field = "pred_noised_sample"
    bounded = False
    solver = staticmethod(solvers.tcd)

    def _trained_times(self, original: int | None, strength: float) -> Array:
        # All training steps where `original_inference_steps` is given to set_timesteps: as published.
        return super()._trained_times(None, strength) if original is None else np.arange(int(len(self) * strength))
