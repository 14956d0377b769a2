"""Questions to an LLM: at an OpenAI-compatible server, or to the generator in this process.

    python train.py roles.teacher=endpoint endpoint.model=NAME endpoint.base_url=http://host:8000/v1

What a role could read is kept in one SQLite file, by model and settings wherever the server is, so
a run that was stopped asks only for the rest; a call that failed is counted under its reason and
stays unknown. No prompt, answer or key appears in a log or an error.
"""

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import re
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from urllib.parse import urlsplit

import openai
import torch

import llm
from config import EndpointConfig
from files import UserError, progress


@dataclass(frozen=True)
class Request:
    system: str  # empty: none is sent
    user: str
    sample: int = 0  # tells repeated draws of one prompt apart; sent as the seed
    temperature: float = 0.0
    choices: tuple[str, ...] = ()  # the words that an answer begins with, if it is one of a few
    neutral: str = ""  # with choices: the user's text of an input without content


# -------------------------------------------------------------------------------------- back-ends
# Both yield (index of the request, text, failure) as answers come in; text or failure is "".


# The HTTP library that openai stands on: httpx, or its successor under another name.
_http = importlib.import_module(openai.DefaultHttpxClient.__base__.__module__.partition(".")[0])
MOST_BYTES = 2**24  # of a reply: no list, no label is so long


def bound(response: _http.Response, seconds: float) -> None:
    """A reply's body ends within `seconds` and MOST_BYTES, however a server goes on."""
    if response.headers.get("content-encoding", "identity") != "identity":  # which nobody asked for
        raise _http.DecodingError("packed, of any length", request=response.request)
    # The client's time-out is of a pause, which a byte now and then never is.
    response.stream = _BoundedStream(response.stream, time.monotonic() + seconds)


class _BoundedStream(_http.SyncByteStream):
    def __init__(self, stream, until: float):
        self.stream, self.until = stream, until

    def __iter__(self):
        size = 0
        for part in self.stream:
            size += len(part)
            if time.monotonic() > self.until:
                raise _http.ReadTimeout("too slow")
            if size > MOST_BYTES:
                raise _http.DecodingError("too long")
            yield part

    def close(self) -> None:
        self.stream.close()


class Endpoint:
    """A server that speaks OpenAI's chat completions; its client retries, with growing pauses.

    Each process of a launch has `concurrency` calls in flight. An empty key_env: no key is sent.
    """

    def __init__(self, settings: EndpointConfig, more: dict | None = None, whole: bool = True,
                 setting: str = "endpoint.base_url"):
        """more: fields that OpenAI's API lacks; whole: no cut text; setting: of the address."""
        url = settings.base_url or os.environ.get("OPENAI_BASE_URL", "")
        if not _is_address(url):
            other = "; or set OPENAI_BASE_URL" * (setting == "endpoint.base_url")
            raise UserError(
                f"{setting}: a server's address, http://host:port/v1, no name or key{other}")
        if not settings.model:
            raise UserError(f"endpoint.model: name a model that {url} serves")
        key = os.environ.get(settings.key_env, "").strip() or "none"  # local servers need no key
        if not (key.isascii() and key.isprintable()):  # or each call would fail, unexplained
            raise UserError(f"{settings.key_env}: holds characters that no key has")
        self.settings, self.more, self.whole, self.setting = settings, more or {}, whole, setting
        self.name, self.temperature = f"{url}, model {settings.model}", settings.temperature
        # Without the address: a server that moves keeps its answers.
        identity = {"model": settings.model, "max_tokens": settings.max_tokens} | self.more
        self.identity = ", ".join(f"{name} {value}" for name, value in identity.items())
        self.absent = f"check endpoint.model={settings.model}"  # what to do after status 404
        self.without: set[str] = set()  # what the server has refused to hear of
        self.patience = max(12, 3 * settings.concurrency)  # calls in a row that tell nothing new
        no_key = {"Authorization": "Bearer none"}  # nor that of OPENAI_CUSTOM_HEADERS
        # No redirect: prompts and key go to the address that was named, and nowhere else.
        http = openai.DefaultHttpxClient(
            follow_redirects=False, headers={"Accept-Encoding": "identity"},
            event_hooks={"response": [lambda reply: bound(reply, settings.timeout)]})
        self.client = openai.OpenAI(base_url=url, api_key=key, timeout=settings.timeout,
                                    max_retries=settings.retries, http_client=http,
                                    default_headers=None if settings.key_env else no_key)

    def answers(self, requests: list[Request]) -> Iterator[tuple[int, str, str]]:
        # Threads of this pool are daemons: a stopped run does not wait for the calls in flight.
        with ThreadPool(min(self.settings.concurrency, len(requests)) or 1) as pool:
            numbers = range(len(requests))
            yield from pool.imap_unordered(lambda i: (i, *self._answer(requests[i])), numbers)

    def _answer(self, request: Request) -> tuple[str, str]:
        """(text, failure); what the server refuses to hear of is left out from then on."""
        while True:
            without = frozenset(self.without)  # other threads add to it
            text, failure, refused = self._try(request, without)
            if not refused:
                return text, failure
            if refused not in self.without:
                self.without.add(refused)
                print(f"{self.name}: refuses {refused}; asked without it", file=sys.stderr)

    def _fields(self, request: Request, without: frozenset[str]) -> dict:
        """Of a chat completion, but for what the server refuses."""
        turns = {"system": request.system, "user": request.user}
        fields = {"seed": request.sample, "temperature": request.temperature} | self.more
        # Models that reason count their thoughts too, and know the limit by this name alone.
        limit = "max_completion_tokens" if "max_tokens" in without else "max_tokens"
        fields[limit] = self.settings.max_tokens
        fields = {name: value for name, value in fields.items() if name not in without}
        messages = [{"role": role, "content": text} for role, text in turns.items() if text]
        if SYSTEM_ROLE in without:
            messages = without_system(messages)
        return {"model": self.settings.model, "messages": messages, "extra_body": fields}

    def _try(self, request: Request, without: frozenset[str]) -> tuple[str, str, str]:
        """(text, failure, what the server refuses to hear of) of one call; of a completion nothing
        is certain but that it was JSON."""
        fields = self._fields(request, without)
        sent = {*fields["extra_body"]} | ({SYSTEM_ROLE} if request.system else set()) - without
        try:
            completion = self.client.chat.completions.create(**fields)
            if not completion.choices:  # some servers put an error into a 200
                return "", "empty", ""
            message, end = completion.choices[0].message, completion.choices[0].finish_reason
            text, refusal = plain_text(message.content), message.refusal
        except openai.APITimeoutError:  # a kind of connection error there
            return "", "time-out", ""
        except openai.APIConnectionError:
            return "", "connection", ""
        except openai.APIStatusError as error:
            named = refused_fields(error, f"{request.system}\n{request.user}")
            failure = self._failure(error)
            # What was not sent is named as what to send instead, or among all that there is.
            refused = next((name for name in named if name in sent), "")
            return "", f"{failure} ({refused or named[0]})" if named else failure, refused
        except (openai.APIError, ValueError, RecursionError,  # no JSON, or
                AttributeError, TypeError, LookupError):  # other JSON than a completion
            return "", "malformed", ""
        if end == "content_filter" or refusal:
            return "", "refused", ""
        if self.whole and end == "length":
            return "", "cut short", ""
        empty = not isinstance(text, str) or (self.whole and not text.strip())
        # The parser of lists is told of a sample that it is not cut short.
        line_end = "\n" * (not self.whole and end == "stop")
        return ("", "empty", "") if empty else (encodable(text) + line_end, "", "")

    def _failure(self, error: openai.APIStatusError) -> str:
        """The reason of one call. Raises UserError where every other call would fail like it."""
        status, variable = error.status_code, self.settings.key_env or "none yet"
        if status in (401, 403):
            setting = f"{self.setting}_key_env".replace("base_url_", "")
            advice = f"check the key in the variable that {setting} names: {variable}"
        elif status in (404, 405):
            advice = f"{self.absent}; {self.setting} ends in /v1"
        elif status < 400:
            advice = "it sends elsewhere, where no prompt goes unless that address is the setting"
        elif status >= 500 or status in (408, 409, 429):
            return "rate limit" if status == 429 else "server error"
        else:  # other prompts may be answered: this one was too long, or not to somebody's liking
            return "refused" if error.code == "content_filter" else "bad request"
        raise UserError(f"{self.name}: status {status}: {advice}") from None  # its body may echo


def plain_text(content):
    """A message's content; where it is a list of parts, the text of those that are texts."""
    if not isinstance(content, list):
        return content
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(part["text"] for part in parts)


def without_system(messages: list[dict]) -> list[dict]:
    """The messages with the system's texts before what the user says first."""
    texts = [m["content"] for m in messages if m["role"] == "system"]
    rest = [m for m in messages if m["role"] != "system"] or [{"role": "user", "content": ""}]
    first = next((i for i, m in enumerate(rest) if m["role"] == "user"), 0)
    text = "\n\n".join(filter(None, [*texts, rest[first]["content"]]))
    return [*rest[:first], rest[first] | {"content": text}, *rest[first + 1 :]]


SYSTEM_ROLE = "the system role"
_PARAMETER = re.compile(r"\b(max_completion_tokens|max_tokens|temperature|seed|top_p|top_k)\b")
_ALLOWED = re.compile(r"(?i)(?<!not )\b(?:allowed|accepted|permitted|supported|valid)\b[^.;()]*")
_SYSTEM = re.compile(r"(?i)\bsystem\b.{0,40}\b(?:role|message|prompt|instruction)"
                     r"|\brole\b.{0,40}\bsystem\b|developer instruction|messages\W+\d+\W+role\b"
                     r"|\b(?:start|begin|first (?:message|role|turn))s?\b.{0,40}\buser\b"
                     r"|\b(?:only|roles?)\b.{0,40}\buser\b.{0,20}\b(?:roles|assistant)\b"
                     r"|\w+ alternat(?:e|ing)\b")
_QUOTATION = re.compile(r"(?<!\w)(['\"`])(?:(?!\1(?!\w)).)*\s.*?\1(?!\w)", re.DOTALL)


def _texts(body, key: str = "message", depth: int = 8) -> Iterator[tuple[str, str]]:
    """(key, text) of the texts in the body of an error, which every server nests in its own way;
    `loc` is a path of names and numbers, and `input` (FastAPI's) an echo."""
    if key == "loc" and isinstance(body, list):
        yield key, " ".join(map(str, body))
    elif isinstance(body, str):
        yield key, body
    elif isinstance(body, dict | list) and depth:
        rows = body.items() if isinstance(body, dict) else ((key, value) for value in body)
        for name, value in rows:
            if name != "input":
                yield from _texts(value, name, depth - 1)


def refused_fields(error: openai.APIStatusError, prompt: str) -> list[str]:
    """Fields that a 400 or 422 may refuse, the likeliest first; none where a prompt is too long."""
    texts = [*itertools.islice(_texts(error.body), 100)]
    place, said = (" ".join(text[:1000] for key, text in texts if (key in ("param", "loc")) == of)
                   for of in (True, False))
    if error.status_code not in (400, 422) or re.search("context length|too (?:long|large)", said):
        return []
    # A message may quote the prompt: several words in quotes, or what stands in the prompt too.
    said = _QUOTATION.sub(" ", said)
    # Of one that lists what may be sent the rest comes first.
    named = _PARAMETER.findall(f"{_ALLOWED.sub(' ', said)}\n{said}")
    system = (match for match in _SYSTEM.finditer(f"{place}\n{said}") if match[0] not in prompt)
    return [*_PARAMETER.findall(place), *(name for name in named if name not in prompt),
            *[SYSTEM_ROLE] * any(system)]


def _is_address(base_url: str) -> bool:
    try:
        url = urlsplit(base_url)
        if url.username or url.password or url.query:  # addresses appear in logs
            return False
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # brackets or a port that cannot be
        return False


def encodable(text: str) -> str:
    """Text with question marks for lone surrogates, which neither a file nor a socket takes."""
    return text.encode("utf-8", "replace").decode()


class Local:
    """The generator in this process, asked through its chat template; tokens tell what was cut.

    Of a few words it does not write one, which small models fail at: the likeliest is taken.
    """

    def __init__(self, model, tokenizer, settings: EndpointConfig | None = None, rows: int = 32):
        settings = settings or EndpointConfig()
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.temperature, self.max_tokens = settings.temperature, settings.max_tokens
        self.patience = 3 * rows  # no server to lose; only a model that cannot follow
        weights = hashlib.sha256((tokenizer.chat_template or "").encode())
        for name, weight in model.named_parameters():  # the first 64 of each: quick, and enough
            weights.update(f"{name} {weight.detach().flatten()[:64].tolist()}".encode())
        name = f"generator {weights.hexdigest()[:12]}, max_tokens {self.max_tokens}"
        self.name = self.identity = name

    def answers(self, requests: list[Request]) -> Iterator[tuple[int, str, str]]:
        chosen = [i for i, request in enumerate(requests) if request.choices]
        for start in range(0, len(chosen), self.rows):
            batch = chosen[start : start + self.rows]
            for i, word in zip(batch, self._choose([requests[i] for i in batch]), strict=True):
                yield i, word, ""
        # One draw has one temperature; a summariser asks at 0, a teacher above.
        order = sorted({*range(len(requests))} - {*chosen}, key=lambda i: requests[i].temperature)
        ends = {self.tokenizer.pad_token_id} | llm.end_tokens(self.model, self.tokenizer)
        for temperature, group in itertools.groupby(order, lambda i: requests[i].temperature):
            while batch := list(itertools.islice(group, self.rows)):  # kept as soon as it is done
                drawn = llm.sample_ids(
                    self.model, self.tokenizer, [self._prompt(requests[i]) for i in batch], 1,
                    max_new_tokens=self.max_tokens, temperature=temperature, top_p=1.0, seed=0,
                    numbers=[requests[i].sample for i in batch], rows=self.rows)
                for i, (tokens,) in zip(batch, drawn, strict=True):  # (T,) each
                    text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                    whole = tokens[-1].item() in ends or "</sug>" in text  # else room ran out
                    yield i, text, "cut short" if not whole else "" if text.strip() else "empty"

    @torch.no_grad()
    def _choose(self, requests: list[Request]) -> list[str]:
        """Of each request's choices the word that its input makes likelier than the others.

        log p(word | prompt) - log p(word | prompt with the neutral text): a word that the model
        prefers whatever it reads gains nothing, nor does a short one. Contextual calibration (Zhao
        et al. 2021, arXiv:2102.09690), by a difference as in Holtzman et al. (2021, 2104.08315).
        """
        empty = {request: replace(request, user=request.neutral) for request in requests}
        asked = [*dict.fromkeys([*empty.values(), *requests])]  # few are neutral, and read once
        words = [[llm.encode_text(self.tokenizer, word) for word in r.choices] for r in asked]
        prompts = [self._prompt(request) for request in asked]
        logps = dict(zip(asked, llm.completion_logps(self.model, prompts, words), strict=True))
        return [request.choices[(logps[request] - logps[empty[request]]).argmax()]
                for request in requests]

    def _prompt(self, request: Request) -> list[int]:
        # One turn of the user, as not every template has a system role; no control token of it is
        # parsed but the template's.
        before, after = llm.user_turn(self.tokenizer)
        text = f"{request.system}\n\n{request.user}".strip()
        return before + llm.encode_text(self.tokenizer, text) + after


# ------------------------------------------------------------------------------------------- chat

# A refusal or a bad request tells that a server is there; these do not.
_UNREACHED = {"rate limit", "server error", "time-out", "connection", "malformed"}


class Chat:
    """Requests in, values out; what could be read is kept in `cache`, one SQLite file.

    counts: distinct requests asked, cached, answered, and failed by reason; to be cleared at will.
    """

    def __init__(self, backend: Endpoint | Local, cache: str | Path):
        self.backend, self.cache = backend, Path(cache)
        self.counts, self._heard, self._in_a_row = Counter(), False, 0  # heard: ever answered
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        self._open().close()  # a file that is no cache is refused before any call

    def ask(self, requests: list[Request], read: Callable) -> list:
        """read(text) of each answer, None where the call failed; equal requests are asked once.

        read: raises ValueError for a text that it cannot read. Raises UserError where no further
        call would succeed; what was answered is kept.
        """
        values = {}  # request -> what was read
        with contextlib.closing(self._open()) as cache:
            for request in (distinct := dict.fromkeys(requests)):
                query = "SELECT text FROM answers WHERE key = ?", (self._key(request),)
                for (text,) in cache.execute(*query):
                    with contextlib.suppress(ValueError):  # the reader has changed: ask again
                        values[request] = read(text)
            todo = [request for request in distinct if request not in values]
            self._heard = self._heard or bool(values)
            self.counts += Counter(cached=len(values), asked=len(todo))
            with contextlib.closing(self.backend.answers(todo)) as answers:  # ends the calls too
                for i, text, failure in progress(answers, "ask", len(todo)):
                    try:
                        if not failure:
                            values[todo[i]] = read(text)
                            row = (self._key(todo[i]), text)
                            cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", row)
                    except ValueError:
                        failure = "unreadable"
                    self._count(failure)
        return [values.get(request) for request in requests]

    def _count(self, failure: str) -> None:
        """Raises UserError where nothing was ever answered, or the server is gone."""
        self.counts[failure or "answered"] += 1
        self._heard = self._heard or not failure  # until then every failure counts
        self._in_a_row = self._in_a_row + 1 if not self._heard or failure in _UNREACHED else 0
        if self._in_a_row >= self.backend.patience:
            raise UserError(
                f"{self}: {self._in_a_row} calls in a row gave no answer; check that it is served "
                "and follows instructions. Answers are kept: run the same command again")

    def __str__(self) -> str:
        """'http://host:8000/v1, model m (asked 10, answered 8, time-out 2)'."""
        counts = ", ".join(f"{name} {n}" for name, n in self.counts.items())
        return f"{self.backend.name} ({counts})"

    def _key(self, request: Request) -> str:
        text = json.dumps([self.backend.identity, *astuple(request)])
        return hashlib.sha256(text.encode()).hexdigest()  # no user text in the file

    def _open(self) -> sqlite3.Connection:
        try:  # every statement is committed by itself
            # No write-ahead log: where two processes make the file, one would be told it is locked.
            cache = sqlite3.connect(self.cache, timeout=60, isolation_level=None)
            cache.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT)")
            return cache
        except sqlite3.Error as error:
            raise UserError(f"{self.cache}: no usable cache of answers ({error})") from None


class Sampler:
    """The trained generator at a server, in place of llm.sample.

    more: as of Endpoint, such as vLLM's top_k; policy: what tells this adapter from others that the
    server knew by the same name; path: its folder, empty for the base.
    """

    def __init__(self, settings: EndpointConfig, more: dict, cache: Path, policy: str = "",
                 path: str = ""):
        backend, model = Endpoint(settings, more, False, "generator.endpoint"), settings.model
        backend.identity += f", policy {policy}"  # answers of another training are not ours
        how = f"the adapter under that name (vLLM: --lora-modules {model}={path})"
        backend.absent = f"the server knows no model {model}; serve {how if path else 'one'}"
        self.chat = Chat(backend, cache)

    def sample(self, prompts: list[str], n: int, seeds: list[int]) -> list[list[str]]:
        """n completions of each prompt, from its seed on, cut short or empty as they may be.

        Raises UserError if a call failed: a list less would pass for a policy that writes none.
        """
        requests = [Request("", prompt, seed + i, self.chat.backend.temperature)
                    for prompt, seed in zip(prompts, seeds, strict=True) for i in range(n)]
        texts = self.chat.ask(requests, str)  # any text will do: it is parsed later
        if None in texts:
            raise UserError(f"{self.chat}: {texts.count(None)} of {len(texts)} samples failed; the "
                            "others are kept, run the same command again")
        return [texts[i : i + n] for i in range(0, len(texts), n)]
