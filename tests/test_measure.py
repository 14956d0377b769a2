"""Equal policies write equal lists."""

import shutil

from conftest import micro

from files import read_json
from run import Run
from tables import experiments, measure


def test_equal_policies_write_equal_lists(finished, tmp_path, monkeypatch):
    """For the same users, whatever others a method writes for beside them, and however many."""
    shutil.copytree(finished.parent, tmp_path / "runs")  # with the base model
    run = Run(micro(tmp_path / "runs", "ab.lists=2", "ab.searched=4"), describe=False)
    methods = {"IceBreaker": experiments.Method("sit"), "middle": experiments.Method("sit")}
    monkeypatch.setattr(experiments, "methods", lambda: methods)
    measure.write_starters(run.config, experiments.MAIN)
    made = read_json(run.folder / "report" / "starters.json")["lists"]
    assert [*made["middle"]] == run.ids("test") and {*run.ids("judge")} < {*made["IceBreaker"]}
    for user, lists in made["middle"].items():
        assert made["IceBreaker"][user][:2] == lists and len(made["IceBreaker"][user]) == 4
