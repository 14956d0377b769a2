"""Settings are typed and checked; files and folders are whole or as they were."""

import errno
import hashlib
import itertools
import json
import os
import re
import sqlite3
from unittest.mock import Mock

import pytest
import torch
import yaml

from config import Config, load_config
from files import (
    ROOT,
    RunFolder,
    UserError,
    atomic_path,
    digest,
    file_digest,
    progress,
    read_json,
    read_tensors,
    script,
    write_json,
    write_tensors,
)
from run import Run

SHIPPED = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if p.name != "paper.yaml"]


def refusal(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_config(*arguments)
    return str(caught.value)


def test_defaults_load_and_only_the_name_is_filled_in():
    loaded = load_config()
    assert loaded.run.name == "default"
    assert loaded.model_copy(update={"run": Config().run}) == Config()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_load_unedited(path):
    assert load_config(path).run.name == path.stem


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configs_repeat_no_default(path):
    """But for the LoRA rank of a recipe, which its memory hangs on."""
    defaults, shown = load_config().model_dump(), ("lora_rank", "lora_alpha", "batch_users")
    for section, values in yaml.safe_load(path.read_text()).items():
        for name in values.keys() - {*shown}:
            assert getattr(load_config(path), section).model_dump()[name] != defaults[section][name]


def test_words_override_the_file_and_the_file_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("dpo: {beta: 0.3, rounds: 2}\nrid:\n  learning_rate: 1e-5\n")
    config = load_config(path, ["dpo.beta=1e-5", "data.cuts=[0.5]", "generator.load_in_4bit=true"])
    assert (config.dpo.beta, config.dpo.rounds, config.rid.learning_rate) == (1e-5, 2, 1e-5)
    assert config.data.cuts == [0.5] and config.generator.load_in_4bit is True
    assert config.dpo.margin == Config().dpo.margin


def test_the_run_is_named_after_the_users_file_or_the_dialogues():
    for path in (None, *SHIPPED):
        method = load_config(path).run.method
        names = ["users"] if method == "icebreaker" else ["dialogues"]
        names += ["catalogue", "policies"] if method == "qualeqs" else []  # all three, or none
        words = [f"data.{name}=logs/forum.jsonl" for name in names]
        assert load_config(path, words).run.name == "forum"


@pytest.mark.parametrize(
    "word, nearest",
    [("dpo.bta=1", "dpo.beta"), ("dop.beta=1", "dpo"), ("rid.learning_rte=1", "rid.learning_rate")],
)
def test_a_typo_is_refused_with_the_nearest_name(word, nearest, tmp_path):
    assert f"did you mean '{nearest}'?" in refusal(None, [word])
    (section, key), value = word.split("=")[0].split("."), word.split("=")[1]
    path = tmp_path / "typo.yaml"
    path.write_text(f"{section}: {{{key}: {value}}}\n")
    assert refusal(path).startswith(f"{path}: ") and nearest in refusal(path)


@pytest.mark.parametrize(
    "word",
    [
        "dpo.beta=much",
        "dpo.rounds=1.5",
        "dpo.rounds=null",
        "generator.load_in_4bit=maybe",
        "data.cuts=0.4",
        "data.cuts=[early]",
        "run.name=[a]",
        "run.seed={a: 1}",
        "data.cuts=[0.8,0.4]",
        "data.cuts=[]",
        "data.train=0.9",
        "rid.min_keep=9",
        "dpo.weight=2",
        "dpo.negatives=[none]",
        "dpo.samples=0",
        "dpo.beta=nan",
        "run.name=../up",
        "world.users=-1",
        "sit.epochs=0",
        "eval.bootstrap=0",
        "generator.lora_rank=0",
        "generator.top_k=-1",
        "dpo.learning_rate=0",
        "serve.ahead=-1",
        "dpo.margin=nan",
        "dpo.rounds=true",
        "dpo.beta=true",
        "roles.judge=me",
        "generator.prompting=Suggest some.",
        "serve.arms=[SFT+DPO]",
        "serve.arms=[]",
    ],
)
def test_a_wrong_value_is_refused_with_its_setting(word):
    message = refusal(None, [word])
    assert word.split("=")[0] in message.replace(f"'{word}'", "") and "\n" not in message


def test_the_stand_in_plays_no_role():
    word = "roles.judge=generator"
    assert load_config(None, [word, "generator.model=smollm2"]).roles.judge == "generator"
    assert "roles.judge=generator: needs" in refusal(None, [word, "generator.model=tiny"])


@pytest.mark.parametrize("word", ["data.cuts.0=0.3", "serve.arms.0=PE"])
def test_a_list_is_set_whole(word):
    assert refusal(None, [word]).startswith(f"'{word}': a list is given whole")


@pytest.mark.parametrize(
    "word", ["dpo.beta", "--dpo.beta=1", "=1", "dpo=1", "dpo.beta={", "run=null"]
)
def test_what_is_no_setting_is_refused(word):
    assert word.split("=")[0] in refusal(None, [word])


@pytest.mark.parametrize(
    "content", [b"[1, 2]", b"dpo: [", b"text", b"\xff\xfe", b"dpo:\n\tbeta: 1"]
)
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, content):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: ")


def test_a_missing_file_is_refused_by_name(tmp_path):
    assert str(tmp_path / "none.yaml") in refusal(tmp_path / "none.yaml")


# ------------------------------------------------------------------------------ files and folders


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "value.json"
    write_json(path, {"a": "é"})
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == path.parent
        raise RuntimeError
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": "é"}
    assert list(path.parent.iterdir()) == [path]


def test_what_a_link_in_a_run_folder_names_stays_as_it_is(tmp_path):
    write_json(tmp_path / "mine.json", 0)
    (link := tmp_path / "link.json").symlink_to(tmp_path / "mine.json")  # a stranger's
    write_json(link, 1)
    assert read_json(tmp_path / "mine.json") == 0 and read_json(link) == 1


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "adapter"
    for name in ("first", "second"):
        with atomic_path(path) as temporary:
            (temporary / "inner").mkdir(parents=True)
            (temporary / "inner" / name).write_text(name)
        assert [file.name for file in (path / "inner").iterdir()] == [name]
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert (path / "inner" / "second").read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("moment", [1, 2])  # before each of the two renames
def test_a_swap_of_folders_that_is_interrupted_leaves_the_old_one(tmp_path, monkeypatch, moment):
    path, moves, rename = tmp_path / "adapter", [], os.replace
    path.mkdir()
    (path / "old").touch()

    def replace(*names):
        moves.append(names)
        if len(moves) == moment:
            raise KeyboardInterrupt
        rename(*names)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        temporary.mkdir()
    assert [*tmp_path.iterdir()] == [path] and (path / "old").exists()


def test_a_full_disk_is_one_message(capsys):
    database = sqlite3.OperationalError("database or disk is full")
    database.sqlite_errorname = "SQLITE_FULL"
    for error in (OSError(errno.ENOSPC, "no space left"), database):
        with pytest.raises(SystemExit) as stopped:
            script(Mock(side_effect=error))
        assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: ")
    with pytest.raises(sqlite3.OperationalError):  # a mistake of ours keeps its traceback
        script(Mock(side_effect=sqlite3.OperationalError("no such column")))


def test_a_changed_file_has_another_digest(tmp_path):
    path = tmp_path / "weights"
    for text in ("a", "b"):
        path.write_text(text)
        os.utime(path, ns=(0, ord(text)))
        assert file_digest(path) == hashlib.sha256(text.encode()).hexdigest()[:12]


def test_tensors_read_back_bit_for_bit(tmp_path):
    tensors = {"a": torch.randn(3, 4, requires_grad=True).T, "b": torch.arange(5)}
    write_tensors(tmp_path / "t.safetensors", tensors)
    for name, tensor in read_tensors(tmp_path / "t.safetensors").items():
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype


@pytest.fixture
def config(tmp_path) -> Config:
    users = tmp_path / "users.jsonl"
    users.write_text("{}\n")
    return load_config(None, [f"run.root={tmp_path / 'runs'}", f"data.users={users}"])


def test_a_stage_is_done_only_with_the_key_it_ran_with(config):
    run = RunFolder(config.run.root)
    assert not run.is_done("rid", "k1")
    run.mark_done("rid", "k1", auc=0.7)
    again = RunFolder(config.run.root)
    assert again.is_done("rid", "k1") and not again.is_done("rid", "k2")
    assert not again.is_done("sit", "k1") and read_json(again / "rid" / "done.json")["auc"] == 0.7


def test_a_run_folder_explains_itself(config):
    run = Run(config).folder
    assert load_config(run / "config.yaml") == config
    assert list(read_json(run / "environment.json")["data"]) == [config.data.users]
    assert read_json(run / "environment.json")["versions"]["torch"] == torch.__version__
    run.log("rid", auc=0.5)
    run.log("rid", auc=0.6)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["auc"] for line in lines] == [0.5, 0.6]


def test_the_digest_changes_with_any_setting():
    changed = load_config(None, ["dpo.beta=0.2"])
    assert digest(load_config()) == digest(load_config()) != digest(changed)
    assert digest(load_config().rid) == digest(changed.rid)


def test_a_user_error_is_one_message_and_exit_code_2(capsys):
    def main():
        raise UserError("data.jsonl:3: user_id: missing")

    with pytest.raises(SystemExit) as caught:
        script(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: data.jsonl:3: user_id: missing\n"


# --------------------------------------------------------------------------------------- progress


def test_progress_writes_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    clock = itertools.count(0, 15)  # seconds; one look a step
    monkeypatch.setattr("files.time.monotonic", lambda: next(clock))
    steps = progress(iter("abcd"), "dpo round 1", total=4)
    for number, _ in enumerate(steps, 1):
        steps.set(loss=0.5 / number)
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert lines == [
        "dpo round 1: 2/4, 15.00s/it, 00:30 left, loss=0.25",
        "dpo round 1: 4/4, 15.00s/it, 00:00 left, loss=0.125",
    ]
    assert output.out == "" and progress.every <= 30


def test_progress_of_a_quick_loop_says_nothing_and_passes_every_item_on(capsys):
    assert [*progress(range(3), "quick")] == [0, 1, 2] and [*progress(iter("ab"), "x")] == [*"ab"]
    assert capsys.readouterr() == ("", "")


def test_only_the_first_process_shows_progress(capsys, monkeypatch):
    monkeypatch.setattr(progress, "every", 0)
    for rank, lines in (("0", 2), ("1", 0)):
        for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", rank), ("WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        assert [*progress("ab", "sit")] == [*"ab"]
        assert len(capsys.readouterr().err.splitlines()) == lines


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(progress, "every", 0)
    assert [*progress("ab", "sit")] == [*"ab"]
    assert "| 0/2 [" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("serve.repeat_days=-1", "serve.repeat_days"),
        ("rid.duplicate_cosine=7", "rid.duplicate_cosine"),
        ("generator.instruction=Suggest some.", "generator.instruction"),
        ("dpo.negatives=[]", "at least 1 item"),
        ("sft.candidates=2", "sft.candidates"),  # no list of three comes of two
        ("quality.floor=0.25", "quality.floor"),  # the largest variance of numbers from 0 to 1
    ],
)
def test_a_value_that_cannot_work_is_refused_at_its_field(word, reason):
    with pytest.raises(UserError, match=re.escape(reason)):
        load_config(None, [word])


@pytest.mark.parametrize("text", ["rl: {group: 4}\nrl: {steps: 3}", "rl:\n  steps: 3\n  steps: 4"])
def test_a_file_that_says_a_name_twice_is_refused(text, tmp_path):
    (tmp_path / "twice.yaml").write_text(text)  # YAML would forget the first without a word
    with pytest.raises(UserError, match="twice.yaml: .*a name stands twice.*line [12]"):
        load_config(tmp_path / "twice.yaml")


@pytest.mark.parametrize("word, methods", [
    ("data.users=x", "icebreaker"), ("data.feedback=x", "icebreaker"),
    ("generator.endpoint=x", "icebreaker"), ("data.dialogues=x", "garm or qualeqs"),
    ("data.catalogue=x", "qualeqs"), ("data.policies=x", "qualeqs"),
])
def test_a_setting_that_the_method_does_not_read_is_refused_not_ignored(word, methods):
    name = word.partition("=")[0]
    for method in {"icebreaker", "garm", "qualeqs"} - {*methods.split(" or ")}:
        with pytest.raises(UserError, match=f"{name}.* is for run.method={methods}|all three"):
            load_config(None, [f"run.method={method}", word])
