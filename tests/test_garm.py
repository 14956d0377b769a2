"""The paper's functions against hand values, integrals, scikit-learn and TRL."""

import inspect
import itertools
import math
import re
from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import garm
from files import ROOT
from stages import metrics


def rows(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


SIGMA = st.floats(1e-2, 1e2)
MU = st.floats(-50, 50)
TEXT = st.text(st.characters(codec="utf-8"), max_size=30)


# -------------------------------------------------------------------------------- pairs from clicks


@pytest.mark.parametrize(
    "clicked, pairs",
    [([], []), ([0], []), ([1], [(1, 0)]), ([2], [(2, 0), (2, 1)]), ([2, 1, 1], [(1, 0), (2, 0)])],
)
def test_a_click_rejects_what_stood_before_it(clicked, pairs):
    assert garm.click_pairs(clicked) == pairs


@given(st.sets(st.integers(0, 9)))
def test_the_rejected_was_shown_earlier_and_not_clicked(clicked):
    pairs = garm.click_pairs(list(clicked))
    assert len(pairs) == len(set(pairs))
    assert all(b < a and a in clicked and b not in clicked for a, b in pairs)


def test_calibration_of_pairs_needs_both_orders():
    """Right in 70 % where it says .7 is calibrated, always sure is not; unflipped, it would be."""
    right = torch.tensor([0.7] * 70 + [0.3] * 30)  # p(w > l); its winner lost in 30 of 100
    p, label = garm.flip_pairs(right)
    assert p.shape == label.shape == (200,) and label.mean() == 0.5
    assert metrics.expected_calibration_error(p, label, 2) == pytest.approx(0, abs=1e-6)
    sure, ones = (right > 0.5).float(), np.ones(100)
    assert metrics.expected_calibration_error(*garm.flip_pairs(sure), 2) == pytest.approx(0.3)
    assert metrics.expected_calibration_error(torch.ones(100), ones) == 0  # the trap


# --------------------------------------------------------------------------------- reward models


def test_bradley_terry_loss_by_hand():
    loss = garm.bradley_terry_loss(*rows(2.0, 0.5))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1.5)))


def test_bradley_terry_loss_equals_trl():
    """TRL 1.16: RewardTrainer.compute_loss, of an object without __init__; only scores go in."""
    from trl import RewardTrainer

    chosen, rejected = random(8).requires_grad_(), random(8, seed=1).requires_grad_()
    trainer = MagicMock()
    trainer.args.center_rewards_coefficient = None
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda x: x
    trainer._metrics, trainer._total_train_tokens = defaultdict(lambda: defaultdict(list)), 0
    trainer._tp_size = 1
    scores = torch.cat([chosen, rejected])[:, None]
    theirs = RewardTrainer.compute_loss(
        trainer, lambda **_: SimpleNamespace(logits=scores), {"attention_mask": torch.ones(16, 3)}
    )
    ours = garm.bradley_terry_loss(chosen, rejected).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    gradients = [torch.autograd.grad(x, [chosen, rejected]) for x in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_paired_loss_by_hand():
    yes, no = torch.tensor([0.6, 0.6]).log(), torch.tensor([0.3, 0.3]).log()
    loss = garm.paired_loss(yes, no, torch.tensor([True, False]))
    assert loss.tolist() == pytest.approx([-math.log(0.6), -math.log(0.3)])


def integral(gap: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. (4) and the variance of sigmoid(z), by the trapezoid rule over 12 deviations."""
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi) * (x[1] - x[0])
    values = torch.sigmoid(gap[..., None] + s[..., None] * x)
    mean = (values * density).sum(-1)
    return mean, (values.square() * density).sum(-1) - mean.square()


def grid():
    """Gaps -10..10, joint deviations .05..5, split unevenly over the two suggestions."""
    gap = torch.linspace(-10, 10, 81, dtype=torch.float64)
    s = torch.linspace(0.05, 5, 50, dtype=torch.float64)
    gap, s = (x.flatten() for x in torch.meshgrid(gap, s, indexing="ij"))
    closed = garm.preference_probability(gap + 1.5, 0.6 * s, torch.full_like(gap, 1.5), 0.8 * s)
    return gap, s, closed, *integral(gap, s)


def test_preference_probability_is_close_to_the_integral():
    """Largest error .0157 (gap 9.5, s 5), as the docstring says; 1e-3 less would fail."""
    gap, s, closed, exact, _ = grid()
    error = (closed - exact).abs()
    assert 0.0147 < error.max() <= 0.016
    assert error[s <= 1.42].max() < 0.008  # two sigmas of 1, where the regulariser keeps them
    # The promise is for p: its logarithm, which the loss takes, is not as close.
    log_error = (closed.log() - exact.log()).abs()
    assert 0.32 < log_error[gap == -5].max() < 0.34 and log_error[gap < -5].max() > 1
    assert log_error[gap >= -2].max() < 0.03


def test_preference_probability_is_within_the_spread_of_1000_draws():
    """Its error is under a standard deviation of PURM's estimate for gaps up to 2, not beyond."""
    gap, s, closed, exact, variance = grid()
    spread = (variance / 1000).sqrt()
    near = (gap.abs() <= 2) & (gap != 0)  # at 0 both are exact by symmetry
    assert ((closed - exact).abs() < 0.9 * spread)[near].all()
    assert ((closed - exact).abs() > spread)[gap.abs() == 5].any()  # there the bias is larger
    # The estimate's real spread is that of the formula.
    pair = [x.expand(200) for x in rows(1.0, 1.0, 0.0, 1.0)]
    draws, _ = garm.purm_monte_carlo(*pair, 1000, torch.Generator().manual_seed(0))
    mean, variance = integral(*rows(1.0, math.sqrt(2)))
    assert draws.mean().item() == pytest.approx(mean.item(), abs=3e-3)
    assert draws.std().item() == pytest.approx((variance.item() / 1000) ** 0.5, rel=0.2)


def test_the_loss_of_purm_is_an_upper_bound():
    pair = random(20), random(20, seed=1).exp(), random(20, seed=2), random(20, seed=3).exp()
    p, loss = garm.purm_monte_carlo(*pair, 500, torch.Generator().manual_seed(0))
    assert (loss > -p.log()).all() and (loss + p.log()).max() > 0.1


def test_gaussian_loss_by_hand():
    loss = garm.gaussian_loss(*rows(2.0, 2.0, 1.0, 0.5), 0.1)
    fit = math.log(1 + math.exp(-1 / math.sqrt(1 + math.pi / 8 * 4.25)))
    penalty = 4 - 2 * math.log(2) + 0.25 - 2 * math.log(0.5)
    assert loss.item() == pytest.approx(fit + 0.1 * penalty)


@given(MU, MU, SIGMA, SIGMA)
def test_the_variance_penalty_is_least_at_one(mu_w, mu_l, sigma_w, sigma_l):
    def penalty(*sigmas):
        values = rows(mu_w, sigmas[0], mu_l, sigmas[1])
        return (garm.gaussian_loss(*values, 1.0) - garm.gaussian_loss(*values, 0.0)).item()

    assert penalty(sigma_w, sigma_l) >= penalty(1.0, 1.0) - 1e-9 == pytest.approx(2, abs=1e-6)
    # Eq. (13): 2 KL + 1 of each
    kl = [0.5 * (s * s - 1 - 2 * math.log(s)) for s in (sigma_w, sigma_l)]
    assert penalty(sigma_w, sigma_l) == pytest.approx(2 * sum(kl) + 2, rel=1e-6)


def test_without_the_penalty_sigma_runs_away():
    """400 noisy choices among 8 suggestions with free mu and sigma, 800 steps of Adam."""
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(8, (400,), generator=draw)
    second = (first + torch.randint(1, 8, (400,), generator=draw)) % 8
    truth = torch.linspace(-1.5, 1.5, 8)
    wins = torch.rand(400, generator=draw) < torch.sigmoid(truth[first] - truth[second])
    w = torch.where(wins, first, second)
    loser = first + second - w

    def largest_sigmas(weight):
        mu, log_sigma = (torch.zeros(8, requires_grad=True) for _ in range(2))
        optimizer = torch.optim.Adam([mu, log_sigma], lr=0.05)
        for step in range(800):
            sigma = log_sigma.exp()
            loss = garm.gaussian_loss(mu[w], sigma[w], mu[loser], sigma[loser], weight).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step in (399, 799):
                yield sigma.max().item()

    halfway, end = largest_sigmas(0.0)
    assert end > 4 and end > 1.3 * halfway  # 5.1, and still on its way
    halfway, end = largest_sigmas(0.01)
    assert end < 1.3 and end == pytest.approx(halfway, abs=0.02)  # 1.2, settled


@pytest.mark.parametrize("sigma", [0.0, 1e25])
def test_a_sigma_that_has_run_away_leaves_the_loss_without_a_penalty_finite(sigma):
    wide = torch.tensor([sigma], requires_grad=True)
    loss = garm.gaussian_loss(torch.ones(1), wide, torch.zeros(1), wide, 0.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)) if not sigma else math.log(2))
    assert torch.autograd.grad(loss, wide)[0].isfinite()


def test_scaling_mu_and_sigma_lowers_the_loss_without_the_penalty():
    pair = rows(1.0, 1.0, 0.0, 1.0)
    plain, penalised = (
        [garm.gaussian_loss(*(k * x for x in pair), weight).item() for k in (1, 3, 9, 27)]
        for weight in (0.0, 0.1)
    )
    assert plain == sorted(plain, reverse=True) and penalised == sorted(penalised)


def test_bhattacharyya_distance_by_hand_and_from_its_coefficient():
    assert garm.bhattacharyya_distance(*rows(3.0, 2.0, 3.0, 2.0)).item() == 0
    mu_w, sigma_w, mu_l, sigma_l = rows(1.0, 2.0, -1.0, 0.5)
    bc = math.sqrt(2 * 2 * 0.5 / 4.25) * math.exp(-4 / (4 * 4.25))  # Eq. (6)
    distance = garm.bhattacharyya_distance(mu_w, sigma_w, mu_l, sigma_l)
    assert distance.item() == pytest.approx(-math.log(bc))
    x = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    densities = [
        torch.distributions.Normal(m, s).log_prob(x).exp()
        for m, s in ((mu_w, sigma_w), (mu_l, sigma_l))
    ]
    overlap = torch.trapezoid((densities[0] * densities[1]).sqrt(), x)
    assert distance.item() == pytest.approx(-math.log(overlap), abs=1e-6)


def test_uncertainty_lower_bound_by_hand():
    assert garm.uncertainty_lower_bound(*rows(1.0, 2.0, -1.0, 0.5)).item() == 4 / (4 * 2.5**2)


@settings(max_examples=300)
@given(MU, SIGMA, MU, SIGMA, st.sampled_from([torch.float32, torch.float64]))
def test_the_bound_is_one(mu_w, sigma_w, mu_l, sigma_l, dtype):
    pair = [x.to(dtype) for x in rows(mu_w, sigma_w, mu_l, sigma_l)]
    bound = garm.uncertainty_lower_bound(*pair).item()
    assert 0 <= bound <= garm.bhattacharyya_distance(*pair).item() * (1 + 1e-5)


# ------------------------------------------------------------------------------ form of an answer


def test_an_answer_is_the_list_of_three_or_nothing():
    text = garm.format_answer(["Add  a\nchart", "C++?", "Make it 2. shorter"])
    assert text == "1. Add a chart\n2. C++?\n3. Make it 2. shorter"
    assert garm.answer_suggestions(f"\n{text} \n") == ["Add a chart", "C++?", "Make it 2. shorter"]
    for wrong in (
        "", "Unsafe", "1. a\n2. b", "1. a\n2. b\n3. c\n4. d", "1. a\n3. b\n2. c", "1. a\n2. \n3. c",
        "Sure:\n1. a\n2. b\n3. c", "1. a\n2. b\n3. c\nEnjoy!", "- a\n- b\n- c", "1) a\n2) b\n3) c",
        "1. a 2. b 3. c", "1.a\n2.b\n3.c", "1. a\n\n2. b\n3. c",
    ):  # fmt: skip
        assert garm.answer_suggestions(wrong) == [] and garm.format_reward(wrong) == 0
    for few in (["a", "b"], ["a", "b", " "], list("abcd")):
        with pytest.raises(ValueError, match="3 suggestions"):
            garm.format_answer(few)


@given(st.lists(TEXT.filter(str.strip), min_size=3, max_size=3))
def test_every_three_texts_are_read_back(texts):
    assert garm.answer_suggestions(garm.format_answer(texts)) == [
        " ".join(text.split()) for text in texts
    ]


# ------------------------------------------------------------------------------- composite reward


def test_length_reward_by_hand():
    def score(*counts):
        return garm.length_reward(["word " * n for n in counts])

    assert [score(n) for n in (1, 12, 13, 15, 17, 40)] == pytest.approx([1, 1, 0.8, 0.4, 0, 0])
    assert score(5, 14, 30) == pytest.approx((1 + 0.6 + 0) / 3)
    assert garm.length_reward([]) == 0
    assert garm.length_reward(["字" * 20]) == 1 and garm.length_reward(["字" * 30]) < 0.01


def test_diversity_reward_by_hand():
    assert garm.diversity_reward(["Make it short."] * 3) == 0
    assert garm.diversity_reward(["a b", "c d", "e f"]) == 1
    # {a,b}&{b,c} 1/3; {a,b}&{d} 0; {b,c}&{d} 0: three unordered pairs
    assert garm.diversity_reward(["a b", "b c", "d"]) == pytest.approx(1 - 1 / 9)
    assert garm.diversity_reward(["Use it", "use it!"]) == 0  # case and punctuation are no words
    assert garm.diversity_reward(["C++", "C#"]) == 1
    assert garm.diversity_reward(["爵士乐", "爵士舞"]) == pytest.approx(0.5)  # by character
    assert garm.diversity_reward([]) == garm.diversity_reward(["a"]) == 0


@given(st.lists(TEXT, min_size=2, max_size=4), st.randoms())
def test_rule_rewards_lie_between_0_and_1_and_know_no_order(texts, shuffler):
    other = shuffler.sample(texts, len(texts))
    for reward in (
        garm.length_reward, garm.diversity_reward, lambda x: garm.language_reward(x, "hello"),
    ):  # fmt: skip
        assert 0 <= reward(texts) <= 1 and reward(texts) == pytest.approx(reward(other))


def test_language_reward_by_script():
    assert garm.language_reward(["Why jazz?", "爵士是什么", "?!"], "Tell me") == pytest.approx(0.5)
    assert garm.language_reward(["Why 爵士 jazz now?"], "Tell me") == 1  # a name in another script
    assert garm.language_reward(["Why 爵士爵士"], "Tell me") == 0.5  # neither
    assert garm.language_reward([], "Tell me") == 0
    scripts = "το γράμμα mu", "ジャズの歴史", "爵士", "Привет", "", "123"
    assert [*map(garm.script_of, scripts)] == [
        None if text in ("", "123") else name
        for text, name in zip(scripts, ("GREEK", "KANA", "CJK", "CYRILLIC", "", ""), strict=True)
    ]


@pytest.mark.parametrize(
    "text, unsafe, form, safety, others",
    [
        ("1. Why a?\n2. How b?\n3. Try c", False, 1, 0, True),
        ("1. Why a?\n2. How b?\n3. Try c", True, 0, -1, False),
        ("Unsafe", True, 1, 0, False),
        ("Unsafe", False, 0, 0, False),
        ("unsafe, sorry", True, 0, -1, False),
    ],
)
def test_rule_rewards_of_safe_and_unsafe_contexts(text, unsafe, form, safety, others):
    rewards = garm.rule_rewards(text, "What is it?", unsafe)
    assert (rewards["format"], rewards["safety"]) == (form, safety)
    assert all((rewards[name] > 0) == others for name in ("length", "language", "diversity"))


def test_log_perplexity_by_hand():
    logps = torch.tensor([[-1.0, -3.0, -torch.inf], [-2.0, 0.0, 0.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False] * 3])
    reward = garm.log_perplexity_reward(logps, mask)
    assert reward[:2].tolist() == [-2, -2] and reward[2].isnan()
    likelier = garm.log_perplexity_reward(logps + 0.5, mask)
    assert (likelier > reward)[:2].all()  # the sign that Eq. (8) lacks


def test_composite_reward_masks_what_a_judge_did_not_score():
    components = torch.tensor([[[1.0, 2.0], [1.0, torch.nan]]])
    reward, valid = garm.composite_reward(components, torch.tensor([0.5, -1.0]))
    assert reward.tolist() == [[-1.5, 0]] and valid.tolist() == [[True, False]]


# ----------------------------------------------------------------------------------------- fusion


@pytest.mark.parametrize("l2", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_fuse_equals_scikit_learn(l2, spread):
    """Each row once as it is and once turned round, or there would be one class: C = 1/(4 l2 P)."""
    from sklearn.linear_model import LogisticRegression

    d = random(200, 4, seed=3).double() + torch.tensor([0.5, 0.0, -0.2, 0.1])
    d = d * torch.tensor([1.0, spread, 1.0, 1 / spread])
    both, label = torch.cat([d, -d]), [1] * 200 + [0] * 200
    theirs = LogisticRegression(
        C=1 / (4 * l2 * 200), fit_intercept=False, solver="newton-cholesky", tol=1e-10
    ).fit(both, label)
    ours = garm.fuse(d, l2)
    assert ours.tolist() == pytest.approx(theirs.coef_[0].tolist(), abs=1e-5)
    assert torch.equal(ours, garm.fuse(d, l2))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_fuse_of_separable_rows_and_of_a_constant_component(scale):
    """No gradient is left at the weights; a component that never differs has weight 0."""
    d = scale * torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.5, 0.0]], dtype=torch.float64)
    w = garm.fuse(d, 1e-6).requires_grad_()
    loss = torch.nn.functional.softplus(-(d @ w)).mean() + 1e-6 * w.square().sum()
    assert torch.autograd.grad(loss, w)[0].abs().max() < 1e-9 * (1 + scale)
    assert w[1] == 0 and w[0] > 0
    with pytest.raises(ValueError, match="raise l2"):
        garm.fuse(d, 0.0)
    for apart in ([[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [2.0, 0.0], [0.0, 0.0]]):
        with pytest.raises(ValueError, match="raise l2"):  # rows that nothing tells apart beside it
            garm.fuse(torch.tensor(apart), 0.0)
    assert garm.fuse(torch.zeros(3, 2), 0.0).eq(0).all()
    mixed = torch.cat([d, -d[:1]])  # not separable: 0 is allowed, and the slack component is 0
    assert garm.fuse(mixed, 0.0)[1] == 0


def test_pareto_adjust_by_hand():
    initial = torch.tensor([1.0, 2.0, 3.0])  # mean 2, a step of .5
    trends = torch.tensor([-0.1, 0.1, 0.9])  # gains 0, .2, 2.7: the third has 93 %
    weights, settled = garm.pareto_adjust(initial, initial, trends)
    assert weights.tolist() == [1.5, 2.0, 2.25] and not settled
    kept, settled = garm.pareto_adjust(weights, initial, torch.tensor([0.0, 0.1, 0.9]))
    assert torch.equal(kept, weights) and settled  # nothing falls, be it saturated
    assert garm.pareto_adjust(initial, initial, trends, tolerance=0.2)[1]


def test_pareto_weights_stay_within_their_limit():
    weights = initial = torch.tensor([1.0, 0.0, 3.5])
    for _ in range(40):
        weights, settled = garm.pareto_adjust(
            weights, initial, torch.tensor([-1.0, -1.0, 2.0]), limit=1.0)
        assert not settled and ((weights - initial).abs() <= 1.501).all()  # the mean is 1.5
    assert weights.tolist() == pytest.approx([2.5, 1.5, 2.0], abs=1e-3)


def test_no_pareto_weight_falls_below_zero():
    low = torch.tensor([0.1, 0.0, 1.0])  # 0.1 - 2 x the mean is below 0
    weights, _ = garm.pareto_adjust(
        torch.tensor([-0.2, -0.1, 1.0]), low, torch.tensor([0.0, 0.0, -1.0]))
    assert weights[:2].tolist() == [0.0, 0.0] and weights[2] > 1


# ------------------------------------------------------------------------------------- advantages


def trl_advantages(rewards: torch.Tensor, scale_rewards: str = "group") -> torch.Tensor:
    """TRL 1.16: GRPOTrainer._generate_and_score_completions around given rewards (nan = none).

    Its generation and reward functions are replaced, its arithmetic runs as it stands.
    """
    from trl import GRPOTrainer

    n, trainer = rewards.numel(), MagicMock()
    trainer.accelerator.device, trainer.accelerator.process_index = "cpu", 0
    trainer.accelerator.gather = lambda x: x
    trainer.environment_factories = trainer.environments = trainer.tools = None
    trainer.pad_to_multiple_of, trainer._tokenizer.pad_token_id = None, 0
    trainer.mask_truncated_completions = trainer.use_vllm = trainer.log_multimodal = False
    trainer.beta, trainer.num_iterations = 0.0, 1
    trainer.args.steps_per_generation = trainer.args.gradient_accumulation_steps = 1
    trainer.args.gradient_checkpointing_kwargs = {}
    trainer.model.is_gradient_checkpointing = False
    trainer.num_generations, trainer.scale_rewards = rewards.shape[1], scale_rewards
    trainer.multi_objective_aggregation = "sum_then_normalize"
    trainer.reward_weights, trainer.reward_func_names = torch.ones(1), ["reward"]
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._pending_extra_logs, trainer._pending_metrics = {}, {}
    ids = [[1, 2]] * n
    trainer._generate.return_value = (ids, ids, None, ["x"] * n, None, {}, None, [])
    trainer._calculate_rewards.return_value = rewards.reshape(-1, 1)
    inputs = [{"prompt": "x"}] * n
    out = GRPOTrainer._generate_and_score_completions(trainer, inputs)
    return out["advantages"].view_as(rewards)


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages_equal_trl(scale):
    rewards = random(5, 10)
    rewards[1] = 1.0  # without variance
    rewards[2, 3:6] = torch.nan  # no judge answered
    ours = garm.group_advantages(rewards, ~rewards.isnan(), scale)
    theirs = trl_advantages(rewards, "group" if scale else "none")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours[1] == 0).all() and (ours[2, 3:6] == 0).all() and (ours[2] != 0).sum() == 7


def test_group_advantages_by_hand():
    ours = garm.group_advantages(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    expected = 1 / (math.sqrt(2) + 1e-4)
    assert ours.tolist() == [pytest.approx([-expected, expected]), [0, 0]]
    assert garm.group_advantages(torch.tensor([[0, 1]])).dtype == torch.float32  # a judge's 0 or 1
    assert (garm.group_advantages(torch.full((1, 10), 0.1)) == 0).all()  # .1 is no sum of its tenth


def test_what_is_no_number_is_no_reward():
    rewards = torch.tensor([[1.0, torch.nan, 3.0, torch.inf], [torch.nan] * 4])
    told = torch.tensor([[True, False, True, False], [False] * 4])
    for valid in (None, torch.ones_like(told)):
        assert torch.equal(garm.group_advantages(rewards, valid),
                           garm.group_advantages(rewards, told))
    for shape in ((2, 0), (0, 3)):
        assert garm.group_advantages(torch.zeros(shape)).shape == shape


GROUPS = arrays(np.float64, (3, 6), elements=st.integers(-20, 20).map(float))
VALID = arrays(bool, (3, 6))


@given(GROUPS, VALID, st.integers(-100, 100), st.integers(1, 50), st.permutations(range(6)))
def test_advantages_ignore_order_shift_and_scale(rewards, valid, shift, scale, order):
    rewards, valid = torch.from_numpy(rewards), torch.from_numpy(valid)
    ours = garm.group_advantages(rewards, valid)
    assert ours[~valid].eq(0).all() and ours.isfinite().all()
    for group, mine in zip(rewards, valid, strict=True):
        if len(group[mine].unique()) < 2:
            assert garm.group_advantages(group[None], mine[None]).eq(0).all()
    torch.testing.assert_close(ours.sum(1), torch.zeros(3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        garm.group_advantages(rewards[:, order], valid[:, order]), ours[:, order])
    torch.testing.assert_close(garm.group_advantages(rewards + shift, valid), ours)
    # 1e-4 in the denominator: not quite free of scale
    torch.testing.assert_close(
        garm.group_advantages(rewards * scale, valid), ours, rtol=1e-3, atol=0)
    # What is not valid may hold anything.
    spoiled = rewards.masked_fill(~valid, torch.nan)
    assert torch.equal(garm.group_advantages(spoiled, valid), ours)


# -------------------------------------------------------------------------------------- GRPO loss


def trl_loss(loss_type, logps, old_logps, ref_logps, advantages, mask, low, high, beta):
    """TRL 1.16: GRPOTrainer._compute_loss on an object without __init__, with given log-probs."""
    from trl import GRPOTrainer

    trainer = MagicMock()
    trainer._get_per_token_logps_and_entropies.return_value = logps, torch.zeros_like(logps), None
    trainer.aux_loss_enabled = trainer.use_vllm = trainer._entropy_bonus_enabled = False
    trainer.top_entropy_quantile, trainer.off_policy_mask_threshold = 1.0, None
    trainer.importance_sampling_level, trainer.loss_type = "token", loss_type
    trainer.epsilon_low, trainer.epsilon_high, trainer.beta = low, high, beta
    trainer.args.delta, trainer.args.use_bias_correction_kl = None, False
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = 1
    trainer.accelerator.num_processes, trainer.max_completion_length = 1, logps.shape[1]
    trainer.accelerator.reduce = lambda x, **_: x
    trainer.accelerator.gather = lambda x: x
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    ids = torch.zeros(logps.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": mask.int(),
        "advantages": advantages, "old_per_token_logps": old_logps,
        "ref_per_token_logps": ref_logps,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return GRPOTrainer._compute_loss(trainer, trainer.model, inputs)


def rollouts(r=6, t=8, dtype=torch.float32):
    """Log-probs far enough from the old ones that about half of the tokens are clipped."""
    logps = -random(r, t, dtype=dtype).abs()
    old, ref = (logps + 0.4 * random(r, t, seed=s, dtype=dtype) for s in (1, 2))
    mask = torch.arange(t) < torch.tensor([8, 3, 1, 5, 8, 6])[:r, None]
    return logps.requires_grad_(), old, ref, random(r, seed=3, dtype=dtype), mask


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    "loss_type, reduction", [("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "constant")]
)
def test_grpo_loss_and_gradients_equal_trl(loss_type, reduction, beta):
    logps, old, ref, advantages, mask = rollouts()
    ours = garm.grpo_loss(logps, old, ref, advantages, mask, 0.2, 0.28, beta, reduction)
    theirs = trl_loss(loss_type, logps, old, ref, advantages, mask, 0.2, 0.28, beta)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    a, b = (torch.autograd.grad(x, logps)[0] for x in (ours, theirs))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    clipped = (a == 0) & mask
    assert a.abs().max() > 1e-2 and (beta or 0 < clipped.sum() < mask.sum())


@pytest.mark.parametrize("advantage, ratio, loss, slope", [
    (1.0, 1.1, -1.1, -1.1), (1.0, 1.5, -1.3, 0), (1.0, 0.5, -0.5, -0.5),
    (-1.0, 1.5, 1.5, 1.5), (-1.0, 0.5, 0.8, 0), (-1.0, 0.9, 0.9, 0.9),
])  # fmt: skip
def test_the_clip_by_hand(advantage, ratio, loss, slope):
    """Clipped to [.8, 1.3]: a good token gains nothing above 1.3, a bad one nothing under .8."""
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    zero, mask = torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)
    ours = garm.grpo_loss(
        logps, zero, None, torch.tensor([advantage]), mask, 0.2, 0.3, 0.0, "token")
    assert ours.item() == pytest.approx(loss, abs=1e-6)
    assert torch.autograd.grad(ours, logps)[0].item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("gap", [1e3, -1e3])
def test_a_ratio_beyond_all_numbers_spoils_no_other_token(gap):
    """The clip bounds what a good token gains above it, and a bad one below; 0 times inf is 0."""
    logps = torch.tensor([[gap, 0.0]], requires_grad=True)
    args = torch.zeros(1, 2), None, torch.tensor([1.0 if gap > 0 else -1.0])
    loss = garm.grpo_loss(logps, *args, torch.ones(1, 2), 0.2, 0.2, 0.0, "token")
    assert loss.item() == pytest.approx(-(1.2 + 1) / 2 if gap > 0 else (0.8 + 1) / 2)
    assert torch.autograd.grad(loss, logps)[0].tolist() == [[0, -0.5 if gap > 0 else 0.5]]
    still = garm.grpo_loss(logps, args[0], None, torch.zeros(1), torch.ones(1, 2), 0.2, 0.2, 0.0,
                           "sequence")
    assert still == 0 and torch.autograd.grad(still, logps)[0].eq(0).all()


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_the_loss_of_nothing_is_zero(shape, reduction):
    nothing = torch.zeros(shape)
    loss = garm.grpo_loss(
        nothing, nothing, nothing, torch.zeros(shape[0]), nothing, 0.2, 0.2, 0.1, reduction)
    assert loss.item() == 0


def test_the_reductions_and_the_kl_by_hand():
    """On policy the ratio is 1, and what is left is -A + beta (e^d - d - 1), d = ref - logp."""
    logps = torch.zeros(2, 4)
    ref = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])
    advantages, mask = torch.tensor([2.0, -1.0]), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    kl = 0.5 * (math.e - 2)

    def loss(reduction):
        args = logps, logps, ref, advantages, mask, 0.2, 0.2, 0.5, reduction
        return garm.grpo_loss(*args).item()

    assert loss("sequence") == pytest.approx(((-4 + kl) / 2 + 1) / 2)
    assert loss("token") == pytest.approx((-4 + kl + 1) / 3)
    assert loss("constant") == pytest.approx((-4 + kl + 1) / 8)


@pytest.mark.parametrize("reduction", ["sequence", "token", "constant"])
def test_masked_tokens_and_rollouts_carry_nothing(reduction):
    """Whatever stands where the mask is False, the loss is the same and its gradient 0 there."""
    logps, old, ref, advantages, mask = rollouts()
    mask = mask.clone()
    mask[1] = False  # a whole rollout

    def loss(*filled):
        pairs = zip((logps, old, ref), filled, strict=True)
        args = [x.masked_fill(~mask, value) for x, value in pairs]
        args.append(advantages.masked_fill(~mask.any(1), filled[-1]))
        return garm.grpo_loss(*args, mask, 0.2, 0.2, 0.1, reduction)

    clean, spoiled = loss(0.0, 0.0, 0.0), loss(-torch.inf, torch.inf, torch.nan)
    assert torch.equal(clean, spoiled)
    leaf = logps.detach().masked_fill(~mask, -torch.inf).requires_grad_()
    garm.grpo_loss(leaf, old, ref, advantages, mask, 0.2, 0.2, 0.1, reduction).backward()
    assert leaf.grad.isfinite().all() and leaf.grad[~mask].eq(0).all() and leaf.grad[mask].any()
    nothing = garm.grpo_loss(
        logps, old, ref, advantages, torch.zeros_like(mask), 0.2, 0.2, 0.1, reduction)
    assert nothing == 0


@given(st.permutations(range(6)), st.sampled_from(["sequence", "token", "constant"]))
def test_grpo_loss_knows_no_order_of_rollouts(order, reduction):
    values = rollouts(dtype=torch.float64)
    ours = garm.grpo_loss(*values, 0.2, 0.2, 0.1, reduction)
    moved = garm.grpo_loss(*(x[order] for x in values), 0.2, 0.2, 0.1, reduction)
    torch.testing.assert_close(ours, moved)


# ---------------------------------------------------------------------- choosing among candidates


def test_rft_takes_the_three_best_distinct():
    texts = ["Use a map", "use a map!", "Add art", "Why?", "How?", "...", "Try it"]
    assert garm.rft_choice(texts, [1.0, 3.0, 2.0, math.nan, 0.5, 9.0, -1.0]) == [1, 2, 4]
    assert garm.rft_choice(texts[:2], [1.0, 3.0]) == [1]
    assert garm.rft_choice(["a", "b"], torch.tensor([0.0, 0.0])) == [0, 1]  # ties: as they came


def test_lcs_and_ngrams_by_hand():
    assert garm.lcs_ratio("a b c d".split(), "a x c d y".split()) == 3 / 4
    assert garm.lcs_ratio("a b".split(), "b a".split()) == 1 / 2
    assert garm.ngram_overlap("a b c d".split(), "a b x c d".split()) == 2 / 3
    assert garm.ngram_overlap(["a"], ["a", "b"]) == 1 and garm.ngram_overlap(["a"], ["b"]) == 0
    for alike in (garm.lcs_ratio, garm.ngram_overlap):
        assert alike([], []) == 1 and alike([], ["a"]) == 0


WORDS = st.lists(st.sampled_from("abc"), max_size=7)


@given(WORDS, WORDS)
def test_lcs_equals_brute_force(a, b):
    subsequences = [
        {tuple(x[i] for i in keep) for n in range(len(x) + 1)
         for keep in itertools.combinations(range(len(x)), n)} for x in (a, b)
    ]
    longest = max(map(len, subsequences[0] & subsequences[1]))
    if a and b:
        assert garm.lcs_ratio(a, b) == garm.lcs_ratio(b, a) == longest / min(len(a), len(b))


def test_assembly_drops_what_any_signal_calls_redundant():
    texts = [
        "Add a chart of sales", "Add chart: sales",  # subsequence
        "Plot revenue", "Which month was best?", "Was best which month?",  # bigrams
        "Draw a bar plot", "!?", "List risks",
    ]  # fmt: skip
    similarity = torch.eye(8)
    similarity[2, 0] = similarity[0, 2] = 0.9  # embedding
    assert garm.assemble(texts, similarity, count=8) == [0, 3, 5, 7]
    assert garm.assemble(texts, similarity) == [0, 3, 5]
    assert garm.assemble(texts[:3], similarity[:3, :3]) == [0]  # too few: no training instance
    loose = garm.assemble(texts, similarity, max_cosine=1, max_lcs=1, max_overlap=1, count=8)
    assert loose == [0, 1, 2, 3, 4, 5, 7]


# --------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32(dtype):
    """300^2 and e^12 overflow a half; a bfloat16 keeps two digits."""
    four = [torch.tensor([x], dtype=dtype) for x in (300.0, 300.0, -300.0, 20.0)]
    for function in (
        garm.preference_probability, garm.bhattacharyya_distance, garm.uncertainty_lower_bound,
        lambda *x: garm.gaussian_loss(*x, 0.1), lambda *x: garm.bradley_terry_loss(x[0], x[2]),
    ):  # fmt: skip
        ours = function(*four)
        assert ours.dtype == torch.float32 and ours.isfinite().all()
        assert ours.item() == pytest.approx(function(*(x.float() for x in four)).item())
    rewards = random(2, 5).to(dtype)
    assert torch.equal(garm.group_advantages(rewards), garm.group_advantages(rewards.float()))
    d = random(20, 3).to(dtype)
    assert torch.equal(garm.fuse(d, 0.1), garm.fuse(d.float(), 0.1))
    logps, old, ref, advantages, mask = (x.detach() for x in rollouts())
    args = [x.to(dtype) for x in (12 + logps, old, ref, advantages)]
    loss = garm.grpo_loss(*args, mask, 0.2, 0.2, 0.1, "token")
    assert loss == garm.grpo_loss(*(x.float() for x in args), mask, 0.2, 0.2, 0.1, "token")
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_shapes_that_do_not_fit_are_refused():
    a, b, m = torch.zeros(3), torch.zeros(3, 1), torch.ones(3, 2)
    for call in (
        lambda: garm.bradley_terry_loss(a, b),
        lambda: garm.paired_loss(a, b, a > 0),
        lambda: garm.gaussian_loss(a, a, a, b, 0.1),
        lambda: garm.preference_probability(a, a, b, a),
        lambda: garm.uncertainty_lower_bound(a, b, a, a),
        lambda: garm.log_perplexity_reward(m, b),
        lambda: garm.composite_reward(m, a),
        lambda: garm.fuse(a, 0.1),
        lambda: garm.fuse(m, -1.0),
        lambda: garm.fuse(m * torch.nan, 0.1),
        lambda: garm.pareto_adjust(a, a, b),
        lambda: garm.group_advantages(a),
        lambda: garm.group_advantages(m, b > 0),
        lambda: garm.grpo_loss(m, m, None, b, m > 0, 0.2, 0.2, 0.0, "token"),
        lambda: garm.grpo_loss(m, m, None, a, a > 0, 0.2, 0.2, 0.0, "token"),
        lambda: garm.grpo_loss(m, m, b, a, m > 0, 0.2, 0.2, 0.1, "token"),
        lambda: garm.grpo_loss(m, m, None, a, m > 0, 0.2, 0.2, 0.1, "token"),
        lambda: garm.grpo_loss(m, m, m, a, m > 0, 0.2, 0.2, 0.1, "mean"),
        lambda: garm.rft_choice(["a"], [1.0, 2.0]),
        lambda: garm.assemble(["a"], m),
        lambda: garm.click_pairs([-1]),
    ):
        with pytest.raises(ValueError, match=r"\w+: "):
            call()


def test_the_map_of_the_docs_exists():
    """docs/garm.md: each row names functions and tests that exist; no function is left out."""
    page = (ROOT / "docs" / "garm.md").read_text(encoding="utf-8")
    rows = page.partition("| paper | function | test |\n")[2].partition("\n\n")[0].splitlines()
    table = [line.split("|")[1:-1] for line in rows if line.startswith("| ")]
    named = [set(re.findall(r"`(\w+)`", cell)) for row in table for cell in row[1:]]
    functions, tests = set().union(*named[::2]), set().union(*named[1::2])
    public = {
        name for name, x in vars(garm).items()
        if inspect.isfunction(x) and x.__module__ == "garm" and not name.startswith("_")
    }  # fmt: skip
    assert functions == public
    assert tests and tests <= {name for name in globals() if name.startswith("test_")}
