"""Runs of several seeds as one page: shares by hand, intervals, what is refused, the same again."""

import json
import shutil
import sys

import numpy as np
import pytest
from test_eval import TALK, Classifier, encode

import eval as script
from files import UserError, read_json, write_json
from roles.text import names_subject
from stages import metrics
from stages.metrics import bootstrap
from tables import seeds

STAGES = ("base", "sit", "eval")  # whose done.json has seconds, in these copies


def test_full_and_named_by_hand():
    """full: lists of K; named: mean over lists of the share of starters; an empty list counts 0."""
    histories = {"a": ["How to get into Baldur's Gate 3", "Comparing Satie and Beethoven"],
                 "b": ["Learning music"]}
    rows = {"a": [["Baldurs Gate", "Gate tactics", "Satie’s last years"],  # two of three whole
                  ["Who was Beethven?", "Baldur's Gate 3 in winter"], []],
            "b": [["Learning music theory", "Music tips", "Music"]]}  # nothing but generic words
    values = metrics.measure({"PE": rows}, {}, encode, Classifier(), TALK, histories, 3)["PE"]
    assert values["full"] == pytest.approx({"a": 1 / 3, "b": 1})
    assert values["named"] == pytest.approx({"a": (3 / 3 + 1 / 2 + 0) / 3, "b": 0})
    assert values["grounded"] == pytest.approx({"a": (1 / 3 + 1 / 2 + 0) / 3, "b": 1})  # no subject


@pytest.mark.parametrize("starter, text, named", [
    ("Dune's sandworms", "Where to start with Dune", True),
    ("The best of it", "Where to start with The Best of Dune", False),  # stop words
    ("A 2024 guide", "Everest in 2024", False),  # a number alone
    ("Translate this email", "Translate an email about Everest", False),  # a chore
    ("量子计算的历史", "什么是量子计算？", True),
    ("音乐的历史", "什么是量子计算？", False),
    ("Что такое Дюна", "Книги, как Дюна", True),
    ("", "Dune", False),
])
def test_a_subject_is_named_by_a_content_word(starter, text, named):
    assert names_subject(starter, ["Nothing", text]) == named
    assert not names_subject(starter, [])


def test_the_hierarchical_interval_is_as_wide_as_seeds_are_apart():
    """Users of a seed agree: their own bootstrap has no width, that of seeds has the normal one."""
    means = np.random.default_rng(0).normal(1, 1, 30)
    rows = [np.full(7, mean) for mean in means]
    assert np.ptp(bootstrap(rows)) == pytest.approx(0)
    mean, low, high = bootstrap(rows, 4000, hierarchical=True)
    half = 1.96 * means.std() / 30**0.5
    assert mean == pytest.approx(means.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)
    # Three seeds: each of the 27 draws is more than 2.5 %, so that the ends are the seeds'.
    three = bootstrap([[0.0] * 4, [1.0] * 4, [2.0] * 4], 4000, hierarchical=True)
    assert three == pytest.approx((1, 0, 2))


def test_where_seeds_agree_the_hierarchical_interval_is_that_of_users():
    users = np.random.default_rng(0).normal(0, 1, 200)
    plain, nested = bootstrap([users] * 3, 4000), bootstrap([users] * 3, 4000, hierarchical=True)
    assert np.ptp(nested) == pytest.approx(np.ptp(plain), rel=0.1)


@pytest.fixture
def runs(finished, tmp_path):
    """Three run folders as of three seeds: the finished run's, with other numbers and values."""
    folders = []
    for seed in (100, 101, 102):
        folder = tmp_path / "runs" / f"mid-{seed}"
        for stage in STAGES:
            folder.joinpath(stage).mkdir(parents=True)
            shutil.copy(finished / stage / "done.json", folder / stage)
            write_json(folder / stage / "done.json",
                       read_json(folder / stage / "done.json") | {"seconds": 1200})
        shutil.copy(finished / "environment.json", folder)
        values = read_json(finished / "eval" / "values.json")
        for i, user in enumerate(values["utility"]["SFT"]):  # 0.1, 0.2 and 0.3 below IceBreaker
            values["utility"]["IceBreaker"][user] = 0.5 + i / 100
            values["utility"]["SFT"][user] = 0.5 + i / 100 - (seed - 99) / 10
            values["full"]["SFT"][user] = 1.0
        write_json(folder / "eval" / "values.json", values)
        settings = read_json(finished / "eval" / "settings.json")
        settings["run"] |= {"seed": seed, "name": folder.name, "root": "/secret/place"}
        settings["world"]["seed"] = seed
        write_json(folder / "eval" / "settings.json", settings)
        folders.append(folder)
    return folders


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, words)])
    script.main()


def test_the_stage_writes_what_it_measured(finished):
    values, table = (read_json(finished / "eval" / f"{n}.json") for n in ("values", "table"))
    assert {"full", "named", "grounded", "utility", "train_utility", "true_clicks"} <= {*values}
    for metric, methods in values.items():
        for method, by_user in methods.items():
            mean = table["methods"][method][metric]
            assert np.mean([*by_user.values()]) == pytest.approx(mean, abs=1e-5)
    page = (finished / "eval" / "table.md").read_text()
    assert "| Full | Named | Grounded |" in page


def test_the_page_and_the_same_again_from_the_values(runs, monkeypatch, tmp_path, capsys):
    out = tmp_path / "results" / "seeds.md"
    command(monkeypatch, "--over", *runs, "--out", out)
    page = out.read_text()
    assert page in capsys.readouterr().out
    # Each seed agrees within itself, so the ends are the nearest and the farthest seed.
    assert ("| IceBreaker - SFT | Judge utility | +0.1000, +0.2000, +0.3000 "
            "| +0.2000 [+0.1000, +0.3000] | **holds** |") in page
    assert "lists full after SIT, above 0.95: 1.000 [1.000, 1.000]: **holds**" in page
    assert "3.00 hours" in page and "Generator tiny" in page and "world.users 40" in page
    assert "generator.list_size=3" in page and "run.name=" not in page.replace("run.name`", "")
    files = sorted((tmp_path / "results" / "values").glob("*.json"))
    assert [file.name for file in files] == [f"{run.name}.json" for run in runs]
    assert not any("/secret" in text for text in [page, *(f.read_text() for f in files)])
    shutil.rmtree(tmp_path / "runs")
    before = [file.read_bytes() for file in files]
    out.unlink()
    command(monkeypatch, "--over", *files, "--out", out)
    assert out.read_text() == page and [file.read_bytes() for file in files] == before
    elsewhere = tmp_path / "elsewhere" / "page.md"
    command(monkeypatch, "--over", *files, "--out", elsewhere)
    assert elsewhere.read_text().replace("elsewhere", "results") == page


@pytest.mark.parametrize("setting, value", [
    ("dpo.beta", 0.9), ("generator.model", "other"), ("eval.lists", 7), ("world.users", 41)])
def test_settings_that_differ_are_refused_by_name(runs, setting, value, tmp_path):
    section, key = setting.split(".")
    settings = read_json(runs[2] / "eval" / "settings.json")
    settings[section][key] = value
    write_json(runs[2] / "eval" / "settings.json", settings)
    with pytest.raises(UserError, match=f"mid-102: {setting} is {value!r}"):
        seeds.write_over(runs, tmp_path / "out" / "seeds.md")
    assert not (tmp_path / "out").exists()


def test_other_weights_under_the_same_settings_are_refused(runs, tmp_path):
    write_json(runs[1] / "base" / "done.json", {"key": "", "model": "/a/b/other-model"})
    with pytest.raises(UserError, match="mid-101: generator is 'other-model'"):
        seeds.write_over(runs, tmp_path / "seeds.md")


def test_a_run_does_not_count_twice(runs, tmp_path):
    with pytest.raises(UserError, match="mid-100: another run has this name"):
        seeds.write_over([*runs, runs[0]], tmp_path / "seeds.md")
    again = shutil.copytree(runs[0], runs[0].with_name("again"))
    with pytest.raises(UserError, match="again: another run has this name or these seeds"):
        seeds.write_over([*runs, again], tmp_path / "seeds.md")


def test_what_is_no_finished_run_is_refused(runs, tmp_path):
    out = tmp_path / "seeds.md"
    (runs[0] / "eval" / "done.json").unlink()
    for path, why in [(tmp_path / "gone", "no finished run"), (runs[0], "no finished run")]:
        with pytest.raises(UserError, match=why):
            seeds.write_over([path], out)
    (runs[1] / "eval" / "values.json").unlink()
    with pytest.raises(UserError, match="lacks done.json or values.json"):
        seeds.write_over([runs[1]], out)
    assert not out.exists()


def one_less(kept):
    del kept["values"]["lexical"]["SFT"][next(iter(kept["values"]["lexical"]["SFT"]))]


@pytest.mark.parametrize("break_it, why", [
    (lambda kept: kept.update(name="../x"), "name"),
    (lambda kept: kept.update(values={}), "the same methods"),
    (one_less, "the same methods"),
    (lambda kept: kept["values"]["lexical"].pop("PE"), "the same methods"),
    (lambda kept: kept["values"]["lexical"]["PE"].update(x="<b>"), "'lexical', 'PE', 'x'"),
    (lambda kept: kept.update(more=1), "more"),
])
def test_a_broken_file_of_values_is_refused(runs, break_it, why, tmp_path):
    kept = seeds.read_run(runs[0]).model_dump()
    break_it(kept)
    file = tmp_path / "broken.json"
    file.write_text(json.dumps(kept))
    with pytest.raises(UserError, match=f"broken.json: .*{why}"):
        seeds.read_run(file)
    file.write_text("{")
    with pytest.raises(UserError, match="no values of a run"):
        seeds.read_run(file)


def test_a_setting_cannot_write_into_the_page(runs, tmp_path):
    for folder in runs:
        settings = read_json(folder / "eval" / "settings.json")
        settings["generator"]["instruction"] = "{n}\n\n# head\n```\n<script>x</script>"
        write_json(folder / "eval" / "settings.json", settings)
    seeds.write_over(runs, tmp_path / "seeds.md")
    lines = (tmp_path / "seeds.md").read_text().splitlines()
    [line] = [line for line in lines if "<script>" in line]
    assert line.startswith("    ") and "# head" not in lines
