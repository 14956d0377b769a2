"""The paper's tables: one run's (Table 1), or every table over seeds, claim by claim.

    python eval.py                                     # the same as train.py --stage eval
    python eval.py --reproduce all --seeds 3           # every table of the paper (tables/)
    python eval.py --reproduce garm --seeds 3          # those of From Clicks to Preference
    python eval.py --reproduce qualeqs --seeds 3       # those of QualEQS
    python eval.py --over runs/a runs/b                # finished runs of several seeds, together
    python eval.py --people users.jsonl                # every method writes for real people
    python eval.py --later users.jsonl eval.max_users=60   # do they ask it later? results/later.md

The metrics stand in stages/metrics.py, the stage in stages/eval.py.
"""

import argparse
from pathlib import Path

import train
from config import load_config
from files import ROOT, script
from tables import garm, later, people, qualeqs, reproduce, seeds, siblings

SIBLINGS = {paper.name: paper for paper in (garm.PAPER, qualeqs.PAPER)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", help="default: config.py's settings")
    parser.add_argument("--reproduce", nargs="+", metavar="TABLE", help="1 2 3 6 7 8 9 figure3 "
                        "serving beyond beta, or all; or garm; or qualeqs")
    parser.add_argument("--seeds", type=int, help="seeds 0, 1, ... of --reproduce: three; one "
                        "with --quick")
    parser.add_argument("--first-seed", type=int, default=0, help="100 and above: to choose "
                        "settings on; the report goes to runs/partial")
    parser.add_argument("--quick", action="store_true", help="--reproduce small, in minutes")
    parser.add_argument("--over", nargs="+", metavar="RUN", help="run folders, or files of "
                        "results/values/, that differ in their seeds alone: one page")
    parser.add_argument("--people", metavar="FILE", help="a users.jsonl: every method writes for "
                        "eval.examples of its people; a page to read, one to mark blind")
    parser.add_argument("--later", nargs="+", metavar="FILE", help="users.jsonl files: starters "
                        "from the past of eval.max_users people each, judged by what they asked "
                        "later; or files of results/values/: the same page")
    parser.add_argument("--marks", nargs="+", metavar="FILE", help="readers' marks of that page, "
                        "JSON lines: counted into its head")
    parser.add_argument("--out", type=Path, help="of --people, --marks: a folder; of --over, "
                        "--later: a page. Default: results, results/seeds.md, results/later.md")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()  # settings may stand before or behind options
    # argparse gives all words that follow an option of many words to it, settings too.
    named = [*(arguments.reproduce or ()), *(arguments.later or ())]
    words = [word for word in named if "=" in word] + arguments.settings
    named, out = [word for word in named if "=" not in word], ROOT / "results"
    if arguments.over:
        seeds.write_over(arguments.over, arguments.out or out / "seeds.md")
    elif arguments.marks:
        people.add_marks(arguments.marks, arguments.out or out)
    elif arguments.reproduce:
        count = arguments.seeds or (1 if arguments.quick else 3)  # reported ones begin at 0
        how = count, arguments.config, words, arguments.quick, arguments.first_seed
        if len(named) == 1 and named[0] in SIBLINGS:  # all tables of a sibling paper
            siblings.reproduce(SIBLINGS[named[0]], *how)
        else:
            reproduce.reproduce(named, *how)  # what is no table is refused by name there
    else:
        config = load_config(arguments.config, words)
        if arguments.people:
            people.write_people(config, arguments.people, arguments.out or out)
        elif arguments.later:
            later.write_later(config, named, arguments.out or out / "later.md")
        else:  # one run, Table 1
            train.refuse_changes(config, ["eval"])
            train.run_stages(config, ["eval"])


if __name__ == "__main__":
    script(main)
