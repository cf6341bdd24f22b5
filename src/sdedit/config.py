"""Configuration of models and schedulers: what `config.json` holds and how it becomes constructor arguments."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

from sdedit.files import read_json, write_atomically

# The version of the ecosystem's folder format that is written, for tools that read this key.
FORMAT_VERSION = "0.42.1"


def later(path: str) -> Any:
    """What a room above offers, imported when it is used: `later("sdedit.apps.sweep:sweep")`.

    So a class can have methods that are made of it (loading a network, sweeping over strengths) while its own room
    imports nothing from above. This is the only way in which an import may go up.
    """
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


class Config(dict[str, Any]):
    """Read-only dictionary whose keys are attributes too: `config.in_channels` is `config["in_channels"]`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this config has no key {name!r}; it has {', '.join(self)}") from None

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("a config is read-only: make a new object with from_config(config, key=value)")

    __setattr__ = __setitem__ = __delitem__ = __delattr__ = _refuse
    update = pop = popitem = setdefault = clear = __ior__ = _refuse  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Config, (dict(self),))


class Configurable:
    """Mix-in that records the arguments of `__init__` in `.config` and makes objects from recorded ones.

    Keys that a class does not know are kept in `.config` (a scheduler's config can go to another scheduler's class
    and back), and keys that were left at their default are listed in `_use_default_values`, so that another class
    takes its own default for them.
    """

    config_name: ClassVar[str] = "config.json"
    config: Config

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" not in cls.__dict__:
            return
        original = cls.__init__
        signature = inspect.signature(original)

        @functools.wraps(original)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            if "config" not in self.__dict__:  # the outermost class of the hierarchy records
                bound = signature.bind(self, *args, **kwargs)
                given = set(bound.arguments)
                bound.apply_defaults()
                values = {k: v for k, v in list(bound.arguments.items())[1:] if k != "kwargs"}
                defaults = sorted(k for k in values if k not in given)
                self._check_values(values)
                head = {"_class_name": type(self).__name__}
                object.__setattr__(self, "config", _config({**head, **values}, defaults))
            original(self, *args, **kwargs)

        cls.__init__ = init  # type: ignore[method-assign]

    @classmethod
    def _check_values(cls, values: Mapping[str, Any]) -> None:
        """Raise a `ValueError` that names an argument, before anything is made of them."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | str | os.PathLike[str], **overrides: Any) -> Self:
        """Make an object from a config (a mapping, a `config.json`, or the folder that holds one).

        Args:
            config: Keys are constructor arguments. Unknown keys are kept in `.config` and not used.
            **overrides: Values that replace those of `config`; an unknown name is a `TypeError`.
        """
        if not isinstance(config, Mapping):
            path = Path(config)
            config = read_json(path / cls.config_name if path.is_dir() else path)
        known = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
        if wrong := sorted(set(overrides) - known):
            raise TypeError(f"{cls.__name__} has no option {', '.join(wrong)}; it has {', '.join(sorted(known))}")
        left_at_default = set(config.get("_use_default_values", ()))
        values = {k: v for k, v in config.items() if k in known and k not in left_at_default}
        values.update(overrides)
        made = cls(**{k: tuple(v) if isinstance(v, list) and k in cls._tuples() else v for k, v in values.items()})
        skipped = known | left_at_default
        made.register_to_config(**{k: v for k, v in config.items() if k not in skipped and not k.startswith("_")})
        return made

    @classmethod
    def _tuples(cls) -> set[str]:
        """Arguments whose default is a tuple: JSON has only lists."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        return {p.name for p in parameters if isinstance(p.default, tuple)}

    def register_to_config(self, **values: Any) -> None:
        """Record further or changed values in `.config` (they change nothing else)."""
        defaults = [k for k in self.config.get("_use_default_values", ()) if k not in values]
        object.__setattr__(self, "config", _config({**self.config, **values}, defaults))

    def to_json_string(self) -> str:
        """The config as the text of a `config.json`."""
        return config_text(self.config, type(self).__name__)

    def save_config(self, folder: str | os.PathLike[str]) -> None:
        """Write the config to `folder/<config_name>`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        with write_atomically(Path(folder) / self.config_name) as temporary:
            temporary.write_text(self.to_json_string())


def _config(values: Mapping[str, Any], defaults: Sequence[str]) -> Config:
    """A config of `values`, with the names of those that were left at their default, if there are any."""
    rest = {k: v for k, v in values.items() if k != "_use_default_values"}
    return Config({**rest, "_use_default_values": list(defaults)} if defaults else rest)


def config_text(config: Mapping[str, Any], class_name: str) -> str:
    """The text of a `config.json`."""
    values = {k: v for k, v in config.items() if k != "_use_default_values"}
    head = {"_class_name": class_name, "_diffusers_version": FORMAT_VERSION}
    return json.dumps({**values, **head}, indent=2, sort_keys=True, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as JSON's own kinds."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
