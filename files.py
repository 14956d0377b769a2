"""What every file below needs: digests, the processes of one `torchrun`, progress that a log can
show, files that are whole or absent, the folder of a run, and the end of a script.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml
from pydantic import BaseModel
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent  # of the checkout: scripts run from anywhere


class UserError(Exception):
    """Something the user can mend: scripts print the message alone and exit with 2."""


def digest(*parts) -> str:
    """Twelve hex digits of anything JSON can hold, and of pydantic models."""
    # Sorted: where a setting stands among the others changes nothing.
    text = json.dumps(parts, sort_keys=True, default=BaseModel.model_dump)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def file_digest(path: str | Path) -> str:
    """Twelve hex digits of a file's bytes, read again only where the file has changed."""
    stat = os.stat(path)  # these three change with every rewrite: a rename brings another inode
    return _file_digest(str(path), stat.st_ino, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache
def _file_digest(path: str, *version: int) -> str:
    return sha256(path)[:12]


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_OF_TEXTS: list = []  # every cache of cache_texts


def cache_texts(most: int) -> Callable:
    """functools.lru_cache for a function of people's texts: `forget_texts` empties it."""
    return lambda function: _OF_TEXTS.append(cache := functools.lru_cache(most)(function)) or cache


def forget_texts() -> None:
    for cache in _OF_TEXTS:
        cache.cache_clear()


def processes() -> tuple[int, int]:
    """(number of this process, how many there are) in a `torchrun` launch; (0, 1) outside one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # other launchers set RANK too
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def meet() -> None:
    """Wait until every process is here."""
    if processes()[1] > 1:  # train.joined_processes has made the group
        import torch  # `--help` and refused settings need not wait for it; nor below

        torch.distributed.barrier()


def share(items) -> list:
    """The items that are this process's work: one in turn for each process."""
    number, count = processes()
    return list(items)[number::count]  # in turn: neighbours in a sorted list are equally long


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
    # Undo the dealing of `share`.
    return [parts[i % count][i // count] for i in range(sum(map(len, parts)))]


def gather_counts(counts: dict[str, int]) -> dict[str, int]:
    parts = gather([counts])
    return {name: sum(part.get(name, 0) for part in parts) for part in parts for name in part}


class progress:  # lower-case, as it is called like tqdm
    """Iterate over items under a tqdm bar, or with plain lines where stderr is no terminal.

    A line has the label, step of total, rate, time left and what `set` was given last; it comes
    after a step, `every` seconds apart. Of several processes only the first one shows any.
    """

    every = 20.0  # seconds: with steps of up to ten, no half minute passes without a line
    line = "{desc}{n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"

    def __init__(self, items, label: str, total: int | None = None):
        first, terminal = processes()[0] == 0, sys.stderr.isatty()  # stdout is for results
        self.label, self.plain = label, first and not terminal
        self.bar = tqdm(items, label, total, leave=False, disable=not (first and terminal))
        self.bar.postfix = ""

    def set(self, **figures) -> None:
        """Show these figures, such as a loss, until the next ones are set."""
        self.bar.set_postfix(figures, refresh=False)

    def __iter__(self):
        start = last = time.monotonic()
        for step, item in enumerate(self.bar, 1):
            yield item
            now = time.monotonic()
            if self.plain and now - last >= self.every:
                last, steps = now, (step, self.bar.total, now - start)
                words = {"prefix": f"{self.label}: ", "postfix": self.bar.postfix}
                line = tqdm.format_meter(*steps, bar_format=self.line, **words)
                print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def atomic_path(path: str | Path):
    """Yield a temporary path beside `path`; on success sync it and rename it into place.

    Works for a file or a folder. A killed process leaves the old content, the new or (of a folder)
    none, never half. Of several processes, which all have the same to write, the first one's stays.
    """
    path = Path(path)  # of a link its target stays: it may be a stranger's
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside it: a rename does not cross disks. The process id: two runs may write the same file.
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}{x}.tmp") for x in ("", ".old"))
    try:
        yield temporary
        if processes()[0] > 0:
            return
        for file in filter(Path.is_file, [temporary, *temporary.rglob("*")]):
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())  # else the name may reach the disk before the content
        if path.is_dir() and temporary.is_dir():  # rename cannot replace a folder that is not empty
            os.replace(path, old)
        os.replace(temporary, path)
    except Exception as error:  # what safetensors says of a full or a broken disk
        if code := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
        raise
    finally:
        if old.is_dir() and not path.exists():  # stopped between the two renames
            os.replace(old, path)
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)  # does nothing to a file
            rest.unlink(missing_ok=True)


def clear_leftovers(folder: Path) -> None:
    """Delete what killed processes of this machine were writing there (atomic_path)."""
    for path in folder.rglob(".*.tmp"):
        number = path.name.removesuffix(".tmp").removesuffix(".old").rpartition(".")[2]
        if number.isdigit() and not Path("/proc", number).exists() and Path("/proc").exists():
            shutil.rmtree(path, ignore_errors=True)  # does nothing to a file
            path.unlink(missing_ok=True)


AGAIN = "bring back a copy, or delete it and run the stage that writes it again"


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value) -> None:
    # People read these, and their diffs.
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_lines(path: str | Path, rows: Iterable) -> None:
    """JSON lines, one a row."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: str | Path) -> list:
    """Rows of write_lines."""
    with open(path, encoding="utf-8") as file:  # str.splitlines would part a text at U+2028
        return [*map(json.loads, file)]


@functools.cache
def read_yaml(path: str) -> dict:
    """What a YAML file of this checkout holds: figures of the papers, tables, texts."""
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def read_json(path: str | Path, **kinds):
    """What write_json wrote; raises UserError if damaged, or no object with `kinds` of values."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # cut short by a full disk or a copy, say
        raise UserError(f"{path}: damaged, no JSON ({error}); {AGAIN}") from None
    if kinds and not (isinstance(value, dict) and all(
            isinstance(value.get(name), kind) for name, kind in kinds.items())):
        raise UserError(f"{path}: of another shape, without {', '.join(kinds)}; {AGAIN}")
    return value


def write_tensors(path: str | Path, tensors: dict) -> None:
    from safetensors.torch import save_file  # it imports torch

    with atomic_path(path) as temporary:
        # It refuses what is not contiguous, or has memory in common with another.
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary)


def read_tensors(path: str | Path) -> dict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged, no weights ({error}); {AGAIN}") from None
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{path}: weights that are no finite numbers; {AGAIN}")
    return tensors


# ------------------------------------------------------------------------------ the folder of a run


def one_line(figures: dict) -> str:
    """Figures as one line: floats to four digits, nested ones in braces."""

    def show(value):
        if isinstance(value, float):
            return f"{value:.4g}"
        if isinstance(value, dict):
            return "{" + one_line(value) + "}"
        return "[" + ", ".join(map(show, value)) + "]" if isinstance(value, list) else str(value)

    return ", ".join(f"{name} {show(value)}" for name, value in figures.items())


class RunFolder:
    """`runs/<name>/`: config.yaml, environment.json, metrics.jsonl and one folder per stage.

    A stage is done when `<stage>/done.json`, its last file, holds the key that it was run with: a
    digest of all that the stage depends on. Beside the key stand digests of the stage's files and
    the length of the log by then, so that damage is found and a killed attempt leaves no line.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)  # made by who writes there: a mistyped name leaves none

    def describe(self, settings: dict, about: dict) -> None:
        """Write config.yaml and environment.json; what killed processes have left is cleared."""
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_text(self.path / "config.yaml", text)
        write_json(self.path / "environment.json", about)
        if processes()[0] == 0:
            clear_leftovers(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def has_run(self, stage: str) -> bool:
        return (self.path / stage / "done.json").is_file()

    def key(self, stage: str) -> str | None:
        """With which key it has run, if it has."""
        return (self._read(stage, "done") or {}).get("key")

    def is_done(self, stage: str, key: str) -> bool:
        """Did it run with this key, and is what it wrote still there? UserError if damaged."""
        return self.key(stage) == key and not self.lost(stage)

    def lost(self, stage: str) -> list[Path]:
        """Files of the stage that are no longer there. UserError if one has changed since."""
        # A missing one is made again; what has changed may be the work of hours, or of somebody.
        files = self.record(stage).get("files", {})
        paths = {self.path / stage / name: written for name, written in files.items()}
        for path, written in paths.items():
            if path.is_file() and file_digest(path) != written:
                raise UserError(f"{path}: has changed since stage {stage} wrote it; {AGAIN}")
        return [path for path in paths if not path.is_file()]

    def require(self, *stages: str) -> None:
        """Raise UserError unless these have run, and all that they wrote is as they wrote it."""
        for stage in stages:
            self.figures(stage)  # that it has run
            if lost := self.lost(stage):
                raise UserError(f"{lost[0]}: is missing; {AGAIN}")

    def begin(self, stage: str, key: str, **record) -> bool:
        """Has the stage, or a part of one, to run with this key? Then what tells of another run of
        it is withdrawn first: the record of files that are about to be replaced, and the lines of a
        killed attempt in the log. record: kept beside it until it is done, and then."""
        done, begun = self.is_done(stage, key), self.path / stage / "begun.json"
        if done and processes()[0] == 0:  # it was killed behind its last file
            begun.unlink(missing_ok=True)
        elif processes()[0] == 0:
            self.withdraw(stage)
            self._cut_log()
            if record:
                write_json(begun, {"key": key, "record": record})
        return not done

    def once(self, part: str, key: str, make: Callable[[], dict]) -> dict:
        """The figures of a part of a stage, made unless it has run with this key: a killed stage
        goes on behind its parts."""
        if self.begin(part, key):
            self.mark_done(part, key, **make())
            print(f"  {part}: {one_line(self.figures(part))}", flush=True)
        return self.figures(part)

    def withdraw(self, stage: str) -> None:
        if processes()[0] == 0:
            (self.path / stage / "done.json").unlink(missing_ok=True)

    def _cut_log(self) -> None:
        """Leave in metrics.jsonl what stood there when a stage, or a part of one, was last done."""
        log, here, length = self.path / "metrics.jsonl", self.path.name, 0
        for done in self.path.rglob("done.json"):  # a variant starts as a copy, with its own log
            folder, written = self.record(done.parent).get("log", (here, 2**60))
            length = max(length, written) if folder == here else length
        if log.is_file() and log.stat().st_size > length:
            os.truncate(log, length)

    def mark_done(self, stage: str, key: str, **figures) -> None:
        """Say so on disk. All processes come here together: none asks `is_done` meanwhile."""
        meet()
        if processes()[0] == 0:
            folder, log = self.path / stage, self.path / "metrics.jsonl"
            begun, own = folder / "begun.json", ["done.json", "begun.json"]
            # sampled.json has its own key: what the next stage sampled, beside the policy.
            # Without a simulated world's hidden state, which may be taken away: none needs it.
            files = {name: file_digest(path) for path in sorted(folder.rglob("*"))
                     if path.is_file() and (name := str(path.relative_to(folder))) not in own
                     and path.name != "sampled.json" and not name.endswith(".tmp")
                     and not name.startswith("truth/")}
            record = self.record(stage) | {"files": files}
            record["log"] = [self.path.name, log.stat().st_size if log.is_file() else 0]
            # As it is read again: JSON has no tuples.
            done = json.loads(json.dumps({"key": key, "record": record, **figures}))
            write_json(folder / "done.json", done | {"digest": digest(done)})
            begun.unlink(missing_ok=True)
        meet()

    def record(self, stage: str | Path) -> dict:
        """What `begin` and mark_done have noted of a stage that is done or was begun."""
        last = self._read(stage, "done") or self._read(stage, "begun") or {}
        return last.get("record", {})

    def _read(self, stage: str | Path, name: str) -> dict | None:
        path = self.path / stage / f"{name}.json"
        try:
            value = read_json(path, key=str, record=dict | None)
        except FileNotFoundError:  # or another process has just withdrawn it
            return None
        written = value.pop("digest", None)
        if written is not None and written != digest(value):
            raise UserError(f"{path}: has changed since it was written; {AGAIN}")
        return value

    def figures(self, stage: str) -> dict:
        """What mark_done was given for this stage."""
        done = self._read(stage, "done")
        if done is None:
            raise UserError(f"{self.path}: stage {stage} has not run; python train.py first")
        return {k: v for k, v in done.items() if k not in ("key", "record")}

    def log(self, stage: str, **figures) -> None:
        """Append one line to metrics.jsonl."""
        line = json.dumps({"time": round(time.time(), 1), "stage": stage, **figures})
        if processes()[0] == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(line + "\n")


# ------------------------------------------------------------------------------ the end of a script


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the main thread is: what was being written is cleared away."""


# Said of a write, whose error names no file.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
WRITE_FAILED = ("SQLITE_FULL", "SQLITE_BUSY", "SQLITE_READONLY")  # not the mistakes of a query


def script(main) -> None:
    """Run a script's main(): what the user can mend becomes one message on stderr, exit code 2."""

    def terminate(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one ends what still hangs
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except KeyboardInterrupt as error:
        print("stopped; run the same command again to resume", file=sys.stderr)
        # As a shell says of SIGTERM and of Ctrl-C.
        sys.exit(143 if isinstance(error, Terminated) else 130)
    except (UserError, OSError, sqlite3.OperationalError) as error:
        message = str(error)
        if getattr(error, "filename", None) or getattr(error, "errno", 0) in NO_ROOM:
            message = f"{error.filename or 'writing'}: {error.strerror}"
        elif getattr(error, "sqlite_errorname", "") in WRITE_FAILED:  # answers, a server's store
            message = f"SQLite: {error}"
        elif not isinstance(error, UserError):
            raise  # a mistake of ours keeps its traceback
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)  # as argparse exits
