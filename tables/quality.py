"""How far the quality judge agrees with what is known of the simulated shop's suggestions.

    python -m tables.quality --seeds 0 1 2 --cases 500

Each case is a suggestion made on purpose: good, or with one fault (world/shop.py, KINDS). Settings
and word lists of the judge (roles/quality.py) were chosen on seeds from 100 on, whose cases have
`log` forms only; of those of smaller seeds half have `held_out` forms.
"""

import argparse
from collections import defaultdict

import numpy as np

from config import ShopConfig
from files import script
from roles import quality
from world import shop

DIMENSIONS = ("answerable", "factual", "informative")


def judged(seed: int, number: int) -> list[tuple[shop.Case, quality.Verdict]]:
    """(case, the rule judge's verdict) of one shop."""
    made = shop.Shop(ShopConfig(contexts=4, seed=seed))
    cases = made.cases(number)
    verdicts = quality.Rules(made.products, made.policies).quality(
        [(case.dialogue, [case.suggestion]) for case in cases])
    return [(case, verdict) for case, [verdict] in zip(cases, verdicts, strict=True)]


def agrees(case: shop.Case, verdict: quality.Verdict) -> bool:
    """Whether both call the suggestion good, or both bad."""
    return verdict.reward == float(case.quality == shop.GOOD)


def rows_of(pairs: list) -> list[tuple[str, int, float]]:
    """(what, cases, share that agrees): all, by form, by dimension, by kind."""
    groups = defaultdict(list)
    for case, verdict in pairs:
        for name in ("all", f"forms: {case.part}", case.kind):
            groups[name].append(agrees(case, verdict))
        for name, true, mark in zip(DIMENSIONS, case.quality, verdict, strict=False):
            if true is not None:
                groups[f"{name} alone"].append(mark == true)
    order = ["all", "forms: log", "forms: held_out", *(f"{name} alone" for name in DIMENSIONS),
             *shop.KINDS]
    return [(name, len(groups[name]), float(np.mean(groups[name])))
            for name in order if groups[name]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tables.quality",
                                     description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", type=int, default=500, help="of each seed")
    parser.add_argument("--misses", type=int, default=3, help="shown of each kind")
    given = parser.parse_args()
    by_seed = {seed: judged(seed, given.cases) for seed in given.seeds}
    shares = [f"{seed}: {np.mean([agrees(*pair) for pair in pairs]):.3f}"
              for seed, pairs in by_seed.items()]
    pairs = [pair for pairs in by_seed.values() for pair in pairs]
    print(f"agreement by seed  {', '.join(shares)}\n\n| | cases | agree |\n|---|---|---|")
    for name, count, share in rows_of(pairs):
        print(f"| {name} | {count} | {share:.3f} |")
    print("\nMisses: kind; the judge's reason; last query; suggestion")
    shown = defaultdict(int)
    for case, verdict in pairs:
        if not agrees(case, verdict) and shown[case.kind] < given.misses:
            shown[case.kind] += 1
            print(f"- {case.kind}; {verdict.reason or 'none'}; {case.dialogue.turns[-2].content}; "
                  f"{case.suggestion}")


if __name__ == "__main__":
    script(main)
