"""A DPO step on lists of one user beside TRL's DPOTrainer with cached reference log-probabilities.

    python -m benchmarks.dpo

TRL trains on pairs: one chosen and three rejected lists are three pairs, six sequences, each with
the whole prompt. Both sides see the same tokens, weights, LoRA and reference; both give the same
loss and gradient (the note).
"""

from __future__ import annotations

import sys
import tempfile

import torch

import icebreaker as ib
import llm
from benchmarks.common import Row, peak_gb, prepare, print_peak, qwen, report, seconds, tokens

BETA = 0.1
WORK = {"1+3": (384, [64, 60, 68, 64]), "1+1": (128, [64, 64])}  # prompt, chosen and rejected lists


def policy():
    model = llm.add_lora(qwen(), rank=16, alpha=32, seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model


def batch(name: str):
    torch.manual_seed(1)
    length, lists = WORK[name]
    return tokens(length), [tokens(n) for n in lists], -12.0 * torch.arange(10, 10 + len(lists))


def our_step(model, name: str):
    prompt, lists, reference = batch(name)

    def run() -> float:
        model.zero_grad()
        (logps,) = llm.completion_logps(model, [prompt], [lists])
        rejected = logps[1:]
        loss = ib.dpo_loss(
            logps[:1].expand_as(rejected), rejected, reference[:1].expand_as(rejected),
            reference[1:], BETA,
        ).mean()
        loss.backward()
        return loss.item()

    return run


def trl_step(model, name: str):
    """TRL's own trainer, collator and loss; only the tokenizer is a stand-in."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    import base

    settings = DPOConfig(
        tempfile.mkdtemp(), beta=BETA, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=1, max_length=None,
        precompute_ref_log_probs=True,
    )
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer = DPOTrainer(
        model, None, settings, train_dataset=Dataset.from_list([row]),
        processing_class=base.train_tokenizer(["a b c"] * 3, 300),
    )
    prompt, lists, reference = batch(name)
    pairs = [
        {
            "prompt_ids": prompt, "chosen_ids": lists[0], "rejected_ids": y,
            "ref_chosen_logps": reference[0].item(), "ref_rejected_logps": r.item(),
        }
        for y, r in zip(lists[1:], reference[1:], strict=True)
    ]
    inputs = trainer.data_collator(pairs)

    def run() -> float:
        model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        loss.backward()
        return loss.item()

    return run


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


def main() -> None:
    prepare()
    if len(sys.argv) > 1:  # one step of one side, for its memory
        _, side, name = sys.argv
        {"ours": our_step, "trl": trl_step}[side](policy(), name)()
        return print_peak()
    rows = []
    for name, asked in (("1+3", 10), ("1+1", 2)):
        model = policy()
        ours, trl = our_step(model, name), trl_step(model, name)
        our_loss, g = ours(), gradient(model)
        their_loss, h = trl(), gradient(model)
        error = ((g - h).norm() / h.norm()).item()
        assert abs(our_loss - their_loss) < 1e-3 and error < 1e-4, (our_loss, their_loss, error)
        times = seconds({"ours": ours, "trl": trl})
        length, lists = WORK[name]
        rows.append(
            Row(
                f"DPO step, prompt {length}, {name} lists of ~64",
                "TRL DPOTrainer, cached reference",
                times["ours"], times["trl"], asked,
                *(peak_gb("benchmarks.dpo", side, name) for side in ("ours", "trl")),
                f"gradients differ by {error:.0e}",
            )
        )
    report("DPO step", rows)


if __name__ == "__main__":
    main()
