"""Weights laid out as oneDNN multiplies them; PyTorch lays them out anew in every call.

On a CPU that is a tenth of the time of a layer with many weights and few pixels, or more. Which layout is best depends
on the size of the input, and on the number of threads. So a weight has a copy in each layout that was asked for, up to
`LAYOUTS` of them, the last used: they take at most that many times the memory of the weights, and mostly once, because
most sizes and numbers of pictures have the same. Copies live as long as the weights and serve all runs in all threads;
before a run uses one, it is made sure that it is of the weights as they are.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary, WeakIdRef

from sdedit.models.fast.passes import Pass

LAYOUTS = 2  # copies of a weight at the most
_SHAPES = 256  # of inputs whose layout is remembered, for each weight

Pack = Callable[[], Tensor]


class Layouts:
    """The packed copies of one weight as it is now.

    Args:
        weight: The plain one.
    """

    def __init__(self, weight: Tensor) -> None:
        self._weight, self._place = WeakIdRef(weight), _place(weight)
        self._sums = _row_sums(weight)
        self._lock = threading.Lock()
        self._copies: OrderedDict[bytes, Tensor] = OrderedDict()  # by layout, the last used last
        self._layout_of: dict[Hashable, bytes] = {}  # by the shape of the input

    def fit(self, weight: Tensor) -> bool:
        """Were they made of this weight, and has it not been changed since?

        PyTorch counts changes that are made openly; for those through `.data` see `equal`.
        """
        return self._weight() is weight and self._place == _place(weight)

    def equal(self, weight: Tensor) -> bool:
        """Has the weight still the bits that they were made of?"""
        return self.fit(weight) and torch.equal(self._sums, _row_sums(weight))

    def copy_for(self, shape: Hashable, pack: Pack) -> Tensor:
        """The copy for inputs of a shape; `pack` makes one. One thread packs, others wait for it."""
        with self._lock:
            layout = self._layout_of.get(shape)
            if layout is not None and layout in self._copies:
                self._copies.move_to_end(layout)
                return self._copies[layout]
            made = pack()
            layout = _layout(made)
            if len(self._layout_of) >= _SHAPES:
                self._layout_of.clear()
            self._layout_of[shape] = layout
            made = self._copies.setdefault(layout, made)
            self._copies.move_to_end(layout)
            while len(self._copies) > LAYOUTS:
                self._copies.popitem(last=False)
            return made

    def copies(self) -> list[Tensor]:
        """Those that there are now."""
        with self._lock:
            return list(self._copies.values())


_known = WeakIdKeyDictionary()  # the layouts of each weight
_known_lock = threading.Lock()
_sure: ContextVar[dict[int, Layouts] | None] = ContextVar("layouts of a run", default=None)


@contextmanager
def use_layouts(sure: dict[int, Layouts]) -> Iterator[None]:
    """Inside, in this thread, packed layers multiply by packed weights.

    Args:
        sure: Takes in the layouts that are known to be of the weights as they are, by the weights' ids; to be cleared
            when weights may have changed.
    """
    outer = _sure.set(sure)
    try:
        yield
    finally:
        _sure.reset(outer)


def layouts_of(weight: Tensor) -> Layouts:
    """The layouts of a weight as it is."""
    with _known_lock:
        known: Layouts | None = _known.get(weight)
    if known is None or not known.equal(weight):
        made = Layouts(weight)
        with _known_lock:  # of two threads that have made some, both use those of the first
            other: Layouts | None = _known.get(weight)
            known = made if other is None or other is known else other
            _known[weight] = known
    return known


def _packed(weight: Tensor, shape: Hashable, pack: Pack) -> Tensor | None:
    """The packed form of a weight for inputs of a shape; `None` outside a run."""
    sure = _sure.get()
    if sure is None:
        return None
    layouts = sure.get(id(weight))
    if layouts is None or not layouts.fit(weight):
        layouts = sure[id(weight)] = layouts_of(weight)
    return layouts.copy_for((shape, torch.get_num_threads()), pack)


def _layout(packed: Tensor) -> bytes:
    """oneDNN's description of how a tensor is laid out."""
    return torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes()  # type: ignore[no-any-return]


def _place(weight: Tensor) -> tuple[int, int]:
    """Address and PyTorch's count of changes."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def _row_sums(weight: Tensor) -> Tensor:
    """Of the bits of each of the C' rows, weighed by their places, as integers that wrap around."""
    rows = weight.detach()
    if rows.ndim == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        rows = rows.permute(0, 2, 3, 1)
    rows = rows.flatten(1)
    bits = rows.view(torch.int64 if rows.shape[1] % 4 == 0 else torch.int16)
    return (bits * torch.arange(1, 2 * bits.shape[1], 2)).sum(1)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`F.conv2d`, by packed weights."""
    shape = padding, stride, dilation, groups

    def pack() -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *shape, x.shape)  # type: ignore[no-any-return]

    packed = _packed(weight, x.shape, pack)
    if packed is None:
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *shape, "none", [], "")  # type: ignore[no-any-return]


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by packed weights."""
    rows = x.shape[:-1].numel()
    packed = _packed(weight, rows, lambda: torch.ops.mkldnn._reorder_linear_weight(weight, rows))
    if packed is None:
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")  # type: ignore[no-any-return]


# As operators of their own torch.compile calls them as they are, and blocks that are alike share what it made.
_convolve_operator = torch.library.custom_op("sdedit::convolve", convolve, mutates_args=())
_multiply_operator = torch.library.custom_op("sdedit::multiply", multiply, mutates_args=())
_convolve_operator.register_fake(F.conv2d)
_multiply_operator.register_fake(F.linear)


class PackedConv2d(nn.Conv2d):
    """A convolution by packed weights, in threads that have a run."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H', W')."""
        if not isinstance(x, Tensor) or torch.is_grad_enabled():
            return super().forward(x)
        call = _convolve_operator if torch.compiler.is_compiling() else convolve
        return call(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)  # type: ignore[arg-type]


class PackedLinear(nn.Linear):
    """A linear layer by packed weights, likewise."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C')."""
        if torch.is_grad_enabled():
            return super().forward(x)
        return (_multiply_operator if torch.compiler.is_compiling() else multiply)(x, self.weight, self.bias)


def _suits(layer: nn.Module) -> bool:
    """Has it weights in bfloat16, on a CPU that multiplies them, and zeros around its input?"""
    weight = layer.weight
    plain = type(weight) is nn.Parameter and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    zeros = getattr(layer, "padding_mode", "zeros") == "zeros" and isinstance(getattr(layer, "padding", ()), tuple)
    return plain and zeros and torch.ops.mkldnn._is_mkldnn_bf16_supported()


PACKING = Pass(PackedConv2d, PackedLinear, suits=_suits)
