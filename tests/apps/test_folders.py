"""Captions by every way of writing them, pictures of every size, and what is refused."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import picture
from sdedit.apps.folders import caption_from_name, fitted, read_folder


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
        ("00000", ""),
        ("00000-1234567", ""),
        ("cat 01", "cat"),
        ("cat 01 (2)", "cat"),
        ("cat01", "cat"),
        ("0001_red_apple", "red apple"),
        ("101 dalmatians", "101 dalmatians"),
        ("R2D2", "R2D2"),
        ("IMG 2023", ""),
        ("IMG_20230101_123456", ""),
        ("DSC00012", ""),
        ("P1000123", ""),
        ("image (3)", ""),
        ("WhatsApp Image 2023-01-01 at 12.00.00", ""),
        ("image of a cat", "image of a cat"),
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


def test_lines_inside_a_caption_are_no_lines_of_the_file(pictures):
    names = sorted(path.name for path in pictures.iterdir())
    text = "an apple,\npainted\u2028twice\x85"
    rows = [json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name in names]
    (pictures / "metadata.jsonl").write_text("\r\n".join(rows), encoding="utf-8", newline="")
    assert set(captions(pictures).values()) == {"an apple, painted twice"}
    (pictures / "metadata.jsonl").unlink()
    with (pictures / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "text"), *((name, text) for name in names)])
    assert set(captions(pictures).values()) == {"an apple, painted twice"}


@pytest.mark.parametrize("name", ["{stem}.caption", "{stem}.txt", "{stem}.png.txt", "{stem}.png.caption"])
def test_captions_from_text_files_of_every_name(pictures, name):
    for path in list(pictures.glob("*.png")):
        path.with_name(name.format(stem=path.stem)).write_text(f"{path.stem},\npainted\n", encoding="utf-8")
    assert captions(pictures)["a cat-1.png"] == "a cat-1, painted"


def test_a_caption_file_goes_before_a_text_file(pictures):
    for path in list(pictures.glob("*.png")):
        path.with_suffix(".txt").write_text("notes")
        path.with_suffix(".caption").write_text("caption")
    assert set(captions(pictures).values()) == {"caption"}


def test_folders_with_counts(tmp_path):
    for inner, stem in (("10_red apple", "0001"), ("10_red apple", "b"), ("4_cat", "c"), ("notes", "d")):
        (tmp_path / inner).mkdir(exist_ok=True)
        picture(40, 40).save(tmp_path / inner / f"{stem}.png")
    (tmp_path / "10_red apple" / "b.txt").write_text("two apples")
    found = Counter((example.path.stem, example.caption) for example in read_folder(tmp_path))
    assert found == {("0001", "red apple"): 5, ("b", "two apples"): 5, ("c", "cat"): 2}
    assert {example.caption for example in read_folder(tmp_path, "ink")} == {"ink"}


def test_hidden_files_are_no_pictures(pictures):
    before = captions(pictures)
    for name in ("._red_apple.png", ".0123456789abcdef0123456789abcdef.png"):
        (pictures / name).write_bytes(b"left by a kill")
    assert captions(pictures) == before


def test_every_suffix_of_jpeg_is_read_and_others_are_named(pictures):
    picture(40, 40).save(pictures / "dog.jfif", format="JPEG")
    (pictures / "bird.HEIC").write_bytes(b"not read here")
    with pytest.warns(UserWarning, match=r"bird\.HEIC cannot be read and will be left out"):
        assert captions(pictures)["dog.jfif"] == "dog"


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
