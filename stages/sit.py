"""Stage `sit`: supervised interest-expanded instruction tuning on a teacher's lists, Eq. (5).

    python train.py --stage sit

Section 2.3 of the paper. The loss is on the list's tokens only; lists of one prompt share its row.

Departures: LoRA instead of full fine-tuning; beside the teacher's lists for the run's own users
(whoever plays the teacher) rows of a corpus written by hand, docs/teacher_corpus.md.

Legend: C lists of a prompt, T tokens.
"""

import random
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

import llm
import roles
from config import SftConfig, SitConfig
from data import Record, Sentence, read_rows
from files import ROOT, UserError, gather, progress, share
from roles.players import Players
from roles.text import Encode, majority_language
from roles.writer import Writer
from run import Run, UserState
from stages.steps import micro_batches, new_optimiser, step

Rows = list[tuple[list[int], list[list[int]]]]  # (prompt ids, [list ids, ...]) of each user
CORPUS = ROOT / "configs" / "teacher_corpus.jsonl"


class CorpusRow(Record, extra="forbid"):
    """One person's interests, and starters that this person would tap."""

    language: Literal["en", "zh"]
    interests: Annotated[list[Sentence], Field(min_length=1)]
    starters: Annotated[list[Sentence], Field(min_length=1)]
    source: Sentence  # "invented", or "stackexchange:" and the user_id of a person there


def stage_sit(run: Run, players: Players, key: str) -> dict:
    """Supervised interest-expanded instruction tuning (Eq. 5) on the teacher's lists."""
    settings, k, writer = run.config.sit, run.config.generator.list_size, players.writer
    # A user counts once a slice of the log, as what is worth bringing up changes.
    rng, cuts = random.Random(run.seed("sit")), list(range(len(run.config.data.cuts)))
    states = draw_states(run, cuts, settings.max_rows, rng)
    taught = taught_lists(run, players, states, settings.lists_per_row, "sit")
    rows = full_rows(writer, states, taught, k)
    if not rows:
        raise UserError(
            "sit: the teacher wrote no full list for any user; generator.list_size may be larger "
            "than the interests allow")
    languages = Counter(majority_language(state.interests) for state in states)
    corpus, left_out = draw_corpus(run, languages, settings.corpus_rows, rng)
    taught_rows = len(rows)  # those of the corpus are mixed in: each epoch has its own order
    rows += [writer.encoded(*interests_and_list(row, k, run.encoder)) for row in corpus]
    model, figures = instruct(run, writer, rows, settings, "sit")
    if settings.own_lists:  # Table 8: once more, with what the policy has learned to write
        sampled = writer.sample(
            model, [s.interests for s in states], settings.own_lists, run.seed("sit", "own"))
        rows += full_rows(writer, states, sampled, k)
        del model  # before the next base is loaded
        model, figures = instruct(run, writer, rows, settings, "sit with own lists")
    llm.save_adapter(model, run.adapter("sit"))
    short = sum(len(starters) < k for lists in taught for starters in lists)
    counts = {"rows": len(rows), "teacher_rows": taught_rows, "corpus_rows": len(corpus)}
    left = {"short_lists_left_out": short, "corpus_rows_left_out": left_out}
    return {**counts, **left, **figures}


def read_corpus(path: str | Path = CORPUS) -> list[CorpusRow]:
    """Rows of the teacher corpus; raises DataError that lists every bad line."""
    return read_rows(path, CorpusRow)


def draw_corpus(run: Run, languages: Counter, limit: int,
                rng: random.Random) -> tuple[list[CorpusRow], int]:
    """At most `limit` rows of the corpus at random, their languages in the proportion of
    `languages` (language -> users); and how many rows were left out before drawing: those with
    fewer starters than a list has, and those of a real person who is in this run to be tested."""
    if not limit:
        return [], 0
    # Their titles must not be in the training of a model that is tested on them.
    tested = run.users.keys() - set(run.ids("train"))
    by_language: dict[str, list[CorpusRow]] = {}
    for row in read_corpus():
        if languages[row.language]:  # nobody here would read the others
            by_language.setdefault(row.language, []).append(row)
    total, drawn, left_out = sum(languages[lang] for lang in by_language), [], 0
    for lang, rows in by_language.items():
        usable = [row for row in rows if len(row.starters) >= run.config.generator.list_size
                  and row.source.removeprefix("stackexchange:") not in tested]
        left_out += len(rows) - len(usable)
        quota = round(limit * languages[lang] / total)
        drawn += rng.sample(usable, min(quota, len(usable)))
    return drawn, left_out


def interests_and_list(row: CorpusRow, k: int, encode: Encode) -> tuple[list[str], list[list[str]]]:
    """Its interests, and one list of k of its starters in which the interests take turns."""
    # As of what an LLM as teacher writes beyond K, the shorter ones first: a policy overshoots the
    # length that it has seen. The interests stay as the file has them, though a user's come best
    # first: who wrote a row has not ranked them.
    parts = str.split if row.language == "en" else list  # words, or characters
    starters = sorted(row.starters, key=lambda text: len(parts(text)))
    return row.interests, [roles.covering(starters, row.interests, k, encode)]


def instruct(run: Run, writer: Writer, rows: Rows, settings: SitConfig | SftConfig, label: str,
             adapter: Path | None = None) -> tuple[torch.nn.Module, dict[str, float]]:
    """An adapter, tuned on (prompt ids, [list ids, ...]) rows; and its losses.

    adapter: a saved one that is tuned further; None: a new one.
    """
    g, rng = run.config.generator, random.Random(run.seed(label, "order"))
    model = writer.policy(adapter, trainable=True)
    if not adapter:
        model = llm.add_lora(model, g.lora_rank, g.lora_alpha, run.seed("lora"))
    size, losses = settings.batch_users, []  # users of a step, over all processes
    steps = settings.epochs * -(-len(rows) // size)  # the last batch may be smaller
    optimiser, schedule = new_optimiser(model, settings.learning_rate, steps)
    policy = llm.averaged_gradients(model)
    for epoch in range(settings.epochs):
        order = rng.sample(range(len(rows)), len(rows))
        for start in (bar := progress(range(0, len(rows), size), f"{label} epoch {epoch + 1}")):
            batch = [rows[i] for i in order[start : start + size]]
            tokens = sum(len(ids) for _, lists in batch for ids in lists)  # T of all processes
            parts = []  # of the batch's loss, by micro-batch
            for part, factor in micro_batches(batch, g.micro_batch):
                prompts, lists = map(list, zip(*part, strict=True))
                logps = policy(prompts, lists)  # summed over a list's tokens, (C,) a prompt
                loss = -torch.cat(logps).sum() / tokens * factor  # Eq. (5)
                loss.backward()
                parts.append(loss.item())
            losses.append(float(np.mean(gather([sum(parts)]))))  # a mean per token
            rate = schedule.get_last_lr()[0]  # the one that this step uses
            step(model, optimiser, schedule, f"{label}, step {len(losses)}",
                 (f"row {i}" for i in order[start : start + size]))
            at = {"epoch": epoch, "step": len(losses)}
            run.folder.log(label, **at, loss=losses[-1], learning_rate=rate)
            bar.set(loss=losses[-1])
    last = losses[steps - steps // settings.epochs :]  # of the last epoch
    cut = writer.cut_prompts(prompt for prompt, _ in rows)
    return model, {"first_loss": losses[0], "loss": float(np.mean(last)), "prompts_cut": cut}


def full_rows(writer: Writer, states: list[UserState], lists: list[list[list[str]]],
              k: int) -> Rows:
    """Prompts and the full lists of each user as token ids; users without one are left out."""
    rows = []
    for state, written in zip(states, lists, strict=True):
        full = [starters for starters in written if len(starters) == k]
        if full:
            rows.append(writer.encoded(state.interests, full))
    return rows


def draw_states(run: Run, cuts: list[int], limit: int, rng: random.Random) -> list[UserState]:
    """Train users with interests at these cuts: at random, at most `limit` states (0: all)."""
    states = [run.states[u][c] for u in run.ids("train") for c in cuts]
    states = [state for state in states if state.interests]  # others have nothing to write about
    return rng.sample(states, limit) if 0 < limit < len(states) else states


def taught_lists(run: Run, players: Players, states: list[UserState], n: int,
                 purpose: str) -> list[list[list[str]]]:
    """n lists of the teacher for each state, filtered; fewer where an LLM's call failed.

    The processes of a torchrun ask for a share each.
    """
    if not n:
        return [[] for _ in states]
    orders = [(s.interests, run.seed("teacher", purpose, s.interests, i))
              for s in share(states) for i in range(n)]
    inputs, seeds = [interests for interests, _ in orders], [seed for _, seed in orders]
    lists = players.teach(inputs, seeds)  # None where the call failed
    return gather([[x for x in lists[i : i + n] if x is not None] for i in range(0, len(lists), n)])
