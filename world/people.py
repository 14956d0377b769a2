"""The simulated platform: people with hidden interests, their sessions, shown lists and taps.

    python -m world people --users 500 --seed 7 --out DIR

It stands in for the paper's private logs (section 3.1). DIR holds users.jsonl, impressions.jsonl,
all that a real log would hold, and apart from them truth/truth.json, the hidden state
(click_model.py), which only the evaluation may read, and the platform for its pilot. In this log:
- A person has some topics of interest, popular ones rather than others: in each a few favourite
  subjects, a frequency, a resonance that has little to do with it, and the days on which it is
  alive. They have chores, too, which resonate with nobody, and like some angles of a question more.
- Sessions that they begin unaided are about a chore, a passing subject, an interest that is alive,
  or ask an earlier question again, word for word.
- Between these the platform shows lists. A tap begins a session about what was tapped, and as many
  follow as it resonates.
- After the log's last day life goes on, in other words than before: that is hidden.
The numbers are chosen so that the log looks like real ones (tests/test_world.py has the bands),
before any method was run on it, and fitted to no result.
"""

from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from config import WorldConfig
from files import UserError, read_json, read_yaml, write_json
from world.click_model import Truth, further_sessions, is_alive, question

VERSION = 2  # of the world: figures of another one cannot be compared
START = datetime(2026, 1, 1)
LIST_SIZE = 5
POPULAR = 60  # starters that the retrieval holds to be popular
MEDIAN_SESSIONS, SPREAD = 14, 0.8  # begun unaided, of a user: lognormal, from 1 to 500
AGAIN_SHARE = 0.3  # of them: about the subject of an earlier one ...
SAME_WORDS = 0.8  # ... of these word for word; chance adds some
LATE = 0.2  # ... and one of the last six, else any
PASSING = 0.25  # of the others: about a topic that one comes upon
FAVOURITE = 0.5  # of those within an interest: about a favourite, else any subject of its topic
CHORES = (2.0, 8.0)  # beta distribution of a person's share of chores
NEXT_SESSIONS, NEXT_DAYS = 20, 30  # how much of life after the log is kept: drawn sessions, days
MEAN_SESSIONS = MEDIAN_SESSIONS * np.exp(SPREAD**2 / 2)
CHINESE_SHARE = 0.04


class Asked(NamedTuple):
    """A session of a life."""

    day: float
    topic: str
    subject: str  # by its English name
    text: str


def load_truth(folder: str | Path) -> Truth:
    """The hidden state of a world that was written to this folder; UserError: another version's."""
    path = Path(folder) / "truth" / "truth.json"
    state = read_json(path)
    if (version := state.get("version", 1)) != VERSION:
        raise UserError(f"{path}: version {version} of the simulated platform, which is now "
                        f"{VERSION}; train anew: python train.py, with this run's settings")
    return Truth(state["users"])


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


def pilot(folder: str | Path, lists: dict[str, list[list[str]]],
          seed: int) -> list[data.Impression]:
    """What the platform's people tap where it shows them lists (user -> lists) after its log ends,
    each alone. `seed` draws the taps; a user's do not depend on who else is shown some."""
    truth, rows = load_truth(folder), []
    for user_id, some in lists.items():
        rng = np.random.default_rng([seed, *user_id.encode()])
        for starters in some:
            chances = truth.click_probabilities(user_id, starters)
            clicked = np.flatnonzero(rng.random(len(starters)) < chances).tolist()
            resonances = [truth.resonance(user_id, starters[slot]) for slot in clicked]
            rows.append(data.Impression(
                user_id=user_id, timestamp=_when(truth.users[user_id]["last_day"]),
                starters=starters, clicked=clicked,
                sessions_after=int(rng.poisson([*map(further_sessions, resonances)]).sum())))
    return rows


def _when(day: float) -> datetime:
    return START + timedelta(seconds=int(day * 86400))


def _pick(rng: np.random.Generator, items: list):
    return items[rng.integers(len(items))]  # many times as fast as rng.choice


class Retrieval:
    """The deployed baseline: lists by topic of recent sessions, popularity and exploration."""

    def __init__(self, truth: Truth, forms: dict, rng: np.random.Generator, size: int):
        self.taxonomy, pool = truth.taxonomy, set()
        names, topics = self.taxonomy.names, sorted(self.taxonomy.topics)
        for _ in range(size * 4):  # a bound: distinct questions may run out
            topic = _pick(rng, topics)
            language = "zh" if topic in names["zh"] and rng.random() < 0.05 else "en"
            x, *others = rng.permutation([*names[language][topic].values()])
            pool.add(_pick(rng, forms[language]).format(x=x, y=others[0] if others else x, t=topic))
            if len(pool) == size:
                break
        self.pool = sorted(pool)  # a set's order differs from process to process
        self.by_topic: dict[str | None, list[str]] = {}
        for starter in self.pool:
            self.by_topic.setdefault(self.taxonomy.understand(starter).topic, []).append(starter)
        # Years of taps have told the platform what many people like, and how they like it asked.
        fans, angles = Counter(), [*self.taxonomy.angles.values()]
        for person in truth.users.values():
            for interest in person["interests"]:
                fans.update(dict.fromkeys(interest["subjects"], interest["resonance"]))

        def appeal(starter: str) -> float:
            meaning = self.taxonomy.understand(starter)
            return sum(fans[s] for s in meaning.subjects) * np.exp(angles[meaning.angle]["liking"])

        self.popular = sorted(self.pool, key=appeal)[-POPULAR:]

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
            starter = _pick(rng, source)
            if starter not in starters:
                starters.append(starter)
        return starters


class World:
    """A platform's people, logs and hidden state; the same settings give the same bytes."""

    def __init__(self, settings: WorldConfig):
        self.settings, self.rng = settings, np.random.default_rng(settings.seed)
        self.forms, self._truth, n = read_yaml("world/forms.yaml"), Truth({}), settings.users
        self.taxonomy, robots = self._truth.taxonomy, []
        # Of a shuffled order the first topics come ten times as often as the last.
        order = self.rng.permutation(sorted(self.taxonomy.topics)).tolist()
        self.rank = {topic: rank for rank, topic in enumerate(order)}
        if n >= 100:  # one user in a thousand, but at least one
            robots = self.rng.choice(n, max(1, n // 1000), replace=False).tolist()
        self.passing = {  # language -> its topics, their shares
            language: ([*topics], self._popularity(topics))
            for language, topics in self.taxonomy.names.items()}
        for i in range(n):
            self._truth.users[f"u{i}"] = self._person(i in robots)
        self.retrieval = Retrieval(
            self._truth, self.forms["starters"], self.rng, settings.starter_pool)

    @cached_property  # drawn last: who wants the retrieval alone need not wait for it
    def _lives(self) -> list[tuple[data.User, list[data.Impression]]]:
        # Each by a generator of its own. They complete the truth.
        return [self._life(user_id, np.random.default_rng([self.settings.seed, i]))
                for i, user_id in enumerate(self._truth.users)]

    @property
    def truth(self) -> Truth:
        return self._lives and self._truth

    @property
    def users(self) -> list[data.User]:
        return [user for user, _ in self._lives]

    @property
    def impressions(self) -> list[data.Impression]:
        return [row for _, rows in self._lives for row in rows]

    def write(self, folder: str | Path) -> None:
        data.write_users(Path(folder) / "users.jsonl", self.users)
        data.write_impressions(Path(folder) / "impressions.jsonl", self.impressions)
        write_json(Path(folder) / "truth" / "truth.json",
                   {"version": VERSION, "users": self.truth.users})

    def _person(self, robot: bool) -> dict:
        """An entry in Truth.users; what is asked, and next, comes with the life."""
        rng, likings = self.rng, [angle["liking"] for angle in self.taxonomy.angles.values()]
        language = "zh" if rng.random() < CHINESE_SHARE else "en"
        return {
            "language": language, "interests": self._interests(language),
            "chores": float(rng.beta(*CHORES)),
            # People differ as much as angles do.
            "angles": [float(liking + rng.normal(0, np.std(likings))) for liking in likings],
            "robot": robot, "asked": set(), "last_day": self.settings.days}

    def _popularity(self, topics: Iterable[str]) -> np.ndarray:
        """Share of each of these topics in what people come upon."""
        pull = np.array([1 / (12 + self.rank[topic]) for topic in topics])
        return pull / pull.sum()

    def _some(self, topics: list[str], count: int) -> list[str]:
        """At most so many distinct topics, popular ones rather."""
        return self.rng.choice(topics, min(len(topics), count), replace=False,
                               p=self._popularity(topics)).tolist()

    def _interests(self, language: str) -> list[dict]:
        """Three to nine topics of leisure and one or two chores, as in Truth.users."""
        rng, names, interests = self.rng, self.taxonomy.names[language], []
        chores = [*filter(self.taxonomy.functional, sorted(names))]
        always = float(self.settings.days + NEXT_DAYS)
        leisure = [topic for topic in sorted(names) if topic not in chores]
        for topic in (*self._some(leisure, rng.integers(3, 10)),
                      *self._some(chores, rng.integers(1, 3))):
            subjects, chore = list(names[topic]), topic in chores
            best = rng.choice(len(subjects), min(len(subjects), rng.integers(2, 6)), replace=False)
            # Drawn apart: what is frequent need not resonate, which counting cannot find out.
            resonance = float(rng.uniform(0, 0.08) if chore else rng.beta(1.2, 1.2))
            alive = [(0.0, always)] if chore else self._stretches(resonance)
            interests.append({
                "topic": topic, "subjects": [subjects[i] for i in best],
                "frequency": float(rng.lognormal(0.0, 1.0)),  # relative: a weight
                "resonance": resonance, "alive": alive})
        return interests

    def _stretches(self, resonance: float) -> list[tuple[float, float]]:
        """Days on which an interest is alive: what resonates comes back and stays longer."""
        # Some begin before the log; none for the first time in its last third.
        start, alive = self.rng.uniform(-20, self.settings.days * 0.7), []
        for _ in range(1 + self.rng.binomial(3, 0.15 + 0.8 * resonance)):
            end = start + self.rng.exponential(10 + 40 * resonance)  # days
            alive.append((float(start), float(end)))
            start = end + self.rng.exponential(18)
        return alive

    def _life(self, user_id: str,
              rng: np.random.Generator) -> tuple[data.User, list[data.Impression]]:
        """A user and what they were shown, as the log has them."""
        settings, person, rows = self.settings, self._truth.users[user_id], []
        count = int(np.clip(np.exp(rng.normal(np.log(MEDIAN_SESSIONS), SPREAD)), 1, 500))
        untimed = rng.random() < 0.02  # some logs hold no times
        # As many lists as one comes back; a robot does not look at any.
        lists = rng.poisson(settings.impressions_per_user * count / MEAN_SESSIONS)
        if person["robot"] or untimed:
            count, lists = max(count, 40 * person["robot"]), 0
        joined, life = rng.uniform(0, settings.days * 0.3), []
        events = [(float(day), kind) for kind, n in (("session", count), ("list", lists))
                  for day in rng.uniform(joined, settings.days, n)]  # in days, as all times here
        for day, kind in sorted(events):
            if kind == "list":
                rows.append(self._shown(user_id, day, life, rng))
            elif person["robot"] and life and rng.random() < 0.98:  # one thing all day
                life.append(life[0]._replace(day=day))
            else:
                life.append(self._unaided(person, day, life, "log", rng))
        later = rng.uniform(0, NEXT_DAYS, NEXT_SESSIONS) + settings.days
        person["next"] = [
            self._unaided(person, day, life, "held_out", rng).text for day in np.sort(later)]
        life.sort(key=lambda asked: asked.day)
        person["asked"] = sorted(person["asked"].union(question(asked.text) for asked in life))
        sessions = [
            data.Session(session_id=f"s{i}", summary=asked.text,
                         timestamp=None if untimed else _when(min(asked.day, settings.days)))
            for i, asked in enumerate(life)]
        profile, told = None, self.forms["profile"]
        if rng.random() >= 0.1:  # one in ten tells nothing
            chinese = person["language"] == "zh"
            profile = {"age": str(rng.choice(told["age"])),
                       "region": "CN" if chinese else str(rng.choice(told["region"]))}
        return data.User(user_id=user_id, profile=profile, sessions=sessions), rows

    def _unaided(self, person: dict, day: float, life: list[Asked], forms: str, rng) -> Asked:
        """A session that nothing shown has led to."""
        names = self.taxonomy.names[person["language"]]
        if life and rng.random() < AGAIN_SHARE:  # what was asked often, or lately
            late = life[-6:] if rng.random() < LATE else life
            # Of two that come to mind the one that was asked more often.
            asked = max(_pick(rng, late), _pick(rng, late),
                        key=lambda one: sum(one.subject == other.subject for other in life))
            if forms == "log" and rng.random() < SAME_WORDS:
                return asked._replace(day=day)
            return self._session(person, day, asked.topic, asked.subject, forms, rng)
        chores, passing = rng.random(2) < (person["chores"], PASSING)
        if passing and not chores:  # perhaps of a topic that is an interest after all
            topics, shares = self.passing[person["language"]]
            topic = topics[rng.choice(len(topics), p=shares)]
        else:
            some = [interest for interest in person["interests"]
                    if chores == self.taxonomy.functional(interest["topic"])]
            # On a day when nothing is alive everything is, so that each session has a topic.
            some = [interest for interest in some if is_alive(interest, day)] or some
            weights = np.array([interest["frequency"] for interest in some])
            interest = some[rng.choice(len(some), p=weights / weights.sum())]
            topic = interest["topic"]
        subject = _pick(rng, [*names[topic]])
        # The object of a chore changes each time.
        if not passing and not chores and rng.random() < FAVOURITE:
            share = 0.6 ** np.arange(len(interest["subjects"]))  # favourites come best first
            subject = interest["subjects"][rng.choice(len(share), p=share / share.sum())]
        return self._session(person, day, topic, subject, forms, rng)

    def _session(self, person: dict, day, topic: str, subject: str, forms: str, rng) -> Asked:
        kind = "chores" if self.taxonomy.functional(topic) else "summaries"
        # A tapped starter may be about what has no name in the person's language.
        language = person["language"] * (subject in self.taxonomy.names[person["language"]]
                                         .get(topic, ())) or "en"
        names, some = self.taxonomy.names[language][topic], self.forms[kind][forms][language]
        chosen = [_pick(rng, some)]
        if rng.random() < 0.004:  # somebody pastes half a page
            chosen += [_pick(rng, some) for _ in range(rng.integers(8, 24))]
        other = _pick(rng, [*names.values()])
        text = ". ".join(form.format(x=names[subject], y=other, t=topic) for form in chosen)[:900]
        return Asked(day, topic, subject, text.lower() if rng.random() < 0.15 else text)

    def _shown(self, user_id: str, day: float, life: list[Asked], rng) -> data.Impression:
        """A list of the retrieval, what was tapped, and what followed, which joins the life."""
        truth, understand = self._truth, self.taxonomy.understand
        starters = self.retrieval.draw([asked.topic for asked in life], rng)
        chances = truth.click_probabilities(user_id, starters, day)  # (K,)
        clicked, after = np.flatnonzero(rng.random(LIST_SIZE) < chances).tolist(), 0
        for slot in clicked:
            meaning = understand(starters[slot])
            truth.users[user_id]["asked"].add(question(starters[slot]))
            more = rng.poisson(further_sessions(truth.match(user_id, meaning, day)))
            after += more
            for n in range(1 + more):  # each a quarter of an hour after the other
                life.append(self._session(truth.users[user_id], day + n / 96, meaning.topic,
                                          min(meaning.subjects), "log", rng))
        return data.Impression(
            user_id=user_id, timestamp=_when(day), starters=starters, clicked=clicked,
            sessions_after=None if rng.random() < 0.05 else after)  # a real log lacks some
