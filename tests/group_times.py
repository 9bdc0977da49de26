"""How long each group of tests takes, in processor seconds of the test process and of all that it started: what a
busy machine changes least."""
import time
from collections import Counter

import psutil
import pytest

SHOWN = 10      # groups in the table at the end
SMOKE_RUN = 12  # processor seconds that a smoke run may take on one core


def processor_seconds() -> float:
    "Return the processor seconds of this process, its descendants and those of them that have ended."
    this = psutil.Process()
    times = [this.cpu_times()]
    for process in this.children(recursive=True):
        try:
            times.append(process.cpu_times())
        except psutil.NoSuchProcess:
            continue  # ended meanwhile: its parent has its seconds now
    return sum(each.user + each.system + each.children_user + each.children_system for each in times)


class GroupTimes:
    """Measure the groups of this process and show those that take longest; under pytest-xdist every worker hands
    its own to the process that prints."""

    def __init__(self, group_of):
        self.group_of, self.group, self.since = group_of, None, (0.0, 0.0)
        self.processor, self.wall, self.smoke_runs = Counter(), Counter(), {}

    def change_to(self, group):
        """Book what has passed on the group that ends here; reading all processes takes some 10 ms, so only between
        groups."""
        now = processor_seconds(), time.monotonic()
        if self.group:
            self.processor[self.group] += max(0.0, now[0] - self.since[0])
            self.wall[self.group] += now[1] - self.since[1]
        self.group, self.since = group, now

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if (group := self.group_of(item.nodeid)) != self.group:
            self.change_to(group)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        self.change_to(None)
        if (output := getattr(session.config, "workeroutput", None)) is not None:
            output["group_times"] = dict(self.processor), dict(self.wall), self.smoke_runs

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        processor, wall, smoke_runs = getattr(node, "workeroutput", {}).get("group_times", ({}, {}, {}))
        self.processor.update(processor)
        self.wall.update(wall)
        self.smoke_runs.update(smoke_runs)

    def pytest_terminal_summary(self, terminalreporter):
        if not self.processor:
            return
        terminalreporter.section(f"{SHOWN} slowest groups, {sum(self.processor.values()):.0f} s of processor time in "
                                 f"all")
        for group, seconds in self.processor.most_common(SHOWN):
            terminalreporter.write_line(f"{seconds:7.1f} s processor {self.wall[group]:7.1f} s wall  {group}")
        for study, seconds in sorted(self.smoke_runs.items()):
            if seconds > SMOKE_RUN:
                terminalreporter.write_line(f"smoke run of {study} takes {seconds:.1f} s of processor time, more than "
                                            f"{SMOKE_RUN}: make it smaller",
                                            yellow=True)
