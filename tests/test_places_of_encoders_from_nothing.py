"""Encoders from nothing that know their places in other ways: what is kept can be read, what is fixed does not learn,
and the published terms compute what they did before there were others."""
import dataclasses

import pytest
import torch
from safetensors import safe_open
from test_dynamics import TINY

import sfa_core.pretraining.dynamics as dynamics
import sfa_core.pretraining.measured as measured
from sfa_core.core.identity import file_digest
from sfa_core.documents.generate import documents
from sfa_core.models.embedded import train_tokenizer
from sfa_core.models.load import new_bundle
from sfa_core.pretraining.dense import patch_features
from sfa_core.pretraining.dynamics import DenseConfig, FreshPages, draw_page, learn_dense, measure_dense
from sfa_core.pretraining.dynamics import place_patches, read_dense_encoder
from sfa_core.pretraining.recipe import decode_documents, pixel_values
from sfa_core.structure.inject import structures_of
from sfa_core.structure.rivals import learned_positions
from sfa_core.structure.terms import TERMS

ARMS = {"control": {}, "sfa": dict(terms=TERMS), "offset": dict(terms=(*TERMS, "offset")),
        "shuffled": dict(terms=TERMS, shuffled=True), "rope": dict(positions="rope"),
        "additive": dict(positions="additive")}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is the value of oak? 12"])


@pytest.fixture(scope="module")
def held_out():
    return decode_documents(documents(4, 3, preset="page"), (16, 16))


def placed(tokenizer, **arm):
    bundle = new_bundle(TINY, tokenizer, 1)
    place_patches(bundle, DenseConfig(seed=1, **arm))
    return bundle


@pytest.mark.parametrize("arm", ARMS)
def test_what_is_kept_measures_as_it_did(arm, tokenizer, held_out, tmp_path):
    config = DenseConfig(**ARMS[arm], steps=3, batch_size=3, every=3, seed=1)
    curve, _ = learn_dense(FreshPages(), held_out, tokenizer, config, tmp_path, TINY)
    bundle, heads, about = read_dense_encoder(tmp_path / "encoder.safetensors", tokenizer)
    assert DenseConfig(**about["dense"]) == config
    for measure, found in measure_dense(bundle, heads, held_out).items():
        assert curve.set_index("measure").loc[measure, ["rate", "n"]].tolist() == [found["rate"], found["n"]]
    with safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}
    first = dict(placed(tokenizer, **ARMS[arm]).model.model.vision_tower.named_parameters())
    assert {name for name in kept if name.startswith("tower.")} == {f"tower.{name}" for name in first}
    still = {name for name, weight in first.items() if torch.equal(weight, kept[f"tower.{name}"])}
    assert still == ({"embeddings.position_embeddings"} if arm == "rope" else set())


def test_arms_differ_in_their_places_only(tokenizer, held_out):
    "Weights that two arms share start equal, and each way of placing patches is another function."
    pixels = pixel_values(placed(tokenizer), held_out.pixels[:2])
    shared = {name: weight for name, weight in placed(tokenizer).model.named_parameters()
              if "position_embedding" not in name}
    outputs = {}
    with torch.no_grad():
        for arm, given in ARMS.items():
            bundle = placed(tokenizer, **given)
            weights = dict(bundle.model.named_parameters())
            assert all(torch.equal(weights[name], weight) for name, weight in shared.items())
            outputs[arm] = patch_features(bundle.family.tower_of(bundle.model), pixels, (16, 16))
    assert torch.equal(outputs.pop("offset"), outputs["sfa"]), "an offset starts at zero"
    names = list(outputs)
    assert not [(a, b) for i, a in enumerate(names) for b in names[:i] if torch.allclose(outputs[a], outputs[b])]


def test_shuffled_places_are_one_permutation_for_all_layers_with_equal_parameters(tokenizer):
    plain, shuffled = placed(tokenizer, terms=TERMS), placed(tokenizer, terms=TERMS, shuffled=True)
    count = [sum(p.numel() for p in bundle.model.parameters()) for bundle in (plain, shuffled)]
    there, other = structures_of(plain)[0].geometry, structures_of(shuffled)[0].geometry
    assert count[0] == count[1] and all(b.geometry is other for b in structures_of(shuffled))
    flat = [(g.row[1:].argmax(-1) * 16 + g.column[1:].argmax(-1)) for g in (there, other)]
    assert flat[0].tolist() == list(range(256)) == sorted(flat[1].tolist()) and flat[1].tolist() != list(range(256))
    again = structures_of(placed(tokenizer, terms=TERMS, shuffled=True))[0].geometry
    assert torch.equal(again.row, other.row) and torch.equal(again.column, other.column)


def test_rotary_positions_have_no_learned_table(tokenizer):
    table = learned_positions(placed(tokenizer, positions="rope"))
    assert not table.any() and not table.requires_grad


@pytest.mark.parametrize("given, message", [
    (dict(positions="sinus"), "positions is 'sinus'; one of learned, rope, additive is expected"),
    (dict(shuffled=True), "shuffled places without structural terms"),
])
def test_arms_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        DenseConfig(**given)


# --- further trainings and tables of some sizes -----------------------------------------------------------------------

FIRST = DenseConfig(("row", "offset"), steps=2, batch_size=2, every=2, seed=1)
FURTHER = dataclasses.replace(FIRST, steps=3, every=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def start(tmp_path_factory, tokenizer, held_out):
    folder = tmp_path_factory.mktemp("start")
    learn_dense(FreshPages(), held_out, tokenizer, FIRST, folder, TINY)
    return folder / "encoder.safetensors"


def test_a_further_training_begins_where_the_first_ended_and_resumes_exactly(start, tokenizer, held_out, tmp_path,
                                                                             monkeypatch):
    def further(folder):
        return learn_dense(FreshPages(seed=1), held_out, tokenizer, FURTHER, folder, TINY, start=start)

    curve, weights = further(tmp_path / "whole")
    drawn, firsts = dynamics.draw_batch, []
    first = dict(read_dense_encoder(start, tokenizer)[0].model.model.vision_tower.named_parameters())

    def noted(data, seed, step, count, **options):
        if step == 1:
            raise KeyboardInterrupt
        firsts.append(step)
        return drawn(data, seed, step, count, **options)

    begin = measured.train

    def watched(named, *given, **options):
        if not firsts:
            assert all(torch.equal(weight, named[f"tower.{name}"]) for name, weight in first.items())
        return begin(named, *given, **options)

    monkeypatch.setattr(dynamics, "draw_batch", noted)
    monkeypatch.setattr(measured, "train", watched)
    with pytest.raises(KeyboardInterrupt):
        further(tmp_path / "cut")
    assert firsts == [0]
    monkeypatch.setattr(dynamics, "draw_batch", drawn)
    again, same = further(tmp_path / "cut")
    assert again.equals(curve) and same.equals(weights)
    files = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1] != start.read_bytes()
    assert read_dense_encoder(tmp_path / "cut" / "encoder.safetensors", tokenizer)[2]["start"] == file_digest(start)


@pytest.mark.parametrize("pages, changes, message", [
    (FreshPages(), {}, "has seen the first 2 batches of these pages, expected FreshPages of another seed than 0"),
    (FreshPages(seed=1), dict(terms=("row",)), r"was trained with terms \('row', 'offset'\), expected \('row',\)"),
    (FreshPages(seed=1), dict(positions="rope"), "was trained with positions learned, expected rope"),
    (FreshPages("embedded", size=224, seed=1), {}, "was trained with heads"),
])
def test_a_start_that_does_not_fit_is_refused_in_one_line(start, tokenizer, held_out, tmp_path, pages, changes,
                                                          message):
    with pytest.raises(ValueError, match=message):
        learn_dense(pages, held_out, tokenizer, dataclasses.replace(FURTHER, **changes), tmp_path / "new", TINY,
                    start=start)
    assert not (tmp_path / "new").exists()


def test_tables_of_some_rows_are_the_same_tables_where_the_first_draw_fits():
    plain, few = FreshPages(kinds=("table",)), FreshPages(kinds=("table",), rows=(2, 5))
    drawn = [[draw_page(data, 0, 0, i) for i in range(12)] for data in (plain, few)]
    rows = [[len(page.content.rows) for page in pages] for pages in drawn]
    assert max(rows[0]) > 5 and set(rows[1]) <= {2, 3, 4, 5}
    for i, count in enumerate(rows[0]):
        assert (drawn[0][i].id == drawn[1][i].id) == (2 <= count <= 5)
    assert len({page.id for page in drawn[1]}) == 12
    with pytest.raises(ValueError, match="none of 1000 tables of preset page has 40 to 41 rows"):
        dynamics.draw_page(FreshPages(kinds=("table",), rows=(40, 41), size=224), 0, 0, 0)


@pytest.mark.parametrize("given", [dict(rows=(2, 5)), dict(kinds=("table",), rows=(5, 2)),
                                   dict(kinds=("table",), rows=(2,))])
def test_rows_are_for_tables_alone(given):
    with pytest.raises(ValueError, match="expected the fewest and the most rows of tables alone"):
        FreshPages(**given)
