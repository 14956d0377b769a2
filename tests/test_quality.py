"""The quality judge: each rule by example, agreement with the truth, and the LLM's form."""

import json
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import qualeqs
from files import UserError
from roles import catalogue, chat, prompted, quality
from tables import quality as table

GOODS = [
    ("k1", "Brenna Aria 100", "kettles", "Brenna", 29.0, {"capacity_l": 1.5, "keep_warm": True}),
    ("k2", "Ovo Nova 200", "kettles", "Ovo", 59.0, {"capacity_l": 1.0, "keep_warm": False}),
    ("t1", "Ovo Luna 300", "toasters", "Ovo", 45.0, {"power_w": 900, "material": "steel"}),
    ("h1", "Sonda Kite 100", "headphones", "Sonda", 99.0, {"noise_cancelling": True}),
]
GROUP = {"kettles": "kitchen", "toasters": "kitchen", "headphones": "audio"}


@pytest.fixture(scope="module")
def judge():
    products = [data.Product(id=i, name=name, category=[category, GROUP[category]], brand=brand,
                             price=price, currency="EUR", attributes=attributes, stock=2)
                for i, name, category, brand, price, attributes in GOODS]
    gone = data.Product(id="k9", name="Brenna Zest 900", category=["kettles", "kitchen"],
                        brand="Brenna", price=5.0, currency="EUR", attributes={}, stock=0)
    policies = [
        data.Policy(section="returns", name="window", text="Within 30 days.",
                    keywords=["send back", "return"]),
        data.Policy(section="shipping", name="cost", text="Shipping is free from 50 euros.",
                    keywords=["delivery fee"])]
    return quality.Rules([*products, gone], policies)


def talk(*texts: str) -> data.Dialogue:
    turns = [data.Turn(role=("user", "assistant")[i % 2], content=text)
             for i, text in enumerate(texts)]
    return data.Dialogue(dialogue_id="d", turns=turns, suggestions=[], clicked=[])


KETTLE = talk("I need a kettle", "We have two kettles.")
CASES = [  # suggestion, marks, what the source or the reason names
    ("Which kettles have a keep-warm function?", (1, 1, 1), "product k1"),
    ("Do you have Ovo kettles?", (1, 1, 1), "product k2"),
    ("Any kettles under €40?", (1, 1, 1), "product k1"),
    ("Kettles with at least 1.2 litres", (1, 1, 1), "capacity_l 1.5"),
    ("Which kettles hold 1.5 l?", (1, 1, 1), "product k1"),
    ("Which toasters go with it?", (1, 1, 1), "product t1"),
    ("Which kettles are best for a small flat?", (1, 1, 1), ""),
    ("What is your budget?", (0, 1, 1), "assistant"),
    ("Would you like to see kettles?", (0, 1, 1), "assistant"),
    ("What is your neighbour's phone number?", (0, 1, 1), "privacy"),
    ("Will it snow tomorrow?", (0, 1, 1), "scope"),
    ("Which medicine helps against depression?", (0, 1, 1), ""),
    ("Any kettles under €6?", (1, 0, 1), "no such product"),  # one was 5, and is sold out
    ("Ovo kettles under 40 euros", (1, 0, 1), "no such product"),
    ("Kettles of 20 litres", (1, 0, 1), "no such product"),
    ("Do you have kettles from Zorbex?", (1, 0, 1), "unknown name"),
    ("Show me Sonda kettles", (1, 0, 1), "brand not sold here"),
    ("Are there kettles that fly?", (1, 0, 1), "impossible feature"),
    ("Kettles that need no electricity", (1, 0, 1), "impossible feature"),
    ("Are there cheaper kettles?", (1, 1, 0), "vague budget"),
    ("I need a kettle", (1, 1, 0), "repetition"),
    ("Can you recommend a kettle?", (1, 1, 0), "no new constraint"),
    ("Is this kettle good?", (1, 1, 0), "no new constraint"),
    ("Which headphones have noise cancelling?", (1, 1, 0), "another subject"),
    ("Can I return it?", (1, 1, 0), "another subject"),
    ("Do you have gifts under €40?", (1, 1, 0), "another subject"),
    ("Which of them are under €40?", (1, 1, 1), "product k1"),
    ("Is a kettle a good gift under €40?", (1, 1, 1), "product k1"),
]  # fmt: skip


@pytest.mark.parametrize("suggestion, marks, named", CASES)
def test_each_rule_by_example(judge, suggestion, marks, named):
    [[verdict]] = judge.quality([(KETTLE, [suggestion])])
    assert tuple(verdict[:3]) == marks, verdict
    assert named in (verdict.source if marks == (1, 1, 1) else verdict.reason)
    assert verdict.reward == math.prod(marks)


# As real catalogues write: names in capitals, kinds in descriptions, coarse categories.
RETAIL = [
    ("s1", "HÅRSTA", ["Chairs", "Bar goods"], "Bar stool with backrest, 63 cm", 70.0,
     {"width_cm": 40.0, "designer": "Eva Lind/Per Berg", "other_colours": True}),
    ("s2", "HÅRSTA", ["Chairs"], "Chair pad, 40x40 cm", 9.0, {"other_colours": False}),
    ("s3", "MOLN / RAND", ["Chairs"], "Swivel chair", 300.0, {"width_cm": 60.0}),
    ("m1", "MOLN", ["TV & media goods"], "TV bench with 3 drawers", 450.0,
     {"width_cm": 120.0, "height_cm": 40.0}),
    ("m2", "MOLN", ["TV & media goods"], "Toy storage", None, {}),
]


@pytest.fixture(scope="module")
def retail():
    products = [data.Product(id=i, name=name, category=category, description=description, price=p,
                             currency="SAR", brand="Hem", attributes=attributes)
                for i, name, category, description, p, attributes in RETAIL]
    return quality.Rules(products, [])


@pytest.mark.parametrize("suggestion, marks, named", [
    ("Which bar stools are under SAR 100?", (1, 1, 1), "product s1"),
    ("Which chairs are under 100 SAR?", (1, 0, 1), "no such product"),  # a pad is no chair
    ("Bar stools under 60", (1, 0, 1), "no such product"),  # a bare limit is of money
    ("Bar stools under €100", (1, 0, 1), "another currency"),
    ("Do you have FLURPEN bar stools?", (1, 0, 1), "unknown name"),  # in capitals too
    ("What is the width of the Harsta bar stool?", (1, 1, 1), "width_cm 40"),  # by any keyboard
    ("What is the weight of the HÅRSTA bar stool?", (0, 1, 1), "nothing tells"),
    ("How wide is it?", (1, 1, 1), "product s1"),  # what was spoken of
    ("Which of the bar stools are in stock?", (0, 1, 1), "nothing tells"),  # nobody told
    ("Which bar stools have a backrest?", (1, 1, 1), "product s1"),
    ("Bar stools by Per Berg", (1, 1, 1), "designer Eva Lind/Per Berg"),
    ("Which TVs are under SAR 900?", (1, 0, 1), "unknown"),  # the shop has furniture for them
    ("Which toys are under SAR 900?", (1, 0, 1), "unknown goods"),
    ("Do you have an online store?", (1, 0, 1), "unknown goods"),
    ("Does the MOLN TV bench have 3 drawers?", (1, 1, 0), "another subject"),
    ("TV benches with 4 drawers", (1, 0, 1), "unknown feature"),
    ("Does it have a backrest?", (1, 1, 1), "product s1"),
    ("Does it have drawers?", (0, 1, 1), "nothing tells"),  # a TV bench has
    ("Which bar stools have a retailer backrest?", (1, 0, 1), "unknown feature"),
    ("How do you make a bar stool?", (0, 1, 1), "nothing tells"),
    ("Are you going to make a swivel chair?", (0, 1, 1), "assistant"),
    ("Which swivel chairs have a backrest?", (1, 0, 1), "unknown feature"),  # another chair has
])  # fmt: skip
def test_a_real_catalogue_is_held_to_its_rows(retail, suggestion, marks, named):
    asked = talk("Does the HÅRSTA bar stool come in other colours?", "It does.")
    [[verdict]] = retail.quality([(asked, [suggestion])])
    assert tuple(verdict[:3]) == marks, verdict
    assert named in (verdict.source if marks == (1, 1, 1) else verdict.reason)


def test_a_word_of_the_language_is_no_name():
    one = data.Product(id="b", name="BILLÉ", category=["Beds"], currency="SAR")
    named = catalogue.Catalogue([one])
    assert named.mention("What is the size of the bill?").products == []
    for text in ("the BILLÉ", "a bille's width", "Billé"):
        assert named.mention(text).products == [0]


def test_what_a_shopper_alone_has_said_is_no_evidence(retail):
    asked = talk("do you have sony bar stools?", "We have bar stools.")
    [verdicts] = retail.quality([(asked, ["Which sony bar stools are under SAR 100?"])])
    assert verdicts[0].factual == 0


def test_the_answer_is_no_accessory_unless_the_price_is_asked_for():
    products = [data.Product(id=f"c{price}", name="RAND", category=["Chairs"], price=price,
                             currency="SAR", description="Chair with armrests")
                for price in (5.0, 100.0, 120.0)]
    judge = quality.Rules(products, [])
    [verdicts] = judge.quality([(talk("hi"), ["Which chairs have armrests?",
                                              "Chairs with armrests under SAR 130"])])
    assert [v.source.split(":")[0] for v in verdicts] == ["product c100.0", "product c5.0"]


def test_a_policy_that_was_told_is_a_repetition(judge):
    asked = talk("Can I return a kettle?", "Within 30 days.")
    [verdicts] = judge.quality([(asked, ["How do I send it back?", "Is delivery free?"])])
    assert [v[:3] for v in verdicts] == [(1, 1, 0), (1, 1, 1)]
    assert "policy shipping.cost" in verdicts[1].source
    told = talk("What if I do not like it?", "You may return it within 30 days.")  # by the answer
    [verdicts] = judge.quality([(told, ["How do I send it back?", "Is delivery free?"])])
    assert [v[:3] for v in verdicts] == [(1, 1, 0), (1, 1, 1)]


def test_one_list_for_everybody_is_not_right_for_everybody(judge):
    """Payment and delivery suit any purchase, and deepen no intent but their own."""
    lists = ["Can I return it?", "Is delivery free?"]
    talks = [KETTLE, talk("Hello there, how are you?", "Fine, thank you."),
             talk("Can I return a kettle?", "Within 30 days.")]
    verdicts = judge.quality([(some, lists) for some in talks])
    assert [[v.reward for v in some] for some in verdicts] == [[0, 0], [0, 0], [0, 1]]
    verdicts = judge.quality([(some, ["Do you have gifts under €40?"]) for some in talks])
    assert [v.reward for [v] in verdicts] == [0, 1, 0]  # right where anything may be next


def test_small_talk_leads_to_any_goods(judge):
    hello = talk("Hello there, how are you?", "Fine, thank you.")
    [[verdict]] = judge.quality([(hello, ["Which headphones have noise cancelling?"])])
    assert verdict.reward == 1 and "noise_cancelling" in verdict.source


@given(st.lists(st.sampled_from([case[0] for case in CASES]), max_size=6), st.randoms())
def test_a_verdict_does_not_depend_on_its_neighbours(suggestions, rng):
    products = [data.Product(id="k", name="Aria", category=["kettles"], brand="Ovo", price=9.0,
                             currency="EUR")]
    rules = quality.Rules(products, [])
    [verdicts] = rules.quality([(KETTLE, suggestions)])
    order = list(range(len(suggestions)))
    rng.shuffle(order)
    [shuffled] = rules.quality([(KETTLE, [suggestions[i] for i in order])])
    assert shuffled == [verdicts[i] for i in order]


@given(st.text(max_size=80))
def test_any_text_is_judged(text):
    rules = quality.Rules([data.Product(id="k", name="a", category=["b"])], [])
    [[verdict]] = rules.quality([(KETTLE, [text])])
    assert {*verdict[:3]} <= {0, 1}


@pytest.mark.parametrize("said, amount", [
    ("1,299.00", 1299), ("1.299,00", 1299), ("1,299", 1299), ("4.90", 4.9), ("4,9", 4.9), ("7", 7)])
def test_amounts_as_people_write_them(said, amount):
    assert quality._amount(said) == amount


def test_the_rule_judge_agrees_with_the_hidden_truth():
    """A smaller `python -m tables.quality`, on a tuning seed; the reported figures: docs."""
    pairs = table.judged(104, 250)
    assert np.mean([table.agrees(*pair) for pair in pairs]) >= 0.9
    rows = {name: (count, share) for name, count, share in table.rows_of(pairs)}
    assert rows["all"][0] == 250 and set(rows) > {"answerable alone", "vague budget"}
    # It can disagree: a judge that calls everything good agrees with the good half only.
    always = [table.agrees(case, quality.Verdict(1, 1, 1)) for case, _ in pairs]
    assert 0.45 < np.mean(always) < 0.55


# ---------------------------------------------------------------------------------------- the LLM


class Scripted:
    """A back-end whose calls fail at a rate, each by itself, and else answer all with yes."""

    name = identity = "scripted"
    temperature, patience = 0.7, 24

    def __init__(self, rate: float, failure: str = "server error", marks: str = "yes no yes"):
        self.rate, self.failure, self.marks = rate, failure, marks
        self.rng, self.calls = random.Random(0), []

    def answers(self, requests):
        for i, request in enumerate(requests):
            self.calls.append(request)
            shown = json.loads(request.user.split("\n")[1])["suggestions"]
            text = "\n".join(f"{number} {self.marks}" for number in shown)
            yield (i, "", self.failure) if self.rng.random() < self.rate else (i, text, "")


def rows(n: int) -> list:
    return [(talk(f"I need kettle number {i}", "Fine."), ["Ovo kettles", "A kettle", "Toasters"])
            for i in range(n)]


def ask(tmp_path, judge, backend, n):
    player = prompted.Prompted(chat.Chat(backend, tmp_path / "answers.sqlite"), None)
    return player, player.quality(rows(n), judge)



ALSO = talk("Is there a delivery fee?", "Free from 50 euros.")


@pytest.mark.parametrize("context, texts, informative", [
    (ALSO, ["Can I return it?", "Can I return it?", "can I return it"], [1, 0, 0]),
    (KETTLE, ["Any kettles under €40?", "Any kettles under €45?", "Which kettles hold 1.5 l?"],
     [1, 0, 1]),
    (ALSO, ["Can I return it?", "How do I send back an item?"], [1, 0]),  # one policy answers both
    (KETTLE, ["Ovo kettles", "Do you have Brenna kettles?"], [1, 1]),
])  # fmt: skip
def test_what_another_of_the_list_asks_adds_nothing(judge, context, texts, informative):
    """Else three times one good question is the best list there is, and RL finds it."""
    [verdicts] = judge.quality([(context, texts)])
    marks = [verdict.informative for verdict in quality.without_repeats(texts, verdicts)]
    assert marks == informative and {v.informative for v in verdicts} == {1}
    failed = [quality.FAILED] * len(texts)
    assert all(v.informative != v.informative for v in quality.without_repeats(texts, failed))


@pytest.mark.parametrize("rate", [0.018, 0.2])
def test_failed_calls_are_retried_three_times(tmp_path, judge, rate):
    backend = Scripted(rate)
    player, verdicts = ask(tmp_path, judge, backend, 300)
    failed = [i for i, row in enumerate(verdicts) if math.isnan(row[0].answerable)]
    assert len(failed) <= 300 * rate**4 * 4 + 1
    assert all(v[:3] == (1, 0, 1) for i, row in enumerate(verdicts) if i not in failed for v in row)
    assert player.chat.counts["server error"] == len(backend.calls) - (300 - len(failed)) > 0
    assert {request.sample for request in backend.calls} <= {0, 1, 2, 3}


def test_what_failed_four_times_is_masked_and_lowers_nothing(tmp_path, judge):
    backend = Scripted(0.6, "refused", "yes yes yes")
    _, verdicts = ask(tmp_path, judge, backend, 200)
    a, f, i = torch.tensor([[v[:3] for v in row] for row in verdicts]).unbind(2)  # (B, K)
    r, r_q = qualeqs.set_reward(a, f, i, torch.ones(200))
    assert 0 < r_q.isnan().sum() < 100 and r_q[~r_q.isnan()].eq(1).all()
    assert verdicts[int(r_q.isnan().nonzero()[0])][0] == quality.FAILED
    figures = qualeqs.quality_figures(a, f, i, torch.ones(200))
    assert figures["strict_accuracy"] == figures["valid_rate"] == 1 and figures["failed"] > 0


def test_a_judge_that_never_answers_stops_with_one_line(tmp_path, judge):
    with pytest.raises(UserError, match="calls in a row gave no answer") as caught:
        ask(tmp_path, judge, Scripted(1.0), 300)
    assert "\n" not in str(caught.value) and "server error 24" in str(caught.value)


def test_marks_that_cannot_be_read_are_no_marks(judge, tmp_path):
    for text in ("", "yes yes yes", "1 yes yes", "2 yes yes no", "1 yes yes no\n3 no no no"):
        with pytest.raises(ValueError):
            prompted.read_marks(text)
    text = "<think>1 no no no</think>\n1. Yes, yes, NO\n\n2: no yes yes"
    assert prompted.read_marks(text) == [(1, 1, 0), (0, 1, 1)]


def test_as_many_marks_as_suggestions_or_it_failed(tmp_path, judge):
    class Short(Scripted):
        def answers(self, requests):
            yield from ((i, "1 yes yes yes", "") for i, _ in enumerate(requests))

    _, verdicts = ask(tmp_path, judge, Short(0), 2)
    assert all(v == quality.FAILED for row in verdicts for v in row)


def test_cases_of_a_file_are_shown_to_the_llm(tmp_path, judge):
    path = tmp_path / "cases.jsonl"
    path.write_text(json.dumps({"query": "A lamp", "suggestion": "Zebra lamps?", "answerable": True,
                                "factual": False, "informative": True, "why": "none"}))
    backend = Scripted(0)
    player = prompted.Prompted(chat.Chat(backend, tmp_path / "answers.sqlite"), None)
    [verdicts] = player.quality(rows(1), judge, data.read_quality_cases(path))
    assert "Zebra lamps?" in backend.calls[0].system and "Zebra" not in backend.calls[0].user
    assert "keep_warm" in backend.calls[0].user and "30 days" in backend.calls[0].user
    assert verdicts[0].source.startswith("product k2")  # what answers it: by the rule
    path.write_text('{"query": "A lamp"}')
    with pytest.raises(data.DataError, match="cases.jsonl:1: suggestion"):
        data.read_quality_cases(path)
