"""New words: every layout of their files, what they do to prompts and pictures, and that they go without a trace."""

from __future__ import annotations

import copy
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import sdedit
from conftest import SHARED, clip_vocabulary, needs_shared, picture
from sdedit.inputs import prompts, weighting

BIRB = SHARED / "data/adapters/textual_inversion_birb_style_sd15.bin"
WIDTH = 32


def vectors(count: int, seed: int = 0, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pipe(folder: Path) -> Any:
    made = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def state(pipe: Any) -> tuple[Any, ...]:
    """All that loading could change: the tokenizer as it would be saved, the encoder's config and weights as bytes."""
    pipe.tokenizer("a", padding="max_length", max_length=77, truncation=True)  # the serialised form keeps these
    encoder = pipe.text_encoder
    weights = {name: t.numpy().tobytes() for name, t in encoder.state_dict().items()}
    tokenizer = pipe.tokenizer
    return (
        tokenizer.backend_tokenizer.to_str(),
        len(tokenizer),
        tokenizer.get_vocab(),
        encoder.config.to_dict(),
        encoder.get_input_embeddings().num_embeddings,
        weights,
    )


def row(pipe: Any, token: str) -> torch.Tensor:
    return pipe.text_encoder.get_input_embeddings().weight[pipe.tokenizer.convert_tokens_to_ids(token)]


def layouts(folder: Path, data: torch.Tensor) -> dict[str, Path]:
    """The same vectors as each program writes them; the word is `word`, from the file or from its name."""
    made = {
        "diffusers .bin": ({"word": data}, "a.bin"),
        "diffusers .bin, legacy zip-less": ({"word": data}, "legacy.bin"),
        "diffusers .safetensors": ({"word": data}, "a.safetensors"),
        "web UI .pt": (
            {
                "string_to_token": {"*": 265},
                "string_to_param": {"*": nn.Parameter(data)},
                "name": "word",
                "step": 500,
                "sd_checkpoint": None,
            },
            "b.pt",
        ),
        "2022 .pt with a ParameterDict": (
            {
                "string_to_token": {"*": torch.tensor(265)},
                "string_to_param": nn.ParameterDict({"*": nn.Parameter(data)}),
            },
            "word.pt",
        ),
        "kohya .safetensors": ({"emb_params": data}, "word.safetensors"),
        "kohya .pt": ({"emb_params": data}, "other/word.pt"),
        "ordered dict": (OrderedDict(word=data), "ordered.bin"),
    }
    paths = {}
    for kind, (held, name) in made.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(held, path)
        else:
            torch.save(held, path, _use_new_zipfile_serialization="legacy" not in kind)
        paths[kind] = path
    return paths


LAYOUTS = [
    "diffusers .bin",
    "diffusers .bin, legacy zip-less",
    "diffusers .safetensors",
    "web UI .pt",
    "2022 .pt with a ParameterDict",
    "kohya .safetensors",
    "kohya .pt",
    "ordered dict",
]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(pipe: Any, tmp_path: Path, layout: str, count: int) -> None:
    before, data = state(pipe), vectors(count)
    path = layouts(tmp_path, data)[layout]
    (report,) = pipe.load_textual_inversion(path)
    assert (report.token, report.vectors) == ("word", count)
    assert report.left_out == (("step", "sd_checkpoint") if layout == "web UI .pt" else ())
    tokens = ["word", "word_1", "word_2"][:count]
    for token, vector in zip(tokens, data, strict=True):
        assert torch.equal(row(pipe, token), vector)
    ids = prompts.tokenize(pipe.tokenizer, ["a Word cat"], 77)[0, 1:-1].tolist()  # capitals are small letters to CLIP
    assert ids[1 : 1 + count] == pipe.tokenizer.convert_tokens_to_ids(tokens)
    assert pipe.unload_textual_inversion() == ["word"]
    assert state(pipe) == before


def test_one_vector_without_a_second_axis(pipe: Any) -> None:
    data = vectors(1)[0]
    assert pipe.load_textual_inversion({"<x>": data})[0].vectors == 1
    assert torch.equal(row(pipe, "<x>"), data)


def test_lists_and_tokens(pipe: Any, tmp_path: Path) -> None:
    before = state(pipe)
    one, three = vectors(1), vectors(3, 1)
    path = layouts(tmp_path, one)["kohya .safetensors"]
    reports = pipe.load_textual_inversion([path, {"<y>": three}, {"<z>": one}], token=["<x>", None, "<w>"])
    assert [(r.token, r.vectors) for r in reports] == [("<x>", 1), ("<y>", 3), ("<w>", 1)]
    assert torch.equal(row(pipe, "<y>_2"), three[2])
    # One of the middle goes: the others keep their vectors.
    assert pipe.unload_textual_inversion("<y>") == ["<y>"]
    assert prompts.embeddings(pipe.tokenizer) == {"<x>": ["<x>"], "<w>": ["<w>"]}
    assert torch.equal(row(pipe, "<x>"), one[0])
    assert torch.equal(row(pipe, "<w>"), one[0])
    assert len(pipe.tokenizer) == pipe.text_encoder.get_input_embeddings().num_embeddings == before[1] + 2
    pipe.load_textual_inversion(three, token="<v>")
    pipe.load_textual_inversion(three, token=["<s1>", "<s2>", "<s3>"])  # a tensor of single vectors
    assert torch.equal(row(pipe, "<s3>"), three[2])
    assert pipe.unload_textual_inversion(["<w>", "<x>"]) == ["<w>", "<x>"]
    assert torch.equal(row(pipe, "<v>_1"), three[1])
    pipe.unload_textual_inversion()
    assert pipe.unload_textual_inversion() == []
    assert pipe.load_textual_inversion([]) == []
    assert state(pipe) == before


def test_folders_and_names(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    save_file({"<x>": vectors(1)}, tmp_path / "sub/learned_embeds.safetensors")
    torch.save({"<y>": vectors(1)}, tmp_path / "sub/learned_embeds.bin")
    torch.save({"<z>": vectors(1)}, tmp_path / "mine.pt")
    assert pipe.load_textual_inversion(tmp_path / "sub")[0].token == "<x>"
    assert pipe.load_textual_inversion(tmp_path, subfolder="sub", use_safetensors=False)[0].token == "<y>"
    assert pipe.load_textual_inversion(str(tmp_path), weight_name="mine.pt")[0].token == "<z>"
    with pytest.raises(FileNotFoundError, match=r"it has mine\.pt, sub"):
        pipe.load_textual_inversion(tmp_path)
    with pytest.raises(ValueError, match=r"is not a \.safetensors file"):
        pipe.load_textual_inversion(tmp_path / "mine.pt", use_safetensors=True)
    with pytest.raises(FileNotFoundError, match="no file or folder here"):
        pipe.load_textual_inversion("nowhere.pt")
    with pytest.raises(TypeError, match="mirror"):
        pipe.load_textual_inversion(tmp_path, mirror="x")


def test_prompts_are_written_out_once_and_whole(pipe: Any) -> None:
    pipe.load_textual_inversion([{"bird": vectors(2)}, {"blackbird": vectors(1)}, {"<x>": vectors(3)}])
    convert = pipe.maybe_convert_prompt
    assert convert("a bird, a blackbird", pipe.tokenizer) == "a bird bird_1, a blackbird"
    assert convert(["a <X>", "none"], pipe.tokenizer) == ["a <x> <x>_1 <x>_2", "none"]
    once = convert("(<x>:1.2) BIRD", pipe.tokenizer)
    assert once == "(<x> <x>_1 <x>_2:1.2) bird bird_1"
    assert convert(once, pipe.tokenizer) == once
    assert convert("bird_1 alone", pipe.tokenizer) == "bird_1 alone"
    assert convert("a ſtrange prompt", pipe.tokenizer) == "a ſtrange prompt"


def test_weighted_prompts(pipe: Any) -> None:
    pipe.load_textual_inversion({"<x>": vectors(3)})
    ids = pipe.tokenizer.convert_tokens_to_ids(["<x>", "<x>_1", "<x>_2"])
    ((tokens, weights),) = weighting.chunks(pipe.tokenizer, "a (<x>:1.5) cat")
    assert tokens[1:4] == ids
    assert weights == [1.0, 1.5, 1.5, 1.5, 1.0]


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "width of SD 2": ({"<x>": vectors(1, width=1024)}, {}, r"1024 wide \(Stable Diffusion 2\.x\).* has 32"),
    "width of SD 1": ({"<x>": vectors(1, width=768)}, {}, r"768 wide \(Stable Diffusion 1\.x\)"),
    "SDXL": ({"clip_l": vectors(1, width=768), "clip_g": vectors(1, width=1280)}, {}, "SDXL"),
    "in the vocabulary": ({"apple</w>": vectors(1)}, {}, "'apple</w>' exists already"),
    "a special token": ({"<|endoftext|>": vectors(1)}, {}, "exists already"),
    "loaded already": ({"<old>": vectors(1)}, {}, "'<old>' exists already: give another one with token=, or unload"),
    "loaded already but for capitals": ({"<OLD>": vectors(1)}, {}, "exists already"),
    "one of its vectors": ({"<old>_1": vectors(1)}, {}, "exists already"),
    "twice in a list": ([{"<x>": vectors(1)}, {"<x>": vectors(1)}], {}, "'<x>' exists already"),
    "read as a vector": ({"<old>_2": vectors(1)}, {}, "would be taken for a vector of '<old>'"),
    "read as a vector, in a list": ([{"<x>_1": vectors(1)}, {"<x>": vectors(1)}], {}, "taken for a vector of '<x>'"),
    "NaN": ({"<x>": vectors(1) * float("nan")}, {}, "NaN or infinity"),
    "whole numbers": ({"<x>": torch.ones(1, WIDTH, dtype=torch.long)}, {}, "expected the vectors"),
    "three axes": ({"<x>": torch.ones(1, 1, WIDTH)}, {}, "expected the vectors"),
    "more than a prompt": ({"<x>": vectors(76)}, {}, "76 vectors, but a prompt has room for 75"),
    "a bomb": ({"<x>": torch.zeros(1, 1).expand(2_000_000, 2_000_000)}, {}, "2000000 wide"),
    "a long bomb": ({"<x>": torch.zeros(1, 1).expand(2_000_000, WIDTH)}, {}, "2000000 vectors, but a prompt has room"),
    "a LoRA": ({"lora_unet_x.lora_down.weight": vectors(4)}, {}, "no textual inversion"),
    "empty": ({}, {}, "no textual inversion"),
    "text": (["<x>", {}], {}, "no file or folder here"),
    "two parameters": ({"string_to_param": {"*": vectors(1), "+": vectors(1)}}, {}, "2 entries"),
    "no token": ({"string_to_param": {"*": vectors(1)}}, {}, "does not say its token"),
    "an empty token": ({" ": vectors(1)}, {}, "does not say its token"),
    "a second one is bad": ([{"<x>": vectors(1)}, {"<y>": vectors(1, width=8)}], {}, "8 wide"),
    "too many tokens": ({"<x>": vectors(1)}, {"token": ["<y>", "<z>"]}, "2 of them for 1 embeddings"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_failed_load_leaves_everything_as_it_was(pipe: Any, case: str) -> None:
    source, arguments, message = REFUSED[case]
    pipe.load_textual_inversion({"<old>": vectors(2)})
    before = state(pipe)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pipe.load_textual_inversion(source, **arguments)
    assert state(pipe) == before


def test_a_tokenizer_that_numbers_otherwise_is_left_as_it_was(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state(pipe)
    add = pipe.tokenizer.add_tokens
    monkeypatch.setattr(pipe.tokenizer, "add_tokens", lambda names: add(names[::-1]))
    with pytest.raises(ValueError, match="does not number"):
        pipe.load_textual_inversion({"<x>": vectors(2)})
    assert state(pipe) == before


@pytest.mark.parametrize("name", ["code.pt", "notes.pt", "x.safetensors", "pointer.pt", "bomb.pt"])
def test_damaged_and_hostile_files(pipe: Any, tmp_path: Path, name: str) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "pwned").touch, ())

    path = tmp_path / name
    if name == "code.pt":
        torch.save({"string_to_param": {"*": vectors(1)}, "name": Code()}, path)
    elif name == "bomb.pt":  # 64 KB that unpack to 64 MB
        torch.save({"<x>": torch.zeros(500_000, WIDTH)}, tmp_path / "plain.pt")
        with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
            for member in plain.namelist():
                bomb.writestr(member, plain.read(member))
    else:
        path.write_bytes(b"version https://git-lfs" if name == "pointer.pt" else b"nothing of the kind")
    before = state(pipe)
    why = {"code.pt": "code is not run", "pointer.pt": "git-lfs pointer"}.get(name, "damaged")
    with pytest.raises(ValueError, match=why):
        pipe.load_textual_inversion(path)
    assert state(pipe) == before
    assert not (tmp_path / "pwned").exists()


def test_rows_that_no_token_uses_are_kept(pipe: Any) -> None:
    table = pipe.text_encoder.get_input_embeddings()
    table.weight = nn.Parameter(torch.cat([table.weight.detach(), torch.full((6, WIDTH), 7.0)]))
    table.num_embeddings = pipe.text_encoder.config.vocab_size = len(table.weight)
    before = state(pipe)
    pipe.load_textual_inversion({"<x>": vectors(2)})
    assert torch.equal(row(pipe, "<x>_1"), vectors(2)[1])
    pipe.unload_textual_inversion()
    assert state(pipe) == before


def test_dtype_and_given_parts(pipe: Any) -> None:
    pipe.text_encoder.to(torch.bfloat16)
    tokenizer, encoder = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.text_encoder)
    pipe.load_textual_inversion({"<x>": vectors(1)}, tokenizer=tokenizer, text_encoder=encoder)
    assert prompts.embeddings(pipe.tokenizer) == {}
    weight = encoder.get_input_embeddings().weight
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight[-1], vectors(1)[0].bfloat16())
    pipe.unload_textual_inversion(tokenizer=tokenizer, text_encoder=encoder)
    assert torch.equal(encoder.get_input_embeddings().weight, pipe.text_encoder.get_input_embeddings().weight)
    with pytest.raises(ValueError, match=r"\['<x>'\] are not loaded; loaded are none"):
        pipe.unload_textual_inversion("<x>")
    with pytest.raises(ValueError, match="no text encoder"):
        sdedit.StableDiffusionImg2ImgPipeline(**{**pipe.components, "text_encoder": None}).load_textual_inversion({})


def test_they_survive_saving_the_pipeline(pipe: Any, tmp_path: Path) -> None:
    before = state(pipe)
    pipe.load_textual_inversion({"<x>": vectors(2)})
    pipe.save_pretrained(tmp_path / "saved")
    again = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "saved")
    assert again.maybe_convert_prompt("<x>", again.tokenizer) == "<x> <x>_1"
    assert torch.equal(row(again, "<x>_1"), vectors(2)[1])
    again.unload_textual_inversion()
    assert state(again)[1:3] == before[1:3]
    assert state(again)[5] == before[5]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("count", [1, 3])
def test_pictures_are_those_of_diffusers(pipe: Any, folder: Path, tmp_path: Path, count: int) -> None:
    torch.save({"<x>": vectors(count) * 3}, tmp_path / "learned_embeds.bin")
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)

    def draw(pipe: Any, prompt: str, negative: str) -> Any:
        return pipe(
            prompt,
            image=picture(),
            negative_prompt=negative,
            num_inference_steps=4,
            strength=0.75,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images

    plain = draw(pipe, "a cat in the style of <x>", "")
    for one in (pipe, theirs):
        one.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.bin")
    for prompt, negative in (("a cat in the style of <x>", ""), ("an apple", "ugly, <x>"), ("<x>", "<x>")):
        assert np.abs(draw(pipe, prompt, negative) - draw(theirs, prompt, negative)).max() < 1e-4
    assert np.abs(draw(pipe, "a cat in the style of <x>", "") - plain).max() > 1e-3  # it does something
    pipe.unload_textual_inversion()
    assert np.array_equal(draw(pipe, "a cat in the style of <x>", ""), plain)


@needs_shared
def test_a_real_file(tmp_path: Path) -> None:
    clip_vocabulary(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=64, num_hidden_layers=2, num_attention_heads=12
    )
    encoder = CLIPTextModel(config).eval()
    loader = sdedit.StableDiffusionImg2ImgPipeline.__new__(sdedit.StableDiffusionImg2ImgPipeline)
    loader.tokenizer, loader.text_encoder = tokenizer, encoder
    before = state(loader)
    (report,) = loader.load_textual_inversion(BIRB)
    assert str(report) == "'<birb-style>', 1 vector"
    theirs = torch.load(BIRB, weights_only=True)["<birb-style>"]
    assert torch.equal(row(loader, "<birb-style>"), theirs)
    ids = torch.from_numpy(prompts.tokenize(tokenizer, ["a cat, <birb-style>"], 77))
    assert torch.isfinite(prompts.encode(encoder, ids)).all()
    loader.unload_textual_inversion()
    assert state(loader) == before


@needs_shared
def test_a_real_file_for_another_model(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"768 wide \(Stable Diffusion 1\.x\); this pipeline's text encoder has 32"):
        pipe.load_textual_inversion(BIRB)
