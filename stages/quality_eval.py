"""Stage `eval` of paper 001: every policy answers the test contexts; tables over all and by intent.

    python train.py --config configs/qualeqs.yaml --stage eval

Strict accuracy, valid rate and the three fine-grained accuracies of section 4.1, by the run's own
judge (roles.judge). eval/values.json has all of it by context, for tables/qualeqs.py.

Legend: B contexts, G answers of each, K suggestions of an answer.
"""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor

import garm
import qualeqs
from files import UserError, progress, write_json
from roles.players import Players
from roles.suggester import Suggester, read_kindly
from run import Run
from stages.dialogues import Context
from stages.garm_eval import held_out, shown, write_answers_and_table
from stages.metrics import markdown_table
from stages.mine import FIRST, WARM
from stages.quality import Quality

# Figures of qualeqs.quality_figures -> as in Table 1; the paper's table lacks the form.
COLUMNS = {"strict_accuracy": "Strict", "valid_rate": "Valid", "answerable": "Answerable",
           "factual": "Factual", "informative": "Informative", "format": "Format"}


def policies(run: Run) -> dict[str, str]:
    """Name as in Tables 1 and 2 -> folder of the adapter ("": the prompted base), in order."""
    rounds = run.config.quality.rounds
    named = {"base": "", "SFT w/o mix ratio": "sft/no_mix", "SFT": WARM,
             "GRPO": "rl/no_warm_start", "SFT-GRPO": FIRST}
    if rounds:  # of the ablations the last round: as many steps as QualEQS has
        named |= {"w/o unclicked": f"mine/clicked{rounds}",
                  "w/o disagreement": f"mine/random{rounds}"}
    named |= {f"QualEQS, round {i}": f"mine/hard{i}" for i in range(1, rounds + 1)}
    # Asked for now: what earlier settings have trained is not compared.
    trained = {*run.config.quality.ablations, "mixed", "grpo", "hard", ""}
    return {name: folder for name, folder in named.items()
            if folder.rpartition("/")[2].rstrip("0123456789") in trained}


def constant_list(answers: list[list[str]]) -> str:
    """A control: for everybody the three suggestions that a policy makes most often."""
    texts = (text for some in answers for answer in some
             for text in dict.fromkeys(read_kindly(answer)))
    best = Counter(texts).most_common(garm.NUM_SUGGESTIONS)  # of equals the first, in every process
    return garm.format_answer([text for text, _ in best])


def stage_eval(run: Run, players: Players, key: str) -> dict:
    """Answers of every policy to the test contexts, judged."""
    contexts = [c for c in held_out(run) if not c.unsafe]
    if not contexts:
        raise UserError("eval: no context to test on; raise data.test")
    quality, n, answers = Quality(run, players), run.config.eval.lists, {}
    for name, folder in progress(policies(run).items(), "write suggestions"):
        # GRPO without a warm start has learned to answer the long prompt.
        task = "prompted" if folder == "rl/no_warm_start" else "three"
        # The same draws for every policy: equal policies give equal answers.
        answers[name] = Suggester(players.writer, task).write(
            run.adapter(folder), [c.turns for c in contexts], n, run.seed("eval"))
    answers["constant list"] = [[constant_list([*answers.values()][-1])] * n for _ in contexts]
    # Of one's own log names of its own, perhaps none.
    intents = [c.dialogue.intent or "unknown" for c in contexts]
    # All with one judge, who is told nothing of the policy.
    scores = {name: quality.scores(contexts, some) for name, some in answers.items()}
    write_json(run.folder / "eval" / "values.json", {
        "intents": {c.dialogue.dialogue_id: intent
                    for c, intent in zip(contexts, intents, strict=True)},
        "values": {name: values_of(contexts, n, *some) for name, some in scores.items()}})
    write_answers_and_table(run, contexts, answers, page(scores, intents, n))
    return {"contexts": len(contexts), "answers": n,
            "failed": sum(int(some[0].isnan().sum()) for some in scores.values())}


def page(scores: dict[str, tuple[Tensor, ...]], intents: Sequence[str], n: int) -> str:
    """Table 1's columns of each policy, and strict accuracy and valid rate by intent (Figure 5)."""
    # Over answers, not over contexts: a failed call takes one answer with it.
    figures = {name: qualeqs.quality_figures(*some) for name, some in scores.items()}
    rows = [[name, *(shown(one[column]) for column in COLUMNS)] for name, one in figures.items()]
    groups = [intent for intent in intents for _ in range(n)]  # of each answer
    by_intent = {name: qualeqs.figures_by(groups, *some) for name, some in scores.items()}
    names = sorted({*intents})  # columns
    cells = [[name, *(" / ".join(shown(by[intent][metric])
                                 for metric in ("strict_accuracy", "valid_rate"))
                      for intent in names)] for name, by in by_intent.items()]
    return (markdown_table(["Method", *COLUMNS.values()], rows) + "\nStrict / valid by intent\n\n"
            + markdown_table(["Method", *names], cells))


def values_of(contexts: Sequence[Context], n: int, *scores: Tensor) -> dict[str, dict[str, float]]:
    """Metric -> context -> its mean over n answers; without contexts of which nothing is judged."""
    result: dict[str, dict[str, float]] = {column: {} for column in COLUMNS}
    for i, context in enumerate(contexts):
        # Answers of a context stand side by side.
        figures = qualeqs.quality_figures(*(x[i * n : (i + 1) * n] for x in scores))
        for column in COLUMNS:
            if figures[column] == figures[column]:  # else nan
                result[column][context.dialogue.dialogue_id] = figures[column]
    return result
