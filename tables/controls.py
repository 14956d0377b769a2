"""What the methods are compared with: other writers, rerankers, floor and ceiling.

    python eval.py --reproduce 1 serving

These comparisons are ours. List search (Algorithm 1) makes training pairs alone in the paper; here
it also picks what is shown, beside two rerankers of the field (MMR, DPP) and the highest utility.

Legend: N candidates or summaries of a user, D embedding, K starters of a list.
"""

import random
from itertools import product

import torch
from pyversity import Strategy, diversify

import icebreaker as ib
from roles.writer import Writer
from run import Run, history_of
from stages import pools
from stages.metrics import Lists
from stages.ranker import load_ranker, utilities
from stages.rid import Distiller
from world import people

Written = dict[str, list[list[str]]]  # user -> lists of starters
SWEEP = (0.2, 0.8)  # lambdas of choosing when serving, beside dpo.weight
ORACLE_POOL = 200  # shown starters that the oracle may pick, beside what the methods wrote


def few_sessions(run: Run, writer: Writer, users: list[str]) -> Lists:
    """IceBreaker for test users of whom only the last session, or the last two, were known.

    The rankers, who judge, know the whole history.
    """
    lists, distiller = {}, Distiller.load(run)
    profiles = torch.stack([run.profiles[user] for user in users])  # (U, D)
    for n, name in ((1, "IceBreaker, 1 session"), (2, "IceBreaker, 2 sessions")):
        histories = [history_of(run.users[u].sessions[-n:], run.now, run.encoder) for u in users]
        scores = distiller.scores(histories, profiles)  # (N,) of each user's N summaries
        inputs = [[history.texts[i] for i in distiller.keep(history, row)]
                  for history, row in zip(histories, scores, strict=True)]
        # The seed of every method: a user's random numbers are the same whoever writes.
        rows = writer.write(run.adapter("last"), inputs, run.config.ab.lists, run.seed("eval"))
        lists[name] = dict(zip(users, rows, strict=True))
    return lists


def floor_and_ceiling(run: Run, truth: people.Truth, users: list[str], written: Lists) -> Lists:
    """Random starters; and what one who sees the hidden truth would pick, greedily, of all in
    `written` and ORACLE_POOL shown ones."""
    k, rng = run.config.generator.list_size, random.Random(run.seed("floor"))
    shown = run.shown_starters

    def oracle(user: str) -> list[str]:
        theirs = pool_of([row for lists in written.values() for row in lists.get(user, ())])
        pool = sorted({*theirs, *rng.sample(shown, min(len(shown), ORACLE_POOL))})
        best: list[str] = []
        while len(best) < min(k, len(pool)):  # greedy: the one that adds most taps
            rest = [starter for starter in pool if starter not in best]
            best.append(max(rest, key=lambda y: truth.expected_clicks(user, [*best, y])))
        return best

    # All random starters before the first oracle: both draw from one generator.
    floor = {u: [rng.sample(shown, k) for _ in range(run.config.ab.lists)] for u in users}
    return {"random starters": floor, "oracle": {user: [oracle(user)] for user in users}}


def pool_of(lists: list[list[str]]) -> list[str]:
    """All starters of some lists, each once, whatever its capitals; in the alphabet's order."""
    return sorted({starter.casefold(): starter for row in lists for starter in row}.values())


def searched(run: Run, lists: Written, n: int, **settings) -> Written:
    """At most n full lists of each user: the list search's best of all starters that were written
    (by the training ranker), the best of the rest, and so on, as the server orders them.

    settings: of config.dpo, such as beam and weight, where they differ from the run's.
    """
    dpo = run.config.dpo.model_copy(update=settings)
    rows = pools.searched(
        run.config.model_copy(update={"dpo": dpo}), run.encoder, load_ranker(run, "train"),
        [run.states[u][-1] for u in lists], [*map(pool_of, lists.values())], n)
    return dict(zip(lists, rows, strict=True))


def searched_in_turn(run: Run, lists: Written) -> Written:
    """ab.lists lists of each user: the better half of the first ab.searched lists that were
    written, of the next ones, and so on, as a server has it that writes ahead."""
    n, shown = run.config.ab.searched, {user: [] for user in lists}
    for start in range(0, max(map(len, lists.values())), n):
        part = {user: rows[start : start + n] for user, rows in lists.items()}
        for user, best in searched(run, part, better_half(n)).items():
            shown[user] += best
    return {user: rows[: run.config.ab.lists] for user, rows in shown.items()}


def better_half(searched: int) -> int:
    return -(-searched // 2)  # rounded up: of one list that one


def reranked(run: Run, method: str, lists: Written) -> Lists:
    """One list of each user, chosen when serving from a method's own, by the training ranker; with
    dpo.weight as lambda, or with one of SWEEP. With 1 all would choose the highest utility."""
    def first(lists: Written, **settings) -> Written:
        # Of nothing written an empty list is shown, and the user counts.
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
        picks = {"highest utility": utility.topk(min(k, len(pool))).indices.tolist()}
        for kind, (end, weight) in product((Strategy.MMR, Strategy.DPP), weights.items()):
            picks[kind.name + end] = range(len(pool))
            if len(pool) > k:  # else there is nothing to choose
                scaled = ib.min_max(utility[None])[0].numpy()  # one scale with the cosines
                picks[kind.name + end] = diversify(
                    vectors.numpy(), scaled, k, kind, diversity=1 - weight).indices
        for name, indices in picks.items():
            chosen.setdefault(name, {})[user] = [[pool[i] for i in indices]]
    return {f"{method}, {name}": rows for name, rows in chosen.items()}


def search_values(run: Run, lists: Written, chosen: Lists) -> dict[str, dict[str, float]]:
    """method -> user -> lambda U + (1 - lambda) D of the list chosen: what list search makes large.

    lists: all that were written for a user, within which utilities are min-max scaled.
    """
    ranker, weight = load_ranker(run, "train"), run.config.dpo.weight
    values: dict[str, dict[str, float]] = {method: {} for method in chosen}
    for user, written in lists.items():
        state, pool = run.states[user][-1], run.encoder(pool_of(written))  # (N, D)
        scale = utilities(ranker, state, pool) if len(pool) else torch.zeros(1)  # (N,)
        low, width = scale.min(), (scale.max() - scale.min()).clamp_min(1e-9)
        for method, rows in chosen.items():
            values[method][user] = 0.0  # of an empty list
            if starters := rows[user][0]:
                vectors = run.encoder(starters)  # (K, D)
                utility = (utilities(ranker, state, vectors) - low) / width
                diversity = float(ib.list_diversity(vectors @ vectors.T))  # 0 of a single one
                values[method][user] = weight * float(utility.mean()) + (1 - weight) * diversity
    return values
