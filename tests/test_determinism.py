"""The same run gives the same bytes; what another number of threads changes is small, and on record."""
import json
import os

import pytest
from forked_kernels import fork_kernels
from sfa_core.runs.collect import differing
from sfa_core.runs.runs import run_study

# of a rate over the 40 questions of the smoke run: sums in another order may turn two close calls
STUDY, TOLERANCE = "10_baseline_eval", 0.05


@pytest.fixture
def repeated(smoke_run, monkeypatch):
    "A smoke run of a study that loads and asks the model, and a function that makes it again with other threads."
    first = smoke_run(STUDY)
    monkeypatch.setenv("SFA_EXPORTS", str(first.parents[2]))

    def again(threads=None):  # a forked kernel cannot have another number of threads
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", threads) if threads else fork_kernels(patch)
            return run_study(STUDY, dict(limit=40), force=True, timeout=300)
    return first, again


def test_the_same_run_has_the_same_bytes_and_other_threads_change_little_and_are_named(repeated):
    first, again = repeated
    second = again()
    assert second != first and (first / "metrics.json").read_bytes() == (second / "metrics.json").read_bytes()
    assert (first / "parameters.yaml").read_bytes() == (second / "parameters.yaml").read_bytes()
    assert differing([first, second]).empty, "nothing that is on record differs between the two"
    before = os.environ.get("OMP_NUM_THREADS")
    third = again(threads="1" if before != "1" else "2")
    summaries = [json.loads((run / "metrics.json").read_text())["summary"] for run in (first, third)]
    rates = [{"all": summary["rate"]}
             | {kind: found["rate"] for kind, found in summary["kinds"].items() if found["n"] >= 10}
             for summary in summaries]
    assert rates[0].keys() == rates[1].keys() and all(
        abs(rates[0][kind] - rates[1][kind]) <= TOLERANCE for kind in rates[0]
    )
    found = differing([first, third])
    assert set(found["what"]) == {"hardware.threads"} and sorted(found["value"]) == sorted(
        [str(before), "1" if before != "1" else "2"]
    )
