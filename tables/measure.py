"""What the methods of one seed write, and every value of it that a table, claim or picture needs.

    report/starters.json of each run     the lists of its methods (write_starters)
    report/values.json of a main run     all that the report reads (measure_seed)

Section 3 of the paper: metrics of appendix B.1, and what only the simulated world can add to them.
reproduce.py calls both functions in processes of their own, after training.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

import llm
import train
from config import Config
from files import digest, read_json, read_yaml, write_json
from roles.players import Players, players_of
from run import Run, environment
from stages import eval as evaluation
from stages import metrics
from stages.cold_start import PopularStarters
from stages.metrics import Lists, PerUser, TopicClassifier
from stages.sit import taught_lists
from tables import controls, experiments, interests
from tables import truth as hidden
from world import ab, people

RETRIEVAL = "deployed retrieval"  # in the tables; the same lists are the arm ab.CONTROL


def report_folder(config: Config) -> Path:
    return Path(config.run.root) / config.run.name / "report"


def write_starters(config: Config, variant: str) -> None:
    """report/starters.json of a run: the lists of its methods for the test users.

    Methods of the online test write for the judge users too, of whom no method has learned.
    """
    run, path, settings = Run(config), report_folder(config) / "starters.json", config.ab
    methods = {n: m for n, m in experiments.methods().items() if m.variant == variant}
    key = digest(train.stage_key(run, "dpo"), settings.lists, settings.searched,
                 {name: vars(method) for name, method in methods.items()})
    if path.is_file() and read_json(path, key=str)["key"] == key:  # by the same policies, as many
        return
    writer, lists = players_of(run).writer, {}
    pools = -(-settings.lists // controls.better_half(settings.searched))  # that list search needs
    more = pools * settings.searched - settings.lists  # beyond what every method writes
    for name, method in methods.items():
        adapter = run.adapter(method.adapter)
        if adapter and not adapter.is_dir():  # fewer rounds were asked for: no such method
            continue
        # Test users first, and lists beyond ab.lists apart: a user's random numbers are then the
        # same for every method, and equal policies write equal lists.
        users = run.ids("test") + run.ids("judge") * (name in experiments.ONLINE)
        users = [u for u in users if run.states[u][-1].interests]  # others are a cold start
        inputs = [interests.interests_of(run, u, method.interests) for u in users]
        rows = writer.write(adapter, inputs, settings.lists, run.seed("eval"))
        if name in experiments.SEARCHED and more:
            rest = writer.write(adapter, inputs, more, run.seed("eval", "more"))
            rows = [first + second for first, second in zip(rows, rest, strict=True)]
        lists[name] = dict(zip(users, rows, strict=True))
    run.encoder.save()  # what was encoded here need not be again when it is measured
    write_json(path, {"key": key, "lists": lists})


def measure_seed(config: Config, variants: list[Config]) -> None:
    """report/values.json of a seed's main run; variants: of the runs that started as its copies."""
    llm.settle_libraries()
    starters = [read_json(report_folder(c) / "starters.json") for c in (config, *variants)]
    main = starters[0]["lists"]
    written = {method: rows for one in starters for method, rows in one["lists"].items()}
    keep_values(config, starters, lambda: seed_values(Run(config), main, written))


def keep_values(config: Config, written: list[dict], measure: Callable[[], dict]) -> None:
    """Write values.json of a main run, unless this code has measured these lists before.

    written: what write_starters has left in each run, with its key.
    """
    path, key, env = report_folder(config) / "values.json", None, environment(config)
    if env["uncommitted_changes"] is False:  # else the commit does not tell which code measured
        key = digest(env["commit"], env["versions"], config, [one["key"] for one in written])
        if path.is_file() and read_json(path, key=str | None).get("key") == key:
            return
    write_json(path, {"key": key, **measure()})


def seed_values(run: Run, main: Lists, written: Lists) -> dict:
    """What values.json holds but its key. main: starters of the seed's main run; written: those,
    and its variants'."""
    config, truth = run.config, people.load_truth(run.folder / "world")
    players = players_of(run)  # teacher and judge
    online = online_lists(run, players, main)
    lists = compared_lists(run, players, truth, main, written, online)
    users = list(lists[RETRIEVAL])  # the test users
    pools = {m: {u: main[m][u][: config.ab.searched] for u in users} for m in experiments.SEARCHED}
    chosen = {method: controls.reranked(run, method, pool) for method, pool in pools.items()}
    for rows in chosen.values():
        lists |= rows
    classifier = TopicClassifier(run.encoder)
    values = values_of_lists(run, truth, lists, classifier)
    told = {kind: {u: interests.interests_of(run, u, kind) for u in users}
            for kind in ("all", "rule", "RID")}
    values |= interests.interest_values(players, truth, told)
    for method, pool in pools.items():
        for name, by_user in controls.search_values(run, pool, chosen[method]).items():
            values[name]["value"] = by_user
    # Figure 3: what users spoke of, what RID kept of it, and what is written from that.
    texts = {"history": told["all"], "RID": told["RID"]}
    for method in ("IceBreaker", RETRIEVAL):
        texts[method] = {u: [y for row in rows for y in row] for u, rows in lists[method].items()}
    activity = {u: len(run.users[u].sessions) / config.world.days for u in online["PE"]}  # per day
    figures = {
        "values": values,
        "ab": ab.simulate(truth, activity, online, config.ab, config.run.seed),
        "topics": {stage: {u: hidden.topics(truth, theirs) for u, theirs in rows.items()}
                   for stage, rows in texts.items()},
        "cases": cases(run, values, lists, users),
        "basis": basis(run, truth, classifier, users, texts["IceBreaker"])}
    run.encoder.save()
    return figures


def online_lists(run: Run, players: Players, main: Lists) -> Lists:
    """What every arm of the online test shows its people."""
    config, users = run.config, list(main["PE"])  # test and judge
    online = {arm: main[arm] for arm in experiments.ONLINE}
    for arm in experiments.SEARCHED:
        online[f"{arm}, list search"] = controls.searched_in_turn(run, main[arm])
    # The teacher writes from RID's interests, too: it is what SFT imitates.
    taught = taught_lists(
        run, players, [run.states[u][-1] for u in users], config.ab.lists, "compare")
    online["teacher"] = dict(zip(users, taught, strict=True))
    online[ab.CONTROL] = people.retrieved_lists(
        config.world, [run.users[u] for u in users], config.ab.lists, config.run.seed)
    return online


def compared_lists(run: Run, players: Players, truth: people.Truth, main: Lists, written: Lists,
                   online: Lists) -> Lists:
    """What every method shows the test users."""
    users = list(main["rule-based"])
    lists = {  # as many of every method: what was written for list search is left out
        name: {u: rows[u][: run.config.ab.lists] for u in users}
        for name, rows in {**written, "teacher": online["teacher"]}.items()}
    lists |= controls.few_sessions(run, players.writer, users)
    popular = PopularStarters(run)  # as if nothing were known but the profile, when serving
    lists["popular starters"] = {u: [popular(run.users[u].profile)] for u in users}
    # Of the variants' lists the oracle sees none: it is the same whichever tables are wanted.
    seen = {method: lists[method] for method in (*main, "teacher", "popular starters")}
    lists |= controls.floor_and_ceiling(run, truth, users, seen)
    lists[RETRIEVAL] = {u: online[ab.CONTROL][u] for u in users}
    return lists


def values_of_lists(run: Run, truth: people.Truth, lists: Lists,
                    classifier: TopicClassifier) -> PerUser:
    """The metrics of the paper and those of the hidden truth, of every method and test user."""
    whole = {user: run.histories[user][-1].texts for user in lists[RETRIEVAL]}
    values = evaluation.measure(run, lists, classifier, whole, truth)
    for method in lists:
        values[method] |= hidden.spoken_of(truth, lists[method])
    # Distinct starters: a chore that every list repeats is one.
    starters = {u: controls.pool_of(rows) for u, rows in lists["IceBreaker"].items()}
    values["IceBreaker"]["functional"] = hidden.chore_shares(truth, starters)  # Figure 3
    # Departure 13: keywords weighed by the compared lists themselves, beside the fixed corpus.
    compared = [lists[method] for method in read_yaml("configs/paper.yaml")["table1"]]
    count = metrics.KeywordCounter(
        [y for users in compared for rows in users.values() for y in controls.pool_of(rows)])
    for method in ("SFT", "IceBreaker"):
        values[method]["lexical_compared"] = {
            u: float(np.mean([count(y) for y in rows])) for u, rows in lists[method].items()}
    return values


def cases(run: Run, values: PerUser, lists: Lists, users: list[str]) -> list[dict]:
    """Users at the 10th, 50th and 90th percentile of IceBreaker's lift over SFT (Table 3)."""
    lifts = metrics.user_values(values, "IceBreaker", "r_score", "SFT")
    order = sorted(users, key=lifts.get)
    chosen = {percentile: order[percentile * len(order) // 100] for percentile in (10, 50, 90)}
    return [
        {"percentile": percentile, "lift": lifts[user],
         "summaries": run.histories[user][-1].texts[::-1][:12],  # the latest first
         "interests": run.states[user][-1].interests,
         "starters": {m: lists[m][user][0] for m in (RETRIEVAL, "SFT", "IceBreaker")}}
        for percentile, user in chosen.items()]


def basis(run: Run, truth: people.Truth, classifier, users: list[str], texts: dict) -> dict:
    """What the other figures rest on: scorer, rankers, matcher, classifier, gate, rounds.

    texts: user -> IceBreaker's starters.
    """
    config, starters = run.config, [y for theirs in texts.values() for y in theirs]
    kept = np.array([len(run.states[u][-1].interests) for u in users])
    return {
        "rid": run.folder.figures("rid"),  # AUC of the scorer and of its baselines
        "ranker": run.folder.figures("ranker"),  # AUC and ECE of both
        "matcher": hidden.matcher_quality(run, truth, run.ids("test")),
        "classifier": classifier.accuracy,
        "classifier_on_starters": hidden.classifier_accuracy(truth, classifier, starters),
        # The gate can act only where more pass it than it must keep.
        "above_least": float((kept > config.rid.min_keep).mean())}
