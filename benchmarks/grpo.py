"""A GRPO step beside TRL's GRPOTrainer, and a reward-model step beside a padded batch: SmolLM2.

    python -m benchmarks.grpo

GRPO: one group, sampling left out on both sides. What is timed begins with the sampled ids and
their rewards: advantages, log-probabilities under the reference (another LoRA of the same base),
those of the policy, loss, backward, clipping, AdamW. Ours is stages/rl.py as it trains. TRL's is
its trainer's own code from the generated ids on, with what its log shows (entropy, clipped shares);
its defaults but for beta, fp32 and use_bias_correction_kl=False, for which the losses are one.

TRL's rows: without gradient checkpointing on either side; the same with the lists' tokens alone
meeting the vocabulary, as on a GPU with Triton (a patch of ours, see dpo.py); and with
checkpointing, TRL's default, on both sides.

Reward model: three suggestions of a context, the third clicked, Eq. (5) of paper 003. Ours is
stages/reward.py as it trains, one tree; the peer is transformers' ForSequenceClassification with
the same decoder and head on three padded sequences, each with the whole context.

All steps of a row give one loss and one gradient. The learning rate is 0: AdamW does its work, and
every side keeps the same weights.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F

import garm
import llm
from benchmarks.common import (
    Row,
    peak_gb,
    prepare,
    print_peak,
    report,
    same_step,
    seconds,
    smollm2,
    tokens,
)
from benchmarks.dpo import with_lora
from config import Config, RlConfig
from llm.prompts import Ids
from stages.reward import RewardModel
from stages.rl import Batch, backward
from stages.steps import new_optimiser, step

Step = Callable[[], float]  # leaves the gradients of the loss that it returns
GROUP, PROMPT, NEW = 10, 384, 48
# Context and suggestions, in tokens: as long as GRPO's prompt, and as configs/garm.yaml cuts it.
REWARD = {"384": (384, [13, 16, 19]), "160": (160, [13, 16, 19])}
SETTINGS = RlConfig(group=GROUP, beta=0.04)
REPEATS = 3


@dataclass
class Work:
    """A context, what is written after it, and for GRPO how good that is."""

    prompt: Ids
    lists: list[Ids]
    rewards: list[float]


def work(length: int, lists: list[int], vocabulary: int = 49_152) -> Work:
    torch.manual_seed(1)
    return Work(tokens(length, vocabulary), [tokens(n, vocabulary) for n in lists],
                torch.randn(len(lists)).tolist())


def policy(base):
    """LoRA and a reward head that have learned something: from zeros no gradient would reach."""
    model = with_lora(base)
    model.reward_head = torch.nn.Linear(base.config.hidden_size, 2)  # mu; sigma before softplus
    return model


def reference(model) -> dict[str, torch.Tensor]:
    """LoRA weights near those of the policy, so that there is a KL."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: w.detach() + 0.005 * torch.randn(w.shape, generator=generator)
        for name, w in model.named_parameters() if ".default." in name
    }


# ------------------------------------------------------------------------------------------- GRPO


def our_step(model, w: Work) -> Step:
    ref, logps_of = reference(model), llm.averaged_gradients(model, llm.token_logps)
    everyone = torch.ones(1, len(w.lists), dtype=torch.bool)

    def run() -> float:
        model.zero_grad()
        with torch.no_grad(), llm.other_adapter(model, ref):
            ref_logps, mask = llm.token_logps(model, [w.prompt], [w.lists])
        advantages = garm.group_advantages(torch.tensor([w.rewards]))
        batch = Batch([w.prompt], [w.lists], ref_logps, mask, everyone, advantages)
        return backward(logps_of, batch, [0], SETTINGS, 0)["loss"]

    return run


def trl_step(model, w: Work, lists_only: bool = False) -> Step:
    """TRL's trainer from the ids that it has generated on; the tokenizer is a stand-in."""
    import trl.trainer.utils
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from tools import tiny_model

    if "ref" in model.peft_config:  # of an earlier trainer of this model
        model.delete_adapter("ref")
    n = len(w.lists)
    settings = GRPOConfig(
        tempfile.mkdtemp(), num_generations=n, per_device_train_batch_size=n,
        max_completion_length=max(map(len, w.lists)), beta=SETTINGS.beta,
        use_bias_correction_kl=False, gradient_checkpointing=False, bf16=False, use_cpu=True,
        report_to=[], disable_tqdm=True,
    )
    with llm.other_adapter(model, reference(model)):  # of which it makes a copy of its own
        trainer = GRPOTrainer(
            model, lambda completions, **_: w.rewards, settings,
            train_dataset=Dataset.from_list([{"prompt": "a"}]),
            processing_class=tiny_model.train_tokenizer(["a b c"] * 3, 300),
        )
    trainer.current_gradient_accumulation_steps = 1  # as its loop sets it
    # Prompts, completions, no tools, texts, no log-probabilities of a server, no images.
    generated = ([w.prompt] * n, w.lists, None, ["a"] * n, None, {}, None, [])
    scores = trl.trainer.utils._use_triton

    def run() -> float:
        model.zero_grad()
        model.train()  # as its loop does; nothing here has dropout
        chosen = (lambda device: True) if lists_only else scores
        with (
            mock.patch("trl.trainer.utils._use_triton", chosen),
            mock.patch.object(trainer, "_generate", lambda prompts: generated),
        ):
            inputs = trainer._generate_and_score_completions([{"prompt": "a"}] * n)
            loss = trainer.compute_loss(model, inputs)
            loss.backward()
        model.eval()
        return loss.item()

    return run


def checkpointed(side: Callable[..., Step], model, w: Work) -> Step:
    """Such a step that computes the layers' forward again in backward."""
    inner = side(model, w)

    def run() -> float:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            return inner()
        finally:
            model.gradient_checkpointing_disable()

    return run


# ----------------------------------------------------------------------------------- reward model


def tree_step(model, w: Work) -> Step:
    # Ids stand in for the texts of a conversation.
    encoder = SimpleNamespace(encoded=lambda turns, lists: (turns, lists), config=Config())
    shown = SimpleNamespace(turns=w.prompt, dialogue=SimpleNamespace(suggestions=w.lists))
    reward = RewardModel(encoder, model, "gaussian", model.reward_head)
    rows, rng = [(shown, garm.click_pairs([2]))], random.Random(0)

    def run() -> float:
        model.zero_grad()
        losses, _ = reward.losses(model, rows, rng)
        losses.mean().backward()
        return losses.mean().item()

    return run


def padded_step(model, w: Work) -> Step:
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.get_base_model().config)
    config.num_labels, config.pad_token_id = 2, 1
    with torch.device("meta"):  # its own weights are not wanted
        classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.model, classifier.score = model.get_base_model().get_decoder(), model.reward_head
    rows = [torch.tensor(w.prompt + ids) for ids in w.lists]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)  # (3, T)
    preferred, rejected = torch.tensor(garm.click_pairs([2])).unbind(1)
    weight = Config().reward.variance_weight

    def run() -> float:
        model.zero_grad()
        scores = classifier(input_ids=ids, attention_mask=ids.ne(1).long(), use_cache=False).logits
        mu, sigma = scores[:, 0], F.softplus(scores[:, 1])
        loss = garm.gaussian_loss(
            mu[preferred], sigma[preferred], mu[rejected], sigma[rejected], weight).mean()
        loss.backward()
        return loss.item()

    return run


SIDES = {
    "ours": our_step, "trl": trl_step, "compact": functools.partial(trl_step, lists_only=True),
    "ours again": functools.partial(checkpointed, our_step),
    "trl again": functools.partial(checkpointed, trl_step),
    "tree": tree_step, "padded": padded_step,
}


def optimised(backward: Step, model) -> Step:
    """The same, and a step of the optimiser with learning rate 0, which drops the gradients."""
    optimiser, schedule = new_optimiser(model, 0.0, 1)

    def run() -> float:
        loss = backward()
        step(model, optimiser, schedule)
        return loss

    return run


def checked(model, w: Work, *sides: str) -> tuple[dict[str, Step], dict[str, str]]:
    """Whole steps of these sides, ours first, once all give one gradient and loss; and by how much
    the others' gradient differs."""
    made = {name: SIDES[name](model, w) for name in sides}
    notes = {peer: same_step(made[sides[0]], made[peer], model, model, loss_tolerance=1e-4)
             for peer in sides[1:]}
    return {name: optimised(run, model) for name, run in made.items()}, notes


def main() -> None:
    prepare()
    group = PROMPT, [NEW] * GROUP
    if len(sys.argv) > 1:  # one step of one side, for its memory
        _, side, name = sys.argv
        model = policy(smollm2())
        optimised(SIDES[side](model, work(*REWARD.get(name, group))), model)()
        return print_peak()
    # Before this process holds models of its own: a peer's step alone takes half of 24 GB.
    peaks = {(side, name): peak_gb("benchmarks.grpo", side, name) for side, name in (
        *product(("ours", "trl", "compact", "ours again", "trl again"), ["grpo"]),
        *product(("tree", "padded"), REWARD))}
    model = policy(smollm2())
    label = f"SmolLM2: GRPO step, group of {GROUP}, prompt {PROMPT}, {NEW} new tokens"
    rows = []
    for ours, peers, note in (
        ("ours", {"trl": ("TRL GRPOTrainer", 4, 3),
                  "compact": ("TRL GRPOTrainer, lists' tokens scored only (patched)", 2, None)},
         "no gradient checkpointing"),
        ("ours again", {"trl again": ("TRL GRPOTrainer", None, None)}, "gradient checkpointing"),
    ):
        steps, same = checked(model, work(*group), ours, *peers)
        times = seconds(steps, REPEATS)
        rows += [
            Row(label, peer, times[ours], times[side], asked, peaks[ours, "grpo"],
                peaks[side, "grpo"], memory, f"{same[side]}; {note}")
            for side, (peer, asked, memory) in peers.items()
        ]
    for name, (length, lists) in REWARD.items():
        steps, same = checked(model, work(length, lists), "tree", "padded")
        times = seconds(steps)
        memory = (peaks[side, name] for side in ("tree", "padded"))
        rows.append(Row(
            f"SmolLM2: reward-model step, 3 suggestions of a context of {length}",
            "ForSequenceClassification, padded", times["tree"], times["padded"], 1.8, *memory,
            note=same["padded"]))
    report("GRPO and reward-model steps", rows)


if __name__ == "__main__":
    main()
