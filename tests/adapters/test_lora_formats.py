"""Every layout of an adapter file, written by hand, means the same modules and the same numbers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from conftest import SHARED, UNET, needs_shared
from sdedit import UNet2DConditionModel
from sdedit.adapters import formats as lora_formats
from sdedit.adapters import kinds as lora_kinds
from sdedit.adapters import names as lora_names
from sdedit.models.adapters import adaptable

SD15 = {"cross_attention_dim": 768}


def shapes_of(**models):
    return {name: {n: m.weight.shape for n, m in adaptable(model).items()} for name, model in models.items()}


def text_model(width=32, layers=3):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }
    return CLIPTextModel(CLIPTextConfig(**config, vocab_size=100))


@pytest.fixture(scope="module")
def shapes():
    with torch.device("meta"):
        return shapes_of(unet=UNet2DConditionModel(**UNET), text_encoder=text_model())


@pytest.fixture(scope="module")
def full_size():
    with torch.device("meta"):
        return shapes_of(unet=UNet2DConditionModel(**SD15), text_encoder=text_model(768, 12))


TO_K = "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
OUT = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.1.self_attn.q_proj"


def parse(state, shapes, width=32, **more):
    return lora_formats.parse(state, shapes, source="file", text_width=width, **more)


def pair(shape, rank=4):
    return torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *(1 for _ in shape[2:]))


LAYOUTS = {
    "diffusers": ("unet.{}.lora.{}.weight", "text_encoder.text_model.{}.lora_linear_layer.{}.weight", "down up"),
    "PEFT": ("unet.{}.lora_{}.weight", "text_encoder.text_model.{}.lora_{}.weight", "A B"),
    "PEFT default": (
        "base_model.model.unet.{}.lora_{}.default.weight",
        "text_encoder.{}.lora_{}.default.weight",
        "A B",
    ),
    "PEFT bare": ("base_model.model.{}.lora_{}.weight", "base_model.model.text_model.{}.lora_{}.weight", "A B"),
    "kohya": ("lora_unet_{_}.lora_{}.weight", "lora_te_text_model_{_}.lora_{}.weight", "down up"),
    "kohya te1": ("lora_unet_{_}.lora_{}.weight", "lora_te1_text_model_{_}.lora_{}.weight", "down up"),
    "lycoris": ("lycoris_{_}.lora_{}.weight", "lycoris_te_text_model_{_}.lora_{}.weight", "down up"),
    "doubled": ("lora_unet_unet_{_}_lora_{}.weight", "lora_te_text_model_{_}_lora_{}.weight", "down up"),
}


def write(layout, module, tensors, text=False):
    pattern, for_text, words = LAYOUTS[layout]
    pattern = (for_text if text else pattern).replace("{_}", module.replace(".", "_"))
    names = [pattern.format(*([module] if "{}.lora" in pattern else []), word) for word in words.split()]
    return dict(zip(names, tensors, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, shapes):
    state, want = {}, {}
    for component, module in (("unet", TO_K), ("unet", OUT), ("unet", CONV), ("text_encoder", TEXT)):
        tensors = pair(shapes[component][module])
        state |= write(layout, module, tensors, text=component == "text_encoder")
        want[component, module] = tensors
    parsed = parse(state, shapes)
    assert parsed.report and not parsed.report.unmatched and parsed.report.rank == (4,), str(parsed.report)
    found = {(c, m): change for c, modules in parsed.changes.items() for m, change in modules.items()}
    assert found.keys() == want.keys()
    for target, (down, up) in want.items():
        assert found[target].roles["down"] is down and found[target].roles["up"] is up


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_old_attention_processors(prefix, shapes):
    attention = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    state, want = {}, {}
    for old, new in (("to_q_lora", "to_q"), ("to_out_lora", "to_out.0")):
        for part, tensor in zip(("down", "up"), pair((32, 32)), strict=True):
            state[f"{prefix}{attention}.processor.{old}.{part}.weight"] = want[f"{attention}.{new}", part] = tensor
    state["text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight"] = torch.randn(4, 32)
    state["text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight"] = torch.randn(32, 4)
    changes = parse(state, shapes).changes
    assert {(m, r): t for m, c in changes["unet"].items() for r, t in c.roles.items()} == want
    assert list(changes["text_encoder"]) == ["encoder.layers.0.self_attn.out_proj"]


FIRST = "transformer_blocks.0"

# Pairs known from the original code of Stable Diffusion 1.x.
LDM = {
    "time_embed.0": "time_embedding.linear_1",
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.1.1.proj_in": "down_blocks.0.attentions.0.proj_in",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    f"input_blocks.8.1.{FIRST}.ff.net.0.proj": f"down_blocks.2.attentions.1.{FIRST}.ff.net.0.proj",
    "input_blocks.11.0.emb_layers.1": "down_blocks.3.resnets.1.time_emb_proj",
    "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
    "middle_block.1.transformer_blocks.0.attn2.to_v": "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "middle_block.2.in_layers.2": "mid_block.resnets.1.conv1",
    "output_blocks.2.1.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    f"output_blocks.11.1.{FIRST}.attn1.to_out.0": f"up_blocks.3.attentions.2.{FIRST}.attn1.to_out.0",
    "out.2": "conv_out",
}


def test_ldm_names(full_size):
    index = lora_names.index(full_size)
    for ldm, ours in LDM.items():
        assert index[lora_names.underscored(f"lora_unet_{ldm}".replace(".", "_"))] == ("unet", ours)
        assert index[lora_names.underscored(f"model.diffusion_model.{ldm}")] == ("unet", ours)
    # Each module has a name of its own in both, or the other's name would be taken for it.
    both = {name for name, target in index.items() if target[0] == "unet" and not name.endswith("_to_out")}
    assert len(both) == 2 * len(full_size["unet"])


def test_alpha_of_kohya(shapes):
    state = write("kohya", TO_K, pair((32, 32))) | {f"lora_unet_{TO_K.replace('.', '_')}.alpha": torch.tensor(1.0)}
    state |= write("kohya", OUT, pair((32, 32)))
    parsed = parse(state, shapes)
    assert parsed.changes["unet"][TO_K].alpha == 1 and parsed.changes["unet"][OUT].alpha is None
    assert parsed.report.alpha == (1, 4)


@pytest.mark.parametrize("where", ["adapter_config.json", "metadata"])
@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_of_peft(where, rslora, shapes):
    state = write("PEFT", TO_K, pair((32, 32))) | write("PEFT", OUT, pair((32, 32)))
    state |= write("PEFT", TEXT, pair((32, 32)), text=True)
    unet = {"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn1.to_out.0": 2}, "use_rslora": rslora}
    if where == "metadata":
        packed = {f"unet.{k}": v for k, v in unet.items()} | {"text_encoder.lora_alpha": 16}
        parsed = parse(state, shapes, metadata={"lora_adapter_metadata": json.dumps(packed)})
    else:
        parsed = parse(state, shapes, peft_config=unet)
    factor = math.sqrt(4) if rslora else 1
    assert parsed.changes["unet"][TO_K].alpha == 8 * factor
    assert parsed.changes["unet"][OUT].alpha == 2 * factor
    assert parsed.changes["text_encoder"][TEXT].alpha == (16 if where == "metadata" else 8 * factor)


def test_dora_names(shapes):
    peft = write("PEFT", TO_K, pair((32, 32))) | {f"unet.{TO_K}.lora_magnitude_vector": torch.ones(32)}
    peft |= write("PEFT", OUT, pair((32, 32))) | {f"unet.{OUT}.lora_magnitude_vector.default.weight": torch.ones(32)}
    kohya = write("kohya", TO_K, pair((32, 32))) | {f"lora_unet_{TO_K.replace('.', '_')}.dora_scale": torch.ones(32, 1)}
    assert parse(peft, shapes).report.kinds == {"LoRA with DoRA": 2}
    assert parse(kohya, shapes).report.kinds == {"LoRA with DoRA": 1}


def test_all_kinds_of_lycoris_in_one_file(shapes):
    flat = f"lora_unet_{CONV.replace('.', '_')}"
    state = {f"{flat}.hada_{n}": torch.randn(s) for n, s in (("w1_a", (32, 2)), ("w2_a", (32, 2)))}
    state |= {f"{flat}.hada_{n}": torch.randn(2, 288) for n in ("w1_b", "w2_b")} | {f"{flat}.alpha": torch.tensor(1.0)}
    other = f"lora_unet_{TO_K.replace('.', '_')}"
    state |= {f"{other}.lokr_w1": torch.randn(4, 4), f"{other}.lokr_w2_a": torch.randn(8, 2)}
    state |= {f"{other}.lokr_w2_b": torch.randn(2, 8), f"{other}.alpha": torch.tensor(1.0)}
    state |= {"lora_unet_conv_in.diff": torch.randn(32, 4, 3, 3), "lora_unet_conv_in.diff_b": torch.randn(32)}
    state |= {"lora_unet_conv_norm_out.w_norm": torch.randn(32), "lora_unet_conv_norm_out.b_norm": torch.randn(32)}
    report = parse(state, shapes).report
    assert report and report.layout == "LyCORIS" and report.kinds == {"LoHa": 1, "LoKr": 1, "full": 1}
    assert len(report.left_out) == 1 and "conv_norm_out: a norm" in report.left_out[0]
    assert "1 LoHa, 1 LoKr, 1 full; rank 2, alpha 1" in str(report) and "left out: conv_norm_out" in str(report)


def test_tokens(shapes):
    state = write("kohya", TO_K, pair((32, 32)))
    state |= {"<s1>": torch.zeros(32), "bundle_emb.my cat.string_to_param.*": torch.zeros(2, 32)}
    parsed = parse(state, shapes)
    assert parsed.report.tokens == ("<s1>", "my cat") and parsed.tokens["my cat"].shape == (2, 32)
    wide = parse(state | {"<s2>": torch.zeros(1024)}, shapes).report
    assert not wide and "<s2> [1024]" in wide.problem


@pytest.mark.parametrize(
    "state, says",
    [
        (
            {"lora_unet_nowhere.lora_down.weight": (4, 32), "lora_unet_nowhere.lora_up.weight": (32, 4)},
            "+ lora_unet_now",
        ),
        ({f"unet.{TO_K}.lora.down.weight": (4, 32)}, "a part is missing"),
        ({f"unet.{TO_K}.oft_blocks": (4, 8, 8)}, "oft_blocks is not understood"),
        ({f"unet.{OUT}.lora_A.weight": (4, 31), f"unet.{OUT}.lora_B.weight": (32, 4)}, "down is [4, 31]"),
        ({f"unet.{TO_K}.lora_A.weight": (4, 1024), f"unet.{TO_K}.lora_B.weight": (32, 4)}, "for Stable Diffusion 2.x"),
        ({f"unet.{TO_K}.lora_A.weight": (4, 2048), f"unet.{TO_K}.lora_B.weight": (32, 4)}, "for Stable Diffusion XL"),
        ({"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 1280)}, "for Stable Diffusion XL"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 3072)}, "for Flux"),
        ({"some.other.thing": (3,)}, "not understood"),
    ],
)
def test_what_does_not_fit_is_said(state, says, shapes):
    report = parse({name: torch.zeros(shape) for name, shape in state.items()}, shapes).report
    assert not report and says in report.problem and says in str(report)


def test_a_part_that_is_not_understood_can_be_left_out(shapes):
    state = write("kohya", TO_K, pair((32, 32))) | {"strange": torch.zeros(1)}
    assert not parse(state, shapes).report
    lax = parse(state, shapes, strict=False).report
    assert lax and lax.unmatched == ("strange",) and "not understood: strange" in str(lax)


def test_a_text_encoder_that_is_not_there(shapes):
    state = write("kohya", TO_K, pair((32, 32))) | write("kohya", TEXT, pair((32, 32)), text=True)
    report = parse(state, {"unet": shapes["unet"]}).report
    assert report and report.matched == {"unet": 1} and len(report.left_out) == 2
    assert "no text encoder" in report.left_out[0]


ROLES = ["lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "diff", "diff_b"]
ROLES += [f"hada_{n}" for n in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")]
ROLES += [f"lokr_{n}" for n in ("w1", "w2", "w2_a", "w2_b", "t2")]
OTHERS = ["<s>", "bundle_emb.x.string_to_param.*", "bundle_emb.x", ":down", "unet:0:up", "unet:0:down"]
SHAPE = st.lists(st.sampled_from([0, 1, 2, 3, 4, 32, 1024]), max_size=4)
DTYPE = st.sampled_from([torch.float32, torch.float16, torch.int64, torch.bool, torch.complex64])
TENSOR = st.builds(lambda shape, dtype: torch.zeros((), dtype=dtype).expand(shape), SHAPE, DTYPE)
PLACE = st.tuples(st.sampled_from([TO_K, CONV, "nowhere"]), st.sampled_from(ROLES))


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(PLACE, TENSOR, max_size=8), st.dictionaries(st.sampled_from(OTHERS), TENSOR), st.text(max_size=20)
)
@example({(TO_K, "diff"): torch.zeros(())}, {}, "")
def test_damaged_files_end_in_a_report(shapes, parts, others, text):
    state = others | {f"lora_unet_{module.replace('.', '_')}.{role}": t for (module, role), t in parts.items()}
    parsed = parse(state, shapes, metadata={"lora_adapter_metadata": text})
    assert str(parsed.report)
    if parsed.report:  # what is let through can be computed
        for module, change in parsed.changes["unet"].items():
            assert lora_kinds.factors(change.roles, shapes["unet"][module], change.alpha).delta() is not None


@needs_shared
class TestRealFiles:
    FOLDER = SHARED / "data" / "adapters"

    def parse(self, name, full_size):
        from safetensors import safe_open

        with safe_open(self.FOLDER / name, "pt") as file:
            metadata = file.metadata()
        state = load_file(self.FOLDER / name)
        return state, parse(state, full_size, 768, metadata=metadata)

    @pytest.mark.parametrize("name", ["lora_diffusers_sd15.safetensors", "lora_doubled_prefix_sd15.safetensors"])
    def test_attention_of_the_unet(self, name, full_size):
        state, parsed = self.parse(name, full_size)
        every = {n for n in full_size["unet"] if ".attn" in n and "norm" not in n}
        assert parsed.report and set(parsed.changes["unet"]) == every and len(every) == 128
        assert parsed.report.rank == (4,) and parsed.report.family == "Stable Diffusion 1.x"
        for module, change in parsed.changes["unet"].items():
            flat = module.replace(".", "_")
            (down,) = [t for n, t in state.items() if flat in n.replace(".", "_") and "down.weight" in n]
            assert change.roles["down"] is down
            made = lora_kinds.factors(change.roles, full_size["unet"][module], change.alpha)
            assert made.rank == made.alpha == 4

    def test_cloneofsimo(self, full_size):
        state, parsed = self.parse("lora_cloneofsimo_sd15.safetensors", full_size)
        assert parsed.report and parsed.report.tokens == ("<s1>", "<s2>") and parsed.report.rank == (1,)
        assert parsed.report.matched == {"unet": 144, "text_encoder": 48}
        known = {0: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"}
        known |= {4: "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"}
        known |= {54: "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"}
        known |= {143: "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"}
        for number, module in known.items():
            assert parsed.changes["unet"][module].roles["down"] is state[f"unet:{number}:down"]
        last = parsed.changes["text_encoder"]["encoder.layers.11.self_attn.q_proj"]
        assert last.roles["up"] is state["text_encoder:46:up"]

    def test_on_stable_diffusion_2(self, full_size):
        with torch.device("meta"):
            wide = UNet2DConditionModel(
                cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True
            )
        state = load_file(self.FOLDER / "lora_diffusers_sd15.safetensors")
        problem = parse(state, shapes_of(unet=wide), 1024).report.problem
        assert problem == "it is for Stable Diffusion 1.x; this pipeline is Stable Diffusion 2.x"
