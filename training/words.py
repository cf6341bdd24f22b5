"""The tokenizer: CLIP's kind of byte-pair vocabulary, learned from the captions, and the small text encoder's config.

    python training/words.py

writes `tokenizer/` into the work folder.
"""

import json
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTokenizer

from captions import caption, things
from data import load
from paths import work_folder, write_json

LENGTH = 32  # tokens in a prompt, first and last included
MERGES = 1500
START, END = "<|startoftext|>", "<|endoftext|>"
WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # how CLIP's tokenizer splits text into words


def learn(captions: Counter[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges: every byte, every byte at a word's end, what the captions merge most often, two marks."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(bytes_) + MERGES, initial_alphabet=bytes_, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions.elements(), trainer)

    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    symbols = bytes_ + [byte + "</w>" for byte in bytes_] + ["".join(pair) for pair in merges] + [START, END]
    return {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}, merges


def write(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(vocabulary, folder / "vocab.json")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(marks, folder / "special_tokens_map.json")
    write_json(
        {
            **marks,
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": LENGTH,
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
        },
        folder / "tokenizer_config.json",
    )


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        projection_dim=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def learned_tokenizer() -> CLIPTokenizer:
    """The tokenizer in the work folder; learned first when it is missing."""
    folder = work_folder() / "tokenizer"
    if not (folder / "vocab.json").exists():
        rng = np.random.default_rng(0)
        _, items = load()
        captions: Counter[str] = Counter()
        for item in items:
            for _ in range(20 if item.name in things() else 3):
                captions[caption(item, rng)] += 1
        write(folder, *learn(captions))
    return CLIPTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    made = learned_tokenizer()
    for text in ("red apple, 3d", "a grinning cat, twemoji", "façade 42 — ☕"):
        print(text, made.tokenize(text))
    print(len(made), "tokens")
