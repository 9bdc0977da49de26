"""Draw the way of the data: `python site/flow.py` writes a picture of each folder of the library and one of all,
the opening of each folder, and the tables of the index; then what was found (site/findings.py) is written anew.

Folders, modules and what they build are read from the notebooks; what a folder is for, what comes into it and what
leaves it is said here.
"""
import json
import re
from html import escape
from pathlib import Path

import findings

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
FLOW = {  # folder: what it is for, what comes in, what goes out
    "core": ("What everything stands on: paths, files, keys, the families of models and where each keeps its parts",
             "files, checkpoints, attention calls", "paths, keys, locks, families, hooks"),
    "documents": ("Pages and questions: generated with their exact truth, or read from benchmarks and folders; numbers "
                  "as people print them",
                  "seeds, releases, folders, OCR", "pages with questions, answers, evidence"),
    "structure": ("Rows, columns, distance and blocks as a bias of attention: what it is, how it is computed, how it "
                  "gets into a model",
                  "places of patches", "a bias inside the encoder's attention"),
    "scores": ("From a reply to a score, from scores to rates with intervals, comparisons and verdicts; which wrong "
               "numbers are invented",
               "replies and accepted answers", "scores, rates with intervals, verdicts"),
    "tokens": ("Where there is something to read, and how many tokens a page is worth", "pixels of a page",
               "fewer, better placed patches"),
    "models": ("Models, and what goes in and comes out of them: loading, images, answers, parts, cost, evaluation",
               "a name, pages, questions", "a bundle, replies, an evaluation"),
    "attention": ("Attention as a model computes it: caught, laid on the page, measured and compared",
                  "calls of attention layers", "recorded attention, laid on the page"),
    "interventions": ("Following a language model and changing what its attention does: sinks, redistribution, heads",
                      "a language model at work", "the same model with attention changed"),
    "training": ("Training runs that can be killed at any moment: data order, checkpoints, losses, arms, devices and "
                 "processes",
                 "documents, an arm", "trained weights with their log"),
    "pretraining": ("Encoders and the embedded models, from nothing", "generated pages", "encoders and models"),
    "figures": ("Arrays and tables in, pictures out", "arrays and tables", "pictures, the explorer"),
    "runs": ("Studies as batch runs: folders, parameters, grids, tables, reports, the command line",
             "a study and its parameters", "a finished run, a grid, a report"),
}
INK, FAINT, BLUE, PAPER = "#202124", "#9AA0A6", "#1A73E8", "#FFFFFF"
CHARACTER = 6.7  # pixels of a character at 12 px


def folders() -> dict[str, list[str]]:
    "List the folders of the library with their modules, in their order."
    found = sorted(path for path in (NOTEBOOKS / "library").iterdir() if path.is_dir())
    return {path.name.split("_", 1)[1]: [nb.stem.split("_", 1)[1] for nb in sorted(path.glob("*.ipynb"))]
            for path in found}


# markup, right edge
def box(x: float, y: float, text: str, *, filled: bool = False, width: float = 0.0) -> tuple[str, float]:
    "Draw a word in a rounded box."
    width = width or CHARACTER * len(text) + 18
    fill, colour = (BLUE, PAPER) if filled else (PAPER, INK)
    shape = f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="26" rx="6" fill="{fill}" stroke="{BLUE if filled else FAINT}"/>'  # noqa: E501
    return f'{shape}<text x="{x + width / 2:.0f}" y="{y + 17:.0f}" text-anchor="middle" fill="{colour}">{escape(text)}</text>', x + width  # noqa: E501


def arrow(x: float, y: float, length: float = 16) -> str:
    "Draw an arrow to the right."
    end = x + length
    return (f'<line x1="{x:.0f}" y1="{y:.0f}" x2="{end - 4:.0f}" y2="{y:.0f}" stroke="{FAINT}"/>'
            f'<path d="M{end - 6:.0f} {y - 4:.0f} L{end:.0f} {y:.0f} L{end - 6:.0f} {y + 4:.0f} Z" fill="{FAINT}"/>')


# markup, last line's y
def chain(words: list[str], y: float, *, chosen: str = "", x: float = 12,
          limit: float = 760) -> tuple[list[str], float]:
    "Draw words one after the other with arrows between them, in as many lines as they take."
    parts, start = [], x
    for i, word in enumerate(words):
        if i and x + 16 + CHARACTER * len(word) + 18 > limit:
            parts.append(arrow(x, y + 13))
            x, y = start, y + 38
        elif i:
            parts.append(arrow(x, y + 13))
            x += 16
        markup, x = box(x, y, word, filled=word == chosen)
        parts.append(markup)
    return parts, y


def picture(parts: list[str], height: float, title: str) -> str:
    "Put parts on a white page of 780 pixels, so that it is legible in a dark theme too."
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 780 {height:.0f}" width="780" height="{height:.0f}" role="img" aria-label="{escape(title)}">'  # noqa: E501
    page = f'<rect width="780" height="{height:.0f}" rx="8" fill="{PAPER}"/>'
    return f'{head}{page}<g font-family="Roboto, Arimo, Arial, sans-serif" font-size="12">{"".join(parts)}</g></svg>\n'


def draw() -> dict[str, str]:  # file name -> markup
    "Draw all pictures."
    library, pictures = folders(), {}
    for name, modules in library.items():
        _, comes, goes = FLOW[name]
        way, y = chain(list(library), 12, chosen=name)
        inside, last = chain(modules, y + 78)
        notes = [f'<text x="12" y="{y + 62:.0f}" fill="{INK}"><tspan font-weight="bold">in:</tspan> '
                 f'{escape(comes)}</text>',
                 f'<text x="12" y="{last + 48:.0f}" fill="{INK}"><tspan font-weight="bold">out:</tspan> '
                 f'{escape(goes)}</text>']
        pictures[f"{name}.svg"] = picture([*way, *notes, *inside], last + 62, f"the folder {name} on the way of the "
                                                                              f"data")
    rows, y = [], 14
    for name in library:
        _, comes, goes = FLOW[name]
        markup, _ = box(300, y, name, filled=True, width=120)
        rows += [markup, f'<text x="282" y="{y + 17}" text-anchor="end" fill="{INK}">{escape(comes)}</text>',
                 arrow(284, y + 13), arrow(420, y + 13),
                 f'<text x="442" y="{y + 17}" fill="{INK}">{escape(goes)}</text>']
        y += 36
    pictures["all.svg"] = picture(rows, y + 4, "the way of the data through the folders of the library")
    return pictures


OPENING = "**The folder `{name}`.** {purpose}.\n\n![{name} on the way of the data](../../flow/{name}.svg)"


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def text(cell: dict) -> str:
    return "".join(cell["source"])


def builds(path: Path) -> str:
    "Return the line under the title of a library notebook."
    return re.search(r"^> (.*)$", text(read(path)["cells"][0]), re.M)[1].rstrip(".")


def openings() -> dict[Path, dict]:  # first notebook of each folder -> the notebook with its opening
    "Put the purpose of a folder and its picture below the title of its first notebook, and nowhere else."
    found = {}
    for path in sorted((NOTEBOOKS / "library").glob("*/*.ipynb")):
        notebook, name = read(path), path.parent.name.split("_", 1)[1]
        cells = [cell for cell in notebook["cells"] if cell["id"] != "opening"]
        if path == min(path.parent.glob("*.ipynb")):
            source = OPENING.format(name=name, purpose=FLOW[name][0]).splitlines(keepends=True)
            cells.insert(1, {"cell_type": "markdown", "id": "opening", "metadata": {}, "source": source})
        found[path] = notebook | {"cells": cells}
    return found


def index() -> dict:
    "Write the tables of modules into the index: a folder each, in the order of the data."
    notebook, lines = read(NOTEBOOKS / "index.ipynb"), []
    for folder in sorted(path for path in (NOTEBOOKS / "library").iterdir() if path.is_dir()):
        name = folder.name.split("_", 1)[1]
        lines += [f"### {name}", f"{FLOW[name][0]}.", "", "| module | what it builds |", "| --- | --- |"]
        lines += [f"| [{name}.{path.stem.split('_', 1)[1]}](library/{folder.name}/{path.name}) | {builds(path)} |"
                  for path in sorted(folder.glob("*.ipynb"))]
        lines.append("")
    facade = NOTEBOOKS / "library" / "99_sfa_core.ipynb"
    lines += ["### The package itself", "", "| module | what it builds |", "| --- | --- |",
              f"| [sfa_core](library/{facade.name}) | {builds(facade)} |"]
    cell = next(cell for cell in notebook["cells"] if "\n### core\n" in text(cell))
    cell["source"] = (text(cell).split("### core\n")[0] + "\n".join(lines)).splitlines(keepends=True)
    return notebook


def write(path: Path, notebook: dict) -> None:
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    (NOTEBOOKS / "flow").mkdir(exist_ok=True)
    for file, markup in draw().items():
        (NOTEBOOKS / "flow" / file).write_text(markup, encoding="utf-8")
    for path, notebook in openings().items():
        write(path, notebook)
    write(NOTEBOOKS / "index.ipynb", index())
    findings.write()
