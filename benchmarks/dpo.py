"""A DPO step on lists of one user beside TRL's DPOTrainer with cached reference log-probabilities.

    python -m benchmarks.dpo

TRL trains on pairs: one chosen and three rejected lists are three pairs, six sequences, each with
the whole prompt. Both sides see the same tokens, weights, LoRA and reference, and give the same
loss and gradient. TRL's step also computes what its log shows (entropy, mean logits, accuracy).

TRL 1.16 has a chunked head of its own. On a GPU with Triton it scores the lists' tokens only, as we
do; on a CPU it scores the prompts' too. The second row turns that on here (a patch of ours), so
that what remains is the shared prompt. SmolLM2 is the embedded default; the others are of
Qwen2.5-0.5B's width, with its vocabulary.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from unittest import mock

import torch

import icebreaker as ib
import llm
from benchmarks.common import (
    Row,
    peak_gb,
    prepare,
    print_peak,
    qwen,
    report,
    same_step,
    seconds,
    smollm2,
)
from benchmarks.common import tokens as random_tokens

BETA = 0.1
SMOL = "SmolLM2: 1+3"
# Prompt, chosen and rejected lists.
WORK = {SMOL: (128, [48] * 4), "1+3": (384, [64, 60, 68, 64]), "1+1": (128, [64, 64])}


def policy(name: str = "1+3"):
    return with_lora(smollm2() if name == SMOL else qwen())


def with_lora(base):
    """LoRA on all linear layers that has moved away from the base, as after some training."""
    model = llm.add_lora(base, rank=16, alpha=32, seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return model


def work(name: str):
    """(prompt, lists, reference log-probabilities); the first list is the chosen one."""
    torch.manual_seed(1)
    length, lists = WORK[name]
    reference = -12.0 * torch.arange(10, 10 + len(lists))
    vocabulary = 49_152 if name == SMOL else 151_936
    written = [random_tokens(n, vocabulary) for n in lists]
    return random_tokens(length, vocabulary), written, reference


def our_step(model, prompt, lists, reference):
    reference = reference.to(next(model.parameters()).device)

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


def trl_step(model, prompt, lists, reference, lists_only: bool = False):
    """TRL's own trainer, collator and loss; only the tokenizer is a stand-in."""
    import trl.trainer.utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    from tools import tiny_model

    if "ref" in model.peft_config:  # of an earlier trainer of this model
        model.delete_adapter("ref")
    gpu = torch.cuda.is_available()
    settings = DPOConfig(
        tempfile.mkdtemp(), beta=BETA, report_to=[], use_cpu=not gpu, bf16=gpu, disable_tqdm=True,
        gradient_checkpointing=False, per_device_train_batch_size=1, max_length=None,
        precompute_ref_log_probs=True,
    )
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer = DPOTrainer(
        model, None, settings, train_dataset=Dataset.from_list([row]),
        processing_class=tiny_model.train_tokenizer(["a b c"] * 3, 300),
    )
    pairs = [
        {
            "prompt_ids": prompt, "chosen_ids": lists[0], "rejected_ids": y,
            "ref_chosen_logps": reference[0].item(), "ref_rejected_logps": r.item(),
        }
        for y, r in zip(lists[1:], reference[1:], strict=True)
    ]
    inputs = {k: x.to(trainer.args.device) for k, x in trainer.data_collator(pairs).items()}
    scores = trl.trainer.utils._use_triton

    def run() -> float:
        model.zero_grad()
        chosen = (lambda device: True) if lists_only else scores
        with mock.patch("trl.trainer.utils._use_triton", chosen):
            loss = trainer.compute_loss(trainer.model, dict(inputs))
            loss.backward()
        return loss.item()

    return run


SIDES = {
    "ours": our_step, "trl": trl_step, "compact": functools.partial(trl_step, lists_only=True)
}


def compare(name: str, asked: float | None, memory: float | None) -> list[Row]:
    """Our step beside TRL's, as it is and patched, once all give one gradient; asked: ratios."""
    model, (length, lists) = policy(name), WORK[name]
    ours, trl, compact = (side(model, *work(name)) for side in SIDES.values())
    note = same_step(ours, trl, model, model)
    same_step(ours, compact, model, model)
    times = seconds({"ours": ours, "trl": trl, "compact": compact}, repeats=3)
    step = f"DPO step, prompt {length}, 1+"
    label = f"{name.replace('1+', step)} lists of ~{sum(lists) // len(lists)}"
    mine, theirs, patched = (peak_gb("benchmarks.dpo", side, name) for side in SIDES)
    peer = "TRL DPOTrainer, cached reference"
    return [
        Row(label, peer, times["ours"], times["trl"], asked, mine, theirs, memory, note),
        Row(label, f"{peer}, lists' tokens scored only (patched)", times["ours"],
            times["compact"], None, mine, patched, note=note),
    ]


def main() -> None:
    prepare()
    if len(sys.argv) > 1:  # one step of one side, for its memory
        _, side, name = sys.argv
        SIDES[side](policy(name), *work(name))()
        return print_peak()
    report("DPO step", [
        *compare(SMOL, None, None), *compare("1+3", 10, 3), *compare("1+1", 2, None)
    ])


if __name__ == "__main__":
    main()
