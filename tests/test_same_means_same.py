"""Whatever decides a result is in its key: one field changed gives another key, prose and places give the same."""
import ast
import io
import multiprocessing
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import nbformat
import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, constants
from PIL import Image
from sfa_core.core import identity
from sfa_core.core.identity import code_digest, file_digest, key_of
from sfa_core.documents.generate import documents, generator_version, make_document
from sfa_core.documents.samples import Evidence, Sample, TextBox, data_digest, samples
from sfa_core.core.hub import asked_commit, folder_revision
from sfa_core.core.paths import REPOSITORY
from sfa_core.models.answers import answer
from sfa_core.models.embedded import EmbeddedConfig, train_tokenizer
from sfa_core.models.load import load_model, new_bundle, save_model
from sfa_core.models.resolution import at_resolution
from sfa_core.runs import ablation, studies
from sfa_core.runs.studies import run_identity
from sfa_core.structure.inject import eject, inject
from sfa_core.training.arms import FinetuneConfig, load_arm
from sfa_core.training.finetune import finetune
from sfa_core.training.stream import DocumentSet, Mixture

FORKS = multiprocessing.get_context("forkserver")
TOKENIZER = train_tokenizer(["What is Oslo? 42 and 59", "the total of all bars"] * 4, 320)
SMALL = EmbeddedConfig(vision_width=32, vision_layers=2, vision_heads=2, vision_hidden=64, language_width=64,
                       language_layers=2, language_heads=2,
                       language_kv_heads=1, head_dim=32, language_hidden=64)


def png(colour):
    out = io.BytesIO()
    Image.new("RGB", (6, 6), colour).save(out, "PNG")
    return out.getvalue()


# Data

EVIDENCE = Evidence((("", "Oslo"), ("May", "42")), (TextBox("42", (1.0, 2.0, 3.0, 4.0), "value"),), (0,))
ONE = Sample("a/0", "a", "read", "What is Oslo?", ("42",), png("red"), EVIDENCE)
TWO = Sample("a/1", "a", "sum", "What is the total?", ("59", "59.0"), png("red"), EVIDENCE)
FIELDS = dict(
    id=dict(id="a/9"),
    document=dict(document="b"),
    kind=dict(kind="sum"),
    question=dict(question="What is Rome?"),
    answer=dict(answers=("0",)),
    more_answers=dict(answers=("42", "forty-two")),
    pixel=dict(source=png("blue")),
    image_byte=dict(source=png("red") + b"\0"),
    no_evidence=dict(evidence=None),
    cell=dict(evidence=replace(EVIDENCE, table=(("", "Oslo"), ("May", "43")))),
    text=dict(evidence=replace(EVIDENCE, texts=(TextBox("43", (1.0, 2.0, 3.0, 4.0), "value"),))),
    box=dict(evidence=replace(EVIDENCE, texts=(TextBox("42", (1.0, 2.0, 3.0, 4.5), "value"),))),
    role=dict(evidence=replace(EVIDENCE, texts=(TextBox("42", (1.0, 2.0, 3.0, 4.0), "tick"),))),
    bearer=dict(evidence=replace(EVIDENCE, answer=())),
)


@pytest.mark.parametrize("change", FIELDS.values(), ids=FIELDS)
def test_data_with_one_field_changed_has_another_key(change):
    assert data_digest([replace(ONE, **change), TWO]) != data_digest([ONE, TWO])


def test_order_and_number_of_questions_count():
    assert len({data_digest(asked) for asked in ([ONE, TWO], [TWO, ONE], [ONE], [TWO])}) == 4


def test_a_file_its_bytes_and_another_folder_are_the_same_data(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "page.png").write_bytes(png("red"))
    monkeypatch.chdir(tmp_path / "here")
    keys = {data_digest([replace(ONE, source=place)]) for place in (
        png("red"), "page.png", tmp_path / "here" / "page.png", str(tmp_path / "there" / "page.png"))}
    assert keys == {data_digest([ONE])}
    (tmp_path / "there" / "page.png").unlink()
    assert data_digest([replace(ONE, source=tmp_path / "there" / "page.png")]) not in keys, (
        "a file that is gone is another picture"
    )


def test_generated_documents_differ_by_language_size_preset_kinds_and_seed():
    given = [dict(), dict(language="ko"), dict(size=168), dict(preset="rich"), dict(kinds=("bar",)), dict(seed=2)]
    sets = [documents(**dict(n=4, seed=1) | more) for more in given]
    assert len({DocumentSet(data).digest for data in sets}) == len({data_digest(data) for data in sets}) == len(sets)
    assert all(data_digest(data) == data_digest(samples(data)) == DocumentSet(samples(data)).digest for data in sets)
    ids = [id for data in sets[:4] for id in data["id"]]
    assert len(set(ids)) == len(ids), "records of two languages or sizes cannot be taken for one another"


def test_ids_of_usual_documents_are_as_they_were():
    assert make_document("bar", (900_001, 0)).id == "embedded-bar-900001-0"
    assert make_document("pie", (5, 1), preset="rich", size=448).id == "rich-pie-5-1"
    assert make_document("bar", 5, language="ko", size=168).id == "embedded-bar-5-ko-168px"


def test_rows_of_a_data_set_are_seen_to_the_last_answer():
    data = documents(3, 1)
    changed = data.to_list()
    changed[2]["questions"][-1]["answers"] = ["0"]
    without = [row | {"questions": []} if at == 1 else row for at, row in enumerate(data.to_list())]
    more = [Dataset.from_list(rows, features=data.features) for rows in (changed, without)]
    assert len({DocumentSet(part).digest for part in (data, *more)}) == 3
    assert len({DocumentSet(part.select_columns(["id", "image", "questions"])).digest for part in (data, *more)}) == 3


def test_a_mixture_is_its_names_weights_and_contents():
    a, b, korean = documents(2, 1), documents(2, 2), documents(2, 2, language="ko")
    mixtures = [Mixture({"a": a, "b": b}), Mixture({"a": a, "b": korean}), Mixture({"a": a, "b": b}, {"a": 1, "b": 2}),
                Mixture({"b": b, "a": a})]
    assert len({mixture.digest for mixture in mixtures}) == 4 and Mixture({"a": a, "b": b}).digest == mixtures[0].digest


# Files and code

def test_one_byte_in_the_middle_of_a_large_file_is_seen_whatever_its_time_says(tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path / "exports"))
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(70 << 20)
    before, times = file_digest(path), path.stat()
    assert file_digest(path) == before
    with path.open("r+b") as file:
        file.seek(35 << 20)
        file.write(b"\1")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file_digest(path) != before


CODE = "from sfa_core.core.paths import DATA\n\ndef f():\n    return DATA"
PROSE = '"What it is."\n# a comment\nfrom sfa_core.core.paths import DATA\n\n\ndef f():\n    "Say more."\n    return DATA  # here'  # noqa: E501


def test_prose_in_a_study_is_free_and_statements_are_not():
    assert code_digest(CODE) == code_digest(PROSE)
    assert len({code_digest(CODE), code_digest(CODE + "\nf()"), code_digest(CODE.replace("paths", "files"))}) == 3


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A package of three modules in the place of ours: `one` imports `two`, and `three` stands alone."
    root = tmp_path / "sfa_core"
    for name, text in dict(one='"One."\nfrom .two import x\n', two="x = 1\n", three="y = 1\n").items():
        (root / "part").mkdir(parents=True, exist_ok=True)
        (root / "part" / f"{name}.py").write_text(text)
    monkeypatch.setattr(identity.sfa_core, "__file__", str(root / "__init__.py"))
    return root / "part"


@pytest.mark.parametrize("name, text, same", [
    ("two", "x = 2\n", False), ("one", '"One."\nfrom .two import x\nx += 1\n', False),
    ("two", '"Two."\n# more\nx = 1\n', True), ("one", '"Another word."\nfrom .two import x\n', True),
    ("three", "y = 2\n", True)])
def test_a_module_counts_where_it_is_imported_and_with_its_statements_alone(package, name, text, same):
    study = "from sfa_core.part.one import x"
    before = code_digest(study)
    (package / f"{name}.py").write_text(text)
    assert (code_digest(study) == before) is same


def test_the_generator_is_what_draws(monkeypatch, tmp_path):
    generator_version.cache_clear()
    before = generator_version()
    real = identity.statements
    monkeypatch.setattr(identity, "statements", lambda source: real(source.replace("0.12, 0.2)", "0.13, 0.2)")))
    identity.facts_at.cache_clear()
    generator_version.cache_clear()
    try:
        assert generator_version() != before
    finally:
        monkeypatch.undo()
        identity.facts_at.cache_clear()
        generator_version.cache_clear()


def test_a_key_takes_nothing_that_has_no_writing():
    with pytest.raises(TypeError):
        key_of(a=object())
    assert key_of(a=1.0) != key_of(a=1) and key_of(a="1") != key_of(a=1)


# Models

@pytest.fixture(scope="module")
def model():
    return load_model("embedded", placement="cpu")


def nudged(bundle):
    "Change one weight in the middle of the encoder."
    weight = list(bundle.family.tower_of(bundle.model).parameters())[20]
    with torch.no_grad():
        weight.view(-1)[weight.numel() // 2] += 1e-3
    return bundle


def with_template(bundle):
    bundle.tokenizer.chat_template += " "
    return bundle


def with_structure(bundle, **options):
    inject(bundle, **options)
    return bundle


def fresh():
    return load_model("embedded", placement="cpu")


MODELS = dict(
    weight=lambda: nudged(fresh()),
    precision=lambda: load_model("embedded", precision="bfloat16", placement="cpu"),
    resolution=lambda: at_resolution(fresh(), 168),
    tokens_of_a_tile=lambda: at_resolution(fresh(), 112, 4),
    structure=lambda: with_structure(fresh()),
    terms=lambda: with_structure(fresh(), terms=("row",)),
    blocks=lambda: with_structure(fresh(), blocks=4),
    seed_of_structure=lambda: with_structure(fresh(), terms=("row",), seed=1),
    template=lambda: with_template(fresh()),
)


def test_models_that_differ_in_one_thing_have_different_keys(model):
    keys = {name: make().identity for name, make in MODELS.items()} | {"plain": model.identity}
    assert len(set(keys.values())) >= len(keys) - 1, keys  # structure begins at zero, whatever its seed
    assert all(keys[name] != keys["plain"] for name in MODELS)


def test_a_model_is_the_same_wherever_it_lies_and_whatever_it_was_asked(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = model.identity
    answer(model, samples(documents(1, 1))[:2], max_new_tokens=2)
    with_structure(model)
    eject(model)
    assert model.identity == before == load_model(save_model(model, tmp_path / "copy"), placement="cpu").identity
    assert len({new_bundle(SMALL, TOKENIZER, seed=seed).identity
                for seed in (0, 0, 1)}) == 2, "a model that was never saved is its tensors"


def test_one_byte_of_70_mib_of_weights_is_another_model_to_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path / "exports"))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.truncate(70 << 20)
    assert folder_revision(tmp_path / "one") == folder_revision(tmp_path / "two")
    with (tmp_path / "two" / "model.safetensors").open("r+b") as file:
        file.seek(35 << 20)
        file.write(b"\1")
    assert folder_revision(tmp_path / "one") != folder_revision(tmp_path / "two")


def test_bits_are_part_of_a_model(model):
    "Quantisation is kept in the configuration and in the weights; here its configuration alone changes."
    keys = {model.identity}
    try:
        for bits in (4, 8):
            model.model.config.quantization_config = {"quant_method": "bitsandbytes", f"load_in_{bits}bit": True}
            keys.add(model.identity)
    finally:
        del model.model.config.quantization_config
    assert len(keys) == 3


# Runs

STUDY = [
    'out_dir: str = ""  # folder', "seed: int = 0  # of nothing", "interactive: bool = False  # live figures",
    'model: str = "embedded"  # [model] a model', 'models: str = ""  # [models] several',
    'arm: str = ""  # [arm] an arm',
    'mixtures: str = ""  # [mixture] what is learned', 'benchmarks: str = ""  # [data] what is asked',
    'source: str = ""  # [source] of those',
    'images: str = ""  # [path] pages', 'logs: str = ""  # [paths] of replies', 'kept: str = ""  # [reference] results',
    'shown: str = ""  # [runs] on the page', 'plan: str = ""  # [grid] of runs', 'label: str = ""  # a text',
]


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_STUDIES", str(tmp_path / "studies"))
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path / "exports"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    asked_commit.cache_clear()
    write_cells(tmp_path, CODE)
    return tmp_path


def write_cells(place, code, prose="# Toy\n\n> A toy."):
    parameters = nbformat.v4.new_code_cell("\n".join(STUDY), metadata={"tags": ["parameters"]})
    cells = [nbformat.v4.new_markdown_cell(prose), parameters, nbformat.v4.new_code_cell(code)]
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    (place / "studies").mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), place / "studies" / "toy.ipynb")


def folder(place, name, text="1"):
    (place / name).mkdir(parents=True, exist_ok=True)
    (place / name / "a.json").write_text(text)
    return place / name


NAMED = {  # parameters that name the folder {0}, alone or among others
    "model": dict(model="{0}"), "models": dict(models="embedded, {0}"), "arm": dict(arm="{0}"),
    "images": dict(images="{0}"), "logs": dict(logs="{0}/a.json,{0}"), "kept": dict(kept="curves {0}"),
    "plan": dict(plan="{0}/a.json"),
    "mixture": dict(mixtures="line:1 | bar:2 chartqa/train@{0}:1"),
    "benchmarks": dict(benchmarks="synthetic chartqa@{0}"),
    "source": dict(benchmarks="chartqa", source="{0}")}


@pytest.mark.parametrize("given", NAMED.values(), ids=NAMED)
def test_what_a_parameter_names_is_part_of_the_run_wherever_one_stands(study, given, monkeypatch):
    named = {name: value.format(folder(study, "named")) for name, value in given.items()}
    before = run_identity("toy", named)
    folder(study, "elsewhere")
    monkeypatch.chdir(study / "elsewhere")
    assert run_identity("toy", named) == before
    folder(study, "named", "2")
    assert run_identity("toy", named) != before
    with pytest.raises(FileNotFoundError) as error:
        run_identity("toy", {name: value.replace("named", "gone") for name, value in named.items()})
    assert "gone" in str(error.value) and "\n" not in str(error.value)


def test_a_text_without_a_tag_and_a_name_of_a_run_never_mean_the_working_directory(study):
    before = run_identity("toy", {"label": "control"}), run_identity("toy", {"arm": "control"})
    folder(study, "control")
    assert before == (run_identity("toy", {"label": "control"}), run_identity("toy", {"arm": "control"}))
    assert run_identity("toy", {"arm": "./control"}) != before[1]
    with pytest.raises(FileNotFoundError,
                       match=r"no finished run is named 'mine'.*written with a slash, such as ./mine"):
        run_identity("toy", {"arm": "mine"})


@pytest.mark.parametrize("name, other", [("metrics.json", '{"n": 2}'), ("table_1.csv", "n\n2\n"),
                                         ("figures/figure_1.json", "{}")])
def test_a_report_of_runs_that_changed_is_another_report(study, name, other):
    alone = run_identity("toy", {"shown": "*/*"})
    assert run_identity("toy", {"shown": "00_tour/*"}) != alone
    mine = folder(study / "exports" / "reference", "mine")
    (mine / "provenance.json").write_text('{"study": "toy", "run": "0123456789ab", "wall_seconds": 1}')
    before = run_identity("toy", {"shown": "*/*"})
    assert before != alone
    (mine / name).parent.mkdir(exist_ok=True)
    (mine / name).write_text(other)
    assert run_identity("toy", {"shown": "*/*"}) != before
    (mine / "provenance.json").write_text('{"study": "90_report", "run": "0123456789ab", "wall_seconds": 1}')
    assert run_identity("toy", {"shown": "*/*"}) == alone  # a report is no part of a report
    with pytest.raises(FileNotFoundError, match=r"no finished run is 'tea/\*'; expected STUDY/RUN"):
        run_identity("toy", {"shown": "tea/*"})


HUB = {
    "model": dict(model="some/model"), "models": dict(models="embedded,some/model"),
    "benchmarks": dict(benchmarks="synthetic chartqa@some/model"),
    "own": dict(benchmarks="chartqa"), "source": dict(benchmarks="chartqa", source="some/model"),
    "mixture": dict(mixtures="line:1 chartqa@some/model:1")}


@pytest.mark.parametrize("given", HUB.values(), ids=HUB)
def test_a_run_has_one_id_before_and_after_the_first_download_and_another_for_another_commit(study, given, monkeypatch):
    commits = {"now": "a" * 40}
    asked = []

    def repo_info(self, name, *, repo_type, revision, timeout):
        asked.append((name, repo_type))
        return SimpleNamespace(sha=commits["now"])
    monkeypatch.setattr(HfApi, "repo_info", repo_info)
    before = run_identity("toy", given)
    (name, kind), = set(asked)
    place = study / "hub" / f"{kind}s--{name.replace('/', '--')}"
    (place / "snapshots" / commits["now"]).mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commits["now"])
    monkeypatch.setattr(HfApi, "repo_info", None)  # the cache knows it now
    assert run_identity("toy", given) == before
    (place / "refs" / "main").write_text("b" * 40)
    assert run_identity("toy", given) != before


@pytest.mark.parametrize("given", HUB.values(), ids=HUB)
def test_a_name_of_the_hub_that_nobody_knows_is_refused_in_one_line(study, given, monkeypatch):
    def offline(self, name, **options):
        raise ConnectionError("offline")
    monkeypatch.setattr(HfApi, "repo_info", offline)
    with pytest.raises(FileNotFoundError,
                       match="the commit of (model|dataset) .* is not known.*name the commit as") as error:
        run_identity("toy", given)
    assert "\n" not in str(error.value)
    pinned = {name: value.replace("some/model", "some/model@" + "c" * 40) for name, value in given.items()}
    assert pinned == given or run_identity("toy", pinned)


@pytest.mark.parametrize("change, same", [
    (lambda place, patch: write_cells(place, PROSE), True),
    (lambda place, patch: write_cells(place, CODE, prose="# Other words\n\n> Another toy."), True),
    (lambda place, patch: write_cells(place, CODE + "\nf()"), False),
    (lambda place, patch: patch.setattr(studies, "package_versions", lambda: {"torch": "0.1"}), False),
    (lambda place, patch: patch.setattr(studies, "shipped_digest", lambda: "other"), False),
], ids=["docstrings and comments", "text", "code", "packages", "what ships"])
def test_the_id_of_a_run_follows_code_packages_and_data_not_prose(study, monkeypatch, change, same):
    before = run_identity("toy")
    change(study, monkeypatch)
    assert (run_identity("toy") == before) is same


def test_every_study_says_which_parameters_name_something(monkeypatch):
    monkeypatch.delenv("SFA_STUDIES", raising=False)
    plain = {"out_dir", "split", "precision", "squares", "rows", "sides", "arms", "profile", "preset", "stage"}
    words = {"06_page_model": {"arm"}}  # an arm of a stage is a word, no trained arm
    for name in studies.known_studies():
        texts = {key: entry for key, entry in studies.study_parameters(name).items() if entry["type"] is str}
        known = plain | words.get(name, set())
        assert not [key for key, entry in texts.items() if not entry["tag"] and key not in known], name


# functions that read what is committed or was run, by a name or, without one, whatever there is
READERS = {"reference_folder", "arm_folder", "reference_arms", "read_curves", "read_page_stages", "answer_table",
           "committed_tunings", "committed_effects", "all_runs", "references", "finished_runs", "find_run"}
SHOWN = {"51_real_answers": {"arm_folder"},  # its example, no number of which is a result
         "90_report": {"references"}}  # named as left out, no number of which is shown


def test_no_study_reads_results_that_its_parameters_do_not_name(monkeypatch):
    monkeypatch.delenv("SFA_STUDIES", raising=False)
    seen = 0
    for name in studies.known_studies():
        cells = nbformat.read(studies.study_path(name), 4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        assert "REPOSITORY" not in code, name  # no path of its own to what is committed
        calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)
                 and getattr(node.func, "id", "") in READERS - SHOWN.get(name, set())]
        seen += len(calls)
        unnamed = [call for call in calls if not call.args or isinstance(call.args[0], ast.Constant)]
        assert not [ast.unparse(call) for call in unnamed], name
    assert seen > 8


def test_a_wrong_tag_is_refused(study, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "STUDY", [*STUDY, 'more: str = ""  # [weights] of something'])
    write_cells(study, CODE)
    with pytest.raises(ValueError, match=r"parameter more of study 'toy' is str and tagged \[weights\]; .*mixture"):
        run_identity("toy")


# Trainings that are kept

def cell(bundle, data, **options):
    config = FinetuneConfig("control", steps=1, batch_size=2, questions=1, checkpoint_every=0)
    return ablation.run_cell(bundle, data, samples(documents(1, 9))[:2], config, 4, **options)


def test_every_change_of_data_model_code_or_package_is_another_cell(model, monkeypatch, tmp_path):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path))
    trained = []
    monkeypatch.setattr(ablation, "finetune",
                        lambda *given, original=ablation.finetune, **options: trained.append(1)
                        or original(*given, **options))
    english = DocumentSet(documents(4, 1))
    first = cell(model, english)
    for made in (cell(model, english), cell(fresh(), DocumentSet(samples(documents(4, 1))))):
        assert trained == [1] and made[0].equals(first[0])
    others = [(model, DocumentSet(documents(4, 1, language="ko"))), (model, DocumentSet(documents(4, 1, size=168))),
              (nudged(fresh()), english),
              (load_model("embedded", precision="bfloat16", placement="cpu"), english),
              (at_resolution(fresh(), 168), english)]
    for number, other in enumerate(others, start=2):
        cell(*other)
        assert len(trained) == number
    before = ablation.kept_folder("cells", data=1)
    assert before == ablation.kept_folder("cells", data=1) != ablation.kept_folder("dynamics", data=1)
    for name in ("package_versions", "code_digest", "shipped_digest"):
        with monkeypatch.context() as patch:
            patch.setattr(ablation, name, lambda **given: "other")
            assert ablation.kept_folder("cells", data=1) != before
    with pytest.raises(ValueError, match="nothing of kind 'rows' is kept, expected one of cells, dynamics"):
        ablation.kept_folder("rows", data=1)


def train_and_note(exports, ready):
    "Make the cell that another process makes too, and note when a training begins."
    os.environ["SFA_EXPORTS"] = str(exports)
    real = ablation.finetune

    def noted(*given, **options):
        with (exports / "trained").open("a") as log:
            print(os.getpid(), file=log)
        return real(*given, **options)
    ablation.finetune = noted
    bundle, data = fresh(), DocumentSet(documents(8, 1))
    ready.wait()
    config = FinetuneConfig("control", steps=6, batch_size=4, questions=2, checkpoint_every=2, keep=1)
    records, log = ablation.run_cell(bundle, data, samples(documents(2, 9))[:4], config, 4)
    (exports / f"{os.getpid()}.txt").write_text(f"{len(records)} {len(log)} {list(records['prediction'])}")


def test_two_processes_that_want_the_same_cell_train_it_once(tmp_path, forkserver):
    ready = FORKS.Barrier(2)
    workers = [FORKS.Process(target=train_and_note, args=(tmp_path, ready)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(300)
    assert [worker.exitcode for worker in workers] == [0, 0]
    seen = [file.read_text() for file in tmp_path.glob("*.txt")]
    assert len(seen) == 2 and seen[0] == seen[1] and seen[0].startswith("4 6 ")
    assert len((tmp_path / "trained").read_text().split()) == 1


# An arm that is there is compared before it is handed out

def test_the_arm_of_another_training_is_refused_and_that_of_the_same_is_returned(model, tmp_path):
    data = documents(4, 1)
    config = FinetuneConfig("control", steps=1, batch_size=2, questions=1, learning_rate=1e-9, checkpoint_every=0)
    made = finetune(model, data, config, tmp_path, progress=False)
    again = finetune(model, data, config, tmp_path, progress=False)
    shutil.rmtree(tmp_path / "checkpoints")
    kept = finetune(model, data, config, tmp_path, progress=False)
    assert made.arm == again.arm == kept.arm and kept.position.step == 1 and len(kept.log) == 1
    changes = [(dict(learning_rate=1e-2), data, "finetune.learning_rate"), (dict(steps=2), data, "finetune.steps"),
               ({}, documents(4, 1, language="ko"), "data is")]
    for change, other, said in changes:
        with pytest.raises(ValueError, match=f"holds the arm of another training, {said}"):
            finetune(model, other, replace(config, **change), tmp_path, progress=False)
    with pytest.raises(ValueError, match="holds the arm of another training, base is"):
        finetune(nudged(fresh()), data, config, tmp_path, progress=False)


def test_a_training_does_not_go_on_with_other_data_of_the_same_ids(model, tmp_path):
    asked = samples(documents(4, 1))
    config = FinetuneConfig("control", steps=4, batch_size=2, questions=1, checkpoint_every=1)
    finetune(model, asked, config, tmp_path, until=2, progress=False)
    for other in ([replace(asked[0], answers=("0",)), *asked[1:]],
                  [replace(asked[0], source=asked[-1].source), *asked[1:]]):
        with pytest.raises(ValueError, match="belongs to another run, identity.data is"):
            finetune(model, other, config, tmp_path, progress=False)
    assert finetune(model, samples(documents(4, 1)), config, tmp_path, progress=False).position.step == 4


def test_an_arm_of_a_model_that_was_never_saved_fits_that_model_alone(tmp_path):
    made, other = (new_bundle(SMALL, TOKENIZER, seed=seed) for seed in (0, 1))
    config = FinetuneConfig("control", steps=1, batch_size=2, questions=1, checkpoint_every=0)
    arm = finetune(made, documents(4, 1), config, tmp_path, progress=False).arm
    with load_arm(made, arm):
        pass
    with pytest.raises(ValueError, match="was trained on .* of identity"):
        load_arm(other, arm)


def test_arms_that_are_committed_still_fit_the_model_that_ships(model):
    for arm in ("control", "vision"):
        with load_arm(model, REPOSITORY / "exports" / "reference" / "arms" / arm):
            pass
