"""Adapters in a pipeline: the same picture as diffusers, weights, fusing, and leaving everything as it was."""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import tracemalloc
import warnings

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SHARED, needs_shared, picture
from sdedit.models import adapters

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET_MODULES = [
    f"{BLOCK}.attn1.to_q",
    f"{BLOCK}.attn1.to_out.0",
    f"{BLOCK}.attn2.to_k",
    f"{BLOCK}.ff.net.0.proj",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v",
    "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_q",
]
TEXT_MODULES = [f"encoder.layers.{i}.self_attn.{p}" for i in (0, 2) for p in ("q_proj", "out_proj")]
CONVS = ["down_blocks.1.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.downsamplers.0.conv"]


def lora(pipe, *, rank=4, seed=0, unet=UNET_MODULES, text=TEXT_MODULES, size=0.2):
    """Random factors by (component, module, part)."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for component, modules in (("unet", unet), ("text_encoder", text)):
        every = adapters.adaptable(getattr(pipe, component))
        for module in modules:
            shape = every[module].weight.shape
            made[component, module, "down"] = torch.randn(rank, *shape[1:], generator=generator) * size
            up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator)
            made[component, module, "up"] = up * size
    return made


def as_diffusers(made):
    text = "text_encoder.text_model.{}.lora_linear_layer.{}.weight"
    return {(f"unet.{m}.lora.{p}.weight" if c == "unet" else text.format(m, p)): t for (c, m, p), t in made.items()}


def as_old_diffusers(made):
    attention = {k: t for k, t in made.items() if ".attn" in k[1]}
    return {
        f"unet.{m.replace('.to_', '.processor.to_').removesuffix('.0')}_lora.{p}.weight": t
        for (_, m, p), t in attention.items()
    }


def as_peft(made):
    part = {"down": "A", "up": "B"}
    return {f"{c}.{'text_model.' * (c != 'unet')}{m}.lora_{part[p]}.weight": t for (c, m, p), t in made.items()}


def as_kohya(made, alpha=None):
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
    state = {f"{prefix[c]}{m.replace('.', '_')}.lora_{p}.weight": t for (c, m, p), t in made.items()}
    if alpha is not None:
        state |= {
            name.replace("lora_down.weight", "alpha"): torch.tensor(alpha)
            for name in list(state)
            if "lora_down" in name
        }
    return state


def draw(pipe, seed=0, **more):
    arguments = {"strength": 0.6, "num_inference_steps": 5, "output_type": "np"}
    arguments["generator"] = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.from_numpy(pipe("apple cat", picture(64, 64), **arguments | more).images)


def fingerprint(pipe):
    """Names, bytes and trainability of all weights, and how many modules and hooks there are."""
    digest = hashlib.sha256()
    for model in (pipe.unet, pipe.text_encoder):
        for name, parameter in model.named_parameters():
            digest.update(f"{name}{parameter.requires_grad}{parameter.dtype}".encode())
            digest.update(parameter.detach().numpy().tobytes())
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
        digest.update(f"{[n for n, _ in model.named_modules()]}{hooks}{hasattr(model, 'peft_config')}".encode())
    return digest.hexdigest()


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


def load(pipe, path, **more):
    """diffusers' own warnings do not concern these tests; ours would fail them."""
    with warnings.catch_warnings():
        if isinstance(pipe, diffusers.DiffusionPipeline):
            warnings.simplefilter("ignore")
        return pipe.load_lora_weights(path, **more)


def same(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


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


def other_model(pipe):
    made = lora(pipe, text=[])
    made["unet", UNET_MODULES[2], "down"] = torch.zeros(4, 1024)
    return as_diffusers(made)


def with_nan(pipe):
    made = lora(pipe)
    made["text_encoder", TEXT_MODULES[0], "up"][0] = torch.nan
    return as_diffusers(made)


def with_unknown(pipe):
    return as_kohya(lora(pipe)) | {"lora_unet_nowhere.lora_down.weight": torch.zeros(4, 4)}


def with_missing_bias(pipe):
    return {f"lora_unet_{UNET_MODULES[0].replace('.', '_')}.diff_b": torch.zeros(32)}


@pytest.mark.parametrize(
    "state, says",
    [
        (other_model, "it is for Stable Diffusion 2.x"),
        (with_nan, "q_proj holds NaN"),
        (with_unknown, "nowhere"),
        (with_missing_bias, "has a bias for a layer that has none"),
    ],
)
@pytest.mark.parametrize("loaded_before", [False, True])
def test_a_failed_load_leaves_everything(state, says, loaded_before, pipe, tmp_path):
    if loaded_before:
        pipe.load_lora_weights(as_diffusers(lora(pipe, seed=3)), "first")
        pipe.set_adapters("first", 0.7)
    before, listed, drawn = fingerprint(pipe), pipe.get_list_adapters(), draw(pipe)
    path = tmp_path / "bad.safetensors"
    save_file(state(pipe), path)
    with pytest.raises(ValueError, match=says) as error:
        pipe.load_lora_weights(path)
    assert str(path) in str(error.value)
    assert fingerprint(pipe) == before and pipe.get_list_adapters() == listed and torch.equal(draw(pipe), drawn)


def test_a_load_that_breaks_in_the_middle_is_taken_back(pipe, monkeypatch):
    pipe.load_lora_weights(as_diffusers(lora(pipe, seed=3)), "first")
    before, drawn = fingerprint(pipe), draw(pipe)
    attach = adapters.attach

    def breaking(model, *arguments):
        attach(model, *arguments)
        if model is pipe.text_encoder:
            raise MemoryError("no more")

    monkeypatch.setattr(adapters, "attach", breaking)
    with pytest.raises(MemoryError):
        pipe.load_lora_weights(as_diffusers(lora(pipe)))
    assert fingerprint(pipe) == before and torch.equal(draw(pipe), drawn) and pipe.get_active_adapters() == ["first"]


def test_names(pipe):
    state = as_diffusers(lora(pipe))
    for _ in range(2):
        pipe.load_lora_weights(state)
    assert pipe.get_list_adapters()["unet"] == ["default_0", "default_1"]
    with pytest.raises(ValueError, match="'default_0' is loaded already"):
        pipe.load_lora_weights(state, "default_0")
    for name in ("a.b", "", "keys", 3):
        with pytest.raises(ValueError, match="adapter_name="):
            pipe.load_lora_weights(state, name)
    with pytest.raises(TypeError, match="no argument colour"):
        pipe.load_lora_weights(state, colour="red")


def test_is_lora_supported(pipe, tmp_path):
    before = fingerprint(pipe)
    save_file(as_kohya(lora(pipe), alpha=2.0), tmp_path / "good.safetensors")
    save_file(other_model(pipe), tmp_path / "bad.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"\0" * 100)
    good, bad, damaged = (pipe.is_lora_supported(tmp_path / f"{n}.safetensors") for n in ("good", "bad", "damaged"))
    assert good.supported and good.layout == "kohya" and good.rank == (4,) and good.alpha == (2.0,)
    assert not bad and "Stable Diffusion 2.x" in str(bad)
    assert not damaged and "damaged" in damaged.problem
    with pytest.raises(FileNotFoundError):
        pipe.is_lora_supported(tmp_path / "absent.safetensors")
    assert fingerprint(pipe) == before


def test_tokens_are_handed_over(pipe, monkeypatch):
    """Words go to `load_textual_inversion`, except those that the tokenizer has, and leave with the adapter."""
    got = []
    monkeypatch.setattr(
        type(pipe), "load_textual_inversion", lambda self, all_of_them: got.extend(all_of_them), raising=False
    )
    monkeypatch.setattr(type(pipe), "unload_textual_inversion", lambda self, words: got.append(words), raising=False)
    state = as_diffusers(lora(pipe, text=[])) | {
        "<s1>": torch.ones(32),
        "bundle_emb.cat</w>.string_to_param.*": torch.ones(2, 32),
    }
    report = pipe.load_lora_weights(state, "a")
    assert report.tokens == ("<s1>", "cat</w>") and report.left_out == ("cat</w>: the tokenizer has this word already",)
    assert [list(one) for one in got] == [["<s1>"]] and torch.equal(got[0]["<s1>"], torch.ones(32))
    pipe.delete_adapters("a")
    assert got[1:] == [["<s1>"]]


def test_without_peft(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install -U 'sdedit\[lora\]'"):
        pipe.load_lora_weights(as_diffusers(lora(pipe)))


def test_folders_and_the_hub(pipe, tmp_path):
    folder = tmp_path / "models--owner--name" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("0123")
    save_file(as_peft(lora(pipe, text=[])), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 1, "target_modules": UNET_MODULES}))
    assert pipe.load_lora_weights(folder).alpha == (1.0,)
    hub = {"cache_dir": tmp_path, "local_files_only": True}
    assert pipe.load_lora_weights("owner/name", **hub).source.endswith("adapter_model.safetensors")
    with pytest.raises(FileNotFoundError, match="could not be had from the hub"):
        pipe.load_lora_weights("owner/other", **hub)
    (folder / "adapter_model.safetensors").rename(folder / "one.safetensors")
    save_file(as_peft(lora(pipe)), folder / "two.safetensors")
    with pytest.raises(ValueError, match=r"several adapter files.*one\.safetensors, two\.safetensors.*weight_name"):
        pipe.load_lora_weights(folder)
    assert pipe.load_lora_weights(folder, weight_name="two.safetensors").matched == {"unet": 7, "text_encoder": 4}
    torch.save(as_peft(lora(pipe)), tmp_path / "pickle.bin")
    assert pipe.load_lora_weights(tmp_path / "pickle.bin")


def test_saved_files_load_in_diffusers_and_here(pipe, theirs, tmp_path):
    import peft

    pipe.load_lora_weights(as_kohya(lora(pipe), alpha=1.5), "a")
    drawn = draw(pipe)
    parts = [peft.get_peft_model_state_dict(m, adapter_name="a") for m in (pipe.unet, pipe.text_encoder)]
    configs = [m.peft_config["a"].to_dict() for m in (pipe.unet, pipe.text_encoder)]
    pipe.save_lora_weights(
        tmp_path, *parts, unet_lora_adapter_metadata=configs[0], text_encoder_lora_adapter_metadata=configs[1]
    )
    pipe.unload_lora_weights()
    report = pipe.load_lora_weights(tmp_path)
    assert report.alpha == (1.5,) and report.matched == {"unet": 7, "text_encoder": 4}
    assert torch.equal(draw(pipe), drawn)
    load(theirs, tmp_path)
    same(draw(theirs), drawn)


def test_save_refuses(pipe, tmp_path):
    with pytest.raises(ValueError, match="nothing to save"):
        pipe.save_lora_weights(tmp_path)
    state = {"mid_block.x.lora_A.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="would write pickles"):
        pipe.save_lora_weights(tmp_path, state, safe_serialization=False)
    with pytest.raises(ValueError, match="weight_name"):
        pipe.save_lora_weights(tmp_path, state, weight_name="../x.safetensors")
    pipe.save_lora_weights(tmp_path, state, is_main_process=False)
    assert not list(tmp_path.iterdir())


def test_the_saved_model_is_without_adapters(pipe, tmp_path):
    pipe.load_lora_weights(as_diffusers(lora(pipe)))
    drawn = draw(pipe)
    pipe.save_pretrained(tmp_path / "model")
    assert torch.equal(draw(pipe), drawn)
    names = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").keys()
    pipe.unload_lora_weights()
    assert names == pipe.unet.state_dict().keys()
    assert "encoder.layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "model/text_encoder/model.safetensors")


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


def test_fifty_loads_leave_nothing(pipe, tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(as_kohya(lora(pipe, unet=[*UNET_MODULES[:2], *CONVS[:1]], text=TEXT_MODULES[:1]), alpha=2.0), path)
    before = fingerprint(pipe)

    def once():
        pipe.load_lora_weights(path)
        pipe.fuse_lora()
        pipe.unfuse_lora()
        pipe.unload_lora_weights()

    def tensors():
        gc.collect()
        return sum(t.nbytes for t in gc.get_objects() if issubclass(type(t), torch.Tensor))

    def traced():
        gc.collect()
        # safetensors 0.8 itself keeps 58 bytes a tensor that `safe_open` reads, in a loop of nothing else too.
        snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, "*/checkpoint.py")])
        return sum(trace.size for trace in snapshot.traces)

    once()
    held = tensors()
    tracemalloc.start()
    for i in range(50):
        once()
        if i == 9:
            early = traced()
    late = traced()
    tracemalloc.stop()
    assert tensors() == held
    assert late - early < 10_000, f"{late - early} bytes grew over 40 loads"  # the file has 40 KB
    assert fingerprint(pipe) == before


@needs_shared
def test_a_real_file_is_refused_by_a_small_model(pipe):
    report = pipe.is_lora_supported(SHARED / "data" / "adapters" / "lora_diffusers_sd15.safetensors")
    assert (
        not report
        and "it is for Stable Diffusion 1.x; this pipeline is a model with text embeddings of width 32" in str(report)
    )
