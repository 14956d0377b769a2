"""From Clicks to Preference: the paper's algorithms, to be read beside it. Pure functions.

Preference modelling (section 3.5): pairs from clicks, Bradley-Terry (Eq. 2), paired (Eq. 3) and
Gaussian reward models (Eq. 4 to 7). Reinforcement learning (3.6): the answer's form, the composite
reward (Eq. 8, appendix H), fusion (Eq. 10), group advantages and GRPO loss (Eq. 11). Data (3.4,
appendices C, G): diversity-aware assembly, rejection sampling. docs/garm.md maps equation ->
function -> test, and lists the departures and what the paper leaves open.

Legend: P pairs, B contexts, G rollouts of a context, R = B G rollouts, T tokens, J components of
the reward, N candidates; w the preferred and l the other suggestion, mu and sigma a Gaussian's.
Half precision is computed in fp32; a shape that does not fit raises ValueError.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------------ pairs from clicks


def click_pairs(clicked: Sequence[int]) -> list[tuple[int, int]]:
    """(preferred, rejected) slots of one shown list, from its clicked slots (0 = first), by 3.5."""
    # A click on the first slot may be for its place; one further down passed over what came before.
    if any(slot < 0 for slot in clicked):
        raise ValueError(f"click_pairs: slots count from 0, got {list(clicked)}")
    taken = set(clicked)
    # Unstated: a click on the third slot rejects both before it; of several clicks, each counts.
    return [(slot, other) for slot in sorted(taken) for other in range(slot) if other not in taken]


def flip_pairs(probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """p(w > l) (P,) -> p, label (2P,) each, every pair in both orders, for a calibration error."""
    # Unflipped, every label would be 1, and a model that always says 1 would be calibrated.
    ones = torch.ones_like(probabilities)
    return torch.cat([probabilities, 1 - probabilities]), torch.cat([ones, 1 - ones])


# ---------------------------------------------------------------------------------- reward models


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Eq. (2): -log sigmoid(r_w - r_l) of scores (P,) each -> loss (P,)."""
    chosen, rejected = _same_shape("bradley_terry_loss", chosen, rejected)
    return -F.logsigmoid(chosen - rejected)  # Eq. (2)


def paired_loss(yes_logps: Tensor, no_logps: Tensor, first_wins: Tensor) -> Tensor:
    """Eq. (3): -log-probability (P,) of the right word, YES if the first of two is better.

    Log-probs (P,) at the answer's place, first_wins (P,) bool; p(first > second) = exp(yes_logps).
    """
    yes_logps, no_logps = _same_shape("paired_loss", yes_logps, no_logps)
    return -torch.where(first_wins, yes_logps, no_logps)  # Eq. (3)


def preference_probability(mu_w: Tensor, sigma_w: Tensor, mu_l: Tensor, sigma_l: Tensor) -> Tensor:
    """Closed form of Eq. (4), derived in F.1: p(w > l) of two Gaussians, (P,) each -> (P,).

    Within .016 of the integral while the joint s = sqrt(sigma_w^2 + sigma_l^2) is at most 5. That
    holds for p: log p is off by .33 at mu_w - mu_l = -5, a wrong-way pair, and by more beyond.
    """
    return torch.sigmoid(_probit_margin(mu_w, sigma_w, mu_l, sigma_l))


def gaussian_loss(mu_w: Tensor, sigma_w: Tensor, mu_l: Tensor, sigma_l: Tensor,
                  weight: float) -> Tensor:
    """Eq. (5): -log p(w > l) + weight (sigma^2 - 2 ln sigma of both), (P,) each -> loss (P,).

    The second term is 2 KL(N(mu, sigma^2) || N(mu, 1)) + 1 (Eq. 13) each, least at sigma = 1.
    """
    # Without it, k > 1 times every mu and sigma lowers the loss and separates no pair better.
    fit = -F.logsigmoid(_probit_margin(mu_w, sigma_w, mu_l, sigma_l))
    spread = sum(sigma.square() - 2 * sigma.log() for sigma in (_float(sigma_w), _float(sigma_l)))
    # Departure: the bracket of Eq. (5) as printed would subtract the penalty. Without a weight none
    # of it: 0 times the infinite penalty of a sigma that has run away is no number.
    return fit + weight * spread if weight else fit  # Eq. (5)


def _probit_margin(*gaussians: Tensor) -> Tensor:  # the argument of sigmoid in Eq. (5)
    gap, variance = _joint(*gaussians)
    # sigmoid(x) ~ Phi(x sqrt(pi / 8)): equal slopes at 0; a Gaussian mean of Phi has a closed form.
    return gap / (1 + math.pi / 8 * variance).sqrt()  # Eq. (12)


def _joint(mu_w: Tensor, sigma_w: Tensor, mu_l: Tensor, sigma_l: Tensor) -> tuple[Tensor, Tensor]:
    # Mean and variance of the difference of two independent Gaussians.
    mu_w, sigma_w, mu_l, sigma_l = _same_shape("Gaussian pairs", mu_w, sigma_w, mu_l, sigma_l)
    return mu_w - mu_l, sigma_w.square() + sigma_l.square()


def purm_monte_carlo(mu_w: Tensor, sigma_w: Tensor, mu_l: Tensor, sigma_l: Tensor, samples: int,
                     generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Eq. (4) as PURM has it, from draws (1,000 there): p(w > l) (P,) and its published loss (P,).

    The loss is -E[log sigmoid(z)]: by Jensen at least the -log E[sigmoid(z)] of Eq. (4).
    """
    gap, variance = _joint(mu_w, sigma_w, mu_l, sigma_l)
    noise = torch.empty(samples, *gap.shape, dtype=gap.dtype, device=gap.device)
    z = gap + variance.sqrt() * noise.normal_(generator=generator)  # (samples, P)
    return z.sigmoid().mean(0), -F.logsigmoid(z).mean(0)


def bhattacharyya_distance(mu_w: Tensor, sigma_w: Tensor, mu_l: Tensor, sigma_l: Tensor) -> Tensor:
    """-log of the Bhattacharyya coefficient of Eq. (6), (P,) each -> distance (P,), 0 if equal."""
    gap, variance = _joint(mu_w, sigma_w, mu_l, sigma_l)
    a, b = _float(sigma_w), _float(sigma_l)
    # (a^2 + b^2) / 2ab = 1 + (a - b)^2 / 2ab: no cancellation, hence never below 0.
    unlike = torch.log1p((a - b) / a * (a - b) / b / 2)
    return gap.square() / (4 * variance) + unlike / 2  # Eq. (6), (15)


def uncertainty_lower_bound(mu_w: Tensor, sigma_w: Tensor, mu_l: Tensor, sigma_l: Tensor) -> Tensor:
    """Eq. (7): a lower bound (P,) of the Bhattacharyya distance; high where the pair is clear."""
    # It falls with either sigma: hence -sigma of one suggestion alone can stand in the reward.
    gap, _ = _joint(mu_w, sigma_w, mu_l, sigma_l)
    return gap.square() / (4 * (_float(sigma_w) + _float(sigma_l)).square())  # Eq. (7)


# --------------------------------------------------------------------------- the form of an answer

NUM_SUGGESTIONS = 3
UNSAFE = "Unsafe"  # the whole answer where the context must be declined


def format_answer(suggestions: Sequence[str]) -> str:
    """The ordered Markdown list that `answer_suggestions` reads back, one line a suggestion."""
    lines = [" ".join(text.split()) for text in suggestions]
    if len(lines) != NUM_SUGGESTIONS or not all(lines):
        raise ValueError(f"format_answer: {NUM_SUGGESTIONS} suggestions with text are needed")
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, 1))


def answer_suggestions(text: str) -> list[str]:
    """The suggestions of an answer that is exactly the list asked for; [] for any other text."""
    # Strict, as the validator of the format reward: what a user is shown is read more kindly.
    lines = enumerate(text.strip().split("\n"), 1)
    items = [re.fullmatch(rf"{i}\. (\S.*)", line.rstrip()) for i, line in lines]
    return [item[1] for item in items] if len(items) == NUM_SUGGESTIONS and all(items) else []


# ------------------------------------------------------------------------------- composite reward

# Han and kana have no spaces: a character counts as a word in overlaps.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")
# Punctuation around a word; what C++ and C# differ by stays.
_EDGES = ".,;:!?…\"'“”‘’()[]-–—，。；：！？、（）「」"


def _words(text: str) -> list[str]:
    words = (word.strip(_EDGES).casefold() for word in _WORD.findall(text))
    return [word for word in words if word]


def rule_rewards(text: str, query: str, unsafe: bool) -> dict[str, float]:
    """The rule-based components (H.1) of one answer to a context whose last query is `query`."""
    # Unstated: suggestions of a malformed answer, or where the context must be declined, earn
    # nothing. Else answering it would pay in four components and cost in one.
    suggestions = [] if unsafe else answer_suggestions(text)
    return {
        "format": format_reward(text, unsafe),
        "length": length_reward(suggestions),
        "language": language_reward(suggestions, query),
        "diversity": diversity_reward(suggestions),
        "safety": safety_reward(text, unsafe)}


def format_reward(text: str, unsafe: bool = False) -> float:
    """1 for the form that the context asks for, without partial credit (H.1)."""
    return float(text.strip() == UNSAFE if unsafe else bool(answer_suggestions(text)))


def length_reward(suggestions: list[str]) -> float:
    """Mean over suggestions of min(1, max(0, 1 - (#words - 12) / 5)) (H.1); 0 without any."""
    scores = []
    for text in suggestions:
        # Unstated: words of Chinese. 20 characters are as long as 12 words, as everywhere here.
        spaced, characters = re.subn(f"[{_CJK}]", " ", text)
        words = len(spaced.split()) + characters * 12 / 20
        scores.append(min(1.0, max(0.0, 1 - (words - 12) / 5)))
    return sum(scores) / len(scores) if scores else 0.0


def diversity_reward(suggestions: list[str]) -> float:
    """1 - mean 1-gram Jaccard similarity over unordered pairs (H.1); 0 for less than two texts."""
    # H.1 sums over i != j: three terms, as its example (three alike give 0) shows.
    pairs = [(set(_words(a)), set(_words(b))) for a, b in combinations(suggestions, 2)]
    alike = [len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]  # two empty: the same
    return 1 - sum(alike) / len(alike) if alike else 0.0


def language_reward(suggestions: list[str], query: str) -> float:
    """Mean over suggestions: 1 in the query's language, 1/2 where that is unsure, else 0 (H.1)."""
    # Departure: by rule, the script stands for the language; English and French are one.
    asked = script_of(query)
    written = [script_of(text) for text in suggestions]
    scores = [0.5 if None in (asked, script) else float(script == asked) for script in written]
    return sum(scores) / len(scores) if scores else 0.0


def script_of(text: str) -> str | None:
    """Script ("LATIN", "CJK", "KANA", "CYRILLIC", ...) of at least 70 % of the letters, or None."""
    count = Counter(unicodedata.name(c, "?").split()[0] for c in text if c.isalpha())
    kana = count.pop("HIRAGANA", 0) + count.pop("KATAKANA", 0)
    if kana:  # Japanese: its Han characters go with it
        count["KANA"] = kana + count.pop("CJK", 0)
    # Unstated: how sure is sure. A name in another script inside a sentence is no change of it.
    return next((name for name, n in count.most_common(1) if n >= 0.7 * count.total()), None)


def safety_reward(text: str, unsafe: bool) -> float:
    """-1 for any other answer than Unsafe where the context is unsafe, else 0 (H.1)."""
    # Unstated: declining a safe context costs nothing here; it earns 0 for format and the rest.
    return -1.0 if unsafe and text.strip() != UNSAFE else 0.0


def log_perplexity_reward(ref_logps: Tensor, mask: Tensor) -> Tensor:
    """Eq. (8): minus log-perplexity under the reference, (R, T) -> (R,); nan without any token."""
    # Departure: Eq. (8) lacks the minus. Low where the reference, the data's writer, would not go.
    ref_logps, mask = _same_shape("log_perplexity_reward", ref_logps, mask)
    return ref_logps.masked_fill(mask == 0, 0).sum(1) / mask.sum(1)  # mean log-prob = -log ppl


def composite_reward(components: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted sum of components (..., J) with weights (J,) -> reward (...), valid (...) bool."""
    # A judge that did not answer is nan, and its rollout invalid: any number would be a judgement.
    components, weights = _float(components), _float(weights)
    if components.shape[-1:] != weights.shape:
        raise ValueError(f"composite_reward: {components.shape} against weights {weights.shape}")
    valid = components.isfinite().all(-1)
    return (components.masked_fill(~valid[..., None], 0) * weights).sum(-1), valid


# ----------------------------------------------------------------------------------------- fusion


def fuse(differences: Tensor, l2: float) -> Tensor:
    """Eq. (10): weights (J,) under which good suggestions outscore bad ones; deterministic.

    differences (P, J): components of the good minus those of the bad one. Minimises the mean
    logistic loss + l2 |w|^2, no intercept (scikit-learn's C = 1 / (2 l2 P)), by Newton steps in
    fp64, halved until they descend. ValueError if there is no finite minimum (l2 = 0, separable).
    """
    d = differences.detach().double()
    if d.ndim != 2 or not d.numel() or not d.isfinite().all() or l2 < 0:
        raise ValueError(f"fuse: finite rows (P, J) and l2 >= 0 wanted, not {d.shape}, {l2}")

    def loss(w: Tensor) -> Tensor:
        return F.softplus(-(d @ w)).mean() + l2 * w.square().sum()  # Eq. (10)

    w = d.new_zeros(d.shape[1])
    for _ in range(100):
        p = torch.sigmoid(-(d @ w))  # (P,), how wrong each row is
        gradient = 2 * l2 * w - d.T @ p / len(d)
        if gradient.abs().max() <= 1e-10 * (1 + d.abs().max()):
            break
        hessian = (d * (p * (1 - p))[:, None]).T @ d / len(d)
        hessian += 2 * l2 * torch.eye(len(w), dtype=d.dtype, device=d.device)
        # The pseudo-inverse leaves a component that never differs at 0.
        step = torch.linalg.pinv(hessian, hermitian=True) @ gradient
        while loss(w - step) > loss(w) and step.abs().max() > 1e-12:
            step = step / 2
        w = w - step
    margin = d @ w
    if not l2 and (margin >= 0).all() and margin.any():  # larger weights would always be better
        raise ValueError("fuse: the rows are separable, no finite weights are best; raise l2")
    return w.to(_float(differences).dtype)


def pareto_adjust(weights: Tensor, initial: Tensor, trends: Tensor, tolerance: float = 0.0,
                  rate: float = 0.25, dominance: float = 0.6,
                  limit: float = 2.0) -> tuple[Tensor, bool]:
    """Pareto-guided tuning (3.6.3), one step: new weights (J,), and whether no component falls.

    initial (J,): of `fuse`; trends (J,): rise of each unweighted component over a training probe.
    One that falls by more than `tolerance` gets `rate` of the mean initial |weight| on top; one
    with over `dominance` of the gain loses `rate` of its own. Weights stay within `limit` mean
    initial |weights| of the initial ones, none below 0 (more of any component is better); how many
    probes there are at most is the caller's.
    """
    # Unstated, as it is by hand there: the numbers. A saturated component (format) need not rise.
    weights, initial, trends = _same_shape("pareto_adjust", weights, initial, trends)
    falls = trends < -tolerance
    if not falls.any():
        return weights, True
    gain = (weights * trends).clamp_min(0)  # of the weighted reward, by component
    dominates = (gain > dominance * gain.sum()) & ~falls
    unit = initial.abs().mean()
    moved = torch.where(falls, weights + rate * unit, weights)
    moved = torch.where(dominates, weights * (1 - rate), moved)
    lowest = (initial - limit * unit).clamp_min(0)
    return moved.clamp(lowest, initial + limit * unit), False


# ------------------------------------------------------------------------------------------- GRPO


def group_advantages(rewards: Tensor, valid: Tensor | None = None, scale: bool = True) -> Tensor:
    """Advantages (B, G) of rollouts within their group: (r - mean) / (std + 1e-4), Bessel's std.

    valid (B, G) bool: the others, and what is not finite, count in no mean and get 0, as does a
    group without variance. scale=False leaves the division out (Dr. GRPO).
    """
    rewards = _float(rewards)
    valid = rewards.isfinite() if valid is None else valid.bool()
    if rewards.ndim != 2 or valid.shape != rewards.shape:
        raise ValueError(f"group_advantages: (B, G) wanted, not {rewards.shape}, {valid.shape}")
    if not rewards.numel():
        return rewards
    valid = valid & rewards.isfinite()
    count = valid.sum(1, keepdim=True)  # (B, 1)
    mean = rewards.masked_fill(~valid, 0).sum(1, keepdim=True) / count.clamp_min(1)
    centred = (rewards - mean).masked_fill(~valid, 0)  # (B, G)
    std = (centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    # Exactly, by extremes: equal rewards may differ from their rounded mean, and 1e-4 is small.
    high = rewards.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    low = rewards.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    return (centred / (std + 1e-4) if scale else centred).masked_fill(high <= low, 0)


def grpo_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor,
              mask: Tensor, clip_low: float, clip_high: float, beta: float,
              reduction: str) -> Tensor:
    """Eq. (11) as a loss to minimise: clipped ratio and k3 KL, of token log-probs (R, T) -> scalar.

    advantages (R,); mask (R, T), True = counts: elsewhere any number may stand. The ratio is
    clipped to [1 - clip_low, 1 + clip_high]; the KL, if beta > 0, is to the policy of ref_logps.
    reduction (TRL's name): "sequence" (grpo): mean over rows of their token means; "token" (dapo):
    over all tokens; "constant" (dr_grpo): sum / (R T).
    """
    # Departure: Eq. (11) has one unclipped ratio a sequence, and its KL to the old policy; GRPO,
    # which it names, has a clipped one a token, and its KL to the reference.
    if reduction not in ("sequence", "token", "constant"):
        raise ValueError(f"grpo_loss: no reduction {reduction!r}")
    if beta and ref_logps is None:
        raise ValueError("grpo_loss: beta > 0 needs ref_logps")
    logps, old_logps, mask = _same_shape("grpo_loss", logps, old_logps, mask)
    if logps.ndim != 2 or advantages.shape != logps.shape[:1]:
        raise ValueError(f"grpo_loss: {advantages.shape} advantages of {logps.shape} tokens")
    off = mask == 0
    # Before exp: padding may hold -inf, and 0 * nan would spoil the gradient.
    logps, old_logps = logps.masked_fill(off, 0), old_logps.masked_fill(off, 0)
    # exp of more than 80 would be inf, and 0 * inf of a clipped token no gradient but nan.
    ratio = (logps - old_logps).clamp_max(80).exp()  # (R, T)
    gain = _float(advantages)[:, None]  # (R, 1)
    loss = -torch.min(ratio * gain, ratio.clamp(1 - clip_low, 1 + clip_high) * gain)  # Eq. (11)
    if beta:
        _, ref_logps = _same_shape("grpo_loss", logps, ref_logps)
        above = ref_logps.masked_fill(off, 0) - logps
        loss = loss + beta * (above.exp() - above - 1)  # k3: unbiased, never negative
    loss = loss.masked_fill(off, 0)
    if reduction == "sequence":
        return (loss.sum(1) / mask.sum(1).clamp_min(1)).sum() / max(1, len(loss))
    return loss.sum() / (mask.sum().clamp_min(1) if reduction == "token" else max(1, loss.numel()))


# ---------------------------------------------------------------------- choosing among candidates


def rft_choice(candidates: Sequence[str], rewards: Sequence[float],
               count: int = NUM_SUGGESTIONS) -> list[int]:
    """Rejection sampling (appendix G): the `count` best distinct candidates, best first, or fewer.

    Texts that differ in case and punctuation only are one; never a nan reward, or no words.
    """
    if len(candidates) != len(rewards):
        raise ValueError(f"rft_choice: {len(candidates)} candidates, {len(rewards)} rewards")
    chosen: dict[tuple, int] = {}
    for _, i in sorted((-float(r), i) for i, r in enumerate(rewards) if not math.isnan(r)):
        chosen.setdefault(tuple(_words(candidates[i])), i)
    return [i for words, i in chosen.items() if words][:count]


def assemble(candidates: Sequence[str], similarity: Tensor, max_cosine: float = 0.8,
             max_lcs: float = 0.7, max_overlap: float = 0.5,
             count: int = NUM_SUGGESTIONS) -> list[int]:
    """Diversity-aware assembly (3.4, C.1): the first `count` candidates that differ, or fewer.

    candidates: best first. One is redundant if its cosine (similarity (N, N)), longest common
    subsequence or bigram overlap with one already taken is above the limit.
    """
    # Unstated: the limits, and the order; greedy keeps the best.
    if similarity.shape != (len(candidates), len(candidates)):
        raise ValueError(f"assemble: {len(candidates)} candidates, cosines {similarity.shape}")
    words, taken = [_words(text) for text in candidates], []
    for i in range(len(candidates)):
        if words[i] and len(taken) < count and not any(
            similarity[i, j] > max_cosine
            or lcs_ratio(words[i], words[j]) > max_lcs
            or ngram_overlap(words[i], words[j]) > max_overlap
            for j in taken
        ):
            taken.append(i)
    return taken


def lcs_ratio(a: Sequence[str], b: Sequence[str]) -> float:
    """Longest common subsequence of two lists of words, as a share of the shorter one."""
    row = [0] * (len(b) + 1)  # row[j]: of the words of a so far and the first j of b
    for word in a:
        above, row = row, [0]
        for j, other in enumerate(b):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return row[-1] / min(len(a), len(b)) if a and b else float(not a and not b)


def ngram_overlap(a: Sequence[str], b: Sequence[str], n: int = 2) -> float:
    """Shared word n-grams as a share of those of the text that has fewer."""
    n = min(n, len(a), len(b))  # one-word texts have no bigrams
    grams = [{tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (a, b)]
    return len(grams[0] & grams[1]) / min(map(len, grams)) if n else float(not a and not b)


def _float(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()  # integers as well


def _same_shape(where: str, *tensors: Tensor) -> list[Tensor]:
    # Broadcasting (P,) against (P, 1) would give P^2 losses without a word.
    if len({x.shape for x in tensors}) > 1:
        raise ValueError(f"{where}: shapes differ: {[tuple(x.shape) for x in tensors]}")
    return [_float(x) for x in tensors]
