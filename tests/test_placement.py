"""A model cut between projector and language model has the loss and the gradients of the whole, to the last bit on
a CPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_finetune_arms import QUICK, tiny
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from sfa_core.models.sequences import answer_loss, training_batch
from sfa_core.structure.inject import inject
from sfa_core.documents.generate import documents
from sfa_core.training.finetune import finetune
from sfa_core.training.arms import FinetuneConfig
from sfa_core.core.memory import held_bytes
from sfa_core.models.load import load_model, place, save_model
from sfa_core.training.placement import LanguageSide, cut_loss, flatten, measured_step, restore


@pytest.fixture(scope="module")
def charts():
    return documents(11, seed=5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_model(tiny(), tmp_path_factory.mktemp("model") / "tiny")


def gradients(bundle, batch, loss):
    "Loss, targets and gradients of all weights of encoder, structure and projector."
    bundle.model.requires_grad_(False)
    parts = bundle.family.tower_of(bundle.model), bundle.family.projector_of(bundle.model)
    weights = {f"{i}.{name}": weight for i, part in enumerate(parts)
               for name, weight in part.requires_grad_(True).named_parameters()}
    total, targets = loss(bundle.model, batch)
    (total / targets).backward()
    found = {name: weight.grad for name, weight in weights.items() if weight.grad is not None}
    bundle.model.zero_grad()
    return total.item(), targets, found


def assert_same(ours, whole):
    assert (
        ours[1] == whole[1]
        and np.isclose(ours[0], whole[0], rtol=1e-5)
        and ours[2].keys() == whole[2].keys()
        and len(whole[2]) > 30
    )
    for name, gradient in whole[2].items():
        assert torch.allclose(ours[2][name], gradient, rtol=1e-4, atol=1e-6), name


def with_structure(bundle):
    inject(bundle, seed=3)
    return bundle


@pytest.fixture(scope="module")
def whole(saved, charts):
    bundle = with_structure(load_model(saved, placement="cpu"))
    return gradients(bundle, training_batch(bundle, list(charts)[:3]), answer_loss)


def test_a_cut_on_one_cpu_changes_no_bit(saved, charts, whole):
    bundle = with_structure(load_model(saved, placement="cpu,cpu"))
    total, targets, found = gradients(bundle, training_batch(bundle, list(charts)[:3]), cut_loss(LanguageSide(bundle)))
    assert (total, targets) == whole[:2] and found.keys() == whole[2].keys() and len(found) > 30
    assert max(float((found[name] - gradient).abs().max()) for name, gradient in whole[2].items()) == 0.0


def test_a_measured_step_has_the_same_gradients_and_the_weights_of_both_sides_are_those_of_the_whole(
    saved, charts, whole
):
    bundle = with_structure(load_model(saved, placement="cpu"))
    batch = training_batch(bundle, list(charts)[:3])
    bundle.model.requires_grad_(False)
    learns = dict(bundle.family.tower_of(bundle.model).requires_grad_(True).named_parameters())
    gradients(bundle, batch, answer_loss)  # which of them take part
    taking_part = {name: weight for name, weight in learns.items() if f"0.{name}" in whole[2]}
    loss, uncut, held = measured_step(bundle, taking_part, batch)
    cut, found, apart = measured_step(bundle, taking_part, batch, LanguageSide(bundle))
    assert cut == loss == pytest.approx(whole[0] / whole[1]) and len(found) > 20
    for name, gradient in found.items():
        assert torch.equal(gradient, uncut[name]) and torch.equal(gradient, whole[2][f"0.{name}"]), name
    language = held_bytes([bundle.family.language_of(bundle.model), bundle.model.lm_head])
    assert (
        apart["language"]["weights"] == language and apart["vision"]["weights"] + language == held["whole"]["weights"]
    )
    assert 0 < apart["vision"]["peak"] < held["whole"]["peak"] and 0 < apart["language"]["peak"] < held["whole"]["peak"]
    assert apart["vision"]["learning"] == held["whole"]["learning"] and apart["language"]["learning"] == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_arm_trained_across_the_cut_is_the_arm_trained_whole(saved, charts, tmp_path, checkpointing):
    config = FinetuneConfig("vision", **QUICK, checkpointing=checkpointing)
    one = finetune(load_model(saved, placement="cpu"), charts, config, tmp_path / "one", progress=False)
    near = load_model(saved, placement="cpu,cpu")
    two = finetune(near, charts, config, tmp_path / "two", progress=False, loss=cut_loss(LanguageSide(near)))
    assert two.log.loss.equals(one.log.loss) and two.log.gradient_norm.equals(one.log.gradient_norm)
    assert two.log.targets.equals(one.log.targets) and sorted(p.name for p in two.arm.iterdir()) == sorted(
        p.name for p in one.arm.iterdir()
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("placement", ["cpu,cuda:0", "cuda:0,cpu", "cuda:0"])
def test_two_devices_have_the_gradients_of_one(saved, charts, whole, placement):
    bundle = load_model(saved, placement=placement)
    bundle = with_structure(bundle)
    for loss in (answer_loss, cut_loss(LanguageSide(bundle))):
        total, targets, found = gradients(bundle, training_batch(bundle, list(charts)[:3]), loss)
        assert_same((total, targets, {name: gradient.cpu() for name, gradient in found.items()}), whole)
    place(bundle, "cpu")


def test_only_targets_get_logits(saved, charts, whole):
    "Of all tokens of the batch, image tokens above all, only those that are trained on reach the head."
    bundle = load_model(saved, placement="cpu")
    batch, seen = training_batch(bundle, list(charts)[:3]), []
    bundle.model.lm_head.register_forward_hook(lambda module, given, output: seen.append(output.shape))
    _, targets = cut_loss(LanguageSide(bundle))(bundle.model, batch)
    assert [shape[:-1].numel() for shape in seen] == [targets] and targets < batch["input_ids"].numel() / 2


def test_the_gradients_of_a_loss_are_fetched_once(saved, charts):
    bundle = load_model(saved, placement="cpu")
    side, batch = LanguageSide(bundle), training_batch(bundle, list(charts)[:2])
    with pytest.raises(RuntimeError, match="fetched once, after it was computed"):
        side.gradients(1.0)
    total, targets = cut_loss(side)(bundle.model, batch)
    assert all(gradient.shape == leaf.shape for gradient, leaf in zip(side.gradients(1.0), side.leaves, strict=True))
    with pytest.raises(RuntimeError, match="fetched once, after it was computed"):
        side.gradients(1.0)


def test_memory_that_runs_out_on_the_language_side_halves_the_documents(saved, charts, tmp_path, monkeypatch):
    config = FinetuneConfig("projector", **QUICK)
    plenty = finetune(load_model(saved, placement="cpu"), charts, config, tmp_path / "a", progress=False)
    near, sound = load_model(saved, placement="cpu,cpu"), LanguageSide.loss

    def hungry(side, inputs, features, pattern):
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return sound(side, inputs, features, pattern)

    monkeypatch.setattr(LanguageSide, "loss", hungry)
    little = finetune(near, charts, config, tmp_path / "b", progress=False, loss=cut_loss(LanguageSide(near)))
    assert (little.log.parts == 2).all() and little.log.targets.equals(plenty.log.targets)
    np.testing.assert_allclose(plenty.log.loss, little.log.loss, rtol=1e-4)


def test_features_for_deeper_layers_are_cut_too():
    "Qwen3-VL gives features of inner encoder layers to the first layers of its language model."
    vision = dict(depth=3, hidden_size=32, intermediate_size=64, num_heads=2, patch_size=14, spatial_merge_size=2,
                  temporal_patch_size=2, out_hidden_size=32,
                  num_position_embeddings=16, deepstack_visual_indexes=[0, 1])
    places = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2], mrope_interleaved=True)
    text = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
                num_key_value_heads=1, head_dim=16,
                rope_parameters=places)
    torch.manual_seed(0)
    config = Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=5, vision_start_token_id=6,
                           vision_end_token_id=7, video_token_id=8)
    model = Qwen3VLForConditionalGeneration(config).eval()
    ids = torch.tensor([[6, 5, 5, 5, 5, 7, 10, 11, 12, 13]] * 2)
    batch = dict(input_ids=ids, labels=torch.where(ids > 10, ids, -100), position_ids=torch.arange(10).expand(3, 2, 10),
                 attention_mask=torch.ones_like(ids),
                 pixel_values=torch.randn(32, 3 * 2 * 14 * 14), image_grid_thw=torch.tensor([[1, 4, 4]] * 2))
    side = LanguageSide(SimpleNamespace(model=model, devices=[torch.device("cpu")] * 2))
    found = {}
    for name, loss in (("whole", answer_loss), ("cut", cut_loss(side))):
        model.zero_grad()
        total, targets = loss(model, batch)
        total.backward()
        found[name] = total.item(), {key: weight.grad.clone()
                                     for key, weight in model.model.visual.named_parameters()
                                     if weight.grad is not None}
    assert targets == 6 and len(side.leaves) > 2 and any("deepstack" in key for key in found["whole"][1])
    assert np.isclose(found["cut"][0], found["whole"][0]) and found["cut"][1].keys() == found["whole"][1].keys()
    assert all(torch.allclose(found["cut"][1][key], gradient, rtol=1e-4, atol=1e-6)
               for key, gradient in found["whole"][1].items())


def test_nested_lists_of_features_come_back_as_they_were():
    # as Qwen3-VL gives them: per image, and per layer
    deep = [torch.zeros(2), [[torch.ones(1)], [torch.ones(3), torch.ones(4)]]]
    tensors = []
    pattern = flatten(deep, tensors)
    again = restore(pattern, tensors)
    assert len(tensors) == 4 and again[1][1][1] is deep[1][1][1] and flatten([None], []) == [None]
