"""examples/chainlit_app.py against real servers, with a stand-in for Chainlit's own calls."""

import asyncio
import runpy
import sys
from types import SimpleNamespace

import pytest
from test_serve import FakeEngine, put, running
from test_suggest import FakeSuggestions

from files import ROOT

APP = ROOT / "examples" / "chainlit_app.py"
LONG = "A week in Kyoto with two children who would rather be at home"


class Message:
    def __init__(self, content, type="assistant_message"):  # noqa: A002
        self.content, self.type, self.id = content, type, "m1"

    async def stream_token(self, token):
        self.content += token

    async def send(self):
        chainlit.said.append(self)
        return self


class Action(SimpleNamespace):
    def __init__(self, name, payload, label):
        super().__init__(name=name, payload=payload, label=label)

    async def send(self, for_id):
        chainlit.actions.append(self)


def same(function):
    return function


async def answer(**asked):
    async def parts():
        for text in ("An ", None, "answer."):
            yield SimpleNamespace(choices=[SimpleNamespace(delta=SimpleNamespace(content=text))])

    return parts()


ALICE = SimpleNamespace(identifier="alice")
chainlit = SimpleNamespace(
    password_auth_callback=same, set_starters=same, on_message=same, said=[], actions=[],
    action_callback=lambda name: same, Starter=SimpleNamespace, User=SimpleNamespace,
    Message=Message, Action=Action, user_session=SimpleNamespace(get=lambda name: ALICE),
    chat_context=SimpleNamespace(to_openai=lambda: [
        {"role": m.type.split("_")[0], "content": m.content} for m in chainlit.said]))
completions = SimpleNamespace(completions=SimpleNamespace(create=answer))
openai = SimpleNamespace(AsyncOpenAI=lambda: SimpleNamespace(chat=completions))


@pytest.fixture
def servers(tmp_path, monkeypatch):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    with (running(folders[0], FakeEngine(most=3)) as starters,
          running(folders[1], FakeSuggestions()) as suggestions):
        monkeypatch.setitem(sys.modules, "chainlit", chainlit)
        monkeypatch.setitem(sys.modules, "openai", openai)
        monkeypatch.setenv("ICEBREAKER_STARTERS", f"http://127.0.0.1:{starters.port}")
        monkeypatch.setenv("ICEBREAKER_SUGGESTIONS", f"http://127.0.0.1:{suggestions.port}")
        monkeypatch.setenv("DEMO_PASSWORD", "demo")
        yield starters, suggestions


def test_a_chat_from_starters_to_a_tapped_follow_up(servers):
    starters, suggestions = servers
    put(starters, "alice", LONG)
    app = runpy.run_path(str(APP))
    assert app["login"]("alice", "demo") == ALICE and app["login"]("alice", "other") is None

    async def chat():
        shown = await app["set_starters"](ALICE, "zh-CN")
        again = await app["set_starters"](ALICE, "zh-CN")
        newcomer = await app["set_starters"](SimpleNamespace(identifier="bob"), "zh-CN")
        await app["answer"](await Message(shown[1].message, type="user_message").send())
        await app["follow"](chainlit.actions[0])
        return shown, again, newcomer

    shown, again, newcomer = asyncio.run(chat())
    assert [s.message for s in shown] == [f"{LONG}: question {k}" for k in (1, 2, 3)]
    assert shown[0].label == LONG[:60] and shown == again  # a reload takes no other list
    assert newcomer and not {s.message for s in newcomer} & {s.message for s in shown}
    assert [row.clicked for row in starters.store.taps.shown("alice")] == [[1]]
    first, tapped = chainlit.actions[0].label, chainlit.said[2]
    assert (tapped.content, tapped.type) == (first, "user_message")
    assert [m.content for m in chainlit.said[1::2]] == ["An answer."] * 2
    assert [row.clicked for row in suggestions.store.taps.shown("alice")] == [[0], []]


def test_a_server_that_is_down_leaves_the_chat_without_starters(servers, monkeypatch, capsys):
    monkeypatch.setenv("ICEBREAKER_STARTERS", "http://127.0.0.1:9")
    app = runpy.run_path(str(APP))
    assert asyncio.run(app["set_starters"](ALICE, "en")) == []
    assert "ConnectError" in capsys.readouterr().out


def test_the_example_stays_short():
    assert len(APP.read_text(encoding="utf-8").splitlines()) <= 60
