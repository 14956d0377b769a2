"""What the generator reads, as tokens: interests or turns -> prompt, starters -> completion.

    prompt = llm.encode_prompt(tokenizer, ["Night trains"], 5, "Suggest {n} starters.", 320)

Whatever a user or a model wrote is data: none of it becomes a control token of the chat template.
"""

import functools
import re
from datetime import datetime

from files import UserError
from llm.starters import format_starters, plain

Ids = list[int]  # the tokens of a text
# The day in chat templates that name one (Llama 3.2): a prompt is to be the same in training and
# serving. No function can be passed to a template; a macro hides that of transformers. A server
# that applies the template itself has its own clock.
DAY = datetime(2024, 7, 26)
FORMATS = "".join(f"|replace('%{c}', '{DAY:%{c}}')" for c in "aAbBdmyYjHIMSp")
CLOCK = "{% macro strftime_now(text) %}{{ text" + FORMATS + " }}{% endmacro %}"
ORDINARY = re.compile(r"[\w\s▁]+|.", re.DOTALL)  # an added token that commands nothing


def encode_prompt(
    tokenizer, interests: list[str], n: int, instruction: str, max_tokens: int
) -> Ids:
    """Chat template + instruction + one line an interest -> ids, max_tokens at most.

    The lines stand in place of `{interests}` in the instruction, else behind it.
    """
    # The template is encoded apart from the user's text, whose control tokens are never parsed.
    head, tail = user_turn(tokenizer, *around_interests(instruction, n))
    return head + _encode_lines(tokenizer, interests, max_tokens - len(head) - len(tail)) + tail


def encode_conversation(
    tokenizer, turns: list[tuple[str, str]], begin: str, end: str, room: int
) -> tuple[Ids, int]:
    """Chat template around `begin`, a line a turn and `end` -> ids; and how many turns were cut.

    turns: (role, text), at least one of the user; room: tokens of all turns. What does not fit is
    left out from the front by whole turns; of the last exchange, which stays, the ends are.
    """
    if room < 2:  # of a query and an answer; else all conversations would read alike
        raise UserError("generator.max_prompt_tokens: no room for a conversation; raise it")
    head, tail = user_turn(tokenizer, begin, end)
    lines = [encode_text(tokenizer, f"\n{who.capitalize()}: {plain(text)}") for who, text in turns]
    last = max(i for i, (role, _) in enumerate(turns) if role == "user")
    answers = [token for line in lines[last + 1 :] for token in line]
    # The query first: an answer is long, and says at its beginning what it is about.
    query = lines[last][: room // 2 if answers else room]
    latest = query + answers[: room - len(query)]
    cut, first = int(len(latest) < len(lines[last]) + len(answers)), last
    while first and len(latest) + len(lines[first - 1]) <= room:
        first -= 1
        latest = lines[first] + latest
    return head + latest + tail, cut + first


def prompt_text(tokenizer, interests: list[str], n: int, instruction: str, max_tokens: int) -> str:
    """The user's turn of encode_prompt, for a server that applies the chat template itself."""
    begin, end = around_interests(instruction, n)
    room = max_tokens - sum(map(len, user_turn(tokenizer, begin, end)))
    lines = tokenizer.decode(_encode_lines(tokenizer, interests, room))  # cut as encode_prompt cuts
    for control in _control_tokens(tokenizer).values():  # the server would parse a whole one
        lines = lines.replace(control, f"{control[0]} {control[1:]}")
    return begin + lines + end


def around_interests(instruction: str, n: int) -> tuple[str, str]:
    """What an instruction to write n starters says before the interests, and behind them."""
    begin, _, end = instruction.replace("{n}", str(n)).partition("{interests}")
    return begin, end


def user_turn(tokenizer, begin: str = "", end: str = "") -> tuple[Ids, Ids]:
    """Ids of a user's turn before and behind a text: chat template with `begin`, `end` with it.

    The template's own system prompt stays: the model was tuned with it, and a server adds it too.
    """
    mark = "\x00"  # stands in no template, and no template alters it
    if not tokenizer.chat_template:  # a base model: only the tokenizer knows whether it wants BOS
        head = tokenizer.encode(begin, add_special_tokens=False)
        bos = [i for i in tokenizer.encode("a")[:1] if i == tokenizer.bos_token_id]
        return bos + head, _encode_part(tokenizer, end + "\n")
    template, turn = tokenizer.get_chat_template(), [{"role": "user", "content": mark}]
    if "strftime_now" in template:
        template = CLOCK + template
    text = tokenizer.apply_chat_template(
        turn, chat_template=template, tokenize=False, add_generation_prompt=True)
    before, after = text.split(mark)
    head = tokenizer.encode(before + begin, add_special_tokens=False)
    return head, _encode_part(tokenizer, end + after)


def _encode_lines(tokenizer, interests: list[str], room: int) -> Ids:  # room: tokens
    """Whole lines, from the first on as many as fit: callers order them by importance."""
    if room < 1 and interests:
        raise UserError("generator.max_prompt_tokens: there is no room for an interest; raise it")
    body: Ids = []
    for interest in interests:
        line = encode_text(tokenizer, f"\n- {plain(interest)}")
        if len(body) + len(line) > room:
            return body or line[:room]  # one interest, even if it must be cut
        body += line
    return body


def encode_text(tokenizer, text: str) -> Ids:
    """Ids of somebody's text, among which is no control token, whatever the text says."""
    ids = _encode_part(tokenizer, text, split_special_tokens=True)
    # split_special_tokens leaves out special tokens only, not the others that were added
    # (<tool_call> of Qwen2.5): a text with one of these is encoded a character at a time.
    control = _control_tokens(tokenizer)
    if control.keys().isdisjoint(ids):
        return ids
    characters = (c for c in text if c not in control.values())
    return [i for c in characters for i in _encode_part(tokenizer, c, split_special_tokens=True)]


def _encode_part(tokenizer, text: str, **how) -> Ids:
    """Ids of text that goes on from other text, of which a tokenizer does not know."""
    how["add_special_tokens"] = False
    # SentencePiece (Llama 2, Mistral) puts a space before whatever it is given: here before a line
    # break, and both are dropped, unless the break merges with the text.
    if tokenizer.tokenize("a") != ["a"]:
        lead = tokenizer.encode("\n", **how)
        ids = tokenizer.encode("\n" + text, **how)
        if ids[: len(lead)] == lead:
            return ids[len(lead) :]
    return tokenizer.encode(text, **how)


@functools.lru_cache(maxsize=4)  # of a few hundred in some tokenizers
def _control_tokens(tokenizer) -> dict[int, str]:
    """Added tokens that a text must not contain: not words, line breaks (Gemma) or spaces (Phi)."""
    added = tokenizer.added_tokens_decoder.items()
    return {i: t.content for i, t in added if t.special or not ORDINARY.fullmatch(t.content)}


def encode_completion(tokenizer, starters: list[str]) -> Ids:
    """Ids of `<sug> a && b </sug>` and the end token."""
    return encode_text(tokenizer, format_starters(starters)) + [tokenizer.eos_token_id]
