"""Roles by rule: lists pass their own filters, matching is by subject."""

import re

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from test_prompts import MARKUP

import llm
import roles
from data import Message
from files import ROOT
from roles.safety import unfit

SUBJECTS = yaml.safe_load((ROOT / "tests" / "subjects.yaml").read_text(encoding="utf-8"))


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
        ("How does std::move work?", "std::move"),
        ("How Grover's algorithm works", "Grover's algorithm"),
        ("Issues with machine learning models", "machine learning models"),
        ("Which washing machine for a flat?", "washing machine"),
        ("Is Google Translate any good?", "Google Translate"),
        ("抹茶ケーキの作り方", "抹茶ケーキ"),
        ('Why are so few "real" samovars sold?', "samovars"),
        ("The Mott–Hubbard model", "The Mott-Hubbard"),
        ("read src/llm/logps.py, then describe the samovar", "samovar"),
        ("samovars that wept and were shorn of brass", "brass"),
    ],
)
def test_key_phrases(text, first):
    assert roles.key_phrases(text)[0] == first


# No word of these frames is in words.yaml but for its function words.
@pytest.mark.parametrize("frame", [
    "smitten with {x}", "Smitten with {x}, honestly", "I got fascinated by {x}", "dabbling in {x}",
    "how to polish {x}", "who embroidered {x}", "just varnish the {x}", "Is {x} breakable?",
    "my {x} got dented", "shorn of {x}", "distraught at {x}", "is it safer to polish {x}?",
    "narrowing down {x}", "see https://a.org/b about {x}",
    "thanks, {x} please", "hello, {x}!", "where to haggle over {x}",
    "User asked for advice on {x}", "The user is interested in {x}", "Discussion about {x}",
])
@pytest.mark.parametrize("x", ["samovar", "brass samovar", "Elden Ring", "washing machine"])
def test_what_frames_a_subject_is_none(frame, x):
    assert roles.key_phrases(frame.format(x=x)) == (x,)


@pytest.mark.parametrize("text, phrases", [
    ("gossip about the samovar", {"samovar", "gossip about the samovar"}),
    ("Whispers around Tasmota", {"Tasmota", "Whispers around Tasmota"}),
    ("a glut of brass samovars", {"brass samovars", "glut of brass samovars"}),
])
def test_a_noun_stands_with_what_it_is_of(text, phrases):
    assert {*roles.key_phrases(text)} == phrases


@pytest.mark.parametrize("text, phrases", SUBJECTS["nouns"].items())
def test_a_noun_is_none_the_less_where_it_looks_like_a_verb(text, phrases):
    assert ", ".join(roles.key_phrases(text)) == phrases


@pytest.mark.parametrize("text, phrase", [
    ("该用户想要了解宋朝瓷器", "宋朝瓷器"), ("用户体验设计", "用户体验设计"),
    ("El usuario pregunta sobre orquídeas", "orquídeas"), ("User stories in Jira", "Jira"),
])
def test_a_reporters_frame_is_no_subject_but_users_may_be_one(text, phrase):
    assert roles.key_phrases(text)[0] == phrase


@pytest.mark.parametrize("text", ["hi", "Hey there!", "ok thanks", "how to relax", "when", "wow"])
def test_some_texts_have_no_subject(text):
    assert roles.key_phrases(text) == ()


@pytest.mark.parametrize("part, precision, recall", [("seen", 0.84, 0.88), ("unseen", 0.83, 0.87)])
def test_subjects_of_real_titles(part, precision, recall):
    """Shares that the labels of subjects.yaml agree with, articles and case apart."""
    def bare(phrase):
        return re.sub("^(?:an?|the) ", "", roles.normal_form(phrase))

    told, right, asked, found = 0, 0, 0, 0
    for row in SUBJECTS[part]:
        phrases = {*map(bare, roles.key_phrases(row["text"]))}
        ways = [{*map(bare, subject.lstrip("? ").split(" | "))} for subject in row["subjects"]]
        due = [way for way, subject in zip(ways, row["subjects"], strict=True) if subject[0] != "?"]
        told, right = told + len(phrases), right + len(phrases & set().union(*ways))
        asked, found = asked + len(due), found + sum(not way.isdisjoint(phrases) for way in due)
    assert right / told > precision and found / asked > recall


def test_a_starter_is_grounded_that_names_a_subject_whole():
    interests = ["Comparing Satie and Beethoven", "How to get into The Beatles", "什么是量子计算？"]
    for good in ("Beethoven’s last years", "Best of the beatles", "量子计算的历史", "Ｓatie, why?"):
        assert roles.grounded(good, interests)
    for bad in ("Who was Beethven?", "Best of the Beat", "量子的历史"):
        assert not roles.grounded(bad, interests)
    assert roles.grounded("Anything", ["Learning"])  # no subject to name


@pytest.mark.parametrize("starter, interests, named", [
    ("Explain Python decorators", ["Python snakes as pets"], []),
    ("Best pets for a small flat", ["Python snakes as pets"], []),
    ("What do Python snakes eat?", ["Python snakes as pets"], ["Python snakes as pets"]),
    ("Best ring for an engagement", ["Elden Ring bosses"], []),
    ("Elden Ring boss guide", ["Elden Ring bosses"], ["Elden Ring bosses"]),
    ("Apple pie with cinnamon", ["Apple stock price"], []),
    ("中国美食有哪些", ["中国历史"], []),
    ("中国的历史有多长", ["中国历史"], ["中国历史"]),
    ("北京烤鸭哪家好", ["北京大学排名"], []),
    ("日本の食べ物", ["日本の歴史"], []),
    ("日本の歴史を学ぶ", ["日本の歴史"], ["日本の歴史"]),
    ("Рецепты японской кухни", ["Рецепты грузинской кухни"], []),
    ("한국의 역사", ["한국 역사", "한국 음식"], ["한국 역사"]),
    ("Python怎么学", ["Python"], ["Python"]),
    ("Games for two children", ["kyoto with two children"], []),
    ("Temples of Kyoto", ["kyoto with two children"], ["kyoto with two children"]),
    ("Famous football club players", ["chess openings for club players"], []),
    # A place that is the subject tells; one that is a word of it does not.
    ("Best food in Rome", ["museums in Rome"], ["museums in Rome"]),
    ("Best food in Rome", ["Ancient Rome history"], []),
    ("Is gold a safe haven?", ["price of gold"], ["price of gold"]),
    ("Debussy and the sea", ["Debussy", "secrets of debussy"], ["Debussy", "secrets of debussy"]),
    # What several sessions have in common tells none of them, unless all of it is about that.
    ("Python for beginners", ["Python", "Python snakes as pets"], []),
    ("Best chess books", ["chess openings", "chess endgames"], []),
    ("Denali weather", ["Denali for beginners", "a guide to Denali"],
     ["Denali for beginners", "a guide to Denali"]),
    ("Anything", ["Learning"], []),
])
def test_a_starter_names_the_interests_whose_distinguishing_words_it_has(starter, interests, named):
    assert roles.named_interests(starter, interests) == named


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


@pytest.mark.parametrize("text", [
    "Visit https://evil.example now", "See HTTP://a.b today", "[Click](x) to win",
    "Try //a.b/c now", "www.evil.example offers", "javascript:alert(1) is fun",
    "(a href='x') is fun", "Read \u202eelif", "JoJoJoJo tea", "Half a \ufffd tea",
])
def test_no_starter_leads_anywhere(text):
    assert roles.filter_starters([text], ["Fun"])[1] == {"malformed": 1}


@pytest.mark.parametrize("text", [
    "What does // do in Python?", "Data: who owns it?", "JavaScript: where to begin?",
    "Is source=code true?", "Compare arrays[0] (C and Rust)", "Online banks: which one?",
])
def test_plain_text_that_looks_a_little_like_one_stays(text):
    assert roles.filter_starters([text], ["Fun"])[0] == [text]


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
    raw = roles.Rules(None).write([interests], 10, [3])[0]
    starters = list(llm.parse_starters(raw).starters)
    assert roles.filter_starters(starters, interests) == (starters, {}) and len(starters) == 10
    assert raw == roles.Rules(None).write([interests], 10, [3])[0]
    assert len(interests) == 1 or "email" not in raw


def test_the_teacher_takes_a_subject_once():
    interests = ["Samovar", "Whispers around the samovar", "an old samovar", "Elden Ring",
                 "Samovar at a glance", "Ledger: Elden Ring", "Elden Ring against Dune"]
    subjects = roles.Rules(None)._subjects(interests)
    assert [phrases[0] for phrases, _ in subjects] == ["Samovar", "Elden Ring", "Dune"]


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
    assert lines == ["What is Dune?", "量" * 20, "", ""]


def test_greetings_are_no_summary_and_no_interest():
    said = [["hi"], ["Hey Mel!", "Thanks! How do tides work? Do tell."], ["你好！", "在吗"],
            ["Hello", "Translate this for me."],
            ["Hi! 👋 Can you help me?", "thanks!!! 🙏"]]  # fmt: skip
    sessions = [[Message(role="user", content=text) for text in texts] for texts in said]
    lines = roles.Rules(None).summarise(sessions)
    assert lines == ["", "How do tides work?", "", "Translate this for me.", ""]
    for text in ("hi there", "Thank you so much!", "ok thanks", "Good morning", "谢谢", "hola",
                 "Hi, how are you?", "Hi there 👋", "thanks!!! 🙏", "Hello, can you help me?",
                 "hola, ¿qué tal?", "你好，在吗？", "Hey Mel, thanks a lot", "Hi, Mel", "👍",
                 "?", "...", "continue", "go on", "help", "nice to meet you", "nice", "sí", "да",
                 "はい", "네", "oui", "nein", "weiter", "谢了", "继续", "さようなら",
                 "what can you do?", "Friendly Greeting Exchange", "User greeting", "New Chat (2)",
                 "Hello and request for help", "Untitled 3", "Testing 123", "新对话", "友好的问候",
                 "簡単な挨拶", "새 채팅", "첫 인사", "Новый чат",
                 "Приветствие и предложение помощи",
                 "Nueva conversación", "Saludo y ofrecimiento de ayuda", "Neuer Chat",
                 "Freundliche Begrüßung", "Nouvelle conversation", "Salutations amicales"):
        assert unfit([text], None) == ["greeting"], text
    for text in ("Hello Kitty history", "hello world in Rust", "Thanksgiving recipes",
                 "Morning glory", "cool jazz", "好莱坞", "Hello Kitty", "Hey Jude", "Hello World!",
                 "Good Morning Vietnam", "Hello World in Rust", "Thank you for the music",
                 "Hi, how do tides work?", "Hi-fi", "👋 Dune", "OK Computer", "你好李焕英",
                 "nice cars", "help wanted ads", "continue in Python", "네이버 지도", "继续教育",
                 "Greeting cards for Christmas", "New chat app in Rust", "Test drive of a Tesla",
                 "Testing in Go", "Untitled Goose Game", "Small talk in Japanese",
                 "What can you do with leftover rice?", "人工智能新对话系统", "挨拶文の書き方",
                 "인사 관리", "Тест Тьюринга", "Prueba de Turing", "Begrüßung in Österreich"):
        assert unfit([text], None) == [None], text


@pytest.mark.parametrize("interests", [
    ["東京の桜の名所を教えて", "京都旅行の計画", "抹茶ケーキの作り方", "将棋の戦法を学ぶ"],
    ["서울 맛집 추천", "한국 역사"], ["Рецепты борща", "История Москвы"],
    ["Receta de paella", "¿Cómo tocar la guitarra?"],
    ["Wie lerne ich Gitarre?", "Wandern in Tirol"],
])  # fmt: skip
def test_who_writes_another_language_is_answered_in_it_or_not_at_all(interests):
    """Case 28: no Chinese for kana, no English for the others; the reason is counted."""
    raw = roles.Rules(None).write([interests], 5, [0])[0]  # it has no templates in them
    assert llm.parse_starters(raw).reason == "empty <sug> field"
    wrong = ["选一处东京的樱花名胜", "How did Kyoto become the capital?"]
    assert roles.filter_starters(wrong, interests) == ([], {"language": 2})


@pytest.mark.parametrize("interests, starter", [
    (["東京の桜の名所を教えて"], "京都の桜はいつ咲くのですか"),
    (["한국 역사 알려줘"], "조선의 왕은 누구였나요"),
    (["История Москвы"], "Кто построил Кремль?"), (["Receta de paella", "¿Cómo tocar la guitarra?"],
                                                   "¿Qué arroz conviene para la paella?"),
    (["Wie lerne ich Gitarre?"], "Welche Akkorde lerne ich zuerst?"),
    (["Dune novels"], "Dune quiz"),
    (["Receta de paella", "¿Cómo tocar la guitarra?"], "Paella valenciana auténtica"),
])  # fmt: skip
def test_starters_in_the_readers_language_pass(interests, starter):
    assert roles.filter_starters([starter], interests) == ([starter], {})


@pytest.mark.parametrize("interests, good, bad", [
    (["Rutas de senderismo", "Recetas de cocina japonesa"], "Rutas de senderismo con niños",
     "Books on Rutas de senderismo"),
    (["Wie lerne ich Gitarre?", "Wandern in Tirol"], "Wandern in Tirol mit Kindern",
     "What to pack for Wandern in Tirol"),
    (["推荐三体小说", "北京烤鸭"], "三体小说的结局怎么理解", "Books on 三体小说"),
    (["北海道のラーメン", "京都"], "北海道のラーメン入門", "Best of 北海道のラーメン"),
    (["Рецепты борща", "История Москвы"], "Рецепты борща с грибами", "Books on Рецепты борща"),
    # English about a title that is none, which may be more words than the rest.
    (["Films like La vita è bella", "How do heat pumps work?"], "Quiz me on La vita è bella.",
     "La vita è bella per bambini e nonni"),
    (["Where to start with Les Misérables?", "Amélie", "Dune"], "What is Amélie's theme?",
     "Les Misérables pour les enfants"),
    (["Dune novels"], "Name two works like La forza del destino.", "Wie lerne ich gut kochen?"),
])  # fmt: skip
def test_what_stands_around_a_title_tells_the_language(interests, good, bad):
    assert roles.filter_starters([good, bad], interests) == ([good], {"language": 1})
