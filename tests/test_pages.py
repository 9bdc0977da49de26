"""Pages of 224 px: every text stands alone and can be read, dense targets say what the pixels show, older presets
are what they were."""
import hashlib
import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_core.pretraining.dense import (
    COLOURS,
    HEADS,
    IGNORE,
    PAGE_HEADS,
    DenseHeads,
    binding_counts,
    dense_targets,
    heads_of_size,
    stack_targets,
)
from sfa_core.documents.generate import documents, make_document
from sfa_core.documents.drawing import Text, paint, text_box
from sfa_core.documents.page_layout import PAGE_COLUMNS, PAGE_FONTS, PAGE_ROWS
from sfa_core.documents.words import SHORT_WORDS
from sfa_core.documents.questions import DOCUMENT_KINDS, KINDS, READ_KINDS

GRID, SIZE = (16, 16), (224, 224)
every_page = pytest.mark.parametrize("preset, kind",
                                     [("page", kind) for kind in DOCUMENT_KINDS] + [("page_large", "table")])
BEFORE = dict(  # of pixels and rows, made before the preset `page` was added
    embedded="4fd7b361b3f636d1f71e517cdb4abd21b2f0377f8a1e075431de36dccd18dab8",
    rich="2fb41c71a3d07a16386028996cc95dc0009d621d2ce0977c7707a03954c1dcdb",
)


@pytest.mark.parametrize("preset", BEFORE)
def test_older_presets_draw_the_same_pixels_and_say_the_same_as_before(preset):
    digest = hashlib.sha256()
    for language in ("en", "ko"):
        for kind in DOCUMENT_KINDS:
            for seed in range(4):
                for size in (112, 224):
                    document = make_document(kind, (17, seed), size, language, preset)
                    row = {name: value for name, value in document.row().items() if name != "image"}
                    text = json.dumps(row, ensure_ascii=False,
                                      sort_keys=True).replace(document.id, f"{preset}-{kind}-17-{seed}")
                    digest.update(document.pixels.tobytes() + text.encode())
    assert digest.hexdigest() == BEFORE[preset]


@every_page
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([168, 200, 224, 280, 448]),
       language=st.sampled_from(["en", "ko"]))
def test_no_text_touches_another_one(preset, kind, seed, size, language):
    sheet = make_document(kind, seed, size, language, preset).sheet
    boxes = np.array([text_box(t.item) for t in sheet.texts])
    meet = (np.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) + 1 > np.maximum(boxes[:, None, :2],
                                                                                boxes[None, :, :2])).all(-1)
    assert not (meet & ~np.eye(len(boxes), dtype=bool)).any(), "at least a pixel of paper between any two"
    assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] <= size).all()
    for mark in sheet.marks:
        assert 0 <= mark.box[0] < mark.box[2] <= size and 0 <= mark.box[1] < mark.box[3] <= size, mark


@every_page
def test_every_text_can_be_read_at_224_pixels(preset, kind):
    "Letters of 9 px per em are some 5 px wide; numbers are not written over the point of another value."
    for seed in range(150):
        sheet = make_document(kind, (1, seed), preset=preset).sheet
        assert min(t.item.size for t in sheet.texts) >= (8 if kind == "grouped_bar" else 9), seed
        for t in sheet.texts if kind == "line" else ():
            x0, y0, x1, y1 = text_box(t.item)
            for m in sheet.marks:
                assert min(x1, m.box[2]) <= max(x0, m.box[0]) or min(y1, m.box[3]) <= max(y0, m.box[1]), (seed, t, m)


def test_pages_reach_the_sizes_they_promise():
    for kind in DOCUMENT_KINDS:
        contents = [make_document(kind, (2, seed), preset="page").content for seed in range(200)]
        assert {len(c.rows) for c in contents} == set(range(PAGE_ROWS[kind][0], PAGE_ROWS[kind][1] + 1))
        low, high = PAGE_COLUMNS.get(kind, (1, 1))
        assert {len(c.columns) for c in contents} == set(range(low, high + 1))
        top = [max(v for line in c.values for v in line) for c in contents]
        assert 0.05 < np.mean(np.array(top) > 99) < 0.4 and max(top) <= 999, "up to 999 on some"
        assert all(v >= 1 for c in contents for line in c.values for v in line)
        assert 0.7 < np.mean([bool(c.title) for c in contents]) < 0.9
    large = [make_document("table", (2, seed), preset="page_large").content for seed in range(200)]
    assert {len(c.rows) for c in large} == {9, 10, 11} and {len(c.columns) for c in large} == {2, 3, 4, 5, 6}
    sheets = [make_document("bar", (2, seed), preset="page").sheet for seed in range(60)]
    assert {s.style.font for s in sheets} == set(PAGE_FONTS)
    assert 0.2 < np.mean([any(t.role == "tick" for t in s.texts) for s in sheets]) < 0.6


def test_a_seed_says_the_same_at_every_size():
    for kind in DOCUMENT_KINDS:
        assert make_document(kind, 5, 168, preset="page").content == make_document(kind, 5, 448, preset="page").content


def test_pages_ask_all_kinds_of_printed_documents_with_evidence():
    kinds = Counter()
    for i in range(240):
        row = make_document(DOCUMENT_KINDS[i % 6], (3, i), preset="page").row()
        asked = {q["kind"] for q in row["questions"]}
        assert asked & set(READ_KINDS)
        kinds.update(asked)
        for q in row["questions"]:
            texts = [row["texts"][j]["text"] for j in q["evidence"]]
            assert texts and (q["kind"] not in READ_KINDS or texts == [q["answers"][0]])
    assert set(kinds) == {*KINDS} - {"estimate"}, "nothing is estimated where every value is printed"


def test_seeds_of_pages_are_disjoint():
    pixels = lambda seed, preset: {image.tobytes() for image in documents(36, seed=seed, preset=preset)["image"]}
    assert len(pixels(1, "page")) == 36 and not pixels(1, "page") & pixels(2, "page")
    assert not {row["id"] for row in documents(12, seed=1, preset="page")} & {
        row["id"] for row in documents(12, seed=1, preset="page_large")
    }


@pytest.mark.parametrize("request_, message", [
    (dict(kind="bar", preset="page", size=167), "document size 167 px; expected at least 168"),
    (dict(kind="bar", preset="page_large"), "document kind 'bar' of preset page_large; expected one of table"),
])
def test_a_page_that_cannot_be_drawn_is_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        make_document(**request_, seed=0)


@every_page
def test_colour_targets_are_what_the_pixels_show(preset, kind):
    "A patch's target colour covers it in part; where the target is no colour, no colour covers a quarter of the patch."
    for seed in range(25):
        document = make_document(kind, (4, seed), preset=preset)
        targets, marked = dense_targets(document.facts(), GRID,
                                        SIZE), {m.colour for m in document.sheet.marks if m.colour}
        shades = document.sheet.style.shades
        scene = [item for item in document.sheet.items if not isinstance(item, Text)]
        page = paint(scene, SIZE, document.sheet.style.paper).reshape(16, 14, 16, 14, 3)
        share = {name: (page == np.array(shades[name], np.uint8)).all(-1).mean((1, 3)) for name in marked}
        for y, x in np.ndindex(GRID):
            target = targets["colour"][y, x]
            if target > 0:
                assert share[COLOURS[target - 1]][y, x] > 0.03, (seed, y, x)
                assert share[COLOURS[target - 1]][y, x] > max(share[name][y, x] for name in marked) - 0.2, (seed, y, x)
            elif target == 0:
                assert max((s[y, x] for s in share.values()),
                           default=0) < (0.03 if kind == "line"
                                         and not _near_point(document, y, x) else 0.25), (seed, y, x)
        assert (targets["colour"] == IGNORE).any() == (kind == "line")


def _near_point(document, y, x):
    "Whether a patch shows part of a point or of a key of the legend: too little of it to be the patch's colour."
    return any(m.box[0] < 14 * x + 14 and m.box[2] > 14 * x and m.box[1] < 14 * y + 14 and m.box[3] > 14 * y
               for m in document.sheet.marks)


@every_page
def test_every_value_and_every_word_owns_a_patch(preset, kind):
    for seed in range(25):
        document = make_document(kind, (5, seed), preset=preset)
        targets, content = dense_targets(document.facts(), GRID, SIZE), document.content
        known = targets["tens"] != IGNORE
        assert ((targets["hundreds"] != IGNORE) == known).all() and ((targets["units"] != IGNORE) == known).all()
        owned = 100 * targets["hundreds"] + 10 * targets["tens"] + targets["units"]
        assert set(owned[known]) == {v for line in content.values for v in line}
        rows, columns = ({SHORT_WORDS[i] for i in targets[name].ravel() if i != IGNORE} for name in ("row", "column"))
        assert rows == set(content.rows) and columns == {name for name in content.columns if name}
        printed = {int(digit) for line in content.values for v in line for digit in str(v)}
        shown = set(np.flatnonzero(targets["digits"].any((1, 2))))
        assert shown and shown <= printed, "a digit that four patches share is shown by none"
        if kind in ("bar", "pie"):
            named = {COLOURS[c] for c in targets["owner_colour"][targets["label"]] if c != IGNORE}
            assert named == set(content.colours), "every label knows the colour of what it names"


def test_a_perfect_reader_needs_the_hundreds_too():
    "Heads with hundreds can be right everywhere; those without are wrong about every value above 99."
    targets = stack_targets([make_document("table", (6, seed), preset="page").facts() for seed in range(24)], GRID,
                            SIZE)
    logits = {name: torch.nn.functional.one_hot(targets[name].clamp(min=0), n).float()
              for name, n in PAGE_HEADS.items() if name != "digits"}
    logits["digits"] = targets["digits"].permute(0, 2, 3, 1).float() - 0.5
    right, n = binding_counts(logits, targets)["value_binding"]
    large = int((targets["away"] & (targets["hundreds"] > 0)).sum())
    assert right == n and 0 < large < n
    del logits["hundreds"]
    assert binding_counts(logits, targets)["value_binding"] == (n - large, n)


def test_heads_are_known_by_their_size():
    for heads in (HEADS, PAGE_HEADS):
        made = DenseHeads(8, heads)
        assert heads_of_size(len(made.read.weight)) == heads and set(made(torch.zeros(1, 2, 2, 8))) == set(heads)
    with pytest.raises(ValueError, match="linear heads with 7 outputs; expected one of"):
        heads_of_size(7)
