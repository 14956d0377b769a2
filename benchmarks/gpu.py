"""A DPO step and sampling with a model of Qwen2.5-7B's shape on one GPU.

    python -m benchmarks.gpu > results/gpu.jsonl   # random weights: as fast and large as real ones
    python -m benchmarks.gpu --small               # a small shape on any machine, to try it

For 4-bit (NF4) and bf16, prompts of 512 and 2,048, one user a step (1 + 3 lists of 64 tokens), with
gradient checkpointing: tokens/s, share of the card's dense bf16 peak (model FLOP only: recomputed
layers do not count as work), peak memory, and whether the step also fits under 24 GB; TRL's step
beside it (in bf16, without checkpointing). Sampling (4 prompts, 16 lists each, 24 tokens): tokens/s
and the share of the memory's bandwidth that reading the weights once a step takes (prefill in the
time). Memory is that of a step: AdamW's state of the adapter (0.3 GB at 7B) comes to it.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path

import torch

import llm
from benchmarks.common import quiet_libraries
from benchmarks.dpo import our_step, trl_step

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
    """how: an attention of ours, or "trl"."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    user = work(model, length)
    seconds = timed(trl_step(model, *user) if how == "trl" else our_step(model, *user, how))
    row = length + LISTS * LIST_TOKENS  # TRL computes more tokens for the same work
    config = model.config
    weights = config.num_hidden_layers * (
        2 * config.hidden_size**2
        + 2 * config.hidden_size**2 * config.num_key_value_heads // config.num_attention_heads
        + 3 * config.hidden_size * config.intermediate_size
    )
    # Forward, and the gradient in the input (frozen weights have none): 4 FLOP a weight.
    flop = 4 * weights * row + 4 * config.vocab_size * config.hidden_size * LISTS * LIST_TOKENS
    return {
        "prompt": length, "how": how, "seconds": seconds, "tokens_per_s": row / seconds,
        "share_of_peak": flop / seconds / 1e12 / peak_tflops if peak_tflops else None,
        "peak_gb": peak_gb(),
    }


def measure_24_gb(model, length: int) -> bool:
    """Whether the step fits on a 24 GB card."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 24e9 / total))
    try:
        our_step(model, *work(model, length))()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@torch.no_grad()
def measure_sampling(model, n: int, length: int, new: int, bandwidth: float | None) -> dict:
    size = model.config.vocab_size
    prompts = [torch.randint(10, size, (length,)).tolist() for _ in range(4)]
    draw = llm._FastDraw(0.7, 0.95, 50, seed=0)

    draw.begin([*range(len(prompts))], n, new)

    def never(token, *_):
        return torch.zeros_like(token, dtype=torch.bool)

    seconds = timed(lambda: llm._decode(model, prompts, n, new, draw, never, 0))
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    return {
        "prompt": length, "how": f"sampling {n} lists",
        "tokens_per_s": len(prompts) * n * new / seconds,
        "share_of_bandwidth": weights * new / seconds / bandwidth if bandwidth else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    if not small and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no CUDA device; --small tries the script without one")
    quiet_libraries()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    tflops, bandwidth = next((v for k, v in CARDS.items() if k in name), (None, None))
    ways = ("sdpa", "flex_attention", "trl") if torch.cuda.is_available() else ("sdpa", "trl")
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(Path(folder), small)
        for in_4bit in (True, False):
            base = llm.load_generator(folder, in_4bit, gradient_checkpointing=True)
            model = llm.add_lora(base, 16, 32, seed=0)
            about = {"device": name, "torch": torch.__version__, "4bit": in_4bit}
            lengths = (32, 64) if small else (512, 2048)
            steps = [(how, length) for how in ways for length in lengths]
            for how, length in [("sampling", lengths[0]), *steps]:
                if how == "trl" and in_4bit:
                    continue
                try:
                    if how == "sampling":
                        made = measure_sampling(model, 16, length, 24, bandwidth)
                    else:
                        made = measure_step(model, length, how, tflops)
                    if how == "sdpa" and torch.cuda.is_available():
                        made["fits_24_gb"] = measure_24_gb(model, length)
                except torch.OutOfMemoryError:
                    made = {"prompt": length, "how": how, "out_of_memory": True}
                print(json.dumps(about | made), flush=True)
            del base, model
            gc.collect()  # a model's modules refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
