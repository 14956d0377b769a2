"""What people were shown and tapped becomes a further round of training.

    python train.py --stage ranker --stage dpo data.feedback=runs/tiny/serve.sqlite

Goes on from the newest policy of a finished run. `ranker` fits r_util (Eq. 7) again, on the run's
log and on what the server (serve.py) has shown; `dpo` is one more round as in isg.py, for people of
the store, with pairs of a tapped and an ignored list beside the mined ones. Then both are checked
on people whom they do not know. All is in feedback/round<m>/ of the run; a server of this run takes
up what feedback/current.json names, which is written when the check is passed.

The check (`check`, `fallen`): the new policy and the one that it would replace write lists for
held-out users, and a ranker judges them that is fitted, on log and store, on the judge users: not
on those who trained, not on those who are written for. Utility and diversity, of lists as written
and as served (searched by each side's own ranker), are compared user by user. A figure has fallen
if its mean fell by more than MARGIN of what it was, or if the 95 % bootstrap interval of the paired
difference lies below zero. One figure that has fallen refuses the round. Each round is compared
with the one before it, so small falls can add up: verdict.json has the figures of every round.

Nobody steers a round: dpo.pairs_per_user pairs, LISTS_PER_USER lists for a ranker, and one prompt
to write for are all that can come from one user; a hash chooses, not the order of arrival. A user's
split is that of the run, from the same hash: train users train, judge users fit the judge, valid
users choose the checkpoint and are written for in the check; the run's test users stay out, and
people of that hash whom the run does not know train.

Texts of the store's users are kept in the store alone, where they can be deleted: a round leaves
weights and figures. Each round reads the whole store anew.

Legend: m number of a round, K list slots.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import numpy as np
from pipeline import Pipeline, State, short

import data
import llm
from config import (
    Config,
    RunFolder,
    UserError,
    digest,
    file_digest,
    gather,
    load_config,
    processes,
    read_json,
    write_json,
)
from eval import bootstrap_interval
from serving.store import Store
from stages import isg

LISTS_PER_USER = 20  # for a ranker: about as many as people of the simulated log have
MARGIN = 0.05  # of a figure's value before; a fall of more refuses the round
# Settings in which a further round must agree with its run, beside dpo.rounds and run.seed.
AGREED = ("data", "world", "encoder", "rid", "generator", "base", "sit")


def current(run: RunFolder, rounds: int) -> dict | None:
    """The newest accepted policy: {"adapter", "ranker", "version"}, paths within the run.

    That of feedback, unless the run's own `rounds` of DPO were trained again since; None if the run
    has neither.
    """
    adapter = f"dpo/round{rounds}/adapter"
    if not (run / adapter).is_dir():
        return None
    published = run / "feedback" / "current.json"
    if published.is_file() and (found := read_json(published))["run"] == _run_key(run):
        return found
    weights = file_digest(run / adapter / "adapter_model.safetensors")
    version = f"round{rounds}-{weights[:8]}"
    return {"adapter": adapter, "ranker": "ranker/train.safetensors", "version": version}


def _run_key(run: RunFolder) -> str:
    return read_json(run / "dpo" / "done.json")["key"]


# ------------------------------------------------------------------------------- before it begins


def train_round(config: Config, wanted: list[str], free: Iterable[str]) -> None:
    """Train, check and perhaps publish one round; go on with one that was interrupted.

    free: settings (section.key) in which the round may differ from its run. Raises UserError if
    there is nothing to train from or to go on from.
    """
    p, started = _ready(config, wanted, free), time.time()
    first = processes()[0] == 0
    rows = gather([_read(config)] if first else [])[0]
    rows.sort(key=lambda x: digest(config.run.seed, x["user_id"], x["at"]))  # not as they came
    lists = _by_split(p, rows)
    if not any(x["clicked"] for x in lists["train"]):
        raise UserError(
            f"data.feedback={config.data.feedback}: no tap by a user of the train split, so there "
            f"is nothing to learn yet ({len(rows)} lists were shown, {len(lists['train'])} of them "
            f"to such users); try again when more was tapped"
        )
    settings = config.ranker, config.dpo, config.run.seed, config.roles, config.serve.candidates
    key = digest(rows, *settings, config.eval.bootstrap, _run_key(p.run))
    number = gather([_begin(p, key)] if first else [])[0]
    name, folder = f"feedback round {number}", f"feedback/round{number}"
    if (p.run / folder / "verdict.json").is_file():
        reason = read_json(p.run / folder / "verdict.json")["reason"]
        print(f"{name}: already done with this store and these settings: {reason}")
        return
    start = read_json(p.run / folder / "round.json")["start"]
    users, taps = len({x["user_id"] for x in rows}), sum(len(x["clicked"]) for x in rows)
    print(f"{name}: {len(rows)} lists of {users} users, {taps} taps; from {start['version']}")
    # All at once: vectors differ by rounding where a resumed round encodes in other batches.
    p.encoder(sorted({y for x in rows for y in (*x["starters"], *x["interests"])}))
    stages = {"ranker": _fit_rankers, "dpo": _improve}
    for stage in ("ranker", "dpo") if "dpo" in wanted else ("ranker",):
        if p.run.is_done(f"{folder}/{stage}", key):
            print(f"{stage}: already done with this store and these settings, skipped")
            continue
        print(f"{stage}: running", flush=True)
        figures = stages[stage](p, number, start, lists) if first or stage == "dpo" else {}
        p.run.mark_done(f"{folder}/{stage}", key, **figures)
        print(f"{stage}: {short(figures)}", flush=True)
    if "dpo" not in wanted:
        print(f"{name}: now --stage dpo, with the same data.feedback")
        return
    verdict = _publish(p, number, start, check(p, folder, start, _held_out(p, lists)))
    seconds = round(time.time() - started, 1)
    p.run.log("feedback", round=number, accepted=verdict["accepted"], seconds=seconds)
    print(f"{name}: {verdict['reason']} ({seconds} s; figures in {p.run / folder})")


def _publish(p: Pipeline, number: int, start: dict, verdict: dict) -> dict:
    """Write the verdict and, if the round is accepted, what servers are to take up."""
    folder = f"feedback/round{number}"
    if verdict["accepted"]:
        weights = file_digest(p.run / folder / "adapter" / "adapter_model.safetensors")
        now = {
            "round": number,
            "adapter": f"{folder}/adapter",
            "ranker": f"{folder}/ranker/train.safetensors",
            "version": f"feedback{number}-{weights[:8]}",
            "run": _run_key(p.run),
        }
        # Before the verdict, which ends the round: one that was killed between is checked again.
        write_json(p.run / "feedback" / "current.json", now)
        verdict["reason"] = f"accepted as {now['version']}: {verdict['reason']}"
    else:
        verdict["reason"] = f"refused, {start['version']} stays: {verdict['reason']}"
    write_json(p.run / folder / "verdict.json", verdict)
    return verdict


def _ready(config: Config, wanted: list[str], free: Iterable[str]) -> Pipeline:
    """The pipeline, if the run is there and this command fits it."""
    if others := [x for x in wanted if x not in ("ranker", "dpo")]:
        raise UserError(
            f"data.feedback: a further round has the stages ranker and dpo alone, not "
            f"{', '.join(others)}; say --stage ranker --stage dpo, or leave data.feedback out"
        )
    if not Path(config.data.feedback).is_file():
        raise UserError(
            f"data.feedback={config.data.feedback}: no such file; it is the store of a server "
            f"(serve.py), serve.sqlite in its run's folder unless serve.store names another"
        )
    folder = Path(config.run.root) / config.run.name
    for stage in ("rid", "ranker", "sit", "dpo"):
        if not (folder / stage / "done.json").is_file():
            raise UserError(
                f"{folder}: stage {stage} has not run, and data.feedback goes on from a finished "
                f"run; python train.py --stage dpo first, without data.feedback"
            )
    saved = load_config(folder / "config.yaml")
    pairs = [(config.dpo, saved.dpo, "dpo", "rounds"), (config.run, saved.run, "run", "seed")]
    pairs += [
        (getattr(config, section), getattr(saved, section), section, field)
        for section in AGREED
        for field in type(getattr(config, section)).model_fields
    ]
    for now, then, section, name in pairs:
        if getattr(now, name) != getattr(then, name) and f"{section}.{name}" not in free:
            raise UserError(
                f"{section}.{name}={getattr(now, name)}: the run was trained with "
                f"{getattr(then, name)!r}; --config {folder}/config.yaml has all its settings"
            )
    p = Pipeline(config, describe=False)
    if not current(p.run, config.dpo.rounds):
        raise UserError(
            f"{folder}: was trained without impressions (data.impressions), so it has no ranker "
            f"and no DPO round to go on from"
        )
    p.answers = Path(":memory:")  # an LLM's answers for the store's users are not kept either
    return p


def _read(config: Config) -> list[dict]:
    """Every list that was shown, as JSON holds it; the store may be in use by a server."""
    path = config.data.feedback
    try:
        store = Store(path)
    except UserError as error:
        raise UserError(f"data.feedback: {error}; give the store of a server (serve.py)") from None
    try:
        rows = [{**dataclasses.asdict(x), "at": x.at.isoformat()} for x in store.shown()]
    finally:
        store.close()
    if not rows:
        raise UserError(
            f"data.feedback={path}: no list was shown yet; clients say so by POST /v1/events"
        )
    return rows


def _by_split(p: Pipeline, rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of each split's users: that of the run, from the same hash."""
    shares = {name: getattr(p.config.data, name) for name in ("train", "valid", "judge", "test")}
    splits = data.split_users({x["user_id"] for x in rows}, shares, p.config.run.seed)
    lists: dict[str, list[dict]] = {name: [] for name in shares}
    for row in rows:
        split, known = splits[row["user_id"]], row["user_id"] in p.users
        # Figures on test users are of the run, so only its own people have to stay out.
        lists["train" if split == "test" and not known else split].append(row)
    return lists


def _begin(p: Pipeline, key: str) -> int:
    """The number of the round with this key, which is new or was begun before."""
    folder, now = p.run / "feedback", current(p.run, p.config.dpo.rounds)
    begun = {int(f.parent.name[5:]): read_json(f)["key"] for f in folder.glob("round*/round.json")}
    for number, other in begun.items():
        if other == key:
            return number
    last = max(begun, default=0)
    finished = (folder / f"round{last}" / "verdict.json").is_file() or now.get("round") == last
    if last and not finished:  # killed, and the store or the settings are other ones now
        shutil.rmtree(folder / f"round{last}")
        last -= 1
    settings = {name: vars(getattr(p.config, name)) for name in ("ranker", "dpo")}
    write_json(folder / f"round{last + 1}" / "round.json", {"key": key, "start": now, **settings})
    return last + 1


# ----------------------------------------------------------------------------------- ranker, dpo


def states_of(p: Pipeline, rows: list[dict], moments: int) -> tuple[list[tuple], dict[str, State]]:
    """Of each user the first `moments` lists, each with the State of its moment; and the latest
    State of everybody who had interests.

    The taste is of what was shown before, by the run's log and by the store.
    """
    own, logged = defaultdict(list), defaultdict(list)
    for row in rows:
        own[row["user_id"]].append(row)
    for impression in p.impressions:
        if impression.user_id in own:
            logged[impression.user_id].append(impression)
    lists, latest = [], {}
    for user_id, shown in own.items():
        seen = [data.Impression(timestamp=x["at"], **x) for x in shown]
        times = [x.timestamp for x in seen[:moments]]
        *tastes, taste = p.tastes_at([*times, datetime.max], logged[user_id] + seen)
        lists += [
            (impression, _state(p, user_id, row["interests"], before))
            for impression, row, before in zip(seen[:moments], shown, tastes, strict=False)
        ]
        if told := [x for x in shown if x["interests"]]:
            interests = max(told, key=lambda x: x["at"])["interests"]
            latest[user_id] = _state(p, user_id, interests, taste)
    by_hash = sorted(latest, key=lambda u: digest(p.config.run.seed, u))
    return lists, {u: latest[u] for u in by_hash}


def _state(p: Pipeline, user_id: str, interests: list[str], taste) -> State:
    return State(user_id, interests, [0.0] * len(interests), p.encoder(interests), taste)


def _fit_rankers(p: Pipeline, number: int, start: dict, lists: dict[str, list[dict]]) -> dict:
    """Both rankers, as stage ranker fits them, on the run's log and the store's lists."""
    everything = {
        name: isg.shown_lists(p, p.ids(name)) + states_of(p, lists[name], LISTS_PER_USER)[0]
        for name in ("train", "judge", "test")
    }
    return isg.fit_rankers(p, everything, f"feedback/round{number}/ranker")


def _improve(p: Pipeline, number: int, start: dict, lists: dict[str, list[dict]]) -> dict:
    """One more round of DPO, from the policy of `start`."""
    folder, rng = f"feedback/round{number}", random.Random(p.seed("users", "feedback", number))
    limit, latest = p.config.dpo.max_users, states_of(p, lists["train"], 0)[1]
    states = [*latest.values()][: limit or None]
    others = [s for s in isg.chosen_states(p, [-1], 0, rng) if s.user_id not in latest]
    room = limit - len(states) if limit else len(others)
    states += rng.sample(others, min(room, len(others)))  # the run's people, for the rest
    tapped = tapped_pairs(p, lists["train"])
    earlier = [
        pair
        for i in range(1, p.config.dpo.rounds + 1)
        for pair in read_json(p.run / "dpo" / f"round{i}" / "pairs.json")
    ]
    adapter, ranker = p.run / start["adapter"], p.ranker("train", f"{folder}/ranker")
    model = p.policy(adapter, trainable=True)
    held = [*_held_out(p, lists).values()]
    name = f"feedback {number}"
    pairs = earlier + tapped
    made, _ = isg.improve(p, name, model, adapter, ranker, states, held, pairs, keep=False)
    llm.save_adapter(model, p.run / folder / "adapter")
    return {"store_users": sum(s.user_id in latest for s in states), "tapped": len(tapped), **made}


def tapped_pairs(p: Pipeline, rows: list[dict]) -> list[dict]:
    """A user's tapped list against an ignored one that was written for the same interests.

    Tapped: more than its slots explain. Lists of K starters alone, so that the length of a list is
    no preference. At most dpo.pairs_per_user of a user, in the order of `rows`; a list is in one.
    """
    rates, k = p.slot_rates.tolist(), p.config.generator.list_size
    alike: dict[tuple, tuple[list, list]] = defaultdict(lambda: ([], []))
    for row in rows:
        surplus = len(row["clicked"]) - sum(rates)
        if row["interests"] and len(row["starters"]) == k and (surplus > 0 or not row["clicked"]):
            tapped, ignored = alike[row["user_id"], frozenset(row["interests"])]
            (tapped if row["clicked"] else ignored).append(row)
    pairs = defaultdict(list)
    for (user_id, _), (tapped, ignored) in alike.items():
        for good, bad in zip(tapped, ignored, strict=False):
            if {*good["starters"]} != {*bad["starters"]}:
                rejected = {"ignored": bad["starters"]}
                pairs[user_id].append(
                    {"interests": good["interests"], "chosen": good["starters"],
                     "rejected": rejected}
                )  # fmt: skip
    return [x for own in pairs.values() for x in own[: p.config.dpo.pairs_per_user]]


# --------------------------------------------------------------------------------------- the check


def _held_out(p: Pipeline, lists: dict[str, list[dict]]) -> dict[str, State]:
    """Users of no ranker and no pair as they are now: the run's, dpo.max_users of the store."""
    run = {u: s for u in p.ids("valid") if (s := p.states[u][-1]).interests}
    store = states_of(p, lists["valid"], 0)[1]
    return run | dict([*store.items()][: p.config.dpo.max_users or None])


def check(p: Pipeline, folder: str, start: dict, held: dict[str, State]) -> dict:
    """What became of utility and diversity on held-out users; see the head of this file."""
    states, judge = [*held.values()], p.ranker("judge", f"{folder}/ranker")
    sides = {
        "before": (p.run / start["adapter"], p.ranker("train", str(Path(start["ranker"]).parent))),
        "after": (p.run / folder / "adapter", p.ranker("train", f"{folder}/ranker")),
    }
    n, seed, figures = p.config.serve.candidates, p.seed("feedback", "check"), {}
    for side, (adapter, ranker) in sides.items():
        model = p.policy(adapter)
        written = p.sample_lists(model, [s.interests for s in states], n, seed)
        served = _searched(p, ranker, states, written)
        for kind, lists in (("written", written), ("served", served)):
            for name, values in isg.list_qualities(p, judge, states, lists).items():
                figures[side, kind, name] = np.reshape(values, (len(states), -1)).mean(1)
    verdict = {"accepted": True, "reason": "", "users": len(states), "from": start["version"]}
    faults, lines = [], []
    for kind in ("written", "served"):
        verdict[kind] = {}
        for name in ("utility", "diversity"):
            before, after = (figures[side, kind, name] for side in sides)
            low, high = bootstrap_interval(after - before, p.config.eval.bootstrap, seed)
            row = {"before": float(before.mean()), "after": float(after.mean()),
                   "low": low, "high": high}  # fmt: skip
            verdict[kind][name] = row
            line = f"{name} {row['before']:.4f} -> {row['after']:.4f} ({low:+.4f} to {high:+.4f})"
            lines.append(f"{kind} {line}")
            if fallen(row):
                faults.append(f"{name} of lists as {kind} fell")
    what = "; ".join(faults) or "neither utility nor diversity fell"
    old, new = (file_digest(x / "adapter_model.safetensors") for x, _ in sides.values())
    if old == new:
        what = f"no checkpoint was better, so that only the ranker is new; {what}"
    verdict["reason"] = f"{what} on {len(states)} held-out users, 95 %: {', '.join(lines)}"
    return verdict | {"accepted": not faults}


def fallen(row: dict[str, float]) -> bool:
    """Lower by more than MARGIN of what it was, or with the whole interval below zero."""
    return row["after"] < (1 - MARGIN) * row["before"] or row["high"] < 0


def _searched(p: Pipeline, ranker, states: list[State], written) -> list[list[list[str]]]:
    """The one list of each user that a server would show first of these."""
    pools = [sorted({y for x in lists for y in x}) for lists in written]
    order = isg.in_lists(p.config, *isg.score_pools(p, ranker, states, pools), lists=1)
    k = p.config.generator.list_size
    return [[[pool[i] for i in best[:k]]] for pool, best in zip(pools, order, strict=True)]
