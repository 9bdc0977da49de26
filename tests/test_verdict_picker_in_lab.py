"""Choosing an arm and a category in JupyterLab changes the page and the verdict that are shown."""
import nbformat

PICKER = """
import pandas as pd
from sfa_core.documents.generate import documents
from sfa_core.documents.samples import samples
from sfa_core.scores.grounding import categorise
from sfa_core.figures.verdicts import VerdictPicker

asked = samples(documents(6, seed=3), kinds=("read_label", "read_cell"))
other = [next(t.text for t in s.evidence.texts if t.role in ("value", "cell") and t.text != s.answers[0]) for s in asked]
made = pd.DataFrame(dict(id=[s.id for s in asked], document=[s.document for s in asked], kind="read", prediction=other, error="", correct=False, category=""))
misread = categorise(made, asked)[1].query("category == 'misread_cell'")
invented = categorise(made.assign(prediction=["<b>987654</b>"] * 3 + other[3:]), asked)[1]
print(len(misread))
VerdictPicker(asked, {"control": misread, "vision": invented}).widget
"""  # noqa: E501


def test_picker_shows_the_chosen_arm_and_category(run_in_lab, tmp_path):
    notebook = tmp_path / "picker.ipynb"
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PICKER)], metadata=kernel), notebook)
    page = run_in_lab(notebook)
    page.set_default_timeout(90_000)
    shown, drawn = page.locator(".jupyter-widgets table"), page.locator(".jupyter-widgets img, img.jupyter-widgets")
    shown.get_by_text("misread_cell").wait_for(timeout=90_000)
    drawn.wait_for(timeout=90_000)
    assert drawn.evaluate("e => e.naturalWidth") == 448
    picture = drawn.get_attribute("src")
    arm, category = page.locator(".jupyter-widgets select").nth(0), page.locator(".jupyter-widgets select").nth(1)
    count = page.locator(".jp-OutputArea-output pre").first.inner_text().strip()
    assert [text.replace("\xa0", " ")
            for text in category.locator("option").all_inner_texts()] == [f"misread_cell ({count})"]

    arm.select_option("vision")
    page.wait_for_function("() => document.querySelectorAll('.jupyter-widgets select')[1].options.length > 1",
                           timeout=90_000)
    shown.get_by_text("misread_cell").wait_for()   # the chosen category stays when the other arm has it
    category.select_option(value="ungrounded\xa0(3)")
    shown.get_by_text("<b>987654</b>").wait_for(timeout=90_000)   # a reply is shown as text, never as markup
    assert shown.get_by_text("ungrounded", exact=True).is_visible() and drawn.get_attribute("src") != picture

    first = shown.inner_text()
    page.locator(".jupyter-widgets input[type=number]").fill("2")
    page.keyboard.press("Enter")
    page.wait_for_function("before => document.querySelector('.jupyter-widgets table').innerText !== before", arg=first,
                           timeout=90_000)
    assert "ungrounded" in shown.inner_text() and page.errors == []
    page.screenshot(path=tmp_path / "picker.png")
