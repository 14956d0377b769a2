"""Sampling n lists of one prompt beside transformers' generate(num_return_sequences=n).

    python -m benchmarks.sampling

generate reads the prompt n times and sorts the whole vocabulary at each token. Our "generate" mode
draws the same tokens; the fast sampler cuts to the top_k first and draws with other random numbers.
"""

from __future__ import annotations

import torch

import llm
from benchmarks.common import Row, prepare, qwen, report, seconds, tokens

N, PROMPT, NEW, VOCABULARY = 16, 384, 24, 151_936
CHOSEN = {"temperature": 0.7, "top_k": 50, "top_p": 0.95}


def word_tokenizer():
    """A word per token id, so that texts can be compared."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(VOCABULARY)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w1")


@torch.no_grad()
def main() -> None:
    prepare()
    model, tokenizer, prompt = qwen(), word_tokenizer(), tokens(PROMPT)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 8)  # peaked, as trained ones

    def ours(sampler: str) -> list[str]:
        return llm.sample(
            model, tokenizer, [prompt], N, seed=0, max_new_tokens=NEW, sampler=sampler, **CHOSEN
        )[0]

    def generate() -> list[str]:
        torch.manual_seed(0)
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_return_sequences=N, do_sample=True,
            max_new_tokens=NEW, **CHOSEN,
        )
        return tokenizer.batch_decode(out[:, PROMPT:], skip_special_tokens=True)

    assert ours("generate") == generate()
    times = seconds(
        {"same": lambda: ours("generate"), "fast": lambda: ours("fast"), "generate": generate}
    )
    work = f"sampling {N} lists, prompt {PROMPT}, {NEW} new tokens"
    report(
        "Sampling",
        [
            Row(f"{work}, the same tokens", "generate", times["same"], times["generate"], 1.5,
                note="tokens equal"),
            Row(f"{work}, fast sampler", "generate", times["fast"], times["generate"], 3,
                note="other random numbers, same top-k and top-p"),
        ],
    )


if __name__ == "__main__":
    main()
