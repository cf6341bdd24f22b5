"""Offloading: the same picture, and weights that are on the device only while they are needed."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lora_by_hand
from conftest import picture
from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.models.fast import tiling
from sdedit.models.options import vae as vae_options

HERE = torch.device("cpu", 0)  # as a device other than "cpu", on machines that have no other


@pytest.fixture
def own(folder: Any) -> Any:
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def networks(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def draw(pipe: Any, **more: Any) -> Any:
    arguments: Any = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipe("a cat", picture(), **(arguments | more)).images


def test_without_an_accelerator_the_error_says_so(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for enable in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires an accelerator"):
            enable()
        with pytest.raises(ValueError, match="both have a number"):
            enable(gpu_id=1, device="cuda:0")
    draw(pipe)


def test_the_accelerator_at_hand_is_found(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sdedit.models.offload import choose_device

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert choose_device("it", None, None) == torch.device("cuda", 0)
    assert choose_device("it", 1, None) == torch.device("cuda", 1)
    assert choose_device("it", None, "cuda:2") == torch.device("cuda", 2)


def test_accelerate_is_asked_for_where_it_is_missing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"sdedit\[offload\]"):
        pipe.enable_sequential_cpu_offload(device="cpu")
    draw(pipe)


def test_layer_by_layer_weights_are_there_only_while_a_layer_computes(own: Any) -> None:
    before, names = draw(own), set(own.unet.state_dict())
    own.enable_sequential_cpu_offload(device="cpu")
    layer = own.unet.mid_block.resnets[0]
    seen = []
    # conv1 has its weights while it computes, conv2 not yet.
    layer.conv1.register_forward_hook(lambda m, *_: None)
    forward = layer.conv1._old_forward

    def spy(*args: Any) -> Any:
        seen.append((layer.conv1.weight.is_meta, layer.conv2.weight.is_meta, own.vae.encoder.conv_in.weight.is_meta))
        return forward(*args)

    layer.conv1._old_forward = spy
    np.testing.assert_allclose(draw(own), before, atol=1e-5)  # layers with hooks convolve enlarged maps as they are
    assert set(seen) == {(False, True, True)}
    assert all(p.is_meta for part in networks(own).values() for p in part.parameters())
    assert own.device.type == "cpu"
    layer.conv1._old_forward = forward
    own.remove_all_hooks()
    assert set(own.unet.state_dict()) == names
    assert not any(p.is_meta for part in networks(own).values() for p in part.parameters())
    assert not any("forward" in vars(layer) for part in networks(own).values() for layer in part.modules())
    np.testing.assert_array_equal(draw(own), before)


def test_layer_by_layer_with_fused_projections_tiles_and_float32_in_need(
    own: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "_TILE", 1)
    monkeypatch.setattr(vae_options, "_SMALL", 0)
    own.fuse_qkv_projections()
    own.enable_vae_tiling()
    before = draw(own)
    own.enable_sequential_cpu_offload(device="cpu")
    np.testing.assert_allclose(draw(own), before, atol=1e-5)
    own.remove_all_hooks()
    own.to(torch.float16)
    with torch.no_grad():
        own.vae.decoder.conv_in.weight *= 6e4  # overflows in float16
        own.vae.decoder.conv_in.weight.clamp_(-6e4, 6e4)
    with pytest.warns(UserWarning, match="again in float32"):
        before = draw(own)
    own.enable_sequential_cpu_offload(device="cpu")
    with pytest.warns(UserWarning, match="again in float32"):
        np.testing.assert_allclose(draw(own), before, atol=1e-3)
    assert own.vae.dtype == torch.float16


def test_what_would_change_or_save_offloaded_weights_is_refused(own: Any, tmp_path: Any) -> None:
    factors = lora_by_hand.as_diffusers(lora_by_hand.lora(own))
    own.enable_sequential_cpu_offload(device="cpu")
    calls = [
        lambda: own.load_lora_weights(factors),
        lambda: own.save_pretrained(tmp_path / "folder"),
        lambda: own.save_single_file(tmp_path / "file.safetensors"),
        lambda: own.fuse_qkv_projections(),
        lambda: own.load_textual_inversion({"<new>": torch.zeros(32)}),
        lambda: own.unload_ip_adapter(),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="remove_all_hooks"):
            call()
    own.remove_all_hooks()
    own.load_lora_weights(factors)
    with_adapter = draw(own)
    own.enable_sequential_cpu_offload(device="cpu")
    np.testing.assert_allclose(draw(own), with_adapter, atol=1e-5)


def moves(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which network went where, in order: `to` only writes it down, and what the parameters say of their device."""
    log: list[tuple[str, str]] = []
    names = {id(part): name for name, part in networks(pipe).items()}
    where = dict.fromkeys(names.values(), "cpu")

    def to(self: nn.Module, device: Any) -> nn.Module:
        where[names[id(self)]] = str(device)
        log.append((names[id(self)], str(device)))
        return self

    def parameters(self: nn.Module, recurse: bool = True) -> Any:
        found = list(plain(self, recurse))
        if id(self) in names:
            first = found[0]
            proxy = SimpleNamespace(
                device=torch.device(where[names[id(self)]]),
                dtype=first.dtype,
                is_meta=False,
                is_floating_point=first.is_floating_point,
            )
            return iter([proxy])
        return iter(found)

    plain = nn.Module.parameters
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(nn.Module, "parameters", parameters)
    return log


def test_whole_networks_come_when_they_are_called_and_go_for_the_next(own: Any, monkeypatch: Any) -> None:
    before = draw(own)
    log = moves(own, monkeypatch)
    own.enable_model_cpu_offload(device=HERE)
    assert own.device == HERE and not log
    np.testing.assert_array_equal(draw(own), before)
    come, go = "cpu:0", "cpu"
    order = ["text_encoder", "vae", "unet", "vae"]
    expected = [("text_encoder", come)]
    for last, name in itertools.pairwise(order):
        expected += [(last, go), (name, come)]
    assert log == [*expected, ("vae", go)]
    log.clear()
    draw(own, output_type="latent")
    assert log[-2:] == [("unet", come), ("unet", go)]
    log.clear()
    with pytest.raises(ZeroDivisionError):
        draw(own, callback_on_step_end=lambda *_: 1 / 0)
    assert log[-1] == ("unet", go)
    own.remove_all_hooks()
    log.clear()
    np.testing.assert_array_equal(draw(own), before)
    assert not log


def test_inputs_follow_a_network_to_its_device(own: Any) -> None:
    own.enable_model_cpu_offload(device="meta")  # where nothing is computed, but devices count
    try:
        decoded = own.vae.decode(torch.zeros(1, 4, 8, 8)).sample
        assert decoded.is_meta and own.vae.device.type == "meta" and own.unet.device.type == "cpu"
        own.unet(torch.zeros(1, 4, 8, 8), 1, encoder_hidden_states=torch.zeros(1, 5, 32))
        assert own.unet.device.type == "meta"
    except NotImplementedError:
        pass  # nothing comes back from there


def test_offloaded_pipelines_are_not_moved_but_cast(own: Any) -> None:
    own.enable_model_cpu_offload(device="cpu")
    for arguments in (("cpu",), (torch.device("cpu"), torch.float16)):
        with pytest.raises(ValueError, match="remove_all_hooks"):
            own.to(*arguments)
    assert own.to(torch.bfloat16).dtype == torch.bfloat16
    own.enable_sequential_cpu_offload(device="cpu")  # ends the other
    own.remove_all_hooks()
    own.to("cpu")
    own.remove_all_hooks()
