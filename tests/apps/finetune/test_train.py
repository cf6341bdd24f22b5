"""Training: the updates of a loop written with diffusers and PEFT, going on after a stop, what is learned, the file."""

from __future__ import annotations

import os
import signal
import sys

import diffusers
import peft
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import make_folder, picture
from lora_by_hand import draw, fingerprint, load, same
from sdedit import StableDiffusionImg2ImgPipeline
from sdedit.apps.finetune import Samples, Settings
from sdedit.apps.finetune import pictures as shown
from sdedit.apps.finetune import train as train_module
from sdedit.apps.finetune.dataset import encode_pictures
from sdedit.apps.finetune.layers import trainable
from sdedit.apps.finetune.objective import Objective
from sdedit.apps.folders import read_folder

EVERYWHERE = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_out", "proj_in", "proj_out")


@pytest.fixture
def pipe(pipe):
    before = fingerprint(pipe)
    yield pipe
    assert fingerprint(pipe) == before  # training leaves the pipeline as it was


def batches(pipe, folder, settings):
    """What a run of these settings is shown."""
    examples = read_folder(folder)
    latents = encode_pictures(pipe.vae, examples, 64, flip=settings.flip, guides=8 if settings.guided else 0)
    captions = list(dict.fromkeys(["", *(e.caption for e in examples)]))
    with torch.no_grad():
        texts = pipe.encode_prompt(captions, do_classifier_free_guidance=False)[0]
    rows = [captions.index(e.caption) for e in examples]
    return train_module.Batches(latents, texts, rows, Objective.of(pipe.scheduler, settings.min_snr_gamma), settings)


def by_hand(pipe, folder, model_folder, settings):
    """The same training, as a script with diffusers and PEFT would do it: (name, tensor) of what it learned."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(model_folder / "unet")
    unet.requires_grad_(False)
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, target_modules=["to_q", "to_k", "to_v", "to_out.0"]
    )
    unet.add_adapter(config)
    learning = {n.replace(".default", ""): p for n, p in unet.named_parameters() if p.requires_grad}
    with trainable(pipe, settings) as ours:
        for name, parameter in ours.items():
            learning[name.removeprefix("unet.").replace(".learning", "")].data.copy_(parameter)
    optimizer = torch.optim.AdamW(learning.values(), lr=settings.learning_rate, weight_decay=1e-2)
    rates = diffusers.optimization.get_cosine_schedule_with_warmup(optimizer, 0, settings.steps)
    scheduler = diffusers.DDPMScheduler.from_pretrained(model_folder / "scheduler")
    shown = batches(pipe, folder, settings)
    for step in range(settings.steps):
        for noisy, times, texts, target in shown.draw(step):
            snr = diffusers.training_utils.compute_snr(scheduler, times)
            divisor = snr if scheduler.config.prediction_type == "epsilon" else snr + 1
            error = (unet(noisy, times, texts).sample - target).square().mean((1, 2, 3))
            ((error * snr.clamp(max=settings.min_snr_gamma) / divisor).mean() / settings.accumulation).backward()
        torch.nn.utils.clip_grad_norm_(learning.values(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    return {f"unet.{name}": parameter.detach() for name, parameter in learning.items()}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_updates_are_those_of_a_loop_with_diffusers(prediction, pipe, train, pictures, tmp_path):
    folder = make_folder(tmp_path / "sd", prediction_type=prediction)
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder)
    given = {"steps": 4, "batch_size": 2, "accumulation": 2, "rank": 4, "alpha": 2.0, "learning_rate": 1e-2}
    given |= {"warmup": 0, "precision": "float32", "prompt_dropout": 0.3, "flip": True}
    result = train(pipe=pipe, **given)
    learned, expected = load_file(result.path), by_hand(pipe, pictures, folder, Settings(**given))
    assert learned.keys() == expected.keys() and len(learned) > 20
    for name, tensor in learned.items():
        if ".lora_B." in name:
            assert tensor.abs().max() > 5e-3  # it starts from zero
        torch.testing.assert_close(tensor, expected[name], atol=2e-4, rtol=0)


def test_the_file_gives_the_picture_of_diffusers(pipe, train, folder, tmp_path):
    """Both networks, and an alpha that is not the rank; the sheet drawn in training shows the same picture."""
    shown = Samples(["apple cat"], [picture(64, 64)], strength=0.6, guidance=7.5, steps=5)
    without = draw(pipe)
    result = train(text_encoder=True, alpha=12.0, samples=shown, every=3)
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    load(theirs, result.path)
    assert sum(pipe.load_lora_weights(result.path).matched.values()) > 30
    ours = draw(pipe)
    pipe.unload_lora_weights()
    assert (ours - without).abs().max() > 0.02
    same(ours, draw(theirs))
    sheets = sorted(result.folder.glob("samples-*.png"))
    assert [sheet.name for sheet in sheets] == ["samples-000000.png", "samples-000003.png", "samples-000004.png"]
    for sheet, drawn in ((sheets[0], without), (sheets[2], ours)):
        with Image.open(sheet) as page:
            seen = torch.tensor(list(page.crop((6, 6, 70, 70)).tobytes())).view(64, 64, 3) / 255
        torch.testing.assert_close(seen, drawn[0], atol=0.6 / 255, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_guided_samples_lead_from_a_guide_to_the_picture(prediction, pipe, pictures):
    """What is to be predicted, taken as the prediction, gives the picture; the sample itself is a noisy guide."""
    pipe.scheduler = pipe.scheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    given = Settings(batch_size=64, guided=1.0)
    shown, plain = (batches(pipe, pictures, s) for s in (given, Settings(batch_size=64)))
    rows = torch.tensor(train_module.shuffled(3 * 64, 64, 3, 0))
    mean, std = shown.latents.mean[rows, 0, 0], shown.latents.std[rows, 0, 0]
    ((noisy, times, _, target),), ((ordinary, _, _, _),) = shown.draw(3), plain.draw(3)
    alpha, sigma = shown.objective.levels(times)
    clean = (noisy - sigma * target) / alpha if prediction == "epsilon" else alpha * noisy - sigma * target
    assert ((clean - mean).abs() / std).max() < 6
    away = (noisy - ordinary).flatten(1).abs().amax(1)
    assert (away[times < 250] < 1e-5).all() and (away[times >= 250] > 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_picture_is_learned(dtype, folder, pictures, train):
    """The error of what the network predicts for a picture, with noise that it never saw, falls to under half."""
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=dtype)
    for path in list(pictures.iterdir())[1:]:
        path.unlink()
    settings = {"steps": 30, "batch_size": 4, "targets": EVERYWHERE, "learning_rate": 2e-2, "prompt_dropout": 0.0}
    result = train(pipe=pipe, **settings)
    pipe.unet.float()
    pipe.text_encoder.float()
    pipe.vae.float()
    shown = batches(pipe, pictures, Settings(**settings, rank=4))

    def error():
        noisy, times, texts, target = shown.draw(10**6)[0]
        with torch.no_grad():
            return shown.objective.loss(pipe.unet(noisy, times, texts).sample, target, times).mean()

    before = error()
    pipe.load_lora_weights(result.path)
    assert error() < 0.5 * before
    assert sum(result.losses[-10:]) < 0.6 * sum(result.losses[:10])


def stop_after(updates, monkeypatch):
    """Ctrl-C during an update."""
    update = train_module._Run.update

    def stopping(self, workers, shown, step):
        if step + 1 == updates:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, workers, shown, step)

    monkeypatch.setattr("sdedit.apps.finetune.train._Run.update", stopping)


def contents(result):
    """Every bit of a file's tensors, and what it says of them (in any order)."""
    with safe_open(result.path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("text_encoder", [False, True])
def test_going_on_comes_to_the_same_bits(text_encoder, train, monkeypatch):
    more = {"text_encoder": text_encoder, "steps": 7, "flip": True, "guided": 0.5}
    whole = train("whole.safetensors", **more)
    assert whole.finished and whole.step == len(whole.losses) == 7
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        part = train("part.safetensors", **more)
    assert signal.getsignal(signal.SIGINT) is handler
    assert (part.finished, part.step) == (False, 3)
    assert contents(part) != contents(whole)
    part = train("part.safetensors", **more)
    assert part.finished and part.losses == whole.losses
    assert contents(part) == contents(whole)
    again = train("part.safetensors", **more)
    assert again.finished and again.losses == whole.losses  # nothing was left to do


def test_a_kill_between_saves_goes_on_from_the_last_one(train, monkeypatch):
    whole = train("whole.safetensors", steps=6, every=2)
    with monkeypatch.context() as patch:
        patch.setattr("sdedit.apps.finetune.train.Batches.draw", fails_at(5, train_module.Batches.draw))
        with pytest.raises(MemoryError):
            train(steps=6, every=2)
    assert contents(train(steps=6, every=2)) == contents(whole)


def test_a_restart_that_is_killed_before_its_first_save_is_not_taken_for_the_run_before_it(train, monkeypatch):
    train(steps=4, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr("sdedit.apps.finetune.train.Batches.draw", fails_at(1, train_module.Batches.draw))
        with pytest.raises(MemoryError):
            train(steps=4, seed=1, restart=True)
    again = []
    real = train_module.Batches.draw
    monkeypatch.setattr("sdedit.apps.finetune.train.Batches.draw", lambda self, at: again.append(at) or real(self, at))
    assert train(steps=4, seed=1).finished
    assert again == [0, 1, 2, 3]


def test_two_runs_do_not_write_to_one_place(train, tmp_path):
    (tmp_path / "lora-training").mkdir()
    with (
        FileLock(tmp_path / "lora-training" / ".lock"),
        pytest.raises(ValueError, match="another run is writing there"),
    ):
        train()
    assert train().finished


def fails_at(step, draw):
    def drawing(self, at):
        if at == step:
            raise MemoryError
        return draw(self, at)

    return drawing


def test_other_settings_pictures_or_places_are_refused(train, pictures, tmp_path):
    train()
    with pytest.raises(ValueError, match=r"other settings \(rank was 4, is 2; seed was 0, is 5\): give the same"):
        train(rank=2, seed=5)
    picture(64, 64, seed=9).save(pictures / "a dog.png")
    with pytest.raises(ValueError, match=r"other settings \(pictures was"):
        train()
    assert train(restart=True).finished
    (tmp_path / "there.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"there\.safetensors exists, without .*restart"):
        train("there.safetensors")
    (tmp_path / "lora-training" / "checkpoint.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        train()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"output": "lora.bin"}, "expected a name such as lora.safetensors"),
        ({"output": "none/lora.safetensors"}, "in a folder that exists"),
        ({"output": "pictures/../x.safetensors", "rank": 0}, "rank=0; expected a whole number of at least 1"),
        ({"rank": 33}, "rank=33; expected at most 32, the width of "),
        ({"targets": ["to_q", "to_z"]}, "'to_z' is the end of no layer's name; expected names such as .*to_q"),
        ({"targets": []}, "expected names of layers"),
        ({"learning_rate": 0}, "expected a number above 0"),
        ({"prompt_dropout": 1.5}, "expected a number from 0 to 1"),
        ({"precision": "float16"}, "expected bfloat16 or float32"),
        ({"size": 60}, "size=60; expected a multiple of 8"),
        ({"every": 0}, "every=0"),
        ({"steps": True}, "steps=True"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(more, message, train, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        train(**more)
    assert sorted(tmp_path.rglob("*")) == before


def test_pictures_and_checkpoints_want_folders_of_their_own(train, pictures):
    with pytest.raises(ValueError, match="is needed for checkpoints, and taken"):
        train(folder=pictures.rename(pictures.with_name("lora-training")))


def test_pipelines_that_cannot_learn_are_refused(pipe, train, folder):
    half = StableDiffusionImg2ImgPipeline.from_pretrained(folder, torch_dtype=torch.float16)
    with pytest.raises(ValueError, match="float16; expected float32 or bfloat16"):
        train(pipe=half)
    with pytest.raises(ValueError, match="no text encoder"):
        train(pipe=StableDiffusionImg2ImgPipeline(**{**pipe.components, "text_encoder": None}))
    half.to(torch.float32).fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections first"):
        train(pipe=half)
    pipe.load_lora_weights(train("first.safetensors").path)
    with pytest.raises(ValueError, match="it has adapters; unload_lora_weights"):
        train()
    pipe.unload_lora_weights()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(train, tmp_path, monkeypatch):
    monkeypatch.setattr("sdedit.apps.finetune.train.nn.utils.clip_grad_norm_", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"the loss is (nan|inf) at update [2-9]: lower the learning rate"):
        train(steps=20, learning_rate=1e30, every=1, precision="float32")
    assert (tmp_path / "lora-training" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("package", ["peft", "matplotlib"])
def test_missing_packages_are_named(package, train, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"package {package}: pip install 'sdedit\[train\]'"):
        train()


def test_running_mean_forgets():
    assert shown.running_mean([4.0, 2.0, 6.0]) == pytest.approx([4.0, 3.0, 4.0])
    assert shown.running_mean([9.0] + [1.0] * 400)[-1] == pytest.approx(1.0, abs=0.02)
