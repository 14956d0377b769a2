"""Suggestions checked against a catalogue's rows: each claim by example, the page, marks."""

import ast
import json

import pytest

import data
import garm
from config import load_config
from files import ROOT, UserError
from roles import quality
from run import Run
from tables import catalogue
from tables.facts import Facts
from tests.test_quality import RETAIL, talk

PRODUCTS = [data.Product(id=i, name=name, category=category, description=description, price=price,
                         currency="SAR", brand="Hem", attributes=attributes)
            for i, name, category, description, price, attributes in RETAIL]
POLICIES = [data.Policy(section="returns", name="window", text="Within 30 days.")]


@pytest.fixture(scope="module")
def facts():
    return Facts(PRODUCTS, POLICIES)


CASES = [  # suggestion, verdict, kinds of its claims
    ("Which bar stools are under SAR 100?", "true", ["kind", "price"]),
    ("Which bar stools are under SAR 60?", "false", ["kind", "price"]),
    ("Bar stools for at least 70 riyals", "true", ["kind", "price"]),
    ("Bar stools, 1,299.00 SAR or more", "false", ["kind", "price"]),
    ("Bar stools under €100", "false", ["kind", "price"]),
    ("Which chairs are below 100 SAR?", "false", ["kind", "price"]),  # a pad is no chair
    ("Chair pads below 100 SAR", "true", ["kind", "price"]),
    ("Do you have the harsta bar stool?", "true", ["product", "kind"]),
    ("Is there a MOLN bar stool?", "false", ["product", "kind"]),
    ("Show me the RAND swivel chair", "true", ["product", "kind"]),  # half of a name
    ("Do you have FLURPEN chairs?", "false", ["product", "kind"]),
    ("Do you sell chairs from Zorbex?", "false", ["product", "kind"]),
    ("White chairs please", "open", ["kind", "feature"]),  # nobody tells colours here
    ("Which bar stools are by Eva Lind?", "true", ["kind", "attribute"]),
    ("Which TV benches are by Eva Lind?", "false", ["kind", "attribute"]),
    ("Which TV benches have a width of 120 cm?", "true", ["kind", "size", "attribute"]),
    ("TV benches with a width of more than 120.5 cm", "false", ["kind", "size", "attribute"]),
    ("Is there a bar stool of 63 cm?", "true", ["kind", "size"]),  # its description says so
    ("TV bench with 3 drawers", "true", ["kind", "feature", "feature"]),
    ("TV bench with 4 drawers", "open", ["kind", "feature", "feature"]),
    ("Does the MOLN TV bench have doors?", "true", ["product", "kind"]),  # no is an answer
    ("What is the weight of the MOLN?", "open", ["product", "attribute"]),
    ("Which ones have a backrest?", "true", ["feature"]),  # of what was spoken of
    ("Which ones have 3 drawers?", "open", ["feature", "feature"]),  # nobody says that it has none
    ("Which toys are in stock?", "open", ["feature"]),  # there is storage for them
    ("Do you have TVs?", "open", ["feature"]),
    ("Is the return window 30 days?", "none", []),
    ("Who won the match last night?", "none", []),
    ("What do you recommend?", "none", []),
    ("What chairs do you have for a small flat?", "true", ["kind"]),
]  # fmt: skip


@pytest.mark.parametrize("suggestion, verdict, kinds", CASES)
def test_each_claim_by_example(facts, suggestion, verdict, kinds):
    turns = talk("Tell me about the HÅRSTA bar stool", "It has a backrest.").turns
    checked = facts.check(suggestion, turns)
    assert (checked.verdict, [c.kind for c in checked.claims]) == (verdict, kinds), checked


def test_the_check_shares_nothing_with_the_judge():
    """Neither names nor words of roles/: what it measures was trained by that judge."""
    tree = ast.parse((ROOT / "tables" / "facts.py").read_text("utf-8"))
    imported = {node.module if isinstance(node, ast.ImportFrom) else name.name
                for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
                for name in node.names}
    assert "data" in imported and not {m for m in imported if m.split(".")[0] == "roles"}


def test_a_number_in_a_name_claims_no_size():
    shelf = data.Product(id="s", name="Shelf 60 x 30 cm", category=["Shelves"], price=20,
                         currency="SEK", attributes={"depth_cm": 25.0})
    facts = Facts([shelf])
    checked = facts.check("Show me the Shelf 60 x 30 cm under 50 SEK")
    assert (checked.verdict, [c.kind for c in checked.claims]) == ("true", ["product", "price"])
    assert facts.check("Which shelves are 30 cm deep?").verdict == "false"
    judge = quality.Rules([shelf], [])
    [verdicts] = judge.quality([(talk("hi"), ["Is the Shelf 60 x 30 cm under 50 SEK?",
                                              "Shelves of 30 cm"])])
    assert [v.factual for v in verdicts] == [1, 0]


def test_a_shop_without_descriptions_has_its_categories(facts):
    bare = Facts([p.model_copy(update={"description": None}) for p in PRODUCTS])
    assert bare.check("Which chairs are under 20 SAR?").verdict == "true"
    assert bare.check("Which TVs are under SAR 900?").claims[0].kind != "kind"


# ------------------------------------------------------------------------------------- the command


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run whose policy writes one true, one false and one open suggestion to each context."""
    data.write_catalogue(tmp_path / "c.jsonl", PRODUCTS)
    (tmp_path / "p.yaml").write_text("returns:\n  window: Within 30 days.\n")
    config = load_config(None, [
        "run.method=qualeqs", "run.name=q", f"run.root={tmp_path}", "eval.max_users=1",
        f"data.catalogue={tmp_path}/c.jsonl", f"data.policies={tmp_path}/p.yaml"])
    run = Run(config).folder
    told = ["Show me a HÅRSTA bar stool", "I need a swivel chair", "how are you?"]  # the last: none
    data.write_dialogues(run / "world" / "evaluation.jsonl", [
        talk(text, "Sure.").model_copy(update={"dialogue_id": f"t{i}"})
        for i, text in enumerate(told)])
    adapter = run / "sft" / "mixed" / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True)
    adapter.write_bytes(b"weights")
    run.mark_done("sft/mixed", "key")
    answer = garm.format_answer(["Bar stools under SAR 100", "Bar stools under SAR 60",
                                 "Are there bar stools in white?"])

    class Writes:
        def __init__(self, writer):
            pass

        def write(self, adapter, contexts, n, seed):
            return [[answer] for _ in contexts]

    monkeypatch.setattr(catalogue, "Suggester", Writes)
    monkeypatch.setattr(catalogue, "players_of", lambda run: type("Players", (), {"writer": None}))
    return run.path


def marks_for(folder, verdicts):
    rows = [json.loads(line) for line in (folder / "catalogue.jsonl").open()]
    assert all({*row} == {"number", "text", "suggestion", "after"} for row in rows)  # no verdict
    return "".join(json.dumps({"number": row["number"], "text": row["text"], "mark": mark}) + "\n"
                   for row, mark in zip(rows, verdicts, strict=True))


def test_the_page_has_shares_of_false_facts_and_a_readers_agreement(folder, tmp_path):
    out = tmp_path / "out" / "catalogue.md"
    catalogue.write_catalogue(folder, 6, None, out)
    text = out.read_text("utf-8")
    assert "| the check, as the policy writes | 6 | 6 | 2 | 2 | 0.50 [0.15, 0.85] |" in text
    assert "| the check, what the server would show | 2 | 2 | 0 | 0 | 0.00 [0.00, 0.66] |" in text
    assert "6 suggestions for 2 held-out contexts" in text and "| price | 4 | 0 | 0 |" in text
    (tmp_path / "m.jsonl").write_text(
        marks_for(folder, ["true", "false", "false", "true", "false", "open"]))
    catalogue.write_catalogue(folder, 6, tmp_path / "m.jsonl", out)
    text = out.read_text("utf-8")
    assert "| a reader, as the policy writes | 6 | 6 | 3 | 1 | 0.60 [" in text
    assert "| the same of four | 0.83 [" in text and "| false or not | 0.83 [" in text
    values = json.loads((tmp_path / "out" / "values" / "catalogue.json").read_text())
    assert [v["check"] for v in values] == ["true", "false", "open"] * 2
    assert {*values[0]} == {"number", "text", "shown", "check", "reader"}  # no product's text
    assert "| 0.67 |" in text  # kappa by hand: (5/6 - 1/2) / (1 - 1/2)


@pytest.mark.parametrize("change, fault", [
    (lambda text: text.replace('"number": 1,', '"number": 2,'), "number: marked above, or another"),
    (lambda text: text.replace('"mark": "true"', '"mark": "good"'), "m.jsonl:1: mark:"),
    (lambda text: text.split("\n", 1)[1], "all suggestions are to be marked"),
])  # fmt: skip
def test_marks_of_other_suggestions_are_refused(folder, tmp_path, change, fault):
    catalogue.write_catalogue(folder, 3, None, tmp_path / "c.md")
    (tmp_path / "m.jsonl").write_text(change(marks_for(folder, ["true", "false", "open"])))
    with pytest.raises(UserError, match=fault):
        catalogue.write_catalogue(folder, 3, tmp_path / "m.jsonl", tmp_path / "c.md")


def test_too_few_contexts_and_other_runs_are_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="6 suggestions for 2 contexts that name goods: raise"):
        catalogue.write_catalogue(folder, 7, None, tmp_path / "c.md")
    other = Run(load_config(None, [f"run.root={tmp_path}", "run.name=i"])).folder
    with pytest.raises(UserError, match="a run of qualeqs is wanted"):
        catalogue.write_catalogue(other.path, 3, None, tmp_path / "c.md")
