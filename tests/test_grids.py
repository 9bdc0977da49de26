"""A grid makes every run once, whatever dies on the way, and says what became of each."""
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress

import pandas as pd
import pytest
import yaml
from sfa_core.runs.commands import main
from sfa_core.runs.grids import plan, read_grid, run_grid, survey
from sfa_core.core.paths import DATA, exports_root
from sfa_core.runs.report import report_grid
from sfa_core.runs.folders import finished_runs
from sfa_core.runs.runs import run_table
from sfa_core.runs.workers import Event, on_this_machine, slots
from toy_study import CODE, SFA, everything, wait_for, write_study

CARD = CODE + "\nwith open(os.environ['DRAW_LOG'] + '.card', 'a') as stream: print(os.environ['CUDA_VISIBLE_DEVICES'], file=stream)"  # noqa: E501
KILLER = "import os, signal, time\nif size == 1: os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)\n" + CODE
RECORDS = CODE.replace('{"value": values}', '{"id": [str(i) for i in range(size)], "correct": values < rate, "error": '
                                            '""}')


@pytest.fixture
def write_grid(forkserver, home):
    "Write a grid of the study draw."

    def write(name="small", study="draw", **said):
        path = home / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"study": study, **said}))
        return path
    return write


def executions(home):
    return len((home / "log").read_text().splitlines()) if (home / "log").exists() else 0


def alive(pid):
    "Whether a process is still doing something."
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def parent_of(pid):
    with open(f"/proc/{pid}/stat") as stream:
        return int(stream.read().rsplit(")", 1)[1].split()[1])


def kernels(home):
    return [int(line) for line in (home / "log").read_text().split()] if (home / "log").exists() else []


def test_a_grid_is_made_once_failures_are_kept_and_only_they_are_made_again_on_request(
    home, write_grid, capsys, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write_study(home / "studies", code=CARD)
    grid = write_grid(parameters={"size": [2, -1], "rate": 1}, seeds=[0, 1], gpus=1)
    assert main(["grid", str(grid), "--dry-run"]) == 0 and executions(home) == 0
    assert re.findall(r"new +(.*)", capsys.readouterr().out) == ["size=2 seed=0", "size=2 seed=1", "size=-1 seed=0",
                                                                 "size=-1 seed=1"]
    assert main(["grid", str(grid), "--workers", "2"]) == 1, "the exit code says that not all are finished"
    said = capsys.readouterr()
    assert (
        "small: 2 of 4 runs are finished" in said.out
        and said.out.count("AssertionError: size is -1, expected at least 1; see ") == 2
    )
    assert len(re.findall(r"\] finished draw/", said.err)) == 2 and "[2/4]" in said.err
    assert [row[1] for row in run_table()] == ["finished"] * 2 + ["failed"] * 2
    assert (
        set((home / "log.card").read_text().split()) <= {"3", "5"} and len((home / "log.card").read_text().split()) == 2
    ), "each run sees one card"
    assert executions(home) == 2
    facts = json.loads((finished_runs()[0] / "provenance.json").read_text())
    assert facts["hardware"]["threads"] == str(max(1, len(os.sched_getaffinity(0)) // 2)), (
        "the share of the cores is on record"
    )
    again = run_grid(grid, workers=2)
    assert (
        sorted(event.state for event in again.values()) == ["failed", "failed", "finished", "finished"]
        and executions(home) == 2
    )
    assert len(run_table()) == 4
    for path in (exports_root() / "runs" / "draw").glob("failed-*"):
        assert (
            "Exception encountered" in (path / "error.txt").read_text()
            and "size is -1" in (path / "notebook.ipynb").read_text()
        )
    assert main(["grid", str(grid), "--retry-failed"]) == 1 and executions(home) == 2 and len(run_table()) == 6, (
        "the failed ones, and only they"
    )


def test_a_report_holds_every_run_and_everything_in_it_is_text(home, write_grid, forked_kernels):
    write_study(home / "studies", code=RECORDS)
    grid = write_grid(parameters={"size": [300, 0], "label": "<script>alert(1)</script>"}, seeds=[0, 1])
    run_grid(grid, workers=2)
    page = report_grid(grid)
    text, table = page.read_text(), pd.read_parquet(page.with_name("records.parquet"))
    assert "2 finished, 2 failed" in text and "size is 0, expected at least 1" in text and "<script>alert" not in text
    assert len(table) == 600 and set(table["parameter_label"]) == {"<script>alert(1)</script>"}
    by_run = table.groupby(["run", "parameter_size", "parameter_seed"])["correct"].agg(["size", "sum"]).reset_index()
    assert list(by_run["size"]) == [300, 300] and set(by_run["parameter_seed"]) == {0, 1}
    assert f"{by_run['sum'].sum() / 600:.3f}" in text, "the mean over seeds"
    before = run_table()
    write_study(home / "studies", code=RECORDS + "\n2 + 2")
    text = report_grid(grid).read_text()
    assert "2 finished by other code, 2 no run yet" in text and run_table() == before
    assert "2 runs finished by other code are in no rate" in text and f"{by_run['sum'].sum() / 600:.3f}" not in text
    assert not len(pd.read_parquet(page.with_name("records.parquet")))


@pytest.mark.parametrize("text, said", [
    ("study: drwa", "unknown study 'drwa'"), ("parameters: {size: 1}", "expected study and some of"),
    ("study: draw\nseed: [1]", "holds study, seed; expected"),
    ("study: draw\nparameters: {sise: 1}", "parameter 'sise' of study 'draw' is unknown"),
    ("study: ../draw", "a study name is"),
    ("study: draw\nparameters: {size: [1, x]}", "expects int, got 'x'"),
    ("study: draw\nseeds: [1.5]", "expects int, got 1.5"),
    ("study: draw\nseeds: [1, 1]", "2 times, expected every run once"), ("study: draw\ntimeout: 0", "seconds above 0"),
    ("study: draw\nparameters: {out_dir: /tmp}", "is set by the run itself"),
    ("study: draw\ngpus: 1", "every run of the grid needs 1 GPU, this machine offers 0"), ("study: [", "is no YAML"),
    ("", "holds nothing"),
    ("!!python/object/apply:os.system ['touch planted']", "is no YAML"),
], ids=lambda text: text[:40].replace("\n", " "))
def test_a_grid_that_cannot_be_meant_is_refused_before_anything_starts(home, capsys, monkeypatch, text, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.chdir(home)
    (home / "wrong.yaml").write_text(text)
    assert main(["grid", str(home / "wrong.yaml")]) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if not line.startswith("sfa: no Chromium")]
    assert captured.out == "" and len(errors) == 1 and errors[0].startswith("sfa: ") and said in errors[0]
    assert everything(home) == ["studies", "studies/draw.ipynb", "wrong.yaml"]


@pytest.mark.parametrize("arguments, said", [
    (["--workers", "0"], "workers is 0, expected at least 1"),
    (["--workers", "1", "--scheduler", "tcp://h:1"], "one of them"),
    (["--scheduler", "nonsense://h"], "no Dask scheduler answers at 'nonsense://h'")],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_place_to_run_that_cannot_be_meant_is_refused(home, write_grid, capsys, arguments, said):
    assert main(["grid", str(write_grid()), *arguments]) == 2
    assert said in capsys.readouterr().err and executions(home) == 0 and finished_runs() == []
    assert (
        main(["grid", "no_such_grid"]) == 2
        and "expected a YAML file or one of ablation, finetune, small" in capsys.readouterr().err
    )


def test_a_worker_that_is_killed_costs_no_run(home, write_grid):
    grid = read_grid(write_grid(parameters={"seconds": [0, 60]}))
    seen = []
    for event in on_this_machine(plan(grid), slots(2)):
        seen.append(event)
        if event.state == "finished" and len(seen) == 3:
            wait_for(lambda: any((exports_root() / "runs" / "draw").glob(".partial-*/checkpoint/state")),
                     "the first checkpoint")
            wait_for(lambda: sum(map(alive, kernels(home))) == 1, "the end of the other run's kernel")
            first, = filter(alive, kernels(home))
            os.kill(parent_of(first), signal.SIGKILL)
    assert sorted(event.state for event in seen) == ["again", "finished", "finished", "running", "running", "running"]
    assert "its worker was killed by SIGKILL" in next(event.reason for event in seen if event.state == "again")
    assert len(kernels(home)) == 3 and not alive(first), "the kernel does not outlive its worker"
    assert [row[1] for row in run_table()] == ["finished",
                                               "finished"], "from the checkpoint: it does not wait a minute again"


def test_a_run_that_takes_its_workers_down_is_given_up_and_the_others_go_on(home, write_grid, capsys):
    write_study(home / "studies", code=KILLER)
    grid = write_grid(parameters={"size": [1, 2, 3]})
    assert main(["grid", str(grid), "--workers", "1"]) == 1
    assert re.search(r"unfinished draw/\w+: its worker was killed by SIGKILL \(from outside, or because memory ran "
                     r"out\)", capsys.readouterr().out)
    assert sorted(row[1] for row in run_table()) == ["finished", "finished", "unfinished"]
    assert sorted(event.state
                  for event in survey(plan(read_grid(grid))).values()) == ["finished", "finished", "unfinished"]


def test_a_study_that_hangs_ends_at_the_timeout_of_its_grid(home, write_grid):
    grid = write_grid(parameters={"seconds": 600}, timeout=2)
    event, = run_grid(grid, workers=1).values()
    assert (
        event.state == "unfinished"
        and event.reason == "study 'draw' was stopped: not finished within 2 seconds"
        and finished_runs() == []
    )


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_grid_that_is_stopped_leaves_nothing_running_and_goes_on_where_it_was(home, write_grid, ending):
    grid = write_grid(parameters={"seconds": 60, "checkpoint": True})
    # a job in the background of a shell would ignore SIGINT
    command = ["env", "--default-signal=INT", *SFA, "grid", str(grid), "--workers", "1"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              start_new_session=True)
    wait_for(lambda: any((exports_root() / "runs" / "draw").glob(".partial-*/checkpoint/state")),
             "the first checkpoint")
    kernel, = kernels(home)
    worker = parent_of(kernel)
    client.send_signal(ending)
    said = client.communicate(timeout=300)[0]
    assert ending != signal.SIGINT or (client.returncode == 130 and "the same command goes on where it stopped" in said)
    wait_for(lambda: not alive(worker) and not alive(kernel), "the end of worker and kernel")
    assert [row[1] for row in run_table()] == ["unfinished"]
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "small: 1 of 1 runs are finished" in again.stdout, again.stderr
    assert [row[1] for row in run_table()] == ["finished"] and executions(home) == 2


@pytest.fixture
def cluster(home):
    "A Dask scheduler and two workers with a GPU each, processes of their own; gives the address and the workers."
    with ExitStack() as stack:
        log = stack.enter_context((home / "cluster.log").open("w"))

        def start(*arguments):
            process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=log, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        file = home / "scheduler.json"
        start("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard",
              "--scheduler-file", str(file))
        wait_for(lambda: file.exists() and file.read_text().strip(), "the scheduler")
        address = json.loads(file.read_text())["address"]
        common = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--resources", "GPU=1", "--local-directory",
                  str(home / "dask"))
        workers = [start("distributed.cli.dask_worker", address, "--name", f"w{i}", *common) for i in range(2)]
        wait_for(lambda: (home / "cluster.log").read_text().count("Registered to") >= 2, "both workers")
        yield address, workers


def test_a_cluster_makes_a_grid_and_survives_its_workers_and_its_client(home, write_grid, cluster, capsys):
    address, workers = cluster
    assert main(["grid", str(write_grid("hungry", gpus=2)), "--scheduler", address]) == 2
    assert f"no worker of {address} offers that" in capsys.readouterr().err
    state = exports_root() / "runs" / "draw"
    command = [*SFA, "grid", str(write_grid(parameters={"size": [-1, 2], "seconds": 40}, gpus=1)), "--scheduler",
               address]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # one run is under way and the other has failed, so that what the second client finds does not depend on the clock
    wait_for(lambda: any(state.glob(".partial-*/checkpoint/state")) and any(state.glob("failed-*")), "both beginnings")
    client.kill()
    client.communicate()
    victim = next(worker for worker in workers if worker.pid == parent_of(kernels(home)[-1]))
    again, said = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), ""
    while not re.search(r"(running|finished) draw/\w+ size=2", said):
        said += (line := again.stdout.readline())
        assert line, said
    victim.kill()
    said += again.communicate(timeout=300)[0]
    assert (
        again.returncode == 1
        and "small: 1 of 2 runs are finished" in said
        and "size is -1, expected at least 1" in said
    )
    assert sorted(row[1] for row in run_table()) == ["failed", "finished"] and not alive(kernels(home)[0])
    assert executions(home) <= 3, "taken up from the checkpoint, not made twice"


def test_a_terminal_that_is_closed_ends_no_grid(home, monkeypatch):
    "The board is drawn on a terminal, which goes away between two runs."
    grid = home / "small.yaml"
    grid.write_text("study: draw\nseeds: [1, 2]\n")
    master, slave = pty.openpty()
    drawn = []

    def pretend(todo, environments):
        for task in todo:
            yield Event(task.identity, "running")
            time.sleep(1.2)  # the board is drawn twice a second
            if not drawn:
                drawn.append(os.read(master, 100_000).decode())
                os.close(master)
            yield Event(task.identity, "finished")

    monkeypatch.setattr("sfa_core.runs.grids.on_this_machine", pretend)
    with suppress(OSError), open(slave, "w") as terminal:  # what is left in it can be written nowhere
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", terminal)
        ended = main(["grid", str(grid)])
        monkeypatch.undo()
    assert ended == 0 and "0 of 2 finished, 1 running" in drawn[0] and "\x1b[" in drawn[0]


def test_the_grids_that_ship_fit_their_studies():
    grids = [read_grid(path) for path in sorted((DATA / "grids").glob("*.yaml"))]
    assert {"small"} <= {grid.name for grid in grids} and all(plan(grid) for grid in grids)


def test_the_small_grid_runs_as_it_ships(forked_kernels, tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path))
    assert main(["grid", "small", "--workers", "2"]) == 0 and main(["report", "small"]) == 0
    table = pd.read_parquet(tmp_path / "reports" / "small" / "records.parquet")
    assert table.groupby("run").size().min() >= 20 and table["run"].nunique() == len(plan(read_grid("small")))
