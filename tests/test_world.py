"""The simulated platform: deterministic, its logs look like real ones, its truth points right."""

import ast
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

import data
import icebreaker as ib
import train
from config import WorldConfig, load_config
from files import ROOT, UserError, read_json, write_json
from roles import text as roles
from roles.languages import language
from roles.safety import is_unsuitable
from run import Run
from stages import metrics
from world import click_model, people

SETTINGS = WorldConfig(users=300, seed=1000)  # of the seeds that the world was calibrated on
# A real log's click rates by slot, for the same content; not read from the code under test.
MEASURED = np.array([0.47, 0.29, 0.19, 0.17, 0.07])


@pytest.fixture(scope="module")
def made():
    return people.World(SETTINGS)


@pytest.fixture(scope="module")
def lists(made):
    """What needs no language model, for some users: user -> a list, by its kind."""
    rng, retrieval, truth = np.random.default_rng(0), made.retrieval, made.truth
    users = [u.user_id for u in made.users if not truth.users[u.user_id]["robot"]][:100]
    shown = people.retrieved_lists(SETTINGS, [u for u in made.users if u.user_id in users], 2, 0)
    made_of = {"random": retrieval.pool, "popular": retrieval.popular}
    kinds = {kind: {u: [rng.choice(pool, 5, replace=False).tolist() for _ in range(2)]
                    for u in users} for kind, pool in made_of.items()}
    for model in ("expected_clicks", "cascade_clicks"):
        kinds[f"oracle of {model}"] = oracle = {}
        for user in users[:40]:
            score, best = getattr(truth, model), []
            pool = {*rng.choice(retrieval.pool, 150, replace=False).tolist(), *shown[user][0]}
            for _ in range(5):
                rest = sorted(pool.difference(best))
                best.append(max(rest, key=lambda y: score(user, [*best, y])))
            oracle[user] = [best]
    return kinds | {"deployed": shown}


def mean_clicks(truth, rows, model):
    return np.mean([getattr(truth, model)(u, ys) for u, some in rows.items() for ys in some])


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    small = WorldConfig(users=20, seed=3)
    for name in ("a", "b"):
        people.World(small).write(tmp_path / name)
    for file in ("users.jsonl", "impressions.jsonl", "truth/truth.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_taxonomy_is_as_large_as_promised():
    taxonomy = click_model.Taxonomy()
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
    assert 8 <= np.median(counts) <= 30 and counts.max() > 5 * np.median(counts)
    assert counts.min() >= 1
    lengths = [len(t) for row in summaries for t in row]
    assert min(lengths) <= 6 and 300 < max(lengths) <= 900
    chinese = np.mean([language(" ".join(t)) == "zh" for t in summaries])
    assert 0.01 < chinese < 0.08
    untimed = np.mean([all(s.timestamp is None for s in u.sessions) for u in made.users])
    assert 0 < untimed < 0.06
    assert any(len(t) >= 20 and Counter(t).most_common(1)[0][1] > 0.9 * len(t) for t in summaries)
    assert any(u.profile is None for u in made.users)
    topic = made.taxonomy.understand
    chores = [made.taxonomy.functional(topic(y).topic) for t in summaries for y in t]
    assert 0.05 < np.mean(chores) < 0.25  # no trade of theirs


def test_recency_and_frequency_rank_revisits_as_in_a_real_log(made):
    """Labels: whether a later session is about the same subject, chores too."""
    understand, by_rule, shares = made.taxonomy.understand, {"recency": [], "frequency": []}, []

    def no_vectors(texts):
        return torch.ones(len(texts), 1)

    for user in made.users:
        aucs = []
        for past, future in (data.cut_sessions(user, cut) for cut in (0.4, 0.6, 0.8)):
            if not past or not future or user.sessions[0].timestamp is None:
                continue
            days = [(future[0].timestamp - s.timestamp).total_seconds() / 86400 for s in past]
            history = ib.make_history([s.summary for s in past], days, no_vectors)
            later = {x for s in future for x in understand(s.summary).subjects}
            labels = np.array([not later.isdisjoint(understand(t).subjects) for t in history.texts])
            shares.append(labels.mean())
            if 0 < labels.sum() < len(labels):
                rules = (ib.recency_scores(history), ib.frequency_scores(history))
                aucs.append([metrics.per_user_auc(scores.numpy(), labels) for scores in rules])
        for rule, auc in zip(by_rule, np.mean(aucs, 0) if aucs else (), strict=False):
            by_rule[rule].append(auc)
    assert len(by_rule["recency"]) > 200
    assert np.mean(by_rule["recency"]) == pytest.approx(0.595, abs=0.04)
    assert np.mean(by_rule["frequency"]) == pytest.approx(0.702, abs=0.05)
    assert 0.12 < np.mean(shares) < 0.30


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


def test_a_tap_becomes_a_session_and_what_resonates_more(made):
    understand, truth = made.taxonomy.understand, made.truth
    users, depth = {u.user_id: u for u in made.users}, []
    for row in made.impressions:
        begun = [understand(s.summary) for s in users[row.user_id].sessions
                 if s.timestamp and 0 <= (s.timestamp - row.timestamp).total_seconds() < 6 * 3600]
        tapped = [understand(row.starters[slot]) for slot in row.clicked]
        for meaning in tapped:
            assert any(m.topic == meaning.topic and m.subjects & meaning.subjects for m in begun)
        if tapped and row.sessions_after is not None:
            assert len(begun) >= len(tapped) + row.sessions_after
            day = (row.timestamp - people.START).total_seconds() / 86400
            depth.append((row.sessions_after,
                          sum(truth.match(row.user_id, m, day) for m in tapped)))
    assert len(depth) > 500 and np.corrcoef(np.array(depth).T)[0, 1] > 0.3


def test_random_popular_deployed_and_oracle_lists_have_room_between_them(made, lists):
    """By both click models; none of these lists needs a language model, nor was one run."""
    taps, cascade = ({kind: mean_clicks(made.truth, rows, model) for kind, rows in lists.items()}
                     for model in ("expected_clicks", "cascade_clicks"))
    assert taps["random"] * 1.3 < taps["popular"] and taps["popular"] * 1.3 < taps["deployed"]
    assert taps["deployed"] * 3 < taps["oracle of expected_clicks"]
    assert cascade["random"] * 1.5 < cascade["deployed"]
    assert cascade["deployed"] * 3 < cascade["oracle of cascade_clicks"]
    # By either model the other one's oracle is better than chance, and worse than its own.
    for model, values in (("expected_clicks", taps), ("cascade_clicks", cascade)):
        other = {"expected_clicks", "cascade_clicks"}.difference([model]).pop()
        assert values["random"] * 2 < values[f"oracle of {other}"] < values[f"oracle of {model}"]


def test_chores_do_not_resonate_and_frequency_tells_little_of_resonance(made):
    functional = made.taxonomy.functional
    interests = [i for u in made.truth.users.values() for i in u["interests"]]
    pairs = [(i["frequency"], i["resonance"]) for i in interests if not functional(i["topic"])]
    assert abs(np.corrcoef(np.array(pairs).T)[0, 1]) < 0.2
    assert max(i["resonance"] for i in interests if functional(i["topic"])) < 0.1


def test_what_is_alike_loses_as_much_as_one_like_it_and_no_more(made):
    truth, user_id = made.truth, made.users[0].user_id
    p = truth.click_probabilities(user_id, ["Quiz me on Saturn"] * 5)
    attracted = p / MEASURED * MEASURED[0]  # slot bias taken out
    logits = np.log(attracted / (1 - attracted))
    assert logits[1:] == pytest.approx([logits[0] - 1.6] * 4)


def cascade_truth(*nexts):
    """One user, whose next sessions are these; some others make the words rare."""
    others = {f"o{i}": {"next": [f"word{i} other{i}"]} for i in range(20)}
    return click_model.Truth({"u": {"next": [*nexts]}, **others})


def test_the_cascade_by_hand():
    truth, p = cascade_truth("Saturn", "Elden Ring"), click_model.CASCADE
    patience = click_model.PATIENCE
    clicks = truth.cascade_clicks
    assert clicks("u", []) == clicks("u", ["Naruto", ""]) == 0
    assert clicks("u", ["saturn?"]) == pytest.approx(p / 2)  # of two intents one
    assert clicks("u", ["Naruto", "Saturn"]) == pytest.approx(patience * p / 2)
    # A second starter serves the same intent where the first was left, or the other intent.
    assert clicks("u", ["Saturn", "Saturn"]) == pytest.approx((p + patience * (1 - p) * p) / 2)
    assert clicks("u", ["Saturn", "Elden Ring"]) == pytest.approx((p + patience * p) / 2)
    # Half of what was meant: cosine of the root of a half.
    assert clicks("u", ["Elden"]) == pytest.approx(p / 4)
    assert cascade_truth("艾尔登法环").cascade_clicks("u", ["聊聊艾尔登法环"]) == pytest.approx(p)


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
    lists, retrieval = people.retrieved_lists(SETTINGS, made.users, 5, seed=1), made.retrieval
    logged = [y for i in made.impressions for y in i.starters]
    shown = [y for rows in lists.values() for x in rows for y in x]
    assert {*logged, *shown} <= {*retrieval.pool}
    assert all(len({*x}) == people.LIST_SIZE for rows in lists.values() for x in rows)
    assert lists.keys() == {u.user_id for u in made.users}
    popular = [np.mean([y in retrieval.popular for y in x]) for x in (logged, shown)]
    assert popular[1] == pytest.approx(popular[0], abs=0.04)

    topic = click_model.Taxonomy().understand
    asked = {u.user_id: {topic(s.summary)[0] for s in u.sessions} for u in made.users}
    own = [topic(y)[0] in asked[u] for u, rows in lists.items() for x in rows for y in x]
    logged_own = [topic(y)[0] in asked[i.user_id] for i in made.impressions for y in i.starters]
    # After the log there is more that was asked than within it.
    assert 0 < np.mean(own) - np.mean(logged_own) < 0.15

    some = made.users[3:5]
    assert people.retrieved_lists(SETTINGS, some, 2, 1) == {
        u.user_id: lists[u.user_id][:2] for u in some
    }
    assert people.retrieved_lists(SETTINGS, some, 2, 2) != people.retrieved_lists(
        SETTINGS, some, 2, 1
    )


def texts_of(tree) -> list[str]:
    if isinstance(tree, str):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [text for part in parts for text in texts_of(part)]


def fixed_parts(forms) -> list[str]:
    return [part.strip(" .?,:").lower() for form in texts_of(forms)
            for part in re.split(r"\{\w\}", form)]


def test_no_other_room_holds_the_forms_or_is_told_their_words(made):
    """Else rules and corpora would be written beside what they are measured on."""
    forms = {name: made.forms[name] for name in ("summaries", "chores", "starters")}
    paths = [p for pattern in ("*.py", "*/*.py", "*/*.yaml", "configs/*.jsonl")
             for p in ROOT.glob(pattern) if p.parent.name not in ("world", "tests", "results")]
    rest = "\n".join(p.read_text(encoding="utf-8").lower() for p in paths)
    long = {part for part in fixed_parts(forms) if len(part.split()) > 2}
    assert long and [part for part in sorted(long) if part in rest] == []
    lexicon = yaml.safe_load((ROOT / "roles" / "words.yaml").read_text(encoding="utf-8"))
    listed = {word for name in ("stop", "generic", "functional")
              for word in lexicon["words"][name].split()}
    classes = re.findall(r"[a-z'-]+", " ".join(lexicon["classes"].values()))
    listed = listed.union(classes) - ENGLISH_STOP_WORDS - {"-"}
    for part in fixed_parts(forms):
        assert listed.isdisjoint(re.findall(r"[a-z'-]+", part)), part
        assert not any(word in part for word in listed if click_model.HAN.search(word)), part
        assert not roles.is_functional(part), part
        assert not roles.kind_of(part, "kinds") and not is_unsuitable(part), part
    templates = yaml.safe_load((ROOT / "roles" / "templates.yaml").read_text(encoding="utf-8"))
    plain = {roles.normal_form(form.replace("{x}", "X")) for form in texts_of(templates)}
    assert plain.isdisjoint(roles.normal_form(re.sub(r"\{\w\}", "X", f)) for f in texts_of(forms))


def test_held_out_forms_stand_in_what_comes_after_the_log_alone(made):
    held = {part for kind in ("summaries", "chores")
            for part in fixed_parts(made.forms[kind]["held_out"]) if len(part) > 1}
    log = "\n".join(s.summary.lower() for u in made.users for s in u.sessions)
    log += "\n".join(y.lower() for row in made.impressions for y in row.starters)
    assert len(held) > 8 and not any(part in log for part in held)
    later = [y.lower() for user in made.truth.users.values() for y in user["next"]]
    assert all(any(part in y for part in held) for y in later)


def test_a_world_of_another_version_is_refused_or_trained_anew(tmp_path, monkeypatch):
    people.World(WorldConfig(users=3, seed=1000, starter_pool=50)).write(tmp_path)
    file = tmp_path / "truth" / "truth.json"
    state = read_json(file)
    assert state["version"] == 2 and len(people.load_truth(tmp_path).users) == 3
    for other in ({**state, "version": 1}, {"users": state["users"]}):
        write_json(file, other)
        with pytest.raises(UserError, match=r"truth\.json: version 1 of .* train anew: [^\n]*$"):
            people.load_truth(tmp_path)
    run = Run(load_config(None, [f"run.root={tmp_path}"]), describe=False)
    keys = [train.stage_key(run, "world")]
    monkeypatch.setattr(people, "VERSION", 3)
    assert train.stage_key(run, "world") not in keys


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
    # What writes it, what lets it show a pilot, and what evaluates.
    assert rest == {"train.py", "stages/ranker.py", "stages/eval.py"}
