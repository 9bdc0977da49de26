"""The estimator agrees with the label it imitates, density compares across pages, and blocks belong to one image."""

import json

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sfa_core.tokens.density import (
    SHIPPED,
    DensityConfig,
    DensityEstimator,
    area_resize,
    as_pixels,
    calibrate_thresholds,
    density_blocks,
    density_scores,
    density_unit,
    estimate_density,
    load_density,
    page_pixels,
    pseudo_label,
    raw_density,
    save_density,
    train_density,
)
from sfa_core.documents.generate import make_document


@pytest.fixture(scope="module")
def shipped():
    return load_density()


def fresh(count, start=70_000):
    return [make_document(("bar", "table", "form", "line")[i % 4], start + i,
                          preset="rich" if i % 2 else "embedded").pixels for i in range(count)]


def test_the_label_is_the_published_recipe():
    page = make_document("table", 1, preset="rich").pixels
    grey = cv2.cvtColor(page, cv2.COLOR_RGB2GRAY)
    marks = (cv2.Canny(grey, 50, 150) > 0) | (cv2.adaptiveThreshold(grey, 255, cv2.ADAPTIVE_THRESH_GAUSSIAN_C,
                                                                    cv2.THRESH_BINARY_INV, 11, 2) > 0)
    blurred = cv2.GaussianBlur(marks.astype(np.uint8) * 255, (15, 15), 5)
    cells = blurred.reshape(28, 16, 28, 16).mean((1, 3)) / 255
    assert np.allclose(pseudo_label(page, normalise="none"), cells, atol=1e-5)


def test_a_page_divided_by_its_own_maximum_does_not_compare_and_one_unit_does():
    full, almost_empty = make_document("table", 1, preset="rich").pixels, np.full((448, 448, 3), 255, np.uint8)
    almost_empty[200:203, 200:203] = 0
    assert pseudo_label(full, normalise="max").max() == pseudo_label(almost_empty, normalise="max").max() == 1
    unit = density_unit([full])
    assert pseudo_label(almost_empty, unit=unit).max() < 0.3 < pseudo_label(full, unit=unit).max()


def test_empty_paper_has_no_density_and_gives_no_unit(shipped):
    paper = np.full((300, 200, 3), 255, np.uint8)
    assert not pseudo_label(paper, normalise="max").any() and not pseudo_label(paper, normalise="none").any()
    assert estimate_density(shipped[0], as_pixels(paper[None])).max() < 0.05
    with pytest.raises(ValueError, match="expected pages with something on them"):
        density_unit([paper])


def test_the_estimator_agrees_with_the_label_on_pages_it_never_saw(shipped):
    estimator, card = shipped
    pages = fresh(12)
    scores = density_scores(estimator, pages, card["unit"])
    assert scores["r2"] > 0.9 and scores["cells"] == 12 * 28 * 28
    shuffled = density_scores(estimator, pages, 3 * card["unit"])
    assert shuffled["r2"] < scores["r2"], "labels in another unit are not what it learned"
    label = torch.stack([torch.from_numpy(pseudo_label(page, (32, 32), unit=card["unit"])) for page in pages])
    given = torch.cat([estimate_density(estimator, as_pixels(page_pixels(page)[None]), (32, 32)) for page in pages])
    apart = (density_blocks(label) - density_blocks(given)).abs().float()
    assert apart.mean() < 1 and (apart <= 2).float().mean() > 0.9, (
        "blocks of label and estimate are the same or neighbours"
    )


def test_the_shipped_estimator_is_small_and_says_what_it_is(shipped):
    estimator, card = shipped
    assert (SHIPPED / "density.safetensors").stat().st_size < 1e6 and 185_000 < sum(
        p.numel() for p in estimator.parameters()
    ) < 187_000
    assert (
        card["scores"]["r2"] > 0.9
        and not any(p.requires_grad for p in estimator.parameters())
        and not estimator.training
    )


def test_training_repeats_itself_and_leaves_the_random_state_alone():
    pages = fresh(3)
    state = torch.random.get_rng_state()
    first, unit, losses = train_density(pages, DensityConfig(steps=3, batch_size=2, window=64))
    again, same, _ = train_density(pages, DensityConfig(steps=3, batch_size=2, window=64))
    other, _, _ = train_density(pages, DensityConfig(steps=3, batch_size=2, window=64, seed=1))
    assert torch.equal(state, torch.random.get_rng_state()) and unit == same and len(losses) == 3
    a, b, c = (torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_an_estimator_is_read_back_exactly_and_damage_is_named(tmp_path):
    estimator = DensityEstimator().train()
    estimator(torch.rand(2, 3, 64, 64))  # moves the statistics of the norms
    save_density(estimator.eval(), tmp_path, 0.5, DensityConfig(), note="test")
    read, card = load_density(tmp_path)
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(read(pixels), estimator(pixels)) and card["unit"] == 0.5 and card["note"] == "test"
    weights = tmp_path / "density.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="does not match the checksum"):
        load_density(tmp_path)
    (tmp_path / "density.json").write_text(json.dumps({"unit": 1}))
    with pytest.raises(ValueError, match="density.json has no training"):
        load_density(tmp_path)
    with pytest.raises(FileNotFoundError, match="density.json is missing"):
        load_density(tmp_path / "nowhere")


@pytest.mark.parametrize("wrong", [np.zeros((0, 10, 3), np.uint8), np.zeros((10, 10), np.uint8), np.zeros((10, 10, 3))])
def test_an_image_that_is_none_is_named(wrong):
    with pytest.raises(ValueError, match="the image has shape"):
        pseudo_label(wrong, normalise="none")


def test_wrong_requests_are_named():
    page = np.zeros((20, 20, 3), np.uint8)
    for message, call in {
        "normalise is 'mean'": lambda: pseudo_label(page, normalise="mean"),
        "unit is None": lambda: pseudo_label(page),
        "shares are": lambda: calibrate_thresholds([page], 0.8, 0.3),
        "windows of a multiple of 16": lambda: DensityConfig(window=100),
        "no pages to learn": lambda: train_density([]),
        r"expected \(images, 3, Y, X\)": lambda: estimate_density(DensityEstimator(), torch.zeros(3, 8, 8)),
        r"expected \(images, h, w\)": lambda: density_blocks(torch.zeros(4, 4)),
        "expected 0 to 1": lambda: density_blocks(torch.full((1, 2, 2), 1.5)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.floats(0, 1, width=32)),
       st.integers(1, 40), st.integers(1, 40))
def test_area_resize_keeps_the_mean_and_the_range(values, rows, columns):
    resized = area_resize(torch.from_numpy(values).double(), (rows, columns))
    assert resized.shape == (rows, columns) and np.isclose(resized.mean(), values.mean(), atol=1e-5)
    assert resized.min() >= values.min() - 1e-5 and resized.max() <= values.max() + 1e-5


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (3, 4, 5), elements=st.floats(0, 1, width=32)), st.integers(1, 32))
def test_blocks_are_per_image_ordered_and_in_range(density, blocks):
    density = torch.from_numpy(density)
    ids = density_blocks(density, blocks)
    assert ids.shape == (3, 20) and 0 <= ids.min() and ids.max() < blocks
    for image in range(3):
        assert torch.equal(ids[image], density_blocks(density[image : image + 1], blocks)[0])
        order = density[image].flatten().argsort()
        assert (ids[image][order].diff() >= 0).all()


def test_raw_density_is_a_share():
    raw = raw_density(page_pixels(make_document("pie", 2, preset="rich").pixels))
    assert raw.shape == (448, 448) and raw.dtype == np.float32 and 0 <= raw.min() and 0.1 < raw.max() <= 1
