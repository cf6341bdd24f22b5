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
import re
from collections.abc import Mapping

from sdedit.adapters import arrays
from sdedit.adapters.arrays import Array, Shape, flat, wide
from sdedit.models.factors import Factors

Roles = Mapping[str, Array]
Pair = tuple[Array, Array]  # (out, r) and (r, in·k·k)


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


def check(roles: Roles, shape: Shape) -> str | None:
    """Why these tensors do not fit a weight of that shape, or `None`; nothing is read but shapes and dtypes."""
    limit = max(shape[0], math.prod(shape[1:]))
    for name, tensor in roles.items():
        if not arrays.is_float(tensor) and name != "alpha":
            return f"{name} holds {tensor.dtype}, not floats"
        count = arrays.size(tensor)
        if not count or count > limit**2:
            return f"{name} is {list(tensor.shape)}, {'too large' if count else 'empty'}"
    for name, rank in _inner_ranks(roles):
        if rank > limit:  # no change has more than the shorter side, and no program writes more than the longer
            return f"{name} is {list(roles[name].shape)}, of a rank above {limit}"
    if not _fits(roles, shape):
        return ", ".join(f"{name} is {list(tensor.shape)}" for name, tensor in roles.items())
    for name in ("diff_b", "up_bias"):
        if name in roles and tuple(roles[name].shape) != tuple(shape[:1]):
            return f"{name} is {list(roles[name].shape)}"
    if "dora" in roles and arrays.size(roles["dora"]) not in (shape[0], shape[1]):
        return f"the DoRA scale is {list(roles['dora'].shape)}"
    if "dora" in roles and {"diff_b", "up_bias"} & set(roles):
        return "there is a bias beside the DoRA scale, which no known program writes"
    return None


def _inner_ranks(roles: Roles) -> list[tuple[str, int]]:
    """The ranks that are multiplied out, each with the tensor that says it: those of LoHa, LoKr and Tucker's cores.

    Files of a few bytes may have large ones; a plain LoRA's are in proportion to its file.
    """
    found = [(n, int(t.shape[0])) for n, t in roles.items() if re.fullmatch(r"hada_w[12]_b|lokr_w[12]_b", n) and t.ndim]
    return found + [(n, max(t.shape[:2])) for n, t in roles.items() if n in ("mid", "hada_t1", "hada_t2", "lokr_t2")]


def _fits(roles: Roles, shape: Shape) -> bool:
    if "down" in roles and "mid" not in roles:  # the common case, without computing
        down, up = roles["down"].shape, roles["up"].shape
        return (
            min(len(down), len(up)) > 1
            and up[0] == shape[0]
            and math.prod(up) == up[0] * down[0]
            and math.prod(down[1:]) == math.prod(shape[1:])
        )
    if not _multiplies_to(roles, shape):
        return False
    try:
        made = factors({n: _shape_only(t) for n, t in roles.items() if n != "alpha"}, shape)
    except (RuntimeError, IndexError, ValueError):
        return False
    return (len(made.up), *made.down.shape[1:]) == tuple(shape)


def _multiplies_to(roles: Roles, shape: Shape) -> bool:
    """Do the two parts of a LoHa or LoKr come to as many rows and columns as the weight has? Nothing is computed."""
    sides = []
    for part in ("hada_w1", "hada_w2", "lokr_w1", "lokr_w2"):
        if part in roles:
            sides.append((roles[part].shape[0], math.prod(roles[part].shape[1:])))
        elif f"{part}_a" in roles and f"{part}_b" in roles:
            a, b = roles[f"{part}_a"].shape, roles[f"{part}_b"].shape
            core = roles.get(part.replace("_w", "_t"))
            sides.append(
                (a[0] if core is None else a[-1], math.prod(b[1:]) * (1 if core is None else math.prod(core.shape[2:])))
            )
    if len(sides) != 2:
        return True
    (rows, columns), (more_rows, more_columns) = sides
    if "hada_w1_a" in roles:
        return sides[0] == sides[1] == (shape[0], math.prod(shape[1:]))
    return (rows * more_rows, columns * more_columns) == (shape[0], math.prod(shape[1:]))


def _shape_only(tensor: Array) -> Array:
    """PyTorch can follow shapes without computing; for other arrays the factors are made twice."""
    return arrays.library(tensor).empty_like(tensor, device="meta") if arrays.is_torch(tensor) else tensor


def factors(
    roles: Roles, shape: Shape, alpha: float | None = None, weight: Array | None = None, rank: int | None = None
) -> Factors:
    """The two factors of ΔW for a weight of that shape.

    Args:
        roles: Arrays of one module, by their part in the kind's formula.
        alpha: Scale times rank; the rank if not given.
        weight: The layer's own, which DoRA along the input axis needs.
        rank: What alpha is divided by; that of the tensors if not given, and without any the scale is 1.
    """
    rank = stored_rank(roles) if rank is None else rank
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    left, right = _pair(roles, shape)
    bias = roles["up_bias"] * scale if "up_bias" in roles else roles.get("diff_b")
    magnitude = roles.get("dora")
    if magnitude is not None and _along_input(magnitude, shape):
        if weight is not None:
            left, right = _narrow(
                flat(_dora_of_columns(weight, (wide(left) @ wide(right) * scale).reshape(shape), magnitude))
            )
            scale = 1.0
        magnitude = None
    inner = left.shape[1]
    kept = alpha is not None and rank is not None and inner == rank and scale == alpha / rank
    return Factors(
        down=right.reshape(inner, *shape[1:]),
        up=left.reshape(shape[0], inner, *(1 for _ in shape[2:])),
        alpha=float(alpha or 0) if kept else scale * inner,
        magnitude=None if magnitude is None else magnitude.reshape(-1),
        bias=bias,
    )


def _pair(roles: Roles, shape: Shape) -> Pair:
    which = kind(roles)
    full = min(shape[0], math.prod(shape[1:]))
    if which == "LoRA":
        down, up = flat(roles["down"]), flat(roles["up"])
        return _tucker(up, roles["mid"], down) if "mid" in roles else (up, down)
    if which == "LoHa":
        (a1, b1), (a2, b2) = (_hada(roles, i) for i in (1, 2))
        if a1.shape[1] * a2.shape[1] > full:
            return _narrow((a1 @ b1) * (a2 @ b2))
        pair = flat(a1[:, :, None] * a2[:, None, :]), (b1[:, None, :] * b2[None, :, :]).reshape(-1, b1.shape[1])
    elif which == "LoKr":
        (a1, b1), (a2, b2) = (_no_wider(*_lokr(roles, i)) for i in (1, 2))
        kron = arrays.library(a1).kron
        pair = kron(a1, a2), kron(b1, b2)
    elif "diff" in roles:
        return _narrow(flat(roles["diff"]))
    else:  # only the bias changes
        bias = roles["diff_b"]
        return arrays.zeros((shape[0], 1), bias), arrays.zeros((1, math.prod(shape[1:])), bias)
    return _narrow(pair[0] @ pair[1]) if pair[0].shape[1] > full else pair


def _narrow(delta: Array) -> Pair:
    """ΔW (out, n) as a product with the smaller of the two identities."""
    out, width = delta.shape
    if out <= width:
        return arrays.identity(out, delta), delta
    return delta, arrays.identity(width, delta)


def _no_wider(left: Array, right: Array) -> Pair:
    """A product of matrices with no more inner columns than it needs, so that no file makes more of it than it is."""
    return _narrow(left @ right) if left.shape[1] > min(left.shape[0], right.shape[1]) else (left, right)


def _tucker(left: Array, core: Array, right: Array) -> Pair:
    """(out, p) times Tucker's core (p, q, k, k) times (q, in): (out, r) and (r, in·k·k).

    The core goes to the side that it makes no larger than the weight is.
    """
    core = wide(core).reshape(*core.shape[:2], -1)
    einsum = arrays.library(core).einsum
    if core.shape[0] <= left.shape[0]:
        return left, flat(einsum("pqk,qi->pik", core, wide(right)))
    return _narrow(flat(einsum("oqk,qi->oik", einsum("op,pqk->oqk", wide(left), core), wide(right))))


def _hada(roles: Roles, i: int) -> Pair:
    a, b = wide(roles[f"hada_w{i}_a"]), wide(roles[f"hada_w{i}_b"])
    if f"hada_t{i}" in roles:  # then w*_a is (r, out)
        return _tucker(a.T, roles[f"hada_t{i}"], b)
    return a, flat(b)


def _lokr(roles: Roles, i: int) -> Pair:
    if f"lokr_w{i}" in roles:
        return _narrow(flat(wide(roles[f"lokr_w{i}"])))
    a, b = wide(roles[f"lokr_w{i}_a"]), wide(roles[f"lokr_w{i}_b"])
    if f"lokr_t{i}" in roles:  # then w2_a is (r, out)
        return _tucker(arrays.contiguous(a.T), roles[f"lokr_t{i}"], b)
    return a, flat(b)


def _along_input(magnitude: Array, shape: Shape) -> bool:
    """Is it a length for each column, (1, in) or (1, in, 1, 1), instead of each row?"""
    return magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == shape[1] and shape[0] != 1


def _dora_of_columns(weight: Array, delta: Array, magnitude: Array) -> Array:
    """DoRA with the columns' lengths: magnitude · (W + ΔW) / ‖W + ΔW‖ − W, an ordinary ΔW from there on."""
    own = wide(weight)
    moved = own + delta
    others = tuple(axis for axis in range(moved.ndim) if axis != 1)
    lengths = (moved**2).sum(others, keepdims=True) ** 0.5
    return moved * (wide(magnitude).reshape(lengths.shape) / lengths) - own
