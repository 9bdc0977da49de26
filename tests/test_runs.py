"""A run is finished, failed or unfinished, and never looks like another of these."""
import io
import json
import os
import signal
import subprocess

import build_site
import nbformat
import pandas as pd
import pytest
from sfa_core.runs.commands import main
from sfa_core.core.paths import exports_root
from sfa_core.runs.folders import find_run, finished_runs
from sfa_core.runs.results import write_json, write_metrics, write_records
from sfa_core.runs.console import BarLines
from sfa_core.runs.runs import StudyFailed, run_study, run_table
from sfa_core.runs.studies import resolve_parameters, study_parameters
from sfa_core.figures.style import browser
from tqdm import tqdm
from toy_study import CODE, PARAMETERS, SFA, everything, wait_for, write_study

PLOTLY = "application/vnd.plotly.v1+json"


def test_a_run_holds_notebook_parameters_metrics_records_and_provenance(home, capsys):
    run = run_study("draw", {"size": 6, "rate": 1}, name="six")
    assert run.parent == home / "exports" / "runs" / "draw"
    assert {path.name for path in run.iterdir()} == {"notebook.ipynb", "parameters.yaml", "metrics.json",
                                                     "timings.json", "records.parquet", "summary.txt",
                                                    "provenance.json", "figures", "checkpoint"}
    metrics = (run / "metrics.json").read_text()
    assert list(json.loads(metrics)) == ["a", "z"] and "seconds" not in metrics
    assert (run / "parameters.yaml").read_text().splitlines() == ["checkpoint: false", "interactive: false",
                                                                  "label: 'a: b'", "rate: 1.0",
                                                                 "seconds: 0.0", "seed: 0", "size: 6"]
    facts = json.loads((run / "provenance.json").read_text())
    assert {"git", "packages", "hardware", "seeds", "revisions", "wall_seconds", "started", "python", "study",
            "run"} <= set(facts)
    assert facts["seeds"] == {"seed": 0} and set(json.loads((run / "timings.json").read_text())) == {
        "draw_seconds",
        "wall_seconds",
    }
    assert len(pd.read_parquet(run / "records.parquet")) == 6
    notebook = (run / "notebook.ipynb").read_text()
    assert (
        f"written to {run}" in notebook
        and ".partial" not in notebook
        and "widgets" not in nbformat.reads(notebook, 4).metadata
    )
    assert find_run("six") == find_run("draw/six") == find_run(run.name) == run
    assert main(["show", "six"]) == 0 and "mean 0." in capsys.readouterr().out


def test_a_finished_run_is_not_repeated_and_forced_ones_get_new_folders_with_the_same_bytes(home):
    first = run_study("draw")
    assert run_study("draw", {"seed": 0}) == first == run_study("draw", {"size": "4"})
    again = run_study("draw", force=True)
    assert again.name == f"{first.name}-2" and again.parent == first.parent
    assert len((home / "log").read_text().splitlines()) == 2
    assert run_study("draw") == again, "the newest of equal runs answers"
    assert (first / "metrics.json").read_bytes() == (again / "metrics.json").read_bytes()


def test_the_id_follows_parameters_and_code_but_not_prose(home, forked_kernels, monkeypatch):
    first = run_study("draw")
    other = run_study("draw", {"seed": 1})
    study = home / "studies" / "draw.ipynb"
    notebook = nbformat.read(study, 4)
    notebook.cells[2].source = "## Another heading"
    nbformat.write(notebook, study)
    assert run_study("draw") == first != other
    notebook.cells[3].source += "\n2 + 2"
    nbformat.write(notebook, study)
    assert run_study("draw") not in (first, other)


def test_a_failed_study_keeps_its_traceback_and_is_no_run(home, forked_kernels, capsys):
    with pytest.raises(StudyFailed, match="AssertionError: size is -1, expected at least 1") as caught:
        run_study("draw", {"size": -1}, name="bad")
    failed = caught.value.folder
    assert failed.name.startswith("failed-") and finished_runs() == []
    notebook = nbformat.read(failed / "notebook.ipynb", 4)
    assert any(output.output_type == "error" for cell in notebook.cells for output in cell.get("outputs", []))
    assert "AssertionError" in (failed / "error.txt").read_text() and "\x1b" not in (failed / "error.txt").read_text()
    assert [row[:2] for row in run_table()] == [(f"draw/{failed.name}", "failed")]
    with pytest.raises(FileNotFoundError, match="bad"):
        find_run("bad")
    assert main(["run", "draw", "-p", "size",
                 "-1"]) == 1, "a failed run does not block the next try, and the exit code says it failed"
    assert "size is -1" in capsys.readouterr().err.splitlines()[-1]
    assert len(run_table()) == 2 and everything(home / "exports" / "runs" / "draw").count(failed.name) == 1


@pytest.mark.parametrize("code, message",
                         [("1 / 0", "ZeroDivisionError: division by zero"), ("import os; os._exit(3)", "DeadKernel"),
                                           ("1 + 1", "without writing metrics.json"),
                                           ("import time; time.sleep(60)", "not finished within 4 seconds")],
                         ids=["error", "dead kernel", "no metrics", "hangs"])
def test_whatever_stops_a_study_is_named(home, code, message):
    write_study(home / "studies", "broken", code)
    with pytest.raises(StudyFailed, match=message) as caught:
        run_study("broken", timeout=4 if "sleep" in code else None)
    assert (caught.value.folder / "notebook.ipynb").exists() and message in (
        caught.value.folder / "error.txt"
    ).read_text()
    state = "unfinished" if "sleep" in code else "failed"  # the next start may have more time
    assert finished_runs() == [] and [row[1] for row in run_table()] == [state] == [caught.value.state]


@pytest.mark.parametrize("arguments, message", [
    (["run", "drwa"], "unknown study 'drwa'; known: draw"),
    (["run", "draw", "-p", "sise", "8"], "parameter 'sise' of study 'draw' is unknown; known: seed, size, rate"),
    (["run", "draw", "-p", "size", "many"], "parameter 'size' of study 'draw' expects int, got 'many'"),
    (["run", "draw", "-p", "size", "1.5"], "expects int, got '1.5'"),
    (["run", "draw", "-p", "rate", "nan"], "expects float, got 'nan'"),
    (["run", "draw", "-p", "checkpoint", "maybe"], "expects bool, got 'maybe'"),
    (["run", "draw", "-p", "out_dir", "/tmp"], "parameter 'out_dir' of study 'draw' is set by the run itself"),
    (["run", "../studies/draw"], "a study name is letters"),
    (["run", "draw", "--name", "../../../escaped"], "a run name is letters"),
    (["run", "draw", "--name", "0123456789ab"], "cannot be the name of a run"),
    (["run", "draw", "--timeout", "0"], "timeout is a number of seconds above 0, got 0.0"),
    (["show", "../../etc"], "a run name is letters"),
    (["show", "nothing"], "no finished run is named 'nothing'"),
    (["list", "drwa"], "unknown study 'drwa'"),
    (["studies", "drwa"], "unknown study 'drwa'"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_line_and_leaves_nothing_behind(home, capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and captured.err.startswith("sfa: ")
        and captured.err.count("\n") == 1
        and message in captured.err
    )
    assert everything(home / "exports") == [] and everything(home) == ["studies", "studies/draw.ipynb"]


def test_a_study_must_have_the_common_parameters_and_readable_ones(home):
    write_study(home / "studies", "bare", parameters="size: int = 4  # numbers")
    with pytest.raises(ValueError, match=r"lacks the parameters \['interactive', 'out_dir', 'seed'\]"):
        study_parameters("bare")
    write_study(home / "studies", "list", parameters=f"{PARAMETERS}\nsizes: list = [1, 2]  # numbers")
    with pytest.raises(ValueError, match="parameter sizes of study 'list' must be a bool, int, float or str"):
        resolve_parameters("list", {})
    write_study(home / "studies", "twice", parameters=f"{PARAMETERS}\nbound: int = 1  # must be >= 1")
    with pytest.raises(ValueError, match=r"papermill cannot read the parameters \['bound'\] of study 'twice'"):
        resolve_parameters("twice", {})


def test_a_link_out_of_exports_is_not_followed(home, forked_kernels):
    run = run_study("draw")
    outside = home / "0123456789ab"
    run.rename(outside)
    for name in ("abcdefabcdef", "shortcut"):
        (run.parent / name).symlink_to(outside)
    assert finished_runs() == []
    for name in ("draw/abcdefabcdef", "draw/shortcut"):
        with pytest.raises(FileNotFoundError):
            find_run(name)


@pytest.mark.parametrize("given, kept",
                         [("plotly_mimetype", {PLOTLY}), (None, {PLOTLY, "image/png"} if browser() else {PLOTLY})],
                         ids=["json", "default"])
def test_figures_are_kept_as_json_and_as_png_where_a_browser_is(home, monkeypatch, given, kept):
    monkeypatch.setenv("PLOTLY_RENDERER", given) if given else monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    write_study(home / "studies", "figure", f"{CODE}\nimport plotly.express as px\npx.line([1, 2])")
    cells = nbformat.read(run_study("figure") / "notebook.ipynb", 4).cells
    assert set(cells[-1].outputs[-1].data) == kept


def test_one_name_in_two_studies_is_refused_until_the_study_is_said(home, forked_kernels):
    write_study(home / "studies", "second")
    runs = [run_study(study, name="same") for study in ("draw", "second")]
    with pytest.raises(ValueError, match="several runs are named 'same': draw/.*, second/"):
        find_run("same")
    assert [find_run(f"{study}/same") for study in ("draw", "second")] == runs


def test_a_bar_in_a_log_shows_a_state_every_ten_seconds_and_its_last_and_other_lines_stay(monkeypatch):
    now, kept = [0.0], io.StringIO()
    monkeypatch.setattr("sfa_core.runs.runs.time.monotonic", lambda: now[0])
    log = BarLines(kept)
    log.write("before\r\n")
    bar = tqdm(total=400, file=log, mininterval=0, miniters=1, bar_format="{n_fmt} of {total_fmt}")
    for _ in range(400):
        now[0] += 0.1
        bar.update()
    bar.close()
    log.write("aft")
    log.write("er\nno end")
    lines = kept.getvalue().splitlines()
    states = [int(line.split()[0]) for line in lines[1:-1]]
    assert (lines[0], lines[-1], states[-1]) == ("before", "after", 400) and len(states) == 4
    assert all(99 <= later - earlier <= 101 for earlier, later in zip([0, *states[:-2]], states[:-1]))


BARS = """
from tqdm import tqdm
print("unfinished", end="")
for _ in tqdm(range(300), mininterval=0): pass
"""


def test_a_study_announces_its_parts_with_the_share_that_was_measured_and_keeps_bars_short_in_a_log(
    home, forked_kernels, monkeypatch, capfd
):
    write_study(home / "studies", "bars", f"{CODE}{BARS}")
    measured = home / "stage_seconds.json"
    monkeypatch.setattr("sfa_core.runs.runs.STAGE_SECONDS", measured)
    said = {}
    for seed, size in ((0, 4), (1, 4), (2, 5)):
        said[seed, size] = (
            capfd.readouterr() and run_study("bars", {"seed": seed, "size": size}, progress=True) and capfd.readouterr()
        )
        if seed == 0:
            monkeypatch.setattr("build_site.STAGE_SECONDS", measured)
            build_site.keep_stage_seconds(finished_runs("bars")[0])
    seconds = json.loads(measured.read_text())["bars"]["seconds"]
    assert list(seconds) == ["Draw", "Drawing"] and all(value >= 0 for value in seconds.values())
    share = seconds["Drawing"] / sum(seconds.values())
    assert "\n== Drawing\n" in said[0, 4].err and "\n== Drawing\n" in said[2, 5].err, "not measured: not said"
    assert f"\n== Drawing (about {share:.0%} of the time)\n" in said[1, 4].err, "the seed is free"
    for output in said.values():
        assert (
            "unfinished\n" in output.out
            and output.err.count("300/300") == 1
            and "\r" not in output.err
            and output.err.count("it/s") <= 1
        )


def start(*arguments):
    return subprocess.Popen([*SFA, "run", "draw", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def test_two_processes_that_start_the_same_run_execute_it_once(home):
    both = [start("-p", "seconds", "3") for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert len((home / "log").read_text().splitlines()) == 1
    assert len(finished_runs()) == 1 and len({output.splitlines()[-1] for output in outputs}) == 1
    assert sum("waiting for it" in output for output in outputs) == 1
    assert [path.name for path in (exports_root() / "runs" / "draw").iterdir()] == [finished_runs()[0].name], (
        "no lock, no partial folder stays behind"
    )


def test_a_killed_run_looks_unfinished_and_goes_on_from_its_checkpoint(home):
    arguments = ("-p", "seconds", "60", "-p", "checkpoint", "true")
    process = start(*arguments)
    state = exports_root() / "runs" / "draw"
    wait_for(lambda: any(state.glob(".partial-*/checkpoint/state")), "the first checkpoint")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kernel = int((home / "log").read_text())
    wait_for(lambda: not os.path.exists(f"/proc/{kernel}")
             or "Z" in open(f"/proc/{kernel}/stat").read().rsplit(")")[1].split()[0], "the end of the kernel")
    assert finished_runs() == [] and [row[1] for row in run_table()] == ["unfinished"]
    again = start(*arguments)
    output = again.communicate(timeout=300)[0]
    assert again.returncode == 0, output
    assert [row[1] for row in run_table()] == ["finished"]


def test_progress_and_output_of_the_cells_reach_the_terminal_while_they_run(home):
    process = start("-p", "seconds", "3")
    seen = ""
    while "drawing" not in seen:
        line = process.stdout.readline()
        assert line, seen
        seen += line
    assert process.poll() is None and "== Drawing" in seen, "before the study ends"
    output = process.communicate(timeout=300)[0]
    assert "mean 0." in output and output.splitlines()[-1] == str(finished_runs()[0] / "notebook.ipynb")


def test_results_are_whole_or_absent(tmp_path):
    with pytest.raises(ValueError, match=r"metrics.json: .*; write None for a value that does not exist"):
        write_metrics(tmp_path, {"rate": float("nan")})
    with pytest.raises(TypeError, match="not set"):
        write_metrics(tmp_path, {"kinds": {1, 2}})
    with pytest.raises(ValueError, match=r"give \['seconds'\] to write_timings"):
        write_metrics(tmp_path, {"rows": [{"seconds": 3}]})
    assert list(tmp_path.iterdir()) == []
    write_json(tmp_path / "metrics.json", {"a": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "metrics.json", {"a": float("inf")})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"a": 1}
    records = pd.DataFrame({"id": ["1"], "answers": [["a", "b"]], "error": [None]})
    write_records(tmp_path, records)
    assert list(pd.read_parquet(tmp_path / "records.parquet").answers[0]) == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "records.parquet"]
