"""Long and weighted prompts: the grammar, the chunks, and what weights do to the prompt embeds."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
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
        ("([a)b]", [("a", 1.0), ("b", 1 / 1.1)]),
        ("(a[b)c", [("a", 1.1), ("b", 1.0), ("c", 1 / 1.1)]),
        ("a\\b \\\\ c\\", [("ab \\ c", 1.0)]),
        ("ratio 3:4", [("ratio 3:4", 1.0)]),
    ],
)
def test_grammar(prompt: str, fragments: list[tuple[str, float | None]]) -> None:
    parsed = weighting.parse(prompt)
    assert [text for text, _ in parsed] == [text for text, _ in fragments]
    for (_, got), (_, expected) in zip(parsed, fragments, strict=True):
        assert got == (expected if expected is None else pytest.approx(expected))


def weights_by_hand(prompt: str) -> list[tuple[str, float]]:
    """Each character of the text and its weight, by the grammar in `weighting`, read a character at a time."""
    text: list[list[Any]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        for one in text[opened[bracket].pop() :]:
            one[1] *= factor

    i = 0
    while i < len(prompt):
        here, rest = prompt[i], prompt[i + 1 :]
        number, bracket, _ = rest.partition(")")
        number = number.strip()
        digits = number.lstrip("+-") if number[:1] in ("+", "-") and number[1:2] not in ("+", "-") else number
        is_number = digits.count(".") <= 1 and digits.replace(".", "").isdecimal() and digits.isascii()
        if here == "\\":
            if rest[:1] and rest[0] in "()[]\\":
                text.append([rest[0], 1.0])
                i += 1
        elif here in "([":
            opened[here].append(len(text))
        elif here == ":" and bracket and is_number:
            if opened["("]:
                close("(", float(number))
            else:
                text.extend([c, 1.0] for c in prompt[i : i + rest.index(")") + 2])
            i += rest.index(")") + 1
        elif here == ")" and opened["("]:
            close("(", 1.1)
        elif here == "]" and opened["["]:
            close("[", 1 / 1.1)
        else:
            text.append([here, 1.0])
        i += 1
    for bracket, factor in (("(", 1.1), ("[", 1 / 1.1)):
        while opened[bracket]:
            close(bracket, factor)
    return [(c, w) for c, w in text]


@settings(deadline=None, max_examples=500)
@given(st.text(st.sampled_from("()[]\\:1.5- ab,"), max_size=30))
def test_every_prompt_is_read_by_the_grammar(prompt: str) -> None:
    got = [(c, weight) for text, weight in weighting.parse(prompt) for c in text]
    want = weights_by_hand(prompt)
    assert [c for c, _ in got] == [c for c, _ in want]
    assert [w for _, w in got] == pytest.approx([w for _, w in want])


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


class Words:
    """A tokenizer: a word a token, a comma is one, and `odd` has three vectors."""

    model_max_length = 77
    vocabulary: ClassVar = [",", "a", "b", "<odd>", "<odd>_1", "<odd>_2"]
    added_tokens_decoder: ClassVar = {
        i: SimpleNamespace(content=name, special=False) for i, name in enumerate(vocabulary) if name[0] == "<"
    }

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        return SimpleNamespace(input_ids=[self.vocabulary.index(word) for word in text.split()])

    def convert_tokens_to_ids(self, name: str) -> int:
        return self.vocabulary.index(name)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.sampled_from([",", *"a" * 12, "b", "<odd>"]), max_size=400))
def test_chunks_are_cut_where_the_web_ui_cuts_them(words: list[str]) -> None:
    cut = [ids for ids, _ in weighting.chunks(Words(), " ".join(words))]
    names = [" ".join(Words.vocabulary[i] for i in ids) for ids in cut]
    whole = " ".join(words).replace("<odd>", "<odd> <odd>_1 <odd>_2")
    assert " ".join(filter(None, names)) == whole and (len(names) == 1 or all(names))
    for ids, after in itertools.pairwise(cut):
        assert len(ids) <= 75 and after
        last = max((i for i, token in enumerate(ids) if token == 0), default=-1)
        assert after[0] not in (4, 5)  # an inversion is not split
        if len(ids) == 75:  # full: there was no comma to go back to, or nothing after it, or a comma came next
            assert last < 55 or last == 74 or after[0] == 0
        elif ids[-1] == 0 and len(ids) > 55:
            continue  # cut back to the comma
        else:
            assert after[0] == 3 and len(ids) > 72  # there was no room for the next inversion


def test_a_break_makes_chunks_but_none_that_is_empty_at_the_end() -> None:
    assert [ids for ids, _ in weighting.chunks(Words(), "a BREAK b BREAK")] == [[1], [2]]
    assert [ids for ids, _ in weighting.chunks(Words(), "BREAK")] == [[]]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a [cat:dog:0.4]", "prompt editing"),
        ("[cat:5]", "prompt editing"),
        ("[cat|dog] b", "alternating words"),
        ("cat AND dog", "composition"),
        ("<lora:style:0.8> cat", "an extra network"),
    ],
)
def test_what_is_not_understood_is_a_warning(pipe: Any, prompt: str, words: str) -> None:
    with pytest.warns(UserWarning, match=f"taken as words.*{words}"):
        weighting.encode(pipe.tokenizer, pipe.text_encoder, [prompt])


@pytest.mark.parametrize("prompt", ["a [cat] (dog:1.2)", r"\[cat|dog\]", "cat and dog", "ratio 3:4", "a < b"])
def test_what_is_understood_is_none(prompt: str) -> None:
    assert weighting.foreign(prompt) == []
