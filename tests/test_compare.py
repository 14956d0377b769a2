"""What a reproduction compares: choosers, users with few sessions, interests, and their worth."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import micro

import icebreaker as ib
from pipeline import Pipeline
from stages import isg
from tables import compare, reproduce
from world import people


def test_searched_lists_take_what_was_written_once_and_the_best_first(finished):
    p = Pipeline(micro(finished.parent), describe=False)
    users, k = p.ids("test"), p.config.generator.list_size
    shown = sorted({y for x in p.impressions for y in x.starters})
    written = {u: [shown[9 * i : 9 * i + 5], shown[9 * i + 3 : 9 * i + 9]]
               for i, u in enumerate(users)}  # fmt: skip
    written |= {users[0]: [[]], users[1]: [shown[: k - 1]], users[2]: [["One", "one"] + shown[:k]]}
    made = compare.searched(p, written, 3)
    assert made[users[0]] == [] and [sorted(x) for x in made[users[1]]] == written[users[1]]
    assert [len(x) for x in made[users[2]]] == [k]  # what is left over is no full list
    for user in users[3:]:
        starters, own = ([y for x in rows for y in x] for rows in (made[user], written[user]))
        assert len(starters) == len({*starters}) and {*starters} <= {*own}
        assert [len(x) for x in made[user]] == [k] * (len({*own}) // k)
        pool = compare.pool_of(written[user])
        utility, similarity, _ = isg.score_pools(
            p, p.ranker("train"), [p.states[user][-1]], [pool]
        )
        dpo = p.config.dpo
        best, _ = ib.list_search(
            ib.min_max(utility), similarity, k, dpo.beam, dpo.expand, dpo.weight
        )
        assert made[user][0] == [pool[j] for j in best[0, 0].tolist()]
    assert compare.reranked(p, "SFT", {users[0]: [[]]})["SFT, MMR"] == {users[0]: [[]]}


def test_arms_with_list_search_show_half_of_each_pool_in_turn(finished):
    p = Pipeline(micro(finished.parent), describe=False)
    p.config.ab = p.config.ab.model_copy(update={"lists": 3, "searched": 4})
    shown = sorted({y for x in p.impressions for y in x.starters})
    lists = [shown[5 * i : 5 * i + 5] for i in range(8)]
    users = p.ids("test")[:2]
    first, second = (
        compare.searched(p, dict.fromkeys(users, part), 2) for part in (lists[:4], lists[4:])
    )
    made = compare.searched_in_turn(p, dict.fromkeys(users, lists))
    for user in users:
        assert made[user] == first[user] + second[user][:1] and len(first[user]) == 2


def test_the_value_of_what_is_chosen_is_that_of_list_search(finished):
    p = Pipeline(micro(finished.parent), describe=False)
    user, k = p.ids("test")[0], p.config.generator.list_size
    lists = {user: [sorted({y for x in p.impressions for y in x.starters})[:20]]}
    chosen = compare.reranked(p, "SFT", lists)
    values = compare.search_values(p, lists, chosen | {"none": {user: [[]]}})
    assert values["none"][user] == 0
    pools = [compare.pool_of(lists[user])]
    utility, similarity, _ = isg.score_pools(p, p.ranker("train"), [p.states[user][-1]], pools)
    utility = ib.min_max(utility)
    best, _ = ib.list_search(utility, similarity, k, 8, 20, p.config.dpo.weight)
    one, weight = best[0, 0], p.config.dpo.weight
    expected = weight * float(utility[0, one].mean())
    expected += (1 - weight) * float(ib.list_diversity(similarity[0][one][:, one]))
    assert values["SFT, list search, all tried"][user] == pytest.approx(expected, abs=1e-5)
    assert max(values, key=lambda m: values[m][user]) == "SFT, list search, all tried"


def test_rule_based_interests_are_the_frequent_and_the_recent_ones():
    said = "chess openings, tax return, chess openings, pasta, chess openings, rare stamps"
    summaries = said.split(", ")
    texts = sorted({*summaries})
    history = ib.make_history(
        summaries, range(6, 0, -1), lambda x: torch.eye(len(texts))[[texts.index(y) for y in x]]
    )
    p = SimpleNamespace(
        histories={"u": [history]}, config=SimpleNamespace(rid=SimpleNamespace(duplicate_cosine=1)),
        states={"u": [SimpleNamespace(interests=["pasta", "tax return"])]},
    )  # fmt: skip
    assert compare.interests_of(p, "u", "rule") == ["chess openings", "rare stamps"]
    assert compare.interests_of(p, "u", "RID") == ["pasta", "tax return"]
    assert compare.interests_of(p, "u", "all")[:2] == ["rare stamps", "chess openings"]


def test_users_with_few_sessions_are_known_by_their_last_ones(finished, monkeypatch):
    p, asked = Pipeline(micro(finished.parent), describe=False), []

    def write_lists(self, adapter, inputs, n, seed):
        asked.append(inputs)
        return [[[]] * n for _ in inputs]

    monkeypatch.setattr(Pipeline, "write_lists", write_lists)
    users = p.ids("test")
    made = compare.few_sessions(p, users)
    assert [*made] == ["IceBreaker, 1 session", "IceBreaker, 2 sessions"]
    assert [[*rows] for rows in made.values()] == [users, users]
    for n, inputs in enumerate(asked, 1):
        for user, interests in zip(users, inputs, strict=True):
            last = [s.summary for s in p.users[user].sessions[-n:]]
            assert interests and {*interests} <= {*last}


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
    p = SimpleNamespace(
        run=tmp_path, histories={"u": [SimpleNamespace(texts=before)]},
        parts=lambda user, cut: (before, after),
    )  # fmt: skip
    assert compare.matcher_quality(p, truth, ["u"]) == {"precision": 1 / 3, "recall": 1 / 2}


def test_topics_count_what_is_known_and_chores_apart():
    known = {"a": "chess", "b": "pasta", "c": "units", "d": "pasta"}
    truth = SimpleNamespace(taxonomy=SimpleNamespace(
        understand=lambda text: (known.get(text), set(), ""),
        functional=lambda topic: topic == "units", category={"chess": "games", "pasta": "food"},
    ))  # fmt: skip
    assert compare.topics(truth, [*"abcde"]) == {"games": 1, "food": 2, "Chores": 1}
    assert compare.chores(truth, {"u": [*"abcd"], "of nothing known": ["e"]}) == {"u": 0.25}


def test_the_oracle_is_above_what_it_was_shown_and_the_floor_is_drawn_anew(finished):
    p = Pipeline(micro(finished.parent), describe=False)
    users, truth = p.ids("test")[:3], people.load_truth(finished / "world")
    k, n = p.config.generator.list_size, p.config.ab.lists
    shown = sorted({y for x in p.impressions for y in x.starters})
    seen = {"a": {u: [shown[:4]] for u in users}, "b": {u: [shown[4:7], []] for u in users}}
    made = compare.floor_and_ceiling(p, truth, users, seen)
    for user in users:
        (best,) = made["oracle"][user]
        assert len({*best}) == k
        floor = made["random starters"][user]
        assert [len({*x}) for x in floor] == [k] * n and len({*map(tuple, floor)}) > 1
        assert truth.expected_clicks(user, best) >= truth.expected_clicks(user, shown[:k])


def test_equal_policies_write_equal_lists(finished, tmp_path, monkeypatch):
    """For the same users, whatever others a method writes for beside them, and however many."""
    shutil.copytree(finished.parent, tmp_path / "runs")  # with the base model
    p = Pipeline(micro(tmp_path / "runs", "ab.lists=2", "ab.searched=4"), describe=False)
    methods = {"IceBreaker": reproduce.Method("sit"), "middle": reproduce.Method("sit")}
    monkeypatch.setattr(reproduce, "METHODS", methods)
    reproduce.write_starters(p, reproduce.MAIN)
    made = reproduce.starters_of(p.config)["lists"]
    assert [*made["middle"]] == p.ids("test") and {*p.ids("judge")} < {*made["IceBreaker"]}
    for user, lists in made["middle"].items():
        assert made["IceBreaker"][user][:2] == lists and len(made["IceBreaker"][user]) == 4
