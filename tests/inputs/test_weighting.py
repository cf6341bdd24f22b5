"""Long and weighted prompts: the grammar, the chunks, and what weights do to the prompt embeds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdedit.inputs import prompts, weighting


@pytest.mark.parametrize(
    ("prompt", "fragments"),
    [
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(a:1.2), [b]", [("a", 1.2), (", ", 1.0), ("b", 1 / 1.1)]),
        ("((a (b:0.5) c))", [("a ", 1.1**2), ("b", 0.5 * 1.1**2), (" c", 1.1**2)]),
        (r"\(smile\) \[x\]", [("(smile) [x]", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("a) b]", [("a) b]", 1.0)]),
        ("a BREAK b", [("a ", 1.0), ("BREAK", None), (" b", 1.0)]),
        ("(a BREAK b:2)", [("a ", 2.0), ("BREAK", None), (" b", 2.0)]),
        ("BREAKFAST", [("BREAKFAST", 1.0)]),
        ("(less:-1)", [("less", -1.0)]),
        ("ratio 3:4", [("ratio 3:4", 1.0)]),
    ],
)
def test_grammar(prompt: str, fragments: list[tuple[str, float | None]]) -> None:
    parsed = weighting.parse(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in fragments]
    for (_, got), (_, expected) in zip(parsed, fragments, strict=True):
        assert got == (expected if expected is None else pytest.approx(expected))


@given(st.text(st.characters(exclude_characters="()[]\\")).filter(lambda t: t and "BREAK" not in t))
def test_text_without_marks_is_one_fragment(text: str) -> None:
    assert weighting.parse(text) == [(text, 1.0)]


@given(st.text(st.sampled_from("()[]\\:1.a BREAK"), max_size=40))
def test_any_text_parses(text: str) -> None:
    for fragment, weight in weighting.parse(text):
        assert fragment and (weight is None or isinstance(weight, float))


@torch.no_grad()
def test_without_weights_it_is_the_ordinary_encoding(pipe: Any) -> None:
    ids = torch.from_numpy(prompts.tokenize(pipe.tokenizer, ["an apple"], 77))
    plain = prompts.encode(pipe.text_encoder, ids)
    assert torch.equal(weighting.encode(pipe.tokenizer, pipe.text_encoder, ["an apple"]), plain)
    assert torch.equal(weighting.encode(pipe.tokenizer, pipe.text_encoder, ["(an apple:1.0)"]), plain)


@torch.no_grad()
def test_weights_scale_states_and_keep_their_size(pipe: Any) -> None:
    plain = weighting.encode(pipe.tokenizer, pipe.text_encoder, ["an apple"])
    weighed = weighting.encode(pipe.tokenizer, pipe.text_encoder, ["an (apple:1.5)"])
    tokens = pipe.tokenizer("an", add_special_tokens=False).input_ids
    apple = 1 + len(tokens)  # after the start mark
    ratio = (weighed / plain).median(-1).values[0]
    assert float(ratio[apple] / ratio[0]) == pytest.approx(1.5, rel=1e-3)
    assert weighed.square().mean().item() == pytest.approx(plain.square().mean().item(), rel=1e-4)


@torch.no_grad()
def test_chunks_of_75_and_breaks(pipe: Any) -> None:
    long = "apple " * 100  # one token each, in the test's vocabulary
    assert [len(ids) for ids, _ in weighting.chunks(pipe.tokenizer, long)] == [75, 25]
    assert [len(ids) for ids, _ in weighting.chunks(pipe.tokenizer, "apple BREAK apple apple")] == [1, 2]
    assert [len(ids) for ids, _ in weighting.chunks(pipe.tokenizer, "")] == [0]
    embeds = weighting.encode(pipe.tokenizer, pipe.text_encoder, [long, "apple"])
    assert embeds.shape[:2] == (2, 154)
    # Each chunk is encoded alone, so the second prompt's first chunk is what it is by itself.
    assert torch.allclose(embeds[1:, :77], weighting.encode(pipe.tokenizer, pipe.text_encoder, ["apple"]), atol=1e-6)
