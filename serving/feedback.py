"""What people were shown and tapped becomes a further round of training.

    python train.py --stage ranker --stage dpo data.feedback=runs/tiny/serve.sqlite

Goes on from the newest policy of a finished run. `ranker` fits r_util (Eq. 7) again, on the run's
log and on what the server (serve.py) has shown; `dpo` is one more round as in stages/dpo.py, for
people of the store, with pairs of a tapped and an ignored list beside the mined ones. Then both are
checked on people whom they do not know. All is in feedback/round<m>/ of the run; a server of this
run takes up what feedback/current.json names, which is written when the check is passed.

The check: the new policy and the one that it would replace write lists for held-out users, and a
ranker judges them that is fitted, on log and store, on the judge users: not on those who trained,
not on those who are written for. Utility and diversity, of lists as written and as served (searched
by each side's ranker), are compared user by user. A figure has fallen if its mean fell by more than
MARGIN of what it was, or if the 95 % bootstrap interval of the paired difference lies below zero.
One figure that has fallen refuses the round. Small falls can add up over rounds: verdict.json has
the figures of each.

Nobody steers a round: dpo.pairs_per_user pairs, LISTS_PER_USER lists for a ranker, and one prompt
to write for are all that can come from one user; a hash chooses, not the order of arrival. A user's
split is that of the run, from the same hash: train users train, judge users fit the judge, valid
users choose the checkpoint and are written for in the check; the run's test users stay out, and
people of that hash whom the run does not know train.

Texts of the store's users are kept in the store alone, where they can be deleted: a round leaves
weights and figures. Each round reads the whole store anew.

Departure: the paper trains on logs once; it names neither rounds from feedback nor a check of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import operator
import random
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

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
from roles.players import Players
from roles.writer import Writer
from run import Run, UserState, one_line, shown_before
from serving.store import Shown, Store
from stages import dpo
from stages.metrics import bootstrap
from stages.ranker import fit_rankers, load_ranker, shown_lists
from stages.search import searched
from stages.sit import chosen_states

LISTS_PER_USER = 20  # for a ranker: about as many as people of the simulated log have
MARGIN = 0.05  # of a figure's value before; a fall of more refuses the round
# Sections in which a further round must agree with its run, beside dpo.rounds and run.seed.
AGREED = ("data", "world", "encoder", "rid", "generator", "sit")


def current(run: Run) -> dict | None:
    """The newest accepted policy: {"adapter", "ranker", "version"}, paths within the run.

    That of feedback, unless the run's own rounds of DPO were trained again since; None if the run
    has neither.
    """
    adapter = run.adapter("last")
    if not adapter.is_dir():
        return None
    published = run.folder / "feedback" / "current.json"
    if published.is_file() and (newest := read_json(published))["run"] == _run_key(run.folder):
        return newest
    weights, rounds = file_digest(adapter / "adapter_model.safetensors"), run.config.dpo.rounds
    return {"adapter": f"dpo/round{rounds}/adapter", "ranker": "ranker/train.safetensors",
            "version": f"round{rounds}-{weights[:8]}"}


def _run_key(folder: RunFolder) -> str:
    return read_json(folder / "dpo" / "done.json")["key"]


@dataclass(frozen=True)
class Round:
    """One feedback round of a run, and what it learns from."""

    run: Run
    players: Players
    number: int
    start: dict  # the policy that it goes on from and is compared with, as of `current`
    lists: dict[str, list[Shown]]  # of each split's users, in the order of a hash

    @property
    def folder(self) -> str:
        return f"feedback/round{self.number}"

    def side(self, after: bool) -> tuple[Path, str]:
        """(adapter, folder of the ranker within the run) of the old side and of the new one."""
        if after:
            return self.run.folder / self.folder / "adapter", f"{self.folder}/ranker"
        return self.run.folder / self.start["adapter"], str(Path(self.start["ranker"]).parent)


# ------------------------------------------------------------------------------------- the command


def train_round(config: Config, wanted: list[str], free: Iterable[str]) -> None:
    """Train, check and perhaps publish one round; go on with one that was interrupted.

    free: settings (section.key) in which the round may differ from its run. Raises UserError if
    there is nothing to train from or to go on from.
    """
    started, first = time.time(), processes()[0] == 0
    refuse_unready(config, wanted, free)
    run = Run(config, describe=False)
    if not current(run):
        raise UserError(f"{run.folder.path}: was trained without impressions (data.impressions), "
                        f"so it has no ranker and no DPO round to go on from")
    rows = gather([read_store(config.data.feedback)] if first else [])[0]
    rows.sort(key=lambda row: digest(config.run.seed, row["user_id"], row["at"]))  # not as it came
    lists = by_split(run, rows)
    if not any(shown.clicked for shown in lists["train"]):
        raise UserError(
            f"data.feedback={config.data.feedback}: no tap by a user of the train split, so there "
            f"is nothing to learn yet ({len(rows)} lists were shown, {len(lists['train'])} of them "
            f"to such users); try again when more was tapped"
        )
    settings = config.ranker, config.dpo, config.run.seed, config.roles, config.serve.candidates
    key = digest(rows, *settings, config.eval.bootstrap, _run_key(run.folder))
    number = gather([begin(run, key)] if first else [])[0]
    # In memory: an LLM's answers for the store's users are not kept either.
    players = Players(config, run.encoder, Writer(config, answers=Path(":memory:")))
    start = read_json(run.folder / f"feedback/round{number}/round.json")["start"]
    fit_and_check(Round(run, players, number, start, lists), key, wanted, started)


def fit_and_check(new: Round, key: str, wanted: list[str], started: float) -> None:
    """The stages of a round, and its verdict; what is done already is skipped."""
    run, name = new.run, f"feedback round {new.number}"
    verdict = run.folder / new.folder / "verdict.json"
    if verdict.is_file():
        reason = read_json(verdict)["reason"]
        print(f"{name}: already done with this store and these settings: {reason}")
        return
    shown = [one for split in new.lists.values() for one in split]
    users, taps = len({one.user_id for one in shown}), sum(len(one.clicked) for one in shown)
    print(f"{name}: {len(shown)} lists of {users} users, {taps} taps; from {new.start['version']}")
    # All at once: vectors differ by rounding where a resumed round encodes in other batches.
    run.encoder(sorted({text for one in shown for text in (*one.starters, *one.interests)}))
    stages = {"ranker": fit_ranker_pair, "dpo": align_policy}
    for stage in ("ranker", "dpo") if "dpo" in wanted else ("ranker",):
        if run.folder.is_done(f"{new.folder}/{stage}", key):
            print(f"{stage}: already done with this store and these settings, skipped")
            continue
        print(f"{stage}: running", flush=True)
        alone = stage == "ranker" and processes()[0] > 0  # the first process fits it
        figures = {} if alone else stages[stage](new)
        run.folder.mark_done(f"{new.folder}/{stage}", key, **figures)
        print(f"{stage}: {one_line(figures)}", flush=True)
    if "dpo" not in wanted:
        print(f"{name}: now --stage dpo, with the same data.feedback")
        return
    result, seconds = publish(new, check(new)), round(time.time() - started, 1)
    run.folder.log("feedback", round=new.number, accepted=result["accepted"], seconds=seconds)
    print(f"{name}: {result['reason']} ({seconds} s; figures in {run.folder / new.folder})")


def publish(new: Round, verdict: dict) -> dict:
    """Write the verdict and, if the round is accepted, what servers are to take up."""
    folder = new.run.folder
    if verdict["accepted"]:
        weights = file_digest(new.side(after=True)[0] / "adapter_model.safetensors")
        newest = {"round": new.number, "adapter": f"{new.folder}/adapter",
                  "ranker": f"{new.folder}/ranker/train.safetensors",
                  "version": f"feedback{new.number}-{weights[:8]}", "run": _run_key(folder)}
        # Before the verdict, which ends the round: one that was killed between is checked again.
        write_json(folder / "feedback" / "current.json", newest)
        verdict["reason"] = f"accepted as {newest['version']}: {verdict['reason']}"
    else:
        verdict["reason"] = f"refused, {new.start['version']} stays: {verdict['reason']}"
    write_json(folder / new.folder / "verdict.json", verdict)
    return verdict


# -------------------------------------------------------------------------------- before it begins


def refuse_unready(config: Config, wanted: list[str], free: Iterable[str]) -> None:
    """Raise UserError unless store and finished run are there and this command fits the run."""
    if others := [stage for stage in wanted if stage not in ("ranker", "dpo")]:
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
    agreed = {"dpo": ["rounds"], "run": ["seed"]}
    agreed |= {section: type(getattr(config, section)).model_fields for section in AGREED}
    for setting in (f"{section}.{name}" for section, names in agreed.items() for name in names):
        value, trained = map(operator.attrgetter(setting), (config, saved))
        if value != trained and setting not in free:
            raise UserError(f"{setting}={value}: the run was trained with {trained!r}; "
                            f"--config {folder}/config.yaml has all its settings")


def read_store(path: str) -> list[dict]:
    """Every list that was shown, as JSON holds it; the store may be in use by a server."""
    try:
        with contextlib.closing(Store(path)) as store:
            rows = [dataclasses.asdict(s) | {"at": s.at.isoformat()} for s in store.shown()]
    except UserError as error:
        raise UserError(f"data.feedback: {error}; give the store of a server (serve.py)") from None
    if not rows:
        raise UserError(f"data.feedback={path}: no list was shown yet; clients say so by POST "
                        "/v1/events")
    return rows


def by_split(run: Run, rows: list[dict]) -> dict[str, list[Shown]]:
    """Lists of each split's users: that of the run, from the same hash."""
    shares = {name: getattr(run.config.data, name) for name in ("train", "valid", "judge", "test")}
    splits = data.split_users({row["user_id"] for row in rows}, shares, run.config.run.seed)
    lists: dict[str, list[Shown]] = {name: [] for name in shares}
    for row in rows:
        split = splits[row["user_id"]]
        # Figures on test users are of the run, so only its own people have to stay out.
        split = "train" if split == "test" and row["user_id"] not in run.users else split
        lists[split].append(Shown(**row | {"at": datetime.fromisoformat(row["at"])}))
    return lists


def begin(run: Run, key: str) -> int:
    """The number of the round with this key, which is new or was begun before."""
    folder, newest = run.folder / "feedback", current(run)
    begun = {int(f.parent.name[5:]): read_json(f)["key"] for f in folder.glob("round*/round.json")}
    for number, other in begun.items():
        if other == key:
            return number
    last = max(begun, default=0)
    finished = (folder / f"round{last}/verdict.json").is_file() or newest.get("round") == last
    if last and not finished:  # killed, and the store or the settings are other ones now
        shutil.rmtree(folder / f"round{last}")
        last -= 1
    settings = {name: getattr(run.config, name).model_dump() for name in ("ranker", "dpo")}
    write_json(folder / f"round{last + 1}/round.json", {"key": key, "start": newest, **settings})
    return last + 1


# ------------------------------------------------------------------------------------- ranker, dpo


def states_of(
    run: Run, lists: list[Shown], moments: int
) -> tuple[list[tuple[data.Impression, UserState]], dict[str, UserState]]:
    """Of each user the first `moments` lists, each with the UserState of its moment; and the latest
    UserState of everybody who had interests, by a hash of the user.

    The taste is of what was shown before, by the run's log and by the store.
    """
    shown, logged = defaultdict(list), defaultdict(list)
    for one in lists:
        shown[one.user_id].append(one)
    for impression in run.impressions:
        if impression.user_id in shown:
            logged[impression.user_id].append(impression)
    pairs, latest = [], {}
    for user_id, user_lists in shown.items():
        impressions = [
            data.Impression(user_id=user_id, timestamp=one.at, starters=one.starters,
                            clicked=one.clicked, sessions_after=one.sessions_after)
            for one in user_lists]

        def state(one: Shown, moment: datetime, seen=logged[user_id] + impressions) -> UserState:
            taste = run.taste(shown_before(seen, moment))
            scores = [0.0] * len(one.interests)  # the store keeps none, and nothing here asks
            return UserState(one.user_id, one.interests, scores, run.encoder(one.interests), taste)

        pairs += [(impression, state(one, one.at)) for impression, one
                  in zip(impressions[:moments], user_lists, strict=False)]
        if told := [one for one in user_lists if one.interests]:
            latest[user_id] = state(max(told, key=lambda one: one.at), datetime.max)
    by_hash = sorted(latest, key=lambda user_id: digest(run.config.run.seed, user_id))
    return pairs, {user_id: latest[user_id] for user_id in by_hash}


def fit_ranker_pair(new: Round) -> dict:
    """Both rankers, as stage ranker fits them, on the run's log and the store's lists."""
    run = new.run
    lists = {name: shown_lists(run, run.ids(name))
             + states_of(run, new.lists[name], LISTS_PER_USER)[0]
             for name in ("train", "judge", "test")}
    return fit_rankers(run, lists, new.side(after=True)[1])


def align_policy(new: Round) -> dict:
    """One more round of DPO, from the policy that it would replace."""
    run, limit = new.run, new.run.config.dpo.max_users  # 0: no limit
    rng = random.Random(run.seed("users", "feedback", new.number))
    latest = states_of(run, new.lists["train"], 0)[1]
    states = [*latest.values()][: limit or None]
    others = [s for s in chosen_states(run, [-1], 0, rng) if s.user_id not in latest]
    room = limit - len(states) if limit else len(others)
    states += rng.sample(others, min(room, len(others)))  # the run's people, for the rest
    tapped = tapped_pairs(run, new.lists["train"])
    earlier = [pair for number in range(1, run.config.dpo.rounds + 1)
               for pair in read_json(run.folder / f"dpo/round{number}/pairs.json")]
    adapter, ranker = new.side(after=False)[0], load_ranker(run, "train", new.side(after=True)[1])
    model = new.players.writer.policy(adapter, trainable=True)
    figures, _ = dpo.train_round(
        run, new.players, f"feedback {new.number}", model, adapter, ranker, states,
        [*held_out(new).values()], earlier + tapped, keep=False)
    llm.save_adapter(model, new.side(after=True)[0])
    store_users = sum(state.user_id in latest for state in states)
    return {"store_users": store_users, "tapped": len(tapped), **figures}


def tapped_pairs(run: Run, lists: list[Shown]) -> list[dict]:
    """A user's tapped list against an ignored one that was written for the same interests.

    Tapped: more than its slots explain. Lists of K starters alone, so that the length of a list is
    no preference. At most dpo.pairs_per_user of a user, in the order of `lists`; a list is in one.
    """
    expected, k = sum(run.slot_rates.tolist()), run.config.generator.list_size  # taps of any list
    rows = [((one.user_id, frozenset(one.interests)), one.interests, one.starters,
             bool(one.clicked)) for one in lists
            if one.interests and len(one.starters) == k
            and (not one.clicked or len(one.clicked) > expected)]
    pairs = defaultdict(list)
    for (user_id, _), pair in dpo.tapped_against_ignored(rows):
        if {*pair["chosen"]} != {*pair["rejected"]["ignored"]}:
            pairs[user_id].append(pair)
    most = run.config.dpo.pairs_per_user
    return [pair for user_pairs in pairs.values() for pair in user_pairs[:most]]


# --------------------------------------------------------------------------------------- the check


def held_out(new: Round) -> dict[str, UserState]:
    """Users of no ranker and no pair as they are now: the run's, dpo.max_users of the store."""
    run = new.run
    known = {u: s for u in run.ids("valid") if (s := run.states[u][-1]).interests}
    store = states_of(run, new.lists["valid"], 0)[1]
    return known | dict([*store.items()][: run.config.dpo.max_users or None])


def check(new: Round) -> dict:
    """What became of utility and diversity on held-out users; see the head of this file."""
    run, states = new.run, [*held_out(new).values()]
    before, after = (side_figures(new, new.side(after), states) for after in (False, True))
    verdict = {"accepted": True, "reason": "", "users": len(states), "from": new.start["version"],
               "written": {}, "served": {}}
    faults, lines = [], []
    for (kind, name), old in before.items():
        change = after[kind, name] - old  # (users,)
        _, low, high = bootstrap([change], run.config.eval.bootstrap,
                                 run.seed("feedback", "check"))
        row = {"before": float(old.mean()), "after": float(after[kind, name].mean()),
               "low": low, "high": high}
        verdict[kind][name] = row
        lines.append(f"{kind} {name} {row['before']:.4f} -> {row['after']:.4f} "
                     f"({low:+.4f} to {high:+.4f})")
        if fallen(row):
            faults.append(f"{name} of lists as {kind} fell")
    reason = "; ".join(faults) or "neither utility nor diversity fell"
    weights = [file_digest(new.side(side)[0] / "adapter_model.safetensors") for side in (0, 1)]
    if weights[0] == weights[1]:
        reason = f"no checkpoint was better, so that only the ranker is new; {reason}"
    verdict["reason"] = f"{reason} on {len(states)} held-out users, 95 %: {', '.join(lines)}"
    return verdict | {"accepted": not faults}


def side_figures(new: Round, side: tuple[Path, str], states: list[UserState]) -> dict:
    """(kind of list, figure) -> (users,), by the new judge, of what one side writes and serves."""
    run, (adapter, folder), writer = new.run, side, new.players.writer
    judge = load_ranker(run, "judge", new.side(after=True)[1])
    written = writer.sample(writer.policy(adapter), [state.interests for state in states],
                            run.config.serve.candidates, run.seed("feedback", "check"))
    pools = [sorted({y for starters in lists for y in starters}) for lists in written]
    served = searched(run.config, run.encoder, load_ranker(run, "train", folder), states, pools, 1)
    served = [lists or [[]] for lists in served]  # who wrote nothing serves an empty list
    return {(kind, name): np.reshape(values, (len(states), -1)).mean(1)
            for kind, lists in (("written", written), ("served", served))
            for name, values in dpo.list_qualities(run, judge, states, lists).items()}


def fallen(row: dict[str, float]) -> bool:
    """Lower by more than MARGIN of what it was, or with the whole interval below zero."""
    return row["after"] < (1 - MARGIN) * row["before"] or row["high"] < 0
