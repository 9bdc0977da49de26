"""Draw the pictures that README.md shows, from committed results and from the model that ships.

    python site/pictures.py        writes explorer.png, main_table.png and attention.png to exports/reference/pictures

The table is that of the reference run of 30_finetune, the attention that of the tour's; the explorer shows
a page with the first seed of a trained arm from
exports/reference/arms where there is
one, else the model as it is. Needs Chromium.
"""
import json

import plotly.graph_objects as go

from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.load import load_model
from sfa_core.core.paths import REPOSITORY
from sfa_core.figures.style import ARM_COLOURS, ARM_NAMES, INK, in_style, save_figure
from sfa_core.figures.views import Choice, Recorder, look, view_figure

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


if __name__ == "__main__":
    metrics = json.loads((REFERENCE / "finetune" / "metrics.json").read_text())
    attention = go.Figure(json.loads((REFERENCE / "tour" / "figures" / "figure_3.json").read_text()))
    for name, figure, width in (("main_table", table_figure(metrics), 900), ("explorer", explorer_figure(), 1000),
                                ("attention", attention, 900)):
        print(save_figure(figure, PICTURES / name, ("png",), width=width)[0])
