"""What a file or a configuration says has fields, types and ranges, checked before anything is changed."""
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hostile_files import png

from sfa_core.core.hub import folder_revision
from sfa_core.core.identity import folder_digest, read_digest
from sfa_core.core.schema import check_fields
from sfa_core.documents.benchmarks import load_benchmark
from sfa_core.documents.generate import documents
from sfa_core.documents.named import source_weights
from sfa_core.documents.samples import samples
from sfa_core.models.load import EMBEDDED, load_model
from sfa_core.models.templates import check_template
from sfa_core.runs.folders import arm_folder
from sfa_core.runs.studies import path_version
from sfa_core.structure.bias import StructuralBias
from sfa_core.structure.store import load_structure, read_structure
from sfa_core.tokens.density import load_density
from sfa_core.tokens.patches import PatchConfig
from sfa_core.training.arms import FinetuneConfig, load_arm, read_arm
from sfa_core.training.consistency import SCRConfig
from sfa_core.training.schedule import LoopConfig
from sfa_core.training.stream import Mixture

ROOT = Path(__file__).resolve().parents[1]
ARMS = ROOT / "exports" / "reference" / "arms"


# Configurations

NAN, INF = float("nan"), float("inf")
BAD_SETTINGS = [
    *(dict(weight_decay=value) for value in (NAN, -1, INF, "0")),
    *({name: value} for name in ("learning_rate", "structure_rate") for value in (NAN, INF, "1e-3", None, True)),
    *(dict(learning_rate=value) for value in (0, -1e-3)), *(dict(warmup=value) for value in (NAN, 2, -0.1)),
    *({name: value} for name in ("seed", "data_seed") for value in (1.5, -1, 2**32, True, "1", None)),
    *(dict(steps=value) for value in (0, 1.5, True, "5", NAN)), *(dict(tiles=value) for value in (0, 1.5, "2")),
    *(dict(batch_size=value) for value in (0, 2.0, None)), dict(arm=["vision"]), dict(arm="none"), dict(terms="row"),
    dict(terms=("row", 1)), dict(decay=1), dict(checkpointing=1), dict(patches={}), dict(scr=0), dict(clip_norm=NAN),
    dict(clip_norm=0), dict(batch_size=32, accumulation=3), dict(keep=0), dict(log_every=0), dict(questions=-1),
]


@pytest.mark.parametrize("change", BAD_SETTINGS, ids=str)
def test_a_training_is_configured_with_finite_typed_bounded_values(change):
    with pytest.raises(ValueError) as error:
        FinetuneConfig(**change)
    assert next(iter(change)) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind, change", [
    (LoopConfig, dict(steps=5, weight_decay=NAN)), (LoopConfig, dict(steps=5, learning_rate=INF)),
    (LoopConfig, dict(steps=5, seed=2**32)), (LoopConfig, dict(steps=5, betas=(0.9, 1.5))),
    (LoopConfig, dict(steps=5, group_rates=(("a", NAN),))), (SCRConfig, dict(entropy=NAN)),
    (SCRConfig, dict(scale=INF)),
    (SCRConfig, dict(rows=1.5)), (SCRConfig, dict(both=2)), (PatchConfig, dict(budget=1.5)),
    (PatchConfig, dict(coarse=NAN)), (PatchConfig, dict(bucket=True)),
    (PatchConfig, dict(random=-1, budget=30))], ids=str)
def test_the_rules_within_are_checked_too(kind, change):
    with pytest.raises(ValueError):
        kind(**change)


def test_sound_configurations_stay_as_they_are():
    import numpy as np
    for config in (FinetuneConfig(), FinetuneConfig("full", tiles=2), FinetuneConfig("adat", learning_rate=1),
                   LoopConfig(5, clip_norm=INF), SCRConfig(), PatchConfig(budget=37, random=3)):
        check_fields(config)
    assert Mixture({"a": samples(documents(1, 1))}, {"a": np.float64(2)}).weights == (2.0,)


@pytest.mark.parametrize("seed", [2**63, -1, 1.5, "1", None, True])
def test_documents_are_drawn_from_whole_seeds(seed):
    with pytest.raises(ValueError, match="seed is .*; expected a whole number from 0, below 2.63"):
        documents(1, seed)


@pytest.mark.parametrize("text", ["line:inf", "line:nan", "line:-1", "line:0", "line:1 line:2", ":1", "line:", "line",
                                  "line:1e999", "line:1 pie:x"])
def test_a_mixture_names_each_source_once_with_a_finite_weight(text):
    with pytest.raises(ValueError, match="a mixture is"):
        source_weights(text)
    assert source_weights("line:1 chartqa/train:2.5") == {"line": 1.0, "chartqa/train": 2.5}
    with pytest.raises(ValueError, match="a finite weight above 0"):
        Mixture({"a": samples(documents(1, 1))}, {"a": INF})


# Arms and structural weights

@pytest.fixture(scope="module")
def bundle():
    return load_model("embedded", placement="cpu")


def changed(tmp_path, name, **files):
    "Copy an arm of the reference with other files, checksums and all."
    folder = tmp_path / "arm"
    shutil.copytree(ARMS / name, folder)
    for file, change in files.items():
        path = folder / f"{file}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
    listed = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    (folder / "SHA256SUMS").write_text("".join(f"{read_digest(path)}  {path.name}\n" for path in listed))
    return folder


def adat(about):
    return about | {"arm": "adat", "density": load_density()[1]["sha256"]}


def without(name):
    return lambda about: {key: value for key, value in about.items() if key != name}


ARM_CHANGES = {
    "a list": lambda about: [1], "nothing": lambda about: {}, "null": lambda about: None,
    "a text": lambda about: "vision",
    **{f"without {name}": without(name) for name in ("arm", "base", "config", "training", "density", "against")},
    "arm a list": lambda about: about | {"arm": ["control"]}, "arm unknown": lambda about: about | {"arm": "evil"},
    "base a list": lambda about: about | {"base": []}, "base empty": lambda about: about | {"base": {}},
    "another family": lambda about: about | {"base": about["base"] | {"family": "qwen2_vl"}},
    "a family that is a number": lambda about: about | {"base": about["base"] | {"family": 1}},
    "a further field": lambda about: about | {"evil": 1}, "config a list": lambda about: about | {"config": [1]},
    "no density": lambda about: adat(about) | {"density": None}, "another density": lambda about: adat(about) | {
        "density": "0" * 64},
    "no patches": lambda about: adat(about) | {"config": {}},
    "evil patches": lambda about: adat(about) | {"config": {"patches": {"evil": 1}}},
    "patches a list": lambda about: adat(about) | {"config": {"patches": [1]}},
    "patches of no size": lambda about: adat(about) | {"config": {"patches": {"sizes": [3]}}},
    "patches of text": lambda about: adat(about) | {"config": {"patches": {"budget": "9"}}},
    "patches of NaN": lambda about: adat(about) | {"config": {"patches": {"guard": NAN}}},
}


@pytest.mark.parametrize("name", ARM_CHANGES)
def test_an_arm_that_says_something_else_is_refused_and_the_model_stays(bundle, tmp_path, name):
    folder = changed(tmp_path, "control", arm=ARM_CHANGES[name])
    before = bundle.identity
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_arm(bundle, folder)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    assert bundle.identity == before and not any(isinstance(part, StructuralBias) for part in bundle.model.modules())


STRUCTURE_CHANGES = {
    "a billion layers": lambda card: card | {"encoder": card["encoder"] | {"layers": 10**9}},
    "a billion heads": lambda card: card | {"encoder": card["encoder"] | {"heads": 10**9}},
    "a billion blocks": lambda card: card | {"blocks": 10**9}, "no blocks": lambda card: card | {"blocks": 0},
    "half a layer": lambda card: card | {"encoder": card["encoder"] | {"layers": 3.5}},
    "terms a text": lambda card: card | {"terms": "row"}, "an unknown term": lambda card: card | {"terms": ["evil"]},
    "a list": lambda card: [1], "nothing": lambda card: {}, "no encoder": without("encoder"),
    "no sum": without("sha256"),
    "a sum of zeros": lambda card: card | {"sha256": "0" * 64}, "a short sum": lambda card: card | {"sha256": "00"},
    "another grid": lambda card: card | {"encoder": card["encoder"] | {"grid": [9, 9]}},
}


@pytest.mark.parametrize("name", STRUCTURE_CHANGES)
def test_structural_weights_that_say_something_else_are_refused_soon(bundle, tmp_path, name):
    folder = changed(tmp_path, "vision", structure=STRUCTURE_CHANGES[name])
    began = time.process_time()
    for read in (lambda: load_structure(bundle, folder), lambda: load_arm(bundle, folder)):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            read()
        assert "\n" not in str(error.value)
    assert time.process_time() - began < 20
    assert not any(isinstance(part, StructuralBias) for part in bundle.model.modules())
    read_structure(ARMS / "vision")
    read_arm(ARMS / "control")


# Models

TEMPLATES = {
    "loops that never end": "".join(f"{{% for {x} in range(99999) %}}" for x in "abc") + "{% endfor %}" * 3,
    "ten billion letters": "{{ 'a' * 10000000000 }}",
    "doubling": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "a long prompt": "{% for i in range(99999) %}ab{% endfor %}", "the clock": "{{ strftime_now('%d') }}",
    "the clock, perhaps": "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "its own globals": "{{ self.__init__.__globals__ }}",
    "a file": "{% include '/etc/passwd' %}", "an import": "{% import 'os' as os %}", "no end": "{% for",
    "an exception": "{{ raise_exception('no') }}", "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "a format": "{{ '%1000000000d' % 1 }}",
    "a filter": "{{ 'a'|center(10000000000) }}", "an unknown filter": "{{ 1|system }}", "division": "{{ 1 // 0 }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_is_tried_where_it_does_no_harm(monkeypatch, tmp_path, name):
    monkeypatch.setattr("sfa_core.models.templates.CHILD", "import sfa_core.models.templates as t; t.SECONDS = 3; "
                                                            "t.try_prompts()")
    with pytest.raises(ValueError, match="the chat template of a model cannot be used: ") as error:
        check_template("a model", TEMPLATES[name], tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def edited(tmp_path, file, change):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(change(content)))
    return folder


def replaced(pattern, content):
    "A tokenizer that replaces what it is given before it reads it, ten times."
    rule = {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}
    return lambda tokens: tokens | {"normalizer": {"type": "Sequence", "normalizers": [rule] * 10}}


MODEL_CHANGES = {
    "a tokenizer that explodes": ("tokenizer.json", replaced(".", "a" * 100)),
    "a tokenizer that backtracks": ("tokenizer.json", lambda tokens: tokens | {"pre_tokenizer": {
        "type": "Split", "pattern": {"Regex": "(a|aa|a a)+$x|(a*)*b(a*)*c"}, "behavior": "Isolated", "invert": False}}),
    "no heads": ("config.json", lambda c: c | {"vision_config": c["vision_config"] | {"num_attention_heads": 0}}),
    "no layers": ("config.json", lambda c: c | {"vision_config": c["vision_config"] | {"num_hidden_layers": -1}}),
    "a type that is none": ("config.json", lambda c: c | {"dtype": "evil"}),
    "a suffix that is a list": ("config.json", lambda c: c | {"prompt_suffix": ["a"]}),
    "a suffix without end": ("config.json", lambda c: c | {"prompt_suffix": "a" * 10**6}),
    "a vision that is a list": ("config.json", lambda c: c | {"vision_config": []}),
    "pages of 30,000 px": ("preprocessor_config.json", lambda c: c | {"size": {"height": 30_000, "width": 30_000}}),
    "a million tiles": ("preprocessor_config.json", lambda c: c | {"max_patches": 10**6}),
    "tiles of text": ("preprocessor_config.json", lambda c: c | {"max_patches": "4"}),
    "no size": ("preprocessor_config.json", lambda c: c | {"size": {"height": 0, "width": 0}}),
    "another attention": ("config.json", lambda c: c | {"_attn_implementation": "owner/name", "vocab_size": -1}),
    "templates by name": ("tokenizer_config.json", lambda c: c | {"chat_template": [{"name": "a", "template": "{{"}]}),
}


@pytest.mark.parametrize("name", MODEL_CHANGES)
def test_a_model_folder_that_says_something_else_is_loaded_or_refused_by_name(monkeypatch, tmp_path, name):
    monkeypatch.setattr("sfa_core.models.templates.CHILD", "import sfa_core.models.templates as t; t.SECONDS = 3; "
                                                            "t.try_prompts()")
    folder = edited(tmp_path, *MODEL_CHANGES[name])
    if name == "templates by name":
        (folder / "chat_template.jinja").unlink()
    if name == "another attention":  # is set before the model is built: no kernel of anybody is fetched
        try:
            assert load_model(folder, placement="cpu").model.config._attn_implementation == "sdpa"
        except ValueError as error:
            assert "\n" not in str(error)
        return
    with pytest.raises(ValueError, match=str(folder)) as error:
        load_model(folder, placement="cpu")
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000


# Names

def test_names_that_are_no_text_and_names_that_are_too_long_are_one_line(tmp_path, monkeypatch):
    exports = tmp_path / "exports"  # with runs of a study, so that names are looked for among them
    (exports / "runs" / "05_embedded_model" / "0123456789ab").mkdir(parents=True)
    monkeypatch.setenv("SFA_EXPORTS", str(exports))
    tmp_path = tmp_path / "named"
    tmp_path.mkdir()
    name = os.fsdecode(b"caf\xe9.json")
    (tmp_path / name).write_text("{}")
    keys = {folder_digest(tmp_path), folder_revision(tmp_path)}
    (tmp_path / name).rename(tmp_path / "cafe.json")
    assert not keys & {folder_digest(tmp_path), folder_revision(tmp_path)}
    for text in ("x" * 300, "x" * 5000, "~nosuchuser/x", "a\0b", "./" + "y" * 400, "é\ud83d"):
        for find in (path_version, arm_folder, lambda text: load_benchmark("folder", source=text)):
            with pytest.raises((ValueError, FileNotFoundError)) as error:
                find(text)
            assert "\n" not in str(error.value) and len(str(error.value)) < 1000


# Data that unfolds

def test_a_small_file_that_unfolds_takes_little_memory_and_only_chosen_rows_are_read(tmp_path):
    import resource
    page, count = png((8, 8)) + bytes(400_000), 2000
    (tmp_path / "copy").mkdir()
    rows = {"image": pa.array([{"bytes": page, "path": None}]).take(pa.array([0] * count)),
            "query": [f"{i}?" for i in range(count)], "label": [[str(i)] for i in range(count)],
            "human_or_machine": ["human"] * count}
    pq.write_table(pa.table(rows), tmp_path / "copy" / "test-0.parquet", compression="zstd", row_group_size=count)
    del rows
    file = tmp_path / "copy" / "test-0.parquet"
    assert file.stat().st_size < 2 * 10**6 < count * len(page) // 100
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    asked = load_benchmark("chartqa", source=tmp_path / "copy", limit=5, seed=0)
    again = load_benchmark("chartqa", source=tmp_path / "copy", limit=5)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(asked) == len(again) == 5 and asked[0].source is asked[4].source, "one picture is held once"
    assert sys.platform != "linux" or grown < 400, f"{grown:.0f} MiB for five rows"
    assert torch.is_tensor(torch.ones(1))
