"""The hand-written teacher corpus and the rule teacher's forms keep the rules of the paper's
Table 4; stage `sit` learns from the corpus what the run's users can read."""

import json
import random
import re
from collections import Counter

import pytest
from conftest import micro
from test_roles import encode

import llm
import roles
from data import DataError
from files import read_json
from roles.languages import language
from roles.players import players_of
from roles.text import kind_of, lexicon, read_yaml
from run import Run
from stages import sit
from stages.sit import CORPUS

ROWS = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
STARTERS = [(row["language"], starter) for row in ROWS for starter in row["starters"]]


# What the rule teacher writes, {x} a subject: language -> (kinds, form).
FORMS = {
    code: [form for forms in angles.values() for item in forms for form in item.items()]
    for code, angles in read_yaml("templates.yaml").items()
}


def openings_vary(texts: list[str], code: str, most: float = 0.03) -> None:
    """No two words, or two characters in Chinese, begin more than this share of the texts."""
    openings = [text[:2] if code == "zh" else " ".join(text.lower().split()[:2]) for text in texts]
    opening, count = Counter(openings).most_common(1)[0]
    assert count <= most * len(texts), opening


def test_there_are_enough_rows_of_both_languages_and_of_real_people():
    counts = Counter(row["language"] for row in ROWS)
    assert counts.keys() == {"en", "zh"} and len(ROWS) >= 600 and counts["zh"] >= 120
    real = [row for row in ROWS if row["source"] != "invented"]
    assert len(real) >= len(ROWS) / 3
    assert all(re.fullmatch(r"stackexchange:[a-z]+:\d+", row["source"]) for row in real)


@pytest.mark.parametrize("row", ROWS, ids=range(1, len(ROWS) + 1))
def test_a_row_keeps_the_rules(row):
    assert row.keys() == {"language", "interests", "starters", "source"}
    assert 1 <= len(row["interests"]) <= 6 and 5 <= len(row["starters"]) <= 8
    kept, dropped = roles.filter_starters(row["starters"], row["interests"])
    # Length, language, markup, unsuitable words, repeats: none falls to the product's own filter.
    assert kept == row["starters"], dict(dropped)
    forms = set(map(roles.normal_form, row["interests"]))
    assert forms.isdisjoint(map(roles.normal_form, row["starters"]))  # a step on, no repetition


def test_no_starter_comes_twice_and_no_form_too_often():
    assert len({roles.normal_form(starter) for _, starter in STARTERS}) == len(STARTERS)
    for code in ("en", "zh"):
        openings_vary([starter for lang, starter in STARTERS if lang == code], code)


def test_the_language_is_that_of_the_starters():
    assert all(language(starter) == lang for lang, starter in STARTERS)


# ------------------------------------------------------------------------------- the rule teacher


@pytest.mark.parametrize(
    "code, subject, least", [("en", "quantum error codes", 160), ("zh", "量子纠错", 80)]
)
def test_the_rule_teachers_forms_keep_the_rules_too(code, subject, least):
    forms = [form for _, form in FORMS[code]]
    assert len(forms) >= least and len({*map(roles.normal_form, forms)}) == len(forms)
    openings_vary([form.replace("{x}", "X") for form in forms], code)
    starters = [form.format(x=subject) for form in forms]
    assert roles.filter_starters(starters, [subject]) == (starters, {})  # length and all else
    kinds = {kind for kinds, _ in FORMS[code] for kind in kinds.split("|")} - {"any"}
    assert kinds <= lexicon()["kinds"].keys()  # a misspelt kind would never be written


@pytest.mark.parametrize(
    "interest, subject",
    [
        ("What is the physical basis of a neural network?", "a neural network"),
        ("Tuning the neural network of a drone", "neural network"),  # "the" is not the phrase's end
        ("A hand-cut dovetail", "a hand-cut dovetail"),
        ("Crusader Kings and Company of Heroes side by side", "Crusader Kings"),
        ("Japanese ceramics", "Japanese ceramics"),
        ("Who wrote A Midsummer Night's Dream?", "A Midsummer Night's Dream"),
    ],
)
def test_a_subject_stands_in_a_form_as_people_write_it(interest, subject):
    raw = roles.Rules(None).write([[interest]], 8, [0])[0]
    assert raw.count(subject) + raw.count(subject[0].upper() + subject[1:]) >= 8
    assert not re.search(rf"\b(an?|the) {subject}", raw, re.IGNORECASE)


def test_starters_stay_below_the_limit_of_words_where_something_shorter_fits():
    for interest, parts, most in (("Building the Great Northern Railway", str.split, 10),
                                  ("量子计算机纠错编码", list, 16)):  # fmt: skip
        [raw] = roles.Rules(None).write([[interest]], 8, [0])
        lengths = [len(parts(y)) for y in llm.parse_starters(raw).starters]
        assert len(lengths) == 8 and max(lengths) <= most, raw
    # No form has eight words beside these five: the limit of the filter holds then.
    [raw] = roles.Rules(None).write([["Electric Light Orchestra Concert Posters"]], 60, [0])
    lengths = [len(y.split()) for y in llm.parse_starters(raw).starters]
    assert max(lengths[:3]) <= 10 < max(lengths) <= 12


def test_a_form_of_a_kind_is_for_subjects_of_that_kind():
    theirs = {form for kinds, form in FORMS["en"] if kinds != "any"}
    for interests, some in ([["Some cities: Seville"], True], [["The AI of Seville"], False]):
        raw = roles.Rules(None).write([interests], 12, [0])[0]
        assert any(form.format(x="Seville") in raw for form in theirs) == some, interests
    assert kind_of("Why does the author fear AI?", "kinds") == "book"  # of the words, in order


# -------------------------------------------------------------------------- what stage sit takes


@pytest.fixture
def run(finished):
    return Run(micro(finished.parent, "sit.corpus_rows=12"))


def test_rows_are_drawn_in_the_users_languages(run):
    def languages(counts, limit=30):
        rows, left_out = sit.draw_corpus(run, Counter(counts), limit, random.Random(0))
        assert left_out == 0 and len({tuple(row.interests) for row in rows}) == len(rows)
        return Counter(row.language for row in rows)

    assert languages({"en": 5}) == {"en": 30}
    assert languages({"en": 20, "zh": 10, "other": 30}) == {"en": 20, "zh": 10}
    assert languages({"other": 4}) == {} and languages({"en": 1}, 0) == {}
    assert languages({"zh": 1}, 10_000)["zh"] == sum(row["language"] == "zh" for row in ROWS)


def test_rows_of_tested_people_and_short_rows_are_left_out(run):
    real = [row["source"] for row in ROWS if row["source"] != "invented"]
    ids = [source.removeprefix("stackexchange:") for source in {*real}]
    train, tested = ids[:9], ids[9:30]
    run.users = dict.fromkeys([*train, *tested])  # cached properties: set before they are asked
    run.splits = dict.fromkeys(train, "train") | dict.fromkeys(tested, "test")
    rows, left_out = sit.draw_corpus(run, Counter(en=1), 10_000, random.Random(0))
    sources = {row.source for row in rows}
    assert left_out == sum(f"stackexchange:{u}" in real for u in tested) > 0
    assert sources >= {f"stackexchange:{u}" for u in train}
    assert sources.isdisjoint(f"stackexchange:{u}" for u in tested)
    run.config.generator.list_size = 7
    rows, left_out = sit.draw_corpus(run, Counter(zh=1), 10_000, random.Random(0))
    chinese = [row for row in ROWS if row["language"] == "zh"]
    assert all(len(row.starters) >= 7 for row in rows)
    assert left_out == sum(len(row["starters"]) < 7 for row in chinese) > 0
    assert len(rows) + left_out == len(chinese)


def test_a_rows_list_covers_its_interests():
    row = sit.CorpusRow(
        language="en",
        source="invented",
        interests=["Dune books", "Go clubs"],
        starters=["More Dune", "Dune films", "Dune art", "A Go club", "Go rules"],
    )
    interests, [starters] = sit.interests_and_list(row, 4, encode)
    assert interests == row.interests
    assert starters == ["More Dune", "Go rules", "Dune films", "A Go club"]  # the shorter first


def test_sit_learns_both_and_says_how_many(run, monkeypatch):
    learned = []
    told = lambda run, writer, rows, *_: learned.append(rows) or (0, {})  # noqa: E731
    monkeypatch.setattr(sit, "instruct", told)
    monkeypatch.setattr(sit.llm, "save_adapter", lambda *_: None)
    figures = sit.stage_sit(run, players_of(run), "")
    alone = read_json(run.folder / "sit" / "done.json")  # the same without the corpus
    assert figures["rows"] == len(learned[0]) == figures["teacher_rows"] + figures["corpus_rows"]
    assert figures["teacher_rows"] == alone["rows"] and 11 <= figures["corpus_rows"] <= 12
    lists = [lists for _, lists in learned[0][figures["teacher_rows"] :]]
    texts = [players_of(run).writer.tokenizer.decode(ids) for (ids,) in lists]
    written = {starter for _, starter in STARTERS}
    assert all(sum(starter in text for starter in written) >= 3 for text in texts)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"language": "fr"}, "language"),
        ({"interests": []}, "interests"),
        ({"starters": [""]}, "starters.0"),
        ({"stars": ["typo"]}, "stars"),
        ({"source": 1}, "source"),
    ],
)
def test_a_bad_row_is_refused_with_its_line(tmp_path, change, reason):
    lines = [json.dumps(row) for row in (ROWS[0], ROWS[1] | change)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join([*lines, "{"]), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        sit.read_corpus(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:2: {reason}: ") and second.startswith(f"{path}:3: line: ")
    with pytest.raises(DataError, match="nowhere"):
        sit.read_corpus(tmp_path / "nowhere")
