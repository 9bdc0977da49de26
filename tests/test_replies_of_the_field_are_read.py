"""Replies as models write them: thoughts before the answer, letters with reasons, numbers in every writing; odd
ones are counted and change no other."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_core.documents.benchmarks import with_choices
from sfa_core.documents.samples import Evidence, Sample, TextBox
from sfa_core.scores.records import make_records, odd_replies, summarise, summary_table
from sfa_core.scores.facts import facts
from sfa_core.scores.grounding import categorise, classify, source_rule
from sfa_core.scores.metrics import (
    PROFILES,
    anls,
    exact_match,
    lenient_match,
    ocrbench_score,
    relaxed_accuracy,
    vqa_accuracy,
)
from sfa_core.documents.numbers import agree, is_numeric, quantity, read_numbers, stated_numbers
from sfa_core.scores.options import option_letter
from sfa_core.documents.replies import answer_of, count_thoughts, is_mark, opened_by, split_reply

fast = settings(max_examples=150, deadline=None)
LETTERS = {"A": "epidermis", "B": "xylem vessel", "C": "stomata", "D": "12"}
PAGE = facts(
    Evidence(
        (("", "value"), ("Oslo", "42"), ("Rome", "31")),
        (TextBox("42", (0, 0, 1, 1), "value"), TextBox("31", (0, 0, 1, 1), "value")),
    )
)


def reply(text, truncated=False, error=None):
    return SimpleNamespace(prediction=text, truncated=truncated, seconds=0.25, error=error)


# ---- thoughts

WRITTEN = [
    "<think>{}</think>{}",
    "<think>\n{}\n</think>\n\n{}",
    "{}</think>\n{}",
    "<thinking>{}</thinking>{}",
    "<THINK>{}</THINK> {}",
    "<thought>{}</thought>{}",
    "<reasoning>{}</reasoning>{}",
    "<seed:think>{}</seed:think>{}",
    "<mm:think>{}</mm:think>{}",
    "[THINK]{}[/THINK]{}",
    "◁think▷{}◁/think▷{}",
    "<|begin_of_thought|>{}<|end_of_thought|>{}",
    "<|begin_of_thought|>{}<|end_of_thought|><|begin_of_solution|>{}<|end_of_solution|>",
    "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "<think>{}</think><answer>{}</answer>",
    "<think>{}</think>\n<answer>\n{}",
    "<think>{}</think><answer><|begin_of_box|>{}<|end_of_box|></answer>",
    "<|channel>thought\n{}<channel|>{}",
    '<think lang="en">{}</think>{}',
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}",
    "Here is my thought process: {}\nHere is my response: {}",
    "<unused94>thought\n{}<unused95>{}",
    "<think>a tag <think> in it, {}</think>{}",
    "<think></think><think>{}</think>{}",
]


@pytest.mark.parametrize("written", WRITTEN)
def test_a_thought_is_no_part_of_the_answer(written):
    text = written.format("Rome has 31, option C", "42")
    assert split_reply(text) == ("42", True, True)
    for profile in PROFILES:
        assert relaxed_accuracy(text, "42", profile) == 1 and relaxed_accuracy(text, "31", profile) == 0
    assert (
        anls(text, "42")
        == exact_match(text, "42")
        == ocrbench_score(text, "42")
        == vqa_accuracy(text, ["42"] * 10)
        == 1
    )
    assert ocrbench_score(text, "31") == 0 and [n.value for n in stated_numbers(text)] == [42]
    assert option_letter(written.format("A or C? The answer is C", "B"), LETTERS) == "B"
    assert classify("What is the value of Oslo?", "42", text, PAGE).category == "correct"
    assert classify("What is the value of Rome?", "31", text, PAGE, correct=False).category == "misread_cell"
    assert source_rule(text, "31", False) == "numeric_hallucination"


@pytest.mark.parametrize(
    "text, closed",
    [
        ("<think>it is 42", False),
        ("<think>it is 42</think>", True),
        ("it is 42</think>", True),
        ("[THINK]42", False),
        ("<think>41</think><think>42", False),
        ("<|channel|>analysis<|message|>42", False),
        ("<think>42</think><answer></answer>", True),
    ],
)
def test_an_answer_that_stands_only_in_the_thought_is_none(text, closed):
    assert split_reply(text) == ("", True, closed)
    records = make_records([Sample("q", "d", "read", "?", ("42",), b"")], [reply(text)])
    assert (
        records.loc[0, "prediction"] == text
        and records.loc[0, "truncated"] == (not closed)
        and not records.loc[0, ["correct", "strict", "lenient"]].any()
    )
    assert (
        ocrbench_score(text, "42") == 0
        and stated_numbers(text) == ()
        and option_letter(text, {"A": "42", "B": "41"}) is None
    )
    verdict = classify("What is the value of Oslo?", "42", text, PAGE, correct=False)
    assert (verdict.category, verdict.reason) == ("non_numeric", "nothing stands outside of the thought")


@pytest.mark.parametrize(
    "text",
    [
        "42",
        " 42\n",
        "",
        "think: 42",
        "a < b",
        "[think] about it",
        "thought process: 42",
        "<b>42</b>",
        "<thinker>42</thinker>",
        "x<y>z",
    ],
)
def test_a_reply_without_marks_is_scored_as_it_is(text):
    assert split_reply(text) == (text, False, True) or text.startswith("[think]")


PARTS = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<thinking>",
            "[THINK]",
            "[/THINK]",
            "<answer>",
            "</answer>",
            "<|channel|>final",
            "here is my response:",
            "here is my ",
            "thought process:",
            "<thi",
            "nk>",
            "<",
            ">",
            "42",
            "41 ",
            "B",
            "\n",
            " ",
        ]
    ),
    max_size=12,
).map("".join)


@fast
@given(PARTS | st.text(max_size=30))
def test_taking_thoughts_away_twice_is_taking_them_away_once(text):
    part = split_reply(text)
    assert answer_of(part.answer) == part.answer and (part.thought or part.closed)
    assert (
        part.thought
        or part.answer == text
        or "<answer>" in text.lower()
        or "response" in text.lower()
        or "_of_" in text
        or "conclusion" in text.lower()
    )


def test_special_tokens_of_a_thought_are_decoded_and_others_are_not():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from sfa_core.models.answers import reply_text

    words = Tokenizer(models.WordLevel({"?": 0, "41": 1, "42": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("[THINK]", "[/THINK]", "<|im_end|>")])
    bundle = SimpleNamespace(tokenizer=tokenizer, cache={("opened", None): "", ("opened", "opens"): "<think>"})
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("[THINK]", "[/THINK]", "<|im_end|>", "41", "42")}
    assert (
        answer_of(reply_text(bundle, [ids[name] for name in ("[THINK]", "41", "[/THINK]", "42", "<|im_end|>")])) == "42"
    )
    assert reply_text(bundle, [ids["42"], ids["<|im_end|>"]]) == "42"
    assert split_reply(reply_text(bundle, [ids["41"]], "opens")) == ("", True, False), (
        "the prompt opened the thought, and it was cut off"
    )
    assert (
        is_mark("[THINK]")
        and not is_mark("<|im_end|>")
        and opened_by("assistant\n<think>\n") == "<think>"
        and not opened_by("<think>a</think>")
    )


# ---- letters


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{\text{B}}",
        r"$\boxed{\mathrm{B}}$",
        r"\(\boxed{B}\)",
        r"\textbf{B}",
        r"\[\boxed{\text{(B)}}\]",
        r"The final answer is $\boxed{\text{(B) xylem vessel}}$.",
        r"Therefore \boxed{\text{B}}",
        r"\boxed{B} because it is hollow",
        "The answer is \\boxed{B}.\nA is wrong",
        "B. The xylem is hollow.",
        "B: it is hollow",
        "(B) it is hollow",
        "**B**: it is hollow",
        "**B.** It is hollow",
        "B, because it is hollow",
        "B because it is hollow",
        "B\n\nExplanation: A is wrong.",
        "Answer: B\nReason: C is too small",
        "The answer is B because A is small",
        "The correct answer is (B), since C is wrong.",
        "정답은 B입니다. 막대가 더 높기 때문입니다.",
        "B입니다. A보다 큽니다.",
        "답: B (물관)",
        "B번",
        "정답: B번 (물관)",
        "Ｂ",
        "Option B: xylem vessel",
        "B - the hollow one",
        "B — the hollow one",
        "B) xylem vessel because it carries water",
        "I choose option B.",
        "The answer is B, not C.",
        "Final answer: B",
        "b) it is hollow",
        "<answer>B</answer>",
        "`B`: hollow",
        "“B” because",
        "A is too small, and so is C.\n\nB",
        "B.\nThe tube is hollow",
    ],
)
def test_a_letter_is_read_with_its_explanation(text):
    assert option_letter(text, LETTERS) == option_letter(f"<think>A? C?</think>{text}", LETTERS) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "A or B because",
        "Both A and B",
        "A, B, C, D",
        "B stomata",
        "B. stomata",
        "A. B",
        "A. epidermis\nB. xylem vessel\nC. stomata",
        "A bar is tall",
        "A good point",
        "B, C",
        "The answer is A or B",
        "The answer is either A or B",
        r"\boxed{A} or \boxed{B}",
        "The answer is not B",
        "A. The answer is B",
        "E.g. the first",
        "A/B",
        "B and C",
        "A\nB",
        "AB",
        "B+",
        "A 12",
        "The answer is a vessel",
        "(A) (B)",
        "A: no, B: yes",
        "Not B",
        "B is wrong",
        r"\boxed{\text{A or B}}",
        "정답은 A 또는 B",
    ],
)
def test_two_options_or_none_are_no_choice(text):
    assert option_letter(text, LETTERS) is None


def test_unreadable_letters_stand_on_the_page():
    question = with_choices("Which?", ["leaf", "root"])
    asked = [Sample(f"q{i}", f"d{i}", "ai2d", question, ("B",), b"") for i in range(4)]
    records = make_records(asked, [reply(t) for t in (r"\boxed{\text{B}}", "A or B", "hm", "<think>B")], "letter")
    summary = summarise(records, {"scorer": "letter"}, draws=100)
    row = summary_table({"model": summary}).loc["model"]
    assert (
        summary["unreadable"],
        row["unreadable letters"],
        row["with a thought"],
        row["thought only"],
        row["right"],
    ) == (3, 3, 1, 1, 0.25)
    assert odd_replies(records, "letter") == {
        "truncated": ["q3"],
        "thought only": ["q3"],
        "unreadable": ["q1", "q2", "q3"],
    }
    plain = summarise(make_records(asked, [reply("B")] * 4, "relaxed"), {"scorer": "relaxed"}, draws=100)
    assert {"unreadable letters", "with a thought"}.isdisjoint(summary_table({"model": plain}).columns)


# ---- numbers


@pytest.mark.parametrize(
    "text, value",
    [
        ("5 million", 5e6),
        ("5 millions", 5e6),
        ("5 mln", 5e6),
        ("5 mn", 5e6),
        ("5 Mio.", 5e6),
        ("5-million", 5e6),
        ("five million", 5e6),
        ("5 hundred", 500),
        ("5 hundreds", 500),
        ("5 hundred thousand", 5e5),
        ("2 bn", 2e9),
        ("2 bln", 2e9),
        ("2 Mrd.", 2e9),
        ("2 trillion", 2e12),
        ("2 lakh", 2e5),
        ("2 crores", 2e7),
        ("5만", 50_000),
        ("5만 원", 50_000),
        ("5만명", 50_000),
        ("5万", 50_000),
        ("3億", 3e8),
        ("1.5억", 1.5e8),
        ("1조 2천억", 1.2e12),
        ("1만 2,500원", 12_500),
        ("5만3000", 53_000),
        ("12,5", 12.5),
        ("0,475", 0.475),
        ("0.475", 0.475),
        ("1.346", 1.346),
        ("1,5000", 1.5),
        ("1,234", 1234),
        ("1234,567", 1234.567),
        ("1'234", 1234),
        ("1’234", 1234),
        ("1'234'567.8", 1234567.8),
        ("1’234,5", 1234.5),
        ("CHF 1'234", 1234),
        ("1.234.567", 1234567),
        ("1,234,567", 1234567),
        ("1.234.567,8", 1234567.8),
        ("1,234.5", 1234.5),
        ("1.234,5", 1234.5),
        ("1 234,5", 1234.5),
        ("1 234 567", 1234567),
        ("1\u00a0234,5", 1234.5),
        ("1\u202f234\u202f567", 1234567),
        ("12,34,567", 1234567),
        ("１２３", 123),
        ("－５", -5),
        ("＋５．５", 5.5),
        ("１，２３４", 1234),
        ("５０％", 50),
        ("−5", -5),
        ("＄5", 5),
        ("٣٤٫٥", 34.5),
        ("USD 5", 5),
        ("5 USD", 5),
        ("-$3", -3),
        ("1.5×10³", 1500),
        ("1.5 x 10^3", 1500),
        ("1e5", 1e5),
        ("1e100", 1e100),
        ("½", 0.5),
        ("three", 3),
        ("_42_", 42),
        ("**42**", 42),
    ],
)
def test_one_reader_for_scores_and_grounding(text, value):
    assert quantity(text).value == pytest.approx(value, rel=1e-12) and [
        n.value for n in read_numbers(text)
    ] == pytest.approx([value])
    plain = f"{value:.10g}"
    assert lenient_match(text, plain) and lenient_match(plain, text) and is_numeric(text)
    assert not lenient_match(text, f"{3 * value:.10g}") and not lenient_match(text, f"{value * 1000:.10g}")
    number = facts(Evidence((("", "v"), ("Oslo", plain)), ()))
    assert classify("What is the value of Oslo?", plain, text, number).category in ("correct", "format_only")


@pytest.mark.parametrize(
    "text",
    [
        "1e400",
        "-1e999",
        "1e4000",
        "1_000",
        "12_345.6",
        "23rd",
        "FY2019",
        "v1_2",
        "9" * 400,
        "5" + "조" * 40,
        "nan",
        "inf",
        "1e-4000",
    ],
)
def test_what_is_no_number(text):
    assert read_numbers(text) == () and quantity(text) is None and not is_numeric(text)
    for other in ("1", "5", "1000", "12345.6", "1e308", "23"):
        assert not lenient_match(other, text) and not lenient_match(text, other)


@pytest.mark.parametrize(
    "text, values",
    [
        ("1,2,3", [1, 2, 3]),
        ("12.05.2019", [12, 5, 2019]),
        ("2019,2020", [2019, 2020]),
        ("1.5,2.5", [1.5, 2.5]),
        ("5만 2019년", [50_000, 2019]),
        ("5조각", [5]),
        ("3 and 4", [3, 4]),
        ("5 프로그램", [5]),
        ("-1,2,3", [-1, 2, 3]),
    ],
)
def test_lists_stay_lists(text, values):
    assert [n.value for n in read_numbers(text)] == values and (len(values) == 1 or quantity(text) is None)


@pytest.mark.parametrize(
    "a, b",
    [
        ("62%", "0.62%"),
        ("5M", "5k"),
        ("5 m", "5 k"),
        ("< 5", "5"),
        ("the 5 of them", "5"),
        ("Q5", "5"),
        ("5 and 6", "5"),
        ("1.234", "1234"),
        ("5 million", "5"),
        ("5만", "5"),
        ("3", "three hundred"),
        ("1,5000", "15000"),
    ],
)
def test_lenient_is_not_careless(a, b):
    assert not lenient_match(a, b) and not lenient_match(b, a)


def test_published_profiles_stay_as_their_harnesses_have_them():
    for profile in ("pix2struct", "lmms_eval", "internvl"):
        assert (
            relaxed_accuracy("1_000", "1000", profile) == 1
            and relaxed_accuracy("5 million", "5000000", profile) == 0
            and relaxed_accuracy("12,5", "12.5", profile) == 0
        )


# ---- fuzz

ANY = st.one_of(
    st.text(max_size=60),
    PARTS,
    st.text(alphabet="0123456789.,'’-−%/ $kMe_x×^만억조[]()=１，．\u00a0", max_size=40),
    st.lists(
        st.sampled_from(
            [
                "A",
                "B",
                " or ",
                "\\boxed{",
                "}",
                "\\text{",
                "The answer is ",
                "because ",
                "\n",
                ". ",
                ") ",
                "정답은 ",
                "입니다",
                "option ",
                "stomata",
                "12",
                "**",
            ]
        ),
        max_size=10,
    ).map("".join),
    st.lists(
        st.sampled_from(
            [
                "five",
                "5",
                " ",
                "-",
                "hundred",
                "million",
                "만",
                " 2,500",
                "1e400",
                "e",
                "½",
                "％",
                "（",
                "₩",
                "USD",
                "10^",
                "x",
            ]
        ),
        max_size=8,
    ).map("".join),
)


@fast
@given(ANY, ANY, st.sampled_from(["A", "B", "C"]))
def test_any_reply_is_read_without_an_exception(text, answer, letter):
    for number in (*read_numbers(text), *stated_numbers(text, answer)):
        assert np.isfinite([number.value, number.unit, number.face, *number.readings]).all() and agree(number, number)
    assert option_letter(text, LETTERS) in (None, *LETTERS) and option_letter(text, {letter: answer}) in (None, letter)
    for score in (
        *(lambda t, a, p=p: relaxed_accuracy(t, a, p) for p in PROFILES),
        anls,
        exact_match,
        ocrbench_score,
        vqa_accuracy,
    ):
        assert 0 <= score(text, answer) <= 1
    assert relaxed_accuracy(text, answer, "lenient") >= relaxed_accuracy(text, answer) or "_" in text + answer
    assert lenient_match(text, text)
    classify("How many?", answer, text, PAGE)


LONG = [
    "The bar is taller, and so on. ",
    "a",
    "1",
    "1,",
    "1 ",
    "5만 ",
    "5 hundred ",
    "$",
    "US$",
    "\\boxed{",
    "<think>",
    "</think>",
    "<answer>",
    "<",
    "[",
    "answer is B ",
    "option ",
    "A\n",
    "입니다 ",
    " ",
    "\n",
    "\u3000",
    "½",
    "=1",
    "(1,",
    "1.2,",
    "조",
    "1'234",
    "five ",
    "x 10^",
    "-",
    "e5",
    "here is my ",
    "B. ",
    "_1",
    "１",
    "\ud7a3",
]


@pytest.mark.parametrize("unit", LONG, ids=ascii)
def test_a_reply_of_a_hundred_thousand_characters_takes_time_in_proportion(unit):
    "Generous to a busy machine; a quadratic reader takes minutes here."
    text = (unit * 100_000)[:100_000]
    began = time.process_time()
    records = make_records(
        [Sample("q", "d", "read", with_choices("Which?", ["leaf", "root"]), ("B",), b"")], [reply(text)], "letter"
    )
    summarise(records, {"scorer": "letter"}, draws=2)
    classify("How many?", "3", text, PAGE)
    assert time.process_time() - began < 12


ODD = [
    "<think>41",
    "<think>it is 1</think>",
    "hm</think>",
    "",
    " ",
    "1e400",
    "1_000",
    "9" * 400,
    "A or B",
    "\x00",
    "\u2028",
    "nan",
    "<answer>",
    "7" * 5000,
    "[" * 500,
    "\\boxed{",
    "5조조조조조조",
]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(ODD) | ANY, min_size=40, max_size=40), st.randoms())
def test_odd_replies_change_no_other_and_are_counted_and_named(odd, random):
    good = [f"good-{i}" for i in range(160)]
    places = random.sample(range(200), 40)
    evidence = Evidence(
        (("", "value"), ("Oslo", "1"), ("Rome", "2")),
        (TextBox("1", (0, 0, 1, 1), "value"), TextBox("2", (0, 0, 1, 1), "value")),
    )
    names, strange, asked, replies = iter(good), iter(odd), [], []
    for place in range(200):
        id = f"odd-{place}" if place in places else next(names)
        asked.append(Sample(id, f"d{place // 2}", "read", "What is the value of Oslo?", ("1",), b"", evidence))
        replies.append(
            reply(next(strange))
            if place in places
            else reply(("1", "<think>2</think>1", "2", "1 apple")[len(replies) % 4])
        )
    records = make_records(asked, replies)
    _, verdicts = categorise(records, asked)
    keep = records["id"].isin(good)
    alone = make_records([s for s in asked if s.id in good], [r for s, r in zip(asked, replies) if s.id in good])
    pd.testing.assert_frame_equal(records[keep].reset_index(drop=True), alone)
    _, verdicts_alone = categorise(alone, [s for s in asked if s.id in good])
    pd.testing.assert_frame_equal(verdicts[keep].reset_index(drop=True), verdicts_alone)
    assert records["prediction"].tolist() == [r.prediction for r in replies], "the raw reply stays"
    summary = summarise(records, draws=50)
    named = odd_replies(records)
    assert summary["n"] == summary["asked"] == 200 and summary["truncated"] == len(named.get("truncated", ()))
    thoughts = count_thoughts(r.prediction for r in replies)
    assert (
        summary["thoughts"] == thoughts
        and thoughts["unanswered"] == len(named.get("thought only", ()))
        and thoughts["replies"] >= sum("<think>2" in r.prediction for r in replies)
    )
    assert all(name.startswith("odd-") for ids in named.values() for name in ids)
    json.dumps(summary, allow_nan=False)
