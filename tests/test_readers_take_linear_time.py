"""Twice the text takes less than three times as long: readers and scorers are linear in what a model or a page says."""
import json
import time

import pytest

from sfa_core.core.escape import figure_text, html_text
from sfa_core.core.reading import answers_of, json_lines, text_value
from sfa_core.documents.benchmarks import choices_of, with_choices
from sfa_core.documents.folders import folder_evidence
from sfa_core.documents.numbers import is_numeric, quantity, read_numbers, stated_numbers, written
from sfa_core.documents.ocr import read_ocr
from sfa_core.documents.replies import count_thoughts, is_mark, opened_by, split_reply
from sfa_core.documents.samples import Evidence, TextBox
from sfa_core.scores.audit import label_audit
from sfa_core.scores.claims import read_claim, same_text
from sfa_core.scores.facts import facts, name_key
from sfa_core.scores.grounding import classify, grounding_report, categorise, source_rule
from sfa_core.scores.metrics import PROFILES, anls, exact_match, ocrbench_score, relaxed_accuracy, vqa_accuracy
from sfa_core.scores.operations import MOST_OPERANDS, asks_for_count, named_operations, results
from sfa_core.scores.options import option_letter

SIZE = 4_000  # characters of the shorter text
SOON = 0.006  # processor seconds below which a measurement is noise
PAGE = facts(Evidence((("", "a", "b"), ("x", "12", "7"), ("y", "30", "41")), (TextBox("12", (0, 0, 9, 9)),)))
OPTIONS = {"A": "first option", "B": "12", "C": "the answer is D", "D": "option A"}

# Units that are repeated: what regular expressions stumble over, and what models write when they run on.
UNITS = {
    "letters": "a", "blanks": " ", "lines": "\n", "digits": "7", "grouped": "1,234", "grouped points": "1.234.567,",
    "points": ".", "commas": ",", "signs": "-", "fractions": "1/2 ", "percent": "12% ", "powers": "1 x 10^3 ",
    "exponents": "1e5e", "scales": "5 million ", "scale words": "million", "korean": "3억 ", "units": "만",
    "currency": "$ 12 ", "brackets": "(", "pairs": "() ", "english": "The bar of 2010 is higher, so the answer is 12. ",
    "answers": "answer is ", "options": "option A or ", "letters of options": "A. first\n", "copula": "번입니다 ",
    "boxes": "\\boxed{", "thoughts": "<think>", "closed thoughts": "<think></think>", "channels": "<|channel|>",
    "openings": "<think ", "operations": "how much did ", "rises": "how much has rise from ", "ratios": "12:34 ",
    "marks": "*\"'`", "wide": "\u3000", "combining": "e\u0301", "surroundings": "\u2028", "tags": "<b>&amp;",
    "formulas": "$x$ %{y} ", "underscores": "_1", "years": "2010,2011,", "count": "몇 ", "escapes": "\\\\",
    "questions": "how many times ", "no case": "İ", "half words": "12million", "signs and digits": "-1",
}


def calls(text, folder):
    "Everything that reads a text of this length, by name."
    lines = [(folder / name) for name in ("rows.jsonl", "ocr.jsonl")]
    lines[0].write_text(json.dumps({"text": text}) + "\n", "utf-8")
    lines[1].write_text(json.dumps(dict(image="a", text=text, box=[0, 0, 1, 1], confidence=1)) + "\n", "utf-8")
    evidence = {"table": [["a", text]], "texts": [{"text": text, "box": [0, 0, 1, 1]}]}
    return {
        "read_numbers": lambda: read_numbers(text), "is_numeric": lambda: is_numeric(text),
        "quantity": lambda: quantity(text), "stated_numbers": lambda: stated_numbers(text, "of 12 and 30?"),
        "stated_numbers question": lambda: stated_numbers("12 or 30", text), "written": lambda: written(text),
        "split_reply": lambda: split_reply(text), "count_thoughts": lambda: count_thoughts([text]),
        "is_mark": lambda: is_mark(text), "opened_by": lambda: opened_by(text),
        "option_letter": lambda: option_letter(text, OPTIONS),
        "option_letter option": lambda: option_letter("B", OPTIONS | {"E": text}),
        "choices_of": lambda: choices_of(text), "with_choices": lambda: with_choices(text, [text]),
        **{f"relaxed {name}": lambda name=name: relaxed_accuracy(text, ["12"], name) for name in PROFILES},
        "relaxed answer": lambda: relaxed_accuracy("12", [text]), "anls": lambda: anls(text, ["12 bars"]),
        "anls answer": lambda: anls("12 bars", [text]), "vqa": lambda: vqa_accuracy(text, ["12"] * 10),
        "vqa answer": lambda: vqa_accuracy("12", [text] * 10), "exact": lambda: exact_match(text, ["12"]),
        "containment": lambda: ocrbench_score(text, ["12"], False),
        "containment of formulas": lambda: ocrbench_score(text, ["12"], True),
        "named_operations": lambda: named_operations(text), "asks_for_count": lambda: asks_for_count(text),
        "label_audit": lambda: label_audit(text, text, PAGE), "same_text": lambda: same_text(text, "the bar of 2010"),
        "same_text answer": lambda: same_text("the bar of 2010", text), "name_key": lambda: name_key(text),
        "read_claim": lambda: read_claim(text, [text], text), "source_rule": lambda: source_rule(text, "12", False),
        "classify reply": lambda: classify("What is the sum of x?", ["12"], text, PAGE, False),
        "classify question": lambda: classify(text, ["12"], "30", PAGE, False),
        "classify answer": lambda: classify("What is the sum of x?", [text], "30", PAGE, False),
        "facts": lambda: facts(Evidence((("", "a"), ("x", text)), (TextBox(text, (0, 0, 1, 1)),))),
        "figure_text": lambda: figure_text(text), "html_text": lambda: html_text(text),
        "text_value": lambda: text_value(text, "a text", "line 1"),
        "answers_of": lambda: answers_of(["x" + text], "line 1"),
        "json_lines": lambda: list(json_lines(lines[0], "a text")), "read_ocr": lambda: read_ocr(lines[1]),
        "folder_evidence": lambda: folder_evidence(evidence, "line 1"),
    }


def clear():
    "Forget what was read: a text that is met again costs nothing."
    from sfa_core.documents import numbers
    from sfa_core.scores import facts, operations
    for module in (numbers, facts, operations):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def seconds(call, tries):
    "Processor seconds of the quickest of some calls."
    found = []
    for _ in range(tries):
        clear()
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
        if found[-1] < SOON:
            break
    return min(found)


def grows(short, long):
    "By which factor a call takes longer with twice the text; 0 where it is too quick to tell."
    if seconds(long, 1) < SOON:
        return 0.0
    factors = []
    for tries in (2, 5, 9, 15):  # what is slow four times is slow
        factors.append(seconds(long, tries) / max(seconds(short, tries), SOON / 4))
        if factors[-1] < 3:
            break
    return min(factors)


@pytest.mark.parametrize("unit", UNITS)
def test_twice_the_text_takes_less_than_three_times_as_long(tmp_path, unit):
    texts = [(UNITS[unit] * (size // len(UNITS[unit]) + 1))[:size] for size in (SIZE, 2 * SIZE)]
    places = [tmp_path / name for name in ("short", "long")]
    for place in places:
        place.mkdir()
    short, long = (calls(text, place) for text, place in zip(texts, places, strict=True))
    slow = {name: factor for name in short if (factor := grows(short[name], long[name])) >= 3}
    assert not slow, f"{unit}: {slow}"


def test_the_measurement_finds_what_is_quadratic():
    quadratic = lambda n: lambda: [i for i in range(n) for j in range(n) if i == j]
    assert grows(quadratic(900), quadratic(1800)) >= 3
    assert grows(lambda: sum(range(2 * 10**5)), lambda: sum(range(4 * 10**5))) < 3


def test_a_page_of_very_many_numbers_is_judged_and_counted():
    "Every pair of 20,000 numbers would be 200 million results."
    import pandas as pd

    from sfa_core.documents.samples import Sample
    page = Evidence((("",), *((f"r{i}", str(1000 + i)) for i in range(20_000))), (TextBox("1000", (0, 0, 9, 9)),))
    page = Evidence(tuple((*line, "") if len(line) == 1 else line for line in page.table), page.texts)
    asked = [Sample(f"q{i}", "d", "k", question, ("5",), b"", page)
             for i, question in enumerate(("What is the sum of r3 and r4?", "What is r17?"))]
    records = pd.DataFrame(dict(id=["q0", "q1"], document="d", kind="k", prediction=["999.25"] * 2, error="",
                                correct=False, category=""))
    began = time.process_time()
    _, verdicts = categorise(records, asked)
    assert time.process_time() - began < 60, "minutes, were all pairs tried"
    assert verdicts["category"].tolist() == ["undetermined", "ungrounded"]
    report = grounding_report(verdicts, draws=10)
    assert report["too_many_operands"] == 1 and report["in_rate"] == 1
    assert results("sum", range(MOST_OPERANDS)).values.size == MOST_OPERANDS * (MOST_OPERANDS - 1) // 2
    assert results("sum", range(20_000)).values.size == 0
