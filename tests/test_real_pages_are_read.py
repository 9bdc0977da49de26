"""Pages and texts that others made: receipts, charts that cannot answer, releases with parts missing, and OCR that a
kill in the middle costs one page."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfa_core.documents.benchmarks import load_benchmark
from sfa_core.documents.generate import documents
from sfa_core.documents.ocr import (
    more_confident, ocr_folder, page_lines, rapid_ocr, read_ocr, read_twice, whole_pages, with_ocr,
)
from sfa_core.documents.pages import with_pages
from sfa_core.documents.samples import Sample, TextBox, samples
from sfa_core.runs.commands import main


def picture(path, size=(40, 30), color="white"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode() if isinstance(content, str)
                     else json.dumps(content).encode())
    return path


# Receipts

@pytest.fixture
def receipts(tmp_path):
    for name in ("012", "400"):
        picture(tmp_path / "img" / f"{name}.jpg")
        write(tmp_path / "key" / f"{name}.json", {"company": f"SHOP {name}", "date": "22/12/2017", "total": 15.5})
    write(tmp_path / "box" / "012.csv", "1,2,9,2,9,8,1,8,TEA, COFFEE & CO.\r\n\r\n1,20,9,20,9,28,1,28,RM 15.50\r\n")
    return tmp_path


def test_a_receipt_becomes_questions_about_the_fields_that_it_has(receipts):
    asked = load_benchmark("sroie", source=receipts)
    assert [s.id for s in asked] == [f"{n}-{field}" for n in ("012", "400") for field in ("company", "date", "total")]
    assert asked[2].answers == ("15.5",) and asked[0].image.size == (40, 30) and asked[0].document == "012.jpg"
    assert asked[0].evidence.texts == (TextBox("TEA, COFFEE & CO.", (1, 2, 9, 8)), TextBox("RM 15.50", (1, 20, 9, 28)))
    assert asked[3].evidence is None  # a receipt without its lines


def test_receipts_of_the_first_release_are_text_files(receipts):
    (receipts / "key" / "012.json").rename(receipts / "key" / "012.txt")
    (receipts / "box" / "012.csv").rename(receipts / "box" / "012.txt")
    assert len(load_benchmark("sroie", source=receipts)[0].evidence.texts) == 2


@pytest.mark.parametrize("name, content, words", [
    ("box/012.csv", "1,2,9,2,9,8,1,TEA", "012.csv line 1: 8 parts; expected four corners and a text"),
    ("box/012.csv", "1,2,9,2,9,8,1,nan,TEA", "012.csv line 1: a box .* finite"),
    ("box/012.csv", b"1,2,9,2,9,8,1,8,caf\xe9", "012.csv is no UTF-8 text"),
    ("key/012.json", "[]", "012.json has none of the fields company, date"),
    ("key/012.json", "{", "012.json: no JSON"), ("key/012.json", {"total": []}, "the total is a list")])
def test_a_receipt_that_cannot_be_read_is_named(receipts, name, content, words):
    write(receipts / name, content)
    with pytest.raises(ValueError, match=words):
        load_benchmark("sroie", source=receipts)


def test_a_receipt_without_its_picture_and_a_folder_without_receipts_are_named(receipts, tmp_path_factory):
    (receipts / "img" / "400.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="receipt 400 has no picture; expected .*400.jpg"):
        load_benchmark("sroie", source=receipts)
    with pytest.raises(FileNotFoundError, match="expected folders img, box and key"):
        load_benchmark("sroie", source=tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize("part", ["img/012.jpg", "box/012.csv", "key/012.json"])
def test_nothing_of_a_receipt_lies_outside_of_its_folder(receipts, tmp_path_factory, part):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "file"
    (receipts / part).rename(elsewhere)
    (receipts / part).symlink_to(elsewhere)
    with pytest.raises(ValueError, match="lies outside"):
        load_benchmark("sroie", source=receipts)


# Charts that cannot answer

def unanswerable(folder, **change):
    kinds = ("inexist", "contra", "irrel", "normal")
    picture(folder / "images" / "20.jpg")
    entries = {f"20_{n}": {"figure_id": 20, "figure_path": "images/20.jpg", "subq_idx": n, "q_type": "desc",
                           "q_relation": kind, "question": f"How {kind}?", "ref_answer": f"It is {kind}."}
               for n, kind in enumerate(kinds)}
    entries["20_1"] |= change
    write(folder / "charthal.json", {name: {k: v for k, v in entry.items() if v != "gone"}
                                     for name, entry in entries.items()})
    return folder


def test_the_relation_of_question_and_chart_is_the_kind(tmp_path):
    asked = load_benchmark("charthal", source=unanswerable(tmp_path))
    assert [(s.kind, s.answers[0], s.document) for s in asked] == [
        (kind, f"It is {kind}.", "20.jpg") for kind in ("inexist", "contra", "irrel", "normal")]
    assert [s.id for s in load_benchmark("charthal", "contra", source=tmp_path)] == ["20_1"]
    with pytest.raises(ValueError, match="no split 'test', expected all or one of inexist"):
        load_benchmark("charthal", "test", source=tmp_path)


def test_questions_without_an_expected_answer_are_counted(tmp_path, capsys):
    assert len(load_benchmark("charthal", source=unanswerable(tmp_path, ref_answer=""))) == 3
    assert "1 of 4 questions have no expected answer" in "".join(capsys.readouterr())


@pytest.mark.parametrize("change, words", [
    (dict(q_relation="other"), "question 20_1 has the relation 'other'"),
    (dict(question="gone"), "has no field question"), (dict(figure_path="../../etc/passwd"), "lies outside"),
    (dict(figure_path=None), "the image is null"), (dict(question=["?"]), "the question is a list")])
def test_a_question_that_cannot_be_read_is_named(tmp_path, change, words):
    with pytest.raises(ValueError, match=words):
        load_benchmark("charthal", source=unanswerable(tmp_path, **change))


# Releases with parts missing

ASKED = [Sample(str(n), name, "human", "?", ("1",), b"") for n, name in enumerate(("a.png", "b.png", "b.png", "c.png"))]


def test_a_release_need_not_be_whole(tmp_path):
    for name in ("a", "b"):
        picture(tmp_path / "test" / "png" / f"{name}.png")
    write(tmp_path / "test" / "tables" / "a.csv", "Year,Share\n2019,14\n")
    for part in ("human", "augmented"):
        write(tmp_path / "test" / f"test_{part}.json", [dict(imgname="a.png", query="?", label="1"),
                                                        dict(imgname="b.png", query="?", label="2")])
    asked = load_benchmark("chartqa", source=tmp_path)
    assert [s.evidence is None for s in asked] == [False, True] * 2 and asked[0].evidence.table[1] == ("2019", "14")
    found = with_pages(ASKED, tmp_path)
    assert found[1:] == (2, 1, 1, 1) and found.samples[0].evidence.table and found.samples[1].evidence is None
    assert found.samples[1].image.size == (40, 30) and found.samples[3].source == b""
    assert "2 of 3 pages found, 1 with a table" in repr(found) and "1 of 4 questions are without" in repr(found)
    for place in ("test", "test/png"):
        assert with_pages(ASKED, tmp_path / place).pages == 2


def test_evidence_that_is_there_stays_where_a_page_brings_none(tmp_path):
    picture(tmp_path / "a.png")
    own = samples(documents(1, 3))[0].evidence
    asked = [Sample("1", "a.png", "human", "?", ("1",), b"", own)]
    assert with_pages(asked, tmp_path).samples[0].evidence == own


def test_a_folder_of_other_pages_is_one_line(tmp_path):
    picture(tmp_path / "z.png")
    with pytest.raises(ValueError, match=r"none of the pages of the questions \(3 such as 'a.png'\); its pictures are "
                                         r"1 such as 'z.png'"):
        with_pages(ASKED, tmp_path)
    with pytest.raises(ValueError, match="holds no pictures"):
        with_pages(ASKED, write(tmp_path / "empty" / "a.txt", "").parent)
    with pytest.raises(FileNotFoundError, match="no folder"):
        with_pages(ASKED, tmp_path / "nowhere")


def test_two_pictures_of_one_name_and_one_elsewhere_are_refused(tmp_path, tmp_path_factory):
    for split in ("train", "test"):
        picture(tmp_path / split / "a.png")
    with pytest.raises(ValueError, match="2 pictures named a.png"):
        with_pages(ASKED, tmp_path)
    elsewhere = picture(tmp_path_factory.mktemp("elsewhere") / "a.png")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.png").symlink_to(elsewhere)
    with pytest.raises(ValueError, match="lies outside"):
        with_pages(ASKED, tmp_path / "own")


# OCR

def engine(page):
    "Read the shade of a page as a text, and none from a black one."
    shade = int(page[..., 0].mean())
    return [(f"값 {shade}", [[0, 0], [40, 0], [40, 30], [0, 30]], 0.9), ("x", [0, 0, 1, 1], 0.2)] if shade else []


@pytest.fixture
def shades(tmp_path):
    for shade in range(6):
        picture(tmp_path / "pages" / f"{shade}.png", color=(0, 0, shade))
    return tmp_path / "pages"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_real_pages_are_read import engine
from sfa_core.documents.ocr import ocr_folder
def killed(page):
    if int(page[..., 0].mean()) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return engine(page)
ocr_folder({folder!r}, engine=killed, progress=False)
"""


def test_a_kill_in_the_middle_loses_nothing(shades, tmp_path):
    whole = ocr_folder(shades, tmp_path / "whole.jsonl", engine=engine, progress=False).file.read_text()
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(shades))
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    file, part = tmp_path / "pages.ocr.jsonl", tmp_path / ".pages.ocr.jsonl.part"
    assert not file.exists() and len(part.read_text().splitlines()) == 7
    read = []
    run = ocr_folder(shades, engine=lambda page: read.append(1) or engine(page), progress=False)
    assert file.read_text() == whole and not part.exists() and len(read) == run.new == 3 and run.pages == 6
    assert ocr_folder(shades, engine=engine, progress=False).new == 0 and file.read_text() == whole
    found = read_ocr(file)
    assert set(found.evidence) == {f"{n}.png" for n in range(6)} and not found.evidence["0.png"].texts
    assert found.evidence["3.png"].texts == (TextBox("값 3", (0, 0, 40, 30), "ocr"),)


@pytest.mark.parametrize("cut", [1, 40, 41, 42, 43, 100])
def test_a_result_cut_anywhere_keeps_whole_pages_only(shades, cut):
    pages = [page_lines(f"{n}.png", shades / f"{n}.png", engine) for n in (1, 2, 3)]
    content = "".join(pages).encode()
    assert whole_pages(content[:-cut]) in ("", pages[0], "".join(pages[:2])) and whole_pages(b"") == ""
    assert whole_pages(content) == "".join(pages[:2])


def test_new_pages_are_added_and_damaged_ones_are_named_and_tried_again(shades, tmp_path, capsys):
    (shades / "9.png").write_bytes(b"no picture")
    run = ocr_folder(shades, engine=engine, progress=False)
    assert (run.pages, run.new) == (6, 6) and "9.png: the image cannot be decoded" in repr(run)
    picture(shades / "9.png", color=(0, 0, 9))
    run = ocr_folder(shades, engine=engine, progress=False)
    assert (run.pages, run.new, run.failed) == (7, 1, {}) and len(read_ocr(run.file).evidence) == 7


def test_a_second_reading_at_twice_the_size_adds_what_was_missed_and_keeps_the_surer_text(shades, tmp_path):
    def sizes(page):
        k = 1 if page.shape[:2] == (30, 40) else 2
        yield ("Os1o" if k == 1 else "Oslo"), [[0, 0], [20 * k, 0], [20 * k, 9 * k], [0, 9 * k]], 0.5 + k / 10
        if k == 2:
            yield "42", [[60, 40], [78, 40], [78, 58], [60, 58]], 0.9

    once, twice = (ocr_folder(shades, tmp_path / f"{name}.jsonl", engine=engine, progress=False).file
                   for name, engine in (("once", sizes), ("twice", read_twice(sizes, lambda found: True))))
    texts = lambda file: {(t.text, t.box) for t in read_ocr(file).evidence["3.png"].texts}
    assert texts(once) == {("Os1o", (0, 0, 20, 9))}
    assert texts(twice) == {("Oslo", (0, 0, 20, 9)), ("42", (30, 20, 39, 29))}
    asked = []
    read_twice(sizes, lambda found: asked.append(found) or False)(np.zeros((30, 40, 3), np.uint8))
    assert [t.text for t in asked[0].texts] == ["Os1o"] and more_confident([]) == []


def test_the_texts_of_other_pages_are_one_line(shades, tmp_path):
    file = ocr_folder(shades, engine=engine, progress=False).file
    with pytest.raises(ValueError, match=r"none of the pages of the questions \(3 such as 'a.png'\); its own are 6"):
        with_ocr(ASKED, file)
    asked, without = with_ocr([*ASKED, Sample("9", "3.png", "human", "?", ("1",), b"")], file)
    assert without == 4 and asked[4].evidence.texts[0].text == "값 3"


def test_a_folder_that_cannot_be_read_ends_with_one_line(shades, tmp_path, capsys):
    picture(shades / "below" / "1.png")
    assert main(["ocr", str(shades)]) == 2 and "2 pictures named 1.png" in capsys.readouterr().err
    assert main(["ocr", str(tmp_path / "nowhere")]) == 2 and "no folder" in capsys.readouterr().err


def test_without_the_extra_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match=r"expected the extra: pip install '.\[ocr\]'"):
        rapid_ocr()


@pytest.mark.skipif(importlib.util.find_spec("rapidocr") is None,
                    reason="the extra ocr is not installed: pip install '.[ocr]'")
def test_a_page_is_read_by_the_engine_of_the_extra(tmp_path, capsys):
    [page] = samples(documents(1, 5, preset="rich", kinds=("bar",)))[:1]
    page.image.resize((page.image.width * 3, page.image.height * 3)).save(picture(tmp_path / "pages" / "1.png"))
    assert main(["ocr", str(tmp_path / "pages"), "--out", str(tmp_path / "own.jsonl")]) == 0
    assert "1 pages, 1 of them new" in capsys.readouterr().out
    read = read_ocr(tmp_path / "own.jsonl").evidence["1.png"].texts
    printed = {text.text for text in page.evidence.texts}
    assert len(printed & {text.text for text in read}) >= len(printed) / 2, (printed, read)
    found = {text.text: text.box for text in read}
    known = {text.text: text.box for text in page.evidence.texts}
    for text in printed & set(found):
        middle = [(found[text][i] + found[text][i + 2]) / 6 for i in (0, 1)]
        if sum(other.text == text for other in page.evidence.texts) == 1:
            assert all(known[text][i] - 3 <= middle[i] <= known[text][i + 2] + 3 for i in (0, 1))
    assert os.listdir(tmp_path / "pages") == ["1.png"]
