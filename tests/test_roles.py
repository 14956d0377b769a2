"""Roles by rule: lists pass their own filters, matching is by subject."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_prompts import MARKUP

import llm
import roles
from data import Message


def encode(texts):
    """Bags of words and characters, hashed without Python's per-process seed: unit rows."""
    rows = torch.full((len(texts), 64), 1e-3)
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().split():
            row[sum(word.encode()) % 64] += 1
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "text, first",
    [
        ("How to beat Malenia in Elden Ring", "Elden Ring"),
        ("where to start with Baldur's Gate 3?", "Baldur's Gate 3"),
        ("what is one piece theories", "one piece theories"),
        ("怎么学习摄影", "摄影"),
        ("推荐《三体》类似的小说", "三体"),
        ("Lord of the Rings vs Dune", "Lord of the Rings"),
        ("How to get into The Beatles", "The Beatles"),
        ("summarising for work: New Yorker", "New Yorker"),
        ("The pizza of Naples", "Naples"),
        ("thoughts on Oxygen Not Included", "Oxygen Not Included"),
        ("wall-e: tips and common mistakes", "wall-e"),
        ("Fix my kilowatt-hours", "kilowatt-hours"),
        ("How to get into Great White Shark", "Great White Shark"),
        ("How To Learn The Guitar", "The Guitar"),
        ("Can You Recommend A Good Book About Stoicism", "Stoicism"),
        ("Ideas For My Birthday Party In London", "Birthday Party"),
        ("什么是量子计算？", "量子计算"),
    ],
)
def test_key_phrases(text, first):
    assert roles.key_phrases(text)[0] == first


def test_a_starter_is_grounded_that_names_a_subject_whole():
    interests = ["Comparing Satie and Beethoven", "How to get into The Beatles", "什么是量子计算？"]
    for good in ("Beethoven’s last years", "Best of the beatles", "量子计算的历史", "Ｓatie, why?"):
        assert roles.grounded(good, interests)
    for bad in ("Who was Beethven?", "Best of the Beat", "量子的历史"):
        assert not roles.grounded(bad, interests)
    assert roles.grounded("Anything", ["Learning"])  # no subject to name


def test_filters_name_their_reasons():
    kept, dropped = roles.filter_starters(
        [
            "Quiz me on Dune",
            "quiz me on dune!",
            "One",
            "go go go Dune",
            "推荐三体类似的小说",
            "My diabetes diet plan",
            "a <b>bold</b> idea",
            "Seen this one",
        ],
        ["Dune novels"],
        seen=["seen this one."],
    )
    assert kept == ["Quiz me on Dune"]
    assert dropped == {"duplicate": 2, "length": 1, "malformed": 2, "language": 1, "medical": 1}


@given(st.lists(st.text() | MARKUP, max_size=6))
def test_filters_never_raise_and_are_idempotent(starters):
    kept, dropped = roles.filter_starters(starters, ["Dune novels"])
    assert len(kept) + dropped.total() == len(starters)
    assert roles.filter_starters(kept, ["Dune novels"])[0] == kept


@pytest.mark.parametrize(
    "interests",
    [
        ["one piece theories", "translate an email", "sourdough bread"],
        ["怎么学习摄影", "量子计算入门"],
        ["Translate an email to German"],
        ["Dune", "推荐《三体》", "Elden Ring bosses"],
    ],
)
def test_teacher_writes_n_fit_starters_the_same_each_time(interests):
    raw = roles.Rules(encode).write([interests], 10, [3])[0]
    starters = list(llm.parse_starters(raw).starters)
    assert roles.filter_starters(starters, interests) == (starters, {}) and len(starters) == 10
    assert raw == roles.Rules(encode).write([interests], 10, [3])[0]
    assert len(interests) == 1 or "email" not in raw


def test_matcher_needs_a_subject_and_a_cosine():
    earlier = ["Elden Ring bosses", "music tips", "Dune"]
    later = ["elden ring builds", "music guide", "dune!"]
    found, empty = roles.Rules(encode).match([(earlier, later), ([], ["x"])])
    assert np.array_equal(found, np.diag([1, 0, 1])) and empty.shape == (0, 1)


def test_covering_takes_from_every_interest_in_turn():
    starters = ["Elden Ring bosses", "Elden Ring builds", "Elden Ring lore", "Dune books"]
    picked = roles.covering(starters, ["Elden Ring", "Dune"], 3, encode)
    assert picked == ["Elden Ring bosses", "Dune books", "Elden Ring builds"]
    assert roles.covering([], ["Dune"], 3, encode) == []


def test_judge_is_symmetric_and_prefers_subjects_to_chores():
    judge, history = roles.Rules(encode), ["Elden Ring bosses", "Elden Ring builds", "email"]
    a, b = ["Elden Ring bosses", "sourdough bread"], ["translate an email", "email"]
    rows = [(history, a, b), (history, b, a), (history, a, a), ([], [], [])]
    assert judge.compare(rows) == [1.0, 0.0, 0.5, 0.5]


def test_summariser_takes_the_first_question():
    asked = [("assistant", "Hello"), ("user", "What is Dune? Tell me.")]
    sessions = [asked, [("user", "量" * 50)], [("user", "...")]]
    sessions = [[Message(role=role, content=said) for role, said in s] for s in sessions]
    lines = roles.Rules(encode).summarise([*sessions, None])
    assert lines == ["What is Dune?", "量" * 20, "...", ""]
