"""Stage `eval` of paper 003: every policy answers the held-out contexts; one small table.

    python train.py --config configs/garm.yaml --stage eval

The paper's tables stand on the same answers: tables/.

Legend: B contexts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import data
import garm
from files import progress, write_lines, write_text
from roles.players import Players
from roles.suggester import Suggester
from run import Run
from stages.dialogues import Context, chosen, read_contexts
from stages.metrics import markdown_table
from stages.reward import load_reward

# In the order of the paper's table.
NAMES = {"rft": "RFT-BTRM", "bradley_terry": "RL-BTRM", "gaussian": "RL-GaRM", "dpo": "DPO-GaRM"}


def policies(run: Run) -> dict[str, Path | None]:
    """Name as in Tables 1 and 4 -> adapter, of what this run has trained; PE is the bare base."""
    trained = {}  # an arm lacks the components that its name says (config.ARMS)
    for arm in sorted(run.config.rl.arms, key=lambda arm: [*NAMES].index(arm.split("-")[0])):
        kind, *without = arm.split("-")
        trained[" w/o ".join([NAMES[kind], *without])] = run.adapter(arm)
    return {"PE": None, "SFT": run.adapter("sft"), **trained}


def held_out(run: Run) -> list[Context]:
    """Contexts on which nothing was trained, at most eval.max_users; half of them unsafe if the
    log is simulated."""
    path = run.folder / "world" / "evaluation.jsonl"
    if run.config.data.dialogues:
        contexts = read_contexts(run)
        contexts = chosen(contexts, "test") + chosen(contexts, "test", unsafe=True)
    else:
        # Of topics and forms that the log does not have.
        contexts = [Context(row, "test", 0) for row in data.read_dialogues(path)]
    # Drawn from both kinds together.
    most = run.config.eval.max_users or len(contexts)
    return random.Random(run.seed("eval users")).sample(contexts, min(most, len(contexts)))


def write_answers(run: Run, suggester: Suggester, contexts: Sequence[Context], n: int,
                  adapters: dict[str, Path | None]) -> dict[str, list[list[str]]]:
    """n answers of each policy to each context; equal policies give equal answers."""
    turns = [context.turns for context in contexts]  # all that a policy is told
    # The same draws for every policy: what differs is the policy.
    return {name: suggester.write(adapter, turns, n, run.seed("eval"))
            for name, adapter in progress(adapters.items(), "write suggestions")}


def stage_eval(run: Run, players: Players, key: str) -> dict:
    """Answers of every policy to held-out contexts; form, what is declined, mean reward."""
    suggester, contexts = Suggester(players.writer), held_out(run)
    answers = write_answers(run, suggester, contexts, 1, policies(run))
    # One judge for all: the first reward model that scores a suggestion alone.
    kinds = [k for k in run.config.reward.kinds if k in ("gaussian", "bradley_terry")]
    reward = load_reward(run, suggester, kinds[0]) if kinds else None
    turns, table = [c.turns for c in contexts], {}  # name -> figures
    for name, written in answers.items():
        # One answer of each, as a user would be shown.
        first = [some[0] for some in written]
        # What is malformed has no suggestions, and no reward; the format column counts it.
        lists = [[] if c.unsafe else garm.answer_suggestions(answer)
                 for c, answer in zip(contexts, first, strict=True)]
        table[name] = figures_of(contexts, first)
        if reward:
            scores = [mu.mean().item() for mu in reward.score(turns, lists)[0] if len(mu)]
            table[name]["reward"] = float(np.mean(scores)) if scores else None
    # The reward last: some of the policies were trained on this very model.
    columns = ["Method", "Format", "Safety", "Declined though safe", "Reward (trained on)"]
    write_answers_and_table(run, contexts, answers, markdown_table(
        columns, [[name, *map(shown, row.values())] for name, row in table.items()]))
    return {"contexts": len(contexts), "unsafe": sum(c.unsafe for c in contexts)}


def write_answers_and_table(run: Run, contexts: Sequence[Context],
                            answers: dict[str, list[list[str]]], page: str) -> None:
    """eval/answers.jsonl, for readers and whoever judges the same answers otherwise; eval/table.md,
    printed at the end of a run (train.run_stages)."""
    rows = [{"dialogue_id": c.dialogue.dialogue_id,
             "answers": {name: answers[name][i] for name in answers}}
            for i, c in enumerate(contexts)]
    # One line a context: whoever compares policies reads them side by side.
    write_lines(run.folder / "eval" / "answers.jsonl", rows)
    write_text(run.folder / "eval" / "table.md", page)


def figures_of(contexts: Sequence[Context], answers: list[str]) -> dict[str, float | None]:
    """Shares of safe contexts answered in the form asked for, of unsafe ones declined, and of safe
    ones declined; None where there is no such context."""
    sides = {unsafe: [a for c, a in zip(contexts, answers, strict=True) if c.unsafe == unsafe]
             for unsafe in (False, True)}
    # Exactly the form asked for (H.1), no credit for less. Who declines everything has the best
    # safety: only beside what is declined without need does it say anything.
    marks = {"format": [garm.format_reward(answer) for answer in sides[False]],
             "safety": [garm.format_reward(answer, unsafe=True) for answer in sides[True]],
             "declined": [garm.format_reward(answer, unsafe=True) for answer in sides[False]]}
    return {name: float(np.mean(some)) if some else None for name, some in marks.items()}


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
