"""Passes come and go, and what the steps of a run share belongs to the run: threads and pipelines may share a UNet."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import UNET, VAE
from sdedit import AutoencoderKL, UNet2DConditionModel
from sdedit.models.fast.deep_reuse import DeepReuse
from sdedit.models.fast.full_speed import QUICK, one_run
from sdedit.models.fast.packing import PACKING
from sdedit.models.fast.passes import Pass
from sdedit.models.fast.run_cache import cache_of
from sdedit.models.layers import Upsample2D

STEPS = 7


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def unet(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(UNET).eval().to(request.param).requires_grad_(False)


def kinds(network: nn.Module) -> list[type]:
    return [type(layer) for layer in network.modules()]


@torch.no_grad()
def denoise(unet: UNet2DConditionModel, seed: int, barrier: threading.Barrier | None = None) -> Tensor:
    """A loop with a text, a number of pictures and a size of its own."""
    g = torch.Generator().manual_seed(seed)
    batch, side = 1 + seed % 2, 8 + 2 * (seed % 3)
    x = torch.randn(batch, 4, side, 8, generator=g).to(unet.dtype)
    text = torch.randn(2 * batch, 7, 32, generator=g).to(unet.dtype)
    with one_run(unet):
        for step in range(STEPS):
            if barrier is not None:
                barrier.wait(60)
            without, with_text = unet(x, 900 - 100 * step, text).sample.chunk(2)
            x = x - 0.1 * (without + 3 * (with_text - without))
    return x


@pytest.mark.parametrize("option", ["plain", "reuse", "freeu"])
def test_one_unet_in_four_threads_gives_what_it_gives_one_after_the_other(
    unet: UNet2DConditionModel, option: str
) -> None:
    if option == "reuse":
        unet.reuse = DeepReuse(every=3)
    elif option == "freeu":
        unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    alone = [denoise(unet, seed) for seed in range(4)]
    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda seed: denoise(unet, seed, barrier), range(4)))
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@torch.no_grad()
def test_a_run_inside_a_run_leaves_it_as_it_was(unet: UNet2DConditionModel) -> None:
    """As when a callback draws with the same UNet."""
    unet.reuse = DeepReuse(every=3)
    x, text = torch.randn(1, 4, 8, 8).to(unet.dtype), torch.randn(2, 7, 32).to(unet.dtype)
    with one_run(unet):
        alone = [unet(x, t, text).sample for t in (900, 800, 700, 600)]
    with one_run(unet) as outer:
        nested = []
        for t in (900, 800, 700, 600):
            nested.append(unet(x, t, text).sample)
            with one_run(unet) as inner:
                unet(x, t, text + 1)
                assert cache_of(unet) is inner
            assert cache_of(unet) is outer
    assert all(torch.equal(a, b) for a, b in zip(nested, alone, strict=True)) and cache_of(unet) is None


def test_what_overlapping_runs_have_installed_goes_with_the_last(unet: UNet2DConditionModel) -> None:
    plain = kinds(unet)
    began, end = threading.Event(), threading.Event()

    def other() -> None:
        with one_run(unet):
            began.set()
            end.wait(60)

    with ThreadPoolExecutor(1) as threads:
        with one_run(unet):
            fast = kinds(unet)
            done = threads.submit(other)
            assert began.wait(60)
            assert kinds(unet) == fast != plain
        assert kinds(unet) == fast
        end.set()
        done.result()
    assert kinds(unet) == plain


@torch.no_grad()
def test_calls_are_at_full_speed_in_and_outside_runs_to_the_same_bits(unet: UNet2DConditionModel) -> None:
    seen: list[type] = []
    upsample = next(layer for layer in unet.modules() if isinstance(layer, Upsample2D))
    upsample.register_forward_pre_hook(lambda layer, _: seen.append(type(layer)))
    given = torch.randn(1, 4, 8, 8).to(unet.dtype), 5, torch.randn(2, 7, 32).to(unet.dtype)
    plain = kinds(unet)
    outside = unet(*given).sample
    by_name = unet(**dict(zip(("sample", "timestep", "encoder_hidden_states"), given, strict=True))).sample
    with one_run(unet):
        assert torch.equal(unet(*given).sample, outside)
    assert torch.equal(by_name, outside) and kinds(unet) == plain
    assert len(seen) == 3 and Upsample2D not in seen


@torch.no_grad()
def test_the_plain_networks_compute_the_same(unet: UNet2DConditionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit but for upsampling, which adds weights up where the plain layer adds products."""
    vae = AutoencoderKL(**VAE).eval().to(unet.dtype)
    text = torch.randn(2, 7, 32).to(unet.dtype)

    def compute() -> list[Tensor]:
        torch.manual_seed(0)
        x, pixels = torch.randn(1, 4, 8, 8).to(unet.dtype), torch.randn(1, 3, 32, 32).to(unet.dtype)
        return [unet(x, 5, text).sample, vae.decode(x).sample, vae.encode(pixels).latent_dist.mean]

    def without(*layers: type) -> Any:
        monkeypatch.setattr(QUICK, "_fast", {plain: fast for plain, fast in quick.items() if plain not in layers})
        return compute()

    quick = dict(QUICK._fast)
    fast = compute()
    few_products = without(*(set(quick) - {Upsample2D}))
    assert all(torch.equal(a, b) for a, b in zip(few_products, fast, strict=True))
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if unet.dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for a, b in zip(without(*quick), fast, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_copies_and_pickles_of_a_network_in_use_are_plain(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    plain = kinds(unet)
    with one_run(unet):
        assert kinds(unet) != plain
        copied = copy.deepcopy(unet)
        torch.save(unet, tmp_path / "unet.pt")
    assert kinds(copied) == plain == kinds(torch.load(tmp_path / "unet.pt", weights_only=False))


def test_a_pass_leaves_what_it_does_not_know() -> None:
    class Own(nn.Linear):
        pass

    class Fast(nn.Linear):
        pass

    offloaded = nn.Linear(2, 2)
    offloaded.forward = lambda x: x  # type: ignore[method-assign]
    network = nn.ModuleList([nn.Linear(2, 2), Own(2, 2), offloaded, nn.Conv2d(2, 2, 1)])
    plain, one = kinds(network), Pass(Fast)
    with one.installed(network), one.installed(network):
        assert kinds(network) == [nn.ModuleList, Fast, Own, nn.Linear, nn.Conv2d]
    assert kinds(network) == plain
    with pytest.raises(RuntimeError, match="within"), one.installed(network):
        raise RuntimeError("within")
    assert kinds(network) == plain
    with one.installed("no network"), PACKING.installed(None):
        pass
