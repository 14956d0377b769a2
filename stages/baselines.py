"""What stage `rid` is held against, and taught by: rules and learners that rank the same summaries.

    figures = compare(run, revisits, seen, unseen, scores, gates)

Beside every figure of RID stand two rules, recency and token frequency, and two learners on the
statistics that the towers see: logistic regression and boosted trees. The trees also teach the
towers (rid.distillation). All know chores, as RID's labels do, which no later session revisits.

Legend: N summaries, F statistics.
"""

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import icebreaker as ib
from files import cache_texts
from roles.text import is_functional
from run import Run
from stages.match import Revisits, Row

RULES = {"recency": ib.recency_scores, "frequency": ib.frequency_scores}
LEARNERS = {  # small ones: some hundred users have few revisits
    "logistic": lambda: make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000)),
    "trees": lambda: HistGradientBoostingClassifier(
        learning_rate=0.05, max_iter=150, max_leaf_nodes=15, min_samples_leaf=40, random_state=0),
}

_is_chore = cache_texts(100_000)(is_functional)  # asked at each step of training


def chores(history: ib.History) -> np.ndarray:
    """Which summaries are chores (N,)."""
    return np.array([*map(_is_chore, history.texts)], bool)


def statistics(history: ib.History) -> torch.Tensor:
    """Statistics of each summary, and whether it is a chore: (N, F + 1)."""
    return torch.cat([history.statistics, torch.tensor(chores(history)).float()[:, None]], 1)


def rule_scores(history: ib.History, rule) -> np.ndarray:
    """A rule's scores (N,), chores behind all others: RID's labels know no revisit of a chore."""
    scores = rule(history).numpy().astype(float)
    return np.where(chores(history), scores - 1e9, scores)  # their order among each other stays


def fit_learner(run: Run, revisits: Revisits, rows: list[Row], name: str):
    """One of LEARNERS on the statistics of these rows: which summaries are revisited?"""
    # (n, F + 1) and (n,): a row a summary, of all users together.
    inputs = np.concatenate([statistics(run.histories[user][cut]) for user, cut in rows])
    labels = np.concatenate([revisits[row] for row in rows])
    answered = labels >= 0  # a failed call of the matcher is no label
    return LEARNERS[name]().fit(inputs[answered], labels[answered])


def trees_odds(run: Run, revisits: Revisits, rows: list[Row]) -> dict[Row, torch.Tensor]:
    """Log-odds (N,) of a revisit of each row's summaries, by trees fitted on these rows."""
    trees = fit_learner(run, revisits, rows, "trees")
    return {(user, cut): torch.from_numpy(
        trees.decision_function(statistics(run.histories[user][cut]))).float()
        for user, cut in rows}


def compare(run: Run, revisits: Revisits, seen: list[Row], unseen: list[Row],
            scores: list[np.ndarray], gates: dict) -> dict:
    """AUC on unseen users beside rules and learners that see the same; of the gates, see there.

    scores: RID's of each unseen row; gates: name -> rid.Distiller, the one in use first.
    """
    if not unseen:
        return {"auc": float("nan")}
    histories = [run.histories[user][cut] for user, cut in unseen]  # B of them, N summaries each
    figures = {"auc": revisits.auc(unseen, scores)}
    for name, rule in RULES.items():
        figures[f"auc_{name}"] = revisits.auc(unseen, [rule_scores(h, rule) for h in histories])
    # Learners without towers: what is to be gained from the same inputs.
    for name in LEARNERS:
        learner = fit_learner(run, revisits, seen, name)
        chances = [learner.predict_proba(statistics(history))[:, 1] for history in histories]
        figures[f"auc_{name}"] = revisits.auc(unseen, chances)
    return figures | {"gate": compare_gates(revisits, gates, unseen, histories, scores)}


def compare_gates(revisits: Revisits, gates: dict, unseen: list[Row], histories, scores) -> dict:
    """Precision and F_0.5 of "revisited", and the number kept, over all rows of unseen users: of
    each gate, and of the best k of everybody."""
    used = next(iter(gates.values()))  # what the run distils by
    # Thresholds as if nothing else bound them, beside what is used, and the best k of everybody.
    most = used.settings.max_keep
    gates = {"default": used} | {name: gate.bounded(1, most) for name, gate in gates.items()}
    gates |= {f"top {k}": used.bounded(k, k) for k in (1, 2, 3, 4, 6)}
    figures, rows = {}, [(h, s, used.fit(h)) for h, s in zip(histories, scores, strict=True)]
    for name, gate in gates.items():
        # Pooled, as the thresholds were fitted: a user of many interests counts more.
        kept = [gate.keep(*row) for row in rows]
        labels = np.concatenate([revisits[row][k] for row, k in zip(unseen, kept, strict=True)])
        hits, answered = (labels == 1).sum(), (labels >= 0).sum()
        positives = sum((revisits[row] == 1).sum() for row in unseen)
        figures[name] = {  # F_beta with beta = 0.5: to bring up what is over costs more
            "precision": float(hits / max(1, answered)),
            "f_half": float(1.25 * hits / (answered + 0.25 * positives)),
            "kept": float(np.mean([*map(len, kept)]))}
    return figures
