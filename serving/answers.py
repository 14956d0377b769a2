"""What the composer of the page is answered with: a chat model at `endpoint`, as it writes.

    python serve.py --run runs/default endpoint.base_url=http://host:8001/v1 endpoint.model=NAME

The browser asks this server, which asks the endpoint: the page's policy knows no other address,
and the endpoint's key stays here. Events: `text` each, then `done`, or `error`. Nothing is kept,
and no text of either side is in a log or an error.
"""

import threading
import time
from collections.abc import Iterator

import openai

import data
from config import EndpointConfig
from roles.chat import SYSTEM_ROLE, Endpoint, encodable, plain_text, refused_fields, without_system
from serving.queue import log, where
from serving.waiter import sse

CHARACTERS = 8  # of a token at most, on average: an answer that goes on and on is ended


class Answers:
    """The chat model of a server. Raises UserError where endpoint.base_url is no address."""

    def __init__(self, settings: EndpointConfig):
        self.settings, self.endpoint = settings, Endpoint(settings)
        # Answers under way: each has a thread.
        self.places = threading.BoundedSemaphore(settings.concurrency)

    def begin(self, turns: list[data.Turn]) -> "Answering | None":
        """An answer, to be ended by `end`; None: endpoint.concurrency of them are under way."""
        return Answering(self, turns) if self.places.acquire(blocking=False) else None


class Answering:
    """One answer: what waiter.Stream streams."""

    def __init__(self, answers: Answers, turns: list[data.Turn]):
        self.answers, self.turns, self.stream = answers, turns, None

    def events(self) -> Iterator[str]:  # in threads, a step each; never raises
        try:
            said = False
            for text in self._texts():
                said = True
                yield sse("text", {"text": encodable(text)})
            yield sse("done", {}) if said else fault("its answer is empty")
        except openai.APITimeoutError:
            yield fault("no answer within endpoint.timeout")
        except openai.APIStatusError as error:  # its body may echo
            yield fault(f"status {error.status_code}")
        except openai.APIConnectionError:
            yield fault("the connection failed")
        except Exception as error:  # other JSON than a completion, or none
            log.error("an answer: %s", where(error))
            yield fault("its answer cannot be read")

    def _begin(self) -> openai.Stream:
        """The stream; once more where the model's template has no system role, and never again."""
        endpoint = self.answers.endpoint
        whole = [{"role": turn.role, "content": turn.content} for turn in self.turns]
        bare, prompt = without_system(whole), "\n".join(turn.content for turn in self.turns)
        # No other fields: some servers refuse them. Not tried again: somebody is looking.
        create = endpoint.client.with_options(max_retries=0).chat.completions.create
        while True:
            messages = bare if SYSTEM_ROLE in endpoint.without else whole
            try:
                return create(model=endpoint.settings.model, stream=True, messages=messages)
            except openai.APIStatusError as error:
                if messages == bare or SYSTEM_ROLE not in refused_fields(error, prompt):
                    raise
                endpoint.without.add(SYSTEM_ROLE)

    def _texts(self) -> Iterator[str]:
        settings = self.answers.settings
        until = time.monotonic() + settings.timeout  # in all: each part has a time-out of its own
        room = CHARACTERS * settings.max_tokens
        self.stream = self._begin()
        for chunk in self.stream:
            text = plain_text(chunk.choices[0].delta.content) if chunk.choices else None
            if isinstance(text, str) and text:
                yield text[:room]
                room -= len(text)
            if room <= 0:
                return
            if time.monotonic() > until:
                raise openai.APITimeoutError(self.stream.response.request)

    def end(self) -> None:  # once: whole, failed, or its client has left; no step is under way
        if self.stream:
            self.stream.close()  # or the model would write on
        self.answers.places.release()


def fault(reason: str) -> str:
    return sse("error", {"detail": f"the chat model gave no whole answer: {reason}"})
