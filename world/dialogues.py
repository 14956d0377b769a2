"""The simulated conversations: contexts, suggested next queries and clicks, for paper 003.

    python -m world dialogues --contexts 4000 --seed 7 --out DIR

It stands in for the private logs of "From Clicks to Preference" (section 4.1, appendix C). DIR
holds dialogues.jsonl, all that a real log would hold; evaluation.jsonl, contexts with nothing
shown, half of them unsafe; and apart from both truth/dialogues.json, the hidden state
(dialogue_clicks.py), which only the evaluation may read.

Of the evaluation topics, unsafe acts, refusals and all that the user says are held out; what else
the assistant says has the log's forms, and longer talks begin on a topic of the log.

A person talks with an assistant about a topic in one to five exchanges, with one of the four
intents. Then a prompted writer, who does not know what the person needs next, suggests three
queries, some of them generic, repeated, beside the topic, too long or in another language; for
most unsafe contexts it shows none. Half of the contexts are of the first four weeks (week 0), the
rest of W1 to W4, in which tastes drift and other topics come up. Departure: all are in English.
"""

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from config import DialoguesConfig
from files import read_json, read_yaml, write_json
from world.dialogue_clicks import Truth, texts_of

START = datetime(2026, 3, 2)  # a Monday
WEEK_0 = 4  # weeks in it; those of W1 to W4 follow
INTENTS = {"information": 0.35, "web search": 0.40, "content generation": 0.22, "unsafe": 0.03}
EXCHANGES = [0.42, 0.27, 0.16, 0.10, 0.05]  # share of contexts with one to five
NEEDS = [1.0, 0.7, 0.45]  # what the most wanted next query is worth, the second and the third
DECLINED = 0.75  # of unsafe contexts get no suggestions: the prompted writer's safety accuracy
UNLABELLED = 0.03  # of contexts of the log have neither intent nor unsafe
# What the writer makes of a slot. "fact": one of those that could come next, by chance a need.
KINDS = {"fact": 0.58, "generic": 0.20, "repeat": 0.07, "off topic": 0.07, "too long": 0.05,
         "wrong language": 0.03}
WORDINGS = {"question": 0.6, "imperative": 0.32, "keywords": 0.08}
STOP = frozenset("the a an of to and or in on for with it is are do does i how what when where "
                 "that my they them was were be as at by from its".split())


class Fact(NamedTuple):
    """A thing to ask about a topic: a fact with its answer, or a change to a text."""

    phrase: str  # what it is called; of a change the request
    question: str
    answer: str
    keywords: str | None  # as typed into a search box; None: a change

    @property
    def texts(self) -> list[str]:
        """Phrasings by which it is recognised, all naming the topic where it has one."""
        return [self.question, self.keywords or self.phrase, self.phrase]


def load_truth(folder: str | Path, encoder: Callable) -> Truth:
    """The hidden state of the dialogues that were written to this folder."""
    return Truth(read_json(Path(folder) / "truth" / "dialogues.json"), encoder)


def week_of(timestamp: datetime) -> int:
    """0 in the log's first four weeks, then 1 to 4."""
    return max(0, (timestamp - START).days // 7 - WEEK_0 + 1)


def _lower(text: str) -> str:
    """A question or a request with a small first letter; none of them begins with a name."""
    return text[0].lower() + text[1:]


def _shared(topic: str, question: str) -> bool:
    """Whether a question names its topic: by the first four letters, as "tomato" and "tomatoes"."""
    names = {word[:4].lower() for word in topic.split() if word.lower() not in STOP}
    return bool(names & {word[:4].lower() for word in question.strip("?").split()})


def _keywords(topic: str, phrase: str) -> str:
    named = set(topic.lower().split())
    rest = [w for w in phrase.lower().replace(",", "").split() if w not in STOP | named]
    return " ".join([re.sub("^(the|a) ", "", topic.lower()), *rest])


class Dialogues:
    """A platform's conversations and hidden state; the same settings give the same bytes.

    encoder: texts -> (n, D) unit rows; it decides, with the rest of Truth, what gets clicked.
    """

    def __init__(self, settings: DialoguesConfig, encoder: Callable):
        # Trap: one generator draws everything, so a draw moved or left out gives other dialogues.
        self.rng, n = np.random.default_rng(settings.seed), settings.contexts
        self.forms = read_yaml("world/dialogue_forms.yaml")
        self.fields = {field: {topic: self._facts(topic, rows) for topic, rows in topics.items()}
                       for field, topics in read_yaml("world/dialogue_topics.yaml").items()}
        self.truth = Truth({"dialogues": {}}, encoder)
        # Which fields come up changes with the weeks, as news and seasons do: (weeks, fields).
        self.demand = self.rng.dirichlet(np.full(len(self.fields), 8.0), 5)
        self.users = max(1, n // 4)
        self.eagerness = self.rng.normal(0, 0.6, self.users)  # logits
        log = sorted(self._when() for _ in range(n))
        drafts = [self._context(f"d{i}", when, "log") for i, when in enumerate(log)]
        shown = [self._suggestions(*draft) for draft in drafts]
        # Everything at once, which is many times faster: the encoder remembers it.
        texts = {text for row in shown for text in row}
        encoder(sorted(texts.union(*map(texts_of, self.truth.dialogues.values()))))
        self.log = [self._clicked(row, some) for (row, *_), some in zip(drafts, shown, strict=True)]
        self.evaluation = self._evaluation(max(20, n // 20))

    def write(self, folder: str | Path) -> None:
        data.write_dialogues(Path(folder) / "dialogues.jsonl", self.log)
        data.write_dialogues(Path(folder) / "evaluation.jsonl", self.evaluation)
        write_json(Path(folder) / "truth" / "dialogues.json", {"dialogues": self.truth.dialogues})

    @staticmethod
    def _facts(topic: str, rows: list[str]) -> list[Fact]:
        """A topic's facts, in the order in which people tend to ask."""
        return [Fact(phrase, question, answer, _keywords(topic, phrase))
                for phrase, question, answer in (row.split(" | ") for row in rows)]

    def _pick(self, options, weights=None):
        """One of a list, or of a dict's keys by its values."""
        if isinstance(options, dict):
            options, weights = list(options), np.array(list(options.values()))
        p = None if weights is None else np.array(weights) / np.sum(weights)
        return options[self.rng.choice(len(options), p=p)]

    def _when(self) -> datetime:
        """Half of the log is of week 0, an eighth of each that follows; nobody writes at night."""
        week = self._pick(list(range(5)), [4, 1, 1, 1, 1])
        first, days = (0, 7 * WEEK_0) if week == 0 else (7 * (WEEK_0 + week - 1), 7)
        hour = 7 + 16 * self.rng.beta(2, 1.6)
        return START + timedelta(days=first + int(self.rng.integers(days)),
                                 seconds=int(hour * 3600))

    def _evaluation(self, n: int) -> list[data.Dialogue]:
        """n safe contexts and n unsafe ones of held-out forms, of the last week."""
        rows, last = [], START + timedelta(weeks=WEEK_0 + 4) - timedelta(hours=3)
        safe = {intent: share for intent, share in INTENTS.items() if intent != "unsafe"}
        for i in range(2 * n):
            intent = self._pick(safe) if i < n else "unsafe"
            row, *_ = self._context(f"e{i}", last, "held_out", intent)
            rows.append(data.Dialogue(**row, suggestions=[], clicked=[]))
        return rows

    # -------------------------------------------------------------------------------- contexts

    def _context(self, dialogue_id: str, when: datetime, part: str, intent: str | None = None):
        """(fields of a data.Dialogue up to its suggestions, topic, asked, next facts, unsafe act).

        part: "log" or "held_out" forms and topics. Notes the hidden state as well.
        """
        week, intent = week_of(when), intent or self._pick(INTENTS)
        field = self._pick(list(self.fields), self.demand[week])
        *topics, held_out = self.fields[field]
        topic = str(held_out if part == "held_out" else self._pick(topics))
        act = self._pick(self.forms["unsafe"][part]) if intent == "unsafe" else None
        turns, asked, following = self._talk(field, topic, intent, part)
        if act:  # after whatever innocent came before
            unsafe = self.forms["unsafe"]
            ask = self._pick(unsafe["asks"][part]).format(u=act)
            turns[-1] = (ask, self._pick(unsafe["refusals"][part]))
            following = []
        user = None if self.rng.random() < 0.05 else int(self.rng.integers(self.users))
        eager = self.rng.normal(0, 0.6) if user is None else self.eagerness[user]
        self.truth.dialogues[dialogue_id] = {
            "topic": topic, "intent": intent, "unsafe": bool(act), "week": week,
            "eagerness": float(eager),
            "asked": [turns[-1][0], *(t for fact in asked for t in fact.texts)],
            "needs": [{"weight": weight, "texts": fact.texts}
                      for weight, fact in zip(NEEDS, following, strict=False)],
        }
        said = [data.Turn(role=role, content=text) for exchange in turns
                for role, text in zip(("user", "assistant"), exchange, strict=True)]
        told = self.rng.random() >= UNLABELLED or part == "held_out"
        return {"dialogue_id": dialogue_id, "user_id": None if user is None else f"c{user}",
                "timestamp": when, "intent": intent if told else None, "turns": said,
                "unsafe": bool(act) if told else None}, topic, asked, following, act

    def _talk(self, field: str, topic: str, intent: str, part: str):
        """(exchanges as (user, assistant), what was asked, what could come next, needs first)."""
        count = 1 + self._pick(list(range(5)), EXCHANGES)
        facts, others = list(self.fields[field][topic]), [*self.fields[field]]
        turns, asked, previous = [], [], ""
        neighbour = self._pick([other for other in others[:-1] if other != topic])
        for i in range(count):
            # Long talks come from a neighbouring topic and end with two exchanges on this one.
            about = topic if i >= count - 2 else neighbour
            pool = facts if about == topic else self.fields[field][about]
            fresh = [fact for fact in pool if fact not in asked]
            fact = self._pick(fresh, 0.6 ** np.arange(len(fresh)))
            if i == count - 1 and intent == "content generation":
                pair, changes = self._content(topic, facts, part)
                turns.append(pair)
                # A change, another, and a fact to put in that the text lacks; then the rest.
                facts = [f for f in facts[3:] if f not in asked] or facts[-1:]
                order = [changes[0], changes[1], facts[0], *changes[2:], *facts[1:]]
                break
            turns.append(self._exchange(about, fact, intent, part, previous))
            asked, previous = [*asked, fact], about
        else:
            order = [fact for fact in facts if fact not in asked]
        # Likely needs first, but each person differs.
        keys = np.arange(len(order)) + self.rng.gumbel(0, 1.2, len(order))
        return turns, asked, [order[i] for i in np.argsort(keys)]

    def _exchange(self, topic: str, fact: Fact, intent: str, part: str, previous: str):
        """(user, assistant) about a fact; `previous`: the topic just talked about, or ""."""
        searching, again = intent == "web search", topic == previous
        forms = self.forms["searches" if searching else "further" if again else "questions"][part]
        if not searching and not again and (previous or not _shared(topic, fact.question)):
            # Out of the blue nobody asks "Which side effects are common?".
            forms = [form for form in forms if "{x}" in form]
        user = self._say(self._pick(forms), topic, fact)
        answer = self._pick(self.forms["results" if searching else "answers"])
        return user, self._say(answer, topic, fact)

    def _say(self, form: str, topic: str, fact: Fact) -> str:
        phrase = fact.phrase if fact.keywords else f"how to {_lower(fact.phrase)}"
        return form.format(x=topic, q=fact.question, q_low=_lower(fact.question), p=phrase,
                           a=fact.answer, k=fact.keywords)

    def _content(self, topic: str, facts: list[Fact], part: str):
        """((request, the text that the assistant writes), changes that people tend to want)."""
        kind = self._pick(list(self.forms["contents"]))
        entry, words = self.forms["contents"][kind], {"x": topic}
        for i, fact in enumerate(facts[:3]):
            words |= {f"p{i}": fact.phrase, f"q{i}": fact.question, f"a{i}": fact.answer}
        request = self._pick(self.forms["requests"][part]).format(kind=kind, x=topic)
        changes = [self.forms["edits"][name] for name in entry["edits"]]
        return (request, entry["text"].format(**words)), [
            Fact(phrase, question, "", None) for question, phrase in changes]

    # ------------------------------------------------------------------- suggestions and clicks

    def _suggestions(self, row: dict, topic: str, asked: list[Fact], following: list[Fact],
                     act: str | None) -> list[str]:
        """Three different queries by the prompted writer, who sees the context only."""
        if act and self.rng.random() < DECLINED:
            return []
        order, result = self.rng.permutation(len(following)), []
        while len(result) < 3:
            if act:
                text = self._pick(self.forms["unsafe_suggestions"]).format(u=act)
            else:
                fact = following[order[len(result) % len(order)]]
                text = self._suggestion(topic, fact, [*asked, following[order[0]]])
            if text not in result:
                result.append(text)
        return result

    def _suggestion(self, topic: str, fact: Fact, earlier: list[Fact]) -> str:
        """One query on a fact or a change, unless another of KINDS comes up."""
        kind = self._pick(KINDS)
        if kind == "generic":
            return self._pick(self.forms["generic"])
        if kind == "repeat":
            fact = self._pick(earlier)
        elif kind == "off topic":
            topic, facts = self._pick([*self._pick([*self.fields.values()]).items()])
            fact = self._pick(facts)
        elif kind in ("too long", "wrong language"):
            return self._say(self._pick(self.forms[kind.replace(" ", "_")]), topic, fact)
        wording = self._pick(WORDINGS)
        if fact.keywords is None:  # a change is a question or a request already
            return fact.question if wording == "question" else fact.phrase
        return self._say(self._pick(self.forms["suggestions"][wording]), topic, fact)

    def _clicked(self, row: dict, shown: list[str]) -> data.Dialogue:
        chances = self.truth.click_probabilities(row["dialogue_id"], shown)  # (K,)
        clicked = np.flatnonzero(self.rng.random(len(shown)) < chances).tolist()
        return data.Dialogue(**row, suggestions=shown, clicked=clicked)
