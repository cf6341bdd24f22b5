"""IP-Adapter, LoRA, fused LoRA and textual inversion on one pipeline: whatever the order, the same bits."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sdedit
from conftest import picture
from ip_adapter_by_hand import EMBEDS, adapter, flat
from lora_by_hand import as_diffusers, lora

STEPS = ("ip", "lora", "fuse", "words")  # "fuse" comes after "lora"
ORDERS = [order for order in itertools.permutations(STEPS) if order.index("lora") < order.index("fuse")]


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    save_file(flat(adapter("base")), root / "ip.safetensors")
    save_file({"emb_params": torch.linspace(-1, 1, 64).reshape(2, 32)}, root / "word.safetensors")
    pipe = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    for seed in (0, 1):
        save_file(as_diffusers(lora(pipe, seed=seed)), root / f"lora{seed}.safetensors")
    return root


@pytest.fixture
def pipe(folder: Path) -> Any:
    made = sdedit.StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def take(pipe: Any, files: Path, step: str) -> None:
    if step == "ip":
        pipe.load_ip_adapter(files / "ip.safetensors", image_encoder_folder=None)
        pipe.set_ip_adapter_scale(0.7)
    elif step == "lora":
        pipe.load_lora_weights(files / "lora0.safetensors", adapter_name="style")
    elif step == "fuse":
        pipe.fuse_lora()
    else:
        pipe.load_textual_inversion(files / "word.safetensors", token="<word>")


def draw(pipe: Any, held: set[str]) -> np.ndarray:
    with_image = {"ip_adapter_image_embeds": [torch.linspace(-1, 1, 2 * EMBEDS).reshape(2, 1, EMBEDS)]}
    return pipe(
        "a cat, <word>" if "words" in held else "a cat",
        picture(32, 32),
        num_inference_steps=2,
        output_type="np",
        generator=torch.Generator().manual_seed(0),
        **(with_image if "ip" in held else {}),
    ).images


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_every_order_gives_the_same_bits(pipe: Any, files: Path, order: tuple[str, ...], known: dict[Any, Any]) -> None:
    held: set[str] = set()
    for step in order:
        take(pipe, files, step)
        held.add(step)
        drawn, key = draw(pipe, held), frozenset(held)
        assert np.array_equal(drawn, known.setdefault(key, drawn))
    for step in random.Random(repr(order)).sample(["ip", "words", "lora"], 3):
        if step == "ip":
            pipe.unload_ip_adapter()
        elif step == "words":
            pipe.unload_textual_inversion()
        else:
            pipe.unfuse_lora()
            pipe.unload_lora_weights()
            held.discard("fuse")
        held.discard(step)
        drawn, key = draw(pipe, held), frozenset(held)
        assert np.array_equal(drawn, known.setdefault(key, drawn))


@pytest.fixture(scope="module")
def known() -> dict[Any, Any]:
    """What each set of adapters gave when it was first met, over all orders."""
    return {}


def test_each_of_them_changes_the_picture(pipe: Any, files: Path) -> None:
    pictures = [draw(pipe, set())]
    held: set[str] = set()
    for step in ("ip", "lora", "words"):
        take(pipe, files, step)
        held.add(step)
        pictures.append(draw(pipe, held))
    assert all(np.abs(a - b).max() > 1e-4 for a, b in itertools.pairwise(pictures))


def test_a_second_lora_comes_while_the_first_is_fused_beside_an_ip_adapter(pipe: Any, files: Path) -> None:
    for step in ("lora", "fuse", "ip"):
        take(pipe, files, step)
    before = draw(pipe, {"ip"})
    pipe.load_lora_weights(files / "lora1.safetensors", adapter_name="other")
    assert np.abs(draw(pipe, {"ip"}) - before).max() > 1e-4
    pipe.delete_adapters("other")
    assert np.array_equal(draw(pipe, {"ip"}), before)
