"""Value and time of the lists that search, MMR and DPP (pyversity) choose from the same candidates.

    python -m benchmarks.list_quality

Value: what Eq. (8) prefers, lambda U + (1 - lambda) D with U the mean utility (min-max scaled among
the user's candidates) and D the mean pairwise cosine dissimilarity. MMR and DPP take a setting of
their own for the balance: the best of five is shown, chosen for them in hindsight. The search is
given all users at once, pyversity one at a time; both start from utilities and vectors. Value is
what the search was made for, and no judge of MMR and DPP in general.
"""

from __future__ import annotations

import numpy as np
import torch
from pyversity import Strategy, diversify

import icebreaker as ib
from benchmarks.common import prepare, report_lines, seconds
from config import WorldConfig
from llm.encoder import Encoder
from world import people

USERS, N, K, WEIGHT = 64, 64, 6, 0.4


def candidates() -> tuple[torch.Tensor, torch.Tensor]:
    """Utilities (USERS, N) in [0, 1] at random, and real sentence vectors (USERS, N, D)."""
    logs = people.World(WorldConfig(users=60, impressions_per_user=40, starter_pool=2000))
    starters = sorted({y for shown in logs.impressions for y in shown.starters})
    vectors = Encoder()(starters)
    picks = torch.stack([torch.randperm(len(starters))[:N] for _ in range(USERS)])
    return ib.min_max(torch.rand(USERS, N)), vectors[picks]


def main() -> None:
    prepare()
    utility, e = candidates()
    similarity = e @ e.mT  # (USERS, N, N)
    utilities, vectors = utility.numpy(), e.numpy()

    def value(lists) -> float:
        """Mean over users of lambda U + (1 - lambda) D; lists: K indices a user."""
        scores = []
        lists = torch.as_tensor(np.array(lists))[:, None]  # (USERS, 1, K)
        for utilities, cosines, chosen in zip(utility, similarity, lists, strict=True):
            u, d = ib.list_utility(utilities, chosen), ib.list_diversity(cosines, chosen)
            scores.append((WEIGHT * u + (1 - WEIGHT) * d).item())
        return float(np.mean(scores))

    def search(beam: int, expand: int):
        lists, _ = ib.list_search(utility, e @ e.mT, K, beam, expand, WEIGHT)
        return lists[:, 0].tolist()

    def pyversity(strategy, diversity: float):
        return [
            diversify(vectors[i], utilities[i], K, strategy, diversity).indices.tolist()
            for i in range(USERS)
        ]

    methods = {
        "list search, beam 8, expand 8": lambda: search(8, 8),
        "list search, beam 1, expand 8 (greedy)": lambda: search(1, 8),
        "list search, beam 8, expand 64": lambda: search(8, N),
        "list search, beam 64, expand 64": lambda: search(64, N),
        "highest utility": lambda: utility.topk(K).indices.tolist(),
    }
    for strategy in (Strategy.MMR, Strategy.DPP):
        settings = (0.1, 0.3, 0.5, 0.7, 0.9)
        best = max(settings, key=lambda d, s=strategy: value(pyversity(s, d)))
        name = f"pyversity {strategy.name}, diversity {best} (best of five)"
        methods[name] = lambda s=strategy, d=best: pyversity(s, d)
    times = seconds(methods)
    values = {name: value(run()) for name, run in methods.items()}
    lines = ["| method | value | CPU ms a user |", "|---|---|---|"]
    for name in sorted(values, key=lambda name: -values[name]):
        lines.append(f"| {name} | {values[name]:.4f} | {1000 * times[name] / USERS:.2f} |")
    text = (
        f"Lists of {K} from {N} starters of the simulated platform with random utilities, {USERS} "
        f"users. Value is lambda U + (1 - lambda) D at lambda {WEIGHT}, mean over users."
    )
    report_lines("List quality against time", text, lines)


if __name__ == "__main__":
    main()
