"""Whatever stands in a file, and whatever stands where a file should be: every reader takes it for what it is, or
refuses it in one line with its name; none hangs, none runs anything."""
import json
import os
import shutil
import signal
import warnings
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from accelerate import Accelerator
from hostile_files import CONTENTS, KINDS, MARK, png
from toy_training import DEFAULT, model, run

from sfa_core.core.hub import folder_revision
from sfa_core.core.identity import folder_digest
from sfa_core.core.pictures import decode, picture_size
from sfa_core.core.reading import json_lines, read_json, read_text
from sfa_core.documents.benchmarks import load_benchmark
from sfa_core.documents.generate import documents
from sfa_core.documents.ocr import read_ocr
from sfa_core.documents.parquet import ParquetRows
from sfa_core.models.kept import KeptAnswers
from sfa_core.models.load import EMBEDDED, load_model
from sfa_core.pretraining.dynamics import read_dense_encoder
from sfa_core.pretraining.recipe import load_heads
from sfa_core.runs.grids import read_grid
from sfa_core.scores.harness import read_answers
from sfa_core.structure.store import read_structure
from sfa_core.tokens.density import SHIPPED, load_density
from sfa_core.training.arms import read_arm
from sfa_core.training.checkpoints import read_folder, read_log, read_sums
from sfa_core.training.schedule import LoopConfig, make_optimizer
from sfa_core.training.state import Run, load_run

ROOT = Path(__file__).resolve().parents[1]
ARMS = ROOT / "exports" / "reference" / "arms"
SECONDS = 120  # after which a reader hangs, on the busiest machine


@contextmanager
def no_longer(seconds):
    "Interrupt what hangs."
    def stop(*_):
        raise TimeoutError(f"it hangs: {seconds} s are over")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def put(place, hostile):
    "Lay a hostile content, or something that is no file, in the place of a file."
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    if isinstance(hostile, bytes):
        place.write_bytes(hostile)
    else:
        hostile(place)


def copied(source):
    "Copy a folder that is sound."
    return lambda folder: shutil.copytree(source, folder / "copy", dirs_exist_ok=True)


def own_folder(folder):
    (folder / "copy" / "images").mkdir(parents=True)
    (folder / "copy" / "images" / "a.png").write_bytes(png())
    line = {"image": "a.png", "question": "?", "answers": ["1"]}
    (folder / "copy" / "questions.jsonl").write_text(json.dumps(line))


def release(folder):
    for part in ("png", "tables", "annotations"):
        (folder / "copy" / "test" / part).mkdir(parents=True)
    (folder / "copy" / "test" / "png" / "a.png").write_bytes(png())
    for part in ("human", "augmented"):
        asked = [{"imgname": "a.png", "query": "?", "label": "1"}]
        (folder / "copy" / "test" / f"test_{part}.json").write_text(json.dumps(asked))
    (folder / "copy" / "test" / "tables" / "a.csv").write_text("a,b\n1,2\n")
    (folder / "copy" / "test" / "annotations" / "a.json").write_text(json.dumps({"models": []}))


def saved(folder):
    (folder / "copy").mkdir()
    row = {"image": [{"bytes": png(), "path": None}], "query": ["?"], "label": [["1"]], "human_or_machine": ["human"]}
    Dataset.from_dict(row).save_to_disk(folder / "copy" / "test")
    (folder / "copy" / "dataset_dict.json").write_text(json.dumps({"splits": ["test"]}))


def hub_copy(folder):
    (folder / "copy").mkdir()
    table = pa.table({"image": pa.array([{"bytes": png(), "path": None}]), "query": ["?"], "label": [["1"]],
                      "human_or_machine": ["human"]})
    pq.write_table(table, folder / "copy" / "test-0.parquet")


def sums(folder):
    "Let the checksums of an arm be those of what is in it: the reader must look for itself."
    from sfa_core.core.identity import read_digest
    listed = [path for path in sorted(folder.iterdir()) if path.name != "SHA256SUMS"]
    (folder / "SHA256SUMS").write_text("".join(
        f"{read_digest(path) if path.is_file() else '0' * 64}  {path.name}\n" for path in listed))


def arm(read):
    def call(folder):
        if (folder / "SHA256SUMS").is_file():
            sums(folder)
        return read(folder)
    return call


STEP = "checkpoints/step-00000002"


def trained(folder):
    run(folder / "copy", until=2)


def resumed(folder):
    "Go on from a checkpoint with sound checksums; when it is refused, no weight has changed."
    sums(folder / STEP)
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    parameters, config = dict(net.named_parameters()), LoopConfig(**DEFAULT)
    going = Run(parameters, make_optimizer(parameters, config), config, folder, Accelerator(cpu=True))
    try:
        load_run(going, folder / STEP)
    except ValueError:
        assert all(before[name].equal(value) for name, value in net.state_dict().items()) and not going.optimizer.state
        raise


def questions(name, **options):
    return lambda folder: [sample.image for sample in load_benchmark(name, source=folder, **options)]


def listing(name, file):
    "A release in JSON, of a folder with its pictures."
    def make(folder):
        place = folder / "copy" / file
        place.parent.mkdir(parents=True)
        for part in ("images", "png"):
            (place.parent / part).mkdir()
        place.write_text("[]")
    return make, file, questions(name, split="val_easy" if name == "dvqa" else "validation1")


def single(name, read):
    "A file alone."
    def make(folder):
        (folder / "copy").mkdir()
        (folder / "copy" / name).write_text("{}")
    return make, name, lambda folder: read(folder / name)


READERS = {  # name -> lays out what is sound, the file that is replaced, what reads it
    "read_text": single("a.txt", read_text), "read_json": single("a.json", read_json),
    "json_lines": single("a.jsonl", lambda path: list(json_lines(path, "an object"))),
    "decode": single("a.png", lambda path: decode(path, str(path))),
    "picture_size": single("a.png", picture_size), "OCR": single("ocr.jsonl", read_ocr),
    "replies kept": single("replies.jsonl", KeptAnswers), "grid": single("small.yaml", read_grid),
    "log": single("log.jsonl", lambda path: read_log(path.parent)),
    **{f"replies of others, {kind}": single(f"a.{kind}", read_answers)
       for kind in ("json", "jsonl", "csv", "tsv", "xlsx", "parquet")},
    "parquet": single("test-0.parquet", lambda path: list(ParquetRows([path]))),
    "encoder": single("encoder.safetensors", lambda path: read_dense_encoder(path, None)),
    "questions": (own_folder, "questions.jsonl", questions("folder")),
    "an image": (own_folder, "images/a.png", questions("folder")),
    "a folder of data": (own_folder, "images/a.png", folder_digest),
    "ChartQA's questions": (release, "test/test_human.json", questions("chartqa")),
    "ChartQA's table": (release, "test/tables/a.csv", questions("chartqa")),
    "ChartQA's annotation": (release, "test/annotations/a.json", questions("chartqa")),
    "ChartQA in parquet": (hub_copy, "test-0.parquet", questions("chartqa")),
    "saved splits": (saved, "dataset_dict.json", questions("chartqa")),
    "saved state": (saved, "test/state.json", questions("chartqa")),
    "saved features": (saved, "test/dataset_info.json", questions("chartqa")),
    "saved rows": (saved, "test/data-00000-of-00001.arrow", questions("chartqa")),
    "DVQA": listing("dvqa", "val_easy_qa.json"), "FigureQA": listing("figureqa", "validation1/qa_pairs.json"),
    "structure.json": (copied(ARMS / "vision"), "structure.json", read_structure),
    "structure.safetensors": (copied(ARMS / "vision"), "structure.safetensors", read_structure),
    "arm.json": (copied(ARMS / "control"), "arm.json", arm(read_arm)),
    "weights of an arm": (copied(ARMS / "control"), "weights.safetensors", arm(read_arm)),
    "a further file of an arm": (copied(ARMS / "control"), "more.json", arm(read_folder)),
    "SHA256SUMS": (copied(ARMS / "control"), "SHA256SUMS", read_arm),
    "checksums": single("SHA256SUMS", read_sums),
    **{f"{name} of a checkpoint": (trained, f"{STEP}/{name}", resumed)
       for name in ("run.json", "position.json", "random.json", "weights.safetensors", "optimizer.safetensors")},
    "density card": (copied(SHIPPED), "density.json", load_density),
    "density weights": (copied(SHIPPED), "density.safetensors", load_density),
    "dense heads": (copied(EMBEDDED), "dense/heads.safetensors", load_heads),
    "revision of a folder": (copied(EMBEDDED), "notes.txt", folder_revision),
    "index of weights": (copied(EMBEDDED), "model.safetensors.index.json", folder_revision),
}
MODEL_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "chat_template.jinja", "preprocessor_config.json", "processor_config.json", "model.safetensors",
               "model.safetensors.index.json", "special_tokens_map.json")
OF_A_MODEL = ("NaN", "deep", "closed lists", "a list", "null", "UTF-16", "pickle", "a text", "a pipe",
              "a device without end", "a link to itself")  # a model takes a second to load: some of the table


def cases(reader):
    "Class, name and content of everything that a reader is given; headers of weights only where weights are read."
    for kind, named in (CONTENTS | {"no file": KINDS}).items():
        for name, hostile in named.items():
            if kind != "headers" or READERS[reader][1].endswith(".safetensors"):
                yield kind, name, hostile


def complaint(call, folder, seconds=SECONDS):
    "What is wrong with how a reader ends; empty when it reads, or refuses in one line with the name."
    try:
        with no_longer(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(folder)
    except TimeoutError as error:
        return str(error)
    except (ValueError, OSError) as error:
        said = str(error)
        if len(said.splitlines()) != 1 or len(said) > 1500 or "\x1b" in said:
            return f"{len(said.splitlines())} lines, {len(said)} characters: {said[:200]!r}"
        # the file, the benchmark it is read for, or where a link leads
        named = any(name in said for name in (f"{folder.parent.name}/{folder.name}", "benchmark ", "/proc/"))
        return "" if named else f"no name: {said[:200]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return ""


@pytest.mark.parametrize("reader", READERS)
def test_a_reader_takes_every_file_for_what_it_is(tmp_path, monkeypatch, reader):
    monkeypatch.chdir(tmp_path)
    make, target, read = READERS[reader]
    make(tmp_path)
    folder, bad = tmp_path / "copy", {}
    for kind, name, hostile in cases(reader):
        put(folder / target, hostile)
        if said := complaint(read, folder):
            bad[f"{kind}, {name}"] = said
    assert not bad, f"{len(bad)} of {len(list(cases(reader)))}: {json.dumps(bad, indent=1)}"
    assert not MARK.exists(), "something was run"


def renamed(file, change):
    "Let a listing name another file."
    def edit(folder):
        path = folder / "copy" / file
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return edit


NAMING = {  # how a data set names a file -> lays out what is sound, names another file, what reads it
    "a split of a saved set": (saved, lambda name: renamed("dataset_dict.json", lambda _: {"splits": [name]}),
                               questions("chartqa")),
    "a file of a saved set": (saved, lambda name: renamed("test/state.json", lambda state: state | {
        "_data_files": [{"filename": name}]}), questions("chartqa")),
    "a picture of ChartQA": (release, lambda name: renamed("test/test_human.json", lambda _: [
        {"imgname": name, "query": "?", "label": "1"}]), questions("chartqa")),
    "a picture of DVQA": (listing("dvqa", "val_easy_qa.json")[0], lambda name: renamed("val_easy_qa.json", lambda _: [
        {"image": name, "template_id": "t", "question": "?", "answer": "1"}]), questions("dvqa", split="val_easy")),
    "a picture of FigureQA": (listing("figureqa", "validation1/qa_pairs.json")[0], lambda name: renamed(
        "validation1/qa_pairs.json", lambda _: {"qa_pairs": [{"image_index": name, "question_id": 0, "answer": 1,
                                                              "question_string": "?"}]}),
        questions("figureqa", split="validation1")),
}


PICTURES = ("a picture of ChartQA", "a picture of DVQA")  # whose names have their ending


@pytest.mark.parametrize("name", ["../../secret", "../../../secret", "{}/secret", "/dev/zero", "link", "pipe"])
@pytest.mark.parametrize("naming", NAMING)
def test_no_listing_names_a_file_outside_of_its_folder(tmp_path, monkeypatch, naming, name):
    monkeypatch.chdir(tmp_path)
    make, edit, read = NAMING[naming]
    make(tmp_path)
    for ending in ("", ".png", ".arrow"):
        (tmp_path / f"secret{ending}").write_bytes(png())
    for folder in [path for path in (tmp_path / "copy").rglob("*") if path.is_dir()]:
        for ending in ("", ".png"):
            (folder / f"link{ending}").symlink_to(tmp_path / "secret.png")
            os.mkfifo(folder / f"pipe{ending}")
    edit(f"{name.format(tmp_path)}{'.png' if naming in PICTURES else ''}")(tmp_path)
    with no_longer(SECONDS), pytest.raises((ValueError, FileNotFoundError)) as error:
        read(tmp_path / "copy")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("target", MODEL_FILES)
def test_a_model_is_loaded_or_refused_by_name(tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    copied(EMBEDDED)(tmp_path)
    folder, bad, held = tmp_path / "copy", {}, {}
    for named in (CONTENTS | {"no file": KINDS}).values():
        held |= {name: hostile for name, hostile in named.items() if name in OF_A_MODEL}
    for name, hostile in held.items():
        put(folder / target, hostile)
        if said := complaint(lambda place: load_model(place, placement="cpu"), folder, 2 * SECONDS):
            bad[name] = said
    assert not bad, json.dumps(bad, indent=1)
    assert not MARK.exists(), "something was run"


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign", "hole", "no checksum", "wrong checksum"])
def test_documents_in_the_cache_are_made_again_when_they_are_not_as_they_were_written(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path))
    before = documents(3, 5).to_list()
    path, = tmp_path.glob("cache/documents-*.arrow")
    content, checksum = path.read_bytes(), path.with_suffix(".sha256")
    path.unlink()  # another process may have it open: a damaged file is another file
    path.write_bytes({"cut": content[:-100], "empty": b"", "foreign": b"PAR1", "hole": content[:2000] + bytes(
        3000) + content[5000:]}.get(damage, content))
    if damage == "no checksum":
        checksum.unlink()
    if damage == "wrong checksum":
        checksum.write_text("0" * 64)
    with pytest.warns(UserWarning, match=f"{path.name} .* is made again"):
        assert documents(3, 5).to_list() == before
    assert path.read_bytes() == content
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert documents(3, 5).to_list() == before, "and then it is trusted again"


def counts():
    "How many cases of each class there are."
    found = {}
    for reader in READERS:
        for kind, *_ in cases(reader):
            found[kind] = found.get(kind, 0) + 1
    return found | {"a model's files": len(MODEL_FILES) * len(OF_A_MODEL)}


def test_the_page_on_security_prints_these_numbers():
    page = (ROOT / "SECURITY.md").read_text("utf-8")
    for kind, count in counts().items():
        assert f"| {kind} | {count:,} |" in page, f"| {kind} | {count:,} |"
    assert f"{sum(counts().values()):,} cases" in page
