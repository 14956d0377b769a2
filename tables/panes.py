"""Reward models on real clicks: clarification panes of a search engine (MIMICS-Duo).

    python -m tables.panes mimics_duo_dev.jsonl           # results/panes.md; minutes
    python -m tables.panes mimics_duo_dev.jsonl --out DIR reward.epochs=2 reward.kinds=[gaussian]

Queries are parted in two; a reward model of each half (paper 003, section 3.5: pairs by the slot
filter) is tested on the other, so that every query is tested once. Beside the models stands what
needs no training: the longer option, the one shown earlier, the likelier one under the base. The
right option of a pair is the one that drew more of the clicks on its pane.

Departure: clicks are shares over people, not one person's; what a pane asks is left out. A small
set. Legend: R options of several panes, T tokens.
"""

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
import llm
from config import Config, load_config
from files import ROOT, UserError, digest, file_digest, script, write_text
from roles.players import players_of
from roles.suggester import Suggester
from run import Run
from stages.dialogues import Context
from stages.metrics import escape, markdown_table
from stages.reward import load_reward, train_reward
from tables.claims import pooled_interval
from tables.garm_values import SIZE, Counts, Shown, named, scores_of
from tables.seeds import written
from tools.importers import import_mimics

UNTRAINED = ("the longer one", "the earlier one", "the likelier one under the base")
PARTS = ("all pairs", "the later one drew more")


def panes_of(path: Path) -> list[Shown]:
    """Panes of a dialogues.jsonl that have options with different shares of the clicks."""
    rows = []
    for dialogue in data.read_dialogues(path):
        shares = dialogue.click_shares or []
        pairs = {(w, r): 1.0 for w, a in enumerate(shares) for r, b in enumerate(shares) if a > b}
        if pairs:
            rows.append(Shown(Context(dialogue, "test", 0), dialogue.suggestions, pairs))
    if not rows:
        raise UserError(f"{path}: no pane with options that drew different shares of the clicks")
    return rows


def query_of(row: Shown) -> str:
    return row.context.queries[0].casefold()


def halves(rows: Sequence[Shown], seed: int) -> list[list[Shown]]:
    """Panes in two halves; those of one query stay together."""
    queries = sorted({query_of(row) for row in rows})  # or the file's order would part them
    order = np.random.default_rng(seed).permutation(len(queries))
    first = {queries[i] for i in order[: len(queries) // 2]}
    return [[row for row in rows if (query_of(row) in first) == side] for side in (True, False)]


def counted(name: str, rows: Sequence[Shown], margins: Sequence[Sequence[float]]) -> Counts:
    """Right and wrong pairs of each query, of both PARTS.

    margins: of each pane's pairs, above 0 where the one that drew more is preferred; 0 is half.
    """
    result: Counts = {f"{name}, {part}": {} for part in PARTS}
    for row, some in zip(rows, margins, strict=True):
        for (w, r), margin in zip(row.pairs, some, strict=True):
            right = 0.5 + 0.5 * float(np.sign(margin))  # a tie is a coin that is thrown
            for part, inside in zip(PARTS, (True, w > r), strict=True):
                count = result[f"{name}, {part}"].setdefault(
                    query_of(row), {"right": 0.0, "wrong": 0.0})
                count["right"] += right * inside
                count["wrong"] += (1 - right) * inside
    return result


def by_value(name: str, rows: Sequence[Shown], values: list[list[float]]) -> Counts:
    """Of a method that gives each option a value."""
    return counted(name, rows, [[some[w] - some[r] for w, r in row.pairs]
                                for row, some in zip(rows, values, strict=True)])


def untrained(rows: list[Shown], suggester: Suggester) -> Counts:
    """Length in characters, slot, and mean log-probability of a token under the base."""
    model, likely = suggester.policy(None), []
    for start in range(0, len(rows), SIZE):
        part = rows[start : start + SIZE]
        ids = [suggester.encoded(row.context.turns, row.texts) for row in part]
        with torch.no_grad():
            logps, mask = llm.token_logps(model, *map(list, zip(*ids, strict=True)))  # (R, T)
        # A mean: a sum would be length once more.
        means = logps.masked_fill(~mask, 0).sum(1) / mask.sum(1)
        likely += [x.tolist() for x in means.cpu().split([len(row.texts) for row in part])]
    lengths = [[*map(len, row.texts)] for row in rows]
    # Slots fall: what stands first has the highest value.
    slots = [[-i for i in range(len(row.texts))] for row in rows]
    return {key: count for name, values in zip(UNTRAINED, (lengths, slots, likely), strict=True)
            for key, count in by_value(name, rows, values).items()}


def trained(config: Config, file: Path, half: list[Shown], other: list[Shown]) -> Counts:
    """On one half of the panes, of a reward model of each kind that the other half has trained."""
    run, result = Run(config), {}
    suggester = Suggester(players_of(run).writer)
    # The slot filter: what drew more clicks than an option before it.
    rows = [(row.context, pairs) for row in other
            if (pairs := [pair for pair in row.pairs if pair[0] > pair[1]])]
    if not rows:
        raise UserError(f"{file}: no option of one half drew more clicks than one before it")
    key = digest(file_digest(file), config.reward, config.generator, config.run.seed)
    for kind in config.reward.kinds:
        run.folder.once(f"reward/{kind}", key, partial(train_reward, run, suggester, rows, kind))
        scores = scores_of(load_reward(run, suggester, kind), half)  # whom it has not seen
        result |= counted(named(kind), half, [(s.p - 0.5).tolist() for s in scores])
    return result


def page(counts: Counts, head: str) -> str:
    """Accuracy of every method with its interval over queries, and models against the untrained."""
    seeds, rows = [{"pairs": counts}], []
    names = list(dict.fromkeys(key.rpartition(f", {PARTS[0]}")[0] for key in counts
                               if key.endswith(PARTS[0])))

    def cell(more: str, less: str = "", form: str = ".3f") -> str:
        return written(*pooled_interval(seeds, "accuracy", more, less)[0], form)

    for name in names:
        gaps = ["–" if name in UNTRAINED else
                cell(f"{name}, {PARTS[0]}", f"{other}, {PARTS[0]}", "+.3f") for other in UNTRAINED]
        rows.append([name, *(cell(f"{name}, {part}") for part in PARTS), *gaps])
    return head + markdown_table(["", *PARTS, *(f"minus {name}" for name in UNTRAINED)], rows)


def write_panes(file: Path, config: Config, out: Path) -> None:
    """panes.md and panes.json, the counts by query from which its intervals come."""
    folder = Path(config.run.root) / config.run.name
    print(import_mimics([file], folder / "dialogues.jsonl"), flush=True)
    rows = panes_of(folder / "dialogues.jsonl")
    parts = halves(rows, config.run.seed)
    counts = untrained(rows, Suggester(players_of(Run(config)).writer))
    for number, half in enumerate(parts):
        fold = config.model_copy(deep=True)
        fold.run.name = f"{config.run.name}-{number}"
        # Each half by the models of the other: together they are all queries.
        for key, queries in trained(fold, file, half, parts[1 - number]).items():
            counts.setdefault(key, {}).update(queries)
    pairs = sum(len(row.pairs) for row in rows)
    queries = len({query_of(row) for row in rows})
    epochs, model = config.reward.epochs, Path(llm.model_path(config.generator)).name
    text = page(counts, (
        f"# Reward models on real panes\n\n`python -m tables.panes {escape(file.name)}`: {pairs} "
        f"pairs of options of {len(rows)} panes, {queries} queries; generator {escape(model)}, "
        f"{epochs} epochs, seed {config.run.seed}. Share of pairs whose more clicked option is "
        "preferred, 95 % bootstrap intervals over queries; right-hand columns: differences, on all "
        "pairs. Each model was trained on pairs in which the later option drew more clicks, of the "
        "half of the queries that it is not tested on.\n\n"))
    write_text(out / "panes.md", text)
    write_text(out / "panes.json", json.dumps(counts, separators=(",", ":")))
    print(f"{text}\n{out / 'panes.md'}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tables.panes",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="JSON lines as of MIMICS-Duo")
    parser.add_argument("--config", default=str(ROOT / "configs" / "garm.yaml"))
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="default: results")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args()
    if not given.file.is_file():
        raise UserError(f"{given.file}: no such file")
    llm.settle_libraries()
    config = load_config(given.config, ["run.name=panes", *given.settings])
    write_panes(given.file, config, given.out)


if __name__ == "__main__":
    script(main)
