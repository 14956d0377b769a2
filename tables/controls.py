"""What the methods are compared with: other interests, other writers, a floor and a ceiling.

    python eval.py --reproduce 1 6 serving

Table 6 of the paper compares RID's interests with rule-based ones and with the whole history; the
other controls are ours, since a gain over weak baselines alone says little.
"""

from __future__ import annotations

import random

import torch
from roles.players import Players
from roles.writer import Writer
from run import Run, history_of
from stages.cold_start import PopularStarters
from stages.sit import teacher_lists

import icebreaker as ib
from stages.metrics import Lists
from stages.rid import Distiller
from tables.rerank import pool_of
from world import people

ORACLE_POOL = 200  # shown starters that the oracle may pick, beside what the methods wrote


def interests_of(run: Run, user: str, kind: str) -> list[str]:
    """What a method is told of a user today: "all" (latest first), "RID" or "rule"."""
    history, state = run.histories[user][-1], run.states[user][-1]
    if kind == "all":
        return history.texts[::-1]
    if kind == "RID":
        return state.interests
    # Rule-based (Table 6): frequency and recency, ranks added; as many as RID keeps, no twins.
    score = sum(
        torch.argsort(torch.argsort(rank(history), stable=True), stable=True).double()
        for rank in (ib.frequency_scores, ib.recency_scores)
    )
    n, twins = len(state.interests), run.config.rid.duplicate_cosine
    keep = ib.distil(score.numpy(), float("inf"), n, n, history.embeddings, twins)
    return [history.texts[i] for i in keep]


def taught(run: Run, players: Players, users: list[str]) -> dict[str, list[list[str]]]:
    """ab.lists lists of each user by the teacher, from RID's interests: what SFT imitates."""
    states = [run.states[user][-1] for user in users]
    rows = teacher_lists(run, players, states, run.config.ab.lists, "compare")
    return dict(zip(users, rows, strict=True))


def few_sessions(run: Run, writer: Writer, users: list[str]) -> Lists:
    """IceBreaker for test users of whom only the last session, or the last two, were known.

    The rankers, who judge, know the whole history.
    """
    lists, distiller = {}, Distiller.load(run)
    profiles = torch.stack([run.profiles[user] for user in users])  # (U, D)
    for n in (1, 2):
        histories = [history_of(run.users[u].sessions[-n:], None, run.encoder) for u in users]
        inputs = [
            [history.texts[i] for i in distiller.keep(history, scores)]
            for history, scores in zip(
                histories, distiller.scores(histories, profiles), strict=True
            )
        ]
        # The seed of every method: a user's random numbers are the same whoever writes.
        rows = writer.write(run.adapter("last"), inputs, run.config.ab.lists, run.seed("eval"))
        lists[f"IceBreaker, {n} session{'s' * (n > 1)}"] = dict(zip(users, rows, strict=True))
    return lists


def cold_start(run: Run, users: list[str]) -> Lists:
    """For test users as if nothing but their profile were known: the same for equal profiles."""
    popular = PopularStarters(run)
    return {"popular starters": {user: [popular(run.users[user].profile)] for user in users}}


def floor_and_ceiling(run: Run, truth: people.Truth, users: list[str], written: Lists) -> Lists:
    """Random starters; and what one who sees the hidden truth would pick, greedily, of all in
    `written` and ORACLE_POOL shown ones."""
    k, rng = run.config.generator.list_size, random.Random(run.seed("floor"))
    shown = sorted({starter for row in run.impressions for starter in row.starters})

    def oracle(user: str) -> list[str]:
        theirs = pool_of([row for lists in written.values() for row in lists.get(user, ())])
        pool = sorted({*theirs, *rng.sample(shown, min(len(shown), ORACLE_POOL))})
        best: list[str] = []
        while len(best) < min(k, len(pool)):  # greedy: the one that adds most taps
            rest = [starter for starter in pool if starter not in best]
            best.append(max(rest, key=lambda y: truth.expected_clicks(user, [*best, y])))
        return best

    # All random starters before the first oracle: both draw from one generator.
    floor = {u: [rng.sample(shown, k) for _ in range(run.config.ab.lists)] for u in users}
    return {"random starters": floor, "oracle": {user: [oracle(user)] for user in users}}
