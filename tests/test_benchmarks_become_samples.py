"""Every benchmark's own layout becomes the same samples, and what is missing from a copy is named."""
import io
import json

import datasets
import pytest
from datasets import ClassLabel, Features, Image, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from sfa_core.documents.benchmarks import choices_of, load_benchmark, option_answer, with_choices
from sfa_core.documents.catalogue import BENCHMARKS, benchmark_table


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


TEXTS, TEXT = List(Value("string")), Value("string")


def png(shade):
    file = io.BytesIO()
    PILImage.new("RGB", (8, 6), (shade, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


# name -> features besides the image, and four rows (image shade, values)
SCHEMAS = {
    "chartqa": ({"query": TEXT, "label": TEXTS, "human_or_machine": ClassLabel(names=["human", "machine"])},
                [(1, "How many?", ["14"], 0), (1, "Which?", ["Norway"], 1), (2, "Share?", ["62%"], 0),
                 (3, "Both?", ["[1, 2]"], 1)]),
    "docvqa": ({"questionId": TEXT, "question": TEXT, "answers": TEXTS},
               [(1, "a1", "Date?", ["1 May", "May 1"]), (1, "a2", "Name?", ["Li"]), (2, "a3", "Sum?", ["5"]),
                (3, "a4", "To?", ["Bo"])]),
    "textvqa": ({"question_id": Value("int64"), "question": TEXT, "answers": TEXTS},
                [(i // 2, i, "Brand?", ["acme"] * 10) for i in range(4)]),
    "ocrbench": ({"question": TEXT, "answer": TEXTS, "question_type": TEXT, "dataset": TEXT},
                 [(i, "What is written?", ["x^2"], "Handwritten Mathematical Expression Recognition", "HME100k")
                  for i in range(4)]),
    "ai2d": ({"question": TEXT, "options": TEXTS, "answer": TEXT},
             [(i, "Which part?", ["leaf", "root", "stem", "bud"], str(i)) for i in range(4)]),
    "k_dtcbench": ({"index": TEXT, "question": TEXT, "choice_a": TEXT, "choice_b": TEXT, "choice_c": TEXT,
                    "choice_d": TEXT, "answer": TEXT, "category": TEXT},
                   [(i, f"k{i}", "값은?", "1", "2", "3", "4", "ABCD"[i], "table") for i in range(4)]),
}
SCHEMAS["infographicvqa"] = SCHEMAS["docvqa"]


def table(name):
    features, rows = SCHEMAS[name]
    columns = {"image": [png(row[0]) for row in rows]} | {column: [row[i + 1] for row in rows]
                                                          for i, column in enumerate(features)}
    return datasets.Dataset.from_dict(columns, features=Features(image=Image(), **features))


@pytest.fixture
def copy(tmp_path):
    "Write a local copy of a benchmark in the hub's layout and give its folder."
    def write(name, data=None, split=None):
        folder = tmp_path / name / (BENCHMARKS[name].config or "data")
        folder.mkdir(parents=True)
        (table(name) if data is None
         else data).to_parquet(folder / f"{split or BENCHMARKS[name].split}-00000-of-00001.parquet")
        return tmp_path / name
    return write


@pytest.mark.parametrize("name", SCHEMAS)
def test_hub_layout_becomes_samples(name, copy):
    found = load_benchmark(name, source=copy(name))
    assert len({sample.id for sample in found}) == 4 and [sample.image.getpixel((0, 0))[0] for sample in found] == [
        row[0] for row in SCHEMAS[name][1]
    ]
    shades = {}
    for sample, row in zip(found, SCHEMAS[name][1], strict=True):
        assert shades.setdefault(row[0],
                                 sample.document) == sample.document, "questions about one image share a document"
        assert sample.answers and all(isinstance(answer, str) for answer in sample.answers)
    assert len(set(shades.values())) == len(shades)


def test_fields_land_where_they_belong(copy):
    chart = load_benchmark("chartqa", source=copy("chartqa"))
    assert (
        [s.kind for s in chart] == ["human", "machine", "human", "machine"]
        and chart[3].answers == ("[1, 2]",)
        and chart[1].question == "Which?"
    )
    document = load_benchmark("docvqa", source=copy("docvqa"))
    assert document[0].id == "a1" and document[0].answers == ("1 May", "May 1")
    assert load_benchmark("ocrbench", source=copy("ocrbench"))[0].kind.startswith("Handwritten")
    diagram = load_benchmark("ai2d", source=copy("ai2d"))
    assert [s.answers for s in diagram] == [("A",), ("B",), ("C",), ("D",)] and diagram[
        0
    ].question == "Which part?\nA. leaf\nB. root\nC. stem\nD. bud"
    korean = load_benchmark("k_dtcbench", source=copy("k_dtcbench"))
    assert [s.answers for s in korean] == [("A",), ("B",), ("C",), ("D",)] and choices_of(korean[0].question) == dict(
        A="1", B="2", C="3", D="4"
    )


def test_limit_streams_the_first_and_seed_chooses(copy):
    folder = copy("chartqa")
    everything = load_benchmark("chartqa", source=folder)
    assert load_benchmark("chartqa", source=folder, limit=2) == everything[:2]
    chosen = [tuple(s.id for s in load_benchmark("chartqa", source=folder, limit=2, seed=seed))
              for seed in (0, 0, 1, 2, 3)]
    assert (
        chosen[0] == chosen[1]
        and len(set(chosen)) > 1
        and {i for ids in chosen for i in ids} <= {s.id for s in everything}
    )
    assert load_benchmark("chartqa", source=folder, limit=99, seed=5) == everything


def test_two_configurations_in_one_copy_are_kept_apart(copy, tmp_path):
    folder = copy("docvqa")
    (folder / "InfographicVQA").mkdir()
    table("docvqa").select([0]).to_parquet(folder / "InfographicVQA" / "validation-00000-of-00001.parquet")
    assert (
        len(load_benchmark("docvqa", source=folder)) == 4 and len(load_benchmark("infographicvqa", source=folder)) == 1
    )


def test_a_dataset_saved_to_disk_is_a_copy(tmp_path):
    table("chartqa").save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=table("chartqa"), val=table("chartqa").select([0])).save_to_disk(tmp_path / "both")
    assert (
        len(load_benchmark("chartqa", source=tmp_path / "one")) == 4
        and len(load_benchmark("chartqa", "val", tmp_path / "both")) == 1
    )
    with pytest.raises(ValueError, match="no split 'train'.*test, val"):
        load_benchmark("chartqa", "train", tmp_path / "both")


RELEASES = {
    "dvqa": ("val_easy_qa.json",
             [dict(image="bar_1.png", template_id="data", question="Largest?", answer="cat", question_id=1)],
             "images/bar_1.png", "data", "cat"),
    "figureqa": ("validation1/qa_pairs.json",
                 dict(qa_pairs=[dict(image_index=7, question_id=3, question_string="Is Red the minimum?", answer=1)]),
                 "validation1/png/7.png", "question_3", "Yes"),
    "plotqa": ("test/qa_pairs_V2.json",
               dict(qa_pairs=[dict(image_index=9, template="data_retrieval", question_string="How many?", answer=4.5)]),
               "test/png/9.png", "data_retrieval", "4.5"),
}


@pytest.mark.parametrize("name", RELEASES)
def test_original_releases_become_samples(name, tmp_path):
    listing, content, image, kind, answer = RELEASES[name]
    for file in (listing, image):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / listing).write_text(json.dumps(content))
    (tmp_path / image).write_bytes(png(5)["bytes"])
    sample, = load_benchmark(name, source=tmp_path)
    assert (sample.kind, sample.answers) == (kind, (answer,)) and sample.image.size == (8, 6)
    entry = content[0] if isinstance(content, list) else content["qa_pairs"][0]
    del entry["answer"]
    (tmp_path / listing).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no field 'answer'"):
        load_benchmark(name, source=tmp_path)
    with pytest.raises(FileNotFoundError, match="qa"):
        load_benchmark(name, "other", tmp_path)


@pytest.fixture
def release(tmp_path):
    "ChartQA as its authors ship it: two charts, one annotated, and a folder around it."
    test = tmp_path / "ChartQA Dataset" / "test"
    for name in ("png", "tables", "annotations"):
        (test / name).mkdir(parents=True)
    for shade, name in enumerate(("two_col_1", "multi_2")):
        (test / "png" / f"{name}.png").write_bytes(png(shade)["bytes"])
        (test / "tables" / f"{name}.csv").write_text("Year,Share of adults\n2019,14\n2020,\"1,550\"\n\n",
                                                     encoding="utf-8-sig")
    label = {"text": "adults", "bbox": {"x": 1, "y": 2, "w": 3, "h": 4}}
    ticks = {"values": ["2019", 2020], "bboxes": [{"x": 0, "y": 5, "w": 2, "h": 1}, {"x": 4, "y": 5, "w": 2, "h": 1}]}
    figure = {"title": {"text": "Shares", "bbox": {"x": 0, "y": 0, "w": 5, "h": 1}},
              "figure_info": {"bbox": {"x": 0, "y": 0, "w": 8, "h": 6}},
              "x_axis": {"major_labels": ticks, "label": {"text": "", "bbox": {"x": 0, "y": 0, "w": 1, "h": 1}}},
              "legend": {"items": [{"label": label}]}}
    bars = [{"name": "adults", "bboxes": [{"x": 0, "y": 1, "w": 1, "h": 4}], "x": ["2019"], "y": [14]}]
    (test / "annotations" / "two_col_1.json").write_text(json.dumps({"type": "v_bar", "models": bars,
                                                                     "general_figure_info": figure}))
    (test / "test_human.json").write_text(json.dumps([dict(imgname="two_col_1.png", query="Which year?", label="2020"),
                                                      dict(imgname="multi_2.png", query="Share?", label="62%")]))
    (test / "test_augmented.json").write_text(json.dumps([dict(imgname="two_col_1.png", query="How many in 2020?",
                                                               label="1550")]))
    return tmp_path


def test_the_release_of_chartqa_brings_its_evidence(release):
    first, second, third = load_benchmark("chartqa", source=release)
    assert [(s.id, s.kind, s.answers) for s in (first, second, third)] == [
        ("test-human-00000", "human", ("2020",)), ("test-human-00001", "human", ("62%",)),
        ("test-machine-00000", "machine", ("1550",))]
    assert first.document == third.document != second.document and second.image.getpixel((0, 0))[0] == 1
    assert first.evidence.table == (("Year", "Share of adults"), ("2019", "14"),
                                    ("2020", "1,550")) == second.evidence.table
    assert [(t.text, t.box, t.role) for t in first.evidence.texts] == [
        ("Shares", (0, 0, 5, 1), "title"), ("2019", (0, 5, 2, 6), "label"), ("2020", (4, 5, 6, 6), "label"),
        ("adults", (1, 2, 4, 6), "legend")]
    assert second.evidence.texts == () and first.evidence is third.evidence
    assert len(load_benchmark("chartqa", source=release / "ChartQA Dataset" / "test", limit=2)) == 2
    assert {s.id for s in load_benchmark("chartqa", source=release, limit=2, seed=1)} < {first.id, second.id, third.id}
    (release / "ChartQA Dataset" / "test" / "tables" / "multi_2.csv").unlink()
    assert load_benchmark("chartqa", source=release)[1].evidence is None


@pytest.mark.parametrize(
    "file, content, kind, words",
    [
        (
            "png/multi_2.png",
            None,
            FileNotFoundError,
            "question 1 of test_human.json names .*multi_2.png, which is missing",
        ),
        (
            "test_augmented.json",
            None,
            FileNotFoundError,
            "no .*test_augmented.json; expected the human and the augmented",
        ),
        (
            "test_human.json",
            '[{"imgname": "multi_2.png", "query": "?"}]',
            ValueError,
            "question 0 of test_human.json has no field label; it has imgname, query",
        ),
        ("annotations/two_col_1.json", "{", ValueError, "two_col_1.json cannot be read"),
        (
            "annotations/two_col_1.json",
            '{"text": "a", "bbox": {"x": 1}}',
            ValueError,
            "two_col_1.json cannot be read .*it has bbox, text.*expected ChartQA's annotation",
        ),
        (
            "annotations/two_col_1.json",
            '{"models": [{"text": "a", "text_bbox": {"x": 1}}]}',
            ValueError,
            "two_col_1.json cannot be read .*boxes of x, y, w, h",
        ),
        (
            "annotations/two_col_1.json",
            "[]",
            ValueError,
            "two_col_1.json cannot be read .*expected ChartQA's annotation",
        ),
        ("tables/two_col_1.csv", b"\xff\xfe\xff", ValueError, "two_col_1.csv cannot be read"),
    ],
)
def test_what_is_wrong_in_a_release_is_named(release, file, content, kind, words):
    path = release / "ChartQA Dataset" / "test" / file
    path.unlink() if content is None else path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(kind, match=words):
        load_benchmark("chartqa", source=release)


def test_a_split_that_a_release_lacks_is_named(release):
    with pytest.raises(FileNotFoundError, match="no train_human.json or train_augmented.json in .*; it has test"):
        load_benchmark("chartqa", "train", release)


def test_korean_goes_through_to_the_score(copy):
    from types import SimpleNamespace

    from sfa_core.scores.records import make_records
    reply = lambda text: SimpleNamespace(prediction=text, truncated=False, seconds=0.0, error=None)
    asked = load_benchmark("k_dtcbench", source=copy("k_dtcbench"))
    records = make_records(asked, [reply(text) for text in ("A", "정답은 B입니다", "4", "(D) 4")],
                           BENCHMARKS["k_dtcbench"].scorer)
    assert records["correct"].tolist() == [True, True, False, True]
    drawn = load_benchmark("synthetic", source="rich-ko", limit=6)
    assert any("\uac00" <= letter <= "\ud7a3" for s in drawn for letter in s.question) and all(
        s.evidence.table for s in drawn
    )
    assert make_records(drawn, [reply(s.answers[0]) for s in drawn])["correct"].all() and drawn[0].image.size == (
        448,
        448,
    )
    with pytest.raises(ValueError, match="unknown language 'xx'"):
        load_benchmark("synthetic", source="rich-xx", limit=2)


@pytest.fixture
def own(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(9)["bytes"])

    def write(*lines):
        (tmp_path / "questions.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line)
                                                            for line in lines), encoding="utf-8")
        return tmp_path
    return write


def test_own_folder_with_evidence(own):
    evidence = dict(table=[["", "May"], ["Oslo", 5]], texts=[dict(text="5", box=[1, 2, 3, 4], role="value")])
    first, second = load_benchmark("folder", source=own(
        dict(id="q", image="a.png", question="얼마?", answers="5", kind="read", evidence=evidence), "",
        dict(image="a.png", question="b?", answers=["x", 2])))
    assert first.id == "q" and first.kind == "read" and first.answers == ("5",) and first.document == second.document
    assert first.evidence.table == (("", "May"), ("Oslo", "5")) and first.evidence.texts[0].box == (1, 2, 3, 4)
    assert second.id == "line-3" and second.answers == ("x", "2") and second.evidence is None


@pytest.mark.parametrize("line, kind, words", [
    ("{", ValueError, "line 2.*JSON"), ("[1]", ValueError, "line 2.*object"),
    (dict(image="a.png", question="?"), ValueError, "line 2.*answers"),
    (dict(image="a.png", question="?", answers=[]), ValueError, "line 2.*answers"),
    (dict(image="b.png", question="?", answers="1"), FileNotFoundError, "line 2.*b.png"),
    (dict(image="../../etc/hosts", question="?", answers="1"), ValueError, "outside"),
    (dict(image="a.png", question="?", answers="1", evidence=dict(texts=[dict(text="5", box=[1, 2])])), ValueError,
     "line 2.*evidence"),
    (dict(image="a.png", question="?", answers="1", evidence=[1]), ValueError, "line 2.*evidence"),
    (dict(id="q", image="a.png", question="?", answers="1"), ValueError, "'q' occurs 2 times")])
def test_mistakes_in_an_own_folder_are_named_with_their_line(own, line, kind, words):
    with pytest.raises(kind, match=words):
        load_benchmark("folder", source=own(dict(id="q", image="a.png", question="?", answers="1"), line))


def test_a_corrupt_image_is_found_when_decoded_not_before(own):
    folder = own(dict(id="bad", image="a.png", question="?", answers="1"))
    (folder / "images" / "a.png").write_bytes(b"no image")
    sample, = load_benchmark("folder", source=folder)
    with pytest.raises(ValueError, match="bad"):
        sample.image


def test_synthetic_is_repeatable_and_has_evidence():
    one, two = load_benchmark("synthetic", limit=12), load_benchmark("synthetic", limit=12)
    assert [(s.id, s.question, s.answers) for s in one] == [(s.id, s.question, s.answers) for s in two] and all(
        s.evidence.table for s in one
    )
    assert {s.document for s in one}.isdisjoint(s.document for s in load_benchmark("synthetic", limit=12, seed=3))
    assert load_benchmark("synthetic", source="rich", limit=2)[0].image.size == (448, 448)
    many = load_benchmark("synthetic", limit=4000)
    assert len(many) == 4000 and [s.id for s in many[:12]] == [s.id for s in one], (
        "a larger limit brings more documents, the same ones first"
    )


def test_missing_pieces_of_a_copy_are_named(copy, tmp_path):
    folder = copy("chartqa")
    with pytest.raises(ValueError, match="no split 'train'.*it has test"):
        load_benchmark("chartqa", "train", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no parquet files"):
        load_benchmark("chartqa", source=tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_benchmark("chartqa", source=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no field label"):
        load_benchmark("chartqa", source=copy("ai2d", table("chartqa").remove_columns("label"), "test"))
    with pytest.raises(ValueError, match="no field image"):
        load_benchmark("k_dtcbench", source=copy("k_dtcbench", table("k_dtcbench").remove_columns("image")))


def test_hidden_answers_are_refused(copy):
    data = table("docvqa").map(lambda row: {"answers": None}, features=table("docvqa").features)
    with pytest.raises(ValueError, match="a1 has no answers|00000 has no answers"):
        load_benchmark("docvqa", "test", copy("docvqa", data, "test"))


def test_an_unreachable_hub_says_how_to_get_the_data(monkeypatch):
    tried = []

    def offline(hub, *_, **__):
        tried.append(hub)
        raise ConnectionError("offline")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError, match="hf download lmms-lab-encoder/DocVQA --repo-type dataset --local-dir "
                                                "DIR.*source=DIR"):
        load_benchmark("docvqa", limit=3)
    assert tried == ["lmms-lab-encoder/DocVQA", "lmms-lab/DocVQA"], "both names of the renamed repository"


def test_the_hub_is_asked_for_the_right_thing_and_streamed_under_a_limit(monkeypatch):
    asked = []

    def hub(name, config, split, streaming, revision):
        asked.append((name, config, split, streaming))
        return table("docvqa").to_iterable_dataset() if streaming else table("docvqa")
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert len(load_benchmark("docvqa", limit=3)) == 3 and len(load_benchmark("docvqa")) == 4
    assert len(load_benchmark("docvqa", source="me/mirror", seed=1, limit=2)) == 2
    assert asked == [("lmms-lab-encoder/DocVQA", "DocVQA", "validation", True),
                     ("lmms-lab-encoder/DocVQA", "DocVQA", "validation", False),
                     ("me/mirror", "DocVQA", "validation", False)]


@pytest.mark.parametrize("call, kind, words", [
    (lambda: load_benchmark("mmmu"), ValueError, "unknown benchmark 'mmmu'.*chartqa.*synthetic"),
    (lambda: load_benchmark("synthetic", limit=0), ValueError, "limit"),
    (lambda: load_benchmark("synthetic", "train"), ValueError, "no split 'train'"),
    (lambda: load_benchmark("folder"), FileNotFoundError, "questions.jsonl"),
    (lambda: load_benchmark("plotqa", source="/no/such"), FileNotFoundError, "qa_pairs_V2"),
    (lambda: load_benchmark("synthetic", source="fancy"), ValueError, "fancy")])
def test_bad_input_is_named(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


@settings(deadline=None)
@given(st.text(), st.lists(st.text(), min_size=1, max_size=6))
def test_options_are_read_back(question, choices):
    assert list(choices_of(with_choices(question, choices)).values()) == [" ".join(choice.split())
                                                                          for choice in choices]


def test_option_answers_are_letters_or_indexes():
    assert [option_answer(a, 4, "q") for a in ("0", "3", "b", " D ")] == ["A", "D", "B", "D"]
    with pytest.raises(ValueError, match="letter of ABCD"):
        option_answer("4", 4, "q")


def test_the_table_names_every_score_setting():
    assert set(benchmark_table()["scorer"]) == {"relaxed", "anls", "vqa", "containment", "letter", "exact"}
    assert all(row.suffix.startswith("\n") and row.tiles >= 1 for row in BENCHMARKS.values())
