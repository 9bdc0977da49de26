"""The table of a model's parts adds up to the model, and the maps of its structural bias are rows of the bias."""

import numpy as np
import pytest
import torch

from sfa_core.structure.inject import inject, set_blocks
from sfa_core.documents.generate import make_document
from sfa_core.models.embedded import EmbeddedConfig, train_tokenizer
from sfa_core.models.load import new_bundle
from sfa_core.models.parts import model_parts, structural_maps


@pytest.fixture
def bundle():
    rows = [make_document("bar", seed).row() for seed in range(2)]
    config = EmbeddedConfig(vision_layers=3, vision_width=64, vision_hidden=64, language_layers=1)
    return new_bundle(config, train_tokenizer(part["question"] for row in rows for part in row["questions"]), seed=1)


def test_parts_add_up_and_name_what_is_trained(bundle):
    plain, names = model_parts(bundle), [name for name, _ in bundle.model.named_parameters()]
    inject(bundle, terms=("row", "block"), blocks=8)
    table = model_parts(bundle, [name for name, _ in bundle.model.named_parameters() if "structure" in name])
    assert plain["parameters"].sum() == bundle.model.num_parameters() - 3 * (4 + 8 * 4) and not plain["trained"].any()
    assert table["parameters"].sum() == bundle.model.num_parameters()
    assert list(table["part"]) == ["encoder", "structural bias", "projector", "language model"] and list(
        table["within"]
    ) == ["", "encoder", "", ""]
    assert list(table["trained"]) == [False, True, False, False] and table["parameters"][1] == 3 * (4 + 8 * 4)
    assert "row, block in 3 layers" in table["detail"][1]
    assert model_parts(bundle, names[-1:])["trained"].sum() == 1
    with pytest.raises(ValueError, match="no parameter is named 'head.weight', expected names of the"):
        model_parts(bundle, ["head.weight"])


@pytest.mark.parametrize("terms", [("row", "column", "distance", "block"), ("column",)])
def test_maps_of_the_bias_are_its_rows(bundle, terms):
    biases = inject(bundle, terms=terms)
    ids = torch.randint(16, (2, 64), generator=torch.Generator().manual_seed(0))
    set_blocks(bundle, ids)
    dense = biases[1].dense(biases[1].geometry).detach().numpy()  # (2, H, N, N)
    for image in range(2):
        maps = structural_maps(bundle, 1, query=20, head=2, image=image)
        assert list(maps) == [*terms, "combined"]
        assert np.allclose(maps["combined"].ravel(), dense[image, 2, 20, 1:], atol=1e-6)
        assert np.allclose(sum(maps[term] for term in terms), maps["combined"], atol=1e-6)
        mean = structural_maps(bundle, 1, query=20, image=image)["combined"]
        assert np.allclose(mean.ravel(), dense[image, :, 20, 1:].mean(0), atol=1e-6)


def test_bias_maps_of_what_does_not_exist_are_refused(bundle):
    with pytest.raises(ValueError, match="the model has no structural attention"):
        structural_maps(bundle, 0, 1)
    inject(bundle)
    with pytest.raises(ValueError, match="no structural bias of layer 3, query 1, head None: expected a layer below 3, "
                                         "a token below 65 and a head below 4"):
        structural_maps(bundle, 3, 1)
