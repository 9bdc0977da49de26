"""LLaVA-OneVision reads each leaf once: the first of equal tokens stays, in the packing of its own code, and the
prompt has as many."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from sfa_core.tokens.adaptive import CONTROL, adaptive_tokens, language_tokens
from sfa_core.models.answers import generate
from sfa_core.models.sequences import answer_loss, training_batch
from sfa_core.tokens.copies import token_origins
from sfa_core.documents.samples import Sample
from sfa_core.models.images import image_batch, image_features
from sfa_core.models.miniatures import miniature
from sfa_core.tokens.patches import PatchConfig, PatchPlan, is_kept
from sfa_core.attention.places import language_boxes
from sfa_core.attention.probes import record
from sfa_core.models.resolution import at_resolution
from sfa_core.training.visible import shown_boxes

GUARDED, CELLS = PatchConfig(coarse=None, bucket=8), 16  # cells of a tile
# width and height, pixels; of a tile: 62 x 62
SIZES = [(168, 112), (300, 90), (60, 200), (130, 130), (120, 500), (62, 50)]


def page(size, seed=0):
    """Paper that darkens slowly from corner to corner, so that no two tiles are alike, with a few marks near its
    left and lower edges."""
    rng, (width, height) = np.random.default_rng(seed), size
    shade = 255 - 25 * np.linspace(0, 1, width)[None, :, None] - 20 * np.linspace(0, 1, height)[:, None, None]
    image = Image.fromarray(np.repeat(shade, 3, axis=2).astype(np.uint8))
    marks = [(width // 20, y) for y in range(5, height, 50)] + [(x, height - 9) for x in range(5, width, 50)]
    for x, y in marks:
        ImageDraw.Draw(image).rectangle((x, y, x + 5, y + 5), fill=tuple(rng.integers(0, 160, 3).tolist()))
    return image


@pytest.fixture(scope="module")
def shared():
    return miniature("llava_onevision", width=32, spread=0.15)


@pytest.fixture
def bundle(shared):
    "A random LLaVA-OneVision with tiles of 4 x 4 patches that must be the same after the test as before."
    images = [page(size) for size in SIZES[:2]]
    before, batch = encoded(shared, images)
    yield shared
    shared.model.config.vision_aspect_ratio = shared.processor.vision_aspect_ratio = "anyres_max_9"
    again, now = encoded(shared, images)
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True)) and now.tokens == batch.tokens
    assert not any("forward" in vars(module) or "pack_image_features" in vars(module) or CONTROL in vars(module)
                   for module in shared.model.modules())


@torch.no_grad()
def encoded(bundle, images, tiles=None):
    batch = image_batch(bundle, images, tiles)
    return image_features(bundle, batch).images, batch


def attached(bundle, patches=GUARDED, **options):
    return adaptive_tokens(bundle, patches=patches, **options)


def count(bundle, batch):
    return [tokens.count(bundle.model.config.image_token_id) for tokens in batch.tokens]


def limited(bundle, tiles):
    "Shrink pictures of more than so many tiles' worth of tokens, in the model and in its processor."
    bundle.model.config.vision_aspect_ratio = bundle.processor.vision_aspect_ratio = f"anyres_max_{tiles}"


def firsts(every, line):
    "Mark the features that no earlier one equals; the ends of rows are all the same vector, and stay."
    equal = (every[:, None] - every).abs().amax(-1) < 1e-5
    return (equal.int().argmax(1).numpy() == np.arange(len(every))) | line


@pytest.mark.parametrize("tiles", [None, 1])
@pytest.mark.parametrize("most", [9, 2])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_of_equal_features_stays_and_nothing_else(bundle, size, most, tiles):
    "Told from the features of a model that keeps all of them: by equality, without plans and packing."
    image, unlimited, (_,
                       stock) = page(size), len(language_boxes(bundle, size,
                                                               tiles)), encoded(bundle, [page(size)], tiles)
    limited(bundle, most)
    with attached(bundle, drop=False):
        (every,), batch = encoded(bundle, [image], tiles)
    assert count(bundle, batch) == [len(every)] and (most == 2 or batch.tokens == stock.tokens)
    with attached(bundle):
        (fewer,), batch = encoded(bundle, [image], tiles)
    expected = firsts(every, np.isnan(language_boxes(bundle, size, tiles)).any(1))
    expected[CELLS:] |= len(every) < unlimited  # a shrunk picture
    assert count(bundle, batch) == [len(fewer)] == [expected.sum()] and expected.sum() < len(every)
    assert torch.allclose(fewer, every[torch.from_numpy(expected)], atol=1e-5)


def test_tokens_of_a_shrunk_picture_all_stay(bundle):
    counts = {}
    for most in (9, 1):
        limited(bundle, most)
        counts[most, "stock"] = count(bundle, encoded(bundle, [page((130, 130))])[1])[0]
        with attached(bundle):
            counts[most, "once"] = count(bundle, encoded(bundle, [page((130, 130))])[1])[0]
    dropped = {most: counts[most, "stock"] - counts[most, "once"] for most in (9, 1)}
    assert CELLS < counts[1, "stock"] < counts[9, "stock"] and 0 < dropped[1] < CELLS < dropped[9]


@pytest.mark.parametrize("budget", [10, 22, 34])
def test_leaves_of_all_sizes_are_read_once(bundle, budget):
    """Random trees over four tiles and the whole image, from pixels twice as fine; a cell of four leaves of 7 px is
    one token."""
    image = page((124, 110))
    batch = image_batch(bundle, [image])
    tiles = torch.nn.functional.interpolate(batch.inputs["pixel_values"][0], scale_factor=2)
    given, sizes = {"pixel_values": tiles,
                    "image_sizes": batch.inputs["image_sizes"]}, batch.inputs["image_sizes"].tolist()
    rule = PatchConfig(sizes=(7, 14, 28, 56), budget=budget, random=3, bucket=8)
    with torch.no_grad():
        with attached(bundle, rule, drop=False) as control:
            [every] = bundle.model.get_image_features(**given).pooler_output
        with attached(bundle, rule):
            [fewer] = bundle.model.get_image_features(**given).pooler_output
            assert language_tokens(bundle, [tiles], sizes) == [len(fewer)]
    expected = firsts(every, np.isnan(language_boxes(bundle, image.size)).any(1))
    assert {7, 14} <= set(np.concatenate([plan.size for plan in control.last])) and len(tiles) == 5
    assert expected.sum() < len(every) and torch.allclose(fewer, every[torch.from_numpy(expected)], atol=1e-5)


@given(width=st.integers(1, 700), height=st.integers(1, 700))
@settings(max_examples=40)
def test_finer_tiles_show_what_the_plain_ones_show(shared, width, height):
    "As many tiles, of the same shapes, from any image; and where it is enlarged anyway, the same picture."
    image, fine = page((width, height)), at_resolution(shared, 124)
    plain, finer = (each.processor.image_processor([image], return_tensors="pt") for each in (shared, fine))
    assert finer["pixel_values"].shape == (*plain["pixel_values"].shape[:3], 124, 124) and torch.equal(
        finer["image_sizes"], plain["image_sizes"]
    )
    texts = [each.processor.replace_image_token(dict(inputs), 0) for each, inputs in ((shared, plain), (fine, finer))]
    assert texts[0] == texts[1]
    if 20 < min(width, height) and max(width, height) < 62:
        coarse, own = torch.nn.functional.avg_pool2d(finer["pixel_values"][0], 2), plain["pixel_values"][0]
        assert (coarse - own).abs().mean() < 0.2 * (coarse.flip(-1) - own).abs().mean(), (
            "far nearer than the same picture turned over"
        )


@pytest.mark.parametrize("tiles", [None, 1])
def test_leaves_of_7_px_are_answered_and_trained_as_each_image_alone(bundle, tiles):
    fine, rule = at_resolution(bundle, 124), PatchConfig((7, 14, 28), budget=22, random=3, bucket=8)
    images = [page(size, seed) for seed, size in enumerate(SIZES[:4])]
    asked = [(0, "What is the value of red?"), (1, "List all values."), (3, "List all values.")]
    rows = [Sample(f"p{seed}", f"p{seed}", "own", "What is the value of red?", ("12",), image)
            for seed, image in enumerate(images)]
    with attached(bundle, rule) as control:
        features, batch = encoded(fine, images, tiles)
        assert count(bundle, batch) == [len(own) for own in features] and all(
            (plan.size == 7).any() for plan in control.last
        )
        together = generate(fine, images, asked, 4, tiles=tiles)
        assert together == [generate(fine, [images[number]], [(0, text)], 4, tiles=tiles)[0] for number, text in asked]
        loss, targets = answer_loss(bundle.model, training_batch(fine, rows, tiles=tiles))
        alone = [answer_loss(bundle.model, training_batch(fine, [row], tiles=tiles)) for row in rows]
        assert targets == sum(own for _, own in alone) and torch.allclose(loss, sum(own for own, _ in alone), rtol=1e-4)


def test_a_plan_of_pretrained_patches_reads_finer_tiles_almost_as_the_plain_ones(bundle):
    images = [page(size, seed) for seed, size in enumerate(SIZES)]
    stock, batch = encoded(bundle, images)
    with attached(bundle, PatchConfig(sizes=(14,), coarse=None)):
        same, again = encoded(at_resolution(bundle, 124), images)
    assert again.tokens == batch.tokens
    for a, b in zip(same, stock, strict=True):
        alike = [torch.nn.functional.cosine_similarity(other, b, dim=-1).quantile(0.1) for other in (a, a.roll(1, 0))]
        assert alike[0] > 0.999 and alike[1] < 0.5, "each token is like its own, not like its neighbour"


def test_finer_tiles_without_leaves_and_other_sizes_are_refused(bundle):
    with pytest.raises(ValueError, match="twice the pixels of its encoder, expected adaptive patches"):
        encoded(at_resolution(bundle, 124), [page((62, 50))])
    for side in (62, 100, 0, -124):
        with pytest.raises(ValueError, match=f"a tile of {side} px; expected 124 px"):
            at_resolution(bundle, side)


def test_a_plan_of_pretrained_patches_drops_nothing(bundle):
    images = [page(size, seed) for seed, size in enumerate(SIZES)]
    stock, batch = encoded(bundle, images)
    with attached(bundle, PatchConfig(sizes=(14,), coarse=None)):
        same, again = encoded(bundle, images)
    assert again.tokens == batch.tokens and all(
        torch.allclose(a, b, atol=1e-4) for a, b in zip(same, stock, strict=True)
    )


@pytest.mark.parametrize("tiles", [None, 1])
def test_a_batch_is_answered_as_each_image_alone(bundle, tiles):
    images = [page(size, seed) for seed, size in enumerate(SIZES[:4])]
    asked = [(0, "What is the value of red in 2015?"), (1, "List all values."),
             (1, "What is the value of red in 2015?"), (3, "List all values.")]
    with attached(bundle):
        features, batch = encoded(bundle, images, tiles)
        assert len({len(own) for own in features}) > 1
        for image, own, tokens in zip(images, features, batch.tokens, strict=True):
            (alone,), single = encoded(bundle, [image], tiles)
            assert single.tokens == [tokens] and torch.allclose(own, alone, atol=1e-5)
        together = generate(bundle, images, asked, 4, tiles=tiles)
        assert together == [generate(bundle, [images[number]], [(0, text)], 4, tiles=tiles)[0]
                            for number, text in asked]


@pytest.mark.parametrize("tiles", [None, 1])
def test_a_training_batch_has_the_losses_of_its_documents(bundle, tiles):
    rows = [Sample(f"p{seed}", f"p{seed}", "own", "What is the value of red?", ("12",), page(size, seed))
            for seed, size in enumerate(SIZES[:4])]
    weight = bundle.family.tower_of(bundle.model).embeddings.patch_embedding.weight
    whole = training_batch(bundle, rows, tiles=tiles)
    with attached(bundle):
        batch = training_batch(bundle, rows, tiles=tiles)
        found = (batch["input_ids"] == bundle.model.config.image_token_id).sum(1).tolist()
        assert found == [len(own) for own in encoded(bundle, [row.image for row in rows], tiles)[0]]
        loss, targets = answer_loss(bundle.model, batch)
        alone = [answer_loss(bundle.model, training_batch(bundle, [row], tiles=tiles)) for row in rows]
        assert targets == sum(own for _, own in alone) and torch.allclose(loss, sum(own for own, _ in alone), rtol=1e-4)
        assert torch.autograd.grad(loss, weight)[0].abs().sum() > 0
    assert batch["input_ids"].shape[1] < whole["input_ids"].shape[1]


@pytest.mark.parametrize("size", SIZES)
def test_tokens_that_stay_show_what_their_copies_showed(bundle, size):
    row, scale = Sample("p", "p", "own", "What is it?", ("12",), page(size)), np.array([*size, *size]) / 62
    with attached(bundle) as control:
        (fewer,), _ = encoded(bundle, [row.image])
        plans = list(control.last)
        with pytest.raises(ValueError, match="call detach_tokens first"):
            record(bundle, [row], tower="language")
    shown, boxes = shown_boxes(bundle, size, None, plans), language_boxes(bundle, size)
    areas = [np.nansum((own[:, 2] - own[:, 0]) * (own[:, 3] - own[:, 1])) for own in (shown, boxes)]
    assert len(shown) == len(fewer) < len(boxes) and np.isclose(*areas, rtol=1e-5)
    assert np.allclose(shown[: len(plans[0])], plans[0].boxes * scale, atol=1e-3), "of the whole image: its leaves"


def test_what_does_not_fit_is_named(bundle):
    model, plan = bundle.model, PatchPlan((4, 4), [0], [0], [56])
    for plans, views, sizes in (([plan] * 3, [2], [(62, 62)]), ([plan] * 2, [2], None),
                                ([plan] * 2, [1, 1], [(62, 62)])):
        with pytest.raises(ValueError, match="expected a plan per tile and a size per image"):
            token_origins(model, bundle.family, plans, views, sizes)
    # a leaf each, and the ends of four rows
    assert is_kept(token_origins(model, bundle.family, [plan] * 2, [2], [(62, 62)])[0]).sum() == 2 + 4
    batch = image_batch(bundle, [page((130, 130))])
    with attached(bundle), torch.no_grad():
        with pytest.raises(ValueError, match="the model packs .* tokens, plans are for"):
            model.get_image_features(**batch.inputs, vision_aspect_ratio="anyres_max_1")
