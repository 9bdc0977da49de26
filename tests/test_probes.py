"""Recorded attention is the attention the model uses, its measures are what they say, and the model is left as it
was."""

import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from sfa_core.models.answers import answer
from sfa_core.models.sequences import prompt_tokens
from sfa_core.structure.inject import inject
from sfa_core.documents.generate import documents, make_document
from sfa_core.documents.samples import Evidence, Sample, TextBox, samples
from sfa_core.models.embedded import EmbeddedConfig, build_processor, train_tokenizer
from sfa_core.core.families import FAMILIES, uniform_grid
from sfa_core.models.images import image_batch, image_features, image_inputs, image_tokens, tile_regions
from sfa_core.models.miniatures import miniature
from sfa_core.models.load import new_bundle
from sfa_core.attention.capture import attention_chunks, measure_layer, place_tokens
from sfa_core.core.hooks import AttentionCall
from sfa_core.attention.places import box_means, coverage, language_boxes, expand_to_image, token_boxes
from sfa_core.attention.probes import record
from sfa_core.attention.records import STORED, UNITS
from sfa_core.structure.bias import StructuralBias
from sfa_core.structure.geometry import uniform_geometry


def call_of(module, query, key, scaling):
    """Return a call without mask, as the kernel of an encoder gets it."""
    return AttentionCall(0, module, query, key, torch.empty_like(key), None, scaling, False)


SMALL = EmbeddedConfig(image_size=112, vision_layers=3, vision_width=64, vision_hidden=64, language_layers=1,
                       initializer_range=0.3)


@pytest.fixture(scope="module")
def tokenizer():
    rows = [make_document("bar", seed).row() for seed in range(3)]
    return train_tokenizer([text for row in rows for part in row["questions"]
                            for text in (part["question"], part["answers"][0])])


@pytest.fixture
def bundle(tokenizer):
    return new_bundle(SMALL, tokenizer, seed=1)


@pytest.fixture(scope="module")
def asked():
    return list({sample.document: sample
                 for sample in samples(documents(8, seed=3), kinds=("read_label", "read_cell"))}.values())[:5]


def returned(bundle, asked, implementation):
    "The weights (B, L, H, Q, K) that the attention modules return in an implementation that returns them."
    before = bundle.model.config.vision_config._attn_implementation
    bundle.model.set_attn_implementation({"vision_config": implementation})
    weights, modules = [], bundle.family.attentions_of(bundle.model)
    handles = [module.register_forward_hook(lambda m, i, o: weights.append(o[1])) for module in modules]
    with torch.no_grad():
        bundle.model.get_image_features(
            pixel_values=image_inputs(bundle, [sample.image for sample in asked])[0].to(bundle.model.dtype)
        )
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
    for bias in inject(bundle, terms=terms):
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
    stock = ALL_ATTENTION_FUNCTIONS.get_interface
    bundle.model.train()
    record(bundle, asked)
    record(bundle, asked[:2], tower="language", max_new_tokens=2)
    assert bundle.model.training and bundle.model.config.vision_config._attn_implementation == "sdpa"
    assert ALL_ATTENTION_FUNCTIONS.get_interface == stock


def test_nothing_is_watched_after_an_error(bundle, asked):
    def fail(module, args):
        raise RuntimeError("encoder stopped")

    layer = bundle.family.tower_of(bundle.model).encoder.layer[2]
    handle = layer.register_forward_pre_hook(fail)
    stock = ALL_ATTENTION_FUNCTIONS.get_interface
    with pytest.raises(RuntimeError, match="encoder stopped"):
        record(bundle, asked)
    handle.remove()
    assert ALL_ATTENTION_FUNCTIONS.get_interface == stock


def test_batches_and_pieces_change_nothing(bundle, asked):
    whole, single = record(bundle, asked, queries=[5, 9]), record(bundle, asked, queries=[9, 5], batch_size=1)
    for name in (*STORED, "evidence_share", "pointing_chance", "received", "maps", "region", "boxes", "visible"):
        assert np.allclose(getattr(whole, name), getattr(single, name), atol=1e-5, equal_nan=True), name
        assert getattr(whole, name).dtype == np.float32
    module = bundle.family.attentions_of(bundle.model)[0]
    call = call_of(module, *torch.randn(2, 2, 4, 65, 16), 0.25)
    places = place_tokens(whole.grid, whole.region[:2], np.random.default_rng(0).random((2, 65), dtype=np.float32),
                          torch.device("cpu"))
    large, small = (measure_layer(call, places, np.arange(65), budget) for budget in (1 << 22, 1))
    assert len(list(attention_chunks(call, 1))) == 65
    assert all(np.allclose(large[name], small[name], atol=1e-5, equal_nan=True) for name in large)


@pytest.mark.parametrize("seed", range(5))
def test_measures_of_an_attention_that_looks_at_one_token(seed):
    draw, grid = np.random.default_rng(seed), uniform_grid(3, 5, special=1)
    target = draw.permutation(16)
    cover, region = np.clip(draw.random((1, 16), dtype=np.float32) - 0.5, 0,
                            1), np.array([[10, 20, 60, 80]], dtype=np.float32)
    query = 500 * torch.eye(16)[torch.from_numpy(target)]  # a query i is the key of target i
    call = call_of(SimpleNamespace(config=SimpleNamespace(_attn_implementation="sdpa")), query[None, None],
                   torch.eye(16)[None, None], 1.0)
    got = measure_layer(call, place_tokens(grid, region, cover, torch.device("cpu")), np.arange(16))
    patch = np.arange(1, 16)
    x, y = 10 + (grid.column + 0.5) * 10, 20 + (grid.row + 0.5) * 20
    away = np.hypot(x - x[target], y - y[target])
    assert (got["maps"][0, 0].argmax(-1) == target).all() and np.allclose(got["entropy"], 0, atol=1e-6)
    assert np.allclose(got["evidence_mass"][0, 0], cover[0, target]) and np.allclose(
        got["special_mass"][0, 0], target == 0
    )
    same = [(place == place[target]) & ~grid.special for place in (grid.row, grid.column)]
    assert np.allclose(got["same_row"][0, 0], same[0]) and np.allclose(got["same_column"][0, 0], same[1])
    to_patch = patch[target[patch] > 0]
    assert np.allclose(got["distance"][0, 0, to_patch], away[to_patch], rtol=1e-4, atol=1e-3) and np.isnan(
        got["distance"][0, 0, 0]
    )
    assert np.allclose(got["received"][0, 0], 1 / 16)
    assert np.array_equal(got["pointing"][0, 0, to_patch], (cover[0, target[to_patch]] > 0).astype(np.float32))


def test_measures_agree_with_the_maps(bundle, asked):
    seen = record(bundle, asked, queries="all")
    assert np.allclose(seen.entropy, -(seen.maps * np.log(seen.maps)).sum(-1), atol=1e-4)
    assert np.allclose(seen.effective, np.exp(seen.entropy)) and (seen.relative <= 1.0001).all()
    assert np.allclose(seen.received, seen.maps.mean(3), atol=1e-6)
    for name in UNITS:
        assert seen.per_head(name).shape == (3, 4)
    own = np.stack([coverage([sample.evidence.texts[i].box for i in sample.evidence.answer], seen.grid,
                             (0, 0, 112, 112), (112, 112)) for sample in asked])
    assert np.allclose(seen.evidence_mass, np.einsum("blhqk,bk->blhq", seen.maps, own), atol=1e-5)
    best = 1 + seen.maps[..., 1:].argmax(-1)
    assert np.array_equal(seen.pointing, np.take_along_axis(own[:, None, None].repeat(3, 1).repeat(4, 2), best, -1) > 0)
    assert np.allclose(seen.pointing_chance, (own[:, 1:] > 0).mean(-1)) and np.allclose(
        seen.visual_mass, seen.maps[..., 1:].sum(-1), atol=1e-5
    )
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
        for tile, (x0, y0, x1, y1) in zip(pixels[:, 0], tile_regions(tiled, size), strict=True):
            if tile.max() > tile.min() + 3.5:  # nearly all of the spot is here
                row, column = divmod(int((tile - tile.min()).clamp(min=0).argmax()), 112)
                assert (
                    abs(x0 + (column + 0.5) / 112 * (x1 - x0) - int(x) - 0.5) < 6
                    and abs(y0 + (row + 0.5) / 112 * (y1 - y0) - int(y) - 0.5) < 6
                )
                found += 1
        assert found >= 1 and count == len(tile_regions(tiled, size))


def test_tiles_and_thumbnail_are_rows_of_the_record(bundle, tokenizer, asked):
    tiled = replace(bundle, processor=build_processor(tokenizer, SMALL, max_tiles=6))
    wide = [replace(sample, source=sample.image.resize((336, 224))) for sample in asked[:2]]
    seen = record(tiled, wide)
    assert seen.sample == (wide[0].id,) * 7 + (wide[1].id,) * 7 and seen.entropy.shape == (14, 3, 4, 65)
    assert seen.region[4].tolist() == [112, 112, 224, 224] and seen.region[6].tolist() == [0, 0, 336, 224]
    # the tiles share the image out
    assert np.isclose(seen.evidence_share[:6].mean(), seen.evidence_share[6], atol=1e-6)
    assert seen.token_at(4, 112, 112) == 1 and seen.token_at(6, 335, 223) == 64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tower": "audio"}, "tower is 'audio', expected 'vision' or 'language'"),
        ({"tower": "language", "layers": [1]}, r"layers are \[1\], expected different numbers from 0 to 0"),
        ({"rollout": True}, "and 0 queries of the vision tower, expected all 3 of the encoder, and queries"),
        ({"rollout": True, "queries": [1], "layers": [0, 2]}, r"rollout of layers \[0, 2\]"),
        ({"rollout": True, "tower": "language", "queries": [1]}, "of the language tower"),
        ({"layers": [0, 3]}, r"layers are \[0, 3\], expected different numbers from 0 to 2"),
        ({"layers": []}, "expected different numbers"),
        ({"queries": [65]}, "queries run from 65 to 65, expected tokens from 0 to 64, or 'all'"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"tiles": 0}, "tiles 0; internvl expects at least 1"),
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


def test_rollout_is_the_product_of_the_layers(bundle, asked):
    seen = record(bundle, asked, queries="all", rollout=True)
    expected = np.eye(65)
    for layer in range(3):
        expected = (seen.maps[:, layer].mean(1) + np.eye(65)) / 2 @ expected
    assert np.allclose(seen.rollout, expected, atol=1e-5)
    few = record(bundle, asked, queries=[0, 7], rollout=True)
    assert few.rollout.shape == (5, 2, 65) and np.allclose(few.rollout, expected[:, [0, 7]], atol=1e-5)


def test_words_read_what_eager_attention_says(bundle, asked):
    """Masks, rotary places, norms and grouped keys of the language model are those of its own forward pass, one
    question at a time."""
    assert bundle.model.config.text_config.num_key_value_heads < bundle.model.config.text_config.num_attention_heads
    seen, replies = record(bundle, asked, tower="language", max_new_tokens=3), answer(bundle, asked, max_new_tokens=3)
    bundle.model.set_attn_implementation("eager")
    image, compared = bundle.model.config.image_token_id, 0
    for row, (sample, reply) in enumerate(zip(asked, replies, strict=True)):
        before, after = prompt_tokens(bundle, sample.question)
        prompt = before + image_tokens(bundle, 1) + after
        if image in reply.tokens:
            continue  # a model that has learned nothing may write one, and a second pass cannot read it
        compared += 1
        ids = torch.tensor([prompt + list(reply.tokens)])
        with torch.no_grad():
            out = bundle.model(input_ids=ids, pixel_values=image_inputs(bundle, [sample.image])[0],
                               output_attentions=True)
        weights = torch.stack(out.attentions, dim=1)[0, :, :, len(prompt) - 1 :].numpy()  # (L, H, words + 1, N)
        for word in range(len(reply.tokens)):
            chance = weights[:, :, word, : len(prompt) + word]
            assert np.allclose(seen.maps[row, :, :, word], chance[..., (ids[0, : len(prompt) + word] == image).numpy()],
                               atol=1e-5)
            assert np.allclose(seen.entropy[row, :, :, word], -(chance * np.log(np.maximum(chance, 1e-30))).sum(-1),
                               atol=1e-4)
            assert (seen.visible[row, :, word] == len(prompt) + word).all()
        assert [bundle.tokenizer.decode([token])
                for token in reply.tokens] == list(seen.words[row])[: len(reply.tokens)]
    assert compared >= 2


def test_questions_of_one_batch_are_each_as_alone(bundle, tokenizer, asked):
    tiled = replace(bundle, processor=build_processor(tokenizer, SMALL, max_tiles=6))
    mixed = [replace(asked[0], source=asked[0].image.resize((336, 224))), asked[1], asked[2]]
    whole, single = (record(tiled, mixed, tower="language", max_new_tokens=4, batch_size=size) for size in (3, 1))
    for name in (*STORED, "received", "maps", "boxes", "cells", "visible", "evidence_share", "pointing_chance"):
        assert np.allclose(getattr(whole, name), getattr(single, name), atol=1e-5, equal_nan=True), name
    assert whole.words == single.words and whole.boxes.shape == (3, 7 * 64, 4) and np.isnan(whole.boxes[1, 64:]).all()
    assert whole.cells.tolist() == [[16, 24], [8, 8], [8, 8]] and whole.region[0].tolist() == [0, 0, 336, 224]
    assert np.isclose(whole.map(0, 0, 1).sum(), whole.visual_mass[0, 0, :, 1].mean(), atol=1e-5)
    assert whole.token_at(0, 335, 223) == 6 * 64 - 1  # the finest token, not the thumbnail's
    with pytest.raises(ValueError, match="distance is a measure of the encoder, the record is of the language tower"):
        whole.per_head("distance")


@pytest.mark.parametrize("size, tiles", [((224, 112), 3), ((336, 224), 7), ((112, 112), 1)])
def test_the_thumbnail_and_the_tiles_add_up_on_the_page(bundle, tokenizer, size, tiles):
    """A mass that is spread evenly over the pixels of a page is spread evenly by tiles, by the thumbnail, and by
    their sum."""
    tiled = replace(bundle, processor=build_processor(tokenizer, SMALL, max_tiles=6))
    boxes = language_boxes(tiled, size)
    assert len(boxes) == 64 * tiles == len(token_boxes(bundle.family.language_grid(bundle.model),
                                                       tile_regions(tiled, size)))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    picture = expand_to_image(area, boxes, (0, 0, *size), (16, 24))
    assert np.allclose(picture, picture.mean(), rtol=1e-5) and np.isclose(picture.sum(), area.sum())


@pytest.mark.parametrize("seed", range(4))
def test_the_patch_that_sees_a_bright_spot_shows_its_pixels_in_qwens_order(seed):
    "Qwen's own processor stores the planted spot at the patch whose box holds it."
    draw, processor = np.random.default_rng(seed), Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=10**6)
    rows, columns = draw.integers(2, 7, 2) * 2
    image = np.zeros((rows * 14, columns * 14, 3), dtype=np.uint8)
    x, y = draw.integers(2, columns * 14 - 2), draw.integers(2, rows * 14 - 2)
    image[y, x] = 255
    prepared = processor(images=[Image.fromarray(image)], return_tensors="np")
    assert prepared["image_grid_thw"].tolist() == [[1, rows, columns]]
    bright = int(prepared["pixel_values"].max(-1).argmax())
    family, config = FAMILIES["qwen2_5_vl"], Qwen2_5_VLConfig()
    box = family.grid(config, (rows, columns)).boxes((0, 0, columns * 14, rows * 14))[bright]
    assert box[0] <= x < box[2] and box[1] <= y < box[3]
    # the merge is a reshape
    word = family.language_grid(config, (rows, columns)).boxes((0, 0, columns * 14, rows * 14))[bright // 4]
    assert word[0] <= x < word[2] and word[1] <= y < word[3]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))
def test_box_means_and_spread_agree_with_counting_pixels(height, width, seed):
    draw = np.random.default_rng(seed)
    picture, corners = draw.random((height, width)), np.sort(draw.uniform(0, 1, (5, 2, 2)), axis=1) * [width, height]
    boxes = corners.reshape(5, 4)
    fine = 200  # sub-pixels per pixel
    for box, mean in zip(boxes, box_means(picture, boxes), strict=True):
        x = (np.floor(np.linspace(box[0], box[2], fine, endpoint=False) + (box[2] - box[0]) / fine / 2)).astype(int)
        y = (np.floor(np.linspace(box[1], box[3], fine, endpoint=False) + (box[3] - box[1]) / fine / 2)).astype(int)
        assert np.isclose(mean, picture[np.ix_(y, x)].mean(), atol=0.03)
    values = draw.random(5)
    laid = expand_to_image(values, boxes.astype(np.float32), (0, 0, width, height), (height, width))
    assert np.isclose(laid.sum(), values.sum(), rtol=1e-4) and (laid >= 0).all()
    # one is the transpose of the other
    assert np.isclose((laid * picture).sum(), (values * box_means(picture, boxes)).sum(), rtol=1e-3)


class Live(TorchDispatchMode):
    "Count the bytes that tensors made inside hold at most at a time."

    def __enter__(self):
        self.now = self.peak = 0
        self.known = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # views of what was there cost nothing
        self.known |= {tensor.untyped_storage().data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else (out,):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, storage.data_ptr(), storage.nbytes())
        return out

    def drop(self, address, size):
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize(("structure", "rollout"), [(False, False), (True, True)])
def test_a_layer_of_1025_tokens_needs_at_most_16_mib_more(structure, rollout):
    grid, heads = uniform_grid(32, 32, special=1), 16
    module = nn.Module()
    module.config = SimpleNamespace(_attn_implementation="sfa" if structure else "sdpa")
    if structure:
        module.structure = StructuralBias(heads)
        module.structure.geometry = uniform_geometry(32, 32, special=1)
    call = call_of(module, *torch.randn(2, 1, heads, 1025, 64), 0.125)
    places = place_tokens(grid, np.array([[0, 0, 448, 448]]), np.zeros((1, 1025), dtype=np.float32),
                          torch.device("cpu"))
    with torch.no_grad(), Live() as live:
        got = measure_layer(call, places, np.array([0, 500]), table=rollout)
    assert got["entropy"].shape == (1, heads, 1025) and 2**20 < live.peak <= 16 * 2**20, f"{live.peak / 2**20:.1f} MiB"


@pytest.fixture(scope="module")
def pages():
    draw = np.random.default_rng(0)
    shapes = ((168, 112), (100, 140), (150, 150))
    texts = TextBox("12", (20, 20, 60, 40))
    images = [Image.fromarray(draw.integers(0, 256, (tall, wide, 3), dtype=np.uint8)) for wide, tall in shapes]
    return [Sample(f"p{i}", f"p{i}", "own", "What is it?", ("12",), image, Evidence((), (texts,), (0,)))
            for i, image in enumerate(images)]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_recorded_as_its_eager_attention(name, pages):
    """Tiles, one square, and windows of packed images: what is recorded of each image is what its eager encoder
    attends, and 0 outside of a window."""
    small = miniature(name)
    family, images = small.family, [sample.image for sample in pages]
    seen, modules, found = record(small, pages, queries="all", rollout=True), family.attentions_of(small.model), []

    def eager(module, query, key, value, attention_mask, scaling=None, **kwargs):
        weights = (query @ key.mT * scaling).softmax(-1)
        found.extend([(modules.index(module), weights)] if module in modules else [])
        return (weights @ value).transpose(1, 2).contiguous(), weights

    ALL_ATTENTION_FUNCTIONS.get_interface = lambda implementation, default: eager
    try:
        with torch.no_grad():
            image_features(small, image_batch(small, images))
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface
    sizes = image_batch(small, images).inputs.get("image_grid_thw")
    for layer in range(len(modules)):
        calls = [weights for at, weights in found if at == layer]
        if not family.native:
            assert np.allclose(seen.maps[:, layer], calls[0].numpy(), atol=1e-5)
            continue
        shapes = [tuple(size) for size in sizes[:, 1:].tolist()]
        expected = np.zeros_like(seen.maps[:, layer])
        for part, weights in zip(family.geometry(small.model, shapes)[layer], calls, strict=True):
            whole = family.grid(small.model, shapes[part.image])
            own = [int(np.flatnonzero((whole.row == row) & (whole.column == column))[0])
                   for row, column in zip(part.row, part.column)]
            expected[part.image][:, np.array(own)[:, None], own] = weights[0].numpy()
        for row, (tall, wide) in enumerate(shapes):
            n = tall * wide
            assert np.allclose(seen.maps[row, layer, :, :n, :n], expected[row, :, :n, :n], atol=1e-5)
    shown = ~np.isnan(seen.boxes).any(-1)
    for name in ("entropy", "evidence_mass", "special_mass", "same_row"):
        values = np.moveaxis(getattr(seen, name), -1, 1)[shown]
        assert not np.isnan(values).any(), name
    kept = seen.maps[:, 0].sum(-1)
    assert np.allclose(kept[~np.isnan(kept) & (kept > 0)], 1, atol=1e-5)
    row, column = 0, seen.token_at(0, 30, 30)
    box = seen.boxes[row, column]
    assert box[0] <= 30 < box[2] and box[1] <= 30 < box[3] and (seen.relative[~np.isnan(seen.relative)] <= 1.0001).all()
    assert (
        np.allclose(seen.received[0, 0].sum(-1), 1, atol=1e-4)
        and len(seen.table()) == len(seen.sample) * len(modules) * seen.entropy.shape[2]
    )


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_words_of_every_family_are_laid_on_the_page(name, pages):
    small = miniature(name)
    whole, single = (record(small, pages, tower="language", max_new_tokens=3, batch_size=size) for size in (3, 1))
    assert np.allclose(whole.maps, single.maps, atol=1e-4, equal_nan=True) and whole.words == single.words
    for row, sample in enumerate(pages):
        image = whole.map(row, 0, 0)
        mass, edges = whole.visual_mass[row, 0, :, 0].mean(), np.nan_to_num(whole.boxes[row])
        # what lies beside the page cannot be drawn on it
        beyond = edges.min() < -1e-3 or (edges > np.array([*sample.image.size] * 2) + 1e-3).any()
        assert image.sum() <= mass + 1e-4 and (beyond or np.isclose(image.sum(), mass, atol=1e-4))


@pytest.mark.parametrize("size", [(168, 112), (300, 90), (60, 200), (500, 480)])
def test_onevision_packs_the_tokens_where_their_boxes_are(size):
    "Features that hold the centre of their box still do so after transformers has packed them."
    small = miniature("llava_onevision")
    grid, regions, boxes = small.family.language_grid(small.model), tile_regions(small,
                                                                                 size), language_boxes(small, size)
    centres = np.stack([np.stack([(own[:, 0] + own[:, 2]) / 2, (own[:, 1] + own[:, 3]) / 2], 1)
                        for own in (grid.boxes(tuple(region)) for region in regions)])
    packed, _ = small.model.model.pack_image_features([torch.from_numpy(centres)], torch.tensor([[size[1], size[0]]]),
                                                      image_newline=torch.full((2,), -1e6))
    packed = packed[0].numpy()
    line = packed[:, 0] < -1e5
    assert len(packed) == len(boxes) == sum(token == small.model.config.image_token_id
                                            for token in image_batch(small, [Image.new("RGB", size)]).tokens[0])
    assert np.array_equal(line, np.isnan(boxes).any(1))
    step = (boxes[~line, 2:] - boxes[~line, :2]).max(0)
    off = np.abs(packed[~line] - (boxes[~line, :2] + boxes[~line, 2:]) / 2)
    assert (off < 0.51 * step).all() and np.median(off) < 0.1 * step.max()
