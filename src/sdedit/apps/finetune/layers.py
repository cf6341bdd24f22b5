"""The LoRA that learns: put into a pipeline's networks for as long as it is trained, and written to a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdedit.apps.finetune.settings import Settings
from sdedit.models import adapters
from sdedit.models.factors import Factors
from sdedit.noise import seeded

ADAPTER = "learning"
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


@contextmanager
def trainable(pipe: Any, settings: Settings) -> Iterator[dict[str, nn.Parameter]]:
    """Put a new LoRA, which changes nothing yet, into the networks; take it out at the end, and all is as it was.

    Yields:
        What learns, by name, in float32; all other weights are frozen meanwhile.

    Raises:
        ValueError: `targets` or `rank` do not fit the network, or it has adapters already.
        ImportError: The package peft is missing.
    """
    targets = {"unet": settings.targets} | ({"text_encoder": TEXT_TARGETS} if settings.text_encoder else {})
    models: dict[str, nn.Module] = {name: getattr(pipe, name) for name in targets}
    generator = seeded(settings.seed)
    parts = {
        name: _new_parts(models[name], names, settings.rank, settings.scale_alpha, generator)
        for name, names in targets.items()
    }
    before = [(p, p.requires_grad) for model in models.values() for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for name, model in models.items():
            adapters.attach(model, ADAPTER, parts[name])
        yield {name: _learning(parameter) for name, parameter in _named(models).items()}
    finally:
        for model in models.values():
            adapters.detach(model, ADAPTER)
        for parameter, learned in before:
            parameter.requires_grad_(learned)


def _named(models: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    return {
        f"{component}.{name}": parameter
        for component, model in models.items()
        for name, parameter in model.named_parameters()
        if f".{ADAPTER}." in name
    }


def _learning(parameter: nn.Parameter) -> nn.Parameter:
    # Steps of a learning rate are too small for half precision to hold.
    parameter.data = parameter.data.float()
    parameter.requires_grad = True
    return parameter


def _new_parts(
    model: nn.Module, targets: tuple[str, ...], rank: int, alpha: float, generator: torch.Generator
) -> dict[str, Factors]:
    """For each layer that `targets` names the end of: `down` normal with deviation 1 / rank, `up` zero."""
    every = {name: layer for name, layer in adapters.adaptable(model).items() if isinstance(layer, _KINDS)}
    chosen: dict[str, Any] = {}
    for target in targets:
        found = {name: layer for name, layer in every.items() if f".{name}".endswith(f".{target}")}
        if not found:
            endings = sorted({name.rpartition(".")[2] for name in every if not name.rpartition(".")[2].isdigit()})
            raise ValueError(
                f"targets: {target!r} is the end of no layer's name; expected names such as {', '.join(endings)}"
            )
        chosen |= found
    shapes = {name: layer.weight.shape for name, layer in chosen.items()}
    most, narrowest = min((min(shape[0], shape[1:].numel()), name) for name, shape in shapes.items())
    if rank > most:
        raise ValueError(f"rank={rank}; expected at most {most}, the width of {narrowest}")
    return {
        name: Factors(
            down=torch.randn((rank, *shape[1:]), generator=generator) / rank,
            up=torch.zeros((shape[0], rank, *(1 for _ in shape[2:]))),
            alpha=alpha,
        )
        for name, shape in shapes.items()
    }


_KINDS = (nn.Linear, nn.Conv2d)


def write_lora(pipe: Any, settings: Settings, output: Path) -> None:
    """Write the LoRA as it is now, through `save_lora_weights`."""
    from peft import get_peft_model_state_dict

    layers: dict[str, dict[str, Tensor] | None] = {}
    metadata = {}
    for name in ("unet", *(["text_encoder"] if settings.text_encoder else [])):
        model = getattr(pipe, name)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(model, adapter_name=ADAPTER)
        metadata[f"{name}_lora_adapter_metadata"] = model.peft_config[ADAPTER].to_dict()
    pipe.save_lora_weights(output.parent, weight_name=output.name, **layers, **metadata)
