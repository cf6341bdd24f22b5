"""Ways to compute attention that change nothing, FreeU as diffusers has it, and fused projections."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import lora_by_hand
from conftest import UNET, VAE, picture
from sdedit import AutoencoderKL, UNet2DConditionModel
from sdedit.models.attention import Attention, attention
from sdedit.models.fast.freeu import lowest
from sdedit.models.options import attention as attention_options

ARGUMENTS: Any = {"num_inference_steps": 4, "strength": 0.8, "output_type": "np"}


def draw(pipe: Any) -> Tensor:
    drawn = pipe("a cat", picture(), generator=torch.Generator().manual_seed(0), **ARGUMENTS)
    return torch.from_numpy(drawn.images)


@pytest.fixture
def own(pipe: Any) -> Any:
    """The pipeline with a UNet and a VAE that no other test has."""
    pipe.unet, pipe.vae = (type(part).from_config(part.config) for part in (pipe.unet, pipe.vae))
    for part in (pipe.unet, pipe.vae):
        part.eval()
        with torch.no_grad():
            for parameter in part.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return pipe


@given(
    shape=st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 9), st.integers(1, 9)),
    size=st.integers(1, 4),
)
@settings(max_examples=30, deadline=None)
def test_a_few_heads_or_queries_at_a_time_give_the_same(shape: tuple[int, int, int, int], size: int) -> None:
    B, heads, N, M = shape
    q, k, v = (torch.randn(B, heads, n, 8) for n in (N, M, M))
    whole = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention_options.sliced(q, k, v, size=size), whole)
    torch.testing.assert_close(attention_options.by_queries(q, k, v), whole)


def test_queries_are_taken_in_several_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        sizes.append(q.shape[2])
        return plain(q, k, v)

    plain = F.scaled_dot_product_attention
    q, k, v = torch.randn(3, 1, 2, 50, 8).unbind()
    monkeypatch.setattr(attention_options, "_SCORES", 4 * 2 * 50 * 16)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    torch.testing.assert_close(attention_options.by_queries(q, k, v), plain(q, k, v))
    assert sizes == [16, 16, 16, 2]


@pytest.mark.parametrize(("slice_size", "heads"), [("auto", 2), ("max", 1), (3, 3), (None, 4)])
def test_slicing_computes_so_many_heads_at_a_time(own: Any, slice_size: Any, heads: int, monkeypatch: Any) -> None:
    inputs = torch.randn(2, 4, 8, 8), 500, torch.randn(2, 5, 32)
    plain, seen = F.scaled_dot_product_attention, []

    def spy(q: Tensor, *rest: Tensor) -> Tensor:
        seen.append(q.shape[1])
        return plain(q, *rest)

    with torch.no_grad():
        before = own.unet(*inputs).sample
        own.enable_attention_slicing(slice_size)
        monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
        torch.testing.assert_close(own.unet(*inputs).sample, before)
        assert max(seen) == heads
        own.disable_attention_slicing()
        torch.testing.assert_close(own.unet(*inputs).sample, before, rtol=0, atol=0)
        assert max(seen) == 4


@pytest.mark.parametrize("slice_size", [0, -1, 5, "half", 1.5, True])
def test_a_slice_size_that_means_nothing_is_refused(pipe: Any, slice_size: Any) -> None:
    with pytest.raises(ValueError, match="slice_size="):
        pipe.enable_attention_slicing(slice_size)


def test_xformers_says_what_is_missing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    with pytest.raises(ModuleNotFoundError, match="pip install xformers"):
        pipe.enable_xformers_memory_efficient_attention()
    install_xformers(monkeypatch, [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="CUDA"):
        pipe.unet.enable_xformers_memory_efficient_attention()
    assert all(m.core is None for m in pipe.unet.modules() if isinstance(m, Attention))


def install_xformers(monkeypatch: pytest.MonkeyPatch, ops: list[Any]) -> None:
    """A module with xFormers' one function: tensors are (B, N, heads, d) there."""

    def memory_efficient_attention(q: Tensor, k: Tensor, v: Tensor, op: Any = None) -> Tensor:
        ops.append(op)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)

    package, module = ModuleType("xformers"), ModuleType("xformers.ops")
    module.memory_efficient_attention = memory_efficient_attention  # type: ignore[attr-defined]
    package.ops = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", module)


def test_xformers_gets_its_own_layout_and_the_chosen_kernel(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, ops = draw(own), []
    install_xformers(monkeypatch, ops)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    own.enable_xformers_memory_efficient_attention("flash")
    monkeypatch.undo()
    install_xformers(monkeypatch, ops)
    torch.testing.assert_close(draw(own), before, rtol=1e-4, atol=1e-5)
    assert set(ops) == {"flash"}
    ops.clear()
    own.disable_xformers_memory_efficient_attention()
    torch.testing.assert_close(draw(own), before, rtol=0, atol=0)
    assert not ops


@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 4), (2, 3)])
def test_the_lowest_frequencies_are_those_of_fft(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    kept = torch.zeros(size)
    kept[torch.meshgrid(*(torch.tensor([0, n - 1]) for n in size), indexing="ij")] = 1
    torch.testing.assert_close(lowest(x), torch.fft.ifft2(torch.fft.fft2(x) * kept).real)


def test_freeu_is_diffusers(own: Any) -> None:
    theirs, ours = diffusers.UNet2DConditionModel(**UNET).eval(), own.unet
    theirs.load_state_dict(ours.state_dict())
    x, t, text = torch.randn(2, 4, 8, 12), 321, torch.randn(2, 5, 32)
    with torch.no_grad():
        before = ours(x, t, text).sample
        for model in (ours, theirs):
            model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
        torch.testing.assert_close(ours(x, t, text).sample, theirs(x, t, text).sample, rtol=1e-4, atol=1e-5)
        assert (ours(x, t, text).sample - before).abs().max() > 1e-2
        ours.disable_freeu()
        torch.testing.assert_close(ours(x, t, text).sample, before, rtol=0, atol=0)


def test_freeu_of_the_pipeline_is_diffusers(own: Any) -> None:
    theirs = diffusers.StableDiffusionImg2ImgPipeline(
        vae=diffusers.AutoencoderKL(**VAE),
        text_encoder=own.text_encoder,
        tokenizer=own.tokenizer,
        unet=diffusers.UNet2DConditionModel(**UNET),
        scheduler=diffusers.DDIMScheduler.from_config(dict(own.scheduler.config)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.vae.load_state_dict(own.vae.state_dict())
    theirs.unet.load_state_dict(own.unet.state_dict())
    theirs.vae.eval(), theirs.unet.eval(), theirs.set_progress_bar_config(disable=True)
    for pipe in (own, theirs):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    torch.testing.assert_close(draw(own), draw(theirs), rtol=1e-3, atol=1e-3)


def test_fused_projections_change_neither_picture_nor_names(own: Any, tmp_path: Any) -> None:
    before, state = draw(own), {name: t.clone() for name, t in own.unet.state_dict().items()}
    own.fuse_qkv_projections()
    layer = own.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    assert not hasattr(layer, "to_q") and layer.to_qkv.out_features == 3 * layer.to_out[0].out_features
    torch.testing.assert_close(draw(own), before)
    assert own.unet.state_dict().keys() == state.keys()
    own.unet.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in state)
    own.unfuse_qkv_projections()
    assert all(torch.equal(t, state[name]) for name, t in own.unet.state_dict().items())
    torch.testing.assert_close(draw(own), before, rtol=0, atol=0)


def test_fused_networks_load_the_ordinary_names() -> None:
    for cls, config in ((UNet2DConditionModel, UNET), (AutoencoderKL, VAE)):
        fused, other = cls(**config), cls(**config)
        fused.fuse_qkv_projections()
        fused.load_state_dict(other.state_dict(), strict=True)
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in fused.state_dict().items())


def test_fused_projections_and_adapters_exclude_each_other(own: Any) -> None:
    files = lora_by_hand.lora(own, text=())  # the text encoder is every test's
    own.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        own.load_lora_weights({})
    own.unfuse_qkv_projections(vae=False)
    own.load_lora_weights(lora_by_hand.as_diffusers(files))
    with pytest.raises(ValueError, match="unload"):
        own.fuse_qkv_projections(vae=False)
    with_adapter = draw(own)
    own.fuse_lora()
    own.unload_lora_weights()
    own.fuse_qkv_projections()
    torch.testing.assert_close(draw(own), with_adapter, rtol=1e-3, atol=1e-4)


def test_options_reach_the_one_function() -> None:
    q, k, v = torch.randn(3, 2, 6, 8).unbind()
    torch.testing.assert_close(attention(q, k, v, 2, core=attention_options.by_queries), attention(q, k, v, 2))
