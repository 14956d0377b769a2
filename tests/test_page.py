"""The page (web/) in headless Chromium, against a server that answers from canned data.

    pytest tests/test_page.py          # SHOTS=folder keeps screenshots
"""

import contextlib
import json
import os
import queue
import re
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from fastapi.staticfiles import StaticFiles
from playwright.sync_api import expect, sync_playwright
from test_serve import FakeEngine, wait_for
from test_serve import running as real_server

from data import Session
from serving import front

expect.set_options(timeout=30_000)  # milliseconds
NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    not BROWSER, reason=f"none of {', '.join(NAMES)} is on the PATH")

WEB = Path(__file__).parent.parent / "serving" / "web"
POLICY = front.POLICY.decode()
SUBJECTS = ["A short guide to Denali", "了解铁观音的冲泡方法", "Where to start with Netrunner",
            "Discussing Cortado in detail", "unit conversion: light-years", "Jasper Alberta"]
TEXTS = ["Is Denali harder than Mont Blanc?", "铁观音和龙井有什么不同？", "Netrunner decks for two",
         "How does a Cortado differ from a flat white?", "Quiz me on the Rocky Mountains",
         "Best season for Jasper?", "Who first climbed Denali?", "星球大战的观看顺序",
         "Board games like Netrunner", "A week in Banff"]

PWN = "window.__pwned=1"
ATTACKS = [
    f"<script>{PWN}</script>",
    f"<img src=x onerror={PWN}>",
    f"<svg onload={PWN}>",
    f"<svg><script>{PWN}</script></svg>",
    f"<svg><animate onbegin={PWN} attributeName=x dur=1s>",
    f"<body onload={PWN}>",
    "<iframe srcdoc='<script>parent.__pwned=1</script>'></iframe>",
    "<iframe src='javascript:parent.__pwned=1'></iframe>",
    f"<a href='javascript:{PWN}'>tap</a>",
    f"javascript:{PWN}",
    f"data:text/html,<script>{PWN}</script>",
    f"\" onmouseover=\"{PWN}\" x=\"",
    f"' autofocus onfocus='{PWN}' x='",
    f"\"><script>{PWN}</script>",
    f"</textarea><script>{PWN}</script>",
    f"</script><script>{PWN}</script>",
    f"</title></style><img src=x onerror={PWN}>",
    f"<input autofocus onfocus={PWN}>",
    f"<details open ontoggle={PWN}>",
    "<link rel=stylesheet href=https://evil.example/x.css>",
    "<img src=https://evil.example/leak.png>",
    "<meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<form action=https://evil.example/><button>Refresh</button></form>",
    f"<math><mi xlink:href='javascript:{PWN}'>x</mi></math>",
    "{{constructor.constructor('" + PWN + "')()}}",
    "${" + PWN + "}",
    f"`;{PWN};//",
    f"&lt;script&gt;{PWN}&lt;/script&gt;",
    f"\\u003cscript\\u003e{PWN}\\u003c/script\\u003e",
    f"\u202e<ſcript>{PWN}</ſcript>\u2066 \ufeff＜script＞",
    f"event: done data: {{}} <x onclick={PWN} style=animation-name:appear onanimationstart={PWN}>",
]


# ------------------------------------------------------------------------------- a canned server


def canned() -> SimpleNamespace:
    """What the server answers with, and what it was asked."""
    session = [{"session_id": f"s{i}", "timestamp": "2026-05-01T09:00:00", "summary": text}
               for i, text in enumerate(SUBJECTS)]
    scores = [0.91, 0.87, 0.79, 0.82, 0.42, -0.1]
    return SimpleNamespace(
        examples=[{"user_id": "u0", "profile": {"age": "55+", "region": "GB"}, "sessions": session},
                  {"user_id": "u7", "profile": None, "sessions": session[:2]}],
        interests=[{"text": t, "score": s, "kept": s in scores[:3]}
                   for t, s in zip(SUBJECTS, scores, strict=True)],
        texts=TEXTS, threshold=0.81, source="generated", model="round3-1a2b3c4d", lists=0,
        methods=["PE", "SFT", "IceBreaker"], task="starters", reason=None,
        chat=None,  # name of the chat model; its answer: a text, or None for an error
        answer="Two lines:\n\nfirst this, then that.",
        rates=[{"method": "IceBreaker", "users": 51, "lists": 140, "lists_tapped": 70,
                "starters": 700, "taps": 93, "rate": 0.133, "low": 0.109, "high": 0.158},
               {"method": "SFT", "users": 49, "lists": 96, "lists_tapped": 40, "starters": 480,
                "taps": 41, "rate": 0.085, "low": 0.061, "high": 0.112},
               {"method": "PE", "users": 1, "lists": 1, "lists_tapped": 0, "starters": 5,
                "taps": 0, "rate": 0.0, "low": 0.0, "high": 0.79}],
        hold=None,  # an event: the examples wait for it
        step=None,  # a queue: each starter waits for a word in it
        refuse={},  # path -> (status, headers, body)
        asked=[],  # (method, path, body)
    )


def canned_app(server) -> FastAPI:
    app = FastAPI()
    app.mount("/web", StaticFiles(directory=WEB))

    @app.middleware("http")
    async def note(request: Request, call_next):
        path, body = request.url.path, await request.body()
        if path.startswith("/v1"):
            server.asked.append((request.method, path, json.loads(body) if body else None))
        if path in server.refuse:
            status, headers, content = server.refuse[path]
            return JSONResponse(content, status, headers)
        reply = await call_next(request)
        reply.headers["Content-Security-Policy"] = POLICY
        return reply

    @app.get("/")
    def page():
        return FileResponse(WEB / "index.html")

    @app.post("/v1/starters")
    def starters(ask: dict):
        reply = answer(server, ask)
        if ask.get("stream"):
            return StreamingResponse(stream(server, reply), media_type="text/event-stream")
        return reply

    @app.get("/v1/examples")
    def examples():
        if server.hold:
            server.hold.wait(20)
        return server.examples

    app.get("/v1/model")(lambda: {"model": server.model, "methods": server.methods,
                                  "task": server.task, "chat": server.chat})

    @app.post("/v1/answers")
    def answers(ask: dict):
        def parts():
            for part in re.findall(r"(?s).{1,7}", server.answer or "Half an"):
                yield event("text", {"text": part})
            yield event(*(("error", {"detail": "the chat model gave no whole answer"})
                          if server.answer is None else ("done", {})))
        return StreamingResponse(parts(), media_type="text/event-stream")

    @app.post("/v1/suggestions")
    def suggestions(ask: dict):
        query = ask["turns"][-1]["content"]
        declined = "bomb" in query
        texts = [] if declined else [f"{query} ({i})" for i in range(3)]
        return {"suggestions": [{"slot": i, "text": text, "reward": 0.5, "uncertainty": 0.25,
                                 "source": "policy"} for i, text in enumerate(texts)],
                "declined": declined, "method": "gaussian", "cut": max(0, len(ask["turns"]) - 2),
                "impression_id": None if declined else f"impression-{len(ask['turns'])}"}

    app.get("/v1/ab")(lambda: server.rates)
    app.post("/v1/events")(lambda: {"recorded": 1})
    app.put("/v1/users/{user_id}/sessions")(lambda user_id: {"user_id": user_id, "sessions": 1})
    app.delete("/v1/users/{user_id}")(lambda: {"removed": {"sessions": 1}})
    return app


def answer(server, ask: dict) -> dict:
    server.lists += bool(ask.get("refresh"))
    known = not ask.get("profile")
    texts = server.texts[5:] if server.lists % 2 else server.texts[:5]
    if len(server.texts) > 10:
        texts = server.texts  # the attacks, all at once
    interest = (lambda i: server.interests[i % 4]["text"]) if known else (lambda i: None)
    return {
        "request_id": "r1", "model": server.model,
        "impression_id": f"impression-{server.lists}" if texts else None,
        "method": ask.get("method") or "IceBreaker",
        "threshold": server.threshold if known else None,
        "interests": server.interests if known else [],
        "starters": [{"slot": i, "text": t, "utility": 0.5 - i / 100, "interest": interest(i),
                      "source": server.source if known else "cold start"}
                     for i, t in enumerate(texts)],
        "reason": server.reason,
    }


def event(name: str, data: dict) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def stream(server, reply: dict):
    """Server-sent events; with a comment, and cut in the middle of a character and of a line."""
    yield b": hello\n\n"
    yield event("interests", {k: reply[k] for k in ("threshold", "interests")})
    for starter in reply["starters"]:
        if server.step:
            server.step.get(timeout=20)
        data = event("starter", starter)
        cut = next((i for i, byte in enumerate(data) if byte > 127), len(data) // 2) + 1
        yield data[:cut]
        yield data[cut:]
    if server.step and server.step.get(timeout=20) == "break":
        yield event("error", {"detail": "timed out after 30 s"})
        return
    yield event("done", reply)


# -------------------------------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def running():
    """The server in a thread: its canned data (a fresh one for each test), and its address."""
    server = canned()
    config = uvicorn.Config(canned_app(server), port=0, log_level="warning", lifespan="off")
    uv = uvicorn.Server(config)
    thread = threading.Thread(target=uv.run)
    thread.start()
    while not uv.started:
        time.sleep(0.01)
    port = uv.servers[0].sockets[0].getsockname()[1]
    yield server, f"http://127.0.0.1:{port}"
    uv.should_exit = uv.force_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def server(running):
    running[0].__dict__.update(canned().__dict__)
    return running[0]


@contextlib.contextmanager
def opened(browser, url, **options):
    """The page, loaded; an error if anything was loaded from elsewhere, or went wrong in it."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900},
                                     "reduced_motion": "reduce", **options})
    page = context.new_page()
    page.set_default_timeout(60_000)  # a machine may be busy
    trouble = []
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("dialog", lambda dialog: (trouble.append("dialog"), dialog.dismiss()))
    page.on("request", lambda r: r.url.startswith(url) or trouble.append(r.url))
    page.on("console", lambda m: "Content Security" in m.text and trouble.append(m.text))
    page.goto(url)
    expect(page.locator("#model")).to_contain_text("Model")
    yield page
    context.close()
    assert not trouble


@pytest.fixture
def page(browser, server, running, request):
    """Loaded, with the first person's starters shown and reported."""
    with opened(browser, running[1], **getattr(request, "param", {})) as page:
        sent(server, 1)
        yield page


def starters(page):
    return page.locator("#starters .tap")


def choose(page, user: str):
    """Another example person, whose starters come by themselves."""
    with page.expect_response("**/v1/events"):
        page.get_by_label("Example person").select_option(user)
    expect(page.locator("#status")).to_contain_text("by IceBreaker")


def reload(page, server):
    """The page anew, with what `server` says now."""
    server.asked.clear()
    page.reload()
    expect(page.locator("#model")).to_contain_text("Model")


def details(page):
    page.locator("#details > summary").click()


def paste(page, lines: str, profile: str = ""):
    page.get_by_text("Paste a history").click()
    page.get_by_label("Past sessions").fill(lines)
    page.get_by_label("Profile").fill(profile)
    with page.expect_response("**/v1/events"):
        page.locator("#own-form .primary").click()
    expect(page.locator("#status")).to_contain_text("by IceBreaker")


def asked(server, path: str, method: str = "POST") -> list:
    return [b for m, p, b in server.asked if (m, p) == (method, path)]


def shot(page, name: str):
    if "SHOTS" in os.environ:
        page.screenshot(path=Path(os.environ["SHOTS"]) / f"{name}.png", full_page=True)


def everything(page):
    """Every part of the page filled in."""
    expect(starters(page)).to_have_count(5)
    starters(page).nth(1).click()
    page.get_by_role("button", name="Send").click()
    details(page)
    page.locator("#compare").click()
    expect(page.locator("#columns li")).to_have_count(15)


def sent(server, count: int) -> list:
    """All events, once there are so many."""
    wait_for(lambda: len(asked(server, "/v1/events")) >= count)
    return asked(server, "/v1/events")


# ----------------------------------------------------------------------------------------- tests


def test_starters_come_on_load_first_on_the_page_and_say_whose_they_are(page, server):
    expect(page).to_have_title("IceBreaker · conversation starters")
    expect(page.locator("#example option")).to_have_text(["u0 · 6 sessions", "u7 · 2 sessions"])
    expect(starters(page)).to_have_text(TEXTS[:5])
    expect(page.locator("#starters-title")).to_have_text("Starters for u0")
    tops = [page.locator(part).bounding_box()["y"] for part in ("#starters", "#say", "#details")]
    assert tops == sorted(tops) and tops[0] < 250
    expect(page.locator("#interests")).to_be_hidden()  # behind Details
    choose(page, "u7 · 2 sessions")
    expect(page.locator("#starters-title")).to_have_text("Starters for u7")
    assert [ask["user_id"] for ask in asked(server, "/v1/starters")] == ["u0", "u7"]


@pytest.mark.parametrize("page", [{"viewport": {"width": 320, "height": 640}},
                                  {"viewport": {"width": 390, "height": 844}}], indirect=True)
def test_on_a_phone_the_starters_are_first_too(page):
    expect(starters(page)).to_have_count(5)
    boxes = [starters(page).nth(i).bounding_box() for i in range(5)]
    seen = sum(box["y"] + box["height"] <= page.viewport_size["height"] for box in boxes)
    assert seen >= (3 if page.viewport_size["width"] == 320 else 5)
    assert page.locator("#person").bounding_box()["y"] > boxes[-1]["y"]


def test_an_example_has_its_history_and_profile(page):
    expect(page.locator("#example-profile")).to_have_text("age: 55+, region: GB")
    page.get_by_text("History, latest first").click()
    expect(page.locator("#history-list li")).to_have_text(SUBJECTS[::-1])
    choose(page, "u7 · 2 sessions")
    expect(page.locator("#history-list li")).to_have_count(2)


def test_details_tell_gate_and_ranker_in_words(page):
    details(page)
    rows = page.locator("#interests li")
    expect(rows.locator(".subject")).to_have_text(SUBJECTS)
    likely, less = "likely to return", "less likely to return"
    expect(rows.locator(".verdict")).to_have_text(
        [f"✓ brought up, {likely}"] * 2 + [f"✓ brought up, {less}", f"– left out, {likely}"]
        + [f"– left out, {less}"] * 2)
    expect(page.locator("#gate-text")).to_contain_text("3 subjects of 6.")
    expect(page.locator("#expected li").first).to_have_text(
        f"{TEXTS[0]}a tap in about 2 showings")
    assert not re.search(r"\d\.\d", page.locator("#details").inner_text().split("A/B test")[0])


def test_a_run_without_a_ranker_expects_nothing(page, server):
    server.model = "sit"
    reload(page, server)
    details(page)
    expect(page.locator("#expected li").first).to_have_text(f"{TEXTS[0]}this run has no ranker")


def test_starters_appear_one_after_another_and_are_shown_once(page, server):
    server.step = queue.Queue()
    reload(page, server)
    expect(page.locator("#interests li")).to_have_count(6)  # before the first starter
    for i in range(5):
        expect(starters(page)).to_have_text(TEXTS[:i])
        server.step.put("next")
    expect(starters(page)).to_have_text(TEXTS[:5])
    expect(page.locator("#status")).to_have_text("Writing starters …")
    assert not asked(server, "/v1/events")  # the list is not complete
    starters(page).nth(2).click()  # its impression id is not known yet
    with page.expect_response("**/v1/events"):
        server.step.put("done")
    expect(page.locator("#status")).to_have_text("5 starters by IceBreaker.")
    assert asked(server, "/v1/events") == [{"events": [
        {"impression_id": "impression-0", "type": "shown"},
        {"impression_id": "impression-0", "type": "tap", "slot": 2}]}]
    expect(page.locator("#starters")).to_have_attribute("aria-live", "polite")
    assert asked(server, "/v1/starters") == [
        {"user_id": "u0", "profile": None, "refresh": False, "stream": True}]


def test_a_tap_fills_the_composer_whose_text_can_be_changed(page, server):
    with page.expect_response("**/v1/events"):
        starters(page).nth(1).click()
    expect(page.get_by_label("Message")).to_have_value(TEXTS[1])
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.locator("#chat .bubble")).to_have_count(0)  # nothing is sent yet
    assert sent(server, 2)[1] == {
        "events": [{"impression_id": "impression-0", "type": "tap", "slot": 1}]}
    starters(page).nth(0).click()
    expect(page.locator("[aria-pressed=true]")).to_have_text(TEXTS[0])
    page.get_by_label("Message").press("End")
    page.keyboard.type(" 了解一下")
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#chat .bubble")).to_have_text(f"{TEXTS[0]} 了解一下")
    expect(page.locator("#chat .bubble")).to_have_attribute("lang", "zh")
    expect(page.get_by_label("Message")).to_have_value("")
    # Without a chat model the page says so, once.
    say(page, "Hello?")
    expect(page.locator("#chat .note")).to_have_text(
        ["Nothing answers: this server has no chat model (endpoint.model)."])
    expect(page.locator("#say-help")).to_contain_text("Nothing will answer")
    assert not asked(server, "/v1/answers")
    choose(page, "u7 · 2 sessions")  # nor does the conversation stay beside another person
    expect(page.locator("#chat")).to_be_empty()


def test_a_chat_model_answers_and_hears_the_whole_conversation(page, server):
    server.chat = "some-model"
    reload(page, server)
    expect(page.locator("#say-help")).to_contain_text("some-model answers")
    for text in ("Tea?", "And oolong?"):
        say(page, text)
        expect(page.locator("#chat > :last-child")).to_have_text(server.answer)
        expect(page.locator("#chat")).not_to_have_attribute("aria-busy", "true")
    assert asked(server, "/v1/answers")[-1]["turns"] == [
        {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": server.answer},
        {"role": "user", "content": "And oolong?"}]
    server.answer = None  # it breaks off: told, and what was said stays
    say(page, "More")
    expect(page.get_by_role("alert")).to_have_text("the chat model gave no whole answer")
    expect(page.locator("#chat > :last-child")).to_have_text("Half an")
    for attack in ATTACKS:
        server.answer = attack
        say(page, "x")
        expect(page.locator("#chat > :last-child")).to_have_text(attack)
    assert page.evaluate("window.__pwned") is None


def test_each_starter_has_one_reason_that_holds(page, server):
    reasons = page.locator("#starters .because")
    expect(reasons).to_have_count(5)
    expect(reasons.nth(0)).to_have_text(f"Because you asked about “{SUBJECTS[0]}”")
    expect(reasons.nth(1)).to_have_text(f"因为你问过“{SUBJECTS[1]}”")  # in the starter's language
    expect(reasons.nth(1)).to_have_attribute("lang", "zh")
    server.interests = [i | {"text": None} for i in server.interests[:4]]  # it names none
    reload(page, server)
    expect(reasons.nth(0)).to_have_text(
        "Because of your past subjects together; no single one of them")
    server.interests = [i | {"kept": False} for i in server.interests]  # nothing fit
    reload(page, server)
    expect(reasons.nth(0)).to_have_text(
        "Because there is no history to bring up yet, and it is popular with others")


def test_refresh_asks_anew_and_stops_the_list_before(page, server):
    server.step = queue.Queue()
    reload(page, server)
    expect(page.locator("#interests li")).to_have_count(6)
    with page.expect_event("requestfailed"):  # the stream before is given up
        page.locator("#refresh").click()
    with page.expect_response("**/v1/events"):
        for _ in range(12):
            server.step.put("next")
    expect(page.locator("#status")).to_contain_text("5 starters")
    expect(starters(page)).to_have_text(TEXTS[5:])
    expect(page.locator("#problem")).to_be_hidden()
    assert [ask["refresh"] for ask in asked(server, "/v1/starters")] == [False, True]
    assert [e["events"][0]["impression_id"] for e in asked(server, "/v1/events")] == [
        "impression-1"]


def test_fewer_than_five_and_none_are_answers(page, server):
    server.texts = TEXTS[:1]
    reload(page, server)
    expect(page.locator("#status")).to_have_text("1 starter by IceBreaker.")
    assert len(sent(server, 1)) == 1
    server.texts, server.reason = [], "nothing new was good enough"
    page.locator("#refresh").click()
    expect(page.locator("#status")).to_have_text("No starter: nothing new was good enough.")
    expect(starters(page)).to_have_count(0)
    details(page)
    page.locator("#compare").click()
    expect(page.locator("#columns p").first).to_contain_text("nothing new was good enough")
    assert len(asked(server, "/v1/events")) == 1


def test_compare_puts_the_methods_side_by_side(page, server):
    before = len(sent(server, 1))
    details(page)
    page.locator("#compare").click()
    expect(page.locator("#columns h4")).to_have_text(["PE", "SFT", "IceBreaker"])
    expect(page.locator("#columns li")).to_have_count(15)
    boxes = [column.bounding_box() for column in page.locator("#columns article").all()]
    assert len({box["y"] for box in boxes}) == 1 and len({box["x"] for box in boxes}) == 3
    asks = asked(server, "/v1/starters")[1:]
    assert sorted(ask["method"] for ask in asks) == ["IceBreaker", "PE", "SFT"]
    assert all(ask["user_id"] == "u0" and not ask.get("stream") for ask in asks)
    assert len(asked(server, "/v1/events")) == before  # outside the A/B test
    server.methods = ["PE", "SFT"]  # a run without stage dpo
    reload(page, server)
    details(page)
    page.locator("#compare").click()
    expect(page.locator("#columns h4")).to_have_text(["PE", "SFT"])


def test_ab_is_told_in_sentences_and_updates_when_opened(page, server):
    rows = page.locator("#rates li")
    details(page)
    expect(rows).to_have_count(3)
    expect(rows.first).to_have_text("IceBreaker: 93 of 700 shown starters were tapped, 13.3 % "
                                    "(95 % interval over 51 people: 10.9 to 15.8 %).")
    expect(rows.last).to_contain_text("over 1 person: 0.0 to 79.0 %")
    for rates, first in (([{**server.rates[0], "taps": 94}], "94 of 700"),
                         ([], "No list has been shown yet.")):
        server.rates = rates
        details(page)  # closed,
        details(page)  # and opened again
        expect(rows).to_have_count(1)
        expect(rows.first).to_contain_text(first)


def test_pasted_history_is_a_new_person_until_forgotten(page, server):
    paste(page, "Kyoto in a week\n\n  怎么做红烧肉 \n", "age: 25-34\n\nregion：SG\n")
    user = page.evaluate("localStorage.getItem('user')")
    assert re.fullmatch(r"web(-\d+){4}", user)
    assert asked(server, f"/v1/users/{user}/sessions", "PUT") == [{
        "sessions": [{"session_id": "line-1", "summary": "Kyoto in a week"},
                     {"session_id": "line-2", "summary": "怎么做红烧肉"}],
        "profile": {"age": "25-34", "region": "SG"}}]
    assert asked(server, "/v1/starters")[-1]["user_id"] == user

    paste(page, "Something else")  # another person: the one before is forgotten
    assert asked(server, f"/v1/users/{user}", "DELETE") == [None]
    other = page.evaluate("localStorage.getItem('user')")
    assert other != user
    tab = page.context.new_page()  # the name outlives its tab, and with it the button
    tab.goto(page.url)
    page.close()
    page = tab
    page.get_by_role("button", name="Forget me").click()  # whoever's starters are shown
    expect(page.locator("#forgotten")).to_contain_text("Forgotten")
    assert asked(server, f"/v1/users/{other}", "DELETE") == [None]
    assert page.evaluate("localStorage.length") == 0
    expect(page.get_by_role("button", name="Forget me")).to_be_hidden()
    expect(page.locator("[name=whose]:checked")).to_be_focused()


def test_a_history_forgotten_in_one_tab_leaves_the_others(page, server):
    paste(page, "Kyoto in a week")
    other = page.context.new_page()
    other.goto(page.url)
    other.get_by_role("button", name="Forget me").click()
    expect(other.locator("#forgotten")).to_contain_text("Forgotten")
    expect(starters(page)).to_have_count(0)
    expect(page.get_by_role("button", name="Forget me")).to_be_hidden()


def test_nothing_held_is_forgotten_too(page, server):
    page.evaluate("localStorage.setItem('user', 'web-1')")
    page.reload()
    server.refuse["/v1/users/web-1"] = (404, {}, {"detail": "nothing is held of this user"})
    page.get_by_role("button", name="Forget me").click()
    expect(page.locator("#forgotten")).to_contain_text("Forgotten")
    expect(page.locator("#problem")).to_be_hidden()
    expect(starters(page)).to_have_text(TEXTS[:5])  # the example's stay


def test_a_profile_line_that_is_none_is_named_and_nothing_is_lost(page, server):
    page.get_by_text("Paste a history").click()
    page.get_by_label("Past sessions").fill("Kyoto in a week")
    for line in ("nonsense", "age:", ": 25", " ： "):
        page.get_by_label("Profile").fill(f"region: SG\n\n{line}")
        page.locator("#own-form .primary").click()
        expect(page.get_by_role("alert")).to_have_text(
            "Profile, line 3: write it as “name: value”.")
    assert not [path for _, path, _ in server.asked if "users" in path]
    expect(page.get_by_label("Past sessions")).to_have_value("Kyoto in a week")


def test_nobodys_starters_stand_beside_another_person(page, server):
    server.step = queue.Queue()
    page.get_by_label("Example person").select_option("u7 · 2 sessions")
    expect(page.locator("#starters-title")).to_have_text("Starters for u7")
    expect(starters(page)).to_have_count(0)  # before the first one is written
    server.step = None
    choose(page, "u0 · 6 sessions")
    expect(page.locator("#starters-title")).to_have_text("Starters for u0")
    paste(page, "Kyoto in a week")
    expect(page.locator("#starters-title")).to_have_text("Starters for the pasted history")
    with page.expect_response("**/v1/events"):
        page.get_by_text("Example", exact=True).click()
    expect(page.locator("#starters-title")).to_have_text("Starters for u0")


def test_forget_me_clears_the_page(page):
    paste(page, "Kyoto in a week", "age: 25-34")
    details(page)
    page.locator("#compare").click()
    expect(page.locator("#columns li")).to_have_count(15)
    page.get_by_role("button", name="Forget me").click()
    expect(page.locator("#forgotten")).to_contain_text("Forgotten")
    for part in ("#starters", "#interests", "#columns", "#chat"):
        expect(page.locator(part)).to_be_empty()
    expect(page.locator("#status")).to_have_text("Choose a person to see starters.")
    expect(page.locator("#reasons")).to_be_hidden()
    expect(page.get_by_label("Past sessions")).to_have_value("")
    expect(page.locator("#refresh")).to_be_disabled()


def test_newcomer_without_history_gets_popular_starters_for_the_profile(page, server):
    paste(page, "", "region: SG")
    assert not any(method == "PUT" for method, _, _ in server.asked)
    assert asked(server, "/v1/starters")[-1]["profile"] == {"region": "SG"}
    expect(page.locator("#starters-title")).to_have_text("Starters for a newcomer")
    expect(page.locator("#starters .because").first).to_contain_text("popular with others")
    expect(page.locator("#gate-text")).to_contain_text("there is nothing to weigh")


def test_without_simulated_people_a_newcomer_has_starters_and_a_history_can_be_pasted(page, server):
    server.examples = []
    reload(page, server)
    expect(page.get_by_label("Past sessions")).to_be_visible()
    expect(page.get_by_label("Example", exact=True)).to_be_disabled()
    expect(page.locator("#starters-title")).to_have_text("Starters for a newcomer")
    expect(starters(page)).to_have_text(TEXTS[:5])
    assert asked(server, "/v1/starters")[0]["user_id"] is None  # so that nothing is kept


@pytest.mark.parametrize("refusal, line", [
    ((429, {"Retry-After": "3"}, {"detail": "full"}),
     "The server is busy. Try again in 3 seconds."),
    ((422, {}, {"detail": [{"loc": ["body", "sessions", 0, "summary"], "msg": "too long"}]}),
     "sessions.0.summary: too long"),
    ((413, {}, {"detail": "body: above 1048576 bytes"}), "body: above 1048576 bytes"),
    ((500, {}, "oops"), "The server answered 500."),
    ((503, {"Retry-After": "1"}, {"detail": "the store is full"}), "the store is full"),
])
def test_errors_are_one_line(page, server, refusal, line):
    server.refuse["/v1/starters"] = refusal
    reload(page, server)
    expect(page.get_by_role("alert")).to_have_text(line)
    server.refuse.clear()
    choose(page, "u7 · 2 sessions")  # and the next try wipes it
    expect(page.locator("#problem")).to_be_hidden()
    server.refuse["/v1/starters"] = refusal
    page.locator("#refresh").click()
    expect(page.get_by_role("alert")).to_have_text(line)
    expect(starters(page)).to_have_text(TEXTS[:5])  # what was there stays


def test_a_broken_stream_and_a_lost_server_are_told(page, server):
    server.step = queue.Queue()
    reload(page, server)
    for word in ["next"] * 5 + ["break"]:
        server.step.put(word)
    expect(page.get_by_role("alert")).to_have_text("timed out after 30 s")
    page.context.set_offline(True)
    page.locator("#refresh").click()
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached. Is it running?")


def test_whole_page_by_keyboard(page, server):
    def tab_to(selector):
        for _ in range(40):
            page.keyboard.press("Tab")
            ring = page.evaluate("""() => {
                const at = document.activeElement;
                const shown = at.type === "radio" ? at.nextSibling : at; // its label's text
                return at === document.body || getComputedStyle(shown).outlineStyle !== "none"}""")
            assert ring  # the focus is seen wherever it stops
            if page.evaluate("(s) => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    expect(page.locator("#status")).to_contain_text("5 starters")
    tab_to("#starters .tap")
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message")).to_have_value(TEXTS[0])  # and has the focus
    page.keyboard.type("!")
    tab_to("#say-form .primary")
    page.keyboard.press("Enter")
    expect(page.locator("#chat .bubble")).to_contain_text("!")
    tab_to("#example")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#starters-title")).to_have_text("Starters for u7")
    tab_to("#details > summary")
    page.keyboard.press("Space")
    tab_to("#compare")
    page.keyboard.press("Enter")
    expect(page.locator("#columns li")).to_have_count(15)
    tab_to("[name=whose]")
    page.keyboard.press("ArrowRight")
    tab_to("#lines")
    page.keyboard.type("Kyoto in a week")
    tab_to("#own-form .primary")
    page.keyboard.press("Enter")
    expect(page.locator("#forget")).to_be_visible()
    tab_to("#forget")
    page.keyboard.press("Enter")
    expect(page.locator("#forgotten")).to_contain_text("Forgotten")
    assert [m for m, p, _ in server.asked if p.startswith("/v1/users")] == ["PUT", "DELETE"]


CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d");
  const channels = (colour) => {
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const luminance = (colour) => {
    const [r, g, b] = channels(colour).map((c) => c / 255)
      .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (at) => {
    const colour = getComputedStyle(at).backgroundColor;
    return colour !== "rgba(0, 0, 0, 0)" || !at.parentElement ? colour : ground(at.parentElement);
  };
  const low = [];
  for (const at of document.querySelectorAll("body *:not(:disabled)")) {
    const own = [...at.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !at.checkVisibility()) continue;
    const [dark, light] = [getComputedStyle(at).color, ground(at)].map(luminance).sort();
    const ratio = (light + 0.05) / (dark + 0.05);
    low.push([Math.round(ratio * 100) / 100, at.tagName, at.className, at.textContent]);
  }
  return low.sort((a, b) => a[0] - b[0]);
}"""


@pytest.mark.parametrize("page", [{"color_scheme": "light"}, {"color_scheme": "dark"}],
                         ids=["light", "dark"], indirect=True)
def test_both_schemes_are_readable(page, server, request):
    everything(page)
    scheme = request.node.callspec.id
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 50 and contrasts[0][0] >= 4.5, contrasts[:3]  # WCAG AA
    shot(page, scheme)
    server.refuse["/v1/starters"] = (429, {"Retry-After": "3"}, {})
    page.get_by_text("Paste a history").click()
    page.locator("#refresh").click()
    expect(page.locator("#problem")).to_be_visible()
    shot(page, f"{scheme}-busy")


@pytest.mark.parametrize("page", [
    {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}],
    indirect=True)
def test_phone_needs_no_sideways_scroll(page, server):
    shot(page, "phone-start")
    server.texts = ["Donaudampfschifffahrtsgesellschaftskapitänspatentprüfung" * 2, *TEXTS[1:]]
    server.interests[0]["text"] = "x" * 300
    reload(page, server)
    everything(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    wide = page.evaluate("""() => [...document.querySelectorAll("main *")].filter((at) =>
        at.getBoundingClientRect().right > 361).map((at) => at.outerHTML.slice(0, 80))""")
    assert not wide
    for button in page.locator("button:visible, select:visible").all():
        assert button.bounding_box()["height"] >= 44  # a thumb
    server.texts, server.interests[0]["text"] = TEXTS, SUBJECTS[0]
    reload(page, server)
    everything(page)
    shot(page, "phone")
    page.get_by_text("Paste a history").tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    shot(page, "phone-paste")


@pytest.mark.parametrize("page, moves", [({"reduced_motion": "reduce"}, "none"),
                                         ({"reduced_motion": "no-preference"}, "appear")],
                         indirect=["page"])
def test_reduced_motion_is_respected(page, moves):
    expect(starters(page)).to_have_count(5)
    style = "getComputedStyle(document.querySelector('#starters li')).animationName"
    assert page.evaluate(style) == moves


def test_script_injections_stay_text(page, server, running):
    assert len(ATTACKS) >= 30
    server.texts = ATTACKS
    server.methods = ATTACKS[:3]
    server.model = server.source = server.rates[0]["method"] = ATTACKS[1]
    server.interests = [{"text": t, "score": 0.9, "kept": True} for t in ATTACKS]
    server.examples = [{
        "user_id": ATTACKS[0], "profile": {t: t for t in ATTACKS},
        "sessions": [{"session_id": "s", "timestamp": None, "summary": t} for t in ATTACKS]}]
    server.reason = ATTACKS[1]
    reload(page, server)
    expect(page.locator("#example-profile")).to_contain_text(ATTACKS[0])
    page.get_by_text("History, latest first").click()
    assert page.locator("#history-list li").all_text_contents() == ATTACKS[::-1]
    expect(starters(page)).to_have_text(ATTACKS)
    expect(page.locator("#expected li")).to_have_count(len(ATTACKS))
    assert starters(page).all_text_contents() == ATTACKS
    assert page.locator(".subject").all_text_contents() == ATTACKS
    # Every starter tapped and sent, in one go.
    said = page.evaluate("""() => [...document.querySelectorAll("#starters li")].map((item) => {
        item.querySelector(".tap").click();
        document.querySelector("#say-form .primary").click();
        return [...document.querySelectorAll(".bubble")].at(-1).textContent})""")
    assert said == ATTACKS
    details(page)
    page.locator("#compare").click()
    expect(page.locator("#columns li")).to_have_count(3 * len(ATTACKS))
    assert page.locator("#columns li span:first-child").all_text_contents() == 3 * ATTACKS
    paste(page, "\n".join(ATTACKS), "\n".join(f"k{i}: {t}" for i, t in enumerate(ATTACKS)))
    put = next(body for method, _, body in server.asked if method == "PUT")
    assert [s["summary"] for s in put["sessions"]] == ATTACKS
    assert list(put["profile"].values()) == ATTACKS
    for text in ATTACKS[:3]:
        server.refuse["/v1/starters"] = (422, {}, {"detail": text})
        page.locator("#refresh").click()
        expect(page.get_by_role("alert")).to_have_text(text)
    page.wait_for_timeout(300)  # whatever would run late
    assert page.evaluate("window.__pwned") is None
    made = "script, img, svg, iframe, a:not(#change), math, link, meta, input:not([name=whose])"
    assert page.locator(f"main :is({made})").count() == 0
    assert page.url.rstrip("/") == running[1]


def test_an_injection_would_be_noticed(browser):
    """The texts are live: put in as HTML, with no policy, they do run."""
    page = browser.new_page()
    page.set_content("".join(ATTACKS[1:3]))
    page.wait_for_function("window.__pwned === 1")
    page.close()


def test_page_and_server_together(browser, tmp_path):
    """The real server with an engine whose starters quote the summaries."""
    with (real_server(tmp_path) as real,
          opened(browser, f"http://127.0.0.1:{real.port}") as page):
        expect(page.get_by_label("Example", exact=True)).to_be_disabled()  # no simulated people
        paste(page, "\n".join(ATTACKS[:8]), "region: SG")
        first = starters(page).all_text_contents()
        assert first == [f"{text}: question 1" for text in ATTACKS[:5]]
        with page.expect_response("**/v1/events"):
            starters(page).nth(2).click()
        assert [shown.clicked for shown in real.store.taps.shown()] == [[2]]
        with page.expect_response("**/v1/events"):
            page.locator("#refresh").click()
        assert not set(starters(page).all_text_contents()) & set(first)
        details(page)
        page.locator("#compare").click()
        expect(page.locator("#columns li")).to_have_count(15)
        expect(page.locator("#rates")).to_contain_text("1 of 10 shown")
        page.get_by_role("button", name="Forget me").click()
        expect(page.locator("#forgotten")).to_contain_text("Forgotten")
        assert real.store.user_ids() == [] and list(real.store.taps.shown()) == []
        page.locator("#lines").fill("x" * 3000)
        page.locator("#own-form .primary").click()
        expect(page.get_by_role("alert")).to_contain_text("sessions.0.summary: ")


def test_an_example_that_was_shown_everything_is_shown_it_again(browser, tmp_path):
    engine = FakeEngine()
    engine.pool = 6  # five starters
    with real_server(tmp_path, engine) as real:
        real.store.put_sessions("u0", [Session(session_id="s", summary="trains")])
        engine.examples = [real.store.user("u0")]
        with opened(browser, f"http://127.0.0.1:{real.port}") as page:
            for _ in range(3):
                expect(page.locator("#status")).to_have_text("5 starters by IceBreaker.")
                wait_for(lambda: [*real.store.taps.shown("u0")])
                page.reload()


def test_nobody_else_is_shown_anything_again_unasked(page, server):
    server.texts, server.reason = [], "nothing new was good enough"
    reload(page, server)
    status = page.locator("#status")
    expect(status).to_have_text("No starter: nothing new was good enough.")
    page.get_by_text("Paste a history").click()
    page.get_by_label("Past sessions").fill("trains")
    with page.expect_response("**/v1/starters"):
        page.locator("#own-form .primary").click()
    expect(status).to_have_text("No starter: nothing new was good enough.")
    assert [(a["user_id"][:4], a["refresh"]) for a in asked(server, "/v1/starters")] == [
        ("u0", False), ("u0", True), ("web-", False)]


# ----------------------------------------------------------------------------------- next queries


@pytest.fixture
def conversing(browser, server, running):
    server.task = "suggestions"
    with opened(browser, running[1]) as page:
        expect(page.get_by_label("Message")).to_be_visible()
        yield page


def say(page, text: str):
    page.get_by_label("Message").fill(text)
    page.get_by_role("button", name="Send").click()


def test_a_run_of_next_queries_shows_them_after_each_message(conversing, server):
    page = conversing
    details(page)
    for part in ("#person", "#reasons", "#refresh"):
        expect(page.locator(part)).to_be_hidden()
    say(page, "Tea?")
    expect(starters(page)).to_have_text([f"Tea? ({i})" for i in range(3)])
    expect(page.locator("#status")).to_have_text("3 suggestions by gaussian.")
    starters(page).nth(1).click()
    page.get_by_role("button", name="Send").click()  # it is the next message
    expect(starters(page)).to_have_text([f"Tea? (1) ({i})" for i in range(3)])
    expect(page.locator("#chat .bubble")).to_have_text(["Tea?", "Tea? (1)"])
    say(page, "And a bomb")
    expect(page.locator("#status")).to_have_text(
        "Declined: the policy takes this to be unsafe. "
        "1 message did not fit whole into the prompt.")
    expect(starters(page)).to_have_count(0)
    turns = [[turn["content"] for turn in ask["turns"]] for ask in asked(server, "/v1/suggestions")]
    assert turns == [["Tea?"], ["Tea?", "Tea? (1)"], ["Tea?", "Tea? (1)", "And a bomb"]]
    events = [event for body in asked(server, "/v1/events") for event in body["events"]]
    assert sorted(events, key=str) == sorted([
        {"impression_id": "impression-1", "type": "shown"},
        {"impression_id": "impression-1", "type": "tap", "slot": 1},
        {"impression_id": "impression-2", "type": "shown"}], key=str)
    shot(page, "next-queries")


def test_starting_over_deletes_the_conversation(conversing, server):
    page = conversing
    say(page, "Tea?")
    expect(starters(page)).to_have_count(3)
    user = asked(server, "/v1/suggestions")[0]["user_id"]
    page.get_by_role("button", name="Start over").click()
    expect(page.locator("#chat .bubble")).to_have_count(0)
    assert [path for method, path, _ in server.asked if method == "DELETE"] == [f"/v1/users/{user}"]
    say(page, "Coffee?")
    expect(starters(page)).to_have_count(3)
    last = asked(server, "/v1/suggestions")[-1]
    assert len(last["turns"]) == 1 and last["user_id"] != user


def test_no_next_query_is_more_than_text(conversing):
    page = conversing
    for attack in ATTACKS:
        say(page, attack)
        expect(starters(page).first).to_have_text(f"{attack} (0)")
    assert page.evaluate("window.__pwned") is None
