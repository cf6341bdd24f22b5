"""Model folders, on disk or on the hub: which files there are. Nothing here needs a framework."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sdedit.files import read_json, refuse_lfs_pointer
from sdedit.loading.layout import choose_weights, weight_files
from sdedit.loading.sources import check_hub_arguments

DEFAULT_MODEL = Path(__file__).parent.parent / "default_model"

# The components of a Stable Diffusion 1.x or 2.x folder.
COMPONENTS = (
    "vae",
    "text_encoder",
    "tokenizer",
    "unet",
    "scheduler",
    "safety_checker",
    "feature_extractor",
    "image_encoder",
)

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")

# Settings and vocabularies: everything but the weights.
_SMALL_FILES = ("*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.model")


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
    """
    check_hub_arguments("from_pretrained", hub)
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    if Path(path_or_id).is_file():
        raise ValueError(f"{path_or_id} is a file; expected a model folder with model_index.json")
    text = str(path_or_id)
    if text.count("/") != 1 or text.startswith((".", "/", "~")) or text.endswith("/"):
        raise FileNotFoundError(f"{text} is no folder here, nor a model id such as 'owner/name'")
    from huggingface_hub import model_info, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE

    cached = _cached_folder(text, components, hub)
    if hub.get("local_files_only") or HF_HUB_OFFLINE:
        if cached is None:
            raise FileNotFoundError(f"{text} is no folder here, nor in the hub's cache, and downloading is turned off")
        return cached
    try:
        # Not list_repo_files, which tries for half a minute where there is no network.
        info = model_info(text, revision=hub.get("revision"), token=hub.get("token"), timeout=10)
        names = [file.rfilename for file in info.siblings or ()]
        cached = None  # the hub answers: nothing old in place of what it has
        patterns = [*_SMALL_FILES, *_wanted_weights(names, components, variant, use_safetensors)]
        return Path(snapshot_download(text, allow_patterns=patterns, **hub))
    except Exception as error:
        # Its errors have many classes in many libraries; the model's absence is all that they can mean here.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if cached is not None and not hub.get("force_download"):
            warnings.warn(f"{text}: taken from the cache, for the hub does not answer ({reason})", stacklevel=5)
            return cached
        raise FileNotFoundError(
            f"{text} is no folder here, and could not be had from the hub ({reason}): "
            "check the name and the network, or give a folder"
        ) from error


def _cached_folder(model_id: str, components: Iterable[str] | None, hub: Mapping[str, Any]) -> Path | None:
    """The folder of a model in the hub's cache, which may hold only some of its files."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", *(f"{part}/config.json".lstrip("/") for part in components or ())):
        found = try_to_load_from_cache(model_id, name, cache_dir=hub.get("cache_dir"), revision=hub.get("revision"))
        if isinstance(found, str):
            return Path(found).parents[name.count("/")]
    return None


def _wanted_weights(
    names: list[str], components: Iterable[str] | None, variant: str | None, use_safetensors: bool | None
) -> list[str]:
    """Patterns for the weights of each folder of a repository; shards are matched by their stem."""
    wanted = []
    folders = {name.rpartition("/")[0] for name in names}
    for folder in folders if components is None else folders & set(components):
        inside = [name[len(folder) + 1 if folder else 0 :] for name in names if name.rpartition("/")[0] == folder]
        chosen = choose_weights(inside, _STEMS, variant, use_safetensors)
        chosen = chosen or choose_weights(inside, _STEMS, None, use_safetensors)
        chosen = chosen or next((name for name in inside if name.endswith(".msgpack")), None)  # Flax's alone
        if chosen is not None:
            prefix = f"{folder}/" if folder else ""
            wanted.append(f"{prefix}{chosen}")
            if chosen.endswith(".json"):
                stem, suffix = chosen.split(".")[0], "safetensors" if ".safetensors" in chosen else "bin"
                wanted.append(f"{prefix}{stem}*-of-*.{suffix}")
    return wanted


def weights_in(folder: Path, variant: str | None, use_safetensors: bool | None) -> list[Path]:
    """The weight files of one component's folder.

    Raises:
        FileNotFoundError: There is none of that variant and kind; the message lists what there is.
    """
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    chosen = choose_weights(names, _STEMS, variant, use_safetensors)
    if chosen is None:
        kind = {True: "safetensors", False: ".bin", None: "safetensors or .bin"}[use_safetensors]
        asked = f" of variant {variant!r}" if variant else ""
        there = ", ".join(names) or "nothing"
        raise FileNotFoundError(f"{folder} has no weights ({kind}){asked}; it has {there}")
    return weight_files(folder / chosen)


def has_variant(folder: Path, variant: str, use_safetensors: bool | None) -> bool:
    """Has this folder weights of that variant?"""
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return choose_weights(names, _STEMS, variant, use_safetensors) is not None


def listed_components(index: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The components that a model_index.json lists, with the names of their classes; those that are absent left out.

    Raises:
        ValueError: It is not one of Stable Diffusion 1.x or 2.x.
    """
    listed = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    for name, entry in listed.items():
        if len(entry) != 2 or not all(part is None or isinstance(part, str) for part in entry):
            raise ValueError(f"{folder / 'model_index.json'}: {name} is {entry!r}; expected [library, class]")
    if unknown := sorted(set(listed) - set(COMPONENTS)):
        raise ValueError(
            f"{folder} holds a {index.get('_class_name')}, with {', '.join(unknown)}; "
            f"expected Stable Diffusion 1.x or 2.x, made of {', '.join(COMPONENTS)}"
        )
    return {name: entry[1] for name, entry in listed.items() if entry[1] is not None}


@contextlib.contextmanager
def explained(config: Path, cls: Any) -> Iterator[None]:
    """Errors that a config causes inside a constructor, of whatever class, get the file's name."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{config} describes no {cls.__name__} that can be made: {error}") from error


def transformers_class(name: str, class_name: str) -> Any:
    """The class of transformers that model_index.json names for a component."""
    import transformers

    # The class that 2022's folders name has gone from transformers.
    class_name = {"CLIPFeatureExtractor": "CLIPImageProcessor"}.get(class_name, class_name)
    if class_name == "CLIPImageProcessor" and hasattr(transformers, "CLIPImageProcessorPil"):
        class_name = "CLIPImageProcessorPil"  # what the other becomes, with a message, where torchvision is absent
    cls = getattr(transformers, class_name, None) if class_name.startswith("CLIP") else None
    if cls is None:
        raise ValueError(f"{name}: {class_name} is not a part of Stable Diffusion 1.x or 2.x; expected a CLIP class")
    return cls


def load_processor(cls: Any, folder: Path) -> Any:
    """A tokenizer or image processor, by transformers' own reader, whose errors get the folder's name."""
    for file in sorted(folder.glob("*.json")):
        read_json(file)
    for file in sorted(folder.glob("*.txt")):
        refuse_lfs_pointer(file)
    there = ", ".join(sorted(p.name for p in folder.iterdir()))
    vocabularies = ({"tokenizer.json"}, {"vocab.json", "merges.txt"})  # without one, transformers makes an empty one
    if "Tokenizer" in cls.__name__ and not any(all((folder / f).is_file() for f in v) for v in vocabularies):
        raise FileNotFoundError(
            f"{folder} has no vocabulary (tokenizer.json, or vocab.json and merges.txt), but {there}"
        )
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # Missing and damaged vocabularies end in many classes of error inside its Rust half.
        raise ValueError(f"{folder} is not a {cls.__name__} ({error}); it has {there}: download it again") from error


def cached_models() -> list[tuple[str, Path]]:
    """Id and folder of each Stable Diffusion model in the hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    folders = [(repo.repo_id, rev.snapshot_path) for repo in repos for rev in repo.revisions]
    return sorted((name, path) for name, path in folders if (path / "model_index.json").is_file())
