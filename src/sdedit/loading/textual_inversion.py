"""Textual inversion (arXiv 2208.01618): new words for the text encoder, each of one or several learned vectors.

A word T of n vectors becomes n tokens T, T_1, …, T_(n-1), each with one row in the text encoder's embedding table; a
prompt names T, and `prompts.expand` writes out the rest. Loading compares everything first and then inserts the rows
where the tokenizer's numbers end; unloading takes out exactly these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdedit import prompts
from sdedit.loading.nested import is_plain, read_nested
from sdedit.loading.sources import find_file
from sdedit.offload import refuse

Source = str | os.PathLike[str] | Mapping[str, Any] | Tensor

_FILE_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
_FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 1280: "SDXL"}


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
class _Embedding:
    """A textual inversion as a file holds it; vectors (n, width), and no token where the file names none."""

    where: str
    token: str | None
    vectors: Tensor
    left_out: tuple[str, ...] = ()


class _ParameterDict:
    """Made in place of the `nn.ParameterDict` of 2022's files: it keeps what the pickle says and does nothing."""

    _parameters: Mapping[str, Any] = {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._parameters = state.get("_parameters", {})


_STAND_INS = [(_ParameterDict, "torch.nn.modules.container.ParameterDict")]


class TextualInversionLoader:
    """The part of a pipeline that gives its text encoder new words and takes them away."""

    tokenizer: Any
    text_encoder: Any

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Source | Sequence[Source],
        token: str | Sequence[str | None] | None = None,
        tokenizer: Any = None,
        text_encoder: Any = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        use_safetensors: bool | None = None,
        hf_token: str | None = None,
        **hub: Any,
    ) -> list[EmbeddingReport]:
        """Load textual inversions: all of them, or, if one does not fit, none.

        Args:
            pretrained_model_name_or_path: One or a list of: a file (diffusers', AUTOMATIC1111's or kohya's, pickled or
                safetensors), a folder or hub id, what such a file holds, or a tensor (width,) or (n, width).
            token: The word for the prompt, or one for each embedding; the file's own if not given.
            tokenizer, text_encoder: The pipeline's if not given.
            weight_name: Name of the file in a folder or on the hub; learned_embeds.safetensors or .bin if not given.
            subfolder: Folder inside the folder or hub repository.
            use_safetensors: `True` never reads pickles, `False` reads only them.
            hf_token: The hub's token.
            **hub: `revision`, `cache_dir`, `local_files_only`, `force_download`.

        Returns:
            For each embedding its token, its number of vectors, and what was left out of its file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: A file is damaged or of another kind, a token is taken, or the width is another model's.
        """
        tokenizer, text_encoder = self._text_parts(tokenizer, text_encoder)
        if hf_token is not None:
            hub["token"] = hf_token
        names = [weight_name] if weight_name else _FILE_NAMES
        given = pretrained_model_name_or_path
        sources: Sequence[Any] = given if isinstance(given, (list, tuple)) else [given]
        found = []
        for source in sources:
            if isinstance(source, (str, os.PathLike)):
                file = find_file(source, _allowed(names, use_safetensors), subfolder=subfolder, **hub)
                _allowed([file.name], use_safetensors)
                found += _parse(read_nested(file, _STAND_INS), str(file), file.stem)
            else:
                found += _parse(source, "the embedding given", None)
        found = _named(found, token)
        _check(found, tokenizer, text_encoder)
        vectors = {
            name: row
            for one in found
            for name, row in zip(_tokens(str(one.token), len(one.vectors)), one.vectors, strict=True)
        }
        if vectors:
            _insert(tokenizer, text_encoder, vectors)
        return [EmbeddingReport(str(one.token), len(one.vectors), one.left_out) for one in found]

    def unload_textual_inversion(
        self, tokens: str | Sequence[str] | None = None, tokenizer: Any = None, text_encoder: Any = None
    ) -> list[str]:
        """Take textual inversions away again; tokenizer and text encoder are then as they were before.

        Args:
            tokens: One, or several; all if not given.
            tokenizer, text_encoder: The pipeline's if not given.

        Returns:
            The tokens that were taken away.

        Raises:
            ValueError: A token is not loaded.
        """
        tokenizer, text_encoder = self._text_parts(tokenizer, text_encoder)
        known = prompts.embeddings(tokenizer)
        wanted = list(known) if tokens is None else [tokens] if isinstance(tokens, str) else list(tokens)
        if unknown := [token for token in wanted if token not in known]:
            raise ValueError(f"tokens: {unknown} are not loaded; loaded are {list(known) or 'none'}")
        if names := {name for token in wanted for name in known[token]}:
            _remove(tokenizer, text_encoder, names)
        return wanted

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: Any = None) -> str | list[str]:
        """Write each textual inversion in a prompt, or in each of a list, out as the tokens of its vectors."""
        tokenizer = tokenizer or self.tokenizer
        if isinstance(prompt, str):
            return prompts.expand(tokenizer, prompt)
        return [prompts.expand(tokenizer, one) for one in prompt]

    def _text_parts(self, tokenizer: Any, text_encoder: Any) -> tuple[Any, Any]:
        parts = tokenizer or self.tokenizer, text_encoder or self.text_encoder
        if any(part is None for part in parts):
            raise ValueError("this pipeline has no tokenizer or no text encoder: pass tokenizer= and text_encoder=")
        return parts


def _allowed(names: Sequence[str], use_safetensors: bool | None) -> Sequence[str]:
    """The names of the kind that is wanted."""
    kept = [n for n in names if use_safetensors is None or n.endswith(".safetensors") == use_safetensors]
    if not kept:
        kind = "not a .safetensors file" if use_safetensors else "a .safetensors file"
        raise ValueError(f"{names[0]} is {kind}, and use_safetensors={use_safetensors}")
    return kept


def _parse(state: Any, where: str, stem: str | None) -> list[_Embedding]:
    """The embeddings in what a file, called `stem`, holds, whatever the program that wrote it."""
    if isinstance(state, Tensor):
        return [_Embedding(where, None, _rows(state, where))]
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
        return [_Embedding(where, token, _rows(next(iter(params.values())), where), left_out)]
    if "emb_params" in state:  # kohya
        left_out = tuple(str(key) for key in state if key != "emb_params")
        return [_Embedding(where, stem, _rows(state["emb_params"], where), left_out)]
    if {"clip_l", "clip_g"} & set(state):
        raise ValueError(f"{where} is a textual inversion for SDXL; expected one for Stable Diffusion 1.x or 2.x")
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors or any(str(key).endswith((".weight", ".bias", ".alpha")) for key in tensors):
        shown = ", ".join(map(repr, list(state)[:3]))
        raise ValueError(f"{where} is no textual inversion, nor any file that is known as one: it holds {shown}, …")
    left_out = tuple(str(key) for key in state if key not in tensors)
    return [_Embedding(where, str(key), _rows(value, where), left_out) for key, value in tensors.items()]


def _rows(value: Any, where: str) -> Tensor:
    """Vectors as (n, width); nothing is copied yet."""
    if not is_plain(value) or not value.is_floating_point() or value.ndim not in (1, 2) or not value.numel():
        shown = f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where} holds {shown}; expected the vectors of a textual inversion, floats (n, width)")
    rows: Tensor = value.detach()
    return rows[None] if rows.ndim == 1 else rows


def _named(found: list[_Embedding], token: str | Sequence[str | None] | None) -> list[_Embedding]:
    """The embeddings under the tokens that the caller chose, or under their own."""
    tokens = [token] if isinstance(token, str) else list(token or [])
    if len(found) == 1 and found[0].token is None and len(tokens) == len(found[0].vectors) > 1:
        found = [_Embedding(found[0].where, None, row[None]) for row in found[0].vectors]
    if tokens and len(tokens) != len(found):
        raise ValueError(f"token: {len(tokens)} of them for {len(found)} embeddings; expected as many")
    own = [one.token for one in found]
    chosen = [given or name for given, name in zip(tokens or [None] * len(found), own, strict=True)]
    for one, name in zip(found, chosen, strict=True):
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"{one.where} does not say its token: give one with token=")
    return [_Embedding(e.where, str(n).strip(), e.vectors, e.left_out) for e, n in zip(found, chosen, strict=True)]


def _tokens(token: str, count: int) -> list[str]:
    return [token, *(f"{token}_{i}" for i in range(1, count))]


def _check(found: list[_Embedding], tokenizer: Any, text_encoder: Any) -> None:
    """Compare everything with the tokenizer and the text encoder, before anything is changed.

    Raises:
        ValueError: A width, a value, or a token does not fit.
    """
    rows, width = text_encoder.get_input_embeddings().weight.shape
    room = getattr(text_encoder.config, "max_position_embeddings", 77) - 2
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
        if not torch.isfinite(one.vectors).all():
            raise ValueError(f"{one.where}: the vectors of {one.token!r} have NaN or infinity in them: it is damaged")
        for name in _tokens(str(one.token), count):
            if name in vocabulary or name.lower() in taken:
                raise ValueError(
                    f"{one.where}: the token {name!r} exists already: give another one with token=, or unload it"
                )
            taken.add(name.lower())
    _check_ambiguity(found, known)


def _check_ambiguity(found: list[_Embedding], known: Mapping[str, list[str]]) -> None:
    """Refuse T and T_1 as two embeddings: they would be read as one of two vectors."""
    counts = {token: len(names) for token, names in known.items()}
    counts |= {str(one.token): len(one.vectors) for one in found}
    names = {name for token, count in counts.items() for name in _tokens(token, count)}
    for token, count in counts.items():
        if f"{token}_{count}" in names:
            raise ValueError(
                f"the token '{token}_{count}' would be taken for a vector of {token!r}: give another one with token="
            )


def _family(width: int) -> str:
    return f" ({_FAMILIES[width]})" if width in _FAMILIES else ""


def _insert(tokenizer: Any, text_encoder: Any, vectors: Mapping[str, Tensor]) -> None:
    """Add tokens to the tokenizer, and their rows to the text encoder's table, before rows that no token uses."""
    refuse("load_textual_inversion", text_encoder)
    table = text_encoder.get_input_embeddings()
    first, names = len(tokenizer), list(vectors)
    new = torch.stack(list(vectors.values())).to(table.weight)
    rows = torch.cat([table.weight.detach()[:first], new, table.weight.detach()[first:]])
    tokenizer.add_tokens(names)
    if tokenizer.convert_tokens_to_ids(names) != list(range(first, first + len(names))):
        _forget(tokenizer, set(names))
        raise ValueError(f"the tokenizer does not number new tokens from {first} on: {type(tokenizer).__name__}")
    _set_rows(text_encoder, rows)


def _remove(tokenizer: Any, text_encoder: Any, names: set[str]) -> None:
    refuse("unload_textual_inversion", text_encoder)
    weight = text_encoder.get_input_embeddings().weight.detach()
    keep = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    keep[tokenizer.convert_tokens_to_ids(sorted(names))] = False
    rows = weight[keep]
    _forget(tokenizer, names)
    _set_rows(text_encoder, rows)


def _set_rows(text_encoder: Any, rows: Tensor) -> None:
    table = text_encoder.get_input_embeddings()
    table.weight = nn.Parameter(rows, requires_grad=table.weight.requires_grad)
    table.num_embeddings = text_encoder.config.vocab_size = len(rows)


def _forget(tokenizer: Any, names: set[str]) -> None:
    """Take added tokens away from a tokenizer, and number those after them anew.

    Its library, tokenizers, has no such function: what it saves is made anew without them.
    """
    from tokenizers import Tokenizer

    if not hasattr(tokenizer, "_tokenizer"):
        raise ValueError(f"{type(tokenizer).__name__} gives no tokens back; expected a tokenizer of transformers 5")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    gone = sorted(t["id"] for t in state["added_tokens"] if t["content"] in names)
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in names]
    for token in state["added_tokens"]:
        if token["special"] and token["id"] > gone[0]:
            raise ValueError(f"{token['content']!r} was added after {sorted(names)}: these cannot be taken away")
        token["id"] -= sum(i < token["id"] for i in gone)
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
