"""Two containers have processes of equal numbers and one folder of results: neither takes the other's files, locks or
reports."""
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pandas as pd
import pytest
from sfa_core.core.files import write_atomic
from sfa_core.core.paths import exports_root
from sfa_core.runs.grids import plan, read_grid
from sfa_core.runs.leftovers import held_folder
from test_looking_never_raises import write_run
from toy_study import SFA

NAMESPACE = ["unshare", "--pid", "--fork", "--kill-child"]  # the first process in it has the number 1
PROGRAM = """
import os, sys
from pathlib import Path
folder, name, way = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
if way == "faked":
    os.getpid = lambda: 7
from sfa_core.core.files import locked
from sfa_core.documents.generate import documents
from sfa_core.runs.collect import tidy_records
from sfa_core.runs.leftovers import held_folder
(folder / f"ready-{name}").touch()
while len(list(folder.glob("ready-*"))) < 2: pass
for seed in range(3):
    assert len(documents(8, seed)) == 8
    assert tidy_records({folder / "run": {"a": 1}}, folder / "records.parquet") == (200_000, [])
for _ in range(30):
    with locked(folder / "count"), held_folder() as held:
        (held / name).touch()
        count = int((folder / "count").read_text())
        (folder / "count").write_text(str(count + 1))
        assert {path.name for path in held.iterdir()} == {name, "lock"}
print(os.getpid())
"""


def refused() -> str:
    "Return why this machine gives nobody process numbers of his own; empty where it does."
    try:
        done = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return done.stderr.strip() or f"exit {done.returncode}" if done.returncode else ""


def at_once(commands):
    "Run commands at the same time and return what they printed; all must succeed."
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for command in commands]
    said = [process.communicate(timeout=500) for process in running]
    assert [process.returncode for process in running] == [0] * len(running), said
    return [out.strip() for out, _ in said]


@pytest.mark.parametrize("way", ["faked", "namespaces"])
def test_two_processes_of_one_number_make_the_same_data_and_the_same_table(tmp_path, monkeypatch, way):
    if way == "namespaces" and (reason := refused()):
        pytest.skip(f"no process has a number of its own here: {reason}")
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path / "exports"))
    (tmp_path / "run").mkdir()
    (tmp_path / "count").write_text("0")
    pd.DataFrame({"id": range(200_000)}).to_parquet(tmp_path / "run" / "records.parquet")
    prefix = NAMESPACE if way == "namespaces" else []
    numbers = at_once([*prefix, sys.executable, "-c", PROGRAM, tmp_path, name, way] for name in "ab")
    assert numbers == [{"faked": "7", "namespaces": "1"}[way]] * 2
    assert len(pd.read_parquet(tmp_path / "records.parquet")) == 200_000
    assert (tmp_path / "count").read_text() == "60", "no two held the lock at once"
    assert not list(tmp_path.rglob("*.part*")) and not list((tmp_path / "exports" / "temporary").glob("*"))


def test_threads_that_write_one_file_all_succeed(tmp_path):
    path = tmp_path / "a.json"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_atomic(path, str(number) * 1000), range(200)))
    assert len(set(path.read_text())) <= 3 and [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_a_temporary_folder_of_a_long_name_is_left_for_one_that_can_hold_sockets(tmp_path, monkeypatch):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("SFA_EXPORTS", str(deep))
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with held_folder() as held, socket.socket(socket.AF_UNIX) as heard:
        heard.bind(str(held / "kernel.json-ipc-12345"))
        assert held.is_relative_to("/tmp") or held.is_relative_to("/dev/shm")
    assert not held.exists()


def test_two_whole_reports_of_one_grid_at_once_are_one_report(home):
    "In processes of equal numbers where this machine has them."
    grid = home / "small.yaml"
    grid.write_text("study: draw\nseeds: [0, 1]\n")
    for task in plan(read_grid(grid)):
        records = pd.DataFrame({"id": [str(i) for i in range(50_000)], "correct": True, "error": ""})
        records.to_parquet(write_run(task.identity) / "records.parquet")
    prefix = [] if refused() else NAMESPACE
    pages = at_once([*prefix, *SFA, "report", str(grid)] for _ in range(2))
    page = exports_root() / "reports" / "small" / "report.html"
    assert pages == [str(page)] * 2 and page.read_text().rstrip().endswith("</html>")
    assert "2 runs of study draw: 2 finished." in page.read_text()
    assert len(pd.read_parquet(page.with_name("records.parquet"))) == 100_000
    assert len(nbformat.read(page.with_name("notebook.ipynb"), 4).cells) > 20, "the notebook is whole"
    assert not list(exports_root().rglob("*.part*"))
