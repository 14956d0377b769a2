"""Stages `rl` and `mine` of paper 001: quality-first GRPO and K rounds of mining (Algorithm 1).

    python train.py --config configs/qualeqs.yaml --stage rl       # steps 1 and 2
    python train.py --config configs/qualeqs.yaml --stage mine quality.rounds=5     # steps 3 and 4

The loop of GRPO is stages/rl.py's grpo, its reward stages/quality.py. A round lets the policy write
for unclicked contexts, keeps those whose candidates disagree most (Eq. 6), and goes on with GRPO on
these and on clicked ones. Every round has as many batches as stage `rl`. More rounds go on behind
the ones that are there.

Departures: qualeqs.py's. KL is to the policy at the start of a round. The ablation without warm
start answers the long prompt (prompts.yaml), as a base that knows no form earns no reward.
Legend: B contexts, G answers of each, K suggestions of an answer.
"""

import math
import random
from functools import partial

import torch

import llm
import qualeqs
from files import UserError, digest, read_json, write_json
from roles.players import Players
from roles.suggester import Suggester
from run import Run
from stages.dialogues import Context
from stages.quality import Quality, log_contexts
from stages.rl import cycle, grpo, save_policy

WARM, FIRST = "sft/mixed", "rl/grpo"  # policies, by their folders


def stage_rl(run: Run, players: Players, key: str) -> dict:
    """Step 2: GRPO on clicked contexts, from the warm start; perhaps from the prompted base too."""
    ablation = "no_warm_start" in run.config.quality.ablations
    quality, figures = Quality(run, players), {}
    clicked, _ = log_contexts(run)
    # Figure 4's round 0.
    for folder in (FIRST, *["rl/no_warm_start"] * ablation):
        start = WARM if folder == FIRST else ""
        figures[folder] = run.folder.once(folder, digest(key, folder), partial(
            train_round, run, players, quality, folder, start, clicked, [], 0))
    return with_calls(figures, players)


def stage_mine(run: Run, players: Players, key: str) -> dict:
    """Steps 3 and 4, K times; and the same with other unclicked contexts, or with none."""
    settings, figures = run.config.quality, {}
    quality, (clicked, unclicked) = Quality(run, players), log_contexts(run)
    for kind in ("hard", *(kind for kind in ("random", "clicked") if kind in settings.ablations)):
        policy = FIRST  # every kind goes its own way from there
        for number in range(1, settings.rounds + 1):
            folder = f"mine/{kind}{number}"
            candidates, added = probed(run, unclicked, number), []  # the same for all kinds
            if kind == "hard":
                added = mined(run, players, quality, key, folder, policy, candidates)
            elif kind == "random":  # as many as could be hard
                added = candidates[: round(settings.share * len(candidates))]
            figures[folder] = {"unclicked": len(added)} | run.folder.once(
                folder, digest(key, folder), partial(
                    train_round, run, players, quality, folder, policy, clicked, added, number))
            policy = folder  # the next round goes on from here
    return with_calls(figures, players)


def with_calls(figures: dict, players: Players) -> dict:
    # Asked for here, so that train.run_stage takes none of them for failed: a failed call has been
    # masked, and to ask again would train anew.
    calls = players.calls()
    return figures | ({"judge": calls} if calls else {})


def train_round(run: Run, players: Players, quality: Quality, folder: str, start: str,
                clicked: list[Context], unclicked: list[Context], number: int) -> dict:
    """GRPO of one round from the policy `start` ("": the base)."""
    suggester, g = Suggester(players.writer, "three" if start else "prompted"), run.config.generator
    model = suggester.policy(run.adapter(start), trainable=True)
    if not start:  # LoRA that does nothing yet
        model = llm.add_lora(model, g.lora_rank, g.lora_alpha, run.seed("lora"))
    batches = round_batches(run, clicked, unclicked, number)
    log = grpo(run, suggester, model, quality, quality.weights, batches, folder,
               number * run.config.rl.steps)
    figures = save_policy(run.adapter(folder), model, log)
    # It would pass for a training that changed nothing.
    if figures["invalid"] and not any(line["components"]["format"] for line in log):
        failed = figures["invalid"]
        raise UserError(f"roles.judge: {folder}: no answer was judged, {failed} calls failed")
    return figures


def round_batches(run: Run, clicked: list[Context], unclicked: list[Context],
                  number: int) -> list[list[Context]]:
    """rl.steps batches, at random, of these unclicked contexts and clicked ones beside; of few each
    again."""
    settings, seed = run.config.rl, run.seed("round", number)
    by_id = {c.dialogue.dialogue_id: c for c in (*unclicked, *clicked)}
    limit = settings.steps * settings.batch_users  # contexts of a round
    clicked_ids, unclicked_ids = ([c.dialogue.dialogue_id for c in some]
                                  for some in (clicked, unclicked))
    names = qualeqs.round_contexts(
        clicked_ids, unclicked_ids, limit, torch.Generator().manual_seed(seed))
    # A log may have fewer contexts than a round has places.
    names += cycle(names, limit - len(names), random.Random(seed))
    return [[by_id[name] for name in names[i : i + settings.batch_users]]
            for i in range(0, limit, settings.batch_users)]


# ----------------------------------------------------------------------------------------- mining


def probed(run: Run, unclicked: list[Context], number: int) -> list[Context]:
    """The unclicked contexts that a round looks at, in random order."""
    most = min(run.config.quality.contexts or len(unclicked), len(unclicked))
    return random.Random(run.seed("probed", number)).sample(unclicked, most)


def mined(run: Run, players: Players, quality: Quality, key: str, folder: str, policy: str,
          contexts: list[Context]) -> list[Context]:
    """Step 3: the contexts that this policy finds hard, hardest first.

    Writes FOLDER/mined/contexts.json: every context looked at, its rewards and disagreement.
    """
    place, mine_key, settings = f"{folder}/mined", digest(key, folder, "mined"), run.config.quality
    path = run.folder / place / "contexts.json"
    if not contexts:
        return []
    if run.folder.begin(place, mine_key):
        suggester = Suggester(players.writer)
        model, g = suggester.policy(run.adapter(policy)), run.config.rl
        answers = suggester.texts(suggester.rollouts(
            model, [c.turns for c in contexts], g.group, run.seed(place),
            temperature=g.temperature))
        # By the judge of training: what is hard for the policy is hard by its reward.
        *each, form = quality.scores(contexts, answers)  # (B G, K)
        r, _ = qualeqs.set_reward(*each, form, quality.failed_as_zero)
        # All candidates of a context: of one list alone Eq. (6) ranks nothing.
        r = r.view(len(contexts), -1)  # (B, G K)
        u = qualeqs.disagreement(r)  # Eq. (6), (B,)
        hard = qualeqs.mine_hard(u, settings.share, settings.floor).tolist()
        rest = [i for i in range(len(contexts)) if i not in {*hard}]  # kept to be looked at
        rows = [{"dialogue_id": contexts[i].dialogue.dialogue_id, "hard": i in hard,
                 "disagreement": u[i].item(),
                 "rewards": [None if math.isnan(x) else x for x in r[i].tolist()]}  # failed
                for i in (*hard, *rest)]
        write_json(path, rows)
        run.folder.mark_done(place, mine_key, looked_at=len(rows), hard=len(hard),
                             no_variance=int((u == 0).sum()), failed=int(r.isnan().sum()))
    by_id = {c.dialogue.dialogue_id: c for c in contexts}
    return [by_id[row["dialogue_id"]] for row in read_json(path) if row["hard"]]
