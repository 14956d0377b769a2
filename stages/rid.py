"""Resonance-aware interest distillation (RID): which past interests are worth bringing up again.

    python train.py --stage rid

Three stages: `summarize` puts a line for a session of messages, `match` marks what a later session
came back to, `rid` trains the scorer on that (Eq. 3), fits the gate (Eq. 4) and distils everybody's
trigger interests.

Legend: B rows, N summaries, E earlier and L later ones.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable

import numpy as np
import torch

import icebreaker as ib
import roles
from config import (
    UserError,
    atomic_path,
    progress,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from encoder import Encoder, embed
from pipeline import Pipeline

ENCODER_LEARNING_RATE = 0.0  # above 0: the encoder of E_u and E_h is fine-tuned too
ENCODER_RECOMPUTE = False  # gradient caching: activations of one encoder.batch_size

# -------------------------------------------------------------------------- summarize, match


def stage_summarize(p: Pipeline) -> dict:
    """Write a summary of every session that came with messages alone."""
    missing = [
        (user.user_id, i, session.messages)
        for user in p.logged_users
        for i, session in enumerate(user.sessions)
        if not session.summary
    ]
    made = summarise(p, [m for *_, m in missing])
    summaries: dict[str, dict[str, str]] = {}
    for (user_id, i, _), text in zip(missing, made, strict=True):
        if text:
            summaries.setdefault(user_id, {})[str(i)] = text
    write_json(p.run / "summarize" / "summaries.json", summaries)
    return {"without_summary": len(missing), "still": sum(not text for text in made)}


def summarise(p: Pipeline, messages: list[list]) -> list[str | None]:
    """A line for each session's messages, by the role that is set; None where there is none."""
    if p.config.roles.summariser == "rules":
        return [roles.RuleSummariser().summarise(m) for m in messages]
    from roles import prompted

    return prompted.LLMSummariser(p.chat(p.config.roles.summariser)).summarise(messages)


def stage_match(p: Pipeline) -> dict:
    """Mark which past summaries a later session revisits, for every user and cut."""
    cuts = range(len(p.config.data.cuts))
    rows = [(user_id, cut) for user_id in p.users for cut in cuts]
    jobs = [
        (p.histories[u][c].texts, sorted({s.summary for s in p.parts(u, c)[1]})) for u, c in rows
    ]
    settings, labels = p.config.roles, {user_id: [] for user_id in p.users}
    if settings.matcher == "rules":
        everyone = ([s.summary for s in u.sessions] for u in p.users.values())
        matcher = roles.RuleMatcher(p.encoder, roles.themes(everyone))
    else:
        from roles import prompted

        matcher = prompted.LLMMatcher(p.chat(settings.matcher), p.encoder)
    for (user_id, _), found in zip(rows, matcher.match(jobs), strict=True):  # (E, L) each
        labels[user_id].append(np.where((found > 0).any(1), 1, found.min(1, initial=0)).tolist())
    write_json(p.run / "match" / "revisited.json", labels)
    flat = np.array([x for own in labels.values() for cut in own for x in cut])
    known = flat[flat >= 0]
    return {
        "summaries": len(flat),
        "unknown": len(flat) - len(known),
        "revisited_share": float(known.mean()) if len(known) else 0.0,
    }


class Revisits:
    """Labels of `match`: which summaries of a (user, cut) row a later session revisited.

    1 revisited, 0 not, -1 unknown (the matcher's call failed): these are neither.
    """

    def __init__(self, p: Pipeline):
        self.labels = read_json(p.run / "match" / "revisited.json")
        self.cuts = range(len(p.config.data.cuts))

    def __getitem__(self, row: tuple[str, int]) -> np.ndarray:
        return np.array(self.labels[row[0]][row[1]], int)  # (N,)

    def rows(self, ids: list[str]) -> list[tuple[str, int]]:
        """(user, cut) rows with both a revisited and a never-revisited summary."""
        rows = [(user_id, cut) for user_id in ids for cut in self.cuts]
        return [row for row in rows if {0, 1} <= {*self[row].tolist()}]

    def auc(self, rows: list[tuple[str, int]], scores: list[np.ndarray]) -> float:
        """Mean over users of the AUC of "revisited later" (each user's cuts averaged first)."""
        by_user: dict[str, list[float]] = {}
        for row, s in zip(rows, scores, strict=True):
            known = self[row] >= 0
            auc = ib.per_user_auc(s[known], self[row][known])
            by_user.setdefault(row[0], []).append(auc)
        return float(np.mean([np.mean(v) for v in by_user.values()])) if by_user else float("nan")


def stage_rid(p: Pipeline) -> dict:
    """Train the resonance scorer (Eq. 3), fit the gate (Eq. 4), distil every user's interests."""
    revisits = Revisits(p)
    train, valid, unseen = (
        revisits.rows(p.ids(*s)) for s in (("train",), ("valid",), ("judge", "test"))
    )
    if not train or not valid:
        raise UserError(
            f"{p.users_file}: no user comes back to an earlier subject (checked {len(p.users)} "
            f"users, in four splits), so there is nothing to learn from; more users or longer "
            f"histories are needed"
        )
    score, valid_auc = fit_scorer(p, revisits, train, valid)
    activity = [p.histories[u][c].sessions_per_week for u, c in train]
    groups = p.config.rid.activity_groups
    edges = np.quantile(activity, np.arange(1, groups) / groups).tolist()
    thresholds = fit_gate(p, revisits, score, valid, edges)
    write_json(p.run / "rid" / "gate.json", {"edges": edges, "thresholds": thresholds})
    kept = distil_all(p, score, edges, thresholds)
    baselines = {"recency": ib.recency_scores, "frequency": ib.frequency_scores}
    return {
        "train_users": len({u for u, _ in train}),
        "valid_auc": valid_auc,
        "thresholds": thresholds,
        "kept_per_user": kept,
        "unseen_users": len({u for u, _ in unseen}),
        "auc": revisits.auc(unseen, score(unseen)) if unseen else float("nan"),
    } | {
        f"auc_{name}": revisits.auc(unseen, [rank(p.histories[u][c]).numpy() for u, c in unseen])
        for name, rank in baselines.items()
    }


def fit_scorer(p: Pipeline, revisits: Revisits, train, valid) -> tuple[Callable, float]:
    """Minimise Eq. (3); the epoch with the best AUC on held-out users stays.

    Returns (user, cut) rows -> s(u, h) of their summaries, and that AUC.
    """
    settings = p.config.rid
    torch.manual_seed(p.seed("rid"))
    scorer = new_scorer(p)
    optimiser = torch.optim.AdamW(scorer.parameters(), settings.learning_rate, weight_decay=0.01)
    trained, tuned, encode = [*scorer.towers], None, None
    if ENCODER_LEARNING_RATE:
        tuned, size = copy.deepcopy(p.encoder.model).eval(), p.config.encoder.batch_size
        encode = functools.partial(
            embed, tuned, batch_size=size, recompute=ENCODER_RECOMPUTE
        )
        weights = {"params": tuned.parameters(), "lr": ENCODER_LEARNING_RATE}
        optimiser.add_param_group(weights)
        trained.append(tuned)
    trained = torch.nn.ModuleList(trained)

    def score(rows: list[tuple[str, int]]) -> list[np.ndarray]:
        return p.resonance(scorer, rows, Encoder(model=tuned) if tuned else None)

    shuffle = random.Random(p.seed("rid", "order"))
    lottery = torch.Generator().manual_seed(p.seed("rid", "negatives"))
    text_id: dict[str, int] = {}
    cuts: dict[str, list[int]] = {}
    for user_id, cut in train:
        cuts.setdefault(user_id, []).append(cut)
    best, best_auc, waited = None, -1.0, 0
    for epoch in progress(range(settings.epochs), "rid"):
        # One cut per user and epoch: a user's own texts never serve as cross-user negatives.
        order = [(user_id, shuffle.choice(c)) for user_id, c in cuts.items()]
        shuffle.shuffle(order)
        scorer.train()
        losses = []
        for start in range(0, len(order), settings.batch_users):
            rows = order[start : start + settings.batch_users]
            batch = p.scorer_batch(rows, encode)
            label = torch.full(batch["mask"].shape, -1)
            ids = torch.full(label.shape, -1)
            for i, (user_id, cut) in enumerate(rows):
                texts = p.histories[user_id][cut].texts
                label[i, : len(texts)] = torch.from_numpy(revisits[user_id, cut])
                ids[i, : len(texts)] = torch.tensor(
                    [text_id.setdefault(t, len(text_id)) for t in texts]
                )
            loss = 0.0
            for tower in scorer.towers:
                user, sessions = tower(**batch)
                scores, counts = ib.contrastive_rows(
                    user, sessions, label == 1, label >= 0, ids, settings.negatives_within, lottery
                )
                loss = loss + ib.contrastive_loss(scores, settings.temperature, counts).mean()
            optimiser.zero_grad()
            loss.backward()  # Eq. (3), of every tower
            for part in trained:
                torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item() / len(scorer.towers))
        auc = revisits.auc(valid, score(valid))
        p.run.log("rid", epoch=epoch, loss=float(np.mean(losses)), valid_auc=auc)
        if auc > best_auc:
            best, best_auc, waited = {k: v.clone() for k, v in trained.state_dict().items()}, auc, 0
        else:
            waited += 1
            if waited > settings.patience:
                break
    trained.load_state_dict(best)
    write_tensors(p.run / "rid" / "scorer.safetensors", scorer.state_dict())
    if tuned:
        with atomic_path(p.run / "rid" / "encoder") as temporary:
            tuned.save(str(temporary))
    return score, best_auc


def fit_gate(p: Pipeline, revisits: Revisits, score, valid, edges) -> list[float]:
    """A threshold for each activity group, from held-out users."""
    scores = score(valid)
    groups = [
        np.full(len(s), ib.activity_group(p.histories[u][c].sessions_per_week, edges))
        for (u, c), s in zip(valid, scores, strict=True)
    ]
    labels = [revisits[row] for row in valid]
    score, label, group = map(np.concatenate, (scores, labels, groups))
    known = label >= 0
    fitted = ib.fit_thresholds(
        score[known], label[known], group[known], p.config.rid.activity_groups
    )
    return fitted.tolist()


def distil_all(p: Pipeline, score, edges, thresholds) -> float:
    """Write every user's trigger interests at every cut; return the mean number kept."""
    everyone = [(u, c) for u in p.users for c in range(len(p.shares)) if p.histories[u][c].texts]
    triggers = {u: [{"interests": [], "scores": []} for _ in p.shares] for u in p.users}
    for (user_id, cut), found in distil_rows(p, score, edges, thresholds, everyone).items():
        triggers[user_id][cut] = found
    write_json(p.run / "rid" / "triggers.json", triggers)
    return float(np.mean([len(cuts[-1]["interests"]) for cuts in triggers.values()]))


def distil_rows(p: Pipeline, score, edges, thresholds, rows) -> dict[tuple[str, int], dict]:
    """(user, cut) row -> its trigger interests, best first, and their scores (Eq. 4)."""
    settings, found = p.config.rid, {}
    for row, scores in zip(rows, score(rows), strict=True):
        history = p.histories[row[0]][row[1]]
        keep = ib.distil(
            scores,
            thresholds[ib.activity_group(history.sessions_per_week, edges)],
            settings.min_keep,
            settings.max_keep,
            history.embeddings,
            settings.duplicate_cosine,
        )
        found[row] = {
            "interests": [history.texts[j] for j in keep],
            "scores": [float(scores[j]) for j in keep],
        }
    return found


def new_scorer(p: Pipeline) -> ib.ResonanceScorer:
    r, features = p.config.rid, len(ib.FEATURE_NAMES)
    return ib.ResonanceScorer(r.towers, p.encoder.dim, features, r.text_dim, r.hidden, r.dropout)


def saved_scorer(p: Pipeline) -> ib.ResonanceScorer:
    scorer = new_scorer(p)
    scorer.load_state_dict(read_tensors(p.run / "rid" / "scorer.safetensors"))
    return scorer.eval()


def distil_latest(p: Pipeline) -> dict[str, list[str]]:
    """Trigger interests of p.users as they are now, by the scorer and gate that `rid` saved."""
    scorer, gate = saved_scorer(p), read_json(p.run / "rid" / "gate.json")
    last = len(p.shares) - 1
    rows = [(u, last) for u in p.users if p.histories[u][last].texts]
    found = distil_rows(
        p, lambda x: p.resonance(scorer, x), gate["edges"], gate["thresholds"], rows
    )
    return {u: row["interests"] for (u, _), row in found.items()}
