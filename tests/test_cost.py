"""What a pass costs is counted as it is: operations by formula, memory to the byte, and structure adds little of
either."""

import gc
import time

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from tiny_internvl import bundle_of

from sfa_core.structure.inject import inject
from sfa_core.models.cost import WAYS, clock_name, costs, in_turns, operations, random_model
from sfa_core.core.memory import MemoryProbe, held_bytes, saved_bytes

SMALL = dict(hidden_size=64, intermediate_size=256, num_attention_heads=1, num_hidden_layers=2)


@pytest.fixture(scope="module")
def table():
    "Both passes of an encoder with 1,025 tokens and heads as wide as InternViT's."
    model = random_model(32, SMALL)
    inject(bundle_of(model))
    return {kind: costs(model, torch.randn(1, 3, 448, 448), 1, training=kind == "training")
            for kind in ("training", "inference")}


def test_operations_are_those_of_the_formula(table):
    tokens, width, hidden, layers = 1025, 64, 256, 2
    patches = 2 * 1024 * 3 * 14 * 14 * width
    linear, pairs = 2 * tokens * (4 * width * width + 2 * width * hidden), 4 * tokens**2 * width
    assert table["inference"].operations["plain"] == patches + layers * (linear + pairs)
    # the kernel recomputes its scores; the pixels get no gradient, the patches' weight does
    training = patches + layers * (3 * linear + 3.5 * pairs)
    assert table["training"].operations["plain"] == training + patches
    strips = table["training"].operations["low rank"]
    assert strips == table["training"].operations["plain"], (
        "the strips add to scores and sum over them, and multiply nothing more"
    )
    assert table["training"].operations["dense"] > strips


def test_structure_keeps_and_makes_hardly_more_than_plain_attention(table):
    "The aim is 1.3 times the activations kept; what writes all pairs out is far beyond."
    training = table["training"]
    assert (
        training.kept_ratio["low rank"] < 1.02
        and training.kept_ratio["dense"] > 1.3
        and training.kept_ratio["eager"] > 1.3
    )
    all_pairs = 4 * 1025**2
    assert training.largest_bytes["low rank"] < all_pairs <= min(training.largest_bytes["dense"],
                                                                 training.largest_bytes["eager"])
    assert training.parameters["low rank"] - training.parameters["plain"] == 2 * (3 + 16)
    assert list(training.index) == list(WAYS) and (training.ratio > 0).all() and training.ratio["plain"] == 1


def test_the_probe_counts_what_is_alive():
    with MemoryProbe() as probe:
        first = torch.zeros(1000)
        view, again = first[10:], first.view(10, 100)
        assert probe.alive == 4000
        second = first + 1
        assert probe.alive == 8000
        second.add_(1)
        del first, view
        gc.collect()
        assert probe.alive == 8000, "a view keeps its storage"
        del again
        gc.collect()
        assert probe.alive == 4000 and probe.peak == 8000 and probe.largest == 4000
    x = torch.randn(50, 50, requires_grad=True)
    with MemoryProbe() as probe:
        (x @ x).exp().sum().backward()
    assert probe.peak >= 3 * 10_000, "the backward pass is seen too"


def test_what_is_kept_is_counted_once_and_without_parameters():
    layer, x = torch.nn.Linear(10, 10), torch.randn(7, 10)
    assert saved_bytes(lambda: layer(x), tuple(layer.parameters())) == 4 * 70
    assert saved_bytes(lambda: layer(x) * layer(x), tuple(layer.parameters())) == 4 * 70 * 3
    query = torch.randn(1, 1, 8, 4, requires_grad=True)
    # query, output, a number a row
    assert saved_bytes(lambda: scaled_dot_product_attention(query, query, query)) == 4 * (32 + 32 + 8)
    tied = torch.nn.Linear(10, 10, bias=False)
    tied.weight = layer.weight
    assert held_bytes([layer, tied]) == 4 * 110


def test_wrong_measurements_are_refused():
    with pytest.raises(ValueError, match="got 1 calls and 0 rounds"):
        in_turns({"a": lambda: None}, rounds=0)
    with pytest.raises(ValueError, match="got 0 calls"):
        in_turns({})
    assert operations(lambda: torch.ones(3, 4) @ torch.ones(4, 5)) == 2 * 3 * 4 * 5


def test_time_is_named_after_the_clock_that_read_it():
    table = in_turns({"a": lambda: sum(range(1000)), "b": lambda: time.sleep(0.2)}, rounds=1)
    assert list(table) == ["processor_seconds", "ratio", "lowest", "highest"] and table.processor_seconds["b"] < 0.1, (
        "a CPU that waits takes none"
    )
    assert clock_name(torch.device("cuda:1")) == "seconds"
