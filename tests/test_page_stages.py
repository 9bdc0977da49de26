"""The page model is trained stage by stage, in order, and a stage that was cut off ends with the same weights"""
from dataclasses import replace

import pytest
from safetensors.torch import load_file

from sfa_core.pretraining import dynamics
from sfa_core.pretraining.page_model import PAGE_RECIPE
from sfa_core.runs import curves, page_stages
from sfa_core.runs.page_stages import lookup_effect, lookup_table, read_page_stages, train_page_stage

SMALL = replace(PAGE_RECIPE, documents=48, encoder_steps=2, lookup_steps=2, joint_steps=2, reading_steps=0,
                batch=4, question_batch=2, questions=2, checkpoint_every=1)


@pytest.fixture(autouse=True)
def few_pages_are_asked_about(monkeypatch):
    monkeypatch.setattr(page_stages, "ASKED", dict(page_stages.ASKED, count=8))
    monkeypatch.setattr(page_stages, "binding_task", lambda side: curves.binding_task(side, held_out=4))


def test_stages_follow_each_other_and_each_begins_with_what_the_last_one_left(tmp_path):
    stages = tmp_path / "stages"
    for arm in ("control", "vision"):
        for stage in ("encoder", "lookup"):
            train_page_stage(stage, arm, 0, stages, recipe=SMALL, kept=tmp_path / f"{arm}-{stage}")
    with pytest.raises(ValueError, match="is not behind the stage encoder"):
        train_page_stage("lookup", "control", 0, stages, recipe=SMALL, kept=tmp_path / "again")
    joint = train_page_stage("joint", "control", 0, stages, recipe=SMALL, kept=tmp_path / "joint")
    found = {(one.stage, one.arm): one for one in read_page_stages(stages)}
    assert set(found) == {("encoder", "control"), ("encoder", "vision"), ("lookup", "control"), ("lookup", "vision"),
                          ("joint", "control")}
    assert joint.about["begins"] == found["lookup", "control"].about["ends"] != joint.about["ends"]
    assert not load_file(stages / "vision-0.safetensors").keys() == load_file(stages / "control-0.safetensors").keys()
    effect = lookup_effect(lookup_table(list(found.values())), 2)
    assert effect.seeds == 1 and effect.documents == 8


def test_a_stage_that_was_cut_off_ends_with_the_same_weights(tmp_path, monkeypatch):
    whole = train_page_stage("encoder", "vision", 0, tmp_path / "whole", recipe=SMALL, kept=tmp_path / "a")
    def cut(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dynamics, "save_encoder", cut)
        with pytest.raises(KeyboardInterrupt):
            train_page_stage("encoder", "vision", 0, tmp_path / "cut", recipe=SMALL, kept=tmp_path / "b")
    assert not (tmp_path / "cut" / "vision-0.safetensors").exists()
    again = train_page_stage("encoder", "vision", 0, tmp_path / "cut", recipe=SMALL, kept=tmp_path / "b")
    assert again.about["ends"] == whole.about["ends"]
