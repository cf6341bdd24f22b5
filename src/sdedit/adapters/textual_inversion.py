"""Textual inversion (arXiv 2208.01618): new words for the text encoder, each of one or several learned vectors.

A word T of n vectors becomes n tokens T, T_1, …, T_(n-1), each with one row in the text encoder's embedding table; a
prompt names T, and `prompts.expand` writes out the rest. Loading compares everything first and then inserts the rows
where the tokenizer's numbers end; unloading takes out exactly these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sdedit.adapters.embedding_files import EmbeddingReport, Source, check_embeddings, read_embeddings, tokens_of
from sdedit.adapters.nested import read_nested
from sdedit.inputs import prompts
from sdedit.models.offload import refuse


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
        found = read_embeddings(
            pretrained_model_name_or_path,
            token,
            read_nested,
            weight_name=weight_name,
            subfolder=subfolder,
            use_safetensors=use_safetensors,
            **hub,
        )
        table = text_encoder.get_input_embeddings().weight
        room = getattr(text_encoder.config, "max_position_embeddings", 77) - 2
        check_embeddings(found, tokenizer, tuple(table.shape), room)
        vectors = {
            name: row
            for one in found
            for name, row in zip(tokens_of(str(one.token), len(one.vectors)), one.vectors, strict=True)
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
