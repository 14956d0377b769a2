"""Real people as judges: does a person really ask later what a starter is about?

    python eval.py --later users.jsonl chats.jsonl eval.max_users=60    # results/later.md

The paper has live users for this. Each person's sessions are cut at 80 %. From the past, as of
when the rest began, every method of a run writes as for a stranger; the rest says what is right:
- strict: the matcher finds a later session with the same specific subject;
- lenient: it does, or the starter shares a content word with a later subject (names_subject).

At 1: the first starter is right; at 5: any of the first five is; share: how many of these are. An
empty list has 0 of all. A person's value is the mean over the lists. Controls, on the same people:
- wrong person: the same list held against the futures of the three people next by id, most of one
  site (metrics.other_users): what is left, "personal", is more than knowing the field.
- latest subjects: the last summaries of the past as they are, the very last one first.
- closed topics: summaries of the first half of the past that nothing in its second half came back
  to (matcher), the latest first. A few are opened again after the cut.
- popular: the starters that the run's server would show to somebody without a history.

People are those of people.py, of both halves where none lent titles to the corpus. Legend: B
people, N summaries of a person.
"""

from itertools import product
from pathlib import Path

import numpy as np
from pydantic import BaseModel, Field, model_validator

import data
import icebreaker as ib
import train
from config import Config
from files import UserError, read_yaml
from roles.players import Players
from roles.text import names_subject
from run import Run, commit_of, environment
from stages import metrics
from stages.baselines import RULES, rule_scores
from stages.cold_start import PopularStarters
from stages.eval import write_lists
from stages.metrics import Lists, PerUser
from stages.rid import best_of
from stages.sit import read_corpus
from tables import people, seeds
from tables.verdicts import RULE

LEAST = 4  # sessions: three to write from, and one that is kept back
PAST = 0.8  # share of the sessions that are told
YARDSTICKS = ("strict", "lenient")
RID = ("auc", "precision")  # metrics of interests, with methods of their own; the rest are of lists
Right = dict[str, dict[str, tuple[bool, bool]]]  # person -> starter -> by each yardstick
Texts = dict[str, list[str]]  # person -> distinct summaries, the latest last


class Later(BaseModel, extra="forbid", allow_inf_nan=False):
    """What results/values/ keeps of one file of people; files of it may come from anywhere."""

    name: str = Field(pattern=r"^[^/\\]+$")  # it becomes a file's name
    people: str  # the file
    run: str
    generator: str
    commit: str  # that measured
    lists: int  # of each person and method
    values: dict[str, dict[str, dict[str, float]]]  # metric -> method -> person -> value

    @model_validator(mode="after")
    def _same_people(self):
        lists = self.values.get("strict_share", {})  # its methods and people are all metrics'
        for metric, methods in self.values.items():
            first = next(iter(methods.values()), {})
            if (not first or any(rows.keys() != first.keys() for rows in methods.values())
                    or (metric not in RID and (methods.keys(), first.keys())
                        != (lists.keys(), next(iter(lists.values()), {}).keys()))):
                raise ValueError(f"{metric}: every method needs the same people, at least one")
        if not lists:
            raise ValueError("strict_share is missing")
        return self


# ------------------------------------------------------------------------------------- measuring


def measure(config: Config, file: str) -> Later:
    """Let every method of the run write from people's pasts, and their futures judge.

    Raises UserError if the file has bad lines or nobody who fits, or the run is not finished.
    """
    users = data.read_users(file)  # refused before anything is loaded
    run, players = people.finished_run(config)
    halves = 1 if {user.user_id for user in users} & lenders() else 2
    users = people.judged(run, players, file, users, LEAST, "max_users", halves)
    ids, parts = [u.user_id for u in users], [data.cut_sessions(u, PAST) for u in users]
    past, future = ({u: distinct(part[i]) for u, part in zip(ids, parts, strict=True)}
                    for i in (0, 1))
    everyone = [[s.summary for s in user.sessions] for user in users]
    distiller, histories, scores = people.resonance(run, users, PAST)
    keep = [distiller.keep(h, s) for h, s in zip(histories, scores, strict=True)]
    told = {u: [h.texts[i] for i in kept] for u, h, kept in zip(ids, histories, keep, strict=True)}
    with train.explained(config, "eval"):
        lists = write_lists(run, players.writer, {u: past[u][::-1] for u in ids}, told,
                            config.eval.lists)
    lists |= controls(run, players, users, everyone)
    # All at once: like lengths share a batch.
    run.encoder(sorted({y for rows in lists.values() for x in rows.values() for y in sum(x, [])}))
    # Each future judges what was written for its person, and for those whose other it is.
    strangers = metrics.other_users(ids)
    starters: dict[str, set[str]] = {u: set() for u in ids}
    for u, rows in ((u, rows) for by_user in lists.values() for u, rows in by_user.items()):
        for v in (u, *strangers[u]):
            starters[v] |= {y for row in rows for y in row}
    right = judge(players, {u: sorted(ys) for u, ys in starters.items()}, future, everyone)
    revisited = judge(players, past, future, everyone)
    values = list_values(lists, right, strangers)
    values |= rid_values(run, ids, histories, scores, keep, revisited)
    run.encoder.save()
    return Later(
        name=f"later-{Path(file).stem}-{config.run.name}", people=Path(file).name,
        run=config.run.name, generator=Path(players.writer.model_path).name,
        commit=commit_of(environment(config)),
        lists=config.eval.lists, values={
            metric: {method: {u: round(value, 6) for u, value in rows.items()}
                     for method, rows in methods.items()} for metric, methods in values.items()})


def lenders() -> set[str]:
    """Ids of the people whose titles are in the teacher corpus."""
    return {row.source.partition(":")[2] for row in read_corpus()} - {""}


def distinct(sessions: list[data.Session]) -> list[str]:
    """Summaries, each once, in the order of their last occurrence."""
    return [*dict.fromkeys(s.summary for s in reversed(sessions))][::-1]


def controls(run: Run, players: Players, users: list[data.User], everyone: list) -> Lists:
    """One list of each person: the latest subjects, closed topics, popular starters."""
    k, lists = run.config.generator.list_size, {"latest subjects": {}, "closed topics": {}}
    halves = {}
    for user in users:
        told = data.cut_sessions(user, PAST)[0]
        halves[user.user_id] = [
            distinct(half) for half in (told[: len(told) // 2], told[len(told) // 2 :])]
        lists["latest subjects"][user.user_id] = [distinct(told)[::-1][:k]]
    came_back = judge(players, *({u: half[i] for u, half in halves.items()} for i in (0, 1)),
                      everyone)
    for u, (first, _) in halves.items():
        lists["closed topics"][u] = [[y for y in first[::-1] if not came_back[u][y][0]][:k]]
    if run.impressions:  # without logs of taps nothing is popular
        popular = PopularStarters(run)
        lists["popular"] = {user.user_id: [popular(user.profile)] for user in users}
    return lists


def judge(players: Players, starters: Texts, future: Texts, everyone: list) -> Right:
    """Which of a person's starters (or summaries) are about something in this future."""
    jobs = [(starters[u], future[u]) for u in starters]
    right: Right = {}
    for u, matches in zip(starters, players.match(jobs, everyone), strict=True):  # (E, L)
        # An unanswered call of an LLM (-1) is no match.
        strict = [bool(row) for row in (matches > 0).any(1)]
        right[u] = {y: (yes, yes or names_subject(y, future[u]))
                    for y, yes in zip(starters[u], strict, strict=True)}
    return right


def scored(right: list[bool]) -> dict[str, float]:
    """Of a list whose starters are right or not."""
    first = right[:5]  # all, with the paper's K
    return {"at_1": float(any(right[:1])), "at_5": float(any(first)),
            "share": sum(first) / max(1, len(first))}


def list_values(lists: Lists, right: Right, strangers: dict[str, list[str]]) -> PerUser:
    """metric -> method -> person -> mean over the lists, for their person and for the others."""
    values: PerUser = {}
    for i, yardstick in enumerate(YARDSTICKS):
        for method, by_user in lists.items():
            for u, rows in by_user.items():
                # whose futures judge, under which name
                sides = {"": [u], "others_": strangers[u]}
                for prefix, judges in ((p, vs) for p, vs in sides.items() if vs):
                    each = [scored([right[v][y][i] for y in ys]) for ys, v in product(rows, judges)]
                    for name in each[0]:
                        metric = values.setdefault(f"{prefix}{yardstick}_{name}", {})
                        metric.setdefault(method, {})[u] = float(np.mean([e[name] for e in each]))
    return values


def rid_values(run: Run, ids: list[str], histories: list[ib.History], scores: list[np.ndarray],
               keep: list[list[int]], revisited: Right) -> PerUser:
    """AUC of "revisited later" (strict), of people who have both kinds; precision of the trigger
    interests, and of as many by rule; the rules know chores as RID's labels do."""
    values: PerUser = {"auc": {}, "precision": {}}
    for u, history, own, kept in zip(ids, histories, scores, keep, strict=True):
        labels = np.array([revisited[u][text][0] for text in history.texts])  # (N,)
        ranked = {"RID": own} | {n: rule_scores(history, rule) for n, rule in RULES.items()}
        choice = {"RID and gate": kept, "every summary": [*range(len(labels))]}
        for name in RULES:  # as many, and near-duplicates collapsed alike
            choice[name] = best_of(history, ranked[name], len(kept),
                                   run.config.rid.duplicate_cosine)
        for name, s in ranked.items():
            if labels.any() and not labels.all():
                values["auc"].setdefault(name, {})[u] = metrics.per_user_auc(s, labels)
        for name, places in choice.items():
            values["precision"].setdefault(name, {})[u] = float(
                labels[places].mean()) if places else 0.0  # nothing kept: none is right
    return {metric: methods for metric, methods in values.items() if methods}


# ------------------------------------------------------------------------------------------ page


def rows_of(values: PerUser, metric: str, method: str) -> np.ndarray:
    """(B,) of a metric; personal_...: the person's own value less that of the others."""
    own = values[name := metric.removeprefix("personal_")][method]
    others = values[f"others_{name}"][method] if name != metric else dict.fromkeys(own, 0.0)
    return np.array([own[u] - others[u] for u in own])


def section(kept: Later) -> str:
    """Markdown of one file of people: each yardstick's table, differences, RID."""
    texts, values = read_yaml("tables/later.yaml"), kept.values
    methods, tables = [*values["strict_share"]], []

    def is_there(metric: str) -> bool:  # of a single person there are no others
        return metric.replace("personal_", "others_") in values

    for yardstick, title in texts["yardsticks"].items():
        columns = {t: (name.format(yardstick), form) for t, (name, form) in texts["columns"].items()
                   if is_there(name.format(yardstick))}
        table = [[metrics.escape(m), *(seeds.summary([rows_of(values, name, m)], form)
                                       for name, form in columns.values())] for m in methods]
        tables += [f"### {title}", "", metrics.markdown_table(["", *columns], table)]
    gaps = [([f"{more} - {less}", title],
             [rows_of(values, name, more) - rows_of(values, name, less)], "+.3f")
            for title, name in texts["compared"].items() if is_there(name)
            for more, less in texts["differences"] if {more, less} <= {*methods}]
    verdicts = seeds.with_verdicts(gaps)
    tables += ["### Differences", "", metrics.markdown_table(texts["head"], verdicts)]
    rid = [[title, metrics.escape(method), str(len(rows)), seeds.summary([[*rows.values()]], ".3f")]
           for title, name in texts["rid"].items() for method, rows in values.get(name, {}).items()]
    tables += ["### Interests", "", metrics.markdown_table(texts["rid_head"], rid)]
    about = {key: metrics.escape(str(value)) for key, value in kept.model_dump().items()}
    head = texts["section"].format(**about, count=len(values["strict_share"][methods[0]]))
    return "\n".join([head, "", *tables])


def page(kept: list[Later], command: str) -> str:
    head = read_yaml("tables/later.yaml")["page"].format(command=command, rule=RULE)
    return "\n".join([head, *map(section, kept)])


def write_later(config: Config, files: list[str], out: Path) -> None:
    """The page of these files of people, and values/NAME.json of each beside it.

    Those that end in .json are such values already: nothing is loaded for them.
    """
    kept = [seeds.read_kept(Later, file) if file.endswith(".json") else measure(config, file)
            for file in files]
    if len({one.name for one in kept}) < len(kept):
        raise UserError("--later: two files of people have one name")
    seeds.write_page(page, kept, "--later", out)
