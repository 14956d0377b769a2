"""Whether the pages of results/ say what the values by user beside them give, to the last digit.

    python -m tables.recompute            # or a folder; exit code 1 if a page differs

A page of `eval.py --over` or `--later` begins with the command that makes it from values/. Here it
is made again, every mean and interval of it, and compared line by line: tables and lists, where
figures stand, and not the prose around them, which may have been worded anew since.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from itertools import zip_longest
from pathlib import Path

from files import ROOT, UserError, script
from tables import later, seeds

COMMAND = re.compile(r"^    (python eval\.py (--over|--later) (.+))$", re.MULTILINE)
# How a page's values are read, and the page made of them.
MAKERS = {"--over": (seeds.SeedRun, seeds.page), "--later": (later.Later, later.page)}


def figures(text: str) -> list[str]:
    """Lines of a page that hold figures: rows of tables, items of lists that end in a verdict."""
    return [line for line in text.splitlines() if re.match(r"\||- .*\*\*$", line)]


def difference(page: Path, command: str, option: str, files: str) -> str | None:
    """The first line in which a page differs from what its values give, or None."""
    kind, make = MAKERS[option]
    # By the names alone, so that a copy of results/ is judged by its own values.
    names = [Path(word).name for word in shlex.split(files)]
    text = page.read_text(encoding="utf-8")
    try:
        kept = [seeds.read_kept(kind, page.parent / "values" / name) for name in names]
    except (OSError, UserError) as error:
        return str(error)
    pairs = zip_longest(figures(text), figures(make(kept, command)), fillvalue="no line")
    return next((f"{said}  (values: {given})" for said, given in pairs if said != given), None)


def recompute(folder: Path) -> bool:
    """Print a line for each page of a folder; whether there are any, and all are equal."""
    pages = {page: COMMAND.search(page.read_text(encoding="utf-8"))
             for page in sorted(folder.glob("*.md"))}
    pages, equal = {page: found.groups() for page, found in pages.items() if found}, True
    for page, found in pages.items():
        fault = difference(page, *found)
        equal &= fault is None
        print(f"{page}: " + (f"differs: {fault}" if fault else "equals its values"))
    if not pages:
        print(f"{folder}: no page that values/ give")
    return equal and bool(pages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "results")
    sys.exit(0 if recompute(parser.parse_args().folder) else 1)


if __name__ == "__main__":
    script(main)
