"""IceBreaker: the paper's algorithms, to be read beside it. Pure functions of tensors.

Resonance-aware interest distillation (RID, section 2.2): history statistics, resonance scorer
(Eq. 2), contrastive loss (Eq. 3), activity-aware gate (Eq. 4). Starter generation (ISG, 2.3):
utility ranker (Eq. 7), list search (Algorithm 1), preference mining (Eq. 8), DPO loss (Eq. 6).
The loops that train these stand in stages/; `python train.py` runs them all.

Departures from the paper: E_h sees statistics of a session within its user's history beside the
text (on a real search log text alone ranks worse than plain frequency); the retrieval over "large
summary pools" is a dense product here. docs/departures.md lists all.

Legend: B users, N summaries or candidates, M interests or lists, K list slots, P pairs,
D embedding, F statistics, H hidden.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from sklearn.isotonic import isotonic_regression
from torch import Tensor, nn

from files import cache_texts

# ------------------------------------------------------------------------- history and statistics


@dataclass(frozen=True)
class History:
    """One user's summaries before a cut; exact repeats collapsed to the latest one."""

    texts: list[str]  # (N,), by last occurrence, oldest first
    embeddings: Tensor  # (N, D), unit rows
    statistics: Tensor  # (N, F), see FEATURE_NAMES
    days_ago: Tensor  # (N,), days between the last occurrence and the cut
    num_sessions: int
    sessions_per_week: float


# What makes a session similar to a text: a cosine of MiniLM (0.4 is a common field, 0.6 a common
# subject), or the share of the text's words, rare ones weighing more, that the session has too.
_SIMILAR = ("cosine_0.6", "words_0.5", "words_0.9")
_HALF_LIVES = (3, 14, 45)  # days: this week, this fortnight, this season
_RAW = (
    ["soft_0.4", *(f"soft_0.4_half_life_{h}" for h in _HALF_LIVES)]
    + [
        f"{kind}_{name}"
        for kind in _SIMILAR
        for name in ["count", *(f"half_life_{h}" for h in _HALF_LIVES), "half_life_5_sessions",
                     "latest", "gap", "span"]]
    + ["age", "token_frequency", "density_0.5", "density_0.7", "density_0.85", "repeats",
       "sessions_since"]
)
FEATURE_NAMES = _RAW + [f"rank_{name}" for name in _RAW] + ["history_length"]


def make_history(summaries: Sequence[str], days_ago: Sequence[float] | None,
                 encode: Callable[[list[str]], Tensor]) -> History:
    """Collapse repeats, embed the distinct texts and compute their statistics.

    summaries: in time order; days_ago: days before the cut, or None where times are missing.
    """
    n = len(summaries)
    # Without times a day a session: order is known, and half-lives need some unit.
    days = torch.tensor(list(days_ago or range(n, 0, -1)), dtype=torch.float32)  # (S,)
    days = days.clamp_min(0)
    last = {text: i for i, text in enumerate(summaries)}
    texts = sorted(last, key=last.get)
    number = {text: i for i, text in enumerate(texts)}
    of = torch.tensor([number[t] for t in summaries], dtype=torch.long)  # session -> distinct text
    embeddings = encode(texts)
    weeks = max(1.0, float(days.max() - days.min()) / 7) if n else 1.0
    statistics = history_statistics(texts, embeddings, of, days)
    latest = torch.tensor([last[t] for t in texts], dtype=torch.long)
    return History(texts, embeddings, statistics, days[latest], n, n / weeks)


def history_statistics(texts: list[str], embeddings: Tensor, of: Tensor,
                       days_ago: Tensor) -> Tensor:
    """Statistics of each distinct text within its user's history, from the past only.

    embeddings (N, D) of distinct texts; of (S,): the text of every session; days_ago (S,).
    Returns (N, F), each of order 1, in the order of FEATURE_NAMES.
    """
    n, num_sessions = len(texts), len(of)
    if n == 0:
        return torch.zeros(0, len(FEATURE_NAMES))
    cosine = (embeddings @ embeddings.T)[:, of]  # (N, S): text against every session, repeats too
    shared, frequency = _shared_words(texts, of)  # (N, S), (N,)
    # Recency in sessions, beside days: people differ in how often they come.
    since = torch.arange(num_sessions - 1, -1, -1, dtype=torch.float32)  # (S,) sessions after it
    decays = [0.5 ** (days_ago / half_life) for half_life in _HALF_LIVES]  # (S,) each
    soft = torch.sigmoid((cosine - 0.4) * 20)
    columns = [(soft * weight).sum(1).log1p() for weight in (torch.ones_like(since), *decays)]
    # Near the line a cosine counts in part; the share of words takes few values.
    similar = (torch.sigmoid((cosine - 0.6) * 20), (shared >= 0.5).float(), (shared >= 0.9).float())
    for weights in similar:
        columns += [(weights * w).sum(1).log1p()
                    for w in (torch.ones_like(since), *decays, 0.5 ** (since / 5))]
        columns += _spacing(weights > 0.5, days_ago)
    same = of == torch.arange(n)[:, None]  # (N, S): sessions with exactly this text
    columns += [torch.where(same, days_ago, torch.inf).amin(1).log1p(), frequency]
    columns += [(cosine > c).float().mean(1) for c in (0.5, 0.7, 0.85)]
    columns += [same.sum(1).float().log1p(), torch.where(same, since, torch.inf).amin(1).log1p()]
    raw = torch.stack(columns, 1)  # (N, F')
    below = (raw[None] < raw[:, None]).float().sum(1)
    below = below + 0.5 * (raw[None] == raw[:, None]).float().sum(1)
    length = torch.full((n, 1), math.log1p(num_sessions) / 5)
    return torch.cat([raw / 3, below / n - 0.5, length], 1)


def _spacing(similar: Tensor, days_ago: Tensor) -> list[Tensor]:
    """Log days (N,) from the latest similar session to the cut, to the one before, to the first."""
    latest = torch.where(similar, days_ago, torch.inf).amin(1)
    latest = torch.where(latest.isinf(), days_ago.max() + 1, latest)  # an embedding of zeros
    earlier = similar & (days_ago > latest[:, None])
    gap = torch.where(earlier, days_ago, torch.inf).amin(1) - latest
    # A text without an earlier similar session has no gap: the longest one there is stands in.
    gap = torch.where(gap.isinf(), days_ago.max() + 1, gap)
    span = torch.where(similar, days_ago, 0).amax(1) - latest
    return [latest.log1p(), gap.log1p(), span.clamp_min(0).log1p()]


@cache_texts(100_000)
def content_words(text: str) -> frozenset[str]:
    """Words without case, punctuation and stop words; of Chinese its pairs of characters."""
    text, words = text.casefold(), set()
    for run in re.findall("[\u3400-\u9fff]{2,}", text):  # no spaces tell where a word ends
        words |= {run[i : i + 2] for i in range(len(run) - 1)}
    words |= {*re.findall(r"[^\W_]+(?:[-'.][^\W_]+)*[+#]*", re.sub("[\u3400-\u9fff]+", " ", text))}
    return frozenset(words - ENGLISH_STOP_WORDS or words or {text})


def _shared_words(texts: list[str], of: Tensor) -> tuple[Tensor, Tensor]:
    """(share of each text's words that each session has (N, S), token frequency (N,)).

    Words count by log(1 + S / sessions of the user with it); the frequency of a text is the
    weighted mean of its words' log counts.
    """
    number: dict[str, int] = defaultdict(itertools.count().__next__)
    places = [(i, number[w]) for i, text in enumerate(texts) for w in sorted(content_words(text))]
    has = torch.zeros(len(texts), len(number))  # (N, V)
    has[tuple(torch.tensor(places).T)] = 1
    count = has[of].sum(0)  # (V,): sessions with the word
    weighted = has * (1 + len(of) / count).log()  # (N, V)
    total = weighted.sum(1, keepdim=True)
    share = (weighted @ has.T) / total  # (N, N)
    return share[:, of], (weighted @ count.log1p()) / total.squeeze(1)


def frequency_scores(history: History) -> Tensor:
    """Baseline of every RID figure: token frequency (N,)."""
    return history.statistics[:, FEATURE_NAMES.index("token_frequency")]


def recency_scores(history: History) -> Tensor:
    """Baseline of every RID figure: the latest first (N,)."""
    return -history.days_ago


# --------------------------------------------------------------------------- RID: scorer and loss


class Tower(nn.Module):
    """E_u and E_h of Eq. (2).

    E_h: projected text beside history statistics. E_u: attention pooling of the same inputs, joined
    by the profile's embedding (zeros where there is none).
    """

    def __init__(self, embed_dim: int, num_stats: int, text_dim: int, hidden: int, dropout: float):
        super().__init__()
        self.text = nn.Sequential(nn.Linear(embed_dim, text_dim), nn.Dropout(dropout))
        self.norm = nn.LayerNorm(num_stats)
        width = text_dim + num_stats
        self.session = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout / 2),
                                     nn.Linear(hidden, hidden))
        self.element = nn.Sequential(nn.Linear(width, hidden), nn.GELU())
        self.attention = nn.Linear(hidden, 1)
        self.profile = nn.Linear(embed_dim, hidden, bias=False)
        self.user = nn.Sequential(nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, embeddings: Tensor, statistics: Tensor, mask: Tensor,
                profile: Tensor) -> tuple[Tensor, Tensor]:
        """embeddings (B, N, D), statistics (B, N, F), mask (B, N), profile (B, D) ->
        unit user vectors (B, H), unit session vectors (B, N, H)."""
        x = torch.cat([self.text(embeddings), self.norm(statistics)], -1)  # (B, N, text + F)
        sessions = F.normalize(self.session(x), dim=-1)  # (B, N, H)
        element = self.element(x)
        # Pads have no weight; a user without any session gets zeros.
        weight = self.attention(element).squeeze(-1).masked_fill(~mask, -1e4).softmax(-1) * mask
        pooled = (weight[..., None] * element).sum(1)  # (B, H)
        user = F.normalize(self.user(pooled + self.profile(profile)), dim=-1)
        return user, sessions


class ResonanceScorer(nn.Module):
    """s(u, h) = cos(E_u(H_u, p_u), E_h(h)), Eq. (2), of several towers, one a fold of the users.

    The mean of their cosines is the cosine of their unit vectors joined.
    """

    def __init__(self, towers: int, *sizes):
        super().__init__()
        self.towers = nn.ModuleList(Tower(*sizes) for _ in range(towers))

    def forward(self, embeddings: Tensor, statistics: Tensor, mask: Tensor, profile: Tensor,
                shares: Tensor | None = None) -> Tensor:
        """Inputs as of Tower -> scores (B, N); shares (B, towers) of each in a row's score."""
        pairs = [tower(embeddings, statistics, mask, profile) for tower in self.towers]
        cosines = [(sessions @ user[..., None]).squeeze(-1) for user, sessions in pairs]
        cosines = torch.stack(cosines, -1)  # (B, N, towers), Eq. (2)
        return cosines.mean(-1) if shares is None else (cosines * shares[:, None]).sum(-1)


def contrastive_rows(user: Tensor, sessions: Tensor, positive: Tensor, mask: Tensor,
                     text_ids: Tensor, cross_user: float = 1.0) -> tuple[Tensor, Tensor]:
    """One row per (user, positive): the positive, within-user and cross-user negatives.

    user (B, H), sessions (B, N, H), positive and mask (B, N) bool, text_ids (B, N).
    Returns scores and weights, (P, 1 + B N) each, for `contrastive_loss`: 1 of the positive and of
    within-user negatives, cross_user of the others' sessions, 0 of what is no negative: another
    positive of the user, a text equal to one, a pad.
    """
    b, n, h = sessions.shape
    wanted = positive & mask
    owner, place = wanted.nonzero(as_tuple=True)  # (P,), (P,)
    scores = user @ sessions.reshape(b * n, h).T  # (B, B * N): each user against all sessions
    ids, real = text_ids.reshape(-1), mask.reshape(-1)
    forbidden = torch.stack([torch.isin(ids, text_ids[i][wanted[i]]) for i in range(b)])
    within = torch.arange(b * n)[None] // n == torch.arange(b)[:, None]  # (B, B * N): of the user
    # Unstated: how the two kinds are weighed. There are a hundred times as many sessions of others,
    # and alone they teach whose text it is.
    weight = torch.where(within, 1.0, cross_user) * (real[None] & ~forbidden)
    positives = scores[owner, owner * n + place]  # (P,), column 0 of the rows
    rows = torch.cat([positives[:, None], scores[owner]], 1)  # (P, 1 + B * N)
    return rows, torch.cat([torch.ones(len(owner), 1), weight[owner]], 1)


def contrastive_loss(scores: Tensor, temperature: float, mask: Tensor | None = None) -> Tensor:
    """Eq. (3). scores (B, 1 + N), column 0 the positive; mask True = counts -> loss (B,).

    A mask of numbers weighs: one of 0.01 counts as a hundredth of a negative. The same as
    sentence-transformers' MultipleNegativesRankingLoss with scale = 1 / temperature.
    """
    logits = _float(scores) / temperature  # (B, 1 + N)
    if mask is not None:
        weight = mask.to(logits)  # a copy; True is 1, False is 0, whose log is -inf
        weight = torch.cat([torch.ones_like(weight[:, :1]), weight[:, 1:]], 1)
        logits = torch.where(weight > 0, logits + weight.log(), -torch.inf)
    return torch.logsumexp(logits, 1) - logits[:, 0]  # Eq. (3)


def distillation_loss(scores: Tensor, taught: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of the softmax over each row's N items (Hinton et al. 2015): (B,).

    scores and taught (B, N): logits of student and teacher; mask (B, N) bool, True = counts.
    """
    student, teacher = (_float(x).masked_fill(~mask, -1e4).log_softmax(1)
                        for x in (scores, taught))
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)


# ------------------------------------------------------------------------------------- RID: gate


def gate_inputs(scores, history: History) -> np.ndarray:
    """What tells the odds of a revisit (N, 6): s(u, h), and the user's own base rate.

    Eq. (3) compares within a user alone, so that equal scores of two users may mean different
    odds. A linear function of these keeps the order within a user.
    """
    n, shared = len(history.texts), FEATURE_NAMES.index("words_0.5_count")
    twice = (history.statistics[:, shared] * 3).expm1() > 1.5  # half the words came up once more
    last = math.log1p(float(history.days_ago.min())) if n else 0.0
    user = [np.mean(scores) if n else 0.0, math.log1p(n), math.log1p(history.sessions_per_week),
            last, float(twice.float().mean()) if n else 0.0]
    return np.column_stack([np.asarray(scores, float), np.tile(user, (n, 1))])


def activity_group(sessions_per_week: float, edges: Sequence[float]) -> int:
    """g(u): how many quantile edges the user's activity lies above."""
    return sum(sessions_per_week > edge for edge in edges)


def fit_thresholds(scores, revisited, groups, num_groups: int) -> np.ndarray:
    """Thresholds tau_g (num_groups,) with the best F_0.5 of "revisited", non-decreasing in group.

    scores, revisited, groups: (n,). Unstated: how the paper learns them. Isotonic regression,
    weighted by group size; a group without rows takes its neighbour's.
    """
    scores, revisited = np.asarray(scores, float), np.asarray(revisited, bool)
    groups = np.asarray(groups)
    if not len(scores):
        raise ValueError("fit_thresholds: no scores")
    best, weight = np.full(num_groups, np.nan), np.zeros(num_groups)
    for g in range(num_groups):
        s, r = scores[groups == g], revisited[groups == g]
        if not len(s):
            continue
        order = np.argsort(-s, kind="stable")
        s, hits = s[order], np.cumsum(r[order])
        kept = np.arange(1, len(s) + 1)
        f_half = 1.25 * hits / (kept + 0.25 * max(1, r.sum()))  # F_beta with beta = 0.5
        f_half[:-1][s[:-1] == s[1:]] = -1  # equal scores pass or fall together
        best[g], weight[g] = s[np.argmax(f_half)], len(s)
    filled = np.flatnonzero(weight)  # groups with rows
    best = best[filled[np.abs(filled[None] - np.arange(num_groups)[:, None]).argmin(1)]]
    return isotonic_regression(best, sample_weight=np.maximum(weight, 1e-9))


def gate(scores, threshold: float, min_keep: int, max_keep: int) -> list[int]:
    """T_u = {h : s(u, h) >= tau_g(u)}, Eq. (4): indices, best first; min_keep to max_keep."""
    scores = np.asarray(scores)
    order = np.argsort(-scores, kind="stable")  # stable: ties keep the order of time
    passed = int((scores >= threshold).sum())  # Eq. (4)
    return order[: min(max(passed, min_keep), max_keep)].tolist()


def distil(scores, threshold: float, min_keep: int, max_keep: int, embeddings: Tensor,
           duplicate_cosine: float,
           alike: Callable[[int, int], bool] = lambda i, j: True) -> list[int]:
    """The gate, with near-duplicates collapsed to the latest (the highest index), best first.

    alike: whether two that are as near as that may be duplicates. What an encoder cannot read is
    near everything: to MiniLM all Chinese names are unknown words, and equal.
    """
    cosine = embeddings @ embeddings.T  # (N, N)
    passed = set(gate(scores, threshold, 0, len(scores)))
    groups: list[list[int]] = []
    for i in gate(scores, threshold, len(scores), len(scores)):
        twin = next((g for g in groups if cosine[i, g[0]] > duplicate_cosine
                     and alike(i, g[0])), None)
        if twin:
            twin.append(i)
        elif len(groups) < max_keep and (i in passed or len(groups) < min_keep):
            groups.append([i])
    return [max(group) for group in groups]


# ---------------------------------------------------------------------------------- utility ranker


def tap_taste(starters: Tensor, surprise: Tensor) -> Tensor:
    """What a user's earlier taps say of the user: (D + 1,), zeros where nothing was shown.

    starters (N, D) shown so far; surprise (N,): tapped (1 or 0) minus the mean tap rate of its
    slot. Starters weighted by surprise are one gradient step of a personal w, from zero; the last
    element is the user's own tap rate. 10 = shrinkage, in shown starters.
    """
    # (D + 1,)
    total = torch.cat([surprise @ starters, surprise.sum()[None]])
    return total / math.sqrt(10 + len(surprise))


FEATURES = 11  # personal ones of UtilityRanker, beside its bilinear form


class UtilityRanker(nn.Module):
    """r_util(u, y) = sigmoid(w . f(u, y)), Eq. (7), as logits: linear in f, as it is written.

    f: the starter; and what is personal, less its mean over users, so that what everybody likes is
    in the first part alone. Personal are the starter's cosines with the trigger interests, the
    taste (tap_taste) against the starter, and both again in a whitened space of `rank` dimensions,
    where what a text is about weighs as much as how it is put; there also dimension by dimension, a
    bilinear form of low rank. A logit per slot absorbs the position bias of logs; without slots it
    is left out. Departure: the paper's f is a text encoder; how the user enters it is unstated. E_u
    of RID is not in it (untried), nor are low-rank forms whose two sides are learned.
    """

    # Of what is personal in the logits: 1/2 as in Eq. (7); 1 is utility less its mean over users,
    # 0 that mean alone.
    share = 0.5

    def __init__(self, embed_dim: int, num_slots: int, rank: int):
        super().__init__()
        count = FEATURES + 2 * rank  # see `features`
        self.common = nn.Linear(embed_dim, 1)  # g(y)
        self.personal = nn.Linear(count, 1, bias=False)  # p(u, y)
        self.slot = nn.Embedding(num_slots, 1)
        for part in (self.common, self.personal, self.slot):
            nn.init.zeros_(part.weight)
        for name, shape in {"mean": (embed_dim,), "basis": (embed_dim, rank), "scale": (count,),
                            "usual": (embed_dim + 1, count)}.items():  # `settle` fills them
            self.register_buffer(name, torch.zeros(shape))

    @torch.no_grad()
    def settle(self, interests: Tensor, mask: Tensor, taste: Tensor, starters: Tensor) -> None:
        """The whitened space of these starters, and the mean over users of what is personal.

        Inputs as of `forward`: pairs of a user and a starter drawn independently. A log shows
        people what is near: its mean of a starter is that of users who like it.
        """
        self.mean.copy_(starters.mean(0))
        variance, axes = torch.linalg.eigh((starters - self.mean).T.cov(correction=0))
        rank = min(self.basis.shape[1], int((variance > 1e-6 * variance[-1]).sum()))  # few starters
        whitening = (axes / variance.clamp_min(1e-12).sqrt())[:, len(variance) - rank :]  # (D, R')
        self.basis.copy_(F.pad(whitening, (0, self.basis.shape[1] - rank)))
        features = self.features(interests, mask, taste, starters)  # (N, F)
        one = F.pad(starters, (0, 1), value=1.0)  # (N, D + 1)
        ridge = 10 * torch.eye(one.shape[1])  # a starter stands for ten users in its mean
        self.usual.copy_(torch.linalg.solve(one.T @ one + ridge, one.T @ features))
        self.scale.copy_((features - one @ self.usual).std(0))
        # Together the bilinear form's columns weigh as much as one other: some hundred users cannot
        # tell so many weights apart.
        self.scale[FEATURES:] *= self.basis.shape[1] ** 0.5

    def features(self, interests: Tensor, mask: Tensor, taste: Tensor, starters: Tensor) -> Tensor:
        """What is personal of users and starters, as of `forward`: (B, F)."""
        columns = _nearness(interests, mask, starters, (0.3, 0.45, 0.6))
        columns += [(taste[:, :-1] * starters).sum(1), taste[:, -1]]
        white = F.normalize((starters - self.mean) @ self.basis, dim=-1)  # (B, R)
        theirs = F.normalize((interests - self.mean) @ self.basis, dim=-1)  # (B, M, R)
        # Of sum s (y - mean), with the surprise s of each shown starter y.
        tasted = (taste[:, :-1] - taste[:, -1:] * self.mean) @ self.basis  # (B, R)
        columns += _nearness(theirs, mask, white, (0.2, 0.35, 0.5))
        columns += [(tasted * white).sum(1)]
        usual = (theirs * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return torch.cat([torch.stack(columns, 1), usual * white, tasted * white], 1)

    def forward(self, interests: Tensor, mask: Tensor, taste: Tensor, starters: Tensor,
                slots: Tensor | None = None) -> Tensor:
        """interests (B, M, D) and mask (B, M), taste (B, D + 1), starters (B, D), slots (B,)
        -> logits (B,)."""
        return self.logits(self.features(interests, mask, taste, starters), starters, slots)

    def logits(self, features: Tensor, starters: Tensor, slots: Tensor | None = None) -> Tensor:
        """Of `features` (B, F), which training computes once -> (B,)."""
        usual = F.pad(starters, (0, 1), value=1.0) @ self.usual  # (B, F): of anybody
        personal = (features - usual) / self.scale.clamp_min(1e-3)
        # Elements of a unit vector are small: 8 brings them to the scale of the rest.
        common = F.linear(8 * starters, self.common.weight).squeeze(1)
        parts = (1 - self.share) * common + self.share * self.personal(personal).squeeze(1)
        logits = 2 * parts + self.common.bias  # Eq. (7)
        return logits if slots is None else logits + self.slot(slots).squeeze(1)


def _nearness(interests: Tensor, mask: Tensor, starters: Tensor, lines: Sequence[float]) -> list:
    """The nearest interest's cosine, and how many lie above each line, softly: (B,) each."""
    cosine = (interests @ starters[..., None]).squeeze(-1).masked_fill(~mask, -1.0)  # (B, M)
    near = [torch.sigmoid((cosine - line) * 20).sum(1) for line in lines]
    return [cosine.amax(1).clamp_min(0), *near]


def utility_target(clicked: Tensor, sessions_after: Tensor, click_share: float,
                   depth_cap: int) -> Tensor:
    """Target (n,) in [0, 1]: click x (a + (1 - a) min(sessions_after, D) / D).

    sessions_after nan = unknown. Unstated: such a click counts as one of middling depth, so that
    missing logs do not read as shallow ones.
    """
    depth = (sessions_after.clamp(0, depth_cap) / depth_cap).nan_to_num(0.5)
    return clicked * (click_share + (1 - click_share) * depth)


def utility_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Soft-label cross-entropy, mean over rows."""
    return F.binary_cross_entropy_with_logits(logits, targets)


def in_list_loss(logits: Tensor, targets: Tensor, lists: Tensor) -> Tensor:
    """-log of a tapped starter's share of its list's exp(logits), mean by target; a scalar.

    logits, targets, lists (the number of each row's list): (B,). Its negatives are the starters
    that the same user saw beside it: how often a user taps at all adds nothing.
    """
    _, place = lists.unique(return_inverse=True)
    logits = logits.float() - logits.detach().max()
    total = logits.new_zeros(len(lists)).index_add(0, place, logits.exp()).clamp_min(1e-30)
    return -(targets * (logits - total.log()[place])).sum() / targets.sum().clamp_min(1e-6)


# --------------------------------------------------------------------- list search, mining, DPO


def list_search(utility: Tensor, similarity: Tensor, list_size: int, beam: int, expand: int,
                weight: float, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Algorithm 1: grow `beam` lists slot by slot by utility and marginal diversity.

    utility (B, N), similarity (B, N, N) cosines, weight = lambda, valid (B, N) bool.
    V' = V + lambda r_util(y) + (1 - lambda) r_div(y | Y), r_div = 1 - mean cos(y, Y), 0 for the
    first. Beams that are the same set count once, with their highest value.
    Returns lists (B, beam, K) int64 and values (B, beam), best first; where fewer distinct lists
    exist the rest is -1 and -inf. Raises ValueError if a row has fewer than K valid candidates.
    """
    if list_size < 1 or expand < 1 or beam < 1:
        raise ValueError("list_search: list_size, beam and expand are at least 1")
    b, n = utility.shape
    # What is no number is no candidate: topk would take it for the best.
    counts = utility.isfinite() if valid is None else utility.isfinite() & valid
    utility, similarity = _float(utility).masked_fill(~counts, -torch.inf), _float(similarity)
    # No beam looks further down than this: its own items and the `expand` best that remain.
    m = min(n, expand + list_size - 1)
    utility, items = utility.topk(m)  # (B, M), best first
    free = utility.isfinite()[:, None]  # (B, W, M): not yet in the beam's list
    short = free.sum((1, 2)) < list_size
    if short.any():
        row = int(short.int().argmax())
        raise ValueError(f"list_search: row {row} has fewer than {list_size} valid candidates")
    pair = items[:, :, None] * n + items[:, None]  # (B, M, M)
    similarity = similarity.flatten(1).gather(1, pair.flatten(1)).view(b, m, m)
    # A set's hash is the sum of its members' random 60-bit numbers: order-free, and two of some
    # thousand sets collide with a chance of about 1e-12.
    code = torch.randint(2**60, (m,), generator=torch.Generator().manual_seed(0)).to(utility.device)
    values = utility.new_zeros(b, 1)  # (B, W)
    lists, hashes = items.new_zeros(b, 1, 0), items.new_zeros(b, 1)
    closeness = utility.new_zeros(b, 1, m)  # sum of cosines to the beam's items
    for slot in range(list_size):
        gain = weight * utility[:, None].expand_as(closeness)
        if slot:
            gain = gain + (1 - weight) * (1 - closeness / slot)
        tried = free & (free.cumsum(-1) <= expand)
        grown = (values[..., None] + gain).masked_fill(~tried, -torch.inf)  # (B, W, M)
        hashed = hashes[..., None] + code
        values, pick = _best_distinct(grown.flatten(1), hashed.flatten(1), beam, slot + 1)
        parent, item = pick // m, pick % m  # (B, W')
        hashes = hashed.flatten(1).gather(1, pick)
        above, new = (x[..., None].expand(-1, -1, m) for x in (parent, item))
        lists = torch.cat([lists.gather(1, above[..., :slot]), item[..., None]], -1)
        free = free.gather(1, above).scatter(2, item[..., None], False)  # (B, W', M)
        closeness = closeness.gather(1, above) + similarity.gather(1, new)
    lists = items[:, None].expand(-1, lists.shape[1], m).gather(2, lists)  # (B, W', K)
    lists = lists.masked_fill(values.isneginf()[..., None], -1)
    missing = beam - lists.shape[1]
    return F.pad(lists, (0, 0, 0, missing), value=-1), F.pad(values, (0, missing), value=-torch.inf)


def _best_distinct(values: Tensor, hashes: Tensor, count: int,
                   copies: int) -> tuple[Tensor, Tensor]:
    """The `count` best of values (B, C) and their places, no set twice; -inf where none is left.

    copies: how often a set can occur, so that enough of them are looked at.
    """
    ranked, order = values.topk(min(values.shape[1], count * copies))  # (B, L)
    sets, by_set = hashes.gather(1, order).sort(dim=1, stable=True)  # equal sets, best first
    copy = F.pad(sets[:, 1:] == sets[:, :-1], (1, 0))
    copy = torch.zeros_like(copy).scatter(1, by_set, copy)
    best, place = ranked.masked_fill(copy, -torch.inf).topk(min(count, ranked.shape[1]))
    return best, order.gather(1, place)


def list_utility(utility: Tensor, lists: Tensor) -> Tensor:
    """U: mean utility (N,) of each list (M, K) -> (M,)."""
    return _float(utility)[lists].mean(-1)


def list_diversity(similarity: Tensor, lists: Tensor | None = None) -> Tensor:
    """D: mean pairwise cosine dissimilarity of each list (M, K) -> (M,); of all N without lists."""
    if lists is None:
        lists = torch.arange(len(similarity))[None]
    k = lists.shape[-1]
    if k < 2:
        return torch.zeros(len(lists))
    block = _float(similarity)[lists[:, :, None], lists[:, None, :]]  # (M, K, K), the diagonal is 1
    off_diagonal = block.sum((1, 2)) - block.diagonal(dim1=1, dim2=2).sum(1)
    return 1 - off_diagonal / (k * (k - 1))


def mine_preferences(lists: Tensor, utility: Tensor, similarity: Tensor, weight: float,
                     margin: float, tolerance: float) -> tuple[int, dict[str, int | None]]:
    """Eq. (8): the preferred list of one user and one dispreferred list of each kind.

    lists (M, K), utility (N,), similarity (N, N). U and D are min-max normalised over the M lists.
    utility: U lower by >= margin, |D difference| <= tolerance; diversity: the reverse; joint: both
    lower by >= margin. Of the eligible lists the one with the widest gap is taken (unstated; the
    clearest contrast gives the least noisy gradient from a learned ranker). None: no such list.
    """
    u, d = min_max(list_utility(utility, lists)), min_max(list_diversity(similarity, lists))
    margin = max(margin, 1e-9)  # or the chosen list would be its own opposite
    chosen = int((weight * u + (1 - weight) * d).argmax())  # Eq. (8)
    u_gap, d_gap = u[chosen] - u, d[chosen] - d  # (M,)
    kinds = {  # kind: (its gap, who is eligible), (M,) each
        "utility": (u_gap, (u_gap >= margin) & (d_gap.abs() <= tolerance)),
        "diversity": (d_gap, (d_gap >= margin) & (u_gap.abs() <= tolerance)),
        "joint": (u_gap + d_gap, (u_gap >= margin) & (d_gap >= margin))}
    return chosen, {
        kind: int(gap.masked_fill(~eligible, -torch.inf).argmax()) if eligible.any() else None
        for kind, (gap, eligible) in kinds.items()}


def min_max(x: Tensor, valid: Tensor | None = None) -> Tensor:
    """x (..., N) scaled to [0, 1] along the last dimension, over its valid places only."""
    valid = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
    low = x.masked_fill(~valid, torch.inf).amin(-1, keepdim=True)
    spread = x.masked_fill(~valid, -torch.inf).amax(-1, keepdim=True) - low
    return torch.where(valid & (spread > 1e-9), (x - low) / spread, 0.0)


def dpo_loss(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor,
             ref_rejected: Tensor, beta: float) -> Tensor:
    """Eq. (6): -log sigmoid(beta [(log pi/pi_ref)(Y+) - (log pi/pi_ref)(Y-)]).

    Summed log-probabilities of whole lists, (P,) each -> loss (P,). ln 2 where policy = reference.
    """
    four = [_float(x) for x in (policy_chosen, policy_rejected, ref_chosen, ref_rejected)]
    if len({x.shape for x in four}) > 1:  # (P,) and (P, 1) would be P^2 losses without a word
        raise ValueError(f"dpo_loss: shapes differ: {[tuple(x.shape) for x in four]}")
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = four
    margin = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)
    return -F.logsigmoid(beta * margin)  # Eq. (6)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()  # a half overflows in exp
