"""A conversation in, three next queries out: prompts, answers and rollouts of the siblings'
policies.

    suggester = Suggester(writer)
    [[answer]] = suggester.write(run.adapter("sft"), [dialogue.turns], n=1, seed=0)
    garm.answer_suggestions(answer), answer.strip() == garm.UNSAFE

A policy is the generator with a saved adapter. An answer is the numbered list of garm.format_answer
or the word Unsafe; the single-suggestion teacher's is a query alone.

Departure: the base without an adapter, the method PE, is told at length what to write
(prompts.yaml); the paper prints the form of its prompt and the problems that it is to avoid.

Legend: n answers of each context.
"""

from collections.abc import Sequence
from pathlib import Path

import llm
from data import Turn
from files import gather, share
from llm.prompts import Ids
from roles.text import read_yaml
from roles.writer import Writer

# What a context is followed or preceded by: (text before, text behind); names of prompts.yaml.
TASKS = {
    "three": ("suggest_three", ""), "one": ("suggest_one", ""),
    "prompted": ("suggest_prompted", ""), "paired": ("", ""),
}


class Suggester:
    """Conversations as token ids, and what a model writes after them."""

    def __init__(self, writer: Writer, task: str = "three"):
        """task: of TASKS, what a policy is asked for where nothing else is said."""
        self.writer, self.config, self.task = writer, writer.config, task
        self.policy, self.cut_prompts = writer.policy, writer.cut_prompts  # as Writer's

    @property
    def tokenizer(self):
        return self.writer.tokenizer

    def prompt(self, turns: Sequence[Turn], task: str = "") -> Ids:
        """Tokens that a model continues; of a long conversation the latest turns."""
        return self.prompt_and_cut(turns, task)[0]

    def prompt_and_cut(self, turns: Sequence[Turn], task: str = "") -> tuple[Ids, int]:
        """The prompt, and how many turns were left out of it or shortened."""
        texts = read_yaml("prompts.yaml")
        begin, end = (texts[name] if name else "" for name in TASKS[task or self.task])
        # Every task is shown as much of a conversation as "three" is.
        frame = llm.user_turn(self.tokenizer, texts["suggest_three"])
        room = self.config.generator.max_prompt_tokens - sum(map(len, frame))
        said = [(turn.role, turn.content) for turn in turns]
        return llm.encode_conversation(self.tokenizer, said, begin, end, room)

    def completion(self, answer: str) -> Ids:
        # The end is learned too: an answer of three stops there.
        return llm.encode_text(self.tokenizer, answer) + [self.tokenizer.eos_token_id]

    def encoded(self, turns: Sequence[Turn], answers: Sequence[str],
                task: str = "") -> tuple[Ids, list[Ids]]:
        """(prompt ids, [ids of each answer]): a row of training."""
        prompt, cut = self.prompt_and_cut(turns, task)
        if cut:  # counted where a stage asks, as what is left out may matter
            self.writer.cut.add(tuple(prompt))
        return prompt, [self.completion(answer) for answer in answers]

    def rollouts(self, model, contexts: Sequence[Sequence[Turn]], n: int, seed: int, task: str = "",
                 **how) -> list[list[Ids]]:
        """Token ids of n answers to each context, each with its end token if it wrote one.

        how: as of llm.sample_ids. The processes of a torchrun sample a share each.
        """
        settings = {**self.writer.sampling, "stop": "", **how}
        places = share(range(len(contexts)))  # draws hang on the place, not on who draws
        prompts = [self.prompt(contexts[i], task) for i in places]
        ends = llm.end_tokens(model, self.tokenizer)
        drawn = llm.sample_ids(
            model, self.tokenizer, prompts, n, seed=seed, numbers=places, **settings
        ) if places else []
        return gather([[_until_end(row, ends) for row in rows.tolist()] for rows in drawn])

    def texts(self, rollouts: list[list[Ids]]) -> list[list[str]]:
        decode = self.tokenizer.batch_decode
        return [decode(answers, skip_special_tokens=True) for answers in rollouts]

    def write(self, adapter: Path | None, contexts: Sequence[Sequence[Turn]], n: int,
              seed: int) -> list[list[str]]:
        """n answers to each context by a saved adapter (None: the prompted base), as text."""
        task = "" if adapter else "prompted"
        return self.texts(self.rollouts(self.policy(adapter), contexts, n, seed, task))


def read_kindly(answer: str) -> list[str]:
    """The suggestions of an answer in whatever list it stands; [] of prose."""
    # Behind a line's end: the last item is whole where the policy has ended its answer, and one
    # that was cut short is judged as it stands, as garm.answer_suggestions does.
    return [*llm.parse_starters(f"{answer}\n").starters]


def _until_end(ids: Ids, ends: set[int]) -> Ids:
    """The tokens up to the first one that ends an answer; behind it are pads."""
    end = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: end + 1]
