"""Reducers at one budget spend what they promise, counted where tokens are processed, and an encoder alone has the
first class only."""

import numpy as np
import pytest
from PIL import Image

from sfa_core.documents.generate import make_document
from sfa_core.interventions.reduction_cost import other_reducers, reducers_at, reduction_costs, tree_budget
from sfa_core.models.embedded import EmbeddedConfig, train_tokenizer
from sfa_core.models.load import new_bundle
from sfa_core.models.miniatures import miniature_encoder
from sfa_core.tokens.density import load_density
from sfa_core.tokens.patches import PatchConfig

SHAPE = EmbeddedConfig(image_size=224, vision_width=32, vision_layers=4, vision_heads=2, vision_hidden=32,
                       language_width=32, language_layers=4, language_heads=2, language_kv_heads=1, head_dim=16,
                       language_hidden=32, downsample_ratio=0.5)


@pytest.fixture(scope="module")
def costs():
    bundle = new_bundle(SHAPE, train_tokenizer(["What is the value of oak?"], 300))
    before, estimator = bundle.identity, load_density()[0]
    reducers = [*other_reducers(), *reducers_at(bundle, 8, estimator), *reducers_at(bundle, 14, estimator)]
    pages = [Image.fromarray(make_document(kind, 3, preset="page", size=224).pixels) for kind in ("bar", "table")]
    found = reduction_costs(bundle, reducers, pages, "What is the value of oak?", rounds=1)
    assert bundle.identity == before, "all reducers are gone"
    return found.assign(cells=[0, 0] + 8 * [8] + 8 * [14]).set_index(["method", "cells"])


def test_budgets_are_spent_where_they_are_promised(costs):
    assert costs.loc[("full", 0), ["encoder_tokens", "language_tokens"]].tolist() == [256, 64]
    for cells, tree in ((8, 64), (14, 196)):
        tokens = (cells // 2) ** 2
        for name in ("down-sampling", "random blocks"):
            assert costs.loc[(name, cells), ["encoder_tokens", "language_tokens"]].tolist() == [cells**2, tokens]
        for name in ("guard", "density + guard"):
            assert costs.loc[(name, cells), "encoder_tokens"] == tree
        for name in ("VisionZip", "DivPrune"):
            assert costs.loc[(name, cells), ["encoder_tokens", "language_tokens"]].tolist() == [256, tokens]
        merged = np.mean([256 - (256 - cells**2) / 4 * layer for layer in range(4)])
        assert costs.loc[("ToMe", cells), ["encoder_tokens", "language_tokens"]].tolist() == [merged, 64]
        assert costs.loc[("FastV", cells), "language_tokens"] == (64 + 3 * tokens) / 4


def test_fewer_tokens_are_fewer_operations(costs):
    full, small = costs.loc[("full", 0)], costs.xs(8, level="cells")
    for name in ("down-sampling", "random blocks", "ToMe"):
        assert small.loc[name, "encoder_gflop"] < full["encoder_gflop"], name
    for name in ("down-sampling", "random blocks", "VisionZip", "DivPrune", "FastV"):
        assert small.loc[name, "prefill_gflop"] < full["prefill_gflop"], name
    assert (costs[["encoder_ms", "prefill_ms", "encoder_processor_ms"]] > 0).all().all()
    assert costs.loc[("full", 0), "clock_ratio"] == 1


def test_an_encoder_alone_has_reducers_of_the_encoder():
    tower = miniature_encoder("dinov2", 168)
    assert {own.group for own in reducers_at(tower, 6, load_density()[0])} == {"encoder"}


def test_budgets_that_cannot_be_met_are_the_next_below_or_refused():
    assert tree_budget(144, PatchConfig(coarse=None), (16, 16)).budget == 142
    with pytest.raises(ValueError, match="at least 16"):
        tree_budget(15, PatchConfig(coarse=None), (16, 16))
    bundle = new_bundle(SHAPE, train_tokenizer(["What is the value of oak?"], 300))
    with pytest.raises(ValueError, match="multiple of 2 up to 16"):
        reducers_at(bundle, 7, None)
    with pytest.raises(ValueError, match="0 pages"):
        reduction_costs(bundle, other_reducers(), [], "What?")
