"""Figures hold exactly the numbers they were given, in the colours of the house, and are written whole or not at
all."""

import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
from PIL import Image

from sfa_core.figures.attention import attention_frames, entropy_violins
from sfa_core.figures.density import cross_architecture, density_gallery, motivation
from sfa_core.figures.charts import (
    ARM_COLOURS, architecture, attention_maps, difference_forest, document_gallery, entropy_by_layer, head_grid,
    save_figure, score_by_kind, structural_bias,
    training_loss,
)
from sfa_core.figures.style import browser

FACTS = {
    "baseline": "#80868B", "control": "#3C4043", "vision": "#1A73E8", "adat": "#E8453C", "vision_adat": "#7B1FA2",
    "full": "#0D47A1", "sfa": "#00897B",
    "vision_blocks": "#B06000",
}
PAGE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def titled(figure, axes=True):
    "A figure has a title, and its axes say what they show."
    assert figure.layout.title.text and figure.layout.height > 100
    assert not axes or (
        figure.layout.xaxis.title.text and (figure.layout.yaxis.title.text or len(figure.layout.yaxis.ticktext))
    )
    return figure


def scores(rates, n=400):
    rates = np.asarray(rates)
    return pd.DataFrame({"kind": ["a", "b", "c"][: len(rates)], "n": n, "rate": rates, "low": rates - 0.031,
                         "high": rates + 0.027})


def test_figures_do_not_import_torch():
    code = ("import sys; import sfa_core.figures.charts; bad = [m for m in ('torch', 'transformers', "
            "'datasets') if m in sys.modules]; assert not bad, bad")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_arms_have_the_colours_of_the_house():
    assert {arm: ARM_COLOURS[arm] for arm in FACTS} == FACTS


def test_scores_hold_rates_and_intervals_of_every_arm():
    tables = {"baseline": scores([0.5, 0.25, 1.0]), "vision": scores([0.75, 0.0], n=200)}
    figure = titled(score_by_kind(tables))
    for trace, (arm, table) in zip(figure.data, tables.items(), strict=True):
        assert np.array_equal(trace.x, table["rate"]) and trace.marker.color == ARM_COLOURS[arm]
        assert np.allclose(trace.x + trace.error_x.array, table["high"]) and np.allclose(
            trace.x - trace.error_x.arrayminus, table["low"]
        )
        assert list(trace.customdata[:, 1]) == list(table["n"]) and list(np.round(trace.y)) == list(range(len(table)))
    assert "n = 200–400" in figure.layout.yaxis.ticktext[0] and "n = 400" in figure.layout.yaxis.ticktext[2]
    assert len({trace.marker.symbol for trace in figure.data}) == 2


def test_forest_holds_differences_in_points_and_fills_what_is_resolved():
    table = pd.DataFrame({"name": list("xyz"), "difference": [0.02, -0.05, 0.0], "low": [-0.01, -0.09, 0.0],
                          "high": [0.05, -0.01, 0.0], "n": [10, 20000, 3]})
    figure = titled(difference_forest(table, better="b better"))
    assert np.allclose(figure.data[0].x, [2, -5, 0]) and figure.data[0].marker.symbol == (
        "diamond-open",
        "diamond",
        "diamond-open",
    )
    ends = [(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.y0 == shape.y1]
    assert np.allclose(ends, [(-1, 5), (-9, -1), (0, 0)])
    assert any("n = 20,000" in note.text and "−5.0 [−9.0, −1.0]" in note.text for note in figure.layout.annotations)
    assert any(shape.x0 == shape.x1 == 0 for shape in figure.layout.shapes)


def test_loss_holds_raw_values_and_their_weighted_mean():
    log = pd.DataFrame({"step": [10, 20, 30], "loss": [3.0, 1.0, 2.0]})
    figure = titled(training_loss({"control": log}, reported=[4.78, 1.10, 0.51, 0.46], span=3))
    assert list(figure.data[0].y) == [3, 1, 2] and list(figure.data[0].x) == [10, 20, 30]
    assert np.allclose(figure.data[1].y, [3, (1 + 3 / 2) / (1 + 1 / 2), (2 + 1 / 2 + 3 / 4) / (1 + 1 / 2 + 1 / 4)])
    assert list(figure.data[2].y) == [4.78, 1.10, 0.51, 0.46] and np.allclose(figure.data[2].x, [0, 10, 20, 30])
    placed = training_loss({"control": log}, reported=pd.DataFrame({"step": [5], "loss": [9.0]}))
    assert list(placed.data[2].x) == [5] and "evenly" not in placed.data[2].name


def test_attention_maps_share_a_scale_and_lie_on_their_patches():
    maps = {"control": np.array([[0.1, 0.2, 0.0], [0.0, 0.3, 0.1]]),
            "vision": np.array([[0.0, 0.2, 0.0], [0.0, 0.5, 0.1]])}
    figure = titled(attention_maps(PAGE, maps, query=(1, 2), difference=("control", "vision")), axes=False)
    layers = [trace for trace in figure.data if isinstance(trace, go.Heatmap)]
    for layer, expected in zip(layers, [*maps.values(), maps["vision"] - maps["control"]], strict=True):
        assert np.allclose(layer.z, expected, atol=1e-7) and layer.z.dtype == np.float32
        # 3 x 2 patches of 20 px over 60 x 40 px
        assert (layer.x0 + 0.5, layer.dx, layer.y0 + 0.5, layer.dy) == (10, 20, 10, 20)
    assert [layer.coloraxis for layer in layers] == ["coloraxis", "coloraxis", "coloraxis2"]
    assert figure.layout.coloraxis.cmin == 0 and np.isclose(figure.layout.coloraxis.cmax, 0.5)
    assert figure.layout.coloraxis2.cmin == -figure.layout.coloraxis2.cmax and np.isclose(
        figure.layout.coloraxis2.cmax, 0.2
    )
    outlined = [(s.x0 + 0.5, s.x1 + 0.5, s.y0 + 0.5, s.y1 + 0.5) for s in figure.layout.shapes if s.line.width > 1]
    assert set(outlined) == {(40, 60, 20, 40)} and len(outlined) == 2 * 4
    assert len([trace for trace in attention_maps(PAGE, maps).data if isinstance(trace, go.Heatmap)]) == 2


def test_structural_terms_share_a_scale_centred_at_zero():
    terms = {"row": np.eye(4) * 0.3, "distance": -np.ones((4, 4)), "combined": np.eye(4) * 0.3 - 1}
    figure = titled(structural_bias(terms, query=(0, 3)), axes=False)
    assert all(np.allclose(trace.z, values) for trace, values in zip(figure.data, terms.values(), strict=True))
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (-1, 1)


def test_entropies_are_kept_per_layer_and_group():
    table = pd.DataFrame({"layer": [0, 0, 1, 1], "group": ["control", "vision"] * 2, "entropy": [1.0, 2.0, 3.0, 4.0]})
    figure = titled(entropy_by_layer(table, tokens=65))
    assert [list(trace.y) for trace in figure.data] == [[1, 3], [2, 4]] and [
        list(trace.x) for trace in figure.data
    ] == [["0", "1"]] * 2
    assert [trace.line.color for trace in figure.data] == [ARM_COLOURS["control"], ARM_COLOURS["vision"]]
    assert np.isclose(figure.layout.shapes[0].y0, math.log(65))


def test_grid_of_heads_holds_its_values():
    values = np.random.default_rng(1).normal(size=(3, 5))
    figure = titled(head_grid(values, "Change", "nats", scale="difference", layers=[4, 5, 6]))
    assert (
        np.allclose(figure.data[0].z, values, atol=1e-6)
        and figure.data[0].z.dtype == np.float32
        and figure.data[0].y == ("4", "5", "6")
    )
    assert figure.data[0].zmin == -figure.data[0].zmax


def test_gallery_keeps_order_and_captions():
    images = [PAGE, Image.fromarray(PAGE[:, ::-1]), PAGE[:20]]
    figure = titled(document_gallery(images, ["first", "second", "a caption that is rather long " * 4]), axes=False)
    assert [note.text.split("<br>")[0].split()[0] for note in figure.layout.annotations] == ["first", "second", "a"]
    assert len(figure.data) == 3 and figure.data[0].source != figure.data[1].source


def test_architecture_names_parameters_and_what_is_trained():
    rows = [("encoder", "2 layers", 1234, True, ""), ("bias", "row", 304, True, "encoder"),
            ("language model", "qwen3", 5678, False, "")]
    parts = pd.DataFrame(rows, columns=["part", "detail", "parameters", "trained", "within"])
    texts = [note.text for note in titled(architecture(parts), axes=False).layout.annotations]
    for text in ("1,234 parameters, trained", "304 parameters, trained", "5,678 parameters, frozen"):
        assert any(text in note for note in texts)
    with pytest.raises(ValueError, match="a part is within 'decoder', expected one of encoder, language model"):
        architecture(parts.assign(within=["", "decoder", ""]))


def regions_and_contrast():
    draw = np.random.default_rng(2)
    rows = [dict(layer=layer, head=head, region=region, value=draw.normal())
            for layer in (3, 5) for head in (0, 1) for region in ("text-dense", "sparse") for _ in range(9)]
    effects = [(3, 0, -0.8, -1.2, -0.4), (3, 1, 0.1, -0.2, 0.4), (5, 0, 0.9, 0.1, 1.7), (5, 1, 0.0, -0.1, 0.1)]
    return pd.DataFrame(rows), pd.DataFrame(effects,
                                            columns=["layer", "head", "effect", "effect_low",
                                                     "effect_high"]).assign(n=9)


def test_violins_hold_every_document_and_print_each_effect_with_its_interval():
    table, contrast = regions_and_contrast()
    figure = titled(entropy_violins(table, contrast), axes=False)
    assert len(figure.data) == 4
    for trace, (layer, group) in zip(figure.data, [(3, "text-dense"), (3, "sparse"), (5, "text-dense"), (5, "sparse")],
                                     strict=True):
        part = table[(table["layer"] == layer) & (table["region"] == group)]
        assert np.allclose(trace.y, part["value"], atol=1e-6) and list(trace.x) == [str(head) for head in part["head"]]
    ticks = [*figure.layout.xaxis.ticktext, *figure.layout.xaxis2.ticktext]
    assert ticks == ["head 0<br><b>−0.80</b><br>[−1.20, −0.40]", "head 1<br>+0.10<br>[−0.20, +0.40]",
                     "head 0<br><b>+0.90</b><br>[+0.10, +1.70]",
                     "head 1<br>+0.00<br>[−0.10, +0.10]"]


def test_frames_hold_every_state_on_one_scale():
    draw = np.random.default_rng(3)
    states = {str(layer): {"control": draw.random((2, 3)) * layer, "vision": draw.random((2, 3))} for layer in range(3)}
    figure = titled(attention_frames(PAGE, states, query=(0, 1), difference=("control", "vision")), axes=False)
    shown = [index for index, trace in enumerate(figure.data) if isinstance(trace, go.Heatmap)]
    for frame, maps in zip(figure.frames, states.values(), strict=True):
        assert list(frame.traces) == shown
        for trace, values in zip(frame.data, [*maps.values(), maps["vision"] - maps["control"]], strict=True):
            assert np.allclose(trace.z, values, atol=1e-6) and trace.z.dtype == np.float32
    assert [list(step.args[0])
            for step in figure.layout.sliders[0].steps] == [["0"], ["1"],
                                                            ["2"]] == [[frame.name] for frame in figure.frames]
    assert np.isclose(figure.layout.coloraxis.cmax,
                      max(values.max() for maps in states.values() for values in maps.values()))


def test_patches_are_drawn_around_their_pixels():
    uniform, adaptive = np.array([[0, 0, 30, 20], [30, 20, 60, 40]]), np.array([[0, 0, 60, 40]])
    figure = titled(motivation(PAGE, np.eye(2), uniform, adaptive), axes=False)
    lines = [trace for trace in figure.data if isinstance(trace, go.Scatter)]
    assert (
        np.nanmax(lines[0].x) == 59.5
        and np.nanmin(lines[0].y) == -0.5
        and len(lines[0].x) == 12
        and len(lines[1].x) == 6
    )
    assert "uniform grid, 2 patches" in [note.text for note in figure.layout.annotations]
    assert np.array_equal(next(trace for trace in figure.data if isinstance(trace, go.Heatmap)).z, np.eye(2))


def test_density_gallery_holds_label_and_prediction_and_says_their_error():
    labels, found = [np.eye(2), np.zeros((2, 2))], [np.eye(2), np.full((2, 2), 0.25)]
    figure = titled(density_gallery([PAGE, PAGE], labels, found), axes=False)
    maps = [trace for trace in figure.data if isinstance(trace, go.Heatmap)]
    assert all(np.array_equal(trace.z, values)
               for trace, values in zip(maps, [labels[0], found[0], labels[1], found[1]], strict=True))
    assert [note.text for note in figure.layout.annotations][2::3] == ["prediction, mean error 0.000",
                                                                       "prediction, mean error 0.250"]
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)


def test_architectures_hold_differences_in_points():
    rows = [("A", "own", "vision", 0.01, 0.002, 0.02, 9), ("B", "SigLIP", "vision", -0.01, -0.02, 0.001, 9),
            ("B", "SigLIP", "sfa", 0.0, -0.1, 0.1, 9)]
    table = pd.DataFrame(rows, columns=["model", "encoder", "arm", "difference", "low", "high", "n"])
    figure = titled(cross_architecture(table))
    assert (
        np.allclose(figure.data[0].x, [1, -1])
        and np.allclose(figure.data[0].error_x.array, [1, 1.1])
        and np.allclose(figure.data[1].y, [1.15])
    )
    assert [name.endswith("open") for name in figure.data[0].marker.symbol] == [
        False,
        True,
    ] and "SigLIP" in figure.layout.yaxis.ticktext[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score_by_kind({}), "there are no arms, expected at least one table"),
        (lambda: score_by_kind({"control": scores([]).drop(columns="n")}), "expected at least one row and kind, n, "
                                                                           "rate, low, high"),
        (lambda: difference_forest(pd.DataFrame({"name": ["a"]})), "a table of differences has 1 rows and the columns "
                                                                   "name"),
        (lambda: training_loss({}), "there are no runs"),
        (lambda: training_loss({"x": pd.DataFrame({"loss": [1.0]})}), "the log of 'x' has 1 rows and the columns loss, "
                                                                      "expected"),
        (lambda: attention_maps(PAGE, {}), "maps are none"),
        (lambda: attention_maps(PAGE, {"a": np.zeros((2, 2)), "b": np.zeros((3, 2))}), "expected maps of one grid"),
        (lambda: attention_maps(PAGE, {"a": np.zeros((2, 2))}, difference=("a", "b")), "difference is of"),
        (lambda: attention_maps(PAGE, {"a": np.zeros((2, 2))}, query=(2, 0)), "the query is patch"),
        (lambda: attention_maps(PAGE / 255, {"a": np.zeros((2, 2))}), "expected .Y, X, 3. uint8 or a PIL image"),
        (lambda: structural_bias({}, (0, 0)), "terms have shapes none"),
        (lambda: head_grid(np.zeros(3), "t", "nats"), "expected .L, H. and one of attention"),
        (lambda: head_grid(np.zeros((3, 3)), "t", "nats", scale="viridis"), "the scale is 'viridis'"),
        (lambda: document_gallery([], []), "0 images and 0 captions"),
        (lambda: entropy_violins(*regions_and_contrast(), layers=[9]), "expected at most 6 of the layers .3, 5."),
        (lambda: entropy_violins(*regions_and_contrast(), pair=("text-dense", "other")), "two of sparse, text-dense"),
        (lambda: attention_frames(PAGE, {}), "states are none"),
        (lambda: attention_frames(PAGE, {"0": {"a": np.eye(2)}, "1": {"b": np.eye(2)}}), "expected at least one, and "
                                                                                         "the same maps in each"),
        (lambda: motivation(PAGE, np.eye(2), np.zeros((0, 4)), np.zeros((1, 4))),
         "patches have shapes .0, 4. and .1, 4."),
        (lambda: density_gallery([PAGE], [], []), "1 images, 0 labels, 0 predictions and 0 names"),
        (lambda: cross_architecture(pd.DataFrame({"model": ["a"]})), "a table of models has 1 rows and the columns "
                                                                     "model"),
        (lambda: save_figure(go.Figure(), "x", formats=("svg",)), "formats are 'svg', expected one or more of html, "
                                                                  "png, pdf"),
        (lambda: save_figure(go.Figure(), "x", formats=()), "formats are none"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_page_needs_no_network(tmp_path):
    figure = head_grid(np.eye(2), "Heads", "nats")
    (page,) = save_figure(figure, tmp_path / "new" / "heads.v2", formats=("html",))
    assert page == tmp_path / "new" / "heads.v2.html" and (page.parent / "plotly.min.js").stat().st_size > 1e6
    assert 'src="plotly.min.js"' in page.read_text() and 'src="https' not in page.read_text()
    assert sorted(file.name for file in page.parent.iterdir()) == ["heads.v2.html", "plotly.min.js"]


def test_without_a_browser_one_line_says_so_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("BROWSER_PATH", raising=False)
    with pytest.raises(FileNotFoundError, match="png and pdf need Chromium or Chrome, found neither"):
        save_figure(head_grid(np.eye(2), "Heads", "nats"), tmp_path / "heads")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(browser() is None and not os.environ.get("SFA_REQUIRE_BROWSER"), reason="needs Chromium")
def test_png_and_pdf_have_the_size_of_the_figure(tmp_path):
    figure = score_by_kind({"control": scores([0.5, 0.25])})
    files = save_figure(figure, tmp_path / "scores", width=700, scale=1)
    assert [file.suffix for file in files] == [".html", ".png", ".pdf"] and shutil.which(browser())
    with Image.open(files[1]) as image:
        assert image.size == (700, figure.layout.height) and len(np.unique(np.asarray(image.convert("L")))) > 20
    assert files[2].read_bytes().startswith(b"%PDF")
