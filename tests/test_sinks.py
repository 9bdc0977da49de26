"""Sink dimensions that are planted are found, sinks are counted and placed right, and the knock-out has a fair
control."""
import warnings
from dataclasses import replace
from operator import attrgetter

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoders import BUILDERS, IMAGE, PROMPTS, tiny, token_ids

from sfa_core.documents.generate import documents, make_document
from sfa_core.documents.samples import samples
from sfa_core.models.embedded import EmbeddedConfig, build_processor, train_tokenizer
from sfa_core.models.evaluate import evaluate
from sfa_core.interventions.heads import VHRConfig
from sfa_core.models.load import new_bundle
from sfa_core.attention.capture import watching
from sfa_core.interventions.prompts import decoder_layers, following
from sfa_core.interventions.redistribution import VARConfig
from sfa_core.interventions.sink_places import (
    KnockoutConfig,
    enrichment,
    measuring,
    output_gram,
    random_tokens,
    sink_table,
    visual_places,
)
from sfa_core.interventions.sinks import (
    chance_share,
    energy_of_seeds,
    find_sink_dimensions,
    planted_sinks,
    sink_threshold,
    sink_values,
)

SMALL = EmbeddedConfig(vision_layers=1, language_layers=4, initializer_range=0.1)

parts = attrgetter("records", "summary")  # of an evaluation


@pytest.fixture(scope="module")
def tokenizer():
    rows = [make_document("bar", seed).row() for seed in range(3)]
    return train_tokenizer([text for row in rows for part in row["questions"]
                            for text in (part["question"], part["answers"][0])])


@pytest.fixture(scope="module")
def bundle(tokenizer):
    return new_bundle(SMALL, tokenizer, seed=1)


@pytest.fixture(scope="module")
def asked():
    return list({sample.document: sample
                 for sample in samples(documents(5, seed=3), kinds=("read_label", "read_cell"))}.values())


@pytest.fixture(scope="module")
def one():
    return tiny("internvl")


# ---- values and dimensions

@given(seed=st.integers(0, 1000), width=st.integers(2, 300), share=st.floats(0.01, 0.9))
@settings(max_examples=50, deadline=None)
def test_a_value_beyond_tau_is_a_share_of_the_energy(seed, width, share):
    hidden = torch.randn(6, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    energy = hidden.square() / hidden.square().sum(-1, keepdim=True)
    dimensions = (0, width - 1)
    over = sink_values(hidden, dimensions) > sink_threshold(width, share)
    assert torch.equal(over, energy[:, dimensions].amax(-1) > share)
    assert torch.allclose(sink_values(7 * hidden, dimensions),
                          sink_values(hidden, dimensions)), "the size of a token does not matter"


def test_published_thresholds():
    assert sink_threshold(4096) == pytest.approx(20, abs=0.01) and (20**2 / 1024) == pytest.approx(0.39, abs=0.001)
    assert 0.05 > chance_share(1024) > chance_share(4096) and chance_share(128) > 0.05
    for wrong in (dict(width=0), dict(width=8, share=0.0), dict(width=8, share=1.0)):
        with pytest.raises(ValueError, match="expected at least one channel and a share between"):
            sink_threshold(**wrong)



@pytest.mark.parametrize("width", [64, 512])
def test_chance_rarely_exceeds_the_chance_share(width):
    energy = torch.randn(2000, width, generator=torch.Generator().manual_seed(0)).square()
    largest = (energy / energy.sum(-1, keepdim=True)).amax(-1)
    assert (largest > chance_share(width)).float().mean() < 0.02 and (
        largest > chance_share(width, 0.9)
    ).float().mean() > 0.3


def test_planted_dimensions_are_found_in_text_and_image(bundle, asked):
    with planted_sinks(bundle, dimension=70, tokens=(0, 7, 63)), planted_sinks(bundle, dimension=11, tokens=(0, 7, 63),
                                                                               size=1):
        found = find_sink_dimensions(bundle, asked)
    assert set(found.dimensions) == set(found.overlap) == {70, 11} and found.layers == (1, 2) and found.width == 128
    assert (
        found.rate == pytest.approx(3 / 64)
        and found.tokens == len(asked) * 2 * 64
        and found.seeds["visual"] == 3 * len(asked)
    )


def test_text_and_image_are_judged_apart(bundle, asked):
    with planted_sinks(bundle, dimension=70, tokens=(), size=20), planted_sinks(bundle, dimension=11, tokens=(5,),
                                                                                start=False):
        found = find_sink_dimensions(bundle, asked, batch_size=2)
    assert (found.text, found.visual, found.overlap, found.dimensions) == ((70,), (11,), (), (70, 11))


def test_a_model_without_sinks_is_told_so(bundle, asked):
    with pytest.warns(UserWarning, match="new has no sink dimensions"):
        found = find_sink_dimensions(bundle, asked)
    assert (
        (found.dimensions, found.rate, found.tokens) == ((), 0.0, 0)
        and not found.shares["kept"].any()
        and len(found.shares) >= 8
    )


def test_sinks_everywhere_are_no_sinks(bundle, asked):
    with planted_sinks(bundle, dimension=70,
                       tokens=range(0, 64, 4)), pytest.warns(UserWarning,
                                                             match="25% of the image tokens would be sinks"):
        find_sink_dimensions(bundle, asked)


def test_batches_do_not_change_what_seeds_show(bundle, asked):
    with planted_sinks(bundle, dimension=70, tokens=(3,)):
        whole, single = (energy_of_seeds(bundle, batches, (1, 2), None)
                         for batches in ([asked], [[sample] for sample in asked]))
    for kind in whole[0]:
        assert np.allclose(whole[0][kind], single[0][kind], atol=1e-5, equal_nan=True), kind
    assert whole[2]["start"] == len(asked)


@pytest.mark.parametrize("layers", [(), (4,), (-1,)])
def test_layers_that_do_not_exist_are_refused(bundle, asked, layers):
    with pytest.raises(ValueError, match="expected one or more from 0 to 3"):
        find_sink_dimensions(bundle, asked, layers=layers)


@pytest.mark.parametrize("name", BUILDERS)
def test_planting_and_layer_inputs_work_in_every_decoder(name):
    model, sizes = tiny(name), []
    with planted_sinks(model.bundle, 9, (1, 5)), following(model.bundle) as prompt:
        seen = lambda at, hidden: sizes.append(None if prompt.decoding
                                               else (sink_values(hidden, (9,)) > sink_threshold(48, 0.5), prompt.visual,
                                                     prompt.valid))
        with watching(decoder_layers(model.bundle)[1:3], seen):
            model.logits(PROMPTS, steps=2)
    assert [one is None for one in sizes] == [False, False, True, True]
    for over, visual, valid in sizes[:2]:
        assert (over & visual).sum(1).tolist() == [1, 2, 1, 0] and over[valid & (valid.cumsum(1) == 1)].all()


# ---- places and measures

def test_places_of_a_page_are_what_the_page_shows(bundle, asked):
    sample = asked[0]
    place, ink = visual_places(bundle, sample, 64), np.asarray(sample.image.convert("L"), dtype=int)
    paper = np.bincount(ink.ravel()).argmax()
    assert place.shape == (64, 8) and place["border"].sum() == 28
    for row in place.itertuples():
        cell = ink[int(row.y0) : int(row.y1), int(row.x0) : int(row.x1)]
        assert row.blank == (abs(cell - paper) <= 12).all()
        touched = any(x0 < row.x1 and x1 > row.x0 and y0 < row.y1 and y1 > row.y0
                      for x0, y0, x1, y1 in (text.box for text in sample.evidence.texts))
        assert row.background == (not touched)
    assert visual_places(bundle, replace(sample, evidence=None), 64)["background"].isna().all()
    with pytest.raises(ValueError, match="has 63 image tokens, expected 1 tiles of 64"):
        visual_places(bundle, sample, 63)


def test_tiles_have_their_own_borders_and_pixels(tokenizer):
    tiled = new_bundle(SMALL, tokenizer)
    tiled = replace(tiled, processor=build_processor(tokenizer, SMALL, max_tiles=4))
    page = samples(documents(1, seed=3, size=224, kinds=("bar",)))[:1]
    with planted_sinks(tiled, 70, (0, 64, 200)):
        table = sink_table(tiled, page, (70,), layers=(1,))
    tiles = table["tile"].nunique()
    assert (
        tiles == 5
        and len(table) == 5 * 64
        and table["border"].sum() == 5 * 28
        and set(table.loc[table["sink"], "token"]) == {0, 64, 200}
    )
    corners = table.loc[table["token"].isin((0, 64, 256)), ["x0", "y0", "x1", "y1"]].to_numpy()
    assert corners.tolist() == [[0, 0, 14, 14], [112, 0, 126, 14], [0, 0, 28, 28]], "the last tile is the thumbnail"


def test_attention_and_contribution_are_those_of_the_written_out_matrices(one):
    layer = decoder_layers(one.bundle)[1]
    kept, settings_ = {}, one.inputs(PROMPTS[:2])
    with measuring(one.bundle, (1,), (3,)) as seen, torch.no_grad():
        handle = layer.self_attn.register_forward_hook(
            lambda m, a, k, o: kept.update(k, hidden=a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        one.bundle.model(**settings_)
        handle.remove()
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb
    attention = layer.self_attn
    hidden = kept["hidden"]
    query = attention.q_norm(attention.q_proj(hidden).unflatten(-1, (6, 12))).transpose(1, 2)
    key = attention.k_norm(attention.k_proj(hidden).unflatten(-1, (2, 12))).transpose(1, 2)
    query, key = apply_rotary_pos_emb(query, key, *kept["position_embeddings"])
    value = attention.v_proj(hidden).unflatten(-1, (2, 12)).transpose(1, 2).repeat_interleave(3, dim=1)
    logits = query @ key.repeat_interleave(3, dim=1).mT * 12**-0.5
    hidden_from = torch.ones(logits.shape[-2:],
                             dtype=torch.bool).triu(1) | ~settings_["attention_mask"].bool()[:, None, None]
    chance = logits.masked_fill(hidden_from, -1e300).softmax(-1)
    visual = settings_["input_ids"] == IMAGE
    for row in range(2):
        reading = [at for at in range(len(visual[row])) if not visual[row, at] and visual[row, :at].any()]
        mean = chance[row][:, reading].mean(1)  # (H, K)
        size = torch.stack([(value[row, head] @ attention.o_proj.weight[:, 12 * head : 12 * head + 12].T).norm(dim=-1)
                            for head in range(6)])
        good = settings_["attention_mask"][row].bool()
        assert torch.allclose(seen[1]["attention"][row][good], mean.mean(0)[good], atol=1e-9)
        assert torch.allclose(seen[1]["contribution"][row][good], (mean * size).mean(0)[good], atol=1e-9)
    assert torch.equal(seen["visual"], visual)


def test_the_bias_of_an_output_projection_does_not_count():
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(12, 7)
    first = module.o_proj.weight[:, :4]
    assert torch.allclose(output_gram(module, 3)[0], first.T @ first, atol=1e-6)


def token_rows(sink, blank, document):
    return pd.DataFrame({"sink": sink, "blank": blank, "border": False, "background": np.nan, "document": document})


def test_enrichment_is_a_ratio_of_two_shares_with_its_counts():
    table = token_rows([True, True, True, False, False, False, False, False],
                       [True, True, False, True, True, False, False, False], list("aabbccdd"))
    found = enrichment(table, draws=200).set_index("place")
    assert found.loc["blank", ["sinks", "tokens", "documents"]].tolist() == [3, 8, 4]
    assert found.loc["blank", "enrichment"] == pytest.approx((2 / 3) / (4 / 8)) and pd.isna(
        found.loc["border", "enrichment"]
    ), "no token is on the border"
    assert found.loc["background", "tokens"] == 0 and pd.isna(found.loc["background", "share_all"]), (
        "unknown texts are left out, and the count says so"
    )


def test_enrichment_of_random_sinks_holds_one_and_published_numbers_give_theirs():
    rng = np.random.default_rng(0)
    table = token_rows(rng.random(6000) < 0.05, rng.random(6000) < 0.7, np.repeat(np.arange(60), 100))
    found = enrichment(table).set_index("place").loc["blank"]
    assert found["low"] < 1 < found["high"] and found["high"] - found["low"] < 0.3
    published = token_rows([True] * 1000 + [False] * 9000, [True] * 905 + [False] * 95 + [True] * 7385 + [False] * 1615,
                           np.arange(10_000) % 50)
    assert enrichment(published, draws=100).set_index("place").loc["blank",
                                                                   "enrichment"] == pytest.approx(1.09, abs=0.005)


# ---- knock-out

CONFIG = KnockoutConfig((3, 17), share=0.05)


def test_hidden_tokens_are_hidden_from_everything_behind_them(one):
    with CONFIG.attach(one.bundle) as counts:
        found = one.logits(PROMPTS)
    sinks, stack = [], decoder_layers(one.bundle)
    with following(one.bundle) as prompt:
        see = lambda at, hidden: (
            None
            if prompt.decoding
            else sinks.append((sink_values(hidden, (3, 17)) >= sink_threshold(48, 0.05)) & prompt.visual)
        )
        with watching([stack[1], stack[2]], see):
            plain = one.logits(PROMPTS)
    union, inputs = sinks[0] | sinks[1], one.inputs(PROMPTS)
    assert counts == union.sum(1).tolist() and counts[3] == 0 < counts[0]
    place = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():  # the same by hand: an attention mask with holes, places as before
        inputs["attention_mask"] = inputs["attention_mask"] * ~union
        expected = one.bundle.model(**inputs, position_ids=place).logits[:, -1].float()
    assert (
        torch.allclose(found[:, 0], expected, atol=1e-5)
        and torch.equal(found[3], plain[3])
        and (found - plain)[0].abs().max() > 1e-3
    )


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("control", [False, True])
def test_knockout_is_the_same_in_a_batch_alone_and_without_a_cache(name, control):
    model, config = tiny(name), replace(CONFIG, control=control)
    with config.attach(model.bundle) as counts:
        together, without = model.logits(PROMPTS, steps=3), model.logits(PROMPTS, steps=3, use_cache=False)
        alone = torch.cat([model.logits([prompt], steps=3) for prompt in PROMPTS])
    assert torch.allclose(together, without, atol=1e-5) and torch.allclose(together, alone, atol=1e-5)
    assert counts[:4] == counts[4:8] == counts[-4:]


def test_the_control_hides_as_many_others_once_and_for_all_layers(one):
    drawn = []
    for prompts in (PROMPTS, PROMPTS, PROMPTS[:1]):
        def take(prompt, inputs):
            sinks = torch.zeros_like(prompt.visual)
            sinks[0, prompt.visual[0].nonzero()[0]] = True
            for seed in (0, 1):
                tokens = random_tokens(prompt, sinks, seed)
                assert tokens.sum(1).tolist() == sinks.sum(1).tolist() and not (tokens & (sinks | ~prompt.visual)).any()
                drawn.append(int((prompt.visual[0].cumsum(0) - 1)[tokens[0]]))
        with following(one.bundle, take):
            one.logits(prompts, steps=1)
    assert drawn[:2] == drawn[2:4] == drawn[4:] and all(
        0 < token < sum(len(token_ids(part)) for part in PROMPTS[0]) for token in drawn
    )


# ---- through evaluate

@pytest.mark.parametrize("intervention",
                         [VARConfig((70,), ratio=0.0, mass=0.0), VHRConfig(8.0), KnockoutConfig((70,)),
                          KnockoutConfig((70,), control=True)],
                         ids=lambda one: type(one).__name__)
def test_an_evaluation_runs_under_an_intervention_and_says_so(bundle, asked, intervention):
    with planted_sinks(bundle, 70, (0, 7, 20), size=3):
        plain, plain_summary = parts(evaluate(bundle, asked, batch_size=3, max_new_tokens=6, draws=50))
        edited, summary = parts(evaluate(bundle, asked, batch_size=3, max_new_tokens=6, draws=50,
                                         intervention=intervention))
        again = evaluate(bundle, asked, batch_size=3, max_new_tokens=6, draws=50).records
    assert plain_summary["settings"]["intervention"] is None and summary["settings"]["intervention"] == repr(
        intervention
    )
    assert (edited["prediction"] != plain["prediction"]).any() and again["prediction"].tolist() == plain[
        "prediction"
    ].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert evaluate(bundle, asked[:1], max_new_tokens=2, draws=50, intervention=None).summary["n"] == 1


def test_a_wrong_intervention_leaves_the_model_as_it_was(bundle, asked):
    with pytest.raises(ValueError, match="sink dimensions are"):
        evaluate(bundle, asked, intervention=VARConfig(()))
    assert not bundle.model._forward_pre_hooks and "generate" not in vars(bundle.model)
