"""Configs are checked at the door: every value by its key, before anything is made of it."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import SHARED, needs_shared
from sdedit import AutoencoderKL, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from sdedit.files import read_json
from sdedit.loading.pretrained import load_components
from sdedit.loading.training_config import find_training
from sdedit.models.kinds import _VALUES, check_values

Load = Callable[..., Any]
WRONG = {
    "unet": {
        "norm_eps": [math.nan, "small", None, -1.0, math.inf],
        "attention_head_dim": [math.nan, "eight", None, 0, -8, 10**9, [8, None], [8] * 100],
        "layers_per_block": [10**9, 0, 2.5, "2", None, True],
        "transformer_layers_per_block": [10**9, -1, [1, 10**9]],
        "block_out_channels": [10**9, [32, math.nan], [], [[32], [64]], {"0": 32}],
        "cross_attention_dim": [math.nan, None, [32, 32], 10**12],
        "norm_num_groups": [0, None, "all"],
        "dropout": [math.nan, 2],
        "act_fn": [None, 1, ["silu"]],
        "use_linear_projection": ["yes", 1, None],
        "sample_size": ["64", -1, math.inf],
        "down_block_types": ["DownBlock2D", [1, 2], ["DownBlock2D"] * 100],
    },
    "vae": {
        "scaling_factor": [math.nan, "0.18215", None, 0, math.inf, -0.18215],
        "latent_channels": [None, 0, 10**12],
        "layers_per_block": [10**9, math.nan],
        "force_upcast": ["no"],
    },
    "text_encoder": {
        "num_hidden_layers": [10**9, -1, None, "twelve", math.nan],
        "num_attention_heads": [0, math.nan, 10**9],
        "layer_norm_eps": [math.nan, None, "1e-5"],
        "vocab_size": [10**12, -5, 2.5],
        "hidden_size": [math.nan, 10**9],
    },
    "scheduler": {
        "beta_start": [math.nan, "0.1", None, math.inf],
        "beta_end": [math.nan, [0.1]],
        "num_train_timesteps": [10**9, 0, -1, math.nan, None, "1000"],
    },
}
CASES = [(part, key, value) for part, keys in WRONG.items() for key, values in keys.items() for value in values]


@pytest.fixture(scope="module")
def networks_only(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(folder, tmp_path_factory.mktemp("values") / "model"))


class Modules:
    """Counts the modules that are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        original = nn.Module.__init__

        def init(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            self.made += 1
            original(module, *args, **kwargs)

        monkeypatch.setattr(nn.Module, "__init__", init)


@pytest.mark.parametrize(("part", "key", "value"), CASES, ids=[f"{p} {k} {str(v)[:12]}" for p, k, v in CASES])
def test_a_wrong_value_fails_at_load_by_name(
    networks_only: Path, monkeypatch: pytest.MonkeyPatch, part: str, key: str, value: Any
) -> None:
    path = networks_only / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    good = path.read_text()
    path.write_text(json.dumps({**json.loads(good), key: value}))
    others = {name: object() for name in WRONG if name != part} | {"tokenizer": None, "safety_checker": None}
    counted = Modules(monkeypatch)
    try:
        with pytest.raises(ValueError, match=key) as caught:
            load_components(networks_only, **others)
    finally:
        path.write_text(good)
    # The outermost module of each of our networks is begun before its arguments are looked at, and nothing in it.
    assert counted.made <= 1
    assert str(path.parent) in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.parametrize(
    "values",
    [
        {"down_block_types": ("DownBlock2D",) * 8, "layers_per_block": 8, "transformer_layers_per_block": 12},
        {"down_block_types": ("DownBlock2D",) * 8, "layers_per_block": (1, 8), "transformer_layers_per_block": (1, 5)},
    ],
)
def test_what_is_too_much_together(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="at most 256 transformer layers in all"):
        check_values(values)


@needs_shared
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "safety_checker"])
def test_published_configs_are_allowed(part: str) -> None:
    config = read_json(SHARED / "data" / "sd15" / part / "config.json")
    check_values(config)
    keys = set(config) | set(config.get("text_config", ())) | set(config.get("vision_config", ()))
    assert len(keys & set(_VALUES)) >= 5


def test_defaults_are_allowed() -> None:
    with torch.device("meta"):
        UNet2DConditionModel(), AutoencoderKL()


def test_every_number_of_a_network_has_bounds() -> None:
    """A number that nobody bounds could ask for any amount of memory, or be NaN."""
    import inspect

    from sdedit import AutoencoderTiny
    from sdedit.models.clip_text import CLIPTextEncoder

    for cls in (UNet2DConditionModel, AutoencoderKL, AutoencoderTiny, CLIPTextEncoder):
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if parameter.default not in (None, parameter.empty) and not isinstance(parameter.default, (bool, str)):
                assert name in _VALUES or name == "shift_factor", f"{cls.__name__}.{name}"


# --- Files around the configs ---

LIMITED = """
import resource, sys
from pathlib import Path
from sdedit.loading.folders import load_processor
from sdedit.loading.training_config import find_training
from sdedit.files import read_json
resource.setrlimit(resource.RLIMIT_AS, (400 << 20, 400 << 20))
what, path = sys.argv[1], Path(sys.argv[2])
try:
    if what == "json":
        read_json(path)
    elif what == "vocabulary":
        load_processor(type("XTokenizer", (), {}), path)
    else:
        find_training(path, path, None, None)
except ValueError as error:
    print(str(error)[:400])
"""


def limited(what: str, path: Path) -> str:
    """What is said in a process that may not have more than 400 MB of addresses, of which Python takes a third."""
    command = [sys.executable, "-c", LIMITED, what, str(path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_AS"), reason="no limit on addresses here")
def test_large_files_are_refused_unread(tmp_path: Path) -> None:
    for name, what in (("model_index.json", "json"), ("tokenizer/tokenizer.json", "vocabulary"), ("v1.yaml", "yaml")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w") as file:
            file.write("[" + "[]," * (21 << 20) + "[]]" if name != "v1.yaml" else "- [a, b]\n" * 100_000)
        said = limited(what, path.parent if what == "vocabulary" else path)
        assert "bytes" in said and "at most" in said, said


@pytest.mark.parametrize(
    "text",
    [
        "a: !!bool maybe",
        "a: !!int ''",
        "a: !!float x",
        "a: !!timestamp x",
        "a: !!binary 5",
        "a: !!int 1:1:x",
        "a: !!set [1]",
        "a: !!omap 3",
        "a: !!python/name:os.system x",
        "a: !x 1",
        "a: *b",
        "? [a]\n: b",
        "{" * 5000,
        "\t",
        "\0",
    ],
)
def test_constructors_of_yaml_are_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match="original_config") as caught:
        find_training(tmp_path / "m.ckpt", tmp_path / "c.yaml", None, None)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


ODD_YAML = {
    "empty": "",
    "a list": "- 1\n- 2",
    "broken": "a: [",
    "of something else": "services:\n  web:\n    image: nginx\n",
    "scale": "model: {params: {scale_factor: .nan}}",
    "timesteps": "model: {params: {timesteps: 1000000000}}",
    "heads": "model: {params: {unet_config: {params: {num_heads: 1.5}}}}",
    "text": "model: {params: {linear_start: small}}",
    "parameterization": "model: {params: {parameterization: [v]}}",
    "large": "a: b\n" * 100_000,
}


@pytest.mark.parametrize("name", ODD_YAML)
def test_an_odd_yaml_that_nobody_named_is_ignored_with_a_note(tmp_path: Path, name: str) -> None:
    (tmp_path / "m.yaml").write_text(ODD_YAML[name])
    with pytest.warns(UserWarning, match=r"not used: original_config: .*m\.yaml"):
        training = find_training(tmp_path / "m.ckpt", None, None, None)
    assert training.prediction_type is None and not training.params
    with pytest.raises(ValueError, match=r"original_config: .*m\.yaml"):
        find_training(tmp_path / "m.ckpt", tmp_path / "m.yaml", None, None)


def test_notes_in_the_list_of_components(networks_only: Path) -> None:
    path = networks_only / "model_index.json"
    good = path.read_text()
    odd = {
        "_ignore_files": ["a", "b"],
        "_note": [1, 2, 3],
        "_class_name": ["X", "Y"],
        "_module": {"a": []},
        "_x": [None],
    }
    path.write_text(json.dumps({**json.loads(good), **odd}))
    try:
        parts = load_components(networks_only, read=False)
    finally:
        path.write_text(good)
    assert not [name for name in parts if name.startswith("_")]
    assert isinstance(parts["unet"], UNet2DConditionModel)


def test_escapes_are_quoted(networks_only: Path) -> None:
    path = networks_only / "model_index.json"
    good = path.read_text()
    path.write_text(json.dumps({**json.loads(good), "\x1b]0;owned\x07" * 50: ["diffusers", "X"]}))
    try:
        with pytest.raises(ValueError) as caught:
            load_components(networks_only)
    finally:
        path.write_text(good)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600 + len(str(path))


# --- What else comes with a network ---


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_whole_clip_by_the_name_of_its_text_encoder(networks_only: Path, tmp_path: Path, prefix: str) -> None:
    folder = Path(shutil.copytree(networks_only, tmp_path / "model"))
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {f"{prefix}{name.removeprefix('text_model.')}": t for name, t in load_file(path).items()}
    beside = {
        "text_projection.weight": torch.ones(4, 4),
        "visual_projection.weight": torch.ones(4, 4),
        "logit_scale": torch.ones(()),
        "vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(4, 4),
        "vision_model.embeddings.patch_embedding.weight": torch.ones(4, 3, 2, 2),
    }
    expected = StableDiffusionImg2ImgPipeline.from_pretrained(folder).text_encoder.state_dict()
    save_file(tensors | beside, path)
    with pytest.warns(UserWarning, match="5 tensors of a whole CLIP are left out"):
        found = StableDiffusionImg2ImgPipeline.from_pretrained(folder).text_encoder.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    save_file(tensors | {"extra.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="extra"):
        StableDiffusionImg2ImgPipeline.from_pretrained(folder)


@pytest.mark.parametrize(("key", "value"), [("norm_eps", math.nan), ("layers_per_block", 10**9), ("dropout", "none")])
def test_on_jax_too(key: str, value: Any) -> None:
    pytest.importorskip("jax")
    from sdedit import FlaxUNet2DConditionModel

    with pytest.raises(ValueError, match=key):
        FlaxUNet2DConditionModel.from_config({key: value})


NUMBERS = st.one_of(
    st.integers(-2, 20), st.integers(), st.floats(), st.none(), st.booleans(), st.text(max_size=4), st.just(10**9)
)
ANYTHING = st.recursive(
    NUMBERS, lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(), inner), max_leaves=9
)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_any_value_is_a_network_or_one_error(networks_only: Path, part: str) -> None:
    """Whatever stands at a key, a load ends in our error or not at all, and makes no more modules than models have."""
    path = networks_only / part / "config.json"
    good = path.read_text()
    keys = sorted(set(json.loads(good)) & set(_VALUES))
    others = {name: object() for name in WRONG if name != part} | {"tokenizer": None, "safety_checker": None}

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changes=st.dictionaries(st.sampled_from(keys), ANYTHING, min_size=1, max_size=2))
    def attack(changes: dict[str, Any]) -> None:
        path.write_text(json.dumps({**json.loads(good), **changes}))
        with pytest.MonkeyPatch.context() as patch:
            counted = Modules(patch)
            try:
                load_components(networks_only, read=False, **others)
            except ValueError as error:
                assert str(path.parent) in str(error) and str(error).replace("\n", "").isprintable()
                assert len(str(error)) < 3000 + len(str(path))
            assert counted.made < 20_000

    try:
        attack()
    finally:
        path.write_text(good)
