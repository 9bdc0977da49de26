"""A study that draws numbers out of a hat in two seconds, for the tests of runs and grids."""
import sys
import time

import nbformat

PARAMETERS = """
out_dir: str = ""  # folder of the results
seed: int = 0  # seed of the draw
size: int = 4  # how many numbers
rate: float = 0.5  # a share, 0..1
label: str = "a: b"  # any text
seconds: float = 0.0  # pause
checkpoint: bool = False  # whether an earlier attempt must have left one
interactive: bool = True  # live widgets
"""
CODE = """
import os, time
from pathlib import Path
import numpy as np
import pandas as pd
from sfa_core.runs.results import out_folder, write_metrics, write_records, write_summary, write_timings
assert size > 0, f"size is {size}, expected at least 1"
folder = out_folder(out_dir, "draw")
with open(os.environ["DRAW_LOG"], "a") as stream: print(os.getpid(), file=stream)
left = folder / "checkpoint" / "state"
found, _ = left.exists(), left.parent.mkdir(exist_ok=True)
left.write_text("half way")
print("drawing")
time.sleep(0 if found else seconds)
assert found or not checkpoint, "no checkpoint"
values = np.random.default_rng(seed).random(size)
write_records(folder, pd.DataFrame({"value": values}))
write_metrics(folder, {"z": np.float64(values.mean()), "a": {"n": size, "label": label}})
write_timings(folder, {"draw_seconds": 0.1})
write_summary(folder, f"mean {values.mean():.3f}")
print("written to", folder)
"""
SFA = [sys.executable, "-c", "import sys; from sfa_core.runs.commands import main; sys.exit(main())"]


def write_study(folder, name="draw", code=CODE, parameters=PARAMETERS):
    cells = [nbformat.v4.new_markdown_cell("# Draw\n\n> Numbers out of a hat."),
             nbformat.v4.new_code_cell(parameters.strip(), metadata={"tags": ["parameters"]}),
             nbformat.v4.new_markdown_cell("## Drawing"), nbformat.v4.new_code_cell(code.strip())]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    folder.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / f"{name}.ipynb")


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) if folder.exists() else []


def wait_for(condition, what, seconds=180):  # of a machine that is busy with other things
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.05)
