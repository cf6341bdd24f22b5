"""The update that SDEdit's paper writes down is a row of our DDPM scheduler: algorithm 3 (VP) of arXiv 2108.01073."""

from __future__ import annotations

import pytest
import torch

from sdedit import DDPMScheduler

N = 1000


def paper_update(x: torch.Tensor, eps: torch.Tensor, n: int, betas: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """x_(n-1) = (x_n + β(t_n) Δt s)/√(1 - β(t_n) Δt) + √(β(t_n) Δt) z, with the score s = -ε/√(1 - ᾱ)."""
    beta, kept = betas[n - 1], torch.cumprod(1 - betas, 0)[n - 1]
    score = -eps / torch.sqrt(1 - kept)
    return (x + beta * score) / torch.sqrt(1 - beta) + torch.sqrt(beta) * z


@pytest.mark.parametrize(("t0", "strength"), [(0.3, 0.42), (0.4, 0.57), (0.5, 0.71), (0.6, 0.84)])
def test_the_same_noise_on_stable_diffusions_schedule(t0: float, strength: float) -> None:
    ddpm = DDPMScheduler(N, beta_schedule="linear").alphas_cumprod
    ours = DDPMScheduler(N, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod
    nearest = int((ours - ddpm[round(t0 * N) - 1]).abs().argmin()) + 1
    assert nearest / N == pytest.approx(strength, abs=0.005)


@pytest.mark.parametrize("t0", [0.1, 0.5, 1.0])
def test_stroke_based_editing(t0: float) -> None:
    """β(t) from 0.1 to 20 over t in [0, 1], Δt = 1/1000, from the guide noised to t0; no noise at last."""
    betas = torch.linspace(0.1, 20, N, dtype=torch.float64) / N
    scheduler = DDPMScheduler(
        N, beta_start=0.1 / N, beta_end=20 / N, beta_schedule="linear", variance_type="fixed_large", clip_sample=False
    )
    scheduler.set_timesteps(N)
    steps, rng = round(t0 * N), torch.Generator().manual_seed(0)
    guide = torch.rand(1, 3, 4, 4, generator=rng, dtype=torch.float64) * 2 - 1
    mixer = torch.randn(3, 3, generator=rng, dtype=torch.float64) / 3

    def eps(x: torch.Tensor, n: int) -> torch.Tensor:
        """Some network."""
        return torch.tanh(torch.einsum("dc,bchw->bdhw", mixer, x) + n / N)

    noise = torch.randn(guide.shape, generator=rng, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)[steps - 1]
    x = torch.sqrt(kept) * guide + torch.sqrt(1 - kept) * noise
    added = scheduler.add_noise(guide, noise, torch.tensor([steps - 1]))
    assert torch.allclose(added, x, atol=1e-6)

    scheduler.set_begin_index(N - steps)
    drawn, again = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    for n in range(steps, 0, -1):
        t = scheduler.timesteps[N - n]
        assert int(t) == n - 1
        z = torch.randn(x.shape, generator=again) if n > 1 else torch.zeros_like(x)
        ours = scheduler.step(eps(x, n), t, x, generator=drawn).prev_sample
        x = paper_update(x, eps(x, n), n, betas, z)
        assert torch.allclose(ours, x, rtol=1e-5, atol=1e-5)
