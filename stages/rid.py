"""Stage `rid`: resonance-aware interest distillation. Which past interests are worth bringing up?

    python train.py --stage rid

Section 2.2 of the paper: train the resonance scorer (Eq. 2) with the contrastive loss (Eq. 3) on
what later sessions came back to (stage `match`), fit the activity-aware gate (Eq. 4) on held-out
users, and distil everybody's trigger interests.

Departures: one tower a fold of the users, trained on the others; their cosines are averaged. Who
trained towers is scored by the one that has not seen them, as everybody else is by strangers. A
tower learns from boosted trees beside Eq. (3), since these rank better (rid.distillation). The
gate's scores are odds of a revisit with the user's own base rate, its thresholds maximise F_0.5 of
"revisited", as the paper leaves open how they are learned.

Legend: B rows, N summaries, D embedding, F statistics, H hidden.
"""

import dataclasses
import itertools
import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from torch.nn.utils.rnn import pad_sequence
from torch.optim.swa_utils import AveragedModel

import icebreaker as ib
from config import RidConfig
from files import UserError, digest, progress, read_json, write_json, write_tensors
from roles.players import Players
from roles.safety import unfit
from roles.text import Encode, key_phrases, named_interests
from run import Run
from stages.baselines import compare, statistics, trees_odds
from stages.match import Revisits, Row
from stages.steps import Best, load_weights, refuse_nan

TEXT_DIM = 8  # a text embedding is projected to this: revisits are told by statistics, not subjects
DROPOUT = 0.5
BATCH_USERS = 16  # of a step
AVERAGED = 50  # steps over which a tower's weights are averaged
LEAST_EPOCHS = 6  # before a tower may stop: an untrained one can be lucky on a few users


@dataclass(frozen=True)
class Distiller:
    """Histories in, trigger interests out: the trained scorer and the gate."""

    scorer: ib.ResonanceScorer
    folds: dict[str, int]  # user -> the tower that has not seen them; others are new to all
    odds: list[float]  # weights of ib.gate_inputs, and the intercept
    edges: list[float]  # quantiles of activity between the gate's groups
    thresholds: list[float]  # tau of each group, Eq. (4)
    settings: RidConfig
    encode: Encode

    @classmethod
    def load(cls, run: Run) -> "Distiller":
        """As stage `rid` saved it."""
        scorer, path = new_scorer(run), run.folder / "rid" / "gate.json"
        load_weights(scorer, run.folder / "rid" / "scorer.safetensors")
        gate = read_json(path, folds=dict, odds=list, edges=list, thresholds=list)
        if not {*gate["folds"].values()} <= {*range(run.config.rid.towers)}:
            raise UserError(f"{path}: folds of more towers than rid.towers; run stage rid again")
        numbers = (gate[name] for name in ("odds", "edges", "thresholds"))
        return cls(scorer, gate["folds"], *numbers, run.config.rid, run.encoder)

    def scores(self, histories: list[ib.History], profiles: torch.Tensor,
               users: list[str] = ()) -> list[np.ndarray]:
        """Chance (N,) that a later session revisits each summary, in the order of s(u, h).

        profiles (B, D); users: their ids, if they may be in the log that towers were trained on.
        """
        shares = tower_shares(self.folds, users, self.settings.towers) if users else None
        s = resonance(self.scorer, histories, profiles, shares)
        *weights, intercept = self.odds
        return [expit(ib.gate_inputs(row, history) @ weights + intercept)
                for row, history in zip(s, histories, strict=True)]

    def threshold(self, history: ib.History) -> float:
        """tau_g(u): the gate's line for a user of this activity."""
        return self.thresholds[ib.activity_group(history.sessions_per_week, self.edges)]

    def fit(self, history: ib.History) -> list[int]:
        """Indices of summaries that anybody may be reminded of."""
        # Distress never becomes a game: neither generator nor templates hear of it.
        reasons = unfit(history.texts, self.encode, history.embeddings)
        return [i for i, reason in enumerate(reasons) if not reason]

    def keep(self, history: ib.History, scores, fit: list[int] | None = None) -> list[int]:
        """Indices of the trigger interests T_u, best first, near-duplicates collapsed (Eq. 4).

        fit: as `fit` gives it, where it is at hand.
        """
        fit, r = self.fit(history) if fit is None else fit, self.settings
        texts = [history.texts[i] for i in fit]
        kept = ib.distil(
            [scores[i] for i in fit], self.threshold(history), r.min_keep, r.max_keep,
            history.embeddings[fit], r.duplicate_cosine, may_be_duplicates(texts))
        return [fit[i] for i in kept]

    def bounded(self, least: int, most: int) -> "Distiller":
        """The same gate with other bounds of how many are kept."""
        bounds = {"min_keep": least, "max_keep": most}
        return dataclasses.replace(self, settings=self.settings.model_copy(update=bounds))


def stage_rid(run: Run, players: Players, key: str) -> dict:
    """Train the resonance scorer (Eq. 3), fit the gate (Eq. 4), distil every user's interests."""
    revisits = Revisits(run)
    seen, unseen = (
        revisits.rows(run.ids(*splits)) for splits in (("train", "valid"), ("judge", "test")))
    # Of unseen people no tower, no threshold and no early stop has learned.
    users = sorted({u for u, _ in seen}, key=lambda u: digest(run.seed("folds"), u))
    if len(users) < 2:
        raise UserError(
            f"{run.users_file}: no user comes back to an earlier subject (checked {len(run.users)} "
            "users, in four splits), so there is nothing to learn from; more users or longer "
            "histories are needed")
    # In turn, so that no fold is empty where there are few users.
    folds = {user: i % run.config.rid.towers for i, user in enumerate(users)}
    scorer = fit_scorer(run, revisits, seen, folds)
    distiller = fit_gate(run, revisits, scorer, seen, folds, run.config.rid.activity_groups)
    write_json(run.folder / "rid" / "gate.json", {
        name: getattr(distiller, name) for name in ("folds", "odds", "edges", "thresholds")})
    kept_per_user = distil_everybody(run, distiller)
    gates = {"groups": distiller,
             # The same gate as if everybody were equally active.
             "one threshold": fit_gate(run, revisits, scorer, seen, folds, 1)}
    return {
        "train_users": len(users),
        "cross_fitted_auc": revisits.auc(seen, score_rows(run, distiller, seen)),
        "thresholds": distiller.thresholds, "kept_per_user": kept_per_user,
        "unseen_users": len({u for u, _ in unseen}),
    } | compare(run, revisits, seen, unseen, score_rows(run, distiller, unseen), gates)


def fit_scorer(run: Run, revisits: Revisits, seen: list[Row],
               folds: dict[str, int]) -> ib.ResonanceScorer:
    """Minimise Eq. (3), and the distance to trees fitted on the same people; of each tower the
    averaged weights with the least contrastive loss on its fold stay."""
    torch.manual_seed(run.seed("rid"))
    scorer = new_scorer(run)  # after the seed: its weights are drawn here
    # One shuffle and one numbering of texts for all towers.
    draws = random.Random(run.seed("rid", "order")), defaultdict(itertools.count().__next__)
    for number, tower in enumerate(scorer.towers):
        held_out = [row for row in seen if folds[row[0]] == number]
        rest = [row for row in seen if folds[row[0]] != number]
        train_tower(run, revisits, tower, f"tower {number + 1}", rest, held_out or rest, *draws)
    write_tensors(run.folder / "rid" / "scorer.safetensors", scorer.state_dict())
    return scorer.eval()


def train_tower(run: Run, revisits: Revisits, tower: ib.Tower, name: str, rest: list[Row],
                held_out: list[Row], shuffle: random.Random, text_ids: dict[str, int]) -> None:
    """Train one tower, in place, on the people of `rest`, stopped on those of `held_out`."""
    settings, cuts = run.config.rid, defaultdict(list)
    taught = trees_odds(run, revisits, rest)  # by trees as strange to the fold as the tower
    for user_id, cut in rest:
        cuts[user_id].append(cut)
    optimiser = torch.optim.AdamW(tower.parameters(), settings.learning_rate)
    # The mean of all steps at first, later of about the last AVERAGED.
    average = AveragedModel(
        tower, avg_fn=lambda mean, new, n: mean + (new - mean) / (n + 1).clamp(max=AVERAGED))
    best = Best(average)
    for epoch in (bar := progress(range(settings.epochs), f"rid {name}")):
        # One cut per user and epoch: their own texts never serve as cross-user negatives.
        order = [(user_id, shuffle.choice(c)) for user_id, c in cuts.items()]
        shuffle.shuffle(order)
        tower.train()
        losses = []
        for start in range(0, len(order), BATCH_USERS):
            rows = order[start : start + BATCH_USERS]
            inputs, *labels = training_batch(run, revisits, rows, text_ids)
            scores, loss = contrast(tower, inputs, *labels, settings, settings.cross_user)
            # Trees find what ranks in 72 noisy statistics; towers alone overfit to them.
            odds = pad_sequence([taught[row] for row in rows], batch_first=True)  # (B, N)
            distance = ib.distillation_loss(scores / settings.temperature, odds, inputs["mask"])
            loss = torch.lerp(loss.mean(), distance.mean(), settings.distillation)
            optimiser.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
            refuse_nan(norm, f"rid, {name}, epoch {epoch}, step {len(losses)}",
                       (user_id for user_id, _ in rows))
            optimiser.step()
            average.update_parameters(tower)
            losses.append(loss.item())
        held = held_out_loss(run, revisits, average.eval(), held_out, text_ids)
        run.folder.log("rid", tower=name, epoch=epoch, loss=float(np.mean(losses)),
                       held_out_loss=held)
        bar.set(loss=held)
        # Weights of the first epochs are still those they began with.
        if epoch + 1 >= min(LEAST_EPOCHS, settings.epochs):
            best.offer(-held)
        # Early stopping: what is learned later is the training users by heart.
        if best.waited > settings.patience:
            break
    best.restore()  # the average's, which the tower takes over
    tower.load_state_dict(average.module.state_dict())


def contrast(tower, inputs: dict, labels, ids, settings: RidConfig, cross_user: float):
    """Scores (B, N), Eq. (2), of each user's summaries; Eq. (3) of every (user, positive) (P,)."""
    user, sessions = tower(**inputs)  # (B, H), (B, N, H)
    scores, weights = ib.contrastive_rows(user, sessions, labels == 1, labels >= 0, ids, cross_user)
    loss = ib.contrastive_loss(scores, settings.temperature, weights)
    return (sessions @ user[..., None]).squeeze(-1), loss  # both vectors are unit: cosines


@torch.no_grad()
def held_out_loss(run: Run, revisits: Revisits, tower, rows: list[Row], text_ids) -> float:
    """Eq. (3) over all positives of left-out users, against their own other sessions."""
    losses = []
    for start in range(0, len(rows), 32):
        batch = training_batch(run, revisits, rows[start : start + 32], text_ids)
        losses.append(contrast(tower, *batch, run.config.rid, 0.0)[1])  # (P,)
    return torch.cat(losses).mean().item()


def training_batch(run: Run, revisits: Revisits, rows: list[Row], text_ids: dict[str, int]):
    """Inputs of a tower, labels (B, N) of `match` (-1: none or pad), and a number for each text.

    Equal texts have equal numbers: what equals a positive is never a negative.
    """
    histories, profiles = histories_of(run, rows)
    labels = [torch.from_numpy(revisits[row]) for row in rows]  # (N,) each
    ids = [torch.tensor([text_ids[text] for text in h.texts]) for h in histories]
    return scorer_inputs(histories, profiles), *(
        pad_sequence(values, batch_first=True, padding_value=-1) for values in (labels, ids))


# --------------------------------------------------------------------------------------- the gate


def fit_gate(run: Run, revisits: Revisits, scorer, seen: list[Row], folds: dict[str, int],
             groups: int) -> Distiller:
    """Odds of a revisit, and a threshold for each activity group (Eq. 4)."""
    histories, profiles = histories_of(run, seen)
    # By towers that have not seen them: a tower's own users have scores too good to be true.
    shares = tower_shares(folds, [u for u, _ in seen], len(scorer.towers))
    scores = resonance(scorer, histories, profiles, shares)
    # (n, 6): one row a summary.
    inputs = np.concatenate([*map(ib.gate_inputs, scores, histories)])
    labels = np.concatenate([revisits[row] for row in seen])
    answered = labels >= 0  # a failed call is no evidence either way
    fitted = LogisticRegression(max_iter=1000).fit(inputs[answered], labels[answered])
    # Equal shares of the rows fall into each group.
    activity = [history.sessions_per_week for history in histories]
    edges = np.quantile(activity, np.arange(1, groups) / groups).tolist()
    group = np.concatenate([
        np.full(len(h.texts), ib.activity_group(h.sessions_per_week, edges)) for h in histories])
    # Equal chances mean the same for all users, so one line can serve a group.
    chance = fitted.predict_proba(inputs)[:, 1]
    thresholds = ib.fit_thresholds(chance[answered], labels[answered], group[answered], groups)
    odds = [*fitted.coef_[0].tolist(), float(fitted.intercept_[0])]
    return Distiller(scorer, folds, odds, edges, thresholds.tolist(), run.config.rid, run.encoder)


def distil_everybody(run: Run, distiller: Distiller) -> float:
    """Write every user's trigger interests at every cut; return the mean number kept."""
    rows = [(u, c) for u in run.users for c in range(len(run.shares)) if run.histories[u][c].texts]
    # Who has no history at a cut has no interests there, and takes the cold-start path.
    triggers = {u: [{"interests": [], "scores": []} for _ in run.shares] for u in run.users}
    for (user_id, cut), scores in zip(rows, score_rows(run, distiller, rows), strict=True):
        history = run.histories[user_id][cut]
        keep = distiller.keep(history, scores)
        triggers[user_id][cut] = {"interests": [history.texts[i] for i in keep],
                                  "scores": [float(scores[i]) for i in keep]}
    write_json(run.folder / "rid" / "triggers.json", triggers)
    return float(np.mean([len(cuts[-1]["interests"]) for cuts in triggers.values()]))


# --------------------------------------------------------------- subjects, where cosines say little


def may_be_duplicates(texts: list[str]) -> Callable[[int, int], bool]:
    """(i, j) -> False where each has a subject and one of them does not name the other's: Georgian
    recipes are no Japanese ones, Rome's history is not Venice's."""

    def alike(i: int, j: int) -> bool:
        a, b = texts[i], texts[j]
        bare = not key_phrases(a) or not key_phrases(b)
        return bare or bool(named_interests(a, [b]) and named_interests(b, [a]))

    return alike


def best_of(history: ib.History, scores, n: int, duplicate_cosine: float) -> list[int]:
    """Indices of the n best by any scores, near-duplicates collapsed as the gate does."""
    # An infinite threshold: nothing passes the gate, and the least that it keeps is all.
    return ib.distil(scores, math.inf, n, n, history.embeddings, duplicate_cosine,
                     may_be_duplicates(history.texts))


# --------------------------------------------------------------------------------------- the scorer


def new_scorer(run: Run) -> ib.ResonanceScorer:
    r, sizes = run.config.rid, (run.encoder.dim, len(ib.FEATURE_NAMES) + 1)  # D, F + 1
    return ib.ResonanceScorer(r.towers, *sizes, TEXT_DIM, r.hidden, DROPOUT)


def histories_of(run: Run, rows: list[Row]) -> tuple[list[ib.History], torch.Tensor]:
    """The histories of (user, cut) rows, and their profiles (B, D)."""
    histories = [run.histories[user_id][cut] for user_id, cut in rows]
    return histories, torch.stack([run.profiles[user_id] for user_id, _ in rows])


def score_rows(run: Run, distiller: Distiller, rows: list[Row]) -> list[np.ndarray]:
    """Distiller.scores of every (user, cut) row, none by a tower that has seen the user."""
    return distiller.scores(*histories_of(run, rows), [u for u, _ in rows]) if rows else []


def tower_shares(folds: dict[str, int], users: list[str], towers: int) -> torch.Tensor:
    """Share of each tower in a user's score (B, towers): of all, or of the one that is left out."""
    shares = torch.full((len(users), towers), 1 / towers)
    for share, user in zip(shares, users, strict=True):
        if user in folds:
            share.zero_()[folds[user]] = 1.0
    return shares


@torch.no_grad()
def resonance(scorer: ib.ResonanceScorer, histories: list[ib.History], profiles: torch.Tensor,
              shares: torch.Tensor | None = None) -> list[np.ndarray]:
    """s(u, h) (N,) of every summary of each history; profiles (B, D), shares (B, towers)."""
    scorer.eval()
    scores = []
    for start in range(0, len(histories), 32):  # as many pads as a few long histories cause
        part = slice(start, start + 32)
        inputs = scorer_inputs(histories[part], profiles[part])
        s = scorer(**inputs, shares=None if shares is None else shares[part])  # (B, N), Eq. (2)
        scores += [row[mask].numpy() for row, mask in zip(s, inputs["mask"], strict=True)]
    return scores


def scorer_inputs(histories: list[ib.History], profiles: torch.Tensor) -> dict[str, torch.Tensor]:
    """Padded inputs of ResonanceScorer and Tower; profiles (B, D)."""
    lengths = torch.tensor([len(h.texts) for h in histories])  # (B,)
    # Pads are zero; the mask keeps them out of every sum and softmax.
    embeddings = pad_sequence([h.embeddings for h in histories], batch_first=True)  # (B, N, D)
    return {"embeddings": embeddings, "profile": profiles,
            "statistics": pad_sequence([*map(statistics, histories)], batch_first=True),
            "mask": torch.arange(embeddings.shape[1]) < lengths[:, None]}  # (B, N)
