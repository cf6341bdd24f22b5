"""What is imported when: `import sdedit` is light, and `sdedit run` does without transformers and torch's compiler."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from conftest import picture
from sdedit.commands.drawing import load_model
from sdedit.inputs.prompts import encode_texts, tokenize
from sdedit.inputs.weighting import chunks
from sdedit.loading.folders import DEFAULT_MODEL
from sdedit.loading.pretrained import quick_parts
from sdedit.loading.tokenizer import CLIPTokens

HEAVY = ("transformers", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "scipy", "sklearn")


def modules(code: str, *arguments: str) -> set[str]:
    """The modules that a process has loaded after `code`."""
    code = f"import sys\n{code}\nprint('\\n'.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(run.stdout.splitlines())


def test_the_package_alone_is_light() -> None:
    loaded = modules("import sdedit; dir(sdedit)")
    assert "sdedit" in loaded
    assert not loaded & {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "tqdm", "typer"}


def test_the_command_line_is_light_until_it_draws() -> None:
    loaded = modules("import sdedit.commands.cli")
    assert "typer" in loaded and not loaded & {"torch", "transformers", "huggingface_hub", "numpy"}


def test_a_picture_needs_neither_transformers_nor_the_compiler(tmp_path: Path) -> None:
    picture(128, 128).save(tmp_path / "in.png")
    arguments = ["run", str(tmp_path / "in.png"), "a cat", "-o", str(tmp_path / "out.png"), "--steps", "2"]
    loaded = modules("import sdedit.commands.cli\ntry: sdedit.commands.cli.main()\nexcept SystemExit: pass", *arguments)
    assert (tmp_path / "out.png").is_file() and "torch" in loaded
    assert not loaded & set(HEAVY)


@pytest.fixture(scope="module")
def words() -> tuple[Any, Any]:
    folder = DEFAULT_MODEL / "tokenizer"
    return CLIPTokens(folder), CLIPTokenizer.from_pretrained(folder)


@given(st.text(max_size=60) | st.from_regex(r"([a-z]{1,9}[ ,.!0-9']{1,3}){0,30}", fullmatch=True))
@settings(max_examples=200, deadline=None)
def test_tokens_are_those_of_transformers(words: tuple[Any, Any], text: str) -> None:
    ours, theirs = words
    text = text.encode("utf-8", "replace").decode()
    assert ours(text).input_ids == theirs(text).input_ids
    assert (
        ours([text, "a"], add_special_tokens=False).input_ids == theirs([text, "a"], add_special_tokens=False).input_ids
    )
    settings: Any = {"padding": "max_length", "max_length": 9, "truncation": True, "return_tensors": "pt"}
    assert torch.equal(ours([text, ""], **settings).input_ids, theirs([text, ""], **settings).input_ids)
    assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids)


@pytest.mark.parametrize(
    "text",
    ["<|endoftext|> a <|startoftext|>b", "it's 12 o'clock", "É ß ǅ 中文", "a\t\n b", "a!!! b", "(cat:1.3) [dog]"],
)
def test_odd_texts_and_weights_too(words: tuple[Any, Any], text: str) -> None:
    ours, theirs = words
    assert ours(text).input_ids == theirs(text).input_ids
    assert chunks(ours, text) == chunks(theirs, text)
    assert len(ours) == len(theirs) and ours.model_max_length == theirs.model_max_length
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_a_prompt_that_is_too_long_is_cut_with_the_same_warning(words: tuple[Any, Any]) -> None:
    warned = []
    for tokenizer in words:
        with pytest.warns(UserWarning, match="was cut off") as caught:
            ids = tokenize(tokenizer, ["red apple " * 30], 32)
        warned.append((str(caught[0].message), ids.tolist()))
    assert warned[0] == warned[1]


@pytest.fixture(params=["quick_gelu", "gelu"])
def plain_folder(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> Path:
    """A model folder with the tokenizer's published files, and names as transformers wrote them before 5.6."""
    from conftest import clip_vocabulary

    copy = tmp_path / "sd"
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "tokenizer")
    clip_vocabulary(copy / "tokenizer")
    config = copy / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"quick_gelu"', f'"{request.param}"'))
    weights = copy / "text_encoder" / "model.safetensors"
    old = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(weights).items()}
    save_file(old, weights, metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
def test_prompt_embeds_are_those_of_transformers(plain_folder: Path, clip_skip: int | None) -> None:
    parts = quick_parts(plain_folder, torch.float32)
    tokenizer = CLIPTokenizer.from_pretrained(plain_folder / "tokenizer")
    model = CLIPTextModel.from_pretrained(plain_folder / "text_encoder").eval()
    texts = ["apple cat", "", "a " * 40]
    with torch.no_grad():
        expected = encode_texts(tokenizer, model, texts, clip_skip)
        torch.testing.assert_close(encode_texts(*parts.values(), texts, clip_skip), expected)


def test_commands_read_plain_folders_quickly_and_others_by_transformers(plain_folder: Path) -> None:
    assert load_model(str(plain_folder), torch.bfloat16).text_encoder.dtype == torch.bfloat16
    assert type(load_model(str(plain_folder), torch.float32).tokenizer) is CLIPTokens
    assert isinstance(load_model(str(plain_folder), torch.float32, adapted=True).text_encoder, CLIPTextModel)
    (plain_folder / "tokenizer" / "added_tokens.json").write_text('{"<new>": 520}')
    assert quick_parts(plain_folder, torch.float32) == {}
    (plain_folder / "tokenizer" / "added_tokens.json").unlink()
    index = plain_folder / "model_index.json"
    index.write_text(index.read_text().replace('"CLIPTextModel"', '"CLIPTextModelWithProjection"'))
    assert quick_parts(plain_folder, torch.float32) == {}


def test_a_text_encoder_that_does_not_fit_is_refused(plain_folder: Path) -> None:
    weights = plain_folder / "text_encoder" / "model.safetensors"
    state = load_file(weights)
    del state["text_model.final_layer_norm.bias"]
    save_file(state, weights)
    with pytest.raises(ValueError, match=r"- final_layer_norm\.bias"):
        load_model(str(plain_folder), torch.float32)
