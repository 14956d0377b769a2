"""What Open WebUI asks its task model for, and answers in the shape of OpenAI's API.

    TASK_MODEL_EXTERNAL=icebreaker-suggestions      # docs/serving.md has all settings

Open WebUI sends a task as one message: what to do, the JSON to answer with, then the conversation
between <chat_history> tags, a line `USER: ...` or `ASSISTANT: ...` a message. The task is told by
the key of that JSON, looked for before and behind the conversation, so that no text of a user
chooses it, and so that a template in other words or another language is understood too. A message
that has such a line itself is read as several: it is the user's own conversation.

Nothing is kept of these requests: they name no user whose data could be deleted later. What Open
WebUI caches for everybody, the list of models, is a constant.
"""

import json
import re
import time

from fastapi import HTTPException
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field

import data

MODEL = "icebreaker-suggestions"
# No version and no time in it: Open WebUI remembers this list, and its users' choice of a model.
MODELS = {"object": "list", "data": [
    {"id": MODEL, "object": "model", "created": 0, "owned_by": "icebreaker"}]}
MOST_TURNS = 200  # that are read, the latest, as of /v1/suggestions
FOLLOW_UPS = "follow_ups"
EMPTY = {"title": {"title": ""}, "tags": {"tags": []}}  # valid answers to what is no task of ours
TASK = re.compile(rf'\{{\s*"({"|".join([FOLLOW_UPS, *EMPTY])})"\s*:')
SPEAKER = re.compile(r"^(USER|ASSISTANT|SYSTEM|TOOL): ?", re.MULTILINE)


class Part(BaseModel):
    type: str
    text: str | None = ""


class ChatMessage(BaseModel):
    role: str
    content: str | list[Part] | None = None  # parts: where there are pictures too

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text or "" for part in self.content if part.type == "text")
        return self.content or ""


# Not strict, unlike other bodies: clients of this API send many fields beside these.
class ChatBody(BaseModel):
    model: str = Field(max_length=200)
    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    stream: bool | None = False  # null: as where it is left out


class ChatFault(BaseModel):
    error: dict[str, str | None]


def is_path(path: str) -> bool:  # and below: their clients read OpenAI's errors
    return path.startswith(("/v1/chat/completions", "/v1/models"))


def check_model(name: str) -> None:
    if name != MODEL:
        raise HTTPException(404, f"model: this server has {MODEL} alone")


def read_task(prompt: str) -> tuple[str | None, list[data.Turn]]:
    """(key of the JSON that a task prompt asks for, None if it is none of ours; its turns)."""
    task, _, rest = prompt.partition("<chat_history>")
    # The last tag ends it: a message may hold one.
    history, closed, behind = rest.rpartition("</chat_history>")
    parts = SPEAKER.split(history if closed else rest)[1:][-2 * MOST_TURNS :]
    # Role, text, role, text, ...
    pairs = zip(parts[::2], map(data.one_line, parts[1::2]), strict=True)
    turns = [data.Turn(role=role.lower(), content=text) for role, text in pairs
             if text and role in ("USER", "ASSISTANT")]
    # The first key: examples of an answer follow it.
    found = TASK.search(task) or (closed and TASK.search(behind))
    return found[1] if found else None, turns


def completion(content: dict, request_id: str, stream: bool | None) -> Response:
    """A reply that says this JSON; stream: in one piece, as it is whole when it is sent."""
    text = json.dumps(content, ensure_ascii=False)
    head = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": MODEL}

    def body(kind: str, name: str, message: dict, reason: str | None) -> dict:
        choice = {"index": 0, name: message, "logprobs": None, "finish_reason": reason}
        return {**head, "object": kind, "choices": [choice]}

    said = {"role": "assistant", "content": text}
    if not stream:
        return JSONResponse(body("chat.completion", "message", said, "stop"))
    kind = "chat.completion.chunk"
    chunks = [body(kind, "delta", said, None), body(kind, "delta", {}, "stop")]
    lines = [*(json.dumps(chunk, ensure_ascii=False) for chunk in chunks), "[DONE]"]
    return Response("".join(f"data: {line}\n\n" for line in lines), media_type="text/event-stream")


def fault(status: int, message: str) -> dict:
    # No param and no code: the message names the field, as everywhere here.
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
