"""Names of schedulers: those of the classes, those of the command line, and the labels that other tools write."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sdedit.config import later

if TYPE_CHECKING:
    from sdedit.schedulers.base import Scheduler
    from sdedit.schedulers.plan import Plan

# Public class: the module of `solvers` that has its plan.
CLASS_NAMES = {
    "DDIMScheduler": "training_steps",
    "DDPMScheduler": "training_steps",
    "PNDMScheduler": "training_steps",
    "LCMScheduler": "training_steps",
    "TCDScheduler": "training_steps",
    "EulerDiscreteScheduler": "sigma_space",
    "EulerAncestralDiscreteScheduler": "sigma_space",
    "LMSDiscreteScheduler": "sigma_space",
    "HeunDiscreteScheduler": "sigma_space",
    "KDPM2DiscreteScheduler": "sigma_space",
    "KDPM2AncestralDiscreteScheduler": "sigma_space",
    "DPMSolverSDEScheduler": "sigma_space",
    "DPMSolverMultistepScheduler": "log_snr",
    "DPMSolverSinglestepScheduler": "log_snr",
    "DEISMultistepScheduler": "log_snr",
    "UniPCMultistepScheduler": "unipc",
}


class Named(NamedTuple):
    """A scheduler by its short name.

    Attributes:
        class_name: One of `CLASS_NAMES`.
        label: Sampler as AUTOMATIC1111's web UI writes it into the metadata of a PNG.
        options: Config values that make it what the name says.
    """

    class_name: str
    label: str
    options: Mapping[str, Any] = {}


# Options that any of the names sets are written out wherever the class has them, so that a name means the same
# whatever the config of the model says.
_EVEN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_KARRAS = _EVEN | {"use_karras_sigmas": True}
_2M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_lu_lambdas": False}
_SDE = _2M | {"algorithm_type": "sde-dpmsolver++"}
_2S = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_DEIS = {"algorithm_type": "deis", "solver_type": "logrho", "solver_order": 2}
_UNIPC = {"solver_type": "bh2", "solver_order": 2}

SCHEDULERS = {
    "ddim": Named("DDIMScheduler", "DDIM"),
    "ddpm": Named("DDPMScheduler", "DDPM"),
    "pndm": Named("PNDMScheduler", "PLMS", {"skip_prk_steps": True}),
    "euler": Named("EulerDiscreteScheduler", "Euler", _EVEN),
    "euler-karras": Named("EulerDiscreteScheduler", "Euler Karras", _KARRAS),
    "euler-a": Named("EulerAncestralDiscreteScheduler", "Euler a"),
    "heun": Named("HeunDiscreteScheduler", "Heun", _EVEN),
    "lms": Named("LMSDiscreteScheduler", "LMS", _EVEN),
    "lms-karras": Named("LMSDiscreteScheduler", "LMS Karras", _KARRAS),
    "dpm2": Named("KDPM2DiscreteScheduler", "DPM2", _EVEN),
    "dpm2-karras": Named("KDPM2DiscreteScheduler", "DPM2 Karras", _KARRAS),
    "dpm2-a": Named("KDPM2AncestralDiscreteScheduler", "DPM2 a", _EVEN),
    "dpm2-a-karras": Named("KDPM2AncestralDiscreteScheduler", "DPM2 a Karras", _KARRAS),
    "dpm++-2m": Named("DPMSolverMultistepScheduler", "DPM++ 2M", _2M | _EVEN),
    "dpm++-2m-karras": Named("DPMSolverMultistepScheduler", "DPM++ 2M Karras", _2M | _KARRAS),
    "dpm++-2m-sde": Named("DPMSolverMultistepScheduler", "DPM++ 2M SDE", _SDE | _EVEN),
    "dpm++-2m-sde-karras": Named("DPMSolverMultistepScheduler", "DPM++ 2M SDE Karras", _SDE | _KARRAS),
    "dpm++-2s": Named("DPMSolverSinglestepScheduler", "DPM++ 2S", _2S | _EVEN),
    "dpm++-2s-karras": Named("DPMSolverSinglestepScheduler", "DPM++ 2S Karras", _2S | _KARRAS),
    "dpm++-sde": Named("DPMSolverSDEScheduler", "DPM++ SDE", _EVEN),
    "dpm++-sde-karras": Named("DPMSolverSDEScheduler", "DPM++ SDE Karras", _KARRAS),
    "deis": Named("DEISMultistepScheduler", "DEIS", _DEIS | _EVEN),
    "unipc": Named("UniPCMultistepScheduler", "UniPC", _UNIPC | _EVEN),
    "lcm": Named("LCMScheduler", "LCM"),
    "tcd": Named("TCDScheduler", "TCD"),
}

# What may follow a name of `SCHEDULERS`, to ask for another spacing of its steps: "euler-exponential", "ddim-trailing".
SPACINGS: dict[str, Mapping[str, Any]] = {
    "karras": _KARRAS,
    "exponential": _EVEN | {"use_exponential_sigmas": True},
    "beta": _EVEN | {"use_beta_sigmas": True},
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
}


def named(name: str, argument: str = "scheduler") -> Named:
    """The scheduler of a short name: a key of `SCHEDULERS`, and after it any of `SPACINGS`.

    Args:
        argument: What the name was given as, for the message.

    Raises:
        ValueError: There is none of that name, or it has no such spacing.
    """
    base = name
    spacing: dict[str, Any] = {}
    while base not in SCHEDULERS and (cut := base.rpartition("-"))[2] in SPACINGS:
        base, spacing = cut[0], {**SPACINGS[cut[2]], **spacing}
    known = SCHEDULERS.get(base)
    if known is None or ("use_karras_sigmas" in spacing and "use_karras_sigmas" not in known.options):
        raise ValueError(
            f"{argument} {name}; expected one of {', '.join(SCHEDULERS)}; -{', -'.join(SPACINGS)} may follow"
        )
    return known._replace(options={**known.options, **spacing})


def check_class_name(class_name: str) -> str:
    """Give back a name of `CLASS_NAMES`; raise a `ValueError` that names them for any other."""
    if class_name not in CLASS_NAMES:
        raise ValueError(f"scheduler: no class {class_name!r}; there are {', '.join(CLASS_NAMES)}")
    return class_name


def resolve_plan(class_name: str) -> type[Plan]:
    """The plan of a name in `CLASS_NAMES`: the same options, grid and solver, without PyTorch."""
    module = f"sdedit.schedulers.solvers.{CLASS_NAMES[check_class_name(class_name)]}"
    found: type[Plan] = later(f"{module}:{class_name.removesuffix('Scheduler')}")
    return found


def make_scheduler(name: str, config: Mapping[str, Any] | None = None, **overrides: Any) -> Scheduler:
    """Make the scheduler of a short name, with the noise schedule of a model.

    Args:
        name: See `named`, as "dpm++-2m-karras".
        config: Config of the model's own scheduler, of whichever class.
        **overrides: Further options of the class.
    """
    found = named(name)
    made: Scheduler = later(f"sdedit.schedulers.classes:{found.class_name}").from_config(
        config or {}, **{**found.options, **overrides}
    )
    return made
