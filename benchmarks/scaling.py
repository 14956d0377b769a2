"""Time per user of every stage as the number of users grows.

    python -m benchmarks.scaling      # about 20 minutes on two cores; writes results/scaling.md

All users go through every stage (no cap on users in sit and dpo). What is done for each of them is
less than by default (fewer samples, one epoch, one round), so that 2,000 users take minutes.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import torch

from files import ROOT

SIZES = (250, 500, 1000, 2000)
STAGES = ("world", "match", "rid", "ranker", "sit", "dpo", "eval")
LESS = "sit.max_rows=0 sit.epochs=1 dpo.max_users=0 dpo.rounds=1 dpo.samples=3"
LESS += " eval.lists=1 rid.epochs=10 rid.patience=10 ranker.epochs=5 ranker.patience=5"


def stage_seconds(users: int) -> dict[str, float]:
    """Runs in runs/scaling<users>, beside the base model that is shared."""
    words = [*LESS.split(), f"world.users={users}", f"run.name=scaling{users}"]
    subprocess.run([sys.executable, "train.py", *words], check=True, cwd=ROOT)
    lines = (ROOT / "runs" / f"scaling{users}" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return {r["stage"]: r["seconds"] for r in rows if "seconds" in r}


def main() -> None:
    taken = {users: stage_seconds(users) for users in SIZES}
    lines = [
        "# Milliseconds per user by stage\n",
        "```bash\npython -m benchmarks.scaling\n```\n",
        f"Wall clock on a machine with {torch.get_num_threads()} threads ({platform.platform()}), "
        f"torch {torch.__version__}. All users go through every stage; for each is done less than "
        f"by default (`{LESS}`).\n",
        f"| stage | {' | '.join(f'{n} users' for n in SIZES)} | last : first |",
        "|---|" + "---|" * (len(SIZES) + 1),
    ]
    for stage in STAGES:
        each = [1000 * taken[n][stage] / n for n in SIZES]
        cells = " | ".join(f"{x:.1f}" for x in each)
        lines.append(f"| {stage} | {cells} | {each[-1] / each[0]:.2f} |")
    (ROOT / "results" / "scaling.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
