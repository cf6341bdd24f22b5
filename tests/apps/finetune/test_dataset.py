"""Captions by every way of writing them, pictures of every size, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import picture
from sdedit.apps.finetune.dataset import caption_from_name, encode_pictures, fitted, guide, read_folder
from sdedit.inputs.images import read_images
from sdedit.inputs.pixels import open_image


@pytest.mark.parametrize(
    ("stem", "caption"),
    [
        ("red_apple-2", "red apple"),
        ("red apple (13)", "red apple"),
        ("red-apple.01", "red apple"),
        ("route 66 sign", "route 66 sign"),
        ("cat", "cat"),
        ("0001", ""),
        ("éléphant_3", "éléphant"),
    ],
)
def test_file_names_are_captions(stem, caption):
    assert caption_from_name(stem) == caption


def captions(folder, pattern="{}"):
    return {example.path.name: example.caption for example in read_folder(folder, pattern)}


def test_captions_from_names_with_a_pattern(pictures):
    assert captions(pictures, "{}, ink") == {
        "a cat-1.png": "a cat, ink",
        "a cat-2.png": "a cat, ink",
        "red_apple.png": "red apple, ink",
    }
    picture().save(pictures / "0001.png")
    assert set(captions(pictures, "ink").values()) == {"ink"}


def test_captions_from_metadata(pictures):
    rows = [{"file_name": p.name, "text": f"it's {p.stem}"} for p in pictures.iterdir()]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    assert captions(pictures)["red_apple.png"] == "it's red_apple"
    (pictures / "metadata.jsonl").unlink()
    lines = ["file_name,text,other", *(f'{row["file_name"]},"{row["text"]}, yes",1' for row in rows)]
    (pictures / "metadata.csv").write_text("\r\n".join(lines), encoding="utf-8-sig")
    assert captions(pictures)["red_apple.png"] == "it's red_apple, yes"


def test_metadata_may_name_pictures_in_folders(pictures):
    (pictures / "train").mkdir()
    for path in list(pictures.glob("*.png")):
        path.rename(pictures / "train" / path.name)
    (pictures / "metadata.jsonl").write_text('{"file_name": "train/red_apple.png", "text": "apple"}')
    assert [(e.path, e.caption) for e in read_folder(pictures)] == [(pictures / "train/red_apple.png", "apple")]


def test_captions_from_text_files(pictures):
    for path in list(pictures.iterdir()):
        path.with_suffix(".txt").write_text(f"{path.stem}, painted\n", encoding="utf-8")
    assert captions(pictures)["a cat-1.png"] == "a cat-1, painted"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0001.png": b"copy", "12.png": b"copy"}, r"captions are missing for 0001\.png, 12\.png: .*metadata\.jsonl"),
        ({"red_apple.txt": b"x"}, r"captions are missing for a cat-1\.png, a cat-2\.png"),
        ({"metadata.jsonl": b'{"file_name": "red_apple.png", "text": "x"}'}, "captions are missing for a cat-1"),
        ({"metadata.jsonl": b'{"file_name": "red_apple.png", "caption": "x"}'}, r"line 1.*it has \['caption', 'file"),
        ({"metadata.jsonl": b"[1]"}, "line 1: expected file_name and text"),
        ({"metadata.jsonl": b"{"}, "line 1 is not JSON"),
        ({"metadata.csv": b"name,text\na,b"}, "line 2: expected file_name and text"),
        ({"metadata.csv": b"file_name,text\nred_apple.png"}, "line 2: expected file_name and text"),
        ({"metadata.csv": b"\xff\xfe"}, "is not text in UTF-8"),
        ({"broken.png": b"\x89PNG", "worse.jpg": b""}, r"2 pictures cannot be used: .*broken\.png.*worse\.jpg"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(pictures, files, message):
    for name, content in files.items():
        data = (pictures / "red_apple.png").read_bytes() if content == b"copy" else content
        (pictures / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_folder(pictures)


def test_no_folder_no_pictures_no_such_picture(pictures, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder with pictures"):
        read_folder(tmp_path / "none")
    with pytest.raises(NotADirectoryError, match="expected a folder with pictures"):
        read_folder(pictures / "red_apple.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.md").write_text("no picture")
    with pytest.raises(ValueError, match=r"empty has no pictures; expected files that end in \.png"):
        read_folder(tmp_path / "empty")
    (pictures / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}')
    with pytest.raises(FileNotFoundError, match=r"line 1: .*gone\.png does not exist"):
        read_folder(pictures)


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.sampled_from([8, 16, 40]), st.floats(-1, 1))
def test_fitted_is_square_and_keeps_the_middle(height, width, size, value):
    pixels = torch.full((1, 3, height, width), value)
    out = fitted(pixels, size)
    assert out.shape == (1, 3, size, size)
    torch.testing.assert_close(out, torch.full_like(out, value), atol=1e-5, rtol=0)
    # A picture that is mirrored alike stays so: what is cut off is the same on both sides (up to the odd pixel).
    ramp = torch.linspace(-1, 1, width).abs().expand(1, 3, height, width)
    out = fitted(ramp, size)
    torch.testing.assert_close(out, out.flip(-1), atol=4 / size, rtol=0)


def test_latents_are_what_the_vae_says(pipe, pictures):
    examples = read_folder(pictures)
    latents = encode_pictures(pipe.vae, examples, 64, flip=True, guides=2, seed=1)
    assert latents.mean.shape == (3, 2, 3, 4, 8, 8)
    for n, example in enumerate(examples):
        pixels = fitted(read_images(open_image(example.path), 4).pixels, 64)
        for version, seen in enumerate((pixels, pixels.flip(-1))):
            with torch.no_grad():
                says = pipe.vae.encode(seen).latent_dist
            factor = pipe.vae.config.scaling_factor
            torch.testing.assert_close(latents.mean[n, version, 0], says.mean[0] * factor, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(latents.std[n, version, 0], says.std[0] * factor, atol=1e-5, rtol=1e-4)
    at = [torch.full((400,), n) for n in (1, 0, 2)]
    drawn = latents.draw(*at, torch.Generator().manual_seed(0))
    error = (drawn.mean(0) - latents.mean[1, 0, 2]) / latents.std[1, 0, 2] * 20  # normal with deviation 1
    assert error.abs().max() < 5
    assert (drawn.std(0) / latents.std[1, 0, 2] - 1).abs().max() < 0.2
    unguided = encode_pictures(pipe.vae, examples, 64, flip=True)
    torch.testing.assert_close(unguided.mean[:, :, 0], latents.mean[:, :, 0], atol=1e-5, rtol=1e-4)


def test_guides_keep_white_and_range_and_change_the_rest():
    changes = []
    for seed in range(100):
        pixels = read_images(picture(40, 33, seed=seed), 4).pixels
        pixels[..., :20] = 1
        seen = guide(pixels, torch.Generator().manual_seed(seed))
        assert seen.shape == pixels.shape and seen.abs().max() <= 1
        torch.testing.assert_close(seen[..., :14], torch.ones_like(seen[..., :14]))
        changes.append((seen - pixels).abs().mean().item())
    assert sum(change > 0.01 for change in changes) > 90  # now and then it is drawn to be nearly the picture
