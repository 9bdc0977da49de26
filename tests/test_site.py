"""The site is drawn from the executed notebooks, without warnings and without the network."""
import re
import shutil
from pathlib import Path

import build_site
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted(ROOT.glob("notebooks/library/*.ipynb"))
STUDIES = sorted(ROOT.glob("notebooks/studies/*.ipynb"))


def code(path):
    cells = nbformat.read(path, 4).cells
    return [cell.source for cell in cells if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_rendered_study_is_the_study(study):
    rendered = build_site.RENDERED / study.name
    assert rendered.is_file(), f"{study.stem} is not rendered: `make rendered` executes it into exports/rendered"
    assert code(rendered) == code(study), f"{study.stem} has changed since it was rendered: run `make rendered`"
    text = rendered.read_text()
    assert str(ROOT) not in text and "application/vnd.jupyter.widget" not in text and '"output_type": "error"' not in text
    assert len(text) < 8_000_000


def test_nothing_is_rendered_that_is_no_study():
    assert {path.name for path in build_site.RENDERED.glob("*.ipynb")} <= {path.name for path in STUDIES}


@pytest.fixture(scope="module")
def site(executed, smoke_run, tmp_path_factory):
    "The site of the library, of the rendered studies, and of one study as it runs now."
    pages, folder = tmp_path_factory.mktemp("pages"), tmp_path_factory.mktemp("site")
    for source in [build_site.NOTEBOOKS / "index.ipynb", *LIBRARY]:
        target = pages / source.relative_to(build_site.NOTEBOOKS)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(executed(source), target)
    (pages / "studies").mkdir()
    for study in STUDIES:
        shutil.copy(build_site.RENDERED / study.name, pages / "studies")
    fresh = nbformat.read(smoke_run(STUDIES[0].stem) / "notebook.ipynb", 4)
    (pages / "studies" / STUDIES[0].name).write_text(build_site.portable(fresh))
    return build_site.build(pages, folder), pages


def test_site_has_a_page_for_every_notebook_and_asks_for_nothing_from_outside(site):
    html, pages = site
    for notebook in pages.rglob("*.ipynb"):
        page = html / notebook.relative_to(pages).with_suffix(".html")
        text = page.read_text()
        assert not re.findall(r'(?:<script[^>]*src|<link(?![^>]*canonical)[^>]*href|<img[^>]*src)="(?:https?:)?//[^"]*', text), page
        figures = sum(build_site.PLOTLY in output.get("data", {}) for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", []))
        assert text.count('class="sfa-plotly"') == figures, f"{page.name} shows every figure"
        assert "vnd.jupyter.widget" not in text


def test_figures_are_drawn_in_a_browser_that_opens_the_file(site, browser):
    html, _ = site
    shown = next(page for page in sorted(html.rglob("*.html")) if 'class="sfa-plotly"' in page.read_text())
    page, asked, errors = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(shown.as_uri())
    page.locator(".sfa-plotly .main-svg").first.wait_for(timeout=30_000)
    assert errors == [] and [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    page.close()
