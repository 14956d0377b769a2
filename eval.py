"""Judge lists of starters: utility by a held-out ranker, diversity, and the hidden truth beside it.

    python eval.py --config configs/tiny.yaml          # the same as train.py --stage eval
    python eval.py --reproduce all --seeds 3           # every table of the paper (reproduce.py)

Metrics follow appendix B.1 of the paper. Unstated there, chosen here: which keywords count as
high-weight (TF-IDF at or above the median, in a corpus that no method has written), and that
diversity is counted per list.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import yaml

from config import ROOT, UserError, atomic_path, load_config, progress, script, write_json
from icebreaker import list_diversity
from pipeline import Pipeline, utilities

ORDER = ("PE", "PE+RID", "SFT", "SFT+DPO", "IceBreaker")
PAPER = {
    "PE": ("–", "–", "29.03", "6.11"),
    "PE+RID": ("+0.69", "+0.32", "24.12", "4.99"),
    "SFT": ("+0.73", "+0.39", "26.46", "5.17"),
    "SFT+DPO": ("+0.75", "+0.42", "13.75", "2.64"),
    "IceBreaker": ("+0.82", "+0.74", "27.74", "5.01"),
}
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


def user_lifts(
    scores: dict[str, float], baseline: dict[str, float]
) -> dict[str, dict[str, float]]:
    """"r_user" and "r_score" of each user, of which the means over users are Eq. (9), the share of
    users above the baseline (a tie counts half), and Eq. (10), the mean lift over it."""
    gaps = {u: s - baseline[u] for u, s in scores.items()}
    wins = {u: (x > 0) + 0.5 * (x == 0) for u, x in gaps.items()}
    return {"r_user": wins, "r_score": gaps}


def bootstrap_interval(values, n: int, seed: int) -> tuple[float, float]:
    """95 % percentile interval of the mean over users; values are per user (paired differences)."""
    values = np.asarray(values, float)
    draws = np.random.default_rng(seed).integers(len(values), size=(n, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(low), float(high)


def keywords(text: str) -> list[str]:
    """Lower-case words without stop words; Chinese text as pairs of characters."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    words = re.findall(r"[a-z0-9][a-z0-9'-]+", text.lower())
    chinese = "".join(re.findall(r"[㐀-鿿]+", text))
    return [w for w in words if w not in ENGLISH_STOP_WORDS] + [
        chinese[i : i + 2] for i in range(len(chinese) - 1)
    ]


class KeywordCounter:
    """Distinct high-TF-IDF keywords of a list. The weights are those of a fixed corpus.

    Never the compared lists: words would lose weight by how many methods use them, and a method by
    how many of its variants it is compared with. Words that are not in the corpus do not count.
    Texts are short, so weights stay as they are: scaled to length 1 they would tell how many words
    a starter has.
    """

    def __init__(self, corpus: list[str]):
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectoriser = None  # of a corpus without keywords
        if any(map(keywords, corpus)):
            self.vectoriser = TfidfVectorizer(analyzer=keywords, norm=None).fit(corpus)
            self.threshold = float(np.median(self.vectoriser.transform(corpus).data))

    def __call__(self, starters: list[str]) -> int:
        if not starters or not self.vectoriser:
            return 0
        matrix = self.vectoriser.transform(starters)
        return len(set(matrix.indices[matrix.data >= self.threshold]))


class TopicClassifier:
    """Broad category of a text: logistic regression on sentence embeddings of the taxonomy's names.

    `accuracy` is measured on a fifth of the names, left out of the fit.
    """

    def __init__(self, encode: Callable, path: Path = ROOT / "configs" / "taxonomy.yaml"):
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split

        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["categories"]
        pairs = [
            (str(name), category)
            for category, topics in tree.items()
            for entry in topics.values()
            for name in entry["subjects"]
        ]
        forms = ("{}", "What about {}?", "Tell me more about {}")
        vectors = encode([forms[i % 3].format(name) for i, (name, _) in enumerate(pairs)]).numpy()
        fit, held, fit_labels, held_labels = train_test_split(
            vectors, [category for _, category in pairs], test_size=0.2, random_state=0
        )
        self.encode = encode
        self.model = LogisticRegression(max_iter=500).fit(fit, fit_labels)
        self.accuracy = float(self.model.score(held, held_labels))

    def categories(self, texts: list[str]) -> list[str]:
        return self.model.predict(np.asarray(self.encode(texts))).tolist() if texts else []


Lists = dict[str, dict[str, list[list[str]]]]  # method -> user -> lists of starters
PerUser = dict[str, dict[str, dict[str, float]]]  # method -> metric -> user -> value


def measure(
    lists: Lists,
    score: Callable | None,
    encode: Callable,
    classifier: TopicClassifier,
    corpus: list[str],
    truth=None,
    train_score: Callable | None = None,
) -> PerUser:
    """Every metric of every method and user: means over the user's lists; an empty list counts 0.

    corpus: texts that give keywords their weights, such as Pipeline.corpus; score(user, starters)
    -> utilities (K,) of the held-out ranker, None without logs; train_score the same of the
    training ranker; truth has expected_clicks(user, starters).
    """
    count = KeywordCounter(corpus)

    def dissimilarity(_, x):
        vectors = encode(x)
        return float(list_diversity(vectors @ vectors.T)) if len(x) > 1 else 0.0

    metrics = {
        "lexical": lambda _, x: count(x),
        "words": lambda _, x: len({word for y in x for word in keywords(y)}),
        "semantic": lambda _, x: len(set(classifier.categories(x))),
        "dissimilarity": dissimilarity,
        "starters": lambda _, x: len(x),
        "empty": lambda _, x: float(not x),
    }
    if score:
        metrics["utility"] = lambda u, x: float(np.mean(score(u, x))) if x else 0.0
    if train_score:
        metrics["train_utility"] = lambda u, x: float(np.mean(train_score(u, x))) if x else 0.0
    if truth:
        metrics["true_clicks"] = lambda u, x: truth.expected_clicks(u, x) if x else 0.0
    return {
        method: {
            name: {u: float(np.mean([f(u, x) for x in own])) for u, own in rows.items()}
            for name, f in metrics.items()
        }
        for method, rows in lists.items()
    }


def evaluate(
    lists: Lists,
    score: Callable | None,
    encode: Callable,
    corpus: list[str],
    *,
    truth=None,
    train_score: Callable | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    baseline: str = "PE",
    classifier: TopicClassifier | None = None,
) -> dict:
    """What `measure` gives as means over users, with the lifts over the baseline.

    Raises ValueError if the methods do not cover the same users.
    """
    users = list(lists[baseline])
    if any(set(rows) != set(users) for rows in lists.values()) or not users:
        raise ValueError("evaluate: every method needs lists for the same users, at least one")
    classifier = classifier or TopicClassifier(encode)
    per_user = measure(lists, score, encode, classifier, corpus, truth, train_score)
    result = {}
    for method, values in per_user.items():
        figures = {name: float(np.mean(list(v.values()))) for name, v in values.items()}
        for name in ("lexical", "true_clicks"):
            if name in values:
                figures[f"{name}_interval"] = bootstrap_interval(
                    list(values[name].values()), bootstrap, seed
                )
        if score and method != baseline:
            own = user_lifts(values["utility"], per_user[baseline]["utility"])
            figures |= {name: float(np.mean([*x.values()])) for name, x in own.items()}
            lifts = [own["r_score"][u] for u in users]
            figures["r_score_interval"] = bootstrap_interval(lifts, bootstrap, seed)
            if train_score:
                trained = user_lifts(values["train_utility"], per_user[baseline]["train_utility"])
                figures["train_r_score"] = float(np.mean([*trained["r_score"].values()]))
        result[method] = figures
    return {
        "methods": result,
        "users": len(users),
        "lists_per_user": len(lists[baseline][users[0]]),
        "classifier_accuracy": classifier.accuracy,
        "baseline": baseline,
    }


# ----------------------------------------------------------------------------------------- report


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


def _header(columns) -> str:
    titles = " | ".join(title for title, _, _ in columns)
    return f"| Method | {titles} |\n" + "|---" * (len(columns) + 1) + "|"


def _cell(figures: dict, name: str, form: str) -> str:
    if name not in figures:
        return "–"
    text = format(figures[name], form)
    if f"{name}_interval" in figures:
        low, high = figures[f"{name}_interval"]
        text += f" [{low:{form}}, {high:{form}}]"
    return text


def table_markdown(result: dict) -> str:
    """Table 1 as measured, what its columns mean, and the paper's figures."""
    rows = result["methods"]
    columns = [c for c in COLUMNS if any(c[1] in figures for figures in rows.values())]
    lines = [
        f"{result['users']} test users, {result['lists_per_user']} lists each, topic classifier "
        f"accuracy {result['classifier_accuracy']:.2f}",
        "",
        _header(columns),
    ]
    for method in [m for m in ORDER if m in rows] + [m for m in rows if m not in ORDER]:
        cells = [_cell(rows[method], name, form) for _, name, form in columns]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += [
        "",
        LEGEND,
        "",
        "Brackets: 95 % bootstrap over users.",
        "",
        "The paper's Table 1 (Qwen2.5-7B, its own platform and ranker):",
        "",
        "| Method | R-User | R-Score | Lexical | Semantic |",
        "|---|---|---|---|---|",
    ]
    return "\n".join(lines + [f"| {m} | " + " | ".join(PAPER[m]) + " |" for m in ORDER]) + "\n"


def plot_frontier(result: dict, path: str | Path) -> None:
    """Utility against lexical diversity, one named point a method with 95 % bars."""
    from tables import figures

    points = {
        method: {
            "x": row.get("r_score", 0.0), "x_interval": row.get("r_score_interval"),
            "y": row["lexical"], "y_interval": row["lexical_interval"],
        }
        for method, row in result["methods"].items()
    }  # fmt: skip
    figures.frontier(points, path, xlabel="utility: R-Score against PE (held-out ranker)",
                     ylabel="distinct keywords per list")  # fmt: skip


def escape(text: str) -> str:
    """User text as markdown that shows it and does nothing else."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|~])", r"\\\1", plain)


def examples_page(rows: list[dict], summaries: dict[str, list[str]], scores: dict) -> str:
    """Summaries, trigger interests and each method's starters of some users, as markdown.

    rows: of starters.jsonl; summaries: user -> texts, latest first; scores: user -> of interests.
    """
    lines = ["# Examples", "", "Users drawn at random; the first list of each method."]
    for row in rows:
        user = row["user_id"]
        latest = "; ".join(escape(text) for text in summaries[user][:12])
        lines += ["", f"## {escape(user)}", "", f"Latest summaries: {latest}", ""]
        lines += ["Trigger interests:", ""]
        lines += [
            f"- {escape(text)} ({score:.2f})"
            for text, score in zip(row["interests"], scores[user], strict=True)
        ]
        for method, lists in row["starters"].items():
            lines += ["", f"**{escape(method)}**", ""]
            lines += [f"1. {escape(starter)}" for starter in lists[0]] or ["(none left)"]
    return "\n".join(lines) + "\n"


def write_report(
    result: dict, rows: list[dict], summaries: dict, scores: dict, folder: Path
) -> None:
    """table.md, table.json, examples.md and, where there is a utility, utility_diversity.png."""
    write_json(folder / "table.json", result)
    for name, text in (
        ("table.md", table_markdown(result)),
        ("examples.md", examples_page(rows, summaries, scores)),
    ):
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if any("utility" in row for row in result["methods"].values()):
        plot_frontier(result, folder / "utility_diversity.png")


# ------------------------------------------------------------------------------------ the stage


def methods(p: Pipeline) -> dict[str, tuple[Path | None, bool]]:
    """Method -> (adapter, whether it is given the distilled interests)."""
    table = {"PE": (None, False), "PE+RID": (None, True), "SFT": (p.run / "sit" / "adapter", True)}
    if p.impressions:
        if p.config.dpo.vanilla and "skipped" not in p.run.figures("dpo/vanilla"):
            table["SFT+DPO"] = (p.run / "dpo" / "vanilla" / "adapter", True)
        table["IceBreaker"] = (p.run / "dpo" / f"round{p.config.dpo.rounds}" / "adapter", True)
    return table


def stage_eval(p: Pipeline) -> dict:
    """Let every method write for the test users; judge the lists; write the report."""
    settings = p.config.eval
    states = {u: p.states[u][-1] for u in p.ids("test") if p.states[u][-1].interests}
    if not states:
        raise UserError("eval: no test user has a history; more users are needed")
    whole = {u: p.histories[u][-1].texts[::-1] for u in states}  # latest first
    lists: dict[str, dict[str, list[list[str]]]] = {}
    for method, (adapter, distilled) in progress(methods(p).items(), "write starters"):
        inputs = [s.interests if distilled else whole[u] for u, s in states.items()]
        sampled = p.write_lists(adapter, inputs, settings.lists, p.seed("eval"))
        lists[method] = dict(zip(states, sampled, strict=True))
    rows = [
        {"user_id": u, "interests": s.interests, "starters": {m: lists[m][u] for m in lists}}
        for u, s in states.items()
    ]
    with atomic_path(p.run / "eval" / "starters.jsonl") as temporary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        temporary.write_text(text, encoding="utf-8")
    p.encoder(sorted({y for m in lists.values() for u in m.values() for x in u for y in x}))

    def scorer(name: str) -> Callable | None:
        if not p.impressions:
            return None
        ranker = p.ranker(name)
        return lambda u, starters: utilities(ranker, states[u], p.encoder(starters)).numpy()

    truth = None
    if not p.config.data.users:  # only here, after training, is the world's hidden state opened
        from world import people

        truth = people.load_truth(p.run / "world")
    result = evaluate(
        lists, scorer("judge"), p.encoder, p.corpus, truth=truth, train_score=scorer("train"),
        bootstrap=settings.bootstrap, seed=p.config.run.seed,
    )
    shown = random.Random(p.seed("examples")).sample(rows, min(len(rows), settings.examples))
    scores = {u: s.scores for u, s in states.items()}
    write_report(result, shown, whole, scores, p.run / "eval")
    return {"test_users": len(states), "starters": str(p.run / "eval" / "starters.jsonl")}


def main() -> None:
    import train

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=str(ROOT / "configs" / "tiny.yaml"))
    parser.add_argument("--reproduce", nargs="+", metavar="TABLE", help="1 2 3 6 7 8 9 figure3 "
                        "serving beyond beta, or all")  # fmt: skip
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, ... of --reproduce: three; one "
                        "with --quick")  # fmt: skip
    parser.add_argument("--first-seed", type=int, default=0, help="100 and above: to choose "
                        "settings on; the report goes to runs/partial")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="--reproduce small, in minutes")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.reproduce:
        from tables import reproduce

        words = [x for x in arguments.reproduce if "=" in x] + arguments.settings
        tables = [x for x in arguments.reproduce if "=" not in x]
        seeds = arguments.seeds or (1 if arguments.quick else 3)
        reproduce.reproduce(
            tables, seeds, arguments.config, words, arguments.quick, arguments.first_seed
        )
        return
    train.run_stages(load_config(arguments.config, arguments.settings), ["eval"])


if __name__ == "__main__":
    script(main)
