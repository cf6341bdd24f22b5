"""Prompts to prompt embeds: the text encoder's hidden states, which the UNet attends to."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn


def embeddings(tokenizer: Any) -> dict[str, list[str]]:
    """Textual inversions that a tokenizer knows: each token T with the tokens of its vectors, T, T_1, T_2, …

    They are the tokens that were added to the vocabulary and are not special.
    """
    known: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    added = [known[i].content for i in sorted(known) if not known[i].special]
    found = {
        token: [token, *itertools.takewhile(added.__contains__, (f"{token}_{i}" for i in itertools.count(1)))]
        for token in added
    }
    later = {name for names in found.values() for name in names[1:]}
    return {token: names for token, names in found.items() if token not in later}


def expand(tokenizer: Any, prompt: str) -> str:
    """Write each textual inversion in a prompt out as the tokens of all its vectors: T becomes `T T_1 T_2`.

    Where they are written out already they stay as they are. Like CLIP, this takes capitals for small letters.
    """
    written: dict[str, str] = {}
    for token, names in embeddings(tokenizer).items():
        whole = " ".join(names)
        written |= {name.lower(): name for name in names} | {token.lower(): whole, whole.lower(): whole}
    if not written:
        return prompt
    # The longest first, so that no token is found inside another one.
    pattern = "|".join(map(re.escape, sorted(written, key=len, reverse=True)))
    return re.sub(pattern, lambda m: written.get(m[0].lower(), m[0]), prompt, flags=re.IGNORECASE)


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int) -> np.ndarray[Any, Any]:
    """Token ids (B, length), padded; a prompt that is too long is cut, with a warning that shows what was lost.

    Both are done here: a tokenizer that is asked to pad or to cut is switched to it for all threads that use it.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer: has no padding token; set tokenizer.pad_token, as CLIP's have one")
    rows = tokenizer([expand(tokenizer, prompt) for prompt in prompts], verbose=False).input_ids
    ids = np.full((len(rows), length), tokenizer.pad_token_id, np.int64)
    for row, prompt, filled in zip(rows, prompts, ids, strict=True):
        if len(row) > length:
            lost = tokenizer.decode(row[length - 1 : -1])
            warnings.warn(
                f"prompt: {prompt[:40]!r}… has {len(row) - 2} tokens, of which the model reads {length - 2}; "
                f"this was cut off: {lost!r}",
                stacklevel=2,
            )
            row = [*row[: length - 1], row[-1]]  # the mark of the end stays
        filled[: len(row)] = row
    return ids


def encode(text_encoder: Any, token_ids: Tensor, clip_skip: int | None = None) -> Tensor:
    """Hidden states (B, M, C) of token ids (B, M).

    Args:
        clip_skip: Leave out that many of the last layers; the final norm is applied all the same.
    """
    from sdedit.models.offload import execution_device

    config = text_encoder.config
    token_ids = token_ids.to(execution_device(text_encoder))
    if not clip_skip:
        return text_encoder(token_ids)[0]  # type: ignore[no-any-return]
    if not 0 < clip_skip < config.num_hidden_layers:
        raise ValueError(f"clip_skip={clip_skip}; expected 0 to {config.num_hidden_layers - 1} with this text encoder")
    hidden = text_encoder(token_ids, output_hidden_states=True).hidden_states[-(clip_skip + 1)]
    # transformers before 5.6 keeps the layers one level deeper.
    norm: nn.Module = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
    return norm(hidden)  # type: ignore[no-any-return]


def prompt_length(tokenizer: Any, text_encoder: Any) -> int:
    """Tokens that a model reads of a prompt, the first and last mark included."""
    # A tokenizer without settings says that there is no limit.
    return int(min(tokenizer.model_max_length, text_encoder.config.max_position_embeddings))


def encode_texts(
    tokenizer: Any, text_encoder: Any, texts: Sequence[str], clip_skip: int | None = None, length: int | None = None
) -> Tensor:
    """Prompt embeds (B, M, C) of texts; M is `length`, or as many tokens as the model reads."""
    import torch

    length = length or prompt_length(tokenizer, text_encoder)
    return encode(text_encoder, torch.from_numpy(tokenize(tokenizer, texts, length)), clip_skip)


def guidance_scale_embedding(scales: Sequence[float], dim: int) -> Tensor:
    """Sinusoids of the guidance scales, (B, dim), for models distilled with them (LCM, arXiv 2310.04378)."""
    import torch

    from sdedit.models.layers import timestep_embedding

    times = torch.tensor([(scale - 1) * 1000.0 for scale in scales])
    return timestep_embedding(times, dim, flip_sin_to_cos=False, freq_shift=1)
