"""What may be chosen when serving, from the lists that a method has written.

    python eval.py --reproduce serving

Beyond the paper: its list search (Algorithm 1) makes training pairs alone; here it also picks what
is shown, beside two rerankers of the field (MMR, DPP) and the plain highest utility.

Legend: N candidates of a user, D embedding, K starters of a list.
"""

from __future__ import annotations

from itertools import product

import torch
from pyversity import Strategy, diversify
from run import Run
from stages.ranker import load_ranker, utilities

import icebreaker as ib
from config import AbConfig
from stages import search
from stages.metrics import Lists

Written = dict[str, list[list[str]]]  # user -> lists of starters
SWEEP = (0.1, 0.5)  # lambdas of choosing when serving, beside dpo.weight


def pool_of(lists: list[list[str]]) -> list[str]:
    """All starters of some lists, each once, whatever its capitals; in the alphabet's order."""
    return sorted({starter.casefold(): starter for row in lists for starter in row}.values())


def searched(run: Run, lists: Written, n: int, **settings) -> Written:
    """At most n full lists of each user: the list search's best of all starters that were written
    (by the training ranker), the best of the rest, and so on, as the server orders them.

    settings: of config.dpo, such as beam and weight, where they differ from the run's.
    """
    dpo = run.config.dpo.model_copy(update=settings)
    rows = search.searched(
        run.config.model_copy(update={"dpo": dpo}), run.encoder, load_ranker(run, "train"),
        [run.states[u][-1] for u in lists], [*map(pool_of, lists.values())], n,
    )
    return dict(zip(lists, rows, strict=True))


def online_lists(settings: AbConfig) -> tuple[int, int]:
    """(lists to write for an arm with list search, lists that it keeps of each ab.searched)."""
    kept = -(-settings.searched // 2)  # the better half, rounded up
    return -(-settings.lists // kept) * settings.searched, kept


def searched_in_turn(run: Run, lists: Written) -> Written:
    """ab.lists lists of each user: the better half of the first ab.searched lists that were
    written, of the next ones, and so on, as a server has it that writes ahead."""
    settings, shown = run.config.ab, {user: [] for user in lists}
    written, kept = online_lists(settings)
    for start in range(0, written, settings.searched):
        some = {user: rows[start : start + settings.searched] for user, rows in lists.items()}
        for user, best in searched(run, some, kept).items():
            shown[user] += best
    return {user: rows[: settings.lists] for user, rows in shown.items()}


def reranked(run: Run, method: str, lists: Written) -> Lists:
    """One list of each user, chosen when serving from a method's own, by the training ranker.

    With dpo.weight as lambda, or with one of SWEEP; with 1 all would choose the highest utility.
    """
    def first(lists: Written, **settings) -> Written:
        # Nobody wrote a starter: the user is shown an empty list, and counts.
        return {u: rows or [[]] for u, rows in searched(run, lists, 1, **settings).items()}

    weights = {"": run.config.dpo.weight} | {f", lambda {weight}": weight for weight in SWEEP}
    chosen = {f"list search{end}": first(lists, weight=w) for end, w in weights.items()}
    chosen["list search, beam 1"] = first(lists, beam=1)
    chosen["list search, all tried"] = first(lists, expand=1000)  # at each slot
    for n in (1, 2, 4):
        chosen[f"list search of {n}"] = first({u: rows[:n] for u, rows in lists.items()})
    ranker, k = load_ranker(run, "train"), run.config.generator.list_size
    for user, written in lists.items():
        pool = pool_of(written)
        vectors = run.encoder(pool)  # (N, D)
        utility = utilities(ranker, run.states[user][-1], vectors) if pool else torch.zeros(0)
        best = utility.topk(min(k, len(pool))).indices.tolist()
        chosen.setdefault("highest utility", {})[user] = [[pool[i] for i in best]]
        for kind, (end, weight) in product((Strategy.MMR, Strategy.DPP), weights.items()):
            indices = range(len(pool))
            if len(pool) > k:  # else there is nothing to choose
                scaled = ib.min_max(utility[None])[0].numpy()  # one scale with the cosines
                indices = diversify(vectors.numpy(), scaled, k, kind, diversity=1 - weight).indices
            chosen.setdefault(kind.name + end, {})[user] = [[pool[i] for i in indices]]
    return {f"{method}, {name}": rows for name, rows in chosen.items()}


def search_values(run: Run, lists: Written, chosen: Lists) -> dict[str, dict[str, float]]:
    """method -> user -> lambda U + (1 - lambda) D of the list chosen: what list search makes large.

    lists: all that were written for a user, within which utilities are min-max scaled.
    """
    ranker, weight = load_ranker(run, "train"), run.config.dpo.weight
    values: dict[str, dict[str, float]] = {method: {} for method in chosen}
    for user, written in lists.items():
        def utility(starters: list[str], state=run.states[user][-1]) -> torch.Tensor:
            return utilities(ranker, state, run.encoder(starters))

        pool = utility(pool_of(written)) if pool_of(written) else torch.zeros(1)
        low, width = pool.min(), (pool.max() - pool.min()).clamp_min(1e-9)
        for method, rows in chosen.items():
            starters, value = rows[user][0], 0.0  # of an empty list
            if starters:
                vectors = run.encoder(starters)  # (K, D)
                value = weight * float(((utility(starters) - low) / width).mean())
                if len(starters) > 1:
                    value += (1 - weight) * float(ib.list_diversity(vectors @ vectors.T))
            values[method][user] = value
    return values
