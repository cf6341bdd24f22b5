"""Model folders: every layout loads, what is damaged is refused by name, and what is saved reads back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel

from conftest import SHARED, needs_shared, picture
from sdedit import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionSafetyChecker,
    UNet2DConditionModel,
)

load = StableDiffusionImg2ImgPipeline.from_pretrained
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder/model.safetensors"


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy of the model folder that a test may spoil."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def draw(pipe: Any, **arguments: Any) -> np.ndarray[Any, Any]:
    pipe.set_progress_bar_config(disable=True)
    arguments = {
        "num_inference_steps": 3,
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
        **arguments,
    }
    return np.asarray(pipe("an apple", image=picture(32, 32), **arguments).images)


@pytest.fixture(scope="module")
def drawn(folder: Path) -> np.ndarray[Any, Any]:
    return draw(load(folder))


def change(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a JSON file or the tensors of a weights file in place."""
    if path.suffix == ".json":
        held = json.loads(path.read_text())
        edit(held)
        path.write_text(json.dumps(held))
    else:
        tensors = load_file(path)
        edit(tensors)
        path.unlink()
        save_file(tensors, path)


def shard(path: Path, index: str, names: list[str]) -> None:
    """Split a weights file over `names`, listed in `index`."""
    tensors = load_file(path)
    path.unlink()
    where = {key: names[i % len(names)] for i, key in enumerate(tensors)}
    for name in names:
        part = {k: v for k, v in tensors.items() if where[k] == name}
        save_file(part, path.parent / name) if name.endswith("safetensors") else torch.save(part, path.parent / name)
    (path.parent / index).write_text(json.dumps({"metadata": {}, "weight_map": where}))


S = "diffusion_pytorch_model"
SHARDS = [
    (None, f"{S}.safetensors.index.json", f"{S}-0000%d-of-00002.safetensors"),
    (None, f"{S}.bin.index.json", f"{S}-0000%d-of-00002.bin"),
    ("fp16", f"{S}.safetensors.index.fp16.json", f"{S}.fp16-0000%d-of-00002.safetensors"),
    ("fp16", f"{S}.safetensors.fp16.index.json", f"{S}-0000%d-of-00002.fp16.safetensors"),
]


@pytest.mark.parametrize(("variant", "index", "pattern"), SHARDS)
def test_shards(copy: Path, drawn: Any, variant: str | None, index: str, pattern: str) -> None:
    whole = load(copy).unet.state_dict()
    shard(copy / UNET_FILE, index, [pattern % 1, pattern % 2])
    pipe = load(copy, variant=variant)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in pipe.unet.state_dict().items())
    # Mapped weights lie at whatever address their file has them, and products of unaligned ones round otherwise.
    np.testing.assert_allclose(draw(pipe), drawn, atol=1e-5)
    (copy / "unet" / (pattern % 2)).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002.* is missing"):
        load(copy, variant=variant)


def test_variants_and_kinds_of_file(copy: Path, drawn: Any) -> None:
    half = {k: v.half() for k, v in load_file(copy / UNET_FILE).items()}
    save_file(half, copy / "unet" / f"{S}.fp16.safetensors")
    pipe = load(copy, variant="fp16", torch_dtype=torch.float16)
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float16
    assert torch.equal(pipe.unet.conv_in.weight, half["conv_in.weight"])
    with pytest.raises(FileNotFoundError, match="'bf16'"):
        load(copy, variant="bf16")
    with pytest.raises(FileNotFoundError, match=r"\.bin"):
        load(copy, use_safetensors=False)
    for file, name in ((UNET_FILE, f"{S}.bin"), (VAE_FILE, f"{S}.bin"), (TEXT_FILE, "pytorch_model.bin")):
        path = copy / file
        torch.save(load_file(path), path.parent / name)
        path.unlink()
    np.testing.assert_array_equal(draw(load(copy)), drawn)
    np.testing.assert_array_equal(draw(load(copy, use_safetensors=False)), drawn)
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load(copy, use_safetensors=True)


def test_networks_alone(copy: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(copy, subfolder="unet", torch_dtype=torch.bfloat16)
    assert unet.dtype == torch.bfloat16 and not unet.training and unet.config.cross_attention_dim == 32
    assert UNet2DConditionModel.from_pretrained(copy / "unet").dtype == torch.float32
    unet.save_pretrained(copy / "other", variant="x")
    again = UNet2DConditionModel.from_pretrained(copy / "other", variant="x", torch_dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters(), strict=True))
    theirs = diffusers.UNet2DConditionModel.from_pretrained(copy / "other", variant="x", torch_dtype=torch.bfloat16)
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in again.state_dict().items())
    with pytest.raises(ValueError, match="safe_serialization"):
        unet.save_pretrained(copy / "other", safe_serialization=False)
    with pytest.raises(ValueError, match="AutoencoderKL"):
        AutoencoderKL.from_pretrained(copy, subfolder="unet")


def test_components_by_name(copy: Path, loaded: Any) -> None:
    shutil.rmtree(copy / "unet")
    pipe = load(copy, unet=loaded.unet, text_encoder=None, tokenizer=None, scheduler=DDIMScheduler())
    assert pipe.unet is loaded.unet and pipe.text_encoder is None and pipe.tokenizer is None
    embeds = torch.zeros(1, 77, 32)
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt_embeds=embeds, negative_prompt_embeds=embeds, image=picture(), num_inference_steps=2)
    with pytest.raises(ValueError, match="text encoder"):
        pipe("an apple", image=picture())
    with pytest.raises(TypeError, match="unnet"):
        load(copy, unnet=None)
    with pytest.raises(ValueError, match=r"lists no unet: pass unet="):
        load(copy, unet=None)
    with pytest.raises(ValueError, match="scheduler: str"):
        load(copy, unet=loaded.unet, scheduler="ddim")


def test_names_of_other_years(copy: Path, drawn: Any) -> None:
    """Attention of old VAEs, and text encoders with a prefix and position ids, or without."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(tensors: dict[str, Any]) -> None:
        for name in list(tensors):
            for new, was in old.items():
                if f".attentions.0.{new}." in name:
                    tensors[name.replace(new, was)] = tensors.pop(name)

    change(copy / VAE_FILE, age)
    assert any(".proj_attn." in name for name in load_file(copy / VAE_FILE))
    change(copy / "vae/config.json", lambda c: c.pop("scaling_factor"))
    bare = {k.removeprefix("text_model."): v for k, v in load_file(copy / TEXT_FILE).items()}
    for prefix, ids in (("text_model.", torch.arange(77.0)[None]), ("text_model.", torch.arange(77)[None]), ("", None)):
        tensors = {prefix + k: v for k, v in bare.items()}
        if ids is not None:
            tensors["text_model.embeddings.position_ids"] = ids
        (copy / TEXT_FILE).unlink()
        save_file(tensors, copy / TEXT_FILE)
        np.testing.assert_array_equal(draw(load(copy)), drawn)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n")


def widen(path: Path) -> None:
    change(path, lambda c: c.update(cross_attention_dim=48))


SPOILED: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "no index": ("model_index.json", Path.unlink, ["model_index.json", "does not exist"]),
    "broken index": ("model_index.json", truncate, ["model_index.json", "not a JSON file"]),
    "list": ("model_index.json", lambda p: p.write_text("[1]"), ["model_index.json", "list", "object"]),
    "odd entry": ("model_index.json", lambda p: change(p, lambda c: c.update(unet=["x"])), ["unet is ['x']"]),
    "unknown class": (
        "model_index.json",
        lambda p: change(p, lambda c: c.update(unet=["diffusers", "FluxTransformer2DModel"])),
        ["unet", "FluxTransformer2DModel"],
    ),
    "other transformers class": (
        "model_index.json",
        lambda p: change(p, lambda c: c.update(text_encoder=["transformers", "T5EncoderModel"])),
        ["text_encoder", "T5EncoderModel", "CLIP"],
    ),
    "unknown scheduler": (
        "model_index.json",
        lambda p: change(p, lambda c: c.update(scheduler=["diffusers", "FooScheduler"])),
        ["scheduler", "FooScheduler", "DDIMScheduler"],
    ),
    "SDXL": (
        "model_index.json",
        lambda p: change(
            p,
            lambda c: c.update(
                _class_name="StableDiffusionXLPipeline", text_encoder_2=["transformers", "CLIPTextModelWithProjection"]
            ),
        ),
        ["StableDiffusionXLPipeline", "text_encoder_2", "Stable Diffusion 1.x or 2.x"],
    ),
    "no unet listed": ("model_index.json", lambda p: change(p, lambda c: c.pop("unet")), ["no unet", "unet="]),
    "no folder": ("vae", shutil.rmtree, ["vae", "is missing", "vae=…"]),
    "no config": ("vae/config.json", Path.unlink, ["vae/config.json", "does not exist"]),
    "no text config": ("text_encoder/config.json", Path.unlink, ["text_encoder/config.json", "does not exist"]),
    "no weights": (UNET_FILE, Path.unlink, ["unet has no weights", "config.json"]),
    "truncated weights": (UNET_FILE, truncate, [UNET_FILE, "damaged"]),
    "truncated text weights": (TEXT_FILE, truncate, [TEXT_FILE, "damaged"]),
    "pointer": (VAE_FILE, lfs, [VAE_FILE, "git-lfs"]),
    "pointer config": ("unet/config.json", lfs, ["unet/config.json", "git-lfs"]),
    "pointer vocabulary": ("tokenizer/tokenizer.json", lfs, ["tokenizer/tokenizer.json", "git-lfs"]),
    "wrong width": ("unet/config.json", widen, [UNET_FILE, "attn2.to_k.weight is [32, 32]", "[32, 48] expected"]),
    "missing tensor": (
        UNET_FILE,
        lambda p: change(p, lambda t: t.pop("conv_in.bias")),
        ["- conv_in.bias [32] is missing"],
    ),
    "unknown tensor": (
        TEXT_FILE,
        lambda p: change(p, lambda t: t.update(x=torch.ones(3))),
        [TEXT_FILE, "+ x [3] is not expected", "CLIPTextModel"],
    ),
    "odd config": (
        "unet/config.json",
        lambda p: change(p, lambda c: c.update(addition_embed_type="text_time")),
        ["unet", "addition_embed_type", "'text_time'"],
    ),
    "odd value": (
        "unet/config.json",
        lambda p: change(p, lambda c: c.update(block_out_channels="x")),
        ["unet/config.json"],
    ),
    "odd scheduler": (
        "scheduler/scheduler_config.json",
        lambda p: change(p, lambda c: c.update(beta_schedule="foo")),
        ["beta_schedule", "foo"],
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_damaged_is_named(copy: Path, name: str) -> None:
    file, spoil, words = SPOILED[name]
    spoil(copy / file)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(copy)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("files", ["tokenizer.json", "vocab.json", "merges.txt"])
def test_damaged_vocabularies(copy: Path, files: str) -> None:
    """The layout of published folders, vocab.json and merges.txt, with one of them gone, cut or a pointer."""
    tokenizer = copy / "tokenizer"
    if files != "tokenizer.json":
        (tokenizer / "tokenizer.json").unlink(missing_ok=True)
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(copy / "vocabulary" / name, tokenizer / name)
        assert (
            load(copy).tokenizer("an apple cat").input_ids
            == load(copy / ".." / "model").tokenizer("an apple cat").input_ids
        )
    elif not (tokenizer / files).exists():
        pytest.skip("this release of transformers writes none")
    for spoil in (truncate, lfs, Path.unlink):
        kept = (tokenizer / files).read_bytes()
        if not (spoil is truncate and files == "merges.txt"):  # a shorter list of merges is a valid one
            spoil(tokenizer / files)
            with pytest.raises((ValueError, FileNotFoundError), match="tokenizer"):
                load(copy)
        (tokenizer / files).write_bytes(kept)


def test_inpainting_models_are_refused_by_name(copy: Path) -> None:
    change(copy / "unet/config.json", lambda c: c.update(in_channels=9))
    change(copy / UNET_FILE, lambda t: t.update({"conv_in.weight": torch.zeros(32, 9, 3, 3)}))
    with pytest.raises(ValueError, match=r"unet.*9 channels.*inpainting.*expected 4"):
        load(copy)


def test_parts_of_different_models_are_refused(copy: Path) -> None:
    config = CLIPTextConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match=r"text_encoder: gives 64 channels; the UNet reads 32"):
        load(copy, text_encoder=CLIPTextModel(config))
    words = {"hidden_size": 32, "vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens; the text encoder knows 100"):
        load(copy, text_encoder=CLIPTextModel(CLIPTextConfig.from_dict({**config.to_dict(), **words})))


def test_a_tokenizer_without_settings_takes_the_length_that_the_model_reads(copy: Path) -> None:
    (copy / "tokenizer/tokenizer_config.json").unlink()
    pipe = load(copy)
    assert pipe.tokenizer.model_max_length > 10**9
    assert pipe.encode_prompt("an apple")[0].shape == (1, 77, 32)


def test_paths_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder here"):
        load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        load(tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.safetensors is a file"):
        load(tmp_path / "a.safetensors")
    for choice in ({"torch_dtype": "float16"}, {"torch_dtype": torch.int8}, {"use_safetensors": "yes"}):
        for read in (load, UNet2DConditionModel.from_pretrained):
            with pytest.raises(ValueError, match=rf"{next(iter(choice))}=.*; expected"):
                read(tmp_path, **choice)


def test_saved_folders_are_read_by_both(copy: Path, tmp_path: Path, drawn: Any) -> None:
    load(copy).save_pretrained(tmp_path / "new" / "deep")
    np.testing.assert_array_equal(draw(load(tmp_path / "new" / "deep")), drawn)
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "new" / "deep")
    np.testing.assert_allclose(draw(theirs), drawn, atol=1e-4)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["deep"]  # nothing temporary is left
    with pytest.raises(ValueError, match="safe_serialization"):
        load(copy).save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match="is a file"):
        load(copy).save_pretrained(copy / "model_index.json")


def test_saving_over_the_folder_that_it_came_from(copy: Path, drawn: Any) -> None:
    """Mapped weights stay whole while their file is replaced; shards of before do not shadow the new weights."""
    shard(copy / UNET_FILE, f"{S}.safetensors.index.json", [f"{S}-00001-of-00001.safetensors"])
    pipe = load(copy)
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1
    changed = draw(pipe)
    assert np.abs(changed - drawn).max() > 1e-3
    pipe.save_pretrained(copy)
    np.testing.assert_array_equal(draw(pipe), changed)
    np.testing.assert_array_equal(draw(load(copy)), changed)
    np.testing.assert_allclose(draw(diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(copy)), changed, atol=1e-4)


def test_a_save_that_fails_leaves_the_folder_as_it_was(copy: Path, monkeypatch: pytest.MonkeyPatch, drawn: Any) -> None:
    pipe = load(copy)
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias += 1

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(type(pipe.scheduler), "save_config", fail)
    with pytest.raises(OSError, match="the disk is full; nothing of it is left"):
        pipe.save_pretrained(copy)
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    assert sorted(p.name for p in copy.parent.iterdir()) == ["model"]


@pytest.fixture(scope="module")
def checker() -> StableDiffusionSafetyChecker:
    torch.manual_seed(0)
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, patch_size=32)
    config = CLIPConfig(vision_config=vision, text_config=dict(hidden_size=32, num_hidden_layers=1), projection_dim=16)
    made = StableDiffusionSafetyChecker(config).eval()
    torch.nn.init.constant_(made.concept_embeds_weights, -1)  # everything is above the threshold
    return made


@needs_shared
def test_safety_checker(folder: Path, tmp_path: Path, checker: StableDiffusionSafetyChecker, drawn: Any) -> None:
    """With the feature extractor of SD 1.5's own folder: `CLIPFeatureExtractor`, whose class has gone."""
    target = Path(shutil.copytree(folder, tmp_path / "model"))
    shutil.copytree(SHARED / "data/sd15/feature_extractor", target / "feature_extractor")
    checker.save_pretrained(target / "safety_checker")
    entries = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    }
    change(target / "model_index.json", lambda c: c.update(entries))
    pipe = load(target)
    pipe.set_progress_bar_config(disable=True)
    arguments = dict(num_inference_steps=3, output_type="np")
    with pytest.warns(UserWarning, match="flagged 1 of 1"):
        out = pipe("an apple", image=picture(32, 32), generator=torch.Generator().manual_seed(0), **arguments)
    assert out.nsfw_content_detected == [True] and not out.images.any()
    np.testing.assert_array_equal(out.original_images, drawn)
    torch.nn.init.constant_(pipe.safety_checker.concept_embeds_weights, 2)
    out = pipe("an apple", image=picture(32, 32), generator=torch.Generator().manual_seed(0), **arguments)
    assert out.nsfw_content_detected == [False] and out.original_images is None
    np.testing.assert_array_equal(out.images, drawn)
    assert len(pipe("x", image=picture(32, 32), return_dict=False, **arguments)) == 2

    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved/model_index.json").read_text())
    assert index["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "saved")
    for reader in (load(tmp_path / "saved").safety_checker, theirs.safety_checker):
        for a, b in zip(reader.state_dict().values(), pipe.safety_checker.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    without = load(target, safety_checker=None)
    assert without.safety_checker is None
    with pytest.raises(ValueError, match="feature_extractor"):
        load(target, feature_extractor=None)


QUIET = """
import sys, logging
import sdedit
assert not {"torch", "transformers", "diffusers"} & set(sys.modules), "import sdedit must stay fast"
pipe = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(sys.argv[1])
assert "diffusers" not in sys.modules
pipe.set_progress_bar_config(disable=True)
from PIL import Image
pipe("an apple", image=Image.new("RGB", (16, 16)), num_inference_steps=2)
"""


def test_nothing_is_said_that_a_user_need_not_know(folder: Path) -> None:
    """In a process of its own: no messages of transformers about torchvision, no import of diffusers."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", QUIET, str(folder)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_shared
def test_the_configs_of_sd15(tmp_path: Path) -> None:
    """The real folder without its weights: what there is loads, and the weights are asked for by name."""
    shutil.copytree(SHARED / "data/sd15", tmp_path / "sd15")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(tmp_path / "sd15/unet")
        vae = AutoencoderKL.from_config(tmp_path / "sd15/vae")
    text = CLIPTextModel(CLIPTextModel.config_class.from_pretrained(tmp_path / "sd15/text_encoder"))
    pipe = load(tmp_path / "sd15", unet=unet, vae=vae, text_encoder=text, safety_checker=None)
    assert type(pipe.scheduler).__name__ == "PNDMScheduler" and pipe.tokenizer.model_max_length == 77
    assert pipe.tokenizer("a red apple").input_ids == [49406, 320, 736, 3055, 49407]
    assert type(pipe.feature_extractor).__name__.startswith("CLIPImageProcessor")
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load(tmp_path / "sd15")
