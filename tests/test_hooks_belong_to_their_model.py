"""What is attached to a model belongs to that model: copies run their own, two models do not meet, models can be
pickled, and nothing is left behind."""

import copy
import pickle
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sfa_core.attention.capture import catching
from sfa_core.attention.probes import record
from sfa_core.core.families import FAMILIES
from sfa_core.documents.samples import Evidence, Sample, TextBox
from sfa_core.interventions.heads import VHRConfig
from sfa_core.interventions.redistribution import VARConfig
from sfa_core.interventions.sink_places import KnockoutConfig
from sfa_core.interventions.sinks import planted_sinks
from sfa_core.models.answers import answer
from sfa_core.models.images import image_batch, image_features
from sfa_core.models.miniatures import miniature
from sfa_core.models.resolution import at_resolution
from sfa_core.structure.inject import eject, inject, use_attention, vision_attention, visible_attention
from sfa_core.tokens.adaptive import CONTROL, adaptive_tokens, detach_tokens
from sfa_core.tokens.patches import PatchConfig

GUARDED = PatchConfig(coarse=None, bucket=8)


def page(seed, size=(168, 112)):
    draw, rng = Image.new("RGB", size, "white"), np.random.default_rng(seed)
    for x, y in rng.integers(0, 100, (3, 2)).tolist():
        ImageDraw.Draw(draw).rectangle((x, y, x + 6, y + 6), fill=tuple(rng.integers(0, 150, 3).tolist()))
    return draw


PAGES = [
    Sample(f"p{seed}", f"p{seed}", "own", "What is it?", ("12",), page(seed),
           Evidence((), (TextBox("12", (20, 20, 60, 40)),), (0,)))
    for seed in range(3)
]


@torch.no_grad()
def features(bundle, pages=PAGES):
    return torch.cat([part.flatten()
                      for part in image_features(bundle, image_batch(bundle, [one.image for one in pages])).images])


def state(model):
    "Everything that an attachment might leave on a model: attributes, hooks, parts and kernels."
    found = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items()
               if key not in ("training", "config", "generation_config")}
        hooks = [len(value) for key, value in sorted(own.items()) if "hooks" in key and isinstance(value, dict | list)]
        found[name] = sorted(own), hooks, {key: id(value) for key, value in own["_modules"].items()}
    kernels = [getattr(module.config, "_attn_implementation", None)
               for module in model.modules() if hasattr(module, "config")]
    return found, kernels, dict(vars(ALL_ATTENTION_FUNCTIONS))


def attached(bundle):
    return adaptive_tokens(bundle, patches=GUARDED)


@pytest.fixture(scope="module", params=["internvl", "llava_onevision"])
def adaptive(request):
    return miniature(request.param)


@pytest.fixture(scope="module")
def small():
    return miniature("internvl")


def test_a_copy_with_adaptive_tokens_runs_its_own_control(adaptive):
    with attached(adaptive):
        expected = features(adaptive)
        other = copy.deepcopy(adaptive)
        theirs, ours = (getattr(one.family.tower_of(one.model), CONTROL) for one in (other, adaptive))
        assert theirs is not ours and theirs.model is other.model
        ours.tiles.tiles.clear()
        ours.last = []
        assert torch.equal(features(other), expected)
        assert not ours.tiles.tiles and not ours.last and theirs.last, "the copy asked the control of the original"
        with torch.no_grad():
            next(other.family.tower_of(other.model).parameters()).add_(1)
        assert not torch.equal(features(other), expected) and torch.equal(features(adaptive), expected)
    detach_tokens(other)
    assert not torch.equal(features(other), features(adaptive)) and "forward" not in vars(
        other.family.tower_of(other.model)
    )


def test_a_model_with_adaptive_tokens_can_be_pickled(adaptive):
    fresh = miniature(adaptive.family.name)  # one that has run carries hooks of transformers, which cannot be pickled
    with attached(fresh):
        other = pickle.loads(pickle.dumps(fresh.model))
        whole = replace(fresh, model=other, cache={})
        assert torch.equal(features(whole), features(fresh))
        assert sorted(other.state_dict()) == sorted(fresh.model.state_dict())
    detach_tokens(replace(fresh, model=other))
    assert torch.equal(features(whole), features(fresh)) and torch.equal(features(fresh), features(adaptive))


def test_parameters_keep_their_names_and_identity_under_adaptive_tokens(adaptive):
    before = {name: id(weight) for name, weight in adaptive.model.named_parameters()}
    with attached(adaptive):
        assert {name: id(weight) for name, weight in adaptive.model.named_parameters()} == before
        adaptive.model.train()
    assert all(module.training for module in adaptive.model.modules())
    adaptive.model.eval()


def test_a_processor_for_finer_tiles_can_be_copied_and_pickled():
    bundle = miniature("llava_onevision")
    side = bundle.processor.image_processor.size["height"]
    finer = at_resolution(bundle, 2 * side)
    other = copy.deepcopy(finer.processor)
    count = finer.processor._get_number_of_features(100, 60, 2 * side, 2 * side)
    assert other._get_number_of_features(100, 60, 2 * side, 2 * side) == count
    assert other._get_number_of_features.processor is other, "the copy counts with the original"
    assert pickle.loads(pickle.dumps(finer.processor._get_number_of_features.tile)) == (side, side)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_recording_one_model_is_not_seen_by_another(name):
    one, two = miniature(name), miniature(name, seed=1)
    both, registry = record(two, PAGES, queries="all"), dict(vars(ALL_ATTENTION_FUNCTIONS))
    inside = []

    def other(module, args):
        assert dict(vars(ALL_ATTENTION_FUNCTIONS)) == registry, (
            "the registry of all models is changed while one is recorded"
        )
        if not inside:
            inside.append(record(two, PAGES, queries="all"))

    features(one)  # transformers installs hooks of its own at the first pass
    before = state(one.model)
    handle = one.family.attentions_of(one.model)[-1].register_forward_pre_hook(other)
    seen = record(one, PAGES, queries="all")
    handle.remove()
    assert state(one.model) == before and dict(vars(ALL_ATTENTION_FUNCTIONS)) == registry
    assert np.array_equal(inside[0].maps, both.maps) and not np.array_equal(seen.maps, both.maps)
    assert np.array_equal(record(one, PAGES, queries="all").maps, seen.maps)


INTERVENTIONS = {
    "redistribution": lambda bundle: VARConfig((9,), ratio=0.0, mass=0.0).attach(bundle),
    "heads": lambda bundle: VHRConfig(strength=3.0).attach(bundle),
    "knock-out": lambda bundle: KnockoutConfig((9,)).attach(bundle),
    "planted": lambda bundle: planted_sinks(bundle, 9, (2,)),
}


def logits(bundle):
    "The logits before the first word of each answer."
    found = []
    handle = bundle.model.lm_head.register_forward_hook(
        lambda module, args, output: found.append(output[:, -1].clone())
    )
    answer(bundle, PAGES, max_new_tokens=2)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize("name", sorted(INTERVENTIONS))
def test_a_copy_of_a_model_under_an_intervention_has_its_own(small, name):
    plain, before = logits(small), state(small.model)
    with ExitStack() as stack:
        if name in ("redistribution", "knock-out"):
            stack.enter_context(planted_sinks(small, 9, (1, 5)))
            plain = logits(small)
        stack.enter_context(INTERVENTIONS[name](small))
        changed = logits(small)
        other = copy.deepcopy(small)
        assert torch.equal(logits(other), changed), "the copy is not changed, or by the state of the original"

        def between(module, args):  # the original reads other pages while the copy is under way
            answer(small, PAGES[1:2], max_new_tokens=1)

        hook = other.model.model.language_model.layers[0].register_forward_pre_hook(between)
        assert torch.equal(logits(other), changed)
        hook.remove()
    assert not torch.equal(changed, plain), "the intervention does nothing on these pages"
    assert state(small.model) == before


@pytest.mark.parametrize("name", sorted(INTERVENTIONS))
def test_an_error_leaves_the_model_as_it_was(small, name):
    expected, before = logits(small), state(small.model)
    fail = SimpleNamespace(on=False)

    def stop(module, args):
        if fail.on:
            raise RuntimeError("stopped inside")

    handle = small.model.model.language_model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped inside"), planted_sinks(small, 9, (1,)):
        with INTERVENTIONS[name](small):
            fail.on = True
            logits(small)
    handle.remove()
    for hook in list(small.model.lm_head._forward_hooks):  # the one of `logits`, which did not come to its end
        del small.model.lm_head._forward_hooks[hook]
    assert state(small.model) == before and torch.equal(logits(small), expected)


def test_structure_can_be_attached_and_ejected_while_a_model_is_watched(small):
    features(small)
    before, seen = state(small.model), []
    with catching(small.model, small.family.attentions_of(small.model), lambda at, call: seen.append(at)):
        plain = features(small)
        for bias in inject(small):
            torch.nn.init.normal_(next(bias.parameters()), std=2)
        assert vision_attention(small.model) == "sfa"
        structured = features(small)
        use_attention(small.model, "sdpa")
        assert torch.equal(features(small), plain) and vision_attention(small.model) == "sdpa"
        use_attention(small.model, "sfa")
        eject(small)
        assert torch.equal(features(small), plain)
    assert not torch.equal(structured, plain) and len(seen) == 4 * len(small.family.attentions_of(small.model))
    assert state(small.model) == before


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_watching_changes_no_number_in_any_family_and_kernel(name):
    bundle = miniature(name)
    modules = bundle.family.attentions_of(bundle.model)
    for kernel in ("sdpa", "eager", "sfa"):
        if kernel == "sfa":
            for bias in inject(bundle):
                torch.nn.init.normal_(next(bias.parameters()), std=2)
        else:
            use_attention(bundle.model, kernel)
        plain, before, seen = features(bundle), state(bundle.model), []
        with catching(bundle.model, modules, lambda at, call, seen=seen: seen.append(call.result)):
            assert torch.equal(features(bundle), plain), kernel
        assert {result for result in seen} == {None} and state(bundle.model) == before
        with visible_attention(bundle):
            assert torch.allclose(features(bundle), plain, atol=1e-4), kernel
        assert state(bundle.model) == before
