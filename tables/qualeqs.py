"""The tables, figures and claims of QualEQS (paper 001), over seeds.

    python eval.py --reproduce qualeqs --seeds 3           # results/qualeqs.md
    python -m tables.qualeqs results/values/qualeqs-*.json # the page again, no run needed

Tables 1 and 2, Figures 3 to 5 in figures. Stage `eval` has judged every answer; here what only the
simulated shop can tell comes beside it. How a reproduction runs: siblings.py.

Departure: the judge that gives the figures is the run's own, which rewards too.

Legend: S seeds, B contexts of one seed.
"""

import sys
from collections import Counter
from functools import partial

import numpy as np

import qualeqs
import train
from config import Config
from files import read_json, read_lines, script
from run import Run
from stages.metrics import markdown_table
from tables import experiments
from tables.claims import Seeds, paired, per_seed
from tables.garm import pooled_cell
from tables.garm_values import shown
from tables.measure import keep_values
from tables.report import in_all
from tables.seeds import cell, summary
from tables.siblings import Paper, again
from world import shop
from world.shop_clicks import Truth

# ------------------------------------------------------------------------------------------- values


def train_run(config: Config, variant: str) -> None:
    """Train a seed's run, its ablations too; its stage `eval` answers and judges."""
    train.run_stages(config, ["eval"])


def measure_seed(config: Config, others: list[Config]) -> None:
    """report/values.json of a seed's run."""
    run = Run(config, describe=False)
    keep_values(config, [{"key": train.stage_key(run, "eval")}], partial(seed_values, run))


def seed_values(run: Run) -> dict:
    """What values.json holds but its key: "values" of policies, "pairs": strict accuracy by intent,
    and the number of rounds."""
    judged_values = read_json(run.folder / "eval" / "values.json")
    values, rounds = judged_values["values"], run.config.quality.rounds
    # The one place where the hidden state meets what was trained.
    truth = shop.load_truth(run.folder / "world")
    rows = read_lines(run.folder / "eval" / "answers.jsonl")
    said = {name: Counter(y for row in rows for answer in row["answers"][name]
                          for y in {*shown(answer)}) for name in values}
    for row in rows:
        for name, answers in row["answers"].items():
            texts = [y for answer in answers for y in shown(answer)]
            # Asked of nobody else: a policy that collapses says the same to everybody.
            figures = hidden(truth, row["dialogue_id"], answers) | {
                "alone": float(np.mean([said[name][y] == 1 for y in texts] or [0]))}
            for metric, value in figures.items():
                values[name].setdefault(metric, {})[row["dialogue_id"]] = value
    series = ["SFT-GRPO", *(f"QualEQS, round {i}" for i in range(1, rounds + 1))]
    values["QualEQS"] = values[series[-1]]
    if rounds > 1:
        for title, more, less in (("first", *series[1::-1]), ("last", *series[:-3:-1])):
            [gaps] = paired([{"values": values}], "strict_accuracy", more, less)
            ours, others = (values[name]["strict_accuracy"] for name in (more, less))
            both = [context for context in ours if context in others]  # that `paired` compares
            values[f"gain of the {title} round"] = {
                "strict_accuracy": dict(zip(both, gaps.tolist(), strict=True))}
    pairs: dict = {}
    for context, value in values["QualEQS"]["strict_accuracy"].items():
        intent = judged_values["intents"][context]
        for group in (intent, "other intents")[: 1 + (intent != "platform QA")]:
            pairs.setdefault(group, {})[context] = {"right": value, "wrong": 1 - value}
    return {"values": values, "pairs": pairs, "rounds": rounds}


def hidden(truth: Truth, context: str, answers: list[str]) -> dict[str, float]:
    """Usefulness, ChatUV and ChatPV of a context's answers, in the mean."""
    lists = [*map(shown, answers)]
    chats = np.mean([truth.chats(context, some) for some in lists], 0)
    # Missing suggestions help nobody: always over three places.
    useful = np.mean([truth.usefulness(context, some).sum() / 3 for some in lists])
    return {"usefulness": float(useful), "chat_uv": float(chats[0]), "chat_pv": float(chats[1])}


# --------------------------------------------------------------------------------------------- page


def policies(seeds: Seeds) -> list[str]:
    """Those that have answered, each once."""
    gains = ("QualEQS", "gain of the first round", "gain of the last round")
    return [name for name in in_all(seeds) if name not in gains]


def online_table(seeds: Seeds) -> str:
    """Figure 3: growth of ChatUV and ChatPV over the control (Eq. 7), beside strict accuracy."""
    texts, rows = experiments.read("qualeqs"), []
    control = texts["control"]
    for name in policies(seeds):
        growth = []
        for metric in texts["online"]:
            ours, base = (np.mean([x.mean() for x in per_seed(seeds, m, metric)])
                          for m in (name, control))
            growth.append(f"{100 * qualeqs.growth_gap(ours, base):+.1f} %")  # Eq. (7)
        rows.append([name, cell(seeds, name, "strict_accuracy", ".3f"), *growth])
    return markdown_table(["", "strict", *texts["online"].values()], rows)


def correlation(seeds: Seeds, metric: str) -> str:
    """Pearson's r over policies of strict accuracy and a metric, each the mean over seeds."""
    rows = [[np.mean([x.mean() for x in per_seed(seeds, name, one)]) for name in policies(seeds)]
            for one in ("strict_accuracy", metric)]
    if len(rows[0]) < 3 or min(map(np.std, rows)) == 0:
        return "–"
    return f"{np.corrcoef(rows)[0, 1]:+.2f}"


def round_table(seeds: Seeds) -> str:
    """Figure 4: strict accuracy and valid rate after each round, and what it has gained."""
    names, rows = [f"QualEQS, round {i + 1}" for i in range(seeds[0]["rounds"])], []
    for name, before in zip(["SFT-GRPO", *names], ["", "SFT-GRPO", *names], strict=False):
        gap = before and paired(seeds, "strict_accuracy", name, before)
        rows.append([name, cell(seeds, name, "strict_accuracy", ".3f"),
                     cell(seeds, name, "valid_rate", ".3f"),
                     summary(gap, "+.3f") if before else "–"])
    return markdown_table(["", "strict", "valid", "strict, gained"], rows)


def page_parts(seeds: Seeds) -> dict:
    """What qualeqs.md says beside claims and origin."""
    texts, tables, have = experiments.read("qualeqs"), [], in_all(seeds)
    columns = texts["columns"].items()
    for table in texts["tables"].values():
        head = ["", *(title for _, (title, _) in columns), table["paper"]]
        rows = [[name, *(cell(seeds, name, metric, form) for metric, (_, form) in columns), figures]
                for name, figures in table["rows"].items() if name in have]
        tables += [f"## {table['title']}\n", markdown_table(head, rows)]
    intents = [[name, pooled_cell(seeds, name, "accuracy", "pairs")]
               for name in sorted(seeds[0]["pairs"])]
    return {"tables": "\n".join(tables), "control": texts["control"],
            "online": online_table(seeds), "policies": len(policies(seeds)),
            **{metric: correlation(seeds, metric) for metric in texts["online"]},
            "rounds": round_table(seeds), "intents": markdown_table(["intent", "strict"], intents)}


PAPER = Paper("qualeqs", "shop", train_run, measure_seed, page_parts,
              ("values", "pairs", "rounds"))


if __name__ == "__main__":
    script(lambda: again(PAPER, sys.argv[1:]))
