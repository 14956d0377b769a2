"""Starters for a user without history: what others tapped, varied, and of the profile's liking.

    starters = PopularStarters(run)({"language": "en"})
"""

import re
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch

from run import Run
from stages.pools import list_order

SHRINKAGE = 20  # shown starters: a tap on a starter that was shown twice says little
PEOPLE = 5  # distinct ones must have been shown a starter, or it is not shown to a stranger
LIKE_MINDED = 5.0  # weight of a tap by somebody who shares a field of the profile
# What profiles call the languages that roles.languages tells apart, beside their codes.
LANGUAGES = {
    "en": "english", "zh": "chinese mandarin 中文 汉语 简体中文 繁體中文", "ja": "japanese 日本語",
    "ko": "korean 한국어", "ru": "russian русский", "es": "spanish español", "de": "german deutsch",
    "fr": "french français", "pt": "portuguese português", "it": "italian italiano",
}


def profile_language(profile: dict[str, str]) -> str:
    """The language that a profile names ("de-DE", "German"), as roles.languages calls it; as it
    stands there where that tells no such language, and "" where the profile names none."""
    named = profile.get("language", "").strip().lower()
    first = re.split(r"[\s_(-]", named)[0]
    return next((code for code, names in LANGUAGES.items() if first in (code, *names.split())),
                named)


class PopularStarters:
    """What others tap. A starter's value is its taps beyond what its slots explain, shrunk."""

    def __init__(self, run: Run, candidates: int = 60):
        self.run, self.candidates, train = run, candidates, set(run.ids("train"))
        shown = [row for row in run.impressions if row.user_id in train]
        people = defaultdict(set)  # starter -> who was shown it
        for row in shown:
            for y in row.starters:
                people[y].add(row.user_id)
        # A list may have been written for one person, of what only that person has told.
        self.starters = sorted(y for y, users in people.items() if len(users) >= PEOPLE)
        number = {y: n for n, y in enumerate(self.starters)}  # equal texts share their taps
        rows = [(y, i, slot) for i, row in enumerate(shown) for slot, y in enumerate(row.starters)
                if y in number]
        rates = run.slot_rates.tolist()
        # One element a shown starter, (n,): its text, its surprise, its list.
        self.number = np.array([number[y] for y, _, _ in rows], dtype=int)
        self.surplus = np.array(
            [(slot in shown[i].clicked) - rates[min(slot, len(rates) - 1)] for _, i, slot in rows])
        self.list = np.array([i for _, i, _ in rows], dtype=int)  # rows may be empty
        self.profiles = [run.users[row.user_id].profile or {} for row in shown]

    def __call__(self, profile: dict[str, str] | None) -> list[str]:
        """At most K starters."""
        return self.ranked(profile)[: self.run.config.generator.list_size]

    def ranked(self, profile: dict[str, str] | None, keep: Callable = lambda y: y) -> list[str]:
        """All candidates that `keep` lets through, list after list in the list search's order."""
        fields = set((profile or {}).items())
        like = np.array([LIKE_MINDED if fields & set(p.items()) else 1.0 for p in self.profiles])
        weight, n = like[self.list], len(self.starters)
        # A mean of surprises, pulled to zero where few were shown.
        value = np.bincount(self.number, weight * self.surplus, n) / (
            np.bincount(self.number, weight, n) + SHRINKAGE)
        by_value, best = np.argsort(-value, kind="stable"), []
        for start in range(0, n, self.candidates):  # until enough pass
            batch = by_value[start : start + self.candidates]
            kept = set(keep([self.starters[i] for i in batch]))
            best += [i for i in batch if self.starters[i] in kept]
            if len(best) >= self.candidates:
                break
        best = best[: self.candidates]  # indices of texts, the most tapped first
        if not best:
            return []
        vectors = self.run.encoder([self.starters[i] for i in best])
        config = self.run.config
        utility = torch.tensor(value[best], dtype=torch.float32)[None]  # (1, N)
        similarity = (vectors @ vectors.T)[None]  # (1, N, N): one row of a batch
        (order,) = list_order(
            config.dpo, config.generator.list_size, utility, similarity, expand=len(best))
        return [self.starters[best[i]] for i in order]
