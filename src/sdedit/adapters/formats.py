"""Any adapter file as one internal form: for each module of the model, tensors by their part in a formula, and alpha.

`parse` does not touch the model and reads no tensor: it compares names and shapes, and its report says everything.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sdedit.adapters import arrays, peft_settings
from sdedit.adapters.arrays import Array, Shape
from sdedit.adapters.kinds import check, kind, stored_rank
from sdedit.adapters.names import Target, family, family_of_width, index, is_text, numbered, underscored
from sdedit.files import shown

# The last part of a name: which tensor of its module it is.
_ROLE = re.compile(
    r"""(?: (?P<low>[._]lora[._](?:down|up|mid)\.weight | \.lora_linear_layer\.(?:down|up)\.weight)
      | (?P<peft>\.lora_[AB](?:\.[^.]+)?\.(?:weight|bias) | \.lora_magnitude_vector(?:\.[^.]+)*)
      | (?P<number>:(?:down|up))
      | (?P<lycoris>\.(?:dora_scale|diff|diff_b|w_norm|b_norm|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))
      | (?P<alpha>\.alpha) )$""",
    re.VERBOSE,
)
_LONG = 200  # letters of a name in a message
_SHORT = {"w_norm": "diff", "b_norm": "diff_b", "dora_scale": "dora"}
_BUNDLE = re.compile(r"bundle_emb\.(?P<token>.+?)\.string_to_param\.[^.]+")
_LAYOUTS = {"peft": "PEFT", "number": "cloneofsimo", "lycoris": "LyCORIS", "alpha": "kohya"}


@dataclass(frozen=True)
class LoadReport:
    """What an adapter file holds, and what became of it, or would become of it.

    Attributes:
        source: The file.
        layout: Who writes such files: "diffusers", "PEFT", "kohya", "LyCORIS" or "cloneofsimo".
        family: The kind of model that it is for, as far as it shows.
        matched: How many modules of each component it changes.
        unmatched: Names in the file that mean nothing here.
        left_out: Names that are understood but not used, each with the reason.
        kinds: How many modules are LoRA, LoHa, LoKr, full, and how many of them with DoRA.
        rank, alpha: The different values in the file, in order.
        tokens: Words that it brings for the prompt.
        problem: Why it cannot be loaded, or `None`.
    """

    source: str
    layout: str = "unknown"
    family: str | None = None
    matched: Mapping[str, int] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    kinds: Mapping[str, int] = field(default_factory=dict)
    rank: tuple[int, ...] = ()
    alpha: tuple[float, ...] = ()
    tokens: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def supported(self) -> bool:
        """Would it load?"""
        return self.problem is None

    def __bool__(self) -> bool:
        return self.supported

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.layout} layout" + (f", for {self.family}" if self.family else "")]
        lines += [f"  {count} modules of {name}" for name, count in self.matched.items()]
        if self.kinds:
            kinds = ", ".join(f"{count} {name}" for name, count in self.kinds.items())
            lines.append(f"  {kinds}; rank {_span(self.rank)}, alpha {_span(self.alpha)}")
        if self.tokens:
            lines.append(f"  tokens {', '.join(map(shown, self.tokens))}")
        for title, names in (("left out", self.left_out), ("not understood", self.unmatched)):
            lines += [f"  {title}: {shown(name, _LONG)}" for name in names[:10]]
            lines += [f"  and {len(names) - 10} more {title}"] if len(names) > 10 else []
        return "\n".join(lines + ([f"  cannot be loaded: {self.problem}"] if self.problem else []))


def _span(values: tuple[Any, ...]) -> str:
    return "none" if not values else f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


@dataclass
class Change:
    """What a file says about one module.

    Attributes:
        roles: Its tensors, by their part in a formula.
        alpha: `None` where the file has none.
        rank: What alpha is divided by, if that is not the rank of the tensors.
    """

    roles: dict[str, Array]
    alpha: float | None
    rank: int | None = None


@dataclass(frozen=True)
class Parsed:
    """Changes by component and module name, vectors by token, and the report."""

    changes: Mapping[str, Mapping[str, Change]]
    tokens: Mapping[str, Array]
    report: LoadReport


def parse(
    state: Mapping[str, Array],
    shapes: Mapping[str, Mapping[str, Shape]],
    *,
    source: str,
    text_width: int,
    metadata: Mapping[str, str] | None = None,
    peft_config: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> Parsed:
    """Bring an adapter's tensors to the internal form.

    Args:
        state: The file's tensors by name.
        shapes: Shape of the weight of each module that can be changed, for each component that there is.
        text_width: Channels of the pipeline's prompt embeds.
        metadata: Of the safetensors file: cloneofsimo's class lists, diffusers' `lora_adapter_metadata`.
        peft_config: A PEFT `adapter_config.json`; prefixes such as `unet.` before its keys are understood.
        strict: Names that are not understood are a problem.
    """
    metadata = metadata or {}
    found = _sort(state, shapes)
    configs = peft_settings.by_component(metadata, peft_config)
    changes, misfits = _changes(found, shapes, configs)
    every = [change for modules in changes.values() for change in modules.values()]
    ranks = [(rank, change.alpha) for change in every if (rank := stored_rank(change.roles))]
    report = LoadReport(
        source=source,
        layout=found.layout,
        family=_metadata_family(metadata) or family(state, found.text_width),
        matched={component: len(modules) for component, modules in changes.items()},
        unmatched=tuple(found.unmatched),
        left_out=tuple(found.left_out),
        kinds=dict(Counter(_kind(change) for change in every)),
        rank=tuple(sorted({rank for rank, _ in ranks})),
        alpha=tuple(sorted({float(rank) if alpha is None else alpha for rank, alpha in ranks})),
        tokens=tuple(found.tokens),
    )
    problem = peft_settings.problem(configs) or _problem(report, misfits, found, text_width, strict)
    return Parsed(changes, found.tokens, replace(report, problem=problem))


@dataclass
class _Sorted:
    """A file's tensors by module and role, and what is none of a module's."""

    held: dict[Target, dict[str, Array]] = field(default_factory=dict)
    tokens: dict[str, Array] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    layouts: Counter[str] = field(default_factory=Counter)
    text_width: int | None = None

    @property
    def layout(self) -> str:
        """The layout of most names."""
        return self.layouts.most_common(1)[0][0] if self.layouts else "unknown"


def _sort(state: Mapping[str, Array], shapes: Mapping[str, Mapping[str, Shape]]) -> _Sorted:
    found = _Sorted()
    count = sum(name.startswith("unet:") and name.endswith(":down") for name in state)
    targets = index(shapes) | numbered(shapes, count)
    for name, tensor in state.items():
        if (token := _token(name, tensor)) is not None:
            found.tokens[token] = tensor
            continue
        match = _ROLE.search(name)
        if match is None:
            found.unmatched.append(name)
            continue
        head, role = name[: match.start()], _role(match)
        flat = underscored(head)
        found.layouts[_layout(match)] += 1
        if flat.endswith("attn2_to_k") and role in ("down", "hada_w1_b") and tensor.ndim > 1:
            found.text_width = tensor.shape[1]
        target = targets.get(head) or targets.get(flat)
        if target is not None and role not in found.held.setdefault(target, {}):
            found.held[target][role] = tensor
        elif "text_encoder" not in shapes and is_text(flat):
            found.left_out.append(f"{name}: this pipeline has no text encoder")
        else:
            found.unmatched.append(name)
    for target in list(found.held):
        if len(shapes[target[0]][target[1]]) == 1:
            del found.held[target]
            found.left_out.append(f"{target[1]}: a norm; only linear layers and convolutions can be changed")
        elif target[0] == "text_encoder" and target[1].endswith("_embedding"):
            del found.held[target]
            found.left_out.append(f"{target[1]}: a table; only linear layers and convolutions can be changed")
    return found


def _changes(
    found: _Sorted, shapes: Mapping[str, Mapping[str, Shape]], configs: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Change]], list[str]]:
    """The changes that fit, and a line for each that does not."""
    changes: dict[str, dict[str, Change]] = {}
    misfits = []
    for (component, module), roles in found.held.items():
        shape, stored = shapes[component][module], roles.pop("alpha", None)
        wrong = "a part is missing" if kind(roles) is None else check(roles, shape)
        given = None if stored is None else arrays.number(stored)
        if stored is not None and given is None:
            wrong = f"alpha is {list(stored.shape)} of {stored.dtype}, not a finite number"
        if wrong:
            misfits.append(f"! {component} {module} is {list(shape)}; in the file {wrong}")
            continue
        alpha, rank = given, None
        if stored is None:
            rank = stored_rank(roles)
            alpha = peft_settings.alpha(configs.get(component, {}), module, rank)
            rank = 1 if rank is None and alpha is not None else None
        changes.setdefault(component, {})[module] = Change(roles, alpha, rank)
    return changes, misfits


def _problem(report: LoadReport, misfits: list[str], found: _Sorted, text_width: int, strict: bool) -> str | None:
    """Why it cannot be loaded, if it cannot."""
    lines = misfits + ([f"+ {shown(name, _LONG)} is not understood" for name in report.unmatched] if strict else [])
    ours = family_of_width(text_width)
    if (lines or not report.matched) and report.family not in (None, ours):
        return f"it is for {report.family}; this pipeline is {ours}"
    wide = [f"{shown(token)} {list(t.shape)}" for token, t in found.tokens.items() if t.shape[-1] != text_width]
    if wide:
        return f"its token {wide[0]} is for another model; this pipeline's prompt embeds are {text_width} wide"
    if lines:
        listed = "\n".join(lines[:20] + ([f"and {len(lines) - 20} more"] if len(lines) > 20 else []))
        return f"it does not fit this pipeline:\n{listed}"
    return None if report.matched else "nothing in it changes a module of this pipeline"


def _kind(change: Change) -> str:
    return f"{kind(change.roles)}{' with DoRA' if 'dora' in change.roles else ''}"


def _token(name: str, tensor: Array) -> str | None:
    """The word that this tensor is the vector of, if it is one."""
    if tensor.ndim not in (1, 2) or not arrays.is_float(tensor):
        return None
    match = _BUNDLE.fullmatch(name)
    return match["token"] if match else name if re.fullmatch(r"<[^<>]+>", name) else None


def _role(match: re.Match[str]) -> str:
    """`down`, `up`, `alpha`, …: one word for each part, whatever the layout."""
    text = match[0]
    if match["peft"]:
        if "magnitude" in text:
            return "dora"
        part = "down" if "lora_A" in text else "up"
        return f"{part}_bias" if text.endswith("bias") else part
    if match["lycoris"]:
        return _SHORT.get(text[1:], text[1:])
    return next(word for word in ("down", "up", "mid", "alpha") if re.search(rf"[._:]{word}\b", text))


def _layout(match: re.Match[str]) -> str:
    if match["low"]:
        kohya = "lora_down" in match[0] or "lora_up" in match[0] or "lora_mid" in match[0]
        return "kohya" if kohya else "diffusers"
    return _LAYOUTS[match.lastgroup or "low"]


def _metadata_family(metadata: Mapping[str, str]) -> str | None:
    """The kind of model that kohya's trainer wrote down."""
    base = metadata.get("ss_base_model_version", "")
    known = {"sdxl": "Stable Diffusion XL", "sd_v2": "Stable Diffusion 2.x", "sd_v1": "Stable Diffusion 1.x"}
    return next((family for mark, family in known.items() if base.startswith(mark)), None)
