"""Table 6: which interests a generator is told. RID's, rule-based ones, or the whole history.

    python eval.py --reproduce 6

Appendix C.1 of the paper: the interests themselves are judged in pairs, then what is written from
them. The hidden truth beside the judge is ours.
"""

import numpy as np

from roles.players import Players
from run import Run
from stages.baselines import RULES, rule_scores
from stages.metrics import PerUser
from stages.rid import best_of
from tables.truth import chore_shares, resonances
from world.people import Truth


def interests_of(run: Run, user: str, kind: str) -> list[str]:
    """What a method is told of a user today: "all" (latest first), "RID" or "rule"."""
    history, state = run.histories[user][-1], run.states[user][-1]
    if kind == "all":
        return history.texts[::-1]
    if kind == "RID":
        return state.interests
    # Rule-based (Table 6): frequency and recency, ranks added; as many as RID keeps, no twins, and
    # chores last, as RID's labels have none.
    scores = (rule_scores(history, rule) for rule in RULES.values())  # (N,) each
    ranks = sum(np.argsort(np.argsort(s, kind="stable"), kind="stable") for s in scores)
    twins = run.config.rid.duplicate_cosine
    return [history.texts[i] for i in best_of(history, ranks, len(state.interests), twins)]


def interest_values(players: Players, truth: Truth, told: dict[str, dict]) -> PerUser:
    """Of the interests by each distillation: resonance by the hidden truth, share of chores, and
    wins in the judge's pairwise comparison with the rule-based ones (Table 6, appendix C.1)."""
    values: PerUser = {
        f"interests: {kind}": {
            "resonance": resonances(truth, texts), "functional": chore_shares(truth, texts)}
        for kind, texts in told.items()}
    # The judge reads the history in its order, the oldest first.
    rows = [(told["all"][u][::-1], told["RID"][u], told["rule"][u]) for u in told["all"]]
    wins = zip(told["all"], players.judge().compare(rows), strict=True)  # RID's, 0 to 1
    wins = {user: win for user, win in wins if win is not None}  # None: the call failed
    values["interests: RID"]["judge_win"] = wins
    values["interests: rule"]["judge_win"] = {user: 1 - win for user, win in wins.items()}
    return values
