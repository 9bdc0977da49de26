"""A mixture takes kinds of documents and benchmarks alike; an arm trained on it is asked about any benchmark, by
its own scorer, and not trained again."""
import datasets
import pytest

from sfa_core.runs import ablation as cells
from sfa_core.documents.benchmarks import load_benchmark
from sfa_core.runs.ablation import TABLE_1, mixture_of, named_benchmark, run_rows, source_documents
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.training.arms import FinetuneConfig
from sfa_core.models.load import load_model


@pytest.fixture
def benchmark(tmp_path, monkeypatch):
    "A local copy of two splits of ChartQA in the hub's layout, with pages that the shipped model can read."
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split, seed in (("train", 5), ("test", 6)):
        rows = [dict(image=page["image"], query=q["question"], label=list(q["answers"]), human_or_machine=at % 2)
                for page in documents(6, seed=seed) for at, q in enumerate(page["questions"])]
        features = datasets.Features(image=datasets.Image(), query=datasets.Value("string"),
                                     label=datasets.List(datasets.Value("string")),
                                     human_or_machine=datasets.ClassLabel(names=["human", "machine"]))
        (tmp_path / "copy").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows,
                                   features=features).to_parquet(tmp_path / "copy" / f"{split}-00000-of-00001.parquet")
    return tmp_path / "copy"


def test_names_of_sources():
    assert named_benchmark("chartqa") == ("chartqa", None, None) and named_benchmark("docvqa/train") == (
        "docvqa",
        "train",
        None,
    )
    assert named_benchmark("chartqa/train@/data/Chart QA/x@y:1") == ("chartqa", "train", "/data/Chart QA/x@y:1")
    for name in ("lines", "", "lines/train@folder"):
        with pytest.raises(ValueError, match=f"'{name}' is no source of documents, expected a kind .*bar.* or a "
                                             f"benchmark .*chartqa"):
            source_documents(name, 2, seed=0)


@pytest.mark.parametrize("text", ["line", "line:", "line:x", "line: 1", "line:1,pie:2"])
def test_what_is_no_mixture_is_refused(text):
    with pytest.raises(ValueError, match="sources with weights such as 'line:1 chartqa/train:2' are expected|is no "
                                         "source of documents"):
        mixture_of(text, 2, seed=0)
    with pytest.raises(ValueError, match="a weight above 0"):
        mixture_of("line:0", 2, seed=0)


def test_documents_of_a_benchmark_are_whole_and_chosen_by_the_seed(benchmark):
    name = f"chartqa/train@{benchmark}"
    whole = load_benchmark("chartqa", "train", benchmark)
    found = [source_documents(name, 3, seed) for seed in (0, 0, 1, 2)]
    assert found[0] == found[1] and len({tuple(s.id for s in part) for part in found}) > 1
    for part in found:
        chosen = {sample.document for sample in part}
        assert len(chosen) == 3 and part == [sample for sample in whole if sample.document in chosen]
    generated = source_documents("synthetic@rich", 2, seed=4)
    evaluated = {sample.id for sample in load_benchmark("synthetic", source="rich", limit=90)}
    assert len({sample.document for sample in generated}) == 2 and not {sample.id for sample in generated} & evaluated


def test_one_training_is_asked_about_kinds_and_benchmarks(benchmark, tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path / "exports"))
    bundle, trained = load_model("embedded"), []
    monkeypatch.setattr(cells, "finetune",
                        lambda *arguments, original=cells.finetune, **options: trained.append(1)
                        or original(*arguments, **options))
    mixed = mixture_of(f"line:1 chartqa/train@{benchmark}:3", 4, seed=1)
    assert mixed.names == ("line", f"chartqa/train@{benchmark}") and mixed.weights == (1.0, 3.0)
    base = FinetuneConfig("control", steps=2, batch_size=4, questions=2, checkpoint_every=0)
    ask = lambda questions, name="synthetic": run_rows(bundle, mixed, questions, base, {"control": TABLE_1["control"]},
                                                       [0], 12, name)[0]["control"][0]
    charts = load_benchmark("chartqa", source=benchmark)
    kinds, scored, again = ask(samples(documents(2, seed=3))[:4]), ask(charts, "chartqa"), ask(charts, "chartqa")
    assert (
        trained == [1]
        and len(kinds) == 4
        and scored.equals(again)
        and set(scored["id"]) == {sample.id for sample in charts}
    )
    exact = ask(charts, "dvqa")  # the same questions, scored without any tolerance
    assert (
        trained == [1]
        and scored["prediction"].equals(exact["prediction"])
        and exact["correct"].sum() <= scored["correct"].sum()
        and scored["correct"].any()
    )
