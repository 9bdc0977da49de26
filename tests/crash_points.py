"""Kill what writes before every single touch of the disk, and do the same again: nothing finished is lost, nothing half
done looks done, and the end is the same.

    python tests/crash_points.py SCENARIO [--points N]     N points at equal distances; without it all of them

One process holds the imports; each attempt is a child of it, whose audit hook sends SIGKILL before its k-th touch: a
file that is opened for writing, a folder made, something renamed, exchanged, linked or deleted.
"""
import argparse
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

if __name__ == "__main__":  # before torch is imported
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import nbformat
import pandas as pd
import torch
from toy_study import write_study

import sfa_core.runs.report
import sfa_core.runs.runs
from sfa_core.core.identity import folder_digest, tensor_digest
from sfa_core.documents.generate import documents
from sfa_core.models.embedded import EmbeddedConfig, train_tokenizer
from sfa_core.models.load import load_model, new_bundle, save_model
from sfa_core.pretraining.recipe import Recipe, save_heads
from sfa_core.pretraining.stages import train_embedded
from sfa_core.runs.collect import tidy_records
from sfa_core.runs.folders import find_run, finished_runs, run_states
from sfa_core.runs.leftovers import leftovers, remove_leftover
from sfa_core.runs.results import write_metrics, write_records
from sfa_core.runs.runs import run_study
from sfa_core.training.arms import FinetuneConfig, read_arm
from sfa_core.training.finetune import finetune

TINY = EmbeddedConfig(vision_width=32, vision_layers=1, vision_heads=2, vision_hidden=64, language_width=32,
                      language_layers=1, language_heads=2, language_kv_heads=1, head_dim=16, language_hidden=64)
RECIPE = Recipe(documents=24, document_seed=5, encoder_steps=2, lookup_steps=2, joint_steps=2, reading_steps=1,
                cell_steps=1, batch=2, question_batch=2, questions=2, vocabulary=400, checkpoint_every=1)
CONFIG = FinetuneConfig("control", steps=3, batch_size=2, questions=1, checkpoint_every=1)
TOUCHES = ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.link", "os.rmdir", "os.truncate")


def is_touch(event: str, arguments: tuple) -> bool:
    "Return whether an event of the audit is a touch of the disk; `renameat2` is seen when it is looked up."
    if event == "open":
        return isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    return event in TOUCHES or event == "ctypes.dlsym" and arguments[1] == "renameat2"


def in_child(action: Callable[[Path], object], folder: Path, at: int | None = None) -> int | None:
    "Do something in a child that is killed before its touch `at`; return the number of touches, None when killed."
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0

        def hook(event, arguments):
            nonlocal count
            if is_touch(event, arguments):
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        try:
            action(folder)
            os.write(writer, str(count).encode())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode()[:900])
        os._exit(0)
    os.close(writer)
    said = b"".join(iter(lambda: os.read(reader, 1000), b"")).decode()
    os.close(reader)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return None
    assert said.isdigit(), said
    return int(said)


def place(folder: Path) -> None:
    "Let exports and studies lie in a folder."
    os.environ |= {"SFA_EXPORTS": str(folder / "exports"), "SFA_STUDIES": str(folder / "studies")}


@functools.cache
def bundle(seed: int):
    torch.set_num_threads(1)
    return new_bundle(TINY, train_tokenizer(["What is Oslo? 42 and 59", "the total of all bars"] * 4, 320), seed)


def pretend(study, parameters, folder, timeout, progress):
    "Write what a study writes, without a kernel."
    (folder / "notebook.ipynb").write_text(nbformat.writes(nbformat.v4.new_notebook()))
    if study == "draw":
        write_records(folder, pd.DataFrame({"id": ["a"], "correct": [True]}))
        write_metrics(folder, {"n": parameters["size"]})
    else:
        tidy_records({run: {} for run in finished_runs("draw")}, folder / "records.parquet")
        write_metrics(folder, {"runs": len(finished_runs("draw"))})


def prepare(folder: Path) -> None:
    "Make what is there before: a finished run with a name, a report, a model."
    place(folder)
    write_study(folder / "studies")
    (folder / "draw.yaml").write_text("study: draw\nseeds: [0]\n")
    run_study("draw", {"seed": 7}, name="best")
    run_study("draw", {"seed": 0})
    sfa_core.runs.report.report_grid(folder / "draw.yaml")
    save_model(bundle(0), folder / "model")


def run(folder):
    return run_study("draw", {"seed": 1}, name="best")


def check_run(folder, killed):
    assert {path.name for path in finished_runs("draw")} >= KEPT, "no finished run is lost"
    assert find_run("best").is_dir(), "the name stands for the older run or for the newer one"
    if not killed:
        assert len(finished_runs("draw")) == 3 and find_run("best") == run(folder)
        assert all(state.state == "finished" for state in run_states())
    return [json.loads((path / "metrics.json").read_text()) for path in finished_runs("draw")] if not killed else None


def check_report(folder, killed):
    page = folder / "exports" / "reports" / "draw"
    assert (page / "report.html").read_text().rstrip().endswith("</html>")
    assert len(pd.read_parquet(page / "records.parquet")) == 2
    return (page / "metrics.json").read_text() if not killed else None


def weights(model) -> dict[str, str]:
    return {name: tensor_digest(value) for name, value in model.model.state_dict().items()}


def check_model(folder, killed):
    found = weights(load_model(folder / "model", placement="cpu"))
    assert found in ([weights(bundle(0)), weights(bundle(1))] if killed else [weights(bundle(1))])


def check_documents(folder, killed):
    return [row["id"] for row in documents(4, 1)] if not killed else None


def check_arm(folder, killed):
    if killed and not (folder / "trained" / "arm").is_dir():
        return None
    kept = read_arm(folder / "trained" / "arm")[1]
    return {name: tensor_digest(value) for name, value in kept.items()}


def pretrain(folder):
    made, heads, log = train_embedded(RECIPE, folder / "stages", TINY, progress=False)
    save_model(made, folder / "embedded")
    save_heads(heads, folder / "embedded")


def check_pretraining(folder, killed):
    return folder_digest(folder / "embedded", ["*.safetensors"]) if not killed else None


SCENARIOS = {  # what is done, and what is found after a kill and after the repetition
    "run": (run, check_run),
    "report": (lambda folder: sfa_core.runs.report.report_grid(folder / "draw.yaml"), check_report),
    "model": (lambda folder: save_model(bundle(1), folder / "model"), check_model),
    "documents": (lambda folder: documents(4, 1), check_documents),
    "finetune": (lambda folder: finetune(bundle(0), documents(4, 1), CONFIG, folder / "trained", progress=False),
                 check_arm),
    "pretraining": (pretrain, check_pretraining),
}


def crash(name: str, points: int | None) -> dict[str, int]:
    "Kill a scenario at some of its touches, or at all; AssertionError says what is lost."
    global KEPT
    action, check = SCENARIOS[name]
    sfa_core.runs.runs.execute = sfa_core.runs.report.execute = pretend
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        (root / "before").mkdir()
        in_child(prepare, root / "before")
        place(root / "before")
        KEPT = {path.name for path in finished_runs("draw")}

        def attempt(at: int | None, folder: Path):
            "Kill the scenario once in a copy of what was there before, repeat it, and return what came out."
            shutil.copytree(root / "before", folder, symlinks=True)
            place(folder)
            count = in_child(action, folder, at)
            assert (count is None) == (at is not None), f"{name}: touch {at} is not reached in every attempt"
            if at is not None:
                check(folder, True)
                in_child(action, folder)
            found = check(folder, False)
            for left in leftovers(2e10):
                remove_leftover(left)
            assert check(folder, False) == found, "nothing that is needed counts as left over"
            shutil.rmtree(folder)
            return count, found

        count, whole = attempt(None, root / "whole")
        chosen = range(1, count + 1)
        if points and points < count:
            chosen = sorted({round(1 + i * (count - 1) / (points - 1)) for i in range(points)})
        lost = []
        for at in chosen:
            try:
                assert attempt(at, root / "killed")[1] == whole, "the end is another one"
            except Exception as error:
                line = traceback.extract_tb(error.__traceback__)[-1]
                lost.append(f"{name}, killed before touch {at} of {count}: {line.line}: {error}")
                shutil.rmtree(root / "killed", ignore_errors=True)
    assert not lost, "\n".join(lost)
    return {"touches": count, "killed": len(chosen)}


def tell(name: str, points: int | None, line: Connection) -> None:
    "Send what `crash` returns, or why it failed; for a process of its own."
    try:
        line.send(crash(name, points))
    except BaseException as error:
        line.send(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--points", type=int)
    given = parser.parse_args()
    print(json.dumps(crash(given.scenario, given.points)))
