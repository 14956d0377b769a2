"""Every table of the paper on the simulated platform, and claim by claim whether it holds.

    python eval.py --reproduce all --seeds 3       # results/reproduction.md, claims.md, pictures
    python eval.py --reproduce all --quick         # minutes: small, into runs/quick/report
    python eval.py --reproduce 1 9 --seeds 1       # some tables

A seed's main run (train.py's stages) is trained once; a variant starts as a copy of it, so only the
stages that its settings change run again. Everything is resumable; tasks run side by side, one a
core. Settings were chosen on seeds of 100 and above; seeds from 0 on are reported.

What is compared is paired by user: a claim holds where the 95 % interval of the mean difference
(bootstrap over users, within seeds) lies above zero, and does not where it lies below.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import ab
import eval as evaluation
import icebreaker as ib
import isg
import llm
import report
import rid
import train
import world
from config import (
    ROOT,
    Config,
    digest,
    environment,
    load_config,
    read_json,
    write_json,
)
from pipeline import Pipeline, utilities

MAIN = ""  # the variant with the settings as they are
SINGLE = ("utility", "diversity", "joint")
VARIANTS = {  # name -> settings that differ from the seed's main run
    **{f"{kind} negatives only": [f"dpo.negatives=[{kind}]"] for kind in SINGLE},
    "SIT with own lists": ["sit.own_lists=1"],
    "PMA without teacher": ["dpo.teacher_lists=0"],
    "5 rounds": ["dpo.rounds=5"],
    **{f"lambda {x}": [f"dpo.weight={x}"] for x in (0.0, 0.5, 1.0)},
    **{f"beta {x}": [f"dpo.beta={x}"] for x in (0.03, 0.3)},
    "reference SIT": ["dpo.reference=sit"],
}
TABLES = ("1", "2", "3", "6", "7", "8", "9", "figure3", "beyond", "beta")
NEEDS = {  # table -> variants
    "8": ["SIT with own lists", "PMA without teacher"],
    "9": [f"{kind} negatives only" for kind in SINGLE],
    "beyond": [v for v in VARIANTS if v.startswith(("5", "lambda"))],
    "beta": [v for v in VARIANTS if v.startswith(("beta", "reference"))],
}
QUICK = """world.users=200 sit.max_rows=120 sit.epochs=2 dpo.max_users=24 dpo.samples=3
    dpo.checkpoints=1 eval.lists=1 ab.lists=1 rid.epochs=10 ranker.epochs=8""".split()


@dataclass(frozen=True)
class Method:
    """Who writes (a saved adapter of a variant's run) from what (which interests)."""

    adapter: str  # "" the base, "sit", "vanilla", "round1", ..., "last"
    interests: str = "RID"  # "RID", "all" (latest first) or "rule"
    variant: str = MAIN


METHODS = {
    "PE": Method("", "all"),
    "PE+RID": Method(""),
    "SFT": Method("sit"),
    "SFT+DPO": Method("vanilla"),
    "IceBreaker": Method("last"),
    "non-distillation": Method("last", "all"),
    "rule-based": Method("last", "rule"),
    "early": Method("round1"),
    "middle": Method("round2"),
    "latest": Method("round3"),
    "round 4": Method("round4", variant="5 rounds"),
    "round 5": Method("round5", variant="5 rounds"),
    **{name: Method("last", variant=name) for name in VARIANTS if name != "5 rounds"},
}
ONLINE = ("PE", "SFT", "SFT+DPO", "IceBreaker")  # arms beside the deployed retrieval
SEARCHED = ("SFT", "IceBreaker")  # also with list search over several lists, as serve.py does


def seed_config(words: list[str], path: str, seed: int, variant: str) -> Config:
    """The settings of one run; its folder is named after seed and variant."""
    name = "-".join(["reproduce", digest(words)[:6], f"seed{seed}", *variant.split()])
    own = [f"world.seed={seed}", f"run.seed={seed}", f"run.name={name}"]
    if variant:
        own += ["dpo.vanilla=false", *VARIANTS[variant]]
    return load_config(path, [*words, *own])


def train_run(words: list[str], path: str, seed: int, variant: str) -> None:
    """Train a seed's run; a variant starts as hard links to the main one's files."""
    config = seed_config(words, path, seed, variant)
    folder = Path(config.run.root) / config.run.name
    if variant and not folder.exists():
        main = Path(config.run.root) / seed_config(words, path, seed, MAIN).run.name
        shutil.copytree(  # every file of a run is replaced whole, but for the log
            main, folder, copy_function=os.link,
            ignore=shutil.ignore_patterns("metrics.jsonl", "report", "*.tmp"),
        )
    train.run_stages(config, ["dpo"])
    write_starters(Pipeline(config), variant)


# ------------------------------------------------------------------------------- starters, measured


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


def write_starters(p: Pipeline, variant: str) -> None:
    """report/starters.json of a run: the lists of its methods for the test users.

    Methods of the online test write for the judge users too, of whom no method has learned.
    """
    path = p.run / "report" / "starters.json"
    key = digest(train.stage_key(p, "dpo"), p.config.eval.lists, p.config.ab.lists,
                 p.config.ab.searched)  # fmt: skip
    if path.is_file() and read_json(path)["key"] == key:
        return
    made: evaluation.Lists = {}
    for name, method in METHODS.items():
        adapter = adapter_path(p, method.adapter)
        if method.variant != variant or (adapter and not adapter.is_dir()):  # fewer rounds: no such
            continue
        online = name in ONLINE
        users = [u for u in p.ids("test", *["judge"] * online) if p.states[u][-1].interests]
        shown = p.config.ab.searched if name in SEARCHED else p.config.ab.lists
        n = max(p.config.eval.lists, shown * online)
        inputs = [interests_of(p, u, method.interests) for u in users]
        lists = p.write_lists(adapter, inputs, n, p.seed("eval"))
        made[name] = dict(zip(users, lists, strict=True))
    p.encoder.save()
    write_json(path, {"key": key, "lists": made})


def starters_of(config: Config) -> evaluation.Lists:
    path = Path(config.run.root) / config.run.name / "report" / "starters.json"
    return read_json(path)["lists"]


def reranked(p: Pipeline, method: str, lists: dict[str, list[list[str]]]) -> evaluation.Lists:
    """What is chosen at serving time from a method's own starters, by the training ranker."""
    from pyversity import Strategy, diversify

    ranker, k, made = p.ranker("train"), p.config.generator.list_size, {}

    def choose(utility, vectors) -> dict[str, list[int]]:
        n = len(utility)
        if n < k:
            return dict.fromkeys(("list search", "highest utility", "MMR", "DPP"), [*range(n)])
        scaled, weight = ib.min_max(utility[None]), p.config.dpo.weight
        found, _ = ib.list_search(scaled, (vectors @ vectors.T)[None], k, 8, n, weight)
        by_pyversity = {
            kind.name: diversify(
                vectors.numpy(), scaled[0].numpy(), k, kind, diversity=1 - weight
            ).indices.tolist()
            for kind in (Strategy.MMR, Strategy.DPP)
        }
        return {
            "list search": found[0, 0].tolist(), "highest utility": utility.topk(k).indices.tolist()
        } | by_pyversity

    for user, own in lists.items():
        pool = sorted({y for x in own for y in x})
        vectors = p.encoder(pool)
        utility = utilities(ranker, p.states[user][-1], vectors) if pool else torch.zeros(0)
        for name, indices in choose(utility, vectors).items():
            made.setdefault(f"{method}, {name}", {})[user] = [[pool[i] for i in indices]]
    return made


def as_served(p: Pipeline, lists: dict[str, list[list[str]]]) -> dict[str, list[list[str]]]:
    """ab.lists lists of each user: the list search's best of all starters written, the best of the
    rest, and so on, as the server shows them one after another."""
    pools = [sorted({y for x in own for y in x}) for own in lists.values()]
    scored = isg.score_pools(p, p.ranker("train"), [p.states[u][-1] for u in lists], pools)
    k, n = p.config.generator.list_size, p.config.ab.lists
    orders = isg.in_lists(p.config, *scored, lists=n)
    return {
        user: [[pool[j] for j in order[i : i + k]] for i in range(0, min(len(order), n * k), k)]
        for user, pool, order in zip(lists, pools, orders, strict=True)
    }


def floor_and_ceiling(p: Pipeline, truth: world.Truth, lists: evaluation.Lists) -> evaluation.Lists:
    """Random and retrieved starters; and what one who sees the hidden truth would pick."""
    users, k = list(lists["SFT"]), p.config.generator.list_size
    rng = random.Random(p.seed("floor"))
    pool = sorted({y for shown in p.impressions for y in shown.starters})
    deployed = world.retrieved_lists(
        p.config.world, [p.users[u] for u in users], p.config.eval.lists, p.config.run.seed
    )

    def oracle(user: str) -> list[str]:
        written = {y for rows in lists.values() for x in rows.get(user, ()) for y in x}
        candidates, best = sorted(written | {*rng.sample(pool, min(len(pool), 200))}), []
        for _ in range(k):  # greedy: the one that adds most
            rest = [y for y in candidates if y not in best]
            if not rest:
                break
            best.append(max(rest, key=lambda y: truth.expected_clicks(user, [*best, y])))
        return best

    return {
        "random starters": {u: [rng.sample(pool, k)] for u in users},
        "deployed retrieval": deployed,
        "oracle": {u: [oracle(u)] for u in users},
    }


def functional(truth: world.Truth, text: str) -> bool:
    topic = truth.taxonomy.understand(text)[0]
    return bool(topic) and truth.taxonomy.functional(topic)


def interest_values(p: Pipeline, truth: world.Truth, users: list[str]) -> evaluation.PerUser:
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
            "functional": {
                u: float(np.mean([functional(truth, x) for x in xs])) for u, xs in own.items()
            },
        }
    rows = [(chosen["all"][u][::-1], chosen["RID"][u], chosen["rule"][u]) for u in users]
    wins = judge.compare(rows)
    for kind, sign in (("RID", 1), ("rule", -1)):
        made[f"interests: {kind}"]["judge_win"] = {
            u: 0.5 + sign * (w - 0.5) for u, w in zip(users, wins, strict=True) if w is not None
        }
    return made


def shares(truth: world.Truth, texts: list[str]) -> dict[str, float]:
    """Share of texts by topic category, chores apart; texts about nothing known are left out."""
    taxonomy, counts = truth.taxonomy, {}
    for text in texts:
        topic = taxonomy.understand(text)[0]
        if topic:
            name = "Chores" if taxonomy.functional(topic) else taxonomy.category[topic]
            counts[name] = counts.get(name, 0) + 1
    return {name: n / sum(counts.values()) for name, n in sorted(counts.items())}


def matcher_quality(p: Pipeline, truth: world.Truth, users: list[str]) -> dict[str, float]:
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


def few_sessions(p: Pipeline, users: list[str]) -> evaluation.Lists:
    """IceBreaker for test users of whom only the first session, or the first two, were known."""
    made, last = {}, adapter_path(p, "last")
    for n in (1, 2):
        young = Pipeline(p.config)
        young.encoder = p.encoder
        young.users = {u: p.users[u].model_copy(update={"sessions": p.users[u].sessions[:n]})
                       for u in users}
        interests = rid.distil_latest(young)
        inputs = [interests[u] for u in users]
        lists = p.write_lists(last, inputs, p.config.eval.lists, p.seed("eval"))
        made[f"IceBreaker, {n} session{'s' * (n > 1)}"] = dict(zip(users, lists, strict=True))
    return made


def cold_start(p: Pipeline, users: list[str]) -> evaluation.Lists:
    """For test users as if nothing but their profile were known."""
    popular = isg.PopularStarters(p)
    return {"popular starters": {u: [popular(p.users[u].profile)] for u in users}}


def measure_seed(words: list[str], path: str, seed: int, variants: list[str]) -> None:
    """report/values.json of a seed's main run: every value of every method and test user."""
    torch.set_flush_denormal(True)
    llm.quiet_libraries()
    config = seed_config(words, path, seed, MAIN)
    p, truth = Pipeline(config), world.load_truth(Path(config.run.root) / config.run.name / "world")
    written: evaluation.Lists = {}
    for variant in [MAIN, *variants]:
        written |= starters_of(seed_config(words, path, seed, variant))
    users = list(written["rule-based"])
    online = {
        arm: {u: x[: config.ab.lists] for u, x in written[arm].items()} for arm in ONLINE
    } | {f"{arm}, list search": as_served(p, written[arm]) for arm in SEARCHED}
    lists = {
        name: {u: rows[u][: config.eval.lists] for u in users} for name, rows in written.items()
    }
    lists |= floor_and_ceiling(p, truth, lists)
    for method in SEARCHED:
        lists |= reranked(p, method, {u: written[method][u] for u in users})
    lists |= few_sessions(p, users) | cold_start(p, users)
    p.encoder(sorted({y for m in lists.values() for u in m.values() for x in u for y in x}))

    def scorer(name: str):
        ranker = p.ranker(name)
        return lambda u, y: utilities(ranker, p.states[u][-1], p.encoder(y)).numpy()

    judge, training = scorer("judge"), scorer("train")
    classifier = evaluation.TopicClassifier(p.encoder)
    values = evaluation.measure(
        lists, judge, p.encoder, classifier, p.summaries, truth, training
    )
    values |= interest_values(p, truth, users)
    for method in ("SFT", "IceBreaker"):
        values[method]["functional"] = {
            u: float(np.mean([functional(truth, y) for x in lists[method][u] for y in x] or [0.0]))
            for u in users
        }
    taxonomy_texts = {
        "history": [x for u in users for x in interests_of(p, u, "all")],
        "RID": [x for u in users for x in p.states[u][-1].interests],
        **{m: [y for rows in lists[m].values() for x in rows for y in x]
           for m in ("SFT", "IceBreaker", "deployed retrieval")},
    }
    arms = online | {"deployed": world.retrieved_lists(
        config.world, [p.users[u] for u in online["PE"]], config.ab.lists, seed
    )}
    activity = {u: len(p.users[u].sessions) / config.world.days for u in online["PE"]}
    write_json(p.run / "report" / "values.json", {
        "values": values,
        "ab": ab.simulate(truth, activity, arms, config.ab, seed),
        "shares": {name: shares(truth, texts) for name, texts in taxonomy_texts.items()},
        "matcher": matcher_quality(p, truth, p.ids("test")),
        "classifier": classifier.accuracy,
        "rid": p.run.figures("rid"),
        "ranker": p.run.figures("ranker"),
        "cases": cases(p, values, lists, users),
    })
    p.encoder.save()


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


# ---------------------------------------------------------------------------------------- the whole


def reproduce(tables: list[str], seeds: int, path: str, words: list[str], quick: bool) -> None:
    """Train what is missing, measure, and write the report."""
    tables = [t for t in TABLES if t in tables or "all" in tables]
    words, started = [*(QUICK if quick else []), *words], time.time()
    variants = [v for t in tables for v in NEEDS.get(t, [])]
    numbers = list(range(seeds))
    # The base model is one for all; then each seed's main run, its variants, its measurement.
    train.run_stages(seed_config(words, path, 0, MAIN), ["base"])
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started below
    tasks = {}  # name -> (work, its arguments, what is done before, about how long beside others)
    for s in numbers:
        main, made = f"seed {s}", [f"seed {s} {v}" for v in variants]
        tasks[main] = train_run, (words, path, s, MAIN), [], 3.0
        tasks |= {
            name: (train_run, (words, path, s, v), [main], 1.0)
            for name, v in zip(made, variants, strict=True)
        }
        tasks[f"{main} measured"] = measure_seed, (words, path, s, variants), [main, *made], 0.6
    spent = in_parallel(tasks)
    first = seed_config(words, path, 0, MAIN)
    folders = [Path(first.run.root) / seed_config(words, path, s, MAIN).run.name for s in numbers]
    values = [read_json(f / "report" / "values.json") for f in folders]
    log = [json.loads(x) for x in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    out = Path(first.run.root) / "quick" / "report" if quick else ROOT / "results"
    env = environment(first)
    about = {
        "command": f"python eval.py --reproduce {' '.join(tables)} --seeds {seeds}"
        + " --quick" * quick + "".join(f" {w}" for w in words if w not in QUICK),
        "seeds": numbers, "commit": (env["commit"] or "")[:10], "config": digest(first),
        "minutes": (time.time() - started) / 60, "cpu_hours": spent / 3600,
        "processors": os.cpu_count(),
    }
    rows = report.write(values, tables, log, about, out)
    print((out / "reproduction.md").read_text(encoding="utf-8"))
    held = sum(row["verdict"] == "holds" for row in rows)
    print(f"{held} of {len(rows)} claims hold: {out / 'claims.md'}")


def in_parallel(tasks: dict[str, tuple]) -> float:
    """Run tasks, one process a core; returns the seconds of work in all.

    tasks: name -> (work, its arguments, names of the tasks it waits for, relative length).
    """
    spent, started, done, running = 0.0, time.time(), [], {}
    length = {name: task[3] for name, task in tasks.items()}
    with ProcessPoolExecutor(
        min(len(tasks), os.cpu_count()) or 1, multiprocessing.get_context("spawn")
    ) as pool:
        try:
            while len(done) < len(tasks):
                for name, (work, arguments, needs, _) in tasks.items():
                    if name not in [*done, *running.values()] and {*needs} <= {*done}:
                        running[pool.submit(timed, work, arguments)] = name
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    spent += future.result()
                    done.append(running.pop(future))
                    weight = sum(length[name] for name in done)
                    left = (time.time() - started) / weight * (sum(length.values()) - weight) / 60
                    line = f"{len(done)} of {len(tasks)}: {done[-1]}, about {left:.0f} minutes left"
                    print(line, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():  # or it goes on, unseen, for minutes
                child.terminate()
            raise
    return spent


def timed(work, job: tuple) -> float:
    """Seconds of work(*job), its output kept apart: several speak at once."""
    torch.set_num_threads(1)
    started = time.time()
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        work(*job)
    return time.time() - started
