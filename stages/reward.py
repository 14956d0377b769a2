"""Stage `reward`: models of what gets clicked, from pairs of a click log (paper 003, 3.5).

    python train.py --config configs/garm.yaml --stage reward reward.variance_weight=0

Heads on the generator's backbone with LoRA: Bradley-Terry (Eq. 2), Gaussian (Eq. 4, 5), and PURM's
Monte-Carlo form of it, score a suggestion by the state at its last token; the paired model (Eq. 3)
says YES or NO to two of them. Suggestions of a context are one tree: three cost one prompt.

Departures: LoRA on the policy's own base instead of a model of its own; weights are not resampled
by language and intent (C.2).

Legend: B contexts, K suggestions of each, P pairs, R all suggestions of a batch, H hidden.
"""

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import garm
import llm
from config import RewardKind
from data import Turn
from files import UserError, digest, gather, progress, write_tensors
from roles.players import Players
from roles.suggester import Suggester
from roles.text import read_yaml
from run import Run
from stages.dialogues import Context, chosen, read_contexts
from stages.steps import load_weights, micro_batches, new_optimiser, step

Turns = Sequence[Turn]
Pairs = list[tuple[int, int]]  # (preferred, rejected) places of a context's suggestions
Row = tuple[Context, Pairs]
PURM_SAMPLES = 1000  # as published
SIGMA_ONE = 0.5413  # softplus of it is 1, where the penalty of Eq. (5) is least


def stage_reward(run: Run, players: Players, key: str) -> dict:
    """A reward model of each kind that reward.kinds names."""
    suggester, figures = Suggester(players.writer), {}
    rows = pairs_of(chosen(read_contexts(run), "train"))
    if not rows:
        raise UserError("reward: no click of the log's first part is below the first slot")
    most = run.config.reward.max_contexts or len(rows)
    rows = random.Random(run.seed("reward rows")).sample(rows, min(most, len(rows)))
    for kind in run.config.reward.kinds:
        figures[kind] = run.folder.once(
            f"reward/{kind}", digest(key, kind), partial(train_reward, run, suggester, rows, kind))
    pairs = sum(len(pairs) for _, pairs in rows)
    return {"contexts": len(rows), "pairs": pairs, **figures}


def pairs_of(contexts: Sequence[Context]) -> list[Row]:
    """Contexts whose clicks tell a pair by the slot filter, and their pairs."""
    rows = [(c, garm.click_pairs(c.dialogue.clicked)) for c in contexts]
    return [(context, pairs) for context, pairs in rows if pairs]


class RewardModel:
    """A head and LoRA weights on a generator that other policies may use too.

    kind "paired" has no head, and scores no suggestion alone: only `preference` is for it.
    """

    def __init__(self, suggester: Suggester, model, kind: RewardKind, head, weights=None):
        """weights: LoRA weights to swap in (llm.other_adapter); None: those that `model` has."""
        self.suggester, self.model, self.kind = suggester, model, kind
        self.head, self.weights = head, weights or {}

    def gaussians(self, model, contexts: Sequence[Turns], texts: list[list[str]]):
        """(mu, sigma), (R,) each, of K texts of each context in turn; differentiable."""
        rows = [self.suggester.encoded(turns, some)
                for turns, some in zip(contexts, texts, strict=True)]
        # One state a suggestion, of its end token, which has seen context and suggestion alone.
        hidden = llm.last_hidden(model, *map(list, zip(*rows, strict=True)))  # (R, H)
        mu, raw = self.head(hidden.float()).unbind(1)
        if self.kind == "bradley_terry":  # a score is certain
            return mu, torch.zeros_like(mu)
        return mu, F.softplus(raw)

    @torch.no_grad()
    def score(self, contexts: Sequence[Turns], texts: list[list[str]],
              size: int = 8) -> tuple[list[Tensor], list[Tensor]]:
        """mu and sigma of each suggestion: (K,) for every context; none where it has no texts."""
        places = [i for i, some in enumerate(texts) if some]
        mu, sigma = ([torch.zeros(0)] * len(texts) for _ in range(2))
        with llm.other_adapter(self.model, self.weights):
            for start in range(0, len(places), size):  # contexts at a time
                part = places[start : start + size]
                some = [texts[i] for i in part]
                both = self.gaussians(self.model, [contexts[i] for i in part], some)
                for values, result in zip(both, (mu, sigma), strict=True):
                    split = values.cpu().split([len(suggestions) for suggestions in some])
                    for i, of_context in zip(part, split, strict=True):
                        result[i] = of_context
        return mu, sigma

    @torch.no_grad()
    def preference(self, contexts: Sequence[Turns], pairs: list[list[tuple[str, str]]],
                   size: int = 8) -> list[Tensor]:
        """The paired model's p(first > second), (P,) for every context, of its pairs."""
        result = []
        with llm.other_adapter(self.model, self.weights):
            for start in range(0, len(contexts), size):
                some = pairs[start : start + size]
                yes, no = self.answers(self.model, contexts[start : start + size], some)
                # Of the two words: hardly another is likely after training.
                result += (yes - no).sigmoid().cpu().split([*map(len, some)])
        return result

    def answers(self, model, contexts: Sequence[Turns], pairs: list[list[tuple[str, str]]]):
        """Log-probabilities (P,) of YES and of NO to all pairs in turn; differentiable."""
        tokenizer, ask = self.suggester.tokenizer, read_yaml("prompts.yaml")["suggest_paired"]
        prompts = [self.suggester.prompt(turns, "paired") for turns in contexts]
        asked = [[llm.encode_text(tokenizer, f"Query 1: {a}\nQuery 2: {b}{ask}") for a, b in some]
                 for some in pairs]
        words = [llm.encode_text(tokenizer, word) for word in (" YES", " NO")]
        # The question stands behind the assistant's header, with which every prompt ends: so all
        # pairs of a context, in either order, share one trunk. LoRA learns what is asked there.
        # A context is the trunk; each question stands twice behind it, once with either word.
        branches = [[ids + word for ids in some for word in words] for some in asked]
        logps, mask = llm.token_logps(model, prompts, branches)  # (2 P, T)
        # Of the word's tokens alone: what stands before them is given.
        sizes = torch.tensor([len(word) for word in words], device=mask.device)
        behind = mask.flip(1).cumsum(1).flip(1)  # tokens from here to the end
        within = behind <= sizes.repeat(len(mask) // 2)[:, None]
        summed = logps.masked_fill(~(mask & within), 0).sum(1)
        return summed[::2], summed[1::2]

    def losses(self, model, rows: list[Row], rng: random.Random) -> tuple[Tensor, Tensor]:
        """Loss (P,) of all pairs of these contexts, and how probable each right order is (P,)."""
        contexts, shown = [c.turns for c, _ in rows], [c.dialogue.suggestions for c, _ in rows]
        if self.kind == "paired":
            first = [[rng.random() < 0.5 for _ in pairs] for _, pairs in rows]
            asked = [[(s[w], s[r]) if order else (s[r], s[w])
                      for (w, r), order in zip(pairs, orders, strict=True)]
                     for s, (_, pairs), orders in zip(shown, rows, first, strict=True)]
            yes, no = self.answers(model, contexts, asked)
            wins = torch.tensor([order for some in first for order in some], device=yes.device)
            loss = garm.paired_loss(yes, no, wins)  # Eq. (3)
            return loss, torch.where(wins, yes - no, no - yes).detach().sigmoid()
        mu, sigma = self.gaussians(model, contexts, shown)  # all three: one prompt a context
        # Places of a context's suggestions among all of the batch.
        starts = np.cumsum([0, *map(len, shown)])
        places = torch.tensor([(start + w, start + r) for (_, pairs), start in
                               zip(rows, starts[:-1], strict=True) for w, r in pairs])
        w, r = places.to(mu.device).unbind(1)  # preferred, rejected
        if self.kind == "bradley_terry":
            loss = garm.bradley_terry_loss(mu[w], mu[r])  # Eq. (2)
        elif self.kind == "purm":
            loss = garm.purm_monte_carlo(mu[w], sigma[w], mu[r], sigma[r], PURM_SAMPLES)[1]
        else:
            weight = self.suggester.config.reward.variance_weight
            loss = garm.gaussian_loss(mu[w], sigma[w], mu[r], sigma[r], weight)  # Eq. (5)
        four = (mu[w], sigma[w], mu[r], sigma[r])
        return loss, garm.preference_probability(*four).detach()


def train_reward(run: Run, suggester: Suggester, rows: list[Row], kind: RewardKind) -> dict:
    """A reward model of this kind, trained on pairs and saved to reward/<kind>."""
    settings, g = run.config.reward, run.config.generator
    # Every kind begins with the same LoRA weights.
    model = llm.add_lora(suggester.policy(None), g.lora_rank, g.lora_alpha, run.seed("lora"))
    head = new_head(model)
    head.requires_grad_(kind != "paired")  # which never asks it: DDP would wait for its gradients
    model.reward_head = head  # its weights are averaged, clipped and stepped with LoRA's
    torch.manual_seed(run.seed("reward", kind))  # PURM's draws; a new head draws too
    flips = random.Random(run.seed("reward flips"))  # a share of a process: apart from the order
    reward = RewardModel(suggester, model, kind, head)
    size, log = settings.batch_users, []  # log: (loss, accuracy) of each step
    steps = settings.epochs * -(-len(rows) // size)
    optimiser, schedule = new_optimiser(model, settings.learning_rate, steps)
    losses_of = llm.averaged_gradients(model, reward.losses)
    for epoch in range(settings.epochs):
        # The same in every process, and for every kind.
        order = random.Random(run.seed("reward order", epoch)).sample(rows, len(rows))
        for start in (bar := progress(range(0, len(rows), size), f"reward {kind}")):
            batch, figures = order[start : start + size], []
            count = sum(len(pairs) for _, pairs in batch)
            for part, factor in micro_batches(batch, g.micro_batch):
                losses, right = losses_of(part, flips)  # (P,) each
                (losses.sum() / count * factor).backward()
                weight = bool(factor) / count  # 0: a part computed for nothing
                figures.append((losses.sum().item() * weight, (right > 0.5).sum().item() * weight))
            rate = schedule.get_last_lr()[0]
            step(model, optimiser, schedule, f"reward, {kind}, step {len(log) + 1}",
                 (context.dialogue.dialogue_id for context, _ in batch))
            # Over the parts of all processes.
            loss, accuracy = np.sum(gather([np.sum(figures, axis=0).tolist()]), axis=0).tolist()
            log.append((loss, accuracy))
            run.folder.log("reward", kind=kind, step=len(log), loss=loss, accuracy=accuracy,
                           learning_rate=rate)
            bar.set(loss=loss)
    folder = run.folder / "reward" / kind  # adapter/ in PEFT's form, head.safetensors
    del model.reward_head  # PEFT's file holds LoRA alone
    llm.save_adapter(model, folder / "adapter")
    write_tensors(folder / "head.safetensors", dict(head.state_dict()))
    # Of the last pass: a model that has seen a pair before knows it.
    last = np.mean(log[-max(1, len(log) // settings.epochs) :], axis=0)
    cut = sum(suggester.prompt_and_cut(context.turns)[1] > 0 for context, _ in rows)
    return {"first_loss": log[0][0], "loss": float(last[0]), "train_accuracy": float(last[1]),
            "prompts_cut": cut}


def new_head(model) -> torch.nn.Linear:
    """State (H,) -> (mu, what softplus makes sigma of): 0 and 1 of every text at first."""
    width = model.get_base_model().config.get_text_config().hidden_size
    head = torch.nn.Linear(width, 2).to(model.device)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, SIGMA_ONE]))
    return head


def load_reward(run: Run, suggester: Suggester, kind: RewardKind, model=None) -> RewardModel:
    """A saved reward model on `model`, any policy with LoRA, whose weights are swapped for a call;
    or on a base of its own."""
    folder: Path = run.folder / "reward" / kind
    if not (folder / "head.safetensors").is_file():
        raise UserError(f"{folder}: no reward model; add {kind} to reward.kinds")
    model = model or suggester.policy(folder / "adapter")
    load_weights(head := new_head(model), folder / "head.safetensors")
    return RewardModel(suggester, model, kind, head, llm.adapter_weights(model, folder / "adapter"))
