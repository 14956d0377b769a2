"""The bytes that plan.py estimates beside those that a CPU measures.

    python -m benchmarks.plan                # about 10 minutes of one core; writes results/plan.md

Each row is a fresh process: randomly initialised Qwen2 weights saved to a folder, loaded by llm.py,
then a SIT step, a DPO step (1 + 3 lists) or sampling through llm.py. The step runs once on a tiny
model first, so that imports and thread pools are there, and counts from then on.

Measured in fp32 and 4-bit: the process's resident memory (VmHWM, reset after loading, with glibc's
mmap threshold pinned: without it freed blocks stay and the figure depends on the past). Measured in
bf16: live tensors between operations, with the CPU standing in for a GPU, because a CPU's bf16
kernels make copies inside an operation (an addition of bf16 and fp32, for one) that CUDA's do not.
Not measured: CUDA's kernels, its allocator, 4-bit with bf16.
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
import plan
from benchmarks.common import machine, prepare, tokens
from config import ROOT, GeneratorConfig

SHAPES = {  # hidden, layers, heads, kv_heads, intermediate, vocabulary, tied
    "tiny": (64, 2, 4, 2, 128, 400, True),
    "small": (512, 4, 8, 2, 2816, 32_000, True),
    "half of 0.5B": (896, 12, 14, 2, 4864, 151_936, True),
    "wide": (896, 4, 7, 7, 4864, 32_000, False),
}
USERS, LIST_TOKENS, SAMPLES = 2, 48, 8


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
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w0", pad_token="w1")


def load(folder: str, g: GeneratorConfig, bf16: bool):
    """As train.py does. Weights leave the mapped file, whose read pages would count as memory."""
    model = llm.load_generator(folder, g.load_in_4bit, g.gradient_checkpointing)
    for p in model.parameters():
        p.data = p.data.bfloat16() if bf16 else p.data.clone()
    return llm.add_lora(model, g.lora_rank, g.lora_alpha, seed=0)


def work(model, g: GeneratorConfig, what: str):
    """A function that runs the stage's heaviest call on texts of the greatest length."""
    size = model.config.vocab_size
    if what == "sampling":
        prompts = [tokens(g.max_prompt_tokens, size) for _ in range(g.sample_rows // SAMPLES)]
        tokenizer = word_tokenizer(size)
        return lambda: llm.sample(
            model, tokenizer, prompts, SAMPLES, max_new_tokens=g.max_new_tokens, seed=0, stop="",
            temperature=g.temperature, top_p=g.top_p, top_k=g.top_k, rows=g.sample_rows,
        )
    lists = 1 if what == "sit" else 4
    prompts = [tokens(g.max_prompt_tokens, size) for _ in range(USERS)]
    own = [[tokens(g.max_new_tokens, size) for _ in range(lists)] for _ in range(USERS)]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)

    def step() -> None:
        optimiser.zero_grad()
        logps = torch.cat(llm.completion_logps(model, prompts, own, g.head_chunk))
        (-logps.sum()).backward()
        optimiser.step()

    return step


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors made under it that are alive, and the most that were at a time."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs or {}))
                  if isinstance(t, torch.Tensor)}
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                if size and place not in before and place not in self.known:
                    self.known[place] = size
                    self.now += size
                    weakref.finalize(storage, self.free, place)
        self.peak = max(self.peak, self.now)
        return out

    def free(self, place: int) -> None:
        self.now -= self.known.pop(place, 0)


def status(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


def measure(shape: str, what: str, g: GeneratorConfig, bf16: bool) -> dict:
    """Bytes of weights and of the peak, in this process."""
    prepare()
    with tempfile.TemporaryDirectory() as tiny, tempfile.TemporaryDirectory() as folder:
        save_model("tiny", tiny)
        work(load(tiny, g, bf16), g, what)()
        save_model(shape, folder)
        gc.collect()
        start = status("VmRSS")
        model = load(folder, g, bf16)
    gc.collect()
    loaded = status("VmRSS") - start
    run = work(model, g, what)
    run()  # AdamW's state is there from the second step on
    if bf16:
        held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
                for p in model.parameters()}
        states = 0 if what == "sampling" else 3 * 4 * sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
        with LiveTensors() as live:
            run()
        return {"weights": sum(held.values()), "peak": sum(held.values()) + states + live.peak}
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    run()
    return {"weights": loaded, "peak": status("VmHWM") - start}
