"""Where pictures go: checked before anything is drawn, and nothing that was drawn is lost; and words to the user."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdedit.commands.metadata import to_text
from sdedit.commands.settings import PictureSettings
from sdedit.files import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

# The longest side that a format holds, where that is less than memory does; Pillow says so only after the drawing.
_LONGEST = {"ICO": 256, "WEBP": 16_383, "GIF": 65_535, "JPEG": 65_500, "TGA": 65_535, "PCX": 65_535, "SGI": 65_535}


def tell(text: object) -> None:
    """Print what is the command's result."""
    print(text)


def say(text: str) -> None:
    """Tell the user what is not the command's result."""
    print(text, file=sys.stderr)


class Unbreakable:
    """A stream of text that may be closed, full or unable to show a letter: then words are lost, and nothing else."""

    def __init__(self, stream: Any) -> None:
        if stream is None:  # closed before we began; the next file that is opened would be taken for it
            stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Likewise."""
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def check_output(output: Path, *, flag: str = "-o", kinds: Sequence[str] = (), count: int = 1) -> None:
    """Refuse a place where no picture can be written, before there is one.

    Args:
        kinds: Suffixes that it may have; those of pictures that Pillow writes and reads back if not given.
        count: Files that are written, see `names`.

    Raises:
        ValueError: It is a folder, its suffix is of no such kind, or its folder is missing or cannot be written to.
    """
    named = f"{flag} {output}"
    expected = f"expected {_example(kinds)}, in a folder that exists"
    if kinds and output.suffix.lower() not in kinds:
        raise ValueError(f"{named}: {expected}")
    if not kinds and not _holds_pictures(output.suffix):
        what = f"pictures of the kind '{output.suffix}' cannot be written" if output.suffix else "it has no suffix"
        raise ValueError(f"{named}: {what}; {expected}")
    folder = output.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"{named}: {folder} is no folder; {expected}")
    try:
        taken = next((path for path in names(output, count) if path.is_dir()), None)  # fails if a name is too long
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{named}: nothing can be written there ({error.strerror or error}); {expected}") from None
    if taken:
        raise ValueError(f"{flag} {taken} is a folder; {expected}")


def _example(kinds: Sequence[str]) -> str:
    return f"a name such as {'table' if '.csv' in kinds else 'file'}{kinds[0]}" if kinds else "a name such as out.png"


def _format(suffix: str) -> str | None:
    from PIL import Image

    return Image.registered_extensions().get(suffix.lower())


def _holds_pictures(suffix: str, mode: str = "RGB") -> bool:
    """Does Pillow write pictures of this suffix, and read them back as they were?"""
    from PIL import Image

    kind, file = _format(suffix), io.BytesIO()
    if kind not in Image.SAVE or kind not in Image.OPEN:
        return False
    try:
        Image.new(mode, (16, 24)).save(file, format=kind)
        with Image.open(io.BytesIO(file.getvalue()), formats=[kind]) as read:
            return read.size == (16, 24) and (mode == "RGB" or read.has_transparency_data)
    except Exception:  # what Pillow's writers raise is of every class
        return False


def check_size(size: tuple[int, int], output: Path) -> None:
    """Refuse a picture that is too large for its format, before it is drawn."""
    longest = _LONGEST.get(_format(output.suffix) or "", max(size))
    if max(size) > longest:
        raise ValueError(
            f"-o {output}: {output.suffix} holds at most {longest} pixels on a side, and the picture will be "
            f"{size[0]}×{size[1]}; expected another format, such as {output.stem}.png, or a smaller --size"
        )


def save_picture(picture: Image, path: str | os.PathLike[str], settings: PictureSettings | None = None) -> None:
    """Write a picture in the format of the name's suffix; a PNG with its settings; on white where a format is opaque.

    Raises:
        ValueError, OSError: It cannot be written there.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    path = Path(path)
    options: dict[str, Any] = {}
    if _format(path.suffix) == "PNG" and settings is not None:
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("parameters", to_text(settings.relative_to(path.absolute().parent)))
    if profile := picture.info.get("icc_profile"):  # some formats leave it out unless told
        options["icc_profile"] = profile
    if picture.mode == "RGBA" and not _holds_pictures(path.suffix, "RGBA"):
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
    with write_atomically(path) as temporary:
        picture.save(temporary, **options)


def surely(write: Callable[[Path], None], path: Path) -> tuple[Path, str | None]:
    """Write what was drawn: there, else as PNG beside it, else where temporary files or the user's own go.

    Returns:
        Where it is, and what went wrong if that is not `path`.

    Raises:
        OSError: It cannot be written anywhere.
    """
    try:
        write(path)
        return path, None
    except Exception as error:  # of the disk or of Pillow; the picture is worth more than its class
        failed = error
    for folder in (path.parent, Path(tempfile.gettempdir()), Path.home(), Path.cwd()):
        with contextlib.suppress(Exception):
            own = Path(tempfile.mkdtemp(prefix="sdedit-", dir=folder))
            saved = own / f"{path.stem}.png"
            try:
                write(saved)
                return saved, f"{path} cannot be written ({failed}); what was drawn is {saved}"
            except Exception:
                own.rmdir()
    raise OSError(f"{path} cannot be written ({failed}), nor could what was drawn be saved elsewhere") from failed


def save_all(pictures: Sequence[Image], seeds: Sequence[int], settings: PictureSettings, output: Path) -> None:
    """Write pictures, each with its seed and settings; then say where they are.

    Raises:
        OSError: Some could not be written where they should be; the message says where they are.
    """
    lines: list[str] = []
    elsewhere: list[str] = []
    for picture, seed, path in zip(pictures, seeds, names(output, len(pictures)), strict=True):
        settings.seed = seed
        saved, problem = surely(partial(save_picture, picture, settings=settings), path)
        elsewhere += [problem] if problem else []
        lines.append(f"{saved}  ({picture.width}×{picture.height}, seed {seed})")
    for line in lines:
        tell(line)
    if elsewhere:
        raise OSError("\n".join(elsewhere))


def names(output: Path, count: int) -> list[Path]:
    """`out.png` for one picture, `out-1.png`, `out-2.png`, … for several."""
    return [output] if count == 1 else [output.with_stem(f"{output.stem}-{i + 1}") for i in range(count)]
