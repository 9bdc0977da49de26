"""What stops a run loses nothing that the next start could go on from, and nobody who listens can stop one."""
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sfa_core.core.paths import exports_root
from sfa_core.runs.commands import main
from sfa_core.runs.folders import finished_runs, run_states
from sfa_core.runs.grids import plan, read_grid, survey
from sfa_core.runs.runs import StudyFailed, is_passing, run_study, run_table
from toy_study import SFA, write_study

# A training of 9 steps with 2 micro-batches each, which something ends once, at the 11th micro-batch.
TRAINING = f"""
import os, sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from toy_training import batch_at, quiet, run
from sfa_core.runs.results import out_folder, write_metrics
folder, once = out_folder(out_dir, "draw"), Path(os.environ["DRAW_LOG"] + ".once")
seen = []
def watched(step, micro):
    seen.append((step, micro))
    if len(seen) == 11 and not once.exists():
        once.touch()
        STOP
    return batch_at(step, micro)
net, made = run(folder / "checkpoint", losses=quiet, batches=watched, steps=9, checkpoint_every=1)
write_metrics(folder, {{"asked": len(seen), "weights": [float(p.sum()) for p in net.parameters()]}})
"""
STOPS = {
    "an error": ("1 / 0", "failed"),
    "no memory": ("raise MemoryError('out of memory')", "failed"),
    "a full disk": ("raise OSError(28, 'No space left on device')", "unfinished"),
    "a full disk, told by another": ("raise OSError('x could not be written (No space left on device)')", "unfinished"),
    "a quota": ("raise OSError(122, os.strerror(122))", "unfinished"),
    "a closed pipe": ("raise BrokenPipeError(32, 'Broken pipe')", "unfinished"),
    "its time limit": ("time.sleep(600)", "unfinished"),
    "the end of its kernel": ("os._exit(9)", "failed"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, forkserver):
    "Metrics of the training when nothing stops it."
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        from forked_kernels import fork_kernels
        fork_kernels(patch)
        for name, value in (("SFA_EXPORTS", "exports"), ("SFA_STUDIES", "studies"), ("DRAW_LOG", "log")):
            patch.setenv(name, str(place / value))
        write_study(place / "studies", code=TRAINING.replace("STOP", "pass"))
        return json.loads((run_study("draw") / "metrics.json").read_text())


@pytest.mark.parametrize("name", STOPS)
def test_a_training_that_is_stopped_goes_on_from_its_checkpoint(home, forked_kernels, undisturbed, name):
    stop, state = STOPS[name]
    write_study(home / "studies", code=TRAINING.replace("STOP", stop))
    with pytest.raises(StudyFailed, match="the next start goes on from its checkpoint") as stopped:
        run_study("draw", timeout=20 if "sleep" in stop else None)
    assert stopped.value.state == state and (stopped.value.folder / "error.txt").is_file()
    assert (stopped.value.folder / "notebook.ipynb").is_file() and finished_runs() == []
    grid = home / "one.yaml"
    grid.write_text("study: draw\n")
    assert [event.state for event in survey(plan(read_grid(grid))).values()] == [state]
    again = json.loads((run_study("draw") / "metrics.json").read_text())
    assert undisturbed["asked"] == 18 and again["asked"] == 8, "five of nine steps were kept"
    assert again["weights"] == undisturbed["weights"]
    left = ["failed"] if state == "failed" else []
    assert [row[1] for row in run_table()] == ["finished", *left], "no checkpoint stays beside a finished run"


@pytest.mark.parametrize("error, passing", [
    (OSError(errno.ENOSPC, "full"), True), (BrokenPipeError(), False), (BrokenPipeError(errno.EPIPE, "x"), True),
    (TimeoutError(), True), (OSError(errno.EFBIG, "x"), False), (PermissionError(errno.EACCES, "x"), False),
    (ValueError("No space left on device"), False), (RuntimeError("Broken pipe"), False)], ids=repr)
def test_what_may_be_otherwise_next_time_is_told_from_what_may_not(error, passing):
    assert is_passing(error) is passing


LISTENERS = {
    "a reader that has seen enough": '"$@" | head -n 1', "no output": '"$@" >&-', "no errors": '"$@" 2>&-',
    "a full disk": '"$@" >/dev/full', "a full disk for both": '"$@" >/dev/full 2>&1',
    "nothing at all": '"$@" <&- >&- 2>&-', "a reader of errors that is gone": '"$@" 2>&1 >/dev/null | true',
}
LOUD = """
import os, sys
from pathlib import Path
for i in range(300):
    print("drawing", i, "x" * 200, flush=True)
    print("error", i, file=sys.stderr, flush=True)
os.system("echo from a program; echo from a program >&2")
Path(out_dir, "metrics.json").write_text("{}")
"""


@pytest.mark.parametrize("way", LISTENERS)
def test_a_run_does_not_depend_on_who_listens(home, way):
    write_study(home / "studies", code=LOUD)
    process = subprocess.run(["bash", "-c", f"set -o pipefail; {LISTENERS[way]}", "sh", *SFA, "run", "draw"],
                             stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert [row[1] for row in run_table()] == ["finished"]
    assert b"Exception ignored" not in process.stderr and b"Traceback" not in process.stderr


@pytest.mark.parametrize("way, command", [*zip(list(LISTENERS)[:6], ["list", "studies", "clean"] * 2, strict=True),
                                          ("a full disk", "--help"), ("a reader that has seen enough", "--help")])
def test_no_command_minds_who_listens(home, way, command):
    code = ("import sys, runpy; sys.argv = ['sfa', sys.argv[1]]\n"
            "try: runpy.run_module('sfa_core.runs.commands', run_name='__main__', alter_sys=True)\n"
            "except SystemExit as error: sys.exit(error.code)")
    shell = ["bash", "-c", f"set -o pipefail; {LISTENERS[way]}", "sh", sys.executable, "-c", code, command]
    process = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True)
    assert process.returncode == 0 and process.stderr == b""


def test_a_module_that_lies_where_the_command_is_given_is_not_imported(home):
    for name in ("pandas", "random", "tempfile", "numpy", "json", "sfa_core"):
        (home / f"{name}.py").write_text(f"open({str(home / 'taken')!r}, 'a').write('{name} ')\nraise ImportError")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    sfa = Path(sys.executable).with_name("sfa")
    one = home / "one.yaml"
    one.write_text("study: draw\nseeds: [1]\n")
    for arguments in (["run", "draw"], ["grid", str(one), "--workers", "1"]):
        process = subprocess.run([sfa, *arguments], cwd=home, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
    assert not (home / "taken").exists() and [row[1] for row in run_table()] == ["finished"] * 2
    assert [path for path in (exports_root() / "temporary").glob("*")] == []


def test_the_command_lists_what_is_left_over_and_deletes_it_when_told(home, capsys):
    cut = exports_root() / "runs" / "draw" / ".partial-0123456789ab"
    (cut / "checkpoint").mkdir(parents=True)
    (cut / "checkpoint" / "weights").write_bytes(bytes(3_000_000))
    (cut.parent / "gone").symlink_to("ffffffffffff")
    old = exports_root() / "cache" / ".a.0123456789ab.part.arrow"
    old.parent.mkdir()
    for path in (old, old.with_name(".b.0123456789ab.part.arrow")):
        path.write_bytes(bytes(10))
    os.utime(old, (1, 1))
    assert main(["clean"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (str(cut), "3.0 MB", "/gone", ".a.01", "3 leftovers"))
    assert ".b.01" not in said, "it may be under way"
    assert main(["clean", "--yes"]) == 0 and capsys.readouterr().out.endswith(": deleted\n")
    assert not cut.exists() and not os.path.lexists(cut.parent / "gone") and not old.exists() and run_states() == []
    assert main(["clean"]) == 0 and capsys.readouterr().out == "nothing is left over\n"
