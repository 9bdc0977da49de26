"""Text-dense against sparse: one draw per document, intervals that cover, and a control that finds nothing."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_rel

from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.models.load import load_model
from sfa_core.attention.probes import record
from sfa_core.attention.regions import by_region, paired_contrast, text_map, token_regions


def table(shift=0.0, n=20, seed=0, heads=1):
    draw = np.random.default_rng(seed)
    rows = []
    for sample in range(n):
        page = 3 * draw.normal()  # pages differ far more than regions do
        for head in range(heads):
            rows += [dict(document=f"d{sample}", layer=0, head=head, region=region,
                          value=page + draw.normal() + shift * (region == "text-dense"))
                     for region in ("text-dense", "sparse")]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seed", range(3))
def test_difference_and_interval_are_those_of_the_paired_t_test(seed):
    data = table(0.7, seed=seed)
    found = paired_contrast(data, by=()).iloc[0]
    wide = data.pivot(index="document", columns="region", values="value")
    known = ttest_rel(wide["text-dense"], wide["sparse"])
    assert np.allclose((found["low"], found["high"]), known.confidence_interval(0.95)) and np.isclose(
        found["effect"], known.statistic / np.sqrt(20)
    )


def test_intervals_cover_the_truth_as_often_as_they_say():
    found = [paired_contrast(table(0.5, n=12, seed=seed), by=()).iloc[0] for seed in range(400)]
    covered = np.mean([row["low"] < 0.5 < row["high"] for row in found])
    effect = np.mean([row["effect_low"] < 0.5 / np.sqrt(2) < row["effect_high"] for row in found])
    assert abs(covered - 0.95) < 0.035 and abs(effect - 0.95) < 0.05


def test_documents_without_one_region_are_counted():
    data = table(n=6)
    data = data[~((data["document"] == "d2") & (data["region"] == "sparse"))]
    found = paired_contrast(data)
    assert found["n"].tolist() == [5] and found["left_out"].tolist() == [1]


def test_questions_about_one_page_are_one_draw():
    data = table(0.7, heads=2)
    asked = pd.concat([data.assign(sample=data["document"] + question) for question in ("-q0", "-q1", "-q2")])
    pd.testing.assert_frame_equal(paired_contrast(asked), paired_contrast(data))


def test_a_record_of_several_questions_knows_their_pages():
    bundle = load_model("embedded")
    asked = samples(documents(3, seed=6))[::5]
    seen = record(bundle, asked)
    assert seen.document == tuple(sample.document for sample in asked) and len(set(seen.document)) < len(asked)
    split = by_region(seen, {sample.id: text_map(sample) for sample in asked})
    of = {sample.id: sample.document for sample in asked}
    assert (split["sample"].map(of) == split["document"]).all() and (seen.table()["sample"].map(of)
                                                                     == seen.table()["document"]).all()
    assert set(paired_contrast(split)["n"]) == {len(set(seen.document))}


def test_text_that_covers_a_token_makes_it_dense():
    boxes = np.array([[np.nan] * 4, [0, 0, 10, 10], [10, 0, 20, 10]])
    density = np.zeros((10, 20))
    density[:, 7:13] = 1  # 3 of 10 columns of either
    assert token_regions(boxes, density, 0.29).tolist() == ["special", "text-dense", "text-dense"]
    assert token_regions(boxes, density, 0.31).tolist() == ["special", "sparse", "sparse"]


def test_shuffled_labels_keep_their_number_and_lose_their_difference():
    bundle = load_model("embedded")
    asked = list({sample.document: sample for sample in samples(documents(24, seed=5))}.values())
    seen, densities = record(bundle, asked), {sample.id: text_map(sample) for sample in asked}
    real, control = (by_region(seen, densities, shuffle=seed) for seed in (None, 1))
    assert real.groupby(["tile", "region"])["n"].first().equals(control.groupby(["tile", "region"])["n"].first())
    assert (
        control["value"][control["region"] == "special"].tolist() == real["value"][real["region"] == "special"].tolist()
    )
    effects = [paired_contrast(part)["effect"].abs().mean() for part in (real, control)]
    assert effects[1] < 0.5 * effects[0]  # text does change attention in this model; labels alone do not


@pytest.mark.parametrize(("call", "message"), [
    (lambda: paired_contrast(table(), pair=("text-dense", "other")), "no row of region 'other', found sparse, "
                                                                     "text-dense"),
    (lambda: paired_contrast(table().drop(columns="document")), "expected document among them"),
    (lambda: paired_contrast(table(n=1)), "1 documents have both 'text-dense' and 'sparse', expected at least 2"),
])
def test_wrong_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
