"""PEFT's own settings give PEFT's own strength, in every kind; and what is not the whole of an adapter is refused."""

from __future__ import annotations

import copy
import json
import tracemalloc

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import SHARED, UNET, needs_shared
from sdedit import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from sdedit.adapters import formats, kinds, peft_settings
from sdedit.models import adapters

TARGETS = r".*attentions.*(to_q|to_k|ff\.net\.0\.proj)|.*resnets\.0\.conv1"


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(UNET).eval()


def trained(unet, config, seed=0):
    """A copy of the network with PEFT's adapter of random weights."""
    model = peft.get_peft_model(copy.deepcopy(unet), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "hada_" in name or "lokr_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def outputs(model):
    x = torch.linspace(-1, 1, 4 * 8 * 8).reshape(1, 4, 8, 8)
    with torch.no_grad():
        return model(x, torch.tensor(500), torch.linspace(-1, 1, 5 * 32).reshape(1, 5, 32))[0]


CONFIGS = {
    "alpha": peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=TARGETS,
        rank_pattern={r"down_blocks\.0.*to_q": 8, "to_k": 2},
        alpha_pattern={r"^down_blocks\.0.*to_q": 3, r".*attn[12]\.to_k": 5},
    ),
    "loha": peft.LoHaConfig(r=4, alpha=8, target_modules=TARGETS),
    "loha patterns": peft.LoHaConfig(r=4, alpha=2, target_modules=TARGETS, alpha_pattern={"attn1.to_q": 16}),
    "loha tucker": peft.LoHaConfig(r=4, alpha=8, use_effective_conv2d=True, target_modules=TARGETS),
    "lokr": peft.LoKrConfig(r=4, alpha=16, target_modules=TARGETS),
    "lokr whole": peft.LoKrConfig(r=400, alpha=100, target_modules=TARGETS),
    "lokr both": peft.LoKrConfig(r=2, alpha=8, decompose_both=True, target_modules=TARGETS, rank_pattern={"to_k": 3}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_peft_gives_what_peft_gives(unet, name, tmp_path, pipe):
    model = trained(unet, CONFIGS[name])
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    ours = copy.copy(pipe)
    ours.unet, ours.text_encoder = copy.deepcopy(unet), None
    plain = outputs(ours.unet)
    ours.load_lora_weights(tmp_path)
    assert (expected - plain).abs().max() > 1e-3  # it changes something, so a wrong strength would show
    torch.testing.assert_close(outputs(ours.unet), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT asks transformers
def test_a_folder_of_folders_loads_every_component(pipe, folder, tmp_path):
    from sdedit import StableDiffusionImg2ImgPipeline

    fresh = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear")
    text = peft.LoraConfig(r=2, lora_alpha=1, target_modules=["q_proj"])
    for name, part, asked in (("unet", fresh.unet, config), ("text_encoder", fresh.text_encoder, text)):
        peft.get_peft_model(copy.deepcopy(part), asked).save_pretrained(tmp_path / name)
    report = fresh.load_lora_weights(tmp_path)
    assert set(report.matched) == {"unet", "text_encoder"}
    assert {layer.scaling["default_0"] for layer in adapters.layers(fresh.text_encoder).values()} == {0.5}
    assert {layer.scaling["default_0"] for layer in adapters.layers(fresh.unet).values()} == {3.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "VERA"}, "its peft_type is 'VERA'; expected one of LORA, LOHA, LOKR"),
        ({"peft_type": 7}, "its peft_type is 7"),
        ({"init_lora_weights": "pissa_niter_16"}, "it was begun by 'pissa_niter_16', which changes the model's own"),
        ({"init_lora_weights": "olora"}, "'olora', which changes"),
        ({"alpha_pattern": {"(a+)+b": 3}}, "no expression that is understood"),
        ({"rank_pattern": {"to_[q": 3}}, "no expression that is understood"),
    ],
)
def test_what_is_not_the_whole_adapter_is_refused_by_name(pipe, tmp_path, settings, message):
    peft.get_peft_model(copy.deepcopy(pipe.unet), peft.LoraConfig(r=2, target_modules=["to_q"])).save_pretrained(
        tmp_path
    )
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    report = pipe.is_lora_supported(tmp_path)
    assert not report and message in report.problem
    with pytest.raises(ValueError, match="cannot be loaded"):
        pipe.load_lora_weights(tmp_path)
    assert not pipe.get_list_adapters()


def test_names_of_comfyui(pipe, tmp_path):
    peft.get_peft_model(copy.deepcopy(pipe.unet), peft.LoraConfig(r=2, target_modules=["to_q"])).save_pretrained(
        tmp_path
    )
    state = load_file(tmp_path / "adapter_model.safetensors")
    expected = pipe.is_lora_supported(state).matched["unet"]
    from sdedit.loading.ldm import unet_parts

    ldm = unet_parts([f"{name}.weight" for name in adapters.adaptable(pipe.unet)])
    renamed = {}
    for key, tensor in state.items():
        module, part = key.removeprefix("base_model.model.").split(".lora_")
        way = "lora_down" if part.startswith("A") else "lora_up"
        name = ldm[f"{module}.weight"].name.removesuffix(".weight")
        renamed[f"diffusion_model.{name}.{way}.weight"] = tensor
    text = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    renamed |= {f"{text}.lora_down.weight": torch.ones(2, 32), f"{text}.lora_up.weight": torch.ones(32, 2)}
    report = pipe.is_lora_supported(renamed)
    assert report and report.matched == {"unet": expected, "text_encoder": 1}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_8_bit_floats_are_read(pipe, tmp_path, dtype):
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    down, up = torch.randn(2, 32).to(dtype), torch.randn(32, 2).to(dtype)
    save_file({f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}, tmp_path / "a.safetensors")
    pipe.load_lora_weights(tmp_path / "a.safetensors", adapter_name="eight")
    try:
        layer = pipe.unet.get_submodule(name)
        torch.testing.assert_close(layer.get_delta_weight("eight"), up.float() @ down.float())
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None])
def test_scales_that_are_no_numbers_are_refused(pipe, scale):
    with pytest.raises(ValueError, match=r"lora_scale=.*; expected a number that is finite"):
        pipe.fuse_lora(lora_scale=scale)


# Files that would become far more than they are

SHAPE = (320, 320)
BOMBS = {
    "loha of a high rank": {
        "hada_w1_a": (320, 300),
        "hada_w1_b": (300, 320),
        "hada_w2_a": (320, 300),
        "hada_w2_b": (300, 320),
    },
    "lokr of a high rank": {"lokr_w1_a": (16, 300), "lokr_w1_b": (300, 16), "lokr_w2": (20, 20)},
    "lokr of two high ranks": {
        "lokr_w1_a": (16, 320),
        "lokr_w1_b": (320, 16),
        "lokr_w2_a": (20, 320),
        "lokr_w2_b": (320, 20),
    },
}
WRONG = {
    "lokr of other sizes": {"lokr_w1": (300, 300), "lokr_w2": (300, 300)},
    "loha of a rank that no layer has": {
        "hada_w1_a": (320, 1200),
        "hada_w1_b": (1200, 320),
        "hada_w2_a": (320, 1),
        "hada_w2_b": (1, 320),
    },
    "lokr of a rank that no layer has": {"lokr_w1_a": (16, 6000), "lokr_w1_b": (6000, 16), "lokr_w2": (20, 20)},
}


@pytest.mark.parametrize("library", ["torch", "numpy"])
@pytest.mark.parametrize("name", [*BOMBS, *WRONG])
def test_no_product_is_larger_than_the_weight_is(name, library):
    made = {role: torch.randn(shape) * 0.01 for role, shape in (BOMBS | WRONG)[name].items()}
    roles = made if library == "torch" else {role: tensor.numpy() for role, tensor in made.items()}
    tracemalloc.start()
    try:
        problem = kinds.check(roles, SHAPE)
        assert (problem is None) == (name in BOMBS)
        if problem is None:
            factors = kinds.factors(roles, SHAPE)
            assert factors.rank <= 320  # so both factors together hold at most twice what the weight holds
            assert tracemalloc.get_traced_memory()[1] < 40e6
            delta = torch.as_tensor(factors.delta())
            if "hada_w1_a" in made:
                a, b = (made[f"hada_w{i}_a"] @ made[f"hada_w{i}_b"] for i in (1, 2))
                torch.testing.assert_close(delta, a * b, atol=1e-5, rtol=1e-4)
            else:
                w1 = made["lokr_w1_a"] @ made["lokr_w1_b"]
                w2 = made["lokr_w2"] if "lokr_w2" in made else made["lokr_w2_a"] @ made["lokr_w2_b"]
                torch.testing.assert_close(delta, torch.kron(w1, w2), atol=1e-5, rtol=1e-4)
    finally:
        tracemalloc.stop()


def test_a_core_of_a_high_rank_goes_to_the_side_that_it_does_not_enlarge():
    roles = {"down": torch.randn(1, 64, 1, 1), "up": torch.randn(64, 500, 1, 1), "mid": torch.randn(500, 1, 3, 3)}
    assert kinds.check(roles, (64, 64, 3, 3)) is None
    factors = kinds.factors(roles, (64, 64, 3, 3))
    assert factors.rank <= 64
    expected = torch.einsum("op,pqhw,qi->oihw", roles["up"][..., 0, 0], roles["mid"], roles["down"][..., 0, 0]) / 1
    torch.testing.assert_close(factors.delta() * kinds.stored_rank(roles), expected * 1.0, atol=1e-3, rtol=1e-3)


@needs_shared
def test_the_small_file_that_became_4_gigabytes():
    state = load_file(SHARED / "data/cases/lokr_bomb.safetensors")
    roles = {key.rpartition(".")[2]: tensor for key, tensor in state.items()}
    assert kinds.check(roles, (512, 512)) == "lokr_w1_b is [8000, 1], of a rank above 512"


class LargestTensor(TorchDispatchMode):
    """Notes the bytes of the largest tensor that PyTorch makes inside this."""

    def __enter__(self):
        self.largest = [0]
        super().__enter__()
        return self.largest

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and not made.is_meta:
            self.largest[0] = max(self.largest[0], made.nbytes)
        return made


@needs_shared
@pytest.mark.parametrize("file", ["lokr_bomb", "loha of rank 1,200"])
def test_small_files_that_would_become_large_are_refused_before_anything_is_multiplied(file, tmp_path):
    """By the pipeline that they are made for, the default one; the whole attempt is bounded."""
    path = SHARED / "data/cases/lokr_bomb.safetensors"
    if file != "lokr_bomb":
        path = tmp_path / "loha.safetensors"
        sides = {"hada_w1_a": (512, 1200), "hada_w1_b": (1200, 512), "hada_w2_a": (512, 1200), "hada_w2_b": (1200, 512)}
        module = "lora_unet_time_embedding_linear_2"
        save_file({f"{module}.{role}": torch.zeros(s, dtype=torch.float16) for role, s in sides.items()}, path)
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained()
    with LargestTensor() as largest, pytest.raises(ValueError, match=r"of a rank above|too large"):
        pipe.load_lora_weights(path)
    assert largest[0] <= path.stat().st_size


@pytest.mark.parametrize("module", ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"])
def test_patterns_are_read_as_peft_reads_them(module):
    from peft.utils.other import get_pattern_key

    for patterns in ({"to_q": 3}, {r".*attn1.*": 3}, {"q": 3}, {r"attn\d\.to_q": 3, "to_q": 5}, {"^conv_in": 2}, {}):
        key = get_pattern_key(patterns.keys(), module)
        config = {"lora_alpha": 7, "alpha_pattern": patterns}
        assert peft_settings.alpha(config, module, 1) == patterns.get(key, 7)


def test_the_settings_of_a_component_are_its_own():
    configs = peft_settings.by_component({}, {"unet.lora_alpha": 3, "text_encoder.lora_alpha": 5, "r": 2})
    assert configs["unet"] == {"lora_alpha": 3, "r": 2} and configs["text_encoder"]["lora_alpha"] == 5
    assert formats.LoadReport("x").supported
