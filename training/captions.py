"""What the UNet learns to draw, which pictures it never sees, and the words for each picture."""

import zlib
from functools import cache

import numpy as np

from data import Item
from paths import HERE

UNSEEN_STYLE = "twemoji"


@cache
def things() -> dict[str, list[str]]:
    """things.txt: the names that people draw most, each with the plain words for it."""
    listed = {}
    for line in (HERE / "things.txt").read_text("utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line:
            name, _, words = line.partition(":")
            listed[name.strip("* ")] = [word.strip() for word in words.split(",") if word.strip()]
    return listed


@cache
def starred() -> set[str]:
    """The names in things.txt with a star."""
    lines = (HERE / "things.txt").read_text("utf-8").splitlines()
    return {line.partition(":")[0].strip("* ") for line in lines if line.startswith("*")}


def caption(item: Item, rng: np.random.Generator) -> str:
    """Words for one picture: a name, mostly the style, now and then tags, group and colours. One in ten is empty."""
    if rng.random() < 0.1:
        return ""
    synonyms = things().get(item.name, [])
    name = item.name if not synonyms or rng.random() < 0.4 else str(rng.choice(synonyms))
    words = []
    if item.colours and rng.random() < 0.35:
        main = item.colours[0]
        if rng.random() < 0.6 and main not in name:
            name = f"{main} {name}"
        else:
            words += item.colours[: rng.integers(1, len(item.colours) + 1)]
    if rng.random() < 0.85:
        words.append(item.style)
    if item.tags and rng.random() < 0.25:
        words += list(rng.permutation(item.tags)[: rng.integers(1, 4)])
    if rng.random() < 0.1:
        words.append(item.group.replace("-", " "))
    rng.shuffle(words)
    article = f"a {name}" if rng.random() < 0.15 else name
    if words and rng.random() < 0.15:
        words.append(article)
        return ", ".join(words)
    return ", ".join([article, *words])


def unseen(name: str, style: str) -> bool:
    """Is the picture of this name in this style kept from the UNet's training? Half of the names are, in one style.

    So whether style and thing combine can be measured: such a picture must come from the thing in other styles, and
    from the style of other things.
    """
    return style == UNSEEN_STYLE and zlib.crc32(name.encode()) % 2 == 0


def training_rows(items: list[Item]) -> list[int]:
    """Rows of the pictures that the UNet learns from.

    All but the unseen ones and, unless they are in things.txt, the emoji that are held out.
    """
    kept = [(row, item) for row, item in enumerate(items) if not unseen(item.name, item.style)]
    return [row for row, item in kept if item.name in things() or not item.held_out]
