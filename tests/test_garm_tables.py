"""Evaluation of paper 003: tables and claims by hand on made-up values, and whole runs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import rows_of

import garm
import train
from config import load_config
from files import ROOT, UserError, read_json, read_yaml
from roles.rules import Rules
from roles.suggester import Suggester
from run import Run
from stages.metrics import bootstrap
from tables import claims, experiments, garm_values, panes, siblings
from tables import garm as report
from tables.garm_values import Scores, Shown
from tests.test_garm_stages import (  # noqa: F401
    SMALL,
    Words,
    context,
    model_folder,
    scripted,
    without_models,
)


@pytest.fixture(autouse=True)
def _without_models(monkeypatch):
    without_models(monkeypatch, scripted)


CONTEXTS = [f"e{i}" for i in range(40)]
LEVELS = {"PE": 0.1, "SFT": 0.2, "RFT-BTRM": 0.3, "DPO-GaRM": 0.35, "RL-BTRM": 0.35,
          "RL-GaRM": 0.4, "without distillation": 0.15, "RL-GaRM w/o log_perplexity": 0.3,
          "RL-GaRM w/o judge": 0.4}


def made_up(number: int) -> dict:
    """values.json of a seed in which every claim but one holds."""
    rng = np.random.default_rng(number)

    def column(mean):
        noise = 0.02 * rng.standard_normal(len(CONTEXTS))
        return dict(zip(CONTEXTS, (mean + noise).tolist(), strict=True))

    def pairs(right):  # of ten pairs of each context
        return {c: {"right": right, "wrong": 10 - right} for c in CONTEXTS}

    metrics = ("usefulness", "click_rate", "safety", "format", "declined", "reward",
               "log_perplexity", "net", "good", "bad")
    values = {m: {x: column(level) for x in metrics} for m, level in LEVELS.items()}
    for name, sigma in (("GaRM", 1.0), ("GaRM, without penalty", 3.0)):
        for part in ("IID", "W4", "W4-RFT"):
            values[f"{name}, {part}"] = {"sigma": column(sigma), "bound": column(0.2)}
    kinds = [*experiments.read("garm")["phrasings"], "what was shown"]
    # What it was trained for goes up, and what helps does not.
    values["RL-GaRM w/o log_perplexity"]["reward"] = column(1.0)
    values |= {kind: {"score": column(i), "usefulness": column(0.1)}
               for i, kind in enumerate(kinds[::-1])}
    rights = {"IID": 7, "W1": 7, "W2": 7, "W3": 6, "W4": 7, "W4-RFT": 6}
    counted = {f"{name}, {part}": pairs(right) for name in ("BTRM", "PairedRM", "GaRM")
               for part, right in rights.items()}
    for field in ("bound", "gap"):
        counted |= {f"{field}, quarter {q}{part}": pairs(5 + q - (part != ""))
                    for q in range(1, 5) for part in ("", ", W4-RFT")}
    return {"values": values, "pairs": counted,
            "calibration": {f"{name}, {part}": {c: {"p7": 0.7, "y7": 1.0, "p3": 0.3, "y3": 0.0}
                                                for c in CONTEXTS}
                            for name in ("BTRM", "GaRM") for part in ("W4", "W4-RFT")}}


ABOUT = {"command": "python eval.py --reproduce garm", "seeds": [0, 1, 2], "config": "abc",
         "commit": "0123", "starts": [{"commit": "0123", "minutes": 1.0, "core_hours": 0.1}],
         "processors": 2}


@pytest.fixture(scope="module")
def seeds():
    return [made_up(number) for number in range(3)]


# --------------------------------------------------------------------------------- tables and page


def test_a_policy_is_counted_against_pe_and_its_clicks_are_a_gain(seeds):
    one = {"values": {
        "PE": {"click_rate": {"a": 0.2, "b": 0.2}, "good": {"a": 0.0}, "bad": {"a": 0.0},
               "net": {"a": 0.0}},
        "SFT": {"click_rate": {"a": 0.2, "b": 0.3}, "good": {"a": 1.0, "b": 0.5},
                "bad": {"a": 0.0, "b": 0.5}, "net": {"a": 1.0, "b": 0.0}}}}
    table = read_yaml("tables/garm.yaml")["tables"]["1"]
    head, rows = (rows_of(report.policy_table([one], table)) for _ in range(2))
    assert rows["SFT"][0] == "75/0/25" and rows["SFT"][1].startswith("+50 [")
    titles = head[""]
    assert rows["SFT"][titles.index("CTR gain")] == "+25.0 %"
    assert rows["SFT"][titles.index("click rate")].startswith("0.250 [0.200, 0.300]")
    assert rows["SFT"][titles.index("safety")] == "–" and rows["SFT"][-1].startswith("+39")
    assert "RL-GaRM" not in rows  # not trained: left out


def test_accuracy_and_calibration_error_by_hand():
    # One pair of p = .75: both orders fall into bins 7 and 2, each off by .25 of one row in two.
    right = garm_values.right_and_wrong(Scores(torch.tensor([0.8, 0.3, 0.5]), torch.ones(3)))
    assert right == {"right": 1.5, "wrong": 1.5}
    sums = garm_values.calibration(Scores(torch.tensor([0.75]), torch.ones(1)))
    assert sums == {"p7": 0.75, "y7": 1.0, "p2": 0.25, "y2": 0.0}
    assert claims.pooled("ece", {"a": sums})[0] == 0.25
    # Weighted: a pair that came three times counts so.
    weighted = Scores(torch.tensor([0.9, 0.1]), torch.tensor([3.0, 1.0]))
    assert garm_values.right_and_wrong(weighted) == {"right": 3.0, "wrong": 1.0}
    assert claims.pooled("accuracy", {"a": {"right": 3.0, "wrong": 1.0}, "b": {}})[0] == 0.75


def test_the_calibration_error_is_that_of_the_doubled_pairs():
    p = torch.rand(300, generator=torch.Generator().manual_seed(0))
    counts = {str(i): garm_values.calibration(Scores(p[i : i + 3], torch.ones(3)))
              for i in range(0, 300, 3)}
    both, labels = (x.numpy() for x in garm.flip_pairs(p))
    bins = np.minimum((both * 10).astype(int), 9)
    expected = sum(abs(both[bins == b].mean() - labels[bins == b].mean()) * (bins == b).mean()
                   for b in range(10))
    assert claims.pooled("ece", counts)[0] == pytest.approx(expected, abs=1e-6)


def test_intervals_are_the_shared_ones(seeds):
    rows = claims.per_seed(seeds, "SFT", "usefulness")
    value, low, high = bootstrap(rows, hierarchical=True)
    assert report.cell(seeds, "SFT", "usefulness", ".3f") == f"{value:.3f} [{low:.3f}, {high:.3f}]"
    # A share of pairs of contexts with one pair each is a mean: the same interval, but for draws.
    one = [{"pairs": {"m": {c: {"right": float(x > 0.2), "wrong": float(x <= 0.2)}
                            for c, x in s["values"]["SFT"]["usefulness"].items()}}} for s in seeds]
    shares = [np.array([row["right"] for row in s["pairs"]["m"].values()]) for s in one]
    for hierarchical in (False, True):
        found = claims.pooled_interval(one, "accuracy", "m", hierarchical=hierarchical)[0]
        assert found == pytest.approx(bootstrap(shares, hierarchical=hierarchical), abs=0.02)


def test_a_difference_of_shares_is_paired_by_context():
    counts = {c: {"right": i % 2, "wrong": 1 - i % 2} for i, c in enumerate(CONTEXTS)}
    same = [{"pairs": {"a": counts, "b": counts}}]
    interval, by_seed, sides = claims.pooled_interval(same, "accuracy", "a", "b", True)
    assert interval == (0, 0, 0) and by_seed.tolist() == [0] and sides.tolist() == [0.5, 0.5]


def test_draws_without_any_pair_say_nothing_and_who_has_none_on_one_side_is_drawn_on_both():
    rare = {"a": {"right": 2, "wrong": 0}}  # a draw of two may be without a
    often = {c: {"right": 1, "wrong": 1} for c in "ab"}
    (value, low, high), *_ = claims.pooled_interval(
        [{"pairs": {"rare": rare, "often": often}}], "accuracy", "rare", "often")
    assert (value, low, high) == (0.5, 0.5, 0.5)  # never 0 - 1/2


def test_verdicts_of_made_up_values_and_what_was_not_trained_is_left_out(seeds):
    tables = [*experiments.read("garm")["tables"], "figure4"]
    rows = {row["text"]: row for row in claims.judged(seeds, tables, "garm_claims", True)}
    assert len(rows) == 13 == len(claims.all_claims("garm_claims"))
    assert {row["verdict"] for row in rows.values()} == {"holds"}
    sft = rows["SFT is clicked more than prompting"]
    assert sft["value"] == pytest.approx(0.1, abs=0.01) and sft["same_sign"] == 3
    shift = rows["the reward model is less accurate on suggestions of another policy"]
    assert shift["value"] == pytest.approx(0.1) and shift["sides"] == pytest.approx([0.7, 0.6])
    turned = [s | {"values": s["values"] | {"PE": s["values"]["RL-GaRM"]}} for s in seeds]
    for s in turned:
        s["pairs"] = {name: rows for name, rows in s["pairs"].items() if "RFT" not in name}
    rows = {row["text"]: row for row in claims.judged(turned, tables, "garm_claims", True)}
    assert rows["SFT is clicked more than prompting"]["verdict"] == "does not hold"
    assert shift["text"] not in rows and len(rows) == 12


def test_claims_are_few_distinct_and_name_what_exists():
    texts, every = experiments.read("garm"), claims.all_claims("garm_claims")
    assert len(every) <= 13 and len({(c.metric, c.more, c.less) for c in every}) == len(every)
    rows = {name for table in texts["tables"].values() for name in table["rows"]}
    for claim in every:
        assert claim.table in (*texts["tables"], "figure4")
        assert claim.metric in experiments.read("garm_claims")["units"]
        for side in (claim.more, claim.less):
            name, _, part = side.rpartition(", ")
            assert side in rows or (name in rows and part in texts["sets"]) or "quarter" in side
    assert {name for _, *sides in texts["observations"] for name in sides} <= {
        *texts["phrasings"], "what was shown"}


def test_the_page_and_its_pictures_are_made_again_from_the_values_alone(seeds, tmp_path):
    for number, one in enumerate(seeds):
        path = tmp_path / "values" / f"garm-{number}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"about": ABOUT, **one}))
    paths = [str(tmp_path / "values" / f"garm-{number}.json") for number in range(3)]
    siblings.again(report.PAPER, paths)
    page = (tmp_path / "garm.md").read_text()
    for title in ("Table 1", "Table 2", "Table 3", "Table 4", "Figure 4", "Figure 6", "Appendix I"):
        assert title in page
    assert "{" not in page and "13 claims" not in page.split("## Claims")[0]
    assert page.count("**holds**") >= 13 and "nan" not in page
    assert all((tmp_path / f"garm_{name}.png").stat().st_size > 5000
               for name in ("confidence", "closed_form"))
    ece = next(line for line in page.splitlines() if line.startswith("| GaRM | 0.300"))
    assert "0.0302, 0.0886" in ece
    bytes_of = (tmp_path / "garm.md").read_bytes()
    siblings.again(report.PAPER, paths)
    assert (tmp_path / "garm.md").read_bytes() == bytes_of
    with pytest.raises(UserError, match="no values of --reproduce garm"):
        (tmp_path / "other.json").write_text("{}")
        siblings.again(report.PAPER, [str(tmp_path / "other.json")])


def test_the_closed_form_stands_beside_the_integral_and_draws():
    rows = report.closed_form()
    assert report.integral(0.0, 2.0) == pytest.approx(0.5)
    assert report.integral(1.0, 1e-6) == pytest.approx(1 / (1 + np.exp(-1)))
    for row in rows:
        assert abs(row["closed form"] - row["integral"]) < 0.016
        (few, *_, many) = row["estimates"]
        assert few[2] > many[2] and many[1] == pytest.approx(row["integral"], abs=0.005)


# ----------------------------------------------------------------------------------------- values


def test_what_is_shown_is_read_kindly():
    assert garm_values.shown("1. Bake bread\n2. Brew tea\n3. Hear jazz") == [
        "Bake bread", "Brew tea", "Hear jazz"]
    assert garm_values.shown('1. **Bake bread**\n2. "Brew tea"\n3. `grep -r` in a repo') == [
        "Bake bread", "Brew tea", "grep -r in a repo"]
    # Too many, bullets, a preface: a product would still show three.
    assert garm_values.shown("Sure:\n- Why bake?\n- Why brew?\n- Why hear?\n- Why draw?") == [
        "Why bake?", "Why brew?", "Why hear?"]
    assert garm_values.shown("Unsafe") == garm_values.shown("") == []


def test_pairs_under_policy_shift_are_those_that_clicks_would_give():
    class Truth:
        def click_probabilities(self, name, texts):
            return np.array([0.5, 0.4, 0.2])

    row = Shown(context("Why bake?"), [], {})
    [found] = garm_values.shifted_pairs(Truth(), [row], {"a": ["1. Bake a\n2. Brew b\n3. Hear c"]})
    assert found.texts == ["Bake a", "Brew b", "Hear c"]
    # Of a hundred people: the later one clicked, the earlier one passed over.
    assert found.pairs == pytest.approx({(1, 0): 20, (2, 0): 10, (2, 1): 12})
    assert garm_values.shifted_pairs(Truth(), [row], {}) == []  # RFT was not trained


def test_the_judge_prefers_what_is_fit_and_differs():
    judge = Rules(Words())
    good, short, same = ["Draw bees", "Clay for chess"], ["Draw bees"], ["Draw bees", "draw BEES"]
    queries = ["Tell me about maps"]
    said = judge.prefer([(queries, good, short), (queries, short, good), (queries, short, same),
                         (queries, [], [])])
    assert said == [1.0, 0.0, 0.5, 0.5]


def test_good_same_and_bad_of_a_context_and_a_judge_that_fails():
    class Judge:
        def prefer(self, rows):
            return [None if a == ["x"] else 1.0 if len(a) > len(b) else 0.5 for _, a, b in rows]

    players = type("Players", (), {"judge": lambda self: Judge()})()
    contexts = {name: context("Why?") for name in "ab"}
    lists = {"a": [["p", "q"], ["p"]], "b": [["x"], ["p"]]}
    base = {"a": [["p"], ["p"]], "b": [["p"], ["p"]]}
    found = garm_values.good_same_bad(players, contexts, lists, base)
    assert found == {"good": {"a": 0.5}, "bad": {"a": 0.0}, "net": {"a": 0.5}}  # b is not known


def test_quarters_hold_a_quarter_of_the_pairs_each_and_keep_their_limits_under_shift():
    def of(*bounds):
        values = torch.tensor(bounds)
        return Scores(torch.full_like(values, 0.9), torch.ones(len(bounds)), values, values, 1.0)

    rows = [Shown(replace_id(name), [], {}) for name in "abcd"]
    sets = {"IID": rows[:2], "W4": rows[2:], "W4-RFT": rows[2:]}
    scored = {"IID": [of(0.1, 0.2), of(0.3, 0.4)], "W4": [of(0.5, 0.6), of(0.7, 0.8)],
              "W4-RFT": [of(0.1, 0.15), of(0.1, 0.9)]}
    found = garm_values.by_confidence(sets, scored)
    for quarter in range(1, 5):
        counts = found[f"bound, quarter {quarter}"]
        assert len(counts) == 1 and sum(c["right"] for c in counts.values()) == 2
    shifted = [sum(c["right"] for c in found[f"bound, quarter {q}, W4-RFT"].values())
               for q in range(1, 5)]
    assert shifted == [3, 0, 0, 1]


def replace_id(name):
    row = context("Why?")
    return replace(row, dialogue=row.dialogue.model_copy(update={"dialogue_id": name}))


# --------------------------------------------------------------------------------------- whole run

SIMULATED = [*(word for word in SMALL if not word.startswith(("run.name", "run.seed"))),
             "dialogues.contexts=260", "eval.max_users=12", "eval.lists=1"]


def simulated(root, folder, *words):
    return load_config(None, [*SIMULATED, f"run.root={root}", f"generator.model={folder}", *words])


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory, model_folder):  # noqa: F811
    """A seed with its variants, trained and measured in this process; tests only read it."""
    root = tmp_path_factory.mktemp("tables")
    arms = "rl.arms=[gaussian,bradley_terry,rft,gaussian-log_perplexity]"

    def here(tasks, spent):
        for work, _ in tasks.values():
            work()

    with pytest.MonkeyPatch.context() as patch:
        without_models(patch, scripted)
        patch.setattr("tables.reproduce.in_parallel", here)
        patch.setitem(experiments.read("garm"), "size", [])
        path = root / "config.yaml"
        path.write_text("run: {method: garm}\n")
        words = [word for word in simulated_words(root, model_folder) if "method" not in word]
        siblings.reproduce(report.PAPER, 1, str(path), [*words, arms], quick=False)
    return root


def simulated_words(root, folder):
    return [*SIMULATED, f"run.root={root}", f"generator.model={folder}"]


def test_a_reproduction_measures_every_table(reproduced):
    out = reproduced / "partial" / "report"
    page, values = (out / "garm.md").read_text(), read_json(out / "values" / "garm-0.json")
    assert {"PE", "SFT", "RFT-BTRM", "RL-GaRM", "RL-GaRM w/o log_perplexity",
            "without distillation"} <= values["values"].keys()
    contexts = values["values"]["PE"]["usefulness"].keys()
    for method in ("SFT", "RL-GaRM"):
        metrics = values["values"][method]
        assert metrics["usefulness"].keys() == metrics["log_perplexity"].keys() == contexts
        assert metrics["safety"].keys().isdisjoint(contexts) and len(metrics["safety"]) > 0
        assert all(value < 0 for value in metrics["log_perplexity"].values())
    models = {key.rpartition(", ")[0] for key in values["pairs"] if "quarter" not in key}
    assert models == {"BTRM", "PairedRM", "GaRM", "GaRM, without penalty", "PURM, without penalty"}
    for key, rows in values["pairs"].items():  # whole pairs, but for expected ones
        for row in rows.values():
            assert row["right"] >= 0 and row["wrong"] >= -1e-9, key
    for part in ("W4", "W4-RFT"):
        assert values["values"][f"GaRM, {part}"]["bound"]
    for row in ("| RL-GaRM |", "| without distillation |", "| PURM, without penalty |", "Figure 6"):
        assert row in page


def test_a_second_start_trains_nothing_and_answers_nothing_again(
    reproduced, model_folder, monkeypatch  # noqa: F811
):
    name = next(p.name for p in reproduced.iterdir() if p.name.endswith("seed0"))
    config = load_config(reproduced / name / "config.yaml")
    def refused(*_, **__):
        raise AssertionError("written again")
    monkeypatch.setattr(Suggester, "rollouts", refused)
    garm_values.train_run(config, "")


def test_no_stage_of_the_sibling_paper_reads_the_truth(reproduced, model_folder, tmp_path):  # noqa: F811
    """A run with the hidden state taken away comes to the same weights and answers."""
    name = next(p.name for p in reproduced.iterdir() if p.name.endswith("seed0"))
    config = load_config(reproduced / name / "config.yaml", [f"run.root={tmp_path}"])
    train.run_stages(config, ["world"])
    truth = tmp_path / name / "world" / "truth"
    truth.rename(tmp_path / "aside")
    train.run_stages(config, ["eval"])  # and all before it
    garm_values.write_answers(config, "")
    assert not truth.exists()
    files = [file.relative_to(reproduced / name)
             for file in sorted((reproduced / name).rglob("adapter_model.safetensors"))]
    assert len(files) >= 8
    for file in [*files, "report/answers.json"]:
        assert (tmp_path / name / file).read_bytes() == (reproduced / name / file).read_bytes()


def test_a_log_of_ones_own_has_no_truth_to_measure_against(tmp_path):
    file = tmp_path / "log.jsonl"
    file.touch()
    with pytest.raises(UserError, match="--reproduce garm: needs run.method=garm"):
        siblings.reproduce(report.PAPER, 1, None, [f"data.dialogues={file}"], quick=True)
    with pytest.raises(UserError, match="--reproduce garm: needs run.method=garm"):
        siblings.reproduce(report.PAPER, 1, str(ROOT / "configs" / "tiny.yaml"), [], quick=True)


def test_quick_and_full_settings_load_and_name_arms_that_the_tables_have():
    texts = experiments.read("garm")
    changes = [variant["settings"] for variant in texts["variants"].values()]
    for words in (texts["quick"], texts["size"], *changes):
        config = load_config(ROOT / "configs" / "garm.yaml", words)
        assert config.run.method == "garm"
    config = load_config(ROOT / "configs" / "garm.yaml", texts["size"])
    from stages import garm_eval
    names = garm_eval.policies(Run(config, describe=False))
    rows = {name for n in "134" for name in texts["tables"][n]["rows"]}
    assert rows == {*names, *(v for v, x in garm_values.variants().items() if "adapter" in x)}


# ------------------------------------------------------------------------------------------- panes


def pane(query, options, shares):
    return {"question": "?", "options": options, "option_cctr": shares}


@pytest.fixture
def mimics(tmp_path):
    rows = [{"query": f"{verb} {subject}", "panes": [
        {"options": [f"{subject} old", f"{verb} more", "maps"], "option_cctr": shares}]}
        for i, (verb, subject) in enumerate(zip("bake brew learn hear tie grow".split(),
                                                "bread tea chess jazz knots ferns".split(),
                                                strict=True))
        for shares in ([[0.1, 0.6, 0.3], [0.2, 0.5, 0.3]][i % 2],)]
    path = tmp_path / "panes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_of_panes_by_hand():
    rows = [Shown(context("Tea"), ["aa", "b", "cccc"], {(1, 0): 1.0, (1, 2): 1.0, (2, 0): 1.0})]
    counts = panes.by_value("longer", rows, [[2, 1, 4]])
    # b above aa and above cccc: both wrong; cccc above aa: right.
    assert counts["longer, all pairs"] == {"tea": {"right": 1, "wrong": 2}}
    assert counts["longer, the later one drew more"] == {"tea": {"right": 1, "wrong": 1}}
    assert panes.by_value("x", rows, [[1, 1, 1]])["x, all pairs"]["tea"] == {
        "right": 1.5, "wrong": 1.5}


def test_real_panes_are_split_by_query_and_every_query_is_tested_once(
    mimics, model_folder, tmp_path, monkeypatch, capsys  # noqa: F811
):
    learned, whole_training = [], panes.train_reward
    monkeypatch.setattr(panes, "train_reward", lambda run, suggester, rows, kind: (
        learned.append({c.queries[0] for c, _ in rows})
        or whole_training(run, suggester, rows, kind)))
    config = load_config(None, [*simulated_words(tmp_path, model_folder), "run.name=panes",
                                "reward.kinds=[gaussian,paired]", "rl.arms=[gaussian]"])
    panes.write_panes(mimics, config, tmp_path / "out")
    counts = read_json(tmp_path / "out" / "panes.json")
    assert all(len(rows) == 6 for rows in counts.values())
    first, second = learned[0], learned[2]  # each half has trained both kinds
    assert first.isdisjoint(second) and len(first | second) == 6
    page = (tmp_path / "out" / "panes.md").read_text()
    for name in (*panes.UNTRAINED, "GaRM", "PairedRM"):
        assert f"| {name} |" in page
    # Longer by hand: each pane's options are of known lengths, and each pair is a whole one.
    assert sum(sum(row.values()) for row in counts["GaRM, all pairs"].values()) == 18
    learned.clear()
    panes.write_panes(mimics, config, tmp_path / "out")
    assert not learned  # a second start goes on with what is there


def test_panes_without_different_clicks_are_refused(tmp_path):
    path = tmp_path / "d.jsonl"
    row = {"dialogue_id": "q1-1", "turns": [{"role": "user", "content": "tea"}],
           "suggestions": ["a", "b"], "clicked": [], "click_shares": [0.0, 0.0]}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="no pane with options"):
        panes.panes_of(path)
