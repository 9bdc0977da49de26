"""What goes wrong is named, nothing finished is lost, and nothing unfinished looks finished."""
import io
import json
import resource
import subprocess
import zlib
from operator import attrgetter
from pathlib import Path

import nbformat
import pytest
import sfa_core.runs.runs
from PIL import Image
from sfa_core.documents.benchmarks import load_benchmark
from sfa_core.runs.commands import main
from sfa_core.core.pictures import decode
from sfa_core.documents.samples import Sample
from sfa_core.models.evaluate import evaluate
from sfa_core.runs.grids import run_grid
from sfa_core.models.load import load_model
from sfa_core.runs.folders import finished_runs, run_states
from sfa_core.runs.runs import run_study, run_table
from toy_study import CODE, SFA, write_study

FULL = OSError(28, "No space left on device")

parts = attrgetter("records", "summary")  # of an evaluation


# A full disk

@pytest.fixture
def executed_at_once(monkeypatch):
    "Let a study be executed without a kernel: what is tested is the writing around it."

    def execute(study, parameters, folder, timeout, progress):
        (folder / "notebook.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook()))
        (folder / "metrics.json").write_text("{}")
    monkeypatch.setattr(sfa_core.runs.runs, "execute", execute)


@pytest.mark.parametrize("function, call",
                         [("write_atomic", 1), ("out_folder", 1), ("write_atomic", 2), ("write_timings", 1),
                          ("write_json", 1)],
                         ids=["parameters", "figures folder", "notebook", "timings", "provenance"])
def test_a_disk_that_fills_up_at_any_file_of_a_run_leaves_no_finished_run(home, monkeypatch, executed_at_once, capsys,
                                                                          function, call):
    kept, calls, real = run_study("draw", {"seed": 7}), [], getattr(sfa_core.runs.runs, function)

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise FULL
        return real(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(sfa_core.runs.runs, function, fail)
        assert main(["run", "draw"]) == 1
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert finished_runs() == [kept] and [row[1] for row in run_table()] == ["finished", "unfinished"]
    assert run_study("draw") in finished_runs(), "with room again, the same run finishes"


def test_a_disk_without_room_for_a_folder_is_one_line(home, monkeypatch, capsys):
    def fail(*arguments, **options):
        raise FULL
    monkeypatch.setattr(Path, "mkdir", fail)
    assert (
        main(["run", "draw"]) == 1
        and capsys.readouterr().err.splitlines()[-1] == "sfa: [Errno 28] No space left on device"
    )
    assert run_table() == []


def test_records_that_do_not_fit_on_the_disk_are_not_there(home):
    # bytes, for this process and its kernel
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    process = subprocess.run([*SFA, "run", "draw", "-p", "size", "100000"], capture_output=True, text=True,
                             preexec_fn=limit, timeout=300)
    assert process.returncode == 1 and "File too large" in process.stderr.splitlines()[-1]
    (name, *_), kept = run_table()
    assert kept[1:3] == ("unfinished", "a checkpoint, which the next start goes on from")
    failed = home / "exports" / "runs" / name
    assert failed.name.startswith("failed-") and "File too large" in (failed / "error.txt").read_text()
    assert not list(failed.glob("*records*")) and not (failed / "metrics.json").exists()


# Training that goes wrong

def test_a_loss_that_is_no_number_ends_the_run_with_the_reason_and_the_last_good_checkpoint(home, forkserver):
    training = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from toy_training import batch_at, quiet, run
def broken(net):
    sound, seen = quiet(net), []
    def loss(batch):
        named, count = sound(batch)
        seen.append(1)
        return {{name: value * float("nan") if len(seen) > 8 else value for name, value in named.items()}}, count
    return loss
run(folder / "checkpoint", losses=broken, max_bad_steps=3)
"""
    write_study(home / "studies", code=CODE.replace("print(\"drawing\")", training))
    (home / "one.yaml").write_text("study: draw\nparameters: {size: 3}\n")
    event, = run_grid(home / "one.yaml", workers=1).values()
    assert (
        event.state == "failed"
        and "3 steps in a row were skipped, step 7 because: loss answer is not finite; last good checkpoint"
        in event.reason
    )
    assert (
        Path(event.folder).with_name(f".partial-{event.identity}")
        / "checkpoint" / "checkpoints" / "step-00000006" / "SHA256SUMS"
    ).is_file() and finished_runs() == []


# Data that is not what it should be

def png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def bomb(side=30_000):
    "A PNG of a few kilobytes that unpacks to 900 million pixels."
    chunk = lambda kind, data: len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")
    packer = zlib.compressobj(9)
    lines = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(100)) + packer.flush()
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0]))
        + chunk(b"IDAT", lines)
        + chunk(b"IEND", b"")
    )


GOOD = png(Image.new("RGB", (112, 112), "white"))
BROKEN = {"corrupt": GOOD[:60] + bytes(40) + GOOD[100:], "cut off": GOOD[:80], "empty": b"",
          "no image": b"<html></html>", "bomb": bomb()}


@pytest.mark.parametrize("name", BROKEN)
def test_an_image_that_cannot_be_used_is_named(name):
    with pytest.raises(ValueError,
                       match="page 7: the image cannot be decoded .*; expected a PNG or JPEG file") as error:
        decode(BROKEN[name], "page 7")
    assert name != "bomb" or "decompression bomb" in str(error.value)


def test_broken_images_of_a_data_set_are_counted_and_the_others_answered(tmp_path):
    (tmp_path / "images").mkdir()
    files = BROKEN | {"good": GOOD, "grey": png(Image.new("L", (90, 60), 200)),
                      "clear": png(Image.new("RGBA", (112, 112), (0, 0, 0, 0)))}
    for name, content in files.items():
        (tmp_path / "images" / f"{name}.png").write_bytes(content)
    lines = [json.dumps({"id": name, "image": f"{name}.png", "question": "value of oak?", "answers": ["1"]})
             for name in files]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    records, summary = parts(evaluate(load_model("embedded", placement="cpu"),
                                      load_benchmark("folder", source=tmp_path), "folder", max_new_tokens=4))
    assert (summary["asked"], summary["n"], summary["errors"]) == (8, 3, 5), "left out of the rate, and said to be"
    wrong = records.set_index("id")["error"]
    assert (wrong[list(BROKEN)].str.contains("cannot be decoded")).all() and (
        wrong[["good", "grey", "clear"]] == ""
    ).all()


def test_a_question_without_answers_is_refused_before_the_model_is_asked(tmp_path):
    asked = [Sample("q1", "d", "read", "?", ("1",), GOOD), Sample("q2", "d", "read", "?", (), GOOD)]
    with pytest.raises(ValueError, match="question q2 has no answers, expected at least one"):
        evaluate(None, asked)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(GOOD)
    (tmp_path / "questions.jsonl").write_text('{"image": "a.png", "question": "?", "answers": []}')
    with pytest.raises(ValueError, match="line 1: no answers"):
        load_benchmark("folder", source=tmp_path)


# A run that somebody damaged

@pytest.mark.parametrize("name", ["records.parquet", "provenance.json"])
def test_a_run_with_a_damaged_file_is_a_row_of_the_report_and_is_made_again_beside_it(
    home, forked_kernels, capsys, name
):
    run = run_study("draw", {"size": 3})
    (run / name).write_bytes(b"PAR1 and then nothing")
    (home / "one.yaml").write_text("study: draw\nparameters: {size: 3}\n")
    state, = run_states("draw")
    assert (state.path, state.state) == (run, "damaged") and state.reason.startswith(f"{name} cannot be read")
    assert main(["report", str(home / "one.yaml")]) == 0 and finished_runs() == []
    page = (home / "exports" / "reports" / "one" / "report.html").read_text()
    assert f"{name} cannot be read" in page and "damaged" in page
    assert main(["list"]) == 0 and f"damaged    {name} cannot be read" in capsys.readouterr().out
    again = run_study("draw", {"size": 3})
    assert again.name == f"{run.name}-2" and (run / name).read_bytes() == b"PAR1 and then nothing"
    assert not list((home / "exports" / "reports").rglob("*.part"))
