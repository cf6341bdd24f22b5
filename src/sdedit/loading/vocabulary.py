"""CLIP's tokenizer from the vocabulary that travels with the package, for single files, which have none in them."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"
SIZE = 49408


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    """The tokenizer of Stable Diffusion 1.x; 2.x pads with `"!"`."""
    from transformers import CLIPTokenizer

    merges = gzip.decompress(MERGES.read_bytes()).decode()
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "errors": "replace",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    # A folder is the one form that all versions of transformers read.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "merges.txt").write_text(merges, encoding="utf-8")
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary(merges)), encoding="utf-8")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def vocabulary(merges: str) -> dict[str, int]:
    """Tokens and their numbers, from the merges: a symbol for each byte, the same ending a word, then the merges.

    Bytes that can be printed stand for themselves and come first; the others stand for themselves plus 256 and more.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merged = ["".join(line.split()) for line in merges.splitlines()[1:] if line]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *merged, "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}
