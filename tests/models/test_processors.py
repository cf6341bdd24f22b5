"""Processors of the user's own, called with diffusers' arguments, and diffusers' own on our layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models import attention_processor as theirs
from torch import Tensor

from conftest import UNET, VAE
from sdedit import AutoencoderKL, UNet2DConditionModel
from sdedit.models.fast.full_speed import one_run
from sdedit.models.options.processors import AttnProcessor


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel.from_config(UNET).eval().requires_grad_(False)


GIVEN = torch.randn(1, 4, 8, 6), 500, torch.randn(2, 7, 32)


class Seen:
    """Remembers what it was called with, and computes as without it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, dict[str, Any]]] = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        **more: Any,
    ) -> Tensor:
        self.calls.append((hidden_states.shape, encoder_hidden_states, more))
        assert attention_mask is None
        return AttnProcessor()(attn, hidden_states, encoder_hidden_states)


def test_the_names_of_processors_are_diffusers(unet: UNet2DConditionModel) -> None:
    import diffusers

    assert list(unet.attn_processors) == list(diffusers.UNet2DConditionModel(**UNET).attn_processors)
    assert list(AutoencoderKL(**VAE).attn_processors) == list(diffusers.AutoencoderKL(**VAE).attn_processors)


def test_a_processor_sees_what_diffusers_shows_it(unet: UNet2DConditionModel) -> None:
    plain, seen = unet(*GIVEN).sample, Seen()
    kinds = [type(layer) for layer in unet.modules()]
    unet.set_attn_processor(seen)
    torch.testing.assert_close(unet(*GIVEN, cross_attention_kwargs={"scale": 1.0, "region": 3}).sample, plain)
    texts = [text for _, text, _ in seen.calls]
    assert len(seen.calls) == len(unet.attn_processors)
    assert texts[0] is None and all(text is GIVEN[2] for text in texts[1::2])  # itself, the text, itself, …
    assert all(more == {"region": 3} for _, _, more in seen.calls)
    assert set(map(id, unet.attn_processors.values())) == {id(seen)}
    unet(*GIVEN)
    assert seen.calls[-1][2] == {}
    unet.set_default_attn_processor()
    assert torch.equal(unet(*GIVEN).sample, plain) and [type(layer) for layer in unet.modules()] == kinds


@pytest.mark.parametrize("kind", ["AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor"])
def test_processors_of_diffusers_compute_the_same(unet: UNet2DConditionModel, kind: str) -> None:
    vae = AutoencoderKL(**VAE).eval().requires_grad_(False)
    z = torch.randn(1, 4, 6, 5)
    plain = unet(*GIVEN).sample, vae.decode(z).sample
    for network in (unet, vae):
        arguments = {"slice_size": 1} if kind == "SlicedAttnProcessor" else {}
        network.set_attn_processor(getattr(theirs, kind)(**arguments))
    with one_run(unet):
        torch.testing.assert_close(unet(*GIVEN).sample, plain[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(z).sample, plain[1], rtol=1e-4, atol=1e-5)


def test_one_layer_may_have_its_own_and_what_it_returns_is_used(unet: UNet2DConditionModel) -> None:
    plain = unet(*GIVEN).sample
    processors = unet.attn_processors
    name = next(name for name in processors if name.endswith("attn2.processor"))
    calls: list[int] = []

    def nothing(
        attn: Any, hidden_states: Tensor, encoder_hidden_states: Any = None, attention_mask: Any = None
    ) -> Tensor:
        calls.append(1)
        return torch.zeros_like(hidden_states)

    unet.set_attn_processor({**processors, name: nothing})
    assert not torch.allclose(unet(*GIVEN).sample, plain) and calls == [1]


def test_a_processor_may_be_set_within_a_run(unet: UNet2DConditionModel) -> None:
    """As a callback does; the run takes its own layers away afterwards, and not those."""
    plain, seen = unet(*GIVEN).sample, Seen()
    with one_run(unet) as run:
        unet(*GIVEN)
        unet.set_attn_processor(seen)
        run.clear()
        torch.testing.assert_close(unet(*GIVEN).sample, plain)
    count = len(seen.calls)
    unet(*GIVEN)
    assert len(seen.calls) == 2 * count > 0
    unet.set_default_attn_processor()
    assert torch.equal(unet(*GIVEN).sample, plain)


def test_what_is_no_processor_is_refused(unet: UNet2DConditionModel) -> None:
    names = list(unet.attn_processors)
    with pytest.raises(ValueError, match="attention layers"):
        unet.set_attn_processor(dict.fromkeys(names[1:], AttnProcessor()))
    with pytest.raises(TypeError, match="3; expected what can be called"):
        unet.set_attn_processor(3)  # type: ignore[arg-type]
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match="unfuse_qkv_projections"):
        unet.set_attn_processor(AttnProcessor())
