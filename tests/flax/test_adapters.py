"""LoRA files and textual inversions merged into params: the same weights as those of the PyTorch pipeline, fused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from conftest import UNET
from sdedit import FlaxUNet2DConditionModel, UNet2DConditionModel
from sdedit.flax import convert

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.3


KOHYA = f"lora_unet_{ATTENTION.replace('.', '_')}"
FILES: dict[str, dict[str, torch.Tensor]] = {
    "LoRA in UNet and text encoder": {
        f"unet.{ATTENTION}.lora_A.weight": normal(4, 32),
        f"unet.{ATTENTION}.lora_B.weight": normal(32, 4),
        f"text_encoder.{TEXT}.lora_A.weight": normal(2, 32),
        f"text_encoder.{TEXT}.lora_B.weight": normal(32, 2),
    },
    "LoCon with alpha": {
        f"lora_unet_{CONV.replace('.', '_')}.lora_down.weight": normal(4, 32, 3, 3),
        f"lora_unet_{CONV.replace('.', '_')}.lora_up.weight": normal(32, 4, 1, 1),
        f"lora_unet_{CONV.replace('.', '_')}.alpha": torch.tensor(2.0),
    },
    "LoHa": {f"{KOHYA}.hada_{part}": normal(*shape) for part, shape in
             {"w1_a": (32, 2), "w1_b": (2, 32), "w2_a": (32, 2), "w2_b": (2, 32)}.items()},
    "LoKr": {f"{KOHYA}.lokr_w1": normal(4, 4), f"{KOHYA}.lokr_w2_a": normal(8, 2), f"{KOHYA}.lokr_w2_b": normal(2, 8)},
    "DoRA": {
        f"{KOHYA}.lora_down.weight": normal(4, 32),
        f"{KOHYA}.lora_up.weight": normal(32, 4),
        f"{KOHYA}.dora_scale": normal(32, 1).abs() + 0.5,
    },
    "full, with a bias": {
        f"lora_unet_{CONV.replace('.', '_')}.diff": normal(32, 32, 3, 3),
        f"lora_unet_{CONV.replace('.', '_')}.diff_b": normal(32),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_loras_are_merged_as_pytorch_fuses_them(flax: Any, pipe: Any, tmp_path: Path, kind: str) -> None:
    ours, params = flax
    save_file(FILES[kind], tmp_path / "lora.safetensors")
    merged, report = ours.load_lora_weights(params, tmp_path / "lora.safetensors", scale=0.7)
    assert report.supported and sum(report.matched.values()) == (2 if "text" in kind else 1)
    pipe.load_lora_weights(tmp_path / "lora.safetensors", adapter_name="a")
    try:
        pipe.set_adapters("a", 0.7)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        for component in ("unet", "text_encoder"):
            before, after = convert.flatten(params[component]), convert.flatten(merged[component])
            layout = type(getattr(ours, component)).layout
            changed = 0
            for name, tensor in getattr(pipe, component).state_dict().items():
                path = convert.flax_name(name, layout, dict.fromkeys(after, ()))
                if path is None:
                    continue
                expected = tensor.numpy().transpose(convert._order(path, tensor.ndim))
                np.testing.assert_allclose(after[path], expected, atol=1e-5, err_msg=name)
                changed += bool((np.asarray(after[path]) != np.asarray(before[path])).any())
            assert changed == len([n for n in FILES[kind] if ("text" in n) == (component != "unet") and _changes(n)])
    finally:
        for component in ("unet", "text_encoder"):
            _restore(getattr(pipe, component), params[component], type(getattr(ours, component)).layout)


def _changes(name: str) -> bool:
    """Is it the tensor that stands for one changed weight or bias?"""
    return name.endswith(("lora_A.weight", "lora_down.weight", "hada_w1_a", "lokr_w1", ".diff", ".diff_b"))


def _restore(model: Any, params: Any, layout: Any) -> None:
    """The shared networks of the other tests, as they were."""
    leaves = convert.flatten(params)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            path = convert.flax_name(name, layout, dict.fromkeys(leaves, ()))
            if path is not None:
                order = np.argsort(convert._order(path, tensor.ndim))
                tensor.copy_(torch.from_numpy(np.array(leaves[path]).transpose(order)))


def test_loras_that_do_not_fit(flax: Any, tmp_path: Path) -> None:
    ours, params = flax
    with pytest.raises(ValueError, match="cannot be loaded: it does not fit this pipeline"):
        ours.load_lora_weights(params, {"unet.no.such.lora_A.weight": np.ones((2, 2), np.float32)})
    broken = {name: t.numpy() * np.nan for name, t in FILES["LoRA in UNet and text encoder"].items()}
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        ours.load_lora_weights(params, broken)


def test_names_of_layers_there_and_back(folder: Path) -> None:
    theirs = UNet2DConditionModel(**UNET).state_dict()
    ours = dict.fromkeys(FlaxUNet2DConditionModel.from_config(UNET).shapes(), ())
    for name in theirs:
        path = convert.flax_name(name, convert.UNET, ours)
        assert path in ours
        assert convert.torch_name(path.rpartition("/")[0]) == name.rpartition(".")[0]


@pytest.fixture
def fresh(folder: Path) -> Any:
    """A pipeline of its own: embeddings change its tokenizer."""
    from sdedit import FlaxStableDiffusionImg2ImgPipeline

    return FlaxStableDiffusionImg2ImgPipeline.from_pretrained(folder)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_textual_inversion(fresh: Any, tmp_path: Path, suffix: str) -> None:
    ours, params = fresh
    vectors, path = normal(2, 32), tmp_path / f"thing{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save({"<thing>": vectors}, path)
    count = len(ours.tokenizer)
    new, (report,) = ours.load_textual_inversion(params, path)
    assert str(report) == "'<thing>', 2 vectors" and ours.text_encoder.vocab_size == count + 2
    ids = ours.prepare_text_inputs("a <thing>")
    assert ids[0, 2:4].tolist() == [count, count + 1]
    table = np.asarray(convert.flatten(new["text_encoder"])["text_model/embeddings/token_embedding/embedding"])
    np.testing.assert_array_equal(table[count:], vectors.numpy())
    np.testing.assert_array_equal(
        table[:count], params["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"]
    )
    embeds = jax.jit(lambda p, i: ours.text_encoder.apply({"params": p}, i)[0])
    assert np.isfinite(np.asarray(embeds(new["text_encoder"], ids))).all()
    with pytest.raises(ValueError, match="the token '<thing>' exists already"):
        ours.load_textual_inversion(new, path)
    with pytest.raises(ValueError, match="are 16 wide; this pipeline's text encoder has 32"):
        ours.load_textual_inversion(new, {"<other>": np.ones(16, np.float32)})


def test_all_of_it_without_torch(folder: Path, tmp_path: Path) -> None:
    save_file(FILES["LoRA in UNet and text encoder"], tmp_path / "lora.safetensors")
    save_file({"<thing>": normal(2, 32)}, tmp_path / "thing.safetensors")
    theirs = UNet2DConditionModel(**UNET)
    (tmp_path / "pickled").mkdir()
    theirs.save_config(tmp_path / "pickled")
    torch.save(theirs.state_dict(), tmp_path / "pickled/diffusion_pytorch_model.bin")
    script = Path(__file__).with_name("torch_free.py")
    files = [folder, tmp_path / "lora.safetensors", tmp_path / "thing.safetensors", tmp_path / "pickled"]
    run = subprocess.run([sys.executable, str(script), *map(str, files)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]


def test_the_command_line(folder: Path, image: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    from sdedit.commands import cli
    from sdedit.commands.metadata import read_settings

    def sdedit(*arguments: Any) -> int:
        monkeypatch.setattr(sys, "argv", ["sdedit", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    image.save(tmp_path / "in.png")
    save_file(FILES["LoRA in UNet and text encoder"], tmp_path / "lora.safetensors")
    given = ("run", tmp_path / "in.png", "a cat", "-o", tmp_path / "out.png", "--model", folder, "--steps", 3)
    options = (
        "--backend",
        "jax",
        "--scheduler",
        "euler-a",
        "--seed",
        5,
        "--lora",
        f"{tmp_path / 'lora.safetensors'}:0.5",
    )
    assert sdedit(*given, *options, "--size", "original") == 0, capsys.readouterr()
    settings = read_settings(tmp_path / "out.png")
    assert settings.backend == "jax" and settings.sampler == "Euler a" and settings.lora[0][1] == 0.5
    assert sdedit("again", "--trust", tmp_path / "out.png", "-o", tmp_path / "again.png") == 0, capsys.readouterr()
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "out.png").read_bytes()
    assert sdedit(*given, "--backend", "jax", "--exact-steps") == 2
    assert "--exact-steps: not with --backend jax" in capsys.readouterr().err
    assert sdedit(*given, "--backend", "numpy") == 2
