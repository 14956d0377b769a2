"""What is chosen when serving: the list search's best, half of each pool in turn, its value."""

import pytest
from conftest import micro

import icebreaker as ib
from run import Run
from stages.ranker import load_ranker
from stages.search import score_pools
from tables import rerank


def test_searched_lists_take_what_was_written_once_and_the_best_first(finished):
    run = Run(micro(finished.parent), describe=False)
    users, k = run.ids("test"), run.config.generator.list_size
    shown = sorted({y for x in run.impressions for y in x.starters})
    written = {u: [shown[9 * i : 9 * i + 5], shown[9 * i + 3 : 9 * i + 9]]
               for i, u in enumerate(users)}  # fmt: skip
    written |= {users[0]: [[]], users[1]: [shown[: k - 1]], users[2]: [["One", "one"] + shown[:k]]}
    made = rerank.searched(run, written, 3)
    assert made[users[0]] == [] and [sorted(x) for x in made[users[1]]] == written[users[1]]
    assert [len(x) for x in made[users[2]]] == [k]  # what is left over is no full list
    for user in users[3:]:
        starters, own = ([y for x in rows for y in x] for rows in (made[user], written[user]))
        assert len(starters) == len({*starters}) and {*starters} <= {*own}
        assert [len(x) for x in made[user]] == [k] * (len({*own}) // k)
        pool = rerank.pool_of(written[user])
        state = run.states[user][-1]
        utility, similarity, _ = score_pools(
            run.encoder, load_ranker(run, "train"), [state], [pool]
        )
        dpo = run.config.dpo
        best, _ = ib.list_search(
            ib.min_max(utility), similarity, k, dpo.beam, dpo.expand, dpo.weight
        )
        assert made[user][0] == [pool[j] for j in best[0, 0].tolist()]
    assert rerank.reranked(run, "SFT", {users[0]: [[]]})["SFT, MMR"] == {users[0]: [[]]}


def test_arms_with_list_search_show_half_of_each_pool_in_turn(finished):
    run = Run(micro(finished.parent, "ab.lists=3", "ab.searched=4"), describe=False)
    shown = sorted({y for x in run.impressions for y in x.starters})
    lists = [shown[5 * i : 5 * i + 5] for i in range(8)]
    users = run.ids("test")[:2]
    first, second = (
        rerank.searched(run, dict.fromkeys(users, part), 2) for part in (lists[:4], lists[4:])
    )
    made = rerank.searched_in_turn(run, dict.fromkeys(users, lists))
    for user in users:
        assert made[user] == first[user] + second[user][:1] and len(first[user]) == 2


def test_the_value_of_what_is_chosen_is_that_of_list_search(finished):
    run = Run(micro(finished.parent), describe=False)
    user, k = run.ids("test")[0], run.config.generator.list_size
    lists = {user: [sorted({y for x in run.impressions for y in x.starters})[:20]]}
    chosen = rerank.reranked(run, "SFT", lists)
    values = rerank.search_values(run, lists, chosen | {"none": {user: [[]]}})
    assert values["none"][user] == 0
    pools = [rerank.pool_of(lists[user])]
    utility, similarity, _ = score_pools(
        run.encoder, load_ranker(run, "train"), [run.states[user][-1]], pools
    )
    utility = ib.min_max(utility)
    best, _ = ib.list_search(utility, similarity, k, 8, 20, run.config.dpo.weight)
    one, weight = best[0, 0], run.config.dpo.weight
    expected = weight * float(utility[0, one].mean())
    expected += (1 - weight) * float(ib.list_diversity(similarity[0][one][:, one]))
    assert values["SFT, list search, all tried"][user] == pytest.approx(expected, abs=1e-5)
    assert max(values, key=lambda m: values[m][user]) == "SFT, list search, all tried"
