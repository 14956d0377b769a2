"""Stage `match`: which past summaries did a later session come back to? The labels of RID.

    python train.py --stage match

Section 2.2 of the paper: positives are summaries that a later session revisits. Every user is cut
at data.cuts: before a cut lies the history (E summaries), after it the future (L later ones).
"""

import numpy as np

from files import ROOT, read_json, write_json
from roles.players import Players
from run import Run
from stages import metrics

# By which the rules tell subjects and chores, write starters and let them pass.
RULES = [ROOT / "roles" / f"{n}.yaml" for n in ("languages", "sensitive", "templates", "words")]


def stage_match(run: Run, players: Players, key: str) -> dict:
    """Mark which past summaries a later session revisits, for every user and cut."""
    cuts = range(len(run.config.data.cuts))
    rows = [(user_id, cut) for user_id in run.users for cut in cuts]
    # Equal texts are asked about once: only whether one comes back counts.
    jobs = [
        (run.histories[u][c].texts, sorted({s.summary for s in run.parts(u, c)[1]}))
        for u, c in rows]
    everyone = ([s.summary for s in user.sessions] for user in run.users.values())
    labels: dict[str, list[list[int]]] = {user_id: [] for user_id in run.users}
    for (user_id, _), matches in zip(rows, players.match(jobs, everyone), strict=True):  # (E, L)
        # One match settles a row; without one an unanswered call (-1) leaves it unknown.
        label = np.where((matches > 0).any(1), 1, matches.min(1, initial=0))  # (E,)
        labels[user_id].append(label.tolist())
    write_json(run.folder / "match" / "revisited.json", labels)  # user -> cut -> label of each text
    # (n,) over all users and cuts
    flat = np.array([label for cuts in labels.values() for cut in cuts for label in cut])
    answered = flat[flat >= 0]
    return {
        "summaries": len(flat),
        "unknown": len(flat) - len(answered),
        "revisited_share": float(answered.mean()) if len(answered) else 0.0}


Row = tuple[str, int]  # a user at a cut of the log


class Revisits:
    """Labels of `match`: which summaries of a (user, cut) row a later session revisited.

    1 revisited, 0 not, -1 unknown (the matcher's call failed): these are neither.
    """

    def __init__(self, run: Run):
        self.labels = read_json(run.folder / "match" / "revisited.json")
        self.cuts = range(len(run.config.data.cuts))

    def __getitem__(self, row: Row) -> np.ndarray:
        return np.array(self.labels[row[0]][row[1]], int)  # (N,)

    def rows(self, ids: list[str]) -> list[Row]:
        """(user, cut) rows with both a revisited and a never-revisited summary."""
        rows = [(user_id, cut) for user_id in ids for cut in self.cuts]
        # Without a pair of both kinds a row has no AUC and no contrast.
        return [row for row in rows if {0, 1} <= {*self[row].tolist()}]

    def auc(self, rows: list[Row], scores: list[np.ndarray]) -> float:
        """Mean over users of the AUC of "revisited later" (each user's cuts averaged first)."""
        by_user: dict[str, list[float]] = {}
        for row, s in zip(rows, scores, strict=True):
            answered = self[row] >= 0
            auc = metrics.per_user_auc(s[answered], self[row][answered])  # pairs of one user only
            by_user.setdefault(row[0], []).append(auc)
        return float(np.mean([np.mean(v) for v in by_user.values()])) if by_user else float("nan")
