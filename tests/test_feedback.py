"""Rounds from a server's store: what they learn, whom they trust, when they are refused."""

import json
import random
import shutil
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
import torch

import data
import icebreaker as ib
import roles
import train
from config import load_config
from files import ROOT, UserError, read_json
from roles import rules
from roles.writer import Writer
from run import Run
from serving import feedback
from serving.store import Store
from serving.taps import Shown
from stages import dpo
from stages.pairs import tapped_pairs

# What the teacher writes. LIVELY starters differ from one another, DULL ones hardly do. So people
# who tap the first are served better by every figure, on any machine, once these are written more;
# and if they tap the second, diversity must fall. Four dull ones: of nine kinds a policy wrote the
# three that are lively in a sixth of what it sampled, which leaves a round too little to find.
LIVELY = ["Quiz me on {x}", "Plan a weekend around {x}", "Write a poem about {x}"]
DULL = [f"{word} facts about {{x}}" for word in ("Some", "More", "All", "Key")]
KINDS = {"en": LIVELY + DULL, "zh": ["考考我对{x}的了解", "{x}的未来会怎样？", "为{x}设计一张海报"]}
# Two interests a user: with four, the subjects alone keep lists apart. As all tap alike here, what
# is common to all counts in full, and diversity may not fall for it. SIT in small steps on three
# lists a row: else the policy knows one lively kind of the three, and more of it is less diverse.
SMALL = """world.users=60 world.impressions_per_user=30 world.starter_pool=200
    rid.epochs=2 rid.towers=2 rid.min_keep=2 ranker.epochs=20 ranker.personal=0.5
    generator.list_size=3 generator.max_new_tokens=40
    sit.max_rows=120 sit.epochs=4 sit.learning_rate=3e-3 sit.batch_users=2 sit.lists_per_row=3
    dpo.max_users=30 dpo.rounds=1 dpo.samples=4 dpo.vanilla=false
    dpo.learning_rate=2e-4 dpo.teacher_lists=2 dpo.weight=0.2 dpo.sft_weight=1
    data.train=0.4 data.judge=0.25 data.valid=0.25 data.test=0.1""".split()
ROUND = ["ranker", "dpo"]
CANARY = "Quxholm"  # a place of which the run has never heard


def small(root, *words):
    return load_config(ROOT / "configs" / "tiny.yaml", [*SMALL, f"run.root={root}", *words])


def run_of(root, *words) -> Run:
    return Run(small(root, *words), describe=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The root of a run that was trained without a store."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "_angles", lambda lang: [[("any", kind)] for kind in KINDS[lang]])
        train.run_stages(small(root), ["dpo"])
    return root


@pytest.fixture(scope="module")
def told(finished):
    """Interests that were distilled of the run's people."""
    run = run_of(finished)
    told = [s.interests for u in run.users if len((s := run.states[u][-1]).interests) > 1]
    return [interests for interests in told if all(map(roles.key_phrases, interests))]


def is_lively(starter: str) -> bool:
    return "facts about" not in starter


def serve(path, people: dict, lists: int, tap=is_lively) -> None:
    """Show every person (id -> interests) lively, dull and mixed lists; `tap`: what is liked."""
    store, rng, clock = Store(path), random.Random(0), [1.8e9]
    store.db.now = lambda: clock[0]
    for user_id, interests in people.items():
        subjects = [roles.key_phrases(x)[0] for x in interests]
        events = []
        for _ in range(lists):
            kinds = rng.choice([LIVELY, DULL, LIVELY + DULL])
            shown = [rng.choice(kinds).format(x=rng.choice(subjects)) for _ in range(3)]
            clock[0] += 60
            impression = store.taps.offer(user_id, interests, shown, "IceBreaker", "round1")
            events.append((impression, "shown", None))
            events += [(impression, "tap", slot) for slot, y in enumerate(shown) if tap(y)]
        store.taps.record(events)
    store.close()


@pytest.fixture(scope="module")
def tapped(told, tmp_path_factory):
    """A store of 80 people who tap whatever is lively."""
    path = tmp_path_factory.mktemp("store") / "serve.sqlite"
    people = {f"n{i}": told[i % len(told)] for i in range(80)}
    people |= {f"n{i}": [f"Sailing to {CANARY}", *people[f"n{i}"]] for i in range(4)}
    serve(path, people, 6)
    return path


@pytest.fixture(scope="module")
def improved(finished, tapped, tmp_path_factory):
    """A root whose run has an accepted feedback round."""
    root = tmp_path_factory.mktemp("improved") / "runs"
    shutil.copytree(finished, root)
    open_elsewhere = Store(tapped)  # by a running server
    train.run_stages(small(root, f"data.feedback={tapped}"), ROUND)
    open_elsewhere.taps.offer("later", [], ["What else?"], "IceBreaker", "round1")
    open_elsewhere.close()
    return root


def lively_share(root, adapter: str) -> float:
    """Of what a policy writes for people of no training, how much is lively."""
    run = run_of(root)
    inputs = [s.interests for u in run.ids("valid", "test") if (s := run.states[u][-1]).interests]
    lists = Writer(run.config, Path(":memory:")).write(run.folder / adapter, inputs, 4, 0)
    starters = [y for drawn in lists for starters in drawn for y in starters]
    return sum(map(is_lively, starters)) / len(starters)


def test_what_everybody_taps_is_written_more(improved, tapped, capsys):
    run = improved / "tiny"
    before = lively_share(improved, "dpo/round1/adapter")
    after = lively_share(improved, "feedback/round1/adapter")
    # Also where held-out people saw no gain in the run's own round, and before is what SIT writes.
    assert 0.15 < before < 0.6 and after > before + 0.1
    verdict = read_json(run / "feedback" / "round1" / "verdict.json")
    now = read_json(run / "feedback" / "current.json")
    assert verdict["accepted"] and verdict["written"]["utility"]["low"] > 0
    assert now["round"] == 1 and now["version"].startswith("feedback1-")
    assert (run / now["adapter"]).is_dir() and (run / now["ranker"]).is_file()
    assert now == feedback.current(run_of(improved))

    # The same store again makes no other round, and the run's own stages are as they were.
    settings = (run / "config.yaml").read_bytes()
    train.run_stages(small(improved, f"data.feedback={tapped}"), ROUND)
    output = capsys.readouterr().out
    assert "feedback round 1: already done" in output and f"accepted as {now['version']}" in output
    assert (run / "config.yaml").read_bytes() == settings and "feedback: ''" in settings.decode()
    assert not (run / "feedback" / "round2").exists()
    train.run_stages(small(improved), ["dpo"])
    assert capsys.readouterr().out.count("already done") == 8


def test_no_text_of_the_store_is_printed_or_kept(finished, improved, tapped, tmp_path, capsys):
    """Deleting somebody from the store would not delete it there."""
    drawn, later = (
        {f.relative_to(root): f.read_bytes() for f in root.rglob("sampled.json")}
        for root in (finished, improved)
    )
    assert drawn == later != {}  # nor what was sampled for somebody
    shutil.copytree(improved, tmp_path / "runs")
    (tmp_path / "runs" / "tiny" / "feedback" / "round1" / "verdict.json").unlink()
    train.run_stages(small(tmp_path / "runs", f"data.feedback={tapped}"), ROUND)  # the check again
    files = [f for f in (tmp_path / "runs").rglob("*") if f.is_file()]
    assert len(files) > 20 and CANARY.encode() in tapped.read_bytes()
    assert not [f for f in files if CANARY.encode() in f.read_bytes()]
    output = capsys.readouterr().out
    assert CANARY not in output and "Quiz" not in output and "feedback round 1" in output
    a, b = (next((root / "tiny").glob("embeddings-*")) for root in (improved, tmp_path / "runs"))
    assert a.read_bytes() == b.read_bytes()


def test_a_policy_that_became_worse_is_refused(improved, tapped, tmp_path, monkeypatch, capsys):
    """Noise in the adapter: the server's policy stays, and the next round has a new number."""
    shutil.copytree(improved, tmp_path / "runs")
    published = tmp_path / "runs" / "tiny" / "feedback" / "current.json"
    before = published.read_bytes()

    def harm(run, writer, model, *_):
        torch.manual_seed(0)
        with torch.no_grad():
            for weight in filter(lambda w: w.requires_grad, model.parameters()):
                weight.add_(0.3 * torch.randn_like(weight))
        return {}

    monkeypatch.setattr(dpo, "align", harm)
    config = small(tmp_path / "runs", f"data.feedback={tapped}", "dpo.beta=0.2")
    train.run_stages(config, ROUND)
    output, stays = capsys.readouterr().out, json.loads(before)["version"]
    assert f"refused, {stays} stays: utility of lists as written fell" in output
    assert published.read_bytes() == before
    verdict = read_json(tmp_path / "runs" / "tiny" / "feedback" / "round2" / "verdict.json")
    assert not verdict["accepted"] and verdict["from"] == stays
    assert feedback.begin(Run(config), "another store") == 3


def test_lists_that_became_all_alike_are_refused(finished, told, tmp_path):
    """Dull starters are what everybody taps: the judge likes more of them, diversity falls."""
    shutil.copytree(finished, tmp_path / "runs")
    serve(tmp_path / "serve.sqlite", {f"n{i}": told[i % len(told)] for i in range(80)}, 6,
          lambda starter: not is_lively(starter))
    config = small(tmp_path / "runs", f"data.feedback={tmp_path / 'serve.sqlite'}",
                   "dpo.learning_rate=1e-3", "dpo.weight=1.0")
    train.run_stages(config, ROUND)
    run = tmp_path / "runs" / "tiny"
    assert lively_share(tmp_path / "runs", "feedback/round1/adapter") < 0.2
    verdict = read_json(run / "feedback" / "round1" / "verdict.json")
    assert verdict["written"]["utility"]["low"] > 0 > verdict["written"]["diversity"]["high"]
    assert not verdict["accepted"] and "diversity of lists as written fell" in verdict["reason"]
    assert not (run / "feedback" / "current.json").exists()


def test_a_killed_round_resumes_to_the_same_bytes(
    finished, improved, tapped, tmp_path, monkeypatch, capsys
):
    shutil.copytree(finished, tmp_path / "runs")
    config = small(tmp_path / "runs", f"data.feedback={tapped}")
    for module, name in ((dpo, "align"), (feedback, "bootstrap")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, _killed)
            with pytest.raises(KeyboardInterrupt):
                train.run_stages(config, ROUND)
        assert not (tmp_path / "runs" / "tiny" / "feedback" / "current.json").exists()
    train.run_stages(config, ROUND)
    output = capsys.readouterr().out
    assert output.count("ranker: running") == 1 and output.count("dpo: running") == 2
    a, b = (root / "tiny" / "feedback" for root in (tmp_path / "runs", improved))
    names = ("round1/adapter/adapter_model.safetensors", "round1/ranker/train.safetensors")
    assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)
    assert read_json(a / "current.json") == read_json(b / "current.json")
    a, b = (read_json(x / "round1" / "verdict.json")["written"]["utility"] for x in (a, b))
    assert a == pytest.approx(b, rel=1e-4)


def _killed(*_, **__):
    raise KeyboardInterrupt


def test_a_round_that_was_never_finished_makes_room(finished, tapped, tmp_path):
    """The store of a running server grows: what was begun from less of it is begun anew."""
    shutil.copytree(finished / "tiny", tmp_path / "tiny")
    run = run_of(tmp_path, f"data.feedback={tapped}")
    assert feedback.begin(run, "first") == feedback.begin(run, "first") == 1
    (run.folder / "feedback" / "round1" / "adapter").mkdir()
    assert feedback.begin(run, "more of it") == 1
    assert not (run.folder / "feedback" / "round1" / "adapter").exists()
    (run.folder / "feedback" / "round1" / "verdict.json").write_text("{}")
    assert feedback.begin(run, "still more") == 2 and feedback.begin(run, "more of it") == 1


# ------------------------------------------------------------------------------- whom it trusts


@pytest.fixture
def inputs(finished, tmp_path, monkeypatch):
    """What rankers and DPO would be given for a store: nothing is trained."""
    shutil.copytree(finished, tmp_path / "runs")

    def given(path):
        got = {}

        def train_round(run, players, name, model, adapter, ranker, states, pairs, keep):
            assert not keep
            return got.update(states=states, pairs=pairs) or {}, []

        monkeypatch.setattr(
            feedback, "fit_rankers", lambda run, lists, _: got.update(lists=lists) or {})
        monkeypatch.setattr(dpo, "train_round", train_round)
        monkeypatch.setattr(feedback, "load_ranker", lambda *_: None)
        monkeypatch.setattr(feedback, "check", lambda new: _killed(
            got.update(held=feedback.held_out(new))))
        shutil.rmtree(tmp_path / "runs" / "tiny" / "feedback", ignore_errors=True)
        with pytest.raises(KeyboardInterrupt):
            train.run_stages(small(tmp_path / "runs", f"data.feedback={path}"), ROUND)
        return got

    return given


def test_one_user_with_a_thousand_lists_moves_no_more_than_anybody(inputs, told, tmp_path):
    learned = {}
    people = {f"n{i}": told[i % len(told)] for i in range(20)}
    splits = data.split_users(
        people, {"train": 0.4, "valid": 0.25, "judge": 0.25, "test": 0.1}, 0
    )
    loud = next(u for u, split in splits.items() if split == "train")
    for name, also in (("quiet", 6), ("loud", 1000)):
        path = tmp_path / f"{name}.sqlite"
        serve(path, {u: x for u, x in people.items() if u != loud}, 6)
        serve(path, {loud: people[loud]}, also, tap=lambda y: y.startswith("Plan"))
        learned[name] = inputs(path)
    quiet, noisy = learned["quiet"], learned["loud"]
    k = 2  # dpo.pairs_per_user
    pairs = [json.dumps(x) for x in noisy["pairs"]]
    new = Counter(pairs) - Counter(map(json.dumps, quiet["pairs"]))
    assert len(noisy["pairs"]) <= len(quiet["pairs"]) + k and 0 < new.total() <= k
    assert [s.user_id for s in noisy["states"]].count(loud) == 1
    own = Counter(shown.user_id for shown, _ in noisy["lists"]["train"])
    assert own[loud] == feedback.LISTS_PER_USER == 20
    assert not any(shown.user_id == loud for shown, _ in noisy["lists"]["judge"])


def test_splits_hold_for_the_store_too(inputs, finished, told, tmp_path):
    """The run's people keep their split; of others all but judges and held-out ones train."""
    run = run_of(finished)
    path = tmp_path / "serve.sqlite"
    people = {u: told[i % len(told)] for i, u in enumerate(run.users)}
    serve(path, people | {f"n{i}": told[0] for i in range(60)}, 2)
    got = inputs(path)
    stamp = datetime(2027, 1, 1)
    shown = {
        name: {x.user_id for x, _ in lists if x.timestamp > stamp}
        for name, lists in got["lists"].items()
    }
    train_users, judges, test = (shown[name] for name in ("train", "judge", "test"))
    for name, users in (("train", train_users), ("judge", judges), ("test", test)):
        assert users & {*run.users} == {*run.ids(name)}
    assert not train_users & judges and not test - {*run.users}
    new = {u for u in train_users if u.startswith("n")}
    assert 15 < len(new) < 45
    written_for = {s.user_id for s in got["states"]}
    assert written_for <= train_users and len(written_for) == 30  # dpo.max_users
    held = {s.user_id for s in got["held"]}
    assert not held & (train_users | judges) and any(u.startswith("n") for u in held)


def row(user="n1", at="2027-01-01T00:00:00", told=("a", "b"), starters="xyz", clicked=()):
    return Shown(user_id=user, timestamp=datetime.fromisoformat(at), interests=list(told),
                 starters=list(starters), clicked=list(clicked), method="IceBreaker", version="v")


def of_rows(run, rows, width=1, most=0):
    return tapped_pairs(run, ((one, one.interests) for one in rows), width, most)


def test_pairs_are_of_one_user_one_prompt_and_beyond_what_slots_explain(finished):
    run = run_of(finished)
    run.slot_rates = torch.tensor([0.7, 0.4, 0.1])  # 1.2 taps a list, whatever is in it
    good, bad = row(starters="xyz", clicked=[0, 2]), row(told="ba", starters="uvw")
    pair = {"interests": ["a", "b"], "chosen": [*"xyz"], "rejected": {"ignored 1": [*"uvw"]}}
    assert of_rows(run, [good, bad]) == [pair]
    for other in (
        row(user="n2", starters="uvw"),
        row(told="ac", starters="uvw"),  # written for other interests
        row(starters="uv"),  # its length would be the lesson
        row(starters="zyx"),  # the same starters
        row(starters="uvw", clicked=[1]),
    ):
        assert of_rows(run, [good, other]) == []
    assert of_rows(run, [row(clicked=[0]), bad]) == []  # one tap is less than usual
    many = [row(starters=f"xy{i}", clicked=[0, 2]) for i in range(9)] + [bad] * 9
    assert len(of_rows(run, many, most=2)) == run.config.dpo.pairs_per_user == 2
    # Three rejected ones to a chosen one, as there are kinds of mined ones; a list is in one pair.
    assert [len(x["rejected"]) for x in of_rows(run, [good, good, good, *[bad] * 4], 3)] == [3, 1]


def test_a_state_knows_what_came_before_it_and_nothing_later(finished):
    run = run_of(finished)
    user = next(x.user_id for x in run.impressions)
    log = [x for x in run.impressions if x.user_id == user]
    starters = ["Quiz me on tea", "The origins of tea", "Plan a weekend around tea"]
    early, late = (f"2027-01-0{d}T00:00:00" for d in (1, 2))
    rows = [row(user, late, starters=starters), row(user, early, starters=starters, clicked=[2])]
    lists, latest = feedback.states_of(run, rows, 5)
    taste = {x.timestamp.day: state.taste for x, state in lists}

    def expected(shown):
        flat = [(y, j, j in clicked) for ys, clicked in shown for j, y in enumerate(ys)]
        surprise = torch.tensor([tap - float(run.slot_rates[min(j, 2)]) for _, j, tap in flat])
        return ib.tap_taste(run.encoder([y for y, *_ in flat]), surprise)

    logged = [(x.starters, x.clicked) for x in log]
    assert torch.allclose(taste[1], expected(logged), atol=1e-6)
    assert torch.allclose(taste[2], expected([*logged, (starters, [2])]), atol=1e-6)
    everything = expected([*logged, (starters, [2]), (starters, [])])
    assert torch.allclose(latest[user].taste, everything, atol=1e-6)
    assert latest[user].interests == ["a", "b"]


def test_a_figure_has_fallen_by_much_or_by_surely():
    def fallen(before, after, high):
        return feedback.fallen({"before": before, "after": after, "low": -1.0, "high": high})

    assert not fallen(1.0, 0.96, 0.01) and not fallen(1.0, 1.2, 0.3)
    assert fallen(1.0, 0.94, 0.1)  # by more than a twentieth
    assert fallen(1.0, 0.99, -0.001)  # by little, but it is no accident


def test_rounds_of_a_run_that_was_trained_again_are_left(improved, tmp_path):
    shutil.copytree(improved / "tiny", tmp_path / "tiny")
    run = run_of(tmp_path)
    assert feedback.current(run)["version"].startswith("feedback1-")
    assert feedback.current(run_of(tmp_path, "dpo.rounds=2")) is None
    run.folder.mark_done("dpo", "another key")
    assert feedback.current(run)["version"].startswith("round1-")


# --------------------------------------------------------------------------------- wrong input


def empty(path):
    Store(path).close()


def untapped(path):
    serve(path, {f"n{i}": ["night trains", "chess openings"] for i in range(9)}, 1, lambda y: False)


@pytest.mark.parametrize(
    ("make", "words", "stages", "message"),
    [
        (None, [], ROUND, "no such file; it is the store of a server"),
        (lambda f: f.write_text("no store" * 200), [], ROUND, "give the store of a server"),
        (empty, [], ROUND, "no list was shown yet"),
        (untapped, [], ROUND, r"no tap by a user of the train split.*9 lists were shown"),
        (untapped, ["run.name=other"], ROUND, "stage rid has not run"),
        (untapped, [], ["dpo", "eval"], "ranker and dpo alone, not eval"),
        (untapped, ["generator.list_size=4"], ROUND, "generator.list_size=4: .* trained with 3"),
        (untapped, ["run.seed=1"], ROUND, "run.seed=1: .* trained with 0"),
    ],
)
def test_wrong_input_is_one_message(finished, tmp_path, make, words, stages, message):
    path = tmp_path / "serve.sqlite"
    if make:
        make(path)
    with pytest.raises(UserError, match=message) as caught:
        train.run_stages(small(finished, f"data.feedback={path}", *words), stages)
    assert "\n" not in str(caught.value) and not (finished / "tiny" / "feedback").exists()
    assert not (finished / "other").exists()
