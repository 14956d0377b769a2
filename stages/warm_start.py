"""Stage `sft` of paper 001: warm start on clicked lists mixed with general data (3.1, appendix G).

    python train.py --config configs/qualeqs.yaml --stage sft quality.mix=0

The policy learns all three suggestions of lists of which one was clicked. `quality.mix` rows of
general instruction data come to a row of these, so that the model forgets less.

Departure: the general data is configs/teacher_corpus.jsonl, 640 people's interests with starters
for them, asked for as in the first paper; the publication takes ShareGPT4.
"""

import random
from collections import Counter
from functools import partial

import torch

import garm
import llm
import qualeqs
from files import UserError, digest
from roles.players import Players
from roles.suggester import Suggester
from roles.text import majority_language
from run import Run
from stages.dialogues import clicked_list
from stages.quality import log_contexts
from stages.sit import Rows, instruct, interests_and_list, read_corpus


def stage_warm_start(run: Run, players: Players, key: str) -> dict:
    """SFT on the mixture; and, if it is asked for, on the shop's rows alone (Table 2)."""
    ratios = {"mixed": run.config.quality.mix}  # adapter -> general rows to a row of the shop
    if "no_mix" in run.config.quality.ablations:
        ratios["no_mix"] = 0.0
    # Language of the log: who reads it decides what general data is.
    domain, language = domain_rows(run, players)
    general, figures = general_rows(run, players, language), {}
    for name, ratio in ratios.items():
        folder = f"sft/{name}"
        figures[name] = run.folder.once(folder, digest(key, name), partial(
            warm_start, run, players, domain, general, ratio, folder))
    return figures


def warm_start(run: Run, players: Players, domain: Rows, general: Rows, ratio: float,
               folder: str) -> dict:
    """SFT on all rows of the shop and `ratio` times as many general ones; saved to `folder`."""
    generator, both = torch.Generator().manual_seed(run.seed("mixture")), domain + general
    drawn = qualeqs.mixture(len(domain), len(general), ratio, generator).tolist()
    rows = [both[i] for i in drawn]  # each of the shop, some of the others
    model, losses = instruct(run, players.writer, rows, run.config.sft, folder)
    llm.save_adapter(model, run.adapter(folder))  # the reference, too, of the first RL
    return {"rows": len(domain), "general_rows": len(rows) - len(domain), **losses}


def domain_rows(run: Run, players: Players) -> tuple[Rows, str]:
    """At most sft.max_contexts clicked contexts, drawn at random, with their lists; and the
    language of most."""
    suggester, rng = Suggester(players.writer), random.Random(run.seed("sft contexts"))
    # A list is fit to learn whole or not at all (stages/dialogues.py).
    lists = [(c, three) for c in log_contexts(run)[0] if (three := clicked_list(c, run, Counter()))]
    if not lists:
        raise UserError("sft: no clicked list of three is fit to learn")
    # Before encoding, which of thousands of contexts would take minutes.
    drawn = rng.sample(lists, min(run.config.sft.max_contexts or len(lists), len(lists)))
    rows = [suggester.encoded(c.turns, [garm.format_answer(three)]) for c, three in drawn]
    return rows, majority_language([c.queries[-1] for c, _ in drawn])


def general_rows(run: Run, players: Players, language: str) -> Rows:
    """Rows of the teacher corpus in this language; none where the mixture has none."""
    if not run.config.quality.mix:
        return []  # and the corpus need not be embedded
    k = run.config.generator.list_size
    # Shorter lists would teach to stop early; nobody here reads other languages.
    rows = [row for row in read_corpus() if row.language == language and len(row.starters) >= k]
    return [players.writer.encoded(*interests_and_list(row, k, run.encoder)) for row in rows]
