"""How a command is made of a function and a dataclass of settings, and the options that are no settings of a picture.

An option is declared once: as an annotated field of a dataclass, `steps: Annotated[int, typer.Option(help="…")] = 20`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.models import ArgumentInfo, OptionInfo

Out = Annotated[Path, typer.Option("-o", "--output", help="Where the picture goes; with --count, -1, -2, … are added.")]
Count = Annotated[int, typer.Option(min=1, max=1000, help="Pictures to make, with the seeds SEED, SEED+1, …")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


@dataclass
class Place:
    """Where and at what size a picture is drawn."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, …")] = "auto"
    size: Annotated[
        str, typer.Option(help="WxH, or 'original'; 'auto' brings images far from the model's own size near it.")
    ] = "auto"
    max_megapixels: Annotated[
        float, typer.Option(min=1e-6, help="Larger input images are refused; inf for no limit.")
    ] = 100

    @property
    def max_pixels(self) -> int | None:
        """The same in pixels; `None` for no limit."""
        return None if math.isinf(self.max_megapixels) else int(self.max_megapixels * 1e6)


def command(
    *, without: Collection[str] = (), changes: type | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function: each parameter that is a dataclass gives way to that dataclass's annotated fields.

    Args:
        without: Fields that this command has no option for, or `parameter.field`; they keep their default.
        changes: A dataclass whose fields become options without a default. Those that were given come as `**kwargs`,
            an empty text or list as the field's own default.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters, parts = _expanded(function, without, changes)

        @functools.wraps(function)
        def run(**given: Any) -> None:
            del given["debug"]
            for parameter in parameters:
                _refuse_infinite(parameter, given.get(parameter.name))
            for name, (kind, fields) in parts.items():
                values = {field: given.pop(field) for field in fields}
                if kind is changes:
                    given |= {k: _changed_to(kind, k, v) for k, v in values.items() if v is not None}
                else:
                    given[name] = kind(**{k: _read(kind, k, v) for k, v in values.items()})
            function(**given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _expanded(
    function: Callable[..., None], without: Collection[str], changes: type | None
) -> tuple[list[inspect.Parameter], dict[str, tuple[type, list[str]]]]:
    """The parameters of a command, and by name of the function's own which fields of which dataclass each takes."""
    hints = typing.get_type_hints(function, include_extras=True)
    parameters: list[inspect.Parameter] = []
    parts: dict[str, tuple[type, list[str]]] = {}
    for parameter in inspect.signature(function).parameters.values():
        kind = changes if parameter.kind is parameter.VAR_KEYWORD else hints[parameter.name]
        if kind is None or not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind, kind=parameter.KEYWORD_ONLY))
            continue
        left_out = {*without, *(p.name for p in parameters)}
        fields = [f for f in annotated(kind) if not {f.name, f"{parameter.name}.{f.name}"} & left_out]
        parameters += [_changed(f) if kind is changes else f for f in fields]
        parts[parameter.name] = kind, [f.name for f in fields]
    debug = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, annotation=_DEBUG, default=False)
    return [*parameters, debug], parts


def annotated(kind: Any) -> tuple[inspect.Parameter, ...]:
    """The fields of a dataclass that carry an option or an argument, as parameters of a function."""
    hints, found = typing.get_type_hints(kind, include_extras=True), []
    for field in dataclasses.fields(kind):
        if (told := declared(hints[field.name])) is not None:
            annotation, default = hints[field.name], field.default
            if isinstance(told, ArgumentInfo):
                default = inspect.Parameter.empty
            elif field.default_factory is not dataclasses.MISSING:  # a list: none is told from an empty one
                annotation, default = Annotated[annotation.__origin__ | None, told], None
            elif isinstance(default, tuple):  # typed with commas
                annotation, default = Annotated[str, told], ",".join(default)
            elif isinstance(default, bool) and told.default is ... and not told.param_decls:
                annotation = Annotated[bool, _flag(told, f"--{field.name.replace('_', '-')}")]
            found.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
            )
    return tuple(found)


def declared(annotation: Any) -> OptionInfo | ArgumentInfo | None:
    """What Typer is told in an annotation."""
    return next((m for m in getattr(annotation, "__metadata__", ()) if isinstance(m, (OptionInfo, ArgumentInfo))), None)


def _flag(told: OptionInfo | ArgumentInfo, name: str) -> Any:
    return typer.Option(name, help=told.help)


def _changed(parameter: inspect.Parameter) -> inspect.Parameter:
    """The option that overrides a field, `None` unless it is given; of a flag, with its opposite."""
    told, name = declared(parameter.annotation), f"--{parameter.name.replace('_', '-')}"
    assert told is not None
    kind = parameter.annotation.__origin__
    if kind is bool:
        told = _flag(told, f"{name}/--no-{name[2:]}")
    elif isinstance(told, ArgumentInfo):
        told = _flag(told, name)
    return parameter.replace(annotation=Annotated[kind | None, told], default=None)


def _read(kind: type, name: str, typed: Any) -> Any:
    """What was typed for a field, as the field holds it."""
    field = next(f for f in dataclasses.fields(kind) if f.name == name)
    if typed is None and field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if isinstance(field.default, tuple):
        return tuple(part.strip() for part in typed.split(","))
    return typed


def _changed_to(kind: type, name: str, typed: Any) -> Any:
    """Likewise; an empty text takes away what was there."""
    empty = typed == "" or (isinstance(typed, list) and typed[-1] in ("", ("", 1.0)))
    return getattr(kind(), name) if empty else _read(kind, name, typed)


def _refuse_infinite(parameter: inspect.Parameter, value: Any) -> None:
    endless = parameter.name == "max_megapixels" and value == math.inf
    if isinstance(value, float) and not math.isfinite(value) and not endless:
        raise ValueError(f"{flag(parameter)} {value}; expected a finite number")


def flag(parameter: inspect.Parameter) -> str:
    """What a user types for a parameter."""
    told = declared(parameter.annotation)
    names = [n for n in (told.default, *(told.param_decls or ())) if isinstance(n, str)] if told else []
    return next((n for n in names if n.startswith("--")), f"--{parameter.name.replace('_', '-')}").partition("/")[0]


def check_ranges(settings: Any, names: Mapping[str, str] | None = None) -> None:
    """Hold the fields of a dataclass to the ranges of their options.

    Args:
        names: What a field is called in the message; its option if not given.
    """
    for parameter in annotated(type(settings)):
        told, value = declared(parameter.annotation), getattr(settings, parameter.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or told is None:
            continue
        low, high = told.min, told.max
        name = (names or {}).get(parameter.name) or flag(parameter)
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            span = "a finite number" if low is None else f"at least {low:g}" if high is None else f"{low:g} to {high:g}"
            raise ValueError(f"{name} {value}; expected {span}")


def numbers(name: str, text: str, low: float = 0, high: float = 1) -> list[float]:
    """`0.2,0.5` as numbers from `low` to `high`."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} {text}; expected numbers with commas between them") from None
    for value in values:
        if not low <= value <= high:
            raise ValueError(f"{name} {value:g}; expected {low:g} to {high:g}")
    return values
