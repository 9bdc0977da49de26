"""Each published reducer is what its definition says on small tensors, keeps exactly its budget, does not look at batch
mates, belongs to its model alone, and is refused by name where a family has no place for it."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image

from sfa_core.interventions.prompts import following
from sfa_core.interventions.reduction import (
    down_sampled,
    merge_means,
    merges_per_layer,
    pixel_pruned,
    random_dropped,
    similar_pairs,
    token_merged,
    unpredicted_blocks,
)
from sfa_core.interventions.reduction_handoff import diverse_tokens, diversity_pruned, vision_zipped, zipped_tokens
from sfa_core.interventions.reduction_language import fast_v, staying_tokens
from sfa_core.models.answers import generate
from sfa_core.models.embedded import EmbeddedConfig, train_tokenizer
from sfa_core.models.images import image_batch, image_features
from sfa_core.models.kept import kept_file
from sfa_core.models.load import new_bundle
from sfa_core.models.miniatures import miniature
from sfa_core.structure.inject import eject, inject, structures_of, use_attention
from sfa_core.tokens.adaptive import adaptive_tokens
from sfa_core.tokens.patches import PatchConfig

SHAPE = EmbeddedConfig(image_size=112, vision_width=32, vision_layers=3, vision_heads=2, vision_hidden=32,
                       language_width=32, language_layers=3, language_heads=2, language_kv_heads=1, head_dim=16,
                       language_hidden=32, downsample_ratio=0.5, initializer_range=0.2)
REDUCERS = {
    "random": lambda bundle: random_dropped(bundle, 24, seed=1),
    "PixelPrune": pixel_pruned,
    "ToMe": lambda bundle: token_merged(bundle, 24),
    "VisionZip": lambda bundle: vision_zipped(bundle, 6),
    "DivPrune": lambda bundle: diversity_pruned(bundle, 6),
    "FastV": lambda bundle: fast_v(bundle, 5, layer=1),
}
TOKENS = {"random": 6, "ToMe": 16, "VisionZip": 6, "DivPrune": 6, "FastV": 16}  # language tokens of a tile


@pytest.fixture(scope="module")
def bundle():
    return new_bundle(SHAPE, train_tokenizer(["What is the value of oak? 1 2 3 4 5"], 300), seed=3)


def pages(number=3):
    "White pages with bars on the raster of blocks and off it."
    rng, found = np.random.default_rng(5), []
    for _ in range(number):
        page = np.full((112, 112, 3), 255, np.uint8)
        for _ in range(3):
            y, x, down, across = rng.integers(0, 80), rng.integers(0, 80), rng.integers(4, 40), rng.integers(4, 40)
            page[y : y + down, x : x + across] = rng.integers(0, 256, 3)
        page[28:84, 28:56] = 90
        found.append(Image.fromarray(page))
    return found


@torch.no_grad()
def features(bundle, images):
    return image_features(bundle, image_batch(bundle, images)).images


@torch.no_grad()
def logits(bundle, images):
    "Logits of the last token of a prompt about each image, in one batch."
    batch = image_batch(bundle, images)
    rows = [[1, *block, 7, 9] for block in batch.tokens]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    encoded = image_features(bundle, batch).choose(range(len(images)))
    return bundle.model(input_ids=ids, attention_mask=mask, mm_encoder_outputs={"image": encoded}).logits[:, -1]


# Definitions


def plain_pixelprune(squares, tau):
    "Block by block, from what has been kept so far."
    rows, columns = squares.shape[:2]
    known, kept = {}, np.zeros((rows, columns), bool)
    near = lambda first, second: np.abs(first - second).max() <= tau
    for row in range(rows):
        for column in range(columns):
            places = (row, column - 1), (row - 1, column), (row - 1, column - 1)
            left, above, corner = (known.get(at) for at in places)
            guess = above if left is None else left
            if corner is not None and near(corner, left) and not near(corner, above):
                guess = above
            kept[row, column] = guess is None or not near(squares[row, column], guess)
            known[row, column] = squares[row, column] if kept[row, column] else guess
    return kept


@pytest.mark.parametrize("tau", [0.0, 2.0])
def test_pixelprune_drops_what_equals_its_prediction(tau):
    rng = np.random.default_rng(0)
    for _ in range(20):
        levels = rng.integers(0, 3, (5, 6)) * rng.choice([1, 40])
        page = np.kron(levels, np.ones((4, 4)))[None] + np.zeros((3, 1, 1))
        squares = page.reshape(3, 5, 4, 6, 4).transpose(1, 3, 0, 2, 4)
        kept = unpredicted_blocks(torch.from_numpy(page)[None], (5, 6), tau)
        assert np.array_equal(kept[0].reshape(5, 6).numpy(), plain_pixelprune(squares, tau))


def test_tome_merges_the_most_similar_pairs_and_counts_what_they_stand_for():
    for seed in range(10):
        keys, values = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(seed)).split(1)
        size, merges = torch.arange(1.0, 10)[None], 2
        unit = keys[0] / keys[0].norm(dim=-1, keepdim=True)
        pairs = []
        for first in range(1, 9, 2):  # one special token stays in front
            second = max(range(2, 9, 2), key=lambda at: float(unit[first] @ unit[at]))
            pairs.append((float(unit[first] @ unit[second]), first, second))
        groups = {at: [at] for at in range(9)}
        for _, first, second in sorted(pairs, reverse=True)[:merges]:
            groups[second] += groups.pop(first)
        expected = torch.stack([sum(size[0, at] * values[0, at] for at in group) / sum(size[0, at] for at in group)
                                for group in groups.values()])
        means, sizes = merge_means(values, size, similar_pairs(keys, merges, special=1), merges)
        assert torch.allclose(means[0], expected, atol=1e-5)
        assert sizes[0].tolist() == [sum(float(size[0, at]) for at in group) for group in groups.values()]
    assert sum(merges_per_layer(256, 100, 24)) == 156
    with pytest.raises(ValueError, match="half of the tokens"):
        merges_per_layer(64, 5, 3)


def test_visionzip_keeps_the_attended_and_averages_the_rest():
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        states, keys = torch.randn(1, 10, 4, generator=generator), torch.randn(1, 10, 3, generator=generator)
        attention = torch.rand(1, 10, generator=generator)
        chosen = sorted(sorted(range(10), key=lambda at: -float(attention[0, at]))[:3])
        rest = [at for at in range(10) if at not in chosen]
        targets = rest[:: len(rest) // 2][:2]
        groups = {target: [target] for target in targets}
        unit = torch.nn.functional.normalize(keys[0], dim=-1)
        cosine = (unit @ unit.T).tolist()
        for at in rest:
            if at not in targets:
                groups[max(targets, key=cosine[at].__getitem__)].append(at)
        expected = [states[0, at] for at in chosen] + [states[0, group].mean(0) for group in groups.values()]
        assert torch.allclose(zipped_tokens(states, attention, keys, 3, 2)[0], torch.stack(expected), atol=1e-5)


def test_divprune_chooses_greedily_by_the_smallest_distance():
    for seed in range(10):
        states = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(seed))
        unit = states[0] / states[0].norm(dim=-1, keepdim=True)
        distance = (1 - unit @ unit.T).tolist()
        chosen = [max(range(9), key=lambda at: min(distance[at][other] for other in range(9) if other != at))]
        while len(chosen) < 4:
            chosen.append(max((at for at in range(9) if at not in chosen),
                              key=lambda at: min(distance[at][other] for other in chosen)))
        assert diverse_tokens(states, 4).tolist() == [sorted(chosen)]


@torch.no_grad()
def test_fastv_is_a_mask_over_what_was_dropped(bundle):
    """Left out of later layers is the same as hidden from them: a plain pass, layer by layer, with masked keys."""
    image, language = pages(1), bundle.model.model.language_model
    batch = image_batch(bundle, image)
    ids = torch.tensor([[1, *batch.tokens[0], 7, 9]])
    embedded = bundle.model.get_input_embeddings()(ids)
    visual = ids == bundle.model.config.image_token_id
    embedded[visual] = features(bundle, image)[0]
    length = ids.shape[1]
    causal, kept = torch.full((length, length), -torch.inf).triu(1), torch.ones(length, dtype=torch.bool)
    places = language.rotary_emb(embedded, torch.arange(length)[None])
    states, own = embedded, language.config._attn_implementation
    language.config._attn_implementation = "eager"
    try:
        for number, layer in enumerate(language.layers):
            mask = causal.masked_fill(~kept, -torch.inf).where(~torch.eye(length, dtype=torch.bool), 0.0)[None, None]
            _, weights = layer.self_attn(layer.input_layernorm(states), places, mask)
            states = layer(states, attention_mask=mask, position_embeddings=places)
            if number == 0:
                order = weights[0].mean(0)[-1].masked_fill(~visual[0], -1).argsort(descending=True)[:5]
                kept = ~visual[0]
                kept[order] = True
    finally:
        language.config._attn_implementation = own
    expected = bundle.model.lm_head(language.norm(states))[0, -1]
    with fast_v(bundle, 5, layer=1):
        assert torch.allclose(logits(bundle, image)[0], expected, atol=1e-4)
    assert not torch.allclose(logits(bundle, image)[0], expected, atol=1e-4)


def test_fastv_needs_prompts_of_one_image_length():
    visual = torch.tensor([[True, True, False], [True, False, False]])
    with pytest.raises(ValueError, match="answer one at a time"):
        staying_tokens(torch.rand(2, 3), visual, 1)


def test_fastv_decodes_from_caches_of_two_lengths(bundle):
    with fast_v(bundle, 5, layer=1), following(bundle):
        together = generate(bundle, pages(2), [(0, "What is the value of oak?"), (1, "What?")], 5)
        alone = [generate(bundle, [pages(2)[at]], [(0, text)], 5)[0]
                 for at, text in enumerate(("What is the value of oak?", "What?"))]
    assert together == alone and all(reply for reply, _ in together)


# On a model


@pytest.mark.parametrize("name", REDUCERS)
def test_a_reducer_keeps_its_budget_and_looks_at_no_batch_mates(bundle, name):
    images, plain = pages(), features(bundle, pages())
    with REDUCERS[name](bundle):
        together = features(bundle, images)
        counts = [len(own) for own in together]
        assert counts == [ids.count(bundle.model.config.image_token_id) for ids in image_batch(bundle, images).tokens]
        assert name == "PixelPrune" and len(set(counts)) > 1 or counts == [TOKENS.get(name)] * 3
        alone = [features(bundle, [image])[0] for image in images]
        assert all(torch.allclose(own, other, atol=1e-5) for own, other in zip(together, alone))
        answers = logits(bundle, images)
        assert torch.allclose(answers, torch.cat([logits(bundle, [image]) for image in images]), atol=1e-4)
    assert all(torch.equal(own, other) for own, other in zip(features(bundle, images), plain))
    assert not torch.allclose(logits(bundle, images), answers, atol=1e-4)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_reducer_belongs_to_its_model(bundle, name):
    before, images = bundle.identity, pages(1)
    other = copy.deepcopy(bundle)
    plain = logits(bundle, images)
    with REDUCERS[name](bundle):
        reduced, copied = logits(bundle, images), copy.deepcopy(bundle)
        assert torch.equal(logits(other, images), plain), "another model is as it was"
        assert torch.allclose(logits(copied, images), reduced, atol=1e-5)
        assert bundle.identity != before, "a reduced model is another one"
    assert bundle.identity == before and torch.allclose(logits(copied, images), reduced, atol=1e-5)


def test_replies_under_a_reducer_are_kept_apart(bundle, tmp_path):
    """Every reducer and every setting of one has a file of its own; a plain model has its old one before and behind."""
    settings = {
        "down-sampling to 6": down_sampled(bundle, 6), "down-sampling to 4": down_sampled(bundle, 4),
        "random": random_dropped(bundle, 24, seed=1), "random, another seed": random_dropped(bundle, 24, seed=2),
        "random, fewer": random_dropped(bundle, 20, seed=1), "PixelPrune": pixel_pruned(bundle),
        "PixelPrune, lossy": pixel_pruned(bundle, tau=2), "ToMe": token_merged(bundle, 24),
        "ToMe, fewer": token_merged(bundle, 20), "VisionZip": vision_zipped(bundle, 6),
        "VisionZip, no means": vision_zipped(bundle, 6, contextual=0), "DivPrune": diversity_pruned(bundle, 6),
        "DivPrune, fewer": diversity_pruned(bundle, 5), "FastV": fast_v(bundle, 5, layer=1),
        "FastV, fewer": fast_v(bundle, 4, layer=1), "FastV, later": fast_v(bundle, 5, layer=2),
        "guard": adaptive_tokens(bundle, PatchConfig(coarse=None, budget=25, bucket=8)),
        "guard, more": adaptive_tokens(bundle, PatchConfig(coarse=None, budget=28, bucket=8)),
    }
    plain = kept_file(tmp_path, bundle, "data")
    files = {"plain": plain}
    for name, setting in settings.items():
        with setting as reduced:
            files[name] = kept_file(tmp_path, reduced if name.startswith("down") else bundle, "data")
    assert len(set(files.values())) == len(files)
    assert kept_file(tmp_path, bundle, "data") == plain


def test_one_fastv_at_a_time(bundle):
    with fast_v(bundle, 5, layer=1), pytest.raises(ValueError, match="leave the other FastV"), fast_v(bundle, 4):
        pass


def test_all_blocks_and_all_patches_are_the_plain_encoder(bundle):
    images = pages(2)
    plain = features(bundle, images)
    for reducer in (random_dropped(bundle, 64), token_merged(bundle, 64), diversity_pruned(bundle, 16),
                    vision_zipped(bundle, 16, contextual=0)):
        with reducer:
            assert all(torch.allclose(own, other, atol=1e-5) for own, other in zip(features(bundle, images), plain))


@pytest.mark.parametrize("family", ["llava_onevision", "llava", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", REDUCERS)
def test_families_without_a_place_are_refused_by_name(family, name):
    if name == "FastV" and family.startswith("llava"):
        return
    other = miniature(family)
    with pytest.raises(ValueError, match=family), REDUCERS[name](other):
        pass


def test_wrong_budgets_are_named(bundle):
    wrong = {"a multiple of 4": random_dropped(bundle, 25), "half of the tokens": token_merged(bundle, 2),
             "budget of 17 .* 1 to the 16": vision_zipped(bundle, 17), "budget of 0": diversity_pruned(bundle, 0),
             "5 contextual": vision_zipped(bundle, 4, contextual=5), "at least 1 token": fast_v(bundle, 0),
             "tau is -1": pixel_pruned(bundle, tau=-1)}
    for message, reducer in wrong.items():
        with pytest.raises(ValueError, match=message), reducer:
            pass
    second = token_merged(bundle, 24)
    with random_dropped(bundle, 24), pytest.raises(ValueError, match="expects an encoder with all its tokens"), second:
        pass


def test_down_sampling_makes_fewer_tokens_of_a_smaller_page_and_leaves_the_model_as_it_was(bundle):
    shown = lambda model: (image_batch(model, pages(), 1), image_features(model, image_batch(model, pages(), 1)))
    with torch.no_grad():
        whole, before = shown(bundle)
        with down_sampled(bundle, 4) as smaller:
            part, features = shown(smaller)
        after = shown(bundle)[1]
    image = bundle.model.config.image_token_id
    assert [tokens.count(image) for tokens in part.tokens] == [4] * 3
    assert [tokens.count(image) for tokens in whole.tokens] == [16] * 3
    assert part.inputs["pixel_values"].shape[-1] == 4 * 14 < whole.inputs["pixel_values"].shape[-1]
    assert [len(page) for page in features.images] == [4] * 3
    assert all(torch.equal(a, b) for a, b in zip(before.images, after.images, strict=True))


STRUCTURED = REDUCERS | {"down-sampled": lambda bundle: down_sampled(bundle, 4)}


@pytest.fixture
def structured(bundle):
    "The model with a structural bias as large as a learned one."
    inject(bundle, seed=2)
    with torch.no_grad():
        for bias in structures_of(bundle):
            for weight in bias.parameters():
                weight.mul_(100)
    yield bundle
    eject(bundle)


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_bias_of_zeros_changes_nothing_under_a_reducer(bundle, name):
    with STRUCTURED[name](bundle) as reduced:
        plain = features(reduced, pages())
    inject(bundle)
    try:
        with torch.no_grad():
            for bias in structures_of(bundle):
                for weight in bias.parameters():
                    weight.zero_()
        with STRUCTURED[name](bundle) as reduced:
            found = features(reduced, pages())
    finally:
        eject(bundle)
    assert all(torch.allclose(own, other, atol=1e-5) for own, other in zip(found, plain, strict=True))


@pytest.mark.parametrize("name", STRUCTURED)
def test_a_bias_stands_where_the_tokens_that_are_left_stand(structured, name):
    "Low rank as written out for all pairs; each page by itself as in a batch; afterwards the whole page as before."
    images = pages()
    before = features(structured, images)
    with STRUCTURED[name](structured) as reduced:
        found = features(reduced, images)
        alone = [features(reduced, [image])[0] for image in images]
        use_attention(structured.model, "sfa_dense")
        try:
            written_out = features(reduced, images)
        finally:
            use_attention(structured.model, "sfa")
    for own, single, oracle in zip(found, alone, written_out, strict=True):
        assert torch.allclose(own, single, atol=1e-5) and torch.allclose(own, oracle, atol=1e-4)
    assert all(torch.equal(own, other) for own, other in zip(features(structured, images), before, strict=True))
    if name != "FastV":  # which lets all tokens of the encoder be
        assert any(own.shape != other.shape or not torch.allclose(own, other, atol=1e-3)
                   for own, other in zip(found, before, strict=True))


def test_a_reducer_that_keeps_all_tokens_is_the_structured_encoder(structured):
    images = pages(2)
    whole = features(structured, images)
    for reducer in (random_dropped(structured, 64), token_merged(structured, 64), diversity_pruned(structured, 16),
                    vision_zipped(structured, 16, contextual=0), down_sampled(structured, 8)):
        with reducer as reduced:
            found = features(reduced, images)
        assert all(torch.allclose(own, other, atol=1e-5) for own, other in zip(found, whole))
