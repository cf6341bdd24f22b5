"""Single files: our tables turn a network into the layout of latent diffusion and back, and agree with diffusers'."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from conftest import SCHEDULE, SHARED, needs_shared, picture
from sdedit import AutoencoderKL, AutoencoderTiny, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from sdedit.apps.inspect import describe
from sdedit.loading import ldm, sizes
from sdedit.loading.headers import TensorInfo
from sdedit.loading.hub import find_file
from sdedit.loading.ldm import EMA_PREFIX
from sdedit.loading.single_file import SingleFile
from sdedit.loading.single_file_save import save_single_file
from sdedit.loading.tokenizer import SIZE, clip_tokenizer

SD2_UNET = dict(cross_attention_dim=1024, attention_head_dim=[5, 10, 20, 20], use_linear_projection=True)
SD1_UNET = dict(cross_attention_dim=768)
FULL = dict(block_out_channels=(320, 640, 1280, 1280))
SMALL = dict(block_out_channels=(32, 64, 128, 128))
SMALL_UNETS: dict[str, dict[str, Any]] = {
    "sd1": SMALL | dict(cross_attention_dim=64, sample_size=64, norm_num_groups=32),
    "sd2": SMALL | dict(cross_attention_dim=64, attention_head_dim=[1, 1, 2, 2], use_linear_projection=True),
}
BLOCKS = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


def text_encoder(kind: str, width: int, layers: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=SIZE,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=max(width // 64, 1),
            hidden_act="gelu" if kind == "sd2" else "quick_gelu",
            bos_token_id=0,
            eos_token_id=2,
        )
    )


def make(kind: str) -> StableDiffusionImg2ImgPipeline:
    """A model of the structure of SD 1.x or 2.x, a tenth as wide."""
    torch.manual_seed(0)
    return StableDiffusionImg2ImgPipeline(
        AutoencoderKL(block_out_channels=(32, 32, 64, 64), layers_per_block=2, **BLOCKS),
        text_encoder(kind, 64, 3),
        clip_tokenizer("!" if kind == "sd2" else "<|endoftext|>"),
        UNet2DConditionModel(**SMALL_UNETS[kind]),
        DDIMScheduler(**SCHEDULE),
        requires_safety_checker=False,
    )


@pytest.fixture(scope="module")
def small() -> dict[str, StableDiffusionImg2ImgPipeline]:
    return {kind: make(kind) for kind in ("sd1", "sd2")}


@pytest.fixture(scope="module")
def files(small: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    for kind, pipe in small.items():
        pipe.save_single_file(folder / f"{kind}.safetensors")
    return {kind: folder / f"{kind}.safetensors" for kind in small}


@pytest.fixture
def changed(files: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a file with other tensors in it."""

    def write(
        change: Callable[[dict[str, Any]], dict[str, Any]], kind: str = "sd1", name: str = "m.safetensors"
    ) -> Path:
        tensors = {k: t.contiguous() for k, t in change(load_file(files[kind])).items()}
        save_file(tensors, tmp_path / name)
        return tmp_path / name

    return write


def same(a: Any, b: Any) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --- The tables, at full size, on names and shapes alone. ---


def full_size(kind: str) -> list[tuple[str, Any, Any, Any, int]]:
    unet, layers, width = (SD1_UNET, 12, 768) if kind == "sd1" else (SD2_UNET, 23, 1024)
    parts = ldm.clip_parts if kind == "sd1" else ldm.open_clip_parts
    config = sizes.clip_config if kind == "sd1" else sizes.open_clip_config
    with torch.device("meta"):
        return [
            ("unet", UNet2DConditionModel(**FULL, **unet), ldm.unet_parts, sizes.unet_config, 686),
            (
                "vae",
                AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, **BLOCKS),
                ldm.vae_parts,
                sizes.vae_config,
                248,
            ),
            ("text", text_encoder(kind, width, layers), parts, config, 196 if kind == "sd1" else 372),
        ]


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_full_size_there_and_back(kind: str) -> None:
    for name, model, parts_of, config_of, count in full_size(kind):
        state = model.state_dict()
        parts = parts_of(state)
        assert len(parts) == len(state) == count
        assert len(set(parts.values())) == count  # no two parameters in one place
        written = ldm.write(parts, state)
        shapes = {key: tuple(t.shape) for key, t in written.items()}
        back = {ours: part.info(TensorInfo(shapes[part.name], torch.float32)).shape for ours, part in parts.items()}
        assert back == {key: tuple(t.shape) for key, t in state.items()}
        if name == "text":  # each layer has one matrix and one bias in the place of three
            assert len(written) == (count if kind == "sd1" else count - 4 * 23)
        # The shapes alone give the config back.
        config = config_of(shapes)
        own = model.config if name != "text" else model.config.to_dict()
        for key, value in config.items():
            if key not in ("sample_size", "projection_dim", "norm_num_groups", "bos_token_id", "pad_token_id"):
                expected = own[key]
                if key == "attention_head_dim" and kind == "sd1":
                    assert value == 8
                else:
                    assert value == (list(expected) if isinstance(expected, tuple) else expected), key


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("sd1", "cond_stage_model.transformer.text_model."),
        ("sd1", "cond_stage_model.transformer."),
        ("sd2", "cond_stage_model.model."),
        ("sd2", "conditioner.embedders.0.model."),
    ],
)
def test_published_layouts_are_recognised_at_full_size(kind: str, text: str, tmp_path: Path) -> None:
    """Files of 2 GB, all holes: what they are is found, and that they would load, without reading them."""
    header: dict[str, Any] = {}
    end = 0
    for name, model, parts_of, _, _ in full_size(kind):
        prefix = {"unet": UNET, "vae": "first_stage_model.", "text": text}[name]
        state = model.state_dict()
        for stored, tensor in ldm.write(parts_of(state), state).items():
            size = 2 * tensor.numel()
            header[prefix + stored] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
            end += size
    raw = json.dumps(header).encode()
    with (tmp_path / "m.ckpt").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
    report = describe(tmp_path / "m.ckpt")
    assert (report.kind, report.family) == ("checkpoint", f"Stable Diffusion {kind[-1]}.x")
    assert report.loads and report.reason.endswith("from_single_file"), report.reason


def test_numbers_go_there_and_back() -> None:
    """Values, not only shapes: each network of random numbers is written and read again bit for bit."""
    for kind in ("sd1", "sd2"):
        pipe = make(kind)
        text_parts = ldm.open_clip_parts if kind == "sd2" else ldm.clip_parts
        for model, parts_of in (
            (pipe.unet, ldm.unet_parts),
            (pipe.vae, ldm.vae_parts),
            (pipe.text_encoder, text_parts),
        ):
            state = model.state_dict()
            parts = parts_of(state)
            written = ldm.write(parts, state)
            assert sum(t.numel() for t in written.values()) == sum(t.numel() for t in state.values())
            assert all(torch.equal(part.read(written[part.name]), state[ours]) for ours, part in parts.items())


def test_an_adapters_weight_has_no_place() -> None:
    for parts_of in (ldm.unet_parts, ldm.vae_parts, ldm.open_clip_parts):
        with pytest.raises(ValueError, match="has no place in a single file"):
            parts_of({"down_blocks.0.resnets.0.lora_A.default.weight": 0})


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_reads_the_same_from_our_file(kind: str, small: Any, files: dict[str, Path]) -> None:
    from diffusers.loaders import single_file_utils as theirs

    pipe, stored = small[kind], load_file(files[kind])
    unet = theirs.convert_ldm_unet_checkpoint(dict(stored), dict(pipe.unet.config))
    vae = theirs.convert_ldm_vae_checkpoint(dict(stored), dict(pipe.vae.config))
    if kind == "sd1":
        text = theirs.convert_ldm_clip_checkpoint(dict(stored))
    else:
        text = theirs.convert_open_clip_checkpoint(pipe.text_encoder, dict(stored))
    for converted, model in ((unet, pipe.unet), (vae, pipe.vae), (text, pipe.text_encoder)):
        state = {key.removeprefix("text_model."): t for key, t in model.state_dict().items()}
        converted = {key.removeprefix("text_model."): t for key, t in converted.items()}
        assert converted.keys() == state.keys()
        assert all(torch.equal(converted[key], state[key]) for key in state)


# --- Whole files. ---


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_the_same_picture_from_file_and_folder(kind: str, small: Any, files: dict[str, Path], tmp_path: Path) -> None:
    small[kind].save_pretrained(tmp_path / "folder")
    folder = StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "folder")
    file = StableDiffusionImg2ImgPipeline.from_single_file(files[kind], scheduler=folder.scheduler)
    assert same(folder.unet, file.unet) and same(folder.vae, file.vae) and same(folder.text_encoder, file.text_encoder)
    drawn = []
    for pipe in (folder, file):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        result = pipe("a red cat", picture(64, 64), num_inference_steps=4, generator=generator, output_type="np")
        drawn.append(result.images)
    assert np.std(drawn[0]) > 0.01
    assert np.abs(drawn[0] - drawn[1]).max() < 1e-4
    # … and from the file to a folder and a file again, the same file.
    file.save_single_file(tmp_path / "again.safetensors")
    again, first = load_file(tmp_path / "again.safetensors"), load_file(files[kind])
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)


def test_configs_of_the_published_folders(files: dict[str, Path]) -> None:
    sd1 = StableDiffusionImg2ImgPipeline.from_single_file(files["sd1"])
    assert type(sd1.scheduler).__name__ == "PNDMScheduler" and sd1.scheduler.config.skip_prk_steps
    assert sd1.unet.config.sample_size == 64 and sd1.unet.config.attention_head_dim == 8
    assert sd1.text_encoder.config.hidden_act == "quick_gelu"
    assert sd1.tokenizer.pad_token == "<|endoftext|>" and sd1.safety_checker is None
    sd2 = StableDiffusionImg2ImgPipeline.from_single_file(files["sd2"], prediction_type="v_prediction")
    assert type(sd2.scheduler).__name__ == "DDIMScheduler" and sd2.scheduler.config.prediction_type == "v_prediction"
    assert sd2.unet.config.sample_size == 96 and sd2.unet.config.upcast_attention
    assert list(sd2.unet.config.attention_head_dim) == [1, 1, 2, 2]
    assert sd2.text_encoder.config.hidden_act == "gelu" and sd2.tokenizer.pad_token == "!"
    for pipe in (sd1, sd2):
        for key, value in SCHEDULE.items():
            assert key == "clip_sample" or pipe.scheduler.config[key] == value
        assert pipe.vae.config.scaling_factor == 0.18215


@needs_shared
def test_the_vocabulary_is_that_of_clip() -> None:
    from transformers import CLIPTokenizer

    from sdedit.loading.tokenizer import MERGES, vocabulary

    folder = SHARED / "data" / "sd15" / "tokenizer"
    import gzip

    merges = gzip.decompress(MERGES.read_bytes())
    assert merges == (folder / "merges.txt").read_bytes()
    assert vocabulary(merges.decode()) == json.loads((folder / "vocab.json").read_text())
    text = "A photo of an ASTRONAUT's naïve 7 cats, (very:1.2) détaillé — 猫"
    assert clip_tokenizer()(text).input_ids == CLIPTokenizer.from_pretrained(folder)(text).input_ids


def test_variants_of_names(small: Any, changed: Any, tmp_path: Path) -> None:
    """As real files have them: no text_model., position_ids, schedule buffers, EMA, nested in a pickle, fp16."""
    averaged: dict[str, torch.Tensor] = {}

    def real(tensors: dict[str, Any]) -> dict[str, Any]:
        made = {k.replace("transformer.text_model.", "transformer."): t for k, t in tensors.items()}
        for key, t in tensors.items():
            if key.startswith("model.diffusion_model."):
                averaged[EMA_PREFIX + key.removeprefix("model.diffusion_model.").replace(".", "")] = t * 2
        return (
            made
            | averaged
            | {
                "cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None],
                "model_ema.decay": torch.tensor(0.9999),
                "betas": torch.zeros(1000),
                "alphas_cumprod_prev": torch.zeros(1000),
                "log_one_minus_alphas_cumprod": torch.zeros(1000),
            }
        )

    file = changed(real)
    pipe = StableDiffusionImg2ImgPipeline.from_single_file(file)
    assert same(pipe.unet, small["sd1"].unet) and same(pipe.text_encoder, small["sd1"].text_encoder)
    for name, save in (("new.ckpt", {}), ("old.pt", {"_use_new_zipfile_serialization": False})):
        torch.save({"state_dict": load_file(file), "global_step": 470000, "epoch": 3}, tmp_path / name, **save)
        unet = UNet2DConditionModel.from_single_file(tmp_path / name, extract_ema=True)
        assert all(torch.equal(t, 2 * small["sd1"].unet.state_dict()[k]) for k, t in unet.state_dict().items())
    half = StableDiffusionImg2ImgPipeline.from_single_file(file, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.unet.parameters()} == {torch.bfloat16} == {p.dtype for p in half.vae.parameters()}
    with pytest.raises(ValueError, match="no averaged weights"):
        UNet2DConditionModel.from_single_file(changed(lambda t: t), extract_ema=True)
    only = changed(lambda t: averaged | {k: x for k, x in t.items() if not k.startswith("model.diff")})
    unet = StableDiffusionImg2ImgPipeline.from_single_file(only).unet
    assert torch.equal(unet.conv_in.weight, 2 * small["sd1"].unet.conv_in.weight)


def test_open_clip_without_its_last_block() -> None:
    """A published SD 2 file has 24 blocks, of which 23 are used."""
    with torch.device("meta"):
        state = text_encoder("sd2", 64, 24).state_dict()
    written = {f"cond_stage_model.model.{k}": t for k, t in ldm.write(ldm.open_clip_parts(state), state).items()}
    written["cond_stage_model.model.text_projection"] = torch.zeros(64, 64)
    written["cond_stage_model.model.logit_scale"] = torch.zeros(())
    from sdedit.loading.families import sort_names
    from sdedit.loading.single_file import _without_last_block

    section = _without_last_block(sort_names(written).open_clip)
    shapes = {inner: tuple(written[stored].shape) for inner, stored in section.items()}
    assert sizes.open_clip_config(shapes)["num_hidden_layers"] == 23
    assert not any("resblocks.23" in name or "logit" in name or name == "text_projection" for name in section)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_files_of_a_vae_alone(prefix: str, small: Any, tmp_path: Path) -> None:
    vae = small["sd1"].vae
    save_single_file(vae, tmp_path / "bare.safetensors")
    bare = load_file(tmp_path / "bare.safetensors")
    assert "decoder.up.3.block.0.conv1.weight" in bare and bare["encoder.mid.attn_1.q.weight"].ndim == 4
    torch.save({"state_dict": {prefix + k: t.half() for k, t in bare.items()}}, tmp_path / "vae.pt")
    read = AutoencoderKL.from_single_file(tmp_path / "vae.pt", torch_dtype=torch.float16)
    assert read.config.block_out_channels == (32, 32, 64, 64) and read.config.scaling_factor == 0.18215
    assert all(torch.equal(t, vae.state_dict()[k].half()) for k, t in read.state_dict().items())
    vae.save_pretrained(tmp_path / "folder")
    assert same(AutoencoderKL.from_single_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors"), vae)


def test_configs_from_a_folder(folder: Path, loaded: Any, tmp_path: Path) -> None:
    """Heads and groups of odd models cannot be read off shapes: `config=` brings them, and the tokenizer."""
    loaded.save_single_file(tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match=r"CLIP 49,408: pass tokenizer=…, or config=…"):
        StableDiffusionImg2ImgPipeline.from_single_file(tmp_path / "odd.safetensors")
    pipe = StableDiffusionImg2ImgPipeline.from_single_file(tmp_path / "odd.safetensors", config=folder)
    for name in ("unet", "vae"):
        read, own = dict(getattr(pipe, name).config), dict(getattr(loaded, name).config)
        assert same(getattr(pipe, name), getattr(loaded, name))
        assert {k: v for k, v in read.items() if k[0] != "_"} == {k: v for k, v in own.items() if k[0] != "_"}
    assert type(pipe.scheduler) is type(loaded.scheduler)
    unet = UNet2DConditionModel.from_single_file(tmp_path / "odd.safetensors", config=folder / "unet")
    assert same(unet, loaded.unet)


def test_the_command_line_takes_a_file(files: dict[str, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from sdedit.commands.cli import app
    from sdedit.commands.metadata import read_settings

    picture(64, 64).save(tmp_path / "in.png")
    arguments = [
        "run",
        str(tmp_path / "in.png"),
        "a cat",
        "-o",
        str(tmp_path / "out.png"),
        "--model",
        str(files["sd1"]),
    ]
    ran = CliRunner().invoke(app, [*arguments, "--steps", "2", "--size", "64x64"], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    assert (tmp_path / read_settings(tmp_path / "out.png").model).samefile(files["sd1"])
    again = ["again", "--trust", str(tmp_path / "out.png"), "-o", str(tmp_path / "twice.png")]
    assert CliRunner().invoke(app, again, catch_exceptions=False).exit_code == 0
    with Image.open(tmp_path / "out.png") as first, Image.open(tmp_path / "twice.png") as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))


# --- What a UNet of SD 2 predicts. ---


def test_prediction_types(files: dict[str, Path], changed: Any, tmp_path: Path) -> None:
    def biased(std: float) -> Callable[[dict[str, Any]], dict[str, Any]]:
        key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
        return lambda tensors: tensors | {key: torch.linspace(-1, 1, 32) * std * math.sqrt(3)}

    loud, quiet = changed(biased(0.2), "sd2", "loud.safetensors"), changed(biased(0.05), "sd2", "quiet.safetensors")

    def guess(path: Path, **options: Any) -> Any:
        return StableDiffusionImg2ImgPipeline.from_single_file(path, **options).scheduler.config.prediction_type

    assert guess(loud) == "v_prediction" and guess(quiet) == "epsilon"
    assert guess(loud, prediction_type="epsilon") == "epsilon"
    assert guess(changed(biased(0.2), "sd1")) == "epsilon"  # only SD 2 has both kinds
    assert guess(changed(lambda t: t | {"v_pred": torch.zeros(1)}, "sd1")) == "v_prediction"
    torch.save({"state_dict": load_file(loud), "global_step": 875000}, tmp_path / "base.ckpt")
    assert guess(tmp_path / "base.ckpt") == "epsilon"
    config = {"model": {"params": {"parameterization": "v", "linear_end": 0.02, "scale_factor": 0.5}}}
    pipe = StableDiffusionImg2ImgPipeline.from_single_file(quiet, original_config=config, image_size=256)
    assert pipe.scheduler.config.prediction_type == "v_prediction" and pipe.scheduler.config.beta_end == 0.02
    assert pipe.vae.config.scaling_factor == 0.5 and pipe.unet.config.sample_size == 32
    quiet.with_suffix(".yaml").write_text(json.dumps(config))  # JSON is YAML
    assert guess(quiet) == "v_prediction"
    assert guess(quiet, prediction_type="epsilon") == "epsilon"
    with pytest.raises(ValueError, match="prediction_type='v'; expected one of epsilon, v_prediction"):
        guess(quiet, prediction_type="v")
    with pytest.raises(ValueError, match="image_size='big'"):
        guess(quiet, image_size="big")


def test_what_is_written_says_what_it_predicts(small: Any, tmp_path: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**small["sd2"].components, requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler(**SCHEDULE, prediction_type="v_prediction")
    pipe.save_single_file(tmp_path / "v.safetensors", torch_dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "v.safetensors").values()} == {torch.float16}
    read = StableDiffusionImg2ImgPipeline.from_single_file(tmp_path / "v.safetensors")
    assert read.scheduler.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not a YAML file"),
        ("just: text", "no 'model: params:'"),
        ("a: &a {x: 1}\nb: {<<: *a}", "merges mappings"),
        ("!!python/object/apply:os.getcwd []", "is not a YAML file"),
    ],
)
def test_damaged_training_configs(files: dict[str, Path], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        StableDiffusionImg2ImgPipeline.from_single_file(files["sd1"], original_config=tmp_path / "c.yaml")
    with pytest.raises(FileNotFoundError, match="original_config"):
        StableDiffusionImg2ImgPipeline.from_single_file(files["sd1"], original_config=tmp_path / "none.yaml")


# --- What is refused, and how. ---

UNET = "model.diffusion_model."
IN, TO_K = f"{UNET}input_blocks.0.0.weight", f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
FOREIGN: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "inpainting": ({IN: (32, 9, 3, 3)}, "it is inpainting, which needs a mask"),
    "instruct": ({IN: (32, 8, 3, 3)}, "it is InstructPix2Pix"),
    "depth": ({IN: (32, 5, 3, 3)}, "it is depth-to-image"),
    "upscaler": ({IN: (32, 7, 3, 3), f"{UNET}label_emb.weight": (1000, 128)}, "it is an upscaler"),
    "odd": ({IN: (32, 6, 3, 3)}, "its UNet takes 6 channels"),
    "xl": ({"conditioner.embedders.1.model.ln_final.weight": (4,)}, "checkpoint of Stable Diffusion XL"),
    "xl alone": ({f"{UNET}label_emb.0.0.weight": (4, 4), TO_K: (4, 2048)}, "of Stable Diffusion XL"),
    "refiner": (
        {
            f"{UNET}label_emb.0.0.weight": (4, 4),
            TO_K: (4, 1280),
            "conditioner.embedders.0.model.ln_final.weight": (4,),
        },
        "of the refiner of Stable Diffusion XL",
    ),
    "unclip": ({f"{UNET}label_emb.0.0.weight": (4, 4), TO_K: (4, 1024)}, "of Stable unCLIP"),
    "sd3": ({f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (4, 4)}, "of Stable Diffusion 3"),
    "flux": ({f"{UNET}double_blocks.0.img_attn.qkv.weight": (4, 4)}, "of Flux"),
    "controlnet": ({"control_model.zero_convs.0.0.weight": (4, 4, 1, 1)}, "a ControlNet"),
    "lora": ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (4, 4)}, "it is a LoRA"),
    "ip": ({"ip_adapter.1.to_k_ip.weight": (4, 768)}, "it is an IP-Adapter"),
    "motion": ({"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (4,)}, "motion module"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_models_are_refused_by_name(name: str, changed: Any, tmp_path: Path) -> None:
    shapes, message = FOREIGN[name]
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "alone.safetensors")
    whole = changed(lambda own: own | tensors)
    for path in (
        (whole,)
        if name in ("xl alone", "refiner", "unclip") or IN in shapes
        else (whole, tmp_path / "alone.safetensors")
    ):
        with pytest.raises(ValueError, match=message):
            StableDiffusionImg2ImgPipeline.from_single_file(path)


def test_sd_turbo_has_its_text_encoder_under_another_name(small: Any, changed: Any) -> None:
    """Its file is of the code that SDXL came with, and it is SD 2.x all the same, made for one to four steps."""

    def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
        held = {k.replace("cond_stage_model.model.", "conditioner.embedders.0.model."): t for k, t in tensors.items()}
        beside = {"conditioner.embedders.0.model.logit_scale": torch.ones(()), "denoiser.sigmas": torch.ones(1000)}
        return held | beside

    pipe = StableDiffusionImg2ImgPipeline.from_single_file(changed(renamed, "sd2"))
    assert same(pipe.text_encoder, small["sd2"].text_encoder) and same(pipe.unet, small["sd2"].unet)
    assert pipe.load_report.family == "Stable Diffusion 2.x" and not pipe.load_report.unknown
    # As in the published folder of stabilityai/sd-turbo.
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipe.scheduler.config.timestep_spacing == "trailing"


def test_what_is_missing_or_does_not_fit(small: Any, files: dict[str, Path], changed: Any, tmp_path: Path) -> None:
    load = StableDiffusionImg2ImgPipeline.from_single_file
    without = changed(lambda t: {k: x for k, x in t.items() if not k.startswith("first_stage_model.")})
    with pytest.raises(ValueError, match=r"has no vae: pass vae=…"):
        load(without)
    assert load(without, vae=small["sd1"].vae).vae is small["sd1"].vae
    assert load(files["sd1"], text_encoder=None, tokenizer=None).text_encoder is None
    key = "first_stage_model.decoder.up.0.block.0.conv1.weight"
    with pytest.raises(
        ValueError, match=r"- decoder\.up_blocks\.3\.resnets\.0\.conv1\.weight \[32, 32, 3, 3\] is missing"
    ):
        load(changed(lambda t: {k: x for k, x in t.items() if k != key}))
    with pytest.raises(ValueError, match=r"is \[32, 33, 3, 3\] in the file"):
        load(changed(lambda t: t | {key: torch.zeros(32, 33, 3, 3)}))
    with pytest.raises(ValueError, match=r"\+ model\.diffusion_model\.extra \[3\] is not expected"):
        load(changed(lambda t: t | {f"{UNET}extra": torch.zeros(3)}))
    with pytest.raises(ValueError, match=r"holds int8; floats expected"):
        load(changed(lambda t: t | {key: t[key].to(torch.int8)}))
    with pytest.warns(UserWarning, match=r"1 unknown tensors left out \(something\.else"):
        load(changed(lambda t: t | {"something.else": torch.zeros(3)}))
    with pytest.raises(FileNotFoundError, match="is no file here"):
        load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(TypeError, match="no argument safety_chekcer"):
        load(files["sd1"], safety_chekcer=None)
    with pytest.raises(ValueError, match="it is a VAE alone"):
        save_single_file(small["sd1"].vae, tmp_path / "vae.safetensors")
        load(tmp_path / "vae.safetensors")
    with pytest.raises(ValueError, match="no single-file layout"):
        AutoencoderTiny.from_single_file(files["sd1"])


def test_the_report_accounts_for_every_tensor(small: Any, changed: Any) -> None:
    path = changed(lambda t: t | {"betas": torch.zeros(3), "something.else": torch.zeros(3)})
    with pytest.warns(UserWarning, match="1 unknown"):
        pipe = StableDiffusionImg2ImgPipeline.from_single_file(path, vae=small["sd1"].vae)
    report = pipe.load_report
    assert set(report.matched) == {"unet", "text_encoder"}  # the VAE was passed in
    for name, count in report.matched.items():
        assert count == len(getattr(pipe, name).state_dict())
    assert report.unknown == ("something.else",)
    assert "betas" in report.left_out and any(n.startswith("first_stage_model.") for n in report.left_out)
    with safe_open(path, framework="pt") as file:
        assert sum(report.matched.values()) + len(report.left_out) + len(report.unknown) == len(list(file.keys()))
    assert report.prediction_type == "epsilon" and "1 unknown" in str(report)


def test_the_vae_of_an_inpainting_model_is_fine(small: Any, changed: Any) -> None:
    path = changed(lambda t: t | {IN: torch.zeros(32, 9, 3, 3)})
    assert same(AutoencoderKL.from_single_file(path), small["sd1"].vae)
    with pytest.raises(ValueError, match="inpainting"):
        UNet2DConditionModel.from_single_file(path)


def test_what_cannot_be_written(small: Any, tmp_path: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**small["sd1"].components, requires_safety_checker=False)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        pipe.save_single_file(tmp_path / "m.ckpt")
    pipe.tokenizer = clip_tokenizer()
    pipe.tokenizer.add_tokens(["<birb>"])
    with pytest.raises(ValueError, match="added tokens"):
        pipe.save_single_file(tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="AutoencoderTiny has no single-file layout"):
        save_single_file({"vae": AutoencoderTiny()}, tmp_path / "m.safetensors")
    for part in ("unet", "text_encoder"):
        pipe = make("sd1")
        getattr(pipe, part).lora_down = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"has adapters \(lora_down\.bias, …\)"):
            pipe.save_single_file(tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


# --- Addresses. ---


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("https://huggingface.co/o/n/blob/main/a/b.ckpt", ("o/n", "a/b.ckpt", "main")),
        ("https://huggingface.co/o/n/resolve/fp16/m%20x.safetensors?download=true", ("o/n", "m x.safetensors", "fp16")),
        ("https://hf.co/o.o/n-1/resolve/refs%2Fpr%2F1/m.safetensors", ("o.o/n-1", "m.safetensors", "refs/pr/1")),
        ("o/n/m.safetensors", ("o/n", "m.safetensors", None)),
    ],
)
def test_addresses_on_the_hub(monkeypatch: pytest.MonkeyPatch, address: str, wanted: tuple[Any, ...]) -> None:
    asked = []

    def download(repo: str, name: str, **options: Any) -> str:
        asked.append((repo, name, options["revision"], options.get("local_files_only")))
        return "/somewhere"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert find_file(address, local_files_only=True) == Path("/somewhere")
    assert asked == [(*wanted, True)]


@pytest.mark.parametrize("address", ["https://example.com/m.safetensors", "owner/name", "m.safetensors", ""])
def test_other_addresses(address: str) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=r"is no file here|is a folder"):
        find_file(address)
    with pytest.raises(FileNotFoundError, match="could not be had from the hub"):
        find_file("https://huggingface.co/no-such-owner/none/blob/main/m.ckpt", local_files_only=True)


def test_every_shape_is_compared_before_anything_is_read(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise AssertionError("read too early")

    monkeypatch.setattr("sdedit.loading.single_file.read_weights", refuse)
    file = SingleFile(files["sd1"])
    for name in ("unet", "vae", "text_encoder"):
        assert all(p.is_meta for p in file.network(name).model.parameters())
