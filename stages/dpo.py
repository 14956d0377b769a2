"""Stage `dpo`: personalised multi-dimensional alignment. Rounds of sample, search, mine, align.

    python train.py --stage dpo dpo.beta=0.2

Section 2.3 of the paper: in each round the policy samples lists for users of a later slice of the
log, list search (Algorithm 1) finds better ones in the pool of all starters, preference pairs are
mined (Eq. 8; pairs.py), and DPO (Eq. 6) aligns the policy on all pairs so far. The baseline SFT+DPO
learns from lists that were shown, tapped ones against ignored ones. Under torchrun the processes
share the users; each step sees the same global batch.

Departures: a term for the likelihood of the chosen lists beside Eq. (6), without which it falls
with that of the rejected ones; some of a pool's lists are the teacher's; a list that may not be
shown whole is rejected too, or nothing would speak against starters that are too long.

SIT's policy is the baseline SFT. Legend: K slots, P pairs of a chosen and a rejected list.
"""

import itertools
import random
import shutil
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

import icebreaker as ib
import llm
from config import DpoConfig
from files import UserError, digest, gather, gather_counts, progress, read_json, share, write_json
from roles.players import Players
from roles.suggester import Suggester
from roles.writer import Writer
from run import Run, UserState
from stages.pairs import fit_lists, mine, sample, search, tapped_pairs
from stages.ranker import load_ranker, pilot_lists, shown_lists, utilities
from stages.sit import Rows, draw_states, taught_lists
from stages.steps import micro_batches, new_optimiser, return_memory, step

TAPPED = "tapped against ignored"  # the baseline in figures and log


def stage_dpo(run: Run, players: Players, key: str) -> dict:
    """Rounds of DPO on mined lists; and the SFT+DPO baseline on clicked ones."""
    if not run.impressions:
        return {"skipped": "no impressions (data.impressions), so no preferences to learn"}
    adapter, pairs, figures = run.adapter("sit"), [], {}  # pairs accumulate over the rounds
    for number in range(1, run.config.dpo.rounds + 1):
        folder = f"dpo/round{number}"
        figures[f"round {number}"] = run.folder.once(  # whatever number of them is asked for
            folder, digest(key, number), partial(dpo_round, run, players, number, adapter, pairs))
        return_memory()
        adapter = run.adapter(f"round{number}")
        pairs = pairs + read_json(run.folder / folder / "pairs.json")
    if run.config.dpo.vanilla:  # on as many pairs as all rounds have
        figures[TAPPED] = run.folder.once("dpo/vanilla", digest(key, "vanilla", pairs),
                                          partial(align_on_clicks, run, players.writer, pairs))
    return figures


def dpo_round(run: Run, players: Players, number: int, adapter: Path, earlier: list[dict]) -> dict:
    """One round, from the policy in `adapter`; writes dpo/round<number>/{pairs.json,adapter}."""
    cut = min(number, len(run.config.data.cuts)) - 1  # its slice: early, middle, then the latest
    rng = random.Random(run.seed("users", number))
    states = draw_states(run, [cut], run.config.dpo.max_users, rng)
    model = players.writer.policy(adapter, trainable=True)  # goes on with the last round's LoRA
    figures, pairs = train_round(
        run, players, number, model, adapter, load_ranker(run, "train"), states, earlier)
    llm.save_adapter(model, run.adapter(f"round{number}"))
    write_json(run.folder / "dpo" / f"round{number}" / "pairs.json", pairs)
    run.encoder.save()  # a killed run does not encode the round's starters again
    return figures


def train_round(run: Run, players: Players, number: int | str, model, adapter: Path, ranker,
                states: list[UserState], earlier: list[dict],
                keep: bool = True) -> tuple[dict, list[dict]]:
    """Sample, search, mine and align, in place; returns figures and the pairs that were mined.

    number: of the round, or the name of one on a server's taps (serving/feedback.py); model: the
    policy saved in `adapter`; states: whom it writes for; earlier: pairs that join the new ones,
    {interests, chosen, rejected: {why: list}} each; keep: what was sampled may stay in a file.
    """
    label, writer = f"round {number}", players.writer
    written = sample(run, writer, number, model, adapter, states, keep)  # dpo.samples lists a user
    sampled = [fit_lists(run, s, lists) for s, lists in zip(states, written, strict=True)]
    taught = taught_lists(run, players, states, run.config.dpo.teacher_lists, label)
    # A weak policy alone would have a pool of its own mistakes.
    lists = [policy + teacher for policy, teacher in zip(sampled, taught, strict=True)]
    searched = search(run, ranker, share(states), share(lists))  # Algorithm 1
    # Of `written`, unlike `sampled`, a list that may not be shown whole is rejected for that.
    mined, counts = mine(run, searched, share(written))  # Eq. (8)
    pairs = [pair for pair in gather(mined) if pair]  # of all processes, in the order of users
    if not earlier + pairs:
        raise UserError("dpo: no preference pair found; lower dpo.margin or raise dpo.samples")
    figures = align(run, writer, model, encoded(writer, earlier + pairs), label, run.config.dpo)
    before = list_quality(run, ranker, states, sampled)
    return {"before": before, **gather_counts(counts), **figures}, pairs


# ------------------------------------------------------------------------------------------- align


def encoded(writer: Writer, pairs: list[dict]) -> Rows:
    """Rows of `align`: the prompt of each chosen list with it and the rejected ones behind it."""
    return [writer.encoded(pair["interests"], [pair["chosen"], *pair["rejected"].values()])
            for pair in pairs]


def align(run: Run, writer: Writer | Suggester, model, rows: Rows, label: str,
          settings: DpoConfig) -> dict:
    """DPO (Eq. 6) on rows of prompt ids and [chosen ids, rejected ids, ...], in place.

    The reference is `model` as it comes in: its log-probabilities are computed once, before the
    first step.
    """
    rng = random.Random(run.seed("dpo", label))
    size, order = settings.batch_users, rng.sample(range(len(rows)), len(rows))
    micro = run.config.generator.micro_batch
    ref_logps = reference_logps(model, rows, order, size, micro)
    steps = settings.passes * -(-len(rows) // size)
    optimiser, schedule = new_optimiser(model, settings.learning_rate, steps)
    log, policy = [], llm.averaged_gradients(model)
    for number in (bar := progress(range(1, steps + 1), f"dpo {label}")):
        # The first pass keeps the order of the reference: equal batches round alike, so that the
        # first loss is ln 2 exactly.
        order = order or rng.sample(range(len(rows)), len(rows))
        batch, order = order[:size], order[size:]
        pairs_of_batch = sum(len(rows[i][1]) - 1 for i in batch)
        tokens = sum(len(rows[i][1][0]) for i in batch)  # of the chosen lists
        measured = []  # (5, P) of each micro-batch
        for part, factor in micro_batches(batch, micro):
            logps = policy(*columns(rows[i] for i in part))  # [chosen, rejected, ...] of each user
            chosen, rejected = against_chosen(logps)  # (P,) each
            refs = against_chosen([ref_logps[i] for i in part])  # chosen, rejected: (P,) each
            losses = ib.dpo_loss(chosen, rejected, *refs, settings.beta)  # Eq. (6)
            # Departure: a term for the likelihood of the chosen lists, a mean per token.
            likelihood = sum(y[0] for y in logps) / tokens
            loss = losses.sum() / pairs_of_batch - settings.sft_weight * likelihood
            (loss * factor).backward()
            if factor:  # 0: this process has no row, and only keeps step
                measured.append(torch.stack([losses, chosen, rejected, *refs]).tolist())
        rate = schedule.get_last_lr()[0]
        step(model, optimiser, schedule, f"dpo, {label}, step {number}",
             (f"row {i} of pairs" for i in batch))
        log.append(dpo_figures([*itertools.chain(*gather([measured]))]))
        run.folder.log("dpo", round=label, step=number, **log[-1], learning_rate=rate)
        bar.set(loss=log[-1]["loss"])
    return closing_figures(log, label) | {
        "prompts_cut": writer.cut_prompts(prompt for prompt, _ in rows)}


def columns(rows: Iterable) -> tuple[list, list]:
    """Prompts, and completions of each, of (prompt, completions) rows."""
    return tuple(map(list, zip(*rows, strict=True)))


def against_chosen(logps: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """[chosen, rejected, ...] of each user -> chosen (P,), rejected (P,): a pair a rejected."""
    chosen = torch.cat([y[:1].expand(len(y) - 1) for y in logps])
    return chosen, torch.cat([y[1:] for y in logps])


@torch.no_grad()
def reference_logps(model, rows: Rows, order: list[int], size: int,
                    micro: int) -> list[torch.Tensor]:
    """[chosen, rejected, ...] of all rows; batched as the first pass over them, so that the first
    loss of a policy against itself is ln 2 exactly."""
    values = []  # (row, its log-probabilities), of this process
    for start in progress(range(0, len(order), size), "dpo reference"):
        # 4-bit and bf16 products differ in rounding with the batch, so batches are the same.
        for part, factor in micro_batches(order[start : start + size], micro):
            logps = llm.completion_logps(model, *columns(rows[i] for i in part))
            if factor:
                values += zip(part, [y.tolist() for y in logps], strict=True)
    results = dict(itertools.chain(*gather([values])))  # of all processes
    return [torch.tensor(results[i], device=logps[0].device) for i in range(len(rows))]


def dpo_figures(parts: list) -> dict[str, float]:
    """Means over pairs; parts: of each process loss, chosen, rejected and their references."""
    loss, chosen, rejected, ref_chosen, ref_rejected = np.concatenate(parts, axis=1)  # (P,) each
    values = {"loss": loss, "margin": chosen - ref_chosen - rejected + ref_rejected,
              "chosen_logp": chosen, "rejected_logp": rejected,
              "chosen_logp_change": chosen - ref_chosen}
    return {name: float(value.mean()) for name, value in values.items()}


def closing_figures(log: list[dict[str, float]], label: str) -> dict[str, float]:
    """The first loss and means of the last ten steps; warns where chosen lists became unlikely."""
    late = {name: float(np.mean([figures[name] for figures in log[-10:]])) for name in log[0]}
    before = late["chosen_logp"] - late["chosen_logp_change"]  # negative, as log-probabilities are
    if late["chosen_logp_change"] < 0.25 * before:
        print(f"  warning: {label}: the log-probability of chosen lists fell by "
              f"{-late['chosen_logp_change']:.1f} nats; lower dpo.learning_rate or raise "
              "dpo.sft_weight")
    return {"first_loss": log[0]["loss"], "last_loss": late.pop("loss"), **late}


# ----------------------------------------------------------------------------------------- quality


def list_quality(run: Run, ranker, states: list[UserState], lists) -> dict[str, float]:
    """Mean utility and mean pairwise dissimilarity of lists; an empty list counts as 0."""
    figures = list_qualities(run, ranker, states, lists)
    return {name: float(np.mean(values)) for name, values in figures.items()}


def list_qualities(run: Run, ranker, states: list[UserState], lists) -> dict[str, list[float]]:
    """Utility and diversity of every list of every state in turn. Utility is a mean over K slots,
    of which an empty one is worth nothing; diversity is that of the starters that are there."""
    run.encoder(sorted({y for user_lists in lists for starters in user_lists for y in starters}))
    utility, diversity, k = [], [], run.config.generator.list_size
    for state, user_lists in zip(states, lists, strict=True):
        for starters in user_lists:
            vectors = run.encoder(starters)  # (K, D)
            utility.append(utilities(ranker, state, vectors).sum().item() / k)
            diversity.append(ib.list_diversity(vectors @ vectors.T).item())
    return {"utility": utility, "diversity": diversity}


# ------------------------------------------------------------------------- the baseline SFT + DPO


def align_on_clicks(run: Run, writer: Writer, pairs: list[dict]) -> dict:
    """The SFT+DPO baseline: vanilla DPO from SIT's policy on lists that were shown, tapped ones
    against ignored ones.

    pairs: IceBreaker's, of which there are to be as many; loss and settings are the same. The lists
    are those of the pilot. Logs that were given have none: there it learns from the log, and only
    as far as the policy would write such lists.
    """
    model = writer.policy(run.adapter("sit"), trainable=True)
    # As many chosen lists as IceBreaker learned from, and about as many rejected ones to each:
    # their kinds are compared, not their number.
    width = round(float(np.mean([len(pair["rejected"]) for pair in pairs] or [1])))
    lists = pilot_lists(run, "train") or shown_lists(run, run.ids("train"))
    clicked = tapped_pairs(run, ((row, state.interests) for row, state in lists), width)
    if not clicked:
        shutil.rmtree(run.adapter("vanilla"), ignore_errors=True)  # of other logs
        return {"skipped": "no train user with a tapped and an ignored list for the same interests"}
    rng = random.Random(run.seed("clicked"))
    clicked = rng.sample(clicked, min(len(clicked), len(pairs)))
    rows = encoded(writer, clicked)
    figures = align(run, writer, model, rows, TAPPED, run.config.dpo)
    llm.save_adapter(model, run.adapter("vanilla"))
    return {"pairs": sum(len(pair["rejected"]) for pair in clicked), **figures}
