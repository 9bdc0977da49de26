"""The parameter counts of structural attention on InternVL3.5-8B, on the meta device: no weights, no download."""
import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration
from tiny_internvl import bundle_of

from sfa_core.structure.inject import inject
from sfa_core.core.families import family_of
from sfa_core.structure.bias import StructuralBias


def count(module, trainable=False):
    return sum(weight.numel() for weight in module.parameters() if weight.requires_grad or not trainable)


@pytest.fixture(scope="module")
def model():
    language = {"model_type": "qwen3", "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 12_288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False}
    config = InternVLConfig(vision_config={"attention_bias": True}, text_config=language, tie_word_embeddings=False)
    with torch.device("meta"):
        return InternVLForConditionalGeneration(config)


def test_one_layer_has_304_structural_weights():
    assert count(StructuralBias(heads=16, blocks=16)) == 304 == 3 * 16 + 16 * 16


@pytest.mark.parametrize("terms, expected", [
    (["row"], 16), (["column"], 16), (["row", "column"], 32), (["distance"], 16), (["row", "column", "distance"], 48),
    (["block"], 256),
])
def test_absent_terms_have_no_parameters(terms, expected):
    assert count(StructuralBias(heads=16, blocks=16, terms=terms)) == expected


def test_counts_of_internvl_with_structure(model):
    family = family_of(model)
    assert len(family.grid(model)) == 1025 and len(family.language_grid(model)) == 256
    tower, projector = family.tower_of(model), family.projector_of(model)
    assert count(tower) == 304_012_288 == 24 * 12_598_272 + 1_653_760
    assert count(projector) == 33_570_816
    assert count(family.language_of(model)) + count(model.lm_head) == 8_190_735_360
    biases = inject(bundle_of(model))
    assert sum(count(bias) for bias in biases) == 7_296 and all(
        weight.is_meta for bias in biases for weight in bias.parameters()
    )
    model.requires_grad_(False)
    for part in (tower, projector):
        part.requires_grad_(True)
    assert count(model, trainable=True) == 337_590_400
    assert count(model) == model.num_parameters() == 8_528_325_760
    assert round(100 * count(model, trainable=True) / count(model), 1) == 4.0
