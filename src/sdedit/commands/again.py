"""`sdedit again`: a picture made anew from the settings in it, which may be another tool's, and may be anybody's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from sdedit.commands.drawing import check, make_pictures, open_guide
from sdedit.commands.foreign import scheduler_of
from sdedit.commands.metadata import read_settings
from sdedit.commands.options import Place, command
from sdedit.commands.saving import check_output, say
from sdedit.commands.settings import FILES, LoraWeight, PictureSettings, beside

_SUFFIXES = ("", ".safetensors", ".ckpt", ".pt", ".bin")


@command(changes=PictureSettings, without=("size",))
def again(
    picture: Annotated[Path, typer.Argument(help="A PNG that sdedit, or AUTOMATIC1111's web UI or its kin, wrote.")],
    place: Place,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where the picture goes; PICTURE-again.png if not given.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WxH, original or auto, if not that of PICTURE.")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Do not ask before files elsewhere are opened or models downloaded.")
    ] = False,
    **changes: Any,
) -> None:
    """Read the settings of PICTURE and make the same picture again; or another, where an option says so."""
    settings = read_settings(picture)
    output = output or picture.with_name(f"{picture.stem}-again{picture.suffix}")
    check_output(output)
    if settings.scheduler is None and settings.sampler is not None and "scheduler" not in changes:
        settings.scheduler = scheduler_of(settings)
    kept = {f"{name}_hash": getattr(settings, f"{name}_hash") for name in FILES}
    theirs = _Files(picture)
    settings = replace(theirs.found(settings, changes), **changes)
    place.size = size or (f"{settings.size[0]}x{settings.size[1]}" if settings.size else "auto")
    check(settings, place, output)
    if settings.image in (None, "-"):
        known = "was made from what came through the standard input" if settings.image else "does not say from what"
        raise ValueError(f"{picture} {known}: give the image with --image")
    if settings.unused:
        say(f"not used: {', '.join(settings.unused)}")
    theirs.ask(trust)
    guide = open_guide(settings.image, place)
    settings.hash_files()
    for name in FILES:
        if kept[f"{name}_hash"] not in (None, getattr(settings, f"{name}_hash")) and getattr(settings, name):
            path = getattr(settings, name)
            say(f"warning: {path} is not the file that {picture} was made with (its hash differs)")
    make_pictures(settings, guide, output, 1, place)


@dataclass
class _Files:
    """The files that a picture's settings name.

    Attributes:
        opened: What will be opened here.
        elsewhere: What of it is outside the picture's folder.
        downloaded: Hub ids and addresses.
    """

    picture: Path

    def __post_init__(self) -> None:
        self.opened: list[str] = []
        self.elsewhere: list[str] = []
        self.downloaded: list[str] = []

    def found(self, settings: PictureSettings, changes: dict[str, Any]) -> PictureSettings:
        """Settings with paths as seen from here; what `changes` gives is not looked for.

        Raises:
            FileNotFoundError: Another tool names a model or LoRA that is not beside the picture.
        """
        own = (settings.version or "").startswith("sdedit")
        named = self._there if own else self._beside
        files: dict[str, Any] = {}
        for name in FILES:
            if name not in changes and (path := getattr(settings, name)) is not None:
                files[name] = None if path == "-" else self._note(str(beside(self.picture, path)))
        if "model" not in changes and settings.model != "default":
            files["model"] = named(settings.model, "model", "its file with --model")
        if "embeddings" not in changes:
            files["embeddings"] = [self._there(name) for name in settings.embeddings]
        if "lora" not in changes:
            tell = "--lora FILE:{:g}, or --lora '' to draw without"
            files["lora"] = [LoraWeight(named(n, "LoRA", tell.format(w)), w) for n, w in settings.lora]
        return replace(settings, **files)

    def _there(self, name: str, *_: str) -> str:
        """A file of ours: relative to the picture if it is there, else as it is (a hub id, say)."""
        path = beside(self.picture, name)
        return self._note(str(path) if path.exists() else name)

    def _beside(self, name: str, what: str, give: str) -> str:
        """A file that another tool knows by its name alone, in the picture's folder or one in it."""
        folder = self.picture.absolute().parent
        for place in (".", f"{what}s", what, "models", f"models/{what}", "loras"):
            for suffix in _SUFFIXES:
                path = beside(self.picture, f"{place.lower()}/{name}{suffix}")
                if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
                    return self._note(str(path))
        raise FileNotFoundError(
            f"{self.picture} was made with the {what} {name!r}, which is not beside it; give {give}"
        )

    def _note(self, name: str) -> str:
        folder = self.picture.absolute().parent
        if not Path(name).exists() and (name.startswith("https://") or (name.count("/") == 1 and name[0] not in "./~")):
            self.downloaded.append(name)
        else:
            self.opened.append(name)
            if not Path(name).resolve().is_relative_to(folder.resolve()):
                self.elsewhere.append(name)
        return name

    def ask(self, trust: bool, confirm: Callable[..., bool] = typer.confirm) -> None:
        """Say what will be opened and downloaded; ask about what is outside the picture's folder.

        Raises:
            ValueError: The answer is no, or nobody is there to answer.
        """
        if self.opened:
            say(f"opens {', '.join(self.opened)}")
        for download in self.downloaded:
            say(f"downloads {download}, unless it is in the hub's cache")
        if trust or not self.elsewhere + self.downloaded:
            return
        what = f"{self.picture} wants what is not beside it: {', '.join(self.elsewhere + self.downloaded)}"
        try:
            if confirm(f"{what}. Go on?", err=True):
                return
        except typer.Abort:
            pass
        raise ValueError(f"{what}; expected a yes, or --trust")
