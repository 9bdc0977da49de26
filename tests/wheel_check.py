"""Build the wheel, install it away from the checkout, and use it there: `make wheel`.

    python tests/wheel_check.py           # the other packages are those of this interpreter's environment: about a
    minute
    python tests/wheel_check.py --fresh   # an empty environment, everything installed after constraints.txt: many
    minutes
    python tests/wheel_check.py ... PIP   # further options go to pip

Without --fresh the wheel lies alone in a new environment, and a .pth file adds the packages that are installed
here. Such a
path is searched for modules, but its own .pth files are not read: the editable install of the checkout stays out of
sight.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("setup.py", "settings.ini", "constraints.txt", "MANIFEST.in", "README.md", "LICENSE", "sfa_core", "data",
           "notebooks/studies",
           "exports/reference", "exports/rendered")
PLANTED = (  # what lies about in a used checkout and belongs to nobody else
    "data/local/pages.jsonl", "data/embedded_model/.model.part",
    "notebooks/studies/.ipynb_checkpoints/00_tour-checkpoint.ipynb",
    "build/lib/sfa_core/removed.py", "exports/runs/10_baseline_eval/0123456789ab/metrics.json")
WANTED = re.compile(
    r"sfa_core/([a-z]+/)?\w+\.py|sfa_core-[\d.]+\.dist-info/.+|sfa_core/_shipped/(data/(density|embedded_model|embedded_page|fonts|grids)/.+|data/README\.md|"
    r"notebooks/studies/\w+\.ipynb|exports/reference/(arms|curves|tunings|verdict_labels|embedded_model\w*)/.+|"
    r"exports/reference/finetune/metrics\.json|exports/rendered/stage_seconds\.json)")
MOST = 28e6  # bytes of the wheel: two models of 6 and 12 MB, fonts, studies

USE = """
import sys
from pathlib import Path
from sfa_core.core.paths import CHECKOUT, DATA, exports_root
from sfa_core.documents.generate import documents, make_document
from sfa_core.documents.samples import samples
from sfa_core.models.answers import answer
from sfa_core.models.load import load_model
from sfa_core.runs.grids import read_grid
from sfa_core.runs.folders import find_run
from sfa_core.runs.runs import identify
from sfa_core.tokens.density import load_density
from sfa_core.training.arms import load_arm

assert CHECKOUT is None and DATA.is_relative_to(sys.prefix), (CHECKOUT, DATA)
assert exports_root() == Path.cwd() / "exports", exports_root()
assert make_document("bar", 1).pixels.std() > 0
bundle = load_model("embedded")
asked = samples(documents(1, seed=1))[:4]
assert all(reply.prediction for reply in answer(bundle, asked))
with load_arm(bundle, find_run("vision")) as loaded:
    assert loaded.about["arm"] == "vision" and len(answer(bundle, asked)) == 4
assert read_grid("small").study == "10_baseline_eval" and load_density() is not None
print(identify("10_baseline_eval", {"limit": 8})[2])
"""


def run(*command, cwd, env=None):
    "Run a command and return what it prints; an error shows everything it said."
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:200]} ended with "
                         f"{done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def copy_sources(target):
    "Copy what a wheel is built from, with files beside it that must stay out."
    for name in SOURCES:
        source = ROOT / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(
            source, target / name, ignore=shutil.ignore_patterns("local")
        ) if source.is_dir() else shutil.copy(source, target / name)
    for name in PLANTED:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("{}\n")


def check_contents(wheel):
    "Check names, modes and size of what the wheel holds."
    with zipfile.ZipFile(wheel) as archive:
        members = archive.infolist()
        metadata = archive.read(next(member for member in members if member.filename.endswith("/METADATA"))).decode()
        entries = archive.read(next(member
                                    for member in members if member.filename.endswith("/entry_points.txt"))).decode()
    names = {member.filename for member in members}
    foreign = sorted(name for name in names if not WANTED.fullmatch(name) or "removed" in name or "/." in name)
    assert not foreign, f"the wheel holds {foreign}"
    missing = {f"sfa_core/_shipped/{path.relative_to(ROOT)}"
               for path in (ROOT / "notebooks/studies").glob("*.ipynb")} - names
    missing |= {str(path.relative_to(ROOT)) for path in (ROOT / "sfa_core").rglob("*.py")} - names
    assert not missing, f"the wheel lacks {sorted(missing)}"
    modes = {oct(member.external_attr >> 16) for member in members}
    assert all(int(mode, 8) & ~0o664 == 0o100000
               for mode in modes), f"the wheel has files that are links, executable or for all to write: {modes}"
    assert wheel.stat().st_size < MOST, (
        f"the wheel has {wheel.stat().st_size:,} bytes, at most {MOST:,.0f} are expected"
    )
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    assert (
        f"Requires-Python: >={settings['DEFAULT']['min_python']}" in metadata
        and "sfa = sfa_core.runs.commands:main" in entries
    )
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")


def build(folder, pip):
    "Build the wheel from a copy of the checkout."
    copy_sources(folder / "copy")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--use-pep517", "--no-deps", "-w", folder / "dist", folder / "copy",
        *pip, cwd=folder)
    [wheel] = (folder / "dist").glob("*.whl")
    return wheel


def install(wheel, home, fresh, pip):
    "Install the wheel into a new environment and return the folder of its packages."
    if fresh:
        run(sys.executable, "-m", "venv", home, cwd=home.parent)
        run(home / "bin/python", "-m", "pip", "install", *pip, "-c", ROOT / "constraints.txt", wheel, cwd=home.parent)
    else:
        run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
        run(sys.executable, "-m", "pip", "--python", home / "bin/python", "install", "-q", "--no-deps", "--no-index",
            wheel, cwd=home.parent)
    packages = Path(run(home / "bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))",
                        cwd=home.parent).strip())
    if not fresh:
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (packages / "borrowed.pth").write_text("".join(f"{path}\n" for path in sorted(paths)))
    return packages / "sfa_core"


def state_of(package):
    "Return every file of the package with its size and time."
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def check_use(home, package, folder, fresh):
    "Use the installed package in a folder that lies, as the environment does, inside of somebody's own repository."
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(("SFA_", "PYTHON", "VIRTUAL_ENV", "JUPYTER"))}
    env |= {"HOME": str(folder), "PATH": f"{home / 'bin'}:{env['PATH']}"}
    there = folder / "elsewhere"
    there.mkdir()
    run("git", "init", "-q", folder, cwd=folder, env=env)
    run("git", "-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-q", "--allow-empty", "-m", "not ours",
        cwd=folder, env=env)
    before = state_of(package)
    identity = run(home / "bin/python", "-c", USE, cwd=there, env=env).split()[-1]
    if not fresh:  # the same packages: the same run
        here = "from sfa_core.runs.runs import identify; print(identify('10_baseline_eval', {'limit': 8})[2])"
        assert run(sys.executable, "-c", here, cwd=ROOT,
                   env=env).split()[-1] == identity, "the installed package names its runs otherwise than the checkout"

    listed = run(home / "bin/sfa", "studies", cwd=there, env=env)
    studies = sorted(path.stem for path in (ROOT / "notebooks/studies").glob("*.ipynb"))
    assert all(study in listed for study in studies) and len(studies) > 10, listed
    printed = run(home / "bin/sfa", "run", "10_baseline_eval", "-p", "limit", "8", cwd=there, env=env)
    folder_of_run = there / "exports/runs/10_baseline_eval" / identity
    assert (
        str(folder_of_run) in printed
        and (folder_of_run / "metrics.json").is_file()
        and (folder_of_run / "records.parquet").is_file()
    ), printed
    facts = json.loads((folder_of_run / "provenance.json").read_text())
    version = re.search(r"^version = (.+)$", (ROOT / "settings.ini").read_text(), flags=re.M)[1]
    assert facts["git"] == {"commit": None, "dirty": None} and facts["packages"]["sfa_core"] == version, facts["git"]
    assert run(home / "bin/sfa", "list", cwd=there, env=env).count(identity) == 1
    assert state_of(package) == before, "using the package has changed its folder"
    print(printed.strip())


def main():
    options = argparse.ArgumentParser(description="Build the wheel and use it outside of the checkout; other options "
                                                  "go to pip.")
    options.add_argument("--fresh", action="store_true", help="install every package anew, after constraints.txt")
    options.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel that passed")
    given, pip = options.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="sfa-wheel-") as name:
        folder = Path(name).resolve()
        wheel = build(folder, pip)
        check_contents(wheel)
        home = folder / "environment"
        package = install(wheel, home, given.fresh, pip)
        check_use(home, package, folder, given.fresh)
        given.out.mkdir(parents=True, exist_ok=True)
        print(f"outside of the checkout it works: {shutil.copy(wheel, given.out)}")


if __name__ == "__main__":
    main()
