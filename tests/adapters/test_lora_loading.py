"""Adapters on their way in and out: failed loads, names, folders, the hub, saving, and nothing left behind."""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import SHARED, needs_shared
from lora_by_hand import (
    CONVS,
    TEXT_MODULES,
    UNET_MODULES,
    as_diffusers,
    as_kohya,
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
    with pytest.warns(UserWarning, match="not fused are not saved: default_0"):
        pipe.save_pretrained(tmp_path / "model")
    assert torch.equal(draw(pipe), drawn)
    names = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").keys()
    pipe.unload_lora_weights()
    assert names == pipe.unet.state_dict().keys()
    assert "encoder.layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "model/text_encoder/model.safetensors")


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
        sys._clear_type_cache()  # Python keeps the last 4,096 names of attributes that were looked up
        # safetensors 0.8 itself keeps 58 bytes a tensor that `safe_open` reads, in a loop of nothing else too.
        snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, "*/loading/weights.py")])
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


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", (320, 4, 3, 3), "a UNet of Stable Diffusion 1.x"),
        ("first_stage_model.decoder.conv_in.weight", (512, 4, 3, 3), "a VAE of Stable Diffusion"),
        ("conditioner.embedders.1.model.ln_final.weight", (4,), "a checkpoint of Stable Diffusion XL"),
        ("control_model.zero_convs.0.0.weight", (4, 4, 1, 1), "a ControlNet of Stable Diffusion"),
        ("emb_params", (2, 768), "a textual inversion of Stable Diffusion 1.x"),
        ("ip_adapter.1.to_k_ip.weight", (320, 768), "an IP-Adapter"),
    ],
)
def test_what_is_no_lora_is_called_what_it_is(pipe, tmp_path, name, shape, what):
    save_file({name: torch.zeros(shape)}, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=rf"style\.safetensors is {what}, not a LoRA"):
        pipe.load_lora_weights(tmp_path / "style.safetensors")
    assert what in pipe.is_lora_supported(tmp_path / "style.safetensors").problem


def test_names_are_cut_and_quoted_in_messages(pipe):
    """Names of a file are not obeyed by the terminal that shows them."""
    name = "lora_unet_\x1b[31m" + "x" * 400 + ".lora_down.weight"
    with pytest.raises(ValueError, match=r"does not fit") as error:
        pipe.load_lora_weights({name: torch.zeros(2, 2)})
    assert "\\x1b[31mxxx" in str(error.value)
    assert len(str(error.value)) < 400
    report = pipe.is_lora_supported({name: torch.zeros(2, 2), "<" + "\x1b" * 400 + ">": torch.zeros(1, 5)})
    assert not report and "\x1b" not in str(report) and max(map(len, str(report).splitlines())) < 600


@pytest.mark.parametrize("table", ["token_embedding", "position_embedding"])
def test_tables_of_embeddings_stay_as_they_are(pipe, table):
    """A LoRA of them is none of a linear layer; the report says that it is left out."""
    rows = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).embeddings.get_submodule(table).num_embeddings
    head = f"text_encoder.text_model.embeddings.{table}.lora_"
    state = {f"{head}A.weight": torch.ones(2, 32), f"{head}B.weight": torch.ones(rows, 2)}
    report = pipe.load_lora_weights({**as_diffusers(lora(pipe)), **state})
    assert report.left_out == (f"embeddings.{table}: a table; only linear layers and convolutions can be changed",)
    pipe.unload_lora_weights()
    assert not pipe.is_lora_supported(state)
