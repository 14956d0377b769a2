"""The simulated platform: people with hidden interests, their sessions, shown lists and taps.

    python -m world people --users 500 --seed 7 --out DIR

It stands in for the paper's private logs (section 3.1). DIR holds users.jsonl, impressions.jsonl,
all that a real log would hold, and apart from them truth/truth.json, the hidden state
(click_model.py), which only the evaluation may read. Every number is a plausible choice, fitted to
no result; REPEAT_SHARE and ONE_OFF_SHARE make repeats and revisits as many as in real logs.
A user has interests (a topic and favourite subjects in it), each with a frequency and a resonance
that are only weakly related (chores are frequent and resonate with nobody) and days on which it is
alive, and likes some angles of a question more than others.
"""

import functools
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import yaml

import data
from config import WorldConfig
from files import ROOT, read_json, write_json
from world.click_model import Taxonomy, Truth, further_sessions, is_alive, question

START = datetime(2026, 1, 1)
LIST_SIZE = 5
MEDIAN_SESSIONS = 12  # of a user: 6 in a forum, 150 in a search log; 1 to 500, heavy-tailed
REPEAT_SHARE = 0.2  # of sessions that repeat an earlier summary on purpose; chance adds the rest
ONE_OFF_SHARE = 0.3  # of sessions about a topic that is no interest of the user
CHINESE_SHARE = 0.04


def load_truth(folder: str | Path) -> Truth:
    """The hidden state of a world that was written to this folder."""
    return Truth(read_json(Path(folder) / "truth" / "truth.json"))


def retrieved_lists(settings: WorldConfig, users: list[data.User], n: int, seed: int) -> dict:
    """user -> n lists of the deployed retrieval, as after the last of the given sessions.

    It retrieves from what a World of these settings showed; `seed` draws the lists. Sessions
    without a time count in their order. A user's lists do not depend on who else is given.
    """
    retrieval, lists = World(settings).retrieval, {}
    for user in users:
        rng = np.random.default_rng([seed, *user.user_id.encode()])
        topics = [retrieval.taxonomy.understand(s.summary or "").topic for s in user.sessions]
        recent = [topic for topic in topics if topic]
        lists[user.user_id] = [retrieval.draw(recent, rng) for _ in range(n)]
    return lists


def _when(day: float) -> datetime:
    return START + timedelta(seconds=int(day * 86400))


class Retrieval:
    """The deployed baseline: lists by topic of recent sessions, popularity and exploration."""

    def __init__(self, taxonomy: Taxonomy, forms: dict, rng: np.random.Generator, size: int):
        self.taxonomy, topics, pool = taxonomy, sorted(taxonomy.topics), set()
        for _ in range(size * 4):  # a bound: distinct questions may run out
            topic = str(rng.choice(topics))
            language = "zh" if topic in taxonomy.names["zh"] and rng.random() < 0.05 else "en"
            names = list(taxonomy.names[language][topic].values())
            form = str(rng.choice(forms[language]))
            pool.add(form.format(x=rng.choice(names), y=rng.choice(names), t=topic))
            if len(pool) == size:
                break
        self.pool = sorted(pool)  # a set's order differs from process to process
        self.by_topic: dict[str | None, list[str]] = {}
        for starter in self.pool:
            self.by_topic.setdefault(taxonomy.understand(starter).topic, []).append(starter)
        few = len(self.pool) <= 60  # all of a small pool is popular
        self.popular = self.pool if few else list(rng.choice(self.pool, 60, replace=False))

    def draw(self, recent: list[str], rng: np.random.Generator) -> list[str]:
        """One list; `recent`: topics of the user's sessions so far, latest last."""
        starters = []
        while len(starters) < LIST_SIZE:
            kind, source = rng.random(), self.pool  # one in five explores
            if kind < 0.6 and recent:
                # Mean 8 sessions back, the first at the most.
                topic = recent[-1 - min(len(recent) - 1, int(rng.exponential(8)))]
                source = self.by_topic.get(topic, self.pool)
            elif kind < 0.8:  # one in five, but four without a session to go by
                source = self.popular
            starter = str(source[rng.integers(len(source))])
            if starter not in starters:
                starters.append(starter)
        return starters


class World:
    """A platform's people, logs and hidden state; the same settings give the same bytes."""

    def __init__(self, settings: WorldConfig):
        # Trap: one generator draws everything, so a draw moved or left out gives other people.
        self.settings, self.rng = settings, np.random.default_rng(settings.seed)
        forms = (ROOT / "world" / "forms.yaml").read_text(encoding="utf-8")
        self.forms, self.truth, self.users = yaml.safe_load(forms), Truth({"users": {}}), []
        self.taxonomy, robots, n = self.truth.taxonomy, [], settings.users
        if n >= 100:  # one user in a thousand, but at least one
            robots = self.rng.choice(n, max(1, n // 1000), replace=False).tolist()
        for number in range(n):
            user, self.truth.users[f"u{number}"] = self._person(f"u{number}", number in robots)
            self.users.append(user)
        self.retrieval = Retrieval(
            self.taxonomy, self.forms["starters"], self.rng, settings.starter_pool)

    @functools.cached_property  # drawn last: who wants people or retrieval need not wait for it
    def impressions(self) -> list[data.Impression]:
        return [shown for user in self.users for shown in self._shown(user)]

    def write(self, folder: str | Path) -> None:
        data.write_users(Path(folder) / "users.jsonl", self.users)
        data.write_impressions(Path(folder) / "impressions.jsonl", self.impressions)
        write_json(Path(folder) / "truth" / "truth.json", {"users": self.truth.users})

    def _person(self, user_id: str, robot: bool) -> tuple[data.User, dict]:
        """A user as the log shows them, and their entry in Truth.users."""
        rng, days, texts = self.rng, self.settings.days, []
        language = "zh" if rng.random() < CHINESE_SHARE else "en"
        interests = self._interests(language)
        count = int(np.clip(np.exp(rng.normal(np.log(MEDIAN_SESSIONS), 0.9)), 1, 500))
        count = max(count, 40) if robot else count
        joined = rng.uniform(0, days * 0.3)
        times = np.sort(rng.uniform(joined, days, count))  # in days, as all times here
        untimed, sessions = rng.random() < 0.02, []  # some logs hold no times
        for number, day in enumerate(times):
            same = robot and texts and rng.random() < 0.98  # robots ask one thing all day
            texts.append(texts[0] if same else self._summary(interests, day, texts, language))
            when, name = None if untimed else _when(day), f"s{number}"
            sessions.append(data.Session(session_id=name, timestamp=when, summary=texts[-1]))
        profile, told = None, self.forms["profile"]
        if rng.random() >= 0.1:  # one in ten tells nothing
            profile = {"age": str(rng.choice(told["age"])),
                       "region": "CN" if language == "zh" else str(rng.choice(told["region"]))}
        likings = [angle["liking"] for angle in self.taxonomy.angles.values()]
        return data.User(user_id=user_id, profile=profile, sessions=sessions), {
            "interests": interests,
            "angles": [float(liking + rng.normal(0, 0.5)) for liking in likings],  # logits
            "robot": robot, "asked": sorted(set(map(question, texts))), "last_day": days,
        }

    def _interests(self, language: str) -> list[dict]:
        """Three to nine topics of leisure and one or two chores, as in Truth.users."""
        rng, names, interests = self.rng, self.taxonomy.names[language], []
        chores = [*filter(self.taxonomy.functional, sorted(names))]
        leisure = [topic for topic in sorted(names) if topic not in chores]
        topics = list(rng.choice(leisure, min(len(leisure), rng.integers(3, 10)), replace=False))
        topics += list(rng.choice(chores, min(len(chores), rng.integers(1, 3)), replace=False))
        for topic in map(str, topics):
            subjects, chore = list(names[topic]), topic in chores
            best = rng.choice(len(subjects), min(len(subjects), rng.integers(2, 7)), replace=False)
            # Drawn apart: what is frequent need not resonate, which counting cannot find out.
            resonance = float(rng.uniform(0, 0.08) if chore else rng.beta(1.2, 1.2))
            frequency = float(rng.lognormal(0.7 if chore else 0.0, 0.6))  # relative: a weight
            alive = [(0.0, float(self.settings.days))] if chore else self._stretches(resonance)
            interests.append({"topic": topic, "subjects": [subjects[i] for i in best],
                              "frequency": frequency, "resonance": resonance, "alive": alive})
        return interests

    def _stretches(self, resonance: float) -> list[tuple[float, float]]:
        """Days on which an interest is alive: what resonates comes back and stays longer."""
        # Some begin before the log; none for the first time in its last third.
        start, alive = self.rng.uniform(-20, self.settings.days * 0.7), []
        for _ in range(1 + self.rng.binomial(3, 0.15 + 0.8 * resonance)):
            end = start + self.rng.exponential(6 + 30 * resonance)  # days
            alive.append((float(start), float(end)))
            start = end + self.rng.exponential(18)
        return alive

    def _summary(self, interests: list[dict], day: float, earlier: list[str], language: str) -> str:
        """Of a session: an earlier one again, a passing topic, or an interest that is alive."""
        rng, names = self.rng, self.taxonomy.names[language]
        if earlier and rng.random() < REPEAT_SHARE:  # rather a late one: mean 6 sessions back
            return earlier[-1 - min(len(earlier) - 1, int(rng.exponential(6)))]
        if rng.random() < ONE_OFF_SHARE:  # perhaps of a topic that is an interest after all
            topic, favourites = str(rng.choice(sorted(names))), []
        else:
            # On a day when nothing is alive everything is, so that each session has a topic.
            alive = [interest for interest in interests if is_alive(interest, day)] or interests
            weights = np.array([interest["frequency"] for interest in alive])
            interest = alive[rng.choice(len(alive), p=weights / weights.sum())]
            topic, favourites = interest["topic"], interest["subjects"]
        chore = self.taxonomy.functional(topic)  # said as a request, not as a question
        forms = self.forms["chores" if chore else "summaries"][language]
        x, y = map(str, rng.choice(list(names[topic].values()), 2))
        if favourites and not chore:  # the object of a chore changes each time
            share = 0.7 ** np.arange(len(favourites))  # favourites come best first
            x = names[topic][favourites[rng.choice(len(favourites), p=share / share.sum())]]
        chosen = [str(rng.choice(forms))]
        if rng.random() < 0.004:  # somebody pastes half a page
            chosen += [str(rng.choice(forms)) for _ in range(rng.integers(8, 24))]
        text = ". ".join(form.format(x=x, y=y, t=topic) for form in chosen)[:900]
        return text.lower() if rng.random() < 0.15 else text

    def _shown(self, user: data.User) -> list[data.Impression]:
        """What the retrieval showed to this user, what was tapped, and what followed."""
        rng, understand, rows = self.rng, self.taxonomy.understand, []
        sessions = [session for session in user.sessions if session.timestamp]
        if not sessions:
            return []
        topics = [understand(session.summary).topic for session in sessions]
        times = [(session.timestamp - START).total_seconds() / 86400 for session in sessions]
        count = 1 + rng.poisson(self.settings.impressions_per_user - 1)
        for day in np.sort(rng.uniform(times[0], self.settings.days, count)):
            recent = [t for t, time in zip(topics, times, strict=True) if time < day and t]
            starters = self.retrieval.draw(recent, rng)
            chances = self.truth.click_probabilities(user.user_id, starters, day)  # (K,)
            clicked = np.flatnonzero(rng.random(LIST_SIZE) < chances).tolist()
            tapped = [understand(starters[slot]) for slot in clicked]
            # Of several taps the one that resonates most decides how the visit goes on.
            best = max((self.truth.match(user.user_id, m, day) for m in tapped), default=0.0)
            after = int(rng.poisson(further_sessions(best))) if clicked else 0
            after = None if rng.random() < 0.05 else after  # a real log lacks some
            rows.append(data.Impression(user_id=user.user_id, timestamp=_when(day),
                                        starters=starters, clicked=clicked, sessions_after=after))
        return rows
