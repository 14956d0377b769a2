"""Settings, run folders, progress, and files that are whole or absent.

Defaults live in the models below and nowhere else. A YAML file overrides them, `section.key=value`
words on the command line override the file:

    python train.py --stage dpo --config configs/tiny.yaml dpo.beta=0.2

Bounds and choices stand on the field, rules between fields in a short validator. What is unknown is
refused with the nearest valid name, a wrong value with the file or word it came from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Something the user can mend: scripts print the message alone and exit with 2."""


# --------------------------------------------------------------------------------------- settings

Share = Annotated[float, Field(gt=0, lt=1)]
Role = Literal["rules", "endpoint", "generator"]  # rules.py; an LLM at `endpoint`; the local one


class Section(BaseModel):
    # Assignments are not checked: stage keys blank single settings of a copy (train.stage_key).
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class RunConfig(Section):
    name: str = ""  # the run folder is root/name; empty: named after data.users or the config file
    root: str = "runs"
    seed: int = 0  # every random choice outside the simulated world

    @model_validator(mode="after")
    def _one_folder(self):
        if self.name in (".", "..") or Path(self.name).name != self.name:
            raise ValueError("run.name: one folder name, without a path")
        return self


class DataConfig(Section):
    users: str = ""  # users.jsonl; empty: the simulated world writes one
    impressions: str = ""  # impressions.jsonl; empty with `users` set: no ranker, no DPO
    # A server's store: `--stage ranker --stage dpo` train a further round from what it showed.
    feedback: str = ""
    # Share of a user's sessions that count as history: early, middle, latest slice of the log.
    cuts: list[Share] = Field([0.4, 0.6, 0.8], min_length=1)
    # Users are split once: generator and ranker train on `train`, early stopping and thresholds use
    # `valid`, the ranker that judges is fitted on `judge`, figures are on `test` (RID's AUC and the
    # online test also on `judge`).
    train: Share = 0.5
    valid: Share = 0.1
    judge: Share = 0.25
    test: Share = 0.15

    @model_validator(mode="after")
    def _cuts_increase_and_splits_add_up(self):
        if sorted(set(self.cuts)) != self.cuts:
            raise ValueError("data.cuts: increasing shares between 0 and 1")
        if abs(self.train + self.valid + self.judge + self.test - 1) > 1e-6:
            raise ValueError("data.train, data.valid, data.judge, data.test: must add to 1")
        return self


class WorldConfig(Section):
    users: PositiveInt = 800
    days: PositiveInt = 120
    seed: int = 7
    starter_pool: PositiveInt = 3000  # distinct starters that the logging policy retrieves from
    impressions_per_user: PositiveInt = 50  # mean


class EncoderConfig(Section):
    name: str = ""  # any sentence-transformers model; empty: the packaged all-MiniLM-L6-v2
    batch_size: PositiveInt = 64


class RolesConfig(Section):
    teacher: Role = "rules"
    matcher: Role = "rules"
    judge: Role = "rules"
    summariser: Role = "rules"


class EndpointConfig(Section):
    """An OpenAI-compatible server of chat completions, for roles."""

    base_url: str = ""  # empty: OPENAI_BASE_URL of the environment
    model: str = ""
    key_env: str = "OPENAI_API_KEY"  # the variable that holds the key; the key stands in no file
    concurrency: PositiveInt = 8  # calls in flight
    retries: NonNegativeInt = 4  # after 429, 5xx and time-outs, with growing pauses
    timeout: PositiveFloat = 60.0  # seconds
    temperature: NonNegativeFloat = 0.7
    max_tokens: PositiveInt = 1024


class RidConfig(Section):
    text_dim: PositiveInt = 32  # a text embedding is projected to this, to meet the statistics
    hidden: PositiveInt = 64  # width of E_u, E_h and of the space they share, per tower
    towers: PositiveInt = 4  # scorers whose cosines are averaged
    dropout: float = Field(0.5, ge=0, lt=1)
    temperature: PositiveFloat = 0.1  # Eq. (3)
    learning_rate: PositiveFloat = 1e-3
    epochs: PositiveInt = 30
    patience: NonNegativeInt = 5  # epochs without a better held-out per-user AUC, waited through
    batch_users: PositiveInt = 16
    negatives_within: NonNegativeInt = 32  # per positive
    activity_groups: PositiveInt = 3
    min_keep: PositiveInt = 4  # about as many subjects as starters
    max_keep: PositiveInt = 6
    duplicate_cosine: float = 0.9  # trigger interests nearer than this collapse to the latest

    @model_validator(mode="after")
    def _gate_has_room(self):
        if self.min_keep > self.max_keep:
            raise ValueError("rid.min_keep: between 1 and rid.max_keep")
        return self


class RankerConfig(Section):
    learning_rate: PositiveFloat = 1e-3
    epochs: PositiveInt = 20
    patience: NonNegativeInt = 3
    batch_impressions: PositiveInt = 200
    # a in click * (a + (1 - a) * min(sessions_after, D) / D)
    click_share: float = Field(0.5, ge=0, le=1)
    depth_cap: PositiveInt = 5  # D


class GeneratorConfig(Section):
    model: str = ""  # hub id or local folder; empty: the embedded tiny one (tools/tiny_model.py)
    revision: str = ""  # of a hub id; empty: main
    load_in_4bit: bool = False
    lora_rank: PositiveInt = 16
    lora_alpha: PositiveInt = 32
    instruction: str = "Suggest {n} conversation starters about these interests."
    list_size: PositiveInt = 5  # K
    max_prompt_tokens: PositiveInt = 320
    max_new_tokens: PositiveInt = 160
    temperature: PositiveFloat = 0.7
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: NonNegativeInt = 50  # only these are drawn from; 0: all
    attempts: PositiveInt = 3  # draws of a list until it holds list_size starters (the engine: one)
    sample_rows: PositiveInt = 256  # sequences decoded together
    endpoint: str = ""  # http://host/v1 of a server with the saved adapters, to sample from instead
    endpoint_key_env: str = ""  # the variable that holds its key, if it wants one
    gradient_checkpointing: bool = False  # layers are computed again in backward: less memory


class SitConfig(Section):
    max_rows: NonNegativeInt = 800  # users at a cut that the teacher writes for; 0: all there are
    lists_per_row: PositiveInt = 1
    own_lists: NonNegativeInt = 0  # above 0: tuned again with so many lists a row of the policy
    epochs: PositiveInt = 5
    learning_rate: PositiveFloat = 1e-3
    batch_users: PositiveInt = 8


class DpoConfig(Section):
    rounds: PositiveInt = 3
    max_users: NonNegativeInt = 160  # per round, drawn at random; 0: all there are
    samples: PositiveInt = 6  # lists sampled per user and round
    teacher_lists: NonNegativeInt = 4  # lists of the teacher that join the pool
    grounded: bool = True  # no utility for what names no subject of the interests: garbled names
    beam: PositiveInt = 8
    expand: PositiveInt = 8
    weight: float = Field(0.2, ge=0, le=1)  # lambda: 0 diversity only, 1 utility only
    # A rejected list is lower by at least the margin (after min-max within the user), while the
    # other dimension differs by at most the tolerance.
    margin: NonNegativeFloat = 0.2
    tolerance: NonNegativeFloat = 0.2
    negatives: list[Literal["utility", "diversity", "joint"]] = Field(
        ["utility", "diversity", "joint"], min_length=1
    )
    beta: PositiveFloat = 0.1
    learning_rate: PositiveFloat = 2.5e-4
    passes: PositiveInt = 1  # over the accumulated pairs, per round
    batch_users: PositiveInt = 8
    reference: Literal["round", "sit"] = "round"  # the policy at the round's start, or after SIT
    # Of the chosen lists' mean log-probability per token beside Eq. (6).
    sft_weight: NonNegativeFloat = 1.0
    pairs_per_user: PositiveInt = 2  # from data.feedback, so that no single user can steer a round
    vanilla: bool = True  # the baseline SFT+DPO, of tapped against ignored lists, is trained too
    checkpoints: PositiveInt = 2  # per round; the best by held-out utility and diversity is kept


class AbConfig(Section):
    """What --reproduce compares, and the simulated online test (world/ab.py)."""

    days: PositiveInt = 35
    lists: PositiveInt = 6  # of each user and method: compared offline, shown in turn online
    searched: PositiveInt = 6  # so many lists of a user give list search the starters for half
    copies: PositiveInt = 32  # lives of each person, of which the mean counts: less noise of taps

    @model_validator(mode="after")
    def _search_draws_enough(self):
        if self.searched < self.lists:
            raise ValueError("ab.searched: at least ab.lists")
        return self


class EvalConfig(Section):
    lists: PositiveInt = 2  # sampled per user and method by the stage; --reproduce writes ab.lists
    bootstrap: PositiveInt = 1000
    examples: NonNegativeInt = 6  # users on the page of examples


class ServeConfig(Section):
    """The server (serve.py)."""

    store: str = ""  # SQLite file of users, shown lists and taps; empty: serve.sqlite of the run
    key_env: str = "ICEBREAKER_KEY"  # the variable that holds the clients' key
    candidates: PositiveInt = 4  # lists sampled for an answer and searched; 1, as the paper deploys
    ahead: NonNegativeInt = 3  # lists kept ready for a user, beside the one that is shown
    batch: PositiveInt = 32  # requests decoded together
    queue: PositiveInt = 64  # requests that wait; the next one is refused with 429
    timeout: PositiveFloat = 30.0  # seconds of a request
    repeat_days: float = 7.0  # a starter that was shown is not shown again for so long
    # Methods that users are split over.
    arms: list[Literal["PE", "SFT", "IceBreaker"]] = Field(["IceBreaker"], min_length=1)
    max_sessions: PositiveInt = 500  # kept of a user, and taken in one request


class Config(Section):
    run: RunConfig = RunConfig()  # pydantic gives every Config a copy of these
    data: DataConfig = DataConfig()
    world: WorldConfig = WorldConfig()
    encoder: EncoderConfig = EncoderConfig()
    roles: RolesConfig = RolesConfig()
    endpoint: EndpointConfig = EndpointConfig()
    rid: RidConfig = RidConfig()
    ranker: RankerConfig = RankerConfig()
    generator: GeneratorConfig = GeneratorConfig()
    sit: SitConfig = SitConfig()
    dpo: DpoConfig = DpoConfig()
    eval: EvalConfig = EvalConfig()
    ab: AbConfig = AbConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="after")
    def _players_can_play(self):
        for role, player in self.roles:
            if player == "generator" and not self.generator.model:
                raise ValueError(
                    f"roles.{role}=generator: needs generator.model; the embedded one only writes "
                    f"lists"
                )
        return self


class _Loader(yaml.SafeLoader):
    """Reads every scalar as text: the fields know the types, and YAML takes `on` for true."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # <<: *anchor


def load_config(path: str | Path | None = None, words: list[str] = ()) -> Config:
    """Read the models' defaults <- YAML file <- `section.key=value` words.

    Raises UserError of one line that names the file or word, the setting and the reason.
    """
    layers = [(str(path), _read_file(path))] if path else []
    layers += [(f"'{word}'", _read_word(word)) for word in words]
    tree, places = {}, {}  # places: (section,) or (section, key) -> what set it last
    for place, layer in layers:
        if not isinstance(layer, dict):
            raise UserError(f"{place}: settings are a mapping of sections")
        for section, values in layer.items():
            if not isinstance(values, dict):
                raise UserError(f"{place}: {section}: holds settings, as {section}.key=value")
            tree.setdefault(section, {}).update(values)
            places |= dict.fromkeys([(section,), *((section, key) for key in values)], place)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, places)) from None
    config.run.name = config.run.name or Path(config.data.users or path or "tiny").stem
    return config


def _read_file(path: str | Path):
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; shipped ones are in configs/")
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from None
    return {} if tree is None else tree  # None: nothing but comments


def _read_word(word: str) -> dict:
    name, equals, value = word.partition("=")
    if not equals or not name or name.startswith("-"):
        raise UserError(f"'{word}': settings are given as section.key=value")
    section, *keys = name.split(".")
    if len(keys) > 1:
        raise UserError(f"'{word}': a list is given whole, as data.cuts=[0.4,0.6]")
    try:
        value = yaml.load(value, _Loader) or ""
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"'{word}': {' '.join(str(error).split())}") from None
    return {section: {keys[0]: value}} if keys else {section: value}


def _explain(error: ValidationError, places: dict) -> str:
    """The first fault as `place: setting: reason`."""
    fault = error.errors(include_url=False)[0]
    where, reason = fault["loc"][:2], fault["msg"].removeprefix("Value error, ")
    name = ".".join(where)
    if fault["type"] == "extra_forbidden":
        names = Config.model_fields
        if len(where) == 2:
            names = [f"{s}.{k}" for s, f in names.items() for k in f.annotation.model_fields]
        close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(names))}"
        reason = f"unknown {'setting' if len(where) == 2 else 'section'} '{name}'; {hint}"
    elif fault["type"] != "value_error":  # a validator's message names its settings itself
        reason = f"{name}: {reason}"
    place = places.get(where) or places.get(where[:1])  # a rule between fields: the section's last
    return f"{place}: {reason}" if place else reason


def digest(*parts) -> str:
    """Twelve hex digits of anything JSON can hold (models and dataclasses too)."""

    def plain(part):
        return part.model_dump() if isinstance(part, BaseModel) else dataclasses.asdict(part)

    text = json.dumps(parts, sort_keys=True, default=plain)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_digest(path: str | Path) -> str:
    """Twelve hex digits of a file's bytes, read again only where the file has changed."""
    stat = os.stat(path)
    return _file_digest(str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache
def _file_digest(path: str, *version: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


# -------------------------------------------------------------------- processes of one torchrun


def processes() -> tuple[int, int]:
    """(number of this process, how many there are) in a `torchrun` launch; (0, 1) outside one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # other launchers set RANK too
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def meet() -> None:
    """Wait until every process is here."""
    if processes()[1] > 1:
        import torch  # `--help` and refused settings need not wait for it; nor below

        torch.distributed.barrier()


def share(items) -> list:
    """The items that are this process's work: one in turn for each process."""
    number, count = processes()
    return list(items)[number::count]


def gather(results: list) -> list:
    """What every process made of its `share`, in the order of the whole; JSON values only."""
    _, count = processes()
    if count == 1:
        return results
    import torch

    text = torch.frombuffer(bytearray(json.dumps(results).encode()), dtype=torch.uint8)  # (bytes,)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(count)]
    torch.distributed.all_gather(sizes, torch.tensor([len(text)]))
    texts = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    padded = torch.nn.functional.pad(text, (0, len(texts[0]) - len(text)))
    torch.distributed.all_gather(texts, padded)  # it takes texts of one length only
    parts = [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, sizes, strict=True)]
    return [parts[i % count][i // count] for i in range(sum(map(len, parts)))]


class progress:  # lower-case, as it is called like tqdm
    """Iterate over items under a tqdm bar, or with plain lines where stderr is no terminal.

    A line has the label, step of total, rate, time left and what `set` was given last; it comes
    after a step, `every` seconds apart. Of several processes only the first one shows any.
    """

    every = 20.0  # seconds: with steps of up to ten, no half minute passes without a line
    line = "{desc}{n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"

    def __init__(self, items, label: str, total: int | None = None):
        first, terminal = processes()[0] == 0, sys.stderr.isatty()
        self.label, self.plain = label, first and not terminal
        self.bar = tqdm(items, label, total, leave=False, disable=not (first and terminal))
        self.figures = {}

    def set(self, **figures) -> None:
        self.figures = figures
        self.bar.set_postfix(figures, refresh=False)

    def __iter__(self):
        start = last = time.monotonic()
        for step, item in enumerate(self.bar, 1):
            yield item
            now = time.monotonic()
            if self.plain and now - last >= self.every:
                last = now
                print(self._line(step, now - start), file=sys.stderr, flush=True)

    def _line(self, step: int, seconds: float) -> str:
        shown = {"prefix": f"{self.label}: ", "postfix": self.bar.postfix or ""}
        return tqdm.format_meter(step, self.bar.total, seconds, bar_format=self.line, **shown)


# -------------------------------------------------------------------------------- whole or absent


@contextlib.contextmanager
def atomic_path(path: str | Path):
    """Yield a temporary path beside `path`; on success sync it and rename it into place.

    Works for a file or a folder. A killed process leaves the old content, the new or (of a folder)
    none, never half. Of several processes, which all have the same to write, the first one's stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}{x}.tmp") for x in ("", ".old"))
    try:
        yield temporary
        if processes()[0] > 0:
            return
        paths = temporary.rglob("*") if temporary.is_dir() else [temporary]
        for file in filter(Path.is_file, paths):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if path.is_dir() and temporary.is_dir():  # rename cannot replace a folder that is not empty
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        if old.is_dir() and not path.exists():  # stopped between the two renames
            os.replace(old, path)
        for rest in (temporary, old):
            if rest.is_dir():
                shutil.rmtree(rest)
            else:
                rest.unlink(missing_ok=True)


def write_json(path: str | Path, value) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | Path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_tensors(path: str | Path, tensors: dict) -> None:
    from safetensors.torch import save_file  # it imports torch

    with atomic_path(path) as temporary:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)


def read_tensors(path: str | Path) -> dict:
    from safetensors.torch import load_file

    return load_file(path)


class RunFolder:
    """`runs/<name>/`: config.yaml, environment.json, metrics.jsonl and one folder per stage.

    A stage is done when `<stage>/done.json` holds the key (a digest of all that the stage depends
    on) it was run with; the file is written last.
    """

    def __init__(self, config: Config, describe: bool = True):
        """describe: say in the folder with which settings; not where a finished run is used."""
        self.path = Path(config.run.root) / config.run.name
        self.path.mkdir(parents=True, exist_ok=True)
        if describe:
            text = yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True)
            with atomic_path(self.path / "config.yaml") as temporary:
                temporary.write_text(text, encoding="utf-8")
            write_json(self.path / "environment.json", environment(config))

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def is_done(self, stage: str, key: str) -> bool:
        marker = self.path / stage / "done.json"
        return marker.is_file() and read_json(marker)["key"] == key

    def mark_done(self, stage: str, key: str, **figures) -> None:
        """Say so on disk. All processes come here together: none asks `is_done` meanwhile."""
        meet()
        write_json(self.path / stage / "done.json", {"key": key, **figures})
        meet()

    def figures(self, stage: str) -> dict:
        """What mark_done was given for this stage."""
        return {k: v for k, v in read_json(self.path / stage / "done.json").items() if k != "key"}

    def log(self, stage: str, **figures) -> None:
        """Append one line to metrics.jsonl."""
        if processes()[0] > 0:
            return
        line = json.dumps({"time": round(time.time(), 1), "stage": stage, **figures})
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(line + "\n")


PACKAGES = """torch transformers peft bitsandbytes sentence-transformers numpy scikit-learn
    tokenizers pydantic""".split()


def environment(config: Config) -> dict:
    """What a figure of this run depends on besides the config: versions, commit, data, machine."""

    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*words):
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--", ".", ":!results")  # None: no repository
    data = [path for path in (config.data.users, config.data.impressions) if path]
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processors": os.cpu_count(),
        "seed": config.run.seed,
        "versions": {name: version(name) for name in PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "data": {path: file_digest(path) for path in data if Path(path).is_file()},
    }


WRITE_FAILED = ("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_READONLY")


def script(main) -> None:
    """Run a script's main(): what the user can mend becomes one message on stderr, exit code 2."""
    try:
        main()
    except UserError as error:
        message = str(error)
    except OSError as error:  # a folder that cannot be written, a full disk
        if not error.filename and error.errno != errno.ENOSPC:
            raise
        message = f"{error.filename or 'writing'}: {error.strerror}"
    except sqlite3.OperationalError as error:  # of the cache of answers, or a server's store
        if getattr(error, "sqlite_errorname", "") not in WRITE_FAILED:
            raise  # a mistake of ours keeps its traceback
        message = f"SQLite: {error}"
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)
