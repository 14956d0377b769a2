"""What the hidden truth tells: the matcher's right and wrong, topics, chores."""

import json
from types import SimpleNamespace

from tables import truth as hidden


def test_the_matcher_is_judged_by_hidden_subjects(tmp_path):
    knows = {  # text -> topic, subjects
        "found": ("games", {"chess"}), "wrong": ("games", {"go"}), "missed": ("food", {"pasta"}),
        "unasked": ("food", {"pasta"}), "chore": ("chores", {"units"}),
        "chess again": ("games", {"chess"}), "pasta": ("food", {"pasta"}),
        "units": ("chores", {"units"}),
    }  # fmt: skip
    truth = SimpleNamespace(taxonomy=SimpleNamespace(
        understand=lambda text: (*knows[text], ""), functional=lambda topic: topic == "chores",
    ))  # fmt: skip
    before = ["found", "wrong", "missed", "unasked", "chore"]
    after = [SimpleNamespace(summary=x) for x in ("chess again", "pasta", "units")]
    (tmp_path / "match").mkdir()
    (tmp_path / "match" / "revisited.json").write_text(json.dumps({"u": [[1, 1, 0, -1, 1]]}))
    run = SimpleNamespace(
        folder=tmp_path, histories={"u": [SimpleNamespace(texts=before)]},
        parts=lambda user, cut: (before, after),
        config=SimpleNamespace(data=SimpleNamespace(cuts=[0.5])),
    )  # fmt: skip
    assert hidden.matcher_quality(run, truth, ["u"]) == {"precision": 1 / 3, "recall": 1 / 2}


def test_topics_count_what_is_known_and_chores_apart():
    known = {"a": "chess", "b": "pasta", "c": "units", "d": "pasta"}
    truth = SimpleNamespace(taxonomy=SimpleNamespace(
        understand=lambda text: (known.get(text), set(), ""),
        functional=lambda topic: topic == "units", category={"chess": "games", "pasta": "food"},
    ))  # fmt: skip
    assert hidden.topics(truth, [*"abcde"]) == {"games": 1, "food": 2, "Chores": 1}
    assert hidden.chore_shares(truth, {"u": [*"abcd"], "of nothing known": ["e"]}) == {"u": 0.25}
