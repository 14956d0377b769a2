"""Preference pairs of a round of DPO: sample lists, search for better ones, mine pairs.

    searched = search(run, ranker, states, lists)     # Algorithm 1
    pairs, counts = mine(run, searched, written)      # Eq. (8)

Section 2.3 of the paper. A mined pair is one chosen list and up to four rejected ones, one of each
kind: worse in utility alone, in diversity alone, in both (icebreaker.mine_preferences), unfit to
show.

Legend: N candidates, K slots.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

import icebreaker as ib
import roles
from files import digest, file_digest, processes, read_json, write_json
from roles.writer import Writer
from run import Run, UserState
from stages.pools import best_lists, score_pools

RANDOM_LISTS = 8  # random draws from a pool among the lists from which pairs are mined


def sample(run: Run, writer: Writer, number: int | str, model, adapter: Path,
           states: list[UserState], keep: bool = True) -> list[list[list[str]]]:
    """dpo.samples lists of the policy for each state, as written: the candidates of a round.

    With `keep` they stay in sampled.json beside the adapter, for a killed round and for runs that
    start as a copy.
    """
    inputs, n = [state.interests for state in states], run.config.dpo.samples
    seed, weights = run.seed("dpo", number), file_digest(adapter / "adapter_model.safetensors")
    # All that the lists hang on: a file of another training is not taken for this one's.
    key = digest(writer.model_path, weights, run.config.generator, inputs, n, seed)
    path = adapter.parent / "sampled.json"
    if path.is_file() and (kept := read_json(path, key=str, lists=list))["key"] == key:
        return kept["lists"]
    lists = writer.write(adapter, inputs, n, seed, model, raw=True)
    # What a server said stays in the cache of answers instead.
    if keep and processes()[0] == 0 and not run.config.generator.endpoint:
        write_json(path, {"key": key, "lists": lists})
    return lists


def fit_lists(run: Run, state: UserState, lists: list[list[str]]) -> list[list[str]]:
    """Of each list the first K starters that may be shown."""
    # With repeats, which the search avoids: such a list is a natural diversity negative.
    fit = (roles.filter_starters(x, state.interests, repeats=True)[0] for x in lists)
    return [starters[: run.config.generator.list_size] for starters in fit]


@dataclass(frozen=True)
class Searched:
    """What the list search found in one user's pool."""

    state: UserState
    lists: list[list[str]]  # as sampled from the policy, and the teacher's
    pool: list[str]  # their distinct starters, (N,)
    utility: torch.Tensor  # (N,), r_util
    similarity: torch.Tensor  # (N, N), cosines
    beams: list[list[int]]  # best lists of K, as indices into the pool


def search(run: Run, ranker, states: list[UserState],
           lists: list[list[list[str]]]) -> list[Searched | None]:
    """List search (Algorithm 1) in each user's pool; None where it has fewer than K starters."""
    settings, k = run.config.dpo, run.config.generator.list_size
    pools = [sorted({y for starters in user_lists for y in starters}) for user_lists in lists]
    rich = [i for i, pool in enumerate(pools) if len(pool) >= k]
    results: list[Searched | None] = [None] * len(pools)  # users keep their places
    if not rich:
        return results
    scored = score_pools(run.encoder, ranker, [states[i] for i in rich], [pools[i] for i in rich])
    beams = best_lists(settings, k, *scored)  # Algorithm 1
    for i, best, utility, similarity in zip(rich, beams.tolist(), *scored[:2], strict=True):
        n = len(pools[i])  # pads lie behind
        results[i] = Searched(states[i], lists[i], pools[i], utility[:n], similarity[:n, :n],
                              [beam for beam in best if beam[0] >= 0])  # -1: no further list
    return results


def mine(run: Run, searched: list[Searched | None],
         written: list[list[list[str]]]) -> tuple[list[dict], dict[str, int]]:
    """Chosen and rejected lists (Eq. 8) of each user, {} if there are none; and counts.

    written: the lists that the policy wrote for each user, before any filter.
    """
    counts = Counter(users=len(searched), too_few_candidates=searched.count(None), pairs=0)
    rows = zip(searched, written, strict=True)
    pairs = [mine_user(run, user, lists, counts) if user else {} for user, lists in rows]
    return pairs, dict(counts)


def mine_user(run: Run, searched: Searched, written: list[list[str]], counts: Counter) -> dict:
    """The chosen list of one user and its rejected ones by kind; {} if there are none."""
    settings, k = run.config.dpo, run.config.generator.list_size
    interests = searched.state.interests
    rng = random.Random(run.seed("mine", searched.state.user_id, searched.pool))
    place = {starter: i for i, starter in enumerate(searched.pool)}
    lists = [*searched.beams, *([place[y] for y in s] for s in searched.lists if len(s) == k)]
    lists += [rng.sample(range(len(place)), k) for _ in range(RANDOM_LISTS)]
    distinct: dict[tuple[int, ...], list[int]] = {}  # sets of starters: orders differ by rounding
    for indices in lists:
        distinct.setdefault(tuple(sorted(indices)), indices)
    lists = [*distinct.values()]
    chosen, rejected = ib.mine_preferences(  # Eq. (8)
        torch.tensor(lists), searched.utility, searched.similarity,
        settings.weight, settings.margin, settings.tolerance)
    texts = [[searched.pool[i] for i in indices] for indices in lists]
    kinds = {kind: None if j is None else texts[j] for kind, j in rejected.items()}
    # A list of which fewer than K starters may be shown.
    kinds["unfit"] = next((starters for starters in written if starters and len(
        roles.filter_starters(starters, interests)[0]) < k), None)
    # Table 9 trains with one kind alone.
    kinds = {kind: starters for kind, starters in kinds.items() if kind in settings.negatives}
    counts.update(f"no_{kind}" for kind, starters in kinds.items() if starters is None)
    kinds = {kind: starters for kind, starters in kinds.items() if starters is not None}
    counts["pairs"] += len(kinds)
    return {"interests": interests, "chosen": texts[chosen], "rejected": kinds} if kinds else {}


# ------------------------------------------------------------------------ of lists that were shown


def tapped_pairs(run: Run, shown: Iterable[tuple], width: int, most: int = 0) -> list[dict]:
    """A user's tapped list against up to `width` ignored ones written for the same interests.

    shown: (data.Impression, interests) in the order in which they are taken. most: pairs of one
    user, 0 for no limit. A list is in one pair.
    """
    expected, k = sum(run.slot_rates.tolist()), run.config.generator.list_size
    groups = defaultdict(lambda: ([], []))  # (user, interests) -> tapped lists, ignored ones
    for row, interests in shown:
        if (interests and len(row.starters) == k  # so that a list's length is no preference
                and (not row.clicked or len(row.clicked) > expected)):  # what slots do not explain
            groups[row.user_id, frozenset(interests)][not row.clicked].append(
                (row.starters, interests))
    pairs = defaultdict(list)  # by user
    for (user_id, _), (tapped, ignored) in groups.items():
        for number, (chosen, interests) in enumerate(tapped):
            others = [starters for starters, _ in ignored[number * width : (number + 1) * width]
                      if {*starters} != {*chosen}]  # else chance alone chose
            if others:
                rejected = {f"ignored {n}": starters for n, starters in enumerate(others, 1)}
                pairs[user_id].append(
                    {"interests": interests, "chosen": chosen, "rejected": rejected})
    return [pair for theirs in pairs.values() for pair in theirs[: most or None]]
