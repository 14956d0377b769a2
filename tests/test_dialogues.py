"""Simulated conversations: deterministic, calibrated, their truth points right; dialogue files."""

import json
import re
import sys
import zlib
from collections import Counter

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from config import DialoguesConfig
from files import ROOT
from llm.encoder import Encoder
from tools import importers, logs
from world import __main__ as command
from world import dialogue_clicks, dialogues

SLOTS = np.array([0.47, 0.29, 0.19])  # a real log's click rates of the same content, by slot


def bag(texts: list[str]) -> np.ndarray:
    """A quick stand-in for the encoder: unit vectors of hashed words, of equal texts equal."""
    rows = np.zeros((len(texts), 512), np.float32)
    for row, text in zip(rows, texts, strict=True):
        for word in re.findall(r"\w+", text.lower()) or ["."]:
            row[zlib.crc32(word[:5].encode()) % 512] += 1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def quick():
    return dialogues.Dialogues(DialoguesConfig(contexts=900, seed=101), bag)


@pytest.fixture(scope="module")
def encoder():
    return Encoder()


# ------------------------------------------------------------------------------------------ files


def row(number=1, **changes) -> dict:
    turns = [{"role": "user", "content": "How hot is Mars?"},
             {"role": "assistant", "content": "About -60 degrees."}]
    return {"dialogue_id": f"d{number}", "user_id": None, "timestamp": "2026-03-02T10:00:00",
            "intent": "information", "turns": turns, "suggestions": ["a", "b", "c"],
            "clicked": [1], "unsafe": False} | changes


def write(path, rows):
    lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]
    path.write_bytes(b"\n".join(lines))
    return path


SECRET = "zebra-crossing"
MALFORMED = [
    (b"{", "line"),
    (b"[1]", "line"),
    (row(turns=[]), "turns"),
    (row(turns=None), "turns"),
    (row(turns=[{"role": "user", "content": ""}]), "turns.0.content"),
    (row(turns=[{"role": "user", "content": " \n "}]), "turns.0.content"),
    (row(turns=[{"role": SECRET, "content": SECRET}]), "turns.0.role"),
    (row(turns=[{"role": "assistant", "content": SECRET}]), "turns"),
    (row(suggestions=["a", ""]), "suggestions.1"),
    (row(suggestions=SECRET), "suggestions"),
    (row(suggestions=[]), "clicked"),
    (row(clicked=[3]), "clicked"),
    (row(clicked=[-1]), "clicked.0"),
    (row(clicked=[1.0]), "clicked.0"),
    (row(unsafe="no"), "unsafe"),
    (row(dialogue_id=""), "dialogue_id"),
    (row(timestamp="yesterday"), "timestamp"),
    (row(click_shares=[0.5]), "click_shares"),
    (row(click_shares=[0.5, 1.5, 0.0]), "click_shares.1"),
    (row(0), "dialogue_id"),
]
MALFORMED += [({k: v for k, v in row().items() if k != field}, field)
              for field in ("dialogue_id", "turns", "suggestions", "clicked")]


@pytest.mark.parametrize("bad, field", MALFORMED)
def test_a_malformed_context_is_refused_by_its_line_and_field(tmp_path, bad, field):
    path = write(tmp_path / "dialogues.jsonl", [row(0), b"", bad])
    with pytest.raises(data.DataError) as caught:
        data.read_dialogues(path)
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"{path}:3: {field}: ") and SECRET not in line


def test_all_malformed_contexts_are_listed_up_to_the_limit(tmp_path):
    path = write(tmp_path / "dialogues.jsonl", [row(i, clicked=[9]) for i in range(30)])
    with pytest.raises(data.DataError) as caught:
        data.read_dialogues(path)
    *listed, rest = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in listed] == [f"{path}:{n}" for n in range(1, 21)]
    assert rest == "... and 10 more"


def test_unknown_keys_are_tolerated_and_what_is_written_reads_back_equal(tmp_path, quick, capsys):
    rows = data.read_dialogues(write(tmp_path / "a.jsonl", [row("x1", model="x"), row("x2")]))
    assert "dialogue.model (1 times)" in capsys.readouterr().err and not hasattr(rows[0], "model")
    data.write_dialogues(tmp_path / "b.jsonl", [*rows, *quick.log])
    assert data.read_dialogues(tmp_path / "b.jsonl") == [*rows, *quick.log]


def test_check_recognises_dialogues(tmp_path):
    rows = [row(1), row(2, clicked=[]), row(3, clicked=[0, 2], user_id="u"),
            row(4, suggestions=[], clicked=[], unsafe=True, intent=None)]
    figures = logs.describe(write(tmp_path / "x.jsonl", rows))
    assert figures["contexts"] == 4 and figures["unsafe contexts"] == 1 and figures["users"] == 1
    assert figures["clicks by slot"] == "1 (33.3%), 1 (33.3%), 1 (33.3%)"
    assert figures["intents"] == "information 75.0%, not told 25.0%"
    assert figures["lists clicked past the first"] == 1
    assert figures["contexts without suggestions"] == 1
    only_prompts = [row(1, suggestions=[], clicked=[])]
    assert logs.describe(write(tmp_path / "y.jsonl", only_prompts))["clicks by slot"] == "none"


# ----------------------------------------------------------------------------------------- mimics


def pane(options=("x", "y", "z"), shares=(0.25, 0.75, 0.0), **changes) -> dict:
    return {"question": "Which?", "options": list(options), "option_cctr": list(shares),
            "engagement_level": 3, "labels": {"offline_rating": 4.0}} | changes


def test_panes_become_contexts(tmp_path):
    rows = [{"query": "mars", "panes": [pane(), pane(shares=(0.0, 0.0, 0.0))]},
            {"query": "venus", "panes": [pane(shares=(0.5, 0.0, 0.5))]}]
    made = importers.import_mimics([write(tmp_path / "m.jsonl", rows)], tmp_path / "out.jsonl")
    assert made.startswith("3 panes of 2 queries, 2 with clicks")
    first, second, third = data.read_dialogues(tmp_path / "out.jsonl")
    assert [d.dialogue_id for d in (first, second, third)] == ["q1-1", "q1-2", "q2-1"]
    assert [(t.role, t.content) for t in first.turns] == [("user", "mars")]
    assert first.suggestions == ["x", "y", "z"] and first.clicked == [1]
    assert first.click_shares == [0.25, 0.75, 0.0] and first.timestamp is first.unsafe is None
    assert second.clicked == [] and third.clicked == [0, 2]


@pytest.mark.parametrize("bad, field", [
    ({"query": "", "panes": [pane()]}, "query"),
    ({"query": "q", "panes": []}, "panes"),
    ({"query": "q", "panes": [pane(shares=(1.0,))]}, "panes.0.option_cctr"),
    ({"query": "q", "panes": [pane(), pane(options=("a", "", "b"))]}, "panes.1.options.1"),
    ({"query": "q", "panes": [pane(shares=(0.2, 1.2, 0.0))]}, "panes.0.option_cctr.1"),
    ({"users": []}, "query"),
])  # fmt: skip
def test_faulty_queries_are_passed_over_and_named(tmp_path, capsys, bad, field):
    path, out = tmp_path / "m.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(data.DataError) as caught:  # nothing is left
        importers.import_mimics([write(path, [bad])], out)
    assert str(caught.value).startswith(f"{path}:1: {field}: ") and not out.exists()
    made = importers.import_mimics([write(path, [{"query": "q", "panes": [pane()]}, bad])], out)
    assert capsys.readouterr().err.startswith(f"{path}:2: {field}: ")
    assert made.endswith("; 1 queries that cannot be read left out")
    assert [row.dialogue_id for row in data.read_dialogues(out)] == ["q1-1"]


def test_the_import_command(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "m.jsonl", [{"query": "mars", "panes": [pane()]}])
    out = tmp_path / "dialogues.jsonl"
    monkeypatch.setattr(sys, "argv", ["x", "import", "mimics", str(path), "--out", str(out)])
    logs.main()
    assert "1 panes of 1 queries" in capsys.readouterr().out
    assert len(data.read_dialogues(out)) == 1


# ------------------------------------------------------------------------------------------ world


def test_the_same_seed_gives_the_same_bytes_without_hidden_state(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "Encoder", lambda: bag)
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        words = f"world dialogues --contexts 60 --seed {seed} --out {tmp_path / name}".split()
        monkeypatch.setattr(sys, "argv", words)
        command.main()
    assert "60 contexts" in capsys.readouterr().out
    for file in ("dialogues.jsonl", "evaluation.jsonl", "truth/dialogues.json"):
        a, b, c = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert a == b != c
    for file in ("dialogues.jsonl", "evaluation.jsonl"):
        for line in (tmp_path / "a" / file).read_text().splitlines():
            entry = json.loads(line)
            assert entry.keys() == row().keys()
            assert all(turn.keys() == {"role", "content"} for turn in entry["turns"])
    truth = dialogues.load_truth(tmp_path / "a", bag)
    rows = data.read_dialogues(tmp_path / "a" / "dialogues.jsonl")
    assert {d.dialogue_id for d in rows} < set(truth.dialogues)


def test_topics_are_as_many_as_promised_and_complete(quick):
    topics = [topic for field in quick.fields.values() for topic in field]
    assert len(topics) == len(set(topics)) >= 120 and len(quick.fields) >= 12
    for field in quick.fields.values():
        for facts in field.values():
            assert len(facts) == 5 and all(all(part.strip() for part in fact) for fact in facts)
            assert len({fact.phrase for fact in facts}) == len({f.question for f in facts}) == 5
            assert all(dialogue_clicks.fitness(f.question) > 0 for f in facts), facts


def test_contexts_are_conversations(quick):
    for d in [*quick.log, *quick.evaluation]:
        assert [turn.role for turn in d.turns] == ["user", "assistant"] * (len(d.turns) // 2)
        assert 1 <= len(d.turns) // 2 <= 5
        assert not any(re.search(r"[{}]", t.content) for t in d.turns)
        assert not any(re.search(r"[{}]", text) for text in d.suggestions)
    for d in quick.log:
        hidden = quick.truth.dialogues[d.dialogue_id]
        assert len(set(d.suggestions)) == 3 or (hidden["unsafe"] and not d.suggestions)
        assert len(hidden["needs"]) == 0 if hidden["unsafe"] else 2 <= len(hidden["needs"]) <= 3
        assert hidden["week"] == dialogues.week_of(d.timestamp)


def test_held_out_forms_and_topics_stand_in_the_evaluation_only(quick):
    held_out = {list(field)[-1] for field in quick.fields.values()}
    log = " ".join(t.content for d in quick.log for t in d.turns)
    seen = {quick.truth.dialogues[d.dialogue_id]["topic"] for d in quick.log}
    assert not seen & held_out and len(seen) > 100
    assert {quick.truth.dialogues[d.dialogue_id]["topic"] for d in quick.evaluation} <= held_out
    forms = quick.forms
    assert not any(act in log for act in forms["unsafe"]["held_out"])
    # Nor what stands around an act: else to decline would be to know a frame.
    for name in ("asks", "refusals"):
        for form in forms["unsafe"][name]["held_out"]:
            assert form.partition("{u}")[0] not in log
        for row in (row for row in quick.evaluation if row.unsafe):
            said = row.turns[-2 if name == "asks" else -1].content
            assert any(said.startswith(form.partition("{u}")[0])
                       for form in forms["unsafe"][name]["held_out"])
    for name in ("questions", "further", "requests"):
        for form in forms[name]["held_out"]:
            fixed = max(re.split(r"\{\w+\}", form), key=len).strip()
            assert len(fixed) > 4 and fixed not in log
    unsafe = [d.unsafe for d in quick.evaluation]
    assert sum(unsafe) * 2 == len(unsafe) and not any(d.suggestions for d in quick.evaluation)


def test_no_other_part_of_the_project_holds_the_forms(quick):
    def texts(value):
        if isinstance(value, dict):
            return [text for part in value.values() for text in texts(part)]
        if isinstance(value, list):
            return [text for part in value for text in texts(part)]
        return [value] if isinstance(value, str) else []

    forms = {name: part for name, part in quick.forms.items() if name != "tastes"}
    fixed = {part.strip(" .?,:") for text in texts(forms) for part in re.split(r"\{\w+\}", text)}
    fixed = {part for part in fixed if len(part.split()) >= 4}
    assert len(fixed) > 60
    paths = [p for p in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*/*.yaml")]
             if p.parent.name != "tests" and not p.name.startswith("dialogue")]
    rest = "\n".join(p.read_text(encoding="utf-8").lower() for p in paths)
    assert [part for part in sorted(fixed) if part.lower() in rest] == []


def test_shares_and_weeks_are_as_stated(quick):
    hidden = [quick.truth.dialogues[d.dialogue_id] for d in quick.log]
    shares = Counter(h["intent"] for h in hidden)
    for intent, share in (("information", 0.35), ("web search", 0.40),
                          ("content generation", 0.22), ("unsafe", 0.03)):  # appendix C.1
        assert shares[intent] / len(hidden) == pytest.approx(share, abs=0.04)
    weeks = Counter(h["week"] for h in hidden)
    assert weeks[0] / len(hidden) == pytest.approx(0.5, abs=0.05)
    assert all(weeks[w] / len(hidden) == pytest.approx(0.125, abs=0.03) for w in (1, 2, 3, 4))
    counts = Counter(len(d.turns) // 2 for d in quick.log)
    assert all(counts[n] > counts[n + 1] > 0 for n in (1, 2, 3, 4))
    unsafe = [d for d in quick.log if quick.truth.dialogues[d.dialogue_id]["unsafe"]]
    assert np.mean([not d.suggestions for d in unsafe]) == pytest.approx(0.75, abs=0.15)
    unlabelled = [d.intent is None for d in quick.log]
    assert unlabelled == [d.unsafe is None for d in quick.log] and 0.01 < np.mean(unlabelled) < 0.06


OPENINGS = {"make", "add", "use", "provide", "give", "turn", "show", "list", "explain", "compare",
            "break", "summarize", "describe", "adapt", "revise", "discuss", "tell"}


def imperative(text: str) -> bool:
    return text.split()[0].lower() in OPENINGS


@pytest.mark.slow  # a thousand texts are encoded
def test_clicks_look_like_a_real_log(encoder):
    """With the real encoder, before any method is run; bands stated here and nowhere fitted to."""
    made = dialogues.Dialogues(DialoguesConfig(contexts=140, seed=102), encoder)
    shown = [d for d in made.log if d.suggestions]
    chances = np.array([made.truth.click_probabilities(d.dialogue_id, d.suggestions)
                        for d in shown])  # (contexts, 3); expectations, so that few contexts do
    assert 0.6 < np.mean(np.prod(1 - chances, 1)) < 0.85  # lists without a click: 50 to 90 %
    rate = chances.mean(0)
    assert 0.10 < rate[0] < 0.30 and np.all(np.diff(rate) < 0)
    assert rate / rate[0] == pytest.approx(SLOTS / SLOTS[0], abs=0.15)
    style = np.array([[imperative(s) for s in d.suggestions] for d in shown])
    among_clicked = (chances * style).sum() / chances.sum()
    assert 0.25 < style.mean() < 0.50 and among_clicked - style.mean() > 0.08
    useful = np.array([made.truth.usefulness(d.dialogue_id, d.suggestions) for d in shown])
    assert 0.2 < useful.mean() < 0.6  # neither hopeless nor perfect: there is something to learn
    # What is clicked is more useful, but usefulness is not all.
    clicked_use = (chances * useful).sum() / chances.sum()
    assert 1.2 < clicked_use / useful.mean() < 2.2
    logged = np.mean([len(d.clicked) for d in shown])
    assert logged == pytest.approx(chances.sum(1).mean(), rel=0.35)


def test_tastes_drift_between_weeks_but_usefulness_does_not(quick):
    liking, truth = dialogue_clicks.liking, quick.truth
    by_week = np.array([[liking(f"{word} it", week) for word in sorted(OPENINGS)]
                        for week in range(5)])
    gaps = np.abs(np.diff(by_week, axis=0)).mean(1)  # of one week to the next
    assert np.all(gaps > 0.01) and np.all(gaps < 0.2)
    alike = np.corrcoef(by_week[0], by_week[4])[0, 1]
    assert 0.8 < alike < 0.995  # mild, as in Table 2
    assert liking("Make a table", 4) < liking("Make a table", 0)
    assert liking("Compare both", 4) > liking("Compare both", 0)
    some = next(d for d in quick.log if len(d.suggestions) == 3)
    first, last = (truth.click_probabilities(some.dialogue_id, ["Make it short"], week)[0]
                   for week in (0, 4))
    assert last < first
    fields = {topic: field for field, topics in quick.fields.items() for topic in topics}
    shares = np.zeros((2, len(quick.fields)))
    for hidden in truth.dialogues.values():
        shares[min(1, hidden["week"])][list(quick.fields).index(fields[hidden["topic"]])] += 1
    shares /= shares.sum(1, keepdims=True)
    assert 0.05 < np.abs(shares[0] - shares[1]).sum() / 2 < 0.5  # other topics come up


def test_wording_is_liked_as_in_appendix_i(quick):
    like = dialogue_clicks.liking
    assert like("Make it more specific", 0) > like("Make it more concrete", 0) + 0.5  # Table 10
    assert like("Add details on fees", 0) > like("Can you say more on fees?", 0) + 0.5  # Table 9
    assert like("Make it more engaging", 0) > like("Make it more engaging for all who read it", 0)
    assert like("", 0) == 0 and like("word " * 40, 0) < -2


BREAD = {
    "topic": "sourdough bread", "intent": "information", "unsafe": False, "week": 0,
    "eagerness": 0.0, "asked": ["How often should I feed a sourdough starter?",
                                "the feeding schedule of the starter"],
    "needs": [
        {"weight": 1.0, "texts": ["Why is my sourdough dense inside?", "fixing a dense crumb"]},
        {"weight": 0.5, "texts": ["Do I need a Dutch oven for sourdough?"]},
    ],
}  # fmt: skip


def test_usefulness_of_any_text_points_in_the_right_direction(encoder):
    state = {"dialogues": {"d": BREAD, "u": BREAD | {"unsafe": True}}}
    truth = dialogue_clicks.Truth(state, encoder)

    def use(*texts):
        return truth.usefulness("d", list(texts))

    best = use("What makes the crumb of my sourdough loaf so dense?")[0]
    second = use("Is a Dutch oven necessary to bake sourdough?")[0]
    same_topic = use("Which flour makes the best sourdough bread?")[0]
    assert best > 0.6 > second > 0.3 > same_topic > use("Who won the tennis match?")[0]
    assert use("Who won the tennis match?")[0] < 0.02
    assert use("How often do I have to feed my sourdough starter?")[0] == 0  # was asked before
    spanish = "¿Por qué es tan densa la miga de este pan con masa?"
    for text in ("", "  ", "?", "Unsafe", "请解释为什么面包很密", spanish,
                 "Why is my sourdough dense inside? " * 4, "Make it more engaging"):
        assert use(text)[0] < 0.1, text
    assert use("dense " * 8)[0] < 0.3 * best
    twice = use("Why is my sourdough dense inside?", "How do I fix a dense sourdough crumb?")
    assert twice[1] < 0.3 * twice[0]
    apart = use("Why is my sourdough dense inside?", "Do I need a Dutch oven for sourdough?")
    assert apart == pytest.approx([1.0, 0.5])
    assert truth.usefulness("u", ["Why is my sourdough dense inside?"]).tolist() == [0.0]
    clicks = truth.click_probabilities("d", ["Explain the dense crumb of my sourdough",
                                             "Who won the tennis match?"])
    assert clicks[0] > 3 * clicks[1]


def test_the_same_suggestion_is_clicked_by_slot_as_in_a_real_log(quick):
    some = next(d.dialogue_id for d in quick.log if len(d.suggestions) == 3)
    chances = [quick.truth.click_probabilities(some, [""] * slot + ["Add details"])[-1]
               for slot in range(3)]
    assert np.array(chances) / chances[0] == pytest.approx(SLOTS / SLOTS[0])
    assert quick.truth.click_rate(some, []) == 0
    pair = ["Add details", "Tell me more"]
    p = quick.truth.click_probabilities(some, pair)
    assert quick.truth.click_rate(some, pair) == pytest.approx(1 - (1 - p[0]) * (1 - p[1]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=120), max_size=5), st.integers(0, 4))
def test_no_text_breaks_the_truth(texts, week):
    truth = dialogue_clicks.Truth({"dialogues": {"d": BREAD, "u": BREAD | {"unsafe": True}}}, bag)
    for name in ("d", "u"):
        useful = truth.usefulness(name, texts)
        chances = truth.click_probabilities(name, texts, week)
        assert useful.shape == chances.shape == (len(texts),)
        assert np.all((useful >= 0) & (useful <= 1)) and np.all((chances >= 0) & (chances <= 1))
        assert 0 <= truth.click_rate(name, texts, week) <= 1


def test_the_yaml_files_hold_plain_text():
    for name in ("dialogue_topics.yaml", "dialogue_forms.yaml"):
        tree = yaml.safe_load((ROOT / "world" / name).read_text(encoding="utf-8"))
        assert isinstance(tree, dict) and None not in tree.values()
