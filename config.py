"""Settings, run folders and files that are whole or absent.

Defaults live in the dataclasses below and nowhere else. A YAML file overrides them, `key=value`
words on the command line override the file:

    python train.py --stage dpo --config configs/tiny.yaml dpo.beta=0.2

Settings are read by OmegaConf's structured configs, so a wrong type is refused; an unknown key is
refused together with the nearest valid one.
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
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parent
EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Something the user can mend: scripts print the message alone and exit with 2."""


@dataclass
class RunConfig:
    name: str = ""  # the run folder is root/name; empty: named after data.users or the config file
    root: str = "runs"
    seed: int = 0  # every random choice outside the simulated world


@dataclass
class DataConfig:
    users: str = ""  # users.jsonl; empty: the simulated world writes one
    impressions: str = ""  # impressions.jsonl; empty with `users` set: no ranker, no DPO
    # A server's store: `--stage ranker --stage dpo` train a further round from what it showed.
    feedback: str = ""
    max_errors: int = 20  # bad lines listed before a reader gives up
    # Share of a user's sessions that count as history: early, middle, latest slice of the log.
    cuts: list[float] = field(default_factory=lambda: [0.4, 0.6, 0.8])
    # Users are split once: generator and ranker train on `train`, early stopping and thresholds use
    # `valid`, the ranker that judges is fitted on `judge`, figures are on `test` (RID's AUC and the
    # online test also on `judge`).
    train: float = 0.5
    valid: float = 0.1
    judge: float = 0.25
    test: float = 0.15


@dataclass
class WorldConfig:
    users: int = 800
    days: int = 120
    seed: int = 7
    median_sessions: int = 12  # 6 in a forum, 150 in a search log; heavy-tailed around it, 1 to 500
    starter_pool: int = 3000  # distinct starters that the logging policy retrieves from
    impressions_per_user: int = 50  # mean


@dataclass
class EncoderConfig:
    name: str = ""  # any sentence-transformers model; empty: the packaged all-MiniLM-L6-v2
    batch_size: int = 64


@dataclass
class RolesConfig:
    # Who plays each role: "rules" (roles.py), an LLM at `endpoint`, or the local "generator".
    teacher: str = "rules"
    matcher: str = "rules"
    judge: str = "rules"
    summariser: str = "rules"
    match_candidates: int = 3  # later summaries that an LLM compares with an earlier one ...
    match_floor: float = 0.3  # ... of those at least this near by cosine
    match_cosine: float = 0.45  # two summaries share a subject: a key phrase and this cosine ...
    match_cosine_alone: float = 0.85  # ... or this cosine alone
    theme_share: float = 0.02  # phrases of more people than this are themes, no subjects


@dataclass
class EndpointConfig:
    """An OpenAI-compatible server of chat completions, for roles."""

    base_url: str = ""  # empty: OPENAI_BASE_URL of the environment
    model: str = ""
    key_env: str = "OPENAI_API_KEY"  # the variable that holds the key; the key stands in no file
    concurrency: int = 8  # calls in flight
    retries: int = 4  # after 429, 5xx and time-outs, with growing pauses
    timeout: float = 60.0  # seconds
    temperature: float = 0.7
    max_tokens: int = 1024


@dataclass
class RidConfig:
    text_dim: int = 32  # the text embedding is projected to this before it meets the statistics
    hidden: int = 64  # width of E_u, E_h and of the space they share, per tower
    towers: int = 4  # scorers whose cosines are averaged
    dropout: float = 0.5
    temperature: float = 0.1  # Eq. (3)
    learning_rate: float = 1e-3
    epochs: int = 30
    patience: int = 5  # epochs without a better held-out per-user AUC that are waited through
    batch_users: int = 16
    negatives_within: int = 32  # per positive
    encoder_learning_rate: float = 0.0  # above 0: the encoder of E_u and E_h is fine-tuned too
    encoder_recompute: bool = False  # gradient caching: activations of one encoder.batch_size
    activity_groups: int = 3
    min_keep: int = 4  # about as many subjects as starters
    max_keep: int = 6
    duplicate_cosine: float = 0.9  # trigger interests nearer than this collapse to the latest


@dataclass
class RankerConfig:
    learning_rate: float = 1e-3
    slot_learning_rate: float = 0.02  # position explains most of a tap and must not wait for w
    epochs: int = 20
    patience: int = 3
    batch_impressions: int = 200
    click_share: float = 0.5  # a in click * (a + (1 - a) * min(sessions_after, D) / D)
    depth_cap: int = 5  # D


@dataclass
class GeneratorConfig:
    model: str = ""  # hub id or local folder; empty: the embedded base model (base.py)
    revision: str = ""  # of a hub id; empty: main
    load_in_4bit: bool = False
    lora_rank: int = 16
    lora_alpha: int = 32
    instruction: str = "Suggest {n} conversation starters about these interests."
    list_size: int = 5  # K
    max_prompt_tokens: int = 320
    max_new_tokens: int = 160
    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 50  # only these are drawn from; 0: all
    attempts: int = 3  # draws of a list, until it holds list_size starters (the engine: one)
    sampler: str = "fast"  # or "generate": its random numbers (the server always draws fast)
    sample_rows: int = 256  # sequences decoded together
    endpoint: str = ""  # http://host/v1 of a server with the saved adapters, to sample from instead
    endpoint_key_env: str = ""  # the variable that holds its key, if it wants one
    head_chunk: int = 256  # positions whose vocabulary row exists at once
    attention: str = "sdpa"  # of training; "flex_attention" skips masked blocks, on a GPU only
    gradient_checkpointing: bool = False  # layers are computed again in backward: less memory


@dataclass
class BaseConfig:
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 2
    kv_heads: int = 2
    intermediate: int = 256
    batches: int = 5000  # four minutes of an H100; too many for a CPU
    batch_tokens: int = 49_152  # prompts and lists
    lists: int = 4  # per prompt
    tokenizer_prompts: int = 20_000  # from which the vocabulary is learned
    learning_rate: float = 6e-3
    seed: int = 0


@dataclass
class SitConfig:
    max_rows: int = 800  # users' interests at a cut that the teacher writes for; 0: all there are
    lists_per_row: int = 1
    own_lists: int = 0  # above 0: tuned again with that many lists a row of the policy itself
    epochs: int = 5
    learning_rate: float = 1e-3
    batch_users: int = 8


@dataclass
class DpoConfig:
    rounds: int = 3
    max_users: int = 160  # per round, drawn at random; 0: all there are
    samples: int = 6  # lists sampled per user and round
    teacher_lists: int = 4  # lists of the teacher that join the pool
    grounded: bool = True  # no utility for what names no subject of the interests: garbled names
    beam: int = 8
    expand: int = 8
    weight: float = 0.2  # lambda: utility against diversity
    margin: float = 0.2  # a rejected list is lower by at least this (after min-max within the user)
    tolerance: float = 0.2  # ... while the other dimension differs by at most this
    random_lists: int = 8  # random draws from the pool among the lists considered
    negatives: list[str] = field(default_factory=lambda: ["utility", "diversity", "joint"])
    beta: float = 0.1
    learning_rate: float = 2.5e-4
    passes: int = 1  # over the accumulated pairs, per round
    batch_users: int = 8
    reference: str = "round"  # "round": policy at the start of the round; "sit": the SIT policy
    sft_weight: float = 1.0  # of the chosen lists' mean log-probability per token beside Eq. (6)
    pairs_per_user: int = 2  # from data.feedback, so that no single user can steer a round
    vanilla: bool = True  # the baseline SFT+DPO, of tapped against ignored lists, is trained too
    checkpoints: int = 2  # per round; the best by held-out utility and diversity is kept


@dataclass
class AbConfig:
    """What --reproduce compares, and the simulated online test (ab.py)."""

    days: int = 35
    users: int = 0  # of those that no method was trained on; 0: all
    split: str = "paired"  # every arm meets copies of the same people; "shares": each is in one arm
    lists: int = 6  # of each user and method: compared offline, shown in turn online
    searched: int = 6  # so many lists of a user give list search the starters for half as many
    copies: int = 32  # lives of each person, of which the mean counts: less noise of single taps


@dataclass
class EvalConfig:
    lists: int = 2  # sampled per user and method by the stage; --reproduce writes ab.lists
    bootstrap: int = 1000
    examples: int = 6  # users on the page of examples


@dataclass
class ServeConfig:
    """The server (serve.py)."""

    store: str = ""  # SQLite file of users, shown lists and taps; empty: serve.sqlite of the run
    key_env: str = "ICEBREAKER_KEY"  # the variable that holds the clients' key
    candidates: int = 4  # lists sampled for an answer and searched; 1, as the paper deploys
    ahead: int = 3  # lists kept ready for a user, beside the one that is shown
    window_ms: float = 4.0  # the first request of a batch waits so long for others
    batch: int = 32  # requests decoded together
    queue: int = 64  # requests that wait; the next one is refused with 429
    timeout: float = 30.0  # seconds of a request
    repeat_days: float = 7.0  # a starter that was shown is not shown again for so long
    min_utility: float = 0.0  # r_util of a written starter that is worth showing
    impression_hours: float = 48.0  # taps are taken for so long after an answer
    reload_seconds: float = 5.0  # between looks for a newly trained round
    arms: list[str] = field(default_factory=lambda: ["IceBreaker"])  # methods users are split over
    max_body: int = 2**20  # bytes
    max_sessions: int = 500  # kept of a user, and taken in one request
    max_text: int = 2000  # characters of a summary


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    roles: RolesConfig = field(default_factory=RolesConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    rid: RidConfig = field(default_factory=RidConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    base: BaseConfig = field(default_factory=BaseConfig)
    sit: SitConfig = field(default_factory=SitConfig)
    dpo: DpoConfig = field(default_factory=DpoConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ab: AbConfig = field(default_factory=AbConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)


def _known_keys() -> list[str]:
    config = Config()
    return [
        f"{section.name}.{key.name}"
        for section in dataclasses.fields(config)
        for key in dataclasses.fields(getattr(config, section.name))
    ]


def _refuse_unknown(tree: dict, where: str) -> None:
    """Raise UserError for the first key of a nested dict that no dataclass declares."""
    known = _known_keys()
    sections = {key.split(".")[0] for key in known}
    for section, values in tree.items():
        if section not in sections:
            raise UserError(f"{where}: unknown section '{section}'{_nearest(section, sections)}")
        if not isinstance(values, dict):
            raise UserError(
                f"{where}: {section}: holds settings (like {section}.key=value), not a single value"
            )
        for key in values:
            if f"{section}.{key}" not in known:
                raise UserError(
                    f"{where}: unknown setting '{section}.{key}'"
                    f"{_nearest(f'{section}.{key}', known)}"
                )


def _nearest(word: str, known) -> str:
    close = difflib.get_close_matches(str(word), sorted(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known: {', '.join(sorted(known))}"


def load_config(path: str | Path | None = None, overrides: list[str] = ()) -> Config:
    """Read dataclass defaults <- YAML file <- `section.key=value` words.

    Raises UserError that names the file or word, the setting and the nearest valid name.
    """
    merged, config = OmegaConf.structured(Config), Config()
    layers = []
    if path:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such config file; shipped ones are in configs/")
        try:
            layers.append((str(path), OmegaConf.load(path)))
        except Exception as error:  # yaml and unicode errors share no base class
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not readable as YAML: {reason}") from None
    for word in overrides:
        if "=" not in word or word.startswith(("-", "=")):
            raise UserError(f"'{word}': settings are given as section.key=value")
        try:
            layers.append((f"'{word}'", OmegaConf.from_dotlist([word])))
        except Exception as error:
            raise UserError(f"'{word}': {' '.join(str(error).split())}") from None
    for where, layer in layers:
        tree = OmegaConf.to_container(layer)
        if not isinstance(tree, dict):
            raise UserError(f"{where}: settings are a mapping of sections")
        _refuse_unknown(tree, where)
        try:
            merged = OmegaConf.merge(merged, layer)
            config = OmegaConf.to_object(merged)  # resolves ${...}
        except OmegaConfBaseException as error:
            setting = getattr(error, "full_key", None) or "setting"
            raise UserError(f"{where}: {setting}: {str(error).splitlines()[0]}") from None
        except TypeError:  # a list and a mapping do not merge
            raise UserError(f"{where}: a list is given whole, as data.cuts=[0.4,0.6]") from None
    config.run.name = config.run.name or Path(config.data.users or path or "tiny").stem
    _check(config)
    return config


POSITIVE = """ab.days ab.lists ab.copies ab.searched base.batches base.batch_tokens
    base.tokenizer_prompts base.lists base.hidden base.layers base.heads base.kv_heads
    data.max_errors dpo.passes dpo.rounds dpo.samples dpo.beam dpo.expand dpo.batch_users
    dpo.checkpoints dpo.beta dpo.pairs_per_user encoder.batch_size endpoint.concurrency
    endpoint.timeout endpoint.max_tokens eval.bootstrap eval.lists generator.max_prompt_tokens
    generator.list_size generator.lora_rank generator.max_new_tokens generator.temperature
    generator.attempts generator.head_chunk generator.sample_rows ranker.epochs
    ranker.batch_impressions ranker.depth_cap rid.batch_users rid.activity_groups
    rid.temperature rid.epochs rid.towers roles.match_candidates serve.candidates serve.batch
    serve.queue serve.timeout serve.impression_hours serve.reload_seconds serve.max_body
    serve.max_sessions serve.max_text sit.batch_users sit.epochs sit.lists_per_row world.users
    world.days"""
NOT_NEGATIVE = """endpoint.retries generator.top_k rid.encoder_learning_rate serve.ahead
    dpo.teacher_lists dpo.max_users dpo.margin"""


def _check(config: Config) -> None:
    """Raise UserError for values of the right type that cannot work."""
    data, rid, dpo = config.data, config.rid, config.dpo
    if (
        not config.run.name
        or Path(config.run.name).name != config.run.name
        or config.run.name in (".", "..")
    ):
        raise UserError("run.name: one folder name, without a path")
    shares = [data.train, data.valid, data.judge, data.test]
    if any(share <= 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise UserError("data.train, data.valid, data.judge, data.test: positive and adding to 1")
    increasing = data.cuts and sorted(set(data.cuts)) == data.cuts
    if not increasing or not 0 < data.cuts[0] <= data.cuts[-1] < 1:
        raise UserError("data.cuts: increasing shares between 0 and 1")
    if not 1 <= rid.min_keep <= rid.max_keep:
        raise UserError("rid.min_keep: between 1 and rid.max_keep")
    if not 0 <= dpo.weight <= 1:
        raise UserError("dpo.weight: between 0 (diversity only) and 1 (utility only)")
    roles = ("teacher", "matcher", "judge", "summariser")
    choices = {
        "dpo.reference": ("round", "sit"), "generator.sampler": ("fast", "generate"),
        "generator.attention": ("sdpa", "flex_attention"), "ab.split": ("paired", "shares"),
        **{f"roles.{role}": ("rules", "endpoint", "generator") for role in roles},
    }  # fmt: skip
    for key, names in choices.items():
        if _value(config, key) not in names:
            raise UserError(f"{key}: {', '.join(map(repr, names[:-1]))} or {names[-1]!r}")
    for role in roles:
        if getattr(config.roles, role) == "generator" and not config.generator.model:
            raise UserError(
                f"roles.{role}=generator: needs generator.model; the embedded one only writes lists"
            )
    if not 0 < config.generator.top_p <= 1:
        raise UserError("generator.top_p: above 0, and 1 at most")
    if not config.serve.arms or set(config.serve.arms) - {"PE", "SFT", "IceBreaker"}:
        raise UserError("serve.arms: some of PE, SFT, IceBreaker")
    if config.ab.searched < config.ab.lists:
        raise UserError("ab.searched: at least ab.lists")
    unknown = set(dpo.negatives) - {"utility", "diversity", "joint"}
    if unknown or not dpo.negatives:
        raise UserError("dpo.negatives: some of utility, diversity, joint")
    for key in POSITIVE.split():
        if not _value(config, key) > 0:  # nan is refused too
            raise UserError(f"{key}: must be above 0")
    for key in NOT_NEGATIVE.split():
        if not _value(config, key) >= 0:
            raise UserError(f"{key}: must be 0 or more")
    if config.base.hidden % config.base.heads or config.base.heads % config.base.kv_heads:
        raise UserError("base.heads: must divide base.hidden, and base.kv_heads base.heads")


def _value(config: Config, key: str):
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def digest(*parts) -> str:
    """Twelve hex digits of anything JSON can hold (dataclasses too)."""
    text = json.dumps(parts, sort_keys=True, default=dataclasses.asdict)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_digest(path: str | Path) -> str:
    """Twelve hex digits of a file's bytes, read again only where the file has changed."""
    found = os.stat(path)
    return _file_digest(str(path), found.st_ino, found.st_mtime_ns, found.st_size)


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
        import torch

        torch.distributed.barrier()


def share(items) -> list:
    """The items that are this process's work: one in turn for each process."""
    number, count = processes()
    return list(items)[number::count]


def gather(own: list) -> list:
    """What every process made of its `share`, in the order of the whole; JSON values only."""
    _, count = processes()
    if count == 1:
        return own
    import torch

    text = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(count)]
    torch.distributed.all_gather(sizes, torch.tensor([len(text)]))
    texts = [torch.zeros(int(max(sizes)), dtype=torch.uint8) for _ in sizes]
    padded = torch.nn.functional.pad(text, (0, len(texts[0]) - len(text)))
    torch.distributed.all_gather(texts, padded)
    parts = [json.loads(bytes(t[:n].tolist())) for t, n in zip(texts, sizes, strict=True)]
    return [parts[i % count][i // count] for i in range(sum(map(len, parts)))]


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
        if old.is_dir() and not path.exists():
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
    from safetensors.torch import save_file

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
        if not describe:
            return
        with atomic_path(self.path / "config.yaml") as temporary:
            temporary.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
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


def environment(config: Config) -> dict:
    """What a figure of this run depends on besides the config: versions, commit, data, machine."""

    def version(name):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*words):
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    packages = """torch transformers peft bitsandbytes sentence-transformers numpy scikit-learn
        tokenizers omegaconf pydantic""".split()
    data = [path for path in (config.data.users, config.data.impressions) if path]
    try:
        commit = git("rev-parse", "HEAD")
        dirty = bool(git("status", "--porcelain", "--", ".", ":!results"))
    except OSError:  # no git on this machine
        commit, dirty = None, None
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "processors": os.cpu_count(),
        "seed": config.run.seed,
        "versions": {name: version(name) for name in packages},
        "commit": commit,
        "uncommitted_changes": dirty,
        "data": {path: file_digest(path) for path in data if Path(path).is_file()},
    }


WRITE_FAILED = ("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_READONLY")


def script(main) -> None:
    """Run a script's main(): what the user can mend becomes one message on stderr, exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except OSError as error:  # a folder that cannot be written, a full disk
        if not error.filename and error.errno != errno.ENOSPC:
            raise
        print(f"error: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except sqlite3.OperationalError as error:  # of the cache of answers, or a server's store
        if getattr(error, "sqlite_errorname", "") not in WRITE_FAILED:
            raise
        print(f"error: SQLite: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(130)
