"""Real people as judges: shares by hand, controls that see the past only, the page made again."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from test_people import command, is_odd, person, write

import data
from files import ROOT, UserError, read_json
from tables import later, recompute, seeds

TALK = ["Sourdough with rye", "Night trains to Vienna", "Keeping bees in a city",
        "Sourdough without a starter", "Night trains to Paris", "Repairing a cello bow"]


class Matcher:
    """One word in common is the same subject; what was asked is kept."""

    def __init__(self):
        self.jobs = []

    def match(self, jobs, everyone):
        self.jobs += jobs
        return [np.array([[bool({*a.lower().split()} & {*b.lower().split()}) for b in after]
                          for a in before], int).reshape(len(before), len(after))
                for before, after in jobs]


def test_shares_of_a_list_by_hand():
    assert later.scored([]) == {"at_1": 0, "at_5": 0, "share": 0}
    assert later.scored([False, True]) == {"at_1": 0, "at_5": 1, "share": 0.5}
    assert later.scored([True, False, False, False]) == {"at_1": 1, "at_5": 1, "share": 0.25}
    assert later.scored([False] * 5 + [True]) == {"at_1": 0, "at_5": 0, "share": 0}  # the sixth


def test_lists_count_for_their_person_and_for_the_others_by_hand():
    """a asks about rye and bees, b about bees: strict by the first place, lenient by both."""
    right = {"a": {"rye": (True, True), "bees": (True, True), "cellos": (False, True)},
             "b": {"rye": (False, False), "bees": (True, True), "cellos": (False, False)}}
    lists = {"PE": {"a": [["rye", "cellos"], ["cellos"]], "b": [["bees"], []]}}
    values = later.list_values(lists, right, {"a": ["b"], "b": ["a"]})
    assert values["strict_share"]["PE"] == {"a": (1 / 2 + 0) / 2, "b": 1 / 2}
    assert values["lenient_share"]["PE"] == {"a": 1, "b": 1 / 2}
    assert values["strict_at_1"]["PE"] == {"a": 1 / 2, "b": 1 / 2}
    assert values["others_strict_share"]["PE"] == {"a": 0, "b": 1 / 2}
    assert values["others_lenient_at_5"]["PE"] == {"a": 0, "b": 1 / 2}
    assert list(later.rows_of(values, "personal_strict_share", "PE")) == [1 / 4, 0]


def test_a_starter_is_right_by_the_matcher_or_by_a_subjects_word():
    future = {"u": ["Repairing a cello bow"]}
    starters = {"u": ["What makes a cello sing?", "Wood for cellos", "Bread", "bow"]}
    players = SimpleNamespace(match=lambda jobs, _: [np.array([[0], [-1], [0], [1]])])
    right = later.judge(players, starters, future, [])["u"]
    assert right == {"What makes a cello sing?": (False, True), "Wood for cellos": (False, False),
                     "Bread": (False, False), "bow": (True, True)}


def test_controls_see_the_past_alone():
    """Six sessions: five are past, of which two are its first half; rye comes back, trains do not
    before the third (they are opened again, too late for whoever knows the past only)."""
    texts = ["rye bread", "night trains", "bees", "rye flour", "bees", "trains"]
    user = data.User(**person("u", texts))
    run = SimpleNamespace(config=SimpleNamespace(generator=SimpleNamespace(list_size=2)),
                          impressions=[])
    matcher = Matcher()
    lists = later.controls(run, matcher, [user], [])
    assert lists == {"latest subjects": {"u": [["bees", "rye flour"]]},
                     "closed topics": {"u": [["night trains"]]}}
    assert matcher.jobs == [(["rye bread", "night trains"], ["rye flour", "bees"])]


def test_people_of_both_halves_judge_where_nobody_lent_titles():
    lent = later.lenders()
    assert len(lent) > 100 and "" not in lent and not any(map(is_odd, lent))


# ----------------------------------------------------------------------------- the whole command


@pytest.fixture(scope="module")
def measured(finished, tmp_path_factory):
    """(folder with the page of two files, of which the second is one person; the jobs' people)."""
    folder = tmp_path_factory.mktemp("later")
    rows = [person(f"p{i}", TALK) for i in range(5)] + [person("short", TALK[:3])]
    files = [write(folder / "many.jsonl", rows),
             write(folder / "one_person.jsonl", [person("alone", TALK)])]
    with pytest.MonkeyPatch.context() as patch:
        command(patch, finished.parent, "--later", *files, "eval.max_users=4", "--out",
                folder / "later.md")
    return folder


def test_every_method_and_control_is_judged_on_the_same_people(measured):
    kept = read_json(measured / "values" / "later-many-tiny.json")
    methods = ["PE", "PE+RID", "SFT", "SFT+DPO", "IceBreaker", "latest subjects", "closed topics",
               "popular"]
    for yardstick in later.YARDSTICKS:
        for name in ("at_1", "at_5", "share"):
            by_method = kept["values"][f"{yardstick}_{name}"]
            assert [*by_method] == methods
            assert {len(rows) for rows in by_method.values()} == {4}  # eval.max_users
    # All six sessions are alike here: the fifth, of the past, has the trains of none of the sixth.
    assert {*kept["values"]["strict_at_1"]["latest subjects"].values()} == {0.0}
    assert kept["values"]["precision"].keys() == {
        "RID and gate", "every summary", "recency", "frequency"}
    alone = read_json(measured / "values" / "later-one_person-tiny.json")
    assert "others_strict_share" not in alone["values"]


def test_the_same_page_comes_from_the_values(measured, finished, monkeypatch, tmp_path, capsys):
    page = (measured / "later.md").read_text()
    assert page.count("\n## ") == 2 and "### Strict" in page and "wrong person, at 5" in page
    values = sorted((measured / "values").glob("*.json"))
    out = tmp_path / "later.md"
    command(monkeypatch, "nowhere", "--later", *values, "--out", out)
    assert out.read_text() == page.replace(str(measured), str(tmp_path))
    assert recompute.recompute(measured) and "equals" in capsys.readouterr().out


def test_wrong_inputs_are_refused_in_one_line(finished, tmp_path, monkeypatch):
    few = write(tmp_path / "few.jsonl", [person("p2", TALK[:3])])
    for file, words, reason in [
        (few, [], "few.jsonl: nobody has 4 sessions"),
        (few, ["dpo.beta=0.3"], "no finished run of these settings"),
        ("gone.jsonl", [], "gone.jsonl: No such file"),
    ]:
        with pytest.raises(UserError) as error:
            command(monkeypatch, finished.parent, "--later", file, *words, "--out",
                    tmp_path / "later.md")
        assert reason in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "later.md").exists()


# ------------------------------------------------------------------------------ values and pages


def kept_by_hand(**changes):
    """IceBreaker has .5 of a and b; the latest subjects have all of a and nothing of b."""
    share = {"IceBreaker": {"a": 0.5, "b": 0.5}, "latest subjects": {"a": 1.0, "b": 0.0}}
    other = {"IceBreaker": {"a": 0.25, "b": 0.25}, "latest subjects": {"a": 0.0, "b": 0.0}}
    lists = {f"{prefix}{yardstick}_{name}": by_method
             for yardstick in later.YARDSTICKS for name in ("at_1", "at_5", "share")
             for prefix, by_method in (("", share), ("others_", other))}
    values = lists | {"auc": {"RID": {"a": 0.75}}}
    return {"name": "later-x-y", "people": "x.jsonl", "run": "y", "generator": "g", "commit": "c",
            "lists": 2, "values": values} | changes


def test_figures_and_intervals_by_hand():
    text = later.page([later.Later(**kept_by_hand())], "python eval.py")
    [row] = {line for line in text.splitlines() if line.startswith("| IceBreaker |")}
    assert "| 0.500 [0.500, 0.500] | 0.250 [0.250, 0.250]" in row  # own; wrong person
    assert "| +0.250 [+0.250, +0.250] |" in row  # personal
    # Of two people drawn again, both are one of the two in a quarter of the draws each.
    assert ("| IceBreaker - latest subjects | strict, share | +0.000 [-0.500, +0.500] "
            "| **undecided** |") in text
    assert "| RID | 1 | 0.750 [0.750, 0.750] |" in text


def without(metric, method, user):
    kept = json.loads(json.dumps(kept_by_hand()))
    del kept["values"][metric][method][user]
    return kept


@pytest.mark.parametrize("kept, why", [
    (without("strict_share", "IceBreaker", "a"), "the same people"),
    (kept_by_hand(values={}), "strict_share is missing"),
    (kept_by_hand(values={"auc": {"RID": {}}}), "the same people"),
    (kept_by_hand(values={"strict_share": {"A": {"a": 1}}, "lenient_share": {"B": {"a": 1}}}),
     "the same people"),
    (kept_by_hand(name="../x"), "name"),
    (kept_by_hand(more=1), "more"),
])
def test_broken_values_are_refused(kept, why, tmp_path):
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(kept))
    with pytest.raises(UserError, match=f"broken.json: .*{why}"):
        seeds.read_kept(later.Later, file)


def test_names_from_a_file_stay_text():
    nasty = "<script>x</script> | [a](b)"
    kept = kept_by_hand(people=nasty, run=nasty, values=json.loads(
        json.dumps(kept_by_hand()["values"]).replace("latest subjects", nasty)))
    text = later.page([later.Later(**kept)], "")
    assert "&lt;script&gt;" in text and "<script" not in text and "[a]" not in text


def test_a_digit_that_was_changed_is_found(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "results"
    seeds.write_page(later.page, [later.Later(**kept_by_hand())], "--later", folder / "later.md")
    assert recompute.recompute(folder)
    page = folder / "later.md"
    text = page.read_text()
    page.write_text(text.replace("Brackets:", "In brackets:"))  # prose may be worded anew
    assert recompute.recompute(folder)
    capsys.readouterr()
    for wrong in (text.replace("[-0.500, +0.500]", "[-0.500, +0.501]", 1),
                  text.replace("**undecided**", "**holds**", 1),
                  text.replace("| IceBreaker |", "| SFT |", 1), text + "| a row | more |\n"):
        assert wrong != text
        page.write_text(wrong)
        assert not recompute.recompute(folder)
        [line] = capsys.readouterr().out.splitlines()
        assert line.startswith(f"{page}: differs: ")
    monkeypatch.setattr(sys, "argv", ["recompute", str(folder)])
    with pytest.raises(SystemExit) as end:
        recompute.main()
    assert end.value.code == 1
    page.write_text(text)
    (folder / "values" / "later-x-y.json").unlink()
    assert not recompute.recompute(folder)  # no values to make it from
    assert not recompute.recompute(tmp_path)  # no page: nothing was shown to be equal


def test_the_committed_pages_equal_their_values():
    assert recompute.recompute(ROOT / "results")
