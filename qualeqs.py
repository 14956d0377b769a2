"""QualEQS: the paper's algorithms, to be read beside it. Pure functions.

Quality (section 3.3): the reward of a set of suggestions (Eq. 4, 5). Mining (3.4): disagreement of
a context's candidates (Eq. 6) and the hard subset. Iteration (3.5, Algorithm 1): who trains in
which round; the warm start's mixture (appendix G). Figures (4.1, appendix F): strict accuracy,
valid rate, fine-grained accuracies, growth gap (Eq. 7). GRPO itself is garm.group_advantages and
garm.grpo_loss; who judges: roles/quality.py. docs/qualeqs.md maps equation -> function -> test,
and lists the departures and what the paper leaves open.

Legend: B contexts or rollouts, K candidate suggestions of one. Scores are 0 or 1, or nan where the
judge's call failed. Half precision is computed in fp32; shapes that do not fit raise ValueError.
"""

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

# ------------------------------------------------------------------------------ the quality reward


def set_reward(answerable: Tensor, factual: Tensor, informative: Tensor, format: Tensor,
               failed_as_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Eqs. (4), (5): three scores (B, K) and the format's (B,) -> r (B, K), r_q (B,).

    nan, a failed call, stays nan in r and is left out of the mean in r_q; r_q is nan where no
    suggestion was judged and the format is right. failed_as_zero: the paper's "neutral" 0.
    """
    # Departure: nan, because 0 is the lowest score there is: a server that is down for a minute
    # would teach the policy to avoid whatever it wrote then. `r_q.isfinite()` is the `valid` of
    # garm.group_advantages.
    answerable, factual, informative = map(_float, (answerable, factual, informative))
    format = _float(format)
    _same_scores("set_reward", answerable, factual, informative)
    if format.shape != answerable.shape[:1]:
        raise ValueError(f"set_reward: format {tuple(format.shape)}, scores {answerable.shape}")
    r = answerable * factual * informative  # (B, K), Eq. (4)
    if failed_as_zero:
        r = r.nan_to_num(nan=0.0)
    # Without its form an answer has no suggestions, so nobody judged them: 0 whatever r is.
    r_q = torch.where(format == 0, 0, format * r.nanmean(1))  # (B,), Eq. (5)
    return r, r_q


def disagreement(r: Tensor, valid: Tensor | None = None) -> Tensor:
    """Eq. (6): population variance (B,) of the rewards (B, K) of a context's candidates.

    valid (B, K) bool: the others, and nan, count in nothing. 0 where fewer than two are left, and
    exactly 0 where all are equal: such a context teaches GRPO nothing.
    """
    # K may be the candidates of several sampled lists. Trap: of one list of three the variance of
    # products of 0 and 1 is 0 or 2/9, which finds the hard ones and puts them in no order.
    r = _float(r)
    if r.ndim != 2 or (valid is not None and valid.shape != r.shape):
        raise ValueError(f"disagreement: (B, K) wanted, not {tuple(r.shape)}")
    counts = r.isfinite() if valid is None else valid.bool() & r.isfinite()  # (B, K)
    # By pairs, not by the rounded mean: equal rewards give exactly 0, and (1, 0, 0) and (1, 1, 0)
    # the same; else sets with one good suggestion would all be mined before sets with two.
    r = r.masked_fill(~counts, 0)
    gaps = (r[:, :, None] - r[:, None]).square()  # (B, K, K)
    total = gaps.masked_fill(~(counts[:, :, None] & counts[:, None]), 0).sum((1, 2))
    return total / (2 * counts.sum(1).clamp_min(1).square())  # Eq. (6), (B,)


def mine_hard(u: Tensor, share: float, floor: float) -> Tensor:
    """Indices (M,) of the contexts to train on next, hardest first; M <= round(share B).

    All of them are above the floor: at 0 that leaves out where all candidates are equally good or
    bad. Ties keep their order, so shuffle contexts whose order means something.
    """
    # Unstated: how many ("Sampling" in Algorithm 1), and whether a floor.
    if u.ndim != 1 or not 0 <= share <= 1:
        raise ValueError(f"mine_hard: u (B,) and a share wanted, not {tuple(u.shape)}, {share}")
    order = torch.sort(u, descending=True, stable=True).indices
    return order[u[order] > floor][: round(share * len(u))]


# ----------------------------------------------------------------- the iteration and its contexts


def split_clicked(clicked: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    """Indices of D_click (something clicked) and of D_unclick, from each shown list's clicks."""
    positive = [i for i, slots in enumerate(clicked) if slots]
    return positive, [i for i, slots in enumerate(clicked) if not slots]


def round_contexts(clicked: Sequence[Hashable], hard: Sequence[Hashable] = (), limit: int = 0,
                   generator: torch.Generator | None = None) -> list:
    """Algorithm 1: the contexts of one round of RL, each once, in random order.

    The first round (step 2) has D_click alone, each later one (step 4) D_hard and D_click. limit:
    at most so many, the hardest first and then clicked ones at random; 0: all.
    """
    # Unstated: in what proportion. A limit keeps the rounds of every variant equally long, so that
    # mining is compared with none at the same number of steps.
    drawn = torch.randperm(len(clicked), generator=generator).tolist()
    chosen = list(dict.fromkeys([*hard, *(clicked[i] for i in drawn)]))
    chosen = chosen[: limit or None]
    return [chosen[i] for i in torch.randperm(len(chosen), generator=generator).tolist()]


def mixture(domain: int, general: int, ratio: float,
            generator: torch.Generator | None = None) -> Tensor:
    """Row numbers of the warm start in random order: domain rows 0 .. domain - 1, general ones
    from `domain` on, `ratio` of them to a domain row, drawn without return as far as they last."""
    # Unstated: the ratio ("proportionally combined"); 0 is the ablation "w/o mix ratio".
    if min(domain, general) < 0 or not 0 <= ratio < float("inf"):
        raise ValueError(f"mixture: counts and a ratio from 0 on wanted, got {ratio}")
    drawn = torch.randperm(general, generator=generator)[: round(ratio * domain)]
    rows = torch.cat([torch.arange(domain), domain + drawn])
    return rows[torch.randperm(len(rows), generator=generator)]


# --------------------------------------------------------------------------------------- figures


def quality_figures(answerable: Tensor, factual: Tensor, informative: Tensor,
                    format: Tensor) -> dict[str, float]:
    """Section 4.1's figures of sets (B, K), each in [0, 1], nan where nothing was judged.

    strict_accuracy: of sets, all K suggestions meet all criteria; valid_rate: of suggestions, they
    meet all; answerable, factual, informative: they meet that one; format: of sets; failed: of
    suggestions, no judgement, which count in no other figure.
    """
    # Unstated: a malformed answer has no suggestions; it fails as K bad ones, in every figure.
    wrong = _float(format) == 0  # (B,)
    r, _ = set_reward(answerable, factual, informative, format)
    r = r.masked_fill(wrong[:, None], 0)  # (B, K)
    each = {"answerable": answerable, "factual": factual, "informative": informative}
    each = {name: _float(x).masked_fill(wrong[:, None], 0) for name, x in each.items()}
    # Sets of which a call failed are left out even where another suggestion is bad: else failed
    # calls would only ever hide good sets.
    strict = r.prod(1)  # (B,), nan if any is
    figures = {"strict_accuracy": strict, "valid_rate": r, **each}
    return {name: x.nanmean().item() for name, x in figures.items()} | {
        "format": (~wrong).float().mean().item(), "failed": r.isnan().float().mean().item()}


def figures_by(groups: Iterable[Hashable], *scores: Tensor) -> dict[Hashable, dict[str, float]]:
    """quality_figures of each group, such as an intent (Figure 5); groups: B names."""
    rows: dict[Hashable, list[int]] = {}
    for i, group in enumerate(groups):
        rows.setdefault(group, []).append(i)
    return {group: quality_figures(*(x[i] for x in scores)) for group, i in rows.items()}


def growth_gap(treatment: float, control: float) -> float:
    """Eq. (7): (A - B) / B of ChatUV or ChatPV."""
    return (treatment - control) / control  # Eq. (7)


def _float(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # flags and half precision as fp32


def _same_scores(where: str, *scores: Tensor) -> None:
    if len({x.shape for x in scores}) > 1 or scores[0].ndim != 2:
        raise ValueError(f"{where}: (B, K) each wanted, not {[tuple(x.shape) for x in scores]}")
