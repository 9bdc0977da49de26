"""Every control of the explorer shows what was recorded, in a program and in a real JupyterLab with a real browser."""
import io
import json
from contextlib import nullcontext
from dataclasses import replace
from threading import Event

import nbformat
import numpy as np
import plotly.graph_objects as go
import pytest
from conftest import ROOT
from PIL import Image

from sfa_core.figures import views
from sfa_core.structure.inject import eject, inject, structures_of
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.embedded import EmbeddedConfig, build_processor
from sfa_core.figures.explorer import AttentionExplorer
from sfa_core.training.finetune import finetune
from sfa_core.training.arms import FinetuneConfig, load_arm
from sfa_core.models.load import load_model
from sfa_core.models.parts import structural_maps
from sfa_core.attention.probes import record
from sfa_core.figures.views import Choice, Recorder, look, view_figure

PLOT = "document.querySelector('.sfa-explorer .js-plotly-plot')"
QUESTION = ("text => document.querySelectorAll('.sfa-explorer "
            "select')[1].selectedOptions[0].text.replaceAll('\\u00a0', ' ') === text")


@pytest.fixture(scope="module")
def bundle():
    return load_model("embedded")


@pytest.fixture(scope="module")
def asked():
    return samples(documents(2, seed=11))


@pytest.fixture(scope="module")
def arms(bundle, tmp_path_factory):
    config = FinetuneConfig("vision", steps=1, batch_size=2, questions=2, learning_rate=1e-3, structure_rate=0.5)
    return {"baseline": None,
            "vision": finetune(bundle, documents(4, seed=1), config, tmp_path_factory.mktemp("arm"),
                               progress=False).arm}


@pytest.fixture(scope="module")
def both(bundle, arms):
    return Recorder(bundle, arms, max_new_tokens=4)


def test_two_arms_their_difference_and_the_bias(bundle, arms, both, asked):
    "The arms' maps are those of the model with and without the arm on it, which is given back as it was."
    page, choice = both.page(asked[0]), Choice(layer=3, head=2, place=(60.0, 40.0))
    view = look(both, page, choice)
    for arm, folder in arms.items():
        with (load_arm(bundle, folder) if folder else nullcontext()):
            seen = record(bundle, [asked[0]], queries="all")
            token = seen.token_at(0, 60, 40)
            assert np.allclose(view.maps[arm], seen.map(0, 3, token, head=2), atol=1e-6)
            assert np.allclose(view.entropy[arm], seen.entropy[0, :, 2, token], atol=1e-5)
            if folder:
                assert (
                    np.allclose(view.bias, structural_maps(bundle, 3, token, head=2)["combined"], atol=1e-6)
                    and np.abs(view.bias).max() > 1e-3
                )
    with pytest.raises(ValueError, match="call inject first"):
        structures_of(bundle)
    figure = view_figure(view)
    maps = [trace for trace in figure.data if isinstance(trace, go.Heatmap)]
    assert (
        len(maps) == 5
        and np.allclose(maps[3].z, view.maps["vision"] - view.maps["baseline"])
        and np.abs(maps[3].z).max() > 1e-4
    )
    assert [note.text for note in figure.layout.annotations][::-1][:4] == ["page", "baseline", "control + SFA",
                                                                           "difference"]


def test_words_are_drawn_on_the_page(bundle, asked):
    recorder = Recorder(bundle, max_new_tokens=4)
    page = recorder.page(asked[0])
    seen = record(bundle, [asked[0]], tower="language", max_new_tokens=4)
    for word in range(len(seen.words[0])):
        view = look(recorder, page, Choice("language", layer=1, head=3, word=word))
        assert np.allclose(view.maps["baseline"].ravel(), seen.maps[0, 1, 3, word], atol=1e-6) and view.bias is None


def test_a_large_model_records_a_place_when_it_is_asked_for(bundle, asked, monkeypatch):
    whole = look(recorder := Recorder(bundle), recorder.page(asked[0]), Choice(layer=1, place=(90, 20)))
    monkeypatch.setattr(views, "LIMIT", 1000)
    recorder = Recorder(bundle)
    page = recorder.page(asked[0])
    assert page.vision["baseline"].maps.size == 0
    part = look(recorder, page, Choice(layer=1, place=(90, 20)))
    assert (
        np.allclose(part.maps["baseline"], whole.maps["baseline"], atol=1e-6)
        and page.vision["baseline"].maps.shape[3] == 1
    )


def test_a_tile_is_drawn_where_it_is_and_the_thumbnail_over_all(bundle, asked):
    tiled = replace(bundle, processor=build_processor(bundle.tokenizer, EmbeddedConfig(), max_tiles=6))
    wide = replace(asked[0], source=asked[0].image.resize((336, 224)))
    recorder = Recorder(tiled, max_new_tokens=3)
    page = recorder.page(wide)
    cut = look(recorder, page, Choice(layer=2, place=(300, 200)))
    inside = np.zeros((16, 24), dtype=bool)
    inside[8:, 16:] = True
    assert (
        cut.maps["baseline"].shape == (16, 24)
        and (cut.maps["baseline"][~inside] == 0).all()
        and cut.maps["baseline"][inside].sum() > 0.5
    )
    assert cut.box[0] >= 224 and cut.box[2] - cut.box[0] == 14
    whole = look(recorder, page, Choice(layer=2, place=(300, 200), thumbnail=True))
    assert (whole.maps["baseline"][~inside] > 0).any() and whole.box[2] - whole.box[0] == 42


def test_hidden_sinks_are_left_out(bundle, asked, monkeypatch):
    monkeypatch.setattr(views, "SINK", 1.5)
    recorder = Recorder(bundle)
    page = recorder.page(asked[0])
    shown, hidden = (look(recorder, page, Choice(layer=0, sinks=sinks)).maps["baseline"] for sinks in (True, False))
    received = page.vision["baseline"].received[0, 0].mean(0)[1:]
    assert (
        np.array_equal(np.isnan(hidden).ravel(), received > 1.5 * received.mean())
        and np.isnan(hidden).any()
        and not np.isnan(shown).any()
    )


@pytest.mark.parametrize("wrong",
                         [{"layer": 4}, {"head": 4}, {"place": (112, 3)}, {"place": (-1, 3)},
                          {"tower": "language", "layer": 3}, {"word": -1}])
def test_a_choice_that_does_not_exist_is_refused(bundle, both, asked, wrong):
    with pytest.raises(ValueError, match="expected a layer below"):
        look(both, both.page(asked[0]), Choice(**wrong))


def test_own_questions_and_images(bundle, asked, tmp_path):
    explorer = AttentionExplorer(bundle, asked, folder=tmp_path, max_new_tokens=4)
    picture = io.BytesIO()
    Image.new("RGB", (300, 200), "white").save(picture, "PNG")
    view = explorer.ask("How many bars?", picture.getvalue())
    assert (
        view.page.image.size == (300, 200)
        and explorer.document.value.startswith("own-")
        and view.page.sample.question == "How many bars?"
    )
    buttons = [button.description for row in explorer.words.children for button in row.children[1:]]
    assert buttons == [word.strip() or "␣" for word in view.page.language["baseline"].words[0]]
    for question, image, message in (("  ", None, "the question is empty"),
                                     ("What?", b"no image", "cannot be decoded")):
        with pytest.raises(ValueError, match=message):
            explorer.ask(question, image)
    assert explorer.view is view
    with pytest.raises(ValueError, match="arms are a, b, c, expected one, or two"):
        Recorder(bundle, {"a": None, "b": None, "c": None})


def test_the_structure_of_a_model_that_carries_one_is_shown(bundle, asked):
    inject(bundle, seed=3)
    try:
        recorder = Recorder(bundle)
        view = look(recorder, recorder.page(asked[0]), Choice(layer=1, place=(5, 5)))
        assert np.allclose(view.bias, structural_maps(bundle, 1, 1)["combined"], atol=1e-6)
    finally:
        eject(bundle)


def test_a_picture_is_written_while_everything_else_goes_on(bundle, asked, tmp_path, monkeypatch):
    "The view is the one of the click, whatever is chosen meanwhile; what goes wrong is said where the mouse is."
    wait, views = Event(), []
    explorer = AttentionExplorer(bundle, asked, folder=tmp_path, max_new_tokens=4)
    clicked = explorer.choose(layer=1, head=2)
    monkeypatch.setattr("sfa_core.figures.explorer.save_figure",
                        lambda figure, path, formats, **size: wait.wait(30) and views.append(figure) or [path])
    writing = explorer.save_beside()
    assert explorer.save_button.disabled and writing.is_alive() and "saved" not in explorer.notes.value
    assert explorer.choose(layer=3).choice.layer == 3 and writing.is_alive()
    wait.set()
    writing.join(30)
    assert (
        f"saved {clicked.page.sample.id.replace('/', '_')}-vision-layer1-head2" in explorer.notes.value
        and not explorer.save_button.disabled
    )
    assert "layer 1, head 2" in views[0].layout.title.text and np.allclose(views[0].data[2].z, clicked.maps["baseline"])
    monkeypatch.setattr("sfa_core.figures.explorer.save_figure",
                        lambda *arguments, **size: (_ for _ in ()).throw(FileNotFoundError("png needs Chromium")))
    explorer.save_beside().join(30)
    assert "<b>not saved</b>: png needs Chromium" in explorer.notes.value and not explorer.save_button.disabled


CELLS = """import sys
sys.path.insert(0, {root!r})
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.figures.explorer import AttentionExplorer
from sfa_core.models.load import load_model
explorer = AttentionExplorer(load_model("embedded"), samples(documents(2, seed=11)), folder={folder!r}, max_new_tokens=4)
explorer"""  # noqa: E501


def shown(page):
    "What the browser's own copy of the figure holds: the map of the arm, the square, the title, the pages."
    return json.loads(
        page.evaluate(f"""() => {{ const p = {PLOT}, d = p._fullData;
        return JSON.stringify({{z: d[2].z.map(row => Array.from(row)), x: Array.from(d[1].x || []),
                                title: p._fullLayout.title.text,
                                pages: p._fullLayout.images.map(image => [image.source, image.sizex, image.sizey]),
                                right: p._fullLayout.xaxis2.range[1], bottom: p._fullLayout.yaxis2.range[0]}}) }}""")
    )


def wait_for_title(page, text):
    page.wait_for_function(f"text => {PLOT}?._fullLayout?.title?.text?.includes(text)", arg=text, timeout=60_000)
    page.wait_for_timeout(300)


def test_explorer_answers_the_mouse_in_jupyterlab(bundle, asked, run_in_lab, tmp_path):
    """Slider, dropdown, click on the map, click on a word, own question: after each, the browser holds the numbers
    that the model gives for that choice."""
    notebook = tmp_path / "explore.ipynb"
    cell = nbformat.v4.new_code_cell(CELLS.format(root=str(ROOT), folder=str(tmp_path)))
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), notebook)
    page = run_in_lab(notebook)
    page.wait_for_function(f"() => {PLOT}?._fullData?.length > 4", timeout=120_000)
    recorder = Recorder(bundle, max_new_tokens=4)

    def expect(sample, **choice):
        wanted = look(recorder, recorder.page(sample), Choice(**choice))
        found = shown(page)
        assert np.allclose(found["z"], wanted.maps["baseline"], atol=1e-5), choice
        below = [[source, *wanted.page.image.size] for source in (wanted.page.source, wanted.page.pale)]
        assert found["pages"] == below, "the page lies below the map, in grey"
        assert [found["right"],
                found["bottom"]] == pytest.approx([1.02 * side for side in wanted.page.image.size]), "all of it is seen"
        return found

    expect(asked[0])
    page.locator(".sfa-explorer .noUi-handle").first.focus()  # the slider
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    wait_for_title(page, "layer 2, mean over heads")
    expect(asked[0], layer=2)
    page.locator(".sfa-explorer select").nth(2).select_option("1")  # the dropdown of heads
    wait_for_title(page, "layer 2, head 1")
    expect(asked[0], layer=2, head=1)
    spot = page.evaluate(f"""() => {{ const p = {PLOT}, l = p._fullLayout, box = p.getBoundingClientRect();
        return [box.left + l.xaxis2._offset + l.xaxis2.d2p(90), box.top + l.yaxis2._offset + l.yaxis2.d2p(20)] }}""")
    page.mouse.move(spot[0] - 3, spot[1] - 3)
    page.mouse.move(*spot, steps=4)
    page.wait_for_timeout(400)
    page.mouse.click(*spot)  # on the map
    page.wait_for_function(f"() => {PLOT}._fullData[1].x[0] === 83.5", timeout=60_000)
    page.wait_for_timeout(300)
    expect(asked[0], layer=2, head=1, place=(91, 21))
    page.locator(".sfa-word").first.click()  # a word of the answer
    wait_for_title(page, "What the answer is read from: layer 2, head 1")
    assert expect(asked[0], tower="language", layer=2, head=1, word=0)["x"] == []
    page.locator(".sfa-explorer input[type=text]").first.fill("What is the largest value?")
    page.get_by_role("button", name="ask", exact=True).click()  # an own question
    own = replace(asked[0], id=f"{asked[0].document}/own-x", question="What is the largest value?", evidence=None)
    page.wait_for_function(QUESTION, arg="What is the largest value?", timeout=60_000)
    page.wait_for_timeout(500)
    expect(own, tower="language", layer=2, head=1)
    page.locator(".sfa-explorer select").first.select_option(asked[-1].document)  # another document
    other = next(sample for sample in asked if sample.document == asked[-1].document)
    page.wait_for_function(QUESTION, arg=other.question, timeout=60_000)
    page.wait_for_timeout(500)
    expect(other, tower="language", layer=2, head=1)
    picture = tmp_path / "own.png"
    asked[0].image.resize((168, 140)).save(picture)
    with page.expect_file_chooser() as chooser:
        page.locator(".sfa-explorer .jupyter-button", has_text="image").click()
    chooser.value.set_files(str(picture))  # an own image
    page.wait_for_function("() => document.querySelector('.sfa-explorer').innerText.includes('image (1)')",
                           timeout=30_000)
    page.locator(".sfa-explorer input[type=text]").first.fill("What is here?")
    page.get_by_role("button", name="ask", exact=True).click()
    page.wait_for_function(QUESTION, arg="What is here?", timeout=60_000)
    page.wait_for_timeout(500)
    expect(replace(own, id="own", question="What is here?", source=Image.open(picture)), tower="language", layer=2,
           head=1)
    page.locator(".sfa-explorer .js-plotly-plot").hover()
    with page.expect_download() as download:
        page.locator(".sfa-explorer .modebar-btn[data-title*='PNG']").click()  # the browser draws
    download.value.save_as(tmp_path / "camera.png")
    page.get_by_role("button", name="save picture").click()
    page.wait_for_function("() => document.querySelector('.sfa-explorer').innerText.includes('saved ')",
                           timeout=120_000)
    (saved,) = (path for path in tmp_path.glob("*.png") if path.name not in ("own.png", "camera.png"))
    height = view_figure(look(recorder, recorder.page(other), Choice())).layout.height
    assert Image.open(saved).size == Image.open(tmp_path / "camera.png").size == (2200, 2 * height)
    assert page.errors == []
