"""Long and weighted prompts, as AUTOMATIC1111's web UI writes them.

`(word)` weighs 1.1 times, `(word:1.3)` 1.3 times, `[word]` 1/1.1 times, brackets nest, a backslash makes a bracket
ordinary, and `BREAK` begins a new chunk. A prompt is cut into chunks of as many tokens as the text encoder reads (75
for CLIP); each is encoded alone, and the UNet attends to all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdedit.inputs import prompts

_PIECE = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL)
_MORE = 1.1

Fragment = tuple[str, float | None]  # text and its weight; no weight marks a break
Chunk = tuple[list[int], list[float]]  # token ids and their weights


def parse(prompt: str) -> list[Fragment]:
    """Fragments of a prompt with their weights; a weight of `None` stands for a break.

    Brackets without a partner are taken as closed at the end of the prompt, or as ordinary text.
    """
    found: list[Fragment] = []
    opened: list[tuple[str, int]] = []

    def weigh(start: int, factor: float) -> None:
        found[start:] = [(t, None if w is None else w * factor) for t, w in found[start:]]

    for match in _PIECE.finditer(prompt):
        piece = match[0]
        innermost = opened[-1][0] if opened else ""
        if piece in ("(", "["):
            opened.append((piece, len(found)))
        elif match[1] is not None and innermost == "(":
            weigh(opened.pop()[1], float(match[1]))
        elif piece == ")" and innermost == "(":
            weigh(opened.pop()[1], _MORE)
        elif piece == "]" and innermost == "[":
            weigh(opened.pop()[1], 1 / _MORE)
        elif piece == "BREAK":
            found.append((piece, None))
        else:
            found.append((piece[1:] if piece[0] == "\\" and len(piece) > 1 else piece, 1.0))
    for bracket, start in reversed(opened):
        weigh(start, _MORE if bracket == "(" else 1 / _MORE)
    return _merged(found)


def _merged(fragments: list[Fragment]) -> list[Fragment]:
    """Neighbours of the same weight as one fragment."""
    merged: list[Fragment] = []
    for text, weight in fragments:
        if merged and weight is not None and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        else:
            merged.append((text, weight))
    return merged


def chunks(tokenizer: Any, prompt: str) -> list[Chunk]:
    """The prompt's tokens with their weights, in chunks of at most `model_max_length - 2`; at least one."""
    room = tokenizer.model_max_length - 2
    made: list[Chunk] = [([], [])]
    for text, weight in parse(prompt):
        if weight is None:
            made.append(([], []))
            continue
        for token in tokenizer(prompts.expand(tokenizer, text), add_special_tokens=False).input_ids:
            if len(made[-1][0]) == room:
                made.append(([], []))
            made[-1][0].append(token)
            made[-1][1].append(weight)
    return made


def length(tokenizer: Any, texts: Sequence[str]) -> int:
    """Tokens of the prompt embeds that the longest of these prompts needs, chunk by chunk."""
    return int(max(len(chunks(tokenizer, text)) for text in texts) * tokenizer.model_max_length)


def encode(
    tokenizer: Any, text_encoder: Any, texts: Sequence[str], clip_skip: int | None = None, length: int | None = None
) -> Tensor:
    """Prompt embeds (B, M, C) of weighted prompts; shorter prompts are filled up with empty chunks.

    Each token's hidden state is multiplied by its weight, and each chunk scaled back to the size (root mean square)
    that it had. The web UI scales back to the mean, which for some text encoders is zero but for rounding.

    Args:
        length: M, a multiple of the tokenizer's length; as the longest prompt needs if not given.
    """
    room = tokenizer.model_max_length
    cut = [chunks(tokenizer, text) for text in texts]
    needed = max(map(len, cut)) * room
    length = length or needed
    if length % room or needed > length:
        raise ValueError(f"prompt: its chunks need {needed} tokens, and the embeds beside it have {length}")
    count = length // room
    ids, weights = [], []
    for one in cut:
        for tokens, its_weights in [*one, *[([], [])] * (count - len(one))]:
            padding = [tokenizer.pad_token_id] * (room - 2 - len(tokens))
            ids.append([tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id, *padding])
            weights.append([1.0, *its_weights, *[1.0] * (room - 1 - len(its_weights))])
    hidden = prompts.encode(text_encoder, torch.tensor(ids), clip_skip)
    weighed = hidden * torch.tensor(weights).to(hidden)[..., None]
    size, grown = (h.float().square().mean((1, 2), keepdim=True).sqrt() for h in (hidden, weighed))
    weighed = (weighed * (size / grown.clamp(min=1e-12))).to(hidden.dtype)
    # A chunk without weights keeps its states to the last bit.
    plain = torch.tensor([all(w == 1 for w in row) for row in weights], device=hidden.device)[:, None, None]
    return torch.where(plain, hidden, weighed).reshape(len(texts), length, -1)
