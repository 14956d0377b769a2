"""Safety without harm: what words and meaning tell, on summaries that they were not tuned on.

    python -m pytest tests/test_safety.py -s     # prints the rates
"""

import pytest
import torch
import yaml

import icebreaker as ib
import llm
import roles
from config import RidConfig
from files import ROOT
from llm.encoder import Encoder
from roles.text import unfit
from stages.rid import Distiller

SUMMARIES = yaml.safe_load((ROOT / "tests" / "safety.yaml").read_text(encoding="utf-8"))
KINDS = ("sensitive", "harmless")
CPP = ["std::vector vs std::array in C++", "How does std::move work?", "Using std::optional well",
       "std::variant and visit"]  # fmt: skip


@pytest.fixture(scope="module")
def encode():
    return Encoder()  # the packaged MiniLM: offline


def rate(texts: list[str], encode) -> float:
    return sum(reason is not None for reason in unfit(texts, encode)) / len(texts)


# What the lists told when the examples were written, before new words: English .65 of sensitive and
# .07 of harmless ones, Chinese .34 and .08, other languages next to nothing.
@pytest.mark.parametrize("lang", SUMMARIES["sensitive"])
def test_sensitive_summaries_are_told_from_harmless_ones(encode, lang):
    told, wrongly = (rate(some[lang][1::2], encode) for some in map(SUMMARIES.get, KINDS))
    print(f"{lang}: held out, of sensitive ones {told:.2f} are told, of harmless {wrongly:.2f}")
    assert told >= {"en": 0.60, "zh": 0.30}.get(lang, 0) and wrongly <= 0.10


def test_there_are_enough_of_both():
    """In every language, so that one of the held-out harmless ones is less than 3 %."""
    for kind, least in (("sensitive", 64), ("harmless", 72)):
        assert all(len(some) >= least for some in SUMMARIES[kind].values())


def test_a_harmless_word_takes_no_history_and_no_starter(encode):
    """Case 29: std::vector is no illness, password hashing no intrusion."""
    interests = [*CPP, "Password hashing with bcrypt"]
    assert unfit(interests, encode) == [None] * 5 == unfit(interests, None)
    starters = ["Explain std::move in one page", "Which password hashing is slow enough?"]
    assert roles.filter_starters(starters, interests) == (starters, {})
    assert "std::move" in roles.Rules(encode).write([CPP], 4, [0])[0]
    # The same word where nobody has asked for it.
    assert roles.filter_starters(starters, CPP)[1] == {"invasive": 1}
    assert roles.filter_starters(["Is it an STD or a rash?"], ["Dune novels"])[1] == {"medical": 1}


def test_distress_reaches_neither_generator_nor_template(encode):
    texts = ["Paracetamol overdose amount", "Dune novels in order", "我想死", "hi",
             "my mother died yesterday and I cannot cope"]  # fmt: skip
    history = ib.make_history(texts, None, encode)
    distiller = Distiller(None, {}, [], [], [0.0], RidConfig(min_keep=5, max_keep=9), encode)
    assert distiller.fit(history) == [history.texts.index("Dune novels in order")]
    assert distiller.keep(history, [0.9] * 5) == [history.texts.index("Dune novels in order")]
    raw = roles.Rules(encode).write([texts], 5, [0])[0]
    assert all("Dune" in starter for starter in llm.parse_starters(raw).starters)
    nothing = ib.make_history(texts[:1], None, encode)
    assert distiller.keep(nothing, [0.9]) == []


def test_no_text_is_no_matrix(encode):
    assert unfit([], encode) == [] and unfit(["自杀"], encode, torch.zeros(1, 384)) == ["sensitive"]
