"""The path of a request: filtered, ordered, streamed, cancelled; and the model that writes."""

import dataclasses
import functools
import importlib
import itertools
import shutil
from datetime import UTC, datetime, timedelta

import pytest
import torch
from conftest import micro

import data
import files
import llm
import serving.engine
from files import ROOT, RunFolder, UserError, read_json, read_tensors, write_json, write_tensors
from roles.languages import language
from roles.prompted import ROOM
from serving.engine import Ask, Engine, in_a_loop, latest
from stages.pools import list_order
from stages.ranker import load_ranker
from stages.rid import Distiller, may_be_duplicates

SUMMARIES = ["chess openings for club players", "sourdough bread at home", "chess endgames",
             "hiking in the Dolomites", "sourdough starter care"]


def person(*summaries, name="new", **profile):
    sessions = [data.Session(session_id=f"s{i}", summary=x) for i, x in enumerate(summaries)]
    return data.User(user_id=name, profile=profile or None, sessions=sessions)


@pytest.fixture(scope="module")
def engine(finished):
    return Engine(micro(finished.parent))


@pytest.fixture
def all_kept(engine, monkeypatch):
    """A gate of chance may drop what is named."""
    settings = engine.distiller.settings.model_copy(update={"min_keep": 9, "max_keep": 9})
    distiller = dataclasses.replace(engine.distiller, settings=settings)
    monkeypatch.setattr(engine, "distiller", distiller)


@pytest.fixture
def scripted(engine, monkeypatch):
    """scripted(*texts): every ask is answered by these completions; returns what was told."""

    def script(*texts, candidates=None):
        told = []
        monkeypatch.setattr(engine.config.serve, "candidates", candidates or len(texts))
        prompt = engine.writer.prompt
        monkeypatch.setattr(
            engine.writer, "prompt", lambda x, *how: told.append(x) or prompt(x, *how))
        monkeypatch.setattr(llm, "sample", lambda *a, **k: [list(texts) for _ in a[2]])
        return told

    return script


def sug(*starters):
    return f"<sug> {' && '.join(starters)} </sug>"


def distilled(engine, *asks):
    users = [engine.players.summarised(ask.user) for ask in asks]
    assert engine._encode(asks, users, lambda: False)
    return engine._distil(asks, users, lambda i: False)


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
    assert from_what["Hike the Dolomites"] in (None, "hiking in the Dolomites")
    assert {s.source for s in answer.starters} == {"generated"}
    assert all(0 < s.utility < 1 for s in answer.starters)
    # What nobody should be reminded of is neither shown nor told to the generator.
    assert not any("depression" in x for x in [*told[0], *(i.text for i in answer.interests)])
    kept = [i for i in answer.interests if i.kept]
    assert [i.text for i in kept] == told[0] and answer.interests[: len(kept)] == kept
    assert len(answer.interests) == len(SUMMARIES) and answer.threshold is not None


@pytest.mark.parametrize("starter, interest", [
    ("Which chess opening suits me?", "chess openings for club players"),
    ("Hike the Dolomites in June", "hiking in the Dolomites"),
    ("罗马有哪些免费的古迹？", "罗马的历史"),
    ("威尼斯的贡多拉多少钱？", "威尼斯的历史"),  # of cosine 1 with the one above, for MiniLM
    ("Who climbed Denali first?", None),  # near something, as everything is
    ("京都有哪些古迹？", None),
    ("Best chess books ever", None),  # two sessions are about chess
])
def test_the_reason_of_a_starter_is_an_interest_that_it_names(
    engine, scripted, all_kept, starter, interest
):
    summaries = [*SUMMARIES, "罗马的历史", "威尼斯的历史"]
    if language(starter) == "zh":
        summaries = summaries[-2:]
    told = scripted(sug(starter))
    (answer,) = engine.write([Ask(person(*summaries), 1)])
    assert texts(answer) == [starter] and answer.starters[0].interest == interest
    assert interest is None or interest in told[0]


def test_what_names_no_interest_is_dropped_where_enough_others_remain(engine, scripted, all_kept):
    named = ["Which chess opening suits me?", "Bake sourdough bread"]
    scripted(sug("Who climbed Denali first?", named[0]), sug(named[1], "Plan a birthday party"))
    for n, most in ((2, 2), (3, 3), (9, 4)):
        for emitted in ([], None):
            emit = None if emitted is None else emitted.append
            (answer,) = engine.write([Ask(person(*SUMMARIES), n, emit=emit)])
            assert {*named} <= {*texts(answer)} and len(answer.starters) == most
            assert [s.text for s in emitted or answer.starters] == texts(answer)
            assert all((s.interest is not None) == (s.text in named) for s in answer.starters)


def test_an_english_frame_around_a_foreign_title_is_not_their_language(engine, scripted, all_kept):
    history = ["Rutas de senderismo", "Alquilar un piso en Madrid", "Receta de paella"]
    good = ["¿Qué rutas de senderismo hay en Madrid?", "Rutas de senderismo fáciles"]
    scripted(sug("Books on Rutas de senderismo", good[0]), sug(good[1], "The story behind paella"),
             sug("Plan a day around alquilar un piso en Madrid"))
    (answer,) = engine.write([Ask(person(*history), 5)])
    assert {*texts(answer)} == {*good}
    # To who writes English a foreign title is a subject like others.
    history = ["How to cook Receta de paella", "The best of Rutas de senderismo"]
    scripted(sug("Where to find Rutas de senderismo", "Cook Receta de paella"))
    (answer,) = engine.write([Ask(person(*history), 5)])
    assert len(answer.starters) == 2


def test_subjects_that_the_encoder_cannot_read_do_not_merge(engine):
    names = ["罗马的历史", "威尼斯的历史", "京都的历史"]
    vectors = engine.run.encoder(names)
    assert float(vectors[0] @ vectors[1]) > 0.9  # the encoder tells no difference
    (case,) = distilled(engine, Ask(person(*names, "罗马的美食"), 5))
    assert len(case.state.interests) >= 3
    alike = may_be_duplicates([*names, "罗马的美食", "Denali for beginners", "a guide to Denali"])
    assert alike(0, 3) and alike(4, 5) and not alike(0, 1) and not alike(1, 2) and not alike(0, 4)


@pytest.mark.parametrize("a, b", [
    ("Рецепты грузинской кухни", "Рецепты японской кухни"), ("Georgian recipes", "Thai recipes"),
    ("Recetas de cocina japonesa", "Recetas de cocina mexicana"), ("한국 역사", "일본 역사"),
    ("日本の歴史", "韓国の歴史"), ("中国历史", "中国美食"), ("北京大学排名", "清华大学排名"),
    ("Apple stock", "Apple stock price"),
])
def test_a_shared_head_noun_makes_no_duplicates(a, b):
    alike = may_be_duplicates([a, b, f"{a}?", b.upper()])
    assert not alike(0, 1) and not alike(1, 0) and alike(0, 2) and alike(1, 3)


def test_a_long_history_costs_no_more_than_its_budget(engine, monkeypatch):
    """The latest sessions count; a short ask beside it is not embedded with it."""
    long = person(*(f"{i} " + "walks in the hills " * 100 for i in range(500)))
    counted, encode = [], type(engine.run.encoder)._encode
    monkeypatch.setattr(type(engine.run.encoder), "_encode", lambda self, texts: (
        counted.append(sum(map(len, texts.values()))), encode(self, texts))[1])
    monkeypatch.setattr(serving.engine, "MOST_CHARACTERS", 4000)
    ask = Ask(long, 3, shown=[("y" * 100 + str(i), 0, False) for i in range(500)])
    assert 2000 < engine.characters(ask) <= 4000
    users = [s.session_id for s in latest(long.sessions, lambda s: s.summary)]
    assert users == ["s498", "s499"]
    engine.write([ask])
    assert sum(counted) <= 2 * 4000 + 2000  # history, lists shown, and what was written
    assert engine.characters(ask) == 0  # embedded already
    said = [data.Message(role=role, content="é" * 900) for role in ("user", "assistant")]
    talk = data.Session(session_id="t", messages=said)
    wordy = data.Session(session_id="w", messages=said * 9)
    for sessions, count in (([talk] * 3, 3 * 900), ([wordy], ROOM), ([wordy] * 99, ROOM)):
        user = long.model_copy(update={"sessions": sessions})
        assert engine.characters(Ask(user, 3)) == count  # as much as its summariser reads
    assert latest([], str) == [] and latest(["x" * 9999], str) == ["x" * 9999]


def test_starters_come_again_only_where_there_is_nothing_else(engine, scripted):
    old = ["Which chess opening suits me?", "Bake a sourdough loaf"]
    scripted(sug(*old), sug("Hike the Dolomites"))
    (answer,) = engine.write([Ask(person(*SUMMARIES), 3, again=[x.upper() for x in old])])
    assert texts(answer) == ["Hike the Dolomites"]
    scripted(sug(*old), sug(old[1]))
    emitted = []
    (answer,) = engine.write([Ask(person(*SUMMARIES), 3, again=old, emit=emitted.append)])
    assert sorted(texts(answer)) == sorted(old) and emitted == answer.starters
    popular = engine.write([Ask(person(), 60)])[0]
    (answer,) = engine.write([Ask(person(), 3, again=texts(popular))])
    assert answer.starters


def flip(path):
    """Loads as well as any other weights."""
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name, spoil, message", [
    ("sit/adapter/adapter_model.safetensors", flip, "has changed since stage sit wrote it"),
    ("rid/scorer.safetensors", flip, "has changed since stage rid wrote it"),
    ("dpo/round2/adapter/adapter_model.safetensors", flip, "has changed since stage dpo"),
    ("rid/gate.json", lambda f: f.write_text('{"edges": [1'), "no JSON"),
    ("rid/gate.json", lambda f: f.write_text('{"edges": [1.0]}'), "without folds, odds"),
    ("rid/gate.json", lambda f: write_json(f, read_json(f) | {"thresholds": [float("nan")]}),
     "has changed since stage rid"),
    ("rid/gate.json", lambda f: write_json(f, read_json(f) | {"folds": {"u": 9}}), "folds of more"),
    ("rid/scorer.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-9]), "no weights"),
    ("rid/scorer.safetensors", lambda f: f.write_bytes(b"x"), "no weights"),
    ("ranker/train.safetensors", lambda f: f.write_bytes(b""), "no weights"),
    ("ranker/train.safetensors", lambda f: write_tensors(f, {"a": torch.ones(1)}), "another shape"),
    ("sit/adapter/adapter_model.safetensors", lambda f: f.write_bytes(f.read_bytes()[:999]),
     "no weights"),
    ("sit/adapter/adapter_config.json", lambda f: f.write_text("{"), "no adapter"),
    ("sit/adapter/adapter_model.safetensors", lambda f: write_tensors(
        f, {k: x * float("nan") for k, x in read_tensors(f).items()}), "no finite numbers"),
    ("dpo/round2/adapter/adapter_model.safetensors", lambda f: write_tensors(
        f, {k: x * float("nan") for k, x in read_tensors(f).items()}), "no finite numbers"),
])
def test_a_damaged_file_of_the_run_is_one_line(
        finished, tmp_path, monkeypatch, name, spoil, message):
    shutil.copytree(finished.parent, tmp_path / "runs")
    spoil(tmp_path / "runs" / "tiny" / name)
    with pytest.raises(UserError, match=f"{name}: has changed since stage"):
        Engine(micro(tmp_path / "runs"))
    if "has changed" not in message:  # where no digest tells, who reads it does
        monkeypatch.setattr(RunFolder, "lost", lambda *_: [])
    with pytest.raises(UserError, match=message) as raised:
        Engine(micro(tmp_path / "runs"))
    assert name.rpartition("/")[0] in str(raised.value) and "\n" not in str(raised.value)


def test_a_template_with_todays_date_breaks_nothing_after_midnight(engine, scripted, monkeypatch):
    """Whatever a prompt begins with now: what was read of yesterday's is not gone on from."""
    engine.write([Ask(person(*SUMMARIES), 3)])
    head, prompt = engine.writer.head, engine.writer.prompt
    day = llm.encode_text(engine.writer.tokenizer, "28 Nov")
    monkeypatch.setattr(engine.writer, "head", lambda *how: day + head(*how))
    monkeypatch.setattr(engine.writer, "prompt", lambda *what: day + prompt(*what))
    for _ in range(2):
        assert engine.write([Ask(person(*SUMMARIES), 3)])[0] is not None
        monkeypatch.undo()


def test_the_order_is_that_of_list_search_and_then_of_the_rest(engine, scripted):
    starters = ["Which chess opening suits me?", "Chess openings for a club player",
                "Bake a sourdough loaf", "Hike the Dolomites", "Feed a sourdough starter",
                "Win a chess endgame", "Plan a week of hikes"]
    scripted(sug(*starters[:3]), sug(*starters[3:6]), sug(starters[6]))
    (answer,) = engine.write([Ask(person(*SUMMARIES), 7)])
    assert sorted(texts(answer)) == sorted(starters)
    pool = texts(answer)
    utility = torch.tensor([s.utility for s in answer.starters])
    scaled = (utility - utility.min()) / (utility.max() - utility.min())
    similarity = engine.run.encoder(pool) @ engine.run.encoder(pool).T
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


def test_days_since_the_last_session_are_real(engine, monkeypatch):
    """As in training, where a history ends at a cut: three days away are no 0 days."""
    moment = datetime.now(UTC).replace(tzinfo=None) - timedelta(days=3)
    sessions = [data.Session(session_id=str(i), summary=text, timestamp=moment - timedelta(days=i))
                for i, text in enumerate(SUMMARIES)]
    seen, scores = [], Distiller.scores

    def watched(distiller, histories, *rest):
        seen.extend(histories)
        return scores(distiller, histories, *rest)

    monkeypatch.setattr(Distiller, "scores", watched)
    distilled(engine, Ask(data.User(user_id="away", sessions=sessions), 3))
    assert seen[0].days_ago.min().item() == pytest.approx(3, abs=1 / 24 + 1e-3)


def test_fewer_good_starters_than_wanted_are_not_padded(engine, scripted):
    scripted(sug("Bake a sourdough loaf"), "no list at all")
    (answer,) = engine.write([Ask(person(*SUMMARIES), 5)])
    assert texts(answer) == ["Bake a sourdough loaf"]


def test_somebody_new_gets_popular_starters_of_the_profiles_language(engine):
    for user in (person(), person("my depression and how to treat it", region="US")):
        (answer,) = engine.write([Ask(user, 3)])
        assert len(answer.starters) >= 3 and answer.interests == []
        assert (answer.threshold is None) == (user.sessions == [])  # no history is deleted
        assert {(s.source, s.interest) for s in answer.starters} == {("cold start", None)}
    again = engine.write([Ask(person(), 3, avoid=texts(answer))])[0]
    assert not {*texts(again)} & {*texts(answer)}
    chinese = person(language="zh-CN"), person(language="Chinese"), person("我的抑郁症怎么治疗")
    for user in chinese:
        (answer,) = engine.write([Ask(user, 3)])
        assert {language(x) for x in texts(answer)} == {"zh"} and answer.interests == []
    (answer,) = engine.write([Ask(person(language="en-US"), 3)])
    assert {language(x) for x in texts(answer)} == {"en"}
    # Of a language in which nothing is popular, or that is told from no other: none.
    for named in ("de-DE", "Russian", "uk", "tr", "ja"):
        assert not engine.write([Ask(person(language=named), 3)])[0].starters


def test_popular_starters_are_those_of_the_profiles_language(engine, monkeypatch):
    own = {"de": "Wie backe ich ein gutes Brot?", "ru": "Как испечь хлеб?",
           "ja": "パンの作り方は？", "en": "Best sourdough bread", "zh": "怎么做面包"}
    monkeypatch.setattr(engine.popular, "ranked", lambda profile, keep: keep([*own.values()]))
    names = {"de": "Deutsch", "ru": "ru-RU", "ja": "ja", "en": "English (US)", "zh": "中文"}
    for code, named in names.items():
        (answer,) = engine.write([Ask(person(language=named), 3)])
        assert texts(answer) == [own[code]], named


def test_a_batch_answers_each_ask_as_if_it_were_alone(engine):
    users = [person(*SUMMARIES), *engine.examples[1:4], person(name="nobody")]
    asks = [Ask(u, 3, method=m) for u in users for m in engine.methods]
    together = engine.write(asks)
    alone = [engine.write([ask])[0] for ask in asks]
    # In another batch texts are encoded with other rounding, which may turn the order.
    assert [sorted(texts(x)) for x in together] == [sorted(texts(x)) for x in alone]
    assert sum(len(x.starters) > 0 for x in together) >= 12 and together[0].tokens > 0
    # PE hears all, latest first; the others what the gate kept.
    heard = [c.state.interests for c in distilled(engine, *asks[:2])]
    assert heard[0] == SUMMARIES[::-1] and len(heard[1]) <= engine.config.rid.max_keep


def test_each_method_writes_with_its_own_policy(finished, tmp_path, monkeypatch):
    """What a list costs by a method's policy is what it costs by the saved adapter."""
    shutil.copytree(finished.parent, tmp_path / "runs")
    run = tmp_path / "runs" / "tiny"
    adapters = (None, run / "sit" / "adapter", run / "dpo" / "round2" / "adapter")
    for factor, adapter in ((20, adapters[1]), (-20, adapters[2])):  # little was learned
        weights = read_tensors(adapter / "adapter_model.safetensors")
        larger = {k: x * factor if "lora_B" in k else x for k, x in weights.items()}
        write_tensors(adapter / "adapter_model.safetensors", larger)
    monkeypatch.setattr(RunFolder, "lost", lambda *_: [])  # weights that no stage wrote
    engine = Engine(micro(tmp_path / "runs"))
    (case,) = distilled(engine, Ask(person(*SUMMARIES), 3))
    prompt = engine.writer.prompt(case.state.interests)
    lists, costs = [[5, 6, 7, 8], [20, 21]], []
    for method, adapter in zip(engine.methods, adapters, strict=True):
        (expected,) = llm.completion_logps(engine.writer.policy(adapter), [prompt], [lists])
        with engine._policy(method) as (model, _):
            (found,) = llm.completion_logps(model, [prompt], [lists])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        costs.append(expected)
    assert not any(torch.allclose(a, b, atol=1e-2) for a, b in itertools.combinations(costs, 2))


def test_the_first_list_streams_as_it_is_decoded(engine, all_kept, monkeypatch):
    """The tokens of a script, step by step, through the hook of the sampler."""
    first = sug("Which chess opening suits me?", "How to treat my cancer?", "Bake sourdough bread")
    second = sug("Hike the Dolomites", "Bake sourdough bread")
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
        "Which chess opening suits me?", "Bake sourdough bread", "Hike the Dolomites"
    ]
    assert emitted == answer.starters and answer.tokens > 20


def test_who_leaves_gets_no_answer_and_no_more_steps(engine, monkeypatch):
    steps, step = [], llm.sampling.Tree.step
    monkeypatch.setattr(llm.sampling.Tree, "step", lambda *a: steps.append(1) or step(*a))
    asks = [Ask(person(*SUMMARIES), 3), Ask(person(*SUMMARIES, name="other"), 3)]
    answers = engine.write(asks, gone=lambda i: i == 1 and len(steps) > 2)
    assert answers[0] and answers[1] is None and len(steps) > 4
    steps.clear()
    assert engine.write(asks, gone=lambda i: len(steps) > 2) == [None, None] and len(steps) <= 4
    assert engine.write(asks, gone=lambda i: True) == [None, None]


def test_samples_in_a_loop_are_given_up():
    loop = torch.tensor([[[9] * 4 + [5, 6, 7] * 6, list(range(22)), [3] * 22]])
    assert in_a_loop(loop).tolist() == [[True, False, True]]
    assert not in_a_loop(loop[..., :10]).any()


@pytest.mark.parametrize("version", ["feedback1.0abc", "default"])  # PEFT's name of SFT's
def test_an_accepted_round_is_taken_up_and_nothing_else(finished, tmp_path, version):
    shutil.copytree(finished.parent, tmp_path / "runs")
    engine = Engine(micro(tmp_path / "runs"))
    run, before = engine.run.folder, engine.version
    assert before.startswith("round2-") and not engine.refresh()
    write_json(run / "feedback" / "current.json", {
        "round": 1, "adapter": "dpo/round1/adapter", "version": version,
        "ranker": "ranker/judge.safetensors", "run": read_json(run / "dpo" / "done.json")["key"],
    })
    assert engine.refresh() and engine.version == version and not engine.refresh()
    judge = load_ranker(engine.run, "judge").state_dict()
    assert all(torch.equal(x, judge[k]) for k, x in engine.ranker.state_dict().items())
    assert engine.write([Ask(person(*SUMMARIES), 3)])[0] is not None
    state = engine.model.state_dict()
    for method, adapter in (("IceBreaker", "dpo/round1/adapter"), ("SFT", "sit/adapter")):
        name, saved = engine._names[method], engine.writer.policy(run / adapter).state_dict()
        own = {k.replace(name, "default"): v for k, v in state.items() if f".{name}." in k}
        assert own and all(torch.equal(v, saved[k]) for k, v in own.items())
    assert Engine(micro(tmp_path / "runs")).version == version


def test_what_is_forgotten_leaves_memory(engine):
    known = set(engine.run.encoder._vectors)
    messages = [data.Message(role="user", content="How do xylophones work?")]
    session = data.Session(session_id="m", messages=messages)
    user = person("a rare summary about xylophones", town="Ghent")
    user = user.model_copy(update={"sessions": [*user.sessions, session]})
    engine.write([Ask(user, 3)])
    assert len(set(engine.run.encoder._vectors) - known) >= 3
    engine.forget()
    assert set(engine.run.encoder._vectors) <= known


# Of this checkout's files and of tokenizers: nothing that anybody wrote.
OF_NO_TEXTS = {
    "read_yaml", "lexicon", "_file_digest", "_completing", "_control_tokens", "_expressions",
    "_context", "_served", "_unserved", "_simplified"}


def caches() -> dict:
    """Every functools cache of the rooms that serve, by name."""
    files_of = [path for room in (".", "llm", "roles", "stages", "serving")
                for path in (ROOT / room).glob("[a-z]*.py")]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files_of]
    every = [*map(importlib.import_module, names)]
    kind = type(functools.cache(len))
    return {name: c for room in every for name, c in vars(room).items()
            if type(c) is kind and c.__module__ in names}


def test_what_is_forgotten_leaves_every_cache_of_texts(engine):
    of_texts = {name: c for name, c in caches().items() if name not in OF_NO_TEXTS}
    assert {"key_phrases", "_stems", "_subjects", "is_served", "_touched", "kind_of", "stem",
            "content_words"} <= of_texts.keys()
    # A new cache is of texts (files.cache_texts), or stands above.
    assert [name for name, c in of_texts.items() if not any(c is x for x in files._OF_TEXTS)] == []
    (answer,) = engine.write([Ask(person(*SUMMARIES), 3)])
    assert answer and sum(c.cache_info().currsize > 0 for c in of_texts.values()) > 5
    engine.forget()
    assert [name for name, c in of_texts.items() if c.cache_info().currsize] == []


def test_a_long_history_is_given_up_when_nobody_waits(engine, monkeypatch):
    asked = []
    monkeypatch.setattr(
        type(engine.run.encoder), "__call__", lambda self, texts: asked.append(len(texts))
    )
    user = person(*(f"summary number {i}" for i in range(300)))
    assert engine.write([Ask(user, 3)], gone=lambda i: len(asked) >= 2) == [None]
    assert asked == [64, 64]


def test_a_server_of_models_can_write_instead(finished, monkeypatch):
    words = ["generator.endpoint=http://localhost:1/v1", "serve.arms=[SFT]", "endpoint.retries=0"]
    engine = Engine(micro(finished.parent, *words))
    asked = []

    def write(adapter, inputs, n, seed):
        asked.append((adapter.parent.name, n))
        return [[["Bake a sourdough loaf"]] * n for _ in inputs]

    assert not engine.refresh() and engine.methods == ("PE", "SFT")  # it is not there
    monkeypatch.setattr(engine.writer, "write", write)
    monkeypatch.setattr(engine.writer, "is_served", lambda adapter: adapter.parent.name == "round2")
    assert engine.refresh() and engine.methods[-1] == "IceBreaker"
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
    as_trained = (engine.run.folder / "config.yaml").read_text()
    assert "arms:\n  - IceBreaker" in as_trained
    assert engine.write([Ask(person(*SUMMARIES), 3, method="SFT")])[0]
    assert engine.version == "sit" and not engine.refresh()
    shutil.copytree(finished / "dpo", tmp_path / "runs" / "tiny" / "dpo")  # trained meanwhile
    assert engine.refresh() and engine.methods[-1] == "IceBreaker"
    shutil.rmtree(tmp_path / "runs" / "tiny" / "dpo")  # and again: what is loaded goes on
    assert not engine.refresh() and engine.write([Ask(person(*SUMMARIES), 3)])[0]
    assert read_json(engine.run.folder / "rid" / "gate.json")["thresholds"]


def test_the_list_order_covers_rows_of_every_length(engine):
    valid = torch.arange(7)[None] < torch.tensor([7, 4, 2, 0])[:, None]
    utility = torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    order = list_order(engine.config.dpo, 3, utility, torch.eye(7).expand(4, 7, 7), valid, lists=2)
    assert [sorted(x) for x in order] == [[*range(7)], [0, 1, 2, 3], [0, 1], []]
    (first,) = list_order(engine.config.dpo, 3, utility[:1], torch.eye(7)[None], lists=1)
    assert first == order[0][:3]  # four wait for the next list
