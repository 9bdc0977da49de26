"""A causal map is the answer's loss on pages with holes, its scores have the chance they say, the lens is scored
against what is printed, and the explorer shows the map in the place of attention."""
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sfa_core.attention.lens import digit_tokens, floor_of, lens, lens_table, printed_digits
from sfa_core.attention.stages import LAST
from sfa_core.core.families import uniform_grid
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import Evidence, Sample, TextBox, samples
from sfa_core.figures.explorer import AttentionExplorer
from sfa_core.figures.views import Choice, Recorder, look, view_limits
from sfa_core.interventions.hiding import hide_patches, locate_evidence, map_table, paper_colour
from sfa_core.models.load import load_model
from sfa_core.models.miniatures import miniature
from sfa_core.models.sequences import answer_loss, answer_scores, training_batch

BOXES = uniform_grid(8, 8).boxes((0, 0, 112, 112))


@pytest.fixture(scope="module")
def asked():
    found = samples(documents(4, seed=12), kinds=("read_label", "read_cell"))
    return list({one.document: one for one in found}.values())


@pytest.mark.parametrize("name", ["internvl", "llava_onevision", "qwen3_vl"])
def test_a_map_is_the_loss_on_pages_with_holes(name, asked):
    bundle, sample = miniature(name), asked[0]
    found = hide_patches(bundle, sample, "12", cells=2, batch_size=3)
    page, scores = np.asarray(sample.image), []
    for row, column in (None, None), (0, 0), (0, 1), (1, 0), (1, 1):
        edited = page.copy()
        if row is not None:
            edited[56 * row : 56 * row + 56, 56 * column : 56 * column + 56] = paper_colour(sample.image)
        own = Sample("a", "a", "own", sample.question, ("12",), Image.fromarray(edited))
        loss = answer_loss(bundle.model, training_batch(bundle, [own]))[0].item()
        scores.append(-loss)
        assert math.isclose(answer_scores(bundle, [own])[0], -loss, rel_tol=1e-5)
    assert np.allclose(found.loss.ravel(), scores[0] - np.array(scores[1:]), atol=1e-4)
    assert np.abs(found.loss).max() > 1e-3
    assert math.isclose(found.score, scores[0], rel_tol=1e-5)


def test_what_cannot_be_hidden_is_refused(asked):
    bundle = miniature("internvl")
    with pytest.raises(ValueError, match="answer '', 8 cells per side"):
        hide_patches(bundle, asked[0], "", cells=8)
    with pytest.raises(ValueError, match="2 questions about 1 documents, expected one each"):
        answer_scores(bundle, [asked[0], asked[0]])


def marked(boxes):
    texts = tuple(TextBox("1", tuple(map(float, box)), "value") for box in boxes)
    known = Evidence((), texts, tuple(range(len(boxes))))
    return Sample("a", "a", "own", "?", ("1",), Image.new("RGB", (112, 112)), known)


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6), box=st.tuples(*[st.integers(0, 80)] * 2, *[st.integers(2, 30)] * 2),
       chosen=st.integers(1, 20))
def test_chance_is_that_of_random_cells(seed, box, chosen):
    x, y, wide, tall = box
    sample, rng, draws = marked([(x, y, x + wide, y + tall)]), np.random.default_rng(seed), []
    for _ in range(150):
        values = np.full(64, 0.1)
        values[rng.choice(64, chosen, replace=False)] = 1.0 + 1e-6 * rng.random(chosen)
        draws.append(locate_evidence(values, BOXES, sample))
    for score in ("pointing", "iou"):
        drawn = np.array([draw[score] for draw in draws])
        assert abs(drawn.mean() - draws[0][f"{score}_chance"]) < 5 * max(drawn.std(), 0.05) / math.sqrt(150)


def test_a_map_without_evidence_or_with_nothing_in_it():
    bare = Sample("a", "a", "own", "?", ("1",), Image.new("RGB", (112, 112)))
    assert locate_evidence(np.ones(64), BOXES, bare) is None
    found = locate_evidence(-np.ones(64), BOXES, marked([(0, 0, 10, 10)]))
    assert found["iou"] == 0 and found["iou_chance"] == 0
    rows = pd.DataFrame([dict(map="m", document=str(at)) | found for at in range(3)])
    assert map_table(rows)["mean"].tolist() == [found["pointing"], 0]


def test_a_patch_shows_the_digits_it_holds_half_of():
    texts = (TextBox("47", (10.0, 2.0, 30.0, 12.0), "value"), TextBox("9", (0.0, 60.0, 8.0, 70.0), "label"))
    sample = Sample("a", "a", "own", "?", ("47",), b"", Evidence((), texts, (0,)))
    shown = printed_digits(sample, np.array([[0, 0, 14, 14], [14, 0, 28, 14], [0, 56, 14, 70], [np.nan] * 4]))
    assert [np.flatnonzero(row).tolist() for row in shown] == [[], [4, 7], [], []]


def test_the_floor_of_the_lens_is_the_guess_at_other_pages():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(dict(document=rng.integers(0, 4, 30), digit=rng.integers(0, 10, 30),
                             printed=[tuple(rng.choice(10, 2, replace=False)) for _ in range(30)]))
    plain = [np.mean([own.digit in other.printed for other in rows.itertuples() if other.document != own.document])
             for own in rows.itertuples()]
    assert np.allclose(floor_of(rows), plain)
    assert floor_of(rows.assign(document=0)).isna().all()


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_the_lens_looks_at_patches_with_digits_whatever_the_batch(name, asked):
    bundle = miniature(name, texts=("What is the value of 0 1 2 3 4 5 6 7 8 9?",))
    assert len(set(digit_tokens(bundle))) == 10
    rows, single = lens(bundle, asked), lens(bundle, asked, batch_size=1)
    assert rows.drop(columns="floor").sort_values(["id", "layer", "site"], kind="stable").reset_index(drop=True).equals(
        single.drop(columns="floor").sort_values(["id", "layer", "site"], kind="stable").reset_index(drop=True))
    table = lens_table(rows)
    assert (table["n"] > 0).all() and set(table["stage"]) == {"projector", "language 1", "language 2"}
    assert (rows.loc[rows["site"] == LAST].groupby("stage").size() == len(asked)).all()


def test_the_explorer_shows_the_causal_map_and_comes_back(asked):
    bundle = load_model("embedded")
    explorer = AttentionExplorer(bundle, asked[:2])
    explorer.tower.value = "causal"
    said = "".join(explorer.view.page.language["baseline"].words[0])
    loss = hide_patches(bundle, asked[0], said).loss
    assert np.allclose(explorer.figure.data[2].z, loss, atol=1e-5) and np.abs(loss).max() > 0.1
    layout = explorer.figure.layout
    assert layout.coloraxis.cmin == -layout.coloraxis.cmax == -np.float32(np.abs(loss).max())
    assert layout.title.text == "What the answer loses without a patch" and "log-probability" in explorer.notes.value
    explorer.tower.value = "language"
    assert layout.coloraxis.cmin == 0 and layout.title.text.startswith("What the answer is read from")
    recorder = Recorder(bundle)
    page = recorder.page(asked[1])
    first, again = (look(recorder, page, Choice("causal", layer=at)).maps["baseline"] for at in (0, 2))
    assert first is again, "a page is hidden patch by patch once"
    assert view_limits(look(recorder, page, Choice("causal")))["coloraxis_colorbar_title_text"] == "loss, nats"
