"""The roles played by a real LLM: teacher, matcher, judge, summariser; and how answers are read.

    python train.py roles.teacher=endpoint endpoint.model=NAME endpoint.base_url=http://host:8000/v1

Paper: Tables 4 and 5 (their rules; the prompts, prompts.yaml, are our own). User text leaves as
JSON in which no markup survives. Departures: the matcher asks about the nearest later summaries
only, and gives no rationale; the judge is asked in both orders, as place sways an LLM.
E earlier and L later summaries.
"""

import itertools
import json
import re
from collections.abc import Callable

import numpy as np

import llm
from data import Dialogue, Message, QualityCase
from roles import quality
from roles.chat import Chat, Request, encodable
from roles.text import Encode, cosines, is_functional, lexicon, read_yaml, same_text

# Of the later summaries an LLM is asked about the nearest few only: three calls a summary, not all.
CANDIDATES = 3
FLOOR = 0.3  # cosine; of what rules.py takes for a match by a shared phrase none lies lower
HISTORY = 100  # latest summaries that the judge sees
RETRIES = 3  # of a call that judges quality; QualEQS, appendix E
ROOM = 4000  # characters of a session that the summariser sees: about 1,000 tokens


def data_block(**fields) -> str:
    """A block that its text cannot leave: one line of JSON without markup, between tags."""
    text = llm.plain(encodable(json.dumps(fields, ensure_ascii=False)))
    text = re.sub(r"\[(/?[A-Z_]+)\]", r"(\1)", text)  # control tokens of Mistral: [/INST]
    return f"<data>\n{text}\n</data>"


# ------------------------------------------------------------------- readers: text in, value out


def _answer_part(text: str) -> str:
    answer = llm.after_reasoning(text)
    if answer is None:  # cut in its thoughts, which may name any answer
        raise ValueError("reasoning without an end")
    return answer.strip()


def word_reader(values: dict) -> Callable:
    """A reader of answers that begin with one of these words, a reason behind it or not."""
    # "MATCH or DIFFERENT" is no answer.
    begin = re.compile(rf"[\W_]*({'|'.join(values)})(?!\w|\W+or\b)", re.IGNORECASE)

    def read(text: str):
        match = begin.match(_answer_part(text))
        if not match:
            raise ValueError(f"none of {[*values]}")
        return values[match[1].upper()]

    return read


def read_starters(text: str) -> str:
    """The text with the line's end of a whole one, if llm.parse_starters finds starters in it."""
    if reason := llm.parse_starters(text := f"{text}\n").reason:  # what is cut short has failed
        raise ValueError(reason)  # not kept: asked again
    return text


def read_line(text: str) -> str:
    """The first line with content, without bullet and quotes, cut to 200 characters. No refusal."""
    for line in map(llm.clean_starter, _answer_part(text).splitlines()):
        if any(map(str.isalnum, line)) and line[-1] not in ":：":  # "Here is the line:"
            if lexicon()["patterns"]["refusal"].match(line):
                break  # a refusal is no summary
            return line[:200].rstrip()
    raise ValueError("no line")


_MARKS = re.compile(r"\W*(\d+)\W+(yes|no)\W+(yes|no)\W+(yes|no)\W*$", re.IGNORECASE)


def read_marks(text: str) -> list[tuple[float, ...]]:
    """The marks of suggestions 1, 2, ... from lines such as `1 yes yes no`."""
    found = [match for line in _answer_part(text).splitlines() if (match := _MARKS.match(line))]
    if not found or [int(match[1]) for match in found] != [*range(1, len(found) + 1)]:
        raise ValueError("no marks")
    return [tuple(float(word.lower() == "yes") for word in match.groups()[1:]) for match in found]


# ------------------------------------------------------------------------------------------ roles


def _system(role: str) -> str:
    prompts = read_yaml("prompts.yaml")  # every one ends with how the data is to be taken
    return f"{prompts[role]}\n\n{prompts['data']}"


class Prompted:
    """An LLM that plays every role; a None in what it returns: that call failed."""

    def __init__(self, chat: Chat, encode: Encode):
        self.chat, self.encode = chat, encode

    def _ask(self, role: str, read: Callable, blocks: list[str], numbers: list[int] | None = None,
             temperature: float = 0.0) -> list:
        """What `read` makes of the answer to each block; numbers: of repeated draws, if any."""
        numbers, system = numbers or [0] * len(blocks), _system(role)
        return self.chat.ask([Request(system, block, number, temperature)
                              for block, number in zip(blocks, numbers, strict=True)], read)

    def _choose(self, role: str, values: dict[str, float], inputs: list[dict]) -> list:
        """The value of the word that is answered to each input, the fields of a data block."""
        system, words = _system(role), tuple(values)
        return self.chat.ask([
            Request(system, data_block(**fields), choices=words,
                    neutral=data_block(**{name: type(field)() for name, field in fields.items()}))
            for fields in inputs], word_reader(values))

    def write(self, inputs: list[list[str]], n: int, numbers: list[int]) -> list[str | None]:
        """`<think> .. </think><sug> a && b </sug>` for the interests of each input.

        numbers: of the draw, per input, which tell repeated draws apart.
        """
        count = max(5, min(20, 2 * n))  # twice the list, as filters will take some; Table 4: 5-20
        blocks = [f"{count} suggestions, please.\n{data_block(interests=i)}" for i in inputs]
        temperature = self.chat.backend.temperature  # lists of one input are to differ
        return self._ask("teacher", read_starters, blocks, numbers, temperature)

    def match(self, jobs: list[tuple[list[str], list[str]]]) -> list[np.ndarray]:
        """int8 (E, L) of each job (earlier, later): 1 match, 0 none, -1 unknown: the call failed.

        The same text matches unasked, and settles its row: the label is whether any is a match.
        """
        matches = [self._unasked(*job) for job in jobs]
        inputs = [{"earlier": earlier[i], "later": later[j]}
                  for (earlier, later), labels in zip(jobs, matches, strict=True)
                  for i, j in np.argwhere(labels < 0)]
        said = iter(self._choose("matcher", {"MATCH": 1, "DIFFERENT": 0}, inputs))
        for labels in matches:  # in the order of argwhere
            answers = list(itertools.islice(said, int((labels < 0).sum())))
            labels[labels < 0] = [-1 if answer is None else answer for answer in answers]
        return matches

    def _unasked(self, earlier: list[str], later: list[str]) -> np.ndarray:
        """(E, L): 1 the same text, 0 too far apart, a chore or in a settled row, -1 to be asked."""
        if not earlier or not later:
            return np.zeros((len(earlier), len(later)), np.int8)
        labels = same_text(earlier, later).astype(np.int8)
        chore = np.array([*map(is_functional, earlier)])  # (E,)
        labels[chore] = 0  # it may come again and again without being an interest
        cosine = cosines(self.encode, earlier, later)  # (E, L)
        cosine[labels.any(1) | chore] = -np.inf  # rows of which nothing is asked
        nearest = np.argsort(-cosine, axis=1, kind="stable")[:, :CANDIDATES]
        place = np.arange(len(earlier))[:, None], nearest  # (E, 1), (E, CANDIDATES)
        labels[place] = np.where(cosine[place] >= FLOOR, -1, labels[place])
        return labels

    def compare(self, rows: list[tuple[list[str], list[str], list[str]]],
                role: str = "judge") -> list[float | None]:
        """(history, a, b) -> 1.0 if a wins, 0.0 if b does, 0.5 for a tie or two opinions."""
        # Each pair in both orders: who is preferred by place alone ties; swapping swaps the answer.
        inputs = [{"history": history[-HISTORY:], "alpha": alpha, "beta": beta}
                  for history, a, b in rows for alpha, beta in ((a, b), (b, a))]
        won = self._choose(role, {"ALPHA": 1.0, "BETA": 0.0, "TIE": 0.5}, inputs)
        return [None if first is None or second is None else first if first == 1 - second else 0.5
                for first, second in zip(won[::2], won[1::2], strict=True)]

    def prefer(self, rows: list[tuple[list[str], list[str], list[str]]]) -> list[float | None]:
        """(a person's queries, next queries a, b) -> as `compare`."""
        return self.compare(rows, "suggestion_judge")

    def qualify(self, rows: list[tuple[list[str], str]]) -> list[float | None]:
        """(a person's queries, a next query) -> 1.0 if it is fit to be offered, else 0.0."""
        inputs = [{"queries": queries[-HISTORY:], "suggestion": new} for queries, new in rows]
        return self._choose("qualifier", {"GOOD": 1.0, "BAD": 0.0}, inputs)

    def summarise(self, sessions: list[list[Message]]) -> list[str | None]:
        """One line per session."""
        blocks = [data_block(messages=_excerpt(messages)) for messages in sessions]
        return self._ask("summariser", read_line, blocks)

    def quality(self, rows: list[tuple[Dialogue, list[str]]], shop: quality.Rules,
                cases: list[QualityCase] = ()) -> list[list[quality.Verdict]]:
        """As quality.Rules.quality; nan where a call failed, RETRIES repetitions included.

        shop: tells the LLM about goods and policies; cases: shown after those of prompts.yaml.
        """
        prompts = read_yaml("prompts.yaml")
        shown = [QualityCase.model_validate(case) for case in prompts["quality_cases"]]
        examples = "\n".join(json.dumps(case.model_dump(), ensure_ascii=False)
                             for case in [*shown, *cases])
        system = f"{prompts['quality']}\n\nExamples:\n{examples}\n\n{prompts['data']}"
        blocks = [data_block(
            conversation=[{"role": turn.role, "text": turn.content} for turn in dialogue.turns],
            shop=shop.excerpt(dialogue, suggestions),
            suggestions={str(i): text for i, text in enumerate(suggestions, 1)},
        ) for dialogue, suggestions in rows]
        marks = {i: [] for i, (_, suggestions) in enumerate(rows) if not suggestions}
        for attempt in range(1 + RETRIES):
            todo = [i for i in range(len(rows)) if i not in marks]
            # Where nothing is drawn at random, the same question would get the same answer.
            temperature = self.chat.backend.temperature if attempt else 0.0
            said = self.chat.ask([Request(system, blocks[i], attempt, temperature)
                                  for i in todo], read_marks) if todo else []
            marks |= {i: answer for i, answer in zip(todo, said, strict=True)
                      if answer and len(answer) == len(rows[i][1])}
        # The rule says what answers a suggestion; the LLM, whether it is a good one.
        rules = shop.quality(rows)
        return [[quality.Verdict(*mark, source=rule.source) for mark, rule
                 in zip(marks[i], rules[i], strict=True)] if i in marks
                else [quality.FAILED] * len(suggestions)
                for i, (_, suggestions) in enumerate(rows)]


def _excerpt(messages: list[Message]) -> list[dict[str, str]]:
    """Messages in order; the user's are given room first, the others what is left."""
    room, texts = ROOM, {}  # place in the session -> what is shown of it
    for i in sorted(range(len(messages)), key=lambda i: messages[i].role != "user"):
        texts[i] = messages[i].content[:room]
        room -= len(texts[i])
    return [{"role": m.role, "text": texts[i]} for i, m in enumerate(messages) if texts[i]]
