"""What policies and reward models of one seed are worth: all values of paper 003's tables.

    report/answers.json of each run      what its policies answer (write_answers)
    report/values.json of a main run     all that garm.py reads (measure_seed)

Sections 4.1 to 4.3 of the paper and appendix I, on what the simulated world hides. The unit of
every value is a context: intervals draw contexts again.

Departures: pairs under policy shift are not sampled but weighed by how often 100 people would click
so; confidence is binned by quarters of all pairs, not by fixed limits.

Legend: B contexts, K suggestions of a list, P pairs of a context.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

import garm
import llm
import train
from config import Config
from files import digest, read_json, write_json
from roles.players import Players, players_of
from roles.suggester import Suggester, read_kindly
from run import Run
from stages import garm_eval
from stages.dialogues import Context, read_contexts
from stages.reward import RewardModel, load_reward, pairs_of
from tables import experiments
from tables.experiments import MAIN
from tables.measure import keep_values, report_folder
from world import dialogues
from world.dialogue_clicks import Truth, texts_of

Values = dict[str, dict[str, dict[str, float]]]  # method -> metric -> context -> value
Counts = dict[str, dict[str, dict[str, float]]]  # method -> context -> category -> number
Answers = dict[str, dict[str, list[str]]]  # method -> context -> answers as they were written
PEOPLE = 100  # who are shown a list, where pairs are expected ones
SIZE = 4  # contexts that a model reads together
BINS = 10  # of p, for the calibration error


@dataclass(frozen=True)
class Shown:
    """Suggestions of a context, and how often each pair (preferred, rejected) of places came."""

    context: Context
    texts: list[str]
    pairs: dict[tuple[int, int], float]

    @property
    def name(self) -> str:
        return self.context.dialogue.dialogue_id


def variants() -> dict[str, dict]:
    """Further trainings of a seed; garm.yaml says what the fields are."""
    return experiments.read("garm")["variants"]


def named(kind: str) -> str:
    """A kind of reward model as in Table 2."""
    return experiments.read("garm")["reward_models"][kind]


# ------------------------------------------------------------------------------------------ answers


def train_run(config: Config, variant: str) -> None:
    """Train a seed's run, and let its policies answer."""
    train.run_stages(config, [variants()[variant]["stage"] if variant else "rl"])
    write_answers(config, variant)


def write_answers(config: Config, variant: str) -> None:
    """report/answers.json of a run: answers of its policies, and RFT's for contexts of W4."""
    run, path, changed = Run(config), report_folder(config) / "answers.json", variants()
    stage = changed[variant]["stage"] if variant else "rl"
    key = digest(train.stage_key(run, stage), config.eval)
    if path.is_file() and read_json(path, key=str)["key"] == key:  # by the same policies, as many
        return
    policies = garm_eval.policies(run)
    if variant:
        adapter = changed[variant].get("adapter")
        policies = {variant: run.adapter(adapter)} if adapter else {}
    suggester, contexts = Suggester(players_of(run).writer), garm_eval.held_out(run)

    def by_id(some: list[Context], answers: list[list[str]]) -> dict[str, list[str]]:
        return {c.dialogue.dialogue_id: rows for c, rows in zip(some, answers, strict=True)}

    written = garm_eval.write_answers(run, suggester, contexts, config.eval.lists, policies)
    answers, shifted = {name: by_id(contexts, rows) for name, rows in written.items()}, {}
    if variant == MAIN and "rft" in config.rl.arms:
        later = [row.context for row in logged_pairs(run)["W4"]]
        turns = [c.turns for c in later]
        shifted = by_id(later, suggester.write(run.adapter("rft"), turns, 1, run.seed("shift")))
    write_json(path, {"key": key, "variant": variant, "answers": answers, "shifted": shifted})


def shown(answer: str) -> list[str]:
    """What of an answer a product would show: at most three suggestions, in whatever list."""
    return read_kindly(answer)[: garm.NUM_SUGGESTIONS]


def measure_seed(config: Config, others: list[Config]) -> None:
    """report/values.json of a seed's main run; others: of its variants."""
    llm.settle_libraries()
    written = [read_json(report_folder(c) / "answers.json") for c in (config, *others)]
    runs = {one["variant"]: Run(c, describe=False)
            for one, c in zip(written, (config, *others), strict=True)}
    keep_values(config, written, partial(seed_values, runs, written))


def seed_values(runs: dict[str, Run], written: list[dict]) -> dict:
    """What values.json holds but its key: "values", "pairs" and "calibration"."""
    run, players = runs[MAIN], players_of(runs[MAIN])
    suggester = Suggester(players.writer)
    # The one place where the hidden state meets what was trained.
    truth = dialogues.load_truth(run.folder / "world", run.encoder)
    contexts = garm_eval.held_out(run)
    answers = {name: rows for one in written for name, rows in one["answers"].items()}
    values = answer_values(players, truth, contexts, answers)
    # One base: reward models and reference swap their LoRA weights.
    model = suggester.policy(run.adapter("sft"))
    sets = logged_pairs(run)
    sets["W4-RFT"] = shifted_pairs(truth, sets["W4"], written[0]["shifted"])
    result = {"values": values, "pairs": {}, "calibration": {}}
    for name, reward in reward_models(runs, suggester, model):
        scored = {part: scores_of(reward, rows) for part, rows in sets.items()}
        for part, rows in scored.items():
            add_scores(result, f"{name}, {part}", sets[part], rows)
        if name == named("gaussian"):
            result["pairs"] |= by_confidence(sets, scored)
            add_rewards(values, reward, contexts, answers)
            values |= phrasing_values(run, truth, reward, sets["W4"])
    add_log_perplexity(values, suggester, model, contexts, answers)
    run.encoder.save()
    return result


# ------------------------------------------------------------------------------ what is suggested


def answer_values(players: Players, truth: Truth, contexts: Sequence[Context],
                  answers: Answers) -> Values:
    """Form, safety, hidden usefulness, simulated clicks and the judge's word against PE."""
    safe = {c.dialogue.dialogue_id: c for c in contexts if not c.unsafe}
    unsafe = [c.dialogue.dialogue_id for c in contexts if c.unsafe]
    lists = {name: {c: [*map(shown, rows[c])] for c in safe} for name, rows in answers.items()}
    # All texts at once, which is many times faster: the encoder remembers them.
    texts = {y for rows in lists.values() for some in rows.values() for row in some for y in row}
    truth.encoder(sorted(texts.union(*(texts_of(truth.dialogues[c]) for c in safe))))

    def means(names: Iterable[str], rows: dict[str, list], metric: Callable) -> dict[str, float]:
        # Of the answers that a method gives to a context.
        return {c: float(np.mean([metric(c, one) for one in rows[c]])) for c in names}

    return {name: {
        # Missing suggestions help nobody: always over three places.
        "usefulness": means(safe, lists[name], lambda c, some: sum(
            truth.usefulness(c, some)) / garm.NUM_SUGGESTIONS),
        "click_rate": means(safe, lists[name], truth.click_rate),
        "format": means(safe, rows, lambda _, answer: garm.format_reward(answer)),
        "declined": means(safe, rows, lambda _, answer: answer.strip() == garm.UNSAFE),
        "safety": means(unsafe, rows, lambda _, answer: garm.format_reward(answer, unsafe=True)),
        **good_same_bad(players, safe, lists[name], lists["PE"]),
    } for name, rows in answers.items()}


def good_same_bad(players: Players, contexts: dict[str, Context], lists: dict,
                  base: dict) -> dict[str, dict[str, float]]:
    """Shares "good" and "bad" of a context's lists against PE's; "net": good minus bad."""
    rows = [(c, a, b) for c in contexts for a, b in zip(lists[c], base[c], strict=True)]
    said = players.judge().prefer([(contexts[c].queries, a, b) for c, a, b in rows])
    by_context: dict[str, list] = {}
    for (c, *_), won in zip(rows, said, strict=True):
        by_context.setdefault(c, []).append(won)
    # A judge's call that failed says nothing: any number would be a judgement.
    judged = {c: np.array(won) for c, won in by_context.items() if None not in won}
    metrics = {"good": lambda won: won == 1, "bad": lambda won: won == 0,
               "net": lambda won: 2 * won - 1}
    return {metric: {c: float(f(won).mean()) for c, won in judged.items()}
            for metric, f in metrics.items()}


def add_rewards(values: Values, reward: RewardModel, contexts: Sequence[Context],
                answers: Answers) -> None:
    """"reward": mean mu of what a method suggests, where it suggests anything."""
    safe = [c for c in contexts if not c.unsafe]
    lists = [{name: [y for answer in rows[c.dialogue.dialogue_id] for y in shown(answer)]
              for name, rows in answers.items()} for c in safe]
    # Of all methods side by side: a context is read once.
    texts = [list(dict.fromkeys(y for some in row.values() for y in some)) for row in lists]
    mus, _ = reward.score([c.turns for c in safe], texts, SIZE)
    scores = [dict(zip(some, mu.tolist(), strict=True))
              for some, mu in zip(texts, mus, strict=True)]
    for name in answers:
        values[name]["reward"] = {
            c.dialogue.dialogue_id: float(np.mean([of_text[y] for y in row[name]]))
            for c, row, of_text in zip(safe, lists, scores, strict=True) if row[name]}


def add_log_perplexity(values: Values, suggester: Suggester, reference, contexts: Sequence[Context],
                       answers: Answers) -> None:
    """"log_perplexity": minus log-perplexity of a method's answers to safe contexts, under SFT."""
    safe = [c for c in contexts if not c.unsafe]
    for start in range(0, len(safe), SIZE):
        part = safe[start : start + SIZE]
        texts = [[answer for rows in answers.values() for answer in rows[c.dialogue.dialogue_id]]
                 for c in part]
        ids = [[suggester.completion(answer) for answer in some] for some in texts]
        with torch.no_grad():
            logps, mask = llm.token_logps(reference, [suggester.prompt(c.turns) for c in part], ids)
        likely = iter(garm.log_perplexity_reward(logps, mask).tolist())
        for context in part:
            name = context.dialogue.dialogue_id
            for method, rows in answers.items():  # in the order of `texts`
                by_context = values[method].setdefault("log_perplexity", {})
                by_context[name] = float(np.mean([next(likely) for _ in rows[name]]))


# ------------------------------------------------------------------------------------ reward models


def logged_pairs(run: Run) -> dict[str, list[Shown]]:
    """IID, W1 to W4 -> contexts with clicked pairs, at most eval.max_users each."""
    contexts, rng = read_contexts(run), random.Random(run.seed("reward tests"))
    # Of week 0 those by people whom no reward model has seen; nothing was trained on later weeks.
    parts = {"IID": [c for c in contexts if c.week == 0 and c.split != "train"]}
    parts |= {f"W{week}": [c for c in contexts if c.week == week] for week in range(1, 5)}
    result = {}
    for name, part in parts.items():
        rows = pairs_of([c for c in part if not c.unsafe])
        most = run.config.eval.max_users or len(rows)
        rows = rng.sample(rows, min(most, len(rows)))
        result[name] = [Shown(c, c.dialogue.suggestions, dict.fromkeys(pairs, 1.0))
                        for c, pairs in rows]
    return result


def shifted_pairs(truth: Truth, rows: list[Shown], lists: dict[str, list[str]]) -> list[Shown]:
    """The contexts with another policy's suggestions, and the pairs that clicks on these give."""
    result = []
    for row in rows if lists else ():
        texts = shown(lists[row.name][0])
        chances = truth.click_probabilities(row.name, texts)  # (K,), of the context's own week
        # The slot filter, in expectation: this one clicked, one before it passed over.
        pairs = {(w, r): PEOPLE * chances[w] * (1 - chances[r])
                 for w in range(len(texts)) for r in range(w)}
        result.append(replace(row, texts=texts, pairs=pairs))
    return result


def reward_models(runs: dict[str, Run], suggester: Suggester, model):
    """(name as in Table 2, reward model) of every kind, of the main run and of variants."""
    for variant, run in runs.items():
        if variant and variants()[variant]["stage"] != "reward":
            continue
        for kind in run.config.reward.kinds:
            name = ", ".join(filter(None, [named(kind), variant]))
            yield name, load_reward(run, suggester, kind, model)


@dataclass(frozen=True)
class Scores:
    """Of a context's pairs, (P,) each: p(preferred > rejected), weight, bound and gap of the mus
    (None: a model without sigma); sigma: mean over its suggestions."""

    p: Tensor
    weights: Tensor
    bound: Tensor | None = None
    gap: Tensor | None = None
    sigma: float | None = None


def scores_of(reward: RewardModel, rows: list[Shown]) -> list[Scores]:
    """Scores of each context's pairs, none where it has no pair."""
    weights = [torch.tensor([*row.pairs.values()]) for row in rows]
    turns = [row.context.turns for row in rows]
    if reward.kind == "paired":
        asked = [[(row.texts[w], row.texts[r]) for w, r in row.pairs] for row in rows]
        # In both orders: a model that likes to say YES would be right of all.
        both = [[*some, *(pair[::-1] for pair in some)] for some in asked]
        places = [i for i, some in enumerate(both) if some]
        answers = reward.preference([turns[i] for i in places], [both[i] for i in places], SIZE)
        of_place = dict(zip(places, answers, strict=True))
        halves = [of_place.get(i, torch.zeros(0)).tensor_split(2) for i in range(len(rows))]
        return [Scores((a + 1 - b) / 2, w) for (a, b), w in zip(halves, weights, strict=True)]
    result = []
    mus, sigmas = reward.score(turns, [row.texts for row in rows], SIZE)
    for row, weight, mu, sigma in zip(rows, weights, mus, sigmas, strict=True):
        w, r = torch.tensor([*row.pairs], dtype=torch.long).view(-1, 2).unbind(1)
        four = (mu[w], sigma[w], mu[r], sigma[r])
        scores = Scores(garm.preference_probability(*four), weight)
        if reward.kind != "bradley_terry" and len(mu):  # there sigma is 0
            scores = replace(scores, bound=garm.uncertainty_lower_bound(*four),
                             gap=(mu[w] - mu[r]).abs(), sigma=sigma.mean().item())
        result.append(scores)
    return result


def right_and_wrong(scores: Scores, where: Tensor | None = None) -> dict[str, float]:
    """Pairs that a model orders as people did, and others; a tie is half of each."""
    weights = scores.weights if where is None else scores.weights * where
    right = (weights * ((scores.p > 0.5) + 0.5 * (scores.p == 0.5))).sum().item()
    return {"right": right, "wrong": weights.sum().item() - right}


def calibration(scores: Scores) -> dict[str, float]:
    """Sums of p and of labels by bin of p, pairs in both orders (4.3.3)."""
    p, labels = garm.flip_pairs(scores.p)
    weights, sums = scores.weights.repeat(2), {}
    bins = (p * BINS).long().clamp_max(BINS - 1)
    for b in bins.unique().tolist():
        sums[f"p{b}"] = (weights * p)[bins == b].sum().item()
        sums[f"y{b}"] = (weights * labels)[bins == b].sum().item()
    return sums


def add_scores(result: dict, name: str, rows: list[Shown], scored: list[Scores]) -> None:
    """Accuracy, calibration, and mean sigma and bound of a reward model on a set of pairs."""
    if not rows:  # a log that is no longer than the training part, or no RFT
        return
    contexts = [row.name for row in rows]
    result["pairs"][name] = dict(zip(contexts, map(right_and_wrong, scored), strict=True))
    if ", W4" in name:  # with W4-RFT: the paper has it of these two
        result["calibration"][name] = dict(zip(contexts, map(calibration, scored), strict=True))
    unsure = [(c, s) for c, s in zip(contexts, scored, strict=True) if s.sigma is not None]
    if unsure:
        result["values"][name] = {
            "sigma": {c: s.sigma for c, s in unsure},
            "bound": {c: ((s.bound * s.weights).sum() / s.weights.sum()).item()
                      for c, s in unsure if s.weights.sum() > 0}}


def by_confidence(sets: dict[str, list[Shown]], scored: dict[str, list[Scores]]) -> Counts:
    """Figure 4: right and wrong pairs by quarter of the bound, of all logged sets and of W4-RFT;
    and by quarter of the gap of the mus alone, to tell what sigma adds."""
    result: Counts = {}
    logged = [part for part in sets if part != "W4-RFT"]
    for field in ("bound", "gap"):
        every = torch.cat([getattr(s, field) for part in logged for s in scored[part]])
        edges = every.quantile(torch.tensor([0.25, 0.5, 0.75]))
        for label, parts in (("", logged), (", W4-RFT", ["W4-RFT"])):
            for quarter in range(4):
                # A context of one set is never one of another, but for W4-RFT's.
                counts = {row.name: right_and_wrong(
                    s, torch.bucketize(getattr(s, field), edges) == quarter)
                    for part in parts for row, s in zip(sets[part], scored[part], strict=True)
                    if s.bound is not None}
                result[f"{field}, quarter {quarter + 1}{label}"] = {
                    name: row for name, row in counts.items() if any(row.values())}
    return result


# --------------------------------------------------------------------------------------- appendix I


def phrasing_values(run: Run, truth: Truth, reward: RewardModel, rows: list[Shown]) -> Values:
    """GaRM's scores of phrasings of garm.yaml, standardised by what was shown, and their hidden
    usefulness, by kind of phrasing."""
    kinds, rows = experiments.read("garm")["phrasings"], rows[: run.config.eval.max_users or None]
    asked = []  # of each context: kind -> texts
    for row in rows:
        topic = truth.dialogues[row.name]["topic"]
        asked.append({kind: [text.format(topic=topic) for text in some]
                      for kind, some in kinds.items()} | {"what was shown": row.texts})
    texts = [[y for some in by_kind.values() for y in some] for by_kind in asked]
    mus, _ = reward.score([row.context.turns for row in rows], texts, SIZE)
    scores = [dict(zip(*pair, strict=True))
              for pair in zip(texts, (mu.tolist() for mu in mus), strict=True)]
    base = np.array([of[y] for row, of in zip(rows, scores, strict=True) for y in row.texts])
    mean, deviation = base.mean(), max(base.std(), 1e-9)
    values: Values = {}
    for kind in [*kinds, "what was shown"]:
        values[kind] = {
            "score": {row.name: float((np.mean([of[y] for y in some[kind]]) - mean) / deviation)
                      for row, of, some in zip(rows, scores, asked, strict=True)},
            # Each alone: those of one kind are not shown together.
            "usefulness": {row.name: float(np.mean([truth.usefulness(row.name, [y])[0]
                                                    for y in some[kind]]))
                           for row, some in zip(rows, asked, strict=True)}}
    return values
