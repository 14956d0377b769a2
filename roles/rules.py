"""The parts that an LLM plays in the paper, by rule: teacher, matcher, judge and summariser.

    python train.py roles.teacher=rules roles.matcher=rules roles.judge=rules roles.summariser=rules

Paper: Table 4 (teacher), Table 5 (matcher), appendix C.1 (judge). Departure: it prompts large
models for these roles. Rules need no network, give the same answer each time and can be read.
E earlier and L later summaries.
"""

import itertools
import random
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data import Message
from files import progress
from llm import clean_starter, format_starters
from roles import text
from roles.languages import SPACELESS, language
from roles.safety import unfit
from roles.starters import filter_starters
from roles.text import Encode, cosines, is_functional, key_phrases, normal_form

# By hand, for MiniLM. Against the hidden subjects of 200 simulated people (world.seed=1000) these
# give a precision of .91 and a recall of .88 (tables.truth.matcher_quality).
MATCH_COSINE = 0.45  # where a phrase is shared; .3: the same, .65: recall .81
MATCH_COSINE_ALONE = 0.85  # the same in other words; .75: recall .93, .95: .84
SAID = 20  # first messages and sentences in which a summary looks for a subject
_SENTENCE = re.compile(r"(?<=[.?!])\s+|(?<=[。？！])")
THEME_SHARE = 0.02  # of the people: "travel tips" is a field; 1: precision .87, recall .99


def _angles(lang: str) -> list[list[tuple[str, str]]]:
    """Of each angle its templates: ("kind|kind" of subject, or "any"; text with {x}); none in a
    language that templates.yaml does not have: nobody is answered in another one."""
    # Fresh lists, as the teacher shuffles them and uses them up.
    return [[template for item in items for template in item.items()]
            for items in text.read_yaml("templates.yaml").get(lang, {}).values()]


def _spans(phrase: str) -> set[str]:
    """Every run of whole words in a phrase; of two or more characters in Chinese."""
    zh = language(phrase) in SPACELESS
    words = (list if zh else str.split)(normal_form(phrase))[:12]  # there are n^2 / 2 spans
    ends, least = itertools.combinations(range(len(words) + 1), 2), 2 if zh else 1
    return {("" if zh else " ").join(words[i:j]) for i, j in ends if j - i >= least}


def _themes(histories: Iterable[Iterable[str]]) -> set[str]:
    """Phrases that more than THEME_SHARE of the people use (and than five): no subjects."""
    people = [{normal_form(phrase) for summary in {*summaries} for phrase in key_phrases(summary)}
              for summaries in histories]
    users = Counter(itertools.chain.from_iterable(people))
    return {phrase for phrase, n in users.items() if n > max(5, THEME_SHARE * len(people))}


def _best_first(phrases: Sequence[str]) -> list[str]:
    """Phrases that read badly in a template come last: a long run of words, an adjective or owner
    where a longer phrase says of what (Japanese ceramics, Grover's search)."""
    return sorted(phrases, key=lambda phrase: len(phrase.split()) > 4 or (
        re.search(r"^\S+(?:an|ese|ish|ch|'s)$", phrase) is not None
        and any(other.startswith(f"{phrase} ") for other in phrases)))


def _subject(phrase: str, interest: str) -> str:
    """A key phrase as it stands in a template: short, and with its article; "" if unusable."""
    phrase = re.sub(r"&{2,}|[<>{}]", " ", phrase)  # neither markup nor a placeholder
    if language(phrase) in SPACELESS:
        return clean_starter(phrase[:8])  # short, as a template adds about as much
    words, small = phrase.split(), text.lexicon()["words"]["stop"] | {"and", "of", "the"}
    if len(words) > 5:  # the first of two names; or else cut, but not after "of"
        words = phrase.split(" and ")[0].split()[:5]
        while words and words[-1].casefold() in small:
            words.pop()
    phrase = " ".join(words).strip(" ,.;:!?")
    found = re.search(rf"(?i)\b(an?|the) {re.escape(phrase)}(?!\w)[ '\-]*(\w*)", interest)
    # "a neural network", but not "the neural" of "the neural network", nor "the taste" of beer.
    if phrase and found and found[2].casefold() in small - {"of"} | {""}:
        small_a = found.start() == 0 and phrase[0].islower()  # "A", as it began a sentence
        phrase = f"{found[1].lower() if small_a else found[1]} {phrase}"
    return clean_starter(phrase)


def _is_brief(starter: str) -> bool:
    """At most 10 words or 16 Chinese characters: well below the limits of text.py."""
    words, spaceless = starter.split(), language(starter) in SPACELESS
    return len("".join(words)) <= 16 if spaceless else len(words) <= 10


def _kind(phrase: str, interest: str) -> str:
    """Kind of subject: by the phrase, or the label before a colon (fantasy novels: The Witcher)."""
    # A whole question says too little: of "Why does Stephen Hawking fear AI?" he is no software.
    label = interest if language(interest) == "zh" else ":".join(interest.split(":")[:-1])
    return text.kind_of(phrase, "kinds") or text.kind_of(label, "kinds") or "any"


class Rules:
    """Plays every role, with the methods of prompted.Prompted, which asks an LLM."""

    def __init__(self, encode: Encode, everyone: Iterable[Iterable[str]] = ()):
        """everyone: summaries of each person; what many share is a theme, no subject."""
        self.encode, self.themes = encode, _themes(everyone)

    def write(self, inputs: Iterable[list[str]], n: int, seeds: Iterable[int]) -> list[str]:
        """Of each input `<think> .. </think><sug> a && b </sug>` with n starters: a key phrase of
        each interest in turn, under varied angles, in the language of most. Chores come only when
        nothing else is left; fewer than n only if no phrase is usable or the templates run out,
        none where there are no templates in that language."""
        return [self._write(interests, n, random.Random(seed))
                for interests, seed in zip(inputs, seeds, strict=True)]

    def _write(self, interests: list[str], n: int, rng: random.Random) -> str:
        wanted = text.majority_language(interests)
        subjects = self._subjects([i for i in interests if text.in_language(i, wanted)])
        angles = _angles(wanted)
        rng.shuffle(angles)  # these draws are part of a run: two shuffles, in this order
        for angle in angles:
            rng.shuffle(angle)
        starters, turns = [], deque(subjects)
        while turns and len(starters) < n:
            subject = turns.popleft()
            starter = self._starter(*subject, angles, interests, starters)
            if starter:  # without one it has no further turn: templates only get fewer
                starters.append(starter)
                turns.append(subject)
        named = ", ".join(phrases[0] for phrases, _ in subjects[:n]) or "none"
        reasoning = f"<think> Interests worth building on: {named}. </think>"
        return reasoning + format_starters(starters)  # the form of Table 4

    def _subjects(self, interests: list[str]) -> list[tuple[list[str], str]]:
        """(short key phrases, kind) of each usable interest; chores only if all are."""
        subjects, taken = {False: [], True: []}, []  # by whether it is a chore
        for interest, reason in zip(interests, unfit(interests, self.encode), strict=True):
            phrases = [_subject(phrase, interest) for phrase in _best_first(key_phrases(interest))]
            phrases = [p for p in phrases if p and len(p) <= 60]
            # Once each: no "old AI" beside "AI"; and in "AI at a glance" the rest is its frame.
            fresh = [p for p in phrases if not any(text.says(p, other) for other in taken)]
            if len(fresh) < len(phrases):  # but for a name
                fresh = [p for p in fresh if not p.islower() and not interest.startswith(p)]
            if fresh and not reason:
                taken.append(fresh[0])
                subjects[is_functional(interest)].append((fresh, interest))
        return subjects[False] or subjects[True]

    @staticmethod
    def _starter(phrases: list[str], interest: str, angles: list[list], interests: list[str],
                 starters: list[str]) -> str | None:
        """The first fitting template under the angle used least recently; it is used up. A long
        one is taken only where no other form and no shorter phrase of the interest fits."""
        kinds = {phrase: _kind(phrase, interest) for phrase in phrases}

        def forms() -> Iterator[tuple[list, tuple, str]]:
            for phrase, angle in itertools.product(phrases, angles):
                for template in sorted(angle, key=lambda t: t[0] == "any"):  # for this kind first
                    if {"any", kinds[phrase]} & {*template[0].split("|")}:
                        yield angle, template, template[1].format(x=phrase)

        # Brief ones first: a policy that learned from starters at the limit writes some beyond it.
        for angle, template, starter in (form for brief in (True, False) for form in forms()
                                         if _is_brief(form[2]) == brief):
            starter = starter[:1].upper() + starter[1:]
            if filter_starters([starter], interests, seen=starters)[0]:
                angle.remove(template)
                angles.append(angles.pop(angles.index(angle)))  # least recently used comes first
                return starter
        return None

    def match(self, jobs: Sequence[tuple[list[str], list[str]]]) -> list[np.ndarray]:
        """(E, L) of 1 and 0 for each (earlier, later) job: do they share a specific subject?"""
        return [self._matches(*job).astype(np.int8) for job in progress(jobs, "match")]

    def _matches(self, earlier: list[str], later: list[str]) -> np.ndarray:
        # The same text, a cosine that suffices, or a cosine and a shared phrase; and no chore,
        # which may come again and again without being an interest.
        if not earlier or not later:
            return np.zeros((len(earlier), len(later)), dtype=bool)  # nothing to encode
        cosine = cosines(self.encode, earlier, later)  # (E, L)
        # Either may say more: "Elden Ring", "Elden Ring bosses".
        shared = self._contained(earlier, later) | self._contained(later, earlier).T
        match = text.same_text(earlier, later) | (cosine >= MATCH_COSINE_ALONE)
        match |= shared & (cosine >= MATCH_COSINE)
        return match & ~np.array([*map(is_functional, earlier)])[:, None]

    def _contained(self, whole: list[str], parts: list[str]) -> np.ndarray:
        """(len(whole), len(parts)): some key phrase of the whole contains one of the part."""
        # A unit within a span, without a loop over pairs of phrases.
        spans = [set().union(*map(_spans, key_phrases(summary))) for summary in whole]
        units = [{*map(normal_form, key_phrases(summary))} - self.themes for summary in parts]
        return np.array([[not unit.isdisjoint(span) for unit in units] for span in spans])

    def compare(self, rows: Sequence[tuple[list[str], list[str], list[str]]]) -> list[float]:
        """(history, a, b) -> 1.0 if a says more about the user, 0.0 if b does, 0.5 for a tie."""
        gaps = []
        for history, a, b in rows:
            size = max(len(a), len(b))  # a short list gains nothing by being short
            gaps.append(self._score(history, a, size) - self._score(history, b, size))
        return [0.5 if abs(gap) < 1e-6 else float(gap > 0) for gap in gaps]

    def _score(self, history: list[str], interests: list[str], size: int) -> float:
        """Share of specific interests, plus distinct subjects, plus persistence; each in [0, 1]."""
        if not interests:
            return 0.0
        subjects = [key_phrases(i)[0].casefold() for i in interests
                    if key_phrases(i) and not is_functional(i)]
        near = cosines(self.encode, interests, history) > 0.6 if history else np.zeros((1, 1))
        persistence = np.minimum(near.sum(1), 3).mean() / 3  # three sessions make it lasting
        return len(subjects) / len(interests) + len(set(subjects)) / size + float(persistence)

    def qualify(self, rows: Sequence[tuple[list[str], str]]) -> list[float]:
        """(a person's queries, a next query) -> 1.0 if it is fit to be offered, else 0.0."""
        # Meaning is beyond a rule: what reads badly or asks again is bad, the rest is good.
        self.encode([*dict.fromkeys(y for queries, new in rows for y in (*queries, new))])
        return [float(not filter_starters([new], queries[-1:], queries, subjects=True)[1]
                      and cosines(self.encode, [new], queries).max() < MATCH_COSINE_ALONE)
                for queries, new in rows]

    def prefer(self, rows: Sequence[tuple[list[str], list[str], list[str]]]) -> list[float]:
        """(a person's queries, next queries a, b) -> 1.0 if a is the better list, 0.0 if b, else
        0.5: the one with more that is fit to be offered and not like what stands before it."""
        fit = iter(self.qualify([(queries, y) for queries, a, b in rows for y in (*a, *b)]))
        result = []
        for _, *lists in rows:
            counts = []
            for some in lists:
                good = [y for y in some if next(fit)]
                # Of one meaning one counts.
                near = cosines(self.encode, good, good) > MATCH_COSINE_ALONE if good else np.eye(0)
                counts.append(int((~np.tril(near, -1).any(1)).sum()))
            result.append(0.5 + 0.5 * float(np.sign(counts[0] - counts[1])))
        return result

    def summarise(self, sessions: Iterable[list[Message] | None]) -> list[str]:
        """Of each session the user's first sentence with a subject, cut to 12 words or 20 Chinese
        characters; one without a subject if there is none; empty where nobody but greets."""
        lines = []
        for messages in sessions:
            said = [m for m in messages or () if m.content.strip()]
            said = [m for m in said if m.role == "user"] or said  # else what the assistant said
            texts = (m.content[:4000].strip() for m in said[:SAID])
            parts = [part for content in texts for part in _SENTENCE.split(content)]
            parts = [part for part in parts[:SAID] if part and not text.is_greeting(part)]
            sentence = next(filter(key_phrases, parts), parts[0] if parts else "")
            spaceless = language(sentence) in SPACELESS
            lines.append(sentence[:20] if spaceless else " ".join(sentence.split()[:12]))
        return lines
