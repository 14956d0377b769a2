"""What the simulated platform hides: how it understands a text, what resonates, who taps what.

    truth = people.load_truth("runs/default/world")
    truth.click_probabilities("u17", ["What is Mars?", "Quiz me on Mars"])
    truth.cascade_clicks("u17", ["What is Mars?", "Quiz me on Mars"])

Departure: it stands in for the paper's live users (section 3.3). It understands a starter by its
lexicon (taxonomy.yaml), whoever wrote it, and knows nothing of the methods. Only what evaluates may
read it, and the platform where it shows the pilot. Every number is a plausible choice, fitted to no
result. So that no result hangs on one rule there are two click models, in the field's terms:
- *position-based*: P(tap) = P(slot is looked at) x P(attracted); what attracts is resonance, an
  angle that this person likes, and news. By it the platform's log was tapped.
- *cascade*: a person comes with an intent, one of the sessions that they will really have after the
  log; reads from the top down, taps the first starter that is like it, and stops. Alike are shared
  rare words: no lexicon, no resonance, no style. Over all intents it is ERR-IA (Chapelle et al.,
  2011). Only the evaluation reads it.
"""

import re
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

from files import read_yaml

# P(slot is looked at): a real log's taps of the same content by slot; the first always.
EXAMINATION = np.array([0.47, 0.29, 0.19, 0.17, 0.07]) / 0.47
FLOOR = -5.2  # logit of a tap on what means nothing to a person: most lists get none
RESONANCE = 6.0  # logits between what means nothing and what resonates wholly
CASCADE = 0.9  # P(tap) on a starter in the very words of the session that one has in mind
PATIENCE = 0.85  # P(reading on) after each starter that is not tapped
HAN = re.compile(r"[\u3400-\u9fff]")


class Meaning(NamedTuple):
    """What the world understands of a text."""

    topic: str | None
    subjects: frozenset[str]  # by their English names
    angle: int  # place in Taxonomy.angles


class Taxonomy:
    """taxonomy.yaml, and the lexicon that finds its subjects and topics in any text.

    names: language ("en", "zh") -> topic -> subject -> its name; few topics have Chinese names.
    """

    def __init__(self):
        tree = read_yaml("world/taxonomy.yaml")
        self.angles, self.topics, self.category = tree["angles"], {}, {}
        for category, topics in tree["categories"].items():
            self.topics |= topics
            self.category |= dict.fromkeys(topics, category)
        entries, self._subject_of, self._topic_of = self.topics.items(), {}, {}
        english = {topic: {s: s for s in entry["subjects"]} for topic, entry in entries}
        chinese = {topic: entry["zh"] for topic, entry in entries if "zh" in entry}
        self.names = {"en": english, "zh": chinese}
        for topic, entry in entries:
            self._subject_of |= {subject.lower(): (topic, subject) for subject in english[topic]}
            zh = chinese.get(topic, {}).items()
            self._subject_of |= {name.lower(): (topic, subject) for subject, name in zh}
            for word in (topic, *entry["keywords"]):  # a word of two topics: of the first
                self._topic_of.setdefault(word.lower(), topic)
        self._find_subjects, self._find_words = _finder(self._subject_of), _finder(self._topic_of)
        self.understand = cache(self._understand)  # of this object: it goes when the object goes

    def functional(self, topic: str) -> bool:
        """Whether a topic is a chore, such as spreadsheets."""
        return self.topics[topic].get("functional", False)

    def _understand(self, text: str) -> Meaning:
        low = text.lower()
        named = [self._subject_of[name] for name in self._find_subjects(low)]
        topics = [topic for topic, _ in named] or map(self._topic_of.get, self._find_words(low))
        shown = [any(word in low for word in angle["words"]) for angle in self.angles.values()]
        angle = [*shown[:-1], True].index(True)  # none: the last, "plain"
        # A subject says more than a word of its topic.
        return Meaning(next(iter(topics), None), frozenset(subject for _, subject in named), angle)


def _finder(names):
    """Text -> the names in it, the longest first; whole words, save in Chinese without spaces."""
    names = [re.escape(name) for name in sorted(names, key=len, reverse=True)]
    latin = "|".join(name for name in names if not HAN.search(name))
    chinese = [name for name in names if HAN.search(name)]
    # Without the look-arounds "art" would be found in "start".
    return re.compile("|".join([rf"(?<!\w)(?:{latin})(?!\w)", *chinese])).findall


def question(text: str) -> str:
    """A text as it is compared with what was asked before."""
    return text.lower().strip(" ?.")  # people leave the question mark out


def further_sessions(resonance: float) -> float:
    """Mean number of further sessions about it, after a tap on what resonates this much."""
    return 0.1 + 1.5 * resonance  # sessions


def is_alive(interest: dict, day: float) -> bool:
    """Whether the day lies in one of the interest's stretches of days."""
    return any(start <= day <= end for start, end in interest["alive"])


def _redundancy(a: Meaning, b: Meaning) -> float:
    """How much a starter loses (logits, at most 1.6) where one above it has this in common."""
    return (bool(a.subjects & b.subjects) * 0.9 + bool(a.topic and a.topic == b.topic) * 0.4
            + (a.angle == b.angle) * 0.3)


class Truth:
    """The hidden state of every user, as of the end of the log (truth.json).

    users: id -> {"interests": [{"topic", "subjects": favourites, best first, "frequency",
    "resonance": in [0, 1], "alive": [(first, last day)]}], "chores": share of sessions, "angles":
    logit of each angle, "robot", "asked": every `question` in the log, "last_day", "next": texts of
    sessions after it}. Days count from people.START.
    """

    def __init__(self, users: dict[str, dict]):
        self.users, self.taxonomy = users, Taxonomy()
        self._likeness = cache(self._likeness_of)  # of this object, as Taxonomy.understand

    def match(self, user_id: str, meaning: Meaning, day: float) -> float:
        """How much a text of this meaning resonates on a day, in [0, 1]."""
        topic, best, category_of = meaning.topic, 0.0, self.taxonomy.category
        for interest in self.users[user_id]["interests"]:
            if topic == interest["topic"]:
                # A favourite subject, or another one of its topic ...
                near = 1.0 if meaning.subjects & set(interest["subjects"]) else 0.5
            else:  # ... or a neighbour in its category
                near = 0.1 * (category_of.get(topic) == category_of[interest["topic"]])
            if near:
                fresh = 1.0 if is_alive(interest, day) else 0.4  # asleep, not gone
                best = max(best, near * fresh * interest["resonance"])
        return best

    def resonance(self, user_id: str, text: str) -> float:
        """How much a text resonates at the end of the log, in [0, 1]."""
        return self.match(user_id, self.taxonomy.understand(text), self.users[user_id]["last_day"])

    def category(self, text: str) -> str | None:
        topic = self.taxonomy.understand(text).topic
        return self.taxonomy.category[topic] if topic else None

    def click_probabilities(self, user_id: str, starters: list[str], day: float | None = None,
                            asked_since: frozenset[str] = frozenset()) -> np.ndarray:
        """Position-based model: P(tap) of each starter (K,).

        `asked_since`: `question`s asked after the log, which are no longer new either.
        """
        user, above, result = self.users[user_id], [], []  # above: meanings, in list order
        day = user["last_day"] if day is None else day
        for slot, starter in enumerate(starters):
            meaning = self.taxonomy.understand(starter)
            asked = question(starter) in user["asked"] or question(starter) in asked_since
            # Of the one above that it is most like: dull is dull, however often.
            redundancy = max((_redundancy(meaning, other) for other in above), default=0.0)
            logit = (FLOOR
                     + RESONANCE * self.match(user_id, meaning, day)  # the most that decides
                     + user["angles"][meaning.angle]  # the same for every subject: style
                     + 0.5 * bool(meaning.subjects)  # a name draws more than a topic
                     - 0.8 * asked - redundancy)
            looked_at = EXAMINATION[min(slot, len(EXAMINATION) - 1)]  # longer lists: as the last
            result.append(looked_at / (1 + np.exp(-logit)) if starter.strip() else 0.0)
            above.append(meaning)
        return np.array(result)

    def expected_clicks(self, user_id: str, starters: list[str]) -> float:
        """Mean number of taps on a list at the end of the log: eval's "True clicks"."""
        return float(self.click_probabilities(user_id, starters).sum())

    def cascade_clicks(self, user_id: str, starters: list[str]) -> float:
        """Cascade model: mean number of taps, 0 to 1, on a list: eval's "Cascade clicks"."""
        if not starters:
            return 0.0
        likeness = np.stack([self._likeness(user_id, y) for y in starters])  # (K, intents)
        taps = CASCADE * likeness**2  # P(tap) of a starter that is reached
        # Reached: nothing above was tapped, and patience lasted.
        reached = np.cumprod(np.vstack([np.ones_like(taps[:1]), 1 - taps[:-1]]), 0)
        patience = PATIENCE ** np.arange(len(starters))[:, None]
        return float((patience * reached * taps).sum(0).mean())

    def _likeness_of(self, user_id: str, starter: str) -> np.ndarray:
        """Cosine of tf-idf words of a starter with each session that a user has next."""
        return (self._next[user_id] @ self._words.transform([starter]).T).toarray()[:, 0]

    @cached_property
    def _words(self) -> TfidfVectorizer:
        # What nobody asks about next weighs nothing; Chinese characters are words.
        words = TfidfVectorizer(token_pattern=r"[^\W\u3400-\u9fff]+|[\u3400-\u9fff]")
        return words.fit([text for user in self.users.values() for text in user["next"]])

    @cached_property
    def _next(self) -> dict:
        """user -> unit rows (intents, words)."""
        return {user_id: self._words.transform(user["next"])
                for user_id, user in self.users.items()}
