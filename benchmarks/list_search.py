"""The list search (Algorithm 1) for many users at once beside the same beam search in plain Python.

    python -m benchmarks.list_search
"""

from __future__ import annotations

import torch

import icebreaker as ib
from benchmarks.common import Row, prepare, report, seconds

USERS, N, K, BEAM, WEIGHT = 256, 64, 6, 8, 0.4


def plain_search(utility, similarity, expand: int) -> list[float]:
    """Values of the best lists of one user, as a programmer would write it from Algorithm 1.

    utility: N numbers; similarity: N rows of N.
    """
    order = sorted(range(len(utility)), key=lambda i: -utility[i])
    beams = [([], 0.0)]
    for _ in range(K):
        best: dict[frozenset, tuple[list[int], float]] = {}
        for items, value in beams:
            for y in [i for i in order if i not in items][:expand]:
                gain = WEIGHT * utility[y]
                if items:
                    close = sum(similarity[y][i] for i in items) / len(items)
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
    similarity = e @ e.mT
    users = list(zip(utility.tolist(), similarity.tolist(), strict=True))

    def ours(expand: int) -> torch.Tensor:
        return ib.list_search(utility, similarity, K, BEAM, expand, WEIGHT)[1]

    def plain(expand: int) -> torch.Tensor:
        return torch.tensor([plain_search(*user, expand) for user in users])

    rows = []
    for expand, what in ((N, "every candidate"), (8, "the 8 of highest utility (default)")):
        error = (ours(expand) - plain(expand)).abs().max().item()
        assert error < 1e-5, error
        times = seconds({"ours": lambda n=expand: ours(n), "plain": lambda n=expand: plain(n)})
        work = f"list search, {USERS} users, N={N}, K={K}, beam {BEAM}, {what} tried at each slot"
        note = f"values differ by {error:.0e}; cosines given to both"
        rows.append(Row(work, "plain Python", *times.values(), 30, note=note))
    report("List search", rows)


if __name__ == "__main__":
    main()
