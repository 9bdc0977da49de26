"""A reference arm's name means the one that was trained on the model at hand"""
import json
import shutil

import pytest

from sfa_core.core.paths import REPOSITORY
from sfa_core.runs import folders
from sfa_core.runs.folders import arm_folder, reference_arms
from sfa_core.runs.studies import named_versions

ARMS = REPOSITORY / "exports" / "reference" / "arms"


@pytest.fixture
def two_models(tmp_path, monkeypatch):
    "Reference arms named control of two models."
    for folder, revision in (("arms", "aaa"), ("arms_page", "bbb")):
        made = tmp_path / "reference" / folder / "control"
        shutil.copytree(ARMS / "control", made)
        about = json.loads((made / "arm.json").read_text())
        about["base"]["revision"] = revision
        (made / "arm.json").write_text(json.dumps(about))
    monkeypatch.setattr(folders, "exports_root", lambda: tmp_path)
    monkeypatch.setattr(folders, "REPOSITORY", tmp_path)
    return tmp_path / "reference"


def test_a_name_leads_to_the_arm_of_the_model(two_models):
    assert reference_arms("control") == [two_models / "arms" / "control", two_models / "arms_page" / "control"]
    for revision, folder in (("aaa", "arms"), ("bbb", "arms_page"), ("", "arms"), ("ccc", "arms")):
        assert arm_folder("control", revision) == two_models / folder / "control"


def test_the_version_of_a_name_covers_the_arms_of_all_models(two_models):
    before = named_versions("arm", "control")
    (two_models / "arms_page" / "control" / "more.txt").write_text("changed")
    assert named_versions("arm", "control") != before


def test_there_is_none_of_another_name(two_models):
    assert reference_arms("vision") == []
    with pytest.raises(FileNotFoundError, match="no finished run is named 'vision'"):
        arm_folder("vision", "bbb")
