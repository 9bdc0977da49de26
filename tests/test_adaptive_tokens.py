"""Leaves in a pretrained encoder: the uniform plan is the stock encoder, merging equal tokens is exact, and neither
batch mates nor order matter."""

from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_internvl import bundle_of, pixels, tiny_internvl
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

import sfa_core.tokens.adaptive as adaptive_module
import sfa_core.training.arms as arms_module
from sfa_core.tokens.adaptive import CONTROL, attach_tokens, detach_tokens, language_tokens
from sfa_core.tokens.areas import plan_geometry
from sfa_core.models.answers import answer, generate
from sfa_core.models.sequences import answer_loss, training_batch
from sfa_core.structure.inject import eject, inject, structures_of, visible_attention
from sfa_core.tokens.density import density_blocks, estimate_density, load_density
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.embedded import EmbeddedConfig, train_tokenizer
from sfa_core.tokens.embedding import embed_patches, regrid, resize_kernel
from sfa_core.models.evaluate import evaluate
from sfa_core.core.families import FAMILIES, family_of
from sfa_core.training.finetune import finetune
from sfa_core.training.arms import FinetuneConfig, load_arm
from sfa_core.models.images import image_blocks, image_inputs
from sfa_core.models.load import new_bundle
from sfa_core.tokens.patches import PATCH, PatchConfig, PatchPlan
from sfa_core.tokens.planning import plan_patches
from sfa_core.attention.probes import record
from sfa_core.models.resolution import at_resolution
from sfa_core.structure.geometry import PADDING, uniform_geometry, with_blocks

MEAN, STD = (0.9,) * 3, (0.25,) * 3
GUARDED = PatchConfig(coarse=None, bucket=8)
SHAPE = EmbeddedConfig(vision_width=32, vision_layers=2, vision_heads=2, vision_hidden=32, language_width=32,
                       language_layers=2, language_heads=2,
                       language_kv_heads=1, head_dim=16, language_hidden=32)
FORTY = dict(patches=PatchConfig(budget=40, bucket=8), steps=3, batch_size=3, questions=3, learning_rate=5e-3,
             structure_rate=5e-3, checkpoint_every=0)

parts = attrgetter("records", "summary")  # of an evaluation


def tiny_llava(kind=LlavaOnevisionForConditionalGeneration, image=62):
    "A random LLaVA with SigLIP, 4 x 4 patches and 6 pixels that no patch covers."
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 2,
              "image_size": image, "patch_size": 14, "vision_use_head": False}
    text = {"model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1}
    config = {LlavaOnevisionForConditionalGeneration: LlavaOnevisionConfig,
              LlavaForConditionalGeneration: LlavaConfig}[kind]
    extra = {"image_grid_pinpoints": [[image, image], [image, 2 * image]],
             "video_token_index": 6} if config is LlavaOnevisionConfig else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(config(vision_config=vision, text_config=text, image_token_index=5, **extra))
        for weight in model.parameters():
            torch.nn.init.normal_(weight, mean=0.0 if weight.ndim > 1 else 1.0, std=0.1)
    return model.eval()


def pages(count=3, side=56, seed=0):
    "Normalised pages with a little ink, that merge in different places."
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        page = np.ones((side, side, 3), np.float32)
        for _ in range(rng.integers(1, 4)):
            y, x = rng.integers(side - 6, size=2)
            page[y : y + 6, x : x + 6] = rng.random(3)
        made.append(page)
    return (torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2) - 0.9) / 0.25


@torch.no_grad()
def tower(model, family, given):
    return family.tower_of(model)(given).last_hidden_state


@pytest.fixture(scope="module")
def shared():
    model = tiny_internvl()
    return model, family_of(model)


@pytest.fixture
def internvl(shared):
    "A random InternVL with 4 x 4 patches that must be the same after the test as before."
    model, family = shared
    before = tower(model, family, pages())
    yield model, family
    assert (
        torch.equal(tower(model, family, pages()), before) and model.config.vision_config._attn_implementation == "sdpa"
    )
    assert not hasattr(family.tower_of(model), CONTROL) and "forward" not in vars(family.tower_of(model))
    assert not any("log_area" in vars(module) or "forward" in vars(module) for module in model.modules())


# The uniform plan


@pytest.mark.parametrize("structured", [False, True])
def test_a_plan_of_pretrained_patches_is_the_stock_encoder(internvl, structured):
    model, family = internvl
    if structured:
        inject(bundle_of(model))
    expected = tower(model, family, pages())
    features = model.model.get_image_features(pages()).pooler_output
    attach_tokens(bundle_of(model, MEAN, STD), patches=PatchConfig(sizes=(14,), coarse=None))
    assert torch.allclose(tower(model, family, pages()), expected, atol=1e-5)
    again = model.model.get_image_features(pages()).pooler_output
    assert torch.allclose(again.reshape(features.shape), features, atol=1e-5)
    detach_tokens(bundle_of(model))
    if structured:
        eject(bundle_of(model))


def test_a_plan_of_pretrained_patches_is_the_stock_encoder_of_llava_onevision():
    model, family = tiny_llava(), FAMILIES["llava_onevision"]
    given = pages(4, 62)
    expected, sizes = tower(model, family, given), torch.tensor([[62, 62], [62, 62]])
    features = torch.cat(model.model.get_image_features(given, image_sizes=sizes).pooler_output)
    attach_tokens(bundle_of(model, MEAN, STD), patches=PatchConfig(sizes=(14,), coarse=None))
    assert torch.allclose(tower(model, family, given), expected, atol=1e-5)
    assert torch.allclose(torch.cat(model.model.get_image_features(given, image_sizes=sizes).pooler_output), features,
                          atol=1e-4)
    detach_tokens(bundle_of(model))
    control = attach_tokens(bundle_of(model, MEAN, STD), patches=GUARDED)
    fewer = torch.cat(model.model.get_image_features(given, image_sizes=sizes).pooler_output)
    assert (
        len(fewer) == sum(language_tokens(bundle_of(model), given.split(2), sizes.tolist())) < len(features)
        and min(map(len, control.last)) < 16
    )
    detach_tokens(bundle_of(model))
    assert torch.equal(tower(model, family, given), expected)


# Merging equal tokens


def test_merging_equal_tokens_is_exact_with_log_area_and_wrong_without(internvl, monkeypatch):
    model, family = internvl
    embeddings = family.tower_of(model).embeddings
    with torch.no_grad():
        kept = embeddings.position_embeddings.clone()
        # one place for all cells: cells of plain paper become equal tokens
        embeddings.position_embeddings[:, 1:] = kept[:, 1:2]
    given = pages()
    expected = tower(model, family, given)
    control = attach_tokens(bundle_of(model, MEAN, STD), patches=GUARDED)
    found = tower(model, family, given)
    assert max(map(len, control.last)) < 16 and (found - expected).abs().max() < 2e-6 * expected.abs().max().clamp(
        min=1
    )
    model.set_attn_implementation({"vision_config": "sdpa"})
    with pytest.raises(ValueError, match="would ignore the areas"):
        tower(model, family, given)
    model.set_attn_implementation({"vision_config": "adat"})
    monkeypatch.setattr(adaptive_module, "plan_geometry",
                        lambda *a: replace((g := plan_geometry(*a)), log_area=g.log_area.clamp(max=0)))
    unweighted = tower(model, family, given)
    assert (unweighted - expected).abs().max() > 0.01
    detach_tokens(bundle_of(model))
    with torch.no_grad():
        embeddings.position_embeddings.copy_(kept)


def test_a_split_cell_weighs_as_much_as_a_whole_one():
    plan = PatchPlan((1, 2), [0, 0, 0, 7, 7], [0, 14, 21, 14, 21], [14, 7, 7, 7, 7])
    geometry = plan_geometry(uniform_geometry(1, 2, 1).map(lambda part: part.float()), [plan], 8)
    assert (
        torch.allclose(geometry.log_area[0, :6].exp(), torch.tensor([1, 1, 0.25, 0.25, 0.25, 0.25]))
        and (geometry.log_area[0, 6:] == PADDING).all()
    )
    assert (
        geometry.special[0].tolist() == [True, False, False, False, False, False, True, True]
        and (geometry.column[0, 2:6] == geometry.column[0, 2]).all()
    )
    with pytest.raises(ValueError, match="does not fit into 5"):
        plan_geometry(uniform_geometry(1, 2, 1), [plan], 5)


def test_the_bias_of_a_leaf_is_the_mean_over_its_cells(internvl):
    model, family = internvl
    biases = inject(bundle_of(model), blocks=4)
    estimator, _ = load_density()
    control = attach_tokens(bundle_of(model, MEAN, STD), estimator=estimator, patches=PatchConfig(bucket=8),
                            blocks=True, drop=False)
    given = pages()
    tower(model, family, given)
    plan, geometry = control.current[0][0], biases[0].geometry
    at = next(i for i, plan in enumerate(control.last) if plan is control.current[0][0])
    ids = density_blocks(control.read(given)[1], 4)[at]
    full = biases[0].dense(with_blocks(uniform_geometry(4, 4, 1), ids, 4))
    member = torch.from_numpy(plan.membership())
    mean = member / member.sum(1, keepdim=True)
    leaves = biases[0].dense(geometry)[0, :, 1 : 1 + len(plan),
                                       1 : 1 + len(plan)] - geometry.log_area[0, 1 : 1 + len(plan)]
    assert torch.allclose(leaves, mean @ full[:, 1:, 1:] @ mean.T, atol=1e-6)
    eject(detach_tokens(bundle_of(model)))


# Batches and order


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(4)))
def test_a_result_depends_neither_on_batch_mates_nor_on_their_order(seed, order):
    model = tiny_internvl()
    family, given = family_of(model), pages(4, seed=seed)
    attach_tokens(bundle_of(model, MEAN, STD), patches=GUARDED)
    together = tower(model, family, given)
    alone = torch.cat([tower(model, family, given[i : i + 1]) for i in range(4)])
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(
        tower(model, family, given[list(order)]), together[list(order)], atol=1e-5
    )
    counts = language_tokens(bundle_of(model), given[:, None])
    assert language_tokens(bundle_of(model), given[list(order), None]) == [counts[i] for i in order]


def test_the_order_of_leaves_changes_nothing(internvl):
    model, family = internvl
    control, given = attach_tokens(bundle_of(model, MEAN, STD), patches=GUARDED, drop=False), pages(1)
    expected = tower(model, family, given)
    [plan] = control.last
    order = np.random.default_rng(0).permutation(len(plan))
    mixed = PatchPlan(plan.grid, plan.y[order], plan.x[order], plan.size[order])
    control.tiles.keep(given, control.patches, [(mixed, None)])
    shuffled = tower(model, family, given)
    assert control.last == [mixed] and torch.allclose(shuffled, expected, atol=1e-5)
    detach_tokens(bundle_of(model))


def test_maps_that_are_used_again_are_kept_longest(internvl, monkeypatch):
    model, family = internvl
    monkeypatch.setattr(adaptive_module, "REMEMBERED", 2)
    control = attach_tokens(bundle_of(model, MEAN, STD), patches=replace(GUARDED, coarse=0.3),
                            estimator=load_density()[0], drop=False)
    given = pages(3)
    for at in (0, 1, 0, 2):
        control.read(given[at : at + 1].clone())
    kept = dict(control.seen)
    control.read(given[[0, 2]])
    assert dict(control.seen) == kept, "the tile that was looked at once is the one that went"
    control.read(given)
    assert len(control.seen) == 2
    detach_tokens(bundle_of(model))


def test_plans_are_handed_on_with_their_pixels_and_forgotten_with_them(internvl, monkeypatch):
    model, family = internvl
    control, given, made = attach_tokens(bundle_of(model, MEAN, STD), patches=GUARDED), pages(4), []
    original = adaptive_module.plan_tiles
    monkeypatch.setattr(adaptive_module, "plan_tiles",
                        lambda pages, *rest: made.append(len(pages)) or original(pages, *rest))
    counts = language_tokens(bundle_of(model), given.split([1, 3]))
    planned = control.read(given)[0]
    tower(model, family, given)
    assert made == [4] and control.last == planned and sum(counts) == sum(plan.kept(2).sum() for plan in planned)
    tower(model, family, given[1:3])
    assert made == [4] and control.last == planned[1:3], "a slice of the same pixels"
    tower(model, family, given.clone())
    assert made == [4, 4], "a copy is planned again"
    given[0] = given[1]
    again = control.read(given)[0]
    assert made == [4, 4, 4] and np.array_equal(again[0].boxes, planned[1].boxes), "pixels that were changed in place"
    control.patches = replace(GUARDED, guard=None)
    assert control.read(given)[0] != again and made == [4, 4, 4, 4], "another rule"
    del given
    other = pages(1, seed=3)
    control.read(other)
    assert [known.pixels() is other for known in control.tiles.tiles.values()] == [True], "plans go with their pixels"
    detach_tokens(bundle_of(model))


def test_padding_changes_nothing(internvl):
    model, family = internvl
    found = []
    for bucket in (1, 8, 64):
        attach_tokens(bundle_of(model, MEAN, STD), patches=replace(GUARDED, bucket=bucket))
        found.append(tower(model, family, pages()))
        detach_tokens(bundle_of(model))
    assert torch.allclose(found[0], found[1], atol=1e-5) and torch.allclose(found[0], found[2], atol=1e-5)


def test_gradients_reach_the_encoder_and_checkpointing_gives_the_same(internvl):
    model, family = internvl
    inject(bundle_of(model))
    attach_tokens(bundle_of(model, MEAN, STD), patches=GUARDED)
    weights = [family.tower_of(model).embeddings.patch_embeddings.projection.weight,
               structures_of(bundle_of(model))[0].row]
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train().activation_checkpointing_enable()
        loss = model.model.get_image_features(pages()).pooler_output.square().sum()
        grads.append(torch.autograd.grad(loss, weights))
    model.eval().activation_checkpointing_disable()
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) and a.abs().sum() > 0 for a, b in zip(*grads))
    eject(detach_tokens(bundle_of(model)))


# Replication and language tokens


@pytest.mark.parametrize("merge", [1, 2])
def test_dropped_language_tokens_are_copies_of_kept_ones(merge):
    model = new_bundle(replace(SHAPE, downsample_ratio=1 / merge), train_tokenizer(["1"], 300)).model
    given = pages(4, 112, seed=5)
    control = attach_tokens(bundle_of(model, MEAN, STD), patches=GUARDED, drop=False)
    with torch.no_grad():
        whole = model.model.get_image_features(given).pooler_output
        detach_tokens(bundle_of(model))
        control = attach_tokens(bundle_of(model, MEAN, STD), patches=GUARDED)
        kept = model.model.get_image_features(given).pooler_output
    marks, counts = [plan.kept(merge) for plan in control.last], language_tokens(bundle_of(model), given[:, None])
    assert kept.shape[:2] == (1, sum(counts)) and sum(counts) < whole.shape[0] * whole.shape[1]
    for tokens, mark, own in zip(whole, marks, kept[0].split(counts)):
        assert torch.allclose(tokens[mark], own, atol=1e-5)
        for dropped in tokens[~torch.from_numpy(mark)]:
            assert (dropped - own).abs().amax(1).min() < 1e-5


def test_a_leaf_is_written_to_all_of_its_cells():
    plan = plan_patches(np.ones((112, 112, 3), np.float32), None, PatchConfig(coarse=None, budget=19))
    features = torch.randn(1, 19, 5)
    raster = regrid(features, [plan])[0]
    member = torch.from_numpy(plan.membership()).bool()
    assert all((raster[member[leaf]] == features[0, leaf]).all() for leaf in range(19))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(14, 28), (14, 28, 56), (7, 14, 28, 56)]))
def test_tokens_come_from_the_level_of_their_size(seed, sizes):
    rng = np.random.default_rng(seed)
    scale, convolution = 2 if 7 in sizes else 1, torch.nn.Conv2d(3, 4, PATCH, PATCH)
    picture = torch.from_numpy(rng.random((1, 3, scale * 56, scale * 56), dtype=np.float32))
    plan = plan_patches(picture[0].permute(1, 2, 0).numpy(), rng.random((4, 4)),
                        PatchConfig(sizes, coarse=0.4, guard=None))
    positions = torch.from_numpy(rng.random((4, 4, 4), dtype=np.float32))
    with torch.no_grad():
        tokens = embed_patches(picture, [plan], convolution, positions)[0]
        for token, (x0, y0, x1, y1), size in zip(tokens, plan.boxes, plan.size):
            own = picture[..., scale * y0 : scale * y1, scale * x0 : scale * x1]
            shrunk = torch.nn.functional.avg_pool2d(own, own.shape[-1] // PATCH)
            if size >= PATCH:
                place = positions[y0 // PATCH : y1 // PATCH, x0 // PATCH : x1 // PATCH].mean((0, 1))
                assert torch.allclose(token, convolution(shrunk)[0, :, 0, 0] + place, atol=1e-5)
            else:
                table = torch.nn.functional.interpolate(positions.permute(2, 0, 1)[None], scale_factor=2,
                                                        mode="bicubic", align_corners=False)
                assert torch.allclose(token, convolution(shrunk)[0, :, 0, 0] + table[0, :, y0 // 7, x0 // 7], atol=1e-5)


def test_a_resized_kernel_answers_as_the_patch_did():
    weight, patch = torch.randn(2, 3, 14, 14), torch.randn(5, 3, 14, 14)
    for mode in ("nearest", "bilinear", "bicubic"):
        options = {} if mode == "nearest" else {"align_corners": False}
        large = torch.nn.functional.interpolate(patch, (28, 28), mode=mode, **options)
        assert torch.allclose(torch.nn.functional.conv2d(large, resize_kernel(weight, 28, mode)),
                              torch.nn.functional.conv2d(patch, weight), atol=1e-3)


# Refusals


def test_what_cannot_be_attached_is_named(internvl):
    model, family = internvl
    estimator, _ = load_density()
    for message, options in {
        "neither patches nor blocks": {},
        "call inject first": dict(estimator=estimator, blocks=True),
        "there is no estimator": dict(patches=PatchConfig()),
        "a budget of 5 leaves cannot be met": dict(patches=PatchConfig(coarse=None, budget=5)),
    }.items():
        with pytest.raises(ValueError, match=message):
            attach_tokens(bundle_of(model, MEAN, STD), **options)
        assert not hasattr(family.tower_of(model), CONTROL)
    with pytest.raises(ValueError, match="call attach_tokens first"):
        detach_tokens(bundle_of(model))
    attach_tokens(bundle_of(model, MEAN, STD), patches=PatchConfig(sizes=(7, 14), coarse=None))
    with pytest.raises(ValueError, match="adaptive tokens already"):
        attach_tokens(bundle_of(model, MEAN, STD), patches=GUARDED)
    with pytest.raises(ValueError, match="source of at least 1.5 times"):
        tower(model, family, pages())
    assert tower(model, family, pages(side=112)).shape[1] == 17
    detach_tokens(bundle_of(model))


def test_other_families_are_refused():
    model = tiny_llava(LlavaForConditionalGeneration, 56)
    with pytest.raises(ValueError, match="got family llava; expected internvl, llava_onevision"):
        attach_tokens(bundle_of(model, MEAN, STD, FAMILIES["llava"]), GUARDED)


# The same training and evaluation


@pytest.fixture(scope="module")
def bundle():
    texts = ["What is the value of oak? yes no 1 2 3 4 5 6 7 8 9 0"]
    return new_bundle(SHAPE, train_tokenizer(texts, 300), name="tiny")


@pytest.fixture(scope="module")
def charts():
    return documents(9, seed=5)


@pytest.mark.parametrize("arm", ["vision_blocks", "adat", "vision_adat"])
def test_arms_with_density_train_and_evaluate_like_the_others(bundle, charts, tmp_path, arm):
    before = {name: value.clone() for name, value in bundle.model.state_dict().items()}
    result = finetune(bundle, charts, FinetuneConfig(arm, **FORTY), tmp_path, progress=False)
    asked = samples(charts)[:30]
    plain = answer(bundle, asked, max_new_tokens=4)
    with load_arm(bundle, result.arm) as loaded:
        control = getattr(bundle.family.tower_of(bundle.model), CONTROL)
        records, summary = parts(evaluate(bundle, asked, max_new_tokens=4, draws=10))
        with torch.no_grad():
            trained = answer_loss(bundle.model, training_batch(bundle, [charts[0]]))[0]
        if arm != "vision_blocks":
            assert {len(plan) for plan in control.last} == {40} and loaded.about["config"]["patches"]["budget"] == 40
            with pytest.raises(ValueError, match="detach_tokens first"):
                record(bundle, asked[:1])
    assert len(records) == 30 and summary["n"] == 30 and not (records["error"] != "").any()
    again = bundle.model.state_dict()
    assert list(again) == list(before) and all(torch.equal(value, again[name]) for name, value in before.items())
    assert [a.tokens for a in answer(bundle, asked, max_new_tokens=4)] == [a.tokens for a in plain]
    with load_arm(bundle, result.arm), torch.no_grad():
        assert torch.equal(answer_loss(bundle.model, training_batch(bundle, [charts[0]]))[0], trained)


def test_an_arm_of_another_estimator_is_refused(bundle, charts, tmp_path, monkeypatch):
    result = finetune(bundle, charts, FinetuneConfig("adat", **FORTY), tmp_path, progress=False)
    estimator, card = load_density()
    monkeypatch.setattr(arms_module, "load_density", lambda: (estimator, card | {"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="trained with the density estimator"):
        load_arm(bundle, result.arm)
    assert not hasattr(bundle.family.tower_of(bundle.model), CONTROL)


def test_blocks_of_a_batch_are_those_of_each_image(bundle):
    model, family, data = bundle.model, bundle.family, documents(3, seed=8)
    biases, (estimator, _) = inject(bundle_of(model)), load_density()
    with torch.no_grad():
        for bias in biases:
            bias.block.normal_(generator=torch.Generator().manual_seed(1))
    given, _ = image_inputs(bundle, list(data["image"]))
    attach_tokens(bundle_of(model, [0.9] * 3, [0.25] * 3), estimator=estimator, blocks=True)
    together = tower(model, family, given)
    alone = torch.cat([tower(model, family, page[None]) for page in given])
    swapped = tower(model, family, given[[2, 0, 1]])
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(swapped, together[[2, 0, 1]], atol=1e-5)
    expected = density_blocks(estimate_density(estimator, (given * 0.25 + 0.9).clamp(0, 1), (8, 8)), 16)[[2, 0, 1]]
    assert (
        torch.equal(biases[0].geometry.block[:, 1:].argmax(-1), expected)
        and len({tuple(row) for row in expected.tolist()}) == 3
    )
    eject(detach_tokens(bundle_of(model)))


def test_the_prompt_has_as_many_image_tokens_as_the_model_gives(bundle):
    data, image = documents(4, seed=3), bundle.model.config.image_token_id
    attach_tokens(bundle, patches=GUARDED)
    given, counts = image_inputs(bundle, list(data["image"]))
    blocks = image_blocks(bundle, given, counts)
    expected = language_tokens(bundle, given[:, None])
    assert [block.count(image) for block in blocks] == expected and max(expected) < 64 and len(set(expected)) > 1
    batch = training_batch(bundle, [data[i] for i in range(4)])
    assert (batch["input_ids"] == image).sum(1).tolist() == expected
    questions = [(i, "What is the value of oak?") for i in (0, 1, 1, 3)]
    together = generate(bundle, list(data["image"]), questions, 4)
    assert together == [generate(bundle, [data[i]["image"]], [(0, text)], 4)[0] for i, text in questions]
    detach_tokens(bundle)
    assert all(block.count(image) == 64 for block in image_blocks(bundle, given, counts))


def test_fine_leaves_read_pages_of_twice_the_pixels(bundle):
    fine = at_resolution(bundle, 224, bundle.processor.image_seq_length)
    data = documents(2, seed=4, size=224)
    estimator, _ = load_density()
    rule = PatchConfig(sizes=(7, 14, 28), coarse=0.1, fine=0.3, bucket=8)
    control = attach_tokens(bundle, rule, estimator=estimator)
    answers = answer(fine, data, max_new_tokens=2)
    detach_tokens(bundle)
    assert all(a.error is None for a in answers) and any((plan.size == 7).any() for plan in control.last)


def test_a_smaller_page_gives_fewer_tokens_and_keeps_the_model(bundle):
    data = documents(2, seed=4)
    small = at_resolution(bundle, 84)
    batch = training_batch(small, [data[0], data[1]])
    assert (batch["input_ids"] == small.model.config.image_token_id).sum(1).tolist() == [36, 36] and torch.isfinite(
        answer_loss(small.model, batch)[0]
    )
    for side in (80, 7):
        with pytest.raises(ValueError, match="expected a multiple of 14 px"):
            at_resolution(bundle, side)


def test_attention_of_leaves_sums_to_one(internvl):
    model, family = internvl
    inject(bundle_of(model))
    control = attach_tokens(bundle_of(model, MEAN, STD), patches=replace(GUARDED, bucket=64), drop=False)
    seen = []
    hook = family.attentions_of(model)[0].register_forward_hook(
        lambda module, arguments, output: seen.append(output[1])
    )
    with visible_attention(bundle_of(model)):
        tower(model, family, pages(1))
    hook.remove()
    weights, tokens = seen[0], len(control.last[0]) + 1
    assert (
        torch.allclose(weights[..., :tokens].sum(-1), torch.ones(()), atol=1e-5) and (weights[..., tokens:] == 0).all()
    )
    eject(detach_tokens(bundle_of(model)))


def test_the_kernel_may_be_resized_instead_of_the_page(internvl):
    model, family = internvl
    found = {}
    for embedding in ("pyramid", "pseudo_inverse"):
        attach_tokens(bundle_of(model, MEAN, STD), patches=replace(GUARDED, embedding=embedding))
        found[embedding] = tower(model, family, pages())
        detach_tokens(bundle_of(model))
    apart, size = (found["pyramid"] - found["pseudo_inverse"]).abs().mean(), found["pyramid"].abs().mean()
    assert 0 < apart < 0.2 * size, "two ways to nearly the same token"


def test_random_pixels_are_never_merged(internvl):
    model, family = internvl
    control = attach_tokens(bundle_of(model, MEAN, STD), patches=GUARDED)
    tower(model, family, pixels(2))
    assert [len(plan) for plan in control.last] == [16, 16]
    detach_tokens(bundle_of(model))
