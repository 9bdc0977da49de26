"""The embedded model's training: killed and called again it ends the same, stages can be left out, what it writes
can be read."""
from dataclasses import replace

import numpy as np
import pytest
import torch

from sfa_core.models.sequences import training_batch
from sfa_core.pretraining.dense import dense_binding
from sfa_core.documents.generate import documents, make_document
from sfa_core.models.embedded import EmbeddedConfig
from sfa_core.models.load import load_model, save_model
from sfa_core.pretraining.recipe import (
    NAMES,
    Recipe,
    decode_documents,
    dense_batches,
    eligible,
    load_heads,
    lookups,
    name_batch,
    phase_at,
    save_heads,
    sentences,
    visit,
)
from sfa_core.pretraining.stages import train_embedded
from sfa_core.documents.questions import KINDS

SMALL = Recipe(documents=24, document_seed=5, encoder_steps=2, lookup_steps=4, joint_steps=3, reading_steps=2,
               cell_steps=2, batch=2, question_batch=4,
               questions=3,
               vocabulary=400,
               checkpoint_every=1)
TINY = EmbeddedConfig(vision_width=32, vision_layers=1, vision_heads=2, vision_hidden=64, language_width=32,
                      language_layers=1, language_heads=2,
                      language_kv_heads=1, head_dim=16, language_hidden=64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_embedded(SMALL, tmp_path_factory.mktemp("whole"), TINY, progress=False)


def weights(bundle, heads):
    return dict(bundle.model.named_parameters()) | dict(heads.named_parameters())


def test_an_interrupted_training_ends_with_the_same_weights(trained, tmp_path):
    killed = replace(SMALL, joint_steps=0, reading_steps=0, cell_steps=0)  # between two stages
    train_embedded(killed, tmp_path, TINY, progress=False)
    bundle, heads, log = train_embedded(SMALL, tmp_path, TINY, progress=False)
    for (name, there), here in zip(weights(*trained[:2]).items(), weights(bundle, heads).values()):
        assert torch.equal(there, here), name
    assert list(log["stage"].unique()) == ["encoder", "lookup", "joint", "reading", "cells"]
    assert (log["loss"] > 0.1).all(), "the study draws this column as the loss of each stage"


def test_a_finished_training_is_read_back(trained, tmp_path):
    first = train_embedded(SMALL, tmp_path, TINY, progress=False)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    again = train_embedded(SMALL, tmp_path, TINY, progress=False)
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert all(torch.equal(a, b) for a, b in zip(weights(*first[:2]).values(), weights(*again[:2]).values()))


def test_each_visit_is_a_function_of_seed_stage_and_step():
    data = decode_documents(documents(12, 5), (8, 8))
    among = eligible(data, KINDS)
    one, two = visit(SMALL, "joint", 7, 4, among), visit(SMALL, "joint", 7, 4, among)
    assert (one[0] == two[0]).all() and one[1] == two[1] and all(len(asked) == 3 for asked in one[1])
    assert any((visit(SMALL, "joint", step, 4, among)[0] != one[0]).any() for step in range(8, 12))
    assert any((visit(SMALL, stage, step, 4, among)[0] != visit(SMALL, "joint", step, 4, among)[0]).any()
               for stage in ("lookup",) for step in range(4))


def test_a_name_is_followed_directly_by_its_value(trained):
    bundle, data = trained[0], decode_documents(documents(4, 5), (8, 8))
    asked = [lookups(row)[:2] for row in data.rows]
    batch = name_batch(bundle, data, np.arange(4), asked)
    for ids, labels, names in zip(batch["input_ids"], batch["labels"], asked):
        said = bundle.tokenizer.decode(ids[labels != -100])
        assert [part.strip() for part in said.split("<|im_end|>") if part.strip()] == [q["answers"][0] for q in names]
        assert all(f"{q['question']}{q['answers'][0]}<|im_end|>" in bundle.tokenizer.decode(ids) for q in names)
    assert torch.equal(batch["pixel_values"], training_batch(bundle, data.rows)["pixel_values"])


def test_the_lookup_stage_leaves_the_encoder_alone(trained, tmp_path):
    bundle, _, _ = train_embedded(replace(SMALL, joint_steps=0, reading_steps=0, cell_steps=0), tmp_path / "a", TINY,
                                  progress=False)
    encoder, _, _ = train_embedded(replace(SMALL, lookup_steps=0, joint_steps=0, reading_steps=0, cell_steps=0),
                                   tmp_path / "b", TINY, progress=False)
    moved = {name for (name, p), q in zip(bundle.model.named_parameters(), encoder.model.parameters())
             if not torch.equal(p, q)}
    assert (
        moved
        and not any("vision_tower" in name for name in moved)
        and all(p.requires_grad for p in bundle.model.parameters())
    )


def test_every_name_is_looked_up_and_names_one_value():
    for i in range(30):
        kind = ("bar", "grouped_bar", "table")[i % 3]
        row = make_document(kind, i).row()
        header, *lines = row["table"]
        asked = lookups(row)
        assert len({q["question"] for q in asked}) == len(asked), "a name that means two things"
        cells = len(lines) * (len(header) - 1)
        assert len(asked) == cells * (1 if kind == "table"
                                      else 2), "each cell by its label, and by its colour where it has one"
        for q in asked:
            label, *rest = q["question"].split()
            line = next((line for line in lines if line[0] == label), None)
            if q["kind"] == "cell_name" and rest[0] in header:
                assert q["answers"] == [line[header.index(rest[0])]]
            elif q["kind"] == "label_name":
                assert q["answers"] == [line[1]]
            else:
                shown = {m["colour"]: (m["row"], m["column"])
                         for m in row["marks"] if m["row"] >= 0 and (not rest or lines[m["row"]][0] == label)}
                r, c = shown[rest[0] if rest else label]
                assert q["answers"] == [lines[r][c + 1]]


def test_every_value_is_asked_in_every_wording():
    for i in range(9):
        row = make_document(("bar", "grouped_bar", "table")[i % 3], i).row()
        asked, names = {q["question"]: q["answers"] for q in sentences(row)}, lookups(row)
        assert len(asked) == 2 * len(names), "two wordings of each name, all different"
        generated = [q for q in row["questions"] if q["kind"] in ("read_label", "read_colour", "read_cell")]
        assert generated and all(asked[q["question"]] == q["answers"][:1] for q in generated)


def test_one_kind_of_name_comes_after_the_other():
    kinds = [phase_at("lookup", step, 20) for step in range(20)]
    assert kinds == [NAMES[:1]] * 3 + [NAMES[:2]] * 4 + [NAMES] * 13
    data = decode_documents(documents(12, 5), (8, 8))
    index, asked = eligible(data, ("colour_name",))
    assert {data.rows[i]["kind"] for i in index} == {"bar"} and {q["kind"] for of in asked for q in of} == {
        "colour_name"
    }


def test_model_and_heads_survive_their_folder(trained, tmp_path):
    bundle, heads, _ = trained
    folder = save_model(bundle, tmp_path / "model")
    save_heads(heads, folder)
    loaded, data = load_model(folder), documents(8, 9)
    assert dense_binding(loaded.family.tower_of(loaded.model), load_heads(folder), dense_batches(loaded, data)) == \
        dense_binding(bundle.family.tower_of(bundle.model), heads, dense_batches(bundle, data, 3))
    with pytest.raises(FileNotFoundError, match="no linear heads"):
        load_heads(tmp_path)


@pytest.mark.parametrize("field", ["documents", "batch", "question_batch", "questions"])
def test_a_recipe_without_data_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} is 0; expected at least 1"):
        Recipe(**{field: 0})
