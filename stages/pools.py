"""Pools of starters in, lists out: Algorithm 1 as mining, serving and the tables use it.

Every user has a pool of distinct starters of different size: `score_pools` pads them to one batch,
`list_order` brings a pool in the order of the list search's best list, the best of the rest, ...

Legend: B users, N candidates, K list slots.
"""

from collections.abc import Callable

import torch

import icebreaker as ib
from config import Config, DpoConfig
from run import UserState
from stages.ranker import utilities


def score_pools(encode: Callable, ranker: ib.UtilityRanker, states: list[UserState],
                pools: list[list[str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Utilities (B, N), cosines (B, N, N) and valid (B, N) of every user's distinct candidates."""
    encode(sorted({y for pool in pools for y in pool}))  # all at once, then looked up
    b, n = len(pools), max(map(len, pools))  # pads: valid is False there
    utility, valid = torch.zeros(b, n), torch.zeros(b, n, dtype=torch.bool)
    similarity = torch.zeros(b, n, n)
    for i, (state, pool) in enumerate(zip(states, pools, strict=True)):
        m, embeddings = len(pool), encode(pool)
        if pool:
            utility[i, :m], valid[i, :m] = utilities(ranker, state, embeddings), True
            similarity[i, :m, :m] = embeddings @ embeddings.T  # unit rows: cosines
    return utility, similarity, valid


def best_lists(settings: DpoConfig, list_size: int, utility: torch.Tensor, similarity: torch.Tensor,
               valid: torch.Tensor, expand: int = 0) -> torch.Tensor:
    """Algorithm 1 with dpo's settings: lists (B, beam, K) of indices, best first, -1 for none."""
    scaled = ib.min_max(utility, valid)  # Unstated: r_util and r_div need one scale, as in Eq. (8)
    return ib.list_search(
        scaled, similarity, list_size, settings.beam, expand or settings.expand, settings.weight,
        valid,
    )[0]


def list_order(settings: DpoConfig, list_size: int, utility: torch.Tensor, similarity: torch.Tensor,
               valid: torch.Tensor | None = None, lists: int = 1000,
               expand: int = 0) -> list[list[int]]:
    """Candidates of each row as the list search's best list, then the best of the rest, ...

    utility (B, N), similarity (B, N, N), valid (B, N). At most `lists` lists a row, and then, if
    they are too few to fill one, the others by utility. expand: where it differs from settings'.
    """
    # (B, N): candidates in no list yet.
    free = torch.ones_like(utility, dtype=torch.bool) if valid is None else valid.clone()
    order: list[list[int]] = [[] for _ in utility]  # indices into each row's candidates
    for _ in range(lists):
        rich = (free.sum(1) >= list_size).nonzero().flatten()  # rows that can fill another list
        if not len(rich):
            break
        beams = best_lists(settings, list_size, utility[rich], similarity[rich], free[rich], expand)
        for row, best in zip(rich.tolist(), beams[:, 0].tolist(), strict=True):
            order[row] += best
        free[rich] = free[rich].scatter(1, beams[:, 0], False)  # no starter stands in two lists
    for row, few in enumerate(free.sum(1).tolist()):
        if few < list_size:
            rest = free[row].nonzero().flatten()  # too few for a list of their own
            order[row] += rest[utility[row, rest].argsort(descending=True, stable=True)].tolist()
    return order


def searched(config: Config, encode: Callable, ranker: ib.UtilityRanker, states: list[UserState],
             pools: list[list[str]], lists: int) -> list[list[list[str]]]:
    """At most `lists` full lists of each user's pool, best first; what there is if none is full."""
    k, results = config.generator.list_size, []
    # Order is list after list, so each k of it are one.
    scored = score_pools(encode, ranker, states, pools)
    for pool, order in zip(pools, list_order(config.dpo, k, *scored, lists=lists), strict=True):
        rows = [[pool[j] for j in order[i : i + k]] for i in range(0, len(order), k)][:lists]
        results.append([row for row in rows if len(row) == k] or rows)  # a short list beats none
    return results
