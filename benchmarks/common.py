"""What the comparisons share: one thread, CPU seconds, candidates in turn, medians.

A machine that is shared slows everything that runs on it at a time; candidates that take turns are
slowed alike, and their ratio stands. `python -m benchmarks.dpo` runs one comparison.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

warnings.filterwarnings("ignore")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from llm import quiet_libraries  # noqa: E402


@dataclass
class Row:
    """One line of a table: seconds are CPU seconds of one thread, medians."""

    work: str
    peer: str
    ours_s: float
    peer_s: float
    at_least: float | None  # the ratio that the project set out for
    ours_gb: float | None = None  # peak memory of a process that does nothing else
    peer_gb: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.peer_s / self.ours_s


def seconds(candidates: dict[str, Callable[[], object]], repeats: int = 5) -> dict[str, float]:
    """Median CPU seconds of each candidate; they run in turn, after one unmeasured turn."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, run in candidates.items():
            gc.collect()
            started = time.process_time()
            run()
            if turn:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_gb(module: str, *words: str) -> float:
    """Peak memory (GB) of a fresh process that runs `python -m module words`."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])["peak_gb"]


def print_peak() -> None:
    """Of this process alone: what getrusage reports is inherited from the one that started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kilobytes = int(status.partition("VmHWM:")[2].split()[0])
    print(json.dumps({"peak_gb": kilobytes * 1024 / 1e9}))


def table(rows: list[Row]) -> str:
    lines = [
        "| work | beside | ours, s | peer, s | ratio | asked | memory, GB | note |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        memory = f"{r.ours_gb:.1f} : {r.peer_gb:.1f}" if r.ours_gb and r.peer_gb else "–"
        asked = f"{r.at_least:g}×" if r.at_least else "–"
        lines.append(
            f"| {r.work} | {r.peer} | {r.ours_s:.3g} | {r.peer_s:.3g} | **{r.ratio:.1f}×** | "
            f"{asked} | {memory} | {r.note} |"
        )
    return "\n".join(lines)


def report(name: str, rows: list[Row]) -> None:
    """Print the table, and one JSON line for the machine."""
    print(f"\n{name}\n\n{table(rows)}\n")
    print(json.dumps({"benchmark": name, "rows": [asdict(r) for r in rows]}), flush=True)


def prepare() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    quiet_libraries()


def qwen(vocabulary: int = 151_936):
    """Random weights of Qwen2.5-0.5B's width and vocabulary, four layers of it, float32."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=4,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    return Qwen2ForCausalLM(config).eval()


def tokens(n: int, vocabulary: int = 151_936) -> list[int]:
    return torch.randint(10, vocabulary, (n,)).tolist()
