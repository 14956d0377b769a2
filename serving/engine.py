"""The path of a request: a history in, starters out. No HTTP, no store (serve.py, store.py).

    engine = Engine(load_config("runs/tiny/config.yaml"))
    (answer,) = engine.write([Ask(user, shown=[], avoid=[], n=5)])

History statistics and resonance scorer -> gate -> generator -> parser -> filters -> utility -> list
search over the starters of `serve.candidates` sampled lists. Asks are written in batches, by one
thread. What the ranker was trained to know of a user's taste is here what the server itself has
shown and seen tapped.

Legend: B asks, N candidates of an ask, n sampled lists of an ask, D embedding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pipeline import Pipeline, State, history_of, profile_text, scorer_inputs

import data
import icebreaker as ib
import llm
import roles
from config import Config, UserError, digest, read_json, read_tensors
from serving import feedback
from stages import isg, rid

METHODS = ("PE", "SFT", "IceBreaker")
# "JoJoJoJo", or half a character: a small generator has lost its thread.
_LOST = re.compile(r"([^\W\d]{2,6}?)\1{3}|([^\W\d])\2{5}|\ufffd")
MOST_VECTORS = 100_000  # embeddings in memory, 1.5 kB each with MiniLM


@dataclass(frozen=True)
class Interest:
    text: str
    score: float  # s(u, h)
    kept: bool  # by the gate


@dataclass(frozen=True)
class Starter:
    text: str
    utility: float  # r_util, in (0, 1)
    interest: str | None  # the trigger interest that it is nearest to; None for popular ones
    source: str  # "generated" or "cold start"


@dataclass(frozen=True)
class Answer:
    interests: list[Interest]  # kept ones first, then the next best, a dozen in all
    threshold: float | None  # the gate's line for this user's activity; None without a history
    starters: list[Starter]  # of 1 + serve.ahead lists, in the order in which to show them
    tokens: int  # generated
    model: str  # Engine.version of what wrote it


@dataclass(frozen=True)
class Ask:
    user: data.User
    n: int  # starters wanted; there may be fewer, and there may be more
    shown: list[tuple[str, int, bool]] = dataclasses.field(default_factory=list)
    """(starter, slot, tapped) of lists shown before: the user's taste."""
    avoid: list[str] = dataclasses.field(default_factory=list)  # not to be written
    method: str = "IceBreaker"
    draw: int = 0  # another number: other random numbers
    emit: Callable[[Starter], None] | None = None
    """Called with each good starter of a list as it is decoded; they come first in the answer."""
    begin: Callable[[list[Interest], float | None], None] | None = None
    """Called with the interests and the gate's line before anything is decoded."""


@dataclass
class Case:
    """An ask on its way."""

    ask: Ask
    state: State  # its interests are what the generator is told
    interests: list[Interest]
    threshold: float | None
    emitted: list[Starter] = dataclasses.field(default_factory=list)
    tokens: int = 0

    @property
    def full(self) -> bool:
        return len(self.emitted) >= self.ask.n


class Engine:
    """Models of a run, and asks through them. Everything but `forget` is for one thread.

    Raises UserError if the run lacks a stage, or serve.arms names a method that it lacks.
    """

    def __init__(self, config: Config):
        torch.set_flush_denormal(True)
        llm.quiet_libraries()
        p = Pipeline(config, describe=False)
        self.config, self.p = config, p
        for stage in ("rid", "sit"):
            if not (p.run / stage / "done.json").is_file():
                raise UserError(f"{p.run.path}: stage {stage} has not run; python train.py first")
        p.answers = Path(":memory:")  # what was written for a user is kept in the store alone
        self.scorer, self.gate = rid.saved_scorer(p), read_json(p.run / "rid" / "gate.json")
        self.popular = isg.PopularStarters(p) if p.impressions else None
        self.examples = [] if config.data.users else [p.users[u] for u in p.ids("test")[:12]]
        self.model, self.ranker, self.adapter, self.version = None, None, None, "sit"
        if not config.generator.endpoint:
            self.model = llm.load_adapter(p.policy(None), p.run / "sit" / "adapter", False)
        self._prefixes: dict[str, llm.Prefix] = {}
        self._forgotten = False
        self.refresh()
        if missing := set(config.serve.arms) - set(self.methods):
            raise UserError(
                f"serve.arms: {p.run.path} has no {', '.join(sorted(missing))}; it needs "
                f"impressions (data.impressions) and stage dpo, and a generator.endpoint that has "
                f"the adapter; or serve.arms=[SFT]"
            )
        k = config.generator.list_size
        self._begin = llm.user_turn(p.tokenizer, config.generator.instruction.format(n=k))[0]
        ends = {i for text, i in p.tokenizer.get_vocab().items() if "&" in text or ">" in text}
        ends -= {*p.tokenizer.all_special_ids}
        self._ends = torch.tensor(sorted(ends))  # only these can complete a starter
        if self.model:  # what loads or compiles at the first use, does so now
            session = data.Session(session_id="1", summary="warming up")
            self.write([Ask(data.User(user_id="nobody", sessions=[session]), 1, method="SFT")])

    # -------------------------------------------------------------------------- which model writes

    @property
    def methods(self) -> tuple[str, ...]:
        return METHODS if self.adapter else METHODS[:2]

    def refresh(self) -> bool:
        """Take the newest accepted round, if there is one and it is not yet in use."""
        now = feedback.current(self.p.run, self.config.dpo.rounds)
        if not now or now["version"] == self.version:  # none: while a run is trained again
            return False
        adapter, ranker = self.p.run / now["adapter"], self.p.new_ranker()
        ranker.load_state_dict(read_tensors(self.p.run / now["ranker"]))
        if self.model:
            self.model.load_adapter(str(adapter), adapter_name=_name(now["version"]))
            if self.adapter:
                self.model.delete_adapter(_name(self.version))
                self._prefixes.pop(_name(self.version), None)
            self.model.eval()
        elif not self.p.is_served(adapter):  # the server of models was not told of it yet
            return False
        self.ranker, self.adapter, self.version = ranker.eval(), adapter, now["version"]
        return True

    @contextlib.contextmanager
    def _policy(self, method: str):
        """(the model as this method writes with it, its name)."""
        if method == "PE":
            with self.model.disable_adapter():
                yield self.model, ""
        else:
            name = "default" if method == "SFT" else _name(self.version)
            self.model.set_adapter(name)
            yield self.model, name

    # --------------------------------------------------------------------------------- one batch

    @staticmethod
    def history_hash(user: data.User) -> str:
        return digest(user.model_dump(mode="json"))

    def forget(self) -> None:
        """Drop every vector that is not of the run, as nobody notes whose text a vector was. For
        any thread."""
        self.p.encoder.trim(0)
        self._forgotten = True  # once more after the batch that may be running

    @torch.no_grad()
    def write(
        self, asks: list[Ask], gone: Callable[[int], bool] = lambda i: False
    ) -> list[Answer | None]:
        """One batch. gone(i), asked at every step: the client of ask i has left; its answer is
        None, and nothing more is decoded for it. (generator.endpoint: it is decoded to the end.)"""
        everyone = range(len(asks))
        users = [self._summarised(ask.user) for ask in asks]
        if not self._encode(asks, users, lambda: all(map(gone, everyone))):
            return [None] * len(asks)
        cases = self._distil(asks, users)
        lists: list[list[list[str]]] = [[] for _ in cases]
        for method in dict.fromkeys(ask.method for ask in asks):
            own = [i for i, c in enumerate(cases) if c.ask.method == method and c.state.interests]
            own = [i for i in own if not gone(i)]
            for i, written in zip(own, self._sample(method, [cases[i] for i in own],
                                                    lambda j, own=own: gone(own[j])), strict=True):
                lists[i] = written
        answers = [None if gone(i) else answer
                   for i, answer in enumerate(self._rank(cases, lists))]
        most, self._forgotten = 0 if self._forgotten else MOST_VECTORS, False
        self.p.encoder.trim(most)
        return answers

    def _encode(self, asks: list[Ask], users: list[data.User], nobody_waits) -> bool:
        """Embed the texts of all asks, some at a time: a long history takes seconds. False: given
        up, as nobody waits any more."""
        texts = {s.summary for u in users for s in u.sessions}
        texts |= {profile_text(u) for u in users if u.profile}
        texts |= {y for ask in asks for y, _, _ in ask.shown}
        order = sorted(texts)
        for start in range(0, len(order), self.p.encoder.batch_size):
            if nobody_waits():
                return False
            self.p.encoder(order[start : start + self.p.encoder.batch_size])
        return True

    def _distil(self, asks: list[Ask], users: list[data.User]) -> list[Case]:
        """Summaries -> statistics -> resonance -> gate; users: those of the asks, summarised."""
        settings, encode = self.config.rid, self.p.encoder
        histories = [history_of(u.sessions, None, encode) for u in users]
        known = [i for i, h in enumerate(histories) if h.texts]
        scores: dict[int, list[float]] = {}
        if known:
            none = torch.zeros(encode.dim)
            profiles = [encode([profile_text(users[i])])[0] if users[i].profile else none
                        for i in known]
            batch = scorer_inputs([histories[i] for i in known], torch.stack(profiles))
            for i, row, mask in zip(known, self.scorer(**batch), batch["mask"], strict=True):
                scores[i] = row[mask].tolist()
        cases = []
        for i, (ask, history) in enumerate(zip(asks, histories, strict=True)):
            interests, threshold, told, kept = [], None, [], []
            if i in scores:
                group = ib.activity_group(history.sessions_per_week, self.gate["edges"])
                threshold = self.gate["thresholds"][group]
                kept = ib.distil(  # Eq. (4)
                    scores[i], threshold, settings.min_keep, settings.max_keep,
                    history.embeddings, settings.duplicate_cosine,
                )  # fmt: skip
                best = sorted(range(len(history.texts)), key=lambda j, i=i: -scores[i][j])
                best = kept + [j for j in best if j not in kept]
                interests = [
                    Interest(history.texts[j], scores[i][j], j in kept)
                    for j in best[: max(12, len(kept))]
                ]
                told = kept if ask.method != "PE" else list(range(len(history.texts)))[::-1]
            state = State(
                ask.user.user_id,
                [history.texts[j] for j in told],
                [scores[i][j] for j in told],
                history.embeddings[told] if told else torch.zeros(0, encode.dim),
                self._taste(ask),
            )
            cases.append(Case(ask, state, interests, threshold))
            if ask.begin:
                ask.begin(interests, threshold)
        return cases

    def _summarised(self, user: data.User) -> data.User:
        """With a summary of every session, and without what nobody should be reminded of."""
        bare = [s for s in user.sessions if not s.summary]
        made = dict(zip(map(id, bare), rid.summarise(self.p, [s.messages for s in bare]),
                        strict=True)) if bare else {}
        sessions = [s if s.summary else s.model_copy(update={"summary": made[id(s)]})
                    for s in user.sessions]
        fit = [s for s in sessions if s.summary and not roles.is_unsuitable(s.summary)]
        return user.model_copy(update={"sessions": fit})

    def _taste(self, ask: Ask) -> torch.Tensor:
        """ib.tap_taste of what the server has shown to this user."""
        rates = self.p.slot_rates
        slots = torch.tensor([slot for _, slot, _ in ask.shown], dtype=torch.long)
        taps = torch.tensor([tapped for _, _, tapped in ask.shown], dtype=torch.float32)
        surprise = taps - rates[slots.clamp_max(len(rates) - 1)]
        return ib.tap_taste(self.p.encoder([y for y, _, _ in ask.shown]), surprise)

    def _sample(self, method: str, cases: list[Case], gone) -> list[list[list[str]]]:
        """serve.candidates lists of each case, parsed and filtered, K starters at most."""
        n, g = self.config.serve.candidates, self.config.generator
        told = [c.state.interests for c in cases]
        seeds = [
            int(digest(self.history_hash(a.user), a.avoid, a.draw, method)[:11], 16)
            for a in (c.ask for c in cases)
        ]
        if not cases:
            return []
        if g.endpoint:
            adapter = {"PE": None, "SFT": self.p.run / "sit" / "adapter"}.get(method, self.adapter)
            lists = self.p.write_lists(adapter, told, n, digest_seed(seeds))
            return [[self._fit(x, c) for x in own] for own, c in zip(lists, cases, strict=True)]
        prompts = [self.p.prompt(x) for x in told]
        with self._policy(method) as (model, name):
            if name not in self._prefixes:
                self._prefixes[name] = llm.read_prefix(model, self._begin)
            texts = llm.sample(
                model, self.p.tokenizer, prompts, n, seed=self.config.run.seed, numbers=seeds,
                max_new_tokens=g.max_new_tokens, temperature=g.temperature, top_p=g.top_p,
                top_k=g.top_k, rows=n * len(prompts), prefix=self._prefixes[name],
                watch=lambda tokens: self._watch(tokens, cases, gone),
            )  # fmt: skip
        return [
            [self._fit(roles.parse_starters(x).starters, c)[: g.list_size] for x in own]
            for own, c in zip(texts, cases, strict=True)
        ]

    def _fit(self, starters: Sequence[str], case: Case) -> list[str]:
        fit = roles.filter_starters(starters, case.state.interests, case.ask.avoid)[0]
        # The filter lets everything pass to who writes neither Chinese nor in Latin letters.
        own = {data.language(x) for x in case.state.interests} == {"other"}
        return [y for y in fit if not _LOST.search(y) and (data.language(y) == "other" or not own)]

    def _watch(self, tokens: torch.Tensor, cases: list[Case], gone) -> torch.Tensor:
        """After each step: emit what the first lists have completed; which samples to give up?

        tokens (B, n, steps) -> bool (B, n): those whose client has left, and those in a loop.
        """
        pad = self.p.tokenizer.pad_token_id
        newest = tokens[:, 0, -1].cpu()
        for i in torch.isin(newest, self._ends).nonzero().flatten().tolist():
            case = cases[i]
            if case.ask.emit and not case.full:
                text = self.p.tokenizer.decode(tokens[i, 0], skip_special_tokens=True)
                self._emit(case, roles.parse_starters(text).starters)
        alive = (tokens[..., -1] != pad).sum(1).tolist()
        for case, count in zip(cases, alive, strict=True):
            case.tokens += count
        left = torch.tensor([gone(i) for i in range(len(cases))], device=tokens.device)
        return left[:, None] | _in_a_loop(tokens)

    def _emit(self, case: Case, starters: Sequence[str]) -> None:
        known = {s.text for s in case.emitted}
        for text in self._fit(starters, case):
            if text not in known and not case.full:
                (utility,) = self._utilities(case, [text])
                case.emitted.append(self._starter(case, text, utility))
                case.ask.emit(case.emitted[-1])

    # ---------------------------------------------------------------------------------- the order

    def _utilities(self, case: Case, texts: list[str]) -> list[float]:
        if not self.ranker:
            return [0.5] * len(texts)
        return isg.utilities(self.ranker, case.state, self.p.encoder(texts)).tolist()

    def _starter(self, case: Case, text: str, utility: float) -> Starter:
        state = case.state
        nearest = int((state.embeddings @ self.p.encoder([text])[0]).argmax())
        return Starter(text, utility, state.interests[nearest], "generated")

    def _rank(self, cases: list[Case], lists: list[list[list[str]]]) -> list[Answer]:
        """Candidates of each case in the order of list search, best list first."""
        pools = [  # none twice, whichever list it stands in, and none that was emitted
            roles.filter_starters(
                (y for x in own for y in x), c.state.interests, (s.text for s in c.emitted)
            )[0]
            for c, own in zip(cases, lists, strict=True)
        ]
        self.p.encoder(sorted({y for pool in pools for y in pool}))  # all at once
        made: list[list[Starter]] = []
        for case, pool in zip(cases, pools, strict=True):
            values = self._utilities(case, pool) if pool else []
            rated = zip(pool, values, strict=True)
            made.append([self._starter(case, y, u) for y, u in rated])
        order = self._in_lists(made)
        answers = []
        for case, starters, own in zip(cases, made, order, strict=True):
            ready = case.emitted + [starters[j] for j in own]
            if not case.state.interests:
                ready = self._cold_start(case)
            for starter in ready[len(case.emitted) : case.ask.n]:  # the first list was too short
                if case.ask.emit:
                    case.ask.emit(starter)
            answers.append(
                Answer(case.interests, case.threshold, ready, case.tokens, self.version))
        return answers

    def _in_lists(self, made: list[list[Starter]]) -> list[list[int]]:
        b, n = len(made), max(map(len, made), default=0)
        if not n:
            return [[] for _ in made]
        if self.config.serve.candidates == 1:  # the list as it was written
            return [list(range(len(x))) for x in made]
        utility, valid = torch.zeros(b, n), torch.zeros(b, n, dtype=torch.bool)
        vectors = torch.zeros(b, n, self.p.encoder.dim)
        for i, own in enumerate(made):
            if own:
                vectors[i, : len(own)] = self.p.encoder([s.text for s in own])
                utility[i, : len(own)] = torch.tensor([s.utility for s in own])
                valid[i, : len(own)] = True
        similarity = vectors @ vectors.mT
        return isg.in_lists(self.config, utility, similarity, valid, 1 + self.config.serve.ahead)

    def _cold_start(self, case: Case) -> list[Starter]:
        """Popular, varied starters for the profile of somebody of whom nothing else is known."""
        if not self.popular:
            return []
        profile = case.ask.user.profile or {}
        said = [s.summary for s in case.ask.user.sessions if s.summary]  # none fit to be shown
        chinese = profile.get("language", "").lower().startswith(("zh", "chinese", "中"))

        def keep(starters: list[str]) -> list[str]:
            like = said or (["中文"] if chinese else starters)  # else as most of them are
            return roles.filter_starters(starters, like, case.ask.avoid)[0]

        texts = self.popular.ranked(profile, keep)[: case.ask.n * (1 + self.config.serve.ahead)]
        values = self._utilities(case, texts) if texts else []
        return [Starter(y, u, None, "cold start") for y, u in zip(texts, values, strict=True)]


def _name(version: str) -> str:
    """The name under which PEFT knows an adapter: no dot, which would be taken for a path."""
    return version.replace(".", "-")


def _in_a_loop(tokens: torch.Tensor, last: int = 16, longest: int = 4) -> torch.Tensor:
    """Which samples (B, n, steps) have said the same few tokens over and over: bool (B, n)."""
    if tokens.shape[-1] < last:
        return torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    end = tokens[..., -last:]
    return torch.stack(
        [(end[..., p:] == end[..., :-p]).all(-1) for p in range(1, longest + 1)]
    ).any(0)


def digest_seed(seeds: list[int]) -> int:
    return int(digest(seeds)[:7], 16)
