"""Draw the pictures that README.md shows, from committed results and from the model that ships.

    python site/pictures.py [NAME ...]    writes finding.png, explorer.png, main_table.png to exports/reference/pictures

The finding is drawn from the committed curves and encoders of 61_binding_from_nothing, the table from the reference run
of 30_finetune; the explorer shows a page with the first seed of a trained arm from exports/reference/arms where there
is one, else the model as it is. Needs Chromium.
"""
import json
import sys

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfa_core.attention.probes import record
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.load import load_model
from sfa_core.core.paths import REPOSITORY
from sfa_core.figures.learning import seed_bands
from sfa_core.figures.style import (
    ARM_COLOURS,
    ARM_NAMES,
    INK,
    arm_look,
    colour_bar,
    draw_page,
    in_style,
    outline,
    over,
    png_source,
    save_figure,
    see_through,
)
from sfa_core.figures.views import Choice, Recorder, look, view_figure
from sfa_core.pretraining.dynamics import read_dense_encoder
from sfa_core.runs.curves import curve_table, read_curves

REFERENCE = REPOSITORY / "exports" / "reference"
PICTURES = REFERENCE / "pictures"


def table_figure(metrics):
    "Draw the main table of the metrics.json of 30_finetune."
    groups = {}
    for run, summary in metrics["summaries"].items():
        if (arm := run.rsplit("-", 1)[0]) in ("baseline", "control", "vision"):
            groups.setdefault(arm, []).append(summary)
    rows = []
    for arm, runs in groups.items():
        span, rate = runs[0]["by_document"], sum(run["rate"] for run in runs) / len(runs)
        rows.append(
            (
                ARM_NAMES.get(arm, arm),
                f"{len(runs)}",
                f"{runs[0]['n']:,}",
                f"{rate:.3f}",
                f"{span['low']:.3f} to {span['high']:.3f}",
                "  ".join(f"{run['rate']:.3f}" for run in runs),
            )
        )
    head = ["arm", "seeds", "questions", "right", "95 % over documents, first seed", "by seed"]
    colours = [[ARM_COLOURS[arm] for arm in groups], *[[INK] * len(groups)] * (len(head) - 1)]
    figure = go.Figure(go.Table(
        columnwidth=[2, 0.8, 1.2, 1, 2.6, 2.4],
        header={"values": [f"<b>{name}</b>" for name in head], "align": "left", "fill_color": "#F1F3F4",
                "line_color": "#DADCE0", "height": 30},
        cells={"values": list(zip(*rows)), "align": "left", "fill_color": "white", "line_color": "#DADCE0",
               "height": 30, "font": {"color": colours}}))
    in_style(figure, "Right answers, baseline and two trained arms", metrics["verdict"], 30 * (len(rows) + 1) + 20)
    return figure.update_layout(margin={"l": 16, "r": 16, "b": 8})


def explorer_figure():
    "Draw the explorer's view of one page."
    trained = sorted((REFERENCE / "arms").glob("*vision*"))
    arms = {"baseline": None, "vision": trained[0]} if trained else {"baseline": None}
    first = samples(documents(1, seed=7_300), kinds=("read_label",))[0]
    recorder, label = Recorder(load_model("embedded"),
                               arms), next(text.box for text in first.evidence.texts if text.role == "label")
    place = (label[0] + label[2]) / 2, (label[1] + label[3]) / 2
    return view_figure(look(recorder, recorder.page(first), Choice(layer=2, place=place)), 1000)


def looks_of_encoders(drawn):  # arm -> map of the patch under the first label, and that patch
    "Record where the committed encoders from nothing look from the patch under the first label of the first page."
    left, top, right, bottom = next(text["box"] for text in drawn[0]["texts"] if text["role"] == "label")
    tokenizer, maps, place = load_model("embedded").tokenizer, {}, None
    for arm in ("control", "vision"):
        encoder = read_dense_encoder(REFERENCE / "page_encoders" / f"{arm}-0.safetensors", tokenizer)[0]
        seen = record(encoder, samples(drawn)[:1], queries="all")
        token = seen.token_at(0, (left + right) / 2, (top + bottom) / 2)
        maps[arm] = seen.map(0, seen.layers[-2], token)
        place = int(seen.grid.row[token]), int(seen.grid.column[token])
    return maps, place


def finding_figure():
    "Draw the first finding: how fast label colour is learned with and without structure, and where both encoders look."
    drawn = documents(1, seed=7_050, kinds=("bar",), preset="page")
    maps, place = looks_of_encoders(drawn)
    curves = curve_table([curve for curve in read_curves(REFERENCE / "curves") if curve.task == "16 x 16"])
    known = curves[curves["measure"] == "label_colour"]
    names = {arm: ARM_NAMES.get(arm, arm) for arm in maps}
    figure = make_subplots(1, 3, column_widths=[0.36, 0.32, 0.32], horizontal_spacing=0.03,
                           subplot_titles=["label patches that know their bar's colour",
                                           *(f"where the outlined label looks: {name}" for name in names.values())])
    for arm, name in names.items():
        band, colour = seed_bands(known[known["arm"] == arm]).dropna(), arm_look(arm)[0]
        around = {"x": [*band["step"], *band["step"][::-1]],
                  "y": [*band["high"].clip(0, 1), *band["low"].clip(0, 1)[::-1]]}
        figure.add_trace(go.Scatter(**around, fill="toself", mode="lines", line={"width": 0}, fillcolor=colour,
                                    opacity=0.15, showlegend=False), row=1, col=1)
        figure.add_trace(go.Scatter(x=band["step"], y=band["mean"], mode="lines", line={"color": colour, "width": 3}),
                         row=1, col=1)
        figure.add_annotation(x=band["step"].iloc[-1], y=band["mean"].iloc[-1], text=f"<b>{name}</b>", showarrow=False,
                              xanchor="right", yanchor="bottom", yshift=4, font={"color": colour}, row=1, col=1)
    source, *size = png_source(drawn[0]["image"], faded=True)
    for column, values in enumerate(maps.values(), start=2):
        draw_page(figure, (1, column), source, size)
        figure.add_trace(over(values, size, "coloraxis", "attention"), row=1, col=column)
        outline(figure, (1, column), place, values.shape, size)
        figure.update_xaxes(visible=False, constrain="domain", row=1, col=column)
        figure.update_yaxes(visible=False, autorange="reversed", scaleanchor=f"x{column}", constrain="domain", row=1,
                            col=column)
    most = max(float(values.max()) for values in maps.values())
    figure.update_layout(coloraxis={"colorscale": see_through("attention"), "cmin": 0, "cmax": most,
                                    "colorbar": colour_bar("attention")})
    figure.update_xaxes(title_text="optimiser step, from random weights", row=1, col=1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.1], tickvals=[0, 0.25, 0.5, 0.75, 1], row=1, col=1)
    counted = known.groupby("arm")["seed"].nunique().min()
    subtitle = (f"224 px pages, {counted} trainings of each arm with the same pages in the same order; bands hold 95 % "
                f"of the mean. Maps: one page, last layer but one, mean over heads, first training; one scale.")
    in_style(figure, "From nothing, an encoder with structure learns what belongs to what", subtitle, 330, above=26,
             width=1060)
    return figure.update_layout(showlegend=False, margin={"l": 60, "r": 90}).update_annotations(font={"size": 13})


FIGURES = {
    "finding": (finding_figure, 1060),
    "explorer": (explorer_figure, 1000),
    "main_table": (lambda: table_figure(json.loads((REFERENCE / "finetune" / "metrics.json").read_text())), 900),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        draw, width = FIGURES[name]
        print(save_figure(draw(), PICTURES / name, ("png",), width=width)[0])
