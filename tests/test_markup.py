"""Lists in the markup that instruction models write: starters whole and bare, none of the rest."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import llm

REQUESTS = ("Quiz me on Dune", "Best Zelda dungeon order", "First steps in Go")
QUESTIONS = ("Who wrote Dune?", "Which Zelda comes first?", "Is Go hard to learn?")
CHINESE = ("三体讲了什么故事？", "塞尔达该怎么玩？", "围棋怎么入门？")
TOPICS = ("Books", "Games", "Boards")


def rows(form: str, starters, marks=range(1, 9)) -> str:
    """A line each: {0} its mark, {1} the starter, {2} a topic."""
    return "".join(form.format(mark, starter, topic) + "\n"
                   for mark, starter, topic in zip(marks, starters, TOPICS, strict=False))


@pytest.mark.parametrize("form", [
    "{} - {}", "{}- {}", "#{} {}", "#{}: {}", "No. {} {}", "№{} {}", "{}º {}", "{}/ {}", "{} | {}",
    "<{}> {}", "【{}】{}", "Option {}: {}", "**Idea {}:** {}", "Idea {}\n{}", "第{}个：{}",
    "### Topic {}\n{}", "提案{}：{}", "Vorschlag {}: {}", "Tip {} – {}",
    "**{}** – {}", "{}.\n{}\n", "0{}. {}",
])  # fmt: skip
@pytest.mark.parametrize("starters", [REQUESTS, QUESTIONS])
def test_numbers_with_words_and_signs_around_them_are_marks(form, starters):
    assert llm.parse_starters(rows(form, starters)).starters == starters
    assert llm.parse_starters(f"<sug>\n{rows(form, starters)}</sug>").starters == starters


@pytest.mark.parametrize("marks", [
    "❶❷❸", "⓵⓶⓷", "➀➁➂", "⒈⒉⒊", "⑴⑵⑶", "㈠㈡㈢", "㊀㊁㊂",
    ("I.", "II.", "III."), ("i)", "ii)", "iii)"), ("a.", "b.", "c."),
    ("（一）", "（二）", "（三）"), ("ア.", "イ.", "ウ."),
    ("а)", "б)", "в)"), ("First,", "Second,", "Third,"), ("1st:", "2nd:", "3rd:"),
    ("第一，", "第二，", "第三，"), "⁃⁃⁃", "►►►", "➢➢➢",
    "・・・", "✅✅✅", "👉👉👉", "🚂🍞♟", ("👨‍🍳",) * 3, "~~~",
])  # fmt: skip
def test_ordinals_and_signs_that_begin_every_line_are_marks(marks):
    for starters in (REQUESTS, QUESTIONS):
        text = "Here you go:\n\n" + rows("{} {}", starters, marks)
        assert llm.parse_starters(text).starters == starters


@pytest.mark.parametrize("quotes", [
    "„“", "‚‘", "‹›", "»«", "『』", "｢｣", "〝〞", "＂＂", ("« ", " »"), ("``", "''"), "【】"])
def test_quotes_of_every_language_go_in_pairs(quotes):
    quoted = [f"{quotes[0]}{starter}{quotes[1]}" for starter in CHINESE]
    assert llm.parse_starters(rows("{}. {}", quoted)).starters == CHINESE
    assert llm.parse_starters(llm.format_starters(quoted)).starters == CHINESE


def table(names, *columns) -> str:
    body = (" | ".join(row) for row in zip(*columns, strict=True))
    return "".join(f"| {line} |\n" for line in [" | ".join(names), "|".join("---" for _ in names),
                                                *body])  # fmt: skip


DATA = {
    "table": table(("#", "Starter"), "123", QUESTIONS),
    "table with topics": table(("Interest", "**Suggested question**"), TOPICS, QUESTIONS),
    "Chinese table": table(("序号", "问题"), "123", QUESTIONS),
    "HTML table": "<table><tr><th>#</th><th>Starter</th></tr>" + "".join(
        f"<tr><td>{i}</td><td>{q}</td></tr>" for i, q in enumerate(QUESTIONS)) + "</table>",
    "CSV": "id,starter\n" + rows('{},"{}"', QUESTIONS),
    "TSV": "id\tstarter\n" + rows("{}\t{}", QUESTIONS),
    "YAML": "starters:\n" + rows("- id: {}\n  text: {}", QUESTIONS),
    "YAML of one field": rows('- text: "{1}"', QUESTIONS),
    "YAML with names": rows("starter_{}: {}", QUESTIONS),
    "XML": "<starters>" + rows('<starter id="{}">{}</starter>', QUESTIONS) + "</starters>",
    "XML of fields": rows("<item><topic>{2}</topic><question>{1}</question></item>", QUESTIONS),
    "numbered tags": rows("<sug{0}>{1}</sug{0}>", QUESTIONS),
    "HTML": f'<OL class="x">{rows("<LI><strong>{1}</strong></LI>", QUESTIONS)}</OL>',
    "JSON by interest": json.dumps(dict(zip(TOPICS, ([q] for q in QUESTIONS), strict=True))),
    "JSON beside a state": json.dumps({"status": "ok", "data": QUESTIONS}),
    "JSON in Chinese": json.dumps([{"主题": "书", "问题": q} for q in QUESTIONS]),
    "JSON with remarks": "[\n" + rows('"{1}", // {2}', QUESTIONS) + "]",
    "questions and answers": rows("Q: {1}\nA: So it is.\n", QUESTIONS),
    "bold ones": rows("**Question {}:** {}\n**Answer:** So it is.", QUESTIONS),
    "in a line": rows("Q: {1} A: So it is.", QUESTIONS),
    "of a chat": rows("User: {1}\nAssistant: So it is.", QUESTIONS),
}


@pytest.mark.parametrize("form", DATA)
def test_of_data_the_starters_alone_are_read(form):
    for text in (DATA[form], f"Here it is:\n\n```\n{DATA[form]}\n```\n\nEnjoy!"):
        assert llm.parse_starters(text).starters == QUESTIONS, text


HEADED = {
    "topics with a colon": rows("{0}. **{2}:**\n   - {1}", QUESTIONS),
    "topics": rows("{0}. {2}\n   - {1}", QUESTIONS),
    "bullets": rows("* {2}:\n    * {1}", QUESTIONS),
    "bold topics": rows("{0}. **{2}:** {1}", QUESTIONS),
    "topics and a dash": rows("- **{2}** – {1}", QUESTIONS),
    "remarks": rows("{0}. **{1}** This opens a talk about {2}.", QUESTIONS),
    "underlined": "Conversation Starters\n===\n\n" + rows("{1}", QUESTIONS),
    "in a field": "<sug>\n## Starters\n" + rows("{1}", QUESTIONS) + "</sug>",
    "glued to the first": f"<sug> Starters: {' && '.join(QUESTIONS)} </sug>",
    "a lead-in": f"<sug> Sure! Here are some ideas: {' && '.join(QUESTIONS)} </sug>",
    "a lead-in alone": f"<sug>Based on your interests: && {' && '.join(QUESTIONS)}</sug>",
    "a Chinese lead-in": f"<sug>以下是为您推荐的开场白：{'&&'.join(QUESTIONS)}</sug>",
    "in no field": f"These might interest you: {' && '.join(QUESTIONS)}\n",
    "German": f"Hier sind drei Vorschläge: {' && '.join(QUESTIONS)}\n",
    "without a colon": f"Here are three starters for you\n{rows('{1}', QUESTIONS)}",
    "an offer": f"<sug> {' && '.join(QUESTIONS)} && Let me know if you'd like more! </sug>",
    "a closing question": f"{rows('{1}', QUESTIONS)}\nWould you like more suggestions?",
    "a Chinese one": f"{rows('{1}', QUESTIONS)}\n您对哪个感兴趣？",
    "in JSON": json.dumps(["Conversation Starters:", *QUESTIONS]),
    "rules": rows("---\n{1}", QUESTIONS),
    "bold lines": rows("**{1}**", QUESTIONS),
}


@pytest.mark.parametrize("form", HEADED)
def test_a_heading_is_no_starter_and_a_remark_no_part_of_one(form):
    assert llm.parse_starters(HEADED[form]).starters == QUESTIONS


@pytest.mark.parametrize("form", [
    "{0}. **{1}** - to go deeper into {2}.", "{0}. **{1}** (of {2})", "{0}. **{2}:** {1}",
    "{0}. **{2}**：{1}", "{0}. [{2}] {1}", "{0}. ({2}) {1}", '{0}. "{1}" — builds on {2}',
    '{0}. "{1}" ({2})', '{0}. "{1}": you like {2}', "{0}. “{1}”——{2}",
    "{0}. **{2}**\n   - {1}\n   - Teach me more about {2}",
])
def test_requests_below_and_beside_a_topic_or_a_remark(form):
    starters = llm.parse_starters(rows(form, REQUESTS)).starters
    assert tuple(starter for starter in starters if "me more" not in starter) == REQUESTS
    assert len(starters) == 3 * form.count("1}") + 3 * form.count("more")


@pytest.mark.parametrize("text", [
    rows("{}. **{}**\n   - It is short.\n   - It suits you.", REQUESTS),
    rows("{}. {}\n   - Why: you asked\n   - Level: easy", ("Quiz me hard", "Sing", "Draw")),
    '1. "Gone with the Wind": a fresh look\n2. Compare it with Emma\n',
    "1. “Emma” — a satire\n2. “Persuasion” — a romance\n",
    "1. **C++** (2020 edition): what's new?\n2. **Kyoto** – Three days there\n",
    "1. (500) Days of Summer explained\n2. [REC] films in order\n",
])
def test_explanations_and_names_are_no_topics_and_remarks(text):
    whole = [line.split(". ", 1)[1] for line in text.splitlines() if line[0] in "123"]
    plain = text.maketrans("", "", '"“”*')
    assert [*llm.parse_starters(text).starters] == [line.translate(plain) for line in whole]


@pytest.mark.parametrize("begin, end", [
    ("<inner_monologue>", "</inner_monologue>"), ("<cot>", "</cot>"), ("<plan>", "</plan>"),
    ('<think type="x">', "</think>"), ("< think >", "< /think >"), ("<思考>", "</思考>"),
    ("<|think_start|>", "<|think_end|>"), ("&lt;think&gt;", "&lt;/think&gt;"),
    ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"), ("**Thinking:** ", "\n**Answer:**\n"),
])  # fmt: skip
def test_reasoning_is_left_out_in_any_mark(begin, end):
    draft = "They read.\n1. A bad draft here\n2. Another bad draft\n"
    assert llm.parse_starters(begin + draft + end + rows("{}. {}", REQUESTS)).starters == REQUESTS
    assert not llm.parse_starters(begin + draft).starters or begin.startswith("**")
    behind = f"{rows('{}. {}', REQUESTS)}\n{begin}good?{end}"
    assert llm.parse_starters(behind).starters == REQUESTS or begin.startswith(("**", "<|START"))


@pytest.mark.parametrize("text", [
    "\ufeff{0}", "\u200b{0}", "{0}\u2060", "\u200e{0}\u200e", "<0x0A>{0}", "{1}", "{2}", "{3}",
    "{4}",
])  # fmt: skip
def test_characters_of_no_width_and_other_line_ends_change_nothing(text):
    numbered = rows("{}. {}", REQUESTS)
    shy = " && ".join(starter[:6] + "\u00ad" + starter[6:] for starter in REQUESTS)
    forms = (numbered, numbered.replace("\n", "\r\n"), "\\n".join(numbered.splitlines()) + "\n",
             f"< sug > {shy} < /sug >", f"&lt;sug&gt; {shy} &lt;/sug&gt;")
    assert llm.parse_starters(text.format(*forms)).starters == REQUESTS
    joined = ("می‌خواهم شطرنج", "क्‍ष लिखें", "Cook like 👨‍🍳 do")  # some of them mean something
    assert llm.parse_starters(llm.format_starters(joined)).starters == joined


@pytest.mark.parametrize("joint", ["|", " / ", " // ", " · ", " * ", " ~ ", " ### ", " ◆ "])
def test_three_clauses_with_a_sign_between_them_are_starters(joint):
    for starters in (REQUESTS, QUESTIONS, CHINESE):
        assert llm.parse_starters(f"<sug> {joint.join(starters)} </sug>").starters == starters


@pytest.mark.parametrize("starter", [
    "What does \\n do in Python?", "Explain [REASONING] tags", "What are <think> tags for?",
    "What is a <div> for?", "I. M. Pei's best buildings", "1984: why read it", "x86 vs ARM",
    "Idea: what Plato meant", "Prompt engineering: first steps", "Season 1 of Dark in short",
    "None of the above: voting systems", "《三体》讲了什么？",
    "【新手】围棋怎么入门", "🎉 party ideas",
    "Half-Life 2 | the modding scene", "The Sims — a retrospective", "Explain `rm -rf` to me",
    "No questions asked: the film", "Based on a true story: Spotlight", "希望你给我讲个故事",
    "Which one is older, rye or spelt?", "Next question in set theory", "I can't help falling",
    "Would you like to see more kettles?",
    "Reasoning: induction vs deduction", "~/.bashrc tricks", "¿Qué ver en Sevilla?",
])  # fmt: skip
def test_signs_of_markup_in_an_honest_starter_are_its_own(starter):
    bare, others = starter.replace("`", ""), ("Quiz me on tea", "First steps in Go")
    for text in (f"<sug> {others[0]} && {starter} && {others[1]} </sug>",
                 rows("{}. {}", (others[0], starter, others[1])),
                 json.dumps([others[0], starter, others[1]])):
        if "<think>" not in text or "<sug>" in text:
            assert llm.parse_starters(text).starters == (others[0], bare, others[1])
    assert llm.parse_starters(f"<sug> {starter} </sug>").starters == (bare,)


@pytest.mark.parametrize("text", [
    "<sug>N/A</sug>", "<sug> none </sug>", "1. N/A\n2. N/A\n", "Conversation Starters\n\n",
    '{"error": "no interests given"}', "| a | b |\n|---|---|\n| c d e | f g h |\n",
    "Hello\nHow are you?\n", "以下是五个建议：\n",
    "<sug>Starter 1 && [topic 2] && [Insert question about tea]</sug>",
    "1. first message\n2. second message\n",
    "<sug> one suggestion && another && one more </sug>", "<sug>No starters available</sug>",
    "<sug>I'm sorry, but I can't help with that.</sug>", "<sug>很抱歉，我无法提供。</sug>",
    "1.\n2.\n", '{"starters": ["Quiz m', "Entschuldigung, das geht nicht.\n",
])  # fmt: skip
def test_where_there_is_no_starter_there_is_a_reason(text):
    parsed = llm.parse_starters(text)
    assert not parsed.starters and parsed.reason


# Forms of a list in one line, by how an item looks at its place (0, 1, 2); what stands between.
IN_A_LINE = {
    **{form: (lambda i, text, form=form: form.format(i + 1) + text, " ") for form in (
        "[{}] ", "{}. ", "{}) ", "({}) ", "【{}】", "［{}］", "**{}.** ", "{}、", "{}．",
        "{}）")},
    **{signs: (lambda i, text, signs=signs: signs[i] + text, "") for signs in (
        "①②③", "❶❷❸", "⒈⒉⒊", "㈠㈡㈢")},
    "full-width": (lambda i, text: "１２３"[i] + "．" + text, " "),
    "full-width, bracket": (lambda i, text: "１２３"[i] + "）" + text, " "),
    **{f"{pair} {between}": (lambda i, text, pair=pair: pair[0] + text + pair[1], between)
       for pair in ('""', "“”", "「」", "『』", "«»", "„“")
       for between in ("", " ", ", ", "、", " | ", " - ") if between or pair[0] != pair[1]},
    "» lines": (lambda i, text: "» " + text, "\n"),
    "《》 lines": (lambda i, text: f"《{text}》", "\n"),
}
VERBS = ("Explain", "Plan", "Quiz me on", "How do I begin with", "Compare", "Write about")
THINGS = ("dune sea", "the Zelda games", "sourdough and rye", "C++ templates", "trams of the 1950s",
          "Go 1.22 modules", "a 10-day hike", "Half-Life 2", "rock, paper, scissors", "my garden")
CLAUSES = ("三体的故事梗概", "塞尔达攻略推荐", "围棋入门练习", "如何规划京都之旅")


@st.composite
def three(draw):
    latin = st.builds("{} {}{}".format, st.sampled_from(VERBS), st.sampled_from(THINGS),
                      st.sampled_from(["", "?", " today", " in short"]))
    chinese = st.builds("{}{}".format, st.sampled_from(CLAUSES), st.sampled_from(["", "？"]))
    return tuple(draw(st.lists(draw(st.sampled_from([latin, chinese])), min_size=3, max_size=3)))


@given(three(), st.sampled_from([*IN_A_LINE]))
def test_what_was_joined_in_a_line_is_parted(starters, form):
    item, between = IN_A_LINE[form]
    line = between.join(item(i, text) for i, text in enumerate(starters))
    for text in (f"<sug> {line} </sug>", f"<sug>{line}\n</sug>", f"{line}\n", f"Here:\n{line}\n"):
        assert llm.parse_starters(text).starters == starters, text


@given(three())
def test_three_clauses_between_commas_are_not_shown_as_one(starters):
    starters = tuple(text.replace("C++", "C++ classes and") for text in starters)  # three words
    read = llm.parse_starters(f"<sug> {', '.join(starters)} </sug>")
    assert read.starters == starters or (
        not read.starters and read.reason == "no starters that can be told apart")


@pytest.mark.parametrize("sign", ["-", "–", "—"])
def test_a_lone_title_with_dashes_is_one_unless_all_its_parts_ask(sign):
    title = (f"Board/Card Game AI {sign} Questions concerning state/action space {sign} "
             "Deep Reinforcement Learning")
    for text in (f"<sug> {title} </sug>", f"<sug>{title}\n</sug>", f"1. {title}\n"):
        assert llm.parse_starters(text).starters == (title,)
    asked = "Why is jazz blue?", "How is chess taught?", "Who won in Rome?"
    assert llm.parse_starters(f"<sug> {f' {sign} '.join(asked)} </sug>").starters == asked


@pytest.mark.parametrize("text", ["<sug>[jazz tonight, chess openings]</sug>", "<sug>[a; b]</sug>"])
def test_a_list_in_which_nothing_parts_the_starters_says_so(text):
    assert llm.parse_starters(text).reason == "no starters that can be told apart"


@given(st.sampled_from(VERBS), st.lists(st.sampled_from([
    *THINGS, "Dune - the book", "Dune – the first part – in short", "steps 1, 2 and 3",
    "chapter 2: the war", "rule [2] of chess", "#1 hits", "items (1) and (2)", "the letter «a»",
    'the word "set"', "1984", "1. FC Köln", "versions 1.5 to 2.0", "“Emma” and “Persuasion”",
    "apples, pears and plums", "tea » water", "《三体》", "a 3-2-1 plan", "the ① sign"]),
    min_size=1, max_size=3))
def test_a_lone_sentence_with_such_signs_stays_one(verb, things):
    text = f"{verb} {' with '.join(things)}"
    for end in ("", "?", " today"):
        assert llm.parse_starters(f"<sug> {text}{end} </sug>").starters == (text + end,)
