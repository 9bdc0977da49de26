"""A pretrained encoder learns the dense task in four arms that differ in what learns, exactly resumable, and the bundle
it came from stays as it was."""
import dataclasses

import pandas as pd
import pytest
import torch

import sfa_core.pretraining.tuning as tuning
from sfa_core.documents.generate import documents
from sfa_core.models.miniatures import miniature, miniature_encoder
from sfa_core.pretraining.check import encoder_check
from sfa_core.pretraining.dense import DenseHeads
from sfa_core.pretraining.dynamics import FreshPages
from sfa_core.pretraining.recipe import decode_documents
from sfa_core.pretraining.tuning import TUNE_ARMS, TuneConfig, tune_dense
from sfa_core.structure.inject import inject, structures_of


@pytest.fixture(scope="module")
def pages():
    return decode_documents(documents(5, 11, size=112), (8, 8))


def tuned(pages, folder, arm="vision", bundle=None, data=None, **options):
    config = TuneConfig(arm, **dict(steps=3, batch_size=2, every=2) | options)
    return tune_dense(bundle or miniature_encoder("dinov2", 112), data or pages, pages, config, folder)


def state(found):
    return found.bundle.model.state_dict() | found.heads.state_dict()


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], value) for name, value in second.items())


@pytest.mark.parametrize("arm", TUNE_ARMS)
def test_an_arm_changes_what_it_says_and_nothing_else(arm, pages, tmp_path):
    bundle = miniature_encoder("dinov2", 112)
    before, key = {name: value.clone() for name, value in bundle.model.state_dict().items()}, bundle.identity
    found = tuned(pages, tmp_path, arm, bundle)
    assert bundle.identity == key and same(bundle.model.state_dict(), before)
    own = {name: value for name, value in found.bundle.model.state_dict().items() if ".structure." not in name}
    moved = [name for name, value in own.items() if not torch.equal(value, before[name])]
    assert bool(moved) == TUNE_ARMS[arm].encoder and (not moved or len(moved) == len(before))
    assert bool(len(found.weights)) == TUNE_ARMS[arm].structure == (len(own) < len(found.bundle.model.state_dict()))
    assert sorted(set(found.curve["step"])) == [2, 3] and found.curve["rate"].between(0, 1).all()
    assert not (tmp_path / "checkpoints").exists()


def test_arms_begin_alike(pages, tmp_path):
    "With rates of almost nothing, all arms read the same off the same encoder but for the bias, which starts small."
    tiny = dict(steps=1, every=1, encoder_rate=1e-12, heads_rate=1e-12, structure_rate=1e-12)
    found = {arm: tuned(pages, tmp_path / arm, arm, seed=4, **tiny) for arm in TUNE_ARMS}
    assert torch.allclose(found["frozen"].heads.read.weight, found["vision"].heads.read.weight, atol=1e-9)
    assert found["frozen"].curve.equals(found["control"].curve) and found["sfa"].curve.equals(found["vision"].curve)
    assert found["sfa"].weights["weight"].abs().max() < 0.1


def test_a_training_that_was_cut_off_goes_on_exactly(pages, tmp_path, monkeypatch):
    whole = tuned(pages, tmp_path / "whole", steps=5)
    stopped, train = [], tuning.train

    def cut(*arguments, until, **options):
        if until == 4 and not stopped:
            train(*arguments, until=3, **options)
            stopped.append(until)
            raise KeyboardInterrupt
        return train(*arguments, until=until, **options)

    monkeypatch.setattr(tuning, "train", cut)
    with pytest.raises(KeyboardInterrupt):
        tuned(pages, tmp_path / "cut", steps=5)
    again = tuned(pages, tmp_path / "cut", steps=5)
    assert stopped and again.curve.equals(whole.curve) and same(state(again), state(whole))
    monkeypatch.setattr(tuning, "train", lambda *a, **b: pytest.fail("a finished training is read"))
    read = tuned(pages, tmp_path / "cut", steps=5)
    assert read.curve.equals(whole.curve) and same(state(read), state(whole))


@pytest.mark.parametrize("options", [dict(seed=1), dict(arm="control"), dict(terms=("row",)), dict(heads_rate=1e-3)])
def test_a_folder_of_another_training_is_refused(options, pages, tmp_path):
    tuned(pages, tmp_path, steps=1)
    before = (tmp_path / "tuned.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is of another training: .* differs; expected a new or empty folder"):
        tuned(pages, tmp_path, **dict(steps=1) | options)
    assert (tmp_path / "tuned.safetensors").read_bytes() == before


def test_fresh_pages_and_the_tower_of_a_whole_model_are_taken(pages, tmp_path):
    found = tuned(pages, tmp_path / "fresh", data=FreshPages("embedded", size=112), steps=2)
    assert len(found.curve) == 6
    whole = miniature("internvl", tile=112)
    ours = tuned(pages, tmp_path / "tower", "sfa", whole, steps=2)
    language = {name: value for name, value in whole.model.state_dict().items() if "language_model" in name}
    assert all(torch.equal(ours.bundle.model.state_dict()[name], value) for name, value in language.items())


@pytest.mark.parametrize("act, words", [
    (lambda pages, folder: TuneConfig("sfa_blocks"), "unknown arm 'sfa_blocks'; expected one of frozen, sfa, control"),
    (lambda pages, folder: TuneConfig(steps=0), "steps is 0; at least 1 is expected"),
    (lambda pages, folder: TuneConfig(terms=("diagonal",)), "'diagonal', expected one or more of"),
    (lambda pages, folder: tuned(pages, folder, bundle=miniature_encoder("dinov2", 56)),
     "pages of 112 x 112 px with targets on 8 x 8 patches; .* sees 56 x 56 px as 4 x 4 patches"),
])
def test_wrong_input_is_one_clear_line(act, words, pages, tmp_path):
    with pytest.raises(ValueError, match=words) as caught:
        act(pages, tmp_path)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_an_encoder_with_structure_is_refused_as_a_control(pages, tmp_path):
    bundle = miniature_encoder("vit", 112)
    inject(bundle)
    for arm in TUNE_ARMS:
        with pytest.raises(ValueError, match="has structural attention already: call eject first"):
            tuned(pages, tmp_path, arm, bundle)


def test_the_learned_bias_can_be_checked_in_the_trained_encoder(pages, tmp_path):
    found = tuned(pages, tmp_path, "sfa")
    with torch.no_grad():
        for bias in structures_of(found.bundle):
            bias.row.fill_(5.0)
    check = encoder_check(found.bundle, found.heads, pages)
    assert check.size > 1 and check.at(0)["changed"] > 0 and check.at(1)["changed"] == 0 and check.documents == 5


def test_the_result_is_frozen_and_small(pages, tmp_path):
    found = tuned(pages, tmp_path, "frozen", steps=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.curve = pd.DataFrame()
    assert isinstance(found.heads, DenseHeads)
