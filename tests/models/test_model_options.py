"""What diffusers' networks offer beside their call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from conftest import UNET, VAE
from sdedit import AutoencoderKL, UNet2DConditionModel

GIVEN = torch.randn(1, 4, 8, 6), 500, torch.randn(2, 7, 32)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(UNET)


def test_parameters_are_counted_as_diffusers_counts_them(unet: UNet2DConditionModel) -> None:
    theirs = diffusers.UNet2DConditionModel(**UNET)
    unet.mid_block.requires_grad_(False)
    theirs.mid_block.requires_grad_(False)
    for only_trainable in (False, True):
        count = unet.num_parameters(only_trainable, exclude_embeddings=True)
        assert count == theirs.num_parameters(only_trainable, exclude_embeddings=True)
    assert AutoencoderKL(**VAE).num_parameters() == diffusers.AutoencoderKL(**VAE).num_parameters()


def kept_for_gradients(network: nn.Module) -> tuple[int, list[Tensor]]:
    """How many values a training step keeps, and its gradients."""
    count = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.numel()
        return tensor

    network.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = (
            network(*GIVEN).sample
            if isinstance(network, UNet2DConditionModel)
            else network(torch.ones(1, 3, 16, 16)).sample
        )
    kept = count
    out.square().mean().backward()
    return kept, [p.grad for p in network.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [lambda: UNet2DConditionModel.from_config(UNET), lambda: AutoencoderKL(**VAE)])
def test_checkpointing_keeps_less_and_gives_the_same_gradients(make: Any) -> None:
    torch.manual_seed(0)
    network = make().train()
    kept, gradients = kept_for_gradients(network)
    network.enable_gradient_checkpointing()
    assert network.is_gradient_checkpointing
    less, same = kept_for_gradients(network)
    assert less < 0.7 * kept
    for a, b in zip(same, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    network.disable_gradient_checkpointing()
    assert not network.is_gradient_checkpointing
    assert not any("forward" in vars(layer) for layer in network.modules())


def test_an_adapter_by_config_is_trained_alone(unet: UNet2DConditionModel) -> None:
    peft = pytest.importorskip("peft")
    with torch.no_grad():
        plain = unet.eval()(*GIVEN).sample
    unet.requires_grad_(False)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"])
    unet.add_adapter(config)
    trained = [name for name, p in unet.named_parameters() if p.requires_grad]
    assert trained and all("lora" in name and ".default." in name for name in trained)
    assert unet.num_parameters(only_trainable=True) == sum(p.numel() for p in unet.parameters() if p.requires_grad)
    torch.testing.assert_close(unet(*GIVEN).sample, plain)  # its second factor is 0
    with pytest.raises(ValueError, match="there is one of this name"):
        unet.add_adapter(config)
    unet.add_adapter(config, "other")
    assert list(unet.peft_config) == ["default", "other"]


def test_layerwise_casting_halves_the_weights_and_computes_as_before(unet: UNet2DConditionModel) -> None:
    unet.eval().requires_grad_(False)
    plain, dtypes = unet(*GIVEN).sample, {n: p.dtype for n, p in unet.named_parameters()}
    unet.enable_layerwise_casting(storage_dtype=torch.float16, skip_modules_pattern=["conv_out"])
    stored = {name: p.dtype for name, p in unet.named_parameters()}
    assert stored["down_blocks.0.resnets.0.conv1.weight"] == stored["time_embedding.linear_1.weight"] == torch.float16
    assert stored["conv_out.weight"] == torch.float32 == dtypes["conv_out.weight"]
    assert all(dtype == torch.float32 for name, dtype in stored.items() if "norm" in name)
    assert unet.dtype == torch.float32
    near = unet(*GIVEN).sample
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, plain, rtol=0.02, atol=0.01)
    rounded = UNet2DConditionModel.from_config(UNET).eval().requires_grad_(False)
    rounded.load_state_dict({name: t.float() for name, t in unet.state_dict().items()})
    torch.testing.assert_close(rounded(*GIVEN).sample, near, rtol=1e-4, atol=1e-5)  # the rounding is all
    with pytest.raises(ValueError, match="on already"):
        unet.enable_layerwise_casting()


def test_a_config_is_read_without_its_weights(unet: UNet2DConditionModel, tmp_path: Path) -> None:
    unet.save_config(tmp_path / "unet")
    config = UNet2DConditionModel.load_config(tmp_path, subfolder="unet")
    assert config["block_out_channels"] == list(UNET["block_out_channels"])
    assert UNet2DConditionModel.from_config(config).config.cross_attention_dim == UNET["cross_attention_dim"]
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        UNet2DConditionModel.load_config(tmp_path)


def test_attention_backends_compute_the_same(unet: UNet2DConditionModel) -> None:
    unet.eval().requires_grad_(False)
    plain = unet(*GIVEN).sample
    for backend in ("_native_math", "_native_flash", "native"):
        unet.set_attention_backend(backend)
        torch.testing.assert_close(unet(*GIVEN).sample, plain)
    unet.set_attention_backend("_native_math")
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1")
    assert layer.core is not None
    unet.reset_attention_backend()
    assert layer.core is None
    with pytest.raises(ValueError, match="backend='sage'; expected one of native"):
        unet.set_attention_backend("sage")
