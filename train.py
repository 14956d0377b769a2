"""Train every part of IceBreaker, stage by stage, in one visible loop each.

    python train.py                                    # all stages, embedded default, one table
    python train.py --stage dpo dpo.beta=0.2           # one stage (and what it needs)
    python train.py data.users=mine.jsonl              # your own users (see README)

Stages: world -> base -> match -> rid -> ranker -> sit -> dpo -> eval. A stage whose settings and
inputs have not changed is skipped; a stage whose predecessors are missing runs them first.

Departures from the paper: LoRA instead of full fine-tuning; the teacher and the revisit matcher are
offline rules over text (roles.py); the platform is simulated (world.py) unless logs are given.

Legend: B rows, N candidates, M lists or interests, K slots, D embedding, H user vector.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import icebreaker as ib
import llm
import roles
from config import (
    ROOT,
    Config,
    RunFolder,
    UserError,
    atomic_path,
    digest,
    file_digest,
    load_config,
    read_json,
    read_tensors,
    script,
    write_json,
    write_tensors,
)

# stage -> (stages it needs, settings it depends on)
STAGES = {
    "world": ((), ("world", "data")),
    "base": ((), ("base",)),
    "match": (("world",), ("encoder", "roles")),
    "rid": (("match",), ("rid",)),
    "ranker": (("rid",), ("ranker",)),
    "sit": (("rid", "base"), ("generator", "sit")),
    "dpo": (("sit", "ranker"), ("dpo",)),
    "eval": (("dpo",), ("eval",)),
}


@dataclass(frozen=True)
class State:
    """What is known of a user at one cut of the log: the input of generator and ranker."""

    user_id: str
    interests: list[str]  # trigger interests T_u, best first
    scores: list[float]
    embeddings: torch.Tensor  # (M, D)
    user: torch.Tensor  # (H,), E_u


class Pipeline:
    """The run folder, and the lazily loaded things that several stages share."""

    def __init__(self, config: Config):
        for name in ("users", "impressions"):
            path = getattr(config.data, name)
            if path and not Path(path).is_file():
                raise UserError(f"data.{name}={path}: no such file")
        if config.data.impressions and not config.data.users:
            raise UserError("data.impressions: needs data.users, the people it was shown to")
        self.config, self.run = config, RunFolder(config)
        if config.data.users:
            self.users_file, self.impressions_file = config.data.users, config.data.impressions
        else:
            self.users_file = self.run / "world" / "users.jsonl"
            self.impressions_file = self.run / "world" / "impressions.jsonl"
        self.shares = [*config.data.cuts, 1.0]  # the last one: everything up to now

    @cached_property
    def encoder(self):
        settings = self.config.encoder
        cache = Path(self.config.run.root) / f"embeddings-{digest(settings.name)}.safetensors"
        return llm.Encoder(settings.name, settings.batch_size, cache)

    @cached_property
    def users(self) -> dict[str, data.User]:
        users = data.read_users(self.users_file, self.config.data.max_errors)
        summarise = roles.RuleSummariser().summarise
        return {user.user_id: _summarised(user, summarise) for user in users}

    @cached_property
    def impressions(self) -> list[data.Impression]:
        if not self.impressions_file:
            return []
        return data.read_impressions(self.impressions_file, self.config.data.max_errors)

    @cached_property
    def splits(self) -> dict[str, str]:
        d = self.config.data
        shares = {"train": d.train, "valid": d.valid, "judge": d.judge, "test": d.test}
        return data.split_users(list(self.users), shares, self.config.run.seed)

    def ids(self, *splits: str) -> list[str]:
        return [user_id for user_id in self.users if self.splits[user_id] in splits]

    @cached_property
    def histories(self) -> dict[str, list[ib.History]]:
        """One History per user and cut; the last is the whole history."""
        self.encoder(sorted({s.summary for u in self.users.values() for s in u.sessions}))
        return {
            user.user_id: [_history(user, share, self.encoder) for share in self.shares]
            for user in self.users.values()
        }

    @cached_property
    def states(self) -> dict[str, list[State]]:
        """What `rid` made of every user, one State per cut."""
        rows = read_json(self.run / "rid" / "triggers.json")
        vectors = read_tensors(self.run / "rid" / "users.safetensors")["vectors"]  # (U, cuts, H)
        self.encoder(sorted({t for cuts in rows.values() for c in cuts for t in c["interests"]}))
        return {
            user_id: [
                State(user_id, cut["interests"], cut["scores"], self.encoder(cut["interests"]), v)
                for cut, v in zip(cuts, vectors[i], strict=True)
            ]
            for i, (user_id, cuts) in enumerate(rows.items())
        }

    def key(self, stage: str) -> str:
        """Digest of all that a stage's result depends on: settings, data files, earlier stages."""
        needs, sections = STAGES[stage]
        files = []
        if stage == "world" and self.config.data.users:
            files = [file_digest(f) for f in (self.users_file, self.impressions_file) if f]
        return digest(
            stage,
            self.config.run.seed,
            [getattr(self.config, s) for s in sections],
            files,
            [self.key(s) for s in needs],
        )

    def seed(self, *parts) -> int:
        return int(digest(self.config.run.seed, *parts)[:8], 16)

    @property
    def model_path(self) -> str:
        settings = self.config.generator
        return settings.model or str(base_folder(self.config))

    @cached_property
    def tokenizer(self):
        return llm.load_tokenizer(self.model_path)

    def policy(self, adapter: Path | None, trainable: bool = False):
        """The generator with a saved adapter, or the bare base model."""
        model = llm.load_generator(self.model_path, self.config.generator.load_in_4bit)
        return llm.load_adapter(model, adapter, trainable) if adapter else model.eval()

    def prompt(self, interests: list[str]) -> list[int]:
        g = self.config.generator
        return llm.encode_prompt(
            self.tokenizer, interests, g.list_size, g.instruction, g.max_prompt_tokens
        )

    def sample_lists(
        self, model, inputs: list[list[str]], n: int, seed: int
    ) -> list[list[list[str]]]:
        """Sample n lists for each input; parsed, filtered, at most K starters each."""
        g = self.config.generator
        texts = llm.sample(
            model,
            self.tokenizer,
            [self.prompt(i) for i in inputs],
            n,
            max_new_tokens=g.max_new_tokens,
            temperature=g.temperature,
            top_p=g.top_p,
            seed=seed,
            rows=g.sample_rows,
        )
        return [
            [self.usable(text, interests) for text in row]
            for row, interests in zip(texts, inputs, strict=True)
        ]

    def usable(self, text: str, interests: list[str]) -> list[str]:
        kept, _ = roles.filter_starters(list(roles.parse_starters(text).starters), interests)
        return kept[: self.config.generator.list_size]

    def ranker(self, name: str) -> ib.UtilityRanker:
        ranker = self.new_ranker()
        ranker.load_state_dict(read_tensors(self.run / "ranker" / f"{name}.safetensors"))
        return ranker.eval()

    def new_ranker(self) -> ib.UtilityRanker:
        state = next(iter(self.states.values()))[0]
        settings = self.config.ranker
        return ib.UtilityRanker(
            state.embeddings.shape[1],
            state.user.shape[0],
            settings.hidden,
            self.config.generator.list_size,
            settings.dropout,
        )


def _summarised(user: data.User, summarise) -> data.User:
    """Fill in the summaries of sessions that carry only messages; drop what stays empty."""
    sessions = [
        s if s.summary else s.model_copy(update={"summary": summarise(s.messages)})
        for s in user.sessions
    ]
    return user.model_copy(update={"sessions": [s for s in sessions if s.summary]})


def _split(user: data.User, share: float) -> tuple[list, list]:
    return (user.sessions, []) if share == 1.0 else data.cut_sessions(user, share)


def _history(user: data.User, share: float, encode) -> ib.History:
    past, future = _split(user, share)
    stamps = [s.timestamp for s in past]
    cut = future[0].timestamp if future else max((s for s in stamps if s), default=None)
    days = None
    if cut is not None and all(stamps):
        days = [(cut - s).total_seconds() / 86400 for s in stamps]
    return ib.make_history([s.summary for s in past], days, encode)


def _bar(items, label: str, **kwargs):
    return tqdm(items, desc=label, disable=None, leave=False, **kwargs)


# ------------------------------------------------------------------------------------ world, base


def stage_world(p: Pipeline) -> dict:
    """Write the simulated platform's logs, or check the files that the user gave."""
    if not p.config.data.users:
        import world

        world.generate(p.config.world).write(p.run / "world")
    shown = {i.user_id for i in p.impressions}
    return {
        "users": len(p.users),
        "sessions": sum(len(u.sessions) for u in p.users.values()),
        "impressions": len(p.impressions),
        "users_shown": len(shown & set(p.users)),
    }


def base_folder(config: Config) -> Path:
    """The embedded base model is built once for all runs below run.root."""
    g = config.generator
    return Path(config.run.root) / f"base-{digest(config.base, g.instruction, g.list_size)}"


def stage_base(p: Pipeline) -> dict:
    """Pre-train the embedded stand-in for Qwen2.5, unless a real model is named."""
    if p.config.generator.model:
        return {"model": p.config.generator.model}
    folder = base_folder(p.config)
    if (folder / "figures.json").is_file():
        return {"cached": str(folder), **read_json(folder / "figures.json")}
    import base

    figures = base.build_base(p.config.base, p.config.generator, folder)
    write_json(folder / "figures.json", figures)
    return figures


# ------------------------------------------------------------------------------------------ match


def stage_match(p: Pipeline) -> dict:
    """Mark which past summaries a later session revisits, for every user and cut."""
    r, everyone = p.config.roles, ([s.summary for s in u.sessions] for u in p.users.values())
    themes = roles.themes(everyone, r.theme_share)
    matcher = roles.RuleMatcher(p.encoder, r.match_cosine, r.match_cosine_alone, themes)
    labels: dict[str, list[list[int]]] = {}
    for user_id, histories in _bar(p.histories.items(), "match"):
        labels[user_id] = []
        for share, history in zip(p.config.data.cuts, histories[:-1], strict=True):
            later = sorted({s.summary for s in _split(p.users[user_id], share)[1]})
            hit = np.zeros(len(history.texts), bool)
            if later and history.texts:
                hit = matcher.match(history.texts, later).any(1)
            labels[user_id].append(hit.astype(int).tolist())
    write_json(p.run / "match" / "revisited.json", labels)
    flat = [x for cuts in labels.values() for cut in cuts for x in cut]
    return {"summaries": len(flat), "revisited_share": float(np.mean(flat)) if flat else 0.0}


# -------------------------------------------------------------------------------------------- rid


def _profile_text(user: data.User) -> str:
    return "; ".join(f"{k}: {v}" for k, v in sorted((user.profile or {}).items()))


class RidRows:
    """Padded tensors of (user, cut) rows for the resonance scorer."""

    def __init__(self, p: Pipeline):
        self.p = p
        self.revisited = read_json(p.run / "match" / "revisited.json")
        texts = sorted({t for hs in p.histories.values() for h in hs for t in h.texts})
        self.text_id = {text: i for i, text in enumerate(texts)}
        self.profiles = {
            u.user_id: p.encoder([_profile_text(u)])[0] if u.profile else None
            for u in p.users.values()
        }

    def __call__(self, rows: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        histories = [self.p.histories[user_id][cut] for user_id, cut in rows]
        width, some = max(len(h.texts) for h in histories), histories[0]
        batch = {
            "embeddings": torch.zeros(len(rows), width, some.embeddings.shape[1]),  # (B, N, D)
            "statistics": torch.zeros(len(rows), width, some.statistics.shape[1]),  # (B, N, F)
            "mask": torch.zeros(len(rows), width, dtype=torch.bool),
            "positive": torch.zeros(len(rows), width, dtype=torch.bool),
            "text_ids": torch.full((len(rows), width), -1),
            "profile": torch.zeros(len(rows), some.embeddings.shape[1]),  # (B, D)
        }
        for i, ((user_id, cut), h) in enumerate(zip(rows, histories, strict=True)):
            n = len(h.texts)
            batch["embeddings"][i, :n], batch["statistics"][i, :n] = h.embeddings, h.statistics
            batch["mask"][i, :n] = True
            batch["text_ids"][i, :n] = torch.tensor([self.text_id[t] for t in h.texts])
            if cut < len(self.p.config.data.cuts):
                batch["positive"][i, :n] = torch.tensor(self.revisited[user_id][cut]).bool()
            if self.profiles[user_id] is not None:
                batch["profile"][i] = self.profiles[user_id]
        return batch

    def label(self, user_id: str, cut: int) -> np.ndarray:
        return np.array(self.revisited[user_id][cut], bool)

    def rankable(self, ids: list[str]) -> list[tuple[str, int]]:
        """(user, cut) rows with both a revisited and a never-revisited summary."""
        cuts = range(len(self.p.config.data.cuts))
        return [
            (u, c) for u in ids for c in cuts if 0 < self.label(u, c).sum() < len(self.label(u, c))
        ]

    @torch.no_grad()
    def scores(self, scorer, rows: list[tuple[str, int]]) -> tuple[list[np.ndarray], torch.Tensor]:
        """Scores of every row's summaries, and the user vectors (rows, H)."""
        scorer.eval()
        scores, users = [], []
        for start in range(0, len(rows), 32):
            batch = self(rows[start : start + 32])
            s, user, _ = scorer(
                batch["embeddings"], batch["statistics"], batch["mask"], batch["profile"]
            )
            scores += [row[m].numpy() for row, m in zip(s, batch["mask"], strict=True)]
            users.append(user)
        return scores, torch.cat(users)

    def auc(self, rows: list[tuple[str, int]], scores: list[np.ndarray]) -> float:
        """Mean over users of the AUC of "revisited later" (each user's cuts averaged first)."""
        by_user: dict[str, list[float]] = {}
        for (user_id, cut), s in zip(rows, scores, strict=True):
            by_user.setdefault(user_id, []).append(ib.per_user_auc(s, self.label(user_id, cut)))
        return float(np.mean([np.mean(v) for v in by_user.values()])) if by_user else float("nan")


def stage_rid(p: Pipeline) -> dict:
    """Train the resonance scorer (Eq. 3), fit the gate (Eq. 4), distil every user's interests."""
    settings, rows = p.config.rid, RidRows(p)
    train, valid, unseen = (
        rows.rankable(p.ids(*s)) for s in (("train",), ("valid",), ("judge", "test"))
    )
    if not train or not valid:
        raise UserError(
            f"{p.users_file}: no user comes back to an earlier subject (checked "
            f"{len(p.users)} users), so there is nothing to learn from; more users or "
            f"longer histories are needed"
        )
    some = next(h for hs in p.histories.values() for h in hs if h.texts)
    torch.manual_seed(p.seed("rid"))
    scorer = ib.ResonanceScorer(
        some.embeddings.shape[1],
        some.statistics.shape[1],
        settings.text_dim,
        settings.hidden,
        settings.dropout,
    )
    optimiser = torch.optim.AdamW(scorer.parameters(), settings.learning_rate, weight_decay=0.01)
    shuffle = random.Random(p.seed("rid", "order"))
    generator = torch.Generator().manual_seed(p.seed("rid", "negatives"))
    by_user: dict[str, list[int]] = {}
    for user_id, cut in train:
        by_user.setdefault(user_id, []).append(cut)
    best, best_auc, waited = None, -1.0, 0
    for epoch in _bar(range(settings.epochs), "rid"):
        # One cut per user and epoch: a user's own texts never serve as cross-user negatives.
        order = [(user_id, shuffle.choice(cuts)) for user_id, cuts in by_user.items()]
        shuffle.shuffle(order)
        scorer.train()
        losses = []
        for start in range(0, len(order), settings.batch_users):
            batch = rows(order[start : start + settings.batch_users])
            _, user, sessions = scorer(
                batch["embeddings"], batch["statistics"], batch["mask"], batch["profile"]
            )
            scores, mask = ib.contrastive_rows(
                user,
                sessions,
                batch["positive"],
                batch["mask"],
                batch["text_ids"],
                settings.negatives_within,
                generator,
            )
            loss = ib.contrastive_loss(scores, settings.temperature, mask).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item())
        auc = rows.auc(valid, rows.scores(scorer, valid)[0])
        p.run.log("rid", epoch=epoch, loss=float(np.mean(losses)), valid_auc=auc)
        if auc > best_auc:
            best, best_auc, waited = {k: v.clone() for k, v in scorer.state_dict().items()}, auc, 0
        else:
            waited += 1
            if waited > settings.patience:
                break
    scorer.load_state_dict(best)
    write_tensors(p.run / "rid" / "scorer.safetensors", best)

    activity = [p.histories[u][c].sessions_per_week for u, c in train]
    groups = settings.activity_groups
    edges = np.quantile(activity, np.arange(1, groups) / groups).tolist()
    thresholds = _fit_gate(p, rows, scorer, valid, edges)
    write_json(p.run / "rid" / "gate.json", {"edges": edges, "thresholds": thresholds})
    kept = _distil_all(p, rows, scorer, edges, thresholds)

    figures = {
        "train_users": len(by_user),
        "valid_auc": best_auc,
        "thresholds": thresholds,
        "kept_per_user": kept,
        "unseen_users": len({u for u, _ in unseen}),
    }
    baselines = {"recency": ib.recency_scores, "frequency": ib.frequency_scores}
    figures["auc"] = rows.auc(unseen, rows.scores(scorer, unseen)[0]) if unseen else float("nan")
    for name, score in baselines.items():
        figures[f"auc_{name}"] = rows.auc(
            unseen, [score(p.histories[u][c]).numpy() for u, c in unseen]
        )
    return figures


def _fit_gate(p: Pipeline, rows: RidRows, scorer, valid, edges) -> list[float]:
    scores, _ = rows.scores(scorer, valid)
    labels = [rows.label(u, c) for u, c in valid]
    groups = [
        np.full(len(s), ib.activity_group(p.histories[u][c].sessions_per_week, edges))
        for (u, c), s in zip(valid, scores, strict=True)
    ]
    fitted = ib.fit_thresholds(
        np.concatenate(scores),
        np.concatenate(labels),
        np.concatenate(groups),
        p.config.rid.activity_groups,
    )
    return [float(t) for t in fitted]


def _distil_all(p: Pipeline, rows: RidRows, scorer, edges, thresholds) -> float:
    """Write every user's trigger interests and user vector at every cut; mean number kept."""
    settings = p.config.rid
    everyone = [(u, c) for u in p.users for c in range(len(p.shares)) if p.histories[u][c].texts]
    scores, vectors = rows.scores(scorer, everyone)
    found = {row: (s, v) for row, s, v in zip(everyone, scores, vectors, strict=True)}
    triggers, stack = {}, torch.zeros(len(p.users), len(p.shares), vectors.shape[1])
    for i, user_id in enumerate(p.users):
        triggers[user_id] = []
        for cut, history in enumerate(p.histories[user_id]):
            cell = {"interests": [], "scores": []}
            if (user_id, cut) in found:
                s, stack[i, cut] = found[user_id, cut]
                threshold = thresholds[ib.activity_group(history.sessions_per_week, edges)]
                keep = ib.distil(
                    torch.as_tensor(s),
                    threshold,
                    settings.min_keep,
                    settings.max_keep,
                    history.embeddings,
                    settings.duplicate_cosine,
                )
                cell = {
                    "interests": [history.texts[j] for j in keep],
                    "scores": [float(s[j]) for j in keep],
                }
            triggers[user_id].append(cell)
    write_json(p.run / "rid" / "triggers.json", triggers)
    write_tensors(p.run / "rid" / "users.safetensors", {"vectors": stack})
    return float(np.mean([len(cuts[-1]["interests"]) for cuts in triggers.values()]))


# ----------------------------------------------------------------------------------------- ranker


def _pad_states(states: list[State]) -> dict[str, torch.Tensor]:
    """Interests (B, M, D), their mask (B, M) and user vectors (B, H)."""
    m = max(1, max(len(s.interests) for s in states))
    interests = torch.zeros(len(states), m, states[0].embeddings.shape[1])
    mask = torch.zeros(len(states), m, dtype=torch.bool)
    for i, state in enumerate(states):
        interests[i, : len(state.interests)] = state.embeddings
        mask[i, : len(state.interests)] = True
    return {"interests": interests, "mask": mask, "user": torch.stack([s.user for s in states])}


@torch.no_grad()
def utilities(ranker: ib.UtilityRanker, state: State, starters: torch.Tensor) -> torch.Tensor:
    """r_util(u, y) in (0, 1) of starters (N, D) for one user -> (N,)."""
    s, n = _pad_states([state]), len(starters)
    return torch.sigmoid(
        ranker(
            s["interests"].expand(n, -1, -1),
            s["mask"].expand(n, -1),
            s["user"].expand(n, -1),
            starters,
        )
    )


def shown_cut(p: Pipeline, impression: data.Impression) -> int | None:
    """The latest cut whose history was complete when the list was shown; None if none was."""
    times = [data.cut_time(p.users[impression.user_id], share) for share in p.config.data.cuts]
    done = [
        c for c, t in enumerate(times) if t and impression.timestamp and t <= impression.timestamp
    ]
    return done[-1] if done else None


def shown_lists(p: Pipeline, ids: list[str]) -> list[tuple[data.Impression, State]]:
    """Impressions of these users, each with the user's state at that time."""
    wanted, pairs = set(ids), []
    for impression in p.impressions:
        if impression.user_id in wanted and (cut := shown_cut(p, impression)) is not None:
            pairs.append((impression, p.states[impression.user_id][cut]))
    return pairs


def _ranker_rows(p: Pipeline, pairs) -> dict[str, torch.Tensor]:
    """One row per shown starter: its embedding, slot, click, target and the state's number."""
    a, cap = p.config.ranker.click_share, p.config.ranker.depth_cap
    starters, slots, clicked, after, owner = [], [], [], [], []
    for i, (impression, _) in enumerate(pairs):
        for slot, starter in enumerate(impression.starters):
            starters.append(starter)
            slots.append(min(slot, p.config.generator.list_size - 1))
            clicked.append(slot in impression.clicked)
            after.append(
                float("nan") if impression.sessions_after is None else impression.sessions_after
            )
            owner.append(i)
    clicks = torch.tensor(clicked, dtype=torch.float32)
    return {
        "starters": p.encoder(starters),
        "slots": torch.tensor(slots),
        "clicked": clicks,
        "targets": ib.utility_target(clicks, torch.tensor(after), a, cap),
        "owner": torch.tensor(owner),
    }


def fit_ranker(p: Pipeline, pairs, name: str) -> ib.UtilityRanker:
    """Soft-label cross-entropy with a per-slot logit; the best epoch on one user in seven."""
    settings = p.config.ranker
    held = {u for i, u in enumerate(sorted({i.user_id for i, _ in pairs})) if i % 7 == 0}
    fit, stop = ([x for x in pairs if (x[0].user_id in held) == side] for side in (False, True))
    rows, stop_rows = _ranker_rows(p, fit), _ranker_rows(p, stop)
    states, stop_states = (_pad_states([s for _, s in side]) for side in (fit, stop))
    torch.manual_seed(p.seed("ranker", name))
    ranker = p.new_ranker()
    optimiser = torch.optim.AdamW(ranker.parameters(), settings.learning_rate, weight_decay=0.05)
    size = settings.batch_impressions * p.config.generator.list_size
    best, best_loss, waited = None, float("inf"), 0
    for epoch in _bar(range(settings.epochs), f"ranker {name}"):
        ranker.train()
        for index in torch.randperm(len(rows["owner"])).split(size):
            loss = ib.utility_loss(_logits(ranker, rows, states, index), rows["targets"][index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        ranker.eval()
        with torch.no_grad():
            every = torch.arange(len(stop_rows["owner"]))
            stop_loss = ib.utility_loss(
                _logits(ranker, stop_rows, stop_states, every), stop_rows["targets"]
            ).item()
        p.run.log("ranker", ranker=name, epoch=epoch, loss=loss.item(), held_out_loss=stop_loss)
        if stop_loss < best_loss:
            best, best_loss, waited = (
                {k: v.clone() for k, v in ranker.state_dict().items()},
                stop_loss,
                0,
            )
        else:
            waited += 1
            if waited > settings.patience:
                break
    ranker.load_state_dict(best)
    write_tensors(p.run / "ranker" / f"{name}.safetensors", best)
    return ranker.eval()


def _logits(ranker, rows, states, index, with_slots: bool = True) -> torch.Tensor:
    who = rows["owner"][index]
    return ranker(
        states["interests"][who],
        states["mask"][who],
        states["user"][who],
        rows["starters"][index],
        rows["slots"][index] if with_slots else None,
    )


def stage_ranker(p: Pipeline) -> dict:
    """Fit r_util (Eq. 7) twice: on train users for the generator, on judge users to judge it."""
    if not p.impressions:
        return {"skipped": "no impressions (data.impressions), so no utility to learn"}
    unknown = {i.user_id for i in p.impressions} - set(p.users)
    if unknown:
        raise UserError(
            f"{p.impressions_file}: user_id: {len(unknown)} users of the impressions "
            f"are not in {p.users_file}"
        )
    test = shown_lists(p, p.ids("test"))
    rows, states = _ranker_rows(p, test), _pad_states([s for _, s in test])
    every, figures = torch.arange(len(rows["owner"])), {}
    for name, split in (("train", "train"), ("judge", "judge")):
        pairs = shown_lists(p, p.ids(split))
        if sum(bool(i.clicked) for i, _ in pairs) < 10:
            raise UserError(
                f"{p.impressions_file}: clicked: fewer than 10 lists with a tap among "
                f"the {split} users; a ranker needs more logs"
            )
        ranker = fit_ranker(p, pairs, name)
        with torch.no_grad():
            logits = _logits(ranker, rows, states, every, with_slots=False)
            shown = torch.sigmoid(_logits(ranker, rows, states, every))
        figures[name] = {
            "lists": len(pairs),
            "auc_slot_controlled": ib.slot_controlled_auc(
                logits.numpy(), rows["clicked"].numpy(), rows["slots"].numpy()
            ),
            "ece": ib.expected_calibration_error(shown.numpy(), rows["targets"].numpy()),
        }
    return figures


# -------------------------------------------------------------------------------------------- sit


def teacher_list(p: Pipeline, teacher, interests: list[str], rng: random.Random) -> list[str]:
    return p.usable(teacher.write(interests, p.config.generator.list_size, rng), interests)


def new_optimiser(model, learning_rate: float, steps: int):
    """AdamW on the LoRA weights, a tenth of the steps warming up, then linear to zero."""
    optimiser = torch.optim.AdamW(
        [w for w in model.parameters() if w.requires_grad], learning_rate, weight_decay=0.0
    )
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warm, max(0.0, (steps - i) / max(1, steps - warm)))
    )
    return optimiser, schedule


def step(model, optimiser, schedule, loss: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([w for w in model.parameters() if w.requires_grad], 1.0)
    optimiser.step()
    schedule.step()


def stage_sit(p: Pipeline) -> dict:
    """Supervised interest-expanded instruction tuning (Eq. 5) on the teacher's lists."""
    settings, teacher, k = p.config.sit, roles.RuleTeacher(), p.config.generator.list_size
    rng, rows, short = random.Random(p.seed("sit")), [], 0
    for user_id in p.ids("train"):
        for state in p.states[user_id][:-1]:
            lists = (
                [
                    teacher_list(p, teacher, state.interests, rng)
                    for _ in range(settings.lists_per_user)
                ]
                if state.interests
                else []
            )
            full = [x for x in lists if len(x) == k]
            short += len(lists) - len(full)
            if full:
                rows.append((state.interests, full))
    if not rows:
        raise UserError(
            "sit: the teacher wrote no full list for any user; generator.list_size may "
            "be larger than the interests allow"
        )
    torch.manual_seed(p.seed("sit", "lora"))
    model = llm.add_lora(
        llm.load_generator(p.model_path, p.config.generator.load_in_4bit),
        p.config.generator.lora_rank,
        p.config.generator.lora_alpha,
        p.seed("lora"),
    )
    batches = -(-len(rows) // settings.batch_users)
    optimiser, schedule = new_optimiser(model, settings.learning_rate, settings.epochs * batches)
    first = last = float("nan")
    for epoch in range(settings.epochs):
        rng.shuffle(rows)
        losses = []
        for start in _bar(range(0, len(rows), settings.batch_users), f"sit epoch {epoch + 1}"):
            batch = rows[start : start + settings.batch_users]
            completions = [
                [llm.encode_completion(p.tokenizer, x) for x in lists] for _, lists in batch
            ]
            logps = torch.cat(
                llm.completion_logps(
                    model,
                    [p.prompt(i) for i, _ in batch],
                    completions,
                    p.config.generator.head_chunk,
                )
            )
            loss = -logps.sum() / sum(
                len(c) for cs in completions for c in cs
            )  # Eq. (5), per token
            step(model, optimiser, schedule, loss)
            losses.append(loss.item())
            p.run.log("sit", epoch=epoch, loss=loss.item(), learning_rate=schedule.get_last_lr()[0])
        first, last = (losses[0] if epoch == 0 else first), float(np.mean(losses))
    llm.save_adapter(model, p.run / "sit" / "adapter")
    return {"rows": len(rows), "short_lists_left_out": short, "first_loss": first, "loss": last}


# -------------------------------------------------------------------------------------------- dpo


def mine_round(
    p: Pipeline, ranker, states: list[State], sampled, rng
) -> tuple[list[dict], Counter]:
    """Sampled lists -> pool -> list search (Algorithm 1) -> chosen and rejected lists (Eq. 8)."""
    settings, k, teacher = p.config.dpo, p.config.generator.list_size, roles.RuleTeacher()
    pools, complete = [], []
    for state, lists in zip(states, sampled, strict=True):
        taught = [
            teacher_list(p, teacher, state.interests, rng) for _ in range(settings.teacher_lists)
        ]
        complete.append([x for x in lists + taught if len(x) == k])
        pools.append(sorted({y for x in lists + taught for y in x}))
    p.encoder(sorted({y for pool in pools for y in pool}))
    width = max(map(len, pools))
    b, counts, pairs = len(states), Counter(), []
    utility, valid = torch.zeros(b, width), torch.zeros(b, width, dtype=torch.bool)
    similarity = torch.zeros(b, width, width)
    for i, (state, pool) in enumerate(zip(states, pools, strict=True)):
        n = len(pool)
        if n < k:
            continue
        embeddings = p.encoder(pool)
        utility[i, :n], valid[i, :n] = utilities(ranker, state, embeddings), True
        similarity[i, :n, :n] = embeddings @ embeddings.T
    rich = valid.sum(1) >= k
    counts["too_few_candidates"] = int((~rich).sum())
    beams = torch.full((b, settings.beam, k), -1)
    beams[rich] = ib.list_search(
        utility[rich],
        similarity[rich],
        k,
        settings.beam,
        settings.expand,
        settings.weight,
        valid[rich],
    )[0]
    for i in rich.nonzero().flatten().tolist():
        pool, n = pools[i], len(pools[i])
        number = {y: j for j, y in enumerate(pool)}
        lists = [x for x in beams[i].tolist() if min(x) >= 0]
        lists += [[number[y] for y in x] for x in complete[i]]
        lists += [rng.sample(range(n), k) for _ in range(settings.random_lists)]
        chosen, rejected = ib.mine_preferences(
            torch.tensor(lists),
            utility[i, :n],
            similarity[i, :n, :n],
            settings.weight,
            settings.margin,
            settings.tolerance,
        )
        kinds = {
            kind: [pool[j] for j in lists[rejected[kind]]]
            for kind in settings.negatives
            if rejected[kind] is not None
        }
        counts.update({f"no_{kind}": 1 for kind in settings.negatives if rejected[kind] is None})
        if kinds:
            pairs.append(
                {
                    "interests": states[i].interests,
                    "chosen": [pool[j] for j in lists[chosen]],
                    "rejected": kinds,
                }
            )
    counts["pairs"] = sum(len(pair["rejected"]) for pair in pairs)
    return pairs, counts


def encode_pairs(p: Pipeline, pairs: list[dict]) -> list[tuple[list[int], list[list[int]]]]:
    """(prompt ids, [chosen ids, rejected ids, ...]) of every user with pairs: one tree row each."""
    return [
        (
            p.prompt(x["interests"]),
            [llm.encode_completion(p.tokenizer, y) for y in (x["chosen"], *x["rejected"].values())],
        )
        for x in pairs
    ]


def list_logps(p: Pipeline, model, rows) -> list[torch.Tensor]:
    prompts, completions = zip(*rows, strict=True)
    return llm.completion_logps(
        model, list(prompts), list(completions), p.config.generator.head_chunk
    )


def align(p: Pipeline, model, pairs: list[dict], label: str, pick=None) -> dict:
    """DPO (Eq. 6) on preference pairs, in place; with `pick`, the checkpoint it values most stays.

    The reference is the model as it comes in (or the SIT policy): its log-probabilities are
    computed once, by the code path that trains.
    """
    settings, rows = p.config.dpo, encode_pairs(p, pairs)
    size, rng = settings.batch_users, random.Random(p.seed("dpo", label))
    reference = reference_logps(p, model, rows, label)
    steps = settings.passes * -(-len(rows) // size)
    marks = {round(steps * (i + 1) / settings.checkpoints) for i in range(settings.checkpoints)}
    optimiser, schedule = new_optimiser(model, settings.learning_rate, steps)
    best, best_value = (lora_weights(model), pick(model)) if pick else (None, None)
    done, first = 0, None
    bar = _bar(range(steps), f"dpo {label}")
    for _ in range(settings.passes):
        order = list(range(len(rows)))
        rng.shuffle(order)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            policy = list_logps(p, model, [rows[i] for i in batch])
            chosen = torch.cat([x[:1].expand(len(x) - 1) for x in policy])  # (P,)
            rejected = torch.cat([x[1:] for x in policy])
            ref_chosen = torch.cat([reference[i][:1].expand(len(reference[i]) - 1) for i in batch])
            ref_rejected = torch.cat([reference[i][1:] for i in batch])
            loss = ib.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, settings.beta).mean()
            first = loss.item() if first is None else first
            margin = (chosen - ref_chosen - rejected + ref_rejected).mean().item()
            if settings.sft_weight:
                tokens = sum(len(rows[i][1][0]) for i in batch)
                loss = loss - settings.sft_weight * sum(x[0] for x in policy) / tokens
            step(model, optimiser, schedule, loss)
            chosen_logp = (chosen - ref_chosen).mean().item()
            start_logp = ref_chosen.mean().item()
            p.run.log(
                "dpo",
                round=label,
                loss=loss.item(),
                margin=margin,
                chosen_logp=chosen.mean().item(),
                rejected_logp=rejected.mean().item(),
                learning_rate=schedule.get_last_lr()[0],
            )
            done += 1
            bar.update()
            if pick and done in marks:
                value = pick(model)
                p.run.log("dpo", round=label, step=done, held_out=value)
                if value > best_value:
                    best, best_value = lora_weights(model), value
    bar.close()
    if chosen_logp < 0.25 * start_logp:  # both negative: a quarter less likely, in nats
        print(
            f"  warning: {label}: log-probability of chosen lists fell by {-chosen_logp:.1f} nats; "
            f"lower dpo.learning_rate or raise dpo.sft_weight"
        )
    if pick:
        model.load_state_dict(best, strict=False)
    return {
        "first_loss": first,
        "last_loss": loss.item(),
        "margin": margin,
        "chosen_logp_change": chosen_logp,
        "held_out": best_value,
    }


def lora_weights(model) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad}


@torch.no_grad()
def reference_logps(p: Pipeline, model, rows, label: str) -> list[torch.Tensor]:
    if p.config.dpo.reference == "sit" and label != "round 1":
        model = p.policy(p.run / "sit" / "adapter")
    size = p.config.dpo.batch_users
    return [
        x
        for start in _bar(range(0, len(rows), size), f"reference {label}")
        for x in list_logps(p, model, rows[start : start + size])
    ]


def list_quality(p: Pipeline, ranker, states: list[State], sampled) -> tuple[float, float]:
    """Mean utility and mean pairwise dissimilarity of sampled lists; an empty list counts as 0."""
    p.encoder(sorted({y for lists in sampled for x in lists for y in x}))
    utility, diversity = [], []
    for state, lists in zip(states, sampled, strict=True):
        for x in lists:
            embeddings = p.encoder(x)
            utility.append(utilities(ranker, state, embeddings).mean().item() if x else 0.0)
            diversity.append(ib.list_diversity(embeddings @ embeddings.T).item())
    return float(np.mean(utility)), float(np.mean(diversity))


def stage_dpo(p: Pipeline) -> dict:
    """Rounds of sample -> list search -> mine -> DPO; and the SFT+DPO baseline on clicked lists."""
    if not p.impressions:
        return {"skipped": "no impressions (data.impressions), so no preferences to learn"}
    settings, ranker, figures = p.config.dpo, p.ranker("train"), {}
    valid = [s for u in p.ids("valid") if (s := p.states[u][-1]).interests]

    def held_out(model) -> float:
        """lambda * utility + (1 - lambda) * diversity on users that no pair comes from."""
        sampled = p.sample_lists(model, [s.interests for s in valid], 2, p.seed("dpo", "held out"))
        utility, diversity = list_quality(p, ranker, valid, sampled)
        p.run.log("dpo", held_out_utility=utility, held_out_diversity=diversity)
        return settings.weight * utility + (1 - settings.weight) * diversity

    adapter, pairs = p.run / "sit" / "adapter", []
    for number in range(1, settings.rounds + 1):
        label, folder = f"round {number}", p.run / "dpo" / f"round{number}"
        key = digest(p.key("dpo"), number)
        if p.run.is_done(f"dpo/round{number}", key):
            adapter, pairs = folder / "adapter", pairs + read_json(folder / "pairs.json")
            continue
        cut = min(number, len(p.config.data.cuts)) - 1  # early, middle, latest slice of the log
        states = [s for u in p.ids("train") if (s := p.states[u][cut]).interests]
        model = p.policy(adapter, trainable=True)
        sampled = p.sample_lists(
            model, [s.interests for s in states], settings.samples, p.seed("dpo", number)
        )
        new, counts = mine_round(p, ranker, states, sampled, random.Random(p.seed("mine", number)))
        pairs = pairs + new
        if not pairs:
            raise UserError(
                "dpo: no preference pair was found; lower dpo.margin or raise dpo.samples"
            )
        made = align(p, model, pairs, label, held_out)
        llm.save_adapter(model, folder / "adapter")
        write_json(folder / "pairs.json", new)
        utility, diversity = list_quality(p, ranker, states, sampled)
        figures[label] = {
            "utility_before": utility,
            "diversity_before": diversity,
            **counts,
            **made,
        }
        p.run.mark_done(f"dpo/round{number}", key, **figures[label])
        print(f"  {label}: {_short(figures[label])}")
        adapter = folder / "adapter"
    key = digest(p.key("dpo"), "vanilla")
    if not p.run.is_done("dpo/vanilla", key):
        clicked = click_pairs(p)
        model = p.policy(p.run / "sit" / "adapter", trainable=True)
        figures["clicked against unclicked"] = align(p, model, clicked, "vanilla")
        llm.save_adapter(model, p.run / "dpo" / "vanilla" / "adapter")
        p.run.mark_done("dpo/vanilla", key, pairs=len(clicked))
    return figures


def click_pairs(p: Pipeline) -> list[dict]:
    """Vanilla pairs of the SFT+DPO baseline: a user's tapped list against an ignored one."""
    by_state: dict[int, tuple[State, list, list]] = {}
    for impression, state in shown_lists(p, p.ids("train")):
        _, tapped, ignored = by_state.setdefault(id(state), (state, [], []))
        (tapped if impression.clicked else ignored).append(impression.starters)
    return [
        {"interests": state.interests, "chosen": chosen, "rejected": {"ignored": rejected}}
        for state, tapped, ignored in by_state.values()
        if state.interests
        for chosen, rejected in zip(tapped, ignored, strict=False)
    ]


# ------------------------------------------------------------------------------------------- eval


def methods(p: Pipeline) -> dict[str, tuple[Path | None, bool]]:
    """Method -> (adapter, whether it is given the distilled interests)."""
    table = {"PE": (None, False), "PE+RID": (None, True), "SFT": (p.run / "sit" / "adapter", True)}
    if p.impressions:
        table["SFT+DPO"] = (p.run / "dpo" / "vanilla" / "adapter", True)
        table["IceBreaker"] = (p.run / "dpo" / f"round{p.config.dpo.rounds}" / "adapter", True)
    return table


def stage_eval(p: Pipeline) -> dict:
    """Let every method write for the test users, and judge the lists (eval.py)."""
    import eval as evaluation

    states = {u: p.states[u][-1] for u in p.ids("test") if p.states[u][-1].interests}
    if not states:
        raise UserError("eval: no test user has a history; more users are needed")
    whole = {u: p.histories[u][-1].texts[::-1] for u in states}  # latest first
    lists: dict[str, dict[str, list[list[str]]]] = {}
    for method, (adapter, distilled) in _bar(methods(p).items(), "write starters"):
        inputs = [s.interests if distilled else whole[u] for u, s in states.items()]
        sampled = p.sample_lists(p.policy(adapter), inputs, p.config.eval.lists, p.seed("eval"))
        lists[method] = dict(zip(states, sampled, strict=True))
    with atomic_path(p.run / "eval" / "starters.jsonl") as temporary:
        rows = [
            {"user_id": u, "interests": s.interests, "starters": {m: lists[m][u] for m in lists}}
            for u, s in states.items()
        ]
        temporary.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    p.encoder(sorted({y for m in lists.values() for u in m.values() for x in u for y in x}))

    def scorer(name: str):
        ranker = p.ranker(name)
        return lambda u, starters: utilities(ranker, states[u], p.encoder(starters)).numpy()

    truth = None
    if not p.config.data.users:
        import world

        truth = world.load_truth(p.run / "world")
    result = evaluation.evaluate(
        lists,
        scorer("judge") if p.impressions else None,
        p.encoder,
        truth=truth,
        train_score=scorer("train") if p.impressions else None,
        bootstrap=p.config.eval.bootstrap,
        seed=p.config.run.seed,
    )
    shown = random.Random(p.seed("examples")).sample(
        list(states), min(len(states), p.config.eval.examples)
    )
    examples = [
        {
            "user_id": u,
            "summaries": whole[u],
            "triggers": list(zip(states[u].interests, states[u].scores, strict=True)),
            "lists": {m: lists[m][u][0] for m in lists},
        }
        for u in shown
    ]
    evaluation.write_report(result, examples, p.run / "eval")
    return {"test_users": len(states), "starters": str(p.run / "eval" / "starters.jsonl")}


# ------------------------------------------------------------------------------------------- main


def _short(figures: dict) -> str:
    """One line of figures: floats to four places, nested ones in braces."""

    def show(value):
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, dict):
            return "{" + _short(value) + "}"
        return "[" + ", ".join(map(show, value)) + "]" if isinstance(value, list) else str(value)

    return ", ".join(f"{name} {show(value)}" for name, value in figures.items())


def run_stages(config: Config, wanted: list[str]) -> None:
    """Run the wanted stages and, first, those they need; skip what is done with these settings."""
    # Adam's averages of weights that hardly move become denormal, which slows a CPU several times.
    torch.set_flush_denormal(True)
    p = Pipeline(config)
    needed = set(wanted)
    for stage in reversed(STAGES):
        if stage in needed:
            needed.update(STAGES[stage][0])
    for stage in (s for s in STAGES if s in needed):
        key, note = p.key(stage), "" if stage in wanted else f" (needed by {', '.join(wanted)})"
        if p.run.is_done(stage, key):
            print(f"{stage}: already done with these settings, skipped")
            continue
        print(f"{stage}: running{note}", flush=True)
        started = time.time()
        figures = globals()[f"stage_{stage}"](p)
        p.encoder.save()
        seconds = round(time.time() - started, 1)
        p.run.mark_done(stage, key, seconds=seconds, **figures)
        p.run.log(stage, seconds=seconds, **figures)
        print(f"{stage}: {_short(figures)}; {seconds} s", flush=True)
    if "eval" in wanted:
        print("\n" + (p.run / "eval" / "table.md").read_text())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"Everything is in {p.run.path}; peak memory {peak:.1f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", action="append", choices=[*STAGES, "all"], help="default: all")
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    arguments = parser.parse_args()
    config = load_config(arguments.config, arguments.settings)
    stages = arguments.stage or ["all"]
    run_stages(config, list(STAGES) if "all" in stages else stages)


if __name__ == "__main__":
    script(main)
