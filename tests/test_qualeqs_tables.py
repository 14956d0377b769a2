"""Tables and claims of paper 001 by hand on made-up values, and from a finished run."""

import json

import numpy as np
import pytest
from conftest import rows_of

from files import UserError, write_json
from stages import quality_eval
from tables import claims, experiments, siblings
from tables import qualeqs as report
from world.shop_clicks import Truth

CONTEXTS = [f"t{i}" for i in range(40)]
INTENTS = ["platform QA", "product QA", "product recommendation", "small talk"]
LEVELS = {"base": 0.1, "SFT w/o mix ratio": 0.2, "SFT": 0.3, "GRPO": 0.2, "SFT-GRPO": 0.4,
          "w/o unclicked": 0.45, "w/o disagreement": 0.5, "QualEQS, round 1": 0.5,
          "QualEQS, round 2": 0.55, "QualEQS": 0.55, "constant list": 0.3}
ABOUT = {"command": "python eval.py --reproduce qualeqs", "seeds": [0, 1, 2], "config": "abc",
         "commit": "0123", "starts": [{"commit": "0123", "minutes": 1.0, "core_hours": 0.1}],
         "processors": 2}


def made_up(number: int) -> dict:
    """values.json of a seed in which every claim holds."""
    rng = np.random.default_rng(number)

    def column(mean):
        noise = 0.02 * rng.standard_normal(len(CONTEXTS))
        return dict(zip(CONTEXTS, (mean + noise).tolist(), strict=True))

    metrics = [*experiments.read("qualeqs")["columns"], *experiments.read("qualeqs")["online"]]
    values = {name: {metric: column(level) for metric in metrics}
              for name, level in LEVELS.items()}
    values |= {f"gain of the {title} round": {"strict_accuracy": column(gain)}
               for title, gain in (("first", 0.1), ("last", 0.05))}
    groups = {intent: CONTEXTS[i::4] for i, intent in enumerate(INTENTS)}
    groups["other intents"] = [c for intent in INTENTS[1:] for c in groups[intent]]
    pairs = {name: {c: {"right": 0.3 if name == INTENTS[0] else 0.6,
                        "wrong": 0.7 if name == INTENTS[0] else 0.4} for c in some}
             for name, some in groups.items()}
    return {"values": values, "pairs": pairs, "rounds": 2}


@pytest.fixture(scope="module")
def seeds():
    return [made_up(number) for number in range(3)]


def test_claims_are_few_and_directional_and_can_fail(seeds):
    wanted = ["1", "2", "figure3", "figure4", "figure5"]
    rows = claims.judged(seeds, wanted, "qualeqs_claims", hierarchical=True)
    assert len(rows) == len(claims.all_claims("qualeqs_claims"))
    assert sum(row["paper"] != claims.OURS for row in rows) == len(rows) - 2 == 12
    assert {row["verdict"] for row in rows} == {"holds"}
    turned = [{**s, "values": {**s["values"], "QualEQS": s["values"]["base"]}} for s in seeds]
    rows = claims.judged(turned, wanted, "qualeqs_claims", hierarchical=True)
    failed = [row for row in rows if row["more"] == "QualEQS"]
    assert failed and {row["verdict"] for row in failed} == {"does not hold"}


def test_growth_is_over_the_control_and_correlation_over_policies():
    def one(strict, uv, pv):
        return {"strict_accuracy": {"a": strict}, "chat_uv": {"a": uv}, "chat_pv": {"a": pv}}

    seeds = [{"values": {"base": one(0.1, 0.1, 0.4), "SFT-GRPO": one(0.2, 0.2, 0.4),
                         "QualEQS, round 1": one(0.4, 0.4, 0.5), "QualEQS": one(0.4, 0.4, 0.5)}}]
    rows = rows_of(report.online_table(seeds))
    assert rows["QualEQS, round 1"][1:] == ["+100.0 %", "+25.0 %"] and "QualEQS" not in rows
    assert rows["SFT-GRPO"][1:] == ["+0.0 %", "+0.0 %"]
    assert report.correlation(seeds, "chat_uv") == "+1.00"
    # Of (.1, .2, .4) and (.4, .4, .5): covariances .0233 / sqrt(.04667 * .00667).
    assert report.correlation(seeds, "chat_pv") == "+0.94"


def test_the_page_names_every_table_and_is_made_again_from_its_values(seeds, tmp_path, capsys):
    paths = []
    for number, one in enumerate(seeds):
        paths.append(str(tmp_path / "values" / f"qualeqs-{number}.json"))
        write_json(paths[-1], {"about": ABOUT, **one})
    siblings.again(report.PAPER, paths)
    page = (tmp_path / "qualeqs.md").read_text()
    assert page in capsys.readouterr().out
    for text in ("## Table 1", "## Table 2", "## Figure 3", "## Figure 4", "## Figure 5",
                 "| platform QA | 0.300 [0.300, 0.300] |", "36.7, 53.2 %", "QualEQS, round 2"):
        assert text in page
    write_json(tmp_path / "other.json", {"values": {}})
    with pytest.raises(UserError, match="no values of --reproduce qualeqs"):
        siblings.again(report.PAPER, [str(tmp_path / "other.json")])


def test_values_of_a_seed_by_hand(tmp_path, monkeypatch):
    """What stage `eval` has left, with what the hidden state adds."""
    answers = {"SFT-GRPO": ["1. a b\n2. c d\n3. e f"], "QualEQS, round 1": ["none"],
               "QualEQS, round 2": ["1. a b\n2. c d\n3. e f"]}
    strict = {"SFT-GRPO": 0.0, "QualEQS, round 1": 0.75, "QualEQS, round 2": 1.0}
    write_json(tmp_path / "eval" / "values.json", {
        "intents": {"x": "platform QA", "y": "small talk"},
        "values": {name: {"strict_accuracy": {"x": value, "y": 0.5}}
                   for name, value in strict.items()}})
    lines = [json.dumps({"dialogue_id": name, "answers": answers}) for name in ("x", "y")]
    (tmp_path / "eval" / "answers.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(report.shop, "load_truth", lambda folder: Truth({"dialogues": {}}))
    monkeypatch.setattr(Truth, "chats", lambda self, name, some: (0.5, float(len(some))))
    monkeypatch.setattr(Truth, "usefulness", lambda self, name, some: np.full(len(some), 0.6))

    class Finished:
        folder = tmp_path

        class config:
            class quality:
                rounds = 2

    made = report.seed_values(Finished)
    values = made["values"]
    assert values["QualEQS"] == values["QualEQS, round 2"]
    assert values["gain of the first round"]["strict_accuracy"] == {"x": 0.75, "y": 0.0}
    assert values["gain of the last round"]["strict_accuracy"] == {"x": 0.25, "y": 0.0}
    assert values["SFT-GRPO"]["chat_pv"] == {"x": 3.0, "y": 3.0}
    assert values["QualEQS, round 1"]["chat_pv"]["x"] <= 1  # a text, no list of three
    assert values["SFT-GRPO"]["usefulness"]["x"] == pytest.approx(0.6)
    assert made["pairs"] == {"platform QA": {"x": {"right": 1.0, "wrong": 0.0}},
                             "small talk": {"y": {"right": 0.5, "wrong": 0.5}},
                             "other intents": {"y": {"right": 0.5, "wrong": 0.5}}}


def test_columns_are_those_of_stage_eval():
    """The columns that the tables read are the ones that the stage writes."""
    columns = experiments.read("qualeqs")["columns"]
    assert {*quality_eval.COLUMNS} == {*columns} - {"usefulness", "alone"}
