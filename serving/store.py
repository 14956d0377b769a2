"""What the server remembers of people: profiles, histories, and starters that are kept ready.

    store = Store("runs/default/serve.sqlite")
    store.put_sessions("u17", sessions, {"region": "Singapore"})

What people were shown and tapped is in taps.py, the file itself in database.py. Knows no model and
no HTTP. `put_sessions` and `delete_user` are on the disk before they return.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import data
from serving.database import Database, compact
from serving.taps import Taps


class Store:  # any thread may call any method; raises what Database raises
    def __init__(self, path: str | Path, max_sessions: int = 500):
        self.db, self.max_sessions = Database(path), max_sessions  # kept of a user
        self.taps, self.close = Taps(self.db), self.db.close

    # -------------------------------------------------------------------------------------- users

    def import_users(self, users: Iterable[data.User], mark: str) -> int:
        """Take the users of a run, once for each mark; return how many came."""
        count = 0
        with self.db.transaction() as db:
            row = (f"imported {mark}", self.db.now())
            if not db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", row).rowcount:
                return 0
            for user in users:
                if self.db.rows("SELECT 1 FROM deleted WHERE mark=?", self._mark(user.user_id)):
                    continue  # who was deleted stays deleted
                row = (user.user_id, None if user.profile is None else compact(user.profile))
                # Users whom the store has stay as they are.
                if db.execute("INSERT OR IGNORE INTO users VALUES (?, ?)", row).rowcount:
                    self._merge(user.user_id, user.sessions)
                    count += 1
        return count

    def put_sessions(self, user_id: str, sessions: list[data.Session],
                     profile: dict | None = None) -> int:
        """Append to a user's history, durably; return how many sessions are held now.

        A session_id that is held is replaced where it stands. profile None leaves the profile.
        Raises ValueError for an id or a profile that data.User refuses.
        """
        profile = data.User(user_id=user_id, profile=profile, sessions=[]).profile
        with self.db.transaction(durable=True) as db:
            db.execute("INSERT OR IGNORE INTO users VALUES (?, NULL)", (user_id,))
            if profile is not None:
                row = (compact(profile), user_id)
                db.execute("UPDATE users SET profile=? WHERE user_id=?", row)
            held, new = self._merge(user_id, sessions)
            if new:  # they followed the latest list
                [(last,)] = self.db.rows("SELECT max(id) FROM lists WHERE user_id=?", user_id)
                query = "INSERT INTO appended VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET n = n + ?"
                db.execute(query, (user_id, last or 0, new, new))
        return held

    def _merge(self, user_id: str, sessions: list[data.Session]) -> tuple[int, int]:
        # -> (how many are held now, how many of them are new)
        query = "SELECT session_id, position, timestamp FROM sessions WHERE user_id=?"
        rows = self.db.rows(f"{query} ORDER BY position", user_id)
        places, times = {s: place for s, place, _ in rows}, {s: stamp for s, _, stamp in rows}
        given = {session.session_id: session for session in sessions}
        times |= {s: session.timestamp and session.timestamp.isoformat()
                  for s, session in given.items()}
        order = _merged_order(list(places), list(given))
        if all(times.values()):  # as data.in_time_order; else that of arrival
            order.sort(key=times.get)
        order = order[-self.max_sessions :]  # the oldest make room
        # Positions start so that the first session that stays keeps its own: appending moves none.
        start = next((places[s] - i for i, s in enumerate(order) if s in places), 0)
        position = {s: place for place, s in enumerate(order, start)}
        drop = [(user_id, s) for s in places if s not in position]
        move = [(position[s], user_id, s) for s in places
                if s in position and position[s] != places[s]]
        write = [(user_id, s, position[s], times[s], given[s].model_dump_json(exclude_unset=True))
                 for s in given if s in position]
        db, where = self.db.connection, "WHERE user_id=? AND session_id=?"
        db.executemany(f"DELETE FROM sessions {where}", drop)
        db.executemany(f"UPDATE sessions SET position=? {where}", move)
        db.executemany("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?)", write)
        return len(order), len(position.keys() - places)

    def user(self, user_id: str) -> data.User | None:
        """A user's profile and history; None: neither was ever put."""
        with self.db.lock:  # both of one moment
            row = self.db.rows("SELECT profile FROM users WHERE user_id=?", user_id)
            query = "SELECT body FROM sessions WHERE user_id=? ORDER BY position"
            bodies = ",".join(body for (body,) in self.db.rows(query, user_id))
        if not row:
            return None
        # Joined as text: one call reads the whole history, 500 sessions in 2 ms.
        head = f'"user_id":{compact(user_id)},"profile":{row[0][0] or "null"}'
        return data.User.model_validate_json(f'{{{head},"sessions":[{bodies}]}}')

    def user_ids(self) -> list[str]:
        query = "SELECT user_id FROM users ORDER BY user_id"
        return [user_id for (user_id,) in self.db.rows(query)]

    def delete_user(self, user_id: str) -> dict[str, int]:
        """Remove all of a user, durably and from the bytes of the file; return rows by table.

        Raises sqlite3.OperationalError while another process reads the file for longer than
        database.WAIT: the rows are gone then, but not yet their bytes.
        """
        removed, of_lists = {}, "list IN (SELECT id FROM lists WHERE user_id=?)"
        with self.db.lock:
            with self.db.transaction(durable=True) as db:
                for table in ("taps", "users", "sessions", "appended", "lists", "ahead"):
                    # Taps first, while their lists are there.
                    query = f"DELETE FROM {table} WHERE {'user_id=?' if removed else of_lists}"
                    removed[table] = db.execute(query, (user_id,)).rowcount
                if any(removed.values()):
                    db.execute("INSERT OR IGNORE INTO deleted VALUES (?)", (self._mark(user_id),))
                    db.execute("INSERT OR IGNORE INTO meta VALUES ('unwiped', 1)")
                db.execute("INSERT INTO meta VALUES ('deletions', 1) "
                           "ON CONFLICT DO UPDATE SET value = value + 1")
                db.execute("INSERT OR REPLACE INTO meta SELECT ?, value FROM meta "
                           "WHERE key='deletions'", (self._last_deletion(user_id),))
            self.db.wipe()  # if it fails: by the next deletion, or the next start
        return removed

    def deletions(self) -> int:
        """How many there were, by any process."""
        rows = self.db.rows("SELECT value FROM meta WHERE key='deletions'")
        return rows[0][0] if rows else 0

    def was_deleted(self, user_id: str, since: int) -> bool:
        """Whether the user was deleted after there were `since` deletions, whoever else was."""
        query = "SELECT 1 FROM meta WHERE key=? AND value>?"
        return bool(self.db.rows(query, self._last_deletion(user_id), since))

    def _last_deletion(self, user_id: str) -> str:  # key of the number of a user's last deletion
        return f"deletion {self._mark(user_id).hex()}"

    def _mark(self, user_id: str) -> bytes:  # tells a deleted user again, and nobody else who
        return self.db.mac(b"deleted" + user_id.encode())

    # --------------------------------------------------------------------------- lists kept ready

    def ahead(self, user_id: str, key: str) -> dict | None:  # what is kept ready under this key
        rows = self.db.rows("SELECT value FROM ahead WHERE user_id=? AND key=?", user_id, key)
        return json.loads(rows[0][0]) if rows else None

    def put_ahead(self, user_id: str, key: str, value: dict, method: str = "") -> None:
        """Keep a JSON value ready: one for each user and method, whatever the key before."""
        row = (user_id, method, key, compact(value))
        with self.db.transaction() as db:
            db.execute("INSERT OR REPLACE INTO ahead VALUES (?, ?, ?, ?)", row)


def _merged_order(held: list[str], given: list[str]) -> list[str]:
    # What is new goes before the next of `given` that is held, or last.
    # So the same request twice is the same as once, without times too.
    places, before, waiting = set(held), {}, []
    for name in given:
        if name in places:
            before[name], waiting = waiting, []
        else:
            waiting.append(name)
    return [each for name in held for each in (*before.get(name, ()), name)] + waiting
