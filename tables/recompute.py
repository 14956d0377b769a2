"""Whether the pages of results/ say what the values by user beside them give, to the last digit.

    python -m tables.recompute            # or a folder; exit code 1 if a page differs

Every page names the command that makes it from values/. Here it is made again, every mean and
interval of it, and compared line by line: tables and lists, where figures stand, and not the prose
around them, which may have been worded anew since.
"""

import argparse
import contextlib
import io
import re
import shlex
import shutil
import sys
import tempfile
from itertools import zip_longest
from pathlib import Path

from config import Config
from files import ROOT, UserError, script
from tables import garm, later, overview, qualeqs, seeds, siblings

COMMAND = re.compile(
    r"python (eval\.py --over|eval\.py --later|-m tables\.(?:garm|qualeqs|overview))\b(.*?)[`\n]")
# Command -> what makes the page `out` from files of values.
MAKERS = {
    "eval.py --over": seeds.write_over,
    "eval.py --later": lambda files, out: later.write_later(Config(), files, out),
    "-m tables.garm": lambda files, out: siblings.again(garm.PAPER, files),
    "-m tables.qualeqs": lambda files, out: siblings.again(qualeqs.PAPER, files),
    "-m tables.overview": lambda files, out: overview.write(out.parent),
}


def figures(text: str) -> list[str]:
    """Lines of a page that hold figures: rows of tables, items of lists that end in a verdict."""
    return [line for line in text.splitlines() if re.match(r"\||- .*\*\*$", line)]


def difference(page: Path, command: str, words: str) -> str | None:
    """The first line in which a page differs from what its values give, or None."""
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        out = Path(place) / page.name
        shutil.copytree(page.parent / "values", out.parent / "values")
        # By the names alone, so that a copy of results/ is judged by its own values.
        names = [Path(word).name for word in shlex.split(words)]
        try:
            MAKERS[command]([str(out.parent / "values" / name) for name in names], out)
        except (OSError, UserError) as error:
            return str(error)
        texts = (some.read_text(encoding="utf-8") for some in (page, out))
        pairs = zip_longest(*map(figures, texts), fillvalue="no line")
        return next((f"{said}  (values: {given})" for said, given in pairs if said != given), None)


def recompute(folder: Path) -> bool:
    """Print a line for each page of a folder; whether there are any, and all are equal."""
    pages = {page: COMMAND.search(page.read_text(encoding="utf-8"))
             for page in sorted(folder.glob("*.md"))}
    pages, equal = {page: match.groups() for page, match in pages.items() if match}, True
    for page, command in pages.items():
        fault = difference(page, *command)
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
