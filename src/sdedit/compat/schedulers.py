"""The schedulers that a Stable Diffusion pipeline of diffusers takes, as it enumerates them."""

from __future__ import annotations

from enum import Enum

__all__ = ["KarrasDiffusionSchedulers"]


class KarrasDiffusionSchedulers(Enum):
    """Names of schedulers that can stand for each other; LCM and TCD, for distilled models, are none of them."""

    DDIMScheduler = 1
    DDPMScheduler = 2
    PNDMScheduler = 3
    LMSDiscreteScheduler = 4
    EulerDiscreteScheduler = 5
    HeunDiscreteScheduler = 6
    EulerAncestralDiscreteScheduler = 7
    DPMSolverMultistepScheduler = 8
    DPMSolverSinglestepScheduler = 9
    KDPM2DiscreteScheduler = 10
    KDPM2AncestralDiscreteScheduler = 11
    DEISMultistepScheduler = 12
    UniPCMultistepScheduler = 13
    DPMSolverSDEScheduler = 14
