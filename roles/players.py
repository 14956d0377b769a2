"""Who plays teacher, matcher, judge and summariser: rules, a server (`endpoint`), or the generator.

    players = Players(config, run.encoder, writer)
    lists = players.teach([["Night trains", "Sourdough"]], seeds=[0])

The paper prompts large models for these roles (appendix B.2.1). `roles.teacher=rules` and so on
choose offline rules over text (rules.py) instead; both have the same methods (prompted.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

import roles
from config import Config
from data import Message, Policy, Product, QualityCase, User
from roles import chat, prompted, quality
from roles.safety import gravest
from roles.text import Encode
from roles.writer import Writer, drained, fit_to_show
from run import Run


class Players:
    """Raises UserError at once, not after hours, if an endpoint that will be asked is not set."""

    def __init__(self, config: Config, encode: Encode, writer: Writer):
        self.config, self.encode, self.writer = config, encode, writer
        self._chats: dict[str, chat.Chat] = {}
        if "endpoint" in config.roles.model_dump().values():  # whoever plays by it
            chat.Endpoint(config.endpoint)

    def _player(self, role: str, everyone=()) -> roles.Rules | prompted.Prompted:
        """Who plays a role: rules, "endpoint", or "generator", the base without an adapter."""
        player = getattr(self.config.roles, role)
        if player == "rules":  # offline, the same answer each time
            return roles.Rules(self.encode, everyone)
        if player not in self._chats:  # a model is loaded once for all roles
            if player == "endpoint":
                backend = chat.Endpoint(self.config.endpoint)
            else:
                base = self.writer.policy(None)  # an adapter knows lists only
                backend = chat.Local(base, self.writer.tokenizer, self.config.endpoint)
            # Answers of all runs in one file: the same question is asked once.
            self._chats[player] = chat.Chat(backend, self.writer.answers)
        return prompted.Prompted(self._chats[player], self.encode)

    def teach(self, inputs: list[list[str]], seeds: list[int]) -> list[list[str] | None]:
        """The teacher's list for each input, at most K starters; None: an LLM's call failed."""
        k, teacher = self.config.generator.list_size, self._player("teacher")
        if isinstance(teacher, roles.Rules):
            return rule_lists(teacher, inputs, k, seeds)
        # The seed numbers the draw: a second list of one user is another question.
        texts = zip(teacher.write(inputs, k, seeds), inputs, strict=True)
        # An LLM is asked for more than K: of what passes the filters, the interests take turns.
        return [text and roles.covering(fit_to_show(text, interests), interests, k, self.encode)
                for text, interests in texts]

    def match(self, jobs: list[tuple[list[str], list[str]]],
              everyone: Iterable[Iterable[str]]) -> list[np.ndarray]:
        """(E, L) of each (earlier, later) job: 1 the same subject, 0 not, -1 unknown.

        everyone: the summaries of each person, which tell common themes from subjects.
        """
        # Themes are counted over everybody: one person's subject may be a fashion.
        return self._player("matcher", everyone).match(jobs)

    def judge(self) -> roles.Rules | prompted.Prompted:
        """Who compares lists of interests (Table 6) and judges next queries (paper 003, H.2)."""
        return self._player("judge")

    def quality(self, products: list[Product], policies: list[Policy],
                cases: list[QualityCase] = ()) -> Callable:
        """The judge of suggestions for a shop: (context, suggestions) rows -> verdicts."""
        shop, judge = quality.Rules(products, policies), self._player("judge")
        rules = isinstance(judge, roles.Rules)
        return shop.quality if rules else partial(judge.quality, shop=shop, cases=cases)

    def summarise(self, sessions: list[list[Message]]) -> list[str | None]:
        """A line for each session's messages; None where there is none. What somebody said in
        distress stands for the whole session, which is thereby no subject of a starter."""
        lines = self._player("summariser").summarise(sessions)
        return [line and _grave_or(line, said) for line, said in zip(lines, sessions, strict=True)]

    def summarised(self, user: User) -> User:
        """The user with a summary of every session: somebody of whom no stage has learned."""
        bare = [s for s in user.sessions if not s.summary]
        summaries = iter(self.summarise([s.messages for s in bare]) if bare else [])
        # A summary that came along may leave out what was said in distress.
        sessions = [s.model_copy(update={"summary": _grave_or(s.summary, s.messages or [])
                                         if s.summary else next(summaries)}) for s in user.sessions]
        # A summariser's call may have failed: that session is left out. Nothing is for what it
        # says: who may be reminded of it is judged with trigger interests (stages/rid.py).
        return user.model_copy(update={"sessions": [s for s in sessions if s.summary]})

    def calls(self) -> dict[str, int]:
        """What became of this process's calls to LLMs since this was last asked."""
        # A failed call makes its stage run again at the next start.
        return dict(drained(self._chats.values()) + self.writer.calls())


def rule_lists(teacher: roles.Rules, inputs: list[list[str]], k: int,
               seeds: list[int]) -> list[list[str]]:
    """The rule teacher's list for each input, at most k starters, perhaps none."""
    texts = zip(teacher.write(inputs, k, seeds), inputs, strict=True)
    return [fit_to_show(text, interests)[:k] for text, interests in texts]


def _grave_or(summary: str, messages: list[Message]) -> str:
    return gravest(m.content for m in messages if m.role == "user") or summary


def players_of(run: Run) -> Players:
    """Who writes and plays the roles in this run."""
    # Answers of LLMs are kept for all runs below run.root: the same question is asked once.
    writer = Writer(run.config, Path(run.config.run.root) / "answers.sqlite")
    return Players(run.config, run.encoder, writer)
