"""Colour profiles made by hand from the formulas of ICC.1:2001-04, so that what they mean is known."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

# RGB to XYZ at D50: the primaries of Display P3 and of sRGB, as their published profiles hold them.
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GAMMA = 563 / 256  # 2.2, in the profile's fixed point


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(v * 65536)) for v in values)


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _profile(space: bytes, pcs: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = {b"desc": text + bytes(-len(text) % 4), b"cprt": b"text\0\0\0\0none", **tags}
    at, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(data), len(content))
        data += content
    size = at + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, kind, space, pcs).ljust(36, b"\0") + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">iii", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def rgb_profile(primaries: np.ndarray = P3, gamma: float = GAMMA) -> bytes:
    """Of a screen with these primaries and this gamma."""
    tags = {b"wtpt": _xyz([0.9642, 1.0, 0.8249])}
    for i, name in enumerate((b"r", b"g", b"b")):
        tags |= {name + b"XYZ": _xyz(primaries[:, i]), name + b"TRC": _curve(gamma)}
    return _profile(b"RGB ", b"XYZ ", b"mntr", tags)


def grey_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", b"mntr", {b"wtpt": _xyz([0.9642, 1.0, 0.8249]), b"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """Lightness (L*) falls evenly with each ink, and there are no colours: 1 minus the sum of the inks, at least 0."""
    inks = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(-1, 4).sum(-1)
    lightness = np.clip(1 - inks, 0, 1) * 255
    nodes = b"".join(bytes([round(light), 128, 128]) for light in lightness)
    matrix = b"".join(struct.pack(">i", 65536 * (i % 4 == 0)) for i in range(9))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + bytes(range(256)) * 4 + nodes + bytes(range(256)) * 3
    return _profile(b"CMYK", b"Lab ", b"prtr", {b"wtpt": _xyz([0.9642, 1.0, 0.8249]), b"A2B0": table})


def srgb_of_linear(linear: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, in [0, 1]."""
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def srgb_of(values: np.ndarray, primaries: np.ndarray = P3, gamma: float = GAMMA) -> np.ndarray:
    """(…, 3) in [0, 1] of a screen, as sRGB in [0, 1]."""
    return srgb_of_linear(values**gamma @ primaries.T @ np.linalg.inv(SRGB).T)
