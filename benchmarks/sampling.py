"""Sampling n lists of each prompt beside transformers' generate(num_return_sequences=n).

    python -m benchmarks.sampling

generate reads the prompt n times and keeps it n times, and copies what it keeps at each token. With
its draws (benchmarks/parity.py) our tree gives the same tokens; our own cuts to the top_k first and
has other random numbers. SmolLM2 is the embedded default; the other has a vocabulary so large that
to sort it, as generate does, takes longer than the four layers.
"""

from __future__ import annotations

import time

import torch

import llm
from benchmarks.common import Row, prepare, qwen, report, seconds, smollm2, tokens
from benchmarks.parity import GenerateDraw
from llm.sampling import Draw, Tree

N, PROMPT = 16, 384
CHOSEN = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}


def word_tokenizer(vocabulary: int):
    """A word per token id, so that texts can be compared."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    ids = {f"w{i}": i for i in range(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w1")


def compare(model, prompt: list[int], new: int, repeats: int) -> dict[str, float]:
    """CPU seconds of generate and of the tree with either draw, once the tokens are the same."""
    tokenizer, ids = word_tokenizer(model.config.vocab_size), torch.tensor([prompt])

    def ours(sampler: str) -> list[str]:
        draw = GenerateDraw(**CHOSEN, seed=0) if sampler == "generate" else None
        (lists,) = llm.sample(
            model, tokenizer, [prompt], N, seed=0, max_new_tokens=new, draw=draw, stop="", **CHOSEN
        )
        return lists

    def generate() -> list[str]:
        torch.manual_seed(0)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_return_sequences=N, do_sample=True,
            max_new_tokens=new, **CHOSEN,
        )
        return tokenizer.batch_decode(out[:, len(prompt) :], skip_special_tokens=True)

    lists = ours("generate")
    assert lists == generate() and all(len(text.split()) == new for text in lists)
    candidates = {name: lambda x=name: ours(x) for name in ("generate", "fast")}
    return seconds({**candidates, "peer": generate}, repeats)


@torch.no_grad()
def product_shares(model, prompt: list[int], new: int) -> tuple[float, float]:
    """Shares of a decode step: of the products with weights, and of those of attention.

    The profiler's own time counts as the rest of the step.
    """
    tree, draw = Tree(model, [prompt], N, new, pad=1), Draw(**CHOSEN, seed=0)
    draw.begin([0], N, new)

    def steps(count: int) -> None:
        for _ in range(count):
            tree.write(draw(tree.logits, tree.prompt, tree.sample, tree.steps))
            tree.step(torch.zeros_like(tree.token, dtype=torch.bool))

    steps(new // 4)
    with torch.profiler.profile() as profile:
        started = time.perf_counter()
        steps(new // 2)
        elapsed = time.perf_counter() - started
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in profile.key_averages()}
    weights = spent.get("aten::mm", 0) + spent.get("aten::addmm", 0)
    return weights / elapsed, spent["aten::bmm"] / elapsed


def main() -> None:
    prepare()
    qwen2, smol = qwen(), smollm2()
    with torch.no_grad():
        qwen2.lm_head.weight = torch.nn.Parameter(qwen2.lm_head.weight * 8)  # peaked, as trained
    rows = []
    for name, model, new, repeats, asked in (
        ("SmolLM2", smol, 24, 3, {"generate": 2.5, "fast": 2.5}),
        ("SmolLM2", smol, 96, 3, {"generate": 2, "fast": 2}),
        ("large vocabulary", qwen2, 24, 3, {"generate": 1.5, "fast": 3}),
    ):
        prompt = tokens(PROMPT, model.config.vocab_size)
        times = compare(model, prompt, new, repeats)
        work = f"{name}: sampling {N} lists, prompt {PROMPT}, {new} new tokens"
        note = "tokens equal"
        if model is smol:
            weights, attention = product_shares(model, prompt, new)
            note += (f"; a step is {weights + attention:.0%} matrix products ({weights:.0%} with "
                     f"weights, {attention:.0%} attention)")
        rows += [
            Row(f"{work}, the same tokens", "generate", times["generate"], times["peer"],
                asked.get("generate"), note=note),
            Row(f"{work}, fast sampler", "generate", times["fast"], times["peer"],
                asked.get("fast"), note="other random numbers, same top-k and top-p"),
        ]
    report("Sampling", rows)


if __name__ == "__main__":
    main()
