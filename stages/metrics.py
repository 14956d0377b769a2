"""The paper's metrics (appendix B.1) and one interval for all of them.

Unstated in the paper, chosen here: which keywords count as high-weight (TF-IDF at or above the
median, in a corpus that no method has written), and that diversity is counted per list.

Legend: U users, K starters of a list.
"""

import html
import re
from collections.abc import Callable, Iterable
from itertools import product

import numpy as np
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from files import read_yaml
from icebreaker import list_diversity
from roles.text import grounded, names_subject

Lists = dict[str, dict[str, list[list[str]]]]  # method -> user -> lists of starters
PerUser = dict[str, dict[str, dict[str, float]]]  # method -> metric -> user -> value

RANKERS = {"utility": "judge", "train_utility": "train"}  # metric: score of a slot by this ranker
# Metrics over a base -> what of both is compared.
LIFTS = {"r_user": "utility", "r_score": "utility", "train_r_score": "train_utility"}
# Metrics of which the wrong-user control is taken.
PERSONAL = ("true_clicks", "cascade_clicks", "utility")
OTHERS = 3  # users to whom it shows a list


def bootstrap(rows: Iterable, draws: int = 2000, seed: int = 0,
              hierarchical: bool = False) -> tuple[float, float, float]:
    """(mean of the seeds' means, low, high) of a 95 % percentile interval.

    rows: values of the users (U,) of each seed, paired differences as a rule; users are drawn again
    within each seed. hierarchical: seeds first, then users of each seed drawn.
    """
    rng = np.random.default_rng(seed)  # the same draws whatever is compared: pairs stay pairs
    rows = [np.asarray(row, float) for row in rows]

    def means() -> np.ndarray:  # (S, draws), of users drawn again
        return np.array([row[rng.integers(len(row), size=(draws, len(row)))].mean(1)
                         for row in rows])

    drawn = seeds_again(means, rng) if hierarchical else means().mean(0)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(np.mean([row.mean() for row in rows])), float(low), float(high)


def seeds_again(draw: Callable[[], np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """(draws,) means over as many seeds, drawn again, of what `draw` returns: (S, draws) with users
    drawn again."""
    parts = []
    for _ in range(len(first := draw())):  # other users each time that a seed is drawn
        drawn = draw() if parts else first
        n, draws = drawn.shape
        parts.append(drawn[rng.integers(n, size=draws), np.arange(draws)])
    return np.mean(parts, 0)


def user_values(values: PerUser, method: str, metric: str, base: str = "PE") -> dict[str, float]:
    """User -> value of a metric. Of LIFTS it is over `base`: r_user counts a user above it as 1 and
    a tie as half, of which Eq. (9) is the mean; r_score, whose mean is Eq. (10), how far above."""
    if metric not in LIFTS:
        return values[method][metric]
    scores, baseline = (values[name][LIFTS[metric]] for name in (method, base))
    # Paired by user: what makes a user easy to please is in both.
    gaps = {user: score - baseline[user] for user, score in scores.items()}
    if metric != "r_user":
        return gaps
    return {user: (gap > 0) + 0.5 * (gap == 0) for user, gap in gaps.items()}


def other_users(users: Iterable[str], n: int = OTHERS) -> dict[str, list[str]]:
    """User -> the n next ones in the order of ids, as on a ring; fewer where there are no more.

    By this rule each is the other of n users: who is easy to please adds as much to `others` as to
    `own`, and cancels in the mean of the difference.
    """
    ring = sorted(users)
    n = min(n, len(ring) - 1)
    return {user: [ring[(i + j) % len(ring)] for j in range(1, n + 1)]
            for i, user in enumerate(ring)}


# ----------------------------------------------------------------------------- of scorer and ranker


def per_user_auc(scores, labels) -> float:
    """Probability that a revisited summary (n,) outranks another one; ties count half."""
    scores, labels = np.asarray(scores), np.asarray(labels, bool)
    if labels.all() or not labels.any():
        return float("nan")  # no pair to rank
    return float(roc_auc_score(labels, scores))


def slot_controlled_auc(scores, clicked, slots) -> float:
    """AUC of clicks with each pair taken within one slot, so that position explains nothing."""
    scores, clicked, slots = np.asarray(scores), np.asarray(clicked, bool), np.asarray(slots)
    total = pairs = 0.0
    for slot in np.unique(slots):
        inside = slots == slot
        weight = clicked[inside].sum() * (~clicked[inside]).sum()
        if weight:
            total += weight * per_user_auc(scores[inside], clicked[inside])
            pairs += weight
    return float(total / pairs) if pairs else float("nan")


def expected_calibration_error(probabilities, targets, bins: int = 10) -> float:
    """Mean gap between predicted and observed rate over equal-count bins."""
    probabilities, targets = np.asarray(probabilities, float), np.asarray(targets, float)
    order = np.array_split(np.argsort(probabilities, kind="stable"), bins)
    return float(
        sum(len(i) * abs(probabilities[i].mean() - targets[i].mean()) for i in order if len(i))
        / len(probabilities))


# ---------------------------------------------------------------------------------------- diversity


def keywords(text: str) -> list[str]:
    """Lower-case words without stop words; Chinese text as pairs of characters."""
    # Two characters at least: a lone letter is no keyword.
    words = re.findall(r"[a-z0-9][a-z0-9'-]+", text.lower())
    # Chinese has no spaces: pairs of characters are close to its words.
    chinese = "".join(re.findall(r"[㐀-鿿]+", text))
    pairs = [chinese[i : i + 2] for i in range(len(chinese) - 1)]
    return [w for w in words if w not in ENGLISH_STOP_WORDS] + pairs


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

    def __init__(self, encode: Callable):
        tree = read_yaml("world/taxonomy.yaml")["categories"]
        # Names of subjects alone: no text of the simulated platform is learned from.
        names, labels = zip(*[(name, category) for category, topics in tree.items()
                              for topic in topics.values() for name in topic["subjects"]],
                            strict=True)
        forms = ("{}", "What about {}?", "Tell me more about {}")  # as summaries and starters are
        vectors = encode([forms[i % 3].format(name) for i, name in enumerate(names)]).numpy()
        # One split, whatever the run's seed: the classifier is the same ruler for all.
        fit, held, fit_labels, held_labels = train_test_split(
            vectors, labels, test_size=0.2, random_state=0)
        self.encode = encode
        # On 384 dimensions and some hundred names a linear model is as good as any.
        self.model = LogisticRegression(max_iter=500).fit(fit, fit_labels)
        self.accuracy = float(self.model.score(held, held_labels))

    def categories(self, texts: list[str]) -> list[str]:
        return self.model.predict(np.asarray(self.encode(texts))).tolist() if texts else []


# --------------------------------------------------------------------------------- all of a method


def measure(lists: Lists, rankers: dict[str, Callable], encode: Callable,
            classifier: TopicClassifier, corpus: list[str], histories: dict[str, list[str]], k: int,
            truth=None) -> PerUser:
    """Every metric of every method and user: means over the user's lists; an empty list counts 0.

    The wrong-user control of PERSONAL: others_true_clicks is what the user's lists are worth to
    other_users, personal_true_clicks how much more they are to the user; where there are two users.
    rankers: those of RANKERS that there are, (user, starters) -> utilities (K,); corpus: texts that
    give keywords their weights; histories: user -> all summaries; k: K of a full list; truth, of a
    simulated world, has expected_clicks and cascade_clicks(user, starters).
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
        "full": lambda _, starters: float(len(starters) >= k)}
    for name, is_about in {"named": names_subject, "grounded": grounded}.items():
        # A share of the starters that are left: of none it is 0.
        metrics[name] = lambda u, ys, is_about=is_about: (
            sum(is_about(y, histories[u]) for y in ys) / max(1, len(ys)))
    for name, score in rankers.items():  # none without logs of taps
        # Over K slots, of which an empty one is worth nothing: what says less is worth less.
        metrics[name] = lambda u, y, score=score: float(sum(score(u, y))) / k if y else 0.0
    if truth:  # only of the simulated platform
        metrics |= {"true_clicks": truth.expected_clicks, "cascade_clicks": truth.cascade_clicks}
    values = {method: {name: {u: float(np.mean([metric(u, y) for y in rows]))
                              for u, rows in users.items()}
                       for name, metric in metrics.items()}
              for method, users in lists.items()}
    strangers = other_users({user for users in lists.values() for user in users})
    for method, name in product(lists, PERSONAL if len(strangers) > 1 else ()):
        if score := metrics.get(name):
            own, others = values[method][name], {
                u: float(np.mean([score(v, y) for y in rows for v in strangers[u]]))
                for u, rows in lists[method].items()}
            values[method][f"others_{name}"] = others
            values[method][f"personal_{name}"] = {u: own[u] - others[u] for u in others}
    return values


# ------------------------------------------------------------------------------------------- pages


def escape(text: str) -> str:
    """User text as markdown that shows it and does nothing else."""
    # HTML first: what markdown lets through would be read by a browser.
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~])", r"\\\1", plain)


def markdown_table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|---" * len([*head]) + "|")  # Markdown wants it below the head
    return "\n".join(lines) + "\n"
