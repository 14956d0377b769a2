"""IceBreaker in Chainlit: a user's starters on the empty chat, next queries under each answer.

    chainlit run examples/chainlit_app.py      # docs/chats.md: what to install, the variables
"""
from os import environ

import chainlit as cl
import httpx
import openai

STARTERS = environ.get("ICEBREAKER_STARTERS", "http://127.0.0.1:8000")  # a run of starters
SUGGESTIONS = environ.get("ICEBREAKER_SUGGESTIONS")  # one of next queries; without: no follow-ups
HTTP = httpx.AsyncClient(timeout=30, auth=("", environ.get("ICEBREAKER_KEY", "")))
NONE = {"impression_id": None, "starters": [], "suggestions": []}
LISTS = {}  # user -> the list that this user alone is shown; a reload before a chat shows it again

@cl.password_auth_callback
def login(name: str, password: str):  # your own login here: starters are personal
    return cl.User(identifier=name) if password == environ["DEMO_PASSWORD"] else None

async def post(url: str, **body) -> dict:  # NONE where no server answers: the chat goes on
    try:
        return (await HTTP.post(url, json=body)).raise_for_status().json()
    except httpx.HTTPError as error:  # its text may hold more than the address
        return print(f"IceBreaker: {type(error).__name__} from {url}") or NONE

async def report(server: str, impression: str | None, **event):  # None: nothing is kept of the list
    if impression:  # what was shown is not shown again soon, and taps train the next round
        await post(f"{server}/v1/events", events=[{"impression_id": impression, **event}])

@cl.set_starters
async def set_starters(user: cl.User, language: str | None = None):
    shown = LISTS.get(user.identifier, NONE)
    if not shown["starters"]:  # the language counts where there is no history yet
        body = {"user_id": user.identifier, "profile": {"language": language or "en"}}
        LISTS[user.identifier] = shown = await post(f"{STARTERS}/v1/starters", **body)
        await report(STARTERS, shown["impression_id"], type="shown")
    return [cl.Starter(label=s["text"][:60], message=s["text"]) for s in shown["starters"]]

@cl.on_message
async def answer(message: cl.Message):
    shown = LISTS.pop(user := cl.user_session.get("user").identifier, NONE)
    for s in [s for s in shown["starters"] if s["text"] == message.content]:
        await report(STARTERS, shown["impression_id"], type="tap", slot=s["slot"])
    reply, model = cl.Message(""), environ.get("CHAT_MODEL", "default")
    async for part in await openai.AsyncOpenAI().chat.completions.create(  # at OPENAI_BASE_URL
            model=model, messages=cl.chat_context.to_openai(), stream=True):
        await reply.stream_token(part.choices and part.choices[0].delta.content or "")
    await reply.send()
    if SUGGESTIONS:
        turns = cl.chat_context.to_openai()
        after = await post(f"{SUGGESTIONS}/v1/suggestions", user_id=user, turns=turns)
        await report(SUGGESTIONS, number := after["impression_id"], type="shown")
        for s in after["suggestions"]:
            await cl.Action("next", s | {"impression": number}, s["text"]).send(reply.id)

@cl.action_callback("next")
async def follow(action: cl.Action):  # a tapped follow-up is the next message
    await report(SUGGESTIONS, action.payload["impression"], type="tap", slot=action.payload["slot"])
    await answer(await cl.Message(action.label, type="user_message").send())
