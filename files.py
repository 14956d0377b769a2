"""What every file below needs: files that are whole or absent, digests, the processes of one
`torchrun`, progress that a log can show, and the end of a script.
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
from collections.abc import Iterable
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
    path = Path(path)
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


def read_json(path: str | Path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:  # cut short by a full disk or a copy, say
        raise UserError(f"{path}: damaged, no JSON ({error}); {AGAIN}") from None


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
    except SafetensorError as error:
        raise UserError(f"{path}: damaged, no weights ({error}); {AGAIN}") from None
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise UserError(f"{path}: weights that are no finite numbers; {AGAIN}")
    return tensors


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
