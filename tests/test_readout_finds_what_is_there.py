"""The reader of numbers finds a planted code, stays at its floor on noise, and never reads a page from itself."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_core.attention.readout import (
    Readout,
    ReadoutConfig,
    digit_classes,
    lost_by_stage,
    read_numbers_at,
    readout_table,
    ridge_coefficients,
    target_of,
)
from sfa_core.attention.stages import Stage
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import Evidence, Sample, TextBox, samples


def planted(rng, count, width, strength=1.0):
    numbers = [str(value) for value in rng.integers(1, 100, count)]
    code = np.eye(11)[digit_classes(numbers)].reshape(count, -1) @ rng.normal(size=(22, width))
    return numbers, strength * code + 0.3 * rng.normal(size=(count, width))


@settings(max_examples=5)
@given(seed=st.integers(0, 10**6), width=st.sampled_from((40, 64, 100)), shift=st.floats(-50, 50),
       scale=st.floats(1e-3, 1e3))
def test_a_planted_code_is_found_wherever_it_lies(seed, width, shift, scale):
    rng = np.random.default_rng(seed)
    numbers, inputs = planted(rng, 600, width)
    found = read_numbers_at(scale * (inputs + shift), numbers, np.arange(600) // 3)
    assert found.hit.mean() > 0.9 and found.floor.mean() < 0.05 and (found.digits >= found.hit).all()


@settings(max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_noise_is_at_the_floor(seed):
    rng = np.random.default_rng(seed)
    numbers, _ = planted(rng, 1500, 40)
    found = read_numbers_at(rng.normal(size=(1500, 40)), numbers, np.arange(1500) // 3)
    assert abs(found.hit.mean() - found.floor.mean()) < 0.03


def test_a_page_is_not_read_from_itself():
    "Every page repeats one random pattern with its own number: only a reader that saw the page could tell the number."
    rng = np.random.default_rng(0)
    pages = np.repeat(np.arange(200), 5)
    numbers = [str(value) for value in rng.integers(1, 100, 200)[pages]]
    inputs = rng.normal(size=(200, 64))[pages] + 0.01 * rng.normal(size=(1000, 64))
    honest, cheated = (read_numbers_at(inputs, numbers, owner) for owner in (pages, np.arange(1000)))
    assert honest.hit.mean() < 0.1 < 0.3 < cheated.hit.mean()


def test_places_in_a_row_have_readers_of_their_own():
    rng = np.random.default_rng(0)
    numbers, inputs = planted(rng, 1000, 64)
    other = np.arange(1000) % 2 == 1
    turned = np.where(other[:, None], -inputs, inputs)
    pages, config = np.arange(1000) // 4, ReadoutConfig(components=24)
    together = read_numbers_at(turned, numbers, pages, config=config)
    each = read_numbers_at(turned, numbers, pages, places=other, config=config)
    assert each.hit.mean() > together.hit.mean() + 0.5


def test_what_cannot_be_read_is_nan_and_counted():
    rng = np.random.default_rng(0)
    numbers, inputs = planted(rng, 300, 64)
    inputs[:7] = 0  # sites without tokens
    places = ["many"] * 290 + ["few"] * 10
    found = read_numbers_at(inputs, numbers, np.arange(300), places=places)
    assert np.isnan(found.hit).tolist() == [at < 7 or at >= 290 for at in range(300)]
    table = readout_table({(Stage("projector"), "number"): found}, np.arange(300), ["right"] * 300)
    assert table.loc[0, ["n", "left_out"]].tolist() == [283, 17]


def test_closed_form_is_ridge_regression():
    rng = np.random.default_rng(0)
    inputs, outputs = rng.normal(size=(80, 12)), rng.normal(size=(80, 3))
    inputs, outputs = inputs - inputs.mean(0), outputs - outputs.mean(0)
    penalty = 0.3 * np.linalg.eigvalsh(inputs.T @ inputs).mean()
    plain = np.linalg.solve(inputs.T @ inputs + penalty * np.eye(12), inputs.T @ outputs)
    assert np.allclose(ridge_coefficients(inputs, outputs, 12, 0.3), plain)
    assert np.allclose(ridge_coefficients(inputs, outputs, 99, 0.3), plain)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_losses_and_what_is_left_add_up(seed):
    rng = np.random.default_rng(seed)
    wrong, pages = rng.random(300) < 0.3, rng.integers(0, 60, 300)
    chances = np.sort(rng.random(3))[::-1]
    way = {str(at): Readout(np.where(wrong, rng.random(300) < chance, rng.random(300) < 0.95).astype(float),
                            np.full(300, 0.01), np.zeros(300)) for at, chance in enumerate(chances)}
    table = lost_by_stage(way, pages, wrong, ~wrong, draws=200)
    assert np.isclose(table["lost"].sum(), 1) and table["step"].iloc[-1] == "not lost"
    assert (table["low"] <= table["lost"] + 1e-9).all() and (table["lost"] <= table["high"] + 1e-9).all()
    with pytest.raises(ValueError, match="expected at least one of each"):
        lost_by_stage(way, pages, np.zeros(300, bool), ~wrong)


def test_targets_are_numbers_with_a_label_in_their_row():
    for sample in samples(documents(12, seed=3), kinds=("read_label", "read_cell", "read_colour")):
        target = target_of(sample)
        assert target.digits == sample.answers[0]
        labels = [text for text in sample.evidence.texts if tuple(text.box) == target.label]
        row = [line for line in sample.evidence.table if line[0] == labels[0].text]
        assert len(labels) == len(row) == 1 and row[0][1 + target.place[0]] == target.digits
    bare = Evidence((), (TextBox("12", (0, 0, 9, 9)),), (0,))
    assert target_of(Sample("a", "a", "own", "?", ("12",), b"", bare)) is None
    assert target_of(Sample("a", "a", "own", "?", ("12",), b"")) is None
