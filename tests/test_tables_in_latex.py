"""Tables of a run as LaTeX: whatever stands in a cell is text, and bold means an adjusted verdict."""
import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_core.runs.commands import main
from sfa_core.runs.latex import RESOLVED, latex_table, latex_tables, latex_text, numeric


def unescaped(text):
    "Return what is left of a text without the commands and the escapes that LaTeX knows."
    return re.sub(r"\\text\w+\{\}|\\[&%$#_{}]|\$\\?\w+\$|\$-\$", "", text)


@given(st.text(alphabet=st.sampled_from(list("ab1 -.&%$#_{}~^\\±—τ"))))
def test_a_cell_holds_no_command_of_its_own(text):
    assert not set(unescaped(latex_text(text))) & set("&%$#_{}~^\\")


@given(st.lists(st.sampled_from(["better", "worse", "equivalent", "not resolved", "—"]), min_size=1, max_size=6))
def test_bold_is_what_is_resolved_and_nothing_else(verdicts):
    table = pd.DataFrame({"arm": "x", "accuracy": 0.5, "difference, points": -1.5, "95 % interval": "-2 to -1",
                          "verdict": verdicts})
    resolved = sum(verdict in RESOLVED for verdict in verdicts)
    assert latex_table(table).count(r"\textbf{") == 2 * resolved
    assert r"\textbf" not in latex_table(table.drop(columns="verdict"))


def test_every_row_has_a_cell_for_every_column():
    table = pd.DataFrame({"a & b": ["x", None], "n": [1, 2]})
    written = latex_table(table, caption="50 % & more", label="tab:x").splitlines()
    rows = [line for line in written if line.endswith(r"\\")]
    assert [len(re.findall(r"(?<!\\)&", row)) for row in rows] == [1, 1, 1]
    assert r"\begin{tabular}{lr}" in written and r"\caption{50 \% \& more}" in written
    assert numeric(table["n"]) and not numeric(table["a & b"])
    with pytest.raises(ValueError, match="no columns"):
        latex_table(pd.DataFrame())


def test_the_tables_of_a_reference_are_printed(capsys, tmp_path):
    assert main(["show", "ablation", "--latex"]) == 0
    assert capsys.readouterr().out.count(r"\toprule") == 3
    assert main(["show", "nosuch", "--latex"]) == 2 and "nosuch" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="no numbered table"):
        latex_tables(tmp_path)
