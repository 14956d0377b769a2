"""The simulated online test: its metrics by hand, its statistics on tests with a known answer."""

import json
import math
from statistics import NormalDist

import numpy as np
import pytest

from config import AbConfig, WorldConfig
from tables import report
from world import ab, click_model, people

SETTINGS = WorldConfig(users=60, seed=5, starter_pool=400, impressions_per_user=1)


@pytest.fixture(scope="module")
def platform():
    made = people.World(SETTINGS)
    return made.truth, made.users


@pytest.fixture(scope="module")
def arms(platform):
    """Lists drawn at random, and lists of what the hidden truth says will be tapped."""
    truth, users = platform
    pool = people.World(SETTINGS).retrieval.pool
    best = {
        u.user_id: sorted(pool, key=lambda y, u=u: -truth.click_probabilities(u.user_id, [y])[0])
        for u in users
    }
    return {
        "deployed": people.retrieved_lists(SETTINGS, users, 3, 0),
        "random": _random(pool, users, 0),
        "again": _random(pool, users, 1),
        "oracle": {u: [rows[i:15:3] for i in range(3)] for u, rows in best.items()},
    }


def _random(pool, users, seed):
    rng = np.random.default_rng(seed)
    return {u.user_id: rng.choice(pool, (3, 5), replace=False).tolist() for u in users}


def _run(platform, arms, seed=0, **settings):
    truth, users = platform
    settings = AbConfig(**{"copies": 1} | settings)
    return ab.simulate(truth, {u.user_id: 0.5 for u in users}, arms, settings, seed)


# ------------------------------------------------------------------------------------- simulation


class SureTruth:
    """Taps what begins with "tap" and nothing else; "tap 1" resonates wholly."""

    users = {"u1": {}, "u2": {}}

    def __init__(self):
        self.asked = []

    def click_probabilities(self, user_id, starters, asked_since):
        self.asked.append(set(asked_since))
        return np.array([float(y.startswith("tap")) for y in starters])

    def resonance(self, user_id, text):
        return float(text == "tap 1")


def test_a_life_in_which_nothing_is_left_to_chance(monkeypatch):
    """u1 comes every day and taps two of three starters, u2 never comes."""
    monkeypatch.setattr(ab, "further_sessions", lambda resonance: 0.0)
    truth, lists = SureTruth(), {"u1": [["tap 1?", "no", "tap 2"]], "u2": [["tap 1"]]}
    made = ab.simulate(truth, {"u1": 1e9, "u2": 0.0}, {"a": lists}, AbConfig(days=14), seed=0)
    counts = {"active_days": 14, "started_days": 14, "sessions": 28, "taps": 28, "shown": 42}
    assert made["arms"]["a"]["users"] == {"u1": counts, "u2": dict.fromkeys(counts, 0)}
    assert made["arms"]["a"]["by_day"]["taps"] == [1.0] * 14
    assert truth.asked == [set(), {"tap 1", "tap 2"}]  # no longer new from the second day on
    values = ab.metrics([made], "a")
    expected = {"Active": 3.5, "Avg.S": 14, "CTR": 28 / 42, "CSR": 1, "Taps": 2}
    assert values == pytest.approx(expected)


def test_without_a_tap_four_in_five_start_a_conversation_of_their_own():
    lists = {"a": {"u1": [["no"]]}, "nothing to show": {"u1": []}}
    made = ab.simulate(SureTruth(), {"u1": 1e9}, lists, AbConfig(days=2000), seed=0)
    values = ab.metrics([made], "a")
    assert values["CTR"] == 0 and values["CSR"] == pytest.approx(ab.UNAIDED, abs=0.03)
    assert values["Avg.S"] == 2000 * values["CSR"]
    assert ab.metrics([made], "nothing to show") == values | {"CTR": None}


def test_a_tap_leads_to_as_many_further_sessions_as_in_the_log():
    gaps = [ab._draws("u1", day, 5, 0)[2] for day in range(4000)]
    for resonance in (0.0, 1.0):
        mean = click_model.further_sessions(resonance)
        further = [(g < mean).sum() for g in gaps]
        assert np.mean(further) == pytest.approx(mean, abs=5 * math.sqrt(mean / 4000))
        assert np.var(further) == pytest.approx(mean, rel=0.15)  # as a Poisson draw has


def test_what_resonates_brings_people_back_and_goodwill_fades(monkeypatch):
    draws = (0.0, 0.0, np.full(24, 9.0), np.full(1, 0.5))
    person, cache = ab.Person("u1", 1.0, [["tap 1"]]), {}
    for _ in range(40):
        person.day(SureTruth(), draws, cache)
    assert person.goodwill == ab.GOODWILL_CAP
    for _ in range(7):  # draws that bring nobody
        assert not any(person.day(SureTruth(), (1.0, *draws[1:]), cache))
    assert person.goodwill == pytest.approx(ab.GOODWILL_CAP / 2)
    neutral = ab.Person("u1", 1.0, [["tap 2"]])
    neutral.day(SureTruth(), draws, {})
    assert neutral.goodwill == 0
    visit = (0.65, *draws[1:])  # between 1 - exp(-1) and 1 - exp(-1.25)
    assert person.day(SureTruth(), visit, cache)[0] == 1
    assert neutral.day(SureTruth(), visit, {})[0] == 0


def test_lists_are_shown_in_turn_and_no_more_than_asked_for():
    truth, lists = SureTruth(), {"a": {"u1": [["one"], ["two", "2"], ["three", "3", "3"]]}}
    shown = [
        ab.simulate(truth, {"u1": 1e9}, lists, AbConfig(days=6, lists=n, copies=m), 0)["arms"]["a"]
        for n, m in ((2, 1), (3, 1), (3, 2))  # a second life begins with the second list
    ]
    assert [x["by_day"]["shown"] for x in shown] == [
        [1, 2, 1, 2, 1, 2], [1, 2, 3, 1, 2, 3], [1.5, 2.5, 2, 1.5, 2.5, 2]
    ]  # fmt: skip


def test_the_same_lists_give_the_same_lives_whatever_the_order_of_arms(platform, arms):
    truth, _ = platform
    state = json.dumps(truth.users)
    made = _run(platform, arms | {"copy": arms["oracle"]}, days=14)
    assert made["arms"]["copy"] == made["arms"]["oracle"] != made["arms"]["random"]
    turned = _run(platform, dict(reversed(arms.items())), days=14)
    assert turned["arms"] == {arm: made["arms"][arm] for arm in arms}
    assert json.dumps(truth.users) == state  # what is asked in the test stays in the test
    longer = _run(platform, {"random": arms["random"]}, days=20)["arms"]["random"]["by_day"]
    assert longer["taps"][:14] == made["arms"]["random"]["by_day"]["taps"]
    assert _run(platform, arms, seed=1, days=14)["arms"] != turned["arms"]
    lifts = [ab.lifts([x]) for x in (made, turned)]
    assert lifts[1] == {arm: lifts[0][arm] for arm in lifts[1]}
    none = ab.lifts([made], "oracle")["copy"]
    assert all((x["lift"], x["interval"], x["p"]) == (0, [0, 0], 1) for x in none.values())
    json.dumps([made, lifts], allow_nan=False)


def test_a_life_begins_without_what_another_tapped():
    truth = SureTruth()
    lists = {"a": {"u1": [["tap 1"]]}}
    made = ab.simulate(truth, {"u1": 1e9}, lists, AbConfig(days=1, copies=3), seed=0)
    assert truth.asked == [set()] and made["arms"]["a"]["users"]["u1"]["taps"] == 1


def test_a_person_counts_once_with_the_mean_of_several_lives(platform, arms):
    once, twice = (_run(platform, arms, days=7, copies=n)["arms"]["random"] for n in (1, 2))
    other = {
        user: {name: 2 * x - once["users"][user][name] for name, x in counts.items()}
        for user, counts in twice["users"].items()
    }
    values = [x for counts in other.values() for x in counts.values()]
    assert min(values) >= 0 and all(x == round(x) for x in values)  # those of the second life
    assert other != once["users"]


def test_what_cannot_be_compared_is_refused(platform, arms):
    with pytest.raises(ValueError, match="same users"):
        _run(platform, arms | {"few": {"u1": [["x"]]}})
    with pytest.raises(ValueError, match="activity"):
        ab.simulate(platform[0], {}, arms, AbConfig(), 0)


# ------------------------------------------------------------------------------- metrics and lifts


def _result(**arms):
    """arm -> rows of COUNTS."""
    return {
        "days": 7,
        "seed": 0,
        "arms": {
            arm: {"users": {f"u{i}": dict(zip(ab.COUNTS, x, strict=True)) for i, x in enumerate(r)}}
            for arm, r in arms.items()
        },
    }


def test_metrics_and_lifts_by_hand():
    made = _result(
        deployed=[(2, 1, 1, 0, 10), (4, 2, 3, 1, 20), (0, 0, 0, 0, 0)],
        ours=[(3, 3, 5, 2, 15), (3, 2, 3, 1, 15), (0, 0, 0, 0, 0)],
    )
    assert ab.metrics([made], "deployed") == pytest.approx(
        {"Active": 2, "Avg.S": 4 / 3, "CTR": 1 / 30, "CSR": 1 / 2, "Taps": 1 / 6}
    )
    assert ab.metrics([made], "ours") == pytest.approx(
        {"Active": 2, "Avg.S": 8 / 3, "CTR": 1 / 10, "CSR": 5 / 6, "Taps": 1 / 2}
    )
    lifts = ab.lifts([made])["ours"]
    assert [x["lift"] for x in lifts.values()] == pytest.approx([0, 1000, 2000, 2000 / 3, 2000])
    assert lifts["Active"]["p"] == 1
    # sessions: differences 4, 0, 0; mean 4/3, standard error 4/3
    assert lifts["Avg.S"]["p"] == pytest.approx(math.erfc(1 / math.sqrt(2)))
    # two seeds: sums over both
    both = ab.metrics([made, _result(deployed=[(1, 1, 1, 1, 10)], ours=[])], "deployed")
    assert both["CTR"] == pytest.approx(2 / 40) and both["Active"] == pytest.approx(7 / 4)


def test_cumulative_figures_by_hand():
    lives = np.zeros((2, 2, len(ab.COUNTS)))  # two people, two days
    lives[..., ab.COUNTS.index("shown")] = 5
    lives[0, :, ab.COUNTS.index("taps")] = 1
    lives[:, :, ab.COUNTS.index("sessions")] = [[1, 1], [3, 1]]
    made = ab._summary(["u1", "u2"], lives)["cumulative"]
    assert made["ctr"] == [0.1, 0.1] and made["sessions"] == [2.0, 3.0]
    assert made["ctr_error"] == pytest.approx([0.1 / 2**0.5] * 2)
    assert made["sessions_error"] == pytest.approx([1 / 2**0.5, 1 / 2**0.5])


def test_delta_method_and_bootstrap_agree():
    rng = np.random.default_rng(0)
    shown = 5 * rng.integers(1, 9, (2, 400))
    taps = rng.binomial(shown, [[0.10], [0.12]])
    rows = [[(1, 1, 1, *x) for x in zip(*y, strict=True)] for y in zip(taps, shown, strict=True)]
    made = _result(deployed=rows[0], ours=rows[1])
    figures = ab.lifts([made], bootstrap=4000)["ours"]["CTR"]
    low, high = figures["interval"]
    ours, deployed = (ab._samples([made], arm, 4000)[1:, 2] for arm in ("ours", "deployed"))
    z = (figures["value"] - figures["control"]) / (ours - deployed).std()
    # in standard errors of the gap, which the bootstrap knows to about 1 %
    assert NormalDist().inv_cdf(1 - figures["p"] / 2) == pytest.approx(z, rel=0.05)
    beaten, interval = ab.beats([made], "ours", "deployed", "CTR")
    assert beaten == figures["lift"] and interval == pytest.approx([low, high], rel=0.2)
    assert ab.beats([made], "deployed", "ours", "CTR")[0] == -beaten


def test_where_control_has_nothing_there_is_no_lift():
    made = _result(
        deployed=[(1, 1, 1, 0, 5), (1, 1, 1, 0, 5)], ours=[(1, 1, 1, 1, 5), (1, 1, 1, 0, 5)]
    )
    figures = ab.lifts([made])["ours"]["CTR"]
    assert figures == {"value": 0.1, "control": 0.0, "lift": None, "interval": None, "p": None}
    assert math.isnan(ab.beats([made], "ours", "deployed", "CTR")[0])
    zero = "+0.00 [+0.00, +0.00]"
    assert ab.table_rows(ab.lifts([made]))[0][:4] == ["ours", zero, zero, "–"]


def test_the_oracle_beats_random_lists_in_every_metric(platform, arms):
    made = [_run(platform, arms, seed) for seed in range(3)]
    lifts = ab.lifts(made, "random")
    for metric in ab.METRICS:
        assert lifts["oracle"][metric]["interval"][0] > 0 and lifts["oracle"][metric]["p"] < 0.05
        value, (low, high) = ab.beats(made, "oracle", "random", metric)
        assert 0 < low < value < high
    text = report.lift_tables(made)
    assert "| oracle | +" in text and "* [+" in text
    assert "| IceBreaker | +1.84* | +1.59* | +94.25* | +1.27* | – |" in text


def test_two_arms_of_random_lists_hold_zero_in_their_interval(platform, arms):
    lifts = ab.lifts([_run(platform, arms, days=14)], "random")["again"]
    assert all(x["interval"][0] <= 0 <= x["interval"][1] for x in lifts.values())


@pytest.mark.slow
def test_of_a_hundred_tests_without_a_difference_about_five_are_positive(platform, arms):
    truth, users = platform
    pool = sorted({y for rows in arms["random"].values() for x in rows for y in x})
    positive = np.zeros((100, len(ab.METRICS)))
    outside = np.zeros_like(positive)
    for seed in range(100):
        lists = {name: _random(pool, users, [seed, i]) for i, name in enumerate(("deployed", "b"))}
        made = _run(platform, lists, seed, days=14)
        for i, x in enumerate(ab.lifts([made], bootstrap=200)["b"].values()):
            positive[seed, i] = x["p"] < 0.05
            outside[seed, i] = not x["interval"][0] <= 0 <= x["interval"][1]
    # 100 draws of one in twenty: above 12 in one draw in 700; five metrics, hence the mean too
    assert positive.sum(0).max() <= 13 and 0.02 <= positive.mean() <= 0.09
    assert outside.mean() <= 0.11  # percentile intervals of 30 to 60 people are a little narrow
