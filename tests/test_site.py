"""The site is drawn from the executed notebooks, without warnings and without the network."""
import re
import shutil
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import build_site
import nbformat
import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "notebooks" / "library").rglob("*.ipynb"))
STUDIES = sorted(ROOT.glob("notebooks/studies/*.ipynb"))


def code(path):
    cells = nbformat.read(path, 4).cells
    return [cell.source for cell in cells if cell.cell_type == "code"
            and "injected-parameters" not in cell.metadata.get("tags", [])]


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_rendered_study_is_the_study(study):
    rendered = build_site.RENDERED / study.name
    assert rendered.is_file(), f"{study.stem} is not rendered: `make rendered` executes it into exports/rendered"
    assert code(rendered) == code(study), f"{study.stem} has changed since it was rendered: run `make rendered`"
    text = rendered.read_text()
    assert (
        str(ROOT) not in text and "application/vnd.jupyter.widget" not in text and '"output_type": "error"' not in text
    )
    assert rendered.stat().st_size < 1_000_000, "a code host shows pages below 1 MB"


def test_nothing_is_rendered_that_is_no_study():
    assert {path.name for path in build_site.RENDERED.glob("*.ipynb")} <= {path.name for path in STUDIES}


@pytest.fixture(scope="module")
def site(executed, smoke_run, tmp_path_factory):
    "The site of the library, of the rendered studies, and of one study as it runs now."
    pages, folder = tmp_path_factory.mktemp("pages"), tmp_path_factory.mktemp("site")
    for source in [*sorted(build_site.NOTEBOOKS.glob("*.ipynb")), *LIBRARY]:
        target = pages / source.relative_to(build_site.NOTEBOOKS)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(executed(source), target)
    (pages / "studies").mkdir()
    for study in STUDIES:
        for path in build_site.RENDERED.glob(f"{study.stem}.*"):
            shutil.copy(path, pages / "studies")
    offline = smoke_run("40_attention_explorer") / build_site.OFFLINE
    shutil.copy(offline, pages / "studies" / "40_attention_explorer.html")
    fresh = nbformat.read(smoke_run(STUDIES[0].stem) / "notebook.ipynb", 4)
    (pages / "studies" / STUDIES[0].name).write_text(build_site.portable(fresh))
    return build_site.in_fork(build_site.build, pages, folder), pages


def test_a_notebook_that_fails_ends_neither_the_run_nor_the_site(tmp_path, monkeypatch, capsys):
    """One stops at a cell, one loses its process: both pages are drawn, those after them too; the command fails at
    the end and names both."""
    notebooks = tmp_path / "notebooks"
    broken = {"01_core/70_memory": "0 / 0", "02_documents/40_numbers": "6 * 7",
              "09_training/15_schedule": "import os\nos._exit(3)"}
    (notebooks / "library").mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# index")]),
                   notebooks / "index.ipynb")
    for name, source in broken.items():
        notebook = nbformat.read(ROOT / "notebooks" / "library" / f"{name}.ipynb", 4)
        exported = [cell for cell in notebook.cells if cell.source.startswith("#|")]
        notebook.cells = [notebook.cells[0], nbformat.v4.new_code_cell(source), *exported]
        (notebooks / "library" / name).parent.mkdir(exist_ok=True)
        nbformat.write(notebook, notebooks / "library" / f"{name}.ipynb")
    monkeypatch.setattr(build_site, "NOTEBOOKS", notebooks)
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path / "exports"))
    with pytest.raises(SystemExit) as ended:
        build_site.main(["site"])
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and err.splitlines()[-1].endswith(": 01_core/70_memory, 09_training/15_schedule")
    library = Path(out.strip()).parent / "library"
    shown = {name: BeautifulSoup((library / f"{name}.html").read_text(), "html.parser").select_one("article").text
             for name in broken}
    assert "ZeroDivisionError" in shown["01_core/70_memory"] and "42" in shown["02_documents/40_numbers"]
    assert [name for name, text in shown.items()
            if "stopped before its end" in text] == ["01_core/70_memory", "09_training/15_schedule"]


def test_site_has_a_page_for_every_notebook_and_asks_for_nothing_from_outside(site):
    html, pages = site
    for notebook in pages.rglob("*.ipynb"):
        page = html / notebook.relative_to(pages).with_suffix(".html")
        page = html / "map.html" if page.name == "index.html" else page
        text = page.read_text()
        assert not re.findall(r'(?:<script[^>]*src|<link(?![^>]*canonical)[^>]*href|<img[^>]*src)="(?:https?:)?//[^"]*',
                              text), page
        figures = sum(build_site.PLOTLY in output.get("data", {}) for cell in nbformat.read(notebook, 4).cells
                      for output in cell.get("outputs", []))
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


def test_the_explorer_without_a_kernel_is_on_its_page(site, browser):
    html, _ = site
    page = browser.new_page()
    page.goto((html / "studies" / "40_attention_explorer.html").as_uri())
    page.locator("iframe.sfa-offline").scroll_into_view_if_needed()
    inside = page.frame_locator("iframe.sfa-offline")
    inside.locator("canvas").nth(1).wait_for(timeout=30_000)
    inside.get_by_role("button", name="language model").click()
    assert "word 1 of" in inside.locator("#notes").inner_text()
    page.close()


def test_no_link_is_broken(site):
    "Every link of every page leads to a file of the site, and to a place on that page where it names one."
    html, _ = site
    texts = {page: page.read_text() for page in html.rglob("*.html")}
    places = {page: set(re.findall(r'<[a-z][^<>]* id="([^"]+)"', text)) for page, text in texts.items()}
    broken, seen = [], 0
    for page, text in texts.items():
        for tag, link in re.findall(r'(<a\b[^<>]* href="([^"]*)"[^<>]*>)', text):
            address, _, place = unquote(unescape(link)).partition("#")
            if re.match(r"[a-z]+:", address):
                continue
            target, seen = (page.parent / address).resolve() if address else page, seen + 1
            if (
                not target.is_file()
                or place
                and target in places
                and place not in places[target]
                and 'class="skip-link"' not in tag
            ):
                broken.append((page.name, link))
    assert seen > 500 and broken == []


def test_the_side_bar_lists_modules_under_their_folders(site):
    html, _ = site
    bar = BeautifulSoup((html / "index.html").read_text(), "html.parser").select("nav.bd-links .caption-text")
    captions = [caption.text for caption in bar]
    assert captions == ["Start", "Studies", *build_site.flow.FLOW, "the package", "Reference"]


def test_index_shows_the_pipeline_and_the_api_lists_every_function(site):
    html, pages = site
    index = BeautifulSoup((html / "map.html").read_text(), "html.parser")
    stages = [link.text for link in index.select("#how-data-flows > blockquote a")]
    assert stages == list(build_site.flow.FLOW) and index.select_one("#how-data-flows img")["src"].endswith("all.svg")
    assert {page.stem for page in (html / "api").glob("*.html")} == set(build_site.flow.FLOW)
    listed = {link.text for page in (html / "api").glob("*.html")
              for link in BeautifulSoup(page.read_text(), "html.parser").select("article table a")}
    assert {
        "record",
        "AttentionRecord",
        "AttentionExplorer",
        "load_model",
        "evaluate",
        "make_document",
    } <= listed and len(listed) > 150


def test_no_formula_is_cut_off_on_a_desktop(site, browser):
    html, _ = site
    page, seen, cut = browser.new_page(viewport={"width": 1280, "height": 900}), 0, []
    for path in sorted(html.rglob("*.html")):
        if '<div class="math">' in path.read_text():
            page.goto(path.as_uri(), wait_until="domcontentloaded")
            widths = page.evaluate("() => [...document.querySelectorAll('div.math')].map(e => [e.scrollWidth, "
                                   "e.clientWidth])")
            seen, cut = seen + len(widths), cut + [(path.name, needed, there)
                                                   for needed, there in widths if needed > there]
    page.close()
    assert seen > 10 and cut == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1400, 390], ids=["wide", "phone"])
def test_pages_fit_the_screen_and_search_finds(site, browser, width, dark):
    html, _ = site
    page, errors = browser.new_page(viewport={"width": width, "height": 900},
                                    color_scheme="dark" if dark else "light"), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((html / "index.html").as_uri())
    assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth + 1"), (
        "the page is wider than the screen"
    )
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, "
                               "3).map(Number)")
    assert (sum(background) < 200) == dark
    page.goto((html / "search.html").as_uri() + "?q=wilson")
    page.locator("#search-results li a").first.wait_for(timeout=30_000)
    assert (
        any("15_intervals" in link.get_attribute("href") for link in page.locator("#search-results li a").all())
        and errors == []
    )
    page.close()


def test_search_results_show_where_the_words_stand(site, browser):
    "On a page that is opened from a folder, too: nothing is fetched."
    html, _ = site
    page = browser.new_page()
    page.goto((html / "search.html").as_uri() + "?q=mcnemar")
    page.locator("#search-results .sfa-excerpt b").first.wait_for(timeout=30_000)
    results, excerpts = page.locator("#search-results li").count(), page.locator("#search-results .sfa-excerpt")
    assert excerpts.count() >= results / 2 > 0
    assert "mcnemar" in excerpts.first.inner_text().lower() and len(excerpts.first.inner_text()) < 400
    page.close()


def test_the_first_page_is_one_screen_and_has_three_doors(site, browser):
    "Question, findings, figure and the three doors, on a desktop without scrolling; on a phone nothing is cut off."
    html, _ = site
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto((html / "index.html").as_uri())
    doors = page.locator(".sd-card")
    assert doors.count() == 3 and page.locator("article li").count() == len(build_site.findings.FIRST)
    end = max(box["y"] + box["height"] for box in (door.bounding_box() for door in doors.all()))
    assert end <= 900, f"the doors end at {end:.0f} px"
    page.set_viewport_size({"width": 390, "height": 844})
    picture = page.locator("article picture img")
    assert picture.evaluate("image => image.currentSrc").endswith("finding_phone.png")
    assert page.evaluate("() => [...document.querySelectorAll('article p, article li, article img')]"
                         ".every(e => e.getBoundingClientRect().right <= innerWidth)")
    page.close()


def test_every_page_names_its_commit_and_a_study_its_run(site):
    html, _ = site
    for path in html.rglob("*.html"):
        text = path.read_text()
        if 'class="bd-footer-content' in text or "extra_footer" in text or "<article" in text:
            assert f"Drawn from commit <code>{build_site.commit()}</code>" in text, path.name
    known = build_site.json.loads(build_site.STAGE_SECONDS.read_text())
    assert len(known) >= 15  # pages that were made before their run was noted name none
    for study in known:
        assert f"<code>{known[study]['run']}</code>" in (html / "studies" / f"{study}.html").read_text(), study


def test_pages_are_light(site):
    "Beside the script that all share, no page is larger than 400 KB."
    html, _ = site
    large = {path.name: path.stat().st_size for path in html.rglob("*.html")
             if path.stat().st_size > 400_000 and not path.name.endswith(".offline.html")}
    assert large == {}


def test_the_explorer_fits_a_phone(site, browser):
    html, _ = site
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto((html / "studies" / "40_attention_explorer.html").as_uri())
    frame = page.locator("iframe.sfa-offline")
    frame.scroll_into_view_if_needed()
    page.frame_locator("iframe.sfa-offline").locator("canvas").nth(1).wait_for(timeout=30_000)
    inside = frame.element_handle().content_frame()
    assert inside.evaluate("() => document.documentElement.scrollWidth <= innerWidth + 1")
    assert frame.bounding_box()["width"] > 330
    page.close()


def test_a_slider_on_the_site_changes_its_figure(site, browser):
    html, _ = site
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.goto((html / "library" / "11_figures" / "30_attention.html").as_uri())
    figure = page.locator(".sfa-plotly:has(.slider-container)").first
    figure.locator(".slider-grip-rect").wait_for(timeout=30_000)
    figure.scroll_into_view_if_needed()
    before, (last, steps) = (figure.evaluate("f => JSON.stringify(f._fullData.filter(t => t.type == 'heatmap').map(t "
                                             "=> Array.from(t.z[0])))"),
                             figure.evaluate("f => [f._transitionData._frames.length - 1, "
                                             "f._fullLayout.sliders[0].steps.length]"))
    rail = figure.locator(".slider-rail-touch-rect").bounding_box()
    page.mouse.click(rail["x"] + rail["width"] - 3, rail["y"] + rail["height"] / 2)
    page.wait_for_function("f => f._fullLayout.sliders[0].active > 0", arg=figure.element_handle(), timeout=30_000)
    page.wait_for_timeout(300)
    after = figure.evaluate("f => JSON.stringify(f._fullData.filter(t => t.type == 'heatmap').map(t => "
                            "Array.from(t.z[0])))")
    assert last == steps - 1 >= 1 and after != before
    page.close()
