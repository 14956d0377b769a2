"""The simulated platform: users with hidden interests, their sessions, shown lists and taps.

    python world.py --users 500 --seed 7 --out DIR

DIR holds users.jsonl and impressions.jsonl, which is all that a real log would hold, and apart
from them truth/truth.json, the hidden state, which only the evaluation may read. The world
understands a starter by its own lexicon (configs/taxonomy.yaml), whoever wrote it; it knows nothing
of the methods. Every number below is a plausible choice, not fitted to any result;
REPEAT_SHARE and ONE_OFF_SHARE were set so that repeats and revisits are as many as in real logs.

Hidden state of a user: interests (a topic and favourite subjects in it), each with a frequency and
a resonance that are only weakly related (functional requests are frequent and resonate with
nobody), the days on which it is alive, and how well this user likes each angle of a question.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import yaml

import data
from config import ROOT, WorldConfig, load_config, read_json, script, write_json

START = datetime(2026, 1, 1)
SLOT_RATES = np.array([0.47, 0.29, 0.19, 0.17, 0.07])  # measured for the same content by slot
EXAMINATION = SLOT_RATES / SLOT_RATES[0]
LIST_SIZE = 5
MEDIAN_SESSIONS = 12  # 6 in a forum, 150 in a search log; heavy-tailed around it, 1 to 500
REPEAT_SHARE = 0.2  # of sessions that repeat an earlier summary on purpose; chance adds the rest
ONE_OFF_SHARE = 0.3  # of sessions about a topic that is no interest of the user
CHINESE_SHARE = 0.04

# Angle -> words by which a question of this angle is recognised, and how well people like it.
ANGLES: dict[str, tuple[float, tuple[str, ...]]] = {
    "surprising": (
        0.7,
        ("surprising", "secret", "hidden", "myth", "little-known", "冷知识", "秘密"),
    ),
    "quiz": (0.5, ("quiz", "trivia", "test me", "test my", "guess", "考考", "猜")),
    "compare": (
        0.4,
        (" vs ", "versus", "compare", "difference", "rival", "哪个好", "比较", "区别"),
    ),
    "recommend": (0.6, ("recommend", "best", "suggest", "similar", "underrated", "推荐", "类似")),
    "plan": (0.3, ("plan", "weekend", "evening", "trip", "itinerary", "计划", "周末")),
    "create": (0.4, ("write", "design", "invent", "imagine", "create", "turn ", "写", "设计")),
    "next": (0.3, ("next", "after", "future", "之后", "未来", "接下来")),
    "how_to": (
        -0.1,
        ("how do i", "how to", "how can i", "tips", "improve", "better at", "怎么", "怎样", "技巧"),
    ),
    "beginner": (-0.2, ("beginner", "start with", "basics", "first step", "入门", "新手")),
    "deep": (
        0.1,
        ("deep", "explain why", "science behind", "story behind", "detail", "深入", "背后"),
    ),
    "history": (-0.3, ("history", "origin", "began", "come from", "历史", "由来")),
    "plain": (-0.6, ()),
}
KINDS = list(ANGLES)

SUMMARIES = {  # what people ask about a subject, as a session summary puts it
    "en": (
        "{x}",
        "{x}",
        "{x} for beginners",
        "Questions about {x}",
        "How to get into {x}",
        "Comparing {x} and {y}",
        "Looking for {x} recommendations",
        "Background of {x}",
        "why is {x} so popular",
        "What makes {x} stand out?",
        "{x}: tips and common mistakes",
        "Discussing {x} in detail",
        "best way to enjoy {x}",
        "{x} explained simply",
        "Ideas for a {t} project around {x}",
        "Help me understand {x}",
        "{t}: {x} or {y}?",
        "Where to start with {x}",
        "thoughts on {x}",
        "A short guide to {x}",
        "Learning more {t}, mostly {x}",
        "Is {x} worth it?",
        "{x} and {y} side by side",
    ),
    "zh": ("{x}", "{x}入门", "关于{x}的问题", "{x}怎么样", "了解{x}", "{x}推荐", "{x}好在哪里"),
}
REQUESTS = {
    "en": (
        "Help with {x}",
        "{t} for work: {x}",
        "quick {t}, {x}",
        "Fix my {x}",
        "{x}",
        "{t}: {x}",
        "Need {t} with {x} today",
        "Check this {x} for me",
    ),
    "zh": ("帮我处理{x}", "{x}", "检查{x}"),
}
POOL = (
    "What is {x}?",
    "Tell me about {x}",
    "How do I start with {x}?",
    "Best {t} picks after {x}?",
    "{x} vs {y}: which one?",
    "Surprising facts about {x}",
    "Quiz me on {x}",
    "History of {x}",
    "Plan a weekend around {x}",
    "Recommend something like {x}",
    "Explain why {x} matters",
    "Tips for {x}",
    "Write a short story with {x}",
    "What comes next for {x}?",
    "The story behind {x}",
    "{x} for beginners",
    "What is new in {t}?",
    "Is {x} overrated?",
)


class Taxonomy:
    """configs/taxonomy.yaml, and the lexicon that finds its subjects and topics in any text."""

    def __init__(self, path: Path = ROOT / "configs" / "taxonomy.yaml"):
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))["categories"]
        self.topics = {topic: entry for topics in tree.values() for topic, entry in topics.items()}
        self.category = {topic: name for name, topics in tree.items() for topic in topics}
        self.english = {t: {str(s): str(s) for s in e["subjects"]} for t, e in self.topics.items()}
        self.chinese = {
            t: {str(s): str(name) for s, name in e["zh"].items()}
            for t, e in self.topics.items()
            if e.get("zh")
        }
        self._topic_of, self._subject, self._word = {}, {}, {}
        for topic, entry in self.topics.items():
            for subject in map(str, entry["subjects"]):
                self._subject[subject.lower()] = (topic, subject)
            for subject, name in (entry.get("zh") or {}).items():
                self._subject[str(name)] = (topic, str(subject))
            for word in (topic, *map(str, entry.get("keywords") or ())):
                self._word.setdefault(word.lower(), topic)
        self._find_subject, self._find_word = map(_lexicon, (self._subject, self._word))
        self.understand = cache(self._understand)

    def names(self, chinese: bool) -> dict[str, dict[str, str]]:
        """topic -> subject -> its name in the user's language."""
        return self.chinese if chinese else self.english

    def functional(self, topic: str) -> bool:
        return bool(self.topics[topic].get("functional"))

    def _understand(self, text: str) -> tuple[str | None, frozenset[str], str]:
        """(topic or None, named subjects, angle) of any text, by words alone."""
        low = text.lower()
        found = [self._subject[m] for m in self._find_subject.findall(low)]
        if found:
            topic = found[0][0]
        else:
            words = self._find_word.findall(low)
            topic = self._word[words[0]] if words else None
        angle = next(
            (a for a, (_, words) in ANGLES.items() if any(w in low for w in words)), "plain"
        )
        return topic, frozenset(s for _, s in found), angle


def _lexicon(entries: dict[str, object]) -> re.Pattern:
    """Longest match first; whole words, except in Chinese, which has no spaces."""
    names = sorted(entries, key=len, reverse=True)
    latin = [re.escape(n) for n in names if n.isascii() or not re.search(r"[㐀-鿿]", n)]
    other = [re.escape(n) for n in names if re.search(r"[㐀-鿿]", n)]
    return re.compile("|".join([r"(?<!\w)(?:" + "|".join(latin) + r")(?!\w)", *other]))


def question(text: str) -> str:
    """A text as it is compared with what was asked before."""
    return text.lower().strip(" ?.")


def depth(resonance: float) -> float:
    """Mean number of further sessions after a tap on something that resonates this much."""
    return 0.3 + 3.5 * resonance


@dataclass
class Interest:
    topic: str
    subjects: list[str]  # favourites, best first
    frequency: float
    resonance: float  # in [0, 1]
    alive: list[tuple[float, float]]  # days from START

    def is_alive(self, day: float) -> bool:
        return any(start <= day <= end for start, end in self.alive)


class Truth:
    """The hidden state of every user, as of the end of the log."""

    def __init__(self, state: dict):
        self.users, self.taxonomy = state["users"], Taxonomy()

    def _match(
        self, user_id: str, topic: str | None, subjects: frozenset[str], day: float
    ) -> float:
        """How much a text about these subjects resonates, in [0, 1]."""
        best = 0.0
        for i in self.users[user_id]["interests"]:
            fresh = 1.0 if any(a <= day <= b for a, b in i["alive"]) else 0.35
            if topic == i["topic"]:
                near = 1.0 if subjects & set(i["subjects"]) else 0.6
            elif topic and self.taxonomy.category[topic] == self.taxonomy.category[i["topic"]]:
                near = 0.2
            else:
                continue
            best = max(best, near * fresh * i["resonance"])
        return best

    def resonance(self, user_id: str, text: str) -> float:
        topic, subjects, _ = self.taxonomy.understand(text)
        return self._match(user_id, topic, subjects, self.users[user_id]["last_day"])

    def category(self, text: str) -> str | None:
        topic = self.taxonomy.understand(text)[0]
        return self.taxonomy.category[topic] if topic else None

    def click_probabilities(
        self,
        user_id: str,
        starters: list[str],
        day: float | None = None,
        asked_since: frozenset[str] = frozenset(),
    ) -> np.ndarray:
        """P(tap) of each starter (K,), with slot bias, redundancy with those above, and novelty.

        `asked_since`: `question`s asked after the log, which are no longer new either.
        """
        user, above, result = self.users[user_id], [], []
        day = user["last_day"] if day is None else day
        for slot, starter in enumerate(starters):
            topic, subjects, angle = self.taxonomy.understand(starter)
            redundancy = sum(
                bool(subjects & s) * 0.9 + bool(topic and topic == t) * 0.4 + (angle == a) * 0.3
                for t, s, a in above
            )
            logit = (
                -2.9
                + 4.0 * self._match(user_id, topic, subjects, day)
                + user["angles"][KINDS.index(angle)]
                + 0.5 * bool(subjects)
                - 0.8 * (question(starter) in user["asked"] or question(starter) in asked_since)
                - redundancy
            )
            seen = EXAMINATION[min(slot, LIST_SIZE - 1)]
            result.append(seen / (1 + np.exp(-logit)) if starter.strip() else 0.0)
            above.append((topic, subjects, angle))
        return np.array(result)

    def expected_clicks(self, user_id: str, starters: list[str]) -> float:
        return float(self.click_probabilities(user_id, starters).sum())


@dataclass
class World:
    users: list[data.User]
    impressions: list[data.Impression]
    truth: dict

    def write(self, folder: str | Path) -> None:
        folder = Path(folder)
        data.write_users(folder / "users.jsonl", self.users)
        data.write_impressions(folder / "impressions.jsonl", self.impressions)
        write_json(folder / "truth" / "truth.json", self.truth)


def load_truth(folder: str | Path) -> Truth:
    return Truth(read_json(Path(folder) / "truth" / "truth.json"))


def generate(settings: WorldConfig) -> World:
    """A platform's logs and hidden state; the same settings give the same bytes."""
    users, hidden, retrieval, rng = _platform(settings)
    truth, shown = {"users": hidden}, []
    judge = Truth(truth)
    for user in users:
        shown += _impressions(user, judge, retrieval, rng, settings)
    return World(users, shown, truth)


def retrieved_lists(
    settings: WorldConfig, users: list[data.User], n: int, seed: int
) -> dict[str, list[list[str]]]:
    """n lists of the deployed retrieval for each user, as after the last of the given sessions.

    It retrieves from what `generate` showed for these settings; `seed` draws the lists. Sessions
    without a time count in their order. A user's lists do not depend on who else is given.
    """
    retrieval, lists = _platform(settings)[2], {}
    for user in users:
        rng = np.random.default_rng([seed, *user.user_id.encode()])
        topics = [retrieval.taxonomy.understand(s.summary or "")[0] for s in user.sessions]
        recent = [t for t in topics if t]
        lists[user.user_id] = [retrieval.draw(recent, rng) for _ in range(n)]
    return lists


def _platform(settings) -> tuple[list[data.User], dict, Retrieval, np.random.Generator]:
    """People with their sessions, their hidden state, the deployed retrieval, and the generator."""
    taxonomy, rng = Taxonomy(), np.random.default_rng(settings.seed)
    users, hidden = [], {}
    robots = (
        set(rng.choice(settings.users, max(1, settings.users // 1000), replace=False).tolist())
        if settings.users >= 100
        else set()
    )
    for number in range(settings.users):
        user, state = _person(taxonomy, rng, settings, number, number in robots)
        users.append(user)
        hidden[user.user_id] = state
    return users, hidden, Retrieval(taxonomy, rng, settings.starter_pool), rng


def _person(taxonomy, rng, settings, number, robot) -> tuple[data.User, dict]:
    chinese = rng.random() < CHINESE_SHARE
    interests = _interests(taxonomy, rng, settings.days, chinese)
    count = int(np.clip(np.exp(rng.normal(np.log(MEDIAN_SESSIONS), 0.9)), 1, 500))
    count = max(count, 40) if robot else count
    joined = rng.uniform(0, settings.days * 0.3)
    days = np.sort(rng.uniform(joined, settings.days, count))
    no_times = rng.random() < 0.02
    sessions, texts = [], []
    for i, day in enumerate(days):
        text = (
            texts[0]
            if robot and texts and rng.random() < 0.98
            else _summary(taxonomy, rng, interests, day, texts, chinese)
        )
        texts.append(text)
        stamp = None if no_times else START + timedelta(seconds=int(day * 86400))
        sessions.append(data.Session(session_id=f"s{i}", timestamp=stamp, summary=text))
    profile = (
        None
        if rng.random() < 0.1
        else {
            "age": str(rng.choice(["18-24", "25-34", "35-44", "45-54", "55+"])),
            "region": "CN" if chinese else str(rng.choice(["US", "GB", "DE", "IN", "BR"])),
        }
    )
    angles = [float(base + rng.normal(0, 0.5)) for base, _ in ANGLES.values()]
    user = data.User(user_id=f"u{number}", profile=profile, sessions=sessions)
    return user, {
        "interests": [vars(i) for i in interests],
        "angles": angles,
        "robot": robot,
        "asked": sorted({question(t) for t in texts}),
        "last_day": settings.days,
    }


def _interests(taxonomy, rng, days, chinese) -> list[Interest]:
    names = sorted(taxonomy.names(chinese))
    functional = [t for t in names if taxonomy.functional(t)]
    leisure = [t for t in names if not taxonomy.functional(t)]
    chosen = list(rng.choice(leisure, min(len(leisure), rng.integers(3, 10)), replace=False))
    if functional:
        chosen += list(
            rng.choice(functional, min(len(functional), rng.integers(1, 3)), replace=False)
        )
    result = []
    for topic in map(str, chosen):
        subjects = list(taxonomy.names(chinese)[topic])
        picks = rng.choice(len(subjects), min(len(subjects), rng.integers(2, 7)), replace=False)
        useful = taxonomy.functional(topic)
        resonance = rng.uniform(0, 0.08) if useful else rng.beta(1.2, 1.2)
        frequency = rng.lognormal(0.7 if useful else 0.0, 0.6)
        alive = [(0.0, float(days))] if useful else _bursts(rng, days, resonance)
        result.append(
            Interest(topic, [subjects[i] for i in picks], float(frequency), float(resonance), alive)
        )
    return result


def _bursts(rng, days, resonance) -> list[tuple[float, float]]:
    """Days on which an interest is alive: what resonates comes back and stays longer."""
    start, alive = rng.uniform(-20, days * 0.7), []
    for _ in range(1 + rng.binomial(3, 0.15 + 0.8 * resonance)):
        end = start + rng.exponential(6 + 30 * resonance)
        alive.append((float(start), float(end)))
        start = end + rng.exponential(18)
    return alive


def _summary(taxonomy, rng, interests, day, earlier, chinese) -> str:
    if earlier and rng.random() < REPEAT_SHARE:
        return earlier[-1 - min(len(earlier) - 1, int(rng.exponential(6)))]
    if rng.random() < ONE_OFF_SHARE:
        topic, favourites = str(rng.choice(sorted(taxonomy.names(chinese)))), []
    else:
        alive = [i for i in interests if i.is_alive(day)] or interests
        weights = np.array([i.frequency for i in alive])
        interest = alive[rng.choice(len(alive), p=weights / weights.sum())]
        topic, favourites = interest.topic, interest.subjects
    names, functional = taxonomy.names(chinese)[topic], taxonomy.functional(topic)
    forms = (REQUESTS if functional else SUMMARIES)["zh" if chinese else "en"]
    x, y = map(str, rng.choice(list(names.values()), 2))
    if favourites and not functional:  # the object of a chore changes each time
        share = 0.7 ** np.arange(len(favourites))  # favourites come best first
        x = names[favourites[rng.choice(len(favourites), p=share / share.sum())]]
    text = str(rng.choice(forms)).format(x=x, y=y, t=topic)
    if rng.random() < 0.004:  # somebody pastes half a page
        text = ". ".join(
            [text]
            + [
                str(rng.choice(forms)).format(x=x, y=y, t=topic)
                for _ in range(rng.integers(8, 24))
            ]
        )[:900]
    return text.lower() if rng.random() < 0.15 else text


def _starter_pool(taxonomy, rng, size: int) -> list[str]:
    """What the deployed retrieval can show: questions on subjects, some topics more than others."""
    topics, pool = sorted(taxonomy.topics), set()
    for _ in range(size * 4):
        topic = str(rng.choice(topics))
        chinese = topic in taxonomy.chinese and rng.random() < 0.05
        names = list(taxonomy.names(chinese)[topic].values())
        form = str(
            rng.choice(
                ("{x}怎么入门？", "推荐类似{x}的", "{x}的冷知识", "考考我{x}") if chinese else POOL
            )
        )
        pool.add(form.format(x=str(rng.choice(names)), y=str(rng.choice(names)), t=topic))
        if len(pool) == size:
            break
    return sorted(pool)


class Retrieval:
    """The deployed baseline: lists by topic of recent sessions, popularity and exploration."""

    def __init__(self, taxonomy: Taxonomy, rng: np.random.Generator, size: int):
        self.taxonomy, self.pool = taxonomy, _starter_pool(taxonomy, rng, size)
        self.by_topic: dict[str | None, list[str]] = {}
        for starter in self.pool:
            self.by_topic.setdefault(taxonomy.understand(starter)[0], []).append(starter)
        few = len(self.pool) <= 60
        self.popular = self.pool if few else list(rng.choice(self.pool, 60, replace=False))

    def draw(self, recent: list[str], rng: np.random.Generator) -> list[str]:
        """One list; `recent`: topics of the user's sessions so far, latest last."""
        starters = []
        while len(starters) < LIST_SIZE:
            kind, source = rng.random(), self.pool
            if kind < 0.6 and recent:
                topic = recent[-1 - min(len(recent) - 1, int(rng.exponential(8)))]
                source = self.by_topic.get(topic, self.pool)
            elif kind < 0.8:
                source = self.popular
            starter = str(source[rng.integers(len(source))])
            if starter not in starters:
                starters.append(starter)
        return starters


def _impressions(user, truth: Truth, retrieval, rng, settings) -> list[data.Impression]:
    """What the deployed retrieval showed to this user, what was tapped, and what followed."""
    stamped = [s for s in user.sessions if s.timestamp]
    if not stamped:
        return []
    topics = [truth.taxonomy.understand(s.summary)[0] for s in stamped]
    times = [(s.timestamp - START).total_seconds() / 86400 for s in stamped]
    rows, count = [], 1 + rng.poisson(settings.impressions_per_user - 1)
    for day in np.sort(rng.uniform(times[0], settings.days, count)):
        past = [t for t, when in zip(topics, times, strict=True) if when < day and t]
        starters = retrieval.draw(past, rng)
        taps = rng.random(LIST_SIZE) < truth.click_probabilities(user.user_id, starters, day)
        clicked = np.flatnonzero(taps).tolist()
        best = max(
            (
                truth._match(user.user_id, *truth.taxonomy.understand(starters[i])[:2], day)
                for i in clicked
            ),
            default=0.0,
        )
        after = int(rng.poisson(depth(best))) if clicked else 0
        rows.append(
            data.Impression(
                user_id=user.user_id,
                timestamp=START + timedelta(seconds=int(day * 86400)),
                starters=starters,
                clicked=clicked,
                sessions_after=None if rng.random() < 0.05 else after,
            )
        )
    return rows


def main() -> None:
    defaults = load_config().world
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=defaults.users)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    settings = load_config(
        None, [f"world.users={arguments.users}", f"world.seed={arguments.seed}"]
    ).world
    world = generate(settings)
    world.write(arguments.out)
    taps = Counter(len(i.clicked) for i in world.impressions)
    print(
        f"{arguments.out}: {len(world.users)} users, "
        f"{sum(len(u.sessions) for u in world.users)} sessions, {len(world.impressions)} lists, "
        f"{taps[0] / len(world.impressions):.0%} without a tap"
    )


if __name__ == "__main__":
    script(main)
