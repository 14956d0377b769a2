"""The quality reward of an answer (paper 001, 3.3) as GRPO takes it, and the contexts of a shop.

    quality = Quality(run, players)
    quality(contexts, answers)          # (R, J), columns Quality.components; reward nan: no judge
    clicked, unclicked = log_contexts(run)

Equations 4 and 5 are qualeqs.set_reward; the judge is roles.judge, by rule or an LLM. GRPO goes by
the last component alone, the reward r_q: format x mean over suggestions of the three's product.

Legend: B contexts, G answers of each, R = B G answers, K suggestions, J components.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import data
import garm
import qualeqs
from files import UserError, gather, share
from roles.players import Players
from roles.quality import without_repeats
from run import Run
from stages.dialogues import Context, read_contexts


class Quality:
    components = ("format", "answerable", "factual", "informative", "quality")
    # The factors are logged, and their product rewards: a sum would pay for two of three.
    weights = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])

    def __init__(self, run: Run, players: Players):
        """Raises DataError with every bad line of catalogue, policies and cases."""
        settings = run.config.quality
        # None for the judge by rule, which knows no examples.
        cases = data.read_quality_cases(settings.cases) if settings.cases else []
        self.judge = players.quality(data.read_catalogue(run.catalogue_file),
                                     data.read_policies(run.policies_file), cases)
        self.failed_as_zero = settings.failed_as_zero

    def scores(self, contexts: Sequence[Context],
               answers: list[list[str]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Answerable, factual, informative (R, K) and format (R,) of G answers to each context.

        nan: the judge's call failed; a malformed answer is 0 in all.
        """
        # Strict: what is no list of three is nobody's to judge.
        rows = [(c.dialogue, garm.answer_suggestions(answer))
                for c, some in zip(contexts, answers, strict=True) for answer in some]
        # All at once: an LLM is asked many at a time; of several processes each asks for a share.
        asked = share([row for row in rows if row[1]])
        verdicts = map(without_repeats, [texts for _, texts in asked], self.judge(asked))
        said = iter(gather([[verdict[:3] for verdict in some] for some in verdicts]))
        # As qualeqs.quality_figures counts it: as bad suggestions.
        malformed = [[0.0] * 3] * garm.NUM_SUGGESTIONS
        marks = [next(said) if some else malformed for _, some in rows]
        form = torch.tensor([float(bool(some)) for _, some in rows])  # (R,)
        # (R, K, 3) -> three of (R, K).
        return *torch.tensor(marks, dtype=torch.float32).unbind(2), form

    def __call__(self, contexts: Sequence[Context], answers: list[list[str]],
                 *reference: Tensor) -> Tensor:
        """Components (R, J); but for the reward they are there to be logged, and never nan.

        reference: log-probabilities and mask of the answers, which only a Composite reads.
        """
        *each, form = self.scores(contexts, answers)
        _, reward = qualeqs.set_reward(*each, form, self.failed_as_zero)  # Eq. (5), (R,)
        # Of an answer that nobody judged 0 is no mark: GRPO's log leaves it out as invalid.
        return torch.stack([form, *(x.nanmean(1).nan_to_num(0.0) for x in each), reward], 1)


def log_contexts(run: Run) -> tuple[list[Context], list[Context]]:
    """D_click and D_unclick: contexts of the log with and without a click, none to be tested on."""
    # The simulated shop has a test set apart; of one's own log the people of `data.test` are it.
    contexts = [c for c in read_contexts(run)
                if not c.unsafe and (c.split != "test" or not run.config.data.dialogues)]
    # A log has few of the first and many of the second.
    parts = qualeqs.split_clicked([c.dialogue.clicked for c in contexts])
    clicked, unclicked = ([contexts[i] for i in part] for part in parts)
    if not clicked:
        raise UserError(f"{run.dialogues_file}: no context with a click to start from")
    return clicked, unclicked
