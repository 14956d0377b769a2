"""What methods are compared with: rule-based interests, few sessions, floor and ceiling."""

from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import micro

import icebreaker as ib
from roles.writer import Writer
from run import Run
from tables import controls
from world import people


def test_rule_based_interests_are_the_frequent_and_the_recent_ones():
    said = "chess openings, tax return, chess openings, pasta, chess openings, rare stamps"
    summaries = said.split(", ")
    texts = sorted({*summaries})
    history = ib.make_history(
        summaries, range(6, 0, -1), lambda x: torch.eye(len(texts))[[texts.index(y) for y in x]]
    )
    run = SimpleNamespace(
        histories={"u": [history]}, config=SimpleNamespace(rid=SimpleNamespace(duplicate_cosine=1)),
        states={"u": [SimpleNamespace(interests=["pasta", "tax return"])]},
    )  # fmt: skip
    assert controls.interests_of(run, "u", "rule") == ["chess openings", "rare stamps"]
    assert controls.interests_of(run, "u", "RID") == ["pasta", "tax return"]
    assert controls.interests_of(run, "u", "all")[:2] == ["rare stamps", "chess openings"]


def test_users_with_few_sessions_are_known_by_their_last_ones(finished, monkeypatch):
    run, asked = Run(micro(finished.parent), describe=False), []

    def write(self, adapter, inputs, n, seed):
        asked.append(inputs)
        return [[[]] * n for _ in inputs]

    monkeypatch.setattr(Writer, "write", write)
    users = run.ids("test")
    made = controls.few_sessions(run, Writer(run.config, Path("unasked")), users)
    assert [*made] == ["IceBreaker, 1 session", "IceBreaker, 2 sessions"]
    assert [[*rows] for rows in made.values()] == [users, users]
    for n, inputs in enumerate(asked, 1):
        for user, interests in zip(users, inputs, strict=True):
            last = [s.summary for s in run.users[user].sessions[-n:]]
            assert interests and {*interests} <= {*last}


def test_the_oracle_is_above_what_it_was_shown_and_the_floor_is_drawn_anew(finished):
    run = Run(micro(finished.parent), describe=False)
    users, truth = run.ids("test")[:3], people.load_truth(finished / "world")
    k, n = run.config.generator.list_size, run.config.ab.lists
    shown = sorted({y for x in run.impressions for y in x.starters})
    seen = {"a": {u: [shown[:4]] for u in users}, "b": {u: [shown[4:7], []] for u in users}}
    made = controls.floor_and_ceiling(run, truth, users, seen)
    for user in users:
        (best,) = made["oracle"][user]
        assert len({*best}) == k
        floor = made["random starters"][user]
        assert [len({*x}) for x in floor] == [k] * n and len({*map(tuple, floor)}) > 1
        assert truth.expected_clicks(user, best) >= truth.expected_clicks(user, shown[:k])
