"""Stage `dialogues`: contexts, suggestions and clicks of a log, cleaned and split (appendix C).

    python train.py --config configs/garm.yaml --stage dialogues data.dialogues=mine.jsonl

C.1 in its three phases: contexts, single suggestions, groups of three; what is cut is counted by
reason. People, not contexts, are split; the last four weeks of a longer log are W1 to W4, on which
nothing is trained (section 4.3.3).

Departures: rules in place of prompts find what is meaningless; languages are told by script. Unsafe
contexts are taken from what suggestions are learned on, and kept to teach the word Unsafe.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import data
import garm
import roles
from files import UserError, read_json, write_json
from roles.players import Players
from roles.suggester import Suggester
from roles.text import words_of
from run import Run

DRIFT_WEEKS = 4  # W1 to W4
MOST_CHARACTERS = 95  # of a suggestion (C.1)
# Of a context, for data.train, .valid, .judge and .test; contexts of RL are disjoint (C.3).
SPLITS = {"train": "train", "valid": "valid", "judge": "rl", "test": "test"}


@dataclass(frozen=True)
class Context:
    """A cleaned context of the log, and what it is for."""

    dialogue: data.Dialogue
    split: str  # train: SFT and reward models; rl; valid: fusion; test
    week: int  # 0: trained on; 1 to 4: W1 to W4

    @property
    def turns(self) -> list[data.Turn]:
        return self.dialogue.turns

    @property
    def unsafe(self) -> bool:
        return bool(self.dialogue.unsafe)

    @property
    def queries(self) -> list[str]:
        """What the user has said, oldest first."""
        return [turn.content for turn in self.turns if turn.role == "user"]


def stage_dialogues(run: Run, players: Players, key: str) -> dict:
    """Clean the log's contexts and write them; count what each phase cuts."""
    # A row that cannot be read refuses the file, with its line: data.read_dialogues.
    rows, cut = data.read_dialogues(run.dialogues_file), Counter()
    kept = clean_contexts(rows, cut)
    if not kept:
        raise UserError(f"{run.dialogues_file}: no context is left: {dict(cut)}")
    data.write_dialogues(run.folder / "dialogues" / "contexts.jsonl", kept)
    # By the whole log: what is cut at either end of it must move nobody to another week.
    write_json(run.folder / "dialogues" / "weeks.json", weeks_of(rows))
    contexts, suggester = read_contexts(run), Suggester(players.writer)
    single, groups = Counter(), Counter()
    for context in contexts:
        clicked_suggestions(context, single)
        clicked_list(context, run, groups)
    splits = Counter(c.split if c.week == 0 else f"W{c.week}" for c in contexts)
    shortened = sum(suggester.prompt_and_cut(context.turns)[1] > 0 for context in contexts)
    return {
        "contexts": len(rows), "kept": len(kept), "unsafe": sum(c.unsafe for c in contexts),
        "cut": dict(cut), "suggestions": dict(single), "lists": dict(groups),
        "splits": dict(sorted(splits.items())), "longer_than_the_prompt": shortened}


# ------------------------------------------------------------------------------ phase 1: contexts


def clean_contexts(rows: Iterable[data.Dialogue], cut: Counter) -> list[data.Dialogue]:
    """Contexts that are fit to learn from; cut: reason -> how many are not."""
    rows, kept, seen = list(rows), [], set()
    # Where nobody has labelled anything, everything is taken for safe.
    labelled = any(row.unsafe is not None for row in rows)
    for row in rows:
        said = tuple(turn.content for turn in row.turns)
        shown = (said, tuple(row.suggestions))
        if labelled and row.unsafe is None:  # it may be one of those to be declined
            cut["safety unknown"] += 1
        elif not any(map(str.isalnum, " ".join(said))):
            cut["without words"] += 1
        elif shown in seen and not row.clicked:
            cut["repeated without a click"] += 1
        else:
            kept.append(row)
            seen.add(shown)
    return kept


def read_contexts(run: Run) -> list[Context]:
    """The contexts that this stage has kept, split by a hash of the person and by week."""
    rows = data.read_dialogues(run.folder / "dialogues" / "contexts.jsonl")
    # People, so that what somebody likes is not both learned and tested.
    people = {row.dialogue_id: row.user_id or row.dialogue_id for row in rows}
    splits = run.split(set(people.values()))
    weeks = read_json(run.folder / "dialogues" / "weeks.json")
    return [
        Context(row, SPLITS[splits[people[row.dialogue_id]]], weeks[row.dialogue_id])
        for row in rows]


def weeks_of(rows: list[data.Dialogue]) -> dict[str, int]:
    """dialogue_id -> 1 to 4 in the last four weeks of a log that is longer, else 0."""
    stamps = [row.timestamp for row in rows if row.timestamp]
    if not stamps:
        return {row.dialogue_id: 0 for row in rows}
    # Whole weeks from the log's first day.
    start = min(stamps).replace(hour=0, minute=0, second=0, microsecond=0)
    first = (max(stamps) - start) // timedelta(weeks=1) + 1 - DRIFT_WEEKS  # the week that is W1
    return {
        row.dialogue_id: max(0, (row.timestamp - start) // timedelta(weeks=1) - first + 1)
        if row.timestamp and first > 0 else 0
        for row in rows}


def chosen(contexts: Iterable[Context], split: str, unsafe: bool = False) -> list[Context]:
    """Those of week 0 in a split."""
    return [c for c in contexts if c.split == split and c.week == 0 and c.unsafe == unsafe]


# ----------------------------------------------------------- phases 2 and 3: suggestions and lists


def clean_suggestion(text: str, context: Context) -> tuple[str, str]:
    """(text with its spelling in order, reason why it is not fit to learn or "")."""
    # One form for characters that can be composed.
    text = unicodedata.normalize("NFC", _decoded(text))
    text = re.sub(r"([?!.,。？！])\1+$", r"\1", " ".join(text.split()))  # one mark ends it
    asked, script = garm.script_of(context.queries[-1]), garm.script_of(text)
    if len(text) > MOST_CHARACTERS:
        return text, "long"
    if asked and script and asked != script:
        return text, "language"
    # A word alone says nothing, but for scripts without spaces.
    if len(words_of(text)) < 2 and script not in ("CJK", "KANA"):
        return text, "meaningless"
    if roles.normal_form(text) in map(roles.normal_form, context.queries):
        return text, "repeats a query"
    return text, ""


def _decoded(text: str) -> str:
    """UTF-8 that was read as Windows-1252 ("cafÃ©") as it was written."""
    try:
        return text.encode("cp1252").decode() if re.search("[ÂÃâ]", text) else text
    except UnicodeError:
        return text


def clicked_suggestions(context: Context, counts: Counter) -> list[str]:
    """The clicked suggestions of a context after phase 2; counts: reason or "kept" -> how many."""
    kept = []
    # A slot may stand twice in a log; the order is that of the list.
    for slot in sorted(set(context.dialogue.clicked)) if not context.unsafe else ():
        text, reason = clean_suggestion(context.dialogue.suggestions[slot], context)
        counts[reason or "kept"] += 1
        kept += [] if reason else [text]
    return kept


def clicked_list(context: Context, run: Run, counts: Counter) -> list[str]:
    """All suggestions of a clicked list after phases 2 and 3; [] if it is not fit whole."""
    shown = context.dialogue.suggestions
    if context.unsafe or not context.dialogue.clicked or len(shown) != garm.NUM_SUGGESTIONS:
        return []
    # A list is fit whole or not at all: two of three would teach to write two.
    texts, reasons = zip(*(clean_suggestion(text, context) for text in shown), strict=True)
    reason = next(filter(None, reasons), "")
    if not reason and len(distinct(list(texts), run)) < len(texts):
        reason = "alike"
    if not reason and len({garm.script_of(text) for text in texts} - {None}) > 1:
        reason = "languages"
    counts[reason or "kept"] += 1
    return [] if reason else list(texts)


def distinct(texts: list[str], run: Run) -> list[str]:
    """The first three that differ enough (3.4), or fewer."""
    # Rows are unit vectors: products are cosines.
    vectors = run.encoder(texts)  # (N, D)
    return [texts[i] for i in garm.assemble(texts, vectors @ vectors.T)]
