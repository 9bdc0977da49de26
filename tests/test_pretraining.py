"""The embedded model's training: killed and called again it ends the same, stages can be left out, what it writes can be read."""
from dataclasses import replace

import pytest
import torch

from sfa_core.answers import answer_loss
from sfa_core.dense import dense_binding
from sfa_core.documents import documents, make_document
from sfa_core.embedded import EmbeddedConfig
from sfa_core.models import load_model, save_model
from sfa_core.pretraining import Recipe, dense_batches, load_heads, save_heads, table_text, text_batch, train_embedded, visit, decode_documents

SMALL = Recipe(documents=24, document_seed=5, text_steps=2, text_batch=2, encoder_steps=2, joint_steps=3, batch=2, questions=3, vocabulary=400,
               checkpoint_every=1)
TINY = EmbeddedConfig(vision_width=32, vision_layers=1, vision_heads=2, vision_hidden=64, language_width=32, language_layers=1, language_heads=2,
                      language_kv_heads=1, head_dim=16, language_hidden=64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_embedded(SMALL, tmp_path_factory.mktemp("whole"), TINY, progress=False)


def weights(bundle, heads):
    return dict(bundle.model.named_parameters()) | dict(heads.named_parameters())


def test_an_interrupted_training_ends_with_the_same_weights(trained, tmp_path):
    train_embedded(replace(SMALL, joint_steps=0), tmp_path, TINY, progress=False)  # as far as a run killed between two stages came
    bundle, heads, log = train_embedded(SMALL, tmp_path, TINY, progress=False)
    for (name, there), here in zip(weights(*trained[:2]).items(), weights(bundle, heads).values()):
        assert torch.equal(there, here), name
    assert list(log["stage"].unique()) == ["text", "encoder", "joint"]


def test_a_finished_training_is_read_back(trained, tmp_path):
    first = train_embedded(SMALL, tmp_path, TINY, progress=False)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    again = train_embedded(SMALL, tmp_path, TINY, progress=False)
    assert files == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert all(torch.equal(a, b) for a, b in zip(weights(*first[:2]).values(), weights(*again[:2]).values()))


def test_each_visit_is_a_function_of_seed_stage_and_step():
    data = decode_documents(documents(12, 5), (8, 8))
    one, two = visit(data, SMALL, 3, 7, 4), visit(data, SMALL, 3, 7, 4)
    assert (one[0] == two[0]).all() and one[1] == two[1] and all(len(row["questions"]) == 3 for row in one[1])
    assert any((visit(data, SMALL, 3, step, 4)[0] != one[0]).any() for step in range(8, 12))


def test_the_table_as_text_holds_every_value_label_and_colour():
    for i in range(30):
        document = make_document(("bar", "grouped_bar", "table")[i % 3], i)
        words = table_text(document.row()).replace(",", " ").split()
        said = document.content
        wanted = [*said.rows, *said.colours, *(said.shown(r, c) for r in range(len(said.rows)) for c in range(len(said.columns)))]
        assert set(wanted) <= set(words)


def test_text_only_training_uses_the_language_model_alone(trained):
    bundle = trained[0]
    bundle.model.zero_grad()
    total, count = answer_loss(bundle.model, text_batch(bundle, [make_document("bar", 1).row()]))
    (total / count).backward()
    moved = {name.split(".")[1] for name, p in bundle.model.named_parameters() if p.grad is not None}
    bundle.model.zero_grad()
    assert moved == {"language_model"}


def test_model_and_heads_survive_their_folder(trained, tmp_path):
    bundle, heads, _ = trained
    folder = save_model(bundle, tmp_path / "model")
    save_heads(heads, folder)
    loaded, data = load_model(folder), documents(8, 9)
    assert dense_binding(loaded.family.tower_of(loaded.model), load_heads(folder), dense_batches(loaded, data)) == \
        dense_binding(bundle.family.tower_of(bundle.model), heads, dense_batches(bundle, data, 3))
    with pytest.raises(FileNotFoundError, match="no linear heads"):
        load_heads(tmp_path)


@pytest.mark.parametrize("field", ["documents", "batch", "questions"])
def test_a_recipe_without_data_is_refused(field):
    with pytest.raises(ValueError, match=f"{field} is 0; expected at least 1"):
        Recipe(**{field: 0})
