"""Consistency losses are what their formulas say, pull where they should, and cost no table of all pairs."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sfa_core.tokens.adaptive import attach_tokens, detach_tokens
from sfa_core.models.sequences import IGNORE, answer_loss, training_batch
from sfa_core.structure.inject import eject, inject
from sfa_core.training.checkpoints import TIMING
from sfa_core.training.consistency import SCRConfig, consistency_table, with_consistency
from sfa_core.training.entropy import Placed, dense_queries, entropy_loss, tile_density
from sfa_core.tokens.density import load_density
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.embedded import train_tokenizer
from sfa_core.training.finetune import finetune
from sfa_core.training.arms import FinetuneConfig, load_arm
from sfa_core.attention.capture import catching
from sfa_core.models.load import new_bundle
from sfa_core.tokens.patches import PatchConfig
from sfa_core.training.stream import DocumentSet, Mixture, batches
from sfa_core.training.visible import number_page, number_pages, number_targets, shown_boxes
from tiny_internvl import SMALLEST

TINY = replace(SMALLEST, initializer_range=0.3)
ALONE = {name: SCRConfig(**dict(entropy=0, grounding=0, stability=0, floor=0.0) | {name: 1.0})
         for name in ("entropy", "grounding", "stability")}
QUICK = dict(steps=3, batch_size=4, questions=3, learning_rate=5e-3, structure_rate=5e-3, checkpoint_every=0)


@pytest.fixture(scope="module")
def charts():
    return documents(8, seed=5)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is the value of oak? yes no 1 2 3 4 5 6 7 8 9 0"], 300)


@pytest.fixture
def bundle(tokenizer):
    return new_bundle(TINY, tokenizer, 0, name="tiny")


def run(bundle, rows, config, learn=True):
    batch = training_batch(bundle, rows)
    with torch.set_grad_enabled(learn):
        return with_consistency(bundle, rows, batch, config, lambda: answer_loss(bundle.model, batch))


def attached(bundle, what):
    "Attach structure, adaptive patches, or both, as the arms do."
    if "structure" in what:
        inject(bundle)
        with torch.no_grad():
            [p.mul_(20) for name, p in bundle.model.named_parameters() if ".structure." in name]
    if "patches" in what:
        attach_tokens(bundle, PatchConfig(bucket=8), estimator=load_density()[0], blocks="blocks" in what)


# The formulas


@pytest.mark.parametrize("what", [(), ("structure",), ("patches",), ("structure", "patches", "blocks")])
def test_entropy_in_chunks_is_the_entropy_of_the_attention_the_encoder_shows(bundle, charts, what):
    attached(bundle, what)
    rows, layers = list(charts)[:4], bundle.family.attentions_of(bundle.model)
    if not what:
        bundle.model.set_attn_implementation({"vision_config": "eager"})
        own = []
        handle = layers[-1].register_forward_hook(lambda module, args, output: own.append(output[1]))
    pixels, seen = training_batch(bundle, rows)["pixel_values"], []
    with catching(bundle.model, layers[-1:], lambda at, call: seen.append(call)):
        answer_loss(bundle.model, training_batch(bundle, rows))
    config = replace(ALONE["entropy"], density=0.3)
    whole, small = (float(run(bundle, rows, replace(config, rows=n), learn=False)[1]["entropy"]) for n in (10_000, 3))
    assert whole == pytest.approx(small, rel=1e-5) and 0 < whole < math.log(65)
    if not what:
        dense = torch.from_numpy(tile_density(bundle, pixels).reshape(4, -1) > 0.3)
        eager = torch.special.entr(own[0]).sum(-1)[:, :, 1:]  # (B, H, patches)
        handle.remove()
        assert whole == pytest.approx(float(eager[dense[:, None].expand_as(eager)].mean()), rel=1e-4)
    assert len({call.query.shape[2] for call in seen}) > 1 if "patches" in what else seen[0].query.shape[2] == 65


def test_adaptive_rows_count_their_areas_and_no_padding(bundle, charts):
    rows = list(charts)[:4]
    attached(bundle, ("patches",))
    plain = float(run(bundle, rows, ALONE["entropy"], learn=False)[1]["entropy"])
    detach_tokens(bundle)
    attached(bundle, ("structure", "patches"))
    with torch.no_grad():
        [p.zero_() for name, p in bundle.model.named_parameters() if ".structure." in name]
    result, losses, counts = run(bundle, rows, ALONE["entropy"], learn=False)
    # a structural bias of zero is none, with the same areas
    assert float(losses["entropy"]) == pytest.approx(plain, rel=1e-5)
    assert float(counts["entropy_relative"] / counts["entropy_rows"]) <= 1 + 1e-6


def test_numbers_of_a_page_are_matched_with_their_tokens_and_no_others(bundle, charts):
    rows = list(charts)
    pages = number_pages(rows)
    shown = [shown_boxes(bundle, page.size) for page in pages]
    batch = training_batch(bundle, rows)
    targets = number_targets(bundle, batch, pages, shown)
    images = targets.images
    assert 0 < targets.skipped < sum(len(page.asked) for page in pages)
    for (row, at), mark, other in zip(targets.digits.tolist(), targets.positive, targets.negative):
        answer = bundle.tokenizer.decode([int(batch["labels"][row, at + 1])])
        found = [(int(images[i, 0]), i - 64 * int(images[i, 0])) for i in mark.nonzero()[:, 0].tolist()]
        assert {page for page, _ in found} == {row}  # the value of the own page
        touched = [{v for v, box in zip(pages[row].values, pages[row].boxes) if overlap(shown[row][token], box)}
                   for _, token in found]
        assert all(len(values) == 1 and answer.strip() in f"{next(iter(values)):g}" for values in touched)
        value = next(iter(touched[0]))
        for i in other.nonzero()[:, 0].tolist():
            page, token = divmod(i, 64)
            assert value not in {v
                                 for v, box in zip(pages[page].values, pages[page].boxes)
                                 if overlap(shown[page][token], box)}
        assert {divmod(i, 64)[0] for i in other.nonzero()[:, 0].tolist()} - {row}  # other pages of the batch take part


def test_every_digit_of_a_visible_answer_is_a_target_and_no_other_token(bundle, charts):
    rows = list(charts)
    pages, batch = number_pages(rows), training_batch(bundle, rows)
    targets = number_targets(bundle, batch, pages, [shown_boxes(bundle, page.size) for page in pages])
    labels = batch["labels"]
    texts = [bundle.tokenizer.decode([int(labels[row, at + 1])]) for row, at in targets.digits.tolist()]
    assert (
        texts
        and all(re.search(r"\d", text) for text in texts)
        and len(set(map(tuple, targets.digits.tolist()))) == len(texts)
    )
    every = sum(bool(re.search(r"\d", bundle.tokenizer.decode([int(token)]))) for token in labels[labels != IGNORE])
    assert len(texts) < every, "digits of answers that are not printed, or touch another number, are no targets"
    assert (
        targets.positive.shape == targets.negative.shape == (len(texts), len(targets.images))
        and targets.positive.any(1).all()
    )


@pytest.mark.parametrize("printed, answer, same", [
    ("1,250", "1250", True), ("12 %", "12%", True), ("5.2 million", "5,200,000", True), ("$ 80", "80", True),
    ("−3.5", "-3.5", True),
    ("1 250", "1250", True), ("5만", "50000", True), ("12", "13", False), ("Q1", "1", False), ("12 of 80", "12", False)])  # noqa: E501
def test_a_number_is_the_same_however_it_is_written(printed, answer, same):
    page = number_page(Image.new("RGB", (40, 20)), [("oak", (0, 0, 9, 9)), (printed, (10, 0, 30, 9))], [(answer, [1])])
    assert [place for _, place in page.asked] == ([[0]] if same else [[]])


def test_targets_of_pages_without_numbers_are_empty(bundle, charts):
    rows = [dict(row, texts=[]) for row in list(charts)[:2]]
    pages, batch = number_pages(rows), training_batch(bundle, rows)
    targets = number_targets(bundle, batch, pages, [shown_boxes(bundle, page.size) for page in pages])
    assert targets.digits.shape == (0, 2) and targets.positive.shape == (0, len(targets.images))
    assert targets.skipped == sum(len(page.asked) for page in pages)
    with pytest.raises(ValueError, match="the batch has .* image tokens, boxes are given for 0"):
        number_targets(bundle, batch, pages, [np.zeros((0, 4))] * 2)


def overlap(a, b):
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])


def test_samples_and_documents_have_the_same_numbers(charts):
    for a, b in zip(number_pages(list(charts)), number_pages(samples(charts)), strict=True):
        assert (a.size, a.values, a.asked) == (b.size, b.values, b.asked) and np.array_equal(a.boxes, b.boxes)


def test_tokens_of_leaves_show_their_leaves(bundle, charts):
    attached(bundle, ("structure", "patches"))
    result, losses, counts = run(bundle, list(charts)[:3], ALONE["grounding"])
    control = bundle.family.tower_of(bundle.model).token_control
    for plan in control.last:
        boxes = shown_boxes(bundle, (112, 112), None, [plan])
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        assert areas.sum() == pytest.approx(112 * 112) and len(boxes) == plan.kept(1).sum()
    assert losses["grounding"].requires_grad and counts["grounding_digits"] > 0


# Where they pull


@pytest.mark.parametrize("name", ALONE)
@pytest.mark.parametrize("what", [("structure",), ("structure", "patches", "blocks")])
def test_a_step_along_the_gradient_lowers_each_loss_alone(bundle, charts, name, what):
    attached(bundle, what)
    rows, weights = list(charts)[:4], [p for n, p in bundle.model.named_parameters() if "vision_tower" in n]
    before = run(bundle, rows, ALONE[name])[1][name]
    gradients = torch.autograd.grad(before, weights, allow_unused=True)
    length = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients):
            if gradient is not None:
                weight.sub_(gradient * 0.02 / length)
    assert float(run(bundle, rows, ALONE[name], learn=False)[1][name]) < float(before)


@pytest.mark.parametrize("what", [("structure",), ("structure", "patches", "blocks")])
def test_checkpointed_activations_give_the_same_gradients(bundle, charts, what):
    attached(bundle, what)
    rows, weights = list(charts)[:3], [p for n, p in bundle.model.named_parameters() if "vision_tower" in n]
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            bundle.model.train().activation_checkpointing_enable()
        (total, _), losses, _ = run(bundle, rows, SCRConfig(1, 1, 1, floor=0.0))
        found.append(torch.autograd.grad(total / 100 + sum(losses.values()), weights, allow_unused=True))
    for a, b in zip(*found):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-5, rtol=1e-3))


def test_losses_leave_the_model_as_it_was(bundle, charts):
    hooks = lambda: [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in bundle.model.modules()]
    attached(bundle, ("structure", "patches", "blocks"))
    rows = list(charts)[:3]
    batch = training_batch(bundle, rows)
    before = float(answer_loss(bundle.model, batch)[0])
    known = hooks()  # those of adaptive patches, and what a model adds itself when it first runs
    run(bundle, rows, SCRConfig())
    assert float(answer_loss(bundle.model, batch)[0]) == before and hooks() == known
    detach_tokens(bundle)
    eject(bundle)


# Nothing to look at


def test_a_batch_without_text_or_numbers_gives_zero_and_no_nan(bundle, charts):
    row = dict(list(charts)[0])
    white = documents(1, seed=5)[0]["image"]
    white.paste((255, 255, 255), (0, 0, *white.size))
    blank = row | {"image": white, "texts": [],
                   "questions": [dict(id="q", kind="k", question="Is it?", answers=["yes"], evidence=[])]}
    (total, targets), losses, counts = run(bundle, [blank], SCRConfig())
    assert float(losses["entropy"]) == 0 == float(losses["grounding"]) and counts["entropy_rows"] == 0
    assert counts["grounding_questions"] == counts["grounding_skipped"] == 1 and counts["grounding_digits"] == 0
    (total + sum(losses.values())).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in bundle.model.parameters())
    without = {name: value for name, value in row.items() if name != "texts"}
    assert run(bundle, [without], ALONE["grounding"])[2]["grounding_skipped"] == len(row["questions"])


def test_padding_and_special_tokens_are_never_dense(bundle, charts):
    attached(bundle, ("structure", "patches"))
    seen = []
    control = bundle.family.tower_of(bundle.model).token_control
    rows = list(charts)[:4]
    batch = training_batch(bundle, rows)
    with catching(bundle.model, bundle.family.attentions_of(bundle.model)[-1:],
                  lambda at, call: seen.append(Placed.now(call, control))):
        answer_loss(bundle.model, batch)
    for placed in seen:
        dense = dense_queries(placed, np.ones((4, 8, 8)), 1, 0.3)
        assert dense.sum(1).tolist() == [len(plan) for plan in placed.plans] and not dense[:, 0].any()
    assert entropy_loss([])[0] == 0


def test_each_tile_has_its_own_density_also_where_two_are_cut_alike(bundle, charts):
    attached(bundle, ("patches",))
    control, seen = bundle.family.tower_of(bundle.model).token_control, []
    rows = [charts[at] for at in (0, 1, 0, 2)]
    with catching(bundle.model, bundle.family.attentions_of(bundle.model)[-1:],
                  lambda at, call: seen.append(Placed.now(call, control))):
        answer_loss(bundle.model, training_batch(bundle, rows))
    alike = np.array_equal(control.last[0].boxes, control.last[2].boxes)
    assert alike and len(seen) > 1, "two tiles are cut alike, and lengths run apart"
    assert sorted(tile for placed in seen for tile in placed.tiles) == [0, 1, 2, 3]
    assert all(plan is control.last[tile] for placed in seen
               for plan, tile in zip(placed.plans, placed.tiles, strict=True))
    density = np.zeros((4, 8, 8))
    density[2] = 1.0
    for placed in seen:
        dense = dense_queries(placed, density, 1, 0.3).sum(1).tolist()
        assert dense == [len(plan) * (tile == 2) for plan, tile in zip(placed.plans, placed.tiles)]


@pytest.mark.parametrize("wrong",
                         [dict(entropy=-1), dict(density=2), dict(temperature=0), dict(distance="far"), dict(layers=0),
                          dict(rows=0)])
def test_a_rule_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SCRConfig(**wrong)


# In training


def test_every_loss_and_its_gradient_norm_are_in_the_log(bundle, charts, tmp_path):
    scr = SCRConfig(0.5, 0.5, 0.5, norms_every=2)
    result = finetune(bundle, charts, FinetuneConfig("full", **QUICK, scr=scr), tmp_path / "a", progress=False)
    log = result.log
    names = ("answer", "entropy", "grounding", "stability")
    np.testing.assert_allclose(log["loss"], sum(log[f"loss_{name}"] for name in names), rtol=1e-6)
    assert all((log[f"gradient_norm_{name}"].notna() == [True, False, True]).all()
               and (log[f"gradient_norm_{name}"].dropna() > 0).all() for name in names)
    table = consistency_table(log)
    assert (table["entropy"] > 0).all() and (table["relative"] <= 1.001).all()
    assert table["at_floor"].between(0, 1).all() and table["skipped"].between(0, 1).all()
    silent = finetune(bundle, charts, FinetuneConfig("full", **QUICK, scr=replace(scr, norms_every=0)), tmp_path / "b",
                      progress=False)
    assert np.array_equal(silent.log["loss"], log["loss"])  # measuring norms changes nothing
    with load_arm(bundle, result.arm) as loaded:
        assert loaded.about["config"]["scr"]["entropy"] == 0.5 and loaded.about["against"] == "vision_adat"


def test_the_arm_full_has_the_losses_and_no_other_arm_has_them_unasked():
    assert FinetuneConfig("full").scr == SCRConfig() and FinetuneConfig("vision").scr is None


def test_the_grounding_loss_needs_the_language_model_here(bundle, charts, tmp_path):
    with pytest.raises(ValueError, match="needs the states of a language model in this process"):
        finetune(bundle, charts, FinetuneConfig("full", **QUICK), tmp_path, loss=answer_loss, progress=False)


# Mixtures


def test_a_mixture_is_the_same_however_it_is_cut_and_resumes_exactly(bundle, tmp_path):
    parts = {"bars": documents(5, seed=1, kinds=("bar",)), "tables": documents(3, seed=1, kinds=("table",))}
    mixed, other = Mixture(parts, {"bars": 2, "tables": 1}), Mixture(parts, {"bars": 1, "tables": 1})
    ids = lambda batch: [row["id"] for [row] in batch]
    whole, cut = batches(mixed, 6, questions=2), batches(mixed, 6, 3, questions=2)
    assert ids(whole(700, 0)) == [i for micro in range(3) for i in ids(cut(700, micro))]
    # only shares matter
    assert whole(700, 0) == batches(Mixture(parts, {"bars": 4, "tables": 2}), 6, questions=2)(700, 0)
    config = FinetuneConfig("control", **QUICK | dict(checkpoint_every=1))
    full = finetune(bundle, mixed, config, tmp_path / "a", progress=False)
    for until in (1, 2, None):
        parted = finetune(bundle, mixed, config, tmp_path / "b", until=until, progress=False)
    assert parted.log.drop(columns=list(TIMING)).equals(full.log.drop(columns=list(TIMING)))
    with pytest.raises(ValueError, match="holds the arm of another training, data is"):
        finetune(bundle, other, config, tmp_path / "a", progress=False)
    single = DocumentSet(parts["bars"])
    assert [index for _, index in single.visit(0, 0, 5)] == [
        index for _, index in Mixture({"bars": parts["bars"]}).visit(0, 0, 5)
    ]


@pytest.mark.parametrize("sources,weights", [({}, None), ({"a": [1]}, {"b": 1}), ({"a": [1]}, {"a": 0})])
def test_a_mixture_without_weights_is_refused(sources, weights):
    with pytest.raises(ValueError, match="a finite weight above 0 for each is expected"):
        Mixture(sources, weights)
