"""Settings and their reader.

Defaults live in the models below and nowhere else. A YAML file overrides them, `section.key=value`
words on the command line override the file:

    python train.py --stage dpo --config configs/smollm2.yaml dpo.beta=0.2

What is unknown is refused with the nearest valid name, a wrong value with its file or word.
"""

import difflib
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from files import UserError

Count = Annotated[int, Field(gt=0)]
CountFromZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Negatives = Literal["utility", "diversity", "joint", "unfit"]
TINY = "tiny"  # generator.model: the stand-in for tests; a folder of that name is ./tiny
Method = Literal["icebreaker", "garm", "qualeqs"]
ONLY_FOR = {"data.users": "icebreaker", "data.feedback": "icebreaker", "data.policies": "qualeqs",
            "data.dialogues": "garm or qualeqs", "data.catalogue": "qualeqs",
            "generator.endpoint": "icebreaker"}  # run.method, where a setting is not for all
Role = Literal["rules", "endpoint", "generator"]  # rules.py; an LLM at `endpoint`; the local one


# Assignments are not checked: stage keys blank single settings of a copy (train.stage_key).
class Section(BaseModel, extra="forbid", allow_inf_nan=False):
    """Some settings of one name."""


class RunConfig(Section):
    name: str = ""  # the run folder is root/name; empty: named after data.users or the config file
    root: str = "runs"
    seed: int = 0  # every random choice outside the simulated world
    method: Method = "icebreaker"  # whose stages train.py runs: a paper's


class DataConfig(Section):
    users: str = ""  # users.jsonl; empty: the simulated world writes one
    impressions: str = ""  # impressions.jsonl; empty with `users` set: no ranker, no DPO
    # garm, qualeqs: dialogues.jsonl; empty: the simulated world writes one. Empty it stands in no
    # key of a stage, and runs from before it was known stay done.
    dialogues: str = Field("", exclude_if=lambda path: not path)
    catalogue: str = Field("", exclude_if=lambda path: not path)  # qualeqs: a shop's
    policies: str = Field("", exclude_if=lambda path: not path)  # catalogue.jsonl, policies.yaml
    feedback: str = ""  # a server's store: `--stage ranker --stage dpo` train a further round on it
    cuts: list[Share] = Field([0.4, 0.6, 0.8], min_length=1)  # of a user's sessions are history
    # Each user is in one of four splits. RID's AUC and the online test use `judge` too.
    train: Share = 0.5  # generator and ranker
    valid: Share = 0.1  # early stopping and thresholds
    judge: Share = 0.25  # the ranker that judges; garm: contexts of reinforcement learning
    test: Share = 0.15  # figures


class WorldConfig(Section):
    users: Count = 800
    days: Count = 120
    seed: int = 7
    starter_pool: Count = 3000  # distinct starters that the logging policy retrieves from
    impressions_per_user: Count = 50  # mean


class DialoguesConfig(Section):  # the simulated conversations: world/dialogues.py
    contexts: Count = 4000
    seed: int = 7


class ShopConfig(Section):  # the simulated shop: world/shop.py
    contexts: Count = 4000  # of log and test set together; 16949: as many as the paper's
    seed: int = 7


class EncoderConfig(Section):
    name: str = ""  # any sentence-transformers model; empty: the packaged all-MiniLM-L6-v2


class RolesConfig(Section):
    teacher: Role = "rules"
    matcher: Role = "rules"
    judge: Role = "rules"
    summariser: Role = "rules"


class EndpointConfig(Section):  # an OpenAI-compatible server of chat completions, for roles
    base_url: str = ""  # empty: OPENAI_BASE_URL of the environment
    model: str = ""
    key_env: str = "OPENAI_API_KEY"  # the variable that holds the key; the key stands in no file
    concurrency: Count = 8  # calls in flight
    retries: CountFromZero = 4  # after 429, 5xx and time-outs, with growing pauses
    timeout: Positive = 60.0  # seconds
    temperature: NotNegative = 0.7
    max_tokens: Count = 1024


class RidConfig(Section):
    hidden: Count = 64  # width of E_u, E_h and of the space they share, per tower
    # Scorers whose cosines are averaged, each trained without one fold of the users.
    towers: Annotated[int, Field(ge=2)] = 5
    temperature: Positive = 0.2  # Eq. (3)
    cross_user: NotNegative = 0.01  # weight of a cross-user negative; within the user it is 1
    # Share of the loss that is the distance to boosted trees on the same statistics; 0: Eq. (3).
    distillation: float = Field(0.9, ge=0, le=1)
    learning_rate: Positive = 1e-3
    epochs: Count = 40
    patience: CountFromZero = 4  # epochs without a lower loss on the left-out fold, waited through
    activity_groups: Count = 3
    min_keep: Count = 3  # with fewer, five starters say the same thing again
    max_keep: Count = 6
    duplicate_cosine: Annotated[float, Field(gt=0, le=1)] = 0.9  # nearer: only the latest is kept


class RankerConfig(Section):
    epochs: Count = 20
    patience: CountFromZero = 3
    batch_impressions: Count = 200
    click_share: float = Field(0.5, ge=0, le=1)  # a in click * (a + (1 - a) * min(after, D) / D)
    depth_cap: Count = 5  # D; after: the sessions that followed
    in_list: NotNegative = 1.0  # weight of the loss against the starters of the same list
    # Share of what is personal in the utility that mines and searches: 0.5 as in Eq. (7), 1 without
    # what everybody likes, 0 that alone.
    personal: float = Field(0.5, ge=0, le=1)


class GeneratorConfig(Section):
    # Hub id or local folder; empty: SmolLM2-135M-Instruct, fetched once by pip (llm/weights.py);
    # tiny: the stand-in for tests, which only writes lists (tools/tiny_model.py).
    model: str = ""
    revision: str = ""  # of a hub id; empty: main
    load_in_4bit: bool = False
    # Of the frozen weights; auto: bfloat16 where the processor multiplies it, else float32. LoRA,
    # and what is summed over a vocabulary or a list, is float32 in any case.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    lora_rank: Count = 16
    lora_alpha: Count = 32
    instruction: Annotated[str, Field(pattern=r"\{n\}")] = (
        "Suggest {n} conversation starters about these interests.")
    # The same at length, for the methods without training; `{interests}`: where they are to stand,
    # else behind it. Empty: as prompts.yaml has it.
    prompting: Annotated[str, Field(pattern=r"^$|\{n\}")] = ""
    list_size: Count = 5  # K
    # Of a policy's prompt, with `instruction`; a longer `prompting` takes no room from interests.
    max_prompt_tokens: Count = 320
    max_new_tokens: Count = 192  # a Chinese list of five is 146 of SmolLM2 in the mean
    temperature: Positive = 0.7
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: CountFromZero = 50  # only these are drawn from; 0: all
    sample_rows: Count = 64  # sequences decoded together
    endpoint: str = ""  # http://host/v1 of a server with the saved adapters, to sample from instead
    endpoint_key_env: str = ""  # the variable that holds its key, if it wants one
    # Users of a training step that are computed together; gradients add up. 0: all of the step.
    micro_batch: CountFromZero = 1
    gradient_checkpointing: bool = False  # layers are computed again in backward: less memory


class SitConfig(Section):
    max_rows: CountFromZero = 160  # users at a cut that the teacher writes for; 0: all there are
    lists_per_row: Count = 1
    corpus_rows: CountFromZero = 120  # of configs/teacher_corpus.jsonl, at random; 0: none
    own_lists: CountFromZero = 0  # above 0: tuned again with so many lists a row of the policy
    epochs: Count = 2
    learning_rate: Positive = 2e-3
    batch_users: Count = 2  # few rows, so many small steps


class DpoConfig(Section):
    rounds: Count = 1
    max_users: CountFromZero = 20  # per round, drawn at random; 0: all there are
    samples: Count = 4  # lists sampled per user and round
    teacher_lists: CountFromZero = 2  # lists of the teacher that join the pool
    beam: Count = 8
    expand: Count = 8
    weight: float = Field(0.5, ge=0, le=1)  # lambda: 0 diversity only, 1 utility only
    # A rejected list is lower by at least the margin (after min-max within the user), while the
    # other dimension differs by at most the tolerance.
    margin: NotNegative = 0.2
    tolerance: NotNegative = 0.2
    # unfit: a sampled list of which fewer than K starters may be shown.
    negatives: list[Negatives] = Field(["utility", "diversity", "joint", "unfit"], min_length=1)
    beta: Positive = 0.1
    learning_rate: Positive = 1e-3
    passes: Count = 2  # over the accumulated pairs, per round
    batch_users: Count = 4
    sft_weight: NotNegative = 5.0  # of the chosen lists' mean logp per token, beside Eq. (6)
    pairs_per_user: Count = 2  # from data.feedback, so that no single user can steer a round
    vanilla: bool = True  # the baseline SFT+DPO, of tapped against ignored lists, is trained too


class SftConfig(Section):  # garm: stages/sft.py; qualeqs: stages/warm_start.py
    max_contexts: CountFromZero = 240  # with a click, to train on; 0: all there are
    unsafe: Share = 0.1  # so many of the contexts that are trained on are to be declined
    distillation: bool = True  # False: all three suggestions of a clicked list are learned
    candidates: Annotated[int, Field(ge=3)] = 8  # that the teacher writes for a context
    epochs: Count = 1
    learning_rate: Positive = 1e-3
    batch_users: Count = 8  # contexts of a step


RewardKind = Literal["gaussian", "bradley_terry", "paired", "purm"]


class RewardConfig(Section):  # garm: stages/reward.py
    kinds: list[RewardKind] = Field(["gaussian", "bradley_terry", "paired"], min_length=1)
    max_contexts: CountFromZero = 400  # with a pair; 0: all there are
    epochs: Count = 1
    learning_rate: Positive = 1e-3
    batch_users: Count = 8  # contexts of a step
    variance_weight: NotNegative = 0.1  # lambda of Eq. (5); 0: sigma is free


class FuseConfig(Section):  # garm: stages/fuse.py
    max_contexts: Count = 60  # with a pair, whose differences are regressed on
    l2: Positive = 0.01  # lambda of Eq. (10)
    probes: CountFromZero = 2  # short trainings, after each of which the weights are adjusted
    probe_steps: Annotated[int, Field(ge=4)] = 4  # a trend has two batches in each half


ARMS = ("gaussian", "bradley_terry", "rft", "dpo")
# Of the composite reward, stages/composite.py; the first five by rule, confidence: -sigma.
COMPONENTS = ("format", "length", "language", "diversity", "safety", "log_perplexity", "judge",
              "reward", "confidence")


class RlConfig(Section):  # garm: stages/rl.py; qualeqs: stages/mine.py
    # RL with these reward models; RFT and DPO on the same rewards. Table 4: gaussian-log_perplexity
    # is RL whose reward lacks that component, however many are named.
    arms: list[str] = Field([*ARMS], min_length=1)
    steps: Count = 20  # batches of fresh rollouts
    batch_users: Count = 4  # contexts of a batch
    unsafe: Share = 0.1  # so many of the contexts are to be declined
    group: Annotated[int, Field(ge=2)] = 6  # G: rollouts of a context
    updates: Count = 1  # optimiser steps of a batch
    learning_rate: Positive = 1e-4
    temperature: Positive = 1.0
    clip_low: Share = 0.2
    clip_high: Positive = 0.2
    beta: NotNegative = 0.04  # weight of the KL to the policy of SFT
    reduction: Literal["sequence", "token", "constant"] = "token"
    scale: bool = True  # advantages in standard deviations of their group
    candidates: Count = 50  # RFT: suggestions of a context to choose from
    rft_contexts: Count = 60  # RFT and DPO


Ablation = Literal["no_mix", "no_warm_start", "random", "clicked"]


class QualityConfig(Section):  # qualeqs: stages/warm_start.py, stages/mine.py
    cases: str = ""  # good and bad cases that an LLM as judge is shown too: data.QualityCase lines
    failed_as_zero: bool = False  # the paper's "neutral" 0 where the judge's call failed; else nan
    mix: NotNegative = 0.5  # rows of general instruction data to a row of the shop's clicks
    rounds: CountFromZero = 3  # K of Algorithm 1, each of rl.steps batches
    contexts: CountFromZero = 60  # unclicked ones that a round looks for hard ones among; 0: all
    share: Share = 0.25  # of these at most are hard
    floor: float = Field(0.0, ge=0, lt=0.25)  # a hard context's u, at most 1/4, is above it
    # Beside all of it: SFT without general data; RL from the prompted base; rounds whose unclicked
    # contexts are drawn at random; rounds on clicked contexts alone.
    ablations: list[Ablation] = []


class AbConfig(Section):  # what --reproduce compares, and the simulated online test: world/ab.py
    days: Count = 35
    lists: Count = 6  # of each user and method: compared offline, shown in turn online
    searched: Count = 6  # so many lists of a user give list search the starters for half
    copies: Count = 32  # lives of each person, of which the mean counts: less noise of taps


class EvalConfig(Section):
    max_users: CountFromZero = 20  # test users of the stage, drawn at random; 0: all there are
    lists: Count = 1  # sampled per user and method by the stage; --reproduce writes ab.lists
    bootstrap: Count = 1000
    examples: CountFromZero = 6  # users on the page of examples


class ServeConfig(Section):  # serve.py
    store: str = ""  # SQLite file of users, shown lists and taps; empty: serve.sqlite of the run
    # Where a proxy asks under another Host than browsers: the site's own, as https://chat.example.
    origin: Annotated[str, Field(pattern=r"^(https?://[^/\s]+)?$")] = ""
    candidates: Count = 4  # lists sampled for an answer and searched; 1, as the paper deploys
    ahead: CountFromZero = 3  # lists kept ready for a user, beside the one that is shown
    batch: Count = 32  # requests decoded together
    queue: Count = 64  # requests that wait; the next one is refused with 429
    timeout: Positive = 30.0  # seconds of a request
    repeat_days: NotNegative = 7.0  # a starter that was shown is not shown again for so long
    arms: list[Literal["PE", "SFT", "IceBreaker"]] = Field(["IceBreaker"], min_length=1)  # by user


class Config(Section):
    run: RunConfig = RunConfig()  # pydantic gives every Config a copy of these
    data: DataConfig = DataConfig()
    world: WorldConfig = WorldConfig()
    dialogues: DialoguesConfig = DialoguesConfig()
    shop: ShopConfig = ShopConfig()
    encoder: EncoderConfig = EncoderConfig()
    roles: RolesConfig = RolesConfig()
    endpoint: EndpointConfig = EndpointConfig()
    rid: RidConfig = RidConfig()
    ranker: RankerConfig = RankerConfig()
    generator: GeneratorConfig = GeneratorConfig()
    sit: SitConfig = SitConfig()
    dpo: DpoConfig = DpoConfig()
    sft: SftConfig = SftConfig()
    reward: RewardConfig = RewardConfig()
    fuse: FuseConfig = FuseConfig()
    rl: RlConfig = RlConfig()
    quality: QualityConfig = QualityConfig()
    eval: EvalConfig = EvalConfig()
    ab: AbConfig = AbConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _rules_between_fields(self):
        data, name = self.data, self.run.name  # a message begins with the setting that it is about
        if name in (".", "..") or Path(name).name != name:
            raise ValueError("run.name: one folder name, without a path")
        if sorted(set(data.cuts)) != data.cuts:
            raise ValueError("data.cuts: increasing shares between 0 and 1")
        if abs(data.train + data.valid + data.judge + data.test - 1) > 1e-6:
            raise ValueError("data.train, data.valid, data.judge, data.test: must add to 1")
        shop = [bool(path) for path in (data.dialogues, data.catalogue, data.policies)]
        if self.run.method == "qualeqs" and (shop[1] != shop[2] or shop[0] > shop[1]):
            raise ValueError("data.dialogues, data.catalogue, data.policies: all three, or none, "
                             "or the last two: the shoppers are then simulated")
        if self.rid.min_keep > self.rid.max_keep:
            raise ValueError("rid.min_keep: at most rid.max_keep")
        if self.ab.searched < self.ab.lists:
            raise ValueError("ab.searched: at least ab.lists")
        for setting, methods in ONLY_FOR.items():  # else it would be ignored without a word
            if attrgetter(setting)(self) and self.run.method not in methods:
                raise ValueError(f"{setting}: is for run.method={methods}")
        for arm in self.rl.arms if self.run.method == "garm" else ():
            self._check_arm(arm)
        for role, player in self.roles:
            if player == "generator" and self.generator.model == TINY:
                reason = "needs another generator.model; the tiny one only writes lists"
                raise ValueError(f"roles.{role}=generator: {reason}")
        return self

    def _check_arm(self, arm: str) -> None:
        """Does the arm exist, its reward model, and the components that it goes without?"""
        method, *without = arm.split("-")
        parts = () if method == "rft" else COMPONENTS
        for kind, name, names in ("arm", method, ARMS), *(("component", x, parts) for x in without):
            if name not in names:
                raise ValueError(f"rl.arms: no {kind} '{name}' in {arm}; {_nearest(name, names)}")
        kind = {"rft": "bradley_terry", "dpo": "gaussian"}.get(method, method)
        if kind not in self.reward.kinds:
            raise ValueError(f"reward.kinds: rl.arms={arm} needs {kind}")


class _Loader(yaml.SafeLoader):
    """Reads every scalar as text: the fields know the types, and YAML takes `on` for true."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # <<: *anchor

    def construct_mapping(self, node, deep=False):
        if len({str(key.value) for key, _ in node.value}) < len(node.value):  # YAML drops the first
            raise yaml.MarkedYAMLError(problem="a name stands twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path | None = None, words: list[str] = ()) -> Config:
    """Read the models' defaults <- YAML file <- `section.key=value` words.

    Raises UserError of one line that names the file or word, the setting and the reason.
    """
    layers = [(str(path), _read_file(path))] if path else []
    layers += [(f"'{word}'", _read_word(word)) for word in words]
    tree, places = {}, {}  # places: "section" or "section.key" -> what set it last
    for place, layer in layers:
        if not isinstance(layer, dict):
            raise UserError(f"{place}: settings are a mapping of sections")
        for section, values in layer.items():
            if not isinstance(values, dict):
                raise UserError(f"{place}: {section}: holds settings, as {section}.key=value")
            tree.setdefault(section, {}).update(values)
            places |= dict.fromkeys([section, *(f"{section}.{key}" for key in values)], place)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]  # the first one, as `place: setting: reason`
        name, reason = ".".join(fault["loc"][:2]), fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            reason = _unknown(name)
        elif name:
            reason = f"{name}: {reason}"
        # A rule between fields has no name; what set its section last has broken it.
        place = places[name or reason.partition(".")[0]]
        if fault["type"] == "extra_forbidden" and Path(place).name == "config.yaml":
            reason += "; if a run's, another version of this code has made it: train it anew"
        raise UserError(f"{place}: {reason}") from None
    source = config.data.users or config.data.dialogues or path or "default"
    config.run.name = config.run.name or Path(source).stem
    return config


def _read_file(path: str | Path) -> dict:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; shipped ones are in configs/")
    # What is no UTF-8 becomes characters that YAML refuses.
    text = Path(path).read_text(encoding="utf-8", errors="surrogateescape")
    return _read_yaml(text, path) or {}  # None: nothing but comments


def _read_word(word: str) -> dict:
    name, equals, value = word.partition("=")
    if not equals or not name or name.startswith("-"):
        raise UserError(f"'{word}': settings are given as section.key=value")
    section, *keys = name.split(".")
    if len(keys) > 1:
        raise UserError(f"'{word}': a list is given whole, as data.cuts=[0.4,0.6]")
    value = _read_yaml(value, f"'{word}'")
    value = "" if value is None else value  # `data.users=` empties a setting
    return {section: {keys[0]: value}} if keys else {section: value}


def _read_yaml(text: str, place: str | Path):
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{place}: not readable as YAML: {' '.join(str(error).split())}") from None


def _unknown(name: str) -> str:
    """Refuse a section or setting with the nearest name."""
    kind, names = "section", list(Config.model_fields)
    if "." in name:
        kind, names = "setting", [f"{sec}.{key}" for sec, keys in Config() for key, _ in keys]
    return f"unknown {kind} '{name}'; {_nearest(name, sorted(names))}"


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names) or 'none'}"
