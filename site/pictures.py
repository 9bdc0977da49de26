"""Draw the pictures that README.md shows, from committed results and from the model that ships.

    python site/pictures.py [NAME ...]    writes finding.png and the others of FIGURES to exports/reference/pictures

The finding is drawn from the committed curves and encoders of 61_binding_from_nothing, the views of the explorer from
the model for larger pages. Needs Chromium.
"""
import sys

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sfa_core.attention.probes import record
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.answers import answer
from sfa_core.interventions.hiding import hide_patches
from sfa_core.models.load import load_model
from sfa_core.models.pages import pages_for
from sfa_core.core.paths import REPOSITORY
from sfa_core.figures.learning import seed_bands
from sfa_core.figures.style import (
    ARM_NAMES,
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
from sfa_core.pretraining.dynamics import read_dense_encoder
from sfa_core.runs.curves import curve_table, read_curves

REFERENCE = REPOSITORY / "exports" / "reference"
PICTURES = REFERENCE / "pictures"


def explorer_figure():
    """Draw three of the explorer's views of a table of eight rows that the larger model reads right: the page, where a
    patch of the answer looks, and what the answer loses without each patch."""
    bundle = load_model("embedded_page")
    drawn = pages_for(bundle, 300, seed=7_351, kinds=("table",))
    asked = samples(drawn.filter(lambda table: len(table) == 9, input_columns="table"), kinds=("read_cell",))
    replies = answer(bundle, asked[:24], max_new_tokens=8)
    sample, said = next((one, reply.prediction.strip()) for one, reply in zip(asked, replies)
                        if reply.prediction.strip() in one.answers)
    left, top, right, bottom = sample.evidence.texts[sample.evidence.answer[0]].box
    seen = record(bundle, [sample], queries="all")
    token = seen.token_at(0, (left + right) / 2, (top + bottom) / 2)
    looks, needed = seen.map(0, seen.layers[-2], token), hide_patches(bundle, sample, said)
    place = int(seen.grid.row[token]), int(seen.grid.column[token])
    figure = make_subplots(1, 3, horizontal_spacing=0.03, subplot_titles=[
        "the page", "where the outlined patch looks", "what the answer loses without a patch"])
    for panel, values in enumerate((None, looks, needed.loss), start=1):
        source, *size = png_source(sample.image, faded=panel > 1)
        draw_page(figure, (1, panel), source, size)
        if panel > 1:
            figure.add_trace(over(values, size, f"coloraxis{panel}", ("attention", "loss, nats")[panel - 2]), 1, panel)
        if panel < 3:
            outline(figure, (1, panel), place, looks.shape, size)
        figure.update_xaxes(visible=False, constrain="domain", row=1, col=panel)
        figure.update_yaxes(visible=False, autorange="reversed", scaleanchor=f"x{panel}", constrain="domain", row=1,
                            col=panel)
    most = float(needed.loss.max())
    figure.update_layout(
        coloraxis2={"colorscale": see_through("attention"), "cmin": 0, "cmax": float(looks.max()), "showscale": False},
        coloraxis3={"colorscale": see_through("difference"), "cmin": -most, "cmax": most, "showscale": False})
    in_style(figure, f"{sample.question} It says {said}.",
             "embedded_page, a table of eight rows that it reads right. Middle: attention in the encoder, last layer "
             "but one, mean over heads. Right: red patches are those that the answer needs.", 310, above=26, width=1000)
    return figure.update_layout(margin={"l": 20, "r": 20}).update_annotations(font={"size": 13})


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


def finding_figure(phone=False):
    """Draw the first finding: how fast label colour is learned with and without structure, and where both encoders
    look; side by side, or one below the other for a phone."""
    drawn = documents(1, seed=7_050, kinds=("bar",), preset="page")
    maps, place = looks_of_encoders(drawn)
    curves = curve_table([curve for curve in read_curves(REFERENCE / "curves") if curve.task == "16 x 16"])
    known = curves[curves["measure"] == "label_colour"]
    names = {arm: ARM_NAMES.get(arm, arm) for arm in maps}
    titles = ["label patches that know their bar's colour",
              *(f"where the outlined label looks: {name}" for name in names.values())]
    layout = (dict(rows=3, cols=1, row_heights=[0.28, 0.36, 0.36], vertical_spacing=0.07) if phone else
              dict(rows=1, cols=3, column_widths=[0.36, 0.32, 0.32], horizontal_spacing=0.03))
    figure = make_subplots(**layout, subplot_titles=titles)
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
    for panel, values in enumerate(maps.values(), start=2):
        at = (panel, 1) if phone else (1, panel)
        draw_page(figure, at, source, size)
        figure.add_trace(over(values, size, "coloraxis", "attention"), row=at[0], col=at[1])
        outline(figure, at, place, values.shape, size)
        figure.update_xaxes(visible=False, constrain="domain", row=at[0], col=at[1])
        figure.update_yaxes(visible=False, autorange="reversed", scaleanchor=f"x{panel}", constrain="domain",
                            row=at[0], col=at[1])
    most = max(float(values.max()) for values in maps.values())
    figure.update_layout(coloraxis={"colorscale": see_through("attention"), "cmin": 0, "cmax": most,
                                    "colorbar": colour_bar("attention")})
    figure.update_xaxes(title_text="optimiser step, from random weights", row=1, col=1)
    figure.update_yaxes(tickformat=".0%", range=[0, 1.1], tickvals=[0, 0.25, 0.5, 0.75, 1], row=1, col=1)
    counted = known[known["arm"].isin(names)].groupby("arm")["seed"].nunique().min()
    subtitle = (f"224 px pages, {counted} trainings of each arm with the same pages in the same order; bands hold 95 % "
                f"of the mean. Maps: one page, last layer but one, mean over heads, first training; one scale.")
    heading = "Structure helps from nothing" if phone else (
        "From nothing, an encoder with structure learns what belongs to what")
    in_style(figure, heading, subtitle, 1000 if phone else 330, above=26, width=360 if phone else 1060)
    return figure.update_layout(showlegend=False, margin={"l": 60, "r": 20 if phone else 90}).update_annotations(
        font={"size": 13}).update_coloraxes(showscale=not phone)


FIGURES = {
    "finding": (finding_figure, 1060),
    "finding_phone": (lambda: finding_figure(phone=True), 390),
    "explorer": (explorer_figure, 1000),
}

if __name__ == "__main__":
    for name in sys.argv[1:] or FIGURES:
        draw, width = FIGURES[name]
        print(save_figure(draw(), PICTURES / name, ("png",), width=width)[0])
