"""What the kinds of adapters add to a weight, as formulas, each brought to the one form ΔW = up · down · alpha / rank.

W is a linear layer's weight (out, in) or a convolution's (out, in, k, k). Written so, PEFT's LoRA layer serves all
kinds, with scales, fusing, DoRA and saving:

- LoRA, LoCon:  ΔW = up · down; with Tucker's core, down' = Σ_q mid[p,q,k] · down[q,i].
- LoHa:         ΔW = (a1·b1) ⊙ (a2·b2), which is a product of rank r²: Σ_rs (a1[o,r] a2[o,s]) · (b1[r,i] b2[s,i]).
- LoKr:         ΔW = w1 ⊗ w2, and (a1·b1) ⊗ (a2·b2) = (a1 ⊗ a2) · (b1 ⊗ b2).
- full:         ΔW itself, up or down being the identity; the others too where their rank would exceed that of W.

LoHa: arXiv 2108.06098. LoKr, Tucker: arXiv 2309.14859. DoRA: arXiv 2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from sdedit.models.adapters import Factors

Roles = Mapping[str, Tensor]
Pair = tuple[Tensor, Tensor]  # (out, r) and (r, in·k·k)


def kind(roles: Roles) -> str | None:
    """Which kind the tensors of one module make up; `None` if a part of it is missing."""
    held = set(roles)
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= held:
        return "LoHa"
    if any(held >= w1 | w2 for w1 in _parts("lokr_w1") for w2 in _parts("lokr_w2")):
        return "LoKr"
    if {"down", "up"} <= held:
        return "LoRA"
    return "full" if held & {"diff", "diff_b"} and not held & {"down", "up"} else None


def _parts(name: str) -> tuple[set[str], set[str]]:
    return {name}, {f"{name}_a", f"{name}_b"}


def stored_rank(roles: Roles) -> int | None:
    """The rank that alpha is divided by; `None` for kinds that have none."""
    for name, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if name in roles:
            return int(roles[name].shape[axis])
    return None


def check(roles: Roles, shape: torch.Size) -> str | None:
    """Why these tensors do not fit a weight of that shape, or `None`; nothing is read but shapes and dtypes."""
    limit = max(shape[0], math.prod(shape[1:]))
    for name, tensor in roles.items():
        if not tensor.is_floating_point() and name != "alpha":
            return f"{name} holds {tensor.dtype}, not floats"
        if not tensor.numel() or tensor.numel() > limit**2:
            return f"{name} is {list(tensor.shape)}, {'too large' if tensor.numel() else 'empty'}"
    if not _fits(roles, shape):
        return ", ".join(f"{name} is {list(tensor.shape)}" for name, tensor in roles.items())
    for name in ("diff_b", "up_bias"):
        if name in roles and roles[name].shape != shape[:1]:
            return f"{name} is {list(roles[name].shape)}"
    if "dora" in roles and roles["dora"].numel() not in (shape[0], shape[1]):
        return f"the DoRA scale is {list(roles['dora'].shape)}"
    if "dora" in roles and {"diff_b", "up_bias"} & set(roles):
        return "there is a bias beside the DoRA scale, which no known program writes"
    return None


def _fits(roles: Roles, shape: torch.Size) -> bool:
    if "down" in roles and "mid" not in roles:  # the common case, without computing
        down, up = roles["down"].shape, roles["up"].shape
        return (
            min(len(down), len(up)) > 1
            and up[0] == shape[0]
            and up.numel() == up[0] * down[0]
            and down[1:].numel() == shape[1:].numel()
        )
    try:
        made = factors({n: torch.empty_like(t, device="meta") for n, t in roles.items() if n != "alpha"}, shape)
    except (RuntimeError, IndexError):
        return False
    return (len(made.up), *made.down.shape[1:]) == tuple(shape)


def factors(roles: Roles, shape: torch.Size, alpha: float | None = None, weight: Tensor | None = None) -> Factors:
    """The two factors of ΔW for a weight of that shape.

    Args:
        roles: Tensors of one module, by their part in the kind's formula.
        alpha: Scale times rank; the rank if not given.
        weight: The layer's own, which DoRA along the input axis needs.
    """
    rank = stored_rank(roles)
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    left, right = _pair(roles, shape)
    bias = roles["up_bias"] * scale if "up_bias" in roles else roles.get("diff_b")
    magnitude = roles.get("dora")
    if magnitude is not None and _along_input(magnitude, shape):
        if weight is not None:
            left, right = _narrow(
                _dora_of_columns(weight, (left.float() @ right.float() * scale).reshape(shape), magnitude).flatten(1)
            )
            scale = 1.0
        magnitude = None
    inner = left.shape[1]
    return Factors(
        down=right.reshape(inner, *shape[1:]),
        up=left.reshape(shape[0], inner, *(1 for _ in shape[2:])),
        alpha=alpha if alpha is not None and inner == rank and scale == alpha / rank else scale * inner,
        magnitude=None if magnitude is None else magnitude.flatten(),
        bias=bias,
    )


def _pair(roles: Roles, shape: torch.Size) -> Pair:
    which = kind(roles)
    if which == "LoRA":
        down, up = roles["down"].flatten(1), roles["up"].flatten(1)
        return (up, _with_core(roles["mid"], down)) if "mid" in roles else (up, down)
    if which == "LoHa":
        (a1, b1), (a2, b2) = (_hada(roles, i) for i in (1, 2))
        pair = (a1[:, :, None] * a2[:, None, :]).flatten(1), (b1[:, None, :] * b2[None, :, :]).flatten(0, 1)
    elif which == "LoKr":
        (a1, b1), (a2, b2) = (_lokr(roles, i) for i in (1, 2))
        pair = torch.kron(a1, a2), torch.kron(b1, b2)
    elif "diff" in roles:
        return _narrow(roles["diff"].flatten(1))
    else:  # only the bias changes
        return roles["diff_b"].new_zeros(shape[0], 1), roles["diff_b"].new_zeros(1, math.prod(shape[1:]))
    full = min(shape[0], math.prod(shape[1:]))
    return _narrow(pair[0] @ pair[1]) if pair[0].shape[1] > full else pair


def _narrow(delta: Tensor) -> Pair:
    """ΔW (out, n) as a product with the smaller of the two identities."""
    out, width = delta.shape
    if out <= width:
        return torch.eye(out, device=delta.device, dtype=delta.dtype), delta
    return delta, torch.eye(width, device=delta.device, dtype=delta.dtype)


def _with_core(core: Tensor, right: Tensor) -> Tensor:
    """Tucker's core (p, q, k, k) times (q, in): (p, in·k·k)."""
    return torch.einsum("pqk,qi->pik", core.float().flatten(2), right.float()).flatten(1)


def _hada(roles: Roles, i: int) -> Pair:
    a, b = roles[f"hada_w{i}_a"].float(), roles[f"hada_w{i}_b"].float()
    if f"hada_t{i}" in roles:  # then w*_a is (r, out)
        return a.T, _with_core(roles[f"hada_t{i}"], b)
    return a, b.flatten(1)


def _lokr(roles: Roles, i: int) -> Pair:
    if f"lokr_w{i}" in roles:
        return _narrow(roles[f"lokr_w{i}"].float().flatten(1))
    a, b = roles[f"lokr_w{i}_a"].float(), roles[f"lokr_w{i}_b"].float()
    if f"lokr_t{i}" in roles:  # then w2_a is (r, out)
        return a.T.contiguous(), _with_core(roles[f"lokr_t{i}"], b)
    return a, b.flatten(1)


def _along_input(magnitude: Tensor, shape: torch.Size) -> bool:
    """Is it a length for each column, (1, in) or (1, in, 1, 1), instead of each row?"""
    return magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == shape[1] and shape[0] != 1


def _dora_of_columns(weight: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA with the columns' lengths: magnitude · (W + ΔW) / ‖W + ΔW‖ − W, an ordinary ΔW from there on."""
    own = weight.detach().float()
    moved = own + delta.to(own)
    others = [axis for axis in range(moved.ndim) if axis != 1]
    lengths = torch.linalg.vector_norm(moved, dim=others, keepdim=True)
    return moved * (magnitude.to(own).reshape(lengths.shape) / lengths) - own
