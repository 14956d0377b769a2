"""The bytes that tools/plan.py estimates beside those that a CPU measures.

    python -m benchmarks.plan                # about 20 minutes of one core; writes results/plan.md

Each row is a fresh process: randomly initialised Qwen2 weights saved to a folder, loaded by llm,
then a SIT step, a DPO step (1 + 3 lists) or sampling through llm. The step runs once on a tiny
model first, so that imports and thread pools are there, and counts from then on.

Measured in fp32 and 4-bit: the process's resident memory (VmHWM, reset after loading, with glibc's
mmap threshold pinned: without it freed blocks stay and the figure depends on the past). Measured in
bf16: live tensors between operations, with the CPU standing in for a GPU, because a CPU's bf16
kernels make copies inside an operation (an addition of bf16 and fp32, for one) that CUDA's do not.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import llm
from benchmarks.common import bits, gpu_marks, gpu_notes, gpu_rows, machine, prepare, tokens
from config import GeneratorConfig
from files import ROOT
from tools import plan

SHAPES = {  # hidden, layers, heads, kv_heads, intermediate, vocabulary, tied
    "tiny": (64, 2, 4, 2, 128, 400, True),
    "small": (512, 4, 8, 2, 2816, 32_000, True),
    "half of 0.5B": (896, 12, 14, 2, 4864, 151_936, True),
    "wide": (896, 4, 7, 7, 4864, 32_000, False),
}
USERS, LIST_TOKENS, SAMPLES = 2, 48, 8
LISTS = {"sit": 1, "dpo": 4}  # of each user


def save_model(name: str, folder: str) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, layers, heads, kv_heads, intermediate, vocabulary, tied = SHAPES[name]
    config = Qwen2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=intermediate, vocab_size=vocabulary,
        tie_word_embeddings=tied, max_position_embeddings=32_768,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)


def word_tokenizer(size: int):
    """A word per token id; the model draws the end, w0, hardly ever."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w2")
    fast = Tokenizer(words)
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="w0", pad_token="w1")


def load(folder: str, g: GeneratorConfig, bf16: bool):
    """As train.py does. Weights leave the mapped file, whose read pages would count as memory."""
    precision = "bfloat16" if bf16 else "float32"
    model = llm.load_generator(
        folder, g.load_in_4bit, g.gradient_checkpointing, precision=precision)
    for p in model.parameters():
        p.data = p.data.clone()
    return llm.add_lora(model, g.lora_rank, g.lora_alpha, seed=0)


def work(model, tokenizer, g: GeneratorConfig, what: str):
    """A function that runs the stage's heaviest call on texts of the greatest length."""
    size = model.config.vocab_size
    if what == "sampling":
        prompts = [tokens(g.max_prompt_tokens, size) for _ in range(g.sample_rows // SAMPLES)]
        return lambda: llm.sample(
            model, tokenizer, prompts, SAMPLES, max_new_tokens=g.max_new_tokens, seed=0, stop="",
            temperature=g.temperature, top_p=g.top_p, top_k=g.top_k, rows=g.sample_rows,
        )  # stop="": every list is as long as it may be
    prompts = [tokens(g.max_prompt_tokens, size) for _ in range(USERS)]
    lists = [[tokens(g.max_new_tokens, size) for _ in range(LISTS[what])] for _ in range(USERS)]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step() -> None:
        optimiser.zero_grad()
        logps = torch.cat(llm.completion_logps(model, prompts, lists))
        (-logps.sum()).backward()
        optimiser.step()

    return step


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive, and the most that were at a time."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0  # address -> bytes of what was made in here

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs or {}))
                  if isinstance(t, torch.Tensor)}
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                if size and place not in before and place not in self.alive:
                    self.alive[place] = size
                    self.now += size
                    weakref.finalize(storage, self.free, place)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, place: int) -> None:
        self.now -= self.alive.pop(place, 0)


def resident(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


def measure(shape: str, what: str, precision: str, g: GeneratorConfig) -> dict[str, float]:
    """Bytes of the weights and of the peak, in this process."""
    prepare()
    bf16, words = precision == "bf16", [word_tokenizer(SHAPES[s][5]) for s in ("tiny", shape)]
    vocabularies = [tokenizer.get_vocab() for tokenizer in words]  # llm.sample reads them too
    with tempfile.TemporaryDirectory() as tiny, tempfile.TemporaryDirectory() as folder:
        save_model("tiny", tiny)
        work(load(tiny, g, bf16), words[0], g, what)()
        save_model(shape, folder)
        gc.collect()
        start = resident("VmRSS")
        del vocabularies
        model = load(folder, g, bf16)
    weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    run = work(model, words[1], g, what)
    run()  # AdamW's state is there from the second step on
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    if bf16:
        with LiveTensors() as live:
            run()
        held = weights + (0 if what == "sampling" else 3 * 4 * trained)  # dw, and the averages
        return {"weights": weights - 4 * trained, "peak": held + live.peak}
    run()
    return {"weights": weights - 4 * trained, "peak": resident("VmHWM") - start}


def estimate(shape: str, what: str, precision: str, g: GeneratorConfig) -> dict[str, float]:
    sizes = SHAPES[shape]
    s, a = plan.Shape(*sizes, head_dim=sizes[0] // sizes[2]), 2 if precision == "bf16" else 4
    if what == "sampling":
        return plan.sampling(s, g, SAMPLES, a)
    return plan.training(s, g, USERS, LISTS[what], a)


def cases() -> list[tuple[str, str, str, bool, int]]:
    """(shape, stage, precision, gradient checkpointing, prompt tokens) of each row."""
    every = [
        ("small", what, precision, again, 256)
        for precision in ("fp32", "4-bit", "bf16")
        for what in ("sit", "dpo", "sampling")
        for again in (False, True)
        if what != "sampling" or not again
    ]
    longer = [
        (shape, what, precision, again, prompt)
        for shape, precision, prompt in (
            ("half of 0.5B", "fp32", 128), ("half of 0.5B", "4-bit", 768), ("wide", "fp32", 1024),
            ("wide", "bf16", 1024),
        )
        for what, again in (("sit", True), ("dpo", False), ("dpo", True), ("sampling", False))
    ]
    return every + longer


def settings(precision: str, again: bool, prompt: int) -> GeneratorConfig:
    return GeneratorConfig(
        max_prompt_tokens=prompt, max_new_tokens=LIST_TOKENS, sample_rows=4 * SAMPLES,
        load_in_4bit=precision == "4-bit", gradient_checkpointing=again,
    )


def page(rows: list[dict]) -> str:
    worst = max(rows, key=lambda r: abs(r["ratio"] - 1))
    lines = [
        "# Memory: estimated and measured\n",
        "```bash\npython -m benchmarks.plan\n```\n",
        *(f"{line}\n" for line in __doc__.split("\n\n")[2:]),
        ", ".join(f"{name} {value}" for name, value in machine().items()) + ".\n",
        "Shapes (hidden, layers, heads, KV heads, intermediate, vocabulary, tied): "
        + "; ".join(f"{k} {v}" for k, v in SHAPES.items() if k != "tiny")
        + f". {USERS} users a step, lists of {LIST_TOKENS} tokens, LoRA r16; sampling: {SAMPLES} "
        "lists of each of 4 prompts.\n",
        f"{len(rows)} rows; the ratio furthest from 1 is {worst['ratio']:.3f}.\n",
        "| shape | stage | precision | checkpointing | prompt | estimate, MB | measured, MB "
        "| ratio | ratio without weights |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['shape']} | {r['stage']} | {r['precision']} | {'yes' if r['again'] else 'no'} | "
            f"{r['prompt']} | {r['estimate'] / 1e6:.0f} | {r['measured'] / 1e6:.0f} | "
            f"**{r['ratio']:.3f}** | {r['ratio_without_weights']:.3f} |"
        )
    return "\n".join(lines + gpu_section()) + "\n"


def gpu_section() -> list[str]:
    """The steps and stages that benchmarks.gpu measured, beside the estimate."""
    if not (rows := gpu_rows()):
        return ["\nUnmeasured: CUDA."]
    lines = [
        f"\n## On one {rows[0]['device']}\n",
        "`python -m benchmarks.gpu > results/gpu.jsonl`, Qwen2.5-7B's shape, torch's allocated "
        "peak. A stage: its heaviest call with the settings of configs/qwen2.5-7b.yaml and no more "
        "memory than 24 GB. A DPO step: one user, 1 + 3 lists of 64 tokens, gradient "
        "checkpointing; the estimate is without AdamW's averages, which no step there had.\n",
        "| weights | work | prompt | estimate, GB | measured, GB | ratio |",
        "|---|---|---|---|---|---|",
    ]
    shape, marks = plan.QWEN["7B"], gpu_marks(rows)
    for r in rows:
        if not (r["how"] == "sdpa" or "estimate_gb" in r) or "peak_gb" not in r:
            continue
        estimated, work = r.get("estimate_gb"), r["how"]
        if not estimated:
            g = GeneratorConfig(
                max_prompt_tokens=r["prompt"], max_new_tokens=64, load_in_4bit=r["4bit"],
                gradient_checkpointing=True,
            )
            step = plan.training(shape, g, 1, 4, 2)["peak"] - 8 * shape.lora(g.lora_rank)
            estimated, work = step / 1e9, f"DPO step, {r['how']}"
        lines.append(
            f"| {bits(r)} | {work} | {r['prompt']} | {estimated:.2f} | "
            f"{r['peak_gb']:.2f}{marks[r.get('note')]} | **{estimated / r['peak_gb']:.3f}** |"
        )
    return lines + gpu_notes(rows)


def row(shape: str, what: str, precision: str, again: bool, prompt: int) -> dict:
    """Measured in a process of its own, and estimated."""
    case = (shape, what, precision, again, prompt)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.plan", "--case", json.dumps(case)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    estimated = estimate(shape, what, precision, settings(precision, again, prompt))
    ratio = estimated["peak"] / measured["peak"]
    beside = (estimated["peak"] - estimated["weights"]) / (measured["peak"] - measured["weights"])
    return {
        "shape": shape, "stage": what, "precision": precision, "again": again, "prompt": prompt,
        "estimate": estimated["peak"], "measured": measured["peak"],
        "ratio": ratio, "ratio_without_weights": beside,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--case", type=json.loads, help="one row, as JSON; prints JSON")
    if case := parser.parse_args().case:
        shape, what, precision, again, prompt = case
        print(json.dumps(measure(shape, what, precision, settings(precision, again, prompt))))
        return
    rows = []
    for case in cases():
        rows.append(row(*case))
        print(json.dumps(rows[-1]), flush=True)
    (ROOT / "results" / "plan.md").write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
