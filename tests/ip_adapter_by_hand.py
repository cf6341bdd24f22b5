"""IP-Adapters for the small model, in the layouts of published files."""

from __future__ import annotations

import torch

WIDTH, HIDDEN, EMBEDS = 32, 48, 24  # of the text, of the image encoder inside and at its end
State = dict[str, dict[str, torch.Tensor]]


def image_proj(kind: str) -> dict[str, list[int]]:
    """Names and shapes of a published file's first half."""
    if kind == "base":
        return {
            "proj.weight": [4 * WIDTH, EMBEDS],
            "proj.bias": [4 * WIDTH],
            "norm.weight": [WIDTH],
            "norm.bias": [WIDTH],
        }
    if kind == "full-face":
        shapes = {"proj.0.weight": [HIDDEN, HIDDEN], "proj.0.bias": [HIDDEN], "proj.2.weight": [WIDTH, HIDDEN]}
        return {**shapes, "proj.2.bias": [WIDTH], "proj.3.weight": [WIDTH], "proj.3.bias": [WIDTH]}
    dim, inner = 40, 128
    shapes = {"latents": [1, 6, dim], "proj_in.weight": [dim, HIDDEN], "proj_in.bias": [dim]}
    shapes |= {"proj_out.weight": [WIDTH, dim], "proj_out.bias": [WIDTH]}
    shapes |= {"norm_out.weight": [WIDTH], "norm_out.bias": [WIDTH]}
    for i in range(4):
        for name in ("0.norm1", "0.norm2", "1.0"):
            shapes |= {f"layers.{i}.{name}.{part}": [dim] for part in ("weight", "bias")}
        shapes |= {f"layers.{i}.0.to_q.weight": [inner, dim], f"layers.{i}.0.to_kv.weight": [2 * inner, dim]}
        shapes |= {f"layers.{i}.0.to_out.weight": [dim, inner]}
        shapes |= {f"layers.{i}.1.1.weight": [4 * dim, dim], f"layers.{i}.1.3.weight": [dim, 4 * dim]}
    return shapes


def adapter(kind: str = "base", seed: int = 0) -> State:
    """Random weights in the published layout: for the small UNet two layers down, three up, then the middle."""
    generator = torch.Generator().manual_seed(seed)

    def random(shape: list[int]) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator)
        return 1 + 0.1 * drawn if len(shape) == 1 else drawn / shape[-1] ** 0.5

    layers = {}
    for i, channels in enumerate([32, 32, 32, 32, 32, 64]):
        for part in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * i + 1}.{part}.weight"] = 3 * random([channels, WIDTH])
    return {"image_proj": {k: random(v) for k, v in image_proj(kind).items()}, "ip_adapter": layers}


def flat(state: State) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": tensor for part in state for name, tensor in state[part].items()}
