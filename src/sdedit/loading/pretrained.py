"""Model folders, on disk or on the hub: which files there are, and each component made from its own."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sdedit.config import FORMAT_VERSION
from sdedit.files import read_json, refuse_lfs_pointer
from sdedit.loading.checkpoint import blank, choose_weights, clip_name, fill, forget_shards, vae_name, weight_files
from sdedit.loading.sources import check_hub_arguments

if TYPE_CHECKING:
    from sdedit.models.model import Model

M = TypeVar("M", bound="Model")

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

_MODELS = {
    "UNet2DConditionModel": "sdedit.models.unet",
    "AutoencoderKL": "sdedit.models.vae",
    "AutoencoderTiny": "sdedit.models.tiny_vae",
    "StableDiffusionSafetyChecker": "sdedit.models.safety_checker",
}

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


def load_model(
    cls: type[M],
    path_or_id: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
    **hub: Any,
) -> M:
    """Load one of our networks; see `Model.from_pretrained`."""
    _check_choices(torch_dtype, use_safetensors)
    root = find_folder(
        path_or_id,
        components=[subfolder or ""],
        variant=variant,
        use_safetensors=use_safetensors,
        **hub,
    )
    folder = root / subfolder if subfolder else root
    config = read_json(folder / cls.config_name)
    files = weights_in(folder, variant, use_safetensors)
    with blank(), explained(folder / cls.config_name, cls):
        model = cls.from_config(config)
    fill(model, files, dtype=torch_dtype or torch.float32, rename=vae_name)
    return model.eval()


def model_class(class_name: str) -> Any:
    """The class of one of our networks, by the name that configs have for it."""
    if class_name not in _MODELS:
        raise ValueError(f"{class_name} is not known; expected one of {', '.join(_MODELS)}")
    return getattr(importlib.import_module(_MODELS[class_name]), class_name)


def _check_choices(torch_dtype: Any, use_safetensors: Any) -> None:
    if torch_dtype is not None and not (isinstance(torch_dtype, torch.dtype) and torch_dtype.is_floating_point):
        raise ValueError(f"torch_dtype={torch_dtype!r}; expected torch.float32, torch.float16 or torch.bfloat16")
    if use_safetensors not in (None, True, False):
        raise ValueError(f"use_safetensors={use_safetensors!r}; expected True, False or None")


@contextlib.contextmanager
def explained(config: Path, cls: Any) -> Iterator[None]:
    """Errors that a config causes inside a constructor, of whatever class, get the file's name."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{config} describes no {cls.__name__} that can be made: {error}") from error


def load_transformers_model(
    cls: Any, folder: Path, torch_dtype: torch.dtype | None, variant: str | None, use_safetensors: bool | None
) -> Any:
    """Load one of transformers' CLIP models as strictly as our own: names and shapes are compared first."""
    read_json(folder / "config.json")
    files = weights_in(folder, variant, use_safetensors)
    with blank(), explained(folder / "config.json", cls):
        model = cls(cls.config_class.from_pretrained(folder))
    fill(model, files, dtype=torch_dtype or torch.float32, rename=clip_name)
    return model.eval()


def load_component(
    name: str,
    class_name: str,
    folder: Path,
    *,
    torch_dtype: torch.dtype | None = None,
    variant: str | None = None,
    use_safetensors: bool | None = None,
) -> Any:
    """Make the component `name`, of the class that model_index.json says, from its folder.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The class is not known, or a file is damaged or does not fit.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; model_index.json lists it: download it, or pass {name}=…")
    if name == "scheduler":
        from sdedit import schedulers

        if class_name not in schedulers.__all__:
            known = ", ".join(n for n in schedulers.__all__ if n.endswith("Scheduler"))
            raise ValueError(f"scheduler: {class_name} is not known; expected one of {known}")
        cls = getattr(schedulers, class_name)
        config = read_json(folder / cls.config_name)
        with explained(folder / cls.config_name, cls):
            return cls.from_config(config)
    if class_name in _MODELS:
        cls = model_class(class_name)
        if name in ("unet", "vae"):
            return load_model(cls, folder, torch_dtype=torch_dtype, variant=variant, use_safetensors=use_safetensors)
    else:
        cls = _transformers_class(name, class_name)
    if name in ("tokenizer", "feature_extractor"):
        return _load_processor(cls, folder)
    return load_transformers_model(cls, folder, torch_dtype, variant, use_safetensors)


def _transformers_class(name: str, class_name: str) -> Any:
    import transformers

    # The class that 2022's folders name has gone from transformers.
    class_name = {"CLIPFeatureExtractor": "CLIPImageProcessor"}.get(class_name, class_name)
    if class_name == "CLIPImageProcessor" and hasattr(transformers, "CLIPImageProcessorPil"):
        class_name = "CLIPImageProcessorPil"  # what the other becomes, with a message, where torchvision is absent
    cls = getattr(transformers, class_name, None) if class_name.startswith("CLIP") else None
    if cls is None:
        raise ValueError(f"{name}: {class_name} is not a part of Stable Diffusion 1.x or 2.x; expected a CLIP class")
    return cls


def _load_processor(cls: Any, folder: Path) -> Any:
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


def load_components(
    path_or_id: str | os.PathLike[str] | None,
    *,
    torch_dtype: torch.dtype | None,
    variant: str | None,
    use_safetensors: bool | None,
    **given: Any,
) -> dict[str, Any]:
    """The constructor's arguments for a pipeline; see `StableDiffusionImg2ImgPipeline.from_pretrained`.

    Args:
        given: Components that are not to be loaded, and arguments for the hub.
    """
    parts = {name: given.pop(name) for name in (*COMPONENTS, "requires_safety_checker") if name in given}
    _check_choices(torch_dtype, use_safetensors)
    hub = dict(variant=variant, use_safetensors=use_safetensors, **given)
    folder = find_folder(
        DEFAULT_MODEL if path_or_id is None else path_or_id, components=set(COMPONENTS) - set(parts), **hub
    )
    index = read_json(folder / "model_index.json")
    listed = {name: entry for name, entry in index.items() if isinstance(entry, list)}
    for name, entry in listed.items():
        if len(entry) != 2 or not all(part is None or isinstance(part, str) for part in entry):
            raise ValueError(f"{folder / 'model_index.json'}: {name} is {entry!r}; expected [library, class]")
    if unknown := sorted(set(listed) - set(COMPONENTS)):
        raise ValueError(
            f"{folder} holds a {index.get('_class_name')}, with {', '.join(unknown)}; "
            f"expected Stable Diffusion 1.x or 2.x, made of {', '.join(COMPONENTS)}"
        )
    wanted = [name for name, entry in listed.items() if name not in parts and entry[1] is not None]
    if variant and not any(_has_variant(folder / name, variant, use_safetensors) for name in wanted):
        raise FileNotFoundError(f"{folder} has no weights of variant {variant!r}: leave variant out, or download it")
    for name in wanted:
        here = variant if variant and _has_variant(folder / name, variant, use_safetensors) else None
        parts[name] = load_component(
            name,
            listed[name][1],
            folder / name,
            torch_dtype=torch_dtype,
            variant=here,
            use_safetensors=use_safetensors,
        )
    if missing := [name for name in ("vae", "unet", "scheduler") if parts.get(name) is None]:
        raise ValueError(f"{folder / 'model_index.json'} lists no {' and no '.join(missing)}: pass {missing[0]}=…")
    for name in ("text_encoder", "tokenizer"):
        parts.setdefault(name, None)
    words, known = len(parts["tokenizer"] or ()), getattr(parts["text_encoder"], "config", None)
    if known is not None and words > known.vocab_size:
        raise ValueError(f"{folder / 'tokenizer'} has {words} tokens; the text encoder knows {known.vocab_size}")
    parts.setdefault("requires_safety_checker", index.get("requires_safety_checker", True))
    return parts


def _has_variant(folder: Path, variant: str, use_safetensors: bool | None) -> bool:
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    return choose_weights(names, _STEMS, variant, use_safetensors) is not None


def save_components(
    components: dict[str, Any], requires_safety_checker: bool, folder: str | os.PathLike[str], variant: str | None
) -> None:
    """Write a model folder: complete in a temporary place first, then moved file by file, model_index.json last."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"save_directory: {folder} is a file; expected a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionImg2ImgPipeline",
        "_diffusers_version": FORMAT_VERSION,
        "requires_safety_checker": requires_safety_checker,
    }
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        for name, part in components.items():
            if part is None:
                index[name] = [None, None]
                continue
            library = "transformers" if type(part).__module__.startswith("transformers") else "diffusers"
            class_name = type(part).__name__
            if class_name == "StableDiffusionSafetyChecker":
                library = "stable_diffusion"
            if class_name == "CLIPImageProcessorPil":
                class_name = "CLIPImageProcessor"  # the name that every release knows
            index[name] = [library, class_name]
            weights = {"variant": variant} if variant and isinstance(part, torch.nn.Module) else {}
            part.save_pretrained(Path(temporary) / name, **weights)
        (Path(temporary) / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        files = sorted(p for p in Path(temporary).rglob("*") if p.is_file())
        for file in sorted(files, key=lambda p: p.name == "model_index.json"):
            target = folder / file.relative_to(temporary)
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
            if target.suffix == ".safetensors":
                forget_shards(target, variant)


def cached_models() -> list[tuple[str, Path]]:
    """Id and folder of each Stable Diffusion model in the hub's cache."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return []
    folders = [(repo.repo_id, rev.snapshot_path) for repo in repos for rev in repo.revisions]
    return sorted((name, path) for name, path in folders if (path / "model_index.json").is_file())
