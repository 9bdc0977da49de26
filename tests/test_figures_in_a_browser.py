"""Every figure of the rendered pages, drawn by a browser: no text stands on another, and none is cut off."""
import json
from pathlib import Path

import nbformat
import plotly
import plotly.graph_objects as go
import pytest

from sfa_core.figures.style import in_style

RENDERED = Path(__file__).resolve().parents[1] / "exports" / "rendered"
PLOTLY = "application/vnd.plotly.v1+json"
WIDTH = 860  # pixels that a figure has at least on a desktop of 1280: theme/sfa.css makes room for it

# Boxes of all texts that are shown: a text over another counts where both share more than a fifth of the smaller one.
LOOK = """async ([data, layout, width]) => {
  const place = document.getElementById("figure");
  Plotly.purge(place);
  await Plotly.newPlot(place, data, {...layout, width, autosize: false}, {staticPlot: true});
  const frame = place.querySelector(".main-svg").getBoundingClientRect(), seen = [];
  for (const text of place.querySelectorAll(".main-svg text")) {
    const style = getComputedStyle(text), box = text.getBoundingClientRect();
    if (!text.textContent.trim() || box.width < 1 || style.visibility === "hidden" || text.closest(".table")) continue;
    let faint = false;
    for (let e = text; e && e !== place; e = e.parentElement)
      faint ||= Number(getComputedStyle(e).opacity) < 0.05 || getComputedStyle(e).display === "none";
    const turn = (text.getAttribute("transform") || "").match(/rotate\\((-?[1-9][\\d.]*)/);
    if (!faint) seen.push({text: text.textContent.trim(), turn: turn && turn[1], left: box.left, right: box.right, top: box.top, bottom: box.bottom});
  }
  const found = [];
  for (const [i, a] of seen.entries()) {
    if (a.left < frame.left - 2 || a.right > frame.right + 2 || a.top < frame.top - 2 || a.bottom > frame.bottom + 2)
      found.push(`cut off: ${a.text}`);
    for (const b of seen.slice(i + 1)) {
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      const size = (t) => (t.right - t.left) * (t.bottom - t.top);
      if (a.turn && a.turn === b.turn) continue;  // slanted labels beside each other: their boxes meet, they do not
      if (across > 2 && down > 3 && across * down > 0.2 * Math.min(size(a), size(b)))
        found.push(`on each other: ${a.text} | ${b.text}`);
    }
  }
  return found;
}"""  # noqa: E501


def figures_of(study):
    cells = nbformat.read(RENDERED / f"{study}.ipynb", 4).cells
    return [output["data"][PLOTLY] for cell in cells for output in cell.get("outputs", []) if PLOTLY in
            output.get("data", {})]


def title_of(figure):
    title = figure["layout"].get("title", {})
    return (title.get("text", "") if isinstance(title, dict) else title).split("<br>")[0]


@pytest.fixture(scope="module")
def canvas(browser):
    page = browser.new_page(viewport={"width": WIDTH + 40, "height": 1200})
    page.set_content('<div id="figure"></div>')
    page.add_script_tag(path=Path(plotly.__file__).parent / "package_data" / "plotly.min.js")
    yield lambda figure: page.evaluate(LOOK, [figure["data"], figure["layout"], WIDTH])
    page.close()


@pytest.mark.parametrize("study", sorted(path.stem for path in RENDERED.glob("*.ipynb")))
def test_no_text_of_a_figure_is_covered_or_cut_off(study, canvas):
    assert {title_of(figure): found for figure in figures_of(study) if (found := canvas(figure))} == {}


def test_texts_on_each_other_and_cut_off_texts_are_noticed(canvas):
    figure = go.Figure(go.Scatter(x=[0, 1], y=[0, 1]))
    plain = json.loads(in_style(figure, "A title", "One sentence.").to_json())
    assert canvas(plain) == []
    for x, text in ((0.5, "covered"), (0.98, "a long text that ends outside of the picture " * 3)):
        figure.add_annotation(x=x, y=0.5, xref="paper", yref="paper", text=text, showarrow=False, xanchor="left")
    figure.add_annotation(x=0.5, y=0.5, xref="paper", yref="paper", text="covering", showarrow=False, xanchor="left")
    found = canvas(json.loads(figure.to_json()))
    assert [line.split(":")[0] for line in found] == ["on each other", "cut off"]
