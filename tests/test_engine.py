"""The path of a request: filtered, ordered, streamed, cancelled; and the model that writes."""

import itertools
import shutil

import pytest
import torch
from conftest import micro

import data
import isg
import llm
import roles
from config import UserError, read_json, write_json
from engine import Ask, Engine, _in_a_loop

SUMMARIES = ["chess openings for club players", "sourdough bread at home", "chess endgames",
             "hiking in the Dolomites", "sourdough starter care"]


def person(*summaries, name="new", **profile):
    sessions = [data.Session(session_id=f"s{i}", summary=x) for i, x in enumerate(summaries)]
    return data.User(user_id=name, profile=profile or None, sessions=sessions)


@pytest.fixture(scope="module")
def engine(finished):
    return Engine(micro(finished.parent))


@pytest.fixture
def scripted(engine, monkeypatch):
    """scripted(*texts): every ask is answered by these completions; returns what was told."""

    def script(*texts, candidates=None):
        told = []
        monkeypatch.setattr(engine.config.serve, "candidates", candidates or len(texts))
        prompt = engine.p.prompt
        monkeypatch.setattr(engine.p, "prompt", lambda x: told.append(x) or prompt(x))
        monkeypatch.setattr(llm, "sample", lambda *a, **k: [list(texts) for _ in a[2]])
        return told

    return script


def sug(*starters):
    return f"<sug> {' && '.join(starters)} </sug>"


def texts(answer):
    return [s.text for s in answer.starters]


def test_every_starter_is_fit_to_show_and_comes_from_the_nearest_interest(engine, scripted):
    told = scripted(
        sug("Which chess opening suits me?", "Bake a sourdough loaf", "How to treat my cancer?"),
        sug("which chess opening suits me", "国际象棋入门", "JoJoJoJo?", "Hike the Dolomites"),
    )
    user = person(*SUMMARIES, "my depression and how to treat it")
    (answer,) = engine.write([Ask(user, 5, avoid=["Bake a sourdough loaf!"])])
    assert sorted(texts(answer)) == ["Hike the Dolomites", "Which chess opening suits me?"]
    from_what = {s.text: s.interest for s in answer.starters}
    assert from_what["Hike the Dolomites"] in (*told[0], "hiking in the Dolomites")
    assert {s.source for s in answer.starters} == {"generated"}
    assert all(0 < s.utility < 1 for s in answer.starters)
    # What nobody should be reminded of is neither shown nor told to the generator.
    assert not any("depression" in x for x in [*told[0], *(i.text for i in answer.interests)])
    kept = [i for i in answer.interests if i.kept]
    assert [i.text for i in kept] == told[0] and answer.interests[: len(kept)] == kept
    assert len(answer.interests) == len(SUMMARIES) and answer.threshold is not None


def test_the_order_is_that_of_list_search_and_then_of_the_rest(engine, scripted):
    starters = ["Which chess opening suits me?", "Chess openings for a club player",
                "Bake a sourdough loaf", "Hike the Dolomites", "Feed a sourdough starter",
                "Win a chess endgame", "Plan a week of hikes"]
    scripted(sug(*starters[:3]), sug(*starters[3:6]), sug(starters[6]))
    (answer,) = engine.write([Ask(person(*SUMMARIES), 5)])
    assert sorted(texts(answer)) == sorted(starters)
    pool = texts(answer)
    utility = torch.tensor([s.utility for s in answer.starters])
    scaled = (utility - utility.min()) / (utility.max() - utility.min())
    similarity = engine.p.encoder(pool) @ engine.p.encoder(pool).T
    weight = engine.config.dpo.weight

    def value(chosen):  # Algorithm 1, of an order
        total = 0.0
        for slot, i in enumerate(chosen):
            far = 1 - similarity[i, list(chosen[:slot])].mean() if slot else 0.0
            total += weight * scaled[i] + (1 - weight) * far
        return float(total)

    best = max(map(value, itertools.permutations(range(len(pool)), 3)))
    assert value((0, 1, 2)) == pytest.approx(best, abs=1e-5)
    scripted(sug(*starters[:3]), candidates=1)
    (answer,) = engine.write([Ask(person(*SUMMARIES), 5)])
    assert texts(answer) == starters[:3]  # as the paper deploys: the list as it was written


def test_fewer_good_starters_than_wanted_are_not_padded(engine, scripted, monkeypatch):
    scripted(sug("Bake a sourdough loaf"), "no list at all")
    (answer,) = engine.write([Ask(person(*SUMMARIES), 5)])
    assert texts(answer) == ["Bake a sourdough loaf"]
    monkeypatch.setattr(engine.config.serve, "min_utility", 1.0)
    assert engine.write([Ask(person(*SUMMARIES), 5)])[0].starters == []


def test_somebody_new_gets_popular_starters_of_the_profiles_language(engine):
    for user in (person(), person("my depression and how to treat it", region="US")):
        (answer,) = engine.write([Ask(user, 3)])
        assert len(answer.starters) >= 3 and answer.interests == [] and answer.threshold is None
        assert {(s.source, s.interest) for s in answer.starters} == {("cold start", None)}
    again = engine.write([Ask(person(), 3, avoid=texts(answer))])[0]
    assert not {*texts(again)} & {*texts(answer)}
    for s in engine.write([Ask(person(language="zh-CN"), 3)])[0].starters:
        assert data.language(s.text) == "zh"


def test_a_batch_answers_each_ask_as_if_it_were_alone(engine, monkeypatch):
    users = [person(*SUMMARIES), *engine.examples[:3], person(name="nobody")]
    asks = [Ask(u, 3, method=m) for u in users for m in engine.methods]
    # The little model writes nothing that is fit to show.
    monkeypatch.setattr(engine, "_fit", lambda starters, case: [str(x)[:30] for x in starters])
    monkeypatch.setattr(roles, "parse_starters", lambda text: roles.Parsed((text,), None))
    together = engine.write(asks)
    alone = [engine.write([ask])[0] for ask in asks]
    # In another batch texts are encoded with other rounding, which may turn the order.
    assert [sorted(texts(x)) for x in together] == [sorted(texts(x)) for x in alone]
    assert sum(len(x.starters) > 0 for x in together) >= 12 and together[0].tokens > 0
    # PE hears all, latest first; the others what the gate kept.
    heard = [c.state.interests for c in engine._distil(asks[:2])]
    assert heard[0] == SUMMARIES[::-1] and len(heard[1]) <= engine.config.rid.max_keep


def test_each_method_writes_with_its_own_policy(engine):
    cases = engine._distil([Ask(person(*SUMMARIES), 3, method=m) for m in engine.methods])
    g, p = engine.config.generator, engine.p
    adapters = (None, p.run / "sit" / "adapter", p.run / "dpo" / "round2" / "adapter")
    for case, adapter in zip(cases, adapters, strict=True):
        prompts, seen = [p.prompt(case.state.interests)], []
        how = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0}
        (expected,) = llm.sample(p.policy(adapter), p.tokenizer, prompts, 1, **how)
        with engine._policy(case.ask.method) as (model, _):
            prefix = llm.read_prefix(model, engine._begin)
            seen = llm.sample(model, p.tokenizer, prompts, 1, prefix=prefix, **how)
        assert seen == [expected]
    assert g.list_size == 3


def test_the_first_list_streams_as_it_is_decoded(engine, monkeypatch):
    """The tokens of a script, step by step, through the hook of the sampler."""
    first = sug("Which chess opening suits me?", "How to treat my cancer?", "Bake a sourdough loaf")
    second = sug("Hike the Dolomites", "Bake a sourdough loaf")
    steps, emitted = [], []

    def sample(model, tokenizer, prompts, n, *, watch, **_):
        rows = [llm.encode_text(tokenizer, x) + [tokenizer.eos_token_id] for x in (first, second)]
        width = max(map(len, rows))
        ids = torch.tensor([[r + [tokenizer.pad_token_id] * (width - len(r)) for r in rows]])
        for step in range(width):
            watch(ids[:, :, : step + 1])
            steps.append(len(emitted))
        return [[first, second]]

    monkeypatch.setattr(llm, "sample", sample)
    begun = []
    (answer,) = engine.write(
        [Ask(person(*SUMMARIES), 3, emit=emitted.append,
             begin=lambda *x: begun.append((*x, len(emitted))))]
    )
    assert begun == [(answer.interests, answer.threshold, 0)]
    first_at, second_at = steps.index(1), steps.index(2)
    assert 0 < first_at < second_at <= len(steps) - 1  # one by one, the first long before the end
    assert [s.text for s in emitted] == texts(answer) == [
        "Which chess opening suits me?", "Bake a sourdough loaf", "Hike the Dolomites"
    ]
    assert emitted == answer.starters and answer.tokens > 20


def test_who_leaves_gets_no_answer_and_no_more_steps(engine, monkeypatch):
    steps, decode = [], llm._Ends.__call__
    monkeypatch.setattr(llm._Ends, "__call__", lambda self, *a: steps.append(1) or decode(self, *a))
    asks = [Ask(person(*SUMMARIES), 3), Ask(person(*SUMMARIES, name="other"), 3)]
    answers = engine.write(asks, gone=lambda i: i == 1 and len(steps) > 2)
    assert answers[0] and answers[1] is None and len(steps) > 4
    steps.clear()
    assert engine.write(asks, gone=lambda i: len(steps) > 2) == [None, None] and len(steps) <= 4
    assert engine.write(asks, gone=lambda i: True) == [None, None]


def test_samples_in_a_loop_are_given_up():
    loop = torch.tensor([[[9] * 4 + [5, 6, 7] * 6, list(range(22)), [3] * 22]])
    assert _in_a_loop(loop).tolist() == [[True, False, True]]
    assert not _in_a_loop(loop[..., :10]).any()


def test_an_accepted_round_is_taken_up_and_nothing_else(finished, tmp_path):
    shutil.copytree(finished.parent, tmp_path / "runs")
    engine = Engine(micro(tmp_path / "runs"))
    run, before = engine.p.run, engine.version
    assert before.startswith("round2-") and not engine.refresh()
    write_json(run / "feedback" / "current.json", {
        "round": 1, "adapter": "dpo/round1/adapter", "version": "feedback1.0abc",
        "ranker": "ranker/judge.safetensors", "run": read_json(run / "dpo" / "done.json")["key"],
    })
    assert engine.refresh() and engine.version == "feedback1.0abc" and not engine.refresh()
    judge = engine.p.ranker("judge").state_dict()
    assert all(torch.equal(x, judge[k]) for k, x in engine.ranker.state_dict().items())
    assert engine.write([Ask(person(*SUMMARIES), 3)])[0] is not None
    with engine._policy("IceBreaker") as (model, _):
        own = {k: v for k, v in model.state_dict().items() if "feedback1" in k}
    saved = llm.load_adapter(engine.p.policy(None), run / "dpo/round1/adapter", False).state_dict()
    assert own and all(
        torch.equal(v, saved[k.replace("feedback1-0abc", "default")]) for k, v in own.items()
    )
    assert Engine(micro(tmp_path / "runs")).version == "feedback1.0abc"


def test_what_is_forgotten_leaves_memory(engine):
    user = person("a rare summary about xylophones", town="Ghent")
    engine.write([Ask(user, 3)])
    known = len(engine.p.encoder._known)
    engine.forget(user)
    assert len(engine.p.encoder._known) == known - 2
    engine.write([Ask(person(*SUMMARIES), 3)])
    assert not engine._forgotten


def test_a_server_of_models_can_write_instead(finished, monkeypatch):
    engine = Engine(micro(finished.parent, "generator.endpoint=http://localhost:1/v1"))
    asked = []

    def write_lists(adapter, inputs, n, seed):
        asked.append((adapter.parent.name, n))
        return [[["Bake a sourdough loaf"]] * n for _ in inputs]

    monkeypatch.setattr(engine.p, "write_lists", write_lists)
    emitted = []
    (answer,) = engine.write([Ask(person(*SUMMARIES), 3, emit=emitted.append)])
    assert texts(answer) == ["Bake a sourdough loaf"] and emitted == answer.starters
    assert asked == [("round2", engine.config.serve.candidates)] and engine.model is None


def test_a_run_that_lacks_what_is_served_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="stage rid has not run"):
        Engine(micro(tmp_path))
    shutil.copytree(finished.parent, tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / "tiny" / "dpo")
    with pytest.raises(UserError, match=r"serve.arms: .* has no IceBreaker"):
        Engine(micro(tmp_path / "runs"))
    engine = Engine(micro(tmp_path / "runs", "serve.arms=[SFT]"))
    assert engine.write([Ask(person(*SUMMARIES), 3, method="SFT")])[0]
    assert read_json(engine.p.run / "rid" / "gate.json")["thresholds"]


def test_in_lists_orders_rows_of_every_length(engine):
    valid = torch.arange(7)[None] < torch.tensor([7, 4, 2, 0])[:, None]
    utility = torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    order = isg.in_lists(engine.config, utility, torch.eye(7).expand(4, 7, 7), valid, lists=2)
    assert [sorted(x) for x in order] == [[*range(7)], [0, 1, 2, 3], [0, 1], []]
    (first,) = isg.in_lists(engine.config, utility[:1], torch.eye(7)[None], lists=1)
    assert first == order[0][:3]  # four wait for the next list
