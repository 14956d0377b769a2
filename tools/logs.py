"""A log of one's own: what it holds, conversations from elsewhere, mined pairs for other trainers.

    python -m tools.logs check users.jsonl    # or impressions, dialogues, a catalogue
    python -m tools.logs import chatgpt conversations.json --out users.jsonl  # or another of KINDS
    python -m tools.logs import mimics mimics_duo.jsonl --out dialogues.jsonl
    python -m tools.logs export trl runs/default --out pairs.jsonl            # for TRL's DPOTrainer
    python -m tools.logs export dialogues runs/garm/serve.sqlite --out dialogues.jsonl
"""

import argparse
import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import data
from config import load_config
from data import Dialogue, Impression, Product, User
from files import UserError, read_json, script, write_lines
from roles.languages import language
from serving.store import Store
from tools.importers import KINDS, import_mimics, import_users


def describe_users(users: list[User]) -> dict[str, object]:
    """Return what a users file holds, as label -> figure."""
    sessions = [s for u in users for s in u.sessions]
    texts = [s.summary for s in sessions if s.summary]  # messages have none before `summarize`
    # Within each user: two people who ask the same are no repeat.
    distinct = sum(len({s.summary for s in u.sessions if s.summary}) for u in users)
    languages = Counter(map(language, texts)).most_common()
    return {
        "users": len(users),
        "sessions": len(sessions),
        "sessions per user": _spread([len(u.sessions) for u in users]),
        "exact repeats within a user": f"{1 - distinct / len(texts):.1%}" if texts else "none",
        "languages": ", ".join(f"{name} {n / len(texts):.1%}" for name, n in languages) or "none",
        "characters per summary": _spread([len(text) for text in texts]),
        "sessions without a summary": len(sessions) - len(texts),
        # One without a time, and a user's sessions count in the order of the file.
        "sessions without a timestamp": sum(s.timestamp is None for s in sessions),
        "users without a profile": sum(not u.profile for u in users),
        "users without a session": sum(not u.sessions for u in users),
        "likely robots": sum(map(_is_robot, users))}


def _spread(values: list[int]) -> str:
    return f"min {min(values)}, median {median(values):g}, max {max(values)}" if values else "none"


def _is_robot(user: User) -> bool:
    texts = Counter(s.summary for s in user.sessions if s.summary)
    n = len(user.sessions)
    return n >= 20 and max(texts.values(), default=0) >= 0.9 * n  # people repeat 23 % of theirs


def describe_impressions(impressions: list[Impression]) -> dict[str, object]:
    """Return what an impressions file holds, as label -> figure."""
    rate, by_slot = _clicks([(i.starters, i.clicked) for i in impressions])
    unclicked = sum(not i.clicked for i in impressions)  # real logs: 50 to 90 %
    return {
        "lists": len(impressions),
        "users": len({i.user_id for i in impressions}),
        "starters per list": _spread([len(i.starters) for i in impressions]),
        "distinct starters": len({text for i in impressions for text in i.starters}),
        "starters clicked": rate,
        "lists without a click": f"{unclicked / len(impressions):.1%}",
        "clicks by slot": by_slot,  # not comparable: the first slot is seen most
        "lists without a timestamp": sum(i.timestamp is None for i in impressions),
        # Where it is missing, a tap counts as one that led on middling far (icebreaker).
        "lists without sessions_after": sum(i.sessions_after is None for i in impressions)}


def _clicks(lists: list[tuple[list[str], list[int]]]) -> tuple[str, str]:
    """(share of all that was shown that was clicked, clicks by slot) of (texts, clicked slots)."""
    shown = Counter(slot for texts, _ in lists for slot in range(len(texts)))
    clicked = Counter(slot for _, slots in lists for slot in set(slots))  # two taps count once
    by_slot = [f"{clicked[slot]} ({clicked[slot] / n:.1%})" for slot, n in sorted(shown.items())]
    return f"{clicked.total() / max(1, shown.total()):.1%}", ", ".join(by_slot) or "none"


def describe_dialogues(dialogues: list[Dialogue]) -> dict[str, object]:
    """Return what a dialogues file holds, as label -> figure."""
    shown = [d for d in dialogues if d.suggestions]
    rate, by_slot = _clicks([(d.suggestions, d.clicked) for d in shown])
    intents = Counter(d.intent or "not told" for d in dialogues).most_common()
    return {
        "contexts": len(dialogues),
        "users": len({d.user_id for d in dialogues if d.user_id}),
        "turns of the user": _spread([sum(t.role == "user" for t in d.turns) for d in dialogues]),
        "intents": ", ".join(f"{name} {n / len(dialogues):.1%}" for name, n in intents),
        "unsafe contexts": sum(bool(d.unsafe) for d in dialogues),
        "contexts without suggestions": len(dialogues) - len(shown),
        "suggestions per list": _spread([len(d.suggestions) for d in shown]),
        "distinct suggestions": len({text for d in shown for text in d.suggestions}),
        "suggestions clicked": rate,
        "lists without a click": f"{sum(not d.clicked for d in shown) / max(1, len(shown)):.1%}",
        "clicks by slot": by_slot,
        # Only these make pairs for a reward model: the slot filter (003, section 3.5).
        "lists clicked past the first": sum(bool(d.clicked) and 0 not in d.clicked for d in shown),
        "contexts without a timestamp": sum(d.timestamp is None for d in dialogues)}


def describe(path: str | Path) -> dict[str, object]:
    """Describe a file as what has most of its first rows' keys; the readers name what is no row."""
    first = itertools.islice(data.json_objects(path, data.Faults()), 20)  # one may have a typo
    keys = {key for _, row in first for key in row}
    kinds = {User: describe_users, Impression: describe_impressions, Dialogue: describe_dialogues,
             Product: lambda rows: {"products": len(rows)}}  # fmt: skip
    record = max(kinds, key=lambda record: len(keys & record.model_fields.keys()))
    try:
        return kinds[record](data.read_rows(path, record))
    except data.DataError as error:
        raise data.DataError(f"{error}; checked as {record.__name__.lower()}s") from None


def export_trl(run: str | Path) -> Iterator[dict]:
    """Preference pairs of a finished run's DPO rounds, as TRL's DPOTrainer takes them.

    The chat template is the tokenizer's, as in training here, but interests that went beyond
    generator.max_prompt_tokens there are not left out. Raises UserError if there are no rounds.
    """
    file, paths = Path(run) / "config.yaml", []
    if file.is_file():
        config = load_config(file)  # the prompts need the instruction and K
        # By number: an earlier training with more rounds may have left its pairs there too.
        paths = [Path(run) / f"dpo/round{n + 1}/pairs.json" for n in range(config.dpo.rounds)]
    if not (paths := [path for path in paths if path.is_file()]):
        raise UserError(f"{run}: no dpo/round*/pairs.json; run train.py --stage dpo first")
    import llm  # slow to load, and no other command needs it

    task = config.generator.instruction.format(n=config.generator.list_size)  # as llm.prompts
    # Rounds accumulate pairs in training, but each file holds those of its round alone.
    for pair in (pair for path in paths for pair in read_json(path)):
        prompt = _turn("user", "\n- ".join([task, *map(llm.plain, pair["interests"])]))
        chosen = _turn("assistant", llm.format_starters(pair["chosen"]))
        for starters in pair["rejected"].values():  # of each kind that was mined
            rejected = _turn("assistant", llm.format_starters(starters))
            yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def export_dialogues(store: str | Path) -> list[Dialogue]:
    """What a server of next queries has shown behind which turns, and what was tapped of it: for
    data.dialogues, to train the next reward model. Raises UserError if it has shown nothing."""
    if not Path(store).is_file():  # or it would be made
        raise UserError(f"{store}: no such file; it is serve.sqlite in the folder of a served run")
    with contextlib.closing(Store(store)) as held:
        rows = [row for row in held.taps.shown() if row.turns]
    if not rows:
        raise UserError(f"{store}: no next query was shown yet; clients say so by POST /v1/events")
    return [Dialogue(dialogue_id=f"served-{i}", user_id=row.user_id, timestamp=row.timestamp,
                     turns=row.turns, suggestions=row.starters, clicked=row.clicked)
            for i, row in enumerate(rows)]


def _turn(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="say what a file of users, lists or dialogues holds")
    check.add_argument("file")
    importer = commands.add_parser("import", help="logs from elsewhere as our own")
    importer.add_argument("kind", choices=[*KINDS, "mimics"])
    # Parts of one data set belong into one call: a person may stand in several.
    importer.add_argument("file", nargs="+", help="one file or the parts of one data set")
    # An export of ChatGPT is of one person and names nobody.
    importer.add_argument("--user", default="me", help="user_id of the one whose export it is")
    export = commands.add_parser("export", help="pairs of a run, or what a server has shown")
    export.add_argument("kind", choices=["trl", "dialogues"])
    export.add_argument("source", help="trl: folder of a finished run; dialogues: a server's store")
    for writer in (importer, export):
        writer.add_argument("--out", required=True)
    given = parser.parse_args()
    if "out" in given:
        out = given.out = Path(given.out).resolve()  # a link of one's own stays one
        if out.exists() and not out.is_file():
            raise UserError(f"--out {out}: is no file; name a new one or one to replace")
    if given.command == "check":
        for label, figure in describe(given.file).items():
            print(f"{label + ':':30} {figure}")
    elif given.command == "import":
        if out in (Path(file).resolve() for file in given.file):  # read while --out is written
            raise UserError(f"--out {out}: is the file to be imported")
        if given.kind == "mimics":
            print(import_mimics(given.file, given.out))
        else:
            print(import_users(given.kind, given.file, given.out, given.user))
    elif given.kind == "dialogues":
        data.write_dialogues(given.out, rows := export_dialogues(given.source))
        print(f"{len(rows)} contexts written to {given.out}")
    else:
        # A list: whatever is wrong with the run is said before a file is begun.
        write_lines(given.out, pairs := [*export_trl(given.source)])
        print(f"{len(pairs)} pairs written to {given.out}")


if __name__ == "__main__":
    script(main)
