"""Every term of the ladder is its formula, exact in every way it is computed, and silent until it has learned."""
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import IMAGES, attached, each_family, features
from test_structural_attention import (
    CLOSE,
    error_of,
    outputs_and_gradients,
    random_assignment,
    step,
)
from tiny_internvl import bundle_of, pixels, tiny_internvl
from torch.nn.functional import scaled_dot_product_attention

import sfa_core.structure.inject as attention_module
from sfa_core.models.images import image_batch
from sfa_core.structure.bias import PUBLISHED, StructuralBias, visible_pairs
from sfa_core.structure.geometry import LABELS, REGIONS, ROLES, merge_cells, uniform_geometry, with_labels
from sfa_core.structure.inject import inject, set_labels, structures_of, use_attention
from sfa_core.structure.kernels import chunked_attention, combine_masks, low_rank_attention, masked_attention
from sfa_core.structure.store import load_structure, save_structure
from sfa_core.structure.strips import grid_attention, may_strip
from sfa_core.structure.terms import LADDER, RADIUS, TERMS, Term

SOFT = tuple(term for term in LADDER if LADDER[term].table is not None)
NEW = tuple(term for term in SOFT if term not in TERMS)
COUNT = {"block": 4, "group": 3, "order": REGIONS, "role": len(ROLES)}
SETS = [*((term,) for term in SOFT), SOFT, ("row", "offset"), ("order", "group")]


def learned(heads=2, terms=SOFT, seed=0, dtype=torch.float64, **settings):
    "A bias with weights of order one, new terms too."
    bias, generator = StructuralBias(heads, 4, terms, seed, **settings).to(dtype), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in bias.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return bias


def random_ids(label, shape, generator):
    return torch.randint(-1 if label == "group" else 0, COUNT[label], shape, generator=generator)


def labelled(special, kind="uniform", images=3, height=3, width=4, seed=7):
    "A grid with every labelling, per image; with merged patches, other ones in every image."
    generator = torch.Generator().manual_seed(seed)
    geometry = uniform_geometry(height, width, special)
    for label in LABELS:
        shape = (height * width,) if kind == "shared" else (images, height * width)
        geometry = with_labels(geometry, label, random_ids(label, shape, generator), COUNT[label])
    if kind == "merged":
        geometry = merge_cells(geometry, random_assignment(geometry.tokens, special, generator, images, 5))
    return geometry


@settings(max_examples=40, deadline=None)
@given(height=st.integers(1, 4), width=st.integers(1, 4), special=st.integers(0, 2), seed=st.integers(0, 10_000),
       term=st.sampled_from(NEW))
def test_dense_bias_is_the_formula(height, width, special, seed, term):
    "Against loops over pairs of cells, written from the formula alone."
    generator = torch.Generator().manual_seed(seed)
    ids = {label: random_ids(label, (height * width,), generator) for label in LABELS}
    geometry = uniform_geometry(height, width, special)
    for label in LABELS:
        geometry = with_labels(geometry, label, ids[label], COUNT[label])
    bias = learned(1, (term,), seed)
    weight, table = getattr(bias, term).detach()[..., 0], bias.dense(geometry)[0]

    def of(difference, values):  # differences -radius to -1 and 1 to radius
        return 0 if difference == 0 else values[len(values) // 2 + difference - (difference > 0)]

    def formula(i, j):
        (y, x), (v, u) = divmod(i, width), divmod(j, width)
        group, order, role = (ids[label].tolist() for label in LABELS[1:])
        return {"offset": lambda: of(y - v, weight[0]) + of(x - u, weight[1]),
                "group": lambda: weight * (group[i] == group[j] >= 0),
                "order": lambda: of(order[i] - order[j], weight),
                "roles": lambda: weight[role[i], role[j]]}[term]()

    expected = torch.zeros_like(table)
    for i in range(height * width):
        for j in range(height * width):
            expected[special + i, special + j] = formula(i, j)
    assert torch.allclose(table, expected, rtol=0, atol=1e-12)


def test_offsets_are_clipped_and_zero_for_no_difference():
    bias = learned(1, ("offset",))
    table = bias.dense(uniform_geometry(1, 2 * RADIUS))[0]
    right, left = table[0], table[:, 0]
    assert right[RADIUS:].unique().tolist() == [right[RADIUS]] and left[RADIUS:].unique().tolist() == [left[RADIUS]]
    assert right[1 : RADIUS + 1].unique().numel() == RADIUS and not torch.allclose(right[1:], left[1:])
    assert table.diagonal().abs().max() == 0


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("special", [0, 1])
@pytest.mark.parametrize("kind", ["uniform", "shared", "merged"])
@pytest.mark.parametrize("terms", SETS, ids="+".join)
def test_low_rank_equals_the_dense_oracle(dtype, special, kind, terms):
    "Outputs and gradients with respect to queries, keys, values and every structural weight, on the low-rank path."
    bias, geometry = learned(terms=terms, dtype=dtype), labelled(special, kind)
    *tensors, projection = torch.randn(4, 3, 2, geometry.tokens, 8, dtype=dtype,
                                       generator=torch.Generator().manual_seed(5))

    def dense(query, key, value):
        return scaled_dot_product_attention(query, key, value, attn_mask=bias.dense(geometry).expand(3, -1, -1, -1),
                                            scale=0.3)

    reference = outputs_and_gradients(dense, bias, tensors, projection)
    for attend in (low_rank_attention, chunked_attention):
        ours = outputs_and_gradients(lambda q, k, v, attend=attend: attend(q, k, v, bias.factors(geometry), 0.3), bias,
                                     tensors, projection)
        assert all(error_of(mine, theirs) < CLOSE[dtype] for mine, theirs in zip(ours, reference, strict=True))


@pytest.mark.parametrize("terms", [("offset",), (*TERMS, "offset")], ids="+".join)
def test_strips_equal_the_dense_oracle(terms):
    for dtype in CLOSE:
        bias, geometry = learned(terms=terms, dtype=dtype), uniform_geometry(3, 4, 1)
        *tensors, projection = torch.randn(4, 3, 2, 13, 8, dtype=dtype, generator=torch.Generator().manual_seed(5))
        assert may_strip(geometry, tensors[0], None, 0.0) and not may_strip(labelled(1), tensors[0], None, 0.0)
        dense = outputs_and_gradients(
            lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=bias.dense(geometry)[None], scale=0.3),  # noqa: B023
            bias, tensors, projection)
        ours = outputs_and_gradients(lambda q, k, v: grid_attention(q, k, v, bias, geometry, 0.3), bias, tensors,  # noqa: B023
                                     projection)
        assert all(error_of(mine, theirs) < CLOSE[dtype] for mine, theirs in zip(ours, dense, strict=True))


def test_terms_about_rows_and_columns_add_no_rank_and_labels_add_their_own():
    rank = {terms: StructuralBias(2, 4, terms).factors(labelled(0, height=5, width=6))[0].shape[-1]
            for terms in (TERMS, (*TERMS, "offset"), ("offset",), (*TERMS, "group"), (*TERMS, "order"),
                          (*TERMS, "roles"))}
    assert list(rank.values()) == [11, 11, 10, 11 + 3, 11 + REGIONS - 1, 11 + len(ROLES)]


@pytest.mark.parametrize("term", NEW)
def test_bias_of_merged_patches_is_the_mean_over_their_cells(term):
    bias, cells = learned(terms=(term,)), labelled(1)
    assignment = random_assignment(cells.tokens, 1, torch.Generator().manual_seed(3), 3, 5)
    merged, every = merge_cells(cells, assignment), bias.dense(cells)
    weights = assignment.double() / assignment.double().sum(-1, keepdim=True).clamp(min=1)
    mean = weights.unsqueeze(1) @ every @ weights.mT.unsqueeze(1)
    assert torch.allclose(bias.dense(merged) - merged.log_area.double()[:, None, None, :], mean, atol=1e-10)


# --- inside real models -----------------------------------------------------------------------------------------------

def label_all(bundle, batch):
    "Ids of every labelling, as the place of a patch decides, so that an image alone gets those it has in a batch."
    if bundle.family.native:
        cells = [int(size[1:].prod()) for size in batch.inputs["image_grid_thw"]]
        ids = [torch.arange(count) for count in cells]
    else:
        grid = bundle.family.grid(bundle.model)
        ids = torch.arange(grid.height * grid.width).repeat(sum(batch.views), 1)
    for label in LABELS:
        made = [part * 7 % COUNT[label] for part in ids]
        set_labels(bundle, label, made if bundle.family.native else torch.stack(made))


@each_family
def test_every_term_is_exact_in_every_family(name, monkeypatch):
    """The low-rank path, forced on the CPU, against the dense bias; windowed and native sizes included. In float64:
    in float32 rounding alone, which differs from processor to processor, comes near 1e-4 in a gradient."""
    monkeypatch.setattr(attention_module, "may_strip", lambda *given: False)
    bundle = attached(name, terms=SOFT)
    bundle.model.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for bias in structures_of(bundle):
            for weight in bias.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
    tower, found = bundle.family.tower_of(bundle.model), {}
    label_all(bundle, image_batch(bundle, IMAGES))
    for way in ("sfa", "sfa_dense"):
        use_attention(bundle.model, way)
        bundle.model.zero_grad()
        output = features(bundle)
        output.square().mean().backward()
        found[way] = [output.detach(), *(w.grad.clone() for w in tower.parameters() if w.grad is not None)]
    assert len(found["sfa"]) == len(found["sfa_dense"]) > len(structures_of(bundle)) * len(SOFT)
    assert all(error_of(a, b) < 1e-9 for a, b in zip(*found.values(), strict=True))


def test_new_terms_change_nothing_until_they_learn_and_do_learn():
    plain, more = tiny_internvl(), tiny_internvl()
    inject(bundle_of(plain), blocks=4)
    inject(bundle_of(more), (*TERMS, "offset"), blocks=4)
    (before, _), (after, gradients) = step(plain), step(more)
    assert torch.equal(before, after)
    for layer in range(2):
        gradient = gradients[f"encoder.layer.{layer}.attention.structure.offset"]
        seen = [RADIUS - 3, RADIUS - 2, RADIUS - 1, RADIUS, RADIUS + 1, RADIUS + 2]  # a grid of 4 x 4
        assert (gradient[:, seen] != 0).all() and gradient.count_nonzero() == gradient[:, seen].numel()
    whole = tiny_internvl()
    inject(bundle_of(whole), SOFT, blocks=4)
    ids = torch.arange(48).reshape(3, 16)
    for label in LABELS[1:]:
        set_labels(bundle_of(whole), label, ids % COUNT[label])
    output, gradients = step(whole)
    assert torch.allclose(output, before, atol=1e-6)
    assert all(gradient.any() for name, gradient in gradients.items() if ".structure." in name)


@pytest.mark.parametrize("term, label", [("group", "group"), ("order", "order"), ("roles", "role")])
def test_labels_that_nobody_assigned_are_an_error(term, label):
    model = tiny_internvl()
    inject(bundle_of(model), ("row", term))
    with pytest.raises(ValueError, match=rf"compares {label}s, the geometry has none: expected set_labels"):
        step(model)
    set_labels(bundle_of(model), label, torch.zeros(3, 16, dtype=torch.long))
    step(model)
    set_labels(bundle_of(model), label, None)
    with pytest.raises(ValueError, match="the geometry has none"), torch.no_grad():
        step(model)


@pytest.mark.parametrize("label, ids, words", [
    ("group", torch.full((3, 16), -2), "group ids run from -2 to -2, expected -1 to"),
    ("order", torch.full((3, 16), REGIONS), "order ids run from 16 to 16, expected 0 to 15"),
    ("role", torch.full((3, 16), 7), "role ids run from 7 to 7, expected 0 to 6"),
    ("role", torch.zeros(3, 15).long(), r"shape \(3, 15\), expected \(images, 16\)"),
    ("colour", torch.zeros(3, 16).long(), "unknown labelling 'colour', expected one of block, group, order, role"),
])
def test_wrong_labels_are_one_clear_line(label, ids, words):
    model = tiny_internvl()
    inject(bundle_of(model))
    with pytest.raises(ValueError, match=words) as caught:
        set_labels(bundle_of(model), label, ids)
    assert "\n" not in str(caught.value)


# --- settings of the distance, and what is on disk --------------------------------------------------------------------

def test_distances_in_patches_and_absolute_weights():
    geometry = uniform_geometry(3, 5)
    page, patch, absolute = (StructuralBias(2, terms="distance", **given).double()
                             for given in ({}, {"distance_unit": "patch"}, {"absolute_distance": True}))
    with torch.no_grad():
        for bias in (page, patch, absolute):
            bias.distance.copy_(torch.tensor([0.5, -0.5]))
    assert torch.allclose(patch.dense(geometry), 8 * page.dense(geometry))
    assert torch.equal(absolute.dense(geometry)[0], page.dense(geometry)[0])
    assert torch.equal(absolute.dense(geometry)[1], absolute.dense(geometry)[0])
    for bias in (patch, absolute):
        query, key = bias.factors(geometry)
        assert torch.allclose(query @ key.mT, bias.dense(geometry), atol=1e-12)
    with pytest.raises(ValueError, match="distance_unit is 'metre', expected one of page, patch"):
        StructuralBias(2, distance_unit="metre")


def test_structure_with_any_terms_and_settings_comes_back(tmp_path):
    model = tiny_internvl()
    given = dict(terms=tuple(LADDER), blocks=4, distance_unit="patch", absolute_distance=True)
    for bias in inject(bundle_of(model), **given):
        with torch.no_grad():
            bias.roles.normal_()
    save_structure(bundle_of(model), tmp_path)
    fresh = tiny_internvl()
    for ours, theirs in zip(load_structure(bundle_of(fresh), tmp_path), structures_of(bundle_of(model)), strict=True):
        assert ours.settings == theirs.settings and ours.terms == theirs.terms
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    other = tiny_internvl()
    inject(bundle_of(other), **given | {"distance_unit": "page"})
    with pytest.raises(ValueError, match="distance_unit is patch, expected page"):
        load_structure(bundle_of(other), tmp_path)


def test_a_folder_from_before_there_were_settings_loads_as_published(tmp_path):
    model = tiny_internvl()
    inject(bundle_of(model), seed=3)
    save_structure(bundle_of(model), tmp_path)
    path = tmp_path / "structure.json"
    card = json.loads(path.read_text())
    path.write_text(json.dumps({name: card[name] for name in ("encoder", "terms", "blocks", "sha256")}))
    (bias, _), (same, _) = load_structure(bundle_of(tiny_internvl()), tmp_path), structures_of(bundle_of(model))
    assert bias.settings == PUBLISHED and torch.equal(bias.row, same.row)


def test_a_term_of_ones_own_is_one_row():
    def diagonal(weight, axis, side, extent):
        return weight[:, None, None] * torch.eye(side).flip(0)

    LADDER["diagonal"] = Term(("row",), lambda heads, blocks: (heads,), diagonal, start=0.1)
    try:
        model = tiny_internvl()
        bias = inject(bundle_of(model), ("row", "diagonal"))[0]
        assert bias.terms == ("row", "diagonal") and bias.diagonal.any()
        query, key = bias.factors(bias.geometry)
        assert torch.allclose(query @ key.mT, bias.dense(bias.geometry), atol=1e-7)
        assert torch.equal(bias.row, inject(bundle_of(tiny_internvl()))[0].row)
    finally:
        del LADDER["diagonal"]


# --- hard terms -------------------------------------------------------------------------------------------------------

HARD = [("row_heads",), ("window",), ("row_heads", "window", "row", "offset"), (*TERMS, "window", "group")]


@pytest.mark.parametrize("special", [0, 1])
def test_hard_terms_are_their_definition(special):
    "Against loops: own row for the first half of the heads, near patches for all; special tokens and oneself always."
    geometry = uniform_geometry(3, 4, special)
    bias = StructuralBias(4, terms=("row_heads", "window"), window=1)
    assert not list(bias.parameters())
    seen = visible_pairs(bias, geometry)
    for head in range(4):
        for i in range(geometry.tokens):
            for j in range(geometry.tokens):
                (y, x), (v, u) = divmod(i - special, 4), divmod(j - special, 4)
                near = abs(y - v) <= 1 and abs(x - u) <= 1 and (head >= 2 or y == v)
                assert seen[head, i, j] == (min(i, j) < special or i == j or near)
    assert (bias.dense(geometry).isinf() == ~seen).all()


def test_a_merged_token_is_visible_where_any_of_its_cells_is():
    cells, bias = uniform_geometry(4, 4, 1), StructuralBias(2, terms=("row_heads", "window"), window=1)
    assignment = torch.zeros(6, 17)  # the class token, two squares, a row, a cell, and padding
    for token, members in enumerate(([0], [1, 2, 5, 6], [3, 4, 7, 8], [9, 10, 11, 12], [13])):
        assignment[token, members] = 1
    every, seen = visible_pairs(bias, cells), visible_pairs(bias, merge_cells(cells, assignment))
    member = assignment.bool()
    for i in range(5):
        for j in range(5):
            expected = every[:, member[i]][:, :, member[j]].flatten(1).any(1) | torch.tensor(i == j)
            assert torch.equal(seen[:, i, j], expected)


@pytest.mark.parametrize("chunk", [5, 512])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kind", ["uniform", "merged"])
@pytest.mark.parametrize("terms", HARD, ids="+".join)
def test_masked_attention_equals_the_dense_oracle(dtype, kind, terms, chunk, monkeypatch):
    "Outputs and all gradients, soft terms as factors beside the mask, with and without a mask of the model's own."
    monkeypatch.setattr("sfa_core.structure.kernels.QUERY_CHUNK", chunk)
    bias, geometry = learned(terms=terms, dtype=dtype, window=1), labelled(1, kind)
    *tensors, projection = torch.randn(4, 3, 2, geometry.tokens, 8, dtype=dtype,
                                       generator=torch.Generator().manual_seed(5))
    mask = torch.rand(3, 1, 1, geometry.tokens, generator=torch.Generator().manual_seed(6)) > 0.2
    mask[..., 0] = True
    for own in (None, mask, torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -1e4)):
        def dense(query, key, value, own=own):
            logits = combine_masks(bias.dense(geometry).expand(3, -1, -1, -1), own)
            return scaled_dot_product_attention(query, key, value, attn_mask=logits, scale=0.3)

        ours = outputs_and_gradients(lambda q, k, v, own=own: masked_attention(q, k, v, bias, geometry, 0.3, own), bias,
                                     tensors, projection)
        for mine, theirs in zip(ours, outputs_and_gradients(dense, bias, tensors, projection), strict=True):
            assert error_of(mine, theirs) < CLOSE[dtype]


@each_family
def test_hard_terms_are_exact_in_every_family_without_any_weight(name):
    bundle, found = attached(name, terms=("row_heads", "window"), window=2), {}
    plain = features(attached(name, terms=("row",), factor=0.0))
    for way in ("sfa", "sfa_dense", "sfa_eager"):
        use_attention(bundle.model, way)
        with torch.no_grad():
            found[way] = features(bundle)
    assert all(error_of(other, found["sfa"]) < 1e-5 for other in found.values())
    assert not torch.allclose(found["sfa"], plain, atol=1e-4)


def test_hard_terms_hold_in_half_precision_and_come_back_from_disk(tmp_path):
    model = tiny_internvl().to(torch.bfloat16)
    (bias, _) = inject(bundle_of(model), ("row_heads", "distance"), row_share=1.0)
    with torch.no_grad():
        assert torch.isfinite(model.model.vision_tower(pixels().bfloat16()).last_hidden_state).all()
    assert bias.unit.dtype == torch.float32 and bias.geometry.row.dtype == torch.float32
    save_structure(bundle_of(model), tmp_path)
    again = load_structure(bundle_of(tiny_internvl()), tmp_path)[0]
    assert again.hard == ("row_heads",) and again.settings["row_share"] == 1.0
    for wrong in (dict(row_share=1.5), dict(window=-1)):
        with pytest.raises(ValueError, match="expected a share of 0..1 and at least 0"):
            StructuralBias(2, terms="window", **wrong)
