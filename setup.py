"""Package metadata comes from settings.ini, the one file nbdev and setuptools share.

A built package carries what it reads outside a checkout in sfa_core/_shipped, under the same names as here.
"""
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
SHIPPED = (  # patterns of files
    "data/README.md", "data/density/*", "data/embedded_model/*", "data/embedded_model/dense/*",
    "data/embedded_page/**/*",
    "data/fonts/*",
    "data/grids/*.yaml",
    "notebooks/studies/*.ipynb",
    "exports/reference/arms/**/*", "exports/reference/verdict_labels/*", "exports/reference/embedded_model*/*",
    "exports/reference/finetune/metrics.json", "exports/reference/curves/*/*.json", "exports/reference/tunings/**/*",
    "exports/rendered/stage_seconds.json")
cfg = ConfigParser(delimiters=["="])
cfg.read(ROOT / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]
# what few need; the checks need all of it
EXTRAS = {name: cfg[f"{name}_requirements"].split() for name in ("ocr", "real")}
EXTRAS["dev"] = cfg["dev_requirements"].split() + sum(EXTRAS.values(), [])


def shipped_files():
    "List what a built package carries beside its modules; FileNotFoundError for a pattern without a file."
    found = set()
    for pattern in SHIPPED:
        files = {path for path in ROOT.glob(pattern) if path.is_file() and not path.name.startswith(".")}
        if not files:
            raise FileNotFoundError(f"{ROOT / pattern} names no file; a package is built from a whole checkout")
        found |= files
    return sorted(found)


class BuildPackage(build_py):
    "Build the modules, and copy data and studies beside them: into the build tree, never into the checkout."

    def run(self):
        if self.editable_mode:  # reads them where they are
            return super().run()
        built = Path(self.build_lib) / cfg["lib_path"]
        shutil.rmtree(built, ignore_errors=True)  # modules of an earlier build that are gone by now
        super().run()
        for path in shipped_files():
            target = built / "_shipped" / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o644)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["sfa_core", "sfa_core.*"]),
    install_requires=cfg["requirements"].split(),
    extras_require=EXTRAS,
    cmdclass={"build_py": BuildPackage},
    entry_points={
        "console_scripts": ["sfa=sfa_core.runs.commands:main"],
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    zip_safe=False,
)
