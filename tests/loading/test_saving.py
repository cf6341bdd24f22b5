"""Saving over a model: killed or on a full disk, it leaves the old one, the new one, or none that loads."""

from __future__ import annotations

import errno
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from conftest import UNET, VAE
from sdedit import AutoencoderKL, DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from sdedit.files import is_temporary, write_atomically, write_folder
from sdedit.loading.folders import load_processor
from sdedit.loading.pretrained import load_components, save_components
from sdedit.loading.single_file_save import save_single_file

NOT_HERE = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}


class Killed(BaseException):
    """What happens to a process that is killed: nothing after it is done, cleaning up included."""


class Disk:
    """The operations that change a disk, of which the one at `until` and all after it are not done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.until = 0, 10**9
        for owner, names in ((Path, ("replace", "unlink", "mkdir", "rmdir", "chmod", "touch")), (shutil, ("rmtree",))):
            for name in names:
                monkeypatch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count > self.until:
                raise Killed
            return operation(*args, **kwargs)

        return run


def parts(seed: int, **vae: Any) -> dict[str, Any]:
    """Networks of one structure, of which a mixture would load."""
    torch.manual_seed(seed)
    held = {"unet": UNet2DConditionModel(**UNET), "vae": AutoencoderKL(**VAE, **vae)}
    return held | {"scheduler": DDIMScheduler(steps_offset=seed), **NOT_HERE}


def content(folder: Path) -> dict[str, bytes]:
    """All files that are not hidden."""
    files = (p for p in folder.rglob("*") if p.is_file())
    inside = {p.relative_to(folder): p for p in files}
    return {n.as_posix(): p.read_bytes() for n, p in inside.items() if not any(x.startswith(".") for x in n.parts)}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Path]:
    """A saved model, another one, and that saved in the place of a copy of the first."""
    folder = tmp_path_factory.mktemp("both")
    save_components(parts(0), False, folder / "old", None)
    later = parts(1, scaling_factor=0.5)
    save_components(later, False, folder / "new", None)
    return folder / "old", later, folder / "new"


def loads(folder: Path) -> bool:
    try:
        load_components(folder, read=False, **NOT_HERE)
    except (ValueError, FileNotFoundError):
        return False
    return True


def test_killed_at_any_operation_no_mixture_loads(
    both: tuple[Path, dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, later, new = both
    whole = [content(old), content(new)]
    seen: list[dict[str, bytes]] = []
    outcomes = set()
    for until in range(1000):
        target = tmp_path / f"{until}"
        shutil.copytree(old, target)
        with monkeypatch.context() as patch:
            disk = Disk(patch)
            disk.until = until
            try:
                save_components(later, False, target, None)
                finished = True
            except Killed:
                finished = False
        left = content(target)
        if left not in seen:
            seen.append(left)
            if loads(target):
                outcomes.add(whole.index(left) if left in whole else -1)
            for part in ("unet", "vae"):  # nor does a network of its own, of one's config and another's weights
                inside = {name: data for name, data in left.items() if name.startswith(part)}
                if f"{part}/config.json" in inside:
                    assert any(inside.items() <= one.items() for one in whole), sorted(inside)
        if finished:
            break
        # What the killed one left is in nobody's way.
        if until % 7 == 0:
            save_components(later, False, target, None)
            assert content(target) == whole[1]
    assert finished and until > 15 and len(seen) > 5
    assert outcomes == {0, 1}


def test_one_network_saved_over_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = AutoencoderKL(**VAE), AutoencoderKL(**VAE, scaling_factor=0.5)
    first.save_pretrained(tmp_path / "old")
    second.save_pretrained(tmp_path / "new")
    whole = [content(tmp_path / "old"), content(tmp_path / "new")]
    for until in range(1000):
        target = Path(shutil.copytree(tmp_path / "old", tmp_path / f"{until}"))
        with monkeypatch.context() as patch:
            Disk(patch).until = until
            try:
                second.save_pretrained(target)
                break
            except Killed:
                left = content(target)
                assert left in whole or "config.json" not in left
    assert until > 5 and content(target) == whole[1]


def test_other_files_of_the_folder_stay(both: tuple[Path, dict[str, Any], Path], tmp_path: Path) -> None:
    old, later, new = both
    target = Path(shutil.copytree(old, tmp_path / "model"))
    (target / "README.md").write_text("mine")
    (target / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    save_components(later, False, target, None)
    assert content(target).items() - content(new).items() == {
        ("README.md", b"mine"),
        ("unet/diffusion_pytorch_model.fp16.safetensors", b"another variant"),
    }


FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos: No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    both: tuple[Path, dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    old, later, _ = both
    target = Path(shutil.copytree(old, tmp_path / "model"))
    before = content(target)

    def half(tensors: Any, path: Path, **more: Any) -> None:
        Path(path).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr("sdedit.loading.weights.save_file", half)
    monkeypatch.setattr("sdedit.loading.single_file_save.save_file", half)
    saves: list[Callable[[], None]] = [
        lambda: save_components(later, False, target, None),
        lambda: save_components(later, False, tmp_path / "fresh", None),
        lambda: later["vae"].save_pretrained(target / "vae"),
        lambda: save_single_file(later["vae"], tmp_path / "one.safetensors"),
    ]
    for save in saves:
        with pytest.raises(
            OSError, match=r"could not be written, for the disk is full; nothing of it is left"
        ) as caught:
            save()
        assert caught.value.errno == errno.ENOSPC and "\n" not in str(caught.value)
    assert content(target) == before
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.startswith(".")) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_other_errors_of_a_disk_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(PermissionError, match="not yours"), write_atomically(tmp_path / "a.txt"):
        raise PermissionError(errno.EACCES, "not yours")
    with pytest.raises(ValueError, match=r"save_directory: .* is a file"):
        (tmp_path / "file").touch()
        with write_folder(tmp_path / "file"):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def leftover(folder: Path, suffix: str, age: float) -> Path:
    path = folder / f".{os.urandom(16).hex()}{suffix}"
    if suffix:
        path.write_bytes(b"half of")
    else:
        path.mkdir()
        (path / "model_index.json").write_text("{}")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def test_leftovers_are_swept_when_they_are_old(tmp_path: Path) -> None:
    old = [leftover(tmp_path, suffix, 3 * 24 * 3600) for suffix in (".safetensors", ".json", "")]
    young = [leftover(tmp_path, suffix, 60) for suffix in (".safetensors", "")]
    others = [tmp_path / ".hidden", tmp_path / f"{'a' * 32}.json", tmp_path / f".{'g' * 32}.json"]
    for path in others:
        path.touch()
        os.utime(path, (0, 0))
    assert all(is_temporary(path.name) for path in old + young)
    with write_atomically(tmp_path / "a.txt") as temporary:
        temporary.write_text("a")
    assert not any(path.exists() for path in old)
    assert all(path.exists() for path in young + others) and (tmp_path / "a.txt").read_text() == "a"


def test_leftovers_do_not_break_later_loads(folder: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(folder, tmp_path / "model"))
    for part in target.iterdir():
        if part.is_dir():
            for suffix in (".json", ".safetensors", ".bin", ".txt"):
                leftover(part, suffix, 60)
    leftover(target, "", 60)
    leftover(target, ".json", 60)
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(target)
    load_processor(type(pipe.tokenizer), target / "tokenizer")
    save_file({"unet.x.lora_A.weight": torch.ones(1, 1)}, target / "unet" / "style.safetensors")
    from sdedit.adapters.files import _choose

    (target / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert _choose([p.name for p in (target / "unet").iterdir()], None, "unet") == "style.safetensors"


def test_compiled_networks_are_saved_as_what_they_are(loaded: Any, tmp_path: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**{**loaded.components, "requires_safety_checker": False})
    names = {n: type(getattr(pipe, n)).__name__ for n in ("unet", "vae", "text_encoder")}
    for name in names:
        setattr(pipe, name, torch.compile(getattr(pipe, name)))
    assert "OptimizedModule" not in repr(pipe) and names["unet"] in repr(pipe)
    pipe.save_pretrained(tmp_path / "model")
    again = StableDiffusionImg2ImgPipeline.from_pretrained(tmp_path / "model")
    for name, class_name in names.items():
        assert type(getattr(again, name)).__name__ == class_name
        ours, theirs = getattr(loaded, name).state_dict(), getattr(again, name).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    save_single_file(pipe.vae, tmp_path / "vae.safetensors")
    assert not any("_orig_mod" in name for name in load_file(tmp_path / "vae.safetensors"))


def test_weights_of_a_compiled_network_load(loaded: Any, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_config(loaded.vae.config)
    vae.load_state_dict(loaded.vae.state_dict())
    vae.save_pretrained(tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({f"_orig_mod.{name}": t for name, t in load_file(path).items()}, path)
    save_single_file(vae, tmp_path / "one.safetensors")
    save_file(
        {f"_orig_mod.{name}": t for name, t in load_file(tmp_path / "one.safetensors").items()},
        tmp_path / "one.safetensors",
    )
    for again in (
        AutoencoderKL.from_pretrained(tmp_path / "vae"),
        AutoencoderKL.from_single_file(tmp_path / "one.safetensors", config=tmp_path / "vae"),
    ):
        state = again.state_dict()
        assert all(torch.equal(t, state[name]) for name, t in vae.state_dict().items())


def small_lora(unet: Any) -> dict[str, torch.Tensor]:
    name = next(n.removesuffix(".weight") for n in unet.state_dict() if n.endswith("attn1.to_q.weight"))
    out, into = unet.state_dict()[f"{name}.weight"].shape
    return {f"unet.{name}.lora_A.weight": torch.ones(2, into), f"unet.{name}.lora_B.weight": torch.ones(out, 2)}


def test_a_lora_in_a_compiled_network(loaded: Any, tmp_path: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**{**loaded.components, "requires_safety_checker": False})
    plain, lora = pipe.unet, small_lora(pipe.unet)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    pipe.unet = torch.compile(plain)
    assert pipe.load_lora_weights(lora, adapter_name="style").matched == {"unet": 1}
    try:
        assert pipe.get_list_adapters() == {"unet": ["style"]}
        with pytest.warns(UserWarning, match="not fused are not saved: style"):
            pipe.save_pretrained(tmp_path / "model")
    finally:
        pipe.unload_lora_weights()
    for state in (plain.state_dict(), load_file(tmp_path / "model/unet/diffusion_pytorch_model.safetensors")):
        assert state.keys() == before.keys() and all(torch.equal(state[name], before[name]) for name in before)


def test_a_full_disk_while_downloading(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdedit.loading.hub import find_file

    asked: list[str] = []

    def full(repo: str, name: str, **more: Any) -> str:
        asked.append(name)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(OSError, match="owner/name could not be downloaded, for the disk is full") as caught:
        find_file("owner/name", ["a.safetensors", "a.bin"])
    assert caught.value.errno == errno.ENOSPC and asked == ["a.safetensors"]


def test_a_lora_that_is_not_fused_is_missed_aloud(loaded: Any, tmp_path: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**{**loaded.components, "requires_safety_checker": False})
    pipe.load_lora_weights(small_lora(pipe.unet), adapter_name="style")
    try:
        with pytest.warns(UserWarning, match="not fused are not saved: style"):
            pipe.save_pretrained(tmp_path / "model")
        pipe.fuse_lora()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe.save_pretrained(tmp_path / "model")
    finally:
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
