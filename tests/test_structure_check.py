"""A learned bias is switched off and made stronger exactly, and the model is what it was."""
import copy

import numpy as np
import pandas as pd
import pytest
import torch

from sfa_core.core.paths import REPOSITORY
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.answers import answer
from sfa_core.models.load import load_model
from sfa_core.scores.records import make_records
from sfa_core.structure.bias import StructuralBias
from sfa_core.structure.inject import eject, inject, structures_of
from sfa_core.structure.terms import LADDER
from sfa_core.training.check import PRODUCTS, bias_size, check_of_records, scaled_structure, structure_check

ARMS = REPOSITORY / "exports" / "reference" / "arms"


@pytest.fixture(scope="module")
def asked():
    every = samples(documents(2, seed=51_000))
    return [sample for i, sample in enumerate(every) if i < 6 or i >= len(every) - 6]


@pytest.fixture
def bundle():
    return load_model("embedded")


def test_only_the_block_term_is_a_product():
    assert PRODUCTS == ("block",)


@pytest.mark.parametrize("term", [name for name, term in LADDER.items() if term.table])  # hard terms have no dose
def test_every_term_grows_with_its_dose(term):
    drawn = torch.Generator().manual_seed(0)
    bias = StructuralBias(heads=2, blocks=4, terms=(term,))
    weight = getattr(bias, term)
    weight.data = torch.randn(weight.shape, generator=drawn)
    table = lambda: torch.stack([LADDER[term].table(weight, axis, size, 1.0) for axis, size in sizes(term)])
    before = table()
    weight.data = weight.data * (7.0**0.5 if term in PRODUCTS else 7.0)
    assert torch.allclose(table(), 7 * before, atol=1e-5) and before.abs().sum() > 0


def sizes(term):
    weight = StructuralBias(heads=2, blocks=4, terms=(term,))
    known = {"block": 4, "role": weight.get_parameter(term).shape[0] if term == "roles" else 0, "order": 16}
    return [(axis, known.get(axis) or 8) for axis in LADDER[term].axes]


def test_dose_zero_is_the_encoder_without_structure(bundle, asked):
    plain = [reply.prediction for reply in answer(bundle, asked, max_new_tokens=8)]
    inject(bundle, seed=3)
    for bias in structures_of(bundle):
        bias.row.data.fill_(4.0)
    strong = [reply.prediction for reply in answer(bundle, asked, max_new_tokens=8)]
    kept = [p.clone() for p in bundle.model.parameters()]
    with scaled_structure(bundle, 0):
        off = [reply.prediction for reply in answer(bundle, asked, max_new_tokens=8)]
        assert bias_size(bundle, asked[:2]) == 0
    assert off == plain != strong
    assert all(torch.equal(p, old) for p, old in zip(bundle.model.parameters(), kept, strict=True))
    with pytest.raises(RuntimeError, match="broken"), scaled_structure(bundle, 5):
        raise RuntimeError("broken")
    assert all(torch.equal(p, old) for p, old in zip(bundle.model.parameters(), kept, strict=True))
    eject(bundle)


def test_a_copy_made_under_a_dose_is_a_model_of_its_own(bundle, asked):
    inject(bundle, seed=3)
    size = bias_size(bundle, asked[:1])
    with scaled_structure(bundle, 4):
        copied = copy.deepcopy(bundle)
    assert bias_size(bundle, asked[:1]) == size
    assert bias_size(copied, asked[:1]) == pytest.approx(4 * size, rel=1e-5)


@pytest.mark.parametrize("dose", [-1, float("nan"), float("inf")])
def test_a_dose_that_is_none_is_refused(bundle, dose):
    inject(bundle)
    with pytest.raises(ValueError, match="factor of at least 0"), scaled_structure(bundle, dose):
        pass
    eject(bundle)
    with pytest.raises(ValueError, match="no structural attention"), scaled_structure(bundle, 1):
        pass


def test_the_arm_that_ships_is_checked_and_taken_off(bundle, asked):
    before = {name: p.clone() for name, p in bundle.model.named_parameters()}
    found = structure_check(bundle, ARMS / "vision", asked, doses=(), max_new_tokens=8, batch_size=16)
    assert found.doses["dose"].tolist() == [0, 1] and 0.01 < found.size < 1
    assert repr(found).startswith(f"the learned bias is {found.size:.2g} logits (rms); switched off, ")
    assert "\n" not in repr(found) and {name: p for name, p in bundle.model.named_parameters()}.keys() == before.keys()
    assert all(torch.equal(p, before[name]) for name, p in bundle.model.named_parameters())
    with pytest.raises(ValueError, match="dose 3 was not measured"):
        found.at(3)


def test_an_arm_without_structure_or_a_single_document_is_refused(bundle, asked):
    with pytest.raises(ValueError, match="holds the arm control, expected one with structural attention"):
        structure_check(bundle, ARMS / "control", asked)
    with pytest.raises(ValueError, match="about one document"):
        structure_check(bundle, ARMS / "vision", [sample for sample in asked if sample.document == asked[0].document])


def test_shares_and_changes_are_those_of_the_records(asked):
    from types import SimpleNamespace
    said = lambda texts: make_records(asked, [SimpleNamespace(prediction=text or "", truncated=False, seconds=0.1,
                                                              error="broken" if text is None else None)
                                              for text in texts])
    gold = [sample.answers[0] for sample in asked]
    learned, off = said(gold), said(["?", *gold[1:-1], None])
    found = check_of_records({0.0: off, 1.0: learned}, 0.04)
    assert found.n == len(asked) - 1, "a question with an error counts nowhere"
    assert found.at(0)["changed"] == pytest.approx(1 / found.n) == -found.at(0)["change"]
    assert found.at(0)["changed_low"] >= 0 and found.at(0)["low"] <= found.at(0)["change"] <= found.at(0)["high"]
    assert isinstance(found.table(), pd.DataFrame) and np.isfinite(list(found.to_dict()["doses"][0].values())).all()
