"""What many runs cost, and what a report over them costs: `make bench`. Measured here, never asserted in tests.

200 small runs on two workers: overhead = workers x wall / sum of the walls of the runs - 1. A run's wall is what
its provenance says: kernel, cells and files
of that run; what is added is starting workers, planning, naming and handing out. What the cells alone took stands
beside it, so that the price of a kernel
per run is not hidden.
A report over 1,000,000 records: seconds and peak memory of a process that does nothing else.
Every crash point of what writes (tests/crash_points.py): killed there, repeated, compared. `--crash-points` measures
these alone, all of them or those that are named, and keeps the other results as they are.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from rich.console import Console
from toy_study import write_study

from sfa_core.runs.grids import Grid, plan, run_grid
from sfa_core.core.paths import REPOSITORY
from sfa_core.runs.report import report_grid
from sfa_core.runs.folders import finished_runs
from sfa_core.runs.results import (
    provenance,
    write_json,
    write_metrics,
    write_records,
    write_summary,
    write_timings,
)
from sfa_core.runs.studies import resolve_parameters

CODE = """
import time
began = time.perf_counter()
import numpy as np
from sfa_core.runs.results import out_folder, write_metrics, write_timings
folder = out_folder(out_dir, "draw")
values = np.random.default_rng(seed).random((400, 400))
write_metrics(folder, {"norm": float(np.linalg.norm(values @ values))})
write_timings(folder, {"cells_seconds": time.perf_counter() - began})
"""


def grid_overhead(runs: int, workers: int) -> dict[str, float]:
    "Make a grid of small runs and compare the wall clock with the sum of the runs."
    write_study(Path(os.environ["SFA_STUDIES"]), code=CODE)
    began = time.perf_counter()
    states = run_grid(Grid("load", "draw", {}, seeds=tuple(range(runs))), workers, console=Console(stderr=True))
    wall = time.perf_counter() - began
    assert all(event.state == "finished" for event in states.values()), "a run of the load failed"
    timings = [json.loads((path / "timings.json").read_text()) for path in finished_runs("draw")]
    walls, cells = (sum(timing[name] for timing in timings) for name in ("wall_seconds", "cells_seconds"))
    return {"runs": len(timings), "workers": workers, "wall_seconds": wall, "run_wall_seconds": walls,
            "overhead": workers * wall / walls - 1,
            "median_run_seconds": float(np.median([timing["wall_seconds"] for timing in timings])),
            "cells_seconds": cells}


def pretend_runs(grid: Grid, rows: int) -> None:
    "Write the folders of finished runs with records as `evaluate` writes them."
    runs = Path(os.environ["SFA_EXPORTS"]) / "runs" / grid.study
    for task in plan(grid):
        folder, draw = runs / task.identity, np.random.default_rng(task.parameters["seed"])
        folder.mkdir(parents=True)
        numbers = np.arange(rows)
        right = draw.random(rows) < 0.6
        write_records(folder, pd.DataFrame({
            "id": [f"embedded-bar-1-{i}/3" for i in numbers], "document": [f"embedded-bar-1-{i // 3}" for i in numbers],
            "kind": draw.choice(["read_label", "sum"], rows),
            "question": [f"What is the value of oak in chart {i}?" for i in numbers],
            "answers": [[str(i)] for i in draw.integers(0, 100, rows)],
            "prediction": draw.integers(0, 100, rows).astype(str), "correct": right, "strict": right, "lenient": right,
            "score": right.astype(float),
            "truncated": False, "error": "", "category": "", "seconds": draw.random(rows)}))
        resolved = resolve_parameters(grid.study, task.parameters)
        (folder / "parameters.yaml").write_text(yaml.safe_dump(resolved))
        (folder / "metrics.json").write_text("{}")
        (folder / "notebook.ipynb").write_text("{}")
        write_json(folder / "provenance.json",
                   {"study": grid.study, "run": task.identity, "started": "2026-01-01", "wall_seconds": 1.0})


def report_cost(rows: int, runs: int) -> dict[str, float]:
    "Report over pretended runs in a process of its own."
    write_study(Path(os.environ["SFA_STUDIES"]))
    pretend_runs(Grid("million", "draw", {"size": [1, 2]}, seeds=tuple(range(runs // 2))), rows // runs)
    process = subprocess.run([sys.executable, __file__, "--only-report", str(runs // 2)], check=True,
                             capture_output=True, text=True)
    return {"rows": rows, "runs": runs} | json.loads(process.stdout.splitlines()[-1])


def only_report(seeds: int) -> None:
    "Write the report and print its cost; for a process of its own."
    began = time.perf_counter()
    grid = Path(os.environ["SFA_STUDIES"]).with_name("million.yaml")
    grid.write_text(yaml.safe_dump({"study": "draw", "parameters": {"size": [1, 2]}, "seeds": list(range(seeds))}))
    page = report_grid(grid)
    seconds = time.perf_counter() - began
    written = pd.read_parquet(page.with_name("records.parquet"), columns=["run"])
    # the kernel too
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": seconds, "peak_gib": peak / 2**20, "rows_written": len(written)}))


CRASHES = ("run", "report", "model", "documents", "finetune", "pretraining")


def crash_points(names: Sequence[str], out: Path) -> None:
    """Kill what writes before each of its touches of the disk, and add the counts to the results, each scenario with
    the commit it was run at; CalledProcessError when something is lost."""
    harness, facts = Path(__file__).with_name("crash_points.py"), provenance({}, {})
    for name in names:
        said = subprocess.run([sys.executable, harness, name], check=True, stdout=subprocess.PIPE, text=True).stdout
        metrics, known = (json.loads((out / file).read_text("utf-8")) for file in ("metrics.json", "provenance.json"))
        write_metrics(out, metrics | {"crash_points": metrics.get("crash_points", {}) | {name: json.loads(said)}})
        origin = known.get("crash_points", {}) | {name: facts["git"]}
        write_json(out / "provenance.json", known | {"crash_points": origin})
        print(f"{name}: {said.strip()}", flush=True)
    found = json.loads((out / "metrics.json").read_text("utf-8"))["crash_points"]
    killed, lines = sum(entry["killed"] for entry in found.values()), (out / "summary.txt").read_text("utf-8")
    rest = [line for line in lines.splitlines() if "crash points" not in line]
    write_summary(out, "\n".join([*rest, f"{killed} crash points of {len(found)} writers: nothing lost, nothing half "
                                         f"done that looks done, every repetition ended the same."]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "exports" / "reference" / "bench")
    parser.add_argument("--only-report", type=int)
    parser.add_argument("--crash-points", nargs="*", choices=CRASHES)
    options = parser.parse_args()
    if options.only_report:
        return only_report(options.only_report)
    if options.crash_points is not None:
        return crash_points(options.crash_points or CRASHES, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    found, began, facts = {}, time.time(), provenance({}, {})
    for name, measure in (("grid", lambda: grid_overhead(options.runs, options.workers)),
                          ("report", lambda: report_cost(options.rows, 200))):
        with tempfile.TemporaryDirectory() as scratch:
            os.environ |= {"SFA_EXPORTS": f"{scratch}/exports", "SFA_STUDIES": f"{scratch}/studies",
                           "DRAW_LOG": f"{scratch}/log"}
            found[name] = measure()
            del os.environ["SFA_EXPORTS"], os.environ["SFA_STUDIES"]
    grid, report = found["grid"], found["report"]
    write_timings(options.out, found)
    write_metrics(options.out,
                  {"grid": {"runs": grid["runs"], "workers": grid["workers"]},
                   "report": {"rows": report["rows_written"], "runs": report["runs"]}})
    write_json(options.out / "provenance.json",
               facts | {"what": "make bench", "wall_seconds": round(time.time() - began, 1)})
    write_summary(options.out,
                  f"""{grid['runs']} runs of {grid['median_run_seconds']:.2f} s (median), {grid['workers']} workers: {grid['wall_seconds']:.0f} s,
overhead {100 * grid['overhead']:.1f} % (bar: 15 %).
Of {grid['run_wall_seconds']:.0f} s in the runs, {grid['cells_seconds']:.0f} s were their cells; the rest is a kernel for each.
{report['rows_written']:,} records of {report['runs']} runs in one report: {report['seconds']:.1f} s, peak {report['peak_gib']:.2f} GiB (bar: 30 s, 2 GiB).""")  # noqa: E501
    crash_points(CRASHES, options.out)
    print((options.out / "summary.txt").read_text())


if __name__ == "__main__":
    main()
