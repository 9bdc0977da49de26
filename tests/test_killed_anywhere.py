"""Killed before any touch of the disk, a run, a report, a model, a data set and a training are as they were or as
they were to be, and the same call ends the same. Some points here, all of them in `make bench`."""
import json
import subprocess
import sys
from pathlib import Path

import bench
import crash_points
import pytest

ROOT = Path(__file__).resolve().parents[1]
POINTS = {"run": 4, "model": 5, "finetune": 3}
HARNESS = Path(__file__).with_name("crash_points.py")


@pytest.mark.parametrize("scenario", POINTS)
def test_nothing_finished_is_lost_and_the_repetition_ends_the_same(scenario):
    ended = subprocess.run([sys.executable, HARNESS, scenario, "--points", str(POINTS[scenario])],
                           capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = json.loads(ended.stdout)
    assert said["killed"] == POINTS[scenario] and said["touches"] > 10


def test_every_point_was_tried_once_and_the_results_are_committed(capsys):
    "`make bench` kills at every point; what it found is a reference, and the page on what was tried gives its count."
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench.py", "--help"])
        bench.main()
    assert "--crash-points" in capsys.readouterr().out
    found = json.loads((ROOT / "exports" / "reference" / "bench" / "metrics.json").read_text())["crash_points"]
    assert set(found) == set(bench.CRASHES) == set(crash_points.SCENARIOS)
    assert all(entry["killed"] == entry["touches"] > 5 for entry in found.values())
    killed = sum(entry["killed"] for entry in found.values())
    page = (ROOT / "notebooks" / "library" / "01_core" / "17_reading.ipynb").read_text("utf-8")
    assert f"| {killed} of {killed} points | {killed} |" in page
