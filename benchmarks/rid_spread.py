"""How much trainings of RID on one log differ: AUC on the same unseen people.

    python train.py --stage rid world.seed=7 run.seed=7 run.name=rid-7
    python -m benchmarks.rid_spread run.name=rid-7

Only what a training draws differs (folds of the people, weights, order); splits and labels stay.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from config import load_config
from files import digest, script
from run import Run
from stages.match import Revisits
from stages.rid import fit_gate, fit_scorer, score_rows

TRAININGS = 5


def train_again(run: Run, number: int) -> float:
    """AUC of one more training, over people from whom none has learned."""
    draws = {purpose: int(digest(number, purpose)[:8], 16) for purpose in ("folds", "rid", "order")}
    run.seed = lambda *purpose: draws[purpose[-1]]
    revisits = Revisits(run)
    seen, unseen = (
        revisits.rows(run.ids(*splits)) for splits in (("train", "valid"), ("judge", "test")))
    users = sorted({u for u, _ in seen}, key=lambda u: digest(draws["folds"], u))
    folds = {user: i % run.config.rid.towers for i, user in enumerate(users)}
    scorer = fit_scorer(run, revisits, seen, folds)
    distiller = fit_gate(run, revisits, scorer, seen, folds, run.config.rid.activity_groups)
    return revisits.auc(unseen, score_rows(run, distiller, unseen))


def main() -> None:
    settings = load_config(None, sys.argv[1:]).run
    with tempfile.TemporaryDirectory() as folder:  # trainings write into a copy
        source = Path(settings.root) / settings.name
        shutil.copytree(source, Path(folder) / settings.name,
                        ignore=shutil.ignore_patterns("adapter", "sit", "dpo", "eval"))
        run = Run(load_config(source / "config.yaml", [f"run.root={folder}"]), describe=False)
        aucs = [train_again(run, number) for number in range(TRAININGS)]
    print(f"AUC of {TRAININGS} trainings: {', '.join(f'{auc:.4f}' for auc in aucs)}; "
          f"standard deviation {np.std(aucs, ddof=1):.4f}")


if __name__ == "__main__":
    script(main)
