"""`describe` says what real and made files are, and agrees with the loaders on whether they load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SHARED, needs_shared
from sdedit import AutoencoderKL, StableDiffusionImg2ImgPipeline
from sdedit.loading.inspect import FileReport, describe
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


def lora(*names: str, down: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(down) for name in names}


MADE: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
    "peft": (
        lora("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.default.weight", down=(8, 1024)),
        dict(kind="LoRA", family=SD2, format="safetensors, PEFT", rank="8", loads=True),
    ),
    "old": (
        lora("mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_lora.down.weight", down=(4, 768)),
        dict(kind="LoRA", family=SD1, format="safetensors, diffusers, old", rank="4", loads=True),
    ),
    "loha": (
        lora("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.hada_w1_b", down=(16, 768)),
        dict(kind="LoRA", family=SD1, format="safetensors, LyCORIS LoHa", rank="16", loads=True),
    ),
    "ranks": (
        lora("lora_unet_x_attn2_to_k.lora_down.weight", down=(4, 768))
        | lora("lora_unet_y_attn2_to_k.lora_down.weight", down=(64, 768)),
        dict(kind="LoRA", family=SD1, format="safetensors, kohya", rank="4 to 64", loads=True),
    ),
    "xl": (
        lora("lora_unet_x_attn2_to_k.lora_down.weight", down=(4, 2048)),
        dict(kind="LoRA", family=XL, loads=False, reason=f"it is for {XL}"),
    ),
    "emb": (
        {"emb_params": torch.zeros(3, 1024)},
        dict(kind="textual inversion", family=SD2, format="safetensors, kohya", tokens=["emb (3 vectors)"], loads=True),
    ),
    "xl emb": (
        {"clip_l": torch.zeros(2, 768), "clip_g": torch.zeros(2, 1280)},
        dict(kind="textual inversion", family=XL, loads=False),
    ),
    "ip": (
        {"image_proj.proj.weight": torch.zeros(8, 8), "ip_adapter.1.to_k_ip.weight": torch.zeros(320, 768)},
        dict(kind="IP-Adapter", family=SD1, format="safetensors, base", loads=True),
    ),
    "ip plus": (
        {"image_proj.latents": torch.zeros(1, 16, 8), "ip_adapter.1.to_k_ip.weight": torch.zeros(320, 768)},
        dict(kind="IP-Adapter", family=SD1, format="safetensors, Plus", loads=True),
    ),
    "ip face": (
        {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(8, 8), "ip_adapter.1.to_k_ip.weight": torch.zeros(320, 768)},
        dict(kind="IP-Adapter", format="safetensors, FaceID", loads=False),
    ),
    "flux vae": (
        {"decoder.conv_in.weight": torch.zeros(8, 16, 3, 3), "decoder.up.0.block.0.conv1.weight": torch.zeros(1)},
        dict(kind="VAE", loads=False, reason="it is a VAE with 16 channels of latents, as Flux and SD 3 have it"),
    ),
    "clip": (
        {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2, 2, 2)},
        dict(kind="text encoder", loads=False, reason="it is a text encoder alone"),
    ),
    "anything": ({"a.b.weight": torch.zeros(2, 2, 2)}, dict(kind="unknown", family="", loads=False)),
}


@pytest.mark.parametrize("name", MADE)
def test_made_files(name: str, tmp_path: Path) -> None:
    tensors, expected = MADE[name]
    save_file({key: t.half() for key, t in tensors.items()}, tmp_path / f"{name.split()[-1]}.safetensors")
    report = describe(tmp_path / f"{name.split()[-1]}.safetensors")
    assert {key: getattr(report, key) for key in expected} == expected
    assert report.precision == "float16" and report.parameters == sum(t.numel() for t in tensors.values())


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
    held = {"image_proj": {"proj.weight": torch.ones(2, 2)}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(320, 768)}}
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
    assert "lists no unet" in describe(broken).reason
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
    assert (report.kind, report.family, report.prediction_type) == ("checkpoint", SD1, "epsilon")
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
