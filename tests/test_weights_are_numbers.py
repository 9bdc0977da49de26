"""Weights beside those of a model are finite floating-point numbers too: density estimators, dense heads, encoders."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sfa_core.core.finite import check_finite
from sfa_core.models.load import EMBEDDED, load_model
from sfa_core.pretraining.dynamics import read_dense_encoder, save_encoder
from sfa_core.pretraining.recipe import load_heads
from sfa_core.tokens.density import SHIPPED, load_density

CHANGES = {
    "nan": lambda weight: torch.full_like(weight, float("nan")),
    "inf": lambda weight: torch.full_like(weight, float("inf")),
    "whole numbers": lambda weight: weight.long(),
}


def spoil(path, change):
    "Change the last weight of a file, keep its notes, and return its name."
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    weights = load_file(path)
    name = sorted(weights)[-1]
    save_file(weights | {name: CHANGES[change](weights[name])}, path, notes)
    return name


@pytest.mark.parametrize("change", CHANGES)
def test_a_density_estimator_is_numbers(tmp_path, change):
    folder = shutil.copytree(SHIPPED, tmp_path / "density")
    load_density(folder)
    weights, card = next(folder.glob("*.safetensors")), next(folder.glob("*.json"))
    name = spoil(weights, change)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    card.write_text(json.dumps(json.loads(card.read_text()) | {"sha256": digest}))
    with pytest.raises(ValueError, match=f"{weights.name}: {name} holds"):
        load_density(folder)


@pytest.mark.parametrize("change", CHANGES)
def test_dense_heads_are_numbers(tmp_path, change):
    shutil.copytree(EMBEDDED / "dense", tmp_path / "dense")
    load_heads(tmp_path)
    name = spoil(tmp_path / "dense" / "heads.safetensors", change)
    with pytest.raises(ValueError, match=f"heads.safetensors: {name} holds"):
        load_heads(tmp_path)


@pytest.mark.parametrize("change", CHANGES)
def test_an_encoder_is_numbers(tmp_path, change):
    bundle = load_model("embedded", placement="cpu")
    tower, path = bundle.family.tower_of(bundle.model), tmp_path / "encoder.safetensors"
    save_encoder(path, tower, load_heads(EMBEDDED), architecture={}, dense={"seed": 0, "terms": []})
    name = spoil(path, change)
    with pytest.raises(ValueError, match=f"encoder.safetensors: {name} holds"):
        read_dense_encoder(path, bundle.tokenizer)


def test_the_first_weight_that_is_none_is_named():
    check_finite({"a": torch.ones(2), "empty": torch.ones(0), "meta": torch.ones(2, device="meta")}, "file")
    with pytest.raises(ValueError, match="file: c holds NaN or infinity"):
        check_finite({"a": torch.ones(2), "c": torch.tensor([1.0, float("nan"), 2.0]), "d": torch.tensor([1])}, "file")
