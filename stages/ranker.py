"""Stage `ranker`: what do people tap? r_util(u, y) of Eq. (7), fitted on the lists that were shown.

    python train.py --stage ranker

Fitted twice: on train users for the generator to learn from, on judge users to judge it by. Targets
are soft (a tap counts for more if sessions follow), a logit for each slot absorbs the position.

Departure: the paper's log is of starters that a generator wrote, the simulated one of retrieved
ones, which say little about how a policy puts things. So the platform first shows its people lists
of the rule teacher, as a first version of the product would, and the ranker learns from both.

Legend: B rows, one per shown starter; M interests, K slots, D embedding.
"""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import data
import icebreaker as ib
import roles
from files import UserError, progress, write_tensors
from roles.players import Players, rule_lists
from run import Run, UserState
from stages import metrics
from stages.steps import Best, load_weights, refuse_nan
from world import people

LEARNING_RATE = 1e-3
SLOT_LEARNING_RATE = 0.02  # position explains most of a tap and must not wait for w
RANK = 32  # of the bilinear form of user and starter
PILOT = 8  # lists that the platform shows each person before there is a policy
SETTLED = 20_000  # rows from which averages over users are taken; rows held in memory at once
Shown = list[tuple[data.Impression, UserState]]  # lists, each with the user's state at its time


def stage_ranker(run: Run, players: Players, key: str) -> dict:
    """Fit r_util (Eq. 7) twice: on train users for the generator, on judge users to judge it."""
    if not run.impressions:
        return {"skipped": "no impressions (data.impressions), so no utility to learn"}
    # Three splits of users: who judges has never seen whom the generator learned from.
    splits = {name: run.ids(name) for name in ("train", "judge", "test")}
    lists = {name: shown_lists(run, ids) for name, ids in splits.items()}
    everybody = set().union(*splits.values())
    shown = sum(impression.user_id in everybody for impression in run.impressions)
    # Without a time, or shown before the first cut.
    left_out = shown - sum(map(len, lists.values()))
    if not run.config.data.users:
        show_pilot(run)
    lists = {name: shown + pilot_lists(run, name) for name, shown in lists.items()}
    return fit_rankers(run, lists, "ranker") | {"lists_left_out": left_out}


def show_pilot(run: Run) -> None:
    """Let the simulated platform show train and judge users PILOT lists of the rule teacher."""
    states = [run.states[u][-1] for u in run.ids("train", "judge")]
    told = [state for state in states if state.interests for _ in range(PILOT)]
    seeds, written = [run.seed("pilot", i) for i in range(len(told))], defaultdict(list)
    lists = rule_lists(roles.Rules(run.encoder), [state.interests for state in told],
                       run.config.generator.list_size, seeds)
    for state, starters in zip(told, lists, strict=True):
        if starters:
            written[state.user_id].append(starters)
    data.write_impressions(run.folder / "ranker" / "pilot.jsonl",
                           people.pilot(run.folder / "world", written, run.seed("pilot")))


def pilot_lists(run: Run, split: str) -> Shown:
    """What the pilot showed this split's users, each list with the user's state as of now; logs
    that were given have none."""
    if run.config.data.users:  # a file of an earlier, simulated run may lie here
        return []
    users, rows = {*run.ids(split)}, data.read_impressions(run.folder / "ranker" / "pilot.jsonl")
    return [(row, run.states[row.user_id][-1]) for row in rows if row.user_id in users]


def shown_lists(run: Run, user_ids: list[str]) -> Shown:
    """Impressions of these users, each with the user's state at the latest cut before it."""
    begins = {  # when each cut of a user was
        u: [data.cut_time(run.users[u], share) for share in run.config.data.cuts] for u in user_ids}
    pairs = []
    for impression in run.impressions:
        if impression.user_id in begins and impression.timestamp:
            times = begins[impression.user_id]
            past = [c for c, t in enumerate(times) if t and t <= impression.timestamp]
            if past:  # what was shown before the first cut has no state to go with it
                pairs.append((impression, run.states[impression.user_id][past[-1]]))
    return pairs


def fit_rankers(run: Run, lists: dict[str, Shown], folder: str) -> dict:
    """Rankers of the lists of "train" and of "judge" users, in the run's folder; the figures are of
    "test" users."""
    for name, shown in lists.items():
        if not shown:
            raise UserError(
                f"{run.impressions_file}: timestamp: no list of the {name} users was shown after "
                f"the first {run.config.data.cuts[0]:.0%} (data.cuts) of their sessions; a ranker "
                f"needs the times of lists and of sessions")
    (rows, states), figures = ranker_inputs(run, lists["test"]), {}  # no ranker learns from them
    for name in ("train", "judge"):
        tapped = [impression.user_id for impression, _ in lists[name] if impression.clicked]
        if len(tapped) < 10 or len(set(tapped)) < 2:
            raise UserError(
                f"{run.impressions_file}: clicked: fewer than 10 lists with a tap, or fewer than "
                f"two people's, among the {name} users; a ranker needs more logs")
        label = f"{folder}/{name}".removeprefix("ranker/")  # names the seed and lines of the log
        ranker = fit_ranker(run, lists[name], label, run.folder / folder / f"{name}.safetensors")
        with torch.no_grad():
            # Without slots it ranks; with them it says how often a shown starter is tapped.
            personal = features(ranker, rows, states)
            logits = ranker.logits(personal, rows["starters"])
            shown = torch.sigmoid(ranker.logits(personal, rows["starters"], rows["slots"]))
        clicked, slots = rows["clicked"].numpy(), rows["slots"].numpy()
        figures[name] = {
            "lists": len(lists[name]),
            "auc_slot_controlled": metrics.slot_controlled_auc(logits.numpy(), clicked, slots),
            "auc_in_lists": auc_in_lists(logits.numpy(), clicked, rows["list"].numpy()),
            "ece": metrics.expected_calibration_error(shown.numpy(), rows["targets"].numpy())}
    return figures


def auc_in_lists(logits: np.ndarray, clicked: np.ndarray, lists: np.ndarray) -> float:
    """Mean AUC within lists; nan where no list has both a tapped and an ignored starter."""
    ends = np.flatnonzero(np.diff(lists)) + 1  # rows of a list stand together
    parts = zip(np.split(logits, ends), np.split(clicked, ends), strict=True)
    values = [metrics.per_user_auc(scores, labels) for scores, labels in parts]
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")


def fit_ranker(run: Run, shown: Shown, label: str, path: Path) -> ib.UtilityRanker:
    """Soft-label cross-entropy with a per-slot logit; the best epoch on one user in seven stays."""
    settings = run.config.ranker
    users = sorted({impression.user_id for impression, _ in shown})
    held_out = {user_id for i, user_id in enumerate(users) if i % 7 == 0}  # whole users, no lists
    fit, stop = (
        ranker_inputs(run, [pair for pair in shown if (pair[0].user_id in held_out) == side])
        for side in (False, True))
    torch.manual_seed(run.seed("ranker", label))
    ranker = new_ranker(run)
    settle(ranker, *fit)
    with torch.no_grad():  # begin at the mean: taps are rare, and a bias of 0 would say one half
        ranker.common.bias.fill_(torch.logit(fit[0]["targets"].mean().clamp(0.001, 0.999)))
    fit, stop = (rows | {"features": features(ranker, rows, at)} for rows, at in (fit, stop))
    linear = [*ranker.common.parameters(), *ranker.personal.parameters()]
    optimiser = torch.optim.AdamW(
        [
            {"params": linear, "weight_decay": 0.05},  # D is large, taps few
            {"params": ranker.slot.parameters(), "lr": SLOT_LEARNING_RATE}],
        LEARNING_RATE,
        weight_decay=0.0)
    best = Best(ranker)
    for epoch in (bar := progress(range(settings.epochs), f"ranker {label}")):
        # The place of each row's list in a random order; whole lists make a batch.
        place, losses = torch.randperm(int(fit["list"].max()) + 1)[fit["list"]], []
        sizes = torch.bincount(place // settings.batch_impressions)  # rows of each batch
        for index in place.argsort(stable=True).split(sizes.tolist()):
            loss = fit_loss(ranker, {name: x[index] for name, x in fit.items()}, settings.in_list)
            optimiser.zero_grad()
            loss.backward()
            norm = torch.nn.utils.get_total_norm(
                [w.grad for w in ranker.parameters() if w.grad is not None])
            refuse_nan(norm, f"ranker, {label}, epoch {epoch}",
                       (f"list {i}" for i in fit["list"][index].unique().tolist()))
            optimiser.step()
            losses.append(loss.item())
        with torch.no_grad():
            stop_loss = fit_loss(ranker, stop, settings.in_list).item()
        run.folder.log(
            "ranker", ranker=label, epoch=epoch, loss=np.mean(losses), held_out_loss=stop_loss)
        bar.set(loss=stop_loss)
        best.offer(-stop_loss)
        if best.waited > settings.patience:
            break
    best.restore()
    write_tensors(path, ranker.state_dict())
    return ranker.eval()


def fit_loss(ranker: ib.UtilityRanker, rows: dict, in_list: float) -> torch.Tensor:
    """How often a starter is tapped, and which one of its list: mean over rows, and by target."""
    logits = ranker.logits(rows["features"], rows["starters"], rows["slots"])
    loss = ib.utility_loss(logits, rows["targets"])
    return loss + in_list * ib.in_list_loss(logits, rows["targets"], rows["list"])


def settle(ranker: ib.UtilityRanker, rows: dict, states: dict) -> None:
    """Fill the ranker's averages from at most SETTLED rows, each with some other row's user."""
    users, starters = (torch.randperm(len(rows["list"]))[:SETTLED] for _ in range(2))
    theirs = {name: values[rows["list"][users]] for name, values in states.items()}
    ranker.settle(**theirs, starters=rows["starters"][starters])


def features(ranker: ib.UtilityRanker, rows: dict, states: dict) -> torch.Tensor:
    """What is personal of every row (B, F)."""
    parts = torch.arange(len(rows["list"])).split(SETTLED)  # a state has M interests a row
    return torch.cat([
        ranker.features(**{name: x[rows["list"][part]] for name, x in states.items()},
                        starters=rows["starters"][part])
        for part in parts])


def ranker_inputs(run: Run, shown: Shown) -> tuple[dict, dict]:
    """(one row per shown starter: embedding, slot, click, target and the number of its list; the
    padded states of the lists)."""
    rows = [
        (y, slot, slot in impression.clicked, impression.sessions_after, i)
        for i, (impression, _) in enumerate(shown)
        for slot, y in enumerate(impression.starters)]
    starters, slots, clicked, after, numbers = zip(*rows, strict=True)
    clicks = torch.tensor(clicked, dtype=torch.float32)
    depth = torch.tensor([float("nan") if n is None else n for n in after])  # (B,), unknown: nan
    settings = run.config.ranker
    return {
        "starters": run.encoder(list(starters)),  # (B, D)
        "slots": torch.tensor(slots).clamp_max(run.config.generator.list_size - 1),
        "clicked": clicks,  # (B,) of 0 and 1
        "targets": ib.utility_target(clicks, depth, settings.click_share, settings.depth_cap),
        "list": torch.tensor(numbers),  # (B,), row of the padded states
    }, pad_states([state for _, state in shown])


# --------------------------------------------------------------------- the ranker as others use it


def new_ranker(run: Run) -> ib.UtilityRanker:
    return ib.UtilityRanker(run.encoder.dim, run.config.generator.list_size, RANK)


def load_ranker(run: Run, name: str, folder: str = "ranker") -> ib.UtilityRanker:
    """The fitted ranker "train" (for mining) or "judge" (for evaluation)."""
    ranker = new_ranker(run)  # shapes alone; every weight is read
    load_weights(ranker, run.folder / folder / f"{name}.safetensors")
    if name == "train":  # what judges goes by the whole utility
        ranker.share = run.config.ranker.personal
    return ranker


def judge_of(run: Run, name: str) -> Callable[[str, list[str]], np.ndarray]:
    """(user, starters) -> utilities (K,) as of now, by the ranker "judge" or "train"."""
    ranker = load_ranker(run, name)  # "judge" was fitted on other users than the generator's
    return lambda u, y: utilities(ranker, run.states[u][-1], run.encoder(y)).numpy()


def pad_states(states: list[UserState]) -> dict[str, torch.Tensor]:
    """Inputs of UtilityRanker: interests (B, M, D), their mask (B, M), tastes (B, D + 1)."""
    one = torch.zeros(1, states[0].embeddings.shape[1])  # a pad where nobody has any: M is above 0
    interests = pad_sequence([*(s.embeddings for s in states), one], batch_first=True)[:-1]
    lengths = torch.tensor([len(s.interests) for s in states])  # (B,)
    return {"interests": interests, "mask": torch.arange(interests.shape[1]) < lengths[:, None],
            "taste": torch.stack([s.taste for s in states])}


@torch.no_grad()
def utilities(ranker: ib.UtilityRanker, state: UserState, starters: torch.Tensor) -> torch.Tensor:
    """r_util(u, y) in (0, 1) of starters (N, D) for one user -> (N,)."""
    # One user, N starters: the state is repeated by a view.
    inputs = {k: v.expand(len(starters), *v.shape[1:]) for k, v in pad_states([state]).items()}
    return torch.sigmoid(ranker(**inputs, starters=starters))
