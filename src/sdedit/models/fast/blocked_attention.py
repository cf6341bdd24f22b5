"""Attention in bfloat16 on a CPU, a block of queries at a time."""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sdedit.models.attention import Attention, SpatialAttention, attention

_MANY = 256  # queries and keys; with fewer, PyTorch's own is as fast
_SCORES = 2**21  # of a block: 512 queries and 4,096 keys, 4 MiB
_OCTAVE = 128  # steps of bfloat16's bits from a power of two to the next
_ONE = 127 * _OCTAVE  # bfloat16's bits of 1
_FAR = 100 * _OCTAVE  # scores within ±100 octaves: neither they nor their sums leave bfloat16's range


def _attend(layer: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    core = fastest if layer.core is None else layer.core
    return attention(query, key, value, layer.heads, upcast=layer.upcast, core=core)


class BlockedAttention(Attention):
    """Attention whose core is `fastest`, unless the user has chosen one."""

    attend = _attend


class BlockedSpatialAttention(SpatialAttention):
    """The VAE's, likewise."""

    attend = _attend


def fastest(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention by PyTorch, or in blocks where that is faster, in the shapes of `Core`."""
    many = min(query.shape[2], key.shape[2]) >= _MANY
    if many and query.dtype == torch.bfloat16 and query.device.type == "cpu" and not torch.is_grad_enabled():
        return _bfloat16_on_cpu(query, key, value)
    return F.scaled_dot_product_attention(query, key, value)


@functools.cache
def _blocks_are_faster() -> bool:
    """With CPUs that multiply bfloat16 in vectors but not in tiles: there PyTorch's kernel takes 1.5 times as long."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16")) and not capabilities.get("amx_tile")


@torch.library.custom_op("sdedit::bfloat16_attention", mutates_args=())
def _bfloat16_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One operation to torch.compile, which would write the loop out."""
    core = in_blocks if _blocks_are_faster() else F.scaled_dot_product_attention
    return core(query, key, value).transpose(1, 2).contiguous().transpose(1, 2)


@_bfloat16_on_cpu.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    B, heads, N, d = query.shape
    return query.new_empty(B, N, heads, d).transpose(1, 2)


def in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in bfloat16 a block of queries at a time, whose scores stay in the cache, in the shapes of `Core`.

    Scores come as steps of bfloat16's bits, so that a sum of integers makes exponentials of them (Schraudolph 1999,
    doi 10.1162/089976699300016467): exact at powers of two, a chord between them. A column of ones in the values sums
    them. Scores are rounded to bfloat16; so the mean is taken off the keys, which changes no softmax and makes scores
    smaller, and the scale goes into the keys, before they are rounded.
    """
    B, heads, N, d = query.shape
    keys = (key.float() - key.float().mean(2, keepdim=True)) * (d**-0.5 * _OCTAVE / math.log(2))
    farthest = query.float().norm(dim=-1).amax(-1) * keys.norm(dim=-1).amax(-1)  # that a score can be from 0
    far = (farthest > _FAR).tolist()
    keys = keys.to(key.dtype).transpose(2, 3)
    values = F.pad(F.pad(value, (0, 1), value=1.0), (0, -(d + 1) % 16))  # vectors of 16
    out = query.new_empty(B, N, heads, d).transpose(1, 2)
    size = min(max(_SCORES // key.shape[2], 16), N)
    room = query.new_empty(size, key.shape[2])
    for b, head in itertools.product(range(B), range(heads)):
        k, v = keys[b, head], values[b, head]
        for q, block in zip(query[b, head].split(size), out[b, head].split(size), strict=True):
            scores = torch.mm(q, k, out=room[: len(q)])
            if far[b][head]:
                scores.sub_(scores.amax(-1, keepdim=True)).clamp_(min=-_FAR)
            bits = scores.view(torch.int16)
            bits.copy_(scores).add_(_ONE)
            found = torch.mm(scores, v)
            torch.div(found[:, :d], found[:, d : d + 1], out=block)
    return out
