"""Stage `eval`: every method writes for the test users; the lists are judged; one table.

    python train.py --stage eval            # or python eval.py; the paper's Table 1

The metrics are those of metrics.py. Only here and in tables/, after training, is the simulated
world's hidden state opened; before, the platform itself asks it who taps what in the pilot.
"""

import random
from pathlib import Path

import numpy as np

from files import UserError, progress, read_json, read_yaml, write_json, write_lines, write_text
from roles.players import Players
from roles.writer import Writer
from run import Run, UserState
from stages import metrics
from stages.cold_start import PopularStarters
from stages.metrics import Lists, PerUser, escape, markdown_table
from stages.ranker import judge_of
from stages.sit import taught_lists
from world import people

LATEST = 8  # summaries of a user that a page shows


def compared_methods(run: Run) -> dict[str, tuple[Path | None, bool]]:
    """Method -> (adapter, whether it is given the distilled interests)."""
    # None is the base without an adapter.
    table = {"PE": (None, False), "PE+RID": (None, True), "SFT": (run.adapter("sit"), True)}
    if run.impressions:
        if run.config.dpo.vanilla and "skipped" not in run.folder.figures("dpo/vanilla"):
            table["SFT+DPO"] = (run.adapter("vanilla"), True)  # logs of taps alone have no pairs
        table["IceBreaker"] = (run.adapter("last"), True)
    return table


def write_lists(run: Run, writer: Writer, whole: dict[str, list[str]],
                interests: dict[str, list[str]], n: int) -> Lists:
    """n lists by every compared method for each user.

    whole: user -> all summaries, latest first; interests: user -> trigger interests, best first.
    """
    lists: Lists = {}  # by the same seed for every method: equal policies write equal lists
    for method, (adapter, distilled) in progress(compared_methods(run).items(), "write starters"):
        # PE has no RID: the whole history goes into its prompt, as far as it fits.
        told = interests if distilled else whole
        sampled = writer.write(adapter, [told[u] for u in whole], n, run.seed("eval"))
        lists[method] = dict(zip(whole, sampled, strict=True))
    return lists


def controls(run: Run, players: Players, states: dict[str, UserState], truth) -> Lists:
    """What needs no generator. A method that is not above these has learned nothing.

    teacher: whom SIT imitates; interests: the trigger interests themselves; the simulated
    platform's retrieval, as it shows starters; what others tapped; starters at random.
    """
    n, k, users = run.config.eval.lists, run.config.generator.list_size, [*states]
    # Of an LLM as teacher a list may be missing: an empty one counts 0, as any method's does.
    taught = taught_lists(run, players, [*states.values()], n, "eval")
    lists = {"teacher": {u: rows or [[]] for u, rows in zip(users, taught, strict=True)},
             "interests": {u: [s.interests[:k]] for u, s in states.items()}}
    if truth:
        lists["deployed retrieval"] = people.retrieved_lists(
            run.config.world, [run.users[u] for u in users], n, run.seed("eval"))
    if run.impressions:
        popular, rng = PopularStarters(run), random.Random(run.seed("eval random"))
        shown = run.shown_starters
        lists["popular starters"] = {u: [popular(run.users[u].profile)] for u in users}
        lists["random starters"] = {u: [rng.sample(shown, min(k, len(shown)))] for u in users}
    return lists


def stage_eval(run: Run, players: Players, key: str) -> dict:
    """Let every method write for the test users; judge the lists; write the report."""
    settings, folder = run.config.eval, run.folder / "eval"
    # As of now, after the last session; nobody here was trained on.
    users = [u for u in run.ids("test") if run.states[u][-1].interests]
    if 0 < settings.max_users < len(users):
        users = random.Random(run.seed("eval users")).sample(users, settings.max_users)
    states = {u: run.states[u][-1] for u in users}
    if not states:
        raise UserError("eval: no test user has a history; more users are needed")
    whole = {u: run.histories[u][-1].texts[::-1] for u in states}  # latest first, as room may end
    told = {u: s.interests for u, s in states.items()}
    lists = write_lists(run, players.writer, whole, told, settings.lists)
    rows = [  # of starters.jsonl, a user a line
        {"user_id": u, "interests": s.interests, "starters": {m: lists[m][u] for m in lists}}
        for u, s in states.items()]
    write_lines(folder / "starters.jsonl", rows)
    # Hidden state is opened for the evaluation: every method has written by now.
    truth = None if run.config.data.users else people.load_truth(run.folder / "world")
    lists |= controls(run, players, states, truth)  # in no file of starters, but in the table
    classifier = metrics.TopicClassifier(run.encoder)
    values = measure(run, lists, classifier, whole, truth)
    write_values(values, run, folder)
    result = evaluate(values, settings.bootstrap, run.config.run.seed) | {
        "lists_per_user": settings.lists, "classifier_accuracy": classifier.accuracy}
    # By chance, never the best ones.
    shown = random.Random(run.seed("examples")).sample(rows, min(len(rows), settings.examples))
    triggers = read_json(run.folder / "rid" / "triggers.json")  # has s(u, h) of each interest
    scores = {u: triggers[u][-1]["scores"] for u in states}
    write_report(result, shown, whole, scores, folder)
    return {"test_users": len(states), "starters": str(folder / "starters.jsonl")}


def measure(run: Run, lists: Lists, classifier: metrics.TopicClassifier,
            histories: dict[str, list[str]], truth) -> PerUser:
    """Every metric of every method and user; histories: user -> all summaries."""
    # All at once: what is measured one list at a time is only looked up, and like lengths share a
    # batch.
    run.encoder(sorted({y for m in lists.values() for u in m.values() for x in u for y in x}))
    # Without logs of taps there is no ranker; "train" shows reward hacking beside "judge".
    rankers = {m: judge_of(run, name) for m, name in metrics.RANKERS.items() if run.impressions}
    return metrics.measure(lists, rankers, run.encoder, classifier, run.corpus, histories,
                           run.config.generator.list_size, truth)


def write_values(values: PerUser, run: Run, folder: Path) -> None:
    """values.json, metric -> method -> user -> value, and the settings that it was measured with.

    Those of the run's config.yaml may change before the stage runs again.
    """
    rows = {metric: {method: {user: round(value, 6) for user, value in by_user[metric].items()}
                     for method, by_user in values.items()} for metric in values["PE"]}
    write_json(folder / "values.json", rows)
    write_json(folder / "settings.json", run.config.model_dump())


def evaluate(values: PerUser, draws: int = 1000, seed: int = 0) -> dict:
    """What `measure` gives as means over users, with the lifts over PE and 95 % intervals.

    Raises ValueError if the methods do not cover the same users.
    """
    users, methods = values["PE"]["starters"].keys(), {}
    # The same for all, or a lift would compare people.
    if any(by_user["starters"].keys() != users for by_user in values.values()) or not users:
        raise ValueError("evaluate: every method needs lists for the same users, at least one")
    for method, by_user in values.items():  # metric -> user -> value
        # Lifts over itself say nothing.
        lifts = [m for m, score in metrics.LIFTS.items() if score in by_user and method != "PE"]
        by_user = by_user | {m: metrics.user_values(values, method, m) for m in lifts}
        methods[method] = figures = {m: float(np.mean([*v.values()])) for m, v in by_user.items()}
        # Users are the unit of every interval: lists of one user are no independent evidence.
        for name in ("lexical", "true_clicks", "personal_true_clicks", "cascade_clicks",
                     "personal_cascade_clicks", "r_score"):
            if name in by_user:
                _, *interval = metrics.bootstrap([[*by_user[name].values()]], draws, seed)
                figures[f"{name}_interval"] = interval
    return {"methods": methods, "users": len(users), "baseline": "PE"}


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
    rows, texts = result["methods"], read_yaml("stages/metrics.yaml")
    paper = read_yaml("configs/paper.yaml")["table1"]
    columns = {title: (metric, form) for title, (metric, form) in texts["columns"].items()
               if any(metric in figures for figures in rows.values())}
    ours = [[method, *(_cell(rows[method], *column) for column in columns.values())]
            for method in sorted(rows, key=[*paper, *rows].index)]  # in the paper's order
    return "\n".join([
        f"{result['users']} test users, {result['lists_per_user']} lists each, topic classifier "
        f"accuracy {result['classifier_accuracy']:.2f}",
        "", markdown_table(["Method", *columns], ours),
        texts["legend"], "", "Brackets: 95 % bootstrap over users.", "",
        "The paper's Table 1 (Qwen2.5-7B, its own platform and ranker):", "",
        markdown_table(["Method", "R-User", "R-Score", "Lexical", "Semantic"],
                       [[method, *figures] for method, figures in paper.items()])])


def examples_page(head: str, rows: list[dict]) -> str:
    """Summaries, trigger interests and each method's first list of some users, as markdown.

    rows: of starters.jsonl, with "summaries", latest first, and "scores" of the interests.
    """
    lines = [head]
    for row in rows:
        lines += ["", f"## {escape(row['user_id'])}", "", "Summaries, the latest first:", ""]
        lines += [f"- {escape(text)}" for text in row["summaries"]]  # people's texts: escaped
        lines += ["", "Trigger interests:", ""] * bool(row["interests"])
        for text, score in zip(row["interests"], row["scores"], strict=True):
            lines.append(f"- {escape(text)} ({score:.2f})")
        for method, lists in row["starters"].items():
            lines += ["", f"**{escape(method)}**", ""]
            starters = [f"{i}. {escape(starter)}" for i, starter in enumerate(lists[0], 1)]
            lines += starters or ["(none left)"]
    return "\n".join(lines) + "\n"


def write_report(result: dict, rows: list, summaries: dict, scores: dict, folder: Path) -> None:
    """table.md, table.json and examples.md. summaries, scores: by user, as in examples_page."""
    write_json(folder / "table.json", result)
    head = "# Examples\n\nUsers drawn at random; the first list of each method."
    rows = [row | {"summaries": summaries[user][:LATEST], "scores": scores[user]}
            for row, user in ((row, row["user_id"]) for row in rows)]
    write_text(folder / "table.md", table_markdown(result))
    write_text(folder / "examples.md", examples_page(head, rows))
