"""Files of textual inversions: what they hold, whoever wrote them, and whether it fits. No framework is needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdedit.adapters import arrays
from sdedit.adapters.arrays import Array, is_array
from sdedit.inputs import prompts
from sdedit.loading.families import FAMILY_OF_WIDTH
from sdedit.loading.hub import find_file

Source = str | os.PathLike[str] | Mapping[str, Any] | Any

_FILE_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")


@dataclass(frozen=True)
class EmbeddingReport:
    """What loading one textual inversion did.

    Attributes:
        token: The word for prompts.
        vectors: How many tokens of a prompt it takes.
        left_out: What else the file holds.
    """

    token: str
    vectors: int
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        rest = f"; left out: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{self.token!r}, {self.vectors} vector{'s' if self.vectors > 1 else ''}{rest}"


@dataclass(frozen=True)
class Embedding:
    """A textual inversion as a file holds it; vectors (n, width), and no token where the file names none."""

    where: str
    token: str | None
    vectors: Array
    left_out: tuple[str, ...] = ()


class _ParameterDict:
    """Made in place of the `nn.ParameterDict` of 2022's files: it keeps what the pickle says and does nothing."""

    _parameters: Mapping[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._parameters = state.get("_parameters", {})


_STAND_INS = [(_ParameterDict, "torch.nn.modules.container.ParameterDict")]


def read_embeddings(
    source: Source | Sequence[Source],
    token: str | Sequence[str | None] | None,
    read: Callable[..., Any],
    *,
    weight_name: str | None = None,
    subfolder: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> list[Embedding]:
    """The embeddings of one or several sources, each with its token: see `load_textual_inversion`.

    Args:
        read: Reads a file: `f(path, stand_ins)`, as `sdedit.adapters.nested.read_nested`.
    """
    names = [weight_name] if weight_name else _FILE_NAMES
    sources: Sequence[Any] = source if isinstance(source, (list, tuple)) else [source]
    found = []
    for one in sources:
        if isinstance(one, (str, os.PathLike)):
            file = find_file(one, _allowed(names, use_safetensors), subfolder=subfolder, **hub)
            _allowed([file.name], use_safetensors)
            found += _parse(read(file, _STAND_INS), str(file), file.stem)
        else:
            found += _parse(one, "the embedding given", None)
    return _named(found, token)


def _allowed(names: Sequence[str], use_safetensors: bool | None) -> Sequence[str]:
    """The names of the kind that is wanted."""
    kept = [n for n in names if use_safetensors is None or n.endswith(".safetensors") == use_safetensors]
    if not kept:
        kind = "not a .safetensors file" if use_safetensors else "a .safetensors file"
        raise ValueError(f"{names[0]} is {kind}, and use_safetensors={use_safetensors}")
    return kept


def _parse(state: Any, where: str, stem: str | None) -> list[Embedding]:
    """The embeddings in what a file, called `stem`, holds, whatever the program that wrote it."""
    if is_array(state):
        return [Embedding(where, None, _rows(state, where))]
    if not isinstance(state, Mapping):
        raise ValueError(f"{where} holds a {type(state).__name__}; expected a textual inversion")
    if "string_to_param" in state:  # AUTOMATIC1111, and the program of the paper
        held = state["string_to_param"]
        params = held if isinstance(held, Mapping) else getattr(held, "_parameters", {})
        if len(params) != 1:
            raise ValueError(f"{where} has {len(params)} entries in string_to_param; expected one, '*'")
        name = state.get("name")
        left_out = tuple(str(key) for key in state if key not in ("string_to_param", "string_to_token", "name"))
        token = name if isinstance(name, str) and name else stem
        return [Embedding(where, token, _rows(next(iter(params.values())), where), left_out)]
    if "emb_params" in state:  # kohya
        left_out = tuple(str(key) for key in state if key != "emb_params")
        return [Embedding(where, stem, _rows(state["emb_params"], where), left_out)]
    if {"clip_l", "clip_g"} & set(state):
        raise ValueError(f"{where} is a textual inversion for SDXL; expected one for Stable Diffusion 1.x or 2.x")
    tensors = {key: value for key, value in state.items() if is_array(value)}
    if not tensors or any(str(key).endswith((".weight", ".bias", ".alpha")) for key in tensors):
        shown = ", ".join(map(repr, list(state)[:3]))
        raise ValueError(f"{where} is no textual inversion, nor any file that is known as one: it holds {shown}, …")
    left_out = tuple(str(key) for key in state if key not in tensors)
    return [Embedding(where, str(key), _rows(value, where), left_out) for key, value in tensors.items()]


def _rows(value: Any, where: str) -> Array:
    """Vectors as (n, width); nothing is copied yet."""
    if not is_array(value) or not arrays.is_float(value) or value.ndim not in (1, 2) or not arrays.size(value):
        shown = f"{list(value.shape)} of {value.dtype}" if is_array(value) else type(value).__name__
        raise ValueError(f"{where} holds {shown}; expected the vectors of a textual inversion, floats (n, width)")
    rows = value.detach() if arrays.is_torch(value) else value
    return rows[None] if rows.ndim == 1 else rows


def _named(found: list[Embedding], token: str | Sequence[str | None] | None) -> list[Embedding]:
    """The embeddings under the tokens that the caller chose, or under their own."""
    tokens = [token] if isinstance(token, str) else list(token or [])
    if len(found) == 1 and found[0].token is None and len(tokens) == len(found[0].vectors) > 1:
        found = [Embedding(found[0].where, None, row[None]) for row in found[0].vectors]
    if tokens and len(tokens) != len(found):
        raise ValueError(f"token: {len(tokens)} of them for {len(found)} embeddings; expected as many")
    own = [one.token for one in found]
    chosen = [given or name for given, name in zip(tokens or [None] * len(found), own, strict=True)]
    for one, name in zip(found, chosen, strict=True):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{one.where} does not say its token: give one with token=")
    return [Embedding(e.where, str(n).strip(), e.vectors, e.left_out) for e, n in zip(found, chosen, strict=True)]


def tokens_of(token: str, count: int) -> list[str]:
    """The tokens of an embedding of so many vectors: T, T_1, …"""
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def check_embeddings(found: list[Embedding], tokenizer: Any, table: tuple[int, ...], room: int) -> None:
    """Compare everything with the tokenizer and the text encoder, before anything is changed.

    Args:
        table: Shape of the text encoder's table of embeddings.
        room: Tokens that a prompt may have.

    Raises:
        ValueError: A width, a value, or a token does not fit.
    """
    rows, width = table
    if rows < len(tokenizer):
        raise ValueError(f"the text encoder has {rows} embeddings, but the tokenizer {len(tokenizer)} tokens")
    vocabulary = tokenizer.get_vocab()
    known = prompts.embeddings(tokenizer)
    taken = {name.lower() for names in known.values() for name in names}  # CLIP reads capitals as small letters
    for one in found:
        count, its_width = one.vectors.shape
        if its_width != width:
            raise ValueError(
                f"{one.where}: the vectors of {one.token!r} are {its_width} wide{_family(its_width)}; this pipeline's "
                f"text encoder has {width}{_family(width)}"
            )
        if count > room:
            raise ValueError(f"{one.where}: {one.token!r} has {count} vectors, but a prompt has room for {room}")
        if not arrays.is_finite(one.vectors):
            raise ValueError(f"{one.where}: the vectors of {one.token!r} have NaN or infinity in them: it is damaged")
        for name in tokens_of(str(one.token), count):
            if name in vocabulary or name.lower() in taken:
                raise ValueError(
                    f"{one.where}: the token {name!r} exists already: give another one with token=, or unload it"
                )
            taken.add(name.lower())
    _check_ambiguity(found, known)


def _check_ambiguity(found: list[Embedding], known: Mapping[str, list[str]]) -> None:
    """Refuse T and T_1 as two embeddings: they would be read as one of two vectors."""
    counts = {token: len(names) for token, names in known.items()}
    counts |= {str(one.token): len(one.vectors) for one in found}
    names = {name for token, count in counts.items() for name in tokens_of(token, count)}
    for token, count in counts.items():
        if f"{token}_{count}" in names:
            raise ValueError(
                f"the token '{token}_{count}' would be taken for a vector of {token!r}: give another one with token="
            )


def _family(width: int) -> str:
    return f" ({FAMILY_OF_WIDTH[width]})" if width in FAMILY_OF_WIDTH else ""
