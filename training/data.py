"""Emoji in four styles, from the npm registry, as one array of 256x256 RGBA pictures and a list of what they show.

    python training/data.py

writes `images.npy` (N, 256, 256, 4), uint8, and `items.json` into the work folder (see paths.py).
"""

import io
import json
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from paths import work_folder, write_json

SIZE = 256
HOLD_OUT_EVERY = 40  # every 40th emoji, in all its styles, is kept from the VAE to measure it
NAMES = "emojibase-data@17.0.0"
STYLES = {  # the word for a prompt -> the package
    "3d": "@lobehub/fluent-emoji-3d@1.1.0",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
}
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
SKIPPED_GROUPS = {"component", "flags"}
COLOURS = {  # a few points in RGB for each colour word; a pixel takes the word of the nearest point
    "red": [(220, 40, 50), (170, 25, 40), (248, 80, 85)],
    "orange": [(245, 145, 30), (255, 110, 30), (250, 170, 80)],
    "yellow": [(255, 205, 50), (255, 230, 110), (240, 190, 30)],
    "green": [(60, 160, 60), (120, 200, 80), (20, 100, 50), (160, 215, 130)],
    "blue": [(50, 120, 210), (90, 180, 240), (30, 60, 140), (160, 210, 245)],
    "purple": [(140, 80, 190), (90, 50, 130), (185, 145, 225)],
    "pink": [(240, 110, 170), (250, 170, 200), (215, 60, 130)],
    "brown": [(130, 80, 45), (90, 55, 40), (175, 120, 75)],
    "black": [(20, 20, 20), (45, 45, 50)],
    "gray": [(130, 135, 140), (90, 95, 100), (170, 175, 180)],
    "white": [(250, 250, 250), (225, 228, 232)],
}


@dataclass
class Item:
    """What one picture shows."""

    name: str
    style: str
    code: str
    group: str
    tags: list[str]
    colours: list[str]
    held_out: bool


def normal_code(code: str) -> str:
    """A code point sequence without variation selectors and leading zeros, as all the packages can agree on it."""
    parts = [part.lstrip("0") for part in code.lower().split("-")]
    return "-".join(part for part in parts if part != "fe0f")


def unpacked(package: str) -> Path:
    """The folder of an npm package, downloaded with `npm pack` when it isn't here yet."""
    root = work_folder()
    stem = package.removeprefix("@").replace("/", "-")
    name, version = stem.rsplit("@", 1)
    folder = root / "packages" / f"{name}-{version}"
    if folder.exists():
        return folder
    (root / "npm").mkdir(exist_ok=True)
    archive = root / "npm" / f"{name}-{version}.tgz"
    if not archive.exists():
        subprocess.run(["npm", "pack", "--silent", package], cwd=root / "npm", check=True)
    part = folder.with_name(folder.name + ".part")
    with tarfile.open(archive) as tar:
        tar.extractall(part, filter="data")
    (part / "package").rename(folder)
    part.rmdir()
    return folder


def read_names() -> dict[str, dict]:
    """code -> emojibase's entry, with the group as a key in words; no flags, skin tones or bare components."""
    folder = unpacked(NAMES) / "en"
    groups = {g["order"]: g["key"] for g in json.loads((folder / "messages.json").read_text("utf-8"))["groups"]}
    entries = {}
    for entry in json.loads((folder / "data.json").read_text("utf-8")):
        group = groups.get(entry.get("group"))
        if group is not None and group not in SKIPPED_GROUPS:
            entries[normal_code(entry["hexcode"])] = {**entry, "group": group}
    return entries


def read_webp(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    for path in sorted((folder / "assets").glob("*.webp")):
        yield normal_code(path.stem), Image.open(path).convert("RGBA")


def read_iconify(folder: Path) -> Iterator[tuple[str, Image.Image]]:
    import resvg_py

    sheet = json.loads((folder / "icons.json").read_text("utf-8"))
    for code, name in sorted(json.loads((folder / "chars.json").read_text("utf-8")).items()):
        icon = sheet["icons"].get(name)
        if icon is None or SKIN_TONES & set(code.split("-")):
            continue
        width, height = (icon.get(side, sheet.get(side, 16)) for side in ("width", "height"))
        left, top = icon.get("left", 0), icon.get("top", 0)
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{2 * SIZE}" height="{2 * SIZE}">{icon["body"]}</svg>'
        )
        png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
        yield normal_code(code), Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def colour_words(picture: np.ndarray) -> list[str]:
    """Up to three colour words that cover at least a sixth of the opaque pixels each, the largest first."""
    points = np.array([point for points in COLOURS.values() for point in points], dtype=np.float32)
    words = [word for word, points in COLOURS.items() for _ in points]
    opaque = picture[picture[..., 3] > 128][:, :3].astype(np.float32)
    if len(opaque) == 0:
        return []
    nearest = ((opaque[:, None] - points) ** 2).sum(-1).argmin(1)
    share: dict[str, float] = {}
    for index, count in zip(*np.unique(nearest, return_counts=True), strict=True):
        share[words[index]] = share.get(words[index], 0.0) + count / len(opaque)
    return [word for word, part in sorted(share.items(), key=lambda pair: -pair[1]) if part > 1 / 6][:3]


def build() -> None:
    names = read_names()
    held_out = set(sorted(names)[::HOLD_OUT_EVERY])
    pictures, items = [], []
    for style, package in STYLES.items():
        folder = unpacked(package)
        seen: set[str] = set()
        for code, picture in (read_webp if style == "3d" else read_iconify)(folder):
            entry = names.get(code)
            if entry is None or code in seen:
                continue
            seen.add(code)
            array = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS))
            pictures.append(array)
            items.append(
                Item(
                    name=entry["label"].lower(),
                    style=style,
                    code=code,
                    group=entry["group"],
                    tags=[tag.lower() for tag in entry.get("tags", [])],
                    colours=colour_words(array),
                    held_out=code in held_out,
                )
            )
        print(f"{style}: {len(seen)} pictures", flush=True)
    np.save(work_folder() / "images.npy", np.stack(pictures))
    write_json([asdict(item) for item in items], work_folder() / "items.json")
    print(
        f"{len(items)} pictures, {len({item.name for item in items})} names, "
        f"{sum(item.held_out for item in items)} held out for the VAE"
    )


@cache
def load() -> tuple[np.ndarray, list[Item]]:
    """The pictures (N, 256, 256, 4), memory-mapped, and their items; made first when they are missing."""
    if not (work_folder() / "items.json").exists():
        build()
    items = [Item(**item) for item in json.loads((work_folder() / "items.json").read_text("utf-8"))]
    return np.load(work_folder() / "images.npy", mmap_mode="r"), items


def on_ground(rgba: np.ndarray, colour: np.ndarray | float = 1.0) -> np.ndarray:
    """Pictures (..., 4), uint8, over a flat colour in [0, 1], white if not given; float32 in [0, 1]."""
    rgba = rgba.astype(np.float32) / 255
    alpha = rgba[..., 3:]
    return rgba[..., :3] * alpha + np.float32(colour) * (1 - alpha)


if __name__ == "__main__":
    build()
