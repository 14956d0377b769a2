"""The path of a request: a history in, starters out. No HTTP, no store (serve.py, store.py).

    engine = Engine(load_config("runs/default/config.yaml"))
    (answer,) = engine.write([Ask(user, shown=[], avoid=[], n=5)])

History statistics and resonance scorer -> gate -> generator -> parser -> filters -> utility -> list
search over the starters of `serve.candidates` sampled lists. Asks are written in batches, by one
thread. What the ranker was trained to know of a user's taste is here what the server itself has
shown and seen tapped.

Legend: B asks, n sampled lists of an ask, T tokens decoded so far, M interests, D embedding.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import data
import icebreaker as ib
import llm
import roles
from config import Config
from files import UserError, digest, forget_texts
from llm.encoder import BATCH
from roles.languages import language
from roles.players import Players
from roles.prompted import ROOM
from roles.writer import Writer
from run import Run, UserState, history_of, profile_text, profile_vector
from serving import feedback
from stages.cold_start import PopularStarters, profile_language
from stages.pools import list_order, score_pools
from stages.ranker import load_ranker, utilities
from stages.rid import Distiller

METHODS = ("PE", "SFT", "IceBreaker")
MOST_VECTORS = 100_000  # embeddings in memory, 1.5 kB each with MiniLM
# Characters of an ask's history that are embedded, the latest: 500 short summaries. MiniLM reads
# some 10,000 a second and core, and everybody waits for it.
MOST_CHARACTERS = 24_000
CHUNK = 8000  # characters that are embedded before it is asked again whether somebody waits


@dataclass(frozen=True)
class Interest:
    text: str
    score: float  # chance of a revisit, in the order of s(u, h)
    kept: bool  # by the gate


@dataclass(frozen=True)
class Starter:
    text: str
    utility: float  # r_util, in (0, 1)
    interest: str | None  # the nearest trigger interest that it names whole; None: it names none
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
    shown: Sequence[tuple[str, int, bool]] = ()  # (starter, slot, tapped) of lists shown before
    avoid: Sequence[str] = ()  # not to be written
    method: str = "IceBreaker"
    draw: int = 0  # another number: other random numbers
    # Called with each good starter of a list as it is decoded; they come first in the answer.
    emit: Callable[[Starter], None] | None = None
    # Called with the interests and the gate's line before anything is decoded.
    begin: Callable[[list[Interest], float | None], None] | None = None
    again: Sequence[str] = ()  # to be written where there is nothing else
    # Of serving/suggest.py: a conversation, the language that is wanted (None: that of its last
    # query), and how many earlier turns were left out; begin is called with all that were cut.
    turns: Sequence[data.Turn] = ()
    language: str | None = None
    left_out: int = 0


@dataclass
class Case:  # an ask on its way; the fields are Answer's where they have its names
    ask: Ask
    gone: Callable[[], bool]  # has its client left?
    state: UserState  # its interests are what the generator is told
    interests: list[Interest]
    threshold: float | None
    lists: list[list[str]] = dataclasses.field(default_factory=list)  # as written, but fit to show
    emitted: list[Starter] = dataclasses.field(default_factory=list)
    tokens: int = 0


class Engine:
    """Models of a run, and asks through them. Everything but `forget` is for one thread.

    Raises UserError if the run lacks a stage, or serve.arms names a method that it lacks.
    """

    def __init__(self, config: Config):
        llm.settle_libraries()
        self.config, self.run = config, Run(config, describe=False)
        # First: what has changed fails anywhere, or loads as well as any other.
        folder = self.run.folder
        folder.require("rid", "sit", *filter(folder.has_run, ("summarize", "ranker", "dpo")))
        # In memory: what was written for a user is kept in the store alone.
        self.writer = Writer(config, answers=Path(":memory:"))
        self.players = Players(config, self.run.encoder, self.writer)
        self.distiller = Distiller.load(self.run)
        self.popular = PopularStarters(self.run) if self.run.impressions else None
        people = [] if config.data.users else self.run.ids("test")[:12]  # simulated ones only
        self.examples = [self.run.users[user_id] for user_id in people]
        self.model, self.adapter, self.version = None, None, "sit"
        self.ranker = lambda starters, **_: torch.zeros(len(starters))  # all alike without a ranker
        if not config.generator.endpoint:
            self.model = self.writer.policy(self.run.adapter("sit"))
        self._names = {"SFT": "default"}  # method -> PEFT's name of its adapter
        self._prefixes: dict[str, llm.Prefix] = {}  # by the name of the policy that has read it
        self.refresh()
        if missing := set(config.serve.arms) - set(self.methods):
            names = ", ".join(sorted(missing))
            raise UserError(f"serve.arms: {self.run.folder.path} has no {names}; it needs "
                            "impressions (data.impressions) and stage dpo, and a "
                            "generator.endpoint that has the adapter; or serve.arms=[SFT]")
        tokenizer = self.writer.tokenizer
        ends = {i for text, i in tokenizer.get_vocab().items() if "&" in text or ">" in text}
        # Only these can complete a starter.
        self._ends = torch.tensor(sorted(ends - {*tokenizer.all_special_ids}))
        if self.model:  # what loads or compiles at the first use, does so now
            session = data.Session(session_id="1", summary="warming up")
            self.write([Ask(data.User(user_id="nobody", sessions=[session]), 1, method="SFT")])

    # -------------------------------------------------------------------------- which model writes

    @property
    def methods(self) -> tuple[str, ...]:
        return METHODS if self.adapter else METHODS[:2]

    def refresh(self) -> bool:
        """Take the newest accepted round, if there is one and it is not yet in use."""
        newest = feedback.current(self.run)
        if not newest or newest["version"] == self.version:  # none: while a run is trained again
            return False
        adapter, file = self.run.folder / newest["adapter"], Path(newest["ranker"])
        ranker = load_ranker(self.run, file.stem, str(file.parent))
        if self.model:
            name = "newest " + newest["version"].replace(".", "-")  # no "default", no path
            with llm.whole_adapter(adapter):
                self.model.load_adapter(str(adapter), adapter_name=name)
            if self.adapter:
                self.model.delete_adapter(self._names["IceBreaker"])
                self._prefixes.pop(self._names["IceBreaker"], None)
            self._names["IceBreaker"] = name
            self.model.eval()
        elif not self.writer.is_served(adapter):  # the server of models was not told of it yet
            return False
        self.ranker, self.adapter, self.version = ranker, adapter, newest["version"]
        return True

    @contextlib.contextmanager
    def _policy(self, method: str):  # (the model as this method writes with it, its adapter's name)
        if method == "PE":
            with self.model.disable_adapter():
                yield self.model, ""
        else:
            self.model.set_adapter(self._names[method])  # all of them stay loaded
            yield self.model, self._names[method]

    # --------------------------------------------------------------------------------- one batch

    @staticmethod
    def history_hash(user: data.User) -> str:
        return digest(user.model_dump(mode="json"))

    def forget(self) -> None:  # for any thread
        """Drop every vector that is not of the run, and what is remembered of texts: nobody notes
        whose they were. A batch that is running fills them again: queue.py calls it again then."""
        self.run.encoder.trim(0)
        forget_texts()

    @torch.no_grad()
    def write(self, asks: list[Ask],
              gone: Callable[[int], bool] = lambda i: False) -> list[Answer | None]:
        """One batch. gone(i), asked at every step: the client of ask i has left; its answer is
        None, and nothing more is decoded for it. (generator.endpoint: it is decoded to the end.)"""
        asks = [dataclasses.replace(ask, shown=latest(ask.shown, lambda s: s[0])) for ask in asks]
        users = [self.players.summarised(ask.user) for ask in asks]
        users = [user.model_copy(update={"sessions": latest(user.sessions, lambda s: s.summary)})
                 for user in users]
        if not self._encode(asks, users, lambda: all(map(gone, range(len(asks))))):
            return [None] * len(asks)
        cases = self._distil(asks, users, gone)
        for method in dict.fromkeys(ask.method for ask in asks):
            if told := [case for case in cases if case.ask.method == method
                        and case.state.interests and not case.gone()]:
                self._sample(method, told)
        answers = self._rank(cases)
        self.run.encoder.trim(MOST_VECTORS)
        return [None if case.gone() else answer
                for case, answer in zip(cases, answers, strict=True)]

    def _encode(self, asks: list[Ask], users: list[data.User], nobody_waits) -> bool:
        """Embed the texts of all asks, some at a time: a long history takes seconds. False: given
        up, as nobody waits any more."""
        texts = {s.summary for user in users for s in user.sessions}
        texts |= {profile_text(user) for user in users if user.profile}
        texts |= {starter for ask in asks for starter, _, _ in ask.shown}
        order = sorted(texts, key=lambda text: (-len(text), text))  # like lengths together
        while order:
            if nobody_waits():
                return False
            size = min(BATCH, 1 + CHUNK // (1 + len(order[0])))
            self.run.encoder(order[:size])
            del order[:size]
        return True

    def characters(self, ask: Ask) -> int:
        """How many of an ask's history are not yet embedded: what it costs the others."""
        texts = map(to_be_read, latest(ask.user.sessions, to_be_read))
        return sum(len(text) for text in texts if text not in self.run.encoder)

    def _distil(self, asks: list[Ask], users: list[data.User], gone: Callable) -> list[Case]:
        """Summaries -> statistics -> resonance -> gate; users: those of the asks, summarised."""
        encode, cases = self.run.encoder, []
        # By the hour, so that an ask made again is answered alike.
        now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0, tzinfo=None)
        histories = [history_of(user.sessions, now, encode) for user in users]
        profiles = torch.stack([profile_vector(user, encode) for user in users])  # (B, D)
        ids = [user.user_id for user in users]  # who is in the log is scored as there
        rows = self.distiller.scores(histories, profiles, ids)  # of each summary
        for i, (ask, history, row) in enumerate(zip(asks, histories, rows, strict=True)):
            case = self._case(ask, functools.partial(gone, i), history, row.tolist())
            cases.append(case)
            if ask.begin:
                ask.begin(case.interests, case.threshold)
        return cases

    def _case(self, ask: Ask, gone: Callable, history: ib.History, scores: list[float]) -> Case:
        """What the gate keeps of a history, and what the generator is told of it."""
        fit = self.distiller.fit(history)
        kept = self.distiller.keep(history, scores, fit) if scores else []
        best = sorted(fit, key=lambda j: -scores[j])  # the page shows what was near
        shown = (kept + [j for j in best if j not in kept])[: max(12, len(kept))]
        # PE, as the paper's, hears of everything, the latest first.
        told = fit[::-1] if ask.method == "PE" else kept
        state = UserState(ask.user.user_id, [history.texts[j] for j in told],
                          history.embeddings[told], self.run.taste(ask.shown))
        interests = [Interest(history.texts[j], scores[j], j in kept) for j in shown]
        threshold = self.distiller.threshold(history) if scores else None
        return Case(ask, gone, state, interests, threshold)

    # ------------------------------------------------------------------------------- the generator

    def _sample(self, method: str, cases: list[Case]) -> None:
        """Fill in `lists`: serve.candidates of each case, parsed, filtered, K starters at most."""
        n, k = self.config.serve.candidates, self.config.generator.list_size
        told = [case.state.interests for case in cases]
        seeds = [int(digest(self.history_hash(a.user), a.avoid, a.draw, method)[:11], 16)
                 for a in (case.ask for case in cases)]  # the same ask, the same answer
        if self.config.generator.endpoint:
            adapters = {"PE": None, "SFT": self.run.adapter("sit"), "IceBreaker": self.adapter}
            written = self.writer.write(adapters[method], told, n, int(digest(seeds)[:7], 16))
            for case, lists in zip(cases, written, strict=True):
                case.lists = [self._fit(starters, case) for starters in lists]
            return
        prompts = [self.writer.prompt(interests, method == "PE") for interests in told]
        with self._policy(method) as (model, name):
            head = self.writer.head(method == "PE")  # where a template has today's date, a new one
            if name not in self._prefixes or self._prefixes[name].ids != head:
                self._prefixes[name] = llm.read_prefix(model, head)
            texts = self.writer.draw(
                model, prompts, n, self.config.run.seed, numbers=seeds, rows=n * len(prompts),
                prefix=self._prefixes[name], watch=lambda ids: self._watch(ids, cases))
        for case, row in zip(cases, texts, strict=True):
            case.lists = [self._fit(llm.parse_starters(text).starters, case)[:k] for text in row]

    def _fit(self, starters: Sequence[str], case: Case) -> list[str]:
        return roles.filter_starters(starters, case.state.interests, case.ask.avoid)[0]

    def _watch(self, tokens: torch.Tensor, cases: list[Case]) -> torch.Tensor:
        """After each step: emit what the first lists have completed; which samples to give up?

        tokens (B, n, T) -> bool (B, n): those whose client has left, and those in a loop.
        """
        tokenizer = self.writer.tokenizer
        newest = tokens[:, 0, -1].cpu()  # (B,)
        for i in torch.isin(newest, self._ends).nonzero().flatten().tolist():
            if cases[i].ask.emit:
                text = tokenizer.decode(tokens[i, 0], skip_special_tokens=True)
                self._emit(cases[i], llm.parse_starters(text).starters)
        alive = (tokens[..., -1] != tokenizer.pad_token_id).sum(1).tolist()  # samples that go on
        for case, count in zip(cases, alive, strict=True):
            case.tokens += count
        left = torch.tensor([case.gone() for case in cases], device=tokens.device)  # (B,)
        return left[:, None] | in_a_loop(tokens)

    def _emit(self, case: Case, starters: Sequence[str]) -> None:
        old = {roles.normal_form(y) for y in (*case.ask.again, *(s.text for s in case.emitted))}
        for text in self._fit(starters, case):
            if roles.normal_form(text) not in old and len(case.emitted) < case.ask.n:
                utility = float(utilities(self.ranker, case.state, self.run.encoder([text])))
                starter = self._starter(case, text, utility)
                if starter.interest is not None:  # the others may be dropped in the end
                    case.emitted.append(starter)
                    case.ask.emit(starter)

    # ---------------------------------------------------------------------------------- the order

    def _starter(self, case: Case, text: str, utility: float) -> Starter:
        # "Because you asked about ..." is to be true: near is not enough, the starter must name it.
        near = (case.state.embeddings @ self.run.encoder([text])[0]).tolist()  # (M, D) @ (D,)
        nearness = dict(zip(case.state.interests, near, strict=True))
        named = roles.named_interests(text, nearness)
        return Starter(text, utility, max(named, key=nearness.get, default=None), "generated")

    def _rank(self, cases: list[Case]) -> list[Answer]:  # in the order of list search, best first
        pools = [*map(self._pool, cases)]
        scored = score_pools(self.run.encoder, self.ranker, [case.state for case in cases], pools)
        if self.config.serve.candidates == 1:  # as the paper deploys: the list as it was written
            orders = [range(len(pool)) for pool in pools]
        else:
            orders = list_order(self.config.dpo, self.config.generator.list_size, *scored,
                                lists=1 + self.config.serve.ahead)
        answers = []
        for case, pool, utility, order in zip(cases, pools, scored[0], orders, strict=True):
            starters = [self._starter(case, pool[j], float(utility[j])) for j in order]
            starters = (with_reasons(case.emitted + starters, case.ask.n)
                        if case.state.interests else self._cold_start(case))
            if case.ask.emit:
                for starter in starters[len(case.emitted) : case.ask.n]:  # the list was too short
                    case.ask.emit(starter)
            answers.append(
                Answer(case.interests, case.threshold, starters, case.tokens, self.version))
        return answers

    def _pool(self, case: Case) -> list[str]:
        """Starters of all lists, none twice and none that was emitted; old ones if all are old."""
        def distinct(old: Sequence[str]) -> list[str]:
            seen = [*old, *(starter.text for starter in case.emitted)]
            texts = itertools.chain(*case.lists)
            return roles.filter_starters(texts, case.state.interests, seen)[0]

        return distinct(case.ask.again) or ([] if case.emitted else distinct(()))

    def _cold_start(self, case: Case) -> list[Starter]:
        """Popular, varied starters for the profile of somebody of whom nothing else is known."""
        if not self.popular:
            return []
        profile = case.ask.user.profile or {}
        said = [s.summary for s in case.ask.user.sessions if s.summary]  # none fit to be shown
        told = roles.majority_language(said) or profile_language(profile)

        def ranked(avoid: list[str]) -> list[str]:
            def keep(starters: list[str]) -> list[str]:
                wanted = told or roles.majority_language(starters)  # as most of them are
                # By their words: a bare name would pass for any language of its script.
                starters = [y for y in starters if language(y) == wanted]
                return roles.filter_starters(starters, said, avoid)[0]

            return self.popular.ranked(profile, keep)

        avoid = [*case.ask.avoid]
        texts = ranked(avoid + [*case.ask.again]) or ranked(avoid)
        texts = texts[: case.ask.n * (1 + self.config.serve.ahead)]
        rated = zip(texts, utilities(self.ranker, case.state, self.run.encoder(texts)), strict=True)
        return [Starter(text, float(utility), None, "cold start") for text, utility in rated]


def with_reasons(starters: list[Starter], n: int) -> list[Starter]:
    """Those that name an interest and, where they are fewer than n, the best of the others."""
    room = n - sum(starter.interest is not None for starter in starters)
    others = [starter for starter in starters if starter.interest is None]
    return [starter for starter in starters if starter not in others[max(0, room):]]


def latest(items: Sequence, text: Callable[..., str]) -> Sequence:
    """The last items whose texts have MOST_CHARACTERS together at most; one at least."""
    total = itertools.accumulate(len(text(item)) for item in reversed(items))
    return items[-max(1, sum(n <= MOST_CHARACTERS for n in total)) :]


def to_be_read(session: data.Session) -> str:
    """A session's summary or, where it has none yet, what a summariser reads of its messages."""
    messages = session.messages or []
    said = [m.content for m in messages if m.role == "user"] or [m.content for m in messages]
    return session.summary or "".join(said)[:ROOM]


def in_a_loop(tokens: torch.Tensor, last: int = 16, longest: int = 4) -> torch.Tensor:
    """Which samples (B, n, T) have said the same few tokens over and over: bool (B, n)."""
    if tokens.shape[-1] < last:
        return torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    end = tokens[..., -last:]  # compared with itself, some tokens earlier
    loops = [(end[..., period:] == end[..., :-period]).all(-1) for period in range(1, longest + 1)]
    return torch.stack(loops).any(0)
