"""Head divergence, reinforcement, distance and importance are what they say, in batches, with caches, and in
several real decoders."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoders import BUILDERS, PROMPTS, tiny

from sfa_core.models.sequences import answer_loss, training_batch
from sfa_core.documents.generate import documents, make_document
from sfa_core.documents.samples import samples
from sfa_core.models.embedded import EmbeddedConfig, train_tokenizer
from sfa_core.interventions.heads import (
    VHRConfig,
    both_outputs,
    head_divergence,
    head_hooks,
    head_importance,
    head_table,
    reinforced_layers,
    vision_heads,
)
from sfa_core.models.load import new_bundle
from sfa_core.interventions.prompts import decoder_layers, following
from sfa_core.interventions.redistribution import VARConfig

CONFIG = VHRConfig(3.0)


@pytest.fixture(scope="module", params=BUILDERS)
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def bundle():
    rows = [make_document("bar", seed).row() for seed in range(3)]
    tokenizer = train_tokenizer([text for row in rows for part in row["questions"]
                                 for text in (part["question"], part["answers"][0])])
    return new_bundle(EmbeddedConfig(vision_layers=1, language_layers=3, initializer_range=0.1), tokenizer, seed=1)


def divergences(model, prompts, layers=(1, 2, 3)):
    "What `both_outputs` finds in a batch."
    seen, found = {}, []
    with (
        head_hooks(model.bundle, layers, seen.__setitem__),
        following(model.bundle, lambda p, i: found.append(both_outputs(model.bundle, layers, seen, p, i))),
    ):
        model.logits(prompts, steps=1)
    return found[0]


def test_divergence_compares_the_prompt_with_its_text(model):
    layers, outputs = decoder_layers(model.bundle), []
    for prompt in PROMPTS:  # by hand: two prompts, each alone; what surrounds an image is text
        words = [token for part in prompt for token in ([part] if not isinstance(part, str) else [6, 8])]
        pair = []
        for one in (prompt, words):
            kept = {}
            handles = [
                layers[at].self_attn.o_proj.register_forward_pre_hook(
                    lambda m, a, at=at, kept=kept: kept.update({at: a[0][0, -1]})
                )
                for at in (1, 2, 3)
            ]
            with torch.no_grad():
                model.bundle.model(**model.inputs([one]))
            for handle in handles:
                handle.remove()
            pair.append(torch.stack([kept[at].unflatten(-1, (6, -1)) for at in (1, 2, 3)]))
        outputs.append(pair)
    divergence, alone = divergences(model, PROMPTS)
    assert torch.allclose(divergence, torch.stack([(whole - only).norm(dim=-1) for whole, only in outputs]).float(),
                          atol=1e-5)
    assert torch.allclose(alone, torch.stack([only.norm(dim=-1) for _, only in outputs]).float(), atol=1e-5)
    assert divergence[3].abs().max() < 1e-5 < divergence[:3].min(), (
        "a prompt without an image does not diverge from itself"
    )


def test_a_strength_of_one_is_the_identity(model):
    with replace(CONFIG, strength=1.0).attach(model.bundle):
        same = model.logits(PROMPTS)
    assert torch.equal(same, model.logits(PROMPTS))


def test_reinforcement_in_a_batch_is_one_by_one_with_and_without_a_cache(model):
    plain = model.logits(PROMPTS)
    with CONFIG.attach(model.bundle) as chosen:
        together, without = model.logits(PROMPTS), model.logits(PROMPTS, use_cache=False)
        alone = torch.cat([model.logits([prompt]) for prompt in PROMPTS])
    assert torch.allclose(together, without, atol=1e-5) and torch.allclose(together, alone, atol=1e-5) and not chosen
    assert (together - plain)[:3].abs().max() > 0.01 and torch.equal(model.logits(PROMPTS), plain)


def test_only_chosen_heads_get_louder_from_the_last_position_on(model):
    prompts, layers, before, after = PROMPTS[:2], reinforced_layers(4), {}, {}
    divergence, alone = divergences(model, prompts, layers)
    heads = vision_heads(divergence, alone)
    with torch.no_grad(), head_hooks(model.bundle, layers[:1],
                                     lambda layer, out: before.update({layer: out}) if layer not in before else None):
        with CONFIG.attach(model.bundle) as chosen, head_hooks(model.bundle, layers[:1],
                                                               lambda layer, out: after.update({layer: out})):
            model.bundle.model(**model.inputs(prompts))
            assert torch.equal(chosen["heads"], heads)
    stock, louder = before[layers[0]], after[layers[0]]
    assert torch.equal(louder[:, :-1], stock[:, :-1]) and torch.allclose(
        louder[:, -1], stock[:, -1] * (1 + 2.0 * heads[:, 0, :, None])
    )
    assert 0 < heads[:, 0].sum() <= heads[:, 0].numel() / 2


@given(values=st.lists(st.floats(0.015625, 100, width=32), min_size=2, max_size=9), other=st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_loud_heads_are_never_chosen_and_half_at_most_are(values, other):
    divergence = torch.tensor(values)[None, None]
    alone = torch.rand(divergence.shape, generator=torch.Generator().manual_seed(other))
    chosen = vision_heads(divergence, alone)[0, 0]
    over = [part[0, 0] > part.mean() + part.std(correction=0) for part in (divergence, alone)]
    assert not (chosen & over[0] & over[1]).any() and chosen.sum() <= len(values) / 2


def test_published_layers():
    assert (
        reinforced_layers(32) == (1, *range(18, 32))
        and reinforced_layers(40) == (1, *range(22, 40))
        and reinforced_layers(3) == (1, 2)
    )


@pytest.mark.parametrize("wrong, message", [
    (dict(layers=()), "expected one or more"), (dict(layers=(4,)), "from 0 to 3"),
    (dict(strength=-1.0), "strength is -1.0")])
def test_wrong_settings_are_refused(model, wrong, message):
    with pytest.raises(ValueError, match=message), replace(CONFIG, **wrong).attach(model.bundle):
        pass
    assert not any(layer.self_attn.o_proj._forward_pre_hooks for layer in decoder_layers(model.bundle))


def test_both_interventions_at_once_and_the_model_after_an_error(model):
    redistribution = VARConfig((3, 17), share=0.05, ratio=0.0, mass=0.0)
    with redistribution.attach(model.bundle), CONFIG.attach(model.bundle):
        both, without = model.logits(PROMPTS), model.logits(PROMPTS, use_cache=False)
    with redistribution.attach(model.bundle):
        one = model.logits(PROMPTS)
    assert torch.allclose(both, without, atol=1e-5) and (both - one)[:3].abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="stopped"), CONFIG.attach(model.bundle):
        raise RuntimeError("stopped")
    assert not any(layer.self_attn.o_proj._forward_pre_hooks for layer in decoder_layers(model.bundle))
    assert "generate" not in vars(model.bundle.model) and not model.bundle.model._forward_pre_hooks


# ---- measures

def test_a_head_that_looks_at_one_place_has_its_distance(bundle):
    asked = samples(documents(2, seed=1), kinds=("read_label",))[:2]
    layer = decoder_layers(bundle)[1].self_attn
    weights = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    with torch.no_grad():
        layer.q_proj.weight.zero_()  # uniform attention: the mean place of what a token sees is half its own
    try:
        table = head_table(bundle, asked, batch_size=1).query("layer == 1")
    finally:
        layer.load_state_dict(weights)
    from sfa_core.models.sequences import prompt_tokens
    for sample, part in table.groupby("sample"):
        before, after = prompt_tokens(bundle, next(one.question for one in asked if one.id == sample))
        rows = np.arange(len(before) + 65, len(before) + 66 + len(after))  # the image is framed by two tokens
        assert np.allclose(part["distance"], (rows / 2).mean(), rtol=1e-4) and np.allclose(
            part["image_mass"], (64 / (rows + 1)).mean(), rtol=1e-4
        )


def test_a_table_in_batches_is_a_table_one_by_one(bundle):
    asked = list({sample.document: sample for sample in samples(documents(4, seed=2))}.values())
    whole, single = head_table(bundle, asked, batch_size=4), head_table(bundle, asked, batch_size=1)
    assert whole[["sample", "layer", "head", "document"]].equals(single[["sample", "layer", "head", "document"]])
    for measure in ("distance", "image_mass", "divergence", "text_norm"):
        assert np.allclose(whole[measure], single[measure], atol=1e-3), measure
    assert np.allclose(whole["divergence"].to_numpy().reshape(4, 3, 4), head_divergence(bundle, asked)[0], atol=1e-4)


def test_importance_is_the_slope_of_the_loss(bundle):
    page, step = documents(1, seed=1), 1e-2
    importance = head_importance(bundle, page, normalise=False)
    batch = training_batch(bundle, page)
    for layer, head in ((0, 1), (2, 3)):
        losses = []
        for gain in (1 - step, 1 + step):
            gate = torch.ones(4, 1)
            gate[head] = gain
            with torch.no_grad(), head_hooks(bundle, (layer,), lambda _, out, gate=gate: out * gate):
                loss, words = answer_loss(bundle.model, batch)
            losses.append(loss.item() / words)
        assert importance[layer, head] == pytest.approx(abs(losses[1] - losses[0]) / (2 * step), rel=0.05, abs=1e-4)
    twice = head_importance(bundle, documents(3, seed=1),
                            batch_size=1), head_importance(bundle, documents(3, seed=1), batch_size=3)
    assert (
        np.allclose(*twice, atol=1e-4)
        and not bundle.model.training
        and all(weight.grad is None for weight in bundle.model.parameters())
    )
