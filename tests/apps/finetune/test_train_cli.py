"""`sdedit train lora` as it is typed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import picture
from sdedit.commands.cli import app


@pytest.fixture
def arguments(pictures, folder, tmp_path):
    picture(60, 44).save(tmp_path / "in.png")
    quick = ("--steps", 12, "--batch", 1, "--rank", 2, "--every", 3, "--sample-strength", 0.1)
    shown = ("--sample-prompt", "a cat", "--sample-image", tmp_path / "in.png", "--caption", "{}, ink")
    return ["train", "lora", pictures, "--model", folder, *quick, *shown]


def sdedit(*arguments, wait=True):
    code = [sys.executable, "-c", "from sdedit.commands.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(code, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process if not wait else (*process.communicate(timeout=300), process.returncode)


def test_ctrl_c_saves_and_the_same_command_goes_on(arguments, tmp_path):
    stopped = tmp_path / "stopped.safetensors"
    process = sdedit(*arguments, "-o", stopped, wait=False)
    while not stopped.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert out == f"{stopped}\n" and "of 12 updates" in error and "stopped; the same command goes on" in error
    for name in (stopped, tmp_path / "whole.safetensors"):
        out, error, code = sdedit(*arguments, "-o", name)
        assert code == 0, error
        assert "12 of 12 updates" in error and "finished; samples and plot: " in error
    first, second = load_file(stopped), load_file(tmp_path / "whole.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    made = {path.name for path in (tmp_path / "stopped-training").iterdir()}
    assert {"checkpoint.safetensors", "loss.png", "samples-000000.png", "samples-000012.png"} <= made


def test_errors_are_one_sentence(arguments, tmp_path):
    out, error, code = sdedit(*arguments, "-o", tmp_path / "x.safetensors", "--rank", 500)
    assert (out, code) == ("", 2)
    assert error.splitlines()[-1].startswith("error: rank=500; expected at most ")
    assert "Traceback" not in error and not (tmp_path / "x-training").exists()


def test_every_option_reaches_the_training(pictures, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from sdedit.apps import finetune

    seen = {}

    def train_lora(pipe, folder, output, *, samples, **settings):
        seen.update(settings, samples=samples, folder=folder)
        return finetune.TrainResult(output, output, 0, True, [], 0.0)

    monkeypatch.setattr(finetune, "train_lora", train_lora)
    typed = shlex.split(
        "--steps 7 --batch 3 --accumulate 2 --rate 0.01 --warmup 4 --rank 6 --alpha 3 --targets to_q,conv1 "
        "--text-encoder --min-snr 0 --dropout 0.2 --size 96 --flip --seed 8 --precision float32 --every 9 "
        "--no-samples --guided 0.4 --restart --caption ink"
    )
    ran = CliRunner().invoke(app, ["train", "lora", str(pictures), "-o", str(tmp_path / "x.safetensors"), *typed])
    assert ran.exit_code == 0, ran.output + repr(ran.exception)
    expected = {"steps": 7, "batch_size": 3, "accumulation": 2, "learning_rate": 0.01, "warmup": 4, "rank": 6}
    expected |= {"alpha": 3.0, "targets": ("to_q", "conv1"), "text_encoder": True, "min_snr_gamma": None}
    expected |= {
        "prompt_dropout": 0.2,
        "size": 96,
        "flip": True,
        "seed": 8,
        "precision": "float32",
        "every": 9,
        "guided": 0.4,
    }
    expected |= {"restart": True, "caption": "ink", "folder": pictures}
    assert seen.pop("samples").prompts == [] and seen == expected
