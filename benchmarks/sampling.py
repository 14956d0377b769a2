"""Sampling n lists of each prompt beside transformers' generate(num_return_sequences=n).

    python -m benchmarks.sampling

generate reads the prompt n times and sorts the whole vocabulary at each token. With its draws
(benchmarks/parity.py) our tree gives the same tokens; our own cuts to the top_k first and has other
random numbers. In the tree every step reads the other samples' tokens too (masked), so long lists
gain less.
"""

from __future__ import annotations

import torch

import llm
from benchmarks.common import Row, prepare, qwen, report, seconds, tokens
from benchmarks.parity import GenerateDraw

N, VOCABULARY = 16, 151_936
CHOSEN = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}


def word_tokenizer():
    """A word per token id, so that texts can be compared."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w1")


def compare(model, tokenizer, lengths: list[int], new: int, repeats: int) -> dict[str, float]:
    """CPU seconds of generate and of the tree with either draw, once the tokens are the same."""
    prompts = [tokens(n) for n in lengths]
    width = max(lengths)
    ids = torch.tensor([[1] * (width - len(p)) + p for p in prompts])
    real = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])

    def ours(sampler: str) -> list[str]:
        draw = GenerateDraw(**CHOSEN, seed=0) if sampler == "generate" else None
        lists = llm.sample(
            model, tokenizer, prompts, N, seed=0, max_new_tokens=new, draw=draw, stop="", **CHOSEN
        )
        return [text for texts in lists for text in texts]

    def generate() -> list[str]:
        torch.manual_seed(0)
        out = model.generate(
            ids, attention_mask=real, num_return_sequences=N, do_sample=True, max_new_tokens=new,
            **CHOSEN,
        )
        return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)

    assert ours("generate") == generate()
    candidates = {name: lambda x=name: ours(x) for name in ("generate", "fast")}
    return seconds({**candidates, "peer": generate}, repeats)


@torch.no_grad()
def main() -> None:
    prepare()
    model, tokenizer = qwen(), word_tokenizer()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 8)  # peaked, as trained ones
    rows = []
    for lengths, new, repeats, asked in (
        ([384], 24, 5, {"generate": 1.5, "fast": 3}),
        ([384], 96, 1, {}),  # takes minutes: measured once
    ):
        times = compare(model, tokenizer, lengths, new, repeats)
        work = f"sampling {N} lists, prompt {', '.join(map(str, lengths))}, {new} new tokens"
        rows += [
            Row(f"{work}, the same tokens", "generate", times["generate"], times["peer"],
                asked.get("generate"), note="tokens equal"),
            Row(f"{work}, fast sampler", "generate", times["fast"], times["peer"],
                asked.get("fast"), note="other random numbers, same top-k and top-p"),
        ]
    report("Sampling", rows)


if __name__ == "__main__":
    main()
