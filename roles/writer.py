"""Interests in, lists of starters out: by a policy in this process, or at a server of models.

    writer = Writer(config, answers=Path("runs/answers.sqlite"))
    lists = writer.write(run.adapter("sit"), [["Night trains", "Sourdough"]], n=6, seed=0)

A policy is the generator with a saved LoRA adapter; `generator.endpoint` names a server that has
the same adapters. Every list is parsed and filtered here, whoever wrote it.

The base without an adapter, the methods PE and PE+RID, is told at length what to write
(generator.prompting); policies were tuned to a short instruction.

Legend: n lists of each input, K starters of a list.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import openai

import llm
import roles
from config import Config, EndpointConfig
from files import digest, file_digest, gather, share
from roles import chat
from roles.text import read_yaml


class Writer:
    """Raises UserError at once if generator.endpoint is set and cannot be asked."""

    def __init__(self, config: Config, answers: Path):
        """answers: SQLite file of what servers have said, so that nothing is asked twice."""
        self.config, self.answers = config, answers  # ":memory:" where nothing may be kept
        self.cut: set[tuple[int, ...]] = set()  # prompts of training of which something is left out
        self._servers: dict[tuple[str, str], chat.Sampler] = {}  # by name there, and weights
        if config.generator.endpoint:  # asked in hours, refused now
            chat.Endpoint(self._endpoint(None), setting="generator.endpoint")

    @property
    def model_path(self) -> str:
        return llm.model_path(self.config.generator)

    @cached_property
    def tokenizer(self):
        return llm.load_tokenizer(self.model_path, self.config.generator.revision)

    def policy(self, adapter: Path | None, trainable: bool = False):
        """The generator with a saved adapter, or the bare base model."""
        g = self.config.generator
        model = llm.load_generator(
            self.model_path, g.load_in_4bit, g.gradient_checkpointing, g.revision, g.precision)
        llm.check_tree_rows(model, self._task(prompted=not adapter)[1] + g.max_new_tokens)
        # No dropout anywhere: log-probabilities must compare.
        return llm.load_adapter(model, adapter, trainable) if adapter else model.eval()

    def _task(self, prompted: bool) -> tuple[str, int]:
        """(instruction, tokens of a prompt at most) for a policy, or for a prompted model."""
        g = self.config.generator
        if not prompted:
            return g.instruction, g.max_prompt_tokens
        written = g.prompting or read_yaml("prompts.yaml")["generator"]
        # However long it is, it leaves the interests the room that they have in a policy's prompt.
        short, long = (sum(map(len, self._frame(text))) for text in (g.instruction, written))
        return written, g.max_prompt_tokens + max(0, long - short)

    def _frame(self, instruction: str) -> tuple[list[int], list[int]]:
        parts = llm.around_interests(instruction, self.config.generator.list_size)
        return llm.user_turn(self.tokenizer, *parts)

    def head(self, prompted: bool = False) -> list[int]:
        """Tokens that every prompt of a policy, or of a prompted model, begins with."""
        return self._frame(self._task(prompted)[0])[0]

    def prompt(self, interests: list[str], prompted: bool = False) -> list[int]:
        """Tokens that a policy continues; prompted: that the base without an adapter does."""
        # Best interest first: what does not fit is left out from the end.
        return llm.encode_prompt(
            self.tokenizer, interests, self.config.generator.list_size, *self._task(prompted))

    def encoded(self, interests: list[str],
                lists: list[list[str]]) -> tuple[list[int], list[list[int]]]:
        """(prompt ids, [ids of each list]): a row of training."""
        completions = [llm.encode_completion(self.tokenizer, starters) for starters in lists]
        prompt, (instruction, _) = self.prompt(interests), self._task(prompted=False)
        k = self.config.generator.list_size
        if prompt != llm.encode_prompt(self.tokenizer, interests, k, instruction, 2**30):
            self.cut.add(tuple(prompt))
        return prompt, completions

    def cut_prompts(self, prompts: Iterable[list[int]]) -> int:
        """How many of these lack interests or turns, for generator.max_prompt_tokens."""
        # By what they are: a resumed stage counts as one that was never killed.
        return sum(tuple(prompt) in self.cut for prompt in prompts)

    @property
    def sampling(self) -> dict:
        """How llm.sample_ids is asked where nothing else is said."""
        g = self.config.generator
        return {"max_new_tokens": g.max_new_tokens, "temperature": g.temperature, "top_p": g.top_p,
                "top_k": g.top_k, "rows": g.sample_rows}

    def draw(self, model, prompts: list[list[int]], n: int, seed: int, **how) -> list[list[str]]:
        """n completions of each prompt (token ids) as text; how: as of llm.sample."""
        # A line's end tells the parser that a last item is whole.
        settings = {"whole": "\n", **self.sampling, **how}
        return llm.sample(model, self.tokenizer, prompts, n, seed=seed, **settings)

    def sample(self, model, inputs: list[list[str]], n: int, seed: int, raw: bool = False,
               prompted: bool = False) -> list[list[list[str]]]:
        """n lists for each input, parsed and filtered: at most K starters each, perhaps none.

        raw: as parsed, whatever the filters would say; prompted: `model` is the base without an
        adapter. The processes of a torchrun sample a share each.
        """

        def draw(some: list[list[str]], numbers: list[int]) -> list[list[str]]:
            prompts = [self.prompt(interests, prompted) for interests in some]
            return self.draw(model, prompts, n, seed, numbers=numbers)

        return self._lists(draw, inputs, raw)

    def write(self, adapter: Path | None, inputs: list[list[str]], n: int, seed: int, model=None,
              raw: bool = False) -> list[list[list[str]]]:
        """As `sample`, by a saved adapter (None: the base): from generator.endpoint if it is set,
        where the model of that name is asked; or here, `model` being loaded already."""
        g = self.config.generator
        if not g.endpoint:
            model = model or self.policy(adapter)
            return self.sample(model, inputs, n, seed, raw, prompted=not adapter)
        server, task = self._server(adapter), self._task(prompted=not adapter)

        def draw(some: list[list[str]], numbers: list[int]) -> list[list[str]]:
            texts = [llm.prompt_text(self.tokenizer, x, g.list_size, *task) for x in some]
            # A server takes one seed a list: those of input i begin at n * i.
            return server.sample(texts, n, [(seed + n * i) % 2**31 for i in numbers])

        return self._lists(draw, inputs, raw)

    def _lists(self, draw, inputs: list[list[str]], raw: bool) -> list[list[list[str]]]:
        """draw(inputs, number of each) -> n texts of each."""
        # A place among all inputs is the number of its random draws, whoever samples it.
        k, places = self.config.generator.list_size, share(range(len(inputs)))
        texts = draw([inputs[i] for i in places], places)
        return gather([  # in the order of the inputs
            [[*llm.parse_starters(text).starters] if raw else fit_to_show(text, inputs[i])[:k]
             for text in row]
            for i, row in zip(places, texts, strict=True)])

    # ------------------------------------------------------------------------- generator.endpoint

    def _endpoint(self, adapter: Path | None) -> EndpointConfig:
        """Where generator.endpoint is asked for this adapter's lists."""
        g, name = self.config.generator, self.config.generator.model or "base"
        if adapter:  # known there by its stage: sit, round1, ..., vanilla; feedback1, ...
            name = adapter.parent.name
            if adapter.parent.parent.name == "feedback":
                name = name.replace("round", "feedback")
        return self.config.endpoint.model_copy(update={
            "base_url": g.endpoint, "key_env": g.endpoint_key_env, "model": name,
            "temperature": g.temperature, "max_tokens": g.max_new_tokens})

    def _server(self, adapter: Path | None) -> chat.Sampler:
        g, settings = self.config.generator, self._endpoint(adapter)
        # vLLM takes top_k beside what OpenAI's API knows; others may refuse it.
        more = {"top_p": g.top_p} | ({"top_k": g.top_k} if g.top_k else {})
        # A server may know another training's adapter by this name: weights tell them apart.
        weights = adapter / "adapter_model.safetensors" if adapter else None
        policy = file_digest(weights) if weights else digest(self.model_path)
        key = settings.model, policy  # one client for all calls, and one count
        if key not in self._servers:
            self._servers[key] = chat.Sampler(
                settings, more, self.answers, policy, str(adapter or ""))
        return self._servers[key]

    def is_served(self, adapter: Path) -> bool:
        """Whether generator.endpoint says that it has this adapter."""
        settings = self._endpoint(adapter)
        server = chat.Endpoint(settings, setting="generator.endpoint")
        try:
            return settings.model in {model.id for model in server.client.models.list()}
        except openai.OpenAIError:
            return False  # not reachable counts as not served

    def calls(self) -> Counter:
        """What became of calls to generator.endpoint since this was last asked."""
        return drained(server.chat for server in self._servers.values())


def fit_to_show(text: str, interests: list[str]) -> list[str]:
    """The starters of a completion that may be shown to somebody with these interests."""
    return roles.filter_starters(llm.parse_starters(text).starters, interests)[0]


def drained(chats) -> Counter:
    """The sum of the counts of some chats, which begin again at nothing."""
    counts: Counter = Counter()  # reason -> calls
    for some in chats:
        counts.update(some.counts)  # each stage reports its own calls
        some.counts.clear()
    return counts
