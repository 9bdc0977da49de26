"""`make tour` and `make test` install once, from the pinned versions, and again only when the requirements change."""
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def planned(folder, *arguments):
    alone = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # not as a part of the `make test` that runs this
    return subprocess.run(["make", "-n", *arguments], cwd=folder, env=alone, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("command, job", [("tour", ".venv/bin/sfa run 00_tour"), ("test", ".venv/bin/python -m pytest")])
def test_a_command_installs_what_constraints_pin_and_then_does_its_job(checkout, command, job):
    plan = planned(checkout, command, "PIP_ARGS=--find-links=wheels")
    assert re.search(r"pip install --find-links=wheels -c constraints\.txt -e", plan) and plan.index("pip install") < plan.index(job)


@pytest.mark.parametrize("changed", ["settings.ini", "setup.py", "constraints.txt"])
def test_the_second_call_installs_nothing_until_a_requirement_changes(checkout, changed):
    stamp = checkout / ".venv" / ".installed"
    stamp.parent.mkdir()
    stamp.touch()
    assert "pip" not in planned(checkout, "tour") + planned(checkout, "test")
    later = stamp.stat().st_mtime + 10
    os.utime(checkout / changed, (later, later))
    assert "pip install" in planned(checkout, "test")


def test_every_requirement_is_pinned():
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in (ROOT / "constraints.txt").read_text().split()}
    settings = (ROOT / "settings.ini").read_text()
    for key in ("requirements", "dev_requirements"):
        for requirement in re.search(rf"^{key} = (.*)$", settings, flags=re.M)[1].split():
            assert re.sub(r"[-_.]+", "-", re.split(r"[\[<>=]", requirement)[0]).lower() in pinned, f"{requirement} is not pinned in constraints.txt"
