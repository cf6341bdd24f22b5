"""An autoencoder of 128x128 becomes one of 256x256 with the same latents."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

import grow
import latents
import model
from data import Item
from grow import PARTS, Loss, grown_vae, learning, train
from loop import read_state
from model import VAE, encoded
from sdedit.models.vae import AutoencoderKL
from train_vae import Crops

BLOCKS = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[AutoencoderKL]:
    """The start's autoencoder, with a level less than those that training makes."""
    threads = torch.get_num_threads()
    monkeypatch.setitem(VAE, "block_out_channels", [8] * 5)
    torch.manual_seed(0)
    vae = AutoencoderKL(**{**VAE, **BLOCKS, "block_out_channels": [8] * 4}).eval().requires_grad_(False)
    for module in (model, grow):
        monkeypatch.setattr(module, "start_vae", lambda: vae)
    yield vae
    torch.set_num_threads(threads)


@pytest.fixture
def shown(disc: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, list[Item]]:
    items = [Item("red apple", "3d", f"{n}", "group", [], ["red"], n == 0) for n in range(3)]
    monkeypatch.setattr(grow, "psnr", lambda *_: 0.0)  # which takes longer than all the rest
    monkeypatch.setattr(grow, "load", lambda: (np.stack([disc] * 3), items))
    return np.stack([disc] * 3), items


def test_at_first_the_decoder_makes_what_the_small_one_does_wider(small: AutoencoderKL) -> None:
    z, seen = torch.randn(2, 8, 4, 4), []
    for vae in (grown_vae(), small):
        vae.decoder.conv_norm_out.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
        vae.decode(z)
    wide, narrow = seen
    assert wide.shape == (2, 8, 64, 64)
    torch.testing.assert_close(wide, interpolate(narrow, scale_factor=2.0), rtol=1e-4, atol=1e-4)


def test_at_first_the_encoder_has_the_small_one_inside(small: AutoencoderKL) -> None:
    grown, inner = grown_vae().encoder, small.encoder
    for level, block in enumerate(inner.down_blocks):
        expected, got = block.state_dict(), grown.down_blocks[level + 1].state_dict()
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_latents_known_are_those_of_the_halved_picture(small: AutoencoderKL) -> None:
    batch = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.equal(encoded(small, batch).mean, small.encode(avg_pool2d(batch, 2)).latent_dist.mean)
    grown = grown_vae()
    assert torch.equal(encoded(grown, batch).mean, grown.encode(batch).latent_dist.mean)


def test_each_part_trains_what_is_its_own_and_goes_on_from_the_one_before(
    shown: tuple[np.ndarray, list[Item]],
) -> None:
    args = argparse.Namespace(rate=1e-3, fall=1, batch=2, device="cpu")
    before = grown_vae().state_dict()
    changed = {}
    for part in PARTS:
        train(part, 1, args)
        after = grown_vae().state_dict()
        changed[part] = {name for name in after if not torch.equal(before[name], after[name])}
        assert changed[part] <= set(read_state(grow.file(part))["average"])
        before = after
    assert not any(name.startswith(("decoder.mid_block", "encoder.mid_block")) for name in changed["outer"])
    assert all(name.startswith(("decoder", "post_quant_conv")) for name in changed["decoder"])
    assert {name.split(".")[0] for name in changed["both"]} >= {"encoder", "decoder"}
    finished = latents.finished_vae().state_dict()  # with the start's latents, not ones centred anew
    assert finished.keys() == before.keys()
    assert all(torch.equal(finished[name], before[name]) for name in before)


def test_the_loss_sees_latents_that_are_not_the_small_ones(
    small: AutoencoderKL, shown: tuple[np.ndarray, list[Item]]
) -> None:
    pixels, noise = Crops(*shown, 2)(0)
    vae, loss = learning(grown_vae(), "outer"), Loss(small, "outer")
    before = loss(vae, pixels, noise)
    with torch.no_grad():
        vae.quant_conv.bias[:8] += 3
    assert loss(vae, pixels, noise) > before + 1
    loss.part = "decoder"  # which is shown the small one's latents, whatever the encoder does
    assert loss(vae, pixels, noise) < before + 1
