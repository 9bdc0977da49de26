"""Intervals and tests agree with scipy and statsmodels, cover what they promise, and refuse input that has no
answer."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sfa_core.scores.intervals import (
    clustered_bootstrap,
    cluster_means,
    mcnemar,
    paired_bootstrap,
    seed_interval,
    wilson_interval,
)

RIGHT = st.lists(st.booleans(), min_size=1, max_size=60)
PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@settings(deadline=None)
@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_wilson_is_scipys_and_holds_its_rate(n, share, level):
    correct = round(share * n)
    rate, low, high = wilson_interval(correct, n, level)
    reference = stats.binomtest(correct, n).proportion_ci(level, method="wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-9)
    assert 0 <= low <= rate + 1e-12 and rate - 1e-12 <= high <= 1 and rate == correct / n


@settings(deadline=None)
@given(PAIRS)
def test_mcnemar_is_a_coin_toss_over_the_changes(pairs):
    a, b = np.array(pairs).T
    result = mcnemar(a, b)
    assert result.both + result.lost + result.won + result.neither == len(pairs)
    assert (result.both + result.lost, result.both + result.won) == (a.sum(), b.sum())
    changed = result.lost + result.won
    assert result.p == pytest.approx(stats.binomtest(result.won, changed).pvalue if changed else 1.0, abs=1e-12)
    assert mcnemar(b, a)[:4] == (result.both, result.won, result.lost, result.neither)


@settings(max_examples=30, deadline=None)
@given(PAIRS.filter(lambda pairs: len(pairs) > 1), st.integers(0, 2**31))
def test_paired_bootstrap_is_antisymmetric_in_estimate_seeded_and_bounded(pairs, seed):
    a, b = np.array(pairs).T
    forward, again, back = (paired_bootstrap(*order, draws=500, seed=seed) for order in ((a, b), (a, b), (b, a)))
    assert forward == again and forward.estimate == -back.estimate == pytest.approx(b.mean() - a.mean())
    assert -1 <= forward.low <= forward.high <= 1
    assert paired_bootstrap(a, a, draws=500) == (0, 0, 0)


def test_bootstrap_agrees_with_scipys():
    rng = np.random.default_rng(3)
    a, b = (rng.random((2, 400)) < 0.6).astype(float)
    ours = paired_bootstrap(a, b, draws=20_000)
    theirs = stats.bootstrap((b - a,), np.mean, n_resamples=20_000, method="percentile", rng=rng).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)


def test_counting_kinds_of_clusters_is_resampling_clusters():
    """The multinomial shortcut has the distribution of the plain bootstrap, which draws cluster indices and pools
    their questions."""
    rng = np.random.default_rng(5)
    owner = np.sort(rng.integers(0, 60, 300))
    value = rng.integers(0, 2, 300) * 0.5 + rng.integers(0, 2, 60)[owner] * 0.5
    members = [value[owner == c] for c in np.unique(owner)]
    plain = np.array([np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]).mean()
                      for _ in range(4000)])
    assert stats.ks_2samp(plain, cluster_means(value, owner, 4000, seed=1)).pvalue > 0.001


def test_cluster_names_and_order_do_not_matter():
    rng = np.random.default_rng(6)
    value, owner, order = rng.random(200), rng.integers(0, 40, 200), rng.permutation(200)
    plain = clustered_bootstrap(value, owner)
    assert clustered_bootstrap(value[order], owner[order]) == pytest.approx(plain, abs=1e-12)
    assert clustered_bootstrap(value, [f"document-{i:03d}" for i in owner]) == pytest.approx(plain, abs=1e-12)


def test_many_distinct_clusters_stay_in_memory_and_time():
    "2,500 questions with continuous scores have as many kinds of clusters as clusters."
    value = np.random.default_rng(7).random(2500)
    interval = clustered_bootstrap(value, draws=4000)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * value.std() / 50, rel=0.05)


def cover(interval_of, truth, trials=400):
    return np.mean([low <= truth <= high
                    for _, low, high in (interval_of(np.random.default_rng(i)) for i in range(trials))])


def test_clustered_interval_covers_when_questions_share_an_image_and_the_naive_one_does_not():
    def sample(rng):
        easy = np.repeat(rng.beta(1, 1, 150), 4)   # every image has its own difficulty; the mean rate is 0.5
        return (rng.random(600) < easy).astype(float), np.repeat(np.arange(150), 4)
    assert 0.92 <= cover(lambda rng: clustered_bootstrap(*sample(rng), draws=1000), 0.5) <= 0.98
    assert cover(lambda rng: clustered_bootstrap(sample(rng)[0], draws=1000), 0.5) < 0.9


def test_paired_interval_covers_the_true_difference():
    def interval(rng):
        image = np.repeat(np.arange(120), 3)
        base = np.repeat(rng.normal(size=120), 3)
        a, b = (base + rng.normal(size=360) > 0).astype(float), (base + 0.3 + rng.normal(size=360) > 0).astype(float)
        return paired_bootstrap(a, b, image, draws=1000)
    truth = stats.norm.cdf(0.3 / np.sqrt(2)) - 0.5
    assert 0.92 <= cover(interval, truth) <= 0.98


def test_one_sided_bound_holds_as_often_as_it_says():
    def sample(rng):
        return (rng.random(400) < 0.7).astype(float), np.repeat(np.arange(200), 2)
    bounds = [clustered_bootstrap(*sample(np.random.default_rng(i)), draws=1000, side="upper") for i in range(400)]
    assert all(bound.low == -np.inf for bound in bounds)
    assert 0.92 <= np.mean([bound.high >= 0.7 for bound in bounds]) <= 0.98
    rng = np.random.default_rng(0)
    values = sample(rng)
    assert clustered_bootstrap(*values,
                               side="upper").high < clustered_bootstrap(*values).high, "one tail holds all of the doubt"
    assert clustered_bootstrap(*values, side="lower").low > clustered_bootstrap(*values).low


def test_wilson_covers_rates_near_one():
    rng = np.random.default_rng(11)
    assert 0.92 <= np.mean([wilson_interval(k, 60).low <= 0.97 <= wilson_interval(k, 60).high
                            for k in rng.binomial(60, 0.97, 2000)]) <= 0.985


@settings(deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_seed_interval_is_the_t_interval(values):
    estimate, low, high = seed_interval(values)
    center, spread = np.mean(values), stats.sem(values)
    expected = stats.t.interval(0.95, len(values) - 1, center, spread) if spread > 0 else (center, center)
    assert (estimate, low, high) == pytest.approx((center, *expected), abs=1e-9)


@pytest.mark.parametrize("call, words", [
    (lambda: wilson_interval(0, 0), "n >= 1"), (lambda: wilson_interval(3, 2), "0 <= correct <= n"),
    (lambda: wilson_interval(-1, 2), "0 <= correct"),
    (lambda: wilson_interval(1, 2, 95), "level"), (lambda: mcnemar([], []), "at least one question"),
    (lambda: mcnemar([1], [1, 0]), "equally long"),
    (lambda: mcnemar([0.5], [1]), "booleans"), (lambda: paired_bootstrap([1, 0], [1]), "same questions"),
    (lambda: clustered_bootstrap([1.0]), "at least 2"),
    (lambda: clustered_bootstrap([1, 0], ["a", "a"]), "1 clusters"),
    (lambda: clustered_bootstrap([1, 0], ["a"]), "equally long"),
    (lambda: clustered_bootstrap([1, float("nan")]), "finite"),
    (lambda: clustered_bootstrap([1, 0], side="left"), "side"),
    (lambda: seed_interval([0.5]), "at least two")])
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
