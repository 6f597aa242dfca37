"""Intervals and tests against scipy, statsmodels and published examples; properties; coverage in simulation."""

import itertools
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from aletheia.errors import StatisticsError
from aletheia.lab.statistics.margins import non_inferiority, non_inferiority_of_items, score_bound, smallest_margin
from aletheia.lab.statistics.means import crossed_mean, geometric_mean_of_few, mean
from aletheia.lab.statistics.paired import holm, sign_flip_test, wilcoxon_test
from aletheia.lab.statistics.rates import proportion, win_rate
from aletheia.lab.statistics.ratios import geometric_mean, ratio_of_times

# Darwin's plants: crossed minus self-fertilised, eighths of an inch (Fisher 1935, The Design of Experiments, ch. III)
DARWIN = [49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48]
ALTERNATIVES = ("two-sided", "greater", "less")
# items per cluster, as uneven as MMLU's 57 subjects: the largest has 1,534 of 14,042
SUBJECT_SIZES = (1534, 895, 783, 612, 545, 498, 390, 378, 346, 324, 311, 306, *(240,) * 9, *(140,) * 16, *(105,) * 20)

finite = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda value: round(value, 6))
times = st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=8, max_size=12)
p_values = st.dictionaries(st.text(max_size=5), st.floats(0, 1), max_size=8)


def noisy_rounds(draw, n, common=0.3, own=0.05, ratio=1.5):
    """Times of a baseline and an arm: lognormal, with noise that both share in a round and noise of their own."""
    shared = draw.normal(0, common, n)
    return ratio * np.exp(shared + draw.normal(0, own, n)), np.exp(shared + draw.normal(0, own, n))


def covers(interval, truth):
    return interval.low <= truth <= interval.high


# --- ratios of times


def expanded_bca_by_hand(logs, quantile, resamples=200_000):
    """BCa of a mean written out from Efron and Tibshirani 1993, eq. 14.10 to 14.15, at a given normal quantile."""
    n = len(logs)
    means = np.random.default_rng(99).choice(logs, (resamples, n)).mean(axis=1)
    bias = stats.norm.ppf((means < logs.mean()).mean())
    left_out = (logs.sum() - logs) / (n - 1)
    spread = left_out.mean() - left_out
    acceleration = (spread**3).sum() / (6 * (spread**2).sum() ** 1.5)
    ends = [bias + sign * quantile for sign in (-1, 1)]
    return np.quantile(means, [stats.norm.cdf(bias + end / (1 - acceleration * end)) for end in ends])


def test_geometric_mean_is_bca_with_hesterbergs_levels():
    ratios = np.exp(np.random.default_rng(3).gamma(2, 0.2, 12))
    found = geometric_mean(ratios)
    assert found.value == pytest.approx(stats.gmean(ratios))
    quantile = math.sqrt(12 / 11) * stats.t.ppf(0.975, 11)
    by_hand = np.exp(expanded_bca_by_hand(np.log(ratios), quantile))
    assert [found.interval.low, found.interval.high] == pytest.approx(by_hand, rel=0.01)
    plain = np.exp(expanded_bca_by_hand(np.log(ratios), stats.norm.ppf(0.975)))
    assert plain[1] / plain[0] < 0.97 * found.interval.high / found.interval.low


def test_ratio_of_times_is_the_plain_bca_of_scipy_where_there_are_many_rounds():
    baseline, arm = noisy_rounds(np.random.default_rng(4), 1500, common=0.1)
    found = ratio_of_times(baseline, arm)
    plain = stats.bootstrap(
        (baseline, arm), lambda a, b, axis=-1: a.sum(axis) / b.sum(axis), paired=True, vectorized=True, method="BCa",
        batch=500, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    width = plain.high - plain.low
    assert found.value == pytest.approx(baseline.sum() / arm.sum())
    assert [found.interval.low, found.interval.high] == pytest.approx(list(plain), abs=0.05 * width)


def test_noise_common_to_both_arms_cancels():
    draw = np.random.default_rng(6)
    calm, busy = (ratio_of_times(*noisy_rounds(draw, 20, common)).interval for common in (0.0, 0.4))
    assert busy.high - busy.low < 2 * (calm.high - calm.low)


def test_intervals_repeat_by_seed():
    baseline, arm = noisy_rounds(np.random.default_rng(7), 10)
    assert ratio_of_times(baseline, arm, seed=1) == ratio_of_times(baseline, arm, seed=1)
    assert ratio_of_times(baseline, arm, seed=1) != ratio_of_times(baseline, arm, seed=2)
    assert geometric_mean(baseline, seed=1) == geometric_mean(baseline, seed=1)


@settings(max_examples=25)
@given(times, st.floats(0.01, 100), st.integers(0, 3))
def test_a_ratio_scales_with_the_unit_and_turns_over_with_its_arms(rounds, scale, seed):
    baseline, arm = np.array(rounds).T
    found = ratio_of_times(baseline, arm, seed=seed)
    scaled = ratio_of_times(baseline * scale, arm, seed=seed)
    swapped = ratio_of_times(arm, baseline, seed=seed)
    assert scaled.value == pytest.approx(scale * found.value)
    assert swapped.value == pytest.approx(1 / found.value)
    if found.interval is None:
        assert found.reason
        return
    assert 0 < found.interval.low <= found.interval.high
    assert scaled.interval.low == pytest.approx(scale * found.interval.low)
    assert scaled.interval.high == pytest.approx(scale * found.interval.high)
    assert swapped.interval.low == pytest.approx(1 / found.interval.high)
    assert swapped.interval.high == pytest.approx(1 / found.interval.low)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_no_bootstrap_interval_is_made_from_too_few(n):
    found = ratio_of_times([2.0] * n, list(range(1, n + 1)))
    assert (found.interval, found.n) == (None, n)
    assert "at least 8" in found.reason
    assert "at least 8" in geometric_mean(list(range(1, n + 1))).reason


def test_degenerate_rounds_give_a_ratio_and_a_reason_but_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        arm = np.random.default_rng(8).lognormal(size=20)
        for found in (ratio_of_times(arm * 3, arm), ratio_of_times([3.0] * 20, [1.0] * 20), geometric_mean([3.0] * 20)):
            assert found.value == pytest.approx(3)
            assert found.interval is None
            assert "equal" in found.reason
        assert "too few" in ratio_of_times(arm[:8], arm[8:16], level=0.999).reason
        one_differs = ratio_of_times([3.0] * 7 + [4.0], [1.0] * 8).interval
        assert 3 <= one_differs.low < 25 / 8 < one_differs.high <= 4


def test_geometric_mean_of_few_is_students_t_of_logarithms():
    ratios = [1.5, 1.8, 2.1]
    found = geometric_mean_of_few(ratios)
    low, high = stats.ttest_1samp(np.log(ratios), 0).confidence_interval(0.95)
    assert found.value == pytest.approx(stats.gmean(ratios))
    assert (found.interval.low, found.interval.high) == pytest.approx((math.exp(low), math.exp(high)))
    assert geometric_mean_of_few([1.5]).interval is None


def coverage_of_ratio(n, runs, common=0.3, own=0.05, seed=11):
    draw = np.random.default_rng(seed)
    return np.mean([covers(ratio_of_times(*noisy_rounds(draw, n, common, own)).interval, 1.5) for _ in range(runs)])


def coverage_of_geometric_mean(n, runs, seed=12):
    draw = np.random.default_rng(seed)
    return np.mean([covers(geometric_mean(np.exp(draw.normal(0, 0.1, n))).interval, 1) for _ in range(runs)])


def test_bootstrap_intervals_cover_at_the_smallest_sizes():
    assert 0.93 <= coverage_of_ratio(8, 300) <= 0.97
    assert 0.93 <= coverage_of_geometric_mean(9, 300) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, 12, 20, 40])
@pytest.mark.parametrize(("common", "own"), [(0.3, 0.05), (0.15, 0.1), (0.6, 0.05)])
def test_ratio_of_times_covers(n, common, own):
    assert 0.93 <= coverage_of_ratio(n, 2000, common, own) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("n", [9, 12, 18, 27])
def test_geometric_mean_covers(n):
    assert 0.93 <= coverage_of_geometric_mean(n, 3000) <= 0.97


# --- paired tests


def test_sign_flips_of_darwins_plants_are_fishers():
    """Fisher 1935, sec. 21: of 32,768 sums 863 reach the observed one."""
    assert sign_flip_test(DARWIN, "greater").p_value == 863 / 2**15
    assert sign_flip_test(DARWIN).p_value == 2 * 863 / 2**15
    assert sign_flip_test(DARWIN).exact


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("shift", [0.0, 0.8])
def test_sign_flips_are_scipys_permutations(alternative, shift):
    differences = np.random.default_rng(1).normal(shift, 1, 10)
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", alternative=alternative, n_resamples=2000
    )
    assert sign_flip_test(differences, alternative).p_value == pytest.approx(expected.pvalue)


def test_drawn_flips_agree_with_all_of_them(monkeypatch):
    differences = np.random.default_rng(2).normal(0.4, 1, 18)
    every = sign_flip_test(differences)
    monkeypatch.setattr("aletheia.lab.statistics.paired.MOST_EXACT", 17)
    drawn = sign_flip_test(differences, seed=1)
    assert (every.exact, drawn.exact) == (True, False)
    assert drawn.p_value == pytest.approx(every.p_value, abs=0.01)
    assert drawn == sign_flip_test(differences, seed=1)
    assert sign_flip_test([1.0] * 40).p_value == 1 / 10_001  # the observed flip counts: never 0


@given(st.lists(finite, min_size=1, max_size=10), st.floats(0.001, 1000))
def test_p_values_are_above_zero_and_do_not_depend_on_unit_order_or_side(differences, scale):
    for test in (sign_flip_test, wilcoxon_test):
        found = {alternative: test(differences, alternative).p_value for alternative in ALTERNATIVES}
        turned = [-difference for difference in differences]
        assert all(0 < p_value <= 1 for p_value in found.values())
        assert found["greater"] == test(turned, "less").p_value
        assert found["two-sided"] == test(turned).p_value
        assert found["two-sided"] == test(differences[::-1]).p_value
        assert found["greater"] + found["less"] >= 1
        assert found["two-sided"] == pytest.approx(min(1, 2 * min(found["greater"], found["less"])))
    scaled = [difference * scale for difference in differences]
    assert sign_flip_test(scaled).p_value == sign_flip_test(differences).p_value


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize(("n", "exact"), [(9, True), (30, True), (80, False)])
def test_wilcoxon_is_scipys(alternative, n, exact):
    differences = np.random.default_rng(n).normal(0.2, 1, n)
    found = wilcoxon_test(differences, alternative)
    method = "exact" if exact else "asymptotic"
    expected = stats.wilcoxon(differences, alternative=alternative, method=method).pvalue
    assert (found.p_value, found.exact) == (pytest.approx(expected), exact)


def test_wilcoxon_is_exact_with_ties_and_drops_zeros():
    differences = [1, 1, -1, 2, 2, 3, -2, 4, 0, 0]
    ranks = stats.rankdata(np.abs(differences[:8])) * np.sign(differences[:8])
    sums = [np.dot(signs, np.abs(ranks)) for signs in itertools.product((1, -1), repeat=8)]
    found = wilcoxon_test(differences, "greater")
    assert found.p_value == np.mean(np.array(sums) >= ranks.sum())
    assert (found.n, found.exact) == (10, True)
    assert wilcoxon_test([0.0, 0.0]).p_value == 1


def test_false_positives_of_the_paired_tests_stay_at_their_level():
    draw = np.random.default_rng(21)
    for n in (9, 12):
        for test in (sign_flip_test, wilcoxon_test):
            rate = np.mean([test(draw.laplace(size=n)).p_value <= 0.05 for _ in range(1000)])
            assert 0.03 <= rate <= 0.06
    rate = np.mean([sign_flip_test(draw.laplace(size=27), seed=run).p_value <= 0.05 for run in range(400)])
    assert 0.02 <= rate <= 0.06


def test_holm_is_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    draw = np.random.default_rng(9)
    for size in (1, 3, 8):
        raw = {f"arm {number}": p_value for number, p_value in enumerate(draw.random(size) ** 3)}
        expected = multitest.multipletests(list(raw.values()), method="holm")[1]
        assert list(holm(raw).values()) == pytest.approx(list(expected))


@given(p_values)
def test_holm_keeps_the_order_of_arms_and_of_p_values(raw):
    found = holm(raw)
    assert list(found) == list(raw)
    assert all(raw[arm] <= found[arm] <= 1 for arm in raw)
    by_raw = sorted(raw, key=lambda arm: raw[arm])
    assert all(found[first] <= found[second] for first, second in itertools.pairwise(by_raw))


def test_holm_keeps_the_family_wise_error():
    """Six arms that share a baseline; none differs from it."""
    draw = np.random.default_rng(22)
    errors, uncorrected = 0, 0
    for _ in range(600):
        arms = draw.normal(size=(6, 10)) - draw.normal(size=10)
        raw = {number: sign_flip_test(arm).p_value for number, arm in enumerate(arms)}
        errors += min(holm(raw).values()) <= 0.05
        uncorrected += min(raw.values()) <= 0.05
    assert 0.01 <= errors / 600 <= 0.06 < uncorrected / 600


# --- shares


def test_proportions_are_statsmodels_wilson_intervals():
    statsmodels = pytest.importorskip("statsmodels.stats.proportion")
    for successes, n in ((0, 5), (5, 5), (81, 263), (7, 9)):
        found = proportion(successes, n, 0.9)
        expected = statsmodels.proportion_confint(successes, n, alpha=0.1, method="wilson")
        assert found.value == successes / n
        assert (found.interval.low, found.interval.high) == pytest.approx(expected, abs=1e-12)


def test_wilson_of_newcombe():
    """Newcombe 1998 (Statistics in Medicine 17:857-872, table I): 81 of 263 gives 0.2553 to 0.3662."""
    interval = proportion(81, 263).interval
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


def test_a_tie_is_no_win():
    assert win_rate([0.1, -0.2, 0.0, 3.0]) == proportion(2, 4)


def test_wilson_covers_on_average():
    """Exact, not simulated: over true shares from 5 to 95 % its mean coverage is 95 %, as Brown et al. 2001 show."""
    shares = np.linspace(0.05, 0.95, 181)
    for n in (9, 27):
        intervals = [proportion(successes, n).interval for successes in range(n + 1)]
        chances = stats.binom.pmf(np.arange(n + 1)[:, None], n, shares)
        inside = np.array([[covers(interval, share) for share in shares] for interval in intervals])
        assert 0.93 <= (chances * inside).sum(axis=0).mean() <= 0.97


# --- means, clustered or not


def test_the_mean_of_darwins_plants_is_fishers():
    """Fisher 1935, sec. 17: mean 20.933, t = 2.148 with 14 degrees of freedom; 2.145 is the 5 % point."""
    found = mean(DARWIN)
    half = found.value * 2.145 / 2.148
    assert found.value == pytest.approx(20.933, abs=5e-4)
    assert (found.interval.low, found.interval.high) == pytest.approx(
        (found.value - half, found.value + half), abs=0.02
    )


def test_a_small_unit_is_not_taken_for_no_spread():
    assert mean([1e-14, 2e-14, 4e-14]).interval.high == pytest.approx(1e-14 * mean([1, 2, 4]).interval.high)


def test_clustered_mean_is_statsmodels_ols():
    regression = pytest.importorskip("statsmodels.regression.linear_model")
    draw = np.random.default_rng(31)
    clusters = draw.integers(0, 12, 200)
    differences = draw.integers(-1, 2, 200) + 0.3 * draw.normal(size=12)[clusters]
    fit = regression.OLS(differences, np.ones(200)).fit(
        cov_type="cluster", cov_kwds={"groups": clusters, "use_correction": True}, use_t=True
    )
    found = mean(differences, [f"subject {number}" for number in clusters])
    assert found.value == pytest.approx(fit.params[0])
    assert (found.interval.low, found.interval.high) == pytest.approx(tuple(fit.conf_int()[0]))


@given(st.lists(finite, min_size=2, max_size=30), st.permutations(range(30)))
def test_clusters_of_one_are_no_clusters_and_order_does_not_matter(values, order):
    plain, single = mean(values), mean(values, range(len(values)))
    assert (plain.interval is None) == (single.interval is None)
    if plain.interval is not None:
        assert single.interval.low == pytest.approx(plain.interval.low, rel=1e-6, abs=1e-6)
        shuffled = mean([values[place] for place in order if place < len(values)])
        assert shuffled.interval.high == pytest.approx(plain.interval.high, rel=1e-6, abs=1e-6)


def test_copies_of_items_add_no_certainty_within_clusters():
    values = np.random.default_rng(32).normal(size=20)
    clusters = [number // 2 for number in range(20)]
    once, thrice = mean(values, clusters).interval, mean(np.tile(values, 3), clusters * 3).interval
    assert thrice.high == pytest.approx(once.high)


@pytest.mark.parametrize(
    ("values", "clusters", "words"),
    [
        ([0.5], None, "one value"),
        ([0.1] * 3, None, "equal"),
        ([1, 2, 3], ["a"] * 3, "one cluster"),
        ([1, -1, 2, -2], ["a", "a", "b", "b"], "spread"),
    ],
)
def test_no_interval_is_made_up_for_a_mean(values, clusters, words):
    found = mean(values, clusters)
    assert found.interval is None
    assert words in found.reason
    verdict = non_inferiority(values, 0.1, clusters)
    assert verdict.verdict == "cannot be shown at this size"
    assert verdict.reason == found.reason


def subjects(draw, scale):
    """Paired differences of items, right or wrong, whose subjects lean to one arm or the other; their clusters."""
    clusters = np.repeat(np.arange(len(SUBJECT_SIZES)), np.maximum(np.array(SUBJECT_SIZES) // scale, 1))
    lean = draw.uniform(-0.04, 0.04, len(SUBJECT_SIZES))[clusters]
    chance = draw.random(len(clusters))
    return (chance < 0.05 + lean).astype(float) - (chance > 0.95 + lean), clusters


def test_means_cover():
    draw = np.random.default_rng(33)
    for n in (3, 9):
        assert 0.93 <= np.mean([covers(mean(draw.normal(size=n)).interval, 0) for _ in range(1000)]) <= 0.97
    runs = [mean(*subjects(draw, 10)) for _ in range(800)]
    assert 0.93 <= np.mean([covers(run.interval, 0) for run in runs]) <= 0.97
    plain = [mean(subjects(draw, 10)[0]) for _ in range(200)]
    assert np.mean([covers(run.interval, 0) for run in plain]) < 0.93  # the clusters are not for show


# --- margins


@given(st.lists(finite, min_size=2, max_size=12), st.floats(0.01, 100))
def test_non_inferiority_is_a_t_test_against_the_margin(differences, margin):
    found = non_inferiority(differences, margin)
    if found.low is None:
        return
    p_value = stats.ttest_1samp(differences, -margin, alternative="greater").pvalue
    if abs(p_value - 0.05) > 1e-6:
        assert (found.verdict == "shown") == (p_value < 0.05)
    if found.verdict == "cannot be shown at this size":
        assert margin <= found.smallest_margin
        centred = np.array(differences) - np.mean(differences)
        assert non_inferiority(centred, margin).verdict == found.verdict or margin > 0.999 * found.smallest_margin


def test_the_three_verdicts():
    spread = np.array([-0.02, 0.02, -0.01, 0.01, 0.0])  # half-width 0.015
    assert non_inferiority(spread, 0.02).verdict == "shown"
    assert non_inferiority(spread - 0.01, 0.02).verdict == "not shown"
    assert non_inferiority(spread, 0.01).verdict == "cannot be shown at this size"
    assert non_inferiority(spread + 0.02, 0.01).verdict == "shown"


def test_the_score_bound_is_tangos():
    """Fagerland, Lydersen and Laake 2014 (Statistics in Medicine 33:2850-2875), data of Bentur et al. 2009.

    Of 21 children 1 changed one way and 7 the other: difference -0.286, Tango's 95 % interval -0.517 to -0.026.
    """
    assert round(score_bound(1, 7, 21, 0.975), 3) == -0.517
    assert round(-score_bound(7, 1, 21, 0.975), 3) == -0.026


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 200))
def test_the_score_bound_at_zero_is_mcnemars_test(gained, lost, same):
    n = gained + lost + same
    if n == 0:
        return
    bound = score_bound(gained, lost, n)
    assert -1 <= bound <= (gained - lost) / n
    mcnemar = (gained - lost) - stats.norm.ppf(0.95) * math.sqrt(gained + lost)
    if abs(mcnemar) > 1e-6:
        assert (bound > 0) == (mcnemar > 0)


def test_no_change_at_all_is_no_certainty():
    right = np.arange(164) % 3 == 0
    found = non_inferiority_of_items(right, right, 0.01)
    quantile = stats.norm.ppf(0.95) ** 2
    assert found.low == pytest.approx(-quantile / (164 + quantile), abs=1e-6)  # Wilson's bound of 0 of 164
    assert found.verdict == "cannot be shown at this size"
    assert non_inferiority_of_items(right, right, 0.02).verdict == "shown"


@pytest.mark.parametrize(
    ("n", "discordance", "usual_points", "score_points"),
    [(164, 0.05, 2.87, 3.26), (1319, 0.10, 1.43, 1.44), (14042, 0.05, 0.31, 0.31)],
)
def test_smallest_margins_of_the_benchmarks(n, discordance, usual_points, score_points):
    """HumanEval, GSM8K and MMLU."""
    assert 100 * smallest_margin(n, discordance) == pytest.approx(score_points, abs=0.005)
    assert 164.485 * math.sqrt(discordance / n) == pytest.approx(usual_points, abs=0.005)


def items(draw, n, gained, lost):
    """Right or wrong answers of the baseline and of an arm that gains and loses these shares of all items."""
    kind = draw.choice(4, n, p=[gained, lost, 0.4, 0.6 - gained - lost])
    return np.isin(kind, [1, 2]), np.isin(kind, [0, 2])


@pytest.mark.parametrize(("n", "gained", "lost"), [(164, 0.01, 0.04), (164, 0.0, 0.03), (1319, 0.043, 0.057)])
def test_items_at_the_margin_are_rarely_called_non_inferior(n, gained, lost):
    draw = np.random.default_rng(41)
    margin = lost - gained
    shown = [non_inferiority_of_items(*items(draw, n, gained, lost), margin).verdict == "shown" for _ in range(1000)]
    assert 0.005 <= np.mean(shown) <= 0.06


def test_differences_at_the_margin_are_rarely_called_non_inferior():
    draw = np.random.default_rng(42)
    for n in (3, 9, 27):
        shown = [non_inferiority(draw.normal(-0.5, 1, n), 0.5).verdict == "shown" for _ in range(1000)]
        assert 0.035 <= np.mean(shown) <= 0.06


def test_clustered_items_at_the_margin_are_rarely_called_non_inferior():
    draw = np.random.default_rng(43)
    shown = []
    for _ in range(600):
        differences, clusters = subjects(draw, 10)
        differences[(differences == 0) & (draw.random(len(differences)) < 0.02 / 0.9)] = -1
        verdict = non_inferiority_of_items(differences < 0, differences > 0, 0.02, clusters)
        shown.append(verdict.verdict == "shown")
    assert 0.01 <= np.mean(shown) <= 0.06


def test_clusters_only_lower_the_bound_of_items():
    baseline, arm = items(np.random.default_rng(44), 200, 0.05, 0.05)
    plain = non_inferiority_of_items(baseline, arm, 0.05)
    for size in (1, 4, 100, 200):
        clustered = non_inferiority_of_items(baseline, arm, 0.05, [number // size for number in range(200)])
        assert clustered.low <= plain.low
        assert clustered.smallest_margin >= plain.smallest_margin


# --- what is refused


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ratio_of_times([], []), "found no value"),
        (lambda: ratio_of_times([1, 2], [1, 2, 3]), "2 baseline times and 3 arm times"),
        (lambda: ratio_of_times([1, 0.0], [1, 2]), "found 0 at position 1"),
        (lambda: ratio_of_times([1, 2], [1, -2]), "found -2 at position 1"),
        (lambda: ratio_of_times([1, 2], [1, 2], level=95), "level is 95"),
        (lambda: geometric_mean([1, math.nan]), "found nan at position 1"),
        (lambda: geometric_mean([[1.0], [2.0]]), "2 dimensions"),
        (lambda: mean(["a", "b"]), "not a number"),
        (lambda: mean([1, 2], ["a"]), "2 values and 1 clusters"),
        (lambda: sign_flip_test([1, math.inf]), "found inf"),
        (lambda: sign_flip_test([1], "both"), "expected 'two-sided'"),
        (lambda: wilcoxon_test([]), "found no value"),
        (lambda: holm({"random": 1.2}), "random: found a p-value of 1.2"),
        (lambda: holm({"random": math.nan}), "found a p-value of nan"),
        (lambda: proportion(3, 2), "3 successes of 2"),
        (lambda: win_rate([]), "found no value"),
        (lambda: non_inferiority([1, 2], 0), "the margin is 0"),
        (lambda: non_inferiority([1, 2], math.nan), "the margin is nan"),
        (lambda: non_inferiority_of_items([0.5], [1], 0.1), "found 0.5 at position 0"),
        (lambda: non_inferiority_of_items([1], [1, 0], 0.1), "1 baseline items and 2 arm items"),
        (lambda: smallest_margin(0, 0.1), "found 0 items"),
    ],
)
def test_errors_are_one_line_with_what_was_found_and_expected(call, words):
    with pytest.raises(StatisticsError) as caught:
        call()
    message = str(caught.value)
    assert words in message
    assert "expected" in message
    assert "\n" not in message


def test_crossed_means_count_what_seeds_share():
    """Two equal arms, three seeds, a run-to-run spread shared by all items: 95 % of the intervals hold zero."""
    draw = np.random.default_rng(0)
    held = naive = 0
    for _ in range(400):
        values = draw.normal(0, 0.05, (3, 64)) + draw.normal(0, 0.05, 64) + draw.normal(0, 0.02, (3, 1))
        interval = crossed_mean(values).interval
        held += interval.low <= 0 <= interval.high
        plain = mean(values.mean(axis=0)).interval
        naive += plain.low <= 0 <= plain.high
    assert held / 400 >= 0.93
    assert naive / 400 < 0.75


def test_crossed_means_of_one_run_say_so():
    one = crossed_mean([[1.0, 2.0, 4.0]])
    assert one.interval == mean([1.0, 2.0, 4.0]).interval
    assert one.reason == "of one run"
    assert crossed_mean([[1.0, 1.0], [1.0, 1.0]]).interval is None
    with pytest.raises(StatisticsError, match="found 2 items of one seed and 1 of another"):
        crossed_mean([[1.0, 2.0], [1.0]])
