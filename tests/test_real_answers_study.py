"""Bad input of the study of real answers ends with one line that has the counts; several files are one parameter."""
import json

import pytest
from PIL import Image

from sfa_core.runs.commands import main
from sfa_core.runs.runs import StudyFailed, run_study
from sfa_core.runs.studies import named_versions

STUDY = "51_real_answers"
LOG = [dict(imgname=f"{n % 4}.png", query=f"How many {n}?", answer=str(n + 2), prediction=str(n)) for n in range(12)]


@pytest.fixture
def given(tmp_path, monkeypatch):
    "Two logs, their pages and their texts."
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path / "exports"))
    (tmp_path / "pages").mkdir()
    for n in range(4):
        Image.new("RGB", (30, 20), "white").save(tmp_path / "pages" / f"{n}.png")
    (tmp_path / "a.json").write_text(json.dumps(LOG))
    (tmp_path / "b.json").write_text(json.dumps({"details": [
        dict(question=row["query"], gt=row["answer"], pred=row["answer"]) for row in LOG]}))
    lines = [dict(image=f"{n}.png", text=str(n + 2), box=[1, 1, 9, 9], confidence=0.9) for n in range(4)]
    (tmp_path / "ocr.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return dict(answers=f"{tmp_path}/a.json,{tmp_path}/b.json", images=str(tmp_path / "pages"),
                ocr=str(tmp_path / "ocr.jsonl"), others=2)


def test_a_log_without_replies_strange_pages_and_strange_texts_are_one_line(given, tmp_path, forked_kernels):
    (tmp_path / "c.json").write_text(json.dumps([row | {"prediction": None} for row in LOG]))
    (tmp_path / "other").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / "other" / "z.png")
    (tmp_path / "z.jsonl").write_text(json.dumps(dict(image="z.png", text="1", box=[1, 1, 9, 9], confidence=0.9)))
    for change, words in ((dict(answers=str(tmp_path / "c.json")), "none of its 12 rows can be used .12 with no reply"),
                          (dict(images=str(tmp_path / "other")), "holds none of the pages of the questions .4 such as"),
                          (dict(ocr=str(tmp_path / "z.jsonl")), "knows none of the pages of the questions .4 such as")):
        with pytest.raises(StudyFailed, match=words) as error:
            run_study(STUDY, given | change, timeout=300)
        assert "\n" not in str(error.value)


def test_half_of_the_pages_are_counted(given, tmp_path, forked_kernels):
    for n in (2, 3):
        (tmp_path / "pages" / f"{n}.png").unlink()
    folder = run_study(STUDY, given, timeout=300)
    text = (folder / "notebook.ipynb").read_text()
    assert "2 of 4 pages found" in text and "6 of 12 questions are without their page" in text
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["logs"]["a"]["replies"] == 12 and metrics["comparisons"]["b"]["n"] == 12
    assert metrics["accuracy"]["b"]["pix2struct, all"]["right"] == 12


def test_files_of_a_list_count_into_the_id_of_a_run(given, tmp_path, capsys):
    before = named_versions("paths", given["answers"])
    assert list(before) == given["answers"].split(",") and len(set(before.values())) == 2
    (tmp_path / "b.json").write_text("{}")
    after = named_versions("paths", given["answers"])
    assert [before[name] == after[name] for name in before] == [True, False]
    assert main(["run", STUDY, "-p", "answers", f"{tmp_path}/a.json,{tmp_path}/gone.json"]) == 2
    assert "no file or folder" in capsys.readouterr().err
