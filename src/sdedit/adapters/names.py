"""Which module of the UNet or text encoder a name in an adapter file means.

Files write a module's path with dots or with underscores, under several prefixes, and by the names of diffusers or of
the original latent-diffusion code (LDM). Turning underscores back into dots is ambiguous, so it goes the other way: the
names of the modules that are there are underscored, and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from sdedit.loading.families import FAMILY_OF_WIDTH
from sdedit.loading.ldm import unet_parts

Target = tuple[str, str]  # component ("unet" or "text_encoder") and module name

_PREFIX = re.compile(
    r"^(?:base_model_model_|lora_|lycoris_|unet_|te1?_|text_encoder_|(?:model_)?diffusion_model_"
    r"|(?:text_encoders_)?clip_[lh]_transformer_)+"
)

# Projections of the text encoder as diffusers of early 2023 called them.
_OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

# Names that only other models' adapters have.
_FAMILIES = {
    "Stable Diffusion XL": r"lora_te2_|text_encoder_2|clip_g\.|add_embedding|label_emb|transformer_blocks[._][2-9]",
    "Flux": r"single_transformer_blocks|double_blocks|single_blocks",
    "Stable Diffusion 3": r"joint_blocks|attn[._]add_q_proj|\btransformer\.transformer_blocks",
    "a video model": r"temporal_transformer|motion_modules",
}


def underscored(name: str) -> str:
    """A file's module name without its prefixes, dots as underscores."""
    flat = name.replace(".processor.", ".").replace(".", "_").replace("_processor_", "_")
    return _PREFIX.sub("", flat)


def index(names: Mapping[str, Iterable[str]]) -> dict[str, Target]:
    """From each underscored name under which a module may go to the component and the module.

    Args:
        names: Module names of `"unet"` and `"text_encoder"`.
    """
    found: dict[str, Target] = {}
    unet = list(names.get("unet", ()))
    places = unet_parts([f"{name}.weight" for name in unet])
    for name in unet:
        for other in (name, places[f"{name}.weight"].name.removesuffix(".weight")):
            flat = other.replace(".", "_")
            found[flat] = ("unet", name)
            if flat.endswith("_to_out_0"):
                found[flat.removesuffix("_0")] = ("unet", name)
    for name in names.get("text_encoder", ()):
        short = name.removeprefix("text_model.")
        head, _, last = short.rpartition(".")
        for other in (short, f"{head}.{_OLD_TEXT.get(last, last)}"):
            flat = other.replace(".", "_")
            found[flat] = found[f"text_model_{flat}"] = ("text_encoder", name)
    return found


def is_text(flat: str) -> bool:
    """Is it a name in CLIP's text encoder?"""
    return (
        re.match(r"(text_model_)?(encoder_layers_\d+_(self_attn|mlp)_|embeddings_|final_layer_norm)", flat) is not None
    )


def numbered(names: Mapping[str, Iterable[str]], count: int) -> dict[str, Target]:
    """cloneofsimo's names, such as `unet:0`: a running number in the order in which diffusers of 2022 held the modules.

    That is: down, up, middle; in a transformer block self-attention, GEGLU, attention to the text; in attention query,
    key, value, output (for the text encoder: key, value, query, output).

    Args:
        count: How many numbers of the UNet the file has: GEGLU is left out of some.
    """
    way = ("down_blocks", "up_blocks", "mid_block")
    first = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")
    layers = (*first, "ff.net.0.proj", *(name.replace("attn1", "attn2") for name in first))
    heads = [n.removesuffix("attn1.to_q") for n in names.get("unet", ()) if n.endswith("attn1.to_q")]
    heads.sort(key=lambda n: (way.index(n.split(".")[0]), [int(part) for part in n.split(".") if part.isdigit()]))
    wanted = [layer for layer in layers if len(heads) * len(layers) <= count or "ff" not in layer]
    unet = [head + layer for head in heads for layer in wanted]
    heads = [n.removesuffix("q_proj") for n in names.get("text_encoder", ()) if n.endswith("self_attn.q_proj")]
    heads.sort(key=lambda n: [int(part) for part in n.split(".") if part.isdigit()])
    text = [head + layer for head in heads for layer in ("k_proj", "v_proj", "q_proj", "out_proj")]
    found: dict[str, Target] = {f"unet:{i}": ("unet", name) for i, name in enumerate(unet)}
    return found | {f"text_encoder:{i}": ("text_encoder", name) for i, name in enumerate(text)}


def family(names: Iterable[str], text_width: int | None) -> str | None:
    """The kind of model that an adapter is for, from its names and the width of the text that it attends to."""
    text = "\n".join(names)
    for name, marks in _FAMILIES.items():
        if re.search(marks, text):
            return name
    return family_of_width(text_width)


def family_of_width(text_width: int | None) -> str | None:
    """The kind of model whose prompt embeds have that many channels."""
    if text_width is None:
        return None
    return FAMILY_OF_WIDTH.get(text_width, f"a model with text embeddings of width {text_width}")
