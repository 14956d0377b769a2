"""What the stages of one run share: its folder, data, histories, interests and models.

Everything is loaded when first asked for, so that a stage that needs no model loads none. train.py
writes what is read here; eval.py reads the same.

Legend: B rows, N summaries or starters, M interests, K slots, D embedding, F statistics.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import data
import icebreaker as ib
import llm
import roles
from config import (
    ROOT,
    Config,
    EndpointConfig,
    RunFolder,
    UserError,
    digest,
    file_digest,
    gather,
    read_json,
    read_tensors,
    share,
)
from encoder import Encoder
from tools import tiny_model


@dataclass(frozen=True)
class State:
    """What is known of a user at one cut of the log: the input of generator and ranker."""

    user_id: str
    interests: list[str]  # trigger interests T_u, best first
    scores: list[float]
    embeddings: torch.Tensor  # (M, D)
    taste: torch.Tensor  # (D + 1,), ib.tap_taste of the lists shown before


class Pipeline:
    """One run: `p.users`, `p.histories`, `p.states`, `p.ranker(name)`, `p.sample_lists(...)`."""

    def __init__(self, config: Config, describe: bool = True):
        for name in ("users", "impressions"):
            path = getattr(config.data, name)
            if path and not Path(path).is_file():
                raise UserError(f"data.{name}={path}: no such file")
        if config.data.impressions and not config.data.users:
            raise UserError("data.impressions: needs data.users, the people it was shown to")
        self._check_players(config)
        self.config, self.run = config, RunFolder(config, describe)
        self._chats: dict = {}
        # Answers of LLMs, kept for all runs below run.root: the same question is asked once.
        self.answers = Path(config.run.root) / "answers.sqlite"
        self.key = ""  # of the running stage: all that a round of it depends on (train.run_stages)
        self.users_file, self.impressions_file = config.data.users, config.data.impressions
        if not config.data.users:
            self.users_file = self.run / "world" / "users.jsonl"
            self.impressions_file = self.run / "world" / "impressions.jsonl"
        self.shares = [*config.data.cuts, 1.0]  # the last one: everything up to now

    @staticmethod
    def _check_players(config: Config) -> None:
        """Raise UserError now, not after hours, if an endpoint that will be asked is not set."""
        if "endpoint" in vars(config.roles).values():
            from roles import chat

            chat.Endpoint(config.endpoint)
        if url := config.generator.endpoint:
            from roles import chat

            settings = config.endpoint.model_copy(update={"base_url": url, "model": "sit"})
            chat.Endpoint(settings, setting="generator.endpoint")

    def seed(self, *parts) -> int:
        """A seed of its own for every purpose, from run.seed."""
        return int(digest(self.config.run.seed, *parts)[:8], 16)

    # ---------------------------------------------------------------------------- data and encoder

    @cached_property
    def encoder(self) -> Encoder:
        settings = self.config.encoder
        cache = self.run / f"embeddings-{digest(settings.name)}.safetensors"
        return Encoder(settings.name, settings.batch_size, cache)

    @cached_property
    def logged_users(self) -> list[data.User]:
        """Every user as in the file; sessions may have messages in place of a summary."""
        return data.read_users(self.users_file)

    @cached_property
    def users(self) -> dict[str, data.User]:
        """Every user after `summarize`; sessions that got no summary are left out."""
        made, users = read_json(self.run / "summarize" / "summaries.json"), {}
        for user in self.logged_users:
            own = made.get(user.user_id, {})  # number of a session -> its summary
            sessions = [
                s if s.summary else s.model_copy(update={"summary": own.get(str(i))})
                for i, s in enumerate(user.sessions)
            ]
            kept = [s for s in sessions if s.summary]
            users[user.user_id] = user.model_copy(update={"sessions": kept})
        return users

    @cached_property
    def impressions(self) -> list[data.Impression]:
        if not self.impressions_file:
            return []
        rows = data.read_impressions(self.impressions_file)
        unknown = {row.user_id for row in rows} - {u.user_id for u in self.logged_users}
        if unknown:
            raise UserError(
                f"{self.impressions_file}: user_id: {len(unknown)} users of the impressions are "
                f"not in {self.users_file}"
            )
        return rows

    @property
    def corpus(self) -> list[str]:
        """What people talk about and what the platform has shown: no method has written it."""
        summaries = [s.summary for user in self.users.values() for s in user.sessions]
        return summaries + sorted({y for x in self.impressions for y in x.starters})

    @cached_property
    def splits(self) -> dict[str, str]:
        d = self.config.data
        shares = {"train": d.train, "valid": d.valid, "judge": d.judge, "test": d.test}
        return data.split_users(self.users, shares, self.config.run.seed)

    def ids(self, *splits: str) -> list[str]:
        return [user_id for user_id in self.users if self.splits[user_id] in splits]

    def parts(self, user_id: str, cut: int) -> tuple[list[data.Session], list[data.Session]]:
        """(history, future) of a user at a cut; at the last one everything is history."""
        user, share = self.users[user_id], self.shares[cut]
        return (user.sessions, []) if share == 1.0 else data.cut_sessions(user, share)

    # --------------------------------------------------------------------- histories and interests

    @cached_property
    def histories(self) -> dict[str, list[ib.History]]:
        """One History per user and cut; the last is the whole history."""
        self.encoder(sorted({s.summary for u in self.users.values() for s in u.sessions}))
        cuts = range(len(self.shares))
        return {user_id: [self._history(user_id, c) for c in cuts] for user_id in self.users}

    def _history(self, user_id: str, cut: int) -> ib.History:
        past, future = self.parts(user_id, cut)
        return history_of(past, future[0].timestamp if future else None, self.encoder)

    @cached_property
    def profiles(self) -> dict[str, torch.Tensor]:
        """Embedding (D,) of each user's profile; zeros where there is none."""
        texts = {u.user_id: profile_text(u) for u in self.users.values()}
        self.encoder(sorted({text for text in texts.values() if text}))
        none = torch.zeros(self.encoder.dim)
        return {u: self.encoder([text])[0] if text else none for u, text in texts.items()}

    def scorer_batch(self, rows: list[tuple[str, int]], encode=None) -> dict[str, torch.Tensor]:
        """Padded inputs of ResonanceScorer for (user, cut) rows; `encode` replaces the encoder."""
        histories = [self.histories[user_id][cut] for user_id, cut in rows]
        profiles = torch.stack([self.profiles[user_id] for user_id, _ in rows])
        batch = scorer_inputs(histories, profiles)
        if encode:
            vectors = encode([text for h in histories for text in h.texts])
            batch["embeddings"][batch["mask"]] = vectors.to(batch["embeddings"].device)
        return batch

    @torch.no_grad()
    def resonance(
        self, scorer: ib.ResonanceScorer, rows: list[tuple[str, int]], encode=None
    ) -> list[np.ndarray]:
        """s(u, h) of every summary of every (user, cut) row; `encode` as of scorer_batch."""
        scorer.eval()
        scores = []
        for start in range(0, len(rows), 32):
            batch = self.scorer_batch(rows[start : start + 32], encode)
            s = scorer(**batch)
            scores += [row[mask].numpy() for row, mask in zip(s, batch["mask"], strict=True)]
        return scores

    @cached_property
    def slot_rates(self) -> torch.Tensor:
        """Mean click rate by slot among the train users (K,); later slots count as the last."""
        k, train = self.config.generator.list_size, set(self.ids("train"))
        shown, taps = torch.zeros(k), torch.zeros(k)
        for impression in self.impressions:
            if impression.user_id in train:
                for slot in range(len(impression.starters)):
                    shown[min(slot, k - 1)] += 1
                    taps[min(slot, k - 1)] += slot in impression.clicked
        return taps / shown.clamp_min(1)

    def tastes(self, user: data.User, shown: list[data.Impression]) -> list[torch.Tensor]:
        """What the lists shown to a user before each cut say of the taste: one (D + 1,) a cut."""
        cuts = self.shares
        return self.tastes_at(
            [data.cut_time(user, cut) if cut < 1 else datetime.max for cut in cuts], shown
        )

    def tastes_at(
        self, times: list[datetime | None], shown: list[data.Impression]
    ) -> list[torch.Tensor]:
        """The same before each of these times."""
        rows = [(i.timestamp, y, slot, slot in i.clicked) for i in shown for slot, y in
                enumerate(i.starters) if i.timestamp]
        starters = self.encoder([y for _, y, _, _ in rows])  # (N, D)
        slots = torch.tensor([slot for _, _, slot, _ in rows], dtype=torch.long)
        taps = torch.tensor([tap for _, _, _, tap in rows], dtype=torch.float32)
        surprise = taps - self.slot_rates[slots.clamp_max(len(self.slot_rates) - 1)]
        result = []
        for now in times:
            past = torch.tensor([bool(now) and t < now for t, *_ in rows], dtype=torch.bool)
            result.append(ib.tap_taste(starters[past], surprise[past]))
        return result

    @cached_property
    def states(self) -> dict[str, list[State]]:
        """What `rid` made of every user, one State per cut."""
        triggers, shown = read_json(self.run / "rid" / "triggers.json"), defaultdict(list)
        for impression in self.impressions:
            shown[impression.user_id].append(impression)
        self.encoder(sorted({y for i in self.impressions for y in i.starters}))
        return {
            user_id: [
                State(
                    user_id, cut["interests"], cut["scores"], self.encoder(cut["interests"]), taste
                )
                for cut, taste in zip(
                    cuts, self.tastes(self.users[user_id], shown[user_id]), strict=True
                )
            ]
            for user_id, cuts in triggers.items()
        }

    # -------------------------------------------------------------------------------- the generator

    @property
    def model_path(self) -> str:
        """A hub id or a folder. Raises UserError where the embedded model is not there yet."""
        if self.config.generator.model:
            return self.config.generator.model
        folder = base_folder(self.config)
        if not (folder / "config.json").is_file():
            raise UserError(
                f"{folder}: no embedded model of these settings; python train.py --stage base makes it, "
                f"with the same settings"
            )
        return str(folder)

    @cached_property
    def tokenizer(self):
        return llm.load_tokenizer(self.model_path, self.config.generator.revision)

    def policy(self, adapter: Path | None, trainable: bool = False):
        """The generator with a saved adapter, or the bare base model."""
        g = self.config.generator
        model = llm.load_generator(
            self.model_path, g.load_in_4bit, g.gradient_checkpointing, g.revision
        )
        return llm.load_adapter(model, adapter, trainable) if adapter else model.eval()

    def prompt(self, interests: list[str]) -> list[int]:
        g = self.config.generator
        return llm.encode_prompt(
            self.tokenizer, interests, g.list_size, g.instruction, g.max_prompt_tokens
        )

    def sample_lists(
        self, model, inputs: list[list[str]], n: int, seed: int, repeats: bool = False
    ) -> list[list[list[str]]]:
        """n lists for each input, parsed and filtered: at most K starters each, perhaps none.

        A list with fewer than K is drawn again, at most generator.attempts times in all, and the
        fullest stays. repeats: as first drawn, and starters that a list repeats stay in it. The
        processes of a torchrun sample a share each.
        """
        g = self.config.generator

        def draw(prompts, n: int, seed: int, numbers: list[int]) -> list[list[str]]:
            return llm.sample(
                model, self.tokenizer, [self.prompt(x) for x in prompts], n, seed=seed,
                max_new_tokens=g.max_new_tokens, temperature=g.temperature, top_p=g.top_p,
                top_k=g.top_k, rows=g.sample_rows, numbers=numbers,
            )

        return self._full_lists(draw, inputs, n, seed, repeats)

    def write_lists(
        self, adapter: Path | None, inputs: list[list[str]], n: int, seed: int, model=None,
        repeats: bool = False,
    ) -> list[list[list[str]]]:
        """As sample_lists, by a saved adapter (None: the base): from generator.endpoint if it is
        set, where the model of that name is asked; or here, `model` being loaded already."""
        g = self.config.generator
        if not g.endpoint:
            return self.sample_lists(model or self.policy(adapter), inputs, n, seed, repeats)
        from roles import chat

        settings = self._served(adapter)
        more = {"top_p": g.top_p} | ({"top_k": g.top_k} if g.top_k else {})
        weights = adapter / "adapter_model.safetensors" if adapter else None
        policy = file_digest(weights) if weights else digest(self.model_path)
        server = chat.Sampler(settings, more, self.answers, policy, str(adapter or ""))
        self._chats[settings.model] = server.chat

        def draw(prompts, n: int, seed: int, numbers: list[int]) -> list[list[str]]:
            texts = [
                llm.prompt_text(self.tokenizer, x, g.list_size, g.instruction, g.max_prompt_tokens)
                for x in prompts
            ]
            return server.sample(texts, n, [(seed + n * i) % 2**31 for i in numbers])

        return self._full_lists(draw, inputs, n, seed, repeats)

    def _served(self, adapter: Path | None) -> EndpointConfig:
        """Where generator.endpoint is asked for this adapter's lists."""
        g, name = self.config.generator, self.config.generator.model or "base"
        if adapter:  # known there by its stage: sit, round1, ..., vanilla; feedback1, ...
            name = adapter.parent.name
            if adapter.parent.parent.name == "feedback":
                name = name.replace("round", "feedback")
        return self.config.endpoint.model_copy(update={
            "base_url": g.endpoint, "key_env": g.endpoint_key_env, "model": name,
            "temperature": g.temperature, "max_tokens": g.max_new_tokens,
        })  # fmt: skip

    def is_served(self, adapter: Path) -> bool:
        """Whether generator.endpoint says that it has this adapter."""
        from roles import chat

        settings = self._served(adapter)
        server = chat.Endpoint(settings, setting="generator.endpoint")
        try:
            return settings.model in {model.id for model in server.client.models.list()}
        except chat.openai.OpenAIError:
            return False

    def _full_lists(self, draw, inputs, n: int, seed: int, repeats: bool) -> list[list[list[str]]]:
        """draw(inputs, n, seed, number of each) -> n texts of each."""
        k, own = self.config.generator.list_size, share(range(len(inputs)))
        texts = draw([inputs[i] for i in own], n, seed, own)
        lists = [
            [self.fit_to_show(t, inputs[i], repeats)[:k] for t in row]
            for i, row in zip(own, texts, strict=True)
        ]
        for attempt in range(1, 1 if repeats else self.config.generator.attempts):
            short = [(r, j) for r, row in enumerate(lists) for j, x in enumerate(row) if len(x) < k]
            if not short:
                break
            numbers = [own[r] * n + j for r, j in short]
            seed = int(digest(seed, attempt)[:7], 16)
            again = draw([inputs[own[r]] for r, _ in short], 1, seed, numbers)
            for (r, j), (text,) in zip(short, again, strict=True):
                lists[r][j] = max(
                    lists[r][j], self.fit_to_show(text, inputs[own[r]])[:k], key=len
                )
        return gather(lists)

    def usable(self, text: str, interests: list[str]) -> list[str]:
        """The starters of a completion that are fit to show for these interests, at most K."""
        return self.fit_to_show(text, interests)[: self.config.generator.list_size]

    @staticmethod
    def fit_to_show(text: str, interests: list[str], repeats: bool = False) -> list[str]:
        starters = roles.parse_starters(text).starters
        return roles.filter_starters(starters, interests, repeats=repeats)[0]

    # ------------------------------------------------------------------------------------------ LLM

    def chat(self, player: str):
        """The LLM that plays roles: "endpoint", or "generator", the base without an adapter."""
        from roles import chat

        if player not in self._chats:
            if player == "endpoint":
                backend = chat.Endpoint(self.config.endpoint)
            else:
                backend = chat.Local(self.policy(None), self.tokenizer, self.config.endpoint)
            self._chats[player] = chat.Chat(backend, self.answers)
        return self._chats[player]

    def interest_judge(self):
        """Which of two lists of interests says more about a user, by the role that is set."""
        player = self.config.roles.judge
        if player == "rules":
            return roles.RuleJudge(self.encoder)
        from roles import prompted

        return prompted.LLMJudge(self.chat(player))

    def calls(self) -> dict[str, int]:
        """What became of this process's calls to LLMs since this was last asked."""
        found: Counter = Counter()
        for chat in self._chats.values():
            found.update(chat.counts)
            chat.counts.clear()
        return dict(found)

    # ----------------------------------------------------------------------------------- the ranker

    def new_ranker(self) -> ib.UtilityRanker:
        return ib.UtilityRanker(self.encoder.dim, self.config.generator.list_size)

    def ranker(self, name: str, folder: str = "ranker") -> ib.UtilityRanker:
        """The fitted ranker "train" (for mining) or "judge" (for evaluation)."""
        ranker = self.new_ranker()
        ranker.load_state_dict(read_tensors(self.run / folder / f"{name}.safetensors"))
        return ranker.eval()


def base_folder(config: Config) -> Path:
    """The embedded base model: in weights/ where it ships with these settings, else built once for
    all runs below run.root."""
    g = config.generator
    name = f"base-{digest(tiny_model.BASE, g.instruction, g.list_size)}"
    shipped = ROOT / "weights" / name
    if (shipped / "figures.json").is_file():  # relative, since adapters keep their base's path
        return Path(os.path.relpath(shipped))
    return Path(config.run.root) / name


def history_of(
    past: list[data.Session], now: datetime | None, encode: Callable[[list[str]], torch.Tensor]
) -> ib.History:
    """A user's history of these sessions as of `now` (None: the latest of them)."""
    stamps = [s.timestamp for s in past]
    now = now or max((s for s in stamps if s), default=None)
    days = None
    if now is not None and all(stamps):
        days = [(now - s).total_seconds() / 86400 for s in stamps]
    return ib.make_history([s.summary for s in past], days, encode)


def profile_text(user: data.User) -> str:
    return "; ".join(f"{k}: {v}" for k, v in sorted((user.profile or {}).items()))


def scorer_inputs(histories: list[ib.History], profiles: torch.Tensor) -> dict[str, torch.Tensor]:
    """Padded inputs of ResonanceScorer; profiles (B, D)."""
    (b, d), n = profiles.shape, max(len(h.texts) for h in histories)
    batch = {
        "embeddings": torch.zeros(b, n, d),  # (B, N, D)
        "statistics": torch.zeros(b, n, len(ib.FEATURE_NAMES)),  # (B, N, F)
        "mask": torch.zeros(b, n, dtype=torch.bool),
        "profile": profiles,
    }
    for i, h in enumerate(histories):
        m = len(h.texts)
        batch["embeddings"][i, :m], batch["statistics"][i, :m] = h.embeddings, h.statistics
        batch["mask"][i, :m] = True
    return batch


def pad_states(states: list[State]) -> dict[str, torch.Tensor]:
    """Inputs of UtilityRanker: interests (B, M, D), their mask (B, M), tastes (B, D + 1)."""
    m = max(1, max(len(s.interests) for s in states))
    interests = torch.zeros(len(states), m, states[0].embeddings.shape[1])
    mask = torch.zeros(len(states), m, dtype=torch.bool)
    for i, state in enumerate(states):
        interests[i, : len(state.interests)] = state.embeddings
        mask[i, : len(state.interests)] = True
    return {"interests": interests, "mask": mask, "taste": torch.stack([s.taste for s in states])}


@torch.no_grad()
def utilities(ranker: ib.UtilityRanker, state: State, starters: torch.Tensor) -> torch.Tensor:
    """r_util(u, y) in (0, 1) of starters (N, D) for one user -> (N,)."""
    inputs = {k: x.expand(len(starters), *x.shape[1:]) for k, x in pad_states([state]).items()}
    return torch.sigmoid(ranker(**inputs, starters=starters))


def sum_counts(parts: list[dict]) -> dict[str, int]:
    return {name: sum(part.get(name, 0) for part in parts) for part in parts for name in part}


def short(figures: dict) -> str:
    """One line of figures: floats to four digits, nested ones in braces."""

    def show(value):
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, dict):
            return "{" + short(value) + "}"
        return "[" + ", ".join(map(show, value)) + "]" if isinstance(value, list) else str(value)

    return ", ".join(f"{name} {show(value)}" for name, value in figures.items())
