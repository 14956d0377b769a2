"""The server's memory, one SQLite file: histories, shown lists, taps, and lists kept ready.

    store = Store("runs/tiny/serve.sqlite")
    impression = store.offer("u17", ["night trains"], ["Which night trains ...?"], "PE", "round1")
    store.record([(impression, "tap", 0)])

Knows no model and no HTTP. What is acknowledged (`record`, `put_sessions`, `delete_user`) is on the
disk before the call returns (synchronous=FULL); the rest survives a killed process, but a power
cut may take the last of it (NORMAL). Other processes may open the file at any time: a method reads
for no longer than its query takes. Three things that are easily got wrong:
- secure_delete alone leaves text behind: SQLite moves rows between pages, and what it moved stays
  in the unused part of the old page (so it was for 12 of 100 deleted users). So a deletion rewrites
  the file (VACUUM) and empties the write-ahead log.
- `sessions_after` is counted when sessions arrive (table appended), not from the sessions that are
  held: those make room for newer ones, and one that is sent again did not follow a list.
- base64 has several texts for the same bytes: an impression id is taken in one of them only.
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import itertools
import json
import math
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from scipy.special import stdtrit

import data
from config import UserError

VERSION = 1  # of the tables, in PRAGMA user_version
WAIT = 10.0  # seconds for another process's lock
IMPRESSION_SECONDS = 48 * 3600  # taps are taken for so long after an answer
KEPT = 30 * 86400  # seconds for which a list is remembered that nobody was shown

# Times are seconds since 1970, UTC.
# sessions.position: in the history, without gaps.
# appended: n sessions came while `after` was the user's latest list (0: none).
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


class BadImpression(ValueError):
    """An impression id that is not of this store, or expired, or of a deleted list."""


@dataclass(frozen=True)
class Shown:
    """A list that a user saw."""

    user_id: str
    at: datetime  # of the answer, UTC without a zone
    interests: list[str]  # for which it was written
    starters: list[str]
    clicked: list[int]  # slots, ascending
    sessions_after: int | None  # before the user's next shown list; None: neither came yet
    method: str
    version: str  # of the model


def _dump(value) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class Store:
    """One connection and a lock: any thread may call any method.

    Raises UserError if the file is no store, cannot be written, or has tables of another version.
    A full or failing disk raises sqlite3.OperationalError; the call then changed nothing.
    """

    def __init__(self, path: str | Path, max_sessions: int = 500):
        self.path, self.max_sessions = Path(path), max_sessions  # kept of a user
        self.now, self._lock = time.time, threading.RLock()  # tests put their own clock there
        try:
            if not self.path.exists():
                self.path.touch(mode=0o600)  # people's histories; the log gets the same mode
            self._db = sqlite3.connect(path, WAIT, isolation_level=None, check_same_thread=False)
            self._open()
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"{path}: cannot be used as the server's store: {error}") from None

    def _open(self) -> None:
        """Check the file and make the tables of a new one; another program's stays as it is."""
        self._use_log()
        self._db.execute("PRAGMA secure_delete=ON")  # zeros, not old text, in what is freed
        self._db.execute("PRAGMA fullfsync=ON")  # macOS: fsync alone ends in the drive's cache
        with self._transaction(durable=True) as db:  # fails where the file cannot be written
            if not self._has_tables():  # no other process was faster
                list(map(db.execute, TABLES.split(";")))
                key = secrets.token_bytes(32)  # signs impression ids, and marks who was deleted
                db.execute("INSERT INTO meta VALUES ('key', ?)", (key,))
                db.execute(f"PRAGMA user_version={VERSION}")
        self._key = self._rows("SELECT value FROM meta WHERE key='key'")[0][0]
        with contextlib.suppress(sqlite3.OperationalError):  # then at the next deletion
            self._wipe()  # what a killed process had left to do

    def _use_log(self) -> None:
        """Give a new file its write-ahead log, as soon as no other process is making the file."""
        patience = time.monotonic() + WAIT
        while not self._has_tables():
            try:
                [(mode,)] = self._rows("PRAGMA journal_mode=WAL")
                if mode != "wal":  # a network share, say
                    raise UserError(f"{self.path}: SQLite cannot keep a write-ahead log there")
                return
            except sqlite3.OperationalError:  # locked: for this pragma SQLite does not wait
                if time.monotonic() > patience:
                    raise
                time.sleep(0.01)

    def _has_tables(self) -> bool:
        """False: the file is empty. Raises UserError for tables that this code does not know."""
        tables = self._rows("SELECT 1 FROM sqlite_master")  # first: another process may make them
        [(version,)] = self._rows("PRAGMA user_version")
        if version != VERSION and (version or tables):
            raise UserError(f"{self.path}: tables of version {version}, this code knows {VERSION};"
                            " name another file with serve.store")
        return version == VERSION

    @contextlib.contextmanager
    def _transaction(self, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """All that is executed inside, or none of it; durable: on the disk when it ends."""
        with self._lock:
            self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # some errors have rolled back by themselves
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, query: str, *values) -> list[tuple]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # -------------------------------------------------------------------------------------- users

    def import_users(self, users: Iterable[data.User], mark: str) -> int:
        """Take the users of a run, once for each mark; return how many came."""
        count = 0
        with self._transaction() as db:
            row = (f"imported {mark}", self.now())
            if not db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", row).rowcount:
                return 0
            for user in users:
                if self._rows("SELECT 1 FROM deleted WHERE mark=?", self._mark(user.user_id)):
                    continue  # who was deleted stays deleted
                row = (user.user_id, None if user.profile is None else _dump(user.profile))
                # Users whom the store has stay as they are.
                if db.execute("INSERT OR IGNORE INTO users VALUES (?, ?)", row).rowcount:
                    self._put(user.user_id, user.sessions)
                    count += 1
        return count

    def put_sessions(
        self, user_id: str, sessions: list[data.Session], profile: dict | None = None
    ) -> int:
        """Append to a user's history, durably; return how many sessions are held now.

        A session_id that is held is replaced where it stands. profile None leaves the profile.
        Raises ValueError for an id or a profile that data.User refuses.
        """
        profile = data.User(user_id=user_id, profile=profile, sessions=[]).profile
        with self._transaction(durable=True) as db:
            db.execute("INSERT OR IGNORE INTO users VALUES (?, NULL)", (user_id,))
            if profile is not None:
                db.execute("UPDATE users SET profile=? WHERE user_id=?", (_dump(profile), user_id))
            held, new = self._put(user_id, sessions)
            if new:  # they followed the latest list
                [(last,)] = self._rows("SELECT max(id) FROM lists WHERE user_id=?", user_id)
                query = "INSERT INTO appended VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET n = n + ?"
                db.execute(query, (user_id, last or 0, new, new))
        return held

    def _put(self, user_id: str, sessions: list[data.Session]) -> tuple[int, int]:
        """Merge sessions into those held; return how many are held now, how many of them new."""
        query = "SELECT session_id, position, timestamp FROM sessions WHERE user_id=?"
        rows = self._rows(f"{query} ORDER BY position", user_id)
        places, times = {s: place for s, place, _ in rows}, {s: stamp for s, _, stamp in rows}
        given = {session.session_id: session for session in sessions}
        times |= {s: session.timestamp and session.timestamp.isoformat()
                  for s, session in given.items()}
        order = _merged(list(places), list(given))
        if all(times.values()):  # as data.in_time_order; else that of arrival
            order.sort(key=times.get)
        order = order[-self.max_sessions :]  # the oldest make room
        # Positions start so that the first session that stays keeps its own: appending moves none.
        start = next((places[s] - i for i, s in enumerate(order) if s in places), 0)
        drop = [(user_id, s) for s in places.keys() - set(order)]
        move, write = [], []
        for place, s in enumerate(order, start):
            if s in given:
                body = given[s].model_dump_json(exclude_unset=True)
                write.append((user_id, s, place, times[s], body))
            elif places[s] != place:
                move.append((place, user_id, s))
        where = "WHERE user_id=? AND session_id=?"
        self._db.executemany(f"DELETE FROM sessions {where}", drop)
        self._db.executemany(f"UPDATE sessions SET position=? {where}", move)
        self._db.executemany("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?)", write)
        return len(order), len(set(order) - places.keys())

    def user(self, user_id: str) -> data.User | None:
        """A user's profile and history; None: neither was ever put."""
        with self._lock:  # both of one moment
            row = self._rows("SELECT profile FROM users WHERE user_id=?", user_id)
            query = "SELECT body FROM sessions WHERE user_id=? ORDER BY position"
            bodies = ",".join(body for (body,) in self._rows(query, user_id))
        if not row:
            return None
        # Joined as text: one call reads the whole history, 500 sessions in 2 ms.
        head = f'"user_id":{_dump(user_id)},"profile":{row[0][0] or "null"}'
        return data.User.model_validate_json(f'{{{head},"sessions":[{bodies}]}}')

    def user_ids(self) -> list[str]:
        return [user_id for (user_id,) in self._rows("SELECT user_id FROM users ORDER BY user_id")]

    def delete_user(self, user_id: str) -> dict[str, int]:
        """Remove all of a user, durably and from the bytes of the file; return rows by table.

        Raises sqlite3.OperationalError while another process reads the store for longer than WAIT:
        the rows are gone then, but not yet their bytes.
        """
        removed, of_lists = {}, "list IN (SELECT id FROM lists WHERE user_id=?)"
        with self._lock:
            with self._transaction(durable=True) as db:
                for table in ("taps", "users", "sessions", "appended", "lists", "ahead"):
                    # Taps first, while their lists are there.
                    query = f"DELETE FROM {table} WHERE {'user_id=?' if removed else of_lists}"
                    removed[table] = db.execute(query, (user_id,)).rowcount
                if any(removed.values()):
                    db.execute("INSERT OR IGNORE INTO deleted VALUES (?)", (self._mark(user_id),))
                    db.execute("INSERT OR IGNORE INTO meta VALUES ('unwiped', 1)")
            self._wipe()  # if it fails: by the next deletion, or the next start
        return removed

    def _wipe(self) -> None:
        """Rewrite the file if a deletion asks for it; empty the log, of half a killed call too."""
        asked = self._rows("SELECT 1 FROM meta WHERE key='unwiped'")
        self._db.execute("PRAGMA synchronous=FULL")
        if asked:
            self._db.execute("VACUUM")  # takes about as long as copying the file
        if self._rows("PRAGMA wal_checkpoint(TRUNCATE)")[0][0]:  # 1: another reads the old pages
            raise sqlite3.OperationalError("deleted, but not wiped: another process reads the file")
        if asked:
            with self._transaction() as db:
                db.execute("DELETE FROM meta WHERE key='unwiped'")

    # --------------------------------------------------------------------------- lists and events

    def _mac(self, message: bytes) -> bytes:
        return hmac.digest(self._key, message, "sha256")[:16]

    def _mark(self, user_id: str) -> bytes:
        """What tells a deleted user again, and tells nobody else who it was."""
        return self._mac(b"deleted" + user_id.encode())

    def _impression(self, token: bytes) -> str:
        """12 bytes of token, 8 of expiry in milliseconds and 16 of MAC, as 48 characters."""
        expiry = int((self.now() + IMPRESSION_SECONDS) * 1000)
        body = token + expiry.to_bytes(8, "big", signed=True)
        return base64.urlsafe_b64encode(body + self._mac(b"impression" + body)).decode()

    def _list(self, impression: str, place: str) -> tuple[int, int]:
        """(id, number of slots) of an impression's list. Raises BadImpression: `place: reason`."""
        try:
            raw = base64.urlsafe_b64decode(impression)
        except (TypeError, ValueError):
            raw = b""
        body, mac = raw[:-16], raw[-16:]
        genuine = hmac.compare_digest(mac, self._mac(b"impression" + body))
        if not genuine or base64.urlsafe_b64encode(raw).decode() != impression:  # spelt otherwise
            raise BadImpression(f"{place}: not an impression id of this server")
        if int.from_bytes(body[12:], "big", signed=True) < self.now() * 1000:
            raise BadImpression(f"{place}: expired")
        query = "SELECT id, json_array_length(starters) FROM lists WHERE token=?"
        if not (rows := self._rows(query, body[:12])):
            raise BadImpression(f"{place}: its list was deleted")
        return rows[0]

    def offer(
        self, user_id: str, interests: list[str], starters: list[str], method: str, version: str
    ) -> str:
        """Remember what an answer offers; return its signed impression id."""
        content = (method, version, _dump(interests), _dump(starters))
        with self._transaction() as db:
            query = "SELECT token FROM lists WHERE user_id=? AND shown IS NULL AND"
            same = "(method, version, interests, starters) = (?, ?, ?, ?)"
            rows = self._rows(f"{query} {same}", user_id, *content)
            # Answered again before it was shown, a list stays one impression, with a new expiry.
            token = rows[0][0] if rows else secrets.token_bytes(12)
            [(last,)] = self._rows("SELECT max(id) FROM lists")
            row = ((last or 0) + 1, token, user_id, self.now(), None, *content)
            db.execute("INSERT OR REPLACE INTO lists VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            if row[0] % 1000 == 0:  # old lists that no event can reach, and ids without a history
                old = self.now() - max(KEPT, IMPRESSION_SECONDS)
                db.execute("DELETE FROM lists WHERE shown IS NULL AND at < ?", (old,))
                db.execute("DELETE FROM ahead WHERE user_id NOT IN (SELECT user_id FROM users)")
        return self._impression(token)

    def record(self, events: list[tuple[str, str, int | None]]) -> int:
        """Take (impression id, "shown" | "tap", slot) events durably, all or none; return how many
        were new. Raises BadImpression or ValueError as `events[i].field: reason`."""
        new = 0
        with self._transaction(durable=True) as db:
            for i, (impression, kind, slot) in enumerate(events):
                place = f"events[{i}]"
                number, slots = self._list(impression, f"{place}.impression_id")
                if kind not in ("shown", "tap"):
                    raise ValueError(f"{place}.type: 'shown' or 'tap'")
                if kind == "shown" and slot is not None:
                    raise ValueError(f"{place}.slot: only a tap has one")
                if kind == "tap" and (type(slot) is not int or not 0 <= slot < slots):  # no bool
                    raise ValueError(f"{place}.slot: not one of the list's {slots} slots")
                # A tap implies that its list was shown.
                query = "UPDATE lists SET shown=? WHERE id=? AND shown IS NULL"
                changed = db.execute(query, (self.now(), number)).rowcount
                if kind == "tap":
                    query = "INSERT OR IGNORE INTO taps VALUES (?, ?)"
                    changed = db.execute(query, (number, slot)).rowcount
                new += changed
        return new

    def seen(self, user_id: str, days: float, offered: bool = False) -> list[str]:
        """Distinct starters shown (offered: or answered, with no event so far) within `days`."""
        when = "coalesce(shown, at)" if offered else "shown"  # null >= ? is never true
        query = f"SELECT starters FROM lists WHERE user_id=? AND {when} >= ? ORDER BY {when}, id"
        rows = self._rows(query, user_id, self.now() - days * 86400)
        return list(dict.fromkeys(text for (starters,) in rows for text in json.loads(starters)))

    def shown(self, user_id: str | None = None) -> Iterator[Shown]:
        """Lists with an event, of one user or of all, in the order in which they were answered."""
        only = [] if user_id is None else [user_id]
        rows = self._rows(
            f"""
            WITH seen AS (
                SELECT *, lead(id) OVER (PARTITION BY user_id ORDER BY id) AS next FROM lists
                WHERE shown IS NOT NULL AND starters != '[]' {"AND user_id = ?" * len(only)})
            SELECT user_id, at, interests, starters,
                (SELECT json_group_array(slot) FROM taps WHERE list = id),
                (SELECT sum(n) FROM appended WHERE appended.user_id = seen.user_id
                    AND after >= id AND (next IS NULL OR after < next)),
                next, method, version
            FROM seen ORDER BY id
            """, *only)
        for user, at, interests, starters, taps, after, following, method, version in rows:
            yield Shown(user, datetime.fromtimestamp(at, UTC).replace(tzinfo=None),
                        json.loads(interests), json.loads(starters), sorted(json.loads(taps)),
                        after or (0 if following else None),  # 0 is known only afterwards
                        method, version)

    def rates(self) -> list[dict]:
        """Taps per shown starter of each method, with a 95 % interval by users (`_interval`)."""
        rows = self._rows(
            """
            WITH seen AS (
                SELECT method, user_id, json_array_length(starters) AS slots,
                    (SELECT count(*) FROM taps WHERE list = id) AS tapped
                FROM lists WHERE shown IS NOT NULL AND starters != '[]')
            SELECT method, count(*), sum(tapped > 0), sum(slots), sum(tapped)
            FROM seen GROUP BY method, user_id ORDER BY method
            """)
        table, names = [], ("lists", "lists_tapped", "starters", "taps")
        for method, group in itertools.groupby(rows, lambda row: row[0]):
            columns = [*zip(*group, strict=True)][1:]  # of each name one number a user
            sums = dict(zip(names, map(sum, columns), strict=True))
            low, high = _interval(*columns[2:])
            table.append({"method": method, "users": len(columns[0]), **sums,
                          "rate": sums["taps"] / sums["starters"], "low": low, "high": high})
        return table

    # --------------------------------------------------------------------------- lists kept ready

    def ahead(self, user_id: str, key: str) -> dict | None:
        """What was kept ready for a user under `key`."""
        rows = self._rows("SELECT value FROM ahead WHERE user_id=? AND key=?", user_id, key)
        return json.loads(rows[0][0]) if rows else None

    def put_ahead(self, user_id: str, key: str, value: dict, method: str = "") -> None:
        """Keep a JSON value ready: one for each user and method, whatever the key before."""
        row = (user_id, method, key, _dump(value))
        with self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO ahead VALUES (?, ?, ?, ?)", row)


def _merged(held: list[str], given: list[str]) -> list[str]:
    """Both in one order: what is new goes before the next of `given` that is held, or last."""
    # So the same request twice is the same as once, without times too.
    places, before, waiting = set(held), {}, []
    for name in given:
        if name in places:
            before[name], waiting = waiting, []
        else:
            waiting.append(name)
    return [each for name in held for each in (*before.get(name, ()), name)] + waiting


def _interval(starters: tuple[int, ...], taps: tuple[int, ...]) -> tuple[float, float]:
    """95 % interval of sum(taps) / sum(starters), each user one draw of (starters, taps).

    Wilson's interval of as many independent starters as have the variance that the delta method
    finds between users, with Student's quantile for that many users.
    """
    n, total = len(starters), sum(starters)
    rate, size = sum(taps) / total, n  # where users do not differ, each counts as one starter
    spread = sum((t - rate * s) ** 2 for s, t in zip(starters, taps, strict=True))
    if n > 1 and spread:
        size = min(total, rate * (1 - rate) * total**2 / (spread * n / (n - 1)))
    z = float(stdtrit(n - 1 if n > 1 else math.inf, 0.975))  # of one user no spread is known
    middle = (rate + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(rate * (1 - rate) / size + (z / (2 * size)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)
