"""Recorded attention is the attention the model uses, its measures are what they say, and the model is left as it was."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from sfa_core.answers import image_inputs
from sfa_core.attention import inject
from sfa_core.documents import documents, make_document, samples
from sfa_core.embedded import EmbeddedConfig, build_processor, train_tokenizer
from sfa_core.families import uniform_grid
from sfa_core.models import new_bundle
from sfa_core.probes import UNITS, attention_chunks, measure_layer, place_tokens, record, tile_regions

SMALL = EmbeddedConfig(image_size=112, vision_layers=3, vision_width=64, vision_hidden=64, language_layers=1, initializer_range=0.3)


@pytest.fixture(scope="module")
def tokenizer():
    rows = [make_document("bar", seed).row() for seed in range(3)]
    return train_tokenizer([text for row in rows for part in row["questions"] for text in (part["question"], part["answers"][0])])


@pytest.fixture
def bundle(tokenizer):
    return new_bundle(SMALL, tokenizer, seed=1)


@pytest.fixture(scope="module")
def asked():
    return list({sample.document: sample for sample in samples(documents(8, seed=3), kinds=("read_label", "read_cell"))}.values())[:5]


def returned(bundle, asked, implementation):
    "The weights (B, L, H, Q, K) that the attention modules return in an implementation that returns them."
    before = bundle.model.config.vision_config._attn_implementation
    bundle.model.set_attn_implementation({"vision_config": implementation})
    weights, modules = [], bundle.family.attentions_of(bundle.model)
    handles = [module.register_forward_hook(lambda m, i, o: weights.append(o[1])) for module in modules]
    with torch.no_grad():
        bundle.model.get_image_features(pixel_values=image_inputs(bundle, [sample.image for sample in asked])[0].to(bundle.model.dtype))
    for handle in handles:
        handle.remove()
    bundle.model.set_attn_implementation({"vision_config": before})
    return torch.stack(weights, dim=1).numpy()


def test_recorded_maps_are_the_weights_of_eager_attention(bundle, asked):
    seen = record(bundle, asked, queries="all")
    assert np.allclose(seen.maps, returned(bundle, asked, "eager"), atol=1e-5)
    assert seen.maps.std() > 1e-3  # the model does prefer some tokens


def test_norms_of_queries_and_keys_are_applied(bundle, asked):
    for module in bundle.family.attentions_of(bundle.model):
        module.q_norm, module.k_norm = nn.LayerNorm(64), nn.LayerNorm(64)
    assert np.allclose(record(bundle, asked, queries="all").maps, returned(bundle, asked, "eager"), atol=1e-5)


@pytest.mark.parametrize("terms", [("row", "column", "distance", "block"), ("distance",), ("block",)])
def test_recorded_maps_hold_the_structural_bias(bundle, asked, terms):
    plain = record(bundle, asked, queries="all")
    for bias in inject(bundle.model, bundle.family, terms=terms):
        nn.init.normal_(next(bias.parameters()), std=2)
    seen = record(bundle, asked, queries="all")
    assert np.allclose(seen.maps, returned(bundle, asked, "sfa_eager"), atol=1e-5)
    assert np.abs(seen.maps - plain.maps).max() > 1e-2
    bundle.model.set_attn_implementation({"vision_config": "sdpa"})  # the exact baseline of a model that carries a bias
    assert np.allclose(record(bundle, asked, queries="all").maps, plain.maps, atol=1e-6)


def test_the_model_runs_its_own_attention_and_is_left_as_it_was(bundle, asked, monkeypatch):
    from transformers.models.internvl import modeling_internvl

    def slow(*args, **kwargs):
        raise AssertionError("eager attention was called")

    monkeypatch.setattr(modeling_internvl, "eager_attention_forward", slow)
    bundle.model.train()
    record(bundle, asked)
    assert bundle.model.training and bundle.model.config.vision_config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in bundle.model.modules())


def test_hooks_are_gone_after_an_error(bundle, asked):
    def fail(module, args):
        raise RuntimeError("encoder stopped")

    layer = bundle.family.tower_of(bundle.model).encoder.layer[2]
    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="encoder stopped"):
        record(bundle, asked)
    handle.remove()
    assert not any(module._forward_pre_hooks for module in bundle.model.modules())


def test_batches_and_pieces_change_nothing(bundle, asked):
    whole, single = record(bundle, asked, queries=[5, 9]), record(bundle, asked, queries=[9, 5], batch_size=1)
    for name in ("entropy", "same_row", "same_column", "special_mass", "distance", "evidence_mass", "evidence_share", "received", "maps", "region"):
        assert np.allclose(getattr(whole, name), getattr(single, name), atol=1e-5, equal_nan=True), name
        assert getattr(whole, name).dtype == np.float32
    module, hidden = bundle.family.attentions_of(bundle.model)[0], torch.randn(2, 65, 64)
    places = place_tokens(whole.grid, whole.region[:2], np.random.default_rng(0).random((2, 65), dtype=np.float32), torch.device("cpu"))
    with torch.no_grad():
        large, small = (measure_layer(module, hidden, places, np.arange(65), budget) for budget in (1 << 22, 1))
        assert len(list(attention_chunks(module, hidden, 1))) == 65
    assert all(np.allclose(large[name], small[name], atol=1e-5, equal_nan=True) for name in large)


@pytest.mark.parametrize("seed", range(5))
def test_measures_of_an_attention_that_looks_at_one_token(seed):
    draw, grid = np.random.default_rng(seed), uniform_grid(3, 5, special=1)
    target = draw.permutation(16)
    cover, region = draw.random((1, 16), dtype=np.float32), np.array([[10, 20, 60, 80]], dtype=np.float32)
    projection = nn.Linear(16, 16, bias=False)
    projection.weight.data = 500 * torch.eye(16)[torch.from_numpy(target)].T  # a query i is the key of target i
    module = SimpleNamespace(q_proj=projection, k_proj=nn.Identity(), num_heads=1, scale=1.0, config=SimpleNamespace(_attn_implementation="sdpa"))
    with torch.no_grad():
        got = measure_layer(module, torch.eye(16)[None], place_tokens(grid, region, cover, torch.device("cpu")), np.arange(16))
    patch = np.arange(1, 16)
    x, y = 10 + (grid.column + 0.5) * 10, 20 + (grid.row + 0.5) * 20
    away = np.hypot(x - x[target], y - y[target])
    assert (got["maps"][0, 0].argmax(-1) == target).all() and np.allclose(got["entropy"], 0, atol=1e-6)
    assert np.allclose(got["evidence_mass"][0, 0], cover[0, target]) and np.allclose(got["special_mass"][0, 0], target == 0)
    same = [(place == place[target]) & ~grid.special for place in (grid.row, grid.column)]
    assert np.allclose(got["same_row"][0, 0], same[0]) and np.allclose(got["same_column"][0, 0], same[1])
    to_patch = patch[target[patch] > 0]
    assert np.allclose(got["distance"][0, 0, to_patch], away[to_patch], rtol=1e-4, atol=1e-3) and np.isnan(got["distance"][0, 0, 0])
    assert np.allclose(got["received"][0, 0], 1 / 16)


def test_measures_agree_with_the_maps(bundle, asked):
    seen = record(bundle, asked, queries="all")
    assert np.allclose(seen.entropy, -(seen.maps * np.log(seen.maps)).sum(-1), atol=1e-4)
    assert np.allclose(seen.effective, np.exp(seen.entropy)) and (seen.relative <= 1.0001).all()
    assert np.allclose(seen.received, seen.maps.mean(3), atol=1e-6)
    for name in UNITS:
        assert seen.per_head(name).shape == (3, 4)
    where = seen.map(2, 1, query=7)
    assert np.allclose(where.ravel(), seen.maps[2, 1, :, 7, 1:].mean(0), atol=1e-6)
    assert np.allclose(seen.map(2, 1, query=7, head=3).ravel(), seen.maps[2, 1, 3, 7, 1:])


def test_samples_without_evidence_are_left_out_of_its_mean_only(bundle, asked):
    without = [replace(sample, evidence=None) for sample in asked[:3]]
    seen, known = record(bundle, [*without, *asked[3:]]), record(bundle, asked[3:])
    assert np.isnan(seen.evidence_share[:3]).all() and np.isnan(seen.evidence_mass[:3]).all()
    assert np.allclose(seen.per_head("evidence_mass"), known.per_head("evidence_mass"), atol=1e-6)
    assert seen.table()["evidence_mass"].isna().sum() == 3 * 3 * 4
    with pytest.raises(ValueError, match="no sample of the record has evidence"):
        record(bundle, without).per_head("evidence_mass")


@pytest.mark.parametrize("size", [(300, 200), (200, 400), (448, 112), (130, 130)])
def test_tokens_show_the_pixels_they_say(bundle, tokenizer, size):
    tiled = replace(bundle, processor=build_processor(tokenizer, SMALL, max_tiles=6))
    draw = np.random.default_rng(sum(size))
    for _ in range(4):
        x, y = draw.uniform(0, size[0]), draw.uniform(0, size[1])
        image = np.zeros((size[1], size[0], 3), dtype=np.uint8)
        image[max(0, int(y) - 2) : int(y) + 3, max(0, int(x) - 2) : int(x) + 3] = 255  # planted
        picture = Image.fromarray(image)
        pixels, (count,) = image_inputs(tiled, [picture])
        found = 0
        for tile, (x0, y0, x1, y1) in zip(pixels[:, 0], tile_regions(tiled, size, count), strict=True):
            if tile.max() > tile.min() + 3.5:  # nearly all of the spot is here
                row, column = divmod(int((tile - tile.min()).clamp(min=0).argmax()), 112)
                assert abs(x0 + (column + 0.5) / 112 * (x1 - x0) - int(x) - 0.5) < 6 and abs(y0 + (row + 0.5) / 112 * (y1 - y0) - int(y) - 0.5) < 6
                found += 1
        assert found >= 1 and count == len(tile_regions(tiled, size, count))


def test_tiles_and_thumbnail_are_rows_of_the_record(bundle, tokenizer, asked):
    tiled = replace(bundle, processor=build_processor(tokenizer, SMALL, max_tiles=6))
    wide = [replace(sample, source=sample.image.resize((336, 224))) for sample in asked[:2]]
    seen = record(tiled, wide)
    assert seen.sample == (wide[0].id,) * 7 + (wide[1].id,) * 7 and seen.entropy.shape == (14, 3, 4, 65)
    assert seen.region[4].tolist() == [112, 112, 224, 224] and seen.region[6].tolist() == [0, 0, 336, 224]
    assert np.isclose(seen.evidence_share[:6].mean(), seen.evidence_share[6], atol=1e-6)  # the tiles share the image out
    assert seen.token_at(4, 112, 112) == 1 and seen.token_at(6, 335, 223) == 64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tower": "language"}, "tower is 'language', expected 'vision'"),
        ({"layers": [0, 3]}, r"layers are \[0, 3\], expected different numbers from 0 to 2"),
        ({"layers": []}, "expected different numbers"),
        ({"queries": [65]}, "queries run from 65 to 65, expected tokens from 0 to 64, or 'all'"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"tiles": 0}, "tiles 0; expected at least 1"),
    ],
)
def test_wrong_requests_are_refused(bundle, asked, wrong, message):
    with pytest.raises(ValueError, match=message):
        record(bundle, asked, **wrong)


def test_wrong_questions_to_a_record_are_refused(bundle, asked):
    seen = record(bundle, asked[:1], layers=[2], queries=[4])
    assert seen.layers == (2,) and seen.map(0, 2, 4).shape == (8, 8)
    for call, message in (
        (lambda: seen.per_head("width"), "measure is 'width', expected one of entropy"),
        (lambda: seen.map(0, 0, 4), "no map of query 4 in layer 0"),
        (lambda: seen.map(0, 2, 5), "no map of query 5 in layer 2"),
        (lambda: seen.map(1, 2, 4), "no map of query 4 in layer 2 of tile 1: recorded are 1 tiles"),
        (lambda: seen.token_at(0, 112, 3), "outside of tile 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="no samples"):
        record(bundle, [])
