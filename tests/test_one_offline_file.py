"""The offline file of the explorer: it shows what `look` computes, asks the network for nothing, answers at once, fits
a telephone, and shows hostile texts as they are."""
import json

import numpy as np
import pytest
from PIL import Image

from sfa_core.core.paths import REPOSITORY
from sfa_core.documents.generate import documents, make_document
from sfa_core.documents.samples import Sample, samples
from sfa_core.figures.page import LARGEST_FILE, save_explorer
from sfa_core.figures.views import Choice, Recorder, look
from sfa_core.models.load import load_model
from sfa_core.models.miniatures import miniature
from sfa_core.models.pages import pages_for
from sfa_core.runs.commands import main

HOSTILE = '</script><script>window.hit = 1</script><img src=x onerror="window.hit = 1">'


def opened(browser, path, width=1280):
    "Open a file as a reader does, with what it asked for and what went wrong."
    page, asked, errors = browser.new_page(viewport={"width": width, "height": 900}), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(path.as_uri())
    page.wait_for_function("window.shown && document.querySelectorAll('canvas').length > 1")
    return page, asked, errors


def shown(page):
    "Return the maps that are on the screen."
    return [np.array(values, dtype=float).reshape(rows, columns) for values, rows, columns in page.evaluate(
        "window.shown.maps.map(m => [Array.from(m.values, v => Number.isNaN(v) ? null : v), m.rows, m.columns])")]


def family_pages(family):
    if family == "embedded":
        return load_model("embedded"), samples(documents(1, 7_410))[:2]
    if family == "embedded_page":
        bundle = load_model("embedded_page")
        return bundle, samples(pages_for(bundle, 1, seed=7_410))[:2]
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (60, 110, 3), dtype=np.uint8))
    return miniature(family), [Sample("a", "page", "own", "What is the value of red?", ("3",), image)]


@pytest.mark.parametrize("family", ["embedded", "embedded_page", "llava_onevision", "qwen2_5_vl"])
def test_the_file_shows_what_is_computed(family, browser, tmp_path):
    bundle, asked = family_pages(family)
    recorder = Recorder(bundle, max_new_tokens=4)
    path = save_explorer(recorder, asked, tmp_path / "page.html")
    assert path.stat().st_size <= LARGEST_FILE
    page, requests, errors = opened(browser, path)
    recorded = recorder.page(asked[0])
    width, height = recorded.image.size
    depth = next(iter(recorded.vision.values())).entropy.shape[1]
    for choice in (Choice(), Choice(layer=depth - 1, head=1, place=(0.3 * width, 0.6 * height)),
                   Choice("language", layer=1, word=1), Choice(layer=1, sinks=False)):
        x, y = choice.place or (width / 2, height / 2)
        changes = dict(tower=choice.tower, layer=choice.layer, head=-1 if choice.head is None else choice.head, x=x,
                       y=y, word=choice.word, sinks=choice.sinks)
        page.evaluate(f"window.choose({json.dumps(changes)})")
        for here, there in zip(shown(page), look(recorder, recorded, choice).maps.values(), strict=True):
            np.testing.assert_array_equal(np.isnan(here), np.isnan(there))
            assert np.nanmax(np.abs(here - there)) <= np.nanmax(there) / 100
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == [] and errors == []
    page.close()


def test_a_click_shows_its_map_at_once(browser, tmp_path):
    bundle, asked = family_pages("embedded")
    recorder = Recorder(bundle)
    page, _, errors = opened(browser, save_explorer(recorder, asked, tmp_path / "page.html", causal=True))
    took = []
    for part in (0.2, 0.4, 0.6, 0.8, 0.55):
        box = page.locator("canvas").first.bounding_box()
        page.mouse.click(box["x"] + part * box["width"], box["y"] + part * box["height"])
        took.append(page.evaluate("window.took"))
    side = recorder.page(asked[0]).image.width
    expected = look(recorder, recorder.page(asked[0]), Choice(place=(0.55 * side, 0.55 * side))).maps["baseline"]
    assert np.abs(shown(page)[0] - expected).max() <= expected.max() / 100
    assert np.median(took) < 50, took
    page.get_by_role("button", name="hide one patch").click()
    found = recorder.page(asked[0]).causal["baseline"].loss
    np.testing.assert_allclose(shown(page)[0], found, atol=1e-6)
    assert page.locator("#notes").inner_text().startswith("baseline: ") and errors == []
    page.close()


def test_two_arms_stand_beside_their_difference_and_their_bias(browser, tmp_path):
    bundle, asked = family_pages("embedded")
    arms = {arm: REPOSITORY / "exports" / "reference" / "arms" / arm for arm in ("control", "vision")}
    recorder = Recorder(bundle, arms)
    page, _, errors = opened(browser, save_explorer(recorder, asked[:1], tmp_path / "page.html"))
    captions = page.locator("figcaption").all_inner_texts()
    assert captions[0] == "page" and captions[1:3] == ["control", "control + SFA"]
    assert captions[3].startswith("difference") and captions[4].startswith("structural bias")
    view = look(recorder, recorder.page(asked[0]), Choice())
    bias = np.array(page.evaluate("Array.from(window.shown.bias.values)")).reshape(view.bias.shape)
    assert np.abs(bias - view.bias).max() < 1e-4 * np.abs(view.bias).max() and errors == []
    page.close()


def test_it_fits_a_telephone(browser, tmp_path):
    bundle, asked = family_pages("embedded")
    page, _, _ = opened(browser, save_explorer(bundle, asked, tmp_path / "page.html"), width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_hostile_texts_are_shown_as_they_are(browser, tmp_path):
    bundle, asked = family_pages("embedded")
    sample = Sample(HOSTILE, HOSTILE, "own", HOSTILE, (HOSTILE,), asked[0].image)
    page, _, errors = opened(browser, save_explorer(bundle, [sample], tmp_path / "page.html", title=HOSTILE))
    assert page.evaluate("window.hit") is None and errors == []
    assert HOSTILE in page.locator("h1").inner_text() and HOSTILE in page.locator("option").first.inner_text()
    page.close()


def test_the_command_asks_about_a_picture_and_refuses_half_a_question(tmp_path, capsys):
    page = tmp_path / "page.png"
    Image.fromarray(make_document("table", 7_420).pixels).save(page)
    assert main(["demo", "--image", str(page), "--out", str(tmp_path / "a.html")]) == 2
    assert "question" in capsys.readouterr().err and not (tmp_path / "a.html").exists()
    assert main(["demo", "--image", str(tmp_path / "no.png"), "--question", "What?"]) == 2
    assert "no picture" in capsys.readouterr().err
    asked = ["--question", "List all values."]
    assert main(["demo", "--image", str(page), *asked, "--out", str(tmp_path / "a.html")]) == 0
    assert "List all values." in capsys.readouterr().out and (tmp_path / "a.html").stat().st_size < LARGEST_FILE
