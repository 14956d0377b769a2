"""What the store acknowledges stays, once; what it deletes is gone from the bytes of its files."""

import itertools
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import Session, User
from files import UserError
from serving import database, taps
from serving.store import Store
from serving.taps import BadEvent

ROOT = Path(__file__).resolve().parent.parent
KILLS = int(os.environ.get("STORE_KILLS", "5"))  # STORE_KILLS=60 for the long run
DAY = 86400.0


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "serve.sqlite")
    yield made
    made.close()


@pytest.fixture
def clock(store):
    """A clock that stands still: clock[0] is its time."""
    hands = [1_780_000_000.0]
    store.db.now = lambda: hands[0]
    return hands


def sessions(*numbers: int, stamps: bool = True, text: str = "text") -> list[Session]:
    """Session n is an hour after session n - 1."""
    times = [f"2026-01-{n // 24 + 1:02}T{n % 24:02}:00" if stamps else None for n in numbers]
    return [
        Session(session_id=f"s{n}", summary=f"{text} {n}", timestamp=at)
        for n, at in zip(numbers, times, strict=True)
    ]


def held(store: Store, user_id: str = "u") -> list[str]:
    return [s.session_id for s in store.user(user_id).sessions]


def offer(store: Store, name: str = "a", user_id: str = "u", method: str = "PE") -> str:
    starters = [f"{name}{slot}" for slot in range(3)]
    return store.taps.offer(user_id, ["interest"], starters, method, "round1")


def show(store: Store, *taps: int, **options) -> str:
    impression = offer(store, **options)
    store.taps.record([(impression, "shown", None)] + [(impression, "tap", slot) for slot in taps])
    return impression


def raw(store: Store) -> bytes:
    return b"".join(f.read_bytes() for f in store.db.path.parent.glob(f"{store.db.path.name}*"))


# -------------------------------------------------------------------------------------- histories


def test_a_user_comes_back_as_put(store):
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    given = sessions(1, 2) + [
        Session.model_validate({"session_id": "m", "timestamp": "2026-02-01T09:00:00.5+02:00",
                                "messages": talk})
    ]  # fmt: skip
    assert store.user("u") is None and store.user_ids() == []
    assert store.put_sessions("u", given, {"age": "25-34"}) == 3
    assert store.user("u") == User(user_id="u", profile={"age": "25-34"}, sessions=given)
    assert store.put_sessions("v", [], None) == 0
    assert store.user("v") == User(user_id="v", profile=None, sessions=[])
    assert store.user_ids() == ["u", "v"]


def test_no_profile_leaves_the_profile_and_an_empty_one_empties_it(store):
    store.put_sessions("u", [], {"age": "25-34"})
    store.put_sessions("u", sessions(1), None)
    assert store.user("u").profile == {"age": "25-34"}
    store.put_sessions("u", [], {})
    assert store.user("u").profile == {}
    for user_id, profile in (("", None), ("x" * 201, None), ("u", {"age": 3})):
        with pytest.raises(ValueError):
            store.put_sessions(user_id, [], profile)
    assert store.user_ids() == ["u"]


@pytest.mark.parametrize("stamps", [True, False])
def test_putting_the_same_twice_is_putting_it_once(tmp_path, stamps):
    store = Store(tmp_path / "s", max_sessions=5)
    everything = sessions(*range(12), stamps=stamps)
    for part, latest in ((everything[:6], 5), (everything[:10], 9), (everything, 11)):
        for _ in range(2):
            store.put_sessions("u", part)
            assert held(store) == [f"s{n}" for n in range(latest - 4, latest + 1)]
    for part in (everything[:10], everything[9:]) * 2:  # in pieces, and all the pieces again
        store.put_sessions("u", part)
        assert held(store) == ["s7", "s8", "s9", "s10", "s11"]


def test_a_session_is_replaced_where_it_stands(store):
    store.put_sessions("u", sessions(0, 1, 2, stamps=False))
    store.put_sessions("u", sessions(1, 3, 1, stamps=False, text="new"))
    assert [s.summary for s in store.user("u").sessions] == ["text 0", "new 1", "text 2", "new 3"]
    late = Session(session_id="s0", timestamp="2026-03-01T00:00", summary="late")
    store.put_sessions("t", sessions(0, 1, 2))
    store.put_sessions("t", [late])
    assert held(store, "t") == ["s1", "s2", "s0"]


def test_late_arrivals_take_their_place_in_time_and_the_oldest_go(tmp_path):
    store = Store(tmp_path / "s", max_sessions=4)
    store.put_sessions("u", sessions(5, 9, 7))
    assert held(store) == ["s5", "s7", "s9"]
    assert store.put_sessions("u", sessions(6, 8)) == 4
    assert held(store) == ["s6", "s7", "s8", "s9"]
    assert store.put_sessions("u", sessions(1)) == 4  # older than all: it never comes in
    assert held(store) == ["s6", "s7", "s8", "s9"]
    store.put_sessions("u", sessions(0, stamps=False))  # without a time: last, and no sorting
    assert held(store) == ["s7", "s8", "s9", "s0"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=5), st.booleans())
def test_histories_match_a_plain_list(requests, stamps):
    """The store against the same rules on lists, for any requests without a limit."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "s")
        expected: list[int] = []
        for request in requests:
            store.put_sessions("u", sessions(*request, stamps=stamps))
            first = list(dict.fromkeys(request))
            for place, n in reversed(list(enumerate(first))):
                if n not in expected:
                    later = [x for x in first[place + 1 :] if x in expected]
                    expected.insert(expected.index(later[0]) if later else len(expected), n)
            if stamps:
                expected.sort()
            assert held(store) == [f"s{n}" for n in expected]
        store.close()


def test_thousands_of_sessions(store):
    assert store.put_sessions("u", sessions(*range(500), stamps=False)) == 500
    assert store.put_sessions("u", sessions(*range(400, 5000), stamps=False)) == 500
    assert held(store) == [f"s{n}" for n in range(4500, 5000)]
    db, changes = store.db.connection, store.db.connection.total_changes
    store.put_sessions("u", sessions(5000, stamps=False))
    assert db.total_changes - changes < 10  # a full history does not move for one more


def test_a_run_is_imported_once_and_brings_nobody_back(store):
    users = [User(user_id=x, profile={"x": x}, sessions=sessions(1, 2)) for x in "abc"]
    store.put_sessions("b", sessions(9))
    assert store.import_users(users, "run1") == 2
    assert store.user("a") == users[0] and held(store, "b") == ["s9"]
    assert store.import_users(users, "run1") == 0
    store.delete_user("a")
    more = [*users, User(user_id="d", sessions=[])]
    assert store.import_users(more, "run1") == 0
    assert store.import_users(more, "run2") == 1
    assert store.user_ids() == ["b", "c", "d"]
    store.put_sessions("a", sessions(5))  # but people may come back themselves
    assert held(store, "a") == ["s5"]


def test_an_import_that_fails_can_be_repeated(store):
    def broken():
        yield User(user_id="a", sessions=sessions(1))
        raise OSError("the file ends")

    with pytest.raises(OSError):
        store.import_users(broken(), "run1")
    assert store.user_ids() == []
    assert store.import_users([User(user_id="a", sessions=[])], "run1") == 1


# ----------------------------------------------------------------------------------------- events


def test_lists_come_back_as_shown(store, clock):
    first = show(store, 2, 0, name="a")
    clock[0] += 60
    second = store.taps.offer("v", [], ["x"], "IceBreaker", "round2")
    offer(store, name="never shown")
    assert store.taps.record([(second, "shown", None)]) == 1
    a, b = store.taps.shown()
    assert a == taps.Shown(
        user_id="u", timestamp=datetime(2026, 5, 28, 20, 26, 40), interests=["interest"],
        starters=["a0", "a1", "a2"], clicked=[0, 2], method="PE", version="round1")
    assert (b.user_id, b.interests, b.clicked, b.method) == ("v", [], [], "IceBreaker")
    assert list(store.taps.shown("v")) == [b] and list(store.taps.shown("nobody")) == []
    assert first != second and len(first) == 48


def test_events_count_once(store):
    impression = offer(store)
    assert store.taps.record([(impression, "tap", 1)]) == 1  # implies that the list was shown
    assert store.taps.record([(impression, "shown", None)]) == 0
    assert store.taps.record([(impression, "tap", 1), (impression, "tap", 2)] * 2) == 1
    assert [x.clicked for x in store.taps.shown()] == [[1, 2]]
    assert store.taps.record([]) == 0


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (("IMPRESSION", "tap", 3), "events[2].slot: not one of the list's 3 slots"),
        (("IMPRESSION", "tap", -1), "events[2].slot: not one of the list's 3 slots"),
        (("IMPRESSION", "tap", None), "events[2].slot: not one of the list's 3 slots"),
        (("IMPRESSION", "tap", True), "events[2].slot: not one of the list's 3 slots"),
        (("IMPRESSION", "shown", 0), "events[2].slot: only a tap has one"),
        (("IMPRESSION", "click", 0), "events[2].type: 'shown' or 'tap'"),
        (("nonsense", "tap", 0), "events[2].impression_id: not an impression id of this server"),
    ],
)
def test_a_bad_event_is_named_and_refuses_all(store, event, message):
    good = offer(store)
    bad = (event[0].replace("IMPRESSION", good), *event[1:])
    with pytest.raises(ValueError) as caught:
        store.taps.record([(good, "shown", None), (good, "tap", 0), bad])
    assert str(caught.value) == message
    assert list(store.taps.shown()) == []
    assert store.taps.record([(good, "tap", 0)]) == 1


def test_only_ids_of_this_store_are_taken(store, tmp_path):
    good = offer(store)
    other = Store(tmp_path / "other")
    foreign = offer(other)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    forged = {good[:i] + x + good[i + 1 :] for i in range(len(good)) for x in letters} - {good}
    forged |= {good[:n] for n in range(len(good))} | {good + "A", good + "=", good + "\n", "é" * 48}
    forged |= {" " + good, good[:10] + "!" + good[10:], good * 2, foreign}
    forged |= {good.replace("-", "+").replace("_", "/")} - {good}  # the same bytes
    for bad in [*forged, None, 7, good.encode()]:
        with pytest.raises(BadEvent, match="events.0..impression_id: not an impression id"):
            store.taps.record([(bad, "shown", None)])
    assert list(store.taps.shown()) == []
    assert store.taps.record([(good, "shown", None)]) == 1
    assert other.taps.record([(foreign, "shown", None)]) == 1


def test_every_text_of_the_same_bytes_but_one_is_refused(store):
    """base64 has + for - and / for _: ids until one holds such a character."""
    for n in range(200):
        good = offer(store, name=f"{n} ")
        alias = good.replace("-", "+").replace("_", "/")
        if alias != good:
            break
    with pytest.raises(BadEvent, match="not an impression id"):
        store.taps.record([(alias, "shown", None)])


def test_ids_expire(store, clock, tmp_path, monkeypatch):
    impression = offer(store)
    clock[0] += 48 * 3600 - 1
    assert store.taps.record([(impression, "shown", None)]) == 1
    clock[0] += 2
    with pytest.raises(BadEvent, match=r"^events\[0\].impression_id: expired$"):
        store.taps.record([(impression, "tap", 0)])
    monkeypatch.setattr(taps, "IMPRESSION_SECONDS", -3600)
    gone = Store(tmp_path / "gone")
    with pytest.raises(BadEvent, match="expired"):
        gone.taps.record([(offer(gone), "shown", None)])


def test_ids_are_good_after_a_restart(store):
    impression = offer(store)
    store.close()
    again = Store(store.db.path)
    assert again.taps.record([(impression, "tap", 0)]) == 1
    again.close()


def test_the_same_list_answered_again_is_one_impression(store, clock):
    first = offer(store)
    clock[0] += 47 * 3600
    second = offer(store)
    clock[0] += 2 * 3600
    with pytest.raises(BadEvent, match="expired"):
        store.taps.record([(first, "shown", None)])
    assert store.taps.record([(second, "shown", None)]) == 1
    third = offer(store)  # after it was shown, it is a new one
    offer(store, user_id="v"), offer(store, method="SFT")
    assert store.taps.record([(third, "shown", None)]) == 1
    assert len(list(store.taps.shown())) == 2
    assert len(store.db.rows("SELECT * FROM lists")) == 4


def test_an_answer_without_starters_teaches_nothing(store):
    empty = store.taps.offer("u", ["interest"], [], "PE", "round1")
    assert store.taps.record([(empty, "shown", None)]) == 1
    with pytest.raises(ValueError, match="not one of the list's 0 slots"):
        store.taps.record([(empty, "tap", 0)])
    assert list(store.taps.shown()) == [] and store.taps.rates() == []
    assert store.taps.seen("u", 7) == []


def test_starters_seen_within_days(store, clock):
    show(store, name="old")
    clock[0] += 5 * DAY
    show(store, name="new")
    answered = offer(store, name="answered")
    assert store.taps.seen("u", 7) == ["old0", "old1", "old2", "new0", "new1", "new2"]
    assert store.taps.seen("u", 7, offered=True)[6:] == ["answered0", "answered1", "answered2"]
    assert store.taps.seen("u", 4) == ["new0", "new1", "new2"] and store.taps.seen("v", 7) == []
    clock[0] += 1 * DAY
    store.taps.record([(answered, "shown", None)])
    show(store, name="new")  # once more: named once
    clock[0] += 6.5 * DAY
    assert len(store.taps.seen("u", 7)) == 6
    assert store.taps.seen("u", 7)[:4] == ["answered0", "answered1", "answered2", "new0"]
    assert store.taps.seen("u", 0.1, offered=True) == []


def test_sessions_after_a_list(store):
    def after(user_id="u"):
        return [shown.sessions_after for shown in store.taps.shown(user_id)]

    store.put_sessions("u", sessions(0, 1))  # before any list
    show(store, name="a")
    assert after() == [None]  # nothing yet, and perhaps something to come
    store.put_sessions("u", sessions(2, 3))
    store.put_sessions("u", sessions(3, 4))  # one of them again
    assert after() == [3]
    offer(store, name="never shown")
    store.put_sessions("u", sessions(5))
    assert after() == [4]
    show(store, name="b")
    assert after() == [4, None]
    show(store, name="c", user_id="v")
    store.put_sessions("v", sessions(1))
    show(store, name="d")
    assert after() == [4, 0, None] and after("v") == [1]
    late = offer(store, name="e")
    store.put_sessions("u", sessions(6))  # the shown event comes after the session
    store.taps.record([(late, "tap", 0)])
    assert after() == [4, 0, 0, 1]


def test_sessions_after_survive_the_limit(tmp_path):
    store = Store(tmp_path / "s", max_sessions=3)
    show(store, name="a")
    for n in range(10):
        store.put_sessions("u", sessions(n))
    store.put_sessions("u", sessions(*range(10)))  # all of it again: nothing new
    show(store, name="b")
    assert [shown.sessions_after for shown in store.taps.shown()] == [10, None]


def test_lists_kept_ready(store):
    assert store.ahead("u", "k1") is None
    value = {"starters": [{"text": "café", "utility": 0.25, "interest": None}]}
    store.put_ahead("u", "k1", value, "PE")
    store.put_ahead("u", "k2", {"x": 2}, "SFT")
    store.put_ahead("v", "k1", {"x": 3}, "PE")
    assert store.ahead("u", "k1") == value and store.ahead("v", "k1") == {"x": 3}
    store.put_ahead("u", "k3", {"x": 4}, "PE")
    assert store.ahead("u", "k1") is None and store.ahead("u", "k3") == {"x": 4}
    assert store.ahead("u", "k2") == {"x": 2}


# ------------------------------------------------------------------------------------------ rates


def test_rates_by_method(store):
    show(store, 0, 1, name="a"), show(store, name="b"), show(store, 2, name="c", user_id="v")
    show(store, name="d", user_id="v", method="IceBreaker"), offer(store, name="not shown")
    ice, pe = store.taps.rates()
    assert list(pe) == "method users lists lists_tapped starters taps rate low high".split()
    assert list(pe.values())[:7] == ["PE", 2, 3, 2, 9, 3, 1 / 3]
    assert list(ice.values())[:7] == ["IceBreaker", 1, 1, 0, 3, 0, 0.0]
    for row in (ice, pe):
        assert 0 <= row["low"] <= row["rate"] <= row["high"] <= 1
    assert ice["low"] == 0 and ice["high"] > 0.7  # one user says next to nothing


def test_the_interval_is_wilsons_where_starters_are_independent():
    n, k = 400, 90
    low, high = taps._interval((1,) * n, (1,) * k + (0,) * (n - k))
    z, p = 1.96, k / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert low == pytest.approx(middle - half, abs=5e-4)
    assert high == pytest.approx(middle + half, abs=5e-4)
    wide = taps._interval((4,) * 100, (4,) * 22 + (2,) + (0,) * 77)  # four that say the same
    assert wide[1] - wide[0] == pytest.approx(2 * (high - low), rel=0.03)


@pytest.mark.parametrize("users", [5, 20, 100])
def test_the_interval_covers_19_in_20(users):
    """Users who differ, with lists of very different numbers: 0.25 is the rate of all."""
    rng, inside, draws = random.Random(1), 0, 400
    for _ in range(draws):
        starters = tuple(5 * rng.choice((1, 1, 2, 3, 8)) for _ in range(users))
        pairs = [(n, rng.betavariate(2, 6)) for n in starters]
        tapped = tuple(sum(rng.random() < p for _ in range(n)) for n, p in pairs)
        low, high = taps._interval(starters, tapped)
        inside += low <= 0.25 <= high
    assert 0.90 < inside / draws < 0.985


# --------------------------------------------------------------------------------------- deletion


def fill(store: Store, user_id: str, rng: random.Random) -> None:
    """Rows in every table; each text, and each id, holds `user_id`."""
    filler = f"{user_id} {'x' * rng.randint(5, 900)}"
    names = [f"{user_id} {n}" for n in rng.sample(range(99), 9)]
    rows = [Session(session_id=name, summary=filler) for name in names]
    store.put_sessions(user_id, rows, {user_id: user_id})
    impression = store.taps.offer(user_id, [user_id] * 3, [filler] * 3, "PE", "round1")
    store.taps.record([(impression, "tap", 1)])
    store.put_ahead(user_id, "key", {user_id: filler})


def test_no_byte_of_a_deleted_user_stays(store):
    rng = random.Random(0)
    names = [f"CANARY{n:03}" for n in range(80)]
    for name in names * 2:
        fill(store, name, rng)
    reader = Store(store.db.path)  # as feedback.py beside the server
    assert all(name.encode() in raw(store) for name in names)
    rng.shuffle(names)
    for n, name in enumerate(names[:25]):
        removed = store.delete_user(name)
        assert list(removed) == ["taps", "users", "sessions", "appended", "lists", "ahead"]
        assert all(removed.values())
        assert name.encode() not in raw(store)
        assert store.user(name) is None and store.ahead(name, "key") is None
        assert len(list(reader.taps.shown())) == 2 * (80 - n - 1)
    assert len(store.user(names[-1]).sessions) >= 9
    assert store.db.rows("PRAGMA integrity_check") == [("ok",)]
    assert store.delete_user("nobody") == dict.fromkeys(removed, 0)
    reader.close()


def test_a_deleted_list_takes_no_events(store):
    impression = offer(store)
    assert store.delete_user("u")["lists"] == 1
    with pytest.raises(BadEvent, match="its list was deleted"):
        store.taps.record([(impression, "shown", None)])
    store.put_sessions("u", sessions(1))
    assert store.delete_user("u") == {
        "taps": 0, "users": 1, "sessions": 1, "appended": 1, "lists": 0, "ahead": 0
    }  # fmt: skip


@pytest.mark.parametrize("again", ["delete", "restart"])
def test_a_reader_that_holds_on_delays_the_wiping_and_is_told_of(tmp_path, monkeypatch, again):
    monkeypatch.setattr(database, "WAIT", 0.1)
    store = Store(tmp_path / "s")
    fill(store, "CANARYu", random.Random(0))
    shell = sqlite3.connect(store.db.path, isolation_level=None)
    shell.execute("BEGIN")
    shell.execute("SELECT * FROM users").fetchone()
    with pytest.raises(sqlite3.OperationalError, match="not wiped"):
        store.delete_user("CANARYu")
    assert store.user("CANARYu") is None and b"CANARYu" in raw(store)
    Store(store.db.path).close()  # opens all the same
    shell.execute("COMMIT")
    if again == "delete":
        assert sum(store.delete_user("CANARYu").values()) == 0
    else:
        Store(store.db.path).close()
    assert b"CANARYu" not in raw(store)
    shell.close()


# --------------------------------------------------------------------------------- texts of people

NASTY = [
    *("'; DROP TABLE users; --", '"', "\\", "%_?", "NULL", "?1", '{"x": [1]}', "]]}", "\x00"),
    *("a\u200bb\u2060", "\U0001f9ca\U0001f468\u200d", "\u202eabc", "e\u0301"),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    made = Store(tmp_path_factory.mktemp("texts") / "s")
    show(made, 0, user_id="neighbour")
    yield made
    made.close()


@settings(max_examples=80, deadline=None)
@given(st.lists(st.text() | st.sampled_from(NASTY), min_size=3, max_size=6))
@example(NASTY)
def test_any_text_comes_back(shared, texts):
    store = shared
    rows = [
        Session(session_id=f"{n} {text}"[:200], summary=f"{text}.", timestamp=None)
        for n, text in enumerate(texts)
    ]
    user = User(user_id=f"id {texts[0]}"[:200], profile={texts[1]: texts[2]}, sessions=rows)
    store.put_sessions(user.user_id, user.sessions, user.profile)
    assert store.user(user.user_id) == user
    assert store.user_ids() == [user.user_id]
    impression = store.taps.offer(user.user_id, texts, texts, texts[0], texts[1])
    store.taps.record([(impression, "tap", 2)])
    [shown] = store.taps.shown(user.user_id)
    assert (shown.interests, shown.starters, shown.clicked) == (texts, texts, [2])
    assert (shown.user_id, shown.method, shown.version) == (user.user_id, *texts[:2])
    assert store.taps.seen(user.user_id, 1) == list(dict.fromkeys(texts))
    store.put_ahead(user.user_id, texts[1], {texts[0]: texts})
    assert store.ahead(user.user_id, texts[1]) == {texts[0]: texts}
    removed = store.delete_user(user.user_id)
    assert removed["users"] == removed["lists"] == removed["ahead"] == 1
    assert store.user_ids() == [] and [x.user_id for x in store.taps.shown()] == ["neighbour"]


# ------------------------------------------------------------------------- threads and processes


def test_threads_at_once_never_double(store):
    impressions = [offer(store, name=f"{n} ") for n in range(40)]
    events = [(x, kind, slot) for x in impressions for kind, slot in (("shown", None), ("tap", 1))]
    other = Store(store.db.path)  # another connection, as another process has
    news, start = [], threading.Barrier(4)

    def work(own: Store):
        start.wait()
        for event in events:
            news.append(own.taps.record([event]))

    threads = [threading.Thread(target=work, args=(own,)) for own in (store, store, other, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(news) == 4 * len(events) and sum(news) == len(events)
    assert [x.clicked for x in store.taps.shown()] == [[1]] * 40
    other.close()


def test_threads_put_and_read_without_a_mix_up(store):
    faults = []

    def work(name: str):
        try:
            for n in range(30):
                store.put_sessions(name, sessions(n, text=name))
                impression = offer(store, name=f"{name} {n} ", user_id=name)
                store.taps.record([(impression, "tap", n % 3)])
                store.put_ahead(name, "k", {"of": name})
                user = store.user(name)
                assert len(user.sessions) == n + 1
                assert all(s.summary.startswith(name) for s in user.sessions)
                assert store.ahead(name, "k") == {"of": name}
                assert all(x.starters[0].startswith(name) for x in store.taps.shown(name))
            assert [x.clicked for x in store.taps.shown(name)] == [[n % 3] for n in range(30)]
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def python(code: str, *words) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )


def test_many_processes_make_one_store(tmp_path):
    code = (
        "import sys; from serving import store; s = store.Store(sys.argv[1]);"
        "print(s.taps.offer('u' + sys.argv[2], [], ['x'], 'PE', 'v'))"
    )
    jobs = [python(code, tmp_path / "s", n) for n in range(6)]
    impressions = [job.communicate()[0].strip() for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 6
    store = Store(tmp_path / "s")
    events = [(x, "shown", None) for x in impressions]
    assert store.taps.record(events) == 6  # one key signs them all


def test_training_reads_beside_a_server_that_writes(store):
    code = (
        "import sys; from serving import store; s = store.Store(sys.argv[1]);"
        "print(*[len(list(s.taps.shown())) for _ in range(50)], s.taps.rates()[0]['taps'])"
    )
    show(store, 0, name="first")
    job = python(code, store.db.path)
    written = 1
    while job.poll() is None:
        show(store, 0, name=f"{written} ")
        written += 1
    counts = list(map(int, job.communicate()[0].split()))
    assert job.returncode == 0 and counts == sorted(counts) and counts[-1] <= written
    assert len(list(store.taps.shown())) == written


def test_what_is_acknowledged_is_synced(store):
    """PRAGMA synchronous cannot be changed within a transaction, so the order matters."""
    said, levels = [], {}
    impression = offer(store)
    store.put_sessions("gone", sessions(1))
    store.db.connection.set_trace_callback(said.append)
    calls = {
        "record": lambda: store.taps.record([(impression, "tap", 0)]),
        "put_sessions": lambda: store.put_sessions("u", sessions(1)),
        "delete_user": lambda: store.delete_user("gone"),
        "offer": lambda: offer(store, name="b"),
        "put_ahead": lambda: store.put_ahead("u", "k", {}),
    }
    for name, call in calls.items():
        said.clear()
        call()
        first = said.index("BEGIN IMMEDIATE")
        levels[name] = [x for x in said[:first] if "synchronous" in x]
        assert said[first:].count("COMMIT") >= 1
    store.db.connection.set_trace_callback(None)
    assert levels == {
        "record": ["PRAGMA synchronous=FULL"],
        "put_sessions": ["PRAGMA synchronous=FULL"],
        "delete_user": ["PRAGMA synchronous=FULL"],
        "offer": ["PRAGMA synchronous=NORMAL"],
        "put_ahead": ["PRAGMA synchronous=NORMAL"],
    }
    with store.db.transaction(durable=True):
        assert store.db.rows("PRAGMA synchronous") == [(2,)]
        assert store.db.rows("PRAGMA journal_mode") == [("wal",)]
        assert store.db.rows("PRAGMA secure_delete") == [(1,)]


RECORDS = """
import itertools, sys; from serving import store
s = store.Store(sys.argv[1])
for n in itertools.count():
    name = f"{sys.argv[2]} {n}"
    x = s.taps.offer(f"u{n % 3}", ["i"], [f"{name} {slot}" for slot in range(3)], "PE", "v")
    s.taps.record([(x, "shown", None), (x, "tap", 0), (x, "tap", 2)])
    print(x, name, flush=True)
"""

DELETES = """
import itertools, sys, data; from serving import store
s = store.Store(sys.argv[1])
for n in itertools.count():
    name = f"CANARY-{sys.argv[2]}-{n}-"
    s.put_sessions(name, [data.Session(session_id=f"s{k}", summary=name * 9) for k in range(20)])
    s.delete_user(name)
    print(name, flush=True)
"""


def lines_until_killed(code: str, path: Path, number: int, rng: random.Random) -> list[str]:
    """What a process prints before SIGKILL at some moment after its first few lines."""
    job = python(code, path, number)
    lines = [job.stdout.readline() for _ in range(rng.randint(1, 30))]
    time.sleep(rng.random() * 0.02)
    job.send_signal(signal.SIGKILL)
    lines += job.stdout.readlines()
    assert job.wait() == -signal.SIGKILL
    job.stdout.close()
    return [line.strip() for line in lines if line.endswith("\n")]


def test_no_acknowledged_event_is_lost_or_doubled_by_a_kill(tmp_path):
    rng, acknowledged = random.Random(), []
    for number in range(KILLS):
        lines = lines_until_killed(RECORDS, tmp_path / "s", number, rng)
        assert lines
        acknowledged += [line.split(" ", 1) for line in lines]
        store = Store(tmp_path / "s")
        lists = list(store.taps.shown())
        found = Counter(shown.starters[0][:-2] for shown in lists)
        assert all(found[name] == 1 for _, name in acknowledged)
        assert max(found.values()) == 1
        assert all(shown.clicked == [0, 2] for shown in lists)  # all of a call's events, or none
        assert len(lists) <= len(acknowledged) + number + 1  # one may be kept and not acknowledged
        for impression, _ in acknowledged[-3:]:
            again = [(impression, "shown", None), (impression, "tap", 0), (impression, "tap", 2)]
            assert store.taps.record(again) == 0
        assert store.db.rows("PRAGMA integrity_check") == [("ok",)]
        store.close()


def test_no_acknowledged_deletion_is_undone_by_a_kill(tmp_path):
    rng, gone = random.Random(), []
    for number in range(max(2, KILLS // 2)):
        gone += lines_until_killed(DELETES, tmp_path / "s", number, rng)
        store = Store(tmp_path / "s")  # ends what the kill had cut short
        content = raw(store)
        assert gone and not any(name.encode() in content for name in gone)
        left = {name.encode() for name in store.user_ids()}
        for part in content.split(b"CANARY")[1:]:  # of a user who is still there, wholly
            assert any((b"CANARY" + part).startswith(name) for name in left)
        assert all(len(held(store, name.decode())) == 20 for name in left)
        store.close()


def test_half_of_a_killed_call_does_not_stay_in_the_log(tmp_path):
    code = """if True:
        import os, signal, sys; from serving import store
        s = store.Store(sys.argv[1])
        s.db.connection.execute("PRAGMA cache_size=1")  # so that the log is written before the end
        with s.db.transaction() as db:
            for n in range(200):
                db.execute("INSERT INTO users VALUES (?, ?)", (f"u{n}", "CANARY" * 99))
            os.kill(os.getpid(), signal.SIGKILL)"""
    assert python(code, tmp_path / "s").wait() == -signal.SIGKILL
    assert b"CANARY" in (tmp_path / "s-wal").read_bytes()
    store = Store(tmp_path / "s")
    assert store.user_ids() == [] and b"CANARY" not in raw(store)
    store.close()


# -------------------------------------------------------------------------------------- bad files


def refused(path) -> str:
    with pytest.raises(UserError) as caught:
        Store(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


@pytest.mark.parametrize("replaced", [False, True])
def test_nothing_is_acknowledged_into_a_file_that_was_removed(store, replaced):
    show(store)
    impression, copy = offer(store), store.db.path.with_name("copy")
    store.db.check()
    copy.write_bytes(store.db.path.read_bytes())
    copy.replace(store.db.path) if replaced else store.db.path.unlink()
    for write in (
        store.db.check,
        lambda: store.put_sessions("u", sessions(1)),
        lambda: store.taps.record([(impression, "tap", 0)]),
        lambda: store.delete_user("u"),
        lambda: offer(store),
    ):
        with pytest.raises(database.Removed, match="start the server again"):
            write()
    assert not store.user("u") and [row.clicked for row in store.taps.shown("u")] == [[]]


def test_a_file_that_is_no_store_is_refused_and_left_alone(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no database " * 400)
    assert "not a database" in refused(text)
    assert text.read_text() == "no database " * 400
    assert "unable to open" in refused(tmp_path)
    assert "No such file or directory" in refused(tmp_path / "missing" / "s")
    foreign = tmp_path / "foreign"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE users (name)")
    db.close()
    before = foreign.read_bytes()
    assert "tables of version 0, this code knows 1" in refused(foreign)
    assert foreign.read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_tables_of_another_version_are_refused(store):
    store.db.connection.execute("PRAGMA user_version=99")
    store.close()
    assert "tables of version 99, this code knows 1; name another file" in refused(store.db.path)


def test_a_file_that_cannot_be_written_is_refused():
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, which others cannot enter
        path = Path(folder) / "s"
        Store(path).close()
        path.chmod(0o444), Path(folder).chmod(0o555)
        own = os.geteuid()
        try:
            if own == 0:
                os.seteuid(65534)  # root may write anything
            assert "cannot be used as the server's store" in refused(path)
            assert "cannot be used as the server's store" in refused(Path(folder) / "new")
        finally:
            os.seteuid(own)
            Path(folder).chmod(0o755)


def test_only_the_owner_reads_the_files(store):
    store.put_sessions("u", sessions(1))
    files = list(store.db.path.parent.glob("serve.sqlite*"))
    assert len(files) == 3 and all(f.stat().st_mode & 0o077 == 0 for f in files)


def test_a_file_that_others_could_read_is_theirs_no_longer(tmp_path):
    path = tmp_path / "serve.sqlite"
    first = Store(path)
    for file in tmp_path.iterdir():
        file.chmod(0o644)
    second = Store(path)
    second.put_sessions("u", sessions(1))
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o600}
    assert len(list(tmp_path.iterdir())) >= 2
    first.close()
    second.close()


def test_a_transaction_within_another_is_a_part_of_it(store):
    with pytest.raises(KeyError), store.db.transaction() as db:
        store.put_ahead("u", "k", {})
        assert not db.execute("SELECT 1 FROM lists").fetchall()
        offer(store)
        raise KeyError
    assert not store.db.rows("SELECT 1 FROM ahead") and not store.db.rows("SELECT 1 FROM lists")
    store.put_ahead("u", "k", {})
    assert store.ahead("u", "k") == {}


def test_an_empty_file_becomes_a_store(tmp_path):
    (tmp_path / "s").touch()
    show(Store(tmp_path / "s"))
    assert len(list(itertools.islice(Store(tmp_path / "s").taps.shown(), 5))) == 1


def test_lists_that_nobody_was_shown_do_not_pile_up(store, clock):
    show(store)
    for i in range(998):
        offer(store, f"never shown {i}")
    store.put_ahead("nobody", "key", {"starters": []}, "SFT")
    clock[0] += taps.KEPT + 1
    offer(store, "the thousandth")
    assert store.db.rows("SELECT count(*) FROM lists") == [(2,)]
    assert store.ahead("nobody", "key") is None and len([*store.taps.shown()]) == 1
