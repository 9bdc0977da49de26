"""A plan sees what it says: power, least effects and documents agree with each other and with known tests."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.power import TTestPower

from sfa_core.runs.commands import main
from sfa_core.scores.intervals import clustered_effect, crossed_effect
from sfa_core.scores.power import (
    Design,
    design_from_rates,
    design_of,
    detection_power,
    documents_needed,
    expected_effect,
    least_detectable,
    plan_table,
)

DEVIATION = st.floats(0, 0.3)


@pytest.mark.parametrize("documents", [12, 60, 500])
@pytest.mark.parametrize("effect", [0.0, 0.02, 0.1])
def test_one_training_has_the_power_of_the_t_test(documents, effect):
    found = detection_power(Design(0, 0.3, 0), effect, 1, documents)
    known = TTestPower().power(effect / 0.3, documents, 0.05)
    assert found == pytest.approx(known, abs=0.003)


@settings(max_examples=15, deadline=None)
@given(DEVIATION, st.floats(0.01, 0.5), st.floats(0.01, 0.5), st.integers(1, 6), st.integers(10, 300))
def test_the_least_detectable_effect_is_found_with_the_power_asked_for(seeds, documents, cells, count, size):
    design = Design(seeds, documents, cells)
    least = least_detectable(design, count, size)
    assert detection_power(design, least, count, size) == pytest.approx(0.8, abs=0.002)
    assert expected_effect(design, 0, count, 4 * size)[1] <= expected_effect(design, 0, count, size)[1]
    assert count > 1 or least_detectable(design, count, 4 * size) <= least * 1.001
    assert detection_power(design, 0, count, size) <= 0.065, "nothing is rarely seen"


def test_more_documents_can_cost_power_where_seeds_are_few():
    "The error falls, and what is left of it is that of two seeds: the interval's degrees of freedom fall to theirs."
    design = Design(0.00928, 0.307, 0.0113)
    assert least_detectable(design, 2, 4 * 182) > 1.5 * least_detectable(design, 2, 182)
    assert least_detectable(design, 5, 4 * 182) < least_detectable(design, 5, 182)


def test_documents_needed_are_the_fewest_that_suffice():
    design = Design(0.002, 0.1, 0.2)
    needed = documents_needed(design, 0.03, 5)
    assert detection_power(design, 0.03, 5, needed) >= 0.8 > detection_power(design, 0.03, 5, needed - 1)
    assert documents_needed(Design(0.05, 0.1, 0.1), 0.01, 3) is None
    table = plan_table(Design(0.05, 0.1, 0.1), (3,), (30,), effect=0.01)
    assert table["documents for 1 points"].tolist() == ["more seeds"]


def test_a_design_is_recovered_from_many_experiments():
    rng, made = np.random.default_rng(0), Design(0.03, 0.1, 0.2)
    seeds, documents, trials = 6, 80, 400
    cells = (made.seeds * rng.normal(size=(trials, seeds, 1)) + made.documents * rng.normal(size=(trials, 1, documents))
             + made.cells * rng.normal(size=(trials, seeds, documents)))
    effect = crossed_effect(cells, np.ones(documents))
    parts = [np.mean(part) for part in (effect.seed_variance, effect.document_variance, effect.cell_variance)]
    found = design_of(type(effect)(0.0, *parts, seeds, documents))
    assert (found.seeds, found.documents, found.cells) == pytest.approx((0.03, 0.1, 0.2), rel=0.06)


def test_rates_give_the_variance_of_a_documents_mean():
    rng, differing, effect, questions, correlation = np.random.default_rng(1), 0.2, 0.04, 8, 0.3
    design = design_from_rates(differing, questions, correlation=correlation, effect=effect)
    shared = rng.random((200_000, 1)) < correlation  # all questions of such a document share one draw
    draws = rng.choice([1, -1, 0], (200_000, questions), p=[0.12, 0.08, 0.8])
    values = np.where(shared, draws[:, :1], draws)
    assert values.mean(1).var() == pytest.approx(design.documents**2 + design.cells**2, rel=0.02)


@pytest.mark.parametrize("given", [dict(differing=0), dict(differing=1.2), dict(questions=0.5), dict(correlation=-0.1),
                                   dict(effect=0.5)])
def test_rates_that_cannot_be_are_refused(given):
    with pytest.raises(ValueError, match="expected a share above 0"):
        design_from_rates(**dict(differing=0.2, questions=10) | given)


# ---- the interval


def test_cover_of_few_trainings_is_kept():
    "With Satterthwaite's degrees of freedom as they are, this design covers 0.92."
    rng, trials, seeds, documents = np.random.default_rng(2), 4000, 3, 60
    for by_seed in (0.0, 0.5):
        cells = (by_seed * rng.normal(size=(trials, seeds, 1)) + rng.normal(size=(trials, 1, documents))
                 + 0.3 * rng.normal(size=(trials, seeds, documents)))
        found = crossed_effect(cells, np.ones(documents)).interval()
        assert np.mean((found.low <= 0) & (found.high >= 0)) >= 0.94


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(2, 12))
def test_an_effect_is_its_formula(seed, seeds, documents):
    rng = np.random.default_rng(seed)
    owner = np.concatenate([np.arange(documents), rng.integers(0, documents, 30)])
    values = rng.normal(size=(seeds, owner.size))
    found, names = clustered_effect(values, [f"page {name}" for name in owner]), range(documents)
    total, asked = values.mean(), owner.size
    cells = np.array([[total + (row[owner == d].sum() - total * (owner == d).sum()) * documents / asked
                       for d in names] for row in values])
    assert found.estimate == pytest.approx(total) == cells.mean()
    assert found.document_variance == pytest.approx(cells.mean(0).var(ddof=1) / documents)
    if seeds > 1:
        rest = cells - cells.mean(0) - cells.mean(1, keepdims=True) + cells.mean()
        cell = (rest**2).sum() / (seeds - 1) / (documents - 1) / seeds / documents
        assert found.seed_variance == pytest.approx(cells.mean(1).var(ddof=1) / seeds)
        assert found.variance == pytest.approx(max(found.seed_variance + found.document_variance - cell,
                                                   found.seed_variance, found.document_variance))
        assert found.freedom >= seeds - 1
    else:
        expected = stats.t.interval(0.95, documents - 1, total, np.sqrt(found.document_variance))
        assert found.interval()[1:] == pytest.approx(expected)
    half = found.interval()
    assert (found.p < 0.05) == (half.low > 0 or half.high < 0)


def test_values_without_a_document_to_vary_over_are_refused():
    with pytest.raises(ValueError, match="at least 2 documents"):
        clustered_effect([1.0, 0.0], ["a", "a"])
    with pytest.raises(ValueError, match="finite"):
        clustered_effect([1.0, float("nan")], ["a", "b"])


# ---- the command


def pilot(path, seeds, **changed):
    rng, parts = np.random.default_rng(0), []
    for seed in seeds:
        for arm in ("control", "vision"):
            right = rng.random(60) < 0.5
            columns = dict(id=[f"q{i}" for i in range(60)], document=[f"d{i // 4}" for i in range(60)], question="?",
                           kind="read_label", answers=[["1"]] * 60, error="", correct=right, score=right.astype(float))
            parts.append(pd.DataFrame(columns).assign(arm=arm, seed=seed, **changed))
    pd.concat(parts, ignore_index=True).to_parquet(path)
    return str(path)


def test_a_pilot_is_planned_from(tmp_path, capsys):
    given = ["power", pilot(tmp_path / "a.parquet", (0, 1, 2)), "--effect", "2", "--documents", "30", "300"]
    assert main([*given, "--figure", str(tmp_path / "plan.html")]) == 0
    printed = capsys.readouterr().out
    assert "3 seeds" in printed and "300 documents" in printed and "documents for 2 points" in printed
    assert "plotly" in (tmp_path / "plan.html").read_text()


@pytest.mark.parametrize("seeds, options, words", [
    ((0,), [], "says nothing of others"), ((0, 1), ["--arms", "control", "sfa"], "no seed with both control and sfa"),
    ((0, 1), ["--differing", "0.2"], "one of the two")])
def test_a_pilot_that_cannot_be_planned_from_is_refused(tmp_path, capsys, seeds, options, words):
    assert main(["power", pilot(tmp_path / "a.parquet", seeds), *options]) == 2
    assert words in capsys.readouterr().err
