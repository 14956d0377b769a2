"""What methods are compared with: rule-based interests, few sessions, rerankers, the oracle."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import micro

import icebreaker as ib
from roles.writer import Writer
from run import Run
from stages.pools import score_pools
from stages.ranker import load_ranker
from tables import controls, interests
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
    assert interests.interests_of(run, "u", "rule") == ["chess openings", "rare stamps"]
    assert interests.interests_of(run, "u", "RID") == ["pasta", "tax return"]
    assert interests.interests_of(run, "u", "all")[:2] == ["rare stamps", "chess openings"]


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
        for user, told in zip(users, inputs, strict=True):
            last = [s.summary for s in run.users[user].sessions[-n:]]
            assert told and {*told} <= {*last}


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


def test_searched_lists_take_what_was_written_once_and_the_best_first(finished):
    run = Run(micro(finished.parent), describe=False)
    users, k = run.ids("test"), run.config.generator.list_size
    shown = sorted({y for x in run.impressions for y in x.starters})
    written = {u: [shown[9 * i : 9 * i + 5], shown[9 * i + 3 : 9 * i + 9]]
               for i, u in enumerate(users)}  # fmt: skip
    written |= {users[0]: [[]], users[1]: [shown[: k - 1]], users[2]: [["One", "one"] + shown[:k]]}
    made = controls.searched(run, written, 3)
    assert made[users[0]] == [] and [sorted(x) for x in made[users[1]]] == written[users[1]]
    assert [len(x) for x in made[users[2]]] == [k]  # what is left over is no full list
    for user in users[3:]:
        starters, own = ([y for x in rows for y in x] for rows in (made[user], written[user]))
        assert len(starters) == len({*starters}) and {*starters} <= {*own}
        assert [len(x) for x in made[user]] == [k] * (len({*own}) // k)
        pool = controls.pool_of(written[user])
        state = run.states[user][-1]
        utility, similarity, _ = score_pools(
            run.encoder, load_ranker(run, "train"), [state], [pool]
        )
        dpo = run.config.dpo
        best, _ = ib.list_search(
            ib.min_max(utility), similarity, k, dpo.beam, dpo.expand, dpo.weight
        )
        assert made[user][0] == [pool[j] for j in best[0, 0].tolist()]
    assert controls.reranked(run, "SFT", {users[0]: [[]]})["SFT, MMR"] == {users[0]: [[]]}


def test_arms_with_list_search_show_half_of_each_pool_in_turn(finished):
    run = Run(micro(finished.parent, "ab.lists=3", "ab.searched=4"), describe=False)
    shown = sorted({y for x in run.impressions for y in x.starters})
    lists = [shown[5 * i : 5 * i + 5] for i in range(8)]
    users = run.ids("test")[:2]
    first, second = (
        controls.searched(run, dict.fromkeys(users, part), 2) for part in (lists[:4], lists[4:])
    )
    made = controls.searched_in_turn(run, dict.fromkeys(users, lists))
    for user in users:
        assert made[user] == first[user] + second[user][:1] and len(first[user]) == 2


def test_the_value_of_what_is_chosen_is_that_of_list_search(finished):
    run = Run(micro(finished.parent), describe=False)
    user, k = run.ids("test")[0], run.config.generator.list_size
    lists = {user: [sorted({y for x in run.impressions for y in x.starters})[:20]]}
    chosen = controls.reranked(run, "SFT", lists)
    values = controls.search_values(run, lists, chosen | {"none": {user: [[]]}})
    assert values["none"][user] == 0
    pools = [controls.pool_of(lists[user])]
    utility, similarity, _ = score_pools(
        run.encoder, load_ranker(run, "train"), [run.states[user][-1]], pools
    )
    utility = ib.min_max(utility)
    best, _ = ib.list_search(utility, similarity, k, 8, 20, run.config.dpo.weight)
    one, weight = best[0, 0], run.config.dpo.weight
    expected = weight * float(utility[0, one].mean())
    expected += (1 - weight) * float(ib.list_diversity(similarity[0][one][:, one]))
    assert values["SFT, list search, all tried"][user] == pytest.approx(expected, abs=1e-5)
    most = max(by_user[user] for by_user in values.values())
    assert values["SFT, list search, all tried"][user] == pytest.approx(most, abs=1e-5)
