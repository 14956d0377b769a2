import os

import hypothesis
import pytest
import torch

import train
from config import load_config
from files import ROOT

# The models of the tests are tiny: two threads gain nothing, and where other programs use the
# machine they wait for each other at every operation.
torch.set_num_threads(1)


# `--hypothesis-profile=many`: benchmarks/faults.py.
hypothesis.settings.register_profile("many", max_examples=2000, deadline=None)
hypothesis.settings.register_profile("calm", deadline=None)  # machines are shared: no test is timed
hypothesis.settings.load_profile("calm")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


os.environ.pop("ICEBREAKER_KEY", None)  # a server of the tests wants a key where a test says so


@pytest.fixture(autouse=True)
def _exact_floats():
    """A training run flushes tiny numbers to zero for the whole process; hypothesis objects."""
    torch.set_flush_denormal(False)


MICRO = """world.users=40 world.impressions_per_user=30 world.starter_pool=200 rid.epochs=2
    ranker.epochs=2 generator.list_size=3 generator.max_new_tokens=24 sit.max_rows=8
    sit.epochs=1 dpo.max_users=6 dpo.rounds=2 dpo.samples=2 data.train=0.3
    data.judge=0.3 data.valid=0.2 data.test=0.2 eval.lists=1 eval.bootstrap=20
    eval.examples=2""".split()


def micro(root, *words):
    return load_config(ROOT / "configs" / "tiny.yaml", [*MICRO, f"run.root={root}", *words])


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run folder in which every stage ran without a break; tests only read it."""
    root = tmp_path_factory.mktemp("whole")
    train.run_stages(micro(root), list(train.STAGES))
    return root / "tiny"


def rows_of(table: str) -> dict[str, list[str]]:
    """First cell of each row of a markdown table -> the others."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {first: rest for first, *rest in cells}
