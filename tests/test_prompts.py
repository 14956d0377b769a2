"""The parser and writer of starters: any string parses, in linear time, or gives a reason."""

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llm
from config import load_config
from roles.writer import Writer

MARKUP = st.lists(
    st.sampled_from(
        [
            "<sug>",
            "</sug>",
            "<think>",
            "</think>",
            "&&",
            " a b",
            "1. ",
            '"',
            "\x00",
            "三体?",
            "\n- ",
            "**",
            "`",
            "_",
            "[",
            "]",
            "{",
            "\\",
            ",",
            ":",
            "&amp;",
            "＆",
            "２．",
            "[THINK]",
            "◁/think▷",
        ]
    ),
    max_size=30,
).map("".join)


@given(st.text() | MARKUP)
def test_parser_never_raises_and_gives_a_reason_exactly_for_nothing(text):
    parsed = llm.parse_starters(text)
    assert (parsed.reason is None) == bool(parsed.starters)
    assert all(s == s.strip() and "&&" not in s and "\x00" not in s for s in parsed.starters)


@pytest.mark.parametrize(
    "text, starters",
    [
        ("<think>x <sug>no</sug></think><sug> a b && c d </sug>", ("a b", "c d")),
        ('<sug>old</sug> <sug>1. new one && "two"</sug><sug>cut', ("new one", "two")),
        ("</think><sug> whole one? && cut sh", ("whole one?",)),
        ("<sug>first && last is whole?", ("first", "last is whole?")),
        ("<sug> a b && c d </sug>\nThe <sug> </sug> tags hold the starters.", ("a b", "c d")),
        ("nothing", ()),
        ("<sug> && </sug>", ()),
        ("<sug>cut", ()),
    ],
)
def test_parser_cases(text, starters):
    assert llm.parse_starters(text).starters == starters


@pytest.mark.parametrize("begin", ["", "<sug>", "[", '["', "{"])
def test_parser_is_linear(begin):
    parts = ["<sug>", "&& ", "1. ", '"', "</sug>", '- "', "[", '{"a":', "**", "**a", "*a ", "`",
             '", "', "', '", "\\", '"\\', "&amp;", "\n", "\n- ", "\n\n1. ", "Sure, ", "| ", "_",
             "</think>", "<|", "a:", "a: [", "assistantfinal", "<|channel|>final", "a b\n",
             "1. a 2. b ", " ", "? a b", "; a b c", "① a", "a) ", "\t", "?", "; Ab", ". Abcd",
             "。三", "1. a\n - b.", "**a** ", "[a] ", "(", "more ", "here are "]  # fmt: skip
    for part in parts:
        began = time.process_time()
        llm.parse_starters(begin + part * (60_000 // len(part)))
        assert time.process_time() - began < 2, part


# A starter of words only: none of it looks like a mark, a number or an end of a sentence.
STARTER = st.lists(
    st.sampled_from("Quiz Dune tram R&D C++ 三体 don't A* 3.5 __init__ co-op".split()),
    min_size=2, max_size=5,
).map(lambda words: " ".join(["Why", *words]) + "?")  # fmt: skip
STARTERS = st.lists(STARTER, min_size=2, max_size=6, unique=True)
FORMS = {
    "field": lambda y: f"<sug> {' && '.join(y)} </sug>",
    "full-width": lambda y: f"<sug> {' ＆＆ '.join(y)} </sug>",
    "escaped": lambda y: f"<sug> {' &amp;&amp; '.join(y)} </sug>",
    "lines in a field": lambda y: "<sug>\n" + "\n".join(y) + "\n</sug>",
    "a field each": lambda y: "\n".join(f"<sug> {s} </sug>" for s in y),
    "opened by the server": lambda y: " && ".join(y) + " </sug>",
    "bare lines": "\n".join,
    "loose": " && ".join,
    "numbers": lambda y: "\n".join(f"{i}. {s}" for i, s in enumerate(y, 1)),
    "brackets": lambda y: "\n\n".join(f"({i}) {s}" for i, s in enumerate(y, 1)),
    "full-width numbers": lambda y: "\n".join(f"{'１２３４５６'[i]}．{s}" for i, s in enumerate(y)),
    "Chinese numbers": lambda y: "\n".join(f"{'一二三四五六'[i]}、{s}" for i, s in enumerate(y)),
    "numbers in a line": lambda y: " ".join(f"{i}. {s}" for i, s in enumerate(y, 1)),
    "numbers in a field": lambda y: f"<sug> {FORMS['numbers in a line'](y)} </sug>",
    "letters in a line": lambda y: " ".join(f"{'abcdef'[i]}) {s}" for i, s in enumerate(y)),
    "letters": lambda y: "\n".join(f"{'ABCDEF'[i]}) {s}" for i, s in enumerate(y)),
    "keycaps": lambda y: " ".join(f"{i}️⃣ {s}" for i, s in enumerate(y, 1)),
    "circles": lambda y: "".join(f"{'①②③④⑤⑥'[i]}{s}" for i, s in enumerate(y)),
    "numeric entities": lambda y: f"<sug> {' &#38;&#38; '.join(y)} </sug>",
    "three &": lambda y: f"<sug> {'&&&'.join(y)} </sug>",
    "bold numbers": lambda y: "\n".join(f"**{i}. {s}**" for i, s in enumerate(y, 1)),
    "answers": lambda y: "\n".join(f"A: {i}. {s}" for i, s in enumerate(y, 1)),
    "answers in a field": lambda y: "<sug> " + " && ".join(
        f"Answer: {i}) {s}" for i, s in enumerate(y, 2)) + " </sug>",
    "told, from two on": lambda y: "You can ask me: " + " ".join(f"{i}. {s}" for i, s in
                                                                 enumerate(y, 2)),
    "numbers between &&": lambda y: f"<sug> {y[0]} && " + " ".join(
        f"{i}. {s}" for i, s in enumerate(y[1:], 1)) + " && </sug>",
    "labels": lambda y: "\n".join(f"Question {i}: {s}" for i, s in enumerate(y, 1)),
    "explained": lambda y: "\n".join(f"{i}. **{s}**\n   - As you like it." for i, s in
                                     enumerate(y, 1)),
    "bullets": lambda y: "\n".join(f"* {s}" for s in y),
    "quotes": lambda y: "\n".join(f'- "{s}"' for s in y),
    "quoted line": lambda y: ", ".join(f'"{s}"' for s in y),
    "JSON": json.dumps,
    "JSON, a line each": lambda y: json.dumps(y, indent=2, ensure_ascii=False),
    "JSON in a field": lambda y: f"<sug>{json.dumps(y)}</sug>",
    "JSON object": lambda y: json.dumps({"starters": y, "language": "en"}),
    "JSON objects": lambda y: json.dumps([{"id": 1, "tags": ["a", "b"], "text": s} for s in y]),
    "JSON lines": lambda y: "\n".join(json.dumps({"question": s}) for s in y),
    "Python": lambda y: f"starters = {y!r}",
    "fence": lambda y: "```json\n" + json.dumps(y) + "\n```",
    "plain fence": lambda y: "```\n" + FORMS["numbers"](y) + "\n```",
    "HTML": lambda y: "<ul>" + "".join(f"<li>{s}</li>" for s in y) + "</ul>",
}  # fmt: skip
BEFORE = ["", "Here are five starters:\n\n", "Sure! Here you go:\n", "以下是建议：\n", "## Five\n"]
BEHIND = ["", "\n\nI hope this helps!", "\n", "<|im_end|>", "</s>"]
REASONING = [
    "", "<think>1. a draft\n2. b</think>\n", "<sug> a && b </sug></think>", "[THINK]x[/THINK]",
    "<thinking>x</thinking>", "<reasoning>\n- a?\n- b?\n</reasoning>\n", "◁think▷x◁/think▷",
    "<seed:think>x</seed:think>", "<|START_THINKING|>x<|END_THINKING|>", "<thought>x</thought>",
    "<|begin_of_thought|>x<|end_of_thought|>", "analysisWe think.assistantfinal",
    "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>",
    "Here is my thought process: x\nHere is my response:\n", "<unused94>thought\nx<unused95>",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@given(STARTERS, st.sampled_from(REASONING), st.sampled_from(BEFORE), st.sampled_from(BEHIND))
@settings(max_examples=15)
def test_lists_in_the_forms_that_models_write(form, starters, reasoning, before, behind):
    text = reasoning + before + FORMS[form](starters) + behind
    assert llm.parse_starters(text).starters == tuple(starters), text


@pytest.mark.parametrize("form", FORMS)
@given(STARTERS, st.integers(1, 200))
@settings(max_examples=15)
def test_a_list_cut_anywhere_gives_whole_starters_only(form, starters, cut):
    """Also where its end is not known to be one; never two starters as one."""
    read = llm.parse_starters(FORMS[form](starters)[:-cut]).starters
    assert read == tuple(starters[: len(read)]) or form == "Python"


@pytest.mark.parametrize("form", FORMS)
def test_requests_without_a_mark_at_their_end(form):
    starters = ["Quiz me on Dune", "Best Zelda dungeon order", "First steps in C++"]
    read = llm.parse_starters("Here you go:\n" + FORMS[form](starters)).starters
    assert read in (tuple(starters), tuple(starters[:2]))  # the last one may have been cut


ASKED = ("What makes ramen rich?", "Plan a rainy day in Kyoto", "Why is Dune long?")


@pytest.mark.parametrize("text", [
    "{}\n{}\n{}", "{} | {} | {}", "<answer>\n1. {}\n2. {}\n3. {}</answer>",
    '{{"starters": [{{"title": "a", "message": "{}"}}, {{"title": "b", "message": "{}"}},'
    ' {{"title": "c", "message": "{}"}}]}}',
    "{{'starters': ['{}', \"{}\", '{}']}}",
])
def test_a_request_between_questions_is_one_of_the_list(text):
    assert llm.parse_starters(text.format(*ASKED)).starters == ASKED


@pytest.mark.parametrize("end", [" 🍜", " (food)", "", '"', " :)"])
def test_what_stands_behind_a_sentence_does_not_cut_it(end):
    assert len(llm.parse_starters(f"1. {ASKED[0]}{end}\n2. {ASKED[2]}{end}").starters) == 2


def test_a_last_item_without_an_end_is_cut_unless_none_has_one():
    cut, titles = f"1. {ASKED[0]}\n2. {ASKED[1]}", "- Dune novels\n- Kyoto in rain\n- Ramen broth"
    assert llm.parse_starters(cut).starters == ASKED[:1]
    assert llm.parse_starters(f"{cut}\n").starters == ASKED[:2]  # as samplers say of a whole one
    assert len(llm.parse_starters(titles).starters) == 3


@pytest.mark.parametrize("text", [
    f"<sug>{ASKED[0]} and {ASKED[2]}</sug>", f"<sug>{ASKED[0]} or {ASKED[2]}</sug>",
    "<sug>¿Qué ver en Oporto? ¿Cómo suena Fourier?</sug>",
    "<sug>拉面的汤为什么浓？、给我讲讲三体的世界、周末去哪里玩？</sug>",
])
def test_questions_that_a_word_or_a_comma_joins_are_not_one(text):
    starters = llm.parse_starters(text).starters
    assert len(starters) > 1 and all(starter.count("?") < 2 for starter in starters)
    assert not any("、" in starter for starter in starters)
    assert "¿" not in text or all(starter[0] == "¿" for starter in starters)


@pytest.mark.parametrize("text", [
    "I'm sorry, but I can't help with that.", "I cannot do this.\n\nPlease ask again.",
    "Who made jazz? It was made in bars. Who came? Few people. Who paid for it?",
    "Jazz began in New Orleans. It has many forms.\n\nWhat is bebop? A fast one.", "Hello", "What?",
    "# Jazz\n\nIt began long ago,\nwhen nobody wrote.", "对不起，我不能帮你。",
    "<think> 1. a?\n2. b?",
    "Run `make && make install` to build it.", "1. " + "A long way to say it. " * 20,
    "[THINK]1. a?",
    "<sug>[Quiz me on Dune, Best Zelda order]</sug>", '{"a": "x", "b": "y"}',
    "analysisThe user",
    "<|channel|>analysis<|message|>1. Why?\n2. Who?", "<think>a</think>", "{'text': 'a'}",
    "```\n```",
])  # fmt: skip
def test_what_is_no_list_gives_a_reason(text):
    parsed = llm.parse_starters(text)
    assert not parsed.starters and parsed.reason


@pytest.mark.parametrize("marked, bare", [
    ("**Quiz me**", "Quiz me"), ("*Quiz me*", "Quiz me"), ("`git rebase` it", "git rebase it"),
    ("__Quiz me__", "Quiz me"), ("_Quiz me_", "Quiz me"), ("***Quiz me***", "Quiz me"),
    ("## Quiz me", "Quiz me"), ("> Quiz me", "Quiz me"), ("- [ ] Quiz me", "Quiz me"),
    ("1. **Quiz me**", "Quiz me"), ("**1.** Quiz me", "Quiz me"), ('**"Quiz me"**', "Quiz me"),
    ("Quiz me on **Dune**", "Quiz me on Dune"), ("１、三体", "三体"), ("１．Quiz", "Quiz"),
    ("2) Quiz", "Quiz"), ("1️⃣ Quiz", "Quiz"), ('"Quiz me",', "Quiz me"), ("[Quiz me]", "Quiz me"),
    ("Q1: Quiz", "Quiz"), ("问题２：三体", "三体"), ("How do *args and **kwargs work", None),
    ("What is 2 * 3 * 4", None), ("Teach me A*", None), ("3.5 mm jacks", None), ("C# or F#", None),
    ("A: 2. Quiz", "Quiz"), ("You can ask me: 2. Quiz me", "Quiz me"), ("Answer: Quiz", "Quiz"),
    ("Q: Quiz", "Quiz"), ("1. A: Quiz", "Quiz"), ("回答：三体", "三体"), ("Dune: the films", None),
    ("Alien 3: why so bleak", None), ("Fate 2. 0 or Go", None), ("Q:A ratio in chess", None),
    ("__init__ or __new__", None), ("snake_case or camelCase", None), ("10:30 trains", None),
])  # fmt: skip
def test_marks_around_a_starter(marked, bare):
    assert llm.clean_starter(marked) == (bare or marked)
    assert llm.parse_starters(f"<sug> {marked} && c d </sug>").starters == (bare or marked, "c d")


@pytest.mark.parametrize("text, kept", [
    (",", ""), ("…!?", ""), ("🎉🎉", ""), ("&", ""), ("- —", ""), ("⭐", ""), ("、。", ""),
    ("C++", "C++"), ("5G", "5G"), ("🎉 party", "🎉 party"), ("π", "π"), ("½", "½"), ("茶", "茶"),
    ("हिन्दी", "हिन्दी"), ("ไทย", "ไทย"), ("한국어", "한국어"),
])  # fmt: skip
def test_what_has_neither_letter_nor_digit_is_no_starter(text, kept):
    assert llm.clean_starter(text) == kept
    parsed = llm.parse_starters(f"<sug> {text} && a b </sug>").starters
    assert parsed == (*filter(None, [kept]), "a b")


@example([",\t"])
@example(["0,\t"])
@example(["a, \x00;\u3000、"])
@example(["[Jazz] (I) 0"])
@example(['"(I) 0"'])
@given(st.lists(st.text() | MARKUP, max_size=5))
@settings(max_examples=200)
def test_format_survives_the_parser(starters):
    once = llm.parse_starters(llm.format_starters(starters)).starters
    assert llm.parse_starters(llm.format_starters(once)).starters == once
    assert not any(set("<>") & set(s) for s in once)


@pytest.mark.parametrize("joint", [" ", "; ", "；", "、", " & ", " → ", "\t", " [SEP] ", "<sep>",
                                   " $$ "])  # fmt: skip
def test_questions_in_a_line_are_starters(joint):
    for starters in (("Who wrote Dune?", "Which Zelda first?", "Is Go hard?"),
                     ("三体讲了什么？", "塞尔达怎么玩？", "围棋难吗？")):
        text = joint.join(starters)
        assert llm.parse_starters(f"<sug> {text} </sug>").starters == starters
        assert llm.parse_starters(text).starters == starters  # of nothing but questions
        cut = llm.parse_starters(f"<sug> {text[:-2]}").starters
        assert cut in ((), starters[:2])


@pytest.mark.parametrize("starters", [
    ("Quiz me on Dune", "Best order of Zelda games", "First steps in C++ today"),
    ("三体讲了什么故事", "塞尔达怎么玩", "围棋很难学吗")])  # fmt: skip
def test_three_clauses_between_semicolons_are_starters(starters):
    for joint in ("; ", "；", " [SEP] ", "<sep>", "\t"):
        assert llm.parse_starters(f"<sug> {joint.join(starters)} </sug>").starters == starters


@pytest.mark.parametrize("joint", [" | ", " || ", "; ", ". ", "。"])
def test_two_whole_requests_are_starters(joint):
    starters = ("Plan a weekend in Porto", "Compare rye and sourdough")
    if joint == "。":
        starters = ("帮我规划波尔图行程", "教我修剪番茄")
    end = joint.strip() * (joint[0] in ".。")
    read = llm.parse_starters(f"<sug>{joint.join(starters)}{end}</sug>").starters
    assert read == tuple(starter + end for starter in starters)


@pytest.mark.parametrize("text", [
    "I have two cats. How do I part them?", "Who was St. John of the Cross.",
    "R&D at AC/DC", "Tom & Jerry & Spike", "Star Wars: Episode I", "What? Why me?",
    "Who? What? When?", "New York → Los Angeles → San Francisco", "Should I pick a) or b)",
    "Compare Star Trek; Star Wars; Dune", "推荐红楼梦、三国演义、水浒传", "比较三体；流浪地球",
    "What does [SEP] do in BERT?", "Why is $$e = mc^2$$ so famous?", "Rate 1️⃣ or 2️⃣",
    "How to solve $$ \\int \\sin x dx $$ by parts?", "Who wrote Dune? And why?", "Is it ② or ③?",
])  # fmt: skip
def test_honest_starters_stay_whole(text):
    assert llm.parse_starters(f"<sug> {text} </sug>").starters == (text,)
    assert llm.parse_starters(f"<sug> Quiz me && {text} </sug>").starters == ("Quiz me", text)


def test_numbers_behind_the_end_of_a_starter_part_it_though_some_are_left_out():
    text = "A: 1. How do trams work? 3. Why is Portal 2 short? 4. What is bop?"
    whole = ("How do trams work?", "Why is Portal 2 short?", "What is bop?")
    assert llm.parse_starters(text).starters == whole
    assert llm.parse_starters(f"<sug> {text} && Quiz me </sug>").starters == (*whole, "Quiz me")


def test_no_separator_stands_inside_a_starter():
    """A quote that goes from between two & leaves a separator behind."""
    assert llm.parse_starters('<sug> "a" &"& b && c </sug>').starters == ("a & b", "c")


# ------------------------------------------------------------------------- prompts of the methods

HISTORY = [f"Question {i} about <|im_end|> trains and <sug> bread" for i in range(200)]
LONG = "I have asked:{interests}\n\nNow list {n} more, each of them short, new, safe and specific."


@pytest.fixture
def writer(monkeypatch):
    """writer(*words): a Writer whose texts are the scripted ones; `asked` holds its prompts."""

    def make(*words):
        made = Writer(load_config(None, [f"generator.prompting={LONG}", *words]), ":memory:")
        made.asked = []
        monkeypatch.setattr(llm, "sample", lambda model, tokenizer, prompts, n, **how: [
            made.asked.append(prompt) or ["<sug> one starter && tw"] * n for prompt in prompts])
        monkeypatch.setattr(made, "policy", lambda adapter: None)
        return made

    return make


def test_only_the_base_without_an_adapter_is_told_at_length(writer, tmp_path):
    made = writer()
    decode = made.tokenizer.decode
    for adapter in (None, tmp_path):
        made.write(adapter, [["Night trains", "Sourdough"]], 2, 0)
    prompted, tuned = map(decode, made.asked)
    listed = "\n- Night trains\n- Sourdough"
    assert f"I have asked:{listed}\nNow list 5 more" in prompted and "{" not in prompted
    assert f"Suggest 5 conversation starters about these interests.{listed}<" in tuned
    for prompt, told in zip(made.asked, (True, False), strict=True):
        head = made.head(prompted=told)  # read once for all prompts of a batch
        assert prompt[: len(head)] == head and len(head) < len(prompt)


def test_the_shipped_instruction_is_short_and_says_how_many():
    made = Writer(load_config(None, ["generator.list_size=7"]), ":memory:")
    text = llm.prompt_text(made.tokenizer, ["Night trains"], 7, *made._task(True)[:1], 900)
    assert " 7 " in text and "{" not in text and "\n- Night trains\n" in text
    assert len(text.split()) < 120  # well under 200 tokens of any model


@pytest.mark.parametrize("most", [60, 200])
def test_a_long_instruction_leaves_the_interests_their_room(writer, most):
    made = writer(f"generator.max_prompt_tokens={most}")
    short, long = (made.prompt(HISTORY, prompted=told) for told in (False, True))
    decode = made.tokenizer.decode
    assert decode(short).count("\n- ") == decode(long).count("\n- ") >= 1
    assert len(short) <= most and len(short) < len(long)


def test_a_server_hears_what_the_model_here_reads(writer):
    """prompt_text through the chat template is encode_prompt, text behind the interests and all."""
    made = writer()
    interests = ["Night trains", "Sourdough"]
    said = llm.prompt_text(made.tokenizer, interests, 5, *made._task(True))
    turns = [{"role": "user", "content": said}]
    whole = made.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False)  # fmt: skip
    assert made.tokenizer.decode(whole) == made.tokenizer.decode(made.prompt(interests, True))


def test_a_list_is_drawn_once(writer):
    """However few of its starters are fit to show."""
    made = writer()
    assert made.write(None, [["Night trains"]], 2, 0) == [[["one starter"]] * 2]
    assert len(made.asked) == 1
