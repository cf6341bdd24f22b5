"""Adapters in threads: a call's scale is its own, and loading changes nothing outside its own pipeline."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_by_hand import CONVS, UNET_MODULES, as_diffusers, as_kohya, draw, lora
from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.models import adapters


@pytest.fixture
def pipe(folder: Any) -> Any:
    made = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


SCALES = [0.0, 0.5, 1.0, 1.7]


def at_once(*tasks: Callable[[], Any]) -> list[Any]:
    """Run tasks in as many threads."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


class Meeting:
    """Lets `count` threads pass a place only together, so that what they do there overlaps for certain."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=30)

    def __call__(self, *_: Any) -> None:
        self.barrier.wait()


def unet_call(unet: nn.Module, scale: float | None) -> torch.Tensor:
    sample = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
    given = None if scale is None else {"scale": scale}
    with torch.no_grad():
        return unet(sample, 500, text, cross_attention_kwargs=given)[0]


def test_scales_of_calls_at_once_are_each_calls_own(pipe: Any) -> None:
    """All calls are in the UNet at the same time: they meet at its first layer, after their scales are chosen."""
    pipe.load_lora_weights(as_kohya(lora(pipe, unet=[*UNET_MODULES, *CONVS]), alpha=2.0))
    wanted = [None, *SCALES]
    alone = [unet_call(pipe.unet, scale) for scale in wanted]
    assert len({x.sum().item() for x in alone}) == len(SCALES)  # no scale and 1 are the same
    hook = pipe.unet.conv_in.register_forward_pre_hook(Meeting(len(wanted)))
    together = at_once(*(lambda s=s: unet_call(pipe.unet, s) for s in wanted))
    hook.remove()
    assert all(map(torch.equal, together, alone))
    assert torch.equal(unet_call(pipe.unet, None), alone[0])


def test_prompts_encoded_at_once_have_each_its_own_scale(pipe: Any) -> None:
    pipe.load_lora_weights(as_diffusers(lora(pipe)))
    encode = lambda s: pipe.encode_prompt("cat", do_classifier_free_guidance=False, lora_scale=s)[0]  # noqa: E731
    alone = [encode(s) for s in SCALES]
    assert len({x.sum().item() for x in alone}) == len(SCALES)
    hook = pipe.text_encoder.get_input_embeddings().register_forward_pre_hook(Meeting(len(SCALES)))
    together = at_once(*(lambda s=s: encode(s) for s in SCALES))
    hook.remove()
    assert all(map(torch.equal, together, alone))


def test_a_scale_holds_for_layers_that_others_put_there(pipe: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    peft.inject_adapter_in_model(config, pipe.unet, adapter_name="theirs")
    without = unet_call(pipe.unet, 0.0)
    assert not torch.equal(unet_call(pipe.unet, None), without)
    pipe.disable_lora()
    assert torch.equal(unet_call(pipe.unet, None), without)


def test_a_scale_is_compiled_in_for_itself(pipe: Any) -> None:
    """What was compiled with one scale does not serve another, nor another thread's."""
    unet = pipe.unet
    pipe.load_lora_weights(as_diffusers(lora(pipe)))
    plain = {scale: unet_call(unet, scale) for scale in SCALES}
    for block in (pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0], pipe.unet.up_blocks[1].resnets[0]):
        block.compile(backend="eager", fullgraph=True, dynamic=False)  # as `pipe.compile` does with all of them
    for scale in [*SCALES, *SCALES[::-1]]:
        torch.testing.assert_close(unet_call(unet, scale), plain[scale], atol=1e-5, rtol=0)
    (other,) = at_once(lambda: unet_call(unet, 1.7))
    torch.testing.assert_close(other, plain[1.7], atol=1e-5, rtol=0)


def members() -> dict[str, Any]:
    """What PEFT, transformers or accelerate would patch for all threads."""
    found = {f"Module.{name}": value for name, value in vars(nn.Module).items()}
    found |= {f"init.{name}": value for name, value in vars(nn.init).items()}
    found |= {f"torch.{name}": getattr(torch, name) for name in ("empty", "zeros", "ones", "full", "load")}
    found["safe globals"] = set(torch.serialization.get_safe_globals())
    found["default dtype"] = torch.get_default_dtype()
    return found


def test_loading_in_two_threads_leaves_torch_as_it_was(folder: Any, tmp_path: Any, monkeypatch: Any) -> None:
    """Both are inside PEFT at once: one patching while the other ends leaves the patch for the whole process."""
    pipes = [StableDiffusionImg2ImgPipeline.from_pretrained(folder) for _ in range(2)]
    save_file(as_diffusers(lora(pipes[0])), tmp_path / "a.safetensors")
    before, meeting, update = members(), Meeting(2), peft.tuners.lora.Linear.update_layer
    seen: list[dict[str, Any]] = []

    def slow(layer: Any, *args: Any, **kwargs: Any) -> None:
        meeting()
        seen.append(members())
        update(layer, *args, **kwargs)

    monkeypatch.setattr(peft.tuners.lora.Linear, "update_layer", slow)
    at_once(*(lambda p=p: p.load_lora_weights(tmp_path / "a.safetensors") for p in pipes))
    assert seen
    assert all(state == before for state in [*seen, members()])
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert torch.equal(draw(pipes[0]), draw(pipes[1]))


def test_loading_adapters_while_another_pipeline_draws(folder: Any) -> None:
    drawing, loading = (StableDiffusionImg2ImgPipeline.from_pretrained(folder) for _ in range(2))
    for pipe in (drawing, loading):
        pipe.set_progress_bar_config(disable=True)
    state, alone, stop = as_diffusers(lora(loading)), draw(drawing), threading.Event()

    def load_again_and_again() -> int:
        count = 0
        while not stop.is_set() or not count:
            loading.load_lora_weights(state)
            loading.unload_lora_weights()
            StableDiffusionImg2ImgPipeline.from_pretrained(folder)
            count += 1
        return count

    def draws() -> list[torch.Tensor]:
        try:
            return [draw(drawing) for _ in range(4)]
        finally:
            stop.set()

    before = members()
    drawn, count = at_once(draws, load_again_and_again)
    assert count
    assert all(torch.equal(picture, alone) for picture in drawn)
    assert members() == before


def test_loading_pipelines_at_once(folder: Any) -> None:
    before = members()
    pipes = at_once(*(lambda: StableDiffusionImg2ImgPipeline.from_pretrained(folder) for _ in range(4)))
    assert members() == before
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    first = draw(pipes[0])
    assert all(torch.equal(draw(pipe), first) for pipe in pipes[1:])


def test_one_pipeline_takes_adapters_of_several_threads(pipe: Any) -> None:
    """Each gets a name of its own."""
    states = [as_diffusers(lora(pipe, seed=seed)) for seed in range(4)]
    at_once(*(lambda s=s: pipe.load_lora_weights(s) for s in states))
    assert pipe.get_list_adapters()["unet"] == [f"default_{i}" for i in range(4)]
    assert len(adapters.layers(pipe.unet)) == len(UNET_MODULES)


def test_reading_pickles_at_once_leaves_torch_as_it_was(folder: Any, tmp_path: Any) -> None:
    """AUTOMATIC1111's old files name a class, which torch allows or not for all threads alike."""
    params = nn.ParameterDict({"*": nn.Parameter(torch.ones(2, 32))})
    torch.save({"string_to_token": {"*": 265}, "string_to_param": params, "name": "word"}, tmp_path / "word.pt")
    before, pipes = members(), [StableDiffusionImg2ImgPipeline.from_pretrained(folder) for _ in range(4)]
    for _ in range(5):
        at_once(*(lambda p=p: p.load_textual_inversion(tmp_path / "word.pt") for p in pipes))
        assert members() == before
        for pipe in pipes:
            pipe.unload_textual_inversion()
