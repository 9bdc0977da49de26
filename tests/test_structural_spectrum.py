"""What places explain of an attention: planted biases are found again in every family, noise is not explained."""
import pytest
import torch
from test_families import IMAGES, each_family, fresh

from sfa_core.attention.spectrum import structural_spectrum
from sfa_core.documents.samples import Sample
from sfa_core.models.miniatures import miniature_encoder
from sfa_core.structure.bias import StructuralBias
from sfa_core.structure.fit import LINEAR, STEPS, StructuralFit, pair_products, unit_tables
from sfa_core.structure.geometry import merge_cells, uniform_geometry
from sfa_core.structure.inject import eject, inject, structures_of

PAGES = [Sample(f"p{i}", f"p{i}", "read_label", "?", ("1",), image) for i, image in enumerate(IMAGES)]


def planted(heads, terms=LINEAR, seed=0):
    "A bias with weights of order one in its terms."
    bias, generator = StructuralBias(heads, terms=terms).double(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in bias.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return bias


def fitted(geometry, logits):
    fit = StructuralFit(logits.shape[1])
    fit.add(geometry, [(slice(None), logits)])
    return fit


@pytest.mark.parametrize("size", [(1, 5), (4, 1), (3, 4), (5, 5)])
def test_products_are_those_of_columns_written_out(size):
    h, w = size
    tables = [torch.cat(parts) for parts in zip(*(unit_tables(term, size, h + w) for term in LINEAR))]
    row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    written = tables[0][:, row][:, :, row] + tables[1][:, column][:, :, column]
    written = (written - written.mean(-1, keepdim=True)).flatten(1)
    assert torch.allclose(pair_products(*tables), written @ written.mT, atol=1e-9)


@pytest.mark.parametrize("special", [0, 1])
def test_every_linear_bias_is_explained_whole_and_its_weights_are_found(special):
    geometry = uniform_geometry(5, 7, special)
    for terms in (*STEPS.values(), ("offset",)):
        bias = planted(2, terms)
        with torch.no_grad():
            fit = fitted(geometry, bias.dense(geometry)[None])
        table = fit.steps().set_index(["step", "head"])
        for step, known in STEPS.items():
            whole = set(terms) <= set(known)
            assert all((abs(table.loc[(step, head), "r2"] - 1) < 1e-9) == whole for head in range(2))
        if "offset" not in terms:  # offsets say what row, column and distance say, so their weights are not unique
            for term, weight in fit.weights(terms).items():
                assert torch.allclose(weight, getattr(bias, term).detach(), atol=1e-9)


def test_planted_weights_are_found_in_noise_and_noise_is_explained_by_nothing():
    geometry, generator = uniform_geometry(6, 6, 1), torch.Generator().manual_seed(1)
    noise = torch.randn(40, 3, 37, 37, generator=generator, dtype=torch.float64)
    bias = planted(3, ("row", "column", "distance"))
    with torch.no_grad():
        noisy = fitted(geometry, bias.dense(geometry) + noise)
    for term, weight in noisy.weights().items():
        assert (weight - getattr(bias, term).detach()).abs().max() < 0.1
    table = fitted(geometry, noise).steps()
    assert table["adjusted"].abs().max() < 2e-3 and (table["r2"] > 0).all()
    few = fitted(geometry, noise[:1]).steps()
    last = few[few["step"] == "+ offset"]
    assert last["rank"].iloc[0] == 20 and last["r2"].mean() > 0.01 > abs(last["adjusted"].mean())


def test_pieces_give_what_the_whole_gives_and_sizes_may_differ():
    bias, generator = planted(2), torch.Generator().manual_seed(2)
    whole, pieces = StructuralFit(2), StructuralFit(2)
    for size in ((4, 4), (2, 4), (3, 3)):
        geometry = uniform_geometry(*size, 1)
        with torch.no_grad():
            logits = bias.dense(geometry) + torch.randn(3, 2, geometry.tokens, geometry.tokens, generator=generator)
        whole.add(geometry, [(slice(None), logits)])
        for image in logits:
            pieces.add(geometry, [(slice(0, 4), image[None, :, :4]), (slice(4, None), image[None, :, 4:])])
    for name in ("products", "moments", "variance"):
        assert torch.allclose(getattr(whole, name), getattr(pieces, name), atol=1e-8)
    assert (whole.pairs, whole.queries) == (pieces.pairs, pieces.queries)


def test_a_start_from_an_attention_does_what_the_attention_did():
    geometry = uniform_geometry(4, 6, 1)
    for unit in ("page", "patch"):
        bias = planted(2, ("row", "column", "distance"))
        with torch.no_grad():
            attention = bias.dense(geometry)[None].softmax(-1)
        start = StructuralBias.from_attention(attention, geometry, distance_unit=unit, blocks=3, seed=5)
        for term in ("row", "column"):
            assert torch.allclose(getattr(start, term).double(), getattr(bias, term).detach(), atol=1e-5)
        assert torch.allclose(start.distance.double(), bias.distance.detach() / (10 if unit == "patch" else 1),
                              atol=1e-5)
        assert start.terms == ("row", "column", "distance", "block") and start.settings["distance_unit"] == unit
        assert torch.equal(start.block, StructuralBias(2, 3, seed=5).block)
        with torch.no_grad():
            start.block.zero_()
            again = start.double().dense(geometry).softmax(-1)
        # the class token's own logits are no matter of places
        assert torch.allclose(again[:, 1:, 1:], attention[0, :, 1:, 1:], atol=1e-5)


@pytest.mark.parametrize("change, message", [
    (dict(merged=True), "expected a full grid without merged patches"),
    (dict(missing=True), "expected a full grid without merged patches"),
    (dict(hidden=True), "some patches are hidden from others"),
])
def test_what_has_no_spectrum_is_refused(change, message):
    geometry = uniform_geometry(2, 3)
    if "merged" in change:
        geometry = merge_cells(geometry, torch.eye(6)[[0, 1, 2, 3, 4]])
    if "missing" in change:
        geometry = geometry.take(slice(0, 5))
    logits = torch.zeros(1, 1, geometry.tokens, geometry.tokens)
    if "hidden" in change:
        logits[0, 0, 0, 1] = float("-inf")
    with pytest.raises(ValueError, match=message):
        fitted(geometry, logits)
    with pytest.raises(ValueError, match="no attention was added"):
        StructuralFit(2).steps()


def test_equal_logits_have_no_share():
    table = fitted(uniform_geometry(3, 3), torch.ones(1, 1, 9, 9)).steps()
    assert table["r2"].isna().all() and table["adjusted"].isna().all()


@each_family
def test_a_bias_planted_in_a_model_is_found_as_a_difference(name):
    """The fit is linear in the logits, and the first layer's contents do not know its bias: with the bias the weights
    are larger by it, in tiles, squares, windows and images of their own size."""
    bundle = fresh(name)
    before = structural_spectrum(bundle, PAGES, batch_size=2)
    biases = inject(bundle, ("row", "column", "distance"))
    bias = planted(biases[0].heads, ("row", "column", "distance"))
    with torch.no_grad():
        for term in bias.terms:
            getattr(biases[0], term).copy_(getattr(bias, term))
    after = structural_spectrum(bundle, PAGES, batch_size=3)
    for term, weight in after.fits[0].weights().items():
        moved = weight - before.fits[0].weights()[term]
        assert torch.allclose(moved, getattr(bias, term).detach(), atol=2e-3)
    assert after.pages == 3 and set(after.table["layer"]) == set(range(len(biases)))
    assert after.fits[0].pairs == before.fits[0].pairs > 0
    with torch.no_grad():
        for own, start in zip(biases, after.biases(blocks=4)):
            assert torch.allclose(start.row.double(), after.fits[biases.index(own)].weights()["row"], atol=1e-5)
    eject(bundle)
    again = structural_spectrum(bundle, PAGES, [0])
    assert torch.allclose(again.fits[0].moments, before.fits[0].moments, atol=1e-3)


def test_an_encoder_alone_and_one_back_in_training():
    bundle = miniature_encoder("dinov2", 70)
    bundle.model.train()
    found = structural_spectrum(bundle, PAGES, batch_size=1)
    assert bundle.model.training and found.fits[0].pairs == 3 * 25**2
    with pytest.raises(ValueError, match="layers from 0 to 1"):
        structural_spectrum(bundle, PAGES, [2])


def test_windows_are_refused():
    bundle = fresh("internvl")
    inject(bundle, ("row", "window"), window=1)
    assert structures_of(bundle)[0].hard
    with pytest.raises(ValueError, match="some patches are hidden from others"):
        structural_spectrum(bundle, PAGES)
