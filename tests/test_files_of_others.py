"""What others wrote is read as it is meant, refused with its name, or counted: text, JSON by lines, pictures, names
of files and models."""
import ast
import inspect
import io
import json
import os
import subprocess
import sys
import threading
import warnings
from operator import attrgetter
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sfa_core.documents.benchmarks import load_benchmark
from sfa_core.core.pictures import MOST_PIXELS, TURNS, as_seen, decode, decode_page
from sfa_core.documents.samples import Sample
from sfa_core.core.escape import figure_text, html_text
from sfa_core.documents.ocr import read_ocr
from sfa_core.core.reading import MARK, answers_of, is_hub_id, json_lines

ROOT = Path(__file__).resolve().parents[1]
LINE = {"image": "a.png", "question": "?", "answers": ["1"]}
SEPARATORS = "\u2028\u2029\u0085\x1c\x0b\x0c\ufeff"

parts = attrgetter("records", "summary")  # of an evaluation


def png(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


GOOD = png(Image.new("RGB", (112, 112), "white"))


@pytest.fixture
def own(tmp_path):
    "Writes a folder of one's own with the bytes of its questions."
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(GOOD)

    def write(content):
        (tmp_path / "questions.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path
    return write


# Text, and JSON by lines

@pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "marked"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_the_line_feed_only(own, tmp_path, mark, end):
    texts = [f"one{SEPARATORS}two", "three"]
    lines = [json.dumps(LINE | {"question": text, "answers": [text]}, ensure_ascii=False) for text in texts]
    folder = own(mark + f"{lines[0]}{end}{end}{lines[1]}{end}".encode())
    asked = load_benchmark("folder", source=folder)
    assert [(s.question, s.answers, s.id) for s in asked] == [(text, (text,), f"line-{n}")
                                                              for text, n in zip(texts, (1, 3))]
    read = [json.dumps({"image": "a.png", "text": text, "box": [1, 2, 3, 4], "confidence": 1}, ensure_ascii=False)
            for text in texts]
    (tmp_path / "ocr.jsonl").write_bytes(mark + end.join(read).encode())
    assert [text.text for text in read_ocr(tmp_path / "ocr.jsonl").evidence["a.png"].texts] == texts


@pytest.mark.parametrize("encoding", ["cp949", "latin-1", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_refused_with_the_name_of_the_file(own, tmp_path, encoding):
    content = json.dumps(LINE | {"question": "é?" if encoding == "latin-1" else "얼마?"},
                         ensure_ascii=False).encode(encoding)
    with pytest.raises(ValueError, match="questions.jsonl is no UTF-8 text .*expected UTF-8"):
        load_benchmark("folder", source=own(content))
    (tmp_path / "ocr.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="ocr.jsonl is no UTF-8 text"):
        read_ocr(tmp_path / "ocr.jsonl")


# Answers

@pytest.mark.parametrize("given_, answers", [
    (0, ("0",)), (0.0, ("0.0",)), (False, ("False",)), ("0", ("0",)), ([0], ("0",)), (["a", None], ("a",)),
    ([None, 0, None], ("0",)), (-3, ("-3",))])
def test_a_number_is_an_answer_and_null_is_none(own, tmp_path, given_, answers):
    asked, = load_benchmark("folder", source=own(json.dumps(LINE | {"answers": given_})))
    assert asked.answers == answers
    write_parquet(tmp_path, given_)
    asked, = load_benchmark("chartqa", source=tmp_path / "copy")
    assert asked.answers == answers


def write_parquet(folder, answers, image=None, question="?"):
    (folder / "copy").mkdir(exist_ok=True)
    images = pa.array([image or {"bytes": GOOD, "path": None}])
    rows = pa.table({"image": images, "query": [question], "label": pa.array([answers]), "human_or_machine": ["human"]})
    pq.write_table(rows, folder / "copy" / "test-0.parquet")


@pytest.mark.parametrize("wrong, words", [
    (None, "no answers"), ([], "no answers"), ([None], "no answers"), ([None, None], "no answers"), ("", "no answers"),
    ([" "], "no answers"),
    ({"text": "5"}, "an answer is an object; expected"), ([{"text": "5"}], "an answer is an object"),
    ([["5"]], "an answer is a list"),
    ([[]], "an answer is a list")])
def test_what_is_no_answer_is_an_error_with_its_line(own, tmp_path, wrong, words):
    with pytest.raises(ValueError, match=f"line 2:? .*{words}|line 2: {words}"):
        load_benchmark("folder", source=own(json.dumps(LINE) + "\n" + json.dumps(LINE | {"answers": wrong})))
    if wrong not in ([], [[]]):
        write_parquet(tmp_path, wrong)
        with pytest.raises(ValueError, match=f"chartqa: test-00000:? .*{words}|test-00000: {words}"):
            load_benchmark("chartqa", source=tmp_path / "copy")
    (tmp_path / "release" / "test").mkdir(parents=True)
    for part in ("png", "tables"):
        (tmp_path / "release" / "test" / part).mkdir()
    (tmp_path / "release" / "test" / "png" / "a.png").write_bytes(GOOD)
    for kind in ("human", "augmented"):
        (tmp_path / "release" / "test" / f"test_{kind}.json").write_text(
            json.dumps([{"imgname": "a.png", "query": "?", "label": wrong}])
        )
    with pytest.raises(ValueError, match=f"question 0 of test_human.json.*{words}"):
        load_benchmark("chartqa", source=tmp_path / "release")


@pytest.mark.parametrize("change, words", [
    ({"question": {"en": "?"}}, "the question is an object"), ({"question": "\ud83d"}, "half of a character"),
    ({"answers": "\ud83d"}, "half of a character"),
    ({"answers": float("nan")}, "finite"), ({"answers": [1e999]}, "finite"),
    ({"image": ["a.png"]}, "the image is a list"), ({"id": []}, "the id is a list"),
    ({"evidence": {"texts": [{"text": "1", "box": [0, 0, 1, float("nan")]}]}}, "evidence"),
    ({"evidence": {"table": [[["x"]]]}}, "evidence"),
    ({"evidence": {"texts": [{"text": None, "box": [0, 0, 1, 1]}]}}, "evidence"),
    ({"evidence": {"texts": [{"text": "1", "box": "1234"}]}}, "evidence")])
def test_other_values_of_a_line_are_checked_too(own, change, words):
    with pytest.raises(ValueError, match=f"line 1: .*{words}"):
        load_benchmark("folder", source=own(json.dumps(LINE | change)))


@pytest.mark.parametrize("entry", [
    '{"image": "a", "text": "x", "box": "1234", "confidence": 1}', '{"image": "a", "text": "x", "box": {"1": 1, "2": '
                                                                   '2, "3": 3, "4": 4}, "confidence": 1}',
    '{"image": "a", "text": "x", "box": [NaN, 1, 2, 3], "confidence": 1}', '{"image": "a", "text": "x", "box": [1, 2, '
                                                                           '3, 1e999], "confidence": 1}',
    '{"image": null, "text": "x", "box": [1, 2, 3, 4], "confidence": 1}', '{"image": "a", "text": null, "box": [1, 2, '
                                                                          '3, 4], "confidence": 1}',
    '{"image": "a", "text": ["x"], "box": [1, 2, 3, 4], "confidence": 1}', '{"image": "a", "text": "x", "box": [1, 2, '
                                                                           '3, 1' + "0" * 400 + '], "confidence": 1}',
    '{"image": "a", "text": "x", "box": [1, 2, 3, 4], "confidence": NaN}', "[" * 100_000])
def test_a_text_of_ocr_that_is_none_is_named_with_its_line(tmp_path, entry):
    (tmp_path / "ocr.jsonl").write_text("\n" + entry)
    with pytest.raises(ValueError, match="ocr.jsonl line 2: .*expected image, text, box"):
        read_ocr(tmp_path / "ocr.jsonl")


anything = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                        lambda inner: st.lists(inner, max_size=3)
                        | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=5)


@settings(max_examples=300)
@given(st.one_of(st.binary(max_size=60),
                 st.text(alphabet='{}[]":,0123456789.eE-"\\\n\r\u2028\ufeffab', max_size=60).map(str.encode),
                 st.lists(anything, max_size=3).map(lambda lines: "\n".join(map(json.dumps, lines)).encode())))
def test_any_file_is_read_by_lines_or_refused_with_its_name(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    try:
        found = list(json_lines(path, "an object"))
    except ValueError as error:
        assert "fuzz.jsonl" in str(error) and "\n" not in str(error).replace(str(path), "")
    else:
        assert all(isinstance(entry, dict) for _, entry in found)


@settings(max_examples=300)
@given(st.fixed_dictionaries({},
                             optional={key: anything
                                       for key in ("image", "question", "answers", "id", "kind", "evidence", "text",
                                                   "box", "confidence")}))
def test_any_line_is_read_or_refused_with_its_number(tmp_path_factory, change):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "images" / "a.png").write_bytes(GOOD)
    (folder / "questions.jsonl").write_text(json.dumps(LINE | {"id": "first"}) + "\n" + json.dumps(LINE | change))
    try:
        first, second = load_benchmark("folder", source=folder)
        assert (
            first.answers == ("1",) and second.answers and all(isinstance(answer, str) for answer in second.answers)
        ), "no line changes another"
    except (ValueError, FileNotFoundError) as error:
        assert "line 2" in str(error) or "occurs 2 times" in str(error)
    text = {"image": "a", "text": "x", "box": [0, 0, 1, 1], "confidence": 0.7}
    (folder / "ocr.jsonl").write_text(json.dumps(text) + "\n" + json.dumps(text | change))
    try:
        assert read_ocr(folder / "ocr.jsonl").evidence["a"].texts[0].text == "x"
    except ValueError as error:
        assert "ocr.jsonl line 2" in str(error)


# Names of files

@pytest.mark.parametrize("name",
                         ["../../secret.png", "{}/secret.png", "link.png", "pipe", "/dev/zero", "a\0b", "x" * 300,
                          "loop", "."])
def test_a_row_names_no_file_outside_of_its_folder(own, tmp_path, name):
    folder, name = own(""), name.format(tmp_path)
    (tmp_path / "secret.png").write_bytes(GOOD)
    for images in (folder / "images", folder / "png"):
        images.mkdir(exist_ok=True)
        (images / "link.png").symlink_to(tmp_path / "secret.png")
        (images / "loop").symlink_to("loop")
        os.mkfifo(images / "pipe")
    own(json.dumps(LINE | {"image": name}))
    readers = [lambda: load_benchmark("folder", source=folder)]
    (folder / "val_easy_qa.json").write_text(json.dumps([{"image": name, "template_id": "t", "question": "?",
                                                          "answer": "1"}]))
    readers.append(lambda: load_benchmark("dvqa", source=folder))
    outside = Path(name) if name.startswith("/") else folder / "copy" / name
    if name not in ("link.png", "pipe", "loop", "."):  # of the copy itself
        readers.append(lambda: load_benchmark("chartqa", source=folder / "copy"))
        write_parquet(folder, "1", {"bytes": None, "path": "../secret.png" if "secret" in str(outside) else name})
    for reader in readers:
        with pytest.raises((ValueError, FileNotFoundError), match="line 1|question 0|test-00000"):
            reader()


def test_a_folder_of_images_that_is_a_link_elsewhere_is_refused(own, tmp_path):
    folder = own(json.dumps(LINE))
    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "inner").mkdir()
    (folder / "inner" / "images").symlink_to(tmp_path / "elsewhere")
    (folder / "questions.jsonl").rename(folder / "inner" / "questions.jsonl")
    with pytest.raises(ValueError, match="line 1: 'a.png' lies outside"):
        load_benchmark("folder", source=folder / "inner")


# Pictures

PAGE = Image.fromarray(np.arange(12 * 20 * 3, dtype=np.uint8).reshape(12, 20, 3) // 3 * 3).resize(
    (80, 48), Image.Resampling.NEAREST
)
BACK = {Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90}


def stored(page, orientation, kind, **options):
    "A page as a camera would store it."
    note = Image.Exif()
    note[0x0112] = orientation
    turn = TURNS.get(orientation)
    return png(page if turn is None else page.transpose(BACK.get(turn, turn)), kind, exif=note, **options)


@pytest.mark.parametrize("kind, options",
                         [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}),
                          ("JPEG", {"quality": 100, "subsampling": 0})])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_page_comes_out_upright_however_the_camera_was_held(kind, options, mode, orientation):
    page = PAGE.convert(mode)
    content = stored(page, orientation, kind, **options)
    seen = decode(content, "page")
    close = 12 if kind == "JPEG" else 0
    assert (
        seen.size == page.size and np.abs(np.asarray(seen).astype(int) - np.asarray(page.convert("RGB"))).max() <= close
    )
    with Image.open(io.BytesIO(content)) as opened:
        assert as_seen(opened).tobytes() == seen.tobytes() and as_seen(as_seen(opened)).tobytes() == seen.tobytes(), (
            "a PIL image too, and once only"
        )


def test_a_damaged_exif_block_costs_nothing():
    whole = png(PAGE, "JPEG", exif=b"Exif\0\0II*\0")
    assert decode(whole, "page").size == PAGE.size


@pytest.mark.parametrize("kind, count", [("TIFF", 3), ("GIF", 2), ("WEBP", 2)])
def test_further_pages_are_left_out_and_it_is_said(kind, count):
    pages = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")[:count]]
    content = png(pages[0], kind, save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match=f"page 7: a {kind} of {count} pages; only the first is used"):
        seen = decode(content, "page 7")
    red = np.asarray(seen)[10, 10]
    assert red[0] > 200 and red[1] < 60, "the first"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(png(pages[0], kind), "one page says nothing")


def test_no_other_program_is_started_and_no_size_is_too_much():
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n{} loop\nshowpage\n%%EOF\n",
                    png(PAGE, "PPM"), png(PAGE, "PDF")):
        with pytest.raises(ValueError, match="page 7: the image cannot be decoded"):
            decode(content, "page 7")
    side = int(MOST_PIXELS**0.5) + 2
    with pytest.raises(ValueError, match="page 7: the image cannot be decoded .*bomb"):
        decode(png(Image.new("1", (side, side))), "page 7")
    assert decode(png(Image.new("1", (side, 3))), "long").size == (side, 3)


@settings(max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
       st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
       st.integers(0, 400))
def test_any_damaged_picture_is_decoded_or_refused_with_its_name(kind, changes, cut):
    content = bytearray(png(PAGE, kind))
    for place, value in changes:
        content[place % len(content)] = value
    done = []

    def read():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                done.append(decode_page(bytes(content[: len(content) - cut]), "page 7")[0].mode == "RGB")
            except ValueError as error:
                done.append("page 7" in str(error))
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(60)
    assert done == [True]


# Names of models and data sets

@pytest.mark.parametrize("name",
                         ["데이터/문서", "my--pages/set", "./model", "../a", "a/b/c", "~/model", "~nosuchuser/x",
                          "owner/na me", "owner/..", "text",
                                  "a\0/b", "what is it?", "x" * 5000, "tests/model", "owner/name.git", "-a/b", "a/b/",
                                  "/a/b", "a\\b/c"])
def test_a_path_or_a_text_is_never_asked_of_the_hub(name, monkeypatch):
    import datasets
    import sfa_core.core.hub
    import sfa_core.models.load
    from sfa_core.models.load import find_model

    def asked(*given_, **options):
        raise AssertionError(f"the hub was asked for {given_}")
    monkeypatch.chdir(ROOT)
    for library, function in ((sfa_core.models.load, "snapshot_download"),
                              (sfa_core.core.hub, "HfApi"), (datasets, "load_dataset")):
        monkeypatch.setattr(library, function, asked)
    assert not is_hub_id(name)
    with pytest.raises(FileNotFoundError, match="no model folder") as error:
        find_model(name)
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_benchmark("chartqa", source=name)


@pytest.mark.parametrize("name",
                         ["OpenGVLab/InternVL3_5-1B-HF", "echo840/OCRBench", "llava-hf/llava-onevision-qwen2-7b-ov-hf",
                          "a/b@0123abcd", "a/b@refs/pr/1",
                                  "me/set_v1.0"])
def test_hub_ids_are_hub_ids(name):
    assert is_hub_id(name)


def test_a_home_that_cannot_be_written_is_one_line_that_names_the_variable(tmp_path):
    write_parquet(tmp_path, "1")
    code = ("import sys\nfrom sfa_core.documents.benchmarks import load_benchmark\ntry:\n    load_benchmark('chartqa', "
            "source=sys.argv[1])\n"
            "except (ValueError, FileNotFoundError) as error:\n    print('said:', error)")
    given_ = {key: value for key, value in os.environ.items()
              if not key.startswith(("HF_", "XDG_"))} | {"HOME": "/proc/nobody", "HF_HUB_OFFLINE": "1"}

    def said(source, **more):
        done = subprocess.run([sys.executable, "-c", code, source], env=given_ | more, capture_output=True, text=True,
                              cwd=ROOT)
        assert done.returncode == 0, done.stderr[-500:]
        return [line for line in done.stdout.splitlines() if line.startswith("said:")]
    line, = said("me/none")
    assert "set HF_HOME to a folder" in line and "/proc/nobody" in line
    line, = said("me/none", HF_HOME=str(tmp_path / "hf"))
    assert "HF_HOME" not in line and "me/none" in line
    assert said(str(tmp_path / "copy")) == [], "a local copy is read without a cache"


# Text in figures and pages

HOSTILE = "a <b &lt; <i>x</i> $y$ %{q}"


def texts_of(value):
    "All texts of a figure, wherever they stand."
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | np.ndarray):
        for entry in value:
            yield from texts_of(entry)


def figures():
    import pandas as pd
    from sfa_core.figures.attention import attention_frames, entropy_violins
    from sfa_core.figures.binding import rate_points, stage_panels
    from sfa_core.figures.density import cross_architecture, density_gallery, motivation
    from sfa_core.figures.charts import (
        architecture,
        attention_maps,
        difference_forest,
        document_gallery,
        entropy_by_layer,
        head_grid,
        score_by_kind,
    )
    from sfa_core.figures.charts import structural_bias, training_loss
    from sfa_core.figures.learning import learning_curves
    from sfa_core.figures.sinks import place_shares, sink_scatter, visual_sinks
    from sfa_core.figures.style import in_style
    from sfa_core.figures.tokens import cost_curves, reducer_choice
    from sfa_core.figures.verdicts import CLASS_COLOURS, taxonomy_bars, ungrounded_forest, verdict_gallery
    from sfa_core.runs.report import rate_figure

    page, grid, name, words = np.full((20, 30, 3), 255,
                                      np.uint8), np.full((2, 3), 0.1), HOSTILE, dict(title=HOSTILE, subtitle=HOSTILE)
    rates = pd.DataFrame({"kind": [name], "n": [4], "rate": [0.5], "low": [0.2], "high": [0.8]})
    changes = pd.DataFrame({"name": [name], "model": [name], "encoder": [name], "arm": [name], "difference": [0.1],
                            "low": [0.0], "high": [0.2], "n": [4]})
    places = pd.DataFrame([dict(place=name, sinks=1, share_sinks=0.5, tokens=4, share_all=0.2, enrichment=2.0, low=1.0,
                                high=3.0)])
    parts = pd.DataFrame([dict(part=name, detail=name, parameters=5, trained=True, within="")])
    bands = {name: pd.DataFrame([dict(step=s, measure=name, seeds=1, mean=0.5, low=0.4, high=0.6) for s in (1, 2)])}
    tokens = pd.DataFrame({"value": [1.0, 3.0], name: [0.1, 0.2], "sink": [False, True]})
    stages = pd.DataFrame([dict(panel=name, line=name, stage=name, name=name, value=0.5, low=0.4, high=0.6, n=4)])
    regions = pd.DataFrame([dict(layer=0, head=0, region=region, value=0.5) for region in ("text-dense", "sparse")])
    effects = pd.DataFrame([dict(layer=0, head=0, effect=0.1, effect_low=0.0, effect_high=0.2, n=4)])
    reducers = pd.DataFrame([{"class": name, "method": method, "share": 0.5, "rate": 0.5, "low": 0.2, "high": 0.8,
                              "n": 4, "ms": 1.0} for method in ("full", name)])
    share = dict(count=1, n=4, rate=0.2, low=0.1, high=0.3)
    reports = {name: dict(classes=dict.fromkeys(CLASS_COLOURS, share), ungrounded=share, floor=0.1)}
    asked = Sample("q", "d", "read", name, (name,), png(Image.fromarray(page)))
    verdict = pd.DataFrame([dict(id="q", subclass=name, category=name, question=name, answers=[name], prediction=name,
                                 reason=name, rule=name, places=())])
    cells = pd.DataFrame([{"name": name, "right": 0.5, "95 % over seeds": "—", "seeds": 1}])
    seeds = rates.assign(name=name, arm=name, run=name)
    return {
        "violins": entropy_violins(regions, effects, unit=name, **words),
        "layers": entropy_by_layer(pd.DataFrame(dict(layer=[0], group=[name], entropy=[1.0])), **words),
        "stages": stage_panels(stages, unit=name, **words), "points": rate_points(stages, unit=name, **words),
        "motivation": motivation(page, grid, np.ones((1, 4)), np.ones((1, 4)), **words),
        "visual sinks": visual_sinks(page, grid, grid > 1, grid, grid, **words),
        "bars": taxonomy_bars(reports, **words), "ungrounded": ungrounded_forest(reports, **words),
        "verdicts": verdict_gallery({"q": asked}, verdict, name), "report": rate_figure(cells, seeds),
        "in_style": in_style(go.Figure(), name, name), "gallery": document_gallery([page], [name], **words),
        "scores": score_by_kind({name: rates}, **words),
        "forest": difference_forest(changes, better=name, **words),
        "loss": training_loss({name: pd.DataFrame({"step": [1, 2], "loss": [2.0, 1.0]})}, **words),
        "maps": attention_maps(page, {name: grid}, **words), "bias": structural_bias({name: grid}, (0, 0), **words),
        "heads": head_grid(grid, name, name, name),
        "architecture": architecture(parts, **words),
        "density": density_gallery([page], [grid], [grid], [name], **words),
        "cross": cross_architecture(changes, **words), "learning": learning_curves(bands, [name], unit=name, **words),
        "places": place_shares(places, **words),
        "scatter": sink_scatter(tokens, 2.0, name, **words),
        "reducers": reducer_choice(reducers, **words),
        "costs": cost_curves(rates.assign(method=name, encoder_tokens=5), **words),
        "frames": attention_frames(page, {name: {name: grid}}, what=name, **words)}


NO_TEXT = {  # figures whose texts are the module's own, or that are made of a model
    "dose_response": "a check of a trained arm: test_structure_check", "detectable_effects": "numbers alone",
    "view_figure": "a model that looks at a page: test_lab, test_explorer"}


def test_no_figure_is_left_out():
    "The functions that return a figure, the gallery of every study among them."
    made = {node.name for path in (ROOT / "sfa_core" / "figures").glob("*.py")
            for node in ast.parse(path.read_text("utf-8")).body
            if isinstance(node, ast.FunctionDef) and node.returns is not None
            and ast.unparse(node.returns) == "go.Figure"}
    called = {node.func.id for node in ast.walk(ast.parse(inspect.getsource(figures)))
              if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert made - called == set(NO_TEXT)


def test_every_text_that_is_given_to_a_figure_is_shown_as_it_is():
    plain = figure_text(HOSTILE)
    assert (
        plain == "a &lt;b &amp;lt; &lt;i&gt;x&lt;/i&gt; &#36;y&#36; &#37;{q}"
        and html_text("<b title='x'>") == "&lt;b title=&#x27;x&#x27;&gt;"
    )
    shown_in_html = ("legendgroup", "offsetgroup")  # names for the program, never drawn
    for name, figure in figures().items():
        content = figure.to_plotly_json()
        for trace in content["data"]:
            for key in shown_in_html:
                trace.pop(key, None)
        for slider in content["layout"].get("sliders", ()):
            for step in slider["steps"]:
                step.pop("args")  # the name of a frame
        drawn = [text for part in (content["data"], content["layout"])
                 for text in texts_of(part) if "a <b" in text or "a &lt;b" in text or "<i>" in text]
        assert drawn and not [
            text for text in drawn if "<b &" in text or "<i>" in text or "$y" in text or "%{q" in text
        ], name


def test_no_widget_of_html_gets_text_that_is_not_escaped():
    "The explorer's notes hold replies, names of arms and errors."
    for module in ("figures/explorer", "figures/verdicts"):
        for node in ast.walk(ast.parse((ROOT / "sfa_core" / f"{module}.py").read_text("utf-8"))):
            target = (
                node.targets[0]
                if isinstance(node, ast.Assign)
                else node.target
                if isinstance(node, ast.AugAssign)
                else None
            )
            html = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "HTML"
            notes = (
                isinstance(target, ast.Attribute)
                and target.attr == "value"
                and getattr(target.value, "attr", "") in ("notes", "text")
            )
            for value in (node.args if html else [node.value] if notes else []):
                for part in ast.walk(value):
                    if isinstance(part, ast.FormattedValue):
                        call = part.value
                        escaped = isinstance(call, ast.Call) and getattr(call.func, "id", "") == "html_text"
                        # escaped where it is made; a name of ours
                        safe = escaped or isinstance(call, ast.Name) and call.id in ("said", "name")
                        assert safe, f"{module}.py line {part.lineno}: {ast.unparse(part.value)}"


ODD = {
    "corrupt": GOOD[:60] + bytes(40) + GOOD[90:], "empty": b"", "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n{} loop\n",
    "text": b"<html></html>",
    "long": png(Image.new("RGB", (3000, 10), "white")), "tall": png(Image.new("RGB", (1, 4000), "white")),
    "bomb": png(Image.new("1", (9000, 9000)))}
SOUND = {"turned": stored(PAGE, 6, "JPEG"), "pages": png(PAGE, "TIFF", save_all=True, append_images=[PAGE]),
         "grey": png(PAGE.convert("L"))}


@pytest.mark.parametrize("model", ["qwen2_5_vl", "embedded"])
def test_odd_images_among_200_questions_cost_only_their_own_answers(own, model):
    from sfa_core.models.evaluate import evaluate
    from sfa_core.models.miniatures import miniature
    from sfa_core.models.load import load_model

    bundle = load_model("embedded", placement="cpu") if model == "embedded" else miniature(model, seed=2, spread=0.3)
    rng = np.random.default_rng(0)
    files = {f"good{i}": png(Image.fromarray(rng.integers(0, 256, (56, 56 + 28 * (i % 3), 3), dtype=np.uint8)))
             for i in range(12)} | SOUND
    refused = {name for name in ODD if model != "embedded" or name not in ("long", "tall")}
    places = [*(list(files) * 14)[:179], *(list(ODD) * 3)]
    places = [places[i] for i in rng.permutation(200)]
    folder = own("\n".join(json.dumps({"id": f"q{n}", "image": f"{name}.png", "question": f"value {n}?",
                                       "answers": [n]}) for n, name in enumerate(places)))
    for name, content in (files | ODD).items():
        (folder / "images" / f"{name}.png").write_bytes(content)
    asked = load_benchmark("folder", source=folder)
    good = [sample for sample, name in zip(asked, places) if name not in refused]
    options = dict(max_new_tokens=3, batch_size=16, draws=10)
    records, summary = parts(evaluate(bundle, asked, "folder", **options))
    alone, without = parts(evaluate(bundle, good, "folder", **options))
    errors = records.set_index("id")["error"]
    assert (summary["asked"], summary["n"], summary["errors"]) == (200, len(good), 200 - len(good)) and without[
        "errors"
    ] == 0
    answered = records[records["error"] == ""]
    assert dict(zip(answered["id"], answered["prediction"])) == dict(zip(alone["id"], alone["prediction"])) and len(
        answered
    ) == len(good)
    for sample, name in zip(asked, places):
        assert (errors[sample.id] != "") == (name in refused), name
        assert name not in refused or any(
            why in errors[sample.id] for why in ("cannot be decoded", "cannot take an image of")
        )
    assert summary["notes"] and all("of 2 pages; only the first is used" in note for note in summary["notes"])


def test_a_shape_that_a_family_cannot_take_is_named_in_training_and_in_records():
    from sfa_core.models.sequences import training_batch
    from sfa_core.models.miniatures import miniature
    from sfa_core.attention.probes import record

    for family in ("qwen2_5_vl", "qwen3_vl"):
        bundle, page = miniature(family, seed=2, spread=0.3), Sample("long/1", "long", "k", "?", ("1",), ODD["long"])
        for call in (training_batch, record):
            with pytest.raises(ValueError,
                               match="long.*cannot take an image of 3,000 x 10 px .*expected another shape"):
                call(bundle, [page])


def test_an_answer_is_what_a_reader_says_it_is():
    assert answers_of(np.array(["a", "b"]), "row 1") == ["a", "b"]
    with pytest.raises(ValueError, match="row 1: an answer is bytes"):
        answers_of(b"x", "row 1")
    assert Sample("i", "d", "k", "?", ("1",), GOOD).image.size == (112, 112)
