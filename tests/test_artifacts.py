"""Files of a finished run that are missing, damaged or of another shape: one line, wherever they
are read, that names the file and what to do."""

import json
import os
import shutil

import pytest
import torch
from conftest import micro

import train
from files import UserError, read_tensors, write_json, write_tensors
from llm.encoder import Encoder
from roles.players import players_of
from run import Run
from serving import feedback
from serving.engine import Engine
from stages.pairs import sample
from stages.ranker import load_ranker
from stages.rid import Distiller
from tables import people, seeds

SHAPES = ["", "{", "[]", "{}", '"text"', "null", "3", "[" * 100_000]


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run; its files are links, to be replaced and never written into."""
    shutil.copytree(finished, tmp_path / "tiny", copy_function=os.link)
    return Run(micro(tmp_path), describe=False)


def replaced(path, content=None):
    path.unlink()
    if content is not None:
        path.write_text(content)


def refused(read, name):
    with pytest.raises(UserError) as caught:
        read()
    said = str(caught.value)
    assert name in said and "\n" not in said and len(said) < 600, said
    assert "again" in said or "first" in said or "leads out" in said, said


class Again(Exception):
    """A stage is run."""


def trains(run):
    train.refuse_changes(run.config, [])
    train.run_stages(run.config, ["eval"])


ENTRIES = {"train.py": trains, "eval.py": lambda run: people.finished_run(run.config),
           "serve.py": lambda run: Engine(run.config)}
READ = {"serve.py": ("summarize", "rid", "ranker", "sit", "dpo"),
        "eval.py": ("summarize", "rid", "ranker", "sit", "dpo"),
        "train.py": tuple(stage for stage in train.STAGES if stage != "merge")}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("how", ["missing", "flipped", ""])
def test_whatever_a_stage_has_written_is_read_whole_or_named(run, monkeypatch, entry, how):
    def again(*_):
        raise Again

    monkeypatch.setattr(train, "run_stage", again)
    tried = 0
    for stage in READ[entry]:
        for name in run.folder.record(stage)["files"]:
            path, done = run.folder / stage / name, run.folder / stage / "done.json"
            whole, was = path.read_bytes(), done.read_bytes()
            path.unlink()
            if how != "missing":
                path.write_bytes(whole[:-7] + b"#" + whole[-6:] if how else b"")
            if how == "missing" and entry == "train.py":
                with pytest.raises(Again):  # what is missing is made again
                    trains(run)
            else:
                refused(lambda: ENTRIES[entry](run), f"{stage}/{name}")
            for file, content in ((path, whole), (done, was)):
                file.unlink(missing_ok=True)
                file.write_bytes(content)
            tried += 1
    assert tried > 20


def shortened(tensors):
    return dict(list(tensors.items())[1:])


TENSORS = {
    "missing": None, "lacking": shortened,
    "more": lambda t: t | {"other": torch.ones(2)},
    "of another shape": lambda t: {k: torch.ones(3, 5) for k in t},
    "nan": lambda t: {k: x * float("nan") for k, x in t.items()},
    "none": lambda t: {}, "empty": b"", "cut": b"0" * 99,
}


@pytest.mark.parametrize("how", TENSORS)
def test_weights_that_no_digest_covers_are_read_whole_or_named(run, how):
    writer, spoil = players_of(run).writer, TENSORS[how]
    adapter = run.folder / "sit" / "adapter"
    for name, read in {
        "rid/scorer.safetensors": lambda: Distiller.load(run),
        "ranker/train.safetensors": lambda: load_ranker(run, "train"),
        "sit/adapter/adapter_model.safetensors": lambda: writer.policy(adapter),
        run.encoder.cache.name: lambda: Encoder("", run.encoder.cache),
    }.items():
        path = next(run.folder.path.rglob(name))
        tensors = read_tensors(path)
        read()  # as it was written
        whole = path.read_bytes()
        path.unlink()
        if isinstance(spoil, bytes):
            path.write_bytes(spoil)
        elif spoil:
            write_tensors(path, spoil(tensors))
        if name.startswith("embeddings") and how in ("missing", "more"):
            read()  # a cache: made again
        elif how == "more" and name.startswith("sit"):
            read()  # PEFT takes what it knows
        else:
            refused(read, "adapter" if "adapter" in name else path.name)
        path.unlink(missing_ok=True)
        path.write_bytes(whole)


@pytest.mark.parametrize("content", [
    *SHAPES, '"x"', '{"r": "8"}', '{"peft_type": "NONE"}', '{"peft_type": "LORA", "r": -1}', None])
def test_a_config_of_an_adapter_is_read_or_named(run, content):
    adapter = run.folder / "sit" / "adapter"
    replaced(adapter / "adapter_config.json", content)
    refused(lambda: players_of(run).writer.policy(adapter), "sit/adapter")


GOOD = {"round": 1, "adapter": "dpo/round1/adapter", "ranker": "ranker/train.safetensors",
        "version": "feedback1-00000000"}
WRONG = [*SHAPES, *(json.dumps({k: x for k, x in GOOD.items() if k != name} | {"run": "KEY"})
                    for name in ("adapter", "ranker", "version")),
         *(json.dumps(GOOD | {"run": "KEY", name: wrong})
           for name in ("adapter", "ranker", "version")
           for wrong in (3, None, [], {}, "../../x", "/etc/passwd", "a\0b")),
         json.dumps(GOOD), json.dumps(GOOD | {"run": 3})]


@pytest.mark.parametrize("content", WRONG)
def test_what_a_server_is_to_take_up_is_read_whole_or_named(run, content):
    key = run.folder.key("dpo")
    file = run.folder / "feedback" / "current.json"
    write_json(file, GOOD | {"run": key})
    assert feedback.current(run)["version"] == GOOD["version"]
    file.write_text(content.replace("KEY", key))
    refused(lambda: feedback.current(run), "feedback/current.json")


@pytest.mark.parametrize("content", [*SHAPES, '{"key": 3}', '{"key": "k", "record": []}',
                                     '{"key": "k", "record": {}, "digest": "0"}'])
@pytest.mark.parametrize("name", ["rid/done.json", "rid/begun.json", "dpo/round1/done.json"])
def test_the_record_of_a_stage_is_read_whole_or_named(run, name, content, monkeypatch):
    monkeypatch.setattr(train, "run_stage", lambda *_: {})
    stage = name.rpartition("/")[0]
    (run.folder / stage / "done.json").unlink()
    (run.folder / name).write_text(content)
    refused(lambda: run.folder.record(stage), name)
    if not name.startswith("dpo"):
        refused(lambda: trains(run), name)


@pytest.mark.parametrize("content", SHAPES)
def test_what_belongs_to_no_stage_is_read_whole_or_named(run, content):
    (run.folder / "environment.json").unlink()
    (run.folder / "environment.json").write_text(content)
    refused(lambda: seeds.read_run(run.folder.path), "environment.json")
    writer, adapter = players_of(run).writer, run.adapter("sit")
    (run.folder / "sit" / "sampled.json").unlink(missing_ok=True)
    (run.folder / "sit" / "sampled.json").write_text(content)
    refused(lambda: sample(run, writer, 1, None, adapter, []), "sampled.json")
