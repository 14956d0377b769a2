"""The comparisons compare the same work; `python -m benchmarks` measures it."""

import json
import subprocess
import sys

import pytest
import torch

import benchmarks.__main__
import benchmarks.plan
import icebreaker as ib
from benchmarks import common, list_search
from config import ROOT


def test_plain_and_vectorised_search_agree(monkeypatch):
    monkeypatch.setattr(list_search, "K", 4)
    utility = torch.rand(3, 20, generator=torch.Generator().manual_seed(0))
    e = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(1))
    similarity = torch.nn.functional.normalize(e, dim=-1)
    similarity = similarity @ similarity.transpose(1, 2)
    for expand in (4, 20):
        _, values = ib.list_search(
            utility, similarity, 4, list_search.BEAM, expand, list_search.WEIGHT
        )
        for row, u, s in zip(values, utility.tolist(), similarity.tolist(), strict=True):
            expected = list_search.plain_search(u, s, expand)
            assert row.tolist() == pytest.approx(expected, abs=1e-5)


def test_candidates_take_turns_and_the_first_turn_is_not_measured():
    calls = []
    times = common.seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3 and times.keys() == {"a", "b"}


def test_the_table_shows_the_ratio_beside_what_was_asked():
    text = common.table([common.Row("work", "peer", 2.0, 9.0, 4)])
    assert "| work | peer | 2 | 9 | **4.5×** | 4× | – |" in text


def test_pages_take_a_row_that_ran_out_of_memory(monkeypatch, tmp_path):
    (tmp_path / "results").mkdir()
    about = {"device": "card", "torch": "2", "4bit": False, "prompt": 512}
    step = {"how": "sdpa", "tokens_per_s": 10.0, "share_of_peak": None, "peak_gb": 9.0, "note": "n"}
    rows = [about | step, about | {"how": "flex_attention", "out_of_memory": True}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "results" / "gpu.jsonl").write_text(text)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    page = "\n".join(benchmarks.__main__.gpu_section())
    assert "| sdpa" not in page and "9.0*" in page and "out of memory" in page
    assert "flex" not in "\n".join(benchmarks.plan.gpu_section())


def test_the_gpu_script_runs_in_small():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--small"], capture_output=True, text=True,
        cwd=ROOT, check=True,
    )
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {(m["4bit"], m["how"]) for m in made} == {
        (True, "sdpa"), (True, "sampling 16 lists"),
        (False, "sdpa"), (False, "sampling 16 lists"), (False, "trl"),
    }  # fmt: skip
    assert all(m["tokens_per_s"] > 0 for m in made)
