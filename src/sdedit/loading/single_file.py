"""A model in one file, in the layout of the latent diffusion code: what it holds, and networks made from it."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sdedit.files import read_json
from sdedit.loading import ldm, sizes
from sdedit.loading.families import SD1, SD2, Sections, recognise, sort_names
from sdedit.loading.folders import COMPONENTS
from sdedit.loading.headers import Header, TensorInfo, read_header
from sdedit.loading.hub import find_file, find_folder
from sdedit.loading.pretrained import load_component, model_class
from sdedit.loading.tokenizer import SIZE, clip_tokenizer
from sdedit.loading.training_config import Training, find_training
from sdedit.loading.weights import compare, put, read_weights
from sdedit.models.blank import blank

if TYPE_CHECKING:
    from sdedit.models.model import Model

M = TypeVar("M", bound="Model")

_SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


@dataclass
class Network:
    """A network on the meta device that a file was found to fit.

    Attributes:
        parts: For each parameter, where it lies.
        stored: From the names of the parts to those of the tensors in the file.
    """

    model: Any
    parts: dict[str, ldm.Part]
    stored: dict[str, str]


@dataclass(frozen=True)
class SingleFileReport:
    """What a load took from a single file. Every parameter of the networks matched: a load is an error otherwise.

    Attributes:
        family: Such as "Stable Diffusion 1.x".
        prediction_type: What the UNet predicts.
        matched: For each network that was loaded, how many parameters.
        left_out: Tensors that were not needed: of training, averaged weights, networks that were passed in instead.
        unknown: Tensors that belong to nothing known.
    """

    family: str
    prediction_type: str
    matched: dict[str, int]
    left_out: tuple[str, ...]
    unknown: tuple[str, ...]

    def __str__(self) -> str:
        found = ", ".join(f"{name} {count}" for name, count in self.matched.items())
        rest = f"{len(self.left_out)} tensors left out, {len(self.unknown)} unknown"
        return f"{self.family}, {self.prediction_type}; parameters matched: {found}; {rest}"


class SingleFile:
    """A single file whose header was read.

    Args:
        path: The file.
        config: A folder whose `unet/config.json` and the like are used instead of what shapes tell.
        training: What a configuration of the training code says.
        extract_ema: Use the averaged weights of the UNet, if the file has them.
    """

    def __init__(
        self, path: Path, config: Path | None = None, training: Training | None = None, extract_ema: bool = False
    ) -> None:
        self.path, self.config = path, config
        self.header: Header = read_header(path)
        self.sections: Sections = sort_names(self.header.tensors)
        self.recognised = recognise(self.header.tensors, self.sections)
        self.training = training or Training()
        if self.sections.ema and (extract_ema or not self.sections.unet):
            self.sections.unet = _with_dots(self.sections.ema, self.sections.unet)
        elif extract_ema:
            raise ValueError(f"{path} has no averaged weights (EMA): leave extract_ema out")
        self.is_sd2 = self.recognised.family.startswith(SD2)

    def network(self, name: str) -> Network:
        """Build `name` ("unet", "vae", "text_encoder") without weights, and compare it with the file.

        Raises:
            ValueError: The file has no such network, or it does not fit.
        """
        section, parts_of, config_of = self._section(name)
        if not section:
            raise ValueError(f"{self.path} has no {name}: pass {name}=…")
        shapes = {inner: self.header.tensors[stored].shape for inner, stored in section.items()}
        try:
            config = self._config(name, lambda: config_of(shapes))
            with blank():
                model = _MAKERS[name](config)
        except Exception as error:  # transformers' configs raise errors of many classes
            raise ValueError(f"{self.path}: no {name} can be made of it: {error}") from error
        parts = parts_of(model.state_dict())
        found: dict[str, TensorInfo] = {}
        left = dict(section)
        for ours, part in parts.items():
            if part.name in section:
                found[ours] = part.info(self.header.tensors[section[part.name]])
                left.pop(part.name, None)
        found |= {stored: self.header.tensors[stored] for stored in left.values()}
        compare(model, found, [self.path])
        return Network(model, parts, section)

    def _section(
        self, name: str
    ) -> tuple[
        dict[str, str], Callable[[Collection[str]], dict[str, ldm.Part]], Callable[[sizes.Shapes], dict[str, Any]]
    ]:
        if name == "unet":
            return self.sections.unet, ldm.unet_parts, sizes.unet_config
        if name == "vae":
            return self.sections.vae, ldm.vae_parts, sizes.vae_config
        if self.sections.open_clip:
            return _without_last_block(self.sections.open_clip), ldm.open_clip_parts, sizes.open_clip_config
        return self.sections.clip, ldm.clip_parts, sizes.clip_config

    def _config(self, name: str, from_shapes: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        for folder in (self.config / name, self.config) if self.config else ():
            if (folder / "config.json").is_file():
                return read_json(folder / "config.json")
        config = from_shapes()
        if name == "vae":
            return config | self.training.vae()
        if name == "unet":
            size = self.training.image_size or (768 if self.is_sd2 and self.prediction_type == "v_prediction" else 512)
            vae_levels = len({inner.split(".")[2] for inner in self.sections.vae if inner.startswith("encoder.down.")})
            upcast = self.is_sd2 and self.prediction_type == "v_prediction"
            own = {"sample_size": size // 2 ** ((vae_levels or 4) - 1), "upcast_attention": upcast}
            return config | own | self.training.unet(config)
        return config

    @property
    def prediction_type(self) -> str:
        """What the UNet predicts: as was said, as the file says of itself, or guessed."""
        if self.training.prediction_type is not None:
            return self.training.prediction_type
        said = self.header.metadata.get("modelspec.prediction_type", "")
        if said in ("v", "epsilon"):
            return {"v": "v_prediction"}.get(said, said)
        if "v_pred" in self.header.tensors:
            return "v_prediction"
        if not self.is_sd2 or self.header.metadata.get("global_step") == "875000":  # the base model of SD 2
            return "epsilon"
        telling = self.sections.unet.get("output_blocks.11.1.transformer_blocks.0.norm1.bias")
        if telling is None or self.header.tensors[telling].nbytes > 1 << 20:
            return "epsilon"
        bias = read_weights(self.path, [telling], self.header)[telling].float()
        return "v_prediction" if bias.std() > 0.09 else "epsilon"

    def fill(
        self, networks: Mapping[str, Network], torch_dtype: torch.dtype | None, read: bool = True
    ) -> SingleFileReport:
        """Read the weights of networks that were found to fit, and put them in; `read=False` only reports."""
        names = {network.stored[part.name] for network in networks.values() for part in network.parts.values()}
        tensors = read_weights(self.path, names, self.header) if read else {}
        for one in networks.values() if read else ():
            values = {ours: part.read(tensors[one.stored[part.name]]) for ours, part in one.parts.items()}
            put(one.model, values, torch_dtype or torch.float32)
            one.model.eval()
        unknown = tuple(self.sections.others)
        return SingleFileReport(
            self.recognised.family,
            self.prediction_type,
            {name: len(network.parts) for name, network in networks.items()},
            tuple(sorted(set(self.header.tensors) - names - set(unknown))),
            unknown,
        )


def _with_dots(ema: Mapping[str, str], unet: Mapping[str, str]) -> dict[str, str]:
    """The averaged weights under the names of the layout, which the file has without their dots."""
    names: Collection[str] = unet
    if not names:
        with blank():
            state = model_class("UNet2DConditionModel")().state_dict()
        names = {part.name for part in ldm.unet_parts(state).values()}
    dotted = {name.replace(".", ""): name for name in names}
    return {dotted.get(bare, bare): stored for bare, stored in ema.items()}


def _without_last_block(open_clip: Mapping[str, str]) -> dict[str, str]:
    """OpenCLIP's encoder without its last block, which SD 2 does not use; files that we write do not have it."""
    numbers = [int(found[1]) for name in open_clip if (found := re.match(r"transformer\.resblocks\.(\d{1,4})\.", name))]
    is_whole = "positional_embedding" in open_clip and max(numbers, default=0) == 23
    return {
        n: stored for n, stored in open_clip.items() if not (is_whole and n.startswith("transformer.resblocks.23."))
    }


def _text_encoder(config: Mapping[str, Any]) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**config))


_MAKERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "unet": lambda config: model_class("UNet2DConditionModel").from_config(config),
    "vae": lambda config: model_class("AutoencoderKL").from_config(config),
    "text_encoder": _text_encoder,
}


def load_network(
    cls: type[M],
    path_or_url: str | os.PathLike[str],
    *,
    torch_dtype: torch.dtype | None = None,
    config: str | os.PathLike[str] | None = None,
    original_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    image_size: int | None = None,
    extract_ema: bool = False,
    read: bool = True,
    **hub: Any,
) -> M:
    """Load a UNet or VAE; see `Model.from_single_file`. `read=False` only checks, by the header, that it would."""
    name = {"UNet2DConditionModel": "unet", "AutoencoderKL": "vae"}.get(cls.__name__)
    if name is None:
        raise ValueError(f"{cls.__name__} has no single-file layout; use from_pretrained")
    path = find_file(path_or_url, **hub)
    folder = _config_folder(config, hub)
    file = SingleFile(path, folder, find_training(path, original_config, None, image_size), extract_ema)
    recognised = file.recognised
    # The VAE of an inpainting model is that of its family.
    if recognised.refusal and not (name == "vae" and recognised.family.startswith((SD1, SD2))):
        raise ValueError(f"{path} cannot be loaded: {recognised.refusal}")
    network = file.network(name)
    file.fill({name: network}, torch_dtype, read)
    return network.model  # type: ignore[no-any-return]


def load_single_file(
    path_or_url: str | os.PathLike[str],
    *,
    torch_dtype: torch.dtype | None = None,
    config: str | os.PathLike[str] | None = None,
    original_config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    prediction_type: str | None = None,
    image_size: int | None = None,
    extract_ema: bool = False,
    read: bool = True,
    **given: Any,
) -> dict[str, Any]:
    """The constructor's arguments for a pipeline, and `load_report`; see `Pipeline.from_single_file`.

    Args:
        read: `False` leaves networks without values, and only checks, by the header, that a load would succeed.
        given: Components that are not to be loaded, and arguments for the hub.
    """
    parts = {name: given.pop(name) for name in COMPONENTS if name in given}
    if torch_dtype is not None and not isinstance(torch_dtype, torch.dtype):
        raise ValueError(f"torch_dtype={torch_dtype!r}; expected torch.float32, torch.float16 or torch.bfloat16")
    path = find_file(path_or_url, **given)
    folder = _config_folder(config, given)
    training = find_training(path, original_config, prediction_type, image_size)
    file = SingleFile(path, folder, training, extract_ema)
    if file.recognised.refusal or file.recognised.kind not in ("checkpoint", "UNet"):
        why = file.recognised.refusal or f"it is a {file.recognised.kind} alone; expected a whole model"
        raise ValueError(f"{path} cannot be loaded for image-to-image: {why}")
    networks = {name: file.network(name) for name in ("unet", "vae", "text_encoder") if name not in parts}
    if "tokenizer" not in parts:
        parts["tokenizer"] = _tokenizer(file, networks.get("text_encoder"))
    if "scheduler" not in parts:
        parts["scheduler"] = _scheduler(file)
    if file.sections.others:
        first = ", ".join(file.sections.others[:3])
        warnings.warn(f"{path.name}: {len(file.sections.others)} unknown tensors left out ({first}, …)", stacklevel=4)
    parts["load_report"] = file.fill(networks, torch_dtype, read)
    parts |= {name: network.model for name, network in networks.items()}
    return parts | {"requires_safety_checker": parts.get("safety_checker") is not None}


def _config_folder(config: str | os.PathLike[str] | None, hub: Mapping[str, Any]) -> Path | None:
    if config is None:
        return None
    # The revision is that of the file's repository.
    return find_folder(config, components=[], **{key: value for key, value in hub.items() if key != "revision"})


def _tokenizer(file: SingleFile, text_encoder: Network | None) -> Any:
    if file.config is not None and (file.config / "tokenizer").is_dir():
        return load_component("tokenizer", "CLIPTokenizer", file.config / "tokenizer")
    if text_encoder is None:
        return clip_tokenizer("!" if file.is_sd2 else "<|endoftext|>")
    check_vocabulary(file, text_encoder)
    return clip_tokenizer("!" if file.sections.open_clip else "<|endoftext|>")


def check_vocabulary(file: SingleFile, text_encoder: Network) -> None:
    """Raise `ValueError` if the text encoder was made for other tokens than CLIP's, which no single file holds."""
    words = text_encoder.model.config.vocab_size
    if words != SIZE:
        raise ValueError(
            f"{file.path}: its text encoder knows {words:,} tokens, CLIP {SIZE:,}: pass tokenizer=…, or config=…"
        )


def _scheduler(file: SingleFile) -> Any:
    """That of the folder given as `config`; else what the published folders of SD 1.5 and 2.1 have."""
    from sdedit import schedulers

    if file.config is not None and (file.config / "scheduler" / "scheduler_config.json").is_file():
        settings = read_json(file.config / "scheduler" / "scheduler_config.json")
        return load_component("scheduler", str(settings.get("_class_name")), file.config / "scheduler")
    common = {**_SCHEDULE, "prediction_type": file.prediction_type, **file.training.schedule()}
    if any(name.startswith("conditioner.") for name in file.header.tensors):  # SD-Turbo, which is made for few steps
        return schedulers.EulerDiscreteScheduler(
            timestep_spacing="trailing", **{k: v for k, v in common.items() if k != "set_alpha_to_one"}
        )
    if file.is_sd2:
        return schedulers.DDIMScheduler(clip_sample=False, **common)
    return schedulers.PNDMScheduler(skip_prk_steps=True, **common)
