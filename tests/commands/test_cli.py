"""The command line as a user types it: a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from conftest import picture
from sdedit.commands.metadata import read_settings

SDEDIT = Path(sys.executable).with_name("sdedit")


def sdedit(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd / "hub")}
    return subprocess.run(
        [SDEDIT, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with an input image in it."""
    picture(60, 44).save(tmp_path / "in.png")
    return tmp_path


def test_run_and_again(work: Path, folder: Path) -> None:
    ran = sdedit(
        *("run", "in.png", "apple, red: 1", "-o", "out.png", "--model", folder, "--steps", 4, "--seed", 7),
        *("--negative", "grey", "--scheduler", "euler-a", "--size", "original", "--strength", 0.6, "--guidance", 3),
        *("--exact-steps", "--extra-noise", 0.1, "--weighting", "--repeats", 2),
        cwd=work,
    )
    assert ran.returncode == 0, ran.stderr
    assert "seed 7" in ran.stdout
    settings = read_settings(work / "out.png")
    assert (settings.prompt, settings.negative, settings.seed) == ("apple, red: 1", "grey", 7)
    assert (settings.exact_steps, settings.extra_noise, settings.weighting) == (True, 0.1, True)
    assert settings.repeats == 2
    assert "2 times 4 steps from noise level" in ran.stderr
    assert (settings.sampler, settings.scheduler, settings.size) == ("Euler a", "euler-a", (60, 44))

    # From another folder, under another name: the same picture.
    (work / "elsewhere").mkdir()
    ran = sdedit("again", "--trust", work / "out.png", "-o", "twice.png", cwd=work / "elsewhere")
    assert ran.returncode == 0, ran.stderr
    with Image.open(work / "out.png") as first, Image.open(work / "elsewhere" / "twice.png") as second:
        assert first.size == (60, 44)
        assert np.array_equal(np.asarray(first), np.asarray(second))


def test_embeddings_are_loaded_and_kept_in_the_settings(work: Path, folder: Path) -> None:
    (work / "words").mkdir()
    torch.save({"<x>": torch.full((2, 32), 2.0)}, work / "words/x, 1.bin")
    save_file({"emb_params": torch.full((1, 32), -2.0)}, work / "words/<y>.safetensors")
    run = ("run", "in.png", "a <x> (<y>:1.3)", "-o", "out.png", "--model", folder, "--steps", 3, "--seed", 7)
    words = ("--embedding", "words/x, 1.bin", "--embedding", "words/<y>.safetensors")
    ran = sdedit(*run, *words, "--negative", "<y>", "--weighting", cwd=work)
    assert ran.returncode == 0, ran.stderr
    assert "embedding '<x>', 2 vectors\nembedding '<y>', 1 vector\n" in ran.stderr
    assert read_settings(work / "out.png").embeddings == ["words/x, 1.bin", "words/<y>.safetensors"]
    (work / "elsewhere").mkdir()
    assert sdedit("again", "--trust", work / "out.png", "-o", "twice.png", cwd=work / "elsewhere").returncode == 0
    assert sdedit(*run[:4], "plain.png", *run[5:], "--weighting", cwd=work).returncode == 0
    paths = (work / "out.png", work / "elsewhere/twice.png", work / "plain.png")
    drawn, twice, plain = (np.asarray(Image.open(path)) for path in paths)
    assert np.array_equal(drawn, twice)
    assert not np.array_equal(drawn, plain)
    ran = sdedit(*run, "--embedding", "none.pt", cwd=work)
    assert ran.returncode == 2
    assert "error: --embedding none.pt does not exist" in ran.stderr


def test_again_wants_the_same_input_image(work: Path, folder: Path) -> None:
    assert sdedit("run", "in.png", "a", "-o", "o.png", "--model", folder, "--steps", 1, cwd=work).returncode == 0
    picture(60, 44, seed=1).save(work / "in.png")
    ran = sdedit("again", "--trust", "o.png", cwd=work)
    assert ran.returncode == 0 and "its hash differs" in ran.stderr
    (work / "in.png").unlink()
    ran = sdedit("again", "--trust", "o.png", cwd=work)
    assert ran.returncode == 2 and "in.png does not exist" in ran.stderr


def test_masks_are_kept_in_the_settings(work: Path, folder: Path) -> None:
    """What is black in the mask stays, at whatever size the picture is drawn."""
    mask = np.zeros((44, 60), dtype=np.uint8)
    mask[8:30, 10:40] = 255
    (work / "masks").mkdir()
    Image.fromarray(mask).save(work / "masks/hat, 1.png")
    Image.fromarray(mask // 2).save(work / "levels.png")
    run = ("run", "in.png", "a", "-o", "out.png", "--model", folder, "--steps", 4, "--seed", 7, "--size", "original")
    masks = ("--mask", "masks/hat, 1.png", "--feather", 2, "--strength-map", "levels.png")
    ran = sdedit(*run, *masks, cwd=work)
    assert ran.returncode == 0, ran.stderr
    settings = read_settings(work / "out.png")
    assert (settings.mask, settings.strength_map, settings.feather) == ("masks/hat, 1.png", "levels.png", 2)
    assert settings.strength == 1 and "1 steps from noise level" in ran.stderr  # 127/255 of 4 steps
    first, source = (np.asarray(Image.open(work / name)) for name in ("out.png", "in.png"))
    assert np.array_equal(first[mask == 0], source[mask == 0])
    assert not np.array_equal(first, source)
    (work / "elsewhere").mkdir()
    assert sdedit("again", "--trust", work / "out.png", "-o", "twice.png", cwd=work / "elsewhere").returncode == 0
    assert np.array_equal(first, np.asarray(Image.open(work / "elsewhere/twice.png")))
    # At another size the mask is brought there with the image.
    assert sdedit(*run[:4], "small.png", *run[5:11], "--size", "32x32", *masks[:2], cwd=work).returncode == 0
    Image.fromarray(mask[:20]).save(work / "levels.png")
    ran = sdedit(*run, *masks, cwd=work)
    assert ran.returncode == 2 and "--strength-map: 60×20 for an image of 60×44 pixels" in ran.stderr
    ran = sdedit("again", "--trust", "out.png", cwd=work)
    assert ran.returncode == 2 and "its hash differs" in ran.stderr


def test_composite(work: Path, folder: Path) -> None:
    cutout = Image.new("RGBA", (16, 16))
    cutout.paste((255, 0, 0, 255), (4, 4, 12, 12))
    cutout.save(work / "a.png")
    common = ("apple", "-o", "out.png", "--model", folder, "--steps", 4, "--seed", 1, "--margin", 2)
    ran = sdedit(
        "composite", "in.png", "a.png", "a.png", "--at", "2,3", "--at", "30,-2", "--scale", 1.5, *common, cwd=work
    )
    assert ran.returncode == 0, ran.stderr
    out, pasted, mask, source = (
        np.asarray(Image.open(work / name)) for name in ("out.png", "out-pasted.png", "out-mask.png", "in.png")
    )
    assert np.array_equal(out[mask == 0], source[mask == 0]) and (pasted[15, 14] == (255, 0, 0)).all()
    assert sdedit("again", "--trust", "out.png", "-o", "twice.png", cwd=work).returncode == 0
    assert np.array_equal(out, np.asarray(Image.open(work / "twice.png")))
    ran = sdedit("composite", "in.png", "in.png", "--at", "2,3", *common, cwd=work)
    assert ran.returncode == 2 and "nothing in it is transparent" in ran.stderr
    ran = sdedit("composite", "in.png", "a.png", "--at", "here", *common, cwd=work)
    assert ran.returncode == 2 and "--at here; expected X,Y" in ran.stderr


def test_count_gives_each_picture_its_seed(work: Path, folder: Path) -> None:
    common = ("--model", folder, "--steps", 3, "--size", "64x64", "--scheduler", "ddpm")
    assert sdedit("run", "in.png", "a", "-o", "o.png", "--count", 2, "--seed", 5, *common, cwd=work).returncode == 0
    assert sdedit("run", "in.png", "a", "-o", "alone.png", "--seed", 6, *common, cwd=work).returncode == 0
    assert read_settings(work / "o-2.png").seed == 6
    with Image.open(work / "o-2.png") as batched, Image.open(work / "alone.png") as alone:
        assert batched.size == (64, 64)
        assert np.abs(np.asarray(batched).astype(int) - np.asarray(alone)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "none.png", "a", "-o", "o.png"), "none.png does not exist"),
        (("run", "broken.png", "a", "-o", "o.png"), "not an image"),
        (("run", "in.png", "a", "-o", "nowhere/o.png"), "a folder that exists"),
        (("run", "in.png", "a", "-o", "o"), "such as out.png"),
        (("run", "in.png", "a", "-o", "o.png", "--scheduler", "best"), "expected one of ddim"),
        (("run", "in.png", "a", "-o", "o.png", "--strength", "2"), "'--strength'"),
        (("run", "in.png", "a", "-o", "o.png", "--steps", "0"), "'--steps'"),
        (("run", "in.png", "a", "-o", "o.png", "--count", "0"), "'--count'"),
        (("run", "in.png", "a", "-o", "o.png", "--size", "big"), "expected WIDTHxHEIGHT"),
        (("run", "in.png", "a", "-o", "o.png", "--dtype", "int8"), "expected auto"),
        (("run", "in.png", "a", "-o", "o.png", "--mask", "none.png"), "none.png"),
        (("run", "in.png", "a", "-o", "o.png", "--strength-map", "broken.png"), "not an image"),
        (("run", "in.png", "a", "-o", "o.png", "--device", "tpu"), "cannot be used here"),
        (("run", "in.png", "a", "-o", "o.png", "--model", "no/such"), "the hub"),
        (("run", "in.png", "a", "-o", "o.png", "--max-megapixels", "0.001"), "at most 0"),
        (("run", "in.png", "a", "-o", "o.png", "--max-megapixels", "nan"), "Invalid value for '--max-megapixels'"),
        (("run", "in.png", "a", "-o", "o.png", "--max-megapixels=-inf"), "Invalid value for '--max-megapixels'"),
        (("run", "gone.png", "a", "-o", "o.png", "--max-megapixels", "inf"), "gone.png does not exist"),
        (("again", "in.png"), "carries no settings"),
        (("inspect", "none.safetensors"), "none.safetensors does not exist"),
        (("inspect", "in.png"), "is a PNG picture, not a file of weights"),
        (("inspect", "."), "is no model folder"),
        (("strokes", "in.png", "-o", "o.png", "--kernel", "4"), "--kernel 4; expected an odd number"),
        (("run", "in.png"), "Missing argument"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    work: Path, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    (work / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    before = sorted(work.iterdir())
    ran = sdedit(*(folder if a == "FOLDER" else a for a in arguments), cwd=work)
    assert ran.returncode == 2
    assert message in ran.stderr
    assert "Traceback" not in ran.stderr
    assert sorted(p for p in work.iterdir() if p.name != "hub") == before


def test_debug_gives_the_traceback(work: Path) -> None:
    ran = sdedit("run", "none.png", "a", "-o", "o.png", "--debug", cwd=work)
    assert ran.returncode != 0 and "Traceback" in ran.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("KeyError('tokenizer')", "error: KeyError 'tokenizer' (--debug shows where)"),
        ("ZeroDivisionError()", "error: ZeroDivisionError  (--debug shows where)"),
        ("MemoryError()", "error: there is not enough memory"),
        ("ModuleNotFoundError('No module named jax', name='jax.numpy')", "pip install 'sdedit[flax]'"),
        ("ModuleNotFoundError('No module named peft', name='peft')", "pip install 'sdedit[lora]'"),
        (
            "ImportError(\"it needs x: pip install 'sdedit[y]'\", name='jax')",
            "error: it needs x: pip install 'sdedit[y]'\n",
        ),
    ],
)
def test_any_exception_is_one_sentence_and_a_code(error: str, message: str) -> None:
    code = f"from sdedit.commands import cli\ndef app(): raise {error}\ncli.app = app\ncli.main()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and message in ran.stderr and ran.stderr.count("\n") == 1
    ran = subprocess.run([sys.executable, "-c", code, "--debug"], capture_output=True, text=True, check=False)
    assert ran.returncode != 0 and "Traceback" in ran.stderr


def test_every_package_that_an_extra_brings_is_named(work: Path) -> None:
    import tomllib

    from sdedit.commands.cli import EXTRAS

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module = {"scikit-image": "skimage"}
    brought = {
        module.get(name := package.partition(">")[0], name): extra
        for extra in ("sde", "lora", "offload", "images", "plot", "flax")
        for package in project["optional-dependencies"][extra]
    }
    assert brought == EXTRAS


def test_the_module_and_the_shells_know_the_commands(work: Path) -> None:
    ran = subprocess.run([sys.executable, "-m", "sdedit", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.startswith("sdedit ")
    environment = {
        **os.environ,
        "_SDEDIT_COMPLETE": "complete_bash",
        "COMP_WORDS": "sdedit run --str",
        "COMP_CWORD": "2",
    }
    ran = subprocess.run([SDEDIT], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["--strength", "--strength-map"]


def test_inspect(work: Path, folder: Path) -> None:
    ran = sdedit("inspect", folder, cwd=work)
    assert ran.returncode == 0, ran.stderr
    assert "kind: model folder\nfamily: Stable Diffusion 1.x\nprediction type: epsilon" in ran.stdout
    assert "loads: yes, with StableDiffusionImg2ImgPipeline.from_pretrained" in ran.stdout


def test_sweep_draws_a_sheet(work: Path, folder: Path) -> None:
    ran = sdedit(
        *("sweep", "in.png", "apple", "-o", "sheet.png", "--model", folder, "--size", "original"),
        *("--steps", 4, "--strengths", "0.25,0.5,1", "--exact-steps"),
        cwd=work,
    )
    assert ran.returncode == 0, ran.stderr
    assert [line.split(",")[0] for line in ran.stdout.splitlines()[:3]] == [
        "strength 0.25: 4 steps",
        "strength 0.5: 4 steps",
        "strength 1: 4 steps",
    ]
    with Image.open(work / "sheet.png") as sheet:
        assert sheet.width >= 2 * 60
    ran = sdedit("sweep", "in.png", "apple", "-o", "sheet.png", "--strengths", "a,b", cwd=work)
    assert ran.returncode == 2 and "expected numbers with commas" in ran.stderr


def test_models_and_version(work: Path) -> None:
    assert "default" in sdedit("models", cwd=work).stdout
    assert sdedit("--version", cwd=work).stdout.startswith("sdedit ")


def test_import_is_fast_and_light() -> None:
    """Nothing heavy is imported before it is needed."""
    heavy = "{'torch', 'transformers', 'numpy', 'PIL', 'diffusers', 'huggingface_hub'}"
    for module in ("sdedit", "sdedit.commands.cli"):
        code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == "[]"
