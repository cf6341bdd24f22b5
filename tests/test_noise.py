"""Noise that depends on the generator alone, and seeds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sdedit.noise import randn, seeded


@pytest.mark.parametrize("generators", [1, 3])
def test_pytorchs_default_dtype_changes_no_noise(generators: int) -> None:
    def draw() -> torch.Tensor:
        return randn((3, 4, 5, 5), seeded(1) if generators == 1 else [seeded(i) for i in range(3)])

    want = draw()
    torch.set_default_dtype(torch.float64)
    try:
        got = draw()
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1, np.int64(7), np.uint64(2**64 - 1)])
def test_seeds_of_python_and_numpy(seed: Any) -> None:
    assert seeded(seed).initial_seed() == int(seed)


@pytest.mark.parametrize("seed", [-1, 2**64, np.int32(-5), 1.5, "1", None, True])
def test_what_is_no_seed_is_said(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed=.*expected a whole number from 0 to 18446744073709551615"):
        seeded(seed)
