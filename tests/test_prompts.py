"""The `<sug>` parser and writer: any string parses, in linear time, or gives a reason."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import llm

MARKUP = st.lists(
    st.sampled_from(
        [
            "<sug>",
            "</sug>",
            "<think>",
            "</think>",
            "&&",
            " a b",
            "1. ",
            '"',
            "\x00",
            "三体?",
            "\n- ",
        ]
    ),
    max_size=30,
).map("".join)


@given(st.text() | MARKUP)
def test_parser_never_raises_and_gives_a_reason_exactly_for_nothing(text):
    parsed = llm.parse_starters(text)
    assert (parsed.reason is None) == bool(parsed.starters)
    assert all(s == s.strip() and "&&" not in s and "\x00" not in s for s in parsed.starters)


@pytest.mark.parametrize(
    "text, starters",
    [
        ("<think>x <sug>no</sug></think><sug> a b && c d </sug>", ("a b", "c d")),
        ('<sug>old</sug> <sug>1. new one && "two"</sug><sug>cut', ("new one", "two")),
        ("</think><sug> whole one? && cut sh", ("whole one?",)),
        ("<sug>first && last is whole?", ("first", "last is whole?")),
        ("nothing", ()),
        ("<sug> && </sug>", ()),
        ("<sug>cut", ()),
    ],
)
def test_parser_cases(text, starters):
    assert llm.parse_starters(text).starters == starters


def test_parser_is_linear():
    for part in ("<sug>", "&& ", "1. ", '"', "</sug>", '- "'):
        llm.parse_starters("<sug>" + part * 50_000)


@given(st.lists(st.text() | MARKUP, max_size=5))
@settings(max_examples=200)
def test_format_survives_the_parser(starters):
    once = llm.parse_starters(llm.format_starters(starters)).starters
    assert llm.parse_starters(llm.format_starters(once)).starters == once
    assert not any(set("<>") & set(s) for s in once)


def test_no_separator_stands_inside_a_starter():
    """A quote that goes from between two & leaves a separator behind."""
    assert llm.parse_starters('<sug> "a" &"& b && c </sug>').starters == ("a & b", "c")
