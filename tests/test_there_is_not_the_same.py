"""What is there is compared before it is taken for what is asked for; what is damaged is named or made again."""
import json
import os
import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.embedded import EmbeddedConfig, train_tokenizer
from sfa_core.models.load import load_model, new_bundle, save_model
from sfa_core.pretraining.dynamics import DenseConfig, FreshPages, learn_dense
from sfa_core.pretraining.recipe import Recipe, decode_documents
from sfa_core.pretraining.stages import train_embedded
from sfa_core.runs import ablation
from sfa_core.training.arms import FinetuneConfig
from sfa_core.training.finetune import finetune
from sfa_core.training.stream import DocumentSet

TINY = EmbeddedConfig(vision_width=32, vision_layers=1, vision_heads=2, vision_hidden=64, language_width=32,
                      language_layers=1, language_heads=2, language_kv_heads=1, head_dim=16, language_hidden=64)
CONFIG = FinetuneConfig("control", steps=1, batch_size=2, questions=1, checkpoint_every=0)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["What is Oslo? 42 and 59", "the total of all bars"] * 4, 320)


@pytest.fixture(scope="module")
def bundle(tokenizer):
    return new_bundle(TINY, tokenizer)


@pytest.fixture
def trained(bundle, tmp_path):
    finetune(bundle, documents(4, 1), CONFIG, tmp_path, progress=False)
    return tmp_path


DAMAGE = {
    "arm.json is gone": lambda arm: (arm / "arm.json").unlink(),
    "arm.json is empty": lambda arm: (arm / "arm.json").write_text(""),
    "weights are cut": lambda arm: os.truncate(arm / "weights.safetensors", 100),
    "weights are gone": lambda arm: (arm / "weights.safetensors").unlink(),
    "no checksums": lambda arm: (arm / "SHA256SUMS").unlink(),
    "the folder is empty": lambda arm: (shutil.rmtree(arm), arm.mkdir()),
    "a file of that name": lambda arm: (shutil.rmtree(arm), arm.write_text("arm")),
    "a link to nothing": lambda arm: (shutil.rmtree(arm), arm.symlink_to("nowhere")),
}


@pytest.mark.parametrize("checkpointed", [True, False], ids=["with checkpoints", "without"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_arm_is_named_and_never_handed_out(bundle, trained, damage, checkpointed):
    if not checkpointed:
        shutil.rmtree(trained / "checkpoints")
    damage(trained / "arm")
    before = sorted(path.name for path in trained.rglob("*"))
    with pytest.raises(ValueError, match="arm"):
        finetune(bundle, documents(4, 1), CONFIG, trained, progress=False)
    assert sorted(path.name for path in trained.rglob("*")) == before, "nothing was trained"


@pytest.mark.parametrize("change", [dict(learning_rate=1e-2), dict(seed=1), dict(steps=2), dict(arm="vision")], ids=str)
@pytest.mark.parametrize("how", [dict(), dict(resume="never"), dict(until=1)], ids=str)
def test_the_arm_of_another_training_is_refused_before_anything_is_trained(bundle, trained, change, how):
    shutil.rmtree(trained / "checkpoints")
    with pytest.raises(ValueError, match="holds the arm of another training"):
        finetune(bundle, documents(4, 1), replace(CONFIG, **change), trained, progress=False, **how)
    assert not (trained / "checkpoints").exists()


def test_the_same_training_is_returned_and_never_means_never(bundle, trained):
    stamp = (trained / "arm" / "SHA256SUMS").stat().st_mtime_ns
    for how in (dict(), dict(until=1), dict(resume="previous")):
        assert finetune(bundle, documents(4, 1), CONFIG, trained, progress=False, **how).position.step == 1
    with pytest.raises(ValueError, match="already holds the arm of this training"):
        finetune(bundle, documents(4, 1), CONFIG, trained, progress=False, resume="never")
    assert (trained / "arm" / "SHA256SUMS").stat().st_mtime_ns == stamp


CELL = {
    "records are cut": ("records-*.parquet", lambda path: os.truncate(path, 100)),
    "records are empty": ("records-*.parquet", lambda path: path.write_bytes(b"")),
    "records of other questions": ("records-*.parquet", lambda path: pd.DataFrame({"id": ["x"]}).to_parquet(path)),
    "records without questions": ("records-*.parquet", lambda path: pd.DataFrame({"a": [1]}).to_parquet(path)),
    "the log is no log": ("log.jsonl", lambda path: path.write_text("{\n")),
    "the log is empty": ("log.jsonl", lambda path: path.write_text("")),
    "the log is gone": ("log.jsonl", lambda path: path.unlink()),
    "the arm is cut": ("arm/weights.safetensors", lambda path: os.truncate(path, 100)),
    "the arm is gone": ("arm/arm.json", lambda path: path.unlink()),
}


def test_a_damaged_cell_is_made_again_with_one_line(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path))
    data, asked = DocumentSet(documents(4, 1)), samples(documents(1, 9))[:2]
    make = lambda: ablation.run_cell(bundle, data, asked, CONFIG, 4)
    first = make()
    folder, = (path for path in (tmp_path / "cache" / "cells").iterdir() if path.is_dir())
    for name, (pattern, damage) in CELL.items():
        path, = folder.glob(pattern)
        damage(path)
        capsys.readouterr()
        again = make()
        said = capsys.readouterr().err
        assert said.count("is made again") == 1 and said.count("\n") == 1, (name, said)
        assert again[0].drop(columns="seconds").equals(first[0].drop(columns="seconds")), name
        assert list(again[1]["loss"]) == list(first[1]["loss"]), name
        assert make() and capsys.readouterr().err == "", f"{name}: it is sound afterwards"


def test_a_learning_curve_is_of_its_training_or_is_measured_again(tmp_path, tokenizer, capsys):
    held_out = decode_documents(documents(4, 3), (8, 8))
    config = DenseConfig(steps=3, batch_size=2, every=1)
    learn = lambda config=config: learn_dense(FreshPages("embedded"), held_out, tokenizer, config, tmp_path, TINY)[0]
    whole = learn()
    path = tmp_path / "curve.parquet"
    with pytest.raises(ValueError, match="holds the curve of another training"):
        learn(replace(config, learning_rate=1e-4))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match="holds the curve of another training"):
        learn(replace(config, seed=1))
    for damage in (lambda: path.write_bytes(b"PAR1"), lambda: path.unlink(),
                   lambda: pd.read_parquet(path)[lambda rows: rows["step"] != 1].to_parquet(path),
                   lambda: pd.DataFrame({"step": [1, 2, 3]}).to_parquet(path)):
        learn()  # its checkpoint is that of the last step
        damage()
        capsys.readouterr()
        pd.testing.assert_frame_equal(learn().reset_index(drop=True), whole.reset_index(drop=True), check_exact=True)
        assert capsys.readouterr().err.count("again") == 1


def test_a_stage_does_not_go_on_from_other_stages(tmp_path):
    recipe = Recipe(documents=24, document_seed=5, encoder_steps=2, lookup_steps=1, joint_steps=0, reading_steps=0,
                    cell_steps=0, batch=2, question_batch=2, questions=2, vocabulary=400, checkpoint_every=1)
    first = train_embedded(recipe, tmp_path, TINY, progress=False)[0]
    shutil.rmtree(tmp_path / "encoder")
    with pytest.raises(ValueError, match="identity.learned.begins is"):
        train_embedded(replace(recipe, encoder_steps=3), tmp_path, TINY, progress=False)
    shutil.rmtree(tmp_path / "encoder")
    again = train_embedded(recipe, tmp_path, TINY, progress=False)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))
    with pytest.raises(ValueError, match="identity.learned"):
        train_embedded(recipe, tmp_path, replace(TINY, vision_heads=4), progress=False)


def test_a_quantised_model_is_its_bits_and_every_weight(bundle, tmp_path):
    folder = save_model(bundle, tmp_path / "model")
    keys = {bits: load_model(folder, language_bits=bits, placement="cpu").identity for bits in (None, 4, 8)}
    assert len(set(keys.values())) == 3
    for bits in (4, 8):
        assert load_model(folder, language_bits=bits, placement="cpu").identity == keys[bits], "the same once more"
        for part in ("tower_of", "projector_of", "language_of"):
            made = load_model(folder, language_bits=bits, placement="cpu")
            weight = list(getattr(made.family, part)(made.model).parameters())[-2]
            with torch.no_grad():  # one element, of packed integers or of numbers
                flat = weight.data.view(-1)
                flat[0] = flat[0] + 1
            assert made.identity != keys[bits], (bits, part)


def test_a_model_between_two_renames_is_put_back_when_it_is_loaded(bundle, tmp_path):
    folder = save_model(bundle, tmp_path / "model")
    text = json.loads((folder / "config.json").read_text())
    folder.rename(tmp_path / ".model.0123456789ab.replaced")
    assert load_model(folder, placement="cpu").identity == bundle.identity and not list(tmp_path.glob(".*"))
    assert json.loads((folder / "config.json").read_text()) == text
