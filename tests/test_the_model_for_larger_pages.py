"""`embedded_page` loads with its own bias, reads fresh pages, and refuses what belongs to the smaller model"""
import pytest

import sfa_core as sfa
from sfa_core.core.paths import REPOSITORY
from sfa_core.documents.questions import READ_KINDS
from sfa_core.models.load import EMBEDDED, load_model
from sfa_core.models.miniatures import miniature
from sfa_core.models.pages import pages_for, preset_for
from sfa_core.pretraining.dense import dense_binding
from sfa_core.pretraining.dynamics import fresh_encoder
from sfa_core.pretraining.page_model import page_bundle
from sfa_core.pretraining.recipe import dense_batches, load_heads
from sfa_core.core.hub import SHIPPED_MODELS
from sfa_core.structure.inject import is_own, structures_of
from sfa_core.structure.terms import TERMS

REFERENCE = REPOSITORY / "exports" / "reference"


@pytest.fixture(scope="module")
def bundle():
    return load_model("embedded_page", placement="cpu")


def test_it_comes_with_the_bias_it_was_trained_with(bundle):
    assert is_own(bundle) and structures_of(bundle)[0].terms == TERMS
    assert (bundle.grid.height, bundle.grid.width) == (16, 16) and preset_for(bundle) == "page"
    assert all(bias.row.abs().max() > 0.5 for bias in structures_of(bundle)), "what was learned, not where it began"


def test_it_reads_pages_that_it_never_saw(bundle):
    asked = [sample for sample in sfa.samples(pages_for(bundle, 60, seed=75_000)) if sample.kind in READ_KINDS]
    found = sfa.evaluate(bundle, asked, batch_size=64, max_new_tokens=8)
    assert len(asked) > 150 and found.records["strict"].mean() > 0.7


def test_its_linear_heads_read_what_its_encoder_has_bound(bundle):
    heads = load_heads(SHIPPED_MODELS["embedded_page"])
    rates = dense_binding(bundle.family.tower_of(bundle.model), heads, dense_batches(bundle, pages_for(bundle, 12, 7)))
    assert rates["value_binding"]["rate"] > 0.8 and rates["label_colour"]["rate"] > 0.9


def refused(act, *words):
    with pytest.raises(ValueError) as error:
        act()
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in words), error.value


def test_what_belongs_to_the_smaller_model_is_refused_in_one_line(bundle, tmp_path):
    refused(lambda: sfa.load_arm(bundle, REFERENCE / "arms" / "control"), "trained on embedded", "embedded_page has")
    refused(lambda: sfa.load_arm(load_model("embedded", placement="cpu"), REFERENCE / "arms_page" / "control"),
            "was trained on embedded_page", "embedded has")
    refused(lambda: page_bundle(EMBEDDED / "model.safetensors", bundle.tokenizer), "about")
    refused(lambda: sfa.inject(bundle), "of its own")


def test_dense_heads_of_the_smaller_model_do_not_fit(bundle):
    heads = load_heads(EMBEDDED)
    assert set(load_heads(SHIPPED_MODELS["embedded_page"]).classes) - set(heads.classes) == {"hundreds"}


def test_its_encoder_goes_back_to_random_weights_with_its_bias(bundle):
    first, again, other = (fresh_encoder(bundle, seed) for seed in (0, 0, 1))
    weights = [dict(one.model.named_parameters()) for one in (bundle, first, again, other)]
    changed = {name for name, weight in weights[0].items() if not weight.equal(weights[1][name])}
    assert all(weights[1][name].equal(weights[2][name]) for name in weights[1])
    assert any(not weights[1][name].equal(weights[3][name]) for name in changed)
    assert not any("language_model" in name for name in changed) and any("projector" in name for name in changed)
    own = {name for name in weights[0] if ".structure." in name}
    assert own and own <= changed and all(weights[1][name].abs().max() < 0.2 for name in own), "no bias to begin with"
    assert sfa.answer(first, sfa.samples(pages_for(bundle, 1, seed=3))[:2]), "and it answers, though not right"


def test_an_encoder_of_another_architecture_is_refused_in_one_line(bundle):
    other = miniature("internvl")
    refused(lambda: fresh_encoder(other, 0), "is not of the embedded architecture", other.name)
    refused(lambda: fresh_encoder(miniature("llava"), 0), "is not of the embedded architecture")
