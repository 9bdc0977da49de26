"""An edited page differs from its page in the one thing that its name says; rates say what became of answers."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_core.documents.counterfactuals import EDITS, counterfactuals, pages_of
from sfa_core.documents.questions import READ_KINDS
from sfa_core.interventions.edits import OUTCOMES, RATES, edit_rates, outcome, pair_outcomes


def texts(sample):
    return {(text.text, text.box, text.role) for text in sample.evidence.texts}


def cell(sample):
    return sample.evidence.texts[sample.evidence.answer[0]]


@settings(max_examples=12)
@given(seed=st.integers(0, 10**6), case=st.sampled_from([("embedded", "bar"), ("embedded", "grouped_bar"),
                                                         ("embedded", "table"), ("rich", "table"), ("rich", "form"),
                                                         ("page", "bar"), ("page", "table")]))
def test_a_page_differs_in_one_thing(seed, case):
    preset, kind = case
    pairs = {pair.edit: pair for pair in counterfactuals(1, seed, preset=preset, kinds=(kind,))}
    assert tuple(pairs) == EDITS and len({pair.before.id for pair in pairs.values()}) == 1
    before = pairs["number"].before
    assert before.kind in READ_KINDS and cell(before).text in before.answers
    assert {pair.after.question for pair in pairs.values()} == {before.question}
    number = pairs["number"].after
    assert len(texts(before) ^ texts(number)) == 2 and len(cell(number).text) == len(cell(before).text)
    assert not set(number.answers) & set(before.answers)
    swapped = pairs["labels"].after
    names = [{text.text: text.row for text in one.evidence.texts if text.role in ("label", "key")}
             for one in (before, swapped)]
    moved = [name for name in names[0] if names[0][name] != names[1][name]]
    assert len(moved) == 2 and set(names[0]) == set(names[1])
    assert {cell(swapped).row, cell(before).row} == {names[0][name] for name in moved}
    rest = pairs["row"].after
    assert rest.answers == before.answers and len(rest.evidence.table) == len(before.evidence.table) - 1
    gone = pairs["absent"].after
    label = next(name for name, row in names[0].items() if row == cell(before).row)
    assert gone.answers == () and label not in {text.text for text in gone.evidence.texts}
    assert label in before.question
    assert len(np.unique(np.asarray(pairs["blank"].after.image).reshape(-1, 3), axis=0)) == 1
    assert {sample.image.size for sample in pages_of(pairs.values())} == {before.image.size}


def test_the_same_seed_gives_the_same_pages():
    one, two, other = (counterfactuals(3, seed) for seed in (7, 7, 8))
    assert one == two and one != other
    assert [pair.after.source for pair in one] == [pair.after.source for pair in two]
    few = counterfactuals(3, 7, edits=("number", "blank"))
    assert few == [pair for pair in one if pair.edit in ("number", "blank")]


@pytest.mark.parametrize("given, message", [
    (dict(n=0), "0 pages and edits .* expected at least 1"),
    (dict(edits=("colour",)), "expected at least 1 and some of number"),
    (dict(kinds=("pie",)), "none of 60 documents of kind 'pie'"), (dict(preset="poster"), "unknown preset 'poster'")])
def test_impossible_pages_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        counterfactuals(**{"n": 1, "seed": 0} | given)


def test_every_pair_has_one_outcome_and_rates_count_them():
    pairs = counterfactuals(8, seed=3)
    rng, replies = np.random.default_rng(0), {}
    for sample in pages_of(pairs):
        numbers = [text.text for text in sample.evidence.texts if text.text.isdigit()]
        replies[sample.id] = str(rng.choice([*numbers, *sample.answers, "12345", "no idea", ""]))
    rows = pair_outcomes(pairs, replies)
    assert len(rows) == len(pairs) and all(row.outcome in OUTCOMES[row.edit] for row in rows.itertuples())
    rates = edit_rates(rows).set_index("rate")
    assert list(rates.index) == list(RATES)
    for name, (edit, counted, left_out) in RATES.items():
        own = rows[rows["edit"] == edit]["outcome"]
        assert rates.loc[name, "count"] == own.isin(counted).sum()
        assert rates.loc[name, "left_out"] == own.isin(left_out).sum()
        assert rates.loc[name, "n"] + rates.loc[name, "left_out"] == 8
    parts = rates.loc[["invention on absent, printed elsewhere", "invention on absent, printed nowhere"], "count"]
    assert parts.sum() == rates.loc["invention on absent", "count"]
    with pytest.raises(ValueError, match="pages have no reply"):
        pair_outcomes(pairs, {})


def test_a_near_number_has_not_followed():
    pair = counterfactuals(1, seed=3, edits=("number",))[0]
    near = str(int(pair.after.answers[0]) * 100 + 1)
    pair = type(pair)(pair.document, pair.edit, pair.before, pair.after.__class__(
        **{**vars(pair.after), "answers": (str(int(pair.after.answers[0]) * 100),)}))
    assert outcome(pair, pair.before.answers[0], near) == "lost"
