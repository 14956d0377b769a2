"""What requests and replies of the API hold, as pydantic models: /openapi.json is made of them.

Requests are strict and take no field that is not named here; replies are described, not checked.
"""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, field_validator

import data
from serving.engine import METHODS, Interest
from serving.openwebui import ChatBody, ChatMessage, Part
from serving.suggest import LIKE

MAX_TEXT = 2000  # characters of a summary; a message may have 16 times as many
# Of one line, as data.Text; the length stands first, so that an error speaks of characters.
Line = Annotated[str, Field(max_length=MAX_TEXT), BeforeValidator(data.one_line)]
Profile = Annotated[dict[data.Name, Line], Field(max_length=50)]


def _plain(name: str) -> str:
    # data.Name mends a log's ids; a client's would become somebody else's: "alice\0" is not alice.
    # And a path with ".." is another one before it gets here.
    if name != data.one_line(name) or "\ufffd" in name or {".", ".."} & {*name.split("/")}:
        raise ValueError("an id without blanks at its ends, control characters, or '..' as a part")
    return name


Id = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain)]

# ------------------------------------------------------------------------------------------ replies


class ShownStarter(BaseModel):
    slot: int  # from 0, in the order in which to show them
    text: str
    utility: float  # r_util
    interest: str | None = Field(description="because you asked about ...; null: it names none")
    source: Literal["generated", "cached", "cold start"]  # cached: written ahead of the request


class Reply(BaseModel):
    request_id: str  # as in the header X-Request-ID and in the log
    impression_id: str | None = Field(description="for /v1/events; null: nothing is kept of it")
    model: str  # Engine.version of what wrote it
    method: str
    threshold: float | None  # of the gate
    interests: list[Interest] = Field(description="kept: the starters are written for these")
    starters: list[ShownStarter] = Field(description="fewer than n where no more are good")
    reason: str | None = Field(description="why there is not one starter")


class ShownSuggestion(BaseModel):
    slot: int  # from 0, best first
    text: str
    reward: float  # of the reward model
    uncertainty: float  # one standard deviation of it; the order is by reward - uncertainty
    source: str  # "policy"; of a shop the product or policy that answers it


class SuggestionsReply(BaseModel):
    request_id: str
    impression_id: str | None = Field(description="for /v1/events; null: nothing is kept of it")
    model: str
    method: str
    cut: int = Field(description="turns that were left out or shortened, as the prompt is full")
    declined: bool  # the conversation is unsafe to go on with
    reason: str | None = Field(description="why it was declined")
    suggestions: list[ShownSuggestion] = Field(description="fewer than n where no more are good")


class Fault(BaseModel):
    detail: str


# ----------------------------------------------------------------------------------------- requests


class Body(BaseModel, strict=True, extra="forbid"):
    pass


class Event(Body):
    impression_id: Annotated[str, Field(min_length=1, max_length=200)]
    type: Literal["shown", "tap"]
    slot: Annotated[int, Field(ge=0, le=100)] | None = None  # of a tap


class EventsBody(Body):
    events: Annotated[list[Event], Field(min_length=1, max_length=100)]


class Message(data.Message):
    content: Annotated[str, Field(max_length=16 * MAX_TEXT), BeforeValidator(data.one_line)]


class Session(data.Session):
    session_id: Id
    summary: Line | None = None
    messages: Annotated[list[Message], Field(max_length=200)] | None = None


class InlineSession(Session):
    session_id: Id | None = None  # its place, where there is none


class StartersBody(Body):
    user_id: Id | None = None
    sessions: list[InlineSession] | None = None  # at most Store.max_sessions, as below
    profile: Profile | None = None
    n: Annotated[int, Field(ge=1, le=10)] = 5  # starters; perhaps fewer are good
    refresh: bool = False  # other starters than those that were answered, shown or not
    exclude: Annotated[list[Line], Field(max_length=100)] = []
    method: Literal[METHODS] | None = None  # the user's arm, where none is named
    stream: bool = False

    @field_validator("sessions")
    @classmethod
    def _without_user(cls, sessions, info):
        if sessions is not None and info.data.get("user_id") is not None:
            raise ValueError("either user_id or sessions: inline ones belong to no user")
        return sessions and data.each_once([  # a "#1" of the client's may stand there already
            s if s.session_id else s.model_copy(update={"session_id": f"#{i}"})
            for i, s in enumerate(sessions, 1)])


class Turn(data.Turn):
    content: Annotated[str, Field(min_length=1, max_length=16 * MAX_TEXT),
                       BeforeValidator(data.one_line)]


class AnswerBody(Body):
    turns: Annotated[list[Turn], Field(min_length=1, max_length=200)]

    @field_validator("turns")
    @classmethod
    def _of_a_user(cls, turns):
        if not any(turn.role == "user" for turn in turns):
            raise ValueError("none of a user")
        if turns[-1].role == "system":
            raise ValueError("the last one is to be the user's or the assistant's")
        return turns


class SuggestionsBody(AnswerBody):
    n: Annotated[int, Field(ge=1, le=10)] = 3  # next queries; perhaps fewer are good
    user_id: Id | None = None  # whose events and deletion are to count; else nothing is kept
    language: Literal[tuple(LIKE)] | None = None  # None: that of the last query
    stream: bool = False


class SessionsBody(Body):
    sessions: Annotated[list[Session], AfterValidator(data.each_once)]
    profile: Profile | None = None


# A name of a field is the project's, any other key is the client's.
FIELDS = {name for model in (Event, EventsBody, Message, Session, StartersBody, SessionsBody,
                                  Turn, SuggestionsBody, ChatBody, ChatMessage, Part)
          for name in model.model_fields} | {"body", "path"}
