"""What breaks, and what is left of a run then: kills, full disks, damage, other people's text.

    python -m benchmarks.faults                        # every row; writes results/reliability.md
    python -m benchmarks.faults --tries 4 --only resume sigterm     # less of it, these rows anew

Stages run in miniature (benchmarks/kills.py) in forked processes: `kill -9` after a seeded share of
a stage's CPU time, or at a seeded sync or rename, then the same command again, then every byte of
the run folder against a run that nothing disturbed. What tests cover already is run by pytest and
counted. Rows that were not run keep what they were last, and are marked where they never were.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}  # before torch: forks
sys.path.append(str(Path(__file__).parents[1] / "tests"))  # tests import each other by name

from benchmarks import fault_inputs, fault_runs  # noqa: E402
from files import ROOT, read_json, write_json  # noqa: E402

PAGE, KEPT = ROOT / "results" / "reliability.md", ROOT / "results" / "reliability.json"


@dataclass
class Row:
    """What came of one row of the table."""

    tries: int = 0
    seen: Counter = field(default_factory=Counter)  # outcome -> how often
    broken: list[str] = field(default_factory=list)  # what a promise did not hold in
    seconds: float = 0.0  # of CPU, children included

    def count(self, outcome: str, fault: str = "") -> None:
        """One try; fault: why the promise is broken, if it is."""
        self.tries += 1
        self.seen["broken" if fault else outcome] += 1
        if fault:
            self.broken.append(fault)
            print(f"  broken: {fault}", flush=True)


def tested(files: str, chosen: str) -> Callable:
    """A row that runs these tests by pytest, the hypothesis ones with more examples; chosen: as -k
    takes it, empty for whole files."""

    def run(bench: fault_runs.Bench, row: Row) -> None:
        report = bench.folder / "report.xml"
        paths = [path for name in files.split() if (path := ROOT / "tests" / name).is_file()]
        subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "--hypothesis-profile=many",
             f"--junitxml={report}", "-k", chosen, *map(str, paths)], cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for case in xml.parse(report).iter("testcase"):
            bad = [*case.iter("failure"), *case.iter("error")]
            skipped = any(True for _ in case.iter("skipped"))
            row.count("tests skipped" if skipped else "tests passed",
                      f"{case.get('classname')}.{case.get('name')}" if bad else "")

    return run


# Row -> (promise, what runs it).
ROWS: dict[str, tuple[str, Callable]] = {
    "resume": ("exact resume: kill -9 in each stage, 1 in 4 at a sync or rename; the same command "
               "again: weights, artifacts and metric log bit for bit", fault_runs.resume),
    "atomic": ("a kill at every write, sync and rename of a save leaves old or new; a flipped or "
               "cut file of a finished run is named in one line, or made again as it was",
               fault_runs.atomic),
    "sigterm": ("SIGTERM: code 143 within 30 s, nothing half left, resumed bit for bit",
                fault_runs.sigterm),
    "disk": ("full disk (a limit on files' size), read-only folders: one line, code 2, earlier "
             "artifacts intact; goes on where there is room again", fault_runs.disk),
    "settings": ("other data, base model, loss or beta: refused by the field's name, with the "
                 "commands to go on or to start anew; config.yaml stays", fault_runs.settings),
    "nan": ("NaN or infinite loss: stops before the optimiser's step, names step and examples",
            fault_runs.nan),
    "determinism": ("same seed, same machine: identical files", fault_runs.determinism),
    "data": ("malformed files: an error with its line, or a clean read; 2 GB in a line: flat "
             "memory", fault_inputs.malformed),
    "parser": ("fuzzed outputs: never raises, nothing has a reason, never two starters in one",
               fault_inputs.parser),
    "control": ("control text: every added token of three tokenizers at 20 places of a text; 200 "
                "delimiters and 100 instructions that a model obeys", fault_inputs.control),
    "strangers": ("strangers' artifacts: planted pickles never run; names that are paths, and "
                  "links, are refused", fault_inputs.strangers),
    "truncation": ("what is cut or dropped is counted (tests of that name)", tested(
        "test_garm_stages.py test_prompts.py test_suggest.py test_llm.py",
        "cut or beyond_the_prompt or empty_input")),
    "llm": ("remote LLM: time-outs, resets, 429, 500, a slow drip, an endless body, wrong JSON, "
            "redirects, refused fields and roles (tests of test_chat.py that ask a server, and of "
            "test_answers.py)",
            tested("test_chat.py test_answers.py", "not local and not reading")),
    "service": ("service: kills, SIGTERM, overload, clients that leave, a failing and a damaged "
                "store, two servers on it, keys, other sites, bad asks, half heads, slow bodies, "
                "deletions, nobody's text in another's answer (every test of test_serve.py, "
                "test_store.py and test_suggest.py)",
                tested("test_serve.py test_store.py test_suggest.py", "")),
}


def cpu() -> float:
    """Seconds of CPU of this process and of its children that have ended."""
    return sum(os.times()[:4])


def page(kept: dict[str, dict]) -> str:
    """results/reliability.md from what the rows have counted."""
    lines = [
        "# Faults\n", "```bash\npython -m benchmarks.faults\n```\n",
        "Each try is a fault and what is left after it; icebreaker, garm and qualeqs in miniature "
        "where a row is about runs (benchmarks/kills.py says with what in place of models). "
        "Seconds are of CPU; `--tries` (kills of a stage, flips of a run, …) is what the command "
        "was given.\n",
        "| row | promise | `--tries` | tries | seen | broken | seconds |", "|---" * 7 + "|",
    ]
    for name, (promise, _) in ROWS.items():
        row = kept.get(name)
        cells = ["–", "–", "not run", "–", "–"] if row is None else [
            str(row.get("asked", "–")),  # of rows from before it was noted
            f"{row['tries']:,}", ", ".join(f"{k} {n:,}" for k, n in row["seen"].items()),
            str(len(row["broken"])), f"{row['seconds']:.0f}"]
        some = row and name in fault_runs.OF_RUNS and row["methods"] != [*fault_runs.METHODS]
        label = f"{name} ({', '.join(row['methods'])} alone)" if some else name
        lines.append(f"| {label} | {promise} | " + " | ".join(cells) + " |")
    broken = [f"- {name}: {fault}" for name, row in kept.items() for fault in row["broken"]]
    return "\n".join([*lines, *(["\nBroken:\n", *broken] if broken else [])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tries", type=int, default=20, help="kills of a stage, flips of a run, …")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", default=[*ROWS],
                        help=", ".join(ROWS))
    parser.add_argument("--methods", nargs="+", choices=fault_runs.METHODS,
                        default=[*fault_runs.METHODS], metavar="METHOD")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = fault_runs.Bench(Path(folder), arguments.methods, arguments.tries)
        for name in arguments.only:
            print(f"{name}: running", flush=True)
            row, before, started = Row(), cpu(), time.monotonic()
            ROWS[name][1](bench, row)
            row.seconds = cpu() - before
            kept = read_json(KEPT) if KEPT.is_file() else {}
            write_json(KEPT, kept | {name: vars(row) | {
                "seen": dict(row.seen), "methods": arguments.methods, "asked": arguments.tries}})
            PAGE.write_text(page(read_json(KEPT)), encoding="utf-8")
            print(f"{name}: {row.tries} tries, {dict(row.seen)}, {row.seconds:.0f} CPU s, "
                  f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
