"""Each network against PyTorch's, layer by layer, at 1e-4 in float32; loading, saving, dtypes."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import UNET, VAE
from sdedit import AutoencoderKL, FlaxAutoencoderKL, FlaxCLIPTextModel, FlaxUNet2DConditionModel, UNet2DConditionModel
from sdedit.flax import convert
from sdedit.flax.model import FlaxModel

SD2 = {
    "use_linear_projection": True,
    "attention_head_dim": [2, 4],
    "upcast_attention": True,
    "only_cross_attention": [True, False],
    "time_cond_proj_dim": 6,
    "transformer_layers_per_block": 2,
    "layers_per_block": 1,
    "act_fn": "gelu",
    "center_input_sample": True,
    "mid_block_scale_factor": 1.5,
}


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def inner_outputs(model: torch.nn.Module, *args: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What each layer of a PyTorch network gives, by its name; channels last, as in Flax."""
    seen: dict[str, np.ndarray[Any, Any]] = {}

    def note(name: str) -> Any:
        def hook(module: Any, given: Any, made: Any) -> None:
            if isinstance(made, torch.Tensor):
                array = made.numpy()
                seen[name] = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        model(*args)
    for hook in hooks:
        hook.remove()
    return seen


def compare_layers(ours: FlaxModel, params: Any, arrays: Any, theirs: dict[str, Any], least: int) -> None:
    """Compare all layers that both have."""

    def run(params: Any, arrays: Any) -> Any:
        return ours.apply({"params": params}, *arrays, capture_intermediates=True, mutable=["intermediates"])[1]

    made = convert.flatten(jax.jit(run)(params, arrays)["intermediates"])
    outputs = {name.removesuffix("/__call__"): leaf[-1] for name, leaf in made.items() if name.endswith("/__call__")}
    names = {convert.flax_name(f"{name}.bias", type(ours).layout, {}): name for name in theirs}
    compared = 0
    for name, output in outputs.items():
        found = names.get(f"{name}/bias")
        if found is None or isinstance(output, tuple) or not hasattr(output, "shape"):
            continue
        expected = theirs[found]
        if expected.size == output.size:
            np.testing.assert_allclose(np.asarray(output).reshape(expected.shape), expected, atol=1e-4, err_msg=name)
            compared += 1
    assert compared >= least, sorted(outputs)


@pytest.mark.parametrize("config", [{}, SD2], ids=["SD 1.x", "SD 2.x and rarer keys"])
def test_unet_layer_by_layer(tmp_path: Path, config: dict[str, Any]) -> None:
    torch.manual_seed(1)
    theirs = UNet2DConditionModel(**{**UNET, **config}).eval()
    ours, params = FlaxUNet2DConditionModel.from_pretrained(saved(theirs, tmp_path))
    x, times, text = torch.randn(2, 4, 7, 9), torch.tensor([3.0, 700.0]), torch.randn(2, 5, 32)
    condition = torch.randn(2, 6) if "time_cond_proj_dim" in config else None
    with torch.no_grad():
        expected = theirs(x, times, text, None, condition)[0].numpy()
    arrays = [None if a is None else jnp.asarray(a.numpy()) for a in (x, times, text, condition)]
    compare_layers(ours, params, arrays, inner_outputs(theirs, x, times, text, None, condition), least=60)
    made = jax.jit(lambda p, a: ours.apply({"params": p}, *a).sample)(params, arrays)
    np.testing.assert_allclose(made, expected, atol=1e-4)


def test_vae_layer_by_layer(tmp_path: Path) -> None:
    torch.manual_seed(2)
    theirs = AutoencoderKL(**VAE).eval()
    ours, params = FlaxAutoencoderKL.from_pretrained(saved(theirs, tmp_path))
    x = torch.randn(1, 3, 24, 32)
    compare_layers(ours, params, [jnp.asarray(x.numpy())], inner_outputs(theirs, x), least=50)
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist
    made = jax.jit(lambda p, x: ours.apply({"params": p}, x, method=ours.encode).latent_dist)(params, x.numpy())
    for name in ("mean", "logvar", "std"):
        found = np.asarray(getattr(made, name)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(found, getattr(expected, name).numpy(), atol=1e-4)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_text_encoder_layer_by_layer(tmp_path: Path, act: str) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(3)
    sizes = dict(vocab_size=99, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4)
    theirs = CLIPTextModel(CLIPTextConfig(**sizes, hidden_act=act)).eval()
    ours, params = FlaxCLIPTextModel.from_pretrained(saved(theirs, tmp_path))
    ids = torch.randint(0, 99, (2, 77))
    seen = {
        name if name.startswith("text_model.") else f"text_model.{name}": out
        for name, out in inner_outputs(theirs, ids).items()
    }
    compare_layers(ours, params, [ids.numpy()], seen, least=30)
    with torch.no_grad():
        expected = theirs(ids)[0].numpy()
    np.testing.assert_allclose(
        jax.jit(lambda p, i: ours.apply({"params": p}, i)[0])(params, ids.numpy()), expected, atol=1e-4
    )


def test_safety_checker(tmp_path: Path) -> None:
    from transformers import CLIPConfig

    from sdedit import FlaxStableDiffusionSafetyChecker, StableDiffusionSafetyChecker

    torch.manual_seed(4)
    vision = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    theirs = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    pixels = torch.randn(12, 3, 28, 28)
    with torch.no_grad():
        embeds = torch.nn.functional.normalize(theirs.visual_projection(theirs.vision_model(pixels)[1]))
        for name in ("concept_embeds", "special_care_embeds"):
            concepts = torch.nn.functional.normalize(torch.randn_like(getattr(theirs, name)))
            getattr(theirs, name).data = concepts * 3
            # About half of the pictures are near one of them; near a special one, and then almost near another.
            getattr(theirs, f"{name}_weights").data.fill_(float((embeds @ concepts.T).amax(1).median()))
        theirs.concept_embeds_weights += 0.005
        flags = theirs.flag(pixels)
    ours, params = FlaxStableDiffusionSafetyChecker.from_pretrained(saved(theirs, tmp_path))
    assert 0 < sum(flags) < 12
    assert jax.jit(lambda p, x: ours.apply({"params": p}, x))(params, pixels.numpy()).tolist() == flags
    ours.save_pretrained(tmp_path / "again", params)
    again, read = FlaxStableDiffusionSafetyChecker.from_pretrained(tmp_path / "again")
    assert again == ours and jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), read, params))


@pytest.mark.parametrize(
    ("ours", "theirs"), [(FlaxUNet2DConditionModel, UNet2DConditionModel), (FlaxAutoencoderKL, AutoencoderKL)]
)
def test_defaults_are_those_of_pytorch(ours: Any, theirs: Any) -> None:
    defaults = {name: p.default for name, p in inspect.signature(theirs.__init__).parameters.items()}
    for field in dataclasses.fields(ours):
        if field.name not in ("dtype", "parent", "name"):
            assert field.default == defaults[field.name], field.name


def test_msgpack_both_ways(folder: Path, tmp_path: Path) -> None:
    ours, params = FlaxUNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    ours.save_pretrained(tmp_path, params)
    assert (tmp_path / "diffusion_flax_model.msgpack").is_file()
    again, read = FlaxUNet2DConditionModel.from_pretrained(tmp_path)
    assert again == ours
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), read, params))
    half = FlaxUNet2DConditionModel.from_pretrained(tmp_path, dtype=jnp.bfloat16)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), half, ours.to_bf16(params)))
    with pytest.raises(FileNotFoundError, match="has no weights"):
        FlaxUNet2DConditionModel.from_pretrained(tmp_path, from_pt=True)


def test_names_of_parameters_are_those_of_diffusers_flax(folder: Path) -> None:
    unet = convert.flatten(FlaxUNet2DConditionModel.from_pretrained(folder, subfolder="unet")[1])
    vae = convert.flatten(FlaxAutoencoderKL.from_pretrained(folder, subfolder="vae")[1])
    text = convert.flatten(FlaxCLIPTextModel.from_pretrained(folder, subfolder="text_encoder")[1])
    block = "down_blocks_0/attentions_0/transformer_blocks_0"
    for name in ("attn1/to_out_0/kernel", "ff/net_0/proj/kernel", "ff/net_2/bias", "norm3/scale"):
        assert f"{block}/{name}" in unet
    assert unet["conv_in/kernel"].shape == (3, 3, 4, 32) and "time_embedding/linear_1/kernel" in unet
    assert (
        "decoder/mid_block/attentions_0/proj_attn/kernel" in vae
        and "encoder/down_blocks_0/downsamplers_0/conv/bias" in vae
    )
    assert "text_model/encoder/layers/0/self_attn/q_proj/kernel" in text
    assert "text_model/embeddings/token_embedding/embedding" in text


def test_bfloat16_and_old_names_in_files(tmp_path: Path) -> None:
    torch.manual_seed(5)
    theirs = AutoencoderKL(**VAE)
    theirs.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, tensor in theirs.state_dict().items():
        for new, was in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{was}.")
        state[name] = tensor.bfloat16()
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    params = convert.flatten(FlaxAutoencoderKL.from_pretrained(tmp_path)[1])
    expected = theirs.decoder.mid_block.attentions[0].to_q.weight.detach().bfloat16().float().numpy().T
    np.testing.assert_array_equal(params["decoder/mid_block/attentions_0/query/kernel"], expected)
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    pickled = convert.flatten(FlaxAutoencoderKL.from_pretrained(tmp_path, use_safetensors=False)[1])
    assert params.keys() == pickled.keys() and all(bool((params[n] == pickled[n]).all()) for n in params)


def test_files_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    theirs = UNet2DConditionModel(**UNET)
    theirs.save_pretrained(tmp_path)
    state = dict(theirs.state_dict())
    state["extra.weight"] = state.pop("conv_out.bias")
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ValueError, match=r"(?s)- conv_out/bias \[4\] is missing.*\+ extra/kernel \[4\] is not expected"
    ):
        FlaxUNet2DConditionModel.from_pretrained(tmp_path)
    (tmp_path / "diffusion_flax_model.msgpack").write_bytes(b"\x93nonsense")
    with pytest.raises(ValueError, match="is damaged, or no msgpack file of Flax"):
        FlaxUNet2DConditionModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="class_embed_type='projection' is of a model that is not Stable Diffusion"):
        FlaxUNet2DConditionModel.from_config({"class_embed_type": "projection"})
    with pytest.raises(ValueError, match="AutoencoderTiny; expected AutoencoderKL"):
        FlaxAutoencoderKL.from_config({"_class_name": "AutoencoderTiny"})
    with pytest.raises(TypeError, match="has no option sice"):
        FlaxUNet2DConditionModel.from_config({}, sice=1)
