"""One run: its people, their histories and interests, the text encoder, and the run's folder.

    run = Run(load_config("configs/tiny.yaml"))
    run.users, run.histories["u17"][-1].texts, run.states["u17"][-1].interests

What a stage needs is loaded when it is first asked for. Nobody writes into a Run: models belong
to the stages (stages/), roles/writer.py writes lists, and what a stage makes lies in its folder.

Legend: B rows, N summaries or starters, M interests, K slots, D embedding.
"""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import torch

import data
import icebreaker as ib
from config import Config
from files import ROOT, RunFolder, UserError, digest, file_digest, progress, read_json
from llm.encoder import Encoder

SPLITS = ("train", "valid", "judge", "test")  # of users: what each is for stands in Run.split


@dataclass(frozen=True)
class UserState:
    """What is known of a user at one cut of the log: the input of generator and ranker."""

    user_id: str
    interests: list[str]  # trigger interests T_u, best first
    embeddings: torch.Tensor  # (M, D)
    taste: torch.Tensor  # (D + 1,), ib.tap_taste of the lists shown before


def given_files(config: Config) -> dict[str, str]:
    """Setting -> path of each file that the user has given."""
    names = ("users", "impressions", "dialogues", "catalogue", "policies")
    return {f"data.{name}": path for name in names if (path := getattr(config.data, name))}


class Run:
    """Data of one run; raises UserError at once where a named file does not exist."""

    def __init__(self, config: Config, describe: bool = True):
        """describe: say with which settings it runs, in config.yaml and environment.json; not where
        a finished run is used."""
        for setting, path in given_files(config).items():
            if not Path(path).is_file():
                raise UserError(f"{setting}={path}: no such file")
        if config.data.impressions and not config.data.users:
            raise UserError("data.impressions: needs data.users, the people it was shown to")
        self.config = config
        self.folder = RunFolder(Path(config.run.root) / config.run.name)
        if describe:
            self.folder.describe(config.model_dump(), environment(config))
        self.users_file, self.impressions_file = config.data.users, config.data.impressions
        if not config.data.users:  # the simulated platform's, written by stage `world`
            self.users_file = self.folder / "world" / "users.jsonl"
            self.impressions_file = self.folder / "world" / "impressions.jsonl"
        # Of the sibling papers' platforms, likewise.
        world = self.folder / "world"
        self.dialogues_file = config.data.dialogues or world / "dialogues.jsonl"
        self.catalogue_file = config.data.catalogue or world / "catalogue.jsonl"
        self.policies_file = config.data.policies or world / "policies.yaml"
        self.shares = [*config.data.cuts, 1.0]  # the last one: everything up to now

    def seed(self, *purpose) -> int:
        """A seed for this purpose alone, from run.seed: no two places share random numbers."""
        return int(digest(self.config.run.seed, *purpose)[:8], 16)

    def adapter(self, name: str) -> Path | None:
        """The folder of a policy's LoRA: "sit", "vanilla", "round2", "last"; "" is the base.

        Of garm: "teacher", "sft"; "gaussian", "bradley_terry" (RL with these), "rft", "dpo". Of
        qualeqs the folder that it was trained in: "sft/mixed", "rl/grpo", "mine/hard1".
        """
        if not name:
            return None
        last = f"dpo/round{self.config.dpo.rounds}"
        folders = {"icebreaker": {"sit": "sit", "last": last}.get(name, f"dpo/{name}"),
                   "garm": {"teacher": "sft/teacher", "sft": "sft"}.get(name, f"rl/{name}"),
                   "qualeqs": name}
        return self.folder / folders[self.config.run.method] / "adapter"

    # --------------------------------------------------------------------------------------- people

    @cached_property
    def encoder(self) -> Encoder:
        name = self.config.encoder.name
        # By the model: another encoder must not read this one's vectors.
        return Encoder(name, self.folder / f"embeddings-{digest(name)}.safetensors")

    @cached_property
    def logged_users(self) -> list[data.User]:
        """Every user as in the file; sessions may have messages in place of a summary."""
        return data.read_users(self.users_file)

    @cached_property
    def users(self) -> dict[str, data.User]:
        """Every user after stage `summarize`; sessions that got no summary are left out."""
        written, users = read_json(self.folder / "summarize" / "summaries.json"), {}
        for user in self.logged_users:
            summaries = written.get(user.user_id, {})  # number of a session -> its summary
            sessions = [s if s.summary else s.model_copy(update={"summary": summaries.get(str(i))})
                        for i, s in enumerate(user.sessions)]
            kept = [s for s in sessions if s.summary]  # a failed call leaves no summary
            users[user.user_id] = user.model_copy(update={"sessions": kept})
        return users

    @cached_property
    def impressions(self) -> list[data.Impression]:
        """Every list that was shown; raises UserError if some were shown to unknown users."""
        if not self.impressions_file:
            return []
        rows = data.read_impressions(self.impressions_file)
        # Without its person a list has no history, and a wrong file would go unnoticed.
        unknown = {row.user_id for row in rows} - {u.user_id for u in self.logged_users}
        if unknown:
            raise UserError(f"{self.impressions_file}: user_id: {len(unknown)} users of the "
                            f"impressions are not in {self.users_file}")
        return rows

    @cached_property
    def shown_starters(self) -> list[str]:
        """Every starter of a shown list, once."""
        return sorted({y for row in self.impressions for y in row.starters})

    @property
    def corpus(self) -> list[str]:
        """What people talk about and what the platform has shown: no method has written it."""
        # Each summary as often as it came, each starter once.
        return [s.summary for u in self.users.values() for s in u.sessions] + self.shown_starters

    @cached_property
    def splits(self) -> dict[str, str]:
        return self.split(self.users)

    def split(self, user_ids: Iterable[str]) -> dict[str, str]:
        """user_id -> "train", "valid", "judge" or "test", of any people."""
        # By a hash of the id: more users move nobody to another split.
        # train: generator and ranker; valid: early stops, gate; judge: the ranker that judges.
        shares = {name: getattr(self.config.data, name) for name in SPLITS}
        return data.split_users(user_ids, shares, self.config.run.seed)

    def ids(self, *splits: str) -> list[str]:
        return [user_id for user_id in self.users if self.splits[user_id] in splits]

    def parts(self, user_id: str, cut: int) -> tuple[list[data.Session], list[data.Session]]:
        """(history, future) of a user at a cut; at the last one everything is history."""
        user, share = self.users[user_id], self.shares[cut]  # 1.0: now
        return (user.sessions, []) if share == 1.0 else data.cut_sessions(user, share)

    # --------------------------------------------------------------------- histories and interests

    @cached_property
    def histories(self) -> dict[str, list[ib.History]]:
        """One History per user and cut; the last is the whole history."""
        # All texts at once: like lengths share a batch, and vectors do not hang on who is first.
        self.encoder(sorted({s.summary for u in self.users.values() for s in u.sessions}))

        def history(user_id: str, cut: int) -> ib.History:
            past, future = self.parts(user_id, cut)
            # "Now" is the first session that is not known yet, or else the end of the log.
            return history_of(past, future[0].timestamp if future else self.now, self.encoder)

        return {user_id: [history(user_id, cut) for cut in range(len(self.shares))]
                for user_id in progress(self.users, "histories")}

    @cached_property
    def now(self) -> datetime | None:
        """The end of the log: its latest time; None if it holds none. Who has not come back by then
        has been away for so long, as at a cut and when serving."""
        stamps = [s.timestamp for user in self.users.values() for s in user.sessions]
        stamps += [row.timestamp for row in self.impressions]
        return max((stamp for stamp in stamps if stamp), default=None)

    @cached_property
    def profiles(self) -> dict[str, torch.Tensor]:
        """Embedding (D,) of each user's profile."""
        self.encoder(sorted({text for u in self.users.values() if (text := profile_text(u))}))
        return {u.user_id: profile_vector(u, self.encoder) for u in self.users.values()}

    @cached_property
    def slot_rates(self) -> torch.Tensor:
        """Mean click rate by slot among the train users (K,); later slots count as the last."""
        k, train = self.config.generator.list_size, set(self.ids("train"))  # K
        shown, taps = torch.zeros(k), torch.zeros(k)
        for impression in self.impressions:
            if impression.user_id in train:
                for slot in range(len(impression.starters)):
                    shown[min(slot, k - 1)] += 1
                    taps[min(slot, k - 1)] += slot in impression.clicked
        return taps / shown.clamp_min(1)

    def taste(self, shown: list[tuple[str, int, bool]]) -> torch.Tensor:
        """What (starter, slot, tapped) of lists shown so far say of a user's taste: (D + 1,)."""
        starters = self.encoder([y for y, _, _ in shown])  # (N, D)
        slots = torch.tensor([slot for _, slot, _ in shown], dtype=torch.long)
        taps = torch.tensor([tapped for _, _, tapped in shown], dtype=torch.float32)
        # A tap in the first slot says less than one in the last, which few people reach.
        surprise = taps - self.slot_rates[slots.clamp_max(len(self.slot_rates) - 1)]  # (N,)
        return ib.tap_taste(starters, surprise)

    @cached_property
    def states(self) -> dict[str, list[UserState]]:
        """What stage `rid` distilled of every user, one UserState per cut."""
        triggers, shown = read_json(self.folder / "rid" / "triggers.json"), defaultdict(list)
        for impression in self.impressions:
            shown[impression.user_id].append(impression)
        self.encoder(self.shown_starters)

        def state(user_id: str, share: float, interests: list[str]) -> UserState:
            # When the cut was; None where its sessions have no time.
            moment = data.cut_time(self.users[user_id], share) if share < 1 else datetime.max
            taste = self.taste(shown_before(shown[user_id], moment))
            return UserState(user_id, interests, self.encoder(interests), taste)

        return {u: [state(u, share, cut["interests"])
                    for share, cut in zip(self.shares, cuts, strict=True)]
                for u, cuts in triggers.items()}


def shown_before(impressions: Iterable[data.Impression],
                 moment: datetime | None) -> list[tuple[str, int, bool]]:
    """(starter, slot, tapped) of lists shown before a moment; those without a time say nothing."""
    return [(starter, slot, slot in row.clicked) for row in impressions
            if moment and row.timestamp and row.timestamp < moment
            for slot, starter in enumerate(row.starters)]


def history_of(sessions: list[data.Session], now: datetime | None, encode: Encoder) -> ib.History:
    """A user's history of these sessions as of `now`, or the latest of them if that is later."""
    stamps = [s.timestamp for s in sessions]
    now = max((stamp for stamp in (*stamps, now) if stamp), default=None)
    days = None  # unknown: half-lives count sessions instead
    if now is not None and all(stamps):
        days = [(now - s).total_seconds() / 86400 for s in stamps]  # (S,)
    return ib.make_history([s.summary for s in sessions], days, encode)


def profile_text(user: data.User) -> str:
    # Sorted: the order of a JSON object says nothing.
    return "; ".join(f"{k}: {v}" for k, v in sorted((user.profile or {}).items()))


def profile_vector(user: data.User, encode: Encoder) -> torch.Tensor:
    """Embedding (D,) of a user's profile; zeros where there is none."""
    text = profile_text(user)
    return encode([text])[0] if text else torch.zeros(encode.dim)  # adds nothing to the user tower


PACKAGES = """torch transformers peft bitsandbytes sentence-transformers numpy scikit-learn
    tokenizers pydantic""".split()


def environment(config: Config) -> dict:
    """What a figure of this run depends on besides the config: versions, commit, data, machine."""

    def git(*words):
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--", ".", ":!results")  # None: no repository
    installed = [one for one in importlib.metadata.distributions() if one.name in PACKAGES]
    return {
        "command": sys.argv, "python": platform.python_version(), "machine": platform.platform(),
        "processors": os.cpu_count(),
        "versions": {package.name: package.version for package in installed},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "data": {path: file_digest(path) for path in given_files(config).values()}}


def commit_of(about: dict) -> str:
    """The commit of an environment.json, and whether anything had changed since."""
    # None: Git is not there.
    return (about["commit"] or "?")[:10] + " with changes" * bool(about["uncommitted_changes"])
