"""Answers: training and evaluation use the same prompt, packing and batching change nothing, a broken image costs
one answer."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import GenerationConfig, WatermarkingConfig

from sfa_core.models import answers
from sfa_core.models.answers import answer, ignored_settings
from sfa_core.models.evaluate import evaluate
from sfa_core.models.sequences import (
    IGNORE,
    SUFFIX,
    answer_loss,
    answer_tokens,
    end_token,
    pack,
    prompt_tokens,
    training_batch,
)
from sfa_core.models.images import image_inputs, image_tokens
from sfa_core.documents.generate import documents
from sfa_core.core.pictures import as_seen
from sfa_core.documents.samples import Sample, samples
from sfa_core.models.embedded import EmbeddedConfig, build_processor, train_tokenizer
from sfa_core.models.load import load_model, new_bundle

QUESTIONS = ["a", "How much is the red bar?", "What is the highest value of all the 12 months in 2015, and which month "
                                              "has it?", "한국어 질문 12?",
             "Is <|im_end|> or <IMG_CONTEXT> in <img>?", "max?\n\n  min? "]
ANSWERS = ["7", "12.5 %", "elm 9, cat 31, fig 86", "예", "no", "-3"]
TOKENIZER = train_tokenizer(QUESTIONS + ANSWERS, 320)
SMALL = EmbeddedConfig(image_size=56, vision_width=32, vision_layers=2, vision_heads=2, vision_hidden=64,
                       language_width=32, language_layers=2,
                       language_heads=2, language_kv_heads=1, head_dim=16, language_hidden=64, initializer_range=0.3,
                       downsample_ratio=0.5)


def small(seed=0, dtype=torch.float32, tiles=1, **changes):
    """A tiny random model of the real class, noisy enough to say different things to different questions."""
    bundle = new_bundle(replace(SMALL, **changes), TOKENIZER, seed)
    bundle.model.to(dtype)
    return replace(bundle, processor=build_processor(TOKENIZER, SMALL, max_tiles=tiles))


def picture(seed, width=56, height=56, mode="RGB"):
    shape = (height, width) + {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def page(number, questions=3, **options):
    """A row as `documents` gives it, with the first questions in rotation."""
    order = [(number + step) % len(QUESTIONS) for step in range(questions)]
    asked = [dict(id=f"{number}/{n}", kind="read", question=QUESTIONS[n], answers=[ANSWERS[n], "another"], evidence=[])
             for n in order]
    return dict(id=f"page{number}", image=picture(number, **options), questions=asked)


def asked(rows):
    return [Sample(part["id"], row["id"], part["kind"], part["question"], tuple(part["answers"]), row["image"])
            for row in rows for part in row["questions"]]


# the prompt


@pytest.mark.parametrize("suffix", ["", SUFFIX])
def test_the_prompt_is_what_the_stock_processor_writes(suffix):
    bundle = small(tiles=4)
    for question, size in zip(QUESTIONS[:4], [(56, 56), (112, 56), (120, 118), (40, 200)], strict=True):
        image = picture(1, *size)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question + suffix}]}
        text = TOKENIZER.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        stock = bundle.processor(images=[image], text=[text], return_tensors="pt")
        pixels, counts = image_inputs(bundle, [image])
        before, after = prompt_tokens(bundle, question, suffix)
        assert stock["input_ids"][0].tolist() == before + image_tokens(bundle, counts[0]) + after
        assert torch.equal(stock["pixel_values"], pixels) and len(pixels) == counts[0]


def test_training_and_evaluation_see_the_same_tokens(monkeypatch):
    bundle, sent, suffixes = small(), [], {None, "", SUFFIX, " Short!"}
    generate = bundle.model.generate
    monkeypatch.setattr(bundle.model, "generate", lambda **inputs: sent.append(inputs) or generate(**inputs))
    for suffix in suffixes:
        for sample in asked([page(2, 6)]):
            answer(bundle, [sample], max_new_tokens=2, suffix=suffix)
            batch = training_batch(bundle, [sample], suffix=suffix)
            prompt = sent[-1]["input_ids"]
            assert (
                torch.equal(batch["input_ids"][:, : prompt.shape[1]], prompt)
                and (batch["labels"][:, : prompt.shape[1]] == IGNORE).all()
            )
            assert batch["input_ids"][0, prompt.shape[1] :].tolist() == answer_tokens(bundle, sample.answers[0])
            assert torch.equal(batch["labels"][:, prompt.shape[1] :], batch["input_ids"][:, prompt.shape[1] :])
            features = bundle.model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
            # all tiles in one row
            assert torch.equal(features.flatten(0, 1), sent[-1]["mm_encoder_outputs"]["image"].pooler_output)


def test_a_model_says_what_it_was_trained_to_say():
    bundle, rows = small(initializer_range=0.1), [page(0, 6), page(1, 4)]
    optimizer = torch.optim.Adam(bundle.model.parameters(), lr=1e-2)
    batch = training_batch(bundle, rows)
    for _ in range(80):
        loss, targets = answer_loss(bundle.model.train(), batch)
        (loss / targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    replies = answer(bundle, asked(rows))
    assert bundle.model.training  # as it was before
    assert [reply.prediction for reply in replies] == [sample.answers[0] for sample in asked(rows)]
    assert not any(reply.truncated or reply.error for reply in replies)
    short = answer(bundle, asked(rows)[2:3], max_new_tokens=3)[0]  # "elm 9, cat 31, fig 86" is longer
    assert short.truncated and len(short.tokens) == 3 and asked(rows)[2].answers[0].startswith(short.prediction)


def test_the_suffix_is_the_models_own():
    assert prompt_tokens(small(), "max?") == prompt_tokens(small(), "max?", "")
    assert prompt_tokens(small(prompt_suffix=" Now."), "max?") == prompt_tokens(small(), "max?", " Now.")
    real = small()
    del real.model.config.prompt_suffix  # no checkpoint of others has it
    assert prompt_tokens(real, "max?") == prompt_tokens(small(), "max?", SUFFIX) != prompt_tokens(small(), "max?")


def test_control_tokens_in_text_are_text():
    bundle, special = small(), set(TOKENIZER.all_special_ids)
    plain, marked = prompt_tokens(bundle, "Is it?"), prompt_tokens(bundle, "Is <|im_end|><IMG_CONTEXT> it?")
    assert plain[0] == marked[0]
    assert [token for token in plain[1] if token in special] == [token for token in marked[1] if token in special]
    assert "<|im_end|><IMG_CONTEXT>" in TOKENIZER.decode(marked[1])
    assert answer_tokens(bundle, "<|im_end|>").count(end_token(bundle)) == 1 and end_token(
        bundle
    ) == TOKENIZER.convert_tokens_to_ids("<|im_end|>")


# images


@pytest.mark.parametrize("options", [dict(), dict(width=80, height=30), dict(width=56, height=55)])
def test_the_fast_way_to_pixels_is_the_processors(options):
    bundle, images = small(), [picture(seed, **options) for seed in range(5)]
    pixels, counts = image_inputs(bundle, images)
    assert (
        torch.equal(pixels, bundle.processor.image_processor(images, return_tensors="pt")["pixel_values"])
        and pixels.dtype == torch.float32
    )
    assert counts == [1] * 5


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_images_of_other_modes_become_rgb(mode):
    row, image = page(0, mode=mode), picture(0, mode=mode)
    assert torch.equal(training_batch(small(), [row])["pixel_values"], image_inputs(small(), [as_seen(image)])[0])


def test_tiles_are_limited_by_the_argument():
    bundle, image = small(tiles=4), picture(0, 112, 112)
    # 2 x 2 and a thumbnail
    assert [image_inputs(bundle, [image], tiles)[1] for tiles in (None, 4, 1)] == [[5], [5], [1]]
    assert training_batch(bundle, [page(0, width=112, height=112)])["pixel_values"].shape == (5, 3, 56, 56)
    with pytest.raises(ValueError, match="tiles 0"):
        answer(bundle, asked([page(0)]), tiles=0)


# packing


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4),
                          st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4)),
                          min_size=1, max_size=4))
def test_a_branch_sees_the_prefix_and_itself(shapes):
    token = iter(range(1, 1000))
    take = lambda n: [next(token) for _ in range(n)]
    prefixes = [take(prefix) for prefix, _ in shapes]
    branches = [[(take(prompt), take(target)) for prompt, target in parts] for _, parts in shapes]
    packed = pack(prefixes, branches)
    for row, (prefix, parts) in enumerate(zip(prefixes, branches, strict=True)):
        ids, seen = packed["input_ids"][row].tolist(), packed["attention_mask"][row, 0] == 0
        assert seen.any(dim=1).all()  # padding too
        for prompt, target in parts:
            alone = prefix + prompt + target
            for place, number in enumerate(alone):
                at = ids.index(number)
                assert [ids[key] for key in torch.nonzero(seen[at]).flatten()] == alone[: place + 1]
                assert packed["position_ids"][row, at] == place
                assert packed["labels"][row, at] == (number if number in target else IGNORE)
        assert (packed["labels"][row] != IGNORE).sum() == sum(len(target) for _, target in parts)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_the_packed_loss_and_its_gradient_are_those_of_single_questions(dtype, tolerance):
    bundle, rows = small(1, dtype), [page(0, 1), page(1, 6), page(2, 3)]
    weights = list(bundle.model.parameters())
    flat = lambda loss: torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)])
    together, targets = answer_loss(bundle.model, training_batch(bundle, rows))
    singles = [answer_loss(bundle.model, training_batch(bundle, [sample])) for sample in asked(rows)]
    alone = sum(loss for loss, _ in singles)
    assert targets == sum(count for _, count in singles)
    assert torch.isclose(together, alone, rtol=tolerance / 10)
    ours, theirs = flat(together), flat(alone)  # the norms of the language model round to float32, whatever the dtype
    assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_the_loss_is_the_models_own():
    bundle = small(2, torch.float64)
    batch = training_batch(bundle, [page(0), page(1, 5)])
    loss, targets = answer_loss(bundle.model, batch)
    assert torch.isclose(loss / targets, bundle.model(**batch).loss.double(), rtol=1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_branch_does_not_notice_the_others(attention):
    bundle, row = small(3, torch.float64), page(0, 3)
    bundle.model.set_attn_implementation(attention)
    other = row | dict(questions=[row["questions"][0],
                                  dict(row["questions"][1], question="Something longer than before?",
                                       answers=["1234567"])])
    ours, theirs = ({k: v for k, v in training_batch(bundle, [one]).items() if k != "labels"} for one in (row, other))
    first = len(sum(prompt_tokens(bundle, row["questions"][0]["question"]), [])) + len(image_tokens(bundle, 1)) + 1
    assert torch.allclose(bundle.model(**ours).logits[:, :first], bundle.model(**theirs).logits[:, :first], rtol=0,
                          atol=1e-12)


def test_rows_and_samples_make_the_same_batch():
    bundle, rows = small(), [page(0), page(1, 2), page(2, 4)]
    from_rows, from_samples = training_batch(bundle, rows), training_batch(bundle, asked(rows))
    assert (
        all(torch.equal(from_rows[name], from_samples[name]) for name in from_rows) and len(from_rows["input_ids"]) == 3
    )


def test_rows_of_a_dataset_are_taken_as_they_come(tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path))
    data, bundle = documents(4, seed=5), small()
    batch = training_batch(bundle, data)
    assert len(batch["input_ids"]) == 4
    assert torch.equal(batch["input_ids"], training_batch(bundle, list(data))["input_ids"])
    assert len(answer(bundle, data, max_new_tokens=1)) == sum(len(row["questions"]) for row in data)


def test_an_empty_or_broken_batch_is_named():
    bundle = small()
    with pytest.raises(ValueError, match="batch is empty"):
        training_batch(bundle, [])
    with pytest.raises(ValueError, match="page3"):
        training_batch(bundle, [page(0), page(3) | dict(questions=[])])
    with pytest.raises(ValueError, match="page4"):
        training_batch(bundle, [page(0), page(4) | dict(image=dict(bytes=b"broken", path=None))])


# answering


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batched_answers_are_those_given_one_by_one(seed, dtype):
    bundle, samples = small(seed, dtype), asked([page(number, 4) for number in range(4)])
    alone = [answer(bundle, [sample], max_new_tokens=10)[0] for sample in samples]
    assert len({reply.tokens for reply in alone}) > 8  # the model tells questions and pages apart
    for size in (3, 32):
        batched = answer(bundle, samples, batch_size=size, max_new_tokens=10)
        assert [(reply.tokens, reply.truncated) for reply in batched] == [(reply.tokens, reply.truncated)
                                                                          for reply in alone]
    order = np.random.default_rng(seed).permutation(len(samples))
    shuffled = answer(bundle, [samples[n] for n in order], max_new_tokens=10)
    assert [reply.tokens for reply in shuffled] == [alone[n].tokens for n in order]


def test_answers_with_tiles_are_those_of_the_stock_pipeline():
    bundle = small(4, torch.float64, tiles=4)
    rows = [page(0, 2, width=112, height=112), page(1, 2, width=56, height=56), page(2, 2, width=170, height=60)]
    replies = answer(bundle, asked(rows), max_new_tokens=6)
    assert [image_inputs(bundle, [row["image"]])[1] for row in rows] == [[5], [1], [4]]
    for sample, reply in zip(asked(rows), replies, strict=True):
        if "<" in sample.question:  # the stock pipeline would take its text for control tokens
            continue
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": sample.question}]}
        text = TOKENIZER.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
        inputs = bundle.processor(images=[sample.image], text=[text], return_tensors="pt")
        out = bundle.model.generate(**inputs, max_new_tokens=6,
                                    do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        assert tuple(token for token in out if token != end_token(bundle)) == reply.tokens


# Values of generation_config.json that change replies, or end the generation, where a field is left to the checkpoint.
HOSTILE = dict(
    max_length=[1], max_new_tokens=[1], min_length=[400], min_new_tokens=[7], early_stopping=[True], max_time=[0.0],
    stop_strings=[["a", "e", "1"]], do_sample=[True], num_beams=[3], use_mtp=[True], use_cache=[False],
    cache_implementation=["static", "offloaded", "quantized"], cache_config=[{"backend": "quanto"}], max_cache_len=[1],
    temperature=[50.0], top_k=[1], top_p=[0.01], min_p=[0.9], top_h=[0.1], typical_p=[0.1], epsilon_cutoff=[0.5],
    eta_cutoff=[0.5], repetition_penalty=[5.0], encoder_repetition_penalty=[5.0], length_penalty=[-9.0],
    no_repeat_ngram_size=[1], bad_words_ids=[[[token] for token in range(10, 200)]], renormalize_logits=[True],
    forced_bos_token_id=[11], forced_eos_token_id=[12], remove_invalid_values=[True],
    exponential_decay_length_penalty=[(1, 9.0)], suppress_tokens=[list(range(10, 200))],
    begin_suppress_tokens=[list(range(10, 300))], sequence_bias=[[[[20], 90.0]]], token_healing=[True],
    guidance_scale=[3.0], watermarking_config=[WatermarkingConfig(bias=50.0)], num_return_sequences=[2],
    output_attentions=[True], output_hidden_states=[True], output_scores=[True], output_logits=[True],
    return_dict_in_generate=[True], pad_token_id=[9, -1], bos_token_id=[9], encoder_no_repeat_ngram_size=[1],
    decoder_start_token_id=[9], is_assistant=[True], num_assistant_tokens=[3],
    num_assistant_tokens_schedule=["constant"],
    assistant_confidence_threshold=[0.9], prompt_lookup_num_tokens=[3], max_matching_ngram_size=[2],
    assistant_early_exit=[1], assistant_lookbehind=[3], target_lookbehind=[3], assistant_ensemble_weight=[0.5],
    speculation_type=["dflash"], compile_config=[{"fullgraph": True}], disable_compile=[True],
)
FIELDS = sorted({name
                 for name in vars(GenerationConfig())
                 if not name.startswith("_")} - {"transformers_version", "eos_token_id"})


@pytest.fixture(scope="module")
def greedy():
    "A model that says long things, its questions, and its replies without settings of its own."
    bundle, samples = small(5), asked([page(0, 4)])
    return bundle, samples, [reply.tokens for reply in answer(bundle, samples, max_new_tokens=8)]


@pytest.mark.parametrize("field", [*FIELDS, "a_field_of_its_own"])
def test_no_setting_of_a_checkpoint_changes_greedy_answers(greedy, monkeypatch, field):
    bundle, samples, plain = greedy
    for value in HOSTILE.get(field, [True, 3, 0.5, "static", [3]]):
        stored = copy.deepcopy(bundle.model.generation_config)
        setattr(stored, field, value)
        monkeypatch.setattr(bundle.model, "generation_config", stored)
        assert [reply.tokens for reply in answer(bundle, samples, max_new_tokens=8)] == plain, value
        assert bundle.model.generation_config is stored, "the model keeps its own"
        if not field.endswith("token_id") and value is not False:
            assert ignored_settings(bundle)[field] == stored.to_dict()[field], "and a summary lists them"


def test_several_settings_together_change_nothing_and_are_listed(greedy, monkeypatch):
    bundle, samples, plain = greedy
    own = dict(do_sample=True, temperature=0.01, repetition_penalty=1.5, top_p=0.1, no_repeat_ngram_size=1)
    monkeypatch.setattr(bundle.model, "generation_config", GenerationConfig(**own))
    found = evaluate(bundle, samples, benchmark="synthetic", max_new_tokens=8)
    assert [reply.tokens for reply in answer(bundle, samples, max_new_tokens=8)] == plain
    assert found.summary["settings"]["generation_ignored"] == own


def test_end_tokens_of_a_checkpoint_end_its_answers_and_must_be_tokens(greedy, monkeypatch):
    bundle, samples, plain = greedy
    monkeypatch.setattr(bundle.model, "generation_config",
                        GenerationConfig(eos_token_id=[plain[0][2], end_token(bundle)]))
    reply = answer(bundle, samples[:1], max_new_tokens=8)[0]
    assert reply.tokens == plain[0][: plain[0].index(plain[0][2])] and not reply.truncated
    for wrong in ("end", ["end"], 3.5, True, -1, 10**9, [[3]], {"id": 3}):
        monkeypatch.setattr(bundle.model, "generation_config", GenerationConfig())
        bundle.model.generation_config.eos_token_id = wrong
        with pytest.raises(ValueError, match="eos_token_id"):
            answer(bundle, samples[:1], max_new_tokens=8)


def test_a_broken_image_costs_one_answer(tmp_path):
    bundle, good = small(), asked([page(0)])
    cut = io.BytesIO()
    picture(1).save(cut, "PNG")
    sources = [b"", b"not an image", cut.getvalue()[:-200], tmp_path / "missing.png"]
    broken = [Sample(f"bad/{n}", f"bad{n}", "read", "max?", ("1",), source) for n, source in enumerate(sources)]
    mixed = answer(bundle, [good[0], *broken, *good[1:]], max_new_tokens=4)
    assert [reply.tokens for reply in mixed if not reply.error] == [reply.tokens
                                                                    for reply in answer(bundle, good, max_new_tokens=4)]
    for sample, reply in zip(broken, mixed[1:5], strict=True):
        assert (
            sample.id in reply.error
            and "\n" not in reply.error
            and (reply.prediction, reply.truncated, reply.tokens) == ("", False, ())
        )
    assert all(reply.error for reply in answer(bundle, broken))


def test_documents_with_the_same_name_are_told_apart():
    bundle = small(6)
    one, two = page(0, 1), page(7, 1) | dict(id="page0")
    two["questions"][0]["question"] = one["questions"][0]["question"]
    single = [answer(bundle, asked([row]), max_new_tokens=8)[0].tokens for row in (one, two)]
    assert [reply.tokens for reply in answer(bundle, asked([one, two]), max_new_tokens=8)] == single and single[
        0
    ] != single[1]
    assert len(training_batch(bundle, asked([one, two]))["input_ids"]) == 2


@pytest.mark.parametrize("options, word",
                         [(dict(batch_size=0), "batch_size 0"), (dict(max_new_tokens=-1), "max_new_tokens -1")])
def test_sizes_below_one_are_refused(options, word):
    with pytest.raises(ValueError, match=word):
        answer(small(), asked([page(0)]), **options)
    with pytest.raises(ValueError, match="samples"):
        answer(small(), [])


@pytest.fixture
def calls(monkeypatch):
    "Questions and token limit of every batch."
    made, original = [], answers.generate

    def generate(bundle, images, asked, limit, *rest):
        made.append((len(asked), limit))
        return original(bundle, images, asked, limit, *rest)
    monkeypatch.setattr(answers, "generate", generate)
    return made


def test_long_answers_are_generated_behind_the_others_and_are_the_same(calls):
    bundle, asked = load_model("embedded"), samples(documents(9, seed=5))
    alone = [answer(bundle, [sample], 1, 40)[0] for sample in asked]
    assert {limit for _, limit in calls} == {40}
    calls.clear()
    together = answer(bundle, asked, 32, 40)
    long = sum(len(reply.tokens) >= 8 for reply in alone)
    batches = [*[32] * (len(asked) // 32), *([len(asked) % 32] if len(asked) % 32 else [])]
    assert calls == [*((size, 8) for size in batches), (long, 40)] and 0 < long < 32
    assert [reply.tokens for reply in together] == [reply.tokens for reply in alone]
    assert [reply.truncated for reply in together] == [reply.truncated for reply in alone]
    calls.clear()
    answer(bundle, asked, 32, 5)
    assert calls == [(size, 5) for size in batches]


def test_where_most_answers_are_long_none_waits(calls):
    bundle = load_model("embedded")
    asked = [sample for sample in samples(documents(12, seed=5)) if sample.kind == "transcribe"]
    replies = answer(bundle, asked, 4, 40)
    assert len(asked) >= 12 and calls[0] == (4, 8) and set(calls[1:]) == {(4, 40)} and len(calls) == len(asked) // 4 + 1
    assert all(len(reply.tokens) > 8 for reply in replies)
