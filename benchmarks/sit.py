"""An instruction-tuning step on packed rows beside a padded transformers step with masked labels.

    python -m benchmarks.sit
"""

from __future__ import annotations

import torch

import llm
from benchmarks.common import Row, prepare, report, seconds, tokens
from benchmarks.dpo import gradient, policy

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

    our_loss, g = ours(), gradient(model)
    their_loss, h = padded(), gradient(model)
    error = ((g - h).norm() / h.norm()).item()
    assert abs(our_loss - their_loss) < 1e-3 and error < 1e-4, (our_loss, their_loss, error)
    times = seconds({"ours": ours, "padded": padded})
    row = Row(
        f"SIT step, 6 prompts of {min(PROMPTS)} to {max(PROMPTS)}, packed", "transformers, padded",
        times["ours"], times["padded"], 1.5, note=f"gradients differ by {error:.0e}",
    )
    report("SIT step", [row])


if __name__ == "__main__":
    main()
