"""Tables larger than those learned from say the same on both pages, towers of all families learn the dense task alike,
and a curve is made by one command."""
import numpy as np
import pytest
import torch
from test_families import each_family

import sfa_core.pretraining.towers as towers
from sfa_core.documents.drawing import paint, text_box
from sfa_core.documents.generate import documents, make_document
from sfa_core.pretraining.dense import IGNORE
from sfa_core.pretraining.dynamics import DenseConfig, FreshPages, draw_batch, draw_page, place_patches
from sfa_core.pretraining.larger_tables import ROW, larger_tables, taller
from sfa_core.pretraining.recipe import decode_documents
from sfa_core.pretraining.towers import learn_tower, learning_parameters, new_tower, page_size, tower_states
from sfa_core.runs.curves import TALL, TASKS, TESTED_ROWS, TRAINED_ROWS, main, read_curves

TABLE = FreshPages("page_large", ("table",), rows=(10, 10))


def test_a_taller_page_says_the_same_and_its_rows_have_the_height_of_those_learned_from():
    for number in range(8):
        page = draw_page(TABLE, 1, number)
        tall = taller(page, TALL)
        one, other = page.facts(), tall.facts()
        assert one["table"] == other["table"]
        assert [(t["text"], t["role"], t["row"]) for t in one["texts"]] == [(t["text"], t["role"], t["row"])
                                                                           for t in other["texts"]]
        edges = sorted({y for mark in other["marks"] for y in (mark["box"][1], mark["box"][3])})
        assert np.allclose(np.diff(edges), ROW * page.sheet.style.font_size, atol=1) and edges[-1] < TALL
        inside = {(m["row"], m["column"]): m["box"] for m in other["marks"]}
        for text in other["texts"]:
            if text["role"] == "cell":
                x0, y0, x1, y1 = inside[text["row"], text["column"]]
                assert x0 <= text["box"][0] and text["box"][2] <= x1 and y0 <= text["box"][1] and text["box"][3] <= y1
        pixels = paint(tall.sheet.items, (TALL, 224), tall.sheet.style.paper)
        for text in tall.sheet.texts:  # ink lies where the box says
            x0, y0, x1, y1 = text_box(text.item)
            assert np.ptp(pixels[y0:y1, x0:x1].astype(int)) > 100


def test_rows_learned_from_have_that_height_too():
    data = FreshPages("page", ("table",), rows=TRAINED_ROWS)
    for number in range(20):
        page = draw_page(data, 0, number)
        edges = sorted({y for mark in page.sheet.marks for y in (mark.box[1], mark.box[3])})
        assert np.allclose(np.diff(edges), ROW * page.sheet.style.font_size, atol=1)


def test_a_table_that_does_not_fit_and_odd_sizes_are_refused():
    with pytest.raises(ValueError, match="a table of 11 lines needs [0-9]+ px; the page has 280"):
        taller(draw_page(TABLE, 0, 0), 280)
    with pytest.raises(ValueError, match="multiples of the patch, 14 px"):
        larger_tables((6, 6), 1, height=300)


def test_larger_tables_have_their_rows_are_asked_of_far_patches_and_are_no_pages_of_a_training():
    for rows in TESTED_ROWS:
        square, tall = (larger_tables((rows, rows), 6, height=height, seed=rows) for height in (0, TALL))
        assert [one["id"] for one in square.rows] == [one["id"].removesuffix(f"-{TALL}px") for one in tall.rows]
        for part in (square, tall):
            known = part.targets["row"][part.targets["away"]]
            assert (known != IGNORE).any() and part.targets["away"].any((1, 2)).all()
    trained = larger_tables(TRAINED_ROWS, 6, seed=1)
    assert {page.tobytes() for page in trained.pixels}.isdisjoint(
        page.tobytes() for page in draw_batch(FreshPages("page", ("table",), rows=TRAINED_ROWS), 0, 0, 12)["pixels"])
    assert larger_tables(TRAINED_ROWS, 6, seed=1).digest == trained.digest != larger_tables(TRAINED_ROWS, 6).digest


@each_family
def test_arms_of_a_tower_start_equal_and_differ_in_their_places_only(name):
    pixels = np.stack([make_document("bar", seed, 8 * 14 if page_size(new_tower(name, 0, 32, 1)) == 112 else 128).pixels
                       for seed in range(2)])
    states, weights = {}, {}
    for terms in ((), ("column",)):
        bundle = new_tower(name, 1, 32, 2)
        place_patches(bundle, DenseConfig(terms, seed=1))
        named = learning_parameters(bundle, pixels)
        weights[terms] = {key: p for key, p in named.items() if ".structure." not in key}
        assert len(named) - len(weights[terms]) == (2 if terms else 0), "one weight in every layer that is used"
        assert all(p.grad is None for p in bundle.model.parameters())
        with torch.no_grad():
            [p.fill_(2.0) for key, p in named.items() if ".structure." in key]
            states[terms] = tower_states(bundle, pixels)
    assert weights[()].keys() == weights["column",].keys()
    assert all(torch.equal(p, weights["column",][key]) for key, p in weights[()].items())
    assert states[()].shape == (2, 8, 8, 32) and not torch.allclose(states[()], states["column",], atol=1e-4)


def test_a_tower_that_is_cut_off_ends_the_same(tmp_path, monkeypatch):
    asked = decode_documents(documents(4, 3), (8, 8))
    config = DenseConfig(("column",), steps=3, batch_size=2, every=2, seed=1)
    learn = lambda folder: learn_tower("llava", FreshPages("embedded"), asked, config, folder, width=32, layers=1)
    whole, drawn = learn(tmp_path / "whole"), towers.draw_batch

    def failing(data, seed, step, count):
        if step == 2:
            raise KeyboardInterrupt
        return drawn(data, seed, step, count)

    monkeypatch.setattr(towers, "draw_batch", failing)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "cut")
    monkeypatch.setattr(towers, "draw_batch", drawn)
    again = learn(tmp_path / "cut")
    assert again[0].equals(whole[0]) and again[1].equals(whole[1])
    with pytest.raises(ValueError, match="those of the class, 'learned', are expected"):
        learn_tower("llava", FreshPages("embedded"), asked, DenseConfig(positions="rope"), tmp_path / "rope")


def test_one_command_makes_a_curve_and_does_not_make_it_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path / "exports"))
    asked = ["--steps", "2", "--every", "1", "--held-out", "3", "--folder", str(tmp_path / "curves")]
    for task, name in (("8", "8 x 8, 6 documents"), ("tables", "tables")):
        few = ["--few", "6"] if task == "8" else []
        main([task, "vision", "0", *asked, *few])
        before = read_curves(tmp_path / "curves")
        main([task, "vision", "0", *asked, *few])
        assert len(read_curves(tmp_path / "curves")) == len(before) and name in {curve.task for curve in before}
    found = next(curve for curve in before if curve.task == "tables").rates
    assert {"value_binding", "10 rows value_binding", "10 rows, taller page value_binding"} <= set(found["measure"])
    assert capsys.readouterr().out.count("2 steps in") == 4
    with pytest.raises(SystemExit, match="6 documents to learn from; this task draws fresh pages"):
        main(["tables", "vision", "0", "--few", "6"])
    assert set(TASKS) >= {"8", "16", "tables", "internvl", "qwen3_vl"}
