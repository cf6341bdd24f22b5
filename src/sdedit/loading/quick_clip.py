"""CLIP's tokenizer and text encoder for commands, without transformers: half of a small model's first picture.

Only what needs nothing more is read so: a folder in the published layout. Anything else is left to transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sdedit.files import read_json
from sdedit.loading.checkpoint import fill
from sdedit.loading.folders import weights_in
from sdedit.loading.layout import clip_name
from sdedit.models.blank import blank
from sdedit.models.clip_text import CLIPTextEncoder

# Words, single digits and runs of other signs; endings such as 's are words of their own.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


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
        names = {key: str(_content(settings[key])) for key in _SPECIAL}
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
        if return_tensors is not None:
            made = np.array(ids)
            return SimpleNamespace(input_ids=torch.from_numpy(made) if return_tensors == "pt" else made)
        return SimpleNamespace(input_ids=ids[0] if isinstance(text, str) else ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False)).replace("</w>", " ").strip()


def quick_parts(folder: Path, torch_dtype: torch.dtype) -> dict[str, Any]:
    """Tokenizer and text encoder of a model folder, as arguments for `from_pretrained`; none if it is not plain.

    Raises:
        ValueError: A file is damaged, or its names and shapes are not those of the network.
    """
    index, words, network = folder / "model_index.json", folder / "tokenizer", folder / "text_encoder"
    if not _plain(index, words, network):
        return {}
    with blank():
        model = CLIPTextEncoder.from_config(network)
    fill(model, weights_in(network, None, None), dtype=torch_dtype, rename=clip_name)
    return {"tokenizer": CLIPTokens(words), "text_encoder": model.eval()}


def _plain(index: Path, words: Path, network: Path) -> bool:
    """Are these CLIP's own classes, with its own tokens and activations, and all files there?"""
    files = [
        index,
        words / "vocab.json",
        words / "merges.txt",
        words / "tokenizer_config.json",
        network / "config.json",
    ]
    if not all(file.is_file() for file in files) or (words / "added_tokens.json").exists():
        return False
    listed, settings, config = (read_json(file) for file in (files[0], files[3], files[4]))
    special = {_content(settings.get(key)) for key in _SPECIAL}
    length = settings.get("model_max_length")
    return (
        listed.get("tokenizer") == ["transformers", "CLIPTokenizer"]
        and listed.get("text_encoder") == ["transformers", "CLIPTextModel"]
        and config.get("hidden_act") in ("quick_gelu", "gelu")
        and isinstance(length, int)
        and length <= config.get("max_position_embeddings", 77)
        and None not in special
        and all(_content(token) in special for token in settings.get("added_tokens_decoder", {}).values())
    )


def _content(token: Any) -> str | None:
    """A special token is written as a string, or as an object with flags."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
