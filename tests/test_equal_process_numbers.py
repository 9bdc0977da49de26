"""Two containers have processes of equal numbers and one folder of results: neither takes the other's files."""
import subprocess
import sys

import pandas as pd

PROGRAM = """
import os, sys
os.getpid = lambda: 7
from pathlib import Path
from sfa_core.documents.generate import documents
from sfa_core.runs.collect import tidy_records
folder = Path(sys.argv[1])
(folder / sys.argv[2]).touch()
while len(list(folder.glob("ready-*"))) < 2: pass
for seed in range(4):
    assert len(documents(8, seed)) == 8
    assert tidy_records({folder / "run": {"a": 1}}, folder / "records.parquet") == (300_000, [])
"""


def test_two_processes_of_one_number_make_the_same_data_and_the_same_table(tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path / "exports"))
    (tmp_path / "run").mkdir()
    pd.DataFrame({"id": range(300_000)}).to_parquet(tmp_path / "run" / "records.parquet")
    program = [sys.executable, "-c", PROGRAM, tmp_path]
    both = [subprocess.Popen([*program, f"ready-{name}"], stderr=subprocess.PIPE, text=True)
            for name in "ab"]
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert len(pd.read_parquet(tmp_path / "records.parquet")) == 300_000
    assert not list(tmp_path.rglob("*.part*")), "nothing half written is left"
