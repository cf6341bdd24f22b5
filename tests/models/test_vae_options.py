"""Tiles and slices: the picture is the one that is coded whole, and less of it is in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import VAE, picture
from sdedit import AutoencoderKL, AutoencoderTiny, StableDiffusionImg2ImgPipeline
from sdedit.models.fast import tiling
from sdedit.models.layers import ResnetBlock2D, Upsample2D
from sdedit.models.options import vae as vae_options
from sdedit.models.options.attention import by_queries

PLENTY = 1 << 40


@pytest.fixture(autouse=True)
def thin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of eight rows, and no picture too small for them."""
    monkeypatch.setattr(tiling, "_TILE", 1)
    monkeypatch.setattr(vae_options, "_SMALL", 0)


def vae(cls: Any = AutoencoderKL, **config: Any) -> Any:
    torch.manual_seed(0)
    made = cls(**({**VAE, **config} if cls is AutoencoderKL else config)).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter += 0.05 * torch.randn(parameter.shape)
    return made


VAES = {
    "usual": lambda: vae(),
    "no attention, other norms": lambda: vae(mid_block_add_attention=False, norm_num_groups=4, layers_per_block=2),
    "one level": lambda: vae(
        block_out_channels=(16,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)
    ),
    "tiny": lambda: vae(AutoencoderTiny),
}


@pytest.mark.parametrize("make", VAES.values(), ids=VAES)
@given(
    height=st.integers(1, 11),
    width=st.integers(1, 9),
    batch=st.integers(1, 2),
    size=st.sampled_from([0, 60_000, PLENTY]),
)
@settings(max_examples=12, deadline=None)
def test_tiles_give_what_the_whole_gives(make: Any, height: int, width: int, batch: int, size: int) -> None:
    model = make()
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    z = torch.randn(batch, 4, height, width)
    pixels = torch.randn(batch, 3, factor * height, factor * width)
    for network, x in ((model.decoder, z), (model.encoder, pixels)):
        made = tiling.run(network, x, tiling.Budget(size, reserve=20_000))
        torch.testing.assert_close(made, network(x), rtol=1e-3, atol=5e-4)


def sizes_of_convolutions(monkeypatch: pytest.MonkeyPatch, run: Any) -> list[int]:
    """The bytes of each convolution's input while `run` runs."""
    seen: list[int] = []
    plain = F.conv2d

    def spy(x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor):
            seen.append(x.numel() * x.element_size())
        return plain(x, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "conv2d", spy)
        run()
    return seen


@pytest.mark.parametrize("cls", [AutoencoderKL, AutoencoderTiny])
def test_no_convolution_sees_more_than_a_strip(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = vae(cls)
    z, pixels = torch.randn(1, 4, 16, 4), torch.randn(1, 3, 128, 32)
    whole = max(sizes_of_convolutions(monkeypatch, lambda: (model.decode(z), model.encode(pixels))))
    model.enable_tiling()
    seen = sizes_of_convolutions(monkeypatch, lambda: (model.decode(z), model.encode(pixels)))
    assert max(seen) < whole / 5 and len(seen) > 100


def test_every_convolution_sees_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN keeps a compiled convolution for each shape; new ones for every tile made the process grow and grow."""
    model, z = vae(), torch.randn(1, 4, 16, 4)
    shapes: dict[Tensor, set[Any]] = {}
    plain = F.conv2d

    def spy(x: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor):
            shapes.setdefault(weight, set()).add(x.shape)
        return plain(x, weight, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", spy)
    model.enable_tiling()
    model.decode(z)
    layers = list(model.decoder.modules())
    doubled = sum(isinstance(layer, Upsample2D) for layer in layers)  # each four convolutions instead of one
    assert len(shapes) == sum(isinstance(layer, nn.Conv2d) for layer in layers) + 1 + 3 * doubled
    assert max(map(len, shapes.values())) == 1  # the heights here are multiples of a tile's: else 2, one for the last


@pytest.mark.parametrize("channels", [16, 32])  # with and without a convolution in the shortcut
def test_a_residual_block_makes_no_row_twice(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two branches read the same map at different places; the one behind finds its rows still there."""
    entry, block = nn.Conv2d(4, 16, 1), ResnetBlock2D(16, channels, groups=4, eps=1e-6, act_fn="silu")
    made, plain = 0, F.conv2d

    def spy(x: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if isinstance(x, Tensor) and weight is entry.weight:
            made += x.shape[2]
        return plain(x, weight, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", spy)
    x = torch.randn(1, 4, 96, 8)
    tiling.run(lambda x: block(entry(x)), x, tiling.Budget(0))
    assert made == 3 * 96  # once for each norm's statistics, once for the result


class Kept(tiling.Budget):
    """A budget that remembers the most that was kept at once."""

    most = 0

    def count(self, rows: tiling.TiledMap) -> None:
        super().count(rows)
        held = {r.tensor.data_ptr(): r.nbytes for r in self._kept if r.tensor is not None}
        Kept.most = max(Kept.most, sum(held.values()))


def test_maps_that_are_kept_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    model, z = vae(mid_block_add_attention=False), torch.randn(1, 4, 16, 12)
    widest = 16 * 128 * 96 * 4
    result = 3 * 128 * 96 * 4
    monkeypatch.setattr(tiling, "Budget", Kept)
    whole = model.decode(z).sample
    for size in (widest, 5 * widest):
        Kept.most = 0
        torch.testing.assert_close(
            tiling.run(model.decoder, model.post_quant_conv(z), Kept(size)), whole, rtol=1e-4, atol=1e-4
        )
        assert 0 < Kept.most <= size + result
    Kept.most = 0
    model.enable_tiling()
    torch.testing.assert_close(model.decode(z).sample, whole, rtol=1e-4, atol=1e-4)
    assert 0 < Kept.most <= 2 * widest + result


def test_half_precision_stays_within_its_rounding() -> None:
    model = vae()
    z = torch.randn(1, 4, 12, 9)
    exact = model.decode(z).sample
    model.to(torch.bfloat16)
    whole = model.decode(z.bfloat16()).sample
    model.enable_tiling()
    tiled = model.decode(z.bfloat16()).sample
    assert tiled.dtype == torch.bfloat16
    assert (tiled - exact).square().mean() < 1.1 * (whole - exact).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_photo_in_tiles_is_the_photo(dtype: torch.dtype) -> None:
    """Within 45 dB of what the trained VAE makes of it whole."""
    photo = torch.from_numpy(skimage.data.astronaut()[:256, 100:356]).permute(2, 0, 1)[None]
    model = StableDiffusionImg2ImgPipeline.from_pretrained(torch_dtype=dtype).vae
    found = []
    with torch.no_grad():
        for tiling in (False, True):
            model.enable_tiling(tiling)
            latents = model.encode(photo.to(dtype) / 127.5 - 1).latent_dist.mean
            found.append(model.decode(latents).sample.float().clamp(-1, 1))
    assert -10 * ((found[0] - found[1]) / 2).square().mean().log10() > (45 if dtype == torch.bfloat16 else 90)


def test_small_pictures_need_no_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model, z = vae(), torch.randn(1, 4, 4, 4)
    in_tiles: list[Any] = []
    monkeypatch.setattr(tiling, "run", lambda network, x, budget: (in_tiles.append(x.shape), network(x))[1])
    monkeypatch.setattr(vae_options, "_SMALL", 32 * 32)
    model.enable_tiling()
    model.decode(z), model.encode(torch.randn(1, 3, 32, 32))
    assert not in_tiles
    model.decode(torch.randn(1, 4, 8, 8))
    assert in_tiles == [(1, 4, 8, 8)]
    model.disable_tiling()
    model.decode(torch.randn(1, 4, 8, 8))
    assert len(in_tiles) == 1


def test_a_batch_is_coded_a_picture_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, z, pixels = vae(), torch.randn(3, 4, 4, 5), torch.randn(3, 3, 32, 40)
    decoded, encoded, seen = model.decode(z).sample, model.encode(pixels).latent_dist.mean, []
    model.enable_slicing()
    for network in (model.decoder, model.encoder):
        network.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    torch.testing.assert_close(model.decode(z).sample, decoded)
    torch.testing.assert_close(model.encode(pixels).latent_dist.mean, encoded)
    assert seen == [1] * 6
    model.disable_slicing()
    torch.testing.assert_close(model.decode(z).sample, decoded, rtol=0, atol=0)


def test_the_pipeline_draws_the_same_in_tiles_and_slices(pipe: Any) -> None:
    def draw() -> np.ndarray[Any, Any]:
        return pipe(
            ["a cat", "apple"],
            picture(80, 72),
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images

    before = draw()
    pipe.enable_vae_tiling()
    pipe.enable_vae_slicing()
    assert pipe.vae.use_tiling and pipe.vae.use_slicing
    in_tiles = draw()
    pipe.disable_vae_tiling()
    pipe.disable_vae_slicing()
    assert not pipe.vae.use_tiling and not pipe.vae.use_slicing
    psnr = -10 * np.log10(np.square(in_tiles - before).mean() + 1e-20)
    assert psnr > 80
    np.testing.assert_array_equal(draw(), before)


def test_the_middle_attends_to_all_pixels_by_queries() -> None:
    model = vae()
    layer = model.decoder.mid_block.attentions[0]
    model.enable_tiling()
    assert layer.core is by_queries
    model.disable_tiling()
    assert layer.core is None
    model.set_attention_slice(1)
    model.enable_tiling()
    assert layer.core is not by_queries  # the user's own choice stays


class Odd(nn.Module):
    """What tiles do not know: a function of whole rows, another padding, a read of what was replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")
        self.dilated = nn.Conv2d(3, 3, 3, padding=2, dilation=2)
        self.norm = nn.GroupNorm(1, 3)

    def forward(self, x: Any) -> Any:
        x = self.norm(self.dilated(self.conv(x)))
        x = torch.cat([x, x.flip(3)], 1) if isinstance(x, Tensor) else torch.cat([x, x.whole().flip(3)], 1)
        return F.interpolate(x, size=(7, 5)) - x.mean() / 2


def test_what_tiles_do_not_know_is_computed_whole() -> None:
    odd, x = Odd().eval().requires_grad_(False), torch.randn(2, 3, 21, 13)
    torch.testing.assert_close(tiling.run(odd, x, tiling.Budget(0)), odd(x))


def test_a_map_that_was_replaced_is_not_read_again() -> None:
    norm = nn.GroupNorm(1, 3).requires_grad_(False)

    def not_residual(x: Any) -> Any:
        x = x * 2
        norm(x)  # keeps it
        y = x + x * 3
        norm(y)  # takes its place
        return x + y

    with pytest.raises(RuntimeError, match="took its place"):
        tiling.run(not_residual, torch.randn(1, 3, 20, 4), tiling.Budget(PLENTY))


@pytest.mark.parametrize("pad", [(0, 0, 0, 0), (1, 2, 3, 0), (0, 1, 0, 1), (2, 0, 9, 11)])
def test_zeros_around_tiles(pad: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, 21, 5)
    assert torch.equal(tiling.run(lambda x: F.pad(x, pad), x, tiling.Budget(0)), F.pad(x, pad))
