"""Killed before any touch of the disk, a run, a report, a model, a data set and a training are as they were or as
they were to be, and the same call ends the same. Some points here, all of them in `make bench`."""
import multiprocessing
import sys

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
