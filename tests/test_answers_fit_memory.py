"""Answers fit memory: encoded in parts, a batch whose computed peak fits, halved where memory runs out, unchanged."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLConfig

import sfa_core.models.answers as answers_module
import sfa_core.models.footprint as footprint_module
from sfa_core.core.families import FAMILIES
from sfa_core.core.memory import MemoryProbe, held_bytes
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.answers import answer, generate
from sfa_core.models.sequences import prompt_tokens
from sfa_core.models.evaluate import evaluate
from sfa_core.models.footprint import (
    ENCODER_BYTES,
    USABLE,
    answering_footprint,
    image_patches,
    largest_fit,
    patch_bytes,
    patches_at_once,
    plan_answers,
)
from sfa_core.models.footprint import weight_bytes
from sfa_core.models.images import image_batch, image_features
from sfa_core.models.miniatures import miniature
from sfa_core.tokens.adaptive import adaptive_tokens
from sfa_core.tokens.patches import PatchConfig

FACTOR = 1.3  # between the computed and the measured peak, without weights and pixels, either way
SIZES = [(56, 56), (180, 70), (60, 130)]  # pixels


def pictures():
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in SIZES]


# Encoded in parts


@pytest.mark.parametrize(
    "family, tiles", [(name, tiles) for name, row in FAMILIES.items()
                      for tiles in ([None] if row.native else [None, 1])]
)
def test_images_encoded_in_parts_have_the_features_of_all_at_once(family, tiles):
    bundle, passes = miniature(family), []
    bundle.model.double()
    batch = image_batch(bundle, pictures(), tiles)
    hook = bundle.family.projector_of(bundle.model).register_forward_hook(lambda *_: passes.append(0))
    with torch.no_grad():
        whole = image_features(bundle, batch)
        assert len(passes) == 1
        for patches in (1, 40, 10**9):
            passes.clear()
            parts = image_features(bundle, batch, patches_at_once=patches)
            assert (len(passes) == 1) == (patches == 10**9)
            assert len(parts.images) == len(whole.images) and len(parts.deeper) == len(whole.deeper) == (
                family == "qwen3_vl"
            )
            for ours, theirs in zip(
                [*parts.images, *sum(map(list, parts.deeper), [])],
                [*whole.images, *sum(map(list, whole.deeper), [])],
                strict=True,
            ):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
            chosen, expected = (found.choose([2, 0, 2]).pooler_output for found in (parts, whole))
            assert type(chosen) is type(expected)
    hook.remove()


@pytest.mark.parametrize("family", ["internvl", "llava_onevision"])
def test_adaptive_tokens_are_those_of_each_part(family):
    bundle, page = miniature(family), Image.fromarray(np.full((130, 180, 3), 255, dtype=np.uint8))
    page.paste(pictures()[0], (20, 20))
    with adaptive_tokens(bundle, PatchConfig(coarse=None)), torch.no_grad():
        batch = image_batch(bundle, [page, *pictures()])
        whole, parts = image_features(bundle, batch), image_features(bundle, batch, patches_at_once=1)
    words = [tokens.count(bundle.model.config.image_token_id) for tokens in batch.tokens]
    assert [len(part) for part in parts.images] == words and words[0] < image_patches(bundle)[1]
    for ours, theirs in zip(parts.images, whole.images, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_the_encoder_gets_no_more_patches_than_its_states_may_take():
    bundle, seen = miniature("internvl"), []
    tile = len(bundle.family.grid(bundle.model))
    bundle.family.tower_of(bundle.model).register_forward_pre_hook(
        lambda module, given, named: seen.append(len(named["pixel_values"])), with_kwargs=True
    )
    asked = samples(documents(4, seed=1))[:8]
    answer(bundle, asked, max_new_tokens=2)
    whole, seen[:] = sum(seen), []
    footprint = footprint_module.ENCODER_BYTES
    assert patches_at_once(bundle) == footprint // patch_bytes(bundle.model.config, 4)
    room = patch_bytes(bundle.model.config, 4) * tile * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers_module, "patches_at_once", lambda bundle: patches_at_once(bundle, room))
        answer(bundle, asked, max_new_tokens=2)
    assert sum(seen) == whole and max(seen) == 3 < whole


# Memory that runs out


@pytest.fixture
def asked():
    return samples(documents(12, seed=3))[:21]


@pytest.fixture
def shortage(monkeypatch):
    "Memory runs out in a batch of more questions than that, from a call on; counts what was asked and answered."
    real, calls, answered = answers_module.generate, [], Counter()

    def install(most, since, message="CUDA out of memory. Tried to allocate 2.00 GiB", kind=torch.OutOfMemoryError):
        calls.clear()
        answered.clear()

        def generate(bundle, images, questions, max_new_tokens, *more):
            calls.append(len(questions))
            found = real(bundle, images, questions, max_new_tokens, *more)
            if len(calls) >= since and len(questions) > most:
                raise kind(message)  # at the end, when most has been computed
            answered.update((question, max_new_tokens) for _, question in questions)
            return found

        monkeypatch.setattr(answers_module, "generate", generate)
        return calls, answered

    return install


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("most, since", [(3, 1), (4, 2), (1, 3), (2, 5)])
def test_memory_that_runs_out_loses_no_reply_and_changes_none(asked, shortage, capsys, family, most, since):
    bundle = miniature(family)
    calls, answered = shortage(10**6, 1)
    expected = answer(bundle, asked, batch_size=8, max_new_tokens=12)
    once, plain = Counter(answered), list(calls)
    calls, answered = shortage(most, since)
    replies = answer(bundle, asked, batch_size=8, max_new_tokens=12)
    assert [(reply.tokens, reply.prediction, reply.truncated) for reply in replies] == [
        (reply.tokens, reply.prediction, reply.truncated) for reply in expected
    ]
    said = capsys.readouterr()
    if since > len(plain):
        assert calls == plain
        return
    left = 8 if most >= 8 else {1: 1, 2: 2, 3: 2, 4: 4}[most]
    assert min(reply.batch for reply in replies) == left and f"going on with {left}" in said.out + said.err
    assert all(count == 1 for count in (answered - once).values()) and sum(answered.values()) <= 2 * len(asked), (
        "no reply is asked for again"
    )
    assert {question for question, _ in answered} == {sample.question for sample in asked}
    assert not bundle.model.training


def test_the_batch_that_ran_is_in_the_settings(asked, shortage):
    bundle = miniature("internvl")
    whole = evaluate(bundle, asked, batch_size=8, max_new_tokens=12, draws=10)
    settings = whole.summary["settings"]
    assert settings["batch_size"] == 8
    shortage(3, 2)
    halved = evaluate(bundle, asked, batch_size=8, max_new_tokens=12, draws=10)
    assert halved.summary["settings"] == settings | {"batch_size": 2}
    assert halved.records.prediction.tolist() == whole.records.prediction.tolist()


def test_one_question_that_does_not_fit_and_other_errors_are_not_hidden(asked, shortage):
    bundle = miniature("internvl")
    shortage(0, 2)
    with pytest.raises(MemoryError, match="single question .CUDA out of memory.*expected fewer tiles"):
        answer(bundle, asked, batch_size=4, max_new_tokens=4)
    shortage(0, 1, "mat1 and mat2 shapes cannot be multiplied", RuntimeError)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        answer(bundle, asked, batch_size=4, max_new_tokens=4)


# The computed peak


def internvl_1b():
    "The sizes of InternVL3.5-1B: InternViT-300M and Qwen3-0.6B, the head counted as weights of its own."
    vision = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_hidden_layers=24,
        image_size=[448, 448],
        patch_size=[14, 14],
        attention_bias=True,
    )
    text = dict(
        model_type="qwen3",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
    )
    return InternVLConfig(vision_config=vision, text_config=text, image_seq_length=256, tie_word_embeddings=False)


def test_the_command_of_the_readme_fits_a_card_of_24_gb():
    config, views = internvl_1b(), 12 + 1
    weights = weight_bytes(config)
    assert 1.8e9 < sum(weights) < 2.2e9 and 0.6e9 < weights[0] < 0.65e9

    def footprint(questions):
        return answering_footprint(config, questions, patches=views * 1025, tokens=views * 256, weights=weights)

    asked, found = footprint(64), largest_fit(footprint, 64, lambda found: found.peak <= USABLE * 24e9)
    assert asked.peak > 24e9 and found.questions == 32 and 16e9 < found.peak < 0.9 * 24e9
    assert (
        found.encoding <= ENCODER_BYTES
        and found.keys_and_values == 2 * 32 * (views * 256 + 128 + 100) * 28 * 8 * 128 * 2
    )
    assert "32 questions together" in str(found) and "keys and values" in str(found)
    assert largest_fit(footprint, 64, lambda found: False).questions == 1


@pytest.mark.parametrize("questions, dtype", [(2, torch.float32), (6, torch.float32), (3, torch.bfloat16)])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_computed_peak_is_near_the_measured_one(monkeypatch, family, questions, dtype):
    bundle = miniature(family, width=128, layers=3, tile=112)
    bundle.model.to(dtype)
    images = [Image.fromarray(np.full((330, 440, 3), 200, dtype=np.uint8)) for _ in range(questions)]
    asked = [(number, "What is the value of red in 2015?") for number in range(questions)]
    batch = image_batch(bundle, images)
    monkeypatch.setattr(answers_module, "image_batch", lambda *given: batch)  # made before: the probe sees no numpy
    with MemoryProbe() as probe:
        generate(bundle, images, asked, 4)
    pixels, text = batch.inputs["pixel_values"].nbytes, sum(map(len, prompt_tokens(bundle, asked[0][1])))
    tokens = batch.tokens[0].count(bundle.model.config.image_token_id)
    grid = None if bundle.family.native else len(bundle.family.grid(bundle.model))
    patches = int(batch.inputs["image_grid_thw"][0].prod()) if bundle.family.native else grid * batch.views[0]
    computed = answering_footprint(
        bundle.model.config,
        questions,
        patches=patches,
        tokens=tokens,
        text=text,
        reply=4,
        dtype=dtype,
        host=True,
    )
    weights = computed.encoder_weights + computed.language_weights
    assert abs(weights / held_bytes([bundle.model]) - 1) < 0.02 and abs(computed.pixels / pixels - 1) < 0.15
    assert 1 / FACTOR < (computed.peak - weights - computed.pixels) / probe.peak < FACTOR
    most = image_patches(bundle, None, [(440, 330)])
    assert most[0] >= patches and most[1] >= tokens, "no image is larger than what is planned for"


def test_a_batch_that_would_not_fit_is_not_tried(asked, monkeypatch, capsys):
    bundle = miniature("internvl")
    expected = evaluate(bundle, asked, batch_size=16, max_new_tokens=6, draws=10)
    plan = plan_answers(bundle, asked, 16, max_new_tokens=6)
    assert plan.questions == 16
    needed = plan.peak - plan.encoder_weights - plan.language_weights
    monkeypatch.setattr(footprint_module, "free_bytes", lambda device: int(0.3 * needed / USABLE))
    assert plan_answers(bundle, asked, 16, max_new_tokens=6).questions in (2, 4)
    found = evaluate(bundle, asked, batch_size=16, max_new_tokens=6, draws=10, progress=True)
    settings = found.summary["settings"]
    plan = plan_answers(bundle, asked, 16, max_new_tokens=6, tiles=settings["tiles"])
    assert settings["batch_size"] == plan.questions < 16
    assert found.records.prediction.tolist() == expected.records.prediction.tolist()
    said = capsys.readouterr()
    assert "GB at the peak with" in said.out + said.err
