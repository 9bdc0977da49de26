"""What other harnesses wrote is read by the names of its columns, joined by what the rows are about, and marked by
every rule; what is left out is counted, and a log that cannot be used is one clear line."""
import json
import random

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfa_core.scores.compare import compare
from sfa_core.scores.differences import DECIDING, DIFFERENCES, join_logs, match_keys, why_different
from sfa_core.scores.grounding import source_rule
from sfa_core.scores.harness import FORMATS, ends_open, read_answers
from sfa_core.scores.metrics import PROFILES, relaxed_accuracy
from sfa_core.scores.rescoring import (
    HALLUCINATION, OWN, hallucination_table, marks_by_rule, own_marks, reported_match, rule_table,
)

# image, question, expected, reply, kind
ROWS = [
    ("a.png", "How many bars?", "14", "14", "human"), ("a.png", "Which share?", "62", "62%", "human"),
    ("b.png", "Which share?", "0.33333333", "0.37", "machine"), ("b.png", "Which year?", "2019", "2010", "machine"),
    ("c.png", "Who leads?", "Norway", "Sweden", "human"), ("c.png", "Which sum?", "977633", "977,631", "machine"),
    ("c.png", "Which years?", "[2003, 2004]", "2005 2006", "human"),
]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def plain(rows=ROWS, **more):
    return [dict(imgname=i, query=q, answer=g, prediction=p, split=f"test_{k}") | more for i, q, g, p, k in rows]


def details(rows=ROWS, rule=reported_match, **more):
    return {"accuracy": 0.5, "details": [
        dict(question=q, gt=g, pred=p, correct=rule(p, g), error_type="correct" if rule(p, g) else
             "hallucinated_number" if HALLUCINATION["no digits shared"](p, g) else "wrong_answer") | more
        for _, q, g, p, _ in rows]}


def lmms_lines(rows=ROWS):
    for n, (_, question, gold, reply, kind) in enumerate(rows):
        yield {"doc_id": n, "doc": {"type": f"{kind}_test", "question": question, "answer": "not this one"},
               "target": gold, "arguments": [f"{question}\nAnswer with a single word.", {"max_new_tokens": 16}],
               "resps": [[f" {reply}\n"]], "filtered_resps": [reply], "doc_hash": "0", "prompt_hash": "1",
               "relaxed_overall": relaxed_accuracy(reply, gold, "lmms_eval")}


def vlmevalkit(rows=ROWS):
    table = pd.DataFrame([dict(index=n + 100, question=q, answer=f"['{g}']", split=k, image_path=f"/data/images/{i}",
                               prediction=p) for n, (i, q, g, p, k) in enumerate(rows)])
    return table


@pytest.fixture
def logs(tmp_path):
    "The same replies in every format."
    vlmevalkit().to_excel(tmp_path / "model_ChartQA_TEST.xlsx", index=False)
    vlmevalkit().to_csv(tmp_path / "model_ChartQA_TEST.tsv", index=False, sep="\t")
    records = pd.DataFrame([dict(id=f"q{n}", document=i, kind=k, question=q, answers=[g], prediction=p, correct=True,
                                 truncated=False, error="") for n, (i, q, g, p, k) in enumerate(ROWS)])
    records.to_parquet(tmp_path / "records.parquet")
    own = [dict(question=q, answer=p, annotation=g) for _, q, g, p, _ in ROWS]
    files = {"list": write(tmp_path / "plain.json", plain()), "details": write(tmp_path / "details.json", details()),
             "lines": write(tmp_path / "plain.jsonl", "\n".join(map(json.dumps, plain()))),
             "lmms_eval": write(tmp_path / "samples_chartqa.jsonl", "\n".join(map(json.dumps, lmms_lines()))),
             "logs": write(tmp_path / "chartqa.json", {"args": {}, "logs": list(lmms_lines())}),
             "xlsx": tmp_path / "model_ChartQA_TEST.xlsx", "tsv": tmp_path / "model_ChartQA_TEST.tsv",
             "internvl": write(tmp_path / "internvl.json", own), "records": tmp_path / "records.parquet"}
    return {name: read_answers(file) for name, file in files.items()}


def test_every_format_is_the_same_records(logs):
    formats = {"list": "list", "lines": "list", "details": "details", "lmms_eval": "lmms_eval", "logs": "lmms_eval",
               "xlsx": "vlmevalkit", "tsv": "vlmevalkit", "internvl": "internvl", "records": "records"}
    assert {name: log.format for name, log in logs.items()} == formats and set(formats.values()) == set(FORMATS)
    expected = [(q, (g,), p) for _, q, g, p, _ in ROWS]
    for name, log in logs.items():
        records = log.evaluation().records
        assert [(r.question, tuple(r.answers), r.prediction) for r in records.itertuples()] == expected, name
        assert not log.left_out and records["id"].is_unique
        assert list(records["correct"]) == [relaxed_accuracy(p, g) == 1 for _, _, g, p, _ in ROWS]
    with_images = {name for name, log in logs.items() if log.has_images}
    assert with_images == {"list", "lines", "xlsx", "tsv", "records"}
    assert all(list(logs[name].rows["document"]) == [row[0] for row in ROWS] for name in with_images)
    assert logs["details"].rows["document"].is_unique  # each question by itself, and not one page for all of them


def test_prompt_whole_reply_and_own_mark_are_kept(logs):
    rows = logs["lmms_eval"].rows
    assert rows["prompt"][0] == "How many bars?\nAnswer with a single word." and rows["raw"][1] == " 62%\n"
    assert list(own_marks(logs["lmms_eval"])) == [relaxed_accuracy(p, g, "lmms_eval") == 1 for _, _, g, p, _ in ROWS]
    assert list(own_marks(logs["details"])) == [reported_match(p, g) for _, _, g, p, _ in ROWS]
    assert own_marks(logs["list"]).isna().all() and OWN not in marks_by_rule(logs["list"])


# What cannot be used

@pytest.mark.parametrize("content, words", [
    ([dict(query="?", answer="1")], "no column for prediction .*it has query, answer"),
    ([dict(prediction="1", answer="1")], "no column for question .*it has prediction, answer"),
    ([], "no column for question, prediction, answers .*it has no columns"),
    ([dict(query="?", answer="1", prediction=None)] * 3, "none of its 3 rows can be used .3 with no reply"),
    ([dict(query="?", answer=None, prediction="1")] * 2, "none of its 2 rows can be used .2 with no expected answer"),
    ({"accuracy": 0.5}, "holds no list of replies; .*it has accuracy"), ([1, 2], "no list of objects"),
    ("{", "no JSON"),
])
def test_a_log_that_cannot_be_used_is_one_line(tmp_path, content, words):
    with pytest.raises(ValueError, match=words) as error:
        read_answers(write(tmp_path / "log.json", content))
    assert "\n" not in str(error.value) and "log.json" in str(error.value)


@pytest.mark.parametrize("name, content", [("log.xlsx", b"no zip"), ("log.txt", b"text"), ("log.tsv", b"\xff\xfe")])
def test_a_file_of_another_kind_is_refused_with_its_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_answers(tmp_path / name)


def test_an_unknown_format_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown format 'helm', expected auto or one of list, "):
        read_answers(tmp_path / "a.json", "helm")
    with pytest.raises(FileNotFoundError, match="a.json is no file"):
        read_answers(tmp_path / "a.json")


def test_rows_without_reply_or_answer_are_counted_and_an_empty_reply_is_a_reply(tmp_path):
    rows = plain()
    rows[0]["prediction"], rows[1]["prediction"], rows[2]["answer"], rows[3]["query"] = "", None, None, None
    del rows[4]["prediction"]
    log = read_answers(write(tmp_path / "log.json", rows))
    assert log.left_out == {"no expected answer": 1, "no question": 1, "no reply": 2} and len(log.rows) == len(ROWS) - 4
    assert log.rows["prediction"][0] == "" and not log.evaluation().records["correct"][0]
    assert "2 no reply" in repr(log)


def test_a_failed_request_is_an_error_and_no_wrong_answer(tmp_path):
    rows = [row[:3] + ("Failed to obtain answer via API.",) + row[4:] if n == 1 else row for n, row in enumerate(ROWS)]
    vlmevalkit(rows).to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    summary = read_answers(tmp_path / "a.tsv").evaluation().summary
    assert summary["errors"] == 1 and summary["n"] == len(ROWS) - 1


def test_words_that_tables_take_for_nothing_stay_words(tmp_path):
    rows = [("a.png", "Which?", "None", "NA", "human"), ("a.png", "How?", "nan", "null", "human"),
            ("a.png", "Code?", "007", "007", "human")]
    for ending in ("xlsx", "tsv"):
        file, table = tmp_path / f"a.{ending}", vlmevalkit(rows)
        table.to_excel(file, index=False) if ending == "xlsx" else table.to_csv(file, index=False, sep="\t")
        read = read_answers(file).rows
        assert list(read["prediction"]) == ["NA", "null", "007"] and list(read["answers"])[0] == ("None",)


@pytest.mark.parametrize("text, cut", [
    ("14", False), ("To answer the question, let's analyze the pie chart step by step:\n\n1. The slices show", True),
    ("The share is given by the bar on the right of the chart, which shows 42", False),
    ("We add the three bars on the left of the chart and divide by two. The answer is **42**.", False),
    ("Subtract the minimum percentage of Romney supporters from the maximum percentage of the supporters of", True)])
def test_a_sentence_that_stops_in_the_middle_was_cut_off(tmp_path, text, cut):
    assert ends_open(text) == cut
    log = read_answers(write(tmp_path / "a.json", [dict(question="?", gt="1", pred=text)] * 2))
    assert log.truncated == 2 * cut and log.cut_off_by == "the text"
    told = [dict(question="?", gt="1", pred=text, finish_reason=reason) for reason in ("length", "stop")]
    log = read_answers(write(tmp_path / "b.json", told))
    assert list(log.rows["truncated"]) == [True, False] and log.cut_off_by == "the log"


# Which rows belong together

def test_logs_with_images_join_on_image_and_question_in_any_order(tmp_path, logs):
    rows = ROWS[::-1][:-1]
    other = read_answers(write(tmp_path / "other.json", plain(rows)))
    joined = join_logs(logs["xlsx"], other)
    assert joined.rule == "image and question" and joined.left_out == {"only in the first": 1}
    assert list(joined.first.rows["prediction"]) == list(joined.second.rows["prediction"])
    assert list(joined.first.rows["id"]) == list(joined.second.rows["id"])
    assert compare(*(log.evaluation(draws=2) for log in (joined.first, joined.second))).changes.lost == 0


def test_a_question_that_stands_there_several_times_is_matched_in_its_order(tmp_path):
    rows = [ROWS[0], ROWS[0][:3] + ("15", "human"), ROWS[1]]
    a, b = (read_answers(write(tmp_path / f"{n}.json", plain(part))) for n, part in enumerate((rows, rows[::-1])))
    joined = join_logs(a, b)
    assert list(joined.first.rows["prediction"]) == ["14", "15", "62%"]
    assert list(joined.second.rows["prediction"]) == ["15", "14", "62%"]
    c = read_answers(write(tmp_path / "c.json", plain(rows[:1] + rows[2:])))
    assert join_logs(a, c).left_out == {"there several times": 2}


def test_a_log_without_images_takes_them_over_by_position(logs):
    joined = join_logs(logs["details"], logs["list"])
    assert joined.rule == "position" and list(joined.first.rows["document"]) == [row[0] for row in ROWS]
    assert joined.first.evaluation().summary["documents"] == 3 and not joined.left_out
    assert list(joined.first.rows["kind"]) == list(logs["list"].rows["kind"])


def test_otherwise_on_question_and_answer_where_that_is_unique(tmp_path, logs):
    rows = [*ROWS[1:], ("d.png", "New?", "1", "1", "human"), ROWS[4]]
    joined = join_logs(read_answers(write(tmp_path / "d.json", details(rows))), logs["list"])
    assert joined.rule == "question and answer"
    assert joined.left_out == {"only in the first": 1, "only in the second": 1, "there several times": 2}
    assert set(joined.first.rows["question"]) == {row[1] for row in ROWS} - {"How many bars?", "Who leads?"}


def test_other_expected_answers_are_not_compared_and_strangers_are_refused(tmp_path, logs):
    rows = [row[:2] + ("0",) + row[3:] if n == 2 else row for n, row in enumerate(ROWS)]
    joined = join_logs(logs["list"], read_answers(write(tmp_path / "e.json", plain(rows))))
    assert joined.left_out == {"with another expected answer": 1} and len(joined.first.rows) == len(ROWS) - 1
    strange = read_answers(write(tmp_path / "f.json", plain([("z.png", "Else?", "1", "1", "human")] * 2)))
    with pytest.raises(ValueError, match=r"no question of plain \(7\) is one of f \(2\); tried image and question, "
                                         r"question and answer"):
        join_logs(logs["list"], strange)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 4), max_size=9), st.lists(st.integers(0, 4), max_size=9), st.booleans())
def test_matching_pairs_equal_keys_once_and_counts_the_rest(first, second, repeated):
    pairs, out = match_keys(first, second, repeated)
    assert all(first[a] == second[b] for a, b in pairs)
    assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)
    keys = set(first) | set(second)
    even = [k for k in keys if first.count(k) == second.count(k) and (repeated or first.count(k) == 1)]
    plainly = sum(first.count(k) for k in even)
    assert len(pairs) == plainly
    assert sum(out.values()) + plainly == sum(max(first.count(k), second.count(k)) for k in keys)


# Marks

def test_the_rule_of_a_logs_own_marks_is_found(logs):
    table = rule_table(logs["details"], draws=50).set_index(["rule", "kind"])
    assert table.loc[("reported", "all"), "differs"] == 0 and table.loc[("pix2struct", "all"), "differs"] == 2
    assert table.loc[(OWN, "all"), "right"] == sum(reported_match(p, g) for _, _, g, p, _ in ROWS) == 4
    harness = rule_table(logs["lmms_eval"], draws=50).set_index(["rule", "kind"])
    assert harness.loc[("lmms_eval", "all"), "differs"] == 0 and set(harness.index.levels[1]) == {
        "all", "human_test", "machine_test"}
    for profile in PROFILES:
        expected = sum(relaxed_accuracy(p, g, profile) for _, _, g, p, _ in ROWS)
        assert harness.loc[(profile, "all"), "right"] == expected


def test_the_rules_of_the_published_records_call_different_replies_hallucinations(logs):
    log = logs["details"]
    table = hallucination_table(log, marks_by_rule(log)[OWN])
    assert table.loc["no digits shared", "unlike the log's"] == 0
    assert table["hallucinations"].to_dict() == {OWN: 2, "no digits shared": 2, "both are numbers": 1}
    assert source_rule("0.37", "0.33333333", False) == "numeric_hallucination", "a point stands inside of a group"


@settings(max_examples=200)
@given(st.floats(-1e6, 1e6).map(lambda x: f"{x:.6g}"), st.floats(-1e6, 1e6).map(lambda x: f"{x:.6g}"))
def test_on_bare_numbers_the_reported_rule_is_that_of_chartqa_but_for_zero(reply, answer):
    if float(answer):
        bound = abs(float(reply) - float(answer)) / abs(float(answer))
        if abs(bound - 0.05) > 1e-9:
            assert reported_match(reply, answer) == (relaxed_accuracy(reply, answer) == 1)
    else:
        assert reported_match(reply, answer) == (float(reply) == 0)


# Differences

def change(rows, number, **cells):
    return [row | cells if n == number else row for n, row in enumerate(rows)]


@pytest.mark.parametrize("difference, first, second", [
    ("prompt", dict(prompt="How many bars?"), dict(prompt="How many bars? Be short.")),
    ("truncation", dict(finish_reason="stop"), dict(finish_reason="length", prediction="9", raw="so 9")),
    ("parse", dict(raw="It is 14, not 9", prediction="14"), dict(raw="It is 14, not 9", prediction="9")),
    ("scorer", dict(correct=True), dict(correct=False)),
    ("writing", dict(prediction="14"), dict(prediction="14 %", raw="so 14 %")),
    ("answer", {}, dict(prediction="15", raw="so 15"))])
def test_each_difference_is_named(tmp_path, difference, first, second):
    both = [dict(finish_reason="stop", prompt="Look!", raw=f"so {n}", correct=True) for n in range(len(ROWS))]
    rows = [row | more for row, more in zip(plain(), both)]
    a, b = (read_answers(write(tmp_path / f"{name}.json", change(rows, 0, **cells)))
            for name, cells in (("a", first), ("b", second)))
    found = why_different(a, b)
    counts = found.table()["questions"].to_dict()
    also = {"truncation": {"answer"}}.get(difference, set())
    assert {name for name, count in counts.items() if count} == {difference} | also
    assert counts[difference] == 1 and found.rows["decided_by"][0] == (difference if difference in DECIDING else "")
    assert found.table()["told by both"].to_dict() == {name: len(ROWS) for name in DIFFERENCES}
    assert sum(found.to_dict()["decided_by"].values()) == len(found.changed)


def test_images_differ_only_where_the_rows_belong_together_by_something_else(tmp_path):
    rows = [("z.png", *row[1:]) for row in ROWS]
    a, b = (read_answers(write(tmp_path / f"{n}.json", plain(part))) for n, part in enumerate((ROWS, rows)))
    found = why_different(a, b)
    assert found.joined.rule == "position" and found.table().loc["image", "questions"] == len(ROWS)


def test_what_a_log_does_not_tell_does_not_differ(logs):
    found = why_different(logs["details"], logs["lmms_eval"])
    assert found.table().loc["prompt", "told by both"] == 0 and found.table().loc["prompt", "questions"] == 0
    assert found.table().loc["scorer", "questions"] == 2  # 62% and 977,631 are right by one rule only
    own = why_different(logs["details"], logs["lmms_eval"], "own")
    assert own.table().loc["scorer", "mark put down to it"] == len(own.changed) == 2
    with pytest.raises(ValueError, match="profile 'own'"):
        why_different(logs["list"], logs["lmms_eval"], "own")


def test_every_changed_mark_is_put_down_to_one_difference(tmp_path):
    generator = random.Random(3)
    replies = ["14", "14 %", "15", "", "Norway", "norway", "To read it one has to look at all of the bars that are in"]
    sides = [[row[:3] + (generator.choice(replies),) + row[4:] for row in ROWS] for _ in range(2)]
    a, b = (read_answers(write(tmp_path / f"{n}.json", plain(rows))) for n, rows in enumerate(sides))
    found = why_different(a, b)
    assert (found.changed["decided_by"] != "").all()
    same = found.rows[~found.rows[list(DIFFERENCES)].any(axis=1)]
    assert (same["right_a"] == same["right_b"]).all()


def test_marks_of_the_logs_are_compared_as_they_stand(tmp_path, logs):
    wrong = details(rule=lambda p, g: p == g)
    joined = join_logs(logs["details"], read_answers(write(tmp_path / "w.json", wrong)))
    assert joined.compare_marks().changes.lost == 3 and joined.compare().changes.lost == 0
    with pytest.raises(ValueError, match="plain gives no mark to 7 of its 7 replies"):
        join_logs(logs["list"], logs["details"]).compare_marks()
