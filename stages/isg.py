"""Interaction-oriented starter generation (ISG): a list that this user will want to tap.

    python train.py --stage dpo dpo.beta=0.2

Three stages: `ranker` learns what is tapped (Eq. 7), `sit` instructs the generator with a teacher's
lists (Eq. 5), `dpo` aligns it in rounds of sampling, list search (Algorithm 1), mining (Eq. 8) and
DPO (Eq. 6). Under torchrun the processes share the users of sit and dpo; each step sees the same
global batch.

Legend: B rows, N candidates, M lists or interests, K slots, P pairs, D embedding.
"""

from __future__ import annotations

import functools
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import data
import icebreaker as ib
import llm
import roles
from config import (
    Config,
    DpoConfig,
    UserError,
    digest,
    file_digest,
    gather,
    processes,
    progress,
    read_json,
    share,
    write_json,
    write_tensors,
)
from pipeline import Pipeline, State, pad_states, short, sum_counts, utilities

SLOT_LEARNING_RATE = 0.02  # position explains most of a tap and must not wait for w
RANDOM_LISTS = 8  # random draws from the pool among the lists considered

# ----------------------------------------------------------------------------------------- ranker


def shown_lists(p: Pipeline, ids: list[str]) -> list[tuple[data.Impression, State]]:
    """Impressions of these users, each with the user's state at the latest cut before it."""
    wanted, pairs = set(ids), []
    begins = {
        u: [data.cut_time(p.users[u], share) for share in p.config.data.cuts] for u in wanted
    }
    for impression in p.impressions:
        if impression.user_id in wanted and impression.timestamp:
            times = begins[impression.user_id]
            past = [c for c, t in enumerate(times) if t and t <= impression.timestamp]
            if past:
                pairs.append((impression, p.states[impression.user_id][past[-1]]))
    return pairs


def ranker_rows(p: Pipeline, pairs) -> dict[str, torch.Tensor]:
    """One row per shown starter: embedding, slot, click, target, and the number of its list."""
    rows = [
        (y, slot, slot in shown.clicked, shown.sessions_after, i)
        for i, (shown, _) in enumerate(pairs)
        for slot, y in enumerate(shown.starters)
    ]
    starters, slots, clicked, after, owner = zip(*rows, strict=True)
    clicks = torch.tensor(clicked, dtype=torch.float32)
    depth = torch.tensor([float("nan") if a is None else a for a in after])
    settings = p.config.ranker
    return {
        "starters": p.encoder(list(starters)),
        "slots": torch.tensor(slots).clamp_max(p.config.generator.list_size - 1),
        "clicked": clicks,
        "targets": ib.utility_target(clicks, depth, settings.click_share, settings.depth_cap),
        "owner": torch.tensor(owner),
    }


def ranker_logits(ranker, rows, states, index, with_slots: bool = True) -> torch.Tensor:
    owner = rows["owner"][index]
    return ranker(
        **{name: x[owner] for name, x in states.items()},
        starters=rows["starters"][index],
        slots=rows["slots"][index] if with_slots else None,
    )


def fit_ranker(p: Pipeline, pairs, name: str, path: Path) -> ib.UtilityRanker:
    """Soft-label cross-entropy with a per-slot logit; the best epoch on one user in seven stays."""
    settings = p.config.ranker
    held = {u for i, u in enumerate(sorted({shown.user_id for shown, _ in pairs})) if i % 7 == 0}
    fit, stop = ([x for x in pairs if (x[0].user_id in held) == side] for side in (False, True))
    rows, stop_rows = ranker_rows(p, fit), ranker_rows(p, stop)
    states, stop_states = (pad_states([s for _, s in side]) for side in (fit, stop))
    torch.manual_seed(p.seed("ranker", name))
    ranker = p.new_ranker()
    with torch.no_grad():
        ranker.head.bias.fill_(torch.logit(rows["targets"].mean().clamp(0.001, 0.999)))
    slots = {"params": ranker.slot.parameters(), "lr": SLOT_LEARNING_RATE}
    optimiser = torch.optim.AdamW(
        [{"params": ranker.head.parameters(), "weight_decay": 0.05}, slots],
        settings.learning_rate,
        weight_decay=0.0,
    )
    size = settings.batch_impressions * p.config.generator.list_size
    every = torch.arange(len(stop_rows["owner"]))
    best, best_loss, waited, loss = None, float("inf"), 0, torch.tensor(float("nan"))
    for epoch in progress(range(settings.epochs), f"ranker {name}"):
        ranker.train()
        for index in torch.randperm(len(rows["owner"])).split(size):
            if len(index) == 1:  # a remainder that batch norm cannot scale
                continue
            logits = ranker_logits(ranker, rows, states, index)
            loss = ib.utility_loss(logits, rows["targets"][index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        ranker.eval()
        with torch.no_grad():
            logits = ranker_logits(ranker, stop_rows, stop_states, every)
            stop_loss = ib.utility_loss(logits, stop_rows["targets"]).item()
        p.run.log("ranker", ranker=name, epoch=epoch, loss=loss.item(), held_out_loss=stop_loss)
        if stop_loss < best_loss:
            best = {k: v.clone() for k, v in ranker.state_dict().items()}
            best_loss, waited = stop_loss, 0
        else:
            waited += 1
            if waited > settings.patience:
                break
    ranker.load_state_dict(best)
    write_tensors(path, best)
    return ranker.eval()


def stage_ranker(p: Pipeline) -> dict:
    """Fit r_util (Eq. 7) twice: on train users for the generator, on judge users to judge it."""
    if not p.impressions:
        return {"skipped": "no impressions (data.impressions), so no utility to learn"}
    lists = {name: shown_lists(p, p.ids(name)) for name in ("train", "judge", "test")}
    return fit_rankers(p, lists, "ranker")


def fit_rankers(p: Pipeline, lists: dict[str, list], folder: str) -> dict:
    """Rankers of the lists of "train" and of "judge" users, in the run's folder; the figures are of
    "test" users."""
    for name, pairs in lists.items():
        if not pairs:
            raise UserError(
                f"{p.impressions_file}: timestamp: no list of the {name} users was shown after the "
                f"first {p.config.data.cuts[0]:.0%} (data.cuts) of their sessions; a ranker needs "
                f"the times of lists and of sessions"
            )
    test = lists["test"]
    rows, states = ranker_rows(p, test), pad_states([s for _, s in test])
    every, figures = torch.arange(len(rows["owner"])), {}
    for name in ("train", "judge"):
        pairs = lists[name]
        tapped = [shown.user_id for shown, _ in pairs if shown.clicked]
        if len(tapped) < 10 or len(set(tapped)) < 2:
            raise UserError(
                f"{p.impressions_file}: clicked: fewer than 10 lists with a tap, or fewer than two "
                f"people's, among the {name} users; a ranker needs more logs"
            )
        label = f"{folder}/{name}".removeprefix("ranker/")
        ranker = fit_ranker(p, pairs, label, p.run / folder / f"{name}.safetensors")
        with torch.no_grad():
            logits = ranker_logits(ranker, rows, states, every, with_slots=False)
            shown = torch.sigmoid(ranker_logits(ranker, rows, states, every))
        clicked, slots = rows["clicked"].numpy(), rows["slots"].numpy()
        figures[name] = {
            "lists": len(pairs),
            "auc_slot_controlled": ib.slot_controlled_auc(logits.numpy(), clicked, slots),
            "ece": ib.expected_calibration_error(shown.numpy(), rows["targets"].numpy()),
        }
    return figures


# ------------------------------------------------------------------------------------- cold start


class PopularStarters:
    """What others tap, for a user without history: popular, varied, and of the profile's liking.

    A starter's value is its taps beyond what its slots explain, shrunk; taps by people who share a
    field of the profile count five times.
    """

    def __init__(self, p: Pipeline, candidates: int = 60):
        self.p, self.candidates, train = p, candidates, set(p.ids("train"))
        shown = [x for x in p.impressions if x.user_id in train]
        rows = [(y, i, j) for i, x in enumerate(shown) for j, y in enumerate(x.starters)]
        self.starters = sorted({y for y, _, _ in rows})
        number = {y: n for n, y in enumerate(self.starters)}
        rates = p.slot_rates.tolist()
        self.number = np.array([number[y] for y, _, _ in rows])
        self.surplus = np.array(
            [(j in shown[i].clicked) - rates[min(j, len(rates) - 1)] for _, i, j in rows]
        )
        self.owner = np.array([i for _, i, _ in rows])
        self.profiles = [p.users[x.user_id].profile or {} for x in shown]

    def __call__(self, profile: dict[str, str] | None) -> list[str]:
        """At most K starters."""
        return self.ranked(profile)[: self.p.config.generator.list_size]

    def ranked(self, profile: dict[str, str] | None, keep: Callable = lambda y: y) -> list[str]:
        """All candidates that `keep` lets through, list after list as in_lists orders them."""
        own = set((profile or {}).items())
        weight = np.array([5.0 if own & set(x.items()) else 1.0 for x in self.profiles])[self.owner]
        n = len(self.starters)
        value = np.bincount(self.number, weight * self.surplus, n) / (
            np.bincount(self.number, weight, n) + 20
        )
        order, best = np.argsort(-value, kind="stable"), []
        for start in range(0, n, self.candidates):  # until enough pass
            batch = order[start : start + self.candidates]
            kept = set(keep([self.starters[i] for i in batch]))
            best += [i for i in batch if self.starters[i] in kept]
            if len(best) >= self.candidates:
                break
        best = best[: self.candidates]
        if not best:
            return []
        vectors = self.p.encoder([self.starters[i] for i in best])
        utility = torch.tensor(value[best], dtype=torch.float32)[None]
        (order,) = in_lists(self.p.config, utility, (vectors @ vectors.T)[None], expand=len(best))
        return [self.starters[best[i]] for i in order]


def in_lists(
    config: Config,
    utility: torch.Tensor,
    similarity: torch.Tensor,
    valid: torch.Tensor | None = None,
    lists: int = 1000,
    expand: int = 0,
) -> list[list[int]]:
    """Candidates of each row as the list search's best list, then the best of the rest, ...

    utility (B, N), similarity (B, N, N), valid (B, N). At most `lists` lists a row, and then, if
    they are too few to fill one, the others by utility.
    """
    settings, k = config.dpo, config.generator.list_size
    free = torch.ones_like(utility, dtype=torch.bool) if valid is None else valid.clone()
    order: list[list[int]] = [[] for _ in utility]
    for _ in range(lists):
        rich = (free.sum(1) >= k).nonzero().flatten()
        if not len(rich):
            break
        found, _ = ib.list_search(
            ib.min_max(utility[rich], free[rich]), similarity[rich], k, settings.beam,
            expand or settings.expand, settings.weight, free[rich],
        )  # fmt: skip
        for row, best in zip(rich.tolist(), found[:, 0].tolist(), strict=True):
            order[row] += best
        free[rich] = free[rich].scatter(1, found[:, 0], False)
    for row, few in enumerate(free.sum(1).tolist()):
        if few < k:
            rest = free[row].nonzero().flatten()
            order[row] += rest[utility[row, rest].argsort(descending=True, stable=True)].tolist()
    return order


# -------------------------------------------------------------------------------------------- sit


def teacher_lists(p: Pipeline, states: list[State], n: int, purpose: str) -> list[list[list[str]]]:
    """n lists of the teacher for each state, filtered; fewer where an LLM's call failed.

    The processes of a torchrun ask for a share each.
    """
    if not n:
        return [[] for _ in states]
    k, player = p.config.generator.list_size, p.config.roles.teacher
    orders = [
        (s.interests, p.seed("teacher", purpose, s.interests, i))
        for s in share(states)
        for i in range(n)
    ]
    if player == "rules":
        teacher = roles.RuleTeacher()
        texts = [teacher.write(x, k, random.Random(seed)) for x, seed in orders]
        lists = [p.usable(text, x) for text, (x, _) in zip(texts, orders, strict=True)]
    else:
        from roles import prompted

        inputs, seeds = [x for x, _ in orders], [seed for _, seed in orders]
        texts = prompted.LLMTeacher(p.chat(player)).write(inputs, k, seeds)
        lists = [text and roles.covering(p.fit_to_show(text, x), x, k, p.encoder)
                 for text, x in zip(texts, inputs, strict=True)]  # None where the call failed
    return gather([[x for x in lists[i : i + n] if x is not None]
                   for i in range(0, len(lists), n)])


def chosen_states(p: Pipeline, cuts: list[int], limit: int, rng: random.Random) -> list[State]:
    """Train users with interests at these cuts: at random, at most `limit` states (0: all)."""
    states = [p.states[u][c] for u in p.ids("train") for c in cuts if p.states[u][c].interests]
    return rng.sample(states, limit) if 0 < limit < len(states) else states


def stage_sit(p: Pipeline) -> dict:
    """Supervised interest-expanded instruction tuning (Eq. 5) on the teacher's lists."""
    settings, g, rng = p.config.sit, p.config.generator, random.Random(p.seed("sit"))
    rows, short = [], 0
    states = chosen_states(p, list(range(len(p.config.data.cuts))), settings.max_rows, rng)
    taught = teacher_lists(p, states, settings.lists_per_row, "sit")
    for state, lists in zip(states, taught, strict=True):
        full = [llm.encode_completion(p.tokenizer, x) for x in lists if len(x) == g.list_size]
        short += len(lists) - len(full)
        if full:
            rows.append((p.prompt(state.interests), full))
    if not rows:
        raise UserError(
            "sit: the teacher wrote no full list for any user; generator.list_size may be larger "
            "than the interests allow"
        )
    model, figures = instruct(p, rows)
    if settings.own_lists:
        sampled = p.sample_lists(
            model, [x.interests for x in states], settings.own_lists, p.seed("sit", "own")
        )
        made = zip(states, sampled, strict=True)
        full = [(x, [y for y in lists if len(y) == g.list_size]) for x, lists in made]
        rows += [
            (p.prompt(x.interests), [llm.encode_completion(p.tokenizer, y) for y in lists])
            for x, lists in full
            if lists
        ]
        model, figures = instruct(p, rows)
    llm.save_adapter(model, p.run / "sit" / "adapter")
    return {"rows": len(rows), "short_lists_left_out": short, **figures}


def instruct(p: Pipeline, rows: list) -> tuple[torch.nn.Module, dict[str, float]]:
    """A new adapter, tuned on (prompt ids, [list ids, ...]) rows; and its losses."""
    settings, g, rng = p.config.sit, p.config.generator, random.Random(p.seed("sit", "order"))
    model = llm.add_lora(p.policy(None), g.lora_rank, g.lora_alpha, p.seed("lora"))
    size, losses = settings.batch_users, []
    steps = settings.epochs * -(-len(rows) // size)
    optimiser, schedule = new_optimiser(model, settings.learning_rate, steps)
    policy = llm.averaged_gradients(model)
    for epoch in range(settings.epochs):
        order = rng.sample(rows, len(rows))
        for start in progress(range(0, len(rows), size), f"sit epoch {epoch + 1}"):
            batch = order[start : start + size]
            tokens = sum(len(y) for _, lists in batch for y in lists)
            own, factor = part_of(batch)
            loss = -torch.cat(list_logps(p, policy, own)).sum() / tokens * factor  # Eq. (5)
            losses.append(float(np.mean(gather([loss.item()]))))
            rate = schedule.get_last_lr()[0]
            step(model, optimiser, schedule, loss)
            p.run.log("sit", epoch=epoch, loss=losses[-1], learning_rate=rate)
    last = losses[steps - steps // settings.epochs :]  # of the last epoch
    return model, {"first_loss": losses[0], "loss": float(np.mean(last))}


def list_logps(p: Pipeline, policy: Callable, rows) -> list[torch.Tensor]:
    """Summed log-probabilities of the lists of each (prompt ids, [list ids, ...]) row.

    policy: llm.averaged_gradients(model), as long as gradients are wanted.
    """
    prompts, lists = zip(*rows, strict=True)
    return policy(list(prompts), list(lists))


def part_of(batch: list) -> tuple[list, float]:
    """This process's part of a global batch, and the factor of its loss.

    DDP averages the gradients, so a share of a sum counts as often as there are processes. One
    without a share computes a row for nothing: DDP waits for all.
    """
    own = share(batch)
    return (own, float(processes()[1])) if own else (batch[:1], 0.0)


def new_optimiser(model, learning_rate: float, steps: int):
    """AdamW on the LoRA weights; a tenth of the steps warming up, then linear to zero.

    Its eps lies above the rounding noise of gradients (1e-9), which at the usual 1e-8 moves weights
    that nothing else moves, in a direction that depends on the order of a sum.
    """
    optimiser = torch.optim.AdamW(
        [w for w in model.parameters() if w.requires_grad],
        learning_rate,
        eps=1e-6,
        weight_decay=0.0,
        fused=True,
    )
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warm, max(0.0, (steps - i) / max(1, steps - warm)))
    )
    return optimiser, schedule


def step(model, optimiser, schedule, loss: torch.Tensor) -> None:
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([w for w in model.parameters() if w.requires_grad], 1.0)
    optimiser.step()
    schedule.step()


# -------------------------------------------------------------------------------------------- dpo


def score_pools(p: Pipeline, ranker, states: list[State], pools: list[list[str]]):
    """Utilities (B, N), cosines (B, N, N) and valid (B, N) of every user's distinct candidates."""
    p.encoder(sorted({y for pool in pools for y in pool}))
    b, n = len(pools), max(map(len, pools))
    utility, valid = torch.zeros(b, n), torch.zeros(b, n, dtype=torch.bool)
    similarity = torch.zeros(b, n, n)
    for i, (state, pool) in enumerate(zip(states, pools, strict=True)):
        m, embeddings = len(pool), p.encoder(pool)
        if pool:
            utility[i, :m], valid[i, :m] = utilities(ranker, state, embeddings), True
            similarity[i, :m, :m] = embeddings @ embeddings.T
    return utility, similarity, valid


def mine_round(p: Pipeline, ranker, states: list[State], lists) -> tuple[list[dict], Counter]:
    """Lists -> pool -> list search (Algorithm 1) -> chosen and rejected lists (Eq. 8).

    lists: those sampled for each state, repeats and all, and the teacher's. Returns for each state
    the preference pair ({} if there is none), and counts of what was found and what was not.
    """
    settings, k = p.config.dpo, p.config.generator.list_size
    pools = [sorted({y for x in own for y in x}) for own in lists]
    rich = [i for i, pool in enumerate(pools) if len(pool) >= k]
    counts = Counter(users=len(states), too_few_candidates=len(states) - len(rich), pairs=0)
    found_for: list[dict] = [{} for _ in states]
    if not rich:
        return found_for, counts
    states, lists, pools = ([x[i] for i in rich] for x in (states, lists, pools))
    utility, similarity, valid = score_pools(p, ranker, states, pools)
    if settings.grounded:
        for row, state, pool in zip(utility, states, pools, strict=True):
            kept = torch.tensor([roles.grounded(y, state.interests) for y in pool])
            row[: len(pool)] *= kept
            counts["ungrounded"] += int((~kept).sum())
    beams, _ = ib.list_search(
        ib.min_max(utility, valid),  # Unstated: r_util and r_div need one scale, as in Eq. (8)
        similarity,
        k,
        settings.beam,
        settings.expand,
        settings.weight,
        valid,
    )
    for i, (state, own, pool) in enumerate(zip(states, lists, pools, strict=True)):
        rng = random.Random(p.seed("mine", state.user_id, pool))
        n, number = len(pool), {y: j for j, y in enumerate(pool)}
        considered = [x for x in beams[i].tolist() if x[0] >= 0]
        considered += [[number[y] for y in x] for x in own if len(x) == k]
        considered += [rng.sample(range(n), k) for _ in range(RANDOM_LISTS)]
        # A set counts once, in the order that came first: rounding is not to choose among orders.
        considered = [*{tuple(sorted(x)): x for x in considered[::-1]}.values()][::-1]
        chosen, rejected = ib.mine_preferences(
            torch.tensor(considered),
            utility[i, :n],
            similarity[i, :n, :n],
            settings.weight,
            settings.margin,
            settings.tolerance,
        )
        found = {kind: j for kind, j in rejected.items() if kind in settings.negatives}
        counts.update(f"no_{kind}" for kind, j in found.items() if j is None)
        texts = [[pool[y] for y in x] for x in considered]
        kinds = {kind: texts[j] for kind, j in found.items() if j is not None}
        counts["pairs"] += len(kinds)
        if kinds:
            found_for[rich[i]] = {
                "interests": state.interests, "chosen": texts[chosen], "rejected": kinds
            }
    return found_for, counts


def align(
    p: Pipeline, model, pairs: list[dict], label: str, pick: Callable | None = None,
    settings: DpoConfig | None = None,
) -> dict:  # fmt: skip
    """DPO (Eq. 6) on preference pairs, in place; with `pick`, the checkpoint it values most stays.

    The reference is the model as it comes in (or the SIT policy): its log-probabilities are
    computed once, by the code path that trains. settings: where they are not the run's.
    """
    settings, rng = settings or p.config.dpo, random.Random(p.seed("dpo", label))
    rows = [
        (
            p.prompt(x["interests"]),
            [llm.encode_completion(p.tokenizer, y) for y in (x["chosen"], *x["rejected"].values())],
        )
        for x in pairs
    ]
    size, order = settings.batch_users, rng.sample(range(len(rows)), len(rows))
    reference = reference_logps(p, model, rows, order, label)
    steps = settings.passes * -(-len(rows) // size)
    marks = {round(steps * (i + 1) / settings.checkpoints) for i in range(settings.checkpoints)}
    optimiser, schedule = new_optimiser(model, settings.learning_rate, steps)
    best, best_value = (lora_weights(model), pick(model)) if pick else (None, None)
    policy, log = llm.averaged_gradients(model), []
    for number in progress(range(1, steps + 1), f"dpo {label}"):
        order = order or rng.sample(range(len(rows)), len(rows))
        batch, order = order[:size], order[size:]
        own, factor = part_of(batch)
        logps = list_logps(p, policy, [rows[i] for i in own])  # one (1 + rejected,) a user
        both = logps, [reference[i] for i in own]
        chosen, ref_chosen = (torch.cat([y[:1].expand(len(y) - 1) for y in x]) for x in both)
        rejected, ref_rejected = (torch.cat([y[1:] for y in x]) for x in both)  # (P,)
        losses = ib.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, settings.beta)  # Eq. (6)
        columns = torch.stack([losses, chosen, rejected, ref_chosen, ref_rejected])
        log.append(dpo_figures(gather([columns.tolist()] if factor else [])))
        rate = schedule.get_last_lr()[0]
        p.run.log("dpo", round=label, step=number, **log[-1], learning_rate=rate)
        loss = losses.sum() / sum(len(rows[i][1]) - 1 for i in batch)
        if settings.sft_weight:
            tokens = sum(len(rows[i][1][0]) for i in batch)
            loss = loss - settings.sft_weight * sum(x[0] for x in logps) / tokens
        step(model, optimiser, schedule, loss * factor)
        if pick and number in marks:
            value = pick(model)
            p.run.log("dpo", round=label, step=number, held_out=value)
            if value > best_value:
                best, best_value = lora_weights(model), value
    if pick:
        model.load_state_dict(best, strict=False)
    late = {name: float(np.mean([x[name] for x in log[-10:]])) for name in log[0]}
    before = late["chosen_logp"] - late["chosen_logp_change"]  # negative, as log-probabilities are
    if late["chosen_logp_change"] < 0.25 * before:
        print(
            f"  warning: {label}: the log-probability of chosen lists fell by "
            f"{-late['chosen_logp_change']:.1f} nats; lower dpo.learning_rate or raise "
            f"dpo.sft_weight"
        )
    names = ("margin", "chosen_logp", "rejected_logp", "chosen_logp_change")
    return {
        "first_loss": log[0]["loss"],
        "last_loss": late["loss"],
        **{name: late[name] for name in names},
        "held_out": best_value,
    }


def lora_weights(model) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad}


def dpo_figures(columns: list) -> dict[str, float]:
    """Means over pairs; columns: of each process loss, chosen, rejected and their references."""
    loss, chosen, rejected, ref_chosen, ref_rejected = np.concatenate(columns, axis=1)  # (P,) each
    return {
        "loss": float(loss.mean()),
        "margin": float((chosen - ref_chosen - rejected + ref_rejected).mean()),
        "chosen_logp": float(chosen.mean()),
        "rejected_logp": float(rejected.mean()),
        "chosen_logp_change": float((chosen - ref_chosen).mean()),
    }


@torch.no_grad()
def reference_logps(p: Pipeline, model, rows, order: list[int], label: str) -> list[torch.Tensor]:
    """Of all rows; batched as the first pass over them, so that its first loss is ln 2 exactly."""
    if p.config.dpo.reference == "sit" and label != "round 1":
        model = p.policy(p.run / "sit" / "adapter")
    policy, size = functools.partial(llm.completion_logps, model), p.config.dpo.batch_users
    found: dict[int, torch.Tensor] = {}
    for start in progress(range(0, len(order), size), f"reference {label}"):
        batch = order[start : start + size]
        own, factor = part_of(batch)
        logps = list_logps(p, policy, [rows[i] for i in own])
        made = gather([x.tolist() for x in logps] if factor else [])
        found |= zip(batch, map(torch.tensor, made), strict=True)
    return [found[i].to(logps[0].device) for i in range(len(rows))]


def list_quality(p: Pipeline, ranker, states: list[State], sampled) -> dict[str, float]:
    """Mean utility and mean pairwise dissimilarity of lists; an empty list counts as 0."""
    figures = list_qualities(p, ranker, states, sampled)
    return {name: float(np.mean(values)) for name, values in figures.items()}


def list_qualities(p: Pipeline, ranker, states: list[State], sampled) -> dict[str, list[float]]:
    """Utility and diversity of every list of every state in turn."""
    p.encoder(sorted({y for lists in sampled for x in lists for y in x}))
    utility, diversity = [], []
    for state, lists in zip(states, sampled, strict=True):
        for x in lists:
            embeddings = p.encoder(x)
            utility.append(utilities(ranker, state, embeddings).mean().item() if x else 0.0)
            diversity.append(ib.list_diversity(embeddings @ embeddings.T).item())
    return {"utility": utility, "diversity": diversity}


def stage_dpo(p: Pipeline) -> dict:
    """Rounds of sample -> list search -> mine -> DPO; and the SFT+DPO baseline on clicked lists."""
    if not p.impressions:
        return {"skipped": "no impressions (data.impressions), so no preferences to learn"}
    adapter, pairs, figures = p.run / "sit" / "adapter", [], {}
    for number in range(1, p.config.dpo.rounds + 1):
        folder, key = f"dpo/round{number}", digest(p.key, number)  # whatever rounds follow
        if not p.run.is_done(folder, key):
            made = dpo_round(p, number, adapter, pairs)
            p.encoder.save()
            p.run.mark_done(folder, key, **made)
            print(f"  round {number}: {short(made)}", flush=True)
        figures[f"round {number}"] = p.run.figures(folder)
        adapter = p.run / folder / "adapter"
        pairs = pairs + read_json(p.run / folder / "pairs.json")
    if p.config.dpo.vanilla:
        figures["clicked against ignored"] = align_on_clicks(p, pairs)
    return figures


def align_on_clicks(p: Pipeline, pairs: list[dict]) -> dict:
    """The SFT+DPO baseline: vanilla DPO from SIT's policy, on tapped against ignored lists.

    Eq. (6) alone: with dpo.sft_weight it would learn to write like the retrieval.
    """
    settings = p.config.dpo.model_copy(update={"sft_weight": 0.0})
    folder, key = "dpo/vanilla", digest(p.key, "vanilla", settings)
    if not p.run.is_done(folder, key):
        clicked, rng = click_pairs(p), random.Random(p.seed("clicked"))
        if not clicked:
            why = "no user of the logs has a tapped and an ignored list of the same interests"
            shutil.rmtree(p.run / folder / "adapter", ignore_errors=True)  # of other logs
            p.run.mark_done(folder, key, skipped=why)
            return p.run.figures(folder)
        # As many pairs as IceBreaker learned from: their kinds are compared, not their number.
        clicked = rng.sample(clicked, min(len(clicked), sum(len(x["rejected"]) for x in pairs)))
        model = p.policy(p.run / "sit" / "adapter", trainable=True)
        made = align(p, model, clicked, "clicked against ignored", settings=settings)
        llm.save_adapter(model, p.run / folder / "adapter")
        p.run.mark_done(folder, key, pairs=len(clicked), **made)
    return p.run.figures(folder)


def dpo_round(p: Pipeline, number: int, adapter: Path, earlier: list[dict]) -> dict:
    """One round, from the policy in `adapter`; writes dpo/round<number>/{pairs.json,adapter}."""
    folder, users = p.run / "dpo" / f"round{number}", p.config.dpo.max_users
    valid = [s for u in p.ids("valid") if (s := p.states[u][-1]).interests]
    cut = min(number, len(p.config.data.cuts)) - 1  # early, middle, latest slice of the log
    states = chosen_states(p, [cut], users, random.Random(p.seed("users", number)))
    model = p.policy(adapter, trainable=True)
    ranker = p.ranker("train")
    made, new = improve(p, number, model, adapter, ranker, states, valid, earlier)
    llm.save_adapter(model, folder / "adapter")
    write_json(folder / "pairs.json", new)
    return made


def improve(
    p: Pipeline, number: int | str, model, adapter: Path, ranker, states: list[State],
    valid: list[State], earlier: list[dict], keep: bool = True,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Sample, search, mine and align, in place; returns figures and the pairs found.

    model: the policy saved in `adapter`; states: whom it writes for; valid: those on whom the best
    checkpoint is chosen; earlier: pairs that join the new ones; keep: whether what was sampled may
    stay in a file.
    """
    settings = p.config.dpo
    sampled = own_lists(p, number, model, adapter, states, keep)
    taught = teacher_lists(p, states, settings.teacher_lists, f"round {number}")
    lists = [x + y for x, y in zip(sampled, taught, strict=True)]
    found, counts = mine_round(p, ranker, share(states), share(lists))
    new = [pair for pair in gather(found) if pair]
    counts = sum_counts(gather([dict(counts)]))
    if not earlier + new:
        raise UserError("dpo: no preference pair found; lower dpo.margin or raise dpo.samples")
    start: dict[str, float] = {}

    def held_out(model) -> float:
        """Utility and diversity on users of no pair, each relative to the start of the round."""
        lists = p.sample_lists(model, [s.interests for s in valid], 2, p.seed("dpo", "held out"))
        now = list_quality(p, ranker, valid, lists)
        p.run.log("dpo", round=f"round {number}", held_out=now)
        for name, value in now.items():
            start.setdefault(name, max(value, 1e-6))
        gain = {name: value / start[name] for name, value in now.items()}
        return settings.weight * gain["utility"] + (1 - settings.weight) * gain["diversity"]

    made = align(p, model, earlier + new, f"round {number}", held_out if valid else None)
    return {"before": list_quality(p, ranker, states, sampled), **counts, **made}, new


def own_lists(
    p: Pipeline, number: int | str, model, adapter: Path, states: list[State], keep: bool = True
) -> list[list[list[str]]]:
    """dpo.samples lists of the policy for each state: the candidates of a round.

    With their repeats, which the search avoids: such a list is a natural diversity negative. With
    `keep` they stay in sampled.json beside the adapter, for a killed round and for runs that start
    as a copy.
    """
    inputs, n, seed = [s.interests for s in states], p.config.dpo.samples, p.seed("dpo", number)
    weights = file_digest(adapter / "adapter_model.safetensors")
    key = digest(p.model_path, weights, p.config.generator, inputs, n, seed)
    path = adapter.parent / "sampled.json"
    if path.is_file() and (kept := read_json(path))["key"] == key:
        return kept["lists"]
    lists = p.write_lists(adapter, inputs, n, seed, model, repeats=True)
    if keep and processes()[0] == 0 and not p.config.generator.endpoint:  # that has its own cache
        write_json(path, {"key": key, "lists": lists})
    return lists


def click_pairs(p: Pipeline) -> list[dict]:
    """Vanilla pairs of the SFT+DPO baseline: a user's tapped list against an ignored one."""
    by_state: dict[int, tuple[State, list, list]] = {}
    for impression, state in shown_lists(p, p.ids("train")):
        _, tapped, ignored = by_state.setdefault(id(state), (state, [], []))
        (tapped if impression.clicked else ignored).append(impression.starters)
    return [
        {"interests": state.interests, "chosen": chosen, "rejected": {"ignored": rejected}}
        for state, tapped, ignored in by_state.values()
        if state.interests
        for chosen, rejected in zip(tapped, ignored, strict=False)
    ]
