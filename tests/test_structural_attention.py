"""Structural attention is exact: low rank equals the explicit bias, and attaching it changes a model only as far as
its weights say."""
import copy
import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_internvl import bundle_of, pixels, tiny_internvl
from torch.nn.functional import scaled_dot_product_attention

import sfa_core.structure.inject as attention_module
from sfa_core.structure.inject import (
    eject,
    inject,
    set_blocks,
    set_geometry,
    structures_of,
    use_attention,
    vision_attention,
    visible_attention,
)
from sfa_core.structure.store import load_structure, save_structure
from sfa_core.core.families import FAMILIES, family_of
from sfa_core.structure.kernels import MaskCache, chunked_attention, low_rank_attention, may_cache
from sfa_core.structure.strips import grid_attention, may_strip
from sfa_core.core.memory import MemoryProbe
from sfa_core.structure.bias import StructuralBias
from sfa_core.structure.geometry import PADDING, grid_geometry, merge_cells, uniform_geometry, with_blocks
from sfa_core.structure.terms import TERMS

INTERNVL = FAMILIES["internvl"]
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5}
COMBINATIONS = [TERMS, ("row",), ("column",), ("distance",), ("block",), ("row", "column"),
                ("row", "column", "distance"), ("distance", "block")]


def random_bias(heads=2, blocks=4, terms=TERMS, seed=0, dtype=torch.float64):
    "A bias with weights of order one, so that an error cannot hide."
    bias = StructuralBias(heads, blocks, terms, seed).to(dtype)
    with torch.no_grad():
        for weight in bias.parameters():
            weight.mul_(50)
    return bias


def random_assignment(tokens, special, generator, images, merged):
    "Assignments of base tokens to merged ones, different per image; padded at the end to a common length."
    result = torch.zeros(images, special + merged + 1, tokens)
    for image in range(images):
        result[image, range(special), range(special)] = 1
        owner = torch.randint(merged - image % 2, (tokens - special,), generator=generator)
        for place, own in enumerate(owner.unique().tolist()):
            result[image, special + place, special:] = (owner == own).float()
    return result


def geometry_of(kind, special, images=3, height=3, width=4, blocks=4):
    generator = torch.Generator().manual_seed(7)
    geometry = uniform_geometry(height, width, special)
    ids = torch.randint(blocks, (images, height * width), generator=generator)
    if kind == "shuffled":
        order = torch.randperm(height * width, generator=generator)
        inner = torch.cat([torch.full((special,), -1), order])
        geometry = grid_geometry(inner // width, inner % width, inner < 0, height, width)
    if kind in ("blocks", "merged_blocks", "merged_shared"):
        geometry = with_blocks(geometry, ids[0] if kind == "merged_shared" else ids, blocks)
    if kind.startswith("merged"):
        assignment = random_assignment(geometry.tokens, special, generator, images, 5)
        geometry = merge_cells(geometry, assignment[0] if kind == "merged_shared" else assignment)
    return geometry


def outputs_and_gradients(attend, bias, tensors, projection):
    "Run attention on fresh leaves and return output and all gradients."
    leaves = [tensor.clone().requires_grad_(True) for tensor in tensors]
    bias.zero_grad()
    output = attend(*leaves)
    (output * projection).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves), *(weight.grad.clone() for weight in bias.parameters())]


def error_of(ours, reference):
    "Largest error, relative where values exceed one; a gradient that is zero in theory has no scale of its own."
    return ((ours - reference).abs().max() / reference.abs().max().clamp(min=1.0)).item()


# --- the bias itself -------------------------------------------------------------------------------------------------

@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 4), width=st.integers(1, 4), special=st.integers(0, 2),
       terms=st.sampled_from(COMBINATIONS), seed=st.integers(0, 10_000))
def test_dense_bias_is_the_formula(height, width, special, terms, seed):
    "Against loops over pairs of cells, written from the formula alone."
    bias = random_bias(heads=1, blocks=3, terms=terms, seed=seed)
    ids = torch.randint(3, (height * width,), generator=torch.Generator().manual_seed(seed))
    table = bias.dense(with_blocks(uniform_geometry(height, width, special), ids, 3))[0]
    weight = {term: getattr(bias, term) for term in terms}
    for i in range(special + height * width):
        for j in range(special + height * width):
            expected = 0.0
            if i >= special and j >= special:
                (ri, ci), (rj, cj) = divmod(i - special, width), divmod(j - special, width)
                expected += weight["row"].item() * (ri == rj) if "row" in weight else 0
                expected += weight["column"].item() * (ci == cj) if "column" in weight else 0
                expected -= (
                    weight["distance"].item() * (abs(ri - rj) + abs(ci - cj)) / (height + width)
                    if "distance" in weight
                    else 0
                )
                expected += (weight["block"][ids[i - special],
                                             0] * weight["block"][ids[j - special],
                                                                  0]).item() if "block" in weight else 0
            assert math.isclose(table[i, j].item(), expected, abs_tol=1e-12)


@settings(max_examples=30, deadline=None)
@given(height=st.integers(1, 5), width=st.integers(1, 5), special=st.integers(0, 2),
       terms=st.sampled_from(COMBINATIONS), seed=st.integers(0, 10_000))
def test_factors_multiply_to_the_dense_bias(height, width, special, terms, seed):
    bias, geometry = random_bias(terms=terms, seed=seed), uniform_geometry(height, width, special)
    query, key = bias.factors(geometry)
    assert query.shape == key.shape and torch.allclose(query @ key.mT, bias.dense(geometry), rtol=0, atol=1e-11)


def test_full_size_needs_64_factors_and_merging_one_more():
    bias = StructuralBias(heads=16)
    assert bias.factors(uniform_geometry(32, 32, 1))[0].shape == (16, 1025, 64)
    merged = merge_cells(uniform_geometry(4, 4, 1), torch.eye(17))
    assert bias.factors(merged)[0].shape == (16, 17, 3 + 3 + 1 + 1 + 1)


def test_merged_bias_is_the_mean_over_cells():
    bias, cells = random_bias(), geometry_of("blocks", special=1)
    assignment = random_assignment(cells.tokens, 1, torch.Generator().manual_seed(3), 3, 5)
    merged, every = merge_cells(cells, assignment), bias.dense(cells)
    table = bias.dense(merged) - merged.log_area.double()[:, None, None, :]
    for image in range(3):
        for i, ours in enumerate(assignment[image].bool()):
            for j, theirs in enumerate(assignment[image].bool()):
                expected = (
                    every[image][:, ours][:, :, theirs].mean((1, 2))
                    if ours.any() and theirs.any()
                    else torch.zeros(2, dtype=torch.float64)
                )
                assert torch.allclose(table[image, :, i, j], expected, atol=1e-10)


def test_special_tokens_have_no_bias_in_either_direction():
    table = random_bias().dense(uniform_geometry(3, 4, special=2))
    assert table[:, :2].abs().max() == 0 and table[:, :, :2].abs().max() == 0 and table[:, 2:, 2:].abs().max() > 1


def test_the_sign_of_the_distance_weight_is_free():
    bias, geometry = StructuralBias(1, terms=["distance"]), uniform_geometry(2, 2)
    with torch.no_grad():
        bias.distance.fill_(-1.0)
    assert bias.dense(geometry)[0, 0].tolist() == [0.0, 0.25, 0.25, 0.5]


def test_weights_start_small_random_and_repeatable():
    weights = torch.cat([weight.flatten() for weight in StructuralBias(16, 256).parameters()])
    assert abs(weights.std().item() - 0.02) < 2e-3 and abs(weights.mean().item()) < 2e-3
    assert torch.equal(StructuralBias(4, seed=3).block, StructuralBias(4, seed=3, terms=["block"]).block)
    assert not torch.equal(StructuralBias(4, seed=3).block, StructuralBias(4, seed=4).block)


# --- low rank equals the oracle ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("special", [0, 1])
@pytest.mark.parametrize("kind", ["uniform", "shuffled", "blocks", "merged", "merged_blocks", "merged_shared"])
@pytest.mark.parametrize("terms", [TERMS, ("distance",), ("block",)])
def test_low_rank_equals_the_dense_oracle(dtype, special, kind, terms):
    "Outputs and gradients with respect to queries, keys, values and every structural weight."
    bias, geometry = random_bias(terms=terms, dtype=dtype), geometry_of(kind, special)
    generator = torch.Generator().manual_seed(5)
    *tensors, projection = torch.randn(4, 3, 2, geometry.tokens, 8, dtype=dtype, generator=generator)
    scaling = 8**-0.5

    def dense(query, key, value):
        return scaled_dot_product_attention(query, key, value, attn_mask=bias.dense(geometry).expand(3, -1, -1, -1),
                                            scale=scaling)

    reference = outputs_and_gradients(dense, bias, tensors, projection)
    for attend in (low_rank_attention, chunked_attention):
        ours = outputs_and_gradients(lambda q, k, v, attend=attend: attend(q, k, v, bias.factors(geometry), scaling),
                                     bias, tensors, projection)
        for mine, theirs in zip(ours, reference, strict=True):
            assert error_of(mine, theirs) < CLOSE[dtype]


@pytest.mark.parametrize("strip", [1, 9, 512])
@pytest.mark.parametrize("special", [0, 1, 2])
@pytest.mark.parametrize("kind", ["uniform", "blocks"])
@pytest.mark.parametrize("terms", [TERMS, ("row",), ("block",), ("column", "distance")])
def test_strips_equal_the_dense_oracle(monkeypatch, strip, special, kind, terms):
    "Outputs and all gradients, whether strips divide the grid or not, in both dtypes."
    monkeypatch.setattr("sfa_core.structure.strips.STRIP", strip)
    for dtype in CLOSE:
        bias, geometry = random_bias(heads=3, terms=terms, dtype=dtype), geometry_of(kind, special)
        *tensors, projection = torch.randn(4, 3, 3, geometry.tokens, 8, dtype=dtype,
                                           generator=torch.Generator().manual_seed(5))
        assert may_strip(geometry, tensors[0], None, 0.0)

        def dense(query, key, value):
            return scaled_dot_product_attention(query, key, value, attn_mask=bias.dense(geometry).expand(3, -1, -1, -1),  # noqa: B023
                                                scale=0.3)

        ours = outputs_and_gradients(lambda q, k, v: grid_attention(q, k, v, bias, geometry, 0.3), bias, tensors,  # noqa: B023
                                     projection)
        for mine, theirs in zip(ours, outputs_and_gradients(dense, bias, tensors, projection), strict=True):
            assert error_of(mine, theirs) < CLOSE[dtype]


def test_strips_are_only_for_whole_grids_on_a_cpu_in_full_precision():
    query = torch.zeros(3, 2, 13, 8)
    assert may_strip(geometry_of("uniform", 1), query, None, 0.0)
    assert not any(may_strip(geometry_of(kind, 1), query, None, 0.0)
                   for kind in ("shuffled", "merged", "merged_blocks"))
    refused = [(query.bfloat16(), None, 0.0), (query, torch.zeros(1, 1, 13, 13), 0.0), (query, None, 0.1),
               (query.expand(3, 2, 13, 8).to("meta"), None, 0.0)]
    assert not any(may_strip(geometry_of("uniform", 1), *given) for given in refused)


@pytest.mark.parametrize("side, blocks", [(16, False), (32, True), (64, False)])
def test_memory_is_linear_no_table_of_all_pairs_is_alive(side, blocks):
    """A probe sees every tensor made, forward and backward: with strips the largest holds STRIP rows of pairs,
    while the dense bias holds all."""
    bias, geometry = StructuralBias(1), uniform_geometry(side, side, 1)
    geometry = with_blocks(geometry, torch.arange(side * side)[None] % 16, 16) if blocks else geometry
    tensors, pairs = torch.randn(3, 1, 1, geometry.tokens, 8), geometry.tokens**2

    def largest(attend):
        leaves = [tensor.clone().requires_grad_(True) for tensor in tensors]
        with MemoryProbe() as probe:
            attend(*leaves).sum().backward()
        return probe.largest // 4

    found = largest(lambda q, k, v: grid_attention(q, k, v, bias, geometry, 0.3))
    assert found <= 528 * geometry.tokens and (side == 16 or found < pairs)
    if side < 64:
        assert (
            largest(
                lambda q, k, v: scaled_dot_product_attention(
                    q, k, v, attn_mask=bias.dense(geometry).expand(1, -1, -1, -1), scale=0.3
                )
            )
            >= pairs
        )


def test_chunks_of_queries_change_nothing(monkeypatch):
    monkeypatch.setattr("sfa_core.structure.kernels.QUERY_CHUNK", 5)
    bias, geometry = random_bias(), geometry_of("blocks", 1)
    *tensors, projection = torch.randn(4, 3, 2, 13, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    mask = torch.rand(3, 1, 13, 13, generator=torch.Generator().manual_seed(6)) > 0.3
    one, other = (
        outputs_and_gradients(lambda q, k, v, attend=attend: attend(q, k, v, bias.factors(geometry), 0.3, mask), bias,
                              tensors, projection)
        for attend in (low_rank_attention, chunked_attention)
    )
    assert all(error_of(a, b) < 1e-10 for a, b in zip(one, other, strict=True))


def test_wide_heads_take_the_chunked_way(monkeypatch):
    model = tiny_internvl(layers=1, heads=1, width=256)
    inject(bundle_of(model))
    called = []
    monkeypatch.setattr(attention_module, "chunked_attention", lambda *a: called.append(1) or chunked_attention(*a))
    ours = model.model.vision_tower(pixels()).last_hidden_state
    use_attention(model, "sfa_dense")
    assert called and torch.allclose(ours, model.model.vision_tower(pixels()).last_hidden_state, atol=1e-4)


def test_padding_tokens_are_invisible():
    "An image padded to the length of a larger one attends as it does alone."
    bias, cells = random_bias(), uniform_geometry(3, 4, special=1)
    assignment = random_assignment(13, 1, torch.Generator().manual_seed(3), 1, 4)[0]
    real = assignment.sum(-1) > 0
    short, long = merge_cells(cells, assignment[real]), merge_cells(cells, assignment)
    assert (~real).any() and (long.log_area[~real] == PADDING).all() and long.special[~real].all()
    tensors = torch.randn(3, 1, 2, len(real), 8, dtype=torch.float64)
    alone = low_rank_attention(*tensors[..., real, :], bias.factors(short), 0.3)
    padded = low_rank_attention(*tensors, bias.factors(long), 0.3)
    assert torch.allclose(padded[:, :, real], alone, atol=1e-12)
    assert torch.isfinite(low_rank_attention(*tensors.half(), bias.float().factors(long), 0.3)).all()


def test_merging_equal_tokens_is_exact_at_zero_weights():
    "Tokens that are copies of each other, replaced by one with the log of their number."
    bias, cells = random_bias(terms=["row"]), uniform_geometry(2, 4, special=1)
    with torch.no_grad():
        bias.row.zero_()
    assignment = torch.zeros(4, 9)
    for token, members in enumerate(([0], [1, 2, 5, 6], [3, 4], [7, 8])):
        assignment[token, members] = 1
    merged = torch.randn(3, 1, 2, 4, 8, dtype=torch.float64)
    copies = merged[..., assignment.argmax(0), :]
    whole = scaled_dot_product_attention(*copies)
    small = low_rank_attention(*merged, bias.factors(merge_cells(cells, assignment)), 8**-0.5)
    assert torch.allclose(small[..., assignment.argmax(0), :], whole, atol=1e-12)


# --- inside a real model ---------------------------------------------------------------------------------------------

def tower_of(model):
    return model.model.vision_tower


def hidden(model, images=3):
    return tower_of(model)(pixels(images)).last_hidden_state


def strengthen(model, factor=50):
    "Raise the initial weights to order one."
    with torch.no_grad():
        for bias in structures_of(bundle_of(model)):
            for weight in bias.parameters():
                weight.mul_(factor)


def step(model, images=3):
    "Forward and backward through the tower; output and all gradients of the tower."
    model.zero_grad()
    output = hidden(model, images)
    output.square().mean().backward()
    return output.detach(), {name: weight.grad.clone()
                             for name, weight in tower_of(model).named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("grad", [True, False], ids=["low_rank", "cached_mask"])
def test_zero_weights_are_stock_attention(grad):
    model = tiny_internvl()
    with torch.no_grad():
        before = hidden(model)
    inject(bundle_of(model))
    strengthen(model, 0)
    with torch.set_grad_enabled(grad):
        assert torch.allclose(hidden(model), before, atol=1e-5)


@pytest.mark.parametrize("kind", ["uniform", "blocks", "merged_blocks"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_model_with_low_rank_equals_model_with_dense_bias(kind, dtype):
    model = tiny_internvl()
    inject(bundle_of(model), blocks=4)
    strengthen(model)
    model.to(dtype)
    geometry = geometry_of("blocks" if "blocks" in kind else kind, 1, height=4, width=4)
    if kind.startswith("merged"):  # 17 tokens stay 17 tokens: pairs of cells, padded
        assignment = random_assignment(17, 1, torch.Generator().manual_seed(1), 3, 15)
        geometry = merge_cells(geometry, assignment)
    set_geometry(bundle_of(model), geometry)
    model.requires_grad_(True)
    results = {}
    for name in ("sfa", "sfa_dense", "sfa_eager"):
        use_attention(model, name)
        model.zero_grad()
        output = tower_of(model)(pixels().to(dtype)).last_hidden_state
        output.square().mean().backward()
        results[name] = [output.detach(),
                         *(weight.grad.clone() for weight in tower_of(model).parameters() if weight.grad is not None)]
    for name in ("sfa", "sfa_eager"):
        for mine, theirs in zip(results[name], results["sfa_dense"], strict=True):
            assert error_of(mine, theirs) < CLOSE[dtype]


def test_every_structural_weight_gets_a_gradient():
    model = tiny_internvl()
    inject(bundle_of(model), blocks=4)
    set_blocks(bundle_of(model), torch.arange(48).reshape(3, 16) % 4)
    _, gradients = step(model)
    ours = {name: gradient for name, gradient in gradients.items() if ".structure." in name}
    assert len(ours) == 2 * 4 and all((gradient != 0).all() for gradient in ours.values())
    assert all(f"model.vision_tower.{name}" in model.state_dict() for name in ours)


def test_blocks_are_per_image():
    "A batch with different blocks equals its images one by one, and not the batch with the blocks of the first."
    model = tiny_internvl()
    inject(bundle_of(model), blocks=4)
    strengthen(model)
    ids = torch.randint(4, (3, 16), generator=torch.Generator().manual_seed(0))
    images = pixels()
    with torch.no_grad():
        set_blocks(bundle_of(model), ids)
        together = tower_of(model)(images).last_hidden_state
        for image in range(3):
            set_blocks(bundle_of(model), ids[[image]])
            assert torch.allclose(tower_of(model)(images[[image]]).last_hidden_state[0], together[image], atol=1e-5)
        set_blocks(bundle_of(model), ids[[0, 0, 0]])
        first = tower_of(model)(images).last_hidden_state
        assert torch.allclose(first[0], together[0], atol=1e-5) and not torch.allclose(first[1], together[1], atol=1e-2)
        set_blocks(bundle_of(model), None)
        cleared = tower_of(model)(images).last_hidden_state
        set_blocks(bundle_of(model), torch.zeros(3, 16, dtype=torch.long))
        assert torch.allclose(tower_of(model)(images).last_hidden_state, cleared, atol=1e-5)


def test_the_language_model_is_left_alone():
    model = tiny_internvl()
    language = model.config.text_config._attn_implementation
    inject(bundle_of(model))
    assert model.config.text_config._attn_implementation == language and vision_attention(model) == "sfa"
    assert not [name for name, _ in model.model.language_model.named_parameters() if "structure" in name]
    text = torch.tensor([[1, 5, 5, 5, 5, 2, 3]])
    assert torch.isfinite(model(input_ids=text, pixel_values=pixels(1)).logits).all()


def test_gradient_checkpointing_changes_nothing():
    model = tiny_internvl()
    inject(bundle_of(model))
    strengthen(model)
    model.train()
    output, gradients = step(model)
    model.activation_checkpointing_enable()
    assert tower_of(model).encoder.layer[0].gradient_checkpointing
    again, recomputed = step(model)
    assert torch.equal(output, again) and gradients.keys() == recomputed.keys()
    assert all(torch.allclose(gradients[name], recomputed[name], atol=1e-7) for name in gradients)


@pytest.mark.parametrize("blocks", [False, True], ids=["shared", "blocks"])
def test_the_tower_compiles_into_one_graph(blocks):
    model = tiny_internvl(layers=1)
    inject(bundle_of(model), blocks=4)
    strengthen(model)
    if blocks:
        set_blocks(bundle_of(model), torch.arange(48).reshape(3, 16) % 4)
    torch._dynamo.reset()
    compiled = torch.compile(tower_of(model), fullgraph=True, backend="aot_eager")
    output, gradients = step(model)
    model.zero_grad()
    ours = compiled(pixels()).last_hidden_state
    ours.square().mean().backward()
    assert torch.allclose(ours, output, atol=1e-5)
    for name, weight in tower_of(model).named_parameters():
        assert name not in gradients or torch.allclose(weight.grad, gradients[name], atol=1e-5)


# --- precision -------------------------------------------------------------------------------------------------------

CASTS = {"bfloat16": lambda m: m.to(torch.bfloat16), "half": lambda m: m.half(),
         "device_and_dtype": lambda m: m.to("cpu", torch.bfloat16)}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_structural_weights_stay_float32(cast):
    "Whether the model was cast before or after."
    model = tiny_internvl()
    inject(bundle_of(model))
    before = [weight.clone() for bias in structures_of(bundle_of(model)) for weight in bias.parameters()]
    cast(model)
    biases = structures_of(bundle_of(model))
    assert all(weight.dtype == torch.float32 for bias in biases for weight in bias.parameters())
    assert all(torch.equal(a, b)
               for a, b in zip(before, (w for bias in biases for w in bias.parameters()), strict=True))
    assert all(bias.geometry.row.dtype == torch.float32 for bias in biases)
    assert next(tower_of(model).embeddings.parameters()).dtype != torch.float32


def test_a_bfloat16_model_trains_float32_structure():
    model = tiny_internvl().to(torch.bfloat16)
    biases = inject(bundle_of(model))
    assert all(weight.dtype == torch.float32 for bias in biases for weight in bias.parameters())
    exact = tiny_internvl()
    inject(bundle_of(exact))
    output, gradients = step(model)
    reference, wanted = step(exact)
    assert output.dtype == torch.bfloat16 and torch.allclose(output.float(), reference, atol=0.15)
    assert all(gradients[name].dtype == torch.float32 for name in gradients if ".structure." in name)
    ours, theirs = (torch.cat([g.flatten() for name, g in found.items() if ".structure." in name])
                    for found in (gradients, wanted))
    assert torch.nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.95


def test_autocast_does_not_touch_the_factors(monkeypatch):
    model = tiny_internvl(layers=1)
    bias = inject(bundle_of(model))[0]
    exact, seen = bias.factors(bias.geometry), []
    original = attention_module.low_rank_attention
    monkeypatch.setattr(attention_module, "low_rank_attention",
                        lambda *arguments: seen.append(arguments) or original(*arguments))
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(bias.factors(bias.geometry)[0], exact[0])  # it would
        hidden(model)
    (query, _, _, factors, *_), = seen
    assert query.dtype == torch.bfloat16 and all(
        torch.equal(ours, theirs) for ours, theirs in zip(factors, exact, strict=True)
    )


# --- the cached mask -------------------------------------------------------------------------------------------------

def caches(model):
    return [attention.structure_cache for attention in INTERNVL.attentions_of(model)]


@torch.no_grad()
def test_cached_mask_equals_low_rank_and_follows_the_weights():
    model = tiny_internvl()
    inject(bundle_of(model))
    strengthen(model)
    masked = hidden(model)
    masks = [cache.built[2] for cache in caches(model)]
    assert torch.equal(hidden(model), masked) and all(
        cache.built[2] is mask for cache, mask in zip(caches(model), masks, strict=True)
    )
    use_attention(model, "sfa_dense")
    assert torch.allclose(hidden(model), masked, atol=1e-5)
    use_attention(model, "sfa")
    for bias in structures_of(bundle_of(model)):
        bias.row.data.add_(3.0)  # a write that autograd's version counter does not see
    changed = hidden(model)
    use_attention(model, "sfa_dense")
    assert not torch.allclose(changed, masked, atol=1e-2) and torch.allclose(changed, hidden(model), atol=1e-5)


def test_no_mask_while_training_with_blocks_or_without_memory():
    model = tiny_internvl()
    biases = inject(bundle_of(model), blocks=4)
    hidden(model)
    assert all(cache.built is None for cache in caches(model))
    with torch.no_grad():
        set_blocks(bundle_of(model), torch.zeros(3, 16, dtype=torch.long))
        hidden(model)
        assert all(cache.built is None for cache in caches(model))
        set_blocks(bundle_of(model), None)
        for cache in caches(model):
            cache.budget = 4 * 2 * 17**2 - 1
        hidden(model)
        assert all(cache.built is None for cache in caches(model))
        query = torch.zeros(1, 2, 17, 16)
        assert may_cache(biases[0], biases[0].geometry, query, MaskCache(4 * 2 * 17**2))


def test_frozen_structure_under_a_training_encoder_gets_exact_gradients():
    "A mask built in inference mode serves a later backward pass."
    model = tiny_internvl()
    for bias in inject(bundle_of(model)):
        bias.requires_grad_(False)
    strengthen(model)
    with torch.inference_mode():
        hidden(model)
    output, gradients = step(model)
    assert all(cache.built is not None for cache in caches(model))
    use_attention(model, "sfa_dense")
    reference, wanted = step(model)
    assert torch.allclose(output, reference, atol=1e-5) and all(
        torch.allclose(gradients[name], wanted[name], atol=1e-5) for name in wanted
    )


# --- looking, detaching, saving --------------------------------------------------------------------------------------

@torch.no_grad()
def test_visible_attention_returns_weights_with_and_without_structure():
    model = tiny_internvl()
    plain = hidden(model)
    with visible_attention(bundle_of(model)):
        result = tower_of(model)(pixels(), output_attentions=True)
    assert vision_attention(model) == "sdpa" and torch.allclose(result.last_hidden_state, plain, atol=1e-5)
    inject(bundle_of(model))
    strengthen(model)
    with visible_attention(bundle_of(model)):
        changed = tower_of(model)(pixels(), output_attentions=True)
    assert vision_attention(model) == "sfa" and torch.allclose(changed.last_hidden_state, hidden(model), atol=1e-5)
    for before, after in zip(result.attentions, changed.attentions, strict=True):
        assert before.shape == after.shape == (3, 2, 17, 17) and torch.allclose(
            after.sum(-1), torch.ones(3, 2, 17), atol=1e-5
        )
        assert not torch.allclose(before, after, atol=1e-2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_eject_is_the_inverse_of_inject(implementation):
    model = tiny_internvl()
    use_attention(model, implementation)
    names, before = list(model.state_dict()), hidden(model)
    inject(bundle_of(model))
    assert not torch.equal(hidden(model), before)
    assert eject(bundle_of(model)).model is model
    assert (
        list(model.state_dict()) == names
        and vision_attention(model) == implementation
        and torch.equal(hidden(model), before)
    )
    assert not [name for attention in INTERNVL.attentions_of(model) for name in vars(attention) if "structure" in name]
    inject(bundle_of(model))


def test_layers_and_seeds_start_differently_and_repeatably():
    models = [tiny_internvl() for _ in range(3)]
    one, same, other = (inject(bundle_of(model), seed=seed) for model, seed in zip(models, (0, 0, 1), strict=True))
    assert torch.equal(one[1].block, same[1].block) and not torch.equal(one[0].block, one[1].block)
    assert not any(torch.equal(a.block, b.block) for a in one for b in other)


@torch.no_grad()
def test_save_load_round_trip(tmp_path):
    model = tiny_internvl()
    inject(bundle_of(model), terms=["distance", "row"], blocks=4, seed=3)
    strengthen(model)
    expected = hidden(model)
    folder = save_structure(bundle_of(model), tmp_path / "new" / "folder")
    assert sorted(path.name for path in folder.iterdir()) == ["structure.json", "structure.safetensors"]
    fresh = tiny_internvl()
    assert [bias.terms for bias in load_structure(bundle_of(fresh), folder)] == [("row", "distance")] * 2
    assert torch.equal(hidden(fresh), expected)
    attached = tiny_internvl()
    biases = inject(bundle_of(attached), terms=["row", "distance"], blocks=4, seed=9)
    assert load_structure(bundle_of(attached), folder) == biases and torch.equal(hidden(attached), expected)
    half = tiny_internvl().to(torch.bfloat16)
    assert all(weight.dtype == torch.float32 for bias in load_structure(bundle_of(half), folder)
               for weight in bias.parameters())


def test_a_copied_model_is_independent():
    model = tiny_internvl()
    inject(bundle_of(model))
    twin = copy.deepcopy(model)
    strengthen(twin)
    assert not torch.allclose(hidden(model), hidden(twin), atol=1e-3)


@pytest.mark.parametrize("change, words", [
    ({"layers": 3}, "layers is 2, expected 3"),
    ({"heads": 4}, "heads is 2, expected 4"),
    ({"width": 64}, "width is 32, expected 64"),
    ({"image": 84}, r"grid is \[4, 4\], expected \[6, 6\]"),
])
def test_weights_of_another_encoder_are_refused(tmp_path, change, words):
    model, other = tiny_internvl(), tiny_internvl(**change)
    inject(bundle_of(model))
    save_structure(bundle_of(model), tmp_path)
    with pytest.raises(ValueError, match=words):
        load_structure(bundle_of(other), tmp_path)
    assert vision_attention(other) == "sdpa" and "structure" not in "".join(other.state_dict())


@pytest.mark.parametrize("change, words", [
    ({"terms": ["row"]}, "terms is .*'row', 'column', 'distance', 'block'.* expected .*'row'"),
    ({"blocks": 8}, "blocks is 4, expected 8"),
])
def test_weights_with_other_terms_are_refused(tmp_path, change, words):
    model = tiny_internvl()
    inject(bundle_of(model), blocks=4)
    save_structure(bundle_of(model), tmp_path)
    eject(bundle_of(model))
    biases = inject(bundle_of(model), **{"blocks": 4, **change})
    before = [weight.clone() for weight in biases[0].parameters()]
    with pytest.raises(ValueError, match=words):
        load_structure(bundle_of(model), tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, biases[0].parameters(), strict=True))


def truncate(folder):
    path = folder / "structure.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def edit(**changes):
    def apply(folder):
        card = json.loads((folder / "structure.json").read_text())
        (folder / "structure.json").write_text(json.dumps({**card, **changes}))
    return apply


def deeper(folder):
    "Let the card speak of five layers."
    card = json.loads((folder / "structure.json").read_text())
    edit(encoder=card["encoder"] | {"layers": 5})(folder)


@pytest.mark.parametrize("damage, error, words", [
    (lambda folder: (folder / "structure.json").unlink(), FileNotFoundError, "structure.json is missing"),
    (lambda folder: (folder / "structure.safetensors").unlink(), FileNotFoundError, "structure.safetensors is missing"),
    (truncate, ValueError, "does not match the checksum"),
    (lambda folder: (folder / "structure.json").write_text("{"), ValueError, "structure.json: no JSON"),
    (lambda folder: (folder / "structure.json").write_text("[]"), ValueError, "structure.json holds"),
    (edit(terms=["row", "diagonal"]), ValueError, "'diagonal', expected one or more of row, column, distance, block"),
    (edit(terms=["row"]), ValueError, "6 weights missing, unexpected or not of the shape"),
    (edit(encoder={"layers": 5, "heads": 2}), ValueError, "has no encoder.family"),
    (deeper, ValueError, "12 weights missing"),
])
def test_damaged_folders_are_refused_in_one_line(tmp_path, damage, error, words):
    model = tiny_internvl()
    inject(bundle_of(model))
    save_structure(bundle_of(model), tmp_path)
    damage(tmp_path)
    fresh = tiny_internvl()
    with pytest.raises(error, match=words) as caught:
        load_structure(bundle_of(fresh), tmp_path)
    assert "\n" not in str(caught.value) and vision_attention(fresh) == "sdpa"


@pytest.mark.parametrize("fails_at", [1, 2], ids=["weights", "card"])
def test_an_interrupted_save_is_never_half_read(tmp_path, monkeypatch, fails_at):
    "The rename of either file fails: no stray file stays, and what is loaded is the old state or refused."
    model = tiny_internvl()
    inject(bundle_of(model))
    save_structure(bundle_of(model), tmp_path)
    old = structures_of(bundle_of(model))[0].row.detach().clone()
    strengthen(model)
    calls, rename = [], os.replace

    def failing(source, target):
        calls.append(target)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="No space left"):
        save_structure(bundle_of(model), tmp_path)
    monkeypatch.setattr(os, "replace", rename)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["structure.json", "structure.safetensors"]
    if fails_at == 1:
        assert torch.equal(load_structure(bundle_of(tiny_internvl()), tmp_path)[0].row, old)
    else:
        with pytest.raises(ValueError, match="does not match the checksum"):
            load_structure(bundle_of(tiny_internvl()), tmp_path)


# --- errors name what was given and what was expected -----------------------------------------------------------------

def attached():
    model = tiny_internvl()
    inject(bundle_of(model), blocks=4)
    return model


def other_size_with_blocks():
    model = attached()
    set_blocks(bundle_of(model), torch.zeros(1, 16, dtype=torch.long))
    tower_of(model)(pixels(1, 84))


@pytest.mark.parametrize(
    "act, words",
    [
        (lambda: StructuralBias(0), "heads is 0 and blocks is 16, expected at least 1"),
        (
            lambda: StructuralBias(4, terms=["row", "diagonal"]),
            "'diagonal', expected one or more of row, column, distance, block",
        ),
        (lambda: StructuralBias(4, terms=[]), "structural terms are none, expected"),
        (lambda: StructuralBias(4, terms=["row", "row"]), "each once"),
        (lambda: uniform_geometry(0, 4), "0 x 4 with 0 special tokens: expected sides of at least 1"),
        (lambda: grid_geometry([0, 4], [0, 0], [False, False], 4, 4), "row 4, expected 0 to 3"),
        (
            lambda: grid_geometry([0, 1], [0], [False, False], 4, 4),
            r"\(2,\), \(1,\), \(2,\), expected \(N,\) three times",
        ),
        (
            lambda: with_blocks(uniform_geometry(2, 2), torch.zeros(3, 5).long(), 4),
            r"shape \(3, 5\), expected \(images, 4\)",
        ),
        (lambda: with_blocks(uniform_geometry(2, 2), torch.zeros(3, 4), 4), "torch.float32, expected integers"),
        (lambda: with_blocks(uniform_geometry(2, 2), torch.full((1, 4), 4), 4), "from 4 to 4, expected 0 to 3"),
        (
            lambda: merge_cells(uniform_geometry(2, 2), torch.zeros(2, 5)),
            r"shape \(2, 5\), expected \(..., merged tokens, "
            r"4\)",
        ),
        (lambda: merge_cells(uniform_geometry(2, 2), torch.full((2, 4), 0.5)), "other than 0 and 1"),
        (lambda: merge_cells(uniform_geometry(2, 2, 1), torch.ones(1, 5)), "special token is merged with others"),
        (lambda: StructuralBias(2, blocks=8).factors(geometry_of("blocks", 1)), "geometry has 4 blocks, the bias 8"),
        (lambda: inject(bundle_of(tiny_internvl()), terms=["diagonal"]), "'diagonal', expected one or more of"),
        (lambda: inject(bundle_of(tiny_internvl()), blocks=0), "blocks is 0, expected at least 1"),
        (
            lambda: inject(bundle_of(tiny_internvl().model.language_model, family=INTERNVL)),
            "model type 'qwen3' is not supported, expected one of: .*internvl",
        ),
        (lambda: inject(bundle_of(tiny_internvl().model, family=INTERNVL)), "has nothing at 'model.vision_tower"),
        (lambda: family_of(torch.nn.Linear(1, 1)), "model type 'Linear' is not supported"),
        (lambda: inject(bundle_of(attached())), "already: call eject first"),
        (lambda: eject(bundle_of(tiny_internvl())), "no structural attention: call inject first"),
        (lambda: set_blocks(bundle_of(tiny_internvl()), None), "no structural attention: call inject first"),
        (lambda: set_blocks(bundle_of(attached()), torch.zeros(16).long()), r"shape \(16,\), expected \(images, 16\)"),
        (lambda: save_structure(bundle_of(tiny_internvl()), "unused"), "no structural attention: call inject first"),
        (
            other_size_with_blocks,
            "the encoder sees 37 tokens, the geometry places 17 on a grid of 4 x 4",
        ),
    ],
)
def test_wrong_input_is_one_clear_line(act, words):
    with pytest.raises(ValueError, match=words) as caught:
        act()
    assert "\n" not in str(caught.value)


def test_blocks_of_another_batch_are_refused():
    model = attached()
    set_blocks(bundle_of(model), torch.zeros(2, 16, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got 3 images, the geometry \(set_labels\) is for \(2,\)"):
        hidden(model)
