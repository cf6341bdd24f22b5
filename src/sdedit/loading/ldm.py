"""The layout of single files: for each parameter of a network, the tensor of the file, or the part of one, that it is.

The networks' own names decide, so one table serves both directions: reading looks parameters up, writing gathers them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING

from sdedit.loading.headers import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

# Our names on the left, in all tables.

# Where each network's names begin; the first is the one that is written.
UNET_PREFIXES = ("model.diffusion_model.",)
VAE_PREFIXES = ("first_stage_model.", "vae.")
CLIP_PREFIXES = ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer.")
OPEN_CLIP_PREFIXES = ("cond_stage_model.model.", "conditioner.embedders.0.model.")  # the latter of SD-Turbo
# The average of the UNet's weights over its training: here the rest of the name has no dots.
EMA_PREFIX = "model_ema.diffusion_model"

# Parameters that such files hold besides, and that the networks do without.
LEFT_OUT = r"""
    model_ema\. .* | .* position_ids | .* attn_mask | .* logit_scale | .* text_projection (\.weight)? | .* \.loss\. .*
    | loss\. .* | betas | (sqrt_|log_)? (recip(m1)?_|one_minus_)? alphas_cumprod (_prev)? | posterior_ .* | logvar
    | .* visual_projection (\.weight)? | cond_stage_model\.(transformer\.vision_model|model\.visual)\. .*
    | lvlb_weights | scale_factor | denoiser\. .* | v_pred | ztsnr | embedding_manager\. .*
"""

UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}

VAE_ENDS = {
    "conv_in": "conv_in",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.attentions.0": "mid.attn_1",
    "mid_block.resnets.1": "mid.block_2",
    "conv_norm_out": "norm_out",
    "conv_out": "conv_out",
}
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}

# CLIP's text encoder has our names in a single file; OpenCLIP's has others.
OPEN_CLIP_ENDS = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
# These lie one under the other in `attn.in_proj_weight` and `attn.in_proj_bias`.
OPEN_CLIP_THIRDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Part:
    """A parameter as it lies in a single file.

    Attributes:
        name: The file's name of the tensor, without the prefix of the network.
        third: 0, 1 or 2 if it is that third of the tensor's rows.
        convolution: It lies there as a 1×1 convolution (N, M, 1, 1), and is a matrix (N, M) here.
    """

    name: str
    third: int | None = None
    convolution: bool = False

    def info(self, stored: TensorInfo) -> TensorInfo:
        """Shape and dtype of the parameter, from those of the tensor in the file."""
        shape = stored.shape
        if self.third is not None and shape and shape[0] % 3 == 0:
            shape = (shape[0] // 3, *shape[1:])
        if self.convolution and len(shape) == 4:
            shape = shape[:2] if shape[2:] == (1, 1) else shape
        return TensorInfo(shape, stored.dtype)

    def read(self, stored: Tensor) -> Tensor:
        """The parameter, from the tensor in the file."""
        if self.third is not None:
            stored = stored.chunk(3)[self.third]
        return stored.flatten(1) if self.convolution else stored


def write(parts: Mapping[str, Part], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, from the parameters of a network: the inverse of `Part.read` for all of them."""
    import torch

    thirds: dict[str, dict[int, Tensor]] = {}
    tensors = {}
    for name, tensor in parameters.items():
        part = parts[name]
        if part.third is not None:
            thirds.setdefault(part.name, {})[part.third] = tensor
        else:
            tensors[part.name] = tensor[..., None, None] if part.convolution and tensor.ndim == 2 else tensor
    return tensors | {name: torch.cat([rows[i] for i in range(3)]) for name, rows in thirds.items()}


def unet_parts(names: Collection[str]) -> dict[str, Part]:
    """Where each parameter of a `UNet2DConditionModel` lies.

    Raises:
        ValueError: A name has no place in the layout, for instance that of an adapter's weight.
    """
    modules = _modules(names)
    places = dict(UNET_ENDS)
    for side, theirs, n in (("down_blocks", "input_blocks", 1), ("up_blocks", "output_blocks", 0)):
        for i in range(_count(modules, side)):
            block = f"{side}.{i}"
            for j in range(_count(modules, f"{block}.resnets")):
                places[f"{block}.resnets.{j}"] = f"{theirs}.{n}.0"
                places[f"{block}.attentions.{j}"] = f"{theirs}.{n}.1"
                n += 1
            if f"{block}.downsamplers.0" in modules:
                places[f"{block}.downsamplers.0"] = f"{theirs}.{n}.0"
                n += 1
            # The upsampler has no block of its own: it is the last part of the last one.
            places[f"{block}.upsamplers.0"] = f"{theirs}.{n - 1}.{2 if f'{block}.attentions.0' in modules else 1}"
    return _parts(names, places, {"resnets": UNET_RESNET, "downsamplers": {"conv": "op"}})


def vae_parts(names: Collection[str]) -> dict[str, Part]:
    """Where each parameter of an `AutoencoderKL` lies; see `unet_parts`."""
    modules = _modules(names)
    places = {name: name for name in ("quant_conv", "post_quant_conv")}
    for coder, side in (("encoder", "down"), ("decoder", "up")):
        places |= {f"{coder}.{ours}": f"{coder}.{theirs}" for ours, theirs in VAE_ENDS.items()}
        levels = _count(modules, f"{coder}.{side}_blocks")
        for i in range(levels):
            block, level = f"{coder}.{side}_blocks.{i}", i if side == "down" else levels - 1 - i
            for j in range(_count(modules, f"{block}.resnets")):
                places[f"{block}.resnets.{j}"] = f"{coder}.{side}.{level}.block.{j}"
            places[f"{block}.{side}samplers.0"] = f"{coder}.{side}.{level}.{side}sample"
    parts = _parts(names, places, {"resnets": VAE_RESNET, "attentions": VAE_ATTENTION})
    matrices = {name for name in names if ".attentions." in name and ".to_" in name and name.endswith(".weight")}
    return {name: replace(part, convolution=name in matrices) for name, part in parts.items()}


def clip_parts(names: Collection[str]) -> dict[str, Part]:
    """Where each parameter of a CLIP text encoder lies (SD 1.x): under its own name."""
    return {name: Part(name.removeprefix("text_model.")) for name in names if not name.endswith("position_ids")}


def open_clip_parts(names: Collection[str]) -> dict[str, Part]:
    """Where each parameter of a text encoder lies in OpenCLIP's layout (SD 2.x); see `unet_parts`."""
    parts = {}
    for name in names:
        end = name.removeprefix("text_model.")
        found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", end)
        if end in OPEN_CLIP_ENDS:
            parts[name] = Part(OPEN_CLIP_ENDS[end])
        elif found and found[2] in OPEN_CLIP_THIRDS:
            third = OPEN_CLIP_THIRDS.index(found[2])
            parts[name] = Part(f"transformer.resblocks.{found[1]}.attn.in_proj_{found[3]}", third)
        elif found and found[2] in OPEN_CLIP_LAYER:
            parts[name] = Part(f"transformer.resblocks.{found[1]}.{OPEN_CLIP_LAYER[found[2]]}.{found[3]}")
        elif not name.endswith("position_ids"):
            raise _no_place(name)
    return parts


def _modules(names: Iterable[str]) -> set[str]:
    """`a`, `a.b` and `a.b.c` for every name `a.b.c.d`."""
    found = set()
    for name in names:
        while name := name.rpartition(".")[0]:
            found.add(name)
    return found


def _count(modules: Collection[str], stem: str) -> int:
    """How many of `stem.0`, `stem.1`, … there are."""
    return next(i for i in count() if f"{stem}.{i}" not in modules)


def _parts(names: Iterable[str], places: Mapping[str, str], inside: Mapping[str, Mapping[str, str]]) -> dict[str, Part]:
    """Rename modules as `places` says, and what is in them by the table of their kind, if it has one."""
    parts = {}
    for name in names:
        module = name
        while module and module not in places:
            module = module.rpartition(".")[0]
        rest = name[len(module) + 1 :]
        for kind, table in inside.items():
            if f".{kind}." in f".{module}.":
                layer, _, parameter = rest.rpartition(".")
                rest = f"{table.get(layer, '')}.{parameter}"
        if not module or rest.startswith("."):
            raise _no_place(name)
        parts[name] = Part(f"{places[module]}.{rest}")
    return parts


def _no_place(name: str) -> ValueError:
    return ValueError(f"{name} has no place in a single file; expected a network without adapters")
