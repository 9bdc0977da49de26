"""`make tour` and `make test` install once, from the pinned versions, and again only when the requirements change."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path):
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def alone():
    "The environment without what `make` sets, as these tests run inside `make test`."
    return {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def planned(folder, *arguments):
    return subprocess.run(["make", "-n", *arguments], cwd=folder, env=alone(), capture_output=True, text=True,
                          check=True).stdout


@pytest.mark.parametrize("command, job",
                         [("tour", ".venv/bin/sfa run 00_tour"), ("test", ".venv/bin/python -m pytest")])
def test_a_command_installs_what_constraints_pin_and_then_does_its_job(checkout, command, job):
    plan = planned(checkout, command, "PIP_ARGS=--find-links=wheels")
    assert re.search(r"pip install --find-links=wheels -c constraints\.txt -e", plan) and plan.index(
        "pip install"
    ) < plan.index(job)


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
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower()
              for line in (ROOT / "constraints.txt").read_text().split()}
    settings = (ROOT / "settings.ini").read_text()
    for key in ("requirements", "dev_requirements", "ocr_requirements"):
        for requirement in re.search(rf"^{key} = (.*)$", settings, flags=re.M)[1].split():
            assert re.sub(r"[-_.]+", "-", re.split(r"[\[<>=]", requirement)[0]).lower() in pinned, (
                f"{requirement} is not pinned in constraints.txt"
            )


@pytest.mark.parametrize("ends", [0, 1])
def test_what_pip_says_is_shown_only_when_it_fails(checkout, ends):
    says = f'case "$*" in *--version*) exit 0;; esac; echo "Downloading torch"; echo "no space left" >&2; exit {ends}'
    program(checkout / ".venv/bin/python", says)
    done = subprocess.run(["make", ".venv/.installed"], cwd=checkout, env=alone(), capture_output=True, text=True)
    assert (done.returncode == 0) == (ends == 0) == (checkout / ".venv/.installed").exists()
    shown = done.stdout + done.stderr
    assert ("Downloading torch" in shown) == ("no space left" in shown) == (ends == 1) and "Installing" in shown


def left_without_pip(folder):
    "As a kill in the first seconds leaves it."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)


def left_while_installing(folder):
    "As a kill of pip leaves it: pip would take a package for whole that has its metadata and half of its files."
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    (folder / ".venv/.unfinished").touch()


@pytest.mark.parametrize("left", [left_without_pip, left_while_installing])
def test_an_environment_that_was_left_unfinished_is_made_again(checkout, left):
    left(checkout)
    (checkout / ".venv/half").touch()
    subprocess.run(["make", ".venv/.installed", f"PYTHON={sys.executable}", "PIP_ARGS=--help"], cwd=checkout,
                   env=alone(), check=True)
    assert not (checkout / ".venv/half").exists() and not (checkout / ".venv/.unfinished").exists()
    subprocess.run([checkout / ".venv/bin/python", "-m", "pip", "--version"], env=alone(), check=True)
    assert "pip" not in planned(checkout, ".venv/.installed")


def test_an_installation_that_fails_by_itself_keeps_the_environment(checkout):
    left_while_installing(checkout)
    (checkout / ".venv/.unfinished").unlink()
    (checkout / ".venv/half").touch()
    command = ["make", ".venv/.installed", f"PYTHON={sys.executable}", "PIP_ARGS=--no-such-option"]
    assert subprocess.run(command, cwd=checkout, env=alone(), capture_output=True).returncode
    assert (checkout / ".venv/half").exists() and not (checkout / ".venv/.unfinished").exists()


@pytest.mark.parametrize("fails", ["", "lint", "real", "test"])
def test_the_check_lints_first_tests_and_builds_and_stops_where_one_fails(tmp_path, fails):
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    tools = tmp_path / "tools"
    for name in ("git", "python3", "chromium"):
        program(tools / name, "exit 0")
    program(tools / "fc-list", "echo liberation nanum")
    program(tools / "ldconfig", "echo libGL.so.1 libglib-2.0.so.0")
    program(tools / "make", f'echo "$@" >> {tmp_path}/made; test "$1" != "{fails}"')
    done = subprocess.run([tmp_path / ".ci/run"], env=alone() | {"PATH": f"{tools}:{os.environ['PATH']}"},
                          capture_output=True, text=True)
    steps = ["lint", "real", "test", "wheel"]
    assert (tmp_path / "made").read_text().split() == (steps[: steps.index(fails) + 1] if fails else steps)
    assert (done.returncode == 0) == (not fails)


def test_linting_installs_ruff_alone(checkout):
    assert (
        re.search(r"pip install -q +-c constraints\.txt ruff$", planned(checkout, "lint"), flags=re.M)
        and "-e" not in planned(checkout, "lint").split()
    )
