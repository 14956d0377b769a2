"""Real people: what every method writes for them, side by side, and readers' marks of it.

    python eval.py --people users.jsonl eval.examples=20     # results/people.md, people_blind.md
    python eval.py --marks anna.jsonl bo.jsonl               # counted into results/people.md

People are taken by rule, never by hand. people_blind.md has the same lists under letters, for
readers who are not to know the methods; people_key.json says which is which.

Legend: B people, N summaries of a person, D embedding.
"""

import functools
import hashlib
import itertools
import random
import string
import sys
from collections import defaultdict
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
from pydantic import create_model

import data
import icebreaker as ib
import llm
import roles
import train
from config import Config
from files import UserError, read_json, read_yaml, write_json, write_lines, write_text
from roles.players import Players, players_of
from run import Run, history_of, profile_vector
from stages import metrics
from stages.eval import LATEST, examples_page, write_lists
from stages.rid import Distiller
from stages.sit import read_corpus
from tables import seeds

QUESTIONS = ("tap", "about", "true", "put")  # people.yaml puts them
Mark = create_model(  # of one list by one reader: to how many of its starters the answer is yes
    "Mark", __base__=data.Record, person=(data.Name, ...), letter=(data.Name, ...),
    **dict.fromkeys(QUESTIONS, (data.Slot, ...)))
LEAST = 3  # sessions that have a summary fit to be shown
MARKS = "\n\n**Marks.** "  # begins what --marks adds to the page's head


def in_order(run: Run, users: list[data.User], halves: int = 1) -> list[data.User]:
    """Users on whom a method may be judged, in the order of the SHA-256 of their ids.

    halves: 2 where nobody of the file lent anything, so that the even half may be judged on too.
    """
    hashed = {hashlib.sha256(user.user_id.encode()).digest(): user for user in users}
    # Of those whom the run has learned from, it may know what comes next.
    splits = run.split(u.user_id for u in run.logged_users) if run.config.data.users else {}
    # The even half lent titles to the teacher corpus (docs/teacher_corpus.md).
    return [user for number, user in sorted(hashed.items())  # no two hashes are equal
            if (number[-1] % 2 or halves == 2) and splits.get(user.user_id, "test") == "test"]


def finished_run(config: Config) -> tuple[Run, Players]:
    """The run of these settings and who writes in it; raises UserError if it is not finished."""
    llm.settle_libraries()
    run = Run(config, describe=False)
    if run.folder.key("dpo") != train.stage_key(run, "dpo"):
        raise UserError(f"{run.folder.path}: no finished run of these settings; train.py first")
    run.folder.require("summarize", "rid", "ranker", "sit", "dpo")
    return run, players_of(run)


def judged(run: Run, players: Players, file: str, users: list[data.User], least: int,
           setting: str, halves: int = 1) -> list[data.User]:
    """The first users of `in_order` with so many fit summaries, as many as eval.`setting` says.

    Raises UserError where there are none; too few are told on stderr.
    """
    n = getattr(run.config.eval, setting)
    most = n or len(users) * (setting == "max_users")  # of which 0 means all
    # One at a time: an LLM may be asked for the summaries.
    summarised = map(without_lent, map(players.summarised, in_order(run, users, halves)))
    # Of so many of their sessions anybody may be reminded.
    fits = (user for user in summarised
            if sum(not roles.is_unsuitable(s.summary) for s in user.sessions) >= least)
    fit = [*itertools.islice(fits, most)]
    if not fit:
        odd = ", an odd SHA-256 of the user_id" * (halves == 1)
        raise UserError(f"{file}: nobody has {least} sessions{odd} and no part in the run's "
                        f"training (eval.{setting}={n})")
    if len(fit) < n:
        print(f"{file}: only {len(fit)} people fit (eval.{setting}={n})", file=sys.stderr)
    return fit


def without_lent(user: data.User) -> data.User:
    """The user without sessions whose summary the teacher corpus has of somebody else.

    A question interests many people: of the corpus's real titles most stand in the histories of
    the other half too, and SIT has seen starters for them.
    """
    sessions = [s for s in user.sessions if s.summary not in lent_titles()]
    return user.model_copy(update={"sessions": sessions})


@functools.cache
def lent_titles() -> frozenset[str]:
    """Interests of the teacher corpus that are real people's."""
    real = (row for row in read_corpus() if row.source != "invented")
    return frozenset(title for row in real for title in row.interests)


def resonance(run: Run, users: list[data.User], share: float,
              now: datetime | None = None) -> tuple[Distiller, list[ib.History], list[np.ndarray]]:
    """Of strangers, as of when `share` of their sessions was over: histories, s(u, h) (N,) of each
    summary, and who tells what is kept of them. now: until then one was away, if all is told."""
    parts = [(u.sessions, []) if share == 1 else data.cut_sessions(u, share) for u in users]
    run.encoder(sorted({s.summary for past, _ in parts for s in past}))  # like lengths together
    # "Now" is the first session that is not told.
    histories = [history_of(past, future[0].timestamp if future else now, run.encoder)
                 for past, future in parts]
    profiles = torch.stack([profile_vector(user, run.encoder) for user in users])  # (B, D)
    distiller = Distiller.load(run)
    return distiller, histories, distiller.scores(histories, profiles)


def write_people(config: Config, file: str, out: Path) -> None:
    """Let every method write for people of a users.jsonl; the four files of `write_pages`.

    Raises UserError if the file has bad lines or nobody who fits, or the run is not finished.
    """
    users = data.read_users(file)  # refused before anything is loaded
    run, players = finished_run(config)
    people = judged(run, players, file, users, LEAST, "examples")
    # The end of the file, as a run's log has one.
    now = max((s.timestamp for u in users for s in u.sessions if s.timestamp), default=None)
    rows, (distiller, histories, scores) = [], resonance(run, people, 1, now)
    for user, history, s in zip(people, histories, scores, strict=True):
        keep, texts = distiller.keep(history, s), history.texts
        rows.append({"user_id": user.user_id, "summaries": texts[::-1],  # latest first
                     "interests": [texts[i] for i in keep], "scores": [float(s[i]) for i in keep]})
    told = ({row["user_id"]: row[name] for row in rows} for name in ("summaries", "interests"))
    with train.explained(config, "eval"):
        lists = write_lists(run, players.writer, *told, 1)
    rows = [row | {"starters": {m: y[row["user_id"]] for m, y in lists.items()}} for row in rows]
    names = Path(file).name, config.run.name, Path(players.writer.model_path).name
    head = read_yaml("tables/people.yaml")["head"].format(
        *map(metrics.escape, names), people=len(rows), least=LEAST)
    write_pages(rows, head, run.seed("letters"), out)
    print(f"{len(rows)} people: {out / 'people.md'}; to mark: {out / 'people_blind.md'}")


def write_pages(rows: list[dict], head: str, seed: int, out: Path) -> None:
    """people.md, people.jsonl, and people_blind.md with its key; seed: of the letters."""
    key, blind = {}, []
    for row in rows:
        user, starters = row["user_id"], row["starters"]
        methods = random.Random(f"{seed}/{user}").sample([*starters], len(starters))
        letters = key[user] = dict(zip(string.ascii_uppercase, methods, strict=False))
        # No interests: they are RID's choice, and a reader is to judge by all that was said.
        blind.append(row | {"interests": [], "scores": [],
                            "starters": {letter: starters[m] for letter, m in letters.items()}})
    latest = [row | {"summaries": row["summaries"][:LATEST]} for row in rows]
    write_text(out / "people.md", examples_page(head, latest))
    blind_head = read_yaml("tables/people.yaml")["blind"]
    write_text(out / "people_blind.md", examples_page(blind_head, blind))
    write_lines(out / "people.jsonl", rows)
    write_json(out / "people_key.json", key)


def read_marks(file: str, lists: dict, faults: data.Faults) -> dict:
    """(person, letter) -> shares of yes (4,) of one reader; notes all that is wrong in `faults`.

    lists: (person, letter) -> the starters.
    """
    shares = {}
    for place, value in data.json_objects(file, faults):
        try:
            person, letter, *counts = Mark.model_validate(value).model_dump().values()
            if (person, letter) not in lists or (person, letter) in shares:
                raise ValueError("letter: no such list, or marked on an earlier line too")
            if max(counts) > (k := len(lists[person, letter])):
                raise ValueError(f"line: counts go up to {k}, the list's starters")
            shares[person, letter] = np.array(counts) / max(k, 1)  # an empty list has 0
        except ValueError as error:  # a ValidationError is one too
            faults.add(place, error)
    people = {person for person, _ in shares}
    # Methods are to be compared on the same people, by the same readers.
    if not faults and (not people or any(person in people for person, _ in lists.keys() - shares)):
        faults.add(file, ValueError("letter: each list of a person is to be marked, or none"))
    return shares


def agreement(marks: dict[tuple, list[np.ndarray]]) -> str:
    """Pearson's r between the first two readers' shares of each question; – of a single one."""
    both = np.array([some[:2] for some in marks.values() if len(some) > 1])  # (lists, 2, questions)
    if len(both) < 3:
        return "–"
    return ", ".join(f"{question} {np.corrcoef(both[:, 0, i], both[:, 1, i])[0, 1]:.2f}"
                     for i, question in enumerate(QUESTIONS))


def add_marks(files: list[str], out: Path) -> None:
    """Count marks, a file a reader, into the head of people.md; raises DataError of all faults."""
    key, faults, marks = read_json(out / "people_key.json"), data.Faults(), defaultdict(list)
    rows = [row for _, row in data.json_objects(out / "people.jsonl", faults)]
    lists = {(row["user_id"], letter): row["starters"][method][0]
             for row in rows for letter, method in key[row["user_id"]].items()}
    for file in files:
        for place, shares in read_marks(file, lists, faults).items():
            marks[place].append(shares)
    faults.refuse()
    places = {method: [place for place in marks if key[place[0]][place[1]] == method]
              for method in rows[0]["starters"]}  # one a person, in the same order
    means = {method: np.transpose([np.mean(marks[place], 0) for place in some])  # (questions, B)
             for method, some in places.items()}
    table = [[method, *(seeds.summary([x], ".2f") for x in means[method]),
              f"{np.mean([len(lists[place]) for place in some]):.1f}"]
             for method, some in places.items()]
    texts = read_yaml("tables/people.yaml")
    gaps = [([f"{more} - {less}", QUESTIONS[i]], [means[more][i] - means[less][i]], "+.2f")
            for more, less in texts["differences"] if {more, less} <= {*means} for i in (0, 1, 2)]
    text = MARKS + texts["marks"].format(
        people=len({person for person, _ in marks}), readers=", ".join(Path(f).stem for f in files),
        alike=agreement(marks)) + "\n\n"
    text += metrics.markdown_table(["Method", *QUESTIONS, "starters"], table)
    text += "\n" + metrics.markdown_table(
        ["difference", "question", "mean", "verdict"], seeds.with_verdicts(gaps))
    # Nothing in people's texts is a heading.
    head, people = (out / "people.md").read_text(encoding="utf-8").split("\n\n## ", 1)
    write_text(out / "people.md", head.split(MARKS)[0] + text + "\n## " + people)
    print(text.strip())
