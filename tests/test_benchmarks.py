"""The comparisons compare the same work; `python -m benchmarks` measures it."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from sentence_transformers import SentenceTransformer

import benchmarks.__main__
import benchmarks.plan
import icebreaker as ib
import llm
from benchmarks import common, fault_runs, faults, grpo, list_search
from benchmarks.contrastive import embed
from files import ROOT
from llm.encoder import packaged_minilm


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


def test_the_page_of_faults_says_with_how_many_tries_it_was_run():
    row = vars(faults.Row(tries=96)) | {"methods": [*fault_runs.METHODS]}
    lines = faults.page({"resume": row | {"asked": 4}, "atomic": row}).splitlines()
    cells = {cells[1]: cells for cells in ([x.strip() for x in s.split("|")] for s in lines) if
             len(cells) > 5}
    assert [cells[name][3] for name in ("resume", "atomic", "nan")] == ["4", "–", "–"]
    assert len({len(row) for row in cells.values()}) == 1


def test_embed_reads_each_text_once_and_recomputation_changes_no_gradient():
    model = SentenceTransformer(packaged_minilm()).eval()
    texts = ["chess openings", "Kyoto in autumn, by train and on foot", "chess openings", "bread"]
    expected = torch.from_numpy(model.encode(texts, normalize_embeddings=True))
    read, weight = [], model[0].auto_model.encoder.layer[0].output.dense.weight
    preprocess = model.preprocess
    model.preprocess = lambda batch: read.extend(batch) or preprocess(batch)
    slopes = []
    for recompute in (False, True):
        read.clear()
        vectors = embed(model, texts, 2, recompute)
        assert torch.allclose(vectors, expected, atol=1e-5) and torch.equal(vectors[0], vectors[2])
        assert sorted(read) == sorted(set(texts))
        model.zero_grad()
        (vectors[0] @ vectors[1] - vectors[2] @ vectors[3]).backward()
        assert len(read) == (6 if recompute else 3)
        slopes.append(weight.grad.clone())
    assert torch.allclose(*slopes, rtol=1e-4, atol=1e-7)


def test_steps_of_grpo_and_of_the_reward_model_are_one_with_their_peers():
    """Loss and gradient (benchmarks.common.same_step), of lists of unequal length."""
    model = grpo.policy(llm.load_generator(str(ROOT / "weights" / "tiny")))
    work = grpo.work(20, [6, 3, 6, 2], 2048)
    weights = [p.clone() for p in model.parameters()]
    steps, _ = grpo.checked(model, work, "ours", "trl", "compact")
    assert steps["ours"]() == pytest.approx(steps["trl"](), abs=1e-4) != 0
    steps, _ = grpo.checked(model, work, "ours again", "trl again")
    steps["ours again"]()
    grpo.checked(model, grpo.work(20, [3, 5, 4], 2048), "tree", "padded")
    kept = [p for name, p in model.named_parameters() if ".ref." not in name]
    assert all(map(torch.equal, weights, kept))  # or the sides would not do the same work
    other = dataclasses.replace(work, rewards=work.rewards[::-1])
    with pytest.raises(AssertionError, match="not the same work"):
        common.same_step(grpo.our_step(model, work), grpo.our_step(model, other), model, model)


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
    rows = [
        about | step,
        about | {"how": "trl", "out_of_memory": True},
        about | {"how": "stage sit", "tokens_per_s": 20.0, "peak_gb": 8.0, "estimate_gb": 4.0},
        about | {"how": "one list", "first_token_s": 0.25, "list_of_70_s": 3.5},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "results" / "gpu.jsonl").write_text(text)
    monkeypatch.setattr(common, "ROOT", tmp_path)
    page = "\n".join(benchmarks.__main__.gpu_section())
    assert "| sdpa" not in page and "| 10\\* |" in page and "out of memory" in page
    assert "| bf16 | stage sit | 512 | 20 |" in page and "| bf16 | 512 | 0.25 | 3.5 |" in page
    page = "\n".join(benchmarks.plan.gpu_section())
    assert "trl" not in page and "| stage sit | 512 | 4.00 | 8.00 | **0.500** |" in page
    assert "9.00\\*" in page and "\\* n." in page


def test_the_gpu_script_runs_in_small():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--small"], capture_output=True, text=True,
        cwd=ROOT, check=True,
    )
    made = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {(m["4bit"], m["how"]) for m in made} == {
        *((True, f"stage {name}") for name in ("sit", "dpo", "sampling")), (False, "trl"),
        *((x, how) for x in (True, False) for how in ("sdpa", "sampling 16 lists", "one list")),
    }  # fmt: skip
    assert all(m.get("tokens_per_s", m.get("first_token_s")) > 0 for m in made)
