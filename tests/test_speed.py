"""What is computed once, in another order or less often gives the same picture; compiled blocks are not made twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from conftest import UNET, VAE, make_folder
from sdedit import AutoencoderKL, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from sdedit.models.attention import BasicTransformerBlock, Context, merged
from sdedit.models.fast.deep_reuse import DeepFeatures, DeepReuse
from sdedit.models.fast.full_speed import one_run


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = StableDiffusionImg2ImgPipeline.from_pretrained(make_folder(tmp_path_factory.mktemp("model")))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(UNET).eval()


def draw(pipe: Any, steps: int = 12, **settings: Any) -> np.ndarray[Any, Any]:
    image = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    common = {"strength": 1.0, "num_inference_steps": steps, "output_type": "np"}
    return pipe("apple", image, generator=torch.Generator().manual_seed(0), **common, **settings).images


def test_one_sample_with_two_texts_is_two_samples(unet: UNet2DConditionModel) -> None:
    x, texts, times = torch.randn(2, 4, 8, 6), torch.randn(4, 7, 32), torch.tensor([10, 700])
    with torch.no_grad():
        once = unet(x, times, texts).sample
        twice = unet(torch.cat([x, x]), torch.cat([times, times]), texts).sample
    torch.testing.assert_close(once, twice, rtol=1e-4, atol=1e-5)


def test_text_keys_are_made_once_a_run(unet: UNet2DConditionModel) -> None:
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2")
    made: list[Tensor] = []
    layer.to_k.register_forward_hook(lambda *_: made.append(_[0]))  # type: ignore[union-attr]
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 7, 32)
    with torch.no_grad():
        first = unet(x, 5, text).sample
        with one_run(unet) as kept:
            assert all(torch.equal(unet(x, 5, text).sample, first) for _ in range(3))
            assert len(made) == 2
            other = unet(x, 5, text + 1).sample  # another tensor is another text
            kept.clear()
            unet(x, 5, text)
        assert len(made) == 4 and not torch.allclose(other, first)
        unet(x, 5, text)
    assert len(made) == 5


def test_prompt_embeds_that_a_callback_changes_are_used(pipe: Any) -> None:
    def change(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": tensors["prompt_embeds"].mul_(2.0)}  # the very same tensor

    plain = draw(pipe, 3)
    changed = draw(pipe, 3, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert np.abs(plain - changed).max() > 1e-4


def test_convolutions_are_laid_out_once_and_saved_as_they_were(pipe: Any, tmp_path: Path) -> None:
    draw(pipe, 2)
    weights = [m.weight for part in (pipe.unet, pipe.vae.decoder) for m in part.modules() if isinstance(m, nn.Conv2d)]
    assert len(weights) > 40 and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    pipe.unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), pipe.unet.parameters(), strict=True))


def test_a_network_used_in_inference_mode_can_still_be_trained(pipe: Any) -> None:
    with torch.inference_mode():
        pipe.vae.encode(torch.zeros(1, 3, 16, 16))
    pipe.vae.encode(torch.ones(1, 3, 16, 16)).latent_dist.mean.sum().backward()
    assert pipe.vae.encoder.conv_in.weight.grad is not None


def test_turbo_is_near_and_leaves_no_trace(pipe: Any) -> None:
    exact = draw(pipe)
    differences = []
    for level in (1, 2, 3):
        pipe.enable_turbo(level)
        differences.append(np.abs(draw(pipe) - exact).max())
        assert differences[-1] == np.abs(draw(pipe) - exact).max()  # nothing is left from the call before
    pipe.disable_turbo()
    assert 0 < differences[0] < differences[2] < 0.2
    assert np.array_equal(draw(pipe), exact)
    with pytest.raises(ValueError, match="level=4; expected one of 1, 2, 3"):
        pipe.enable_turbo(4)


def test_merged_tokens_are_means_of_neighbours() -> None:
    x = torch.randn(2, 3, 5, 7)
    means = merged(x.flatten(2).transpose(1, 2), 7, 2).transpose(1, 2).unflatten(2, (3, 4))
    torch.testing.assert_close(
        means[:, :, :2, :3], x[:, :, :4, :6].unflatten(3, (3, 2)).unflatten(2, (2, 2)).mean((3, 5))
    )
    torch.testing.assert_close(means[:, :, 2, 3], x[:, :, 4, 6])  # a corner that has no neighbours


def test_merging_what_is_alike_changes_nothing(unet: UNet2DConditionModel) -> None:
    block = next(m for m in unet.modules() if isinstance(m, BasicTransformerBlock))
    cells = torch.randn(1, 32, 3, 4)
    alike = cells.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)
    text = block.attended(Context(torch.randn(1, 7, 32)))[1]
    with torch.no_grad():
        exact = block(alike, None, text, 8)
        block.merge = 2
        torch.testing.assert_close(block(alike, None, text, 8), exact, rtol=1e-4, atol=1e-5)


def test_token_merging_is_at_the_finest_level_and_can_be_undone(pipe: Any) -> None:
    exact = draw(pipe, 4)
    pipe.enable_token_merging()
    merging = [name for name, m in pipe.unet.named_modules() if isinstance(m, BasicTransformerBlock) and m.merge == 2]
    assert {name.split(".attentions")[0] for name in merging} == {"down_blocks.0", "up_blocks.1"}
    near = draw(pipe, 4)
    with pytest.raises(ValueError, match="disable_token_merging"):
        pipe.fuse_qkv_projections(vae=False)
    pipe.disable_token_merging()
    assert 0 < np.abs(near - exact).max() < 0.2 and np.array_equal(draw(pipe, 4), exact)
    pipe.fuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        pipe.enable_token_merging()
    pipe.unfuse_qkv_projections(vae=False)
    with pytest.raises(ValueError, match="factor=0"):
        pipe.enable_token_merging(0)


def test_guidance_may_end_early(pipe: Any) -> None:
    sizes: list[int] = []
    hook = pipe.unet.mid_block.register_forward_hook(lambda *_: sizes.append(len(_[2])))

    def end_by_hand(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if step != 2:
            return {}
        pipe._guidance_scale = 0.0  # as users of diffusers do it
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

    inputs = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    by_hand = draw(pipe, 6, repeats=2, callback_on_step_end=end_by_hand, **inputs)
    exact, plain = draw(pipe, 6, repeats=2), draw(pipe, 6, repeats=2, guidance_scale=1.0)
    sizes.clear()
    pipe.enable_turbo(1, guidance=0.5)
    pipe.unet.reuse = None  # only the guidance
    assert np.array_equal(draw(pipe, 6, repeats=2), by_hand)
    assert sizes == [2, 2, 2, 1, 1, 1] * 2
    pipe.enable_turbo(1, guidance=0.5)
    assert 0 < np.abs(draw(pipe, 6, repeats=2) - exact).max() < 0.5  # together with the reuse, which begins anew
    pipe.enable_turbo(1, guidance=0.0)
    pipe.unet.reuse = None
    assert np.array_equal(draw(pipe, 6, repeats=2), plain)
    with pytest.raises(ValueError, match=r"guidance=1\.5"):
        pipe.enable_turbo(1, guidance=1.5)
    pipe.disable_turbo()
    hook.remove()
    assert np.array_equal(draw(pipe, 6, repeats=2), exact)


def test_turbo_calls_the_deep_layers_less_often(pipe: Any) -> None:
    calls: list[int] = []
    hook = pipe.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    pipe.enable_turbo(2)
    draw(pipe, steps=12)
    pipe.disable_turbo()
    hook.remove()
    assert len(calls) == 4  # 0, 1, 5 and 10 of 12


def test_turbo_on_a_batch_that_shrinks(pipe: Any) -> None:
    pipe.enable_turbo(1)
    together = draw(pipe, num_images_per_prompt=1)
    settings = {"strength": [1.0, 0.5], "output_type": "np", "num_inference_steps": 12}
    image = torch.linspace(0, 1, 3 * 64 * 64).reshape(1, 3, 64, 64)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    both = pipe(["apple", "apple"], image, generator=generators, **settings).images
    pipe.disable_turbo()
    assert np.isfinite(both).all() and np.abs(both[0] - together[0]).max() < 0.1


def test_reuse_follows_the_line_through_the_last_two() -> None:
    features = DeepFeatures(DeepReuse(every=4))
    seen = []
    for call in range(9):
        deep = features.recall(1)
        if deep is None:
            features.keep(torch.full((1, 1), 3.0 * call))
        seen.append(None if deep is None else deep.item())
    assert seen == [None, None, 6.0, 9.0, None, 15.0, 18.0, 21.0, None]


@pytest.mark.filterwarnings("ignore")
def test_compiled_blocks_serve_other_strengths_steps_and_prompts(pipe: Any) -> None:
    from torch._dynamo.utils import counters

    parts = {**pipe.components, "unet": UNet2DConditionModel.from_config(UNET), "vae": AutoencoderKL.from_config(VAE)}
    compiled = StableDiffusionImg2ImgPipeline(**parts)
    compiled.set_progress_bar_config(disable=True)
    for name in ("unet", "vae"):
        getattr(compiled, name).eval().load_state_dict(getattr(pipe, name).state_dict())
    compiled.compile(backend="eager")
    exact = draw(pipe, 4)
    counters.clear()
    assert np.abs(draw(compiled, 4) - exact).max() < 1e-4
    made = counters["stats"]["unique_graphs"]
    assert 0 < made < 40
    image = torch.rand(1, 3, 64, 64)
    compiled("cat", image, strength=0.5, num_inference_steps=6, guidance_scale=3.0, negative_prompt="app")
    compiled("cat", torch.rand(1, 3, 64, 80), strength=0.5, num_inference_steps=2)
    more = counters["stats"]["unique_graphs"]
    compiled("cat", image, strength=1.0, num_inference_steps=2)
    assert counters["stats"]["unique_graphs"] == more > made
