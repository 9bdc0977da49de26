"""An exchange of activations is a plain run with edited activations: in every family, with tiles, in batches, while the
model writes with a cache, and in a copy of the model."""
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from sfa_core.attention.stages import LAST, Stage, box_shares, locate, read_sites, stages
from sfa_core.core.families import FAMILIES, modules_at
from sfa_core.documents.counterfactuals import Pair, counterfactuals
from sfa_core.documents.samples import Evidence, Sample, TextBox
from sfa_core.interventions.patching import Patcher, apart, exchanged, pair_tokens, patch_pairs, patch_rates
from sfa_core.models.answers import generate
from sfa_core.models.load import load_model
from sfa_core.models.miniatures import miniature

WORDS = 4


def sample(name, number, side, size):
    "A page with a number at `side`, its label below, and other marks."
    page, rng = Image.new("RGB", size, "white"), np.random.default_rng(side)
    draw = ImageDraw.Draw(page)
    for x, y in rng.integers(0, min(size) - 12, (6, 2)).tolist():
        draw.rectangle((x, y, x + 6, y + 6), fill=tuple(rng.integers(0, 150, 3).tolist()))
    box = (side, 20, side + 24, 38)
    draw.text((side, 20), number, fill="black", font_size=16)
    texts = (TextBox(number, box, "value", 0, 0), TextBox("elm", (side, 60, side + 24, 70), "label", 0))
    return Sample(f"{name}/0", name, "read_label", "What is the value of elm?", (number,), page,
                  Evidence((("", "value"), ("elm", number)), texts, (0,)))


def pairs_of_size(*sizes):
    return [Pair(f"p{at}", "number", *(sample(f"p{at}/{number}", number, 30 + 5 * at, size) for number in ("12", "83")))
            for at, size in enumerate(sizes)]


PAIRS = pairs_of_size((168, 112), (112, 168), (168, 112))


@pytest.fixture(scope="module", params=[*sorted(FAMILIES), "embedded"])
def model(request):
    if request.param == "embedded":
        return load_model("embedded"), counterfactuals(3, seed=4, edits=("number",))
    return miniature(request.param), PAIRS


@torch.no_grad()
def logits_of_answers(bundle, places):
    "The logits of every token that is written, one array per step (B, V)."
    found = []
    head = bundle.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: found.append(out[:, -1]))
    try:
        generate(bundle, places.images, places.questions, WORDS)
    finally:
        hook.remove()
    return found


def check_same(ours, theirs, tolerance=1e-6):
    steps = min(len(ours), len(theirs))
    assert steps >= 1
    for one, other in zip(ours[:steps], theirs[:steps], strict=True):
        assert torch.allclose(one, other, atol=tolerance, rtol=1e-5), (one - other).abs().max()


def wrapped(module, edit):
    "Let a module's own forward run, with an edited input or output; gives back what undoes it."
    plain = module.forward
    module.forward = lambda *args, **kwargs: edit(plain, *args, **kwargs)
    return lambda: vars(module).pop("forward")


def plain_rerun(bundle, pair, stage, tokens, donors):
    "The same exchange for one pair, written down by hand for one place of the model."
    places = locate(bundle, [pair.before])
    if stage.part == "encoder":
        module = bundle.family.layers_of(bundle.model)[stage.layer - 1]

        def edit(plain, *args, **kwargs):
            out = plain(*args, **kwargs)
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            for token, value in zip(tokens, donors, strict=True):
                tile, place = divmod(int(token), hidden.shape[-2])
                hidden[(tile, place) if hidden.ndim == 3 else place] = value
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden
    else:
        language = bundle.family.language_of(bundle.model)
        module = [*modules_at(language, "layers.*"), language.norm][stage.layer]

        def edit(plain, hidden, *args, **kwargs):
            if hidden.shape[1] > 1:  # the prompt, and not a word behind it
                hidden = hidden.clone()
                for token, value in zip(tokens, donors, strict=True):
                    hidden[0, places.prompt[0][int(token)]] = value
            return plain(hidden, *args, **kwargs)

    undo = wrapped(module, edit)
    try:
        return logits_of_answers(bundle, places)
    finally:
        undo()


def test_an_exchange_is_a_plain_run_with_edited_activations(model):
    bundle, pairs = model
    for pair in pairs[:1]:
        patcher = Patcher(bundle, [pair])
        plain, changed = logits_of_answers(bundle, patcher.places), []
        for stage in stages(bundle):
            shown = patcher.places.shown(0, stage)
            tokens = pair_tokens(shown, pair, "evidence", np.random.default_rng(0))
            boxes = [one.evidence.texts[one.evidence.answer[0]].box for one in (pair.before, pair.after)]
            touched = [at for at in range(len(shown)) if not np.isnan(shown[at]).any() and any(
                min(shown[at][2], x1) > max(shown[at][0], x0) and min(shown[at][3], y1) > max(shown[at][1], y0)
                for x0, y0, x1, y1 in boxes)]
            assert tokens.tolist() == touched and touched
            with exchanged(bundle, patcher.slots, patcher.values, [stage]):
                ours = logits_of_answers(bundle, patcher.places)
            check_same(ours, plain_rerun(bundle, pair, stage, tokens, patcher.values[stage]))
            changed.append((ours[0] - plain[0]).abs().max() > 1e-4)
        assert any(changed), "no exchange changed anything: the test would pass without one"
        check_same(logits_of_answers(bundle, patcher.places), plain)  # nothing is left behind


def test_batches_are_as_one_by_one(model):
    bundle, pairs = model
    steps = [stage for stage in stages(bundle) if stage.layer in (0, 1)]
    whole = Patcher(bundle, pairs, tokens="random", seed=3)
    with exchanged(bundle, whole.slots, whole.values, steps):
        together = logits_of_answers(bundle, whole.places)
    for at, pair in enumerate(pairs):
        single = Patcher(bundle, [pair], tokens="random", seed=3)
        with exchanged(bundle, single.slots, single.values, steps):
            alone = logits_of_answers(bundle, single.places)
        check_same([alone[0]], [together[0][at : at + 1]], 2e-5)  # padding changes the order of sums


def test_the_whole_page_exchanged_is_the_other_page(model):
    bundle, pairs = model
    reply = Patcher(bundle, pairs).replies(())
    mine = generate(bundle, [pair.before.image for pair in pairs],
                    [(at, pair.before.question) for at, pair in enumerate(pairs)], 16)
    assert reply == [bundle.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens, _ in mine]


def test_a_copy_has_its_own_exchange_and_the_model_is_left_as_it_was():
    bundle, pair = miniature("internvl"), PAIRS[0]
    patcher = Patcher(bundle, [pair])
    with exchanged(bundle, patcher.slots, patcher.values, [Stage("projector")]):
        other = replace(bundle, model=copy.deepcopy(bundle.model), cache={})
        ours, theirs = logits_of_answers(bundle, patcher.places), logits_of_answers(other, patcher.places)
    check_same(ours, theirs)
    check_same(logits_of_answers(other, patcher.places), ours)  # a copy keeps what it was copied with
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in modules_at(
        bundle.family.language_of(bundle.model), "layers.*"))
    with pytest.raises(ZeroDivisionError), exchanged(bundle, patcher.slots, patcher.values, [Stage("encoder", 1)]):
        1 / 0
    check_same(logits_of_answers(bundle, patcher.places), logits_of_answers(miniature("internvl"), patcher.places))


def test_sites_are_means_of_their_tokens_whatever_the_batch(model):
    bundle, pairs = model
    asked = [pair.before for pair in pairs]
    boxes = {"number": [one.evidence.texts[one.evidence.answer[0]].box for one in asked]}
    whole, single = read_sites(bundle, asked, boxes), read_sites(bundle, asked, boxes, batch_size=1)
    assert set(whole) == {(stage, "number") for stage in stages(bundle)} | {
        (stage, LAST) for stage in stages(bundle) if stage.part != "encoder"}
    for key, values in whole.items():
        assert np.allclose(values, single[key], atol=5e-5), key
    patcher = Patcher(bundle, [pairs[0]])
    back = Patcher(bundle, [Pair("back", "number", pairs[0].after, pairs[0].before)])
    stage = Stage("language", 1)
    share = box_shares(patcher.places.boxes[0], boxes["number"][0])
    kept = back.values[stage].numpy()[[at in np.flatnonzero(share) for at in
                                       pair_tokens(patcher.places.boxes[0], pairs[0], "evidence", None)]]
    assert np.allclose(whole[stage, "number"][0], share[share > 0] @ kept, atol=5e-5)


def test_only_pairs_right_on_both_pages_count():
    bundle, pairs = load_model("embedded"), counterfactuals(6, seed=4, edits=("number",))
    rows = patch_pairs(bundle, pairs, chosen=[Stage("projector")], ways=("one stage",), batch_size=4)
    rates, plain = patch_rates(rows), rows[rows["way"] == "plain"]
    right = sum(((plain["tokens"] == "own") & (plain["outcome"] == "stayed")).groupby(plain["id"]).any()
                & ((plain["tokens"] == "donor") & (plain["outcome"] == "flipped")).groupby(plain["id"]).any())
    assert (rates["n"] == right).all() and (rates["n"] + rates["left_out"] == 6).all()
    assert np.allclose(rates[["flipped", "stayed", "other"]].sum(axis=1), 1)
    wrong = rows.assign(outcome="other")
    with pytest.raises(ValueError, match="none of 6 pairs is answered right on both pages"):
        patch_rates(wrong)


def test_pages_of_another_size_and_unknown_tokens_are_refused():
    bundle = miniature("qwen2_5_vl")
    wide, tall = sample("a", "12", 30, (168, 112)), sample("b", "83", 30, (84, 112))
    with pytest.raises(ValueError, match="different image tokens, expected pages of one size"):
        Patcher(bundle, [Pair("a", "number", wide, tall)])
    with pytest.raises(ValueError, match="expected 2 and one of evidence, label"):
        Patcher(bundle, PAIRS[:1], tokens="everything")
    assert len(apart([wide, wide])) == 2
