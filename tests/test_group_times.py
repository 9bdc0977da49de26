"""The table at the end of `make test` counts what a group and its processes took, and names smoke runs that are too
long."""
import subprocess
import sys
from types import SimpleNamespace

import group_times
from group_times import SHOWN, SMOKE_RUN, GroupTimes, processor_seconds


def test_processes_that_have_ended_count():
    before = processor_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert processor_seconds() - before >= 0.45


class Reporter:
    def __init__(self):
        self.lines = []

    def section(self, title):
        self.lines.append(title)

    def write_line(self, line, **markup):
        self.lines.append(line)


def test_groups_of_all_workers_are_shown_the_slowest_first(monkeypatch):
    clock = iter([0.0, 1.0, 5.0, 5.5])  # processor seconds at the start and at every change of group
    monkeypatch.setattr(group_times, "processor_seconds", lambda: next(clock))
    worker = GroupTimes(lambda name: name.split("::")[0])
    for name in ("a::1", "a::2", "b::1", "c::1"):
        worker.pytest_runtest_protocol(SimpleNamespace(nodeid=name))
    worker.smoke_runs |= {"short": SMOKE_RUN - 1, "long": SMOKE_RUN + 1}
    node = SimpleNamespace(workeroutput={})
    worker.pytest_sessionfinish(SimpleNamespace(config=node))
    printing = GroupTimes(None)
    printing.pytest_testnodedown(node)
    printing.pytest_testnodedown(
        SimpleNamespace(workeroutput={"group_times": ({"b": 2.0, **{f"d{i}": 0.1 for i in range(20)}}, {}, {})})
    )
    printing.pytest_testnodedown(SimpleNamespace())  # a worker that died
    reporter = Reporter()
    printing.pytest_terminal_summary(reporter)
    title, *lines, last = reporter.lines
    assert title.startswith(f"{SHOWN} slowest groups, 9 s") and len(lines) == SHOWN
    assert [(line.split()[-1], float(line.split()[0])) for line in lines[:3]] == [("b", 6.0), ("a", 1.0), ("c", 0.5)]
    assert (
        last
        == f"smoke run of long takes {SMOKE_RUN + 1:.1f} s of processor time, more than {SMOKE_RUN}: make it smaller"
    )
