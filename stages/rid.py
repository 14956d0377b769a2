"""Stage `rid`: resonance-aware interest distillation. Which past interests are worth bringing up?

    python train.py --stage rid

Section 2.2 of the paper: train the resonance scorer (Eq. 2) with the contrastive loss (Eq. 3) on
what later sessions came back to (stage `match`), fit the activity-aware gate (Eq. 4) on held-out
users, and distil everybody's trigger interests.

Departures: several towers whose cosines are averaged, since one alone varies with its seed.
Thresholds maximise F_0.5 of "revisited" on held-out users, as the paper leaves open how they are
learned.

Legend: B rows, N summaries, D embedding, F statistics, H hidden.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

import icebreaker as ib
from config import RidConfig
from files import UserError, progress, read_json, read_tensors, write_json, write_tensors
from roles.players import Players
from roles.text import Encode, unfit
from run import Run
from stages.match import Revisits
from stages.steps import Best

Row = tuple[str, int]  # a user at a cut of the log


@dataclass(frozen=True)
class Distiller:
    """Histories in, trigger interests out: the trained scorer and the gate."""

    scorer: ib.ResonanceScorer
    edges: list[float]  # quantiles of activity between the gate's groups
    thresholds: list[float]  # tau of each group, Eq. (4)
    settings: RidConfig
    encode: Encode

    @classmethod
    def load(cls, run: Run) -> Distiller:
        """As stage `rid` saved it."""
        scorer, gate = new_scorer(run), read_json(run.folder / "rid" / "gate.json")
        scorer.load_state_dict(read_tensors(run.folder / "rid" / "scorer.safetensors"))
        return cls(scorer.eval(), gate["edges"], gate["thresholds"], run.config.rid, run.encoder)

    def scores(self, histories: list[ib.History], profiles: torch.Tensor) -> list[np.ndarray]:
        """s(u, h) (N,) of every summary of each history; profiles (B, D)."""
        return resonance(self.scorer, histories, profiles)

    def threshold(self, history: ib.History) -> float:
        """tau_g(u): the gate's line for a user of this activity."""
        return self.thresholds[ib.activity_group(history.sessions_per_week, self.edges)]

    def keep(self, history: ib.History, scores) -> list[int]:
        """Indices of the trigger interests T_u, best first, near-duplicates collapsed (Eq. 4)."""
        # Distress never becomes a game: neither generator nor templates hear of it.
        reasons = unfit(history.texts, self.encode, history.embeddings)
        fit = [i for i, reason in enumerate(reasons) if not reason]
        r = self.settings
        kept = ib.distil(
            [scores[i] for i in fit], self.threshold(history), r.min_keep, r.max_keep,
            history.embeddings[fit], r.duplicate_cosine,
        )
        return [fit[i] for i in kept]


def stage_rid(run: Run, players: Players, key: str) -> dict:
    """Train the resonance scorer (Eq. 3), fit the gate (Eq. 4), distil every user's interests."""
    revisits = Revisits(run)
    train, valid, unseen = (
        revisits.rows(run.ids(*splits)) for splits in (("train",), ("valid",), ("judge", "test"))
    )
    # Of unseen people no tower, no threshold and no early stop has learned.
    if not train or not valid:
        raise UserError(
            f"{run.users_file}: no user comes back to an earlier subject (checked {len(run.users)} "
            f"users, in four splits), so there is nothing to learn from; more users or longer "
            f"histories are needed"
        )
    scorer, valid_auc = fit_scorer(run, revisits, train, valid)
    activity = [run.histories[u][c].sessions_per_week for u, c in train]  # valid users set tau
    groups = run.config.rid.activity_groups
    # Equal shares of the training users fall into each group.
    edges = np.quantile(activity, np.arange(1, groups) / groups).tolist()
    thresholds = fit_gate(run, revisits, scorer, valid, edges)
    write_json(run.folder / "rid" / "gate.json", {"edges": edges, "thresholds": thresholds})
    distiller = Distiller(scorer, edges, thresholds, run.config.rid, run.encoder)
    kept_per_user = distil_everybody(run, distiller)
    baselines = {"recency": ib.recency_scores, "frequency": ib.frequency_scores}
    return {
        "train_users": len({u for u, _ in train}),
        "valid_auc": valid_auc,
        "thresholds": thresholds,
        "kept_per_user": kept_per_user,
        "unseen_users": len({u for u, _ in unseen}),
        "auc": revisits.auc(unseen, score_rows(run, scorer, unseen)) if unseen else float("nan"),
    } | {
        f"auc_{name}": revisits.auc(unseen, [rank(run.histories[u][c]).numpy() for u, c in unseen])
        for name, rank in baselines.items()
    }


def fit_scorer(run: Run, revisits: Revisits, train: list[Row], valid: list[Row]):
    """Minimise Eq. (3); the epoch with the best AUC on held-out users stays: (scorer, its AUC)."""
    settings = run.config.rid
    torch.manual_seed(run.seed("rid"))
    scorer = new_scorer(run)  # after the seed: its weights are drawn here
    optimiser = torch.optim.AdamW(scorer.parameters(), settings.learning_rate, weight_decay=0.01)
    shuffle = random.Random(run.seed("rid", "order"))
    lottery = torch.Generator().manual_seed(run.seed("rid", "negatives"))
    cuts, text_ids = defaultdict(list), defaultdict(itertools.count().__next__)
    for user_id, cut in train:
        cuts[user_id].append(cut)
    best = Best(scorer)
    for epoch in (bar := progress(range(settings.epochs), "rid")):
        # One cut per user and epoch: a user's own texts never serve as cross-user negatives.
        order = [(user_id, shuffle.choice(c)) for user_id, c in cuts.items()]
        shuffle.shuffle(order)
        scorer.train()
        losses = []
        for start in range(0, len(order), settings.batch_users):
            rows = order[start : start + settings.batch_users]
            inputs, labels, ids = training_batch(run, revisits, rows, text_ids)
            loss = 0.0  # a sum, as the towers share no weight
            for tower in scorer.towers:
                user, sessions = tower(**inputs)  # (B, H), (B, N, H)
                scores, counts = ib.contrastive_rows(
                    user, sessions, labels == 1, labels >= 0, ids,
                    settings.negatives_within, lottery,
                )
                rows_loss = ib.contrastive_loss(scores, settings.temperature, counts)  # (P,)
                loss = loss + rows_loss.mean()
            optimiser.zero_grad()
            loss.backward()  # Eq. (3), of every tower
            for tower in scorer.towers:  # they share nothing, so each has a norm of its own
                torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            optimiser.step()
            losses.append(loss.item() / len(scorer.towers))
        auc = revisits.auc(valid, score_rows(run, scorer, valid))
        run.folder.log("rid", epoch=epoch, loss=float(np.mean(losses)), valid_auc=auc)
        bar.set(loss=float(np.mean(losses)), auc=auc)
        best.offer(auc)
        # Early stopping: what is learned later is the training users by heart.
        if best.waited > settings.patience:
            break
    best.restore()
    write_tensors(run.folder / "rid" / "scorer.safetensors", scorer.state_dict())
    return scorer, best.value  # the AUC on valid users, of all towers together


def training_batch(run: Run, revisits: Revisits, rows: list[Row], text_ids: dict[str, int]):
    """Inputs of a tower, labels (B, N) of `match` (-1: none or pad), and a number for each text.

    Equal texts have equal numbers: what equals a positive is never a negative.
    """
    inputs = scorer_inputs(*histories_of(run, rows))
    labels = torch.full(inputs["mask"].shape, -1)  # (B, N)
    ids = torch.full(labels.shape, -1)  # (B, N)
    for i, (user_id, cut) in enumerate(rows):
        texts = run.histories[user_id][cut].texts
        labels[i, : len(texts)] = torch.from_numpy(revisits[user_id, cut])
        ids[i, : len(texts)] = torch.tensor([text_ids[text] for text in texts])
    return inputs, labels, ids


def fit_gate(run: Run, revisits: Revisits, scorer, valid: list[Row], edges) -> list[float]:
    """A threshold for each activity group, from held-out users (Eq. 4)."""
    # Train users' scores are too good: the scorer has seen what they came back to.
    scores = score_rows(run, scorer, valid)
    groups = [
        np.full(len(s), ib.activity_group(run.histories[u][c].sessions_per_week, edges))
        for (u, c), s in zip(valid, scores, strict=True)
    ]
    labels = [revisits[row] for row in valid]
    # One row a summary, (n,): a threshold is for scores of all users of a group.
    score, label, group = map(np.concatenate, (scores, labels, groups))
    answered = label >= 0  # a failed call is no evidence either way
    return ib.fit_thresholds(
        score[answered], label[answered], group[answered], run.config.rid.activity_groups
    ).tolist()


def distil_everybody(run: Run, distiller: Distiller) -> float:
    """Write every user's trigger interests at every cut; return the mean number kept."""
    rows = [(u, c) for u in run.users for c in range(len(run.shares)) if run.histories[u][c].texts]
    # Who has no history at a cut has no interests there, and takes the cold-start path.
    triggers = {u: [{"interests": [], "scores": []} for _ in run.shares] for u in run.users}
    for (user_id, cut), scores in zip(rows, score_rows(run, distiller.scorer, rows), strict=True):
        history = run.histories[user_id][cut]
        keep = distiller.keep(history, scores)
        triggers[user_id][cut] = {
            "interests": [history.texts[i] for i in keep],
            "scores": [float(scores[i]) for i in keep],
        }
    write_json(run.folder / "rid" / "triggers.json", triggers)
    return float(np.mean([len(cuts[-1]["interests"]) for cuts in triggers.values()]))


# --------------------------------------------------------------------------------------- the scorer


def new_scorer(run: Run) -> ib.ResonanceScorer:
    r, sizes = run.config.rid, (run.encoder.dim, len(ib.FEATURE_NAMES))  # D, F
    return ib.ResonanceScorer(r.towers, *sizes, r.text_dim, r.hidden, r.dropout)


def histories_of(run: Run, rows: list[Row]) -> tuple[list[ib.History], torch.Tensor]:
    """The histories of (user, cut) rows, and their profiles (B, D)."""
    histories = [run.histories[user_id][cut] for user_id, cut in rows]
    return histories, torch.stack([run.profiles[user_id] for user_id, _ in rows])


def score_rows(run: Run, scorer: ib.ResonanceScorer, rows: list[Row]) -> list[np.ndarray]:
    """s(u, h) of every summary of every (user, cut) row."""
    return resonance(scorer, *histories_of(run, rows)) if rows else []


@torch.no_grad()
def resonance(
    scorer: ib.ResonanceScorer, histories: list[ib.History], profiles: torch.Tensor
) -> list[np.ndarray]:
    """s(u, h) (N,) of every summary of each history; profiles (B, D)."""
    scorer.eval()
    scores = []
    for start in range(0, len(histories), 32):  # as many pads as a few long histories cause
        part = slice(start, start + 32)
        inputs = scorer_inputs(histories[part], profiles[part])
        s = scorer(**inputs)  # (B, N), Eq. (2)
        scores += [row[mask].numpy() for row, mask in zip(s, inputs["mask"], strict=True)]
    return scores


def scorer_inputs(histories: list[ib.History], profiles: torch.Tensor) -> dict[str, torch.Tensor]:
    """Padded inputs of ResonanceScorer and Tower; profiles (B, D)."""
    (b, d), n = profiles.shape, max(len(h.texts) for h in histories)
    inputs = {
        "embeddings": torch.zeros(b, n, d),  # (B, N, D)
        "statistics": torch.zeros(b, n, len(ib.FEATURE_NAMES)),  # (B, N, F)
        "mask": torch.zeros(b, n, dtype=torch.bool),
        "profile": profiles,
    }
    for i, h in enumerate(histories):
        m = len(h.texts)
        # Pads stay zero; the mask keeps them out of every sum and softmax.
        inputs["embeddings"][i, :m], inputs["statistics"][i, :m] = h.embeddings, h.statistics
        inputs["mask"][i, :m] = True  # (B, N)
    return inputs
