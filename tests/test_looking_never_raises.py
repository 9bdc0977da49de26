"""Whatever lies in exports, looking at it lists every sound run, and shows the rest with a reason."""
import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
from bs4 import BeautifulSoup
from build_site import plotly_html
from sfa_core.core.identity import folder_digest
from sfa_core.core.paths import exports_root, working_root
from sfa_core.runs.commands import main
from sfa_core.runs.folders import PROMISED, find_run, finished_runs, one_line, run_states, set_alias
from sfa_core.runs.grids import combinations, plan, read_grid
from sfa_core.runs.readable import readable_runs
from sfa_core.runs.report import report_grid
from sfa_core.runs.results import write_records
from sfa_core.runs.runs import run_study
from sfa_core.runs.studies import path_version

STUDIES = Path(__file__).resolve().parents[1] / "notebooks" / "studies"
SOUND, OTHER = "0123456789ab", "bbbbbbbbbbbb"


def write_run(name, started="2026-01-01T00:00:00+00:00"):
    run = exports_root() / "runs" / "draw" / name
    run.mkdir(parents=True)
    facts = {"study": "draw", "run": name, "started": started, "wall_seconds": 1.0}
    for file in PROMISED:
        (run / file).write_text(json.dumps(facts if file == "provenance.json" else {}))
    return run


def replaced(name, content):
    return lambda run: (run / name).write_bytes(content)


def linked(name, target):
    return lambda run: ((run / name).unlink(), (run / name).symlink_to(target))


STATES = {
    "no metrics": lambda run: (run / "metrics.json").unlink(),
    "no notebook": lambda run: (run / "notebook.ipynb").unlink(),
    "no parameters": lambda run: (run / "parameters.yaml").unlink(),
    "no provenance": lambda run: (run / "provenance.json").unlink(),
    "provenance empty": replaced("provenance.json", b""), "provenance {}": replaced("provenance.json", b"{}"),
    "provenance []": replaced("provenance.json", b"[]"), "provenance deep": replaced("provenance.json", b"[" * 100_000),
    "provenance of bytes": replaced("provenance.json", b"\xff\xfe\0"), "metrics NUL": replaced("metrics.json", b"\0"),
    "provenance of other types": replaced("provenance.json", b'{"study": 1, "run": [], "started": {}}'),
    "parameters no YAML": replaced("parameters.yaml", b"a: [\n"),
    "parameters a tag": replaced("parameters.yaml", b"!!python/x"),
    "parameters a text": replaced("parameters.yaml", b"text"), "records empty": replaced("records.parquet", b""),
    "records cut": replaced("records.parquet", b"PAR1 and"), "metrics a loop": linked("metrics.json", "metrics.json"),
    "metrics a device": linked("metrics.json", "/dev/zero"), "metrics dangling": linked("metrics.json", "nowhere"),
    "metrics a FIFO": lambda run: ((run / "metrics.json").unlink(), os.mkfifo(run / "metrics.json")),
    "metrics a folder": lambda run: ((run / "metrics.json").unlink(), (run / "metrics.json").mkdir()),
    "everything gone": lambda run: [path.unlink() for path in run.iterdir()],
}


@pytest.mark.parametrize("damage", STATES.values(), ids=STATES)
def test_a_damaged_run_is_a_row_and_the_others_answer(home, capsys, damage):
    sound = write_run(SOUND)
    set_alias(sound, "best")
    damage(write_run(OTHER))
    for name, target in (("loop", "loop"), ("dangling", "nowhere")):
        (sound.parent / name).symlink_to(target)
    for name in ("failed-x", "failed-", "failed-cccccccccccc", ".partial-", ".partial-dddddddddddd"):
        (sound.parent / name).mkdir()
    (sound.parent / "failed-cccccccccccc" / "error.txt").touch()
    (sound.parent / "eeeeeeeeeeee").write_text("a file, not a folder")
    assert finished_runs() == [sound] == [find_run("best")]
    states = {state.path.name: state for state in run_states()}
    assert states[OTHER].state == "damaged" and 0 < len(states[OTHER].reason) <= 200
    assert {states[name].state for name in ("loop", "dangling")} == {"damaged"}
    (home / "one.yaml").write_text("study: draw\n")
    assert main(["list"]) == 0 and main(["show", "best"]) == 0
    assert main(["grid", str(home / "one.yaml"), "--dry-run"]) == 0 and main(["show", OTHER]) == 2
    said = capsys.readouterr()
    assert f"draw/{SOUND}" in said.out and f"no finished run is named '{OTHER}'" in said.err


def records(**columns):
    "Write records with some columns of another kind."
    sound = {"id": [str(i) for i in range(9)], "correct": [True] * 9, "error": [""] * 9}
    return lambda run: write_records(run, pd.DataFrame(sound | {name: [value] * 9 for name, value in columns.items()}))


def hole(run):
    records()(run)
    content = (run / "records.parquet").read_bytes()
    (run / "records.parquet").write_bytes(content[:8] + bytes(len(content) // 4) + content[8 + len(content) // 4 :])


def facts(**more):
    return lambda run: (run / "provenance.json").write_text(
        json.dumps(json.loads((run / "provenance.json").read_text()) | more))


def figure(content):
    return lambda run: ((run / "figures").mkdir(), replaced("figures/figure_5.json", content)(run))


BOMB = "size: &a [1]\n" + "".join(f"p{i}: &{letter} [{', '.join([f'*{before}'] * 9)}]\n"
                                 for i, (before, letter) in enumerate(zip("abcdefgh", "bcdefghi")))
DEEPER = {  # begins and ends as a finished run does, and cannot be read whole
    "records of nothing": replaced("records.parquet", b"PAR1" + bytes(99) + b"PAR1"), "records with a hole": hole,
    "answers that are right to some degree": records(correct="very"), "arms that are lists": records(arm=["a"]),
    "seeds of text": records(seed="one"), "errors that are lists": records(error=[1]),
    "categories that are lists": records(category=["a"]), "models that are objects": records(model={"a": 1}),
    "other columns": records(id=1.5),
    "metrics as deep as a stack": replaced("metrics.json", b'{"a":' * 900 + b"1" + b"}" * 900),
    "a commit of text": facts(git="abc"), "no seconds": facts(wall_seconds=None),
    "parameters without end": replaced("parameters.yaml", BOMB.encode()),
    "parameters that are dates": replaced("parameters.yaml", b"size: 2026-11-30"),
    "a table of nothing": replaced("table_1.csv", b""), "a table of bytes": replaced("table_2.csv", b"\xff\xfe\0"),
    "a figure of nothing": figure(b""), "a figure of others": figure(b'{"data": 1}'),
    "a figure of text": figure(b'"a"'),
}


def test_a_report_over_damaged_runs_shows_each_with_its_reason_and_counts_the_others(home, forked_kernels):
    grid, damages = home / "all.yaml", [None, *STATES.values(), *DEEPER.values()]
    grid.write_text(f"study: draw\nseeds: {list(range(len(damages)))}\n")
    for task, damage in zip(plan(read_grid(grid)), damages, strict=True):
        run = write_run(task.identity)
        records()(run)
        if damage:
            damage(run)
    for name, target in (("loop", "loop"), ("dangling", "nowhere")):
        (run.parent / name).symlink_to(target)
    (run.parent / "failed-cccccccccccc").mkdir()
    reference = exports_root() / "reference" / "broken"
    reference.mkdir(parents=True)
    (reference / "provenance.json").write_bytes(b"[" * 100_000)
    page = report_grid(grid)
    assert f"{len(damages)} runs of study draw: 1 finished, {len(damages) - 1} damaged." in page.read_text()
    assert len(pd.read_parquet(page.with_name("records.parquet"))) == 9
    table = BeautifulSoup(page.read_text(), "html.parser").select("tr")
    rows = [[cell.text for cell in row.select("td")] for row in table]
    shown = {cells[0]: (cells[2], cells[4]) for cells in rows if len(cells) == 5}
    for task, damage in zip(plan(read_grid(grid)), damages, strict=True):
        state, reason = shown[task.identity]
        assert (state, len(reason) > 5) == (("damaged", True) if damage else ("finished", False)), shown
    shutil.copy(STUDIES / "90_report.ipynb", home / "studies")
    text = (run_study("90_report") / "notebook.ipynb").read_text()
    unreadable = readable_runs(finished_runs("draw"))[1]  # the rest of them fits no other run, or looks damaged
    assert len(unreadable) > 10
    for task in plan(read_grid(grid)):
        assert (f"Left out: draw/{task.identity}, " in text) == (run.with_name(task.identity) in unreadable)


def test_the_newest_run_is_that_of_the_highest_number_then_of_the_latest_start(home):
    names = [(SOUND, "2026"), (f"{SOUND}-2", "2020"), (f"{SOUND}-10", "2021"), (OTHER, "2025")]
    for name, year in reversed(names):
        write_run(name, f"{year}-01-01T00:00:00+00:00")
    assert [run.name for run in finished_runs()] == [OTHER, SOUND, f"{SOUND}-2", f"{SOUND}-10"]


@pytest.mark.parametrize("text, said", [
    ("study: draw\nseeds: [1]\nseeds: [2]", "'seeds' stands twice"),
    ("study: draw\nparameters: {size: 1, size: 2}", "twice"),
    ("study: draw\ntimeout: .nan", "seconds above 0"), ("study: draw\ntimeout: .inf", "seconds above 0"),
    ("[" * 100_000, "is no YAML"), ("study: draw\ntimeout: " + "9" * 9000, "is no YAML"),
    ("study: draw\nparameters: {" + ", ".join(f"p{i}: [{', '.join(map(str, range(100)))}]" for i in range(5)) + "}",
     "has 10,000,000,000 runs; at most 10,000"),
    ("study: draw\ncases: &a [x]\nseeds: [&b [1, *a], *b]\n" + "timeout: *b", "is "),
    ("study: draw\nparameters:\n  size: &a0 [1]\n" + "".join(f"  p{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
                                                             for i in range(1, 12)), "runs; at most"),
], ids=range(9))
def test_a_grid_file_is_refused_in_one_short_line(home, text, said):
    path = home / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        combinations(read_grid(path))
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_names_are_what_they_are(home, capsys, monkeypatch, tmp_path):
    assert main(["run", "draw", "-p", "size", "1", "-p", "size", "2"]) == 2
    assert "parameter 'size' is given twice" in capsys.readouterr().err
    for text in ("x" * 1000, "~nosuchuser/x", "a\0b", "x" * 300 + "/y"):
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            path_version(text)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / os.fsdecode(b"\xff.txt")).write_text("a")
    assert len(folder_digest(tmp_path / "data")) == 64
    assert one_line("\x1b[31m[/x]\u202e") == r"\x1b[31m[/x]\u202e"
    (home / "named.yaml").write_text('study: draw\nparameters: {label: ["[/x]", "\\e[31m"]}\n')
    assert len(plan(read_grid(home / "named.yaml"))) == 2
    assert main(["grid", str(home / "named.yaml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "[/x]" in said and r"\x1b[31m" in said and "\x1b" not in said
    monkeypatch.setenv("SFA_EXPORTS", "")
    assert exports_root() == working_root() / "exports"


def test_a_text_of_a_figure_is_not_on_the_page_and_a_height_is_a_number(tmp_path):
    text = "</script><script>"
    page = plotly_html({"data": [{"text": text}], "layout": {"height": "1\"onmouseover="}}, "a",
                       tmp_path / "p.figures")
    assert page == '<div class="sfa-plotly" id="a" data-figure="p.figures/a.js" style="min-height:450px"></div>'
    name, _, spec = (tmp_path / "p.figures" / "a.js").read_text().rstrip(";\n").partition("=")
    assert name == 'SFA_FIGURES["a"]' and json.loads(spec)["data"] == [{"text": text}]
