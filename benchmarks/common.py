"""What the comparisons share: one thread, CPU seconds, candidates in turn, medians.

A machine that is shared slows everything that runs on it at a time; candidates that take turns are
slowed alike, and their ratio stands. `python -m benchmarks.dpo` runs one comparison.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from files import ROOT
from llm import load_generator, settle_libraries
from llm.weights import smollm2_folder

PACKAGES = ("torch", "transformers", "peft", "trl", "sentence-transformers", "pyversity")


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
    memory_at_least: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        return self.peer_s / self.ours_s

    @property
    def memory_ratio(self) -> float | None:
        return self.peer_gb / self.ours_gb if self.ours_gb else None

    @property
    def missed(self) -> bool:
        """Whether a ratio is below what was asked."""
        memory = self.memory_at_least and self.memory_ratio < self.memory_at_least
        return bool(memory or (self.at_least and self.ratio < self.at_least))


def gpu_rows() -> list[dict]:
    """What benchmarks.gpu measured, if it was run."""
    file = ROOT / "results" / "gpu.jsonl"
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def bits(row: dict) -> str:
    """The weights of such a row."""
    return "4-bit" if row["4bit"] else "bf16"


def gpu_marks(rows: list[dict]) -> dict[str | None, str]:
    """What stands beside a figure of a row with this note; None: without one."""
    notes = dict.fromkeys(r["note"] for r in rows if "note" in r)
    return {None: "", **dict(zip(notes, ("\\*", "†", "‡"), strict=False))}


def gpu_notes(rows: list[dict]) -> list[str]:
    """Below a table of these rows: what the marks mean."""
    return [f"\n{mark} {note}." for note, mark in gpu_marks(rows).items() if note]


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


def same_step(
    ours: Callable[[], float], peer: Callable[[], float], our_model, peer_model, tolerance=1e-4,
    loss_tolerance=1e-3,
) -> str:
    """Assert that both steps give one loss and one gradient; say by how much the gradients differ.

    The steps zero the gradients of their model first and leave those of the loss that they return.
    """
    losses, gradients = [], []
    for step, model in ((ours, our_model), (peer, peer_model)):
        losses.append(step())
        slopes = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        gradients.append(torch.cat(slopes).clone())  # the next step may be of the same model
    error = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    if abs(losses[0] - losses[1]) > loss_tolerance or error > tolerance:
        raise AssertionError(f"not the same work: losses {losses}, gradients differ by {error}")
    return f"gradients differ by {error:.0e}"


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
        memory, asked = "–", f"{r.at_least:g}×" if r.at_least else "–"
        if r.ours_gb:
            memory = f"{r.ours_gb:.1f} : {r.peer_gb:.1f} = {r.memory_ratio:.1f}×"
            memory += f" (asked {r.memory_at_least:g}×)" if r.memory_at_least else ""
        lines.append(
            f"| {r.work} | {r.peer} | {r.ours_s:.3g} | {r.peer_s:.3g} | **{r.ratio:.1f}×** | "
            f"{asked} | {memory} | {r.note} |"
        )
    return "\n".join(lines)


def machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.is_file() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def report(name: str, rows: list[Row]) -> None:
    """Print the table, and one JSON line for the machine."""
    print(f"\n{name}\n\n{table(rows)}\n")
    lines = [asdict(r) | {"ratio": r.ratio, "memory_ratio": r.memory_ratio} for r in rows]
    print(json.dumps({"benchmark": name, "machine": machine(), "rows": lines}), flush=True)


def report_lines(name: str, text: str, lines: list[str]) -> None:
    """As `report`, of a table of another form: what it is of, and its lines in markdown."""
    print(f"\n{text}\n\n" + "\n".join(lines) + "\n")
    result = {"benchmark": name, "text": text, "table": "\n".join(lines), "machine": machine()}
    print(json.dumps(result), flush=True)


def prepare() -> None:
    """One thread, the same random numbers each time, no warnings between the figures."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settle_libraries()


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


def smollm2():
    """SmolLM2-135M-Instruct, the embedded default, ended by w0 as `qwen` is: all lists run full."""
    model = load_generator(str(smollm2_folder()))  # fetched and converted the first time
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 0, 1
    return model


def tokens(n: int, vocabulary: int = 151_936) -> list[int]:
    return torch.randint(10, vocabulary, (n,)).tolist()
