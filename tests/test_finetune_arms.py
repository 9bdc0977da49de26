"""Each arm trains what its name says on the same documents in the same order, and gives the model back as it was."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import InternVLConfig, InternVLForConditionalGeneration

import sfa_core.training.arms as arms_module
import sfa_core.training.finetune as finetune_module
import sfa_core.training.loop as loop_module
from sfa_core.core.identity import read_digest
from sfa_core.models.sequences import answer_loss, training_batch
from sfa_core.structure.inject import eject, inject
from sfa_core.structure.store import load_structure
from sfa_core.training.checkpoints import TIMING, read_folder
from sfa_core.training.consistency import SCRConfig
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.embedded import train_tokenizer
from sfa_core.training.finetune import finetune, prepared
from sfa_core.structure.rivals import attach_low_rank, bias_parameters, detach_low_rank
from sfa_core.training.arms import ARMS, FinetuneConfig, load_arm, read_arm, trainable
from sfa_core.models.load import new_bundle
from sfa_core.tokens.adaptive import CONTROL
from sfa_core.tokens.patches import PatchConfig
from sfa_core.training.stream import DocumentSet, batches, steps_in
from sfa_core.structure.bias import StructuralBias
from tiny_internvl import SMALLEST, bundle_of

QUICK = dict(steps=4, batch_size=4, questions=3, learning_rate=5e-3, structure_rate=5e-3, checkpoint_every=2)


@pytest.fixture(scope="module")
def charts(tmp_path_factory):
    return documents(11, seed=5)


def tiny(seed=0, **changes):
    texts = ["What is the value of oak? yes no 1 2 3 4 5 6 7 8 9 0"]
    return new_bundle(replace(SMALLEST, **changes), train_tokenizer(texts, 300), seed, name="tiny")


@pytest.fixture(scope="module")
def shared():
    return tiny()


@pytest.fixture
def bundle(shared):
    "A tiny model that must be the same after the test as before."
    before = weights_of(shared.model)
    flags = [p.requires_grad for p in shared.model.parameters()]
    yield shared
    assert_equal(weights_of(shared.model), before)
    assert not shared.model.training and not any(isinstance(m, StructuralBias) for m in shared.model.modules())
    assert flags == [p.requires_grad for p in shared.model.parameters()] and all(
        p.grad is None for p in shared.model.parameters()
    )
    assert shared.model.config.vision_config._attn_implementation == "sdpa"


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(a, b):
    assert list(a) == list(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def run(bundle, data, arm, folder, **changes):
    resume, until = changes.pop("resume", "latest"), changes.pop("until", None)
    return finetune(bundle, data, FinetuneConfig(arm, **QUICK | changes), folder, resume, until, progress=False)


@torch.no_grad()
def outputs(bundle, data):
    batch = training_batch(bundle, [data[i] for i in range(3)])
    return bundle.model(**{k: v for k, v in batch.items() if k != "labels"}).logits


def part_of(name):
    if ".structure." in name or ".low_rank." in name:
        return "structure" if ".structure." in name else "low_rank"
    return {"model.vision_tower": "tower",
            "model.multi_modal_projector": "projector"}.get(".".join(name.split(".")[:2]), "language")


# What learns


@pytest.mark.parametrize("arm", ARMS)
def test_an_arm_changes_all_of_its_parts_and_nothing_else(bundle, charts, tmp_path, arm):
    before = weights_of(bundle.model)
    result = run(bundle, charts, arm, tmp_path)
    with load_arm(bundle, result.arm):
        after = weights_of(bundle.model)
        changed = {name for name in after if name not in before or not torch.equal(after[name], before[name])}
    learned = {name for name, _ in bundle.model.named_parameters() if part_of(name) in ARMS[arm].parts}
    attached = {part: {name for name in after if part_of(name) == part} for part in ("structure", "low_rank")}
    assert changed == learned.union(*attached.values())
    assert all(bool(names) == (part in ARMS[arm].parts) for part, names in attached.items())
    start = read_folder(sorted((tmp_path / "checkpoints").glob("*"))[0])[0]["weights"]
    assert set(start) == changed and all(not torch.equal(start[name], after[name]) for name in changed)


def test_every_arm_has_a_control_that_differs_from_it(shared):
    for name, arm in ARMS.items():
        if arm.against != "baseline":
            other = ARMS[arm.against]
            assert {*other.parts, *other.density, *other.losses} < {*arm.parts, *arm.density, *arm.losses}, name


def test_the_arms_of_the_real_model_have_the_known_sizes():
    vision = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "image_size": [448, 448],
        "patch_size": [14, 14],
        "attention_bias": True,
        "use_mean_pooling": True,
    }
    text = {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 1,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    }
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text))
    with pytest.raises(ValueError, match="trains structural weights"):
        trainable(bundle_of(model), "sfa")
    with pytest.raises(ValueError, match="trains low-rank updates"):
        trainable(bundle_of(model), "lora")
    assert bias_parameters(bundle_of(model)) == 7_296
    attach_low_rank(bundle_of(model), 7_296)  # 4 of 24 layers, 2,048 each: nearer than 3
    assert sum(p.numel() for p in trainable(bundle_of(model), "lora").values()) == 8_192
    assert sum(p.numel() for p in trainable(bundle_of(model), "control").values()) == 337_583_104
    detach_low_rank(bundle_of(model))
    inject(bundle_of(model))
    sizes = {arm: sum(p.numel() for p in trainable(bundle_of(model), arm).values()) for arm in ARMS if arm != "lora"}
    known = dict(sfa=7_296, control=337_583_104, vision=337_590_400, projector=33_570_816)
    assert sizes == known | dict(sfa_blocks=known["sfa"], sfa_blocks_entropy=known["sfa"],
                                 vision_blocks=known["vision"], adat=known["control"], vision_adat=known["vision"],
                                 full=known["vision"])
    # of the last call, nothing is left awake
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sizes["full"]


@pytest.mark.parametrize("arm", ARMS)
def test_no_step_changes_nothing(bundle, charts, tmp_path, arm):
    expected = outputs(bundle, charts)
    with prepared(bundle, FinetuneConfig(arm, patches=PatchConfig(budget=40, bucket=8))) as parameters:
        if "structure" in ARMS[arm].parts:
            with torch.no_grad():
                [p.zero_() for name, p in parameters.items() if ".structure." in name]
        if "patches" in ARMS[arm].density:
            assert outputs(bundle, charts).shape[1] < expected.shape[1], "copies of language tokens are gone"
        else:
            assert torch.allclose(outputs(bundle, charts), expected, atol=1e-5)
        if "structure" not in ARMS[arm].parts and not ARMS[arm].density:
            assert torch.equal(outputs(bundle, charts), expected)
    result = run(bundle, charts, arm, tmp_path, until=0)
    assert result.log.empty and result.arm is None and not (tmp_path / "arm").exists()
    assert torch.equal(outputs(bundle, charts), expected)


def test_structure_starts_from_its_seed_and_the_named_terms(bundle):
    def structure(**changes):
        with prepared(bundle, FinetuneConfig("sfa", **changes)) as parameters:
            return {name: p.detach().clone() for name, p in parameters.items()}

    assert_equal(structure(seed=1), structure(seed=1, data_seed=9))
    assert not torch.equal(
        structure(seed=1)["model.vision_tower.encoder.layer.0.attention.structure.row"],
        structure(seed=2)["model.vision_tower.encoder.layer.0.attention.structure.row"],
    )
    assert {name.rpartition(".")[2] for name in structure(terms=("distance", "row"))} == {"row", "distance"}


# The same documents in the same order


def test_all_arms_see_the_same_documents_and_questions_in_the_same_order(bundle, charts, tmp_path, monkeypatch):
    seen = {}

    def spy(given, rows, **options):
        seen.setdefault(arm, []).append([(row["id"], [q["id"] for q in row["questions"]]) for row in rows])
        return training_batch(given, rows, **options)

    monkeypatch.setattr(finetune_module, "training_batch", spy)
    for arm in ARMS:
        # a measurement of norms would see a batch several times
        scr = SCRConfig(norms_every=0) if arm == "full" or ARMS[arm].losses else None
        run(bundle, charts, arm, tmp_path / arm, seed=len(arm), scr=scr)
    assert len({json.dumps(order) for order in seen.values()}) == 1 and len(seen) == len(ARMS)
    for arm in ("other",):
        run(bundle, charts, "sfa", tmp_path / arm, data_seed=1)
    assert seen["other"] != seen["sfa"]


@given(st.integers(1, 30), st.integers(0, 3), st.sampled_from([1, 2, 4, 8]), st.integers(0, 6))
def test_how_a_step_is_cut_does_not_change_its_documents(size, seed, accumulation, step):
    data = [type("S", (), dict(id=f"{i}/0", document=str(i), question="?", answers=("1",)))() for i in range(size)]
    stream = [sample.document for i in range(step + 1)
              for [sample] in batches(DocumentSet(data), 8, data_seed=seed)(i, 0)]
    cut = batches(DocumentSet(data), 8, accumulation, data_seed=seed)
    assert [s.document for micro in range(accumulation) for [s] in cut(step, micro)] == stream[-8:]
    for start in range(0, len(stream) - size + 1, size):
        assert len({*stream[start : start + size]}) == size  # each pass visits every document once


def test_steps_of_the_reported_training():
    assert steps_in(3, 28_299, 32) == 2_653 == 3 * -(-28_299 // 4) // 8
    assert steps_in(1, 31, 32) == 0 and steps_in(1.5, 32, 16) == 3


def test_eight_by_one_is_two_by_four(bundle, charts, tmp_path):
    whole = run(bundle, charts, "vision", tmp_path / "a", batch_size=8, questions=2)
    cut = run(bundle, charts, "vision", tmp_path / "b", batch_size=8, questions=2, accumulation=4)
    np.testing.assert_allclose(whole.log.loss, cut.log.loss, rtol=1e-4)
    assert whole.log.targets.equals(cut.log.targets)


def test_samples_train_as_their_documents_do(bundle, charts, tmp_path):
    a, b = run(bundle, charts, "control", tmp_path / "a", questions=0), run(bundle, samples(charts), "control",
                                                                            tmp_path / "b", questions=0)
    assert a.log.drop(columns=list(TIMING)).equals(b.log.drop(columns=list(TIMING)))


def test_memory_that_runs_out_halves_the_documents_at_once(bundle, charts, tmp_path, monkeypatch):
    plenty = run(bundle, charts, "vision", tmp_path / "a")

    def hungry(model, batch):
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return answer_loss(model, batch)

    monkeypatch.setattr(finetune_module, "answer_loss", hungry)
    little = run(bundle, charts, "vision", tmp_path / "b")
    assert (little.log.parts == 2).all() and little.log.targets.equals(plenty.log.targets)
    np.testing.assert_allclose(plenty.log.loss, little.log.loss, rtol=1e-4)


# Kept and put back


@pytest.mark.parametrize("arm", ARMS)
def test_a_trained_arm_put_back_answers_as_it_did_when_training_ended(bundle, charts, tmp_path, monkeypatch, arm):
    ended, save = [], finetune_module.save_arm

    def spy(given, *rest, **options):
        ended.append(outputs(given, charts))
        return save(given, *rest, **options)

    monkeypatch.setattr(finetune_module, "save_arm", spy)
    result, base = run(bundle, charts, arm, tmp_path), outputs(bundle, charts)
    loaded = load_arm(bundle, result.arm)
    assert torch.equal(outputs(bundle, charts), ended[0]) and not torch.equal(ended[0], base)
    assert (
        loaded.about["arm"] == arm
        and loaded.about["against"] == ARMS[arm].against
        and loaded.about["training"]["documents"] == 11
    )
    loaded.remove()
    loaded.remove()
    assert torch.equal(outputs(bundle, charts), base)


@pytest.mark.parametrize("arm", ["sfa", "vision"])
def test_a_stopped_arm_goes_on_exactly(bundle, charts, tmp_path, arm):
    whole = run(bundle, charts, arm, tmp_path / "a")
    for until in (1, 3):
        assert run(bundle, charts, arm, tmp_path / "b", until=until).arm is None
    parts = run(bundle, charts, arm, tmp_path / "b")
    assert parts.log.drop(columns=list(TIMING)).equals(whole.log.drop(columns=list(TIMING)))
    assert {p.name: p.read_bytes() for p in whole.arm.iterdir()} == {p.name: p.read_bytes()
                                                                     for p in parts.arm.iterdir()}
    written = {p: p.stat().st_mtime_ns for p in parts.arm.rglob("*")}
    assert run(bundle, charts, arm, tmp_path / "b").log.equals(parts.log) and written == {
        p: p.stat().st_mtime_ns for p in parts.arm.rglob("*")
    }


def test_the_structure_of_an_arm_can_be_used_alone(bundle, charts, tmp_path):
    result = run(bundle, charts, "sfa", tmp_path)
    with load_arm(bundle, result.arm):
        expected = outputs(bundle, charts)
    load_structure(bundle, result.arm)
    assert torch.equal(outputs(bundle, charts), expected)
    eject(bundle)


def test_another_arm_data_or_base_does_not_go_on_in_the_same_folder(bundle, charts, tmp_path):
    run(bundle, charts, "sfa", tmp_path, until=2)
    for change, said in [
        (dict(data_seed=1), "identity.finetune.data_seed"),
        (dict(terms=("row",)), "identity.finetune.terms"),
        (dict(arm="control"), "config.learning_rate|identity.arm"),
    ]:
        with pytest.raises(ValueError, match=f"belongs to another run, ({said})"):
            run(bundle, charts, change.pop("arm", "sfa"), tmp_path, **change)
    with pytest.raises(ValueError, match="identity.data is"):
        run(bundle, charts.select(range(10)), "sfa", tmp_path)
    other = replace(bundle, model=copy.deepcopy(bundle.model))
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match=f"identity.base is '{bundle.identity}' there and '{other.identity}' here"):
        run(other, charts, "sfa", tmp_path)


@pytest.mark.parametrize("arm", ["sfa", "vision"])
def test_an_arm_of_another_base_or_a_damaged_one_is_refused_and_changes_nothing(bundle, charts, tmp_path, arm):
    folder = run(bundle, charts, arm, tmp_path).arm
    with pytest.raises(ValueError, match="trained on tiny of revision ''; tiny has 'abc'"):
        load_arm(replace(bundle, revision="abc"), folder)
    with pytest.raises(ValueError, match="do not fit this model|does not fit tiny|trained on tiny of identity"):
        load_arm(tiny(vision_layers=3), folder)
    with pytest.raises(ValueError, match="do not fit this model|does not fit tiny|trained on tiny of identity"):
        load_arm(tiny(vision_width=64), folder)
    with pytest.raises(FileNotFoundError, match="no trained arm at"):
        load_arm(bundle, tmp_path)
    name = next(folder.glob("*.safetensors")).name
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(ValueError, match=f"{name} does not match its checksum"):
        load_arm(bundle, folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match="SHA256SUMS lists"):
        read_arm(folder)


def test_a_model_with_structure_is_not_a_base(charts, tmp_path):
    given = tiny()
    inject(given)
    with pytest.raises(ValueError, match="plain base model is expected"):
        run(given, charts, "control", tmp_path)
    with pytest.raises(ValueError, match="plain base model is expected"):
        load_arm(given, run(tiny(), charts, "control", tmp_path).arm)


# Precision and memory


@pytest.mark.parametrize("arm", ["sfa", "vision"])
def test_a_bfloat16_model_trains_in_float32_and_is_given_back(charts, tmp_path, monkeypatch, arm):
    given = tiny()
    exact = run(given, charts, arm, tmp_path / "exact")
    given.model.to(torch.bfloat16)
    before, dtypes = weights_of(given.model), []

    def spy(model, batch):
        dtypes.append({p.dtype for p in model.parameters() if p.requires_grad}
                      | {str(p.dtype) for p in model.model.language_model.parameters()})
        return answer_loss(model, batch)

    monkeypatch.setattr(finetune_module, "answer_loss", spy)
    result = run(given, charts, arm, tmp_path / "low")
    assert all(seen == {torch.float32, "torch.bfloat16"} for seen in dtypes)
    assert_equal(weights_of(given.model), before)
    np.testing.assert_allclose(result.log.loss, exact.log.loss, rtol=0.05)
    with load_arm(given, result.arm):
        assert given.model.dtype == torch.bfloat16 and outputs(given, charts).isfinite().all()
    with pytest.raises(ValueError, match="float16; float32 or bfloat16 is expected"):
        run(replace(given, model=given.model.to(torch.float16)), charts, arm, tmp_path / "half")


def test_recomputed_activations_change_nothing(bundle, charts, tmp_path):
    calls = []
    hook = bundle.family.attentions_of(bundle.model)[0].register_forward_hook(lambda *_: calls.append(0))
    plain, once = run(bundle, charts, "vision", tmp_path / "a"), len(calls)
    spared, twice = run(bundle, charts, "vision", tmp_path / "b", checkpointing=True), len(calls) - once
    hook.remove()
    assert twice == 2 * once
    np.testing.assert_allclose(plain.log.loss, spared.log.loss, rtol=1e-5)
    np.testing.assert_allclose(plain.log.gradient_norm, spared.log.gradient_norm, rtol=1e-4)


# What is refused


@pytest.mark.parametrize("step", ["attach_density", "put_back"])
def test_an_arm_that_fails_while_it_is_put_on_leaves_nothing_behind(bundle, charts, tmp_path, monkeypatch, step):
    folder, real = run(bundle, charts, "vision_blocks", tmp_path).arm, getattr(arms_module, step)

    def fails(*given):
        monkeypatch.setattr(arms_module, step, real)
        real(*given)
        raise RuntimeError("no room")

    monkeypatch.setattr(arms_module, step, fails)
    with pytest.raises(RuntimeError, match="no room"):
        load_arm(bundle, folder)
    assert not hasattr(bundle.family.tower_of(bundle.model), CONTROL)
    with load_arm(bundle, folder):
        assert hasattr(bundle.family.tower_of(bundle.model), CONTROL)


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(arm="half"), "arm is 'half'; one of sfa, sfa_blocks, sfa_blocks_entropy, lora, control, vision"),
        (dict(steps=0), "steps is 0"),
        (dict(steps=-1), "steps is -1"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(batch_size=-4), "batch_size is -4"),
        (dict(batch_size=6, accumulation=4), "a multiple of the 4 micro-batches"),
        (dict(accumulation=0), "accumulation is 0"),
        (dict(terms=("row", "diagonal")), "'diagonal'"),
        (dict(terms=()), "none"),
        (dict(learning_rate=0.0), "learning_rate is 0.0"),
        (dict(structure_rate=-1.0), "structure_rate is -1.0"),
        (dict(arm="sfa", structure_rate=0.0), "structure_rate is 0.0"),
        (dict(tiles=0), "tiles is 0"),
        (dict(questions=-1), "questions is -1"),
        (dict(arm="full", checkpointing=True, scr=SCRConfig(both=True)), "checkpointing with scr.both"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        FinetuneConfig(**wrong)


def test_data_that_cannot_be_trained_on_is_refused_and_the_model_given_back(bundle, charts, tmp_path):
    for data in (charts.select([]), []):
        with pytest.raises(ValueError, match="dataset is empty; at least one document is expected"):
            run(bundle, data, "vision", tmp_path / "empty")
    with pytest.raises(ValueError, match="no column 'questions'"):
        run(bundle, charts.remove_columns("questions"), "vision", tmp_path / "columns")
    broken = samples(charts)
    broken = [replace(s, source=s.source[:40]) for s in broken if s.document == broken[0].document]
    with pytest.raises(ValueError, match=broken[0].document):
        run(bundle, broken, "vision", tmp_path / "image")
    assert not (tmp_path / "image" / "arm").exists()
    with pytest.raises(ValueError, match="trains structural weights"):
        trainable(tiny(), "vision")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("arm", ["sfa", "projector", "vision"])
def test_a_training_that_ends_without_numbers_leaves_no_arm(bundle, charts, tmp_path, monkeypatch, arm, value):
    """The last step breaks a weight after a finite loss: nothing of it may look like a trained arm or a checkpoint."""
    make = loop_module.make_optimizer

    def breaking(*given):
        optimizer, steps = make(*given), []

        def after(*_):
            steps.append(1)
            if len(steps) == 4:
                optimizer.param_groups[-1]["params"][-1].data.view(-1)[-1] = value
        optimizer.register_step_post_hook(after)
        return optimizer

    monkeypatch.setattr(loop_module, "make_optimizer", breaking)
    with pytest.raises(ValueError, match="step 4 .*NaN or infinity"):
        run(bundle, charts, arm, tmp_path)
    assert not (tmp_path / "arm").exists()
    assert [path.name for path in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000002"]
    monkeypatch.undo()
    assert run(bundle, charts, arm, tmp_path).position.step == 4, "and it goes on from the last good checkpoint"


def test_the_whole_weights_are_checked_when_a_training_of_parts_ends(bundle, charts, tmp_path, monkeypatch):
    """Weights spread over processes are checked when they are put together, in all processes."""
    monkeypatch.setattr(finetune_module, "gather_tensor", lambda weight: torch.full_like(weight, float("nan")))
    with pytest.raises(ValueError, match="projector.* NaN or infinity"):
        run(bundle, charts, "projector", tmp_path, steps=1)
    assert not (tmp_path / "arm").exists()


@pytest.mark.parametrize("change", [
    lambda weight: torch.full_like(weight, float("nan")), lambda weight: torch.full_like(weight, float("inf")),
    lambda weight: weight.long(), lambda weight: weight.bool(),
], ids=["nan", "inf", "int64", "bool"])
@pytest.mark.parametrize("file", ["weights", "structure"])
def test_an_arm_whose_weights_are_no_numbers_is_refused_and_changes_nothing(bundle, charts, tmp_path, file, change):
    arm = run(bundle, charts, "vision", tmp_path, steps=1).arm
    weights = load_file(arm / f"{file}.safetensors")
    name = sorted(weights)[0]
    save_file(weights | {name: change(weights[name])}, arm / f"{file}.safetensors")
    if file == "structure":
        card = json.loads((arm / "structure.json").read_text())
        (arm / "structure.json").write_text(json.dumps(card | {"sha256": read_digest(arm / "structure.safetensors")}))
    files = sorted(path for path in arm.iterdir() if path.name != "SHA256SUMS")
    (arm / "SHA256SUMS").write_text("".join(f"{read_digest(path)}  {path.name}\n" for path in files))
    with pytest.raises(ValueError, match=f"{file}.safetensors: {name} holds"):
        load_arm(bundle, arm)
    if file == "structure":
        with pytest.raises(ValueError, match=f"{name} holds"):
            load_structure(bundle, arm)
