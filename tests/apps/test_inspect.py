"""`describe` says what real and made files are, and agrees with the loaders on whether they load."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SHARED, needs_shared
from sdedit import AutoencoderKL, StableDiffusionImg2ImgPipeline
from sdedit.apps.inspect import FileReport, describe
from sdedit.loading.single_file_save import save_single_file

SD1, SD2, XL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL"


@needs_shared
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora_cloneofsimo_sd15.safetensors", ("LoRA", SD1, "safetensors, cloneofsimo", "1", ["<s1>", "<s2>"])),
        ("lora_diffusers_sd15.safetensors", ("LoRA", SD1, "safetensors, diffusers", "4", [])),
        ("lora_doubled_prefix_sd15.safetensors", ("LoRA", SD1, "safetensors, kohya", "4", [])),
        (
            "textual_inversion_birb_style_sd15.bin",
            ("textual inversion", SD1, "pickle, diffusers", "", ["<birb-style>"]),
        ),
    ],
)
def test_real_adapters(name: str, expected: tuple[Any, ...]) -> None:
    report = describe(SHARED / "data" / "adapters" / name)
    assert (report.kind, report.family, report.format, report.rank, report.tokens) == expected
    assert report.loads and report.precision == "float32" and report.size > 1000


Shapes = dict[str, tuple[int, ...]]
TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
FLAT = f"lora_unet_{TO_K.replace('.', '_')}"


def write(path: Path, shapes: Shapes) -> None:
    """A safetensors file of zeros in float16, which take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


def low_rank(down: str, up: str, rank: int, width: int = 768) -> Shapes:
    return {down: (rank, width), up: (1280, rank)}


def ip_adapter(image_proj: Shapes, width: int = 768) -> Shapes:
    """Layers in the order in which the published files number them."""
    channels = [320, 320, 640, 640, 1280, 1280, 1280, 1280, 1280, 640, 640, 640, 320, 320, 320, 1280]
    layers = {
        f"ip_adapter.{2 * i + 1}.to_{part}_ip.weight": (c, width) for i, c in enumerate(channels) for part in ("k", "v")
    }
    return {f"image_proj.{name}": shape for name, shape in image_proj.items()} | layers


BASE = {"proj.weight": (4 * 768, 1024), "proj.bias": (4 * 768,), "norm.weight": (768,), "norm.bias": (768,)}
MADE: dict[str, tuple[Shapes, dict[str, Any]]] = {
    "peft": (
        low_rank(f"unet.{TO_K}.lora_A.default.weight", f"unet.{TO_K}.lora_B.default.weight", 8, 1024),
        dict(kind="LoRA", family=SD2, format="safetensors, PEFT", rank="8", loads=True),
    ),
    "old": (
        low_rank(
            TO_K.replace("to_k", "processor.to_k_lora.down.weight"),
            TO_K.replace("to_k", "processor.to_k_lora.up.weight"),
            4,
        ),
        dict(kind="LoRA", family=SD1, format="safetensors, diffusers", rank="4", loads=True),
    ),
    "loha": (
        {f"{FLAT}.hada_w{i}_{part}": (16, 768) if part == "b" else (1280, 16) for i in (1, 2) for part in "ab"},
        dict(kind="LoRA", family=SD1, format="safetensors, LyCORIS LoHa", loads=True),
    ),
    "ranks": (
        low_rank(f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight", 4)
        | low_rank(f"{FLAT[:-1]}v.lora_down.weight", f"{FLAT[:-1]}v.lora_up.weight", 64),
        dict(kind="LoRA", family=SD1, format="safetensors, kohya", rank="4 to 64", loads=True),
    ),
    "elsewhere": (
        {"lora_unet_x_attn2_to_k.lora_down.weight": (4, 768), "lora_unet_x_attn2_to_k.lora_up.weight": (9, 4)},
        dict(kind="LoRA", loads=False),
    ),
    "xl": (
        {"lora_unet_x_attn2_to_k.lora_down.weight": (4, 2048)},
        dict(kind="LoRA", family=XL, loads=False),
    ),
    "newword": (
        {"emb_params": (3, 1024)},
        dict(
            kind="textual inversion",
            family=SD2,
            format="safetensors, kohya",
            tokens=["newword (3 vectors)"],
            loads=True,
        ),
    ),
    "long": ({"<a>": (76, 768)}, dict(kind="textual inversion", family=SD1, loads=False)),
    "cat": ({"cat</w>": (1, 768)}, dict(kind="textual inversion", family=SD1, loads=False)),
    "xl emb": ({"clip_l": (2, 768), "clip_g": (2, 1280)}, dict(kind="textual inversion", family=XL, loads=False)),
    "ip": (ip_adapter(BASE), dict(kind="IP-Adapter", family=SD1, format="safetensors, base", loads=True)),
    "ip cut": (
        {name: shape for name, shape in ip_adapter(BASE).items() if "31" not in name},
        dict(kind="IP-Adapter", family=SD1, loads=False),
    ),
    "ip xl": (ip_adapter(BASE, 2048), dict(kind="IP-Adapter", family=XL, loads=False)),
    "ip face": (
        ip_adapter({"norm.weight": (768,), "proj.0.weight": (9, 9)}),
        dict(kind="IP-Adapter", loads=False),
    ),
    "flux vae": (
        {"decoder.conv_in.weight": (8, 16, 3, 3), "decoder.up.0.block.0.conv1.weight": (1,)},
        dict(kind="VAE", loads=False, reason="it is a VAE with 16 channels of latents, as Flux and SD 3 have it"),
    ),
    "clip": (
        {"text_model.encoder.layers.0.mlp.fc1.weight": (2, 2, 2)},
        dict(kind="text encoder", loads=False, reason="it is a text encoder alone"),
    ),
    "anything": ({"a.b.weight": (2, 2, 2)}, dict(kind="unknown", family="", loads=False)),
}


@pytest.mark.parametrize("name", MADE)
def test_made_files(name: str, tmp_path: Path) -> None:
    shapes, expected = MADE[name]
    path = tmp_path / f"{name.split()[-1]}.safetensors"
    write(path, shapes)
    report = describe(path)
    assert {key: getattr(report, key) for key in expected} == expected, report
    assert report.precision == "float16" and report.parameters == sum(map(math.prod, shapes.values()))
    assert report.reason


def test_embeddings_of_the_web_ui(tmp_path: Path) -> None:
    """Some of them hold an `nn.ParameterDict`."""
    for name, vectors in (
        ("a", {"*": torch.ones(2, 768)}),
        ("b", torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 768))})),
    ):
        held = {"string_to_token": {"*": 265}, "string_to_param": vectors, "name": "my style", "step": 100}
        torch.save(held, tmp_path / f"{name}.pt")
        report = describe(tmp_path / f"{name}.pt")
        assert (report.kind, report.format, report.family) == ("textual inversion", "pickle, AUTOMATIC1111", SD1)
        assert report.tokens == ["my style (2 vectors)"] and report.loads


def test_ip_adapter_nested_in_a_pickle(tmp_path: Path) -> None:
    held: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, shape in ip_adapter(BASE).items():
        part, _, rest = name.partition(".")
        held[part][rest] = torch.zeros(shape, dtype=torch.float16)
    torch.save(held, tmp_path / "ip.bin")
    report = describe(tmp_path / "ip.bin")
    assert (report.kind, report.family, report.format, report.loads) == ("IP-Adapter", SD1, "pickle, base", True)


def test_models(folder: Path, loaded: Any, tmp_path: Path) -> None:
    report = describe(folder)
    assert (report.kind, report.family, report.prediction_type, report.loads) == ("model folder", SD1, "epsilon", True)
    assert report.parameters == sum(p.numel() for m in (loaded.unet, loaded.vae) for p in m.parameters())
    assert describe(folder / "unet").loads and "UNet2DConditionModel" in describe(folder / "unet").kind
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert "is damaged" in describe(broken).reason and not describe(broken).loads
    index = json.loads((broken / "model_index.json").read_text())
    (broken / "model_index.json").write_text(json.dumps({**index, "text_encoder_2": ["transformers", "X"]}))
    assert "text_encoder_2" in describe(broken).reason
    (broken / "model_index.json").write_text("{}")
    assert "lists no vae" in describe(broken).reason
    with pytest.raises(ValueError, match="is no model folder"):
        describe(tmp_path)


def test_the_answer_is_the_loaders(loaded: Any, tmp_path: Path) -> None:
    """Would it load? `describe` and `from_single_file` say the same of a good, a cut and a foreign file."""
    save_single_file(loaded.vae, tmp_path / "vae.safetensors", torch_dtype=torch.float16)
    good = load_file(tmp_path / "vae.safetensors")
    save_file({k: t for k, t in good.items() if "conv_out" not in k}, tmp_path / "cut.safetensors")
    save_file({**good, "extra": torch.ones(1)}, tmp_path / "more.safetensors")
    for name, loads in (("vae", True), ("cut", False), ("more", False)):
        report = describe(tmp_path / f"{name}.safetensors")
        assert (report.kind, report.precision) == ("VAE", "float16" if name != "more" else report.precision)
        assert report.loads == loads, report.reason
        try:
            AutoencoderKL.from_single_file(tmp_path / f"{name}.safetensors")
            assert loads
        except ValueError:
            assert not loads
    # A checkpoint: this one has the UNet's structure but only two levels.
    loaded.save_single_file(tmp_path / "whole.safetensors")
    report = describe(tmp_path / "whole.safetensors")
    assert (report.kind, report.family) == ("checkpoint", SD1)
    with pytest.raises(ValueError):
        StableDiffusionImg2ImgPipeline.from_single_file(tmp_path / "whole.safetensors")
    assert not report.loads


def test_lines(tmp_path: Path) -> None:
    report = FileReport(tmp_path, "LoRA", SD1, rank="4", size=1_600_000, loads=True, reason="load_lora_weights")
    lines = str(report).split("\n")
    assert lines[1:] == [
        "kind: LoRA",
        f"family: {SD1}",
        "size: 1.6 MB",
        "rank: 4",
        "loads: yes, with load_lora_weights",
    ]
