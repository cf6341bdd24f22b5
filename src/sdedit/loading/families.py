"""Which model a file of weights belongs to, told from the names and shapes of its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sdedit.loading import ldm
from sdedit.loading.folders import vae_name
from sdedit.loading.headers import TensorInfo, read_header

SD1, SD2, XL = "Stable Diffusion 1.x", "Stable Diffusion 2.x", "Stable Diffusion XL"

# By the width of the text that the UNet attends to, or of the vectors of a text encoder.
FAMILY_OF_WIDTH = {768: SD1, 1024: SD2, 1280: XL, 2048: XL}

# Objects that embeddings of AUTOMATIC1111's web UI may hold; a pickle's walk makes none of them.
EMBEDDING_CLASSES = frozenset({"torch.nn.modules.container.ParameterDict", "torch.nn.parameter.Parameter"})

_TEXT_ENCODER = r"^text_model\.encoder\.|^encoder\.layers\.0\.self_attn"

# What one name is enough to tell, the surest first: a pattern, the kind of file, the family of models.
_TELLING = (
    (r"^(control_model\.|controlnet_|input_hint_block\.)|zero_convs\.", "ControlNet", "Stable Diffusion"),
    (r"motion_modules\.", "motion module", "AnimateDiff"),
    (r"^(ip_adapter\.|image_proj\.)", "IP-Adapter", ""),
    (
        r"^unet:\d+:(up|down)|[._](lora_(down|up|A|B)|lora|to_\w+_lora|lora_linear_layer)\.|\.(hada_w|lokr_w)",
        "LoRA",
        "",
    ),
    (r"(^|\.)double_blocks\.\d", "checkpoint", "Flux"),
    (r"(^|\.)joint_blocks\.\d", "checkpoint", "Stable Diffusion 3"),
    (r"^conditioner\.embedders\.1\.", "checkpoint", "Stable Diffusion XL"),
    (r"^(encoder|decoder)\.layers\.\d+\.conv\.|^taesd_", "tiny VAE", "TAESD"),
)

# By the channels that the UNet takes in: what it needs besides latents.
_INPUTS = {
    4: None,
    5: "depth-to-image, which needs a depth map",
    7: "an upscaler, which needs a small picture",
    8: "InstructPix2Pix, which takes the image in beside the noise",
    9: "inpainting, which needs a mask",
}


@dataclass
class Sections:
    """The names of a single file, sorted by network: the layout's name, without prefix, to the name in the file."""

    unet: dict[str, str] = field(default_factory=dict)
    ema: dict[str, str] = field(default_factory=dict)
    vae: dict[str, str] = field(default_factory=dict)
    clip: dict[str, str] = field(default_factory=dict)
    open_clip: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recognised:
    """What a file is.

    Attributes:
        kind: "checkpoint", "UNet", "VAE", "LoRA", "ControlNet", …
        family: Such as `SD1`; empty if the names do not tell.
        refusal: Why it is no model for image-to-image, or `None`.
    """

    kind: str
    family: str
    refusal: str | None = None

    def __str__(self) -> str:
        if self.kind == "unknown":
            return "a file whose names are those of no model that is known here"
        return f"{_article(self.kind)} of {self.family}" if self.family else _article(self.kind)


def sort_names(names: Iterable[str]) -> Sections:
    """Sort the names of a file by network; bare networks, and those in the layout of folders, too."""
    sections = Sections()
    left_out = re.compile(ldm.LEFT_OUT, re.VERBOSE)
    tables = (
        (ldm.UNET_PREFIXES, sections.unet),
        (ldm.VAE_PREFIXES, sections.vae),
        (ldm.CLIP_PREFIXES, sections.clip),
        (ldm.OPEN_CLIP_PREFIXES, sections.open_clip),
    )
    for stored in names:
        name = stored.replace("_orig_mod.", "")  # torch.compile puts this before the names of what it wraps
        if name.startswith(ldm.EMA_PREFIX):
            sections.ema[name.removeprefix(ldm.EMA_PREFIX)] = stored
        elif not left_out.fullmatch(name):
            found = next(((t, p) for prefixes, t in tables for p in prefixes if name.startswith(p)), None)
            if found is not None:
                found[0][name.removeprefix(found[1])] = stored
            else:
                sections.others.append(stored)
    if not (sections.unet or sections.vae or sections.ema):
        _sort_bare(sections)
    return sections


def _sort_bare(sections: Sections) -> None:
    """Files of one network, whose names have no prefix."""
    stored = {name.replace("_orig_mod.", ""): name for name in sections.others}
    names = set(stored)
    try:
        if any(name.startswith("down_blocks.") for name in names):
            sections.unet |= {part.name: stored[name] for name, part in ldm.unet_parts(names).items()}
        elif any(name.startswith("encoder.down_blocks.") for name in names):
            renamed = {str(vae_name(name, {})): stored[name] for name in names}
            sections.vae |= {part.name: renamed[ours] for ours, part in ldm.vae_parts(renamed).items()}
        elif any(name.startswith("input_blocks.") for name in names):
            sections.unet |= stored
        elif any(name.startswith(("decoder.up.", "encoder.down.")) for name in names):
            sections.vae |= stored
        else:
            return
    except ValueError:  # another kind of network, whose names only look alike
        return
    sections.others.clear()


def recognise(tensors: Mapping[str, TensorInfo], sections: Sections | None = None) -> Recognised:
    """Say what a file is, from its header."""
    text = "\n".join(tensors)
    for pattern, kind, family in _TELLING:
        if re.search(pattern, text, re.MULTILINE):
            return Recognised(kind, family, f"it is {Recognised(kind, family)}")
    sections = sections or sort_names(tensors)
    if sections.unet:
        return _recognise_unet({name: tensors[stored].shape for name, stored in sections.unet.items()}, sections)
    if sections.ema:
        return Recognised("checkpoint", SD2 if sections.open_clip else SD1)
    if sections.vae:
        shape = (
            tensors[sections.vae["decoder.conv_in.weight"]].shape if "decoder.conv_in.weight" in sections.vae else ()
        )
        if len(shape) == 4 and shape[1] != 4:
            return Recognised("VAE", "", f"it is a VAE with {shape[1]} channels of latents, as Flux and SD 3 have it")
        return Recognised("VAE", "Stable Diffusion")
    if sections.clip or sections.open_clip or re.search(_TEXT_ENCODER, text, re.MULTILINE):
        return Recognised("text encoder", "CLIP", "it is a text encoder alone")
    if (theirs := _family_of_embedding(tensors)) is not None:
        return Recognised("textual inversion", theirs, "it is a textual inversion")
    return Recognised("unknown", "", "its names are those of no model that is known here")


def _family_of_embedding(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The family of a textual inversion, a few vectors under a name in one of three layouts; else `None`."""
    if {"clip_l", "clip_g"} & set(tensors):
        return XL
    theirs = ("string_to_param.", "emb_params")
    held = [info.shape for name, info in tensors.items() if name.startswith(theirs) or not re.search(r"[.:]", name)]
    if not 0 < len(held) <= 64 or (len(held) < len(tensors) and not any(n.startswith(theirs) for n in tensors)):
        return None
    widths = {shape[-1] if 1 <= len(shape) <= 2 else 0 for shape in held}
    return FAMILY_OF_WIDTH[max(widths)] if widths <= set(FAMILY_OF_WIDTH) else None


def what_is(path: Path) -> Recognised:
    """What a file of weights is, by its header; `str` of it says so with an article.

    Raises:
        FileNotFoundError, ValueError: As `read_header`.
    """
    return recognise(read_header(path, EMBEDDING_CLASSES).nested())


def _article(kind: str) -> str:
    return f"an {kind}" if kind.startswith("IP") else f"a {kind}"


def _recognise_unet(shapes: Mapping[str, tuple[int, ...]], sections: Sections) -> Recognised:
    kind = "checkpoint" if sections.vae or sections.clip or sections.open_clip else "UNet"
    width = next((s[1] for n, s in shapes.items() if n.endswith("attn2.to_k.weight") and len(s) == 2), 0)
    linear = any(n.endswith(".proj_in.weight") and len(s) == 2 for n, s in shapes.items())
    inputs = shapes.get("input_blocks.0.0.weight", ())
    channels = inputs[1] if len(inputs) == 4 else 0
    if _INPUTS.get(channels, "unknown") is None and any(name.startswith("label_emb.") for name in shapes):
        xl = {2048: "Stable Diffusion XL", 1280: "the refiner of Stable Diffusion XL", 1024: "Stable unCLIP"}
        family = xl.get(width, "a model with classes")
        return Recognised(kind, family, f"it is a {kind} of {family}")
    family = SD2 if linear else SD1
    if channels not in _INPUTS:
        return Recognised(kind, family, f"its UNet takes {channels} channels; expected 4")
    if (what := _INPUTS[channels]) is not None:
        return Recognised(kind, f"{family}, {what.split(',')[0]}", f"it is {what}, not image-to-image")
    return Recognised(kind, family)
