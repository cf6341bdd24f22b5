"""Damaged files of every kind at every loader: only our errors come out, for `SDEDIT_FUZZ_SECONDS` (60 in CI)."""

from __future__ import annotations

import io
import json
import os
import struct
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save

from conftest import picture
from sdedit import AutoencoderKL, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from sdedit.apps.inspect import describe
from sdedit.commands.metadata import read_settings
from sdedit.files import read_json
from sdedit.inputs.pixels import open_image
from sdedit.loading.folders import weight_files
from sdedit.loading.weights import read_weights

SECONDS = float(os.environ.get("SDEDIT_FUZZ_SECONDS", "6"))
OURS = (ValueError, FileNotFoundError, TypeError)
VAE_KEYS = {"block_out_channels": [8], "down_block_types": ["DownEncoderBlock2D"], "norm_num_groups": 4}


def torch_bytes(held: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(held, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def image_bytes(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(16, 12).save(buffer, kind, **options)
    return buffer.getvalue()


def make_seeds() -> dict[str, list[tuple[str, bytes]]]:
    """Whole files, small, from which the damaged ones are made: by loader, with the name that each has."""
    vae = AutoencoderKL(**VAE_KEYS, up_block_types=["UpDecoderBlock2D"])
    from sdedit.loading.ldm import vae_parts, write

    weights = write(vae_parts(vae.state_dict()), vae.state_dict())
    weights = {key: t.contiguous() for key, t in weights.items()}
    embedding = {"string_to_param": {"*": torch.ones(2, 768)}, "name": "x", "string_to_token": {"*": 265}}
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 8)}
    text = PngInfo()
    text.add_text("parameters", "a cat\nNegative prompt: dog\nSteps: 20, Sampler: Euler a, Seed: 3, Size: 64x64")
    return {
        "weights": [
            ("m.safetensors", save(weights)),
            ("m.ckpt", torch_bytes({"state_dict": weights, "global_step": 3})),
            ("m.pt", torch_bytes(weights, legacy=True)),
            ("e.pt", torch_bytes(embedding)),
            ("l.safetensors", save(lora, metadata={"ss_network_dim": "4"})),
        ],
        "json": [
            ("config.json", json.dumps({**vae.config}).encode()),
            ("m.index.json", b'{"metadata": {}, "weight_map": {"a": "m-00001-of-00002.safetensors", "b": "../x"}}'),
            ("model_index.json", b'{"_class_name": "P", "vae": ["diffusers", "AutoencoderKL"], "unet": [null, null]}'),
        ],
        "images": [
            ("i.png", image_bytes("PNG", pnginfo=text)),
            ("i.jpg", image_bytes("JPEG")),
            ("i.webp", image_bytes("WEBP")),
            ("i.gif", image_bytes("GIF")),
            ("i.tiff", image_bytes("TIFF")),
        ],
    }


@st.composite
def damage(draw: st.DrawFn, whole: bytes) -> bytes:
    """Bytes changed, cut out, put in twice or replaced by telling ones, a few times over."""
    data = bytearray(whole)
    telling = [
        b"\xff" * 8,
        b"\0" * 8,
        b"[[[[",
        b"{",
        b'"',
        b"cos\nsystem\n",
        b"\x80\x05",
        b"PK\x03\x04",
        b"1e999",
        b"null",
    ]
    for _ in range(draw(st.integers(1, 4))):
        # Most of what can go wrong is at the ends, where formats keep their headers and directories.
        limit = max(len(data) - 1, 0)
        near = draw(st.integers(0, min(limit, 400)))
        at = draw(st.sampled_from([near, limit - near, draw(st.integers(0, limit))]))
        match draw(st.integers(0, 4)):
            case 0 if data:
                data[at] = draw(st.integers(0, 255))
            case 1:
                del data[at : at + draw(st.integers(1, 64))]
            case 2:
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case 3:
                piece = draw(st.sampled_from(telling))
                data[at : at + len(piece)] = piece
            case _:
                data[at:] = b"" if draw(st.booleans()) else struct.pack("<Q", draw(st.integers(0, 2**64 - 1)))
    return bytes(data)


def load_folder(path: Path) -> object:
    """The damaged file in its place in a folder, as `config.json`, the weights, or the list of components."""
    return (AutoencoderKL if path.name != "model_index.json" else StableDiffusionImg2ImgPipeline).from_pretrained(
        path.parent
    )


LOADERS: dict[str, list[Callable[[Path], object]]] = {
    "weights": [
        read_weights,
        describe,
        AutoencoderKL.from_single_file,
        UNet2DConditionModel.from_single_file,
        StableDiffusionImg2ImgPipeline.from_single_file,
    ],
    "json": [read_json, weight_files, load_folder, lambda path: describe(path.parent)],
    "images": [open_image, read_settings],
}


@pytest.mark.parametrize("kind", LOADERS)
def test_damaged_files_raise_only_our_errors(kind: str, tmp_path: Path) -> None:
    seeds = make_seeds()
    (tmp_path / "config.json").write_bytes(seeds["json"][0][1])
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(seeds["weights"][0][1])
    until = time.monotonic() + SECONDS / len(LOADERS)
    tried, refused, slowest = 0, 0, 0.0

    @settings(
        max_examples=50, deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    @given(st.data())
    def attack(data: st.DataObject) -> None:
        nonlocal tried, refused, slowest
        name, whole = data.draw(st.sampled_from(seeds[kind]))
        path = tmp_path / name
        path.write_bytes(data.draw(damage(whole)))
        started = time.process_time()
        for load in LOADERS[kind]:
            tried += 1
            try:
                load(path)
            except OURS as error:
                refused += 1
                assert str(error).strip(), f"{type(error).__name__} without a message"
        slowest = max(slowest, time.process_time() - started)
        if name == "config.json":
            path.write_bytes(seeds["json"][0][1])
        else:
            path.unlink()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow and torch warn of what they then refuse
        while time.monotonic() < until:
            attack()
    assert tried > 20 and refused > tried // 4
    assert slowest < 10, f"one file took {slowest:.1f} s"
