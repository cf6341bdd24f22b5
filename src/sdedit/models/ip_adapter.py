"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): a picture as a second prompt.

An image encoder's features become a few image tokens, as wide as those of the text, and every layer that attends to the
text attends to them too, with keys and values of its own: out = attention(Q, K, V) + scale · attention(Q, K', V').

Parameter names are those of the published files, so that loading is `load_state_dict` without translation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdedit.models.attention import Attention, ImageKeysValues, attention
from sdedit.models.offload import refuse

Shapes = Mapping[str, torch.Size]

HEAD_DIM = 64  # channels of a head in the resampler


class ImageProjection(nn.Module):
    """The base adapter's: one linear layer from the image's embedding to all tokens."""

    kind, takes_hidden_states = "base", False

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        out, features = shapes["proj.weight"]
        width = shapes["norm.weight"][0]
        self.proj, self.norm = nn.Linear(features, out), nn.LayerNorm(width)
        self.features, self.width, self.tokens = features, width, out // width

    def forward(self, embeds: Tensor) -> Tensor:
        """(B, features) → (B, tokens, width)."""
        return self.norm(self.proj(embeds).unflatten(-1, (-1, self.width)))


class FullImageProjection(nn.Module):
    """The full-face adapter's: two linear layers, from each of the encoder's hidden states to a token."""

    kind, takes_hidden_states, tokens = "full-face", True, None

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        hidden, features = shapes["proj.0.weight"]
        width = shapes["proj.2.weight"][0]
        self.proj = nn.Sequential(nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, width), nn.LayerNorm(width))
        self.features, self.width = features, width

    def forward(self, embeds: Tensor) -> Tensor:
        """(B, M, features) → (B, M, width)."""
        return self.proj(embeds)


class _ResamplerAttention(nn.Module):
    """Attention of the tokens to the image's features and to themselves."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.heads = max(inner // HEAD_DIM, 1)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        """features (B, M, dim), tokens (B, N, dim) → (B, N, dim)."""
        features, tokens = self.norm1(features), self.norm2(tokens)
        key, value = self.to_kv(torch.cat([features, tokens], dim=1)).chunk(2, dim=-1)
        return self.to_out(attention(self.to_q(tokens), key, value, self.heads))


class Resampler(nn.Module):
    """The Plus adapter's: learned tokens that attend, layer after layer, to the image encoder's hidden states."""

    kind, takes_hidden_states = "Plus", True

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        _, self.tokens, dim = shapes["latents"]
        self.features, self.width = shapes["proj_in.weight"][1], shapes["proj_out.weight"][0]
        self.latents = nn.Parameter(torch.empty(1, self.tokens, dim))
        self.proj_in, self.proj_out = nn.Linear(self.features, dim), nn.Linear(dim, self.width)
        self.norm_out = nn.LayerNorm(self.width)
        depth = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
        self.layers = nn.ModuleList()
        for i in range(depth):
            inner, hidden = shapes[f"layers.{i}.0.to_q.weight"][0], shapes[f"layers.{i}.1.1.weight"][0]
            feed_forward = nn.Sequential(
                nn.LayerNorm(dim), nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False)
            )
            self.layers.append(nn.ModuleList([_ResamplerAttention(dim, inner), feed_forward]))

    def forward(self, embeds: Tensor) -> Tensor:
        """(B, M, features) → (B, tokens, width)."""
        features = self.proj_in(embeds)
        tokens = self.latents.expand(len(embeds), -1, -1)
        for layer in cast("Iterable[nn.ModuleList]", self.layers):
            tokens = tokens + layer[0](features, tokens)
            tokens = tokens + layer[1](tokens)
        return self.norm_out(self.proj_out(tokens))


class IPAdapter(nn.Module):
    """One file's networks: `image_proj`, and `ip_adapter`, keys and values for each layer that attends to the text."""

    def __init__(self, image_proj: nn.Module, layers: Mapping[str, Attention], width: int) -> None:
        super().__init__()
        self.image_proj = image_proj
        self.ip_adapter = nn.ModuleDict(
            {number: ImageKeysValues(width, layer.to_k.out_features) for number, layer in layers.items()}
        )


class ImageProjections(nn.Module):
    """The image projections of all adapters that a UNet has."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.image_projection_layers = nn.ModuleList(layers)

    def forward(self, image_embeds: Any) -> list[Tensor]:
        """For each adapter its images' features, (B, images, …) → their tokens, (B, images·tokens, width)."""
        if not isinstance(image_embeds, (list, tuple)) or len(image_embeds) != len(self.image_projection_layers):
            raise ValueError(
                f"added_cond_kwargs['image_embeds']: expected a list of {len(self.image_projection_layers)} tensors, "
                "one for each IP-Adapter"
            )
        projected = []
        for embeds, layer in zip(image_embeds, self.image_projection_layers, strict=True):
            tokens = layer(embeds.flatten(0, 1).to(next(layer.parameters()).dtype))
            projected.append(tokens.unflatten(0, embeds.shape[:2]).flatten(1, 2))
        return projected


def cross_attentions(unet: Any) -> dict[str, Attention]:
    """The layers that attend to the text, by their names, in the order in which adapter files number them.

    Down, up, then the middle; their numbers are 1, 3, 5, …: the even ones are the layers of self-attention.
    """
    found = {name: part for name, part in unet.named_modules() if name.endswith(".attn2")}
    return dict(sorted(found.items(), key=lambda item: item[0].startswith("mid_block")))


def replace_adapters(unet: Any, adapters: Sequence[IPAdapter]) -> None:
    """Give a UNet these adapters in place of those that it has; none of them takes all away."""
    refuse("IP-Adapters", unet)
    for i, layer in enumerate(cross_attentions(unet).values()):
        parts = [adapter.ip_adapter[str(2 * i + 1)] for adapter in adapters]
        layer.ip_adapters = nn.ModuleList(parts)
    unet.encoder_hid_proj = ImageProjections([adapter.image_proj for adapter in adapters]) if adapters else None


def projections(unet: Any) -> list[Any]:
    """The image projections of the adapters that a UNet has."""
    loaded = getattr(unet, "encoder_hid_proj", None)
    return [] if loaded is None else list(loaded.image_projection_layers)


def set_scales(unet: Any, scales: Sequence[float | dict[str, Any]]) -> None:
    """Set each adapter's scale: a number, or one for each block, see `block_scales`."""
    layers = cross_attentions(unet)
    expanded = [block_scales(unet, scale) for scale in scales]  # all are checked before any is set
    for i, by_block in enumerate(expanded):
        for name, layer in layers.items():
            cast("ImageKeysValues", layer.ip_adapters[i]).scale = by_block[name.split(".transformer_blocks")[0]]


def block_scales(unet: Any, scale: float | dict[str, Any], default: float = 0.0) -> dict[str, float]:
    """A scale for each attention of a UNet, by its name, such as `down_blocks.1.attentions.0`.

    Args:
        scale: A number for all, or `{"down": …, "mid": …, "up": …}`, for each of them a number or, as in
            `{"up": {"block_1": [0.0, 1.0, 0.0]}}`, one for each block, for each block a number or one for each layer.
        default: Scale of what is not named.

    Raises:
        ValueError: A part, block or layer that the UNet has not, or something that is no number.
    """
    names: dict[str, dict[str, list[str]]] = {"down": {}, "mid": {}, "up": {}}
    for name in dict.fromkeys(n.split(".transformer_blocks")[0] for n in cross_attentions(unet)):
        part, *rest = name.split(".")
        names[part.split("_")[0]].setdefault(f"block_{rest[0]}", []).append(name)
    names["mid"] = {"": [name for block in names["mid"].values() for name in block]}

    def numbers(value: Any, layers: list[str], where: str) -> dict[str, float]:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        values = values * len(layers) if len(values) == 1 else values
        if len(values) != len(layers) or not all(isinstance(v, (int, float)) and isfinite(v) for v in values):
            raise ValueError(f"scale of {where}: {value!r}; expected a number, or {len(layers)} of them")
        return dict(zip(layers, map(float, values), strict=True))

    found: dict[str, float] = {}
    parts = dict.fromkeys(names, scale) if not isinstance(scale, dict) else _filled(scale, names, default, "scale")
    for part, of_part in parts.items():
        blocks = names[part]
        if part != "mid" and isinstance(of_part, dict):
            of_part = _filled(of_part, blocks, default, f"scale of {part!r}")
        for block, layers in blocks.items():
            value = of_part[block] if isinstance(of_part, dict) and part != "mid" else of_part
            found |= numbers(value, layers, f"{part} {block}".strip())
    return found


def _filled(given: dict[str, Any], known: Mapping[str, Any], default: float, where: str) -> dict[str, Any]:
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"{where} names {unknown}; expected {', '.join(known) or 'nothing: it has no attention'}")
    return {key: given.get(key, default) for key in known}
