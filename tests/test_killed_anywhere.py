"""Killed before any touch of the disk, a run, a report, a model, a data set and a training are as they were or as
they were to be, and the same call ends the same. Some points here, all of them in `make bench`."""
import json
import multiprocessing
import sys
from pathlib import Path

import bench
import crash_points
import pytest

POINTS = {"run": 4, "model": 5, "finetune": 3}
FORKS = multiprocessing.get_context("forkserver")


@pytest.mark.parametrize("scenario", POINTS)
def test_nothing_finished_is_lost_and_the_repetition_ends_the_same(forkserver, scenario):
    here, there = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=crash_points.tell, args=(scenario, POINTS[scenario], there))
    process.start()
    there.close()
    said = here.recv()
    process.join()
    assert isinstance(said, dict), said
    assert said["killed"] == POINTS[scenario] and said["touches"] > 10


def test_the_measurements_of_make_bench_start(capsys):
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench.py", "--help"])
        bench.main()
    assert "--crash-points" in capsys.readouterr().out and set(bench.CRASHES) == set(crash_points.SCENARIOS)


def test_the_page_on_what_was_tried_gives_the_committed_count():
    root = Path(__file__).resolve().parents[1]
    found = json.loads((root / "exports" / "reference" / "bench" / "metrics.json").read_text())["crash_points"]
    assert set(found) <= set(bench.CRASHES) and all(entry["killed"] == entry["touches"] for entry in found.values())
    killed = sum(entry["killed"] for entry in found.values())
    page = (root / "notebooks" / "library" / "01_core" / "17_reading.ipynb").read_text("utf-8")
    assert f"| {killed} of {killed} points | {killed} |" in page
