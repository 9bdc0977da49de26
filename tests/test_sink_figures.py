"""Figures of sinks hold the numbers they were given, and refuse what they cannot draw."""
import numpy as np
import pandas as pd
import pytest

from sfa_core.documents.generate import make_document
from sfa_core.interventions.overhead import decode_overhead
from sfa_core.figures.sinks import place_shares, sink_scatter, visual_sinks
from sfa_core.interventions.sink_places import enrichment

PLACES = pd.DataFrame({"sink": [True, False, False, False] * 10, "blank": [True, True, False, False] * 10,
                       "border": False, "background": np.nan,
                       "document": np.repeat(np.arange(10), 4)})


def test_figure_ten_holds_its_maps_and_outlines_every_sink_in_every_panel():
    rng = np.random.default_rng(0)
    values, before = rng.random((4, 6)), rng.random((4, 6)) / 24
    sinks = values > 0.8
    after = np.where(sinks, 0.4 * before, 1.1 * before)
    figure = visual_sinks(make_document("bar", 1).pixels, values, sinks, before, after)
    maps = [trace.z for trace in figure.data if trace.type == "heatmap"]
    assert all(np.array_equal(drawn, np.float32(given)) for drawn, given in zip(maps, (values, before, after)))
    assert np.allclose(maps[3], after - before, atol=1e-7) and figure.layout.coloraxis.cmax == pytest.approx(
        max(before.max(), after.max())
    )
    assert len(figure.layout.shapes) == 5 + 5 * 2 * sinks.sum(), (
        "the page's edge, and two lines around a sink, in five panels"
    )
    text = " ".join(annotation.text for annotation in figure.layout.annotations)
    assert (
        f"{sinks.sum()} of 24 image tokens" in text
        and f"{before[sinks].sum():.3f} before, {after[sinks].sum():.3f} after" in text
    )
    with pytest.raises(ValueError, match=r"after \(4, 5\), expected \(h, w\) of one grid"):
        visual_sinks(make_document("bar", 1).pixels, values, sinks, before, after[:, :5])


def test_a_page_without_sinks_is_drawn_too():
    flat = np.full((4, 4), 0.01)
    figure = visual_sinks(make_document("bar", 1).pixels, flat, np.zeros((4, 4), dtype=bool), flat, flat)
    assert "0 of 16 image tokens are sinks" in figure.layout.annotations[-1].text and len(figure.layout.shapes) == 5


def test_thinning_keeps_every_sink_and_the_counts():
    table = pd.DataFrame({"value": np.linspace(0.1, 2, 5000),
                          "attention": 0.01}).assign(sink=lambda rows: rows["value"] > 1.99)
    figure = sink_scatter(table, tau=1.99, most=100)
    others, sinks = figure.data
    assert (
        len(sinks.x) == table["sink"].sum() and len(others.x) < 110 and f"n = {(~table['sink']).sum():,}" in others.name
    )
    with pytest.raises(ValueError, match="a table of image tokens has 5000 rows"):
        sink_scatter(table.drop(columns="sink"), tau=1.0)


def test_places_say_ratio_interval_counts_or_that_there_is_nothing():
    said = [annotation.text for annotation in place_shares(enrichment(PLACES, draws=200)).layout.annotations]
    assert (
        "no sinks" in said[0]
        and "2.00 times [2.00, 2.00]" in said[1]
        and "n = 10 of 40" in said[1]
        and "no such tokens" in said[2]
    )
    assert all("no sinks" in annotation.text
               for annotation in place_shares(enrichment(PLACES.assign(sink=False))).layout.annotations)


@pytest.mark.parametrize("wrong", [dict(steps=0), dict(turns=0)])
def test_no_turns_measure_nothing(wrong):
    with pytest.raises(ValueError, match="expected at least 1 of both"):
        decode_overhead(None, None, **wrong)
