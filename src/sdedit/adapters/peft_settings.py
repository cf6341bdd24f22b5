"""What PEFT's `adapter_config.json`, or diffusers' copy of it in a file's metadata, says of an adapter's strength."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

# The kinds that are loaded, and where each keeps its alpha.
ALPHA_OF = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
# Ways to begin a LoRA that change the model's own weights too: the file alone is not the whole change.
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LONGEST = 300  # characters of a pattern

Config = Mapping[str, Any]


def by_component(metadata: Mapping[str, str], peft_config: Config | None) -> dict[str, dict[str, Any]]:
    """PEFT's settings for each component, from `adapter_config.json` or the file's metadata."""
    settings: Any = peft_config
    if settings is None and "lora_adapter_metadata" in metadata:
        try:
            settings = json.loads(metadata["lora_adapter_metadata"])
        except (ValueError, RecursionError):
            settings = None
    if not isinstance(settings, Mapping):
        return {}
    configs: dict[str, dict[str, Any]] = {"unet": {}, "text_encoder": {}}
    for key, value in settings.items():
        component, _, rest = str(key).partition(".")
        for name, config in configs.items():
            if name == component and rest:
                config[rest] = value
            elif component not in configs:
                config[str(key)] = value
    return configs


def problem(configs: Mapping[str, Config]) -> str | None:
    """Why an adapter with these settings is not loaded, if it is not."""
    for config in configs.values():
        kind = config.get("peft_type", "LORA")
        if str(kind).upper() not in ALPHA_OF:
            return f"its peft_type is {kind!r:.60}; expected one of {', '.join(ALPHA_OF)}"
        begun = config.get("init_lora_weights")
        if isinstance(begun, str) and begun.lower().startswith(_CHANGES_THE_MODEL):
            return (
                f"it was begun by {begun!r:.60}, which changes the model's own weights, and the file is not the whole "
                "change: save it as an ordinary LoRA (PEFT's path_initial_model_for_weight_conversion)"
            )
        for name in ("alpha_pattern", "rank_pattern"):
            patterns = config.get(name)
            for pattern in patterns if isinstance(patterns, Mapping) else ():
                if _expression(str(pattern)) is None:
                    return f"its {name} has {pattern!r:.60}, which is no expression that is understood"
    return None


def alpha(config: Config, module: str, rank: int | None) -> float | None:
    """Alpha for a module, so that the change is scaled by alpha / `rank`; `None` if the settings do not say.

    Args:
        rank: That of the stored tensors; `None` where they have none (LoKr of two whole matrices).
    """
    value = _by_pattern(config.get("alpha_pattern"), module, config.get(_alpha_key(config)))
    own = _by_pattern(config.get("rank_pattern"), module, config.get("r"))
    divisor = own if _is_number(own) and own > 0 and _alpha_key(config) == "alpha" else rank
    if not _is_number(value) or divisor is None:
        return None
    scale = float(value) / (math.sqrt(divisor) if config.get("use_rslora") else divisor)
    return scale * (1 if rank is None else rank)


def _alpha_key(config: Config) -> str:
    return ALPHA_OF.get(str(config.get("peft_type", "LORA")).upper(), "lora_alpha")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that is the end of the module's name, as PEFT looks for it."""
    plain = module.removeprefix("text_model.")
    for pattern, value in patterns.items() if isinstance(patterns, Mapping) else ():
        expression = _expression(str(pattern))
        if expression and any(expression.match(name) for name in (module, plain, f"text_model.{plain}")):
            return value
    return default


def _expression(pattern: str) -> re.Pattern[str] | None:
    """A pattern as PEFT reads it; `None` if it is none, or could take time without end (a group that is repeated)."""
    if len(pattern) > _LONGEST or re.search(r"\)[*+?{]", pattern):
        return None
    try:
        return re.compile(rf"(?:.*\.)?(?:{pattern})$")
    except re.error:
        return None
