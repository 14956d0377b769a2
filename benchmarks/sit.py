"""An instruction-tuning step on packed rows beside a padded transformers step with masked labels.

    python -m benchmarks.sit

The padded step makes a vocabulary row for every token; the second peer makes them for the lists'
tokens only, so that what remains is the padding.
"""

from __future__ import annotations

import torch

import llm
from benchmarks.common import Row, prepare, report, same_step, seconds, tokens
from benchmarks.dpo import policy

PROMPTS = [64, 96, 128, 160, 224, 384]  # mixed lengths; one list of 64 tokens each


def main() -> None:
    prepare()
    model = policy()
    prompts, lists = [tokens(n) for n in PROMPTS], [tokens(64) for _ in PROMPTS]
    total = sum(map(len, lists))

    def ours() -> float:
        model.zero_grad()
        loss = -torch.cat(llm.completion_logps(model, prompts, [[y] for y in lists])).sum() / total
        loss.backward()
        return loss.item()

    width = max(PROMPTS) + 64
    ids = torch.ones(len(prompts), width, dtype=torch.long)
    labels, real = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (p, y) in enumerate(zip(prompts, lists, strict=True)):
        n = len(p) + len(y)
        ids[i, :n], labels[i, len(p) : n], real[i, :n] = torch.tensor(p + y), torch.tensor(y), 1

    def padded() -> float:
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=real, labels=labels, use_cache=False).loss
        loss.backward()
        return loss.item()

    def lists_only() -> float:
        model.zero_grad()
        decoder, head = model.get_base_model().model, model.get_base_model().lm_head
        hidden = decoder(input_ids=ids, attention_mask=real, use_cache=False).last_hidden_state
        scored = labels[:, 1:] != -100
        logits = head(hidden[:, :-1][scored])
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][scored])
        loss.backward()
        return loss.item()

    note = same_step(ours, padded, model, model)
    same_step(ours, lists_only, model, model)
    times = seconds({"ours": ours, "padded": padded, "lists": lists_only})
    work = f"SIT step, 6 prompts of {min(PROMPTS)} to {max(PROMPTS)}, packed"
    report(
        "SIT step",
        [
            Row(work, "transformers, padded", times["ours"], times["padded"], 1.5, note=note),
            Row(work, "the same, logits of the lists' tokens only", times["ours"], times["lists"],
                None, note=note),
        ],
    )


if __name__ == "__main__":
    main()
