"""Records of users, shown lists, dialogues and a shop: read and written, splits, cuts by time.

`python -m tools.logs check users.jsonl` says what a file holds, or all that is wrong with it.

Every bad line is reported as `file:line: field: reason`, all of them up to a limit, and never with
the content of the row: these are people's histories. Models see the fields below and no others.
"""

import bisect
import contextlib
import hashlib
import html
import itertools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator
from pydantic.functional_validators import WrapValidator
from pydantic_core import ValidationError

from files import UserError, atomic_path

MOST_FAULTS = 20  # bad lines that are listed; the rest are counted
MOST_BYTES = 2**25  # of a line: no history is so long, and memory stays flat whatever a file holds


class DataError(UserError):
    """Bad lines of one file, one `file:line: field: reason` each."""


def one_line(value):
    """Collapse space and control characters; drop lone surrogates, which nothing can encode."""
    if not isinstance(value, str):
        return value  # for the field to refuse
    value = re.sub(r"[\ud800-\udfff]", "", value)  # JSON can hold them: "\ud800"
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", value).split())


def label(key) -> str:
    """A key of a row, safe and short enough for a message."""
    return one_line(str(key))[:40]  # a key may be whatever people typed


def to_utc(value):
    """ISO 8601 text, with or without a zone, to naive UTC."""
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        return moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment
    except (TypeError, ValueError, OverflowError):  # overflow: in UTC before year 1
        raise ValueError("neither an ISO 8601 time nor null") from None


Text = Annotated[str, BeforeValidator(one_line)]  # one line, encodable, perhaps empty
# The length stands before the validator: else pydantic would count "items", not characters.
Name = Annotated[str, Field(min_length=1, max_length=200), BeforeValidator(one_line)]
Stamp = Annotated[datetime, BeforeValidator(to_utc)] | None
Sentence = Annotated[str, Field(min_length=1), BeforeValidator(one_line)]
Slot = Annotated[int, Field(ge=0)]  # place in a shown list, from 0


# Strict: 1.0 is no index and "true" no number, and a log that has them is broken.
class Record(BaseModel, frozen=True, extra="ignore", strict=True, allow_inf_nan=False):
    @model_validator(mode="before")
    @classmethod
    def _count_extra(cls, value, info):
        """Count the keys that no field takes in the reader's Counter, as `record.key`."""
        if info.context is not None and isinstance(value, dict):
            extra = value.keys() - cls.model_fields.keys()  # a typo of an optional key is one too
            info.context.update(f"{cls.__name__.lower()}.{label(key)}" for key in extra)
        return value


class Message(Record):
    role: Literal["user", "assistant", "system"]  # as in chat templates
    content: Text


class Session(Record):
    session_id: Name
    timestamp: Stamp = None
    summary: Annotated[Text | None, AfterValidator(lambda text: text or None)] = None
    messages: list[Message] | None = None  # where it has no summary: the summariser writes one

    @model_validator(mode="after")
    def _has_content(self):
        if not self.summary and not any(m.content for m in self.messages or ()):
            raise ValueError("summary: neither a summary nor messages")
        return self


def each_once(sessions: list[Session]) -> list[Session]:
    """The sessions; raises ValueError if two have one id."""
    if len({s.session_id for s in sessions}) < len(sessions):
        raise ValueError("a session_id stands twice")
    return sessions


class User(Record):
    user_id: Name
    profile: dict[Text, Text] | None = None  # any facts, such as age or region
    sessions: Annotated[list[Session], AfterValidator(each_once)]


class Impression(Record):
    user_id: Name
    timestamp: Stamp = None
    starters: Annotated[list[Sentence], Field(min_length=1)]  # by slot
    clicked: list[Slot]  # none, one or several; a slot may stand twice
    sessions_after: Annotated[int, Field(ge=0)] | None = None  # that followed from the taps

    @model_validator(mode="after")
    def _clicked_exists(self):
        if any(i >= len(self.starters) for i in self.clicked):
            raise ValueError("clicked: names a starter that was not shown")
        return self


class Turn(Message):
    content: Sentence  # an empty one would tell a model that somebody said nothing


class Dialogue(Record):
    """A conversation up to an answer, the next queries suggested there, and their clicks."""

    dialogue_id: Name
    user_id: Name | None = None
    timestamp: Stamp = None
    profile: dict[Text, Text] | None = None  # of its user, such as the country
    intent: Name | None = None  # a name of the log's own, such as "web search"
    turns: Annotated[list[Turn], Field(min_length=1)]
    suggestions: list[Sentence]  # by slot; empty where none was shown, as for unsafe contexts
    clicked: list[Slot]
    unsafe: bool | None = None  # None: nobody has said
    # Of all clicks on this list the share of each suggestion, in a log aggregated over people.
    click_shares: list[Annotated[float, Field(ge=0, le=1)]] | None = None

    @model_validator(mode="after")
    def _fits(self):
        if not any(turn.role == "user" for turn in self.turns):
            raise ValueError("turns: none of a user")
        if any(i >= len(self.suggestions) for i in self.clicked):
            raise ValueError("clicked: names a suggestion that was not shown")
        if self.click_shares is not None and len(self.click_shares) != len(self.suggestions):
            raise ValueError("click_shares: not one for each suggestion")
        return self


def plain(value):
    """What a shop's page shows of a row: no tags, entities as characters, nothing that is null."""
    if isinstance(value, str):
        return html.unescape(re.sub(r"</?[A-Za-z][^<>]*>|<!--.*?-->", " ", value))
    if isinstance(value, dict):
        return {plain(key): plain(v) for key, v in value.items() if v is not None}
    return [*map(plain, value)] if isinstance(value, list) else value


def wanted(said: str) -> WrapValidator:
    """One fault for a value that may be of several types, not one for each type."""
    def check(value, inner):
        with contextlib.suppress(ValidationError):
            return inner(value)
        raise ValueError(f"wants {said}")

    return WrapValidator(check)


class Product(Record):
    """A row of a shop's catalogue; product_id and categories are taken for id and category."""

    id: Name
    name: Name
    # One name or several, the narrowest first: [headphones, audio].
    category: Annotated[list[Name], Field(min_length=1),
                        BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]
    brand: Name | None = None
    price: Annotated[float, Field(ge=0)] | None = None
    currency: Name | None = None
    # A unit ends the name: {"battery_mah": 5000, "waterproof": true, "material": "steel"}.
    attributes: dict[Name, Annotated[
        bool | int | float | Text | list[Text],
        wanted("a number, a text, true or false, or a list of texts")]] = {}
    stock: Annotated[Slot | bool | None, wanted("a number from 0 on, true, false or null")] = None
    description: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, value):
        names, value = {"product_id": "id", "categories": "category"}, plain(value)
        return {key if (new := names.get(key, key)) in value else new: v
                for key, v in value.items()} if isinstance(value, dict) else value

    @property
    def in_stock(self) -> bool:
        return self.stock is None or self.stock > 0  # False is 0


class Policy(Record):
    """What a shop promises about one thing, such as how long an order may be returned."""

    section: Name  # returns, shipping, payment, privacy, ...
    name: Name
    text: Sentence
    keywords: list[Name] = []  # what else people call it

    @property
    def id(self) -> str:
        return f"{self.section}.{self.name}"


class QualityCase(Record):
    """An annotated suggestion, shown to an LLM that judges others."""

    query: Sentence  # the shopper's
    suggestion: Sentence
    answerable: bool
    factual: bool
    informative: bool
    why: Text = ""


def _refuse_constant(name: str):
    raise ValueError(f"not JSON ({name} is no number in it)")


DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
# What a file is that begins so, where its lines are no JSON objects.
FORMS = {rb"\xff\xfe|\xfe\xff|.?\0[^\0]": "UTF-16", rb"\[": "a JSON array", rb"\x1f\x8b": "gzip",
         rb"{\s*\n": "a JSON object of several lines", rb"PK": "a zip archive", rb"PAR1": "parquet"}


def json_fault(error: ValueError | RecursionError) -> str:
    """Why a text is no JSON, or what else its reader says, and nothing of the text."""
    if isinstance(error, json.JSONDecodeError):  # its whole message would quote the line
        line = f"line {error.lineno}, " * (error.lineno > 1)
        return f"not JSON ({error.msg} at {line}character {error.colno})"
    names = {UnicodeDecodeError: "not UTF-8", RecursionError: "nested too deeply"}
    return names.get(type(error), str(error))  # NaN, an integer of thousands of digits: no more


class Faults(list):
    """Faults of rows, `place: field: reason` each."""

    rows = 0  # that have any
    lines = 0  # of them that are no JSON object

    def add(self, place: str, error: ValueError, within: tuple = ()) -> None:
        """Note a row's ValidationError, or its ValueError with `field: reason`.

        within: keys that lead to the part of the row that was validated.
        """
        self.rows += 1
        reasons = [str(error)]
        if isinstance(error, ValidationError):
            faults = error.errors(include_input=False, include_url=False)
            reasons = [_reason(fault, (*within, *fault["loc"])) for fault in faults]
        self.extend(f"{place}: {reason}" for reason in reasons)

    def __str__(self) -> str:
        rest = len(self) - MOST_FAULTS  # a file of a million bad rows is no million lines
        return "\n".join(self[:MOST_FAULTS] + [f"... and {rest} more"] * (rest > 0))

    def refuse(self) -> None:
        """Raise DataError if there are any."""
        if self:
            raise DataError(str(self))


def _reason(fault: dict, keys: tuple) -> str:
    """`field: reason` of one fault that pydantic reports."""
    where = ".".join(map(label, keys))
    reason = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error" and re.match(r"[a-z_]+: ", reason):  # names its field itself
        return f"{where}.{reason}" if where else reason
    return f"{where or 'line'}: {reason}"


def json_objects(path: str | Path, faults: Faults) -> Iterator[tuple[str, dict]]:
    """Yield (`file:line`, object) of each line, note faults; DataError for no such file or form."""
    objects, earlier = 0, faults.lines  # of other files
    try:
        with open(path, "rb") as file:  # bytes: one line that is no UTF-8 is one fault
            head = file.peek(100).lstrip(b"\xef\xbb\xbf \t\r\n")
            for row in json_lines(file, str(path), faults):
                objects += 1
                yield row
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    bad = faults.lines - earlier
    other = "not JSON" if bad > 1 and not objects else None
    form = next((FORMS[start] for start in FORMS if re.match(start, head)), other)
    if form and bad > objects:  # rather than a fault for each of its lines
        raise DataError(f"{path}: {form}; wants one JSON object a line, in UTF-8")


def json_lines(file: BinaryIO, name: str, faults: Faults,
               decoder: json.JSONDecoder = DECODER) -> Iterator[tuple[str, dict]]:  # fmt: skip
    """As json_objects, of a file that is open."""
    for number, line in enumerate(_lines(file), 1):
        if len(line) <= MOST_BYTES and not line.strip():  # as `cat` joins files
            continue
        try:
            if len(line) > MOST_BYTES:
                raise ValueError(f"longer than {MOST_BYTES:,} bytes")
            value = decoder.decode(line.decode("utf-8-sig").rstrip("\r\n"))
            if not isinstance(value, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            faults.add(f"{name}:{number}", ValueError(f"line: {json_fault(error)}"))
            faults.lines += 1
        else:
            yield f"{name}:{number}", value


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of a file; of one that is too long no more than tells so, whatever its length."""
    while line := file.readline(MOST_BYTES + 1):
        yield line
        while len(line) > MOST_BYTES and not line.endswith(b"\n"):
            line = file.readline(MOST_BYTES + 1)  # the rest of it


def read_rows(path: str | Path, record: type[Record]) -> list:
    """Each row of a file as a `record`; raises DataError that lists every bad line."""
    rows, faults, extra, seen, currency = [], Faults(), Counter(), set(), ""
    # An impression has none.
    key = {User: "user_id", Dialogue: "dialogue_id", Product: "id"}.get(record)
    for place, value in json_objects(path, faults):
        try:
            row = record.model_validate(value, context=extra)
            if key and getattr(row, key) in seen:
                raise ValueError(f"{key}: stands on an earlier line too")
            seen.add(key and getattr(row, key))
            if (code := getattr(row, "currency", None)) and code != (currency := currency or code):
                raise ValueError("currency: not that of the lines above; prices are compared")
            rows.append(row)
        except ValueError as error:  # a ValidationError is one too
            faults.add(place, error)
    faults.refuse()
    if not rows:
        raise DataError(f"{path}:1: line: the file holds no rows")
    _tell(path, extra)
    return rows


def _tell(path: str | Path, extra: Counter) -> None:
    if extra:  # names of keys only, on stderr: stdout is for figures
        keys = [f"{name} ({count} times)" for name, count in extra.most_common(20)]
        keys += [f"{len(extra) - 20} more"] * (len(extra) > 20)
        print(f"{path}: ignored keys: {', '.join(keys)}", file=sys.stderr)


def read_users(path: str | Path) -> list[User]:
    """Users of a file, sessions in time order; raises DataError that lists every bad line."""
    return [in_time_order(user) for user in read_rows(path, User)]


def in_time_order(user: User) -> User:
    """The user with sessions sorted by time, as they stand where one has no time."""
    if not all(s.timestamp for s in user.sessions):
        return user  # the order of the file is all that is told
    return user.model_copy(update={"sessions": sorted(user.sessions, key=lambda s: s.timestamp)})


def read_impressions(path: str | Path) -> list[Impression]:
    """Shown lists of a file in its order; raises DataError that lists every bad line."""
    return read_rows(path, Impression)


def read_dialogues(path: str | Path) -> list[Dialogue]:
    """Conversations of a file in its order; raises DataError that lists every bad line."""
    return read_rows(path, Dialogue)


def read_catalogue(path: str | Path) -> list[Product]:
    """Products of a file in its order; raises DataError that lists every bad line."""
    return read_rows(path, Product)


def read_quality_cases(path: str | Path) -> list[QualityCase]:
    """Labelled suggestions of a file in its order; raises DataError that lists every bad line."""
    return read_rows(path, QualityCase)


def read_policies(path: str | Path) -> list[Policy]:
    """A shop's policies from YAML; raises DataError with the line of every fault.

    {section: {name: text}}, or {text, keywords: [..]} in place of a text; no aliases.
    """
    # Nodes, not values: they know their lines, and YAML takes `no` or `14` for no text.
    rows, faults, extra = [], Faults(), Counter()
    try:
        text = Path(path).read_bytes().decode()
        root = yaml.compose(text, yaml.SafeLoader)
        for token in yaml.scan(text):  # behind it, as it takes long where all is nested deeply
            if isinstance(token, yaml.AliasToken):  # copies of copies fill any memory
                raise yaml.MarkedYAMLError(
                    problem="an alias; write out what it is", problem_mark=token.start_mark)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: line: not UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        reason = getattr(error, "problem", None) or "not readable"
        raise DataError(f"{path}:{line}: line: not YAML ({reason})") from None
    for section, entries in _pairs(root, path, "file", faults):
        for name, entry in _pairs(entries, path, section.value, faults):
            fields = plain({"section": section.value, "name": name.value} | _fields(entry))
            try:
                rows.append(Policy.model_validate(fields, context=extra))
            except ValueError as error:
                where = label(f"{section.value}.{name.value}")
                faults.add(f"{path}:{entry.start_mark.line + 1}: {where}", error)
    faults.refuse()  # a mapping has an entry, so there are rows or faults
    _tell(path, extra)
    return rows


def _pairs(node, path: str | Path, name: str, faults: Faults) -> list:
    """(key, value) nodes of a mapping whose keys are words, each once; else a fault."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    first = {}  # name -> its key
    wrong = [key for key, _ in pairs if not isinstance(key, yaml.ScalarNode)
             or first.setdefault(key.value, key) is not key]  # fmt: skip
    if wrong or not pairs:
        line = (wrong or [node])[0].start_mark.line + 1 if node else 1
        faults.append(f"{path}:{line}: {label(name)}: wants a mapping of names, each once")
        return []
    return pairs


def _fields(entry) -> dict:
    """A policy's fields from its YAML node, every scalar as the text that stands there."""
    null = "tag:yaml.org,2002:null"
    if isinstance(entry, yaml.ScalarNode) and entry.tag != null:
        return {"text": entry.value}
    if not isinstance(entry, yaml.MappingNode):
        return {}  # a list, say: the field `text` is missing
    return {key.value: value.value if isinstance(value, yaml.ScalarNode) and value.tag != null
            else [item.value for item in value.value] if isinstance(value, yaml.SequenceNode)
            else None  # for the field to refuse
            for key, value in entry.value if isinstance(key, yaml.ScalarNode)}


def write_users(path: str | Path, rows: Iterable[Record]) -> None:
    """Write records as JSONL, only with the fields that were given: they read back equal."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(row.model_dump_json(exclude_unset=True) + "\n")


write_impressions = write_dialogues = write_catalogue = write_users


def split_users(user_ids: Iterable[str], shares: dict[str, float], seed: int) -> dict[str, str]:
    """Assign each user to a split by a hash of its id: adding users moves nobody."""
    names, ends = list(shares), list(itertools.accumulate(shares.values()))
    result = {}
    for user_id in user_ids:
        bits = hashlib.sha256(f"{seed}/{user_id}".encode()).digest()[:8]  # hash() is salted
        point = int.from_bytes(bits, "big") / 2**64 * ends[-1]  # in [0, sum of shares]
        # The last 64-bit point may round up to the sum itself.
        result[user_id] = names[min(bisect.bisect_right(ends, point), len(names) - 1)]
    return result


def cut_sessions(user: User, share: float) -> tuple[list[Session], list[Session]]:
    """Return (history, future): the first `share` of the sessions, rounded up, and the rest.

    From two sessions on neither side is empty; a single session is history.
    """
    n = len(user.sessions)  # up: of 2 sessions at .4 one is history
    k = math.ceil(round(share * n, 6))  # 0.55 * 100 is 55.000000000000007
    k = min(max(1, k), n - 1) if n > 1 else n  # n = 0: a user of whom only a profile is told
    return user.sessions[:k], user.sessions[k:]


def cut_time(user: User, share: float) -> datetime | None:
    """Return when the future of `cut_sessions` begins; None if there is none or it has no time."""
    future = cut_sessions(user, share)[1]
    return future[0].timestamp if future else None
