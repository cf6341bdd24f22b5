"""Calls at the same time: each gives what it gives alone, whatever the others do with what they share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from conftest import picture
from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.inputs import prompts
from sdedit.models.offload import Turns
from sdedit.noise import retry_in_float32, seeded
from sdedit.schedulers.names import make_scheduler

HERE = torch.device("cpu", 0)  # as a device other than "cpu", on machines that have no other


@pytest.fixture(autouse=True)
def eager_switching() -> Iterator[None]:
    """Threads give way to each other as often as Python lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """What the tasks return, each in a thread of its own; all begin together."""
    barrier = threading.Barrier(len(tasks))

    def run(task: Callable[[], Any]) -> Any:
        barrier.wait(60)
        return task()

    with ThreadPoolExecutor(len(tasks)) as pool:
        return list(pool.map(run, tasks))


SETTINGS: list[dict[str, Any]] = [
    {"prompt": "an apple", "strength": 0.9, "num_inference_steps": 7},
    {"prompt": "a cat " * 50, "strength": 0.5, "num_inference_steps": 9, "guidance_scale": 1.0},
    {"prompt": ["x", "an apple"], "strength": [0.4, 1.0], "num_inference_steps": 5, "guidance_scale": [2.0, 9.0]},
    {"prompt": "dog", "strength": 0.7, "num_inference_steps": 8, "exact_steps": True, "negative_prompt": "cat"},
]


def draw(pipe: Any, i: int, **more: Any) -> torch.Tensor:
    settings = {**SETTINGS[i], "generator": seeded(i), "output_type": "latent", **more}
    images: torch.Tensor = pipe(image=picture(64, 48, seed=i), **settings).images
    return images


@pytest.mark.filterwarnings("ignore:prompt")
@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpm++-2m", "euler-a", "heun", "unipc", "theirs"])
@pytest.mark.parametrize("pipes", [1, 2], ids=["one pipeline", "two over the same components"])
def test_pictures_are_those_of_one_call_after_the_other(pipe: Any, scheduler: str, pipes: int) -> None:
    import diffusers

    other = diffusers.DPMSolverMultistepScheduler.from_config(dict(pipe.scheduler.config))
    pipe.scheduler = other if scheduler == "theirs" else make_scheduler(scheduler, pipe.scheduler.config)
    twin = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    of_thread = [pipe, twin if pipes == 2 else pipe] * 2
    alone = [draw(pipe, i) for i in range(4)]
    for _ in range(2):
        together = at_once([lambda i=i: draw(of_thread[i], i) for i in range(4)])
        assert [torch.equal(a, b) for a, b in zip(alone, together, strict=True)] == [True] * 4


WAYS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda pipe: None,
    "turbo": lambda pipe: pipe.enable_turbo(1, guidance=0.5),
    "token merging": lambda pipe: pipe.enable_token_merging(),
    "slicing": lambda pipe: (pipe.enable_attention_slicing(1), pipe.enable_vae_tiling()),
    "freeu": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "fused": lambda pipe: pipe.fuse_qkv_projections(),
}


@pytest.mark.filterwarnings("ignore:prompt")
@pytest.mark.parametrize("way", WAYS)
def test_pictures_are_those_of_one_call_after_the_other_in_all_ways_to_compute(folder: Any, way: str) -> None:
    """In bfloat16, where weights are packed for a run."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    WAYS[way](pipe)
    alone = [draw(pipe, i) for i in range(4)]
    together = at_once([lambda i=i: draw(pipe, i) for i in range(4)])
    assert [torch.equal(a, b) for a, b in zip(alone, together, strict=True)] == [True] * 4


def test_loops_of_ones_own_have_a_guidance_in_each_thread(pipe: Any) -> None:
    barrier = threading.Barrier(2)

    def task(scale: float) -> Any:
        pipe._guidance_scale = scale
        barrier.wait(60)
        return pipe.guidance_scale, pipe.do_classifier_free_guidance

    assert at_once([lambda: task(0.0), lambda: task(5.0)]) == [(0.0, False), (5.0, True)]


def test_a_scheduler_is_set_for_a_call_and_never_stepped(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a callback `pipe.scheduler` is the call's own; afterwards the user's tells of the last call."""
    users = pipe.scheduler
    stepped: list[Any] = []
    step = type(users).step
    monkeypatch.setattr(type(users), "step", lambda self, *a, **k: stepped.append(self) or step(self, *a, **k))
    places: list[Any] = []

    def look(pipe: Any, i: int, t: Any, tensors: Any) -> dict[str, Any]:
        scheduler = pipe.scheduler
        places.append((int(scheduler.timesteps[scheduler.step_index - 1]) == int(t), scheduler is stepped[-1]))
        return {}

    draw(pipe, 0, callback_on_step_end=look)
    assert places == [(True, True)] * 6 and users not in stepped
    assert pipe.scheduler is users and pipe.components["scheduler"] is users
    assert len(users.timesteps) == 7 and users.num_inference_steps == 7
    trained = users.config.trained_betas
    draw(pipe, 3)  # exact steps have a noise schedule of their own
    assert pipe.scheduler.config.trained_betas is trained and len(users.timesteps) == 7


def test_a_scheduler_whose_methods_were_replaced_is_taken_as_it_is(pipe: Any) -> None:
    want, calls = draw(pipe, 0), []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *a, eta=0.0, generator=None, **k: calls.append(1) or step(*a, **k)
    assert torch.equal(draw(pipe, 0), want) and len(calls) == 6


def test_guidance_and_attributes_belong_to_a_call(pipe: Any) -> None:
    """Each callback sees its own call, while those of the others wait at the same step."""
    barrier = threading.Barrier(2)
    seen: dict[float, list[Any]] = {3.0: [], 9.0: []}

    def task(scale: float, steps: int) -> torch.Tensor:
        def look(pipe: Any, i: int, t: Any, tensors: Any) -> dict[str, Any]:
            if i < 3:
                barrier.wait(60)
                seen[scale].append((pipe.guidance_scale, pipe.num_timesteps, len(pipe.scheduler.timesteps)))
                barrier.wait(60)
            if i == 1 and scale == 3.0:
                pipe._guidance_scale = 0.0
                return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}
            return {}

        wanted = {"callback_on_step_end": look, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        settings = {"strength": 1.0, "guidance_scale": scale, "num_inference_steps": steps, **wanted}
        latents = draw(pipe, 0, **settings)
        assert (pipe.guidance_scale, pipe.num_timesteps) == (scale, steps)  # of this thread's last call
        return latents

    at_once([lambda: task(3.0, 4), lambda: task(9.0, 5)])
    assert seen == {3.0: [(3.0, 4, 4), (3.0, 4, 4), (0.0, 4, 4)], 9.0: [(9.0, 5, 5)] * 3}


def test_cancel_in_a_callback_is_of_its_call_and_from_elsewhere_of_all(pipe: Any) -> None:
    inner: list[Any] = []

    def stop(pipe: Any, i: int, t: Any, tensors: Any) -> dict[str, Any]:
        pipe.cancel()
        return {}

    def draw_inside(pipe: Any, i: int, t: Any, tensors: Any) -> dict[str, Any]:
        if i == 0:
            inner.append(pipe("cat", picture(), num_inference_steps=4, callback_on_step_end=stop).steps)
            assert not pipe.interrupt and pipe.num_timesteps == 6
        return {}

    out = pipe("an apple", picture(), strength=1.0, num_inference_steps=6, callback_on_step_end=draw_inside)
    assert inner == [[1]] and out.steps == [6] and not pipe.interrupt

    reached, cancelled = threading.Barrier(3), threading.Event()

    def wait(pipe: Any, i: int, t: Any, tensors: Any) -> dict[str, Any]:
        if i == 1:
            reached.wait(60)
            cancelled.wait(60)
        return {}

    def task() -> Any:
        out = pipe("an apple", picture(), strength=1.0, num_inference_steps=6, callback_on_step_end=wait)
        return out.steps, pipe.interrupt

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(task) for _ in range(2)]
        reached.wait(60)
        pipe.cancel()
        cancelled.set()
        assert [one.result(60) for one in running] == [([2], True)] * 2
    assert pipe("an apple", picture(), strength=1.0, num_inference_steps=6).steps == [6]  # the next one is not


def test_the_tokenizer_is_never_switched(pipe: Any) -> None:
    """Fast tokenizers keep how they pad and cut in one place for all threads, so nobody may ask them to."""
    asked: list[dict[str, Any]] = []

    class Spy:
        def __getattr__(self, name: str) -> Any:
            return getattr(pipe.tokenizer, name)

        def __call__(self, *args: Any, **options: Any) -> Any:
            asked.append(options)
            return pipe.tokenizer(*args, **options)

    long = "apple " * 90
    with pytest.warns(UserWarning, match="was cut off"):
        ids = prompts.tokenize(Spy(), ["a cat", long], 77)
    want = pipe.tokenizer(["a cat", long], padding="max_length", max_length=77, truncation=True).input_ids
    assert ids.tolist() == want
    assert asked and not any({"padding", "truncation", "max_length"} & set(options) for options in asked)


@pytest.mark.filterwarnings("ignore:prompt")
def test_prompts_are_read_the_same_in_threads(pipe: Any) -> None:
    texts = ["apple " * n + "cat" for n in (0, 3, 40, 74, 75, 90)]
    want = [prompts.tokenize(pipe.tokenizer, [text], 77).tolist() for text in texts]

    def read() -> list[Any]:
        return [prompts.tokenize(pipe.tokenizer, [text], 77).tolist() for _ in range(40) for text in texts]

    assert at_once([read] * 4) == [want * 40] * 4


def test_a_second_run_in_float32_leaves_network_and_generators_to_others(pipe: Any) -> None:
    """Both runs draw the same; meanwhile the others' network is as it was, and no generator goes back."""
    network = torch.nn.Linear(2, 2).bfloat16()
    network.dtype = torch.bfloat16  # type: ignore[assignment]
    ran: list[Any] = []

    def run(given: torch.nn.Module, generator: Any) -> torch.Tensor:
        weight = next(given.parameters())
        drawn = torch.randn(3, generator=generator)
        state = torch.default_generator.get_state().tolist() if mine is None else mine.get_state().tolist()
        ran.append((given, weight.dtype, network.weight.dtype, drawn.tolist(), state))
        return drawn * (float("nan") if weight.dtype == torch.bfloat16 else 1.0)

    for mine in (None, seeded(3)):
        ran.clear()
        with pytest.warns(UserWarning, match="again in float32"):
            retry_in_float32("it", network, run, mine)
        (first, second) = ran
        assert first[0] is network and second[0] is not network
        assert first[1:3] == (torch.bfloat16, torch.bfloat16) and second[1:3] == (torch.float32, torch.bfloat16)
        assert first[3:] == second[3:]  # the same noise, and the generator stays where the first run left it


def test_offloaded_networks_take_turns(folder: Any) -> None:
    """No network goes home while another thread computes with it."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    alone = [draw(pipe, i) for i in (0, 3)]
    pipe.enable_model_cpu_offload(device=HERE)
    computing: list[Any] = []
    together_at = []
    for part in (pipe.unet, pipe.text_encoder, pipe.vae.encoder):
        part.register_forward_pre_hook(lambda module, _: computing.append(module))
        part.register_forward_pre_hook(lambda *_: together_at.append(len(computing)))
        part.register_forward_hook(lambda module, *_: computing.remove(module), prepend=True)  # before its turn ends
    together = at_once([lambda i=i: draw(pipe, i) for i in (0, 3)])
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert set(together_at) == {1} and isinstance(pipe._offload, Turns)
    pipe.remove_all_hooks()
    assert torch.equal(draw(pipe, 0), alone[0])
