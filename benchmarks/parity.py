"""Drawing as transformers' generate(num_return_sequences=n) draws, token by token.

Tests and benchmarks.sampling hand it to llm.sample to show that the growing tree changes nothing:
the same tokens, but where logits tie within rounding.

    llm.sample(model, tokenizer, prompts, n, draw=GenerateDraw(0.7, 0.95, 50, seed), ...)
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


class GenerateDraw:
    """Its warpers, and the noise of torch.multinomial after torch.manual_seed(seed).

    As long as `rows` of llm.sample lets all prompts into one batch, as generate has them.
    """

    def __init__(self, temperature: float, top_p: float, top_k: int, seed: int):
        self.greedy, self.seed, self.random = temperature == 0, seed, None
        self.warpers = LogitsProcessorList()  # in generate's order
        if temperature not in (0, 1):
            self.warpers.append(TemperatureLogitsWarper(temperature))
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def begin(self, numbers: list[int], n: int, steps: int) -> None:
        self.b, self.n = len(numbers), n

    def __call__(self, logits: Tensor, prompt: Tensor, sample: Tensor, step: int) -> Tensor:
        if self.greedy:
            return logits.argmax(-1)
        b, n, v = self.b, self.n, logits.shape[-1]
        self.random = self.random or torch.Generator(logits.device).manual_seed(self.seed)
        scores = self.warpers(None, logits.flatten(0, 1))  # (B * Q, V)
        # generate draws for all samples, also those that have ended: theirs is thrown away.
        noise = torch.empty(b * n, v, device=logits.device).exponential_(generator=self.random)
        noise = noise[(prompt[:, None] * n + sample.clamp_max(n - 1)).flatten()]
        return (scores.softmax(-1) / noise).argmax(-1).view(sample.shape)
