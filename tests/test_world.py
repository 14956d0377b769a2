"""The simulated platform: deterministic, its logs look like real ones, its truth points right."""

import ast
import json
from collections import Counter

import numpy as np
import pytest

import data
from config import WorldConfig
from files import ROOT
from world import people

SETTINGS = WorldConfig(users=400, seed=7)
# A real log's click rates by slot, for the same content; not read from the code under test.
MEASURED = np.array([0.47, 0.29, 0.19, 0.17, 0.07])


@pytest.fixture(scope="module")
def made():
    return people.World(SETTINGS)


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    small = WorldConfig(users=20, seed=3)
    for name in ("a", "b"):
        people.World(small).write(tmp_path / name)
    for file in ("users.jsonl", "impressions.jsonl", "truth/truth.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_taxonomy_is_as_large_as_promised():
    taxonomy = people.Taxonomy()
    names = [str(s).lower() for e in taxonomy.topics.values() for s in e["subjects"]]
    assert len(set(taxonomy.category.values())) >= 12 and len(taxonomy.topics) >= 120
    assert len(names) >= 2000 and len(set(names)) == len(names)


def test_sessions_look_like_a_real_log(made):
    counts = np.array([len(u.sessions) for u in made.users])
    summaries = [[s.summary for s in u.sessions] for u in made.users]
    distinct = sum(len(set(t)) for t in summaries)
    assert 1 - distinct / counts.sum() == pytest.approx(0.23, abs=0.05)  # repeat word for word
    revisited = sum(n > 1 for t in summaries for n in Counter(t).values())
    assert revisited / distinct == pytest.approx(0.17, abs=0.04)
    assert 8 <= np.median(counts) <= 16 and counts.max() > 5 * np.median(counts)
    assert counts.min() >= 1 and counts.max() <= 500
    lengths = [len(t) for row in summaries for t in row]
    assert min(lengths) <= 6 and 300 < max(lengths) <= 900
    chinese = np.mean([data.language(" ".join(t)) == "zh" for t in summaries])
    assert 0.01 < chinese < 0.08
    untimed = np.mean([all(s.timestamp is None for s in u.sessions) for u in made.users])
    assert 0 < untimed < 0.06
    assert any(len(t) >= 20 and Counter(t).most_common(1)[0][1] > 0.9 * len(t) for t in summaries)
    assert any(u.profile is None for u in made.users)


def test_the_same_starter_is_tapped_by_slot_as_in_a_real_log(made):
    truth = made.truth
    for user_id in list(truth.users)[:20]:
        starter = "Quiz me on Saturn"
        shown = [[""] * slot + [starter] for slot in range(5)]
        rate = np.array([truth.click_probabilities(user_id, starters)[-1] for starters in shown])
        assert rate / rate[0] == pytest.approx(MEASURED / MEASURED[0])


def test_taps_fall_with_the_slot_and_most_lists_get_none(made):
    rate = np.mean([[slot in i.clicked for slot in range(5)] for i in made.impressions], axis=0)
    assert np.all(np.diff(rate) < 0)
    # In whole lists they fall faster: what comes later repeats a topic or an angle.
    assert np.allclose(rate / rate[0], MEASURED / MEASURED[0], atol=0.12)
    assert 0.5 <= np.mean([not i.clicked for i in made.impressions]) <= 0.9
    assert any(len(i.clicked) > 1 for i in made.impressions)


def test_frequency_and_resonance_are_weakly_related_and_chores_do_not_resonate(made):
    taxonomy = people.Taxonomy()
    interests = [i for u in made.truth.users.values() for i in u["interests"]]
    chores = [i for i in interests if taxonomy.functional(i["topic"])]
    others = [i for i in interests if not taxonomy.functional(i["topic"])]
    pairs = np.array([(i["frequency"], i["resonance"]) for i in others])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.2
    assert max(i["resonance"] for i in chores) < 0.1
    assert np.median([i["frequency"] for i in chores]) > np.median(pairs[:, 0])


def test_the_log_holds_no_hidden_state(made, tmp_path):
    made.write(tmp_path)
    keys = {
        k
        for file in ("users", "impressions")
        for line in (tmp_path / f"{file}.jsonl").read_text().splitlines()
        for k in json.loads(line)
    }
    assert keys == {
        "user_id",
        "profile",
        "sessions",
        "timestamp",
        "starters",
        "clicked",
        "sessions_after",
    }


def test_truth_points_in_the_right_direction(made):
    truth = made.truth
    checked = 0
    for user_id, user in made.truth.users.items():
        best = max(user["interests"], key=lambda i: i["resonance"])
        if best["resonance"] < 0.8 or not any(b >= user["last_day"] for _, b in best["alive"]):
            continue
        good = f"Surprising facts about {best['subjects'][0]}"
        p = truth.click_probabilities(user_id, [good, good, "Surprising facts about Zzyzx"])
        p *= MEASURED[0] / MEASURED[:3]  # slot bias taken out
        assert p[0] > p[1] > 0  # redundancy
        assert p[0] > p[2]
        assert truth.resonance(user_id, good) > truth.resonance(user_id, "Zzyzx")
        checked += 1
    assert checked >= 3
    some = next(iter(made.truth.users))
    assert truth.click_probabilities(some, ["", "???", "a" * 5000, "x", "y", "z"]).shape == (6,)


def test_what_was_asked_since_the_log_is_no_longer_new(made):
    truth, user_id = made.truth, made.users[0].user_id
    pair = ["Surprising facts about Saturn?", "Surprising facts about Sourdough?"]
    new = truth.click_probabilities(user_id, pair)
    again = truth.click_probabilities(user_id, pair, asked_since={people.question(pair[0])})
    assert again[0] < new[0] and again[1] == new[1]


def test_retrieved_lists_are_of_the_kind_that_the_log_shows(made):
    lists = people.retrieved_lists(SETTINGS, made.users, 5, seed=1)
    retrieval = people.World(SETTINGS).retrieval
    logged = [y for i in made.impressions for y in i.starters]
    shown = [y for rows in lists.values() for x in rows for y in x]
    assert {*logged, *shown} <= {*retrieval.pool}
    assert all(len({*x}) == people.LIST_SIZE for rows in lists.values() for x in rows)
    assert lists.keys() == {u.user_id for u in made.users}
    popular = [np.mean([y in retrieval.popular for y in x]) for x in (logged, shown)]
    assert popular[1] == pytest.approx(popular[0], abs=0.03)

    topic = people.Taxonomy().understand
    asked = {u.user_id: {topic(s.summary)[0] for s in u.sessions} for u in made.users}
    own = [topic(y)[0] in asked[u] for u, rows in lists.items() for x in rows for y in x]
    logged_own = [topic(y)[0] in asked[i.user_id] for i in made.impressions for y in i.starters]
    assert np.mean(own) == pytest.approx(np.mean(logged_own), abs=0.05)

    some = made.users[3:5]
    assert people.retrieved_lists(SETTINGS, some, 2, 1) == {
        u.user_id: lists[u.user_id][:2] for u in some
    }
    assert people.retrieved_lists(SETTINGS, some, 2, 2) != people.retrieved_lists(
        SETTINGS, some, 2, 1
    )


def _imports(path) -> set[str]:
    """Top-level names of all that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_only_what_writes_or_evaluates_reads_the_world():
    """That no training stage reads the truth's file is proved by running without it, in
    test_train.py; that none draws a world of its own, by what it imports."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]
    readers = {str(path.relative_to(ROOT)) for path in files if "world" in _imports(path)}
    rest = {r for r in readers if r.split("/")[0] not in ("world", "tables", "tests", "benchmarks")}
    assert rest == {"train.py", "stages/eval.py"}  # what writes it, and what evaluates
