"""The composite reward of an answer (paper 003, 3.6 and appendix H): its components, side by side.

    composite = Composite(players, suggester, load_reward(run, suggester, "gaussian", model))
    composite(contexts, answers, ref_logps, mask)   # (R, J), columns COMPONENTS; nan: no judge

Rules and log-perplexity are those of garm.py. Here is what needs a model: reward and uncertainty of
a list are the means of its suggestions'; the judge (H.2) says 1 or 0 of each.

Departure: no general reward model (Skywork) stands beside the one that clicks have taught.

Legend: B contexts, G answers of each, R = B G answers, T tokens, J components.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import garm
import llm
from config import COMPONENTS
from files import gather, share
from roles.players import Players
from roles.suggester import Suggester
from stages.dialogues import Context
from stages.reward import RewardModel

RULES = COMPONENTS[:5]  # what garm.rule_rewards gives
SIZE = 8  # contexts that the reference reads together


class Composite:
    """Components of answers, by the rules, a reference's log-probabilities and these players."""

    components = COMPONENTS

    def __init__(self, players: Players, suggester: Suggester, reward: RewardModel):
        """players: who judges is theirs; reward: "gaussian" or "bradley_terry", on any model with
        LoRA, whose weights it swaps for its own while it scores."""
        self.players, self.suggester, self.reward = players, suggester, reward

    def __call__(self, contexts: Sequence[Context], answers: list[list[str]], ref_logps: Tensor,
                 mask: Tensor) -> Tensor:
        """Components (R, J) of G answers to each context; log-probs under the reference (R, T)."""
        flat = [(c, answer) for c, some in zip(contexts, answers, strict=True) for answer in some]
        rules = [garm.rule_rewards(answer, c.queries[-1], c.unsafe) for c, answer in flat]
        # Nothing that is suggested where a context is to be declined earns anything.
        lists = [[] if c.unsafe else garm.answer_suggestions(answer) for c, answer in flat]
        mu, sigma = self.scores([c for c, _ in flat], lists)
        # A group of which nobody declines has no variance then, and pushes nobody anywhere.
        likely = garm.log_perplexity_reward(ref_logps.cpu(), mask.cpu())
        likely.masked_fill_(torch.tensor([c.unsafe for c, _ in flat]), 0)
        # A column a component, (R,) each, in the order of COMPONENTS.
        columns = torch.stack([
            *(torch.tensor([row[name] for row in rules]) for name in RULES),
            likely, self.judged([c for c, _ in flat], lists), *of_lists(contexts, mu, sigma, lists),
        ], 1)
        return columns.float()

    def of_suggestions(self, model, contexts: list[Context], texts: list[list[str]]) -> Tensor:
        """Components (R, J) of single suggestions, K of each context; 0 where only lists differ.

        model: the reference.
        """
        flat = [(c, text) for c, some in zip(contexts, texts, strict=True) for text in some]
        mu, sigma = self.scores(contexts, texts)
        prompts = [self.suggester.prompt(c.turns) for c in contexts]
        # As the first line of a list, which every suggestion can be.
        lines = [[llm.encode_text(self.suggester.tokenizer, f"1. {text}") for text in some]
                 for some in texts]
        likely = []
        for start in range(0, len(contexts), SIZE):
            part = slice(start, start + SIZE)
            with torch.no_grad():
                logps, mask = llm.token_logps(model, prompts[part], lines[part])  # (R, T)
            likely.append(garm.log_perplexity_reward(logps, mask).cpu())
        none = torch.zeros(len(flat))  # form, diversity and safety are a list's
        return torch.stack([
            none, torch.tensor([garm.length_reward([text]) for _, text in flat]),
            torch.tensor([garm.language_reward([text], c.queries[-1]) for c, text in flat]),
            none, none, torch.cat(likely),
            self.judged([c for c, _ in flat], [[text] for _, text in flat]),
            # A certain model's sigma is 0: its column never differs, and gets no weight.
            torch.cat(mu), -torch.cat(sigma),
        ], 1)

    def scores(self, contexts: list[Context], lists: list[list[str]]):
        """mu and sigma of each suggestion; texts of one context in succession share its prompt."""
        runs: list[tuple[Context, list[int]]] = []  # of places with the same context
        for i, context in enumerate(contexts):
            if not runs or runs[-1][0] is not context:
                runs.append((context, []))
            runs[-1][1].append(i)
        # A text that several rollouts share is scored once.
        texts = [list(dict.fromkeys(y for i in places for y in lists[i])) for _, places in runs]
        result = []
        for values in self.reward.score([context.turns for context, _ in runs], texts):
            of_text = [dict(zip(*pair, strict=True)) for pair in zip(texts, values, strict=True)]
            result.append([torch.stack([score[y] for y in lists[i]]) if lists[i] else torch.zeros(0)
                           for score, (_, places) in zip(of_text, runs, strict=True)
                           for i in places])
        return result

    def judged(self, contexts: list[Context], lists: list[list[str]]) -> Tensor:
        """Share of a list's suggestions that the judge passes, (R,); 0 of none; nan: failed."""
        # All at once: an LLM is asked many at a time; of several processes each asks for a share.
        rows = [(c.queries, text) for c, some in zip(contexts, lists, strict=True) for text in some]
        said = iter(gather(self.players.judge().qualify(part) if (part := share(rows)) else []))
        result = []
        for some in lists:
            answers = [next(said) for _ in some]
            failed = None in answers  # a number for it would be a judgement
            result.append(torch.nan if failed else sum(answers) / max(1, len(answers)))
        return torch.tensor(result)


def of_lists(contexts, mu: list[Tensor], sigma: list[Tensor], lists: list[list[str]]):
    """Mean mu and -mean sigma of each list, (R,) each."""
    result, unsafe = [], [c.unsafe for c in contexts for _ in range(len(lists) // len(contexts))]
    for values in (mu, [-s for s in sigma]):
        means = [v.mean().item() if len(v) else None for v in values]
        # Unstated: what a malformed answer earns here, where any number may be a good one: no more
        # than the worst list of the batch. To decline is judged by other components.
        floor = min((m for m in means if m is not None), default=0.0)
        column = [0.0 if declined else floor if m is None else m
                  for m, declined in zip(means, unsafe, strict=True)]
        result.append(torch.tensor(column))
    return result
