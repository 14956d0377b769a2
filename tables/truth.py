"""What only the hidden truth of the simulated world can tell: of texts, interests and labels.

    python eval.py --reproduce figure3

No stage that trains sees it: it is read here, in measure.py and controls.py, by stage eval after
training, and by the simulated platform (world/).
"""

from collections import Counter

import numpy as np

from run import Run
from stages.match import Revisits
from stages.metrics import TopicClassifier
from world.people import Truth


def topics(truth: Truth, texts: list[str]) -> Counter[str]:
    """Number of texts by topic category, chores apart; texts about nothing known do not count."""
    taxonomy = truth.taxonomy
    spoken = [topic for text in texts if (topic := taxonomy.understand(text)[0])]
    return Counter("Chores" if taxonomy.functional(t) else taxonomy.category[t] for t in spoken)


def chore_shares(truth: Truth, texts: dict[str, list[str]]) -> dict[str, float]:
    """Share of chores among each user's texts; users of whom no text is understood are left out."""
    counts = {user: topics(truth, theirs) for user, theirs in texts.items()}
    return {u: count["Chores"] / count.total() for u, count in counts.items() if count}  # not empty


def resonances(truth: Truth, texts: dict[str, list[str]]) -> dict[str, float]:
    """Mean hidden interest, 0 to 1, of each user in what the texts speak about."""
    return {u: float(np.mean([truth.resonance(u, y) for y in ys])) for u, ys in texts.items()}


def spoken_of(truth: Truth, lists: dict[str, list[list[str]]]) -> dict[str, dict[str, float]]:
    """Of each user's starters: the share about something known, and the resonance."""
    starters = {user: [y for row in rows for y in row] for user, rows in lists.items()}
    starters = {u: ys for u, ys in starters.items() if ys}  # an empty list says nothing
    known = truth.taxonomy.understand  # [0]: the topic, None where nothing is
    return {"known": {u: float(np.mean([bool(known(y)[0]) for y in ys]))
                      for u, ys in starters.items()},
            "resonance": resonances(truth, starters)}


def matcher_quality(run: Run, truth: Truth, users: list[str]) -> dict[str, float]:
    """Precision and recall of `match` against hidden subjects, all cuts of these users."""
    revisits, understand = Revisits(run), truth.taxonomy.understand  # text -> topic, subjects, ...
    counts: Counter = Counter()  # of (label of the matcher, hidden truth)
    for user, cut in ((user, cut) for user in users for cut in revisits.cuts):
        later = [understand(session.summary) for session in run.parts(user, cut)[1]]
        for text, label in zip(run.histories[user][cut].texts, revisits[user, cut], strict=True):
            topic, subjects, _ = understand(text)
            # As RID means it: the same specific subject comes up again, not its topic alone.
            real = any(topic == other and subjects & theirs for other, theirs, _ in later)
            real = real and not truth.taxonomy.functional(topic)  # a chore is no interest
            if label >= 0:  # else the matcher's call failed
                counts[bool(label), real] += 1
    right = counts[True, True]
    return {"precision": right / max(1, right + counts[True, False]),
            "recall": right / max(1, right + counts[False, True])}


def classifier_accuracy(truth: Truth, classifier: TopicClassifier, texts: list[str]) -> float:
    """Share of the texts about something known to whose topic the classifier gives its category."""
    # Each text once; what is about nothing known has no category to be wrong about.
    categories = {text: category for text in texts if (category := truth.category(text))}
    guesses = classifier.categories([*categories])
    return float(np.mean([a == b for a, b in zip(guesses, categories.values(), strict=True)]))
