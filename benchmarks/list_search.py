"""The list search (Algorithm 1) for many users at once beside the same beam search in plain Python.

    python -m benchmarks.list_search
"""

from __future__ import annotations

import torch

import icebreaker as ib
from benchmarks.common import Row, prepare, report, seconds

USERS, N, K, BEAM, EXPAND, WEIGHT = 256, 64, 6, 8, 8, 0.4


def plain_search(utility: list[float], similarity: list[list[float]]) -> list[float]:
    """Values of the best lists of one user, as a programmer would write it from Algorithm 1."""
    order = sorted(range(len(utility)), key=lambda i: -utility[i])
    beams = [([], 0.0)]
    for _ in range(K):
        best: dict[frozenset, tuple[list[int], float]] = {}
        for items, value in beams:
            for y in [i for i in order if i not in items][:EXPAND]:
                gain = WEIGHT * utility[y]
                if items:
                    close = sum(similarity[y][x] for x in items) / len(items)
                    gain += (1 - WEIGHT) * (1 - close)
                grown, key = value + gain, frozenset([*items, y])
                if key not in best or grown > best[key][1]:
                    best[key] = ([*items, y], grown)
        beams = sorted(best.values(), key=lambda beam: -beam[1])[:BEAM]
    return [value for _, value in beams]


def main() -> None:
    prepare()
    utility = torch.rand(USERS, N)
    e = torch.nn.functional.normalize(torch.randn(USERS, N, 384), dim=-1)

    def ours() -> torch.Tensor:
        return ib.list_search(utility, e @ e.transpose(1, 2), K, BEAM, EXPAND, WEIGHT)[1]

    def plain() -> torch.Tensor:
        rows = zip(utility.tolist(), (e @ e.transpose(1, 2)).tolist(), strict=True)
        return torch.tensor([plain_search(*row) for row in rows])

    error = (ours() - plain()).abs().max().item()
    assert error < 1e-5, error
    times = seconds({"ours": ours, "plain": plain})
    work = f"list search, {USERS} users, N={N}, K={K}, beam {BEAM}"
    note = f"values differ by {error:.0e}; both compute the cosines"
    report("List search", [Row(work, "plain Python", *times.values(), 30, note=note)])


if __name__ == "__main__":
    main()
