"""The paper's metrics (appendix B.1) and one interval for all of them.

Unstated in the paper, chosen here: which keywords count as high-weight (TF-IDF at or above the
median, in a corpus that no method has written), and that diversity is counted per list.

Legend: U users, K starters of a list.
"""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import yaml
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from files import ROOT
from icebreaker import list_diversity

Lists = dict[str, dict[str, list[list[str]]]]  # method -> user -> lists of starters
PerUser = dict[str, dict[str, dict[str, float]]]  # method -> metric -> user -> value

COLUMNS = [  # title, name in the figures, format
    ("R-User", "r_user", ".2f"),
    ("R-Score", "r_score", "+.4f"),
    ("Train R-Score", "train_r_score", "+.4f"),
    ("True clicks", "true_clicks", ".3f"),
    ("Lexical", "lexical", ".2f"),
    ("Words", "words", ".2f"),
    ("Semantic", "semantic", ".2f"),
    ("Dissimilarity", "dissimilarity", ".3f"),
    ("Starters", "starters", ".2f"),
]
LEGEND = """\
- **R-User**: share of users whose mean ranker score is above that of the base, which is PE unless a
  table says otherwise (ties count half: 0.5 is no better than the base), Eq. (9).
- **R-Score**: mean lift in ranker score over the base, absolute, Eq. (10). The ranker gives values
  in (0, 1) and was fitted on other users than those that trained the generator and those judged
  here. It reads the trigger interests: it gives points for being near RID's choice.
- **Train R-Score**: the same by the ranker that trained the generator; a gain that shows only here
  is reward hacking.
- **True clicks**: expected taps per shown list by the simulated world's hidden click model.
- **Lexical**: distinct high-TF-IDF keywords per list; the weights are those of session summaries
  and of starters shown in the log, and a word that neither has (a garbled name) does not count
  (random, retrieved and popular starters come from the log, so that all their words can count).
  **Words**: distinct words per list, whatever their weight, but no stop words. **Semantic**:
  distinct topic categories per list by a trained classifier. **Dissimilarity**: mean pairwise
  1 - cosine within a list.
- **Starters**: mean number left of a list after the filters."""


@functools.cache
def paper_figures() -> dict[str, dict[str, list[str]]]:
    """The figures of the paper's tables, as printed there: "table1" -> method -> cells."""
    return yaml.safe_load((ROOT / "configs" / "paper.yaml").read_text(encoding="utf-8"))


def bootstrap(
    rows: Sequence[np.ndarray], draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean of the seeds' means, low, high) of a 95 % percentile interval.

    rows: values of the users (U,) of each seed, paired differences as a rule; users are drawn again
    within each seed.
    """
    rng = np.random.default_rng(seed)  # the same draws whatever is compared: pairs stay pairs
    rows = [np.asarray(row, float) for row in rows]
    means = [row[rng.integers(len(row), size=(draws, len(row)))].mean(1) for row in rows]
    low, high = np.quantile(np.mean(means, axis=0), [0.025, 0.975])  # of (draws,) means
    return float(np.mean([row.mean() for row in rows])), float(low), float(high)


def user_lifts(
    scores: dict[str, float], baseline: dict[str, float]
) -> dict[str, dict[str, float]]:
    """"r_user" and "r_score" of each user, of which the means over users are Eq. (9), the share of
    users above the baseline (a tie counts half), and Eq. (10), the mean lift over it."""
    # Paired by user: what makes a user easy to please is in both.
    gaps = {user: score - baseline[user] for user, score in scores.items()}
    wins = {user: (gap > 0) + 0.5 * (gap == 0) for user, gap in gaps.items()}
    return {"r_user": wins, "r_score": gaps}


# ---------------------------------------------------------------------------------------- diversity


def keywords(text: str) -> list[str]:
    """Lower-case words without stop words; Chinese text as pairs of characters."""
    # Two characters at least: a lone letter is no keyword.
    words = re.findall(r"[a-z0-9][a-z0-9'-]+", text.lower())
    # Chinese has no spaces: pairs of characters are close to its words.
    chinese = "".join(re.findall(r"[㐀-鿿]+", text))
    return [w for w in words if w not in ENGLISH_STOP_WORDS] + [
        chinese[i : i + 2] for i in range(len(chinese) - 1)
    ]


class KeywordCounter:
    """Distinct high-TF-IDF keywords of a list. The weights are those of a fixed corpus.

    Never the compared lists: words would lose weight by how many methods use them, and a method by
    how many of its variants it is compared with. Words that are not in the corpus do not count.
    """

    def __init__(self, corpus: list[str]):
        self.vectoriser = None  # of a corpus without keywords
        if any(map(keywords, corpus)):
            # Texts are short: weights scaled to length 1 would tell how many words a starter has.
            self.vectoriser = TfidfVectorizer(analyzer=keywords, norm=None).fit(corpus)
            self.threshold = float(np.median(self.vectoriser.transform(corpus).data))

    def __call__(self, starters: list[str]) -> int:
        if not starters or not self.vectoriser:
            return 0  # scikit-learn refuses an empty list
        # Distinct over the whole list: a word in two starters is one keyword.
        matrix = self.vectoriser.transform(starters)  # (K, vocabulary)
        return len(set(matrix.indices[matrix.data >= self.threshold]))


class TopicClassifier:
    """Broad category of a text: logistic regression on sentence embeddings of the taxonomy's names.

    `accuracy` is measured on a fifth of the names, left out of the fit.
    """

    def __init__(self, encode: Callable, path: Path = ROOT / "world" / "taxonomy.yaml"):
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["categories"]
        # Names of subjects alone: no text of the simulated platform is learned from.
        pairs = [
            (str(name), category)
            for category, topics in tree.items()
            for entry in topics.values()
            for name in entry["subjects"]
        ]
        forms = ("{}", "What about {}?", "Tell me more about {}")  # as summaries and starters are
        vectors = encode([forms[i % 3].format(name) for i, (name, _) in enumerate(pairs)]).numpy()
        # One split, whatever the run's seed: the classifier is the same ruler for all.
        fit, held, fit_labels, held_labels = train_test_split(
            vectors, [category for _, category in pairs], test_size=0.2, random_state=0
        )
        self.encode = encode
        # On 384 dimensions and some hundred names a linear model is as good as any.
        self.model = LogisticRegression(max_iter=500).fit(fit, fit_labels)
        self.accuracy = float(self.model.score(held, held_labels))

    def categories(self, texts: list[str]) -> list[str]:
        return self.model.predict(np.asarray(self.encode(texts))).tolist() if texts else []


# --------------------------------------------------------------------------------- all of a method


def measure(
    lists: Lists, score: Callable | None, encode: Callable, classifier: TopicClassifier,
    corpus: list[str], truth=None, train_score: Callable | None = None,
) -> PerUser:
    """Every metric of every method and user: means over the user's lists; an empty list counts 0.

    corpus: texts that give keywords their weights, such as Run.corpus; score(user, starters)
    -> utilities (K,) of the held-out ranker, None without logs; train_score the same of the
    training ranker; truth has expected_clicks(user, starters).
    """
    count = KeywordCounter(corpus)

    def dissimilarity(_, starters):
        vectors = encode(starters)  # (K, D), unit rows
        return float(list_diversity(vectors @ vectors.T)) if len(starters) > 1 else 0.0

    metrics = {  # name -> f(user, starters of one list)
        "lexical": lambda _, starters: count(starters),
        "words": lambda _, starters: len({w for y in starters for w in keywords(y)}),
        "semantic": lambda _, starters: len(set(classifier.categories(starters))),
        "dissimilarity": dissimilarity,
        "starters": lambda _, starters: len(starters),
        "empty": lambda _, starters: float(not starters),  # a share, once averaged
    }
    if score:  # without logs of taps there is no ranker
        metrics["utility"] = lambda u, y: float(np.mean(score(u, y))) if y else 0.0
    if train_score:
        metrics["train_utility"] = lambda u, y: float(np.mean(train_score(u, y))) if y else 0.0
    if truth:  # only of the simulated platform
        metrics["true_clicks"] = lambda u, y: truth.expected_clicks(u, y) if y else 0.0
    return {
        method: {
            name: {u: float(np.mean([metric(u, y) for y in rows])) for u, rows in users.items()}
            for name, metric in metrics.items()
        }
        for method, users in lists.items()
    }


def escape(text: str) -> str:
    """User text as markdown that shows it and does nothing else."""
    # HTML first: what markdown lets through would be read by a browser.
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~])", r"\\\1", plain)
