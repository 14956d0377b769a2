"""The hand-written teacher corpus keeps the rules of the paper's Table 4."""

import json
import re
from collections import Counter

import pytest

import roles
from data import language
from files import ROOT

CORPUS = ROOT / "configs" / "teacher_corpus.jsonl"
ROWS = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
STARTERS = [(row["language"], starter) for row in ROWS for starter in row["starters"]]


def test_there_are_enough_rows_of_both_languages_and_of_real_people():
    counts = Counter(row["language"] for row in ROWS)
    assert counts.keys() == {"en", "zh"} and len(ROWS) >= 600 and counts["zh"] >= 120
    real = [row for row in ROWS if row["source"] != "invented"]
    assert len(real) >= len(ROWS) / 3
    assert all(re.fullmatch(r"stackexchange:[a-z]+:\d+", row["source"]) for row in real)


@pytest.mark.parametrize("row", ROWS, ids=range(1, len(ROWS) + 1))
def test_a_row_keeps_the_rules(row):
    assert row.keys() == {"language", "interests", "starters", "source"}
    assert 1 <= len(row["interests"]) <= 6 and 5 <= len(row["starters"]) <= 8
    kept, dropped = roles.filter_starters(row["starters"], row["interests"])
    # Length, language, markup, unsuitable words, repeats: none falls to the product's own filter.
    assert kept == row["starters"], dict(dropped)
    forms = set(map(roles.normal_form, row["interests"]))
    assert forms.isdisjoint(map(roles.normal_form, row["starters"]))  # a step on, no repetition


def test_no_starter_comes_twice_and_no_form_too_often():
    assert len({roles.normal_form(starter) for _, starter in STARTERS}) == len(STARTERS)
    openings = {  # two words, or two characters in Chinese
        "en": Counter(" ".join(s.lower().split()[:2]) for lang, s in STARTERS if lang == "en"),
        "zh": Counter(s[:2] for lang, s in STARTERS if lang == "zh"),
    }
    for counts in openings.values():
        opening, count = counts.most_common(1)[0]
        assert count <= 0.03 * counts.total(), opening


def test_the_language_is_that_of_the_starters():
    assert all(language(starter) == lang for lang, starter in STARTERS)
