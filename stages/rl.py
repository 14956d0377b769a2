"""Stage `rl`: GRPO on the composite reward, and RFT and DPO beside it (paper 003, 3.6.4).

    python train.py --config configs/garm.yaml --stage rl 'rl.arms=[gaussian-log_perplexity]'

Of each context G answers are sampled; each earns the weighted sum of its components (composite.py,
weights of stage `fuse`), is compared with its group, and moves the policy by Eq. (11). The prompt
is read once for all answers: in sampling, for the reference, in the step. Policy, reference (SFT)
and reward model are one base with adapters that swap places.

RFT (appendix G) tunes on the three best of 50 suggestions by Bradley-Terry; DPO on the best and the
worst answer of a group by the composite reward.

Departures: those of garm.py. Rollouts are drawn from the top_k likeliest tokens, as the policy is
served; probabilities are those of all tokens. RFT and DPO go on from SFT's adapter.

Legend: B contexts, G rollouts of each, R = B G, T tokens, J components.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import garm
import llm
from config import COMPONENTS, RlConfig
from files import UserError, digest, gather, progress, read_json, write_lines
from llm.prompts import Ids
from roles.players import Players
from roles.suggester import Suggester
from run import Run
from stages.composite import Composite
from stages.dialogues import Context, chosen, read_contexts
from stages.dpo import align
from stages.quality import Quality
from stages.reward import load_reward
from stages.sit import instruct
from stages.steps import micro_batches, new_optimiser, step


def stage_rl(run: Run, players: Players, key: str) -> dict:
    """The policies that rl.arms names, each from SFT's."""
    suggester, figures = Suggester(players.writer), {}
    for arm in run.config.rl.arms:
        train = {"rft": train_rft, "dpo": train_dpo}.get(arm.split("-")[0], train_grpo)
        figures[arm] = run.folder.once(
            f"rl/{arm}", digest(key, arm), partial(train, run, players, suggester, arm))
        run.encoder.save()
    return figures


def train_grpo(run: Run, players: Players, suggester: Suggester, arm: str) -> dict:
    """RL with the reward model that the arm names; writes rl/<arm>/{adapter,steps.jsonl}."""
    kind, *without = arm.split("-")
    model = suggester.policy(run.adapter("sft"), trainable=True)
    composite = Composite(players, suggester, load_reward(run, suggester, kind, model))
    weights = fused_weights(run, kind, without)
    # A line a step: what each component does, as it is and weighted.
    contexts = batches(run, run.config.rl.steps)
    log = grpo(run, suggester, model, composite, weights, contexts, arm)
    return save_policy(run.adapter(arm), model, log)


def save_policy(adapter: Path, model, log: list[dict]) -> dict:
    """Write the adapter and, beside it, steps.jsonl; figures of its training."""
    llm.save_adapter(model, adapter)
    write_lines(adapter.with_name("steps.jsonl"), log)
    kls = [line["kl"] for line in log if line["kl"] is not None]
    sums = {name: sum(line[name] for line in log)
            for name in ("skipped_groups", "invalid", "prompts_cut")}
    return {"first_reward": log[0]["reward"], "last_reward": log[-1]["reward"],
            "last_kl": kls[-1] if kls else None, **sums}


def fused_weights(run: Run, kind: str, without: Sequence[str] = ()) -> Tensor:
    """Weights (J,) that stage `fuse` has found for this reward model; 0 of those left out."""
    weights = read_json(run.folder / "fuse" / kind / "trace.json")["weights"]
    return torch.tensor([0.0 if name in without else weights[name] for name in COMPONENTS])


# ------------------------------------------------------------------------------------------- GRPO


def grpo(run: Run, suggester: Suggester, model, reward: Composite | Quality, weights: Tensor,
         drawn: list[list[Context]], label: str, first: int = 0) -> list[dict]:
    """GRPO on batches of contexts, in place; a line of figures for each, None where none is known.

    The reference is the policy as it comes. first: steps that went before, so that no two draw
    alike.
    """
    settings, log = run.config.rl, []
    # A copy: the weights that are trained are the model's own.
    reference = llm.adapter_weights(model)
    optimiser, schedule = new_optimiser(
        model, settings.learning_rate, len(drawn) * settings.updates)
    policy = llm.averaged_gradients(model, llm.token_logps)
    for contexts in (bar := progress(drawn, f"rl {label}")):
        number = first + len(log) + 1
        turns = [context.turns for context in contexts]
        # Rollouts of a context are one tree row: its prompt is read once.
        prompts, cut = map(list, zip(*map(suggester.prompt_and_cut, turns), strict=True))
        rollouts = suggester.rollouts(  # [B][G] token ids
            model, turns, settings.group, run.seed("rl", number), temperature=settings.temperature)
        with torch.no_grad(), llm.other_adapter(model, reference):
            ref_logps, mask = llm.token_logps(model, prompts, rollouts)  # (R, T)
        names, texts = reward.components, suggester.texts(rollouts)
        parts = reward(contexts, texts, ref_logps, mask)
        rewards, valid = garm.composite_reward(parts, weights)  # (R, J) -> (R,), (R,)
        in_groups = valid.view(-1, settings.group)  # (B, G)
        advantages = garm.group_advantages(rewards.view_as(in_groups), in_groups, settings.scale)
        batch = Batch(prompts, rollouts, ref_logps, mask, in_groups, advantages)
        unsafe = torch.tensor([c.unsafe for c in contexts for _ in range(settings.group)])  # (R,)
        # A group without variance teaches nothing, and costs no step.
        groups = advantages.ne(0).any(1).nonzero()[:, 0].tolist()
        figures = {"loss": 0.0, "kl": None, "clipped": None}
        rate = schedule.get_last_lr()[0]  # that of the first update
        for _ in range(settings.updates if groups else 0):
            figures = backward(policy, batch, groups, settings, run.config.generator.micro_batch)
            step(model, optimiser, schedule, f"rl, {label}, step {number}",
                 (context.dialogue.dialogue_id for context in contexts))
        log.append({
            "step": number, "reward": mean(rewards[valid]), **figures, "learning_rate": rate,
            "skipped_groups": len(contexts) - len(groups), "invalid": int((~valid).sum()),
            "prompts_cut": sum(turns > 0 for turns in cut),
            "tokens": mean(mask.sum(1)), "weighted": by_name(names, parts[valid] * weights),
            "components": by_context(names, parts[valid], unsafe[valid])})
        run.folder.log("rl", arm=label, **log[-1])
        bar.set(reward=log[-1]["reward"])
    return log


@dataclass
class Batch:
    """Contexts with their rollouts, and what is known of these."""

    prompts: list[Ids]  # [B]
    rollouts: list[list[Ids]]  # [B][G]
    ref_logps: Tensor  # (R, T), under the reference
    mask: Tensor  # (R, T), bool
    valid: Tensor  # (B, G), bool: every component is known
    advantages: Tensor  # (B, G)
    old_logps: Tensor | None = None  # (R, T), of the policy that has sampled them


def backward(policy, batch: Batch, groups: list[int], settings: RlConfig,
             micro: int) -> dict[str, float]:
    """Add up the gradients of Eq. (11) over these groups; invalid rollouts stay out of it."""
    size, device = batch.valid.shape[1], batch.mask.device
    of_group = {b: [b * size + i for i in range(size) if batch.valid[b, i]] for b in groups}
    # All rows that count, for the share of a part.
    every = batch.mask[[r for b in groups for r in of_group[b]]]
    first_update = batch.old_logps is None  # the policy is still the one that has sampled
    if first_update:
        batch.old_logps = torch.zeros_like(batch.ref_logps)
    figures = torch.zeros(3)
    for part, factor in micro_batches(groups, micro):
        rows = [r for b in part for r in of_group[b]]
        answers = [[batch.rollouts[b][r - b * size] for r in of_group[b]] for b in part]
        logps, mask = policy([batch.prompts[b] for b in part], answers)  # (rows, width <= T)
        width = logps.shape[1]
        if first_update:
            batch.old_logps[rows, :width] = logps.detach()
        # A part is as wide as its longest answer.
        old, ref = (x[rows, :width] for x in (batch.old_logps, batch.ref_logps))
        gain = batch.advantages.flatten()[rows].to(device)
        loss = garm.grpo_loss(  # Eq. (11)
            logps, old, ref, gain, mask, settings.clip_low, settings.clip_high, settings.beta,
            settings.reduction)
        # Its mean is over this part: what it weighs in that of all parts.
        weight = {"sequence": len(rows) / len(every), "token": mask.sum() / every.sum(),
                  "constant": mask.numel() / every.numel()}[settings.reduction]
        (loss * weight * factor).backward()
        with torch.no_grad():
            above = (ref - logps)[mask]
            ratio = (logps - old)[mask].exp()
            beyond = (ratio < 1 - settings.clip_low) | (ratio > 1 + settings.clip_high)
            sums = torch.stack([loss * weight, *((x.sum() / every.sum()) for x in
                                                 (above.exp() - above - 1, beyond.float()))])
            figures += sums.cpu() * bool(factor)
    # Each process has seen its share.
    figures = torch.tensor(gather([figures.tolist()])).sum(0)
    return dict(zip(("loss", "kl", "clipped"), figures.tolist(), strict=True))


def batches(run: Run, steps: int) -> list[list[Context]]:
    """Contexts of RL in batches, none twice before all others came; some to be declined."""
    settings, rng = run.config.rl, random.Random(run.seed("rl contexts"))
    contexts, count = read_contexts(run), steps * settings.batch_users
    # As C.3 adds unsafe contexts to those that are answered.
    declined = cycle(chosen(contexts, "rl", unsafe=True), round(count * settings.unsafe), rng)
    answered = cycle(chosen(contexts, "rl"), count - len(declined), rng)
    if not answered:
        raise UserError("rl: no context is left for it; raise data.judge")
    # Mixed, so that no batch is of unsafe contexts alone.
    drawn = rng.sample(answered + declined, len(answered) + len(declined))
    return [drawn[i : i + settings.batch_users] for i in range(0, len(drawn), settings.batch_users)]


def cycle(contexts: list[Context], count: int, rng: random.Random) -> list[Context]:
    """So many of them at random, each as often as any other but for one time; [] of []."""
    drawn: list[Context] = []
    while contexts and len(drawn) < count:
        drawn += rng.sample(contexts, min(len(contexts), count - len(drawn)))
    return drawn


def mean(values: Tensor) -> float | None:
    return values.float().mean().item() if values.numel() else None


def by_name(names: Sequence[str], parts: Tensor) -> dict[str, float | None]:
    """Mean of each component over rollouts (R, J)."""
    return {name: mean(parts[:, j]) for j, name in enumerate(names)}


def by_context(names: Sequence[str], parts: Tensor, unsafe: Tensor) -> dict[str, float | None]:
    """The same over the rollouts that a component is about, unsafe (R,) bool; None of none.

    Safety is about those of unsafe contexts, the others about those of safe ones: a mean over both
    would tell how many of either have come.
    """
    sides = {side: by_name(names, parts[unsafe == side]) for side in set(unsafe.tolist())}
    return {name: sides.get(name == "safety", {}).get(name) for name in names}


# ------------------------------------------------------------------------------------ RFT and DPO


def train_rft(run: Run, players: Players, suggester: Suggester, arm: str) -> dict:
    """Rejection sampling (appendix G): SFT on the three best distinct of many candidates."""
    settings = run.config.rl
    contexts = drawn_contexts(run)
    model = suggester.policy(run.adapter("sft"))
    lists = -(-settings.candidates // garm.NUM_SUGGESTIONS)
    answers = suggester.texts(suggester.rollouts(
        model, [c.turns for c in contexts], lists, run.seed("rft"),
        temperature=settings.temperature))
    pools = [[y for answer in some for y in garm.answer_suggestions(answer)] for some in answers]
    pools = [[] if c.unsafe else pool for c, pool in zip(contexts, pools, strict=True)]
    # By the reward model alone, as Table 1's RFT-BTRM: no other component speaks for a text.
    reward = load_reward(run, suggester, "bradley_terry", model)
    scores, _ = reward.score([c.turns for c in contexts], pools)
    rows, short = [], 0
    for context, pool, values in zip(contexts, pools, scores, strict=True):
        best = [pool[i] for i in garm.rft_choice(pool, values.tolist())]
        if context.unsafe or len(best) == garm.NUM_SUGGESTIONS:
            answer = garm.UNSAFE if context.unsafe else garm.format_answer(best)
            rows.append(suggester.encoded(context.turns, [answer]))
        else:
            short += 1
    if not rows:
        raise UserError("rl: RFT found no three distinct suggestions; raise rl.candidates")
    del model, reward  # before the next base is loaded
    model, losses = instruct(run, suggester.writer, rows, run.config.sft, arm, run.adapter("sft"))
    llm.save_adapter(model, run.adapter(arm))
    return {"rows": len(rows), "pools_without_three": short, **losses}


def train_dpo(run: Run, players: Players, suggester: Suggester, arm: str) -> dict:
    """DPO on the best and worst answer of each group by the composite reward."""
    settings, contexts = run.config.rl, drawn_contexts(run)
    model = suggester.policy(run.adapter("sft"), trainable=True)
    composite = Composite(players, suggester, load_reward(run, suggester, "gaussian", model))
    weights, rows = fused_weights(run, "gaussian", arm.split("-")[1:]), []
    size = settings.batch_users
    rollouts = suggester.rollouts(model, [c.turns for c in contexts], settings.group,
                                  run.seed("dpo"), temperature=settings.temperature)
    for start in progress(range(0, len(contexts), size), "dpo rewards"):
        some, ids = contexts[start : start + size], rollouts[start : start + size]
        texts = suggester.texts(ids)
        with torch.no_grad():  # the policy is still the reference
            prompts = [suggester.prompt(c.turns) for c in some]
            logps, mask = llm.token_logps(model, prompts, ids)
        rewards, valid = garm.composite_reward(composite(some, texts, logps, mask), weights)
        rewards, valid = (x.view(len(some), -1) for x in (rewards, valid))
        # (B, G): an answer whose judge failed is neither best nor worst.
        best = rewards.masked_fill(~valid, -torch.inf).max(1)
        worst = rewards.masked_fill(~valid, torch.inf).min(1)
        rows += [
            suggester.encoded(c.turns, [answers[i], answers[j]])
            for c, answers, i, j, gap in zip(
                some, texts, best.indices.tolist(), worst.indices.tolist(),
                (best.values - worst.values).tolist(), strict=True)
            if gap > 0 and answers[i].strip() and answers[j].strip()]
    if not rows:
        raise UserError("rl: DPO found no pair of answers with different rewards")
    figures = align(run, suggester, model, rows, arm, run.config.dpo)
    llm.save_adapter(model, run.adapter(arm))
    return {"pairs": len(rows), **figures}


def drawn_contexts(run: Run) -> list[Context]:
    """Contexts of RFT and DPO: of those of RL, as many as rl.rft_contexts."""
    settings = run.config.rl
    batch = batches(run, -(-settings.rft_contexts // settings.batch_users))
    drawn = [context for contexts in batch for context in contexts][: settings.rft_contexts]
    return list({c.dialogue.dialogue_id: c for c in drawn}.values())  # each once
