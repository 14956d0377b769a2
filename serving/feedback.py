"""What people were shown and tapped becomes a further round of training.

    python train.py --stage ranker --stage dpo data.feedback=runs/default/serve.sqlite

Goes on from the newest policy of a finished run. `ranker` fits r_util (Eq. 7) again, on the run's
log and on what the server has shown; `dpo` is one more round as in stages/dpo.py, for people of the
store, with pairs of a tapped and an ignored list beside the mined ones. Then both are checked on
people whom they do not know. A round lies in feedback/round<m>/ of the run; a server takes up what
feedback/current.json names. Texts stay in the store alone, where they can be deleted: a round
leaves weights and figures, and the next one reads the whole store anew.

Departure: the paper trains on logs once; it names neither rounds from feedback nor a check of them.
"""

import contextlib
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

import llm
from config import Config, load_config
from files import UserError, digest, file_digest, gather, one_line, processes, read_json, write_json
from roles.players import Players
from roles.writer import Writer
from run import SPLITS, Run, UserState, shown_before
from serving.store import Store
from serving.taps import Shown
from stages import dpo
from stages.metrics import bootstrap
from stages.pairs import tapped_pairs
from stages.pools import searched
from stages.ranker import fit_rankers, load_ranker, pilot_lists, shown_lists
from stages.sit import draw_states

LISTS_PER_USER = 20  # for a ranker: about as many as people of the simulated log have
MARGIN = 0.05  # of a figure's value before; a fall of more refuses the round
# Sections in which a further round must agree with its run, beside dpo.rounds and run.seed.
AGREED = ("data", "world", "encoder", "rid", "generator", "sit")


def current(run: Run) -> dict | None:
    """The newest accepted policy: {"adapter", "ranker", "version"}, paths within the run; None if
    the run has none."""
    adapter, rounds = run.adapter("last"), run.config.dpo.rounds
    if not adapter.is_dir():
        return None
    published = run.folder / "feedback" / "current.json"
    # Unless the run's own rounds of DPO were trained again since.
    newest = read_json(published, run=str) if published.is_file() else {}
    if newest.get("run") == run.folder.key("dpo"):
        for name in map(newest.get, ("adapter", "ranker", "version")):  # perhaps a stranger's
            if not isinstance(name, str) or not name.isprintable() or not (
                    run.folder / name).resolve().is_relative_to(run.folder.path.resolve()):
                raise UserError(f"{published}: {name} leads out of the run; delete the file")
        return newest
    return {"adapter": f"dpo/round{rounds}/adapter", "ranker": "ranker/train.safetensors",
            "version": f"round{rounds}-{file_digest(adapter / 'adapter_model.safetensors')[:8]}"}


@dataclass(frozen=True)
class Round:  # one feedback round of a run, and what it learns from
    run: Run
    players: Players
    number: int
    start: dict  # the policy that it goes on from and is compared with, as of `current`
    lists: dict[str, list[Shown]]  # of each split's users, in the order of a hash

    @property
    def folder(self) -> str:  # within the run: ranker/, dpo/, adapter/, round.json, verdict.json
        return f"feedback/round{self.number}"

    @property
    def adapters(self) -> tuple[Path, Path]:  # what writes before and after it
        return self.run.folder / self.start["adapter"], self.run.folder / self.folder / "adapter"


# ------------------------------------------------------------------------------------- the command


def feedback_round(config: Config, wanted: list[str], free: Iterable[str]) -> None:
    """Train, check and perhaps publish one round; go on with one that was interrupted.

    free: settings (section.key) in which the round may differ from its run. Raises UserError if
    there is nothing to train from or to go on from.
    """
    refuse_unready(config, wanted, free)
    # describe: config.yaml stays as the run was trained.
    run, started, first = Run(config, describe=False), time.time(), processes()[0] == 0
    if not current(run):
        raise UserError(f"{run.folder.path}: was trained without impressions (data.impressions), "
                        "so it has no ranker and no DPO round to go on from")
    rows = gather([read_store(config.data.feedback)] if first else [])[0]
    # By a hash, not as they came: who is early has no more to say.
    rows.sort(key=lambda row: digest(config.run.seed, row["user_id"], row["timestamp"]))
    lists = by_split(run, rows)
    if not any(shown.clicked for shown in lists["train"]):
        raise UserError(f"data.feedback={config.data.feedback}: no tap by a user of the train "
                        f"split, so there is nothing to learn yet ({len(rows)} lists were shown, "
                        f"{len(lists['train'])} of them to such users); try again later")
    settings = config.ranker, config.dpo, config.run.seed, config.roles, config.serve.candidates
    key = digest(rows, *settings, config.eval.bootstrap, run.folder.key("dpo"))
    number = gather([begin(run, key)] if first else [])[0]  # of several processes, as above
    start = read_json(run.folder / f"feedback/round{number}/round.json", start=dict)["start"]
    # In memory: an LLM's answers for the store's users are not kept either.
    players = Players(config, run.encoder, Writer(config, answers=Path(":memory:")))
    new, name = Round(run, players, number, start, lists), f"feedback round {number}"
    if (end := run.folder / new.folder / "verdict.json").is_file():
        print(f"{name}: already done with this store and these settings: "
              f"{read_json(end, reason=str)['reason']}")
        return
    users, taps = len({row["user_id"] for row in rows}), sum(len(row["clicked"]) for row in rows)
    print(f"{name}: {len(rows)} lists of {users} users, {taps} taps; from {start['version']}")
    # All at once: vectors differ by rounding where a resumed round encodes in other batches.
    run.encoder(sorted({text for row in rows for text in (*row["starters"], *row["interests"])}))
    feedback_stage(new, "ranker", key)
    if "dpo" not in wanted:
        print(f"{name}: now --stage dpo, with the same data.feedback")
        return
    feedback_stage(new, "dpo", key)
    verdict, seconds = publish(new, check(new)), round(time.time() - started, 1)
    run.folder.log("feedback", round=number, accepted=verdict["accepted"], seconds=seconds)
    run.folder.mark_done(new.folder, key)  # with the digests of what it has written
    print(f"{name}: {verdict['reason']} ({seconds} s; figures in {run.folder / new.folder})")


def feedback_stage(new: Round, stage: str, key: str) -> None:
    folder, place = new.run.folder, f"{new.folder}/{stage}"
    if not folder.begin(place, key):
        print(f"{stage}: already done with this store and these settings, skipped")
        return
    print(f"{stage}: running", flush=True)
    figures = align_policy(new) if stage == "dpo" else fit_ranker_pair(new)
    folder.mark_done(place, key, **figures)
    print(f"{stage}: {one_line(figures)}", flush=True)


def publish(new: Round, verdict: dict) -> dict:
    """Write the verdict and, if the round is accepted, what servers are to take up."""
    folder = new.run.folder
    if verdict["accepted"]:
        weights = file_digest(new.adapters[1] / "adapter_model.safetensors")
        newest = {"round": new.number, "adapter": f"{new.folder}/adapter",
                  "ranker": f"{new.folder}/ranker/train.safetensors",
                  "version": f"feedback{new.number}-{weights[:8]}",
                  "run": new.run.folder.key("dpo")}  # the key of the DPO that it came after
        # Before the verdict, which ends the round: one that was killed between is checked again.
        write_json(folder / "feedback" / "current.json", newest)
        verdict["reason"] = f"accepted as {newest['version']}: {verdict['reason']}"
    else:
        verdict["reason"] = f"refused, {new.start['version']} stays: {verdict['reason']}"
    write_json(folder / new.folder / "verdict.json", verdict)
    return verdict


# -------------------------------------------------------------------------------- before it begins


def refuse_unready(config: Config, wanted: list[str], free: Iterable[str]) -> None:
    # Raises UserError unless store and finished run are there and this command fits the run.
    store, folder = config.data.feedback, Path(config.run.root) / config.run.name
    if others := [stage for stage in wanted if stage not in ("ranker", "dpo")]:
        raise UserError("data.feedback: a further round has the stages ranker and dpo alone, not "
                        f"{', '.join(others)}; say --stage ranker --stage dpo, or leave it out")
    if not Path(store).is_file():
        raise UserError(f"data.feedback={store}: no such file; it is the store of a server "
                        "(serve.py), serve.sqlite in its run's folder unless serve.store says so")
    Run(config, describe=False).folder.require("rid", "ranker", "sit", "dpo")
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
            rows = [shown.model_dump(mode="json", exclude={"turns"})
                    for shown in store.taps.shown() if not shown.turns]
    except UserError as error:
        raise UserError(f"data.feedback: {error}; give the store of a server (serve.py)") from None
    if not rows:
        raise UserError(f"data.feedback={path}: no list was shown yet; clients say so by POST "
                        "/v1/events")
    return rows


def by_split(run: Run, rows: list[dict]) -> dict[str, list[Shown]]:
    """Lists of each split's users: that of the run, from the same hash."""
    splits = run.split({row["user_id"] for row in rows})
    lists: dict[str, list[Shown]] = {name: [] for name in SPLITS}
    for row in rows:
        split = splits[row["user_id"]]
        if split == "test" and row["user_id"] not in run.users:  # no figure of the run is of them
            split = "train"
        lists[split].append(Shown(**row))
    return lists


def begin(run: Run, key: str) -> int:
    """The number of the round with this key, which is new or was begun before."""
    folder, newest = run.folder / "feedback", current(run)
    begun = {int(f.parent.name[5:]): read_json(f, key=str)["key"]
             for f in folder.glob("round*/round.json")}
    if key in begun.values():  # killed or finished: the same round
        return next(number for number, other in begun.items() if other == key)
    last = max(begun, default=0)  # rounds are numbered from 1
    finished = (folder / f"round{last}/verdict.json").is_file() or newest.get("round") == last
    if last and not finished:  # killed, and the store or the settings are other ones now
        shutil.rmtree(folder / f"round{last}")
        last -= 1
    write_json(folder / f"round{last + 1}/round.json", {"key": key, "start": newest})
    return last + 1


# ------------------------------------------------------------------------------------- ranker, dpo

# Nobody steers a round: dpo.pairs_per_user pairs, LISTS_PER_USER lists for a ranker, and one prompt
# to write for are all that can come from one user; a hash chooses, not the order of arrival. Of
# `by_split` train users train, judge users fit the judge, valid users are written for in the check;
# the run's test users stay out, and people of that hash whom the run does not know train.


def states_of(run: Run, lists: list[Shown],
              moments: int) -> tuple[list[tuple[Shown, UserState]], dict[str, UserState]]:
    """Of each user the first `moments` lists, each with the UserState of its moment; and the latest
    UserState of everybody who had interests, by a hash of the user."""
    # The taste is of what was shown before, by the run's log and by the store.
    seen, shown = defaultdict(list), defaultdict(list)
    for one in lists:
        shown[one.user_id].append(one)
    for one in (*run.impressions, *lists):
        seen[one.user_id].append(one)

    def state(one: Shown, moment: datetime) -> UserState:
        taste = run.taste(shown_before(seen[one.user_id], moment))
        return UserState(one.user_id, one.interests, run.encoder(one.interests), taste)

    pairs, latest = [], {}
    for user_id, user_lists in shown.items():
        pairs += [(one, state(one, one.timestamp)) for one in user_lists[:moments]]
        if told := [one for one in user_lists if one.interests]:
            # The interests of the latest list, the taste of all of them.
            latest[user_id] = state(max(told, key=lambda one: one.timestamp), datetime.max)
    by_hash = sorted(latest, key=lambda user_id: digest(run.config.run.seed, user_id))
    return pairs, {user_id: latest[user_id] for user_id in by_hash}


def fit_ranker_pair(new: Round) -> dict:
    """Both rankers, as stage ranker fits them, on the run's log and the store's lists."""
    if processes()[0] > 0:  # the first process fits them for all
        return {}
    run, lists = new.run, {}
    for split in ("train", "judge", "test"):  # valid users are written for in the check
        stored, _ = states_of(run, new.lists[split], LISTS_PER_USER)
        lists[split] = shown_lists(run, run.ids(split)) + pilot_lists(run, split) + stored
    return fit_rankers(run, lists, f"{new.folder}/ranker")


def align_policy(new: Round) -> dict:
    """One more round of DPO, from the policy that it would replace."""
    run, limit = new.run, new.run.config.dpo.max_users  # 0: no limit
    rng = random.Random(run.seed("users", "feedback", new.number))
    _, latest = states_of(run, new.lists["train"], 0)
    states = [*latest.values()][: limit or None]
    others = [s for s in draw_states(run, [-1], 0, rng) if s.user_id not in latest]
    room = limit - len(states) if limit else len(others)
    states += rng.sample(others, min(room, len(others)))  # the run's people, for the rest
    tapped = tapped_pairs(run, ((one, one.interests) for one in new.lists["train"]), 1,
                          run.config.dpo.pairs_per_user)
    # As a round of stage dpo does, it learns from all pairs so far.
    earlier = [pair for number in range(1, run.config.dpo.rounds + 1)
               for pair in read_json(run.folder / f"dpo/round{number}/pairs.json")]
    ranker, (before, after) = load_ranker(run, "train", f"{new.folder}/ranker"), new.adapters
    model = new.players.writer.policy(before, trainable=True)
    figures, _ = dpo.train_round(  # its pairs have texts: they are not kept, nor is what it samples
        run, new.players, f"feedback {new.number}", model, before, ranker, states,
        earlier + tapped, keep=False)
    llm.save_adapter(model, after)
    of_store = sum(state.user_id in latest for state in states)
    return {"store_users": of_store, "tapped": len(tapped), **figures}


# --------------------------------------------------------------------------------------- the check

# The new policy and the one that it would replace write lists for held-out users, and a ranker
# judges them that is fitted, on log and store, on the judge users: not on those who trained, not on
# those who are written for. Utility and diversity, of lists as written and as served (searched by
# each side's ranker), are compared user by user. A figure has fallen if its mean fell by more than
# MARGIN of what it was, or if the 95 % bootstrap interval of the paired difference lies below zero.
# One figure that has fallen refuses the round. Small falls can add up over rounds: verdict.json has
# the figures of each.


def held_out(new: Round) -> list[UserState]:
    """Users of no ranker and no pair as they are now: the run's, dpo.max_users of the store."""
    run = new.run
    states = {u: s for u in run.ids("valid") if (s := run.states[u][-1]).interests}
    _, store = states_of(run, new.lists["valid"], 0)
    return [*(states | dict([*store.items()][: run.config.dpo.max_users or None])).values()]


def check(new: Round) -> dict:
    """What became of utility and diversity on held-out users, and whether that is accepted."""
    states, faults, lines = held_out(new), [], []
    draws, seed = new.run.config.eval.bootstrap, new.run.seed("feedback", "check")
    rankers = str(Path(new.start["ranker"]).parent), f"{new.folder}/ranker"
    old, now = (side_figures(new, adapter, folder, states)
                for adapter, folder in zip(new.adapters, rankers, strict=True))
    verdict = {"users": len(states), "from": new.start["version"], "written": {}, "served": {}}
    for kind, name in old:
        before, after = old[kind, name], now[kind, name]  # (users,)
        _, low, high = bootstrap([after - before], draws, seed)
        row = {"before": float(before.mean()), "after": float(after.mean()), "low": low,
               "high": high}
        verdict[kind][name] = row
        lines.append(f"{kind} {name} {row['before']:.4f} -> {row['after']:.4f} "
                     f"({low:+.4f} to {high:+.4f})")
        if fallen(row):  # one is enough
            faults.append(f"{name} of lists as {kind} fell")
    reason = "; ".join(faults) or "neither utility nor diversity fell"
    reason = f"{reason} on {len(states)} held-out users, 95 %: {', '.join(lines)}"
    return verdict | {"accepted": not faults, "reason": reason}


def side_figures(new: Round, adapter: Path, folder: str, states: list[UserState]) -> dict:
    """(kind of list, figure) -> (users,), by the new judge, of what a policy writes and what is
    served of it by the ranker in this folder of the run."""
    run, writer = new.run, new.players.writer
    judge = load_ranker(run, "judge", f"{new.folder}/ranker")
    ranker = load_ranker(run, "train", folder)
    written = writer.sample(writer.policy(adapter), [state.interests for state in states],
                            run.config.serve.candidates, run.seed("feedback", "check"))
    # As the engine pools a user's lists.
    pools = [sorted({y for starters in lists for y in starters}) for lists in written]
    served = [lists or [[]] for lists in  # who wrote nothing serves an empty list
              searched(run.config, run.encoder, ranker, states, pools, 1)]
    return {(kind, name): np.reshape(values, (len(states), -1)).mean(1)
            for kind, lists in (("written", written), ("served", served))
            for name, values in dpo.list_qualities(run, judge, states, lists).items()}


def fallen(row: dict[str, float]) -> bool:
    # By more than MARGIN of what it was, or with the whole interval below zero.
    return row["after"] < (1 - MARGIN) * row["before"] or row["high"] < 0
