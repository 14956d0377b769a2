"""Stage `fuse`: the weights of the composite reward's components, in two steps (paper 003, 3.6.3).

    python train.py --config configs/garm.yaml --stage fuse fuse.probes=0   # Eq. (10) alone

First logistic regression (Eq. 10) on differences of good and bad suggestions. Then, by short probes
of RL from SFT's policy, the Pareto-guided adjustment: a component that falls gains weight, one that
dominates loses some, until none falls. Trace and weights: fuse/<kind>/trace.json.

Unstated: which suggestions are good and bad. Here half are clicked and passed over ones of held-out
contexts; as these never differ in what makes a list, the other half are clicked lists against the
same with a fault: a line too few, a repeated line, lines for another conversation, declining a safe
context, an over-long line, a line in another script, answering an unsafe one. So every component
but the models' has a fault of its own.
"""

import math
import random
from collections import Counter
from functools import partial

import torch
from torch import Tensor

import garm
import llm
from config import COMPONENTS, RewardKind
from files import UserError, digest, write_json
from roles.players import Players
from roles.suggester import Suggester
from run import Run
from stages.composite import SIZE, Composite
from stages.dialogues import Context, chosen, clicked_list, read_contexts
from stages.reward import load_reward, pairs_of
from stages.rl import batches, grpo


def stage_fuse(run: Run, players: Players, key: str) -> dict:
    """Weights for every reward model from which RL or DPO can learn."""
    figures = {}
    # The paired model scores no answer alone, and PURM's is there to be compared.
    for kind in (k for k in ("gaussian", "bradley_terry") if k in run.config.reward.kinds):
        figures[kind] = run.folder.once(
            f"fuse/{kind}", digest(key, kind), partial(keep_trace, run, players, kind))
        run.encoder.save()
    return figures


def keep_trace(run: Run, players: Players, kind: RewardKind) -> dict:
    """Fuse for this reward model; fuse/<kind>/trace.json, and what the stage tells of it."""
    trace = fuse_kind(run, players, kind)
    write_json(run.folder / "fuse" / kind / "trace.json", trace)
    return {"weights": trace["weights"], "probes": len(trace["probes"]),
            "settled": trace["settled"]}


def fuse_kind(run: Run, players: Players, kind: str) -> dict:
    """Initial weights, every probe with its trends and new weights, and the last weights."""
    settings, suggester = run.config.fuse, Suggester(players.writer)
    model = suggester.policy(run.adapter("sft"), trainable=True)
    # One base for policy, reference and reward model: adapters swap places.
    composite = Composite(players, suggester, load_reward(run, suggester, kind, model))
    rows = differences(run, composite, model)  # (P, J)
    if same := [name for name, differs in named(rows.ne(0).any(0)).items() if not differs]:
        print(f"  {kind}: without weight, as it never differs: {', '.join(same)}")
    fitted = garm.fuse(rows, settings.l2)  # Eq. (10)
    # Departure: more of any component is better; a weight below 0 would reward its opposite.
    initial = fitted.clamp_min(0)
    if below := [name for name, weight in named(fitted).items() if weight < 0]:
        print(f"  {kind}: without weight, as it would be below 0: {', '.join(below)}")
    weights, probes, settled = initial, [], False
    for number in range(settings.probes):
        # Each probe from SFT's policy, on the same contexts, with the same draws.
        start = llm.adapter_weights(model, run.adapter("sft"))
        with llm.other_adapter(model, start):
            contexts = batches(run, settings.probe_steps)
            log = grpo(run, suggester, model, composite, weights, contexts,
                       f"probe {number + 1} {kind}")
        trends = component_trends(log)  # (J,)
        weights, settled = garm.pareto_adjust(weights, initial, trends)  # section 3.6.3
        probes.append({"trends": named(trends), "weights": named(weights), "steps": log})
        if settled:  # no component falls: nothing to mend
            break
    # In-sample: share of the rows fitted to whose good side earns more.
    return {"rows": len(rows), "right_in_sample": float((rows @ initial > 0).float().mean()),
            "fitted": named(fitted), "initial": named(initial), "probes": probes,
            "settled": settled, "weights": named(weights)}


def named(values: Tensor) -> dict[str, float]:
    return dict(zip(COMPONENTS, values.tolist(), strict=True))


def component_trends(log: list[dict]) -> Tensor:
    """Rise (J,) of each unweighted component from the first to the second half of a probe.

    0 within 2 standard errors, as most change of a few batches is chance; and where either half has
    less than two batches with a context that the component is about.
    """
    half, trends = len(log) // 2, []
    for name in COMPONENTS:
        values = [[v for line in part if (v := line["components"][name]) is not None]
                  for part in (log[:half], log[half:])]
        if min(map(len, values)) < 2:
            trends.append(0.0)
            continue
        early, late = (torch.tensor(part, dtype=torch.float64) for part in values)
        rise = (late.mean() - early.mean()).item()
        error = math.sqrt(early.var() / len(early) + late.var() / len(late))
        trends.append(rise if abs(rise) > 2 * error else 0.0)
    return torch.tensor(trends)


# ------------------------------------------------------------------------ good and bad suggestions


def differences(run: Run, composite: Composite, model) -> Tensor:
    """(P, J): components of good suggestions minus those of bad ones; a failed judge's are left
    out."""
    contexts, rng = read_contexts(run), random.Random(run.seed("fuse"))
    # Neither policy nor reward model has learned from these people.
    rows = pairs_of(chosen(contexts, "valid"))
    if not rows:
        raise UserError("fuse: no held-out click is below the first slot; raise data.valid")
    rows = rng.sample(rows, min(run.config.fuse.max_contexts, len(rows)))
    parts = composite.of_suggestions(model, [c for c, _ in rows],
                                     [c.dialogue.suggestions for c, _ in rows])
    # (K, J) for each context: its three suggestions.
    by_context = parts.split([len(c.dialogue.suggestions) for c, _ in rows])
    clicks = [values[w] - values[r]
              for (_, pairs), values in zip(rows, by_context, strict=True) for w, r in pairs]
    lists = violations(run, contexts, len(clicks), rng)
    # As many, so that what a list must be weighs as much as what people click.
    answers = [[good, bad] for _, good, bad in lists]
    suggester = composite.suggester
    broken = []  # differences of lists, (J,) each
    for start in range(0, len(lists), SIZE):  # contexts at a time
        part = slice(start, start + SIZE)
        some, texts = [c for c, _, _ in lists[part]], answers[part]
        prompts = [suggester.prompt(c.turns) for c in some]
        ids = [[suggester.completion(text) for text in pair] for pair in texts]
        with torch.no_grad():
            logps, mask = llm.token_logps(model, prompts, ids)
        values = composite(some, texts, logps, mask)  # good, bad, good, bad, ...
        broken += [*(values[::2] - values[1::2])]
    rows = torch.stack(clicks + broken)  # (P, J)
    return rows[rows.isfinite().all(1)]


def violations(run: Run, contexts: list[Context], count: int,
               rng: random.Random) -> list[tuple[Context, str, str]]:
    """(context, answer as asked for, the same with a fault), each fault in turn."""
    lists = [(c, three) for c in chosen(contexts, "valid")
             if (three := clicked_list(c, run, Counter()))]
    unsafe, result = chosen(contexts, "valid", unsafe=True), []
    for i in range(count if lists else 0):  # each fault as often as the next
        place = rng.randrange(len(lists))
        context, three = lists[place]
        good = garm.format_answer(three)
        others = [other for _, other in lists[:place] + lists[place + 1 :]]
        bad = [good.rpartition("\n")[0], garm.format_answer([*three[:2], three[0]]),
               garm.format_answer(rng.choice(others)) if others else None, garm.UNSAFE,
               garm.format_answer([*three[:2], over_long(three[2])]),
               garm.format_answer([*three[:2], foreign(context.queries[-1])])]
        fault = i % (len(bad) + 1)
        if fault < len(bad):
            result += [(context, good, bad[fault])] if bad[fault] else []
        elif unsafe:
            result.append((rng.choice(unsafe), garm.UNSAFE, good))
    return result


def over_long(text: str) -> str:
    """A suggestion said again and again, until its length earns nothing: no other rule minds."""
    while garm.length_reward([text]) > 0:
        text = f"{text} {text}"
    return text


def foreign(query: str) -> str:
    """A suggestion in another script than the query's."""
    lines = ("Расскажите об этом подробнее", "请再介绍一些")
    return next(line for line in lines if garm.script_of(line) != garm.script_of(query))
