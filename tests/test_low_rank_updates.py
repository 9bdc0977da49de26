"""Low-rank updates have about as many parameters as a bias, change nothing at the start, learn, and leave no trace."""
import copy

import pytest
import torch
from test_families import each_family, features, fresh

from sfa_core.structure.rivals import (
    PROJECTIONS,
    attach_low_rank,
    bias_parameters,
    detach_low_rank,
    low_rank_maps,
    updates_of,
)
from sfa_core.structure.terms import TERMS


@each_family
def test_they_start_at_zero_learn_and_leave_no_trace(name):
    bundle = fresh(name)
    before, names = features(bundle), list(bundle.model.state_dict())
    updates = attach_low_rank(bundle, bias_parameters(bundle), seed=3)
    assert torch.equal(features(bundle), before)
    bundle.model.requires_grad_(True)
    features(bundle).square().sum().backward()
    assert all(update.up.grad.any() for update in updates), "the side that is zero learns first"
    with torch.no_grad():
        [update.up.normal_() for update in updates]
    moved = features(bundle)
    assert not torch.allclose(moved, before, atol=1e-4)
    twin = copy.deepcopy(bundle)
    with torch.no_grad():
        [update.up.zero_() for update in updates_of(twin)]
    assert torch.equal(features(twin), before) and torch.equal(features(bundle), moved), "a copy has its own"
    with pytest.raises(ValueError, match="has low-rank updates already"):
        attach_low_rank(bundle, 10)
    detach_low_rank(bundle)
    assert torch.equal(features(bundle), before) and list(bundle.model.state_dict()) == names
    with pytest.raises(ValueError, match="has no low-rank updates"):
        detach_low_rank(bundle)


@each_family
@pytest.mark.parametrize("terms", [TERMS, ("row",), ("offset",)])
def test_the_count_is_the_nearest_that_whole_maps_give(name, terms):
    bundle = fresh(name)
    wanted, maps = bias_parameters(bundle, terms), low_rank_maps(bundle, bias_parameters(bundle, terms))
    sizes = [linear.in_features + linear.out_features for linear in maps]
    known = [child for attention in bundle.family.attentions_of(bundle.model)
             for child_name, child in attention.named_children() if any(child_name in names for names in PROJECTIONS)]
    assert len({id(linear) for linear in maps}) == len(maps)
    if len(maps) < len(known):
        assert len(maps) == 1 or abs(sum(sizes) - wanted) <= max(sizes) / 2
    again = low_rank_maps(bundle, sum(sizes))
    assert [id(one) for one in again] == [id(one) for one in maps], "what is kept finds its places again by its count"


def test_counts_of_terms_are_those_of_a_bias():
    bundle = fresh("internvl")
    heads, layers = 2, 2
    assert bias_parameters(bundle) == layers * (3 * heads + 16 * heads)
    assert bias_parameters(bundle, ("row", "window")) == layers * heads
    assert bias_parameters(bundle, ("offset",)) == layers * 128 * heads
