"""Adapters at work: the same picture as diffusers, weights and scales, fusing and taking it back."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from lora_by_hand import (
    CONVS,
    TEXT_MODULES,
    UNET_MODULES,
    as_diffusers,
    as_kohya,
    as_old_diffusers,
    as_peft,
    draw,
    fingerprint,
    load,
    lora,
    same,
)
from sdedit.models import adapters


@pytest.fixture
def pipe(pipe):
    before = fingerprint(pipe)
    yield pipe
    pipe.unload_lora_weights()
    assert fingerprint(pipe) == before  # every test of this file ends where it began


@pytest.fixture
def theirs(folder):
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    return theirs


def both(pipe, theirs, tmp_path, state, metadata=None, **call):
    """One file in both pipelines; the pictures must be the same, and not the one without the file."""
    path = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(state, path, metadata=metadata)
    without = draw(pipe)
    report = pipe.load_lora_weights(path)
    load(theirs, path)
    ours = draw(pipe, **call)
    assert (ours - without).abs().max() > 0.02
    same(ours, draw(theirs, **call))
    return report


LAYOUTS = {
    "diffusers": as_diffusers,
    "old diffusers": as_old_diffusers,
    "PEFT": as_peft,
    "kohya": as_kohya,
    "kohya with alpha": lambda made: as_kohya(made, alpha=1.5),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_are_those_of_diffusers(layout, pipe, theirs, tmp_path):
    report = both(pipe, theirs, tmp_path, LAYOUTS[layout](lora(pipe)))
    assert sum(report.matched.values()) == (6 if layout == "old diffusers" else 11)


def test_locon_picture(pipe, theirs, tmp_path):
    state = as_kohya(lora(pipe, unet=[*UNET_MODULES, *CONVS]), alpha=2.0)
    assert both(pipe, theirs, tmp_path, state).matched["unet"] == 10


def test_dora_picture(pipe, theirs, tmp_path):
    """In PEFT's layout, which diffusers reads; in kohya's, which it does not, the picture is the same."""
    made = lora(pipe, text=[])
    rows = {m: pipe.unet.get_submodule(m).weight.detach().norm(dim=1) * 1.2 for m in UNET_MODULES}
    state = as_peft(made) | {f"unet.{m}.lora_magnitude_vector": row for m, row in rows.items()}
    assert both(pipe, theirs, tmp_path, state).kinds == {"LoRA with DoRA": 7}
    drawn = draw(pipe)
    pipe.unload_lora_weights()
    kohya = as_kohya(made) | {f"lora_unet_{m.replace('.', '_')}.dora_scale": row[:, None] for m, row in rows.items()}
    pipe.load_lora_weights(kohya)
    assert torch.equal(draw(pipe), drawn)


def test_alpha_in_metadata(pipe, theirs, tmp_path):
    metadata = {
        "lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "unet.target_modules": UNET_MODULES})
    }
    both(pipe, theirs, tmp_path, as_peft(lora(pipe, text=[])), metadata)
    assert pipe.unet.peft_config["default_0"].lora_alpha == 2


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.7])
def test_scale_of_a_call(scale, pipe, theirs, tmp_path):
    save_file(as_diffusers(lora(pipe)), tmp_path / "a.safetensors")
    for each in (pipe, theirs):
        load(each, tmp_path / "a.safetensors", adapter_name="a")
    first = draw(pipe)
    scaled = draw(pipe, cross_attention_kwargs={"scale": scale})
    same(scaled, draw(theirs, cross_attention_kwargs={"scale": scale}))
    assert torch.equal(draw(pipe), first)  # the next call is as before, to the last bit
    if scale == 0:
        pipe.disable_lora()
        assert torch.equal(draw(pipe), scaled)
    with_scale = pipe.encode_prompt("cat", lora_scale=scale)[0]
    same(with_scale, theirs.encode_prompt("cat", "cpu", 1, False, lora_scale=scale)[0])


BLOCK_WEIGHTS = [
    0.3,
    {"unet": 0.5, "text_encoder": 0.0},
    {"unet": {"down": 0.2, "mid": 1.4, "up": {"block_1": [0.1, 0.5, 0.9]}}},
    {"unet": {"up": {"block_1": 0.0}}, "text_encoder": 2.0},
]


@pytest.mark.parametrize("weight", BLOCK_WEIGHTS, ids=str)
def test_weights_by_block(weight, pipe, theirs, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        save_file(as_diffusers(lora(pipe, seed=seed)), tmp_path / f"{name}.safetensors")
        for each in (pipe, theirs):
            load(each, tmp_path / f"{name}.safetensors", adapter_name=name)
    # (In diffusers the text encoder still has both active here; the newest alone is what its documentation says.)
    assert pipe.get_active_adapters() == theirs.get_active_adapters() == ["b"]
    for each in (pipe, theirs):
        each.set_adapters(["a", "b"], [weight, 0.7])
    assert sorted(pipe.get_active_adapters()) == sorted(theirs.get_active_adapters()) == ["a", "b"]
    assert pipe.get_list_adapters() == theirs.get_list_adapters()
    same(draw(pipe), draw(theirs))
    for each in (pipe, theirs):
        each.delete_adapters("b")
    assert pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]}
    same(draw(pipe), draw(theirs))


def test_set_adapters_refuses(pipe):
    pipe.load_lora_weights(as_diffusers(lora(pipe)), "a")
    before = draw(pipe)
    for weights, says in (
        ([1.0, 2.0], "2 for 1 adapters"),
        (float("nan"), "expected a number"),
        ({"unet": {"sideways": 1}}, "expected a number, or for unet down, mid, up"),
        ({"vae": 1.0}, "expected unet, text_encoder"),
        ({"down": {"block_7": 1.0}}, "expected block_0, block_1"),
        ({"up": {"block_1": [1.0, 2.0]}}, "has 2 weights; expected 1 or 3"),
    ):
        with pytest.raises(ValueError, match=says):
            pipe.set_adapters("a", weights)
    with pytest.raises(ValueError, match=r"'c'.* not loaded; loaded are .'a'"):
        pipe.set_adapters(["a", "c"])
    assert torch.equal(draw(pipe), before)


def test_enable_and_disable(pipe):
    without = draw(pipe)
    pipe.load_lora_weights(as_diffusers(lora(pipe)))
    with_it = draw(pipe)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), without)
    pipe.enable_lora()
    assert torch.equal(draw(pipe), with_it) and not torch.equal(with_it, without)


def test_fused_pictures_are_those_of_diffusers(pipe, theirs, tmp_path):
    for name, seed in (("a", 0), ("b", 1)):
        save_file(as_diffusers(lora(pipe, seed=seed)), tmp_path / f"{name}.safetensors")
        for each in (pipe, theirs):
            load(each, tmp_path / f"{name}.safetensors", adapter_name=name)
    for each in (pipe, theirs):
        each.set_adapters(["a", "b"], [0.5, 0.8])
        each.fuse_lora(lora_scale=0.6, adapter_names=["a", "b"])
    same(draw(pipe), draw(theirs), 1e-4)
    pipe.unfuse_lora()
    theirs.unfuse_lora()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_fuse_unfuse_unload_leaves_every_bit(dtype, folder):
    from sdedit import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=dtype)
    before = [{n: p.clone() for n, p in m.state_dict().items()} for m in (pipe.unet, pipe.text_encoder)]
    pipe.load_lora_weights(as_kohya(lora(pipe, unet=[*UNET_MODULES, *CONVS]), alpha=3.0), "a")
    pipe.load_lora_weights(
        {"lora_unet_conv_in.diff": torch.randn(32, 4, 3, 3), "lora_unet_conv_in.diff_b": torch.randn(32)}, "b"
    )
    pipe.set_adapters(["a", "b"], [0.7, 1.1])
    pipe.fuse_lora(adapter_names="a")
    pipe.fuse_lora(lora_scale=0.3, adapter_names=["b"])
    assert not torch.equal(pipe.unet.conv_in.base_layer.weight, before[0]["conv_in.weight"])
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    for model, state in zip((pipe.unet, pipe.text_encoder), before, strict=True):
        assert model.state_dict().keys() == state.keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.view(torch.uint8), state[name].view(torch.uint8)), name


def test_fusing(pipe, tmp_path):
    """Fused, the picture is the same; a second adapter works beside it; then all is given back."""
    pipe.load_lora_weights(as_diffusers(lora(pipe)), "a")
    alone = draw(pipe)
    pipe.load_lora_weights(as_diffusers(lora(pipe, seed=1)), "b")
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    together = draw(pipe)
    pipe.fuse_lora(adapter_names="a", safe_fusing=True)
    same(draw(pipe), together)
    assert pipe.get_active_adapters() == ["a", "b"]
    pipe.disable_lora()
    same(draw(pipe), alone)
    pipe.enable_lora()
    for refused in (pipe.set_adapters, pipe.delete_adapters):
        with pytest.raises(ValueError, match=r"'a'.*fused into the weights; unfuse_lora first"):
            refused("a")
    pipe.set_adapters("b", 0.0)
    same(draw(pipe), alone)
    pipe.unfuse_lora()
    pipe.set_adapters(["a", "b"], [1.0, 0.5])
    assert torch.equal(draw(pipe), together)


def test_fused_and_unloaded_stays(folder):
    from sdedit import StableDiffusionImg2ImgPipeline

    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    pipe.load_lora_weights(as_diffusers(lora(pipe)))
    before = draw(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    same(draw(pipe), before)
    assert not adapters.layers(pipe.unet) and not hasattr(pipe.unet, "peft_config")


def test_safe_fusing_refuses_infinity(pipe):
    made = lora(pipe, text=[])
    made["unet", UNET_MODULES[-1], "up"] *= 1e38
    made["unet", UNET_MODULES[-1], "down"] *= 1e38
    pipe.load_lora_weights(as_diffusers(made))
    with pytest.raises(ValueError, match="NaN"):
        pipe.fuse_lora(safe_fusing=True)
    assert not adapters.fused(pipe.unet)


def test_fusing_keeps_a_copy_of_the_changed_weights_only(pipe):
    pipe.load_lora_weights(as_diffusers(lora(pipe)))
    pipe.fuse_lora()
    kept = sum(la.before_fusing[0].nbytes for m in (pipe.unet, pipe.text_encoder) for la in adapters.layers(m).values())
    changed = [adapters.adaptable(pipe.unet)[m] for m in UNET_MODULES]
    changed += [adapters.adaptable(pipe.text_encoder)[m] for m in TEXT_MODULES]
    assert kept == sum(layer.weight.nbytes for layer in changed)
    pipe.unfuse_lora()
    assert not any(hasattr(layer, "before_fusing") for layer in adapters.layers(pipe.unet).values())


def test_lycoris_kinds_change_the_weights_as_their_formulas_say(pipe):
    """Through PEFT's layers and fused: the weight is W + ΔW (each ΔW itself is tested in test_lora_kinds)."""
    conv, linear = CONVS[0], UNET_MODULES[0]
    flat = [f"lora_unet_{m.replace('.', '_')}" for m in (conv, linear)]
    a1, b1, a2, b2 = torch.randn(64, 2), torch.randn(2, 288), torch.randn(64, 2), torch.randn(2, 288)
    w1, w2 = torch.randn(4, 8), torch.randn(8, 4)
    state = {
        f"{flat[0]}.hada_w1_a": a1,
        f"{flat[0]}.hada_w1_b": b1,
        f"{flat[0]}.hada_w2_a": a2,
        f"{flat[0]}.hada_w2_b": b2,
    }
    state |= {f"{flat[1]}.lokr_w1": w1, f"{flat[1]}.lokr_w2": w2, "lora_unet_conv_out.diff": torch.ones(4, 32, 3, 3)}
    state |= {f"{flat[0]}.alpha": torch.tensor(1.0), "lora_unet_conv_out.diff_b": torch.ones(4)}
    own = {
        m: layer.weight.detach().clone() for m, layer in adapters.adaptable(pipe.unet).items() if m in (conv, linear)
    }
    out = pipe.unet.conv_out.weight.detach().clone(), pipe.unet.conv_out.bias.detach().clone()
    pipe.load_lora_weights(state)
    pipe.set_adapters("default_0", 0.5)
    x, t = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    with torch.no_grad():
        beside = pipe.unet(x, 5, t).sample
        pipe.fuse_lora()
        torch.testing.assert_close(pipe.unet(x, 5, t).sample, beside, atol=1e-4, rtol=1e-4)
    now = adapters.adaptable(pipe.unet)
    loha = ((a1 @ b1) * (a2 @ b2)).reshape(64, 32, 3, 3) * 0.5
    torch.testing.assert_close(now[conv].weight, own[conv] + 0.5 * loha)
    torch.testing.assert_close(now[linear].weight, own[linear] + 0.5 * torch.kron(w1, w2))
    torch.testing.assert_close(now["conv_out"].weight, out[0] + 0.5)
    torch.testing.assert_close(now["conv_out"].bias, out[1] + 0.5)
    pipe.unfuse_lora()
