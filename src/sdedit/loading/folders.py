"""Model folders: which files hold the weights, what they are called in older ones. Nothing here needs a framework."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from sdedit.config import FORMAT_VERSION
from sdedit.files import read_json, refuse_lfs_pointer, shown

Expected = Mapping[str, Any]  # what a network has, by name

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

# Where model_index.json says that a component's class is from; all others are from diffusers.
_LIBRARIES = {
    "text_encoder": "transformers",
    "tokenizer": "transformers",
    "feature_extractor": "transformers",
    "image_encoder": "transformers",
    "safety_checker": "stable_diffusion",
}

# Bytes of a file of a tokenizer; CLIP's largest, with every merge on a line of its own, has 3.6 MB.
_MOST_OF_A_VOCABULARY = 6 << 20

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")

# Projections of the VAE's attention in folders that were written before 2023.
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

# Settings and vocabularies: everything but the weights.
_SMALL_FILES = ("*.json", "*.txt", "*/*.json", "*/*.txt", "*/*.model")


def wanted_files(
    names: Collection[str], components: Iterable[str] | None, variant: str | None, use_safetensors: bool | None
) -> list[str]:
    """Patterns for the files of a repository that a load needs: the small ones, and the weights of some components.

    Args:
        names: All files, with their folders.
        components: Subfolders whose weights are wanted; all of them if `None`.
        variant, use_safetensors: See `choose_weights`.
    """
    wanted = list(_SMALL_FILES)
    folders = {name.rpartition("/")[0] for name in names}
    for folder in folders if components is None else folders & set(components):
        inside = [name[len(folder) + 1 if folder else 0 :] for name in names if name.rpartition("/")[0] == folder]
        chosen = choose_weights(inside, _STEMS, variant, use_safetensors)
        chosen = chosen or choose_weights(inside, _STEMS, None, use_safetensors)
        chosen = chosen or next((name for name in inside if name.endswith(".msgpack")), None)  # Flax's alone
        if chosen is not None:
            prefix = f"{folder}/" if folder else ""
            wanted.append(f"{prefix}{chosen}")
            if chosen.endswith(".json"):  # shards are matched by their stem
                stem, suffix = chosen.split(".")[0], "safetensors" if ".safetensors" in chosen else "bin"
                wanted.append(f"{prefix}{stem}*-of-*.{suffix}")
    return wanted


def choose_weights(
    names: Collection[str], stems: Collection[str], variant: str | None = None, use_safetensors: bool | None = None
) -> str | None:
    """Choose among the file names of a folder the one that holds the weights, or the index of its shards.

    Args:
        names: File names, without folders.
        stems: Names without suffix, such as `diffusion_pytorch_model`, in order of preference.
        variant: Such as `"fp16"`.
        use_safetensors: `True`: only safetensors; `False`: only pickles; `None`: safetensors first.

    Returns:
        The name, or `None` if there is none.
    """
    suffixes = {True: ["safetensors"], False: ["bin"], None: ["safetensors", "bin"]}[use_safetensors]
    for suffix in suffixes:
        for stem in stems:
            for name in _layouts(stem, suffix, variant):
                if name in names:
                    return name
    return None


def _layouts(stem: str, suffix: str, variant: str | None) -> tuple[str, str, str]:
    """Names of weights in one file, and of the two forms of an index of shards."""
    mark = f".{variant}" if variant else ""
    return f"{stem}{mark}.{suffix}", f"{stem}.{suffix}.index{mark}.json", f"{stem}.{suffix}{mark}.index.json"


def forget_shards(path: Path, variant: str | None = None) -> None:
    """Remove the index of shards that `path`, weights in one file, has replaced: some readers look for it first."""
    if path.suffix != ".safetensors":
        return
    for index in _layouts(path.name.split(".")[0], path.suffix[1:], variant)[1:]:
        path.with_name(index).unlink(missing_ok=True)


def weight_files(path: Path) -> list[Path]:
    """`path`, or the shards that it lists if it is an index.

    Raises:
        ValueError: A shard's name leads out of the folder.
        FileNotFoundError: A shard is missing.
    """
    if path.suffix != ".json":
        return [path]
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path} has no 'weight_map' from names to shards: download it again")
    files = []
    for name in sorted(set(shards.values())):
        if PurePosixPath(name).is_absolute() or len(PurePosixPath(name).parts) != 1 or "\\" in name:
            raise ValueError(f"{path} names the shard {name!r}; expected a file name in the same folder")
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path.parent / name} is missing; {path.name} lists it: download it again")
        files.append(path.parent / name)
    return files


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

    Keys that begin with `_` are notes, whatever they hold.

    Raises:
        ValueError: It is not one of Stable Diffusion 1.x or 2.x.
    """
    listed = {name: entry for name, entry in index.items() if isinstance(entry, list) and name[:1] != "_"}
    for name, entry in listed.items():
        if len(entry) != 2 or not all(part is None or isinstance(part, str) for part in entry):
            raise ValueError(
                f"{folder / 'model_index.json'}: {shown(name)} is {shown(entry)}; expected [library, class]"
            )
    if unknown := sorted(set(listed) - set(COMPONENTS)):
        raise ValueError(
            f"{folder} holds a {shown(str(index.get('_class_name')))}, with {shown(', '.join(unknown))}; "
            f"expected Stable Diffusion 1.x or 2.x, made of {', '.join(COMPONENTS)}"
        )
    return {name: entry[1] for name, entry in listed.items() if entry[1] is not None}


def unwrapped(part: Any) -> Any:
    """What torch.compile has wrapped, or the component itself."""
    return getattr(part, "_orig_mod", part)


def class_name(part: Any) -> str:
    """The name of a component's class in model_index.json."""
    name = type(unwrapped(part)).__name__
    return {"CLIPImageProcessorPil": "CLIPImageProcessor"}.get(name, name)  # the name that every release knows


def index_text(pipeline: str, components: Mapping[str, Any], **more: Any) -> str:
    """The text of a model_index.json.

    Args:
        pipeline: The name of its class.
        components: By name; `None` where one is absent.
        **more: Other keys.
    """
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": FORMAT_VERSION, **more}
    for name, part in components.items():
        index[name] = [None, None] if part is None else [_LIBRARIES.get(name, "diffusers"), class_name(part)]
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


@contextlib.contextmanager
def explained(config: Path, cls: Any) -> Iterator[None]:
    """Errors that a config causes inside a constructor, of whatever class, get the file's name."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{config} describes no {cls.__name__} that can be made: {shown(str(error), 300)}") from error


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
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    for name in names:
        if name.endswith(".json"):
            read_json(folder / name, _MOST_OF_A_VOCABULARY)
        elif name.endswith(".txt"):
            refuse_lfs_pointer(folder / name)
    there = ", ".join(names)
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


def clip_name(name: str, expected: Expected) -> str | None:
    """Rename for transformers' CLIP classes, whose releases differ in one prefix and one buffer.

    `text_model.` and `vision_model.` came before every name until transformers 5.6; `position_ids` was once saved.
    """
    if name in expected:
        return name
    # What a whole CLIP has beside the half that is wanted: the other half, and what compares the two.
    sees = any(one.startswith("vision_model.") or "patch_embedding" in one for one in expected)
    other = "text_model." if sees else "vision_model."
    if name.endswith("position_ids") or name.startswith(other):
        return None
    for prefix in ("text_model.", "vision_model."):
        for candidate in (prefix + name, name.replace(prefix, "", 1)):
            if candidate in expected:
                return candidate
    return None if name.startswith(("text_projection.", "visual_projection.", "logit_scale")) else name


def vae_name(name: str, expected: Expected) -> str | None:
    """Rename for `AutoencoderKL`: folders from 2022 call the projections of its attention otherwise."""
    for old, new in OLD_VAE_ATTENTION.items():
        if f".attentions.0.{old}." in name:
            return name.replace(f".{old}.", f".{new}.")
    return name
