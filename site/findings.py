"""What the committed references say, in sentences: README, the index and the site's findings page take them from here.

    python site/findings.py        writes what was found into README.md and notebooks/index.ipynb

Every number is read from exports/reference when the sentence is made; none is typed.
"""
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sfa_core.scores.intervals import signed_text

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "exports" / "reference"
OLD = ("embedded_model_", "bench")  # references that no study's page shows


@dataclass(frozen=True)
class Finding:
    title: str  # the answer in a few words
    brief: str  # its one number
    text: str  # the answer with its numbers
    sure: str  # what it rests on, and what it does not show
    studies: tuple[str, ...]


@cache
def metrics(name: str) -> dict[str, Any]:
    "Read the metrics of a reference."
    return json.loads((REFERENCE / name / "metrics.json").read_text(encoding="utf-8"))


def provenance(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "provenance.json").read_text(encoding="utf-8"))


@cache
def timings(name: str) -> dict[str, Any]:
    return json.loads((REFERENCE / name / "timings.json").read_text(encoding="utf-8"))


def percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


def points(row: dict, digits: int = 0) -> str:
    "Write the interval of a difference of rates in points."
    return f"{' to '.join(signed_text(100 * row[end], digits) for end in ('low', 'high'))} points"


def learned(measure: str, task: str = "16 x 16", arm: str = "vision") -> dict[str, Any]:
    "Return a measure of encoders from nothing at the last step at which the arms are compared."
    rows = [row for row in metrics("binding_from_nothing")["difference"]
            if (row["measure"], row["task"], row["arm"]) == (measure, task, arm)]
    return max(rows, key=lambda row: row["step"])


def encoders_later() -> tuple[int, dict[str, str]]:
    "Return the step at which encoders from nothing stop, and what each arm knows then, measure by measure."
    rows = metrics("page_model")["encoders"]
    steps = max(row["step"] for row in rows)
    return steps, {row["measure"]: f"{percent(row['with SFA'])} against {percent(row['control'])}"
                   for row in rows if row["step"] == steps}


def from_nothing() -> Finding:
    label, value, digits = (learned(name) for name in ("label_colour", "value_binding", "digits"))
    off = [check["doses"][0] for check in metrics("binding_from_nothing")["checks"].values()]
    steps, later = encoders_later()
    shuffled = learned("label_colour", arm="shuffled")
    lost = " and ".join(f"{-100 * dose['change']:.0f} ({-100 * dose['high']:.0f} to {-100 * dose['low']:.0f})"
                        for dose in off)
    return Finding(
        "From nothing, an encoder learns sooner with structure what belongs to what.",
        f"{percent(label['with'])} of label patches know their bar's colour with SFA, {percent(label['control'])} "
        f"without ({points(label)}; {label['seeds']} pairs), {percent(shuffled['with'])} with shuffled places.",
        f"After {label['step']:,} steps on 224 px pages {percent(label['with'])} of the label patches know the colour "
        f"of their bar with SFA, {percent(label['control'])} without (difference {points(label)}); the value that "
        f"a patch belongs to is known in {percent(value['with'])} against {percent(value['control'])} "
        f"({points(value)}). What a patch shows by itself differs far less: digits {percent(digits['with'])} against "
        f"{percent(digits['control'])} ({points(digits)}). The same weights on shuffled places gain nothing: "
        f"{percent(shuffled['with'])} know the colour ({points(shuffled)}), so it is the structure. It is a head start "
        f"in part: after {steps:,} steps, in one "
        f"training of each arm, label colour is {later['label_colour']}, the value {later['value_binding']}, and the "
        f"words of columns {later['column_binding']}.",
        f"{label['seeds']} pairs of trainings, 95 % interval over pairs. Switching the learned bias off takes "
        f"{lost} points of label colour away, training by training. Rows and columns of table cells are learned "
        f"by neither arm in so few steps.",
        ("61_binding_from_nothing", "06_page_model", "00_tour"))


def fine_tuned() -> Finding:
    found, check = metrics("finetune")["vision_against_control"], metrics("finetune")["check"]
    off = next(row for row in check["doses"] if row["dose"] == 0)
    trained = [one["size"] for one in metrics("binding_from_nothing")["checks"].values()]
    return Finding(
        "Fine-tuned briefly, an encoder taught this gains nothing.",
        f"{signed_text(100 * found['difference'], 1)} points ({points(found, 1).removesuffix(' points')}) on "
        f"{found['n']:,} questions.",
        f"Fine-tuned with and without SFA, the shipped model answers equally well: "
        f"{signed_text(100 * found['difference'], 1)} points ({points(found, 1)}; {found['n']:,} questions, "
        f"{len(found['seeds'])} seeds), equivalent within {100 * found['margin']:.0f} point. The bias it learns "
        f"is {check['size']:.3f} logits ({min(trained):.1f} to {max(trained):.1f} where an encoder learns with it from "
        f"nothing); switched off, {100 * off['changed']:.1f} % of {check['n']:,} replies change.",
        f"The design would have resolved {100 * found['detectable']:.1f} points. It says that so short a training puts "
        f"hardly any structure into an encoder that does without, not that a stronger bias would not help one.",
        ("30_finetune", "61_binding_from_nothing", "60_ablation"))


def wrong_numbers() -> Finding:
    report, groups = metrics("grounding")["reports"]["baseline"], metrics("binding")["groups"]
    counts, beyond = report["counts"], report["minus_floor"]
    wrong = groups["misread"] + groups["invented"]
    return Finding(
        "“Read, but not bound” holds for plain reading, and not for wrong numbers at large.",
        f"Of wrong readings {percent(groups['misread'] / wrong)} stand elsewhere on the page; over all "
        f"questions {counts['ungrounded']:,} wrong numbers stand nowhere, {counts['misread_cell']} elsewhere.",
        f"Asked for one printed value on pages it knows, the shipped model gives {wrong} wrong numbers in "
        f"{sum(groups.values()):,} answers, and {percent(groups['misread'] / wrong)} of them stand elsewhere on the "
        f"page. Over all questions and kinds of pages {counts['ungrounded']:,} wrong numbers stand nowhere and follow "
        f"from no operation that the question names, {counts['misread_cell']} are another printed value: "
        f"{percent(report['ungrounded']['rate'])} of the numbers are invented in this sense, where the same replies "
        f"about other pages would give {percent(report['floor'])}.",
        f"Difference from those other pages {points(beyond)}. "
        f"Generated pages, one model; labelled replies to real pages agree with the verdicts in "
        f"{percent(metrics('grounding')['trusted']['agreement'][0])} of cases.",
        ("50_grounding", "51_real_answers", "52_where_binding_is_lost"))


def lost() -> Finding:
    steps = {row["step"]: row for row in metrics("binding")["lost"]}
    told = {name: f"{100 * row['lost']:.0f} % ({100 * row['low']:.0f} to {100 * row['high']:.0f})"
            for name, row in steps.items()}
    return Finding(
        "Where the encoder was taught binding, most of it is lost behind it: in the language model and as it writes.",
        f"In the language model {told['language model']}, in the encoder {told['encoder']}.",
        f"Of what wrong answers lack beside right ones, the encoder loses {told['encoder']}, the hand-off "
        f"{told['hand-off']}, the language model {told['language model']}, and {told['later']} goes while the answer "
        f"is written.",
        f"{steps['encoder']['n']} wrong answers of one model; linear readers, intervals over pages. An interval that "
        f"contains zero leaves the stage open.",
        ("52_where_binding_is_lost",))


def cost() -> Finding:
    encoder, spread = timings("cost")["encoder"], timings("cost").get("encoder_spread", {})
    around = {name: f" ({low:.2f} to {high:.2f})" for name, (low, high) in spread.items()}
    told = {name: f"{encoder[name]:.2f}{around.get(name, '')}" for name in ("training time", "inference time")}
    one, memory = timings("cost")["ways"], metrics("cost")["counted"]
    return Finding(
        "Structure is cheap in time, and not in memory at inference.",
        f"{told['training time']} times plain attention in training, {told['inference time']} without.",
        f"The bias is exact and low rank: a 24-layer encoder of 1,025 tokens takes {told['training time']} times the "
        f"time of plain attention in training and {told['inference time']} times without. A single layer takes "
        f"{one['1025 training']['low rank']['ratio']:.2f} times in training at 1,025 tokens and "
        f"{one['4097 training']['low rank']['ratio']:.2f} at 4,097; what attention holds at once in inference is "
        f"{memory['1025 inference']['low rank']['peak_ratio']:.1f} and "
        f"{memory['4097 inference']['low rank']['peak_ratio']:.1f} times as large.",
        "Processor time of one thread, range over rounds in brackets" + (
            "; a graphics card has not been measured." if timings("cost")["large"] == "not measured" else "."),
        ("65_cost",))


def page_model() -> Finding:
    found = metrics("page_model")
    steps, known = encoders_later()
    printed = {row["measure"]: f"{percent(row['vision'])} against {percent(row['control'])}"
               for row in found["printed"]}
    end = max((row for row in found["effects"] if row["names"] == "all names"), key=lambda row: row["step"])
    at = {row["arm"]: row for row in found["lookups"] if (row["step"], row["measure"]) == (end["step"], "all names")}
    trainings = "one training of each arm" if end["seeds"] == 1 else f"{end['seeds']} pairs of trainings"
    read = next(row for row in found["reads"] if (row["arm"], row["questions"]) == (found["ships"], "all reading"))
    ends = {row["questions"]: row for row in found["ends"]}
    rate = {row["arm"]: percent(row["rate"]) for row in found["reads"] if row["questions"] == "all reading"}
    named = {"read_label": "labels", "read_colour": "colours", "read_cell": "cells", "bar pages": "on bar charts",
             "grouped bar pages": "grouped bars", "table pages": "tables"}
    answers = ", ".join(f"{name} {points(ends[kind])}" for kind, name in named.items())
    gain = points(ends["all reading"])
    return Finding(
        "The control catches up on most, and a language model on top still reads more with structure.",
        f"{rate['vision']} of values on fresh pages are read with SFA in the encoder, {rate['control']} without "
        f"({gain}; {trainings}).",
        f"After {steps:,} steps label colour is {known['label_colour']}, the value that a patch belongs to "
        f"{known['value_binding']}, column words {known['column_binding']}; after a further stage with more weight on "
        f"what is printed values are {printed['value_binding']}, column words {printed['column_binding']}. "
        f"With the encoders of {steps:,} steps fixed, a language model "
        f"of two million weights learns to look up {percent(at['vision']['mean'])} of {at['vision']['n']:,} names with "
        f"SFA and {percent(at['control']['mean'])} without (difference {points(end)}). Trained on questions to the "
        f"end, on the encoders of the further stage, it reads {rate['vision']} of {ends['all reading']['n']:,} values "
        f"on fresh pages with SFA and {rate['control']} without (difference {gain}; {answers}). The one that ships "
        f"reads {read['rate']:.3f} ({read['low']:.3f} to {read['high']:.3f}).",
        f"{trainings.capitalize()}; the interval is over pages{'' if end['seeds'] == 1 else ' and trainings'}"
        f"{', and says nothing about other trainings' if end['seeds'] == 1 else ''}.",
        ("06_page_model", "61_binding_from_nothing"))


def reduced() -> tuple[dict[str, dict], dict[str, dict], int]:
    """Return what methods reach at the largest budget whose difficult questions were named before, by method, the tests
    of our rules there, and the patches per side."""
    found = metrics("tokens")
    side = max(int(name.rsplit(" ", 1)[1]) for name in found["tests"])
    rows = {row["method"]: row for row in found["table"] if row["side"] == side}
    tests = {name.rpartition(", ")[0]: one for name, one in found["tests"].items() if name.endswith(f" {side}")}
    return rows | {"full": found["table"][0]}, tests, side


def reducers() -> Finding:
    rows, tests, side = reduced()
    rate = {name: percent(row["rate"]) for name, row in rows.items()}
    ours, (even, random) = "density + guard", (tests[f"density + guard - {name}"]
                                               for name in ("down-sampling", "random blocks"))
    share = percent(rows[ours]["encoder_tokens"] / rows["full"]["encoder_tokens"])
    return Finding(
        "Tokens spent where text is dense beat tokens spent evenly; dropping them later keeps more.",
        f"With {share} of the patches {rate[ours]} of answers are right where density decides, {rate['down-sampling']} "
        f"after down-sampling, {rate['random blocks']} with random blocks, {rate['full']} with all.",
        f"With {share} of the patches (a square of {side} x {side} instead of 16 x 16) {rate[ours]} of the answers are "
        f"right where density and the guard decide what is merged, {rate['down-sampling']} after down-sampling "
        f"(difference {points(even)}), {rate['random blocks']} with random blocks ({points(random)}) and "
        f"{rate['full']} with all patches. Thinned out behind the encoder (DivPrune) {rate['DivPrune']} are left, "
        f"inside the language model (FastV) {rate['FastV']}.",
        f"{even['n']:,} questions about {even['documents']} generated pages, one model that was not trained on fewer "
        f"tokens; intervals over pages. Merged patches leave more language tokens than down-sampling does "
        f"({rows[ours]['language_tokens']:.0f} against {rows['down-sampling']['language_tokens']:.0f}), and the "
        f"network that estimates density costs more than it saves at 224 px.",
        ("20_density_and_tokens",))


SYSTEMS = {"qwen2_5_vl_7b_chartqa": "Qwen2.5-VL-7B",
           "internvl3_5_8b_sfa_only_chartqa": "the InternVL3.5-8B with SFA whose report started this workbook"}
WRONG = ("misread_cell", "count_error", "calculation_error", "estimation_error", "scale_or_sign",
         "ungrounded")  # classes of numbers that are wrong, whatever their form
AIMED = 0.85  # of verdicts, those that a careful reader shares


def real_replies() -> Finding:
    found = metrics("real_answers")
    share = {name: f"{percent(row['corrected'])} ({100 * row['low']:.0f} to {100 * row['high']:.0f})"
             for name, row in found["corrected"].items()}
    counted = {name: found["corrected"][name]["n"] for name in SYSTEMS}
    older = " and ".join(percent(found["reports"][name]["source_rule"]["of_errors"]) for name in SYSTEMS)
    told = " and ".join(f"{share[name]} of {counted[name]:,} for {shown}" for name, shown in SYSTEMS.items())
    classes = {name: {kind: row["count"] for kind, row in found["reports"][name]["classes"].items()}
               for name in SYSTEMS}
    forms = " and ".join(f"{classes[name]['format_only']}" for name in SYSTEMS)
    raw = " and ".join(
        f"{one['ungrounded']} of {sum(one.get(kind, 0) for kind in WRONG)}" for one in classes.values())
    agreement, cases = found["trusted"]["agreement"], found["trusted"]["n"]
    precision = next(row for row in metrics("grounding")["trusted"]["classes"] if row[0] == "ungrounded")[4]
    return Finding(
        "On real charts most wrong numbers are not invented.",
        f"Invented are {' and '.join(share[name] for name in SYSTEMS)} of the wrong numbers of two systems on ChartQA.",
        f"On ChartQA's test split, judged against what is printed on the page, invented are {told}: shares of the "
        f"numbers that are marked wrong, corrected for the errors of the verdicts. {forms} replies are marked wrong "
        f"and hold the right number in another form; without them, uncorrected, {raw} are invented. The rule that the "
        f"project reported, which does not look at the page, calls {older} of the wrong answers about these pages "
        f"hallucinated.",
        f"Evidence is what an OCR engine reads on the pages. On {cases} labelled replies that nobody tuned to, "
        f"verdicts agree with a reader in {percent(agreement[0])} "
        f"({100 * agreement[1]:.0f} to {100 * agreement[2]:.0f}); those that say “invented” are right in "
        f"{percent(precision[0])} ({100 * precision[1]:.0f} to {100 * precision[2]:.0f}), below the "
        f"{percent(AIMED)} that were aimed at. Judged are the questions whose page is at hand, "
        f"{found['reports'][next(iter(SYSTEMS))]['asked']:,} of {found['logs'][next(iter(SYSTEMS))]['replies']:,}. "
        f"One of the systems is not the stock model, so this compares systems, not architectures.",
        ("51_real_answers", "50_grounding"))


FIRST = (from_nothing, fine_tuned, wrong_numbers, real_replies)  # what the landing page has room for
TOLD = (from_nothing, page_model, fine_tuned, wrong_numbers, real_replies)  # what README tells


def findings() -> list[Finding]:
    "Return the findings in their order: those that README tells, then the others."
    return [tell() for tell in (*TOLD, reducers, lost, cost)]


# ---- study by study

def runs() -> dict[str, Path]:
    "Return the reference beside each study's page."
    found = {}
    for file in sorted(REFERENCE.glob("*/provenance.json")):
        if not file.parent.name.startswith(OLD):
            found[provenance(file.parent)["study"]] = file.parent
    return found


def told(name: str) -> str:
    "Return the answer that a reference gives of itself, its first sentence."
    answer = metrics(name)["answer"].removeprefix("**Answer of this run.**").strip()
    return re.split(r"(?<=[.)])\s+(?=[A-Z])", answer)[0]


def embedded() -> str:
    row = metrics("embedded_model")["reads"][0]
    return (f"It reads {row['rate']:.3f} ({row['low']:.3f} to {row['high']:.3f}) of {row['n']:,.0f} values on pages "
            f"that neither trained it nor chose its recipe.")


def baseline() -> str:
    found = metrics("baseline")["summary"]
    kinds = sorted(found["kinds"].items(), key=lambda item: item[1]["rate"])
    return (f"{found['rate']:.3f} of {found['n']:,} questions right ({found['by_document']['low']:.3f} to "
            f"{found['by_document']['high']:.3f}); from {kinds[0][1]['rate']:.2f} ({kinds[0][0]}) to "
            f"{kinds[-1][1]['rate']:.2f} ({kinds[-1][0]}).")


def tokens() -> str:
    return reducers().brief


def explorer() -> str:
    row = next(row for row in metrics("explorer")["evidence"] if row["layer"] == 0)
    return (f"The first layer of the language model points at the evidence in {percent(row['pointing'])} of cases; "
            f"chance would do so in {percent(row['pointing_chance'])}.")


def entropy() -> str:
    found, row = metrics("entropy"), metrics("entropy")["overall"]["trained"]
    return (f"Text is attended from more narrowly in {found['narrower']} heads and more widely in {found['wider']}; "
            f"on average by {row['difference']:+.3f} nats ({row['low']:+.3f} to {row['high']:+.3f}).")


def sinks() -> str:
    found = metrics("sinks")
    own = "has sinks of its own" if found["natural_sinks"] else "has no sinks of its own"
    row = found["changes"]["VHR"]
    return (f"The shipped model {own}; with sinks planted in it, making its visual heads louder (VHR) changes accuracy "
            f"by {100 * row['difference']:+.1f} points ({points(row, 1).removesuffix(' points')}).")


def ablation() -> str:
    found = metrics("ablation")["compared"]["vision"]
    return (f"SFA beside its control: {signed_text(100 * found['difference'], 1)} points "
            f"({points(found, 1).removesuffix(' points')}), {len(found['differences'])} seeds.")


SHORT: dict[str, Callable[[], str]] = {
    "00_tour": lambda: told("tour"), "05_embedded_model": embedded, "10_baseline_eval": baseline,
    "06_page_model": lambda: page_model().brief,
    "20_density_and_tokens": tokens, "30_finetune": lambda: told("finetune"), "40_attention_explorer": explorer,
    "45_entropy": entropy, "50_grounding": lambda: wrong_numbers().text.split(". ")[-1],
    "51_real_answers": lambda: real_replies().brief,
    "52_where_binding_is_lost": lambda: lost().text, "55_sinks": sinks, "60_ablation": ablation,
    "61_binding_from_nothing": lambda: from_nothing().text.split("; ")[0] + ".", "65_cost": lambda: cost().text,
    "70_cross_architecture": lambda: told("architectures"),
}


def short(study: str) -> str:
    "Return in a sentence what the reference of a study found; an em dash where it has none."
    return SHORT[study]() if study in SHORT and study in runs() else "—"


# ---- one model, many question sets

def scores() -> list[tuple[str, ...]]:  # model, pages, questions, n, accuracy, 95 % interval, study
    "Return what the shipped model scores where, from the easiest set to the hardest."
    rows, known = [], "bars, grouped bars, tables (112 px; the kinds it learned)"
    six = "all six kinds, three of them never seen"
    read = metrics("embedded_model")["reads"][0]
    rows.append((known, "reading one value", read, "05_embedded_model"))
    seen = metrics("binding")["evaluation"]
    rows.append((known, "one number beside a label", seen | seen["by_document"], "52_where_binding_is_lost"))
    for name, pages, study in (("embedded_model", known, "05_embedded_model"), ("baseline", known, "10_baseline_eval"),
                               ("finetune", six, "30_finetune"), ("grounding", six, "50_grounding"),
                               ("ablation", six, "60_ablation")):
        found = metrics(name)
        row = found["summary"] if "summary" in found else found["summaries"].get("baseline-0",
                                                                                  found["summaries"].get("baseline"))
        rows.append((pages, "all kinds of questions", row | row["by_document"], study))
    larger = next(row for row in metrics("page_model")["reads"]
                  if (row["arm"], row["questions"]) == (metrics("page_model")["ships"], "all reading"))
    told, larger_pages = [("embedded", *row) for row in rows], "the same kinds at 224 px, tables up to 8 x 5"
    mixed = metrics("grounding")["larger"]["embedded_page"]
    told += [("embedded_page", larger_pages, "reading one value", larger, "06_page_model"),
             ("embedded_page", larger_pages, "eight of any kind about a page", metrics("tokens")["table"][0],
              "20_density_and_tokens"),
             ("embedded_page", larger_pages, "all kinds of questions", mixed["classes"]["correct"], "50_grounding")]
    return [(model, pages, asked, f"{row['n']:,.0f}", f"{row['rate']:.3f}",
             f"{row['low']:.3f} to {row['high']:.3f}", study) for model, pages, asked, row, study in told]


def score_table(link: Callable[[str], str]) -> str:
    lines = ["| model | pages | questions | n | accuracy | 95 % interval | study |", "| --- " * 7 + "|"]
    lines += [f"| {' | '.join(row[:-1])} | {link(row[-1])} |" for row in scores()]
    return "\n".join(lines)


# ---- pages

def filled(text: str, name: str, body: str) -> str:
    "Put a body between the marks of that name; ValueError where a page has none."
    start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f"the page has {text.count(start)} marks {start!r}, expected one and its end")
    head, tail = text.split(start)[0], text.split(end)[1]
    return f"{head}{start}\n{body}\n{end}{tail}"


def rendered(study: str) -> str:
    return f"[{study}](exports/rendered/{study}.ipynb)"


def readme(text: str) -> str:
    "Return README with the findings and scores of the references."
    briefly = "\n".join(f"- **{one.title}** {one.brief} ({', '.join(map(rendered, one.studies))})"
                        for one in findings()[:len(TOLD)])
    whole = "\n\n".join(f"**{one.title}** {one.text} *How sure:* {one.sure} ({', '.join(map(rendered, one.studies))})"
                        for one in findings())
    text = filled(text, "findings", f"{briefly}\n\n<details><summary>All findings, with their numbers and what they "
                                    f"rest on</summary>\n\n{whole}\n\n</details>")
    return filled(text, "scores", score_table(rendered))


def landing() -> str:
    "Return the first page of the site, in Markdown: question, findings, figure, three doors."
    told = "\n".join(f"- **{one.title}** {one.brief}" for one in (tell() for tell in FIRST))
    return LANDING.format(told=told, picture=PICTURE, explored=EXPLORED)


PICTURE = """<picture>
<source media="(max-width: 600px)" srcset="_static/finding_phone.png">
<img src="_static/finding.png" alt="Share of label patches that know their bar's colour, with and without structure, and where both encoders look">
</picture>"""  # noqa: E501
EXPLORED = """<img class="sfa-picture" src="_static/explorer.png" alt="A table of eight rows, where a patch of the answer looks, and which patches the answer needs">"""  # noqa: E501
LANDING = """---
html_theme.sidebar_secondary.remove: true
---
# SFA workbook

**Does telling a vision encoder about rows and columns help it read charts, and when?** A model can read every digit of a page and still answer with the number of the wrong bar. Structure-factorized attention (SFA) adds
three weights a head to the encoder's attention: same row, same column, near.

{told}

{picture}

::::{{grid}} 1 1 3 3
:gutter: 2

:::{{grid-item-card}} Explore
:link: studies/40_attention_explorer.html
:link-type: url
Click a patch and see where it looks, click a word and see what it was read from. On your own page: `sfa demo`
:::
:::{{grid-item-card}} Run
:link: studies/00_tour.html
:link-type: url
`make tour`, or any study on your own model: `sfa run 10_baseline_eval -p model FOLDER`
:::
:::{{grid-item-card}} Read
:link: findings.html
:link-type: url
What was found and how sure it is; then the studies, and the library that they stand on
:::
::::

{explored}
"""  # noqa: E501


def page(shown: set[str]) -> str:
    "Return the findings page of the site, in Markdown, with links to the studies that are shown."
    link = lambda study: f"[{study}](studies/{study}.ipynb)" if study in shown else f"`{study}`"
    lines = ["# What was found", "", "What the committed runs say, how sure each answer is, and where it comes from. "
             "The numbers are read from `exports/reference` whenever this page is drawn.", ""]
    pictures = {findings()[0].title: PICTURE, page_model().title: EXPLORED}
    for one in findings():
        picture = pictures.get(one.title, "")
        lines += [f"## {one.title.rstrip('.')}", "", one.text, "", picture, "", f"**How sure.** {one.sure}", "",
                  f"From {', '.join(map(link, one.studies))}.", ""]
    lines += ["## Which model scores what, where", "", "One model, asked different questions about different pages: "
              "a score without its question set says little. Intervals are over documents where the study has them.",
              "", score_table(link), "", "## Study by study", "",
              "| study | what was found | run | commit |", "| --- | --- | --- | --- |"]
    for study, folder in sorted(runs().items()):
        facts = provenance(folder)
        said = metrics(folder.name).get("answer", "").removeprefix("**Answer of this run.**").strip() or short(study)
        lines.append(f"| {link(study)} | {said} | `{facts['run']}` | "
                     f"`{(facts['git']['commit'] or '')[:10]}` |")
    return "\n".join(lines) + "\n"


def index(notebook: dict) -> dict:
    "Return the index with what each study found beside what it asks."
    cell = next(cell for cell in notebook["cells"] if "".join(cell["source"]).startswith("## Studies"))
    lines = "".join(cell["source"]).split("\n")
    for at, line in enumerate(lines):
        if match := re.match(r"\| \[(\w+)\]\((studies/[\w.]+)\) \| ([^|]*?) \|.*", line):
            lines[at] = f"| [{match[1]}]({match[2]}) | {match[3]} | {short(match[1])} |"
    cell["source"] = "\n".join(lines).splitlines(keepends=True)
    return notebook


def write() -> None:
    "Write what was found into README.md and the index."
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text(encoding="utf-8")), encoding="utf-8")
    path = ROOT / "notebooks" / "index.ipynb"
    written = index(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(written, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
