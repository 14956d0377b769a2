"""DPO steps, stages and sampling with a model of Qwen2.5-7B's shape on one GPU.

    python -m benchmarks.gpu > results/gpu.jsonl   # random weights: as fast and large as real ones
    python -m benchmarks.gpu --small               # a small shape on any machine, to try it
    python -m benchmarks.gpu --ways sdpa           # our DPO steps only

For 4-bit (NF4) and bf16, prompts of 512 and 2,048, one user a step (1 + 3 lists of 64 tokens), with
gradient checkpointing: tokens/s, share of the card's dense bf16 peak (model FLOP only: recomputed
layers do not count as work), peak memory, and whether the step also fits under 24 GB; TRL's step
beside it (in bf16, without checkpointing). Sampling (4 prompts, 16 lists each, 24 tokens): tokens/s
and the share of the memory's bandwidth that reading the weights once a step takes (prefill in the
time). Memory is that of a step: AdamW's state of the adapter (0.3 GB at 7B) comes to it.

In 4 bit, with no more memory than a 24 GB card has, also the heaviest call of each stage of
configs/qwen2.5-7b.yaml, AdamW's state and all, beside what --plan estimates. And how long one user
waits for the first token and for a list of 70.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import tempfile
import time
from pathlib import Path

import torch

import llm
from benchmarks.common import settle_libraries, tokens
from benchmarks.dpo import our_step, trl_step
from config import Config, load_config
from files import ROOT
from llm.sampling import Draw, Tree
from stages.steps import new_optimiser, step
from tools import plan

# Dense bf16 TFLOP/s and memory GB/s of data-sheets; a card that is not listed gets no share.
CARDS = {
    "H100 80GB HBM3": (989, 3350), "H200": (989, 4800), "A100-SXM4-80GB": (312, 2039),
    "RTX 4090": (165, 1008),
}
LISTS, LIST_TOKENS = 4, 64  # one chosen and three rejected lists


def save_random_model(folder: Path, small: bool) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = (
        {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        if small
        else {
            "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
            "num_hidden_layers": 28,
        }
    )
    heads = (4, 2) if small else (28, 4)
    config = Qwen2Config(
        **shape, num_attention_heads=heads[0], num_key_value_heads=heads[1],
        tie_word_embeddings=False, max_position_embeddings=32_768,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def timed(run, repeats: int = 3) -> float:
    """Median wall-clock seconds after one warm-up."""
    taken = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return sorted(taken[1:])[repeats // 2]


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")


def work(model, length: int):
    """(prompt, lists, reference log-probabilities) of one user."""
    size = model.config.vocab_size
    prompt = torch.randint(10, size, (length,)).tolist()
    lists = [torch.randint(10, size, (LIST_TOKENS,)).tolist() for _ in range(LISTS)]
    return prompt, lists, torch.zeros(LISTS)


def measure_step(model, length: int, how: str, peak_tflops: float | None) -> dict:
    """how: "sdpa", which is ours, or "trl"."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    user = work(model, length)
    seconds = timed(trl_step(model, *user) if how == "trl" else our_step(model, *user))
    row = length + LISTS * LIST_TOKENS  # TRL computes more tokens for the same work
    config = model.config
    weights = config.num_hidden_layers * (
        2 * config.hidden_size**2
        + 2 * config.hidden_size**2 * config.num_key_value_heads // config.num_attention_heads
        + 3 * config.hidden_size * config.intermediate_size
    )
    # Forward, and the gradient in the input (frozen weights have none): 4 FLOP a weight.
    flop = 4 * weights * row + 4 * config.vocab_size * config.hidden_size * LISTS * LIST_TOKENS
    result = {
        "seconds": seconds, "tokens_per_s": row / seconds,
        "share_of_peak": flop / seconds / 1e12 / peak_tflops if peak_tflops else None,
        "peak_gb": peak_gb(),
    }  # fmt: skip
    if how == "sdpa" and torch.cuda.is_available():
        result["fits_24_gb"] = measure_24_gb(model, length)
    return result


@contextlib.contextmanager
def at_most_24_gb():
    """The memory of a 24 GB card; the peak is counted anew."""
    if not torch.cuda.is_available():
        yield
        return
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 24e9 / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def measure_24_gb(model, length: int) -> bool:
    """Whether the step fits on a 24 GB card."""
    try:
        with at_most_24_gb():
            our_step(model, *work(model, length))()
        return True
    except torch.OutOfMemoryError:
        return False


def decoding(model, prompts: int, n: int, length: int, new: int):
    """A function that samples n lists of `new` tokens of each of some prompts, to the end."""
    size = model.config.vocab_size
    inputs = [tokens(length, size) for _ in range(prompts)]
    draw = Draw(0.7, 0.95, 50, seed=0)
    draw.begin([*range(prompts)], n, new)

    @torch.no_grad()
    def run() -> None:
        tree = Tree(model, inputs, n, new, pad=0)
        while tree.is_open:  # random weights never write an end worth waiting for
            tree.write(draw(tree.logits, tree.prompt, tree.sample, tree.steps))
            tree.step(torch.zeros_like(tree.token, dtype=torch.bool))

    return run


def measure_sampling(model, n: int, length: int, new: int, bandwidth: float | None) -> dict:
    seconds = timed(decoding(model, 4, n, length, new))
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    return {
        "tokens_per_s": 4 * n * new / seconds,
        "share_of_bandwidth": weights * new / seconds / bandwidth if bandwidth else None,
    }


def measure_waiting(model, length: int) -> dict:
    """Seconds until one user has the first token, and a list of 70."""
    first, whole = (timed(decoding(model, 1, 1, length, new)) for new in (1, 70))
    return {"first_token_s": first, "list_of_70_s": whole}


def measure_stage(model, stage: str, config: Config) -> dict:
    """The heaviest call of a stage, with 24 GB of memory at most.

    peak_gb is what torch has allocated at most, estimate_gb what --plan says of it for 7B.
    """
    g, size = config.generator, model.config.vocab_size
    optimiser, schedule = new_optimiser(model, 1e-5, 100)
    users = config.sit.batch_users if stage == "sit" else config.dpo.batch_users
    lists = config.sit.lists_per_row if stage == "sit" else 1 + len(config.dpo.negatives)
    prompts = [tokens(g.max_prompt_tokens, size) for _ in range(users)]
    written = [[tokens(g.max_new_tokens, size) for _ in range(lists)] for _ in prompts]

    def run() -> None:
        logps = torch.cat(llm.completion_logps(model, prompts, written))
        (-logps.mean()).backward()
        step(model, optimiser, schedule)

    run()  # the state of AdamW is there from now on; while sampling too
    computed = users * (g.max_prompt_tokens + lists * g.max_new_tokens)
    if stage == "sampling":
        n = min(config.dpo.samples, config.eval.lists)
        users = g.sample_rows // n
        run = decoding(model, users, n, g.max_prompt_tokens, g.max_new_tokens)
        computed = users * n * g.max_new_tokens
    with at_most_24_gb():
        seconds, peak = timed(run, 1), peak_gb()
    row = {"seconds": seconds, "tokens_per_s": computed / seconds}
    if torch.cuda.is_available():
        estimate = plan.stage_bytes(config, plan.QWEN["7B"], 2)[stage]["peak"]
        row |= {"peak_gb": peak, "estimate_gb": estimate / 1e9, "fits_24_gb": True}
    return row


def measurements(model, small: bool, in_4bit: bool, ways: list[str]):
    """(name of the work, prompt tokens, function that gives the rest of its row)."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    tflops, bandwidth = next((v for k, v in CARDS.items() if k in name), (None, None))
    short, long = (32, 64) if small else (512, 2048)
    yield "sampling 16 lists", short, lambda: measure_sampling(model, 16, short, 24, bandwidth)
    yield "one list", short, lambda: measure_waiting(model, short)
    words = ["generator.max_prompt_tokens=64", "generator.sample_rows=8"] if small else []
    config = load_config(ROOT / "configs" / "qwen2.5-7b.yaml", words)
    for stage in ("sit", "dpo", "sampling") if in_4bit else ():
        length = config.generator.max_prompt_tokens
        yield f"stage {stage}", length, lambda stage=stage: measure_stage(model, stage, config)
    for how in ways:
        for length in (short, long) if how != "trl" or not in_4bit else ():
            yield how, length, lambda a=(length, how): measure_step(model, *a, tflops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--ways", nargs="+", default=["sdpa", "trl"])
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not args.small and not gpu:
        raise SystemExit("benchmarks.gpu: no CUDA device; --small tries the script without one")
    settle_libraries()
    about = {"device": torch.cuda.get_device_name() if gpu else "CPU", "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder), args.small)
        for in_4bit in (True, False):
            base = llm.load_generator(folder, in_4bit, True, precision="auto")
            model = llm.add_lora(base, 16, 32, seed=0)
            for how, length, measure in measurements(model, args.small, in_4bit, args.ways):
                try:
                    result = measure()
                except torch.OutOfMemoryError:
                    result = {"out_of_memory": True}
                model.zero_grad()
                row = about | {"4bit": in_4bit, "prompt": length, "how": how} | result
                print(json.dumps(row), flush=True)
            del base, model
            gc.collect()  # a model's modules refer to each other
            if gpu:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
