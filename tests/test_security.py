"""Nothing that is read can run code, what is downloaded has a revision, names stay inside exports, and the lab
keeps to itself."""
import ast
import json
import os
import pickle
import re
import shlex
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
import sfa_core.documents.benchmarks
import sfa_core.models.load
import yaml
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from sfa_core.documents.benchmarks import load_benchmark
from sfa_core.core.identity import read_digest
from sfa_core.training.checkpoints import read_folder
from sfa_core.runs.collect import parameters_of, run_rates, tidy_records
from sfa_core.runs.known import facts_of
from sfa_core.runs.grids import read_grid
from sfa_core.models.load import load_model
from sfa_core.runs.folders import alias_name, component, find_run
from sfa_core.runs.studies import study_path
from toy_study import wait_for

ROOT = Path(__file__).resolve().parents[1]
PICKLE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
OPENING = {"torch": {"load"}, "np": {"load"}, "numpy": {"load"}, "pd": {"read_pickle", "read_hdf"},
           "pandas": {"read_pickle", "read_hdf"},
           "yaml": {"load", "load_all", "unsafe_load", "full_load"}}


def sources():
    "All code of the repository: package, notebooks, site, tests besides this one."
    for path in [*ROOT.glob("sfa_core/**/*.py"), *ROOT.glob("site/*.py"), *ROOT.glob("tests/*.py"), ROOT / "setup.py"]:
        if path != Path(__file__):
            yield path.name, path.read_text("utf-8")
    for path in ROOT.glob("notebooks/**/*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "code":
                yield path.name, "\n".join(line for line in cell.source.splitlines() if not re.match(r"\s*[%!]", line))


def dangers(source):
    "Name what could open a pickle or run foreign code."
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            yield from (name for name in names if name.split(".")[0] in PICKLE)
        elif isinstance(node, ast.Call):
            function = node.func
            if (
                isinstance(function, ast.Attribute)
                and isinstance(function.value, ast.Name)
                and function.attr in OPENING.get(function.value.id, ())
            ):
                yield f"{function.value.id}.{function.attr}"
            if isinstance(function, ast.Name) and function.id in ("eval", "exec"):
                yield function.id
            reads = isinstance(function, ast.Attribute) and function.attr in ("from_pretrained", "from_config")
            if reads and not any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
                yield f"{function.attr} without trust_remote_code=False"
            for keyword in node.keywords:
                untrusted = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in ("allow_pickle",
                                   "weights_only") or keyword.arg == "trust_remote_code" and not untrusted:
                    yield keyword.arg


@pytest.mark.parametrize("source, name", [
    ("import pickle", "pickle"), ("from joblib import load", "joblib"), ("torch.load(p)", "torch.load"),
    ("np.load(p, allow_pickle=True)", "allow_pickle"),
    ("M.from_pretrained(p, trust_remote_code=True)", "trust_remote_code"),
    ("M.from_config(c, trust_remote_code=t)", "trust_remote_code"),
    ("M.from_pretrained(p)", "from_pretrained without trust_remote_code=False"),
    ("f(C)(1).from_config(c)", "from_config without trust_remote_code=False"),
    ("yaml.load(t, Loader=L)", "yaml.load"), ("pd.read_pickle(p)", "pd.read_pickle")])
def test_the_scan_finds_what_it_is_for(source, name):
    assert name in set(dangers(source)) and not set(
        dangers("yaml.safe_load(t); load_file(p); json.loads(t); M.from_pretrained(p, trust_remote_code=False)"))


def test_no_code_of_the_repository_opens_pickles_or_trusts_remote_code():
    found = {name: known for name, source in sources() if (known := set(dangers(source)))}
    assert found == {"test_hooks_belong_to_their_model.py": {"pickle"}}, "one test, of a model of its own making"


@pytest.fixture
def planted(tmp_path):
    "A pickle that leaves a mark when it is opened, and the mark."
    mark = tmp_path / "mark"

    class Trap:
        def __reduce__(self):
            return Path.touch, (mark,)

    return pickle.dumps(Trap()), mark


def test_the_trap_works(planted):
    pickle.loads(planted[0])
    assert planted[1].exists()


NAMES = ("records.parquet", "metrics.json", "provenance.json", "parameters.yaml", "weights.safetensors",
         "model.safetensors", "config.json",
         "pytorch_model.bin", "training_args.bin", "test-00000.parquet", "dataset_info.json", "state.json",
         "questions.jsonl", "optimizer.pt", "small.yaml")


def test_a_pickle_planted_under_any_name_is_never_opened(tmp_path, planted, monkeypatch):
    content, mark = planted
    run = tmp_path / "exports" / "runs" / "draw" / "0123456789ab"
    run.mkdir(parents=True)
    for name in NAMES:
        (run / name).write_bytes(content)
    (run / "SHA256SUMS").write_text("".join(f"{read_digest(run / name)}  {name}\n" for name in NAMES))
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path / "exports"))
    readers = [lambda: read_folder(run), lambda: load_model(run), lambda: load_benchmark("chartqa", source=run),
               lambda: load_benchmark("folder", source=run),
               lambda: run_rates(run), lambda: tidy_records({run: {}}, tmp_path / "out.parquet"), lambda: facts_of(run),
               lambda: parameters_of(run),
               lambda: read_grid(run / "small.yaml")]
    for reader in readers:
        with pytest.raises((ValueError, OSError, yaml.YAMLError, SafetensorError)):
            reader()
    (run / "config.json").write_text(json.dumps({"model_type": "internvl"}))
    with pytest.raises(ValueError, match="damaged or cut off"):
        load_model(run)
    (run / "model.safetensors").unlink()
    (run / "weights.safetensors").unlink()
    with pytest.raises(ValueError, match="pickled weights only"):
        load_model(run)
    with pytest.raises(FileNotFoundError, match="no finished run"):
        find_run("draw/0123456789ab")  # a run whose files are pickles is damaged, not finished
    assert not mark.exists()


def cache_of(folder, kind, name, commits, first=None):
    "Lay out a cache of the hub that holds some commits of a repository, the first of them as main."
    place = folder / f"{kind}s--{name.replace('/', '--')}"
    for commit in commits:
        (place / "snapshots" / commit).mkdir(parents=True)
    if first:
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(first)


def test_a_model_is_downloaded_in_the_revision_that_is_named_or_was_there_first(monkeypatch, tmp_path):
    asked, first, other = [], "0" * 40, "1" * 40
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cache_of(tmp_path / "hub", "model", "known/model", [first, other], first)
    monkeypatch.setattr(sfa_core.models.load, "snapshot_download",
                        lambda name, **options: asked.append((name, options["revision"])) or str(tmp_path))
    for name in ("new/model@abc123", "new/model", "known/model", f"known/model@{other}"):
        sfa_core.models.load.find_model(name)
    assert asked == [("new/model", "abc123"), ("new/model", "main"), ("known/model", first), ("known/model", other)]


def test_a_data_set_is_downloaded_in_the_revision_that_is_named(monkeypatch, tmp_path):
    asked, first = [], "2" * 40

    def load_dataset(hub, config, **options):
        asked.append((hub, options["revision"]))
        raise OSError("offline")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(sfa_core.documents.benchmarks.datasets, "load_dataset", load_dataset)
    for source in ("HuggingFaceM4/ChartQA@abc123", None):
        with pytest.raises(FileNotFoundError, match="cannot be read"):
            load_benchmark("chartqa", source=source)
    cache_of(tmp_path / "hub", "dataset", "HuggingFaceM4/ChartQA", [first])
    with pytest.raises(FileNotFoundError, match="cannot be read"):
        load_benchmark("chartqa")
    assert asked == [("HuggingFaceM4/ChartQA", "abc123"), ("HuggingFaceM4/ChartQA", None),
                     ("HuggingFaceM4/ChartQA", first)]


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=12)
       | st.sampled_from(["..", ".", "../x", "a/../../b", "a/b", "/etc", "~", "a\0b", "a\nb", "-x", ".hidden", "con",
                          "a b"]))
def test_a_name_is_refused_or_stays_one_component(name):
    for check in (lambda: component(name, "run"), lambda: alias_name(name),
                  lambda: find_run(name) if "/" not in name else study_path(name)):
        try:
            check()
        except (ValueError, FileNotFoundError):
            continue
        assert (Path("/exports/runs/study") / name).resolve().parent == Path(
            "/exports/runs/study"
        ) and not name.startswith("."), name


def test_make_lab_listens_on_loopback_and_answers_nobody_without_the_token(tmp_path):
    planned = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    arguments = shlex.split(next(line for line in planned.splitlines() if "jupyter lab" in line))[2:]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    places = {name: str(tmp_path / name)
              for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    with (tmp_path / "log").open("w") as log:
        more = ["--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0"]
        command = [sys.executable, "-m", "jupyterlab", *arguments, *more]
        server = subprocess.Popen(command, env=clean | places, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: re.search(r"token=\w{20,}", (tmp_path / "log").read_text()), "the address with the token")
        token = re.search(r"token=(\w+)", (tmp_path / "log").read_text())[1]
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents")
        assert refused.value.code == 403
        assert urllib.request.urlopen(f"http://127.0.0.1:{port}/api/contents?token={token}").status == 200
        tables = [path.read_text().splitlines()[1:]
                  for path in map(Path, ("/proc/net/tcp", "/proc/net/tcp6")) if path.exists()]
        entries = [line.split() for table in tables for line in table]
        listening = {entry[1].split(":")[0]
                     for entry in entries if entry[3] == "0A" and int(entry[1].split(":")[1], 16) == port}
        assert listening == {"0100007F"}, "127.0.0.1 and no other address"
    finally:
        server.terminate()
        server.wait(20)
