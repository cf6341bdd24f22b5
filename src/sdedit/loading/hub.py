"""The hub: what is an id or an address there, what is downloaded, and what is said where nothing can be had.

Folders and files on this machine come first, everywhere; then ids such as "owner/name", whose files may be in the
hub's cache already.
"""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from sdedit.files import is_disk_full
from sdedit.loading.folders import wanted_files

HUB_ARGUMENTS = frozenset({"revision", "cache_dir", "local_files_only", "token", "force_download"})

_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_URL = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve|raw)/([^/]+)/([^?#]+)")


class Address(NamedTuple):
    """One file on the hub; `revision` is `None` where the address names none."""

    repo: str
    name: str
    revision: str | None


def check_hub_arguments(caller: str, hub: Collection[str]) -> None:
    """Refuse, as Python does, arguments that neither `caller` nor the hub has."""
    if wrong := sorted(set(hub) - HUB_ARGUMENTS):
        raise TypeError(f"{caller} has no argument {', '.join(wrong)}")


def is_hub_id(text: str) -> bool:
    """Is this such as "owner/name", and not a path to a file of weights?"""
    return _ID.fullmatch(text) is not None and not text.endswith(_SUFFIXES)


def address_of(text: str) -> Address | None:
    """What `https://huggingface.co/OWNER/NAME/blob/REVISION/FILE` (or `resolve`), or `OWNER/NAME/FILE`, points at."""
    if found := _URL.fullmatch(text.partition("?")[0]):
        return Address(found[1], unquote(found[3]), unquote(found[2]))
    repo, name = "/".join(text.split("/")[:2]), "/".join(text.split("/")[2:])
    return Address(repo, name, None) if _ID.fullmatch(repo) and name.endswith(_SUFFIXES) else None


def find_file(
    source: str | os.PathLike[str], names: Sequence[str] = (), *, subfolder: str | None = None, **hub: Any
) -> Path:
    """The file that `source` is, here or on the hub, or that a folder or repository has under the first of `names`.

    Args:
        source: A file, a folder, a hub id such as `"sd-concepts-library/cat-toy"`, or a file's address on the hub.
        names: File names to look for in a folder or repository, in order of preference; none: it must be a file.
        subfolder: Folder inside the folder or repository.
        **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`.

    Raises:
        FileNotFoundError: It is none of these, or holds none of the names, or the hub is out of reach.
        ValueError: It is a folder, and there are no `names`.
    """
    check_hub_arguments("the loader", hub)
    path, text = Path(source), str(source)
    if path.is_file():
        return path
    if path.is_dir():
        return _file_in(path / subfolder if subfolder else path, names)
    if (at := address_of(text)) is not None:
        return _download(text, at.repo, [at.name], hub | {"revision": hub.get("revision") or at.revision})
    if not names:
        raise FileNotFoundError(f"{text} is no file here, nor the address of one on huggingface.co")
    if not is_hub_id(text):
        raise FileNotFoundError(f"{text} is no file or folder here, nor a hub id such as 'owner/name'")
    return _download(text, text, [f"{subfolder}/{name}" if subfolder else name for name in names], hub)


def _file_in(folder: Path, names: Sequence[str]) -> Path:
    if not names:
        raise ValueError(f"{folder} is a folder; expected a file (for folders there is from_pretrained)")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = sorted(p.name for p in folder.iterdir())[:20] if folder.is_dir() else []
    raise FileNotFoundError(f"{folder} has no {' or '.join(names)}; it has {', '.join(there) or 'nothing'}")


def _download(text: str, repo: str, names: Sequence[str], hub: dict[str, Any]) -> Path:
    """The first of `names` that a repository has."""
    from huggingface_hub import hf_hub_download

    reason: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repo, name, **hub))
        except Exception as error:
            reason = error
            if is_disk_full(error):
                break
    raise _out_of_reach(text, reason, names) from reason


def find_folder(
    path_or_id: str | os.PathLike[str],
    *,
    components: Iterable[str] | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> Path:
    """The folder of a model: `path_or_id` itself if it is one, else what the hub has or its cache holds.

    Args:
        path_or_id: A folder, or a model id such as `"stable-diffusion-v1-5/stable-diffusion-v1-5"`.
        components: Subfolders whose weights are wanted; all of them if `None`.
        variant, use_safetensors: Which weights to download, see `choose_weights`.
        **hub: `revision`, `cache_dir`, `local_files_only`, `token`, `force_download`.

    Raises:
        FileNotFoundError: It is neither a folder nor a model id, or the hub does not have it, or is out of reach.
        ValueError: It is a file.
    """
    check_hub_arguments("from_pretrained", hub)
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    if Path(path_or_id).is_file():
        raise ValueError(f"{path_or_id} is a file; expected a model folder with model_index.json")
    if not is_hub_id(str(path_or_id)):
        raise FileNotFoundError(f"{path_or_id} is no folder here, nor a model id such as 'owner/name'")
    return find_repository(
        str(path_or_id), lambda names: wanted_files(names, components, variant, use_safetensors), **hub
    )


def find_repository(repo: str, choose: Callable[[list[str]], list[str]], **hub: Any) -> Path:
    """The folder on this machine with the files of a hub id that are wanted, downloaded unless the cache has them.

    Args:
        choose: From the names of all files to those, or patterns of those, that are wanted.
        **hub: As in `find_folder`.

    Raises:
        FileNotFoundError: The hub does not have it, or is out of reach, and the cache has nothing of it.
    """
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if hub.get("local_files_only") or HF_HUB_OFFLINE:
        if (cached := _cached_folder(repo, hub)) is None:
            raise FileNotFoundError(
                f"{repo} is no folder here, and could not be had from the hub's cache; downloading is turned off"
            )
        return cached
    try:
        # Not list_repo_files, which tries for half a minute where there is no network.
        info = model_info(repo, revision=hub.get("revision"), token=hub.get("token"), timeout=10)
    except Exception as error:
        cached = None if hub.get("force_download") else _cached_folder(repo, hub)
        if cached is None:
            raise _out_of_reach(repo, error) from error
        reason = _told(error)
        warnings.warn(f"{repo}: taken from the cache, for the hub does not answer ({reason})", stacklevel=5)
        return cached
    patterns = choose([file.rfilename for file in info.siblings or ()])
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns, **hub))
    except Exception as error:
        raise _out_of_reach(repo, error) from error


def _cached_folder(repo: str, hub: dict[str, Any]) -> Path | None:
    """The folder of a repository in the hub's cache, which may hold only some of its files.

    The hub's own function gives none that is not complete; a load says better what is missing of its files.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    root = Path(hub.get("cache_dir") or HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    revision = hub.get("revision") or "main"
    ref = root / "refs" / revision
    folder = root / "snapshots" / (ref.read_text().strip() if ref.is_file() else revision)
    return folder if folder.is_dir() else None


def _out_of_reach(text: str, error: Exception | None, names: Sequence[str] = ()) -> OSError:
    """What is said of anything that downloading raises: errors of many classes in many libraries, all meaning this."""
    if error is not None and is_disk_full(error):
        return OSError(errno.ENOSPC, f"{text} could not be downloaded, for the disk is full: free some room")
    what = f"{' or '.join(names)} " if len(names) > 1 else ""
    return FileNotFoundError(
        f"{text} is no file or folder here, and {what}could not be had from the hub ({_told(error)}): "
        "check the name and the network, or give what is on this machine"
    )


def _told(error: Exception | None) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def cached_models() -> list[tuple[str, Path]]:
    """Id and folder of each Stable Diffusion model in the hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    folders = [(repo.repo_id, rev.snapshot_path) for repo in repos for rev in repo.revisions]
    return sorted((name, path) for name, path in folders if (path / "model_index.json").is_file())
