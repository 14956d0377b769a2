"""What people were offered, were shown and tapped: a tap counts if it is genuine, and once.

    impression = store.taps.offer("u17", ["night trains"], ["Which ...?"], "PE", "round1")
    store.taps.record([(impression, "tap", 0)])

An answer has an impression id, signed with the key of the file: `record` takes it from the server
that gave it, for IMPRESSION_SECONDS, while its list is not deleted (`_list_of` checks all this),
and in one spelling, as base64 has several texts for the same bytes. The primary key of table taps
lets a slot be tapped once. `sessions_after` is counted when sessions arrive (store.put_sessions),
not from those that are held: old ones make room, and one that is sent again followed no list.
"""

import base64
import hmac
import itertools
import json
import math
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime

from scipy.special import stdtrit

import data
from serving.database import Database, compact

IMPRESSION_SECONDS = 48 * 3600  # taps are taken for so long after an answer
KEPT = 30 * 86400  # seconds for which a list is remembered that nobody was shown


class BadEvent(ValueError):
    """An event that is refused; `place` in the request, and why."""

    def __init__(self, i: int, field: str, reason: str):
        super().__init__(f"events[{i}].{field}: {reason}")
        self.place, self.reason = ("events", i, field), reason


class Shown(data.Impression):
    """A list that a user saw, as in a log; its timestamp is that of the answer, UTC."""

    interests: list[str]  # for which it was written
    turns: list[data.Turn] = []  # or, of a server of next queries, behind which conversation
    method: str
    version: str  # of the model


class Taps:  # of a store's file; any thread may call any method
    def __init__(self, db: Database):
        self.db = db

    def offer(self, user_id: str, interests: list[str] | list[dict], starters: list[str],
              method: str, version: str) -> str:
        """Remember what an answer offers; return its signed impression id. interests: or turns."""
        content = (method, version, compact(interests), compact(starters))
        with self.db.transaction() as db:
            query = "SELECT token FROM lists WHERE user_id=? AND shown IS NULL AND"
            same = "(method, version, interests, starters) = (?, ?, ?, ?)"
            rows = self.db.rows(f"{query} {same}", user_id, *content)
            # Answered again before it was shown, a list stays one impression, with a new expiry.
            token = rows[0][0] if rows else secrets.token_bytes(12)
            row = (token, user_id, self.db.now(), *content)
            # A null id becomes one above the highest.
            query = "INSERT OR REPLACE INTO lists VALUES (NULL, ?, ?, ?, NULL, ?, ?, ?, ?)"
            if db.execute(query, row).lastrowid % 1000 == 0:
                # Lists that no event can reach any more, and ids without a history.
                old = self.db.now() - KEPT
                db.execute("DELETE FROM lists WHERE shown IS NULL AND at < ?", (old,))
                db.execute("DELETE FROM ahead WHERE user_id NOT IN (SELECT user_id FROM users)")
        # 12 bytes of token, 8 of expiry in milliseconds, 16 of MAC: 48 characters.
        expiry = int((self.db.now() + IMPRESSION_SECONDS) * 1000)
        signed = token + expiry.to_bytes(8, "big", signed=True)
        return base64.urlsafe_b64encode(signed + self.db.mac(b"impression" + signed)).decode()

    def _list_of(self, impression: str, i: int) -> tuple[int, int]:
        # -> (id, number of slots) of event i's list if its impression id is genuine; else BadEvent.
        try:
            raw = base64.urlsafe_b64decode(impression)
        except (TypeError, ValueError):
            raw = b""
        signed, mac = raw[:-16], raw[-16:]  # as in `offer`
        genuine = hmac.compare_digest(mac, self.db.mac(b"impression" + signed))
        if not genuine or base64.urlsafe_b64encode(raw).decode() != impression:  # spelt otherwise
            raise BadEvent(i, "impression_id", "not an impression id of this server")
        if int.from_bytes(signed[12:], "big", signed=True) < self.db.now() * 1000:
            raise BadEvent(i, "impression_id", "expired")
        query = "SELECT id, json_array_length(starters) FROM lists WHERE token=?"
        if not (rows := self.db.rows(query, signed[:12])):
            raise BadEvent(i, "impression_id", "its list was deleted")
        return rows[0]

    def record(self, events: list[tuple[str, str, int | None]]) -> int:
        """Take (impression id, "shown" | "tap", slot) events durably, all or none; return how many
        were new. Raises BadEvent."""
        new = 0
        with self.db.transaction(durable=True) as db:
            for i, (impression, kind, slot) in enumerate(events):
                number, slots = self._list_of(impression, i)
                if kind not in ("shown", "tap"):
                    raise BadEvent(i, "type", "'shown' or 'tap'")
                if kind == "shown" and slot is not None:
                    raise BadEvent(i, "slot", "only a tap has one")
                if kind == "tap" and (type(slot) is not int or not 0 <= slot < slots):  # no bool
                    raise BadEvent(i, "slot", f"not one of the list's {slots} slots")
                # A tap implies that its list was shown.
                query = "UPDATE lists SET shown=? WHERE id=? AND shown IS NULL"
                changed = db.execute(query, (self.db.now(), number)).rowcount
                if kind == "tap":
                    query = "INSERT OR IGNORE INTO taps VALUES (?, ?)"
                    changed = db.execute(query, (number, slot)).rowcount
                new += changed
        return new

    def seen(self, user_id: str, days: float, offered: bool = False) -> list[str]:
        """Distinct starters shown (offered: or answered, with no event so far) within `days`."""
        when = "coalesce(shown, at)" if offered else "shown"  # null >= ? is never true
        query = f"SELECT starters FROM lists WHERE user_id=? AND {when} >= ? ORDER BY {when}, id"
        rows = self.db.rows(query, user_id, self.db.now() - days * 86400)
        # Each once, in the order in which they came.
        return list(dict.fromkeys(text for (starters,) in rows for text in json.loads(starters)))

    def shown(self, user_id: str | None = None) -> Iterator[Shown]:
        """Lists with an event, of one user or of all, in the order in which they were answered."""
        only = [] if user_id is None else [user_id]
        rows = self.db.rows(
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
            told = json.loads(interests)
            turns = [data.Turn.model_construct(**t) for t in told if isinstance(t, dict)]
            yield Shown.model_construct(  # texts as they were offered, in every letter
                user_id=user, timestamp=datetime.fromtimestamp(at, UTC).replace(tzinfo=None),
                starters=json.loads(starters), clicked=sorted(json.loads(taps)),
                sessions_after=after or (0 if following else None),  # 0 is known only afterwards
                interests=[] if turns else told, turns=turns, method=method, version=version)

    def rates(self) -> list[dict]:
        """Taps per shown starter of each method, with a 95 % interval by users (`_interval`)."""
        rows = self.db.rows(
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


def _interval(starters: tuple[int, ...], taps: tuple[int, ...]) -> tuple[float, float]:
    """95 % interval of sum(taps) / sum(starters), each user one draw of (starters, taps)."""
    # Wilson's interval of as many independent starters as have the variance that the delta method
    # finds between users, with Student's quantile for that many users.
    n, total = len(starters), sum(starters)
    rate, size = sum(taps) / total, n  # where users do not differ, each counts as one starter
    spread = sum((t - rate * s) ** 2 for s, t in zip(starters, taps, strict=True))
    if n > 1 and spread:
        size = min(total, rate * (1 - rate) * total**2 / (spread * n / (n - 1)))
    z = float(stdtrit(n - 1 if n > 1 else math.inf, 0.975))  # of one user no spread is known
    middle = (rate + z**2 / (2 * size)) / (1 + z**2 / size)
    half = z / (1 + z**2 / size) * math.sqrt(rate * (1 - rate) / size + (z / (2 * size)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)
