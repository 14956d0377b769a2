"""Metrics by hand, and a report that user text cannot break."""

import numpy as np
import pytest
import torch

from stages import eval as evaluation
from stages import metrics


def encode(texts):
    rows = [
        torch.randn(16, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts
    ]
    return torch.nn.functional.normalize(torch.stack(rows), dim=1) if rows else torch.zeros(0, 16)


class Classifier:
    accuracy = 0.5

    def categories(self, texts):
        return [t.split()[-1] for t in texts]


TALK = ["tea time", "red wine", "chess openings", "jazz piano"]
LISTS = {
    "PE": {"a": [["tea time", "tea cup"]], "b": [["red wine", "red wine bar"]]},
    "SFT": {"a": [["chess openings", "jazz piano"]], "b": [[]]},
}


def score(user, starters):
    return np.array([0.9 if "chess" in s else 0.3 for s in starters])


RANKERS = {"utility": score}
TOLD = {"a": ["Tea and chess"], "b": []}  # histories


def measure(lists, rankers=RANKERS):
    return metrics.measure(lists, rankers, encode, Classifier(), TALK, TOLD, k=2)


def evaluate(lists, rankers=RANKERS):
    result = evaluation.evaluate(measure(lists, rankers), draws=50)
    return result | {"lists_per_user": 1, "classifier_accuracy": 0.5}


def test_r_user_and_r_score_by_hand():
    values = {"SFT": {"utility": {"a": 0.5, "b": 0.2, "c": 0.3}},
              "PE": {"utility": {"a": 0.4, "b": 0.2, "c": 0.6}}}
    assert metrics.user_values(values, "SFT", "r_user") == {"a": 1.0, "b": 0.5, "c": 0.0}
    lifts = metrics.user_values(values, "SFT", "r_score")
    assert lifts == pytest.approx({"a": 0.1, "b": 0.0, "c": -0.3})


def test_evaluate_counts_an_empty_list_as_nothing():
    result = evaluate(LISTS)
    sft = result["methods"]["SFT"]
    assert sft["empty"] == 0.5 and sft["starters"] == 1
    assert sft["utility"] == pytest.approx(0.3)  # user a: .6, user b: 0
    assert sft["r_user"] == 0.5 and sft["r_score"] == pytest.approx((0.3 - 0.3) / 2)
    assert sft["semantic"] == 1.0  # two categories for a, none for b
    assert "r_user" not in result["methods"]["PE"]


def test_evaluate_refuses_methods_with_other_users():
    with pytest.raises(ValueError, match="same users"):
        evaluate({**LISTS, "X": {"a": [[]]}})


def test_keywords_of_varied_lists_outnumber_those_of_a_repeated_one():
    varied, same = ["chess openings", "jazz piano", "学习古筝"], ["jazz piano"] * 3
    count = metrics.KeywordCounter(varied + same)
    assert count(varied) > count(same) > 0 == count([])
    assert count(["gchzs pxano"]) == 0  # made-up words
    assert metrics.KeywordCounter([])(["the"]) == 0


def test_a_list_counts_the_same_whatever_it_is_compared_with():
    def lexical(lists):
        return measure(lists)["SFT"]["lexical"]

    assert lexical(LISTS) == lexical({**LISTS, "twin": LISTS["SFT"]})


def test_the_interval_is_as_wide_as_the_normal_one_and_keeps_seeds_apart():
    """1.96 standard errors either side; what lies between seeds is no uncertainty over users."""
    values = np.random.default_rng(0).normal(1, 1, 400)
    mean, low, high = metrics.bootstrap([values], 4000, 0)
    half = 1.96 * values.std() / 400**0.5
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)
    assert (mean, low, high) == metrics.bootstrap([values], 4000, 0)
    mean, low, high = metrics.bootstrap([values - 100, values + 100], 4000, 0)
    assert mean == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * half / 2**0.5, rel=0.15)


def test_report_is_written_and_user_text_stays_text(tmp_path):
    result = evaluate(LISTS)
    nasty = "<script>x</script> [link](http://a) | **bold**\n# head"
    row = {"user_id": "a", "interests": [nasty], "starters": {"PE": [[nasty]]}}
    evaluation.write_report(result, [row], {"a": [nasty]}, {"a": [0.5]}, tmp_path)
    page, table = (tmp_path / "examples.md").read_text(), (tmp_path / "table.md").read_text()
    assert "<script" not in page and "[link]" not in page and "\n# head" not in page
    assert metrics.escape("JoJo's & Co.") == "JoJo's &amp; Co\\."
    assert "| PE |" in table and "| SFT |" in table and "+0.82" in table


def test_without_logs_there_are_no_utility_columns(tmp_path):
    result = evaluate(LISTS, {})
    assert "R-Score" not in evaluation.table_markdown(result).splitlines()[2]
    evaluation.write_report(result, [], {}, {}, tmp_path)
    assert "True clicks |" not in (tmp_path / "table.md").read_text().partition("The paper's")[0]


def test_the_others_of_the_wrong_user_control_are_the_next_by_id():
    others = metrics.other_users(["c", "a", "d", "b", "e"])
    assert others["a"] == ["b", "c", "d"] and others["d"] == ["e", "a", "b"]
    times = [user for theirs in others.values() for user in theirs]
    assert all(times.count(user) == metrics.OTHERS for user in others)  # as often as each other
    assert metrics.other_users(["a", "b"]) == {"a": ["b"], "b": ["a"]}
    assert metrics.other_users(["a"]) == {"a": []}


def test_own_others_and_the_personal_part_by_hand():
    """Chess is worth .9 to a and .5 to b, all else .3: a style that all like is not personal."""
    def score(user, starters):
        return np.array([{"a": 0.9, "b": 0.5}[user] if "chess" in s else 0.3 for s in starters])

    lists = {"PE": {"a": [["chess"], []], "b": [["chess"]]},
             "SFT": {"a": [["tea"]], "b": [["tea"]]}}
    values = metrics.measure(lists, {"utility": score}, encode, Classifier(), TALK, TOLD, k=1)
    assert values["PE"]["others_utility"] == pytest.approx({"a": 0.25, "b": 0.9})
    assert values["PE"]["personal_utility"] == pytest.approx({"a": 0.2, "b": -0.4})
    assert values["SFT"]["personal_utility"] == pytest.approx({"a": 0, "b": 0})
    alone = {"PE": {"a": [["chess"]]}}  # nobody else
    values = metrics.measure(alone, {"utility": score}, encode, Classifier(), TALK, TOLD, k=1)
    assert "personal_utility" not in values["PE"] and values["PE"]["utility"] == {"a": 0.9}


def test_who_is_easy_to_please_cancels_in_the_mean_of_the_personal_part():
    ease = dict(zip("abcdef", np.random.default_rng(0).random(6), strict=True))
    lists = {"PE": {user: [["tea"]] for user in ease}}
    told = {user: [] for user in ease}
    values = metrics.measure(lists, {"utility": lambda u, ys: np.full(len(ys), ease[u])}, encode,
                             Classifier(), TALK, told, k=1)["PE"]["personal_utility"]
    assert np.mean([*values.values()]) == pytest.approx(0)
