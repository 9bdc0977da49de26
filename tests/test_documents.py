"""Generated documents: boxes hold all ink, answers follow from the table, seeds are disjoint, bad requests are
refused."""
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfa_core.documents.generate import PRESET_KINDS, PRESETS, SMALLEST, documents, make_document
from sfa_core.core.pictures import decode
from sfa_core.documents.samples import Sample, samples
from sfa_core.documents.drawing import Text, paint, text_box
from sfa_core.documents.questions import DOCUMENT_KINDS, KINDS, READ_KINDS, YES_NO

anywhere = dict(kind=st.sampled_from(DOCUMENT_KINDS), seed=st.integers(0, 10**6),
                preset=st.sampled_from(sorted(PRESETS)),
                language=st.sampled_from(["en", "ko"]))


def drawn(kind, seed, size, language, preset):
    "A document of a preset, of a kind and at a size that the preset has."
    able = kind if preset == "embedded" or kind in PRESET_KINDS[preset] else PRESET_KINDS[preset][0]
    return make_document(able, seed, max(size, SMALLEST[preset]), language, preset)


@settings(max_examples=60, deadline=None)
@given(**anywhere, size=st.sampled_from([112, 160, 224]))
def test_all_ink_of_a_text_lies_in_its_box_and_on_the_page(kind, seed, preset, language, size):
    sheet = drawn(kind, seed, size, language, preset).sheet
    size = sheet.style.size
    for placed in sheet.texts:
        x0, y0, x1, y1 = text_box(placed.item)
        assert 0 <= x0 < x1 <= size and 0 <= y0 < y1 <= size, placed
        page = paint([Text(**{**vars(placed.item), "colour": (0, 0, 0)})], (size, size))
        inked = (page < 255).any(2)
        assert inked.any() and inked.sum() == inked[y0:y1, x0:x1].sum()
        assert inked[y0].any() and inked[y1 - 1].any() and inked[:, x0].any() and inked[:, x1 - 1].any(), (
            "the box is tight"
        )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_an_image_of_any_mode_is_read_as_it_looks(mode):
    "White paper, a black mark, a grey mark; transparent paper counts as white."
    grey = np.full((8, 8), 255, np.uint8)
    grey[2:4], grey[5:7] = 0, 0 if mode == "1" else 128
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    elif mode in ("LA", "RGBA"):
        ink = grey < 255
        image = Image.merge("LA",
                            [Image.fromarray(np.where(ink, values, 0).astype(np.uint8)) for values in (grey, 255)])
        image = image.convert(mode)
    else:
        image = Image.fromarray(grey).convert(mode if mode in ("L", "P", "1") else "RGB").convert(mode)
    stream = io.BytesIO()
    image.save(stream, "TIFF")
    for seen in (decode(image, "x"), decode(stream.getvalue(), "x")):
        assert seen.mode == "RGB" and np.abs(np.asarray(seen).astype(int) - grey[..., None]).max() <= 1


def numbers(row):
    "The table of a dataset row as numbers, by label and series."
    clean = lambda cell: float(cell.replace(",", "").rstrip("%"))
    return {line[0]: {name: clean(cell) for name, cell in zip(row["table"][0][1:], line[1:])}
            for line in row["table"][1:]}


@settings(max_examples=80, deadline=None)
@given(**anywhere)
def test_answers_follow_from_the_table_alone(kind, seed, preset, language):
    document = drawn(kind, seed, 112, language, preset)
    row, table = document.row(), numbers(document.row())
    everything = [v for line in table.values() for v in line.values()]
    value = lambda answer: float(answer.replace(",", "").rstrip("%"))
    assert row["questions"] and {q["kind"] for q in row["questions"]} <= set(KINDS)
    for asked, kept in zip(document.questions, row["questions"]):
        cells = [list(table[document.content.rows[r]].values())[c] for r, c in asked.cells]
        answer = kept["answers"][0]
        if kept["kind"] in (*READ_KINDS, "estimate"):
            assert value(answer) == cells[0] and len(cells) == 1
            named = document.content.rows[asked.cells[0][0]]
            assert named in kept["question"] or kept["kind"] == "read_colour"
        elif kept["kind"] in ("max", "min"):
            assert value(answer) == {"max": max, "min": min}[kept["kind"]](everything)
        elif kept["kind"] in ("argmax", "argmin"):
            column = list(table[answer])[asked.cells[0][1]]
            best = {"argmax": max, "argmin": min}[kept["kind"]](line[column] for line in table.values())
            assert {label for label, line in table.items() if line[column] == best} == set(kept["answers"])
        elif kept["kind"] in ("difference", "sum"):
            wanted = abs(cells[0] - cells[1]) if kept["kind"] == "difference" else cells[0] + cells[1]
            assert value(answer) == pytest.approx(wanted, abs=1e-9)
        elif kept["kind"] == "compare":
            assert answer == YES_NO[language][0 if cells[0] > cells[1] else 1]
        elif kept["kind"] == "count":
            assert 0 <= int(answer) <= len(everything) == len(cells)
        elif kept["kind"] == "colour":
            assert answer and len(kept["answers"]) == 1
        else:
            assert kept["kind"] == "transcribe" and all(cell in answer for line in row["table"][1:] for cell in line)


@settings(max_examples=40, deadline=None)
@given(**anywhere)
def test_evidence_points_at_the_printed_value(kind, seed, preset, language):
    row = drawn(kind, seed, 112, language, preset).row()
    for q in row["questions"]:
        texts = [row["texts"][i] for i in q["evidence"]]
        if q["kind"] in READ_KINDS:
            assert [t["text"] for t in texts] == [q["answers"][0]]
        if q["kind"] == "estimate":
            assert not texts, "what must be estimated is not printed"


def test_every_document_can_be_read_or_estimated():
    for i in range(60):
        document = make_document(DOCUMENT_KINDS[i % 6], i, 112, preset="rich")
        kinds = {q.kind for q in document.questions}
        assert kinds & set(READ_KINDS) if document.content.printed else "estimate" in kinds


def test_same_seed_same_pixels_and_disjoint_seeds_disjoint_documents():
    assert (make_document("pie", 7).pixels == make_document("pie", 7).pixels).all()
    one, two = documents(60, seed=1), documents(60, seed=2)
    pixels = lambda data: {image.tobytes() for image in data["image"]}
    assert len(pixels(one)) == 60 and not pixels(one) & pixels(two) and not set(one["id"]) & set(two["id"])


def test_the_cache_is_used_and_left_clean_when_generation_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path))
    first = documents(3, seed=5)
    stamp = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.arrow")}
    assert (
        documents(3, seed=5)["id"] == first["id"]
        and {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.arrow")} == stamp
    )
    with pytest.raises(ValueError, match="at least 64"):
        documents(3, seed=6, size=16)
    checked = {path.with_suffix(".sha256") for path in stamp}
    assert set(tmp_path.rglob("*.*")) == {*stamp, *checked}, "nothing half-written stays"


def test_samples_carry_their_evidence_and_pass_through():
    data = documents(6, seed=3)
    every = samples(data)
    assert [s.id for s in samples(every)] == [s.id for s in every] and len({s.id for s in every}) == len(every)
    reads = samples(data, READ_KINDS)
    assert {s.kind for s in reads} <= set(READ_KINDS)
    for s in reads:
        assert s.evidence.texts[s.evidence.answer[0]].text == s.answers[0]
        assert s.image.size == (112, 112) and s.image.mode == "RGB"


@pytest.mark.parametrize("source", [b"", b"not an image", "/no/such/file.png"], ids=["empty", "text", "missing"])
def test_an_undecodable_image_names_its_sample(source):
    with pytest.raises(ValueError, match="doc-3/1: the image cannot be decoded"):
        Sample("doc-3/1", "doc-3", "sum", "?", ("1",), source).image


def test_a_truncated_image_is_refused_and_other_modes_become_rgb():
    buffer = io.BytesIO()
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(buffer, "PNG")
    assert decode(buffer.getvalue(), "grey").mode == "RGB"
    with pytest.raises(ValueError, match="cut"):
        decode(buffer.getvalue()[:-200], "cut")


@pytest.mark.parametrize("request_, message", [
    (dict(n=0, seed=1), "0 documents asked for; expected at least 1"),
    (dict(n=1, seed=1, kinds=("map",)), "unknown document kind 'map'; expected one of bar"),
    (dict(n=1, seed=1, preset="plain"), "unknown preset 'plain'; expected one of embedded, rich"),
    (dict(n=1, seed=1, language="xx"), "unknown language 'xx'; expected one of en, ko"),
    (dict(n=1, seed=1, size=-3), "document size -3 px; expected at least 64"),
])
def test_a_bad_request_is_refused_in_one_line(request_, message):
    with pytest.raises(ValueError, match=message) as caught:
        documents(**request_)
    assert "\n" not in str(caught.value)


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="expected at least one question"):
        samples(documents(2, seed=3), kinds=("estimate",))
