"""Who plays teacher, matcher, judge and summariser: rules, a server (`endpoint`), or the generator.

    players = Players(config, run.encoder, writer)
    lists = players.teach([["Night trains", "Sourdough"]], seeds=[0])

The paper prompts large models for these roles (appendix B.2.1). `roles.teacher=rules` and so on
choose offline rules over text (rules.py) instead; both have the same methods (prompted.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np

import roles
from config import Config
from data import Message
from roles import chat, prompted
from roles.text import Encode
from roles.writer import Writer, drained, fit_to_show


class Players:
    """Raises UserError at once, not after hours, if an endpoint that will be asked is not set."""

    def __init__(self, config: Config, encode: Encode, writer: Writer):
        self.config, self.encode, self.writer = config, encode, writer
        self._chats: dict[str, chat.Chat] = {}
        if "endpoint" in config.roles.model_dump().values():
            chat.Endpoint(config.endpoint)

    def _llm(self, player: str) -> prompted.Prompted:
        """The LLM that plays: "endpoint", or "generator", the base without an adapter."""
        if player not in self._chats:
            if player == "endpoint":
                backend = chat.Endpoint(self.config.endpoint)
            else:
                base = self.writer.policy(None)  # an adapter knows lists only
                backend = chat.Local(base, self.writer.tokenizer, self.config.endpoint)
            self._chats[player] = chat.Chat(backend, self.writer.answers)
        return prompted.Prompted(self._chats[player], self.encode)

    def teach(self, inputs: list[list[str]], seeds: list[int]) -> list[list[str] | None]:
        """The teacher's list for each input, at most K starters; None: an LLM's call failed."""
        k, player = self.config.generator.list_size, self.config.roles.teacher
        if player == "rules":
            teacher = roles.RuleTeacher()  # no state: each list has a seed of its own
            texts = [
                teacher.write(interests, k, random.Random(seed))
                for interests, seed in zip(inputs, seeds, strict=True)
            ]
            return [fit_to_show(text, x)[:k] for text, x in zip(texts, inputs, strict=True)]
        # The seed numbers the draw: a second list of one user is another question.
        texts = self._llm(player).write(inputs, k, seeds)
        # An LLM is asked for more than K: of what passes the filters, the interests take turns.
        return [
            text and roles.covering(fit_to_show(text, interests), interests, k, self.encode)
            for text, interests in zip(texts, inputs, strict=True)
        ]

    def match(
        self, jobs: list[tuple[list[str], list[str]]], everyone: Iterable[Iterable[str]]
    ) -> list[np.ndarray]:
        """(E, L) of each (earlier, later) job: 1 the same subject, 0 not, -1 unknown.

        everyone: the summaries of each person, which tell common themes from subjects.
        """
        player = self.config.roles.matcher
        if player == "rules":
            return roles.RuleMatcher(self.encode, roles.themes(everyone)).match(jobs)
        return self._llm(player).match(jobs)

    def judge(self):
        """Which of two lists of interests says more about a user: an object with `compare`."""
        player = self.config.roles.judge
        if player == "rules":
            return roles.RuleJudge(self.encode)
        return self._llm(player)

    def summarise(self, sessions: list[list[Message]]) -> list[str | None]:
        """A line for each session's messages; None where there is none."""
        player = self.config.roles.summariser
        if player == "rules":
            return [roles.RuleSummariser().summarise(messages) for messages in sessions]
        return self._llm(player).summarise(sessions)

    def calls(self) -> dict[str, int]:
        """What became of this process's calls to LLMs since this was last asked."""
        return dict(drained(self._chats.values()) + self.writer.calls())
