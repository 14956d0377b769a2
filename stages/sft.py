"""Stage `sft`: a model of three suggestions, from clicks, by progressive data (paper 003, 3.4).

    python train.py --config configs/garm.yaml --stage sft sft.distillation=false   # Table 3

A single-suggestion teacher is tuned on clicked suggestions; it writes a pool of candidates for each
context; those that differ make a list of three (garm.assemble), on which the policy is tuned, with
the word Unsafe for contexts to be declined. Without distillation: all three of a clicked list.

Departures: the teacher is the generator itself with an adapter of its own, not a larger model; the
likeliest of what it wrote several times comes first.
"""

import random
from collections import Counter

import garm
import llm
from files import UserError, digest, read_json, write_json
from roles.players import Players
from roles.suggester import Suggester
from run import Run
from stages.dialogues import (
    Context,
    chosen,
    clean_suggestion,
    clicked_list,
    clicked_suggestions,
    distinct,
    read_contexts,
)
from stages.sit import instruct


def stage_sft(run: Run, players: Players, key: str) -> dict:
    """Teacher, pool, assembly, and the three-suggestion model."""
    settings, suggester = run.config.sft, Suggester(players.writer)
    safe, unsafe = training_contexts(run)
    if settings.distillation:
        lists, figures = distilled(run, suggester, safe, key)
    else:
        lists, figures = {c.dialogue.dialogue_id: clicked_list(c, run, Counter()) for c in safe}, {}
    # The clicked order is the log's; the assembled one has the likeliest first.
    answers = [(c, garm.format_answer(three)) for c in safe
               if (three := lists[c.dialogue.dialogue_id])]
    if not answers:
        raise UserError("sft: no context has a list of three; raise sft.candidates")
    answers += [(c, garm.UNSAFE) for c in unsafe]
    rows = [suggester.encoded(c.turns, [answer]) for c, answer in answers]
    model, losses = instruct(run, players.writer, rows, settings, "sft")
    llm.save_adapter(model, run.adapter("sft"))
    return {"rows": len(rows), "unsafe": len(unsafe), **figures, **losses}


def training_contexts(run: Run) -> tuple[list[Context], list[Context]]:
    """Contexts with a click that is fit to learn, and contexts to decline, drawn at random."""
    settings, rng = run.config.sft, random.Random(run.seed("sft contexts"))
    contexts = read_contexts(run)
    # A click whose text is not fit to learn is none.
    clicked = [c for c in chosen(contexts, "train") if clicked_suggestions(c, Counter())]
    if not clicked:
        raise UserError("sft: no context of the log's first part has a click to learn from")
    safe = rng.sample(clicked, min(settings.max_contexts or len(clicked), len(clicked)))
    # A share of both: of 90 that are answered and a share of 0.1 it is 10.
    wanted = round(settings.unsafe / (1 - settings.unsafe) * len(safe))
    # Nobody clicks on an answer that declines: the log's own labels say what is unsafe.
    unsafe = chosen(contexts, "train", unsafe=True)
    # Few are unsafe in a log (C.1: 3 %), and where nobody has labelled any, none is known.
    if len(unsafe) < wanted / 2:
        print(f"  sft: {len(unsafe)} contexts to decline in the log, sft.unsafe asks for {wanted}; "
              "of too few a policy learns to decline nothing")
    return safe, rng.sample(unsafe, min(wanted, len(unsafe)))


def distilled(run: Run, suggester: Suggester, contexts: list[Context],
              key: str) -> tuple[dict[str, list[str]], dict]:
    """A list of three for each context, [] where the teacher wrote no three that differ."""
    settings = run.config.sft
    folder, teacher_key = "sft/teacher", digest(key, "teacher")
    if run.folder.begin(folder, teacher_key):  # a killed stage goes on behind it
        rows = [suggester.encoded(c.turns, clicked_suggestions(c, Counter()), "one")
                for c in contexts]
        # A context with several clicks is one row: its suggestions share the prompt.
        model, losses = instruct(run, suggester.writer, rows, settings, "teacher")
        llm.save_adapter(model, run.adapter("teacher"))
        turns = [c.turns for c in contexts]
        # Sampled side by side: a context is read once for all its candidates.
        pools = suggester.texts(suggester.rollouts(
            model, turns, settings.candidates, run.seed("pool"), "one"))
        write_json(run.folder / folder / "pools.json", pools)
        run.folder.mark_done(folder, teacher_key, **losses)
    pools, counts, lists = read_json(run.folder / folder / "pools.json"), Counter(), {}
    for context, pool in zip(contexts, pools, strict=True):
        # Phase 3: what is too like a better one is left out.
        three = distinct(clean_pool(pool, context, counts), run)
        # Two would teach to write two.
        full = len(three) == garm.NUM_SUGGESTIONS
        counts["lists" if full else "pools without three"] += 1
        lists[context.dialogue.dialogue_id] = three if full else []
    # What the teacher's sub-step has noted, whether it ran now or before a kill.
    teacher = run.folder.figures(folder)
    return lists, {"teacher": teacher, "candidates": dict(counts)}


def clean_pool(pool: list[str], context: Context, counts: Counter) -> list[str]:
    """Candidates of a context after phase 2, each once, what came most often first."""
    clean = []  # with repeats: how often a text was written says how likely it is
    for text in pool:
        text, reason = clean_suggestion(text, context)
        counts[reason or "candidates"] += 1
        clean += [] if reason else [text]
    return [text for text, _ in Counter(clean).most_common()]
