"""What the simulated conversations hide: which next queries would help, and what gets clicked.

    truth = dialogues.load_truth("DIR", Encoder())
    truth.usefulness("d17", ["Explain the hydration of the dough", "Make it shorter"])  # (K,)
    truth.click_probabilities("d17", [...], week=4)                                     # (K,)

Departure: it stands in for the live users of "From Clicks to Preference" (section 4.2) and for its
annotators (appendix A). Any text is judged, whoever wrote it: by its nearness to the dialogue's
hidden needs, and by lexical rules. Usefulness knows nothing of style, clicks do (appendix I). Only
what evaluates may read it. Every number is a plausible choice, fitted to no method's result.

Legend: K suggestions of a context, M phrasings of its needs, D embedding.
"""

import re
from collections.abc import Callable

import numpy as np

from files import read_yaml
from roles.languages import language
from world.click_model import EXAMINATION

# Cosines of MiniLM between a suggestion and the phrasings of a fact: of the same one .65 to .95, of
# another fact of its topic .05 to .48 (5 % to 95 % quantiles of 250 suggestions).
NEAR = (0.50, 0.80)  # to a need: from no use to all its use
TOPICAL = (0.10, 0.40)  # to the topic; another one lies below .15
TOPIC_USE = 0.25  # of a suggestion that keeps to the topic but meets no need
MOST_CHARACTERS = 95  # appendix A: longer is redundant, hence useless
NOISE = 0.1  # of looks at a suggestion end in a click or not for no reason

# Latin scripts are told apart by words that stand in nearly every sentence.
FOREIGN = frozenset(
    "el la los las que qué de más sobre puedes cómo para con una este esta tema debo saber der die "
    "das und ist nicht mir über wie kann ich ein eine le les des est pour comment vous dans".split()
)
COMMON = frozenset("about what which when where there this that with from your more should could "
                   "would have does explain tell know show give some main points".split())


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+(?:[-']\w+)*", text.lower())


def stems(text: str) -> set[str]:
    """Content words, cut to five letters: "feeding" and "feed it" hardly differ then."""
    return {word[:5] for word in words_of(text) if len(word) > 3 and word not in COMMON}


def _ramp(values: np.ndarray, ends: tuple[float, float]) -> np.ndarray:
    """0 below the first end, 1 above the second, straight between them."""
    return np.clip((values - ends[0]) / (ends[1] - ends[0]), 0, 1)


def fitness(text: str) -> float:
    """In [0, 1]: how far a text can be used at all, whatever it is about (appendix A, H.1)."""
    words = words_of(text)
    if not words or len(text) > MOST_CHARACTERS or language(text) != "en":
        return 0.0
    foreign = sum(word in FOREIGN for word in words)
    if foreign >= 2 and foreign >= 0.3 * len(words):  # "die" or "las" alone may stand in a name
        return 0.0
    concise = min(1.0, max(0.0, 1 - (len(words) - 12) / 5))
    stuttering = len(set(words)) < 0.6 * len(words)
    return concise * (0.3 if stuttering else 1.0)


def texts_of(hidden: dict) -> list[str]:
    """All texts of a dialogue's hidden state that meet the encoder: for encoding them at once."""
    needs = [text for need in hidden["needs"] for text in need["texts"]]
    return [*needs, *hidden["asked"], hidden["topic"]]


def liking(text: str, week: int) -> float:
    """Logits that the wording adds to a click, whatever it says; `week` 0: the log's first part, 1
    to 4: W1-W4. Near-synonyms differ: "specific" is liked and "concrete" is not (Table 10)."""
    tastes, words = read_yaml("world/dialogue_forms.yaml")["tastes"], words_of(text)
    level, drift = tastes["openings"].get(words[0] if words else "", (0.0, 0.0))
    result = level + drift * week + sum(tastes["words"].get(word, 0.0) for word in set(words))
    if words[:2] == ["make", "it"] and len(words) <= 5:
        level, drift = tastes["one_size_fits_all"]
        result += level + drift * week
    return result - 0.1 * max(0, len(words) - 12)  # long ones are not read


class Truth:
    """The hidden state of every dialogue (truth.json), judged with an encoder of texts.

    dialogues: id -> {"topic", "intent", "unsafe", "week", "eagerness": logit of its user,
    "asked": phrasings of what was asked, "needs": [{"weight", "texts": phrasings}], best first}.
    encoder: texts -> (n, D) unit rows, a tensor or an array; it should remember what it has met.
    """

    def __init__(self, state: dict, encoder: Callable):
        self.dialogues, self.encoder = state["dialogues"], encoder

    def _judge(self, dialogue_id: str, suggestions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """(value of each suggestion for each need (K, needs), nearness to the topic (K,))."""
        hidden, needs = self.dialogues[dialogue_id], self.dialogues[dialogue_id]["needs"]
        owner = np.repeat(np.arange(len(needs)), [len(need["texts"]) for need in needs])  # (M,)
        phrasings, k, m = texts_of(hidden), len(suggestions), len(owner)
        # One call: an encoder takes much the same time for one text and for twenty.
        vectors = np.asarray(self.encoder([*(s or "." for s in suggestions), *phrasings]))
        cosines = vectors[:k] @ vectors[k:].T  # (K, M + asked + 1)
        nearest = np.stack([cosines[:, :m][:, owner == n].max(1) for n in range(len(needs))], 1)
        weights = np.array([need["weight"] for need in needs])
        # What lies nearer to an earlier question than to any need asks the same again.
        repeats = cosines[:, m:-1].max(1) >= np.maximum(nearest.max(1), NEAR[1])
        content = set().union(*map(stems, [*phrasings[:m], hidden["topic"]]))
        lexical = np.array([1.0 if stems(s) & content else 0.4 for s in suggestions])
        served = _ramp(nearest, NEAR) * weights * (lexical * ~repeats)[:, None]
        return served, _ramp(cosines[:, -1], TOPICAL) * ~repeats

    def usefulness(self, dialogue_id: str, suggestions: list[str]) -> np.ndarray:
        """(K,) in [0, 1]: how much each suggestion helps its user, given those above it.

        0 for all in an unsafe context: there an empty list is right. A second suggestion for the
        same need is worth a fifth (appendix A: of one meaning only one counts).
        """
        if self.dialogues[dialogue_id]["unsafe"] or not suggestions:
            return np.zeros(len(suggestions))
        served, topical = self._judge(dialogue_id, suggestions)  # (K, needs), (K,)
        values, met = [], set()
        for suggestion, by_need, near in zip(suggestions, served, topical, strict=True):
            need, value = int(by_need.argmax()), max(by_need.max(), TOPIC_USE * near)
            key = need if by_need[need] >= TOPIC_USE else frozenset(words_of(suggestion))
            values.append(value * fitness(suggestion) * (0.2 if key in met else 1.0))
            met.add(key)
        return np.array(values)

    def click_probabilities(self, dialogue_id: str, suggestions: list[str],
                            week: int | None = None) -> np.ndarray:
        """(K,) P(click) of each suggestion, with slot bias, at a week (None: the dialogue's)."""
        hidden, openings = self.dialogues[dialogue_id], []
        week = hidden["week"] if week is None else week
        useful, result = self.usefulness(dialogue_id, suggestions), []
        for slot, (suggestion, use) in enumerate(zip(suggestions, useful, strict=True)):
            opening = (words_of(suggestion) or [""])[0]
            logit = (-3.3 + 2.6 * use  # what helps is clicked most ...
                     + 1.1 * liking(suggestion, week)  # ... and so is what is liked
                     - 0.5 * (opening in openings)  # three that begin alike look like one
                     - 1.5 * (fitness(suggestion) == 0) + hidden["eagerness"])
            chance = (1 - NOISE) / (1 + np.exp(-logit)) + NOISE * 0.1
            looked_at = EXAMINATION[min(slot, len(EXAMINATION) - 1)]
            result.append(looked_at * chance if suggestion.strip() else 0.0)
            openings.append(opening)
        return np.array(result)

    def click_rate(self, dialogue_id: str, suggestions: list[str],
                   week: int | None = None) -> float:
        """P(at least one click) on a list: the paper's CTR of Eq. 1; 0 for an empty list."""
        chances = self.click_probabilities(dialogue_id, suggestions, week)
        return float(1 - np.prod(1 - chances))
