"""Real people's page: who is on it, what it says, that nobody's text breaks it, marks by hand."""

import hashlib
import json
import re
import sys

import pytest
from conftest import MICRO, micro

import data
import eval as script
from files import ROOT, UserError, read_json
from run import Run
from tables import people

TITLES = ["Sourdough with rye", "Night trains to Vienna", "How do black holes evaporate?",
          "Keeping bees in a city", "Sourdough without a starter"]
NASTY = ["<script>x</script> | **bold** [a](b)", "# head", "## u1"]


def is_odd(user_id):
    return int(hashlib.sha256(user_id.encode()).hexdigest(), 16) % 2 == 1


def person(user_id, titles=TITLES):
    sessions = [{"session_id": str(i), "timestamp": f"2026-05-0{i + 1}T09:00:00", "summary": text}
                for i, text in enumerate(titles)]
    return {"user_id": user_id, "sessions": sessions}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(monkeypatch, root, *words):
    """python eval.py, of the run below `root`."""
    config = str(ROOT / "configs" / "tiny.yaml")
    options = [str(word) for word in words if "=" not in str(word)]
    settings = [*MICRO, f"run.root={root}", *(word for word in words if "=" in str(word))]
    line = ["eval.py", "--config", config, *options, *settings]
    monkeypatch.setattr(sys, "argv", line)
    script.main()


def lists_of(text):
    """user -> method or letter -> starters, as they stand on a page."""
    found = {}
    for part in text.split("\n## ")[1:]:
        user, *lists = re.split(r"\n\n\*\*(.+)\*\*\n\n", part.strip())
        names = [name.replace("\\", "") for name in lists[::2]]
        found[user.split("\n")[0]] = dict(zip(names, lists[1::2], strict=True))
    return found


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    """(users.jsonl, folder with what --people made of it); tests only read them."""
    folder = tmp_path_factory.mktemp("people")
    rows = [person(f"p{i}") for i in range(11)] + [person("short", TITLES[:2])]
    nasty = person(next(filter(is_odd, (f"<b>p|{i}</b>" for i in range(50)))), NASTY + TITLES)
    file = write(folder / "real_users.jsonl", [*rows, nasty])
    with pytest.MonkeyPatch.context() as patch:
        command(patch, finished.parent, "--people", file, "--out", folder, "eval.examples=20")
    return file, folder


# ----------------------------------------------------------------------------------------- who


def test_people_of_the_odd_half_come_in_the_order_of_their_hashes(finished):
    run = Run(micro(finished.parent), describe=False)
    users = [data.User(**person(f"u{i}")) for i in range(50)]  # the simulated run has such ids too
    ids = [user.user_id for user in people.in_order(run, users)]
    hashes = {u.user_id: hashlib.sha256(u.user_id.encode()).hexdigest() for u in users}
    assert ids == sorted(filter(is_odd, hashes), key=hashes.get)
    assert ids == [user.user_id for user in people.in_order(run, users[::-1])]


def test_nobody_of_the_teacher_corpus_is_judged(finished):
    lines = (ROOT / "configs" / "teacher_corpus.jsonl").read_text(encoding="utf-8").splitlines()
    sources = {json.loads(line)["source"] for line in lines} - {"invented"}
    lent = [s.removeprefix("stackexchange:") for s in sources]
    run = Run(micro(finished.parent), describe=False)
    assert len(lent) > 100
    assert people.in_order(run, [data.User(**person(user_id)) for user_id in lent]) == []


def test_a_run_is_not_judged_on_those_it_has_learned_from(tmp_path):
    """Whatever their file is called now."""
    learned = [person(f"u{i}") for i in range(60)]
    file = write(tmp_path / "users.jsonl", learned)
    run = Run(micro(tmp_path, f"data.users={file}"), describe=False)
    both = [data.User(**row) for row in [*learned, *(person(f"new{i}") for i in range(20))]]
    ids = {user.user_id for user in people.in_order(run, both)}
    splits = run.split(row["user_id"] for row in learned)
    test = {u for u, split in splits.items() if split == "test"}
    assert ids == {*filter(is_odd, test), *(f"new{i}" for i in range(20) if is_odd(f"new{i}"))}
    assert ids & test and len(ids & splits.keys()) < sum(map(is_odd, splits))


def test_sessions_without_a_fit_summary_do_not_count(finished, tmp_path, monkeypatch, capsys):
    messages = {"session_id": "m", "messages": [{"role": "user", "content": "What is a fugue?"}]}
    chat, ill = person("p2", TITLES[:2]), person("p3", [*TITLES[:2], "I want to kill myself"])
    chat["sessions"].insert(0, messages)  # summarised, and then it does
    assert is_odd("p2") and is_odd("p3")
    file = write(tmp_path / "users.jsonl", [chat, ill])
    command(monkeypatch, finished.parent, "--people", file, "--out", tmp_path)
    (row,) = map(json.loads, (tmp_path / "people.jsonl").read_text().splitlines())
    assert row["user_id"] == "p2" and any("fugue" in text for text in row["summaries"])
    assert "only 1 people fit (eval.examples=2)" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- pages


@pytest.mark.parametrize("share, cut", [(1.0, -1), (0.8, -2)])
def test_a_stranger_has_the_interests_that_stage_rid_finds(finished, share, cut):
    """Of the whole history; cut, of its first part as of when the rest began."""
    run = Run(micro(finished.parent), describe=False)
    # Others have been seen by some towers, and are scored by the rest.
    ids = [u for u in run.ids("judge", "test") if run.histories[u][cut].texts][:12]
    users = [run.users[user_id] for user_id in ids]
    distiller, histories, rows = people.resonance(run, users, share, run.now)
    stage = read_json(finished / "rid" / "triggers.json")
    for user_id, history, row in zip(ids, histories, rows, strict=True):
        keep = distiller.keep(history, row)
        assert history.texts == run.histories[user_id][cut].texts
        assert [history.texts[i] for i in keep] == stage[user_id][cut]["interests"]
        assert row[keep] == pytest.approx(stage[user_id][cut]["scores"], abs=1e-5)


def test_every_method_writes_one_list_for_the_same_people(page):
    file, folder = page
    rows = [json.loads(line) for line in (folder / "people.jsonl").read_text().splitlines()]
    fit = [row["user_id"] for row in map(json.loads, file.read_text().splitlines())
           if is_odd(row["user_id"]) and row["user_id"] != "short"]
    assert {row["user_id"] for row in rows} == {*fit} and len(fit) >= 4
    for row in rows:
        assert [*row["starters"]] == ["PE", "PE+RID", "SFT", "SFT+DPO", "IceBreaker"]
        assert all(len(lists) == 1 for lists in row["starters"].values())
        assert {*row["interests"]} <= {*row["summaries"]}
    assert any(row["starters"]["PE"] != row["starters"]["PE+RID"] for row in rows)


def test_peoples_texts_stay_texts(page):
    text = (page[1] / "people.md").read_text() + (page[1] / "people_blind.md").read_text()
    assert "&lt;script&gt;" in text  # both pages show it
    assert not re.search(r"<script|\[a\]|^# head|<b>", text, re.MULTILINE)
    users = len((page[1] / "people.jsonl").read_text().splitlines())
    assert len(re.findall("^## ", text, re.MULTILINE)) == 2 * users


def test_the_blind_page_has_the_same_lists_and_names_no_method(page):
    plain, blind = ((page[1] / name).read_text() for name in ("people.md", "people_blind.md"))
    key = read_json(page[1] / "people_key.json")
    assert not re.search("RID|SFT|DPO|IceBreaker|PE\\b|interest", blind.partition("\n## ")[2])
    named, lettered = lists_of(plain), lists_of(blind)
    assert named.keys() == lettered.keys()
    for user, letters in zip(named, key.values(), strict=True):  # in the order of the pages
        assert {letters[x]: starters for x, starters in lettered[user].items()} == named[user]
        assert [*letters] == sorted(letters) == [*lettered[user]]
    assert len({tuple(letters.values()) for letters in key.values()}) > 1  # shuffled for each


def test_the_same_command_writes_the_same_files(finished, page, monkeypatch, tmp_path):
    file, folder = page
    command(monkeypatch, finished.parent, "--people", file, "--out", tmp_path, "eval.examples=20")
    for name in ("people.md", "people.jsonl", "people_blind.md", "people_key.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


# ------------------------------------------------------------------------------------ wrong inputs


def test_wrong_inputs_are_refused_in_one_line(finished, page, tmp_path, monkeypatch):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(person("p2")) + "\nsecret words\n")
    nobody = write(tmp_path / "nobody.jsonl", [person("p0"), person("p2", TITLES[:2])])
    for file, words, reason in [
        ("gone.jsonl", [], "gone.jsonl: No such file"),
        (bad, [], "bad.jsonl:2: line: not JSON"),
        (nobody, [], "nobody.jsonl: nobody has 3 sessions"),
        (page[0], ["run.name=other"], "other: no finished run"),
        (page[0], ["dpo.beta=0.3"], "tiny: no finished run of these settings"),
    ]:
        with pytest.raises(UserError) as error:
            command(monkeypatch, finished.parent, "--people", file, "--out", tmp_path, *words)
        text = str(error.value)
        assert reason in text and "\n" not in text and "secret" not in text
    assert not (finished.parent / "other").exists()  # a mistyped name leaves no folder
    assert not (tmp_path / "people.md").exists()


# ------------------------------------------------------------------------------------------ marks


def pages_by_hand(folder):
    """Two people, two methods; the second has written nothing for person b."""
    lists = {"a": {"PE": [["y"] * 4], "SFT": [["y"] * 2]}, "b": {"PE": [["y"] * 4], "SFT": [[]]}}
    rows = [{"user_id": u, "summaries": ["s"], "interests": ["s"], "scores": [0.5], "starters": x}
            for u, x in lists.items()]
    people.write_pages(rows, "# Head", 0, folder)
    key = read_json(folder / "people_key.json")
    return {(u, method): letter for u, letters in key.items() for letter, method in letters.items()}


def mark(letters, user, method, *counts):
    counts = dict(zip(["tap", "about", "true", "put"], counts, strict=True))
    return {"person": user, "letter": letters[user, method]} | counts


def test_marks_by_hand(tmp_path):
    letters = pages_by_hand(tmp_path)
    first = [mark(letters, "a", "PE", 4, 0, 2, 1), mark(letters, "a", "SFT", 1, 2, 0, 2),
             mark(letters, "b", "PE", 2, 4, 2, 1), mark(letters, "b", "SFT", 0, 0, 0, 0)]
    second = [mark(letters, "a", "PE", 0, 0, 2, 1), mark(letters, "a", "SFT", 0, 0, 0, 2)]
    files = [str(write(tmp_path / "1.jsonl", first)), str(write(tmp_path / "2.jsonl", second))]
    people.add_marks(files[:1], tmp_path)
    people.add_marks(files, tmp_path)  # in place of the first
    text = (tmp_path / "people.md").read_text()
    # tap of PE: a (1 + 0) / 2, b 1 / 2; of SFT: a (1/2 + 0) / 2, b 0, as an empty list has.
    (pe,), (sft,) = (re.findall(rf"^\| {m} \|.*", text, re.MULTILINE) for m in ("PE", "SFT"))
    assert re.findall(r"\| ([\d.]+)", pe) == ["0.50", "0.50", "0.50", "0.25", "4.0"]
    assert re.findall(r"\| ([\d.]+)", sft) == ["0.12", "0.25", "0.00", "0.50", "1.0"]
    assert "0.50 [0.00, 1.00]" in pe and "0.25 [0.25, 0.25]" in pe  # over people
    assert "over 2 people" in " ".join(text.split()) and "readers (1, 2)" in " ".join(text.split())
    gap = next(line for line in text.splitlines() if line.startswith("| SFT - PE | tap "))
    assert "-0.38 [-0.50, -0.25]" in gap and "undecided" in gap  # two people are no evidence
    assert text.count("Marks.") == 1 and text.count("\n## ") == 2 and text.startswith("# Head\n\n")


def test_marks_that_are_wrong_are_all_listed_and_none_is_counted(tmp_path):
    letters = pages_by_hand(tmp_path)
    good = mark(letters, "a", "PE", 1, 1, 1, 1)
    faults = [
        ({**good, "person": "secret"}, "letter: no such list"),
        ({**good, "letter": "Z"}, "letter: no such list"),
        (mark(letters, "b", "PE", 5, 1, 1, 1), "line: counts go up to 4"),
        ({**good, "put": -1}, "put: "),
        ({**good, "true": 1.5}, "true: "),
        ({**good, "true": True}, "true: "),
        ({k: v for k, v in good.items() if k != "about"}, "about: "),
        (good, "letter: no such list, or marked on an earlier line"),
        ([], "line: not a JSON object"),
    ]
    before = (tmp_path / "people.md").read_text()
    file = write(tmp_path / "marks.jsonl", [good, *(row for row, _ in faults)])
    with pytest.raises(UserError) as error:
        people.add_marks([str(file)], tmp_path)
    for (number, (_, reason)), line in zip(
            enumerate(faults, 2), str(error.value).splitlines(), strict=True):
        assert line.startswith(f"{file}:{number}: {reason}") and "secret" not in line
    for rows in ([good], []):  # a list is missing; nothing is there
        with pytest.raises(UserError, match="each list of a person"):
            people.add_marks([str(write(file, rows))], tmp_path)
    assert (tmp_path / "people.md").read_text() == before


def test_marks_want_the_pages(tmp_path):
    with pytest.raises(FileNotFoundError, match="people_key.json"):  # files.script says so
        people.add_marks(["marks.jsonl"], tmp_path)
