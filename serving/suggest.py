"""The path of a request inside a conversation: turns in, next queries out (papers 003 and 001).

    engine = Suggestions(load_config("runs/garm/config.yaml"))
    (answer,) = engine.write([Ask(user, n=3, turns=turns)])

Prompt -> policy (`serve.candidates` answers sampled) -> parser -> filters -> reward model. Of the
suggestions of all answers the n with the highest mu - sigma are shown, best first: a reward that
the model is not sure of counts for less by one standard deviation. Where half of the answers or
more are the word Unsafe, the conversation is declined. In a run of QualEQS the judge by rule stands
in place of the reward model: only what catalogue or policies answer is shown, and what answers it.

It stands where engine.py does in a run of IceBreaker.
Legend: B asks, n sampled answers of an ask, T tokens decoded so far.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import data
import garm
import llm
import roles
from config import Config
from files import UserError, digest, file_digest, forget_texts
from roles.languages import LATIN
from roles.quality import Rules, without_repeats
from roles.suggester import Suggester, read_kindly
from roles.writer import Writer
from run import Run
from serving.engine import Ask, in_a_loop
from stages.mine import FIRST, WARM
from stages.reward import RewardModel, load_reward

POLICIES = ("gaussian", "bradley_terry", "dpo", "rft")  # of stage rl; the first that is there
REWARDS = ("gaussian", "purm", "bradley_terry")  # likewise; the last one's sigma is 0
CHARACTERS = 16  # of a text that a token holds, at most
# A text in each language that roles.languages tells: the wanted one is named by it.
LIKE = {"zh": "字", "ja": "かな", "ko": "글", "ru": "я", "other": "λ",
        **{name: " ".join(sorted(words)) for name, words in LATIN.items()}}
DECLINED = "unsafe: the policy declines to go on with this conversation"


@dataclass(frozen=True)
class Suggestion:
    text: str
    reward: float  # mu
    uncertainty: float  # sigma, in the unit of the reward
    source: str  # "policy"; of a shop the product or policy that answers it


@dataclass(frozen=True)
class Suggested:  # of a conversation what serving/engine.py's Answer is of a history
    suggestions: list[Suggestion]  # n at most, best first
    declined: bool
    cut: int  # turns that the policy did not see, or not whole
    tokens: int  # generated
    model: str  # Suggestions.version


class Suggestions:
    """Policy and reward model, or judge, of a run, on one base. `write` is for one thread.

    Raises UserError if the run lacks a stage.
    """

    examples: Sequence[data.User] = ()  # the simulated people have conversations, not histories

    def __init__(self, config: Config):
        llm.settle_libraries()
        self.config, run = config, Run(config, describe=False)
        folder, wanted = run.folder, config.reward.kinds
        kinds = [kind for kind in REWARDS if kind in wanted and folder.has_run(f"reward/{kind}")]
        trained = [*filter(folder.has_run, policies(config))]
        in_shop = config.run.method == "qualeqs"
        if not trained or not (kinds or in_shop):
            raise UserError(f"{folder.path}: stage {'reward' if trained else 'sft'} has not run; "
                            f"python train.py --config {folder.path}/config.yaml first")
        folder.require(trained[0], *(f"reward/{kind}" for kind in kinds[:1] if not in_shop))
        method, adapter = trained[0].rpartition("/")[2], folder / trained[0] / "adapter"
        self.methods = (method,)
        self.writer = Writer(config, answers=Path(":memory:"))
        self.suggester = Suggester(self.writer)
        self.model = self.suggester.policy(adapter)
        if in_shop:
            self.rate = partial(by_shop, Rules(data.read_catalogue(run.catalogue_file),
                                               data.read_policies(run.policies_file)))
        else:
            self.rate = partial(by_reward, load_reward(run, self.suggester, kinds[0], self.model))
        self.version = f"{method}-{file_digest(adapter / 'adapter_model.safetensors')[:8]}"
        # What loads or compiles at the first use, does so now.
        warm = data.Turn(role="user", content="warming up")
        self.write([Ask(data.User(user_id="nobody", sessions=[]), 1, turns=[warm])])

    # What the queue also asks an engine for.

    def refresh(self) -> bool:
        return False  # what is trained meanwhile is served after a restart

    def forget(self) -> None:  # for any thread, as Engine's
        forget_texts()

    def characters(self, ask: Ask) -> int:
        return 0  # that are embedded

    @torch.no_grad()
    def write(self, asks: list[Ask],
              gone: Callable[[int], bool] = lambda i: False) -> list[Suggested | None]:
        """One batch. gone(i), asked at every step: the client of ask i has left; its answer is
        None, and nothing more is decoded for it."""
        read = [self.suggester.prompt_and_cut(ask.turns) for ask in asks]
        cuts = [ask.left_out + cut for ask, (_, cut) in zip(asks, read, strict=True)]
        for ask, cut in zip(asks, cuts, strict=True):
            if ask.begin:
                ask.begin(cut)
        tokens, n = [0] * len(asks), self.config.serve.candidates
        # The same conversation, the same answer, whoever else is in the batch.
        seeds = [int(digest([(t.role, t.content) for t in ask.turns])[:11], 16) for ask in asks]
        texts = self.writer.draw(
            self.model, [prompt for prompt, _ in read], n, self.config.run.seed, numbers=seeds,
            rows=n * len(asks), stop="", watch=lambda ids: self._watch(ids, tokens, gone))
        declined = [2 * sum(map(is_declined, answers)) >= n for answers in texts]
        pools = [[] if declined[i] or gone(i) else fit_suggestions(ask, texts[i])
                 for i, ask in enumerate(asks)]
        result = []
        for i, (ask, rated) in enumerate(zip(asks, self.rate(asks, pools), strict=True)):
            best = sorted(rated, key=lambda s: s.uncertainty - s.reward)[: ask.n]
            left = gone(i)
            if ask.emit and not left:
                for suggestion in best:  # not before: all of them decide which are the best
                    ask.emit(suggestion)
            answer = Suggested(best, declined[i], cuts[i], tokens[i], self.version)
            result.append(None if left else answer)
        return result

    def _watch(self, ids: torch.Tensor, tokens: list[int], gone: Callable) -> torch.Tensor:
        """After each step, ids (B, n, T): count tokens; which samples (B, n) are given up?"""
        alive = (ids[..., -1] != self.writer.tokenizer.pad_token_id).sum(1).tolist()  # (B,)
        tokens[:] = [a + b for a, b in zip(tokens, alive, strict=True)]
        left = torch.tensor([*map(gone, range(len(ids)))], device=ids.device)  # (B,)
        return left[:, None] | in_a_loop(ids)


def policies(config: Config) -> list[str]:
    """Folders of the policies that a run may have trained, the one to be served first."""
    if config.run.method == "qualeqs":
        return [*(f"mine/hard{i}" for i in range(config.quality.rounds, 0, -1)), FIRST, WARM]
    # An arm that is no longer asked for may be of other settings.
    return [*(f"rl/{arm}" for arm in POLICIES if arm in config.rl.arms), "sft"]


def by_reward(reward: RewardModel, asks: list[Ask],
              pools: list[list[str]]) -> list[list[Suggestion]]:
    """Each ask's suggestions with the reward model's mu and sigma."""
    scores = reward.score([ask.turns for ask in asks], pools)
    return [[*map(Suggestion, pool, mu.tolist(), sigma.tolist(), ["policy"] * len(pool))]
            for pool, mu, sigma in zip(pools, *scores, strict=True)]


def by_shop(judge: Rules, asks: list[Ask], pools: list[list[str]]) -> list[list[Suggestion]]:
    """Of each ask's suggestions those that the shop can answer, are true and lead on."""
    # An answer of no is what people who tap complain of: what no rule knows is left out too.
    rows = [(data.Dialogue.model_construct(turns=ask.turns), pool)
            for ask, pool in zip(asks, pools, strict=True)]
    return [[Suggestion(text, 1.0, 0.0, verdict.source)
             for text, verdict in zip(pool, without_repeats(pool, verdicts), strict=True)
             if verdict.reward == 1]
            for (_, pool), verdicts in zip(rows, judge.quality(rows), strict=True)]


def is_declined(answer: str) -> bool:
    return answer.strip(" \n.*\"'`").casefold() == garm.UNSAFE.casefold()


def fit_suggestions(ask: Ask, answers: Sequence[str]) -> list[str]:
    """The suggestions of all answers that may be shown, none twice and none that was asked."""
    texts = [y for answer in answers if not is_declined(answer) for y in read_kindly(answer)]
    queries = [turn.content for turn in ask.turns if turn.role == "user"]
    # As garm.language_reward by the last query, but not by one without letters ("2 + 2?"). Earlier
    # ones of its script help where a name alone ("Dune?") tells no language of that script.
    written = [query for query in queries if any(map(str.isalpha, query))]
    like = [query for query in written if garm.script_of(query) == garm.script_of(written[-1])]
    # A talk about medicine goes on about medicine; what is to be declined, the policy declines.
    like = [LIKE[ask.language]] if ask.language else like
    return roles.filter_starters(texts, like, queries, subjects=True)[0]


def last_turns(turns: Sequence[data.Turn], room: int) -> list[data.Turn]:
    """Of a conversation all that a prompt with `room` tokens for it can hold."""
    # So that of a long one neither all is encoded nor all is kept. In the order in which
    # llm.encode_conversation gives them room: the last query, what follows it, what went before.
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    kept, length, most = {}, 0, CHARACTERS * room
    for i in (*range(last, len(turns)), *range(last)[::-1]):
        if length > most:
            break
        content = turns[i].content[:most]  # shortened there once more, and counted there
        kept[i] = turns[i].model_copy(update={"content": content})
        length += len(content)
    return [kept[i] for i in sorted(kept)]
