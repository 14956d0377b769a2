"""Conversations from elsewhere become users: each kind by hand, faults listed, nothing raised."""

import copy
import gzip
import json
import subprocess
import sys
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from tools import importers

ROOT = Path(__file__).resolve().parent.parent
SECRET = "zebra-crossing"  # what people say in these files; it must never reach a message


def node(parent, role=None, parts=(), kind="text", time=None, **message):
    if role is None:
        return {"message": None, "parent": parent, "children": []}
    content = {"content_type": kind, "parts": list(parts)}
    message |= {"author": {"role": role}, "create_time": time, "content": content}
    return {"id": "x", "message": message, "parent": parent, "children": []}


def chatgpt(**changes) -> dict:
    """A question asked twice (b, then d), with the second branch shown."""
    return {
        "title": SECRET,
        "create_time": 1777626000.5,  # 2026-05-01T09:00:00.5
        "conversation_id": "c1",
        "id": "other",
        "mapping": {
            "root": node(None),
            "a": node("root", "system", ["Be kind."]),
            "b": node("a", "user", [f"{SECRET} first try"], time=1.0),
            "c": node("b", "assistant", ["first answer"], time=2.0),
            "d": node("a", "user", [f"{SECRET} second try"], time=3.0),
            "e": node("d", "assistant", ["second answer"], time=4.0),
        },
        "current_node": "e",
    } | changes


def sharegpt(name="abc_0", text=SECRET) -> dict:
    turns = [("system", "Be kind."), ("human", text), ("gpt", "answer")]
    return {"id": name, "conversations": [{"from": f, "value": v} for f, v in turns]}


def wildchat(name="h1", address="ip1", text=SECRET, stamp="2023-04-09 00:02:53+00:00") -> dict:
    turns = [
        {"role": "user", "content": text, "hashed_ip": address, "header": {"role": "none"}},
        {"role": "assistant", "content": "answer", "hashed_ip": None, "header": {"role": "none"}},
    ]
    return {
        "conversation_hash": name,
        "model": "gpt-4",
        "timestamp": stamp,
        "conversation": turns,
        "hashed_ip": address,
    }


def locomo() -> dict:
    return {
        "sample_id": "conv-1",
        "qa": [],
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Bob",
            "session_10": [{"speaker": "Ann", "dia_id": "D10:1", "text": f"{SECRET} ten"}],
            "session_2_date_time": "1:56 pm on 8 May, 2023",
            "session_2": [
                {"speaker": "Ann", "dia_id": "D2:1", "text": f"{SECRET} two"},
                {"speaker": "Bob", "dia_id": "D2:2", "text": "Oh!", "img_url": ["x"]},
            ],
            "session_3_date_time": "2:00 pm on 9 May, 2023",
            "session_10_date_time": "one fine day",
        },
    }


def claude(**changes) -> dict:
    return {
        "uuid": "k1", "name": SECRET, "created_at": "2026-05-01T09:00:00.5Z",
        "updated_at": "2026-05-01T10:00:00Z", "account": {"uuid": "a"},
        "chat_messages": [
            {"uuid": "1", "text": f"{SECRET} one", "sender": "human", "attachments": []},
            {"uuid": "2", "text": "", "sender": "assistant",
             "content": [{"type": "tool_use", "name": "x"}, {"type": "text", "text": "Sure."}]},
        ],
    } | changes  # fmt: skip


def openwebui(**changes) -> dict:
    """A question asked twice, with the second branch shown."""
    def turn(role, text, parent):
        return {"role": role, "content": text, "parentId": parent, "childrenIds": [],
                "timestamp": 1777626000}  # fmt: skip

    tree = {"a": turn("user", f"{SECRET} first try", None), "b": turn("assistant", "one", "a"),
            "c": turn("user", f"{SECRET} second try", None),
            "d": turn("assistant", [{"type": "text", "text": "two"}], "c")}  # fmt: skip
    return {"id": "w1", "user_id": "u1", "title": SECRET, "created_at": 1777626000,
            "updated_at": 1777626001, "chat": {"history": {"messages": tree, "currentId": "d"},
                                               "models": ["m"]}} | changes  # fmt: skip


def huggingchat(**changes) -> dict:
    def turn(name, speaker, text, ancestors):
        return {"id": name, "from": speaker, "content": text, "ancestors": ancestors}

    messages = [turn("s", "system", "", []), turn("a", "user", f"{SECRET} first", ["s"]),
                turn("b", "user", f"{SECRET} again", ["s"]),
                turn("c", "assistant", "Yes.", ["s", "b"])]  # fmt: skip
    return {"_id": {"$oid": "f1"}, "title": SECRET, "createdAt": "2026-05-01T09:00:00Z",
            "updatedAt": "2026-05-01T09:00:01Z", "messages": messages} | changes  # fmt: skip


def lmsys(name="l1", text=SECRET) -> dict:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "answer"}]
    return {"conversation_id": name, "model": "koala", "conversation": turns, "turn": 1}


ROWS = {"chatgpt": chatgpt, "sharegpt": sharegpt, "wildchat": wildchat, "locomo": locomo,
        "claude": claude, "openwebui": openwebui, "huggingchat": huggingchat,
        "lmsys": lmsys}  # fmt: skip


def write(path: Path, rows) -> Path:
    """Write a JSON array, JSONL by the ending (bytes are a line as it is), or parquet."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path.write_bytes(b"\n".join(lines))
    else:
        path.write_text(json.dumps(rows))
    return path


def imported(kind: str, *paths: Path, **options) -> tuple[list[data.User], str]:
    out = paths[0].with_name("users.jsonl")
    made = importers.import_users(kind, list(paths), out, **options)
    return data.read_users(out), made.replace(str(out), "OUT")


def refusal(kind: str, path: Path) -> list[str]:
    out = path.with_name("users.jsonl")
    with pytest.raises(data.DataError) as caught:
        importers.import_users(kind, [path], out)
    assert not out.exists() and SECRET not in str(caught.value)
    return str(caught.value).replace(f"{path}:", "FILE:").splitlines()


def said(session: data.Session) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in session.messages]


# ---------------------------------------------------------------------------------------- chatgpt


def shown(tmp_path: Path, conversation: dict) -> list[str]:
    (user,), _ = imported("chatgpt", write(tmp_path / "conversations.json", [conversation]))
    return [message.content for message in user.sessions[0].messages]


def test_a_chatgpt_conversation_is_the_branch_that_was_shown(tmp_path):
    path = write(tmp_path / "conversations.json", [chatgpt()])
    (user,), made = imported("chatgpt", path, me="u17")
    assert made == "1 users, 1 sessions (2 messages) written to OUT"
    assert user.user_id == "u17" and user.sessions[0].summary is None
    assert user.sessions[0].session_id == "c1"
    assert user.sessions[0].timestamp == datetime(2026, 5, 1, 9, 0, 0, 500000)
    assert said(user.sessions[0]) == [
        ("user", f"{SECRET} second try"),
        ("assistant", "second answer"),
    ]
    assert shown(tmp_path, chatgpt(current_node="c")) == [f"{SECRET} first try", "first answer"]


@pytest.mark.parametrize("current", [None, "gone"])
def test_without_a_current_node_the_latest_leaf_counts(tmp_path, current):
    assert shown(tmp_path, chatgpt(current_node=current))[-1] == "second answer"
    older = chatgpt(current_node=current)
    older["mapping"]["c"]["message"]["create_time"] = 5.0
    assert shown(tmp_path, older)[-1] == "first answer"
    untimed = chatgpt(current_node=current)
    for each in untimed["mapping"].values():
        if each["message"]:
            each["message"]["create_time"] = None
    assert shown(tmp_path, untimed)[-1] == "second answer"  # the last in the file


def test_a_cycle_ends_a_branch_and_a_lost_parent_does_not(tmp_path):
    cycle = chatgpt()
    cycle["mapping"]["d"]["parent"] = "e"
    assert shown(tmp_path, cycle) == [f"{SECRET} second try", "second answer"]
    lost = chatgpt()
    lost["mapping"]["e"]["parent"] = "gone"  # then it hangs on what stands before it
    assert shown(tmp_path, lost) == [f"{SECRET} second try", "second answer"]
    lost["mapping"]["b"]["parent"] = "a lost one too"
    assert shown(tmp_path, lost | {"current_node": "c"}) == [f"{SECRET} first try", "first answer"]
    for talk in (flat := chatgpt())["mapping"].values():
        talk["parent"] = None
    assert [text[-10:] for text in shown(tmp_path, flat)] == [
        " first try", "rst answer", "second try", "ond answer"]  # fmt: skip
    loop = {"a": node("b", "user", ["x"]), "b": node("a", "assistant", ["y"])}  # no leaf at all
    path = write(
        tmp_path / "loop.json",
        [chatgpt(), chatgpt(conversation_id="c2", mapping=loop, current_node=None)],
    )
    (user,), made = imported("chatgpt", path)
    assert len(user.sessions) == 1 and "; 1 conversations without a user's words left out" in made


def test_images_code_and_calls_of_tools_are_no_text(tmp_path):
    image = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://x"}
    voice = {"content_type": "audio_transcription", "text": "spoken", "direction": "in"}
    steps = [
        node(None, "user", [image, "What is", "this?"], "multimodal_text"),
        node("0", "assistant", ["search()"], "code", recipient="browser"),
        node("1", "assistant", ["remembers"], recipient="bio"),
        node("2", "tool", ["found it"]),
        node("3", "assistant", ["A cat."], recipient="all"),
        node("4", "user", [image], "multimodal_text"),
        node("5", "user", [voice], "multimodal_text"),
        node("6", "assistant", [], "thoughts", weight=1.0),
        node("7", "assistant", ["", " \n"]),
    ]
    steps[7]["message"]["content"] = {"content_type": "thoughts", "thoughts": []}
    mapping = {str(i): step for i, step in enumerate(steps)}
    assert shown(tmp_path, chatgpt(mapping=mapping, current_node="8")) == [
        "What is this?",
        "A cat.",
        "spoken",
    ]


def test_sessions_stand_in_time_order_where_all_have_a_time_and_only_once(tmp_path):
    times = {"c1": 3e9, "c2": 1e9, "c3": 2e9}
    rows = [chatgpt(conversation_id=name, create_time=t) for name, t in times.items()]
    rows += [chatgpt(conversation_id=None, id="c2"), chatgpt(conversation_id="c9", mapping={})]
    (user,), made = imported("chatgpt", write(tmp_path / "conversations.json", rows))
    assert [s.session_id for s in user.sessions] == ["c2", "c3", "c1"]
    assert made == (
        "1 users, 3 sessions (6 messages) written to OUT"
        "; 1 conversations seen before left out"
        "; 1 conversations without a user's words left out"
    )
    rows[0]["create_time"] = None
    (user,), _ = imported("chatgpt", write(tmp_path / "conversations.json", rows))
    assert [s.session_id for s in user.sessions] == ["c1", "c2", "c3"]
    assert user.sessions[0].timestamp == datetime(1970, 1, 1, 0, 0, 3)  # of its messages


# ------------------------------------------------------------------- sharegpt, wildchat and locomo


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_parts_of_a_sharegpt_id_are_the_sessions_of_one_user(tmp_path, ending):
    rows = [sharegpt(f"abc_{n}", f"text {n}") for n in (10, 4, 0)]  # of three messages each
    rows += [sharegpt("d_e_1"), sharegpt("f"), {"id": "abc_21", "conversations": []}]
    rows += [sharegpt("identity_0"), sharegpt("identity_1")]  # too close to be parts of one
    users, made = imported("sharegpt", write(tmp_path / f"rows.{ending}", rows))
    assert {u.user_id: [s.session_id for s in u.sessions] for u in users} == {
        "abc": ["abc_0", "abc_4", "abc_10"],
        "f": ["f"],
    } | {name: [name] for name in ("d_e_1", "identity_0", "identity_1")}
    assert said(users[0].sessions[1]) == [
        ("system", "Be kind."),
        ("user", "text 4"),
        ("assistant", "answer"),
    ]
    assert made.endswith("; 1 conversations without a user's words left out")


def test_several_files_are_one_data_set(tmp_path):
    first = write(tmp_path / "part1.json", [sharegpt("abc_4"), sharegpt("abc_8")])
    second = write(tmp_path / "part2.jsonl", [sharegpt("abc_0"), sharegpt("abc_8")])
    (user,), made = imported("sharegpt", first, second)
    assert [s.session_id for s in user.sessions] == ["abc_0", "abc_4", "abc_8"]
    assert "; 1 conversations seen before left out" in made


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_wildchat_users_are_hashed_addresses(tmp_path, ending):
    stamp = datetime(2023, 4, 10, 1, tzinfo=UTC) if ending == "parquet" else "2023-04-10T01:00:00Z"
    early = datetime(2023, 4, 9, 1, tzinfo=UTC) if ending == "parquet" else "2023-04-09 01:00:00"
    rows = [
        wildchat("h1", "ip1", stamp=stamp),
        wildchat("h2", "ip1", stamp=early),
        wildchat("h3", "ip2", stamp=None),
        wildchat("h4", None, stamp=early),
        wildchat("h5", "ip3", text=None, stamp=early),
        wildchat("h1", "ip1", stamp=stamp),
    ]
    rows[2]["hashed_ip"] = None  # then the one of a message
    users, made = imported("wildchat", write(tmp_path / f"rows.{ending}", rows))
    assert {u.user_id: [s.session_id for s in u.sessions] for u in users} == {
        "ip1": ["h2", "h1"],
        "ip2": ["h3"],
        "h4": ["h4"],
    }
    assert users[0].sessions[1].timestamp == datetime(2023, 4, 10, 1)
    assert said(users[1].sessions[0]) == [("user", SECRET), ("assistant", "answer")]
    assert "; 1 conversations without a user's words left out" in made
    assert "; 1 conversations seen before left out" in made


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_an_address_may_be_a_number_and_a_time_that_of_a_message(tmp_path, ending):
    for kind, row in (("wildchat", wildchat(stamp=None, address=7)), ("lmsys", lmsys())):
        row["conversation"][1]["timestamp"] = "2023-04-10T01:00:00Z"
        (user,), made = imported(kind, write(tmp_path / f"rows.{ending}", [row]))
        assert user.user_id == {"wildchat": "7"}.get(kind, "l1") and made.endswith("OUT")
        assert user.sessions[0].timestamp == datetime(2023, 4, 10, 1)
        assert len(user.sessions[0].messages) == 2


def test_only_the_needed_columns_of_parquet_are_read(tmp_path):
    path = write(tmp_path / "rows.parquet", [wildchat()])
    (row,) = importers._parquet(path)
    assert row.keys() == wildchat().keys() - {"model"}
    assert row["conversation"][0] == {"role": "user", "content": SECRET, "hashed_ip": "ip1"}


def test_both_people_of_a_locomo_sample_are_users(tmp_path):
    (ann, bob), made = imported("locomo", write(tmp_path / "locomo10.json", [locomo()]))
    assert made == (
        "2 users, 3 sessions (5 messages) written to OUT"
        "; 1 conversations without a user's words left out"
    )
    assert (ann.user_id, bob.user_id) == ("conv-1/Ann", "conv-1/Bob")
    assert [s.session_id for s in ann.sessions] == ["session_2", "session_10"]
    assert [s.timestamp for s in ann.sessions] == [datetime(2023, 5, 8, 13, 56), None]
    assert said(ann.sessions[0]) == [("user", f"{SECRET} two"), ("assistant", "Oh!")]
    assert said(bob.sessions[0]) == [("assistant", f"{SECRET} two"), ("user", "Oh!")]


# -------------------------------------------------------------------------------- other exports


def test_claude_open_webui_huggingchat_and_lmsys(tmp_path):
    when = datetime(2026, 5, 1, 9)
    for kind, row, user_id, stamp, words in (
        ("claude", claude(), "me", when.replace(microsecond=500_000), "one"),
        ("openwebui", openwebui(), "u1", when, "second try"),
        ("openwebui", openwebui(user_id=None, created_at=None), "me", when, "second try"),
        ("huggingchat", huggingchat(), "me", when, "again"),
        ("lmsys", lmsys(text=f"{SECRET} x"), "l1", None, "x"),
    ):  # fmt: skip
        (user,), _ = imported(kind, write(tmp_path / "export.json", [row]))
        (session,) = user.sessions
        assert (user.user_id, session.timestamp) == (user_id, stamp), kind
        assert [m.role for m in session.messages] == ["user", "assistant"], kind
        assert session.messages[0].content == f"{SECRET} {words}", kind


def test_a_message_that_the_chat_never_showed_is_not_the_persons(tmp_path):
    talk = chatgpt()
    talk["mapping"]["a"] = node("root", "user", [f"{SECRET} is a nurse"], metadata={
        "is_visually_hidden_from_conversation": True})  # fmt: skip
    assert shown(tmp_path, talk) == [f"{SECRET} second try", "second answer"]


def test_a_missing_time_falls_back_and_never_turns_a_history_around(tmp_path):
    def named(name, **changes):
        return chatgpt(conversation_id=name, **changes)

    rows = [  # the newest first, as ChatGPT exports them
        named("new", create_time=1.9e9), named("of messages", create_time=None),
        named("none", create_time=None, mapping={"d": node(None, "user", [SECRET])}),
        named("updated", create_time=None, update_time=-5.0,
              mapping={"d": node(None, "user", [SECRET])}),
    ]  # fmt: skip
    (user,), _ = imported("chatgpt", write(tmp_path / "conversations.json", rows))
    ids = [session.session_id for session in user.sessions]
    assert ids.index("updated") < ids.index("of messages") < ids.index("new")
    times = {session.session_id: session.timestamp for session in user.sessions}
    assert times["of messages"] == datetime(1970, 1, 1, 0, 0, 3)  # of the branch shown
    assert times["none"] is None and ids.index("none") < ids.index("new")


@pytest.mark.parametrize("kind, name, account, inner", [
    ("claude", "uuid", "account", "uuid"), ("huggingchat", "_id", "userId", "$oid")])  # fmt: skip
def test_of_several_accounts_each_is_a_user_and_one_alone_is_whose_export_it_is(
        tmp_path, kind, name, account, inner):  # fmt: skip
    for names, users in ((["A", "B", "A", None], {"A": 2, "B": 1, "bo x": 1}),
                         (["A", None, "A"], {"bo x": 3})):  # fmt: skip
        rows = [ROWS[kind](**{name: f"s{n}", account: {inner: who}}) for n, who in enumerate(names)]
        made, _ = imported(kind, write(tmp_path / "export.json", rows), me=" bo  x")
        assert {user.user_id: len(user.sessions) for user in made} == users


@pytest.mark.parametrize("parent", ["parent_message_uuid", "other"])
def test_what_was_edited_or_asked_anew_is_on_another_branch(tmp_path, parent):
    """Later exports of Claude have a tree, too; earlier ones a plain list, which is taken whole."""
    def turn(name, above, sender, text, minute):
        return {"uuid": name, parent: above, "sender": sender, "text": text,
                "created_at": f"2026-05-01T09:{minute:02}:00Z"}  # fmt: skip

    root = "00000000-0000-4000-8000-000000000000"
    rows = [turn("a", root, "human", "first try", 0), turn("b", "a", "assistant", "one", 1),
            turn("c", root, "human", "second try", 2), turn("d", "c", "assistant", "two", 3),
            turn("e", "c", "assistant", "three", 4), 7]  # fmt: skip
    for leaf, last in ((None, "three"), ("d", "two"), ("gone", "three")):
        row = claude(chat_messages=rows, current_leaf_message_uuid=leaf)
        (user,), made = imported("claude", write(tmp_path / "export.json", [row]))
        told = [message.content for message in user.sessions[0].messages]
        whole = ["first try", "one", "second try", "two", "three"]
        assert told == (whole if parent == "other" else ["second try", last])
        assert made.endswith("; 1 messages that cannot be read passed over")  # the 7


@pytest.mark.parametrize("value", [{"$date": "2026-05-01T09:00:00Z"}, {"$date": 1777626000_000},
                                   {"$date": {"$numberLong": "1777626000000"}},
                                   1777626000, 1777626000.0, 1777626000_000, 1777626000_000_000,
                                   "1777626000", "2026-05-01T09:00:00Z", "2026-05-01T11:00+02:00"])
def test_times_in_seconds_milliseconds_and_words(tmp_path, value):
    path = write(tmp_path / "conversations.json", [chatgpt(create_time=value)])
    (user,), _ = imported("chatgpt", path)
    assert user.sessions[0].timestamp == datetime(2026, 5, 1, 9)


@pytest.mark.parametrize("value", [SECRET, 1e300, True, [], -1e30])
def test_a_time_that_cannot_be_read_is_counted(tmp_path, value):
    path = write(tmp_path / "conversations.json", [chatgpt(create_time=value)])
    (user,), made = imported("chatgpt", path)
    assert user.sessions[0].timestamp == datetime(1970, 1, 1, 0, 0, 3)  # that of its messages
    assert made.endswith("; 1 times that cannot be read passed over")
    write(path, [chatgpt(create_time=0)])  # a time that nobody has set
    (user,), made = imported("chatgpt", path)
    assert user.sessions[0].timestamp == datetime(1970, 1, 1, 0, 0, 3) and made.endswith("OUT")


@pytest.mark.parametrize("turn", [False, True])
@pytest.mark.parametrize("older, newer", [(1777626000.0, 1777626100.0), (None, None), (3.5, None)])
def test_of_two_exports_the_later_state_stays(tmp_path, turn, older, newer):
    newer = chatgpt(update_time=newer)  # None: its last message, of 4.0, tells
    older = copy.deepcopy(newer) | {"current_node": "d", "update_time": older}
    # More messages, but earlier.
    older["mapping"]["a"] = node("root", "user", ["first"])
    older["mapping"]["root"] = node("more")
    older["mapping"]["more"] = node(None, "user", ["before"])
    paths = [write(tmp_path / "a.json", [older]), write(tmp_path / "b.json", [newer])]
    (user,), made = imported("chatgpt", *paths[:: -1 if turn else 1])
    assert [m.role for m in user.sessions[0].messages] == ["user", "assistant"]
    assert "1 conversations seen before left out" in made


@pytest.mark.parametrize("turn", [1, -1])
def test_the_later_state_stays_where_its_user_says_nothing_any_more(tmp_path, turn):
    gone = claude(updated_at="2026-05-02T10:00:00Z")
    gone["chat_messages"][0]["text"] = ""
    old = write(tmp_path / "old.json", [claude(), claude(uuid="k2")])
    new = write(tmp_path / "new.json", [gone])
    (user,), made = imported("claude", *[old, new][::turn])
    assert [session.session_id for session in user.sessions] == ["k2"]
    assert made.endswith("; 1 conversations seen before left out"
                         "; 1 conversations without a user's words left out")  # fmt: skip
    gone["updated_at"] = "2026-04-01T10:00:00Z"  # before the other
    write(new, [gone])
    assert len(imported("claude", *[old, new][::turn])[0][0].sessions) == 2


def test_conversations_without_a_name_or_a_time_are_told_apart_by_all_that_is_said(tmp_path):
    rows = [huggingchat(_id=None, createdAt=None, updatedAt=None) for _ in range(3)]
    rows[1]["messages"][3]["content"] = "No."
    (user,), made = imported("huggingchat", write(tmp_path / "export.json", rows))
    assert len(user.sessions) == 2 and "; 1 conversations seen before left out" in made


def test_a_flaw_costs_no_more_of_an_array_than_its_row(tmp_path, capsys):
    path = tmp_path / "conversations.json"
    rows = [chatgpt(weight=float("nan")), chatgpt(conversation_id="c2", title="\udcff 👀")]
    text = json.dumps([*rows, chatgpt(conversation_id="c3", title="👀")], ensure_ascii=False)
    path.write_bytes(text.encode(errors="surrogateescape"))
    named, made = passed_over(capsys, "chatgpt", path)
    assert named == ["FILE: conversation 2: row"] and "2 sessions" in made


def test_tools_unknown_roles_and_numbers_as_ids_refuse_no_file(tmp_path):
    rows = [sharegpt(7), wildchat(5), chatgpt(id=9, conversation_id=None)]
    rows[0]["conversations"] += [{"from": "function_call", "value": "x"}, {"from": "moss"}]
    rows[1]["conversation"].append({"role": "tool", "content": "x"})
    rows[2]["mapping"]["d"]["message"]["author"] = None
    rows[2] |= {"current_node": 7}  # then the latest leaf counts
    for kind, row, passed in zip(("sharegpt", "wildchat", "chatgpt"), rows, (2, 1, 0), strict=True):
        if kind == "chatgpt":
            row["mapping"]["e"]["parent"] = "b"
        (user,), made = imported(kind, write(tmp_path / "rows.json", [row]))
        assert user.sessions[0].session_id == {"sharegpt": "7", "wildchat": "5"}.get(kind, "9")
        count = f"; {passed} messages of tools and other roles passed over"
        assert made.endswith(count if passed else "OUT"), made


def test_utf16_a_single_object_and_a_zip_are_read(tmp_path):
    text = json.dumps([chatgpt()])
    for number, content in enumerate((
        text.encode("utf-16"), text.encode("utf-16-be"), b"\xef\xbb\xbf" + text.encode(),
        json.dumps(chatgpt(), indent=2).encode(), b"\n" + json.dumps(chatgpt()).encode(),
    )):  # fmt: skip
        path = tmp_path / f"{number}.json"
        path.write_bytes(content)
        assert len(imported("chatgpt", path)[0][0].sessions) == 1, number
        with zipfile.ZipFile(tmp_path / "export.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("user.json", "{}")  # of other things
            archive.writestr("chats/conversations-000.json", content)
        assert len(imported("chatgpt", tmp_path / "export.zip")[0][0].sessions) == 1, number


# ------------------------------------------------------------------------------------------ faults


def passed_over(capsys, kind: str, *paths: Path) -> tuple[list[str], str]:
    """(places of what could not be read, what was written) of an import that left some of it."""
    capsys.readouterr()
    _, made = imported(kind, *paths)
    named = [line for line in capsys.readouterr().err.splitlines() if "it/s" not in line]
    assert SECRET not in str(named)
    lines = [line.rsplit(": ", 1)[0] for line in named]
    return [line.replace(str(paths[0]), "FILE") for line in lines], made


@pytest.mark.parametrize("content", [
    json.dumps(chatgpt(), indent=2).replace('"title": ', '"title":\n'),
    json.dumps(chatgpt(), indent=2).replace("{\n", "{", 1),
    "\n \n" + json.dumps(chatgpt()).replace('"title"', '"title"\n'),
    json.dumps(chatgpt(), indent="\t").replace("\n", "\r\n"),
])  # fmt: skip
def test_wherever_the_lines_of_an_object_end_it_is_read(tmp_path, content):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-32-be"):
        path = tmp_path / "single.json"
        path.write_bytes(content.encode(encoding))
        assert len(imported("chatgpt", path)[0]) == 1, encoding
    # A row of JSONL that was cut costs itself alone.
    for end in (b",", b"[", b"{", b":"):
        rows = [b'{"mapping"' + end, json.dumps(chatgpt()).encode(), b""]
        assert len(imported("chatgpt", write(tmp_path / "rows.jsonl", rows))[0]) == 1, end


@pytest.mark.parametrize("gap", ["\n", "\n\n", "", " \r\n\ufeff"])
@pytest.mark.parametrize("indent, rows", [(2, False), (2, True), (None, True)])
def test_several_values_in_a_file_are_read_one_after_the_other(tmp_path, capsys, gap, indent, rows):
    talks = [chatgpt(conversation_id=name) for name in ("c1", "c2", "c3")]
    texts = [json.dumps([talk] if rows else talk, indent=indent) for talk in talks]
    path = tmp_path / "rows.json"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        path.write_bytes(gap.join(texts).encode(encoding))
        assert passed_over(capsys, "chatgpt", path)[0] == []
        assert len(data.read_users(tmp_path / "users.jsonl")[0].sessions) == 3
    if gap == "\n":  # one of them that was cut costs itself alone, and is named by its line
        path.write_text(f"{texts[0]}\n{texts[1][:-3]}\n{texts[2]}")
        named, made = passed_over(capsys, "chatgpt", path)
        assert named == [f"FILE:{texts[0].count(gap) + 2}: line"]
        assert "2 sessions" in made and "; 1 conversations that cannot be read left out" in made
        (tmp_path / "users.jsonl").unlink()
        for content in (f"{texts[1][:-3]}\n{texts[0]}", texts[0] + f"\n{texts[1][0]}INFO] x" * 101):
            path.write_text(content)
            assert refusal("chatgpt", path)[0].startswith("FILE: not JSON (")


def test_why_nothing_of_a_file_is_a_conversation_is_told(tmp_path):
    path = tmp_path / "file"
    for content, reason in (
        (b"<html><script>var jsonData = [", "FILE:1: line: not JSON"),
        (b"hi\nthere", "FILE:1: line: not JSON"),
        (b"[[], 1]", "conversation 1: row: not a JSON object"),
    ):  # fmt: skip
        path.write_bytes(content)
        (line,) = refusal("chatgpt", path)
        assert line.startswith("FILE: no such conversation") and reason in line
    for names in ([], ["chat.html"], ["export.zip"]):
        with zipfile.ZipFile(path, "w") as archive:
            [archive.writestr(name, "x") for name in names]
        (line,) = refusal("chatgpt", path)
        assert line.startswith("FILE: an archive without a .json or .jsonl file; chatgpt is ")


def test_a_faulty_conversation_is_passed_over_and_named(tmp_path, capsys):
    rows = [
        SECRET,
        None,
        chatgpt(conversation_id=None, id=None),
        chatgpt(conversation_id=" "),
        chatgpt(mapping=[]),
        chatgpt(mapping=None),
    ]
    named, made = passed_over(capsys, "chatgpt", write(tmp_path / "a.json", [*rows, chatgpt()]))
    places = ["row", "row", "conversation_id", "conversation_id", "mapping", "mapping"]
    assert named == [f"FILE: conversation {n}: {key}" for n, key in enumerate(places, 1)]
    assert made.endswith("1 sessions (2 messages) written to OUT"
                         "; 6 conversations that cannot be read left out")  # fmt: skip
    (tmp_path / "users.jsonl").unlink()
    lines = refusal("chatgpt", write(tmp_path / "a.json", rows))  # nothing is left
    assert [line.rsplit(": ", 1)[0] for line in lines] == named


LISTS = {"claude": "chat_messages", "huggingchat": "messages", "sharegpt": "conversations"}


def spoiled(kind: str, *change) -> dict:
    """A conversation, before whose first message stands it again with a (key, value), or null."""
    row = ROWS[kind]()
    if kind == "openwebui":
        row = openwebui(chat={"messages": [*row["chat"]["history"]["messages"].values()]})
    messages = (row.get("chat") or row)[LISTS.get(kind, "conversation")
                                        if kind != "openwebui" else "messages"]  # fmt: skip
    if change:
        key, value = change
        messages.insert(0, messages[0] | {key: value} if key else None)
    return row


@pytest.mark.parametrize("kind, key, place", [
    ("claude", "sender", "chat_messages.0.sender"), ("claude", None, "chat_messages.0"),
    ("openwebui", "role", "messages.0.role"), ("openwebui", None, "messages.0"),
    ("sharegpt", "from", "conversations.0.from"), ("lmsys", "role", "conversation.0.role"),
    ("wildchat", "role", "conversation.0.role"), ("huggingchat", "from", "messages.0.from"),
])  # fmt: skip
def test_a_message_that_cannot_be_read_costs_nothing_else(tmp_path, capsys, kind, key, place):
    (whole,), _ = imported(kind, write(tmp_path / "a.json", [spoiled(kind)]))
    path = write(tmp_path / "a.json", [spoiled(kind, key, None)])
    named, made = passed_over(capsys, kind, path)
    assert named == [f"FILE: conversation 1: {place}"]
    assert made.endswith("; 1 messages that cannot be read passed over")
    assert data.read_users(tmp_path / "users.jsonl") == [whole]


@pytest.mark.parametrize("kind, key, value", [
    ("openwebui", "parentId", 7), ("huggingchat", "id", 2), ("sharegpt", "value", [SECRET, {}]),
])  # fmt: skip
def test_what_is_not_needed_or_can_be_read_is_no_fault(tmp_path, capsys, kind, key, value):
    path = write(tmp_path / "a.json", [spoiled(kind, key, value)])
    assert passed_over(capsys, kind, path)[0] == []


@pytest.mark.parametrize("change", [
    None, {"author": {"role": None}}, {"author": {}}, {"content": "Be kind."},
    {"recipient": ["all"]}, {"create_time": {}, "author": 1},
])  # fmt: skip
def test_a_broken_node_of_a_tree_costs_nothing_else(tmp_path, capsys, change):
    talk = chatgpt()
    system = talk["mapping"]["a"]
    system["parent"] = 7
    talk["mapping"]["a"] = change and system | {"message": system["message"] | change}
    named, made = passed_over(capsys, "chatgpt", write(tmp_path / "a.json", [talk]))
    (place,) = named
    assert "1 sessions (2 messages)" in made
    assert place.startswith("FILE: conversation 1: mapping.0")


def test_faults_of_jsonl_name_their_lines_and_a_limit_holds(tmp_path, capsys):
    rows = [b"", sharegpt(), b"{", b"[1]", {"id": SECRET}]
    named, made = passed_over(capsys, "sharegpt", write(tmp_path / "rows.jsonl", rows))
    assert named == ["FILE:3: line", "FILE:4: line", "FILE:5: conversations"]
    assert made.endswith("; 3 conversations that cannot be read left out")
    path = write(tmp_path / "rows.jsonl", [sharegpt(), *[b"{"] * 30])
    named, _ = passed_over(capsys, "sharegpt", path)
    assert len(named) == 21 and named[-1] == "... and 10 more"


def test_faults_of_wildchat_and_locomo_are_named(tmp_path, capsys):
    path = write(tmp_path / "rows.parquet", [wildchat(), wildchat("h", "x" * 201)])
    assert passed_over(capsys, "wildchat", path)[0] == ["FILE: conversation 2: user_id"]
    bad = locomo()
    bad["conversation"] |= {"session_4": SECRET, "speaker_b": ""}
    bad["conversation"]["session_2"][1]["text"] = 7
    named, _ = passed_over(capsys, "locomo", write(tmp_path / "locomo10.json", [locomo(), bad]))
    assert named == [
        "FILE: conversation 2: conversation.speaker_b",
        "FILE: conversation 2: conversation.sessions.session_4",
        "FILE: conversation 2: sessions.1.text",
    ]


def test_a_zip_gives_its_conversations_and_passes_over_what_else_is_called_so(tmp_path, capsys):
    shared = {"id": "s", "conversation_id": "c9", "title": SECRET}
    lines = b"oops\n" + json.dumps(chatgpt(conversation_id="c3")).encode()
    for order in (1, -1):
        with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
            for name, content in [
                ("conversations.JSON", json.dumps([chatgpt()])),
                ("shared_conversations.json", json.dumps([shared])),
                ("conversations-2.jsonl", lines), ("conversations-3.json", "[{"),
            ][::order]:  # fmt: skip
                archive.writestr(name, content)
        named, made = passed_over(capsys, "chatgpt", tmp_path / "export.zip")
        places = ["conversations-2.jsonl:1: line", "conversations-3.json: file"]
        assert named == [f"FILE: {place}" for place in places[::order]]
        assert made.endswith("2 sessions (4 messages) written to OUT"
                             "; 2 conversations that cannot be read left out")  # fmt: skip


@pytest.mark.parametrize("order", [1, -1])
def test_what_is_called_a_conversation_and_is_none_hides_no_conversations(tmp_path, capsys, order):
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for name, content in [
            ("conversation-settings.json", '{"theme": "dark"}'),
            ("chat-export-1.json", json.dumps([chatgpt()])), ("user.json", "{}"),
            ("conversations-2.json", json.dumps([chatgpt(conversation_id="c2")])),
            ("2024.json", json.dumps([chatgpt(conversation_id="c3")])), ("._2024.json", b"\0\5"),
        ][::order]:  # fmt: skip
            archive.writestr(name, content)
    named, made = passed_over(capsys, "chatgpt", tmp_path / "export.zip")
    assert named == [] and made.endswith("3 sessions (6 messages) written to OUT")


def test_pictures_and_many_files_of_a_zip_hide_no_conversations(tmp_path):
    with zipfile.ZipFile(tmp_path / "export.zip", "w") as archive:
        for n in range(1100):
            archive.writestr(f"{n}.png", "")
            archive.writestr(f"{n}.json", json.dumps([chatgpt(conversation_id=f"c{n}")]))
    assert "1100 sessions" in imported("chatgpt", tmp_path / "export.zip")[1]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_flipped_byte_of_a_zip_is_read_over_or_told_in_one_line(tmp_path, method):
    path, out = tmp_path / "export.zip", tmp_path / "users.jsonl"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("conversations.json", json.dumps([chatgpt()]))
    whole = path.read_bytes()
    for place in range(4, len(whole), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            importers.import_users("chatgpt", [path], out)
        except data.DataError as error:
            assert len(str(error).splitlines()) == 1, place


def test_utf16_lines_are_read_and_what_cannot_be_is_told(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    for encoding in ("utf-16", "utf-16-be"):
        rows = [sharegpt(f"abc_{4 * n}", "\u2028 x") for n in range(3)]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        path.write_bytes("\n".join(lines).encode(encoding))
        assert len(imported("sharegpt", path)[0][0].sessions) == 3
    (tmp_path / "users.jsonl").unlink()
    path.write_bytes(gzip.compress(json.dumps(sharegpt()).encode()))
    (line,) = refusal("sharegpt", path)
    assert line.startswith("FILE: compressed by gzip; unpack it first")
    monkeypatch.setattr(importers, "WHOLE", 1000)
    for content in (b"[" * 1234, b"\xff\xfe[\0" + bytes(1230), b'{\n"a": [' + bytes(1226)):
        path.write_bytes(content)
        (line,) = refusal("sharegpt", path)
        assert line.startswith("FILE: 1,234 bytes; only 1,000 are read at once")
    path.write_bytes(bytes(2000))  # no UTF-16 for all its zeros, but lines, which have a limit
    assert refusal("sharegpt", path)[0].startswith("FILE: no such conversation")


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("other", ROWS)
def test_a_file_of_another_kind_is_named(tmp_path, kind, other):
    for ending in ["json", "jsonl"] + ["parquet"] * (other in ("wildchat", "lmsys")):
        path = write(tmp_path / f"rows.{ending}", [ROWS[other]()])
        if kind == other:
            assert imported(kind, path)[0]
            continue
        (tmp_path / "users.jsonl").unlink(missing_ok=True)
        (line,) = refusal(kind, path)
        assert line.startswith(f"FILE: no such conversation in it; {kind} is ")
        assert line.endswith(f"; this looks like {other}")


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "no such conversation"),
        (b"[]", "no such conversation"),
        (b"[[], 1]", "no such conversation"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"a": 1', "not JSON"),
        (b"[\xff]", "not JSON"),
        (b'[{"a": "\xff"}]', "no such conversation"),
        (b'[{"a": NaN}]', "no such conversation"),
        (b'[{"messages": [{"role": "user", "content": "x"}]}]', "no such conversation"),
        (b'{\n "a": [\n 1]}', "no such conversation"),
        (b'{"conversations": []}', "no such conversation"),
        (b"PK\x03\x04 a zip", "a zip archive that cannot be read"),
        (b"\xff\xfe\x00\xd8[", "neither UTF-8 nor UTF-16"),
        (b"PAR1 and no more", "cannot be read as parquet"),
    ],
)
def test_a_file_that_is_nothing_of_the_kind_gives_one_line(tmp_path, kind, content, reason):
    path = tmp_path / "file"
    path.write_bytes(content)
    (line,) = refusal(kind, path)
    assert line.startswith(f"FILE: {reason}")
    assert "cannot" in reason or f"; {kind} is " in line


def test_missing_files_folders_and_silent_files_are_refused(tmp_path):
    for path in (tmp_path / "absent.json", tmp_path):
        assert len(refusal("chatgpt", path)) == 1
    path = write(tmp_path / "conversations.json", [chatgpt(mapping={})])
    assert refusal("chatgpt", path) == ["FILE: no conversation with a user's words in it"]


def places(value, path=()):
    """Paths to every value inside a row."""
    yield path
    inside = enumerate(value) if isinstance(value, list) else ()
    for key, inner in value.items() if isinstance(value, dict) else inside:
        yield from places(inner, (*path, key))


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(
        [10**400, -(10**20), 1e308, -1e308, "\ud800", "", "e", "root", "user", "text"]
    )
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(list(ROWS)))
def test_any_value_at_any_place_is_taken_or_refused(tmp_path_factory, draws, kind):
    path = tmp_path_factory.mktemp("any") / draws.draw(st.sampled_from(["rows.json", "rows.jsonl"]))
    row = copy.deepcopy(ROWS[kind]())
    for place in draws.draw(st.lists(st.sampled_from(list(places(row))), min_size=1, max_size=3)):
        value = draws.draw(anything)
        if not place:
            row = value
            continue
        target = row
        try:
            for key in place[:-1]:
                target = target[key]
            target[place[-1]] = value
        except (TypeError, KeyError, IndexError):
            pass  # an earlier change took the place away
    write(path, [row, ROWS[kind]()])
    try:
        users, _ = imported(kind, path)
    except data.DataError as error:
        assert all(str(path) in line for line in str(error).splitlines())
    else:
        assert users and all(s.messages for u in users for s in u.sessions)


# ------------------------------------------------------------------------------------ the command


def run(*words) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tools.logs", *words], cwd=ROOT, capture_output=True, text=True,
        timeout=60,
    )


def test_the_command_imports_and_check_describes_what_it_wrote(tmp_path):
    path, out = write(tmp_path / "conversations.json", [chatgpt()]), tmp_path / "users.jsonl"
    done = run("import", "chatgpt", path, "--out", out, "--user", "u17")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == f"1 users, 1 sessions (2 messages) written to {out}\n"
    row = json.loads(out.read_text())
    assert row["user_id"] == "u17"
    assert row["sessions"][0].keys() == {"session_id", "timestamp", "messages"}
    done = run("check", out)
    figures = dict(line.split(":", 1) for line in done.stdout.splitlines())
    assert figures["sessions without a summary"].strip() == "1"
    for label in ("exact repeats within a user", "languages", "characters per summary"):
        assert figures[label].strip() == "none"


def test_the_command_refuses_with_exit_code_2(tmp_path):
    path = write(tmp_path / "sharegpt.json", [sharegpt()])
    done = run("import", "chatgpt", path, "--out", tmp_path / "users.jsonl")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: {path}: no such conversation in it; chatgpt is a JSON array of conversations"
        " with mapping; this looks like sharegpt\n"
    )
    assert list(tmp_path.iterdir()) == [path]
