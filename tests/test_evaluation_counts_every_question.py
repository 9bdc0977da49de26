"""Every question asked is counted, every rate can be recomputed from the records, and better is said only when the
interval says so."""
import io
import json
from functools import lru_cache
from operator import attrgetter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from sfa_core.core.families import FAMILIES
from sfa_core.documents.benchmarks import with_choices
from sfa_core.documents.catalogue import BENCHMARKS, SHORT
from sfa_core.documents.samples import Sample, data_digest
from sfa_core.scores.compare import compare, compare_seeds, holm, holm_caption
from sfa_core.scores.records import COLUMNS, SCORERS, kind_table, make_records, summarise, summary_table
from sfa_core.models.evaluate import evaluate


parts = attrgetter("records", "summary")  # of an evaluation


@lru_cache
def png(shade=0):
    file = io.BytesIO()
    Image.new("RGB", (112, 112), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def ask(i, answer="1", kind="read", per_document=2, question="?"):
    return Sample(f"q{i}", f"d{i // per_document}", kind, question, (answer,), png(i // per_document % 256))


def reply(text, truncated=False, error=None, seconds=0.25):
    return SimpleNamespace(prediction=text, truncated=truncated, seconds=seconds, error=error)


def records_of(right, per_document=2, kinds=("read", "count")):
    asked = [ask(i, kind=kinds[i % len(kinds)], per_document=per_document) for i in range(len(right))]
    return make_records(asked, [reply("1" if r else "2") for r in right])


OUTCOMES = st.lists(st.tuples(st.sampled_from(["1", "1.04", "2", "", "1 apple"]), st.booleans(), st.booleans()),
                    min_size=1, max_size=25)


@settings(max_examples=40, deadline=None)
@given(OUTCOMES)
def test_nothing_is_lost_between_questions_and_summary(outcomes):
    asked = [ask(i, kind=("read", "count", "sum")[i % 3]) for i in range(len(outcomes))]
    replies = [reply("", error="cannot be decoded") if broken else reply(text, cut) for text, cut, broken in outcomes]
    records = make_records(asked, replies)
    summary = summarise(records, draws=200)
    assert list(records.columns) == list(COLUMNS) and list(records["id"]) == [s.id for s in asked]
    assert summary["asked"] == len(outcomes) == summary["n"] + summary["errors"] and summary["errors"] == sum(
        broken for *_, broken in outcomes
    )
    assert summary["truncated"] == sum(cut and not broken for _, cut, broken in outcomes)
    assert not records.loc[records["error"] != "", ["correct", "strict", "lenient"]].any(axis=None)
    for name, text in (("default", {"1", "1.04"}), ("strict", {"1", "1.04"}), ("lenient", {"1", "1.04", "1 apple"})):
        assert summary["profiles"][name]["right"] == sum(t in text and not broken for t, _, broken in outcomes)
    assert (
        sum(kind["n"] for kind in summary["kinds"].values()) == summary["n"]
        and sum(k["right"] for k in summary["kinds"].values()) == summary["right"]
    )
    if summary["n"]:
        assert summary["low"] <= summary["rate"] == summary["right"] / summary["n"] <= summary["high"]
    json.dumps(summary, allow_nan=False)
    text = json.dumps(summary)
    assert "seconds" not in text and "0.25" not in str(summary.get("settings")), "the summary holds no clock value"
    slower = make_records(asked, [SimpleNamespace(**{**vars(r), "seconds": 9.0}) for r in replies])
    assert json.dumps(summarise(slower, draws=200)) == text, "timing does not reach the summary"


def test_a_set_without_a_single_readable_image_has_no_rate():
    summary = summarise(make_records([ask(0)], [reply("", error="broken")]))
    assert (summary["n"], summary["errors"], summary["rate"], summary["low"]) == (0, 1, None, None)
    assert summary_table({"m": summary}).loc["m", "image errors"] == 1 and kind_table({"m": summary}).empty


def test_one_document_has_a_wilson_interval_and_none_over_documents():
    summary = summarise(records_of([1, 1, 0, 1], per_document=4))
    assert (
        summary["by_document"] == {"mean": 0.75, "low": None, "high": None} and summary["low"] < 0.75 < summary["high"]
    )


def test_shared_documents_widen_the_interval():
    right = np.repeat(np.arange(100) % 10 < 7, 4)
    summary = summarise(records_of(right, per_document=4))
    wilson, clustered = summary["high"] - summary["low"], summary["by_document"]["high"] - summary["by_document"]["low"]
    assert clustered > 1.8 * wilson


@pytest.mark.parametrize("scorer, question, answers, kind, text, score, correct", [
    ("relaxed", "?", ("100",), "read", "104", 1, True), ("exact", "?", ("cat",), "read", " Cat", 1, True),
    ("exact", "?", ("cat",), "read", "cats", 0, False),
    ("anls", "?", ("abcdefgh",), "read", "abcdwxyz", 0.5, True),
    ("anls", "?", ("abcdefghij",), "read", "abcdvwxyzq", 0, False),
    ("vqa", "?", ("a b",) * 2 + ("c",) * 8, "read", "a b", 0.6, True),
    ("vqa", "?", ("d",) + ("c",) * 9, "read", "d", 0.3, False),
    ("containment", "?", ("62",), "Doc-oriented VQA", "Total: 62 units", 1, True),
    ("containment", "?", ("x^2",), "Handwritten Mathematical Expression Recognition", "x ^ 2", 1, True),
    ("letter", with_choices("Which?", ["leaf", "root"]), ("B",), "ai2d", "The answer is (B).", 1, True),
    ("letter", with_choices("Which?", ["leaf", "root"]), ("B",), "ai2d", "A or B", 0, False)])
def test_each_scorer_marks_and_decides(scorer, question, answers, kind, text, score, correct):
    records = make_records([Sample("q", "d", kind, question, answers, b"")], [reply(text)], scorer)
    expected = {"vqa": pytest.approx(score, abs=0.07)}.get(scorer, pytest.approx(score))
    assert records.loc[0, "score"] == expected and bool(records.loc[0, "correct"]) is correct


def test_every_benchmark_names_a_scorer():
    assert {row.scorer for row in BENCHMARKS.values()} <= set(SCORERS)


def test_replies_that_name_no_option_are_reported():
    question = with_choices("Which?", ["leaf", "root"])
    records = make_records([ask(i, "B", question=question) for i in range(3)],
                           [reply("B"), reply("A or B"), reply("hm")], "letter")
    assert summarise(records, {"scorer": "letter"})["unreadable"] == 2


def test_profiles_change_only_the_default_column():
    asked, replies = [ask(0, "100"), ask(1, "100")], [reply("105.2"), reply("100")]
    default, internvl = make_records(asked, replies), make_records(asked, replies, profile="internvl")
    assert default["correct"].tolist() == [False, True] and internvl["correct"].tolist() == [True, True]
    pd.testing.assert_series_equal(default["strict"], internvl["strict"])


@pytest.fixture
def model(monkeypatch):
    """A bundle whose replies are looked up, with everything it was asked; real answers are tested with the embedded
    model."""
    import sfa_core.models.evaluate
    calls = []

    def answer(bundle, asked, **options):
        calls.append(options)
        replies = []
        for sample in asked:
            try:
                sample.image
                replies.append(reply(bundle.replies.get(sample.id, "1")))
            except ValueError as error:
                replies.append(reply("", error=str(error)))
        return replies
    monkeypatch.setattr(sfa_core.models.evaluate, "answer", answer)

    def bundle(max_patches=1, replies=(), **config):
        processor = SimpleNamespace(image_processor=SimpleNamespace(max_patches=max_patches, crop_to_patches=False))
        return SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(**config), dtype="torch.float32"),
                               processor=processor, name="some/model",
                               revision="abc", replies=dict(replies), family=FAMILIES["internvl"])
    bundle.calls = calls
    return bundle


def test_evaluate_keeps_broken_images_in_view(model):
    asked = [ask(0), ask(1, per_document=1), Sample("q9", "d9", "read", "?", ("1",), b"no image")]
    records, summary = parts(evaluate(model(), asked))
    assert "q9" in records.loc[2, "error"] and (summary["asked"], summary["n"], summary["errors"], summary["rate"]) == (
        3,
        2,
        1,
        1.0,
    )


def test_settings_that_decide_the_score_stand_beside_it(model):
    asked = [ask(0), ask(1)]
    _, summary = parts(evaluate(model(max_patches=12), asked, "chartqa", max_new_tokens=16))
    assert model.calls[-1] == dict(batch_size=32, max_new_tokens=16, suffix=SHORT, tiles=12, progress=False, kept=None)
    assert summary["settings"].pop("packages").keys() == {"torch", "transformers"}
    assert summary["settings"] == dict(
        benchmark="chartqa", scorer="relaxed", profile="pix2struct", suffix=SHORT, tiles=12, max_new_tokens=16,
        batch_size=32, bootstrap_seed=0,
        bootstrap_draws=10_000, model="some/model", revision="abc", precision="float32", quantisation=None,
        intervention=None, data=data_digest(asked),
        generation_ignored={})
    evaluate(model(max_patches=1, prompt_suffix=""), asked, "chartqa")
    assert model.calls[-1]["suffix"] == "" and model.calls[-1]["tiles"] == 1, (
        "the model's own suffix, and one tile for a model of one tile"
    )
    _, summary = parts(evaluate(model(max_patches=12), asked, "docvqa", suffix=" !", tiles=3, scorer="exact"))
    assert (model.calls[-1]["suffix"], model.calls[-1]["tiles"], summary["settings"]["scorer"]) == (" !", 3, "exact")


@pytest.mark.parametrize("given_names, words", [
    (dict(benchmark="mmmu"), "unknown benchmark 'mmmu'.*chartqa"),
    (dict(scorer="bleu"), "unknown scorer 'bleu'.*relaxed"),
    (dict(profile="chart"), "unknown profile 'chart'.*pix2struct"), (dict(tiles=0), "tiles")])
def test_names_are_checked_before_the_model_starts(model, given_names, words):
    with pytest.raises(ValueError, match=words):
        evaluate(model(), [ask(0)], **given_names)
    assert not model.calls


def test_an_empty_set_and_repeated_ids_are_refused(model):
    with pytest.raises(ValueError, match="at least one question"):
        evaluate(model(), [])
    with pytest.raises(ValueError, match="distinct ids"):
        evaluate(model(), [ask(0), ask(0)])
    with pytest.raises(ValueError, match="1 replies to 2 questions"):
        make_records([ask(0), ask(1)], [reply("1")])


def test_the_digest_of_data_sees_questions_answers_and_pixels(tmp_path):
    base = [ask(0), ask(1)]
    file = tmp_path / "a.png"
    file.write_bytes(png(0))
    others = [[ask(0)], [ask(0), ask(1, "2")], [ask(0, question="!"), ask(1)],
              [Sample("q0", "d0", "read", "?", ("1",), png(9)), ask(1)]]
    assert len({data_digest(asked) for asked in [base, *others]}) == 5
    assert data_digest([Sample("q0", "d0", "read", "?", ("1",), file),
                        ask(1)]) == data_digest(base), "a file and its bytes are the same image"
    assert data_digest([Sample("q0", "d0", "read", "?", ("1",), Image.new("RGB", (4, 4))), ask(1)])


PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=40)


@settings(max_examples=40, deadline=None)
@given(PAIRS, st.randoms())
def test_a_comparison_is_its_records_whatever_their_order(pairs, random):
    a, b = (records_of([pair[side] for pair in pairs]) for side in (0, 1))
    result = compare(a, b).to_dict()
    shuffled = b.iloc[random.sample(range(len(b)), len(b))].reset_index(drop=True)
    assert json.dumps(compare(a, shuffled).to_dict()) == json.dumps(result)
    assert (result["rate_a"], result["rate_b"]) == (a["correct"].mean(), b["correct"].mean())
    assert result["difference"] == pytest.approx(b["score"].mean() - a["score"].mean())
    assert result["both"] + result["lost"] + result["won"] + result["neither"] == result["n"] == len(pairs)
    changed = result["lost"] + result["won"]
    assert result["p"] == pytest.approx(stats.binomtest(result["won"], changed).pvalue if changed else 1)
    assert (
        sum(kind["won"] for kind in result["kinds"].values()) == result["won"]
        and sum(kind["n"] for kind in result["kinds"].values()) == result["n"]
    )
    assert list(compare(a, b).table().index) == [*result["kinds"], "all"]
    json.dumps(result, allow_nan=False)


def test_records_compare_the_same_after_parquet(tmp_path):
    a, b = records_of([1, 0, 1, 1]), records_of([0, 0, 1, 1])
    a.to_parquet(tmp_path / "a.parquet", index=False)
    read = pd.read_parquet(tmp_path / "a.parquet")
    assert compare(read, b).to_dict() == compare(a, b).to_dict() and summarise(read) == summarise(a)


def test_broken_images_are_left_out_of_both_sides_and_counted():
    asked = [ask(i) for i in range(4)]
    a = make_records(asked, [reply("1"), reply("1"), reply("", error="broken"), reply("2")])
    b = make_records(asked, [reply("2"), reply("1"), reply("1"), reply("2")])
    result = compare(a, b).to_dict()
    assert (result["n"], result["left_out"], result["lost"], result["won"]) == (3, 1, 1, 0)
    with pytest.raises(ValueError, match="none of the 4 questions"):
        compare(make_records(asked, [reply("", error="broken")] * 4), b)


@pytest.mark.parametrize("change, words", [
    (lambda r: r.iloc[:3], "different questions: 1 ids are in only one"), (lambda r: r.iloc[:0], "0 rows"),
    (lambda r: pd.concat([r, r.iloc[:1]]), "distinct ids"),
    (lambda r: r.assign(question="other"), "different question"),
    (lambda r: r.assign(answers=[["7"]] * 4), "different answers"),
    (lambda r: r.assign(document="x"), "different document")])
def test_only_the_same_questions_are_compared(change, words):
    records = records_of([1, 0, 1, 1])
    with pytest.raises(ValueError, match=words):
        compare(records, change(records))
    with pytest.raises(ValueError, match=words):
        compare_seeds([(records, records), (change(records), change(records))])


def shifted(rng, n, gain):
    base = rng.random(n) < 0.5
    return records_of(base), records_of(base | (rng.random(n) < gain))


def test_better_and_worse_are_said_for_real_differences():
    a, b = shifted(np.random.default_rng(0), 600, 0.3)
    assert compare(a, b, ("control", "arm")).verdict.startswith("arm is better than control: +")
    assert compare(b, a, ("arm", "control")).verdict.startswith("control is worse than arm: -")
    same = "b and a are equivalent within ±1 point (90 % interval 0.0 to 0.0): 0.0 points"
    assert compare(a, a).verdict.startswith(same)


def test_chance_is_called_better_as_rarely_as_promised():
    rng = np.random.default_rng(4)
    said = [compare(records_of(rng.random(120) < 0.6), records_of(rng.random(120) < 0.6)).verdict
            for _ in range(100)]
    assert sum(text.startswith("b is") for text in said) <= 12, "5 % of 100, with room for chance"
    assert all("question" in text and "interval" in text for text in said)


def test_few_documents_resolve_nothing():
    result = compare(records_of([0] * 12, per_document=3), records_of([1] * 12, per_document=3))
    assert (
        result.low > 0
        and result.outcome == "not tested"
        and str(result).startswith("No difference")
        and "Fewer than 10 documents" in str(result)
    )
    single = compare(records_of([0, 0], per_document=2), records_of([1, 1], per_document=2))
    assert single.low is None and single.detectable is None and "no interval" in repr(single)
    json.dumps(single.to_dict(), allow_nan=False)


def test_seeds_and_documents_are_held_by_one_interval():
    pairs = [shifted(np.random.default_rng(i), 300, 0.2) for i in range(3)]
    result = compare_seeds(pairs, ("control", "arm"))
    cells = np.array([(b["score"] - a["score"]).to_numpy().reshape(150, 2).mean(1) for a, b in pairs])
    assert result.difference == pytest.approx(cells.mean()) == np.mean([seed.difference for seed in result.seeds])
    effect = result.effect
    assert effect.seed_variance == pytest.approx(cells.mean(1).var(ddof=1) / 3)
    assert effect.document_variance == pytest.approx(cells.mean(0).var(ddof=1) / 150)
    rest = cells - cells.mean(1, keepdims=True) - cells.mean(0) + cells.mean()
    assert effect.cell_variance == pytest.approx((rest**2).sum() / (2 * 149) / 450)
    assert (result.low, result.high) == pytest.approx(effect.interval()[1:])
    assert result.low < result.over_documents[0] and result.over_documents[1] < result.high
    assert len(result.table()) == 4 and "3 seeds" in result.verdict and "<table" in result._repr_html_()
    assert set(result.kinds) == {"read", "count"} and result.kinds["read"].effect.seeds == 3
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["low"] == result.low and written["seeds"][0]["lost"] == result.seeds[0].changes.lost


def test_seeds_that_disagree_resolve_nothing_even_when_each_is_clear():
    better, worse = shifted(np.random.default_rng(0), 300, 0.3), shifted(np.random.default_rng(1), 300, 0.3)[::-1]
    assert "is better" in compare(*better).verdict and "is worse" in compare(*worse).verdict
    assert compare_seeds([better, worse]).verdict.startswith("No difference")
    one = compare_seeds([better])
    assert one.outcome == "better" and "one training" in one.verdict, "documents alone, and the sentence says so"
    with pytest.raises(ValueError, match="one pair per seed"):
        compare_seeds([])


def test_a_question_that_broke_in_one_seed_is_left_out_of_all():
    pairs = [shifted(np.random.default_rng(i), 40, 0.2) for i in range(2)]
    pairs[1][1].loc[3, "error"] = "broken"
    result = compare_seeds(pairs)
    assert (result.n, result.left_out) == (39, 1) and [seed.n for seed in result.seeds] == [39, 39]


# won and lost of 400 questions, margin -> outcome
@pytest.mark.parametrize("won, lost, margin, outcome", [
    (40, 0, 0.01, "better"), (0, 40, 0.01, "worse"), (8, 0, 0.05, "better by less than the margin"),
    (0, 8, 0.05, "worse by less than the margin"), (3, 3, 0.05, "equivalent"), (20, 16, 0.01, "not resolved"),
    (3, 3, 0.0, "not resolved")])
def test_every_outcome_has_its_sentence(won, lost, margin, outcome):
    before = np.arange(400) % 2 == 0
    after, draw = before.copy(), np.random.default_rng(0).permutation
    after[draw(np.flatnonzero(~before))[:won]], after[draw(np.flatnonzero(before))[:lost]] = True, False
    found = compare(records_of(before), records_of(after), ("control", "arm"), margin=margin)
    assert found.outcome == outcome and found.to_dict()["outcome"] == outcome
    words = {"better": "arm is better than control:", "worse": "arm is worse than control:",
             "equivalent": f"arm and control are equivalent within ±{100 * margin:g} points (90 % interval"}
    start = words.get(outcome) or (f"arm is {outcome.split()[0]} than control, by less than the margin of 5 points:"
                                   if "margin" in outcome else "No difference between arm and control is resolved:")
    assert found.verdict.startswith(start)
    assert ("With 80 % power this design sees" in found.verdict) == (outcome == "not resolved")


def test_holm_takes_back_what_one_look_among_many_would_resolve():
    rng = np.random.default_rng(0)
    base = rng.random(600) < 0.5
    one = compare(records_of(base), records_of(base | (rng.random(600) < 0.012)), margin=0.001)
    assert one.resolved and 0.001 < one.effect.p < 0.05
    family = {str(i): compare(records_of(rng.random(600) < 0.5), records_of(rng.random(600) < 0.5)) for i in range(49)}
    adjusted = holm(family | {"one": one})
    assert not adjusted["one"].resolved and adjusted["one"].low > 0, "the verdict is adjusted, the interval is not"
    assert list(adjusted) == [*family, "one"] and "50 contrasts" in holm_caption(adjusted)
    few = compare(records_of([0] * 6), records_of([1] * 6))
    assert holm({"few": few})["few"].adjusted is None, "what is not tested is no member of the family"


def test_a_pooled_nothing_shows_its_opposite_parts():
    right = np.arange(400) % 2 == 0
    kinds = np.repeat(["line", "table"], 200)
    gained = np.where(kinds == "line", right | (np.arange(400) % 4 == 1), right & (np.arange(400) % 4 != 2))

    def named(flags):
        records = records_of(flags, kinds=("read_label", "sum"))
        return records.assign(document=[f"1-{kind}-{name}" for kind, name in zip(kinds, records["document"])])

    found = compare(named(right), named(gained), ("control", "arm"), trained=["line"])
    assert found.difference == 0 and {name: part.outcome for name, part in found.parts.items()} == {
        "seen kinds": "better", "unseen kinds": "worse", "reading": "worse", "arithmetic and search": "better"}
    lines = str(found).splitlines()
    assert len(lines) == 5 and lines[1].startswith("  seen kinds: 0.500 to 0.750, +25.0 points")
    assert not compare(named(right), named(gained)).parts, "nobody said what was trained on"


def test_the_embedded_architecture_is_evaluated_end_to_end():
    "A random model answers wrongly, but every question has a row, a time and a reason if it has no reply."
    from sfa_core.documents.generate import documents
    from sfa_core.models.embedded import EmbeddedConfig, train_tokenizer
    from sfa_core.models.load import new_bundle
    config = EmbeddedConfig(vision_width=32, vision_layers=1, vision_heads=1, vision_hidden=32,
                            language_width=32, language_layers=1, language_heads=1, language_kv_heads=1,
                            language_hidden=32)
    data = documents(2, seed=41)
    bundle = new_bundle(config, train_tokenizer(["Value of Oslo? 12"], 300))
    records, summary = parts(evaluate(bundle, data, max_new_tokens=3, batch_size=8))
    assert (
        len(records) == sum(len(row["questions"]) for row in data) == summary["n"]
        and (records["seconds"] > 0).all()
        and summary["errors"] == 0
    )
    again, repeated = parts(evaluate(bundle, data, max_new_tokens=3, batch_size=5))
    assert again["prediction"].tolist() == records["prediction"].tolist()
    assert (
        {**summary, "settings": 0} == {**repeated, "settings": 0}
        and summary["settings"]["tiles"] == 1
        and summary["settings"]["suffix"] == ""
    )
