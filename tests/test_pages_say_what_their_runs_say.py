"""The pages that are committed show figures that hold something, name runs that are committed beside them, and give
the numbers of those runs."""
import base64
import json
import re
from functools import cache
from pathlib import Path

import findings
import nbformat
import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import yaml

from sfa_core.runs.collect import (
    arm_rates,
    figure_index,
    figures_of,
    published_table,
)
from sfa_core.runs.known import all_runs, place_of, references, uncommitted
from sfa_core.scores.records import COLUMNS
from sfa_core.figures.charts import training_loss
from sfa_core.runs.results import out_folder, write_figure, write_json, write_metrics, write_records, write_table

ROOT = Path(__file__).resolve().parents[1]
REFERENCE, RENDERED = ROOT / "exports" / "reference", ROOT / "exports" / "rendered"
PLOTLY = "application/vnd.plotly.v1+json"
# made before their changes were committed; each is replaced when its study is written anew, and none is added here
LATER = {
    "embedded_model_shipped": "the training of the weights that ship, whose score is measured anew in embedded_model",
    "embedded_model_without_lookup": "an earlier recipe",
}


def facts(folder):
    return json.loads((folder / "provenance.json").read_text())


@cache
def page(study):
    return nbformat.read(RENDERED / f"{study}.ipynb", 4)


def values(array):
    "The numbers of a trace, which Plotly writes as a list or as base64."
    if isinstance(array, dict):
        return np.frombuffer(base64.b64decode(array["bdata"]), dtype=array["dtype"])
    return np.array([np.nan if value is None else value for value in array], dtype=float)


def constant_curves(figure):
    "Name the curves of three or more points whose values are all the same: a line drawn over the steps of a training."
    steps = any("step" in str(axis.get("title", {}).get("text", ""))
                for name, axis in figure["layout"].items() if name.startswith("xaxis"))
    found = []
    for trace in figure["data"] if steps or "loss" in str(figure["layout"].get("title", {})).lower() else []:
        if (
            trace.get("type", "scatter") == "scatter"
            and "lines" in trace.get("mode", "lines")
            and not trace.get("fill")
            and "y" in trace
        ):
            heights = values(trace["y"])
            if len(heights) >= 3 and len(set(heights[np.isfinite(heights)])) < 2:
                found.append(trace.get("name"))
    return found


def curves_of(study):
    return [output["data"][PLOTLY] for cell in page(study).cells
            for output in cell.get("outputs", []) if PLOTLY in output.get("data", {})]


@pytest.mark.parametrize("study", sorted(path.stem for path in RENDERED.glob("*.ipynb")))
def test_no_curve_of_a_page_is_constant(study):
    assert [constant_curves(figure) for figure in curves_of(study) if constant_curves(figure)] == []


def test_a_curve_of_zeros_is_noticed():
    log = pd.DataFrame(dict(step=[1, 11, 21], loss=[0.0, 0.0, 0.0]))
    assert set(constant_curves(training_loss({"encoder": log}).to_plotly_json())) == {"encoder"}
    assert constant_curves(training_loss({"encoder": log.assign(loss=[3.0, 2.0, 1.0])}).to_plotly_json()) == []


def test_references_are_of_committed_code():
    dirty = {folder.parent.name
             for folder in REFERENCE.glob("*/provenance.json") if facts(folder.parent)["git"]["dirty"] is not False}
    assert dirty == set(LATER), "a reference is made from a clean tree: commit, then run"


def test_every_run_on_the_report_is_a_reference_of_committed_code():
    text = json.dumps([output for cell in page("90_report").cells for output in cell.get("outputs", [])])
    # a count of operations has no letters
    named = {word for word in re.findall(r"(?<![0-9a-f])[0-9a-f]{12}(?![0-9a-f])", text) if not word.isdigit()}
    known = {facts(folder)["run"]
             for folder in references() if folder.is_relative_to(REFERENCE) and folder.name not in LATER}
    assert len(named) >= 8 and named <= known


@pytest.mark.parametrize("name, study", [
    ("tour", "00_tour"), ("embedded_model", "05_embedded_model"), ("tokens", "20_density_and_tokens"),
    ("finetune", "30_finetune"), ("page_model", "06_page_model"),
    ("real_answers", "51_real_answers"),
    ("grounding", "50_grounding"), ("binding", "52_where_binding_is_lost"),
    ("binding_from_nothing", "61_binding_from_nothing"),
    ("sinks", "55_sinks"), ("ablation", "60_ablation"), ("cost", "65_cost"),
    ("architectures", "70_cross_architecture"),
    ("baseline", "10_baseline_eval"), ("entropy", "45_entropy"), ("explorer", "40_attention_explorer")])
def test_a_reference_is_the_run_of_the_page_beside_it(name, study):
    run = facts(REFERENCE / name)
    assert run["study"] == study and f"runs/{study}/{run['run']}/" in (RENDERED / f"{study}.ipynb").read_text()


def test_card_gives_the_score_of_the_reference():
    card = " ".join((ROOT / "data" / "embedded_model" / "README.md").read_text().split())
    for row in json.loads((REFERENCE / "embedded_model" / "metrics.json").read_text())["reads"]:
        assert re.search(rf"\| {row['index']} \| +{row['n']:.0f} \| +{row['rate']:.3g} \| +{row['low']:.3g} \| "
                         rf"+{row['high']:.3g} \|", card), row["index"]


def test_the_score_is_taken_on_documents_that_chose_nothing():
    seeds = {folder.name: yaml.safe_load((folder / "parameters.yaml").read_text())["evaluation_seed"]
             for folder in REFERENCE.glob("embedded_model*")}
    training = json.loads((REFERENCE / "embedded_model_shipped" / "metrics.json").read_text())["recipe"][
        "document_seed"
    ]
    score = seeds.pop("embedded_model")
    assert len(seeds) >= 4 and score not in {training, *seeds.values()}
    assert f"documents of generator seed {score}" in (ROOT / "data" / "embedded_model" / "README.md").read_text()


# ---- the report


@pytest.fixture
def exports(tmp_path, monkeypatch):
    monkeypatch.setenv("SFA_EXPORTS", str(tmp_path))
    return tmp_path


def finished(exports, study, run, *, seeds=(None,), place="runs", dirty=False, started="2026-01-01"):
    "Write a finished run whose control and vision arms answered twenty questions about ten documents."
    folder = out_folder(str(exports / place / (study if place == "runs" else "") / run), study)
    rng, parts = np.random.default_rng(0), []
    for seed in seeds:
        for arm in ("control", "vision"):
            columns = dict(id=[str(i) for i in range(20)], document=[str(i // 2) for i in range(20)],
                           correct=rng.random(20) < 0.5, arm=arm, error="")
            rows = pd.DataFrame(columns).reindex(columns=[*COLUMNS, "arm"])
            rows = rows.assign(score=rows["correct"].astype(float), kind="read", question="?", prediction="1",
                               category="", truncated=False)
            parts.append(rows if seed is None else rows.assign(seed=seed))
    write_records(
        folder,
        pd.concat(parts).assign(answers=[["1"]] * 40 * len(seeds)).drop(columns=["strict", "lenient", "seconds"]),
    )
    write_metrics(folder, {"n": 20})
    (folder / "parameters.yaml").write_text("seed: 0\n")
    identity, git = run if place == "runs" else "f" * 12, dict(commit="a", dirty=dirty)
    write_json(folder / "provenance.json", dict(study=study, run=identity, started=started, wall_seconds=1.0, git=git))
    return folder


@pytest.mark.parametrize("seeds", [(None,), (0, 1)], ids=["one training", "two seeds"])
def test_an_arm_stands_beside_the_control_of_its_own_run(exports, seeds):
    table = arm_rates([finished(exports, "30_finetune", "0123456789ab", seeds=seeds)]).set_index("arm")
    assert (
        re.match(r"([+-]\d+\.\d|0\.0) \(", table.loc["vision", "minus control, points"])
        and table.loc["vision", "benchmark"] == "—"
    )


def test_references_of_uncommitted_code_are_left_out_and_the_newest_counts(exports):
    changed = finished(exports, "x", "c", place="reference", dirty=True)
    late, early = (finished(exports, "x", name, place="reference", started=f"2026-01-0{day}")
                   for name, day in (("a", 3), ("b", 2)))
    own = [run for run in all_runs() if run.is_relative_to(exports)]
    assert own == [early, late] and uncommitted(changed) and changed in references()
    assert place_of(late) == "x/" + "f" * 12


def test_a_table_is_that_of_the_study_asked_for(exports):
    runs = [finished(exports, study, run)
            for study, run in (("50_grounding", "0123456789ab"), ("60_ablation", "1123456789ab"))]
    for run in runs:
        write_table(run, "2", pd.DataFrame({"class": [run.name]}))
    assert published_table(runs, "2", "50_grounding")[1] == "50_grounding/0123456789ab"
    assert published_table(runs[1:], "2", "50_grounding")[1] == "60_ablation/1123456789ab"


@pytest.mark.parametrize("name, study", [
    ("tour", "00_tour"), ("tokens", "20_density_and_tokens"), ("finetune", "30_finetune"),
    ("explorer", "40_attention_explorer"), ("entropy", "45_entropy"),
    ("sinks", "55_sinks"), ("architectures", "70_cross_architecture")])
def test_the_numbered_figures_of_a_reference_are_those_of_its_page(name, study):
    cells = {number: cell for cell in page(study).cells
             for number in re.findall(r'write_figure\(out, "(\d+)", figure\)', cell.source)}
    kept = {drawn["number"]: drawn for drawn in figures_of(REFERENCE / name)}
    assert kept.keys() == cells.keys() and cells, "a reference keeps figures/figure_<number>.json of its run"
    assert {drawn["place"] for drawn in kept.values()} == {f"{study}/{facts(REFERENCE / name)['run']}"}
    for number, cell in cells.items():
        (drawn,) = (output["data"][PLOTLY] for output in cell.outputs if PLOTLY in output.get("data", {}))
        assert kept[number]["figure"] == {key: drawn[key] for key in ("data", "layout")}, number


def test_a_figure_is_found_by_its_number_and_an_unknown_number_is_refused(exports):
    run = finished(exports, "00_tour", "0123456789ab")
    assert figures_of(run) == []
    write_figure(run, "9", go.Figure(go.Scatter(y=[3, 2, 1])))
    (drawn,) = figures_of(run)
    assert (
        drawn["number"] == "9"
        and drawn["place"] == "00_tour/0123456789ab"
        and list(go.Figure(drawn["figure"]).data[0].y) == [3, 2, 1]
    )
    assert figure_index([drawn]).set_index("figure")["from"].loc[["8",
                                                                  "9"]].tolist() == ["no run yet",
                                                                                     "00_tour/0123456789ab"]
    with pytest.raises(ValueError, match="figure '11' is unknown, expected one of 1, 2"):
        write_figure(run, "11", go.Figure())


def test_readme_and_index_give_the_findings_of_the_references():
    "`make export` writes them anew when a reference changes."
    readme, index = (ROOT / "README.md").read_text(), json.loads((ROOT / "notebooks" / "index.ipynb").read_text())
    assert findings.readme(readme) == readme
    assert findings.index(json.loads(json.dumps(index))) == index
    for one in findings.findings():
        assert re.search(r"\d \(|\([+-]|\d %", one.text) and all((RENDERED / f"{name}.ipynb").is_file()
                                                               for name in one.studies), one.title


def test_the_title_of_a_finding_is_what_its_numbers_say():
    label, value = (findings.learned(measure) for measure in ("label_colour", "value_binding"))
    assert label["low"] > 0.3 and value["low"] > 0, "structure helps an encoder from nothing"
    shuffled = findings.learned("label_colour", arm="shuffled")
    assert abs(shuffled["difference"]) < 0.05 and shuffled["high"] < label["low"], "and it is the structure"
    tuned = findings.metrics("finetune")["vision_against_control"]
    assert tuned["outcome"] == "equivalent" and tuned["low"] < 0 < tuned["high"], "and not one that was taught before"
    moved = [one["size"] for one in findings.metrics("binding_from_nothing")["checks"].values()]
    assert findings.metrics("finetune")["check"]["size"] < 0.05 * min(moved), "whose bias hardly moves"
    groups = findings.metrics("binding")["groups"]
    counts = findings.metrics("grounding")["reports"]["baseline"]["counts"]
    assert groups["misread"] > 2 * groups["invented"] and counts["ungrounded"] > 2 * counts["misread_cell"]
    lost = {row["step"]: row for row in findings.metrics("binding")["lost"]}
    assert lost["language model"]["low"] > 0 > lost["encoder"]["low"] and lost["later"]["low"] > lost["encoder"]["high"]
    rows, tests, _ = findings.reduced()
    assert all(tests[f"density + guard - {name}"]["low"] > 0.05 for name in ("down-sampling", "random blocks"))
    assert min(rows[name]["rate"] for name in ("DivPrune", "FastV")) > rows["density + guard"]["rate"] + 0.05
    assert rows["density + guard"]["encoder_gflop"] > rows["full"]["encoder_gflop"], "the network costs more"
    replies = findings.metrics("real_answers")["corrected"]
    assert len(replies) == 2 and all(row["high"] < 0.5 for row in replies.values())
    pages = findings.metrics("page_model")
    steps, _ = findings.encoders_later()
    gaps = {row["measure"]: abs(row["difference"]) for row in pages["encoders"] if row["step"] == steps}
    printed = {row["measure"]: abs(row["vision"] - row["control"]) for row in pages["printed"]}
    assert gaps["label_colour"] < 0.1 and max(printed["value_binding"], printed["column_binding"]) < 0.1, "catches up"
    assert max((row for row in pages["effects"] if row["names"] == "all names"), key=lambda row: row["step"])["low"] > 0
    assert next(row for row in pages["ends"] if row["questions"] == "all reading")["low"] > 0, "and still reads more"
    assert all(ratio < 1.15 for name, ratio in findings.timings("cost")["encoder"].items() if "time" in name)
    assert findings.metrics("cost")["counted"]["1025 inference"]["low rank"]["peak_ratio"] > 2


def test_a_page_without_the_marks_of_the_findings_is_refused():
    with pytest.raises(ValueError, match="0 marks '<!-- findings -->'"):
        findings.readme("# nothing")
