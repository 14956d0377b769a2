"""A run folder under faults, without models: damage, kills, changed settings, NaN, full disks, long
lines. `python -m benchmarks.faults` breaks whole runs."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import SafetensorError

import data
import train
from config import load_config
from files import ROOT, RunFolder, UserError, read_json, script, write_json, write_tensors
from llm.model import save_adapter
from run import Run
from serving import feedback
from stages.steps import new_optimiser, step

WORDS = ["run.name=r", "world.users=20"]


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "r")


def finished(folder, stage, key="k", content="whole", **record):
    """A stage that wrote one file and one line."""
    assert folder.begin(stage, key, **record)
    write_json(folder / stage / "part" / "a.json", content)
    folder.log(stage, loss=1.0)
    folder.mark_done(stage, key, figure=2.5)


def log_of(folder):
    return [json.loads(x)["stage"] for x in (folder / "metrics.jsonl").read_text().splitlines()]


def test_what_a_stage_wrote_is_whole_missing_or_changed(folder):
    finished(folder, "sit")
    assert folder.is_done("sit", "k") and not folder.begin("sit", "k")
    assert folder.figures("sit") == {"figure": 2.5}
    path = folder / "sit" / "part" / "a.json"
    for spoil in (lambda: path.write_text('"whale"\n'), lambda: path.write_text("")):
        spoil()
        with pytest.raises(UserError, match="part/a.json: has changed since stage sit"):
            folder.begin("sit", "k")
    path.unlink()  # as the message says
    assert not folder.is_done("sit", "k") and folder.begin("sit", "k")


def test_a_changed_figure_is_found_too(folder):
    finished(folder, "sit")
    path = folder / "sit" / "done.json"
    path.write_text(path.read_text().replace("2.5", "2.6"))
    for read in (lambda: folder.is_done("sit", "k"), lambda: folder.figures("sit")):
        with pytest.raises(UserError, match="done.json: has changed"):
            read()


def test_a_run_from_before_the_records_stays_done(folder):
    write_json(folder / "sit" / "done.json", {"key": "k", "figure": 1})
    folder.log("sit", loss=1.0)
    assert folder.is_done("sit", "k") and folder.figures("sit") == {"figure": 1}
    assert folder.begin("dpo", "k") and log_of(folder) == ["sit"]  # nobody knows which are its


def test_a_killed_attempt_leaves_neither_a_record_nor_a_line(folder):
    """Settings A, then B and killed, then A again: what lies there is B's, and A is not done."""
    finished(folder, "rid")
    finished(folder, "sit", "A")
    assert folder.begin("sit", "B") and log_of(folder) == ["rid"]
    folder.log("sit", loss=2.0)
    write_json(folder / "sit" / "part" / "a.json", "of B")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"torn')  # and killed here
    assert not folder.is_done("sit", "A")
    finished(folder, "sit", "A")
    assert log_of(folder) == ["rid", "sit"]


def test_parts_that_are_done_keep_their_lines(folder):
    assert folder.begin("dpo", "k")
    finished(folder, "dpo/round1")
    assert folder.begin("dpo/round2", "k")
    folder.log("killed")
    assert folder.begin("dpo", "k") and not folder.begin("dpo/round1", "k")
    assert folder.begin("dpo/round2", "k") and log_of(folder) == ["dpo/round1"]


def test_a_kill_behind_the_last_file_leaves_nothing_either(folder):
    finished(folder, "sit", settings={"a": 1})
    write_json(folder / "sit" / "begun.json", {"key": "k", "record": {"settings": {"a": 0}}})
    assert folder.record("sit")["settings"] == {"a": 1} and not folder.begin("sit", "k")
    assert not (folder / "sit" / "begun.json").exists()


def test_leftovers_of_the_dead_are_cleared_away(folder, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder.path.mkdir()
    for number in (dead.pid, os.getpid()):
        (folder / f".a.{number}.tmp").write_text("half")
        (folder / f".b.{number}.old.tmp").mkdir()
    Run(of(tmp_path))
    left = {path.name for path in folder.path.rglob(".*.tmp")}
    assert left == {f".a.{os.getpid()}.tmp", f".b.{os.getpid()}.old.tmp"}


# ---------------------------------------------------------------------------------------- settings


def of(tmp_path, *words):
    return load_config(None, [f"run.root={tmp_path}", *WORDS, *words])


def test_changed_settings_are_refused_by_name(folder, tmp_path):
    run = Run(of(tmp_path), describe=False)
    for stage in ("world", "sit", "dpo"):
        finished(folder, stage, settings=train.stage_inputs(run, stage))
    assert folder.begin("eval", "k", settings=train.stage_inputs(run, "eval"))  # and killed
    train.refuse_changes(of(tmp_path), [])
    for word, stage in (("dpo.beta=0.7", "dpo"), ("sit.epochs=9", "sit"),
                        ("world.users=21", "world"), ("generator.model=other", "sit"),
                        ("run.seed=5", "world"), ("eval.lists=9", "eval")):
        with pytest.raises(UserError) as refused:
            train.refuse_changes(of(tmp_path, word), [])
        field, said = word.partition("=")[0], str(refused.value)
        assert f"{field}=" in said and f"stage {stage} " in said and "run.name=NAME" in said
        assert "to go on with it: " in said and "\n" not in said
    train.refuse_changes(of(tmp_path, "dpo.beta=0.7"), ["dpo"])  # who names it wants it
    with pytest.raises(UserError, match="begun with .*rm -r"):  # what is half done is not mixed
        train.refuse_changes(of(tmp_path, "eval.lists=9"), ["eval"])
    # What says how, or only adds to what is there, is no change.
    train.refuse_changes(of(tmp_path, "generator.micro_batch=1", "dpo.rounds=5"), [])


def test_what_another_version_of_the_code_has_trained_is_refused(folder, tmp_path):
    """Settings that are new or gone: no value of today's brings the stage back."""
    run = Run(of(tmp_path), describe=False)
    then = {stage: train.stage_inputs(run, stage) for stage in ("rid", "sit")}
    then["rid"]["rid.forgotten"] = 3
    del then["sit"]["sit.epochs"]
    for stage, settings in then.items():
        finished(folder, stage, settings=settings)
        said = f"stage {stage} of .* is of another version of .*--stage {stage}"
        with pytest.raises(UserError, match=said):
            train.refuse_changes(of(tmp_path), ["rid"] if stage == "sit" else [])
        train.refuse_changes(of(tmp_path), ["rid", "sit"])
    config = tmp_path / "config.yaml"
    config.write_text("rid:\n  forgotten: 3\n")
    with pytest.raises(UserError, match="unknown setting 'rid.forgotten'.*another version"):
        load_config(config)


def test_other_words_of_the_rules_are_a_change(folder, tmp_path, monkeypatch):
    finished(folder, "match", settings=train.stage_inputs(Run(of(tmp_path)), "match"))
    train.refuse_changes(of(tmp_path), [])
    monkeypatch.setattr(train, "RULES", [tmp_path / "words.yaml", *train.RULES[:-1]])
    train.RULES[0].write_text("words: {}\n")
    with pytest.raises(UserError, match="words.yaml, the content.*stage match"):
        train.refuse_changes(of(tmp_path), [])


def test_other_content_of_the_same_file_is_a_change(tmp_path):
    users = tmp_path / "users.jsonl"
    users.write_text('{"user_id": "a", "sessions": []}\n')
    run = Run(of(tmp_path, f"data.users={users}"))
    finished(run.folder, "world", settings=train.stage_inputs(run, "world"))
    users.write_text('{"user_id": "b", "sessions": []}\n')
    with pytest.raises(UserError, match="data.users, the content"):
        train.refuse_changes(of(tmp_path, f"data.users={users}"), [])


def test_a_file_that_was_refused_may_be_mended(tmp_path):
    users = tmp_path / "users.jsonl"
    config = of(tmp_path, f"data.users={users}")
    for text in ('{"user_id": 3}\n', '{"user_id": "a"}\n', '{"user_id": "a", "sessions": []}\n'):
        users.write_text(text)
        train.refuse_changes(config, [])
        fault = pytest.raises(UserError, match="users.jsonl:1: ")
        with fault if "[]" not in text else contextlib.nullcontext():
            train.run_stages(config, ["world"])
    users.write_text('{"user_id": "b", "sessions": []}\n')
    with pytest.raises(UserError, match="data.users, the content"):  # as it was read to the end
        train.refuse_changes(config, [])


def test_stages_that_the_settings_do_not_describe_are_withdrawn(tmp_path, monkeypatch):
    """sit anew: dpo's weights are of another sit, and no server takes them for this run's."""
    run = Run(of(tmp_path))
    for stage in train.STAGES:
        finished(run.folder, stage, train.stage_key(run, stage))
    monkeypatch.setattr(train, "run_stage", lambda *_: {})
    train.run_stages(of(tmp_path, "sit.epochs=9"), ["sit"])
    done = {stage for stage in train.STAGES if run.folder.has_run(stage)}
    assert done == {*train.STAGES} - {"dpo", "eval", "merge"}


# ----------------------------------------------------------------------------- NaN, signals, disks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_learned_from_a_loss_that_is_no_number(value):
    model = torch.nn.Linear(2, 1)
    optimiser, schedule = new_optimiser(model, 0.1, 10)
    before = [w.clone() for w in model.parameters()]
    (model(torch.ones(1, 2)).sum() * value).backward()
    with pytest.raises(UserError, match="sit, step 3: .*examples: row 4, row 9"):
        step(model, optimiser, schedule, "sit, step 3", ["row 4", "row 9"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not optimiser.state


def test_sigterm_is_143_and_says_how_to_go_on(capsys):
    previous = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as stopped:
            script(lambda: os.kill(os.getpid(), signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert stopped.value.code == 143 and "run the same command again" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO])
def test_whatever_writes_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys, number):
    def full(*_, **__):  # as safetensors says it
        raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")

    def plain(*_):  # as a file's write does
        raise OSError(number, os.strerror(number))

    model = type("Model", (), {"save_pretrained": full})()
    monkeypatch.setattr("safetensors.torch.save_file", full)
    write_json(tmp_path / "adapter" / "old", 1)
    for write in (lambda: write_tensors(tmp_path / "a", {"a": torch.ones(1)}),
                  lambda: save_adapter(model, tmp_path / "adapter"), plain):
        with pytest.raises(SystemExit) as stopped:
            script(write)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and os.strerror(number) in said and said.count("\n") == 1
    assert read_json(tmp_path / "adapter" / "old") == 1 and not (tmp_path / "a").exists()


def test_a_line_of_any_length_is_refused_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MOST_BYTES", 50)
    path, good = tmp_path / "users.jsonl", '{"user_id": "a", "sessions": []}\n'
    for length in (50, 51, 52, 101, 102, 103, 500):
        for filler in (" ", "x"):
            path.write_text(filler * length + "\n" + good + '{"user_id": 1}\n')
            with pytest.raises(data.DataError) as refused:
                data.read_users(path)
            lines = str(refused.value).splitlines()
            numbers = [line.removeprefix(f"{path}:").partition(":")[0] for line in lines]
            assert numbers[-1] == "3" and "2" not in numbers
            assert (numbers[0] == "1") == (filler == "x" or length >= 50)


def test_names_of_a_strangers_run_do_not_lead_out_of_it(tmp_path):
    run = Run(of(tmp_path, "dpo.rounds=1"))
    (run.folder / "dpo/round1/adapter").mkdir(parents=True)
    write_json(run.folder / "dpo" / "done.json", {"key": "k"})
    (run.folder / "link").symlink_to(tmp_path)
    for name in ("../x", "/etc", "link", "a/../../b", "dpo/round1/adapter"):
        write_json(run.folder / "feedback" / "current.json", {
            "run": "k", "adapter": name, "ranker": "ranker/train.safetensors", "version": "v"})
        if name.startswith("dpo"):
            assert feedback.current(run)["adapter"] == name
        else:
            with pytest.raises(UserError, match="leads out of the run"):
                feedback.current(run)


def test_the_page_says_what_was_not_run():
    code = ("from benchmarks.faults import page; print(page({'nan': {'tries': 3, 'seen': {'a': 3},"
            " 'broken': ['b'], 'seconds': 2.0, 'methods': ['garm']}}))")
    # In a process of its own: it sets how torch works before it is there.
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "| nan (garm alone) |" in done.stdout
    assert "| 3 | a 3 | 1 | 2 |" in done.stdout and done.stdout.count("| – | not run |") > 9
