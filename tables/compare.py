"""What a reproduction compares its methods with, and measures beside the metrics of eval.py.

Rerankers over a method's own lists, a floor and a ceiling, users with few sessions; the worth of
interests, topics, cases. reproduce.py brings the lists, after training. The simulated
world's hidden truth is seen here, in eval.py, ab.py and reproduce.py, and by no stage that trains.
"""

from __future__ import annotations

import random
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch

import eval as evaluation
import icebreaker as ib
from config import AbConfig, read_json
from pipeline import Pipeline, utilities
from stages import isg, rid
from world import people

SWEEP = (0.1, 0.5)  # lambdas of choosing when serving, beside dpo.weight


def interests_of(p: Pipeline, user: str, kind: str) -> list[str]:
    """What a method is told of a user today."""
    history, state = p.histories[user][-1], p.states[user][-1]
    if kind == "all":
        return history.texts[::-1]
    if kind == "RID":
        return state.interests
    # Rule-based (Table 6): frequency and recency, ranks added; as many as RID keeps, no twins.
    score = sum(
        torch.argsort(torch.argsort(rank(history), stable=True), stable=True).double()
        for rank in (ib.frequency_scores, ib.recency_scores)
    )
    keep = ib.distil(
        score.numpy(), float("inf"), len(state.interests), len(state.interests),
        history.embeddings, p.config.rid.duplicate_cosine,
    )
    return [history.texts[i] for i in keep]


def adapter_path(p: Pipeline, name: str) -> Path | None:
    if not name:
        return None
    name = f"round{p.config.dpo.rounds}" if name == "last" else name
    return (p.run / "sit" if name == "sit" else p.run / "dpo" / name) / "adapter"


def pool_of(lists: list[list[str]]) -> list[str]:
    """All starters of some lists, each once."""
    return sorted({y.casefold(): y for x in lists for y in x}.values())


def searched(
    p: Pipeline, lists: dict[str, list[list[str]]], n: int, **settings
) -> dict[str, list[list[str]]]:
    """At most n full lists of each user: the list search's best of all starters that were written
    (by the training ranker), the best of the rest, and so on, as the server orders them.

    settings: of config.dpo, such as beam and weight, where they differ from the run's.
    """
    pools, k = [*map(pool_of, lists.values())], p.config.generator.list_size
    config = p.config.model_copy(
        update={"dpo": p.config.dpo.model_copy(update=settings)}
    )
    states = [p.states[u][-1] for u in lists]
    orders = isg.in_lists(config, *isg.score_pools(p, p.ranker("train"), states, pools), lists=n)
    made = {}
    for user, pool, order in zip(lists, pools, orders, strict=True):
        rows = [[pool[j] for j in order[i : i + k]] for i in range(0, len(order), k)][:n]
        made[user] = [x for x in rows if len(x) == k] or rows
    return made


def online_lists(settings: AbConfig) -> tuple[int, int]:
    """(lists to write for an arm with list search, lists that it keeps of each ab.searched)."""
    kept = -(-settings.searched // 2)
    return -(-settings.lists // kept) * settings.searched, kept


def searched_in_turn(p: Pipeline, lists: dict[str, list[list[str]]]) -> dict[str, list[list[str]]]:
    """ab.lists lists of each user: what `searched` finds in the first ab.searched lists that were
    written, in the next ones, and so on."""
    written, kept = online_lists(p.config.ab)
    n, made = p.config.ab.searched, {user: [] for user in lists}
    for start in range(0, written, n):
        pools = {user: rows[start : start + n] for user, rows in lists.items()}
        for user, found in searched(p, pools, kept).items():
            made[user] += found
    return {user: rows[: p.config.ab.lists] for user, rows in made.items()}


def reranked(p: Pipeline, method: str, lists: dict[str, list[list[str]]]) -> evaluation.Lists:
    """One list of each user, chosen when serving from a method's own, by the training ranker.

    With dpo.weight as lambda, or with one of SWEEP; with 1 all would choose the highest utility.
    """
    from pyversity import Strategy, diversify

    def first(lists, **settings) -> dict[str, list[list[str]]]:
        return {u: rows or [[]] for u, rows in searched(p, lists, 1, **settings).items()}

    ranker, k = p.ranker("train"), p.config.generator.list_size
    weights = {"": p.config.dpo.weight} | {f", lambda {x}": x for x in SWEEP}
    made: evaluation.Lists = {
        f"{method}, list search{end}": first(lists, weight=x) for end, x in weights.items()
    }
    made[f"{method}, list search, beam 1"] = first(lists, beam=1)
    made[f"{method}, list search, all tried"] = first(lists, expand=1000)  # at each slot
    for n in (1, 2, 4):
        some = {u: own[:n] for u, own in lists.items()}
        made[f"{method}, list search of {n}"] = first(some)
    for user, own in lists.items():
        pool = pool_of(own)
        vectors = p.encoder(pool)
        utility = utilities(ranker, p.states[user][-1], vectors) if pool else torch.zeros(0)
        found = {"highest utility": utility.topk(min(k, len(pool))).indices.tolist()}
        for kind, (end, x) in product((Strategy.MMR, Strategy.DPP), weights.items()):
            found[name := kind.name + end] = [*range(len(pool))]
            if len(pool) > k:
                scaled = ib.min_max(utility[None])[0].numpy()
                chosen = diversify(vectors.numpy(), scaled, k, kind, diversity=1 - x)
                found[name] = chosen.indices.tolist()
        for name, indices in found.items():
            made.setdefault(f"{method}, {name}", {})[user] = [[pool[i] for i in indices]]
    return made


def search_values(
    p: Pipeline, lists: dict[str, list[list[str]]], chosen: evaluation.Lists
) -> dict[str, dict[str, float]]:
    """method -> user -> lambda U + (1 - lambda) D of the list chosen: what list search makes large.

    lists: all that were written for a user, within which utilities are min-max scaled.
    """
    ranker, weight, made = p.ranker("train"), p.config.dpo.weight, {m: {} for m in chosen}
    for user, own in lists.items():
        def utility(starters: list[str], user=user) -> torch.Tensor:
            return utilities(ranker, p.states[user][-1], p.encoder(starters))

        pool = utility(pool_of(own)) if pool_of(own) else torch.zeros(1)
        low, width = pool.min(), (pool.max() - pool.min()).clamp_min(1e-9)
        for method, rows in chosen.items():
            starters, value = rows[user][0], 0.0
            if starters:
                vectors = p.encoder(starters)
                value = weight * float(((utility(starters) - low) / width).mean())
                if len(starters) > 1:
                    value += (1 - weight) * float(ib.list_diversity(vectors @ vectors.T))
            made[method][user] = value
    return made


def floor_and_ceiling(
    p: Pipeline, truth: people.Truth, users: list[str], written: evaluation.Lists
) -> evaluation.Lists:
    """Random starters; and what one who sees the hidden truth would pick, greedily, of all in
    `written` and 200 shown ones."""
    k, n, rng = p.config.generator.list_size, p.config.ab.lists, random.Random(p.seed("floor"))
    pool = sorted({y for shown in p.impressions for y in shown.starters})

    def oracle(user: str) -> list[str]:
        own = pool_of([x for rows in written.values() for x in rows.get(user, ())])
        candidates, best = sorted({*own, *rng.sample(pool, min(len(pool), 200))}), []
        for _ in range(k):  # greedy: the one that adds most
            rest = [y for y in candidates if y not in best]
            if not rest:
                break
            best.append(max(rest, key=lambda y: truth.expected_clicks(user, [*best, y])))
        return best

    return {
        "random starters": {u: [rng.sample(pool, k) for _ in range(n)] for u in users},
        "oracle": {u: [oracle(u)] for u in users},
    }


def taught(p: Pipeline, users: list[str], n: int) -> evaluation.Lists:
    """n lists of each user by the teacher, from RID's interests: what SFT imitates."""
    rows = isg.teacher_lists(p, [p.states[u][-1] for u in users], n, "compare")
    return dict(zip(users, rows, strict=True))


def few_sessions(p: Pipeline, users: list[str]) -> evaluation.Lists:
    """IceBreaker for test users of whom only the last session, or the last two, were known.

    The rankers, who judge, know the whole history.
    """
    made, last = {}, adapter_path(p, "last")
    for n in (1, 2):
        young = Pipeline(p.config)
        young.encoder = p.encoder
        young.users = {u: p.users[u].model_copy(update={"sessions": p.users[u].sessions[-n:]})
                       for u in users}
        interests = rid.distil_latest(young)
        inputs = [interests[u] for u in users]
        lists = p.write_lists(last, inputs, p.config.ab.lists, p.seed("eval"))
        made[f"IceBreaker, {n} session{'s' * (n > 1)}"] = dict(zip(users, lists, strict=True))
    return made


def cold_start(p: Pipeline, users: list[str]) -> evaluation.Lists:
    """For test users as if nothing but their profile were known: the same for equal profiles."""
    popular = isg.PopularStarters(p)
    return {"popular starters": {u: [popular(p.users[u].profile)] for u in users}}


def functional(truth: people.Truth, text: str) -> bool:
    topic = truth.taxonomy.understand(text)[0]
    return bool(topic) and truth.taxonomy.functional(topic)


def topics(truth: people.Truth, texts: list[str]) -> Counter[str]:
    """Number of texts by topic category, chores apart; texts about nothing known do not count."""
    taxonomy = truth.taxonomy
    known = [topic for text in texts if (topic := taxonomy.understand(text)[0])]
    return Counter(
        "Chores" if taxonomy.functional(topic) else taxonomy.category[topic] for topic in known
    )


def spoken_of(
    truth: people.Truth, lists: dict[str, list[list[str]]]
) -> dict[str, dict[str, float]]:
    """Of each user's starters: the share about something known, and the resonance, by the truth."""
    pools = {u: [y for x in rows for y in x] for u, rows in lists.items()}
    pools = {u: pool for u, pool in pools.items() if pool}
    known = truth.taxonomy.understand
    return {
        "known": {u: float(np.mean([bool(known(y)[0]) for y in ys])) for u, ys in pools.items()},
        "resonance": {
            u: float(np.mean([truth.resonance(u, y) for y in ys])) for u, ys in pools.items()
        },
    }


def chores(truth: people.Truth, texts: dict[str, list[str]]) -> dict[str, float]:
    """Share of chores among each user's texts; users of whom no text is understood are left out."""
    known = {u: made for u, own in texts.items() if (made := topics(truth, own))}
    return {u: made["Chores"] / made.total() for u, made in known.items()}


def interest_values(p: Pipeline, truth: people.Truth, users: list[str]) -> evaluation.PerUser:
    """Of the interests by each distillation: resonance by the hidden truth, share of chores, and
    wins in the judge's pairwise comparison with the rule-based ones (Table 6)."""
    judge = p.interest_judge()
    made: evaluation.PerUser = {}
    chosen = {kind: {u: interests_of(p, u, kind) for u in users} for kind in ("all", "rule", "RID")}
    for kind, own in chosen.items():
        made[f"interests: {kind}"] = {
            "resonance": {
                u: float(np.mean([truth.resonance(u, x) for x in xs])) for u, xs in own.items()
            },
            "functional": chores(truth, own),
        }
    rows = [(chosen["all"][u][::-1], chosen["RID"][u], chosen["rule"][u]) for u in users]
    wins = judge.compare(rows)
    for kind, sign in (("RID", 1), ("rule", -1)):
        made[f"interests: {kind}"]["judge_win"] = {
            u: 0.5 + sign * (w - 0.5) for u, w in zip(users, wins, strict=True) if w is not None
        }
    return made


def matcher_quality(p: Pipeline, truth: people.Truth, users: list[str]) -> dict[str, float]:
    """Precision and recall of `match` against hidden subjects, all cuts of these users."""
    labels = read_json(p.run / "match" / "revisited.json")
    understand, counts = truth.taxonomy.understand, {"tp": 0, "fp": 0, "fn": 0}
    for user in users:
        for cut, row in enumerate(labels[user]):
            later = [understand(s.summary) for s in p.parts(user, cut)[1]]
            for text, label in zip(p.histories[user][cut].texts, row, strict=True):
                topic, subjects, _ = understand(text)
                real = any(t == topic and subjects & s for t, s, _ in later)
                real &= not functional(truth, text)  # a chore is no interest
                if label >= 0 and (label or real):
                    counts["tp" if label and real else "fp" if label else "fn"] += 1
    tp = counts["tp"]
    return {
        "precision": tp / max(1, tp + counts["fp"]), "recall": tp / max(1, tp + counts["fn"])
    }


def classifier_accuracy(truth: people.Truth, classifier, texts: list[str]) -> float:
    """Share of the texts about something known to whose topic the classifier gives its category."""
    real = {text: category for text in texts if (category := truth.category(text))}
    guessed = classifier.categories([*real])
    return float(np.mean([a == b for a, b in zip(guessed, real.values(), strict=True)]))


def cases(p: Pipeline, values, lists, users: list[str]) -> list[dict]:
    """Users at the 10th, 50th and 90th percentile of IceBreaker's lift over SFT (Table 3)."""
    gain = {u: values["IceBreaker"]["utility"][u] - values["SFT"]["utility"][u] for u in users}
    order = sorted(users, key=gain.get)
    return [
        {
            "percentile": q, "lift": gain[u], "summaries": p.histories[u][-1].texts[::-1][:12],
            "interests": p.states[u][-1].interests,
            "starters": {m: lists[m][u][0] for m in ("deployed retrieval", "SFT", "IceBreaker")},
        }
        for q in (10, 50, 90) for u in [order[q * len(order) // 100]]
    ]
