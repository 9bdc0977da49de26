"""The page model is trained stage by stage, in order, and a stage that was cut off ends with the same weights"""
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from safetensors.torch import load_file
from torch.nn.functional import one_hot

from sfa_core.pretraining import dynamics, page_model
from sfa_core.pretraining.dense import IGNORE, word_losses
from sfa_core.pretraining.dynamics import DenseConfig, FreshPages, draw_batch, learn_dense
from sfa_core.models.load import new_bundle
from sfa_core.pretraining.page_model import PAGE, PAGE_RECIPE, encoder_states, page_documents, page_tokenizer
from sfa_core.pretraining.recipe import pixel_values
from sfa_core.pretraining.stages import question_batches
from sfa_core.runs import curves, page_stages
from sfa_core.runs.page_stages import lookup_effect, lookup_table, read_page_stages, train_page_stage

SMALL = replace(PAGE_RECIPE, documents=48, encoder_steps=2, lookup_steps=2, joint_steps=2, reading_steps=1,
                cell_steps=1, batch=4, question_batch=2, questions=2, checkpoint_every=1)


@pytest.fixture(autouse=True)
def few_pages_are_asked_about(monkeypatch):
    monkeypatch.setattr(page_stages, "ASKED", dict(page_stages.ASKED, count=8))
    monkeypatch.setattr(page_stages, "PRINT", dict(page_stages.PRINT, steps=2, every=1, batch_size=4))
    monkeypatch.setattr(page_stages, "ANSWERED", dict(page_stages.ANSWERED, n=6))
    for module in (page_stages, page_model):
        monkeypatch.setattr(module, "FRESH", dict(page_model.FRESH, steps=2, documents=12))
    monkeypatch.setattr(page_stages, "binding_task", lambda side: curves.binding_task(side, held_out=4))


def test_stages_follow_each_other_and_each_begins_with_what_the_last_one_left(tmp_path):
    stages = tmp_path / "stages"
    for arm in ("control", "vision"):
        for stage in ("encoder", "lookup"):
            train_page_stage(stage, arm, 0, stages, recipe=SMALL, kept=tmp_path / f"{arm}-{stage}")
    with pytest.raises(ValueError, match="is not behind the stage encoder"):
        train_page_stage("lookup", "control", 0, stages, recipe=SMALL, kept=tmp_path / "again")
    with pytest.raises(FileNotFoundError, match="behind the stage print"):
        train_page_stage("joint", "control", 0, stages, recipe=SMALL, kept=tmp_path / "joint")
    before = load_file(stages / "control-0.safetensors")
    train_page_stage("print", "control", 0, stages, recipe=SMALL, kept=tmp_path / "print")
    behind = load_file(stages / "control-0.safetensors")
    changed = {name for name in before if not before[name].equal(behind[name])}
    assert changed and all("vision_tower" in name or name.startswith("heads.") for name in changed)
    joint = train_page_stage("joint", "control", 0, stages, recipe=SMALL, kept=tmp_path / "joint")
    found = {(one.stage, one.arm): one for one in read_page_stages(stages)}
    assert set(found) == {("encoder", "control"), ("encoder", "vision"), ("lookup", "control"), ("lookup", "vision"),
                          ("print", "control"), ("joint", "control")}
    assert joint.about["begins"] == found["print", "control"].about["ends"] != joint.about["ends"]
    assert not load_file(stages / "vision-0.safetensors").keys() == load_file(stages / "control-0.safetensors").keys()
    effect = lookup_effect(lookup_table(list(found.values())), 2)
    assert effect.seeds == 1 and effect.documents == 8
    for stage in ("reading", "cells", "fresh"):
        last = train_page_stage(stage, "control", 0, stages, recipe=SMALL, kept=tmp_path / stage)
        assert list(last.measured["stage"].unique()) == [stage]
    answers = page_stages.answer_table(stages)
    assert set(answers["stage"]) == {"joint", "reading", "cells", "fresh"} and set(answers["arm"]) == {"control"}
    asked = [list(part["document"] + part["kind"]) for _, part in answers.groupby("stage")]
    assert all(part == asked[0] for part in asked) and len(set(answers["document"])) == 6


@pytest.mark.parametrize("stage", ["encoder", "print"])
def test_a_stage_that_was_cut_off_ends_with_the_same_weights(stage, tmp_path, monkeypatch):
    for before in ("encoder", "lookup") if stage == "print" else ():
        train_page_stage(before, "vision", 0, tmp_path / "whole", recipe=SMALL, kept=tmp_path / before)
    if stage == "print":
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    whole = train_page_stage(stage, "vision", 0, tmp_path / "whole", recipe=SMALL, kept=tmp_path / "a")
    def cut(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dynamics, "save_encoder", cut)
        with pytest.raises(KeyboardInterrupt):
            train_page_stage(stage, "vision", 0, tmp_path / "cut", recipe=SMALL, kept=tmp_path / "b")
    assert not list((tmp_path / "cut").glob(f"*-{stage}.json"))
    again = train_page_stage(stage, "vision", 0, tmp_path / "cut", recipe=SMALL, kept=tmp_path / "b")
    assert again.about["ends"] == whole.about["ends"]


def test_words_are_marked_where_they_are_printed_and_the_pages_stay_the_same():
    pages = FreshPages("page", ("table", "bar", "grouped_bar"), 168)
    plain, marked = (draw_batch(pages, 0, 3, 3, printed=printed) for printed in (False, True))
    assert set(marked) - set(plain) == {"printed_row", "printed_column"}
    assert all((plain[name] == marked[name]).all() for name in plain)
    for name in ("row", "column"):
        printed = marked[f"printed_{name}"]
        known = marked[name][printed] != IGNORE
        assert printed.any() and known.float().mean() > 0.8
    right = {name: one_hot(marked[name].clamp(min=0), 44).float() * 100 for name in ("row", "column")}
    assert all(loss < 1e-6 for loss in word_losses(right, marked).values())


def test_a_set_of_documents_does_not_say_where_words_stand(tmp_path):
    few = page_documents(2, 1)
    config = DenseConfig(steps=1, words_weight=1.0)
    with pytest.raises(ValueError, match="does not keep where words stand"):
        learn_dense(few, few, None, config, tmp_path)
    with pytest.raises(ValueError, match="words_weight is -1"):
        replace(config, words_weight=-1)


@pytest.mark.parametrize("notes", [
    "[]", "{}", '{"arm": "control"}', '{"arm": "control", "seed": 0, "stage": "joint", "about": []}',
    '{"arm": "../x", "seed": 0, "stage": "encoder", "about": {"commit": "a", "begins": "b", "ends": "c"}}',
    '{"arm": "control", "seed": "0", "stage": "encoder", "about": {"commit": "a", "begins": "b", "ends": "c"}}',
    '{"arm": "control", "seed": 0, "stage": "encoder", "about": {"commit": "a", "begins": "b", "ends": 1}}', "{"])
def test_notes_that_are_of_no_stage_are_refused_by_name(tmp_path, notes):
    (tmp_path / "control-0-encoder.json").write_text(notes)
    pd.DataFrame({"step": [1]}).to_parquet(tmp_path / "control-0-encoder.parquet")
    with pytest.raises(ValueError, match="control-0-encoder.json"):
        read_page_stages(tmp_path)
    (tmp_path / "control-0-encoder.json").write_text(
        '{"arm": "control", "seed": 0, "stage": "encoder", "about": {"commit": "a", "begins": "b", "ends": "c"}}')
    assert len(read_page_stages(tmp_path)) == 1
    (tmp_path / "control-0-encoder.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="control-0-encoder.json is not what a stage measured"):
        read_page_stages(tmp_path)


def test_questions_on_known_states_are_packed_as_with_their_pixels():
    data = page_documents(12, 5)
    bundle = new_bundle(PAGE, page_tokenizer(data), 0)
    states = encoder_states(bundle, data.pixels)
    plain = question_batches(bundle, data, SMALL, "reading", 4)
    known = question_batches(bundle, data, SMALL, "reading", 4, states)
    for step in range(4):
        (inputs, index), (packed, same) = plain(step, 0), known(step, 0)
        assert (index == same).all() and packed.pop("pixel_values").equal(states[index])
        pixels = inputs.pop("pixel_values")
        assert pixels.equal(pixel_values(bundle, data.pixels[index]))
        assert inputs.keys() == packed.keys() and all(inputs[name].equal(packed[name]) for name in inputs)
