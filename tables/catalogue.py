"""Suggestions about a shop's catalogue, checked against its rows: the share of false facts.

    python -m tables.catalogue runs/NAME --n 100                   # results/catalogue.md
    python -m tables.catalogue runs/NAME --marks marks.jsonl       # and how far a reader agrees

The run is one of configs/qualeqs.yaml, best with one's own data.catalogue. Its last policy answers
held-out contexts that name goods, one answer each, until there are n suggestions; facts.py says
what each of them claims and whether a row has it. Beside all of them stand those that the server
would show, which the judge of roles/quality.py lets through: the policy was rewarded by that judge,
the check knows nothing of it.

RUN/catalogue.jsonl has every suggestion with its number, to be read and marked, a line each:
{"number": 1, "text": as it stands there, "mark": "true", "false", "open" or "none"}.
"""

import argparse
import hashlib
from collections import Counter
from pathlib import Path
from typing import Literal

from scipy import stats
from sklearn.metrics import cohen_kappa_score

import data
import garm
from config import load_config
from files import ROOT, UserError, file_digest, script, write_json, write_lines, write_text
from roles.players import players_of
from roles.quality import Rules
from roles.suggester import Suggester
from run import Run, environment
from serving.engine import Ask
from serving.suggest import by_shop, fit_suggestions, policies
from stages.garm_eval import held_out
from stages.metrics import escape, markdown_table
from tables.facts import KINDS, Checked, Facts

VERDICTS = ("true", "false", "open", "none")
CHUNK = 16  # contexts that are answered together
EXAMPLES = 5  # on the page: nobody's catalogue is printed at length


class Mark(data.Record):
    number: int
    text: str  # digest, so that no mark outlives its suggestion
    mark: Literal[VERDICTS]


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def answers_of(run: Run, facts: Facts, policy: str, n: int) -> list[dict]:
    """Answers of a policy to held-out contexts about goods, with n suggestions at least."""
    # Of the last exchange: the goods of an earlier one are not what is talked about.
    suggester, rows, count = Suggester(players_of(run).writer), [], 0
    contexts = [c for c in held_out(run) if not c.unsafe and facts.about(c.turns[-2:])]
    for start in range(0, len(contexts), CHUNK):
        if count >= n:
            break
        part = contexts[start : start + CHUNK]
        # A seed of its own for each part, or equal contexts of two parts had equal answers.
        answers = suggester.write(run.adapter(policy), [c.turns for c in part], 1,
                                  run.seed("catalogue", start))
        count += sum(len(garm.answer_suggestions(answer)) for [answer] in answers)
        rows += [{"dialogue_id": c.dialogue.dialogue_id, "answer": answer,
                  "turns": [turn.model_dump() for turn in c.turns]}
                 for c, [answer] in zip(part, answers, strict=True)]
    if count < n:
        raise UserError(f"{count} suggestions for {len(contexts)} contexts that name goods: raise "
                        "shop.contexts or data.test, or lower --n")
    return rows


def suggestions_of(answers: list[dict], judge: Rules, n: int) -> list[dict]:
    """The first n suggestions with their numbers, and whether the server would show them."""
    rows = []
    for answer in answers:
        turns = [data.Turn(**turn) for turn in answer["turns"]]
        # What the server leaves out beside the judge: other languages, repeats, what was asked.
        ask = Ask(data.User(user_id="reader", sessions=[]), garm.NUM_SUGGESTIONS, turns=turns)
        [shown] = by_shop(judge, [ask], [fit_suggestions(ask, [answer["answer"]])])
        shown = {suggestion.text for suggestion in shown}
        rows += [{"dialogue_id": answer["dialogue_id"], "turns": turns, "text": text,
                  "shown": text in shown} for text in garm.answer_suggestions(answer["answer"])]
    return [{"number": i, **row} for i, row in enumerate(rows[:n], 1)]


# ---------------------------------------------------------------------------------------- figures


def share(count: int, of: int) -> str:
    """count / of with Wilson's 95 % interval."""
    if not of:
        return "–"
    # Suggestions of one answer are taken for independent: there are three at most.
    test = stats.binomtest(count, of).proportion_ci(method="wilson")
    return f"{count / of:.2f} [{test.low:.2f}, {test.high:.2f}]"


def counts_row(name: str, verdicts: list[str]) -> list[str]:
    """Of some suggestions the verdicts, and the share of false ones of those that can be told."""
    count = Counter(verdicts)
    told = count["true"] + count["false"]  # an open one is neither
    return [name, str(len(verdicts)), str(told + count["open"]), str(count["false"]),
            str(count["open"]), share(count["false"], told)]


def by_kind(checked: list[Checked]) -> list[list[str]]:
    """Of each kind of claim: suggestions with one, with one that no row has, with an open one."""
    table = []
    for kind in KINDS:
        rows = [[c.rows for c in one.claims if c.kind == kind] for one in checked]
        table.append([kind, str(sum(map(bool, rows))),
                      str(sum(any(r is not None and not r for r in some) for some in rows)),
                      str(sum(None in some for some in rows))])
    together = sum(one.reason == "no row has all" for one in checked)
    return [*table, ["all of them together", str(sum(len(c.claims) > 1 for c in checked)),
                     str(together), "–"]]


def agreement(verdicts: list[str], marks: list[str]) -> list[list[str]]:
    """How often check and reader say the same, and both of what is false; Cohen's kappa."""
    rows = []
    for name, values in (("the same of four", [*VERDICTS]), ("false or not", ["false"])):
        a, b = ([x if x in values else "" for x in some] for some in (verdicts, marks))
        same = sum(x == y for x, y in zip(a, b, strict=True))
        kappa = cohen_kappa_score(a, b) if len({*a, *b}) > 1 else float("nan")
        rows.append([name, share(same, len(a)), f"{kappa:.2f}"])
    return rows


def read_marks(file: Path, rows: list[dict]) -> list[str]:
    """A reader's mark of each row; raises DataError with all that is wrong."""
    faults, marks, texts = data.Faults(), {}, {r["number"]: digest_of(r["text"]) for r in rows}
    for place, value in data.json_objects(file, faults):
        try:
            mark = Mark.model_validate(value)
            if mark.number in marks or texts.get(mark.number) != mark.text:
                raise ValueError("number: marked above, or another suggestion has it")
            marks[mark.number] = mark.mark
        except ValueError as error:  # a ValidationError is one too
            faults.add(place, error)
    if not faults and marks.keys() != texts.keys():
        faults.add(str(file), ValueError("number: all suggestions are to be marked"))
    faults.refuse()
    return [marks[row["number"]] for row in rows]


# ------------------------------------------------------------------------------------------- page


def page(head: str, rows: list[dict], checked: list[Checked], marks: list[str]) -> str:
    verdicts, shown = [c.verdict for c in checked], [row["shown"] for row in rows]

    def both(name: str, some: list[str]) -> list[list[str]]:
        return [counts_row(f"{name}, as the policy writes", some),
                counts_row(f"{name}, what the server would show",
                           [v for v, one in zip(some, shown, strict=True) if one])]

    table = both("the check", verdicts) + (both("a reader", marks) if marks else [])
    text = head + markdown_table(["", "suggestions", "with a fact", "false", "open",
                                  "false of true and false"], table)
    text += ("\nThe check, by what is claimed (a suggestion may claim several things):\n\n"
             + markdown_table(["claim", "suggestions", "no row has it", "open"], by_kind(checked)))
    if marks:
        text += ("\nThe check against the reader's marks of the same suggestions:\n\n"
                 + markdown_table(["", "agree", "Cohen's kappa"], agreement(verdicts, marks)))
    # No more than a handful: the texts name another's products.
    some = [(row, one) for row, one in zip(rows, checked, strict=True) if one.verdict == "false"]
    examples = "".join(f"- {row['number']}: {escape(row['text'])} ({one.reason})\n"
                       for row, one in some[:EXAMPLES])
    return text + (f"\nSome of the false ones:\n\n{examples}" if examples else "")


def write_catalogue(folder: Path, n: int, marks: Path | None, out: Path) -> None:
    """catalogue.md; writes the suggestions first where they are not there."""
    config = load_config(folder / "config.yaml", ["eval.max_users=0"])  # all held-out contexts
    if config.run.method != "qualeqs":
        raise UserError(f"{folder}: run.method={config.run.method}; a run of qualeqs is wanted")
    run = Run(config, describe=False)
    # As the server chooses: the policy of the last round that is there.
    trained = [name for name in policies(config) if run.folder.has_run(name)]
    run.folder.require(*trained[:1] or ["sft"])
    products = data.read_catalogue(run.catalogue_file)
    shop = products, data.read_policies(run.policies_file)
    facts, policy = Facts(*shop), trained[0]
    # Other weights, or another number, are other suggestions; another check reads the same ones.
    key = file_digest(run.adapter(policy) / "adapter_model.safetensors") + str(n)
    path = run.folder / "catalogue" / "answers.jsonl"
    if run.folder.begin("catalogue", key):
        write_lines(path, answers_of(run, facts, policy, n))
        run.folder.mark_done("catalogue", key)
    answers = [row for _, row in data.json_objects(path, data.Faults())]
    rows = suggestions_of(answers, Rules(*shop), n)
    checked = [facts.check(row["text"], row["turns"]) for row in rows]
    # To be marked by hand: nothing of what the check says, or it would be believed.
    write_lines(run.folder / "catalogue.jsonl", (
        {"number": row["number"], "text": digest_of(row["text"]), "suggestion": row["text"],
         "after": [turn.content for turn in row["turns"]]} for row in rows))
    marked = read_marks(marks, rows) if marks else []
    about = environment(config)
    head = (f"# Suggestions on a catalogue\n\n`python -m tables.catalogue`: {len(rows)} suggestions"
            f" for {len({row['dialogue_id'] for row in rows})} held-out contexts about goods of "
            f"{escape(Path(run.catalogue_file).name)}, {len(products)} products; policy {policy}, "
            f"seed {config.run.seed}, commit {(about['commit'] or 'unknown')[:7]}. What a claim "
            "is, and what true, false and open mean, tables/facts.py says; brackets are Wilson's "
            "95 % intervals.\n\n")
    text = page(head, rows, checked, marked)
    values = [{"number": row["number"], "text": digest_of(row["text"]), "shown": row["shown"],
               "check": one.verdict, "reader": mark or None}
              for row, one, mark in zip(rows, checked, marked or [""] * n, strict=True)]
    write_json(out.parent / "values" / f"{out.stem}.json", values)
    write_text(out, text)
    print(f"{text}\n{out}; to be marked: {run.folder.path / 'catalogue.jsonl'}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tables.catalogue",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="a run folder of configs/qualeqs.yaml")
    parser.add_argument("--n", type=int, default=100, help="suggestions")
    parser.add_argument("--marks", type=Path, help="a reader's, JSON lines")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "catalogue.md")
    given = parser.parse_args()
    write_catalogue(given.run, given.n, given.marks, given.out)


if __name__ == "__main__":
    script(main)
