"""The server's one SQLite file: its tables, its transactions, and the bytes of what is deleted.

What store.py (people) and taps.py (lists and taps) acknowledge is on the disk before the call
returns (synchronous=FULL); the rest survives a killed process, but a power cut may take the last of
it (NORMAL). Other processes may open the file at any time. A trap: secure_delete alone leaves text
behind, as SQLite moves rows between pages and what it moved stays in the unused part of the old
page (of 12 in 100 deleted users). So a deletion rewrites the file and empties its log (`wipe`).
"""

import contextlib
import hmac
import json
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from files import UserError

VERSION = 1  # of the tables, in PRAGMA user_version
WAIT = 10.0  # seconds for another process's lock
ROOM = 2**20  # bytes that must be free on the disk

# Times are seconds since 1970, UTC.
# sessions.position: in the history, without gaps.
# appended: n sessions came while `after` was the user's latest list (0: none).
# lists.interests: of next queries the turns instead.
# lists.id: in the order of answers. lists.at: of the answer; shown: of its first event, or null.
# ahead: what is kept ready, one row for each user and method.
# deleted: keyed hashes of user ids, so that an import brings nobody back.
TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value);
CREATE TABLE deleted (mark BLOB PRIMARY KEY);
CREATE TABLE users (user_id TEXT PRIMARY KEY, profile TEXT);
CREATE TABLE sessions (user_id TEXT, session_id TEXT, position INTEGER, timestamp TEXT, body TEXT,
    PRIMARY KEY (user_id, session_id));
CREATE TABLE appended (user_id TEXT, after INTEGER, n INTEGER, PRIMARY KEY (user_id, after));
CREATE TABLE lists (id INTEGER PRIMARY KEY, token BLOB UNIQUE, user_id TEXT, at REAL, shown REAL,
    method TEXT, version TEXT, interests TEXT, starters TEXT);
CREATE INDEX lists_of_user ON lists (user_id);
CREATE TABLE taps (list INTEGER, slot INTEGER, PRIMARY KEY (list, slot)) WITHOUT ROWID;
CREATE TABLE ahead (user_id TEXT, method TEXT, key TEXT, value TEXT, PRIMARY KEY (user_id, method))
"""


def compact(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class Removed(sqlite3.OperationalError):
    """The file was removed or replaced: what is written now would be gone after a restart."""


class Database:
    """One connection and a lock: any thread may call any method.

    Raises UserError if the file is no store, cannot be written, or has tables of another version.
    A full or failing disk raises sqlite3.OperationalError (a removed file Removed), a damaged file
    sqlite3.DatabaseError, of which these are kinds; the transaction then changed nothing.
    """

    def _identity(self) -> tuple | None:
        """Inode and device; None where the file is gone."""
        with contextlib.suppress(FileNotFoundError):
            return self.path.stat()[1:3]

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.now, self.lock = time.time, threading.RLock()  # tests put their own clock there
        self.damaged = False  # pages were met that are none of SQLite's
        try:
            if not self.path.exists():
                self.path.touch(mode=0o600)
            for file in self.path.parent.glob(f"{self.path.name}*"):  # people's histories, and logs
                file.chmod(file.stat().st_mode & 0o700)
            self._opened = self._identity()
            self.connection = sqlite3.connect(
                path, WAIT, isolation_level=None, check_same_thread=False)
            self._open()
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path}: cannot be used as the server's store: {error}") from None

    def _open(self) -> None:
        # Check the file and make the tables of a new one; another program's stays as it is.
        self._use_log()
        if (found := self.rows("PRAGMA quick_check(1)")) != [("ok",)]:
            raise UserError(f"{self.path}: the store is damaged ({' '.join(found[0][0].split())}); "
                            "bring back a copy, or name another file with serve.store")
        self.connection.execute("PRAGMA secure_delete=ON")  # zeros, not old text, in what is freed
        self.connection.execute("PRAGMA fullfsync=ON")  # macOS: fsync alone ends in the cache
        with self.transaction(durable=True) as db:  # fails where the file cannot be written
            if not self._has_tables():  # no other process was faster
                list(map(db.execute, TABLES.split(";")))
                db.execute("INSERT INTO meta VALUES ('key', ?)", (secrets.token_bytes(32),))
                db.execute(f"PRAGMA user_version={VERSION}")
        [(self._key,)] = self.rows("SELECT value FROM meta WHERE key='key'")
        with contextlib.suppress(sqlite3.OperationalError):  # then at the next deletion
            self.wipe()  # what a killed process had left to do

    def _use_log(self) -> None:
        # Give a new file its write-ahead log, as soon as no other process is making the file.
        patience = time.monotonic() + WAIT
        while not self._has_tables():
            try:
                [(mode,)] = self.rows("PRAGMA journal_mode=WAL")
                if mode != "wal":  # a network share, say
                    raise UserError(f"{self.path}: SQLite cannot keep a write-ahead log there")
                return
            except sqlite3.OperationalError:  # locked: for this pragma SQLite does not wait
                if time.monotonic() > patience:
                    raise
                time.sleep(0.01)

    def _has_tables(self) -> bool:
        """False: the file is empty. Raises UserError for tables that this code does not know."""
        tables = self.rows("SELECT 1 FROM sqlite_master")  # first: another process may make them
        [(version,)] = self.rows("PRAGMA user_version")
        if version != VERSION and (version or tables):
            raise UserError(f"{self.path}: tables of version {version}, this code knows {VERSION};"
                            " name another file with serve.store")
        return version == VERSION

    @contextlib.contextmanager
    def transaction(self, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All that is executed inside, or none of it; durable: on the disk when it ends.

        Within another one of the same thread it is a part of that."""
        with self.lock, self._noting_damage():
            if self.connection.in_transaction:
                yield self.connection
                return
            if self._identity() != self._opened:
                raise Removed(f"{self.path}: not the file that was opened; start the server again")
            self.connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self.connection.execute("BEGIN IMMEDIATE")
            with self.connection:  # commits, or rolls back after an exception
                yield self.connection

    def rows(self, query: str, *values) -> list[tuple]:
        with self.lock, self._noting_damage():
            return self.connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _noting_damage(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the primary one
            self.damaged |= code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
            raise

    def check(self) -> None:
        """Raises sqlite3.DatabaseError if it cannot be written now, or was found damaged."""
        if self.damaged:
            raise sqlite3.DatabaseError("damaged")
        # A full disk may still have room for one row in the log.
        if shutil.disk_usage(self.path.parent).free < ROOM:
            raise sqlite3.OperationalError("the disk is full")
        with self.transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('checked', ?)", (self.now(),))

    def mac(self, message: bytes) -> bytes:
        """16 bytes that only this file's key makes of a message: it signs, and it makes hashes of
        ids that nobody can guess."""
        return hmac.digest(self._key, message, "sha256")[:16]

    def wipe(self) -> None:
        """Rewrite the file if a deletion asks for it; empty the log, of half a killed call too."""
        asked = self.rows("SELECT 1 FROM meta WHERE key='unwiped'")
        self.connection.execute("PRAGMA synchronous=FULL")
        if asked:
            self.connection.execute("VACUUM")  # takes about as long as copying the file
        if self.rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]:  # 1: another reads the old pages
            raise sqlite3.OperationalError("deleted, but not wiped: another process reads the file")
        if asked:
            with self.transaction() as db:
                db.execute("DELETE FROM meta WHERE key='unwiped'")

    def close(self) -> None:
        with self.lock:
            self.connection.close()
