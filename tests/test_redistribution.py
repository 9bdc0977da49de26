"""Redistributed attention is the edited matrix in closed form, and in a model it is right with caches, batches,
padding, several images and grouped keys."""
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_decoders import BUILDERS, IMAGE, PROMPTS, tiny, token_ids
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from sfa_core.attention.capture import row_probabilities
from sfa_core.core.hooks import HOOKS, AttentionCall
from sfa_core.interventions.prompts import attention_edit, decoder_layers, following
from sfa_core.interventions.redistribution import (LEAST, TARGETS, VARConfig, correction, prompt_columns, redistribute,
                                                   redistributed_attention, visual_redistribution)
from sfa_core.interventions.sinks import sink_threshold, sink_values

CONFIG = VARConfig((3, 17), share=0.05, ratio=0.3, mass=0.1)  # of 48 channels: about a fifth of all tokens is a sink


@pytest.fixture(scope="module", params=BUILDERS)
def model(request):
    return tiny(request.param)


@pytest.fixture(scope="module")
def one():
    return tiny("internvl")


# ---- the rule

shares = st.floats(0, 1, width=32)


@given(seed=st.integers(0, 10_000), moved=shares, ratio=shares, mass=shares, target=st.sampled_from(TARGETS),
       choose=st.booleans())
@settings(max_examples=80, deadline=None)
def test_closed_form_is_the_edited_matrix(seed, moved, ratio, mass, target, choose):
    generator = torch.Generator().manual_seed(seed)
    attention = (3 * torch.randn(2, 3, 4, 11, generator=generator)).softmax(-1)
    value = torch.randn(2, 3, 11, 5, generator=generator)
    sinks, visual = (torch.rand(2, 11, generator=generator) < share for share in (0.3, 0.6))
    config = VARConfig((0,), moved, ratio, mass, choose_heads=choose, target=target)
    edited = redistributed_attention(attention, sinks, visual, config)
    assert torch.allclose(edited.sum(-1), torch.ones(2, 3, 4), atol=1e-5) and edited.min() >= -1e-6
    assert torch.allclose(redistribute(attention, value, sinks, visual, config), edited @ value, atol=1e-5)


def by_hand(row, sinks, visual, config):
    "The rule of the paper for one row of one head, written as it is spoken."
    image = sum(a for a, v in zip(row, visual) if v)
    others = sum(a for a, v, s in zip(row, visual, sinks) if v and not s)
    if config.choose_heads and (image < config.mass or others < config.ratio * image) or others <= LEAST:
        return list(row)
    moved = config.moved * sum(a for a, s in zip(row, sinks) if s)
    return [a * (1 - config.moved) if s else a + moved * a / others if v else a for a, s, v in zip(row, sinks, visual)]


@given(seed=st.integers(0, 10_000), moved=shares, choose=st.booleans())
@example(seed=710, moved=1.0, choose=False)  # hardly anything on those who take it
@settings(max_examples=40, deadline=None)
def test_edited_matrix_is_the_published_rule(seed, moved, choose):
    generator = torch.Generator().manual_seed(seed)
    attention = (3 * torch.randn(1, 2, 3, 9, generator=generator, dtype=torch.float64)).softmax(-1)
    sinks, visual = (torch.rand(1, 9, generator=generator) < share for share in (0.3, 0.6))
    config = VARConfig((0,), moved, choose_heads=choose)
    expected = [[by_hand(row.tolist(), sinks[0].tolist(), visual[0].tolist(), config) for row in head]
                for head in attention[0]]
    assert torch.allclose(redistributed_attention(attention, sinks, visual, config)[0],
                          torch.tensor(expected, dtype=torch.float64), atol=1e-9)


def test_who_gets_what_the_sinks_lose():
    attention, none = torch.tensor([[[[0.5, 0.1, 0.1, 0.3]]]]), torch.zeros(1, 4, dtype=torch.bool)
    sinks, visual = none.clone(), none.clone()
    sinks[0, 0] = visual[0, 3] = True  # sink, text, text, image
    after = {target: redistributed_attention(attention, sinks, visual, VARConfig((0,), 0.6, target=target))[0, 0, 0]
             for target in TARGETS}
    assert torch.allclose(after["visual"], torch.tensor([0.2, 0.1, 0.1, 0.6]))
    assert torch.allclose(after["text"], torch.tensor([0.2, 0.25, 0.25, 0.3]))
    assert torch.allclose(after["both"], torch.tensor([0.2, 0.16, 0.16, 0.48]))
    for untouched in (none, ~visual):  # no image at all; an image that is all sinks
        assert torch.equal(redistributed_attention(attention, sinks | visual if untouched is none else ~none, visual,
                                                   VARConfig((0,))), attention)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("choose, ratio, mass", [(True, 0.3, 0.1), (True, 0.0, 0.0), (False, 0.8, 0.2)])
def test_the_correction_is_what_the_definition_adds(target, choose, ratio, mass):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, tokens, 8, generator=generator, dtype=torch.float64)
                         for heads, tokens in ((4, 5), (2, 14), (2, 14)))
    sinks, visual = (torch.rand(2, 14, generator=generator) < share for share in (0.3, 0.6))
    sinks[:, 11:] = visual[:, 11:] = False  # three tokens behind the prompt
    mask = torch.ones(2, 1, 5, 14, dtype=torch.bool)
    mask[:, :, 0] = ~visual[:, None]  # the first row sees no image
    config = VARConfig((0,), ratio=ratio, mass=mass, choose_heads=choose, target=target)
    call = AttentionCall(0, torch.nn.Identity(), query, key, value, mask, 1.0, False)
    attention = row_probabilities(call, slice(None))
    change = redistributed_attention(attention, sinks, visual, config) - attention
    columns = prompt_columns(sinks[:, :11], visual[:, :11], config, torch.float64)
    found = correction(call, slice(None), columns, config)
    assert torch.allclose(found, (change @ value.repeat_interleave(2, dim=1)).transpose(1, 2), atol=1e-12)
    assert found[:, 1:].any() and not found[:, 0].any(), "a row without image stays as it is"


@pytest.mark.parametrize("wrong, message", [
    (dict(moved=1.2), "moved is 1.2, expected a share"), (dict(ratio=-0.1), "ratio is -0.1"),
    (dict(target="image"), "expected one of visual, text, both"),
    (dict(layers=()), r"layers are \[\], expected one or more"), (dict(layers=(1, 3)), "before the last one, 3"),
    (dict(layers=(9,)), "from 0 to 3"),
    (dict(dimensions=()), r"sink dimensions are \(\)"), (dict(dimensions=(48,)), "from 0 to 47")])
def test_numbers_out_of_range_are_refused_before_anything_is_attached(one, wrong, message):
    with pytest.raises(ValueError, match=message), visual_redistribution(one.bundle, replace(CONFIG, **wrong)):
        pass
    untouched(one)


# ---- in a model

def plain_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    "Attention as a table, edited row by row by the definition; for one prompt without padding or cache."
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    logits = query @ key.mT * scaling
    weights = logits.masked_fill(torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
    if rule := getattr(module, "rule", None):
        config, sinks, visual, length = rule["config"], rule["sinks"], rule["visual"], rule["length"]
        for head in range(weights.shape[1]):
            for row in range(weights.shape[2]):
                if row >= length or not visual[row] and any(visual[:row]):
                    seen = weights[0, head, row].tolist()
                    edited = by_hand(seen, sinks, visual, config)
                    rule["edits"] += edited != seen
                    weights[0, head, row] = torch.tensor(edited)
    return (weights @ value).transpose(1, 2).contiguous(), weights


AttentionInterface.register("plain_by_hand", plain_attention)
AttentionMaskInterface.register("plain_by_hand", eager_mask)


def reference(model, prompt, generated, config, layers):
    "Logits before each generated token, from whole passes over one prompt at a time, and the number of edited rows."
    language, length = model.bundle.family.language_of(model.bundle.model), sum(len(token_ids(part)) for part in prompt)
    rules, handles, logits = {}, [], []

    def look(layer):
        def hook(module, args, kwargs):
            hidden = (args[0] if args else kwargs["hidden_states"])[0]
            over = sink_values(hidden, config.dimensions) >= sink_threshold(hidden.shape[-1], config.share)
            rules[layer].update(sinks=[bool(s) and at < length for at, s in enumerate(over)])
        return hook

    for layer in layers:
        rules[layer] = {"config": config, "length": length, "edits": 0}
        module = decoder_layers(model.bundle)[layer]
        module.self_attn.rule = rules[layer]
        handles.append(module.register_forward_pre_hook(look(layer), with_kwargs=True))
    language.config._attn_implementation = "plain_by_hand"
    try:
        for step in range(len(generated)):
            inputs = model.inputs([[*prompt, *generated[:step]]])
            for rule in rules.values():
                rule["visual"] = (inputs["input_ids"][0] == IMAGE).tolist()
            with torch.no_grad():
                logits.append(model.bundle.model(**inputs, use_cache=False).logits[0, -1])
    finally:
        language.config._attn_implementation = "sdpa"
        for handle, layer in zip(handles, layers):
            handle.remove()
            del decoder_layers(model.bundle)[layer].self_attn.rule
    return torch.stack(logits), sum(rule["edits"] for rule in rules.values())


def run(model, prompts, config, steps=4, **options):
    with config.attach(model.bundle):
        logits = model.logits(prompts, steps, **options)
    return logits


def untouched(model):
    layers = decoder_layers(model.bundle)
    assert not any(
        hasattr(layer.self_attn, HOOKS) or layer._forward_pre_hooks for layer in layers
    ) and "generate" not in vars(model.bundle.model)
    assert model.bundle.family.language_of(model.bundle.model).config._attn_implementation == "sdpa"
    assert not (model.bundle.model._forward_pre_hooks
                or model.bundle.family.language_of(model.bundle.model)._forward_hooks)


def greedy(logits):
    logits = logits.clone()
    logits[..., [IMAGE, 6, 7]] = -torch.inf
    return logits.argmax(-1).tolist()


def test_a_padded_batch_with_cache_is_the_definition_one_by_one_without(model):
    found = run(model, PROMPTS, CONFIG)
    plain, edits = model.logits(PROMPTS), 0
    for row, prompt in enumerate(PROMPTS):
        expected, edited = reference(model, prompt, greedy(found[row]), CONFIG, (1, 2))
        assert torch.allclose(found[row].double(), expected, atol=1e-5), f"prompt {row}"
        assert row < 3 or not edited, "the last prompt has no image"
        edits += edited
    assert edits > 30 and (found - plain)[:3].abs().max() > 0.01 and torch.equal(found[3], plain[3])
    untouched(model)


@pytest.mark.parametrize("config", [replace(CONFIG, choose_heads=False), replace(CONFIG, layers=(0, 2), moved=1.0)],
                         ids=["all heads", "other layers"])
def test_settings_reach_the_model(one, config):
    found = run(one, PROMPTS[:2], config, steps=2)
    for row in range(2):
        expected, _ = reference(one, PROMPTS[row], greedy(found[row]), config, config.layers or (1, 2))
        assert torch.allclose(found[row].double(), expected, atol=1e-5)


@pytest.mark.parametrize("target", ["text", "both"])
def test_text_as_a_target_counts_the_words_behind_the_cache(one, target):
    config = replace(CONFIG, target=target, choose_heads=False)
    with_cache, without = run(one, PROMPTS, config), run(one, PROMPTS, config, use_cache=False)
    assert (
        torch.allclose(with_cache, without, atol=1e-5) and (with_cache - run(one, PROMPTS, CONFIG)).abs().max() > 0.01
    )


def test_generation_with_cache_is_generation_without(model):
    with_cache, without = run(model, PROMPTS, CONFIG), run(model, PROMPTS, CONFIG, use_cache=False)
    assert torch.allclose(with_cache, without, atol=1e-5)


def test_a_batch_is_its_prompts_one_by_one_and_nothing_is_kept_between_them(model):
    together = run(model, PROMPTS, CONFIG)
    with CONFIG.attach(model.bundle):
        in_a_row = torch.cat([model.logits([prompt]) for prompt in PROMPTS])
    alone = torch.cat([run(model, [prompt], CONFIG) for prompt in PROMPTS])
    assert torch.equal(in_a_row, alone) and torch.allclose(together, alone, atol=1e-5)


def test_nothing_moved_is_the_identity(model):
    assert torch.equal(run(model, PROMPTS, replace(CONFIG, moved=0.0)), model.logits(PROMPTS))


def test_without_sinks_the_model_is_not_touched(one):
    with visual_redistribution(one.bundle, replace(CONFIG, share=0.99)) as edits:
        found = one.logits(PROMPTS)
        assert len(edits) == 2 and all(edit.columns is None for edit in edits.values())
    assert torch.equal(found, one.logits(PROMPTS))


def test_long_questions_are_done_in_pieces(one, monkeypatch):
    whole = run(one, PROMPTS, CONFIG)
    monkeypatch.setattr("sfa_core.interventions.redistribution.BUDGET", 1)
    assert torch.allclose(run(one, PROMPTS, CONFIG), whole, atol=1e-6)


def test_low_precision_is_corrected_in_float32(one):
    half = tiny("internvl")
    half.bundle.model.bfloat16()
    with CONFIG.attach(half.bundle):
        found = half.logits(PROMPTS, steps=1)
    assert (
        found.dtype == torch.float32
        and torch.isfinite(found).all()
        and (found - run(one, PROMPTS, CONFIG, steps=1)).abs().max() < 0.5
    )


def test_beams_share_the_sinks_of_their_prompt(one):
    with replace(CONFIG, moved=0.0).attach(one.bundle):
        still = one.logits(PROMPTS, num_beams=2)
    assert torch.equal(still, one.logits(PROMPTS, num_beams=2))
    assert torch.isfinite(run(one, PROMPTS, CONFIG, num_beams=2)).all()


# ---- what is refused, and what is left behind

def test_a_foreign_cache_and_images_behind_a_cache_are_refused(one):
    model = one.bundle.model
    with torch.no_grad():
        first = model(**one.inputs(PROMPTS[:1]), use_cache=True)
        with CONFIG.attach(one.bundle):
            with pytest.raises(ValueError, match="from a cache whose prompt was not seen"):
                model(input_ids=torch.tensor([[9]]), past_key_values=first.past_key_values)
            mine = model(**one.inputs(PROMPTS[:1]), use_cache=True)
            with pytest.raises(ValueError, match="cache whose prompt was not seen"):
                model(input_ids=torch.tensor([[9]]), past_key_values=first.past_key_values)
            with pytest.raises(ValueError, match="image tokens come behind a cache"):
                model(**one.inputs([["image 1"]]) | {"attention_mask": None}, past_key_values=mine.past_key_values)
            with pytest.raises(ValueError, match="no input_ids"):
                model(inputs_embeds=torch.zeros(1, 3, 48, dtype=torch.float64))
    untouched(one)


def test_several_tokens_behind_a_cache_are_corrected_like_one_by_one(one):
    model, prompt = one.bundle.model, one.inputs(PROMPTS[:1])
    with torch.no_grad(), CONFIG.attach(one.bundle):
        cache = model(**prompt, past_key_values=DynamicCache(), use_cache=True).past_key_values
        together = model(input_ids=torch.tensor([[9, 10, 11]]), past_key_values=cache).logits
        cache = model(**prompt, past_key_values=DynamicCache(), use_cache=True).past_key_values
        single = torch.cat([model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits
                            for token in (9, 10, 11)], dim=1)
    assert torch.allclose(together, single, atol=1e-9)


def test_the_model_is_restored_after_an_error(one):
    with pytest.raises(RuntimeError, match="stopped"), CONFIG.attach(one.bundle):
        one.logits(PROMPTS[:1])
        raise RuntimeError("stopped")
    untouched(one)
    plain = one.logits(PROMPTS)
    with CONFIG.attach(one.bundle):
        pass
    assert torch.equal(one.logits(PROMPTS), plain)


def test_a_second_edit_a_window_and_another_kernel_are_refused(one, monkeypatch):
    config = one.bundle.family.language_of(one.bundle.model).config
    with CONFIG.attach(one.bundle), pytest.raises(ValueError,
                                                  match="layer 1 has an edit already"), CONFIG.attach(one.bundle):
        pass
    monkeypatch.setattr(decoder_layers(one.bundle)[2].self_attn, "sliding_window", 8)
    with pytest.raises(ValueError, match="layer 2 attends in a window of 8 tokens"), CONFIG.attach(one.bundle):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(config, "_attn_implementation", "eager")
    with pytest.raises(ValueError, match="attends by 'eager', expected 'sdpa'"), attention_edit(one.bundle, {}):
        pass
    monkeypatch.undo()
    untouched(one)


def test_the_prompt_is_known_during_generation_and_forgotten_after_it(one):
    lengths = []
    with following(one.bundle, lambda prompt, inputs: lengths.append((prompt.length, prompt.decoding))) as prompt:
        one.logits(PROMPTS, steps=3)
        one.logits(PROMPTS, steps=3, use_cache=False)
        assert prompt.visual is None and prompt.cache is None
    width = one.inputs(PROMPTS)["input_ids"].shape[1]
    assert lengths == [(width, False), (width, True), (width, True)] + [(width, False)] * 3
