"""Stage `eval`: every method writes for the test users; the lists are judged; one table.

    python train.py --stage eval            # or python eval.py; the paper's Table 1

The metrics are those of metrics.py. Only here and in tables/, after training, is the simulated
world's hidden state opened.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np

from files import UserError, atomic_path, progress, read_json, write_json
from roles.players import Players
from run import Run
from stages.metrics import (
    COLUMNS,
    LEGEND,
    Lists,
    TopicClassifier,
    bootstrap,
    escape,
    measure,
    paper_figures,
    user_lifts,
)
from stages.ranker import judge_of
from world import people


def methods(run: Run) -> dict[str, tuple[Path | None, bool]]:
    """Method -> (adapter, whether it is given the distilled interests)."""
    # The order is the table's; None is the base without an adapter.
    table = {"PE": (None, False), "PE+RID": (None, True), "SFT": (run.adapter("sit"), True)}
    if run.impressions:
        if run.config.dpo.vanilla and "skipped" not in run.folder.figures("dpo/vanilla"):
            table["SFT+DPO"] = (run.adapter("vanilla"), True)  # logs of taps alone have no pairs
        table["IceBreaker"] = (run.adapter("last"), True)
    return table


def stage_eval(run: Run, players: Players, key: str) -> dict:
    """Let every method write for the test users; judge the lists; write the report."""
    settings = run.config.eval
    # As of now, after the last session; nobody here was trained on.
    states = {u: run.states[u][-1] for u in run.ids("test") if run.states[u][-1].interests}
    if not states:
        raise UserError("eval: no test user has a history; more users are needed")
    whole = {u: run.histories[u][-1].texts[::-1] for u in states}  # latest first, as room may end
    lists: Lists = {}
    # The same seed for every method: equal policies write equal lists.
    for method, (adapter, distilled) in progress(methods(run).items(), "write starters"):
        # PE has no RID: the whole history goes into its prompt, as far as it fits.
        inputs = [s.interests if distilled else whole[u] for u, s in states.items()]
        sampled = players.writer.write(adapter, inputs, settings.lists, run.seed("eval"))
        lists[method] = dict(zip(states, sampled, strict=True))
    rows = [  # of starters.jsonl, a user a line
        {"user_id": u, "interests": s.interests, "starters": {m: lists[m][u] for m in lists}}
        for u, s in states.items()
    ]
    with atomic_path(run.folder / "eval" / "starters.jsonl") as temporary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
    # All at once: what is measured one list at a time below is only looked up.
    run.encoder(sorted({y for m in lists.values() for u in m.values() for x in u for y in x}))

    # Without logs of taps there is no ranker; "train" shows reward hacking beside "judge".
    judge, train_judge = (judge_of(run, n) if run.impressions else None for n in ("judge", "train"))
    # Hidden state is opened here for the first time: everything has been written by now.
    truth = None if run.config.data.users else people.load_truth(run.folder / "world")
    result = evaluate(
        lists, judge, run.encoder, run.corpus, truth=truth, train_score=train_judge,
        draws=settings.bootstrap, seed=run.config.run.seed,
    )
    # By chance, never the best ones.
    shown = random.Random(run.seed("examples")).sample(rows, min(len(rows), settings.examples))
    triggers = read_json(run.folder / "rid" / "triggers.json")  # has s(u, h) of each interest
    scores = {u: triggers[u][-1]["scores"] for u in states}
    write_report(result, shown, whole, scores, run.folder / "eval")
    return {"test_users": len(states), "starters": str(run.folder / "eval" / "starters.jsonl")}


def evaluate(
    lists: Lists, score: Callable | None, encode: Callable, corpus: list[str], *, truth=None,
    train_score: Callable | None = None, draws: int = 1000, seed: int = 0, baseline: str = "PE",
    classifier: TopicClassifier | None = None,
) -> dict:
    """What `measure` gives as means over users, with the lifts over the baseline.

    Raises ValueError if the methods do not cover the same users.
    """
    users = list(lists[baseline])  # the same for all, or a lift would compare people
    if any(set(rows) != set(users) for rows in lists.values()) or not users:
        raise ValueError("evaluate: every method needs lists for the same users, at least one")
    classifier = classifier or TopicClassifier(encode)  # some seconds: tests bring their own
    per_user = measure(lists, score, encode, classifier, corpus, truth, train_score)
    result = {}
    # Users are the unit of every interval: lists of one user are no independent evidence.
    for method, values in per_user.items():
        figures = {name: float(np.mean(list(v.values()))) for name, v in values.items()}  # (U,)
        for name in ("lexical", "true_clicks"):  # absolute figures; the others are lifts
            if name in values:
                _, *interval = bootstrap([[*values[name].values()]], draws, seed)
                figures[f"{name}_interval"] = interval
        if score and method != baseline:  # lifts over itself say nothing
            lifts = user_lifts(values["utility"], per_user[baseline]["utility"])
            figures |= {name: float(np.mean([*gaps.values()])) for name, gaps in lifts.items()}
            _, *interval = bootstrap([[lifts["r_score"][u] for u in users]], draws, seed)
            figures["r_score_interval"] = interval
            if train_score:
                trained = user_lifts(values["train_utility"], per_user[baseline]["train_utility"])
                figures["train_r_score"] = float(np.mean([*trained["r_score"].values()]))
        result[method] = figures
    return {
        "methods": result,
        "users": len(users),
        "lists_per_user": len(lists[baseline][users[0]]),
        "classifier_accuracy": classifier.accuracy,
        "baseline": baseline,
    }


# ----------------------------------------------------------------------------------------- report


def _cell(figures: dict, name: str, form: str) -> str:
    if name not in figures:
        return "–"
    text = format(figures[name], form)
    if f"{name}_interval" in figures:  # [low, high] of 95 %
        low, high = figures[f"{name}_interval"]
        text += f" [{low:{form}}, {high:{form}}]"
    return text


def table_markdown(result: dict) -> str:
    """Table 1 as measured, what its columns mean, and the paper's figures."""
    rows, paper = result["methods"], paper_figures()["table1"]  # in the paper's order
    columns = [c for c in COLUMNS if any(c[1] in figures for figures in rows.values())]
    titles = " | ".join(title for title, _, _ in columns)
    lines = [
        f"{result['users']} test users, {result['lists_per_user']} lists each, topic classifier "
        f"accuracy {result['classifier_accuracy']:.2f}",
        "",
        f"| Method | {titles} |\n" + "|---" * (len(columns) + 1) + "|",
    ]
    for method in [m for m in paper if m in rows] + [m for m in rows if m not in paper]:
        cells = [_cell(rows[method], name, form) for _, name, form in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += [
        "", LEGEND, "", "Brackets: 95 % bootstrap over users.", "",
        "The paper's Table 1 (Qwen2.5-7B, its own platform and ranker):", "",
        "| Method | R-User | R-Score | Lexical | Semantic |", "|---|---|---|---|---|",
    ]
    cells = [f"| {method} | " + " | ".join(row) + " |" for method, row in paper.items()]
    return "\n".join(lines + cells) + "\n"


def examples_page(rows: list[dict], summaries: dict[str, list[str]], scores: dict) -> str:
    """Summaries, trigger interests and each method's starters of some users, as markdown.

    rows: of starters.jsonl; summaries: user -> texts, latest first; scores: user -> of interests.
    """
    lines = ["# Examples", "", "Users drawn at random; the first list of each method."]
    for row in rows:
        user = row["user_id"]
        latest = "; ".join(escape(text) for text in summaries[user][:12])  # people's texts: escaped
        lines += ["", f"## {escape(user)}", "", f"Latest summaries: {latest}", ""]
        lines += ["Trigger interests:", ""]
        lines += [
            f"- {escape(text)} ({score:.2f})"
            for text, score in zip(row["interests"], scores[user], strict=True)
        ]
        for method, lists in row["starters"].items():
            lines += ["", f"**{escape(method)}**", ""]
            # Markdown counts by itself.
            lines += [f"1. {escape(starter)}" for starter in lists[0]] or ["(none left)"]
    return "\n".join(lines) + "\n"


def write_report(
    result: dict, rows: list[dict], summaries: dict, scores: dict, folder: Path
) -> None:
    """table.md, table.json and examples.md."""
    write_json(folder / "table.json", result)
    examples = examples_page(rows, summaries, scores)
    for name, text in (("table.md", table_markdown(result)), ("examples.md", examples)):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
