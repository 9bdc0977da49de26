"""Killed before any touch of the disk, a run, a report, a model, a data set and a training are as they were or as
they were to be, and the same call ends the same. Some points here, all of them in `make bench`."""
import json
import subprocess
import sys
from pathlib import Path

import bench
import pytest

POINTS = {"run": 4, "model": 5, "finetune": 3}
HARNESS = Path(__file__).with_name("crash_points.py")


@pytest.mark.parametrize("scenario", POINTS)
def test_nothing_finished_is_lost_and_the_repetition_ends_the_same(scenario):
    ended = subprocess.run([sys.executable, HARNESS, scenario, "--points", str(POINTS[scenario])],
                           capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = json.loads(ended.stdout)
    assert said["killed"] == POINTS[scenario] and said["touches"] > 10


def test_the_measurements_of_make_bench_start(capsys):
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench.py", "--help"])
        bench.main()
    assert "--crash-points" in capsys.readouterr().out
    assert all(f'"{name}": (' in HARNESS.read_text() for name in bench.CRASHES)
