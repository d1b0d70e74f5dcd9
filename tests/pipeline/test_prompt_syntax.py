"""How prompts say weights, and how they are cut into chunks: text and tokens alone, nothing is encoded."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxmix import InputError
from jaxmix.pipeline.chunks import Reading, chunk
from jaxmix.pipeline.prompt_syntax import LARGEST, SYNTAXES, parse

ALL = None


def said(prompt, syntax):
    return [[tuple(piece) for piece in section] for section in parse(prompt, syntax)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("normal text", [[("normal text", 1.0)]]),
        ("an (important) word", [[("an ", 1.0), ("important", 1.1), (" word", 1.0)]]),
        ("(unbalanced", [[("unbalanced", 1.1)]]),
        ("un)balanced]", [[("un)balanced]", 1.0)]]),
        (r"\(literal\]", [[("(literal]", 1.0)]]),
        ("(unnecessary)(parens)", [[("unnecessaryparens", 1.1)]]),
        ("[x] (y:1.2)", [[("x", 1 / 1.1), (" ", 1.0), ("y", 1.2)]]),
        ("((x:1.3))", [[("x", 1.3 * 1.1)]]),
        ("[(x) y]", [[("x", 1.1 * (1 / 1.1)), (" y", 1 / 1.1)]]),
        ("(x:-0.5)", [[("x", -0.5)]]),
        ("(cat:abc) (w:...)", [[("cat:abc", 1.1), (" ", 1.0), ("w:...", 1.1)]]),
        ("a BREAK b", [[("a", 1.0)], [("b", 1.0)]]),
        ("BREAK b", [[("", 1.0)], [("b", 1.0)]]),
        ("(a BREAK b) BREAKs", [[("a BREAK b", 1.1), (" BREAKs", 1.0)]]),
        ("", [[("", 1.0)]]),
    ],
)
def test_brackets_of_a1111(prompt, expected):
    found = said(prompt, "a1111")
    assert [[text for text, _ in section] for section in found] == [[text for text, _ in s] for s in expected]
    np.testing.assert_allclose([w for s in found for _, w in s], [w for s in expected for _, w in s], rtol=1e-12)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("(a:1.2) b (c)", [("a", 1.2), (" b ", 1.0), ("c", 1.1)]),
        ("((a:1.2) d)", [("a", 1.2), (" d", 1.1)]),
        ("(a", [("(a", 1.0)]),
        ("[a] BREAK", [("[a] BREAK", 1.0)]),
        (r"\(a\) (b:0.5)", [("(a) ", 1.0), ("b", 0.5)]),
        ("(cat:abc)", [("cat:abc", 1.1)]),
    ],
)
def test_brackets_of_comfy(prompt, expected):
    assert said(prompt, "comfy") == [expected]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat+ on (a mat)1.3", [("a", 1.0), ("cat", 1.1), ("on", 1.0), ("a mat", 1.3)]),
        ("mid-century house--", [("mid-century", 1.0), ("house", 0.9**2)]),
        ("((a b)+ c)1.2, d", [("a b", 1.1 * 1.2), ("c", 1.2), (", d", 1.0)]),
        ('"a b"0.5 c', [("a b", 0.5), ("c", 1.0)]),
        ("(x)", [("x", 1.0)]),
        ("a (b", [("a (b", 1.0)]),
        ("(cat) 1.2 (hello).attend(1.4)", [("cat 1.2", 1.0), ("hello", 1.4)]),
        (r"\(cat\)+", [("(cat)", 1.1)]),
    ],
)
def test_signs_of_compel(prompt, expected):
    (found,) = said(prompt, "compel")
    assert [text for text, _ in found] == [text for text, _ in expected]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in expected], rtol=1e-12)


@pytest.mark.parametrize(
    ("prompt", "syntax", "message"),
    [
        ("a (cat:nan)", "a1111", r"found the weight 'nan' at character 8 of 'a \(cat:nan\)', expected a number"),
        ("a (cat: -inf )", "a1111", "'-inf' at character 9"),
        ("(cat:1.2.3)", "a1111", "'1.2.3' at character 6"),
        ("(cat:99999)", "a1111", "expected a number from -1000 to 1000"),
        ("(" * 200 + "x", "a1111", "found the weight"),
        ("(cat:1e9)", "comfy", "'1e9'"),
        ("(cat:inf)", "comfy", "'inf'"),
        ("(" * 200 + "x" + ")" * 200, "comfy", "found"),
        ("cat" + "+" * 100, "compel", "found the weight"),
        ("(" * 200 + "x" + ")" * 200, "compel", "nested more than 100 deep"),
        ('("a", "b").blend(1, 1)', "compel", r"found blend\(...\) at character 11"),
        ("cat.swap(dog)", "compel", r"found swap\("),
        ("x", "nonsense", "syntax: found 'nonsense', expected one of plain, a1111, compel, comfy"),
    ],
)
def test_what_cannot_be_read_is_one_line(prompt, syntax, message):
    with pytest.raises(InputError, match=message) as e:
        parse(prompt, syntax)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


PARTS = st.sampled_from(
    ["cat", "a ", "(", ")", "[", "]", "\\", ":", "1.2", "nan", "+", "-", '"', ",", ".", " BREAK ", "\n"]
)


@given(st.lists(PARTS, max_size=30).map("".join))
def test_any_text_is_read_or_refused(prompt):
    for syntax in SYNTAXES:
        try:
            sections = parse(prompt, syntax)
        except InputError:
            continue
        assert sections and all(sections)
        for section in sections:
            weights = [piece.weight for piece in section]
            assert all(abs(w) <= LARGEST for w in weights)
            assert all(a != b for a, b in itertools.pairwise(weights))  # neighbours are merged
        if not set(prompt) & set('()[]\\"+-') and "BREAK" not in prompt and syntax in ("plain", "a1111", "comfy"):
            assert sections == [[(prompt, 1.0)]]


def lengths(tokenizer, prompt, syntax, most=ALL):
    found = chunk(tokenizer, 32, prompt, Reading(syntax, most))
    return [int((row == tokenizer.eos_token_id).argmax()) - 1 for row in found.ids]


def test_a_prompt_of_one_chunk_has_the_tokens_of_the_tokenizer(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizers[0]
    for prompt in ("", "a cat", "a 3d render of a red apple, at night", "cat " * 30):
        expected = tokenizer(prompt, padding="max_length", max_length=32, truncation=True)["input_ids"]
        for syntax in SYNTAXES:
            for most in (1, ALL):
                np.testing.assert_array_equal(chunk(tokenizer, 32, prompt, Reading(syntax, most)).ids, [expected])


def test_each_syntax_cuts_long_prompts_in_its_own_way(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizers[0]
    words = "cat " * 20 + ", " + "dog " * 20  # 41 tokens, room for 30
    assert lengths(tokenizer, words, "plain") == [30, 11]
    assert lengths(tokenizer, words, "a1111") == [21, 20]  # behind the comma
    assert lengths(tokenizer, "cat , " + "dog " * 40, "a1111") == [30, 12]  # too far back
    assert lengths(tokenizer, "a BREAK b", "a1111") == [1, 1]
    assert lengths(tokenizer, "BREAK b BREAK", "a1111") == [0, 1]
    assert lengths(tokenizer, "a cat . " + "dog , " * 20, "compel") == [3, 30, 10]
    assert lengths(tokenizer, "cat " * 28 + "(a red dog)", "comfy") == [28, 3]  # not cut in two
    assert lengths(tokenizer, "cat " * 28 + "(a red dog with a very long tail)", "comfy") == [30, 6]


def test_what_is_not_read_is_said(tiny_pipeline):
    tokenizer = tiny_pipeline.tokenizers[0]
    found = chunk(tokenizer, 32, "cat " * 30 + "(dog:1.2)", Reading("a1111", 1))
    assert found.cut == "dog" and found.ids.shape == (1, 32) and (found.weights == 1).all()
    found = chunk(tokenizer, 32, "cat BREAK dog BREAK a car", Reading("a1111", 2))
    assert found.cut == "a car" and found.ids.shape == (2, 32)
