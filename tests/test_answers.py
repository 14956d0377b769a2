"""The chat model behind the page's composer: its answer is streamed, bounded, and never logged."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_chat import KEY, SECRET
from test_chat import serve as stub  # noqa: F401 (a fixture)
from test_serve import events_of, running, wait_for

from config import EndpointConfig
from files import UserError
from serving.answers import CHARACTERS, Answers

TURNS = [{"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."},
         {"role": "user", "content": SECRET}]


def chunk(content) -> bytes:
    choices = [{"index": 0, "delta": {"content": content}, "finish_reason": None}]
    body = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": "m"}
    return f"data: {json.dumps({**body, 'choices': choices})}\n\n".encode()


def as_stream(*parts: bytes):
    return 200, {"Content-Type": "text/event-stream"}, b"".join([*parts, b"data: [DONE]\n\n"])


def name_model(server, url: str, **settings):
    settings = {"timeout": 60.0, "max_tokens": 100} | settings  # a machine may be busy
    server.app.state.answers = Answers(EndpointConfig(base_url=url, model="m", **settings))


def answered(server, turns=TURNS, status=200):
    reply = server.client.post("/v1/answers", json={"turns": turns})
    assert reply.status_code == status, reply.text
    return reply


@pytest.fixture
def server(tmp_path):
    with running(tmp_path) as server:
        yield server


def test_without_a_chat_model_it_is_said(server):
    assert "endpoint.model" in answered(server, status=404).json()["detail"]
    assert server.client.get("/v1/model").json()["chat"] is None
    with pytest.raises(UserError, match=r"endpoint\.base_url"):
        Answers(EndpointConfig(base_url="no address", model="m"))


def test_an_answer_comes_in_parts_and_nothing_of_it_is_kept(server, stub, caplog):  # noqa: F811
    said = ["Two ", "", None, 7, "lines\n\nof 茶 \ud800"]
    model = stub(lambda body: as_stream(*map(chunk, said)))
    name_model(server, model.url)
    assert server.client.get("/v1/model").json()["chat"] == "m"
    assert events_of(answered(server).text) == [
        ("text", {"text": "Two "}), ("text", {"text": "lines\n\nof 茶 ?"}), ("done", {})]
    assert model.bodies == [{"model": "m", "stream": True, "messages": TURNS}]
    assert SECRET not in caplog.text and "lines" not in caplog.text
    assert answered(server).headers["X-Accel-Buffering"] == "no"


def test_content_in_parts_is_text(server, stub):  # noqa: F811
    thought = [{"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}]
    parts = [{"type": "text", "text": "Oo"}, {"type": "text", "text": "long"}]
    name_model(server, stub(lambda body: as_stream(chunk(thought), chunk(parts))).url)
    assert events_of(answered(server).text) == [("text", {"text": "Oolong"}), ("done", {})]


def test_a_model_without_a_system_role_hears_its_text_from_the_user(server, stub):  # noqa: F811
    refusal = 400, {}, b'{"message": "Only user and assistant roles are supported!"}'
    model = stub(lambda body: refusal if body["messages"][0]["role"] == "system"
                 else as_stream(chunk("Oolong")))
    name_model(server, model.url)
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    for asked in (2, 3):  # it is tried once
        assert events_of(answered(server, turns).text)[0] == ("text", {"text": "Oolong"})
        assert len(model.bodies) == asked
        said = {"role": "user", "content": "Be brief.\n\nTea?"}
        assert model.bodies[-1]["messages"] == [said, *TURNS[1:]]


@pytest.mark.parametrize("reply, reason", [
    ((401, {}, SECRET.encode()), "status 401"), ((500, {}, SECRET.encode()), "status 500"),
    ((429, {}, b"{}"), "status 429"), (as_stream(), "its answer is empty"),
    (as_stream(chunk([])), "its answer is empty"), (as_stream(b"data: {\n\n"), "cannot be read"),
    (as_stream(b'data: {"choices": [7]}\n\n'), "cannot be read"),
    ((200, {"Content-Type": "text/event-stream", "Content-Length": 999}, chunk("half")),
     "the connection failed")])
def test_a_failure_is_told_in_one_line_without_what_the_model_sent(
    server, stub, caplog, reply, reason):  # noqa: F811
    model = stub(lambda body: reply)
    name_model(server, model.url)
    *_, (name, data) = events_of(answered(server).text)
    assert name == "error" and reason in data["detail"]
    assert data["detail"].startswith("the chat model gave no whole answer: ")
    assert len(model.bodies) == 1  # somebody waits: it is not tried again
    assert SECRET not in data["detail"] + caplog.text
    assert server.app.state.answers.places.acquire(blocking=False)  # the place is free again


def test_no_server_is_told(server):
    name_model(server, "http://127.0.0.1:9/v1")
    assert "the connection failed" in answered(server).text


class Drip(BaseHTTPRequestHandler):
    """A word each 20 ms, without end."""

    def do_POST(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            while not self.server.full.is_set():
                self.wfile.write(chunk("word "))
                time.sleep(0.02)
        except OSError:
            self.server.left.set()

    def log_message(self, *_):
        pass


@pytest.fixture
def drip(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Drip)
    server.left, server.full, server.daemon_threads = threading.Event(), threading.Event(), True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.full.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("limit, last", [({"timeout": 0.5}, "error"), ({"max_tokens": 4}, "done")])
def test_an_endless_answer_is_ended(server, drip, limit, last):
    name_model(server, drip.url, **limit)
    events = events_of(answered(server).text)
    assert events[-1][0] == last
    if last == "done":
        assert len("".join(data["text"] for _, data in events[:-1])) == 4 * CHARACTERS
    assert drip.left.wait(20)  # the endpoint is not left to write on


def test_places_are_few_and_free_when_a_client_leaves(server, drip):
    name_model(server, drip.url, concurrency=1, max_tokens=100_000)
    with server.client.stream("POST", "/v1/answers", json={"turns": TURNS}) as reply:
        next(reply.iter_text())
        assert answered(server, status=429).headers["Retry-After"]
    assert drip.left.wait(20)
    wait_for(lambda: server.app.state.answers.places.acquire(blocking=False))


@pytest.mark.parametrize("turns", [[], [{"role": "assistant", "content": "Hi"}],
                                   [*TURNS, {"role": "system", "content": "x"}]])
def test_a_conversation_has_a_user_and_ends_with_somebody(server, turns):
    answered(server, turns, status=422)
