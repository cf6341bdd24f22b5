"""CLIP's tokenizer: for single files from the vocabulary that travels with the package, and a quick one for commands.

The quick one does without transformers, whose import takes half of the time of a small model's first picture.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from sdedit.files import disk_errors, read_json

MERGES = Path(__file__).parent / "clip_vocabulary" / "merges.txt.gz"
SIZE = 49408

# Words, single digits and runs of other signs; endings such as 's are words of their own.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


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
    with tempfile.TemporaryDirectory() as folder, disk_errors(folder):
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


class CLIPTokens:
    """What prompts need of a tokenizer: text to ids and back.

    Args:
        folder: With vocab.json, merges.txt and tokenizer_config.json.

    Attributes:
        model_max_length: Tokens that the model reads.
        bos_token_id, eos_token_id, pad_token_id: Numbers of the tokens that begin, end and fill up.
    """

    def __init__(self, folder: Path) -> None:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
        from tokenizers.models import BPE

        settings = read_json(folder / "tokenizer_config.json")
        names = {key: str(content(settings[key])) for key in SPECIAL_TOKENS}
        model = BPE.from_file(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            end_of_word_suffix="</w>",
            unk_token=names["unk_token"],
        )
        self.model_max_length: int = settings["model_max_length"]
        self._tokenizer = made = Tokenizer(model)
        made.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names.values()])
        numbers: list[Any] = [made.token_to_id(name) for name in names.values()]
        self.bos_token_id, self.eos_token_id, _, self.pad_token_id = numbers
        begin, end = names["bos_token"], names["eos_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}", special_tokens=[(begin, self.bos_token_id), (end, self.eos_token_id)]
        )

    def __len__(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: str | None = None,
        max_length: int | None = None,
        truncation: bool = False,
        return_tensors: str | None = None,
        verbose: bool = True,
    ) -> SimpleNamespace:
        """`input_ids` of one text or several: lists, or by `return_tensors` ("pt", "np") an array (B, M)."""
        texts = [text] if isinstance(text, str) else list(text)
        ids = [e.ids for e in self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)]
        if truncation and max_length is not None:
            ids = [row if len(row) <= max_length else [*row[: max_length - 1], self.eos_token_id] for row in ids]
        if padding == "max_length" and max_length is not None:
            ids = [row + [self.pad_token_id] * (max_length - len(row)) for row in ids]
        if return_tensors == "pt":
            import torch

            return SimpleNamespace(input_ids=torch.tensor(ids))
        if return_tensors is not None:
            return SimpleNamespace(input_ids=np.array(ids))
        return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False)).replace("</w>", " ").strip()


def content(token: Any) -> str | None:
    """A special token is written as a string, or as an object with flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
