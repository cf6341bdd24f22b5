"""Long and weighted prompts, as AUTOMATIC1111's web UI reads them.

The grammar, as its behaviour shows it:

    prompt  = { piece }
    piece   = "\\(" | "\\)" | "\\[" | "\\]" | "\\\\"   that character, as text
            | "\\"                                      nothing
            | "("                                       opens a round bracket
            | ":" number ")"                            closes the last round one: what is in it weighs number times
            | ")"                                       closes the last round one: 1.1 times
            | "["                                       opens a square bracket
            | "]"                                       closes the last square one: 1/1.1 times
            | "BREAK"                                   as a word: begins a new chunk
            | any other character                       text

Round and square brackets do not see each other: `([a)b]` weighs `a` by both. What closes a bracket that is not open is
text; what is open at the end is closed there, without a number. Unlike there, BREAK is one within brackets, too.

A prompt is cut into chunks of as many tokens as the text encoder reads (75 for CLIP); each is encoded alone, and the
UNet attends to all of them. A chunk that is full is cut after its last comma if that is among its last 20 tokens, and
the vectors of a textual inversion stay together.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdedit.inputs import prompts

_PIECE = re.compile(r"\\[()\[\]\\]?|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|\bBREAK\b|[^\\()\[\]:B]+|.", re.DOTALL)
_MORE = 1.1
_BACK = 20  # tokens that a full chunk is cut before its end for a comma's sake, at most
# What the web UI reads in prompts and this module does not: its name, and how it looks.
_FOREIGN = {
    "prompt editing": re.compile(r"(?<!\\)\[[^\[\]]*:\s*\d*\.?\d+\s*\]"),
    "alternating words": re.compile(r"(?<!\\)\[[^\[\]|]*\|[^\[\]]*\]"),
    "composition": re.compile(r"\bAND\b"),
    "an extra network": re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>"),
}

Fragment = tuple[str, float | None]  # text and its weight; no weight marks a break
Chunk = tuple[list[int], list[float]]  # token ids and their weights


def parse(prompt: str) -> list[Fragment]:
    """Fragments of a prompt with their weights, by the grammar above; a weight of `None` stands for a break."""
    found: list[Fragment] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where brackets that are open begin

    def close(bracket: str, factor: float) -> None:
        start = opened[bracket].pop()
        found[start:] = [(t, None if w is None else w * factor) for t, w in found[start:]]

    for match in _PIECE.finditer(prompt):
        piece = match[0]
        if piece in opened:
            opened[piece].append(len(found))
        elif piece[-1] == ")" and piece[0] in ":)" and opened["("]:
            close("(", _MORE if match[1] is None else float(match[1]))
        elif piece == "]" and opened["["]:
            close("[", 1 / _MORE)
        elif piece == "BREAK":
            found.append((piece, None))
        elif piece != "\\":
            found.append((piece.removeprefix("\\"), 1.0))
    for bracket, factor in (("(", _MORE), ("[", 1 / _MORE)):
        while opened[bracket]:
            close(bracket, factor)
    return _merged(found)


def foreign(prompt: str) -> list[str]:
    """What of a prompt the web UI would read as more than words and weights, and is taken as words here."""
    seen = ((name, pattern.search(prompt)) for name, pattern in _FOREIGN.items())
    return [f"{match[0][:60]!r} ({name})" for name, match in seen if match]


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
    comma, together = tokenizer(",", add_special_tokens=False).input_ids, _inversions(tokenizer)
    made: list[Chunk] = [([], [])]
    for text, weight in parse(prompt):
        if weight is None:
            made.append(([], []))
            continue
        tokens = tokenizer(prompts.expand(tokenizer, text), add_special_tokens=False).input_ids
        while tokens:
            vectors = together.get(tokens[0], tokens[:1])
            unit = tokens[: len(vectors) if tokens[: len(vectors)] == vectors else 1][:room]
            while len(made[-1][0]) + len(unit) > room:
                made.append(_cut(made[-1], [] if unit == comma else comma, room))
            made[-1][0].extend(unit)
            made[-1][1].extend([weight] * len(unit))
            tokens = tokens[len(unit) :]
    return made[:-1] if len(made) > 1 and not made[-1][0] else made


def _cut(full: Chunk, comma: list[int], room: int) -> Chunk:
    """Take off a full chunk what follows a comma near its end; without one, or if there is room left, nothing."""
    tokens, weights = full
    near = range(room - 1, max(room - _BACK, 0) - 1, -1) if len(tokens) == room else ()
    at = next((i + 1 for i in near if tokens[i : i + 1] == comma), len(tokens))
    rest = tokens[at:], weights[at:]
    del tokens[at:], weights[at:]
    return rest


def _inversions(tokenizer: Any) -> dict[int, list[int]]:
    """The token ids of each textual inversion of several vectors, by the first of them."""
    names = [names for names in prompts.embeddings(tokenizer).values() if len(names) > 1]
    found = ([tokenizer.convert_tokens_to_ids(name) for name in of_one] for of_one in names)
    return {ids[0]: ids for ids in found}


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
    for text in texts:
        if unread := foreign(text):
            warnings.warn(f"prompt: taken as words, since it is not understood here: {', '.join(unread)}", stacklevel=2)
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
