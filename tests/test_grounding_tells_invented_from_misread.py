"""Hand-labelled replies get the category their definition gives them, and what holds for every document holds for
random ones."""

import json
import re
import runpy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sfa_core.documents.generate import documents
from sfa_core.documents.samples import Evidence, Sample, TextBox, samples
from sfa_core.scores.facts import facts
from sfa_core.core.paths import REPOSITORY
from sfa_core.documents.benchmarks import load_benchmark
from sfa_core.documents.chartqa import chart_evidence
from sfa_core.runs.ablation import source_documents
from sfa_core.documents.ocr import read_ocr, with_texts
from sfa_core.scores.grounding import CATEGORIES, categorise, chance_floor, classify, grounding_report, source_rule
from sfa_core.scores.audit import label_audit
from sfa_core.scores.metrics import relaxed_accuracy
from sfa_core.scores.records import Evaluation, make_records
from sfa_core.scores.intervals import mcnemar
from sfa_core.documents.numbers import read_numbers, rounds_to, stated_numbers
from sfa_core.scores.operations import NAMES, results, results_plainly
from sfa_core.scores.transitions import change_sentence, grounding_change, taxonomy_table, transition_matrix

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "data" / "grounding_cases.jsonl").read_text(encoding="utf-8").splitlines()
]
NOWHERE = (0.0, 0.0, 1.0, 1.0)
# A blank before the percent sign was labelled as a difference in writing; the published scorer reads "62 %" as a
# number, so it is simply right.
# A count was labelled as misread where its number is printed too; now what a question counts is no printed number.
# A result on two operands within 10 % of the right one was labelled as ungrounded; readers of real pages call it a
# slip, and the definition in exports/reference/verdict_labels/README.md follows them. So it does for "40 billion" on a
# page in billions, which is 40.0 written otherwise.
KNOWN_DISAGREEMENTS = {
    "020": ("format_only", "correct"),
    "306": ("scale_or_sign", "format_only"),
    "323": ("misread_cell", "count_error"),
} | {
    case: ("ungrounded", "calculation_error") for case in ("204", "230", "304")
}
fast = settings(max_examples=150, deadline=None)


def evidence_of_case(case):
    return Evidence(tuple(map(tuple, case["table"])),
                    tuple(TextBox(text, NOWHERE, role) for text, role in case["texts"]))


def table_of(cells, labels=None):
    header = ("", *(f"c{i}" for i in range(len(cells[0]))))
    return (header, *((f"row {chr(97 + r)}", *line) for r, line in enumerate(cells)))


def judge(question, answer, reply, *evidence):
    return classify(question, answer, reply, facts(*evidence))


# ---- hand labels


def test_agrees_with_the_hand_labels():
    wrong = {}
    for case in CASES:
        verdict = judge(case["question"], case["gold"], case["prediction"], evidence_of_case(case))
        assert verdict.reason and verdict.category in CATEGORIES
        if verdict.category != case["category"]:
            wrong[case["id"]] = (case["category"], verdict.category)
    assert wrong == KNOWN_DISAGREEMENTS
    assert len(CASES) >= 150 and 1 - len(wrong) / len(CASES) >= 0.98


def test_hand_labels_cover_every_category_and_every_level_of_evidence():
    counts = Counter(case["category"] for case in CASES)
    assert set(counts) == set(CATEGORIES) and min(counts.values()) >= 10 and all(case["why"] for case in CASES)
    assert {facts(evidence_of_case(case)).level for case in CASES} == set("ABCD")
    assert len({(c["document"], c["question"], c["gold"], c["prediction"]) for c in CASES}) == len(CASES)


@pytest.mark.parametrize("case", [c for c in CASES if c["category"] in ("misread_cell", "calculation_error")
                                  and c["id"] not in KNOWN_DISAGREEMENTS],
                         ids=lambda c: c["id"])
def test_a_verdict_points_to_the_numbers_that_decided_it(case):
    evidence, verdict = evidence_of_case(case), judge(case["question"], case["gold"], case["prediction"],
                                                      evidence_of_case(case))
    assert verdict.places
    for source, at in verdict.places:
        text = {"question": lambda at: case["question"], "text": lambda at: evidence.texts[at[1]].text,
                "cell": lambda at: evidence.table[at[1]][at[2]]}[
            source
        ](at)
        shown = read_numbers(text)
        if case["category"] == "misread_cell":
            assert any(
                rounds_to(value, n) or value in n.readings
                for n in stated_numbers(case["prediction"], case["question"])
                for s in shown
                for value in (*s.readings, s.face, s.value)
            )
        else:
            assert shown, "an operand is a number"


# ---- numbers


@fast
@given(st.integers(-(10**9), 10**9), st.integers(0, 4),
       st.sampled_from(["{}", "{}%", "${}", "{} people", "about {}.", "−"]))
def test_a_printed_number_is_read_back(digits, decimals, writing):
    assume(not (digits < 0 and writing == "−"))
    plain = f"{digits / 10**decimals:,.{decimals}f}"
    text = plain.replace("-", "−") if writing == "−" else writing.format(plain)
    (number,) = read_numbers(text)
    assert number.value == pytest.approx(digits / 10**decimals) and number.unit == pytest.approx(10.0**-decimals)


@fast
@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=40)
       | st.text(alphabet="0123456789.,-−%/ $kM만억()[]=e", max_size=30))
def test_any_text_is_read_without_error_into_finite_numbers(text):
    for number in (*read_numbers(text), *stated_numbers(text, text)):
        assert np.isfinite([number.value, number.unit, number.face, *number.readings]).all()
    classify("How many?", "3", text, facts(Evidence((), (TextBox(text, NOWHERE),))))


@fast
@given(st.floats(-1e6, 1e6, allow_nan=False), st.integers(0, 3))
def test_rounding_to_the_digits_shown_is_seen_and_one_more_step_is_not(value, decimals):
    shown = f"{value:.{decimals}f}"
    (number,) = read_numbers(shown)
    assume(abs(value) >= number.unit)
    assert rounds_to(value, number)
    assert not rounds_to(value + 1.01 * number.unit, number) and not rounds_to(value - 1.01 * number.unit, number)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,234,567.8", [1234567.8]),
        ("1.234.567,8", [1234567.8]),
        ("12,34,567", [1234567]),
        ("1 234 567", [1234567]),
        ("1’234", [1234]),
        ("１２３", [123]),
        ("−5%", [-5]),
        ("(1,200)", [-1200]),
        ("-$3.5bn", [-3.5e9]),
        ("2.5 million to 3 million", [2.5e6, 3e6]),
        ("5k", [5000]),
        ("5 km", [5]),
        ("3½", [3.5]),
        ("7 1/4", [7.25]),
        ("1조 2천억", [1.2e12]),
        ("3천만 원", [3e7]),
        ("12퍼센트", [12]),
        ("5월 3일", [5, 3]),
        ("’08", [8]),
        ("FY2019", []),
        ("H2O", []),
        ("3rd", []),
        ("10x", [10]),
        ("1e3", [1000]),
        ("2019/20", [2019, 20]),
        ("12/05/2019", [12, 5, 2019]),
        ("24/7", [24 / 7]),
        ("5-6-7", [5, 6, 7]),
        ("45²", [45]),
        ("$", []),
        (",", []),
        ("1,23", [1.23]),
        ("[1,23]", [1, 23]),
    ],
)
def test_writings_of_numbers(text, values):
    assert [n.value for n in read_numbers(text)] == pytest.approx(values)


# ---- operations


@fast
@given(st.sampled_from(sorted(NAMES)), st.lists(st.integers(-50, 50), max_size=9), st.data())
def test_fast_results_are_the_plain_ones(operation, numbers, data):
    lines = data.draw(st.lists(st.lists(st.sampled_from(range(len(numbers))), unique=True, max_size=6),
                               max_size=3)) if numbers else []
    plain = results_plainly(operation, numbers, lines)
    quick = results(operation, numbers, lines)
    assert sorted(value for value, _ in plain) == pytest.approx(quick.values.tolist())
    for reply in ("7", "0.5", "-3", "12.5"):
        (number,) = read_numbers(reply)
        close = {operands for value, operands in plain if rounds_to(value, number)}
        found = quick.find(number)
        assert (found in close) if found is not None else not close


def test_unknown_operation_is_refused():
    with pytest.raises(ValueError, match="unknown operation 'power', expected one of sum, difference"):
        results("power", [1, 2])


# ---- what holds for every document

CELL = st.integers(1, 99).map(str) | st.integers(10, 999).map(lambda v: f"{v / 10:.1f}")
TABLE = st.lists(st.lists(CELL, min_size=2, max_size=3), min_size=1,
                 max_size=4).filter(lambda rows: len({len(r) for r in rows}) == 1).map(table_of)
TEXTS = st.lists(st.tuples(CELL | st.sampled_from(["Oslo", "2019", "18-29"]),
                           st.sampled_from(["value", "label", "tick", "ocr"])), max_size=5)
EVIDENCE = st.builds(lambda table, texts: Evidence(table, tuple(TextBox(t, NOWHERE, role) for t, role in texts)),
                     TABLE | st.just(()), TEXTS)
QUESTION = st.sampled_from(
    [
        "What is the value of row a?",
        "What is the sum of row a and row b?",
        "How far apart are row a and row b?",
        "How many values are above 20?",
        "What is the ratio of row a to row b?",
        "What is the average of row a?",
        "What is the median?",
        "두 값의 차이는 얼마입니까?",
    ]
)
REPLY = CELL | st.integers(0, 300).map(str) | st.sampled_from(["62%", "1,250", "Oslo", "3 and 7", "", "-4"])
GROUNDED = ("visible", "counted", "derived")


@fast
@given(QUESTION, CELL, EVIDENCE, st.data())
def test_a_visible_number_is_never_ungrounded(question, answer, evidence, data):
    printed = [cell for line in evidence.table
               for cell in line if read_numbers(cell)] + [t.text for t in evidence.texts if read_numbers(t.text)]
    assume(printed)
    verdict = judge(question, answer, data.draw(st.sampled_from(printed)), evidence)
    assert verdict.category != "ungrounded" and verdict.support != "none"


@fast
@given(QUESTION, CELL, REPLY, EVIDENCE, st.randoms(use_true_random=False))
def test_the_order_of_rows_columns_and_texts_does_not_matter(question, answer, reply, first, random):
    texts, rows = list(first.texts), list(first.table[1:])
    random.shuffle(texts)
    random.shuffle(rows)
    columns = list(range(1, len(first.table[0]) if first.table else 1))
    random.shuffle(columns)
    shuffled = Evidence(tuple(tuple(line[c] for c in (0, *columns)) for line in (*first.table[:1], *rows)),
                        tuple(texts))
    one, other = judge(question, answer, reply, first), judge(question, answer, reply, shuffled)
    assert (one.category, one.support, one.level, one.covered) == (other.category, other.support, other.level,
                                                                   other.covered)


def test_the_order_of_a_table_and_a_loose_number_does_not_matter():
    table = Evidence((("", "c0", "c1", "c2"), ("row a", "1", "1", "1"), ("row b", "1", "6", "10")))
    loose = Evidence((), (TextBox("10", NOWHERE, "value"),))
    ask = "What is the sum of row a and row b?", "1", "19"
    assert judge(*ask, table, loose).category == judge(*ask, loose, table).category


@fast
@given(QUESTION, CELL, REPLY, EVIDENCE, EVIDENCE)
def test_more_evidence_never_turns_a_number_that_is_seen_into_ungrounded(question, answer, reply, evidence, more):
    before, after = judge(question, answer, reply, evidence), judge(question, answer, reply, evidence, more)
    if before.support in ("visible", "counted"):  # what is derived from the lines of a table can be lost with more
        assert after.support in GROUNDED and after.category != "ungrounded"
    # texts of an OCR engine join the same reader's table
    joined = judge(question, answer, reply, replace(evidence, texts=evidence.texts + more.texts))
    if before.support in GROUNDED:
        assert joined.support in GROUNDED and joined.category != "ungrounded"


def test_an_estimate_is_the_one_verdict_that_more_evidence_takes_back():
    bars = Evidence((("", "value"), ("a", "42"), ("b", "17")), (TextBox("a", NOWHERE, "label"),))
    assert judge("What is a?", "42", "45", bars).category == "estimation_error"
    assert judge("What is a?", "42", "45", bars,
                 Evidence((), (TextBox("42", NOWHERE, "value"),))).category == "ungrounded"


def test_without_coverage_nothing_is_called_ungrounded():
    for case in CASES:
        verdict = judge(case["question"], case["gold"], case["prediction"], evidence_of_case(case))
        assert verdict.category != "ungrounded" or verdict.covered
        assert verdict.level != "D" or verdict.category not in (
            "misread_cell",
            "count_error",
            "calculation_error",
            "estimation_error",
            "ungrounded",
        )


def test_an_unconfirmed_zero_and_nan_are_no_evidence_and_a_printed_zero_is():
    table = (("", "v"), ("a", "0"), ("b", "14"), ("c", "nan"))
    extracted = Evidence(table, (TextBox("14", NOWHERE, "value"), TextBox("0", NOWHERE, "tick")))
    assert not any(place.source == "cell" and n.value == 0
                   for n, place in facts(extracted).numbers), "a tick confirms no zero"
    printed = replace(extracted, texts=(*extracted.texts, TextBox("0", NOWHERE, "value")))
    assert (
        any(place.source == "cell" and n.value == 0 for n, place in facts(printed).numbers)
        and facts(extracted).things == 2
    )


# ---- label audit and the older rule


@pytest.mark.parametrize("minutes", [1699, 75, 61, 1812, 2400])
def test_ratios_stored_as_day_fractions_are_found(minutes):
    stored = f"{minutes / 1440:.9f}"
    found = label_audit("What was the ratio shown?", stored, facts(Evidence()))
    whole = float(stored).is_integer()
    assert bool(found) != whole and (whole or f"{minutes // 60}:{minutes % 60:02d}" in found.reason)


def test_label_audit_leaves_ordinary_labels_alone():
    rng = np.random.default_rng(0)
    page = Evidence((("", "v"), ("a", "62%"), ("b", "0.31")), (TextBox("62%", NOWHERE, "value"),))
    assert (
        label_audit("Share of a?", "0.62", facts(page))
        and not label_audit("Share of b?", "0.31", facts(page))
        and not label_audit("Ratio of b to a?", "0.62", facts(page))
    )
    assert not any(label_audit("What is it?", f"{v:.{d}f}", facts(Evidence()))
                   for v, d in zip(rng.uniform(0, 100, 400), rng.integers(0, 4, 400)))
    assert [label_audit("What is it?", text, facts(page))
            for text in ("Lima", "42", "62%", "1/3", "[1.5, 2]")] == [None] * 5


def test_the_older_rule_gives_the_reported_split():
    # The 200 records of the reported run are not public; these pairs have its three outcomes in its proportions, by
    # construction and not by the rule.
    right = [(str(n), str(n)) for n in range(100, 230)]
    none_shared = [(f"0.{n:02d}", str(n + 100)) for n in range(10, 35)] + [(str(n), str(n + 300))
                                                                           for n in range(400, 426)]
    other = [("yes", "no")] * 8 + [("", "17")] * 3 + [(f"{n} or 99", str(n)) for n in range(3, 11)]
    split = Counter(source_rule(reply, answer) for reply, answer in right + none_shared + other)
    assert split == {"correct": 130, "numeric_hallucination": 51, "other": 19}
    assert split["numeric_hallucination"] / 200 == 0.255 and round(100 * 51 / 70) == 73


def test_the_older_rule_reads_groups_of_digits():
    assert (
        source_rule("0.08", "26") == "numeric_hallucination"
        and source_rule("126", "26") == "numeric_hallucination"
        and source_rule("26 of 90", "26") == "other"
    )
    assert source_rule("17", "42", correct=True) == "correct" and source_rule("no idea", "42") == "other"


# ---- numbers are judged as numbers, whatever gave the mark


TOTAL = facts(Evidence((("", "v"), ("Oslo", "12500"), ("Rome", "17300")),
                       (TextBox("12500", NOWHERE, "value"), TextBox("17300", NOWHERE, "value"))))


def mark_of(scorer, reply, answer="12500"):
    asked = [Sample("q", "d", "read", "What is the value of Oslo?", (answer,), b"")]
    return bool(make_records(asked, [SimpleNamespace(prediction=reply, truncated=False, seconds=0.0, error=None)],
                             scorer)["correct"][0])


@pytest.mark.parametrize(
    "scorer, reply, marked, category",
    [
        ("anls", "12500", True, "correct"),
        ("anls", "12,500", True, "correct"),
        ("anls", "12900", True, "ungrounded"),
        ("anls", "17300", True, "misread_cell"),
        ("anls", "125000", True, "scale_or_sign"),
        ("anls", "The total is 12500 in all of the years", False, "format_only"),
        ("containment", "312500", True, "ungrounded"),
        ("containment", "12500 or so", True, "correct"),
        ("exact", "12900", False, "ungrounded"),
        ("exact", "12,500", False, "format_only"),
        ("exact", "12500", True, "correct"),
        ("vqa", "12900", False, "ungrounded"),
        ("relaxed", "12900", True, "correct"),
        ("relaxed", "13300", False, "ungrounded"),
        ("relaxed", "about 12900", False, "format_only"),
    ],
)
def test_the_tolerance_that_the_scorer_declares_decides_what_a_number_is(scorer, reply, marked, category):
    assert mark_of(scorer, reply) == marked
    verdict = classify("What is the value of Oslo?", "12500", reply, TOTAL, marked, scorer=scorer)
    assert (verdict.category, verdict.right) == (category, category == "correct")


def test_a_mark_on_what_is_no_number_is_kept():
    assert classify("Which?\nA. 12500\nB. 17300", "B", "17300", TOTAL, True, scorer="letter").category == "correct"
    assert classify("Who?", "Ann Smith", "Ann Smyth", TOTAL, True, scorer="anls").category == "correct"
    assert classify("How many?", ("2", "two"), "two", TOTAL, True, scorer="vqa").category == "correct"
    assert classify("When?", ("4 May 1999", "May 4"), "4 May 1999", TOTAL, True, scorer="anls").category == "correct"


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["anls", "exact", "vqa", "containment"]), st.integers(1, 99_999), st.integers(1, 99_999))
def test_no_scorer_of_texts_makes_another_number_right(scorer, answer, said):
    verdict = classify("What is the value of Oslo?", str(answer), str(said), TOTAL,
                       mark_of(scorer, str(said), str(answer)), scorer=scorer)
    assert verdict.right <= (said == answer), (
        "VQA accuracy asks for several annotators, so that it may also miss one that is right"
    )
    assert (verdict.category in ("correct", "format_only")) == (said == answer)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 99_999), st.integers(1, 99_999), st.sampled_from(["{}", "{}%", "about {}", "{:,}", "{} of 7"]))
def test_relaxed_accuracy_keeps_its_own_mark(answer, said, written):
    reply = written.format(said)
    marked = mark_of("relaxed", reply, str(answer))
    assert classify("What is the value of Oslo?", str(answer), reply, TOTAL, marked).right == marked


def test_an_evaluation_says_its_scorer_and_the_mark_stays_beside_the_verdict(pages):
    # as ANLS marks a digit too many
    records = records_of(pages, [f"{s.answers[0]}7" for s in pages]).assign(correct=True)
    by_text = Evaluation(records, {"settings": {"scorer": "anls"}})
    verdicts = categorise(by_text, pages)[1]
    assert verdicts["correct"].all() and not verdicts["right"].any() and not (verdicts["category"] == "correct").any()
    assert (
        categorise(records, pages, scorer="anls")[1].equals(verdicts) and categorise(records, pages)[1]["right"].all()
    )
    report = grounding_report(verdicts, chance_floor(verdicts, pages, others=5), draws=200)
    assert report["overruled"] == report["judged"] == len(pages) and report["classes"]["correct"]["count"] == 0
    assert sum(report["correct_by_grounded"]["correct"].values()) == 0 and report["floor"] > 0
    assert report["source_rule"]["of_errors"] is not None, "the older rule judges the same replies as wrong"
    assert taxonomy_table({"control": report}).loc["right as a text only", "control"] == str(len(pages))
    with pytest.raises(ValueError, match="unknown scorer 'bleu', expected one of relaxed, anls"):
        categorise(records, pages, scorer="bleu")


# ---- reports


@pytest.fixture(scope="module")
def pages():
    return samples(documents(60, seed=11),
                   kinds=("read_label", "read_cell", "read_colour", "sum", "difference", "count"))


def records_of(asked, said):
    return pd.DataFrame(
        dict(
            id=[s.id for s in asked],
            document=[s.document for s in asked],
            kind=[s.kind for s in asked],
            prediction=said,
            error="",
            category="",
            correct=[bool(relaxed_accuracy(p, s.answers)) for p, s in zip(said, asked)],
        )
    )


def test_a_model_that_ignores_its_page_stands_at_the_floor_and_one_that_reads_far_below(pages):
    rng = np.random.default_rng(0)
    numbers = [[t.text for t in s.evidence.texts if t.role in ("value", "cell")] for s in pages]
    blind = categorise(records_of(pages, [str(rng.choice(numbers[rng.integers(len(pages))])) for _ in pages]), pages)[1]
    reader = categorise(records_of(pages, [str(rng.choice(own)) for own in numbers]), pages)[1]
    blind, reader = (grounding_report(v, chance_floor(v, pages), draws=2000) for v in (blind, reader))
    assert blind["minus_floor"]["low"] < 0 < blind["minus_floor"]["high"] and blind["ungrounded"]["rate"] > 0.3
    assert reader["ungrounded"]["count"] == 0 and reader["minus_floor"]["high"] < -0.3


def test_random_numbers_are_mostly_explained_once_every_operation_is_allowed():
    rng, asked = np.random.default_rng(1), {"all": "What is the sum, the difference or the ratio?",
                                            "one": "What is the sum?", "none": "What is it?"}
    hits = {name: [] for name in asked}
    for _ in range(200):
        cells = rng.integers(1, 51, 10)
        known = facts(Evidence(table_of([[str(c)] for c in cells]), (TextBox("page", NOWHERE, "title"),)))
        number = int(rng.choice(np.setdiff1d(np.arange(1, 51), cells)))
        for name, question in asked.items():
            hits[name].append(classify(question, "987654", str(number), known).support != "none")
    assert np.mean(hits["all"]) > 0.7 and np.mean(hits["one"]) < 0.6 and not any(hits["none"]), (
        "so only the operation that a question names is tried"
    )


def test_report_counts_everything_once_and_clusters_by_image(pages):
    said = [s.answers[0] if i % 2 else "777777" for i, s in enumerate(pages)]
    records = records_of(pages, said)
    records.loc[records.index[:3], "error"] = "broken image"
    filled, verdicts = categorise(records, pages)
    report = grounding_report(verdicts, chance_floor(verdicts, pages, others=5), draws=1000)
    assert (
        (filled["category"] == verdicts["category"]).all()
        and (filled["category"][:3] == "").all()
        and list(filled.columns) == list(records.columns)
    )
    assert report["errors"] == 3 and sum(report["counts"].values()) == len(pages) - 3 == report["judged"] == sum(
        c["count"] for c in report["classes"].values()
    )
    cross = report["correct_by_grounded"]
    assert (
        sum(cross["correct"].values()) + sum(cross["wrong"].values()) == report["in_rate"]
        and cross["wrong"]["not_grounded"] == report["ungrounded"]["count"]
    )
    assert report["ungrounded"]["low"] < report["ungrounded"]["rate"] < report["ungrounded"]["high"]
    # every question asked twice about the same pages teaches nothing new
    twice = pd.concat([verdicts, verdicts.assign(id=verdicts["id"] + "'")])
    doubled = grounding_report(twice, draws=1000)["ungrounded"]
    once, width = report["ungrounded"], lambda low, high: high - low
    assert width(doubled["low"], doubled["high"]) == pytest.approx(width(once["low"], once["high"]),
                                                                   rel=0.15), "intervals resample images"
    assert width(*doubled["wilson"]) < 0.8 * width(*once["wilson"]), (
        "as Wilson's, which takes questions for independent, does not"
    )


def test_categorise_refuses_records_of_other_questions(pages):
    records = records_of(pages[:2], ["1", "2"]).assign(id=["x", pages[1].id])
    with pytest.raises(ValueError, match="1 of 2 records belong to no question given, such as 'x'"):
        categorise(records, pages)


def test_change_between_arms_is_the_exact_test_on_the_same_questions(pages):
    rng = np.random.default_rng(2)
    invented = rng.random(len(pages)) < 0.4
    said_a = ["777777" if bad else s.answers[0] for bad, s in zip(invented, pages)]
    said_b = [s.answers[0] if bad and rng.random() < 0.5 else a for bad, a, s in zip(invented, said_a, pages)]
    a, b = (categorise(records_of(pages, said), pages)[1] for said in (said_a, said_b))
    change = grounding_change(a, b, ("control", "vision"), draws=1000)
    test = mcnemar(a["category"] == "ungrounded", b["category"] == "ungrounded")
    assert (change["only_first"], change["only_second"], change["p"]) == (test.lost, test.won, test.p) and change[
        "only_second"
    ] == 0 < change["only_first"]
    moves = transition_matrix(change)
    assert moves.loc["ungrounded", "correct"] == change["only_first"] and moves.to_numpy().sum() == len(pages)
    assert change_sentence(change).startswith("vision invents fewer numbers") and change_sentence(
        grounding_change(a, a, draws=200)
    ).startswith("No difference")
    table = taxonomy_table({"control": grounding_report(a, draws=200), "vision": grounding_report(b, draws=200)})
    assert table.loc["ungrounded", "control"].startswith(f"{invented.sum()} (") and re.match(
        r"0 \(0\.000; 0\.000 to 0\.0\d\d\)", table.loc["format_only", "control"]
    )
    with pytest.raises(ValueError, match="different questions"):
        grounding_change(a, b.iloc[1:])


# ---- readers


@pytest.fixture
def release(tmp_path):
    top = tmp_path / "release" / "test"
    for folder in ("png", "tables", "annotations"):
        (top / folder).mkdir(parents=True)
    for name in ("one", "two"):
        (top / "png" / f"{name}.png").write_bytes(b"png")
    (top / "tables" / "one.csv").write_text('Year,"Users, million"\n2015,3.4\n2016,"1,041"\n', encoding="utf-8-sig")
    (top / "tables" / "two.csv").write_text("Entity,Share\nKenya,nan\nPeru,0\n")
    box = {"x": 1, "y": 2, "w": 30, "h": 8}
    (top / "annotations" / "one.json").write_text(
        json.dumps(
            {
                "type": "v_bar",
                "general_figure_info": {
                    "title": {"text": "Users", "bbox": box},
                    "y_axis": {"label": {"text": "millions", "bbox": box},
                               "major_labels": {"values": ["0", "5"], "bboxes": [box, box]}},
                    "x_axis": {"major_labels": {"values": ["2015", "2016"], "bboxes": [box, box]}},
                    "legend": {"items": [{"label": {"text": "Users", "bbox": box}}]},
                },
                "models": [{"name": "Users", "y": ["3.4", "1,041"], "text_labels": ["3.4"], "text_bboxes": [box]}],
            }
        )
    )
    (top / "test_human.json").write_text(
        json.dumps([{"imgname": "one.png", "query": "Users in 2015?", "label": "3.4"},
                    {"imgname": "two.png", "query": "Share?", "label": "7"}])
    )
    (top / "test_augmented.json").write_text(json.dumps([{"imgname": "one.png", "query": "Users in 2016?",
                                                          "label": "1041"}]))
    return tmp_path / "release"


def test_chartqa_release_is_read_with_its_evidence(release):
    asked = load_benchmark("chartqa", source=release)
    assert [(s.document, s.kind, s.answers) for s in asked] == [
        ("one.png", "human", ("3.4",)),
        ("two.png", "human", ("7",)),
        ("one.png", "machine", ("1041",)),
    ]
    evidence = asked[0].evidence
    assert (
        evidence.table == (("Year", "Users, million"), ("2015", "3.4"), ("2016", "1,041"))
        and evidence is asked[2].evidence
    )
    assert [(t.text, t.role) for t in evidence.texts] == [
        ("Users", "title"),
        ("2015", "label"),
        ("2016", "label"),
        ("millions", "axis"),
        ("0", "tick"),
        ("5", "tick"),
        ("Users", "legend"),
        ("3.4", "value"),
    ]
    assert evidence.texts[0].box == (1, 2, 31, 10) and [facts(s.evidence).level for s in asked] == ["A", "B", "A"]
    assert classify(asked[0].question, "3.4", "1041", facts(evidence)).category == "misread_cell"
    assert classify(asked[0].question, "3.4", "3.1",
                    facts(evidence)).category == "ungrounded", "3.4 is printed: nothing is left to estimate"


def test_every_way_to_the_release_of_chartqa_gives_the_same_samples(release, tmp_path):
    """The loader, a mixture and the data cell of the study see one release: kind, document, roles, printed values
    and evidence are equal."""
    asked = load_benchmark("chartqa", source=release)
    assert load_benchmark("chartqa", source=release / "test") == asked
    assert source_documents(f"chartqa/test@{release}", 2, seed=0) == asked
    cells = ["".join(cell["source"])
             for cell in json.loads((REPOSITORY / "notebooks/studies/50_grounding.ipynb").read_text())["cells"]]
    wanted = [line for cell in cells for line in cell.splitlines()
              if line.startswith(("import sfa_core", "from sfa_core"))]
    (tmp_path / "cells.py").write_text("\n".join([*wanted, next(c for c in cells if c.startswith("if source:"))]))

    def of_study(documents):
        given = dict(source=str(release), ocr="", evaluation_documents=documents, seed=0)
        return runpy.run_path(str(tmp_path / "cells.py"), init_globals=given)["asked"]

    assert of_study(0) == asked and of_study(2) == asked[:2]


def test_damaged_or_missing_parts_of_a_release_are_named(release):
    (release / "test" / "annotations" / "two.json").write_text("[1")
    with pytest.raises(ValueError, match="two.json cannot be read .*expected ChartQA's annotation"):
        chart_evidence(release / "test", "two")
    (release / "test" / "annotations" / "two.json").unlink()
    (release / "test" / "tables" / "two.csv").unlink()
    assert facts(chart_evidence(release / "test", "two")).level == "D"
    (release / "test" / "png" / "one.png").unlink()
    with pytest.raises(FileNotFoundError, match="question 0 of test_human.json names .*one.png, which is missing"):
        load_benchmark("chartqa", source=release)
    with pytest.raises(FileNotFoundError, match="no val_human.json or val_augmented.json in .*; it has test"):
        load_benchmark("chartqa", "val", release)


def test_ocr_lines_join_the_evidence_and_weak_ones_are_counted(tmp_path):
    lines = [
        {"image": "a.png", "text": "42", "box": [1, 2, 9, 8], "confidence": 0.9},
        {"image": "a.png", "text": "17", "box": [[1, 9], [9, 9], [9, 15], [1, 15]], "confidence": 0.5},
        {"image": "b.png", "text": "63", "box": [0, 0, 1, 1], "confidence": 0.49},
    ]
    file = tmp_path / "ocr.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    read = read_ocr(file)
    assert (read.kept, read.dropped, read.evidence["b.png"].texts) == (2, 1, ()) and read.evidence["a.png"].texts[
        1
    ] == TextBox("17", (1, 9, 9, 15), "ocr")
    table = Evidence((("", "v"), ("a", "42")), ())
    asked, without = with_texts([Sample("q", "a.png", "read", "?", ("42",), b"", table),
                                 Sample("r", "c.png", "read", "?", ("1",), b"", table)], read.evidence)
    assert (
        without == 1
        and facts(asked[0].evidence).level == "A"
        and facts(asked[1].evidence).level == "B"
        and asked[0].evidence.table == table.table
    )


@pytest.mark.parametrize(
    "line",
    [
        "{",
        '{"image": "a", "text": "1", "box": [0, 1, 2], "confidence": 1}',
        '{"image": "a", "text": "1", "box": [0, 0, 1, 1], "confidence": 98}',
        '{"image": "a", "text": "1", "confidence": 1}',
        '{"image": "a", "text": "1", "box": ["x", 0, 1, 1], "confidence": 1}',
        "7",
    ],
)
def test_a_line_that_is_no_ocr_result_is_named(tmp_path, line):
    (tmp_path / "ocr.jsonl").write_text("\n" + line)
    with pytest.raises(ValueError, match=r"ocr.jsonl line 2: .*expected image, text, box \(4 numbers or 4 corners\) "
                                         r"and confidence \(0 to 1\)"):
        read_ocr(tmp_path / "ocr.jsonl")
