"""A model that was trained with structure keeps it: saved, loaded, trained and given back with its own bias"""
import pytest
import torch

import sfa_core as sfa
from sfa_core.core.hub import STRUCTURE
from sfa_core.models.embedded import EmbeddedConfig
from sfa_core.models.load import load_model, new_bundle, save_model
from sfa_core.structure.inject import is_own, keep_structure, structures_of
from sfa_core.structure.own import own_structure
from sfa_core.structure.store import CARD_FILE, WEIGHTS_FILE
from sfa_core.tokens.adaptive import attach_tokens, detach_tokens
from sfa_core.tokens.density import load_density
from sfa_core.tokens.patches import PatchConfig

SMALL = EmbeddedConfig(vision_width=32, vision_layers=2, language_width=32, language_layers=1, language_hidden=64)
PAGES = sfa.generate(4, seed=5)


@pytest.fixture
def bundle():
    "A model with random structural weights of its own."
    made = new_bundle(SMALL, load_model("embedded").tokenizer, seed=1)
    sfa.inject(made, ("row", "column"), seed=2)
    with torch.no_grad():
        for bias in structures_of(made):
            for weight in bias.parameters():
                weight.normal_(generator=torch.Generator().manual_seed(3))
    return keep_structure(made)


def states(bundle):
    "The encoder's states of one random page."
    tower = bundle.family.tower_of(bundle.model)
    pixels = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        return tower(pixel_values=pixels).last_hidden_state


def weights(bundle):
    "All parameters by name."
    return {name: p.detach().clone() for name, p in bundle.model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_it_is_saved_beside_the_plain_model_and_comes_back_with_it(bundle, tmp_path):
    folder = save_model(bundle, tmp_path / "model")
    assert {path.name for path in (folder / STRUCTURE).iterdir()} == {CARD_FILE, WEIGHTS_FILE}
    again = load_model(folder, placement="cpu")
    assert is_own(again) and same(weights(again), weights(bundle)) and states(again).equal(states(bundle))
    once = load_model(save_model(again, tmp_path / "once"), placement="cpu")
    assert load_model(save_model(once, tmp_path / "twice"), placement="cpu").revision == once.revision
    with torch.no_grad():
        structures_of(once)[1].row[0] += 1
    assert load_model(save_model(once, tmp_path / "changed"), placement="cpu").revision != once.revision


def test_a_model_without_one_is_saved_without_one(tmp_path):
    plain = load_model("embedded", placement="cpu")
    folder = save_model(plain, tmp_path / "plain")
    assert not (folder / STRUCTURE).exists() and not is_own(load_model(folder, placement="cpu"))


def test_it_decides_what_the_model_sees(bundle):
    before = states(bundle)
    with torch.no_grad():
        for bias in structures_of(bundle):
            for weight in bias.parameters():
                weight.zero_()
    assert (states(bundle) - before).abs().max() > 1e-3


def test_terms_are_added_by_name_and_taken_off_again(bundle):
    before, kept = states(bundle), weights(bundle)
    sfa.inject(bundle, ("offset",))
    assert structures_of(bundle)[0].terms == ("row", "column", "offset") and not is_own(bundle)
    assert torch.allclose(states(bundle), before, atol=1e-6)  # a new term begins at zero
    with torch.no_grad():
        structures_of(bundle)[0].offset.normal_()
    assert not torch.allclose(states(bundle), before, atol=1e-3)
    sfa.eject(bundle)
    assert is_own(bundle) and same(weights(bundle), kept) and states(bundle).equal(before)


@pytest.mark.parametrize("terms", [("row",), ("offset", "column"), ("row", "column", "distance", "block")])
def test_a_term_that_it_has_is_refused_in_one_line(terms, bundle):
    with pytest.raises(ValueError, match="has the structural terms row, column of its own") as error:
        sfa.inject(bundle, terms)
    assert "\n" not in str(error.value) and is_own(bundle)


def test_what_is_its_own_is_not_ejected(bundle):
    with pytest.raises(ValueError, match="is its own: nothing was attached"):
        sfa.eject(bundle)
    assert is_own(bundle)


def config(arm, terms=("row", "column")):
    return sfa.FinetuneConfig(arm, 2, 2, questions=1, learning_rate=1e-2, structure_rate=1e-1, terms=terms,
                              checkpoint_every=0)


@pytest.mark.parametrize("arm, moves", [("control", False), ("vision", True), ("sfa", True), ("projector", False)])
def test_arms_leave_it_alone_or_train_it_and_give_it_back(arm, moves, bundle, tmp_path):
    kept = weights(bundle)
    folder = sfa.finetune(bundle, PAGES, config(arm), tmp_path / arm).arm
    assert is_own(bundle) and same(weights(bundle), kept)
    with sfa.load_arm(bundle, folder):
        on = weights(bundle)
        own = own_structure(bundle)
        assert any(not on[name].equal(kept[name]) for name in own) == moves
        assert any(not on[name].equal(kept[name]) for name in on if name not in own) == (arm != "sfa")
    assert is_own(bundle) and same(weights(bundle), kept)


def test_an_arm_may_add_terms_to_it(bundle, tmp_path):
    kept = weights(bundle)
    folder = sfa.finetune(bundle, PAGES, config("vision", ("row", "column", "offset")), tmp_path / "arm").arm
    assert is_own(bundle) and same(weights(bundle), kept)
    with sfa.load_arm(bundle, folder):
        assert structures_of(bundle)[0].terms == ("row", "column", "offset")
    assert is_own(bundle) and same(weights(bundle), kept)


def test_adaptive_tokens_come_and_go(bundle):
    before = states(bundle)
    attach_tokens(bundle, PatchConfig(budget=34), estimator=load_density()[0])
    detach_tokens(bundle)
    assert states(bundle).equal(before)


def test_what_was_attached_to_it_is_not_saved_as_its_own(bundle, tmp_path):
    sfa.inject(bundle, ("offset",))
    with pytest.raises(ValueError, match="has structural attention attached"):
        save_model(bundle, tmp_path / "model")
