"""LoRA and its kin for a pipeline: load, weigh, fuse, save, unload. `Pipeline` inherits these methods."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sdedit.adapters.files import DEFAULT_NAME, Source, read_adapter, write_adapter
from sdedit.adapters.formats import LoadReport, Parsed, parse
from sdedit.adapters.kinds import factors
from sdedit.inputs import checks
from sdedit.loading.folders import unwrapped
from sdedit.loading.weights import read_weights
from sdedit.models import adapters
from sdedit.models.factors import Factors
from sdedit.models.offload import refuse
from sdedit.models.options.attention import has_fused_projections

_COMPONENTS = ("unet", "text_encoder")

Weight = float | Mapping[str, Any]


class LoraLoader:
    """The methods of a pipeline that deal with adapters. Adapters live in the UNet and the text encoder."""

    unet: Any
    text_encoder: Any
    tokenizer: Any
    _tokens_of: Mapping[str, list[str]] = MappingProxyType({})

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Source,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        strict: bool = True,
        **hub: Any,
    ) -> LoadReport:
        """Load a LoRA, LoCon, LoHa, LoKr or DoRA in any layout, and make it the active adapter.

        Args:
            pretrained_model_name_or_path_or_dict: A file, a folder, a hub id, or tensors by name.
            adapter_name: What to call it; `default_0`, `default_1`, … if not given.
            weight_name, subfolder: Which file of the folder.
            strict: Refuse a file with names that are not understood; `False` loads the rest.
            **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`.

        Returns:
            What matched and what did not; print it.

        Raises:
            ValueError: It does not fit, or is for another kind of model; the pipeline is as it was.
            FileNotFoundError: There is no such file.
            ImportError: The package peft is missing.
        """
        adapters.require_peft()
        if has_fused_projections(self.unet):
            raise ValueError("load_lora_weights: adapters need single projections; call unfuse_qkv_projections() first")
        self._new_name(adapter_name)  # before a file is read
        parsed = self._parse(pretrained_model_name_or_path_or_dict, weight_name, subfolder, strict, hub)
        if parsed.report.problem:
            raise ValueError(f"{parsed.report.source} cannot be loaded: {parsed.report.problem}")
        models = self._lora_models()
        made = {name: self._factors(models[name], parsed, name) for name in parsed.changes}
        with adapters.changing(self.unet):
            adapter_name = self._new_name(adapter_name)
            with adapters.all_or_nothing(adapter_name, *models.values()):
                for name, parts in made.items():
                    adapters.attach(models[name], adapter_name, parts)
                for name in models.keys() - made.keys():
                    adapters.activate(models[name], {})  # the newest alone is active, wherever it is
                kept_out = self._load_tokens(adapter_name, parsed.tokens)
        return replace(parsed.report, left_out=(*parsed.report.left_out, *kept_out))

    def is_lora_supported(
        self, path: Source, *, weight_name: str | None = None, subfolder: str | None = None, **hub: Any
    ) -> LoadReport:
        """Would `load_lora_weights` load this? The report says, is true or false as such, and nothing is changed.

        Raises:
            FileNotFoundError: There is no such file.
        """
        try:
            return self._parse(path, weight_name, subfolder, True, hub).report
        except ValueError as error:
            return LoadReport(source=str(path) if isinstance(path, (str, os.PathLike)) else "", problem=str(error))

    def _new_name(self, name: str | None) -> str:
        """A name for a new adapter: the one that is asked for, if it can be had, or the next free one."""
        have = {name for model in self._lora_models().values() for name in adapters.names(model)}
        if name is None:
            return next(f"default_{i}" for i in range(len(have) + 1) if f"default_{i}" not in have)
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"adapter_name={name!r}; expected a name without dots")
        if hasattr(nn.ModuleDict, name):
            raise ValueError(f"adapter_name={name!r} is a word that torch's modules use; choose another")
        if name in have:
            raise ValueError(f"adapter_name: {name!r} is loaded already; choose another, or delete_adapters first")
        return name

    def _lora_models(self) -> dict[str, nn.Module]:
        models = {name: unwrapped(part) for name in _COMPONENTS if (part := getattr(self, name)) is not None}
        refuse("adapters", *models.values())
        return models

    def _parse(
        self,
        source: Source,
        weight_name: str | None,
        subfolder: str | None,
        strict: bool,
        hub: dict[str, Any],
    ) -> Parsed:
        file = read_adapter(source, read_weights, weight_name, subfolder, **hub)
        shapes = {
            name: {part: weight.shape for part, weight in adapters.weights(model).items()}
            for name, model in self._lora_models().items()
        }
        return parse(
            file.state,
            shapes,
            source=file.source,
            text_width=self.unet.config.cross_attention_dim,
            metadata=file.metadata,
            peft_config=file.peft_config,
            strict=strict,
        )

    def _factors(self, model: nn.Module, parsed: Parsed, component: str) -> dict[str, Factors]:
        layers = adapters.adaptable(model)
        made = {}
        for name, change in parsed.changes[component].items():
            layer = layers[name]
            weight: Any = layer.weight
            made[name] = factors(change.roles, weight.shape, change.alpha, weight, change.rank)
            broken = not all(torch.isfinite(t).all() for t in change.roles.values())
            if broken or (made[name].bias is not None and layer.bias is None):
                why = "holds NaN or infinity" if broken else "has a bias for a layer that has none"
                raise ValueError(f"{parsed.report.source} cannot be loaded: {component} {name} {why}")
        return made

    def _load_tokens(self, adapter: str, tokens: Mapping[str, Tensor]) -> list[str]:
        """Take in the words that came with an adapter; what could not be taken, with the reason."""
        load = getattr(self, "load_textual_inversion", None)
        if load is None or self.text_encoder is None or self.tokenizer is None:
            return [f"{token}: this pipeline takes no words for the prompt" for token in tokens]
        known = self.tokenizer.get_vocab()
        new = {token: vector.detach().clone() for token, vector in tokens.items() if token not in known}
        if new:
            load([{token: vector} for token, vector in new.items()])
            self._tokens_of = {**self._tokens_of, adapter: list(new)}
        return [f"{token}: the tokenizer has this word already" for token in tokens if token not in new]

    def _unload_tokens(self, names: Sequence[str]) -> None:
        if tokens := [token for name in names for token in self._tokens_of.get(name, ())]:
            self.unload_textual_inversion(tokens)  # type: ignore[attr-defined]  # it loaded them
        self._tokens_of = {name: held for name, held in self._tokens_of.items() if name not in names}

    @staticmethod
    def save_lora_weights(
        save_directory: str | os.PathLike[str],
        unet_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write LoRA layers to `save_directory/pytorch_lora_weights.safetensors`, which diffusers loads too.

        Args:
            save_directory: A folder; it is made if it is missing.
            unet_lora_layers, text_encoder_lora_layers: As `peft.get_peft_model_state_dict(pipe.unet)` gives them.
            is_main_process: `False` writes nothing, in all but one process of a training run.
            weight_name: Another name of the file.
            save_function: Must be `None`.
            safe_serialization: Must be `True`: pickles are read, never written.
            unet_lora_adapter_metadata, text_encoder_lora_adapter_metadata: `LoraConfig.to_dict()`, which keeps alpha.
        """
        if not safe_serialization or save_function is not None:
            raise ValueError("safe_serialization=False and save_function would write pickles; expected safetensors")
        name = weight_name or DEFAULT_NAME
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"weight_name={name!r}; expected a file name that ends in .safetensors")
        if is_main_process:
            write_adapter(
                Path(save_directory) / name,
                {"unet": unet_lora_layers, "text_encoder": text_encoder_lora_layers},
                {"unet": unet_lora_adapter_metadata, "text_encoder": text_encoder_lora_adapter_metadata},
            )

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: Weight | Sequence[Weight | None] | None = None
    ) -> None:
        """Choose the adapters that work, and how much each.

        Args:
            adapter_names: One, or several; all others rest.
            adapter_weights: One for all, or a list. A weight is a number, or one for each part:
                `{"unet": {"down": 0.5, "mid": 1, "up": {"block_0": 0.3, "block_1": [0, 0.2, 1]}}, "text_encoder": 0}`
                (without `"unet"` around it, the rest is meant for the UNet). What is not named has the weight 1.

        Raises:
            ValueError: A name is not loaded, or is fused, or a weight is not as described.
        """
        chosen = self._known_adapters(adapter_names)
        given: list[Any] = [adapter_weights] * len(chosen)
        if isinstance(adapter_weights, (list, tuple)):
            given = list(adapter_weights)
        if len(given) != len(chosen):
            raise ValueError(f"adapter_weights: {len(given)} for {len(chosen)} adapters; expected one, or as many")
        self._refuse_fused(chosen)
        plans = {}
        for component, model in self._lora_models().items():
            plans[component] = {
                name: _weight_by_module(weight, component, model) for name, weight in zip(chosen, given, strict=True)
            }
        for component, model in self._lora_models().items():
            adapters.activate(model, plans[component])

    def get_active_adapters(self) -> list[str]:
        """Names of the adapters that work."""
        return list(dict.fromkeys(name for model in self._lora_models().values() for name in adapters.active(model)))

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters, by component."""
        listed = {name: adapters.names(model) for name, model in self._lora_models().items()}
        return {name: held for name, held in listed.items() if held}

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Take adapters away. Fused ones are refused: `unfuse_lora` first."""
        chosen = self._known_adapters(adapter_names)
        self._refuse_fused(chosen)
        for model in self._lora_models().values():
            for name in chosen:
                adapters.detach(model, name)
        self._unload_tokens(chosen)

    def enable_lora(self) -> None:
        """Let the active adapters work again after `disable_lora`."""
        for model in self._lora_models().values():
            adapters.enable(model, True)

    def disable_lora(self) -> None:
        """Let all adapters rest, whatever their weights; fused ones stay in the weights."""
        for model in self._lora_models().values():
            adapters.enable(model, False)

    def fuse_lora(
        self,
        components: Sequence[str] = _COMPONENTS,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: str | Sequence[str] | None = None,
    ) -> None:
        """Add adapters to the weights of the networks, with their weights of `set_adapters`: as fast as none at all.

        A copy of the weights that change is kept for `unfuse_lora`. `unload_lora_weights` after this drops that copy
        and leaves the adapters in the weights for good.

        Args:
            components: Where.
            lora_scale: Times each adapter's weight.
            safe_fusing: Refuse, with a `ValueError`, weights that become NaN or infinite.
            adapter_names: Which; the active ones if not given.
        """
        lora_scale = checks.number("lora_scale", lora_scale)
        models = self._lora_models()
        chosen = self.get_active_adapters() if adapter_names is None else self._known_adapters(adapter_names)
        if wrong := sorted({components} if isinstance(components, str) else set(components) - set(_COMPONENTS)):
            raise ValueError(f"components has {wrong}; expected a list of {', '.join(_COMPONENTS)}")
        if not chosen:
            raise ValueError("fuse_lora: no adapter is active; load one, or name some with adapter_names")
        for name in components:
            if name in models:
                adapters.fuse(models[name], chosen, lora_scale, safe_fusing)

    def unfuse_lora(self, components: Sequence[str] = _COMPONENTS) -> None:
        """Give back the weights as they were before `fuse_lora`, bit for bit; the adapters work beside them again."""
        for name, model in self._lora_models().items():
            if name in components:
                adapters.unfuse(model)

    def unload_lora_weights(self) -> None:
        """Take all adapters away, and the words that came with them; what is fused stays in the weights."""
        for model in self._lora_models().values():
            adapters.detach_all(model)
        self._unload_tokens(list(self._tokens_of))

    def _known_adapters(self, names: str | Sequence[str]) -> list[str]:
        chosen = [names] if isinstance(names, str) else list(names)
        have = list(dict.fromkeys(name for held in self.get_list_adapters().values() for name in held))
        if unknown := [name for name in chosen if name not in have]:
            raise ValueError(f"adapter_names: {unknown} not loaded; loaded are {have or 'none'}")
        return chosen

    def _refuse_fused(self, names: Sequence[str]) -> None:
        fused = {name for model in self._lora_models().values() for name in adapters.fused(model)}
        if held := sorted(fused & set(names)):
            raise ValueError(f"adapter_names: {held} fused into the weights; unfuse_lora first")


def _weight_by_module(weight: Weight | None, component: str, model: nn.Module) -> Callable[[str], float]:
    """A function from module names to weights, checked before anything is set."""
    weight = 1.0 if weight is None else weight
    if isinstance(weight, Mapping):
        if set(weight) & {"down", "mid", "up"}:
            weight = {"unet": weight}
        if wrong := sorted(set(weight) - set(_COMPONENTS)):
            raise ValueError(f"adapter_weights has {wrong}; expected unet, text_encoder, or down, mid, up")
        weight = weight.get(component, 1.0)
    if not isinstance(weight, Mapping):
        value = _number(component, weight)
        return lambda module: value
    if component != "unet" or set(weight) - {"down", "mid", "up"}:
        raise ValueError(f"adapter_weights: {component}={dict(weight)!r}; expected a number, or for unet down, mid, up")
    for way in ("down", "up"):
        _check_blocks(way, weight.get(way, 1.0), getattr(model, f"{way}_blocks"))
    if isinstance(weight.get("mid"), (list, tuple)) and len(weight["mid"]) == 1:
        weight = {**weight, "mid": weight["mid"][0]}
    _number("mid", weight.get("mid", 1.0))

    def of_module(module: str) -> float:
        parts = module.split(".")
        value = weight.get(parts[0].removesuffix("_block").removesuffix("_blocks"), 1.0)
        if isinstance(value, Mapping):
            value = value.get(f"block_{parts[1]}", 1.0)
        if isinstance(value, (list, tuple)):
            value = value[0 if len(value) == 1 else int(parts[3])]
        return float(value)

    return of_module


def _check_blocks(way: str, value: Any, blocks: Any) -> None:
    counts = {f"block_{i}": len(block.resnets) for i, block in enumerate(blocks)}
    each = value if isinstance(value, Mapping) else dict.fromkeys(counts, value)
    for block, given in each.items():
        if block not in counts:
            raise ValueError(f"adapter_weights: {way} has {block!r}; expected {', '.join(counts)}")
        many = given if isinstance(given, (list, tuple)) else [given]
        if isinstance(given, (list, tuple)) and len(given) not in (1, counts[block]):
            raise ValueError(f"adapter_weights: {way} {block} has {len(given)} weights; expected 1 or {counts[block]}")
        for one in many:
            _number(f"{way} {block}", one)


def _number(what: str, value: Any) -> float:
    return checks.number(f"adapter_weights: {what}", value)
