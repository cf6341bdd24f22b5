"""A network run on feature maps of which only tiles exist: exact, in a fraction of the memory.

Tiles that know nothing of each other leave seams, because a GroupNorm's statistics are those of the whole map. Here a
tile is some rows over the whole width, and a layer that is called with a `TiledMap` instead of a tensor computes
nothing yet: it gives another, which can make its rows from rows of the first, a convolution from as many more above and
below as its kernel reaches. Only a norm reads its input through, for the statistics; what it reads is kept if the
budget allows, and made again at the next reading if not. The network's own `forward` runs as it is, by
`__torch_function__`; a function that is not known here gets the whole tensor.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdedit.models.fast.quick_layers import convolve_doubled

# Bytes and rows of a tile: little beside the maps that are kept (every layer since the last one that is kept has a
# tile or two), and enough for convolutions to be efficient.
_TILE = 4 << 20
_TILES_IN_BUDGET = 64
_ROWS = 8
_BEHIND = 4

Make = Callable[[int, int], Tensor]  # first row, row after the last → (B, C, rows, W)


class Budget:
    """How many bytes of feature maps may be kept at once.

    Args:
        size: Bytes.
        reserve: Bytes of them that are left to sums. They end residual blocks: what is read after one that is
            kept is computed from there, and not from further back.
    """

    def __init__(self, size: int, reserve: int = 0) -> None:
        self.size, self.reserve = size, reserve
        self._kept: weakref.WeakSet[TiledMap] = weakref.WeakSet()

    def allows(self, rows: TiledMap) -> bool:
        """May this one be kept too?"""
        used = sum(kept.nbytes for kept in self._kept if kept.tensor is not None)
        return used + rows.nbytes + (0 if rows.is_sum else self.reserve) <= self.size

    def count(self, rows: TiledMap) -> None:
        """It is kept from now on, until nobody needs it."""
        self._kept.add(rows)


class TiledMap:
    """A feature map (B, C, H, W) whose rows are made when they are read.

    Attributes:
        tensor: The whole, if it is kept.
        cheap: A norm's output: an activation reads it, once, so its rows need not be kept for the next reading.
        is_sum: Is it the sum of two maps?
        replaces: A map of the same shape that nobody reads once this one is kept: the input of a residual block.
        readers: How many maps are made from it: the input of a residual block has two.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, budget: Budget, make: Make) -> None:
        self.shape, self.dtype, self.budget = torch.Size(shape), dtype, budget
        self._make = make
        self._made: list[tuple[int, Tensor]] = []  # tiles that may be read again, each with its first row
        self.tensor: Tensor | None = None
        self.cheap = False
        self.is_sum = False
        self.replaces: TiledMap | None = None
        self.readers = 0

    def like(self, make: Make, shape: Sequence[int] | None = None) -> TiledMap:
        """Another map, of the same budget and, if none is given, of the same shape."""
        return TiledMap(self.shape if shape is None else shape, self.dtype, self.budget, make)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def step(self) -> int:
        """Rows of a tile: all have as many, but for the last."""
        size = min(_TILE, self.budget.size // _TILES_IN_BUDGET)
        count = -(-self.shape[2] // max(size * self.shape[2] // self.nbytes, _ROWS))
        return -(-self.shape[2] // count)

    def read(self, top: int, bottom: int) -> Tensor:
        """Rows (B, C, bottom - top, W).

        Whole tiles are made: oneDNN keeps a compiled convolution, and memory for it, for each shape it has seen.
        """
        if self.tensor is not None:
            return self.tensor[:, :, top:bottom]
        if top == bottom:  # beside a map that is padded
            return self.read(max(top - 1, 0), max(top, 1))[:, :, :0]
        step, height = self.step, self.shape[2]
        if not self._made or not self._made[0][0] <= top <= _end(self._made[-1]):
            self._made = []
        end = _end(self._made[-1]) if self._made else top // step * step
        while end < bottom:
            self._made.append((end, self._make(end, min(end + step, height))))
            end = _end(self._made[-1])
        # What another reader has still to read: it may be a few tiles behind.
        unread = top if self.readers < 2 else top - _BEHIND * step
        self._made = [tile for tile in self._made if _end(tile) > unread]
        wanted = [tile for tile in self._made if tile[0] < bottom and _end(tile) > top]
        parts = [rows[:, :, max(top - first, 0) : bottom - first] for first, rows in wanted]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def sweep(self, keep: bool) -> Iterator[Tensor]:
        """All rows, from the top, a tile at a time; if asked, the whole is kept when they have been read."""
        step = self.step
        whole = self._place() if keep else None
        waiting: tuple[int, Tensor] | None = None
        for top in range(0, self.shape[2], step):
            rows = self.read(top, min(top + step, self.shape[2]))
            # One tile late: where the whole replaces another map, the rows beside a tile are still to be read.
            if whole is not None and waiting is not None:
                whole[:, :, waiting[0] : top] = waiting[1]
            waiting = (top, rows)
            yield rows
        if whole is not None and waiting is not None:
            whole[:, :, waiting[0] :] = waiting[1]
            self._keep(whole)

    def _place(self) -> Tensor:
        """Memory for the whole: that of the map which it replaces, if there is one."""
        if self.replaces is not None and self.replaces.tensor is not None:
            return self.replaces.tensor
        example = self.read(0, 1)
        whole = torch.empty(self.shape, dtype=self.dtype, device=example.device, memory_format=torch.channels_last)
        return whole

    def _keep(self, whole: Tensor) -> None:
        if self.replaces is not None and self.replaces.tensor is whole:
            self.replaces.tensor = None
            self.replaces._make = _replaced
        self.tensor, self.replaces, self._make, self._made = whole, None, _replaced, []
        self.budget.count(self)

    def settle(self) -> None:
        """Keep the end of a residual block, before many rows of something else are made from it."""
        if self.is_sum and self.fits():
            self.whole()

    def fits(self) -> bool:
        """Can the whole be kept within the budget?"""
        in_place = self.replaces is not None and self.replaces.tensor is not None
        return self.tensor is None and (in_place or self.budget.allows(self))

    def whole(self) -> Tensor:
        """The whole tensor, whatever the budget."""
        if self.tensor is None:
            for _ in self.sweep(keep=True):
                pass
        assert self.tensor is not None
        return self.tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS and (made := _FUNCTIONS[func](func, *args, **kwargs)) is not NotImplemented:
            for source in args:
                if isinstance(source, TiledMap):
                    source.readers += 1
            return made

        def whole(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(whole(v) for v in value)
            return value.whole() if isinstance(value, TiledMap) else value

        return func(*whole(args), **{name: whole(value) for name, value in kwargs.items()})

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Itself for another device: tiles are made where the network's weights are."""
        if len(args) == 1 and isinstance(args[0], (str, int, torch.device)):
            return self
        return self.whole().to(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # A tensor's methods and attributes that are not here.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.whole(), name)

    def __add__(self, other: Any) -> Any:
        return torch.add(self, other)  # type: ignore[call-overload]

    def __sub__(self, other: Any) -> Any:
        return torch.sub(self, other)  # type: ignore[call-overload]

    def __mul__(self, other: Any) -> Any:
        return torch.mul(self, other)  # type: ignore[arg-type]

    def __truediv__(self, other: Any) -> Any:
        return torch.div(self, other)  # type: ignore[arg-type]


def run(network: Callable[[Any], Any], x: Tensor, budget: Budget) -> Tensor:
    """`network(x)` for x (B, C, H, W), a tile at a time."""
    made = network(TiledMap(x.shape, x.dtype, budget, lambda top, bottom: x[:, :, top:bottom]))
    return made.whole() if isinstance(made, TiledMap) else made


def _end(tile: tuple[int, Tensor]) -> int:
    """The row after the last of a tile."""
    return tile[0] + tile[1].shape[2]


def _replaced(top: int, bottom: int) -> Tensor:
    raise RuntimeError("tiles: a feature map is read after the one that took its place: not a network for tiles")


def _pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Functions of single values, of one map or several of the same shape."""
    maps = [a for a in args if isinstance(a, TiledMap) or (isinstance(a, Tensor) and a.ndim)]
    source = next(a for a in maps if isinstance(a, TiledMap))
    if any(a.shape != source.shape for a in maps):
        return NotImplemented  # Python and `__torch_function__` both take this for "not here"
    kwargs.pop("inplace", None)

    def make(top: int, bottom: int) -> Tensor:
        def rows(value: Any) -> Any:
            if isinstance(value, TiledMap):
                return value._make(top, bottom) if value.cheap and value.tensor is None else value.read(top, bottom)
            return value[:, :, top:bottom] if isinstance(value, Tensor) and value.ndim else value

        return func(*[rows(a) for a in args], **kwargs)  # type: ignore[no-any-return]

    made = source.like(make)
    made.is_sum = func is torch.add and len(maps) == 2
    if made.is_sum and isinstance(args[0], TiledMap):
        made.replaces = args[0]
    return made


def _conv2d(
    func: Any,
    x: Any,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    *rest: Any,
) -> Any:
    (down, across), pad, dilation = _pair(stride), _pair(padding), _pair(dilation)
    if not isinstance(x, TiledMap) or isinstance(padding, str) or dilation != (1, 1):
        return NotImplemented
    (B, _C, H, W), (kernel, width) = x.shape, weight.shape[2:]

    def make(top: int, bottom: int) -> Tensor:
        first, end = top * down - pad[0], (bottom - 1) * down - pad[0] + kernel
        rows = x.read(max(first, 0), min(end, H))
        if first < 0 or end > H:
            rows = F.pad(rows, (0, 0, max(-first, 0), max(end - H, 0)))
        return F.conv2d(rows, weight, bias, (down, across), (0, pad[1]), 1, *rest)

    size = (H + 2 * pad[0] - kernel) // down + 1, (W + 2 * pad[1] - width) // across + 1
    return x.like(make, (B, len(weight), *size))


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _group_norm(func: Any, x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    B, C, _H, _W = x.shape
    found = []
    for rows in [x.tensor] if x.tensor is not None else x.sweep(keep=x.fits()):
        values = rows.float()
        mean = values.mean((2, 3))
        variance = (values - mean[:, :, None, None]).square_().mean((2, 3))  # torch.var_mean takes longer
        found.append((torch.tensor(rows.shape[2], device=rows.device).expand(B, C), mean, variance))
    # (B, groups, parts): the channels of a group, and of each its tiles.
    count, mean, variance = (torch.stack(part, 2).view(B, groups, -1) for part in zip(*found, strict=True))
    share = count / count.sum(2, keepdim=True)
    middle = (share * mean).sum(2, keepdim=True)
    variance = (share * (variance + (mean - middle) ** 2)).sum(2, keepdim=True)
    scale = (variance + eps).rsqrt().expand(B, groups, C // groups).reshape(B, C)
    shift = -middle.expand(B, groups, C // groups).reshape(B, C) * scale
    if weight is not None:
        scale, shift = scale * weight, shift * weight + bias
    scale, shift = scale[:, :, None, None].float(), shift[:, :, None, None].float()
    made = x.like(lambda top, bottom: torch.addcmul(shift, x.read(top, bottom), scale).to(x.dtype))
    made.cheap = True
    return made


def _pad(func: Any, x: Any, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Any:
    if len(pad) != 4 or min(pad) < 0 or mode != "constant" or value:
        return NotImplemented
    x.settle()
    B, C, H, W = x.shape
    left, right, above, below = pad

    def make(top: int, bottom: int) -> Tensor:
        first, end = top - above, bottom - above
        rows = x.read(min(max(first, 0), H), min(max(end, 0), H))
        return F.pad(rows, (left, right, max(min(end, 0) - first, 0), max(end - max(first, H), 0)))

    return x.like(make, (B, C, above + H + below, left + W + right))


def _convolve_doubled(func: Any, x: Any, kernels: Any, bias: Any) -> Any:
    B, _C, H, W = x.shape

    def make(top: int, bottom: int) -> Tensor:
        first = top // 2
        rows = func(x.read(first, (bottom + 1) // 2 + 2), kernels, bias)
        return rows[:, :, top - 2 * first : bottom - 2 * first]

    return x.like(make, (B, len(kernels[0]), 2 * H - 4, 2 * W - 4))


def _interpolate(
    func: Any, x: Any, size: Any = None, scale_factor: Any = None, mode: str = "nearest", *_: Any, **__: Any
) -> Any:
    B, C, H, W = x.shape
    factor = int(scale_factor if scale_factor is not None else size[0] // H)
    if mode != "nearest" or scale_factor not in (None, factor) or size not in (None, (factor * H, factor * W)):
        return NotImplemented
    x.settle()

    def make(top: int, bottom: int) -> Tensor:
        first = top // factor
        rows = F.interpolate(x.read(first, -(-bottom // factor)), scale_factor=factor, mode="nearest")
        return rows[:, :, top - first * factor : bottom - first * factor]

    return x.like(make, (B, C, factor * H, factor * W))


_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((F.silu, F.relu, F.gelu, F.mish, torch.relu, torch.tanh, F.dropout), _pointwise),
    **dict.fromkeys((torch.add, torch.sub, torch.mul, torch.div), _pointwise),
    F.conv2d: _conv2d,
    F.group_norm: _group_norm,
    F.pad: _pad,
    F.interpolate: _interpolate,
    convolve_doubled: _convolve_doubled,
}
