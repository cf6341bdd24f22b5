"""Where one file of weights is: given itself, in a folder, or on the hub."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

HUB_ARGUMENTS = frozenset({"revision", "cache_dir", "local_files_only", "token", "force_download"})


def check_hub_arguments(caller: str, hub: Collection[str]) -> None:
    """Refuse, as Python does, arguments that neither `caller` nor the hub has."""
    if wrong := sorted(set(hub) - HUB_ARGUMENTS):
        raise TypeError(f"{caller} has no argument {', '.join(wrong)}")


def find_file(
    source: str | os.PathLike[str], names: Sequence[str], *, subfolder: str | None = None, **hub: Any
) -> Path:
    """The file that `source` is, or that a folder or hub repository holds under the first of `names` that it has.

    Args:
        source: A file, a folder, or a hub id such as `"sd-concepts-library/cat-toy"`.
        names: File names to look for, in order of preference.
        subfolder: Folder inside the folder or repository.
        **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`.

    Raises:
        FileNotFoundError: It is none of these, or holds none of the names, or the hub is out of reach.
    """
    check_hub_arguments("the loader", hub)
    path, text = Path(source), str(source)
    if path.is_file():
        return path
    if path.is_dir():
        folder = path / subfolder if subfolder else path
        for name in names:
            if (folder / name).is_file():
                return folder / name
        there = sorted(p.name for p in folder.iterdir())[:20] if folder.is_dir() else []
        raise FileNotFoundError(f"{folder} has no {' or '.join(names)}; it has {', '.join(there) or 'nothing'}")
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or text.endswith("/"):
        raise FileNotFoundError(f"{text} is no file or folder here, nor a hub id such as 'owner/name'")
    return _download(text, names, subfolder, hub)


def _download(repository: str, names: Sequence[str], subfolder: str | None, hub: dict[str, Any]) -> Path:
    from huggingface_hub import hf_hub_download

    reason: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, subfolder=subfolder, **hub))
        except Exception as error:  # of many classes in many libraries; all mean that the file cannot be had
            reason = error
    raise FileNotFoundError(
        f"{repository} is no file or folder here, and {' or '.join(names)} could not be had from the hub "
        f"({type(reason).__name__}: {' '.join(str(reason).split())[:300]}): check the name and the network"
    ) from reason
