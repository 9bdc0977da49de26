"""A bad question is named before the first answer or costs its own answer, and replies are on disk as they come."""
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import sfa_core.models.answers as answers_module
from sfa_core.core.pictures import MOST_PIXELS
from sfa_core.documents.benchmarks import load_benchmark, with_choices
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import Evidence, Sample, TextBox, readable, samples
from sfa_core.models.answers import answer, micro_batches
from sfa_core.models.evaluate import evaluate
from sfa_core.models.failures import PATIENCE
from sfa_core.models.kept import KeptAnswers, kept_file
from sfa_core.models.load import load_model
from sfa_core.runs.results import write_records
from sfa_core.scores.records import SCORERS, check_samples, make_records
from toy_study import SFA, wait_for


def png(size=(112, 112), mode="RGB"):
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def bundle():
    return load_model("embedded", placement="cpu")


@pytest.fixture(scope="module")
def asked():
    return samples(documents(6, seed=3))[:12]


@pytest.fixture
def no_model(monkeypatch):
    "The model must not be asked."

    def generate(*given):
        raise AssertionError("the model was asked")
    monkeypatch.setattr(answers_module, "generate", generate)


# Before the first answer

SOUND = Sample("q0", "d0", "read", "What?", ("1",), png())
BOX = lambda *box: Evidence(texts=(TextBox("1", box),))
FAULTS = {
    "no answers": (dict(answers=()), "no answers"),
    "half a character in the question": (dict(question="a\ud83d"), "question holds .*half of a character"),
    "half a character in an answer": (dict(answers=("1", "\udc00")), "answer holds .*half"),
    "half a character in the id": (dict(id="\ud83d"), "id holds .*half"),
    "half a character in the kind": (dict(kind="\udfff"), "kind holds .*half"),
    "half a character in the document": (dict(document="\ud83d"), "document holds .*half"),
    "an answer that is null": (dict(answers=(None,)), "answer is 'None', expected text"),
    "an answer that is a number": (dict(answers=(1,)), "answer is '1', expected text"),
    "a question that is null": (dict(question=None), "question is 'None'"),
    "an image that is gone": (dict(source="/nowhere/a.png"), "no file, expected its image"),
    "a device": (dict(source="/dev/zero"), "no file, expected its image"),
    "a folder": (dict(source=Path("/tmp")), "no file, expected its image"),
    "no image": (dict(source=None), "image is NoneType"),
    "a box of NaN": (dict(evidence=BOX(0, 0, float("nan"), 1)), "a box is"),
    "a box without end": (dict(evidence=BOX(0, 0, float("inf"), 1)), "a box is"),
    "an inverted box": (dict(evidence=BOX(5, 0, 1, 1)), "a box is"),
    "a box of three": (dict(evidence=BOX(0, 0, 1)), "a box is"),
    "an answer outside of the texts": (dict(evidence=Evidence(answer=(0,))), "text 0 carries the answer"),
    "an answer before the texts": (dict(evidence=replace(BOX(0, 0, 1, 1), answer=(-1,))), "text -1 carries"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_question_that_cannot_be_scored_is_named_before_the_model_is_asked(bundle, no_model, name):
    change, words = FAULTS[name]
    with pytest.raises(ValueError, match=f"question .*{words}"):
        evaluate(bundle, [SOUND, replace(SOUND, **{"id": "q1"} | change)])


def test_ids_and_options_are_checked_before_the_model_is_asked(bundle, no_model):
    with pytest.raises(ValueError, match="question id 'q0' occurs 2 times"):
        evaluate(bundle, [SOUND, SOUND])
    options = replace(SOUND, id="q1", question=with_choices("What?", ["a", "b"]))
    with pytest.raises(ValueError, match="question q0 has no options"):
        evaluate(bundle, [options, SOUND], scorer="letter")
    for scorer in SCORERS:
        check_samples([options], scorer)


def test_a_fifo_is_no_image(bundle, no_model, tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(ValueError, match="no file, expected its image"):
        evaluate(bundle, [replace(SOUND, source=tmp_path / "a.png")])


def test_a_reply_that_cannot_be_written_is_written_with_its_escape(tmp_path):
    from types import SimpleNamespace as Reply
    records = make_records([SOUND], [Reply(prediction="1 \ud83d", truncated=False, seconds=0, error=None)])
    write_records(tmp_path, records)
    assert pd.read_parquet(tmp_path / "records.parquet")["prediction"][0] == "1 \\ud83d"


def test_galleries_show_the_pages_that_can_be_decoded():
    broken = [replace(SOUND, id=f"b{i}", document=f"b{i}", source=b"no image") for i in range(3)]
    rest = [replace(SOUND, id=f"s{i}", document=f"s{i // 2}") for i in range(8)]
    assert [sample.id for sample in readable([*broken, *rest], 3)] == ["s0", "s2", "s4"]
    assert readable(broken, 3) == []


# While answering

def failing(monkeypatch, error, when):
    "Let the model fail for batches with certain questions."
    real, calls = answers_module.generate, []

    def generate(bundle, images, questions, *more):
        calls.append([question for _, question in questions])
        if any(when(question) for _, question in questions):
            raise error
        return real(bundle, images, questions, *more)
    monkeypatch.setattr(answers_module, "generate", generate)
    return calls


PanicException = type("PanicException", (BaseException,), {})  # as pyo3 names what a panic in Rust becomes
ERRORS = [TypeError("TextEncodeInput must be Union"), MemoryError("cannot allocate"), RuntimeError("no kernel image"),
          OverflowError("too long"), subprocess.CalledProcessError(1, ["gs"]), torch.OutOfMemoryError("CUDA: 2 GiB"),
          PanicException("called Result::unwrap on an Err value")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_any_error_of_one_question_is_its_error_and_the_others_are_answered(bundle, asked, monkeypatch, error):
    expected = answer(bundle, asked, max_new_tokens=4)
    marked = [replace(sample, question=f"{sample.question} !") if i == 7 else sample for i, sample in enumerate(asked)]
    failing(monkeypatch, error, lambda question: question.endswith("!"))
    replies = answer(bundle, marked, max_new_tokens=4, batch_size=5)
    assert [i for i, reply in enumerate(replies) if reply.error] == [7] and replies[7].prediction == ""
    assert str(error).split(":")[0].split("(")[0][:8] in replies[7].error and asked[7].id in replies[7].error
    assert [reply.tokens for reply in replies[:7] + replies[8:]] == [reply.tokens
                                                                     for reply in expected[:7] + expected[8:]]
    found = evaluate(bundle, marked, max_new_tokens=4, draws=10)
    assert found.summary["errors"] == 1 and found.summary["n"] == len(asked) - 1


def test_what_fails_for_every_question_is_no_fault_of_a_question(bundle, asked, monkeypatch):
    calls = failing(monkeypatch, RuntimeError("mat1 and mat2 shapes"), lambda question: True)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        answer(bundle, asked, max_new_tokens=4)
    assert sum(len(call) == 1 for call in calls) == PATIENCE < len(asked), "and it ends soon"
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        answer(bundle, asked[:2], max_new_tokens=4)


def test_an_interrupt_is_nobodys_error(bundle, asked, monkeypatch):
    failing(monkeypatch, KeyboardInterrupt(), lambda question: True)
    with pytest.raises(KeyboardInterrupt):
        answer(bundle, asked, max_new_tokens=4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_named_and_never_scored(asked, value):
    bundle = load_model("embedded", placement="cpu")
    with torch.no_grad():  # after loading, as an overflow would
        bundle.model.lm_head.weight[5] = value
    with pytest.raises(ValueError, match="embedded gives logits that are NaN or infinite"):
        evaluate(bundle, asked)


def test_a_summary_of_empty_replies_says_so(bundle, asked, monkeypatch):
    monkeypatch.setattr(answers_module, "generate", lambda bundle, images, questions, *more: [([], True)] * len(
        questions))
    assert evaluate(bundle, asked, draws=10).summary["notes"] == [
        "every one of 12 replies is empty: a fault of the model or its settings, not of its reading"]


# Memory

def test_pages_are_decoded_together_only_where_they_are_small():
    side = int(MOST_PIXELS**0.5)
    small, large = png(), png((side, side), "1")
    sources = [small, small, large, large, small, large, b"no image", large]
    batch = [replace(SOUND, id=str(i), source=source) for i, source in enumerate(sources)]
    parts = [[sample.id for sample in part] for part in micro_batches(batch)]
    assert [name for part in parts for name in part] == [sample.id for sample in batch]
    assert parts == [["0", "1"], ["2", "3"], ["4"], ["5", "6", "7"]], "one large page a part, however often it is asked"
    assert [len(part) for part in micro_batches([SOUND] * 64)] == [64]


MEASURE = """
import io, json, re
from pathlib import Path
from PIL import Image
from sfa_core.documents.samples import Sample
from sfa_core.models.answers import answer
from sfa_core.models.load import load_model
bundle, peaks = load_model("embedded", placement="cpu"), []
def page(i):
    stream = io.BytesIO()
    Image.new("1", (7000, 7000 - i)).save(stream, "PNG")
    return Sample(str(i), str(i), "read", "What?", ("1",), stream.getvalue())
for count in (0, 1, 3):
    if count: answer(bundle, [page(i) for i in range(count)], max_new_tokens=2)
    # the peak of this program alone: getrusage keeps that of the process it was forked from
    peaks.append(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
print(json.dumps(peaks))
"""


def test_three_huge_pages_take_no_more_memory_than_one():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    before, one, three = json.loads(done.stdout.splitlines()[-1])
    page = 7000 * 7000 * 3 / 2**20  # MiB as RGB
    assert one - before > page / 2, "the measurement sees a page"
    assert three - one < page / 2, f"{before:.0f}, {one:.0f} and {three:.0f} MiB"


# Kept as they come

def stopped_after(monkeypatch, batches):
    "Stop the process, as far as Python can, behind some batches."
    real, calls = answers_module.generate, []

    def generate(bundle, images, questions, *more):
        if len(calls) == batches:
            raise KeyboardInterrupt
        calls.append([question for _, question in questions])
        return real(bundle, images, questions, *more)
    monkeypatch.setattr(answers_module, "generate", generate)
    return calls


@pytest.mark.parametrize("batches", [0, 1, 3])
def test_an_evaluation_that_was_cut_off_goes_on_and_asks_nothing_twice(bundle, asked, tmp_path, batches):
    options = dict(batch_size=3, max_new_tokens=20, draws=10)
    whole = evaluate(bundle, asked, **options)
    with pytest.MonkeyPatch.context() as patch:
        before = stopped_after(patch, batches)
        with pytest.raises(KeyboardInterrupt):
            evaluate(bundle, asked, kept=tmp_path, **options)
    file = tmp_path / kept_file(tmp_path, bundle, whole.summary["settings"]["data"], intervention=None, tiles=1,
                                max_new_tokens=20, suffix=whole.summary["settings"]["suffix"]).name
    assert file.exists() == bool(batches)
    with pytest.MonkeyPatch.context() as patch:
        after = stopped_after(patch, None)
        again = evaluate(bundle, asked, kept=tmp_path, **options)
        calls = before + after
        third = evaluate(bundle, asked, kept=tmp_path, **options)
        assert before + after == calls, "nothing is asked a third time"
    with pytest.MonkeyPatch.context() as patch:
        plain = stopped_after(patch, None)
        evaluate(bundle, asked, **options)
    assert calls == plain, "the same batches, each once"
    for found in (again, third):
        pd.testing.assert_frame_equal(found.records.drop(columns="seconds"), whole.records.drop(columns="seconds"))
        assert found.summary == whole.summary
    assert (third.records["seconds"] == again.records["seconds"]).all() and not list(tmp_path.glob("*.part"))


def test_another_model_question_or_option_is_another_file(bundle, asked, tmp_path):
    files = {kept_file(tmp_path, bundle, "a", suffix="x"), kept_file(tmp_path, bundle, "b", suffix="x"),
             kept_file(tmp_path, bundle, "a", suffix="y"), kept_file(tmp_path, bundle, "a", suffix="x", tiles=2)}
    other = load_model("embedded", placement="cpu")
    assert kept_file(tmp_path, other, "a", suffix="x") in files and len(files) == 4
    with torch.no_grad():
        other.model.lm_head.weight[0, 0] += 1
    assert kept_file(tmp_path, other, "a", suffix="x") not in files


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]\n", b"\xff\xfe\n", b'{"place": 0, "most": 8}\n', b"null\n" * 3,
                                    b'{"place": NaN}\n', b"[" * 10_000 + b"\n"])
def test_damaged_lines_are_asked_again(bundle, asked, tmp_path, damage):
    whole = answer(bundle, asked[:4], max_new_tokens=20, batch_size=2, kept=tmp_path / "r.jsonl")
    lines = (tmp_path / "r.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "r.jsonl").write_bytes(lines[0] + damage + b"".join(lines[1:]))
    known = KeptAnswers(tmp_path / "r.jsonl").known
    assert len(lines) - 1 <= len(known) <= len(lines)
    again = answer(bundle, asked[:4], max_new_tokens=20, batch_size=2, kept=tmp_path / "r.jsonl")
    assert [reply.tokens for reply in again] == [reply.tokens for reply in whole]


def test_errors_are_tried_again(bundle, asked, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        failing(patch, MemoryError(), lambda question: question == asked[1].question)
        assert answer(bundle, asked[:4], max_new_tokens=4, kept=tmp_path / "r.jsonl")[1].error
    assert not answer(bundle, asked[:4], max_new_tokens=4, kept=tmp_path / "r.jsonl")[1].error


def test_a_run_that_is_killed_while_it_answers_goes_on_behind_its_replies(bundle, tmp_path):
    exports, environment = tmp_path / "exports", os.environ | {"SFA_EXPORTS": str(tmp_path / "exports")}
    command = [*SFA, "run", "10_baseline_eval", "-p", "limit", "60", "-p", "batch_size", "2"]
    kept = lambda: list(exports.glob("runs/10_baseline_eval/*/checkpoint/replies-*.jsonl"))
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    wait_for(lambda: kept() and kept()[0].read_bytes().count(b"\n") >= 8, "some replies", seconds=900)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = kept()[0].read_bytes()
    assert len(list(exports.glob("runs/10_baseline_eval/.partial-*"))) == 1
    subprocess.run(command, env=environment, check=True, capture_output=True)
    run, = [path.parent for path in exports.glob("runs/10_baseline_eval/*/records.parquet")]
    assert run.name[0] != "." and (run / "checkpoint" / kept()[0].name).read_bytes().startswith(first)
    lines = [json.loads(line) for line in kept()[0].read_bytes().splitlines()]
    assert len({(line["place"], line["most"]) for line in lines}) == len(lines), "no reply was given twice"
    records = pd.read_parquet(run / "records.parquet")
    whole = evaluate(bundle, load_benchmark("synthetic", limit=60), batch_size=2)
    for column in ("id", "prediction", "correct", "score", "truncated", "error"):
        assert records[column].tolist() == whole.records[column].tolist()
