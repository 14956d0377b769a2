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
CPP = ["std::vector vs std::array in C++", "How does std::move work?", "Using std::optional well",
       "std::variant and visit"]  # fmt: skip


@pytest.fixture(scope="module")
def encode():
    return Encoder()  # the packaged MiniLM: offline


def rate(texts: list[str], encode) -> float:
    return sum(reason is not None for reason in unfit(texts, encode)) / len(texts)


# Measured on the held-out halves when the lists were done: English .97 and .10, Chinese .89 and
# .17. In Chinese, words alone judge: MiniLM gives any two Chinese texts much the same cosine.
@pytest.mark.parametrize("lang, least, most", [("en", 0.90, 0.15), ("zh", 0.85, 0.20)])
def test_sensitive_summaries_are_told_from_harmless_ones(encode, lang, least, most):
    tuned, held = (
        [rate(SUMMARIES[kind][lang][start::2], encode) for kind in ("sensitive", "harmless")]
        for start in (0, 1)
    )
    print(f"{lang}: held out, of sensitive ones {held[0]:.2f} are told, of harmless {held[1]:.2f}")
    assert tuned[0] >= 0.95 and tuned[1] == 0
    assert held[0] >= least and held[1] <= most


def test_there_are_enough_of_both():
    assert all(sum(map(len, some.values())) >= 60 for some in SUMMARIES.values())


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
