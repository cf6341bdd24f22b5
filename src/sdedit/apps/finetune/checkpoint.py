"""Where a training run stands, as one safetensors file, so that it can go on later as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sdedit.files import write_atomically

NAME = "checkpoint.safetensors"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each weight


@dataclass
class Progress:
    """How far a run has come: updates made, the loss of each, and seconds spent."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0


def save(
    path: Path,
    learning: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    asked: Mapping[str, Any],
) -> None:
    """Write weights, the optimizer's moments and the progress; a kill at any moment leaves the old file whole.

    Args:
        asked: What the run was asked for, as JSON keeps it: another run does not go on from this.
    """
    state = {f"lora.{name}": parameter.detach().cpu() for name, parameter in learning.items()}
    for name, parameter in learning.items():
        if held := optimizer.state.get(parameter):
            state |= {f"{moment}.{name}": held[moment].cpu() for moment in _MOMENTS}
    state["losses"] = torch.tensor(progress.losses, dtype=torch.float64)
    metadata = {"asked": json.dumps(asked), "step": str(progress.step), "seconds": str(progress.seconds)}
    with write_atomically(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, temporary, metadata=metadata)


def read_asked(path: Path) -> dict[str, Any]:
    """What the run of a checkpoint was asked for.

    Raises:
        ValueError: The file is damaged or no checkpoint.
    """
    return json.loads(_open(path)[1]["asked"])  # type: ignore[no-any-return]


def load(path: Path, learning: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
    """Put weights and moments back where they were.

    Raises:
        ValueError: The file is damaged, or of another network.
    """
    state, metadata = _open(path)
    step = int(metadata["step"])
    expected = {f"lora.{name}": p.shape for name, p in learning.items()}
    if step:
        expected |= {f"{moment}.{name}": p.shape for name, p in learning.items() for moment in _MOMENTS}
    found = {name: tensor.shape for name, tensor in state.items() if name != "losses"}
    if found != expected:
        differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"{path} is of another network: {len(differ)} tensors differ, such as {differ[0]}")
    for name, parameter in learning.items():
        parameter.data.copy_(state[f"lora.{name}"])
        if step:
            moments = {moment: state[f"{moment}.{name}"].to(parameter.device) for moment in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return Progress(step, state["losses"].tolist(), float(metadata["seconds"]))


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except Exception as error:  # safetensors has an error class of its own, and the file system more
        raise ValueError(f"{path} cannot be read as a checkpoint ({error}); start anew without it") from error
    if missing := {"asked", "step", "seconds"} - metadata.keys():
        raise ValueError(f"{path} is no checkpoint of a training run: it does not say {', '.join(sorted(missing))}")
    return state, metadata
